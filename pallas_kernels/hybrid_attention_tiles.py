"""What the kernels of hybrid attention share: vectors in registers, masks, what to walk over.

    i sees j  iff  q_start[j] <= i < q_end[j]

This is the mask of the plan seen from the keys: intervals of keys grow with i, so the queries that
see a key are an interval too, and that of an image under diffusion ends with the image.

Twin: triton_kernels/hybrid_attention_tiles.py.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import _lib
from .hybrid_attention_plan import (
    KV_END_MAX,
    KV_END_MIN,
    KV_START_MAX,
    KV_START_MIN,
    NOISE_MAX,
    NOISE_MIN,
    ORDERED,
    Q_END_MAX,
    Q_START_MIN,
    TILE,
)

WARPGROUPS = 2  # compute warpgroups; one more loads
LOG2E = math.log2(math.e)
# Of a thread. Three warpgroups start with 168 each: more than 504 together would wait forever.
COMPUTE_REGISTERS, MEMORY_REGISTERS = 240, 24
PARAMS = plgpu.CompilerParams(
    approx_math=True,
    reduction_scratch_bytes=0,  # rows alone are reduced, within warps
    lowering_semantics=plgpu.LoweringSemantics.Lane,
)
LAYOUT = plgpu.Layout.WGMMA
ROW, COLUMN = LAYOUT.reduce(1), LAYOUT.reduce(0)  # one value for each row, for each column


def warpgroup() -> Any:
    """Which of the block this is. Asked anew in a loop, what follows from it is not kept from one
    step to the next: addresses of operands in shared memory alone would fill 32 registers.
    """
    return lax.axis_index("wg")


def load(ref: Any, start: Any, size: int, layout: Any) -> jax.Array:
    """Part of a vector, in registers."""
    return plgpu.load(ref.at[pl.ds(start, size)], layout=layout, optimized=False)


def padded(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Bounds of tokens, up to a multiple of 128: those that are none see nothing."""
    return tuple(_lib.pad(x, ORDERED) for x in arrays)


