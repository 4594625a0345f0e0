"""The scans in Pallas beside parity: bad input, layouts of sequences, NaN, vmap and grad."""

import importlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from parity.frameworks import mosaic_interpreter

SCAN, RGLRU = (
    importlib.import_module(f"pallas_kernels.{stem}") for stem in ("linear_scan", "rglru")
)
NAMES = pytest.mark.parametrize("name", ["linear_scan", "rglru"])
PACKED = [0, 0, 1, 3, 8, 19, 19, 27, 27, 27]  # in one tile, across tiles and chunks, empty


@pytest.fixture(autouse=True)
def _no_races() -> Iterator[None]:
    with mosaic_interpreter.watched():
        yield


def normal(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def module(name: str):
    return SCAN if name == "linear_scan" else RGLRU


def arguments(name: str, cu: list[int], W: int = 37, given: bool = True) -> list:
    T, B = cu[-1], len(cu) - 1
    bounds, h0 = jnp.array(cu, jnp.int32), normal(9, B, W) if given else None
    if name == "linear_scan":
        return [
            jax.random.uniform(jax.random.key(7), (T, W), minval=0.8),
            normal(1, T, W),
            bounds,
            h0,
        ]
    rows = [normal(i, T, W) for i in range(3)]
    lam = jax.random.uniform(jax.random.key(8), (W,), minval=-4, maxval=-3)
    return [*rows, lam, bounds, h0]


def exact(args: list) -> tuple[jax.Array, jax.Array]:
    """(h, h_T) token by token in jax.numpy."""
    *rows, cu, h0 = args
    (T, W), B = rows[0].shape, len(cu) - 1
    t = jnp.arange(T)
    s = jnp.searchsorted(cu, t, side="right") - 1
    starts = (t == cu[s])[:, None]
    if len(rows) == 2:
        a, b = rows
    else:
        x, r_pre, i_pre, lam = rows
        log_a = -8 * jax.nn.sigmoid(r_pre) * jax.nn.softplus(lam)
        fresh = starts & (h0 is None)
        a = jnp.where(fresh, 0, jnp.exp(log_a))
        m = jnp.where(fresh, 1, jnp.sqrt(-jnp.expm1(2 * jnp.where(fresh, -1, log_a))))
        b = m * jax.nn.sigmoid(i_pre) * x
    states = jnp.zeros((B, W)) if h0 is None else h0

    def token(h, at):
        a, b, start, first = at
        h = a * jnp.where(start, first, h) + b
        return h, h

    _, h = lax.scan(token, jnp.zeros(W), (a, b, starts, states[s]))
    empty = (cu[1:] == cu[:-1])[:, None]
    return h, jnp.where(empty, states, h[jnp.maximum(cu[1:] - 1, 0)])


@NAMES
@pytest.mark.parametrize(
    ("cu", "given", "tiles"),
    [(PACKED, True, (8, 32, 3, 2)), ([0, 2, 29], False, (16, 64, 1, 3))],
)
def test_any_layout_in_any_chunks_is_the_recurrence(name, cu, given, tiles):
    args = arguments(name, cu, given=given)
    at = [i for i, x in enumerate(args) if x is not None and jnp.issubdtype(x.dtype, jnp.floating)]

    def of_floats(*floats):
        whole = list(args)
        for i, x in zip(at, floats, strict=True):
            whole[i] = x
        return exact(whole)

    want, pull = jax.vjp(of_floats, *(args[i] for i in at))
    dh, dh_T = normal(5, *want[0].shape), normal(6, *want[1].shape)
    fwd, bwd = (getattr(module(name), f"{name}_{end}") for end in ("fwd", "bwd"))
    config = module(name).Config(*tiles)

    @jax.jit
    def both(args, dh, dh_T):
        out, res = fwd(*args, config=config)
        return *out, *bwd(res, dh, dh_T, config=config)

    for got, right in zip(both(args, dh, dh_T), (*want, *pull((dh, dh_T))), strict=True):
        np.testing.assert_allclose(got, right, rtol=5e-5, atol=5e-5)


@NAMES
def test_nan_stays_in_its_sequence(name):
    cu = [0, 9, 9, 20, 27]
    args = arguments(name, cu)
    fwd, bwd = (getattr(module(name), f"{name}_{end}") for end in ("fwd", "bwd"))
    config = module(name).Config(8, 32, 3, 2)

    @jax.jit
    def both(args):
        out, res = fwd(*args, config=config)
        return *out, *bwd(res, normal(5, 27, 37), normal(6, 4, 37), config=config)

    clean = both(args)
    args[1] = args[1].at[10].set(jnp.nan)  # in sequence 2
    args[-1] = args[-1].at[3].set(jnp.nan)  # the state before sequence 3
    hit = both(args)
    for before, after in zip(clean, hit, strict=True):
        if before.ndim == 2:  # dlam is a sum over all
            own = slice(0, 2 if before.shape[0] == 4 else 9)
            assert jnp.array_equal(before[own], after[own])
    assert jnp.isnan(hit[0][10:]).all() and jnp.array_equal(clean[0][9], hit[0][9])


ROWS, CU, STATE = jnp.zeros((6, 5)), jnp.array([0, 4, 6], jnp.int32), jnp.zeros((2, 5))


def call(a=ROWS, b=ROWS, cu_seqlens=CU, h0=STATE, config=None):
    return SCAN.linear_scan(a, b, cu_seqlens, h0, config=config)


def gated(r_pre=ROWS, i_pre=ROWS, lam=STATE[0], **options):
    return RGLRU.rglru(ROWS, r_pre, i_pre, lam, CU, STATE, **options)


def checked(*bounds: int, T: int = 6):
    SCAN.linear_scan_check(jnp.array(bounds, jnp.int32), T=T)


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (lambda: call(a=[[1.0]]), TypeError, "a: expected a JAX array, got list"),
        (lambda: call(a=ROWS[0]), ValueError, r"a: expected shape \[T, W\], got \[5\]"),
        (lambda: call(b=ROWS[:, 1:]), ValueError, r"b: expected shape \[6, 5\], got \[6, 4\]"),
        (lambda: call(b=ROWS.astype("float16")), TypeError, "b: expected dtype float32"),
        (
            lambda: call(cu_seqlens=CU.astype("int16")),
            TypeError,
            "cu_seqlens: expected dtype int32",
        ),
        (lambda: call(cu_seqlens=CU[0]), ValueError, r"cu_seqlens: expected shape \[B \+ 1\]"),
        (lambda: call(cu_seqlens=CU[:0]), ValueError, r"cu_seqlens: expected shape \[B \+ 1\]"),
        (lambda: call(h0=ROWS), ValueError, r"h0: expected shape \[2, 5\], got \[6, 5\]"),
        (lambda: call(h0=STATE.astype("float16")), TypeError, "h0: expected dtype float32"),
        (lambda: call(config=3), TypeError, "config: .*Config or None"),
        (lambda: gated(r_pre=ROWS[1:]), ValueError, r"r_pre: expected shape \[6, 5\]"),
        (lambda: gated(i_pre=ROWS.astype("float16")), TypeError, "i_pre: expected dtype float32"),
        (lambda: gated(lam=ROWS[:, 0]), ValueError, r"lam: expected shape \[5\], got \[6\]"),
        (lambda: gated(c=jnp.float32(8)), TypeError, "c: expected a Python float or int"),
        (lambda: gated(config=SCAN.Config()), TypeError, "config: expected pallas_kernels.rglru"),
        (lambda: SCAN.Config(block_t=10), ValueError, "block_t: expected a multiple of 4"),
        (lambda: SCAN.Config(block_c=48), ValueError, "block_c: expected 32, 64, 128 or 256"),
        (lambda: SCAN.Config(chunks=0), ValueError, "chunks: expected at least 1"),
        (lambda: SCAN.Config(stages=1), ValueError, "stages: expected 2 to 32"),
        (lambda: checked(0, 4, 3), ValueError, r"got 3 after 4 \(sequence 1"),
        (lambda: checked(0, 4), ValueError, "to end with T = 6, got 4"),
        (lambda: checked(1, 6), ValueError, "to begin with 0, got .1"),
        (lambda: SCAN.linear_scan_step(ROWS, ROWS[1:]), ValueError, "b: expected shape"),
    ],
)
def test_bad_input_is_named(bad, error, words):
    with pytest.raises(error, match=words):
        bad()


