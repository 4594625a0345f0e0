"""Who sees whom: what the kernels need to know of a batch, made of its segments once.

    HybridPlan   for every token, every tile of 64 and every 128: shared by all layers

    q sees j  iff  kv_start[q] <= j < kv_end[q]  and  noise_id[j] is -1 or noise_id[q]
    j is seen by queries of q_start[j] .. q_end[j] - 1 alone

    for each 128 tokens (one block of threads, a lane for each token):
        search the segments and the sequences that have them; mark each token with its own
        bounds of each token;  minima and maxima over each 64
    for each 128 tokens: its place is the number of those with longer intervals

Lengths are values on the device and shape nothing: batches with other segments share one compiled
plan, and what is compiled behind it.

Twin: triton_kernels/hybrid_attention_plan.py.

Sources: bounds of a tile in place of a mask follow FlashMask and FlexAttention's BlockMask.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import _lib
from .hybrid_attention_meta import PAD, HybridMeta, intervals, reach_of

TILE = 64  # tokens of a row of `tiles`
ORDERED = 128  # tokens of an entry of `q_order` and `k_order`

# Columns of `tiles`. Of live tokens alone: the least kv_start, the greatest kv_end, the least
# q_start, the greatest q_end. The greatest kv_start is T, and the least kv_end 0, where a token is
# dead or beyond T: then no interval of keys is free of a mask.
(
    KV_START_MIN, KV_START_MAX, KV_END_MIN, KV_END_MAX, NOISE_MIN, NOISE_MAX, Q_START_MIN, Q_END_MAX
) = range(8)  # fmt: skip


class HybridPlan(NamedTuple):
    """What the kernels read, all int32. A token that sees nothing has empty intervals.

    kv_start, kv_end, noise_id: [T], which keys a token sees; noise_id is the segment of a token
        that is NOISE, else -1.
    q_start, q_end: [T], the queries that may see it.
    token_pos: [T], for ALiBi.
    tiles: [ceil(T / 64), 8], least and greatest of these over 64 tokens.
    q_order, k_order: [ceil(T / 128)], which 128 have the longest intervals of keys, of queries.
    """

    kv_start: jax.Array
    kv_end: jax.Array
    noise_id: jax.Array
    q_start: jax.Array
    q_end: jax.Array
    token_pos: jax.Array
    tiles: jax.Array
    q_order: jax.Array
    k_order: jax.Array


def _search(offsets_gmem: Any, value: Any) -> Any:
    """How many of the sorted offsets are at most value."""
    most = offsets_gmem.shape[0]

    def halve(_: Any, between: Any) -> Any:
        low, high = between
        middle = jnp.minimum((low + high) // 2, most - 1)
        below = (low < high) & (offsets_gmem[middle] <= value)
        return jnp.where(below, middle + 1, low), jnp.where(below, high, middle)

    start = jnp.int32(0), jnp.int32(most)
    return lax.fori_loop(0, most.bit_length(), halve, start)[0]


def _hybrid_attention_plan_kernel(
    cu_gmem: Any,  # [B + 1]
    off_gmem: Any,  # [S + 1]
    mode_gmem: Any,  # [S]
    *made_gmem: Any,
    T: int,
    reach: int,
) -> None:
    # six arrays [T], tiles [ceil(T / 128), 16], how many keys and queries [2, ceil(T / 128)], each
    # with room up to a multiple of 128 tokens or lanes
    *tokens_gmem, tiles_gmem, spans_gmem = made_gmem

    # --- 1. which tile
    block = lax.axis_index("block")
    begin = block * ORDERED
    layout = plgpu.Layout.WG_STRIDED((ORDERED,), 1)
    lane = plgpu.broadcasted_iota(jnp.int32, (ORDERED,), 0, layout=layout)
    t = begin + lane
    end = jnp.minimum(begin + ORDERED, T) - 1

    # --- 2. main loop
    def mark(offsets_gmem: Any, found: tuple[Any, ...], values: Any) -> tuple[Any, ...]:
        """Each token with the values of the last entry that does not start behind it."""
        last = offsets_gmem.shape[0] - 2

        def entry(i: Any, old: Any) -> Any:
            here = t >= offsets_gmem[i]
            return tuple(jnp.where(here, x, y) for x, y in zip(values(i), old, strict=True))

        low = jnp.clip(_search(offsets_gmem, begin) - 1, 0, last)
        high = jnp.clip(_search(offsets_gmem, end) - 1, 0, last)
        return lax.fori_loop(low, high + 1, entry, found)

    none = plgpu.layout_cast(jnp.zeros((ORDERED,), jnp.int32), layout)
    g, mode, a, b = mark(
        off_gmem,
        (none, none, none, none),
        lambda i: (i, mode_gmem[i].astype(jnp.int32), off_gmem[i], off_gmem[i + 1]),
    )
    first, last = mark(cu_gmem, (none, none), lambda i: (cu_gmem[i], cu_gmem[i + 1]))

    # --- 3. epilogue
    stop = jnp.minimum(off_gmem[off_gmem.shape[0] - 1], cu_gmem[cu_gmem.shape[0] - 1])
    live = (t < jnp.minimum(stop, T)) & (mode != PAD)
    bounds = intervals(jnp, t, g, mode, a, b, first, last, live, reach)
    kv_start, kv_end, noise, q_start, q_end = bounds

    # --- 4. store
    for x_gmem, x in zip(tokens_gmem, (*bounds, t), strict=True):
        x_gmem[pl.ds(begin, ORDERED)] = x
    rows = []
    for half in range(ORDERED // TILE):
        own = (lane >= half * TILE) & (lane < (half + 1) * TILE)
        alive = own & live
        whole = jnp.sum(jnp.where(alive, 1, 0)) == TILE

        def least(x: Any, where: Any, default: int = T) -> Any:
            return -jnp.max(jnp.where(where, -x, -default))

        def greatest(x: Any, where: Any, default: int = 0) -> Any:
            return jnp.max(jnp.where(where, x, default))

        row = (
            least(kv_start, alive), jnp.where(whole, greatest(kv_start, own), T),
            jnp.where(whole, least(kv_end, own), 0), greatest(kv_end, alive),
            least(noise, own & (t < T)), greatest(noise, own & (t < T), -1),
            least(q_start, alive), greatest(q_end, alive),
        )  # fmt: skip
        for column, value in enumerate(row):
            tiles_gmem[block, half * len(row) + column] = value
        rows.append(row)
    for i, (low, high) in enumerate(((KV_START_MIN, KV_END_MAX), (Q_START_MIN, Q_END_MAX))):
        start = functools.reduce(jnp.minimum, (row[low] for row in rows))
        stop = functools.reduce(jnp.maximum, (row[high] for row in rows))
        spans_gmem[i, block] = jnp.maximum(0, stop - start)


def _hybrid_attention_order_kernel(
    spans_gmem: Any,  # [2, num and room up to a multiple of 128]
    *order_gmem: Any,  # [num], of queries and of keys
) -> None:
    # --- 1. which tile
    which, block = lax.axis_index("which"), lax.axis_index("block")
    room, num = spans_gmem.shape[1], order_gmem[0].shape[0]

    # --- 2. main loop
    layout = plgpu.Layout.WG_STRIDED((room,), 1)
    other = plgpu.broadcasted_iota(jnp.int32, (room,), 0, layout=layout)
    spans = plgpu.load(spans_gmem.at[which], layout=layout)
    own = spans_gmem[which, block]
    ahead = (spans > own) | ((spans == own) & (other < block))

    # --- 3. epilogue
    place = jnp.sum(jnp.where(ahead & (other < num), 1, 0))

    # --- 4. store
    for i in range(2):

        @pl.when(which == i)
        def _(x_gmem: Any = order_gmem[i]) -> None:
            x_gmem[place] = block


def plan_of(meta: HybridMeta, tokens: int, window: int | None) -> HybridPlan:
    """hybrid_plan, without a Config."""
    _lib.check_static("tokens", tokens, (int,))
    if tokens < 0:
        raise ValueError(f"tokens: expected at least 0, got {tokens}")
    if not isinstance(meta, HybridMeta):
        raise TypeError(f"meta: expected a HybridMeta, got {type(meta).__name__}")
    reach = min(reach_of(tokens, window), tokens + 1)
    _lib.check_array("cu_seqlens", meta.cu_seqlens, ("B + 1",), (jnp.int32,))
    _lib.check_array("seg_mode", meta.seg_mode, ("S",), (jnp.int8,))
    _lib.check_array("seg_off", meta.seg_off, (meta.seg_mode.shape[0] + 1,), (jnp.int32,))
    if meta.cu_seqlens.shape[0] < 2 or not meta.seg_mode.shape[0]:
        raise ValueError("meta: expected room for at least one sequence and one segment, got none")
    if meta.pos is not None:
        _lib.check_array("pos", meta.pos, (tokens,), (jnp.int32,))
    if not tokens:
        none = jnp.zeros((0,), jnp.int32)
        return HybridPlan(*[none] * 6, jnp.zeros((0, 8), jnp.int32), none, none)
    num = _lib.cdiv(tokens, ORDERED)
    room = _lib.cdiv(num, _lib.WARPGROUP) * _lib.WARPGROUP
    arrays = _lib.vary_alike(meta.cu_seqlens, meta.seg_off, meta.seg_mode)
    *per_token, tiles, spans = plgpu.kernel(
        functools.partial(_hybrid_attention_plan_kernel, T=tokens, reach=reach),
        out_type=(
            *[jax.ShapeDtypeStruct((num * ORDERED,), jnp.int32)] * 6,
            jax.ShapeDtypeStruct((num, 16), jnp.int32),
            jax.ShapeDtypeStruct((2, room), jnp.int32),
        ),
        grid=(num,),
        grid_names=("block",),
        kernel_name="hybrid_attention_plan_kernel",
    )(*arrays)
    order = plgpu.kernel(
        _hybrid_attention_order_kernel,
        out_type=(jax.ShapeDtypeStruct((num,), jnp.int32),) * 2,
        grid=(2, num),
        grid_names=("which", "block"),
        kernel_name="hybrid_attention_order_kernel",
    )(spans)
    made = [x[:tokens] for x in per_token]
    if meta.pos is not None:
        made[5] = meta.pos
    tiles = tiles.reshape(-1, 8)[: _lib.cdiv(tokens, TILE)]
    return HybridPlan(*_lib.vary_alike(*made, tiles, *order, arrays[0])[:-1])
