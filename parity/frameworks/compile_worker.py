"""What the two compile workers share: the line protocol, which Config ran, reading ptxas and SASS.

A worker reads one JSON job on standard input and answers one JSON line per request, so that the
process that asked (`parity.compile`) needs no framework, sees progress, and knows whom to blame
when a compiler takes the whole process down.
"""

import dataclasses
import json
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


Request = dict[str, Any]


def serve(compile_one: Callable[[Request], list[Row]]) -> None:
    """Answers every request of the job: {"start": id}, then {"id": id, "rows": [...]}."""
    answers = os.fdopen(os.dup(1), "w")
    # what kernels, compilers and their child processes print must not mix with the answers
    os.dup2(2, 1)
    for request in json.load(sys.stdin)["requests"]:
        _say(answers, {"start": request["id"]})
        try:
            rows = compile_one(request)
        except Exception as error:
            rows = [failure(which, request, error) for which in request["passes"]]
        _say(answers, {"id": request["id"], "rows": rows})


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
    "tma_load": r"UTMALDG",
    "tma_store": r"UTMASTG|UTMAREDG",
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
    serialised = re.search(r"\((C75\d+)\)[^\n]*wgmma[^\n]* serialized[^\n]*", log)
    return {
        "registers": int(used[1]),
        "stack": stack,
        "spills": stores + loads,
        "serialised_wgmma": serialised[0].strip() if serialised else "",
    }


def sass_numbers(sass: str) -> Row:
    """How many instructions of each interesting kind the disassembly holds (static counts)."""
    return {name: len(re.findall(rf"\b(?:{op})\b", sass)) for name, op in _INSTRUCTIONS.items()}


def verdict(row: Row) -> Row:
    """Adds status and message: green only without a spill, local memory or a serialised wgmma."""
    faults = []
    if row.get("spills"):
        faults.append(f"spills {row['spills']} bytes at {row['registers']} registers")
    elif row.get("local"):
        faults.append(f"{row['local']} local-memory instructions, stack {row['stack']} bytes")
    if row.get("serialised_wgmma"):
        faults.append(f"wgmma serialised: {row['serialised_wgmma']}")
    row["serialised_wgmma"] = bool(row["serialised_wgmma"])
    return row | {"status": "fail" if faults else "ok", "message": "; ".join(faults)}


# One readable line out of an exception.


def failure(which: str, request: Request, error: BaseException | str, **known: Any) -> Row:
    message = error if isinstance(error, str) else one_line(error)
    kernel = request["implementation"].rpartition(":")[2]
    return (
        {"kernel": kernel, "config": {}}
        | known
        | {
            "pass": which,
            "status": "fail",
            "message": message,
        }
    )


def one_line(error: BaseException, limit: int = 300) -> str:
    """The cause of an error as one line: the deepest exception that has words, else its place."""
    while True:
        deeper = error.__cause__
        if deeper is None or not str(deeper).strip():
            break
        error = deeper
    text = str(error)
    ptxas = re.search(r"^.*ptxas.*(?:error|fatal)\s*:.*$", text, re.MULTILINE)
    if ptxas:
        text = ptxas[0]
    elif type(error).__name__ in ("CompilationError", "UnsupportedLanguageConstruct"):
        text = _without_source(text)  # triton quotes the kernel up to the line at fault
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return f"{type(error).__name__} {_place(error)}".strip()
    # the first paragraph says what is wrong, the rest is the way there
    message = " ".join(lines[:3]) if len(lines[0]) < 60 else lines[0]
    message = re.sub(r"\s+", " ", message)
    return f"{type(error).__name__}: {message}"[:limit]


def _without_source(text: str) -> str:
    head = text.splitlines()[0].rstrip(":")
    words = [line for line in text.splitlines() if line.strip()]
    after = next((i + 1 for i, line in enumerate(words) if line.strip() == "^"), len(words) - 1)
    quoted = words[after - 2].strip() if after >= 2 else ""
    return f"{' '.join(words[after:]) or words[-1]} ({head}: {quoted})"


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return ""
    last = frames[-1]
    return f"at {Path(last.filename).name}:{last.lineno}: {last.line}"
