"""The sum of each row.

out[m] = sum_n x[m, n]        x [M, N]   ->   out [M]   float32

for every row:
    out = sum of x over its blocks           float32
"""

from typing import Any

from parity.spec import Arithmetic, Array, Cost, Integers, Normal, Problem, Workload

SIZES = ((1, 40), (3, 128), (5, 300))
WORKLOADS = tuple(
    Workload(f"{M}x{N}", {"M": M, "N": N}, "float32", ("ci",), passes=("fwd",)) for M, N in SIZES
)


def oracle(ar: Arithmetic, work: Workload, x: Any) -> tuple[Any]:
    return (ar.xp.sum(ar.lift(x), axis=1),)


PROBLEM = Problem(
    stem="row_sums",
    doc=__doc__ or "",
    family="norm",
    workloads=WORKLOADS,
    inputs=lambda work: {"x": Normal((work["M"], work["N"]), "float32")},
    cotangents=lambda work: {},
    outputs=lambda work: {"out": Array((work["M"],), "float32")},
    grads=lambda work: {},
    oracle=oracle,
    oracle_bwd=oracle,
    cost=lambda work, which: Cost(work["M"] * work["N"], 4 * work["M"] * (work["N"] + 1)),
    reduction=lambda work, name: work["N"],
    implementations={"triton": ""},
    peers={},
    probe=lambda work: {"x": Integers((work["M"], work["N"]), "float32")},
)
