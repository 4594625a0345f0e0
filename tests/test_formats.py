"""Number formats against ml_dtypes and exact arithmetic: every code, and floats of every kind."""

from statistics import NormalDist

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from parity import formats
from parity.formats import E2M1, E4M3, E5M2, NF4, NF4_THRESHOLDS, SmallFloat

THEIRS = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
SMALL_FLOATS = [E4M3, E5M2, E2M1]
small_floats = pytest.mark.parametrize("fmt", SMALL_FLOATS, ids=lambda f: f.name)

# any bits are a float: NaNs with their payloads, infinities, subnormals
floats = st.binary(max_size=512).map(lambda raw: np.frombuffer(raw[: len(raw) & ~3], np.float32))
# near the formats' own range, where roundings differ
near = hnp.arrays(np.float32, 64, elements=st.floats(-1000, 1000, width=32))


def every_kind_of_float() -> np.ndarray:
    """Floats of every exponent and both signs with the mantissas at which roundings turn."""
    mantissas = {0, 1, 0x7FFFFF}
    for bit in range(18, 23):
        mantissas |= {(k << bit) + d for k in range(1, 1 << (23 - bit)) for d in (-1, 0, 1)}
    exponents = np.arange(512, dtype=np.uint32)[:, None] << np.uint32(23)
    return (exponents | np.array(sorted(mantissas), np.uint32)).view(np.float32).ravel()


def theirs(fmt: SmallFloat, x: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        return x.astype(THEIRS[fmt.name]).view(np.uint8)


def assert_codes(fmt: SmallFloat, x: np.ndarray) -> None:
    code = fmt.encode(x, saturate=fmt is E2M1)
    # ml_dtypes turns NaN into -0 in a format that has none
    there = np.where(np.isnan(x), fmt.nan_code, theirs(fmt, x)) if fmt is E2M1 else theirs(fmt, x)
    np.testing.assert_array_equal(code, there)


@small_floats
def test_every_code_means_what_ml_dtypes_says(fmt: SmallFloat):
    codes = np.arange(1 << fmt.bits, dtype=np.uint8)
    values = fmt.decode(codes)
    there = codes.view(THEIRS[fmt.name]).astype(np.float32)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, there)
    np.testing.assert_array_equal(np.signbit(values), np.signbit(there))


@small_floats
def test_every_code_survives_a_round_trip(fmt: SmallFloat):
    codes = np.arange(1 << fmt.bits, dtype=np.uint8)
    values = fmt.decode(codes)
    kept = ~np.isnan(values)
    saturate = fmt is E2M1
    np.testing.assert_array_equal(fmt.encode(values, saturate=saturate)[kept], codes[kept])
    again = fmt.decode(fmt.encode(values, saturate=saturate))
    assert np.isnan(again[~kept]).all()


@small_floats
def test_encoding_agrees_with_ml_dtypes_on_every_kind_of_float(fmt: SmallFloat):
    assert_codes(fmt, every_kind_of_float())


@small_floats
@given(x=floats)
def test_encoding_agrees_with_ml_dtypes_on_any_float(fmt: SmallFloat, x: np.ndarray):
    assert_codes(fmt, x)


@small_floats
@given(x=near)
def test_encoding_picks_the_nearest_value(fmt: SmallFloat, x: np.ndarray):
    values = fmt.values[: fmt.largest_code + 1].astype(np.float64)
    distance = np.abs(np.abs(x.astype(np.float64))[:, None] - values).min(axis=1)
    got = fmt.decode(fmt.encode(x)).astype(np.float64)
    np.testing.assert_array_equal(np.abs(x - got), distance)


@small_floats
def test_a_tie_goes_to_the_even_code(fmt: SmallFloat):
    values = fmt.values[: fmt.largest_code + 1].astype(np.float64)
    middle = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    assert (fmt.encode(middle) % 2 == 0).all()
    up = fmt.encode(np.nextafter(middle, np.float32(np.inf)))
    np.testing.assert_array_equal(up, np.arange(1, fmt.largest_code + 1))


@small_floats
def test_saturation_keeps_the_sign_and_nan(fmt: SmallFloat):
    big = np.array([fmt.largest * 1.5, np.inf, -np.inf, 3e38], np.float32)
    expected = np.copysign(np.float32(fmt.largest), big)
    np.testing.assert_array_equal(fmt.decode(fmt.encode(big)), expected)
    nan = fmt.decode(fmt.encode(np.array([np.nan], np.float32)))
    assert nan[0] == 6 if fmt is E2M1 else np.isnan(nan[0])