def aligned(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """[T, heads, D] with T up to a multiple of 8, the rows of a piece of swizzled shared memory."""
    return tuple(_lib.pad(x, 8, 1, 1) for x in arrays)


def piece(D: int) -> int:
    """Columns of a piece of swizzled shared memory."""
    return 64 if D % 64 == 0 else 32


def filled(shape: tuple[int, ...], value: float) -> jax.Array:
    """float32 in registers, laid out as an accumulator or as one of its columns."""
    layout = LAYOUT if len(shape) == 2 else ROW
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def across(x: jax.Array, columns: int) -> jax.Array:
    return lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


def down(x: jax.Array, rows: int) -> jax.Array:
    return lax.broadcast_in_dim(x, (rows, x.shape[0]), [1])


def capped(
    s: jax.Array, scale: float, softcap: float, slope: Any, rows: Any, columns: Any
) -> tuple[jax.Array, float, jax.Array | None]:
    """q . k as (x in units of log 2 but for a factor, that factor, 1 - tanh^2 or None).

    The factor takes no instruction of its own where it is applied. slope: of ALiBi or None; rows,
    columns: positions.
    """
    if not softcap and slope is None:
        return s, scale * LOG2E, None
    bend = None
    if softcap:
        bent = jnp.tanh(s * (scale / softcap))
        s, bend = (softcap * LOG2E) * bent, 1.0 - bent * bent
    else:
        s = s * (scale * LOG2E)
    if slope is not None:
        apart = jnp.abs(across(rows, s.shape[1]) - down(columns, s.shape[0]))
        s = s - (slope * LOG2E) * apart.astype(jnp.float32)
    return s, 1.0, bend


def visible(row: Any, start: jax.Array, stop: jax.Array, rows: int) -> jax.Array:
    """[rows, columns] of bools: whether queries from `row` on see keys with these intervals.

    By columns: nothing else has to be kept in registers beside the scores.
    """
    i = row + plgpu.broadcasted_iota(jnp.int32, (rows, start.shape[0]), 0, layout=LAYOUT)
    return (i >= down(start, rows)) & (i < down(stop, rows))


def clear_dead(
    smems: tuple[Any, ...],
    dead: Any,
    first: Any,
    start_gmem: Any,
    stop_gmem: Any,
    wg: Any,
    met: Any,
) -> None:
    """Where `dead`: clears rows of tokens that see nothing, since 0 * NaN is not 0.

    smems: [rows, D], of tokens from `first` on. The warpgroups share the rows, and meet.
    """
    rows, D = smems[0].shape
    columns = piece(D)

    @pl.when(dead)
    def _() -> None:
        @pl.loop(wg, rows // TILE, step=WARPGROUPS)
        def _(i: Any) -> None:
            at = i * TILE
            start, stop = (load(x, first + at, TILE, ROW) for x in (start_gmem, stop_gmem))
            alive = across(start, columns) < across(stop, columns)

            # A few columns at a time: the accumulators have the registers.
            @pl.loop(0, D // columns)
            def _(j: Any) -> None:
                for smem in smems:
                    part = smem.at[pl.ds(at, TILE), pl.ds(j * columns, columns)]
                    x = plgpu.load(part, layout=LAYOUT)
                    part[...] = jnp.where(alive, x, jnp.zeros_like(x))

        plgpu.commit_smem()
        plgpu.barrier_arrive(met)
        plgpu.barrier_wait(met)


class Tiles:
    """The plan's minima and maxima over 64 tokens, and what follows for blocks of block_n."""

    def __init__(self, tiles_gmem: Any, block_n: int):
        self.gmem, self.block_n = tiles_gmem, block_n

    def of(self, column: int, first: Any, count: int, pick: Any) -> Any:
        """The least or greatest of a column over `count` tiles; those behind the last repeat it."""
        last = self.gmem.shape[0] - 1
        found = [self.gmem[jnp.minimum(first + i, last), column] for i in range(count)]
        return functools.reduce(pick, found)

    def of_block(self, column: int, ni: Any, pick: Any) -> Any:
        count = self.block_n // TILE
        return self.of(column, ni * count, count, pick)

    def blocks(self, start: Any, stop: Any) -> tuple[Any, Any]:
        """Blocks that have tokens of an interval, one at least, as [low, high); none beyond T."""
        count = self.block_n // TILE
        most = (self.gmem.shape[0] + count - 1) // count
        low = jnp.clip(jnp.where(start < stop, start // self.block_n, 0), 0, most - 1)
        high = jnp.minimum((stop + self.block_n - 1) // self.block_n, most)
        return low, jnp.maximum(high, low + 1)

    def keys_of(self, tile: Any, count: int) -> tuple[Any, Any]:
        """Blocks of keys that `count` tiles of queries may see."""
        start = self.of(KV_START_MIN, tile, count, jnp.minimum)
        return self.blocks(start, self.of(KV_END_MAX, tile, count, jnp.maximum))

    def queries_of(self, tile: Any, count: int) -> tuple[Any, Any]:
        """Blocks of queries that may see one of `count` tiles of keys."""
        start = self.of(Q_START_MIN, tile, count, jnp.minimum)
        return self.blocks(start, self.of(Q_END_MAX, tile, count, jnp.maximum))

    def seek(self, ni: Any, row: Any) -> Any:
        """Block ni of keys, or that behind the image under diffusion in which it lies, if queries
        from `row` on do not see it.

        An image that follows at once is visited at its first block, and is masked there.
        """
        stop = self.of_block(Q_END_MAX, ni, jnp.maximum)
        return jnp.where(stop <= row, jnp.maximum(ni + 1, stop // self.block_n), ni)

    def seen(self, ni: Any, tile: Any) -> Any:
        """Whether all of a tile of 64 queries see all of block ni of keys."""
        n = ni * self.block_n
        start, stop, low, high = (
            self.of(column, tile, 1, None)
            for column in (KV_START_MAX, KV_END_MIN, NOISE_MIN, NOISE_MAX)
        )
        least = self.of_block(NOISE_MIN, ni, jnp.minimum)
        most = self.of_block(NOISE_MAX, ni, jnp.maximum)
        clean = (most < 0) | ((least == most) & (low == most) & (high == most))
        return (start <= n) & (n + self.block_n <= stop) & clean

    def dead(self, ni: Any) -> Any:
        """Whether block ni has tokens that see nothing, or that are none."""
        return self.of_block(KV_END_MIN, ni, jnp.minimum) == 0
