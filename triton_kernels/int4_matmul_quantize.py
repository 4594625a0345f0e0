"""Four-bit weights with a scale, and a zero point if asymmetric, for each group of neighbours in K.

    symmetric:   s = max |w| / 7                                   z = 8
    asymmetric:  s = (hi - lo) / 15, lo = min(w, 0), hi = max(w, 0)
                 z = clip(rint(-lo / s), 0, 15)
    q = clip(rint(w / s) + z, 0, 15)            s rounded to w's dtype first, and 1 where it is 0

    for each tile of rows, 8 groups of each (whose zero points are one word):
        lo, hi -> s, z;  w is still in registers: codes, two to a byte

Every quotient is float32's, correctly rounded, and ties go to the even number: there is one right
answer, which is parity.formats.int4_quantize's.

Twin: pallas_kernels/int4_matmul_quantize.py.

Sources: the range that always holds 0, so that 0 has a code of its own, is Jacob et al.'s
(arXiv:1712.05877); one byte for two codes, the first one low, is how GPTQ's words lie in memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _lib

ELEMENTS = 8192  # of a tile: 64 bytes for each of 256 threads
WARPS = 8


@triton.jit
def _rounded(quotient):
    """Nearest whole numbers, ties to even, of what lies within 15 of 0; 16 beyond, and 0 for NaN.

    Adding 1.5 * 2^23 rounds to a whole number, which the low bits hold in two's complement.
    """
    inside = tl.minimum(tl.maximum(tl.where(quotient == quotient, quotient, 0.0), -16.0), 16.0)
    return (inside + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def _int4_quantize_kernel(
    w_ptr,  # [N, K]
    packed_ptr,  # [N, K / 2] uint8
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
    k = tl.arange(0, group)
    address = n[:, None] * stride_wn + g[:, None] * group + k[None, :]
    w = tl.load(w_ptr + address, mask=live[:, None], other=0.0, eviction_policy="evict_first")
    w = w.to(tl.float32)
    lo, hi = tl.min(tl.minimum(w, 0.0), 1), tl.max(tl.maximum(w, 0.0), 1)
    # Neither minimum nor maximum tells of a NaN; in whole numbers the bits of |w| put it on top.
    largest = tl.max(w.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    unknown = largest > 0x7F800000

    # --- 3. epilogue
    if zero_ptr is None:
        scale = tl.div_rn(tl.maximum(hi, -lo), 7.0)
    else:
        scale = tl.div_rn(hi - lo, 15.0)
    scale = tl.where(unknown, float("nan"), scale).to(scale_ptr.dtype.element_ty)
    scale = tl.where(scale == 0.0, 1.0, scale).to(scale_ptr.dtype.element_ty)
    wide = scale.to(tl.float32)
    if zero_ptr is None:
        zero = tl.full((block_n * 8,), 8, tl.int32)
    else:
        zero = tl.where(live, tl.minimum(_rounded(tl.div_rn(-lo, wide)), 15), 8)
    code = _rounded(tl.div_rn(w, tl.broadcast_to(wide[:, None], w.shape))) + zero[:, None]
    code = tl.minimum(tl.maximum(code, 0), 15)

    # --- 4. store
    low, high = tl.split(tl.reshape(code, (block_n * 8, group // 2, 2)))
    address = n[:, None] * (K // 2) + g[:, None] * (group // 2) + tl.arange(0, group // 2)[None, :]
    tl.store(packed_ptr + address, (low | high << 4).to(tl.uint8), mask=live[:, None])
    tl.store(scale_ptr + n * groups + g, scale, mask=live)
    if zero_ptr is not None:
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
                w, found[0], found[1], None if symmetric else found[2],
                N, K, w.stride(0), group, block_n, words, num_warps=WARPS,
            )  # fmt: skip
    return found
