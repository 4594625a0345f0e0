"""Decay attention, its adapters, in Pallas beside parity: options, layouts, bad input, NaN."""

import functools
import importlib
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from parity.frameworks import mosaic_interpreter

DECAY, DECAY_GATES, STEP, RETENTION, SSD = (
    importlib.import_module(f"pallas_kernels.{stem}")
    for stem in (
        "decay_attention", "decay_attention_gates", "decay_attention_step", "retention",
        "mamba2_ssd",
    )
)  # fmt: skip
HALF = jnp.float16
PACKED = [0, 0, 1, 20, 150, 150, 211, 211]  # within a chunk, across chunks and spans, empty
SCALE = 0.25


@pytest.fixture(autouse=True)
def _no_races() -> Iterator[None]:
    with mosaic_interpreter.watched():
        yield


def normal(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def arguments(cu, H=2, Hq=1, K=48, V=48, constant=False, weighted=True, given=True) -> list:
    """q, k, v, g, i, S0, cu_seqlens."""
    T, B = cu[-1], len(cu) - 1
    q, k = (normal(seed, T, Hq, K, dtype=HALF) for seed in range(2))
    g = -jax.random.uniform(jax.random.key(3), (H,) if constant else (T, H), maxval=0.1)
    i = normal(4, T, H) if weighted else None
    S0 = normal(5, B, H, K, V) if given else None
    return [q, k, normal(2, T, H, V, dtype=HALF), g, i, S0, jnp.array(cu, jnp.int32)]


def exact(q, k, v, g, u, S0, cu, scale):
    """(y, S_T) token by token; u: weights, not their logarithms."""
    (T, Hq, K), (H, V) = q.shape, v.shape[1:]
    q, k = (jnp.repeat(x, H // Hq, axis=1) for x in (q, k))
    g, u = (jnp.broadcast_to(x, (T, H)) for x in (g, 1.0 if u is None else u))

    def token(S, at):
        q, k, v, g, u = at
        S = jnp.exp(g)[:, None, None] * S + u[:, None, None] * k[:, :, None] * v[:, None, :]
        return S, scale * jnp.einsum("hk,hkv->hv", q, S)

    ys, last = [], []
    for s, (start, stop) in enumerate(itertools.pairwise(cu)):
        S = jnp.zeros((H, K, V)) if S0 is None else S0[s]
        S, y = lax.scan(token, S, tuple(x[start:stop] for x in (q, k, v, g, u)))
        ys.append(y)
        last.append(S)
    return jnp.concatenate(ys), jnp.stack(last)


def truth(f, args, cotangents):
    """(outputs, gradients) of f in float64; None and what holds integers have no gradient."""
    with jax.enable_x64(True):
        at = [
            n for n, x in enumerate(args) if x is not None and jnp.issubdtype(x.dtype, jnp.floating)
        ]
        wide = [jnp.asarray(np.asarray(args[n], np.float64)) for n in at]

        def of(*floats):
            given = [None if x is None else np.asarray(x) for x in args]
            for n, x in zip(at, floats, strict=True):
                given[n] = x
            return f(*given)

        out, pull = jax.vjp(of, *wide)
        grads = pull(tuple(jnp.asarray(np.asarray(x, np.float64)) for x in cotangents))
        return [np.asarray(x) for x in (*out, *grads)]


def close(got, want):
    """Within SPECS' limits for float16: of y and gradients by rows, of states and gates."""
    for ours, right in zip(got, want, strict=True):
        assert ours.shape == right.shape
        limit = 2e-3 if ours.dtype == HALF else 5e-3
        error = np.linalg.norm(np.asarray(ours, np.float64) - right)
        assert error <= limit * max(np.linalg.norm(right), 1e-3), error / np.linalg.norm(right)


def interpreted(f):
    """f under jit, done before anything else runs: the interpreter wants the CPU to itself."""
    compiled = jax.jit(f)
    return lambda *args: jax.block_until_ready(compiled(*args))


@functools.cache
def both(config):
    @interpreted
    def run(args, dy, dS_T):
        out, res = DECAY.decay_attention_fwd(*args, scale=SCALE, config=config)
        return *out, *DECAY.decay_attention_bwd(res, dy, dS_T, scale=SCALE, config=config)

    return run


CUT = DECAY.Config(64, spans=2, stages=2, warpgroups=2)


def packed():
    args = arguments(PACKED)
    return args, normal(6, *args[2].shape, dtype=HALF), normal(7, *args[5].shape)


def test_any_layout_in_any_spans_is_the_recurrence():
    args, *cotangents = packed()

    def of(q, k, v, g, i, S0, cu):
        return exact(q, k, v, g, jnp.exp(i), S0, PACKED, SCALE)

    close(both(CUT)(args, *cotangents), truth(of, args, cotangents))


def test_nothing_decays_at_a_first_token_without_a_state():
    """The gradient of its gate is 0, not what rounding leaves of sums that cancel."""
    args = arguments([0, 50, 50, 83], given=False)
    dy, dS_T = normal(6, 83, 2, 48, dtype=HALF), normal(7, 3, 2, 48, 48)

    def gradient(*args):
        _, res = DECAY.decay_attention_fwd(*args)
        return DECAY.decay_attention_bwd(res, dy, dS_T)[3]

    dg = np.asarray(jax.jit(gradient)(*args))
    assert not dg[[0, 50]].any() and dg[[1, 51]].all()


def test_nan_stays_in_its_sequence_and_a_wrong_cu_seqlens_comes_to_an_end():
    args, *cotangents = packed()
    clean = both(CUT)(args, *cotangents)
    hit = list(args)
    for n in range(5):
        hit[n] = args[n].at[30].set(jnp.nan)  # in the sequence of 20 .. 149
    hit[5] = args[5].at[6].set(jnp.nan)  # the state before the last, empty sequence
    for n, (before, after) in enumerate(zip(clean, both(CUT)(hit, *cotangents), strict=True)):
        if before.shape[0] == PACKED[-1]:
            own, others = slice(20, 150), [slice(0, 20), slice(150, None)]
        else:
            own, others = slice(3, 4), [slice(0, 3), slice(4, 6)]
        assert jnp.isnan(after[own]).any()
        for rows in others:
            assert jnp.array_equal(before[rows], after[rows]), n
    for wrong in ([0, 200, 180, 180, 180, 180, 180, 180], [-7, -7, 3, 900, 900, 900, 900, 999]):
        bounds = [*args[:6], jnp.array(wrong, jnp.int32)]
        got = both(CUT)(bounds, *cotangents)
        assert [x.shape for x in got] == [x.shape for x in clean]


def test_options_left_out():
    """One warpgroup, whole sequences, one decay a head, no weights, no states before."""
    cu = [0, 70, 79]
    args = arguments(cu, H=1, K=16, V=64, constant=True, weighted=False, given=False)
    config = DECAY.Config(64, stages=3, warpgroups=1)
    got = interpreted(lambda *a: DECAY.decay_attention(*a, scale=SCALE, config=config))(*args)
    want = truth(
        lambda *a: exact(*a[:4], None, None, cu, SCALE), args, [np.zeros(x.shape) for x in got]
    )
    close(got, want[:2])


def test_wide_keys_are_shared_by_blocks():
    """Three cuts of K's 144 columns, four panels that they make values' gradients of in turn."""
    cu = [0, 66, 70]
    args = arguments(cu, K=144, V=112)
    dy, dS_T = normal(6, *args[2].shape, dtype=HALF), normal(7, *args[5].shape)

    def of(q, k, v, g, i, S0, _):
        return exact(q, k, v, g, jnp.exp(i), S0, cu, SCALE)

    @interpreted
    def run(*floats):
        out, pull = jax.vjp(lambda *a: DECAY.decay_attention(*a, args[6], scale=SCALE), *floats)
        return *out, *pull((dy, dS_T))

    close(run(*args[:6]), truth(of, args, (dy, dS_T)))


def test_retention_is_its_definition():
    cu, H, K, V = [0, 5, 73], 3, 64, 64
    q, k, v, _, _, S0, bounds = arguments(cu, H=H, Hq=H, K=K, V=V)
    dy, dS_T = normal(6, *v.shape, dtype=HALF), normal(7, *S0.shape)

    def of(q, k, v, S0, _):
        gamma = 1 - 2.0 ** (-5 - np.arange(H))
        return exact(q, k, v, np.log(gamma), None, S0, cu, K**-0.5)

    @interpreted
    def run(q, k, v, S0):
        out, pull = jax.vjp(lambda *a: RETENTION.retention(*a, bounds), q, k, v, S0)
        return *out, *pull((dy, dS_T))

    close(run(q, k, v, S0), truth(of, [q, k, v, S0, bounds], (dy, dS_T)))


def test_ssd_is_its_definition():
    cu, H, G, P, N = [0, 66, 66, 71], 2, 1, 64, 64
    T = cu[-1]
    x, z, dy = (normal(seed, T, H, P, dtype=HALF) for seed in range(3))
    B, C = (normal(seed, T, G, N, dtype=HALF) for seed in (3, 4))
    dt, bias, D = normal(5, T, H), normal(6, H) - 4, normal(7, H, P)
    dt = dt.at[::7].set(-200.0)  # step sizes of 0
    A, h0, dh_T = -jnp.array([0.5, 2.0]), normal(8, 3, H, P, N), normal(9, 3, H, P, N)
    bounds, limit = jnp.array(cu, jnp.int32), (0.0, 0.06)

    def of(x, dt, A, B, C, D, z, bias, _, h0):
        u = jnp.clip(jax.nn.softplus(dt + bias), *limit)
        y, h_T = exact(C, B, x, u * A, u, h0.mT, cu, 1.0)
        return (y + D * x) * jax.nn.silu(z), h_T.mT

    @interpreted
    def run(*floats):
        def f(*a):
            options = {"dt_softplus": True, "dt_limit": limit}
            return SSD.mamba2_ssd(*a[:8], bounds, a[8], **options)

        out, pull = jax.vjp(f, *floats)
        return *out, *pull((dy, dh_T))

    given = [x, dt, A, B, C, D, z, bias]
    close(run(*given, h0), truth(of, [*given, bounds, h0], (dy, dh_T)))


@pytest.mark.parametrize(("given", "constant"), [(True, False), (False, True)])
def test_a_step_is_a_sequence_of_one_token(given, constant):
    cu = [0, 1, 2, 3]
    *args, _ = arguments(cu, H=4, Hq=2, given=given, constant=constant, weighted=given)
    got = interpreted(lambda *a: STEP.decay_attention_step(*a, scale=SCALE))(*args)
    q, k, v, g, i, S0 = args
    u = None if i is None else jnp.exp(i)
    want = exact(*(x.astype(jnp.float32) for x in (q, k, v)), g, u, S0, cu, SCALE)
    close(got, [np.asarray(x, np.float64) for x in want])


def test_gates_of_more_heads_than_a_block_has_lanes():
    """Two blocks of heads, the second one of 2; an odd number of tokens in a chunk."""
    T, H = 67, 130
    g, i, cu = -jnp.abs(normal(0, T, H)), normal(1, T, H), jnp.array([0, 64, T], jnp.int32)
    dgates = normal(2, 3, H, 132)

    @interpreted
    def run(g, i, dgates):
        gates = DECAY_GATES.gates_of(g, i, cu, T, H)
        return gates, *DECAY_GATES.gates_bwd(
            dgates, gates, cu, T, constant=False, weighted=True, entered=True
        )

    gates, dg, di = run(g, i, dgates)
    for slot, (start, stop) in ((0, (0, 64)), (2, (64, T))):
        n, tokens = stop - start, slice(start, stop)
        b, u = gates[slot, :, :n].T, gates[slot, :, 64 : 64 + n].T
        np.testing.assert_allclose(b, jnp.cumsum(g[tokens], 0) / np.log(2), rtol=1e-5)
        np.testing.assert_allclose(u, jnp.exp(i[tokens]), rtol=1e-5)
        assert not gates[slot, :, 64 + n : 128].any()
        assert jnp.array_equal(dg[tokens], dgates[slot, :, :n].T)
        np.testing.assert_allclose(di[tokens], dgates[slot, :, 64 : 64 + n].T * u, rtol=1e-5)


ROWS, VALUES, GATES = jnp.zeros((6, 2, 32), HALF), jnp.zeros((6, 4, 16), HALF), jnp.zeros((6, 4))
CU, STATE = jnp.array([0, 4, 6], jnp.int32), jnp.zeros((2, 4, 32, 16))


def call(q=ROWS, k=ROWS, v=VALUES, g=GATES, i=GATES, S0=STATE, cu_seqlens=CU, **options):
    return DECAY.decay_attention(q, k, v, g, i, S0, cu_seqlens, **options)


def ssd(x=VALUES, dt=GATES, A=GATES[0], B=ROWS, D=None, z=None, **options):
    return SSD.mamba2_ssd(x, dt, A, B, B, D, z, None, CU, None, **options)


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (lambda: call(q=[[1.0]]), TypeError, "q: expected a JAX array, got list"),
        (lambda: call(q=ROWS[0]), ValueError, r"q: expected shape \[T, Hq, K\]"),
        (lambda: call(q=ROWS.astype("float32")), TypeError, "q: .*TF32"),
        (lambda: call(k=ROWS[1:]), ValueError, r"k: expected shape \[6, 2, 32\]"),
        (lambda: call(v=VALUES.astype("bfloat16")), TypeError, "v: expected dtype float16"),
        (lambda: call(v=VALUES[:, :3]), ValueError, "v: expected heads that are a multiple of"),
        (lambda: call(v=VALUES[:, :, :9]), ValueError, "v: expected a width V .* of 16, got 9"),
        (lambda: call(q=ROWS[..., :8], k=ROWS[..., :8]), ValueError, "q: expected a width K"),
        (lambda: call(g=GATES[:, 1:]), ValueError, r"g: expected shape \[6, 4\]"),
        (lambda: call(g=GATES[0, 1:]), ValueError, r"g: expected shape \[4\]"),
        (lambda: call(i=GATES.astype(HALF)), TypeError, "i: expected dtype float32"),
        (lambda: call(S0=STATE[1:]), ValueError, r"S0: expected shape \[2, 4, 32, 16\]"),
        (lambda: call(cu_seqlens=CU[:0]), ValueError, r"cu_seqlens: expected shape \[B \+ 1\]"),
        (lambda: call(cu_seqlens=CU.astype("int16")), TypeError, "cu_seqlens: expected dtype"),
        (lambda: call(scale=jnp.float32(1)), TypeError, "scale: expected a Python float or int"),
        (lambda: call(chunk=48), ValueError, "chunk: expected 64"),
        (lambda: call(config=3), TypeError, "config: .*Config or None"),
        (lambda: call(config=DECAY.Config(128, warpgroups=1), q=jnp.zeros((6, 2, 256), HALF),
                      k=jnp.zeros((6, 2, 256), HALF), S0=None), ValueError, "block_v: expected 64"),
        (lambda: call(v=VALUES[:, :2], g=GATES[:, :2], i=None, S0=None,
                      config=DECAY.Config()), ValueError, "warpgroups: expected a divisor"),
        (lambda: DECAY.Config(block_v=32), ValueError, "block_v: expected 64 or 128"),
        (lambda: DECAY.Config(spans=0), ValueError, "spans: expected at least 1"),
        (lambda: DECAY.Config(stages=0), ValueError, "stages: expected at least 1"),
        (lambda: DECAY.Config(warpgroups=3), ValueError, "warpgroups: expected 1 or 2"),
        (lambda: DECAY.decay_attention_check(CU, T=7), ValueError, "to end with T = 7, got 6"),
        (lambda: RETENTION.retention(ROWS, ROWS, VALUES, None, CU), ValueError, "q: expected sh"),
        (lambda: ssd(dt=GATES[1:]), ValueError, r"dt: expected shape \[6, 4\]"),
        (lambda: ssd(A=GATES), ValueError, r"A: expected shape \[4\]"),
        (lambda: ssd(B=ROWS[1:]), ValueError, r"x: expected shape \[5, H, V\]"),
        (lambda: ssd(D=GATES), ValueError, r"D: expected shape \[4, 16\]"),
        (lambda: ssd(z=ROWS), ValueError, r"z: expected shape \[6, 4, 16\]"),
        (lambda: ssd(dt_limit=(1.0, 0.0)), ValueError, "dt_limit: expected .low, high."),
        (lambda: ssd(dt_softplus=1), TypeError, "dt_softplus: expected a Python bool"),
    ],
)  # fmt: skip
def test_bad_input_is_named(bad, error, words):
    with pytest.raises(error, match=words):
        bad()


@pytest.mark.parametrize("shape", [(0, 2, 16, 16), (3, 0, 16, 16), (3, 2, 16, 0)])
def test_nothing_to_attend_to(shape):
    T, H, K, V = shape
    args = arguments([0, T, T], H=H, Hq=H, K=K, V=V)
    (y, S_T), res = DECAY.decay_attention_fwd(*args)
    assert y.shape == (T, H, V) and jnp.array_equal(S_T, args[5])
    *grads, dS0 = DECAY.decay_attention_bwd(res, y, S_T)
    assert jnp.array_equal(dS0, S_T) and not any(g.any() for g in grads)


@pytest.mark.parametrize("which", ["fwd", "bwd"])
def test_every_size_gets_a_config_that_fits(which):
    sizes = itertools.product((1, 99, 65536), (1, 40), ((1, 1), (1, 80), (8, 128)), (16, 128, 256))
    for T, B, (Hq, H), K in sizes:
        for V in (16, 64, 512):
            config = DECAY.default_config(T, B, Hq, H, K, V, HALF, which)
            DECAY._check_fits(config, Hq, H, K, V)
            assert DECAY._span_of(T, config) % 64 == 0
