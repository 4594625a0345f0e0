"""Real-gated linear recurrent unit over packed sequences: gates and recurrence in one pass.

    r = sigmoid(r_pre)    i = sigmoid(i_pre)    log a = -c * r * softplus(lam)
    h[t] = a[t] * h[t-1] + m[t] * i[t] * x[t]    m = sqrt(1 - a^2)    h_T[s]: h after the last token
    A sequence begins with h0[s]; without h0 its first token enters as it is: a = 0 and m = 1.

    for each chunk of time that a sequence leaves unfinished: its map h -> A h + B
    for each tile of the channels and the chunk of this program, the next one being loaded:
        a and m * i * x, row by row; then as linear_scan does with its a and b

    Backward, against time, with v = a[t+1] * u[t+1]:
        r and a, row by row; u = v + dh by the maps v -> a v + a dh
        dm = u * i * x; dlog a = u * h[t-1] * a - dm * a^2 / max(m, 5e-4)
        dx, dr_pre, di_pre; sums of r * dlog a, for dlam, in registers
    each program's sums to a workspace [chunks, W]; a second kernel adds those in a fixed order

m^2 is a polynomial of log a where a is near 1: there 1 - a^2 would cancel.

Limits: from Ampere up; bfloat16, float16, float32; lam, states and dlam in float32.

Twin: pallas_kernels/rglru.py.

Sources: Griffin (arXiv:2402.19427); its public code for the first token and for the bound on the
derivative of the root.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _lib
from .linear_scan import DTYPES
from .linear_scan import Config as _ScanConfig
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


@dataclass(frozen=True)
class Config(_ScanConfig):
    """As linear_scan's."""


def default_config(T: int, W: int, B: int, dtype: torch.dtype, which: str = "fwd") -> Config:
    """The Config for T tokens in B sequences of W channels; which: "fwd" or "bwd"."""
    # 8 rows of two channels for each thread, or 16 where there are 200 registers; half as many of
    # float32, and half as many in a backward.
    block_c, chunks, warps, programs = tiling(T, W, B, which == "fwd")
    rows = 8 if warps * programs > 10 else 16
    rows //= (1 + (which == "bwd")) * (1 + (dtype.itemsize == 4))
    return Config(64 * warps // block_c * rows, block_c, chunks, warps, programs)


@triton.jit
def _sigmoid(x):
    s = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))  # a division would take longer
    return s * s


@triton.jit
def _power(lam_ptr, c, W, factor):
    """log2(a) / r = -factor * softplus(lam) / ln 2, as precise for lam far below 0, where models
    have it. [block_c]"""
    lam = tl.load(lam_ptr + c, c < W, 0.0)
    z = tl.exp(-tl.abs(lam))
    w = z / (2.0 + z)  # log(1 + z) = 2 atanh(w)
    w2 = w * w
    series = 1.0 / 9 + w2 * (1.0 / 11 + w2 * (1.0 / 13 + w2 * (1.0 / 15)))
    series = 1.0 + w2 * (1.0 / 3 + w2 * (1.0 / 5 + w2 * (1.0 / 7 + w2 * series)))
    return -1.4426950408889634 * factor * (tl.maximum(lam, 0.0) + 2.0 * w * series)


@triton.jit
def _decay(r_pre, power, inside, fresh):
    """(r, a, 1 - a^2); fresh: the token enters as it is. A token that is not inside: a = 1."""
    r = _sigmoid(r_pre.to(tl.float32))
    log2_a = tl.where(inside & fresh, float("-inf"), 0.0)
    log2_a = tl.where(inside & (fresh == 0), power[None, :] * r, log2_a)
    a = tl.exp2(log2_a)
    # of 1 - 2^(2 x) for small x: the polynomial of degree 4 with the least relative error, 3e-7
    near = -0.9608487 + log2_a * (-0.4424275 + log2_a * -0.1393648)
    near = log2_a * (-1.386294 + log2_a * near)
    return r, a, tl.where(log2_a > -0.18, near, 1.0 - a * a)


@triton.jit
def _map(x, r_pre, i_pre, power, inside, fresh):
    """a and b of a row."""
    _, a, square = _decay(r_pre, power, inside, fresh)
    # m * i = sqrt(square) / (1 + e) with one root; the bound keeps 0 * inf away
    e = tl.exp2(tl.minimum(i_pre.to(tl.float32) * -1.4426950408889634, 60.0))
    m_i = square * tl.rsqrt(square * (1.0 + e) * (1.0 + e) + 1e-37)
    return a, tl.where(inside, m_i * x.to(tl.float32), 0.0)


