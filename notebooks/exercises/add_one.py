"""One more than each element.

out[n] = x[n] + 1        x [N]   ->   out [N]   float32

for every tile of x:
    out = x + 1                              float32
"""

from typing import Any

from parity.spec import Arithmetic, Array, Cost, Normal, Problem, Workload

WORKLOADS = tuple(
    Workload(f"n_{N}", {"N": N}, "float32", ("ci",), passes=("fwd",)) for N in (5, 64, 150)
)


def oracle(ar: Arithmetic, work: Workload, x: Any) -> tuple[Any]:
    return (ar.lift(x) + 1,)


PROBLEM = Problem(
    stem="add_one",
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
    implementations={"triton": ""},
    peers={},
)
