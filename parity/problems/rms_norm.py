"""Root-mean-square normalisation of rows, with an optional residual added first.

    h = round(x + residual)    rstd[r] = (mean_n h[r, n]^2 + eps)^(-1/2)
    y = h * rstd * (w + w_offset)
    x [R, N]   w [N]   residual [R, N]   ->   y [R, N]   (and h [R, N] with a residual)

    for every row:
        h = x + residual                         rounded to x.dtype before the statistics
        rstd = rsqrt(mean(h * h) + eps)
        y = h * rstd * (w + w_offset)            one rounding

Backward, with xh = h * rstd and g = dy * (w + w_offset):
    dx = rstd * (g - xh * mean_n(g * xh)) + dh          (also the gradient of residual)
    dw = sum_r dy * xh                                  partial sums, added in a fixed order
"""

from typing import Any

from parity.spec import (
    Arithmetic,
    Array,
    Cost,
    Launch,
    Normal,
    Plan,
    Problem,
    Workload,
    row_blocks,
)

RESIDUAL = ("residual",)


def _rows(R: int, N: int, *tags: str, residual: bool = False, **more) -> Workload:
    name = f"rms_norm_{R}x{N}" + ("_residual" if residual else "")
    tags, absent = tags or ("model", "memory-bound"), () if residual else RESIDUAL
    return Workload(name, {"R": R, "N": N}, "bfloat16", tags, absent=absent, **more)


WORKLOADS = (
    Workload("ci", {"R": 17, "N": 1000}, "float16", ("ci",), {"eps": 1e-5}, RESIDUAL),
    Workload("ci_residual", {"R": 11, "N": 520}, "float16", ("ci",), {"w_offset": 1.0}),
    Workload("ci_float32", {"R": 13, "N": 259}, "float32", ("ci",)),
    Workload(
        "ci_cast", {"R": 9, "N": 328}, "float16", ("ci",), {"cast_before_weight": True}, RESIDUAL
    ),
    Workload("ci_long_row", {"R": 5, "N": 20_008}, "float16", ("ci",), {}, RESIDUAL),
    _rows(16384, 4096),
    _rows(16384, 4096, residual=True),
    _rows(8192, 8192),
    _rows(8192, 8192, residual=True),
    _rows(4096, 32768),
    _rows(4096, 32768, residual=True),
    _rows(524_544, 4096, "model", "huge"),  # beyond 2^31 elements
)


def inputs(work: Workload) -> dict:
    x = {
        "x": Normal((work["R"], work["N"]), work.dtype, std=1.5),
        "w": Normal((work["N"],), work.dtype),
    }
    return (
        x
        if "residual" in work.absent
        else x | {"residual": Normal((work["R"], work["N"]), work.dtype)}
    )


def outputs(work: Workload) -> dict[str, Array]:
    rows = Array((work["R"], work["N"]), work.dtype)
    return {"y": rows} if "residual" in work.absent else {"y": rows, "h": rows}


def cotangents(work: Workload) -> dict:
    rows = Normal((work["R"], work["N"]), work.dtype)
    return {"dy": rows} if "residual" in work.absent else {"dy": rows, "dh": rows}


def grads(work: Workload) -> dict[str, Array]:
    return {"dx": Array((work["R"], work["N"]), work.dtype), "dw": Array((work["N"],), "float32")}


def _statistics(
    ar: Arithmetic, work: Workload, x: Any, residual: Any, rows: slice
) -> tuple[Any, Any]:
    h = ar.lift(x[rows, :])
    if residual is not None:  # h is an output: its rounding belongs to the definition
        h = ar.rounded(h + ar.lift(residual[rows, :]), work.dtype)
    mean = ar.xp.mean(h * h, axis=1, keepdims=True)
    return h, (mean + work.options.get("eps", 1e-6)) ** -0.5


def _weight(ar: Arithmetic, work: Workload, w: Any) -> Any:
    return ar.lift(w) + work.options.get("w_offset", 0.0)


