"""Measures one problem on one workload: both twins and their peers, beside each other, in one run.

A twin whose check is red is not timed. Everything that is timed runs in alternation, each sample on
a cold cache, and the ceilings of its roof run in between: a copy and a read of the same footprint,
and a dense matrix product.

`rows` yields what it measured, a pass at a time; `Campaign` does many workloads, writes each row
down as soon as it exists, can stop when a budget is spent and go on later.
"""

import importlib.metadata
import inspect
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import array_api_compat

from parity import device, frameworks, record, timing
from parity.check import Check, check
from parity.frameworks import load_target
from parity.record import Row
from parity.spec import PASSES, Problem, Workload
from parity.timing import Budget, Timing

ROUNDS = 20
LAUNCHES = 30
WARM_UP_SECONDS = 0.2
A_PEER_MAY_DIFFER = 0.05  # further from the twins than this, it computes something else

Progress = Callable[[str], None]


@dataclass
class Contender:
    """One implementation on one pass, and what is known of it before it is timed."""

    impl: str
    source: str
    depends: str = ""  # as source, with the file beside it that all kernels share
    call: Callable[[], Any] | None = None
    check: str = "none"
    error: float | None = None
    yardstick: float | None = None
    ulp: Mapping[str, float] | None = None  # the distance between the twins
    compile_s: float | None = None
    launch_us: float | None = None
    launches: list[dict[str, Any]] = field(default_factory=list)  # its kernels one by one
    config: dict[str, Any] = field(default_factory=dict)
    note: str = ""  # why it was not timed


@dataclass(frozen=True)
class Machine:
    """What all rows of a process share."""

    facts: Mapping[str, Any]
    versions: Mapping[str, str]
    commit: str

    @staticmethod
    def here(commit: str | None = None) -> "Machine":
        """Raises NothingSeen where there is no GPU."""
        from parity.frameworks import tracer

        tracer.needs_gpu()
        facts = device.facts()
        return Machine(facts, versions(facts), commit or record.commit())


def bench(problem: Problem, work: Workload, **how: Any) -> list[Row]:
    """All rows of one workload; takes what `rows` takes."""
    return list(rows(problem, work, **how))


def rows(
    problem: Problem,
    work: Workload,
    *,
    impls: Mapping[str, str] | None = None,
    peers: bool = True,
    passes: Sequence[str] | None = None,
    checks: Sequence[Check] | None = None,
    rounds: int = ROUNDS,
    seed: int = 0,
    progress: Progress | None = None,
    machine: Machine | None = None,
) -> Iterator[Row]:
    """Measures a workload, a pass at a time, and yields one row for each twin and peer.

    Args:
        impls: {"triton" or "pallas": "module:function" or "FILE.py:function"}; default: the twins.
        peers: whether to run them too.
        passes: default: those of the workload.
        checks: what `parity.check.check` said of these implementations; None runs it here. Then
            compile times are measured too: before, when nothing has compiled these kernels yet.
        rounds: each contender gets two samples a round.
        progress: called with a short phrase before each step.
        machine: of this process, if the caller has asked for it already.

    Raises:
        NothingSeen: no GPU, or the profiler sees nothing: an error of the environment.
        WarmCache: the cache flush does not work here, so nothing can be timed.
    """
    from parity.frameworks import ceilings

    impls = dict(problem.implementations if impls is None else impls)
    machine = machine or Machine.here()
    tell = progress or (lambda phrase: None)
    for which in passes or work.passes:
        yield from _Pass(problem, work, which, impls, seed, machine, tell).rows(
            peers, checks, rounds
        )
        ceilings.release()


