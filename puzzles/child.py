"""The child process: runs the learner's code under limits and says what it saw.

It reads one JSON job a line and answers in one JSON line each, on a pipe of its own and marked with
the parent's word for this run. Arrays come and go as files in its folder. It judges nothing, and no
right answer is ever in this process.
"""

import contextlib
import json
import linecache
import os
import re
import resource
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from time import perf_counter  # by name: the module's may be replaced
from typing import Any

import numpy as np

FILE_BYTES = 16 << 20  # the largest file it may write
_MEMORY = ("can't allocate memory", "unable to allocate", "resource_exhausted", "out of memory")
_MISALIGNED = (
    "an address is not a multiple of what its access needs: a copy's place in shared memory must "
    "begin at a multiple of 128 bytes"
)
# The last line of a traceback in what jax hands on of it as text
_RAISED = re.compile(r"[\w.]+(Error|Exception): ")
# What some messages mean in a kernel
_NO_VALUE = (
    "Python's if, and, max and bool cannot ask a value in a kernel: jnp.where, jnp.maximum and "
    "pl.when can"
)
_MEANS = {
    "TracerBoolConversionError": _NO_VALUE,
    "The truth value of an array": _NO_VALUE,
    "Only scalar arrays can be converted": "an array cannot be an index here: Mosaic GPU has no "
    "lookup",
    "'Fake' object": "x_ref.at[0] is a part of a reference that can be transposed or handed on, "
    "x_ref[0] is loaded",
}
# What Mosaic GPU's interpreter says of an access beyond its array
_BEYOND = re.compile(r"Out-of-bounds.*?\[Access\(range=\((.*?)\), perm.*?shape (\([\d, ]*\))")
_SLICE = re.compile(r"slice\((\d+), (\d+), \d+\)")
# Audit events that change something outside the process, and where their paths stand
_CHANGES = {
    "os.remove": (0,), "os.rename": (0, 1), "os.mkdir": (0,), "os.rmdir": (0,), "os.truncate": (0,),
    "os.symlink": (1,), "os.link": (1,), "os.chmod": (0,), "os.chown": (0,), "shutil.rmtree": (0,),
}  # fmt: skip
_STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.posix_spawn", "pty.spawn",
           "socket.connect", "socket.bind", "socket.getaddrinfo", "os.kill", "ctypes.dlopen",
           "import.ctypes")  # fmt: skip
# Functions of a clock or of the framework that nobody has a reason to replace
_KEPT = {
    "time": ("time", "perf_counter", "perf_counter_ns", "monotonic", "sleep", "process_time"),
    "torch": ("empty", "empty_like", "zeros", "equal", "where", "round", "stack", "full"),
    "torch.cuda": ("synchronize", "current_stream", "empty_cache", "is_available"),
    "torch.profiler": ("profile",),
    "parity.frameworks.tracer": ("cold", "kernels", "wait_for"),
    "puzzles.speed": ("race", "measure", "Runner"),
    "triton": ("jit",),
    "jax": ("jit", "make_jaxpr", "block_until_ready"),
    "numpy": ("load", "save", "savez", "isnan"),
    "json": ("dumps", "loads"),
}


class OutsideError(PermissionError):
    """The learner's code reached for something outside its folder."""


class LimitError(RuntimeError):
    """The learner's code was stopped: `verdict` says why."""

    def __init__(self, verdict: str, detail: str) -> None:
        super().__init__(detail)
        self.verdict = verdict


