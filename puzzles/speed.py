"""Speed: how a solution is raced against a named baseline, and when a tier is awarded.

    fresh numbers    every timed call gets inputs that no call has seen before
    kept answers     and what it returns is kept and checked, when the clock stands still again
    poison           the memory from which outputs are allocated holds NaN or a pattern, and inputs
                     are looked at again afterwards
    alternation      baseline and solution take turns on the same inputs, each on a cold cache
    the bound        a tier needs the lower end of the ratio's confidence interval, not its median
    the roof         no answer comes faster than the memory of this GPU moves its bytes

parity's ruler (parity.timing, parity.frameworks.tracer) takes the times: device time from the first
kernel's start to the last one's end, on whichever stream they run. The thresholds of a GPU stand in
qNN/speed.json, with where they come from; `puzzles author calibrate` writes them. This file knows
neither framework nor GPU: what it is given can be faked.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from parity.timing import NOISY, Ceilings, Kernel, Timing, interval, measure

SCHEMA = 1
ROUNDS = 24
ROUNDS_A_SESSION = 3  # inputs and outputs of a session are all in memory at once
SHARES = (0.5, 0.75, 0.9)  # of the shipped solution's speed: the tiers
SURE = 0.95  # that the median of the ratio is above its lower bound
YOURS, BASELINE = "yours", "baseline"

Answer = tuple[Any, ...]


# The race, in the child.


class Runner:
    """One contender: a call that takes the next draw and keeps what it made of it.

    take: the arguments of solve that belong to a draw; it runs before the clock does.
    outputs_of: what solve returned, as a tuple; it runs after.
    """

    def __init__(
        self,
        solve: Callable[..., Any],
        take: Callable[[Any], Answer] = lambda drawn: drawn,
        outputs_of: Callable[[Any], Answer] = lambda out: out,
    ) -> None:
        self.solve, self.take, self.outputs_of = solve, take, outputs_of
        self.stock: list[Answer] = []
        self.kept: list[Any] = []

    def begin(self, stock: Sequence[Any]) -> None:
        self.stock, self.kept = [self.take(drawn) for drawn in stock], []

    def __call__(self) -> Any:
        self.kept.append(self.solve(*self.stock[len(self.kept)]))
        return self.kept[-1]


def race(
    runners: Mapping[str, Runner],
    beside: Mapping[str, Callable[[], Any]],
    draw: Callable[[], Any],
    wrong: Callable[[Any, Answer], str],
    trace: Callable[[Sequence[Callable[[], Any]]], Sequence[Sequence[Kernel]]],
    *,
    rounds: int = ROUNDS,
    poison: Callable[[], None] = lambda: None,
    fingerprint: Callable[[Any], Any] = lambda drawn: None,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Times all runners in alternation -> (their timings, {name: what was wrong with an answer}).

    Args:
        beside: calls that are timed too and have no inputs: the ceilings of this device.
        draw: new inputs, unlike any before.
        wrong: a sentence about an answer to a draw, "" if it is right.
        trace: runs calls in order, after at most one untimed call of each -> the kernels of each.
        poison: spoils the memory that the next outputs may be allocated from.
        fingerprint: of the inputs in a draw; it changes when they do.
    """
    bad: dict[str, str] = {}

    def session(calls: Sequence[Callable[[], Any]]) -> Sequence[Sequence[Kernel]]:
        most = max(sum(call is runner for call in calls) for runner in runners.values())
        stock = [draw() for _ in range(most + 1)]  # one to warm up with
        for runner in runners.values():
            runner.begin(stock)
        before = [fingerprint(drawn) for drawn in stock]
        poison()
        seen = trace(calls)
        if before != [fingerprint(drawn) for drawn in stock]:
            for name in runners.keys() - {BASELINE}:
                bad.setdefault(name, "an input was written to")
        for name, runner in runners.items():
            answered = zip(stock, runner.kept, strict=False)
            told = (wrong(drawn, runner.outputs_of(out)) for drawn, out in answered)
            if sentence := next(filter(None, told), ""):
                bad.setdefault(name, sentence)
            runner.begin(())
        return seen

    timings = measure(
        {**runners, **beside}, session, rounds=rounds, rounds_a_session=ROUNDS_A_SESSION
    )
    return timings, bad


def ratios(baseline: Sequence[float], other: Sequence[float]) -> list[float]:
    """How many times faster the other was, round by round: two samples of each make a round."""
    pairs = zip(*(iter(zip(baseline, other, strict=True)),) * 2, strict=True)
    return [(a[0] + b[0]) / (a[1] + b[1]) for a, b in pairs]


def bound(values: Sequence[float], sure: float = SURE) -> float:
    """A lower bound of the median, right with probability `sure` whatever the distribution is.

    The k-th smallest of n values lies above the median if fewer than k do not: a binomial sum.
    Raises ValueError if n is too small for any bound.
    """
    n, tail, k = len(values), 0.0, 0
    while tail + math.comb(n, k) / 2**n <= 1 - sure:
        tail += math.comb(n, k) / 2**n
        k += 1
    if k == 0:
        raise ValueError(f"{n} rounds are too few for a bound")
    return sorted(values)[k - 1]


# What it is worth, in the parent.


