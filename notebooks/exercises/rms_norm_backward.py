"""The gradients of RMSNorm: of its rows, and of its weight.

xh[m, n] = x[m, n] * rstd[m]        g[m, n] = dy[m, n] * w[n]
dx[m, n] = rstd[m] * (g[m, n] - xh[m, n] * mean_j(g[m, j] * xh[m, j]))
dw[n] = sum_m dy[m, n] * xh[m, n]
x, dy [M, N]   w [N]   float16 or float32, rstd [M] float32   ->   dx [M, N] like x, dw [N] float32

for every program, for every row of its own:
    mean = mean(g * xh); dx = rstd * (g - xh * mean); partial += dy * xh       float32
dw = sum of the programs' partial sums, in a fixed order                       float32
"""

from typing import Any

import numpy as np

from notebooks._course import Limits
from parity.spec import Arithmetic, Array, Cost, Normal, Problem, Workload

SIZES = (
    ("one_row", 1, 5, "float32"),
    ("edges", 7, 300, "float32"),
    ("many_rows", 45, 130, "float16"),
    ("whole_tiles", 32, 1024, "float16"),
)
WORKLOADS = tuple(
    Workload(name, {"M": M, "N": N}, dtype, ("ci",), passes=("fwd",)) for name, M, N, dtype in SIZES
)


class Rstd(Normal):
    """Positive, and of a size that belongs to rows of size 1."""

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        return (0.5 + rng.random(self.shape)).astype(self.dtype)


def inputs(work: Workload) -> dict:
    M, N = work["M"], work["N"]
    return {
        "x": Normal((M, N), work.dtype),
        "w": Normal((N,), work.dtype),
        "rstd": Rstd((M,), "float32"),
        "dy": Normal((M, N), work.dtype),
    }


def oracle(ar: Arithmetic, work: Workload, x: Any, w: Any, rstd: Any, dy: Any) -> tuple[Any, Any]:
    rstd, dy = ar.lift(rstd)[:, None], ar.lift(dy)
    xh, g = ar.lift(x) * rstd, dy * ar.lift(w)
    dx = rstd * (g - xh * ar.xp.mean(g * xh, axis=1, keepdims=True))
    return dx, ar.xp.sum(dy * xh, axis=0)


def outputs(work: Workload) -> dict[str, Array]:
    M, N = work["M"], work["N"]
    return {"dx": Array((M, N), work.dtype), "dw": Array((N,), "float32")}


def cost(work: Workload, which: str) -> Cost:
    """Reads x, dy, w and rstd; writes dx and dw."""
    M, N = work["M"], work["N"]
    return Cost(9 * M * N, (3 * M * N + N) * work.itemsize + 4 * (M + N))


PROBLEM = Problem(
    stem="rms_norm_backward",
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
    reduction=lambda work, name: work["M"] if name == "dw" else work["N"],
    implementations={"triton": "", "pallas": ""},
    peers={},
    glue=("pad", "slice", "convert_element_type"),
)

LIMITS = Limits(launches=2, moved=1.4)  # four programs' partial sums make it 1.2
