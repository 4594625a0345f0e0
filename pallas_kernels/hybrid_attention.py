"""Attention over packed sequences of causal text and of images that see all of themselves.

    o[q, h] = sum_j p[q, j] v[j, h / G]      over the j that q sees; G = Hq / Hk heads share k and v
    p[q, j] = exp(x[q, j] - lse[h, q])       lse[h, q] = log sum_j exp(x[q, j])
    x[q, j] = scale * q[q, h] . k[j, h / G]  softcap * tanh(x / softcap) if softcap is given,
                                             - slope[h] |pos[q] - pos[j]| with ALiBi

    plan: bounds for every token, for every tile of 64, and the longest tiles first
    for each tile of queries and head of this block:
        memory warpgroup:   TMA q; for each tile of keys that one of the queries may see: wait until
                            the slots are free; TMA k and v into them
        compute warpgroups: 64 queries each; for each such tile of keys, ni, after the one before:
                            x = q @ k[ni]^T, and acc += p @ v[before], under way while
                            p = online softmax of x, masked where the plan does not call it free
                            o = acc / row_sum

Both roles walk over the same tiles of keys: they jump over images under diffusion that nobody here
sees. Memory of dead tokens may hold anything: their scores are masked, and rows of v that a masked
p would multiply are cleared in shared memory, in those tiles that have any.

Limits: Hopper; bfloat16 and float16; head dims 64, 96, 128 and 256.

Twin: triton_kernels/hybrid_attention.py.

Sources: roles and the order of the two products follow FlashAttention-3 and JAX's own Hopper
attention (jax.experimental.pallas.ops.gpu.attention_mgpu), but for their turns of the warpgroups,
which gained nothing (docs/tried.md); tiles by the bounds of their intervals follow Tokamax's
attention; what is seen is BAGEL's mask.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import _lib
from .hybrid_attention_bwd import backward
from .hybrid_attention_meta import HybridMeta, check
from .hybrid_attention_plan import ORDERED, TILE, HybridPlan, plan_of
from .hybrid_attention_tiles import (
    COLUMN,
    COMPUTE_REGISTERS,
    LOG2E,
    MEMORY_REGISTERS,
    PARAMS,
    ROW,
    WARPGROUPS,
    Tiles,
    across,
    aligned,
    capped,
    clear_dead,
    filled,
    load,
    padded,
    visible,
    warpgroup,
)

DTYPES = (jnp.bfloat16, jnp.float16)
HEAD_DIMS = (64, 96, 128, 256)


@dataclass(frozen=True)
class Config:
    """Tile sizes and resources of the kernels; the result does not depend on them.

    block_m: rows of the tile that a block of threads owns: queries, or keys for dk and dv. 128; or
        64 in the backward, where the warpgroups then share the rows and part the columns.
    block_n: rows of a slot of what it walks over.
    stages: slots of each ring; the forward needs 2.
    """

    block_m: int = 128
    block_n: int = 128
    stages: int = 2

    def __post_init__(self) -> None:
        if self.block_m not in (64, 128):
            raise ValueError(f"block_m: expected 64 or 128, got {self.block_m}")
        if self.block_n not in (64, 128):
            raise ValueError(f"block_n: expected 64 or 128, got {self.block_n}")
        if self.stages < 1:
            raise ValueError(f"stages: expected at least 1, got {self.stages}")


def default_config(T: int, Hq: int, Hk: int, D: int, dtype: Any, which: str = "fwd") -> Config:
    """The Config for T tokens on a Hopper; which: "fwd", "dq", "dkdv", or "atomic", the kernel of
    hybrid_attention_atomic that makes all gradients."""
    del T, Hq, Hk, dtype
    if which == "fwd":
        # Scores and o take 128 to 160 registers of a thread, and q with two slots each of k and v
        # fill shared memory.
        return Config(block_n=64 if D > 128 else 128)
    if which == "atomic":
        return Config(128, 64, 2)  # dx and the sums of dq need shared memory too
    # Beside the sums there is room for scores and their gradients of 64 columns each. Sums wider
    # than 128 are parted: their registers, two tiles of 64 rows and two slots leave no more.
    stages = 3 if which == "dkdv" and D <= 128 else 2
    return Config(block_m=128 if D <= 128 else 64, block_n=64, stages=stages)


def _hybrid_attention_kernel(
    *refs: Any,
    scale: float,
    softcap: float,
    biased: bool,
    config: Config,
) -> None:
    given = iter(refs)
    q_gmem, k_gmem, v_gmem = (next(given) for _ in range(3))  # [T, heads, D]
    kv_start_gmem, kv_end_gmem, q_start_gmem, q_end_gmem, pos_gmem = (
        next(given) for _ in range(5)
    )  # [T]
    tiles_gmem, order_gmem = next(given), next(given)
    alibi_gmem = next(given) if biased else None  # [Hq]
    o_gmem, lse_gmem = next(given), next(given)  # [T, Hq, D], [Hq, T]
    q_smem, k_smem, v_smem, lse_smem = (next(given) for _ in range(4))
    q_full, q_free, k_full, k_free, v_full, v_free, clean = (next(given) for _ in range(7))
    o_smem = next(given, None)  # where q is still needed when o is stored
    _, Hq, D = q_gmem.shape
    G = Hq // k_gmem.shape[1]
    block_n, stages = config.block_n, config.stages
    tiles = Tiles(tiles_gmem, block_n)
    wg = lax.axis_index("wg")
    items = functools.partial(
        plgpu.nd_loop,
        (order_gmem.shape[0], Hq),
        collective_axes="sm",
        init_carry=jnp.int32(0),
    )

    def place(item: Any) -> Any:
        # --- 1. which tile
        mi = order_gmem[item.index[0]]
        low, high = tiles.keys_of(mi * WARPGROUPS, WARPGROUPS)
        return mi, item.index[1], jnp.minimum(tiles.seek(low, mi * ORDERED), high - 1), high

    def slot_of(step: Any) -> Any:
        # Steps are counted across tiles: the rings do not stop between them.
        return lax.rem(step, jnp.int32(stages))

    @pl.when(wg == WARPGROUPS)
    def _memory() -> None:
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

        @items()
        def _item(item: Any, *, carry: Any) -> Any:
            mi, h, ni, high = place(item)
            plgpu.barrier_wait(q_free)
            # Beyond T TMA fills with zeros.
            plgpu.copy_gmem_to_smem(q_gmem.at[pl.ds(mi * ORDERED, ORDERED), h], q_smem, q_full)

            def fill(state: Any) -> Any:
                ni, step = state
                slot, keys = slot_of(step), pl.ds(ni * block_n, block_n)
                plgpu.barrier_wait(k_free.at[slot])
                plgpu.copy_gmem_to_smem(k_gmem.at[keys, h // G], k_smem.at[slot], k_full.at[slot])
                plgpu.barrier_wait(v_free.at[slot])
                plgpu.copy_gmem_to_smem(v_gmem.at[keys, h // G], v_smem.at[slot], v_full.at[slot])
                return tiles.seek(ni + 1, mi * ORDERED), step + 1

            return lax.while_loop(lambda state: state[0] < high, fill, (ni, carry))[1]

        # A barrier may not go away before all its completions were waited for.
        plgpu.barrier_wait(q_free)
        for slot in range(stages):
            plgpu.barrier_wait(k_free.at[slot])
            plgpu.barrier_wait(v_free.at[slot])

    @pl.when(wg < WARPGROUPS)
    def _compute() -> None:
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        plgpu.barrier_arrive(q_free)  # all is free at the start
        for slot in range(stages):
            plgpu.barrier_arrive(k_free.at[slot])
            plgpu.barrier_arrive(v_free.at[slot])

        def own() -> Any:
            return pl.ds(warpgroup() * TILE, TILE)

        @items()
        def _item(item: Any, *, carry: Any) -> Any:
            mi, h, first, high = place(item)
            row = mi * ORDERED + wg * TILE

            def masked(x: jax.Array, ni: Any) -> jax.Array:
                start, stop = (
                    load(x_gmem, ni * block_n, block_n, COLUMN)
                    for x_gmem in (q_start_gmem, q_end_gmem)
                )
                return jnp.where(visible(row, start, stop, TILE), x, -jnp.inf)

            def look(ni: Any) -> Any:
                """(the tile after ni, whether ni needs no mask, whether it has dead tokens)"""
                seen = tiles.seen(ni, mi * WARPGROUPS + wg)
                return tiles.seek(ni + 1, mi * ORDERED), seen, tiles.dead(ni)

            def softmax(x: jax.Array, ni: Any, free: Any, row_max: Any, row_sum: Any) -> Any:
                """(p, the new row_max and row_sum, what the old sums are to be multiplied by)"""
                slope = pos = theirs = None
                if alibi_gmem is not None:
                    slope, pos = alibi_gmem[h], load(pos_gmem, row, TILE, ROW)
                    theirs = load(pos_gmem, ni * block_n, block_n, COLUMN)
                x, factor, _ = capped(x, scale, softcap, slope, pos, theirs)
                x = lax.cond(free, lambda x: x, lambda x: masked(x, ni), x)
                top = jnp.maximum(row_max, x.max(axis=1) * factor)
                base = jnp.where(top == -jnp.inf, 0.0, top)  # a row may have seen nothing yet
                shrink = jnp.exp2(row_max - base)
                p = jnp.exp2(x * factor - across(base, block_n))
                return p.astype(v_smem.dtype), top, row_sum * shrink + p.sum(axis=1), shrink

            def clear_v(dead: Any, ni: Any, slot: Any) -> None:
                v_slot, n = v_smem.at[slot], ni * block_n
                clear_dead((v_slot,), dead, n, kv_start_gmem, kv_end_gmem, wg, clean)

            # --- 2. main loop
            second, free, dead = look(first)
            plgpu.barrier_wait(q_full)

            def first_scores(x_acc: Any) -> jax.Array:
                slot = slot_of(carry)
                plgpu.barrier_wait(k_full.at[slot])
                plgpu.wgmma(x_acc, q_smem.at[own()], k_smem.at[slot].T)
                x = x_acc[...]
                plgpu.barrier_arrive(k_free.at[slot])
                return x

            x = pl.run_scoped(first_scores, plgpu.ACC((TILE, block_n), jnp.float32))
            p, row_max, row_sum, _ = softmax(
                x, first, free, filled((TILE,), -jnp.inf), filled((TILE,), 0.0)
            )
            plgpu.barrier_wait(v_full.at[slot_of(carry)])

            def visit(state: Any) -> Any:
                dead, last, ni, step, acc, p, row_max, row_sum = state
                slot, v_slot = slot_of(step + 1), slot_of(step)
                after, free, dead_too = look(ni)  # here, since memory takes its time
                plgpu.barrier_wait(k_full.at[slot])
                clear_v(dead, last, v_slot)

                def products(x_acc: Any, o_acc: Any) -> Any:
                    o_acc[...] = acc
                    plgpu.wgmma(x_acc, q_smem.at[own()], k_smem.at[slot].T)
                    plgpu.wgmma(o_acc, p, v_smem.at[v_slot])
                    x = plgpu.wgmma_accumulator_load(x_acc, wait_n=1)
                    plgpu.barrier_arrive(k_free.at[slot])
                    new = softmax(x, ni, free, row_max, row_sum)
                    # Here, so that o is not waited for before: ptxas moves no arithmetic past it.
                    plgpu.barrier_wait(v_full.at[slot])
                    return o_acc[...], *new

                made = pl.run_scoped(
                    products,
                    plgpu.ACC((TILE, block_n), jnp.float32),
                    plgpu.ACC((TILE, D), jnp.float32),
                )
                o, p, row_max, row_sum, shrink = made
                plgpu.barrier_arrive(v_free.at[v_slot])
                acc = o * across(shrink, D)
                return dead_too, ni, after, step + 1, acc, p, row_max, row_sum

            state = (dead, first, second, carry, filled((TILE, D), 0.0), p, row_max, row_sum)
            state = lax.while_loop(lambda state: state[2] < high, visit, state)
            dead, last, _, step, acc, p, row_max, row_sum = state
            v_slot = slot_of(step)
            clear_v(dead, last, v_slot)

            def last_product(o_acc: Any) -> jax.Array:
                o_acc[...] = acc
                plgpu.wgmma(o_acc, p, v_smem.at[v_slot])
                return o_acc[...]

            acc = pl.run_scoped(last_product, plgpu.ACC((TILE, D), jnp.float32))
            plgpu.barrier_arrive(v_free.at[v_slot])

            # --- 3. epilogue
            none = row_sum == 0.0
            some = jnp.where(none, 1.0, row_sum)
            o = (acc * across(1.0 / some, D)).astype(o_gmem.dtype)
            lse = jnp.where(none, -jnp.inf, row_max * (1 / LOG2E) + jnp.log(some))

            # --- 4. store
            if o_smem is not None:
                plgpu.barrier_arrive(q_free)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            o_slot = (q_smem if o_smem is None else o_smem).at[own()]
            o_slot[...] = o
            lse_smem[wg] = lse
            plgpu.commit_smem()
            # Beyond T TMA drops what it is given.
            plgpu.copy_smem_to_gmem(o_slot, o_gmem.at[pl.ds(row, TILE), h])
            plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_gmem.at[h, pl.ds(row, TILE)])
            if o_smem is None:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(q_free)
            return step + 1

        plgpu.wait_smem_to_gmem(0)


def _forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    plan: HybridPlan,
    alibi: jax.Array | None,
    scale: float,
    softcap: float,
    config: Config | None,
) -> tuple[jax.Array, jax.Array]:
    T, Hq, D = q.shape
    if 0 in (T, Hq):
        return jnp.zeros_like(q), jnp.zeros((Hq, T), jnp.float32)
    config = config or default_config(T, Hq, k.shape[1], D, q.dtype)
    if config.block_m != ORDERED:
        raise ValueError(f"block_m: expected {ORDERED}, got {config.block_m}")
    if config.stages < 2:  # v of one tile is held while k and v of the next are waited for
        raise ValueError(f"stages: expected at least 2, got {config.stages}")
    block_n, stages = config.block_n, config.stages
    tile = functools.partial(plgpu.SMEM, dtype=q.dtype, transforms=_lib.swizzled(q.dtype, D))
    ring = functools.partial(plgpu.Barrier, num_barriers=stages)
    q, k, v = aligned(q, k, v)
    # Where there is room, o waits for its store beside q, and the next q is already loaded.
    beside = [tile((ORDERED, D))] if D <= 128 else []
    o, lse = plgpu.kernel(
        functools.partial(
            _hybrid_attention_kernel,
            scale=scale,
            softcap=softcap,
            biased=alibi is not None,
            config=config,
        ),
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((Hq, _lib.cdiv(T, ORDERED) * ORDERED), jnp.float32),
        ),
        scratch_types=[
            tile((ORDERED, D)),
            tile((stages, block_n, D)),
            tile((stages, block_n, D)),
            plgpu.SMEM((WARPGROUPS, TILE), jnp.float32),
            *(plgpu.Barrier(), plgpu.Barrier(num_arrivals=WARPGROUPS)),
            *(ring(), ring(num_arrivals=WARPGROUPS)) * 2,
            plgpu.Barrier(num_arrivals=WARPGROUPS),
            *beside,
        ],
        grid=(_lib.num_sms(),),
        grid_names=("sm",),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        compiler_params=PARAMS,
        kernel_name="hybrid_attention_kernel",
    )(
        q, k, v, *padded(plan.kv_start, plan.kv_end, plan.q_start, plan.q_end, plan.token_pos),
        plan.tiles, plan.q_order, *([] if alibi is None else [alibi]),
    )  # fmt: skip
    return _lib.vary_alike(o[:T], lse[:, :T], q)[:2]


def hybrid_plan(
    meta: HybridMeta, *, tokens: int, window: int | None = None, config: Config | None = None
) -> HybridPlan:
    """What the kernels need to know of a batch of `tokens` tokens, from its segments.

    Made on the device in two launches, without a host read: once for all layers and heads.

    meta: a HybridMeta. Its values are not looked at: hybrid_attention_check does that.
    tokens: T, a Python int.
    window: a token sees the last `window` tokens, itself among them; an image all of itself too.
    config: nothing of it matters here.

    Raises TypeError for dtypes and ValueError for shapes and a window below 1, naming the argument.
    """
    _lib.check_config(config, Config)
    return plan_of(meta, tokens, window)


def hybrid_attention_check(meta: HybridMeta, tokens: int) -> None:
    """Raises ValueError if the arrays of meta hold what cannot be, and says what and where.

    Offsets that do not ascend from 0 to at most `tokens`, sequences that begin within a segment,
    modes there are not, PAD beside other segments. It copies the metadata and waits for the device.
    Raises TypeError under jit.
    """
    check(meta, tokens)


def hybrid_attention_fwd(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    plan: HybridPlan,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi: jax.Array | None = None,
    config: Config | None = None,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array | None, ...]]:
    """hybrid_attention, and what its backward needs.

    Returns ((o, lse), (q, k, v, o, lse, alibi, *plan)), None for an alibi that was not given.
    """
    scale, softcap = _checked(q, k, v, plan, scale, softcap, alibi, config)
    o, lse = _forward(q, k, v, plan, alibi, scale, softcap, config)
    return (o, lse), (q, k, v, o, lse, alibi, *plan)


def hybrid_attention_bwd(
    res: tuple[jax.Array | None, ...],
    do: jax.Array,
    dlse: jax.Array | None = None,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients (dq, dk, dv), bit for bit the same each time. alibi has none.

    res: as hybrid_attention_fwd returns it. do [T, Hq, D]: the cotangent of o; dlse [Hq, T] that of
    lse, None for zeros. config: tiles of dq, and of dk and dv.
    """
    return _backward(res, do, dlse, scale, softcap, config, False)


