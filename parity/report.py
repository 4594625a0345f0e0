"""What was found, and terminal tables of it; parity/page.py makes a page, parity/readme.py a table.

It reads three things: committed records (parity/records/<device>/*.jsonl), this machine's latest
checks and compile rows (.cache/results), and the problems themselves. It runs nothing and imports
no framework.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parity import record, timing
from parity.record import Row
from parity.spec import Problem, Workload

if TYPE_CHECKING:
    import rich.table

ROOT = Path(__file__).resolve().parents[1]
LOCAL = ROOT / ".cache" / "results"  # the latest results of this machine; never committed
TWINS = ("triton", "pallas")
NAMES = {"triton": "Triton", "pallas": "Pallas"}


# Results of this machine: one JSON object a line as they come, the last row of a key standing.


def keep_checks(rows: Iterable[Mapping[str, Any]], mode: str, impls: Mapping[str, str]) -> None:
    """Remembers rows of `Check.to_json()` with the sources they were true of."""
    now = record.now()
    kept = [{**row, "device": mode, "when": now, "source": source_of(impls[row["impl"]])}
            for row in rows]  # fmt: skip
    _append(LOCAL / f"check-{mode}.jsonl", kept)


def keep_compiles(rows: Sequence[Mapping[str, Any]]) -> None:
    """Remembers rows of `CompileRow.to_json()` in place of those of the same workload and twin."""
    fresh = {_gated(row) for row in rows}
    path = LOCAL / "compile.jsonl"
    standing = [row for row in _rows_of(path) if _gated(row) not in fresh]
    replace_text(path, "".join(json.dumps(row, default=str) + "\n" for row in (*standing, *rows)))


def _gated(row: Mapping[str, Any]) -> tuple:
    return row.get("problem"), row.get("workload"), row.get("twin")


def source_of(target: str) -> str:
    """Twelve hex digits of every file of the checkout that an implementation is made of."""
    from parity.compile import sources

    return record.hashed(b"".join(file.read_bytes() for file in sorted(sources(target))))


def _append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    from parity.workers import finite

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write("".join(json.dumps(finite(row), default=str) + "\n" for row in rows))


def _rows_of(path: Path) -> list[Row]:
    """The rows of a file of our own; a line cut short by a kill is passed over."""
    rows = []
    if path.is_file():
        for line in path.read_text(errors="replace").splitlines():
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
    try:
        os.chmod(part.name, path.stat().st_mode & 0o777 if path.exists() else 0o644)
        os.replace(part.name, path)
    except OSError:
        os.unlink(part.name)
        raise


# All that is known.


@dataclass(frozen=True)
class Cell:
    """One twin on one pass of one workload, in the coverage table."""

    state: str  # "timed", "green", "red", "stale" or "missing"
    text: str


@dataclass(frozen=True)
class Line:
    """One pass of one workload on one device: what everybody took."""

    problem: str
    workload: str
    which: str
    rows: Mapping[str, Row]  # by impl

    def us(self, impl: str) -> timing.Interval | None:
        row = self.rows.get(impl)
        return timing.Interval.from_json(row["us"]) if row and row["us"] else None

    @cached_property
    def best_peer(self) -> str | None:
        """The fastest peer of this pass."""
        timed = {impl: us.p50 for impl, row in self.rows.items()
                 if impl.startswith("peer:") and not is_mark(row)
                 and (us := self.us(impl))}  # fmt: skip
        return min(timed, key=lambda impl: timed[impl], default=None)

    def versus_peer(self, impl: str) -> tuple[float, str] | None:
        """(the best peer's time over ours, FASTER and so on); above 1 we are faster."""
        ours, peer = self.us(impl), self.us(self.best_peer) if self.best_peer else None
        if ours is None or peer is None:
            return None
        return peer.p50 / ours.p50, timing.verdict(ours, peer)


def is_mark(row: Row) -> bool:
    """Whether a peer is a mark to measure by, not what a user would call: it computes less."""
    return "computes" in row["config"]


WHERE = {"gpu": "on the GPU", "cpu": "interpreted"}  # a check ran


@dataclass(frozen=True)
class Distance:
    """How many elements of the twins' first outputs are how many ULP apart, on one pass."""

    workload: str
    which: str
    shares: Mapping[str, float]  # {"0": .., "1": .., ..., ">8": ..}
    where: str
    when: str
    stale: bool  # a twin's source has changed since


@dataclass(frozen=True)
class Results:
    """Records by device, and what this machine found last."""

    records: Mapping[str, Mapping[record.Key, Row]]
    history: Mapping[str, Mapping[record.Key, tuple[Row, ...]]]  # all rows, the oldest first
    refused: tuple[tuple[str, int, str], ...]  # file, line, why
    checks: tuple[Row, ...]
    compared: tuple[Row, ...]  # the latest checks that held the twins against each other
    compiles: tuple[Row, ...]
    problems: tuple[Problem, ...]

    @staticmethod
    def here(root: Path = record.RECORDS, local: Path | None = None) -> "Results":
        from parity.problems import PROBLEMS

        local = local or LOCAL
        history: dict[str, dict[record.Key, tuple[Row, ...]]] = {}
        refused = []
        for path in sorted(root.glob("*/*.jsonl")):
            found = record.read(path)
            name = str(path.relative_to(root.parent))
            refused += [(name, r.line, r.why) for r in found.refused]
            for row in found.rows:
                of_device, key = history.setdefault(row["device"], {}), record.key(row)
                of_device[key] = (*of_device.get(key, ()), row)
        records = {
            device: {key: rows[-1] for key, rows in by_key.items()}
            for device, by_key in history.items()
        }
        names = ("device", "problem", "workload", "which", "impl")
        kept = [*_rows_of(local / "check-cpu.jsonl"), *_rows_of(local / "check-gpu.jsonl")]
        kept = [(tuple(row[n] for n in names), row) for row in kept if all(n in row for n in names)]
        return Results(
            records,
            history,
            tuple(refused),
            tuple(dict(kept).values()),
            tuple({key: row for key, row in kept if row.get("ulp")}.values()),
            tuple(_rows_of(local / "compile.jsonl")),
            PROBLEMS,
        )

    def lines(self, device: str) -> list[Line]:
        """Every measured pass of a device, in the order of the problems."""
        order = self.order
        lines = lines_of(self.records[device].values())
        lines = [x for x in lines if (x.problem, x.workload, x.which) in order]
        return sorted(lines, key=lambda x: order[x.problem, x.workload, x.which])

    @cached_property
    def order(self) -> dict[tuple[str, str, str], int]:
        """The place of every problem, workload and pass."""
        return {(p.stem, w.name, which): i for i, (p, w, which) in enumerate(self._passes())}

    def _passes(self) -> Iterator[tuple[Problem, Workload, str]]:
        for p in self.problems:
            for w in p.workloads:
                for which in w.passes:
                    yield p, w, which

    def stale(self, row: Row) -> bool:
        """Whether the kernel has changed since the row was measured."""
        target = next(p for p in self.problems if p.stem == row["problem"]).implementations
        return row["impl"] in target and row["source"] != self._hash(
            target[row["impl"]], row["workload"]
        )

    def _hash(self, target: str, workload: str) -> str:
        file = ROOT / (target.partition(":")[0].replace(".", "/") + ".py")
        return record.source_hash(file, workload) if file.is_file() else ""

    def outdated(self, check: Row) -> bool:
        """Whether anything that the twin is made of has changed since the check."""
        return check["source"] != self.sources.get((check["problem"], check["impl"]))

    @cached_property
    def sources(self) -> dict[tuple[str, str], str]:
        """What each twin of each problem is made of now."""
        return {
            (p.stem, twin): source_of(target)
            for p in self.problems
            for twin, target in p.implementations.items()
        }

    def distances(self, stem: str) -> list["Distance"]:
        """How far apart the twins were: the latest of each pass, recorded and checked here."""
        found = []
        for device, rows in self.records.items():
            mine = [row for row in rows.values() if row["problem"] == stem and row.get("ulp")]
            # the row of either twin carries the histogram of both
            latest = {(row["workload"], row["pass"]): row for row in mine}
            stale = {(r["workload"], r["pass"]) for r in mine if self.stale(r)}
            found += [
                Distance(*place, row["ulp"], f"recorded on {device}", row["when"], place in stale)
                for place, row in latest.items()
            ]
        for mode, where in WHERE.items():
            mine = [r for r in self.compared if (r["problem"], r["device"]) == (stem, mode)]
            latest = {(row["workload"], row["which"]): row for row in mine}
            stale = {(r["workload"], r["which"]) for r in mine if self.outdated(r)}
            found += [
                Distance(*place, row["ulp"], f"checked here, {where}", row["when"], place in stale)
                for place, row in latest.items()
            ]
        order = self.order
        found = [d for d in found if (stem, d.workload, d.which) in order]
        return sorted(found, key=lambda d: order[stem, d.workload, d.which])

    def coverage(self) -> Iterator[tuple[Problem, Workload, str, dict[str, Cell]]]:
        """Every pass of every workload: what is known of each twin, or why nothing is."""
        checks = {(r["device"], r["problem"], r["workload"], r["which"], r["impl"]): r
                  for r in self.checks}  # fmt: skip
        for p, w, which in self._passes():
            cells = {}
            for twin in p.implementations:
                key = (p.stem, w.name, which, w.dtype, twin)
                measured = [r[key] for r in self.records.values() if key in r]
                found = (checks.get((mode, p.stem, w.name, which, twin)) for mode in ("gpu", "cpu"))
                checked = [row for row in found if row]
                cells[twin] = self._cell(w, measured, checked)
            yield p, w, which, cells

    def _cell(self, w: Workload, measured: list[Row], checked: list[Row]) -> Cell:
        for row in measured:
            if row["check"].startswith("fail"):
                return Cell("red", row["check"].replace(":", ": "))
            if row["us"] and row["check"] == "pass":
                us = f"{short_us(row['us']['p50'])} us"
                return Cell("stale", f"{us}, outdated") if self.stale(row) else Cell("timed", us)
        for row in checked:
            where = WHERE[row["device"]]
            if self.outdated(row):
                return Cell("stale", "outdated check")
            if not row["ok"]:
                return Cell("red", f"fail: {row['reason']} {where}")
            return Cell("green", f"green {where}")
        noted = next((row["note"] for row in measured if row.get("note")), "")
        if noted:
            return Cell("missing", f"not timed: {noted}")
        return Cell("missing", "not checked here" if "ci" in w.tags else "no record")


COVERAGE_LEGEND = (
    "A time: green and timed on a Hopper GPU. Green: checked on this machine; `ci` workloads are "
    "never timed, and `huge` ones are there to prove 64-bit addresses. Outdated: the kernel's "
    "source has changed since. Not checked here: `parity check`. No record: `parity bench` on a "
    "Hopper GPU."
)


def lines_of(rows: Iterable[Row]) -> list[Line]:
    """The rows of one device by pass, in the order in which they come."""
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["problem"], row["workload"], row["pass"]), {})[row["impl"]] = row
    return [Line(*place, by_impl) for place, by_impl in found.items()]


