"""Renders docs/accuracy.md and its pictures: what each number format loses of a tensor and of a
product, and what a random rotation gives back.

    make docs                             renders what is recorded in docs/accuracy.jsonl
    .venv/bin/python docs/accuracy.py     computes the rows again: a minute on one core

No GPU takes part, and nothing is timed. Codes and scales are parity.formats', which are bit for bit
those of the kernels that there are; products and errors are float64. Rows are rounded to four
digits, where another machine's order of summation does not show.
"""

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from reading import filled, table

from parity import drawings, formats
from parity.problems import hadamard
from parity.spec import Arithmetic, Workload

HERE = Path(__file__).parent
PAGE, RECORDS = HERE / "accuracy.md", HERE / "accuracy.jsonl"
PICTURES = {name: HERE / f"accuracy-{name}.svg" for name in ("formats", "rotation")}

BF16, F32 = ml_dtypes.bfloat16, np.float32
M, N, K = 256, 512, 4096
OUTLIERS, LOUD = 32, 60.0  # channels of x, and how much louder than the others they are
ROTATED = 128  # numbers that one rotation mixes
T, D, DRAWS = 1024, 64, 8  # attention: tokens, size of a head, repetitions

DATA = {
    "gaussian": "Gaussian",
    "outliers": "outlier channels",
    "fa3": "FlashAttention-3",
}

# How many times smaller a rotation makes the product's error, x and w both in the format: written
# down before the first row was computed. SPECS knew e4m3 for a tensor (0.9) and int8 for a row.
PREDICTED = {
    ("gaussian", "int8", "tensor"): 1.0,
    ("gaussian", "int8", "row"): 1.0,
    ("gaussian", "int8", "group of 128"): 1.0,
    ("gaussian", "int4", "row"): 1.0,
    ("gaussian", "int4", "group of 128"): 1.0,
    ("gaussian", "int4 with zeros", "group of 128"): 1.0,
    ("gaussian", "e4m3", "tensor"): 1.0,
    ("gaussian", "e4m3", "row"): 1.0,
    ("gaussian", "e4m3", "1 x 128"): 1.0,
    ("outliers", "int8", "tensor"): 6.0,
    ("outliers", "int8", "row"): 5.6,
    ("outliers", "int8", "group of 128"): 3.6,
    ("outliers", "int4", "row"): 1.3,
    ("outliers", "int4", "group of 128"): 1.5,
    ("outliers", "int4 with zeros", "group of 128"): 1.55,
    ("outliers", "e4m3", "tensor"): 0.9,
    ("outliers", "e4m3", "row"): 1.0,
    ("outliers", "e4m3", "1 x 128"): 1.0,
    ("fa3", "int8", "tensor"): 5.7,
    ("fa3", "int8", "row"): 3.7,
    ("fa3", "int8", "group of 128"): 1.5,
    ("fa3", "int4", "row"): 3.5,
    ("fa3", "int4", "group of 128"): 1.45,
    ("fa3", "int4 with zeros", "group of 128"): 1.35,
    ("fa3", "e4m3", "tensor"): 1.0,
    ("fa3", "e4m3", "row"): 1.0,
    ("fa3", "e4m3", "1 x 128"): 1.0,
}
# SQNR in dB of the quiet channels beside the loud ones, as they are and rotated there and back;
# written down after the rows above had been seen, before these were computed
PREDICTED_QUIET = {
    ("int8", "tensor"): (5.5, 24.6),
    ("int8", "row"): (9.6, 28.2),
    ("int8", "group of 128"): (17.5, 34.9),
    ("int4", "row"): (0.0, 3.0),
    ("int4", "group of 128"): (2.0, 11.7),
    ("int4 with zeros", "group of 128"): (2.2, 12.5),
    ("e4m3", "tensor"): (31.5, 17.0),
    ("e4m3", "row"): (31.5, 17.0),
    ("e4m3", "1 x 128"): (31.5, 17.0),
}
# SQNR in dB of x rotated there and back, by as many numbers at a time as the kernels can; written
# down when 128 had been seen by way of the product, before these were computed
SIZES = (64, 128, 256)
PREDICTED_SIZES = {
    ("outliers", "int8", "row"): (40.5, 41.5, 42.0),
    ("outliers", "int4", "group of 128"): (22.5, 24.3, 24.0),
    ("fa3", "int8", "row"): (40.0, 40.6, 40.9),
    ("fa3", "int4", "group of 128"): (18.6, 18.8, 18.9),
}
# the same as PREDICTED for the output of attention; 1.6 was known from a replication for SPECS
PREDICTED_ATTENTION = {
    ("e4m3", "tensor"): 1.6,
    ("e4m3", "128 tokens"): 1.5,
    ("int8", "tensor"): 3.5,
    ("int8", "row"): 1.5,
}


