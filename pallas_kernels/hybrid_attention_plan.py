"""What hybrid attention must know of a batch: its segments, and the bounds that follow from them.

    HybridMeta   segments and sequences, of the size of the batch's structure, not of its tokens
    HybridPlan   for every token, every tile of 64 and every 128: made once, shared by all layers

    q sees j  iff  kv_start[q] <= j < kv_end[q]  and  noise_id[j] is -1 or noise_id[q]
    j is seen by queries of q_start[j] .. q_end[j] - 1 alone

    for each 128 tokens (one block of threads, a lane for each token):
        search the segments and the sequences that have them; mark each token with its own
        bounds of each token;  minima and maxima over each 64
    for each 128 tokens: its place is the number of those with longer intervals

Lengths are values on the device and shape nothing: batches with other segments share one compiled
plan, and what is compiled behind it.

Twin: triton_kernels/hybrid_attention_plan.py.

Sources: segments as BAGEL packs them (data/data_utils.py there); bounds of a tile in place of a
mask follow FlashMask and FlexAttention's BlockMask.
"""

import functools
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import _lib

CAUSAL, FULL, NOISE, PAD = range(4)
MODES = ("causal", "full", "noise", "pad")
TILE = 64  # tokens of a row of `tiles`
ORDERED = 128  # tokens of an entry of `q_order` and `k_order`
DENSE_TOKENS = 8192  # a mask of more is not drawn

# Columns of `tiles`. Of live tokens alone: the least kv_start, the greatest kv_end, the least
# q_start, the greatest q_end. The greatest kv_start is T, and the least kv_end 0, where a token is
# dead or beyond T: then no interval of keys is free of a mask.
(
    KV_START_MIN, KV_START_MAX, KV_END_MIN, KV_END_MAX, NOISE_MIN, NOISE_MAX, Q_START_MIN, Q_END_MAX
) = range(8)  # fmt: skip


def _mode(mode: Any) -> int:
    if mode in MODES:
        return MODES.index(mode)
    if isinstance(mode, (int, np.integer)) and 0 <= mode < len(MODES):
        return int(mode)
    raise ValueError(f"mode: expected one of {', '.join(MODES)} or 0 to 3, got {mode!r}")


def _filled(name: str, values: Any, most: int | None, fill: Any, dtype: Any) -> jax.Array:
    """The values, then `fill` up to `most` of them."""
    found = np.asarray(values, dtype)
    if most is not None and len(found) > most:
        raise ValueError(f"{name}: expected at least {len(found)} for this batch, got {most}")
    more = 0 if most is None else most - len(found)
    return jnp.asarray(np.concatenate([found, np.full(more, fill, dtype)]))


