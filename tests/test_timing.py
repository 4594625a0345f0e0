"""The ruler on a fake clock and a fake trace: no GPU is timed here, only the arithmetic."""

import dataclasses
import itertools
import math
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parity import bench, device, record, timing
from parity.check import Check
from parity.problems import problem
from parity.timing import Ceilings, Interval, Kernel, NothingSeen, Sample, Timing

us = st.floats(1.0, 1e6)


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def trace_of(takes: dict[int, list[float]]) -> Callable:
    """A trace in which the call with that id takes the next of its times, 3 us after another."""
    left = {call: itertools.cycle(times) for call, times in takes.items()}

    def trace(calls: Sequence[Callable[[], Any]]) -> list[list[Kernel]]:
        return [[Kernel("k", 7.0, 7.0 + next(left[id(call)]))] for call in calls]

    return trace


# statistics


def test_quantiles_by_hand():
    assert timing.quantile([3.0], 0.9) == 3.0
    assert timing.quantile([1.0, 2.0, 3.0, 4.0, 5.0], 0.5) == 3.0
    assert timing.quantile([5.0, 1.0], 0.5) == 3.0
    assert timing.interval([float(i) for i in range(11)]) == Interval(1.0, 5.0, 9.0)


@given(st.lists(us, min_size=1))
def test_quantiles_are_ordered_and_inside(values: list[float]):
    i = timing.interval(values)
    assert min(values) <= i.p10 <= i.p50 <= i.p90 <= max(values)


@given(st.lists(us, min_size=1), st.randoms())
def test_quantiles_do_not_depend_on_the_order(values: list[float], random):
    shuffled = values[:]
    random.shuffle(shuffled)
    assert timing.interval(values) == timing.interval(shuffled)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_nothing_is_made_of_no_samples(values: list[float]):
    with pytest.raises(ValueError, match="finite"):
        timing.interval(values)


# the verdict of two results


@pytest.mark.parametrize(
    ("new", "old", "expected"),
    [
        ((90, 91, 92), (100, 101, 102), timing.FASTER),
        ((100, 101, 102), (90, 91, 92), timing.SLOWER),
        ((99, 100, 101), (99.5, 100.5, 101.5), timing.SAME),
        ((99.9, 100, 100.1), (101.4, 101.5, 101.6), timing.SAME),  # disjoint, but under 2 % apart
        ((90, 100, 110), (95, 105, 115), timing.UNDECIDED),  # 5 % apart, but they overlap
        ((80, 100, 120), (99, 100, 101), timing.UNDECIDED),  # too wide to say that they agree
    ],
)
def test_verdicts(new: tuple, old: tuple, expected: str):
    assert timing.verdict(Interval(*new), Interval(*old)) == expected


intervals = st.tuples(us, us, us).map(lambda v: Interval(*sorted(v)))


@given(intervals, intervals)
def test_a_verdict_turned_round_says_the_opposite(a: Interval, b: Interval):
    opposite = {timing.FASTER: timing.SLOWER, timing.SLOWER: timing.FASTER}
    there, back = timing.verdict(a, b), timing.verdict(b, a)
    assert back == opposite.get(there, there)


@given(intervals, intervals)
def test_a_difference_needs_disjoint_intervals_and_two_per_cent(a: Interval, b: Interval):
    if timing.verdict(a, b) == timing.FASTER:
        assert a.p90 < b.p10 and b.p50 >= 1.02 * a.p50


# who runs when


def test_a_round_is_there_and_back():
    assert next(timing.rounds_of(["a", "b", "c"], 1)) == ["a", "b", "c", "c", "b", "a"]


@given(st.integers(1, 6), st.integers(1, 12))
def test_every_name_has_two_samples_a_round_and_the_same_mean_place(names: int, rounds: int):
    letters = [chr(97 + i) for i in range(names)]
    plan = list(timing.rounds_of(letters, rounds))
    assert len(plan) == rounds
    for order in plan:
        assert Counter(order) == {name: 2 for name in letters}
        places = {n: sum(i for i, m in enumerate(order) if m == n) for n in letters}
        assert len(set(places.values())) == 1  # a linear drift falls on all alike


# what a trace says


def test_a_sample_spans_its_kernels_and_their_gaps():
    kernels = [Kernel("b", 30.0, 45.0), Kernel("a", 10.0, 20.0), Kernel("c", 40.0, 42.0)]
    assert timing.sample(kernels) == Sample(span_us=35.0, busy_us=27.0)