def serve(
    backend: str, folder: str, jobs: int, answers: int, data_gib: float, gpu: bool = False
) -> None:
    """Answers jobs until the pipe closes.

    gpu: kernels are compiled, which takes processes, files and address space: what keeps a solution
    in its folder has seen it in the interpreter before.
    """
    read = os.fdopen(jobs)
    write = os.fdopen(answers, "w")
    word = json.loads(read.readline())["word"]

    def say(message: Mapping[str, Any]) -> None:
        write.write(json.dumps({"word": word, **message}) + "\n")
        write.flush()

    try:
        from parity import frameworks

        frameworks.gpu() if gpu else frameworks.interpreters(only=backend)
        side = _side(backend, gpu)
    except Exception as e:
        say({"broken": f"{type(e).__name__}: {e}"})
        raise
    os.chdir(folder)
    guard = _Guard(Path(folder))
    if not gpu:
        _limit(data_gib)
        sys.addaudithook(guard.hook)
    kept = _functions()
    solve: Callable[..., Any] | None = None
    say({"ready": True})
    for line in read:
        job = json.loads(line)
        try:
            if job["do"] == "load":
                solve = None
                with guard.learner():
                    solve = _load(side, Path(job["file"]))
                message: dict[str, Any] = {"ok": True}
            elif job["do"] == "race":
                message = _race(job)
            else:
                assert solve is not None
                message = _run(side, solve, job, guard)
        except BaseException as e:
            message = _failed(e, job)
        if guard.caught:
            message = {"ok": False, "verdict": "outside", "detail": guard.caught}
        elif changed := _replaced(kept):
            message = {"ok": False, "verdict": "patched", "detail": f"{changed} was replaced"}
        guard.caught = ""
        say(message)


def _side(backend: str, gpu: bool) -> Any:
    if backend == "triton":
        from puzzles import triton_side as side
    else:
        from puzzles import pallas_side as side
    if not gpu:
        return side
    from puzzles import gpu_side

    return gpu_side.Side(backend, side)


def _limit(data_gib: float) -> None:
    """Hard limits, which nothing in this process can raise again."""
    data = int(data_gib * (1 << 30))
    for what, most in (
        (resource.RLIMIT_DATA, data),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))


class _Guard:
    """An audit hook: once in place, Python offers no way to take it out."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder.resolve()) + os.sep
        self.on = False
        self.caught = ""

    @contextlib.contextmanager
    def learner(self) -> Any:
        self.on = True
        try:
            yield
        finally:
            self.on = False

    def hook(self, event: str, args: tuple) -> None:
        if not self.on:
            return
        if event == "open":
            path, mode, flags = args
            writes = mode is not None and any(c in str(mode) for c in "wax+")
            writes = writes or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if writes and isinstance(path, (str, bytes, os.PathLike)):
                self._must_lie_inside(path, "writes to")
        elif event in _CHANGES:
            for at in _CHANGES[event]:
                self._must_lie_inside(args[at], event)
        elif event in _STARTS:
            self._catch(f"{event}: a solution starts no process and opens no connection")

    def _must_lie_inside(self, path: Any, what: str) -> None:
        if isinstance(path, int):  # a descriptor: it was opened before
            return
        full = os.path.realpath(os.fsdecode(path))
        if full != os.devnull and not full.startswith(self.folder):
            self._catch(f"{what} {os.fsdecode(path)!r}, outside its folder")

    def _catch(self, detail: str) -> None:
        self.caught = self.caught or detail
        raise OutsideError(detail)


def _functions() -> dict[tuple[str, str], Any]:
    """What _KEPT names, of the modules that are loaded."""
    return {
        (module, name): getattr(sys.modules[module], name)
        for module, names in _KEPT.items()
        if module in sys.modules
        for name in names
        if hasattr(sys.modules[module], name)
    }


def _replaced(kept: Mapping[tuple[str, str], Any]) -> str:
    """The first function that is no longer the one it was."""
    for (module, name), function in kept.items():
        if getattr(sys.modules[module], name, None) is not function:
            return f"{module}.{name}"
    return ""


def _load(side: Any, file: Path) -> Callable[..., Any]:
    from parity.frameworks import load_target

    with side.watching():
        try:
            function, _ = load_target(f"{file}:solve")
        except ValueError as e:
            if "no function" in str(e):
                raise LimitError("no_entry_point", f"{file.name} defines no function solve") from e
            raise
    return function


def _race(job: Mapping[str, Any]) -> dict[str, Any]:
    """Times the solutions in some files: {name: [backend, file]}."""
    from parity.timing import NothingSeen
    from puzzles import gpu_side
    from puzzles.puzzle import HOME, load

    solves = {}
    for name, (backend, file) in job["solves"].items():
        side = _side(backend, True)
        solves[name] = side, _load(side, Path(file))
    try:
        return {"ok": True, "raced": gpu_side.race(load(HOME / job["puzzle"]), solves, job["seed"])}
    except NothingSeen as e:  # the machine cannot time, unless it is one of them that ran no kernel
        unable = not str(e).startswith(tuple(f"{name}: " for name in solves))
        return {"ok": False, "verdict": "raised", "detail": str(e), "unable": unable}


def _run(
    side: Any, solve: Callable[..., Any], job: Mapping[str, Any], guard: _Guard
) -> dict[str, Any]:
    arrays = dict(np.load(job["inputs"]))
    began = perf_counter()
    if job["do"] == "ghost":
        with guard.learner():
            outputs = side.ghost(solve, arrays, job["options"])
        seen: dict[str, Any] = {}
    else:
        with guard.learner():
            outputs, found = side.call(solve, arrays, job["options"], job["glue"])
        seen = asdict(found)
    _save(job["outputs"], outputs)
    return {"ok": True, "seen": seen, "seconds": perf_counter() - began}


def _save(path: str, outputs: tuple[np.ndarray, ...]) -> None:
    """Dtypes that NumPy's files do not know go as bytes; their names go beside them."""
    named = {}
    for i, x in enumerate(outputs):
        x = np.ascontiguousarray(x)
        named[f"{i}:{x.dtype.name}:{','.join(map(str, x.shape))}"] = x.reshape(-1).view(np.uint8)
    np.savez(path, **named)


