"""The whole report as one HTML page that needs no network: parity/templates/report.html, filled.

First a grid of problems and twins, then a section for each problem: speed beside its peers, the
roofline, errors, the distance between the twins, the compile gate, coverage, and what earlier
records said. Every picture has its numbers in a table beneath it; a cell without a number says why.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from parity import drawings, judge, record, report, timing
from parity.drawings import Error, Errors, Picture
from parity.record import Row
from parity.report import NAMES, TWINS, WHERE, Distance, Line, Results
from parity.spec import Problem

PASS_NAMES = {"fwd": "forward", "bwd": "backward", "dw": "weight gradient"}
EXTREMES = 6  # rows in each table of the passes furthest ahead and behind
BINS = (*map(str, range(9)), ">8")  # of Check.ulp


def html(results: Results) -> str:
    """The page, from what is known."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from parity import doctor

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    coverage = list(results.coverage())
    return environment.get_template("report.html").render(
        when=record.now()[:16].replace("T", " "),
        commit=record.commit(),
        machine=doctor.machine().sentence(),
        palette=drawings.PALETTE,
        devices=[_Device.of(results, device) for device in results.records],
        checks=[
            f"Checked here last: {_plain(report.sentence_of_checks(rows, mode))}"
            + _outdated(sum(results.outdated(row) for row in rows))
            for mode in WHERE
            if (rows := [row for row in results.checks if row["device"] == mode])
        ],
        compiles=f"Compiled here last: {_plain(report.sentence_of_compiles(results.compiles))}",
        coverage=report.sentence_of_coverage(results),
        coverage_legend=report.COVERAGE_LEGEND,
        grid=[
            (device, p, [Standing.of(results, device, p, twin) for twin in p.implementations])
            for device in results.records or [""]
            for p in results.problems
        ],
        extremes=extremes(results),
        problems=[
            _Section(results, p, [row[1:] for row in coverage if row[0] is p])
            for p in results.problems
        ],
        refused=results.refused,
        report=report,
        names=NAMES,
        twins=TWINS,
        where=WHERE,
        bins=BINS,
        share_text=share_text,
        pass_names=PASS_NAMES,
        stale=results.stale,
        apart=f"{100 * timing.APART:.0f} %",
    )


@dataclass(frozen=True)
class _Device:
    """Whose clocks the times are of."""

    name: str
    sentence: str
    about: str
    stale: int  # rows measured with a kernel that has changed since

    @staticmethod
    def of(results: Results, device: str) -> "_Device":
        lines = results.lines(device)
        rows = [row for line in lines for row in line.rows.values()]
        return _Device(
            device,
            _plain(report.sentence_of_lines(lines)),
            f"{report.versions_of(rows)}; {report.days_of(rows)}" if rows else "",
            sum(results.stale(row) for row in rows),
        )


@dataclass(frozen=True)
class Standing:
    """One twin of one problem in the grid: a word of state and a sentence for each column."""

    twin: str
    checks: Sequence[tuple[str, str, str]]  # class, text, where
    roof: tuple[float, float, float] | None  # median, lowest, highest, in percent
    lowest: str  # the pass with the lowest share
    beside: tuple[float, float, float] | None  # the best peer's time over ours, likewise
    verdicts: Sequence[tuple[str, int]]
    kernels: tuple[str, str]

    @staticmethod
    def of(results: Results, device: str, p: Problem, twin: str) -> "Standing":
        lines = [x for x in (results.lines(device) if device else []) if x.problem == p.stem]
        rows = [line.rows[twin] for line in lines if twin in line.rows]
        checks = []
        if rows:
            passed = [row["check"] == "pass" for row in rows]
            checks.append(_counted(passed, "recorded", any(map(results.stale, rows))))
        for mode, where in WHERE.items():
            mine = [r for r in results.checks
                    if (r["device"], r["problem"], r["impl"]) == (mode, p.stem, twin)]  # fmt: skip
            if mine:
                old = any(map(results.outdated, mine))
                checks.append(_counted([r["ok"] for r in mine], f"here, {where}", old))
        shares = {f"{x.workload} {x.which}": 100 * x.rows[twin]["roof"]
                  for x in lines if twin in x.rows and x.rows[twin]["roof"]}  # fmt: skip
        beside = [found for line in lines if (found := line.versus_peer(twin))]
        words = [verdict for _, verdict in beside]
        order = (timing.FASTER, timing.SAME, timing.SLOWER, timing.UNDECIDED)
        return Standing(
            twin,
            checks or [("missing", "no check", "yet")],
            _middle(list(shares.values())),
            min(shares, key=lambda place: shares[place], default=""),
            _middle([ratio for ratio, _ in beside]),
            [(word, words.count(word)) for word in order if word in words],
            _gate([r for r in results.compiles if (r["problem"], r["twin"]) == (p.stem, twin)]),
        )


