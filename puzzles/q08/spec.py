"""Q08: symmetric int8 with a scale for every row of activations, in one launch."""

from typing import Any

import numpy as np

from parity import formats
from parity.spec import Arithmetic, Array, Workload
from puzzles.inputs import Numbers
from puzzles.puzzle import primes
from puzzles.spec import case, problem

CASES = (
    case("eight", {"M": 1, "K": 8}),
    case("two_trips", {"M": 3, "K": 2500}, content="rows"),
    case("dead_rows", {"M": 5, "K": 64}, content="dead"),
)
EXACT = ("q",)
SPEED = case("8192 tokens", {"M": 8192, "K": 4096})


def fresh(rng: np.random.Generator) -> list[Workload]:
    rows, columns, long = primes(rng, 2, 14), primes(rng, 40, 1000), primes(rng, 1030, 4000)
    return [
        case("one", {"M": 2, "K": 1}),
        case("ties", {"M": next(rows), "K": next(columns)}, content="ties"),
        case("outlier", {"M": next(rows), "K": next(columns)}, content="outlier"),
        case("tall", {"M": 17, "K": 3}, content="rows"),
        case("negative", {"M": 2, "K": next(long)}, content="negative"),
        case("long", {"M": 3, "K": next(long)}, content="rows"),
    ]


def inputs(work: Workload) -> dict[str, Any]:
    return {"x": Numbers((work["M"], work["K"]), work.tags[0], "float16")}


def outputs(work: Workload) -> dict[str, Array]:
    return {"q": Array((work["M"], work["K"]), "int8"), "scale": Array((work["M"],), "float32")}


def oracle(ar: Arithmetic, work: Workload, x: np.ndarray) -> tuple:
    _, scale = formats.int8_quantize(x, axis=-1)
    x = x.astype(np.float32)
    top = np.abs(x).max(axis=1, keepdims=True)
    inverse = np.float32(127) / np.where(top == 0, np.float32(1), top)
    return formats.int8_encode(x * inverse, np.float32(1)), ar.lift(scale)


def unrounded(work: Workload, answer: Any, x: np.ndarray) -> dict[str, np.ndarray]:
    """What codes are the nearest whole numbers of."""
    x = x.astype(np.float64)
    top = np.abs(x).max(axis=1, keepdims=True)
    return {"q": x * (127 / np.where(top == 0, 1, top))}


PROBLEM = problem("q08", CASES, inputs, outputs, oracle)
