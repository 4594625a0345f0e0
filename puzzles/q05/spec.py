"""Q05: a running sum in bfloat16 that is rounded at random, by numbers everybody can draw again."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from parity.spec import Arithmetic, Array, Workload
from puzzles.inputs import Numbers
from puzzles.puzzle import primes
from puzzles.spec import case, problem

CASES = (
    case("eight", {"T": 8, "N": 1}, content="stall", seed=7),
    case("two_trips", {"T": 3, "N": 300}, seed=11),
    case("zeros", {"T": 5, "N": 6}, content="zeros", seed=3),
)
EXACT = ("total",)


@dataclass(frozen=True)
class Stall:
    """4, and then many a hundredth: less than half a step of bfloat16 at 4."""

    shape: tuple[int, ...]

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        x = np.full(self.shape, 0.01, np.float32)
        x[0] = 4
        return x


def fresh(rng: np.random.Generator) -> list[Workload]:
    steps, columns = primes(rng, 5, 30), primes(rng, 41, 260)
    seeds = (int(s) for s in rng.integers(1 << 16, 1 << 31, 6))
    return [
        case("one", {"T": 1, "N": 2}, seed=next(seeds)),
        case("long", {"T": 2 * next(steps), "N": 7}, seed=next(seeds)),
        case("stall", {"T": next(steps), "N": next(columns)}, content="stall", seed=next(seeds)),
        case("wide", {"T": next(steps), "N": next(columns)}, seed=next(seeds)),
        case("positive", {"T": next(steps), "N": next(columns)}, content="positive",
             seed=next(seeds)),
        case("columns", {"T": next(steps), "N": next(columns)}, content="columns",
             seed=next(seeds)),
    ]  # fmt: skip


def philox(seed: int, counter: np.ndarray) -> np.ndarray:
    """The first word of Philox4x32-10 at counters (c, 0, 0, 0), uint32: tl.randint(seed, c).

    Source: Salmon, Moraes, Dror and Shaw, Parallel Random Numbers: As Easy as 1, 2, 3, 2011.
    """
    low = np.uint64(0xFFFFFFFF)
    c = [counter.astype(np.uint64), *np.zeros((3, *counter.shape), np.uint64)]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(b >> np.uint64(32)) ^ c[1] ^ np.uint64(key[0]), b & low,
             (a >> np.uint64(32)) ^ c[3] ^ np.uint64(key[1]), a & low]  # fmt: skip
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[0].astype(np.uint32)


def inputs(work: Workload) -> dict[str, Any]:
    shape, content = (work["T"], work["N"]), work.tags[0]
    return {"x": Stall(shape) if content == "stall" else Numbers(shape, content)}


def outputs(work: Workload) -> dict[str, Array]:
    return {"total": Array((work["N"],), "float32")}


def oracle(ar: Arithmetic, work: Workload, x: np.ndarray) -> tuple:
    T, N = x.shape
    total = np.zeros(N, np.float32)
    for t in range(T):
        drawn = philox(work.options["seed"], t * N + np.arange(N)) & np.uint32(0xFFFF)
        bits = (total + x[t]).view(np.uint32) + drawn
        total = (bits & np.uint32(0xFFFF0000)).view(np.float32)
    return (total,)


PROBLEM = problem("q05", CASES, inputs, outputs, oracle)
