"""Speed tiers on a GPU that is made up: who is timed on what, what is caught, what a time is worth.

The fake device knows what tracer.cold knows: which call ran which kernels, on whatever stream.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from parity.commands.shared import Stop
from parity.frameworks import load_target, tracer
from parity.spec import NUMPY_DTYPES
from parity.timing import Kernel
from puzzles import author, child, gpu_side, speed, triton_side
from puzzles import grade as grading
from puzzles.cli import main
from puzzles.grade import Result, judged
from puzzles.process import Child
from puzzles.puzzle import HOME, Limits, Puzzle, load, track
from puzzles.speed import BASELINE, YOURS, Raced, Runner, bound, race, ratios

N = 64
RACED = [p for p in track() if p.points.speed]


class Device:
    """Memory and a clock. Kernels take microseconds; some wait for the next synchronization."""

    def __init__(self) -> None:
        self.kernels: list[Kernel] = []
        self.pending: list[Callable[[], None]] = []
        self.rng = np.random.default_rng(0)
        self.inputs = [np.empty(N) for _ in range(8)]  # the same addresses in every session
        self.pool = np.zeros(N)
        self.now = 0.0

    def kernel(self, us: float) -> None:
        self.kernels.append(Kernel("k", self.now, self.now + us))
        self.now += us

    def draw(self) -> tuple[np.ndarray]:
        x = self.inputs.pop(0)
        self.inputs.append(x)
        x[:] = self.rng.standard_normal(N)
        return (x,)

    def trace(self, calls: Sequence[Callable[[], Any]]) -> list[list[Kernel]]:
        for call in {id(call): call for call in calls}.values():
            self.run(call)
        return [self.run(call) for call in calls]

    def run(self, call: Callable[[], Any]) -> list[Kernel]:
        self.kernels = []
        call()
        while self.pending:
            self.pending.pop()()
        return self.kernels

    def poison(self) -> None:
        self.pool[:] = np.nan


def doubled(drawn: tuple[np.ndarray], outputs: tuple[np.ndarray, ...]) -> str:
    return "" if np.array_equal(outputs[0], 2 * drawn[0]) else "not twice the input"


def raced(solve: Callable[[Device, np.ndarray], Any], us: float = 100.0) -> Raced:
    """A race of `solve` against a baseline that takes `us`."""
    device = Device()

    def baseline(x: np.ndarray) -> tuple[np.ndarray]:
        device.kernel(us)
        return (2 * x,)

    runners = {BASELINE: Runner(baseline), YOURS: Runner(lambda x: (solve(device, x),))}
    timings, bad = race(
        runners, {}, device.draw, doubled, device.trace, rounds=12, poison=device.poison,
        fingerprint=lambda drawn: drawn[0].tobytes(),
    )  # fmt: skip
    samples = {name: [s.span_us for s in timings[name].samples] for name in runners}
    return Raced("a GPU", samples, bad, 1e8, {"copy_gbps": 4000.0, "read_gbps": 4500.0}, "twice")


def honest(device: Device, x: np.ndarray) -> np.ndarray:
    device.kernel(40.0)
    return 2 * x


def test_an_honest_solution_is_timed_on_every_call():
    found = raced(honest)
    assert not found.bad
    assert found.samples == {BASELINE: [100.0] * 24, YOURS: [40.0] * 24}
    told = found.speed(YOURS, (1.0, 2.0, 3.0))
    assert (told.state, told.tier, told.ratio, told.low) == ("timed", 2, 2.5, 2.5)
    assert told.points(6) == 4.0
    assert told.roof == pytest.approx(25 / 40)


# Cheats that only speed invites


def by_pointer() -> Callable[[Device, np.ndarray], np.ndarray]:
    kept: dict[int, np.ndarray] = {}

    def solve(device: Device, x: np.ndarray) -> np.ndarray:
        if x.ctypes.data not in kept:
            kept[x.ctypes.data] = honest(device, x)
        device.kernel(30.0)
        return kept[x.ctypes.data]

    return solve


def previous() -> Callable[[Device, np.ndarray], np.ndarray]:
    last: list[np.ndarray] = []

    def solve(device: Device, x: np.ndarray) -> np.ndarray:
        device.kernel(30.0)
        last[:] = last or [2 * x]
        return last[0]

    return solve


def unwritten(device: Device, x: np.ndarray) -> np.ndarray:
    """Returns memory in which the right answer was left by somebody else."""
    device.kernel(30.0)
    return device.pool.copy()


def zeroes_its_input(device: Device, x: np.ndarray) -> np.ndarray:
    """Makes the question fit the answer."""
    device.kernel(30.0)
    x[:] = 0
    return np.zeros(N)


def overwritten() -> Callable[[Device, np.ndarray], np.ndarray]:
    out = np.empty(N)

    def solve(device: Device, x: np.ndarray) -> np.ndarray:
        device.kernel(30.0)
        out[:] = 2 * x
        return out  # the same memory for every answer

    return solve


def during_the_warm_up() -> Callable[[Device, np.ndarray], np.ndarray]:
    answers: list[np.ndarray] = []

    def solve(device: Device, x: np.ndarray) -> np.ndarray:
        if not answers:  # nobody has started the clock yet
            answers.extend(2 * y for y in device.inputs)
        device.kernel(30.0)
        return answers.pop() if len(answers) > 1 else answers[0]

    return solve


CHEATS = {
    "caches by pointer": by_pointer(),
    "returns the previous answer": previous(),
    "leaves its output unwritten": unwritten,
    "writes to its input": zeroes_its_input,
    "one output for all": overwritten(),
    "works before the clock runs": during_the_warm_up(),
}


@pytest.mark.parametrize("name", CHEATS)
def test_an_answer_given_while_the_clock_ran_is_checked(name: str):
    found = raced(CHEATS[name])
    assert YOURS in found.bad
    assert found.speed(YOURS, (1.0,)).state == "wrong"


def test_work_on_another_stream_counts():
    def solve(device: Device, x: np.ndarray) -> np.ndarray:
        device.kernel(1.0)
        out = np.full(N, np.nan)

        def later() -> None:
            device.kernel(39.0)
            out[:] = 2 * x

        device.pending.append(later)
        return out

    found = raced(solve)
    assert not found.bad
    assert found.speed(YOURS, (1.0,)).us == 40.0


def test_a_patched_timer_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("time.perf_counter", lambda: 0.0)
    monkeypatch.setattr("time.monotonic", lambda: 0.0)
    assert raced(honest).speed(YOURS, (2.4, 2.6)).tier == 1


@pytest.mark.parametrize(
    "name", ["torch.round", "torch.cuda.synchronize", "puzzles.speed.race", "time.perf_counter"]
)
def test_who_replaces_what_the_race_uses_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch):
    before = child._functions()
    assert not child._replaced(before)
    monkeypatch.setattr(name, lambda *args, **options: None)
    assert child._replaced(before) == name


def test_a_lazy_tensor_is_no_answer():
    class Lazy(torch.Tensor):
        pass

    runner = gpu_side.Side("triton", triton_side).runner(lambda x: x, {})
    with pytest.raises(TypeError, match="Lazy"):
        runner.outputs_of(torch.zeros(2).as_subclass(Lazy))


# What a time is worth


def test_the_bound_is_below_the_median_as_often_as_it_says():
    rng = np.random.default_rng(0)
    draws = rng.lognormal(size=(2000, speed.ROUNDS))
    below = np.mean([bound(list(row)) <= 1.0 for row in draws])
    assert speed.SURE <= below < 0.99
    with pytest.raises(ValueError, match="too few"):
        bound([1.0, 2.0, 3.0])


def test_ratios_are_taken_round_by_round():
    assert ratios([10.0, 30.0, 8.0, 8.0], [10.0, 10.0, 4.0, 4.0]) == [2.0, 2.0]


def made_up(mine: Sequence[float], baseline: Sequence[float], **more: Any) -> Raced:
    samples = {YOURS: [*mine], BASELINE: [*baseline]}
    raced = Raced("a GPU", samples, {}, 1e8, {"copy_gbps": 4000.0, "read_gbps": 4500.0}, "b")
    return replace(raced, **more)


def test_a_tier_needs_the_bound_not_the_median():
    rng = np.random.default_rng(1)
    mine = 50 + 6 * rng.random(2 * speed.ROUNDS)
    found = made_up(mine.tolist(), [100.0] * len(mine))
    told = found.speed(YOURS, (1.0, 2.0))
    between = (told.low + told.ratio) / 2
    assert told.low < told.ratio
    assert found.speed(YOURS, (1.0, between)).tier == 1
    assert found.speed(YOURS, (1.0, told.low)).tier == 2


def test_nothing_is_faster_than_memory():
    # 100 MB at 4500 GB/s are 22.2 us, and 5 % are the ruler's
    many = [100.0] * 24
    assert made_up([22.0] * 24, many).speed(YOURS, (1.0,)).state == "timed"
    told = made_up([22.0] * 23 + [21.0], many).speed(YOURS, (1.0,))
    assert (told.state, told.tier) == ("impossible", 0)
    assert "21.0 us" in told.detail


def test_a_restless_machine_awards_nothing_and_fails_nobody():
    told = made_up([40.0] * 24, [100.0, 120.0] * 12).speed(YOURS, (1.0,))
    assert (told.state, told.tier, told.points(6)) == ("noisy", 0, 0.0)


def test_an_unknown_gpu_awards_nothing():
    told = made_up([40.0] * 24, [100.0] * 24).speed(YOURS, None)
    assert (told.state, told.points(6)) == ("uncalibrated", 0.0)
    assert json.loads(json.dumps(told.to_json()))["ratio"] == 2.5


def test_thresholds_are_kept_by_gpu_and_version(tmp_path: Path):
    samples = {BASELINE: [100.0] * 24, "triton": [29.0] * 24, "slow_triton": [60.0] * 24}
    first = made_up([], [], samples=samples)
    row = speed.keep(tmp_path, 1, first, {"commit": "abc", "when": "now"})
    assert row["tiers"] == {"triton": (1.7, 2.5, 3.1)}
    assert row["measured"]["slow_triton"]["ratio"] == 1.667
    speed.keep(tmp_path, 1, replace(first, device="another"), {"commit": "abc", "when": "now"})
    assert speed.thresholds(tmp_path, 1, "a GPU", "triton") == (1.7, 2.5, 3.1)
    assert speed.thresholds(tmp_path, 1, "another", "triton") == (1.7, 2.5, 3.1)
    assert speed.thresholds(tmp_path, 1, "a third", "triton") is None
    assert speed.thresholds(tmp_path, 2, "a GPU", "triton") is None
    assert speed.thresholds(tmp_path / "nowhere", 1, "a GPU", "triton") is None


def test_a_solution_slower_than_the_baseline_makes_no_tiers():
    samples = {BASELINE: [100.0] * 24, "triton": [95.0] * 24}
    with pytest.raises(ValueError, match="no room"):
        speed.tiers_of(made_up([], [], samples=samples), "triton")


def test_a_solution_a_third_faster_than_the_baseline_spreads_its_tiers_from_there():
    samples = {BASELINE: [133.0] * 24, "triton": [100.0] * 24}
    assert speed.tiers_of(made_up([], [], samples=samples), "triton") == (1.0, 1.05, 1.15)


# What the puzzles say of their speed


@pytest.mark.parametrize("puzzle", RACED, ids=lambda p: p.id)
def test_a_baseline_answers_what_the_oracle_answers(puzzle: Puzzle):
    of = puzzle.baseline
    for number, case in enumerate(puzzle.cases(np.random.default_rng(0))):
        rng = np.random.default_rng(number)
        arrays = {n: d.draw(rng) for n, d in puzzle.problem.inputs(case).items()}
        inputs = [torch.from_numpy(x) for x in arrays.values()]
        outputs = [x.numpy() for x in of.baseline(*of.prepared(*inputs))]
        assert judged(puzzle, case, arrays, outputs).bad is None
        here = replace(puzzle.spec.SPEED, sizes=case.sizes)
        puzzle.spec.SPEED, timed = here, puzzle.spec.SPEED
        try:
            answered = tuple(torch.from_numpy(x) for x in outputs)
            assert gpu_side.mistake(puzzle, inputs, answered) == ""
            spoiled = tuple(x + (x == x.max()) * (1 + x.abs().max()) for x in answered)
            assert gpu_side.mistake(puzzle, inputs, spoiled)
        finally:
            puzzle.spec.SPEED = timed


@pytest.mark.parametrize(
    ("name", "content"), [("q01", "ties"), ("q02", "ties"), ("q03", "halves"), ("q08", "ties")]
)
def test_compiled_code_may_take_a_tie_either_way_and_no_more(name: str, content: str):
    puzzle = load(HOME / name)
    case = next(c for c in puzzle.cases(np.random.default_rng(0)) if c.tags[0] == content)
    arrays = {n: d.draw(np.random.default_rng(0)) for n, d in puzzle.problem.inputs(case).items()}
    specs = puzzle.problem.outputs(case)
    found = judged(puzzle, case, arrays, [np.zeros(s.shape, s.dtype) for s in specs.values()])
    right = {n: r.astype(s.dtype) for (n, s), r in zip(specs.items(), found.truth, strict=True)}
    assert right["q"].size

    def is_right(compiled: bool, **other: np.ndarray) -> bool:
        outputs = [other.get(n, x) for n, x in right.items()]
        assert all(x.dtype == right[n].dtype for n, x in other.items())
        return judged(puzzle, case, arrays, outputs, compiled=compiled).bad is None

    q, exact = right["q"], puzzle.unrounded(case, arrays, right)["q"]
    tie = np.abs(exact - np.trunc(exact)) == 0.5
    assert tie.any() and not tie.all()
    across = np.where(tie, np.floor(exact) + np.ceil(exact) - q, q).astype(q.dtype)
    beside = q.copy()
    beside.flat[np.flatnonzero(~tie)[-1]] ^= 1
    assert is_right(False) and is_right(True)
    assert not is_right(False, q=across) and is_right(True, q=across)
    assert not is_right(True, q=beside)
    if name == "q03":  # a zero point that was rounded the other way takes its codes along
        assert (right["zero"] == 128).all()
        zero = right["zero"] - 1
        low = np.rint(puzzle.unrounded(case, arrays, {"zero": zero})["q"]).astype(q.dtype)
        assert not is_right(True, zero=zero)
        assert is_right(True, zero=zero, q=low) and not is_right(False, zero=zero, q=low)


def test_codes_of_another_dtype_are_no_near_miss():
    puzzle = load(HOME / "q08")
    case = puzzle.problem.workloads[0]
    arrays = {n: d.draw(np.random.default_rng(0)) for n, d in puzzle.problem.inputs(case).items()}
    q, scale = (x.numpy() for x in puzzle.baseline.baseline(torch.from_numpy(arrays["x"])))
    bad = judged(puzzle, case, arrays, [q.astype(np.float32), scale], compiled=True).bad
    assert bad is not None and bad.reason == "dtype"


@pytest.mark.parametrize("puzzle", RACED, ids=lambda p: p.id)
def test_a_baseline_draws_what_the_puzzle_asks_for(puzzle: Puzzle):
    case = puzzle.problem.workloads[1]
    drawn = puzzle.baseline.draw(case, torch.Generator().manual_seed(0))
    for x, described in zip(drawn, puzzle.problem.inputs(case).values(), strict=True):
        assert (tuple(x.shape), x.numpy().dtype.name) == (described.shape, described.dtype)
    moved = [(d.shape, d.dtype) for d in puzzle.problem.inputs(case).values()]
    moved += [(a.shape, a.dtype) for a in puzzle.problem.outputs(case).values()]
    every = sum(int(np.prod(s)) * NUMPY_DTYPES[d].itemsize for s, d in moved)
    assert 0 < puzzle.baseline.least_bytes(case) <= every


@pytest.mark.parametrize("puzzle", RACED, ids=lambda p: p.id)
def test_committed_tiers_rise_and_say_where_they_are_from(puzzle: Puzzle):
    if not (puzzle.folder / "speed.json").is_file():
        pytest.skip("no GPU has been calibrated for it yet")
    found = json.loads((puzzle.folder / "speed.json").read_text())
    assert found["version"] == puzzle.version
    for row in found["devices"].values():
        assert row["tiers"] and {*row["tiers"]} <= {*puzzle.backends}
        for backend, tiers in row["tiers"].items():
            measured = row["measured"]
            assert 1.0 <= tiers[0] < tiers[1] < tiers[2] <= measured[backend]["low"]
            assert measured[f"slow_{backend}"]["low"] < tiers[-1]
        assert row["commit"] and row["when"] and row["versions"]["torch"] and row["how"]


def test_what_is_slow_is_right():
    with Child("triton", RACED[0].limits) as process:  # in Pallas: `make puzzles`
        gates = [author.slow_gate(puzzle, "triton", process) for puzzle in RACED]
    assert not [gate for gate in gates if not gate.ok]


# The child's half and the parent's, where a GPU would be


@pytest.mark.parametrize("backend", ["triton", "pallas"])
def test_a_whole_race_on_a_device_that_is_made_up(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Everything but the GPU: kernels run in the interpreters, and times are told."""
    puzzle = load(HOME / "q08")
    puzzle.spec.SPEED = replace(puzzle.spec.SPEED, sizes={"M": 3, "K": 1100})

    def told(call: Callable[[], Any]) -> float:
        solve = getattr(call, "solve", None)
        call()
        return 10.0 if solve is None else 100.0 if solve is puzzle.baseline.baseline else 50.0

    def cold(calls: Sequence[Callable[[], Any]]) -> list[list[Kernel]]:
        for call in {id(call): call for call in calls}.values():
            call()
        return [[Kernel("k", 0.0, told(call))] for call in calls]

    for name in ("copy", "negate", "read"):
        monkeypatch.setattr(gpu_side.ceilings, name, lambda moved: (lambda: None, moved))
    monkeypatch.setattr(gpu_side, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_side.tracer, "needs_gpu", lambda: None)
    monkeypatch.setattr(gpu_side.tracer, "wait_for", lambda out: None)
    monkeypatch.setattr(gpu_side.tracer, "cold", cold)
    monkeypatch.setattr(gpu_side.torch_twin, "fingerprint", lambda x: x.sum().item())
    monkeypatch.setattr(gpu_side.device, "facts", lambda: {"name": "a GPU", "driver": "1"})
    side = child._side(backend, True)
    tensor = {"triton": lambda x: x, "pallas": lambda x: torch.from_numpy(np.array(x))}[backend]
    monkeypatch.setattr(side.twin, "harness", tensor)
    truncates = next(m for m in puzzle.mutants if m.name == "truncates")
    solves = {}
    for name, source in (
        ("right", puzzle.solution(backend)),
        ("wrong", truncates.source(puzzle, backend)),
    ):
        (tmp_path / f"{name}.py").write_text(source)
        solves[name] = side, load_target(f"{tmp_path / name}.py:solve")[0]
    found = Raced(**json.loads(json.dumps(gpu_side.race(puzzle, solves, 7, rounds=6))))
    assert [*found.bad] == ["wrong"] and "q" in found.bad["wrong"], found.bad
    assert found.samples["right"] == [50.0] * 12 and found.samples[BASELINE] == [100.0] * 12
    assert found.speed("right", (1.5, 2.5)).tier == 1
    assert found.versions["torch"] and found.bytes == 3 * (3 * 1100 + 4)


