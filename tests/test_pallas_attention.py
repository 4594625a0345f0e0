"""What the harness does not ask of the Pallas hybrid attention: any layout, BAGEL's mask, one
compilation, sequences that do not touch each other, bad input.

The kernels run in the interpreter, which conftest.py switches on with its race detector.
"""

import os
import subprocess
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import HybridMeta, HybridPlan, hybrid_attention, hybrid_plan
from pallas_kernels.hybrid_attention import Config, hybrid_attention_bwd, hybrid_attention_check
from pallas_kernels.hybrid_attention_atomic import hybrid_attention_atomic_bwd
from parity.frameworks import mosaic_interpreter
from parity.problems.hybrid_attention import CAUSAL, FULL, NOISE, PAD, planned

NAMES = ("causal", "full", "noise", "pad")


@pytest.fixture(autouse=True)
def _no_races() -> Iterator[None]:
    with mosaic_interpreter.watched():
        yield


def _layout(rng: np.random.Generator, longest: int = 60) -> list[list[tuple[int, int]]]:
    """Sequences of segments of any length, none too; some sequences are PAD."""
    made = []
    for _ in range(rng.integers(1, 5)):
        if rng.random() < 0.2:
            made.append([(int(rng.integers(1, longest)), PAD)])
            continue
        modes = rng.integers(0, 3, size=rng.integers(0, 6))
        made.append([(int(rng.integers(0, longest)), int(mode)) for mode in modes])
    return made


def _tokens(layout: list[list[tuple[int, int]]]) -> int:
    return sum(length for sequence in layout for length, _ in sequence)


def _bagel(layout: list[list[tuple[int, int]]], tokens: int) -> np.ndarray:
    """BAGEL's rule: (what is before, or of one's own image), no other's noise, one's own sample."""
    image, noise, sample = (np.full(tokens, -1) for _ in range(3))
    at = count = 0
    for s, sequence in enumerate(layout):
        for length, mode in sequence:
            here = slice(at, at + length)
            image[here] = count if mode in (FULL, NOISE) else -1
            noise[here] = count if mode == NOISE else -1
            sample[here] = -1 if mode == PAD else s
            at, count = at + length, count + 1
    t = np.arange(tokens)
    own_image = (image[:, None] == image) & (image >= 0)
    foreign = (noise >= 0) & (noise[:, None] != noise)
    together = (sample[:, None] == sample) & (sample >= 0)
    return ((t[:, None] >= t) | own_image) & ~foreign & together


def test_the_mask_is_bagels_and_an_interval_of_queries_for_every_key():
    rng = np.random.default_rng(5)
    for _ in range(60):
        layout = _layout(rng)
        tokens = _tokens(layout) + int(rng.integers(0, 20))
        meta = HybridMeta.from_segments(layout, max_sequences=6, max_segments=32)
        np.testing.assert_array_equal(meta.to_dense(tokens), _bagel(layout, tokens))
        window = int(rng.integers(1, 80))
        seen = meta.to_dense(tokens, window)
        # what the kernels evaluate
        arrays = planned(*map(np.asarray, meta[:3]), None, tokens, window)
        q_start, q_end = arrays[3], arrays[4]
        t = np.arange(tokens)[:, None]
        np.testing.assert_array_equal((t >= q_start) & (t < q_end), seen)


def test_plans_of_twenty_batches_are_exact_and_compiled_once():
    tokens = 203
    traced = []

    @jax.jit
    def plan(meta):
        traced.append(meta)
        return hybrid_plan(meta, tokens=tokens, window=41)

    # The interpreter, once entered, has everything traced once more: the first batch is run twice.
    for i in (0, *range(20)):
        layout = _layout(np.random.default_rng(i), 10)
        meta = HybridMeta.from_segments(layout, max_sequences=6, max_segments=32)
        want = planned(*map(np.asarray, meta[:3]), None, tokens, 41)
        for name, got, x in zip(HybridPlan._fields, plan(meta), want, strict=True):
            np.testing.assert_array_equal(np.asarray(got), x, err_msg=f"{name} of {layout}")
    assert len(traced) <= 2


LAYOUT = [[(30, CAUSAL), (41, FULL), (9, CAUSAL)], [(7, PAD)], [(11, NOISE), (50, CAUSAL)]]


@pytest.fixture(scope="module")
def run():
    """o, lse and the gradients of a batch of two sequences, under one jit; and what it traced."""
    tokens = _tokens(LAYOUT)
    traced = []

    @jax.jit
    def run(meta, arrays, cotangents):
        traced.append(meta)
        plan = hybrid_plan(meta, tokens=tokens)
        out, pull = jax.vjp(lambda q, k, v: hybrid_attention(q, k, v, plan), *arrays)
        return *out, *pull(cotangents)

    return run, traced


