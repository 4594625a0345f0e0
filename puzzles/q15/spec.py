"""Q15: x @ W.T with W in int4, a scale and a zero point for every 128 weights of a row."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from parity import formats
from parity.spec import Arithmetic, Array, Workload
from puzzles.inputs import Numbers
from puzzles.puzzle import primes
from puzzles.spec import case, problem

GROUP = 128

CASES = (
    case("one_token", {"M": 1, "N": 64, "G": 2}),
    case("ragged", {"M": 7, "N": 70, "G": 3}, content="rows"),
    case("tall", {"M": 17, "N": 33, "G": 2}),
)
EXACT = ()
SPEED = case("16 x 28672 x 8192", {"M": 16, "N": 28672, "G": 64})


def fresh(rng: np.random.Generator) -> list[Workload]:
    tokens, rows = primes(rng, 2, 16), primes(rng, 19, 128)
    return [
        case("positive", {"M": next(tokens), "N": next(rows), "G": 1}, content="positive"),
        case("zeros", {"M": next(tokens), "N": next(rows), "G": 1}, content="zeros"),
        case("long", {"M": next(tokens), "N": 18, "G": 17}),
        case("outlier", {"M": next(tokens), "N": next(rows), "G": 4}, content="outlier"),
        case("rows", {"M": 16, "N": next(rows), "G": 3}, content="rows"),
        case("sixty_four", {"M": 64, "N": next(rows), "G": 2}, content="columns"),
    ]


@dataclass
class _Quantized:
    """W, quantized when the first of its parts is drawn."""

    work: Workload
    parts: dict[str, np.ndarray] = field(default_factory=dict)

    def quantize(self, rng: np.random.Generator) -> None:
        shape = self.work["N"], self.work["G"] * GROUP
        w = Numbers(shape, self.work.tags[0], "float16").draw(rng)
        packed, scale, zero = formats.int4_quantize(w, group=GROUP, symmetric=False)
        assert zero is not None
        zero = formats.int4_unpack_zeros(zero, self.work["G"])
        scale, zero = (np.ascontiguousarray(x.T) for x in (scale, zero))
        self.parts |= {"packed": packed, "scale": scale, "zero": zero}


@dataclass
class _Part:
    of: _Quantized
    name: str
    shape: tuple[int, ...]
    dtype: str

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        if not self.of.parts:
            self.of.quantize(rng)
        return self.of.parts[self.name]


def inputs(work: Workload) -> dict[str, Any]:
    w, (m, n, g) = _Quantized(work), (work[letter] for letter in "MNG")
    return {
        "x": Numbers((m, g * GROUP), "normal", "float16"),
        "packed": _Part(w, "packed", (n, g * GROUP // 2), "uint8"),
        "scale": _Part(w, "scale", (g, n), "float16"),
        "zero": _Part(w, "zero", (g, n), "uint8"),
    }


def outputs(work: Workload) -> dict[str, Array]:
    return {"y": Array((work["M"], work["N"]), "float16")}


def oracle(
    ar: Arithmetic, work: Workload, x: np.ndarray, packed: np.ndarray, scale: np.ndarray,
    zero: np.ndarray,
) -> tuple:  # fmt: skip
    code = formats.unpack_nibbles(packed, low_first=True)
    wide_scale, wide_zero = (np.repeat(part.T, GROUP, axis=1) for part in (scale, zero))
    w = formats.int4_decode(code, wide_scale, wide_zero)
    return (ar.lift(x) @ ar.stored(ar.lift(w), "float16").T,)


PROBLEM = problem("q15", CASES, inputs, outputs, oracle, terms=1024)
