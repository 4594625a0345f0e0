"""Formats that choose scales: int8 and int4 by group, FP8 by 128, MX by 32.

What is expected is computed in float64, where a quotient or a product of two float32 numbers, then
rounded to float32, is the correctly rounded float32 result.
"""

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parity import formats
from parity.formats import E2M1, E4M3, E5M2, SmallFloat

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
low_firsts = pytest.mark.parametrize("low_first", [True, False])


def noise(*shape: int, dtype: type = np.float32, seed: int = 0) -> np.ndarray:
    """Normal, with a few outliers and one of each sign exactly zero."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * np.where(rng.random(shape) < 0.05, 20, 1)
    x.reshape(-1)[:2] = 0.0, -0.0
    return x.astype(dtype)


def f32(x: np.ndarray) -> np.ndarray:
    """float64 rounded to float32, and lifted again."""
    return np.asarray(x).astype(np.float32).astype(np.float64)


def moderate(shape: tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
    """Zeros, and values of any sign and mantissa from 2 ** -90 to 2 ** 90: no scale of theirs is
    subnormal or infinite."""

    def values(raw: bytes) -> np.ndarray:
        bits = np.frombuffer(raw, np.uint32).reshape(shape)
        exponent = np.int32(37) + (bits >> 23 & 0xFF).astype(np.int32) % 180
        magnitude = (exponent << 23).astype(np.uint32) | bits & 0x7FFFFF
        return np.where(bits >> 23 & 0xFF == 0, np.uint32(0), magnitude | bits & 1 << 31).view(
            np.float32
        )

    size = 4 * int(np.prod(shape))
    return st.binary(min_size=size, max_size=size).map(values)


# int8

INT8 = [  # axis, group, shape of what shares a scale, scale's shape
    (None, None, (6, 96), ()),
    (-1, None, (1, 96), (6,)),
    (1, None, (1, 96), (6,)),
    (0, None, (6, 1), (96,)),
    (-1, 32, (1, 32), (6, 3)),
    (1, 96, (1, 96), (6, 1)),
    (0, 2, (2, 1), (3, 96)),
    (0, 6, (6, 1), (1, 96)),
]


@pytest.mark.parametrize(("axis", "group", "block", "shape"), INT8)
@dtypes
def test_int8_rounds_as_exact_arithmetic_does(axis, group, block, shape, dtype: type):
    x = noise(6, 96, dtype=dtype)
    code, scale = formats.int8_quantize(x, axis=axis, group=group)
    assert code.dtype == np.int8 and code.shape == (6, 96)
    assert scale.dtype == np.float32 and scale.shape == shape
    exact = x.astype(np.float64)
    largest = np.abs(exact).reshape(6 // block[0], block[0], 96 // block[1], block[1]).max((1, 3))
    np.testing.assert_array_equal(scale.ravel(), f32(largest / 127).ravel())
    wide = np.kron(f32(largest / 127), np.ones(block))
    np.testing.assert_array_equal(code, np.rint(f32(exact / wide)))
    back = formats.int8_dequantize(code, scale, axis=axis, group=group)
    np.testing.assert_array_equal(back, f32(code * wide))


def test_every_int8_code_at_every_scale():
    codes = np.arange(-127, 128, dtype=np.int8)
    scales = np.ldexp(np.float32(1), np.arange(-126, 121)).astype(np.float32)
    code, scale = formats.int8_quantize(codes * scales[:, None], axis=-1)
    np.testing.assert_array_equal(scale, scales)
    np.testing.assert_array_equal(code, np.broadcast_to(codes, code.shape))


def test_a_tie_is_decided_by_a_division():
    # (k + 1/2) * scale, exactly, for scales whose reciprocals are not exact
    scale = np.arange(3, 200, 2, dtype=np.float32)[:, None]
    half = np.arange(127, dtype=np.float32) + np.float32(0.5)
    np.testing.assert_array_equal(
        formats.int8_encode(half * scale, scale), np.broadcast_to(np.rint(half), (99, 127))
    )
    by_reciprocal = np.rint(half * scale * (np.float32(1) / scale))
    assert (by_reciprocal != np.rint(half)).any()  # what the line above would not forgive


@given(x=moderate((4, 24)), group=st.sampled_from([None, 1, 2, 8, 24]))
def test_int8_errs_by_half_a_step(x: np.ndarray, group: int | None):
    code, scale = formats.int8_quantize(x, axis=-1, group=group)
    back = formats.int8_dequantize(code, scale, axis=-1, group=group).astype(np.float64)
    step = np.repeat(scale.reshape(4, -1), group or 24, axis=1).astype(np.float64)
    assert (np.abs(back - x) <= step * (0.5 + 127 * 2.0**-23)).all()  # quotient, product rounded


def test_int8_groups_of_zeros_and_of_what_is_not_finite():
    x = noise(5, 8)
    x[1], x[2, 3], x[3, 3] = 0, np.nan, -np.inf
    x[4] = 1e-45
    code, scale = formats.int8_quantize(x, axis=-1)
    np.testing.assert_array_equal(scale[1:], np.float32([1, np.nan, np.inf, 1]))
    assert (code[1:] == 0).all() and code[0].any()
    back = formats.int8_dequantize(code, scale, axis=-1)
    assert np.isnan(back[2:4]).all() and (back[[1, 4]] == 0).all()
    assert formats.int8_quantize(np.zeros((3, 0), np.float32), axis=-1)[1].tolist() == [1, 1, 1]


# uint8


def test_every_uint8_code_with_every_zero_point():
    zero = np.arange(256, dtype=np.int64)
    code = np.broadcast_to(np.arange(256, dtype=np.uint8), (256, 256))
    for scale in np.float32([2.0**-30, 0.25, 1, 3, 2.0**60]):
        x = (code - zero[:, None]).astype(np.float32) * scale
        found, scales, zeros = formats.uint8_quantize(x, axis=-1)
        np.testing.assert_array_equal(found, code)
        np.testing.assert_array_equal(scales, np.full(256, scale))
        np.testing.assert_array_equal(zeros, zero)
        np.testing.assert_array_equal(formats.uint8_decode(found, scale, zeros[:, None]), x)


@given(x=moderate((4, 24)), group=st.sampled_from([None, 1, 8, 24]))
def test_uint8_errs_by_half_a_step_and_keeps_zero(x: np.ndarray, group: int | None):
    x[:, ::5] = 0
    code, scale, zero = formats.uint8_quantize(x, axis=-1, group=group)
    step, shift = (np.repeat(v.reshape(4, -1), group or 24, axis=1) for v in (scale, zero))
    back = formats.uint8_decode(code, step, shift).astype(np.float64)
    assert (back[x == 0] == 0).all()
    # both ends of the range may fall between two codes: then one of them is clipped by half a step
    assert (np.abs(back - x) <= step.astype(np.float64) * (1 + 255 * 2.0**-22)).all()
    inside = (code > 0) & (code < 255)
    assert (np.abs(back - x)[inside] <= step[inside] * (0.5 + 255 * 2.0**-22)).all()


def test_uint8_clips_where_both_ends_are_ties():
    code, scale, zero = formats.uint8_quantize(np.float32([-127.5, 127.5]), axis=None)
    assert (scale, zero, code.tolist()) == (1, 128, [0, 255])  # 128 + 128 has no code


def test_uint8_groups_of_zeros_and_of_what_is_not_finite():
    x = noise(5, 8)
    x[1], x[2, 3], x[3, 3], x[4] = 0, np.nan, np.inf, 3
    code, scale, zero = formats.uint8_quantize(x, axis=-1)
    np.testing.assert_array_equal(scale[1:], np.float32([1, np.nan, np.inf, 3 / 255]))
    assert (zero[1:] == 0).all() and (code[1:4] == 0).all() and (code[4] == 255).all()
    assert formats.uint8_quantize(np.zeros((3, 0), np.float32), axis=-1)[1].tolist() == [1, 1, 1]


# int4


@low_firsts
@dtypes
def test_every_int4_code_with_every_zero_point_and_scale(low_first: bool, dtype: type):
    zero = np.repeat(np.arange(16), 16)
    scale = np.ldexp(1.0, np.tile(np.arange(-10, 6), 16))
    code = np.tile(np.arange(16), (256, 2))
    w = ((code - zero[:, None]) * scale[:, None]).astype(dtype)
    packed, s, z = formats.int4_quantize(w, group=32, symmetric=False, low_first=low_first)
    assert packed.shape == (256, 16) and s.dtype == w.dtype and s.shape == (256, 1)
    assert z is not None and z.shape == (256, 4)
    np.testing.assert_array_equal(s[:, 0].astype(np.float64), scale)
    np.testing.assert_array_equal(formats.int4_unpack_zeros(z, 1, low_first=low_first)[:, 0], zero)
    np.testing.assert_array_equal(formats.unpack_nibbles(packed, low_first=low_first), code)
    back = formats.int4_dequantize(packed, s, z, group=32, low_first=low_first)
    assert back.dtype == w.dtype
    np.testing.assert_array_equal(back, w)


@low_firsts
@dtypes
def test_every_symmetric_int4_code(low_first: bool, dtype: type):
    scale = np.ldexp(1.0, np.arange(-10, 6))
    code = np.tile(np.arange(1, 16), (16, 2))  # 8 - 8 is not used
    w = ((code - 8) * scale[:, None]).astype(dtype)
    packed, s, z = formats.int4_quantize(w, group=30, low_first=low_first)
    assert z is None
    np.testing.assert_array_equal(s[:, 0].astype(np.float64), scale)
    np.testing.assert_array_equal(formats.unpack_nibbles(packed, low_first=low_first), code)
    back = formats.int4_dequantize(packed, s, group=30, low_first=low_first)
    np.testing.assert_array_equal(back, w)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64, 128])
@dtypes
def test_int4_rounds_as_exact_arithmetic_does(symmetric: bool, group: int, dtype: type):
    w = noise(5, 384, dtype=dtype)
    packed, scale, zero = formats.int4_quantize(w, group=group, symmetric=symmetric)
    grouped = w.astype(np.float64).reshape(5, -1, group)
    low, high = np.minimum(grouped.min(-1), 0), np.maximum(grouped.max(-1), 0)
    span = np.maximum(-low, high) / 7 if symmetric else f32(high - low) / 15
    np.testing.assert_array_equal(scale, span.astype(np.float32).astype(dtype))
    step = scale.astype(np.float64)
    shift = np.full(step.shape, 8) if symmetric else np.clip(np.rint(f32(-low / step)), 0, 15)
    if zero is not None:
        assert zero.shape == (5, 4 * -(-384 // group // 8))
        unpacked = formats.unpack_nibbles(zero, low_first=True)
        np.testing.assert_array_equal(unpacked[:, : 384 // group], shift)
        assert (unpacked[:, 384 // group :] == 8).all()
    code = np.clip(np.rint(f32(grouped / step[..., None])) + shift[..., None], 0, 15)
    np.testing.assert_array_equal(
        formats.unpack_nibbles(packed, low_first=True), code.reshape(5, 384)
    )
    back = formats.int4_dequantize(packed, scale, zero, group=group)
    value = (code - shift[..., None]) * step[..., None]
    np.testing.assert_array_equal(back, value.reshape(5, 384).astype(np.float32).astype(dtype))


@given(
    w=moderate((3, 32)),
    group=st.sampled_from([2, 4, 16, 32]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([np.float32, ml_dtypes.bfloat16]),
)
def test_int4_errs_by_half_a_step(w: np.ndarray, group: int, symmetric: bool, dtype: type):
    w = w.astype(dtype)
    packed, scale, zero = formats.int4_quantize(w, group=group, symmetric=symmetric)
    shift = np.full(scale.shape, 8)
    if zero is not None:
        shift = formats.int4_unpack_zeros(zero, 32 // group)
    code = formats.unpack_nibbles(packed, low_first=True).reshape(3, -1, group)
    step = scale.astype(np.float64)[..., None]
    steps = code - shift[..., None].astype(np.float64)
    error = np.abs(w.astype(np.float64).reshape(code.shape) / step - steps)
    # a scale rounded down leaves the ends of the range that much outside it
    rounding = 15 * 2.0 ** (-23 if dtype is np.float32 else -8)
    assert (error <= 0.5 + rounding).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_groups_of_zeros_and_of_what_is_not_finite(symmetric: bool):
    w = noise(1, 96)
    w[0, 16:32], w[0, 33], w[0, 50], w[0, 66] = 0, np.nan, np.inf, -np.inf
    w[0, 80:] = np.float32([3e38, -3e38] * 8)  # their range is beyond float32
    packed, scale, zero = formats.int4_quantize(w, group=16, symmetric=symmetric)
    code = formats.unpack_nibbles(packed, low_first=True).reshape(6, 16)
    assert scale[0, 1] == 1 and (code[1] == (8 if symmetric else 0)).all()
    broken = slice(2, 5) if symmetric else slice(2, 6)
    assert not np.isfinite(scale[0, broken]).any() and np.isfinite(scale[0, :2]).all()
    assert (code[broken] == (8 if symmetric else 0)).all()
    back = formats.int4_dequantize(packed, scale, zero, group=16).reshape(6, 16)
    assert np.isnan(back[broken]).all() and (back[1] == 0).all() and np.isfinite(back[0]).all()


def test_an_int4_scale_too_large_for_its_dtype_breaks_its_group():
    w = np.zeros((2, 16), np.float16)
    w[0, :2] = 65504, -65504  # the scale, 8734, fits
    packed, scale, zero = formats.int4_quantize(w, group=16, symmetric=False)
    assert np.isfinite(scale).all()
    back = formats.int4_dequantize(packed, scale, zero, group=16)
    assert (back[1] == 0).all() and np.isfinite(back).all()


def test_an_int4_scale_below_its_dtypes_normal_range():
    # 21 / 15 of the smallest float16 rounds to it, and the zero point, 21, to 15.
    w = np.full((1, 16), -21 * 2.0**-24, np.float16)
    w[0, 0] = 0
    packed, scale, zero = formats.int4_quantize(w, group=16, symmetric=False)
    assert scale == 2.0**-24 and zero is not None and zero[0, 0] == 0x8F
    assert (formats.unpack_nibbles(packed, low_first=True) == [15] + [0] * 15).all()


# FP8


def fp8_expected(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The codes by ml_dtypes, which does not saturate; x and its scale of one shape."""
    with np.errstate(over="ignore", invalid="ignore"):
        product = f32(x.astype(np.float64) * f32(1 / scale.astype(np.float64)))
    return np.clip(product, -448, 448).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)


