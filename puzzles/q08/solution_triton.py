"""Q08, every token its own scale: x float16[M, K] -> q int8[M, K], scale float32[M].

    top      = max |x[m, k]|                  over k
    scale[m] = top / 127                      1 where top is 0
    q[m, k]  = round(x[m, k] * (127 / top))   0 where top is 0

In float32; ties go to the even number. One launch.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _token_kernel(x_ptr, q_ptr, scale_ptr, K, block: tl.constexpr):
    """One program for one row."""
    m = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, block)
    # BEGIN SOLUTION
    # 1. Sweep over the row: keep the largest |x| of each lane, in float32.
    # 2. Reduce them to one number and store scale[m].
    # 3. Sweep again: multiply by 127 / top (tl.div_rn; 0 must not divide), round to the nearest
    #    whole number, ties to even (add and subtract 1.5 * 2 ** 23), and store the codes.
    largest = tl.zeros([block], tl.float32)
    for start in range(0, K, block):
        k = start + lane
        x = tl.load(x_ptr + m * K + k, mask=k < K, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
    top = tl.max(largest, axis=0)
    tl.store(scale_ptr + m, tl.where(top == 0.0, 1.0, top / 127.0))
    inverse = tl.div_rn(127.0, tl.where(top == 0.0, 1.0, top))
    for start in range(0, K, block):
        k = start + lane
        x = tl.load(x_ptr + m * K + k, mask=k < K, other=0.0).to(tl.float32)
        whole = (x * inverse + 12582912.0) - 12582912.0
        tl.store(q_ptr + m * K + k, whole.to(tl.int8), mask=k < K)
    # END SOLUTION


def solve(x):
    M, K = x.shape
    q = torch.empty((M, K), dtype=torch.int8, device=x.device)
    scale = torch.empty(M, dtype=torch.float32, device=x.device)
    # 1024 lanes on 128 threads: each loads 8 neighbours, 16 bytes at once
    # A GPU rounds x * inverse + c once; in the interpreter, and without fusion, it is twice.
    _token_kernel[(M,)](x, q, scale, K, 1024, enable_fp_fusion=False)
    return q, scale
