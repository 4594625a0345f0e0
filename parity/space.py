"""Which Configs `parity tune` tries: the values of each Config field, family by family.

Twins share field names, and so do the stems of a family: one table serves them all, and a new
problem of a known family is tuned without a word here. A kernel package knows nothing of it. Not
every combination makes sense; one that a Config refuses, or that does not compile, is pruned before
it costs time on a GPU.
"""

from collections.abc import Mapping

from parity.spec import Problem, Workload

Config = dict[str, int]
Axes = dict[str, tuple[int, ...]]

# A search goes from the top of a table downwards: what matters most comes first.
AXES: Mapping[str, Axes] = {
    "gemm": {
        "block_n": (64, 128, 192, 256),
        "block_m": (64, 128, 192, 256),
        "block_k": (32, 64, 128),
        "stages": (2, 3, 4, 5, 6, 8),
        "warps": (4, 8, 16),
        "warpgroups": (1, 2, 3),
        "cluster": (1, 2),
        "group_m": (4, 8, 16, 32),
        "programs": (1, 2),
        "decode": (0, 1),
    },
    "norm": {
        "block_n": (1024, 2048, 4096, 8192, 16384, 32768, 65536),
        "warps": (4, 8, 16, 32),
        "warpgroups": (1, 2, 4, 8),
        "stages": (1, 2, 3, 4, 8),
        "programs": (0, 1, 2, 4),
        "block_m": (1, 2, 4),
    },
    "attention": {
        "block_m": (64, 128),
        "block_n": (32, 64, 128),
        "stages": (1, 2, 3, 4),
        "warps": (4, 8),
    },
    "scan": {
        "block_t": (8, 16, 32, 64, 128, 256),
        "block_c": (32, 64, 128, 256),
        "block_v": (32, 64, 128, 256),
        "spans": (1, 2, 4, 8, 16, 32),
        "heads": (1, 2, 4, 8, 16),
        "warpgroups": (1, 2),
        "chunks": (1, 2, 4, 8, 16, 32),
        "stages": (2, 3, 4, 6, 8),
        "warps": (4, 8, 16),
        "programs": (1, 2, 4),
    },
}

# What a stem tries in place of its family's values.
OWN: Mapping[str, Axes] = {
    # its weights are on the left, and its tokens, often few, are a wgmma's columns: 8 or more
    "int4_matmul": {
        "block_n": (64, 128, 256),
        "block_m": (8, 16, 32, 64, 128, 256),
        "warpgroups": (1, 2, 3, 4),
    },
}

# Fields that a pass does not read: its Configs would all be one.
UNREAD: Mapping[tuple[str, str, str], tuple[str, ...]] = {
    ("rms_norm", "pallas", "fwd"): ("programs",),
    # heads of a group: sums of gradients
    ("decay_attention", "triton", "fwd"): ("heads",),
    ("mamba2_ssd", "triton", "fwd"): ("heads",),
    # there a group is one head
    ("retention", "triton", "fwd"): ("heads",),
    ("retention", "triton", "bwd"): ("heads",),
}


def axes(problem: Problem, work: Workload, which: str, twin: str, start: Config) -> Axes:
    """Field -> the values to try, the start's own among them, ascending.

    A tile stays under twice the size it covers: block_n under 2 * N, where the workload has an N;
    the smallest is always tried.

    Raises:
        LookupError: no table for the problem's family.
    """
    if problem.family not in AXES:
        raise LookupError(
            f"{problem.stem}: no axes for the family {problem.family!r} in parity/space.py "
            f"(there are: {', '.join(AXES)})"
        )
    unread = UNREAD.get((problem.stem, twin, which), ())
    found: Axes = {}
    for name, values in (AXES[problem.family] | OWN.get(problem.stem, {})).items():
        if name not in start or name in unread:
            continue
        letter = name.removeprefix("block_").upper() if name.startswith("block_") else ""
        most = max(2 * work.sizes.get(letter, max(values)), min(values) + 1)
        found[name] = tuple(sorted({start[name], *(v for v in values if v < most or not letter)}))
    return found


def star(start: Config, axes: Axes) -> list[Config]:
    """Every Config that differs from `start` in one field."""
    return [start | {n: v} for n, values in axes.items() for v in values if v != start[n]]


def grid(start: Config, axes: Axes) -> list[Config]:
    """Every Config of the space, those that differ from `start` in the fewest fields first."""
    configs = [start]
    for name, values in axes.items():
        configs = [c | {name: v} for c in configs for v in values]
    return sorted(configs, key=lambda c: sum(c[n] != start[n] for n in axes))