@dataclass(frozen=True)
class Beside:
    """One twin beside the best peer of one pass."""

    line: Line
    twin: str
    ratio: float


def extremes(results: Results) -> tuple[list[Beside], list[Beside]]:
    """The passes on which a twin is furthest ahead of its best peer, and furthest behind."""
    found: dict[str, list[Beside]] = {timing.FASTER: [], timing.SLOWER: []}
    for device in results.records:
        for line in results.lines(device):
            for twin in TWINS:
                beside = line.versus_peer(twin)
                if beside and beside[1] in found:
                    found[beside[1]].append(Beside(line, twin, beside[0]))
    ahead = sorted(found[timing.FASTER], key=lambda b: -b.ratio)
    return ahead[:EXTREMES], sorted(found[timing.SLOWER], key=lambda b: b.ratio)[:EXTREMES]


def _counted(passed: Sequence[bool], where: str, old: bool) -> tuple[str, str, str]:
    where += ", outdated" if old else ""
    if all(passed):
        return "stale" if old else "ok", f"{len(passed)} pass", where
    return "fail", f"{passed.count(False)} of {len(passed)} fail", where


def _outdated(count: int) -> str:
    return f" {count} of them are outdated: a kernel has changed since." if count else ""


def _middle(values: Sequence[float]) -> tuple[float, float, float] | None:
    return (timing.quantile(values, 0.5), min(values), max(values)) if values else None


def _gate(rows: Sequence[Row]) -> tuple[str, str]:
    statuses = [row["status"] for row in rows]
    if not rows:
        return "missing", "not compiled here"
    if "fail" in statuses:
        return "fail", f"{statuses.count('fail')} of {len(rows)} fail"
    if "lowered" in statuses:
        return "lowered", f"{statuses.count('lowered')} of {len(rows)} only lowered"
    return "ok", f"all {len(rows)} pass"


def _found_at(d: Distance) -> tuple[str, str, bool]:
    return d.where, d.when[:10], not d.stale


