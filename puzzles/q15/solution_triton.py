"""Q15, four-bit weights, sixteen-bit sums: y[M, N] = x[M, K] @ W[N, K].T

    W[n, k] = (code[n, k] - zero[k // 128, n]) * scale[k // 128, n]      float16
    y       = x @ W.T                                                    summed in float32

packed uint8[N, K / 2]: W[n, 2j] in the low nibble of byte j, W[n, 2j + 1] in the high one.
W is never written to memory. One launch.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _w4_kernel(
    x_ptr, packed_ptr, scale_ptr, zero_ptr, y_ptr, M, N, G,
    block_m: tl.constexpr, block_n: tl.constexpr,
):  # fmt: skip
    """One program for a tile of y, transposed: [block_n, block_m]; K is G groups of 128.

    The tensor cores of Hopper want 64 rows on the left: rows of W are many, tokens are few.
    """
    m = tl.program_id(1) * block_m + tl.arange(0, block_m)
    n = tl.program_id(0).to(tl.int64) * block_n + tl.arange(0, block_n)
    k, j = tl.arange(0, 128), tl.arange(0, 64)  # a group's weights, and its bytes
    acc = tl.zeros([block_n, block_m], tl.float32)
    # Two groups a trip: their scales and zero points, which no pipeline fetches ahead because they
    # are narrow, are waited for together.
    for g in tl.range(0, G, loop_unroll_factor=2):
        at = m[:, None] * (G * 128) + g * 128 + k[None, :]
        x = tl.load(x_ptr + at, mask=m[:, None] < M, other=0.0)  # [block_m, 128]
        at = n[:, None] * (G * 64) + g * 64 + j[None, :]
        byte = tl.load(packed_ptr + at, mask=n[:, None] < N, other=0)  # [block_n, 64]
        scale = tl.load(scale_ptr + g * N + n, mask=n < N, other=0.0)  # [block_n]
        zero = tl.load(zero_ptr + g * N + n, mask=n < N, other=0)
        # BEGIN SOLUTION
        # 1. Both nibbles of each byte in turn: the codes, [block_n, 128].
        # 2. As float16, minus the zero point: exact.
        # 3. Multiply that by the transpose of x. A row of the product is a row's sum over the
        #    group: times its scale, in float32, it belongs to acc.
        code = tl.interleave(byte & 15, byte >> 4).to(tl.int16)
        code = (code | 0x6400).to(tl.float16, bitcast=True)  # 1024 + code
        zero = (zero.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True)
        part = tl.dot(code - zero[:, None], tl.trans(x))
        acc += part * scale.to(tl.float32)[:, None]
        # END SOLUTION
    at = m[None, :] * N + n[:, None]
    tl.store(y_ptr + at, acc.to(tl.float16), mask=(m[None, :] < M) & (n[:, None] < N))


def solve(x, packed, scale, zero):
    (M, K), N = x.shape, packed.shape[0]
    block_m, block_n = 16, 64
    y = torch.empty((M, N), dtype=torch.float16, device=x.device)
    grid = (triton.cdiv(N, block_n), triton.cdiv(M, block_m))
    _w4_kernel[grid](
        x, packed, scale, zero, y, M, N, K // 128, block_m, block_n, num_warps=4, num_stages=3
    )
    return y
