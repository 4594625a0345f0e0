"""The grader's parent: seeds, cases, right answers, verdicts, points. No framework is loaded here.

    read the file        syntax, allow-list                        nothing runs yet
    public cases         which never change, and then fresh ones from a seed that is printed
    each case            shape, dtype, poison, values; guard bands, inputs, launches, foreign work
    the first case       once more, bit for bit equal; then once more on other numbers
    ghost replay         with kernels that do nothing the answer must be wrong
    a failure            the smallest case that fails the same way, and the mutant it looks like
    speed                on a GPU: the cases once more, compiled, and a race against the baseline

parity's judge decides whether values are right, its shrink finds the smallest case, its diagnosis
says what is wrong with it.
"""

import contextlib
import hashlib
import math
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from parity import diagnose, faults, shrink
from parity.judge import Verdict, judge, judge_exact
from parity.spec import Arithmetic, Workload
from puzzles import policy
from puzzles.process import Child
from puzzles.puzzle import HOLE, Puzzle
from puzzles.seen import unwritten
from puzzles.speed import YOURS, Raced, Speed, locked, thresholds
from puzzles.verdicts import OF_JUDGE, VERDICTS

ENOUGH = 0.6  # of the cases must be right before constraints earn points
SHRINK_SECONDS = 6.0
SHRINK_TRIES = 60
STORY_SECONDS = 20.0  # after which no further mistake is tried
OTHERS = 3  # cases in which a known mistake is looked for, beside the first that failed
OTHERS_SECONDS = 3.0  # after which no further one is begun
EXPLAINED = (
    "wrong_value", "not_written", "past_the_end", "raised", "wrong_shape", "wrong_dtype"
)  # fmt: skip
FATAL = ("timeout", "flood", "forged", "outside", "patched")  # no further case is tried


@dataclass(frozen=True)
class Outcome:
    """One case. On failure `verdict` is a word of puzzles.verdicts and `detail` a sentence."""

    case: str
    sizes: Mapping[str, int]
    verdict: str
    detail: str = ""
    seconds: float = 0.0
    error: float = math.nan
    line: int | None = None  # of the learner's file
    code: str = ""
    blank: bool = False  # zeros are right here: who computes nothing is right too

    @property
    def ok(self) -> bool:
        return self.verdict == "pass"


@dataclass(frozen=True)
class Constraint:
    name: str
    measured: float | None  # None: not metered for this backend
    limit: float
    ok: bool


@dataclass(frozen=True)
class Story:
    """What is known of a failure."""

    case: str
    sizes: Mapping[str, int]
    smallest: Mapping[str, int]
    complete: bool
    tries: int
    diagnosis: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Result:
    puzzle: str
    version: int
    backend: str
    seed: str
    source: str  # a hash of the file
    verdict: str
    detail: str
    outcomes: tuple[Outcome, ...]
    constraints: tuple[Constraint, ...] = ()
    story: Story | None = None
    points: Mapping[str, float] = field(default_factory=dict)
    possible: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    output: str = ""  # what the learner's code printed, the beginning
    untouched: tuple[int, ...] = ()  # lines of the holes into which nothing was written
    unchanged: bool = False  # that is all of them
    speed: Speed | None = None  # where the puzzle has points for it

    @property
    def ok(self) -> bool:
        return self.verdict == "pass"

    def to_json(self) -> dict[str, Any]:
        speed = {"speed": self.speed and self.speed.to_json()}
        return asdict(self) | speed | {"ok": self.ok}


def grade(
    puzzle: Puzzle,
    backend: str,
    source: str,
    *,
    seed: str = "",
    explain: bool = True,
    hasty: bool = False,
    child: Child | None = None,
    tell: Callable[[str], None] = lambda phrase: None,
) -> Result:
    """Grades the text of a solution; whatever it does, the answer is a Result.

    Args:
        seed: hexadecimal, of the fresh cases; "" draws one.
        explain: shrink and diagnose a failure.
        hasty: the first case that fails is the last.
        child: a process to use, and to leave running.
        tell: called with a short phrase before each step.

    Raises parity.workers.Broken if this machine cannot run the backend at all.
    """
    began = time.perf_counter()
    seed = seed or secrets.token_hex(4)
    run = _Run(puzzle, backend, source, seed, tell)
    if (found := run.read()) is None:
        with contextlib.ExitStack() as mine:
            if child is None:
                child = mine.enter_context(Child(backend, puzzle.limits))
            found = run.run(child, explain, hasty)
    return replace(found, seconds=time.perf_counter() - began)


