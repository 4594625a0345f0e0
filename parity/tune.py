"""Search over Configs: which tile sizes make a twin fastest, on this device, at these sizes.

A Config is tried in three steps, and each may end it. The compile gate compiles it, which costs no
time on a GPU: too much shared memory, spills, serialised wgmma. Then it runs once, and the judge
compares its answer with the float64 oracle: a fast wrong Config is worth nothing. Then the ruler
times it, beside the present default and the other Configs of its batch, on a cold cache.

Coordinate descent changes one field at a time and keeps what is faster, until no single field
improves. Where two fields must change together it can stop short of the best; an exhaustive search
does not. The winner must pass the whole check and be FASTER than the default in the ruler's sense,
in a longer run side by side. Otherwise the default stands.

Everything that was tried is in parity/tuned/<device>/<stem>.<twin>.json, written as it is found, so
that a run that was cut goes on where it stopped: the same search over what is known already.
"""

import inspect
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from parity import frameworks, record, rungs, timing
from parity.compile import CompileRow, Trial, compile_trials, find_sass
from parity.space import Axes, Config, axes, grid, star
from parity.spec import Problem, Workload, dtype_name
from parity.timing import FASTER, Budget, Interval, verdict

TUNED = Path(__file__).parent / "tuned"
SCHEMA = 1
STEP = timing.APART / 2  # a smaller gain is no reason to move: it is noise
ROUNDS, FINAL_ROUNDS = 6, 20  # of the search, and of the last run against the default
WARM_UP_SECONDS = 0.1
BESIDE = 6  # Configs of one run, beside the default
FINALISTS = 3

Row = dict[str, Any]
Key = tuple[tuple[str, int], ...]
Costs = Callable[[list[Config]], dict[Key, float]]
Tell = Callable[[str], None]


def key(config: Config) -> Key:
    return tuple(config.items())


class OutOfTime(Exception):
    """The budget has no room for another step."""


# The search: nothing here knows a GPU. `costs` says what each Config costs, beside each other; a
# Config that it leaves out cannot be used.


def descend(
    start: Config,
    axes: Axes,
    costs: Costs,
    foresee: Callable[[list[Config]], None] = lambda configs: None,
) -> Config:
    """Changes one field at a time, to its best value, until no field improves by over STEP.

    The answer is the best of its own star: no single field makes it better. foresee: called with
    the Configs that come next, so that they can be compiled together.
    """
    best, at = start, costs([start]).get(key(start), math.inf)
    while True:
        before = best
        foresee(star(best, axes))
        for name, values in axes.items():
            found = costs([best | {name: v} for v in values if v != best[name]])
            least = min(found, key=lambda k: found[k], default=None)
            if least is not None and found[least] < (1 - STEP) * at:
                best, at = dict(least), found[least]
        if best == before:
            return best


def exhaust(
    start: Config,
    axes: Axes,
    costs: Costs,
    foresee: Callable[[list[Config]], None] = lambda configs: None,
) -> Config:
    """The best of all Configs of the space, nearest to the start first."""
    everything = grid(start, axes)
    found: dict[Key, float] = {}
    for first in range(0, len(everything), 8 * BESIDE):
        part = everything[first : first + 8 * BESIDE]
        foresee(part)
        found |= costs(part)
    return dict(min(found, key=lambda k: found[k]))


SEARCHES = {"descent": descend, "exhaustive": exhaust}


# What the search needs of a machine.


@runtime_checkable
class Subject(Protocol):
    """One pass of one twin on one workload; None stands for the present default."""

    asks: list[Row]  # what default_config was asked, what it and its ladder answered

    def refuses(self, config: Config) -> str: ...
    def prepare(self, config: Config | None) -> tuple[str, str]: ...
    def time(self, configs: Sequence[Config], rounds: int) -> tuple[list[Interval], Interval]: ...
    def confirm(self, config: Config) -> str: ...


Gate = Callable[[list[Config]], list[tuple[str, str]]]
GOOD = ("", "")


