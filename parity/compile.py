"""The compile gate: both twins to sm_90a machine code, on a machine that may have no GPU.

An interpreter runs dozens of things that the real compilers reject, and sees neither registers nor
spills. This gate compiles what would run: public launchers at production sizes, with the Config
they choose themselves. Two processes work side by side, one per twin
(`parity.frameworks.compile_triton`, `compile_pallas`); this module imports neither framework.
Triton goes all the way to machine code with the wheel's own assembler. Pallas always cross-lowers
through jax's public API; where an environment with jax's CUDA plugin exists (`make sass`), the
plugin's compiler takes it on to machine code.

A row is "ok" only without a spill, local memory or a serialised wgmma (ptxas' warning that products
wait for each other). Answers are kept as JSON by the hash of everything they depend on.
"""

import ast
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from parity.spec import Problem, Workload

TWINS = ("triton", "pallas")
Progress = Callable[[int, int, str], None]

_ROOT = Path(__file__).resolve().parent.parent
_FRAMEWORKS = Path(__file__).resolve().parent / "frameworks"
CACHE = _ROOT / ".cache" / "compile"
_SCHEMA = 2
_DISTRIBUTIONS = {"triton": ("triton", "torch"), "pallas": ("jax", "jaxlib")}
_PLUGIN = "jax_plugins/xla_cuda13/xla_cuda_plugin.so"


@dataclass(frozen=True)
class CompileRow:
    """One kernel of one pass. Counts are static instructions of the machine code.

    In "lowered" rows (Pallas without ptxas) they are operations of the lowered module, and
    registers, spills, stack and local are unknown: None. `which` is the pass ("pass" in JSON).
    """

    problem: str
    workload: str
    which: str
    twin: str
    kernel: str
    status: str  # "ok", "lowered" (checked up to, not including, ptxas) or "fail"
    message: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    registers: int | None = None  # per thread
    spills: int | None = None  # bytes stored and loaded
    stack: int | None = None  # bytes per thread
    local: int | None = None  # local-memory instructions
    shared_bytes: int | None = None  # per block
    grid: tuple[int | None, ...] | None = None
    threads: int | None = None  # per block
    wgmma: int | None = None
    mma_sync: int | None = None
    tma_load: int | None = None
    tma_store: int | None = None
    tma_descriptors: int | None = None
    serialised_wgmma: bool | None = None
    listing: str = ""  # file in the cache with its PTX and machine code

    @property
    def fails(self) -> bool:
        return self.status == "fail"

    def to_json(self) -> dict[str, Any]:
        row = dataclasses.asdict(self)
        return {"pass" if name == "which" else name: value for name, value in row.items()}

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> "CompileRow":
        """The row behind `to_json`. Raises TypeError for a row with other fields."""
        values = {"which" if name == "pass" else name: value for name, value in row.items()}
        if values.get("grid") is not None:
            values["grid"] = tuple(values["grid"])
        return CompileRow(**values)


def compile_gate(
    problems: Iterable[Problem],
    *,
    workloads: Collection[str] | None = None,
    twins: Sequence[str] = TWINS,
    passes: Sequence[str] | None = None,
    implementations: Mapping[str, str] | None = None,
    configs: Mapping[str, Any] | None = None,
    sass: bool | Path | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
    timeout: float = 300.0,
) -> list[CompileRow]:
    """Compiles twins at the sizes of workloads and tells what came of it.

    workloads: names; None takes every workload tagged "model".
    passes: None takes those that the workload lists.
    implementations: twin -> "module:function" or "FILE.py:function", in place of the problem's own.
    configs: twin -> a Config, the twin's dataclass or a dict of its fields; None: the twin chooses.
    sass: ptxas for Pallas. A folder: the environment with jax's CUDA plugin. True: where find_sass
        says, FileNotFoundError if nowhere. None: there if it exists. False: never.
    cache: folder of kept answers; None takes .cache/compile in the checkout.
    progress: called with (finished, all, what was just finished), once per workload and twin.
    timeout: seconds one workload may take before its compiler is stopped and the row fails.

    Returns rows in the order of problems, workloads, passes, twins. A kernel that does not compile
    is a row with status "fail" and one readable line, never an exception.
    """
    environment = _environment(sass) if "pallas" in twins else None
    tasks = [
        task
        for problem in problems
        for workload in problem.workloads
        if (workload.name in workloads if workloads is not None else "model" in workload.tags)
        for task in _tasks(problem, workload, twins, passes, implementations or {}, configs or {})
    ]
    _answer(tasks, environment, cache, progress, timeout)
    return list(_in_order(tasks))


@dataclass(frozen=True)
class Trial:
    """One pass of one twin with one Config (a dict of its fields; None: the twin chooses)."""

    problem: Problem
    workload: Workload
    which: str
    twin: str
    config: Mapping[str, Any] | None = None


