"""Rotation by a randomly signed Hadamard matrix, alone or with the quantizer behind it.

    y[r, :] = H (signs * x[r, :]) / sqrt(n)             H[i, j] = (-1)^(ones in i & j), n = 2^k
    inverse: y[r, :] = signs * (H x[r, :]) / sqrt(n)
    x [R, n]   signs [n], 1 or -1   ->   y [R, n]
    int8, e4m3: q [R, n], scale float32 [R], as int8_quantize and fp8_quantize make them of y

    for each tile of rows:
        acc = x @ (signs on the rows of H)       sums in float32
        y = acc / sqrt(n)                        rounded to x's dtype
        scale = max |y| / 127, q = rint(y / scale)                            int8
        scale = max(max |y|, 1e-4) / 448, q = e4m3(y * (1 / scale))           e4m3

The rotation is orthogonal: it spreads what one element has over all n, and products of rotated
operands are what they were. Backward: dx is the inverse rotation of dy.

Codes are judged on whole numbers, whose sums are exact: there they have one right answer, bit for
bit. Of other numbers the sum depends on its order in the last bit, and so may y's rounding.
"""

import math
from typing import Any

import numpy as np

from parity.problems import fp8_quantize, int8_quantize
from parity.spec import (
    Arithmetic,
    Array,
    Cost,
    Further,
    Given,
    Integers,
    Normal,
    Problem,
    Workload,
    row_blocks,
)

CODES = {"int8": "int8", "e4m3": "float8_e4m3fn"}  # pass -> dtype


def _rotate(name: str, R: int, n: int, dtype: str, *tags: str, **options: Any) -> Workload:
    return Workload(name, {"R": R, "n": n}, dtype, tags, options)


def _quantize(name: str, R: int, n: int, dtype: str, *tags: str) -> Workload:
    return Workload(name, {"R": R, "n": n}, dtype, tags, passes=tuple(CODES))


