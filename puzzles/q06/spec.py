"""Q06: float16 to e4m3, every number there is."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from parity import formats
from parity.spec import Arithmetic, Array, Workload
from puzzles.inputs import Numbers
from puzzles.puzzle import primes
from puzzles.spec import case, problem

ALL = 1 << 16
CASES = (
    case("eight", {"N": 8}, content="eight"),
    case("every", {"N": ALL}, content="every"),
    case("zeros", {"N": 37}, content="zeros"),
)
EXACT = ("code",)
EIGHT = (1.0, 1.1875, -0.0, 464.0, 0.0029296875, -0.009765625, 0.0009765625, float("nan"))


@dataclass(frozen=True)
class Halves:
    """float16 numbers from a list, or shuffled: all 65536 of them, or those around e4m3's.

    every    each bit pattern, as far as they go round
    codes    values of codes and the middles between them, a step of float16 more, and one less
    """

    shape: tuple[int, ...]
    content: str

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        size = self.shape[0]
        if self.content == "eight":
            return np.resize(np.array(EIGHT, np.float16), size)
        if self.content == "every":
            return rng.permutation(np.arange(ALL, dtype=np.uint16)).view(np.float16)[:size]
        values = formats.E4M3.values[: formats.E4M3.largest_code + 1]
        border = np.concatenate([values, (values[1:] + values[:-1]) / 2, [464, 480, 65504]])
        bits = border.astype(np.float16).view(np.uint16).astype(int)
        near = np.concatenate([bits, bits + 1, np.maximum(bits - 1, 0)])
        near = np.concatenate([near, near | 0x8000]).astype(np.uint16)
        return rng.choice(near, size).view(np.float16)


def fresh(rng: np.random.Generator) -> list[Workload]:
    short, long = primes(rng, 3, 200), primes(rng, 1030, 6000)
    return [
        case("one", {"N": 1}, content="codes"),
        case("short", {"N": next(short)}, content="codes"),
        case("codes", {"N": next(long)}, content="codes"),
        case("some", {"N": next(long)}, content="every"),
        case("normal", {"N": next(long)}),
        case("columns", {"N": next(long)}, content="columns"),
    ]


def inputs(work: Workload) -> dict[str, Any]:
    shape, content = (work["N"],), work.tags[0]
    own = content in ("eight", "every", "codes")
    return {"x": Halves(shape, content) if own else Numbers(shape, content, "float16")}


def outputs(work: Workload) -> dict[str, Array]:
    return {"code": Array((work["N"],), "uint8")}


def oracle(ar: Arithmetic, work: Workload, x: np.ndarray) -> tuple:
    return (formats.E4M3.encode(x),)


PROBLEM = problem("q06", CASES, inputs, outputs, oracle)
