"""Draws the picture of each puzzle from data: puzzles/qNN/picture.svg, which spec.md shows.

    python -m puzzles.pictures [qNN ...]

The colours are parity's (drawings.PALETTE) and follow the reader's theme. The text drawing in the
statement says the same in a terminal; `words` is the description that a screen reader reads.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from parity import formats
from parity.drawings import INK, Picture, Sheet
from puzzles.puzzle import load

HOME = Path(__file__).resolve().parent
SMALL = 7.8  # points
BLUE, ORANGE = INK["triton"], INK["pallas"]  # the first thing of two, and the second


def main(names: list[str]) -> None:
    for name in names or PICTURES:
        (HOME / name / "picture.svg").write_text(PICTURES[name]().standing_alone())


# What the drawings share


def diagram(name: str, height: float) -> Sheet:
    """A sheet without axes, in points from its upper left corner."""
    sheet = Sheet(name, height, left=6, right=6, top=4, bottom=4)
    sheet.axes.set_axis_off()
    sheet.axes.set_xlim(0, sheet.width)
    sheet.axes.set_ylim(height, 0)
    return sheet


def plot(name: str, height: float, x: str, y: str, *, left: float = 34) -> Sheet:
    """A sheet with two axes that are named."""
    sheet = Sheet(name, height, left=left, right=10, top=6, bottom=32)
    sheet.axes.set_xlabel(x, size=SMALL, color=INK["ink"])
    sheet.axes.set_ylabel(y, size=SMALL, color=INK["ink"], labelpad=2)
    sheet.axes.grid(color=INK["line"], linewidth=0.4)
    sheet.axes.set_axisbelow(True)
    sheet.axes.tick_params(which="minor", left=False, bottom=False)  # a logarithmic axis has some
    return sheet


def box(sheet: Sheet, x: float, y: float, wide: float, high: float, colour: str, fill: str) -> None:
    """A rectangle whose upper left corner is (x, y); colour of its edge, fill of its inside."""
    from matplotlib.patches import Rectangle

    sheet.axes.add_artist(
        Rectangle((x, y), wide, high, facecolor=fill, edgecolor=colour, linewidth=0.8)
    )


# The pictures


def q01() -> Picture:
    scale, codes = 0.02, np.arange(-1, 8)
    sheet = plot("q01", 130, "x", "q")
    axes = sheet.axes
    for q in codes:
        left, right = (q - 0.5) * scale, (q + 0.5) * scale
        axes.plot([left, right], [q, q], color=BLUE, linewidth=2)
        if q % 2 == 0:  # this step owns both of its ends
            axes.plot([left, right], [q, q], "o", color=BLUE, markersize=4)
    shown = np.array([0.03, 0.07, 0.11], np.float32)
    whole = np.rint(shown / np.float32(scale))
    for x, q in zip(shown, whole, strict=True):
        axes.plot([x, x, -0.03], [-1.6, q, q], color=ORANGE, linewidth=0.9, linestyle=(0, (3, 2)))
        sheet.words(float(x) + 0.001, -1.1, f"{x:g}", size=SMALL, color=ORANGE)
    axes.set_xlim(-0.03, 0.15)
    axes.set_ylim(-1.6, 7.6)
    axes.set_yticks(codes)
    axes.set_xticks([scale * k for k in codes if k % 2 == 0])
    pairs = ", ".join(f"{x:g} becomes {q:g}" for x, q in zip(shown, whole, strict=True))
    return sheet.picture(
        "A staircase: codes over x",
        f"Steps of width {scale}, one for each code. A dot shows which step a tie belongs to: "
        f"always the even one. {pairs}.",
    )


def q02() -> Picture:
    rng = np.random.default_rng(2)
    group, sizes = 8, np.repeat([4.0, 0.7, 1.6], 8)[:21]
    w = (rng.standard_normal(21) * sizes).astype(np.float32)
    sheet = plot("q02", 120, "k", "w[n, k]")
    axes = sheet.axes
    whole = float(np.abs(w).max())
    told = []
    for g, start in enumerate(range(0, w.size, group)):
        part = w[start : start + group]
        top = float(np.abs(part).max())
        axes.fill_between(
            [start - 0.5, start + len(part) - 0.5], -top, top, color=INK["shade"], linewidth=0
        )
        axes.hlines([-top, top], start - 0.5, start + len(part) - 0.5, color=ORANGE, linewidth=1.5)
        sheet.words(
            start + (len(part) - 1) / 2, -whole * 1.18, f"scale {top / 127:.3f}", size=SMALL,
            color=ORANGE, ha="center",
        )  # fmt: skip
        told.append(f"group {g}: scale {top / 127:.3f}")
    axes.hlines([-whole, whole], -0.5, w.size - 0.5, color=INK["faint"], linewidth=0.9,
                linestyle=(0, (3, 2)))  # fmt: skip
    axes.bar(np.arange(w.size), w, width=0.6, color=BLUE, linewidth=0)
    axes.set_xlim(-0.7, w.size - 0.3)
    axes.set_ylim(-whole * 1.35, whole * 1.15)
    axes.set_xticks(range(0, w.size, 4))
    return sheet.picture(
        "A row of w and what its groups span",
        f"21 weights in groups of 8, the last of them short. {'; '.join(told)}. The dashed lines "
        f"are one scale for the row, {whole / 127:.3f}: the groups of small weights would use few "
        "of its codes.",
    )


def q03() -> Picture:
    rng = np.random.default_rng(3)
    gate = rng.standard_normal(2000)
    x = (gate / (1 + np.exp(-gate))).astype(np.float32)  # SiLU
    _, scale, zero = formats.uint8_quantize(x, axis=None)
    _, wide = formats.int8_quantize(x, axis=None)
    top, low, high = 127 * float(wide), float(x.min()), float(x.max())
    sheet = Sheet("q03", 136, left=40, right=14, top=4, bottom=4)
    axes = sheet.axes
    axes.set_axis_off()
    axes.set_xlim(-top, top)
    axes.set_ylim(136, 0)
    counts, edges = np.histogram(x, 60)
    tall = 50 * counts / counts.max()
    axes.bar(edges[:-1], -tall, np.diff(edges), bottom=56, align="edge", color=INK["peer"],
             linewidth=0)  # fmt: skip
    sheet.words(high, 44, "SiLU(x)", size=SMALL, ha="right", color=INK["faint"])
    axes.vlines(0, 2, 128, color=INK["faint"], linewidth=0.8, linestyle=(0, (3, 2)))
    rulers = (("int8", 74, -top, top, "-127", "127", "0", BLUE, float(wide)),
              ("uint8", 108, low, high, "0", "255", str(zero), ORANGE, float(scale)))  # fmt: skip
    for name, y, left, right, first, last, middle, colour, step in rulers:
        marks = left + step * np.arange(0, 256, 5)
        axes.hlines(y, left, right, color=colour, linewidth=1.6)
        axes.vlines(marks[marks <= right + step], y - 4, y + 4, color=colour, linewidth=0.7)
        sheet.words(-1.02 * top, y, name, color=colour, ha="right", weight=700)
        for at, text, side in (
            (left, first, "center"),
            (0, middle, "left"),
            (right, last, "center"),
        ):
            sheet.words(at + 0.05, y + 12, text, size=SMALL, color=colour, ha=side)
    return sheet.picture(
        "int8 and uint8 over the same values",
        f"Values of a SiLU from {low:.2f} to {high:.2f}. int8 spends its codes on {-top:.2f} to "
        f"{top:.2f}; uint8 with the zero point {zero} on what there is. A mark is five codes.",
    )


def q04() -> Picture:
    sheet = diagram("q04", 118)
    codes, wide, high = (3, -1), 20.0, 16.0
    nibbles = [code & 15 for code in codes]
    colours = (BLUE, ORANGE)
    for at, (code, nibble, colour) in enumerate(zip(codes, nibbles, colours, strict=True)):
        x = 84 + at * 120
        sheet.words(x, 10, f"column {at}: {code}", color=colour, weight=700)
        bits(sheet, x, 20, wide, high, f"{nibble:04b}", [colour] * 4)
    for line, (name, low_first) in enumerate((("low first", True), ("high first", False))):
        y = 56 + 34 * line
        first = formats.pack_nibbles(np.array(nibbles), low_first=low_first)[0]
        order = colours[::-1] if low_first else colours
        sheet.words(0, y + high / 2, name)
        bits(sheet, 84, y, wide, high, f"{first:08b}", [order[0]] * 4 + [order[1]] * 4)
        sheet.words(84 + 8 * wide + 10, y + high / 2, f"0x{first:02X}", weight=700)
    for bit in (7, 4, 3, 0):
        sheet.words(84 + (7.5 - bit) * wide, 111, f"bit {bit}", size=6.8, ha="center",
                    color=INK["faint"])  # fmt: skip
    both = [
        f"{name} 0x{formats.pack_nibbles(np.array(nibbles), low_first=low)[0]:02X}"
        for name, low in (("low first", True), ("high first", False))
    ]
    return sheet.picture(
        "Two nibbles in a byte",
        f"The codes {codes[0]} and {codes[1]} are the nibbles {nibbles[0]:04b} and "
        f"{nibbles[1]:04b}. As one byte: {', '.join(both)}.",
    )


def bits(
    sheet: Sheet, x: float, y: float, wide: float, high: float, text: str, colours: list[str]
) -> None:
    """A row of cells with a digit in each."""
    for i, (digit, colour) in enumerate(zip(text, colours, strict=True)):
        box(sheet, x + i * wide, y, wide, high, colour, INK["shade"])
        sheet.words(x + (i + 0.5) * wide, y + high / 2 + 0.5, digit, color=colour, ha="center")


def q05() -> Picture:
    spec = load(HOME / "q05").spec
    steps, seeds = 4096, (1, 2, 3)
    step = np.float32(0.01)
    t = np.arange(steps + 1)
    sheet = plot("q05", 130, "steps", "sum of hundredths")
    axes = sheet.axes
    axes.plot(t, t * 0.01, color=INK["faint"], linewidth=0.9, linestyle=(0, (3, 2)))
    ends = []
    for seed in seeds:
        drawn = spec.philox(seed, np.arange(steps)) & np.uint32(0xFFFF)
        path = _summed(step, lambda t, bits, drawn=drawn: drawn[t])
        axes.plot(t[::16], path[::16], color=ORANGE, linewidth=0.9)
        ends.append(path[-1])
    nearest = _summed(step, lambda t, bits: 0x7FFF + (bits >> 16 & 1))
    axes.plot(t[::16], nearest[::16], color=BLUE, linewidth=1.6)
    sheet.words(2300, 31, "at random, three seeds", size=SMALL, color=ORANGE, ha="right")
    sheet.words(steps, nearest[-1] + 3.4, "to the nearest", size=SMALL, color=BLUE, ha="right")
    axes.set_xlim(0, steps * 1.03)
    axes.set_ylim(0, 46)
    axes.set_xticks(range(0, steps + 1, 1024))
    return sheet.picture(
        "A sum in bfloat16",
        f"{steps} hundredths are {steps / 100:g}. In bfloat16 the sum rounded to the nearest ends "
        f"at {nearest[-1]:g}; rounded at random it ends at "
        f"{', '.join(f'{end:g}' for end in ends)}.",
    )


def _summed(step: np.float32, added: Callable[[int, int], int]) -> list[float]:
    """4096 steps added up in bfloat16: `added` to the bits before the lower half is cleared."""
    path = [0.0]
    for t in range(4096):
        bits = int((np.float32(path[-1]) + step).view(np.uint32))
        bits = (bits + int(added(t, bits))) & 0xFFFF0000
        path.append(float(np.uint32(bits).view(np.float32)))
    return path


def q06() -> Picture:
    unit = 2.0**-9
    x = np.arange(0, 0x29C0, dtype=np.uint16).view(np.float16)  # below 23 * 2^-9
    y = formats.E4M3.decode(formats.E4M3.encode(x))
    sheet = plot("q06", 150, "x, in units of 2^-9", "the number that its code stands for")
    axes = sheet.axes
    axes.axvspan(0, 8, color=INK["shade"], linewidth=0)
    at = x.astype(np.float32) / unit
    axes.plot([0, 24], [0, 24], color=INK["faint"], linewidth=0.8, linestyle=(0, (3, 2)))
    for value in np.unique(y):
        owned = at[y == value]
        code = int(formats.E4M3.encode(np.asarray(value)))
        colour = ORANGE if value < 8 * unit else BLUE
        ends = [owned[0], owned[-1]]
        axes.plot(ends, [value / unit] * 2, color=colour, linewidth=2)
        if code % 2 == 0:  # both ties are this code's
            axes.plot(ends, [value / unit] * 2, "o", color=colour, markersize=3)
    sheet.words(0.4, 21, "subnormals: 0, 1 .. 7", size=SMALL, color=ORANGE)
    sheet.words(8.4, 21, "1.m * 2^-6: 8 .. 15", size=SMALL, color=BLUE)
    sheet.words(16.4, 13, "1.m * 2^-5:\n16, 18 .. 30", size=SMALL, color=BLUE)
    axes.set_xlim(0, 24)
    axes.set_ylim(-0.6, 24.6)
    axes.set_xticks(range(0, 25, 4))
    axes.set_yticks(range(0, 25, 4))
    return sheet.picture(
        "e4m3 near zero",
        "A staircase of e4m3 numbers over float16 numbers, in units of 2^-9. Eight subnormals and "
        "the eight numbers from 2^-6 on are one unit apart, those from 2^-5 on two. Dots: ties, "
        "which belong to even codes.",
    )


def q07() -> Picture:
    sheet = Sheet("q07", 118, left=40, right=10, top=4, bottom=32)
    axes = sheet.axes
    rows = (
        ("e2m1", formats.E2M1.values[1:8], ORANGE),
        ("e5m2", formats.E5M2.values[1 : formats.E5M2.largest_code + 1], BLUE),
        ("e8m0", formats.e8m0_decode(np.arange(255, dtype=np.uint8)), INK["ink"]),
    )
    low, high = -19.0, 18.0
    said = []
    for row, (name, values, colour) in enumerate(rows):
        y = 16 + 36 * row
        at = np.log2(values.astype(np.float64))
        inside = at[(at > low) & (at < high)]
        axes.vlines(inside, y - 8, y + 8, color=colour, linewidth=0.8)
        axes.hlines(y, max(low, at[0]), min(high, at[-1]), color=colour, linewidth=0.8)
        sheet.words(low - 0.6, y, name, color=colour, ha="right", weight=700)
        end = f"{values[-1]:g}" if values[-1] < 1e6 else f"2^{at[-1]:g}"
        said.append(f"{name} has {len(values)}, from 2^{at[0]:g} to {end}")
    axes.set_xlim(low, high)
    axes.set_ylim(118, 0)
    axes.set_yticks([])
    powers = range(-16, 17, 4)
    axes.set_xticks(powers, [f"2^{p}" for p in powers])
    sheet.words(high, 118 - 10, "and on to 2^127", size=SMALL, ha="right", color=INK["faint"])
    axes.set_xlabel("positive numbers", size=SMALL, color=INK["ink"])
    return sheet.picture(
        "Reach and density of three formats", f"Positive numbers: {'; '.join(said)}."
    )


def q08() -> Picture:
    rng = np.random.default_rng(8)
    sizes = np.sort(2.0 ** rng.uniform(-9, 3, 24)).astype(np.float32)
    x = rng.standard_normal((24, 512)).astype(np.float32) * sizes[:, None]
    kinds = (
        ("one scale for all", x.reshape(1, -1), BLUE),
        ("a scale for each token", x, ORANGE),
    )
    sheet = plot("q08", 130, "tokens, from the smallest to the largest", "relative error", left=44)
    axes = sheet.axes
    ends = []
    for name, grouped, colour in kinds:
        code, scale = formats.int8_quantize(grouped, axis=-1)
        back = formats.int8_dequantize(code, scale, axis=-1).reshape(x.shape)
        error = np.linalg.norm(back - x, axis=1) / np.linalg.norm(x, axis=1)
        axes.plot(np.arange(24), error, "o-", color=colour, markersize=2.5, linewidth=1)
        ends.append((name, error[0], error[-1]))
    axes.set_yscale("log")
    axes.set_ylim(3e-3, 2.5)
    sheet.words(0.3, 1.4, kinds[0][0], size=SMALL, color=BLUE)
    sheet.words(0.3, 0.017, kinds[1][0], size=SMALL, color=ORANGE)
    told = "; ".join(f"{name}: from {a:.2g} to {b:.2g}" for name, a, b in ends)
    return sheet.picture("What a token loses", f"Relative errors of 24 tokens in int8. {told}.")


def q09() -> Picture:
    w = np.random.default_rng(9).standard_normal(64 * 4096).astype(np.float32)
    packed, absmax = formats.nf4_quantize(w, double=False)
    share = w / np.repeat(np.asarray(absmax), 64)
    sheet = plot("q09", 130, "w over the largest of its block", "how often")
    axes = sheet.axes
    axes.grid(visible=False)
    counts, edges = np.histogram(share, 120, (-1, 1))
    axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=INK["peer"], linewidth=0)
    tall = counts.max() * 1.15
    axes.vlines(formats.NF4, 0, tall, color=ORANGE, linewidth=1.1)
    for code in (0, 3, 7, 12, 15):
        sheet.words(float(formats.NF4[code]), tall * 1.05, f"{code}", size=SMALL, color=ORANGE,
                    ha="center")  # fmt: skip
    axes.set_xlim(-1.04, 1.04)
    axes.set_ylim(0, tall * 1.12)
    axes.set_yticks([])
    used = np.bincount(formats.unpack_nibbles(packed, low_first=False), minlength=16) / w.size
    return sheet.picture(
        "The sixteen values of NF4",
        "A normal distribution, each block of 64 over its largest magnitude, and the sixteen "
        f"values from -1 to 1. Code 7 is 0. Codes are used between {used.min():.1%} and "
        f"{used.max():.1%} of the time.",
    )


def q15() -> Picture:
    n, k = 28672, 8192
    m = 2.0 ** np.arange(0, 12.01, 0.25)
    kinds = (("float16 weights", 16.0, BLUE), ("four bits", 4 + 24 / 128, ORANGE))
    sheet = plot("q15", 130, "tokens M", "megabytes moved", left=40)
    axes = sheet.axes
    said = []
    for name, bits_each, colour in kinds:
        moved = (n * k * bits_each / 8 + 2 * m * (n + k)) / 1e6
        axes.plot(m, moved, color=colour, linewidth=1.6)
        sheet.words(1.1, moved[0] * 1.12, name, size=SMALL, color=colour)
        said.append(f"{name}: {moved[0]:.0f} MB for one token, {moved[-1]:.0f} for {m[-1]:.0f}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylim(80, 1200)
    axes.set_yticks([100, 200, 500, 1000], ["100", "200", "500", "1000"])
    axes.set_yticks([], minor=True)
    axes.set_xticks([1, 16, 256, 4096], ["1", "16", "256", "4096"])
    return sheet.picture(
        f"Bytes of a product with {n} x {k} weights", f"{'; '.join(said)}. Activations are float16."
    )


PICTURES: Mapping[str, Callable[[], Picture]] = {
    "q01": q01,
    "q02": q02,
    "q03": q03,
    "q04": q04,
    "q05": q05,
    "q06": q06,
    "q07": q07,
    "q08": q08,
    "q09": q09,
    "q15": q15,
}


if __name__ == "__main__":
    main(sys.argv[1:])
