"""e4m3 with a scale for each 1 x 128 (rows), 128 x 128 (blocks) or 128 x 1 (cols) elements.

    scale[b] = max(max_b |x|, 1e-4) / 448                                    over block b
    q[m, k] = e4m3(x[m, k] * (1 / scale[b]))                                 ties to even
    x [M, K]   ->   q float8_e4m3fn [M, K]   and the scale, float32:
    rows    [M, K / 128], transposed [K / 128, ceil(M / 4) * 4]
    blocks  [ceil(M / 128), ceil(K / 128)]
    cols    [M / 128, K]

    for every block:
        top = max |x|                            read once
        scale = max(top, 1e-4) / 448             float32
        q = x * (1 / scale)                      the reciprocal and the product in float32; e4m3

DeepSeek-V3's scales with DeepGEMM's roundings. There is one right answer, bit for bit, which is
parity.formats.fp8_quantize_rows', _blocks' and _cols'. No gradient.
"""

from typing import Any

from parity.spec import Arithmetic, Array, Cost, Further, Normal, Problem, Workload

BLOCK = 128
FLOOR = 9.999999747378752e-05  # 1e-4 in float32


def _model(M: int, K: int, *passes: str, transposed: bool = False) -> Workload:
    name = f"fp8_quantize_{M}x{K}" + ("_transposed" if transposed else "")
    options, tags = {"transposed": True} if transposed else {}, ("model", "memory-bound")
    return Workload(name, {"M": M, "K": K}, "bfloat16", tags, options, passes=("fwd", *passes))


WORKLOADS = (
    Workload("ci", {"M": 256, "K": 384}, "float16", ("ci",), passes=("fwd", "blocks", "cols")),
    Workload(
        "ci_transposed", {"M": 131, "K": 256}, "float16", ("ci",), {"transposed": True},
        passes=("fwd", "blocks"),
    ),
    _model(8192, 8192, "blocks", "cols"),
    _model(4096, 14336, "blocks", "cols"),
    _model(8192, 8192, transposed=True),
    _model(4096, 14336, transposed=True),
    Workload(
        "fp8_quantize_524544x4096", {"M": 524_544, "K": 4096}, "bfloat16", ("model", "huge"),
        passes=("fwd",),
    ),  # beyond 2^31 elements
)  # fmt: skip


def inputs(work: Workload) -> dict:
    return {"x": Normal((work["M"], work["K"]), work.dtype, std=1.5)}


def _shares(which: str) -> tuple[int, int]:
    """Rows and columns of a block of this pass; the forward's are rows."""
    return {"fwd": (1, BLOCK), "blocks": (BLOCK, BLOCK), "cols": (BLOCK, 1)}[which]


def _outputs(work: Workload, which: str) -> dict[str, Array]:
    M, K = work["M"], work["K"]
    share_m, share_n = _shares(which)
    shape = (-(-M // share_m), -(-K // share_n))
    if which == "fwd" and work.options.get("transposed"):
        shape = (K // BLOCK, -(-M // 4) * 4)
    q = Array((M, K), "float8_e4m3fn", exact=True)
    return {"q": q, "scale": Array(shape, "float32", exact=True)}


def outputs(work: Workload) -> dict[str, Array]:
    return _outputs(work, "fwd")


def nothing(work: Workload) -> dict:
    """Neither cotangents nor gradients."""
    return {}


def no_gradient(ar: Arithmetic, work: Workload, **arrays: Any) -> tuple:
    raise ValueError("fp8_quantize has no gradient")


def _quantized(ar: Arithmetic, work: Workload, x: Any, which: str) -> tuple[Any, Any]:
    xp, K = ar.xp, work["K"]
    share_m, share_n = _shares(which)
    shape = (-(-work["M"] // share_m), -(-K // share_n))
    q, scale = ar.empty(x.shape, like=x), ar.empty(shape, like=x)
    step = max(1, (1 << 27) // K // BLOCK) * BLOCK  # rows: about 1 GB in float64
    for m in range(0, work["M"], step):
        part = ar.lift(x[m : m + step, :])
        rows = part.shape[0]
        if rows % share_m:  # a ragged last block
            part = xp.concat([part, xp.zeros_like(part[: share_m - rows % share_m, :])])
        tiles = xp.reshape(part, (-1, share_m, K // share_n, share_n))
        top = xp.max(xp.max(xp.abs(tiles), axis=3), axis=1)
        top = xp.where(top < FLOOR, xp.full_like(top, FLOOR), top)
        # a tensor of 448: by a number torch would multiply with its reciprocal
        some = ar.rounded(top / xp.full_like(top, 448.0), "float32")
        factor = ar.rounded(xp.ones_like(some) / some, "float32")[:, None, :, None]
        code = ar.rounded(ar.rounded(tiles * factor, "float32"), "float8_e4m3fn")
        q[m : m + rows, :] = xp.reshape(code, (-1, K))[:rows, :]
        scale[m // share_m : m // share_m + some.shape[0], :] = some
    return q, scale


def oracle(ar: Arithmetic, work: Workload, x: Any) -> tuple[Any, Any]:
    xp = ar.xp
    q, scale = _quantized(ar, work, x, "fwd")
    if work.options.get("transposed"):
        # beyond M: what scales zeros
        beyond = xp.zeros_like(scale[: -work["M"] % 4, :]) + FLOOR
        beyond = ar.rounded(beyond / xp.full_like(beyond, 448.0), "float32")
        scale = xp.permute_dims(xp.concat([scale, beyond]), (1, 0))
    return q, scale


def _further(which: str) -> Further:
    return Further(
        f"fp8_quantize_{which}",
        ("x",),
        lambda work: {},
        lambda work: _outputs(work, which),
        lambda ar, work, x: _quantized(ar, work, x, which),
    )


def cost(work: Workload, which: str) -> Cost:
    elements, scales = work["M"] * work["K"], _outputs(work, which)["scale"].shape
    # |x|, max, multiply, round; read x, write q and the scales
    least = elements * (work.itemsize + 1) + 4 * scales[0] * scales[1]
    return Cost(flops=4 * elements, bytes=least)


def reduction(work: Workload, name: str) -> int:
    return BLOCK


PROBLEM = Problem(
    stem="fp8_quantize",
    doc=__doc__ or "",
    family="norm",
    workloads=WORKLOADS,
    inputs=inputs,
    cotangents=nothing,
    outputs=outputs,
    grads=nothing,
    oracle=oracle,
    oracle_bwd=no_gradient,
    cost=cost,
    reduction=reduction,
    further={which: _further(which) for which in ("blocks", "cols")},
    implementations={
        "triton": "triton_kernels.fp8_quantize:fp8_quantize_rows",
        "pallas": "pallas_kernels.fp8_quantize:fp8_quantize_rows",
    },
    peers={"torch.compile": "parity.peers.quantize:compiled_fp8"},
    glue=("pad", "slice", "copy", "convert_element_type"),
)
