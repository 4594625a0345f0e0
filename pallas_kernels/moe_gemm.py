"""Grouped matrix product: each expert of a mixture multiplies its own rows by its own weights.

    o = cumsum(sizes)    R_e = rows o[e-1] .. o[e] - 1    sizes are known on the device alone
    h[r] = x[r] @ w[e] + bias[e]        for r in R_e;  with rows: x[rows[r]] in place of x[r]
    y[r] = row_scale[r] * act(h[r])     float32, rounded once; 0 for the dead rows past o[E-1]

    the plan: every tile's expert, rows and columns, from sizes, on the device
    for each tile of this block:
        memory warpgroup:   for each k: wait until the slot is free; TMA x and w tiles into it
        compute warpgroups: for each k: wait until the slot is full; free it after
                                acc += w_tile^T @ x_tile^T
                            bias, activation, row_scale; store, transposed, the rows that are the
                            expert's own
    the dead rows: store zeros

With rows, a kernel before it brings the rows of x together: TMA on Hopper has no gather.

Backward: dx is the same kernel over w transposed; dw sums over the rows of an expert
(moe_gemm_dw.py). The plan: moe_gemm_plan.py. What is fused, and its gradients:
moe_gemm_fusions.py.

Operands are swapped because wgmma takes one side in steps of 64 and the other in steps of 8: the
columns of w, which every expert has alike, fill the first, and a tile has as many rows as suit the
rows of an expert. Two tiles of 144 rows hold most experts of 256 rows, where tiles of 128 leave a
third with a few. All tiles take the same time, so that blocks which share an expert's weights stay
in step, and read them from memory once.

The sizes stay on the device and shape nothing but the loops: one compiled kernel serves every
routing. A tile of rows starts at a multiple of 8 rows, as swizzled shared memory demands, so up to
7 rows before the expert's first one are computed and not stored, as are those after its last.

Few rows per expert take the same kernel with tiles of few rows: what counts there is that each
expert's weights are read once, in long rows, with 160 KB of them on their way to each
multiprocessor.

Limits: Hopper; bfloat16 and float16 operands. Sizes that TMA cannot address (rows that do not start
at multiples of 16 bytes, parts of an 8 x 64 tile) are padded first, in XLA.

Twin: triton_kernels/moe_gemm.py.

Sources: the order of tiles follows PyTorch's cache-aware persistent grouped GEMM for Triton; starts
aligned to 8 rows, and stores of a tile's live rows in powers of two, follow Tokamax's and JAX's own
ragged dot (jax.experimental.pallas.ops.gpu.ragged_dot_mgpu); warpgroups and ring are those of
pallas_kernels/matmul.py.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import _lib
from .moe_gemm_dw import (
    FEW_BARRIERS,
    MEMORY_REGISTERS,
    launch,
    pitch,
    product_dw,
    ready_to_compute,
    ring,
)
from .moe_gemm_fusions import (
    PAIR_LAYOUT,
    PARAMS,
    PIECE,
    activated,
    dbias,
    epilogue_bwd,
    gather_bwd,
    gathered,
    pair_smem,
    put,
    put_transposed,
    scaled,
    with_bias,
    wrong_ones,
)
from .moe_gemm_plan import (
    ALIGN,
    LIVE,
    TILE_COLUMN,
    TILE_EXPERT,
    TILE_ROW,
    TILE_START,
    TILE_STOP,
    TILES,
    tile_plan,
)

DTYPES = (jnp.bfloat16, jnp.float16)
# Rows of a tile beside 256 columns: its float32 accumulator, 192 registers of each thread of two
# warpgroups at most, leaves room for the rest.
BLOCKS_M = (*range(32, 160, 8), 176, 184, 192)


@dataclass(frozen=True)
class Config:
    """Tile sizes and resources of the kernels; the result does not depend on them.

    block_m, block_n, block_k: sizes of the tile of y that a block of threads computes, and of the
        slice of k in one slot of the ring. For dw: columns of x, columns of dy, and rows of a slot.
    stages: slots of the ring.
    group_m: row tiles of an expert that are visited before the next tile of columns, at most.
    warpgroups: compute warpgroups; each takes block_n / warpgroups columns of y, and of dw
        block_m / warpgroups rows (one more loads).
    cluster: blocks that share a tile by multicast, 1 or 2: neighbours along n share that of x; for
        dw, neighbours along m share that of dy.
    """

    block_m: int = 128
    block_n: int = 256
    block_k: int = 64
    stages: int = 4
    group_m: int = 24
    warpgroups: int = 2
    cluster: int = 1

    def __post_init__(self) -> None:
        if self.warpgroups not in (1, 2, 3):
            raise ValueError(f"warpgroups: expected 1, 2 or 3, got {self.warpgroups}")
        if self.block_m % ALIGN:
            raise ValueError(f"block_m: expected a multiple of {ALIGN}, got {self.block_m}")
        for name in ("block_n", "block_k"):
            if getattr(self, name) % 64:
                raise ValueError(f"{name}: expected a multiple of 64, got {getattr(self, name)}")
        if self.stages < 2:
            raise ValueError(f"stages: expected at least 2, got {self.stages}")
        if self.cluster not in (1, 2):
            raise ValueError(f"cluster: expected 1 or 2, got {self.cluster}")


def default_config(M: int, N: int, K: int, E: int, dtype: Any, dw: bool = False) -> Config:
    """The Config for these sizes on a Hopper with 132 multiprocessors.

    M rows shared by E experts, each times [K, N]; dw: the gradient of those weights.
    """
    del dtype
    if dw:
        # An expert has few steps, so more of them have to be on their way. Pairs of blocks need an
        # even number of tiles to share.
        cluster = 2 if _lib.cdiv(K, 128) % 2 == 0 else 1
        return Config(block_n=min(256, _lib.cdiv(N, 64) * 64), group_m=16, cluster=cluster)
    rows = max(1, M / E)  # of an expert; the spread is that of rows that choose one by chance
    spread = math.sqrt(rows)
    if M <= 16 * E:
        # Each expert's weights are read once, in rows as long as leave no multiprocessor idle.
        block_m = _lib.cdiv(math.ceil(rows + 2 * spread) + ALIGN - 1, ALIGN) * ALIGN
        stages = 6 if block_m <= 16 else 5
        if min(M, E) * _lib.cdiv(N, 256) >= 132:
            return Config(block_m, stages=stages)
        return Config(block_m, 128, 128, stages)

    # The more rows, the more multiplications for each byte fetched; but tiles that fit the rows of
    # an expert compute fewer that it does not have, and blocks finish in waves of 132.
    def cost(block_m: int) -> float:
        tiles = 1 + sum(
            math.erfc((end - rows - ALIGN / 2) / (spread * math.sqrt(2))) / 2
            for end in range(block_m, math.ceil(rows + 6 * spread), block_m)
        )
        return math.ceil(tiles * E * _lib.cdiv(N, 256) / 132) * (block_m + 8)

    block_m = min(BLOCKS_M, key=cost)
    # What four slots leave of shared memory would not hold enough of a taller tile on its way out.
    return Config(block_m, min(256, _lib.cdiv(N, 128) * 128), stages=4 if block_m <= 152 else 3)


def _store_rows(slots: Any, y_gmem: Any, row: Any, columns: list[Any], lo: Any, hi: Any) -> None:
    """Stores rows lo .. hi - 1 of some slots, as one group, to y from `row` and each column on.

    Shapes of a copy are static: it takes one copy for each bit of the number of rows.
    """
    rows, width = slots.shape[1:]
    live = hi - lo
    size = 1 << (rows.bit_length() - 1)
    while size:

        @pl.when((live & size) != 0)
        def _piece(lo: Any = lo, size: int = size) -> None:
            for s, column in enumerate(columns):
                # Beyond the last column TMA drops what it is given.
                plgpu.copy_smem_to_gmem(
                    slots.at[s, pl.ds(lo, size)],
                    y_gmem.at[pl.ds(row + lo, size), pl.ds(column, width)],
                    commit_group=False,
                )

        lo += live & size
        size //= 2
    plgpu.commit_smem_to_gmem_group()


def _store_zeros(c_smem: Any, y_gmem: Any, live: Any, blocks: tuple[str, ...]) -> None:
    """Stores zeros to the rows of y from `live` on; the blocks share the work."""
    rows, columns = c_smem.shape
    dead = (y_gmem.shape[0] - live + rows - 1) // rows

    @pl.when(dead > 0)
    def _() -> None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if rows % 64 == 0:
            zeros = jnp.zeros((rows, columns), c_smem.dtype)
            put(c_smem, plgpu.layout_cast(zeros, plgpu.Layout.WGMMA))
        else:
            put_transposed(c_smem, jnp.zeros((columns, rows), c_smem.dtype))
        plgpu.commit_smem()

        @plgpu.nd_loop((dead, _lib.cdiv(y_gmem.shape[1], columns)), collective_axes=blocks)
        def _piece(tile: plgpu.NDLoopInfo) -> None:
            i, j = tile.index
            # Beyond the edges TMA drops what it is given.
            plgpu.copy_smem_to_gmem(
                c_smem, y_gmem.at[pl.ds(live + i * rows, rows), pl.ds(j * columns, columns)]
            )


def _moe_gemm_kernel(
    *refs: Any,
    K: int,
    config: Config,
    transpose_w: bool,
    activation: str | None,
    biased: bool,
    scaled_rows: bool,
    kept: bool,
) -> None:
    given = iter(refs)
    x_gmem = next(given)  # [M, K]
    w_gmem = next(given)  # [E, K, N], or [E, N, K] when transpose_w
    plan_gmem = next(given)
    bias_gmem = next(given) if biased else None  # [E, N]
    row_scale_gmem = next(given) if scaled_rows else None  # [M]
    y_gmem = next(given)  # [M, N], or [M, N / 2] under swiglu
    h_gmem = next(given) if kept else None  # [M, N]
    x_smem = next(given)  # [stages, block_m, block_k]
    w_smem = next(given)  # [stages, *tile of w]
    full = next(given)  # [stages] barriers: TMA has filled the slot
    free = next(given)  # [stages] barriers: every reader is done with the slot
    c_smem = next(given)  # [warpgroups, slots, rows of a store, width]
    h_smem = next(given) if kept else None  # [warpgroups, 1, rows of a store, PIECE]
    pairs_smem = next(given) if activation else None  # [warpgroups, 64, pairs, 2]
    block_n, block_k = config.block_n, config.block_k
    stages, cluster = config.stages, config.cluster
    num_k = _lib.cdiv(K, block_k)
    wg = lax.axis_index("wg")
    cols = block_n // config.warpgroups
    halved = 2 if activation else 1

    def each_tile(body: Callable[..., None]) -> None:
        """Calls body with the steps before it, and the tile's place in the plan."""

        def entry(t: jax.Array) -> tuple[jax.Array, ...]:
            t = jnp.minimum(t, plan_gmem.shape[1] - 1)
            fields = (TILE_EXPERT, TILE_ROW, TILE_START, TILE_STOP, TILE_COLUMN)
            return tuple(plan_gmem[field, t] for field in fields)

        here = entry(lax.axis_index("sm"))

        @plgpu.nd_loop((plan_gmem[TILES, 0],), collective_axes="sm", init_carry=here)
        def _tile(tile: plgpu.NDLoopInfo, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            # --- 1. which tile
            following = entry(tile.index[0] + lax.axis_size("sm"))  # comes while this one is done
            e, row, start, stop, column = carry
            if cluster > 1:
                column = column * cluster + lax.axis_index("cluster")
            # Steps are counted across tiles: the ring does not stop between them.
            body(tile.local_index * num_k, e, row, start, stop, column * block_n)
            return following

    def slot_of(step: jax.Array) -> jax.Array:
        return lax.rem(step, jnp.int32(stages))

    @pl.when(wg == config.warpgroups)
    def _memory() -> None:
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

        @each_tile
        def _tile(done: Any, e: Any, row: Any, start: Any, stop: Any, n: Any) -> None:
            del start, stop
            m = pl.multiple_of(row, ALIGN)

            @pl.loop(0, num_k)
            def _load(ki: jax.Array) -> None:
                slot = slot_of(done + ki)
                ns, ks = pl.ds(n, block_n), pl.ds(ki * block_k, block_k)
                plgpu.barrier_wait(free.at[slot])
                # Beyond the edges TMA fills with zeros. The blocks of a cluster compute the same
                # rows: each fetches a share of x's tile and sends it to all.
                plgpu.copy_gmem_to_smem(
                    x_gmem.at[pl.ds(m, config.block_m), ks],
                    x_smem.at[slot],
                    full.at[slot],
                    collective_axes="cluster" if cluster > 1 else None,
                )
                plgpu.copy_gmem_to_smem(
                    w_gmem.at[e, ns, ks] if transpose_w else w_gmem.at[e, ks, ns],
                    w_smem.at[slot],
                    full.at[slot],
                )
                plgpu.commit_smem()  # a barrier: no warp may fall a whole turn of the ring behind

        # A barrier may not go away, nor a neighbour's arrival come, after its block has ended.
        for slot in range(stages):
            plgpu.barrier_wait(free.at[slot])

    @pl.when(wg < config.warpgroups)
    def _compute() -> None:
        ready_to_compute(config, free)

        @each_tile
        def _tile(done: Any, e: Any, row: Any, start: Any, stop: Any, n: Any) -> None:
            n += wg * cols

            def accumulate(acc: Any) -> jax.Array:
                # --- 2. main loop
                @pl.loop(0, num_k)
                def _step(ki: jax.Array) -> None:
                    slot, own = slot_of(done + ki), pl.ds(wg * cols, cols)
                    w_tile = w_smem.at[slot, own] if transpose_w else w_smem.at[slot, :, own].T
                    plgpu.barrier_wait(full.at[slot])
                    plgpu.wgmma(acc, w_tile, x_smem.at[slot].T)
                    # This product may run on; the one before it is done, its slot is free.
                    plgpu.wgmma_wait(1)

                    @pl.when(ki > 0)
                    def _release() -> None:
                        plgpu.barrier_arrive(free.at[slot_of(done + ki - 1)])

                return acc[...]  # waits for the last product

            acc = pl.run_scoped(accumulate, plgpu.ACC((cols, config.block_m), jnp.float32))
            plgpu.barrier_arrive(free.at[slot_of(done + num_k - 1)])

            # --- 3. epilogue
            slots, height, width = c_smem.shape[1:]

            def hidden(j: int, part: int, live: list[Any]) -> Iterator[jax.Array]:
                """h of `part` rows from j on, transposed: 64 columns at a time, kept on the way."""
                for i in range(0, cols, PIECE):
                    h = acc[i : i + PIECE, j : j + part]
                    if bias_gmem is not None:
                        h = with_bias(h, bias_gmem, e, n + i)
                    if h_smem is not None:
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        put_transposed(h_smem.at[wg, 0, pl.ds(0, part)], h.astype(h_smem.dtype))
                        plgpu.commit_smem()
                        _store_rows(h_smem.at[wg], h_gmem, row + j, [n + i], *live)
                    yield h

            def finished(j: int, part: int, live: list[Any]) -> Iterator[Callable[[Any], None]]:
                """What writes y of those rows to a slot, `width` columns at a time.

                A slot is written whole: a part of its rows would be swizzled as their front.
                """
                halves = []
                for h in hidden(j, part, live):
                    if activation is None:
                        if row_scale_gmem is not None:
                            h = scaled(h, row_scale_gmem, row + j, plgpu.Layout.WGMMA, 1)
                        yield functools.partial(put_transposed, values=h.astype(y_gmem.dtype))
                        continue
                    y = activated(h, pairs_smem.at[wg])
                    if row_scale_gmem is not None:
                        y = scaled(y, row_scale_gmem, row + j, PAIR_LAYOUT, 0)
                    halves.append(y.astype(y_gmem.dtype))
                    if len(halves) * PIECE == 2 * width:
                        values = halves[0] if len(halves) == 1 else lax.concatenate(halves, 1)
                        yield functools.partial(put, values=values)
                        halves = []

            # --- 4. store
            lo, hi = jnp.maximum(start - row, 0), jnp.minimum(stop - row, config.block_m)
            for j in range(0, config.block_m, height):
                part = min(height, config.block_m - j)
                live = [jnp.clip(end - j, 0, part) for end in (lo, hi)]
                columns: list[Any] = []
                for i, write in enumerate(finished(j, part, live)):
                    if not columns:
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    write(c_smem.at[wg, len(columns), pl.ds(0, part)])
                    columns.append(lax.div(n, halved) + i * width)
                    if len(columns) == slots or (i + 1) * width * halved == cols:
                        plgpu.commit_smem()
                        _store_rows(c_smem.at[wg], y_gmem, row + j, columns, *live)
                        columns = []

        @pl.when(wg == 0)
        def _dead() -> None:
            blocks = ("sm", "cluster") if cluster > 1 else ("sm",)
            _store_zeros(c_smem.at[0, 0], y_gmem, plan_gmem[LIVE, 0], blocks)
            if h_smem is not None:
                _store_zeros(h_smem.at[0, 0], h_gmem, plan_gmem[LIVE, 0], blocks)

        plgpu.wait_smem_to_gmem(0)


def _staging(
    config: Config, left: int, dtype: Any, out_dtype: Any, activation: str | None, keep: bool
) -> list[Any]:
    """Shared memory, of `left` bytes, for what becomes of a tile on its way to y.

    As many pieces of y as fit, at most a whole tile: those wait for none of their own stores.
    """
    halved = 2 if activation else 1
    # Swizzled are rows of 128 bytes. Of float32, what is not transposed comes in such rows too.
    width = PIECE if activation is None else min(PIECE, 1024 // _lib.bits(out_dtype))

    def pieces(slots: int, width: int, dtype: Any) -> Any:
        # Rows are not tiled, so that a store starts at any.
        transforms = (plgpu.SwizzleTransform(128),) if width * _lib.bits(dtype) == 1024 else ()
        return plgpu.SMEM((config.warpgroups, slots, height, width), dtype, transforms=transforms)

    more = []
    if activation:
        more.append(pair_smem(config.warpgroups))
        left -= more[0].inner_aval.size * 4
    y_bytes, h_bytes = width * _lib.bits(out_dtype) // 8, PIECE * _lib.bits(dtype) // 8
    for parts in range(1, config.block_m // ALIGN + 1):
        height = 64 if activation else _lib.cdiv(config.block_m, parts * ALIGN) * ALIGN
        slots = (left // (config.warpgroups * height) - keep * h_bytes) // y_bytes
        if slots > 0:
            break
    slots = max(1, min(slots, config.block_n // config.warpgroups // (width * halved)))
    kept = [pieces(1, PIECE, dtype)] if keep else []
    return [pieces(slots, width, out_dtype), *kept, *more]


def _product(
    x: jax.Array,
    w: jax.Array,
    plan: Any,
    out_dtype: Any,
    config: Config,
    transpose_w: bool,
    *,
    M: int,
    bias: jax.Array | None = None,
    row_scale: jax.Array | None = None,
    activation: str | None = None,
    keep: bool = False,
    unit: int = 0,
) -> list[jax.Array]:
    """[y], or with `keep` [y, h]. Rows are a multiple of 16 bytes, and of `unit` columns: those
    beyond the last one are not written."""
    K, N = w.shape[:0:-1] if transpose_w else w.shape[1:]
    halved = 2 if activation else 1
    columns_each = PIECE * config.warpgroups * halved
    if config.block_n % columns_each or config.block_m > 256:
        raise ValueError(
            f"config: expected at most 256 rows and a multiple of {columns_each} columns for y, "
            f"got {config.block_m} and {config.block_n}"
        )
    if activation and config.block_m % 64:
        raise ValueError(
            f"config: expected a multiple of 64 rows under swiglu, got {config.block_m}"
        )
    out_type = [jax.ShapeDtypeStruct((M, pitch(N // halved, out_dtype, unit)), out_dtype)]
    if keep:
        out_type.append(jax.ShapeDtypeStruct((M, pitch(N, x.dtype)), x.dtype))
    k, n = config.block_k, config.block_n
    tiles = ((config.block_m, k), (n, k) if transpose_w else (k, n))
    scratch, left = ring(config, tiles, x.dtype)
    scratch += _staging(config, left, x.dtype, out_dtype, activation, keep)
    arrays = [_lib.pad(x, ALIGN, 64), _lib.pad(w, 8, 64), plan]
    if bias is not None:
        arrays.append(_lib.pad(bias, config.block_n * config.cluster))
    if row_scale is not None:
        arrays.append(jnp.pad(row_scale, (0, config.block_m)))  # a tile hangs over the last row
    kernel = functools.partial(
        _moe_gemm_kernel,
        K=K,
        config=config,
        transpose_w=transpose_w,
        activation=activation,
        biased=bias is not None,
        scaled_rows=row_scale is not None,
        kept=keep,
    )
    # Parting gate and up, lanes read what others have written.
    params = PARAMS if activation else FEW_BARRIERS
    return launch(kernel, "moe_gemm_kernel", config, out_type, scratch, *arrays, params=params)


def grouped_gemm_check(
    sizes: jax.Array, rows: jax.Array | None = None, *, M: int, T: int | None = None
) -> None:
    """Looks at what grouped_gemm takes on trust, and waits for the answer: a debugging aid.

    sizes: [E] int32, rows of each expert.
    rows: [M] int32, the row of x that each row of y takes, or None.
    M: rows of y. T: rows of x; needed with rows.

    Raises ValueError that names the first negative size, a sum of sizes beyond M, or the first
    index of a live row outside x. Raises TypeError inside jit, where nothing can be read back.
    """
    _lib.check_array("sizes", sizes, ("E",), (jnp.int32,))
    _lib.check_static("M", M, (int,))
    if rows is not None:
        _lib.check_array("rows", rows, (M,), (jnp.int32,))
        _lib.check_static("T", T, (int,))
    for name, array in (("sizes", sizes), ("rows", rows)):
        if isinstance(array, jax.core.Tracer):
            raise TypeError(
                f"{name}: expected an array with values, got a tracer: call it outside jit"
            )
    if 0 in (sizes.shape[0], M):
        return
    found = wrong_ones(sizes, rows, T or 1)
    bad_size, total, bad_row = (int(value) for value in found[:3])
    if bad_size < sizes.shape[0]:
        raise ValueError(f"sizes: expected >= 0, got {int(sizes[bad_size])} for expert {bad_size}")
    if total > M:
        raise ValueError(f"sizes: sum to {total}, {total - M} more than the M = {M} rows")
    if rows is not None and bad_row < M:
        raise ValueError(
            f"rows: expected indices below T = {T}, got {int(rows[bad_row])} at row {bad_row}"
        )


def _forward(
    x: jax.Array,
    w: jax.Array,
    sizes: jax.Array,
    rows: jax.Array | None,
    bias: jax.Array | None,
    row_scale: jax.Array | None,
    out_dtype: Any,
    transpose_w: bool,
    activation: str | None,
    config: Config | None,
    keep: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """(y, h); h only with `keep`, and where the gradient needs it."""
    K, N = w.shape[:0:-1] if transpose_w else w.shape[1:]
    M, E = x.shape[0] if rows is None else rows.shape[0], w.shape[0]
    columns = N // 2 if activation else N
    keep = keep and (activation is not None or row_scale is not None)
    if 0 in (M, N, K, E) or x.shape[0] == 0:
        return jnp.zeros((M, columns), out_dtype), jnp.zeros((M, N), x.dtype) if keep else None
    if config is None:
        config = default_config(M, N, K, E, x.dtype)
        if activation:  # which needs shared memory of its own, and takes 64 rows at a time
            block_m = 64 if config.block_m <= 64 else 128
            config = replace(config, block_m=block_m, block_n=256, block_k=64, stages=3)
        elif keep:  # h and y at once: the registers would not do for a taller tile
            config = replace(config, block_m=min(config.block_m, 128))
    plan = tile_plan(sizes, M, N, config)
    y, *h = _product(
        gathered(x, rows, plan),
        w,
        plan,
        out_dtype,
        config,
        transpose_w,
        M=M,
        bias=bias,
        row_scale=row_scale,
        activation=activation,
        keep=keep,
    )
    y = _lib.vary_alike(y[:, :columns], x)[0]
    return y, _lib.vary_alike(h[0][:, :N], x)[0] if keep else None


def grouped_gemm_fwd(
    x: jax.Array,
    w: jax.Array,
    sizes: jax.Array,
    *,
    out_dtype: Any = None,
    transpose_w: bool = False,
    rows: jax.Array | None = None,
    bias: jax.Array | None = None,
    row_scale: jax.Array | None = None,
    activation: str | None = None,
    config: Config | None = None,
) -> tuple[jax.Array, tuple[Any, ...]]:
    """As `grouped_gemm`, and what the backward needs.

    res = (x, w, sizes, rows, bias, row_scale, h), None where absent; h[M, N], in x's dtype, is what
    activation and row_scale are applied to.
    """
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    y, h = _forward(
        x, w, sizes, rows, bias, row_scale, out_dtype, transpose_w, activation, config, True
    )
    return y, (x, w, sizes, rows, bias, row_scale, h)


def grouped_gemm_bwd(
    res: tuple[Any, ...],
    dy: jax.Array,
    *,
    transpose_w: bool = False,
    activation: str | None = None,
    config: Config | None = None,
) -> tuple[jax.Array, ...]:
    """Gradients of `grouped_gemm`.

    res: (x, w, sizes, rows, bias, row_scale, h) as grouped_gemm_fwd returns it.
    dy: [M, N], the cotangent of y. A float32 one is rounded to the operands' dtype, because both
        operands of wgmma have one dtype.

    config: of the products for dx and dw.

    Returns (dx, dw), then dbias if there is a bias and drow_scale if there is a row_scale, each in
    its array's dtype: 0 for dead rows and for experts without rows.
    """
    x, w, sizes, rows, bias, row_scale, h = res
    K, N = w.shape[:0:-1] if transpose_w else w.shape[1:]
    (M, _), E, T = dy.shape, w.shape[0], x.shape[0]
    dy = dy.astype(x.dtype)
    if 0 in (M, N, K, E, T):
        given = [x, w, *(array for array in (bias, row_scale) if array is not None)]
        return tuple(jnp.zeros(array.shape, array.dtype) for array in given)
    of_dx = config or default_config(M, K, N, E, x.dtype)
    of_dw = config or default_config(M, *((K, N) if transpose_w else (N, K)), E, x.dtype, dw=True)
    plan = tile_plan(sizes, M, K, of_dx)
    dh, drow_scale = dy, []
    if h is not None:
        dh, *drow_scale = epilogue_bwd(h, dy, row_scale, plan, activation)
    unit = 0 if rows is None else _lib.WARPGROUP
    (dx,) = _product(dh, w, plan, x.dtype, of_dx, not transpose_w, M=M, unit=unit)
    dx = dx[:, :K] if rows is None else gather_bwd(dx, rows, plan, T, K)
    taken = gathered(x, rows, plan)
    dw = (
        product_dw(dh, taken, plan, w.dtype, of_dw, E, N, K)
        if transpose_w
        else product_dw(taken, dh, plan, w.dtype, of_dw, E, K, N)
    )
    more = [] if bias is None else [dbias(dh, plan, bias)]
    return _lib.vary_alike(dx, dw, *more, *drow_scale, x)[:-1]


def grouped_gemm_dw(
    x: jax.Array,
    dy: jax.Array,
    sizes: jax.Array,
    *,
    out_dtype: Any = "float32",
    config: Config | None = None,
) -> jax.Array:
    """Each expert's rows of x, transposed, times its rows of dy. Has no gradient of its own.

    x: [M, K], bfloat16 or float16.
    dy: [M, N], the same dtype; a float32 one is rounded to it.
    sizes: [E] int32: rows of each expert; those past their sum count for none.
    out_dtype: float32, or x's dtype.
    config: tile sizes; None takes default_config with dw=True.

    Returns dw[E, K, N], zeros for an expert without rows.

    Raises ValueError for a wrong rank or size and TypeError for a wrong dtype or config.
    """
    _check_16_bits(x=x)
    _lib.check_array("x", x, ("M", "K"), DTYPES)
    _lib.check_array("dy", dy, (x.shape[0], "N"), (x.dtype, jnp.float32))
    _lib.check_array("sizes", sizes, ("E",), (jnp.int32,))
    out_dtype = _out_dtype(x, out_dtype)
    _lib.check_config(config, Config)
    x, dy, sizes = _lib.vary_alike(x, dy.astype(x.dtype), sizes)
    (M, K), N, E = x.shape, dy.shape[1], sizes.shape[0]
    if 0 in (M, N, K, E):
        return jnp.zeros((E, K, N), out_dtype)
    config = config or default_config(M, N, K, E, x.dtype, dw=True)
    plan = tile_plan(sizes, M, N, config)
    return _lib.vary_alike(product_dw(x, dy, plan, out_dtype, config, E, K, N), x)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9))
def _grouped_gemm(
    x: Any, w: Any, sizes: Any, rows: Any, bias: Any, row_scale: Any,
    out_dtype: Any, transpose_w: bool, activation: str | None, config: Any,
) -> jax.Array:  # fmt: skip
    return _forward(
        x, w, sizes, rows, bias, row_scale, out_dtype, transpose_w, activation, config, False
    )[0]


def _grouped_gemm_fwd(
    x: Any, w: Any, sizes: Any, rows: Any, bias: Any, row_scale: Any,
    out_dtype: Any, transpose_w: bool, activation: str | None, config: Any,
) -> Any:  # fmt: skip
    return grouped_gemm_fwd(
        x, w, sizes, out_dtype=out_dtype, transpose_w=transpose_w, rows=rows, bias=bias,
        row_scale=row_scale, activation=activation, config=config,
    )  # fmt: skip


def _grouped_gemm_bwd(
    out_dtype: Any, transpose_w: bool, activation: str | None, config: Any, res: Any, dy: jax.Array
) -> Any:
    del out_dtype
    bias, row_scale = res[4:6]
    dx, dw, *more = grouped_gemm_bwd(
        res, dy, transpose_w=transpose_w, activation=activation, config=config
    )
    d_bias = None if bias is None else more.pop(0)
    drow_scale = None if row_scale is None else more.pop(0)
    return dx, dw, None, None, d_bias, drow_scale


_grouped_gemm.defvjp(_grouped_gemm_fwd, _grouped_gemm_bwd)


def _check_16_bits(**arrays: Any) -> None:
    if any(getattr(x, "dtype", None) == jnp.float32 for x in arrays.values()):
        raise TypeError(
            f"{', '.join(arrays)}: expected dtype bfloat16 or float16, got float32, which wgmma "
            "would round to TF32 (10 bits of mantissa)"
        )


def _out_dtype(x: jax.Array, out_dtype: Any) -> Any:
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    if out_dtype not in (x.dtype, jnp.float32):
        raise TypeError(
            f"out_dtype: expected {jnp.dtype(x.dtype).name} or float32, got {out_dtype.name}"
        )
    return out_dtype


def grouped_gemm(
    x: jax.Array,
    w: jax.Array,
    sizes: jax.Array,
    *,
    out_dtype: Any = None,
    transpose_w: bool = False,
    rows: jax.Array | None = None,
    bias: jax.Array | None = None,
    row_scale: jax.Array | None = None,
    activation: str | None = None,
    config: Config | None = None,
) -> jax.Array:
    """Each expert's rows of x times its weights, on any routing. Differentiable.

    x: [M, K], bfloat16 or float16, rows in the order of their experts; with rows: [T, K].
    w: [E, K, N], the same dtype; transpose_w: [E, N, K].
    sizes: [E] int32, rows of each expert, read on the device. Rows past their sum are dead.
    out_dtype: x's dtype (None) or float32, as a dtype or its name.
    rows: [M] int32: row r takes x[rows[r]].
    bias: [E, N], x's dtype, added to each product.
    row_scale: [M] float32, multiplies each row at last.
    activation: None, or "swiglu": silu of the even columns times the odd ones.
    config: tile sizes, of the forward and the backward; None takes default_config for each product.

    Returns y[M, N], or [M, N / 2] under swiglu, in out_dtype; dead rows are zeros. A negative size
    counts as 0, rows beyond M do not exist: grouped_gemm_check looks for both.

    Raises ValueError for a wrong rank or size and TypeError for a wrong dtype or config.
    """
    _check_16_bits(x=x, w=w)
    _lib.check_static("transpose_w", transpose_w, (bool,))
    if activation not in (None, "swiglu"):
        raise ValueError(f'activation: expected None or "swiglu", got {activation!r}')
    _lib.check_array("x", x, ("M" if rows is None else "T", "K"), DTYPES)
    K = x.shape[1]
    _lib.check_array("w", w, ("E", "N", K) if transpose_w else ("E", K, "N"), (x.dtype,))
    E, N = w.shape[0], w.shape[1 if transpose_w else 2]
    _lib.check_array("sizes", sizes, (E,), (jnp.int32,))
    if activation == "swiglu" and N % 2:
        raise ValueError(f"w: expected an even number of columns under swiglu, got N = {N}")
    if rows is not None:
        _lib.check_array("rows", rows, ("M",), (jnp.int32,))
    M = x.shape[0] if rows is None else rows.shape[0]
    if bias is not None:
        _lib.check_array("bias", bias, (E, N), (x.dtype,))
    if row_scale is not None:
        _lib.check_array("row_scale", row_scale, (M,), (jnp.float32,))
    _lib.check_config(config, Config)
    out_dtype = _out_dtype(x, out_dtype)
    given = [array for array in (x, w, sizes, rows, bias, row_scale) if array is not None]
    alike = iter(_lib.vary_alike(*given))
    x, w, sizes, rows, bias, row_scale = (
        None if array is None else next(alike) for array in (x, w, sizes, rows, bias, row_scale)
    )
    return _grouped_gemm(
        x, w, sizes, rows, bias, row_scale, out_dtype, transpose_w, activation, config
    )
