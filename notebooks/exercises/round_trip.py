"""What is left of numbers after a trip through int8 or int4, a scale for every 128 neighbours.

x [M, K] float32, K a multiple of 128, step = 1 / 127 or 1 / 7   ->   out [M, K] float32

for every 128 neighbours:
    scale = max |x| * step                   float32; 1 where all are zero
    code = round(x / scale), ties to even    float32 division
    out = code * scale                       float32
"""

from typing import Any

import numpy as np

from notebooks._course import Limits
from parity.spec import Arithmetic, Array, Cost, Normal, Problem, Workload

GROUP = 128


def _sizes(name: str, M: int, K: int, levels: int) -> Workload:
    options = {"step": float(np.float32(1 / levels))}
    return Workload(name, {"M": M, "K": K}, "float32", ("ci",), options, passes=("fwd",))


WORKLOADS = (
    _sizes("one_group", 1, 128, 127),
    _sizes("zero_groups", 3, 384, 127),
    _sizes("ties", 2, 256, 127),
    _sizes("int4", 5, 256, 7),
    _sizes("int8", 7, 512, 127),
)


class Zeros(Normal):
    """Every second group is zero."""

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        x = rng.standard_normal(self.shape, np.float32).reshape(-1, GROUP)
        x[::2] = 0
        return x.reshape(self.shape)


class Halves(Normal):
    """Whole numbers and a half, each group's scale 1: every one of them is a tie."""

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        x = rng.integers(-126, 126, self.shape).reshape(-1, GROUP) + 0.5
        x[:, 0] = 127
        return x.reshape(self.shape).astype(self.dtype)


def inputs(work: Workload) -> dict:
    kind = {"zero_groups": Zeros, "ties": Halves}.get(work.name, Normal)
    return {"x": kind((work["M"], work["K"]), "float32")}


def oracle(ar: Arithmetic, work: Workload, x: Any) -> tuple[Any]:
    xp, groups = ar.xp, ar.lift(x).reshape((-1, GROUP))
    top = xp.max(xp.abs(groups), axis=1, keepdims=True)
    scale = ar.rounded(top * work.options["step"], "float32")
    scale = xp.where(scale == 0, xp.ones_like(scale), scale)
    code = xp.round(ar.rounded(groups / scale, "float32"))
    return (ar.rounded(code * scale, "float32").reshape(x.shape),)


PROBLEM = Problem(
    stem="round_trip",
    doc=__doc__ or "",
    family="norm",
    workloads=WORKLOADS,
    inputs=inputs,
    cotangents=lambda work: {},
    outputs=lambda work: {"out": Array((work["M"], work["K"]), "float32")},
    grads=lambda work: {},
    oracle=oracle,
    oracle_bwd=oracle,
    cost=lambda work, which: Cost(5 * work["M"] * work["K"], 8 * work["M"] * work["K"]),
    reduction=lambda work, name: GROUP,
    implementations={"triton": "", "pallas": ""},
    peers={},
    glue=("reshape",),
)

LIMITS = Limits(launches=1, moved=1.05)  # x once, out once
