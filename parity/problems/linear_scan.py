"""Diagonal linear recurrence over packed sequences, with a state that enters and one that leaves.

    h[t] = a[t] * h[t-1] + b[t]        within a sequence; before its first token: h0[s], or 0
    h_T[s] = h[cu[s+1] - 1]            of an empty sequence: h0[s]
    a, b [T, W]   cu_seqlens [B + 1]   h0 [B, W] float32   ->   h [T, W], h_T [B, W] float32

    for every channel, and every chunk of time:
        h = what the chunks before it leave          (a chunk is a map: h -> A h + B)
        for every tile of the chunk:
            the parts of the tile become maps, side by side; each part finds the h before it
            h[t] = a[t] * h + b[t], row by row       float32, in registers
            where a sequence ends: h_T = h, and the next one's h0

Backward, with u the gradient of b, against time:
    u[t] = dh[t] + a[t+1] * u[t+1]     after the last token: dh_T[s]
    da[t] = u[t] * h[t-1]    db[t] = u[t]    dh0[s] = a[first] * u[first]
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from parity.spec import (
    Arithmetic,
    Array,
    Cost,
    Given,
    Integers,
    Normal,
    Problem,
    Uniform,
    Workload,
)

STATES = ("h0",)


def lengths(work: Workload) -> list[int]:
    """Tokens of every sequence: B alike, or drawn, with an empty one among them."""
    T, B = work["T"], work["B"]
    if B < 1:
        raise ValueError(f"B is {B}: expected at least one sequence")
    if "ragged" not in work.tags or B == 1:
        return [T * (s + 1) // B - T * s // B for s in range(B)]
    drawn = np.random.default_rng(T).dirichlet(np.ones(B - 1)) * T
    cuts = [0, *np.round(np.cumsum(drawn)).astype(int)]
    found = [int(b - a) for a, b in itertools.pairwise(cuts)]
    return [*found[:1], 0, *found[1:]]


def cu_seqlens(work: Workload) -> Given:
    B = work["B"]
    return Given((B + 1,), "int32", lambda: np.cumsum([0, *lengths(work)]).astype(np.int32))


def sequences(cu: Any) -> Iterator[tuple[int, slice]]:
    """Every sequence and its rows, empty ones too."""
    bounds = [int(t) for t in cu]
    for s, (start, stop) in enumerate(itertools.pairwise(bounds)):
        yield s, slice(start, stop)


def columns(work: Workload) -> Iterator[slice]:
    """Channels are independent: float64 intermediates of about 2^28 elements."""
    step = max(1, (1 << 28) // max(1, work["T"]))
    for start in range(0, work["W"], step):
        yield slice(start, min(start + step, work["W"]))


def scan(ar: Arithmetic, a: Any, b: Any, h: Any) -> Any:
    """The recurrence of one sequence [L, W] from h [W]: about sqrt(L) runs of rows side by side,
    then chained."""
    L, W = b.shape
    run = math.isqrt(max(0, L - 1)) + 1
    count = -(-L // run)
    maps, states = ar.empty((count * run, W), like=b), ar.empty((count * run, W), like=b)
    for whole, part in ((maps, a), (states, b)):
        whole[:L, :] = part
        whole[L:, :] = 0
    maps, states = (ar.xp.reshape(x, (count, run, W)) for x in (maps, states))
    for i in range(1, run):
        states[:, i, :] += maps[:, i, :] * states[:, i - 1, :]
        maps[:, i, :] *= maps[:, i - 1, :]
    for j in range(count):
        states[j, :, :] += maps[j, :, :] * h
        h = states[j, -1, :]
    return ar.xp.reshape(states, (count * run, W))[:L, :]


def scan_back(ar: Arithmetic, a: Any, dh: Any, dh_T: Any) -> Any:
    """u [L, W] of one sequence, from its end."""
    last = ar.empty((1, a.shape[1]), like=a)
    last[...] = 1
    later = ar.xp.flip(ar.xp.concat([a[1:, :], last], axis=0), axis=0)
    return ar.xp.flip(scan(ar, later, ar.xp.flip(dh, axis=0), dh_T), axis=0)


def before(ar: Arithmetic, h: Any, start: Any) -> Any:
    """h of the row before, `start` [W] before the first."""
    shifted = ar.empty(h.shape, like=h)
    shifted[1:, :] = h[:-1, :]
    shifted[:1, :] = start
    return shifted


def start_of(ar: Arithmetic, h0: Any, s: int, cols: slice, like: Any) -> Any:
    """The state [W] before sequence s."""
    if h0 is not None:
        return ar.lift(h0[s, cols])
    zero = ar.empty((cols.stop - cols.start,), like=like)
    zero[...] = 0
    return zero


def _ci(name: str, T: int, B: int, W: int, dtype: str, **more: Any) -> Workload:
    return Workload(name, {"T": T, "B": B, "W": W}, dtype, ("ci", "ragged"), **more)


def layer(name: str, T: int, B: int, W: int, *tags: str, dtype: str = "bfloat16") -> Workload:
    return Workload(
        name, {"T": T, "B": B, "W": W}, dtype, ("model", "memory-bound", *tags), absent=STATES
    )


def workloads(*more: Workload) -> tuple[Workload, ...]:
    """T: all tokens. The layers are RecurrentGemma's, 2B and 9B."""
    return (
        # two sequences and an empty one; three chunks and, of float32, two tiles of channels
        _ci("ci", 141, 3, 24, "float16"),
        _ci("ci_float32", 93, 4, 37, "float32", absent=STATES),
        layer("lru_2b", 8 * 8192, 8, 2560),
        layer("lru_9b", 8 * 8192, 8, 4096),
        layer("lru_9b_float32", 8 * 8192, 8, 4096, dtype="float32"),
        layer("lru_9b_b1", 8192, 1, 4096),
        layer("lru_1k_b1", 32768, 1, 1024),  # too few channels for a GPU
        layer("packed_32k", 32768, 40, 4096, "ragged"),
        *more,
        layer("lru_huge", 524_544, 8, 4096, "huge"),  # beyond 2^31 elements
    )