def tiled(scale: np.ndarray, shape: tuple[int, int], block: tuple[int, int]) -> np.ndarray:
    return np.kron(scale, np.ones(block))[: shape[0], : shape[1]].astype(np.float32)


FP8: list[tuple[Callable, tuple[int, int], tuple[int, int]]] = [
    (formats.fp8_quantize_rows, (5, 384), (1, 128)),
    (formats.fp8_quantize_cols, (256, 7), (128, 1)),
    (formats.fp8_quantize_blocks, (256, 384), (128, 128)),
    (formats.fp8_quantize_blocks, (200, 130), (128, 128)),
    (formats.fp8_quantize_blocks, (3, 5), (128, 128)),
]
fp8_shapes = pytest.mark.parametrize(("quantize", "shape", "block"), FP8)


@fp8_shapes
@dtypes
@pytest.mark.parametrize("ue8m0", [False, True])
def test_fp8_is_deepgemms_arithmetic(quantize: Callable, shape, block, dtype: type, ue8m0: bool):
    x = noise(*shape, dtype=dtype)
    code, scale = quantize(x, ue8m0=ue8m0)
    assert code.dtype == np.uint8 and code.shape == shape and scale.dtype == np.float32
    count = tuple(-(-size // step) for size, step in zip(shape, block, strict=True))
    assert scale.shape == count
    for i, j in np.ndindex(count):
        rows, cols = (slice(k * b, (k + 1) * b) for k, b in zip((i, j), block, strict=True))
        largest = np.abs(x[rows, cols].astype(np.float64)).max()
        expected = f32(np.maximum(largest, f32(np.array(1e-4))) / 448)
        if ue8m0:
            expected = 2.0 ** np.ceil(np.log2(expected))
        assert scale[i, j] == expected
    wide = tiled(scale, shape, block)
    np.testing.assert_array_equal(code, fp8_expected(x, wide).view(np.uint8))
    back = formats.fp8_dequantize(code, scale)
    np.testing.assert_array_equal(back, f32(E4M3.decode(code).astype(np.float64) * wide))


def test_fp8_columns_are_rows_of_the_transpose_and_blocks_transpose_too():
    x = noise(128, 256)
    code, scale = formats.fp8_quantize_cols(x)
    other, other_scale = formats.fp8_quantize_rows(np.ascontiguousarray(x.T))
    np.testing.assert_array_equal(code, other.T)
    np.testing.assert_array_equal(scale, other_scale.T)
    code, scale = formats.fp8_quantize_blocks(x)
    other, other_scale = formats.fp8_quantize_blocks(np.ascontiguousarray(x.T))
    np.testing.assert_array_equal(code, other.T)
    np.testing.assert_array_equal(scale, other_scale.T)


def test_every_fp8_code_survives_at_every_power_of_two():
    finite = np.delete(np.arange(256, dtype=np.uint8), [0x7F, 0xFF])
    block = np.concatenate([finite, [0x7E, 0xFE]]).reshape(2, 128)  # 448 in both
    block[:, -1] = 0x7E
    scales = np.ldexp(np.float32(1), np.arange(-22, 100)).astype(np.float32)
    x = (E4M3.decode(block) * scales[:, None, None]).reshape(-1, 128)
    code, scale = formats.fp8_quantize_rows(x)
    np.testing.assert_array_equal(scale[:, 0], np.repeat(scales, 2))
    np.testing.assert_array_equal(code, np.tile(block, (len(scales), 1)))


@given(x=moderate((2, 128)), ue8m0=st.booleans())
def test_fp8_errs_by_a_sixteenth_or_half_its_smallest_step(x: np.ndarray, ue8m0: bool):
    code, scale = formats.fp8_quantize_rows(x, ue8m0=ue8m0)
    back = formats.fp8_dequantize(code, scale).astype(np.float64)
    exact = np.abs(x.astype(np.float64))
    bound = np.maximum(exact / 16, scale.astype(np.float64) * 2.0**-10)
    assert (np.abs(back - x) <= bound * (1 + 2.0**-18)).all()
    assert (np.signbit(back) == np.signbit(x)).all()


def test_fp8_blocks_of_zeros_and_of_what_is_not_finite():
    x = noise(4, 128)
    x[1], x[2, 5], x[3, 5] = 0, -np.nan, -np.inf
    code, scale = formats.fp8_quantize_rows(x)
    np.testing.assert_array_equal(
        scale[1:, 0], [np.float32(1e-4) / np.float32(448), np.nan, np.inf]
    )
    assert (code[1] == 0).all() and (code[2] == 0x7F).all() and code[3, 5] == 0x7F
    rest = np.delete(np.arange(128), 5)
    np.testing.assert_array_equal(code[3, rest], np.where(np.signbit(x[3, rest]), 0x80, 0))
    back = formats.fp8_dequantize(code, scale)
    assert np.isnan(back[2:]).all() and (back[1] == 0).all() and np.isfinite(back[0]).all()
    nan = formats.fp8_quantize_rows(x[2:], ue8m0=True)
    assert np.isnan(nan[1]).all() and np.isnan(formats.fp8_dequantize(*nan)).all()


# MX

ELEMENTS = {fmt.name: fmt for fmt in (E4M3, E5M2, E2M1)}
mx_formats = pytest.mark.parametrize("fmt", ELEMENTS)
scale_modes = pytest.mark.parametrize("mode", ["floor", "rceil", "even"])


def mx_exponent(m: float, fmt: SmallFloat, mode: str) -> int:
    """e by the definition of its mode, m > 0: powers of two and comparisons, all exact."""
    emax = int(np.frexp(fmt.largest)[1]) - 1
    if mode == "rceil":
        e = int(np.frexp(m)[1]) - 1 - emax
        return next(k for k in (e - 1, e, e + 1) if m <= np.ldexp(fmt.largest, k))
    if mode == "even":
        fraction, exponent = np.frexp(m)  # m = fraction * 2 ** exponent, 0.5 <= fraction < 1
        steps = 2.0 ** (fmt.mantissa_bits + 1)
        m = float(np.ldexp(np.rint(fraction * steps) / steps, exponent))
    return int(np.frexp(m)[1]) - 1 - emax


def turning_magnitudes() -> np.ndarray:
    """Positive floats of every exponent, at and beside every mantissa of up to five bits."""
    fraction = np.arange(33)[:, None] * 2**18 + np.arange(-1, 2)
    fraction = np.unique(np.clip(fraction, 0, 2**23 - 1)).astype(np.uint32)
    exponent = np.arange(255, dtype=np.uint32)[:, None] << np.uint32(23)
    return (exponent | fraction).view(np.float32).ravel()[1:]  # not zero


@mx_formats
@scale_modes
def test_mx_scales_follow_their_definition(fmt: str, mode: str):
    m = turning_magnitudes()[:: 1 if fmt == "e4m3" else 5]
    expected = [np.clip(mx_exponent(v, ELEMENTS[fmt], mode), -127, 127) + 127 for v in m.tolist()]
    np.testing.assert_array_equal(formats.mx_scale(m, fmt, scale_mode=mode), expected)
    odd = np.float32([0, np.inf, np.nan])
    np.testing.assert_array_equal(formats.mx_scale(odd, fmt, scale_mode=mode), [0, 255, 255])


@mx_formats
def test_the_float32_quotient_gives_the_same_rceil(fmt: str):
    m = np.arange(1 << 23, (1 << 24) + 1, 3, dtype=np.float32)
    quotient = m / np.float32(ELEMENTS[fmt].largest)
    expected = formats.e8m0_encode(quotient, rounding="ceil")
    np.testing.assert_array_equal(formats.mx_scale(m, fmt, scale_mode="rceil"), expected)


def elements(code: np.ndarray, fmt: str) -> np.ndarray:
    return formats.unpack_nibbles(code, low_first=True) if fmt == "e2m1" else code


@mx_formats
@scale_modes
@dtypes
def test_mx_elements_are_the_nearest_to_what_the_scale_leaves(fmt: str, mode: str, dtype: type):
    element, x = ELEMENTS[fmt], noise(7, 96, dtype=dtype)
    code, scale = formats.mx_quantize(x, fmt, scale_mode=mode)
    assert code.dtype == np.uint8 and scale.dtype == np.uint8 and scale.shape == (7, 3)
    assert code.shape == (7, 48 if fmt == "e2m1" else 96)
    largest = np.abs(x.astype(np.float32)).reshape(7, 3, 32).max(-1)
    np.testing.assert_array_equal(scale, formats.mx_scale(largest, fmt, scale_mode=mode))
    wide = np.repeat(2.0 ** (scale.astype(np.float64) - 127), 32, axis=1)
    ratio = x.astype(np.float64) / wide
    assert np.abs(ratio).max() < 2 ** np.ceil(np.log2(element.largest))
    ours = elements(code, fmt)
    np.testing.assert_array_equal(element.decode(ours), formats_nearest(element, ratio))
    np.testing.assert_array_equal(np.signbit(element.decode(ours)), np.signbit(ratio))
    back = formats.mx_dequantize(code, scale, fmt)
    np.testing.assert_array_equal(back, element.decode(ours) * wide)


def formats_nearest(fmt: SmallFloat, x: np.ndarray) -> np.ndarray:
    """The nearest value, ties to the even code, magnitudes beyond the largest to it."""
    values = fmt.values[: fmt.largest_code + 1].astype(np.float64)
    distance = np.abs(np.abs(x)[..., None] - values)
    near = distance == distance.min(-1, keepdims=True)
    even = near & (np.arange(values.size) % 2 == 0)
    code = np.where(even.any(-1), even.argmax(-1), near.argmax(-1))
    return np.copysign(values[code], x)


@mx_formats
@scale_modes
def test_every_mx_code_at_every_scale(fmt: str, mode: str):
    element = ELEMENTS[fmt]
    finite = np.flatnonzero(np.isfinite(element.values)).astype(np.uint8)
    code = np.resize(finite, (-(-finite.size // 31), 31))
    code = np.insert(code, 31, element.largest_code, axis=1)  # which fixes the block's scale
    # up to the largest scale at which float32 still holds the largest element
    scales = np.arange(256 - int(np.frexp(element.largest)[1]), dtype=np.uint8)
    packed = formats.pack_nibbles(code, low_first=True) if fmt == "e2m1" else code
    packed = np.tile(packed.reshape(1, -1), (scales.size, 1))
    wide = np.repeat(scales[:, None], len(code), axis=1)
    values = formats.mx_dequantize(packed, wide, fmt)
    exact = element.decode(code).astype(np.float64).ravel() * 2.0 ** (scales[:, None] - 127.0)
    np.testing.assert_array_equal(values, exact)
    again, scale = formats.mx_quantize(values, fmt, scale_mode=mode)
    np.testing.assert_array_equal(scale, wide)
    np.testing.assert_array_equal(again, packed)


@mx_formats
@given(x=moderate((2, 32)))
def test_with_rceil_no_element_saturates(fmt: str, x: np.ndarray):
    scale = formats.mx_quantize(x, fmt, scale_mode="rceil")[1].astype(np.float64)
    assert (np.abs(x) <= ELEMENTS[fmt].largest * 2.0 ** (scale - 127)).all()
    # and with a smaller scale one would
    largest = np.abs(x).max(axis=1, keepdims=True)
    low = (scale == 0) | (largest > ELEMENTS[fmt].largest * 2.0 ** (scale - 128))
    assert low.all()


def test_the_modes_differ_where_they_should():
    x = np.zeros((4, 32), np.float32)
    x[:, 0] = 448, 450, 464, 480  # in units of 256: 1.75, 1.758, 1.8125, 1.875
    x[3, 0] = 496  # 1.9375, from where a mantissa of three bits rounds to 2
    modes = {m: formats.mx_quantize(x, "e4m3", scale_mode=m) for m in ("floor", "rceil", "even")}
    exponent = {m: scale[:, 0].astype(int) - 127 for m, (_, scale) in modes.items()}
    np.testing.assert_array_equal(exponent["floor"], [0, 0, 0, 0])
    np.testing.assert_array_equal(exponent["rceil"], [0, 1, 1, 1])
    np.testing.assert_array_equal(exponent["even"], [0, 0, 0, 1])
    floor = formats.mx_dequantize(*modes["floor"], "e4m3")
    np.testing.assert_array_equal(floor[:, 0], 448)  # saturated


def test_mxfp4_by_hand():
    # Ties to even: 0.75 -> 1 and 3.5 -> 4, where others send them down. Even k in low nibbles.
    x = np.zeros(32, np.float32)
    x[:8] = 0.5, -6, 0.75, 1.25, 3.5, 2.5, 5, -0.0
    code, scale = formats.mx_quantize(x, "e2m1")
    np.testing.assert_array_equal(scale, [127])
    np.testing.assert_array_equal(code[:4], [0xF1, 0x22, 0x46, 0x86])
    back = formats.mx_dequantize(code, scale, "e2m1")
    np.testing.assert_array_equal(back[:8], [0.5, -6, 1, 1, 4, 2, 4, -0.0])


@mx_formats
def test_mx_blocks_of_zeros_and_of_what_is_not_finite(fmt: str):
    x = noise(1, 160)
    x[0, 32:64], x[0, 70], x[0, 100] = 0, np.nan, np.inf
    x[0, 128:] = 1e-45
    code, scale = formats.mx_quantize(x, fmt)
    np.testing.assert_array_equal(scale[0, 1:], [0, 255, 255, 0])
    code = elements(code, fmt).reshape(5, 32)
    assert (code[1:] == 0).all() and code[0].any()
    packed = formats.mx_quantize(x, fmt)[0]
    back = formats.mx_dequantize(packed, scale, fmt).reshape(5, 32)
    assert np.isnan(back[2:4]).all() and (back[[1, 4]] == 0).all() and np.isfinite(back[0]).all()


def test_mx_values_beyond_float32_are_infinite():
    code = np.full(32, E4M3.largest_code, np.uint8)
    values = formats.mx_dequantize(code, np.array([254], np.uint8), "e4m3")
    assert np.isposinf(values).all()


# bad arguments

X = np.ones((4, 96), np.float32)
WIDE = np.ones((4, 256), np.float32)
PACKED, SCALE, ZERO = formats.int4_quantize(X, group=32, symmetric=False)
MX_CODE, MX_SCALE = formats.mx_quantize(X, "e4m3")

BAD: dict[str, tuple[type[Exception], Callable]] = {
    "x: expected float32, float16 or bfloat16, got float64": (
        TypeError,
        lambda: formats.int8_quantize(X.astype(np.float64), axis=0),
    ),
    "x: expected float32, float16 or bfloat16, got int64": (
        TypeError,
        lambda: formats.int8_encode(np.arange(3), np.float32(1)),
    ),
    "axis: expected one of 2 dimensions, got 2": (
        ValueError,
        lambda: formats.int8_quantize(X, axis=2),
    ),
    "axis: expected one of 2 dimensions, got -3": (
        ValueError,
        lambda: formats.int8_quantize(X, axis=-3),
    ),
    "group: expected an axis": (
        ValueError,
        lambda: formats.int8_quantize(X, axis=None, group=8),
    ),
    "group: expected 36 to divide 96": (
        ValueError,
        lambda: formats.int8_quantize(X, axis=1, group=36),
    ),
    "group: expected 0 to divide 96": (
        ValueError,
        lambda: formats.int8_quantize(X, axis=1, group=0),
    ),
    r"scale: expected the shape \[4\], got \[96\]": (
        ValueError,
        lambda: formats.int8_dequantize(X.astype(np.int8), X[0], axis=1),
    ),
    "code: expected int8, got float32": (
        TypeError,
        lambda: formats.int8_dequantize(X, X[:, 0], axis=1),
    ),
    "scale: expected float32, got float64": (
        TypeError,
        lambda: formats.int8_dequantize(X.astype(np.int8), np.ones(4), axis=1),
    ),
    "w: expected float32, float16 or bfloat16, got float64": (
        TypeError,
        lambda: formats.int4_quantize(X.astype(np.float64), group=32),
    ),
    "group: expected 128 to divide 96": (ValueError, lambda: formats.int4_quantize(X)),
    "w: expected 2 to divide 3": (
        ValueError,
        lambda: formats.int4_quantize(X[:, :3], group=3),
    ),
    r"scale: expected the shape \[4, 2\], got \[4, 3\]": (
        ValueError,
        lambda: formats.int4_dequantize(PACKED, SCALE, ZERO, group=48),
    ),
    r"zero: expected the shape \[4, 3\], got \[2, 3\]": (
        ValueError,
        lambda: formats.int4_dequantize(PACKED, SCALE, ZERO[:2], group=32),  # pyright: ignore
    ),
    r"zero: expected the shape \[4, 4\], got \[4, 3\]": (
        ValueError,
        lambda: formats.int4_dequantize(PACKED, SCALE, ZERO[:, :3], group=32),  # pyright: ignore
    ),
    "packed: expected uint8, got int8": (
        TypeError,
        lambda: formats.int4_dequantize(PACKED.view(np.int8), SCALE, ZERO, group=32),
    ),
    "zero: expected uint8, got int64": (
        TypeError,
        lambda: formats.int4_dequantize(PACKED, SCALE, np.ones((4, 3), np.int64), group=32),
    ),
    "zero: expected codes of 4 bits, got 16": (
        ValueError,
        lambda: formats.int4_pack_zeros(np.full((4, 3), 16)),
    ),
    "x: expected 128 to divide 96": (ValueError, lambda: formats.fp8_quantize_rows(X)),
    "x: expected 128 to divide 4": (ValueError, lambda: formats.fp8_quantize_cols(WIDE)),
    "w: expected 2 dimensions": (ValueError, lambda: formats.fp8_quantize_blocks(WIDE[0])),
    "scale: expected 256 or 2 along dimension 1": (
        ValueError,
        lambda: formats.fp8_dequantize(WIDE.astype(np.uint8), X[:, :3]),
    ),
    "code: expected uint8, got float32": (
        TypeError,
        lambda: formats.fp8_dequantize(WIDE, X[:, :2]),
    ),
    "fmt: expected one of e4m3, e5m2, e2m1; got 'e3m4'": (
        ValueError,
        lambda: formats.mx_quantize(X, "e3m4"),
    ),
    "scale_mode: expected one of floor, rceil, even; got 'ceil'": (
        ValueError,
        lambda: formats.mx_quantize(X, "e4m3", scale_mode="ceil"),
    ),
    "x: expected 32 to divide 80": (
        ValueError,
        lambda: formats.mx_quantize(X[:, :80], "e4m3"),
    ),
    r"scale: expected the shape \[4, 3\], got \[4, 2\]": (
        ValueError,
        lambda: formats.mx_dequantize(MX_CODE, MX_SCALE[:, :2], "e4m3"),
    ),
    "scale: expected uint8, got float32": (
        TypeError,
        lambda: formats.mx_dequantize(MX_CODE, X[:, :3], "e4m3"),
    ),
    "code: expected uint8, got int16": (
        TypeError,
        lambda: formats.mx_dequantize(MX_CODE.astype(np.int16), MX_SCALE, "e4m3"),
    ),
    "absmax: expected float32, float16 or bfloat16, got float64": (
        TypeError,
        lambda: formats.mx_scale(np.ones(3), "e4m3"),
    ),
    "rounding: expected one of nearest, floor, ceil; got 'up'": (
        ValueError,
        lambda: formats.e8m0_encode(X, rounding="up"),
    ),
    "code: expected codes of 8 bits, got 256": (
        ValueError,
        lambda: formats.e8m0_decode(np.array([256])),
    ),
    "code: expected codes of 4 bits, got 31": (
        ValueError,
        lambda: E2M1.decode(np.array([31])),
    ),
    "code: expected whole numbers, got float32": (TypeError, lambda: E4M3.decode(X)),
}


@pytest.mark.parametrize("says", BAD)
def test_bad_arguments_are_named(says: str):
    error, call = BAD[says]
    with pytest.raises(error, match=says):
        call()