def test_a_narrow_tile_of_16_bits_has_no_backward():
    res = (ROWS.astype("float16"), ROWS.astype("float16"), CU, None)
    with pytest.raises(ValueError, match="block_c: expected at least 64 in a backward, got 32"):
        SCAN.linear_scan_bwd(res, ROWS, config=SCAN.Config(8, 32))


def test_a_good_cu_seqlens_passes():
    checked(0, 0, 4, 6, 6)
    checked(0, T=0)


@pytest.mark.parametrize("wrong", [[0, 20, 5, 16], [3, 900, -7, 16], [0, 0, 0, 0]])
def test_a_wrong_cu_seqlens_comes_to_an_end(wrong):
    """What comes is not defined."""
    a, b, _, h0 = arguments("linear_scan", [0, 4, 9, 16])
    config = SCAN.Config(8, 32, 2, 2)

    @jax.jit
    def both(a, b, cu, h0):
        (h, h_T), res = SCAN.linear_scan_fwd(a, b, cu, h0, config=config)
        return h, h_T, *SCAN.linear_scan_bwd(res, b, h0, config=config)

    shapes = [x.shape for x in both(a, b, jnp.array(wrong, jnp.int32), h0)]
    assert shapes == [x.shape for x in (a, h0, a, b, h0)]


