"""Softmax over rows, with an optional mask; a row that keeps nothing is all zeros.

    y[r, n] = exp(scale * x[r, n] - top[r]) / sum_j exp(scale * x[r, j] - top[r])    over the kept j

    every warpgroup owns a ring of slots that TMA keeps full, each slot a chunk of a row:
        for each chunk: s = scale * x, -inf where masked; top = max(s); total = sum exp(s - top),
                        for each run of columns of its own, which never leaves its warp
        the runs of a row, in all the warpgroups that share it, exchange (top, total)
        for each chunk: y = exp(s - top) / total, into the slot it came from; TMA stores the slot;
                        once it is read, TMA loads into it what comes next

A row of one chunk for each warpgroup stays in registers between the two passes; one that fits the
ring is read from HBM once. Of a longer one the ring keeps the end, and only the beginning is read
again: the ring frees its slots in the order it filled them, whatever the row's length.
Backward: dx = scale * y * (dy - sum_n y * dy), in the same two passes over (y, dy).

Limits: Hopper; bfloat16, float16, float32; statistics in float32. Rows that do not start at
multiples of 16 bytes are padded first, in XLA, and a mask becomes int8 there.

Twin: triton_kernels/softmax.py.

Sources: the online pass is Milakov and Gimelshein's (arXiv:1805.02867), kept per run and merged
once.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import _lib

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
RING_BYTES = 56 * 1024  # a quarter of the shared memory that a block of threads can have


@dataclass(frozen=True)
class Config:
    """Tile sizes and resources of the kernels; beyond the last bit the result ignores them.

    block_m: rows a block of threads works at; warpgroups / block_m warpgroups share each.
    block_n: columns of a chunk, the part of a row that a warpgroup holds in registers.
    stages: slots in the ring of each warpgroup.
    warpgroups: warpgroups of a block of threads.
    programs: blocks for each multiprocessor, which then walk over the rows; 0: one for each block_m
        rows.
    """

    block_m: int = 4
    block_n: int = 4096
    stages: int = 6
    warpgroups: int = 4
    programs: int = 1

    def __post_init__(self) -> None:
        if self.block_m < 1 or self.warpgroups % self.block_m:
            raise ValueError(
                f"block_m: expected a divisor of {self.warpgroups} warpgroups, got {self.block_m}"
            )
        if self.block_n < 128 or self.block_n % 128:
            raise ValueError(f"block_n: expected a multiple of 128, got {self.block_n}")
        if not 1 <= self.stages <= 32 // self.warpgroups:
            raise ValueError(
                f"stages: expected 1 to {32 // self.warpgroups} (32 barriers of a kind), "
                f"got {self.stages}"
            )


def default_config(R: int, N: int, dtype: Any, which: str = "fwd") -> Config:
    """The Config for R rows of N columns; which: "fwd" or "bwd" (which holds two rows, not one)."""
    del R
    arrays = 1 if which == "fwd" else 2
    # 4 warpgroups leave a thread 128 registers: enough for 64 columns of one array in float32 and
    # what is made of them. A row that 4 warpgroups cannot hold so goes through in smaller chunks.
    warpgroups, most = 4, 8192 // arrays
    split = next((s for s in (1, 2, 4) if N <= s * most), warpgroups)
    if N > warpgroups * most or 2 * most * arrays * _lib.bits(dtype) // 8 > RING_BYTES:
        most //= 2
    block_n = _lib.row_chunk(N, split, most, dtype)
    stages = RING_BYTES // (block_n * arrays * _lib.bits(dtype) // 8)
    return Config(warpgroups // split, block_n, min(8, stages), warpgroups)


def _softmax_fwd_kernel(
    *refs: Any,
    R: int,
    N: int,
    scale: float,
    causal_offset: int | None,
    masked: bool,
    config: Config,
) -> None:
    if masked:
        x_gmem, mask_gmem, y_gmem, x_smem, mask_smem, stats_smem, full, met = refs
    else:
        x_gmem, y_gmem, x_smem, stats_smem, full, met = refs
    pieces, piece = x_smem.shape[2:]
    runs, layout = _lib.piece_tile(piece, x_smem.dtype)
    tiles = range(pieces // runs)
    split = config.warpgroups // config.block_m
    num_n = _lib.cdiv(N, split * config.block_n)
    # Loads of a row: each chunk once, then those again that the ring could not keep.
    dropped = max(0, num_n - config.stages)
    loads = num_n + dropped

    # --- 1. which tile
    wg = lax.axis_index("wg")
    group, part = lax.div(wg, split), lax.rem(wg, split)
    first = lax.axis_index("sm") * config.block_m + group
    stride = lax.axis_size("sm") * config.block_m
    trips = lax.div(R - first + stride - 1, stride)

    def barrier(q):
        return full.at[wg * config.stages + lax.rem(q, config.stages)]

    def tile(smem, q, i):
        return smem.at[wg, lax.rem(q, config.stages), pl.ds(i * runs, runs)]

    def start_of(ni):
        return (ni * split + part) * pieces

    def load(q):
        @pl.when(q < trips * loads)
        def _():
            slot = (wg, lax.rem(q, config.stages))
            row = first + lax.div(q, loads) * stride
            source = (row, pl.ds(start_of(lax.rem(lax.rem(q, loads), num_n)), pieces))
            plgpu.copy_gmem_to_smem(x_gmem.at[source], x_smem.at[slot], barrier(q))
            if masked:
                plgpu.copy_gmem_to_smem(mask_gmem.at[source], mask_smem.at[slot], barrier(q))

    def along(statistic):
        return plgpu.layout_cast(lax.broadcast_in_dim(statistic, (runs, piece), [0]), layout)

    def scores(q, ni, row):
        """scale * x of a chunk, -inf where it is masked or beyond the row. Tiles [runs, piece]"""
        limited = causal_offset is not None or N % (split * config.block_n)
        if limited:
            end = N if causal_offset is None else jnp.minimum(N, row + causal_offset + 1)
            end = end - (ni * split + part) * config.block_n
            run, within = (
                plgpu.broadcasted_iota(jnp.int32, (runs, piece), axis, layout=layout)
                for axis in (0, 1)
            )
            column = run * piece + within
        for i in tiles:
            s = plgpu.load(tile(x_smem, q, i), layout=layout).astype(jnp.float32)
            if scale != 1.0:
                s = s * scale
            if masked:
                s = jnp.where(plgpu.load(tile(mask_smem, q, i), layout=layout) != 0, s, -jnp.inf)
            if limited:
                s = jnp.where(column < end - i * runs * piece, s, -jnp.inf)
            yield s

    @pl.loop(0, jnp.minimum(config.stages, trips * loads))
    def _(q):
        load(q)

    @pl.loop(0, trips)
    def _(trip):
        row = first + trip * stride
        q0 = trip * loads

        # --- 2. main loop
        def accumulate(ni, top, total):
            plgpu.barrier_wait(barrier(q0 + ni))
            s = list(scores(q0 + ni, ni, row))
            top, old = jnp.maximum(top, functools.reduce(jnp.maximum, s).max(axis=1)), top  # [runs]
            base = jnp.where(top == -jnp.inf, 0.0, top)
            e = [jnp.exp(part - along(base)) for part in s]
            total = total * jnp.exp(old - base) + sum(e).sum(axis=1)
            return top, total, e

        def step(ni, carry):
            top, total, _ = accumulate(ni, *carry)

            @pl.when(ni < dropped)
            def _():
                plgpu.commit_smem()
                load(q0 + ni + config.stages)

            return top, total

        start = (
            plgpu.layout_cast(jnp.full((runs,), -jnp.inf, jnp.float32), layout.reduce(1)),
            plgpu.layout_cast(jnp.zeros((runs,), jnp.float32), layout.reduce(1)),
        )
        if num_n == 1:
            top, total, e = accumulate(0, *start)
        else:
            top, total = lax.fori_loop(0, num_n, step, start)

        # --- 3. epilogue
        # Two sets of statistics in turn: whoever writes one again has seen everyone read it.
        turn = lax.rem(trip, 2)
        stats_smem[turn, 0, wg] = top
        stats_smem[turn, 1, wg] = total
        plgpu.barrier_arrive(met.at[group])
        plgpu.barrier_wait(met.at[group])
        everyone = [(group * split + i, run) for i in range(split) for run in range(runs)]
        tops = [stats_smem[turn, 0, *one] for one in everyone]
        row_top = functools.reduce(jnp.maximum, tops)
        row_top = jnp.where(row_top == -jnp.inf, 0.0, row_top)
        row_sum = sum(
            stats_smem[turn, 1, *one] * jnp.exp(of - row_top)
            for one, of in zip(everyone, tops, strict=True)
        )
        factor = jnp.where(row_sum == 0.0, 0.0, 1.0 / row_sum)

        # --- 4. store
        def store(ni, y):
            q = q0 + dropped + ni
            for i, values in zip(tiles, y, strict=True):
                tile(x_smem, q, i)[...] = values.astype(x_smem.dtype)
            plgpu.commit_smem()
            _lib.store_row_chunk(
                x_smem.at[wg, lax.rem(q, config.stages)],
                y_gmem,
                row,
                start_of(lax.rem(dropped + ni, num_n)),
            )
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            load(q + config.stages)

        if num_n == 1:
            own = jnp.where(top == -jnp.inf, 0.0, top)
            factors = along(jnp.exp(own - row_top) * factor)
            store(0, [values * factors for values in e])
        else:

            @pl.loop(0, num_n)
            def _(ni):
                q = q0 + dropped + ni

                @pl.when(ni >= num_n - dropped)
                def _():
                    plgpu.barrier_wait(barrier(q))

                s = scores(q, lax.rem(dropped + ni, num_n), row)
                store(ni, [jnp.exp(values - row_top) * factor for values in s])

    plgpu.wait_smem_to_gmem(0)


def _softmax_bwd_kernel(
    y_gmem: Any,
    dy_gmem: Any,
    dx_gmem: Any,
    y_smem: Any,
    dy_smem: Any,
    stats_smem: Any,
    full: Any,
    met: Any,
    *,
    R: int,
    N: int,
    scale: float,
    config: Config,
) -> None:
    pieces, piece = y_smem.shape[2:]
    runs, layout = _lib.piece_tile(piece, y_smem.dtype)
    tiles = range(pieces // runs)
    split = config.warpgroups // config.block_m
    num_n = _lib.cdiv(N, split * config.block_n)
    dropped = max(0, num_n - config.stages)
    loads = num_n + dropped

    # --- 1. which tile
    wg = lax.axis_index("wg")
    group, part = lax.div(wg, split), lax.rem(wg, split)
    first = lax.axis_index("sm") * config.block_m + group
    stride = lax.axis_size("sm") * config.block_m
    trips = lax.div(R - first + stride - 1, stride)

    def barrier(q):
        return full.at[wg * config.stages + lax.rem(q, config.stages)]

    def tile(smem, q, i):
        return smem.at[wg, lax.rem(q, config.stages), pl.ds(i * runs, runs)]

    def start_of(ni):
        return (ni * split + part) * pieces

    def load(q):
        @pl.when(q < trips * loads)
        def _():
            slot = (wg, lax.rem(q, config.stages))
            row = first + lax.div(q, loads) * stride
            source = (row, pl.ds(start_of(lax.rem(lax.rem(q, loads), num_n)), pieces))
            plgpu.copy_gmem_to_smem(y_gmem.at[source], y_smem.at[slot], barrier(q))
            plgpu.copy_gmem_to_smem(dy_gmem.at[source], dy_smem.at[slot], barrier(q))

    def read(smem, q, i):
        return plgpu.load(tile(smem, q, i), layout=layout).astype(jnp.float32)

    @pl.loop(0, jnp.minimum(config.stages, trips * loads))
    def _(q):
        load(q)

    @pl.loop(0, trips)
    def _(trip):
        row = first + trip * stride
        q0 = trip * loads

        # --- 2. main loop
        def accumulate(ni, dot):
            q = q0 + ni
            plgpu.barrier_wait(barrier(q))
            for i in tiles:
                dot = dot + read(y_smem, q, i) * read(dy_smem, q, i)
            if dropped:

                @pl.when(ni < dropped)
                def _():
                    plgpu.commit_smem()
                    load(q + config.stages)

            return dot

        start = plgpu.layout_cast(jnp.zeros((runs, piece), jnp.float32), layout)
        dot = lax.fori_loop(0, num_n, accumulate, start).sum(axis=1)  # [runs]

        # --- 3. epilogue
        turn = lax.rem(trip, 2)
        stats_smem[turn, 0, wg] = dot
        plgpu.barrier_arrive(met.at[group])
        plgpu.barrier_wait(met.at[group])
        row_dot = sum(
            stats_smem[turn, 0, group * split + i, run] for i in range(split) for run in range(runs)
        )

        # --- 4. store
        @pl.loop(0, num_n)
        def _(ni):
            q = q0 + dropped + ni
            if dropped:

                @pl.when(ni >= num_n - dropped)
                def _():
                    plgpu.barrier_wait(barrier(q))

            for i in tiles:
                dx = read(y_smem, q, i) * (read(dy_smem, q, i) - row_dot)
                if scale != 1.0:
                    dx = dx * scale
                tile(dy_smem, q, i)[...] = dx.astype(dy_smem.dtype)
            plgpu.commit_smem()
            _lib.store_row_chunk(
                dy_smem.at[wg, lax.rem(q, config.stages)],
                dx_gmem,
                row,
                start_of(lax.rem(dropped + ni, num_n)),
            )
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            load(q + config.stages)

    plgpu.wait_smem_to_gmem(0)


def _launch(kernel: Any, name: str, arrays: tuple[jax.Array, ...], N: int, config: Config) -> Any:
    """Runs a kernel over rows in pieces; the first array gives the output's shape and dtype."""
    R, _, piece = arrays[0].shape
    runs, _ = _lib.piece_tile(piece, arrays[0].dtype)
    if config.block_n % (runs * piece):
        raise ValueError(
            f"block_n: expected a multiple of {runs * piece} (16 bytes for each lane of a "
            f"warpgroup), got {config.block_n}"
        )
    slots = (config.warpgroups, config.stages, config.block_n // piece, piece)
    y = plgpu.kernel(
        functools.partial(kernel, R=R, N=N, config=config),
        out_type=jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype),
        scratch_types=[
            *(plgpu.SMEM(slots, array.dtype) for array in arrays),
            plgpu.SMEM((2, 2, config.warpgroups, runs), jnp.float32),
            plgpu.Barrier(num_arrivals=len(arrays), num_barriers=config.warpgroups * config.stages),
            plgpu.Barrier(
                num_arrivals=config.warpgroups // config.block_m, num_barriers=config.block_m
            ),
        ],
        grid=(_lib.row_programs(R, config.block_m, config.programs),),
        grid_names=("sm",),
        num_threads=config.warpgroups,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        kernel_name=name,
    )(*arrays)
    return y.reshape(R, -1)[:, :N]


