"""The smallest failing case: the fewest rows, columns and options that fail for the same reason.

    try everything at its least
    halve all sizes together, then leave options out, while it still fails
    for each size: bisect, as if failing were monotone
    for each size: smaller steps and sizes around powers of two, where a bug may hide that is not

A case is a workload with other sizes, and without some of its options and optional inputs. Whoever
judges a case is a function, so that nothing here knows processes or frameworks. A case that the
problem refuses does not count, and neither does one that fails for another reason: that is another
bug. The order of the trials is fixed; no case is judged twice.

Sources: delta debugging (Zeller and Hildebrandt, 2002); making a step adaptively larger while it
succeeds is how Hypothesis shrinks integers.
"""

import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from parity.spec import Problem, Workload

TRIES = 250
SECONDS = 60.0
STEPS = (1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 128, 256)  # periods that tiles and vectors have

# One failure measured over the whole array, over a tile, over an element: with fewer rows the same
# bug moves from one to the other.
_TOO_LARGE = ("norm", "tile", "peak")


@dataclass(frozen=True)
class Case:
    """Sizes of a workload, and the options and optional inputs that it goes without."""

    sizes: Mapping[str, int]
    without: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ", ".join(f"{letter}={n}" for letter, n in self.sizes.items())

    @property
    def key(self) -> tuple:
        return tuple(self.sizes.items()), frozenset(self.without)


@dataclass(frozen=True)
class Shrunk:
    """Where the search ended. Not `complete`: it was cut by a limit, smaller cases may fail too."""

    case: Case
    tries: int
    seconds: float
    complete: bool


def optional(problem: Problem, work: Workload) -> tuple[str, ...]:
    """What this workload can go without: its options, and inputs that some workload leaves out."""
    inputs = {name for w in problem.workloads for name in w.absent} - {*work.absent}
    return (*work.options, *(name for name in problem.inputs(work) if name in inputs))


def resized(
    problem: Problem, work: Workload, sizes: Mapping[str, int], without: Sequence[str] = ()
) -> Workload:
    """The workload with other sizes, without some of its options and optional inputs.

    Raises ValueError: it has no such size, option or input, or the problem refuses these sizes.
    """
    if not sizes and not without:
        return work
    kinds = {"size": (sizes, tuple(work.sizes)), "option": (without, optional(problem, work))}
    for kind, (names, known) in kinds.items():
        for name in names:
            if name not in known:
                there = ", ".join(known) or "none"
                raise ValueError(
                    f"{problem.stem} {work.name} has no {kind} {name!r} (there are: {there})"
                )
    if bad := [f"{letter}={n}" for letter, n in sizes.items() if n < 0]:
        raise ValueError(f"a size is not negative: {', '.join(bad)}")
    changed = replace(
        work,
        name=" ".join(
            [
                work.name,
                *(f"{letter}={n}" for letter, n in sizes.items()),
                *(f"-{name}" for name in without),
            ]
        ),
        sizes={**work.sizes, **sizes},
        options={k: v for k, v in work.options.items() if k not in without},
        absent=(*work.absent, *(name for name in without if name not in work.options)),
        # whose share of the device time is whose, real sizes tell
        tags=tuple(tag for tag in work.tags if tag != "model"),
    )
    for described in (problem.inputs, problem.cotangents, problem.outputs, problem.grads):
        described(changed)
    return changed


def signature(row: Mapping[str, Any]) -> str:
    """What a failure must keep to be the same one; "" for a pass."""
    if row["ok"]:
        return ""
    if row["reason"] == "crash":  # other sizes stand in the same sentence
        return "crash: " + re.sub(r"\d+", "", row["detail"])
    return "too large" if row["reason"] in _TOO_LARGE else row["reason"]


def shrink(
    start: Case,
    droppable: Sequence[str],
    fails: Callable[[Case], bool],
    *,
    tries: int = TRIES,
    seconds: float = SECONDS,
) -> Shrunk:
    """The smallest case found that `fails`, from one that does.

    It is the least there is where failing needs a size to exceed a bound, to leave a remainder
    modulo one of STEPS, or to lie beside a power of two; elsewhere none of the sizes tried fails.
    """
    search = _Search(start, fails, tries, time.monotonic() + seconds)
    began, complete = time.monotonic(), True
    try:
        search.run(tuple(droppable))
    except _Enough:
        complete = False
    return Shrunk(search.best, len(search.known), time.monotonic() - began, complete)


class _Enough(Exception):
    """The limit of tries or seconds is reached."""


class _Search:
    def __init__(
        self, start: Case, fails: Callable[[Case], bool], tries: int, until: float
    ) -> None:
        self.best, self.fails, self.tries, self.until = start, fails, tries, until
        self.known: dict[tuple, bool] = {}

    def run(self, droppable: tuple[str, ...]) -> None:
        least = {letter: min(1, n) for letter, n in self.best.sizes.items()}
        if self.accepts(Case(least, droppable)):
            return
        while self.accepts(self.with_sizes({k: _half(n) for k, n in self.best.sizes.items()})):
            pass
        before = None
        while before != self.best:
            before = self.best
            for name in droppable:
                if name not in self.best.without:
                    self.accepts(replace(self.best, without=(*self.best.without, name)))
            for search in (self.bisect, self.search_below):
                for letter in self.best.sizes:
                    search(letter)

    def accepts(self, case: Case) -> bool:
        """Whether the case fails; then it is the best so far."""
        if case == self.best:
            return False
        if case.key not in self.known:
            if len(self.known) >= self.tries or time.monotonic() >= self.until:
                raise _Enough
            self.known[case.key] = self.fails(case)
        if self.known[case.key]:
            self.best = case
        return self.known[case.key]

    def with_sizes(self, sizes: Mapping[str, int]) -> Case:
        return replace(self.best, sizes={**self.best.sizes, **sizes})

    def at(self, letter: str, n: int) -> bool:
        return self.accepts(self.with_sizes({letter: n}))

    def bisect(self, letter: str) -> None:
        high = self.best.sizes[letter]
        if high <= 1 or self.at(letter, 1):
            return
        low = 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.at(letter, middle) else (middle, high)

    def search_below(self, letter: str) -> None:
        """Steps that grow while they succeed, and then the neighbours of powers of two."""
        n = self.best.sizes[letter]
        for step in STEPS:
            wide = step
            while n - wide >= 1 and self.at(letter, n - wide):
                n, wide = n - wide, 2 * wide
            while wide > step:
                wide //= 2
                if n - wide >= 1 and self.at(letter, n - wide):
                    n -= wide
        for near in _beside_powers_of_two(n):
            if self.at(letter, near):
                return


def _half(n: int) -> int:
    return max(min(1, n), n // 2)


def _beside_powers_of_two(below: int) -> Iterator[int]:
    power = 2
    while power - 1 < below:
        yield from (n for n in (power - 1, power, power + 1) if n < below)
        power *= 2


def replay(
    problem: Problem,
    work: Workload,
    case: Case,
    which: str,
    *,
    twin: str | None,
    impl: str | None,
    seed: int,
    more: Sequence[str] = (),
) -> str:
    """The command that judges this case again."""
    words = ["parity", "check", problem.stem, "-w", f"{problem.stem}/{work.name}"]
    words += ["-s", ",".join(f"{letter}={n}" for letter, n in case.sizes.items())]
    if case.without:
        words += ["--without", ",".join(case.without)]
    words += ["--pass", which]
    if impl:
        words += ["--impl", impl, "--as", str(twin)]
    elif twin:
        words += ["--twin", twin]
    if seed:
        words += ["--seed", str(seed)]
    return shlex.join([*words, *more])
