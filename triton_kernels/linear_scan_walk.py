"""What the scans share: parts of a tile side by side, chunks of time, the sequences in a chunk.

A step k of a scan is a token: t = k forwards, t = T - 1 - k against time; sequences are counted in
the order in which a scan meets them. A tile is `block_t` steps in `parts` parts, and a row of it,
[parts, block_c], holds one step of each part: loaded side by side, scanned row by row.

Twin: pallas_kernels/linear_scan_walk.py.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _lib


def tiling(T: int, W: int, B: int, alone: bool) -> tuple[int, int, int, int]:
    """(block_c, chunks, warps, programs) for T tokens in B sequences of W channels: chunks that cut
    no sequence where all are alike, if such programs keep 132 multiprocessors equally busy; else as
    many chunks as fit. A chunk that ends within a sequence has the rest of that chunk read twice.

    alone: a multiprocessor may have a single program. programs: how many a multiprocessor has.
    """
    for block_c in (64, 32):
        blocks, most = _lib.cdiv(W, block_c), 4 * 132 * 64 // block_c
        chunks = max((d for d in range(1, B + 1) if B % d == 0 and d * blocks <= most), default=1)
        programs = _lib.cdiv(chunks * blocks, 132)
        if chunks * blocks > 0.85 * 132 * programs and (alone or programs > 1):
            break
    else:
        most = _lib.cdiv(T, 64)  # shorter ones would be all overhead
        block_c = 64 if _lib.cdiv(W, 64) * most >= 4 * 132 else 32
        chunks, programs = min(max(1, 4 * 132 // _lib.cdiv(W, block_c)), most), 4
    warps = 8 if programs == 1 else 4 if programs <= 4 else 2
    return block_c, chunks, warps, programs


def launch_sizes(T: int, W: int, tiles: Any) -> tuple[int, tuple[int, int], tuple[int, int]]:
    """Steps of a chunk, a multiple of the tile's, the grid, and that of the carry pass."""
    chunk = _lib.cdiv(_lib.cdiv(T, tiles.chunks), tiles.block_t) * tiles.block_t
    chunks = _lib.cdiv(T, chunk)
    carry_grid = _lib.cdiv(W, tiles.carry_shape[1]), chunks - 1
    return chunk, (_lib.cdiv(W, tiles.block_c), chunks), carry_grid


def check_sequences(cu_seqlens: Tensor, W: int, **states: Tensor | None) -> None:
    """Raises unless cu_seqlens and the states given fit W channels."""
    _lib.check_tensor("cu_seqlens", cu_seqlens, ("B + 1",), (torch.int32,))
    if len(cu_seqlens) == 0:
        raise ValueError("cu_seqlens: expected shape [B + 1], got [0]")
    for name, state in states.items():
        if state is not None:
            _lib.check_tensor(name, state, (len(cu_seqlens) - 1, W), (torch.float32,))


@triton.jit
def compose(a1, b1, c1, d1, a2, b2, c2, d2):
    """Maps 1, then maps 2: h -> a h + b of all, and h -> c h + d of all but the last of them."""
    return a1 * a2, a2 * b1 + b2, a1 * c2, c2 * b1 + d2


@triton.jit
def multiply(a, b):
    """For tl.reduce."""
    return a * b


@triton.jit
def bound(cu_ptr, s, T, B, reverse: tl.constexpr):
    """The step at which the sequence with number s begins, or the last one ends."""
    s = tl.minimum(s, B)  # a wrong cu_seqlens has chunks behind its last sequence
    return T - tl.load(cu_ptr + B - s) if reverse else tl.load(cu_ptr + s)


@triton.jit
def first_sequence(cu_ptr, k0, T, B, reverse: tl.constexpr):
    """The sequence with which step k0 goes on or begins, the first of those that begin there."""
    low, high = 0, B
    while low < high:
        mid = (low + high) // 2
        if bound(cu_ptr, mid, T, B, reverse) < k0:
            low = mid + 1
        else:
            high = mid
    return tl.where(bound(cu_ptr, low, T, B, reverse) > k0, tl.maximum(low - 1, 0), low)


@triton.jit
def trips(cu_ptr, s, first, end, T, B, block_t: tl.constexpr, reverse: tl.constexpr):
    """How often a walk from step `first`, in sequence s, to `end` takes a tile, at most: once, and
    once more for each further sequence that has a part in it."""
    last = B
    if end < T:
        last = first_sequence(cu_ptr, end, T, B, reverse)
    return tl.cdiv(end - first, block_t) + last - s


@triton.jit
def state_row(state_ptr, s, c, W, B, reverse: tl.constexpr):
    """Where the state of a sequence lies. [block_c]"""
    row = B - 1 - s if reverse else s
    return state_ptr + row.to(tl.int64) * W + c


@triton.jit
def initial(state_ptr, s, c, W, B, reverse: tl.constexpr):
    """The state that enters a sequence; zero where none is given."""
    h = tl.zeros(c.shape, tl.float32)
    if state_ptr is not None:
        h = tl.load(state_row(state_ptr, s, c, W, B, reverse), (c < W) & (s < B), 0.0)
    return h