def compile_trials(
    trials: Sequence[Trial],
    *,
    sass: bool | Path | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
    timeout: float = 300.0,
    jobs: int = 1,
) -> list[list[CompileRow]]:
    """The rows of each trial, as `compile_gate` has them. jobs: compilers at a time for a twin."""
    environment = _environment(sass) if any(t.twin == "pallas" for t in trials) else None
    tasks = [
        next(_tasks(t.problem, t.workload, (t.twin,), (t.which,), {}, {t.twin: t.config}))
        for t in trials
    ]
    _answer(tasks, environment, cache, progress, timeout, jobs)
    return [list(_in_order([task])) for task in tasks]


def _answer(
    tasks: list["_Task"],
    environment: Path | None,
    cache: Path | None,
    progress: Progress | None,
    timeout: float,
    jobs: int = 1,
) -> None:
    """Gives every task its rows: those kept, or else the compilers'."""
    cache = cache or CACHE
    keys = _Keys(environment)
    done = 0

    def finish(task: "_Task", rows: list[dict[str, Any]], keep: bool) -> None:
        nonlocal done
        task.rows = rows
        if keep and keys.still_true(task):
            _store(cache, keys.of(task), rows)
        done += 1
        if progress is not None:
            progress(done, len(tasks), f"{task.problem} {task.workload} {task.twin}")

    missing: dict[str, list[_Task]] = {}
    for task in tasks:
        rows = _fetch(cache, keys.of(task))
        if rows is not None:
            finish(task, rows, keep=False)
        else:
            missing.setdefault(task.twin, []).append(task)
    shares = [
        (twin, share) for twin, ts in missing.items() for i in range(jobs) if (share := ts[i::jobs])
    ]
    if shares:
        _compile_all(shares, environment, cache, timeout, finish)


def _in_order(tasks: list["_Task"]) -> Iterator[CompileRow]:
    by_workload: dict[tuple[str, str], list[_Task]] = {}
    for task in tasks:
        by_workload.setdefault((task.problem, task.workload), []).append(task)
    for (problem, workload), group in by_workload.items():
        for which in group[0].request["passes"]:
            for task in group:
                for row in task.rows:
                    if row["pass"] == which:
                        place = {"problem": problem, "workload": workload, "twin": task.twin}
                        yield CompileRow.from_json(place | row)


# What there is to compile.


@dataclass
class _Task:
    problem: str
    workload: str
    twin: str
    request: dict[str, Any]  # everything the answer depends on, and what the worker is asked
    rows: list[dict[str, Any]] = field(default_factory=list)


def _tasks(
    problem: Problem,
    workload: Workload,
    twins: Sequence[str],
    passes: Sequence[str] | None,
    implementations: Mapping[str, str],
    configs: Mapping[str, Any],
) -> Iterator[_Task]:
    for twin in twins:
        config = configs.get(twin)
        if dataclasses.is_dataclass(config) and not isinstance(config, type):
            config = dataclasses.asdict(config)
        options = dict(workload.options)
        inputs, cotangents = (
            {n: [list(d.shape), d.dtype] for n, d in of(workload).items()}
            for of in (problem.inputs, problem.cotangents)
        )

        arrays = inputs | cotangents
        request = {
            "implementation": _absolute(implementations.get(twin) or problem.implementations[twin]),
            "inputs": _described(problem, arrays, problem.positional(workload)),
            "keywords": {n: v for n, v in inputs.items() if n in problem.keywords},
            "cotangents": list(cotangents.values()),
            "further": {
                which: {
                    "function": further.function,
                    "inputs": _described(problem, arrays, further.reads),
                    "options": further.options(workload),
                }
                for which, further in problem.further.items()
                if which in workload.passes
            },
            "options": options,
            "bwd_options": {k: v for k, v in options.items() if k in problem.bwd_options},
            "passes": [
                p
                for p in workload.passes
                if problem.launches(p) and (passes is None or p in passes)
            ],
            "config": config,
        }
        yield _Task(problem.stem, workload.name, twin, request)


def _described(problem: Problem, arrays: Mapping[str, Any], arguments: Sequence[str]) -> list[Any]:
    """Arguments for the child: [shape, dtype], None for an absent one, or the class of a bundle and
    what it is made of."""
    found: list[Any] = []
    for argument in arguments:
        if argument in problem.bundles:
            name, of = problem.bundles[argument]
            found.append({"bundle": name, "of": [arrays.get(n) for n in of]})
        else:
            found.append(arrays.get(argument))
    return found


def _absolute(implementation: str) -> str:
    place, _, name = implementation.rpartition(":")
    return f"{Path(place).resolve()}:{name}" if place.endswith(".py") else implementation


