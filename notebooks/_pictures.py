"""Pictures drawn from data: who owns which element, bytes moved, the roofline, a truth table.

Each function returns a parity.drawings.Picture: an SVG in the project's colours with a title and a
description in words. Nothing is told by colour alone: programs have numbers, marks have shapes.
`_course.show` puts a picture into a notebook.
"""

import ast
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from notebooks._tracer import Trace
from parity.drawings import INK, Picture, Sheet

SMALL, TEXT = 7.8, 8.6  # points
FILLS = ("triton", "pallas", "good", "wait", "peer")  # neighbours in a grid get different ones


def diagram(name: str, height: float) -> Sheet:
    """A sheet without axes, in points from its upper left corner."""
    sheet = Sheet(name, height, left=4, right=4, top=4, bottom=4)
    sheet.axes.set_axis_off()
    sheet.axes.set_xlim(0, sheet.width)
    sheet.axes.set_ylim(height, 0)
    return sheet


def box(sheet: Sheet, x: float, y: float, wide: float, high: float, **how: Any) -> None:
    """A rectangle whose upper left corner is (x, y); matplotlib's settings for patches follow."""
    from matplotlib.patches import Rectangle

    how = {"facecolor": "none", "edgecolor": INK["line"], "linewidth": 0.8} | how
    sheet.axes.add_artist(Rectangle((x, y), wide, high, **how))


# Which program owns which element


def ownership(traces: Mapping[str, Trace], array: str = "out") -> Picture:
    """Each element of a 1-D or 2-D array in the colour and with the number of who stores it.

    traces: label -> one traced call. Lanes that reach beyond the array stand outside it, crossed
    out: their mask, or the copy engine, keeps them from doing anything.
    """
    panels = {label: _panel(trace, array) for label, trace in traces.items()}
    gap, head, foot = 14.0, 16.0, 14.0
    columns = sum(panel.columns for panel in panels.values())
    cell = min(15.0, (332.0 - gap * (len(panels) - 1)) / columns)
    height = head + cell * max(panel.rows for panel in panels.values()) + foot
    sheet = diagram("ownership", height)
    x0, said = 0.0, []
    for label, panel in panels.items():
        sheet.words(x0, head / 2, label, weight=700)
        for (i, j), who in panel.owner.items():
            box(sheet, x0 + j * cell, head + i * cell, cell, cell, alpha=0.32, linewidth=0,
                facecolor=INK[FILLS[_colour(who)]])  # fmt: skip
        high, wide = (cell * side for side in panel.shape)
        lines = {"color": INK["line"], "linewidth": 0.5}
        sheet.axes.hlines([head + cell * i for i in range(panel.shape[0])], x0, x0 + wide, **lines)
        sheet.axes.vlines(
            [x0 + cell * j for j in range(panel.shape[1])], head, head + high, **lines
        )
        for i, j in panel.idle:
            x, y = x0 + j * cell, head + i * cell
            near, far = 0.25 * cell, 0.75 * cell
            cross = [x + near, x + far, math.nan, x + far, x + near]
            sheet.axes.plot(
                cross, [y + near, y + far, math.nan, y + near, y + far],
                color=INK["bad"], linewidth=0.8,
            )  # fmt: skip
            box(sheet, x + 0.8, y + 0.8, cell - 1.6, cell - 1.6, edgecolor=INK["bad"],
                linewidth=0.4)  # fmt: skip
        for i, j in panel.unowned:
            box(sheet, x0 + j * cell, head + i * cell, cell, cell, hatch="////", linewidth=0.5)
        box(sheet, x0, head, wide, high, edgecolor=INK["ink"], linewidth=1.4)
        for who, (i, j) in panel.centres.items():
            name = ",".join(map(str, who))
            size = min(TEXT, 1.5 * cell / max(1, 0.62 * len(name)))
            sheet.words(x0 + (j + 0.5) * cell, head + (i + 0.5) * cell, name, ha="center",
                        weight=700, size=size)  # fmt: skip
        shape = " x ".join(map(str, panel.shape if panel.two else panel.shape[1:]))
        counts = f"{len(panel.centres)} programs, {len(panel.idle)} idle lanes"
        counts += f", {len(panel.unowned)} unwritten" if panel.unowned else ""
        sheet.words(x0, height - foot / 2, counts, size=SMALL, color=INK["faint"])
        said.append(f"{label}: {shape}, {counts}")
        x0 += max(cell * panel.columns, 4.4 * len(counts)) + gap
    words = (
        "Each cell is one element, marked with the program that stores it. Crossed cells outside "
        f"the frame are lanes without an element. {'; '.join(said)}."
    )
    return sheet.picture(f"Who stores which element of {array}", words)


