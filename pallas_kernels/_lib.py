"""What every Pallas twin needs: sizes, checks, the swizzled tile, the row pitch.

Kernel files call these as module attributes (`_lib.num_sms()`), so that a compile-only gate can
answer for a GPU that is not there.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

WARPGROUP = 128  # lanes of a warpgroup, which Pallas calls one thread

# For kernels over rows. Lane semantics: shared memory stays row-major, as TMA stores it. No
# automatic barriers: a lane writes only those elements of a slot that it alone has read, and
# commit_smem is a barrier before TMA sees them. No scratch: reductions stay within warps.
ROW_PARAMS = plgpu.CompilerParams(
    approx_math=True,
    reduction_scratch_bytes=0,
    unsafe_no_auto_barriers=True,
    lowering_semantics=plgpu.LoweringSemantics.Lane,
)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def num_sms() -> int:
    """Number of streaming multiprocessors: the grid of a persistent kernel.

    The interpreter answers 2, so that a persistent loop takes several trips on a small array too.

    Raises NotImplementedError on a GPU that is not a Hopper: wgmma exists on sm_90 alone.
    """
    device = jax.devices()[0]
    if device.platform != "gpu":
        return 2
    if device.compute_capability != "9.0":
        raise NotImplementedError(
            f"pallas_kernels need a Hopper GPU (compute capability 9.0), got {device.device_kind} "
            f"({device.compute_capability}); the Triton twins run from Ampere up"
        )
    return device.core_count


def bits(dtype: Any) -> int:
    """Bits of one element, sub-byte types included."""
    dtype = jnp.dtype(dtype)
    return jnp.finfo(dtype).bits if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).bits


def swizzled(dtype: Any, columns: int | None = None) -> tuple[Any, ...]:
    """Transforms of a shared-memory tile that TMA and wgmma touch without bank conflicts.

    The tile is cut in pieces of 8 rows x one swizzle row: 128 bytes, less where `columns` are few.
    """
    swizzle = 128 if columns is None else plgpu.find_swizzle(columns * bits(dtype))
    return (plgpu.TilingTransform((8, 8 * swizzle // bits(dtype))), plgpu.SwizzleTransform(swizzle))


def pad(x: jax.Array, *multiples: int) -> jax.Array:
    """x with zeros behind its last dimensions until those are multiples of `multiples`."""
    sizes = x.shape[x.ndim - len(multiples) :]
    extra = [(0, -size % multiple) for size, multiple in zip(sizes, multiples, strict=True)]
    if not any(after for _, after in extra):
        return x
    return jnp.pad(x, [(0, 0)] * (x.ndim - len(multiples)) + extra)


def vary_alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays, all marked as varying over each axis of a shard_map that one of them varies over.

    Inputs of one function must be so marked for its gradient (that of the mark is a sum over the
    axes), and a kernel's output by hand: plgpu.kernel drops the mark.
    """
    own = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    every = frozenset().union(*own)
    return tuple(
        lax.pcast(x, tuple(every - axes), to="varying") if every - axes else x
        for x, axes in zip(arrays, own, strict=True)
    )


def check_array(
    name: str, x: Any, shape: tuple[int | str, ...], dtypes: tuple[Any, ...] | None
) -> None:
    """Raises unless x has that rank, those sizes (a letter stands for any), one of those dtypes."""
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise TypeError(f"{name}: expected a JAX array, got {type(x).__name__}")
    fits = len(x.shape) == len(shape) and all(
        isinstance(want, str) or want == got for want, got in zip(shape, x.shape, strict=True)
    )
    if not fits:
        letters = ", ".join(str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{letters}], got {list(x.shape)}")
    if dtypes is not None and jnp.dtype(x.dtype) not in [jnp.dtype(dtype) for dtype in dtypes]:
        names = " or ".join(jnp.dtype(dtype).name for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {names}, got {jnp.dtype(x.dtype).name}")


def check_config(config: Any, cls: type) -> None:
    if config is not None and not isinstance(config, cls):
        raise TypeError(
            f"config: expected {cls.__module__}.{cls.__name__} or None, got {type(config).__name__}"
        )


def check_static(name: str, value: Any, types: tuple[type, ...]) -> None:
    """Raises unless value is a Python value of one of those types; a tracer or an array is not."""
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        names = " or ".join(t.__name__ for t in types)
        raise TypeError(
            f"{name}: expected a Python {names} (a static value), got {type(value).__name__}"
        )


def row_pieces(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays [..., N] of one N as [..., N / piece, piece]: the same memory, in short pieces.

    One TMA copy reaches at most 256 elements along a dimension, and longer along two. A piece is
    what a warp or a part of it reads at once, 16 bytes a lane: the widest power of two that divides
    N, up to 512 bytes of the first array. Rows that have none of 64 elements or more are padded to
    the widest first.
    """
    widest = 32 * 128 // bits(arrays[0].dtype)
    if arrays[0].shape[-1] % 64:
        arrays = tuple(pad(x, widest) for x in arrays)
    columns = arrays[0].shape[-1]
    piece = min(widest, columns & -columns)
    return tuple(x.reshape(*x.shape[:-1], columns // piece, piece) for x in arrays)


def row_chunk(N: int, split: int, most: int, dtype: Any) -> int:
    """Columns of a chunk when `split` warpgroups share a row of N, each holding at most `most`."""
    step = WARPGROUP * 128 // bits(dtype)
    return min(cdiv(cdiv(N, split), step) * step, most)


def row_share(wg: Any, block_m: int, warpgroups: int) -> tuple[Any, Any]:
    """Which row of the block a warpgroup works at, and which part of it."""
    if block_m == 1:
        return 0, wg
    return lax.div(wg, warpgroups // block_m), lax.rem(wg, warpgroups // block_m)


def piece_tile(piece: int, dtype: Any) -> tuple[int, Any]:
    """How many pieces a warpgroup reads at once, 16 bytes a lane, and the layout of such a tile.

    No piece leaves its warp, so a reduction along pieces takes shuffles alone. This matters: for
    reductions across warps Mosaic has one scratch buffer, which the warpgroups of a block would
    overwrite for each other (jax 0.11.2; it is not checked, and the interpreter cannot see it).
    """
    lane = 128 // bits(dtype)
    pieces = WARPGROUP * lane // piece
    if piece == 32 * lane:
        tiles, warps, lanes = ((pieces, piece), (lane,)), (-3,), (-2,)
    else:
        tiles, warps, lanes = ((pieces, piece), (pieces // 4, piece), (lane,)), (-5,), (-3, -2)
    return pieces, plgpu.Layout.TILED(
        plgpu.Tiling(tiles), warp_dims=warps, lane_dims=lanes, vector_dim=-1
    )


def store_row_chunk(chunk_smem: Any, rows_gmem: Any, row: Any, start: Any) -> None:
    """Stores a chunk of a row by TMA, and of the last chunk only the pieces that the row has.

    Mosaic turns a store to contiguous memory into a plain bulk copy, which ends where the array
    ends, not where the row does (jax 0.11.2; the interpreter clips at the row).
    """
    columns, pieces = rows_gmem.shape[1], chunk_smem.shape[0]

    @pl.when(start + pieces <= columns)
    def _():
        plgpu.copy_smem_to_gmem(chunk_smem, rows_gmem.at[row, pl.ds(start, pieces)])

    if last := columns % pieces:

        @pl.when(start == columns - last)
        def _():
            plgpu.copy_smem_to_gmem(
                chunk_smem.at[pl.ds(0, last)], rows_gmem.at[row, pl.ds(columns - last, last)]
            )
