"""Four-bit weights, brought into the order in which int4_matmul's kernels read them; done once.

    for each block of 256 of K and some rows of W: 32 words of 32 bits a row, 8 for each plane of 64
        neighbouring nibbles change places with those of the other planes
        32 words, each with two neighbours of every plane
        the block's scales and zero points, transposed

Every byte is read once and written once: 235 MB for [28672, 8192], 57 us on an H200, beside 24 us
of instructions.

Twin: pallas_kernels/int4_matmul_prepack.py, which is one fusion of XLA's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _lib

ROWS = 64  # of a tile
EIGHTS = tl.constexpr(-0x77777778)  # eight codes beyond K


@triton.jit
def _int4_prepack_kernel(
    w_ptr,  # [N, K / 8] int32
    scale_ptr,  # [N, groups]
    zero_ptr,  # [N, 4 * ceil(groups / 8)] uint8 or None
    words_ptr,  # [blocks, N, 32] int32
    scale_out_ptr,  # [groups, N]
    zero_out_ptr,  # [groups, N] uint8 or None
    N, K,
    group: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    # A row's blocks one after the other: what lies side by side is read at one time.
    blocks = tl.cdiv(K, 256)
    block = tl.program_id(0) % blocks
    n = (tl.program_id(0) // blocks * rows + tl.arange(0, rows)).to(tl.int64)
    live = n < N

    # --- 2. main loop
    w0 = _plane(w_ptr, n, block, K, live, 0)
    w1 = _plane(w_ptr, n, block, K, live, 1)
    w2 = _plane(w_ptr, n, block, K, live, 2)
    w3 = _plane(w_ptr, n, block, K, live, 3)

    # --- 3. epilogue
    # Byte j of these: the code at 2j (or 2j + 1) of two planes.
    even_01, odd_01 = _swapped(w0, w1)
    even_23, odd_23 = _swapped(w2, w3)
    x0 = _word(even_01, even_23, odd_01, odd_23, 0)
    x1 = _word(even_01, even_23, odd_01, odd_23, 1)
    x2 = _word(even_01, even_23, odd_01, odd_23, 2)
    x3 = _word(even_01, even_23, odd_01, odd_23, 3)
    words = tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), (rows, 32))

    # --- 4. store
    at = (block.to(tl.int64) * N + n)[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(words_ptr + at, words, mask=live[:, None])
    groups = K // group
    for j in tl.static_range(256 // group):
        g = block * (256 // group) + j
        there = live & (g < groups)
        scale = tl.load(scale_ptr + n * groups + g, mask=there)
        tl.store(scale_out_ptr + g.to(tl.int64) * N + n, scale, mask=there)
        if zero_ptr is not None:
            both = tl.load(zero_ptr + n * (4 * tl.cdiv(groups, 8)) + g // 2, mask=there)
            zero = (both.to(tl.int32) >> (g % 2 * 4)) & 15
            tl.store(zero_out_ptr + g.to(tl.int64) * N + n, zero.to(tl.uint8), mask=there)


@triton.jit
def _plane(w_ptr, n, block, K, live, i: tl.constexpr):
    """[rows, 8]: 64 of K, which are nibble i of the block's words."""
    k = block * 32 + i * 8 + tl.arange(0, 8)
    mask = live[:, None] & (k < K // 8)[None, :]
    return tl.load(w_ptr + n[:, None] * (K // 8) + k[None, :], mask=mask, other=EIGHTS)


@triton.jit
def _swapped(a, b):
    """Bytes of the low nibbles of a and b, and of their high nibbles; a's are the low ones."""
    low = (a & 0x0F0F0F0F) | (b & 0x0F0F0F0F) << 4
    high = ((a >> 4) & 0x0F0F0F0F) | (b & -0x0F0F0F10)
    return low, high


@triton.jit
def _word(a, b, c, d, j: tl.constexpr):
    """Byte j of a, b, c and d, as one word."""
    low = ((a >> 8 * j) & 255) | ((b >> 8 * j) & 255) << 8
    return low | ((c >> 8 * j) & 255) << 16 | ((d >> 8 * j) & 255) << 24


def _fake(w_packed, w_scale, w_zero, group):
    (N, groups), blocks = w_scale.shape, _lib.cdiv(2 * w_packed.shape[1], 256)
    found = [w_packed.new_empty((blocks, N, 64), dtype=torch.int16), w_scale.new_empty((groups, N))]
    return found + ([] if w_zero is None else [w_zero.new_empty((groups, N))])


@_lib.opaque("int4_prepack", _fake)
def ordered(w_packed: Tensor, w_scale: Tensor, w_zero: Tensor | None, group: int) -> list[Tensor]:
    """[words, w_scale, w_zero unless None], as int4_prepack returns them."""
    N, K = w_packed.shape[0], 2 * w_packed.shape[1]
    found = _fake(w_packed, w_scale, w_zero, group)
    if w_packed.numel():
        w_packed, w_scale = w_packed.contiguous(), w_scale.contiguous()
        # Words of 32 bits start at multiples of 4 bytes.
        if (w_packed.storage_offset() | w_packed.data_ptr()) % 4:
            w_packed = w_packed.clone()
        with _lib.on_device(w_packed):
            _lib.check_gpu()
            _int4_prepack_kernel[(_lib.cdiv(N, ROWS) * _lib.cdiv(K, 256),)](
                w_packed.view(torch.int32), w_scale,
                None if w_zero is None else w_zero.contiguous(),
                found[0].view(torch.int32), found[1], None if w_zero is None else found[2],
                N, K, group, ROWS, num_warps=4,
            )  # fmt: skip
    return found
