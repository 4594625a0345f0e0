"""Gradient of the weights: a product over the rows of each expert, so over a ragged axis.

    dw[e] = a[rows of e]^T @ b[rows of e]       zeros for an expert without rows

    all steps of all tiles of this program, in one loop:
        the first step of a tile: its expert, its rows, its place in dw
        acc += a[block_k rows, m]^T @ b[block_k rows, n]
        the last step of a tile: store acc in two halves, begin anew

The rows of the next expert are loaded as zeros: TMA itself stops at the last row of an expert.

Twin: pallas_kernels/moe_gemm_dw.py.

Sources: the loop over all steps follows the forerunner of Triton's tutorial 09; descriptors that
end at any row are Triton's own (triton.tools.ragged_tma).
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor, load_ragged
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _lib
from .moe_gemm_fusions import load_taken, taken_rows


@triton.jit
def _load_group(
    x, rows_ptr, row, end, T, col, cols, stride_r, stride_c,
    block_r: tl.constexpr, block_c: tl.constexpr, tma: tl.constexpr,
):  # fmt: skip
    """x[row : row + block_r, col : col + block_c], zeros from end on and beyond the edge."""
    if tma:
        tile = load_ragged(x, row, end - row, [0, col])
    else:
        taken = taken_rows(rows_ptr, row, end, T, block_r)
        tile = load_taken(x, taken, col, cols, stride_r, stride_c, block_c)
    return tile


@triton.jit
def _moe_gemm_dw_kernel(
    a,  # [M, P], or [T, P] with a_rows: a TMA descriptor that ends at any row, or a pointer
    b,  # [M, Q], or [T, Q] with b_rows
    dw,  # [E, P, Q]
    starts_ptr, a_rows_ptr, b_rows_ptr,
    T, P, Q, E,
    stride_ar, stride_ac, stride_br, stride_bc, group_m,
    block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr, block_e: tl.constexpr,
    num_programs: tl.constexpr, tma: tl.constexpr,
):  # fmt: skip
    a_tma: tl.constexpr = tma and a_rows_ptr is None
    b_tma: tl.constexpr = tma and b_rows_ptr is None
    num_m, num_n = tl.cdiv(P, block_m), tl.cdiv(Q, block_n)
    tiles = num_m * num_n  # of each expert
    # All steps of all tiles of this program, in one loop: the operands of the next tile are on
    # their way while this one is stored. An expert without rows takes one step, over zeros.
    pid = tl.program_id(0)
    experts = tl.arange(0, block_e)
    starts = tl.load(starts_ptr + experts, mask=experts < E, other=0)
    ends = tl.load(starts_ptr + experts + 1, mask=experts < E, other=0)
    before = (tl.maximum(experts * tiles - pid, 0) + num_programs - 1) // num_programs
    after = (tl.maximum((experts + 1) * tiles - pid, 0) + num_programs - 1) // num_programs
    mine = tl.maximum(tl.cdiv(ends - starts, block_k), 1) * (after - before)
    total = tl.sum(tl.where(experts < E, mine, 0))

    tile, k, steps = pid - num_programs, -1, 0
    e, start, end, m, n = 0, 0, 0, 0, 0
    acc = tl.zeros((block_m, block_n), tl.float32)
    for _ in tl.range(0, total):
        # --- 1. which tile
        k += 1
        if k == steps:
            k = 0
            tile += num_programs
            e = tile // tiles
            start, end = tl.load(starts_ptr + e), tl.load(starts_ptr + e + 1)
            steps = tl.maximum(tl.cdiv(end - start, block_k), 1)
            width = group_m * num_n
            within = tile % tiles
            first = within // width * group_m
            height = min(num_m - first, group_m)
            m = (first + within % width % height) * block_m
            n = within % width // height * block_n

        # --- 2. main loop
        row = start + k * block_k
        a_tile = _load_group(
            a, a_rows_ptr, row, end, T, m, P, stride_ar, stride_ac, block_k, block_m, a_tma
        )
        b_tile = _load_group(
            b, b_rows_ptr, row, end, T, n, Q, stride_br, stride_bc, block_k, block_n, b_tma
        )
        acc = tl.dot(a_tile.T, b_tile, acc)

        if k == steps - 1:
            # --- 3. epilogue
            half: tl.constexpr = block_n // 2
            halves = tl.split(tl.permute(tl.reshape(acc, (block_m, 2, half)), (0, 2, 1)))
            # --- 4. store
            for i in tl.static_range(2):
                part = halves[i].to(dw.dtype if tma else dw.dtype.element_ty)
                col = n + i * half
                if tma:
                    dw.store([e, m, col], part.reshape(1, block_m, half))
                else:
                    r, c = m + tl.arange(0, block_m), col + tl.arange(0, half)
                    at = (e.to(tl.int64) * P + r[:, None]) * Q + c[None, :]
                    tl.store(dw + at, part, mask=(r[:, None] < P) & (c[None, :] < Q))
            acc = tl.zeros((block_m, block_n), tl.float32)


def launch(
    a: Tensor,
    b: Tensor,
    a_rows: Tensor | None,
    b_rows: Tensor | None,
    starts: Tensor,
    dw: Tensor,
    tiles: Any,
    tma: bool,
) -> None:
    """dw [E, P, Q] = a^T @ b over the rows of every expert; tiles: a Config of moe_gemm.py."""
    E, P, Q = dw.shape
    T = len(b if a_rows is None else a)  # rows of the one that is gathered, if any is

    def operand(x: Tensor, rows: Tensor | None, columns: int) -> TensorDescriptor | Tensor:
        ready = tma and rows is None
        return create_ragged_descriptor(x, [tiles.block_k, columns]) if ready else x

    programs = tiles.programs * _lib.num_sms()
    # An index is loaded before its row can be: Triton divides its stages between the two.
    gathers = a_rows is not None or b_rows is not None
    stages = 2 * tiles.stages - 1 if gathers else tiles.stages
    _moe_gemm_dw_kernel[(programs,)](
        operand(a, a_rows, tiles.block_m), operand(b, b_rows, tiles.block_n),
        TensorDescriptor.from_tensor(dw, [1, tiles.block_m, tiles.block_n // 2]) if tma else dw,
        starts, a_rows, b_rows, T, P, Q, E, *a.stride(), *b.stride(),
        min(tiles.group_m, _lib.cdiv(P, tiles.block_m)), tiles.block_m, tiles.block_n,
        tiles.block_k, max(16, _lib.power_of_2(E)), programs, tma,
        num_warps=tiles.warps, num_stages=stages,
    )  # fmt: skip
