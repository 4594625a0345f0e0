"""A residual is added, and the rows of the sum are normalised by their root mean square.

h[m, n] = round(x[m, n] + residual[m, n])        rstd[m] = (mean_n h[m, n]^2 + eps)^(-1/2)
y[m, n] = h[m, n] * rstd[m] * w[n]
x, residual [M, N]   w [N]   ->   y, h [M, N]   float16 or float32, all alike

for every row:
    h = x + residual                         rounded to x.dtype before the statistics
    rstd = rsqrt(mean(h * h) + eps)          float32
    y = h * rstd * w                         one rounding
"""

from typing import Any

import numpy as np

from notebooks._course import Limits
from parity.spec import Arithmetic, Array, Cost, Normal, Problem, Workload

STD = {"large_values": 30.0, "small_values": 1e-3}  # of x and of residual; 1 in the others


def _sizes(name: str, M: int, N: int, dtype: str = "float16") -> Workload:
    sizes = {"M": M, "N": N}
    return Workload(name, sizes, dtype, ("ci",), {"eps": 1e-6}, passes=("fwd",))


WORKLOADS = (
    _sizes("one_column", 7, 1),
    _sizes("large_values", 4, 1000),  # the squares of a row sum to more than float16 can hold
    _sizes("small_values", 4, 1000),  # squares over N are less than it can hold; eps matters
    _sizes("row_of_zeros", 5, 300),
    _sizes("float32", 3, 130, "float32"),
    _sizes("whole_tiles", 6, 2048),
)


class OneRowOfZeros(Normal):
    """Row 1 is all zeros."""

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        x = super().draw(rng)
        x[1] = 0
        return x


def inputs(work: Workload) -> dict:
    kind = OneRowOfZeros if work.name == "row_of_zeros" else Normal
    rows = kind((work["M"], work["N"]), work.dtype, std=STD.get(work.name, 1.0))
    return {"x": rows, "residual": rows, "w": Normal((work["N"],), work.dtype)}


def oracle(ar: Arithmetic, work: Workload, x: Any, residual: Any, w: Any) -> tuple[Any, ...]:
    h = ar.rounded(ar.lift(x) + ar.lift(residual), work.dtype)
    rstd = (ar.xp.mean(h * h, axis=1, keepdims=True) + work.options["eps"]) ** -0.5
    return h * rstd * ar.lift(w), h


def outputs(work: Workload) -> dict[str, Array]:
    rows = Array((work["M"], work["N"]), work.dtype)
    return {"y": rows, "h": rows}


def cost(work: Workload, which: str) -> Cost:
    """Reads x, residual and w; writes y and h."""
    M, N = work["M"], work["N"]
    return Cost(5 * M * N, (4 * M * N + N) * work.itemsize)


PROBLEM = Problem(
    stem="residual_rms_norm",
    doc=__doc__ or "",
    family="norm",
    workloads=WORKLOADS,
    inputs=inputs,
    cotangents=lambda work: {},
    outputs=outputs,
    grads=lambda work: {},
    oracle=oracle,
    oracle_bwd=oracle,
    cost=cost,
    reduction=lambda work, name: work["N"],
    implementations={"triton": "", "pallas": ""},
    peers={},
    glue=("pad", "slice", "convert_element_type"),
)

LIMITS = Limits(launches=1, moved=1.3)  # w once a row is 1.2; x twice would be 1.4