def timed(
    puzzle: Puzzle,
    backend: str,
    source: str,
    found: Result,
    *,
    why_not: str = "",
    tell: Callable[[str], None] = lambda phrase: None,
) -> Result:
    """A graded solution with what its speed is worth; one that is not right has none.

    why_not: why nothing can be timed here, "" if it can. Raises parity.workers.Broken if a process
    cannot even start.
    """
    if not found.ok or not puzzle.points.speed:
        return found
    if why_not:
        return replace(found, speed=locked(why_not))
    began = time.perf_counter()
    with Child(backend, puzzle.limits, gpu=True) as child:
        tell("the cases again, compiled for this GPU")
        compiled = grade(
            puzzle, backend, source, seed=found.seed, explain=False, hasty=True, child=child
        )
        if not compiled.ok:
            detail = compiled.detail or VERDICTS[compiled.verdict].says
            return replace(found, verdict="wrong_on_gpu", detail=detail)
        tell("a race against the baseline")
        answer = child.race(puzzle.id, {YOURS: (backend, source)}, secrets.randbits(32))
    if answer.get("unable"):
        return replace(found, speed=locked(answer["detail"]))
    if not answer["ok"]:
        return replace(found, verdict="wrong_on_gpu", detail=answer["detail"])
    raced = Raced(**answer["raced"])
    tiers = thresholds(puzzle.folder, puzzle.version, raced.device, backend)
    speed = raced.speed(YOURS, tiers)
    verdict = {"wrong": "wrong_on_gpu", "impossible": "impossible"}.get(speed.state, found.verdict)
    points = {**found.points, "speed": speed.points(puzzle.points.speed)}
    seconds = found.seconds + time.perf_counter() - began
    detail = found.detail if verdict == found.verdict else speed.detail
    return replace(
        found, speed=speed, verdict=verdict, detail=detail, points=points, seconds=seconds
    )