def _backward(res, do, dlse, scale, softcap, config, atomic):
    q, k, v, o, lse, alibi, *bounds = res
    plan = HybridPlan(*bounds)
    scale, softcap = _checked(q, k, v, plan, scale, softcap, alibi, config)
    _lib.check_array("do", do, q.shape, None)
    if dlse is not None:
        _lib.check_array("dlse", dlse, lse.shape, (jnp.float32,))
    (T, Hq, D), Hk = q.shape, k.shape[1]
    if 0 in (T, Hq):
        return tuple(map(jnp.zeros_like, (q, k, v)))
    if config is not None and config.block_m == TILE and D < 128:
        raise ValueError(f"block_m: expected 128 for a head dim of {D}, got {config.block_m}")
    atomic = atomic and D <= 128  # wider sums of dq find no room
    which = (None, "atomic") if atomic else ("dq", "dkdv")
    dq, dkdv = (w and (config or default_config(T, Hq, Hk, D, q.dtype, w)) for w in which)
    dlse = jnp.zeros_like(lse) if dlse is None else dlse
    do = do.astype(q.dtype)
    return backward(q, k, v, o, lse, alibi, plan, do, dlse, scale, softcap, dq, dkdv)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _hybrid_attention(q, k, v, plan, alibi, scale, softcap, config, atomic):
    return _forward(q, k, v, plan, alibi, scale, softcap, config)