class _Panel:
    """One array as the picture shows it."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.two = len(shape) == 2
        self.shape = shape if self.two else (1, *shape)
        self.owner: dict[tuple[int, int], tuple[int, ...]] = {}
        self.idle: set[tuple[int, int]] = set()
        self.centres: dict[tuple[int, ...], tuple[float, float]] = {}

    @property
    def unowned(self) -> list[tuple[int, int]]:
        every = np.ndindex(*self.shape)
        return [(i, j) for i, j in every if (i, j) not in self.owner]

    @property
    def rows(self) -> int:
        return max([self.shape[0], *(i + 1 for i, _ in self.idle)])

    @property
    def columns(self) -> int:
        return max([self.shape[1], *(j + 1 for _, j in self.idle)])


def _panel(trace: Trace, array: str) -> _Panel:
    stores = [t for t in trace.touches if t.stored and t.array == array]
    if not stores:
        raise ValueError(f"array: nobody stores to {array!r}")
    panel = _Panel(stores[0].shape)
    axes = [i for i in range(3) if any(len(t.program) > i and t.program[i] for t in stores)] or [0]
    for t in stores:
        who = tuple(t.program[i] for i in axes)
        cells = [(int(at[0]) if panel.two else 0, int(at[-1])) for at in t.at]
        live = [c for c, alive in zip(cells, t.live, strict=True) if alive]
        panel.owner.update(dict.fromkeys(live, who))
        if live:
            i, j = np.mean(live, axis=0)
            panel.centres[who] = float(i), float(j)
    # A copy engine clips its stores before anybody sees them: the lanes show where it loads.
    for t in trace.touches:
        if t.shape != stores[0].shape:
            continue
        for at, alive in zip(t.at, t.live, strict=True):
            i, j = int(at[0]) if panel.two else 0, int(at[-1])
            if not alive and not (0 <= i < panel.shape[0] and 0 <= j < panel.shape[1]):
                panel.idle.add((i, j))
    return panel


def _colour(who: tuple[int, ...]) -> int:
    return sum(i * step for i, step in zip(who, (2, 1, 3), strict=False)) % len(FILLS)


# Bytes


def traffic(bars: Mapping[str, tuple[int, int]], least: tuple[int, int] | None = None) -> Picture:
    """Bytes that were read and written, one bar a label; `least`: what nobody can do without."""
    row, head = 18.0, 14.0
    sheet = Sheet("traffic", head + row * len(bars), left=92, right=12, top=2, bottom=28)
    axes = sheet.axes
    end = max([sum(pair) for pair in bars.values()] + ([sum(least)] if least else []))
    unit, name = next((u, n) for u, n in ((10**6, "MB"), (10**3, "kB"), (1, "bytes"))
                      if end >= 10 * u or u == 1)  # fmt: skip
    axes.set_xlim(0, 1.05 * end / unit)
    axes.set_ylim(head + row * len(bars), 0)
    axes.set_yticks([])
    axes.set_xlabel(f"{name} between memory and the kernels", size=SMALL, color=INK["ink"])
    sheet.words(0.86 * end / unit, head / 2, "read", color=INK["triton"], weight=700, ha="right")
    sheet.words(1.05 * end / unit, head / 2, "written", color=INK["pallas"], weight=700, ha="right")
    said = []
    for k, (label, (read, written)) in enumerate(bars.items()):
        y = head + row * (k + 0.5)
        axes.barh([y], [read / unit], height=0.62 * row, color=INK["triton"], linewidth=0)
        axes.barh(
            [y], [written / unit], left=[read / unit], height=0.62 * row,
            color=INK["pallas"], linewidth=0, hatch="///", edgecolor=INK["paper"],
        )  # fmt: skip
        sheet.words(-4 / sheet.width, y, label, ha="right", transform=axes.get_yaxis_transform())
        said.append(f"{label} reads {read:,} and writes {written:,} bytes")
    if least:
        axes.axvline(sum(least) / unit, color=INK["ink"], linewidth=1, linestyle=(0, (3, 2)))
        sheet.words(sum(least) / unit, head / 2, "least ", size=SMALL, ha="right")
        said.append(f"the least is {sum(least):,} bytes")
    return sheet.picture("Bytes read and written", "; ".join(said) + ".")


# Bytes, operation by operation


def operations(bars: Mapping[str, Mapping[str, tuple[int, int]]], unit: int, units: str) -> Picture:
    """One bar a variant: the bytes that each of its operations reads and writes, end to end.

    bars: variant -> operation -> (bytes read, bytes written). unit: bytes of one step of the axis,
    which `units` names.
    """
    row, head = 44.0, 8.0
    sheet = Sheet("operations", head + row * len(bars), left=66, right=12, top=2, bottom=28)
    axes = sheet.axes
    end = max(sum(map(sum, parts.values())) for parts in bars.values()) / unit
    axes.set_xlim(0, 1.1 * end)
    axes.set_ylim(head + row * len(bars), 0)
    axes.set_yticks([])
    axes.set_xticks(range(math.ceil(end) + 1))
    axes.grid(axis="x", color=INK["line"], linewidth=0.5)
    axes.set_axisbelow(True)
    axes.set_xlabel(f"read and written, in {units}", size=SMALL, color=INK["ink"])
    said = []
    for k, (label, parts) in enumerate(bars.items()):
        y, at = head + row * (k + 0.62), 0.0
        sheet.words(-4 / sheet.width, y, label, ha="right", transform=axes.get_yaxis_transform())
        for name, (read, written) in parts.items():
            wide = (read + written) / unit
            sheet.words(at + wide / 2, y - 0.47 * row, name, ha="center", size=SMALL)
            axes.barh([y], [read / unit], left=[at], height=0.55 * row, color=INK["triton"],
                      linewidth=0)  # fmt: skip
            axes.barh(
                [y], [written / unit], left=[at + read / unit], height=0.55 * row,
                color=INK["pallas"], linewidth=0, hatch="///", edgecolor=INK["paper"],
            )  # fmt: skip
            at += wide
            axes.plot([at, at], [y - 0.36 * row, y + 0.36 * row], color=INK["ink"], linewidth=1.2)
        sheet.words(at + 0.01 * end, y, f"{at:.3g}", weight=700)
        told = (f"{name} reads {r / unit:.2g} and writes {w / unit:.2g}"
                for name, (r, w) in parts.items())  # fmt: skip
        said.append(f"{label}: {', '.join(told)}, {at:.3g} in all")
    # Beside the shortest bar there is room.
    totals = [sum(map(sum, parts.values())) for parts in bars.values()]
    y = head + row * (totals.index(min(totals)) + 0.62)
    sheet.words(1.08 * end, y - 6, "solid: read", color=INK["triton"], weight=700, ha="right")
    sheet.words(1.08 * end, y + 6, "hatched: written", color=INK["pallas"], weight=700, ha="right")
    return sheet.picture(
        f"What each operation moves, in {units}", f"In {units}. {'; '.join(said)}."
    )


# A backward: what waits for what, and a sum in two stages


def dependencies(formulas: Mapping[str, str], places: Mapping[str, tuple[float, float]]) -> Picture:
    """Which name each formula needs, as arrows.

    formulas: name -> a Python expression; one that begins with `mean_` or `sum_` is a sum, and gets
    a heavy frame. places: (column, row) of every name, inputs and formulas alike.
    """
    high, wide, step = 26.0, 68.0, 42.0
    rows = max(row for _, row in places.values())
    sheet = diagram("dependencies", rows * step + high + 20)
    columns = max(column for column, _ in places.values())
    gap = (sheet.width - wide) / columns

    def corner(name: str) -> tuple[float, float]:
        return places[name][0] * gap, places[name][1] * step + 6

    said = []
    for name, formula in formulas.items():
        tree = ast.walk(ast.parse(formula, mode="eval"))
        needs = {n.id for n in tree if isinstance(n, ast.Name) and n.id in places}
        needs = sorted(needs, key=lambda need: places[need][1])  # so that arrows cross less
        said.append(f"{name} = {formula} needs {', '.join(needs)}")
        x1, y1 = corner(name)
        for i, need in enumerate(needs):
            x0, y0 = corner(need)
            end = y1 + high * (i + 1) / (len(needs) + 1)
            sheet.axes.annotate(
                "", (x1 - 1, end), (x0 + wide, y0 + high / 2),
                arrowprops={"arrowstyle": "-|>", "color": INK["faint"], "linewidth": 0.9,
                            "shrinkA": 0, "shrinkB": 0, "mutation_scale": 7}, zorder=1,
            )  # fmt: skip
    for name in places:
        x, y = corner(name)
        formula = formulas.get(name, "")
        direction = formula.partition("(")[0]
        heavy = direction.startswith(("mean_", "sum_"))
        box(sheet, x, y, wide, high, facecolor=INK["shade" if formula else "paper"],
            edgecolor=INK["pallas" if heavy else "triton" if not formula else "ink"],
            linewidth=2.2 if heavy else 1.0, zorder=2)  # fmt: skip
        below = direction.replace("_", " ") if heavy else "given" if not formula else ""
        sheet.words(x + wide / 2, y + high / (3 if below else 2), name, ha="center", weight=700)
        sheet.words(x + wide / 2, y + 0.75 * high, below, ha="center", size=0.8 * SMALL)
    return sheet.picture("What each gradient needs", "; ".join(said) + ".")


def two_stages(trace: Trace, rows: str = "x", partial: str = "out1", total: str = "out") -> Picture:
    """Column sums in two launches: who reads which row, who stores which partial row, who adds up.

    The three names are arrays of the trace: [M, N], [P, N] and [N].
    """
    left = _owners(trace, 0, rows, stored=False)
    middle = _owners(trace, 0, partial, stored=True)
    right = _owners(trace, 1, total, stored=True)[None, :]
    head, cell = 15.0, 11.0
    sheet = diagram("stages", head + cell * left.shape[0] + 4)
    wide = cell * left.shape[1]
    gap = (sheet.width - 3 * wide) / 2
    titles = (f"{rows}: read by program", "partial sums: stored by", "total: stored by")
    middles = []
    for k, (owner, title) in enumerate(zip((left, middle, right), titles, strict=True)):
        x0 = k * (wide + gap)
        y0 = head + cell * (left.shape[0] - owner.shape[0]) / 2
        sheet.words(x0 + wide / 2 + 6 * (1 - k), y0 - 7, title, ha="center", size=SMALL, weight=700)
        for (i, j), who in np.ndenumerate(owner):
            name = chr(ord("A") + who) if k == 2 else who  # another kernel's programs
            fill = FILLS[(int(who) + (3 if k == 2 else 0)) % len(FILLS)]
            box(sheet, x0 + j * cell, y0 + i * cell, cell, cell, facecolor=INK["paper"])
            box(sheet, x0 + j * cell, y0 + i * cell, cell, cell, facecolor=INK[fill], alpha=0.32,
                linewidth=0)  # fmt: skip
            sheet.words(x0 + (j + 0.5) * cell, y0 + (i + 0.5) * cell, str(name), ha="center",
                        size=0.85 * SMALL)  # fmt: skip
        box(sheet, x0, y0, wide, cell * owner.shape[0], edgecolor=INK["ink"], linewidth=1.2)
        middles.append((x0, [y0 + (i + 0.5) * cell for i in range(owner.shape[0])]))
    line = {"linewidth": 0.9, "shrinkA": 1, "shrinkB": 1, "mutation_scale": 7, "arrowstyle": "-|>"}
    for i, y in enumerate(middles[0][1]):
        who = int(left[i, 0])
        goal = middles[1][1][int(np.flatnonzero(middle[:, 0] == who)[0])]
        line["color"] = INK[FILLS[who % len(FILLS)]]
        sheet.axes.annotate("", (middles[1][0], goal), (middles[0][0] + wide, y), arrowprops=line)
    for y in middles[1][1]:
        line["color"] = INK["ink"]
        goal = (middles[2][0], middles[2][1][0])
        sheet.axes.annotate("", goal, (middles[1][0] + wide, y), arrowprops=line)
    read = "; ".join(
        f"program {who} reads the rows {', '.join(map(str, np.flatnonzero(left[:, 0] == who)))}"
        for who in np.unique(left)
    )
    words = (
        f"First kernel: {read}; each stores one of {middle.shape[0]} partial rows. Second kernel: "
        f"{len(np.unique(right))} programs share {right.shape[1]} columns and add the partial rows."
    )
    return sheet.picture("A sum over all rows, in two stages", words)


def _owners(trace: Trace, launch: int, array: str, *, stored: bool) -> np.ndarray:
    """The program that touches each element of an array in one launch."""
    touches = [t for t in trace.touches if (t.launch, t.array, t.stored) == (launch, array, stored)]
    if not touches:
        raise ValueError(f"array: nobody {'stores to' if stored else 'loads from'} {array!r}")
    owner = np.full(touches[0].shape, -1)
    for t in touches:
        owner[tuple(t.at[t.live].T)] = t.program[0]
    return owner


# The roofline


def roofline(
    dots: Mapping[str, float], copy_gbps: float, tflops: float, of: str, at: float | None = None
) -> Picture:
    """How fast work of some arithmetic intensity can be at most on one device.

    dots: label -> FLOP per byte; a dot sits on the roof, where the best kernel of that kind would.
    copy_gbps, tflops: ceilings, measured. of: whose, for the title. at: an intensity to read off.
    """
    ridge = 1e3 * tflops / copy_gbps
    sheet = Sheet("roofline", 170, left=40, right=12, top=8, bottom=32)
    axes = sheet.axes
    values = [v for v in (*dots.values(), at or 0) if v > 0]
    low, high = min([*values, ridge / 100]) / 2, max([*values, ridge]) * 5
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)

    def roof(intensity: float) -> float:
        return min(intensity * copy_gbps / 1e3, tflops)

    axes.set_ylim(roof(low) / 2, 3 * tflops)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.grid(color=INK["line"], linewidth=0.5)
    axes.set_axisbelow(True)
    corners = [low, ridge, high]
    axes.plot(corners, [roof(i) for i in corners], color=INK["ink"], linewidth=1.3)
    sheet.words(math.sqrt(low * ridge), roof(math.sqrt(low * ridge)) * 1.7,
                f"{copy_gbps:.0f} GB/s", size=SMALL, ha="right")  # fmt: skip
    sheet.words(high / 1.1, tflops * 1.5, f"{tflops:.0f} TFLOP/s", size=SMALL, ha="right")
    said = []
    for k, (label, intensity) in enumerate(dots.items()):
        axes.plot([intensity], [roof(intensity)], "o", color=INK["triton"], markersize=5)
        side = ("right", 1 / 1.15) if intensity > high / 10 else ("left", 1.15)
        below = roof(intensity) / (1.5 if k % 2 else 1.9)
        sheet.words(intensity * side[1], below, label, size=SMALL, ha=side[0])
        bound = "memory" if intensity < ridge else "arithmetic"
        said.append(f"{label} at {intensity:.3g} FLOP per byte: {bound} is the limit")
    if at:
        axes.axvline(at, color=INK["pallas"], linewidth=1.2, linestyle=(0, (4, 2)))
        axes.plot([at], [roof(at)], "^", color=INK["pallas"], markersize=6)
        said.append(f"at {at:.3g} FLOP per byte the roof is {roof(at):.3g} TFLOP/s")
    axes.set_xlabel("FLOP per byte moved", size=SMALL, color=INK["ink"])
    axes.set_ylabel("TFLOP/s at most", size=SMALL, color=INK["ink"], labelpad=1)
    return sheet.picture(
        f"Roofline of {of}",
        f"The roof rises with {copy_gbps:.0f} GB/s up to {tflops:.0f} TFLOP/s, which it reaches at "
        f"{ridge:.0f} FLOP per byte. {'; '.join(said)}.",
    )


# A truth table


def truth_table(
    rows: Mapping[str, Sequence[str]], columns: Sequence[str], title: str, note: str = ""
) -> Picture:
    """Words in cells, coloured by kind: "right", "wrong", "caught", "unseen", or "" for blank.

    A cell is "kind" or "kind: other word".
    """
    kinds = {"right": ("good", 0.2), "caught": ("good", 0.2), "wrong": ("bad", 0.25),
             "unseen": ("bad", 0.25), "refused": ("wait", 0.25), "": ("paper", 0)}  # fmt: skip
    left, high, head = 118.0, 17.0, 18.0
    height = head + high * len(rows) + (14 if note else 0)
    sheet = diagram("table", height)
    wide = (sheet.width - left) / len(columns)
    for j, column in enumerate(columns):
        sheet.words(left + (j + 0.5) * wide, head / 2, column, ha="center", weight=700, size=SMALL)
    said = []
    for i, (label, cells) in enumerate(rows.items()):
        y = head + i * high
        sheet.words(0, y + high / 2, label, size=SMALL)
        for j, cell in enumerate(cells):
            kind, _, word = cell.partition(": ")
            colour, alpha = kinds[kind]
            box(sheet, left + j * wide + 1, y + 1, wide - 2, high - 2, facecolor=INK[colour],
                alpha=alpha, linewidth=0)  # fmt: skip
            sheet.words(left + (j + 0.5) * wide, y + high / 2, word or kind, ha="center",
                        size=SMALL, weight=700 if colour == "bad" else 400)  # fmt: skip
        told = (
            f"{c} {cell.removeprefix(': ') or 'nothing'}"
            for c, cell in zip(columns, cells, strict=True)
        )
        said.append(f"{label}: {', '.join(told)}")
    if note:
        sheet.words(0, height - 7, note, size=SMALL, color=INK["faint"])
    return sheet.picture(title, "; ".join(said) + ".")


# Softmax, block by block


def running_softmax(row: np.ndarray, block: int, seen: int) -> Picture:
    """The state of online softmax, (top, total), after each of the first `seen` blocks of a row.

    row: float32 [n], finite. Blocks that are still to come are faint. A sum that overflows without
    top is red, and says so.
    """
    blocks = np.split(row, range(block, len(row), block))
    left, high, line = 82.0, 84.0, 15.0
    head, foot = 13.0, 5 * line
    sheet = diagram("running", head + high + foot)
    wide = (sheet.width - left) / len(blocks)
    low, top = float(row.min()) - 4, float(row.max()) + 4

    def y(value: float) -> float:
        return head + high * (top - value) / (top - low)

    labels = ("top", "old total times", "total", "sum of exp(x)")
    base = head + high + line
    for k, label in enumerate(labels):
        sheet.words(0, base + line * (k + 0.5), label, size=SMALL)
    sheet.words(0, head + high / 2, "logits", size=SMALL)
    for value in (row.min(), row.max()):
        sheet.words(left - 5, y(float(value)), f"{value:.0f}", size=SMALL, ha="right")
    largest, total, said = -math.inf, np.float32(0), []
    naive = np.float32(0)
    steps = []
    for b, part in enumerate(blocks):
        here, x0 = b < seen, left + b * wide
        box(sheet, x0 + 1, head, wide - 2, high, facecolor=INK["shade" if here else "paper"])
        at = [x0 + wide * (i + 0.5) / len(part) for i in range(len(part))]
        heights = [y(float(v)) for v in part]
        colour = INK["triton" if here else "line"]
        sheet.axes.plot(at, heights, "o", markersize=3.4, color=colour)
        middle = x0 + wide / 2
        sheet.words(middle, head / 2, f"block {b + 1}", size=SMALL, ha="center",
                    color=INK["ink" if here else "faint"])  # fmt: skip
        if not here:
            continue
        new = max(largest, float(part.max()))
        factor = math.exp(largest - new)
        with np.errstate(over="ignore"):
            naive = naive + np.exp(part).sum()
        total = np.float32(total * factor + np.exp(part - np.float32(new)).sum())
        largest = new
        steps.append((x0, x0 + wide, y(new)))
        over = bool(np.isinf(naive))
        plain = "overflow" if over else f"{naive:.1e}"
        cells = (f"{new:.1f}", f"{factor:.2g}", f"{total:.3g}", plain)
        for k, cell in enumerate(cells):
            bad = over and k == 3
            if bad:
                box(sheet, x0 + 1, base + line * k + 1, wide - 2, line - 2, facecolor=INK["bad"],
                    alpha=0.25, linewidth=0)  # fmt: skip
            sheet.words(middle, base + line * (k + 0.5), cell, size=SMALL, ha="center",
                        weight=700 if bad else 400)  # fmt: skip
        said.append(
            f"after block {b + 1} top is {new:.1f}, the old total was multiplied by {factor:.2g}, "
            f"total is {total:.3g}, and the plain sum {plain}"
        )
    line_x = [x for start, end, _ in steps for x in (start, end)]
    line_y = [height for _, _, height in steps for _ in range(2)]
    sheet.axes.plot(line_x, line_y, color=INK["ink"], linewidth=1.3)
    return sheet.picture(
        f"Online softmax after {seen} of {len(blocks)} blocks", "; ".join(said) + "."
    )


# Number formats


def number_lines(weights: np.ndarray) -> Picture:
    """All values of six formats under a histogram of weights, each stretched to the largest one.

    weights: float32 [n].
    """
    from parity import formats

    sets = {
        "int8, 8 bits": np.arange(-127, 128) / 127,
        "e4m3, 8 bits": formats.E4M3.values / 448,
        "e5m2, 8 bits": formats.E5M2.values / 57344,
        "int4, 4 bits": np.arange(-7, 8) / 7,
        "NF4, 4 bits": formats.NF4,
        "e2m1, 4 bits": formats.E2M1.values / 6,
    }
    left, high, row = 66.0, 74.0, 22.0
    sheet = diagram("formats", high + row * len(sets) + 26)
    half = (sheet.width - left - 8) / 2
    centre, largest = left + half, float(np.abs(weights).max())
    counts, edges = np.histogram(weights / largest, 61, (-1, 1))
    for count, start, end in zip(counts, edges, edges[1:], strict=False):
        tall = (high - 6) * count / counts.max()
        box(sheet, centre + half * start, high - tall, half * (end - start) - 0.6, tall,
            facecolor=INK["peer"], alpha=0.6, linewidth=0)  # fmt: skip
    sheet.words(0, high - 8, f"{len(weights)} weights", size=SMALL)
    said = []
    for k, (label, values) in enumerate(sets.items()):
        places = np.unique(values[np.isfinite(values)])
        top = high + row * k + 7
        sheet.words(0, top + 6, label, size=SMALL)
        xs = np.repeat(centre + half * places, 3)
        ys = np.tile([top, top + 12, math.nan], len(places))
        how = {"linewidth": 0.5 if len(places) > 20 else 1.2, "color": INK["triton"]}
        sheet.axes.plot(xs, ys, solid_capstyle="butt", **how)
        near = float((np.abs(places) <= 0.25).mean())
        said.append(f"{label}: {len(places)} values, {near:.0%} of them in the middle quarter")
    base = high + row * len(sets) + 12
    for place in (-1, -0.5, 0, 0.5, 1):
        name = f"{place:g}" if place else "0"
        sheet.words(centre + half * place, base, name, size=SMALL, ha="center", color=INK["faint"])
    sheet.words(centre, base + 11, "weight / largest weight", size=SMALL, ha="center")
    share = float((np.abs(weights) <= 0.25 * largest).mean())
    said.append(f"{share:.0%} of the weights lie in the middle quarter")
    return sheet.picture("The values of six formats", "; ".join(said) + ".")


def quantized(x: np.ndarray) -> dict[str, tuple[float, np.ndarray]]:
    """format/how many share a scale -> (bits per number, scales included; x there and back).

    x: float32 [n], n a multiple of 128.
    """
    from parity import formats

    rows, found = x.reshape(1, -1), {}

    def keep(name: str, back: np.ndarray, *stored: np.ndarray) -> None:
        bits = 8 * sum(part.nbytes for part in stored) / x.size
        found[name] = bits, np.asarray(back).reshape(-1)

    for group in (128, 32):
        packed, scale, _ = formats.int4_quantize(rows, group=group)
        back = formats.int4_dequantize(packed, scale, group=group)
        keep(f"int4/{group}", back, packed, scale)
    packed, state = formats.nf4_quantize(x)
    assert isinstance(state, formats.Nf4State)
    back = formats.nf4_dequantize(packed, state, x.size)
    keep("NF4/64", back, packed, state.qabsmax, state.absmax2)
    for name, element in (("MXFP4/32", "e2m1"), ("MXFP8/32", "e4m3")):
        code, scale = formats.mx_quantize(rows, element)
        keep(name, formats.mx_dequantize(code, scale, element), code, scale)
    code, scale = formats.fp8_quantize_rows(rows)
    keep("FP8/128", formats.fp8_dequantize(code, scale), code, scale)
    code, scale = formats.int8_quantize(rows, axis=-1, group=128)
    keep("int8/128", formats.int8_dequantize(code, scale, axis=-1, group=128), code, scale)
    code, scale = formats.int8_quantize(rows, axis=None)
    keep("int8/all", formats.int8_dequantize(code, scale, axis=None), code, scale)
    return found


def sqnr_against_bits(data: Mapping[str, np.ndarray]) -> Picture:
    """What each format keeps of two sets of numbers: circles the first set, triangles the second.

    data: label -> float32 [n]. The dashed line is integers of 2 to 8 bits, 128 to a scale, on the
    first set.
    """
    (first, one), (second, two) = data.items()
    sheet = Sheet("sqnr", 190, left=32, right=8, top=16, bottom=30)
    axes = sheet.axes

    def sqnr(x: np.ndarray, back: np.ndarray) -> float:
        noise = float(np.sum((x - back).astype(np.float64) ** 2))
        return 10 * math.log10(float(np.sum(x.astype(np.float64) ** 2)) / noise)

    kept = {
        name: (bits, sqnr(one, back), sqnr(two, quantized(two)[name][1]))
        for name, (bits, back) in quantized(one).items()
    }
    groups = one.reshape(-1, 128)
    line = []
    for bits in range(2, 9):
        scale = np.abs(groups).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1)
        line.append(sqnr(groups, np.rint(groups / scale) * scale))
    low, high = 0.0, 5.0 * math.ceil(max(line) / 5) + 3
    axes.set_xlim(2, 11.6)
    axes.set_ylim(low, high)
    axes.set_xticks(range(2, 9))
    axes.grid(color=INK["line"], linewidth=0.5)
    axes.set_axisbelow(True)
    axes.plot(range(2, 9), line, color=INK["faint"], linewidth=1, linestyle=(0, (4, 2)))
    sheet.words(2.1, line[1] + 4, "integers", size=SMALL, color=INK["faint"])
    unit = (high - low) / sheet.height
    for cluster in ((0, 6), (6, 12)):
        inside = {n: k for n, k in kept.items() if cluster[0] <= k[0] < cluster[1]}
        inside = dict(sorted(inside.items(), key=lambda item: item[1][1]))
        at = max(bits for bits, _, _ in inside.values()) + 0.3
        heights = [a for _, a, _ in inside.values()]
        for i in range(1, len(heights)):
            heights[i] = max(heights[i], heights[i - 1] + 10.5 * unit)
        shift = (sum(heights) - sum(a for _, a, _ in inside.values())) / len(heights)
        for height, (name, (bits, a, b)) in zip(heights, inside.items(), strict=True):
            axes.plot([bits, bits], [a, b], color=INK["line"], linewidth=0.8, zorder=1)
            axes.plot([bits, at - 0.05], [a, height - shift], color=INK["faint"], linewidth=0.6)
            axes.plot([bits], [a], "o", color=INK["triton"], markersize=4.5)
            axes.plot([bits], [b], "^", color=INK["pallas"], markersize=5)
            sheet.words(at, height - shift, f"{name}  {a:.0f}, {b:.0f}", size=SMALL)
    for x, shape, colour, label in ((0.02, "o", "triton", first), (0.2, "^", "pallas", second)):
        axes.plot([x], [1.05], shape, color=INK[colour], markersize=5, clip_on=False,
                  transform=axes.transAxes)  # fmt: skip
        sheet.words(x + 0.03, 1.05, label, size=SMALL, transform=axes.transAxes)
    axes.set_xlabel("bits per number, scales included", size=SMALL, color=INK["ink"])
    axes.set_ylabel("SQNR, dB", size=SMALL, color=INK["ink"], labelpad=1)
    said = (
        f"{name} {bits:.2f} bits, {a:.1f} dB ({first}), {b:.1f} dB ({second})"
        for name, (bits, a, b) in kept.items()
    )
    return sheet.picture("SQNR against bits", "; ".join(said) + ".")
