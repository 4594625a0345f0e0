"""Renders docs/decoding.md and its pictures: which bytes of weights a mixture of experts reads for
each token, at batches from 1 to 128 tokens, from the recorded rows of moe_gemm."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from reading import filled, table

from parity import drawings, record
from parity.report import NAMES, TWINS

HERE = Path(__file__).parent
PAGE = HERE / "decoding.md"
RECORDS = HERE.parent / "parity" / "records" / "nvidia_h200" / "moe_gemm.jsonl"
MODELS = {"mixtral": "Mixtral 8x7B", "dsv3": "DeepSeek-V3"}
TORCH = "peer:torch._grouped_mm"
SHOWN = {**{twin: NAMES[twin] for twin in TWINS}, TORCH: "torch._grouped_mm"}


def main() -> None:
    book = Decoding()
    PAGE.write_text(book.text())
    for model, picture in book.pictures.items():
        file(model).write_text(picture.standing_alone())


def file(model: str) -> Path:
    return HERE / f"decoding-{model}.svg"


@dataclass(frozen=True)
class Batch:
    """One workload: T tokens, and the last recorded row of everyone who ran it."""

    tokens: int
    name: str
    rows: dict[str, dict]

    @property
    def any(self) -> dict:
        return next(iter(self.rows.values()))

    @property
    def experts(self) -> int:
        return self.any["sizes"]["E"]

    @property
    def weight(self) -> int:
        """Bytes of one expert."""
        return 2 * self.any["sizes"]["K"] * self.any["sizes"]["N"]

    @property
    def active(self) -> int:
        """Experts with rows in the recorded draw: what else was counted is x and y."""
        M, K, N = (self.any["sizes"][n] for n in "MKN")
        return round((self.any["bytes"] - 2 * M * (K + N)) / self.weight)

    @property
    def least(self) -> float:
        """Bytes of weights for each token if every active expert's are read once."""
        return self.active * self.weight / self.tokens

    def us(self, who: str) -> float | None:
        row = self.rows.get(who)
        return row["us"]["p50"] if row and row["us"] else None

    def asked(self, twin: str) -> float:
        """How many tiles of rows an active expert has on average: so often are its weights asked
        for. A row picks its expert by chance, so an expert's share is binomial."""
        rows, tile = self.any["sizes"]["M"], self.rows[twin]["config"]["block_m"]
        p = 1 / self.experts
        chance = [math.comb(rows, n) * p**n * (1 - p) ** (rows - n) for n in range(rows + 1)]
        tiles = sum(c * math.ceil(n / tile) for n, c in enumerate(chance))
        return tiles / (1 - chance[0])

    def read_in_that_time(self, who: str) -> float | None:
        """Bytes for each token that the memory could have delivered meanwhile."""
        us, ceilings = self.us(who), self.any["ceilings"]
        rate = 1e3 * max(ceilings["copy_gbps"], ceilings["read_gbps"])  # bytes in a microsecond
        return None if us is None else us * rate / self.tokens


class Decoding:
    def __init__(self) -> None:
        last: dict[str, dict[str, dict]] = {}
        for row in record.read(RECORDS).rows:
            if "_decode_t" in row["workload"] and row["impl"] in SHOWN:
                last.setdefault(row["workload"], {})[row["impl"]] = row
        found = [Batch(int(name.split("_t")[1]), name, rows) for name, rows in last.items()]
        found.sort(key=lambda batch: batch.tokens)
        every = {m: [b for b in found if b.name.startswith(f"{m}_")] for m in MODELS}
        self.batches = {model: batches for model, batches in every.items() if batches}
        self.pictures = {m: picture(m, batches) for m, batches in self.batches.items()}

    def text(self) -> str:
        blocks = ["# Decoding: the bytes of weights for each token", *self.opening()]
        for model, batches in self.batches.items():
            blocks += [f"## {MODELS[model]}", *section(model, batches, self.pictures[model])]
        return "\n\n".join(b if b[0] in "#|!" else filled(b) for b in blocks) + "\n"

    def opening(self) -> Iterator[str]:
        device = next(iter(self.batches.values()))[0].any["device"]
        yield (
            "While a language model decodes, a mixture-of-experts layer has few rows and many "
            "weights: the time goes into reading them. The least that must be read is the weights "
            "of the *active* experts, those that a token was routed to, each once for the whole "
            "batch. One token pays for all of its experts alone; in a batch, tokens share them, "
            "until all experts are active and the bytes for each token fall as 1 / T."
        )
        yield (
            f"Below, `grouped_gemm` in bfloat16 on {device}, uniform routing, cold cache; "
            "`make docs` renders it from the records. *Asked for* says how often the tiles of a "
            "kernel ask for an active expert's weights: once if its rows fit into one tile (where "
            "it is more, the second time usually comes from the L2 cache). *Rate* is the least "
            "bytes over the time of the call, and its share of the fastest that memory was read or "
            "copied in the same run."
        )