class _Pass:
    """One pass of one workload."""

    def __init__(
        self,
        problem: Problem,
        work: Workload,
        which: str,
        impls: Mapping[str, str],
        seed: int,
        machine: Machine,
        tell: Progress,
    ) -> None:
        self.problem, self.work, self.which = problem, work, which
        self.impls, self.seed, self.machine = impls, seed, machine
        self._progress = tell

    def tell(self, step: str) -> None:
        self._progress(f"{self.problem.stem} {self.work.name} {self.which}: {step}")

    def rows(self, peers: bool, checks: Sequence[Check] | None, rounds: int) -> Iterator[Row]:
        from parity.frameworks import torch as memory
        from parity.frameworks import tracer

        described = self.problem.inputs(self.work) | self.problem.cotangents(self.work)
        self.arrays = memory.draw(described, self.seed)
        self.cost = self.problem.cost_of(self.work, self.which, self.arrays)
        contenders = [
            self._twin(impl, target, checks is None) for impl, target in self.impls.items()
        ]
        self._judge(contenders, checks)
        truth = self._answer(contenders)
        if peers and truth is not None:
            contenders += [self._peer(name, target) for name, target in self.problem.peers.items()]
            for c in contenders[len(self.impls) :]:
                self._compare(c, truth)
        del truth
        running = {c.impl: c.call for c in contenders if c.call is not None}
        if not running:
            yield from (self._row(c, None, None, {}) for c in contenders)
            return
        cost = self.cost
        beside, amount = device.contenders(cost.bytes, self.work.dtype)
        self.tell("timing")
        timings, shared = self._measure(running | beside, rounds)
        launches = tracer.launches(running)
        for c in contenders:
            if c.call is not None:
                c.launch_us, c.launches = _launch_us(c.call), launches[c.impl]
        ceilings = device.ceilings_of(timings, amount)
        limit = device.best_ceilings_of(timings, amount).impossible_us(cost.flops, cost.bytes)
        shared |= {"ceilings": ceilings.to_json()}
        for c in contenders:
            timed = timings.get(c.impl)
            # (what marks a bound, as a dense product of equal FLOPs does, is a roof itself)
            if timed is not None and timed.best_us < limit and "computes" not in c.config:
                c.note = (
                    f"a sample took {timed.best_us:.1f} us, and the roof measured in this run "
                    f"allows no less than {limit:.1f}: the ruler or the cost is wrong"
                )
                timed = None
            roof = ceilings.least_us(cost.flops, cost.bytes)
            yield self._row(c, timed, roof, shared)

    def _twin(self, impl: str, target: str, compiles: bool) -> Contender:
        """The twin's call. compiles: nothing has compiled it before, so time its first run."""
        from parity.frameworks.first_call import first_call

        self.tell(f"{impl} compiles")
        twin = frameworks.twin(impl)
        contender = Contender(impl, "unknown")
        try:
            kernel = twin.load(target)
            contender.source = record.source_hash(kernel.where, self.work.name)
            contender.depends = _depends(kernel.where)
            fn, args, options = frameworks.prepared(
                twin, kernel, self.problem, self.work, self.which, self.arrays
            )
            call, seconds, contender.config = first_call(twin, fn, args, options)
        except Exception as e:
            contender.check, contender.note = "fail:crash", _sentence(e)
            return contender
        contender.call = call
        contender.compile_s = seconds if compiles else None
        return contender

    def _judge(self, contenders: list[Contender], checks: Sequence[Check] | None) -> None:
        """Takes the call from every twin whose check is not green."""
        if checks is None:
            checks = check(
                self.problem,
                self.work,
                impls=self.impls,
                passes=(self.which,),
                seed=self.seed,
                progress=self._progress,
            )
        of_pass = {c.impl: c for c in checks if c.which == self.which}
        for c in contenders:
            verdict = of_pass.get(c.impl)
            if verdict is None:
                c.check, c.note = "fail:unchecked", c.note or "no check was made of it"
            elif not verdict.ok:
                c.check, c.note = f"fail:{verdict.reason}", verdict.detail
            elif not c.check.startswith("fail"):
                c.check = "pass"
            if verdict is not None:
                c.error, c.yardstick, c.ulp = verdict.error, verdict.yardstick, verdict.ulp
            if c.check != "pass":
                c.call = None

    def _answer(self, contenders: list[Contender]) -> tuple[Any, ...] | None:
        """What the first green twin returns."""
        call = next((c.call for c in contenders if c.call is not None), None)
        return None if call is None else _harness(call())

    def _peer(self, name: str, target: str) -> Contender:
        self.tell(f"peer {name}")
        inputs = {n: self.arrays[n] for n in self.problem.inputs(self.work)}
        cotangents = {n: self.arrays[n] for n in self.problem.cotangents(self.work)}
        make, _ = load_target(target)
        contender = Contender(f"peer:{name}", record.hashed(inspect.getsource(make)))
        try:
            contender.call = make(self.which, inputs, cotangents, self.work.options)
        except Exception as e:
            contender.note = _sentence(e)
            return contender
        if contender.call is None:
            contender.note = "not installed here, or without this pass"
        contender.config = getattr(contender.call, "config", {})
        return contender

    def _compare(self, c: Contender, truth: tuple[Any, ...] | None) -> None:
        """A peer that answers another question is not beside anything, unless it says which."""
        if c.call is None or truth is None or "computes" in c.config:
            return
        try:
            answer = _harness(c.call())
            apart = max(_distance(y, r) for y, r in zip(answer, truth, strict=True))
        except Exception as e:
            c.call, c.note = None, _sentence(e)
            return
        if not apart <= A_PEER_MAY_DIFFER:  # NaN is no answer either
            c.call, c.note = None, f"computes something else: {apart:.2g} from the twin"

    def _measure(
        self, calls: Mapping[str, Callable[[], Any]], rounds: int
    ) -> tuple[dict[str, Timing], Row]:
        from parity.frameworks import tracer

        read = device.reader(self.machine.facts["uuid"])
        readings: list[device.Reading | None] = []
        end = time.monotonic() + WARM_UP_SECONDS
        while time.monotonic() < end:
            for call in calls.values():
                tracer.wait_for(call())

        def during(i: int) -> None:
            if i % (2 * len(calls)) == i // (2 * len(calls)) % len(calls):
                readings.append(read())

        control = device.prove_cold(tracer.cold, self.machine.facts["hbm_gbps"])
        timings = timing.measure(calls, lambda cs: tracer.cold(cs, during), rounds=rounds)
        run = record.identity(when=time.time(), process=os.getpid())
        return timings, {"run": run, "clocks": device.clocks(readings), "control": control}

    def _row(
        self, c: Contender, timed: Timing | None, roof: float | None, shared: Mapping[str, Any]
    ) -> Row:
        cost = self.cost
        us = timed.us if timed else None
        row = {
            "schema": record.SCHEMA,
            "problem": self.problem.stem,
            "workload": self.work.name,
            "pass": self.which,
            "dtype": self.work.dtype,
            "impl": c.impl,
            "device": self.machine.facts["name"],
            "check": c.check,
            "error": c.error,
            "yardstick": c.yardstick,
            "us": us.to_json() if us else None,
            "busy_us": timed.busy_us if timed else None,
            "launch_us": c.launch_us if timed else None,
            "compile_s": c.compile_s,
            "flops": cost.flops,
            "bytes": cost.bytes,
            "roof": roof / us.p50 if us and roof else None,
            "ceilings": shared.get("ceilings"),
            "config": c.config,
            "versions": dict(self.machine.versions),
            "commit": self.machine.commit,
            "source": c.source,
            "when": record.now(),
            "sizes": dict(self.work.sizes),
            "identity": identity(
                self.problem, self.work, self.which, self.machine, c.impl, c.depends or c.source
            ),
            "samples": len(timed.samples) if timed else 0,
            "kernels": list(timed.kernels) if timed else [],
            "ulp": c.ulp,
            "launches": c.launches if timed else [],
            "facts": dict(self.machine.facts),
        } | {k: v for k, v in shared.items() if k != "ceilings"}
        return row | ({"note": c.note} if c.note else {})