def test_a_call_without_kernels_is_an_error():
    with pytest.raises(NothingSeen, match="no kernel"):
        timing.sample([])


def flushed(*durations: float) -> list[Kernel]:
    """A trace: each duration is a call of one kernel behind a flush."""
    kernels, at = [], 0.0
    for d in durations:
        kernels += [Kernel("flush", at, at + 200), Kernel("k", at + 201, at + 201 + d)]
        at += 201 + d + 50
    return kernels


def test_a_trace_is_cut_at_its_flushes():
    kernels = [*flushed(5.0, 6.0), Kernel("second", 500.0, 501.0)]
    parts = timing.cut(kernels[::-1], {"flush"}, 2)
    assert [[k.name for k in part] for part in parts] == [["k"], ["k", "second"]]
    assert [timing.sample(p[:1]).span_us for p in parts] == pytest.approx([5.0, 6.0])


def test_a_lost_flush_is_an_error_and_not_a_long_sample():
    kernels = flushed(5.0, 6.0, 7.0)
    del kernels[2]
    with pytest.raises(NothingSeen, match="expected 3 samples in the trace, found 2"):
        timing.cut(kernels, {"flush"}, 3)


def test_a_kernel_under_its_flush_is_an_error():
    # on another stream than its flush: the cache was not cold when it began
    with pytest.raises(NothingSeen, match="before its cache flush was over"):
        timing.cut([Kernel("flush", 0, 200), Kernel("k", 150, 300)], {"flush"}, 1)
    with pytest.raises(NothingSeen, match="before its cache flush"):
        timing.cut([Kernel("k", 0, 1), Kernel("flush", 2, 3)], {"flush"}, 1)


def test_an_empty_trace_is_an_error():
    with pytest.raises(NothingSeen, match="found 0"):
        timing.cut([], {"flush"}, 4)


def test_measuring_discards_the_first_round_and_counts_the_rest():
    a, b = (lambda: "a"), (lambda: "b")
    sessions = []
    inner = trace_of({id(a): [99.0, 99.0, 5.0, 5.0, 5.0, 5.0], id(b): [8.0]})

    def trace(calls: Sequence[Callable]) -> list[list[Kernel]]:
        sessions.append(len(calls))
        return inner(calls)

    found = timing.measure({"a": a, "b": b}, trace, rounds=2, discard=1, rounds_a_session=2)
    assert sessions == [8, 4]
    assert [s.span_us for s in found["a"].samples] == [5.0] * 4
    assert found["b"].us == Interval(8.0, 8.0, 8.0) and found["b"].kernels == ("k",)


def test_measuring_says_which_contender_ran_nothing():
    with pytest.raises(NothingSeen, match=r"^idle: the call ran no kernel"):
        timing.measure({"idle": lambda: None}, lambda calls: [[] for _ in calls], rounds=1)


# roofs


CEILINGS = Ceilings(copy_gbps=4000.0, read_gbps=4200.0, gemm_tflops=800.0)


def test_the_roof_is_the_larger_of_two_times():
    assert CEILINGS.least_us(flops=0, bytes=4e9) == pytest.approx(1000.0)
    assert CEILINGS.least_us(flops=8e11, bytes=4e6) == pytest.approx(1000.0)


@given(st.floats(1, 1e15), st.floats(1, 1e12))
def test_nothing_at_its_roof_is_called_impossible(flops: float, bytes: float):
    assert CEILINGS.impossible_us(flops, bytes) < CEILINGS.least_us(flops, bytes)


def control(cold_us: float, warm_us: float) -> list[list[Kernel]]:
    pair = [Kernel("copy", 0.0, cold_us), Kernel("copy", cold_us + 1, cold_us + 1 + warm_us)]
    return [pair] * 5


def test_a_cold_control_passes_and_says_both_rates():
    found = device.judge_control(control(5.0, 3.0), moved=15e6, hbm_gbps=4800.0)
    assert found == pytest.approx({"cold_gbps": 3000.0, "warm_gbps": 5000.0})


@pytest.mark.parametrize(
    ("cold_us", "warm_us", "why"),
    [
        (3.0, 2.0, "the memory cannot do more|memory cannot do more"),
        (4.0, 3.9, "flush did nothing"),
    ],
)
def test_a_warm_control_refuses_the_run(cold_us: float, warm_us: float, why: str):
    with pytest.raises(device.WarmCache, match=why):
        device.judge_control(control(cold_us, warm_us), moved=15e6, hbm_gbps=4800.0)


