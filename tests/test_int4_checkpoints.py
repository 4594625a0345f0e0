"""Converters of both kernel packages: bit for bit parity.formats', on files of each layout."""

import importlib
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from parity import formats
from parity.frameworks import twin

pytest.importorskip("torch")
N, K, G = 24, 160, 32  # five groups: one word of zero points is not full
TWINS = {
    name: importlib.import_module(f"{name}_kernels.int4_matmul_checkpoints")
    for name in ("triton", "pallas")
}
FORMATS = pytest.mark.parametrize("form", ["gptq_v1", "gptq_v2", "awq"])


@pytest.fixture(params=TWINS)
def side(request: pytest.FixtureRequest) -> SimpleNamespace:
    """A package's converters, from NumPy arrays to NumPy arrays."""
    of, module = twin(request.param), TWINS[request.param]

    def on_arrays(name):
        def call(*arrays, **how):
            out = getattr(module, name)(
                *[None if a is None else of.native(a) for a in arrays], **how
            )
            return tuple(None if x is None else np.asarray(of.harness(x)) for x in out)

        return call

    return SimpleNamespace(**{n: on_arrays(n) for n in dir(module) if n.startswith("int4_")})


def layer(least: int, dtype=np.float16, zeros: bool = True):
    """Every code, and every zero point from `least` on."""
    rng = np.random.default_rng(least)
    code = rng.permutation(np.resize(np.arange(16), N * K)).reshape(N, K)
    zero = rng.permutation(np.resize(np.arange(least, 16), N * K // G)).reshape(N, K // G)
    scale = rng.uniform(0.5, 2, zero.shape).astype(dtype)
    packed = formats.pack_nibbles(code, low_first=True)
    return packed, scale, formats.int4_pack_zeros(zero) if zeros else None


def there_and_back(of, form: str):
    """(to a file, from a file) of parity.formats or a package."""
    if form == "awq":
        return of.int4_to_awq, of.int4_from_awq
    version = int(form[-1])
    return (
        lambda *a: of.int4_to_gptq(*a, version=version),
        lambda *a: of.int4_from_gptq(*a, version=version),
    )


def same(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_array_equal(a, b, strict=True)


@FORMATS
@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_both_ways_are_those_of_the_formats(side, form: str, zeros: bool, dtype):
    here = layer(1 if form == "gptq_v1" else 0, dtype, zeros)
    ours_to, ours_back = there_and_back(side, form)
    file = there_and_back(formats, form)[0](*here)
    same(ours_to(*here), file)
    same(ours_back(*file), here)
    same(ours_to(*ours_back(*file)), file)


@pytest.mark.parametrize("form", ["gptq_v2", "awq"])
def test_any_words_at_all_survive(side, form: str):
    rng = np.random.default_rng(1)
    words = lambda *shape: rng.integers(-(2**31), 2**31, shape).astype(np.int32)  # noqa: E731
    scales = rng.uniform(-1, 1, (K // G, N)).astype(np.float32)
    shape = (K, N // 8) if form == "awq" else (K // 8, N)
    file = [words(*shape), words(K // G, N // 8), scales]
    if form != "awq":
        file.append(np.arange(K, dtype=np.int32) // G)
    to, back = there_and_back(side, form)
    same(to(*back(*file)), file)


def test_a_file_without_g_idx(side):
    here = layer(0)
    file = formats.int4_to_gptq(*here, version=2)
    same(side.int4_from_gptq(*file[:3], version=2), here)


def test_what_cannot_be_said_is_refused(side):
    packed, scale, zero = layer(0)
    with pytest.raises(ValueError, match="w_zero: version 1 cannot hold a zero point of 0"):
        side.int4_to_gptq(packed, scale, zero, version=1)
    file = formats.int4_to_gptq(packed, scale, zero, version=2)
    with pytest.raises(ValueError, match="qzeros: version 1 stores 15"):
        side.int4_from_gptq(*file, version=1)
    with pytest.raises(ValueError, match=r"g_idx: .* out of order \(desc_act\)"):
        side.int4_from_gptq(*file[:3], file.g_idx[::-1].copy(), version=2)


def test_bad_input_is_named(side):
    packed, scale, zero = layer(1)
    file = formats.int4_to_gptq(packed, scale, zero, version=2)
    awq = formats.int4_to_awq(packed, scale, zero)
    from_gptq = lambda *a, **how: side.int4_from_gptq(*a, **({"version": 2} | how))  # noqa: E731
    for error, words, call in (
        (ValueError, "version: expected 1 or 2, got 3", lambda: from_gptq(*file, version=3)),
        (TypeError, "version: expected a Python int", lambda: from_gptq(*file, version="1")),
        (TypeError, "qweight: expected dtype int32", lambda: from_gptq(packed, *file[1:])),
        (ValueError, r"qweight: expected shape \[K / 8, N\]",
         lambda: from_gptq(file[3], *file[1:])),
        (ValueError, "qweight: expected 8 to divide N = 23",
         lambda: from_gptq(file[0][:, 1:], file[1], file[2][:, 1:])),
        (ValueError, r"scales: expected shape \[K / group, 24\]",
         lambda: from_gptq(*file[:2], file[2][:, 1:])),
        (ValueError, "scales: expected groups that divide K = 160, got 3",
         lambda: from_gptq(file[0], file[1][:3], file[2][:3])),
        (TypeError, "scales: expected dtype bfloat16",
         lambda: from_gptq(*file[:2], file[2].astype(np.int32))),
        (ValueError, r"qzeros: expected shape \[5, 3\]",
         lambda: from_gptq(file[0], file[1][:4], file[2])),
        (ValueError, r"g_idx: expected shape \[160\]", lambda: from_gptq(*file[:3], file[3][1:])),
        (ValueError, r"qzeros: expected shape \[5, 3\]",
         lambda: side.int4_from_awq(awq[0], awq[1][:, :2], awq[2])),
        (ValueError, "qweight: expected an even K, got 159",
         lambda: side.int4_from_awq(awq[0][1:], *awq[1:])),
        (TypeError, "w_packed: expected dtype uint8", lambda: side.int4_to_awq(file[0], scale)),
        (ValueError, "w_packed: expected 8 to divide N = 23",
         lambda: side.int4_to_awq(packed[1:], scale[1:])),
        (ValueError, "w_packed: expected 8 to divide K = 4",
         lambda: side.int4_to_gptq(packed[:, :2], scale[:, :1], version=2)),
        (ValueError, r"w_scale: expected shape \[24, K / group\]",
         lambda: side.int4_to_awq(packed, scale[1:])),
        (ValueError, "w_scale: expected groups that divide K = 160, got 3",
         lambda: side.int4_to_awq(packed, scale[:, :3])),
        (ValueError, r"w_zero: expected shape \[24, 4\]",
         lambda: side.int4_to_awq(packed, scale, zero[:, 1:])),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            call()


@pytest.mark.parametrize("name", TWINS)
def test_a_file_is_loaded_prepacked_and_multiplied_by(name: str):
    """From a GPTQ file's words to a product, with the package alone."""
    rng, of = np.random.default_rng(2), twin(name)
    package = importlib.import_module(f"{name}_kernels")
    words, zeros = (rng.integers(-(2**31), 2**31, s).astype(np.int32) for s in ((32, 16), (2, 2)))
    scales = rng.uniform(0.01, 0.02, (2, 16)).astype(np.float16)
    x = rng.standard_normal((3, 256)).astype(np.float16)
    code = (words[:, None] >> 4 * np.arange(8)[None, :, None] & 15).reshape(256, 16)
    zero = (zeros[:, :, None] >> 4 * np.arange(8) & 15).reshape(2, 16)
    w = (code - zero.repeat(128, 0)) * scales.repeat(128, 0).astype(np.float64)
    loaded = package.int4_from_gptq(*map(of.native, (words, zeros, scales)), version=2)
    loaded = package.int4_prepack(*loaded)
    y = np.asarray(of.harness(of.run(package.int4_matmul, [of.native(x), *loaded], {})), np.float64)
    want = x.astype(np.float64) @ w
    assert np.linalg.norm(y - want) < 5e-4 * np.linalg.norm(want)