def section(model: str, batches: list[Batch], picture: drawings.Picture) -> Iterator[str]:
    yield table(
        ["tokens", "active experts", "least MB / token"]
        + [f"{NAMES[twin]}: asked for" for twin in TWINS]
        + [f"{SHOWN[who]}: us" for who in SHOWN]
        + [f"{NAMES[twin]}: rate, TB/s" for twin in TWINS],
        [
            [str(b.tokens), f"{b.active} of {b.experts}", f"{b.least / 1e6:.1f}"]
            + [f"{b.asked(twin):.2f} x" if twin in b.rows else "" for twin in TWINS]
            + [f"{us:.0f}" if (us := b.us(who)) else "not timed" for who in SHOWN]
            + [rate(b, twin) for twin in TWINS]
            for b in batches
        ],
    )
    yield f"![{picture.title}: {picture.words}]({file(model).name})"


def rate(batch: Batch, twin: str) -> str:
    us, could = batch.us(twin), batch.read_in_that_time(twin)
    if us is None or could is None:
        return ""
    return f"{batch.least * batch.tokens / us / 1e6:.2f} ({100 * batch.least / could:.0f} %)"


def picture(model: str, batches: list[Batch]) -> drawings.Picture:
    """Against tokens: the least, and what memory could have delivered in the time of each."""
    from matplotlib.ticker import LogLocator, NullLocator

    sheet = drawings.Sheet(f"decoding-{model}", 150, left=40, right=92, top=8, bottom=32)
    axes = sheet.axes
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    tokens = [b.tokens for b in batches]
    axes.set_xticks(tokens, [str(t) for t in tokens])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    size = {"size": 7.8, "color": drawings.INK["ink"]}
    axes.set_xlabel("tokens in the batch", **size)
    axes.set_ylabel("MB of weights for each token", **size)
    least = [b.least / 1e6 for b in batches]
    axes.plot(tokens, least, color=drawings.INK["ink"], linewidth=1.2, linestyle=(0, (3, 2.5)))
    ends, said = {"the least": least[-1]}, [told("the least", tokens, least)]
    for who, name in SHOWN.items():
        points = [
            (b.tokens, y / 1e6) for b in batches if (y := b.read_in_that_time(who)) is not None
        ]
        role = who if who in TWINS else "peer"
        axes.plot(*zip(*points, strict=True), color=drawings.INK[role], linewidth=1.2)
        for x, y in points:
            sheet.mark(x, y, who, f"{name}, {x} tokens: {y:.1f} MB", hollow=False, size=4)
        ends[name] = points[-1][1]
        said.append(told(name, *zip(*points, strict=True)))
    # names at the right, in the order of their lines, none upon another
    low, high = (math.log(y) for y in axes.get_ylim())
    place = -math.inf
    for name, y in sorted(ends.items(), key=lambda end: end[1]):
        place = max((math.log(y) - low) / (high - low), place + 0.075)
        role = next((w for w, n in SHOWN.items() if n == name), "ink")
        axes.annotate(
            name, (1.03, place), xycoords="axes fraction", va="center", size=7.8,
            color=drawings.INK[role if role in drawings.INK else "peer"],
        )  # fmt: skip
    title = f"{MODELS[model]}: weights that memory could deliver in the time taken, and the least"
    return sheet.picture(title, "; ".join(said) + ".")


def told(name: str, tokens, megabytes) -> str:
    pairs = zip(tokens, megabytes, strict=True)
    return f"{name} " + ", ".join(f"{y:.1f} MB at {t}" for t, y in pairs)