@dataclass(frozen=True)
class Speed:
    """What is said of a solution's speed.

    state: "locked" (nothing was lost), "wrong" or "impossible" (the check fails), "noisy" and
    "uncalibrated" (timed, no tier), or "timed". tier: of `tiers`, counted from 1; 0 is none yet.
    ratio: how many times faster than the baseline; low: the bound that counts.
    """

    state: str
    detail: str = ""
    tier: int = 0
    tiers: tuple[float, ...] = ()
    ratio: float = math.nan
    low: float = math.nan
    us: float = math.nan
    baseline_us: float = math.nan
    roof: float = math.nan  # the share of the roof that was reached
    baseline: str = ""
    device: str = ""

    def points(self, most: int) -> float:
        return round(most * self.tier / len(self.tiers), 1) if self.tiers else 0.0

    def to_json(self) -> dict[str, Any]:
        return {k: None if v != v else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Raced:
    """What the child measured, on its way through a pipe."""

    device: str
    samples: Mapping[str, Sequence[float]]  # microseconds, in the order they were taken
    bad: Mapping[str, str]
    bytes: float  # the least that one call must move
    ceilings: Mapping[str, float]  # the best rates of this run
    baseline: str  # its name
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def roof_us(self) -> float:
        best = Ceilings(**self.ceilings, gemm_tflops=math.inf)
        return best.least_us(0, self.bytes)

    def speed(self, name: str, tiers: Sequence[float] | None) -> Speed:
        """What `name` gets for it; tiers: thresholds of the ratio, None if there are none here."""
        mine, theirs = interval(self.samples[name]), interval(self.samples[BASELINE])
        each = ratios(self.samples[BASELINE], self.samples[name])
        low, ratio = bound(each), interval(each).p50
        known = {
            "ratio": ratio, "low": low, "us": mine.p50, "baseline_us": theirs.p50,
            "roof": self.roof_us / mine.p50, "baseline": self.baseline, "device": self.device,
            "tiers": tuple(tiers or ()),
        }  # fmt: skip
        limit = Ceilings(**self.ceilings, gemm_tflops=math.inf).impossible_us(0, self.bytes)
        fastest = min(self.samples[name])
        if name in self.bad:
            return Speed("wrong", f"an answer given while the clock ran: {self.bad[name]}", **known)
        if fastest < limit:
            detail = f"{fastest:.1f} us, and this GPU's memory needs at least {limit:.1f} us"
            return Speed("impossible", detail, **known)
        if theirs.p90 - theirs.p10 > NOISY * theirs.p50:
            detail = f"the baseline took {theirs.p10:.0f} to {theirs.p90:.0f} us: try again"
            return Speed("noisy", detail, **known)
        if tiers is None:
            return Speed("uncalibrated", f"no tiers are known for {self.device}", **known)
        return Speed("timed", tier=sum(low >= tier for tier in tiers), **known)


def locked(why: str) -> Speed:
    return Speed("locked", why)


# Thresholds, a file for each puzzle.


def thresholds(folder: Path, version: int, device: str, backend: str) -> tuple[float, ...] | None:
    """The tiers of this GPU; None where nobody has calibrated this version of the puzzle."""
    path = folder / "speed.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    if found.get("schema") != SCHEMA or found.get("version") != version:
        return None
    tiers = found["devices"].get(device, {}).get("tiers", {}).get(backend)
    return None if tiers is None else tuple(tiers)


def tiers_of(raced: Raced, name: str) -> tuple[float, ...]:
    """Shares of what the shipped solution surely reaches, to two digits, none below the baseline.

    Where that puts two of them there, the three are evenly apart instead, to a twentieth: from the
    baseline to the last share.

    Raises ValueError if that would not make tiers that rise either.
    """
    low = bound(ratios(raced.samples[BASELINE], raced.samples[name]))
    found = tuple(max(1.0, _two_digits(share * low)) for share in SHARES)
    if found[0] == found[1]:
        last = SHARES[-1] * low
        found = tuple(math.floor(20 * x + 1e-9) / 20 for x in (1.0, (1.0 + last) / 2, last))
    if sorted({*found}) != [*found]:
        raise ValueError(f"{name}: {low:.2f} times the baseline leaves no room for three tiers")
    return found


def _two_digits(x: float) -> float:
    """Rounded down."""
    step = 10 ** (math.floor(math.log10(x)) - 1)
    return round(math.floor(x / step + 1e-9) * step, 6)


def keep(folder: Path, version: int, raced: Raced, origin: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the thresholds of one GPU beside those of others -> what was written of it.

    origin: when, commit and the like.
    """
    path = folder / "speed.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    if found.get("schema") != SCHEMA or found.get("version") != version:
        found = {"schema": SCHEMA, "version": version, "devices": {}}
    backends = [name for name in raced.samples if name in ("triton", "pallas")]
    row = {
        "tiers": {name: tiers_of(raced, name) for name in backends},
        "baseline": raced.baseline,
        "measured": {
            name: {
                "us": {k: round(v, 2) for k, v in interval(samples).to_json().items()},
                "ratio": round(interval(each := ratios(raced.samples[BASELINE], samples)).p50, 3),
                "low": round(bound(each), 3),
            }
            for name, samples in raced.samples.items()
        },
        "bytes": raced.bytes,
        "roof_us": round(raced.roof_us, 2),
        "ceilings": {name: round(rate, 1) for name, rate in raced.ceilings.items()},
        "how": f"medians of {ROUNDS} rounds of two samples each, in alternation, cold L2; ratio "
        f"by round; low: {SURE:.0%} bound of its median; tiers: {SHARES} of low",
        "versions": dict(raced.versions),
        **origin,
    }
    found["devices"][raced.device] = row
    path.write_text(json.dumps(found, indent=2) + "\n")
    return row
