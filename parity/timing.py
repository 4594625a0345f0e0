"""The ruler's arithmetic: who runs when, what a trace says, and when two results differ.

Nothing here knows a GPU or a framework. A `trace` is any function that runs calls one after the
other, each on a cold cache, and says which kernels each of them ran; a clock is any function that
returns seconds. Tests hand in fakes of both.

The order A B B A ... and the rule that two results differ only when their intervals are apart are
those of careful benchmarks elsewhere (nvbench-compare's FAST, SLOW, SAME and UNDECIDED).
"""

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

APART = 0.02  # results closer than this count as the same
NOISY = 0.10  # an interval wider than this share of its median cannot say SAME
OVERLAP_US = 5.0  # a kernel may be launched early, to start as the one before it ends

FASTER, SLOWER, SAME, UNDECIDED = "FASTER", "SLOWER", "SAME", "UNDECIDED"


@dataclass(frozen=True)
class Kernel:
    """One kernel, copy or fill on the device, on the profiler's clock."""

    name: str
    start_us: float
    end_us: float


@dataclass(frozen=True)
class Interval:
    """The median and the 10th and 90th percentile of some samples."""

    p10: float
    p50: float
    p90: float

    def to_json(self) -> dict[str, float]:
        return {"p10": self.p10, "p50": self.p50, "p90": self.p90}

    @staticmethod
    def from_json(row: Mapping[str, float]) -> "Interval":
        return Interval(row["p10"], row["p50"], row["p90"])


@dataclass(frozen=True)
class Sample:
    """One call: from its first kernel's start to its last one's end, and the sum of its kernels."""

    span_us: float
    busy_us: float


@dataclass(frozen=True)
class Timing:
    """All samples of one implementation in one run."""

    samples: tuple[Sample, ...]
    kernels: tuple[str, ...]  # names of one call, in the order they started

    @property
    def us(self) -> Interval:
        return interval([s.span_us for s in self.samples])

    @property
    def busy_us(self) -> float:
        return quantile([s.busy_us for s in self.samples], 0.5)

    @property
    def best_us(self) -> float:
        return min(s.span_us for s in self.samples)


Trace = Callable[[Sequence[Callable[[], Any]]], Sequence[Sequence[Kernel]]]


class NothingSeen(RuntimeError):
    """A call ran no kernel, or the profiler saw none: there is nothing to time."""


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile, linear between neighbours.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"expected finite values, got {list(values)[:8]}")
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    # exact where both neighbours agree: a quantile never leaves the range of the values
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def interval(values: Sequence[float]) -> Interval:
    return Interval(*(quantile(values, q) for q in (0.1, 0.5, 0.9)))


def verdict(new: Interval, old: Interval) -> str:
    """Is `new` FASTER or SLOWER than `old`, the SAME, or can this pair of runs not tell?

    They differ if their intervals are disjoint and their medians at least 2 % apart. They are the
    same if the medians are closer than that, and neither interval is so wide that it hides a
    difference. Anything else is UNDECIDED.
    """
    apart = max(new.p50, old.p50) >= (1 + APART) * min(new.p50, old.p50)
    disjoint = new.p90 < old.p10 or old.p90 < new.p10
    if apart:
        return UNDECIDED if not disjoint else FASTER if new.p50 < old.p50 else SLOWER
    noisy = any(i.p90 - i.p10 > NOISY * i.p50 for i in (new, old))
    return UNDECIDED if noisy and not disjoint else SAME