def test_without_saturation_overflow_shows():
    big = np.array([465, 1e9, -np.inf], np.float32)  # 464 is a tie, and 448 is even
    assert np.isnan(E4M3.decode(E4M3.encode(big, saturate=False))).all()
    assert E4M3.decode(E4M3.encode(np.array(464, np.float32), saturate=False)) == 448
    big = np.array([61440, -1e9, np.inf], np.float32)  # a tie: infinity is even
    np.testing.assert_array_equal(
        E5M2.decode(E5M2.encode(big, saturate=False)), [np.inf, -np.inf, np.inf]
    )
    with pytest.raises(ValueError, match="saturate"):
        E2M1.encode(big, saturate=False)


@small_floats
def test_only_float32_is_rounded(fmt: SmallFloat):
    with pytest.raises(TypeError, match="x: expected float32"):
        fmt.encode(np.ones(3))


# e8m0


def power_of_two(x: np.ndarray, rounding: str) -> np.ndarray:
    """The code by exact arithmetic in float64."""
    codes = np.zeros(x.shape, np.uint8)
    for i, v in enumerate(x.tolist()):
        if not np.isfinite(v) or v < 0:
            codes[i] = 255
            continue
        below = max(-127, int(np.frexp(v)[1]) - 1) if v else -127
        low, high = 2.0**below, 2.0 ** (below + 1)
        up = {"floor": v >= high, "ceil": v > low, "nearest": v - low >= high - v}[rounding]
        codes[i] = min(127, below + up) + 127
    return codes


@pytest.mark.parametrize("rounding", ["nearest", "floor", "ceil"])
def test_e8m0_is_the_power_of_two_that_was_asked_for(rounding):
    x = every_kind_of_float()[::7]
    np.testing.assert_array_equal(
        formats.e8m0_encode(x, rounding=rounding), power_of_two(x, rounding)
    )


def test_e8m0_agrees_with_ml_dtypes_where_both_have_a_code():
    # Apart from that ml_dtypes gives NaN for zero and beyond 2 ** 127, and rounds float32's
    # subnormals away from the nearest power.
    x = every_kind_of_float()
    x = x[(x >= np.finfo(np.float32).tiny) & (x < 1.5 * 2.0**127)]
    there = x.astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)
    np.testing.assert_array_equal(formats.e8m0_encode(x), there)


def test_ml_dtypes_still_misses_the_nearest_power_below_floats_normal_range():
    # Once this fails, the test above need not leave out subnormals.
    x = np.array(2.0**-127 * 1.01, np.float32)
    assert x.astype(ml_dtypes.float8_e8m0fnu).view(np.uint8) == 1
    assert formats.e8m0_encode(x) == 0


def test_ml_dtypes_still_turns_nan_into_zero_where_there_is_no_nan():
    nan = np.array(np.nan, np.float32)
    with np.errstate(invalid="ignore"):
        assert float(nan.astype(ml_dtypes.float4_e2m1fn)) == 0
    assert E2M1.decode(E2M1.encode(nan)) == 6


def test_every_e8m0_code():
    codes = np.arange(256, dtype=np.uint8)
    values = formats.e8m0_decode(codes)
    there = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(values, there)
    for rounding in ("nearest", "floor", "ceil"):
        np.testing.assert_array_equal(formats.e8m0_encode(values, rounding=rounding), codes)


# floats of sixteen bits, and what is not an array of floats


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_every_half_precision_number_is_lifted_exactly(dtype: type):
    x = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    whole = x.astype(np.float32)
    for fmt in SMALL_FLOATS:
        np.testing.assert_array_equal(fmt.encode(x), fmt.encode(whole))
    np.testing.assert_array_equal(formats.e8m0_encode(x), formats.e8m0_encode(whole))
    one = np.float32(1)
    np.testing.assert_array_equal(formats.int8_encode(x, one), formats.int8_encode(whole, one))
    np.testing.assert_array_equal(formats.nf4_encode(x), formats.nf4_encode(whole))


def test_a_number_stays_a_number():
    x, one = np.array(0.75, np.float32), np.float32(1)
    encoded = [fmt.encode(x) for fmt in SMALL_FLOATS]
    encoded += [formats.e8m0_encode(x), formats.nf4_encode(x)]
    encoded += [formats.int8_encode(x, one), formats.int4_encode(x, one)]
    assert [c.shape for c in encoded] == [()] * 7
    decoded = [fmt.decode(c) for fmt, c in zip(SMALL_FLOATS, encoded[:3], strict=True)]
    decoded += [formats.e8m0_decode(encoded[3]), formats.nf4_decode(encoded[4])]
    decoded += [formats.int8_decode(encoded[5], one), formats.int4_decode(encoded[6], one)]
    assert [float(v) for v in decoded] == [0.75, 0.75, 1, 1, float(NF4[14]), 1, 1]
    assert [v.shape for v in decoded] == [()] * 7


# whole numbers


