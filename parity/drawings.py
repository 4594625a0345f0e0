"""The report's pictures: matplotlib draws them, as SVG that takes its colours from the page.

A picture is drawn once and serves both themes: every colour in it is one of PALETTE's CSS custom
properties. Its marks carry <title>s, which browsers show under the pointer, and the whole has a
title and a description in words. One unit of a drawing is one point; the page shows them about a
third larger.
"""

import html
import io
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from parity import report, timing
from parity.record import Row
from parity.report import NAMES, TWINS, Line

if TYPE_CHECKING:
    import matplotlib.artist

# name: (light, dark). Text is readable on the paper, and the paper's colour on the three bars
# (4.5 : 1, WCAG AA); a test computes it.
PALETTE: Mapping[str, tuple[str, str]] = {
    "paper": ("#fdfdfc", "#14181b"),
    "ink": ("#1d2327", "#e4e8ea"),
    "faint": ("#5b646a", "#a3adb4"),
    "line": ("#d6dadd", "#384047"),
    "shade": ("#f0f2f3", "#1f262b"),
    "triton": ("#2a64a8", "#76aeea"),
    "pallas": ("#a84e15", "#ea9a63"),
    "peer": ("#667077", "#98a2a9"),
    "good": ("#14653a", "#6fcb90"),
    "bad": ("#b3261e", "#ff9389"),
    "wait": ("#735600", "#dfb94a"),
    "link": ("#1a5796", "#93c4f2"),
}
# matplotlib writes a colour into every element: these stand for the properties until then
INK = {name: f"#0000{i:02x}" for i, name in enumerate(PALETTE, start=1)}

WIDTH = 340  # of every picture, so that its letters are the same size in all
_TEXT, _SMALL = 8.6, 7.8
_NAME, _PROSE = 0.64, 0.56  # the width of a letter over its size, in the widest of usual fonts
MARKER = {"triton": "o", "pallas": "^"}


@dataclass(frozen=True)
class Picture:
    """An <svg> element, and what it shows in one line and in full."""

    svg: str
    title: str
    words: str

    def standing_alone(self) -> str:
        """The same as a file of its own, in the colours of the reader's theme."""

        def colours(theme: int) -> str:
            return "".join(f"--{name}:{both[theme]};" for name, both in PALETTE.items())

        style = (
            f"svg{{{colours(0)}background:var(--paper);font-family:system-ui,sans-serif}}"
            f"@media(prefers-color-scheme:dark){{svg{{{colours(1)}}}}}"
        )
        sized = re.sub(
            r'viewBox="0 0 ([\d.]+) ([\d.]+)"',
            lambda box: (
                f'{box[0]} width="{1.6 * float(box[1]):.0f}" height="{1.6 * float(box[2]):.0f}"'
            ),
            self.svg,
            count=1,
        )
        return sized.replace("<title", f"<style>{style}</style>\n<title", 1) + "\n"