Kept = tuple[np.ndarray, int]  # what a format makes of some values, float32, and its bytes


@dataclass(frozen=True)
class Format:
    """A way to store x [M, K], and w [N, K] where that is another."""

    name: str
    shared: str  # what has one scale
    of_x: Callable[[np.ndarray], Kept]
    of_w: Callable[[np.ndarray], Kept] | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.shared

    def weights(self, w: np.ndarray) -> Kept:
        return (self.of_w or self.of_x)(w)


def int8(axis: int | None, group: int | None = None) -> Callable[[np.ndarray], Kept]:
    def kept(x: np.ndarray) -> Kept:
        code, scale = formats.int8_quantize(x, axis=axis, group=group)
        return formats.int8_dequantize(code, scale, axis=axis, group=group), size(code, scale)

    return kept


def uint8(x: np.ndarray) -> Kept:
    code, scale, zero = formats.uint8_quantize(x, axis=-1)
    return formats.uint8_decode(code, scale[:, None], zero[:, None]), size(code, scale, zero)


def int4(group: int | None, symmetric: bool) -> Callable[[np.ndarray], Kept]:
    def kept(x: np.ndarray) -> Kept:
        of = group or x.shape[-1]
        stored = formats.int4_quantize(x, group=of, symmetric=symmetric)
        return formats.int4_dequantize(*stored, group=of).astype(F32), size(*stored)

    return kept


def nf4(blocksize: int) -> Callable[[np.ndarray], Kept]:
    def kept(x: np.ndarray) -> Kept:
        packed, state = formats.nf4_quantize(x, blocksize=blocksize)
        values = formats.nf4_dequantize(packed, state, x.size, BF16, blocksize=blocksize)
        # the map of the second quantization is the same for all tensors
        return values.astype(F32).reshape(x.shape), size(packed, *state[:3])

    return kept


def small_float(fmt: formats.SmallFloat, share: int | None) -> Callable[[np.ndarray], Kept]:
    """As fp8_quantize_rows, for other formats, and with one scale for so many neighbours; None: for
    the tensor."""

    def kept(x: np.ndarray) -> Kept:
        values = x.astype(F32).reshape(-1, share or x.size)
        top = np.max(np.abs(values), axis=1, keepdims=True)
        scale = np.maximum(top, F32(1e-4)) / F32(fmt.largest)
        code = fmt.encode(values * (F32(1) / scale))
        return (fmt.decode(code) * scale).reshape(x.shape), size(code, scale)

    return kept


def fp8(quantize: Callable[..., Any], **how: Any) -> Callable[[np.ndarray], Kept]:
    def kept(x: np.ndarray) -> Kept:
        code, scale = quantize(x, **how)
        return formats.fp8_dequantize(code, scale), size(code, scale)

    return kept


def mx(fmt: str, scale_mode: str) -> Callable[[np.ndarray], Kept]:
    def kept(x: np.ndarray) -> Kept:
        code, scale = formats.mx_quantize(x, fmt, scale_mode=scale_mode)
        return formats.mx_dequantize(code, scale, fmt), size(code, scale)

    return kept


def size(*arrays: np.ndarray | None) -> int:
    return sum(a.nbytes for a in arrays if a is not None)


