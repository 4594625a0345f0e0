"""Diagonal linear recurrence over packed sequences, with a state that enters and one that leaves.

    h[t] = a[t] * h[t-1] + b[t]      within a sequence; before its first token: h0[s], or 0
    h_T[s] = h[cu[s+1] - 1]          of an empty sequence: h0[s]

    for each chunk of time that a sequence leaves unfinished: its map h -> A h + B
    for each tile of the channels and the chunk of this program, the next one being loaded:
        for each sequence that has a part in it (steps of others are the identity):
            the parts of the tile become maps, row by row; a scan over parts finds the h before each
            h = a * h + b, row by row; where the sequence ends: h_T = h, and the next one's h0

    Backward, the same against time, for v = a[t+1] * u[t+1]:
        u = v + dh; v = a * u                  a map too: v -> a v + a dh
        da = u * h[t-1]; db = u                where the sequence begins: dh0 = v

Nothing depends on what cu_seqlens holds but the work: nothing is compiled or read by the host when
lengths change. A state never passes from one sequence to another, be it NaN.
How tiles, parts and sequences are walked over: linear_scan_walk.py.

Limits: from Ampere up; bfloat16, float16, float32; states in float32. The product of all a of a
tile must be finite (|a| <= 1, mostly).

Twin: pallas_kernels/linear_scan.py.

Sources: Blelloch, Prefix sums and their applications (CMU-CS-90-190), for maps that compose; Martin
and Cundy (arXiv:1709.04057) for the recurrence and its gradient as such scans.
"""