def test_int8_rounds_to_even_and_saturates():
    x = np.array([0.5, 1.5, -2.5, 126.5, 127.5, 1e9, -1e9, np.inf, -np.inf, np.nan], np.float32)
    expected = [0, 2, -2, 126, 127, 127, -127, 127, -127, 0]
    code = formats.int8_encode(x, np.float32(1))
    assert code.dtype == np.int8
    np.testing.assert_array_equal(code, expected)
    np.testing.assert_array_equal(formats.int8_encode(np.zeros(3, np.float32), np.float32(0)), 0)


@given(x=hnp.arrays(np.float32, (3, 16), elements=st.floats(-1e4, 1e4, width=32)))
def test_int8_is_within_half_a_step(x: np.ndarray):
    scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    back = formats.int8_decode(formats.int8_encode(x, scale), scale)
    assert (np.abs(x.astype(np.float64) - back) <= 0.5001 * scale + 1e-30).all()


def test_every_int4_code_with_every_zero_point():
    code = np.arange(16, dtype=np.uint8)
    for zero in range(16):
        values = formats.int4_decode(code, np.float32(0.25), zero)
        np.testing.assert_array_equal(values, (np.arange(16) - zero) / 4)
        np.testing.assert_array_equal(formats.int4_encode(values, np.float32(0.25), zero), code)
    outside = np.array([-1e9, 1e9, -np.inf, np.inf, np.nan, 2.5], np.float32)
    np.testing.assert_array_equal(
        formats.int4_encode(outside, np.float32(1)), [0, 15, 0, 15, 8, 10]
    )


@pytest.mark.parametrize("low_first", [True, False])
def test_every_pair_of_nibbles(low_first: bool):
    packed = np.arange(256, dtype=np.uint8).reshape(16, 16)
    codes = formats.unpack_nibbles(packed, low_first=low_first)
    assert codes.shape == (16, 32)
    np.testing.assert_array_equal(formats.pack_nibbles(codes, low_first=low_first), packed)


def test_nibble_orders_are_the_ones_of_their_formats():
    code = np.array([1, 2, 3, 4], np.uint8)
    np.testing.assert_array_equal(formats.pack_nibbles(code, low_first=True), [0x21, 0x43])
    np.testing.assert_array_equal(formats.pack_nibbles(code, low_first=False), [0x12, 0x34])
    # low first is what ml_dtypes' int4 and a little-endian int32 word mean
    word = formats.pack_nibbles(np.arange(8, dtype=np.uint8), low_first=True).view("<u4")
    assert word[0] == 0x76543210
    with pytest.raises(ValueError, match="even"):
        formats.pack_nibbles(code[:3], low_first=True)
    with pytest.raises(ValueError, match="4 bits"):
        formats.pack_nibbles(np.array([1, 16]), low_first=True)


# nf4


def test_nf4_is_the_codebook_of_normal_quantiles():
    # fp32, two-ended, one rounding an element: how torch.linspace spaces the probabilities
    end = float(np.float32(0.9677083))

    def linspace(n: int) -> np.ndarray:
        step = float(np.float32((np.float32(0.5) - np.float32(end)) / np.float32(n - 1)))
        i = np.arange(n)
        return np.where(i < n // 2, end + step * i, 0.5 - step * (n - 1 - i)).astype(np.float32)

    at = NormalDist().inv_cdf
    above, below = ([at(p) for p in linspace(n)[:-1].tolist()] for n in (9, 8))
    quantiles = np.sort(np.array([*above, 0, *(-q for q in below)], np.float32))
    np.testing.assert_array_equal(NF4, quantiles / quantiles.max())


def test_nf4_codes():
    np.testing.assert_array_equal(formats.nf4_encode(NF4), np.arange(16))
    np.testing.assert_array_equal(formats.nf4_decode(np.arange(16)), NF4)
    np.testing.assert_array_equal(formats.nf4_encode(NF4_THRESHOLDS), np.arange(15))  # ties: down
    above = np.nextafter(NF4_THRESHOLDS, np.float32(2))
    np.testing.assert_array_equal(formats.nf4_encode(above), np.arange(1, 16))
    outside = np.array([-5, 5, np.inf, -0.0, np.nan], np.float32)
    np.testing.assert_array_equal(formats.nf4_encode(outside), [0, 15, 15, 7, 0])


@given(x=hnp.arrays(np.float32, 32, elements=st.floats(-1, 1, width=32)))
def test_nf4_picks_the_nearest_value(x: np.ndarray):
    distance = np.abs(x[:, None].astype(np.float64) - NF4).min(axis=1)
    got = np.abs(x.astype(np.float64) - formats.nf4_decode(formats.nf4_encode(x)))
    np.testing.assert_allclose(got, distance, rtol=0, atol=1e-7)  # a midpoint is rounded to float32
