"""Matrix product: every other kernel in this house contains one.

    c[m, n] = sum_k a[m, k] * b[k, n]        a [M, K]   b [K, N]   ->   c [M, N]

    for every tile (mi, ni) of c:
        acc = 0                                  float32, in registers
        for ki in range(K / block_k):
            acc += a[mi, ki] @ b[ki, ni]         tensor cores read both tiles from shared memory
        c[mi, ni] = round(acc)

Backward: da = dc @ b^T and db = a^T @ dc, the same kernel with an operand read transposed.
"""

from typing import Any

from parity.spec import (
    Arithmetic,
    Array,
    Cost,
    Integers,
    Launch,
    Normal,
    Plan,
    Problem,
    Workload,
    row_blocks,
)


def _gemm(
    name: str, M: int, N: int, K: int, dtype: str = "bfloat16", *tags: str, **more
) -> Workload:
    return Workload(
        name, {"M": M, "N": N, "K": K}, dtype, tags or ("model", "compute-bound"), **more
    )


WORKLOADS = (
    # ragged in all three, two or three tiles and trips each
    _gemm("ci", 72, 136, 152, "float16", "ci"),
    _gemm("ci_odd_pitch", 67, 131, 77, "float16", "ci"),  # rows TMA cannot address
    _gemm("ci_float32_out", 88, 72, 104, "float16", "ci", options={"out_dtype": "float32"}),
    _gemm("gemm_8192", 8192, 8192, 8192),
    _gemm("gemm_8192_14336_4096", 8192, 14336, 4096),  # Llama-3-8B's and Mixtral's up projection
    _gemm("gemm_4096", 4096, 4096, 4096),
    _gemm("gemm_16384_6144_4096", 16384, 6144, 4096),  # Llama-3-8B's fused q, k, v projection
    _gemm(
        "gemm_49152_49152_512", 49152, 49152, 512, "bfloat16", "model", "huge"
    ),  # c beyond 2^31 elements
)


def inputs(work: Workload) -> dict:
    return {
        "a": Normal((work["M"], work["K"]), work.dtype),
        "b": Normal((work["K"], work["N"]), work.dtype, std=max(1, work["K"]) ** -0.5),
    }


def outputs(work: Workload) -> dict[str, Array]:
    return {"c": Array((work["M"], work["N"]), work.options.get("out_dtype", work.dtype))}


def cotangents(work: Workload) -> dict:
    return {"dc": Normal((work["M"], work["N"]), outputs(work)["c"].dtype)}


def grads(work: Workload) -> dict[str, Array]:
    return {
        "da": Array((work["M"], work["K"]), work.dtype),
        "db": Array((work["K"], work["N"]), work.dtype),
    }


def _product(ar: Arithmetic, a: Any, b: Any) -> Any:
    c = ar.empty((a.shape[0], b.shape[1]), like=a)
    b = ar.lift(b)
    for rows in row_blocks(c):
        c[rows, :] = ar.lift(a[rows, :]) @ b
    return c


def oracle(ar: Arithmetic, work: Workload, a: Any, b: Any) -> tuple[Any]:
    return (_product(ar, a, b),)


def oracle_bwd(ar: Arithmetic, work: Workload, a: Any, b: Any, dc: Any) -> tuple[Any, Any]:
    # tensor cores take both operands in one 16-bit type: a float32 cotangent is rounded first
    dc = ar.stored(dc, work.dtype)
    return _product(ar, dc, b.T), _product(ar, a.T, dc)


def probe(work: Workload) -> dict:
    """{-3..3} has products up to 9: with K <= 2^20 every partial sum is an integer below 2^24."""
    return {
        name: Integers(d.shape, d.dtype) for name, d in (inputs(work) | cotangents(work)).items()
    }


def cost(work: Workload, which: str) -> Cost:
    M, N, K = work["M"], work["N"], work["K"]
    a, b, c = M * K * work.itemsize, K * N * work.itemsize, M * N * work.itemsize
    if which == "fwd":
        return Cost(flops=2 * M * N * K, bytes=a + b + c)
    return Cost(flops=4 * M * N * K, bytes=2 * (a + b) + c)  # read a, b, dc; write da, db


def plan(work: Workload, which: str, launch: Launch) -> Plan | None:
    """Each tile of a product [m, n] over k reads block_m rows and block_n columns of k."""
    M, N, K = work["M"], work["N"], work["K"]
    products = [(M, N, K)] if which == "fwd" else [(M, K, N), (K, N, M)]
    if launch.number >= len(products) or not {"block_m", "block_n"} <= launch.config.keys():
        return None
    m, n, k = products[launch.number]
    block_m, block_n = launch.config["block_m"], launch.config["block_n"]
    cluster = launch.config.get("cluster", 1)  # so many blocks share each tile of b
    tiles = -(-m // (block_m * cluster)) * cluster * -(-n // block_n)
    return Plan(tiles, shared=tiles * k * (block_m + block_n / cluster) * work.itemsize)


def reduction(work: Workload, name: str) -> int:
    return {"c": work["K"], "da": work["N"], "db": work["M"]}[name]


PROBLEM = Problem(
    stem="matmul",
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
    plan=plan,
    implementations={
        "triton": "triton_kernels.matmul:matmul",
        "pallas": "pallas_kernels.matmul:matmul",
    },
    peers={
        "cublas": "parity.peers:cublas_matmul",
        "jax.numpy": "parity.peers:jax_matmul",
        "jax.mosaic_example": "parity.peers:jax_mosaic_matmul",
    },
    glue=("pad", "slice", "copy", "convert_element_type", "transpose"),
)
