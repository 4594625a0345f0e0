"""Q09: NF4 with double quantization, from bitsandbytes' bytes back to float16."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from parity import formats
from parity.spec import Arithmetic, Array, Workload
from puzzles.inputs import Numbers
from puzzles.spec import case, problem

BLOCK, SUPER = 64, 256  # weights to a block, blocks to a superblock

CASES = (
    case("two_blocks", {"P": 64}),
    case("ragged", {"P": 1000}, content="rows"),
    case("superblocks", {"P": 32 * 256 * 2 + 77}, content="rows"),
)
EXACT = ()
SPEED = case("4096 x 14336", {"P": 4096 * 14336 // 2})


def fresh(rng: np.random.Generator) -> list[Workload]:
    def bytes_of(low: int, high: int) -> dict[str, int]:
        return {"P": int(rng.integers(low, high))}

    return [
        case("one", {"P": 1}),
        case("zeros", bytes_of(33, 200), content="zeros"),
        case("outlier", bytes_of(300, 3000), content="outlier"),
        case("long", bytes_of(32 * 512, 32 * 700), content="rows"),
    ]


def blocks(work: Workload) -> int:
    return -(-2 * work["P"] // BLOCK)


@dataclass
class _Quantized:
    """One tensor, quantized when the first of its parts is drawn."""

    work: Workload
    parts: dict[str, np.ndarray] = field(default_factory=dict)

    def quantize(self, rng: np.random.Generator) -> None:
        rows = Numbers((blocks(self.work), BLOCK), self.work.tags[0]).draw(rng)
        packed, state = formats.nf4_quantize(rows.reshape(-1)[: 2 * self.work["P"]])
        assert isinstance(state, formats.Nf4State)
        self.parts |= {
            "packed": packed, "absmax": state.qabsmax, "code": formats.NF4.copy(),
            "absmax2": state.absmax2, "code2": state.code, "offset": state.offset.reshape(1),
        }  # fmt: skip


@dataclass
class _Part:
    of: _Quantized
    name: str
    shape: tuple[int, ...]
    dtype: str

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        if self.name not in self.of.parts:
            self.of.quantize(rng)
        return self.of.parts[self.name]


def inputs(work: Workload) -> dict[str, Any]:
    tensor, count = _Quantized(work), blocks(work)
    parts = {
        "packed": (work["P"], "uint8"),
        "absmax": (count, "uint8"),
        "code": (16, "float32"),
        "absmax2": (-(-count // SUPER), "float32"),
        "code2": (256, "float32"),
        "offset": (1, "float32"),
    }
    return {name: _Part(tensor, name, (n,), dtype) for name, (n, dtype) in parts.items()}


def outputs(work: Workload) -> dict[str, Array]:
    return {"w": Array((2 * work["P"],), "float16")}


def oracle(
    ar: Arithmetic, work: Workload, packed: np.ndarray, absmax: np.ndarray, code: np.ndarray,
    absmax2: np.ndarray, code2: np.ndarray, offset: np.ndarray,
) -> tuple:  # fmt: skip
    state = formats.Nf4State(absmax, absmax2, offset.reshape(()), code2)
    return (ar.lift(formats.nf4_dequantize(packed, state, 2 * work["P"])),)


PROBLEM = problem("q09", CASES, inputs, outputs, oracle)