@triton.jit
def _rglru_carry_kernel(
    x_ptr,  # [T, W], dh in a backward
    r_ptr,  # [T, W]
    i_ptr,  # [T, W]
    lam_ptr,  # [W] float32
    cu_ptr,  # [B + 1] int32
    h0_ptr,  # [B, W] float32 or None: the states that enter
    carry_ptr,  # [chunks, 2, W] float32
    T, B, chunk, factor, W: tl.constexpr,
    stride_x: tl.constexpr, stride_r: tl.constexpr, stride_i: tl.constexpr,
    block_t: tl.constexpr, block_c: tl.constexpr, rows: tl.constexpr,
    fresh: tl.constexpr, reverse: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = block_t // rows
    # --- 1. which tile
    c = tl.program_id(0) * block_c + tl.arange(0, block_c)
    ci = tl.program_id(1)
    end = (ci + 1) * chunk
    s = first_sequence(cu_ptr, end, T, B, reverse)
    begin = bound(cu_ptr, s, T, B, reverse)
    if (end < T) & (begin < end):  # a sequence goes on in the next chunk
        power = _power(lam_ptr, c, W, factor)
        first = tl.maximum(begin, ci * chunk)
        last = bound(cu_ptr, s + 1, T, B, reverse) - 1
        a_all = tl.full((parts, block_c), 1.0, tl.float32)
        h = initial(h0_ptr, s, c, W, B, reverse)
        h = tl.where(begin >= ci * chunk, h, 0.0)
        # --- 2. main loop
        x_tile = load_rows(x_ptr, stride_x, first, end, c, W, T, parts, rows, reverse)
        r_tile = load_rows(r_ptr, stride_r, first, end, c, W, T, parts, rows, reverse)
        i_tile = r_tile
        if not reverse:
            i_tile = load_rows(i_ptr, stride_i, first, end, c, W, T, parts, rows, reverse)
        for k0 in tl.range(first, end, block_t, disable_licm=True):
            k1 = k0 + block_t
            x_next = load_rows(x_ptr, stride_x, k1, end, c, W, T, parts, rows, reverse)
            r_next = load_rows(r_ptr, stride_r, k1, end, c, W, T, parts, rows, reverse)
            i_next = r_next
            if not reverse:
                i_next = load_rows(i_ptr, stride_i, k1, end, c, W, T, parts, rows, reverse)
            a_part = tl.full((parts, block_c), 1.0, tl.float32)
            b_part = tl.zeros((parts, block_c), tl.float32)
            for r in tl.static_range(rows):
                k = step_of(k0, r, parts, rows)
                inside = k < end
                if reverse:
                    _, a, _ = _decay(r_tile[r], power, inside, fresh & (k == last))
                    dh = tl.where(inside, x_tile[r].to(tl.float32), 0.0)
                    b_part = a * (b_part + dh)
                else:
                    starts = fresh & (k == begin)
                    a, b = _map(x_tile[r], r_tile[r], i_tile[r], power, inside, starts)
                    b_part = a * b_part + b
                a_part *= a
            _, h = across(a_part, b_part, h)
            a_all *= a_part
            x_tile, r_tile, i_tile = x_next, r_next, i_next
        # --- 3. epilogue
        carry = carry_ptr + 2 * ci.to(tl.int64) * W + c
        # --- 4. store
        tl.store(carry, tl.reduce(a_all, 0, multiply), c < W)
        tl.store(carry + W, h, c < W)


@triton.jit
def _rglru_fwd_kernel(
    x_ptr,  # [T, W]
    r_ptr,  # [T, W]
    i_ptr,  # [T, W]
    lam_ptr,  # [W] float32
    cu_ptr,  # [B + 1] int32
    h0_ptr,  # [B, W] float32 or None
    carry_ptr,  # [chunks, 2, W] float32
    h_ptr,  # [T, W]
    h_T_ptr,  # [B, W] float32
    T, B, chunk, factor, W: tl.constexpr,
    stride_x: tl.constexpr, stride_r: tl.constexpr, stride_i: tl.constexpr,
    block_t: tl.constexpr, block_c: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = block_t // rows
    # --- 1. which tile
    c = tl.program_id(0) * block_c + tl.arange(0, block_c)
    ci = tl.program_id(1)
    first, end, s, begin, stop, h = enter(cu_ptr, h0_ptr, carry_ptr, ci, chunk, c, T, B, W, False)
    power = _power(lam_ptr, c, W, factor)

    # --- 2. main loop
    k0 = first
    x_tile = load_rows(x_ptr, stride_x, k0, end, c, W, T, parts, rows, False)
    r_tile = load_rows(r_ptr, stride_r, k0, end, c, W, T, parts, rows, False)
    i_tile = load_rows(i_ptr, stride_i, k0, end, c, W, T, parts, rows, False)
    walk = trips(cu_ptr, s, first, end, T, B, block_t, False)
    for _ in tl.range(walk, disable_licm=True):
        low, high, done, k_next = part_of(s, begin, stop, k0, end, T, B, block_t)
        x_next = load_rows(x_ptr, stride_x, k_next, end, c, W, T, parts, rows, False)
        r_next = load_rows(r_ptr, stride_r, k_next, end, c, W, T, parts, rows, False)
        i_next = load_rows(i_ptr, stride_i, k_next, end, c, W, T, parts, rows, False)
        a_rows, b_rows = (), ()
        a_part = tl.full((parts, block_c), 1.0, tl.float32)
        b_part = tl.zeros((parts, block_c), tl.float32)
        for r in tl.static_range(rows):
            k = step_of(k0, r, parts, rows)
            inside = (k >= low) & (k < high)
            fresh = (k == begin) & (h0_ptr is None)
            a, b = _map(x_tile[r], r_tile[r], i_tile[r], power, inside, fresh)
            a_rows, b_rows = a_rows + (a,), b_rows + (b,)  # noqa: RUF005
            a_part, b_part = a_part * a, a * b_part + b
        # --- 3. epilogue
        h_row, h = across(a_part, b_part, h)
        # --- 4. store
        for r in tl.static_range(rows):
            k = step_of(k0, r, parts, rows)
            inside = (k >= low) & (k < high)
            h_row = a_rows[r] * h_row + b_rows[r]
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
        k0, x_tile, r_tile, i_tile = k_next, x_next, r_next, i_next


@triton.jit
def _rglru_bwd_kernel(
    x_ptr,  # [T, W]
    r_ptr,  # [T, W]
    i_ptr,  # [T, W]
    lam_ptr,  # [W] float32
    h_ptr,  # [T, W]
    cu_ptr,  # [B + 1] int32
    h0_ptr,  # [B, W] float32 or None
    carry_ptr,  # [chunks, 2, W] float32
    dh_ptr,  # [T, W]
    dh_T_ptr,  # [B, W] float32 or None
    dx_ptr,  # [T, W]
    dr_ptr,  # [T, W]
    di_ptr,  # [T, W]
    sums_ptr,  # [chunks, W] float32: of r * dlog a, this program's chunk
    dh0_ptr,  # [B, W] float32
    T, B, chunk, factor, W: tl.constexpr,
    stride_x: tl.constexpr, stride_r: tl.constexpr, stride_i: tl.constexpr,
    stride_h: tl.constexpr, stride_dh: tl.constexpr,
    block_t: tl.constexpr, block_c: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = block_t // rows
    # --- 1. which tile
    c = tl.program_id(0) * block_c + tl.arange(0, block_c)
    ci = tl.program_id(1)
    first, end, s, begin, stop, v = enter(cu_ptr, dh_T_ptr, carry_ptr, ci, chunk, c, T, B, W, True)
    power = _power(lam_ptr, c, W, factor)
    slope = power * 0.6931471805599453
    sums = tl.zeros((parts, block_c), tl.float32)

    # --- 2. main loop
    k0 = first
    r_tile = load_rows(r_ptr, stride_r, k0, end, c, W, T, parts, rows, True)
    dh_tile = load_rows(dh_ptr, stride_dh, k0, end, c, W, T, parts, rows, True)
    x_tile = load_rows(x_ptr, stride_x, k0, end, c, W, T, parts, rows, True)
    i_tile = load_rows(i_ptr, stride_i, k0, end, c, W, T, parts, rows, True)
    h_tile = load_rows(h_ptr, stride_h, k0, end, c, W, T, parts, rows, True, -1)
    walk = trips(cu_ptr, s, first, end, T, B, block_t, True)
    for _ in tl.range(walk, disable_licm=True):
        low, high, done, k_next = part_of(s, begin, stop, k0, end, T, B, block_t)
        r_next = load_rows(r_ptr, stride_r, k_next, end, c, W, T, parts, rows, True)
        dh_next = load_rows(dh_ptr, stride_dh, k_next, end, c, W, T, parts, rows, True)
        x_next = load_rows(x_ptr, stride_x, k_next, end, c, W, T, parts, rows, True)
        i_next = load_rows(i_ptr, stride_i, k_next, end, c, W, T, parts, rows, True)
        h_next = load_rows(h_ptr, stride_h, k_next, end, c, W, T, parts, rows, True, -1)
        a_rows, r_rows, squares = (), (), ()
        a_part = tl.full((parts, block_c), 1.0, tl.float32)
        b_part = tl.zeros((parts, block_c), tl.float32)
        for j in tl.static_range(rows):
            k = step_of(k0, j, parts, rows)
            inside = (k >= low) & (k < high)
            fresh = (k == stop - 1) & (h0_ptr is None)
            r, a, square = _decay(r_tile[j], power, inside, fresh)
            b_part = a * (b_part + tl.where(inside, dh_tile[j].to(tl.float32), 0.0))
            a_part *= a
            a_rows, r_rows, squares = a_rows + (a,), r_rows + (r,), squares + (square,)  # noqa: RUF005
        # --- 3. epilogue
        v_row, v = across(a_part, b_part, v)
        # --- 4. store
        h_start = initial(h0_ptr, s, c, W, B, True)[None, :]
        for j in tl.static_range(rows):
            k = step_of(k0, j, parts, rows)
            inside = (k >= low) & (k < high)
            starts = k == stop - 1
            a, r, square = a_rows[j], r_rows[j], squares[j]
            i, x = _sigmoid(i_tile[j].to(tl.float32)), x_tile[j].to(tl.float32)
            u = v_row + tl.where(inside, dh_tile[j].to(tl.float32), 0.0)
            v_row = a * u
            root = tl.rsqrt(tl.maximum(square, 1e-37))
            m, di = square * root, u * i
            dx = (di * m).to(dx_ptr.dtype.element_ty)
            di *= x
            h = tl.where(starts, h_start, h_tile[j].to(tl.float32))
            dlog_a = v_row * h - di * a * a * tl.minimum(root, 2000.0)
            dlog_a = tl.where(starts & (h0_ptr is None), 0.0, dlog_a) * r
            sums += tl.where(inside, dlog_a, 0.0)
            exist = existing(inside, c, W)
            dr = dlog_a * (slope[None, :] - slope[None, :] * r)
            di *= m
            di -= di * i
            tl.store(row_ptr(dx_ptr, W, k0, j, c, T, parts, rows, True), dx, exist)
            tl.store(row_ptr(dr_ptr, W, k0, j, c, T, parts, rows, True), dr.to(dx.dtype), exist)
            tl.store(row_ptr(di_ptr, W, k0, j, c, T, parts, rows, True), di.to(dx.dtype), exist)
        if parts == 1:
            v = tl.sum(v_row, 0)
        if done:
            tl.store(state_row(dh0_ptr, s, c, W, B, True), v, c < W)
            s += 1
            v = initial(dh_T_ptr, s, c, W, B, True)
            begin = stop
            stop = bound(cu_ptr, s + 1, T, B, True)
        k0, r_tile, dh_tile = k_next, r_next, dh_next
        x_tile, i_tile, h_tile = x_next, i_next, h_next

    tl.store(sums_ptr + ci.to(tl.int64) * W + c, tl.sum(sums, 0), c < W)


@triton.jit
def _rglru_dlam_kernel(
    sums_ptr,  # [chunks, W] float32
    lam_ptr,  # [W] float32
    dlam_ptr,  # [W] float32
    chunks, W, factor, block_c: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    c = tl.program_id(0) * block_c + tl.arange(0, block_c)
    # --- 2. main loop
    total = tl.zeros((block_c,), tl.float32)
    sums = sums_ptr + c
    for _ in tl.range(0, chunks):
        total += tl.load(sums, c < W, 0.0)
        sums += W
    # --- 3. epilogue
    dlam = -factor * total * _sigmoid(tl.load(lam_ptr + c, c < W, 0.0))
    # --- 4. store
    tl.store(dlam_ptr + c, dlam, c < W)


@triton.jit
def _rglru_step_kernel(
    x_ptr,  # [B, W]
    r_ptr,  # [B, W]
    i_ptr,  # [B, W]
    lam_ptr,  # [W] float32
    h0_ptr,  # [B, W] float32 or None
    h_ptr,  # [B, W]
    h_T_ptr,  # [B, W] float32
    W, stride_x, stride_r, stride_i, factor, block_c: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    c = tl.program_id(0) * block_c + tl.arange(0, block_c)
    s = tl.program_id(1)
    # --- 2. main loop: one token
    row, exist = s.to(tl.int64), c < W
    x = tl.load(x_ptr + row * stride_x + c, exist, 0.0)
    r_pre = tl.load(r_ptr + row * stride_r + c, exist, 0.0)
    i_pre = tl.load(i_ptr + row * stride_i + c, exist, 0.0)
    power = _power(lam_ptr, c, W, factor)
    a, h = _map(x[None, :], r_pre[None, :], i_pre[None, :], power, True, h0_ptr is None)
    # --- 3. epilogue
    if h0_ptr is not None:
        h += a * tl.load(h0_ptr + row * W + c, exist, 0.0)[None, :]
    # --- 4. store
    at = row * W + c[None, :]
    tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), exist[None, :])
    tl.store(h_T_ptr + at, h, exist[None, :])


def _fake_fwd(x, r_pre, i_pre, lam, cu_seqlens, h0, c, config):
    states = len(cu_seqlens) - 1, x.shape[1]
    return [x.new_empty(x.shape), x.new_empty(states, dtype=torch.float32)]


@_lib.opaque("rglru_fwd", _fake_fwd)
def _forward(
    x: Tensor,
    r_pre: Tensor,
    i_pre: Tensor,
    lam: Tensor,
    cu_seqlens: Tensor,
    h0: Tensor | None,
    c: float,
    config: list[int] | None,
) -> list[Tensor]:
    """[h, h_T]."""
    (T, W), B = x.shape, len(cu_seqlens) - 1
    h, h_T = x.new_empty(T, W), x.new_empty(B, W, dtype=torch.float32)
    if 0 in (T, W, B):
        return [h.zero_(), h_T.zero_() if h0 is None else h_T.copy_(h0)]
    x, r_pre, i_pre, lam, cu_seqlens = map(_lib.rows_adjacent, (x, r_pre, i_pre, lam, cu_seqlens))
    h0 = None if h0 is None else h0.contiguous()
    with _lib.on_device(x):
        _lib.check_gpu()
        tiles = Config(*config) if config else default_config(T, W, B, x.dtype)
        chunk, grid, carry_grid = launch_sizes(T, W, tiles)
        sizes = T, B, chunk, c, W, x.stride(0), r_pre.stride(0), i_pre.stride(0)
        carry = x.new_empty(grid[1], 2, W, dtype=torch.float32)
        if grid[1] > 1:
            _rglru_carry_kernel[carry_grid](
                x, r_pre, i_pre, lam, cu_seqlens, h0, carry, *sizes, *tiles.carry_shape,
                h0 is None, False, **tiles.resources,
            )  # fmt: skip
        _rglru_fwd_kernel[grid](
            x,
            r_pre,
            i_pre,
            lam,
            cu_seqlens,
            h0,
            carry,
            h,
            h_T,
            *sizes,
            *tiles.shape,
            **tiles.resources,
        )
    return [h, h_T]


def _fake_bwd(x, r_pre, i_pre, lam, h, cu_seqlens, h0, dh, dh_T, c, config):
    states = len(cu_seqlens) - 1, x.shape[1]
    small = [lam.new_empty(lam.shape), x.new_empty(states, dtype=torch.float32)]
    return [*(x.new_empty(x.shape) for _ in range(3)), *small]


@_lib.opaque("rglru_bwd", _fake_bwd)
def _backward(
    x: Tensor,
    r_pre: Tensor,
    i_pre: Tensor,
    lam: Tensor,
    h: Tensor,
    cu_seqlens: Tensor,
    h0: Tensor | None,
    dh: Tensor,
    dh_T: Tensor | None,
    c: float,
    config: list[int] | None,
) -> list[Tensor]:
    """[dx, dr_pre, di_pre, dlam, dh0]."""
    (T, W), B = x.shape, len(cu_seqlens) - 1
    dx, dr, di = (x.new_empty(T, W) for _ in range(3))
    dlam, dh0 = lam.new_empty(W), x.new_empty(B, W, dtype=torch.float32)
    if 0 in (T, W, B):
        dh0 = dh0.zero_() if dh_T is None else dh0.copy_(dh_T)
        return [*(g.zero_() for g in (dx, dr, di, dlam)), dh0]
    rows = x, r_pre, i_pre, lam, h, dh, cu_seqlens
    x, r_pre, i_pre, lam, h, dh, cu_seqlens = map(_lib.rows_adjacent, rows)
    h0, dh_T = (None if s is None else s.contiguous() for s in (h0, dh_T))
    with _lib.on_device(x):
        _lib.check_gpu()
        tiles = Config(*config) if config else default_config(T, W, B, x.dtype, "bwd")
        chunk, grid, carry_grid = launch_sizes(T, W, tiles)
        carry = x.new_empty(grid[1], 2, W, dtype=torch.float32)
        sums = x.new_empty(grid[1], W, dtype=torch.float32)
        if grid[1] > 1:
            _rglru_carry_kernel[carry_grid](
                dh, r_pre, i_pre, lam, cu_seqlens, dh_T, carry, T, B, chunk, c, W, dh.stride(0),
                r_pre.stride(0), i_pre.stride(0), *tiles.carry_shape, h0 is None, True,
                **tiles.resources,
            )  # fmt: skip
        _rglru_bwd_kernel[grid](
            x, r_pre, i_pre, lam, h, cu_seqlens, h0, carry, dh, dh_T, dx, dr, di, sums, dh0,
            T, B, chunk, c, W, x.stride(0), r_pre.stride(0), i_pre.stride(0), h.stride(0),
            dh.stride(0), *tiles.shape, **tiles.resources,
        )  # fmt: skip
        _rglru_dlam_kernel[(_lib.cdiv(W, 128),)](sums, lam, dlam, grid[1], W, c, 128)
    return [dx, dr, di, dlam, dh0]


def _check(x, r_pre, i_pre, lam, cu_seqlens, h0, c, config) -> None:
    _lib.check_tensor("x", x, ("T", "W"), DTYPES)
    for name, gate in (("r_pre", r_pre), ("i_pre", i_pre)):
        _lib.check_tensor(name, gate, tuple(x.shape), (x.dtype,))
    _lib.check_tensor("lam", lam, (x.shape[1],), (torch.float32,))
    check_sequences(cu_seqlens, x.shape[1], h0=h0)
    _lib.check_same_device(x=x, r_pre=r_pre, i_pre=i_pre, lam=lam, cu_seqlens=cu_seqlens, h0=h0)
    _lib.check_static("c", c, (float, int))
    _lib.check_config(config, Config)


def rglru_fwd(
    x: Tensor,
    r_pre: Tensor,
    i_pre: Tensor,
    lam: Tensor,
    cu_seqlens: Tensor,
    h0: Tensor | None = None,
    *,
    c: float = 8.0,
    config: Config | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, ...]]:
    """rglru and what its backward needs. No gradient flows through this.

    Returns ((h, h_T), (x, r_pre, i_pre, lam, h, cu_seqlens, h0)).
    """
    _check(x, r_pre, i_pre, lam, cu_seqlens, h0, c, config)
    h, h_T = _forward(x, r_pre, i_pre, lam, cu_seqlens, h0, float(c), _lib.fields(config))
    return (h, h_T), (x, r_pre, i_pre, lam, h, cu_seqlens, h0)


def rglru_bwd(
    res: tuple[Tensor | None, ...],
    dh: Tensor,
    dh_T: Tensor | None = None,
    *,
    c: float = 8.0,
    config: Config | None = None,
) -> tuple[Tensor, ...]:
    """Gradients (dx, dr_pre, di_pre [T, W] in x's dtype, dlam [W] float32), and dh0 [B, W] float32
    if there was an h0.

    res: as rglru_fwd returns it. dh [T, W], dh_T [B, W] float32: cotangents of h and h_T; dh_T None
    is zero. The same inputs give the same bits: dlam is added in an order that only sizes and
    config decide.
    """
    x, r_pre, i_pre, lam, h, cu_seqlens, h0 = res
    _check(x, r_pre, i_pre, lam, cu_seqlens, h0, c, config)
    for name, rows in (("h", h), ("dh", dh)):
        _lib.check_tensor(name, rows, tuple(x.shape), (x.dtype,))
    check_sequences(cu_seqlens, x.shape[1], dh_T=dh_T)
    _lib.check_same_device(x=x, h=h, dh=dh, dh_T=dh_T)
    grads = _backward(
        x, r_pre, i_pre, lam, h, cu_seqlens, h0, dh, dh_T, float(c), _lib.fields(config)
    )
    return tuple(grads[: 4 + (h0 is not None)])


class _RgLru(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, r_pre, i_pre, lam, cu_seqlens, h0, c, config):
        out, res = rglru_fwd(x, r_pre, i_pre, lam, cu_seqlens, h0, c=c, config=config)
        ctx.save_for_backward(*res)
        ctx.set_materialize_grads(False)
        ctx.c = c
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dh, dh_T):
        res = ctx.saved_tensors
        if dh is None:  # only h_T was used
            dh = torch.zeros_like(res[4])
        *grads, dh0 = (*rglru_bwd(res, dh, dh_T, c=ctx.c), None)[:5]
        found = (*grads, None, dh0, None, None)
        return tuple(
            g if need else None for g, need in zip(found, ctx.needs_input_grad, strict=True)
        )


def rglru(
    x: Tensor,
    r_pre: Tensor,
    i_pre: Tensor,
    lam: Tensor,
    cu_seqlens: Tensor,
    h0: Tensor | None = None,
    *,
    c: float = 8.0,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """h [T, W] = a * (h of the token before) + sqrt(1 - a^2) * sigmoid(i_pre) * x, and the last
    states h_T [B, W]; log a = -c * sigmoid(r_pre) * softplus(lam). Differentiable once.

    x, r_pre, i_pre [T, W]: bfloat16, float16 or float32, the same; h has their dtype. lam [W]
    float32. B sequences lie one after the other, the tokens of sequence s from cu_seqlens[s] on.
    cu_seqlens [B + 1] int32, from 0 to T, is read on the device alone: linear_scan_check looks at
    what it holds.
    h0 [B, W] float32: the states before the first tokens. None: each sequence begins anew, and its
    first token enters as it is, neither decayed nor scaled by the root. h_T is float32.
    config: tiles of this call; gradients take their own default.

    Raises TypeError for dtypes and ValueError for shapes and devices that do not fit, naming the
    argument; NotImplementedError on a GPU older than Ampere.
    """
    return _RgLru.apply(x, r_pre, i_pre, lam, cu_seqlens, h0, c, config)


def rglru_step(
    x: Tensor,
    r_pre: Tensor,
    i_pre: Tensor,
    lam: Tensor,
    h0: Tensor | None = None,
    *,
    c: float = 8.0,
) -> tuple[Tensor, Tensor]:
    """One token of each of B sequences: (h [B, W] in x's dtype, h_T [B, W] float32).

    x, r_pre, i_pre [B, W], lam [W] float32, h0 [B, W] float32 or None as in rglru; h_T is the next
    step's h0. No gradient flows through this.
    """
    _lib.check_tensor("x", x, ("B", "W"), DTYPES)
    for name, gate in (("r_pre", r_pre), ("i_pre", i_pre)):
        _lib.check_tensor(name, gate, tuple(x.shape), (x.dtype,))
    _lib.check_tensor("lam", lam, (x.shape[1],), (torch.float32,))
    if h0 is not None:
        _lib.check_tensor("h0", h0, tuple(x.shape), (torch.float32,))
    _lib.check_same_device(x=x, r_pre=r_pre, i_pre=i_pre, lam=lam, h0=h0)
    _lib.check_static("c", c, (float, int))
    B, W = x.shape
    h, h_T = x.new_empty(B, W), x.new_empty(B, W, dtype=torch.float32)
    if 0 not in (B, W):
        x, r_pre, i_pre, lam = map(_lib.rows_adjacent, (x, r_pre, i_pre, lam))
        h0 = None if h0 is None else h0.contiguous()
        with _lib.on_device(x):
            _lib.check_gpu()
            _rglru_step_kernel[_lib.cdiv(W, 512), B](
                x, r_pre, i_pre, lam, h0, h, h_T, W, x.stride(0), r_pre.stride(0),
                i_pre.stride(0), float(c), 512, num_warps=4,
            )  # fmt: skip
    return h, h_T