def test_a_control_of_other_kernels_refuses_the_run():
    with pytest.raises(device.WarmCache, match="other kernels"):
        device.judge_control([[Kernel("copy", 0, 1)]], moved=1.0, hbm_gbps=0.0)


def test_ceilings_are_rates_and_the_better_copy_counts():
    names = ("copy", "negate", "read", "gemm")
    takes = {"copy": [10.0, 12.0, 14.0], "negate": [9.0, 10.0, 11.0], "read": [8.0], "gemm": [4.0]}
    timings = {
        f"ceiling:{n}": Timing(tuple(Sample(us, us) for us in takes[n]), ("k",)) for n in names
    }
    work = dict.fromkeys(timings, 4e7)
    assert device.ceilings_of(timings, work) == Ceilings(4000.0, 5000.0, 10.0)
    assert device.best_ceilings_of(timings, work) == Ceilings(4e7 / 9 / 1e3, 5000.0, 10.0)


# clocks


def test_clocks_sum_up_their_readings():
    readings = [
        device.Reading(1980, 3201, ()),
        None,
        device.Reading(1755, 3201, ("sw_power_cap",), 60, 690.0),
    ]
    found = device.clocks(readings)
    assert found["sm_mhz"] == {"low": 1755.0, "median": 1867.5, "high": 1980.0}
    assert found["throttle"] == ["sw_power_cap"] and found["power_w"] == 690.0
    assert device.clocks([None]) == {}


def test_nvidia_smi_is_read_and_its_gaps_are_nothing():
    reading = device.parse_smi("1980, 3201, 0x0000000000000044, 41, 512.33\n")
    assert reading == device.Reading(1980, 3201, ("sw_power_cap", "hw_thermal"), 41, 512.33)
    assert device.parse_smi("[N/A], 3201, 0x0, 41, 1.0") is None
    assert device.parse_smi("") is None


# budgets


def test_a_budget_starts_nothing_that_would_not_fit():
    clock = FakeClock()
    budget = timing.Budget(60.0, clock)
    assert budget.fits() and budget.left == 60.0
    clock.now += 25
    budget.spent(25)
    assert budget.fits()
    clock.now += 25
    budget.spent(25)
    assert not budget.fits() and budget.fits(5.0)
    assert timing.Budget(None, clock).fits(1e9)


# one workload, two implementations that are quick on a CPU, faked where a GPU would be

IMPLEMENTATION = """
from dataclasses import dataclass
import {module} as np

@dataclass(frozen=True)
class Config:
    block_m: int = 64

def default_config(M, N, K, dtype):
    return Config(K)

def matmul(a, b):
    default_config(*a.shape, b.shape[1], a.dtype)
    return np.matmul(a, b)

def matmul_fwd(a, b):
    return matmul(a, b), (a, b)

def matmul_bwd(res, dc):
    a, b = res
    return matmul(dc, b.T), matmul(a.T, dc)
"""

MACHINE = bench.Machine({"name": "Fake GPU", "uuid": "x", "hbm_gbps": 0.0}, {"torch": "1"}, "abc")
ROOF_US = 100.0


@pytest.fixture(scope="module")
def impls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("implementations")
    for twin, module in (("triton", "torch"), ("pallas", "jax.numpy")):
        (folder / f"{twin}.py").write_text(IMPLEMENTATION.format(module=module))
    return {twin: f"{folder / twin}.py:matmul" for twin in ("triton", "pallas")}