def softmax_fwd(
    x: jax.Array,
    mask: jax.Array | None = None,
    *,
    scale: float = 1.0,
    causal_offset: int | None = None,
    config: Config | None = None,
) -> tuple[jax.Array, tuple[jax.Array]]:
    """As `softmax`, and what the backward needs: res = (y,)."""
    R, N = x.shape
    if 0 in (R, N):
        y = jnp.zeros((R, N), x.dtype)
        return y, (y,)
    arrays = (x,) if mask is None else (x, mask.astype(jnp.int8))
    kernel = functools.partial(
        _softmax_fwd_kernel, scale=scale, causal_offset=causal_offset, masked=mask is not None
    )
    # A mask takes room in the ring, and a causal limit in registers, as dy does in the backward.
    plain = mask is None and causal_offset is None
    config = config or default_config(R, N, x.dtype, "fwd" if plain else "bwd")
    y = _launch(kernel, "softmax_fwd_kernel", _lib.row_pieces(*arrays), N, config)
    return y, (y,)


def softmax_bwd(
    res: tuple[jax.Array],
    dy: jax.Array,
    *,
    scale: float = 1.0,
    config: Config | None = None,
) -> tuple[jax.Array]:
    """Gradient of `softmax`.

    res: (y[R, N],) as softmax_fwd returns it.
    dy: [R, N], the cotangent of y; another dtype is rounded to y's.

    Returns (dx[R, N],) in y's dtype: zero wherever y is.
    """
    (y,) = res
    R, N = y.shape
    if 0 in (R, N):
        return (jnp.zeros((R, N), y.dtype),)
    kernel = functools.partial(_softmax_bwd_kernel, scale=scale)
    config = config or default_config(R, N, y.dtype, "bwd")
    arrays = _lib.row_pieces(y, dy.astype(y.dtype))
    return (_launch(kernel, "softmax_bwd_kernel", arrays, N, config),)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _softmax(x: Any, mask: Any, scale: float, causal_offset: int | None, config: Any) -> jax.Array:
    return softmax_fwd(x, mask, scale=scale, causal_offset=causal_offset, config=config)[0]