class Sheet:
    """A figure with one pair of axes, margins in points."""

    def __init__(
        self, name: str, height: float, *, left: float, right: float, top: float, bottom: float
    ) -> None:
        os.environ.setdefault("MPLCONFIGDIR", str(report.ROOT / ".cache" / "matplotlib"))
        from matplotlib.figure import Figure

        self.name, self._tips = name, []
        self.width, self.height = WIDTH - left - right, height
        full = height + top + bottom
        self._figure = Figure(figsize=(WIDTH / 72, full / 72))
        self._figure.patch.set_visible(False)
        place = (left / WIDTH, bottom / full, self.width / WIDTH, height / full)
        self.axes = self._figure.add_axes(place)
        self.axes.patch.set_visible(False)
        self.axes.tick_params(
            colors=INK["faint"], labelcolor=INK["ink"], length=0, pad=3, labelsize=_SMALL
        )
        self.axes.spines[["top", "right", "left"]].set_visible(False)
        self.axes.spines["bottom"].set_color(INK["line"])

    def words(self, x: float, y: float, text: str, **how: Any) -> "matplotlib.artist.Artist":
        """Text at a place, its middle on y; matplotlib's own settings may follow."""
        how = {"size": _TEXT, "color": INK["ink"], "va": "center"} | how
        return self.axes.text(x, y, text.replace("$", r"\$"), **how)

    def mark(self, x: float, y: float, twin: str, tip: str, *, hollow: bool, size: float) -> None:
        """One point in the shape and colour of a twin or peer."""
        (mark,) = self.axes.plot(
            [x], [y], marker=MARKER.get(twin, "s"), markersize=size, clip_on=False, zorder=3,
            color=INK["paper" if hollow else _role(twin)], markeredgecolor=INK[_role(twin)],
        )  # fmt: skip
        self.tip(mark, tip)

    def tip(self, artist: "matplotlib.artist.Artist", text: str) -> None:
        """What a pointer that rests on the artist is told."""
        artist.set_gid(f"tip{len(self._tips)}")
        self._tips.append(text)

    def picture(self, title: str, words: str) -> Picture:
        """The sheet as drawn so far, stripped of what a page does not need."""
        from matplotlib import rc_context

        out = io.StringIO()
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": self.name}):
            self._figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
        svg = out.getvalue()
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", svg, flags=re.S)
        for name, colour in INK.items():
            svg = svg.replace(colour, f"var(--{name})")
        svg = re.sub(r"font: (?:(\d+) )?([\d.]+px) [^;\"]*", _font, svg)
        box = re.search(r'viewBox="[^"]*"', svg)
        assert box is not None
        svg = re.sub(r"<svg [^>]*>", "", svg, count=1)
        svg = _named(svg, self.name)
        for i, tip in enumerate(self._tips):
            svg = svg.replace(f'id="{self.name}-tip{i}">', f"><title>{html.escape(tip)}</title>")
        svg = re.sub(r"\s*\n\s*", "\n", svg)
        opening = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'{box[0]} role="img" aria-labelledby="{self.name}-title" '
            f'aria-describedby="{self.name}-words">\n'
            f'<title id="{self.name}-title">{html.escape(title)}</title>\n'
            f'<desc id="{self.name}-words">{html.escape(words)}</desc>'
        )
        return Picture(opening + svg.strip(), title, words)


def _font(found: re.Match[str]) -> str:
    """The size and the weight, without matplotlib's own list of families."""
    weight = f"; font-weight: {found[1]}" if found[1] else ""
    return f"font-size: {found[2]}{weight}"


def _named(svg: str, name: str) -> str:
    """Ids that nothing else on a page has, and only those that something refers to."""
    wanted = {a or b for a, b in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg)}

    def renamed(found: re.Match[str]) -> str:
        mine = found[1] in wanted or found[1].startswith("tip")
        return f' id="{name}-{found[1]}"' if mine else ""

    svg = re.sub(r' id="([^"]+)"', renamed, svg)
    return re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)


def _role(impl: str) -> str:
    return impl if impl in TWINS else "peer"


def _wide(text: str, size: float = _TEXT) -> float:
    return len(text) * size * _NAME


# Bars against peers.

_ROW, _HEAD, _GAP = 12.0, 15.0, 6.0


def bars(lines: Sequence[Line], name: str, title: str) -> Picture:
    """Share of the roof of the twins and their peers, workload by workload."""
    height = sum(_HEAD + _ROW * len(line.rows) + _GAP for line in lines)
    sheet = Sheet(name, height, left=5, right=3, top=3, bottom=30)
    axes = sheet.axes
    shares = [100 * row["roof"] for line in lines for row in line.rows.values() if row["roof"]]
    end = max([105.0, *(share + 2 for share in shares)])
    unit = end / sheet.width  # one point, on the axis of shares
    axes.set_xlim(0, end)
    axes.set_ylim(height, 0)
    said, y, spread = [], 0.0, []
    for line in lines:
        sheet.words(0, y + _HEAD / 2 + 1, f"{line.workload} {line.which}", weight=700)
        y += _HEAD
        told = []
        for impl, row in report.in_order(line.rows):
            who, us = report.name_of(impl), line.us(impl)
            if row["roof"] and us:
                share = 100 * row["roof"]
                told.append(f"{who} {share:.0f} %")
                reach = share * us.p50 / us.p90, share * us.p50 / us.p10
                spread.append((y + _ROW / 2, *reach))
                _bar(sheet, y + _ROW / 2, unit, impl, share, reach, line)
            else:
                why = f"{report.short_us(us.p50)} us, no roof" if us else report.why_not_timed(row)
                told.append(f"{who} {why}")
                colour = INK["bad" if row["check"].startswith("fail") else "faint"]
                text, room = f"{who}: {why}", int((sheet.width - 6) / (_SMALL * _PROSE))
                shown = text if len(text) <= room else text[: room - 1] + "…"
                word = sheet.words(4 * unit, y + _ROW / 2, shown, size=_SMALL, color=colour)
                sheet.tip(word, text)
            y += _ROW
        said.append(f"{line.workload} {line.which}: {', '.join(told)}")
        y += _GAP
    if spread:
        axes.hlines(*zip(*spread, strict=True), color=INK["ink"], linewidth=1.6)
    axes.axvline(100, color=INK["ink"], linewidth=0.9, linestyle=(0, (3, 2.5)), zorder=3)
    axes.set_xticks(range(0, 101, 20))
    axes.set_yticks([])
    axes.set_xlabel("% of the roof measured in the same run", size=_SMALL, color=INK["ink"])
    return sheet.picture(title, "; ".join(said) + ".")


