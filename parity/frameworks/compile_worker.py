"""What the two compile workers share: the line protocol, which Config ran, reading ptxas and SASS.

A worker reads one JSON job on standard input and answers one JSON line per request, so that the
process that asked (`parity.compile`) needs no framework, sees progress, and knows whom to blame
when a compiler takes the whole process down.
"""

import dataclasses
import hashlib
import json
import os
import re
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


Request = dict[str, Any]


def serve(compile_one: Callable[[Request], list[Row]]) -> None:
    """Answers every request: {"start": id}, then {"id": id, "rows": [...], "keep": bool}."""
    answers = os.fdopen(os.dup(1), "w")
    # what kernels, compilers and their child processes print must not mix with the answers
    os.dup2(2, 1)
    for request in json.load(sys.stdin)["requests"]:
        _say(answers, {"start": request["id"]})
        try:
            rows = compile_one(request)
        except Exception as error:
            rows = [failure(which, request, error) for which in request["passes"]]
        # an error of this machine, not of the kernel: true today, perhaps not tomorrow
        keep = not any([row.pop("transient", False) for row in rows])
        _say(answers, {"id": request["id"], "rows": rows, "keep": keep})


def _say(answers: Any, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


class Configs:
    """The Configs a call runs with: the explicit one, or whatever default_config answers."""

    def __init__(self, public: Callable[..., Any], explicit: dict[str, Any] | None):
        """`explicit`: fields of the module's Config, or None. TypeError for unknown fields."""
        self._names = vars(sys.modules[public.__module__])
        self._choose = self._names.get("default_config")
        config = None if explicit is None else self._names["Config"](**explicit)
        self.keywords = {} if config is None else {"config": config}
        self.chosen: list[dict[str, Any]] = []
        self._explicit = _fields(config)

    def __enter__(self) -> "Configs":
        self.chosen = []
        if self._choose is not None:
            self._names["default_config"] = self._record
        return self

    def __exit__(self, *_: object) -> None:
        if self._choose is not None:
            self._names["default_config"] = self._choose

    def _record(self, *args: Any, **keywords: Any) -> Any:
        assert self._choose is not None
        config = self._choose(*args, **keywords)
        self.chosen.append(_fields(config))
        return config

    def latest(self) -> dict[str, Any]:
        return self._explicit or (self.chosen[-1] if self.chosen else {})

    def of_calls(self, count: int) -> list[dict[str, Any]]:
        """One Config for each of `count` kernels: those chosen, in order, if there are as many."""
        if not self._explicit and len(self.chosen) == count:
            return self.chosen
        return [self.latest()] * count


def _fields(config: Any) -> dict[str, Any]:
    return {} if config is None else dataclasses.asdict(config)


# Reading what the assembler said and what it made.

_INSTRUCTIONS = {
    "wgmma": r"[HQIB]GMMA",
    "tma_load": r"UTMALDG|UBLKCP\.S\.G",
    "tma_store": r"UTMASTG|UTMAREDG|UBLKCP\.G\.S",
    "mma_sync": r"[HQID]MMA",
    "local": r"LDL|STL",
}


def ptxas_numbers(log: str) -> Row | None:
    """Registers, stack, spilled bytes, serialised wgmma from `ptxas -v`; None without a kernel."""
    used = re.search(r"Used (\d+) registers", log)
    if used is None:
        return None
    frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", log)
    stack, stores, loads = map(int, frame.groups()) if frame else (0, 0, 0)
    serialised = re.search(r"\((C75\d+)\)[^\n]*wgmma[^\n]* serialized due to ([^\n]*)", log)
    return {
        "registers": int(used[1]),
        "stack": stack,
        "spills": stores + loads,
        "serialised_wgmma": f"{serialised[2]} ({serialised[1]})" if serialised else "",
    }


def sass_numbers(sass: str) -> Row:
    """How many instructions of each interesting kind the disassembly holds (static counts)."""
    return {name: len(re.findall(rf"\b(?:{op})\b", sass)) for name, op in _INSTRUCTIONS.items()}


def keep_listing(folder: Path, ptx: str, sass: str) -> str:
    """Keeps what the assembler read and what it made, for `parity explain`; returns the name."""
    text = ptx.partition(".section")[0] + "\n" + sass  # what follows in PTX is for debuggers
    name = f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.listing"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".part", delete=False) as part:
        part.write(text)
    os.replace(part.name, folder / name)
    return name


def verdict(row: Row) -> Row:
    """Adds status and message: green only without a spill, local memory or a serialised wgmma."""
    faults = []
    if row.get("spills"):
        faults.append(f"spills {row['spills']} bytes at {row['registers']} registers")
    elif row.get("local"):
        faults.append(f"{row['local']} local-memory instructions, stack {row['stack']} bytes")
    if row.get("serialised_wgmma"):
        reason = re.sub(r" in (the )?function '\w*'", "", row["serialised_wgmma"])
        faults.append(f"wgmma serialised: {reason}")
    row["serialised_wgmma"] = bool(row["serialised_wgmma"])
    return row | {"status": "fail" if faults else "ok", "message": "; ".join(faults)}


# One readable line out of an exception.


def failure(which: str, request: Request, error: BaseException | str, **known: Any) -> Row:
    row = {"kernel": request["implementation"].rpartition(":")[2], "config": {}} | known
    if isinstance(error, (OSError, MemoryError, ImportError)):
        row["transient"] = True
    message = error if isinstance(error, str) else one_line(error)
    return row | {"pass": which, "status": "fail", "message": message}


def one_line(error: BaseException, limit: int = 400) -> str:
    """What went wrong and where in the kernel's file: the cause that has words, on one line."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    # jax appends a pseudo-exception that only carries the user's frames
    causes = [e for e in chain if type(e).__name__ != "JaxStackTraceBeforeTransformation"]
    cause = next((e for e in reversed(causes) if str(e).strip()), causes[-1])
    text = str(cause)
    ptxas = re.search(r"ptxas [^\n]*(?:error|fatal)[^\n]*", text)
    if ptxas:
        return re.sub(r"\S*\.ptx, ", "", ptxas[0])[:limit]
    lines = [line.strip() for line in text.split("Please file an issue")[0].splitlines()]
    lines = [line for line in lines if line]
    if type(cause).__name__ == "CompilationError":  # triton quotes the kernel down to the fault
        lines = lines[1 + max((i for i, line in enumerate(lines) if line == "^"), default=-1) :]
    message = " ".join([type(cause).__name__ + ":", *lines[:3]])
    return f"{message[:limit]}{_place(chain)}"


def _place(chain: list[BaseException]) -> str:
    for error in chain:
        quoted = re.match(r"at \d+:\d+:\n.*?([^\n]*)\n\s*\^", str(error), re.DOTALL)
        if quoted:  # triton: a line of the kernel
            return f" (at {quoted[1].strip()!r})"
    frames = [f for error in chain for f in traceback.extract_tb(error.__traceback__)]
    others = (*sysconfig.get_paths().values(), str(Path(__file__).parents[1]), "<")
    ours = [f for f in frames if not f.filename.startswith(others)]
    return f" ({Path(ours[-1].filename).name}:{ours[-1].lineno}: {ours[-1].line})" if ours else ""
