"""Q03: asymmetric uint8, a scale and a zero point for every row."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from parity import formats
from parity.spec import Arithmetic, Array, Workload
from puzzles.inputs import Numbers
from puzzles.puzzle import primes
from puzzles.spec import case, problem

CASES = (
    case("eight", {"R": 1, "C": 8}, content="positive"),
    case("mixed", {"R": 5, "C": 77}),
    case("zeros", {"R": 2, "C": 19}, content="dead"),
)
EXACT = ("q", "zero")


@dataclass(frozen=True)
class Halves:
    """Rows from -127.5 to 127.5 steps, and whole and half steps between them: many ties.

    Steps of some power of two make exact ties; of odd numbers, ties that x / scale and x * inverse
    decide differently.
    """

    shape: tuple[int, ...]
    odd: bool

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        steps = rng.integers(-255, 256, self.shape).astype(np.float32) / 2
        steps[:, :1], steps[:, -1:] = -127.5, 127.5
        size = np.ldexp(np.float32(1), rng.integers(-8, 8, (self.shape[0], 1)))
        odd = 2 * rng.integers(3, 99, size.shape) + 1 if self.odd else np.ones(size.shape)
        return steps * size * odd.astype(np.float32)


@dataclass(frozen=True)
class Below:
    """No number above zero."""

    shape: tuple[int, ...]

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        return -np.abs(rng.standard_normal(self.shape, np.float32))


def fresh(rng: np.random.Generator) -> list[Workload]:
    rows, columns = primes(rng, 2, 20), primes(rng, 30, 500)
    return [
        case("one", {"R": 3, "C": 1}),
        case("ties", {"R": next(rows), "C": next(columns)}, content="halves"),
        case("rows", {"R": next(rows), "C": next(columns)}, content="rows"),
        case("odd_ties", {"R": next(rows), "C": next(columns)}, content="odd halves"),
        case("negative", {"R": next(rows), "C": next(columns)}, content="below"),
        case("constant", {"R": next(rows), "C": next(columns)}, content="ones"),
    ]


def inputs(work: Workload) -> dict[str, Any]:
    shape, content = (work["R"], work["C"]), work.tags[0]
    own = {"halves": Halves(shape, False), "odd halves": Halves(shape, True), "below": Below(shape)}
    return {"x": own.get(content) or Numbers(shape, content)}


def outputs(work: Workload) -> dict[str, Array]:
    R, C = work["R"], work["C"]
    return {
        "q": Array((R, C), "uint8"), "scale": Array((R,), "float32"), "zero": Array((R,), "uint8")
    }  # fmt: skip


def oracle(ar: Arithmetic, work: Workload, x: np.ndarray) -> tuple:
    _, scale, _ = formats.uint8_quantize(x, axis=-1)
    low, high = (f(x, axis=-1, keepdims=True, initial=0) for f in (np.min, np.max))
    inverse = np.float32(255) / np.where(high == low, np.float32(1), high - low)
    one = np.float32(1)
    zero = formats.uint8_encode(-low * inverse, one, 0)
    return formats.uint8_encode(x * inverse, one, zero), ar.lift(scale), zero[:, 0]


def unrounded(work: Workload, answer: Any, x: np.ndarray) -> dict[str, np.ndarray]:
    """What zero points and codes are the nearest whole numbers of: codes by their zero point."""
    x = x.astype(np.float64)
    low, high = (f(x, axis=-1, keepdims=True, initial=0) for f in (np.min, np.max))
    inverse = 255 / np.where(high == low, 1, high - low)
    codes = np.clip(x * inverse + answer["zero"][:, None], 0, 255)
    return {"zero": (-low * inverse)[:, 0], "q": codes}


PROBLEM = problem("q03", CASES, inputs, outputs, oracle)