def identity(
    problem: Problem, work: Workload, which: str, machine: Machine, impl: str, source: str
) -> str:
    """What a result depends on, the commit apart: equal identities need no second measurement."""
    return record.identity(
        schema=record.SCHEMA,
        key=[problem.stem, work.name, which, work.dtype, impl],
        sizes=dict(work.sizes),
        options=dict(work.options),
        source=source,
        device=machine.facts["name"],
        versions=dict(machine.versions),
    )


@dataclass(frozen=True)
class Step:
    """One pass of one workload: what is measured in one run, or not at all."""

    problem: Problem
    work: Workload
    which: str


class Campaign:
    """Measures many workloads into record files, within a budget, from where it was left.

        campaign = Campaign(pairs, budget=540, resume=True)
        for row in campaign: ...           # already written down
        campaign.left                      # the steps that did not fit

    Args:
        pairs: (problem, workload), in order.
        out: a file for all rows; default: parity/records/<device>/<stem>.jsonl.
        resume: leave out steps whose rows stand already, from the same sources and versions.
        budget: seconds; a step starts only if one as long as the longest so far still fits.
        started: called with (number of the step from 1, number of steps, step) as it starts.
        how: for `rows`: impls, peers, rounds, seed, progress.

    Raises (while iterating): NothingSeen, WarmCache.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Problem, Workload]],
        *,
        out: Path | None = None,
        resume: bool = False,
        budget: float | None = None,
        passes: Sequence[str] = PASSES,
        started: Callable[[int, int, Step], None] | None = None,
        machine: Machine | None = None,
        clock: Callable[[], float] = time.monotonic,
        **how: Any,
    ) -> None:
        self.machine = machine or Machine.here()
        self.out, self.how, self._clock, self._started = out, how, clock, started
        steps = [Step(p, w, which) for p, w in pairs for which in w.passes if which in passes]
        self.standing = [s for s in steps if resume and self._stands(s)]
        self.left = [s for s in steps if s not in self.standing]
        self._budget = Budget(budget, clock)

    def path(self, problem: Problem) -> Path:
        return self.out or record.path_for(self.machine.facts["name"], problem.stem)

    def __iter__(self) -> Iterator[Row]:
        total = len(self.left)
        while self.left and self._budget.fits():
            step = self.left[0]
            if self._started is not None:
                self._started(total - len(self.left) + 1, total, step)
            began = self._clock()
            # a pass stands or falls as one run, so its rows are written together
            found = list(
                rows(
                    step.problem,
                    step.work,
                    passes=(step.which,),
                    machine=self.machine,
                    **self.how,
                )
            )
            for row in found:
                record.append(self.path(step.problem), row)
            self.left.pop(0)
            self._budget.spent(self._clock() - began)
            yield from found

    def _stands(self, step: Step) -> bool:
        stands = record.read(self.path(step.problem)).latest
        impls = dict(self.how.get("impls") or step.problem.implementations)
        sources = {impl: _twin_source(impl, target) for impl, target in impls.items()}
        if self.how.get("peers", True):
            sources |= {
                f"peer:{name}": record.hashed(inspect.getsource(load_target(target)[0]))
                for name, target in step.problem.peers.items()
            }
        runs = set()
        for impl, source in sources.items():
            key = (step.problem.stem, step.work.name, step.which, step.work.dtype, impl)
            row = stands.get(key)
            wanted = identity(step.problem, step.work, step.which, self.machine, impl, source)
            if row is None or row.get("identity") != wanted or row["check"].startswith("fail"):
                return False
            runs.add(row.get("run"))
        return len(runs) == 1  # beside each other, or not at all


def _depends(where: str) -> str:
    """A kernel's files and the `_lib` beside them, hashed."""
    files = [*record.files_of(where), Path(where).with_name("_lib.py")]
    return record.hashed(b"".join(f.read_bytes() for f in files if f.is_file()))


