"""Two arrays into one: out = scale * x + y.

out[m, n] = scale * x[m, n] + y[m, n]
x [M, N]   y [M, N]   ->   out [M, N]   all float32

for every tile of the arrays:
    out = scale * x + y                      float32
"""

from typing import Any

from notebooks._course import Limits
from parity.spec import Arithmetic, Array, Cost, Integers, Normal, Problem, Workload


def _sizes(name: str, M: int, N: int) -> Workload:
    return Workload(name, {"M": M, "N": N}, "float32", ("ci",), {"scale": 0.5}, passes=("fwd",))


WORKLOADS = (
    _sizes("narrow", 11, 5),
    _sizes("one_element", 1, 1),
    _sizes("one_row", 1, 130),
    _sizes("whole_tiles", 16, 256),  # no edge at all
    _sizes("edges", 19, 261),
)


def inputs(work: Workload) -> dict:
    shape = work["M"], work["N"]
    return {"x": Normal(shape, "float32"), "y": Normal(shape, "float32")}


def oracle(ar: Arithmetic, work: Workload, x: Any, y: Any) -> tuple[Any]:
    return (work.options["scale"] * ar.lift(x) + ar.lift(y),)


def probe(work: Workload) -> dict:
    shape = work["M"], work["N"]
    return {"x": Integers(shape, "float32"), "y": Integers(shape, "float32")}


PROBLEM = Problem(
    stem="scale_add",
    doc=__doc__ or "",
    family="norm",
    workloads=WORKLOADS,
    inputs=inputs,
    cotangents=lambda work: {},
    outputs=lambda work: {"out": Array((work["M"], work["N"]), "float32")},
    grads=lambda work: {},
    oracle=oracle,
    oracle_bwd=oracle,
    cost=lambda work, which: Cost(2 * work["M"] * work["N"], 12 * work["M"] * work["N"]),
    reduction=lambda work, name: 1,
    implementations={"triton": "", "pallas": ""},
    peers={},
    probe=probe,
    glue=("pad", "slice", "convert_element_type"),  # rows that the copy engine can take
)

LIMITS = Limits(launches=1, moved=1.1)
