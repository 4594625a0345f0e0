"""Product with four-bit weights (W4A16): decoding reads a quarter of the bytes.

    W[n, k] = (q[n, k] - z[n, k // G]) * s[n, k // G]         q, z in 0 .. 15; z = 8 without w_zero
    y[m, n] = sum_k x[m, k] * W[n, k] + bias[n]
    x [M, K]   w_packed uint8 [N, K / 2]   w_scale [N, K / G]   w_zero uint8 [N, 4 ceil(K / G / 8)]
    ->   y [M, N]

    for each tile of y, transposed (ni, mi), and each slice of K:
        acc = 0                                  float32, in registers
        for ki in this slice, 256 of K at a time:
            for each plane of 64 columns:        a plane is what one nibble of each 16 bits holds
                w = (plane - zero) * scale       in registers, rounded to x's dtype
                acc += w @ x[mi, ki, plane]^T    W is on the left: tensor cores want 64 rows there
    y = round(sum of the slices, in order, + bias)

Byte j of a row holds k = 2j in its low nibble and 2j + 1 in its high one (parity.formats). Kernels
read another order, which int4_prepack makes once: w_packed int16 [ceil(K / 256), N, 64], where
nibble i of word c of block b is k = 256 b + 64 i + c, w_scale [K / G, N] and w_zero uint8
[K / G, N], one to a byte. Three dimensions tell that w_packed is prepacked.

Weights are frozen: backward gives dx = dy @ W alone.

The pass "plan" makes weights, once: int4_quantize, w [N, K] -> w_packed, w_scale, w_zero, with
lo = min(w, 0) and hi = max(w, 0) of each group, the float32 quotients correctly rounded:
    s = (hi - lo) / 15 in w's dtype, 1 where it is 0       z = clip(rint(-lo / s), 0, 15)
    q = clip(rint(w / s) + z, 0, 15)                       there is one right answer, bit for bit

The pass "prepack" is int4_prepack, which is done once for each model, and so timed apart; "atomic"
is int4_matmul_atomic, whose slices of K are added as they come.
"""

from typing import Any

import numpy as np

from parity.spec import (
    Arithmetic,
    Array,
    Cost,
    Further,
    Integers,
    Normal,
    Problem,
    Workload,
    row_blocks,
)

BLOCK_K = 256  # of K: what 64 words of 16 bits hold
OPTIONAL = ("w_zero", "bias")
SPLIT = ("fwd", "atomic")  # two ways to add slices of K


def _layer(
    name: str, M: int, N: int, K: int, *given: str,
    group: int = 128, dtype: str = "bfloat16", passes: tuple[str, ...] = ("fwd",),
    tags: tuple[str, ...] = (), **options: Any,
) -> Workload:  # fmt: skip
    """`given`: which optional arrays there are, and "canonical" for weights not prepacked."""
    tags = tags or ("model", "memory-bound" if M <= 64 else "compute-bound")
    absent = tuple(n for n in OPTIONAL if n not in given)
    tags += ("canonical",) if "canonical" in given else ()
    sizes = {"M": M, "N": N, "K": K, "G": group}
    return Workload(name, sizes, dtype, tags, {"group": group, **options}, absent, passes)


def _ci(
    name: str, M: int, N: int, K: int, group: int, *given: str,
    passes: tuple[str, ...] = ("fwd",), **options: Any,
) -> Workload:  # fmt: skip
    return _layer(
        name, M, N, K, *given, group=group, dtype="float16", passes=passes, tags=("ci",), **options
    )


def _quantized(name: str, N: int, K: int, dtype: str, *tags: str, group: int = 128) -> Workload:
    options = {"group": group, "symmetric": False}
    sizes = {"M": 0, "N": N, "K": K, "G": group}
    return Workload(name, sizes, dtype, (*tags, "quantize"), options, OPTIONAL, ("plan",))


def _ordered(name: str, N: int, K: int, dtype: str, *tags: str, group: int = 128) -> Workload:
    sizes = {"M": 0, "N": N, "K": K, "G": group}
    tags = (*tags, "canonical", "prepack")
    return Workload(name, sizes, dtype, tags, {"group": group}, ("bias",), ("prepack",))