def name_of(impl: str) -> str:
    """As a reader knows it: Triton, Pallas, or the peer's own name."""
    return NAMES.get(impl, impl.removeprefix("peer:"))


def why_not_timed(row: Row) -> str:
    """In a few words, of a row without a time."""
    red = row["check"].replace(":", ": ") + ", " if row["check"].startswith("fail") else ""
    return f"{red}not timed" + (f": {row['note']}" if row.get("note") else "")


def short_us(us: float) -> str:
    return f"{us:.1f}" if us < 100 else f"{us:.0f}" if us < 1e5 else f"{us:.3g}"


def interval_text(us: timing.Interval) -> str:
    return f"{short_us(us.p50)} [{short_us(us.p10)} {short_us(us.p90)}]"


def versions_of(rows: Sequence[Row]) -> str:
    names = ("torch", "triton", "jax")
    found = {n: sorted({r["versions"][n] for r in rows if n in r["versions"]}) for n in names}
    return ", ".join(f"{n} {'/'.join(v)}" for n, v in found.items() if v)


def days_of(rows: Sequence[Row]) -> str:
    days = sorted({row["when"][:10] for row in rows})
    commits = sorted({row["commit"] for row in rows})
    span = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    return f"measured {span}" + (f" at commit {commits[0]}" if len(commits) == 1 else "")


