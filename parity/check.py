"""Checks both twins of a problem on one workload: every rule, one row per pass and twin.

For each pass the order is: a decoy (other inputs of the same sizes, so that a remembered answer
shows), the run that is judged, the same run again (bit for bit equal), the exact probe on whole
numbers where the problem has one, and the witness (who did the work). Then the twins are compared
with each other.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple

import array_api_compat

from parity import frameworks
from parity.frameworks import Kernel
from parity.judge import (
    Verdict,
    answer,
    judge,
    judge_exact,
    judge_twins,
    limit,
    truth_and_model,
    ulp_histogram,
)
from parity.spec import Arithmetic, Array, Descriptor, Given, Problem, Workload

LOADING = "load"  # the output of a verdict on an implementation that could not be imported


@dataclass(frozen=True)
class Check:
    """What was found for one implementation on one pass of one workload."""

    problem: str
    workload: str
    which: str  # the pass
    impl: str
    dtype: str
    ok: bool
    reason: str
    detail: str
    error: float  # the largest error over its yardstick decides which output is reported here
    yardstick: float
    verdicts: tuple[Verdict, ...]
    seconds: float
    ulp: Mapping[str, float] | None = None  # distance between the twins, in units in the last place
    diagnosis: Mapping[str, Any] | None = None  # of a wrong answer: see parity.diagnose

    def to_json(self) -> dict:
        return asdict(self)


def check(
    problem: Problem,
    work: Workload,
    *,
    impls: Mapping[str, str | Kernel] | None = None,
    passes: tuple[str, ...] | None = None,
    seed: int = 0,
    repeats: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Check]:
    """Checks implementations of `problem` on `work`; a failure is a row, never an exception.

    Args:
        impls: {"triton" or "pallas": a Kernel, "module:function" or "FILE.py:function"}; default:
            the twins.
        passes: default: those of the workload. seed: of the inputs. repeats: runs that must agree
        bit for bit; default 3 on a GPU, 1 in the interpreters, which run in order. progress: called
        with a short phrase before each step.

    Returns:
        One Check per pass and implementation, in that order.
    """
    from parity.frameworks import torch as memory

    impls = dict(problem.implementations if impls is None else impls)
    repeats = repeats or (1 if frameworks.interpreted() else 3)
    tell = progress or (lambda phrase: None)
    rows: list[Check] = []
    for which in passes or work.passes:
        specs = problem.results(work, which)
        arrays = memory.draw(_described(problem, work), seed)
        tell(f"{problem.stem} {work.name} {which}: float64 oracle")
        truth, model = truth_and_model(problem, work, which, _seen(problem, work, which, arrays))
        results: dict[str, tuple[Any, ...]] = {}
        for impl, target in impls.items():
            tell(f"{problem.stem} {work.name} {which}: {impl}")
            start = time.perf_counter()
            memory.release()
            subject = _Subject(problem, work, which, frameworks.twin(impl), target)
            try:
                verdicts, outputs = subject.judged(arrays, seed, repeats, truth, model, specs)
                results[impl] = outputs
            except Exception as e:
                verdicts = [_crashed(e)]
            row = _row(problem, work, which, impl, verdicts, time.perf_counter() - start)
            rows.append(replace(row, diagnosis=None if row.ok else subject.diagnosis(verdicts)))
        if len(results) == 2 and all(row.ok for row in rows[-2:]):
            rows[-2:] = _compared(problem, work, rows[-2:], results, truth, specs)
    return rows


class _Evidence(NamedTuple):
    """An answer that was judged, and how to ask for it again."""

    arrays: Mapping[str, Any]
    truth: tuple[Any, ...]
    model: tuple[Any, ...]
    outputs: tuple[Any, ...]
    call: tuple[Kernel, Callable, list, dict]


class _Subject:
    """One implementation on one pass of one workload."""

    def __init__(
        self, problem: Problem, work: Workload, which: str, twin: ModuleType, target: str | Kernel
    ) -> None:
        self.problem, self.work, self.which, self.twin = problem, work, which, twin
        self.target = target
        self.evidence: _Evidence | None = None

    def judged(
        self,
        arrays: Mapping[str, Any],
        seed: int,
        repeats: int,
        truth: tuple,
        model: tuple,
        specs: Mapping[str, Array],
    ) -> tuple[list[Verdict], tuple[Any, ...]]:
        from parity.frameworks import torch as memory

        twin, problem, work = self.twin, self.problem, self.work
        target = self.target
        try:
            kernel = target if isinstance(target, Kernel) else twin.load(target)
        except Exception as e:
            return [replace(_crashed(e), output=LOADING)], ()
        other: dict[str, Any] = {}
        decoy: tuple[Any, ...] = ()
        remembered: list[Any] = []
        # Other inputs of the same sizes first, so that a remembered answer shows. The interpreters
        # are slow: there the forward tells for both passes where no exact probe needs the run.
        probe = problem.probe(work) if problem.probe else None
        if self.which == "fwd" or probe or not frameworks.interpreted():
            other = memory.draw(probe or self._described(work), seed + 1)
            decoy = self._call(kernel, other)
            remembered = [memory.fingerprint(twin.harness(y)) for y in decoy]
            if not (probe and frameworks.interpreted()):  # huge arrays would not fit twice
                other, decoy = {}, ()
            memory.release()
        fn, args, options = self._pass(kernel, arrays)
        read = _leaves([*args, *options.values()])
        before = [memory.fingerprint(twin.harness(x)) for x in read]
        out = self._outputs(fn, args, options)
        if before != [memory.fingerprint(twin.harness(x)) for x in read]:
            return [Verdict("inputs", False, "mutated", "an input was written to")], ()
        if len(out) != len(specs):
            detail = f"returned {len(out)} arrays, expected {len(specs)}: {', '.join(specs)}"
            return [Verdict("outputs", False, "shape", detail)], ()
        ordered = [name not in problem.unordered for name in specs]
        for _ in range(repeats - 1):
            again = self._outputs(fn, args, options)
            same = list(map(twin.same_bits, out, again))
            del again  # huge results would not fit three times
            if not all(s for s, fixed in zip(same, ordered, strict=True) if fixed):
                detail = "two runs on the same inputs differ"
                return [Verdict("outputs", False, "nondeterministic", detail)], ()
        outputs = tuple(twin.harness(x) for x in out)
        call = (kernel, fn, args, options)
        self.evidence = _Evidence(arrays, truth, model, outputs, call)
        verdicts = [
            judge(n, y, r, m, s, family=problem.family, terms=problem.reduction(work, n))
            for (n, s), y, r, m in zip(specs.items(), outputs, truth, model, strict=True)
        ]
        # (all NaN or all zero is the same for any inputs: that is no memory)
        xp = array_api_compat.array_namespace(outputs[0])
        drawn = (self._described(work)[n] for n in problem.reads(work, self.which))
        if (
            not all(v.ok for v in verdicts)
            and not all(isinstance(d, Given) for d in drawn)  # these have no other values
            and bool(xp.min(outputs[0]) < xp.max(outputs[0]))
            and any(memory.fingerprint(y) == r for y, r in zip(outputs, remembered, strict=False))
        ):
            detail = "the answer is that of an earlier call with other inputs"
            return [Verdict("outputs", False, "cached", detail)], ()
        if probe and all(v.ok for v in verdicts):
            other = other or memory.draw(probe, seed + 1)
            verdicts += self._probed(other, decoy or self._call(kernel, other), specs, call)
        # (where there is nothing to compute, nobody has to launch anything)
        asked = problem.launches(self.which) and problem.cost(work, self.which).flops
        if all(v.ok for v in verdicts) and asked:
            wrong = twin.witness(fn, args, options, problem.glue, share="model" in work.tags)
            verdicts += [Verdict("witness", False, "witness", sentence) for sentence in wrong]
        return verdicts, outputs

    def _described(self, work: Workload) -> dict[str, Descriptor]:
        return _described(self.problem, work)

    def _pass(self, kernel: Kernel, arrays: Mapping[str, Any]) -> tuple[Callable, list, dict]:
        """The function of this pass, its native arguments and its options."""
        subject = (self.twin, kernel, self.problem, self.work, self.which)
        fn, args, options = frameworks.prepared(*subject, arrays)
        return _first_of(kernel.fwd) if self.which == "fwd" else fn, args, options

    def _outputs(self, fn: Callable, args: list, options: dict) -> tuple[Any, ...]:
        if self.which == "fwd" and frameworks.interpreted():
            # What the backward's preparation runs: an interpreter compiles for seconds, and the
            # residuals are small.
            out, _ = self.twin.run(vars(fn)["whole"], args, options)
        else:
            out = self.twin.run(fn, args, options)
        return self.twin.outputs_of(out)

    def _call(self, kernel: Kernel, arrays: Mapping[str, Any]) -> tuple[Any, ...]:
        return self._outputs(*self._pass(kernel, arrays))

    def _probed(
        self,
        arrays: Mapping[str, Any],
        out: tuple[Any, ...],
        specs: Mapping[str, Array],
        call: tuple[Kernel, Callable, list, dict],
    ) -> list[Verdict]:
        """The exact probe: on whole numbers the answer is the oracle's, bit for bit."""
        seen = _seen(self.problem, self.work, self.which, arrays)
        ar = Arithmetic.truth(array_api_compat.array_namespace(*seen.values()))
        truth = answer(self.problem, self.work, self.which, seen, ar)
        out = tuple(map(self.twin.harness, out))
        verdicts = [
            judge_exact(n, y, r, s) for (n, s), y, r in zip(specs.items(), out, truth, strict=True)
        ]
        if not all(v.ok for v in verdicts):
            self.evidence = _Evidence(arrays, truth, truth, out, call)
        return verdicts

    def diagnosis(self, verdicts: list[Verdict]) -> dict[str, Any] | None:
        """What is wrong with the answer that these verdicts failed, if there is one to look at."""
        from parity import diagnose, faults
        from parity.frameworks.tiles import tiles

        bad = next(v for v in verdicts if not v.ok)
        if self.evidence is None or bad.reason not in diagnose.REASONS:
            return None
        arrays, truth, model, outputs, (kernel, fn, args, options) = self.evidence
        try:
            seen = _seen(self.problem, self.work, self.which, arrays)
            case = faults.case_of(self.problem, self.work, self.which, seen, truth, model)
            configs = tiles(self.twin, kernel, fn, args, options)
            return diagnose.diagnosis(case, model, outputs, bad, configs)
        except Exception as e:  # whatever a wrong kernel makes of this, the verdict stands
            return {"failed": f"{type(e).__name__}: {e}"}