def _batch(seed: int) -> tuple:
    rng, tokens = np.random.default_rng(seed), _tokens(LAYOUT)
    arrays = [jnp.asarray(rng.standard_normal((tokens, h, 64)), jnp.bfloat16) for h in (2, 1, 1, 2)]
    return arrays[:3], (arrays[3], jnp.asarray(rng.standard_normal((2, tokens)), jnp.float32))


def _dense(q: jax.Array, k: jax.Array, v: jax.Array, seen: np.ndarray) -> tuple:
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    x = jnp.einsum("qhd,kgd->hqk", q, k) / 8
    x = jnp.where(seen, x, -1e30)
    lse = jax.nn.logsumexp(x, axis=-1)
    return jnp.einsum("hqk,kgd->qhd", jnp.exp(x - lse[..., None]) * seen, v), lse


def test_values_and_gradients_and_sequences_do_not_touch_each_other(run):
    run, traced = run
    meta = HybridMeta.from_segments(LAYOUT)
    seen = meta.to_dense(_tokens(LAYOUT))
    live = seen.any(1)
    arrays, (do, dlse) = _batch(0)
    got = run(meta, arrays, (do, dlse))
    want, pull = jax.vjp(lambda q, k, v: _dense(q, k, v, seen), *arrays)
    grads = pull((do.astype(jnp.float32) * live[:, None, None], dlse * live))
    for i, (x, y) in enumerate(zip(got, (*want, *grads), strict=True)):
        x, y = (np.asarray(z, np.float64) for z in (x, y))
        x, y = (x[:, live], y[:, live]) if i == 1 else (x, y)
        assert np.linalg.norm(x - y) <= 1e-2 * np.linalg.norm(y), i
    assert (np.asarray(got[1])[:, ~live] == -np.inf).all()
    for i in (0, 2, 3, 4):
        assert (np.asarray(got[i], np.float32)[~live] == 0).all()

    # The last sequence has other tokens, and segments of other lengths.
    first = 80
    others, (do2, dlse2) = _batch(1)
    mixed = [x.at[first:].set(y[first:]) for x, y in zip(arrays, others, strict=True)]
    cotangents = do.at[first:].set(do2[first:]), dlse.at[:, first:].set(dlse2[:, first:])
    changed = HybridMeta.from_segments([*LAYOUT[:2], [(23, NOISE), (38, CAUSAL)]])
    again = run(changed, mixed, cotangents)
    for i, (x, y) in enumerate(zip(got, again, strict=True)):
        x, y = (np.asarray(z, np.float32).swapaxes(0, i == 1)[:first] for z in (x, y))
        assert x.tobytes() == y.tobytes(), i
    assert len(traced) == 1


@pytest.mark.parametrize("D", [64, 128])
def test_the_atomic_variant_adds_up_to_the_same_gradients(D):
    """Half of the columns of dq each where they are 128; in turns where they are fewer."""
    tokens = _tokens(LAYOUT)
    plan = jax.jit(lambda meta: hybrid_plan(meta, tokens=tokens))(HybridMeta.from_segments(LAYOUT))
    dead = np.asarray(plan.kv_start == plan.kv_end)
    rng = np.random.default_rng(4)
    q, k, v, o, do = (
        jnp.asarray(np.where(dead[:, None, None], np.nan, rng.standard_normal((tokens, h, D))))
        for h in (2, 1, 1, 2, 2)
    )
    q, k, v, o, do = (x.astype(jnp.bfloat16) for x in (q, k, v, o, do))
    lse = jnp.asarray(np.where(dead, -np.inf, rng.uniform(3, 5, (2, tokens))), jnp.float32)
    res = q, k, v, o, lse, None, *plan
    ordered, added = (
        jax.jit(f)(res, do) for f in (hybrid_attention_bwd, hybrid_attention_atomic_bwd)
    )
    for i, (x, y) in enumerate(zip(ordered, added, strict=True)):
        x, y = (np.asarray(z, np.float64) for z in (x, y))
        assert np.isfinite(x).all() and (y[dead] == 0).all()
        assert np.linalg.norm(x - y) <= (0 if i else 5e-3) * np.linalg.norm(x), i