import itertools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _lib
from .linear_scan_walk import (
    across,
    bound,
    check_sequences,
    enter,
    existing,
    first_sequence,
    initial,
    launch_sizes,
    load_rows,
    multiply,
    part_of,
    row_ptr,
    state_row,
    step_of,
    tiling,
    trips,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Config:
    """Tile sizes and resources of the kernels; beyond the last bits the result ignores them.

    block_t: steps of a tile, in 64 * warps / block_c parts: a thread takes two channels of a part.
        A single part is scanned row by row alone, and needs no maps.
    block_c: channels of a program.
    chunks: how many chunks time is cut into, each a program's; 1 reads a and b just once.
    warps: warps of a program.
    programs: how many share a multiprocessor, and thereby its registers.
    """

    block_t: int = 32
    block_c: int = 64
    chunks: int = 1
    warps: int = 4
    programs: int = 4

    def __post_init__(self) -> None:
        for name, least in (("block_c", 16), ("block_t", max(2, 2 * self.parts))):
            size = getattr(self, name)
            if size < least or size & (size - 1):
                raise ValueError(f"{name}: expected a power of two >= {least}, got {size}")
        if self.parts < 1:
            raise ValueError(f"block_c: expected at most {64 * self.warps}, got {self.block_c}")
        if self.chunks < 1:
            raise ValueError(f"chunks: expected at least 1, got {self.chunks}")

    @property
    def parts(self) -> int:
        """Parts of a tile."""
        return 64 * self.warps // self.block_c

    @property
    def shape(self) -> tuple[int, int, int]:
        """What a kernel takes: steps and channels of a tile, rows."""
        return self.block_t, self.block_c, self.block_t // self.parts

    @property
    def carry_shape(self) -> tuple[int, int, int]:
        """The same for the carry pass, in which a few programs may have most of the work: twice the
        steps of half the channels."""
        return 2 * self.block_t, self.block_c // 2, self.block_t // self.parts

    @property
    def resources(self) -> dict[str, int]:
        """What a launch takes."""
        registers = 65536 // (32 * self.warps * self.programs) // 8 * 8
        return {"num_warps": self.warps, "maxnreg": min(255, registers)}


def default_config(T: int, W: int, B: int, dtype: torch.dtype, which: str = "fwd") -> Config:
    """The Config for T tokens in B sequences of W channels; which: "fwd" or "bwd"."""
    # 8 rows of two channels, of this tile and the next, are what 128 registers hold; half as many
    # where they are wider, or twice as many where there are 200 registers.
    block_c, chunks, warps, programs = tiling(T, W, B, which == "fwd")
    rows = 8 if warps * programs > 10 else 16
    rows //= 1 + (which == "bwd" and (dtype.itemsize == 4 or block_c == 32))
    return Config(64 * warps // block_c * rows, block_c, chunks, warps, programs)


@triton.jit
def _linear_scan_carry_kernel(
    a_ptr,  # [T, W]
    b_ptr,  # [T, W]
    cu_ptr,  # [B + 1] int32
    h0_ptr,  # [B, W] float32 or None
    carry_ptr,  # [chunks, 2, W] float32
    T, B, chunk, W: tl.constexpr, stride_a: tl.constexpr, stride_b: tl.constexpr,
    block_t: tl.constexpr, block_c: tl.constexpr, rows: tl.constexpr, reverse: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = block_t // rows
    # --- 1. which tile
    c = tl.program_id(0) * block_c + tl.arange(0, block_c)
    ci = tl.program_id(1)
    end = (ci + 1) * chunk
    s = first_sequence(cu_ptr, end, T, B, reverse)
    begin = bound(cu_ptr, s, T, B, reverse)
    if (end < T) & (begin < end):  # a sequence goes on in the next chunk
        first = tl.maximum(begin, ci * chunk)
        a_all = tl.full((parts, block_c), 1.0, tl.float32)
        h = initial(h0_ptr, s, c, W, B, reverse)
        h = tl.where(begin >= ci * chunk, h, 0.0)
        # --- 2. main loop
        a_tile = load_rows(a_ptr, stride_a, first, end, c, W, T, parts, rows, reverse)
        b_tile = load_rows(b_ptr, stride_b, first, end, c, W, T, parts, rows, reverse)
        for k0 in tl.range(first, end, block_t, disable_licm=True):
            k1 = k0 + block_t
            a_next = load_rows(a_ptr, stride_a, k1, end, c, W, T, parts, rows, reverse)
            b_next = load_rows(b_ptr, stride_b, k1, end, c, W, T, parts, rows, reverse)
            a_part = tl.full((parts, block_c), 1.0, tl.float32)
            b_part = tl.zeros((parts, block_c), tl.float32)
            for r in tl.static_range(rows):
                inside = step_of(k0, r, parts, rows) < end
                a = tl.where(inside, a_tile[r].to(tl.float32), 1.0)
                b = b_tile[r].to(tl.float32)
                if reverse:
                    b_part = a * (b_part + b)
                else:
                    b_part = a * b_part + b
                a_part *= a
            _, h = across(a_part, b_part, h)
            a_all *= a_part
            a_tile, b_tile = a_next, b_next
        # --- 3. epilogue
        carry = carry_ptr + 2 * ci.to(tl.int64) * W + c
        # --- 4. store
        tl.store(carry, tl.reduce(a_all, 0, multiply), c < W)
        tl.store(carry + W, h, c < W)


@triton.jit
def _linear_scan_fwd_kernel(
    a_ptr,  # [T, W]
    b_ptr,  # [T, W]
    cu_ptr,  # [B + 1] int32
    h0_ptr,  # [B, W] float32 or None
    carry_ptr,  # [chunks, 2, W] float32
    h_ptr,  # [T, W]
    h_T_ptr,  # [B, W] float32
    T, B, chunk, W: tl.constexpr, stride_a: tl.constexpr, stride_b: tl.constexpr,
    block_t: tl.constexpr, block_c: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = block_t // rows
    # --- 1. which tile
    c = tl.program_id(0) * block_c + tl.arange(0, block_c)
    ci = tl.program_id(1)
    first, end, s, begin, stop, h = enter(cu_ptr, h0_ptr, carry_ptr, ci, chunk, c, T, B, W, False)

    # --- 2. main loop
    k0 = first
    a_tile = load_rows(a_ptr, stride_a, k0, end, c, W, T, parts, rows, False)
    b_tile = load_rows(b_ptr, stride_b, k0, end, c, W, T, parts, rows, False)
    walk = trips(cu_ptr, s, first, end, T, B, block_t, False)
    for _ in tl.range(walk, disable_licm=True):
        low, high, done, k_next = part_of(s, begin, stop, k0, end, T, B, block_t)
        a_next = load_rows(a_ptr, stride_a, k_next, end, c, W, T, parts, rows, False)
        b_next = load_rows(b_ptr, stride_b, k_next, end, c, W, T, parts, rows, False)
        a_part = tl.full((parts, block_c), 1.0, tl.float32)
        b_part = tl.zeros((parts, block_c), tl.float32)
        for r in tl.static_range(rows):
            k = step_of(k0, r, parts, rows)
            inside = (k >= low) & (k < high)
            a = tl.where(inside, a_tile[r].to(tl.float32), 1.0)
            b_part = a * b_part + tl.where(inside, b_tile[r].to(tl.float32), 0.0)
            a_part *= a
        # --- 3. epilogue
        h_row, h = across(a_part, b_part, h)
        # --- 4. store
        for r in tl.static_range(rows):
            k = step_of(k0, r, parts, rows)
            inside = (k >= low) & (k < high)
            a = tl.where(inside, a_tile[r].to(tl.float32), 1.0)
            h_row = a * h_row + tl.where(inside, b_tile[r].to(tl.float32), 0.0)
            h_tile = h_row.to(h_ptr.dtype.element_ty)
            tl.store(
                row_ptr(h_ptr, W, k0, r, c, T, parts, rows, False), h_tile, existing(inside, c, W)
            )
        if parts == 1:
            h = tl.sum(h_row, 0)
        if done:
            tl.store(state_row(h_T_ptr, s, c, W, B, False), h, c < W)
            s += 1
            h = initial(h0_ptr, s, c, W, B, False)
            begin = stop
            stop = bound(cu_ptr, s + 1, T, B, False)
        k0, a_tile, b_tile = k_next, a_next, b_next


@triton.jit
def _linear_scan_bwd_kernel(
    a_ptr,  # [T, W]
    h_ptr,  # [T, W]
    cu_ptr,  # [B + 1] int32
    h0_ptr,  # [B, W] float32 or None
    carry_ptr,  # [chunks, 2, W] float32
    dh_ptr,  # [T, W]
    dh_T_ptr,  # [B, W] float32 or None
    da_ptr,  # [T, W]
    db_ptr,  # [T, W]
    dh0_ptr,  # [B, W] float32
    T, B, chunk, W: tl.constexpr, stride_a: tl.constexpr, stride_h: tl.constexpr,
    stride_dh: tl.constexpr,
    block_t: tl.constexpr, block_c: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = block_t // rows
    # --- 1. which tile
    c = tl.program_id(0) * block_c + tl.arange(0, block_c)
    ci = tl.program_id(1)
    first, end, s, begin, stop, v = enter(cu_ptr, dh_T_ptr, carry_ptr, ci, chunk, c, T, B, W, True)

    # --- 2. main loop
    k0 = first
    a_tile = load_rows(a_ptr, stride_a, k0, end, c, W, T, parts, rows, True)
    dh_tile = load_rows(dh_ptr, stride_dh, k0, end, c, W, T, parts, rows, True)
    h_tile = load_rows(h_ptr, stride_h, k0, end, c, W, T, parts, rows, True, -1)
    walk = trips(cu_ptr, s, first, end, T, B, block_t, True)
    for _ in tl.range(walk, disable_licm=True):
        low, high, done, k_next = part_of(s, begin, stop, k0, end, T, B, block_t)
        a_next = load_rows(a_ptr, stride_a, k_next, end, c, W, T, parts, rows, True)
        dh_next = load_rows(dh_ptr, stride_dh, k_next, end, c, W, T, parts, rows, True)
        h_next = load_rows(h_ptr, stride_h, k_next, end, c, W, T, parts, rows, True, -1)
        a_part = tl.full((parts, block_c), 1.0, tl.float32)
        b_part = tl.zeros((parts, block_c), tl.float32)
        for r in tl.static_range(rows):
            k = step_of(k0, r, parts, rows)
            inside = (k >= low) & (k < high)
            a = tl.where(inside, a_tile[r].to(tl.float32), 1.0)
            b_part = a * (b_part + tl.where(inside, dh_tile[r].to(tl.float32), 0.0))
            a_part *= a
        # --- 3. epilogue
        v_row, v = across(a_part, b_part, v)
        # --- 4. store
        h_start = initial(h0_ptr, s, c, W, B, True)[None, :]
        for r in tl.static_range(rows):
            k = step_of(k0, r, parts, rows)
            inside = (k >= low) & (k < high)
            a = tl.where(inside, a_tile[r].to(tl.float32), 1.0)
            u = v_row + tl.where(inside, dh_tile[r].to(tl.float32), 0.0)
            v_row = a * u
            da = u * tl.where(k == stop - 1, h_start, h_tile[r].to(tl.float32))
            exist = existing(inside, c, W)
            da = da.to(da_ptr.dtype.element_ty)
            tl.store(row_ptr(da_ptr, W, k0, r, c, T, parts, rows, True), da, exist)
            tl.store(row_ptr(db_ptr, W, k0, r, c, T, parts, rows, True), u.to(da.dtype), exist)
        if parts == 1:
            v = tl.sum(v_row, 0)
        if done:
            tl.store(state_row(dh0_ptr, s, c, W, B, True), v, c < W)
            s += 1
            v = initial(dh_T_ptr, s, c, W, B, True)
            begin = stop
            stop = bound(cu_ptr, s + 1, T, B, True)
        k0, a_tile, dh_tile, h_tile = k_next, a_next, dh_next, h_next


@triton.jit
def _linear_scan_step_kernel(
    a_ptr,  # [B, W]
    b_ptr,  # [B, W]
    h0_ptr,  # [B, W] float32 or None
    h_ptr,  # [B, W]
    h_T_ptr,  # [B, W] float32
    W, stride_a, stride_b, block_c: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    c = tl.program_id(0) * block_c + tl.arange(0, block_c)
    s = tl.program_id(1)
    # --- 2. main loop: one token
    row, exist = s.to(tl.int64), c < W
    a = tl.load(a_ptr + row * stride_a + c, exist, 0.0).to(tl.float32)
    b = tl.load(b_ptr + row * stride_b + c, exist, 0.0).to(tl.float32)
    # --- 3. epilogue
    h = b if h0_ptr is None else a * tl.load(h0_ptr + row * W + c, exist, 0.0) + b
    # --- 4. store
    tl.store(h_ptr + row * W + c, h.to(h_ptr.dtype.element_ty), exist)
    tl.store(h_T_ptr + row * W + c, h, exist)


def _fake_fwd(a, b, cu_seqlens, h0, config):
    states = len(cu_seqlens) - 1, a.shape[1]
    return [a.new_empty(a.shape), a.new_empty(states, dtype=torch.float32)]


@_lib.opaque("linear_scan_fwd", _fake_fwd)
def _forward(
    a: Tensor, b: Tensor, cu_seqlens: Tensor, h0: Tensor | None, config: list[int] | None
) -> list[Tensor]:
    """[h, h_T]."""
    (T, W), B = a.shape, len(cu_seqlens) - 1
    h, h_T = a.new_empty(T, W), a.new_empty(B, W, dtype=torch.float32)
    if 0 in (T, W, B):
        return [h.zero_(), h_T.zero_() if h0 is None else h_T.copy_(h0)]
    a, b, cu_seqlens = map(_lib.rows_adjacent, (a, b, cu_seqlens))
    h0 = None if h0 is None else h0.contiguous()
    with _lib.on_device(a):
        _lib.check_gpu()
        tiles = Config(*config) if config else default_config(T, W, B, a.dtype)
        chunk, grid, carry_grid = launch_sizes(T, W, tiles)
        sizes = T, B, chunk, W, a.stride(0), b.stride(0)
        carry = a.new_empty(grid[1], 2, W, dtype=torch.float32)
        if grid[1] > 1:
            _linear_scan_carry_kernel[carry_grid](
                a, b, cu_seqlens, h0, carry, *sizes, *tiles.carry_shape, False, **tiles.resources
            )
        _linear_scan_fwd_kernel[grid](
            a, b, cu_seqlens, h0, carry, h, h_T, *sizes, *tiles.shape, **tiles.resources
        )
    return [h, h_T]


def _fake_bwd(a, h, cu_seqlens, h0, dh, dh_T, config):
    states = len(cu_seqlens) - 1, a.shape[1]
    rows = [a.new_empty(a.shape), a.new_empty(a.shape)]
    return [*rows, a.new_empty(states, dtype=torch.float32)]


@_lib.opaque("linear_scan_bwd", _fake_bwd)
def _backward(
    a: Tensor,
    h: Tensor,
    cu_seqlens: Tensor,
    h0: Tensor | None,
    dh: Tensor,
    dh_T: Tensor | None,
    config: list[int] | None,
) -> list[Tensor]:
    """[da, db, dh0]."""
    (T, W), B = a.shape, len(cu_seqlens) - 1
    da, db = a.new_empty(T, W), a.new_empty(T, W)
    dh0 = a.new_empty(B, W, dtype=torch.float32)
    if 0 in (T, W, B):
        return [da.zero_(), db.zero_(), dh0.zero_() if dh_T is None else dh0.copy_(dh_T)]
    a, h, dh, cu_seqlens = map(_lib.rows_adjacent, (a, h, dh, cu_seqlens))
    h0, dh_T = (None if x is None else x.contiguous() for x in (h0, dh_T))
    with _lib.on_device(a):
        _lib.check_gpu()
        tiles = Config(*config) if config else default_config(T, W, B, a.dtype, "bwd")
        chunk, grid, carry_grid = launch_sizes(T, W, tiles)
        carry = a.new_empty(grid[1], 2, W, dtype=torch.float32)
        if grid[1] > 1:
            _linear_scan_carry_kernel[carry_grid](
                a, dh, cu_seqlens, dh_T, carry, T, B, chunk, W, a.stride(0), dh.stride(0),
                *tiles.carry_shape, True, **tiles.resources,
            )  # fmt: skip
        _linear_scan_bwd_kernel[grid](
            a, h, cu_seqlens, h0, carry, dh, dh_T, da, db, dh0, T, B, chunk, W,
            a.stride(0), h.stride(0), dh.stride(0), *tiles.shape, **tiles.resources,
        )  # fmt: skip
    return [da, db, dh0]


def linear_scan_check(cu_seqlens: Tensor, *, T: int) -> None:
    """Raises ValueError if cu_seqlens [B + 1] does not grow from 0 to T; it waits for the device.

    The kernels do not: what they then return is not defined, but they stay inside their arrays.
    """
    _lib.check_tensor("cu_seqlens", cu_seqlens, ("B + 1",), (torch.int32,))
    _lib.check_static("T", T, (int,))
    bounds = cu_seqlens.tolist()
    if not bounds or bounds[0] != 0:
        raise ValueError(f"cu_seqlens: expected to begin with 0, got {bounds[:1]}")
    for s, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if stop < start:
            raise ValueError(
                f"cu_seqlens: expected in ascending order, got {stop} after {start} (sequence {s})"
            )
    if bounds[-1] != T:
        raise ValueError(f"cu_seqlens: expected to end with T = {T}, got {bounds[-1]}")


def linear_scan_fwd(
    a: Tensor,
    b: Tensor,
    cu_seqlens: Tensor,
    h0: Tensor | None = None,
    *,
    config: Config | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """linear_scan and what its backward needs. No gradient flows through this.

    Returns ((h, h_T), (a, h, cu_seqlens, h0)).
    """
    _lib.check_tensor("a", a, ("T", "W"), DTYPES)
    _lib.check_tensor("b", b, tuple(a.shape), (a.dtype,))
    check_sequences(cu_seqlens, a.shape[1], h0=h0)
    _lib.check_same_device(a=a, b=b, cu_seqlens=cu_seqlens, h0=h0)
    _lib.check_config(config, Config)
    h, h_T = _forward(a, b, cu_seqlens, h0, _lib.fields(config))
    return (h, h_T), (a, h, cu_seqlens, h0)


def linear_scan_bwd(
    res: tuple[Tensor, Tensor, Tensor, Tensor | None],
    dh: Tensor,
    dh_T: Tensor | None = None,
    *,
    config: Config | None = None,
) -> tuple[Tensor, ...]:
    """Gradients (da, db [T, W] in a's dtype), and dh0 [B, W] float32 if there was an h0.

    res: (a, h, cu_seqlens, h0) of linear_scan_fwd. dh [T, W], dh_T [B, W] float32: cotangents of
    h and h_T; dh_T None is zero. The same inputs give the same bits.
    """
    a, h, cu_seqlens, h0 = res
    _lib.check_tensor("a", a, ("T", "W"), DTYPES)
    _lib.check_tensor("h", h, tuple(a.shape), (a.dtype,))
    _lib.check_tensor("dh", dh, tuple(a.shape), (a.dtype,))
    check_sequences(cu_seqlens, a.shape[1], h0=h0, dh_T=dh_T)
    _lib.check_same_device(a=a, h=h, cu_seqlens=cu_seqlens, h0=h0, dh=dh, dh_T=dh_T)
    _lib.check_config(config, Config)
    da, db, dh0 = _backward(a, h, cu_seqlens, h0, dh, dh_T, _lib.fields(config))
    return (da, db) if h0 is None else (da, db, dh0)


class _LinearScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, cu_seqlens, h0, config):
        out, res = linear_scan_fwd(a, b, cu_seqlens, h0, config=config)
        ctx.save_for_backward(*res)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dh, dh_T):
        res = ctx.saved_tensors
        if dh is None:  # only h_T was used
            dh = torch.zeros_like(res[1])
        grads = linear_scan_bwd(res, dh, dh_T)
        da, db, dh0 = (*grads, None)[:3]
        need_a, need_b, _, need_h0, _ = ctx.needs_input_grad
        return da if need_a else None, db if need_b else None, None, dh0 if need_h0 else None, None


def linear_scan(
    a: Tensor,
    b: Tensor,
    cu_seqlens: Tensor,
    h0: Tensor | None = None,
    *,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """h [T, W] = a * (h of the token before) + b, and the last states h_T [B, W].

    a, b [T, W]: bfloat16, float16 or float32, the same; h has their dtype. B sequences lie one
    after the other, the tokens of sequence s from cu_seqlens[s] on. cu_seqlens [B + 1] int32, from
    0 to T, is read on the device alone: linear_scan_check looks at what it holds.
    h0 [B, W] float32: the states before the first tokens; None is zero. h_T is float32.
    config: tiles of this call; gradients take their own default. Differentiable once.

    Raises TypeError for dtypes and ValueError for shapes and devices that do not fit, naming the
    argument; NotImplementedError on a GPU older than Ampere.
    """
    return _LinearScan.apply(a, b, cu_seqlens, h0, config)


def linear_scan_step(a: Tensor, b: Tensor, h0: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One token of each of B sequences: (h [B, W] in a's dtype, h_T [B, W] float32).

    a, b [B, W], h0 [B, W] float32 or None as in linear_scan; h_T is the next step's h0. No
    gradient flows through this.
    """
    _lib.check_tensor("a", a, ("B", "W"), DTYPES)
    _lib.check_tensor("b", b, tuple(a.shape), (a.dtype,))
    if h0 is not None:
        _lib.check_tensor("h0", h0, tuple(a.shape), (torch.float32,))
    _lib.check_same_device(a=a, b=b, h0=h0)
    B, W = a.shape
    h, h_T = a.new_empty(B, W), a.new_empty(B, W, dtype=torch.float32)
    if 0 not in (B, W):
        a, b = _lib.rows_adjacent(a), _lib.rows_adjacent(b)
        h0 = None if h0 is None else h0.contiguous()
        with _lib.on_device(a):
            _lib.check_gpu()
            _linear_scan_step_kernel[_lib.cdiv(W, 512), B](
                a, b, h0, h, h_T, W, a.stride(0), b.stride(0), 512, num_warps=4
            )
    return h, h_T
