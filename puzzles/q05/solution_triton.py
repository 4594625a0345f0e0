"""Q05, rounding at random: x float32[T, N] -> total float32[N], bfloat16 numbers.

total[n] = 0
for t = 0 .. T-1:
    exact    = total[n] + x[t, n]                                    in float32
    drawn    = random(seed, t * N + n), the lower 16 bits
    total[n] = (bits of exact + drawn), the upper 16 bits            a bfloat16
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _sum_kernel(x_ptr, total_ptr, T, N, seed, block: tl.constexpr):
    """One program for `block` columns, all steps of them. tl.randint(seed, counter) draws."""
    n = tl.program_id(0) * block + tl.arange(0, block)
    total = tl.zeros([block], tl.float32)
    for t in range(T):
        x = tl.load(x_ptr + t * N + n, mask=n < N, other=0.0)
        # BEGIN SOLUTION
        # 1. Add x in float32; take the bits: .to(tl.uint32, bitcast=True).
        # 2. Draw a number of 16 bits of your own for this step and column; add it to the bits.
        # 3. Keep the upper 16 bits; `total` is the float32 whose bits are these and 16 zeros.
        # INSTEAD total += x
        bits = (total + x).to(tl.uint32, bitcast=True)
        drawn = tl.randint(seed, t * N + n).to(tl.uint32, bitcast=True) & 0xFFFF
        total = ((bits + drawn) & 0xFFFF0000).to(tl.float32, bitcast=True)
        # END SOLUTION
    tl.store(total_ptr + n, total, mask=n < N)


def solve(x, *, seed):
    T, N = x.shape
    block = 128
    total = torch.empty(N, dtype=torch.float32, device=x.device)
    _sum_kernel[(triton.cdiv(N, block),)](x, total, T, N, seed, block)
    return total