@dataclass(frozen=True, eq=False)  # a key of dictionaries: one object for one task
class Task:
    problem: Problem
    work: Workload
    which: str
    twin: str

    @property
    def name(self) -> str:
        return f"{self.work.name} {self.which} {self.twin}"


@dataclass
class Entry:
    """All that is known of one task: a JSON object of the results."""

    row: Row
    known: dict[Key, Row] = field(default_factory=dict)

    @staticmethod
    def of(row: Row) -> "Entry":
        return Entry(row, {key(c["config"]): c for c in row["configs"]})

    @staticmethod
    def new(task: Task, source: str) -> "Entry":
        row = {
            "workload": task.work.name,
            "pass": task.which,
            "dtype": task.work.dtype,
            "sizes": dict(task.work.sizes),
            "options": dict(task.work.options),
            "source": source,
            "versions": None,
            "commit": "",
            "when": "",
            "search": "",
            "finished": False,
            "start": {},
            "space": {},
            "asks": [],
            "winner": None,
            "why": "",
            "configs": [],
        }
        return Entry(row)

    def says_of(self, task: Task, source: str, versions: Mapping[str, str] | None) -> bool:
        """Whether it is about this task as it is now. versions: None where nothing is timed."""
        same = (
            self.row["source"] == source
            and self.row["dtype"] == task.work.dtype
            and self.row["sizes"] == dict(task.work.sizes)
            and self.row["options"] == dict(task.work.options)
        )
        timed = self.row["versions"]
        return same and (timed is None or versions is None or timed == dict(versions))

    def note(self, config: Config, **what: Any) -> Row:
        """Writes down what was found of a Config."""
        row = self.known.get(key(config))
        if row is None:
            row = self.known[key(config)] = {"config": dict(config)}
            self.row["configs"].append(row)
        row.update(what)
        return row

    def prune(self, config: Config, kind: str, why: str) -> None:
        row = self.note(config)
        for name in [name for name in row if name != "config"]:
            del row[name]
        # (where in the kernel file is of no interest here)
        row.update({"pruned": kind, "why": re.sub(r" \(\w+\.py:\d+: .*", "", why)[:160]})

    @property
    def pruned(self) -> dict[str, int]:
        """Kind -> how many Configs it ended, the most frequent first."""
        count: dict[str, int] = {}
        for row in self.row["configs"]:
            if "pruned" in row:
                count[row["pruned"]] = count.get(row["pruned"], 0) + 1
        return dict(sorted(count.items(), key=lambda item: -item[1]))

    @property
    def measured(self) -> list[Row]:
        """The timed Configs, the fastest first."""
        return sorted((c for c in self.row["configs"] if "us" in c), key=lambda c: c["share"])

    @property
    def waiting(self) -> list[Row]:
        """Configs that passed the gate and were not timed."""
        return [c for c in self.row["configs"] if "us" not in c and "pruned" not in c]