def _described(problem: Problem, work: Workload) -> dict[str, Descriptor]:
    return {**problem.inputs(work), **problem.cotangents(work)}


def _seen(
    problem: Problem, work: Workload, which: str, arrays: Mapping[str, Any]
) -> dict[str, Any]:
    """What the oracle of one pass reads."""
    return {n: arrays[n] for n in problem.reads(work, which)}


_FIRST: dict[Callable, Callable] = {}


def _first_of(fwd: Callable) -> Callable:
    """X_fwd's outputs without its residuals; one object per kernel, so that jit's caches hold."""
    if fwd not in _FIRST:

        def outputs(*args: Any, **options: Any) -> Any:
            return fwd(*args, **options)[0]

        vars(outputs)["whole"] = fwd
        _FIRST[fwd] = outputs
    return _FIRST[fwd]


def _leaves(args: list) -> list[Any]:
    flat: list[Any] = []
    for x in args:
        if isinstance(x, (tuple, list)):
            flat += _leaves(list(x))
        elif hasattr(x, "dtype"):
            flat.append(x)
    return flat


def _crashed(e: Exception) -> Verdict:
    reason = getattr(e, "parity_reason", "crash")  # a data race says so itself
    first = str(e).strip().splitlines() or [""]
    return Verdict("call", False, reason, f"{type(e).__name__}: {first[0][:300]}")