def rounds_of(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """A B C C B A, then B C A A C B, ...: drift and neighbours fall on all names alike."""
    for r in range(rounds):
        turn = r % max(1, len(names))
        order = [*names[turn:], *names[:turn]]
        yield order + order[::-1]


def sample(kernels: Sequence[Kernel]) -> Sample:
    """What one call's kernels say; kernels may run side by side.

    Raises:
        NothingSeen: there are none.
    """
    if not kernels:
        raise NothingSeen("the call ran no kernel that the profiler saw")
    start, end = min(k.start_us for k in kernels), max(k.end_us for k in kernels)
    return Sample(end - start, sum(k.end_us - k.start_us for k in kernels))


def cut(kernels: Sequence[Kernel], separators: Collection[str], count: int) -> list[list[Kernel]]:
    """Cuts a trace into `count` samples, each opened by one kernel named in `separators`.

    Raises:
        NothingSeen: the trace is empty, has another number of separators, or a sample began while
        its separator still ran: then its samples cannot be told apart.
    """
    ordered = sorted(kernels, key=lambda k: (k.start_us, k.end_us))
    parts: list[list[Kernel]] = []
    flushed = 0.0
    for k in ordered:
        if k.name in separators:
            parts.append([])
            flushed = k.end_us
        elif not parts or k.start_us < flushed - OVERLAP_US:
            raise NothingSeen(f"{k.name[:60]} ran before its cache flush was over")
        else:
            parts[-1].append(k)
    if len(parts) != count:
        seen = f"{len(parts)} cache flushes among {len(ordered)} kernels"
        raise NothingSeen(f"expected {count} samples in the trace, found {seen}")
    return parts


def measure(
    contenders: Mapping[str, Callable[[], Any]],
    trace: Trace,
    *,
    rounds: int = 20,
    discard: int = 1,
    rounds_a_session: int = 10,
) -> dict[str, Timing]:
    """Times all contenders in one run, in alternation: each gets 2 * rounds samples.

    Args:
        contenders: name -> a compiled, warmed-up call.
        trace: runs calls in order, each on a cold cache -> the kernels of each.
        discard: rounds before the first that counts.
        rounds_a_session: how many rounds one call of `trace` gets; opening a profiler is slow.
    """
    plan = list(rounds_of(list(contenders), discard + rounds))
    samples: dict[str, list[Sample]] = {name: [] for name in contenders}
    kernels: dict[str, tuple[str, ...]] = {}
    for first in range(0, len(plan), rounds_a_session):
        session = plan[first : first + rounds_a_session]
        names = [name for order in session for name in order]
        seen = trace([contenders[name] for name in names])
        warming = sum(map(len, session[: max(0, discard - first)]))
        for i, (name, found) in enumerate(zip(names, seen, strict=True)):
            try:
                taken = sample(found)
            except NothingSeen as e:
                raise NothingSeen(f"{name}: {e}") from None
            if i >= warming:
                samples[name].append(taken)
                kernels[name] = tuple(
                    k.name for k in sorted(found, key=lambda k: (k.start_us, k.end_us))
                )
    return {name: Timing(tuple(samples[name]), kernels[name]) for name in contenders}


@dataclass(frozen=True)
class Ceilings:
    """What this device reached in the same run: nothing here is from a datasheet."""

    copy_gbps: float  # read + written
    read_gbps: float
    gemm_tflops: float

    def to_json(self) -> dict[str, float]:
        return {
            "copy_gbps": self.copy_gbps,
            "read_gbps": self.read_gbps,
            "gemm_tflops": self.gemm_tflops,
        }

    def least_us(self, flops: float, bytes: float) -> float:
        """The roofline time of work with these least costs."""
        return max(flops / (self.gemm_tflops * 1e6), bytes / (self.copy_gbps * 1e3))

    def impossible_us(self, flops: float, bytes: float) -> float:
        """A sample under this time is a mistake of measurement: over 5 % faster than the roof.

        The roof is the higher of the two bandwidths, because some work reads more than it writes.
        """
        fastest = max(self.copy_gbps, self.read_gbps)
        return max(flops / (self.gemm_tflops * 1e6), bytes / (fastest * 1e3)) / 1.05


class Budget:
    """Seconds to spend; None is without limit. The clock is a parameter for tests."""

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = None if seconds is None else clock() + seconds
        self._longest = 0.0

    @property
    def left(self) -> float:
        return math.inf if self._end is None else self._end - self._clock()

    def fits(self, estimate: float | None = None) -> bool:
        """Whether another step fits: as long as the longest so far, or as `estimate` says."""
        return self.left > (self._longest if estimate is None else estimate)

    def spent(self, seconds: float) -> None:
        """Tells how long a step took."""
        self._longest = max(self._longest, seconds)