@pytest.fixture
def fake_gpu(impls: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """name of a contender -> microseconds; the ceilings make a roof of 100 us."""
    from parity.frameworks import tracer

    takes: dict[str, float] = {"triton": 110.0, "pallas": 125.0}
    calls: dict[int, str] = {}
    work = problem("matmul").workload("ci")
    cost = problem("matmul").cost(work, "fwd")

    def cold(found: Sequence[Callable], during: Callable[[int], None] | None = None) -> list:
        if during is not None:
            during(0)
        return [[Kernel("k", 0.0, takes.get(calls.get(id(c), ""), 150.0))] for c in found]

    def measured(contenders: dict, trace: Callable, **how: Any) -> dict[str, Timing]:
        calls.update({id(call): name for name, call in contenders.items()})
        return measure(contenders, trace, **how)

    def ceilings(nbytes: float, dtype: str) -> tuple[dict, dict]:
        amounts = {f"ceiling:{what}": cost.bytes for what in ("copy", "negate", "read")}
        amounts["ceiling:gemm"] = cost.flops
        takes.update(dict.fromkeys(amounts, ROOF_US))
        return {name: (lambda name=name: name) for name in amounts}, amounts

    measure = timing.measure
    stand_ins = dataclasses.replace(problem("matmul"), implementations=impls)
    monkeypatch.setitem(globals(), "problem", lambda stem: stand_ins)
    monkeypatch.setattr(tracer, "cold", cold)
    monkeypatch.setattr(tracer, "wait_for", lambda out: out)
    shape = {"grid": [132, 1, 1], "registers": 168}
    monkeypatch.setattr(tracer, "shapes", lambda calls: [shape] * len(calls))
    monkeypatch.setattr(timing, "measure", measured)
    monkeypatch.setattr(device, "contenders", ceilings)
    monkeypatch.setattr(device, "prove_cold", lambda *args: {"cold_gbps": 1.0, "warm_gbps": 2.0})
    monkeypatch.setattr(device, "reader", lambda uuid: lambda: device.Reading(1980, 3201, ()))
    monkeypatch.setattr(bench, "LAUNCHES", 1)
    monkeypatch.setattr(bench, "WARM_UP_SECONDS", 0.0)
    return takes


def green(*reds: str) -> list[Check]:
    return [
        Check(
            "matmul", "ci", "fwd", impl, "float16", ok, "" if ok else "norm", "", 2e-4, 2e-4, (), 1
        )
        for impl in ("triton", "pallas")
        for ok in [impl not in reds]
    ]


def measured_rows(checks: list[Check], **how: Any) -> dict[str, dict]:
    p = problem("matmul")
    how = {"passes": ("fwd",), "checks": checks, "rounds": 2, "machine": MACHINE} | how
    return {r["impl"]: r for r in bench.rows(p, p.workload("ci"), **how)}


def test_a_bench_times_both_twins_and_their_peers(fake_gpu: dict[str, float]):
    found = measured_rows([dataclasses.replace(check, ulp={"0": 1.0}) for check in green()])
    assert list(found) == [
        "triton",
        "pallas",
        "peer:cublas",
        "peer:jax.numpy",
        "peer:jax.mosaic_example",
    ]
    assert all(record.wrong_with(row) == "" for row in found.values())
    assert found["triton"]["us"], found["triton"]["note"]
    assert found["triton"]["us"]["p50"] == 110.0
    assert found["triton"]["roof"] == pytest.approx(100 / 110)
    assert found["pallas"]["roof"] == pytest.approx(100 / 125)
    columns = problem("matmul").workload("ci")["N"]
    assert found["triton"]["config"] == found["pallas"]["config"] == {"block_m": columns}
    assert found["triton"]["ulp"] == {"0": 1.0} and found["peer:cublas"]["ulp"] is None
    assert found["peer:cublas"]["check"] == "none" and found["peer:cublas"]["us"]["p50"] == 150.0
    assert found["peer:jax.mosaic_example"]["us"] is None  # no Mosaic GPU kernel runs here
    assert len({row["run"] for row in found.values()}) == 1
    assert found["triton"]["clocks"]["sm_mhz"]["low"] == 1980.0
    assert found["triton"]["launches"] == [
        {"name": "k", "us": 110.0, "share": 1.0, "grid": [132, 1, 1], "registers": 168}
        | {"block": None, "shared_bytes": None}
    ]


def test_a_red_twin_is_not_timed(fake_gpu: dict[str, float]):
    found = measured_rows(green("pallas"), peers=False)
    assert found["pallas"]["us"] is None and found["pallas"]["check"] == "fail:norm"
    assert found["triton"]["us"] is not None


def test_nothing_is_timed_when_both_are_red(fake_gpu: dict[str, float]):
    found = measured_rows(green("pallas", "triton"))
    assert set(found) == {"triton", "pallas"}
    assert all(row["us"] is None and record.wrong_with(row) == "" for row in found.values())


def test_faster_than_the_roof_is_an_error_and_no_record(fake_gpu: dict[str, float]):
    fake_gpu["pallas"] = 90.0  # the roof is at 100
    found = measured_rows(green(), peers=False)
    assert found["pallas"]["us"] is None and "no less than 95.2" in found["pallas"]["note"]
    fake_gpu["pallas"] = 96.0  # within 5 %
    assert measured_rows(green(), peers=False)["pallas"]["us"]["p50"] == 96.0


def test_a_peer_that_computes_something_else_is_not_timed(
    fake_gpu: dict[str, float], monkeypatch: pytest.MonkeyPatch
):
    from parity import peers

    def doubled(which: str, inputs: dict, cotangents: dict, options: dict) -> Callable:
        call = peers.cublas_matmul(which, inputs, cotangents, options)
        return lambda: 2 * call() if call else None

    monkeypatch.setattr(peers, "jax_matmul", doubled)
    row = measured_rows(green())["peer:jax.numpy"]
    assert row["us"] is None and row["note"].startswith("computes something else: 1")


def test_what_marks_a_bound_may_be_faster_than_the_roof(
    fake_gpu: dict[str, float], monkeypatch: pytest.MonkeyPatch
):
    from parity import peers

    def mark(which: str, inputs: dict, cotangents: dict, options: dict) -> Callable:
        call = peers.cublas_matmul(which, inputs, cotangents, options)
        return peers._with_config(call, {"computes": "the same, as a mark"})

    fake_gpu["peer:jax.numpy"] = 90.0
    assert measured_rows(green())["peer:jax.numpy"]["us"] is None
    monkeypatch.setattr(peers, "jax_matmul", mark)
    assert measured_rows(green())["peer:jax.numpy"]["us"]["p50"] == 90.0


def test_a_peer_that_crashes_says_so(fake_gpu: dict[str, float], monkeypatch: pytest.MonkeyPatch):
    from parity import peers

    def broken(which: str, inputs: dict, cotangents: dict, options: dict) -> Callable:
        raise RuntimeError("no form of this peer ran") from MemoryError("80 GB")

    monkeypatch.setattr(peers, "cublas_matmul", broken)
    row = measured_rows(green())["peer:cublas"]
    assert row["us"] is None
    assert row["note"] == "RuntimeError: no form of this peer ran (MemoryError: 80 GB)"


def campaign(out: Path, **how: Any) -> bench.Campaign:
    p = problem("matmul")
    how = {"passes": ("fwd",), "checks": green(), "rounds": 1, "machine": MACHINE} | how
    return bench.Campaign([(p, p.workload("ci"))], out=out, **how)


def test_a_campaign_writes_rows_down_and_resumes(
    fake_gpu: dict[str, float], tmp_path: Path, impls: dict[str, str]
):
    out = tmp_path / "matmul.jsonl"
    first = campaign(out, resume=True, peers=False)
    assert [s.which for s in first.left] == ["fwd"]
    found = list(first)
    assert record.read(out).rows == tuple(found) and not first.left
    again = campaign(out, resume=True, peers=False)
    assert not again.left and len(again.standing) == 1 and list(again) == []
    assert campaign(out, peers=False).left  # without resume, everything is measured again
    # peers that nobody has measured, or another torch: not what stands
    assert campaign(out, resume=True).left
    other = bench.Machine(MACHINE.facts, {"torch": "2"}, "abc")
    assert campaign(out, resume=True, peers=False, machine=other).left
    # a change beside the kernel
    lib = Path(impls["triton"].partition(":")[0]).with_name("_lib.py")
    lib.write_text("1")
    assert campaign(out, resume=True, peers=False).left
    lib.unlink()
    # another commit alone changes nothing
    other = bench.Machine(MACHINE.facts, MACHINE.versions, "def")
    assert not campaign(out, resume=True, peers=False, machine=other).left


def test_a_campaign_without_budget_says_what_is_left(fake_gpu: dict[str, float], tmp_path: Path):
    clock = FakeClock()
    idle = campaign(tmp_path / "x.jsonl", budget=0.0, clock=clock)
    assert list(idle) == [] and [s.work.name for s in idle.left] == ["ci"]


def test_a_red_row_is_checked_again_on_resume(fake_gpu: dict[str, float], tmp_path: Path):
    out = tmp_path / "matmul.jsonl"
    list(campaign(out, checks=green("pallas"), peers=False))
    assert campaign(out, resume=True, peers=False).left


def test_speed_without_a_gpu_is_refused():
    from parity.frameworks import tracer

    if tracer.torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for ask in (lambda: tracer.kernels(lambda: None), lambda: tracer.cold([]), bench.Machine.here):
        with pytest.raises(NothingSeen, match="speed exists only on a GPU"):
            ask()


def test_the_commit_of_a_folder_outside_git_is_unknown(tmp_path: Path):
    assert record.commit(tmp_path) == "unknown"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@y"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "a").write_text("1")
    subprocess.run([*git, "add", "a"], check=True)
    subprocess.run([*git, "commit", "-qm", "a"], check=True)
    clean = record.commit(tmp_path)
    assert len(clean) == 12
    (tmp_path / "a").write_text("2")
    assert record.commit(tmp_path) == clean + "+"
