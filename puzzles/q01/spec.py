"""Q01: symmetric int8 with one scale for the whole tensor."""

from typing import Any

import numpy as np

from parity import formats
from parity.spec import Arithmetic, Array, Workload
from puzzles.inputs import Numbers
from puzzles.puzzle import primes
from puzzles.spec import case, problem

CASES = (
    case("eight", {"N": 8}),
    case("two_trips", {"N": 2500}),
    case("zeros", {"N": 37}, content="zeros"),
)
EXACT = ("q",)


def fresh(rng: np.random.Generator) -> list[Workload]:
    short, middle, long = primes(rng, 23, 60), primes(rng, 60, 1000), primes(rng, 1030, 4000)
    return [
        case("one", {"N": 1}),
        case("short", {"N": next(short)}, content="ties"),
        case("middle", {"N": next(middle)}, content="nan"),
        case("outlier", {"N": next(middle)}, content="outlier"),
        case("negative", {"N": next(long)}, content="negative"),
        case("long", {"N": next(long)}),
    ]


def inputs(work: Workload) -> dict[str, Any]:
    return {"x": Numbers((work["N"],), work.tags[0])}


def outputs(work: Workload) -> dict[str, Array]:
    return {"q": Array((work["N"],), "int8"), "scale": Array((1,), "float32")}


def oracle(ar: Arithmetic, work: Workload, x: np.ndarray) -> tuple:
    numbers = np.where(np.isnan(x), np.float32(0), x)
    _, scale = formats.int8_quantize(numbers, axis=None)
    top = np.max(np.abs(numbers), initial=0)
    inverse = np.float32(127) / np.where(top == 0, np.float32(1), top)
    return formats.int8_encode(x * inverse, np.float32(1)), ar.lift(scale.reshape(1))


def unrounded(work: Workload, answer: Any, x: np.ndarray) -> dict[str, np.ndarray]:
    """What codes are the nearest whole numbers of."""
    x = np.where(np.isnan(x), 0, x.astype(np.float64))
    top = np.max(np.abs(x), initial=0)
    return {"q": x * (127 / np.where(top == 0, 1, top))}


PROBLEM = problem("q01", CASES, inputs, outputs, oracle)
