"""Q03, a code for zero: x float32[R, C] -> q uint8[R, C], scale float32[R], zero uint8[R].

    low, high = min(row, 0), max(row, 0)
    scale     = (high - low) / 255                1 where both are 0
    inverse   = 255 / (high - low)                anything where both are 0
    zero      = round(-low * inverse)
    q         = round(x * inverse) + zero         kept to 0 .. 255

Ties go to the even number.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _row_kernel(x_ptr, q_ptr, scale_ptr, zero_ptr, C, block: tl.constexpr):
    """One program for a whole row; `block` is a power of two, at least C."""
    r = tl.program_id(0)
    c = tl.arange(0, block)
    # BEGIN SOLUTION
    # 1. Load the row once; find low and high, which are never above and below 0.
    # 2. Store the scale; a row of zeros has 1.
    # 3. The inverse, by tl.div_rn (0 must not divide). Round -low * inverse to the nearest whole
    #    number, ties to even (add and subtract 1.5 * 2 ** 23): the zero point, stored as uint8.
    # 4. Round x * inverse in the same way, add the zero point, keep to 0 .. 255, store as uint8.
    x = tl.load(x_ptr + r * C + c, mask=c < C, other=0.0)
    low = tl.minimum(tl.min(x, axis=0), 0.0)
    high = tl.maximum(tl.max(x, axis=0), 0.0)
    span = high - low
    tl.store(scale_ptr + r, tl.where(span == 0.0, 1.0, span / 255.0))
    inverse = tl.div_rn(255.0, tl.where(span == 0.0, 1.0, span))
    zero = (-low * inverse + 12582912.0) - 12582912.0
    tl.store(zero_ptr + r, zero.to(tl.uint8))
    whole = (x * inverse + 12582912.0) - 12582912.0
    q = tl.minimum(tl.maximum(whole + zero, 0.0), 255.0)
    tl.store(q_ptr + r * C + c, q.to(tl.uint8), mask=c < C)
    # END SOLUTION


def solve(x):
    R, C = x.shape
    q = torch.empty((R, C), dtype=torch.uint8, device=x.device)
    scale = torch.empty(R, dtype=torch.float32, device=x.device)
    zero = torch.empty(R, dtype=torch.uint8, device=x.device)
    # A GPU rounds x * inverse + c once; in the interpreter, and without fusion, it is twice.
    block = triton.next_power_of_2(C)
    _row_kernel[(R,)](x, q, scale, zero, C, block, enable_fp_fusion=False)
    return q, scale, zero
