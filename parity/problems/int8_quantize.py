"""Symmetric int8 with a scale for each row (per token), or for each group of neighbours in it.

    scale[m, g] = max_k |x[m, k]| / 127 over the k of group g                 1 where that is 0
    q[m, k] = clip(rint(x[m, k] / scale[m, g]), -127, 127)                    ties to even
    x [M, K]   ->   q int8 [M, K]   scale float32 [M], with a group [M, K / group]

    for every row, or group of a row:
        top = max |x|                            read once
        scale = top / 127                        float32; 1 where it is 0
        q = rint(x / scale)                      the float32 quotient; 0 where scale is not finite

Both divisions are float32's, and whole numbers come of it: there is one right answer, bit for bit,
which is parity.formats.int8_quantize's. No gradient.
"""

from typing import Any

from parity.spec import Arithmetic, Array, Cost, Normal, Problem, Workload, row_blocks


def _work(name: str, M: int, K: int, dtype: str, *tags: str, group: int | None = None) -> Workload:
    options = {"axis": -1} | ({} if group is None else {"group": group})
    return Workload(name, {"M": M, "K": K}, dtype, tags, options, passes=("fwd",))


def _model(M: int, K: int, group: int | None = None) -> Workload:
    name = f"int8_quantize_{M}x{K}" + ("" if group is None else f"_g{group}")
    return _work(name, M, K, "bfloat16", "model", "memory-bound", group=group)


WORKLOADS = (
    _work("ci", 17, 1000, "float16", "ci"),
    _work("ci_group", 11, 1312, "float16", "ci", group=32),  # a chunk and a part of one
    _work("ci_group_96", 5, 288, "float16", "ci", group=96),  # no power of two
    _work("ci_long_row", 3, 70_008, "float16", "ci"),  # longer than a tile, or all slots
    _model(8192, 8192),
    _model(4096, 14336),
    _model(8192, 8192, 128),
    _model(4096, 14336, 128),
    _work("int8_quantize_524544x4096", 524_544, 4096, "bfloat16", "model", "huge"),  # over 2^31
)


def inputs(work: Workload) -> dict:
    return {"x": Normal((work["M"], work["K"]), work.dtype, std=1.5)}


def _scales(work: Workload) -> tuple[int, ...]:
    group = work.options.get("group")
    return (work["M"],) if group is None else (work["M"], work["K"] // group)


def outputs(work: Workload) -> dict[str, Array]:
    q = Array((work["M"], work["K"]), "int8", exact=True)
    return {"q": q, "scale": Array(_scales(work), "float32", exact=True)}


def nothing(work: Workload) -> dict:
    """Neither cotangents nor gradients."""
    return {}


def no_gradient(ar: Arithmetic, work: Workload, **arrays: Any) -> tuple:
    raise ValueError("int8_quantize has no gradient")


def oracle(ar: Arithmetic, work: Workload, x: Any) -> tuple[Any, Any]:
    xp, group = ar.xp, work.options.get("group") or work["K"]
    q, scale = ar.empty(x.shape, like=x), ar.empty((work["M"], work["K"] // group), like=x)
    for rows in row_blocks(x):
        values = xp.reshape(ar.lift(x[rows, :]), (-1, work["K"] // group, group))
        top = xp.max(xp.abs(values), axis=2)
        # a tensor of 127: by a number torch would multiply with its reciprocal
        scale[rows, :] = ar.rounded(top / xp.full_like(top, 127.0), "float32")
        scale[rows, :] = xp.where(scale[rows, :] == 0, xp.ones_like(top), scale[rows, :])
        whole = xp.round(ar.rounded(values / scale[rows, :][..., None], "float32"))
        whole = xp.where(xp.isnan(whole), xp.zeros_like(whole), xp.clip(whole, -127, 127))
        q[rows, :] = xp.reshape(whole, (-1, work["K"]))
    return q, xp.reshape(scale, _scales(work))


def cost(work: Workload, which: str) -> Cost:
    elements, scales = work["M"] * work["K"], work["M"] * (_scales(work)[1:] or (1,))[0]
    # |x|, max, divide, round; read x, write q and the scales
    return Cost(flops=4 * elements, bytes=elements * (work.itemsize + 1) + 4 * scales)


def reduction(work: Workload, name: str) -> int:
    return work.options.get("group") or work["K"]


PROBLEM = Problem(
    stem="int8_quantize",
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
    implementations={
        "triton": "triton_kernels.int8_quantize:int8_quantize",
        "pallas": "pallas_kernels.int8_quantize:int8_quantize",
    },
    peers={"torch.compile": "parity.peers.quantize:compiled_int8"},
    glue=("pad", "slice", "copy", "convert_element_type"),
)
