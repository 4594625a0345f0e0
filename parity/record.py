"""Measured results as JSON lines: one object a row, the last row of a key standing.

A file is only ever appended to, one whole line at a time, so a run killed in the middle leaves
valid rows. A line that is truncated or foreign is refused by its number, and the rest is kept.

    {"schema": 1, "problem": "softmax", "workload": "softmax_8192x8192", "pass": "fwd",
     "dtype": "bfloat16", "impl": "triton", "device": "NVIDIA H200", "check": "pass",
     "error": .., "yardstick": .., "us": {"p10": .., "p50": .., "p90": ..}, "busy_us": ..,
     "launch_us": .., "compile_s": .., "flops": .., "bytes": .., "roof": .., "ceilings": {..},
     "config": {..}, "versions": {..}, "commit": "..", "source": "..", "when": ".."}

`us` is null where nothing was timed; further fields may follow.
"""

import hashlib
import json
import math
import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from parity import rungs

SCHEMA = 1
RECORDS = Path(__file__).parent / "records"

Row = dict[str, Any]
Key = tuple[str, str, str, str, str]

KEY = ("problem", "workload", "pass", "dtype", "impl")
_TEXT = (*KEY, "device", "check", "commit", "source", "when")
_NUMBER_OR_NULL = ("error", "yardstick", "busy_us", "launch_us", "compile_s", "roof")
_NUMBER = ("flops", "bytes")
_OBJECT = ("config", "versions")
_CHECK = re.compile(r"pass|none|fail:.+", re.DOTALL)


@dataclass(frozen=True)
class Refused:
    """A line that is not a row: its number, from 1, and why."""

    line: int
    why: str


@dataclass(frozen=True)
class Records:
    """The good rows of a file in its order, and the lines that are none."""

    rows: tuple[Row, ...]
    refused: tuple[Refused, ...]

    @property
    def latest(self) -> dict[Key, Row]:
        """The row that stands for each key."""
        return latest(self.rows)


def key(row: Mapping[str, Any]) -> Key:
    return tuple(row[name] for name in KEY)  # type: ignore[return-value]


def latest(rows: Iterable[Row]) -> dict[Key, Row]:
    """The last row of each key."""
    return {key(row): row for row in rows}


def slug(device: str) -> str:
    """The folder of a device's records: "NVIDIA H200" -> "nvidia_h200"."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_") or "unknown"


def path_for(device: str, stem: str, root: Path = RECORDS) -> Path:
    return root / slug(device) / f"{stem}.jsonl"


def wrong_with(row: Any) -> str:
    """Why this is no row of schema 1; "" if it is one."""
    if not isinstance(row, dict):
        return "not a JSON object"
    if row.get("schema") != SCHEMA or isinstance(row.get("schema"), bool):
        return f"schema is {row.get('schema')!r}, expected {SCHEMA}"
    for name in _TEXT:
        if not isinstance(row.get(name), str):
            return f"{name}: expected text, got {row.get(name)!r}"
    if not _CHECK.fullmatch(row["check"]):
        return f"check: expected pass, none or fail:<reason>, got {row['check']!r}"
    for name in (*_NUMBER, *_NUMBER_OR_NULL):
        if name not in row:
            return f"{name} is missing"
        if not (_is_number(row[name]) or (row[name] is None and name in _NUMBER_OR_NULL)):
            return f"{name}: expected a number, got {row[name]!r}"
    for name in _OBJECT:
        if not isinstance(row.get(name), dict):
            return f"{name}: expected an object, got {row.get(name)!r}"
    if "us" not in row or "ceilings" not in row:
        return f"{'ceilings' if 'us' in row else 'us'} is missing"
    us, ceilings = row["us"], row["ceilings"]
    if us is None:
        return ""
    if not isinstance(us, dict) or not all(_is_number(us.get(p)) for p in ("p10", "p50", "p90")):
        return f"us: expected p10, p50 and p90, got {us!r}"
    if not 0 < us["p10"] <= us["p50"] <= us["p90"]:
        return f"us: expected 0 < p10 <= p50 <= p90, got {us!r}"
    names = ("copy_gbps", "read_gbps", "gemm_tflops")
    if not isinstance(ceilings, dict) or not all(_is_number(ceilings.get(n)) for n in names):
        return f"ceilings: expected {', '.join(names)}, got {ceilings!r}"
    return ""


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def append(path: Path, row: Row) -> None:
    """Adds one row: a whole line in one write, flushed to the disk.

    Raises:
        ValueError: the row breaks the schema; the file is left as it is.
    """
    row = _without_nan(row)
    if why := wrong_with(row):
        raise ValueError(f"not a row: {why}")
    line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+", buffering=0) as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a run was killed in the middle of its last line
                line = b"\n" + line
        file.write(line)
        os.fsync(file.fileno())


def _without_nan(x: Any) -> Any:
    """JSON has no NaN: what was not measured is null."""
    if isinstance(x, float) and not math.isfinite(x):
        return None
    if isinstance(x, Mapping):
        return {k: _without_nan(v) for k, v in x.items()}
    return [_without_nan(v) for v in x] if isinstance(x, (list, tuple)) else x


def parse(text: bytes) -> Records:
    """The rows of a file's content; blank lines are nothing."""
    rows: list[Row] = []
    refused: list[Refused] = []
    lines = text.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            cut = number == len(lines)
            refused.append(Refused(number, "truncated" if cut else "not JSON"))
            continue
        if why := wrong_with(row):
            refused.append(Refused(number, why))
        else:
            rows.append(row)
    return Records(tuple(rows), tuple(refused))


def read(path: Path) -> Records:
    """The rows of a file; a file that is not there has none."""
    return parse(path.read_bytes()) if path.exists() else Records((), ())


def read_device(device: str, root: Path = RECORDS) -> dict[str, Records]:
    """stem -> its records on one device."""
    return {p.stem: read(p) for p in sorted((root / slug(device)).glob("*.jsonl"))}


def files_of(path: str | Path) -> list[Path]:
    """A twin's file and those named after it: moe_gemm.py, moe_gemm_dw.py."""
    path = Path(path)
    return [path, *sorted(path.parent.glob(f"{path.stem}_*.py"))]


def source_hash(path: str | Path, workload: str) -> str:
    """Twelve hex digits of a twin's files without the tuned rungs of other workloads."""
    return hashed("".join(rungs.only(file.read_text(), workload) for file in files_of(path)))


def hashed(content: bytes | str) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[
        :12
    ]


def identity(**what: Any) -> str:
    """Twelve hex digits of everything that a result depends on; resuming compares them."""
    return hashed(json.dumps(what, sort_keys=True, default=str))


def commit(where: Path = RECORDS.parent) -> str:
    """The checkout's commit, with a + where files differ from it; "unknown" outside of one.

    PARITY_COMMIT in the environment says it where a copy runs that git knows nothing of.
    """
    if said := os.environ.get("PARITY_COMMIT"):
        return said
    git = ["git", "-C", str(where)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    changed = [
        line for line in dirty.stdout.splitlines() if not line.strip().endswith(".jsonl")
    ]  # rows of the run itself
    return head.stdout.strip() + ("+" if changed else "")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