WORKLOADS = workloads()


def inputs(work: Workload) -> dict:
    T, W = work["T"], work["W"]
    given = {
        # a state lasts for about a hundred tokens: what crosses tiles and chunks matters
        "a": Uniform((T, W), work.dtype, 0.98, 1.0),
        "b": Normal((T, W), work.dtype),
        "cu_seqlens": cu_seqlens(work),
        "h0": Normal((work["B"], W), "float32", std=5.0),
    }
    return {name: d for name, d in given.items() if name not in work.absent}


def outputs(work: Workload) -> dict[str, Array]:
    return {
        "h": Array((work["T"], work["W"]), work.dtype),
        "h_T": Array((work["B"], work["W"]), "float32"),
    }


def cotangents(work: Workload) -> dict:
    return {"d" + name: Normal(a.shape, a.dtype) for name, a in outputs(work).items()}


def grads(work: Workload) -> dict[str, Array]:
    rows = Array((work["T"], work["W"]), work.dtype)
    found = {"da": rows, "db": rows, "dh0": Array((work["B"], work["W"]), "float32")}
    return {name: a for name, a in found.items() if name[1:] not in work.absent}


def oracle(
    ar: Arithmetic, work: Workload, a: Any, b: Any, cu_seqlens: Any, h0: Any = None
) -> tuple[Any, Any]:
    h, h_T = ar.empty(b.shape, like=b), ar.empty((work["B"], work["W"]), like=b)
    for cols in columns(work):
        for s, rows in sequences(cu_seqlens):
            h_T[s, cols] = start_of(ar, h0, s, cols, like=b)
            h[rows, cols] = scan(ar, ar.lift(a[rows, cols]), ar.lift(b[rows, cols]), h_T[s, cols])
            if rows.stop > rows.start:
                h_T[s, cols] = h[rows.stop - 1, cols]
    return h, h_T


def oracle_bwd(
    ar: Arithmetic, work: Workload, a: Any, b: Any, cu_seqlens: Any, dh: Any, dh_T: Any,
    h0: Any = None,
) -> tuple[Any, ...]:  # fmt: skip
    da, db = ar.empty(b.shape, like=b), ar.empty(b.shape, like=b)
    dh0 = ar.empty((work["B"], work["W"]), like=b)
    for cols in columns(work):
        for s, rows in sequences(cu_seqlens):
            start = start_of(ar, h0, s, cols, like=b)
            lifted = ar.lift(a[rows, cols])
            h = ar.stored(scan(ar, lifted, ar.lift(b[rows, cols]), start), work.dtype)
            u = scan_back(ar, lifted, ar.lift(dh[rows, cols]), ar.lift(dh_T[s, cols]))
            da[rows, cols] = u * before(ar, h, start)
            db[rows, cols] = u
            dh0[s, cols] = ar.lift(dh_T[s, cols])
            if rows.stop > rows.start:
                dh0[s, cols] = lifted[0, :] * u[0, :]
    return (da, db) if h0 is None else (da, db, dh0)