class _Run:
    def __init__(
        self, puzzle: Puzzle, backend: str, source: str, seed: str, tell: Callable[[str], None]
    ) -> None:
        self.puzzle, self.backend, self.source, self.seed = puzzle, backend, source, seed
        self.tell = tell
        self.cases = puzzle.cases(np.random.default_rng(int(seed, 16)))
        self.outcomes: list[Outcome] = []
        self.seen: list[Mapping[str, Any]] = []
        self.untouched = puzzle.untouched(backend, source)
        self.unchanged = len(self.untouched) == puzzle.skeleton(backend).count(HOLE)
        self.until = math.inf  # of the search for what is wrong

    def result(self, verdict: str, detail: str, **more: Any) -> Result:
        points = self.puzzle.points
        right = [o for o in self.outcomes if o.ok]
        share = len(right) / len(self.cases)
        kept: tuple[Constraint, ...] = more.get("constraints", ())
        earned = share if verdict not in ("no_launch", "no_effect", "foreign_work") else 0.0
        if self.unchanged or all(o.blank for o in right):
            earned = 0.0
        constrained = sum(c.ok for c in kept) / len(kept) if kept and earned >= ENOUGH else 0.0
        if verdict not in ("pass", "wrong_value", "not_written"):
            constrained = 0.0
        return Result(
            puzzle=self.puzzle.id,
            version=self.puzzle.version,
            backend=self.backend,
            seed=self.seed,
            source=hashlib.sha256(self.source.encode()).hexdigest()[:12],
            verdict=verdict,
            detail=detail,
            outcomes=tuple(self.outcomes),
            points={
                "correctness": round(points.correctness * earned, 1),
                "constraints": round(points.constraints * constrained, 1),
                "speed": 0.0,
            },
            possible=asdict(points),
            untouched=tuple(self.untouched),
            unchanged=self.unchanged,
            **more,
        )

    def read(self) -> Result | None:
        """What can be said before anything runs."""
        try:
            wrong = policy.broken(self.source, self.puzzle.allow, self.puzzle.ban)
        except (SyntaxError, ValueError) as e:
            line = getattr(e, "lineno", None)
            self.outcomes.append(
                Outcome("reading", {}, "syntax_error", str(getattr(e, "msg", e)), line=line,
                        code=(getattr(e, "text", "") or "").strip())
            )  # fmt: skip
            where = f"line {line}: " if line else ""
            return self.result("syntax_error", f"{where}{getattr(e, 'msg', e)}")
        if not wrong:
            return None
        first = wrong[0]
        code = self.source.splitlines()[first.line - 1].strip() if first.line else ""
        self.outcomes.append(
            Outcome("reading", {}, "forbidden", first.sentence, line=first.line, code=code)
        )
        return self.result("forbidden", f"line {first.line}: {first.sentence}")

    def run(self, child: Child, explain: bool, hasty: bool) -> Result:
        self.child = child
        loaded = child.load(self.source)
        if not loaded["ok"]:
            self.outcomes.append(self._failed("importing", {}, loaded))
            return self.result(loaded["verdict"], loaded["detail"], output=child.output())
        for number, case in enumerate(self.cases):
            self.tell(f"case {number + 1} of {len(self.cases)}: {case.name}")
            self.outcomes.append(self.judged(case, number))
            hasty = hasty or self.unchanged
            if self.outcomes[-1].verdict in FATAL or (hasty and not self.outcomes[-1].ok):
                break
        bad = next((o for o in self.outcomes if not o.ok), None)
        if bad is None:
            bad = self.behaviour()
            if bad is not None:
                self.outcomes.append(bad)
        constraints = self.constraints()
        story = None
        if bad is not None and explain and bad.verdict in EXPLAINED and not self.unchanged:
            self.tell("looking for the smallest case that fails")
            story = self.story(bad)
        output = child.output()
        verdict = bad.verdict if bad else "pass"
        detail = f"{bad.detail} (case {bad.case})" if bad and bad.detail else ""
        return self.result(verdict, detail, constraints=constraints, story=story, output=output)

    # One case.

    def arrays(self, case: Workload, number: int) -> dict[str, np.ndarray]:
        """The inputs: of public cases always the same ones, of fresh ones the seed's."""
        public = number < len(self.puzzle.problem.workloads)
        rng = np.random.default_rng([number] if public else [int(self.seed, 16), number])
        return {n: d.draw(rng) for n, d in self.puzzle.problem.inputs(case).items()}

    def judged(self, case: Workload, number: int) -> Outcome:
        return self.verdict(case, self.arrays(case, number))[0]

    def verdict(
        self, case: Workload, arrays: Mapping[str, np.ndarray]
    ) -> tuple[Outcome, "Answer | None"]:
        """Runs one case and judges it."""
        answer = self.child.call(arrays, case.options, self.puzzle.glue)
        if not answer["ok"]:
            return self._failed(case.name, case.sizes, answer), None
        seen, outputs = answer["seen"], answer["outputs"]
        self.seen.append(seen)
        judgement = judged(self.puzzle, case, arrays, outputs, compiled=self.child.gpu)
        bad, error = judgement.bad, judgement.error
        word = detail = ""
        if seen["changed"]:
            word, detail = "input_changed", f"{', '.join(seen['changed'])} changed"
        elif seen["beside"]:
            word, detail = "past_the_end", f"beside {seen['beside'][0]}"
        elif bad is not None:
            word, detail = OF_JUDGE.get(bad.reason, "wrong_value"), bad.detail
            if word == "wrong_value" and (count := judgement.unwritten(outputs, arrays, seen)):
                word = "not_written"
                some = f"{count} elements" if count > 1 else "one element"
                detail = f"never written: {some} of {bad.output}"
        elif seen["foreign"]:
            word, detail = "foreign_work", seen["foreign"][0]
        elif not seen["launches"] and math.prod(case.sizes.values()):
            word, detail = "no_launch", "solve launched no kernel"
        outcome = Outcome(
            case.name, dict(case.sizes), word or "pass", detail, answer["seconds"], error,
            blank=not any(r.any() for r in judgement.truth),
        )  # fmt: skip
        return outcome, Answer(arrays, outputs, judgement)

    def _failed(self, name: str, sizes: Mapping[str, int], answer: Mapping[str, Any]) -> Outcome:
        return Outcome(
            name, dict(sizes), answer["verdict"], answer["detail"],
            line=answer.get("line"), code=answer.get("code") or "",
        )  # fmt: skip

    # What no single case shows.

    def behaviour(self) -> Outcome | None:
        """Memory, chance, and kernels that do not matter: on the largest case."""
        self.tell("the same again, other numbers, and with kernels that do nothing")
        number = max(range(len(self.cases)), key=lambda i: math.prod(self.cases[i].sizes.values()))
        case = self.cases[number]
        arrays = self.arrays(case, number)
        rng = np.random.default_rng([int(self.seed, 16), len(self.cases)])
        others = {n: d.draw(rng) for n, d in self.puzzle.problem.inputs(case).items()}

        def failed(verdict: str, detail: str) -> Outcome:
            return Outcome(case.name, dict(case.sizes), verdict, detail)

        runs = []
        for given in (arrays, others, arrays):
            answer = self.child.call(given, case.options, self.puzzle.glue)
            if not answer["ok"]:
                return self._failed(case.name, case.sizes, answer)
            runs.append(answer["outputs"])
        first, second, third = ([x.tobytes() for x in run] for run in runs)
        if first != third:
            return failed("nondeterministic", "two calls with the same input differ")
        bad = judged(self.puzzle, case, others, runs[1], compiled=self.child.gpu).bad
        if bad is not None and any(a == b for a, b in zip(first, second, strict=False)):
            return failed("cached", "other numbers of the same shape got the same answer")
        if bad is not None:
            return failed("wrong_value", f"on other numbers: {bad.detail}")
        ghost = self.child.call(arrays, case.options, self.puzzle.glue, do="ghost")
        if ghost["ok"] and judged(self.puzzle, case, arrays, ghost["outputs"]).bad is None:
            return failed("no_effect", "the answer is right although no kernel did anything")
        return None

    def constraints(self) -> tuple[Constraint, ...]:
        limits = self.puzzle.limits
        if not self.seen:
            return ()
        launches = max(seen["launches"] for seen in self.seen)
        found = [Constraint("launches", launches, limits.launches, launches <= limits.launches)]
        reads = [s["read"] / s["inputs"] for s in self.seen if s["read"] is not None and s["inputs"]
                 and s["inputs"] >= SMALL]  # fmt: skip
        if reads:
            most = max(reads)
            found.append(Constraint("reads", most, limits.reads, most <= limits.reads * SLACK))
        else:
            found.append(Constraint("reads", None, limits.reads, True))
        return tuple(found)

    # A failure.

    def story(self, bad: Outcome) -> Story | None:
        """The smallest case that fails with the same verdict, and what is wrong there."""
        number = next((i for i, c in enumerate(self.cases) if c.name == bad.case), None)
        if number is None:
            return None
        case, self.until = self.cases[number], time.monotonic() + STORY_SECONDS
        kept: dict[tuple, tuple[Workload, Outcome, Answer | None]] = {}

        def fails(tried: shrink.Case) -> bool:
            try:
                smaller = shrink.resized(self.puzzle.problem, case, tried.sizes)
                arrays = self.arrays(smaller, number)
            except ValueError:
                return False
            outcome, answer = self.verdict(smaller, arrays)
            kept[tried.key] = (smaller, outcome, answer)
            return outcome.verdict == bad.verdict

        start = shrink.Case(dict(case.sizes))
        seen = list(self.seen)
        if not fails(start):  # it only fails after the calls before it
            return None
        found = shrink.shrink(start, (), fails, tries=SHRINK_TRIES, seconds=SHRINK_SECONDS)
        self.seen = seen
        _, _, whole = kept[start.key]
        smallest, _, least = kept[found.case.key]
        diagnosis = self.diagnosis(case, whole)
        small = self.diagnosis(smallest, least, among=())
        if "first_wrong" in small and small["output"] == diagnosis.get("output"):
            diagnosis["first_wrong"] = small["first_wrong"]
        if diagnosis and not diagnosis.get("looks_like"):
            # Several mistakes may explain this case: another one tells them apart.
            for other in self.others(bad):
                name = self.diagnosis(*other).get("looks_like")
                shown = ((case, whole), (smallest, least))
                like = [self.diagnosis(*c, among=(name,)) for c in shown] if name else []
                if name and all(told.get("looks_like") == name for told in like):
                    diagnosis |= {key: like[0][key] for key in ("looks_like", "because")}
                    break
        return Story(
            bad.case, dict(case.sizes), dict(found.case.sizes), found.complete, found.tries,
            diagnosis or None,
        )  # fmt: skip

    def others(self, bad: Outcome) -> Iterator[tuple[Workload, "Answer | None"]]:
        """The largest other cases that failed like this one: many numbers fit by no chance."""
        alike = [
            (case, number)
            for number, (case, o) in enumerate(zip(self.cases, self.outcomes, strict=False))
            if o.verdict == bad.verdict and o.case != bad.case
        ]
        alike.sort(key=lambda pair: -math.prod(pair[0].sizes.values()))
        until = time.monotonic() + OTHERS_SECONDS
        for case, number in alike[:OTHERS]:
            if time.monotonic() > until:
                return
            yield case, self.verdict(case, self.arrays(case, number))[1]

    def diagnosis(
        self, case: Workload, answer: "Answer | None", *, among: tuple[str, ...] | None = None
    ) -> dict[str, Any]:
        """What is wrong with an answer, and which mutant it is like, if only one is.

        among: whether it is like one of these, whatever others explain; None: all of them.
        """
        if answer is None:
            return {}
        bad, problem = answer.judgement.bad, self.puzzle.problem
        if bad is None or bad.reason not in diagnose.REASONS:
            return {}
        with np.errstate(invalid="ignore"):
            of_case = faults.case_of(
                problem, case, "fwd", answer.arrays, answer.judgement.truth, answer.judgement.model
            )
        outputs = tuple(answer.outputs)

        def suspects(_: Any, at: int) -> Any:
            if among == () or self.untouched:
                return
            made = list(self.mutants(answer.arrays, case.options, at, outputs, among))
            if time.monotonic() > self.until:
                return  # one that was not tried may explain it as well
            for name, says, wrong in made:
                if among is not None:
                    yield name, says, wrong
                    continue
                alike = [n for n, _, w in made if np.array_equal(w, wrong, equal_nan=True)]
                if len(alike) == 1 or self.right_elsewhere(alike) == [name]:
                    yield name, says, wrong

        try:
            with np.errstate(invalid="ignore"):  # NaN has no code
                found = diagnose.diagnosis(
                    of_case, answer.judgement.model, outputs, bad, (), suspects
                )
        finally:
            self.child.load(self.source)
        if found and self.untouched:  # zeros and poison have a reason already
            found |= {"looks_like": None, "because": ""}
        if found and "first_wrong" in found:
            found["first_wrong"] |= self.behind(found, answer)
        return found or {}

    def right_elsewhere(self, names: list[str]) -> list[str]:
        """Those of some mutants that are right in the largest case in which the learner is."""
        right = [i for i, o in enumerate(self.outcomes[: len(self.cases)]) if o.ok]
        if not right:
            return names
        number = max(right, key=lambda i: math.prod(self.cases[i].sizes.values()))
        case, arrays = self.cases[number], self.arrays(self.cases[number], number)
        kept = []
        for mutant in self.puzzle.mutants:
            if mutant.name in names:
                self.child.load(mutant.source(self.puzzle, self.backend), other=True)
                made = self.child.call(arrays, case.options, ())
                if made["ok"] and judged(self.puzzle, case, arrays, made["outputs"]).bad is None:
                    kept.append(mutant.name)
        return kept

    def behind(self, found: Mapping[str, Any], answer: "Answer") -> dict[str, str]:
        """Of the first wrong element: the inputs at the same place, and a code in hexadecimal."""
        name, first = found["output"], found["first_wrong"]
        at = tuple(first["index"])
        number = max(range(len(self.cases)), key=lambda i: math.prod(self.cases[i].sizes.values()))
        spec = self.puzzle.problem.outputs(self.cases[number])[name]
        drawn = self.arrays(self.cases[number], number)  # where shapes are not alike by chance
        alike = [n for n, x in drawn.items() if x.shape == tuple(spec.shape)]
        given = [f"{n}{list(at)} is {float(answer.arrays[n][at]):.9g}" for n in alike]
        more = {"given": ", ".join(given)}
        if spec.dtype == "uint8":
            more["looks"] = "" if first["looks"].endswith("times the truth") else first["looks"]
            more["bits"] = f"0x{int(first['got']):02X} where 0x{int(first['expected']):02X} belongs"
        return more

    def mutants(
        self,
        arrays: Mapping[str, np.ndarray],
        options: Mapping[str, Any],
        at: int,
        outputs: tuple[np.ndarray, ...],
        among: tuple[str, ...] | None = None,
    ) -> Iterator[tuple[str, str, np.ndarray]]:
        """What each mutant makes of these inputs: its name, what it does, that output."""
        for mutant in self.puzzle.mutants:
            if self.backend not in mutant.edits or (among and mutant.name not in among):
                continue
            if time.monotonic() > self.until:
                return
            made = self.child.load(mutant.source(self.puzzle, self.backend), other=True)
            made = self.child.call(arrays, options, ()) if made["ok"] else made
            if made["ok"] and len(made["outputs"]) == len(outputs):
                wrong = made["outputs"][at]
                if wrong.shape == outputs[at].shape:
                    yield mutant.name, mutant.says, diagnose.grid(wrong)