def _bar(
    sheet: Sheet,
    y: float,
    unit: float,
    impl: str,
    share: float,
    reach: tuple[float, float],
    line: Line,
) -> None:
    from matplotlib.patches import Rectangle

    us, who = line.us(impl), report.name_of(impl)
    assert us is not None
    colour = INK[_role(impl)]
    bar = Rectangle((0, y - _ROW / 2 + 1), share, _ROW - 2, color=colour, linewidth=0)
    sheet.axes.add_artist(bar)
    value = f"{report.short_us(us.p50)} us, {share:.0f} %"
    length, weight = share / unit, 700 if impl in TWINS else 400
    if _wide(who) + _wide(value) + 14 < length:
        sheet.words(4 * unit, y, who, color=INK["paper"], weight=weight)
        # clear of the interval and of the line at 100
        sheet.words(min(reach[0], 100) - 3 * unit, y, value, color=INK["paper"], ha="right")
    elif _wide(who) + 8 < length:
        sheet.words(4 * unit, y, who, color=INK["paper"], weight=weight)
        sheet.words(reach[1] + 4 * unit, y, value)
    else:
        sheet.words(reach[1] + 4 * unit, y, f"{who} {value}")
    beside = line.versus_peer(impl)
    more = f"; {beside[0]:.2f} x the best peer: {beside[1]}" if beside and impl in TWINS else ""
    sheet.tip(
        bar,
        f"{who}, {line.workload} {line.which}: {report.interval_text(us)} us, "
        f"{share:.0f} % of the roof{more}",
    )


# Roofline.


