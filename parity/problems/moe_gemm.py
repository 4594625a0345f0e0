"""Grouped matrix product: each expert of a mixture multiplies its own rows by its own weights.

    o = cumsum(sizes)    R_e = rows o[e-1] .. o[e] - 1    sizes are known on the device alone
    h[r] = x[r] @ w[e] + bias[e]                for r in R_e;  with rows: x[rows[r]] for x[r]
    y[r] = row_scale[r] * act(h[r])             rows from o[E-1] on are dead: y is 0
    x [M, K]   w [E, K, N]   sizes [E]   ->   y [M, N]
    with rows [M]: x [T, K].  transpose_w: w [E, N, K].  swiglu: y [M, N / 2], w's columns
    interleave gate and up:  act(h)[n] = silu(h[2 n]) * h[2 n + 1]

    for every tile of every expert's product (mi, ni):
        acc = 0                                 float32, in registers
        for ki in range(K / block_k):
            acc += x[mi, ki] @ w[e, ki, ni]
        y[mi, ni] = round(epilogue(acc))        rows of the next expert are not touched

Backward, with dh the gradient of h:
    dx[r] = dh[r] @ w[e]^T                      with rows: dx[t] = sum of those with rows[r] = t
    dw[e] = x[R_e]^T @ dh[R_e]                  0 for an expert without rows; alone: pass "dw"
    dbias[e] = sum of dh[R_e]    drow_scale[r] = dy[r] . act(h[r])
"""

from collections.abc import Iterator, Mapping
from typing import Any

import array_api_compat
import numpy as np

from parity.spec import (
    NUMPY_DTYPES,
    Arithmetic,
    Array,
    Cost,
    Further,
    Integers,
    Launch,
    Normal,
    Plan,
    Problem,
    Routing,
    Workload,
)

OPTIONAL = ("rows", "bias", "row_scale")
SKEWED = ("zipf", "onehot", "half")
ALL = ("fwd", "bwd", "dw")


def _ci(name: str, M: int, K: int, N: int, L: int, *given: str, T: int = 0, **more) -> Workload:
    """Five experts: one without rows, one with a single one; rows from L on are dead."""
    sizes = {"E": 5, "M": M, "K": K, "N": N, "L": L} | ({"T": T} if T else {})
    absent = tuple(n for n in OPTIONAL if n not in given)
    return Workload(name, sizes, "float16", ("ci",), absent=absent, **more)


def _layer(
    name: str,
    E: int,
    M: int,
    K: int,
    N: int,
    *passes: str,
    T: int = 0,
    bound: str = "compute-bound",
    **options: Any,
) -> Workload:
    """Weights of a real layer; T: its tokens, if x is gathered from them. The end of the name is
    how its rows are routed."""
    kind = name.rpartition("_")[2]
    tags = ("model", bound, kind if kind in SKEWED else "uniform")
    tags += ("large",) if E * K * N > 1 << 31 else ()  # 30 GB in float64
    sizes = {"E": E, "M": M, "K": K, "N": N} | ({"T": T} if T else {})
    absent = tuple(n for n in OPTIONAL if n != "rows" or not T)
    passes = passes or ("fwd", "bwd")
    return Workload(name, sizes, "bfloat16", tags, options, absent, passes)


def _decode(model: str, E: int, k: int, K: int, N: int, *tokens: int) -> list[Workload]:
    """A few tokens, k rows each: every active expert's weights are read for a handful of rows."""
    return [
        _layer(f"{model}_decode_t{t}", E, t * k, K, N, "fwd", bound="memory-bound") for t in tokens
    ]


MIXTRAL_UP, QWEN3_UP = (8, 16384, 4096, 14336), (128, 65536, 2048, 768)