class Tuner:
    """One task, from what is known of it to the end of its search."""

    def __init__(
        self,
        entry: Entry,
        subject: Subject,
        gate: Gate,
        *,
        budget: Budget | None = None,
        save: Callable[[], None] = lambda: None,
        tell: Tell = lambda phrase: None,
    ) -> None:
        self.entry, self.subject, self.gate = entry, subject, gate
        self.budget, self.save, self.tell = budget or Budget(None), save, tell
        self._default_config: Config | None = None

    def run(self, axes_of: Callable[[Config], Axes], search: str = "descent") -> None:
        """Searches from the default, and writes the winner (or why there is none) into the entry.

        Raises:
            OutOfTime: the budget is spent; what was measured is in the entry.
            ValueError: the default itself is wrong: there is nothing to compare with.
        """
        self._spend(self._default)
        start = dict(self.entry.row["asks"][0]["default"])
        axes = axes_of(start)
        space = {n: list(v) for n, v in axes.items()}
        self.entry.row |= {"search": search, "start": start, "space": space}
        SEARCHES[search](start, axes, self.costs, self.foresee)
        self._spend(self._decide)
        self.entry.row |= {"finished": True, "when": record.now()}
        self.save()

    def _default(self) -> None:
        self.tell("the present default")
        kind, why = self.subject.prepare(None)
        if kind:
            raise ValueError(f"the present default is no measure of anything: {why}")
        if not self.subject.asks:
            raise ValueError("the kernel did not ask its default_config: no Config to start from")
        self.entry.row["asks"] = self.subject.asks
        defaults = [ask["default"] for ask in self.subject.asks]
        # (several products of one pass may have several defaults: then none of them is the start)
        self._default_config = defaults[0] if all(d == defaults[0] for d in defaults) else None
        if self._default_config is not None:
            self.entry.note(self._default_config, share=1.0)

    def foresee(self, configs: list[Config]) -> None:
        """Refuses what its Config refuses, and compiles the rest together."""
        new = [c for c in configs if key(c) not in self.entry.known]
        for config in new:
            if why := self.subject.refuses(config):
                self.entry.prune(config, "refused", why)
        new = [c for c in new if key(c) not in self.entry.known]
        if not new:
            return
        self._spend(partial(self._compile, new))

    def _compile(self, configs: list[Config]) -> None:
        self.tell(f"the compile gate: {len(configs)} Configs")
        for config, (kind, why) in zip(configs, self.gate(configs), strict=True):
            if kind:
                self.entry.prune(config, kind, why)
            else:
                self.entry.note(config)
        self.save()

    def costs(self, configs: list[Config]) -> dict[Key, float]:
        """The share of the default's time that each Config takes; measures what is not known."""
        self.foresee(configs)
        new = [c for c in configs if self._wanted(c)]
        for first in range(0, len(new), BESIDE):
            self._spend(partial(self._measure, new[first : first + BESIDE]))
        rows = [self.entry.known[key(c)] for c in configs]
        return {key(row["config"]): row["share"] for row in rows if "share" in row}

    def _wanted(self, config: Config) -> bool:
        row = self.entry.known[key(config)]
        return "share" not in row and "pruned" not in row

    def _measure(self, configs: list[Config]) -> None:
        ready = []
        for config in configs:
            self.tell(f"runs {_short(config, self.entry.row['asks'])}")
            # If it hangs, or takes the process down, the next run leaves it alone.
            self.entry.row["under_way"] = config
            self.save()
            try:
                kind, why = self.subject.prepare(config)
            finally:
                del self.entry.row["under_way"]
            if kind:
                self.entry.prune(config, kind, why)
            else:
                ready.append(config)
        if ready:
            self.tell(f"times {len(ready)} beside the default")
            found, default = self.subject.time(ready, ROUNDS)
            if self._default_config is not None:
                self.entry.note(self._default_config, us=default.to_json())
            for config, us in zip(ready, found, strict=True):
                self.entry.note(
                    config,
                    us=us.to_json(),
                    default_us=default.to_json(),
                    share=us.p50 / default.p50,
                )
        self.save()

    def _decide(self) -> None:
        """The winner: the fastest of a longer run that is FASTER than the default and right."""
        # (half of what a winner needs: the shorter runs of the search are noisier)
        better = [c for c in self.entry.measured if c["share"] < 1 - STEP]
        if not better:
            least = min((c["share"] for c in self.entry.measured), default=1.0)
            why = f"no Config is faster than the default: the best takes {least:.3f} of its time"
            self.entry.row |= {"winner": None, "why": why}
            return
        self.tell("the last run against the default")
        configs = [row["config"] for row in better[:FINALISTS]]
        # (a resumed run has not called them yet)
        configs = [c for c in configs if self.subject.prepare(c) == GOOD]
        found, default = self.subject.time(configs, FINAL_ROUNDS)
        said = "no Config is FASTER than the default"
        for us, config in sorted(zip(found, configs, strict=True), key=lambda pair: pair[0].p50):
            said_here = verdict(us, default)
            share = us.p50 / default.p50
            if said_here != FASTER:
                said = f"{said}: the best is {said_here} at {share:.3f} of its time"
                break
            if why := self.subject.confirm(config):
                self.entry.prune(config, "wrong", why)
                continue
            self.entry.row |= {
                "why": "",
                "winner": {
                    "config": dict(config),
                    "us": us.to_json(),
                    "default_us": default.to_json(),
                    "share": share,
                    "verdict": said_here,
                },
            }
            return
        self.entry.row |= {"winner": None, "why": said}

    def _spend(self, step: Callable[[], None]) -> None:
        if not self.budget.fits():
            raise OutOfTime
        began = time.monotonic()
        step()
        self.budget.spent(time.monotonic() - began)