def roofline(lines: Sequence[Line], name: str, title: str) -> Picture | None:
    """What the twins reached over the intensity of the work; None where no twin was timed."""
    marks = [
        (line, impl, row, us)
        for line in lines
        for impl, row in line.rows.items()
        if impl in TWINS and (us := line.us(impl)) and row["bytes"] and row["flops"]
    ]
    if not marks:
        return None
    from matplotlib.ticker import LogLocator, NullLocator

    ceilings = [row["ceilings"] for _, _, row, _ in marks]
    copy, peak = (
        timing.interval([c[rate] for c in ceilings]) for rate in ("copy_gbps", "gemm_tflops")
    )
    ridge = 1e3 * peak.p50 / copy.p50
    intensity = [row["flops"] / row["bytes"] for _, _, row, _ in marks]
    reached = [row["flops"] / us.p50 / 1e6 for _, _, row, us in marks]

    sheet = Sheet(name, 190, left=36, right=10, top=8, bottom=32)
    axes = sheet.axes
    x = min(*intensity, ridge) / 3, max(*intensity, ridge) * 3
    y = min(reached) / 2, peak.p50 * 1.9
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(*x)
    axes.set_ylim(*y)
    for axis, (low, high) in ((axes.xaxis, x), (axes.yaxis, y)):
        # a tick for each power of ten, or for 1, 2 and 5 where there would be too few
        axis.set_major_locator(LogLocator(subs=(1,) if high / low > 1e3 else (1, 2, 5)))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_locator(NullLocator())
    axes.grid(color=INK["line"], linewidth=0.5)
    axes.set_axisbelow(True)
    corners = [x[0], ridge, x[1]]
    roof = [min(i * copy.p50 / 1e3, peak.p50) for i in corners]
    axes.fill_between(corners, roof, [y[1]] * 3, color=INK["shade"], linewidth=0)
    axes.plot(corners, roof, color=INK["ink"], linewidth=1.2)
    slope = math.degrees(
        math.atan2(sheet.height / math.log10(y[1] / y[0]), sheet.width / math.log10(x[1] / x[0]))
    )
    at = math.sqrt(max(x[0], 1e3 * y[0] / copy.p50) * ridge)
    sheet.words(
        at, at * copy.p50 / 1e3 * 1.25, f"copy {copy.p50:.0f} GB/s", size=_SMALL,
        rotation=slope, rotation_mode="anchor", ha="center", va="bottom",
    )  # fmt: skip
    flat = f"dense product {peak.p50:.0f} TFLOP/s"
    sheet.words(x[1] / 1.15, peak.p50 * 1.25, flat, size=_SMALL, ha="right", va="bottom")
    for (line, impl, row, us), i, speed in zip(marks, intensity, reached, strict=True):
        tip = (
            f"{NAMES[impl]}, {line.workload} {line.which}: {speed:.3g} TFLOP/s at {i:.3g} FLOP per "
            f"byte, {report.interval_text(us)} us, {100 * (row['roof'] or 0):.0f} % of the roof"
        )
        sheet.mark(i, speed, impl, tip, hollow=line.which != "fwd", size=5)
    axes.set_xlabel("FLOP per byte that the work must move", size=_SMALL, color=INK["ink"])
    axes.set_ylabel("TFLOP/s reached", size=_SMALL, color=INK["ink"], labelpad=1)
    worst, impl, row, _ = min(marks, key=lambda mark: mark[2]["roof"] or math.inf)
    words = (
        f"The roof rises with {copy.p50:.0f} GB/s of copying up to {peak.p50:.0f} TFLOP/s of a "
        f"dense product, at {ridge:.0f} FLOP per byte; most runs measured {copy.p10:.0f} to "
        f"{copy.p90:.0f} GB/s and {peak.p10:.0f} to {peak.p90:.0f} TFLOP/s. The farthest below is "
        f"{NAMES[impl]} on {worst.workload} {worst.which} at {100 * (row['roof'] or 0):.0f} %."
    )
    return sheet.picture(title, words)


# Error against yardstick.


@dataclass(frozen=True)
class Error:
    """What one twin's output lost on one pass, over what the mathematics loses there."""

    twin: str
    ratio: float | None  # None: nothing to compare, `says` tells why
    limit: float  # in yardsticks
    ok: bool
    says: str


@dataclass(frozen=True)
class Errors:
    """One pass of one workload."""

    label: str
    twins: Sequence[Error]


def errors(groups: Mapping[str, Sequence[Errors]], name: str, title: str) -> Picture | None:
    """One strip a pass: error over yardstick of each twin, and the limit; None for nothing."""
    groups = {where: rows for where, rows in groups.items() if rows}
    if not groups:
        return None
    height = sum(_HEAD + _ROW * len(rows) + _GAP for rows in groups.values())
    every = [e for rows in groups.values() for row in rows for e in row.twins]
    label = max(len(row.label) for rows in groups.values() for row in rows)
    left = min(0.5 * WIDTH, label * _SMALL * _NAME + 8)
    size = min(_SMALL, (left - 8) / label / _NAME)
    sheet = Sheet(name, height, left=left, right=8, top=3, bottom=30)
    axes = sheet.axes
    end = min(4.0, max([2.0, *(1.15 * e.ratio for e in every if e.ratio is not None)]))
    axes.set_xlim(0, end)
    axes.set_ylim(height, 0)
    inside = {"transform": axes.get_yaxis_transform()}
    said, y, middles, limits = [], 0.0, [], []
    for where, rows in groups.items():
        sheet.words(-(left - 3) / sheet.width, y + _HEAD / 2, where, weight=700, **inside)
        y += _HEAD
        for row in rows:
            middle = y + _ROW / 2
            middles.append(middle)
            limits += [(e.limit, middle) for e in row.twins if e.limit <= end]
            sheet.words(-5 / sheet.width, middle, row.label, size=size, ha="right", **inside)
            for e in row.twins:
                _error(sheet, middle, end, e)
                said.append(f"{row.label} {NAMES[e.twin]}: {e.says}")
            y += _ROW
        y += _GAP
    axes.hlines(middles, 0, end, color=INK["line"], linewidth=0.5, zorder=0)
    axes.axvline(1, color=INK["faint"], linewidth=0.9, zorder=1)
    if limits:
        at, where_y = zip(*limits, strict=True)
        low, high = ([y + side * _ROW for y in where_y] for side in (-0.4, 0.4))
        axes.vlines(at, low, high, color=INK["bad"], linewidth=1.1)
    axes.set_xticks([0, 0.5, 1, 1.5, 2] if end <= 2.5 else range(int(end) + 1))
    axes.set_yticks([])
    axes.set_xlabel("error / yardstick", size=_SMALL, color=INK["ink"])
    return sheet.picture(title, "; ".join(said) + ".")