# Tables for a terminal.


def table(*headings: str) -> "rich.table.Table":
    """A plain table; a heading that starts with > is aligned to the right."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    for heading in headings:
        right = heading.startswith(">")
        made.add_column(
            escape(heading.removeprefix(">")), justify="right" if right else "left", overflow="fold"
        )
    return made


def escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def sentence_of_checks(rows: Sequence[Mapping[str, Any]], mode: str) -> str:
    """One sentence of meaning."""
    bad = [row for row in rows if not row["ok"]]
    twins = sorted({row["impl"] for row in rows}, reverse=True)
    if not rows:
        return "Nothing was checked."
    if bad:
        kinds = ", ".join(dict.fromkeys(row["reason"] for row in bad))
        return f"[bold red]{len(bad)} of {len(rows)} checks fail[/] ({kinds})."
    who = "both twins agree" if len(twins) == 2 else f"{NAMES[twins[0]]} agrees"
    how = "in the interpreters" if mode == "cpu" else "compiled, on the GPU"
    raced = ", and no data race was found" if mode == "cpu" and "pallas" in twins else ""
    return (
        f"[bold green]All {len(rows)} checks pass[/]: {who} with the float64 oracle, {how}{raced}."
    )


def ratio(row: Mapping[str, Any]) -> str:
    """Error over yardstick: 1 is what the mathematics itself loses at this precision."""
    error, yardstick = row.get("error"), row.get("yardstick")
    if error is None or yardstick is None or error != error or yardstick != yardstick:
        return ""
    if yardstick == 0:
        return "exact" if error == 0 else f"{error:.1e} / 0"
    return f"{error / yardstick:.2f}" if error / yardstick < 1000 else f"{error / yardstick:.1e}"


def check_table(rows: Sequence[Mapping[str, Any]], width: int) -> "rich.table.Table":
    wide = width >= 100
    headings = ["problem", "workload", "pass", "twin", "verdict", ">error/yardstick"]
    made = table(*headings, *(("dtype", ">error", ">seconds") if wide else ()))
    previous: tuple = ()
    for row in rows:
        place = row["problem"], row["workload"]
        shown = [
            "" if place[:1] == previous[:1] else row["problem"],
            "" if place == previous else row["workload"],
        ]
        previous = place
        verdict = "[green]ok[/]" if row["ok"] else f"[bold red]{escape(row['reason'])}[/]"
        error = row.get("error")
        more = [
            row["dtype"],
            "" if error is None or error != error else f"{error:.1e}",
            f"{row['seconds']:.1f}",
        ]
        made.add_row(
            *shown, row["which"], row["impl"], verdict, ratio(row), *(more if wide else ())
        )
    return made


def sentence_of_compiles(rows: Sequence[Mapping[str, Any]]) -> str:
    bad = [r for r in rows if r["status"] == "fail"]
    lowered = [r for r in rows if r["status"] == "lowered"]
    if not rows:
        return "Nothing was compiled."
    tail = ""
    if lowered:
        tail = (
            f" {len(lowered)} Pallas rows stop before ptxas: no environment for it (`make sass`)."
        )
    if bad:
        return f"[bold red]{len(bad)} of {len(rows)} kernels fail the compile gate[/].{tail}"
    return (
        f"[bold green]All {len(rows)} kernels pass the compile gate[/]: the compilers take them "
        f"for sm_90a, nothing spills, no wgmma is serialised.{tail}"
    )


COMPILE_HEADINGS = ("kernel", "status", ">registers", ">spills", ">smem", ">wgmma", ">TMA")


def compile_cells(row: Mapping[str, Any]) -> list[str]:
    """Kernel, status, registers, spill bytes, shared KiB, wgmma, TMA loads + stores."""

    def count(name: str) -> str:
        return "" if row.get(name) is None else str(row[name])

    shared = row.get("shared_bytes")
    tma = [row.get("tma_load"), row.get("tma_store")]
    return [
        row["kernel"],
        row["status"],
        count("registers"),
        count("spills"),
        "" if shared is None else f"{shared / 1024:.0f} K",
        count("wgmma"),
        "" if None in tma else f"{tma[0]}+{tma[1]}",
    ]


def compile_table(rows: Sequence[Mapping[str, Any]], width: int) -> "rich.table.Table":
    wide = width >= 100
    made = table(*(("workload", "pass") if wide else ()), "twin", *COMPILE_HEADINGS)
    previous: tuple = ()
    for row in rows:
        place = row["workload"], row["pass"]
        kernel, status, *numbers = compile_cells(row)
        colour = {"ok": "green", "fail": "bold red"}.get(status, "yellow")
        shown = ["" if place[:1] == previous[:1] else row["workload"], row["pass"]]
        if not wide and place != previous:
            made.add_row("", " ".join(place))
        made.add_row(
            *(shown if wide else ()), row["twin"], kernel, f"[{colour}]{status}[/]", *numbers
        )
        previous = place
    return made


_COLOURS = {"FASTER": "green", "SAME": "cyan", "SLOWER": "red", "UNDECIDED": "yellow"}


def sentence_of_lines(lines: Sequence[Line]) -> str:
    """How the twins stand beside their best peers."""
    verdicts = [v[1] for line in lines for twin in TWINS if (v := line.versus_peer(twin))]
    red = sum(row["check"].startswith("fail") for line in lines for row in line.rows.values())
    timed = sum(line.us(twin) is not None for line in lines for twin in TWINS)
    counts = [
        f"{verdicts.count(word)} {word.lower()}"
        for word in (timing.FASTER, timing.SAME, timing.SLOWER, timing.UNDECIDED)
        if word in verdicts
    ]
    beside = f"; beside the best peer of each: {', '.join(counts)}" if counts else ""
    failed = f" [bold red]Not timed because their check is red: {red}.[/]" if red else ""
    return f"{timed} results of twins over {len(lines)} passes of workloads{beside}.{failed}"


def bench_table(lines: Iterable[Line], width: int, *, peers: bool = True) -> "rich.table.Table":
    made = table("workload", "pass", "impl", ">us [p10 p90]", ">% roof", ">x best peer", "verdict")
    if width < 100:
        made = table("workload", ">us [p10 p90]", ">% roof", ">x peer", "verdict")
    for line in lines:
        first = True
        if width < 100:
            made.add_row(f"{line.workload} {line.which}")
        for impl, row in in_order(line.rows):
            if impl.startswith("peer:") and not peers:
                continue
            us = line.us(impl)
            ours = not impl.startswith("peer:")
            beside = line.versus_peer(impl) if ours else None
            verdict = ""
            if beside:
                verdict = f"[{_COLOURS[beside[1]]}]{beside[1]}[/]"
            elif us is None:
                failed = row["check"].startswith("fail")
                words = row["check"] if failed else "not timed"
                verdict = f"[bold red]{escape(words)}[/]" if failed else f"[dim]{words}[/]"
            elif impl == line.best_peer:
                verdict = "best peer"
            elif is_mark(row):
                verdict = f"[dim]{escape(row['config']['computes'])}[/]"
            who = impl.removeprefix("peer:") if not ours else f"[bold]{impl}[/]"
            place = [line.workload if first else "", line.which if first else "", who]
            made.add_row(
                *([f"  {who}"] if width < 100 else place),
                interval_text(us) if us else "",
                f"{100 * row['roof']:.0f}" if row["roof"] else "",
                f"{beside[0]:.2f}" if beside else "",
                verdict,
            )
            first = False
    return made


def in_order(rows: Mapping[str, Row]) -> list[tuple[str, Row]]:
    """The twins first, then the peers from the fastest to those that were not timed."""

    def place(item: tuple[str, Row]) -> tuple:
        impl, row = item
        twin = TWINS.index(impl) if impl in TWINS else len(TWINS)
        return twin, row["us"]["p50"] if row["us"] and twin == len(TWINS) else float("inf"), impl

    return sorted(rows.items(), key=place)


def coverage_table(results: Results, width: int) -> "rich.table.Table":
    headings = ("workload", "pass", "dtype") if width >= 100 else ("workload", "pass")
    made = table(*headings, "triton", "pallas")
    colours = {"timed": "green", "green": "green", "red": "bold red", "stale": "yellow"}
    previous = None
    for p, w, which, cells in results.coverage():
        if p.stem != previous:
            made.add_section()
        previous = p.stem
        shown = []
        for twin in TWINS:
            cell = cells.get(twin, Cell("missing", "no such twin"))
            shown.append(f"[{colours.get(cell.state, 'dim')}]{escape(cell.text)}[/]")
        name = w.name if w.name.startswith(p.stem) else f"{p.stem} {w.name}"
        made.add_row(name, which, *((w.dtype,) if width >= 100 else ()), *shown)
    return made


def sentence_of_coverage(results: Results) -> str:
    cells = [cell.state for *_, found in results.coverage() for cell in found.values()]
    counts = {state: cells.count(state) for state in ("timed", "green", "red", "stale", "missing")}
    words = {
        "timed": "green and timed",
        "green": "green, not timed",
        "red": "red",
        "stale": "out of date",
        "missing": "unknown",
    }
    said = ", ".join(f"{n} {words[state]}" for state, n in counts.items() if n)
    return f"{len(cells)} cells of problem, workload, pass and twin: {said}."