WORKLOADS = (
    _rotate("ci", 531, 128, "float16", "ci"),
    _rotate("ci_inverse", 301, 256, "float16", "ci", inverse=True),
    _quantize("ci_quantize", 533, 128, "float16", "ci"),
    _quantize("ci_quantize_64", 67, 64, "float16", "ci"),
    *(
        make(f"hadamard_{M}x{K}{what}", M * K // 128, 128, "bfloat16", "model", "memory-bound")
        for M, K in ((8192, 8192), (4096, 14336))
        for make, what in ((_rotate, ""), (_quantize, "_quantize"))
    ),
    # q and k of 32768 tokens, 32 heads
    _rotate("hadamard_1048576x64", 1 << 20, 64, "bfloat16", "model", "memory-bound"),
    _quantize("hadamard_262144x256_quantize", 1 << 18, 256, "bfloat16", "model", "memory-bound"),
    _quantize("hadamard_16785408x128_quantize", 16_785_408, 128, "bfloat16", "model", "huge"),
)


def _signs(n: int) -> np.ndarray:
    return np.where(np.random.default_rng(n).random(n) < 0.5, -1, 1).astype(np.int8)


def inputs(work: Workload) -> dict:
    shape, n = (work["R"], work["n"]), work["n"]
    whole = Integers(shape, work.dtype, -7, 7)
    x = whole if set(work.passes) & set(CODES) else Normal(shape, work.dtype)
    return {"x": x, "signs": Given((n,), "int8", lambda: _signs(n))}


def outputs(work: Workload) -> dict[str, Array]:
    return {"y": Array((work["R"], work["n"]), work.dtype)}


def cotangents(work: Workload) -> dict:
    return {"dy": Normal((work["R"], work["n"]), work.dtype)}


def grads(work: Workload) -> dict[str, Array]:
    return {"dx": Array((work["R"], work["n"]), work.dtype)}


def probe(work: Workload) -> dict | None:
    if math.isqrt(work["n"]) ** 2 != work["n"]:
        return None  # sqrt(n) is no whole number
    shape = (work["R"], work["n"])
    signs = inputs(work)["signs"]
    return {n: Integers(shape, work.dtype) for n in ("x", "dy")} | {"signs": signs}


def _rotated(ar: Arithmetic, work: Workload, x: Any, signs: Any, inverse: bool) -> Any:
    xp = ar.xp
    matrix = xp.ones_like(ar.lift(x[:1, :1]))
    while matrix.shape[0] < work["n"]:
        top = xp.concat([matrix, matrix], axis=1)
        matrix = xp.concat([top, xp.concat([matrix, -matrix], axis=1)])
    matrix = matrix * (ar.lift(signs)[None, :] if inverse else ar.lift(signs)[:, None])
    y = ar.empty(x.shape, like=x)
    for rows in row_blocks(x):
        y[rows, :] = ar.lift(x[rows, :]) @ matrix
    return y


def oracle(ar: Arithmetic, work: Workload, x: Any, signs: Any) -> tuple[Any]:
    return (_rotated(ar, work, x, signs, work.options.get("inverse", False)) * work["n"] ** -0.5,)


def oracle_bwd(ar: Arithmetic, work: Workload, x: Any, signs: Any, dy: Any) -> tuple[Any]:
    inverse = not work.options.get("inverse", False)
    return (_rotated(ar, work, dy, signs, inverse) * work["n"] ** -0.5,)


def _quantized(ar: Arithmetic, work: Workload, x: Any, signs: Any, fmt: str) -> tuple[Any, Any]:
    n = work["n"]
    factor = float(np.float32(n**-0.5))
    q, scale = ar.empty(x.shape, like=x), ar.empty(x.shape[:1], like=x)
    for rows in row_blocks(x):
        sums = _rotated(ar, work, x[rows, :], signs, False)
        # two roundings: the product with 1 / sqrt(n) is float32's
        y = ar.rounded(ar.rounded(sums * factor, "float32"), work.dtype)
        part = Workload("", {"M": y.shape[0], "K": n}, work.dtype, (), {"axis": -1})
        q[rows, :], scale[rows] = QUANTIZE[fmt](ar, part, y)
    return q, scale


def _e4m3(ar: Arithmetic, work: Workload, y: Any) -> tuple[Any, Any]:
    """As fp8_quantize, with a scale for each row."""
    xp = ar.xp
    top = xp.max(xp.abs(y), axis=1)
    top = xp.where(top < fp8_quantize.FLOOR, xp.full_like(top, fp8_quantize.FLOOR), top)
    scale = ar.rounded(top / xp.full_like(top, 448.0), "float32")
    scaled = y * ar.rounded(xp.ones_like(scale) / scale, "float32")[:, None]
    return ar.rounded(ar.rounded(scaled, "float32"), CODES["e4m3"]), scale


QUANTIZE = {"int8": int8_quantize.oracle, "e4m3": _e4m3}


def _further(fmt: str) -> Further:
    return Further(
        "hadamard_quantize",
        ("x", "signs"),
        lambda work: {"fmt": fmt},
        lambda work: {
            "q": Array((work["R"], work["n"]), CODES[fmt], exact=True),
            "scale": Array((work["R"],), "float32", exact=True),
        },
        lambda ar, work, x, signs: _quantized(ar, work, x, signs, fmt),
    )


def cost(work: Workload, which: str) -> Cost:
    elements = work["R"] * work["n"]
    # the fast transform's additions, and the factor; then |y|, max, divide, round
    flops = elements * (math.log2(work["n"]) + 1)
    if which in CODES:
        least = elements * (work.itemsize + 1) + 4 * work["R"] + work["n"]
        return Cost(flops=flops + 4 * elements, bytes=least)
    return Cost(flops=flops, bytes=2 * elements * work.itemsize + work["n"])


def reduction(work: Workload, name: str) -> int:
    return work["n"]


PROBLEM = Problem(
    stem="hadamard",
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
    probe=probe,
    further={fmt: _further(fmt) for fmt in CODES},
    implementations={
        "triton": "triton_kernels.hadamard:hadamard_rotate",
        "pallas": "pallas_kernels.hadamard:hadamard_rotate",
    },
    peers={"torch.compile": "parity.peers.quantize:torch_hadamard"},
    bwd_options=("inverse",),
    glue=("pad", "slice", "copy", "convert_element_type"),
)