@NAMES
@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_nothing_to_scan(name, shape):
    T, W = shape
    *rows, cu, h0 = arguments(name, [0, T, T], W)
    (h, h_T), res = getattr(module(name), f"{name}_fwd")(*rows, cu, h0)
    assert h.shape == shape and jnp.array_equal(h_T, h0)
    *grads, dh0 = getattr(module(name), f"{name}_bwd")(res, h, h0)
    assert jnp.array_equal(dh0, h0) and not any(g.any() for g in grads)


def test_vmap_and_grad_under_jit(name="linear_scan"):
    """One block of channels and a T that is no multiple of a part."""
    first, second = (arguments(name, cu, W=32) for cu in ([0, 5, 11], [0, 0, 11]))
    stacked = [jnp.stack([x, y]) for x, y in zip(first, second, strict=True)]

    def loss(f):
        def total(rows, others):
            h, h_T = jax.vmap(lambda rows, others: f([rows, *others]))(rows, others)
            return (h * jnp.arange(32)).sum() + (h_T**2).sum()

        return jax.jit(jax.value_and_grad(total))

    got = loss(lambda args: getattr(module(name), name)(*args))(stacked[0], stacked[1:])
    want = loss(exact)(stacked[0], stacked[1:])
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@NAMES
@pytest.mark.parametrize("given", [False, True])
def test_a_step_is_a_sequence_of_one_token(name, given):
    *rows, cu, h0 = arguments(name, [0, 1, 2, 3], given=given)
    for got, want in zip(
        getattr(module(name), f"{name}_step")(*rows, h0), exact([*rows, cu, h0]), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_every_size_gets_a_config_that_fits(dtype):
    for T, W, B in ((1, 1, 1), (8192, 4096, 1), (65536, 4096, 8), (4096, 2560, 4096), (99, 64, 7)):
        for name, arrays in (("linear_scan", (2, 3)), ("rglru", (3, 5))):
            for which, count in zip(("fwd", "bwd"), arrays, strict=True):
                config = module(name).default_config(T, W, B, dtype, which)
                slot = config.block_t * config.block_c * jnp.dtype(dtype).itemsize
                assert count * config.stages * slot <= 100 * 1024 and config.block_t <= 256