def _error(sheet: Sheet, y: float, end: float, e: Error) -> None:
    first = e.twin == TWINS[0]
    tip = f"{NAMES[e.twin]}: {e.says}"
    if e.ratio is None or not e.ok:
        # a red check has a word, above or below the middle so that both twins' can be read
        how = {"ha": "right", "va": "bottom" if first else "top", "color": INK["bad"]}
        sheet.tip(sheet.words(0.97 * end, y, tip, size=_SMALL, **how), tip)
    if e.ratio is not None:
        # Triton's ring stays visible around Pallas' filled mark where both are at one place
        sheet.mark(min(e.ratio, end), y, e.twin, tip, hollow=first, size=5.6 if first else 3.2)


# History.


def history(rows: Mapping[str, Sequence[Row]], name: str, title: str) -> Picture:
    """The times of one pass over its records, oldest first; rows by implementation."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    sheet = Sheet(name, 110, left=34, right=72, top=8, bottom=26)
    axes = sheet.axes
    every = sorted((row for found in rows.values() for row in found), key=lambda row: row["when"])
    runs = list(dict.fromkeys((row["when"], row["commit"]) for row in every))
    low, high = min(_times(every, "p10")) / 1.08, max(_times(every, "p90")) * 1.08
    axes.set_yscale("log")  # a tenth is as high for the quick as for the slow
    axes.set_ylim(low, high)
    axes.set_xlim(-0.25, len(runs) - 0.75)
    said, ends = [], []
    for impl, found in rows.items():
        timed = [row for row in found if row["us"]]
        if not timed:
            continue
        who, colour = report.name_of(impl), INK[_role(impl)]
        at = [runs.index((row["when"], row["commit"])) for row in timed]
        axes.plot(at, _times(timed, "p50"), color=colour, linewidth=1.1, zorder=2)
        for i, row in zip(at, timed, strict=True):
            us = timing.Interval.from_json(row["us"])
            tip = f"{who} at {row['commit']}: {report.interval_text(us)} us"
            axes.plot([i, i], [us.p10, us.p90], color=colour, linewidth=2.4, zorder=2)
            sheet.mark(i, us.p50, impl, tip, hollow=False, size=4)
        last = math.log(timed[-1]["us"]["p50"] / low) / math.log(high / low)
        ends.append((last * sheet.height, who, colour))
        steps = " then ".join(f"{report.short_us(us)} us" for us in _times(timed, "p50"))
        said.append(f"{who}: {steps}")
    ends.sort()
    places = _spread([end[0] for end in ends], _SMALL + 1, sheet.height)
    for y, (_, who, colour) in zip(places, ends, strict=True):
        sheet.words(
            1 + 3 / sheet.width, y / sheet.height, who,
            size=_SMALL, color=colour, transform=axes.transAxes,
        )  # fmt: skip
    axes.set_xticks(
        range(len(runs)), [f"{commit[:7]}\n{when[:10]}" for when, commit in runs], size=6.6
    )
    axes.set_ylabel("us", size=_SMALL, color=INK["ink"], labelpad=2)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color=INK["line"], linewidth=0.5)
    return sheet.picture(title, "; ".join(said) + ".")


def _times(rows: Iterable[Row], which: str) -> list[float]:
    return [row["us"][which] for row in rows if row["us"]]


def _spread(places: Sequence[float], apart: float, top: float) -> list[float]:
    """Rising places, moved as little as it takes to be that far apart and below the top."""
    spread = list(places)
    for i in range(1, len(spread)):
        spread[i] = max(spread[i], spread[i - 1] + apart)
    for i in reversed(range(len(spread))):
        ceiling = top if i == len(spread) - 1 else spread[i + 1] - apart
        spread[i] = min(spread[i], ceiling)
    return spread
