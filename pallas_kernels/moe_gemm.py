"""Grouped matrix product: each expert of a mixture multiplies its own rows by its own weights.

    o = cumsum(sizes)    R_e = rows o[e-1] .. o[e] - 1    sizes are known on the device alone
    h[r] = x[r] @ w[e] + bias[e]        for r in R_e;  with rows: x[rows[r]] in place of x[r]
    y[r] = row_scale[r] * act(h[r])     float32, rounded once; 0 for the dead rows past o[E-1]

    plan: for each tile of rows its expert and its place, one row tile after the other
    for each output tile of this block, in an order that keeps its neighbours' operands in L2:
        memory warpgroup:   for each k: wait until the slot is free; TMA x and w tiles into it
        compute warpgroups: for each k: wait until the slot is full; acc += x_tile @ w_tile; free it
                            store those rows of acc that are the expert's own
    the dead rows: store zeros

With rows, a kernel before it brings the rows of x together: TMA on Hopper has no gather. Swiglu
parts gate and up, which lie side by side in a register, by way of shared memory.

Backward: dx is the same kernel over w transposed; dw[e] = x[R_e]^T @ dh[R_e] walks over the rows of
an expert, and clears what its first and last tile hold of other experts' rows.

The sizes stay on the device and shape nothing but the loops: one compiled kernel serves every
routing. A tile of rows starts at a multiple of 8 rows, as swizzled shared memory demands, so up to
7 rows before the expert's first one are computed and not stored, as are those after its last.

Limits: Hopper; bfloat16 and float16 operands. Sizes that TMA cannot address (rows that do not start
at multiples of 16 bytes, parts of an 8 x 64 tile) are padded first, in XLA.

Twin: triton_kernels/moe_gemm.py.

Sources: the order of tiles follows PyTorch's cache-aware persistent grouped GEMM for Triton; starts
aligned to 8 rows, and stores of a tile's live rows in powers of two, follow Tokamax's and JAX's own
ragged dot (jax.experimental.pallas.ops.gpu.ragged_dot_mgpu); warpgroups and ring are those of
pallas_kernels/matmul.py.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import _lib

DTYPES = (jnp.bfloat16, jnp.float16)
EPILOGUE_M = 64  # rows of one store: those of one wgmma instruction
EPILOGUE_BYTES = 128  # bytes of one row of a store: one swizzle row
MEMORY_REGISTERS = 40  # of a thread that only issues copies; of 512, the others share what is left
SHARED_BYTES = 226 * 1024  # shared memory of a block, less room for the barriers
ALIGN = 8  # rows of a swizzled piece of shared memory
PIECE = 64  # columns of h that the epilogue works at together
PAIR_PITCH = 36  # pairs of a row in shared memory: its rows and their neighbours miss each other
ROWS = 8  # rows of a block that moves or scales rows

# Layouts are given where they do not follow from an operand's, and shared memory is cut as told.
PARAMS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)
# A lane holds one element of each: of pairs of columns, and of rows that are read column by column
PAIR_LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 4), (16, 4), (8, 4), (1,))),
    warp_dims=(-7,),
    lane_dims=(-3, -2),
    vector_dim=-1,
)
ROW_LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((128,), (32,), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
)

# Rows of the plan. By row tile: its expert, its first row in x, where the expert's rows start and
# stop. By expert: where its rows start and stop. Everywhere: how many row tiles, and live rows.
TILE_EXPERT, TILE_ROW, TILE_START, TILE_STOP, EXPERT_START, EXPERT_STOP, TILES, LIVE = range(8)


@dataclass(frozen=True)
class Config:
    """Tile sizes and resources of the kernels; the result does not depend on them.

    block_m, block_n, block_k: sizes of the tile of y that a block of threads computes, and of the
        slice of k in one slot of the ring. For dw: columns of x, columns of dy, and rows of a slot.
    stages: slots of the ring.
    group_m: tiles along m that are visited before the next tile along n.
    decode: the form for few rows per expert: in Triton only so far, here NotImplementedError.
    warpgroups: compute warpgroups; each takes block_m / warpgroups rows (one more loads).
    cluster: blocks that share a tile by multicast, 1 or 2: neighbours along n share that of x; for
        dw, neighbours along m share that of dy.
    """

    block_m: int = 128
    block_n: int = 256
    block_k: int = 64
    stages: int = 4
    group_m: int = 16
    decode: bool = False
    warpgroups: int = 2
    cluster: int = 2

    def __post_init__(self) -> None:
        if self.warpgroups not in (1, 2, 3):
            raise ValueError(f"warpgroups: expected 1, 2 or 3, got {self.warpgroups}")
        if self.block_m % (64 * self.warpgroups):
            raise ValueError(
                f"block_m: expected a multiple of 64 rows for each of {self.warpgroups} "
                f"warpgroups, got {self.block_m}"
            )
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
    del M, E, dtype
    # The largest tile whose float32 accumulator fits the registers of two warpgroups (128 a
    # thread): each byte fetched feeds the most multiplications. Not wider than the result is.
    block_n = min(256, _lib.cdiv(N, 64) * 64)
    # Pairs of blocks need an even number of tiles to share.
    along = _lib.cdiv(K, 128) if dw else _lib.cdiv(N, block_n)
    return Config(block_n=block_n, cluster=2 if along % 2 == 0 else 1)


def _moe_gemm_plan_kernel(
    sizes_gmem: Any,  # [E]
    plan_gmem: Any,  # [8, a multiple of 128]
    *,
    M: int,
    block_m: int,
) -> None:
    # --- 1. which tile
    first = lax.axis_index("chunk") * _lib.WARPGROUP
    layout = plgpu.Layout.WG_STRIDED((_lib.WARPGROUP,), 1)
    index = first + plgpu.broadcasted_iota(jnp.int32, (_lib.WARPGROUP,), 0, layout=layout)

    # --- 2. main loop
    def expert(e: Any, carry: Any) -> Any:
        start, tiles, rows = carry
        stop = start + jnp.clip(sizes_gmem[e], 0, M - start)
        top = start // ALIGN * ALIGN
        more = jnp.where(stop > start, (stop - top + block_m - 1) // block_m, 0)
        here = (index >= tiles) & (index < tiles + more)
        found = (e, top + (index - tiles) * block_m, start, stop)
        rows = [
            *(jnp.where(here, new, old) for new, old in zip(found, rows[:4], strict=True)),
            *(
                jnp.where(index == e, new, old)
                for new, old in zip(found[2:], rows[4:], strict=True)
            ),
        ]
        return stop, tiles + more, rows

    none = plgpu.layout_cast(jnp.zeros((_lib.WARPGROUP,), jnp.int32), layout)
    zero = jnp.int32(0)
    live, tiles, rows = lax.fori_loop(0, sizes_gmem.shape[0], expert, (zero, zero, [none] * 6))

    # --- 3. epilogue
    rows += [none + tiles, none + live]

    # --- 4. store
    for row, values in enumerate(rows):
        plan_gmem[row, pl.ds(first, _lib.WARPGROUP)] = values


def _plan(sizes: jax.Array, M: int, block_m: int) -> jax.Array:
    """Where the row tiles of all experts are, at most so many as there can be."""
    E = sizes.shape[0]
    most = _lib.cdiv(M, block_m) + 2 * min(E, M)  # each expert may add a part at both its ends
    chunks = _lib.cdiv(max(most, E), _lib.WARPGROUP)
    return plgpu.kernel(
        functools.partial(_moe_gemm_plan_kernel, M=M, block_m=block_m),
        out_type=jax.ShapeDtypeStruct((8, chunks * _lib.WARPGROUP), jnp.int32),
        grid=(chunks,),
        grid_names=("chunk",),
        kernel_name="moe_gemm_plan_kernel",
    )(sizes)


def _next_slot(c_smem: Any, wg: Any, piece: int, pieces: int, sure: bool = True) -> Any:
    """Where this piece of a tile waits for its store, once the store before it there has read it.

    Slots are taken in turns. If a tile's pieces are no whole number of turns, the next tile starts
    only when all stores have read theirs; and if a piece may have nothing to store (not `sure`),
    stores cannot be counted.
    """
    slots = c_smem.shape[1]
    turns = pieces % slots == 0
    plgpu.wait_smem_to_gmem(slots - 1 if sure and (piece or turns) else 0, wait_read_only=True)
    return c_smem.at[wg, piece % slots]


def _store_rows(c_smem: Any, y_gmem: Any, row: Any, column: Any, lo: Any, hi: Any) -> None:
    """Stores rows lo .. hi - 1 of c_smem, as one group, to y from `row` and `column` on.

    Shapes of a copy are static: it takes one copy for each bit of the number of rows.
    """
    rows, columns = c_smem.shape
    live = hi - lo
    size = rows
    while size:

        @pl.when((live & size) != 0)
        def _piece(lo: Any = lo, size: int = size) -> None:
            # Beyond the last column TMA drops what it is given.
            plgpu.copy_smem_to_gmem(
                c_smem.at[pl.ds(lo, size)],
                y_gmem.at[pl.ds(row + lo, size), pl.ds(column, columns)],
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
        zeros = jnp.zeros((rows, columns), c_smem.dtype)
        c_smem[...] = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
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
    N: int,
    K: int,
    config: Config,
    transpose_w: bool,
    activation: str | None,
    biased: bool,
    scaled: bool,
    kept: bool,
) -> None:
    given = iter(refs)
    x_gmem = next(given)  # [M, K]
    w_gmem = next(given)  # [E, K, N], or [E, N, K] when transpose_w
    plan_gmem = next(given)
    bias_gmem = next(given) if biased else None  # [E, N]
    row_scale_gmem = next(given) if scaled else None  # [M]
    y_gmem = next(given)  # [M, N], or [M, N / 2] under swiglu
    h_gmem = next(given) if kept else None  # [M, N]
    x_smem = next(given)  # [stages, block_m, block_k]
    w_smem = next(given)  # [stages, *tile of w]
    c_smem = next(given)  # [warpgroups, slots, 64, columns of a store of y]
    full = next(given)  # [stages] barriers: TMA has filled the slot
    free = next(given)  # [stages] barriers: every reader is done with the slot
    h_smem = next(given) if kept else None  # [warpgroups, 1, 64, columns of a store of h]
    pair_smem = next(given) if activation else None  # [warpgroups, 64, pairs, 2]
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    stages, cluster, group_m = config.stages, config.cluster, config.group_m
    num_n = _lib.cdiv(N, block_n * cluster)
    num_k = _lib.cdiv(K, block_k)
    num_m = plan_gmem[TILES, 0]
    wg = lax.axis_index("wg")
    rows = block_m // config.warpgroups
    columns = c_smem.shape[-1]
    halved = 2 if activation else 1

    def activated(h: jax.Array) -> jax.Array:
        if pair_smem is None:
            return h
        # A register holds both columns of a pair, and none of a lane's others: through shared
        # memory each half comes back by itself.
        pairs = pair_smem.at[wg]
        pairs.reshape(EPILOGUE_M, 2 * PAIR_PITCH).at[:, pl.ds(0, PIECE)][...] = h
        def half(i: int) -> jax.Array:
            at = pairs.at[:, pl.ds(0, PIECE // 2), i]
            return plgpu.load(at, layout=PAIR_LAYOUT, optimized=False)

        gate = half(0)
        y = gate / (1 + jnp.exp(-gate))
        plgpu.commit_smem()  # a barrier: the compiler would keep both halves, and run out of room
        return y * half(1)

    def place(tile: plgpu.NDLoopInfo) -> tuple[jax.Array, jax.Array]:
        # --- 1. which tile
        t = tile.index[0]
        first = t // (group_m * num_n) * group_m
        within = lax.rem(t, group_m * num_n)
        group = jnp.minimum(num_m - first, group_m)
        mi, ni = first + lax.rem(within, group), lax.div(within, group)
        if cluster > 1:
            ni = ni * cluster + lax.axis_index("cluster")
        return mi, ni * block_n

    def slot_of(tile: plgpu.NDLoopInfo, ki: jax.Array) -> jax.Array:
        # Steps are counted across tiles: the ring does not stop between them.
        return lax.rem(tile.local_index * num_k + ki, jnp.int32(stages))

    @pl.when(wg == config.warpgroups)
    def _memory() -> None:
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

        @plgpu.nd_loop((num_m * num_n,), collective_axes="sm")
        def _tile(tile: plgpu.NDLoopInfo) -> None:
            mi, n = place(tile)
            e = plan_gmem[TILE_EXPERT, mi]
            m = pl.multiple_of(plan_gmem[TILE_ROW, mi], ALIGN)

            @pl.loop(0, num_k)
            def _load(ki: jax.Array) -> None:
                slot = slot_of(tile, ki)
                ns, ks = pl.ds(n, block_n), pl.ds(ki * block_k, block_k)
                plgpu.barrier_wait(free.at[slot])
                # Beyond the edges TMA fills with zeros. The blocks of a cluster compute the same
                # rows: each fetches a share of x's tile and sends it to all.
                plgpu.copy_gmem_to_smem(
                    x_gmem.at[pl.ds(m, block_m), ks],
                    x_smem.at[slot],
                    full.at[slot],
                    collective_axes="cluster" if cluster > 1 else None,
                )
                plgpu.copy_gmem_to_smem(
                    w_gmem.at[e, ns, ks] if transpose_w else w_gmem.at[e, ks, ns],
                    w_smem.at[slot],
                    full.at[slot],
                )

        # A barrier may not go away, nor a neighbour's arrival come, after its block has ended.
        for slot in range(stages):
            plgpu.barrier_wait(free.at[slot])

    @pl.when(wg < config.warpgroups)
    def _compute() -> None:
        plgpu.set_max_registers(
            min(232, (512 - MEMORY_REGISTERS) // config.warpgroups // 8 * 8), action="increase"
        )
        for slot in range(stages):
            plgpu.barrier_arrive(free.at[slot])  # every slot is free at the start

        @plgpu.nd_loop((num_m * num_n,), collective_axes="sm")
        def _tile(tile: plgpu.NDLoopInfo) -> None:
            mi, n = place(tile)
            m = plan_gmem[TILE_ROW, mi] + wg * rows
            # Of this warpgroup's rows, those that are the expert's own
            lo = jnp.maximum(plan_gmem[TILE_START, mi] - m, 0)
            hi = jnp.minimum(plan_gmem[TILE_STOP, mi] - m, rows)

            @pl.when(hi <= 0)
            def _skip() -> None:
                @pl.loop(0, num_k)
                def _step(ki: jax.Array) -> None:
                    slot = slot_of(tile, ki)
                    plgpu.barrier_wait(full.at[slot])
                    plgpu.barrier_arrive(free.at[slot])

            @pl.when(hi > 0)
            def _multiply() -> None:
                def accumulate(acc: Any) -> jax.Array:
                    # --- 2. main loop
                    @pl.loop(0, num_k)
                    def _step(ki: jax.Array) -> None:
                        slot = slot_of(tile, ki)
                        w_tile = w_smem.at[slot].T if transpose_w else w_smem.at[slot]
                        plgpu.barrier_wait(full.at[slot])
                        plgpu.wgmma(acc, x_smem.at[slot, pl.ds(wg * rows, rows)], w_tile)
                        # This product may run on; the one before it is done, its slot is free.
                        plgpu.wgmma_wait(1)

                        @pl.when(ki > 0)
                        def _release() -> None:
                            plgpu.barrier_arrive(free.at[slot_of(tile, ki - 1)])

                    return acc[...]  # waits for the last product

                acc = pl.run_scoped(accumulate, plgpu.ACC((rows, block_n), jnp.float32))
                plgpu.barrier_arrive(free.at[slot_of(tile, jnp.int32(num_k - 1))])

                # --- 3. epilogue
                stores = rows // EPILOGUE_M * (block_n // halved) // columns
                store, parts = 0, []
                for piece in range(rows // EPILOGUE_M * block_n // PIECE):
                    i, j = divmod(piece * PIECE, block_n)
                    i *= EPILOGUE_M
                    h = acc[i : i + EPILOGUE_M, j : j + PIECE]
                    if bias_gmem is not None:
                        bias = plgpu.load(
                            bias_gmem.at[plan_gmem[TILE_EXPERT, mi], pl.ds(n + j, PIECE)],
                            layout=plgpu.Layout.WGMMA.reduce(0),
                            optimized=False,
                        )
                        h += lax.broadcast_in_dim(bias.astype(jnp.float32), h.shape, [1])
                    y = activated(h)
                    if row_scale_gmem is not None:
                        layout = PAIR_LAYOUT if activation else plgpu.Layout.WGMMA
                        scale = plgpu.load(
                            row_scale_gmem.at[pl.ds(m + i, EPILOGUE_M)],
                            layout=layout.reduce(1),
                            optimized=False,
                        )
                        y *= plgpu.layout_cast(lax.broadcast_in_dim(scale, y.shape, [0]), layout)

                    # --- 4. store
                    live = [jnp.clip(end - i, 0, EPILOGUE_M) for end in (lo, hi)]
                    if h_smem is not None:
                        h_slot = _next_slot(h_smem, wg, 0, 1)
                        h_slot[...] = h.astype(h_gmem.dtype)
                        plgpu.commit_smem()
                        _store_rows(h_slot, h_gmem, m + i, n + j, *live)
                    # A slot is written whole: part of a row of 128 bytes would be swizzled as if
                    # it were the row's first.
                    parts.append(y.astype(y_gmem.dtype))
                    y = parts[0] if len(parts) == 1 else lax.concatenate(parts, 1)
                    if y.shape[1] < columns:
                        continue
                    parts, first = [], lax.div(n, halved) + (j + PIECE) // halved - y.shape[1]
                    for at in range(0, y.shape[1], columns):
                        slot = _next_slot(c_smem, wg, store, stores, rows == EPILOGUE_M)
                        slot[...] = y[:, at : at + columns]
                        plgpu.commit_smem()
                        _store_rows(slot, y_gmem, m + i, first + at, *live)
                        store += 1

        @pl.when(wg == 0)
        def _dead() -> None:
            blocks = ("sm", "cluster") if cluster > 1 else ("sm",)
            _store_zeros(c_smem.at[0, 0], y_gmem, plan_gmem[LIVE, 0], blocks)
            if h_smem is not None:
                _store_zeros(h_smem.at[0, 0], h_gmem, plan_gmem[LIVE, 0], blocks)

        plgpu.wait_smem_to_gmem(0)


def _clear_rows(tile_smem: Any, part: Any, parts: int, lo: Any, hi: Any) -> None:
    """Zeros in the rows of a tile before lo and from hi on, NaN or not; one of `parts` shares."""
    rows, columns = tile_smem.shape
    layout = plgpu.Layout.SMEM_GMEM_COPY((32, 64), tile_smem.dtype, 128)
    for j in range(_lib.cdiv(columns // 64, parts)):
        column = (j * parts + part) * 64
        for i in range(0, rows, 32):

            @pl.when((column < columns) & ((i < lo) | (i + 32 > hi)))
            def _clear(i: int = i, column: Any = column) -> None:
                piece = tile_smem.at[pl.ds(i, 32), pl.ds(pl.multiple_of(column, 64), 64)]
                row = i + plgpu.broadcasted_iota(jnp.int32, (32, 64), 0, layout=layout)
                values = plgpu.load(piece, layout=layout)
                piece[...] = jnp.where((row >= lo) & (row < hi), values, jnp.zeros_like(values))


def _moe_gemm_dw_kernel(
    x_gmem: Any,  # [M, K]
    dy_gmem: Any,  # [M, N]
    plan_gmem: Any,
    dw_gmem: Any,  # [E, K, N]
    x_smem: Any,  # [stages, block_k, block_m]
    dy_smem: Any,  # [stages, block_k, block_n]
    c_smem: Any,  # [warpgroups, slots, 64, columns of 128 bytes]
    full: Any,  # [stages] barriers: TMA has filled the slot
    free: Any,  # [stages] barriers: every reader is done with the slot
    cleared: Any,  # barrier: every warpgroup has cleared its share of a slot
    *,
    N: int,
    K: int,
    config: Config,
) -> None:
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    stages, cluster = config.stages, config.cluster
    num_e = dw_gmem.shape[0]
    num_m = _lib.cdiv(K, block_m * cluster)
    num_n = _lib.cdiv(N, block_n)
    wg = lax.axis_index("wg")
    share = block_m // config.warpgroups
    columns = c_smem.shape[-1]

    def place(tile: plgpu.NDLoopInfo) -> tuple[jax.Array, ...]:
        # --- 1. which tile
        e, within = tile.index
        mi, ni = plgpu.planar_snake(within, (num_m, num_n), 0, max(1, config.group_m // cluster))
        if cluster > 1:
            mi = mi * cluster + lax.axis_index("cluster")
        return e, mi * block_m, ni * block_n

    def extent(e: jax.Array) -> tuple[jax.Array, ...]:
        """First row of the first slot, where the expert's rows start and stop, number of slots."""
        start, stop = plan_gmem[EXPERT_START, e], plan_gmem[EXPERT_STOP, e]
        top = pl.multiple_of(start // ALIGN * ALIGN, ALIGN)
        steps = jnp.where(stop > start, (stop - top + block_k - 1) // block_k, 0)
        return top, start, stop, steps

    def slot_of(step: jax.Array) -> jax.Array:
        return lax.rem(step, jnp.int32(stages))

    @pl.when(wg == config.warpgroups)
    def _memory() -> None:
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

        # Steps are counted across tiles: the ring does not stop between them.
        @plgpu.nd_loop((num_e, num_m * num_n), collective_axes="sm", init_carry=jnp.int32(0))
        def _tile(tile: plgpu.NDLoopInfo, carry: jax.Array) -> jax.Array:
            e, m, n = place(tile)
            top, _, _, steps = extent(e)

            @pl.loop(0, steps)
            def _load(ki: jax.Array) -> None:
                slot = slot_of(carry + ki)
                ks = pl.ds(top + ki * block_k, block_k)
                plgpu.barrier_wait(free.at[slot])
                plgpu.copy_gmem_to_smem(
                    x_gmem.at[ks, pl.ds(m, block_m)], x_smem.at[slot], full.at[slot]
                )
                # The blocks of a cluster compute the same columns: each fetches a share of dy's
                # tile and sends it to all.
                plgpu.copy_gmem_to_smem(
                    dy_gmem.at[ks, pl.ds(n, block_n)],
                    dy_smem.at[slot],
                    full.at[slot],
                    collective_axes="cluster" if cluster > 1 else None,
                )

            return carry + steps

        # A barrier may not go away, nor a neighbour's arrival come, after its block has ended.
        for slot in range(stages):
            plgpu.barrier_wait(free.at[slot])

    @pl.when(wg < config.warpgroups)
    def _compute() -> None:
        plgpu.set_max_registers(
            min(232, (512 - MEMORY_REGISTERS) // config.warpgroups // 8 * 8), action="increase"
        )
        for slot in range(stages):
            plgpu.barrier_arrive(free.at[slot])  # every slot is free at the start

        @plgpu.nd_loop((num_e, num_m * num_n), collective_axes="sm", init_carry=jnp.int32(0))
        def _tile(tile: plgpu.NDLoopInfo, carry: jax.Array) -> jax.Array:
            e, m, n = place(tile)
            top, start, stop, steps = extent(e)

            def accumulate(acc: Any) -> jax.Array:
                # --- 2. main loop
                @pl.loop(0, steps)
                def _step(ki: jax.Array) -> None:
                    slot = slot_of(carry + ki)
                    lo, hi = start - top - ki * block_k, stop - top - ki * block_k
                    plgpu.barrier_wait(full.at[slot])

                    # At the ends of an expert a slot holds rows of others, or dead ones. Zero in
                    # one operand is not enough: they may be NaN in the other.
                    @pl.when((lo > 0) | (hi < block_k))
                    def _clear() -> None:
                        _clear_rows(x_smem.at[slot], wg, config.warpgroups, lo, hi)
                        _clear_rows(dy_smem.at[slot], wg, config.warpgroups, lo, hi)
                        plgpu.commit_smem()
                        plgpu.barrier_arrive(cleared)
                        plgpu.barrier_wait(cleared)

                    own = pl.ds(wg * share, share)
                    plgpu.wgmma(acc, x_smem.at[slot, :, own].T, dy_smem.at[slot])
                    # This product may run on; the one before it is done, and its slot is free.
                    plgpu.wgmma_wait(1)

                    @pl.when(ki > 0)
                    def _release() -> None:
                        plgpu.barrier_arrive(free.at[slot_of(carry + ki - 1)])

                return acc[...]  # waits for the last product

            acc = pl.run_scoped(accumulate, plgpu.ACC((share, block_n), jnp.float32))

            @pl.when(steps > 0)
            def _release() -> None:
                plgpu.barrier_arrive(free.at[slot_of(carry + steps - 1)])

            # --- 3. epilogue
            dw = acc.astype(dw_gmem.dtype)

            # --- 4. store
            pieces = [
                (i, j) for i in range(0, share, EPILOGUE_M) for j in range(0, block_n, columns)
            ]
            for piece, (i, j) in enumerate(pieces):
                c_slot = _next_slot(c_smem, wg, piece, len(pieces))
                c_slot[...] = dw[i : i + EPILOGUE_M, j : j + columns]
                plgpu.commit_smem()
                # Beyond the edges TMA drops what it is given.
                plgpu.copy_smem_to_gmem(
                    c_slot,
                    dw_gmem.at[e, pl.ds(m + wg * share + i, EPILOGUE_M), pl.ds(n + j, columns)],
                )
            return carry + steps

        plgpu.wait_smem_to_gmem(0)


def _moe_gemm_gather_kernel(
    x_gmem: Any,  # [T, pieces of a row, piece]
    rows_gmem: Any,  # [M]
    plan_gmem: Any,
    taken_gmem: Any,  # [M, pieces of a row, piece]
    x_smem: Any,  # [rows, pieces of a row, piece]
    full: Any,  # [rows] barriers
) -> None:
    # --- 1. which tile
    first = lax.axis_index("block") * x_smem.shape[0]
    live = plan_gmem[LIVE, 0]
    T = x_gmem.shape[0]

    # --- 2. main loop
    for i in range(x_smem.shape[0]):

        @pl.when(first + i < live)
        def _load(i: int = i) -> None:
            row = rows_gmem[first + i]
            # Behind the last row TMA finds zeros: there goes an index that x does not have.
            row = jnp.where((row >= 0) & (row < T), row, T)
            plgpu.copy_gmem_to_smem(
                x_gmem.at[pl.ds(row, 1)],
                x_smem.at[pl.ds(i, 1)],
                full.at[i],
                oob_mode=plgpu.OOBFillMode.ZEROS,
            )

    # --- 3. epilogue: none, rows move as they are

    # --- 4. store
    for i in range(x_smem.shape[0]):

        @pl.when(first + i < live)
        def _store(i: int = i) -> None:
            plgpu.barrier_wait(full.at[i])
            plgpu.copy_smem_to_gmem(x_smem.at[i], taken_gmem.at[first + i])

    plgpu.wait_smem_to_gmem(0)


def _moe_gemm_epilogue_bwd_kernel(
    *refs: Any, activation: str | None, scaled: bool, chunk: int
) -> None:
    given = iter(refs)
    h_gmem = next(given)  # [M, N], or [M, N / 2, 2] under swiglu
    dy_gmem = next(given)  # [M, columns]
    plan_gmem = next(given)
    row_scale_gmem = next(given) if scaled else None  # [M]
    dh_gmem = next(given)  # as h
    drow_scale_gmem = next(given) if scaled else None  # [M]
    M, columns = dy_gmem.shape

    def load(ref: Any, *at: Any) -> jax.Array:
        return plgpu.load(ref.at[at], layout=ROW_LAYOUT, optimized=False).astype(jnp.float32)

    # --- 1. which tile
    @pl.loop(0, ROWS)
    def _row(i: jax.Array) -> None:
        row = lax.axis_index("block") * ROWS + i

        @pl.when(row < M)
        def _() -> None:
            scale = None if row_scale_gmem is None else row_scale_gmem[row]

            # --- 2. main loop
            def step(ni: jax.Array, dot: jax.Array) -> jax.Array:
                cols = pl.ds(ni * chunk, chunk)
                dy = load(dy_gmem, row, cols)
                da = dy if scale is None else dy * scale
                if activation:
                    gate, up = (load(h_gmem, row, cols, half) for half in range(2))
                    s = 1 / (1 + jnp.exp(-gate))
                    dh_gmem[row, cols, 0] = (da * up * s * (1 + gate * (1 - s))).astype(
                        dh_gmem.dtype
                    )
                    dh_gmem[row, cols, 1] = (da * gate * s).astype(dh_gmem.dtype)
                    return dot + dy * gate * s * up
                dh_gmem[row, cols] = da.astype(dh_gmem.dtype)
                return dot + dy * load(h_gmem, row, cols)

            zero = plgpu.layout_cast(jnp.zeros((chunk,), jnp.float32), ROW_LAYOUT)
            dot = lax.fori_loop(0, columns // chunk, step, zero)

            # --- 3. epilogue
            total = dot.sum()

            # --- 4. store
            if drow_scale_gmem is not None:
                drow_scale_gmem[row] = jnp.where(row < plan_gmem[LIVE, 0], total, 0.0)


def _moe_gemm_dbias_kernel(
    dh_gmem: Any,  # [M, N]
    plan_gmem: Any,
    dbias_gmem: Any,  # [E, N]
    *,
    chunk: int,
) -> None:
    # --- 1. which tile
    e = lax.axis_index("expert")
    cols = pl.ds(lax.axis_index("columns") * chunk, chunk)
    start, stop = plan_gmem[EXPERT_START, e], plan_gmem[EXPERT_STOP, e]

    # --- 2. main loop
    def step(ki: jax.Array, total: jax.Array) -> jax.Array:
        row = start + ki * ROWS
        values = [
            plgpu.load(
                dh_gmem.at[jnp.minimum(row + i, stop - 1), cols], layout=ROW_LAYOUT, optimized=False
            )
            for i in range(ROWS)
        ]
        for i, value in enumerate(values):
            total += jnp.where(row + i < stop, value.astype(jnp.float32), 0.0)
        return total

    zero = plgpu.layout_cast(jnp.zeros((chunk,), jnp.float32), ROW_LAYOUT)
    total = lax.fori_loop(0, (stop - start + ROWS - 1) // ROWS, step, zero)

    # --- 3. epilogue
    dbias = total.astype(dbias_gmem.dtype)

    # --- 4. store
    dbias_gmem[e, cols] = dbias


def _moe_gemm_gather_bwd_kernel(
    dxr_gmem: Any,  # [M, K]
    order_gmem: Any,  # [2, M]: rows in ascending order, and where in `rows` each of them was
    plan_gmem: Any,
    dx_gmem: Any,  # [T, K]
    *,
    chunk: int,
) -> None:
    M, T = dxr_gmem.shape[0], dx_gmem.shape[0]
    cols = pl.ds(lax.axis_index("columns") * chunk, chunk)
    live = plan_gmem[LIVE, 0]

    # --- 1. which tile
    @pl.loop(0, ROWS)
    def _token(i: jax.Array) -> None:
        t = lax.axis_index("block") * ROWS + i

        def halve(_: Any, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            below, above = bounds
            middle = (below + above) // 2
            before = order_gmem[0, jnp.minimum(middle, M - 1)] < t
            more = below < above
            return (
                jnp.where(more & before, middle + 1, below),
                jnp.where(more & ~before, middle, above),
            )

        @pl.when(t < T)
        def _() -> None:
            bounds = (jnp.int32(0), jnp.int32(M))
            start, _ = lax.fori_loop(0, M.bit_length(), halve, bounds)

            # --- 2. main loop
            def mine(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
                at = jnp.minimum(carry[0], M - 1)
                # A row's places are in ascending order, those of dead rows last.
                return (carry[0] < M) & (order_gmem[0, at] == t) & (order_gmem[1, at] < live)

            def add(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                at, total = carry
                row = plgpu.load(
                    dxr_gmem.at[order_gmem[1, at], cols], layout=ROW_LAYOUT, optimized=False
                )
                return at + 1, total + row.astype(jnp.float32)

            zero = plgpu.layout_cast(jnp.zeros((chunk,), jnp.float32), ROW_LAYOUT)
            _, total = lax.while_loop(mine, add, (start, zero))

            # --- 3. epilogue
            dx = total.astype(dx_gmem.dtype)

            # --- 4. store
            dx_gmem[t, cols] = dx


def _store_slots(slots: tuple[int, int], dtype: Any) -> Any:
    """Shared memory for pieces on their way out. Rows are not tiled: a store starts at any, at a
    multiple of 128 bytes as TMA wants it."""
    columns = EPILOGUE_BYTES * 8 // _lib.bits(dtype)
    transforms = (plgpu.SwizzleTransform(EPILOGUE_BYTES),)
    return plgpu.SMEM((*slots, EPILOGUE_M, columns), dtype, transforms=transforms)


def _ring(
    config: Config,
    tiles: tuple[tuple[int, int], ...],
    dtype: Any,
    out_dtype: Any,
    slots: int | None = None,
) -> list[Any]:
    """Shared memory and barriers of the two products: slots, pieces to store, full and free.

    What the ring leaves of shared memory holds pieces, at most a whole tile: the more there is, the
    less the warpgroups wait for their stores before they go on to the next tile.
    """
    columns = EPILOGUE_BYTES * 8 // _lib.bits(out_dtype)
    if slots is None:
        ring = config.stages * sum(rows * cols for rows, cols in tiles) * _lib.bits(dtype) // 8
        left = (SHARED_BYTES - ring) // (config.warpgroups * EPILOGUE_M * EPILOGUE_BYTES)
        pieces = config.block_m // (config.warpgroups * EPILOGUE_M) * config.block_n // columns
        slots = max(2, min(left, pieces))
    barrier = (
        functools.partial(plgpu.ClusterBarrier, collective_axes=("cluster",))
        if config.cluster > 1
        else plgpu.Barrier
    )
    return [
        *(
            plgpu.SMEM((config.stages, *tile), dtype, transforms=_lib.swizzled(dtype))
            for tile in tiles
        ),
        _store_slots((config.warpgroups, slots), out_dtype),
        plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
        barrier(num_arrivals=config.warpgroups, num_barriers=config.stages),
    ]


def _launch(
    kernel: Any, name: str, config: Config, out_type: Any, scratch: list[Any], *arrays: Any
) -> Any:
    clustered = config.cluster > 1
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch,
        grid=(_lib.num_sms() // config.cluster,),
        grid_names=("sm",),
        cluster=(config.cluster,) if clustered else (),
        cluster_names=("cluster",) if clustered else (),
        num_threads=config.warpgroups + 1,
        thread_name="wg",
        compiler_params=PARAMS,
        kernel_name=name,
    )(*arrays)


def _pitch(columns: int, dtype: Any, unit: int = 0) -> int:
    """Columns, up to where the next row of an array that TMA writes may start."""
    unit = unit or 128 // _lib.bits(dtype)
    return _lib.cdiv(columns, unit) * unit


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
    pitch: int = 0,
) -> list[jax.Array]:
    """[y], or with `keep` [y, h]. Rows are a multiple of 16 bytes, and of `pitch` columns: those
    beyond the last one are not written."""
    K, N = w.shape[:0:-1] if transpose_w else w.shape[1:]
    columns = N // 2 if activation else N
    out_type = [jax.ShapeDtypeStruct((M, _pitch(columns, out_dtype, pitch)), out_dtype)]
    tile_w = (config.block_k, config.block_n)
    tiles = ((config.block_m, config.block_k), tile_w[::-1] if transpose_w else tile_w)
    # What becomes of h on its way to y shares the shared memory with y's stores.
    scratch = _ring(config, tiles, x.dtype, out_dtype, 1 if activation or keep else None)
    if keep:
        out_type.append(jax.ShapeDtypeStruct((M, _pitch(N, x.dtype)), x.dtype))
        scratch.append(_store_slots((config.warpgroups, 1), x.dtype))
    if activation:
        pairs = (config.warpgroups, EPILOGUE_M, PAIR_PITCH, 2)
        scratch.append(plgpu.SMEM(pairs, jnp.float32))
    arrays = [_lib.pad(x, 8, 64), _lib.pad(w, 8, 64), plan]
    if bias is not None:
        arrays.append(_lib.pad(bias, config.block_n * config.cluster))
    if row_scale is not None:
        arrays.append(jnp.pad(row_scale, (0, config.block_m)))  # a tile hangs over the last row
    kernel = functools.partial(
        _moe_gemm_kernel,
        N=N,
        K=K,
        config=config,
        transpose_w=transpose_w,
        activation=activation,
        biased=bias is not None,
        scaled=row_scale is not None,
        kept=keep,
    )
    return _launch(kernel, "moe_gemm_kernel", config, out_type, scratch, *arrays)


def _product_dw(
    x: jax.Array, dy: jax.Array, plan: Any, out_dtype: Any, config: Config, E: int, K: int, N: int
) -> jax.Array:
    """Each expert's rows of x, transposed, times its rows of dy; both may have more columns."""
    tiles = ((config.block_k, config.block_m), (config.block_k, config.block_n))
    return _launch(
        functools.partial(_moe_gemm_dw_kernel, N=N, K=K, config=config),
        "moe_gemm_dw_kernel",
        config,
        jax.ShapeDtypeStruct((E, K, _pitch(N, out_dtype)), out_dtype),
        [*_ring(config, tiles, x.dtype, out_dtype), plgpu.Barrier(num_arrivals=config.warpgroups)],
        _lib.pad(x, 8, 64),
        _lib.pad(dy, 8, 64),
        plan,
    )[:, :, :N]


def _chunk(columns: int) -> int:
    """Columns, a multiple of 128, that a warpgroup works at together."""
    return next(chunk for chunk in (1024, 512, 256, 128) if columns % chunk == 0)


def _launch_rows(
    kernel: Any,
    name: str,
    grid: tuple[int, ...],
    names: tuple[str, ...],
    out_type: Any,
    *arrays: Any,
) -> Any:
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=grid,
        grid_names=names,
        compiler_params=PARAMS,
        kernel_name=name,
    )(*arrays)


def _gathered(x: jax.Array, rows: jax.Array | None, plan: jax.Array) -> jax.Array:
    """x[rows], as far as rows are alive; zeros for an index that x does not have."""
    if rows is None:
        return x
    (pieces,) = _lib.row_pieces(x)
    row = pieces.shape[1:]
    M = _lib.cdiv(rows.shape[0], ALIGN) * ALIGN
    block = max(1, min(ROWS, SHARED_BYTES // (row[0] * row[1] * _lib.bits(x.dtype) // 8)))
    taken = plgpu.kernel(
        _moe_gemm_gather_kernel,
        out_type=jax.ShapeDtypeStruct((M, *row), x.dtype),
        scratch_types=[plgpu.SMEM((block, *row), x.dtype), plgpu.Barrier(num_barriers=block)],
        grid=(_lib.cdiv(rows.shape[0], block),),
        grid_names=("block",),
        compiler_params=PARAMS,
        kernel_name="moe_gemm_gather_kernel",
    )(pieces, rows, plan)
    return taken.reshape(M, -1)


def _gathered_bwd(dxr: jax.Array, rows: jax.Array, plan: jax.Array, T: int, K: int) -> jax.Array:
    """For each row of x the sum of the rows that took it, in their order."""
    order = lax.sort((rows, lax.iota(jnp.int32, rows.shape[0])), num_keys=1, is_stable=True)
    columns = dxr.shape[1]
    chunk = _chunk(columns)
    dx = _launch_rows(
        functools.partial(_moe_gemm_gather_bwd_kernel, chunk=chunk),
        "moe_gemm_gather_bwd_kernel",
        (_lib.cdiv(T, ROWS), columns // chunk),
        ("block", "columns"),
        jax.ShapeDtypeStruct((T, columns), dxr.dtype),
        dxr,
        lax.concatenate([part[None] for part in order], 0),
        plan,
    )
    return dx[:, :K]


def _epilogue_bwd(
    h: jax.Array,
    dy: jax.Array,
    row_scale: jax.Array | None,
    plan: jax.Array,
    activation: str | None,
) -> list[jax.Array]:
    """[dh], or [dh, drow_scale]; dh may have more columns than h."""
    M, N = h.shape
    dy = _lib.pad(dy, _lib.WARPGROUP)
    h = _lib.pad(h.reshape(M, N // 2, 2), _lib.WARPGROUP, 1) if activation else _lib.pad(h, 128)
    out_type = [jax.ShapeDtypeStruct(h.shape, h.dtype)]
    arrays = [h, dy, plan]
    if row_scale is not None:
        out_type.append(jax.ShapeDtypeStruct((M,), jnp.float32))
        arrays.append(row_scale)
    kernel = functools.partial(
        _moe_gemm_epilogue_bwd_kernel,
        activation=activation,
        scaled=row_scale is not None,
        chunk=_chunk(dy.shape[1]),
    )
    name = "moe_gemm_epilogue_bwd_kernel"
    dh, *drow_scale = _launch_rows(
        kernel, name, (_lib.cdiv(M, ROWS),), ("block",), out_type, *arrays
    )
    return [dh.reshape(M, -1), *drow_scale]


def _dbias(dh: jax.Array, plan: jax.Array, bias: jax.Array) -> jax.Array:
    dh = _lib.pad(dh, _lib.WARPGROUP)
    chunk = min(256, _chunk(dh.shape[1]))
    return _launch_rows(
        functools.partial(_moe_gemm_dbias_kernel, chunk=chunk),
        "moe_gemm_dbias_kernel",
        (bias.shape[0], dh.shape[1] // chunk),
        ("expert", "columns"),
        jax.ShapeDtypeStruct((bias.shape[0], dh.shape[1]), bias.dtype),
        dh,
        plan,
    )[:, : bias.shape[1]]


def _moe_gemm_check_kernel(
    sizes_gmem: Any,  # [a multiple of 128], zeros at the end
    rows_gmem: Any,  # [a multiple of 128], zeros at the end
    found_gmem: Any,  # [128]: the first bad expert, sum(sizes), the first bad row
    *,
    T: int,
) -> None:
    # --- 1. which tile
    layout = plgpu.Layout.WG_STRIDED((_lib.WARPGROUP,), 1)
    lane = plgpu.broadcasted_iota(jnp.int32, (_lib.WARPGROUP,), 0, layout=layout)
    most = jnp.iinfo(jnp.int32).max

    def chunk(ref: Any, i: Any) -> Any:
        at = ref.at[pl.ds(i * _lib.WARPGROUP, _lib.WARPGROUP)]
        return plgpu.load(at, layout=layout), i * _lib.WARPGROUP + lane

    # --- 2. main loop
    def expert(i: Any, carry: Any) -> Any:
        bad, total = carry
        size, index = chunk(sizes_gmem, i)
        return jnp.minimum(bad, jnp.where(size < 0, index, most)), total + jnp.maximum(size, 0)

    def row(i: Any, bad: Any) -> Any:
        taken, index = chunk(rows_gmem, i)
        wrong = (index < live) & ((taken < 0) | (taken >= T))
        return jnp.minimum(bad, jnp.where(wrong, index, most))

    none = plgpu.layout_cast(jnp.full((_lib.WARPGROUP,), most, jnp.int32), layout)
    chunks = [ref.shape[0] // _lib.WARPGROUP for ref in (sizes_gmem, rows_gmem)]
    bad_size, total = lax.fori_loop(0, chunks[0], expert, (none, jnp.zeros_like(none)))
    live = total.sum()
    bad_row = lax.fori_loop(0, chunks[1], row, none)

    # --- 3. epilogue
    found = jnp.where(lane == 0, bad_size.min(), jnp.where(lane == 1, live, bad_row.min()))

    # --- 4. store
    found_gmem[...] = found


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
    none = jnp.zeros(_lib.WARPGROUP, jnp.int32)
    found = plgpu.kernel(
        functools.partial(_moe_gemm_check_kernel, T=1 if rows is None else T),
        out_type=jax.ShapeDtypeStruct((_lib.WARPGROUP,), jnp.int32),
        grid=(1,),
        grid_names=("block",),
        kernel_name="moe_gemm_check_kernel",
    )(_lib.pad(sizes, _lib.WARPGROUP), none if rows is None else _lib.pad(rows, _lib.WARPGROUP))
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
    if config is not None and config.decode:
        raise NotImplementedError(
            "config: decode=True is written in Triton only so far; decode=False computes the same"
        )
    K, N = w.shape[:0:-1] if transpose_w else w.shape[1:]
    M, E = x.shape[0] if rows is None else rows.shape[0], w.shape[0]
    columns = N // 2 if activation else N
    keep = keep and (activation is not None or row_scale is not None)
    if 0 in (M, N, K, E) or x.shape[0] == 0:
        return jnp.zeros((M, columns), out_dtype), jnp.zeros((M, N), x.dtype) if keep else None
    if config is None:
        config = default_config(M, N, K, E, x.dtype)
        if activation or keep:  # which need shared memory of their own
            config = replace(config, stages=3, block_n=_lib.cdiv(config.block_n, 128) * 128)
    if activation and config.block_n % 128:
        raise ValueError(
            f"config: expected a block_n of 128 columns or a multiple under swiglu, "
            f"got {config.block_n}"
        )
    plan = _plan(sizes, M, config.block_m)
    y, *h = _product(
        _gathered(x, rows, plan),
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
    if config is not None and config.decode:
        raise ValueError("config: expected one without decode for the gradients")
    K, N = w.shape[:0:-1] if transpose_w else w.shape[1:]
    (M, _), E, T = dy.shape, w.shape[0], x.shape[0]
    dy = dy.astype(x.dtype)
    if 0 in (M, N, K, E, T):
        given = [x, w, *(array for array in (bias, row_scale) if array is not None)]
        return tuple(jnp.zeros(array.shape, array.dtype) for array in given)
    of_dx = config or default_config(M, K, N, E, x.dtype)
    of_dw = config or default_config(M, *((K, N) if transpose_w else (N, K)), E, x.dtype, dw=True)
    plan = _plan(sizes, M, of_dx.block_m)
    dh, drow_scale = dy, []
    if h is not None:
        dh, *drow_scale = _epilogue_bwd(h, dy, row_scale, plan, activation)
    pitch = 0 if rows is None else _lib.WARPGROUP
    (dx,) = _product(dh, w, plan, x.dtype, of_dx, not transpose_w, M=M, pitch=pitch)
    dx = dx[:, :K] if rows is None else _gathered_bwd(dx, rows, plan, T, K)
    taken = _gathered(x, rows, plan)
    dw = (
        _product_dw(dh, taken, plan, w.dtype, of_dw, E, N, K)
        if transpose_w
        else _product_dw(taken, dh, plan, w.dtype, of_dw, E, K, N)
    )
    dbias = [] if bias is None else [_dbias(dh, plan, bias)]
    return _lib.vary_alike(dx, dw, *dbias, *drow_scale, x)[:-1]


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
    if config is not None and config.decode:
        raise ValueError("config: expected one without decode for the gradients")
    x, dy, sizes = _lib.vary_alike(x, dy.astype(x.dtype), sizes)
    (M, K), N, E = x.shape, dy.shape[1], sizes.shape[0]
    if 0 in (M, N, K, E):
        return jnp.zeros((E, K, N), out_dtype)
    config = config or default_config(M, N, K, E, x.dtype, dw=True)
    plan = _plan(sizes, M, config.block_m)
    return _lib.vary_alike(_product_dw(x, dy, plan, out_dtype, config, E, K, N), x)[0]


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
    dbias = None if bias is None else more.pop(0)
    drow_scale = None if row_scale is None else more.pop(0)
    return dx, dw, None, None, dbias, drow_scale


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

    Raises ValueError for a wrong rank or size, TypeError for a wrong dtype or config, and
    NotImplementedError for a Config with decode.
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