def test_under_vmap():
    layouts = [[(19, FULL), (9, CAUSAL)], [(5, PAD)]], [[(11, NOISE), (17, CAUSAL)], [(5, CAUSAL)]]
    metas = [HybridMeta.from_segments(layout) for layout in layouts]
    rng = np.random.default_rng(2)
    arrays = [jnp.asarray(rng.standard_normal((2, 33, 1, 64)), jnp.bfloat16) for _ in range(3)]

    def loss(q, k, v, meta):
        o, _ = hybrid_attention(q, k, v, hybrid_plan(meta, tokens=33))
        return (o.astype(jnp.float32) ** 2).sum()

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *metas)
    got = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2))))(*arrays, stacked)
    for i, meta in enumerate(metas):
        seen = meta.to_dense(33)

        def dense(q, k, v, seen=seen):
            o, _ = _dense(q, k, v, seen)
            return (jnp.where(seen.any(1)[:, None, None], o, 0) ** 2).sum()

        want = jax.grad(dense, (0, 1, 2))(*(x[i] for x in arrays))
        for x, y in zip(got, want, strict=True):
            x, y = (np.asarray(z, np.float64) for z in (x[i], y))
            assert np.linalg.norm(x - y) <= 2e-2 * np.linalg.norm(y)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, PartitionSpec as P
from parity import frameworks
from pallas_kernels import HybridMeta, hybrid_attention, hybrid_plan

frameworks.interpreters()
mesh = jax.make_mesh((2,), ("heads",), axis_types=(AxisType.Auto,))
arrays = [jax.random.normal(jax.random.key(i), (33, 2, 64), "bfloat16") for i in range(3)]
meta = HybridMeta.from_segments([[(19, "full"), (14, "causal")]])

def attend(q, k, v, meta):
    return hybrid_attention(q, k, v, hybrid_plan(meta, tokens=33))

def grads(f):
    def loss(*arrays):
        o, lse = f(*arrays, meta)
        return (o.astype("float32") ** 2).sum() + lse.sum()
    return jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)

heads = P(None, "heads")
sharded = jax.shard_map(
    attend, mesh=mesh, in_specs=(heads, heads, heads, P()), out_specs=(heads, P("heads"))
)
for got, want in zip(grads(sharded), grads(attend), strict=True):
    assert (np.asarray(got) == np.asarray(want)).all()
"""


def test_under_shard_map():
    """Heads on two devices, with one plan; no race detector, as in test_pallas_kernels."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    subprocess.run([sys.executable, "-c", SHARDED], check=True, env=env)