WORKLOADS = (
    # two tiles of N, the last one ragged; two blocks of K or more, the last one ragged where it can
    _ci("ci", 7, 264, 512, 128, "canonical", "w_zero", "bias", split_k=1),
    _ci("ci_symmetric", 33, 72, 320, 64, passes=("fwd", "bwd"), split_k=1),
    _ci("ci_groups_of_32", 1, 328, 544, 32, "w_zero", split_k=2),
    _ci("ci_split", 5, 104, 768, 256, "w_zero", "bias", passes=("fwd", "bwd"), split_k=3),
    _ci("ci_atomic", 5, 104, 768, 128, "w_zero", passes=("atomic",), split_k=3),
    *(_layer(f"llama70b_up_m{M}", M, 28672, 8192) for M in (1, 8, 16, 64, 256)),
    _layer("llama70b_up_m4096", 4096, 28672, 8192, passes=("fwd", "bwd")),
    # few rows: K is split
    *(_layer(f"llama70b_down_m{M}", M, 8192, 28672, passes=SPLIT) for M in (1, 8, 16, 64, 256)),
    _layer("llama70b_down_m4096", 4096, 8192, 28672),
    *(_layer(f"llama8b_qkv_m{M}", M, 6144, 4096) for M in (1, 16)),
    *(_layer(f"llama8b_up_m{M}", M, 14336, 4096) for M in (1, 16, 256)),
    _layer("llama70b_up_m16_zeros", 16, 28672, 8192, "w_zero", "bias"),
    *(_layer(f"llama70b_up_m16_g{G}", 16, 28672, 8192, group=G) for G in (32, 64, 256)),
    _layer("llama70b_up_m1_float16", 1, 28672, 8192, dtype="float16"),
    # words of weights, and elements of a quantizer's, beyond 2^31
    _layer("int4_matmul_2x1048832x8192", 2, 1_048_832, 8192, tags=("model", "huge")),
    _quantized("int4_quantize_524544x4096", 524_544, 4096, "bfloat16", "model", "huge"),
    # two words of zero points, the last one ragged
    _quantized("ci_quantize", 5, 1280, "float16", "ci"),
    _quantized("ci_quantize_groups_of_32", 3, 416, "float16", "ci", group=32),
    *(
        _quantized(f"int4_quantize_{N}x{K}", N, K, "bfloat16", "model", "memory-bound")
        for N, K in ((8192, 8192), (4096, 14336))
    ),
    # two blocks of K and two words of zero points, the last ones ragged
    _ordered("ci_prepack", 5, 416, "float16", "ci", group=32),
    _ordered("int4_prepack_28672x8192", 28672, 8192, "bfloat16", "model", "memory-bound"),
)