def _short(config: Config, asks: list[Row]) -> str:
    """The fields in which a Config differs from the default."""
    default = asks[0]["default"] if asks else {}
    return " ".join(f"{n}={v}" for n, v in config.items() if default.get(n) != v) or "the default"


# The compile gate, for Configs.


def through_gate(
    trials: Sequence[tuple[Task, Config]],
    *,
    jobs: int = 1,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[tuple[str, str]]:
    """(kind, why) of each Config: ("", "") for one that compiles as it should."""
    found = compile_trials([_trial(*t) for t in trials], jobs=jobs, progress=progress)
    return [sorted_out(rows) for rows in found]


def _trial(task: Task, config: Config | None) -> Trial:
    return Trial(task.problem, task.work, task.which, task.twin, config)


def prune(
    entries: Mapping[Task, Entry],
    search: str = "descent",
    *,
    jobs: int = 1,
    progress: Callable[[int, int, str], None] | None = None,
) -> None:
    """Puts what a search looks at first through the gate, for all tasks together: the star of the
    default, or the whole space. It costs no time on a GPU.

    Raises:
        LookupError: a twin names no Config of its own, or its problem has no axes.
    """
    todo = [task for task, entry in entries.items() if not entry.row["finished"]]
    trials: list[tuple[Task, Config]] = []
    defaults = compile_trials([_trial(task, None) for task in todo], jobs=jobs)
    for task, rows in zip(todo, defaults, strict=True):
        start = next((dict(row.config) for row in rows if row.config), None)
        if start is None:
            why = next((row.message for row in rows if row.fails), "it asks no default_config")
            raise LookupError(f"{task.problem.stem} {task.name}: no Config to start from: {why}")
        space = axes(task.problem, task.work, task.which, task.twin, start)
        entries[task].row |= {"start": start, "space": {n: list(v) for n, v in space.items()}}
        near = grid(start, space) if search == "exhaustive" else star(start, space)
        known = entries[task].known
        trials += [(task, c) for c in near if c != start and key(c) not in known]
    found = through_gate(trials, jobs=jobs, progress=progress)
    for (task, config), (kind, why) in zip(trials, found, strict=True):
        if kind:
            entries[task].prune(config, kind, why)
        else:
            entries[task].note(config)


def sorted_out(rows: Iterable[CompileRow]) -> tuple[str, str]:
    """What ends a Config whose kernels compiled to these rows, and in which words."""
    bad = next((row for row in rows if row.fails), None)
    if bad is None:
        return GOOD
    if bad.spills or bad.local:
        return "spills", bad.message
    if bad.serialised_wgmma:
        return "serialised wgmma", bad.message
    return kind_of(bad.message), bad.message


def kind_of(message: str) -> str:
    for kind, words in (
        ("shared memory", r"shared memory"),
        ("spills", r"spills \d+ bytes|local-memory"),
        ("serialised wgmma", r"wgmma serialised"),
        ("too slow to compile", r"no answer in .* the compiler was stopped"),
        ("refused", r"ValueError: \w+: expected .* got"),
    ):
        if re.search(words, message):
            return kind
    return "does not compile"


# On the device.


class OnDevice:
    """A Subject on this process's GPU. Inputs, oracle and residuals are made once for all Configs.

    Raises NothingSeen (while timing) where the profiler sees nothing.
    """

    def __init__(self, task: Task, *, seed: int = 0) -> None:
        from parity.frameworks import torch as memory
        from parity.judge import truth_and_model

        problem, work = task.problem, task.work
        self._task, self._seed = task, seed
        self._twin = frameworks.twin(task.twin)
        self._kernel = self._twin.load(problem.implementations[task.twin])
        self._module = sys.modules[self._kernel.public.__module__]
        arrays = memory.draw({**problem.inputs(work), **problem.cotangents(work)}, seed)
        seen = {n: arrays[n] for n in problem.reads(work, task.which)}
        self._truth, self._model = truth_and_model(problem, work, task.which, seen)
        self._fn, self._args, self._options = frameworks.prepared(
            self._twin, self._kernel, problem, work, task.which, arrays
        )
        self._calls: dict[Key, Callable[[], Any]] = {}
        compiles = task.twin == "pallas" and not frameworks.interpreted()
        self._listen = compiles and find_sass() is None
        self.asks: list[Row] = []

    def refuses(self, config: Config) -> str:
        try:
            self._module.Config(**config)
        except (TypeError, ValueError) as e:
            return str(e)
        return ""

    def prepare(self, config: Config | None) -> tuple[str, str]:
        """Compiles it, calls it once and judges its answer."""
        if config is None:
            with asked(self._module) as asks:

                def anew(*args: Any, **options: Any) -> Any:  # a function that no jit has seen
                    return self._fn(*args, **options)

                made = self._made((), anew, self._options)
            self.asks = asks
            return made
        if key(config) in self._calls:
            return GOOD
        options = self._options | {"config": self._module.Config(**config)}
        return self._made(key(config), self._fn, options)

    def _made(self, name: Key, fn: Callable[..., Any], options: Row) -> tuple[str, str]:
        try:
            with self._compilers_words() as rows:
                out = self._twin.outputs_of(self._twin.run(fn, self._args, options))
        except Exception as e:
            first = (str(e).strip().splitlines() or [""])[0]
            message = f"{type(e).__name__}: {first[:300]}"
            return kind_of(message), message
        if bad := next((row for row in rows if row["status"] == "fail"), None):
            return kind_of(bad["message"]), bad["message"]
        if why := self._wrong(out):
            return "wrong", why
        self._calls[name] = self._twin.thunk(fn, self._args, options)
        return GOOD

    def _compilers_words(self) -> Any:
        if not self._listen:
            return nullcontext([])
        from parity.frameworks.compiled import overheard

        return overheard()

    def _wrong(self, out: Sequence[Any]) -> str:
        from parity.judge import judge

        problem, work = self._task.problem, self._task.work
        specs = problem.results(work, self._task.which)
        if len(out) != len(specs):
            return f"returned {len(out)} arrays, expected {len(specs)}: {', '.join(specs)}"
        for (n, spec), y, r, m in zip(specs.items(), out, self._truth, self._model, strict=True):
            terms = problem.reduction(work, n)
            found = judge(n, self._twin.harness(y), r, m, spec, family=problem.family, terms=terms)
            if not found.ok:
                return f"{found.reason}: {found.detail}"
        return ""

    def time(self, configs: Sequence[Config], rounds: int) -> tuple[list[Interval], Interval]:
        from parity.frameworks import tracer

        calls = {"default": self._calls[()]}
        calls |= {str(i): self._calls[key(c)] for i, c in enumerate(configs)}
        end = time.monotonic() + WARM_UP_SECONDS
        while time.monotonic() < end:
            for call in calls.values():
                tracer.wait_for(call())
        try:
            found = timing.measure(calls, tracer.cold, rounds=rounds)
        except timing.NothingSeen:  # a hiccup of the profiler must not end a long search
            found = timing.measure(calls, tracer.cold, rounds=rounds)
        return [found[str(i)].us for i in range(len(configs))], found["default"].us

    def confirm(self, config: Config) -> str:
        """The whole check: other inputs, three runs, the exact probe, the witness."""
        from parity.check import check

        task, own = self._task, self._kernel
        bound = {"config": self._module.Config(**config)}
        if task.which == "fwd":
            bind = {"public": partial(own.public, **bound), "fwd": partial(own.fwd, **bound)}
        elif task.which == "bwd":
            bind = {"bwd": partial(own.bwd, **bound)}
        else:
            name = task.problem.further[task.which].function
            bind = {"beside": {**own.beside, name: partial(own.beside[name], **bound)}}
        kernel = replace(own, **bind)
        (found,) = check(
            task.problem,
            task.work,
            impls={task.twin: kernel},
            passes=(task.which,),
            seed=self._seed + 2,
        )
        return "" if found.ok else f"{found.reason}: {found.detail}"


@contextmanager
def asked(module: Any) -> Iterator[list[Row]]:
    """Yields what default_config is asked inside: {"of": its arguments, "default": what it
    answered, "ladder": what it answers without tuned rungs}, each question once."""
    choose, ladder = module.default_config, rungs.ladder(module)
    asks: list[Row] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        config = choose(*args, **kwargs)
        ask = {
            "of": _named(choose, args, kwargs),
            "default": vars(config).copy(),
            "ladder": vars(ladder(*args, **kwargs)).copy(),
        }
        if ask not in asks:
            asks.append(ask)
        return config

    module.default_config = watched
    try:
        yield asks
    finally:
        module.default_config = choose


def _named(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Row:
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    plain = (int, float, str, bool, type(None))
    return {n: v if isinstance(v, plain) else dtype_name(v) for n, v in bound.arguments.items()}


# Results.


class Results:
    """The results of one twin of one problem on one device: a JSON file."""

    def __init__(self, path: Path, stem: str, twin: str, device: str) -> None:
        self.path, self.stem, self.twin, self.device = path, stem, twin, device
        self.entries: dict[tuple[str, str], Entry] = {}

    @staticmethod
    def read(path: Path) -> "Results":
        """Raises ValueError for a file that is no results of this schema."""
        try:
            whole = json.loads(path.read_text())
            if whole["schema"] != SCHEMA:
                raise ValueError(f"schema {whole['schema']}, expected {SCHEMA}")
            results = Results(path, whole["problem"], whole["twin"], whole["device"])
            for row in whole["results"]:
                results.entries[row["workload"], row["pass"]] = Entry.of(row)
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{path}: not the results of `parity tune`: {e}") from None
        return results

    @staticmethod
    def open(folder: Path, stem: str, twin: str, device: str) -> "Results":
        """device: "" where nothing is timed. Raises ValueError for results of another device."""
        path = folder / f"{stem}.{twin}.json"
        results = Results.read(path) if path.exists() else Results(path, stem, twin, device)
        if device and results.device not in ("", device):
            raise ValueError(f"{path} holds results of {results.device}, and this is {device}")
        results.device = device or results.device
        return results

    def entry(
        self, task: Task, source: str, versions: Mapping[str, str] | None, resume: bool
    ) -> Entry:
        """What is known of the task, if it is to be resumed and still true; else a new entry."""
        found = self.entries.get((task.work.name, task.which))
        if found is None or not resume or not found.says_of(task, source, versions):
            found = self.entries[task.work.name, task.which] = Entry.new(task, source)
        if (config := found.row.pop("under_way", None)) is not None:
            found.prune(config, "ended the run", "an earlier run ended while it was called")
        return found

    def save(self) -> None:
        """Writes beside and renames: a reader sees a whole file."""
        whole = {
            "schema": SCHEMA,
            "problem": self.stem,
            "twin": self.twin,
            "device": self.device,
            "results": [entry.row for entry in self.entries.values()],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=self.path.parent, suffix=".part", delete=False
        ) as part:
            part.write(laid_out(_rounded(whole)) + "\n")
        os.chmod(part.name, 0o644)
        os.replace(part.name, self.path)


def laid_out(value: Any, indent: str = "", width: int = 240) -> str:
    """JSON for readers: what is short stays on one line."""
    flat = json.dumps(value, ensure_ascii=False)
    if len(indent) + len(flat) <= width or not isinstance(value, (dict, list)) or not value:
        return flat
    deeper = indent + " "
    if isinstance(value, dict):
        items = [f"{json.dumps(k)}: {laid_out(v, deeper, width)}" for k, v in value.items()]
        return "{\n" + ",\n".join(deeper + item for item in items) + f"\n{indent}}}"
    items = [laid_out(v, deeper, width) for v in value]
    return "[\n" + ",\n".join(deeper + item for item in items) + f"\n{indent}]"


def _rounded(value: Any) -> Any:
    """Nanoseconds and a ten-thousandth of a share: what lies beyond is noise."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def source_of(task: Task) -> str:
    """The kernel's files, without tuned rungs, and the `_lib` beside them, hashed."""
    place = task.problem.implementations[task.twin].rpartition(":")[0]
    file = Path(__file__).parents[1].joinpath(*place.split(".")).with_suffix(".py")
    parts = [rungs.bare(part.read_text()) for part in record.files_of(file)]
    return record.hashed("".join([*parts, file.with_name("_lib.py").read_text()]))


# Many tasks.


class Campaign:
    """Tunes many tasks within a budget, from where an earlier run was left.

        campaign = Campaign(tasks, folder, device=..., budget=540, resume=True)
        campaign.prune()
        for task, entry in campaign: ...        # already written down
        campaign.left                           # the tasks that are not finished

    Args:
        device, versions, commit: of parity.bench.Machine.
        jobs: compilers at a time.
        started: called with (number of the task from 0, task).
        subject: makes the Subject of a task.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        folder: Path,
        *,
        device: str,
        versions: Mapping[str, str],
        commit: str,
        search: str = "descent",
        budget: float | None = None,
        resume: bool = False,
        jobs: int = 1,
        tell: Tell = lambda phrase: None,
        started: Callable[[int, Task], None] = lambda number, task: None,
        subject: Callable[[Task], Subject] = OnDevice,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._facts = {"versions": dict(versions), "commit": commit}
        self._search, self._jobs, self._tell, self._started = search, jobs, tell, started
        self._subject = subject
        self._budget = Budget(budget, clock)
        self._results: dict[tuple[str, str], Results] = {}
        self.entries: dict[Task, Entry] = {}
        for task in tasks:
            at = task.problem.stem, task.twin
            if at not in self._results:
                self._results[at] = Results.open(folder, *at, device)
            self.entries[task] = self._results[at].entry(task, source_of(task), versions, resume)
        self.left = [t for t in tasks if not self._done(self.entries[t].row)]
        self.wrong: dict[Task, str] = {}

    def prune(self, progress: Callable[[int, int, str], None] | None = None) -> None:
        """Compiles what the searches of all tasks look at first, before any time on the GPU."""
        prune(self.entries, self._search, jobs=self._jobs, progress=progress)
        for results in self._results.values():
            results.save()

    def _done(self, row: Row) -> bool:
        return row["finished"] and (row["search"] == self._search or row["search"] == "exhaustive")

    def __iter__(self) -> Iterator[tuple[Task, Entry]]:
        todo = list(self.left)
        for number, task in enumerate(todo):
            if not self._budget.fits():
                return
            self._started(number, task)
            entry, results = self.entries[task], self._results[task.problem.stem, task.twin]
            entry.row |= {**self._facts, "finished": False}
            try:
                self._tune(task, entry, results)
            except OutOfTime:
                return
            except ValueError as e:
                self.wrong[task] = str(e)
            finally:
                results.save()
                _release()
            self.left.remove(task)
            yield task, entry

    def _tune(self, task: Task, entry: Entry, results: Results) -> None:
        def tell(phrase: str) -> None:
            self._tell(f"{task.problem.stem} {task.name}: {phrase}")

        tell("inputs and oracle")

        def gate(configs: list[Config]) -> list[tuple[str, str]]:
            return through_gate([(task, c) for c in configs], jobs=self._jobs)

        subject = self._subject(task)
        tuner = Tuner(entry, subject, gate, budget=self._budget, save=results.save, tell=tell)
        tuner.run(partial(axes, task.problem, task.work, task.which, task.twin), self._search)


def _release() -> None:
    from parity.frameworks import torch as memory

    memory.release()
