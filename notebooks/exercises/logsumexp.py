"""The logarithm of the sum of exponentials of each row, in one walk over it.

out[m] = log(sum_n exp(x[m, n]))        x [M, N]   ->   out [M]   float32
A row of -inf gives -inf.

for every row:
    for every block of it: (top, total) = merged with the block's own      float32
    out = top + log(total)                                                 float32
"""

from typing import Any

import numpy as np

from notebooks._course import Limits
from parity.spec import Arithmetic, Array, Cost, Normal, Problem, Workload

SIZES = (
    ("short", 3, 5),
    ("one_block", 2, 512),
    ("rising_rows", 3, 1300),
    ("logits_to_1e4", 3, 1100),
    ("rows_of_minus_inf", 4, 700),
    ("long_rows", 2, 6000),
)
WORKLOADS = tuple(
    Workload(name, {"M": M, "N": N}, "float32", ("ci",), passes=("fwd",)) for name, M, N in SIZES
)


class Rising(Normal):
    """Logits that rise by about 10 from one block to the next."""

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        x = np.arange(self.shape[1]) / 50 + rng.standard_normal(self.shape)
        return x.astype(self.dtype)


class Large(Normal):
    """Logits between -1e4 and 1e4, a third of them within 10 of the largest; one row falls."""

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        x = rng.uniform(-1e4, 1e4, self.shape)
        x = np.where(rng.random(self.shape) < 1 / 3, 1e4 - rng.uniform(0, 10, self.shape), x)
        x[1] = -np.sort(-x[1])
        return x.astype(self.dtype)


class Masked(Normal):
    """Nothing but -inf in row 1; in row 2 a whole block of it first; some in the others."""

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        x = np.where(rng.random(self.shape) < 0.3, -np.inf, rng.standard_normal(self.shape))
        x[1] = -np.inf
        x[2, :520] = -np.inf
        return x.astype(self.dtype)


def inputs(work: Workload) -> dict:
    kinds = {"rising_rows": Rising, "logits_to_1e4": Large, "rows_of_minus_inf": Masked}
    return {"x": kinds.get(work.name, Normal)((work["M"], work["N"]), "float32")}


def sums(ar: Arithmetic, x: Any) -> tuple[Any, Any, Any]:
    """(exp(x - top), its sum, top) of each row, where top is 0 if the row is all -inf."""
    xp, x = ar.xp, ar.lift(x)
    top = xp.max(x, axis=1, keepdims=True)
    top = xp.where(top == -xp.inf, xp.zeros_like(top), top)
    e = xp.exp(x - top)
    return e, xp.sum(e, axis=1, keepdims=True), top


def oracle(ar: Arithmetic, work: Workload, x: Any) -> tuple[Any]:
    _, total, top = sums(ar, x)
    one = ar.xp.ones_like(total)
    out = top + ar.xp.log(ar.xp.where(total == 0, one, total))
    return (ar.xp.where(total == 0, -ar.xp.inf * one, out)[:, 0],)


PROBLEM = Problem(
    stem="logsumexp",
    doc=__doc__ or "",
    family="norm",
    workloads=WORKLOADS,
    inputs=inputs,
    cotangents=lambda work: {},
    outputs=lambda work: {"out": Array((work["M"],), "float32")},
    grads=lambda work: {},
    oracle=oracle,
    oracle_bwd=oracle,
    cost=lambda work, which: Cost(4 * work["M"] * work["N"], 4 * work["M"] * (work["N"] + 1)),
    reduction=lambda work, name: work["N"],
    implementations={"triton": "", "pallas": ""},
    peers={},
    glue=("pad", "slice", "squeeze", "convert_element_type"),
)

LIMITS = Limits(launches=1, moved=1.15)  # x once
