"""NF4 with double quantization: bitsandbytes' bytes, as recorded, and from itself if it is here."""

import hashlib
import importlib
import importlib.util
import warnings

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from parity import formats
from parity.formats import DYNAMIC_MAP, NF4, NF4_THRESHOLDS, Nf4State


def weights(n: int) -> np.ndarray:
    """Exact in any float format, with another absmax from block to block."""
    i = np.arange(n)
    return ((i * 37 % 101 - 50) * (1 + i // 64 % 7) / np.float32(16)).astype(np.float32)


def digest(x: np.ndarray) -> str:
    return hashlib.sha256(x.tobytes()).hexdigest()[:16]


def bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint32)


# What bitsandbytes 0.50.2 on a CPU (torch 2.11) makes of weights(n): offset, and digests of the
# packed codes and of the 8-bit absmax; absmax2 in full.
FACTS = {
    19213: (12.47882080078125, "492768d9fe0af9c3", "7727fba365223741", [9.416321, 9.396179]),
    320: (9.375, "415cf2a2fda205ae", None, [6.25]),
}


def test_the_map_is_bitsandbytes_map():
    assert digest(DYNAMIC_MAP) == "e732639a65f497b4"
    assert DYNAMIC_MAP.shape == (256,) and (np.diff(DYNAMIC_MAP) > 0).all()
    np.testing.assert_array_equal(DYNAMIC_MAP[[0, 127, 255]], np.float32([-0.99296874, 0, 1]))


@pytest.mark.parametrize("n", FACTS)
def test_the_bytes_are_those_recorded_from_bitsandbytes(n: int):
    offset, packed_digest, nested_digest, absmax2 = FACTS[n]
    packed, state = formats.nf4_quantize(weights(n))
    assert isinstance(state, Nf4State)
    assert packed.dtype == np.uint8 and digest(packed) == packed_digest
    assert state.offset.dtype == np.float32 and state.offset == offset
    np.testing.assert_array_equal(state.absmax2, np.float32(absmax2))
    if nested_digest:
        assert digest(state.qabsmax) == nested_digest


def test_by_hand():
    # Two blocks of 32: absmax 2 and 4; mean 3; -1 and 1 are both ends of the map but for -0.993.
    w = np.zeros(64, np.float32)
    w[[0, 1, 2, 32, 33]] = [2, -2, 1, -4, 0.1]
    packed, state = formats.nf4_quantize(w, blocksize=32)
    assert isinstance(state, Nf4State)
    np.testing.assert_array_equal(packed[:2], [0xF0, 0xC7])  # 1, -1; 0.5 -> 0.4407; 0
    np.testing.assert_array_equal(packed[16], 0x07)  # -1; 0.025 is next to 0
    np.testing.assert_array_equal(state.qabsmax, [0, 255])
    assert state.absmax2 == [1] and state.offset == 3
    absmax = formats.nf4_absmax(state)
    np.testing.assert_array_equal(absmax, [DYNAMIC_MAP[0] + np.float32(3), 4])
    back = formats.nf4_dequantize(packed, state, 64, blocksize=32)
    np.testing.assert_array_equal(back[[0, 1, 32]], [absmax[0], -absmax[0], -4])


def test_every_code_survives_in_every_place_of_a_byte():
    code = np.concatenate([np.arange(16), np.arange(16)[::-1], np.roll(np.arange(16), 1)])
    code = np.append(code, np.full(16, 15)).astype(np.uint8)
    for absmax in np.float32([1, 0.375, 2.0**-100, 2.0**100]):
        packed, state = formats.nf4_quantize(NF4[code] * absmax, double=False)
        np.testing.assert_array_equal(state, [absmax])
        np.testing.assert_array_equal(formats.unpack_nibbles(packed, low_first=False), code)
        np.testing.assert_array_equal(formats.nf4_dequantize(packed, state, 64), NF4[code] * absmax)


def test_every_8_bit_absmax_survives():
    # absmax = 2 + map, offset 2 and am2 1: what is stored is the map, in order.
    absmax = DYNAMIC_MAP.astype(np.float64) + 2
    w = np.repeat(absmax.astype(np.float32), 64)
    state = formats.nf4_quantize(w, offset=np.float32(2))[1]
    assert isinstance(state, Nf4State)
    # Below 2 ** -23 an absmax beside 2 cannot tell neighbours of the map apart.
    told = np.abs(DYNAMIC_MAP) > 2.0**-20
    np.testing.assert_array_equal(state.qabsmax[told], np.arange(256)[told])
    np.testing.assert_array_equal(state.absmax2, [1])
    values = DYNAMIC_MAP * np.float32(1) + np.float32(2)
    whole = state._replace(qabsmax=np.arange(256, dtype=np.uint8))
    np.testing.assert_array_equal(bits(formats.nf4_absmax(whole)), bits(values))


# Below 1e-38 a largest magnitude counts as 1e-38, and the bounds below do not hold.
numbers = st.floats(-100, 100, width=32).map(lambda v: v if abs(v) > 1e-30 else 0.0)
blocks = hnp.arrays(np.float32, st.integers(1, 200), elements=numbers)


@given(w=blocks, blocksize=st.sampled_from([32, 64, 128]))
def test_the_error_is_at_most_half_the_widest_gap(w: np.ndarray, blocksize: int):
    packed, absmax = formats.nf4_quantize(w, blocksize=blocksize, double=False)
    assert packed.size == (w.size + 1) // 2
    back = formats.nf4_dequantize(packed, absmax, w.size, blocksize=blocksize)
    assert isinstance(absmax, np.ndarray)
    wide = np.repeat(absmax, blocksize)[: w.size].astype(np.float64)
    error = np.abs(back.astype(np.float64) - w)
    roundings = 2.0**-22  # of the reciprocal, the product and the value
    assert (error <= wide * (np.diff(NF4).max() / 2 + roundings)).all()
    # and the largest of a block is kept, but for its reciprocal's rounding
    largest = np.abs(w) == np.repeat(absmax, blocksize)[: w.size]
    np.testing.assert_array_equal(back[largest], w[largest])


@given(w=blocks)
def test_double_quantization_errs_by_half_a_gap_of_its_map(w: np.ndarray):
    state = formats.nf4_quantize(w)[1]
    absmax = formats.nf4_quantize(w, double=False)[1]
    assert isinstance(state, Nf4State) and isinstance(absmax, np.ndarray)
    gap = np.diff(DYNAMIC_MAP.astype(np.float64)).max()
    error = np.abs(formats.nf4_absmax(state).astype(np.float64) - absmax)
    roundings = 2.0**-21  # of the difference, the reciprocal, two products and the sum
    assert (error <= state.absmax2[0] * gap / 2 + absmax.max() * roundings).all()


def test_ties_go_down_and_half_precision_is_lifted_exactly():
    w = np.zeros(64, np.float32)
    w[:15] = NF4_THRESHOLDS
    w[15] = 1
    code = formats.unpack_nibbles(formats.nf4_quantize(w, double=False)[0], low_first=False)
    np.testing.assert_array_equal(code[:16], np.arange(16))
    for dtype in (np.float16, ml_dtypes.bfloat16):
        half = weights(640).astype(dtype)
        for ours, lifted in zip(
            formats.nf4_quantize(half), formats.nf4_quantize(half.astype(np.float32)), strict=True
        ):
            for a, b in zip(ours, lifted, strict=True):
                np.testing.assert_array_equal(a, b)


def borderline(thresholds: np.ndarray, blocks: int, size: int) -> np.ndarray:
    """Blocks of float32 whose values lie within three ulps of a threshold times their largest."""
    rng = np.random.default_rng(3)
    largest = rng.uniform(1, 2, (blocks, 1)).astype(np.float32)
    x = rng.choice(thresholds, (blocks, size)) * largest
    x = (x.view(np.int32) + rng.integers(-3, 4, x.shape, np.int32)).view(np.float32)
    x[:, 0] = largest[:, 0]
    return x


def nearest(thresholds: np.ndarray, x: np.ndarray, *, divide: bool) -> np.ndarray:
    """The rule, a row being a block; float64 rounded to float32 is the correctly rounded result."""
    largest = np.abs(x).max(axis=1, keepdims=True).astype(np.float64)
    scaled = x / largest if divide else x * (1 / largest).astype(np.float32).astype(np.float64)
    return (thresholds < scaled.astype(np.float32)[..., None]).sum(axis=-1)


def test_whole_blocks_multiply_by_a_reciprocal_and_the_last_ragged_one_divides():
    x = borderline(NF4_THRESHOLDS, 50, 64)
    whole, ragged = (
        nearest(NF4_THRESHOLDS, x, divide=False),
        nearest(NF4_THRESHOLDS, x[:, :40], divide=True),
    )
    assert (whole[:, :40] != ragged).any()  # there are values that tell the two apart
    for i in range(50):
        w = np.concatenate([x[i], x[i, :40]])
        code = formats.unpack_nibbles(formats.nf4_quantize(w, double=False)[0], low_first=False)
        np.testing.assert_array_equal(code, np.concatenate([whole[i], ragged[i]]))


def test_the_second_quantization_always_multiplies_by_a_reciprocal():
    thresholds = (DYNAMIC_MAP[1:] + DYNAMIC_MAP[:-1]) / np.float32(2)
    absmax = borderline(thresholds[thresholds > 1e-3], 20, 100)
    expected = nearest(thresholds, absmax, divide=False)
    assert (expected != nearest(thresholds, absmax, divide=True)).any()
    for i in range(20):
        state = formats.nf4_quantize(np.repeat(absmax[i], 64), offset=np.float32(0))[1]
        assert isinstance(state, Nf4State)
        np.testing.assert_array_equal(state.qabsmax, expected[i])


def test_values_are_rounded_once_to_the_dtype_asked_for():
    packed, state = formats.nf4_quantize(weights(640))
    whole = formats.nf4_dequantize(packed, state, 640)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        values = formats.nf4_dequantize(packed, state, 640, dtype)
        assert values.dtype == dtype
        np.testing.assert_array_equal(values, whole.astype(dtype))


def test_zeros_nan_and_infinity():
    w = weights(256)
    w[64:128], w[130], w[200] = 0, np.nan, -np.inf
    packed, absmax = formats.nf4_quantize(w, double=False)
    assert absmax[1] == 0 and np.isnan(absmax[2:]).all()  # pyright: ignore
    assert (packed[32:64] == 0x77).all() and (packed[64:] == 0).all()
    back = formats.nf4_dequantize(packed, absmax, 256)
    assert (back[64:128] == 0).all() and np.isnan(back[128:]).all()
    clean = formats.nf4_quantize(weights(64), double=False)[0]
    np.testing.assert_array_equal(packed[:32], clean)
    nested = formats.nf4_quantize(w)
    np.testing.assert_array_equal(nested[0], packed)
    assert np.isnan(formats.nf4_dequantize(*nested, 256)).all()


def test_blocks_that_are_all_alike_and_no_values_at_all():
    for n in (64, 640):
        packed, state = formats.nf4_quantize(np.full(n, -3, np.float32))
        assert isinstance(state, Nf4State)
        assert (state.qabsmax == 0).all() and state.absmax2 == [0] and state.offset == 3
        np.testing.assert_array_equal(formats.nf4_dequantize(packed, state, n), -3)
    packed, state = formats.nf4_quantize(np.zeros(0, np.float32))
    assert packed.size == 0 and formats.nf4_dequantize(packed, state, 0).size == 0
    packed = formats.nf4_quantize(np.ones(1, np.float32), double=False)[0]
    np.testing.assert_array_equal(packed, [0xF7])  # the second half of the byte is a zero


def test_bad_arguments_are_named():
    w = weights(640)
    packed, state = formats.nf4_quantize(w)
    assert isinstance(state, Nf4State)
    with pytest.raises(TypeError, match="w: expected float32, float16 or bfloat16, got float64"):
        formats.nf4_quantize(w.astype(np.float64))
    with pytest.raises(ValueError, match="blocksize: expected one of 32, 64"):
        formats.nf4_quantize(w, blocksize=48)
    with pytest.raises(ValueError, match="offset: expected none"):
        formats.nf4_quantize(w, double=False, offset=np.float32(1))
    with pytest.raises(ValueError, match="blocksize"):
        formats.nf4_dequantize(packed, state, 640, blocksize=63)
    with pytest.raises(ValueError, match=r"packed: expected the shape \[321\], got \[320\]"):
        formats.nf4_dequantize(packed, state, 641)
    with pytest.raises(ValueError, match=r"state: expected the shape \[5\], got \[10\]"):
        formats.nf4_dequantize(packed, state, 640, blocksize=128)
    with pytest.raises(TypeError, match="packed: expected uint8"):
        formats.nf4_dequantize(packed.astype(np.int32), state, 640)
    with pytest.raises(TypeError, match="state: expected float32"):
        formats.nf4_absmax(np.ones(3))
    with pytest.raises(TypeError, match=r"state.qabsmax: expected uint8"):
        formats.nf4_absmax(state._replace(qabsmax=state.qabsmax.astype(np.int64)))
    with pytest.raises(ValueError, match=r"state.absmax2: expected the shape \[1\]"):
        formats.nf4_absmax(state._replace(absmax2=np.ones(2, np.float32)))
    with pytest.raises(ValueError, match="code: expected codes of 4 bits, got 16"):
        formats.nf4_decode(np.array([3, 16]))
    with pytest.raises(ValueError, match="code: expected codes of 4 bits, got -1"):
        formats.nf4_decode(np.array([-1]))


def binned(d: np.ndarray, absmax2: np.ndarray) -> np.ndarray:
    """q as bitsandbytes' CPU code has it: the nearest to the middle of one of 65536 bins."""
    one, half, last = np.float32([1, 0.5, 65535])
    with np.errstate(divide="ignore", invalid="ignore"):
        v = np.clip(d * np.repeat(one / absmax2, 256)[: d.size], -1, 1)
    v = np.where(np.isnan(v), one, v)
    middle = np.float32(2) * ((v + one) * half * last + half).astype(np.uint16) / last - one
    q = np.searchsorted((DYNAMIC_MAP[1:] + DYNAMIC_MAP[:-1]) * half, middle, side="left")
    return np.where(np.repeat(absmax2, 256)[: d.size] == 0, 0, q).astype(np.uint8)


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
@pytest.mark.parametrize("blocksize", [64, 128])
@pytest.mark.parametrize("n", [19213, 64 * 3000, 64])
@pytest.mark.parametrize("kind", ["heavy tails", "borderline"])
def test_bitsandbytes_itself(n: int, blocksize: int, kind: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = importlib.import_module("torch")
        theirs = importlib.import_module("bitsandbytes.functional")
        w = np.random.default_rng(n).standard_t(3, n).astype(np.float32)
        if kind == "borderline":
            w = borderline(NF4_THRESHOLDS, 3000, 64).ravel()[:n]
        tensor, options = torch.tensor(w), dict(blocksize=blocksize, quant_type="nf4")
        their_packed, their_state = theirs.quantize_4bit(
            tensor, compress_statistics=True, **options
        )
        their_absmax = theirs.quantize_4bit(tensor, **options)[1].absmax.numpy()
        their_values = theirs.dequantize_4bit(their_packed, their_state).numpy().ravel()
    state = Nf4State(
        their_state.absmax.numpy().ravel(),
        their_state.state2.absmax.numpy(),
        their_state.offset.numpy(),
        their_state.state2.code.numpy(),
    )
    packed, absmax = formats.nf4_quantize(w, blocksize=blocksize, double=False)
    np.testing.assert_array_equal(packed, their_packed.numpy().ravel())
    np.testing.assert_array_equal(bits(absmax), bits(their_absmax))  # pyright: ignore
    ours = formats.nf4_quantize(w, blocksize=blocksize, offset=state.offset)[1]
    assert isinstance(ours, Nf4State)
    np.testing.assert_array_equal(bits(ours.code), bits(state.code))
    np.testing.assert_array_equal(bits(ours.absmax2), bits(state.absmax2))
    # Apart from the bins, which a value next to a midpoint can fall on the wrong side of.
    np.testing.assert_array_equal(binned(absmax - state.offset, state.absmax2), state.qabsmax)
    np.testing.assert_array_equal(
        bits(formats.nf4_dequantize(packed, state, n, blocksize=blocksize)), bits(their_values)
    )
    whole_mean = formats.nf4_quantize(w, blocksize=blocksize)[1]
    assert isinstance(whole_mean, Nf4State)
    np.testing.assert_allclose(whole_mean.offset, state.offset, rtol=1e-6)