@triton.jit
def carried(carry_ptr, begin, chunk, ci, c, W):
    """The state that the chunks before chunk ci leave, from the one on where its sequence begins.

    carry: [chunks, 2, W], of each chunk the map of its last sequence.
    """
    first = begin // chunk
    h = tl.zeros(c.shape, tl.float32)
    carry = carry_ptr + 2 * first.to(tl.int64) * W + c
    for j in tl.range(first, ci):
        a, b = tl.load(carry, c < W, 0.0), tl.load(carry + W, c < W, 0.0)
        h = tl.where(j == first, b, a * h + b)  # what came before the sequence may be NaN
        carry += 2 * W
    return h


@triton.jit
def enter(
    cu_ptr, state_ptr, carry_ptr, ci, chunk, c, T, B, W: tl.constexpr, reverse: tl.constexpr
):  # fmt: skip
    """Of chunk ci: its steps from first to end, the sequence s that it begins with, whose steps are
    those from begin to stop, and the state before the chunk."""
    first, end = ci * chunk, tl.minimum((ci + 1) * chunk, T)
    s = first_sequence(cu_ptr, first, T, B, reverse)
    begin, stop = bound(cu_ptr, s, T, B, reverse), bound(cu_ptr, s + 1, T, B, reverse)
    if begin < first:
        state = carried(carry_ptr, begin, chunk, ci, c, W)
    else:
        state = initial(state_ptr, s, c, W, B, reverse)
    return first, end, s, begin, stop, state


@triton.jit
def part_of(s, begin, stop, k0, end, T, B, block_t: tl.constexpr):
    """The steps from low to high that sequence s has in the tile at k0, whether it ends there, and
    the tile to go on with: the same if the next sequence has a part in it."""
    k1 = tl.minimum(k0 + block_t, end)
    low, high = tl.maximum(begin, k0), tl.minimum(stop, k1)
    done = (stop <= k1) & (k0 < end) & (s < B)
    stays = done & (s + 1 < B) & ((stop < k1) | (k1 == T))
    return low, high, done, tl.where(stays, k0, k1)


@triton.jit
def step_of(k0, r: tl.constexpr, parts: tl.constexpr, rows: tl.constexpr):
    """The steps in row r of the tile that begins at k0. [parts, 1]"""
    return k0 + tl.arange(0, parts)[:, None] * rows + r


@triton.jit
def row_ptr(
    x_ptr, stride: tl.constexpr, k0, r: tl.constexpr, c, T,
    parts: tl.constexpr, rows: tl.constexpr, reverse: tl.constexpr, shift: tl.constexpr = 0,
):  # fmt: skip
    """Addresses of row r of the tile at k0: those of row 0 and a constant. [parts, block_c]"""
    k = step_of(k0, 0, parts, rows)
    t = (T - 1 - k if reverse else k) + shift
    first = x_ptr + t.to(tl.int64) * stride + c[None, :]
    return first - r * stride if reverse else first + r * stride


@triton.jit
def existing(inside, c, W: tl.constexpr):
    """inside [parts, 1], and channels that exist. [parts, 1] or [parts, block_c]"""
    if (c.shape[0] + W) % c.shape[0] == 0:  # (the interpreter cannot divide by a constexpr)
        return inside
    else:
        return inside & (c < W)[None, :]


@triton.jit
def load_rows(
    x_ptr, stride: tl.constexpr, k0, end, c, W: tl.constexpr, T,
    parts: tl.constexpr, rows: tl.constexpr, reverse: tl.constexpr, shift: tl.constexpr = 0,
):  # fmt: skip
    """The rows of a tile as they are stored; zeros from step `end` on and before the array."""
    found = ()
    for r in tl.static_range(rows):
        k = step_of(k0, r, parts, rows)
        exist = k < end
        if shift != 0:
            exist = exist & (k < T + shift)
        at = row_ptr(x_ptr, stride, k0, r, c, T, parts, rows, reverse, shift)
        found = found + (tl.load(at, existing(exist, c, W), 0.0),)  # noqa: RUF005
    return found


@triton.jit
def across(a, b, h):
    """From the maps of the parts [parts, block_c]: the state before each, and after the last."""
    if a.shape[0] == 1:
        return h[None, :], tl.sum(a * h[None, :] + b, 0)
    part = tl.arange(0, a.shape[0])[:, None]
    b = tl.where(part == 0, a * h[None, :] + b, b)
    # (a scan that excludes would take a gather, for which Triton moves every row to other lanes)
    one, zero = tl.full(a.shape, 1.0, tl.float32), tl.zeros(a.shape, tl.float32)
    _, b, _, before = tl.associative_scan((a, b, one, zero), 0, compose)
    last = tl.sum(tl.where(part == a.shape[0] - 1, b, 0.0), 0)
    return tl.where(part == 0, h[None, :], before), last
