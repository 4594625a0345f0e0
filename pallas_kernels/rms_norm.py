"""Root-mean-square normalisation of rows, with an optional residual added first.

    h = round(x + residual)      rstd[r] = (mean_n h[r, n]^2 + eps)^(-1/2)
    y = h * rstd * (w + w_offset)

    one block of threads for block_m rows; w comes to shared memory, and each warpgroup has slots
    that TMA fills with chunks of its row:
        for each chunk: squares += h * h
        the runs of a row, in all the warpgroups that share it, exchange their squares
        for each chunk: h and y, into the slots they came from; TMA stores the slots

    Backward, with xh = h * rstd and g = dy * (w + w_offset):
        dx = rstd * (g - xh * mean_n(g * xh)) + dh          dw = sum_r dy * xh
    persistent blocks, whose slots form a ring that TMA keeps full with the rows to come:
        the same two passes over (h, dy): mean of g * xh; then dx, and dw += dy * xh in registers
    the dw of the rows that a block saw to a workspace [P, N], one partial sum for each of the
    block_m rows it works at; a second kernel adds those P rows in a fixed order

Of a row longer than its slots, they keep the end, and only the beginning is read again.

Limits: Hopper; bfloat16, float16, float32; rows of up to 32768 columns (what the registers of a
multiprocessor hold of dw beside the rest); statistics and dw in float32. Rows of a number of
columns that 64 does not divide are padded first, in XLA.

Twin: triton_kernels/rms_norm.py.

Sources: Zhang and Sennrich (arXiv:1910.07467).
"""

import dataclasses
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
SHARED_BYTES = 224 * 1024  # of the 227 KB that a block can have, for w and the slots
MOST_COLUMNS = 32768  # 4 warpgroups: 64 of the 128 registers of a thread for its part of dw
DW_ROWS, DW_COLUMNS = 64, 128  # tile of the kernel that adds the partial sums


@dataclass(frozen=True)
class Config:
    """Tile sizes and resources of the kernels; beyond the last bits the result ignores them.

    block_m: rows a block of threads works at; warpgroups / block_m warpgroups share each.
    block_n: columns of a chunk, the part of a row in one slot.
    stages: slots of each warpgroup; in the forward no more than a row has chunks are of use.
    warpgroups: warpgroups of a block of threads.
    programs: blocks for each multiprocessor, which walk over the rows in the backward; the forward
        has one block for block_m rows.
    """

    block_m: int = 4
    block_n: int = 4096
    stages: int = 1
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
        if self.programs < 1:
            raise ValueError(f"programs: expected at least 1, got {self.programs}")


def default_config(R: int, N: int, dtype: Any, which: str = "fwd") -> Config:
    """The Config for R rows of N columns; which: "fwd" or "bwd", + "_residual" with a residual."""
    del R
    return _config(N, dtype, dtype, which)


def _chosen(R: int, N: int, dtype: Any, w_dtype: Any, which: str) -> Config:
    # A float32 w takes twice the room in shared memory that the ladder counts on.
    same = w_dtype == dtype
    return default_config(R, N, dtype, which) if same else _config(N, dtype, w_dtype, which)


