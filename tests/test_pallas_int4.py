"""What the harness does not ask of the Pallas four-bit product: bad input, both orders of weights,
any tiles, JAX's transformations.

The kernels run in the interpreter, which conftest.py switches on with its race detector.
"""

import functools
import importlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.int4_matmul import (
    Config,
    default_config,
    default_split,
    int4_matmul,
    int4_matmul_atomic,
    int4_matmul_bwd,
    int4_matmul_fwd,
    int4_prepack,
    int4_quantize,
)
from parity import formats
from parity.frameworks import mosaic_interpreter

SMALL = Config(8, 128, 2, 1, 2)
MATMUL = importlib.import_module("pallas_kernels.int4_matmul")
QUANTIZER = importlib.import_module("pallas_kernels.int4_matmul_quantize")


@pytest.fixture(autouse=True)
def _no_races() -> Iterator[None]:
    with mosaic_interpreter.watched():
        yield


def _normal(seed: int, *shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def _quantized(N: int, K: int, group: int, symmetric: bool = False, dtype: Any = jnp.bfloat16):
    """(W as it is decoded, [N, K], and w_packed, w_scale, w_zero) as parity.formats has it."""
    w = np.asarray(_normal(9, N, K, dtype=dtype))
    arrays = formats.int4_quantize(w, group=group, symmetric=symmetric)
    w = formats.int4_dequantize(*arrays, group=group).astype(np.float64)
    return w, [None if a is None else jnp.asarray(a) for a in arrays]


def _close(got: jax.Array, want: np.ndarray, tolerance: float = 4e-3) -> None:
    assert got.shape == want.shape
    assert np.linalg.norm(np.asarray(got, np.float64) - want) <= tolerance * np.linalg.norm(want)


def _f64(x: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64)


X = jnp.zeros((3, 256), jnp.bfloat16)
PACKED, SCALE = jnp.zeros((16, 128), jnp.uint8), jnp.zeros((16, 2), jnp.bfloat16)
ZEROS = jnp.zeros((16, 4), jnp.uint8)
BIAS = jnp.zeros(16, jnp.bfloat16)
WORDS, DY = jnp.zeros((1, 16, 64), jnp.int16), jnp.zeros((3, 16), jnp.bfloat16)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: int4_matmul(X[0], PACKED, SCALE), ValueError, r"x: expected shape \[M, K\], got"),
        (lambda: int4_matmul(X.astype("float32"), PACKED, SCALE), TypeError, "x: expected dtype b"),
        (lambda: int4_matmul(X, PACKED[:, 1:], SCALE), ValueError, r"w_packed: .*\[16, 128\]"),
        (lambda: int4_matmul(X, PACKED.astype("int8"), SCALE), TypeError, "w_packed: .* uint8"),
        (lambda: int4_matmul(X, PACKED[None], SCALE), ValueError, r"w_packed: .*, N, 64\]"),
        (lambda: int4_matmul(X, PACKED, SCALE.T), ValueError, r"w_scale: expected shape \[16, 2\]"),
        (lambda: int4_matmul(X, PACKED, SCALE.astype("float16")), TypeError, "w_scale: expected d"),
        (lambda: int4_matmul(X, PACKED, SCALE, ZEROS[:, 1:]), ValueError, r"w_zero: .*\[16, 4\]"),
        (lambda: int4_matmul(X, PACKED, SCALE, group=48), ValueError, "group: expected 32, 64, 1"),
        (lambda: int4_matmul(X, PACKED, SCALE, group=128.0), TypeError, "group: expected a Python"),
        (lambda: int4_matmul(X[:, 64:], PACKED, SCALE), ValueError, "group: expected 128 to divid"),
        (lambda: int4_matmul(X, PACKED, SCALE, split_k=2), ValueError, 'split_k: expected "auto"'),
        (lambda: int4_matmul(X, PACKED, SCALE, split_k=None), TypeError, "split_k: expected a Pyt"),
        (lambda: int4_matmul(X, PACKED, SCALE, bias=BIAS[1:]), ValueError, "bias: expected shape"),
        (lambda: int4_matmul(X, PACKED, SCALE, config=1), TypeError, "config: expected .*Config"),
        (lambda: int4_prepack(*int4_prepack(PACKED, SCALE)), ValueError, "w_packed: .*prepacked"),
        (lambda: int4_matmul(X, WORDS, SCALE), ValueError, r"w_scale: .*\[2, 16\], got \[16, 2\]"),
        (lambda: int4_matmul(X, WORDS, SCALE.T, ZEROS), ValueError, r"w_zero: .* shape \[2, 16\]"),
        (lambda: int4_matmul(X[:, :128], WORDS, SCALE.T), ValueError, r"w_scale: .*\[1, 16\]"),
        (lambda: int4_matmul_bwd((WORDS, SCALE.T, None), X), ValueError, r"dy: .*\[M, 16\]"),
        (lambda: int4_matmul_bwd((PACKED, SCALE, None), DY), ValueError, "res: expected prepacked"),
        (
            lambda: int4_matmul_bwd((WORDS, SCALE.T, None), DY.astype("float32")),
            TypeError,
            "dy: expected dtype bfloat16",
        ),
        (lambda: int4_quantize(X[0]), ValueError, r"w: expected shape \[N, K\], got"),
        (lambda: int4_quantize(X, group=96), ValueError, "group: expected 32, 64, 128 or 256"),
        (lambda: int4_quantize(X[:, :64]), ValueError, "group: expected 128 to divide K = 64"),
        (lambda: int4_quantize(X.astype("float32")), TypeError, "w: expected dtype bfloat16 or f"),
        (lambda: int4_quantize(X, symmetric=None), TypeError, "symmetric: expected a Python bool"),
        (lambda: Config(block_m=24), ValueError, "block_m: expected one of"),
        (lambda: Config(block_n=192), ValueError, "block_n: expected a multiple of 64 rows"),
        (lambda: Config(block_n=192, warpgroups=3), ValueError, "block_n: .* multiple of 128"),
        (lambda: Config(warpgroups=5), ValueError, "warpgroups: expected 1, 2, 3 or 4"),
        (lambda: Config(stages=1), ValueError, "stages: expected at least 2"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def _odd_ones(w, group):
    """Zeros, a NaN, infinities, one sign alone, and a range too large for float16."""
    w[0, :group] = 0
    w[1, 3] = np.nan
    w[2, -1], w[2, 0] = np.inf, -np.inf
    w[3] = np.abs(w[3])
    w[4, :group], w[4, 0] = 65504, -65504
    return w


@pytest.mark.parametrize(
    ("K", "group", "dtype", "symmetric"),
    [
        (512, 32, "float16", True), (576, 64, "bfloat16", False),
        (1280, 128, "bfloat16", False), (1280, 128, "float16", True), (256, 256, "float16", False),
    ],
)  # fmt: skip
def test_quantizing_is_the_format_bit_for_bit(K, group, dtype, symmetric):
    rng = np.random.default_rng(K)
    w = rng.standard_normal((7, K)) * rng.choice([1e-4, 1, 100], (7, 1))
    w = _odd_ones(w.astype(jnp.dtype(dtype)), group)
    want = formats.int4_quantize(w, group=group, symmetric=symmetric)
    run = jax.jit(lambda w: int4_quantize(w, group=group, symmetric=symmetric))
    for y, r in zip(run(jnp.asarray(w)), want, strict=True):
        assert (y is None) == (r is None)
        if r is not None:
            assert y.dtype == r.dtype
            assert np.array_equal(y, r, equal_nan=r.dtype != np.uint8)


@pytest.mark.parametrize("bits", [8, 11], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("power", [0, -115], ids=["", "tiny"])
def test_every_quotient_is_rounded_as_a_division_would_be(bits, power):
    """All significands of scales, all numbers up to 15 scales, and reciprocals 2 ulp off."""
    scale = np.arange(1 << bits - 1, 1 << bits, dtype=np.float32)
    numbers = np.concatenate([scale * 2.0**e for e in range(-2, 5)]).astype(np.float32)
    run = jax.jit(lambda x, s, off: _whole(x, s * 2.0**power, off))
    for some in np.split(scale, max(1, len(scale) // 128)):
        want = np.rint(numbers / some[:, None])
        x = numbers * np.float32(2.0**power)
        for off in (-1, 0, 1):
            got = np.asarray(run(x, some, np.float32(1 + off * 2.0**-22)))
            inside = numbers <= 15.5 * some[:, None]
            assert np.array_equal(got[inside], want[inside])
            assert np.array_equal(-np.asarray(run(-x, some, np.float32(1)))[inside], want[inside])


def _whole(x, scale, off):
    """QUANTIZER's rint(x / scale), [scales, numbers], its reciprocals multiplied by `off`."""
    r, snap, rest, none = (y[:, None] for y in QUANTIZER._rounding(scale))
    return QUANTIZER._rounded(x, r * off, snap, rest) - none


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_every_scale_is_rounded_as_a_division_would_be(dtype, bits):
    every = np.arange(1 << 15, dtype=np.uint16).view(jnp.dtype(dtype)).astype(np.float32)
    every = every[np.isfinite(every) & (every >= np.finfo(np.float32).tiny * 7)]
    got = np.asarray(jax.jit(lambda x: QUANTIZER._share(x, True))(every))
    assert np.array_equal(got.astype(dtype), (every / np.float32(7)).astype(dtype))
    # 15 times what lies half-way between two scales, and its neighbours in float32
    half = np.arange((1 << bits) + 1, 2 << bits, 2, dtype=np.float32) * 15
    spans = (half.view(np.int32)[:, None] + np.arange(-3, 4, dtype=np.int32)).view(np.float32)
    spans = np.concatenate(
        [
            spans.ravel() * np.float32(2.0**e)
            for e in (-118, -80, -76, -75, -74, -70, -14, 0, 4, 100)
        ]
    )
    got = np.asarray(jax.jit(lambda x: QUANTIZER._share(x, False))(spans))
    assert np.array_equal(got, spans / np.float32(15))


@pytest.mark.parametrize(("M", "N", "K"), [(0, 16, 256), (3, 0, 256), (3, 16, 0)])
def test_without_elements(M, N, K):
    packed, scale = jnp.zeros((N, K // 2), jnp.uint8), jnp.zeros((N, K // 128), jnp.bfloat16)
    bias = _normal(0, N)
    y, res = int4_matmul_fwd(_normal(1, M, K), packed, scale, bias=bias)
    assert np.array_equal(y, jnp.broadcast_to(bias, (M, N)))
    (dx,) = int4_matmul_bwd(res, y)
    assert dx.shape == (M, K) and not np.asarray(dx, np.float32).any()


@pytest.mark.parametrize("K", [256, 320])
def test_prepacking_moves_every_code_and_loses_none(K):
    N, group = 5, 64
    _, (packed, scale, zero) = _quantized(N, K, group)
    words, scales, zeros = int4_prepack(packed, scale, zero, group=group)
    assert words.dtype == jnp.int16 and words.shape == (-(-K // 256), N, 64)
    words = np.asarray(words)
    code = np.stack([words >> 4 * i & 15 for i in range(4)], axis=2)  # [blocks, N, 4, 64]
    code = np.moveaxis(code, 1, 0).reshape(N, -1)
    assert (code[:, K:] == 8).all()
    back = formats.pack_nibbles(code[:, :K].astype(np.uint8), low_first=True)
    assert np.array_equal(back, packed) and np.array_equal(scales, scale.T)
    zeros = np.ascontiguousarray(np.asarray(zeros).T)
    assert np.array_equal(formats.int4_pack_zeros(zeros), zero)


def test_both_twins_prepack_alike():
    torch = pytest.importorskip("torch")
    theirs = importlib.import_module("triton_kernels.int4_matmul").int4_prepack
    _, arrays = _quantized(24, 384, 32, dtype=jnp.float16)
    ours = int4_prepack(*arrays, group=32)
    native = [torch.from_numpy(np.array(a)) for a in arrays]
    for mine, other in zip(ours, theirs(*native, group=32), strict=True):
        assert np.array_equal(mine, other.numpy()) and mine.dtype.name == str(other.numpy().dtype)


@pytest.mark.parametrize(
    ("group", "dtype", "symmetric"),
    [(32, "bfloat16", False), (64, "float16", True), (128, "bfloat16", True), (256, "bfloat16", 0)],
)
def test_the_product_of_what_the_formats_quantize(group, dtype, symmetric):
    w, arrays = _quantized(40, 512, group, bool(symmetric), dtype)
    x, bias = _normal(0, 3, 512, dtype=dtype), _normal(1, 40, dtype=dtype)
    run = jax.jit(lambda *a: int4_matmul(*a, group=group, bias=bias, config=SMALL))
    y = run(x, *arrays)
    _close(y, _f64(x) @ w.T + _f64(bias), 4e-3 if dtype == "bfloat16" else 5e-4)
    assert np.array_equal(run(x, *int4_prepack(*arrays, group=group)), y)


@pytest.mark.parametrize(
    "config",
    [
        Config(32, 128, 2, 1, 1),
        Config(64, 256, 2, 1, 2),
        Config(16, 256, 2, 2, 4),
    ],
    ids=["two pieces", "two pieces for each of two", "four warpgroups"],
)
def test_tiles_change_nothing(config):
    w, arrays = _quantized(264, 768, 128)
    words, scale, zero = int4_prepack(*arrays)
    # sums of whole numbers are not rounded
    x = jax.random.randint(jax.random.key(0), (70, 768), -3, 4).astype(jnp.bfloat16)
    run = jax.jit(lambda *a: int4_matmul(*a, split_k=1, config=config))
    y = run(x, words, jnp.ones_like(scale), zero)
    whole = np.round(w / np.repeat(_f64(scale).T, 128, axis=1))
    assert np.array_equal(y, (_f64(x) @ whole.T).astype(jnp.bfloat16))


@pytest.mark.parametrize("M", [7, 13])
def test_sizes_that_are_no_multiple_of_anything(M):
    w, arrays = _quantized(101, 544, 32)
    x, dy = _normal(0, M, 544), _normal(1, M, 101)
    y, res = jax.jit(lambda *a: int4_matmul_fwd(*a, group=32, config=SMALL))(x, *arrays)
    _close(y, _f64(x) @ w.T)
    (dx,) = jax.jit(lambda *a: int4_matmul_bwd(*a, group=32))(res, dy)
    _close(dx, _f64(dy) @ w, 8e-3)


def test_slices_change_only_the_rounding():
    w, arrays = _quantized(136, 1280, 256, symmetric=True)
    x, bias = _normal(0, 3, 1280), _normal(1, 136)
    run = jax.jit(lambda *a: int4_matmul(*a, group=256, split_k=3, bias=bias, config=SMALL))
    _close(run(x, *arrays), _f64(x) @ w.T + _f64(bias))


@pytest.mark.parametrize(
    ("slices", "warpgroups", "symmetric"), [(2, 2, False), (4, 4, True), (2, 4, False)]
)
def test_slices_of_one_block_are_added_like_those_of_several(slices, warpgroups, symmetric):
    _, arrays = _quantized(296, 2048, 64, symmetric)
    x, bias = _normal(0, 7, 2048), _normal(1, 296)
    outputs = []
    for pieces in (1, 2):
        config = Config(8, 64 * warpgroups * pieces, 2, 1, warpgroups)
        assert MATMUL._inside(config, slices, 7, 2048, 64) == (slices if pieces == 1 else 1)
        run = functools.partial(int4_matmul, group=64, split_k=slices, bias=bias, config=config)
        outputs.append(jax.jit(run)(x, *arrays))
    assert np.array_equal(*outputs)


def test_added_as_they_come_the_slices_have_the_same_sum():
    w, arrays = _quantized(40, 768, 256)
    x, bias = _normal(0, 3, 768), _normal(1, 40)
    how = {"group": 256, "split_k": 3, "bias": bias, "config": SMALL}
    run = jax.jit(lambda *a: int4_matmul_atomic(*a, **how))
    _close(run(x, *arrays), _f64(x) @ w.T + _f64(bias))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NaN is the point
def test_a_scale_that_is_not_finite_reaches_its_row_alone():
    _, (packed, scale, zero) = _quantized(24, 512, 128)
    x = _normal(0, 4, 512)
    run = jax.jit(lambda scale: int4_matmul(x, packed, scale, zero, config=SMALL))
    clean = run(scale)
    for bad in (np.nan, np.inf):
        y = np.asarray(run(scale.at[7, 2].set(bad)), np.float32)
        assert not np.isfinite(y[:, 7]).any()
        assert np.array_equal(np.delete(y, 7, 1), np.delete(np.asarray(clean, np.float32), 7, 1))


def test_the_gradient_is_x_s_alone():
    w, (packed, scale, zero) = _quantized(40, 384, 64)
    x, bias, dy = _normal(0, 6, 384), _normal(1, 40), _normal(2, 6, 40)

    def product(x: Any, scale: Any, bias: Any) -> Any:
        return int4_matmul(x, packed, scale, zero, group=64, bias=bias, config=SMALL)

    dx, dscale, dbias = jax.jit(lambda *a: jax.vjp(product, *a)[1](dy))(x, scale, bias)
    _close(dx, _f64(dy) @ w, 8e-3)
    assert not _f64(dscale).any() and not _f64(dbias).any()


def test_under_vmap():
    w, arrays = _quantized(40, 256, 128)
    x = _normal(0, 2, 5, 256)
    run = jax.vmap(lambda x: int4_matmul(x, *arrays, config=SMALL))
    y = jax.jit(run)(x)
    for i in range(2):
        _close(y[i], _f64(x[i]) @ w.T)


def test_defaults_follow_the_sizes():
    dtype = jnp.bfloat16
    assert [default_config(M, 28672, 8192, dtype).block_m for M in (1, 8, 9, 64, 65, 4096)] == [
        8, 8, 16, 64, 128, 128,
    ]  # fmt: skip
    # few rows: their K is shared; many tokens: it is not
    assert default_split(1, 6144, 4096) > default_split(1, 28672, 8192) == 1
    assert default_split(4096, 1024, 8192) == 1
    for M, N, K in ((1, 64, 256), (16, 6144, 4096), (1, 8192, 28672)):
        assert 1 <= default_split(M, N, K) <= -(-K // 256)