def _twin_source(impl: str, target: str) -> str:
    try:
        return _depends(frameworks.twin(impl).load(target).where)
    except Exception:  # it will fail its check and say why
        return "unknown"


def versions(facts: Mapping[str, Any]) -> dict[str, str]:
    """Of everything that a time depends on and that is installed."""
    names = "torch triton jax jaxlib jax-cuda13-plugin numpy nvidia-cublas".split()
    names += "liger-kernel gemlite conch-triton-kernels fla-core mamba-ssm".split()
    found = {"python": platform.python_version(), "driver": str(facts.get("driver", ""))}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _launch_us(call: Callable[[], Any]) -> float:
    """Microseconds of the host from calling to returning, while the device has nothing to do."""
    from parity.frameworks import tracer

    taken = []
    for _ in range(LAUNCHES):
        start = time.perf_counter()
        out = call()
        taken.append(time.perf_counter() - start)
        tracer.wait_for(out)
    return 1e6 * timing.quantile(taken, 0.5)


def _harness(out: Any) -> tuple[Any, ...]:
    """Outputs of either framework as harness arrays."""
    outs = out if isinstance(out, (tuple, list)) else (out,)
    return tuple(
        frameworks.twin("pallas" if hasattr(x, "block_until_ready") else "triton").harness(x)
        for x in outs
    )


def _distance(y: Any, r: Any) -> float:
    """||y - r|| / ||r||, in float32."""
    xp = array_api_compat.array_namespace(y, r)
    if y.shape != r.shape:
        return float("inf")
    y, r = xp.astype(y, xp.float32), xp.astype(r, xp.float32)
    return float(xp.linalg.vector_norm(y - r) / xp.linalg.vector_norm(r))


def _sentence(e: Exception) -> str:
    first = str(e).strip().splitlines() or [""]
    cause = f" ({_sentence(e.__cause__)})" if isinstance(e.__cause__, Exception) else ""
    return f"{type(e).__name__}: {first[0][:300]}{cause}"