_Answers = queue.Queue[tuple[_Task, list[dict[str, Any]], bool]]


# Where ptxas for Pallas is.


def find_sass(root: Path | None = None) -> Path | None:
    """The environment whose CUDA plugin can compile Mosaic kernels: .venv-sass in the checkout, the
    one that runs, or the folder its jax plugins are in. None where none has it, or no C compiler
    can build the stand-in driver.
    """
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        return None
    plugins = importlib.util.find_spec("jax_plugins")
    places = (plugins and plugins.submodule_search_locations) or ()
    candidates = [
        (root or _ROOT) / ".venv-sass",
        Path(sys.prefix),
        *(Path(p).parent for p in places),
    ]
    return next((c for c in candidates if _site_packages(c) is not None), None)


def _site_packages(environment: Path) -> Path | None:
    """The folder in it with ptxas and our jax's plugin: a module is for its own release only."""
    release = _version("jax")
    for site in (environment, *sorted(environment.glob("lib/python*/site-packages"))):
        parts = (_PLUGIN, f"jax_cuda*_pjrt-{release}.dist-info", "nvidia/cu*/bin/ptxas")
        if all(any(site.glob(part)) for part in parts):
            return site
    return None


def _environment(sass: bool | Path | None) -> Path | None:
    if sass is False:
        return None
    environment = sass if isinstance(sass, Path) else find_sass()
    site = _site_packages(environment) if environment is not None else None
    if site is None and sass is not None:
        where = environment or ".venv-sass"
        raise FileNotFoundError(
            f"{where}: no CUDA plugin of jax {_version('jax')} with ptxas (a C compiler is needed "
            "too); `make sass` builds it"
        )
    return site


# The key of an answer: every source and version it depends on.


class _Keys:
    def __init__(self, site: Path | None):
        self._sources: dict[str, str] = {}
        self._gate = _digest(*(p.read_bytes() for p in sorted(_FRAMEWORKS.glob("*compile*.py"))))
        self._versions = {twin: _versions(twin, site) for twin in TWINS}

    def of(self, task: _Task) -> str:
        implementation = task.request["implementation"]
        if implementation not in self._sources:
            self._sources[implementation] = _digest_of_sources(implementation)
        known = (self._sources[implementation], self._gate, self._versions[task.twin])
        return _digest(json.dumps([_SCHEMA, task.twin, task.request, known], default=str).encode())

    def still_true(self, task: _Task) -> bool:
        """False when somebody has edited the sources since the key was made: whose code was it?"""
        implementation = task.request["implementation"]
        return self._sources[implementation] == _digest_of_sources(implementation)


def _digest_of_sources(implementation: str) -> str:
    return _digest(*(file.read_bytes() for file in sorted(sources(implementation))))


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _versions(twin: str, site: Path | None) -> list[str]:
    found = [f"python {sys.version_info[:2]}"]
    found += [f"{name} {_version(name)}" for name in _DISTRIBUTIONS[twin]]
    if twin == "pallas" and site is not None:
        infos = [*site.glob("jax_cuda*.dist-info"), *site.glob("nvidia_cuda_nvcc*.dist-info")]
        found += sorted(info.name for info in infos)
    return found


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def sources(implementation: str) -> set[Path]:
    """The files that "module:function" or "FILE.py:function" is made of: imports are followed as
    far as they lie in this checkout or beside the file."""
    place = implementation.rpartition(":")[0]
    first = Path(place) if place.endswith(".py") else _module_file(place, _ROOT)
    seen: set[Path] = set()
    waiting = [first] if first is not None and first.is_file() else []
    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        seen.add(file)
        try:
            tree = ast.parse(file.read_bytes())
        except SyntaxError:
            continue  # the worker says so; these bytes are in the key
        for name in _imported(tree):
            for folder in (_ROOT, file.parent):
                found = _module_file(name, folder)
                if found is not None:
                    waiting.append(found)
    return seen


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = f"{node.module}." if node.module else ""
            yield prefix.removesuffix(".")
            yield from (prefix + alias.name for alias in node.names)


def _module_file(name: str, folder: Path) -> Path | None:
    path = folder.joinpath(*name.split(".")) if name else folder
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


# Kept answers.


def _fetch(cache: Path, key: str) -> list[dict[str, Any]] | None:
    """Rows kept under `key`; None when there are none, or the file is cut short or not ours."""
    try:
        kept = json.loads((cache / f"{key}.json").read_text())
        rows = kept["rows"]
        for row in rows:
            CompileRow.from_json({"problem": "", "workload": "", "twin": ""} | row)
            if row.get("listing") and not (cache / row["listing"]).is_file():
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return rows if kept.get("key") == key else None