class HybridMeta(NamedTuple):
    """Sequences and segments of packed tokens. Unused entries at the end repeat the last offset.

    cu_seqlens: [B + 1] int32, where sequences start, and where the last stops.
    seg_off: [S + 1] int32, likewise for segments. Each sequence starts where a segment does.
    seg_mode: [S] int8: CAUSAL, FULL, NOISE or PAD. Tokens behind the last segment are PAD.
    pos: [T] int32, positions for ALiBi, or None: a token's place in the batch.

    The constructors raise ValueError for lengths or modes that make no batch. With max_sequences
    and max_segments the arrays have room for so many: batches of one room share compiled code.
    """

    cu_seqlens: jax.Array
    seg_off: jax.Array
    seg_mode: jax.Array
    pos: jax.Array | None = None

    @classmethod
    def from_segments(
        cls,
        sequences: Sequence[Sequence[tuple[int, Any]]],
        *,
        max_sequences: int | None = None,
        max_segments: int | None = None,
        pos: jax.Array | None = None,
    ) -> "HybridMeta":
        """For every sequence its segments: (length, mode), mode a number or its name."""
        segments = [
            (int(length), _mode(mode)) for sequence in sequences for length, mode in sequence
        ]
        for length, _ in segments:
            if length < 0:
                raise ValueError(f"segments: expected lengths of at least 0, got {length}")
        lengths = [sum(int(length) for length, _ in sequence) for sequence in sequences]
        cu = np.cumsum([0, *lengths])
        off = np.cumsum([0, *(length for length, _ in segments)])
        rooms = [None if most is None else most + 1 for most in (max_sequences, max_segments)]
        made = cls(
            _filled("max_sequences", cu, rooms[0], cu[-1], np.int32),
            _filled("max_segments", off, rooms[1], off[-1], np.int32),
            _filled("max_segments", [m for _, m in segments], max_segments, PAD, np.int8),
            pos,
        )
        check(made, int(cu[-1]))
        return made

    @classmethod
    def from_cu_seqlens(
        cls, cu_seqlens: Any, mode: Any = CAUSAL, *, max_sequences: int | None = None
    ) -> "HybridMeta":
        """Every sequence is one segment. cu_seqlens may be a traced array: it is not looked at."""
        mode = _mode(mode)
        if not isinstance(cu_seqlens, jax.Array):
            cu_seqlens = np.asarray(cu_seqlens, np.int32)
            _sorted("cu_seqlens", cu_seqlens)
        cu = jnp.asarray(cu_seqlens, jnp.int32)
        more = 0 if max_sequences is None else max_sequences + 1 - len(cu)
        if more < 0:
            raise ValueError(
                f"max_sequences: expected at least {len(cu) - 1} for this batch, got "
                f"{max_sequences}"
            )
        cu = jnp.concatenate([cu, jnp.broadcast_to(cu[-1:], (more,))])
        return cls(cu, cu, jnp.full(len(cu) - 1, mode, jnp.int8))

    @classmethod
    def from_prefix_lengths(
        cls,
        lengths: Sequence[int],
        prefix_lengths: Sequence[int],
        *,
        max_sequences: int | None = None,
    ) -> "HybridMeta":
        """Sequences whose prefix sees all of itself, and whose rest is text."""
        if len(lengths) != len(prefix_lengths):
            raise ValueError(
                f"prefix_lengths: expected one for each of {len(lengths)} sequences, got "
                f"{len(prefix_lengths)}"
            )
        for i, (length, prefix) in enumerate(zip(lengths, prefix_lengths, strict=True)):
            if not 0 <= prefix <= length:
                raise ValueError(
                    f"prefix_lengths: expected 0 to {length} for sequence {i}, got {prefix}"
                )
        pairs = zip(lengths, prefix_lengths, strict=True)
        return cls.from_segments(
            [[(prefix, FULL), (length - prefix, CAUSAL)] for length, prefix in pairs],
            max_sequences=max_sequences,
            max_segments=None if max_sequences is None else 2 * max_sequences,
        )

    @classmethod
    def from_splits(
        cls,
        split_lens: Sequence[int],
        attn_modes: Sequence[str],
        sample_lens: Sequence[int],
        *,
        max_sequences: int | None = None,
        max_segments: int | None = None,
        pos: jax.Array | None = None,
    ) -> "HybridMeta":
        """From BAGEL's batch: splits of all samples in a row, modes 'causal', 'full', 'noise'."""
        if len(split_lens) != len(attn_modes):
            raise ValueError(
                f"attn_modes: expected one for each of {len(split_lens)} splits, got "
                f"{len(attn_modes)}"
            )
        splits = list(zip(map(int, split_lens), attn_modes, strict=True))
        sequences, at = [], 0
        for i, sample in enumerate(map(int, sample_lens)):
            sequence, left = [], sample
            while at < len(splits) and (left > 0 or splits[at][0] == 0):
                sequence.append(splits[at])
                left -= splits[at][0]
                at += 1
            if left:
                raise ValueError(f"split_lens: they do not tile sample {i} of {sample} tokens")
            sequences.append(sequence)
        if at < len(splits):
            raise ValueError(
                f"sample_lens: they have {sum(map(int, sample_lens))} tokens, the splits "
                f"{sum(length for length, _ in splits)}"
            )
        return cls.from_segments(
            sequences, max_sequences=max_sequences, max_segments=max_segments, pos=pos
        )

    def to_dense(self, tokens: int, window: int | None = None) -> np.ndarray:
        """The mask [tokens, tokens] as bools, on the host: for tests and pictures.

        Raises ValueError above 8192 tokens.
        """
        if tokens > DENSE_TOKENS:
            raise ValueError(f"tokens: expected at most {DENSE_TOKENS}, got {tokens}")
        reach = _reach(tokens, window)
        cu, off, mode = (np.asarray(x).astype(np.int32) for x in self[:3])
        t = np.arange(tokens)
        g = np.searchsorted(off, t, side="right") - 1
        s = np.searchsorted(cu, t, side="right") - 1
        inside = (g < len(mode)) & (s < len(cu) - 1)
        g, s = np.minimum(g, len(mode) - 1), np.minimum(s, len(cu) - 2)
        live = inside & (mode[g] != PAD)
        of_segment = (mode[g], off[g], off[g + 1], cu[s], cu[s + 1])
        kv_start, kv_end, noise, _, _ = _bounds(np, t, g, *of_segment, live, reach)
        seen = (t >= kv_start[:, None]) & (t < kv_end[:, None])
        return seen & ((noise == -1) | (noise == noise[:, None]))


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


