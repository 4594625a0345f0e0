"""Softmax over rows, with an optional mask; a row that keeps nothing is all zeros.

    y[r, n] = exp(scale * x[r, n] - top[r]) / sum_j exp(scale * x[r, j] - top[r])
    over the kept j; 0 where masked
    x [R, N]   mask [R, N] (True = keep)   ->   y [R, N]
    causal_offset: row r keeps columns n <= r + causal_offset

    for every row:
        top = max over kept of scale * x         read once
        e = exp(scale * x - top)                 0 where masked
        y = e / sum(e)                           written once
    where a row exceeds a block's memory: an online pass for (top, sum), then a second read

Backward: dx = scale * y * (dy - sum_n y * dy), from the rounded y.
"""

from typing import Any

from parity.spec import (
    Arithmetic,
    Array,
    Cost,
    Keep,
    Launch,
    Normal,
    Plan,
    Problem,
    Workload,
    row_blocks,
)


def _rows(R: int, N: int, dtype: str = "bfloat16", *tags: str, name: str = "", **more) -> Workload:
    tags = tags or ("model", "memory-bound")
    return Workload(
        name or f"softmax_{R}x{N}", {"R": R, "N": N}, dtype, tags, absent=("mask",), **more
    )


WORKLOADS = (
    _rows(9, 1003, "float16", "ci", name="ci", options={"scale": 0.7}),
    # rows that keep nothing, some, everything
    _rows(5, 3, "float32", "ci", name="ci_causal", options={"scale": -1.3, "causal_offset": -1}),
    # both masks at once; the causal one reaches the first rows' last columns
    Workload(
        "ci_mask", {"R": 7, "N": 264}, "float16", ("ci",), {"scale": 1.5, "causal_offset": 260}
    ),
    # a row exceeds what one block holds (float32: in float16 its elements would be subnormal)
    _rows(3, 60_003, "float32", "ci", name="ci_long_row"),
    _rows(16384, 4096),
    _rows(8192, 8192),
    _rows(4096, 32768),
    _rows(1024, 151936),  # Qwen's vocabulary
    _rows(8192, 8192, name="softmax_8192x8192_causal", options={"causal_offset": 0}),
    _rows(16384, 151936, "bfloat16", "model", "huge"),  # beyond 2^31 elements
)


def inputs(work: Workload) -> dict:
    x = {"x": Normal((work["R"], work["N"]), work.dtype)}
    # one row in the middle keeps nothing
    mask = {"mask": Keep((work["R"], work["N"]), dead_rows=(work["R"] // 2,))}
    return x if "mask" in work.absent else x | mask


def outputs(work: Workload) -> dict[str, Array]:
    return {"y": Array((work["R"], work["N"]), work.dtype)}


def cotangents(work: Workload) -> dict:
    return {"dy": Normal((work["R"], work["N"]), work.dtype)}


def grads(work: Workload) -> dict[str, Array]:
    return {"dx": Array((work["R"], work["N"]), work.dtype)}


def _block(ar: Arithmetic, work: Workload, x: Any, mask: Any, rows: slice) -> Any:
    xp = ar.xp
    s = work.options.get("scale", 1.0) * ar.lift(x[rows, :])
    nothing = xp.full_like(s, -xp.inf)
    if mask is not None:
        s = xp.where(mask[rows, :], s, nothing)
    if (offset := work.options.get("causal_offset")) is not None:
        r, n = xp.ones_like(s[:, :1]), xp.ones_like(s[:1, :])
        r, n = xp.cumulative_sum(r, axis=0) - 1 + rows.start, xp.cumulative_sum(n, axis=1) - 1
        s = xp.where(n <= r + offset, s, nothing)
    top = xp.max(s, axis=1, keepdims=True)
    e = xp.exp(s - xp.where(top == -xp.inf, xp.zeros_like(top), top))
    total = xp.sum(e, axis=1, keepdims=True)
    return e / xp.where(total == 0, xp.ones_like(total), total)


def oracle(ar: Arithmetic, work: Workload, x: Any, mask: Any = None) -> tuple[Any]:
    y = ar.empty(x.shape, like=x)
    for rows in row_blocks(x):
        y[rows, :] = _block(ar, work, x, mask, rows)
    return (y,)


def oracle_bwd(ar: Arithmetic, work: Workload, x: Any, dy: Any, mask: Any = None) -> tuple[Any]:
    dx = ar.empty(x.shape, like=x)
    for rows in row_blocks(x):
        y, g = ar.stored(_block(ar, work, x, mask, rows), work.dtype), ar.lift(dy[rows, :])
        dx[rows, :] = (
            work.options.get("scale", 1.0) * y * (g - ar.xp.sum(y * g, axis=1, keepdims=True))
        )
    return (dx,)


def cost(work: Workload, which: str) -> Cost:
    elements = work["R"] * work["N"]
    mask = 0 if "mask" in work.absent else elements
    if which == "fwd":
        return Cost(flops=5 * elements, bytes=2 * elements * work.itemsize + mask)
    return Cost(flops=5 * elements, bytes=3 * elements * work.itemsize)


def plan(work: Workload, which: str, launch: Launch) -> Plan | None:
    """Rows are tiles. Triton's code may walk over a row twice, Pallas' reads twice what its slots
    of shared memory cannot hold."""
    if launch.number or not {"block_m", "block_n"} <= launch.config.keys():
        return None
    R, N, config = work["R"], work["N"], launch.config
    held = 0
    if launch.twin == "pallas":  # the slots of each warpgroup that shares the row
        held = config["stages"] * config["block_n"] * config["warpgroups"] // config["block_m"]
    mask = which == "fwd" and "mask" not in work.absent
    column = work.itemsize * (1 if which == "fwd" else 2) + mask  # bytes read
    return Plan(
        -(-R // config["block_m"]),
        again=R * max(0, N - held) * column,
        window=config["block_m"] * N * column,
    )


def reduction(work: Workload, name: str) -> int:
    return work["N"]


PROBLEM = Problem(
    stem="softmax",
    doc=__doc__ or "",
    family="norm",
    workloads=WORKLOADS,
    inputs=inputs,
    cotangents=cotangents,
    outputs=outputs,
    grads=grads,
    oracle=oracle,
    oracle_bwd=oracle_bwd,
    cost=cost,
    reduction=reduction,
    plan=plan,
    implementations={
        "triton": "triton_kernels.softmax:softmax",
        "pallas": "pallas_kernels.softmax:softmax",
    },
    peers={
        "torch.compile": "parity.peers:compiled_softmax",
        "torch": "parity.peers:torch_softmax",
        "jax.nn": "parity.peers:jax_softmax",
    },
    bwd_options=("scale",),
    glue=("pad", "slice", "copy", "convert_element_type", "bitcast_convert_type"),
)