def _softmax_fwd(x: Any, mask: Any, scale: float, causal_offset: int | None, config: Any) -> Any:
    return softmax_fwd(x, mask, scale=scale, causal_offset=causal_offset, config=config)


def _softmax_bwd(scale: float, causal_offset: int | None, config: Any, res: Any, dy: Any) -> Any:
    del causal_offset
    return (*softmax_bwd(res, dy, scale=scale, config=config), None)


_softmax.defvjp(_softmax_fwd, _softmax_bwd)


def softmax(
    x: jax.Array,
    mask: jax.Array | None = None,
    *,
    scale: float = 1.0,
    causal_offset: int | None = None,
    config: Config | None = None,
) -> jax.Array:
    """Softmax of scale * x along rows. Differentiable in x.

    x: [R, N], bfloat16, float16 or float32.
    mask: [R, N] bool, True = keep, or None. What x holds where it is False never matters.
    scale: multiplies x first; may be negative.
    causal_offset: row r keeps the columns n <= r + causal_offset; together with a mask, both hold.
    config: tile sizes, of the forward and the backward; None takes default_config for each.

    Returns y[R, N] in x's dtype. A row that keeps nothing is all zeros; one that keeps a NaN or
    +inf (of scale * x) is all NaN.

    Raises ValueError for a wrong rank or size and TypeError for a wrong dtype, config or keyword.
    """
    _lib.check_array("x", x, ("R", "N"), DTYPES)
    if mask is not None:
        _lib.check_array("mask", mask, tuple(x.shape), (jnp.bool_,))
    _lib.check_static("scale", scale, (float, int))
    if causal_offset is not None:
        _lib.check_static("causal_offset", causal_offset, (int,))
    _lib.check_config(config, Config)
    return _softmax(x, mask, float(scale), causal_offset, config)