def oracle(ar: Arithmetic, work: Workload, x: Any, w: Any, residual: Any = None) -> tuple[Any, ...]:
    y, h = ar.empty(x.shape, like=x), ar.empty(x.shape, like=x)
    for rows in row_blocks(x):
        h[rows, :], rstd = _statistics(ar, work, x, residual, rows)
        xh = h[rows, :] * rstd
        if work.options.get("cast_before_weight"):
            xh = ar.stored(xh, work.dtype)
        y[rows, :] = xh * _weight(ar, work, w)
    return (y,) if residual is None else (y, h)


def oracle_bwd(
    ar: Arithmetic, work: Workload, x: Any, w: Any, dy: Any, residual: Any = None, dh: Any = None
) -> tuple[Any, Any]:
    dx, dw = ar.empty(x.shape, like=x), 0 * ar.lift(w)
    for rows in row_blocks(x):
        h, rstd = _statistics(ar, work, x, residual, rows)
        xh, g = h * rstd, ar.lift(dy[rows, :]) * _weight(ar, work, w)
        dx[rows, :] = rstd * (g - xh * ar.xp.mean(g * xh, axis=1, keepdims=True))
        if dh is not None:
            dx[rows, :] += ar.lift(dh[rows, :])
        dw += ar.xp.sum(ar.lift(dy[rows, :]) * xh, axis=0)
    return dx, dw


def cost(work: Workload, which: str) -> Cost:
    rows, row = work["R"] * work["N"] * work.itemsize, work["N"] * work.itemsize
    residual = "residual" not in work.absent
    if which == "fwd":  # read x, w (and residual); write y (and h)
        return Cost(flops=4 * work["R"] * work["N"], bytes=(4 if residual else 2) * rows + row)
    # read h, dy, w, rstd (and dh); write dx, dw
    small = row + 4 * work["R"] + 4 * work["N"]
    return Cost(flops=9 * work["R"] * work["N"], bytes=(4 if residual else 3) * rows + small)


def plan(work: Workload, which: str, launch: Launch) -> Plan | None:
    """Rows are tiles. Triton's code may walk over a row twice, Pallas' reads twice what its slots
    of shared memory cannot hold; w is read for each tile or block, and the backward's blocks leave
    partial sums of dw."""
    if launch.number or not {"block_m", "block_n"} <= launch.config.keys():
        return None
    R, N, config = work["R"], work["N"], launch.config
    forward, triton = which == "fwd", launch.twin == "triton"
    residual = "residual" not in work.absent
    whole = config["block_n"] >= N
    block_m = config["block_m"] if forward or whole or not triton else 1
    tiles = -(-R // block_m)
    read = 1 + residual if forward else 2
    held, weights = 0, launch.blocks if whole and not forward else tiles
    if not triton:  # the slots of each warpgroup that shares the row; they take dh as well
        held = config["stages"] * config["block_n"] * config["warpgroups"] // block_m
        read += residual and not forward
        weights = launch.blocks
    partial = 0 if forward else launch.blocks * N * 4 * (1 if triton else block_m)
    return Plan(
        tiles,
        again=R * max(0, N - held) * read * work.itemsize,
        window=block_m * N * read * work.itemsize,
        shared=weights * N * work.itemsize,
        extra=2 * partial,  # written, then read
    )


def reduction(work: Workload, name: str) -> int:
    return work["R"] if name == "dw" else work["N"]


PROBLEM = Problem(
    stem="rms_norm",
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
        "triton": "triton_kernels.rms_norm:rms_norm",
        "pallas": "pallas_kernels.rms_norm:rms_norm",
    },
    peers={
        "torch.compile": "parity.peers:compiled_rms_norm",
        "liger": "parity.peers:liger_rms_norm",
        "jax.numpy": "parity.peers:jax_rms_norm",
    },
    bwd_options=("w_offset", "cast_before_weight"),
    glue=("pad", "slice", "copy", "convert_element_type"),
)
