"""Renders docs/reading-a-report.md and its pictures: what a parity report says, on recorded rows.

Every number in it comes from the committed records, and the pictures are those of the report.
"""

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from parity import drawings, page, report, timing
from parity.report import NAMES, TWINS, Line

HERE = Path(__file__).parent
PAGE = HERE / "reading-a-report.md"
BARS, ROOFLINE = HERE / "reading-bars.svg", HERE / "reading-roofline.svg"


def main() -> None:
    book = Reading()
    PAGE.write_text(book.text())
    BARS.write_text(book.bars.standing_alone())
    ROOFLINE.write_text(book.roofline.standing_alone())


class Reading:
    """The page, about the first device that has records."""

    def __init__(self) -> None:
        results = report.Results.here(local=HERE / "no local results")
        self.device = next(iter(results.records))
        self.lines = results.lines(self.device)
        self.work = {(p.stem, w.name): w for p in results.problems for w in p.workloads}
        self.won = self.first("FASTER", "memory-bound")
        self.lost = self.first("SLOWER", "memory-bound")
        self.heavy = max(self.lines, key=intensity)
        name = f"Share of the roof on {self.device}"
        self.bars = drawings.bars([self.won, self.lost], "reading-bars", name)
        roofline = drawings.roofline(self.lines, "reading-roofline", f"Roofline of {self.device}")
        assert roofline is not None
        self.roofline = roofline

    def first(self, verdict: str, tag: str) -> Line:
        """The first pass of such work on which a twin has this verdict."""
        return next(
            line
            for line in self.lines
            if tag in self.work[line.problem, line.workload].tags
            and verdict in [v[1] for twin in TWINS if (v := line.versus_peer(twin))]
        )

    def text(self) -> str:
        blocks = [
            "# Reading a parity report",
            *self.opening(),
            "## One pass of one workload",
            *self.one_pass(),
            "## The roof",
            *self.roof(),
            "## The cold cache",
            *self.cold(),
            "## Intervals and verdicts",
            *self.verdicts(),
            "## Error and yardstick",
            *self.errors(),
            "## ULP",
            *self.ulp(),
            "## Compile gate, coverage, history",
            *self.rest(),
        ]
        # tables, headings and pictures as they are, prose in lines
        return "\n\n".join(b if b[0] in "#|!" else filled(b) for b in blocks) + "\n"

    def opening(self) -> Iterator[str]:
        rows = [row for line in self.lines for row in line.rows.values()]
        yield (
            "`make parity` writes `report/index.html` and says so; `parity report --html` draws it "
            "again, and `parity report` prints the same in a terminal. This page explains what it "
            "says, for someone who has never read one. The rows here are recorded ones "
            f"({self.device}; {report.versions_of(rows)}; {report.days_of(rows)}), rendered by "
            "`make docs`, and the pictures are drawn by the report's own code."
        )

    def one_pass(self) -> Iterator[str]:
        line = self.won
        yield (
            f"`{line.workload}` `{line.which}` is one *pass* (`fwd` the function, `bwd` its "
            "gradients) of one *workload* (sizes of a real model). Both *twins*, Triton and "
            "Pallas, and all *peers* ran in one process, in alternation. A peer is what you would "
            "call instead, in its best honest form."
        )
        yield table(
            ["who", "us [p10 p90]", "% of roof", "x best peer", "verdict", "launch us"],
            [self.row(line, impl) for impl, _ in report.in_order(line.rows)],
        )
        ours = min((t for t in TWINS if line.us(t)), key=lambda t: p50(line, t))
        ratio, verdict = line.versus_peer(ours) or (0.0, "")
        yield (
            "*us* is the time on the device, from the first kernel's start to the last one's end: "
            f"the median of {line.rows[ours]['samples']} samples, and the 10th and 90th "
            "percentile. *% of roof* says how much of what the machine can do was reached. "
            f"*x best peer* is the fastest peer's time over this one: {NAMES[ours]} at "
            f"{ratio:.2f} needs 1 / {ratio:.2f} of the time of "
            f"{report.name_of(line.best_peer or '')}, and the verdict is {verdict}. *launch us* "
            "is what the host needs to start the work; it hides behind other work, or it does not, "
            "and never counts in *us*."
        )
        yield f"![{self.bars.title}: {self.bars.words}]({BARS.name})"
        yield (
            "In the report, bars show the same: longer is faster, the dashed line is the roof, the "
            "short line at a bar's end is the interval. Below stands a pass where a peer is ahead. "
            "A peer that is missing and a twin whose check is red keep their place, with a word "
            "that says why there is no bar."
        )

    def row(self, line: Line, impl: str) -> list[str]:
        row, us, beside = line.rows[impl], line.us(impl), line.versus_peer(impl)
        if us is None or beside is None:
            return [report.name_of(impl), report.why_not_timed(row), "", "", "", ""]
        word = beside[1] if impl in TWINS else "best peer" if impl == line.best_peer else "peer"
        share, launch = f"{100 * row['roof']:.0f}", f"{row['launch_us']:.0f}"
        name = report.name_of(impl)
        return [name, report.interval_text(us), share, f"{beside[0]:.2f}", word, launch]

    def roof(self) -> Iterator[str]:
        row = self.won.rows[TWINS[0]]
        found = row["ceilings"]
        rate = timing.Ceilings(**found)
        least = rate.least_us(row["flops"], row["bytes"])
        yield (
            "The roof is the least time that the mathematics needs on this machine. "
            f"`{self.won.workload}` `{self.won.which}` must move at least {mega(row['bytes'])} MB "
            f"(each input read once, each output written once) and do {giga(row['flops'])} GFLOP. "
            f"In this run a plain copy reached {found['copy_gbps']:.0f} GB/s, reading alone "
            f"{found['read_gbps']:.0f} GB/s, and a dense matrix product "
            f"{found['gemm_tflops']:.0f} TFLOP/s: the *ceilings*. So the bytes need "
            f"{mega(row['bytes'])} MB / {found['copy_gbps']:.0f} GB/s = {least:.1f} us, "
            f"the arithmetic far less, and {NAMES[TWINS[0]]}'s {p50(self.won, TWINS[0]):.1f} us "
            f"are {100 * row['roof']:.0f} % of the roof."
        )
        copies = [r["ceilings"]["copy_gbps"] for r in self.rows()]
        pins = {r["facts"]["hbm_gbps"] for r in self.rows() if r.get("facts")}
        yield (
            "Ceilings are measured beside the kernels in every run and never taken from a "
            f"datasheet: over these records a copy reached {min(copies):.0f} to "
            f"{max(copies):.0f} GB/s"
            + (f", where the pins of the memory allow {max(pins):.0f}" if pins else "")
            + ". They depend on the size, on the power the chip may draw, on the day."
        )
        yield f"![{self.roofline.title}: {self.roofline.words}]({ROOFLINE.name})"
        heavy = self.heavy.rows[TWINS[0]]
        yield (
            "The *roofline* puts every pass at its arithmetic per byte. Left of the bend, memory "
            f"sets the roof: `{self.won.workload}` does {intensity(self.won):.3g} FLOP per byte. "
            "Right of it the tensor cores do: "
            f"`{self.heavy.workload}` `{self.heavy.which}` does {intensity(self.heavy):.0f}, "
            f"{giga(heavy['flops'])} GFLOP on {mega(heavy['bytes'])} MB. A filled mark is a "
            "forward pass, a hollow one a backward."
        )
        top, twin = max(
            ((line, t) for line in self.lines for t in TWINS if line.us(t)),
            key=lambda pair: pair[0].rows[pair[1]]["roof"],
        )
        yield (
            "A little over 100 % is no mistake: a ceiling is a measurement too, of one copy and "
            f"one product. The highest here is {NAMES[twin]} on `{top.workload}` `{top.which}` at "
            f"{100 * top.rows[twin]['roof']:.0f} %. Much more would be one: a kernel whose best "
            "sample is over 5 % quicker than the best samples of the ceilings allow is not "
            "recorded, because then the ruler or the count of bytes is wrong."
        )

    def cold(self) -> Iterator[str]:
        control = self.won.rows[TWINS[0]].get("control")
        said = ""
        if control:
            said = (
                f" In this run a small copy went at {control['cold_gbps']:.0f} GB/s after a flush "
                f"and at {control['warm_gbps']:.0f} GB/s when repeated without one."
            )
        yield (
            "A GPU keeps what it used last in its L2 cache; a benchmark that runs one kernel over "
            "and over reads the cache and not the memory, and flatters everybody. Here the cache "
            "is flushed before every sample, and that it was is proved: a copy that fits in it "
            f"must be slower right after the flush than repeated.{said} Were they alike, the run "
            "would stop with an error."
        )

    def verdicts(self) -> Iterator[str]:
        apart, noisy = 100 * timing.APART, 100 * timing.NOISY
        yield (
            f"Two results are different only if their medians are at least {apart:.0f} % apart and "
            "their intervals, from the 10th to the 90th percentile, do not touch. Then ours is "
            f"FASTER or SLOWER. With medians closer than {apart:.0f} % they are the SAME, unless "
            f"an interval wider than {noisy:.0f} % of its median could hide a difference. "
            "Everything else is UNDECIDED: measure again, on a quieter machine or for longer. The "
            "first row of each:"
        )
        rows, missing = [], []
        for word in (timing.FASTER, timing.SLOWER, timing.SAME, timing.UNDECIDED):
            example = self.example(word)
            rows += [example] if example else []
            missing += [] if example else [word]
        yield table(
            ["verdict", "pass", "twin", "twin us", "best peer", "peer us", "medians", "intervals"],
            rows,
        )
        if missing:
            yield f"No row of these records is {' or '.join(missing)}."
        widest, impl = max(
            ((line, i) for line in self.lines for i in line.rows if line.us(i)),
            key=lambda pair: width(pair[0], pair[1]),
        )
        us = widest.us(impl)
        assert us is not None
        yield (
            "Why intervals and not a plus-minus: times have a hard floor and a long tail, and one "
            "hiccup should move neither end. The widest here is that of "
            f"{report.name_of(impl)} on `{widest.workload}` `{widest.which}`: "
            f"{report.interval_text(us)} us, {100 * width(widest, impl):.0f} % of its median."
        )

    def example(self, word: str) -> list[str] | None:
        for line in self.lines:
            for twin in TWINS:
                ours, beside = line.us(twin), line.versus_peer(twin)
                if ours is None or beside is None or beside[1] != word or line.best_peer is None:
                    continue
                theirs = line.us(line.best_peer)
                assert theirs is not None
                touch = ours.p10 <= theirs.p90 and theirs.p10 <= ours.p90
                big, small = max(ours.p50, theirs.p50), min(ours.p50, theirs.p50)
                return [
                    word,
                    f"`{line.workload}` {line.which}",
                    NAMES[twin],
                    report.interval_text(ours),
                    report.name_of(line.best_peer),
                    report.interval_text(theirs),
                    f"{100 * (big / small - 1):.1f} % apart",
                    "touch" if touch else "apart",
                ]
        return None

    def errors(self) -> Iterator[str]:
        yield (
            "Speed is only shown for what is right. Every output and every gradient is held "
            "against a float64 oracle, over all elements: *error* is the length of the difference "
            "over the length of the truth. How small can it be? bfloat16 keeps 8 bits, so storing "
            "the perfect answer already loses something. The *yardstick* is what the same "
            "mathematics loses in float32 with just the roundings a kernel is entitled to, and a "
            "kernel passes at 1.5 yardsticks over the whole output and 3 in every tile of 64 rows, "
            "so that no bad tile hides in a good average."
        )
        picked: dict[str, Line] = {}
        for line in self.lines:
            picked.setdefault(f"{line.problem} {line.which}", line)
        yield table(
            ["pass", "twin", "check", "error", "yardstick", "error / yardstick"],
            [
                [
                    f"`{line.workload}` {line.which}",
                    NAMES[twin],
                    (row := line.rows[twin])["check"],
                    f"{row['error']:.2e}",
                    f"{row['yardstick']:.2e}",
                    report.ratio(row),
                ]
                for line in picked.values()
                for twin in TWINS
                if twin in line.rows and line.rows[twin]["error"] is not None
            ],
        )
        yield (
            "A ratio of 1.00 means that the final rounding is all that was lost; float32 outputs "
            "scatter around 1, because both sides round in another order. The picture of errors "
            "has one line a pass, a ring for Triton, a triangle for Pallas and a red mark where "
            "the limit is. A red check is one word, `tile` or `zeros` or `race`: "
            "[what they mean](../README.md#read-a-result). Its twin is not timed."
        )

    def ulp(self) -> Iterator[str]:
        steps = {
            name: float(np.nextafter(dtype(1), dtype(2)))
            for name, dtype in (("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16))
        }
        yield (
            "The twins are also held against each other, in *units in the last place*: how many "
            "representable numbers lie between two results. After 1 comes "
            f"{steps['bfloat16']} in bfloat16 and {steps['float16']} in float16; a result one step "
            "away is 1 ULP off. The histogram gives the share of elements at 0, 1, 2, ... and "
            "beyond 8. Two good 16-bit kernels agree on nearly every element and are 1 ULP apart "
            "on the rest, where the sums before the rounding fell on either side of it. In float32 "
            "a spread over several is normal. A second hump far out is not: look there for a mask "
            "or an edge."
        )
        recorded = [
            (line, line.rows[TWINS[0]]["ulp"])
            for line in self.lines
            if TWINS[0] in line.rows and line.rows[TWINS[0]].get("ulp")
        ]
        if not recorded:
            yield (
                "No record holds a histogram yet; the report draws those of the latest checks on "
                "the machine it is made on, and says which they are."
            )
            return
        bins = [b for b in page.BINS if any(b in shares for _, shares in recorded[:4])]
        yield table(
            ["pass", *bins],
            [
                [f"`{line.workload}` {line.which}"]
                + [page.share_text(shares.get(b, 0.0)) for b in bins]
                for line, shares in recorded[:4]
            ],
        )

    def rest(self) -> Iterator[str]:
        both = [line for line in self.lines if all(line.us(twin) for twin in TWINS)]
        yield (
            "The **compile gate** takes both twins to machine code for Hopper, with no GPU needed: "
            "*registers* a thread (255 at most), *spills* in bytes (what did not fit into "
            "registers: red), *smem* (shared memory), *wgmma* and *TMA* (tensor-core products and "
            "bulk copies in the code, counted as written, not as run). `lowered` means that the "
            "last step, ptxas, is not installed here."
        )
        yield (
            "**Coverage** has a cell for every workload, pass and twin, and no cell is empty. "
            f"{report.COVERAGE_LEGEND} In these records {len(both)} of "
            f"{len(self.lines)} passes have both twins timed."
        )
        yield (
            "**History**: record files are only ever appended to, and the last row of a key "
            "stands. What was measured before is drawn over time, each row named by its commit "
            "with its verdict beside the one before. Runs of different days differ in more than "
            "the kernel: driver, clocks, neighbours; look at the peers' lines before you believe "
            "a step. `parity diff OLD NEW` compares two files of rows in the same words."
        )

    def rows(self) -> list[dict]:
        return [row for line in self.lines for row in line.rows.values() if row["us"]]


def intensity(line: Line) -> float:
    row = next(iter(line.rows.values()))
    return row["flops"] / row["bytes"]


def p50(line: Line, impl: str) -> float:
    us = line.us(impl)
    assert us is not None
    return us.p50


def width(line: Line, impl: str) -> float:
    """Of the interval, in medians."""
    us = line.us(impl)
    assert us is not None
    return (us.p90 - us.p10) / us.p50


def mega(amount: float) -> str:
    return f"{amount / 1e6:.0f}"


def giga(amount: float) -> str:
    return f"{amount / 1e9:.2g}" if amount < 1e11 else f"{amount / 1e9:.0f}"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    words = ("who", "pass", "twin", "check", "verdict", "best peer", "intervals")
    words += ("data", "format", "one scale for")
    marks = ["---" if h in words else "--:" for h in headings]
    lines = [headings, marks, *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def filled(paragraph: str) -> str:
    return textwrap.fill(paragraph, 110, break_long_words=False, break_on_hyphens=False)