def _config(N: int, dtype: Any, w_dtype: Any, which: str) -> Config:
    residual = which.endswith("_residual")
    if which.startswith("fwd"):
        # Rows that share a block share w. More bytes for a row want fewer rows, and more
        # warpgroups for each, so that several blocks still fit a multiprocessor.
        if N <= 4096:
            block_m, split, num_n = 4, 1, 1
        elif N <= 8192:
            block_m, split, num_n = (1, 4, 1) if residual else (2, 1, 1)
        else:
            block_m, split, num_n = (1, 4, 2) if residual else (2, 2, 2)
        arrays, programs, most = 1 + residual, 1, num_n
    else:
        # Two blocks for short rows: one computes while the other waits for its row to meet.
        split, programs = (2, 2) if N <= 4096 else (4, 1)
        block_m, num_n = 1, 1 if N <= 16384 else 2
        arrays, most = 2 + residual, 4
    while True:
        block_n = _lib.row_chunk(N, split * num_n, MOST_COLUMNS, dtype)
        w_bytes = split * num_n * block_n * _lib.bits(w_dtype) // 8
        slot_bytes = block_n * arrays * _lib.bits(dtype) // 8
        stages = (SHARED_BYTES // programs - w_bytes) // (block_m * split * slot_bytes)
        if stages >= 1 or block_n * _lib.bits(dtype) <= 16384:
            return Config(block_m, block_n, max(1, min(most, stages)), block_m * split, programs)
        # float32: half the chunk, or half the rows
        block_m, num_n = (block_m // 2, num_n) if block_m > 1 else (block_m, 2 * num_n)


def _rms_norm_fwd_kernel(
    *refs: Any,
    R: int,
    N: int,
    eps: float,
    w_offset: float,
    cast_before_weight: bool,
    residual: bool,
    config: Config,
) -> None:
    if residual:
        x_gmem, residual_gmem, w_gmem, rstd_gmem, y_gmem, h_gmem, *scratch = refs
        x_smem, residual_smem, w_smem, stats_smem, full, met, w_full = scratch
        y_smem = residual_smem
    else:
        x_gmem, w_gmem, rstd_gmem, y_gmem, x_smem, w_smem, stats_smem, full, met, w_full = refs
        y_smem = x_smem
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
    row = lax.axis_index("sm") * config.block_m + group

    def slot(q):
        return wg, lax.rem(q, config.stages)

    def full_at(q):
        return full.at[wg * config.stages + lax.rem(q, config.stages)]

    def start_of(q, i):
        return (lax.rem(q, num_n) * split + part) * pieces + i * runs

    def load(q):
        source = (row, pl.ds(start_of(q, 0), pieces))
        plgpu.copy_gmem_to_smem(x_gmem.at[source], x_smem.at[slot(q)], full_at(q))
        if residual:
            plgpu.copy_gmem_to_smem(residual_gmem.at[source], residual_smem.at[slot(q)], full_at(q))

    def read(smem, q, i):
        tile = smem.at[*slot(q), pl.ds(i * runs, runs)]
        return plgpu.load(tile, layout=layout).astype(jnp.float32)

    def read_h(q, i):
        h = read(x_smem, q, i)
        if residual:
            h = (h + read(residual_smem, q, i)).astype(x_smem.dtype).astype(jnp.float32)
        return h

    def write(smem, q, i, value):
        smem[*slot(q), pl.ds(i * runs, runs)] = value.astype(smem.dtype)

    # --- 2. main loop
    for q in range(min(config.stages, num_n)):
        load(q)
    _load_weight(w_gmem, w_smem, w_full, pieces)

    def accumulate(q, squares):
        plgpu.barrier_wait(full_at(q))
        for i in tiles:
            h = read_h(q, i)
            squares = squares + h * h
        if dropped:

            @pl.when(q < dropped)
            def _():
                plgpu.commit_smem()
                load(q + config.stages)

        return squares

    zero = plgpu.layout_cast(jnp.zeros((runs, piece), jnp.float32), layout)
    squares = lax.fori_loop(0, num_n, accumulate, zero).sum(axis=1)  # [runs]

    # --- 3. epilogue
    stats_smem[0, wg] = squares
    plgpu.barrier_arrive(met.at[group])
    plgpu.barrier_wait(met.at[group])
    total = sum(stats_smem[0, group * split + i, run] for i in range(split) for run in range(runs))
    rstd = lax.rsqrt(total * (1.0 / N) + eps)

    @pl.when(jnp.logical_and(part == 0, row < R))
    def _():
        rstd_gmem[row] = rstd

    # --- 4. store
    plgpu.barrier_wait(w_full)

    @pl.loop(dropped, num_n + dropped)
    def _(q):
        if dropped:

            @pl.when(q >= num_n)
            def _():
                plgpu.barrier_wait(full_at(q))

        for i in tiles:
            h = read_h(q, i)
            xh = h * rstd
            if cast_before_weight:
                xh = xh.astype(x_smem.dtype).astype(jnp.float32)
            if residual:
                write(x_smem, q, i, h)
            write(y_smem, q, i, xh * _weight(w_smem, start_of(q, i), runs, layout, w_offset))
        plgpu.commit_smem()
        _lib.store_row_chunk(y_smem.at[slot(q)], y_gmem, row, start_of(q, 0))
        if residual:
            _lib.store_row_chunk(x_smem.at[slot(q)], h_gmem, row, start_of(q, 0))
        if dropped:

            @pl.when(q + config.stages < num_n + dropped)
            def _():
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                load(q + config.stages)

    plgpu.wait_smem_to_gmem(0)


def _load_weight(w_gmem: Any, w_smem: Any, w_full: Any, pieces: int) -> None:
    """Brings w to shared memory, once for the block, in chunks that one TMA copy can take."""

    @pl.when(lax.axis_index("wg") == 0)
    def _():
        @pl.loop(0, w_smem.shape[0] // pieces)
        def _(i):
            chunk = pl.ds(i * pieces, pieces)
            plgpu.copy_gmem_to_smem(w_gmem.at[chunk], w_smem.at[chunk], w_full)


def _weight(w_ref: Any, start: Any, runs: int, layout: Any, w_offset: float) -> Any:
    """w + w_offset for one tile. [runs, piece]"""
    w = plgpu.load(w_ref.at[pl.ds(start, runs)], layout=layout, optimized=False)
    w = w.astype(jnp.float32)
    return w if w_offset == 0.0 else w + w_offset


def _rms_norm_bwd_kernel(
    *refs: Any, R: int, N: int, w_offset: float, residual: bool, config: Config
) -> None:
    if residual:
        h_gmem, dy_gmem, dh_gmem, w_gmem, rstd_gmem, dx_gmem, dw_gmem, *scratch = refs
        h_smem, dy_smem, dh_smem, w_smem, stats_smem, full, met, w_full = scratch
        copies = ((h_gmem, h_smem), (dy_gmem, dy_smem), (dh_gmem, dh_smem))
    else:
        h_gmem, dy_gmem, w_gmem, rstd_gmem, dx_gmem, dw_gmem, *scratch = refs
        h_smem, dy_smem, w_smem, stats_smem, full, met, w_full = scratch
        copies = ((h_gmem, h_smem), (dy_gmem, dy_smem))
    pieces, piece = h_smem.shape[2:]
    runs, layout = _lib.piece_tile(piece, h_smem.dtype)
    tiles = range(pieces // runs)
    split = config.warpgroups // config.block_m
    num_n = _lib.cdiv(N, split * config.block_n)
    dropped = max(0, num_n - config.stages)
    loads = num_n + dropped

    # --- 1. which tile
    wg = lax.axis_index("wg")
    group, part = _lib.row_share(wg, config.block_m, config.warpgroups)
    first = lax.axis_index("sm") * config.block_m + group
    stride = lax.axis_size("sm") * config.block_m
    trips = lax.div(R - first + stride - 1, stride)

    def barrier(q):
        return full.at[wg * config.stages + lax.rem(q, config.stages)]

    def start_of(ni, i):
        return (ni * split + part) * pieces + i * runs

    def read(smem, q, i):
        slot = smem.at[wg, lax.rem(q, config.stages), pl.ds(i * runs, runs)]
        return plgpu.load(slot, layout=layout).astype(jnp.float32)

    def load(q):
        @pl.when(q < trips * loads)
        def _():
            row = first + lax.div(q, loads) * stride
            source = (row, pl.ds(start_of(lax.rem(lax.rem(q, loads), num_n), 0), pieces))
            for gmem, smem in copies:
                slot = smem.at[wg, lax.rem(q, config.stages)]
                plgpu.copy_gmem_to_smem(gmem.at[source], slot, barrier(q))

    # A slot is loaded again once TMA has read it. Where there is one to spare, that is the slot of
    # the store before the last, so that nobody waits; for that, every chunk must store something.
    lag = int(config.stages > num_n and (num_n * split - 1) * pieces < dx_gmem.shape[1])

    @pl.loop(0, config.stages - lag)
    def _(q):
        load(q)

    _load_weight(w_gmem, w_smem, w_full, pieces)
    plgpu.barrier_wait(w_full)

    zero = plgpu.layout_cast(jnp.zeros((runs, piece), jnp.float32), layout)

    def body(trip, dw):
        row = first + trip * stride
        q0 = trip * loads
        rstd = rstd_gmem[row]

        # --- 2. main loop
        def accumulate(ni, dot):
            q = q0 + ni
            plgpu.barrier_wait(barrier(q))
            for i in tiles:
                g = read(dy_smem, q, i) * _weight(w_smem, start_of(ni, i), runs, layout, w_offset)
                dot = dot + g * read(h_smem, q, i)
            if dropped:

                @pl.when(ni < dropped)
                def _():
                    plgpu.commit_smem()
                    load(q + config.stages)

            return dot

        dot = lax.fori_loop(0, num_n, accumulate, zero).sum(axis=1)  # [runs]

        # --- 3. epilogue
        turn = lax.rem(trip, 2)
        stats_smem[turn, wg] = dot
        plgpu.barrier_arrive(met.at[group])
        plgpu.barrier_wait(met.at[group])
        total = sum(
            stats_smem[turn, group * split + i, run] for i in range(split) for run in range(runs)
        )
        mean = total * rstd * (1.0 / N)

        # --- 4. store
        dw = list(dw)
        for n in range(dropped, loads):
            q, ni = q0 + n, n % num_n
            if n >= num_n:
                plgpu.barrier_wait(barrier(q))
            for i in tiles:
                xh, dy = read(h_smem, q, i) * rstd, read(dy_smem, q, i)
                # Added here and now: LLVM would keep the products of all chunks for later.
                at = ni * len(tiles) + i
                dw[at] = lax.optimization_barrier(dw[at] + dy * xh)
                g = dy * _weight(w_smem, start_of(ni, i), runs, layout, w_offset)
                dx = rstd * (g - xh * mean)
                if residual:
                    dx = dx + read(dh_smem, q, i)
                slot = (wg, lax.rem(q, config.stages), pl.ds(i * runs, runs))
                dy_smem[slot] = dx.astype(dy_smem.dtype)
            plgpu.commit_smem()
            slot = dy_smem.at[wg, lax.rem(q, config.stages)]
            _lib.store_row_chunk(slot, dx_gmem, row, start_of(ni, 0))
            plgpu.wait_smem_to_gmem(lag, wait_read_only=True)
            load(q + config.stages - lag)
        return tuple(dw)

    dw = lax.fori_loop(0, trips, body, (zero,) * (num_n * len(tiles)))
    for ni in range(num_n):
        for i in tiles:
            dw_gmem[first, pl.ds(start_of(ni, i), runs)] = dw[ni * len(tiles) + i]
    plgpu.wait_smem_to_gmem(0)


def _rms_norm_dw_kernel(partial_gmem: Any, dw_gmem: Any) -> None:
    # --- 1. which tile
    columns = lax.axis_index("columns")
    layout = plgpu.Layout.WG_STRIDED((DW_COLUMNS,), vec_size=1)

    # --- 2. main loop
    def add_rows(_, partial_smem, dw):
        for row in range(DW_ROWS):
            dw = dw + plgpu.load(partial_smem.at[row], layout=layout)
        plgpu.commit_smem()
        return dw

    dw = plgpu.emit_pipeline(
        add_rows,
        grid=(_lib.cdiv(partial_gmem.shape[0], DW_ROWS),),
        in_specs=[plgpu.BlockSpec((DW_ROWS, DW_COLUMNS), lambda i: (i, columns))],
        max_concurrent_steps=5,
        init_carry=plgpu.layout_cast(jnp.zeros((DW_COLUMNS,), jnp.float32), layout),
    )(partial_gmem)

    # --- 3. epilogue: nothing, the sum is in float32

    # --- 4. store
    dw_gmem[pl.ds(columns * DW_COLUMNS, DW_COLUMNS)] = dw


def _launch(
    kernel: Any,
    name: str,
    blocks: int,
    rows: tuple[jax.Array, ...],
    small: tuple[jax.Array, ...],
    out_type: Any,
    config: Config,
) -> Any:
    """Runs a kernel over rows in pieces; small: w in pieces, and what else is not rows."""
    w, piece = small[0], rows[0].shape[2]
    runs, _ = _lib.piece_tile(piece, rows[0].dtype)
    split = config.warpgroups // config.block_m
    # With 64 registers of a thread for dw, the barriers keep the compiler from mixing tiles.
    crowded = len(small) > 1 and w.size > split * config.block_n
    params = dataclasses.replace(_lib.ROW_PARAMS, unsafe_no_auto_barriers=not crowded)
    slots = (config.warpgroups, config.stages, config.block_n // piece, piece)
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=[
            *(plgpu.SMEM(slots, array.dtype) for array in rows),
            plgpu.SMEM(w.shape, w.dtype),
            plgpu.SMEM((2, config.warpgroups, runs), jnp.float32),
            plgpu.Barrier(num_arrivals=len(rows), num_barriers=config.warpgroups * config.stages),
            plgpu.Barrier(num_arrivals=split, num_barriers=config.block_m),
            plgpu.Barrier(num_arrivals=w.size // config.block_n),
        ],
        grid=(blocks,),
        grid_names=("sm",),
        num_threads=config.warpgroups,
        thread_name="wg",
        compiler_params=params,
        kernel_name=name,
    )(*rows, *small)


def _in_pieces(w: jax.Array, rows: tuple[jax.Array, ...], config: Config) -> tuple[Any, ...]:
    """The rows in pieces, and w with zeros up to the end of the last chunk, in pieces too."""
    *rows, w = _lib.row_pieces(*rows, w)
    piece = rows[0].shape[2]
    runs, _ = _lib.piece_tile(piece, rows[0].dtype)
    if config.block_n % (runs * piece):
        raise ValueError(
            f"block_n: expected a multiple of {runs * piece} (16 bytes for each lane of a "
            f"warpgroup), got {config.block_n}"
        )
    chunk = config.warpgroups // config.block_m * config.block_n // piece
    return tuple(rows), _lib.pad(w, chunk, piece)


def rms_norm_fwd(
    x: jax.Array,
    w: jax.Array,
    residual: jax.Array | None = None,
    *,
    eps: float = 1e-6,
    w_offset: float = 0.0,
    cast_before_weight: bool = False,
    config: Config | None = None,
) -> tuple[Any, tuple[jax.Array, jax.Array, jax.Array]]:
    """As `rms_norm`, and what the backward needs: res = (h, w, rstd[R] in float32)."""
    R, N = x.shape
    if 0 in (R, N):
        rstd = jnp.full((R,), jnp.float32(eps) ** -0.5)
        return (x if residual is None else (x, x)), (x, w, rstd)
    which = "fwd" if residual is None else "fwd_residual"
    config = config or _chosen(R, N, x.dtype, w.dtype, which)
    kernel = functools.partial(
        _rms_norm_fwd_kernel,
        R=R,
        N=N,
        eps=eps,
        w_offset=w_offset,
        cast_before_weight=cast_before_weight,
        residual=residual is not None,
        config=config,
    )
    rows, w_row = _in_pieces(w, (x,) if residual is None else (x, residual), config)
    out = jax.ShapeDtypeStruct(rows[0].shape, x.dtype)
    out_type = [jax.ShapeDtypeStruct((R,), jnp.float32)] + [out] * len(rows)
    blocks = _lib.cdiv(R, config.block_m)
    rstd, *out = _launch(kernel, "rms_norm_fwd_kernel", blocks, rows, (w_row,), out_type, config)
    y, *h = (array.reshape(R, -1)[:, :N] for array in out)
    return ((y, h[0]), (h[0], w, rstd)) if h else (y, (x, w, rstd))


def rms_norm_bwd(
    res: tuple[jax.Array, jax.Array, jax.Array],
    dy: jax.Array,
    dh: jax.Array | None = None,
    *,
    w_offset: float = 0.0,
    cast_before_weight: bool = False,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of `rms_norm`.

    res: (h[R, N], w[N], rstd[R]) as rms_norm_fwd returns it.
    dy, dh: [R, N], the cotangents of y and h (None: zero); another dtype is rounded to h's.
    cast_before_weight: changes nothing, the gradient takes that rounding for the identity.

    Returns (dx[R, N] in h's dtype, also the gradient of residual; dw[N] in float32).
    """
    del cast_before_weight
    h, w, rstd = res
    R, N = h.shape
    if 0 in (R, N):
        return jnp.zeros((R, N), h.dtype), jnp.zeros((N,), jnp.float32)
    which = "bwd" if dh is None else "bwd_residual"
    config = config or _chosen(R, N, h.dtype, w.dtype, which)
    kernel = functools.partial(
        _rms_norm_bwd_kernel, R=R, N=N, w_offset=w_offset, residual=dh is not None, config=config
    )
    cotangents = (dy,) if dh is None else (dy, dh)
    rows, w_row = _in_pieces(w, (h, *(array.astype(h.dtype) for array in cotangents)), config)
    pieces, piece = w_row.shape
    blocks = min(_lib.cdiv(R, config.block_m), config.programs * _lib.num_sms())
    partial = jax.ShapeDtypeStruct((blocks * config.block_m, pieces, piece), jnp.float32)
    dx, partial = _launch(
        kernel,
        "rms_norm_bwd_kernel",
        blocks,
        rows,
        (w_row, rstd),
        [jax.ShapeDtypeStruct(rows[0].shape, h.dtype), partial],
        config,
    )
    dw = plgpu.kernel(
        _rms_norm_dw_kernel,
        out_type=jax.ShapeDtypeStruct((pieces * piece,), jnp.float32),
        grid=(pieces * piece // DW_COLUMNS,),
        grid_names=("columns",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="rms_norm_dw_kernel",
    )(partial.reshape(-1, pieces * piece))
    return dx.reshape(R, -1)[:, :N], dw[:N]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _rms_norm(
    x: Any,
    w: Any,
    residual: Any,
    eps: float,
    w_offset: float,
    cast_before_weight: bool,
    config: Any,
) -> Any:
    return _rms_norm_fwd(x, w, residual, eps, w_offset, cast_before_weight, config)[0]


def _rms_norm_fwd(
    x: Any,
    w: Any,
    residual: Any,
    eps: float,
    w_offset: float,
    cast_before_weight: bool,
    config: Any,
) -> Any:
    return rms_norm_fwd(
        x,
        w,
        residual,
        eps=eps,
        w_offset=w_offset,
        cast_before_weight=cast_before_weight,
        config=config,
    )


def _rms_norm_bwd(
    eps: float, w_offset: float, cast_before_weight: bool, config: Any, res: Any, cotangents: Any
) -> Any:
    del eps, cast_before_weight
    residual = isinstance(cotangents, tuple)
    dy, dh = cotangents if residual else (cotangents, None)
    dx, dw = rms_norm_bwd(res, dy, dh, w_offset=w_offset, config=config)
    return dx, dw.astype(res[1].dtype), dx if residual else None


_rms_norm.defvjp(_rms_norm_fwd, _rms_norm_bwd)


def rms_norm(
    x: jax.Array,
    w: jax.Array,
    residual: jax.Array | None = None,
    *,
    eps: float = 1e-6,
    w_offset: float = 0.0,
    cast_before_weight: bool = False,
    config: Config | None = None,
) -> Any:
    """x, or x + residual, divided by its root mean square along rows, times w. Differentiable.

    x: [R, N], bfloat16, float16 or float32; N up to 32768.
    w: [N], x's dtype or float32.
    residual: [R, N] in x's dtype, or None. h = x + residual is rounded to x's dtype first.
    eps: added to the mean square.
    w_offset: added to w (1.0 where a model stores w - 1).
    cast_before_weight: round h * rstd to x's dtype before multiplying by w + w_offset.
    config: tile sizes, of the forward and the backward; None takes default_config for each.

    Returns y[R, N] in x's dtype, or (y, h) with a residual. The gradient of w is summed in float32
    and rounded once to w's dtype.

    Raises ValueError for a wrong rank or size and TypeError for a wrong dtype, config or keyword.
    """
    _lib.check_array("x", x, ("R", "N"), DTYPES)
    _lib.check_array("w", w, (x.shape[1],), (x.dtype, jnp.float32))
    if residual is not None:
        _lib.check_array("residual", residual, tuple(x.shape), (x.dtype,))
    if x.shape[1] > MOST_COLUMNS:
        raise ValueError(f"x: expected at most {MOST_COLUMNS} columns, got {x.shape[1]}")
    _lib.check_static("eps", eps, (float, int))
    _lib.check_static("w_offset", w_offset, (float, int))
    _lib.check_static("cast_before_weight", cast_before_weight, (bool,))
    _lib.check_config(config, Config)
    return _rms_norm(x, w, residual, float(eps), float(w_offset), bool(cast_before_weight), config)
