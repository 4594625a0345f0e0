"""int8, uint8 and int4: whole numbers times a scale, and two codes of 4 bits to a byte.

    int8   q = clip(rint(x / scale), -127, 127)        x ~ q * scale
    uint8  q = clip(rint(x / scale) + zero, 0, 255)    x ~ (q - zero) * scale
    int4   q = clip(rint(x / scale) + zero, 0, 15)     x ~ (q - zero) * scale, zero = 8 if symmetric

Every division is float32's, every tie goes to the even number. Dividing by the scale is a choice:
bitsandbytes multiplies int8 by 127 / absmax, which differs by one code at some ties.

Packed int4 [N, K]: byte j of a row holds k = 2j in its low nibble and k = 2j + 1 in its high one,
so that four bytes are the little-endian 32-bit word in which GPTQ keeps eight codes. Zero points
are packed the same way along the groups, with 8 where the last word is not full.
"""

from typing import Any

import numpy as np

from parity.formats import _arguments as arguments

ZERO = 8  # the zero point of symmetric int4, and what fills a word of zero points


def int8_encode(x: np.ndarray, scale: np.ndarray | np.float32) -> np.ndarray:
    """round(x / scale), ties to even, within -127 .. 127; NaN becomes 0. A scale of 0 counts as 1.

    x float32, float16 or bfloat16, scale float32 broadcast against it -> int8. Raises TypeError for
    an x of another dtype.
    """
    return _whole(x, scale, -127, 127).astype(np.int8)


def int8_decode(code: np.ndarray, scale: np.ndarray | np.float32) -> np.ndarray:
    """code * scale in float32, rounded once."""
    return np.asarray(np.asarray(code, np.float32) * np.asarray(scale, np.float32))