def inputs(work: Workload) -> dict:
    M, N, K, G = (work[letter] for letter in "MNKG")
    groups, canonical = K // G, "canonical" in work.tags
    if "quantize" in work.tags:
        return {"w": Normal((N, K), work.dtype, std=K**-0.5)}
    words = Integers((-(-K // BLOCK_K), N, BLOCK_K // 4), "int16", -(1 << 15), (1 << 15) - 1)
    zero = (N, -(-groups // 8) * 4) if canonical else (groups, N)
    given = {
        "x": Normal((M, K), work.dtype),
        # whatever the bits, they are codes
        "w_packed": Integers((N, K // 2), "uint8", 0, 255) if canonical else words,
        # (q - z) is about 6: y is then about 1
        "w_scale": Normal(
            (N, groups) if canonical else (groups, N), work.dtype, std=max(1, K) ** -0.5 / 6
        ),
        "w_zero": Integers(zero, "uint8", 0, 255 if canonical else 15),
        "bias": Normal((N,), work.dtype),
    }
    return {name: d for name, d in given.items() if name not in work.absent}


def outputs(work: Workload) -> dict[str, Array]:
    return {"y": Array((work["M"], work["N"]), work.dtype)}


def cotangents(work: Workload) -> dict:
    if {"quantize", "prepack"} & {*work.tags}:
        return {}
    return {"dy": Normal((work["M"], work["N"]), work.dtype)}


def grads(work: Workload) -> dict[str, Array]:
    return {"dx": Array((work["M"], work["K"]), work.dtype)}


def _weights(
    ar: Arithmetic, work: Workload, rows: slice, w_packed: Any, w_scale: Any, w_zero: Any
) -> Any:
    """W[rows, :] [n, K]."""
    xp, (K, G) = ar.xp, (work["K"], work["G"])
    if "canonical" in work.tags:
        byte, scale = w_packed[rows, :], w_scale[rows, :]
        q = _flat(xp, xp.stack((byte & 15, byte >> 4), axis=-1))
        zero = None if w_zero is None else w_zero[rows, :]
        if zero is not None:
            zero = _flat(xp, xp.stack((zero & 15, zero >> 4), axis=-1))[:, : K // G]
    else:
        words = xp.moveaxis(w_packed[:, rows, :], 1, 0)  # [n, blocks, 64]
        q = _flat(xp, xp.stack([words >> 4 * i & 15 for i in range(4)], axis=2))[:, :K]
        scale = w_scale[:, rows].T
        zero = None if w_zero is None else w_zero[:, rows].T
    steps = xp.reshape(ar.lift(q), (q.shape[0], K // G, G))
    steps = steps - (8 if zero is None else ar.lift(zero)[:, :, None])
    return ar.stored(_flat(xp, steps * ar.lift(scale)[:, :, None]), work.dtype)


def _flat(xp: Any, x: Any) -> Any:
    return xp.reshape(x, (x.shape[0], -1))


def oracle(
    ar: Arithmetic, work: Workload, x: Any, w_packed: Any, w_scale: Any,
    w_zero: Any = None, bias: Any = None,
) -> tuple[Any]:  # fmt: skip
    yt = ar.empty((work["N"], work["M"]), like=x)
    xt = ar.lift(x).T
    for rows in _rows(work):
        yt[rows, :] = _weights(ar, work, rows, w_packed, w_scale, w_zero) @ xt
    y = yt.T
    return (y if bias is None else y + ar.lift(bias),)


def _atomic_outputs(work: Workload) -> dict[str, Array]:
    return {"y_atomic": Array((work["M"], work["N"]), work.dtype)}


def oracle_bwd(
    ar: Arithmetic, work: Workload, x: Any, w_packed: Any, w_scale: Any, dy: Any,
    w_zero: Any = None, bias: Any = None,
) -> tuple[Any]:  # fmt: skip
    dx = ar.empty(x.shape, like=x)
    dx[...] = 0
    for rows in _rows(work):
        dx += ar.lift(dy[:, rows]) @ _weights(ar, work, rows, w_packed, w_scale, w_zero)
    return (dx,)


def _rows(work: Workload) -> Any:
    """Slices of N: W in float64 stays small."""
    return row_blocks(np.empty((work["N"], 0)), (1 << 26) // max(1, work["K"]))


def _quantized_outputs(work: Workload) -> dict[str, Array]:
    N, K, groups = work["N"], work["K"], work["K"] // work["G"]
    return {
        "w_packed": Array((N, K // 2), "uint8", exact=True),
        "w_scale": Array((N, groups), work.dtype, exact=True),
        "w_zero": Array((N, 4 * -(-groups // 8)), "uint8", exact=True),
    }


def oracle_quantize(ar: Arithmetic, work: Workload, w: Any) -> tuple[Any, Any, Any]:
    parts = [_quantized_rows(ar, work, w[rows, :]) for rows in row_blocks(w)]
    return tuple(ar.xp.concat(part) for part in zip(*parts, strict=True))


def _quantized_rows(ar: Arithmetic, work: Workload, w: Any) -> tuple[Any, Any, Any]:
    xp, (K, G) = ar.xp, (work[letter] for letter in "KG")
    values = xp.reshape(ar.lift(w), (-1, K // G, G))
    nothing = xp.zeros_like(values[..., 0])
    lo = xp.minimum(xp.min(values, axis=2), nothing)
    span = xp.maximum(xp.max(values, axis=2), nothing) - lo

    def share(x: Any, y: Any) -> Any:
        return ar.rounded(x / y, "float32")

    # a tensor of 15: by a number torch would multiply with its reciprocal
    scale = share(ar.rounded(span, "float32"), nothing + 15)
    scale = ar.rounded(scale, work.dtype)
    scale = xp.where(scale == 0, nothing + 1, scale)
    zero = xp.clip(xp.round(share(-lo, scale)), 0, 15)
    code = xp.round(share(values, scale[:, :, None])) + zero[:, :, None]
    code = xp.reshape(xp.clip(code, 0, 15), (-1, K))
    fill = ar.empty((zero.shape[0], -zero.shape[1] % 8), like=w)
    fill[...] = 8
    zero = xp.concat([zero, fill], axis=1)
    return tuple(x[:, 0::2] + 16 * x[:, 1::2] if x is not scale else x for x in (code, scale, zero))


def _ordered_outputs(work: Workload) -> dict[str, Array]:
    N, K, groups = work["N"], work["K"], work["K"] // work["G"]
    return {
        "w_packed": Array((-(-K // BLOCK_K), N, BLOCK_K // 4), "int16", exact=True),
        "w_scale": Array((groups, N), work.dtype, exact=True),
        "w_zero": Array((groups, N), "uint8", exact=True),
    }


def oracle_prepack(
    ar: Arithmetic, work: Workload, w_packed: Any, w_scale: Any, w_zero: Any
) -> tuple[Any, Any, Any]:
    xp, (N, K, G) = ar.xp, (work[letter] for letter in "NKG")
    code = _flat(xp, xp.stack((w_packed & 15, w_packed >> 4), axis=-1))
    beyond = xp.full_like(code[:, :1], 8)
    code = ar.lift(xp.concat([code, *[beyond] * (-K % BLOCK_K)], axis=1))
    planes = xp.reshape(code, (N, -1, 4, BLOCK_K // 4))
    words = sum(planes[:, :, i, :] * 16.0**i for i in range(4))
    words = xp.where(words < 1 << 15, words, words - (1 << 16))  # a sign bit is a code's highest
    zero = _flat(xp, xp.stack((w_zero & 15, w_zero >> 4), axis=-1))[:, : K // G]
    return xp.moveaxis(words, 0, 1), ar.lift(w_scale).T, ar.lift(zero).T


def probe(work: Workload) -> dict | None:
    """|x| and |scale| at most 3 and |q - z| at most 15: sums of 2^16 such products stay below 2^24,
    and their weights, at most 45, are exact in 16 bits."""
    if {"quantize", "prepack"} & {*work.tags}:
        return None  # its answer is exact for any weights
    drawn = inputs(work) | cotangents(work)
    return {
        name: Integers(d.shape, d.dtype) if isinstance(d, Normal) else d
        for name, d in drawn.items()
    }


def cost(work: Workload, which: str) -> Cost:
    M, N, K, G = (work[letter] for letter in "MNKG")
    if which == "plan":  # min, max, divide, round, pack; read w, write the rest
        scales = N * (K // G) * (work.itemsize + 0.5)
        return Cost(flops=6 * N * K, bytes=N * K * (work.itemsize + 0.5) + scales)
    if which == "prepack":  # two zero points to a byte become one
        return Cost(flops=0, bytes=N * K + N * (K // G) * (2 * work.itemsize + 1.5))
    zero = 0 if "w_zero" in work.absent else 0.5
    weights = N * K / 2 + N * (K // G) * (work.itemsize + zero)
    bias = N * work.itemsize if which == "fwd" and "bias" not in work.absent else 0
    return Cost(flops=2 * M * N * K, bytes=weights + bias + (M * K + M * N) * work.itemsize)


def reduction(work: Workload, name: str) -> int:
    return {"y": work["K"], "y_atomic": work["K"], "dx": work["N"]}.get(name, work["G"])


# wrong answers that only four-bit weights can have: see parity.faults


def _changed(case: Any, name: str, change: Any) -> Any:
    if name not in case.arrays:
        return None
    arrays = dict(case.arrays) | {name: change(case.arrays[name])}
    return case.recomputed(Arithmetic.model(case.xp), case.work, arrays)


def swapped_nibbles(case: Any) -> Any:
    """The high nibble of each byte is taken for the low one."""

    def swap(packed: Any) -> Any:
        low = 0x0F if "canonical" in case.work.tags else 0x0F0F
        return (packed & low) << 4 | packed >> 4 & low

    return _changed(case, "w_packed", swap)


def zero_of_the_next_group(case: Any) -> Any:
    """Each group is shifted by its neighbour's zero point."""
    if "canonical" in case.work.tags:
        return None
    return _changed(case, "w_zero", lambda z: case.xp.roll(z, -1, axis=0))


def scale_of_the_next_row(case: Any) -> Any:
    """Each row has its neighbour's scales."""
    axis = 0 if "canonical" in case.work.tags else 1
    return _changed(case, "w_scale", lambda s: case.xp.roll(s, 1, axis=axis))


def zero_less_one(case: Any) -> Any:
    """Zero points are read as GPTQ's first version stores them: one is added."""
    if "w_zero" in case.arrays and "canonical" not in case.work.tags:
        return _changed(case, "w_zero", lambda z: (z + 1) & 15)
    return None


def a_slice_left_out(case: Any) -> Any:
    """The last slice of a split K is not added."""
    if case.which != "fwd" or case.work.options.get("split_k", 1) == 1:
        return None
    keep = case.work["K"] // case.work.options["split_k"] * (case.work.options["split_k"] - 1)

    def change(x: Any) -> Any:
        x = case.xp.asarray(x, copy=True)
        x[:, keep:] = 0
        return x

    return _changed(case, "x", change)


# (the last where one answer is right, as of prepacked weights)
_NUMERIC = ("norm", "tile", "peak", "bias", "zeros", "probe")

PROBLEM = Problem(
    stem="int4_matmul",
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
    reduction=reduction,
    probe=probe,
    implementations={
        "triton": "triton_kernels.int4_matmul:int4_matmul",
        "pallas": "pallas_kernels.int4_matmul:int4_matmul",
    },
    peers={
        "cublas": "parity.peers.int4:cublas_bf16",
        "int4pack": "parity.peers.int4:torch_int4pack",
        "gemlite": "parity.peers.int4:gemlite",
        "conch": "parity.peers.int4:conch",
    },
    bwd_options=("group",),
    further={
        "plan": Further(
            "int4_quantize",
            ("w",),
            lambda work: dict(work.options),
            _quantized_outputs,
            oracle_quantize,
        ),
        "prepack": Further(
            "int4_prepack",
            ("w_packed", "w_scale", "w_zero"),
            lambda work: {"group": work["G"]},
            _ordered_outputs,
            oracle_prepack,
            kernels=False,
        ),
        "atomic": Further(
            "int4_matmul_atomic",
            ("x", "w_packed", "w_scale", "w_zero"),
            lambda work: dict(work.options),
            _atomic_outputs,
            oracle,
        ),
    },
    unordered=("y_atomic",),
    keywords=("bias",),
    faults={
        swapped_nibbles: _NUMERIC,
        zero_of_the_next_group: _NUMERIC,
        scale_of_the_next_row: _NUMERIC,
        zero_less_one: _NUMERIC,
        a_slice_left_out: _NUMERIC,
    },
    # weights that come in checkpoint order are put in the kernels' first, and odd sizes are padded;
    # one sum that all slices add to is read
    glue=(
        "pad", "slice", "copy", "convert_element_type", "transpose", "stack", "and", "or",
        "shift_left", "shift_right_logical", "bitwise_and", "bitwise_or", "__lshift__",
        "__rshift__", "constant_pad_nd", "get",
    ),
)  # fmt: skip
