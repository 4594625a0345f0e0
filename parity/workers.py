"""Checks in child processes: whatever a kernel does to its process, the harness gets a verdict.

The parent imports no framework. A worker is put into CPU or GPU mode once, reads one JSON job a
line on standard input and answers in JSON lines, so that a hang, a crash of the interpreter, a dead
CUDA context or a kernel that prints costs one workload and never the run.
"""

import contextlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from io import BufferedWriter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 120.0  # within which a process that is timed from its first answer has to start

Ask = Callable[["Job", Callable[[str], None]], list[dict]]


@dataclass(frozen=True)
class Job:
    """One workload of one problem, and who is to be checked on it ({"triton"|"pallas": target})."""

    problem: str
    workload: str
    passes: tuple[str, ...]
    dtype: str
    impls: Mapping[str, str]
    seed: int = 0
    alone: bool = False  # in a fresh process: the memory pools of two frameworks leave no room
    sizes: Mapping[str, int] = field(default_factory=dict)  # instead of the workload's
    without: tuple[str, ...] = ()  # options and optional inputs to leave out

    @property
    def name(self) -> str:
        return f"{self.problem} {self.workload}"


@dataclass(frozen=True)
class Event:
    """A step begins (`phrase`), or a job is over (`rows`, as Check.to_json() has them)."""

    job: Job
    phrase: str = ""
    rows: tuple[dict, ...] | None = None


def run(
    jobs: Iterable[Job],
    *,
    mode: str,
    workers: int = 1,
    timeout: float | None = None,
    give_up: bool = False,
    log: Path | None = None,
) -> Generator[Event]:
    """Checks the jobs in child processes and yields events as they come.

    Args:
        mode: "cpu" for the interpreters, "gpu" for compiled kernels.
        workers: processes at a time.
        timeout: seconds for one pass of a job, starting the process included.
        give_up: after a pass that ran out of time, answer the rest without running it.
        log: where what the workers and their kernels print goes.
    """
    todo: queue.Queue[Job] = queue.Queue()
    for job in jobs:
        todo.put(job)
    events: queue.Queue[Event | BaseException | None] = queue.Queue()
    sink = open(log, "ab") if log else None
    crew = [
        _Worker(mode, timeout, give_up, sink) for _ in range(max(1, min(workers, todo.qsize())))
    ]
    hung = threading.Event()

    def work(worker: _Worker) -> None:
        try:
            while True:
                try:
                    job = todo.get_nowait()
                except queue.Empty:
                    return
                if hung.is_set():
                    detail = "not run: an earlier workload ran out of time"
                    events.put(Event(job, rows=tuple(_verdicts(job, "timeout", detail))))
                    continue
                if job.alone:
                    worker.stop(for_good=False)
                rows = worker.check(job, lambda phrase, job=job: events.put(Event(job, phrase)))
                if job.alone:
                    worker.stop(for_good=False)
                if give_up and any(row["reason"] == "timeout" for row in rows):
                    hung.set()
                events.put(Event(job, rows=tuple(rows)))
        except BaseException as e:
            events.put(e)
        finally:
            worker.stop()
            events.put(None)

    threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in crew]
    for thread in threads:
        thread.start()
    try:
        running = len(threads)
        while running:
            event = events.get()
            if event is None:
                running -= 1
            elif isinstance(event, BaseException):
                raise event
            else:
                yield event
    finally:
        for worker in crew:
            worker.stop()
        if sink:
            sink.close()


@contextlib.contextmanager
def one(mode: str, timeout: float | None, log: Path | None = None) -> Iterator[Ask]:
    """A single child process that is asked job by job: ask(job, tell) -> rows.

    It is started again after a job that ended it. The timeout is that of one pass, and runs from
    the process's first sign of life.
    """
    with open(log, "ab") if log else contextlib.nullcontext() as sink:
        worker = _Worker(mode, timeout, give_up=False, sink=sink, start=START_SECONDS)
        try:
            yield worker.check
        finally:
            worker.stop()


class Broken(RuntimeError):
    """A worker cannot even start: the machine is at fault and no kernel."""


