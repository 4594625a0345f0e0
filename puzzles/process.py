"""The child process as the parent holds it: started, asked, listened to, ended."""

import contextlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from parity.spec import NUMPY_DTYPES
from parity.workers import ROOT, Broken, death, kill
from puzzles.puzzle import Limits

START_SECONDS = 60.0
COMPILE_SECONDS, GPU_SECONDS = 60.0, 300.0  # for one case, and for all and the race
FLOOD = 1 << 20  # bytes printed after which the process is ended
KEPT = 64 << 10  # bytes of them that are kept


class Child:
    """One process, started when it is first asked and again after it died.

    gpu: it compiles for the GPU instead of interpreting, which takes longer.
    """

    def __init__(self, backend: str, limits: Limits, *, gpu: bool = False) -> None:
        self.backend, self.gpu = backend, gpu
        self.limits = replace(limits, case_s=COMPILE_SECONDS, wall_s=GPU_SECONDS) if gpu else limits
        self.until = 0.0
        self.process: subprocess.Popen | None = None
        self.printed = bytearray()
        self.flooded = False
        self.source, self.loaded = "", ("", False)

    def __enter__(self) -> "Child":
        self._folder = tempfile.TemporaryDirectory(prefix="puzzle-")
        self.folder = Path(self._folder.name)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()
        self._folder.cleanup()

    def output(self) -> str:
        """What was printed, the beginning."""
        return bytes(self.printed).decode(errors="replace")

    def load(self, source: str, *, other: bool = False) -> dict[str, Any]:
        """Imports a solution, in a process that has imported others if it still lives.

        other: it is not the learner's, for whom the time begins to run here.
        """
        if not other and source != self.source:
            self.source, self.until = source, time.monotonic() + self.limits.wall_s
            self.printed.clear()
            self.flooded = False
        file = self.folder / ("other.py" if other else "solution.py")
        file.write_text(source)
        self.loaded = (source, other)
        return self._ask({"do": "load", "file": str(file)}, self.limits.case_s)

    def call(
        self,
        arrays: Mapping[str, np.ndarray],
        options: Mapping[str, Any],
        glue: tuple[str, ...],
        *,
        do: str = "run",
    ) -> dict[str, Any]:
        """One call of solve: {"ok", "seen", "outputs", "seconds"}, or {"ok", "verdict", "detail"}.

        do: "run", or "ghost" for kernels that do nothing.
        """
        if self.process is None:
            source, other = self.loaded
            if not (again := self.load(source, other=other))["ok"]:
                return again
        inputs, outputs = self.folder / "inputs.npz", self.folder / "outputs.npz"
        np.savez(inputs, **arrays)  # pyright: ignore[reportArgumentType]
        outputs.unlink(missing_ok=True)
        answer = self._ask(
            {"do": do, "inputs": str(inputs), "outputs": str(outputs), "options": dict(options),
             "glue": list(glue), "file": str(self.folder / "solution.py")},
            self.limits.case_s,
        )  # fmt: skip
        if answer["ok"]:
            answer["outputs"] = _read(outputs)
        return answer

    def race(self, puzzle: str, solves: Mapping[str, tuple[str, str]], seed: int) -> dict[str, Any]:
        """Times solutions against the puzzle's baseline: {"ok", "raced"}, the fields of a Raced.

        Not ok but "unable": this machine cannot time. solves: name -> (backend, source).
        """
        files = {}
        for name, (backend, source) in solves.items():
            file = self.folder / f"{name}.py"
            file.write_text(source)
            files[name] = backend, str(file)
        self.until = time.monotonic() + self.limits.wall_s
        job = {"do": "race", "puzzle": puzzle, "solves": files, "seed": seed}
        return self._ask(job, self.limits.wall_s)

    # Beneath.

    def _ask(self, job: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        if self.process is None:
            self._start()
        assert self.process is not None
        seconds = max(0.1, min(seconds, self.until - time.monotonic()))
        late = threading.Event()

        def expire(process: subprocess.Popen) -> None:
            late.set()
            kill(process)

        timer = threading.Timer(seconds, expire, [self.process])
        timer.daemon = True
        timer.start()
        line = ""
        try:
            self._jobs.write(json.dumps(job) + "\n")
            self._jobs.flush()
            line = self._answers.readline()
        except (BrokenPipeError, OSError):
            pass
        finally:
            timer.cancel()
        message = _message(line)
        if message is not None and message.get("word") == self.word:
            if message.get("verdict") in ("patched", "outside"):
                self._end()  # whatever it did to its process goes with it
            return {k: v for k, v in message.items() if k != "word"}
        process = self.process
        if line.strip():
            self._end()
            return {"ok": False, "verdict": "forged", "detail": "a line that is not the grader's"}
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)
        code = process.returncode
        self._end()
        if self.flooded:
            detail = f"over {FLOOD >> 20} MiB were printed"
            return {"ok": False, "verdict": "flood", "detail": detail}
        if late.is_set():
            return {"ok": False, "verdict": "timeout", "detail": f"no answer after {seconds:.0f} s"}
        if b"bad_alloc" in self.printed or b"MemoryError" in self.printed:
            return {"ok": False, "verdict": "memory", "detail": "memory ran out in native code"}
        return {"ok": False, "verdict": "crashed", "detail": f"it ended with {death(code)}"}

    def _start(self) -> None:
        """Raises Broken if the backend cannot even be imported here."""
        jobs_read, jobs_write = os.pipe()
        answers_read, answers_write = os.pipe()
        code = (
            f"import sys; sys.path.insert(0, {str(ROOT)!r}); from puzzles.child import serve; "
            f"serve({self.backend!r}, {str(self.folder)!r}, {jobs_read}, {answers_write}, "
            f"{self.limits.data_gib}, {self.gpu})"
        )
        # TMPDIR: what a framework writes on its own behalf stays in the folder too
        env = {**os.environ, "TMPDIR": str(self.folder), "TRITON_CACHE_DIR": str(self.folder)}
        if self.gpu:
            for name in ("TRITON_INTERPRET", "JAX_PLATFORMS"):
                env.pop(name, None)
        self.process = subprocess.Popen(
            [sys.executable, "-B", "-W", "ignore", "-c", code],  # of NaN inside kernels
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(jobs_read, answers_write),
            start_new_session=True,
            env=env,
        )
        os.close(jobs_read)
        os.close(answers_write)
        self._jobs, self._answers = os.fdopen(jobs_write, "w"), os.fdopen(answers_read)
        self.listener = threading.Thread(target=self._listen, args=(self.process,), daemon=True)
        self.listener.start()
        self.word = secrets.token_hex(8)
        self._jobs.write(json.dumps({"word": self.word}) + "\n")
        self._jobs.flush()
        timer = threading.Timer(START_SECONDS, kill, [self.process])
        timer.start()
        first = _message(self._answers.readline())
        timer.cancel()
        if first is None or "broken" in first:
            why = (first or {}).get("broken") or self.output()[-300:] or "it never answered"
            self._end()
            raise Broken(str(why))

    def _listen(self, process: subprocess.Popen) -> None:
        """Keeps the beginning of what is printed; ends a process that prints without end."""
        assert process.stdout is not None
        count = 0
        while chunk := process.stdout.read1(1 << 16):  # pyright: ignore[reportAttributeAccessIssue]
            count += len(chunk)
            self.printed += chunk[: max(0, KEPT - len(self.printed))]
            if count > FLOOD and not self.flooded:
                self.flooded = True
                kill(process)
        process.stdout.close()

    def _end(self) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        kill(process)
        process.wait()
        self.listener.join(2)
        for pipe in (self._jobs, self._answers):
            with contextlib.suppress(OSError):
                pipe.close()


def _message(line: str) -> dict[str, Any] | None:
    try:
        message = json.loads(line)
    except json.JSONDecodeError:
        return None
    return message if isinstance(message, dict) else None


def _read(path: Path) -> list[np.ndarray]:
    found = []
    with np.load(path) as file:
        for name in file.files:
            _, dtype, shape = name.split(":")
            sizes = tuple(int(n) for n in shape.split(",") if n)
            found.append(file[name].view(NUMPY_DTYPES.get(dtype) or np.dtype(dtype)).reshape(sizes))
    return found
