"""Q04: signed 4-bit codes, packed in either order and unpacked again."""

from typing import Any

import numpy as np

from parity import formats
from parity.spec import Arithmetic, Array, Integers, Workload
from puzzles.puzzle import primes
from puzzles.spec import case, problem

CASES = (
    case("eight", {"R": 1, "C": 8}, low_first=True),
    case("other_order", {"R": 3, "C": 130}, low_first=False),
    case("odd", {"R": 2, "C": 7}, low_first=True),
)
EXACT = ("packed", "back")


def fresh(rng: np.random.Generator) -> list[Workload]:
    rows, columns = primes(rng, 2, 14), primes(rng, 40, 300)
    return [
        case("one", {"R": 2, "C": 1}, low_first=False),
        case("pair", {"R": 3, "C": 2}, low_first=True),
        case("low", {"R": next(rows), "C": next(columns)}, low_first=True),
        case("high", {"R": next(rows), "C": next(columns)}, low_first=False),
        case("even", {"R": next(rows), "C": 2 * int(rng.integers(60, 200))}, low_first=True),
        case("wide", {"R": 2, "C": int(next(primes(rng, 1030, 1900)))}, low_first=False),
    ]


def inputs(work: Workload) -> dict[str, Any]:
    return {"code": Integers((work["R"], work["C"]), "int8", -8, 7)}


def outputs(work: Workload) -> dict[str, Array]:
    return {
        "packed": Array((work["R"], -(-work["C"] // 2)), "uint8"),
        "back": Array((work["R"], work["C"]), "int8"),
    }


def oracle(ar: Arithmetic, work: Workload, code: np.ndarray) -> tuple:
    even = np.pad(code, ((0, 0), (0, work["C"] % 2)))
    nibbles = even.astype(np.uint8) & 15
    return formats.pack_nibbles(nibbles, low_first=work.options["low_first"]), code


PROBLEM = problem("q04", CASES, inputs, outputs, oracle)
