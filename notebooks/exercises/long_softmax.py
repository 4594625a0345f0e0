"""Softmax of rows that are too long to be held: two walks over each.

y[m, n] = exp(x[m, n] - top[m]) / sum_j exp(x[m, j] - top[m])        x [M, N]   ->   y [M, N]
float32; a row of -inf gives zeros.

for every row:
    for every block of it: (top, total) = merged with the block's own      float32
    for every block of it: y = exp(x - top) / total                        float32
"""

from typing import Any

from notebooks._course import Limits
from notebooks.exercises.logsumexp import WORKLOADS, inputs, sums
from parity.spec import Arithmetic, Array, Cost, Problem, Workload


def oracle(ar: Arithmetic, work: Workload, x: Any) -> tuple[Any]:
    e, total, _ = sums(ar, x)
    return (e / ar.xp.where(total == 0, ar.xp.ones_like(total), total),)


PROBLEM = Problem(
    stem="long_softmax",
    doc=__doc__ or "",
    family="norm",
    workloads=WORKLOADS,
    inputs=inputs,
    cotangents=lambda work: {},
    outputs=lambda work: {"y": Array((work["M"], work["N"]), "float32")},
    grads=lambda work: {},
    oracle=oracle,
    oracle_bwd=oracle,
    cost=lambda work, which: Cost(5 * work["M"] * work["N"], 8 * work["M"] * work["N"]),
    reduction=lambda work, name: work["N"],
    implementations={"triton": "", "pallas": ""},
    peers={},
    glue=("pad", "slice", "convert_element_type"),
)

LIMITS = Limits(launches=1, moved=1.6)  # x twice and y once is 1.5
