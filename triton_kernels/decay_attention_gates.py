"""Gates of decay attention: sums of logarithms within chunks, weights, and Mamba-2's step sizes;
sums of what chunks or programs have of one gradient.

    b = sum of g within the chunk of a token, up to it, in units of log 2        u = exp(i)
    Mamba-2: u = clamp(softplus(dt + bias)), g = u A

One pass over [T, H] that leaves [H, slots, 2, chunk], b and u of a chunk and head side by side, and
what a chunk lacks at a sequence's end is filled up (g = 0, u = 0), so that nobody needs a mask.

Twin: pallas_kernels/decay_attention_gates.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _lib
from .decay_attention_states import find_span, most_spans


@triton.jit
def _decay_attention_gates_kernel(
    g_ptr,  # [T, H] float32: g, or dt with A; None if constant
    i_ptr,  # [T, H] float32 or None
    A_ptr,  # [H] float32 or None
    bias_ptr,  # [H] float32 or None
    b_ptr,  # [H, slots, rows, chunk] float32: sums of g within a chunk; None if constant
    u_ptr,  # the same, a row further if there are two: exp(i), or the step size; or None
    cu_ptr,  # [B + 1] int32
    T, B, H, slots, rows, stride_g, stride_i, low, high,
    chunk: tl.constexpr, block_h: tl.constexpr, block_b: tl.constexpr, softplus: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    h = tl.program_id(1) * block_h + tl.arange(0, block_h)
    slot = tl.program_id(0)
    s, first, end, _, _, _ = find_span(cu_ptr, slot, T, B, chunk, chunk, block_b)
    if s < 0:
        return
    # --- 2. main loop: one tile
    lane = tl.arange(0, chunk)
    t = first + lane
    exist = (t < end)[:, None] & (h < H)[None, :]
    row = t.to(tl.int64)[:, None]
    at = (h.to(tl.int64)[None, :] * slots + slot) * (rows * chunk) + lane[:, None]
    if g_ptr is not None:
        g = tl.load(g_ptr + row * stride_g + h[None, :], exist, 0.0)  # [chunk, block_h]
        if A_ptr is not None:
            u, _ = step_size(g, bias_ptr, h, H, low, high, softplus)
            u = tl.where(exist, u, 0.0)
            g = u * tl.load(A_ptr + h, h < H, 0.0)[None, :]
            tl.store(u_ptr + at, u, (h < H)[None, :])
        # --- 3. epilogue
        b = tl.cumsum(g * 1.4426950408889634, 0)
        # --- 4. store
        tl.store(b_ptr + at, b, (h < H)[None, :])
    if i_ptr is not None:
        i = tl.load(i_ptr + row * stride_i + h[None, :], exist, float("-inf"))
        tl.store(u_ptr + at, tl.exp(i), (h < H)[None, :])


@triton.jit
def step_size(dt, bias_ptr, h, H, low, high, softplus: tl.constexpr):
    """(clamp(softplus(dt + bias)), its derivative with respect to dt) of heads h. [t, h]"""
    if bias_ptr is not None:
        dt += tl.load(bias_ptr + h, h < H, 0.0)[None, :]
    slope = tl.full(dt.shape, 1.0, tl.float32)
    if softplus:
        z = tl.exp(-tl.abs(dt))
        slope = tl.where(dt >= 0, 1.0, z) / (1.0 + z)
        # log(1 + z) = 2 atanh(z / (2 + z)), to the last bits where z is small
        w = z / (2.0 + z)
        w2 = w * w
        series = 1.0 / 9 + w2 * (1.0 / 11 + w2 * (1.0 / 13 + w2 * (1.0 / 15)))
        series = 1.0 + w2 * (1.0 / 3 + w2 * (1.0 / 5 + w2 * (1.0 / 7 + w2 * series)))
        dt = tl.maximum(dt, 0.0) + 2.0 * w * series
    within = (dt >= low) & (dt <= high)
    limited = tl.where(dt < low, low, tl.where(dt > high, high, dt))  # NaN stays
    return limited, tl.where(within, slope, 0.0)


@triton.jit
def _decay_attention_sum_kernel(
    x_ptr,  # [N, W] float32
    y_ptr,  # [W]: the sum over the rows, in their order
    N, W, stride_n, stride_w, block_n: tl.constexpr, block_w: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    w = tl.program_id(0).to(tl.int64) * block_w + tl.arange(0, block_w)
    n = tl.arange(0, block_n)
    acc = tl.zeros((block_n, block_w), tl.float32)
    # --- 2. main loop
    for n0 in tl.range(0, N, block_n):
        at = (n0 + n).to(tl.int64)[:, None] * stride_n + w[None, :] * stride_w
        acc += tl.load(x_ptr + at, (n0 + n < N)[:, None] & (w < W)[None, :], 0.0)
    # --- 3. epilogue
    y = tl.sum(acc, 0)
    # --- 4. store
    tl.store(y_ptr + w, y.to(y_ptr.dtype.element_ty), w < W)


def sum_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of x [N, W] float32 over its first axis, always in the same order."""
    N, W = x.shape
    y = x.new_empty(W, dtype=dtype)
    block_n = min(64, _lib.power_of_2(N))  # few rows are long ones: a gradient's partial sums
    block_w = 2048 // block_n
    _decay_attention_sum_kernel[(_lib.cdiv(W, block_w),)](
        x, y, N, W, x.stride(0), x.stride(1), block_n, block_w, num_warps=4
    )
    return y


def gates(
    g: Tensor,
    i: Tensor | None,
    cu_seqlens: Tensor,
    chunk: int,
    step: tuple[Tensor, Tensor | None, bool, tuple[float, float]] | None = None,
) -> tuple[tuple[Tensor, bool], Tensor | None]:
    """((b, False), u): sums of g within chunks and weights; ((g, True), u) of constant g.

    step: (A, bias, softplus, limits): then g holds step sizes dt, g = u A, and u = the step sizes
    softened, limited.
    """
    constant = g.dim() == 1
    if constant and i is None:
        return (g.contiguous(), True), None
    T, H = (g if i is None else i).shape
    A, bias, softplus, (low, high) = step or (None, None, False, (0.0, 0.0))
    B = len(cu_seqlens) - 1
    slots = most_spans(T, B, chunk)
    weighted = step is not None or i is not None
    rows = weighted + (not constant)
    both = g.new_empty(H, slots, rows, chunk)
    b = g.contiguous() if constant else both
    u = both[:, :, rows - 1] if weighted else None
    g, i = (None if x is None else _lib.rows_adjacent(x) for x in (None if constant else g, i))
    _decay_attention_gates_kernel[(slots, _lib.cdiv(H, 32))](
        g, i, A, bias, None if constant else b, u, cu_seqlens, T, B, H, slots, rows,
        0 if g is None else g.stride(0), 0 if i is None else i.stride(0), low, high,
        chunk, 32, max(16, _lib.power_of_2(B)), softplus, num_warps=4,
    )  # fmt: skip
    return (b, constant), u
