"""The order in which the grouped product computes its tiles, made of the sizes on the device.

    row tiles of expert e: as many as its rows need, from o[e-1] on; num_n tiles of columns each
    within an expert: groups of at most group_m row tiles; a group's row tiles of one tile of
    columns, then those of the next: what runs side by side shares its operands

A program for each expert sums the sizes by itself and writes that expert's tiles.

Twin: pallas_kernels/moe_gemm_plan.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import _lib


@triton.jit
def _moe_gemm_plan_kernel(
    sizes_ptr,  # [E]
    starts_ptr,  # [2, E + 1]: first row of each expert, then live rows; the same for its tiles
    tiles_ptr,  # [tiles, 4]: expert, first row, row past the last, tile of columns
    M, E, num_n, group_m,
    block_m: tl.constexpr, block_e: tl.constexpr, block_t: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    expert = tl.program_id(0)
    e = tl.arange(0, block_e)

    # --- 2. main loop
    # Negative sizes count as 0, and what is beyond M rows is cut off: no tile leaves x or y.
    sizes = tl.maximum(tl.load(sizes_ptr + e, mask=e < E, other=0), 0).to(tl.int64)
    ends = tl.cumsum(sizes, 0)
    starts = tl.minimum(ends - sizes, M).to(tl.int32)
    ends = tl.minimum(ends, M).to(tl.int32)
    num_m = tl.cdiv(ends - starts, block_m)  # [block_e]

    # --- 3. epilogue
    start = tl.sum(tl.where(e == expert, starts, 0))
    end = tl.sum(tl.where(e == expert, ends, 0))
    first_tile = tl.sum(tl.where(e < expert, num_m, 0)) * num_n
    tiles = tl.cdiv(end - start, block_m) * num_n

    # --- 4. store
    tl.store(starts_ptr + expert, start)
    tl.store(starts_ptr + E + 1 + expert, first_tile)
    if expert == E - 1:
        tl.store(starts_ptr + E, end)
        tl.store(starts_ptr + 2 * E + 1, first_tile + tiles)
    # Programs run side by side: group_m rows of tiles and a few columns share their operands.
    width = group_m * num_n
    for t0 in range(0, tiles, block_t):
        t = t0 + tl.arange(0, block_t)
        top = t // width * group_m
        height = tl.minimum(tl.cdiv(end - start, block_m) - top, group_m)
        height = tl.maximum(height, 1)  # of lanes past the last tile
        row = start + (top + t % width % height) * block_m
        tile = tiles_ptr + (first_tile + t) * 4
        tl.store(tile, expert, mask=t < tiles)
        tl.store(tile + 1, row, mask=t < tiles)
        tl.store(tile + 2, tl.minimum(row + block_m, end), mask=t < tiles)
        tl.store(tile + 3, t % width // height, mask=t < tiles)


def _fake_plan(sizes, M, block_m, num_n, group_m):
    most = min(len(sizes), M)  # experts whose last tile of rows may be a part of one
    tiles = ((M - most) // block_m + most) * num_n
    return [sizes.new_empty((2, len(sizes) + 1)), sizes.new_empty((tiles, 4))]


@_lib.opaque("grouped_gemm_plan", _fake_plan)
def tile_plan(sizes: Tensor, M: int, block_m: int, num_n: int, group_m: int) -> list[Tensor]:
    """[starts, tiles] as above; room for as many tiles as any sizes can make."""
    starts, tiles = _fake_plan(sizes, M, block_m, num_n, group_m)
    E = len(sizes)
    with _lib.on_device(sizes):
        _lib.check_gpu()
        _moe_gemm_plan_kernel[(E,)](
            sizes.contiguous(), starts, tiles, M, E, num_n, min(group_m, _lib.cdiv(M, block_m)),
            block_m, max(16, _lib.power_of_2(E)), 256, num_warps=4,
        )  # fmt: skip
    return [starts, tiles]