def test_the_ruler_calls_each_once_before_the_clock_runs(monkeypatch: pytest.MonkeyPatch):
    """As many draws as a race makes: a tracer that called more often would run out of them."""
    seen: list[Kernel] = []
    order: list[str] = []

    def flush() -> None:
        seen.append(Kernel("flush", 10.0 * len(seen), 10.0 * len(seen) + 1))

    @contextlib.contextmanager
    def session() -> Iterator[list[Kernel]]:
        yield seen

    def runner(name: str) -> Runner:
        def solve() -> str:
            order.append(name)
            seen.append(Kernel(name, 10.0 * len(seen), 10.0 * len(seen) + 5))
            return name

        return Runner(solve)

    flush.kernel = "flush"  # pyright: ignore[reportFunctionMemberAccess]
    a, b = runner("a"), runner("b")
    for made in (a, b):
        made.begin([()] * 3)
    monkeypatch.setattr(tracer, "needs_gpu", lambda: None)
    monkeypatch.setattr(tracer, "wait_for", lambda out: None)
    monkeypatch.setattr(tracer, "_session", session)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tracer, "_flush_for", lambda out, device: seen.clear() or flush)
    found = tracer.cold([a, b, b, a])
    assert order == [*"ab", *"abba"]
    assert [[k.name for k in kernels] for kernels in found] == [[x] for x in "abba"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_a_race_without_a_gpu_says_so():
    puzzle = load(HOME / "q08")
    with Child("triton", puzzle.limits, gpu=True) as process:
        answer = process.race("q08", {YOURS: ("triton", puzzle.solution("triton"))}, 1)
    assert not answer["ok"] and answer["unable"] and "no CUDA device" in answer["detail"]


class Elsewhere:
    """A child process on a machine with a GPU: it tells the same times to everybody."""

    us: Mapping[str, float] = {}
    bad: Mapping[str, str] = {}

    def __init__(self, backend: str, limits: Limits, *, gpu: bool) -> None:
        assert gpu

    def __enter__(self) -> "Elsewhere":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def race(self, puzzle: str, solves: Mapping[str, tuple[str, str]], seed: int) -> dict[str, Any]:
        samples = {name: [self.us[name]] * 2 * speed.ROUNDS for name in [BASELINE, *solves]}
        raced = replace(made_up([], []), samples=samples, bad=self.bad, versions={"torch": "1"})
        return {"ok": True, "raced": asdict(raced)}


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Puzzle:
    """Q08 in a folder of its own, raced where there is a GPU."""
    folder = tmp_path / "q08"
    shutil.copytree(HOME / "q08", folder, ignore=shutil.ignore_patterns("speed.json"))
    for module in (grading, author):
        monkeypatch.setattr(module, "Child", Elsewhere)
    us = {BASELINE: 100.0, "triton": 40.0, "pallas": 50.0, YOURS: 42.0}
    monkeypatch.setattr(Elsewhere, "us", {**us, "slow_triton": 90.0, "slow_pallas": 70.0})
    return load(folder)


PASSED = Result("q08", 1, "triton", "1", "a", "pass", "", (), points={"correctness": 10.0})


def test_calibrated_tiers_are_awarded(elsewhere: Puzzle, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(grading, "grade", lambda *args, **options: PASSED)
    found = grading.timed(elsewhere, "triton", "", PASSED)
    assert found.ok and found.speed and found.speed.state == "uncalibrated"
    row = author.calibrated(elsewhere, {"commit": "abc", "when": "now"})
    assert row["tiers"] == {"triton": (1.2, 1.8, 2.2), "pallas": (1.0, 1.5, 1.8)}
    assert row["commit"] == "abc" and row["versions"] == {"torch": "1"}
    found = grading.timed(elsewhere, "triton", "", PASSED)
    assert found.ok and found.speed and found.speed.tier == 3 and found.points["speed"] == 4.0
    monkeypatch.setattr(Elsewhere, "bad", {YOURS: "q[0, 0] is 1, expected 2"})
    found = grading.timed(elsewhere, "triton", "", PASSED)
    assert (found.verdict, found.points["speed"]) == ("wrong_on_gpu", 0.0)
    assert "while the clock ran" in found.detail


def test_an_address_that_no_interpreter_minds_is_explained():
    error = RuntimeError("INTERNAL: CUDA error: CUDA_ERROR_MISALIGNED_ADDRESS")
    assert "multiple of 128 bytes" in child._failed(error, {"do": "call"})["detail"]


def test_wrong_when_compiled_is_a_verdict(elsewhere: Puzzle, monkeypatch: pytest.MonkeyPatch):
    wrong = replace(PASSED, verdict="wrong_value", detail="3 elements (case one)")
    monkeypatch.setattr(grading, "grade", lambda *args, **options: wrong)
    found = grading.timed(elsewhere, "triton", "", PASSED)
    assert (found.verdict, found.detail) == ("wrong_on_gpu", "3 elements (case one)")
    assert grading.timed(elsewhere, "triton", "", wrong) is wrong
    locked = grading.timed(elsewhere, "triton", "", PASSED, why_not="it needs a GPU").speed
    assert locked and locked.state == "locked"


@pytest.mark.parametrize(("unable", "verdict"), [(True, "pass"), (False, "wrong_on_gpu")])
def test_a_machine_that_cannot_time_fails_nobody(
    unable: bool, verdict: str, elsewhere: Puzzle, monkeypatch: pytest.MonkeyPatch
):
    answer = {"ok": False, "detail": "no kernel was seen", "unable": unable}
    monkeypatch.setattr(grading, "grade", lambda *args, **options: PASSED)
    monkeypatch.setattr(Elsewhere, "race", lambda *args: answer)
    found = grading.timed(elsewhere, "triton", "", PASSED)
    assert found.verdict == verdict
    assert (found.speed is not None and found.speed.state == "locked") == unable


@pytest.mark.parametrize(
    ("us", "bad", "says"),
    [({"slow_triton": 44.0}, {}, "slow_triton reaches the top tier"),
     ({"pallas": 20.0}, {}, "pallas: impossible"), ({"pallas": 99.0}, {}, "no room"),
     ({}, {"triton": "q is wrong"}, "triton: wrong")],
)  # fmt: skip
def test_tiers_that_tell_nothing_are_not_written(
    us: dict[str, float], bad: dict[str, str], says: str, elsewhere: Puzzle,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr(Elsewhere, "us", {**Elsewhere.us, **us})
    monkeypatch.setattr(Elsewhere, "bad", bad)
    with pytest.raises(Stop, match=says):
        author.calibrated(elsewhere, {})
    assert not (elsewhere.folder / "speed.json").exists()


def test_without_a_gpu_speed_is_locked_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("puzzles.commands.why_not_timed", lambda backend: "it needs a GPU")
    file = tmp_path / "mine.py"
    file.write_text(load(HOME / "q08").solution("triton"))
    argv = ["check", "q08", "-b", "triton", "--file", str(file)]
    assert main(argv) == 0
    assert "locked: it needs a GPU; nothing is lost" in capsys.readouterr().out
    assert main([*argv, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["speed"]["state"] == "locked" and told["points"]["speed"] == 0.0
    assert main(["list", "--json"]) == 0
    row = next(r for r in json.loads(capsys.readouterr().out)["puzzles"] if r["id"] == "q08")
    assert (row["best"], row["within_reach"], row["all"]) == (14, 14, 18)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiled puzzles want a GPU")
@pytest.mark.timeout(600)
def test_solutions_compiled_and_cheats_in_a_real_race():
    folder = Path(__file__).parent
    cpu_mode = ("TRITON_INTERPRET", "JAX_PLATFORMS")
    env = {k: v for k, v in os.environ.items() if k not in cpu_mode}
    done = subprocess.run(
        [sys.executable, str(folder / "puzzles_on_gpu.py")],
        env=env | {"PYTHONPATH": str(folder.parent)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    seen = json.loads(done.stdout.splitlines()[-1])
    assert {*seen["solutions"].values()} == {"pass"}, seen["solutions"]
    cheats = seen["cheats"]
    (honest, fair), (beside, ratio) = (cheats.pop(name) for name in ("honest", "side_stream"))
    assert honest == beside == "timed" and ratio < 1.1 * fair  # on any stream all its time counts
    assert "timed" not in {state for state, _ in cheats.values()}
