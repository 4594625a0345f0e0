"""Softmax in Triton, right and deliberately slow: one fault each, for `parity explain` to name.

    parity explain softmax -w softmax_4096x32768 --pass fwd \\
        --impl tests/variants/triton_softmax.py:spilling --as triton
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _whole_row_kernel(x_ptr, y_ptr, R, N, scale, block_n: tl.constexpr):
    n = tl.arange(0, block_n)
    for row in tl.range(tl.program_id(0), R, tl.num_programs(0)):
        start = tl.full((1,), N, tl.int64) * row
        s = tl.load(x_ptr + start + n, mask=n < N, other=float("-inf"))
        s = s.to(tl.float32) * scale
        e = tl.exp(s - tl.max(s, 0))
        y = (e / tl.sum(e, 0)).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + start + n, y, mask=n < N)


@triton.jit
def _strided_kernel(x_ptr, y_ptr, R, N, scale, block_n: tl.constexpr):
    i = tl.arange(0, block_n)
    n = i % 128 * (block_n // 128) + i // 128  # every column once
    for row in tl.range(tl.program_id(0), R, tl.num_programs(0)):
        start = tl.full((1,), N, tl.int64) * row
        s = tl.load(x_ptr + start + n, mask=n < N, other=float("-inf"))
        s = s.to(tl.float32) * scale
        e = tl.exp(s - tl.max(s, 0))
        y = (e / tl.sum(e, 0)).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + start + n, y, mask=n < N)


@triton.jit
def _chunks_kernel(x_ptr, y_ptr, R, N, scale, block_n: tl.constexpr):
    n = tl.arange(0, block_n)
    for row in tl.range(tl.program_id(0), R, tl.num_programs(0)):
        start = tl.full((1,), N, tl.int64) * row
        top = tl.full((block_n,), float("-inf"), tl.float32)
        total = tl.zeros((block_n,), tl.float32)
        for n0 in tl.range(0, N, block_n):
            s = tl.load(x_ptr + start + n0 + n, mask=n0 + n < N, other=float("-inf"))
            s = s.to(tl.float32) * scale
            new_top = tl.maximum(top, s)
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            total = total * tl.exp(top - base) + tl.exp(s - base)
            top = new_top
        row_top = tl.max(top, 0)
        row_total = tl.sum(total * tl.exp(top - row_top), 0)
        for n0 in tl.range(0, N, block_n):
            s = tl.load(x_ptr + start + n0 + n, mask=n0 + n < N, other=float("-inf"))
            y = tl.exp(s.to(tl.float32) * scale - row_top) / row_total
            y = y.to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + start + n0 + n, y, mask=n0 + n < N)


def _run(kernel, programs, x, scale, block, warps):
    R, N = x.shape
    y = torch.empty_like(x)
    kernel[(programs,)](x, y, R, N, scale, block, num_warps=warps)
    return y


def spilling(x, mask=None, *, scale=1.0, causal_offset=None):
    """A whole row in the registers of one warp: 256 values a thread for rows of 8192."""
    block = triton.next_power_of_2(x.shape[1])
    return _run(_whole_row_kernel, x.shape[0], x, scale, block, 1)


def uncoalesced(x, mask=None, *, scale=1.0, causal_offset=None):
    """Neighbouring lanes are 64 columns apart in rows of 8192."""
    block = triton.next_power_of_2(x.shape[1])
    return _run(_strided_kernel, x.shape[0], x, scale, block, 8)


def few_programs(x, mask=None, *, scale=1.0, causal_offset=None):
    """Sixteen programs, whatever the device."""
    block = triton.next_power_of_2(x.shape[1])
    return _run(_whole_row_kernel, 16, x, scale, block, 8)


def one_warp(x, mask=None, *, scale=1.0, causal_offset=None):
    """One warp on each multiprocessor of an H200, and one load of it on its way at a time."""
    return _run(_chunks_kernel, 132, x, scale, 256, 1)