def _formats() -> Iterator[Format]:
    yield Format("int8", "tensor", int8(None))
    yield Format("int8", "row", int8(-1))
    yield from (Format("int8", f"group of {g}", int8(-1, g)) for g in (128, 32))
    yield Format("uint8 with zeros", "row", uint8)
    for name, symmetric in (("int4", True), ("int4 with zeros", False)):
        yield Format(name, "row", int4(None, symmetric))
        yield from (Format(name, f"group of {g}", int4(g, symmetric)) for g in (256, 128, 64, 32))
    yield from (Format("NF4", f"block of {b}", nf4(b)) for b in (256, 128, 64, 32))
    rows, blocks = formats.fp8_quantize_rows, formats.fp8_quantize_blocks
    for fmt in (formats.E4M3, formats.E5M2):
        yield Format(fmt.name, "tensor", small_float(fmt, None))
        yield Format(fmt.name, "row", small_float(fmt, K))
        if fmt is formats.E4M3:  # weights have one scale for 128 x 128
            yield Format("e4m3", "1 x 128", fp8(rows), fp8(blocks))
            both = fp8(rows, ue8m0=True), fp8(blocks, ue8m0=True)
            yield Format("e4m3, scale 2^e", "1 x 128", *both)
    for name, fmt in (("MXFP8 e4m3", "e4m3"), ("MXFP8 e5m2", "e5m2"), ("MXFP4", "e2m1")):
        for mode in ("floor", "rceil", "even"):
            yield Format(f"{name}, {mode}", "group of 32", mx(fmt, mode))


FORMATS = {fmt.key: fmt for fmt in _formats()}


@functools.cache
def drawn(data: str) -> tuple[np.ndarray, np.ndarray]:
    """x [M, K] and w [N, K], bfloat16: the same at every call."""
    rng = np.random.default_rng(list(DATA).index(data))
    x, w = rng.standard_normal((M, K)), rng.standard_normal((N, K))
    if data == "outliers":
        x[:, loud_channels()] *= LOUD
    if data == "fa3":
        x, w = lone(rng, x), lone(rng, w)
    return x.astype(F32).astype(BF16), w.astype(F32).astype(BF16)


def loud_channels() -> np.ndarray:
    """The same for all tokens, as in language models."""
    return np.random.default_rng(7).choice(K, OUTLIERS, replace=False)


