"""The product of two square bfloat16 matrices, in float32.

c = a @ b        a, b [N, N] bfloat16   ->   c [N, N] float32

one program: c = a @ b                       exact products, float32 sums
"""

from typing import Any

from parity.spec import Arithmetic, Array, Cost, Normal, Problem, Workload

WORKLOADS = tuple(
    Workload(f"n_{N}", {"N": N}, "bfloat16", ("ci",), passes=("fwd",)) for N in (16, 64)
)


def oracle(ar: Arithmetic, work: Workload, a: Any, b: Any) -> tuple[Any]:
    return (ar.lift(a) @ ar.lift(b),)


PROBLEM = Problem(
    stem="bf16_product",
    doc=__doc__ or "",
    family="gemm",
    workloads=WORKLOADS,
    inputs=lambda work: {name: Normal((work["N"], work["N"]), "bfloat16") for name in "ab"},
    cotangents=lambda work: {},
    outputs=lambda work: {"c": Array((work["N"], work["N"]), "float32")},
    grads=lambda work: {},
    oracle=oracle,
    oracle_bwd=oracle,
    cost=lambda work, which: Cost(2 * work["N"] ** 3, 8 * work["N"] ** 2),
    reduction=lambda work, name: work["N"],
    implementations={"triton": ""},
    peers={},
)