WORKLOADS = (
    # the first expert has two tiles of rows; two of columns and two steps; nothing is a multiple
    _ci("ci", 147, 72, 72, 140, passes=ALL),
    # 72 columns are no multiple of 16: Triton gathers x by pointers there, and beside TMA with 80
    _ci(
        "ci_transposed", 43, 72, 136, 41, "rows", T=31, passes=("fwd",),
        options={"transpose_w": True},
    ),
    _ci("ci_odd_pitch", 31, 77, 67, 31, passes=("fwd",)),  # rows TMA cannot address
    _ci(
        "ci_fused", 39, 80, 144, 36, *OPTIONAL, T=31,
        options={"transpose_w": True, "activation": "swiglu", "out_dtype": "float32"},
    ),
    _ci("ci_decode", 13, 264, 136, 11, passes=("fwd",)),
    _layer("mixtral_up", *MIXTRAL_UP, *ALL),
    _layer("mixtral_down", 8, 16384, 14336, 4096, *ALL),
    _layer("mixtral8x22_up", 8, 16384, 6144, 16384),
    # w beyond 2^31 elements; the float64 truth of both gradients at once would fit no GPU
    _layer("dsv3_up", 256, 65536, 7168, 2048, "fwd", "dw"),
    _layer("dsv3_up_131k", 256, 131072, 7168, 2048, "fwd"),
    _layer("qwen3_up", *QWEN3_UP, *ALL),
    _layer("qwen3_up_fused", 128, 65536, 2048, 1536, T=8192, activation="swiglu"),
    _layer("gptoss_up", 128, 32768, 2880, 2880),
    *(_layer(f"mixtral_up_{kind}", *MIXTRAL_UP) for kind in SKEWED),
    *(_layer(f"qwen3_up_{kind}", *QWEN3_UP) for kind in SKEWED),
    *_decode("mixtral", 8, 2, 4096, 14336, 1, 8, 32, 64, 128),
    *_decode("dsv3", 256, 8, 7168, 2048, 1, 8, 32, 64, 128),
)  # fmt: skip


def _live(work: Workload) -> int:
    return min(work["M"], work.sizes.get("L", work["M"]))


def _dead(work: Workload) -> tuple[tuple[int, int], ...]:
    return ((_live(work), work["M"]),) if "L" in work.sizes else ()


def _swiglu(work: Workload) -> bool:
    return work.options.get("activation") == "swiglu"


def _columns(work: Workload) -> int:
    """Columns of y."""
    if not _swiglu(work):
        return work["N"]
    if work["N"] % 2:
        raise ValueError("swiglu takes pairs of columns: N must be even")
    return work["N"] // 2


def _weights(work: Workload) -> tuple[int, int, int]:
    E, K, N = work["E"], work["K"], work["N"]
    return (E, N, K) if work.options.get("transpose_w") else (E, K, N)


def _x_shape(work: Workload) -> tuple[int, int]:
    return work["M"] if "rows" in work.absent else work["T"], work["K"]


def _routing(work: Workload) -> Routing:
    kind = next((tag for tag in work.tags if tag in ("uniform", *SKEWED)), "ragged")
    return Routing((work["E"],), _live(work), kind)


def inputs(work: Workload) -> dict:
    gathered, dead = "rows" not in work.absent, _dead(work)
    given = {
        # gathered, every row of x may be alive: the indices of dead rows are -1
        "x": Normal(_x_shape(work), work.dtype, dead=() if gathered else dead),
        "w": Normal(_weights(work), work.dtype, std=max(1, work["K"]) ** -0.5),
        "sizes": _routing(work),
        "rows": Integers((work["M"],), "int32", 0, max(0, work.sizes.get("T", 1) - 1), dead),
        "bias": Normal((work["E"], work["N"]), work.dtype),
        "row_scale": Normal((work["M"],), "float32", dead=dead),
    }
    return {name: d for name, d in given.items() if name not in work.absent}


def outputs(work: Workload) -> dict[str, Array]:
    return {"y": Array((work["M"], _columns(work)), work.options.get("out_dtype", work.dtype))}


def cotangents(work: Workload) -> dict:
    y = outputs(work)["y"]
    return {"dy": Normal(y.shape, y.dtype, dead=_dead(work))}


def grads(work: Workload) -> dict[str, Array]:
    found = {
        "dx": Array(_x_shape(work), work.dtype, few="rows" not in work.absent),
        "dw": Array(_weights(work), work.dtype),
        "dbias": Array((work["E"], work["N"]), work.dtype),
        "drow_scale": Array((work["M"],), "float32"),
    }
    return {name: a for name, a in found.items() if name[1:] not in work.absent}