def _failed(e: BaseException, job: Mapping[str, Any]) -> dict[str, Any]:
    """The verdict on an exception of the learner's code, with the line it came from."""
    while type(e).__name__ == "InterpreterError" and e.__cause__ is not None:
        e = e.__cause__  # Triton's interpreter wraps what a kernel raises
    said = str(e).strip().splitlines() or [""]
    detail = f"{type(e).__name__}: {said[0][:300]}"
    if inner := [line for line in said[1:] if _RAISED.match(line)]:
        detail = inner[-1][:300]
    words = f"{type(e).__name__} {e}".lower()
    if isinstance(e, LimitError):
        verdict, detail = e.verdict, str(e)
    elif isinstance(e, MemoryError) or any(sign in words for sign in _MEMORY):
        verdict = "memory"
    elif type(e).__name__ == "StrayError":
        verdict, detail = "past_the_end", str(e)
    elif getattr(e, "parity_reason", "") == "race":
        verdict = "race"
        detail = (
            said[0].removeprefix("RACE: ").replace(f"{os.path.basename(job['file'])}:", "line ")
        )
    elif beyond := _BEYOND.search(detail if inner else str(e)):
        place = f"[{_SLICE.sub(r'\1:\2', beyond[1]).rstrip(',')}] of an array of shape {beyond[2]}"
        does = "read" if "out-of-bounds read" in words else "written to"
        verdict, detail = "past_the_end", f"{place} is {does}"
    elif isinstance(e, (SystemExit, KeyboardInterrupt)):
        verdict = "raised"
    else:
        verdict = "import_error" if job["do"] == "load" else "raised"
        if "misaligned" in words:
            detail = f"{_MISALIGNED} ({detail[:120]})"
        detail = detail.rstrip(".: ")
        detail += next((f" ({means})" for sign, means in _MEANS.items() if sign in detail), "")
    return {"ok": False, "verdict": verdict, "detail": detail, **_where(e, job.get("file", ""))}


def _where(e: BaseException, file: str) -> dict[str, Any]:
    """The line of the learner's file: the kernel's, or the last one an exception passed through."""
    for name, line in getattr(e, "places", ()):  # the interpreter knows them
        if name == file:
            linecache.checkcache(file)  # it held another solution before
            return {"line": line, "code": linecache.getline(file, line).strip()}
    if getattr(e, "parity_reason", "") == "race" and (
        line := re.search(rf"\b{re.escape(os.path.basename(file))}:(\d+)", str(e))
    ):
        linecache.checkcache(file)
        return {"line": int(line[1]), "code": linecache.getline(file, int(line[1])).strip()}
    for cause in _causes(e):  # the first one that passed through the file
        frames = [f for f in traceback.extract_tb(cause.__traceback__) if f.filename == file]
        if frames:
            return {"line": frames[-1].lineno, "code": frames[-1].line}
    return {}


def _causes(e: BaseException | None) -> Any:
    seen: list[BaseException] = []
    while e is not None and e not in seen:
        seen.append(e)
        e = e.__cause__ or e.__context__
    return reversed(seen)
