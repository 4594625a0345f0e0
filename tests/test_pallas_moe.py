"""What the harness does not ask of the Pallas grouped product: bad input, no elements, any tiles,
JAX's transformations.

The kernels run in the interpreter, which conftest.py switches on with its race detector.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_gemm, grouped_gemm_dw
from pallas_kernels.moe_gemm import (
    Config,
    default_config,
    grouped_gemm_bwd,
    grouped_gemm_check,
    grouped_gemm_fwd,
)
from parity.frameworks import mosaic_interpreter


@pytest.fixture(autouse=True)
def _no_races() -> Iterator[None]:
    with mosaic_interpreter.watched():
        yield


def _normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def _sizes(*sizes: int) -> jax.Array:
    return jnp.array(sizes, jnp.int32)


def _groups(sizes: jax.Array) -> Iterator[tuple[int, slice]]:
    start = 0
    for e, size in enumerate(np.asarray(sizes)):
        yield e, slice(start, start + size)
        start += size


def _product(x: jax.Array, w: jax.Array, sizes: jax.Array) -> np.ndarray:
    y = np.zeros((x.shape[0], w.shape[2]))
    for e, rows in _groups(sizes):
        y[rows] = np.asarray(x, np.float64)[rows] @ np.asarray(w, np.float64)[e]
    return y


def _close(got: jax.Array, want: np.ndarray) -> None:
    assert got.shape == want.shape
    assert np.linalg.norm(np.asarray(got, np.float64) - want) <= 4e-3 * np.linalg.norm(want)


X, W, SIZES = (
    jnp.zeros((16, 32), jnp.bfloat16),
    jnp.zeros((3, 32, 8), jnp.bfloat16),
    _sizes(4, 0, 9),
)
ROWS, DY = jnp.zeros(16, jnp.int32), jnp.zeros((16, 8), jnp.bfloat16)
DECODE = Config(decode=True)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: grouped_gemm(X[0], W, SIZES), ValueError, r"x: expected shape \[M, K\], got"),
        (lambda: grouped_gemm(X, W[0], SIZES), ValueError, r"w: expected shape \[E, 32, N\], got"),
        (lambda: grouped_gemm(X, W, SIZES, transpose_w=True), ValueError, r"w: .*\[E, N, 32\]"),
        (lambda: grouped_gemm(X, W, SIZES[1:]), ValueError, r"sizes: expected shape \[3\], got"),
        (lambda: grouped_gemm(X, W, SIZES.astype("int16")), TypeError, "sizes: expected dtype int"),
        (lambda: grouped_gemm(X, W.astype("float16"), SIZES), TypeError, "w: expected dtype bfloa"),
        (lambda: grouped_gemm(X.astype("float32"), W, SIZES), TypeError, "float32, which wgmma wo"),
        (lambda: grouped_gemm(X, W, SIZES, out_dtype="int8"), TypeError, "out_dtype: expected bfl"),
        (lambda: grouped_gemm(X, W, SIZES, transpose_w=1), TypeError, "transpose_w: expected a Py"),
        (lambda: grouped_gemm(X, W, SIZES, activation="gelu"), ValueError, "activation: expected "),
        (lambda: grouped_gemm(X, W[..., 1:], SIZES, activation="swiglu"), ValueError, "an even nu"),
        (lambda: grouped_gemm(X, W, SIZES, rows=ROWS[None]), ValueError, "rows: expected shape"),
        (lambda: grouped_gemm(X, W, SIZES, bias=W[:, 0, 1:]), ValueError, "bias: expected shape"),
        (lambda: grouped_gemm(X, W, SIZES, row_scale=ROWS), TypeError, "row_scale: expected dtype"),
        (lambda: grouped_gemm(X, W, SIZES, config=1), TypeError, "config: expected .*Config"),
        (lambda: grouped_gemm_dw(X, DY[1:], SIZES), ValueError, r"dy: expected shape \[16, N\]"),
        (lambda: grouped_gemm_dw(X, DY, SIZES, config=DECODE), ValueError, "without decode"),
        (lambda: grouped_gemm(X, W, SIZES, config=DECODE), NotImplementedError, "Triton only"),
        (lambda: grouped_gemm_fwd(X, W, SIZES, config=DECODE), NotImplementedError, "Triton only"),
        (lambda: Config(block_m=192), ValueError, "block_m: expected a multiple of 64 rows"),
        (lambda: Config(cluster=3), ValueError, "cluster: expected 1 or 2"),
        (lambda: grouped_gemm_check(_sizes(4, -3, 2), M=9), ValueError, "got -3 for expert 1"),
        (lambda: grouped_gemm_check(SIZES, M=10), ValueError, "sum to 13, 3 more than the M = 10"),
        (
            lambda: grouped_gemm_check(SIZES, ROWS.at[12].set(7), M=16, T=7),
            ValueError,
            "rows: expected indices below T = 7, got 7 at row 12",
        ),
        (
            lambda: jax.jit(lambda s: grouped_gemm_check(s, M=16))(SIZES),
            TypeError,
            "sizes: expected an array with values, got a tracer",
        ),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_the_check_passes_what_is_right():
    # What dead rows would take does not matter.
    grouped_gemm_check(SIZES, ROWS.at[13].set(-1), M=16, T=7)


@pytest.mark.parametrize(("M", "K", "N"), [(0, 32, 8), (16, 32, 0), (16, 0, 8)])
def test_without_elements(M, K, N):
    x, w = _normal(0, M, K), _normal(1, 3, K, N)
    y, res = grouped_gemm_fwd(x, w, SIZES)
    dx, dw = grouped_gemm_bwd(res, jnp.ones((M, N), jnp.bfloat16))
    assert (y.shape, dx.shape, dw.shape) == ((M, N), (M, K), (3, K, N))
    assert not any(np.asarray(array, np.float32).any() for array in (y, dx, dw))


def test_sizes_that_are_wrong_reach_no_other_memory():
    x, w = _normal(0, 40, 40), _normal(1, 3, 40, 48)
    # A negative size counts 0, what is beyond the last row is cut off.
    y = jax.jit(grouped_gemm)(x, w, _sizes(30, -4, 60))
    _close(y, _product(x, w, _sizes(30, 0, 10)))


def test_indices_that_x_does_not_have_read_zeros():
    x, w, sizes = _normal(0, 9, 64), _normal(1, 2, 64, 64), _sizes(3, 4)
    rows = _sizes(3, 9, -5, 0, 8, 8, 1, 2)
    run = jax.jit(lambda *given: grouped_gemm(*given[:3], rows=given[3]))
    taken = jnp.where(((rows >= 0) & (rows < 9))[:, None], x[rows], 0)
    _close(run(x, w, sizes, rows), _product(taken, w, sizes))


@pytest.mark.parametrize(
    "config",
    [
        Config(block_m=64, block_n=64, stages=2, group_m=1, warpgroups=1, cluster=1),
        Config(block_n=64, block_k=128, stages=3, warpgroups=1),
    ],
    ids=["small", "two stores a warpgroup"],
)
def test_with_any_tiles(config):
    x, w, dy = _normal(0, 90, 136), _normal(1, 4, 136, 72), _normal(2, 90, 72)
    sizes = _sizes(70, 3, 0, 12)
    _close(jax.jit(lambda *g: grouped_gemm(*g, config=config))(x, w, sizes), _product(x, w, sizes))
    dw = np.zeros(w.shape)
    for e, rows in _groups(sizes):
        dw[e] = np.asarray(x, np.float64)[rows].T @ np.asarray(dy, np.float64)[rows]
    _close(jax.jit(lambda *g: grouped_gemm_dw(*g, config=config))(x, dy, sizes), dw)


def test_one_compiled_kernel_serves_every_routing():
    x, w = _normal(0, 40, 40), _normal(1, 3, 40, 48)
    run = jax.jit(grouped_gemm)
    for sizes in (_sizes(40, 0, 0), _sizes(1, 20, 3)):
        _close(run(x, w, sizes), _product(x, w, sizes))
    assert run._cache_size() == 1


def test_under_vmap():
    x, w, sizes = _normal(0, 2, 40, 40), _normal(1, 3, 40, 48), jnp.stack([SIZES, _sizes(0, 40, 0)])
    y = jax.jit(jax.vmap(grouped_gemm, (0, None, 0)))(x, w, sizes)
    _close(y, np.stack([_product(x[i], w, sizes[i]) for i in range(2)]))


def test_default_config_pairs_blocks_where_tiles_pair():
    assert default_config(16384, 14336, 4096, 8, jnp.bfloat16) == Config()
    assert default_config(65536, 768, 2048, 128, jnp.bfloat16).cluster == 1
    assert default_config(65536, 768, 2048, 128, jnp.bfloat16, dw=True).cluster == 2
    assert default_config(64, 72, 64, 4, jnp.bfloat16).block_n == 128
