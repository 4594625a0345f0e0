"""What the scans share: parts of a tile side by side, chunks of time, the sequences in a chunk.

A tile is `block_t` tokens in 4 parts, one for each warp; a row of it, [4, block_c], holds one token
of each part: loaded side by side, scanned row by row. Backwards, tiles, rows, parts and sequences
come in the opposite order.

Twin: triton_kernels/linear_scan_walk.py.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import _lib

PARTS = 4  # of a tile: one for each warp of a warpgroup
STEP = 256  # channels of a block that takes one token


def tiling(
    T: int, W: int, B: int, dtype: Any, which: str, elements: int, arrays: int
) -> tuple[int, int, int, int]:
    """(block_t, block_c, chunks, stages) for T tokens in B sequences of W channels: the widest
    tiles that keep 132 multiprocessors about equally busy, in chunks that cut no sequence where all
    are alike; else as many chunks as fit. A chunk that ends within a sequence has the rest of that
    chunk read twice.

    elements: of a tile in each of so many arrays, at most.
    """
    block_c, chunks, resident = 0, 1, 2  # resident: blocks that share a multiprocessor
    for block_c in widths(dtype, which):
        blocks, resident = _lib.cdiv(W, block_c), 3 if block_c == 64 else 2
        fit = (d for d in range(1, B + 1) if B % d == 0 and d * blocks <= 132 * resident)
        chunks = max(fit, default=1)
        if chunks * blocks > 0.8 * 132 * _lib.cdiv(chunks * blocks, 132):
            break
    else:
        chunks, resident = max(1, 2 * 132 // _lib.cdiv(W, block_c)), 2
    chunks = min(chunks, _lib.cdiv(T, 64))
    room = 196608 * 8 // (resident * arrays * _lib.bits(dtype))
    while resident == 3 and room < 4 * elements:
        elements //= 2
    stages = min(6, max(2, room // elements))
    return tokens(elements, block_c, T, chunks), block_c, chunks, stages


def widths(dtype: Any, which: str) -> tuple[int, ...]:
    """Channels that a tile may have, the widest first: whole rows of 128 bytes for a backward."""
    return (128, 64, 32) if which == "fwd" or _lib.bits(dtype) == 32 else (128, 64)


def tokens(elements: int, block_c: int, T: int, chunks: int) -> int:
    """Tokens of a tile of so many elements; fewer where a chunk would not have 4 tiles, whose loads
    run ahead."""
    block_t = elements // block_c
    while block_t > 32 and 4 * block_t * chunks > T:
        block_t //= 2
    return block_t


def launch_sizes(T: int, W: int, config: Any) -> tuple[int, tuple[int, int]]:
    """Tokens of a chunk, a multiple of the tile's, and the grid."""
    chunk = _lib.cdiv(_lib.cdiv(T, config.chunks), config.block_t) * config.block_t
    return chunk, (_lib.cdiv(T, chunk), _lib.cdiv(W, config.block_c))


def check_sequences(cu_seqlens: Any, W: int, **states: Any) -> None:
    """Raises unless cu_seqlens and the states given fit W channels."""
    _lib.check_array("cu_seqlens", cu_seqlens, ("B + 1",), (jnp.int32,))
    if len(cu_seqlens) == 0:
        raise ValueError("cu_seqlens: expected shape [B + 1], got [0]")
    for name, state in states.items():
        if state is not None:
            _lib.check_array(name, state, (len(cu_seqlens) - 1, W), (jnp.float32,))


def check_backward(config: Any, dtype: Any) -> None:
    """Raises unless TMA, which writes to multiples of 128 bytes, can place a tile a row later."""
    least = widths(dtype, "bwd")[-1]
    if config.block_c < least:
        raise ValueError(f"block_c: expected at least {least} in a backward, got {config.block_c}")


