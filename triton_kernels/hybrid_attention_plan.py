"""Who sees whom: what the kernels need to know of a batch, made of its segments once.

    for every token t the interval of keys it sees and of queries that see it
        g, s = the segment and the sequence of t      two binary searches
        first, last = where s begins and ends; a, b = where g does
                       keys                           queries
        CAUSAL         first .. t + 1                 t .. last
        FULL           first .. b                     a .. last
        NOISE          first .. b                     a .. b       and no other images under noise
        PAD            nothing                        nothing
        a window of W: first is at least t - W + 1, last at most t + W, but never inside an image
    for every 64 tokens the least and the largest of these; tiles of 128, the longest first

A tile of queries whose largest first key is not past a tile of keys, and whose least end is not
before its end, needs no mask: six numbers of each decide about 64 x 64 pairs.

Twin: pallas_kernels/hybrid_attention_plan.py.

Sources: tiles that are skipped, masked or neither are FlexAttention's BlockMask (arXiv:2412.05496),
which stores lists of them where this stores bounds; longest first is Graham's rule for unequal
jobs.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import _lib
from .hybrid_attention_meta import HybridMeta, check_shapes, window_of

TILE, ORDERED = 64, 128  # tokens that a row of `tiles`, an entry of an order stands for


class HybridPlan(NamedTuple):
    """What the kernels read; all int32. hybrid_plan makes it, once for all layers.

    Token t sees the keys kv_start[t] .. kv_end[t] but for those under another noise_id than its own
    and -1, and only queries q_start[t] .. q_end[t] can see it [T]. token_pos [T]: where it is.
    tiles [ceil(T / 64), 8], each of 64 tokens: the least and largest kv_start, kv_end and noise_id,
    the least q_start, the largest q_end. A tile with a token that sees nothing has T and 0 for the
    largest kv_start and the least kv_end: no tile of keys is free of a mask, to it.
    q_order, k_order [ceil(T / 128)]: tiles of queries, and of keys, the longest interval first.
    """

    kv_start: Tensor
    kv_end: Tensor
    noise_id: Tensor
    q_start: Tensor
    q_end: Tensor
    token_pos: Tensor
    tiles: Tensor
    q_order: Tensor
    k_order: Tensor


@triton.jit
def _segment_of(offsets_ptr, t, count, steps):
    """How many of the ascending offsets are <= t, less one."""
    low, high = tl.zeros_like(t), tl.zeros_like(t) + count
    for _ in range(steps):
        middle = (low + high) // 2
        offset = tl.load(offsets_ptr + middle, mask=low < high, other=0)
        below = (low < high) & (offset <= t)
        high = tl.where(below, high, middle)
        low = tl.where(below, middle + 1, low)
    return low - 1


@triton.jit
def _hybrid_attention_plan_kernel(
    cu_seqlens_ptr, seg_off_ptr, seg_mode_ptr, pos_ptr,  # pos_ptr: [T] or None
    kv_start_ptr, kv_end_ptr, noise_id_ptr, q_start_ptr, q_end_ptr, token_pos_ptr, tiles_ptr,
    T, B, S, reach, steps,
    block_r: tl.constexpr, block_t: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    r = tl.program_id(0) * block_r + tl.arange(0, block_r)
    t = r[:, None] * block_t + tl.arange(0, block_t)[None, :]  # [block_r, block_t]
    exists = t < T

    # --- 2. main loop
    g = _segment_of(seg_off_ptr, t, S + 1, steps)
    s = _segment_of(cu_seqlens_ptr, t, B + 1, steps)
    inside = exists & (g >= 0) & (g < S) & (s >= 0) & (s < B)
    mode = tl.load(seg_mode_ptr + g, mask=inside, other=3).to(tl.int32)
    a = tl.load(seg_off_ptr + g, mask=inside, other=0)
    b = tl.load(seg_off_ptr + g + 1, mask=inside, other=0)
    first = tl.load(cu_seqlens_ptr + s, mask=inside, other=0)
    last = tl.load(cu_seqlens_ptr + s + 1, mask=inside, other=0)

    # --- 3. epilogue
    live, image, noisy = mode != 3, (mode == 1) | (mode == 2), mode == 2
    oldest = t - reach + 1
    kv_start = tl.maximum(first, tl.where(image, tl.minimum(a, oldest), oldest))
    kv_end = tl.where(image, b, t + 1)
    latest = tl.minimum(last, tl.maximum(t + reach, kv_end))
    q_end = tl.where(noisy, b, latest)
    kv_start, kv_end = tl.where(live, kv_start, t), tl.where(live, kv_end, t)
    q_start, q_end = tl.where(live & image, a, t), tl.where(live, q_end, t)
    noise_id = tl.where(noisy, g, -1)
    # A tile with a token that sees nothing, or that overhangs, is never free of a mask.
    whole = tl.min(live.to(tl.int32), 1) == 1

    # --- 4. store
    tl.store(kv_start_ptr + t, kv_start, mask=exists)
    tl.store(kv_end_ptr + t, kv_end, mask=exists)
    tl.store(noise_id_ptr + t, noise_id, mask=exists)
    tl.store(q_start_ptr + t, q_start, mask=exists)
    tl.store(q_end_ptr + t, q_end, mask=exists)
    where = t
    if pos_ptr is not None:
        where = tl.load(pos_ptr + t, mask=exists, other=0)
    tl.store(token_pos_ptr + t, where, mask=exists)
    row, some = tiles_ptr + r * 8, r * block_t < T
    tl.store(row, tl.min(tl.where(live, kv_start, T), 1), mask=some)
    tl.store(row + 1, tl.where(whole, tl.max(kv_start, 1), T), mask=some)
    tl.store(row + 2, tl.where(whole, tl.min(kv_end, 1), 0), mask=some)
    tl.store(row + 3, tl.max(tl.where(live, kv_end, 0), 1), mask=some)
    tl.store(row + 4, tl.min(tl.where(exists, noise_id, S), 1), mask=some)
    tl.store(row + 5, tl.max(noise_id, 1), mask=some)
    tl.store(row + 6, tl.min(tl.where(live, q_start, T), 1), mask=some)
    tl.store(row + 7, tl.max(tl.where(live, q_end, 0), 1), mask=some)


@triton.jit
def _length(tiles_ptr, i, rows, start, end, pair: tl.constexpr):
    """From the least start to the largest end of `pair` rows of tiles; -1 past the last."""
    low, high = tl.zeros_like(i) + (1 << 30), tl.zeros_like(i)
    for k in tl.static_range(pair):
        at = i * pair + k
        low = tl.minimum(low, tl.load(tiles_ptr + at * 8 + start, mask=at < rows, other=1 << 30))
        high = tl.maximum(high, tl.load(tiles_ptr + at * 8 + end, mask=at < rows, other=0))
    return tl.where(i * pair < rows, tl.maximum(high - low, 0), -1)


@triton.jit
def _hybrid_attention_order_kernel(
    tiles_ptr, q_order_ptr, k_order_ptr, rows, num_o,
    pair: tl.constexpr, block_o: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    of_keys = tl.program_id(1)
    start, end = of_keys * 6, of_keys * 4 + 3
    i = tl.program_id(0) * block_o + tl.arange(0, block_o)
    length = _length(tiles_ptr, i, rows, start, end, pair)

    # --- 2. main loop
    # The place of a tile: how many are longer, or as long and before it.
    place = tl.zeros_like(i)
    for j0 in range(0, num_o, block_o):
        j = j0 + tl.arange(0, block_o)
        other = _length(tiles_ptr, j, rows, start, end, pair)
        before = (other[None, :] > length[:, None]) | (
            (other[None, :] == length[:, None]) & (j[None, :] < i[:, None])
        )
        place += tl.sum(before.to(tl.int32), 1)

    # --- 3. epilogue
    order_ptr = q_order_ptr
    if of_keys == 1:
        order_ptr = k_order_ptr

    # --- 4. store
    tl.store(order_ptr + place, i, mask=i < num_o)


def _fake_plan(cu_seqlens, seg_off, seg_mode, pos, tokens, window):
    of_tokens = [seg_off.new_empty(tokens) for _ in range(6)]
    tiles = seg_off.new_empty((_lib.cdiv(tokens, TILE), 8))
    return [*of_tokens, tiles, *(seg_off.new_empty(_lib.cdiv(tokens, ORDERED)) for _ in range(2))]


@_lib.opaque("hybrid_plan", _fake_plan)
def _plan(
    cu_seqlens: Tensor,
    seg_off: Tensor,
    seg_mode: Tensor,
    pos: Tensor | None,
    tokens: int,
    window: int,
) -> list[Tensor]:
    """The arrays of a HybridPlan. window: 0 is none."""
    arrays = _fake_plan(cu_seqlens, seg_off, seg_mode, pos, tokens, window)
    if tokens == 0:
        return arrays
    *of_tokens, tiles, q_order, k_order = arrays
    meta = [x if x is None else x.contiguous() for x in (cu_seqlens, seg_off, seg_mode, pos)]
    with _lib.on_device(seg_off):
        _lib.check_gpu()
        steps = max(len(cu_seqlens), len(seg_off)).bit_length()
        # 256 tokens for 4 warps: 32768 of them are a program for each multiprocessor.
        _hybrid_attention_plan_kernel[(_lib.cdiv(len(tiles), 4),)](
            *meta, *of_tokens, tiles, tokens, len(cu_seqlens) - 1, len(seg_mode),
            window or tokens + 1, steps, 4, TILE, num_warps=4,
        )  # fmt: skip
        _hybrid_attention_order_kernel[(_lib.cdiv(len(q_order), 64), 2)](
            tiles, q_order, k_order, len(tiles), len(q_order), ORDERED // TILE, 64, num_warps=4
        )
    return arrays


def plan_of(meta: HybridMeta, tokens: int, window: int | None) -> HybridPlan:
    """hybrid_plan, without a Config."""
    check_shapes(meta, tokens)
    return HybridPlan(*_plan(*meta, tokens, window_of(window)))
