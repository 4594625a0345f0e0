"""What the harness does not ask of Pallas' softmax and rms_norm: bad input, no elements, JAX's
transformations, masked rubbish, and the slots when a row is longer than they are."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import rms_norm as rms
from pallas_kernels import softmax
from pallas_kernels.rms_norm import Config as RmsConfig
from pallas_kernels.rms_norm import rms_norm_bwd, rms_norm_fwd
from pallas_kernels.softmax import Config, default_config, softmax_bwd, softmax_fwd
from parity.frameworks import mosaic_interpreter


@pytest.fixture(autouse=True)
def _no_races() -> Iterator[None]:
    with mosaic_interpreter.watched():
        yield


def _normal(seed: int, *shape: int, dtype=jnp.bfloat16) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def _f64(*arrays: jax.Array) -> list[np.ndarray]:
    return [np.asarray(x, np.float64) for x in arrays]


def _close(got: jax.Array, want: np.ndarray, tolerance: float = 4e-3) -> None:
    got = np.asarray(got, np.float64)
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


def _softmax(s: np.ndarray) -> np.ndarray:
    e = np.exp(s - s.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


X, W = jnp.zeros((4, 64), jnp.bfloat16), jnp.zeros(64, jnp.bfloat16)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: softmax(X, X), TypeError, "mask: expected dtype bool, got bfloat16"),
        (lambda: softmax(X, scale="1"), TypeError, "scale: expected a Python"),
        (lambda: softmax(X, config=Config(block_n=1000)), ValueError, "block_n: expected"),
        (lambda: softmax(X, config=Config(block_n=128)), ValueError, "block_n: expected a mult"),
        (lambda: Config(block_m=3, warpgroups=4), ValueError, "block_m: expected a divisor of 4"),
        (lambda: Config(stages=9, warpgroups=4), ValueError, "stages: expected 1 to 8"),
        (lambda: rms(X, W[1:]), ValueError, r"w: expected shape \[64\], got \[63\]"),
        (lambda: rms(X, W, X[:2]), ValueError, r"residual: expected shape \[4, 64\]"),
        (lambda: rms(X, W, eps=jnp.float32(0)), TypeError, "eps: expected a Python"),
        (lambda: rms(X, W, config=Config()), TypeError, "config: expected pallas_kernels.rms_norm"),
        (
            lambda: rms(jnp.zeros((1, 32776)), jnp.zeros(32776)),
            ValueError,
            "x: expected at most 32768 columns, got 32776",
        ),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("shape", [(0, 64), (4, 0), (0, 0)])
def test_no_elements(shape):
    x, w = jnp.zeros(shape, jnp.float16), jnp.zeros(shape[1], jnp.float16)
    y, res = softmax_fwd(x)
    assert y.shape == softmax_bwd(res, x)[0].shape == shape
    (y, h), res = rms_norm_fwd(x, w, x)
    dx, dw = rms_norm_bwd(res, x, x)
    assert y.shape == h.shape == dx.shape == shape
    assert dw.shape == w.shape and dw.dtype == jnp.float32 and not dw.any()


def test_what_a_mask_hides_never_matters():
    x, scale = _normal(0, 3, 100, dtype=jnp.float32), -0.5
    keep = jax.random.bernoulli(jax.random.key(1), 0.5, x.shape).at[1].set(False)
    hidden = jnp.where(keep, x, jnp.array([jnp.nan, jnp.inf])[jnp.arange(100) % 2])
    y = softmax(hidden, keep, scale=scale)
    want = _softmax(np.where(keep, scale * _f64(x)[0], -np.inf)[[0, 2]])
    _close(y[jnp.array([0, 2])], want, 1e-6)
    assert not y[1].any()


def test_infinities_that_are_kept():
    x = jnp.zeros((3, 64), jnp.float32).at[0, 5].set(jnp.inf).at[1].set(-jnp.inf)
    y = softmax(x.at[2, 7].set(-jnp.inf))
    assert jnp.isnan(y[0]).all() and not y[1].any()
    assert y[2, 7] == 0 and jnp.allclose(y[2].sum(), 1)


def test_a_row_longer_than_the_slots():
    """3 chunks of 1024 columns for each of 2 warpgroups, the last beyond the row, in 2 slots."""
    x, dy = _normal(0, 3, 5000, dtype=jnp.float16), _normal(1, 3, 5000, dtype=jnp.float16)
    w, config = _normal(2, 5000, dtype=jnp.float16), Config(1, 1024, 2, 2)
    y, res = jax.jit(lambda x: softmax_fwd(x, config=config))(x)
    _close(y, _softmax(_f64(x)[0]), 1e-3)
    (dx,) = jax.jit(lambda res, dy: softmax_bwd(res, dy, config=config))(res, dy)
    y64, dy64 = _f64(y, dy)
    _close(dx, y64 * (dy64 - (y64 * dy64).sum(1, keepdims=True)), 1e-3)

    config = RmsConfig(1, 1024, 2, 2)
    y, res = jax.jit(lambda x, w: rms_norm_fwd(x, w, config=config))(x, w)
    dx, dw = jax.jit(lambda res, dy: rms_norm_bwd(res, dy, config=config))(res, dy)
    x64, w64 = _f64(x, w)
    rstd = np.mean(x64**2, 1, keepdims=True) ** -0.5
    g, xh = dy64 * w64, x64 * rstd
    _close(y, xh * w64, 1e-3)
    _close(dx, rstd * (g - xh * np.mean(g * xh, 1, keepdims=True)), 1e-3)
    _close(dw, (dy64 * xh).sum(0), 1e-5)


def test_vmap_and_grad_under_jit():
    x, w = _normal(0, 2, 3, 64), _normal(1, 64, dtype=jnp.float32)

    @jax.jit
    def loss(x, w):
        y, h = jax.vmap(lambda x: rms(softmax(x, scale=2.0), w, x, w_offset=1.0))(x)
        return (y.astype(jnp.float32) * jnp.arange(64)).sum() + h.astype(jnp.float32).sum()

    def plain(x, w):
        h = jax.nn.softmax(2.0 * x, axis=-1) + x
        y = h * jax.lax.rsqrt((h * h).mean(-1, keepdims=True) + 1e-6) * (w + 1.0)
        return (y * jnp.arange(64)).sum() + h.sum()

    got = jax.grad(loss, (0, 1))(x, w)
    want = jax.grad(plain, (0, 1))(x.astype(jnp.float32), w)
    assert got[0].dtype == jnp.bfloat16 and got[1].dtype == jnp.float32
    for ours, theirs in zip(got, want, strict=True):
        _close(ours, *_f64(theirs), 1e-2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("N", [1, 300, 2880, 4096, 16384, 32768, 151936])
def test_every_row_gets_a_config_that_covers_it(N, dtype):
    for which in ("fwd", "bwd"):
        config = default_config(4, N, dtype, which)
        slots = config.warpgroups * config.stages * config.block_n
        assert slots * jnp.dtype(dtype).itemsize * (1 if which == "fwd" else 2) <= 224 * 1024