def test_constructors():
    wanted = HybridMeta.from_segments([[(3, FULL), (4, CAUSAL)], [(2, FULL), (0, CAUSAL)]])
    prefix = HybridMeta.from_prefix_lengths([7, 2], [3, 2])
    splits = HybridMeta.from_splits([3, 4, 2], ["full", "causal", "full"], [7, 2], max_segments=4)
    for x, y in zip(wanted[:3], prefix[:3], strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    np.testing.assert_array_equal(splits.to_dense(9), wanted.to_dense(9))
    assert splits.seg_off.tolist() == [0, 3, 7, 9, 9]
    packed = HybridMeta.from_cu_seqlens([0, 4, 9], max_sequences=3)
    traced = jax.jit(lambda cu: HybridMeta.from_cu_seqlens(cu, "full"))(packed.cu_seqlens)
    assert packed.cu_seqlens.tolist() == [0, 4, 9, 9]
    assert packed.to_dense(10).sum() == 4 * 5 // 2 + 5 * 6 // 2
    assert traced.to_dense(10).sum() == 16 + 25


def test_without_tokens():
    plan = hybrid_plan(HybridMeta.from_segments([[]], max_segments=1), tokens=0)
    x = jnp.zeros((0, 2, 64), jnp.bfloat16)
    o, lse = hybrid_attention(x, x, x, plan)
    assert (o.shape, lse.shape, plan.tiles.shape) == ((0, 2, 64), (2, 0), (0, 8))


def _checked(cu: list, off: list, modes: list, tokens: int = 12) -> None:
    meta = (np.array(cu, np.int32), np.array(off, np.int32), np.array(modes, np.int8))
    hybrid_attention_check(HybridMeta(*map(jnp.asarray, meta)), tokens)


META = HybridMeta(*map(jnp.asarray, (np.int32([0, 9]), np.int32([0, 9]), np.int8([0]))))
Q = jnp.zeros((9, 2, 64), jnp.bfloat16)
PLAN = HybridPlan(*[jnp.zeros(9, jnp.int32)] * 6, jnp.zeros((1, 8), jnp.int32), *[jnp.zeros(1)] * 2)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: _checked([0, 9, 4], [0, 9], [0]), ValueError, "cu_seqlens: expected sorted .* at"),
        (lambda: _checked([0, 9], [0, 4, 2, 9], [0, 0, 0]), ValueError, "seg_off: expected sorted"),
        (lambda: _checked([0, 9], [0, 4], [0]), ValueError, "do not tile the sequences: they end"),
        (lambda: _checked([0, 5, 9], [0, 4, 9], [0, 1]), ValueError, "none starts at 5, where a"),
        (lambda: _checked([0, 9], [0, 9, 11], [0, 1]), ValueError, "not PAD at 11\\), the seq.* 9"),
        (lambda: _checked([0, 9], [0, 4, 9], [0, 7]), ValueError, "seg_mode: expected 0 to 3, got"),
        (lambda: _checked([0, 9], [0, 4, 9], [0, 3]), ValueError, "sequence 0 has a PAD"),
        (lambda: _checked([0, 9], [0, 9], [0], 8), ValueError, "expected at most 8 tokens, got 9"),
        (lambda: jax.jit(lambda m: hybrid_attention_check(m, 9))(META), TypeError, "a tracer"),
        (lambda: HybridMeta.from_segments([[(4, "soup")]]), ValueError, "mode: expected one"),
        (lambda: HybridMeta.from_segments([[(-4, 0)]]), ValueError, "segments: expected len"),
        (lambda: HybridMeta.from_segments([[(4, 0), (3, PAD)]]), ValueError, "PAD segment beside"),
        (lambda: HybridMeta.from_segments([[(4, 0)], []], max_sequences=1), ValueError, "max_s"),
        (lambda: HybridMeta.from_cu_seqlens([0, 4, 3]), ValueError, "cu_seqlens: expected sorted"),
        (lambda: HybridMeta.from_prefix_lengths([4], [5]), ValueError, "expected 0 to 4 for seque"),
        (lambda: HybridMeta.from_splits([3], ["full"], [4]), ValueError, "do not tile sample 0 of"),
        (lambda: HybridMeta.from_splits([3, 1], ["full"] * 2, [3]), ValueError, "sample_lens: "),
        (lambda: META.to_dense(8193), ValueError, "tokens: expected at most 8192, got 8193"),
        (lambda: hybrid_plan(META, tokens=9, window=0), ValueError, "window: expected at least 1"),
        (lambda: hybrid_plan(META, tokens=9, window=1.0), TypeError, "window: expected a Python i"),
        (lambda: hybrid_plan(META._replace(seg_mode=META.seg_off), tokens=9), TypeError, "seg_m"),
        (lambda: hybrid_plan(META._replace(pos=META.seg_off), tokens=9), ValueError, "pos: expect"),
        (lambda: hybrid_attention(Q[0], Q, Q, PLAN), ValueError, "q: expected shape"),
        (lambda: hybrid_attention(Q[..., 1:], Q, Q, PLAN), ValueError, "128 or 256, got 63"),
        (lambda: hybrid_attention(Q, Q[1:], Q, PLAN), ValueError, r"k: expected shape"),
        (lambda: hybrid_attention(Q, Q[:, [0] * 3], Q, PLAN), ValueError, "k: expected heads"),
        (lambda: hybrid_attention(Q, Q, Q[:, :1], PLAN), ValueError, "v: expected"),
        (lambda: hybrid_attention(Q, Q, Q, tuple(PLAN)), TypeError, "plan: expected a Hyb"),
        (lambda: hybrid_attention(*3 * [Q.astype("float32")], PLAN), TypeError, "which wgmma"),
        (lambda: hybrid_attention(Q, Q, Q, PLAN, scale=-1.0), ValueError, "scale: expected > 0"),
        (lambda: hybrid_attention(Q, Q, Q, PLAN, softcap=-1.0), ValueError, "softcap: expected"),
        (lambda: hybrid_attention(Q, Q, Q, PLAN, alibi=Q[0, 0]), ValueError, r"alibi: expect"),
        (lambda: hybrid_attention(Q, Q, Q, PLAN, config=1), TypeError, "config: expected"),
        (lambda: hybrid_attention_bwd((*3 * [Q], Q, Q, None, *PLAN), Q[1:]), ValueError, "do: exp"),
        (lambda: hybrid_attention(Q, Q, Q, PLAN, config=Config(stages=1)), ValueError, "stages: "),
        (lambda: Config(block_m=192), ValueError, "block_m: expected 64 or 128, got 192"),
        (lambda: Config(block_n=96), ValueError, "block_n: expected 64 or 128, got 96"),
        (lambda: Config(stages=0), ValueError, "stages: expected at least 1, got 0"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