SMALL = 1024  # bytes of input from which the share of reads is counted
TIE = 1e-4  # of a code: what a division and three roundings in float32 do to one below 256
SLACK = 1.05  # over the limit on reads: scales and the like are read too


@dataclass(frozen=True)
class Judgement:
    bad: Verdict | None
    error: float
    truth: tuple[np.ndarray, ...]
    model: tuple[np.ndarray, ...]
    specs: tuple[tuple[str, Any], ...]

    def unwritten(
        self,
        outputs: list[np.ndarray],
        arrays: Mapping[str, np.ndarray],
        seen: Mapping[str, Any],
    ) -> int:
        """How many elements of the bad output were never written, if that is all that is wrong."""
        spread = any(x.dtype.kind == "f" and np.isnan(x).any() for x in arrays.values())
        if self.bad is None or (seen["any_nan"] and spread):
            return 0
        at = [name for name, _ in self.specs].index(self.bad.output)
        wrong = np.asarray(outputs[at], np.float64) != self.truth[at]
        blank = unwritten(outputs[at], seen["any_nan"]) & wrong
        near = np.isclose(np.asarray(outputs[at], np.float64), self.truth[at], rtol=1e-2)
        return int(blank.sum()) if (blank | ~wrong | near).all() else 0


@dataclass(frozen=True)
class Answer:
    """What came back for some inputs, and what was found of it."""

    arrays: Mapping[str, np.ndarray]
    outputs: list[np.ndarray]
    judgement: Judgement


