"""int4 to and from GPTQ's and AWQ's files: words by hand, the files' own formula, round trips."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parity import formats
from parity.formats import Awq, Gptq

Int4 = tuple[np.ndarray, np.ndarray, np.ndarray | None]

# What each format does with an int4 layer, and back.
FORMATS = {
    "gptq_v1": (
        lambda layer: formats.int4_to_gptq(*layer, version=1),
        lambda file: formats.int4_from_gptq(*file, version=1),
    ),
    "gptq_v2": (
        lambda layer: formats.int4_to_gptq(*layer, version=2),
        lambda file: formats.int4_from_gptq(*file, version=2),
    ),
    "awq": (
        lambda layer: formats.int4_to_awq(*layer),
        lambda file: formats.int4_from_awq(*file),
    ),
}
every_format = pytest.mark.parametrize("name", FORMATS)


def layer(
    N: int, K: int, group: int, *, zeros: bool = True, seed: int = 0, dtype: type = np.float16
) -> Int4:
    """Every code and, from 1 on, every zero point, in a random order."""
    rng = np.random.default_rng(seed)
    code = rng.permutation(np.resize(np.arange(16), N * K)).reshape(N, K)
    zero = rng.permutation(np.resize(np.arange(1, 16), N * K // group)).reshape(N, K // group)
    scale = rng.uniform(0.5, 2, zero.shape).astype(dtype)
    packed = formats.pack_nibbles(code, low_first=True)
    return packed, scale, formats.int4_pack_zeros(zero) if zeros else None


def assert_equal(ours: Int4, expected: Int4) -> None:
    for a, b in zip(ours, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.dtype == b.dtype and a.flags.c_contiguous
            np.testing.assert_array_equal(a, b)


def nibbles(words: np.ndarray, axis: int) -> np.ndarray:
    """int32 words taken apart along an axis, with shifts: element 8j + i from bits 4i of word j."""
    apart = np.stack([words.astype(np.int64) >> 4 * i & 15 for i in range(8)], axis + 1)
    shape = list(words.shape)
    shape[axis] *= 8
    return apart.reshape(shape)


def file_values(name: str, file: Gptq | Awq) -> np.ndarray:
    """W [K, N] as each format's readers compute it, float64: (code - zero) * scale."""
    if name == "awq":
        columns = np.arange(file.scales.shape[1]).reshape(-1, 8)[:, [0, 4, 1, 5, 2, 6, 3, 7]]
        code = nibbles(file.qweight, 1)[:, columns.ravel()]
        zero = nibbles(file.qzeros, 1)[:, columns.ravel()]
        group_of = np.arange(len(code)) // (len(code) // len(zero))
    else:
        assert isinstance(file, Gptq)
        code, zero = nibbles(file.qweight, 0), nibbles(file.qzeros, 1) + (name == "gptq_v1")
        group_of = file.g_idx
    return (code - zero[group_of]) * file.scales.astype(np.float64)[group_of]


def test_words_by_hand():
    # N = K = 8, one group: row n holds the codes n, n + 1, ... (mod 16); zeros 1 to 8.
    code = (np.arange(8)[:, None] + np.arange(8)) % 16
    zero = formats.int4_pack_zeros(np.arange(1, 9)[:, None])
    here = formats.pack_nibbles(code, low_first=True), np.ones((8, 1), np.float16), zero
    v1, v2 = (formats.int4_to_gptq(*here, version=version) for version in (1, 2))
    assert v1.qweight.shape == (1, 8) and v1.qweight.dtype == np.int32
    assert v1.qweight.view(np.uint32)[0, 0] == 0x76543210  # k = 0 in the lowest bits
    assert v1.qweight.view(np.uint32)[0, 3] == 0xA9876543
    assert v1.qzeros.view(np.uint32) == 0x76543210  # n = 0 in the lowest bits, less one
    assert v2.qzeros.view(np.uint32) == 0x87654321
    np.testing.assert_array_equal(v2.g_idx, np.zeros(8, np.int32))
    awq = formats.int4_to_awq(*here)
    assert awq.qweight.shape == (8, 1)
    assert awq.qweight.view(np.uint32)[0, 0] == 0x75316420  # columns 0 2 4 6 1 3 5 7
    assert awq.qzeros.view(np.uint32) == 0x86427531
    np.testing.assert_array_equal(awq.scales, np.ones((1, 8)))


def test_symmetric_files_hold_the_words_everyone_knows():
    symmetric = layer(16, 64, 32, zeros=False)
    assert (FORMATS["gptq_v1"][0](symmetric).qzeros.view(np.uint32) == 0x77777777).all()
    assert (FORMATS["gptq_v2"][0](symmetric).qzeros.view(np.uint32) == 0x88888888).all()
    assert (FORMATS["awq"][0](symmetric).qzeros.view(np.uint32) == 0x88888888).all()


@every_format
@pytest.mark.parametrize("zeros", [True, False])
def test_the_files_values_are_ours(name: str, zeros: bool):
    here = layer(24, 96, 32, zeros=zeros, dtype=np.float32)
    file = FORMATS[name][0](here)
    ours = formats.int4_dequantize(*here, group=32)
    np.testing.assert_array_equal(file_values(name, file).T.astype(np.float32), ours)


