"""What was found, as terminal tables, as one self-contained page, and as README's table.

It reads three things: committed records (parity/records/<device>/*.jsonl), this machine's latest checks
and compile rows (.cache/results), and the problems themselves. It runs nothing and imports no
framework.
"""

import datetime
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
LOCAL = ROOT / ".cache" / "results"  # the latest results of this machine; never committed


# Results of this machine: one JSON object a line as they come, the last row of a key standing.


def keep_checks(rows: Iterable[Mapping[str, Any]], mode: str, impls: Mapping[str, str]) -> None:
    """Remembers rows of `Check.to_json()` with the sources they were true of."""
    from parity.workers import finite

    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    _append(
        LOCAL / f"check-{mode}.jsonl",
        [
            finite({**row, "device": mode, "when": now, "source": source_of(impls[row["impl"]])})
            for row in rows
        ],
    )


def kept_checks() -> list[dict[str, Any]]:
    """The latest check of each device, problem, workload, pass and twin."""
    rows: dict[tuple, dict[str, Any]] = {}
    for mode in ("cpu", "gpu"):
        for row in _lines(LOCAL / f"check-{mode}.jsonl"):
            key = tuple(row.get(k) for k in ("device", "problem", "workload", "which", "impl"))
            rows[key] = row
    return list(rows.values())


def source_of(target: str) -> str:
    """A short hash of every file of the checkout that an implementation is made of."""
    import hashlib

    from parity.compile import sources

    digest = hashlib.sha256()
    for file in sorted(sources(target)):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def _lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of our own; a line cut short by a kill is passed over."""
    rows = []
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                rows.append(row)
    return rows


def replace_text(path: Path, text: str) -> None:
    """Writes beside and renames: a reader sees the old file or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as part:
        part.write(text)
    os.chmod(part.name, 0o644)
    os.replace(part.name, path)


# Checks.


def sentence_of_checks(rows: Sequence[Mapping[str, Any]], mode: str) -> str:
    """One sentence of meaning."""
    bad = [row for row in rows if not row["ok"]]
    twins = sorted({row["impl"] for row in rows}, reverse=True)
    who = "Both twins agree" if len(twins) == 2 else f"The {twins[0]} twin agrees" if twins else ""
    if not rows:
        return "Nothing was checked."
    if bad:
        kinds = ", ".join(dict.fromkeys(row["reason"] for row in bad))
        return f"[bold red]{len(bad)} of {len(rows)} checks fail[/] ({kinds})."
    raced = mode == "cpu" and "pallas" in twins
    how = "in the interpreters" if mode == "cpu" else "compiled, on the GPU"
    return (
        f"[bold green]All {len(rows)} checks pass[/]: {who.lower() if not who else who} with the "
        f"float64 oracle, {how}{', and no data race was found' if raced else ''}."
    )


def ratio(row: Mapping[str, Any]) -> str:
    """Error over yardstick: 1 is what the mathematics itself loses at this precision."""
    error, yardstick = row.get("error"), row.get("yardstick")
    if error is None or yardstick is None or error != error:
        return ""
    if yardstick == 0:
        return "exact" if error == 0 else f"{error:.1e} / 0"
    return f"{error / yardstick:.2f}" if error / yardstick < 1000 else f"{error:.1e}"


def check_table(rows: Sequence[Mapping[str, Any]], width: int) -> "Table":
    table = _table("problem", "workload", "pass", "twin", "verdict", ">error / yardstick")
    if width >= 100:
        for heading in ("dtype", ">error", ">seconds"):
            _column(table, heading)
    previous = None
    for row in rows:
        same, previous = previous == row["problem"], row["problem"]
        cells = [
            "" if same else row["problem"],
            row["workload"],
            row["which"],
            row["impl"],
            "[green]ok[/]" if row["ok"] else f"[bold red]{row['reason']}[/]",
            ratio(row),
        ]
        if width >= 100:
            error = row.get("error")
            cells += [
                row["dtype"],
                "" if error is None else f"{error:.1e}",
                f"{row['seconds']:.1f}",
            ]
        table.add_row(*cells)
    return table


def _table(*headings: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for heading in headings:
        _column(table, heading)
    return table


def _column(table: "Table", heading: str) -> None:
    right = heading.startswith(">")
    table.add_column(heading.lstrip(">"), justify="right" if right else "left", overflow="fold")
