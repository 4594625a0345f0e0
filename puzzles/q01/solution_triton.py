"""Q01, one scale for a whole tensor: x float32[N] -> q int8[N], scale float32[1].

    top   = max |x|
    scale = top / 127                1 where top is 0
    q     = round(x * (127 / top))   0 where x is NaN, or top is 0

NaN has no say in top. Ties go to the even number.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _top_kernel(x_ptr, top_ptr, scale_ptr, N, block: tl.constexpr):
    """One program sweeps over all of x."""
    # BEGIN SOLUTION
    # 1. Keep the largest |x| of each lane, block by block; a block may reach beyond N.
    # 2. Store the largest of all in top_ptr, and the scale in scale_ptr.
    lane = tl.arange(0, block)
    largest = tl.zeros([block], tl.float32)
    for start in range(0, N, block):
        x = tl.load(x_ptr + start + lane, mask=start + lane < N, other=0.0)
        x = tl.where(x == x, x, 0.0)
        largest = tl.maximum(largest, tl.abs(x))
    top = tl.max(largest, axis=0)
    tl.store(top_ptr, top)
    tl.store(scale_ptr, tl.where(top == 0.0, 1.0, top / 127.0))
    # END SOLUTION


@triton.jit
def _codes_kernel(x_ptr, top_ptr, q_ptr, N, block: tl.constexpr):
    """One program for each block of x."""
    i = tl.program_id(0) * block + tl.arange(0, block)
    # BEGIN SOLUTION
    # 3. Load this block of x, and top: x * (127 / top) is to be rounded. Divide with tl.div_rn,
    #    which rounds to nearest on every GPU; 0 must not divide.
    # 4. Round to the nearest whole number, ties to even, and store as int8.
    #    (Adding and then subtracting 1.5 * 2 ** 23 rounds a small float32 that way.)
    x = tl.load(x_ptr + i, mask=i < N, other=0.0)
    x = tl.where(x == x, x, 0.0)
    top = tl.load(top_ptr)
    inverse = tl.div_rn(127.0, tl.where(top == 0.0, 1.0, top))
    whole = (x * inverse + 12582912.0) - 12582912.0
    tl.store(q_ptr + i, whole.to(tl.int8), mask=i < N)
    # END SOLUTION


def solve(x):
    N, block = x.shape[0], 1024
    q = torch.empty(N, dtype=torch.int8, device=x.device)
    top = torch.empty(1, dtype=torch.float32, device=x.device)
    scale = torch.empty(1, dtype=torch.float32, device=x.device)
    _top_kernel[(1,)](x, top, scale, N, block)
    # A GPU rounds x * inverse + c once; in the interpreter, and without fusion, it is twice.
    grid = (triton.cdiv(N, block),)
    _codes_kernel[grid](x, top, q, N, block, enable_fp_fusion=False)
    return q, scale