class _Worker:
    """One child process, started when it is first needed and again after it died."""

    def __init__(
        self,
        mode: str,
        timeout: float | None,
        give_up: bool,
        sink: BufferedWriter | None,
        start: float = 0.0,  # seconds to start in, which the timeout does not count
    ) -> None:
        self.mode, self.timeout, self.give_up, self.sink = mode, timeout, give_up, sink
        self.start = start
        self.process: subprocess.Popen | None = None
        self.stopped, self.lock = False, threading.Lock()

    def check(self, job: Job, tell: Callable[[str], None]) -> list[dict]:
        """Rows of every pass and implementation; one that dies takes no other with it."""
        rows: list[dict] = []
        waiting = [(which, dict(job.impls)) for which in job.passes]
        while waiting:
            which, impls = waiting.pop(0)
            part = replace(job, passes=(which,), impls=impls)
            began = time.perf_counter()
            found, guilty, reason, detail = self._one_pass(part, tell)
            rows += found
            if not reason:
                continue
            seconds = time.perf_counter() - began
            blamed = replace(part, impls={impl: impls[impl] for impl in guilty})
            rows += _verdicts(blamed, reason, detail, seconds)
            if rest := {impl: target for impl, target in impls.items() if impl not in guilty}:
                waiting.insert(0, (which, rest))
            if self.give_up and reason == "timeout":
                for later, impls in waiting:
                    skipped = replace(job, passes=(later,), impls=impls)
                    rows += _verdicts(skipped, reason, f"not run: the {which} ran out of time")
                break
        order = [(which, impl) for which in job.passes for impl in job.impls]
        return sorted(rows, key=lambda row: order.index((row["which"], row["impl"])))

    def _one_pass(
        self, job: Job, tell: Callable[[str], None]
    ) -> tuple[list[dict], list[str], str, str]:
        """(rows, whom to blame, reason, detail); the last three are empty if all went well."""
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        out_of_time = threading.Event()

        def expire() -> None:
            out_of_time.set()
            kill(process)

        def timed(limit: float) -> threading.Timer:
            timer = threading.Timer(limit, expire)
            timer.daemon = True
            timer.start()
            return timer

        timer = timed(self.timeout + self.start) if self.timeout else None
        started = not self.start
        step = f"{job.name}: starting"
        try:
            tell(step)
            _say(process.stdin, asdict(job))
            while line := process.stdout.readline():
                message = json.loads(line)
                if timer and self.timeout and not started:
                    timer.cancel()
                    timer, started = timed(self.timeout), True
                if "broken" in message:
                    raise Broken(message["broken"])
                if "rows" in message:
                    rows = message["rows"]
                    if self.mode == "gpu" and any(row["reason"] == "crash" for row in rows):
                        self.stop(for_good=False)  # a CUDA error stays with its process
                    return rows, [], "", ""
                step = message["step"]
                tell(step)
        except (BrokenPipeError, json.JSONDecodeError):
            pass  # it died, or was killed in the middle of a line
        finally:
            if timer:
                timer.cancel()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)  # its own exit status, if it is on its way out
        self.stop(for_good=False)
        under_way = step.rpartition(": ")[2]  # check tells "problem workload pass: implementation"
        guilty = [under_way] if under_way in job.impls else list(job.impls)
        if out_of_time.is_set():
            return [], guilty, "timeout", f"no answer after {self.timeout:g} s"
        return [], guilty, "crash", f"the process died: {death(process.returncode)}"

    def stop(self, *, for_good: bool = True) -> None:
        """Ends the process, from any thread; for good: it is not started again."""
        self.stopped |= for_good
        with self.lock:
            process, self.process = self.process, None
        if process is None:
            return
        kill(process)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]

    def _started(self) -> subprocess.Popen:
        if self.process is None:
            if self.stopped:
                raise RuntimeError("the run was stopped")
            self.process = subprocess.Popen(
                command(self.mode),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.sink or subprocess.DEVNULL,
                text=True,
                # NumPy's threads would fight those of Mosaic's interpreter
                env={"OPENBLAS_NUM_THREADS": "1"} | os.environ,
                start_new_session=True,  # Ctrl-C is the parent's, which then ends the whole group
            )
        return self.process


def command(mode: str) -> list[str]:
    """How a child is started: from this checkout, whatever the working directory holds."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
    return [sys.executable, "-c", f"{code}from parity.workers import serve; serve({mode!r})"]


def kill(process: subprocess.Popen) -> None:
    """Ends a process that leads its own session, and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()


def death(code: int | None) -> str:
    """How a process ended, in words."""
    if code is None or code >= 0:
        return f"it ended with exit code {code} before it answered"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _verdicts(job: Job, reason: str, detail: str, seconds: float = 0.0) -> list[dict]:
    """Rows like Check.to_json() for a job that never came to a verdict of its own."""
    return [
        {
            "problem": job.problem,
            "workload": job.workload,
            "which": which,
            "impl": impl,
            "dtype": job.dtype,
            "ok": False,
            "reason": reason,
            "detail": detail,
            "error": None,
            "yardstick": None,
            "verdicts": [],
            "seconds": seconds,
            "ulp": None,
            "diagnosis": None,
        }
        for which in job.passes
        for impl in job.impls
    ]


def finite(value: Any) -> Any:
    """The same JSON value with NaN and infinities as null: not every reader takes Python's."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value


def _say(stream: Any, message: Mapping[str, Any]) -> None:
    stream.write(json.dumps(finite(message)) + "\n")
    stream.flush()


def serve(mode: str) -> None:
    """The child: answers every job with {"step": phrase} as it goes and {"rows": [...]} last."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what kernels and compilers print must not mix with the answers
    try:
        from parity import frameworks
        from parity.check import check
        from parity.problems import problem
        from parity.shrink import resized

        frameworks.interpreters() if mode == "cpu" else frameworks.gpu()
    except Exception as e:
        _say(answers, {"broken": sentence(e)})
        raise
    for line in sys.stdin:
        job = Job(**json.loads(line))
        began = time.perf_counter()
        try:
            stem = problem(job.problem)
            checks = check(
                stem,
                resized(stem, stem.workload(job.workload), job.sizes, job.without),
                impls=job.impls,
                passes=job.passes,
                seed=job.seed,
                progress=lambda phrase: _say(answers, {"step": phrase}),
            )
            rows = [row.to_json() for row in checks]
        except (Exception, SystemExit) as e:  # a kernel file may call sys.exit
            rows = _verdicts(job, "crash", sentence(e), time.perf_counter() - began)
        _say(answers, {"rows": rows})


def sentence(e: BaseException) -> str:
    """The kind of the exception and the first line of what it says."""
    words = str(e).strip().splitlines() or ["(no message)"]
    return f"{type(e).__name__}: {words[0][:300]}"