def _row(
    problem: Problem, work: Workload, which: str, impl: str, verdicts: list[Verdict], seconds: float
) -> Check:
    bad = next((v for v in verdicts if not v.ok), None)
    judged = [v for v in verdicts if v.yardstick == v.yardstick]
    worst = bad or max(judged, key=lambda v: v.error / (v.yardstick + 1e-6), default=verdicts[0])
    return Check(
        problem.stem,
        work.name,
        which,
        impl,
        work.dtype,
        bad is None,
        bad.reason if bad else "",
        bad.detail if bad else "",
        worst.error,
        worst.yardstick,
        tuple(verdicts),
        seconds,
    )


def _compared(
    problem: Problem,
    work: Workload,
    rows: list[Check],
    results: Mapping[str, tuple[Any, ...]],
    truth: tuple,
    specs: Mapping[str, Array],
) -> list[Check]:
    """Adds the distance between the twins to their rows; too far apart fails both."""
    first, second = results.values()
    ulp: dict[str, float] = {}
    verdicts = []
    for i, (name, spec) in enumerate(specs.items()):
        star = next(v.yardstick for v in rows[0].verdicts if v.output == name)
        bound = limit(problem.family, spec, star, problem.reduction(work, name))
        verdicts.append(judge_twins(name, first[i], second[i], truth[i], star, spec, bound))
        if i == 0:
            ulp = ulp_histogram(first[0], second[0])
    bad = next((v for v in verdicts if not v.ok), None)
    apart = {"ulp": ulp or None}
    if bad is not None:
        apart |= {"ok": False, "reason": bad.reason, "detail": bad.detail}
    return [
        replace(row, verdicts=(*row.verdicts, *((bad,) if bad else ())), **apart) for row in rows
    ]
