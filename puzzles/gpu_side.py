"""The learner's code on a GPU: the same cases compiled, and the race against the baseline.

What the interpreters see of a call (guard bands, traffic) was seen before; here unwritten memory is
NaN, and launches and inputs are watched. Inputs of a race are torch tensors on the device, which
Pallas reads at the same addresses.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from types import ModuleType
from typing import Any

import numpy as np
import torch

from parity import bench, device, frameworks
from parity.frameworks import ceilings, tracer
from parity.frameworks import torch as torch_twin
from parity.judge import judge, judge_exact
from parity.spec import NUMPY_DTYPES
from puzzles import speed
from puzzles.grade import is_near
from puzzles.puzzle import Puzzle
from puzzles.seen import POISON, Seen

DEVICE = "cuda"


class Side:
    """One language, with the names that puzzles.triton_side and puzzles.pallas_side offer."""

    def __init__(self, backend: str, interpreted: ModuleType) -> None:
        self.twin = frameworks.twin(backend)
        self.watching = interpreted.watching
        self.backend, self._interpreted = backend, interpreted

    def call(
        self,
        solve: Callable[..., Any],
        arrays: Mapping[str, np.ndarray],
        options: Mapping[str, Any],
        glue: Sequence[str],
    ) -> tuple[tuple[np.ndarray, ...], Seen]:
        """The outputs of one compiled call, and what was seen of it."""
        from parity.frameworks import triton_interpreter

        args = [self._on_device(x) for x in arrays.values()]
        with triton_interpreter.launches() as launched:
            out = self.twin.outputs_of(self.twin.run(solve, args, options))
        count = len(launched)
        if self.backend == "pallas":
            count = self.twin.launched(solve, args, options)
        changed = [
            name
            for name, x in zip(arrays, args, strict=True)
            if _host(x).tobytes() != arrays[name].tobytes()
        ]
        inputs = sum(x.nbytes for x in arrays.values())
        return tuple(_host(x) for x in out), Seen(
            launches=count, inputs=inputs, changed=changed, any_nan=True
        )

    def ghost(
        self,
        solve: Callable[..., Any],
        arrays: Mapping[str, np.ndarray],
        options: Mapping[str, Any],
    ) -> tuple[np.ndarray, ...]:
        """What solve returns when its kernels do nothing."""
        if self.backend == "pallas":
            return self._interpreted.ghost(solve, arrays, options)
        from parity.frameworks import triton_interpreter

        args = [self._on_device(x.copy()) for x in arrays.values()]
        with triton_interpreter.launches(ghost=True):
            out = self.twin.outputs_of(self.twin.run(solve, args, options))
        return tuple(_host(x) for x in out)

    def runner(self, solve: Callable[..., Any], options: Mapping[str, Any]) -> speed.Runner:
        """A contender whose draws are (inputs, what the baseline takes)."""
        kind: type = torch.Tensor
        if self.backend == "pallas":
            import jax

            solve, kind = jax.jit(solve, static_argnames=tuple(options)), jax.Array

        def take(drawn: tuple[Sequence[Any], Sequence[Any]]) -> tuple[Any, ...]:
            return tuple(self.twin.native(x) for x in drawn[0])

        def outputs_of(out: Any) -> tuple[Any, ...]:
            found = self.twin.outputs_of(out)
            for x in found:  # a subclass of a tensor could do its work when it is looked at
                if not isinstance(x, kind) or (kind is torch.Tensor and type(x) is not kind):
                    raise TypeError(f"solve returned a {type(x).__name__}")
            return tuple(self.twin.harness(x) for x in found)

        return speed.Runner(lambda *args: solve(*args, **options), take, outputs_of)

    def spoil(self, sizes: Sequence[int]) -> None:
        """The pool from which the next outputs of these sizes come holds what is no answer."""
        shapes = [max(1, n // 2) for n in sizes]
        if self.backend == "triton":
            held = [torch.full((n,), POISON[2], dtype=torch.int16, device=DEVICE) for n in shapes]
        else:
            import jax

            held = [jax.numpy.full((n,), POISON[2], "int16") for n in shapes]
        tracer.wait_for(held)

    def _on_device(self, x: np.ndarray) -> Any:
        found = self.twin.native(x)
        return found.cuda() if isinstance(found, torch.Tensor) else found


def _host(x: Any) -> np.ndarray:
    return x.cpu().numpy() if isinstance(x, torch.Tensor) else np.array(x)


def race(
    puzzle: Puzzle,
    solves: Mapping[str, tuple[Side, Callable[..., Any]]],
    seed: int,
    rounds: int = speed.ROUNDS,
) -> dict[str, Any]:
    """Races solutions against the puzzle's baseline -> the fields of speed.Raced.

    solves: name -> (its language, its solve). Raises NothingSeen where there is no GPU.
    """
    tracer.needs_gpu()
    case, of = puzzle.spec.SPEED, puzzle.baseline
    generator = torch.Generator(device=DEVICE).manual_seed(seed)

    def draw() -> tuple[Sequence[Any], Sequence[Any]]:
        inputs = of.draw(case, generator)
        return inputs, of.prepared(*inputs)

    runners = {
        speed.BASELINE: speed.Runner(of.baseline, lambda drawn: tuple(drawn[1])),
        **{name: side.runner(solve, case.options) for name, (side, solve) in solves.items()},
    }
    for runner in runners.values():  # compile
        runner.begin([draw()])
        tracer.wait_for(runner())
        runner.begin(())

    shapes = puzzle.problem.outputs(case).values()
    sizes = [math.prod(s.shape) * NUMPY_DTYPES[s.dtype].itemsize for s in shapes]

    sides = [side for side, _ in solves.values()]
    many = (2 * speed.ROUNDS_A_SESSION + 1) * len(sides)

    def poison() -> None:
        for side in {side.backend: side for side in sides}.values():
            side.spoil(many * sizes)

    moved = float(of.least_bytes(case))
    ways = {"copy": ceilings.copy, "negate": ceilings.negate, "read": ceilings.read}
    beside = {name: way(moved) for name, way in ways.items()}
    timings, bad = speed.race(
        runners,
        {name: call for name, (call, _) in beside.items()},
        draw,
        lambda drawn, outputs: mistake(puzzle, drawn[0], outputs),
        tracer.cold,
        rounds=rounds,
        poison=poison,
        fingerprint=lambda drawn: [torch_twin.fingerprint(x) for x in drawn[0]],
    )
    best = {name: amount / timings[name].best_us / 1e3 for name, (_, amount) in beside.items()}
    facts = device.facts()
    return asdict(
        speed.Raced(
            device=facts["name"],
            samples={name: [s.span_us for s in timings[name].samples] for name in runners},
            bad=bad,
            bytes=moved,
            ceilings={
                "copy_gbps": max(best["copy"], best["negate"]), "read_gbps": best["read"]
            },
            baseline=of.NAME,
            versions=bench.versions(facts),
        )
    )  # fmt: skip


def _folded(shape: tuple[int, ...]) -> tuple[int, ...]:
    wide = 4096
    return shape if len(shape) != 1 or shape[0] % wide else (shape[0] // wide, wide)


def _fold(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(_folded(tuple(x.shape)))


def mistake(puzzle: Puzzle, inputs: Sequence[Any], outputs: tuple[Any, ...]) -> str:
    """What is wrong with an answer at the size that is timed, by the rules of every other case."""
    case, of = puzzle.spec.SPEED, puzzle.baseline
    specs = puzzle.problem.outputs(case)
    if len(outputs) != len(specs):
        return f"{len(outputs)} arrays instead of {len(specs)}"
    truth, model = (of.answer(dtype, *inputs) for dtype in (torch.float64, torch.float32))
    for (name, spec), *three in zip(specs.items(), outputs, truth, model, strict=True):
        if three[0].shape == spec.shape:  # a flat tensor is judged in tiles of rows too
            spec, three = replace(spec, shape=_folded(spec.shape)), [_fold(x) for x in three]
        y, r, m = three
        if name in puzzle.exact:
            if tuple(y.shape) == spec.shape and is_near(y, r):
                r = y  # its dtype may still be wrong
            found = judge_exact(name, y, r.double().round(), spec)
        else:
            terms = puzzle.problem.reduction(case, name)
            found = judge(name, y, r, m, spec, family=puzzle.problem.family, terms=terms)
        if not found.ok:
            return found.detail.replace(" on whole numbers", "").replace(" exactly", "")
    return ""
