"""Q07: MX blocks, e2m1 or e5m2 elements with an e8m0 scale for 32 of them."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from parity import formats
from parity.formats import SmallFloat
from parity.spec import Arithmetic, Array, Workload
from puzzles.inputs import Numbers
from puzzles.puzzle import primes
from puzzles.spec import case, problem

BLOCK = 32
FORMATS: dict[str, SmallFloat] = {"e2m1": formats.E2M1, "e5m2": formats.E5M2}
CASES = (
    case("eight", {"N": 1}, content="eight", fmt="e2m1"),
    case("every_e2m1", {"N": 37}, content="codes", fmt="e2m1"),
    case("every_e5m2", {"N": 149}, content="codes", fmt="e5m2"),
)
EXACT = ("code", "scale")
EIGHT = (28.0, 2.0, 1.0, 3.0, -10.0, 14.0, -1.0, 18.0)


@dataclass(frozen=True)
class Blocks:
    """Rows that are MX blocks.

    eight    the statement's numbers, then zeros
    codes    values of codes and the middles between them, a step of float32 more, and one less,
             times a power of two for each row, in which the largest is one of the topmost codes
    broken   one row in three has a NaN, one in three an infinity
    """

    rows: int
    content: str
    fmt: SmallFloat

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        shape = (self.rows, BLOCK)
        if self.content == "eight":
            return np.tile(
                np.resize(np.array([*EIGHT, *[0] * 24], np.float32), BLOCK), (self.rows, 1)
            )
        if self.content == "broken":
            x = rng.standard_normal(shape, np.float32)
            at = rng.integers(BLOCK, size=self.rows)
            x[np.arange(self.rows), at] = np.resize(
                np.array([1, np.nan, -np.inf], np.float32), self.rows
            )
            return x
        values = self.fmt.values[: self.fmt.largest_code + 1]
        border = np.concatenate([values, (values[1:] + values[:-1]) / 2])
        near = np.concatenate([border, *(np.nextafter(border, np.float32(s)) for s in (1e9, 0))])
        near = rng.permutation(np.concatenate([near, -near]))
        x = np.resize(near, shape)
        largest = self.fmt.largest * rng.choice(np.array([1, 1.125], np.float32), self.rows)
        x[np.arange(self.rows), rng.integers(BLOCK, size=self.rows)] = largest
        return np.ldexp(x, rng.integers(-60, 60, (self.rows, 1))).astype(np.float32)


def fresh(rng: np.random.Generator) -> list[Workload]:
    few, more = primes(rng, 3, 40), primes(rng, 41, 200)
    return [
        case("codes_e2m1", {"N": next(more)}, content="codes", fmt="e2m1"),
        case("codes_e5m2", {"N": next(more)}, content="codes", fmt="e5m2"),
        case("broken", {"N": next(few)}, content="broken", fmt="e2m1"),
        case("dead", {"N": next(few)}, content="dead", fmt="e5m2"),
        case("rows_e2m1", {"N": next(more)}, content="rows", fmt="e2m1"),
        case("rows_e5m2", {"N": next(more)}, content="rows", fmt="e5m2"),
    ]


def inputs(work: Workload) -> dict[str, Any]:
    N, content = work["N"], work.tags[0]
    if content in ("dead", "rows"):
        return {"x": Numbers((N, BLOCK), content)}
    return {"x": Blocks(N, content, FORMATS[work.options["fmt"]])}


def outputs(work: Workload) -> dict[str, Array]:
    return {"code": Array((work["N"], BLOCK), "uint8"), "scale": Array((work["N"],), "uint8")}


def oracle(ar: Arithmetic, work: Workload, x: np.ndarray) -> tuple:
    fmt = work.options["fmt"]
    code, scale = formats.mx_quantize(x, fmt, scale_mode="floor")
    if fmt == "e2m1":
        code = formats.unpack_nibbles(code, low_first=True)
    return code, scale[:, 0]


PROBLEM = problem("q07", CASES, inputs, outputs, oracle)