def _sorted(name: str, offsets: np.ndarray) -> None:
    if offsets.ndim != 1 or len(offsets) < 1 or offsets[0] != 0:
        raise ValueError(f"{name}: expected offsets that start with 0, got {offsets[:4]}")
    falls = np.flatnonzero(np.diff(offsets) < 0)
    if falls.size:
        i = int(falls[0])
        raise ValueError(
            f"{name}: expected sorted offsets, got {offsets[i]} and then {offsets[i + 1]} at {i}"
        )


def check(meta: HybridMeta, tokens: int) -> None:
    """Raises ValueError that names what is wrong in the values of meta, TypeError under jit."""
    for name, x in zip(meta._fields, meta, strict=True):
        if isinstance(x, jax.core.Tracer):
            raise TypeError(f"{name}: expected an array with values, got a tracer")
    cu, off, mode = (np.asarray(x).astype(np.int64) for x in meta[:3])
    _sorted("cu_seqlens", cu)
    _sorted("seg_off", off)
    if len(mode) != len(off) - 1:
        raise ValueError(f"seg_mode: expected {len(off) - 1} modes, got {len(mode)}")
    if unknown := [int(m) for m in mode if not 0 <= m < len(MODES)]:
        raise ValueError(f"seg_mode: expected 0 to 3, got {unknown[0]}")
    if cu[-1] > tokens:
        raise ValueError(f"cu_seqlens: expected at most {tokens} tokens, got {cu[-1]}")
    live_end = max([0, *off[1:][mode != PAD]])
    if off[-1] < cu[-1] or live_end > cu[-1]:
        raise ValueError(
            f"seg_off: segments do not tile the sequences: they end at {off[-1]} (the last that "
            f"is not PAD at {live_end}), the sequences at {cu[-1]}"
        )
    if strange := sorted(set(cu.tolist()) - set(off.tolist())):
        raise ValueError(
            f"seg_off: segments do not tile the sequences: none starts at {strange[0]}, where a "
            "sequence does"
        )
    for i, (first, last) in enumerate(pairwise(cu)):
        own = mode[(off[:-1] >= first) & (off[1:] <= last) & (off[1:] > off[:-1])]
        if (own == PAD).any() and len(own) > 1:
            raise ValueError(
                f"seg_mode: sequence {i} has a PAD segment beside others; PAD is a sequence of "
                "its own, or behind the last"
            )


def _reach(tokens: int, window: int | None) -> int:
    """How many tokens back one may see at most, itself included."""
    if window is None:
        return tokens + 1
    _lib.check_static("window", window, (int,))
    if window < 1:
        raise ValueError(f"window: expected at least 1 (a token sees itself) or None, got {window}")
    return window


def _bounds(
    xp: Any, t: Any, g: Any, mode: Any, a: Any, b: Any, first: Any, last: Any, live: Any, reach: int
) -> tuple[Any, ...]:
    """Intervals of tokens t of segments g: [a, b), in sequences [first, last)."""
    image = (mode == FULL) | (mode == NOISE)
    oldest, latest = t - (reach - 1), t + reach
    kv_start = xp.maximum(first, xp.where(image, xp.minimum(a, oldest), oldest))
    kv_end = xp.where(image, b, t + 1)
    q_start = xp.where(image, a, t)
    q_end = xp.minimum(last, xp.maximum(latest, kv_end))
    q_end = xp.where(mode == NOISE, b, q_end)
    noise = xp.where(live & (mode == NOISE), g, -1)
    kv_start, kv_end, q_start, q_end = (
        xp.where(live, x, t) for x in (kv_start, kv_end, q_start, q_end)
    )
    return kv_start, kv_end, noise, q_start, q_end


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
    bounds = _bounds(jnp, t, g, mode, a, b, first, last, live, reach)
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
    reach = min(_reach(tokens, window), tokens + 1)
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
