"""What the three walks over tiles share: which tiles, whose pairs, what scores, from where.

    bounds    of the tile that stays, from the plan: six numbers
    walk      which of the next 32 tiles to visit, as bits: clear ones need no mask, some a mask;
              those with dead tokens, apart, need zeros too, as 0 * NaN is NaN
    lowest    the next of them
    visible   the pairs of two tiles, where a mask is needed
    scores    scale, soft cap and ALiBi
    load_tile, store_tile, add_tile
              rows of one head, by TMA or by pointers; beyond the edges are zeros
    zero_dead, load_alive
              zeros for tokens that see nothing

Twin: pallas_kernels/hybrid_attention_tiles.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _lib

LOG2_E = tl.constexpr(1.4426950408889634)
STRIP = tl.constexpr(16)  # rows of a step through a tile with dead tokens, which takes registers
LANES = tl.constexpr(32)  # tiles that one look at the plan classifies: the bits of an int32


@triton.jit
def bounds(tiles_ptr, i, T, pair: tl.constexpr):
    """Of the tiles i, each `pair` rows of the plan: the least and largest kv_start, kv_end and
    noise_id; of what is past the last row: nothing sees, nothing is seen."""
    rows = (T + 63) // 64
    low, top, least, most, quiet, loud = T, 0, T, 0, 1 << 30, -1
    for k in tl.static_range(pair):
        at = i * pair + k
        row, there = tiles_ptr + at * 8, (at >= 0) & (at < rows)
        low = tl.minimum(low, tl.load(row, mask=there, other=T))
        top = tl.maximum(top, tl.load(row + 1, mask=there, other=T))
        least = tl.minimum(least, tl.load(row + 2, mask=there, other=0))
        most = tl.maximum(most, tl.load(row + 3, mask=there, other=0))
        quiet = tl.minimum(quiet, tl.load(row + 4, mask=there, other=-1))
        loud = tl.maximum(loud, tl.load(row + 5, mask=there, other=-1))
    return low, top, least, most, quiet, loud


@triton.jit
def walk(
    tiles_ptr, stays, at, first, last, T,
    block_m: tl.constexpr, block_n: tl.constexpr, of_queries: tl.constexpr, dead: tl.constexpr,
):  # fmt: skip
    """(bits, masked, count, others) of the tiles first .. last, LANES at most.

    stays: the bounds of the tile that stays, block_m rows from row `at` on. of_queries: that tile
    holds keys, and queries pass by. bits: tiles with a pair that sees, those with dead tokens if
    `dead`, else the rest; masked: those of them that need a mask; count: how many bits; others: how
    many tiles with such a pair have none.
    """
    lane = tl.arange(0, LANES)
    i = first + lane
    other = bounds(tiles_ptr, i, T, block_n // 64)
    if of_queries:
        queries, keys = other, stays
        key, width = at, block_m
    else:
        queries, keys = stays, other
        key, width = i * block_n, block_n
    q_low, q_top, q_least, q_most, q_quiet, q_loud = queries
    k_quiet, k_loud = keys[4], keys[5]
    noise = (k_quiet == k_loud) & (k_quiet >= 0)  # all keys belong to one image under noise
    foreign = noise & ((q_loud < k_quiet) | (q_quiet > k_quiet))
    visit = (i < last) & (q_low < key + width) & (q_most > key) & ~foreign
    own = (k_loud < 0) | (noise & (q_quiet == k_quiet) & (q_loud == k_quiet))
    clear = (q_top <= key) & (q_least >= key + width) & own
    chosen = visit & (other[2] <= 0 if dead else other[2] > 0)
    bit = tl.full((LANES,), 1, tl.int32) << lane
    bits = tl.sum(tl.where(chosen, bit, 0), 0)
    masked = bits if dead else tl.sum(tl.where(chosen & ~clear, bit, 0), 0)
    counts = tl.sum(tl.where(visit, tl.where(chosen, 1, 256), 0), 0)
    return bits, masked, counts % 256, counts // 256


@triton.jit
def lowest(bits):
    """The place of the lowest bit that is set: the exponent of that bit as a float."""
    low = (bits & -bits).to(tl.float32)
    return ((low.to(tl.int32, bitcast=True) >> 23) & 255) - 127


@triton.jit
def after(bits, strip, strips: tl.constexpr):
    """(bits, strip) of the next step: the next strip of the tile, or the next tile."""
    rest = bits & (bits - 1)
    if strips > 1:
        strip += 1
        rest = tl.where(strip == strips, rest, bits)
        strip = tl.where(strip == strips, 0, strip)
    return rest, strip


@triton.jit
def per_token(kv_start_ptr, kv_end_ptr, noise_id_ptr, t, T):
    """kv_start, kv_end and noise_id of tokens t; those past the last see nothing."""
    kv_start = tl.load(kv_start_ptr + t, mask=t < T, other=0)
    kv_end = tl.load(kv_end_ptr + t, mask=t < T, other=0)
    return kv_start, kv_end, tl.load(noise_id_ptr + t, mask=t < T, other=-1)


@triton.jit
def alive(kv_start_ptr, kv_end_ptr, t, T):
    """Whether tokens t see anything; those past the last do not."""
    kv_start = tl.load(kv_start_ptr + t, mask=t < T, other=0)
    return kv_start < tl.load(kv_end_ptr + t, mask=t < T, other=0)


@triton.jit
def zero_dead(tile, kv_start_ptr, kv_end_ptr, t, T):
    """tile [tokens, D] with zeros for tokens that see nothing: their memory may hold NaN."""
    return tl.where(alive(kv_start_ptr, kv_end_ptr, t, T)[:, None], tile, 0.0)


@triton.jit
def visible(q_start, q_end, q_noise, j, k_noise):
    """Whether a query sees key j; shapes that broadcast."""
    return (j >= q_start) & (j < q_end) & ((k_noise < 0) | (k_noise == q_noise))


@triton.jit
def scores(
    s, q_pos, k_pos, slope, scale, softcap,
    capped: tl.constexpr, biased: tl.constexpr,
):  # fmt: skip
    """(x, bent): scores of the products s and, if capped, tanh of them.

    In units of log 2 if capped or biased. Else x is s, and the caller folds scale * log2(e) into
    the exponent, where it costs nothing.
    """
    bent = s
    if capped:
        # tanh y = 1 - 2 / (1 + e^2y)
        bent = 1.0 - 2.0 / (1.0 + tl.exp2(s * (2 * LOG2_E * scale / softcap)))
        s = bent * (softcap * LOG2_E)
    elif biased:
        s = s * (scale * LOG2_E)
    if biased:
        s -= (slope * LOG2_E) * tl.abs(q_pos - k_pos).to(tl.float32)
    return s, bent


@triton.jit
def load_tile(
    x, h, row, T, H, D,
    block_r: tl.constexpr, block_d: tl.constexpr, tma: tl.constexpr,
):  # fmt: skip
    """x[row : row + block_r, h], zeros beyond the edges."""
    if tma:
        tile = x.load([h, row, 0]).reshape(block_r, block_d)
    else:
        r, d = row + tl.arange(0, block_r), tl.arange(0, block_d)
        at = x + (r.to(tl.int64)[:, None] * H + h) * D + d[None, :]
        tile = tl.load(at, mask=(r[:, None] < T) & (d[None, :] < D), other=0.0)
    return tile


@triton.jit
def load_alive(x_ptr, h, kv_start_ptr, kv_end_ptr, t, T, H, D, block_d: tl.constexpr):
    """Rows t of x [T, H, D], contiguous, with zeros for tokens that see nothing.

    What zero_dead makes of a tile is multiplied from registers, which are short: this, as it
    comes from memory, from shared memory.
    """
    live = alive(kv_start_ptr, kv_end_ptr, t, T)
    d = tl.arange(0, block_d)
    at = x_ptr + (t.to(tl.int64)[:, None] * H + h) * D + d[None, :]
    return tl.load(at, mask=live[:, None] & (d[None, :] < D), other=0.0)


@triton.jit
def store_tile(
    x, tile, h, row, T, H, D,
    block_r: tl.constexpr, block_d: tl.constexpr, tma: tl.constexpr,
):  # fmt: skip
    """x[row : row + block_r, h] = tile, rounded; nothing beyond the edges."""
    if tma:
        x.store([h, row, 0], tile.to(x.dtype).reshape(1, block_r, block_d))
    else:
        r, d = row + tl.arange(0, block_r), tl.arange(0, block_d)
        at = x + (r.to(tl.int64)[:, None] * H + h) * D + d[None, :]
        tile = tile.to(x.dtype.element_ty)
        tl.store(at, tile, mask=(r[:, None] < T) & (d[None, :] < D))


@triton.jit
def add_tile(x, tile, h, row, T, H, D, block_r: tl.constexpr, block_d: tl.constexpr):
    """x[row : row + block_r, h] += tile, both float32, while others add to it too."""
    if isinstance(x, tl.tensor_descriptor):
        x.atomic_add([h, row, 0], tile.reshape(1, block_r, block_d))
    else:
        r, d = row + tl.arange(0, block_r), tl.arange(0, block_d)
        at = x + (r.to(tl.int64)[:, None] * H + h) * D + d[None, :]
        tl.atomic_add(at, tile, mask=(r[:, None] < T) & (d[None, :] < D), sem="relaxed")


def readable(x: Tensor) -> Tensor:
    """x [T, H, D] itself if TMA can address its rows, with any strides of T and H; else a copy."""
    strides = [s * x.element_size() for s in x.stride()[:2]]
    ready = x.stride(2) == 1 and all(0 < s < 1 << 40 and s % 16 == 0 for s in strides)
    if _lib.has_tma() and ready and x.data_ptr() % 16 == 0:
        return x
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def operand(
    x: Tensor | None, block_r: int, block_d: int, *, adds: bool = False
) -> TensorDescriptor | Tensor | None:
    """What load_tile and store_tile take, or add_tile: tiles of one head of x [T, H, D], padded to
    block_d. TMA of the interpreter cannot add."""
    if x is None or not _lib.has_tma() or (adds and _lib.INTERPRETING):
        return x
    return TensorDescriptor.from_tensor(x.transpose(0, 1), [1, block_r, block_d])


def empty_lse(q: Tensor) -> Tensor:
    return q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