def int8_quantize(
    x: np.ndarray, *, axis: int | None, group: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """x -> (codes int8 of its shape, scale float32), scale = absmax / 127 over what shares it.

    axis=None: the tensor has one scale, of shape []. Otherwise `axis` is the one that is scaled as
    a whole and missing from the scale's shape: for x [M, K], axis=-1 gives each row a scale [M],
    axis=0 each column a scale [K]. With a group, that many neighbours along the axis share a scale,
    and the axis stays, shorter: axis=-1, group=32 gives [M, K / 32].

    All zeros, or a scale too small for float32: scale 1, codes 0. A NaN or an infinity: the scale
    is NaN or infinity and the codes 0, so that what shares it decodes to NaN.

    Raises TypeError unless x is float32, float16 or bfloat16; ValueError for an axis x does not
    have, a group without an axis, or one that does not divide it.
    """
    values, shared = _grouped(arguments.lifted(x), axis, group)
    scale = np.max(np.abs(values), axis=shared, keepdims=True, initial=0) / np.float32(127)
    scale = np.where(scale == 0, np.float32(1), scale)
    code = int8_encode(values, scale).reshape(np.shape(x))
    return code, np.asarray(np.squeeze(scale, shared))


def int8_dequantize(
    code: np.ndarray, scale: np.ndarray, *, axis: int | None, group: int | None = None
) -> np.ndarray:
    """The values, float32, of int8_quantize's codes and scale, given the same axis and group.

    Raises TypeError unless code is int8 and scale float32, ValueError for a scale of another shape.
    """
    code = arguments.dtype(code, np.int8, "code")
    values, shared = _grouped(code, axis, group)
    scale = arguments.dtype(scale, np.float32, "scale")
    arguments.shape(scale, _without(values.shape, shared), "scale")
    wide = scale if shared is None else np.expand_dims(scale, shared)
    with np.errstate(invalid="ignore"):
        return int8_decode(values, wide).reshape(code.shape)


def uint8_encode(
    x: np.ndarray, scale: np.ndarray | np.float32, zero: np.ndarray | int
) -> np.ndarray:
    """round(x / scale) + zero, ties to even, within 0 .. 255; NaN becomes `zero`.

    x float32, float16 or bfloat16, scale and zero broadcast against it -> uint8. A scale of 0
    counts as 1. Raises TypeError for an x of another dtype.
    """
    zero = np.asarray(zero, np.int32)
    return np.asarray(_whole(x, scale, -zero, 255 - zero) + zero, np.uint8)


def uint8_decode(
    code: np.ndarray, scale: np.ndarray | np.float32, zero: np.ndarray | int
) -> np.ndarray:
    """(code - zero) * scale in float32, rounded once."""
    return int4_decode(code, scale, zero)


def uint8_quantize(
    x: np.ndarray, *, axis: int | None, group: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x -> (codes uint8 of its shape, scale float32, zero uint8), by the range of what shares them.

    lo = min(x, 0), hi = max(x, 0): scale = (hi - lo) / 255, zero = clip(rint(-lo / scale), 0, 255),
    so that 0 has a code of its own. axis, group and the shapes of scale and zero: as int8_quantize.

    All zeros, or a scale too small for float32: scale 1, codes and zero 0. A NaN, an infinity, or a
    range too large for float32: the scale is NaN or infinity and codes and zero are 0.

    Raises as int8_quantize does.
    """
    values, shared = _grouped(arguments.lifted(x), axis, group)
    lowest = np.min(values, axis=shared, keepdims=True, initial=0)
    with np.errstate(over="ignore", invalid="ignore"):
        span = np.max(values, axis=shared, keepdims=True, initial=0) - lowest
        scale = span / np.float32(255)
    scale = np.where(scale == 0, np.float32(1), scale)
    zero = _whole(-lowest, scale, 0, 255)
    code = uint8_encode(values, scale, zero).reshape(np.shape(x))
    zero = np.asarray(np.squeeze(zero, shared), np.uint8)
    return code, np.asarray(np.squeeze(scale, shared)), zero


def int4_encode(
    x: np.ndarray, scale: np.ndarray | np.float32, zero: np.ndarray | int = ZERO
) -> np.ndarray:
    """round(x / scale) + zero, ties to even, within 0 .. 15; NaN becomes `zero`.

    x float32, float16 or bfloat16, scale and zero broadcast against it -> uint8, not packed. A
    scale of 0 counts as 1. Raises TypeError for an x of another dtype.
    """
    zero = np.asarray(zero, np.int32)
    return np.asarray(_whole(x, scale, -zero, 15 - zero) + zero, np.uint8)


def int4_decode(
    code: np.ndarray, scale: np.ndarray | np.float32, zero: np.ndarray | int = ZERO
) -> np.ndarray:
    """(code - zero) * scale in float32, rounded once; code uint8, not packed."""
    steps = np.asarray(code, np.int32) - np.asarray(zero, np.int32)
    return np.asarray(steps.astype(np.float32) * np.asarray(scale, np.float32))


def int4_quantize(
    w: np.ndarray, *, group: int = 128, symmetric: bool = True, low_first: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """w [..., K] -> (packed uint8 [..., K / 2], scale [..., K / group], zero packed, or None).

    symmetric: scale = absmax / 7, and -8 is never used. Otherwise the range from lo = min(w, 0) to
    hi = max(w, 0) is covered by scale = (hi - lo) / 15 and zero = clip(rint(-lo / scale), 0, 15),
    packed by int4_pack_zeros. The scale has w's dtype and is rounded to it before codes are chosen,
    so that they fit the scale that is stored.

    All zeros, or a scale too small for its dtype: scale 1. A NaN, an infinity or a range too large
    for the scale's dtype: the scale is NaN or infinity and every code is the zero point (8, or 0
    where not symmetric), so that the group decodes to NaN.

    Raises TypeError unless w is float32, float16 or bfloat16; ValueError for an odd K or a group
    that does not divide it.
    """
    w = np.asarray(w)
    values, _ = _grouped(arguments.lifted(w, "w"), -1, group)
    arguments.multiple(w.shape[-1], 2, "w")
    if symmetric:
        span, steps = np.max(np.abs(values), axis=-1, initial=0), np.float32(7)
        lowest = None
    else:
        lowest = np.min(values, axis=-1, initial=0)
        with np.errstate(over="ignore", invalid="ignore"):
            span, steps = np.max(values, axis=-1, initial=0) - lowest, np.float32(15)
    with np.errstate(over="ignore"):
        scale = (span / steps).astype(w.dtype)
    scale = np.where(scale == 0, np.ones((), w.dtype), scale)
    wide = scale.astype(np.float32)
    zero = None if lowest is None else _whole(-lowest, wide, 0, 15)
    shift = ZERO if zero is None else zero[..., None]
    code = int4_encode(values, wide[..., None], shift).reshape(w.shape)
    packed = pack_nibbles(code, low_first=low_first)
    return packed, scale, None if zero is None else int4_pack_zeros(zero, low_first=low_first)


def int4_dequantize(
    packed: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray | None = None,
    *,
    group: int = 128,
    low_first: bool = True,
) -> np.ndarray:
    """The values [..., K] of int4_quantize's arrays, in scale's dtype, rounded once.

    Raises TypeError unless packed and zero are uint8 and scale is float32, float16 or bfloat16;
    ValueError for a group that does not divide K, or a scale or zero of another shape.
    """
    code = unpack_nibbles(packed, low_first=low_first)
    values, _ = _grouped(code, -1, group)
    arguments.shape(scale, values.shape[:-1], "scale")
    wide = arguments.lifted(scale, "scale")[..., None]
    shift = ZERO
    if zero is not None:
        count = values.shape[-2]
        shift = int4_unpack_zeros(zero, count, low_first=low_first)
        arguments.shape(shift, values.shape[:-1], "zero")
        shift = shift[..., None]
    with np.errstate(invalid="ignore"):
        return int4_decode(values, wide, shift).reshape(code.shape).astype(scale.dtype)


def int4_pack_zeros(zero: np.ndarray, *, low_first: bool = True) -> np.ndarray:
    """Zero points [..., groups] -> uint8 [..., 4 * ceil(groups / 8)], whole words filled with 8s.

    Raises TypeError unless zero holds whole numbers, ValueError for one outside 0 .. 15.
    """
    zero = arguments.codes(zero, 4, "zero")
    fill = [(0, 0)] * (zero.ndim - 1) + [(0, -zero.shape[-1] % 8)]
    return pack_nibbles(np.pad(zero, fill, constant_values=ZERO), low_first=low_first)


def int4_unpack_zeros(packed: np.ndarray, groups: int, *, low_first: bool = True) -> np.ndarray:
    """int4_pack_zeros' inverse: uint8 [..., 4 * ceil(groups / 8)] -> uint8 [..., groups].

    Raises TypeError unless packed is uint8, ValueError for another number of bytes.
    """
    packed = arguments.dtype(packed, np.uint8, "zero")
    arguments.shape(packed, (*packed.shape[:-1], 4 * -(-groups // 8)), "zero")
    return unpack_nibbles(packed, low_first=low_first)[..., :groups]


def pack_nibbles(code: np.ndarray, *, low_first: bool) -> np.ndarray:
    """Two 4-bit codes to a byte along the last axis: [..., 2n] -> uint8 [..., n].

    low_first: element 2j in the low nibble of byte j (int4, e2m1; GPTQ's little-endian words);
        otherwise in the high nibble (nf4 as bitsandbytes packs it).

    Raises TypeError unless code holds whole numbers, ValueError for an odd number of codes, or one
    outside 0 .. 15.
    """
    code = arguments.codes(code, 4)
    if code.shape[-1] % 2:
        raise ValueError(f"code: expected an even number of codes, got {code.shape[-1]}")
    low, high = (code[..., 0::2], code[..., 1::2])[:: 1 if low_first else -1]
    return low | high << 4


def unpack_nibbles(packed: np.ndarray, *, low_first: bool) -> np.ndarray:
    """The inverse of pack_nibbles: uint8 [..., n] -> uint8 [..., 2n]. TypeError unless uint8."""
    packed = arguments.dtype(packed, np.uint8, "packed")
    pair = (packed & 15, packed >> 4)[:: 1 if low_first else -1]
    return np.stack(pair, axis=-1).reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def _whole(x: np.ndarray, scale: np.ndarray | np.float32, low: Any, high: Any) -> np.ndarray:
    scale = np.asarray(scale, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        whole = np.rint(arguments.lifted(x) / np.where(scale == 0, np.float32(1), scale))
    return np.where(np.isnan(whole), 0, np.clip(whole, low, high)).astype(np.int32)


def _grouped(x: np.ndarray, axis: int | None, group: int | None) -> tuple[np.ndarray, int | None]:
    """x with its groups as an axis of their own, and the axis along which a scale is shared."""
    if axis is None:
        if group is not None:
            raise ValueError("group: expected an axis to go with it")
        return x, None
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis: expected one of {x.ndim} dimensions, got {axis}")
    axis %= x.ndim
    if group is None:
        return x, axis
    count = arguments.multiple(x.shape[axis], group, "group")
    return x.reshape(*x.shape[:axis], count, group, *x.shape[axis + 1 :]), axis + 1


def _without(shape: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    return () if axis is None else shape[:axis] + shape[axis + 1 :]