def _store(cache: Path, key: str, rows: list[dict[str, Any]]) -> None:
    """Writes beside and renames: a reader, or a second writer, sees a whole file or none."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=cache, suffix=".part", delete=False) as part:
        json.dump({"key": key, "rows": rows}, part, indent=1)
    os.replace(part.name, cache / f"{key}.json")


# The workers.


def _compile_all(
    shares: Sequence[tuple[str, list[_Task]]],
    site: Path | None,
    cache: Path,
    timeout: float,
    finish: Callable[[_Task, list[dict[str, Any]], bool], None],
) -> None:
    answers: _Answers = queue.Queue()
    crew = _Crew()
    threads = []
    for twin, tasks in shares:
        places = [str(cache.resolve())]
        if twin == "pallas" and site is not None:
            places.append(str(site))
        code = f"from parity.frameworks.compile_{twin} import main; main(*{places!r})"
        args = (code, tasks, timeout, answers, crew)
        threads.append(threading.Thread(target=_drive, args=args, daemon=True))
        threads[-1].start()
    try:
        for _ in range(sum(len(tasks) for _, tasks in shares)):
            finish(*answers.get())
    finally:  # interrupted or not: no compiler stays behind
        crew.dismiss()
    for thread in threads:
        thread.join()


class _Crew:
    """The worker processes of one run."""

    def __init__(self) -> None:
        self.workers: list[subprocess.Popen[str]] = []
        self.dismissed = threading.Event()

    def hire(self, worker: subprocess.Popen[str]) -> None:
        self.workers.append(worker)
        if self.dismissed.is_set():
            worker.kill()

    def dismiss(self) -> None:
        self.dismissed.set()
        for worker in self.workers:
            worker.kill()


def _drive(code: str, tasks: list[_Task], timeout: float, answers: _Answers, crew: _Crew) -> None:
    """Asks workers until every task has its rows; one that kills or stalls its worker fails."""
    waiting = dict(enumerate(tasks))
    while waiting and not crew.dismissed.is_set():
        before = len(waiting)
        try:
            blamed, why = _one_worker(code, waiting, timeout, answers, crew)
        except Exception as error:  # the run waits for an answer to every task
            blamed, why = None, f"the compiler could not be asked: {error}"
        if blamed is not None:
            guilty = [blamed]
        else:  # it broke before or between tasks: if it never worked, it is broken for all
            guilty = list(waiting) if len(waiting) == before else []
        for number in guilty:
            task = waiting.pop(number)
            answers.put((task, _failures(task, why), False))


def _one_worker(
    code: str,
    waiting: dict[int, _Task],
    timeout: float,
    answers: _Answers,
    crew: _Crew,
) -> tuple[int | None, str]:
    """Runs one worker and takes what it finishes out of `waiting`.

    Returns the task that was under way when it ended and why it ended; (None, "") if all went well.
    """
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    pipe = subprocess.PIPE
    job = json.dumps({"requests": [{"id": n} | task.request for n, task in waiting.items()]})
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=pipe,
            stdout=pipe,
            stderr=errors,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        ) as worker,
    ):
        crew.hire(worker)
        assert worker.stdin is not None and worker.stdout is not None
        watch = _Watch(worker, timeout)
        under_way = None
        with contextlib.suppress(BrokenPipeError):  # it died at once: its last words follow
            worker.stdin.write(job)
            worker.stdin.close()
        for line in worker.stdout:
            watch.alive()
            if not line.endswith("\n"):
                break  # killed while it spoke
            message = json.loads(line)
            if "start" in message:
                under_way = message["start"]
            else:
                answers.put((waiting.pop(message["id"]), message["rows"], message["keep"]))
                under_way = None
        status = worker.wait()
        if watch.stop():
            return under_way, f"no answer in {timeout:g} s: the compiler was stopped"
        if status or waiting:
            return under_way, f"the compiler process ended with {status}: {_last_words(errors)}"
    return None, ""


def _failures(task: _Task, why: str) -> list[dict[str, Any]]:
    kernel = task.request["implementation"].rpartition(":")[2]
    return [
        {"pass": which, "kernel": kernel, "status": "fail", "message": why}
        for which in task.request["passes"]
    ]


def _last_words(errors: IO[str]) -> str:
    errors.seek(0)
    lines = [line.strip() for line in errors.read()[-5000:].splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no message"


class _Watch:
    """Kills a process that has said nothing for a while."""

    def __init__(self, process: subprocess.Popen[str], timeout: float):
        self._process, self._timeout = process, timeout
        self._heard = time.monotonic()
        self._over, self._stalled = threading.Event(), False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(min(1.0, self._timeout / 4)):
            if time.monotonic() - self._heard > self._timeout:
                self._stalled = True
                self._process.kill()
                return

    def alive(self) -> None:
        self._heard = time.monotonic()

    def stop(self) -> bool:
        self._over.set()
        self._thread.join()
        return self._stalled