def _hybrid_attention_fwd(q, k, v, plan, alibi, scale, softcap, config, atomic):
    o, lse = _forward(q, k, v, plan, alibi, scale, softcap, config)
    return (o, lse), (q, k, v, o, lse, alibi, *plan)


def _hybrid_attention_bwd(scale, softcap, config, atomic, res, cotangents):
    del config  # gradients take their own defaults
    return *_backward(res, *cotangents, scale, softcap, None, atomic), None, None


_hybrid_attention.defvjp(_hybrid_attention_fwd, _hybrid_attention_bwd)


def hybrid_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    plan: HybridPlan,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi: jax.Array | None = None,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(o [T, Hq, D], lse [Hq, T] float32): attention over what the plan lets each token see.

    q [T, Hq, D], k and v [T, Hk, D]: bfloat16 or float16, D 64, 96, 128 or 256; query heads
    h * Hq / Hk and on share the keys of head h. plan: hybrid_plan's, for T tokens.
    scale: D ** -0.5 by default. softcap: 0 for none; else scores are softcap * tanh(x / softcap).
    alibi [Hq] float32: slopes, which get no gradient; distances are those of the plan's token_pos.
    config: tiles of this call; gradients take their own defaults.

    A token that sees nothing has o 0 and lse -inf, zero gradients, and memory that does not matter.
    Differentiable once, through o and lse.

    Raises TypeError for dtypes and ValueError for shapes and a scale that is not above 0, naming
    the argument; NotImplementedError on a GPU that is not a Hopper.
    """
    return _attend(q, k, v, plan, scale, softcap, alibi, config, False)


def _attend(q, k, v, plan, scale, softcap, alibi, config, atomic):
    scale, softcap = _checked(q, k, v, plan, scale, softcap, alibi, config)
    bounds = (*plan,) if alibi is None else (*plan, alibi)
    q, k, v, *bounds = _lib.vary_alike(q, k, v, *bounds)
    plan, alibi = HybridPlan(*bounds[:9]), None if alibi is None else bounds[9]
    return _hybrid_attention(q, k, v, plan, alibi, scale, softcap, config, atomic)


def _checked(
    q: Any, k: Any, v: Any, plan: Any, scale: Any, softcap: Any, alibi: Any, config: Any
) -> tuple[float, float]:
    """Raises for what the kernels cannot take; scale and softcap, as they are used."""
    if any(getattr(x, "dtype", None) == jnp.float32 for x in (q, k, v)):
        raise TypeError(
            "q, k, v: expected dtype bfloat16 or float16, got float32, which wgmma would round to "
            "TF32 (10 bits of mantissa)"
        )
    _lib.check_array("q", q, ("T", "Hq", "D"), DTYPES)
    T, Hq, D = q.shape
    if D not in HEAD_DIMS:
        raise ValueError(f"q: expected a head dim of 64, 96, 128 or 256, got {D}")
    _lib.check_array("k", k, (T, "Hk", D), (q.dtype,))
    Hk = k.shape[1]
    if Hk == 0 or Hq % Hk:
        raise ValueError(f"k: expected heads that divide the Hq = {Hq} of q, got {Hk}")
    _lib.check_array("v", v, (T, Hk, D), (q.dtype,))
    if not isinstance(plan, HybridPlan):
        raise TypeError(f"plan: expected a HybridPlan, got {type(plan).__name__}")
    _lib.check_array("plan.kv_start", plan.kv_start, (T,), (jnp.int32,))
    _lib.check_array("plan.tiles", plan.tiles, (_lib.cdiv(T, TILE), 8), (jnp.int32,))
    if alibi is not None:
        _lib.check_array("alibi", alibi, (Hq,), (jnp.float32,))
    if scale is not None:
        _lib.check_static("scale", scale, (float, int))
        if not scale > 0:  # the largest score is kept unscaled
            raise ValueError(f"scale: expected > 0, got {scale}")
    _lib.check_static("softcap", softcap, (float, int))
    if softcap < 0:
        raise ValueError(f"softcap: expected at least 0 (none), got {softcap}")
    _lib.check_config(config, Config)
    return float(D**-0.5 if scale is None else scale), float(softcap)
