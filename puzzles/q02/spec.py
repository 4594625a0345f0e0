"""Q02: symmetric int8 with a scale for every group of columns of every row."""

from typing import Any

import numpy as np

from parity import formats
from parity.spec import Arithmetic, Array, Workload
from puzzles.inputs import Numbers
from puzzles.puzzle import primes
from puzzles.spec import case, problem

CASES = (
    case("eight", {"N": 1, "K": 8}, group=4),
    case("ragged", {"N": 3, "K": 70}, group=20),
    case("channel", {"N": 5, "K": 96}, content="rows", group=96),
)
EXACT = ("q",)


def fresh(rng: np.random.Generator) -> list[Workload]:
    rows, columns = primes(rng, 2, 12), primes(rng, 40, 130)
    return [
        case("one", {"N": 2, "K": 1}, group=32),
        case("tall", {"N": 13, "K": 5}, group=4),
        case("columns", {"N": next(rows), "K": next(columns)}, content="columns", group=32),
        case("zeros", {"N": next(rows), "K": next(columns)}, content="zeros", group=64),
        case("ties", {"N": next(rows), "K": next(columns)}, content="ties", group=64),
        case("wide", {"N": 2, "K": int(next(primes(rng, 500, 900)))}, group=128),
    ]


def _groups(work: Workload) -> int:
    return -(-work["K"] // work.options["group"])


def inputs(work: Workload) -> dict[str, Any]:
    return {"w": Numbers((work["N"], work["K"]), work.tags[0])}


def outputs(work: Workload) -> dict[str, Array]:
    return {
        "q": Array((work["N"], work["K"]), "int8"),
        "scale": Array((work["N"], _groups(work)), "float32"),
    }


def oracle(ar: Arithmetic, work: Workload, w: np.ndarray) -> tuple:
    group, count = work.options["group"], _groups(work)
    filled = np.pad(w, ((0, 0), (0, count * group - work["K"])))
    _, scale = formats.int8_quantize(filled, axis=-1, group=group)
    top = np.abs(filled).reshape(work["N"], count, group).max(axis=2)
    inverse = np.float32(127) / np.where(top == 0, np.float32(1), top)
    spread = np.repeat(inverse, group, axis=1)[:, : work["K"]]
    return formats.int8_encode(w * spread, np.float32(1)), ar.lift(scale)


def unrounded(work: Workload, answer: Any, w: np.ndarray) -> dict[str, np.ndarray]:
    """What codes are the nearest whole numbers of."""
    group, count = work.options["group"], _groups(work)
    filled = np.pad(w.astype(np.float64), ((0, 0), (0, count * group - work["K"])))
    groups = filled.reshape(work["N"], count, group)
    top = np.abs(groups).max(axis=2, keepdims=True)
    codes = groups * (127 / np.where(top == 0, 1, top))
    return {"q": codes.reshape(filled.shape)[:, : work["K"]]}


PROBLEM = problem("q02", CASES, inputs, outputs, oracle)
