"""Four-bit weights with a scale, and a zero point if asymmetric, for each group of neighbours in K.

    symmetric:   s = max |w| / 7                                   z = 8
    asymmetric:  s = (hi - lo) / 15, lo = min(w, 0), hi = max(w, 0)
                 z = clip(rint(-lo / s), 0, 15)
    q = clip(rint(w / s) + z, 0, 15)            s rounded to w's dtype first, and 1 where it is 0

    for each tile of rows, 8 groups of each (whose zero points are one word):
        lo, hi -> s, z;  w is still in registers: codes, eight to a word

There is one right answer, which is parity.formats.int4_quantize's: quotients are float32's,
correctly rounded, and ties go to the even number. No division is needed for it. w and s have 11
bits at most, so that w / s is a tie or 2^-12 away from one, and w * (1 / s), taken to 13 bits after
the point, has the ties where they belong. The twin's test goes through all of them.

13 instructions an element take an H200 30 us for [8192, 8192], whose bytes take 41 us.

Twin: pallas_kernels/int4_matmul_quantize.py.

Sources: the range that always holds 0, so that 0 has a code of its own, is Jacob et al.'s
(arXiv:1712.05877); one byte for two codes, the first one low, is how GPTQ's words lie in memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _lib

ELEMENTS = 8192  # of a tile: 64 bytes for each of 256 threads, all of one group
WARPS = 4
# 1.5 * 2^10 leaves multiples of 2^-13, 1.5 * 2^23 whole numbers
SNAP, ROUND = tl.constexpr(1536.0), tl.constexpr(12582912.0)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _rounding(scale):
    """(r, snap, rest, none): x * r + snap, + rest is rint(x / scale) within 15 of 0, in the low
    bits; `none` are the bits of 0.

    x and scale have 11 bits, so that x / scale lies on a tie or 2^-12 and more away from it. x * r
    is 2^-18 off: among the multiples of 2^-13 it is back on the tie, which goes to the even number.
    """
    # The reciprocals of bfloat16's smallest numbers are infinite. Less by a power of two are the
    # three constants, and the bits of the sum are the same.
    tiny = scale < 7.888609052210118e-31  # 2^-100
    less = tl.where(tiny, 2.3283064365386963e-10, 1.0)  # 2^-32
    r = 1.0 / (scale * tl.where(tiny, 4294967296.0, 1.0))
    # The bits of less * ROUND, written out: `none` is multiplied as a whole number, and for
    # (x * ROUND) * c ptxas 12.8 to 13.5 computes x * (ROUND * c), the inner product in float32.
    none = tl.where(tiny, 0x3B400000, 0x4B400000)
    return r, less * SNAP, less * (ROUND - SNAP), none


@triton.jit
def _eighths(x):
    """Of x [..., 8], its first, second, ... eighth."""
    pairs = tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2], 2, 2, 2))
    even, odd = tl.split(pairs)
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x1, x5 = tl.split(x15)
    x2, x6 = tl.split(x26)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _int4_quantize_kernel(
    w_ptr,  # [N, K]
    packed_ptr,  # [N, K / 8] int32
    scale_ptr,  # [N, groups]
    zero_ptr,  # [N, 4 * words] uint8 or None
    N, K, stride_wn,
    group: tl.constexpr, block_n: tl.constexpr, words: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    # [block_n, 8 groups] as one axis; a row's words of zero points are the programs' second one.
    at = tl.arange(0, block_n * 8)
    n = (tl.program_id(0) // words * block_n + at // 8).to(tl.int64)
    g = tl.program_id(0) % words * 8 + at % 8
    groups = K // group
    live = (n < N) & (g < groups)

    # --- 2. main loop
    # A thread has 8 neighbours of each quarter of a group: the fewer threads share a group, the
    # fewer compute its scale.
    part: tl.constexpr = group // 4
    k = tl.arange(0, 4)[None, :, None] * part + tl.arange(0, part)[None, None, :]
    address = (n * stride_wn + g * group)[:, None, None] + k
    there = live[:, None, None]
    w = tl.load(w_ptr + address, mask=there, other=0.0, eviction_policy="evict_first")
    w = w.to(tl.float32)
    lo = _smaller(tl.reduce(tl.reduce(w, 1, _smaller), 1, _smaller), 0.0)
    hi = _larger(tl.reduce(tl.reduce(w, 1, _larger), 1, _larger), 0.0)

    # --- 3. epilogue
    if zero_ptr is None:
        scale = tl.div_rn(_larger(hi, -lo), 7.0)
    else:
        scale = tl.div_rn(hi - lo, 15.0)
    scale = scale.to(scale_ptr.dtype.element_ty)
    scale = tl.where(scale == 0.0, 1.0, scale).to(scale_ptr.dtype.element_ty)
    wide = scale.to(tl.float32)
    known = wide < float("inf")
    r, snap, rest, none = _rounding(wide)
    zero = tl.full((block_n * 8,), 8, tl.int32)
    if zero_ptr is not None:
        zero = (tl.fma(-lo, r, snap) + rest).to(tl.int32, bitcast=True) - none
        zero = tl.where(known, tl.minimum(zero, 15), 0)
    # The limits of x / scale, exact.
    unit = snap / SNAP
    lowest = snap - zero.to(tl.float32) * unit
    highest = lowest + 15.0 * unit
    code = tl.fma(w, r[:, None, None], snap[:, None, None])
    code = tl.minimum(tl.maximum(code, lowest[:, None, None]), highest[:, None, None])
    code = (code + rest[:, None, None]).to(tl.int32, bitcast=True)
    # What is added up is a code and the bits of 0, each times its power of 16; what overflows
    # belongs to the latter.
    c0, c1, c2, c3, c4, c5, c6, c7 = _eighths(tl.reshape(code, (block_n * 8, 4, part // 8, 8)))
    word = (c0 + (c1 << 4)) + ((c2 + (c3 << 4)) << 8)
    word += ((c4 + (c5 << 4)) + ((c6 + (c7 << 4)) << 8)) << 16
    word += ((zero - none) * 0x11111111)[:, None, None]
    # Of what is not finite no codes are left but the zero point.
    word = tl.where(known[:, None, None], word, -0x77777778 if zero_ptr is None else 0)

    # --- 4. store
    k = tl.arange(0, 4)[None, :, None] * (part // 8) + tl.arange(0, part // 8)[None, None, :]
    address = (n * (K // 8) + g * (group // 8))[:, None, None] + k
    tl.store(packed_ptr + address, word, mask=there)
    tl.store(scale_ptr + n * groups + g, scale, mask=live)
    if zero_ptr is not None:
        zero = tl.where(live, zero, 8)
        low, high = tl.split(tl.reshape(zero, (block_n * 4, 2)))
        at = tl.arange(0, block_n * 4)
        n = (tl.program_id(0) // words * block_n + at // 4).to(tl.int64)
        byte = tl.program_id(0) % words * 4 + at % 4
        tl.store(zero_ptr + n * (4 * words) + byte, (low | high << 4).to(tl.uint8), mask=n < N)


def _fake(w, group, symmetric):
    N, K = w.shape
    shapes = ((N, K // 2), torch.uint8), ((N, K // group), w.dtype)
    if not symmetric:
        shapes += (((N, 4 * _lib.cdiv(K // group, 8)), torch.uint8),)
    return [w.new_empty(shape, dtype=dtype) for shape, dtype in shapes]


@_lib.opaque("int4_quantize", _fake)
def quantized(w: Tensor, group: int, symmetric: bool) -> list[Tensor]:
    """[w_packed, w_scale], and w_zero unless symmetric."""
    N, K = w.shape
    found = _fake(w, group, symmetric)
    if w.numel():
        w = _lib.rows_adjacent(w)
        block_n, words = max(1, ELEMENTS // (8 * group)), _lib.cdiv(K // group, 8)
        with _lib.on_device(w):
            _lib.check_gpu()
            _int4_quantize_kernel[(_lib.cdiv(N, block_n) * words,)](
                w, found[0].view(torch.int32), found[1], None if symmetric else found[2],
                N, K, w.stride(0), group, block_n, words, num_warps=WARPS,
            )  # fmt: skip
    return found