def _groups(sizes: Any) -> Iterator[tuple[int, slice]]:
    """The rows of every expert that has any."""
    start = 0
    for e in range(sizes.shape[0]):
        stop = start + int(sizes[e])
        if stop > start:
            yield e, slice(start, stop)
        start = stop


def _taken(ar: Arithmetic, x: Any, rows: Any, group: slice) -> Any:
    return ar.lift(x[group, :] if rows is None else ar.xp.take(x, rows[group], axis=0))


def _hidden(
    ar: Arithmetic, work: Workload, x: Any, w: Any, rows: Any, bias: Any, e: int, group: slice
) -> Any:
    """h of one expert's rows."""
    weights = ar.lift(w[e, :, :])
    h = _taken(ar, x, rows, group) @ (weights.T if work.options.get("transpose_w") else weights)
    return h if bias is None else h + ar.lift(bias[e, :])


def _halves(ar: Arithmetic, h: Any) -> tuple[Any, Any, Any]:
    """(gate, up, sigmoid of gate)"""
    gate = h[:, 0::2]
    return gate, h[:, 1::2], 1 / (1 + ar.xp.exp(-gate))


def _activated(ar: Arithmetic, work: Workload, h: Any) -> Any:
    if not _swiglu(work):
        return h
    gate, up, s = _halves(ar, h)
    return gate * s * up


def oracle(
    ar: Arithmetic, work: Workload, x: Any, w: Any, sizes: Any,
    rows: Any = None, bias: Any = None, row_scale: Any = None,
) -> tuple[Any]:  # fmt: skip
    y = ar.empty((work["M"], _columns(work)), like=x)
    y[...] = 0
    for e, group in _groups(sizes):
        a = _activated(ar, work, _hidden(ar, work, x, w, rows, bias, e, group))
        y[group, :] = a if row_scale is None else a * ar.lift(row_scale[group])[:, None]
    return (y,)


def oracle_bwd(
    ar: Arithmetic, work: Workload, x: Any, w: Any, sizes: Any, dy: Any,
    rows: Any = None, bias: Any = None, row_scale: Any = None,
) -> tuple[Any, ...]:  # fmt: skip
    keeps_h = _swiglu(work) or row_scale is not None
    transposed = work.options.get("transpose_w")
    dx, dw = ar.empty(x.shape, like=x), ar.empty(w.shape, like=x)
    dbias = None if bias is None else ar.empty(bias.shape, like=x)
    drow_scale = None if row_scale is None else ar.empty(row_scale.shape, like=x)
    grads = [g for g in (dx, dw, dbias, drow_scale) if g is not None]
    for g in grads:
        g[...] = 0
    for e, group in _groups(sizes):
        # tensor cores take both operands in one 16-bit type: a float32 cotangent is rounded first
        dh = ar.stored(ar.lift(dy[group, :]), work.dtype)
        if keeps_h:  # h is what the forward keeps, in the storage dtype
            h = ar.stored(_hidden(ar, work, x, w, rows, bias, e, group), work.dtype)
            if row_scale is not None and drow_scale is not None:
                scale = ar.lift(row_scale[group])
                drow_scale[group] = ar.xp.sum(dh * _activated(ar, work, h), axis=1)
                dh = dh * scale[:, None]
            if _swiglu(work):
                gate, up, s = _halves(ar, h)
                pair = (dh * up * s * (1 + gate * (1 - s)), dh * gate * s)
                dh = ar.xp.reshape(ar.xp.stack(pair, axis=2), h.shape)
            dh = ar.stored(dh, work.dtype)
        weights = ar.lift(w[e, :, :])
        dx_group = dh @ (weights if transposed else weights.T)
        if rows is None:
            dx[group, :] = dx_group
        else:
            # sums over the rows that took each row of x, as a product with zeros and ones
            t = ar.xp.arange(x.shape[0], device=array_api_compat.device(x))
            took = ar.xp.astype(rows[group][None, :] == t[:, None], dx.dtype)
            dx += took @ ar.stored(dx_group, work.dtype)
        taken = _taken(ar, x, rows, group)
        dw[e, :, :] = dh.T @ taken if transposed else taken.T @ dh
        if dbias is not None:
            dbias[e, :] = ar.xp.sum(dh, axis=0)
    return tuple(grads)