def is_near(code: Any, unrounded: Any) -> bool:
    """Whether every code is the nearest whole number, up to what float32 loses on the way."""
    return bool((abs(code - unrounded) <= 0.5 + TIE).all())


def judged(
    puzzle: Puzzle,
    case: Workload,
    arrays: Mapping[str, np.ndarray],
    outputs: list[np.ndarray],
    *,
    compiled: bool = False,
) -> Judgement:
    """The first output that is wrong, if any.

    Floats are judged by parity's rules; exact outputs must be right bit for bit. compiled: on a GPU
    a code may go either way at a tie, where the puzzle says so: Mosaic GPU divides with an error
    of two units in the last place, and compilers make one rounding of a product and a sum.
    """
    problem = puzzle.problem
    specs = problem.outputs(case)
    truth, model = (
        tuple(np.asarray(x, np.float64 if ar.working == "float64" else np.float32)
              for x in problem.oracle(ar, case, **arrays))
        for ar in (Arithmetic.truth(np), Arithmetic.model(np))
    )  # fmt: skip
    told = tuple(specs.items())
    if len(outputs) != len(specs):
        count = f"{len(outputs)} array{'s' * (len(outputs) != 1)}"
        detail = f"solve returned {count}, expected {len(specs)}: {', '.join(specs)}"
        return Judgement(Verdict("outputs", False, "shape", detail), math.nan, truth, model, told)
    found = dict(zip(specs, outputs, strict=True))
    judged_floats = [
        judge(n, found[n], r, m, specs[n], family=problem.family, terms=problem.reduction(case, n))
        for n, r, m in zip(specs, truth, model, strict=True)
        if n not in puzzle.exact
    ]
    bad = next((v for v in judged_floats if not v.ok), None)
    if bad is not None and bad.error == bad.error:
        off = f"{bad.output} is off by {bad.error:.2g} of its size"
        bad = replace(bad, detail=f"{off}, where rounding explains {bad.yardstick:.1g}")
    error = max((v.error for v in judged_floats), default=0.0)
    codes = [
        judge_exact(n, found[n], r, specs[n])
        for n, r in zip(specs, truth, strict=True)
        if n in puzzle.exact
    ]
    off = [v for v in codes if not v.ok]
    if compiled and off and all(v.reason == "probe" for v in off):  # only values differ
        near = puzzle.unrounded(case, arrays, found)
        if near and all(is_near(found[n], x) for n, x in near.items()):
            off = []
    if bad is None and off:
        detail = off[0].detail.replace(" on whole numbers", "").replace(" exactly", "")
        if off[0].reason == "probe":
            got, want = found[off[0].output], truth[[*specs].index(off[0].output)]
            count = int((got != want.astype(got.dtype)).sum())
            share = f"({count} of {got.size} elements are off)"
            detail = re.sub(r"\([\d.]+% of the elements are off\)", share, detail)
        bad = replace(off[0], detail=detail)
    return Judgement(bad, error, truth, model, told)
