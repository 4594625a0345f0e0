"""Softmax over rows, with an optional mask; a row that keeps nothing is all zeros.

    y[r, n] = exp(scale * x[r, n] - top[r]) / sum_j exp(scale * x[r, j] - top[r])    over the kept j

    one block of threads for block_m rows; each warpgroup has slots that TMA fills with chunks:
        for each chunk: s = scale * x, -inf where masked; top = max(s); total = sum exp(s - top),
                        for each run of columns of its own, which never leaves its warp
        the runs of a row, in all the warpgroups that share it, exchange (top, total)
        for each chunk: y = exp(s - top) / total, into the slot it came from; TMA stores the slot

A row of one chunk for each warpgroup stays in registers between the two passes. Of a row longer
than the slots, they keep the end, and only the beginning is read again: slots become free in the
order they were filled, so they form a ring whatever the row's length.
Backward: dx = scale * y * (dy - sum_n y * dy), in the same two passes over (y, dy).

Many small blocks beat one large persistent block for each multiprocessor here: multiprocessors
differ in speed, and the hardware hands the next row to whichever is free.

Limits: Hopper; bfloat16, float16, float32; statistics in float32. Rows of a number of columns that
64 does not divide are padded first, in XLA, and a mask becomes int8 there.

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
SHARED_BYTES = 224 * 1024  # of the 227 KB that a block of threads can have, for the slots


@dataclass(frozen=True)
class Config:
    """Tile sizes and resources of the kernels; beyond the last bit the result ignores them.

    block_m: rows of a block of threads; warpgroups / block_m warpgroups share each.
    block_n: columns of a chunk, the part of a row that a warpgroup holds in registers.
    stages: slots of each warpgroup; more than a row has chunks are of no use.
    warpgroups: warpgroups of a block of threads.
    """

    block_m: int = 1
    block_n: int = 4096
    stages: int = 1
    warpgroups: int = 1

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
    """The Config for R rows of N columns; which: "fwd" or "bwd" (which reads two arrays)."""
    del R
    bytes_a_column = _lib.bits(dtype) // 8 * (1 if which == "fwd" else 2)
    # 64 columns a thread, in float32, leave 5 warpgroups the registers of a multiprocessor.
    if N <= 8192:
        return Config(1, _lib.row_chunk(N, 1, 8192, dtype), 1, 1)
    # Two chunks of 32 columns a thread: computed twice, but twice as many blocks fit, and those
    # that compute have others that load beside them.
    split = 2 if N <= 16384 else 4
    block_n = _lib.row_chunk(N, 2 * split, 4096, dtype)
    if 2 * split * block_n >= N and 2 * split * block_n * bytes_a_column <= SHARED_BYTES:
        return Config(1, block_n, 2, split)
    # What one block can hold of the row, in slots of 8 KB for each warpgroup
    block_n = _lib.row_chunk(N, 4, 8192 // bytes_a_column, dtype)
    return Config(1, block_n, min(8, SHARED_BYTES // (4 * block_n * bytes_a_column)), 4)


def _softmax_fwd_kernel(
    *refs: Any,
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
    # Chunks that the slots cannot keep until the second pass: those are loaded twice.
    dropped = max(0, num_n - config.stages)

    # --- 1. which tile
    wg = lax.axis_index("wg")
    group, part = _lib.row_share(wg, config.block_m, config.warpgroups)
    # Beyond the last row TMA loads zeros and stores nothing.
    row = lax.axis_index("rows") * config.block_m + group

    def slot(q):
        return wg, lax.rem(q, config.stages)

    def full_at(q):
        return full.at[wg * config.stages + lax.rem(q, config.stages)]

    def start_of(q):
        return (lax.rem(q, num_n) * split + part) * pieces

    def load(q):
        source = (row, pl.ds(start_of(q), pieces))
        plgpu.copy_gmem_to_smem(x_gmem.at[source], x_smem.at[slot(q)], full_at(q))
        if masked:
            plgpu.copy_gmem_to_smem(mask_gmem.at[source], mask_smem.at[slot(q)], full_at(q))

    def tile(smem, q, i):
        return smem.at[*slot(q), pl.ds(i * runs, runs)]

    def along(statistic):
        return plgpu.layout_cast(lax.broadcast_in_dim(statistic, (runs, piece), [0]), layout)

    def scores(q, limited):
        """scale * x of a chunk, -inf where it is masked or beyond the row. Tiles [runs, piece]"""
        if limited:
            end = N if causal_offset is None else jnp.minimum(N, row + causal_offset + 1)
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
                s = jnp.where(column < end - (start_of(q) + i * runs) * piece, s, -jnp.inf)
            yield s

    # --- 2. main loop
    for q in range(min(config.stages, num_n)):
        load(q)

    def accumulate(q, carry, limited):
        top, total = carry
        plgpu.barrier_wait(full_at(q))
        s = list(scores(q, limited))
        top, old = jnp.maximum(top, functools.reduce(jnp.maximum, s).max(axis=1)), top  # [runs]
        base = jnp.where(top == -jnp.inf, 0.0, top)
        e = [jnp.exp(values - along(base)) for values in s]
        total = total * jnp.exp(old - base) + sum(e).sum(axis=1)
        return (top, total), e

    def step(q, carry):
        carry, _ = accumulate(q, carry, causal_offset is not None)

        @pl.when(q < dropped)
        def _():
            plgpu.commit_smem()
            load(q + config.stages)

        return carry

    start = tuple(
        plgpu.layout_cast(jnp.full((runs,), value, jnp.float32), layout.reduce(1))
        for value in (-jnp.inf, 0.0)
    )
    # Only the last chunk can reach beyond the row.
    before = lax.fori_loop(0, num_n - 1, step, start) if num_n > 1 else start
    limited = causal_offset is not None or N % (split * config.block_n) != 0
    (top, total), e = accumulate(jnp.int32(num_n - 1), before, limited)

    # --- 3. epilogue
    stats_smem[0, wg] = top
    stats_smem[1, wg] = total
    plgpu.barrier_arrive(met.at[group])
    plgpu.barrier_wait(met.at[group])
    everyone = [(group * split + i, run) for i in range(split) for run in range(runs)]
    tops = [stats_smem[0, *one] for one in everyone]
    row_top = functools.reduce(jnp.maximum, tops)
    row_top = jnp.where(row_top == -jnp.inf, 0.0, row_top)
    row_sum = sum(
        stats_smem[1, *one] * jnp.exp(of - row_top) for one, of in zip(everyone, tops, strict=True)
    )
    factor = jnp.where(row_sum == 0.0, 0.0, 1.0 / row_sum)

    # --- 4. store
    def store(q, y):
        for i, values in zip(tiles, y, strict=True):
            tile(x_smem, q, i)[...] = values.astype(x_smem.dtype)
        plgpu.commit_smem()
        _lib.store_row_chunk(x_smem.at[slot(q)], y_gmem, row, start_of(q))

    if num_n == 1:
        own = jnp.where(top == -jnp.inf, 0.0, top)
        factors = along(jnp.exp(own - row_top) * factor)
        store(jnp.int32(0), [values * factors for values in e])
    else:

        @pl.loop(dropped, num_n + dropped)
        def _(q):
            @pl.when(q >= num_n)
            def _():
                plgpu.barrier_wait(full_at(q))

            s = scores(q, causal_offset is not None)
            store(q, [jnp.exp(values - row_top) * factor for values in s])

            @pl.when(q + config.stages < num_n + dropped)
            def _():
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                load(q + config.stages)

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

    # --- 1. which tile
    wg = lax.axis_index("wg")
    group, part = _lib.row_share(wg, config.block_m, config.warpgroups)
    # Beyond the last row TMA loads zeros and stores nothing.
    row = lax.axis_index("rows") * config.block_m + group

    def slot(q):
        return wg, lax.rem(q, config.stages)

    def full_at(q):
        return full.at[wg * config.stages + lax.rem(q, config.stages)]

    def start_of(q):
        return (lax.rem(q, num_n) * split + part) * pieces

    def load(q):
        source = (row, pl.ds(start_of(q), pieces))
        plgpu.copy_gmem_to_smem(y_gmem.at[source], y_smem.at[slot(q)], full_at(q))
        plgpu.copy_gmem_to_smem(dy_gmem.at[source], dy_smem.at[slot(q)], full_at(q))

    def tile(smem, q, i):
        return smem.at[*slot(q), pl.ds(i * runs, runs)]

    def read(smem, q, i):
        return plgpu.load(tile(smem, q, i), layout=layout).astype(jnp.float32)

    # --- 2. main loop
    for q in range(min(config.stages, num_n)):
        load(q)

    def accumulate(q, dot):
        plgpu.barrier_wait(full_at(q))
        for i in tiles:
            dot = dot + read(y_smem, q, i) * read(dy_smem, q, i)
        if dropped:

            @pl.when(q < dropped)
            def _():
                plgpu.commit_smem()
                load(q + config.stages)

        return dot

    start = plgpu.layout_cast(jnp.zeros((runs, piece), jnp.float32), layout)
    dot = lax.fori_loop(0, num_n, accumulate, start).sum(axis=1)  # [runs]

    # --- 3. epilogue
    stats_smem[0, wg] = dot
    plgpu.barrier_arrive(met.at[group])
    plgpu.barrier_wait(met.at[group])
    row_dot = sum(
        stats_smem[0, group * split + i, run] for i in range(split) for run in range(runs)
    )

    # --- 4. store
    @pl.loop(dropped, num_n + dropped)
    def _(q):
        if dropped:

            @pl.when(q >= num_n)
            def _():
                plgpu.barrier_wait(full_at(q))

        for i in tiles:
            dx = read(y_smem, q, i) * (read(dy_smem, q, i) - row_dot)
            if scale != 1.0:
                dx = dx * scale
            tile(dy_smem, q, i)[...] = dx.astype(dy_smem.dtype)
        plgpu.commit_smem()
        _lib.store_row_chunk(dy_smem.at[slot(q)], dx_gmem, row, start_of(q))
        if dropped:

            @pl.when(q + config.stages < num_n + dropped)
            def _():
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
        functools.partial(kernel, N=N, config=config),
        out_type=jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype),
        scratch_types=[
            *(plgpu.SMEM(slots, array.dtype) for array in arrays),
            plgpu.SMEM((2, config.warpgroups, runs), jnp.float32),
            plgpu.Barrier(num_arrivals=len(arrays), num_barriers=config.warpgroups * config.stages),
            plgpu.Barrier(
                num_arrivals=config.warpgroups // config.block_m, num_barriers=config.block_m
            ),
        ],
        grid=(_lib.cdiv(R, config.block_m),),
        grid_names=("rows",),
        num_threads=config.warpgroups,
        thread_name="wg",
        compiler_params=_lib.ROW_PARAMS,
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