def row_layout(block_c: int) -> Any:
    """Of a row [PARTS, block_c]: a warp for each part, adjacent channels in a lane."""
    tiling = plgpu.Tiling(((PARTS, block_c), (block_c // 32,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def spread(v: jax.Array, layout: Any) -> jax.Array:
    """The same channels [block_c] for each part."""
    return plgpu.layout_cast(lax.broadcast_in_dim(v, (PARTS, *v.shape), (1,)), layout)


def load_channels(x_gmem: Any, layout: Any) -> jax.Array:
    """Channels of a state or a map, the same in each warp. [block_c]"""
    return plgpu.load(x_gmem, layout=layout.reduce(0), optimized=False)


def first_sequence(cu_gmem: Any, t: Any, B: int, reverse: bool) -> Any:
    """The sequence with which a scan goes on or begins at the bound t between two tokens, the first
    it meets of those that begin there."""

    def narrow(_: Any, bounds: tuple[Any, Any]) -> tuple[Any, Any]:
        low, high = bounds
        mid = jnp.minimum(lax.div(low + high, 2), B)
        beyond = cu_gmem[mid] > t if reverse else cu_gmem[mid] >= t
        return jnp.where(beyond, low, mid + 1), jnp.where(beyond, mid, high)

    # forwards the first bound >= t; backwards the first > t, or B + 1
    most = B + reverse
    bounds = (jnp.int32(0), jnp.int32(most))
    found = jnp.minimum(lax.fori_loop(0, (most + 1).bit_length(), narrow, bounds)[0], most)
    at = jnp.maximum(found - reverse, 0)
    inside = cu_gmem[at] != t
    s = at - jnp.where(inside, 0, 1) if reverse else at - jnp.where(inside, 1, 0)
    return jnp.clip(s, 0, B - 1)


def carried(
    carry_gmem: Any, channel: Any, state: Any, begin: Any, stop: Any, ci: Any, chunk: int,
    layout: Any, reverse: bool,
) -> Any:  # fmt: skip
    """`state`, or if the sequence begins before chunk ci, what the chunks from there on leave.

    carry: [chunks, 2, W], of each chunk the map of its last sequence.
    """
    if carry_gmem is None:
        return state
    origin = lax.div(stop - 1, chunk) if reverse else lax.div(begin, chunk)

    def compose(i: Any, state: Any) -> Any:
        j = origin - i if reverse else origin + i
        a, b = (load_channels(carry_gmem.at[j, m, channel], layout) for m in range(2))
        return jnp.where(i == 0, b, a * state + b)  # what came before the sequence may be NaN

    return lax.fori_loop(0, origin - ci if reverse else ci - origin, compose, state)


def across(
    maps_smem: Any, turn: Any, a: Any, b: Any, state: Any, layout: Any, reverse: bool
) -> tuple[Any, Any, Any]:
    """From the maps of the parts [PARTS, block_c]: the state before each [PARTS, block_c], the one
    after the last, and the product of all a. [block_c]"""
    maps_smem[turn, 0] = a
    maps_smem[turn, 1] = b
    plgpu.commit_smem()  # a barrier, too: with two buffers one is enough
    part = plgpu.broadcasted_iota(jnp.int32, a.shape, 0, layout=layout)
    before, product = spread(state, layout), None
    for p in range(PARTS)[:: -1 if reverse else 1]:
        a_part, b_part = (load_channels(maps_smem.at[turn, i, p], layout) for i in range(2))
        state = a_part * state + b_part
        product = a_part if product is None else product * a_part
        before = jnp.where(part < p if reverse else part > p, spread(state, layout), before)
    return before, state, product


def load_row(smem: Any, slot: Any, r: int, layout: Any) -> jax.Array:
    """Row r of a tile. [PARTS, block_c]"""
    row = plgpu.load(smem.at[slot, :, r], layout=layout, optimized=False)
    return row.astype(jnp.float32)


def loader(
    copies: Sequence[tuple[Any, Any]],
    full: Any,
    channel: Any,
    trips: Any,
    place: Callable[[Any], Any],
    shifted: int = -1,
) -> Callable[[Any], None]:
    """What loads a tile into slots [stages, PARTS, rows, block_c] that go round; the first ones are
    on their way. place(q): the first token of tile q, at a multiple of rows.

    copies: from tiled arrays, but copies[shifted] from [T, W], one token earlier.
    """
    stages, _, rows, _ = copies[0][1].shape

    def load(q: Any) -> None:
        @pl.when(q < trips)
        def _():
            slot = lax.rem(q, stages)
            for i, (gmem, smem) in enumerate(copies):
                if i != shifted:
                    source = gmem.at[pl.ds(lax.div(place(q), rows), PARTS), :, channel]
                    plgpu.copy_gmem_to_smem(source, smem.at[slot], full.at[slot])
                    continue
                for p in range(PARTS):
                    load_shifted(gmem, smem.at[slot, p], place(q) + p * rows, full.at[slot])

    def load_shifted(gmem: Any, part: Any, t: Any, barrier: Any) -> None:
        @pl.when(t > 0)
        def _():
            plgpu.copy_gmem_to_smem(gmem.at[pl.ds(t - 1, rows), channel], part, barrier)

        # nothing is before the first token, whose row nobody reads
        @pl.when(t == 0)
        def _():
            source, rest = gmem.at[pl.ds(0, rows - 1), channel], part.at[pl.ds(1, rows - 1)]
            plgpu.copy_gmem_to_smem(source, rest, barrier)

    @pl.loop(0, stages - 1)
    def _(q):
        load(q)

    return load


def store_tile(copies: Sequence[tuple[Any, Any]], slot: Any, t0: Any, channel: Any) -> None:
    """Starts the stores of a slot; beyond the array nothing is stored."""
    plgpu.commit_smem()
    for smem, gmem in copies:
        target = gmem.at[pl.ds(lax.div(t0, smem.shape[2]), PARTS), :, channel]
        plgpu.copy_smem_to_gmem(smem.at[slot], target, commit_group=False)
    plgpu.commit_smem_to_gmem_group()


def tiled(config: Any, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays [T, W] as [T / rows, rows, W], so that one TMA copy brings all parts of a tile.

    TMA wants rows at multiples of 16 bytes. Of a single block of channels it copies no tiles but
    runs of memory, which do not end where the array ends: whole tiles of that.
    """
    W = arrays[0].shape[1]
    rows = config.block_t // PARTS
    alone = W <= config.block_c
    columns = config.block_c if alone else 128 // _lib.bits(arrays[0].dtype)
    padded = (_lib.pad(x, config.block_t if alone else rows, columns) for x in arrays)
    return tuple(x.reshape(-1, rows, x.shape[1]) for x in padded)


def flat(x: jax.Array, T: int, W: int) -> jax.Array:
    """[T, W] of a tiled array."""
    return x.reshape(-1, x.shape[2])[:T, :W]


def launch(
    kernel: Any, name: str, rows: tuple[Any, ...], small: tuple[Any, ...], out_type: Any,
    grid: tuple[int, int], config: Any, arrivals: int = 0, **static: Any,
) -> Any:  # fmt: skip
    """Runs a kernel over tiles of the arrays in rows; small: what it reads directly."""
    slot = (config.stages, PARTS, config.block_t // PARTS, config.block_c)
    return plgpu.kernel(
        functools.partial(kernel, config=config, **static),
        out_type=out_type,
        scratch_types=[
            *(plgpu.SMEM(slot, x.dtype) for x in rows),
            plgpu.SMEM((2, 2, PARTS, config.block_c), jnp.float32),
            plgpu.Barrier(num_arrivals=arrivals or len(rows), num_barriers=config.stages),
        ],
        grid=grid,
        grid_names=("chunks", "channels"),
        compiler_params=_lib.ROW_PARAMS,
        kernel_name=name,
    )(*rows, *small)


def step(
    kernel: Any, name: str, rows: tuple[Any, ...], small: tuple[Any, ...] = (), **static: Any
) -> tuple[jax.Array, jax.Array]:
    """Runs a kernel on one token of each sequence: (h, h_T)[B, W]. rows: [B, W], small: [W]."""
    B, W = rows[0].shape
    if 0 in (B, W):
        return jnp.zeros((B, W), rows[0].dtype), jnp.zeros((B, W), jnp.float32)
    alike = _lib.vary_alike(*rows, *small)
    arrays = tuple(_lib.pad(x, STEP) for x in alike)
    out = jax.ShapeDtypeStruct(arrays[0].shape, rows[0].dtype)
    h, h_T = plgpu.kernel(
        functools.partial(kernel, **static),
        out_type=[out, jax.ShapeDtypeStruct(out.shape, jnp.float32)],
        grid=(B, out.shape[1] // STEP),
        grid_names=("sequences", "channels"),
        compiler_params=_lib.ROW_PARAMS,
        kernel_name=name,
    )(*arrays)
    return _lib.vary_alike(h[:, :W], h_T[:, :W], alike[0])[:2]