@every_format
@given(
    rows=st.integers(1, 4),
    groups=st.integers(1, 5),
    group=st.sampled_from([8, 16, 32]),
    zeros=st.booleans(),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([np.float16, np.float32, ml_dtypes.bfloat16]),
)
def test_round_trips(name: str, rows, groups, group, zeros, seed, dtype):
    here = layer(8 * rows, groups * group, group, zeros=zeros, seed=seed, dtype=dtype)
    there, back = FORMATS[name]
    file = there(here)
    assert_equal(back(file), here)
    again = there(back(file))
    for a, b in zip(again, file, strict=True):
        assert a.dtype == b.dtype and a.flags.c_contiguous
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["gptq_v2", "awq"])
def test_any_words_at_all_survive(name: str):
    rng = np.random.default_rng(1)
    there, back = FORMATS[name]
    words = lambda *shape: rng.integers(-(2**31), 2**31, shape).astype(np.int32)  # noqa: E731
    scales = rng.uniform(-1, 1, (3, 16)).astype(np.float16)
    if name == "awq":
        file = Awq(words(96, 2), words(3, 2), scales)
    else:
        file = Gptq(words(12, 16), words(3, 2), scales, np.repeat(np.arange(3, dtype=np.int32), 32))
    for a, b in zip(there(back(file)), file, strict=True):
        np.testing.assert_array_equal(a, b)


def test_versions_differ_by_one_in_every_nibble():
    v1, v2 = (FORMATS[f"gptq_v{v}"][0](layer(16, 64, 16)) for v in (1, 2))
    np.testing.assert_array_equal(v1.qzeros + 0x11111111, v2.qzeros)
    np.testing.assert_array_equal(v1.qweight, v2.qweight)


@every_format
def test_zero_points_that_are_all_8_are_none(name: str):
    there, back = FORMATS[name]
    here = layer(8, 32, 8, zeros=False)
    written = *here[:2], formats.int4_pack_zeros(np.full((8, 4), 8))
    assert_equal(back(there(written)), here)


def test_gptq_from_a_file_without_g_idx():
    here = layer(8, 32, 8)
    file = formats.int4_to_gptq(*here, version=2)
    assert_equal(formats.int4_from_gptq(*file[:3], version=2), here)


def test_what_version_1_cannot_say():
    packed, scale, _ = layer(8, 32, 8)
    zero = np.full((8, 4), 8)
    zero[3, 2] = 0
    with pytest.raises(ValueError, match="zero: version 1 cannot hold a zero point of 0"):
        formats.int4_to_gptq(packed, scale, formats.int4_pack_zeros(zero), version=1)
    file = formats.int4_to_gptq(packed, scale, formats.int4_pack_zeros(zero), version=2)
    with pytest.raises(ValueError, match="qzeros: version 1 stores 15"):
        formats.int4_from_gptq(*file._replace(qzeros=file.qzeros - 0x11111111), version=1)


def test_groups_out_of_order_are_refused():
    file = formats.int4_to_gptq(*layer(8, 32, 8), version=2)
    with pytest.raises(ValueError, match=r"g_idx: expected k // G, got groups out of order"):
        formats.int4_from_gptq(*file._replace(g_idx=file.g_idx[::-1].copy()), version=2)
    with pytest.raises(TypeError, match="g_idx: expected int32, got int64"):
        formats.int4_from_gptq(*file._replace(g_idx=file.g_idx.astype(np.int64)), version=2)


def test_bad_layers_are_named():
    packed, scale, zero = layer(8, 32, 8)
    for call in (formats.int4_to_awq, lambda *a: formats.int4_to_gptq(*a, version=2)):
        with pytest.raises(TypeError, match="packed: expected uint8, got int32"):
            call(packed.astype(np.int32), scale, zero)
        with pytest.raises(ValueError, match="packed: expected 2 dimensions"):
            call(packed[0], scale, zero)
        with pytest.raises(ValueError, match=r"scale: expected the shape \[8, 4\], got \[7, 4\]"):
            call(packed, scale[:7], zero)
        with pytest.raises(ValueError, match="scale: expected 3 to divide 32"):
            call(packed, scale[:, :3], zero)
        with pytest.raises(ValueError, match=r"zero: expected the shape \[8, 4\], got \[8, 8\]"):
            call(packed, scale, np.concatenate([zero, zero], axis=1))  # pyright: ignore
        with pytest.raises(ValueError, match="packed: expected 8 to divide 7"):
            call(packed[:7], scale[:7], None)
    with pytest.raises(ValueError, match="packed: expected 8 to divide 12"):
        formats.int4_to_gptq(packed[:, :6], scale[:, :1], version=2)
    with pytest.raises(ValueError, match="version: expected one of 1, 2; got 3"):
        formats.int4_to_gptq(packed, scale, zero, version=3)


@every_format
def test_bad_files_are_named(name: str):
    there, back = FORMATS[name]
    file = there(layer(16, 32, 8))
    with pytest.raises(TypeError, match="qweight: expected int32, got int64"):
        back(file._replace(qweight=file.qweight.astype(np.int64)))
    with pytest.raises(TypeError, match="qzeros: expected int32, got uint32"):
        back(file._replace(qzeros=file.qzeros.astype(np.uint32)))
    with pytest.raises(ValueError, match=r"qzeros: expected the shape \[4, 2\], got \[3, 2\]"):
        back(file._replace(qzeros=file.qzeros[:3]))
    with pytest.raises(ValueError, match="qzeros: expected 2 dimensions"):
        back(file._replace(qzeros=file.qzeros.ravel()))
    with pytest.raises(ValueError, match=r"scales: expected the shape \[4, 16\], got \[4, 15\]"):
        back(file._replace(scales=file.scales[:, :15]))
    with pytest.raises(ValueError, match="scales: expected 3 to divide 32"):
        back(file._replace(scales=file.scales[:3]))
    with pytest.raises(ValueError, match="qweight: expected 2 dimensions"):
        back(file._replace(qweight=file.qweight[0]))


def test_an_odd_k_has_no_bytes():
    file = formats.int4_to_awq(*layer(16, 32, 32))
    with pytest.raises(ValueError, match="qweight: expected 2 to divide 31"):
        formats.int4_from_awq(file.qweight[:31], file.qzeros, file.scales)
