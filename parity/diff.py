"""Two runs beside each other: FASTER, SLOWER, SAME or UNDECIDED for every result of both.

A run is a record file, a folder of them, or the records that a git revision holds. What became
slower is judged for the twins alone: the peers are nobody's change, so that what became of them
says what the machine and its libraries did in the meantime.
"""

import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parity import record, timing
from parity.record import Row

if TYPE_CHECKING:
    import rich.table

RED, UNTIMED, UNCHANGED, ADDED, REMOVED = "red", "untimed", "unchanged", "added", "removed"
# What tells two runs apart, worst first; the rest says why nothing can be told.
TOLD = (RED, timing.SLOWER, timing.FASTER, timing.UNDECIDED, timing.SAME)
BAD = (RED, timing.SLOWER)
ORDER = (*TOLD, UNTIMED, ADDED, REMOVED, UNCHANGED)


@dataclass(frozen=True)
class Run:
    """The rows of one side, and the lines that are none."""

    name: str
    rows: tuple[Row, ...]
    refused: tuple[str, ...] = ()

    @property
    def latest(self) -> dict[tuple[str, record.Key], Row]:
        """The row that stands for each device and key."""
        return {(row["device"], record.key(row)): row for row in self.rows}

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row["device"] for row in self.rows))


def _run(name: str, files: Mapping[str, bytes]) -> Run:
    rows: list[Row] = []
    refused: list[str] = []
    for place, content in files.items():
        found = record.parse(content)
        rows += found.rows
        refused += [f"{place}:{line.line} refused: {line.why}" for line in found.refused]
    return Run(name, tuple(rows), tuple(refused))


def from_path(path: Path, name: str = "") -> Run:
    """A record file, or every record file below a folder."""
    files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    return _run(name or str(path), {str(file): file.read_bytes() for file in files})


def from_here() -> Run:
    """The records as they lie in the checkout, committed or not."""
    return from_path(record.RECORDS, "the records here")


def from_revision(revision: str) -> Run | None:
    """The records as a commit holds them; None where git knows no such commit."""
    if revision.startswith("-"):
        return None
    try:
        commit = _git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
        commit = commit.decode().strip()
        listed = _git("ls-tree", "-r", "-z", "--name-only", commit).decode().split("\0")
        names = [name for name in listed if name.endswith(".jsonl")]
        files = {f"{revision}:{name}": _git("show", f"{commit}:./{name}") for name in names}
    except (OSError, subprocess.CalledProcessError):
        return None
    return _run(revision, files)


def _git(*words: str) -> bytes:
    git = ["git", "-C", str(record.RECORDS), *words]
    return subprocess.run(git, capture_output=True, check=True).stdout


def committed() -> Run:
    """The reference: the records of the last commit; without git, those that lie here."""
    return from_revision("HEAD") or from_here()


@dataclass(frozen=True)
class Change:
    """One result of two runs: how the new time stands beside the old."""

    device: str
    key: record.Key
    old: timing.Interval | None
    new: timing.Interval | None
    verdict: str  # one of ORDER

    @property
    def peer(self) -> bool:
        return self.key[-1].startswith("peer:")

    def to_json(self) -> dict[str, Any]:
        return {
            "device": self.device,
            **dict(zip(record.KEY, self.key, strict=True)),
            "old": self.old.to_json() if self.old else None,
            "new": self.new.to_json() if self.new else None,
            "verdict": self.verdict,
        }


def changes(old: Run, new: Run) -> list[Change]:
    """What became of every result: twins before peers, the worst first, then as the rows come.

    red: its check fails now. untimed: it was timed, and is now only checked. unchanged: the very
    same row, not measured again. Results that neither run has timed are left out.
    """
    before, after = old.latest, new.latest
    found = []
    for device, key in dict.fromkeys((*before, *after)):
        was, now = before.get((device, key)), after.get((device, key))
        then, since = _time_of(was), _time_of(now)
        if verdict := _became(was, now, then, since):
            found.append(Change(device, key, then, since, verdict))
    return sorted(found, key=lambda change: (change.peer, ORDER.index(change.verdict)))


def _time_of(row: Row | None) -> timing.Interval | None:
    return timing.Interval.from_json(row["us"]) if row and row["us"] else None


def _became(
    was: Row | None, now: Row | None, old: timing.Interval | None, new: timing.Interval | None
) -> str:
    if now and now["check"].startswith("fail"):
        return RED
    if old and new:
        return UNCHANGED if was == now else timing.verdict(new, old)
    if old:
        return UNTIMED if now else REMOVED
    return ADDED if new else ""


def counts(found: Iterable[Change]) -> dict[str, int]:
    verdicts = [change.verdict for change in found]
    return {word: verdicts.count(word) for word in ORDER if word in verdicts}


def versions(old: Run, new: Run) -> list[str]:
    """What else differs: "triton 3.6.0 -> 3.7.0", of the results that both have."""
    before, after = old.latest, new.latest
    moved: dict[str, None] = {}
    for place in after:
        if place in before:
            was, now = before[place]["versions"], after[place]["versions"]
            for name in dict.fromkeys((*was, *now)):
                if was.get(name) != now.get(name):
                    moved[f"{name} {was.get(name, 'none')} -> {now.get(name, 'none')}"] = None
    return list(moved)


def change_table(found: Sequence[Change], width: int) -> "rich.table.Table":
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    wide = width >= 100
    several = len({change.device for change in found}) > 1
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    for heading in ("device",) * several + ("workload", "pass", "impl"):
        made.add_column(heading, overflow="fold")
    percentiles = " \\[p10 p90]" if wide else ""
    for heading in (f"old us{percentiles}", f"new us{percentiles}", "old/new"):
        made.add_column(heading, justify="right")
    made.add_column("verdict")
    colours = {RED: "bold red", "SLOWER": "red", "FASTER": "green", "SAME": "cyan"}
    previous = ""
    for change in found:
        _, workload, which, _, impl = change.key
        workload, previous = "" if workload == previous else workload, workload
        old, new = change.old, change.new
        times = (_shown(us, wide) if us else "" for us in (old, new))
        made.add_row(
            *(change.device,) * several,
            *map(escape, (workload, which, impl, *times)),
            f"{old.p50 / new.p50:.2f}" if old and new else "",
            f"[{colours.get(change.verdict, 'yellow')}]{change.verdict}[/]",
        )
    return made


def _shown(us: timing.Interval, wide: bool) -> str:
    p10, p50, p90 = (f"{t:.1f}" if t < 100 else f"{t:.0f}" for t in (us.p10, us.p50, us.p90))
    return f"{p50} [{p10} {p90}]" if wide else p50
