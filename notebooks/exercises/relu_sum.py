"""Three steps in one kernel: add, cut off below zero, scale.

out[n] = scale * max(x[n] + y[n], 0)        x [N]   y [N]   ->   out [N]   all float32

for every tile of the arrays:
    out = scale * max(x + y, 0)              float32
"""

from typing import Any

from notebooks._course import Limits
from parity.spec import Arithmetic, Array, Cost, Integers, Normal, Problem, Workload

WORKLOADS = tuple(
    Workload(f"n_{N}", {"N": N}, "float32", ("ci",), {"scale": 0.5}, passes=("fwd",))
    for N in (1, 100, 512, 2500)
)


def inputs(work: Workload) -> dict:
    return {name: Normal((work["N"],), "float32") for name in "xy"}


def oracle(ar: Arithmetic, work: Workload, x: Any, y: Any) -> tuple[Any]:
    total = ar.lift(x) + ar.lift(y)
    return (work.options["scale"] * ar.xp.where(total > 0, total, ar.xp.zeros_like(total)),)


PROBLEM = Problem(
    stem="relu_sum",
    doc=__doc__ or "",
    family="norm",
    workloads=WORKLOADS,
    inputs=inputs,
    cotangents=lambda work: {},
    outputs=lambda work: {"out": Array((work["N"],), "float32")},
    grads=lambda work: {},
    oracle=oracle,
    oracle_bwd=oracle,
    cost=lambda work, which: Cost(3 * work["N"], 12 * work["N"]),
    reduction=lambda work, name: 1,
    implementations={"triton": "", "pallas": ""},
    peers={},
    probe=lambda work: {name: Integers((work["N"],), "float32") for name in "xy"},
    glue=("pad", "slice", "convert_element_type"),  # whole tiles for Pallas
)

LIMITS = Limits(launches=1, moved=1.05)  # x and y once, out once
