"""Twice each element, through shared memory.

out[n] = 2 * x[n]        x [N]   ->   out [N]   float32, N a multiple of 128

for every 128 elements of x:
    out = 2 * x                              float32
"""

from typing import Any

from parity.spec import Arithmetic, Array, Cost, Normal, Problem, Workload

WORKLOADS = tuple(
    Workload(f"n_{N}", {"N": N}, "float32", ("ci",), passes=("fwd",)) for N in (128, 384)
)


def oracle(ar: Arithmetic, work: Workload, x: Any) -> tuple[Any]:
    return (2 * ar.lift(x),)


PROBLEM = Problem(
    stem="double",
    doc=__doc__ or "",
    family="norm",
    workloads=WORKLOADS,
    inputs=lambda work: {"x": Normal((work["N"],), "float32")},
    cotangents=lambda work: {},
    outputs=lambda work: {"out": Array((work["N"],), "float32")},
    grads=lambda work: {},
    oracle=oracle,
    oracle_bwd=oracle,
    cost=lambda work, which: Cost(work["N"], 8 * work["N"]),
    reduction=lambda work, name: 1,
    implementations={"pallas": ""},
    peers={},
)
