"""The order in which the grouped product computes its tiles, made of the sizes on the device.

    row tiles of expert e: as many as its rows need, from o[e-1] on; num_n tiles of columns each
    tile t belongs to the last expert whose first tile is <= t
    within an expert: groups of at most group_m row tiles; a group's row tiles of one tile of
    columns, then those of the next: what runs side by side shares its operands

A block sums the sizes by itself and writes 128 tiles of the plan.

Twin: triton_kernels/moe_gemm_plan.py.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import _lib

ALIGN = 8  # rows of a swizzled piece of shared memory

# Rows of the plan. By tile: its expert, its first row in x, where the expert's rows start and stop,
# and which tile of columns it is. By expert: where its rows start and stop. Everywhere: how many
# tiles, and live rows.
(
    TILE_EXPERT, TILE_ROW, TILE_START, TILE_STOP, TILE_COLUMN, EXPERT_START, EXPERT_STOP,
    TILES, LIVE,
) = range(9)  # fmt: skip


def _moe_gemm_plan_kernel(
    sizes_gmem: Any,  # [E]
    plan_gmem: Any,  # [9, a multiple of 128]
    scan_smem: Any,  # [2 * 128]: zeros, and then what is summed
    table_smem: Any,  # [3, a multiple of 128]: each expert's first tile, and where its rows are
    *,
    M: int,
    block_m: int,
    num_n: int,
    group_m: int,
) -> None:
    # --- 1. which tile
    chunk, width = lax.axis_index("chunk"), _lib.WARPGROUP
    layout = plgpu.Layout.WG_STRIDED((width,), 1)
    lane = plgpu.broadcasted_iota(jnp.int32, (width,), 0, layout=layout)
    index, E = chunk * width + lane, sizes_gmem.shape[0]
    none = plgpu.layout_cast(jnp.zeros((width,), jnp.int32), layout)

    def row_tiles(start: Any, stop: Any) -> Any:
        tiles = lax.div(stop - lax.div(start, ALIGN) * ALIGN + block_m - 1, block_m)
        return jnp.where(stop > start, tiles, 0)

    def shifted(values: Any, by: Any) -> Any:
        """The values `by` lanes before; zeros from before the first one."""
        scan_smem[pl.ds(width, width)] = values
        return plgpu.load(scan_smem.at[pl.ds(width - by, width)], layout=layout)

    def sums_before(values: Any, most: int) -> Any:
        """Of all lanes before each, at most `most`: twice as many in each step."""

        def step(i: Any, sums: Any) -> Any:
            return jnp.minimum(sums + shifted(sums, lax.shift_left(1, i)), most)

        return lax.fori_loop(0, width.bit_length() - 1, step, shifted(values, 1))

    def sizes(c: Any) -> Any:
        """Of 128 experts; zeros for those that do not exist."""
        if E % width == 0:
            return plgpu.load(sizes_gmem.at[pl.ds(c * width, width)], layout=layout)

        def one(e: Any, found: Any) -> Any:
            return jnp.where(lane == e - c * width, sizes_gmem[e], found)

        return lax.fori_loop(c * width, jnp.minimum((c + 1) * width, E), one, none)

    # --- 2. main loop
    scan_smem[pl.ds(0, width)] = none

    def experts(c: Any, carry: Any) -> Any:
        live, tiles = carry
        here = pl.ds(c * width, width)
        # Negative sizes count as 0, and what is beyond M rows is cut off: no tile leaves x or y.
        size = jnp.clip(sizes(c), 0, M)
        start = jnp.minimum(live + sums_before(size, M), M)
        stop = jnp.minimum(start + size, M)
        more = row_tiles(start, stop) * num_n
        first = tiles + sums_before(more, plan_gmem.shape[1])
        for i, values in enumerate((first, start, stop)):
            table_smem[i, here] = values

        @pl.when(c == chunk)
        def _own() -> None:
            plan_gmem[EXPERT_START, here] = start
            plan_gmem[EXPERT_STOP, here] = stop

        shifted(first + more, 0)
        return table_smem[2, c * width + width - 1], scan_smem[2 * width - 1]

    def expert(e: Any, found: Any) -> Any:
        first = table_smem[0, e]
        values = (e, first, table_smem[1, e], table_smem[2, e])
        # The last one that begins before a tile has it: experts without rows begin with the next.
        return [jnp.where(index >= first, *pair) for pair in zip(values, found, strict=True)]

    zero = jnp.int32(0)
    live, tiles = lax.fori_loop(0, _lib.cdiv(E, width), experts, (zero, zero))
    e, first, start, stop = lax.fori_loop(0, E, expert, [none] * 4)

    # --- 3. epilogue
    # An expert's row tiles in groups of one height: they and a few tiles of columns are computed
    # side by side, and share their operands.
    num_m = jnp.maximum(row_tiles(start, stop), 1)
    height = lax.div(num_m - 1, lax.div(num_m + group_m - 1, group_m)) + 1
    within = index - first
    top = lax.div(within, height * num_n) * height
    within -= top * num_n
    height = jnp.maximum(jnp.minimum(num_m - top, height), 1)
    row = lax.div(start, ALIGN) * ALIGN + (top + lax.rem(within, height)) * block_m

    # --- 4. store
    here = pl.ds(chunk * width, width)
    for i, values in (
        (TILE_EXPERT, e), (TILE_ROW, row), (TILE_START, start), (TILE_STOP, stop),
        (TILE_COLUMN, lax.div(within, height)), (TILES, none + tiles), (LIVE, none + live),
    ):  # fmt: skip
        plan_gmem[i, here] = values


def tile_plan(sizes: jax.Array, M: int, N: int, config: Any) -> jax.Array:
    """The plan for M rows and N columns of y, with room for all tiles that there can be."""
    E, block_m, group_m = sizes.shape[0], config.block_m, config.group_m
    num_n = _lib.cdiv(N, config.block_n * config.cluster)
    most = (_lib.cdiv(M, block_m) + 2 * min(E, M)) * num_n  # a part at both ends of each expert
    chunks = _lib.cdiv(max(most, E), _lib.WARPGROUP)
    return plgpu.kernel(
        functools.partial(
            _moe_gemm_plan_kernel, M=M, block_m=block_m, num_n=num_n, group_m=group_m
        ),
        out_type=jax.ShapeDtypeStruct((9, chunks * _lib.WARPGROUP), jnp.int32),
        scratch_types=[
            plgpu.SMEM((2 * _lib.WARPGROUP,), jnp.int32),
            plgpu.SMEM((3, _lib.cdiv(E, _lib.WARPGROUP) * _lib.WARPGROUP), jnp.int32),
        ],
        grid=(chunks,),
        grid_names=("chunk",),
        kernel_name="moe_gemm_plan_kernel",
    )(sizes)