def _dw_alone(work: Workload) -> dict[str, Array]:
    dtype = work.options.get("out_dtype", work.dtype)
    return {"dw": Array((work["E"], work["K"], work["N"]), dtype)}


def oracle_dw(ar: Arithmetic, work: Workload, x: Any, dy: Any, sizes: Any) -> tuple[Any]:
    dw = ar.empty((work["E"], work["K"], work["N"]), like=x)
    dw[...] = 0
    for e, group in _groups(sizes):
        dw[e, :, :] = ar.lift(x[group, :]).T @ ar.stored(ar.lift(dy[group, :]), work.dtype)
    return (dw,)


def probe(work: Workload) -> dict | None:
    """{-3..3} has products up to 9: with K <= 2^20 every partial sum is an integer below 2^24."""
    # float64 gradients of the largest weights would not fit on a GPU twice
    huge = work["E"] * work["K"] * work["N"] > 1 << 31 and "bwd" in work.passes
    if _swiglu(work) or huge:
        return None
    drawn = inputs(work) | cotangents(work)
    return {
        n: Integers(d.shape, d.dtype, dead=d.dead) if isinstance(d, Normal) else d
        for n, d in drawn.items()
    }


def _cost(work: Workload, which: str, active: float) -> Cost:
    """`active` experts have rows: the weights of the others are not read."""
    E, K, N, item = work["E"], work["K"], work["N"], work.itemsize
    live, columns = _live(work), _columns(work)
    x = min(live, _x_shape(work)[0]) * K * item
    w, dw = active * K * N * item, E * K * N * item
    y, dy = outputs(work)["y"], live * columns * item
    y_bytes = work["M"] * columns * NUMPY_DTYPES[y.dtype].itemsize
    flops = 2 * live * K * N
    if which == "fwd":
        return Cost(flops, x + w + y_bytes)
    if which == "dw":
        return Cost(flops, x + dy + E * K * N * NUMPY_DTYPES[y.dtype].itemsize)
    h = live * N * item if _swiglu(work) or "row_scale" not in work.absent else 0
    return Cost(2 * flops, x + w + dy + h + _x_shape(work)[0] * K * item + dw)


def cost(work: Workload, which: str) -> Cost:
    return _cost(work, which, _routing(work).active)


def counted(work: Workload, which: str, arrays: Mapping[str, Any]) -> Cost:
    return _cost(work, which, sum(1 for _ in _groups(arrays["sizes"])))