class _Section:
    """What the page says of one problem."""

    def __init__(self, results: Results, p: Problem, coverage: Sequence[tuple]) -> None:
        self.results, self.problem, self.stem, self.coverage = results, p, p.stem, coverage
        self.about, _, self.doc = p.doc.strip().partition("\n")
        self.lines = {device: [x for x in results.lines(device) if x.problem == p.stem]
                      for device in results.records}  # fmt: skip
        self.lines = {device: lines for device, lines in self.lines.items() if lines}
        self.compiles = [row for row in results.compiles if row["problem"] == p.stem]
        self.messages = any(row["message"] for row in self.compiles)
        self.compile_sentence = _plain(report.sentence_of_compiles(self.compiles))
        self.distances = [
            (place, list(found))
            for place, found in groupby(
                sorted(results.distances(p.stem), key=_found_at, reverse=True), key=_found_at
            )
        ]
        self.findings = list(self._findings())
        self.errors = drawings.errors(
            self._strips(), f"{p.stem}-errors", f"Error over yardstick of the twins of {p.stem}"
        )

    def sentence(self, device: str) -> str:
        return _plain(report.sentence_of_lines(self.lines[device]))

    def bars(self, device: str) -> list[tuple[str, Picture]]:
        """(pass, picture)"""
        lines = self.lines[device]
        found = []
        for which in dict.fromkeys(line.which for line in lines):
            mine = [line for line in lines if line.which == which]
            name = f"{self.stem}-{record.slug(device)}-{which}"
            title = f"Share of the roof, {self.stem} {PASS_NAMES.get(which, which)} on {device}"
            found.append((which, drawings.bars(mine, name, title)))
        return found

    def roofline(self, device: str) -> Picture | None:
        name = f"{self.stem}-{record.slug(device)}-roofline"
        return drawings.roofline(self.lines[device], name, f"Roofline of {self.stem} on {device}")

    def _findings(self) -> Iterator[dict[str, Any]]:
        """What was said of every output, recorded and here, in one form."""
        for device, lines in self.lines.items():
            for line in lines:
                for twin in TWINS:
                    if row := line.rows.get(twin):
                        yield {
                            "where": f"{device}, recorded",
                            "workload": line.workload,
                            "which": line.which,
                            "impl": twin,
                            "dtype": row["dtype"],
                            "ok": row["check"] == "pass",
                            "reason": row["check"].removeprefix("fail:"),
                            "detail": row.get("note", ""),
                            "error": row["error"],
                            "yardstick": row["yardstick"],
                            "output": "",
                        }
        order = self.results.order
        for mode, where in WHERE.items():
            rows = [r for r in self.results.checks
                    if (r["device"], r["problem"]) == (mode, self.stem)
                    and (self.stem, r["workload"], r["which"]) in order]  # fmt: skip
            rows.sort(key=lambda r: (order[self.stem, r["workload"], r["which"]],
                                     TWINS.index(r["impl"])))  # fmt: skip
            for r in rows:
                judged = [v["output"] for v in r["verdicts"] if v["error"] == r["error"]]
                yield {
                    **r,
                    "where": f"checked here, {where}",
                    "output": judged[0] if judged else "",
                }

    def _strips(self) -> dict[str, list[Errors]]:
        strips: dict[str, dict[str, list[Error]]] = {}
        for f in self.findings:
            of_place = strips.setdefault(f["where"], {})
            of_place.setdefault(f"{f['workload']} {f['which']}", []).append(self._error(f))
        return {where: [Errors(label, twins) for label, twins in of_place.items()]
                for where, of_place in strips.items()}  # fmt: skip

    def _error(self, f: Mapping[str, Any]) -> Error:
        error, yardstick = f["error"], f["yardstick"]
        text = report.ratio(f)
        says = f"{text} of what is lost anyway" if text else f["detail"] or f["reason"]
        if not f["ok"]:
            says = f"fail: {f['reason']}"
        if error is None or yardstick is None:
            return Error(f["impl"], None, 1.5, f["ok"], says)
        if yardstick == 0:
            return Error(f["impl"], None if error else 0.0, 1.5, f["ok"], says)
        work = self.problem.workload(f["workload"])
        specs = self.problem.results(work, f["which"])
        output = f["output"] if f["output"] in specs else next(iter(specs))
        terms = self.problem.reduction(work, output)
        allowed = judge.limit(self.problem.family, specs[output], yardstick, terms)
        return Error(f["impl"], error / yardstick, allowed / yardstick, f["ok"], says)

    @property
    def past(self) -> list["Past"]:
        """The passes that have been measured more than once."""
        found = []
        for device, by_key in self.results.history.items():
            passes: dict[tuple[str, str], dict[str, Sequence[Row]]] = {}
            for (stem, workload, which, _, impl), rows in by_key.items():
                if stem == self.stem:
                    passes.setdefault((workload, which), {})[impl] = rows
            for (workload, which), rows in passes.items():
                timed = any(row["us"] for of_impl in rows.values() for row in of_impl)
                if timed and max(map(len, rows.values())) > 1:
                    order = report.in_order({impl: of_impl[-1] for impl, of_impl in rows.items()})
                    ordered = {impl: rows[impl] for impl, _ in order}
                    found.append(Past.of(device, self.stem, workload, which, ordered))
        return found

    @property
    def one_record(self) -> str:
        """Since when there is something, where nothing was measured twice."""
        rows = [
            row for lines in self.lines.values() for line in lines for row in line.rows.values()
        ]
        if not rows:
            return "Nothing is recorded yet."
        commits = ", ".join(sorted({row["commit"] for row in rows}))
        days = " to ".join(dict.fromkeys((min(r["when"] for r in rows)[:10],
                                          max(r["when"] for r in rows)[:10])))  # fmt: skip
        return (
            f"One measurement of each pass so far ({days}, at {commits}). The next one of any of "
            "them starts its history here."
        )


@dataclass(frozen=True)
class Past:
    """One pass over its records: a picture, and each row with its verdict beside the one before."""

    device: str
    workload: str
    which: str
    picture: Picture
    rows: Sequence[tuple[str, Row, str]]  # impl, row, verdict

    @staticmethod
    def of(
        device: str, stem: str, workload: str, which: str, rows: Mapping[str, Sequence[Row]]
    ) -> "Past":
        name = f"{stem}-{record.slug(device)}-{workload}-{which}-history"
        picture = drawings.history(rows, name, f"{workload} {which} on {device} over its records")
        told = []
        for impl, of_impl in rows.items():
            before: timing.Interval | None = None
            for row in of_impl:
                now = timing.Interval.from_json(row["us"]) if row["us"] else None
                word = ""
                if now and before:
                    word = timing.verdict(now, before)
                elif now is None:
                    word = report.why_not_timed(row)
                told.append((impl, row, word or "first"))
                before = now or before
        return Past(device, workload, which, picture, told)


def share_text(share: float) -> str:
    """A share in percent that is never rounded to nothing, nor to all."""
    percent = 100 * share
    if share in (0.0, 1.0):
        return f"{percent:.0f} %"
    if percent >= 99.9:
        return "> 99.9 %"
    return f"{percent:.1f} %" if percent >= 0.1 else f"{percent:.1g} %"


def _plain(marked: str) -> str:
    """The sentence without its colours."""
    return re.sub(r"\[/?[a-z ]*\]", "", marked)