def probe(work: Workload) -> dict | None:
    """With a in {-1, 0, 1} a state forgets within some 50 tokens: h is an integer below 256."""
    if work.name == "ci_float32":  # the interpreters are slow
        return None
    drawn = inputs(work) | cotangents(work)
    whole = {n: Integers(d.shape, d.dtype) for n, d in drawn.items() if not isinstance(d, Given)}
    return drawn | whole | {"a": Integers(drawn["a"].shape, work.dtype, -1, 1)}


def cost(work: Workload, which: str) -> Cost:
    T, W = work["T"], work["W"]
    arrays = 3 if which == "fwd" else 5  # a, b, h; a, h, dh, da, db
    state = (1 if which == "fwd" else 2) * 4 * work["B"] * W  # h_T; dh_T and h0 or dh0, at least
    return Cost((2 if which == "fwd" else 3) * T * W, arrays * T * W * work.itemsize + state)


def reduction(work: Workload, name: str) -> int:
    return max(lengths(work))


# wrong answers that only a scan can give: see parity.faults


def _joined(case: Any, cu: Any) -> Any:
    arrays = dict(case.arrays) | {"cu_seqlens": cu}
    return case.recomputed(Arithmetic.model(case.xp), case.work, arrays)


def state_leaks(case: Any) -> Any:
    """A sequence goes on with the state of the one before it."""
    cu = case.xp.asarray(case.arrays["cu_seqlens"], copy=True)
    inner = [s for s in range(1, len(cu) - 1) if 0 < int(cu[s]) < int(cu[-1])]
    if not inner:
        return None
    first = int(cu[inner[0]])
    cu[cu == first] = 0
    return _joined(case, cu)


def boundary_off_by_one(case: Any) -> Any:
    """A sequence begins one token late."""
    cu = case.xp.asarray(case.arrays["cu_seqlens"], copy=True)
    inner = [s for s in range(1, len(cu) - 1) if 0 < int(cu[s]) < int(cu[-1]) - 1]
    if not inner:
        return None
    cu[cu == int(cu[inner[-1]])] += 1
    return _joined(case, cu)


def forgotten_state(case: Any) -> Any:
    """The state that enters counts as zero."""
    if "h0" not in case.arrays:
        return None
    arrays = dict(case.arrays) | {"h0": 0 * case.arrays["h0"]}
    return case.recomputed(Arithmetic.model(case.xp), case.work, arrays)


def state_lost_at_a_tile(case: Any) -> Any:
    """Row 64 begins with no state, as if tiles were sequences."""
    a = case.xp.asarray(case.arrays["a"], copy=True)
    if case.which != "fwd" or a.shape[0] <= 64:
        return None
    a[64, :] = 0
    arrays = dict(case.arrays) | {"a": a}
    return case.recomputed(Arithmetic.model(case.xp), case.work, arrays)


def empty_sequence_not_written(case: Any) -> Any:
    """The state after a sequence without tokens is never written: it still holds NaN."""
    name = "h_T" if case.which == "fwd" else "dh0"
    empty = [s for s, rows in sequences(case.arrays["cu_seqlens"]) if rows.start == rows.stop]
    if name not in case.specs or not empty:
        return None
    at = list(case.specs).index(name)
    state = case.xp.asarray(case.good[at], copy=True)
    state[empty[0], :] = case.xp.nan
    return (*case.good[:at], state, *case.good[at + 1 :])


NUMERIC = ("norm", "tile", "peak", "bias", "zeros")
FAULTS = {
    state_leaks: NUMERIC,
    boundary_off_by_one: NUMERIC,
    forgotten_state: NUMERIC,
    empty_sequence_not_written: ("nonfinite",),
}

PROBLEM = Problem(
    stem="linear_scan",
    doc=__doc__ or "",
    family="scan",
    workloads=WORKLOADS,
    inputs=inputs,
    cotangents=cotangents,
    outputs=outputs,
    grads=grads,
    oracle=oracle,
    oracle_bwd=oracle_bwd,
    cost=cost,
    reduction=reduction,
    probe=probe,
    implementations={
        "triton": "triton_kernels.linear_scan:linear_scan",
        "pallas": "pallas_kernels.linear_scan:linear_scan",
    },
    peers={
        "fla": "parity.peers.scan:fla_hgrn",
        "torch.compile": "parity.peers.scan:compiled_scan",
        "jax.lax.associative_scan": "parity.peers.scan:jax_associative_scan",
    },
    faults=FAULTS | {state_lost_at_a_tile: NUMERIC},
    glue=("pad", "slice", "copy", "convert_element_type"),
)