def lone(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    """x + N(0, 100) * Bernoulli(0.001): FlashAttention-3's paper, section 4.3."""
    return x + 10 * rng.standard_normal(x.shape) * (rng.random(x.shape) < 1e-3)


def rotated(x: np.ndarray, n: int = ROTATED) -> np.ndarray:
    """hadamard_rotate of every n neighbours, always with the same signs, rounded to bfloat16."""
    return _rotation(x, n, inverse=False).astype(F32).astype(BF16)


def rotated_back(x: np.ndarray, n: int = ROTATED) -> np.ndarray:
    return _rotation(x, n, inverse=True)


def _rotation(x: np.ndarray, n: int, inverse: bool) -> np.ndarray:
    signs = np.where(np.random.default_rng(n).random(n) < 0.5, -1, 1).astype(np.int8)
    work = Workload("", {"R": x.size // n, "n": n}, "bfloat16", (), {"inverse": inverse})
    (y,) = hadamard.oracle(Arithmetic.truth(np), work, x.reshape(-1, n), signs)
    return y.reshape(x.shape)


def product(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) @ w.astype(np.float64).T


def distance(y: np.ndarray, truth: np.ndarray) -> float:
    """||y - truth|| / ||truth||."""
    y, truth = y.astype(np.float64), truth.astype(np.float64)
    return float(np.linalg.norm(y - truth) / np.linalg.norm(truth))


def decibels(error: float) -> float:
    """SQNR of a relative error: 6 dB for each bit that is right."""
    return -20 * float(np.log10(error))


def measured(data: str, fmt: Format) -> dict[str, Any]:
    """One row: a format on one kind of data."""
    x, w = drawn(data)
    truth = product(x, w)
    xq, stored = fmt.of_x(x)
    wq, _ = fmt.weights(w)
    return {
        "study": "format",
        "data": data,
        "format": fmt.name,
        "shared": fmt.shared,
        "bits": digits(8 * stored / x.size),
        "sqnr_db": digits(decibels(distance(xq, x))),
        "weights": digits(distance(product(x, wq), truth)),
        "both": digits(distance(product(xq, wq), truth)),
    }


def measured_rotation(data: str, fmt: Format) -> dict[str, Any]:
    """One row: the product with x and w both in the format, as they are and rotated."""
    x, w = drawn(data)
    truth = product(x, w)
    plain = product(fmt.of_x(x)[0], fmt.weights(w)[0])
    turned = product(fmt.of_x(rotated(x))[0], fmt.weights(rotated(w))[0])
    return {
        "study": "rotation",
        "data": data,
        "format": fmt.name,
        "shared": fmt.shared,
        "plain": digits(distance(plain, truth)),
        "rotated": digits(distance(turned, truth)),
    }


def measured_quiet(fmt: Format) -> dict[str, Any]:
    """One row: what is left of the channels that are not loud, as they are and rotated."""
    x, _ = drawn("outliers")
    quiet = np.delete(np.arange(K), loud_channels())
    back = rotated_back(fmt.of_x(rotated(x))[0])
    return {
        "study": "quiet",
        "data": "outliers",
        "format": fmt.name,
        "shared": fmt.shared,
        "plain_db": digits(decibels(distance(fmt.of_x(x)[0][:, quiet], x[:, quiet]))),
        "rotated_db": digits(decibels(distance(back[:, quiet], x[:, quiet]))),
    }


ATTENTION = {
    ("e4m3", "tensor"): small_float(formats.E4M3, None),
    ("e4m3", "128 tokens"): small_float(formats.E4M3, 128 * D),
    ("int8", "tensor"): int8(None),
    ("int8", "row"): int8(-1),
}


def measured_attention(fmt: tuple[str, str]) -> dict[str, Any]:
    """One row: q and k in the format, as they are and rotated, v in e4m3 with one scale."""
    rng, kept = np.random.default_rng(99), ATTENTION[fmt]
    of_v = ATTENTION["e4m3", "tensor"]
    squares: dict[str, list[float]] = {}
    for _ in range(DRAWS):
        q, k, v = (lone(rng, rng.standard_normal((T, D))).astype(F32).astype(BF16) for _ in "qkv")
        logits = product(q, k) / np.sqrt(D)
        truth = attended(logits, v)
        for name, (a, b) in {"plain": (q, k), "rotated": (rotated(q, D), rotated(k, D))}.items():
            found = product(kept(a)[0], kept(b)[0]) / np.sqrt(D)
            off = {name: attended(found, of_v(v)[0]) - truth, f"{name}_logits": found - logits}
            for what, error in off.items():
                squares.setdefault(what, []).append(np.mean(error**2))
    rms = {what: digits(np.sqrt(np.mean(of))) for what, of in squares.items()}
    return {"study": "attention", "data": "fa3", "format": fmt[0], "shared": fmt[1]} | rms


def measured_sizes(data: str, fmt: Format) -> dict[str, Any]:
    """One row: x as it is, and rotated by 64, 128 and 256 numbers at a time."""
    x, _ = drawn(data)
    row = {"study": "sizes", "data": data, "format": fmt.name, "shared": fmt.shared}
    row["plain_db"] = digits(decibels(distance(fmt.of_x(x)[0], x)))
    for n in SIZES:
        back = rotated_back(fmt.of_x(rotated(x, n))[0], n)
        row[f"n{n}_db"] = digits(decibels(distance(back, x)))
    return row


def attended(logits: np.ndarray, v: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True) @ v.astype(np.float64)


def recorded() -> dict[tuple[str, str, str, str], dict[str, Any]]:
    """(study, data, format, what has one scale) -> the row."""
    rows = [json.loads(line) for line in RECORDS.read_text().splitlines()]
    return {(r["study"], r["data"], r["format"], r["shared"]): r for r in rows}


def digits(x: Any) -> float:
    return float(f"{x:.4g}") + 0.0  # no -0


def measure() -> None:
    """Writes all rows."""
    found = [measured(data, fmt) for data in DATA for fmt in FORMATS.values()]
    found += [measured_rotation(data, FORMATS[fmt, of]) for data, fmt, of in PREDICTED]
    found += [measured_quiet(FORMATS[fmt]) for fmt in PREDICTED_QUIET]
    found += [measured_sizes(data, FORMATS[fmt, of]) for data, fmt, of in PREDICTED_SIZES]
    found += [measured_attention(fmt) for fmt in PREDICTED_ATTENTION]
    RECORDS.write_text("".join(json.dumps(row) + "\n" for row in found))


# The page.

MARKS = {"gaussian": ("o", "triton"), "outliers": ("^", "pallas"), "fa3": ("s", "peer")}
SMALL = 7.4
MISSED = 0.15  # a prediction further off than this is named


def main() -> None:
    book = Accuracy()
    PAGE.write_text(book.text())
    for name, picture in book.pictures.items():
        PICTURES[name].write_text(picture.standing_alone())


class Accuracy:
    """The page, from the rows that are recorded."""

    def __init__(self) -> None:
        self.rows = recorded()
        self.pictures = {"formats": self.dots(), "rotation": self.arrows()}

    def of(self, study: str, data: str, name: str, shared: str) -> dict[str, Any]:
        return self.rows[study, data, name, shared]

    def text(self) -> str:
        blocks = ["# What a number format loses", *self.opening()]
        blocks += ["## The tensor", *self.tensors(), "## The product", *self.products()]
        blocks += ["## What a rotation gives back", *self.rotation()]
        blocks += ["## How many numbers at a time", *self.sizes()]
        blocks += ["## Quiet channels", *self.quiet(), "## Attention", *self.attention()]
        return "\n\n".join(b if b[0] in "#|!" else filled(b) for b in blocks) + "\n"

    def opening(self) -> Iterator[str]:
        yield (
            "A quantizer trades accuracy for bytes. These tables say how much, for every format "
            "that [`parity.formats`](../parity/formats/__init__.py) has and three kinds of data "
            "(`fp8_quantize_cols` is 1 x 128 along the other axis). "
            "They were computed on a CPU by [`docs/accuracy.py`](accuracy.py), from fixed seeds: "
            "no GPU took part and nothing was timed. Where a format has a kernel here, its codes "
            "and scales are these, bit for bit; products and errors are float64. `make docs` "
            "renders the recorded rows."
        )
        yield (
            f"x is [{M}, {K}], w [{N}, {K}], both bfloat16. *Gaussian*: all numbers from N(0, 1). "
            f"*Outlier channels*: {OUTLIERS} of the {K} columns of x are {LOUD:.0f} times louder "
            "for every token, as a few channels of a language model are; w is Gaussian. "
            "*FlashAttention-3*: N(0, 1) + N(0, 100) * Bernoulli(0.001) in x and w, which is its "
            "paper's: one number in a thousand is large, anywhere."
        )

    def tensors(self) -> Iterator[str]:
        fine, gauss = self.of("format", "gaussian", "int8", "row"), "gaussian"
        e4m3, e5m2 = (self.of("format", gauss, name, "row") for name in ("e4m3", "e5m2"))
        yield (
            "SQNR is the energy of x over the energy of what is wrong in it, in dB: 6 dB for each "
            "bit that is right. On Gaussian data a whole number spends its bits better than a "
            f"float of the same size: int8 keeps {fine['sqnr_db']:.0f} dB a row, e4m3 "
            f"{e4m3['sqnr_db']:.0f}, e5m2 {e5m2['sqnr_db']:.0f}. A float's share of the error is "
            "the same for small numbers and large ones, so that it hardly minds what shares its "
            "scale. A whole number's step is set by the largest of its group: one loud neighbour "
            "makes it coarse for all. Groups help whole numbers because fewer share a neighbour."
        )
        yield (
            "*Bits* counts codes, scales and zero points. The least error for the bits at four of "
            "them is NF4's on Gaussian data, whose quantiles it holds; zero points are worth more "
            "there than groups of half the size. A float whose scale is any number stores the "
            "largest of its block exactly: with outlier channels that is most of the energy, which "
            "is why e4m3 by 1 x 128 stands out there and loses it with a power of two as its scale."
        )
        yield table(
            ["format", "one scale for", "bits", *(f"{name}, dB" for name in DATA.values())],
            [
                [*key, f"{self.of('format', gauss, *key)['bits']:.3f}"]
                + [f"{self.of('format', data, *key)['sqnr_db']:.1f}" for data in DATA]
                for key in FORMATS
            ],
        )
        yield self.shown("formats")

    def products(self) -> Iterator[str]:
        worst = self.of("format", "fa3", "int4", "row")
        kept = self.of("format", "fa3", "int4", "group of 32")
        yield (
            "The error of x @ w^T is the length of the difference over the length of the truth. "
            "Errors of different numbers do not know of each other, so the sum over K averages "
            "neither signal nor error away: the product is about as wrong as its operands, and "
            "with both in the format by the square root of the sum of squares. *Weights* leaves "
            "x as it is, as int4_matmul does. Groups matter most where the data are rough: int4 "
            f"on FlashAttention-3's data is {percent(worst['weights'])} % wrong with a scale for "
            f"each row and {percent(kept['weights'])} % with one for each 32."
        )
        yield table(
            ["format", "one scale for"]
            + [f"weights, {name}, %" for name in DATA.values()]
            + [f"both, {name}, %" for name in DATA.values()],
            [
                [*key]
                + [
                    percent(self.of("format", data, *key)[what])
                    for what in ("weights", "both")
                    for data in DATA
                ]
                for key in FORMATS
            ],
        )

    def rotation(self) -> Iterator[str]:
        yield (
            f"`hadamard_rotate` replaces each {ROTATED} neighbours by as many sums of all of them, "
            "with signs. Nothing is lost: the matrix is orthogonal, so that rotating x and w alike "
            "leaves every product as it was. But a number that was loud alone is now a little in "
            "all of its neighbours, and the largest of a group comes down to about what it would "
            "be among Gaussian numbers. A whole number's step comes down with it."
        )
        gains = {key: self.gain(*key) for key in PREDICTED}
        of_floats = [gain for key, gain in gains.items() if key[1] == "e4m3"]
        yield (
            "A float has nothing to gain: its error is a share of each number, whoever is beside "
            "it, and a share of all the energy is the same before and after. Over the rows of e4m3 "
            f"below the gain is {max(of_floats):.2f} at best and {min(of_floats):.2f} at worst. "
            "So in a linear layer: rotate what is stored in int8 or int4, and leave fp8 as it is. "
            "Attention, below, is another matter."
        )
        missed = [key for key, gain in gains.items() if abs(gain / PREDICTED[key] - 1) > MISSED]
        yield (
            "*Predicted* was written down before any row was computed, from the size of a step "
            "over the square root of 12; *gain* is the error before over the error after, with x "
            f"and w both in the format. {len(gains) - len(missed)} of {len(gains)} came within "
            f"{100 * MISSED:.0f} %. Not so "
            + ", ".join(f"{' '.join(key[1:])} on {DATA[key[0]]}" for key in missed)
            + ": a lone loud number is the largest of its block, which a float with a free scale "
            "stores exactly, until the rotation mixes it into its neighbours. What int8 loses on "
            "Gaussian data is the rounding of the rotated x to bfloat16."
        )
        yield table(
            ["data", "format", "one scale for", "before, %", "after, %", "gain", "predicted"],
            [
                [
                    DATA[key[0]],
                    *key[1:],
                    percent(self.of("rotation", *key)["plain"]),
                    percent(self.of("rotation", *key)["rotated"]),
                    f"{self.gain(*key):.2f}",
                    f"{predicted:.2f}",
                ]
                for key, predicted in PREDICTED.items()
            ],
        )
        yield self.shown("rotation")

    def gain(self, data: str, name: str, shared: str, *, study: str = "rotation") -> float:
        row = self.of(study, data, name, shared)
        return row["plain"] / row["rotated"]

    def sizes(self) -> Iterator[str]:
        yield (
            "A rotation of more numbers spreads a loud one further. SQNR of x, rotated there and "
            "back: by 64 numbers most is gained, by more little is added. With int4 in groups of "
            "128, a rotation of 256 is worse than one of 128 where a few channels are loud: more "
            "groups get a share of them."
        )
        yield table(
            ["data", "format", "one scale for", "as it is, dB"]
            + [cell for n in SIZES for cell in (f"by {n}, dB", "predicted")],
            [
                [DATA[key[0]], *key[1:], f"{self.of('sizes', *key)['plain_db']:.1f}"]
                + [
                    f"{db:.1f}"
                    for n, guess in zip(SIZES, predicted, strict=True)
                    for db in (self.of("sizes", *key)[f"n{n}_db"], guess)
                ]
                for key, predicted in PREDICTED_SIZES.items()
            ],
        )

    def quiet(self) -> Iterator[str]:
        row = self.of("quiet", "outliers", "int8", "row")
        yield (
            "With outlier channels nearly all the energy of x is loud, and an error measured "
            "against it says nothing of the rest. Here is what is left of the quiet channels alone "
            "(for the rotated x after the way back): int8 by row keeps "
            f"{row['plain_db']:.0f} dB of them, not even two bits, and {row['rotated_db']:.0f} dB "
            "rotated. For e4m3 it is the other way round: a float keeps quiet numbers as well as "
            "loud ones until the rotation mixes them, and its error is then a share of the loud."
        )
        yield table(
            ["format", "one scale for", "before, dB", "predicted", "after, dB", "predicted"],
            [
                [
                    *key,
                    f"{self.of('quiet', 'outliers', *key)['plain_db']:.1f}",
                    f"{before:.1f}",
                    f"{self.of('quiet', 'outliers', *key)['rotated_db']:.1f}",
                    f"{after:.1f}",
                ]
                for key, (before, after) in PREDICTED_QUIET.items()
            ],
        )

    def attention(self) -> Iterator[str]:
        tensor = self.gain("fa3", "e4m3", "tensor", study="attention")
        yield (
            f"FlashAttention-3's own experiment: {T} tokens, a head of {D}, q, k and v with its "
            "distribution; q and k in the format, v in e4m3 with one scale, p exact. Its paper has "
            "2.6 times less error in e4m3 from block scales and rotation together. Here the "
            f"rotation alone gives {tensor:.1f} to e4m3 with one scale, although the error of the "
            "logits stays what it was: softmax turns a large logit's error into a large error of "
            "the output, and the rotation takes errors from the large logits to all of them."
        )
        yield (
            f"The figures are root mean squares over {DRAWS} draws; those of the output include "
            "what v loses, which no rotation of q and k changes, and which the prediction for int8 "
            "had left out. The one for e4m3 with one scale was known from an earlier replication."
        )
        steps = ("plain_logits", "rotated_logits", "plain", "rotated")
        yield table(
            "format,one scale for,logits before,after,output before,after,gain,predicted".split(
                ","
            ),
            [
                [
                    *key,
                    *(f"{self.of('attention', 'fa3', *key)[step]:.2e}" for step in steps),
                    f"{self.gain('fa3', *key, study='attention'):.2f}",
                    f"{predicted:.2f}",
                ]
                for key, predicted in PREDICTED_ATTENTION.items()
            ],
        )

    def shown(self, name: str) -> str:
        picture = self.pictures[name]
        return f"![{picture.title}: {picture.words}]({PICTURES[name].name})"

    def dots(self) -> drawings.Picture:
        """A line for each format, a mark for each kind of data, at its SQNR."""
        names = [short(key) for key in FORMATS]
        places = [(i + 0.5) * STEP for i in range(len(names))]
        sheet, said = lines("accuracy-formats", names, places), []
        for y, name, key in zip(places, names, FORMATS, strict=True):
            found = {data: self.of("format", data, *key)["sqnr_db"] for data in DATA}
            ends = min(found.values()), max(found.values())
            sheet.axes.hlines(y, *ends, color=drawings.INK["line"], linewidth=1)
            for data, db in found.items():
                mark(sheet, db, y, data, f"{name}, {DATA[data]}: {db:.1f} dB")
            said.append(f"{name} {' / '.join(f'{db:.0f}' for db in found.values())}")
        sheet.axes.set_xlim(0, 48)
        sheet.axes.set_xticks(range(0, 49, 6))
        sheet.axes.set_xlabel("SQNR of x in dB: six for each right bit", size=SMALL)
        legend(sheet)
        title = "What is left of x in each format"
        return sheet.picture(title, f"dB for {' / '.join(DATA.values())}: {'; '.join(said)}.")

    def arrows(self) -> drawings.Picture:
        """From the error before the rotation (hollow) to the error after it."""
        names = [short(key[1:]) for key in PREDICTED]
        # a gap between one kind of data and the next
        places = [(i + 0.5 + 0.6 * list(DATA).index(k[0])) * STEP for i, k in enumerate(PREDICTED)]
        sheet, said = lines("accuracy-rotation", names, places), []
        for y, name, key in zip(places, names, PREDICTED, strict=True):
            row = self.of("rotation", *key)
            before, after = 100 * row["plain"], 100 * row["rotated"]
            ink = drawings.INK[MARKS[key[0]][1]]
            sheet.axes.plot([before, after], [y, y], color=ink, linewidth=1.2)
            tip = f"{name}, {DATA[key[0]]}: {before:.3g} % before, {after:.3g} % after"
            mark(sheet, before, y, key[0], tip, hollow=True)
            mark(sheet, after, y, key[0], tip)
            said.append(f"{DATA[key[0]]} {name} from {before:.2g} to {after:.2g}")
        sheet.axes.set_xscale("log")
        ticks = (1, 2, 5, 10, 20, 50, 100)
        sheet.axes.set_xticks(ticks, [str(t) for t in ticks])
        sheet.axes.minorticks_off()
        sheet.axes.set_xlabel("error of x @ w^T in %, both in the format", size=SMALL)
        legend(sheet, "; hollow: before the rotation")
        return sheet.picture("What a rotation does to the error", f"In %: {'; '.join(said)}.")


STEP = 10.5  # points from one line of a picture to the next


def lines(name: str, labels: list[str], places: list[float]) -> drawings.Sheet:
    """A sheet with a line for each label at its place, in points from the top."""
    height = places[-1] + STEP / 2
    sheet = drawings.Sheet(name, height, left=122, right=10, top=26, bottom=30)
    sheet.axes.set_ylim(height, 0)
    sheet.axes.set_yticks(places, labels)
    sheet.axes.tick_params(axis="both", labelsize=SMALL)
    sheet.axes.xaxis.label.set_color(drawings.INK["ink"])
    sheet.axes.grid(axis="x", color=drawings.INK["line"], linewidth=0.5)
    sheet.axes.set_axisbelow(True)
    return sheet


def mark(
    sheet: drawings.Sheet, x: float, y: float, data: str, tip: str, *, hollow: bool = False
) -> None:
    shape, role = MARKS[data]
    (point,) = sheet.axes.plot(
        [x], [y], marker=shape, markersize=4.2, clip_on=False, zorder=3,
        color=drawings.INK["paper" if hollow else role], markeredgecolor=drawings.INK[role],
    )  # fmt: skip
    sheet.tip(point, tip)


def legend(sheet: drawings.Sheet, more: str = "") -> None:
    """The three marks and their names above the axes."""
    x, words = -0.53, [*DATA.values()]
    words[-1] += more
    for data, word in zip(DATA, words, strict=True):
        shape, role = MARKS[data]
        top = 1 + 12 / sheet.height
        sheet.axes.plot(
            [x], [top], marker=shape, markersize=4.2, clip_on=False, color=drawings.INK[role],
            transform=sheet.axes.transAxes,
        )  # fmt: skip
        sheet.axes.text(
            x + 0.03, top, word, size=SMALL, va="center", color=drawings.INK["ink"],
            transform=sheet.axes.transAxes,
        )  # fmt: skip
        x += 0.09 + 0.0205 * len(word)


def short(key: tuple[str, ...]) -> str:
    """A format's name in a picture."""
    return " ".join(key).replace("group of ", "").replace("block of ", "")


def percent(error: float) -> str:
    return f"{100 * error:.3g}"


if __name__ == "__main__":
    measure()
    main()