def plan(work: Workload, which: str, launch: Launch) -> Plan | None:
    """Tiles of the experts' products, with the rows that each has on average."""
    plain = {*OPTIONAL} == {*work.absent} and not _swiglu(work)
    kernel = launch.kernel.strip("_")
    products = {"moe_gemm_kernel", "moe_gemm_dw_kernel"}
    if not plain or kernel not in products or "block_k" not in launch.config:
        return None
    K, N = work["K"], work["N"]
    block_m, block_n = launch.config["block_m"], launch.config["block_n"]
    rows = _routing(work).expected
    if kernel == "moe_gemm_dw_kernel":  # a tile of K x N walks over the rows of its expert
        per_expert = -(-K // block_m) * -(-N // block_n)
        read = per_expert * float(rows.sum()) * (block_m + block_n)
        return Plan(len(rows) * per_expert, shared=read * work.itemsize)
    n, k = (N, K) if which == "fwd" else (K, N)
    tiles = int(np.ceil(rows / block_m).sum()) * -(-n // block_n)
    return Plan(tiles, shared=tiles * k * (block_m + block_n) * work.itemsize)


def reduction(work: Workload, name: str) -> int:
    sums = {"y": work["K"], "dx": work["N"], "drow_scale": _columns(work)}
    return sums.get(name, _live(work))  # dw, dbias: at most all rows


# wrong answers that only groups can have: see parity.faults


def neighbours_weights(case: Any) -> Any:
    """Each expert's rows meet the weights of the expert before it."""
    if "w" not in case.arrays:
        return None
    arrays = dict(case.arrays) | {"w": case.xp.roll(case.arrays["w"], 1, axis=0)}
    return case.recomputed(Arithmetic.model(case.xp), case.work, arrays)


def boundary_off_by_one(case: Any) -> Any:
    """The last row of an expert is taken for the first of the next."""
    groups = [e for e, _ in _groups(case.arrays["sizes"])]
    sizes = case.xp.asarray(case.arrays["sizes"], copy=True)
    if len(groups) < 2:
        return None
    sizes[groups[0]] -= 1
    sizes[groups[1]] += 1
    arrays = dict(case.arrays) | {"sizes": sizes}
    return case.recomputed(Arithmetic.model(case.xp), case.work, arrays)


def last_rows_dropped(case: Any) -> Any:
    """What an expert has beyond whole tiles of 16 rows is never computed: it is zero."""
    if case.which != "fwd":
        return None

    def edit(y: Any) -> None:
        for _, group in _groups(case.arrays["sizes"]):
            y[group.start + (group.stop - group.start) // 16 * 16 : group.stop, :] = 0

    return case.edited(edit)


def dead_rows_not_zero(case: Any) -> Any:
    """Rows past the end hold what the last expert makes of them."""
    end = int(case.xp.sum(case.arrays["sizes"]))
    if case.which != "fwd" or end == case.good[0].shape[0]:
        return None

    def edit(y: Any) -> None:
        y[end:, :] = y[end - 1, :]

    return case.edited(edit)


def empty_expert_not_written(case: Any) -> Any:
    """The gradient of weights that no row met is never written: it still holds NaN."""
    empty = [e for e in range(case.work["E"]) if int(case.arrays["sizes"][e]) == 0]
    at = list(case.specs).index("dw") if "dw" in case.specs else -1
    if at < 0 or not empty:
        return None
    dw = case.xp.asarray(case.good[at], copy=True)
    dw[empty[0], ...] = case.xp.nan
    return (*case.good[:at], dw, *case.good[at + 1 :])


_NUMERIC = ("norm", "tile", "peak", "bias", "zeros")

PROBLEM = Problem(
    stem="moe_gemm",
    doc=__doc__ or "",
    family="gemm",
    workloads=WORKLOADS,
    inputs=inputs,
    cotangents=cotangents,
    outputs=outputs,
    grads=grads,
    oracle=oracle,
    oracle_bwd=oracle_bwd,
    cost=cost,
    counted=counted,
    reduction=reduction,
    probe=probe,
    plan=plan,
    implementations={
        "triton": "triton_kernels.moe_gemm:grouped_gemm",
        "pallas": "pallas_kernels.moe_gemm:grouped_gemm",
    },
    peers={
        "torch._grouped_mm": "parity.peers:torch_grouped_mm",
        "cublas_dense": "parity.peers:cublas_dense",
        "jax.lax.ragged_dot": "parity.peers:jax_ragged_dot",
        "jax.mosaic_example": "parity.peers:jax_mosaic_ragged_dot",
    },
    bwd_options=("transpose_w", "activation"),
    keywords=OPTIONAL,
    further={
        "dw": Further(
            "grouped_gemm_dw",
            ("x", "dy", "sizes"),
            lambda work: {"out_dtype": work.options.get("out_dtype", work.dtype)},
            _dw_alone,
            oracle_dw,
        )
    },
    faults={
        neighbours_weights: _NUMERIC,
        boundary_off_by_one: _NUMERIC,
        last_rows_dropped: ("zeros",),
        dead_rows_not_zero: ("zeros",),
        empty_expert_not_written: ("nonfinite",),
    },
    # beside padding for TMA: the plan, on [E] integers, and the order in which dx gathers
    glue=(
        "pad", "slice", "copy", "convert_element_type", "transpose", "concatenate",
        "cumsum", "sort", "max", "min", "clamp",
    ),
)  # fmt: skip
