"""Judges a learner's NumPy codecs: the same codes as parity.formats, on every case that there is.

    codecs.check("e4m3", e4m3_decode, e4m3_encode)

Nothing is drawn at random. A decoder is given all codes; an encoder all values, all middles between
two neighbours, and the float32 numbers right below and above each of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from notebooks import _course as course
from parity import formats


@dataclass(frozen=True)
class Case:
    """One call: what goes in, and what must come out."""

    inputs: tuple[Any, ...]
    wanted: np.ndarray


def check(name: str, *functions: Callable[..., Any]) -> None:
    """Says whether these functions, in the order of CODECS[name], agree bit for bit."""
    wrong = judged(name, *functions)
    count = sum(case.wanted.size for cases in CODECS[name]().values() for case in cases)
    right = f"{name}: all {count:,} answers agree bit for bit"
    course.conclude(name, not wrong, f"{wrong or right}.")


def judged(name: str, *functions: Callable[..., Any]) -> str:
    """A sentence about the first answer that is wrong; empty if none is."""
    table = CODECS[name]()
    if len(functions) != len(table):
        raise ValueError(f"functions: expected {', '.join(table)}, got {len(functions)}")
    for (label, cases), function in zip(table.items(), functions, strict=True):
        for case in cases:
            if wrong := _difference(label, case, function):
                return wrong
    return ""


def _difference(label: str, case: Case, function: Callable[..., Any]) -> str:
    try:
        with np.errstate(all="ignore"):
            got = np.asarray(function(*(np.copy(x) for x in case.inputs)))
    except Exception as error:
        return f"{label}: not yet, {type(error).__name__}: {error}"
    wanted = case.wanted
    if got.dtype != wanted.dtype:
        return f"{label}: not yet, it returns {got.dtype}, {wanted.dtype} is wanted"
    if got.shape != wanted.shape:
        return f"{label}: not yet, it returns {list(got.shape)}, {list(wanted.shape)} is wanted"
    off = ~(_bits(got) == _bits(wanted))
    if not off.any():
        return ""
    at = tuple(int(i) for i in np.argwhere(off)[0])
    x = case.inputs[0]
    asked = f"{_show(x[at])}" if x.shape == wanted.shape else f"... at {list(at)}"
    more = "".join(f", {_show(v)}" for v in case.inputs[1:])
    return (
        f"{label}: not yet, {int(off.sum())} of {off.size} differ. First {label}({asked}{more}): "
        f"{_show(got[at])}, expected {_show(wanted[at])}"
    )


def _bits(x: np.ndarray) -> np.ndarray:
    """Equal where all bits are; one NaN is as good as another."""
    if x.dtype.kind != "f":
        return x
    return np.where(np.isnan(x), np.uint32(0x7FC00000), np.ascontiguousarray(x).view(np.uint32))


def _show(x: Any) -> str:
    return f"{float(x):.9g}" if np.asarray(x).dtype.kind == "f" else f"{int(x)}"


def _around(x: np.ndarray) -> np.ndarray:
    """float32: each value, and its neighbours on both sides."""
    x = np.asarray(x, np.float32)
    up, down = np.float32(np.inf), np.float32(-np.inf)
    return np.concatenate([np.nextafter(x, down), x, np.nextafter(x, up)])


def _int8() -> dict[str, Sequence[Case]]:
    cases = []
    for scale in np.array([1, 0.5, 0.1, 0.037], np.float32):
        x = _around(np.arange(-300, 301, dtype=np.float32) / 2 * scale)
        cases.append(Case((x, scale), formats.int8_encode(x, scale)))
    return {"int8_encode": cases}


def _int4() -> dict[str, Sequence[Case]]:
    packed = np.arange(256, dtype=np.uint8).reshape(4, 64)
    codes = formats.unpack_nibbles(packed, low_first=True)
    return {"int4_pack": [Case((codes,), packed)], "int4_unpack": [Case((packed,), codes)]}


def _e4m3() -> dict[str, Sequence[Case]]:
    codes = np.arange(256, dtype=np.uint8)
    values = formats.E4M3.values[:127]
    x = np.concatenate([_around(values), _around((values[1:] + values[:-1]) / 2)])
    x = np.concatenate([x, np.array([449, 464, 480, 1e6, np.inf], np.float32)])
    x = np.concatenate([x, -x])
    return {
        "e4m3_decode": [Case((codes,), formats.E4M3.decode(codes))],
        "e4m3_encode": [Case((x,), formats.E4M3.encode(x))],
    }


def _nf4() -> dict[str, Sequence[Case]]:
    x = _around(np.concatenate([formats.NF4, formats.NF4_THRESHOLDS]))
    x = x[np.abs(x) <= 1]
    return {"nf4_encode": [Case((x,), formats.nf4_encode(x))]}


def _mx() -> dict[str, Sequence[Case]]:
    powers = np.ldexp(np.float32(1), np.arange(-126, 128))
    m = np.concatenate([np.array([0, 448, 447, 6], np.float32), _around(powers), 1.75 * powers])
    m = m[np.isfinite(m)].astype(np.float32)
    return {"mx_scale": [Case((m,), formats.mx_scale(m, "e4m3"))]}


CODECS: dict[str, Callable[[], dict[str, Sequence[Case]]]] = {
    "int8": _int8,
    "int4": _int4,
    "e4m3": _e4m3,
    "nf4": _nf4,
    "mx": _mx,
}
