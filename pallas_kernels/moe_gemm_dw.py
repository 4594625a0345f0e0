"""Gradient of the weights: a product over the rows of each expert, so over a ragged axis.

    dw[e] = x[rows of e]^T @ dy[rows of e]      zeros for an expert without rows

    for each tile of dw of this block, expert after expert:
        memory warpgroup:   for each slot of rows: wait until it is free; TMA x and dy into it
        compute warpgroups: for each slot of rows: wait until it is full; clear what is another
                            expert's; acc += x_rows^T @ dy_rows; free it
                            store acc

A slot starts at a multiple of 8 rows, so the first and the last one of an expert hold rows of its
neighbours, or dead ones. Zero in one operand is not enough for those: the other may be NaN.

The ring and the launch are those of moe_gemm.py too.

Twin: triton_kernels/moe_gemm_dw.py.

Sources: the order of tiles is plgpu.planar_snake; warpgroups and ring are those of
pallas_kernels/matmul.py.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import _lib
from .moe_gemm_fusions import SHARED_BYTES
from .moe_gemm_plan import ALIGN, EXPERT_START, EXPERT_STOP

EPILOGUE_M = 64  # rows of one store: those of one wgmma instruction
EPILOGUE_BYTES = 128  # bytes of one row of a store: one swizzle row
MEMORY_REGISTERS = 40  # of a thread that only issues copies; of 512, the others share what is left

# Without barriers around each access of shared memory: where lanes read what other lanes have
# written, or write what others have read, a wait or commit_smem is between, and both are barriers.
FEW_BARRIERS = plgpu.CompilerParams(
    lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
)


def _clear_rows(tile_smem: Any, row: int, part: Any, parts: int, lo: Any, hi: Any) -> None:
    """Zeros in those of 32 rows of a tile that are before lo or from hi on, NaN or not; one of
    `parts` shares of the columns."""
    layout = plgpu.Layout.SMEM_GMEM_COPY((32, 64), tile_smem.dtype, 128)
    chunks = tile_smem.shape[1] // 64
    for j in range(0, chunks, parts):

        @pl.when(j + part < chunks)
        def _clear(j: int = j) -> None:
            column = pl.multiple_of((j + part) * 64, 64)
            piece = tile_smem.at[pl.ds(row, 32), pl.ds(column, 64)]
            at = row + plgpu.broadcasted_iota(jnp.int32, (32, 64), 0, layout=layout)
            values = plgpu.load(piece, layout=layout)
            piece[...] = jnp.where((at >= lo) & (at < hi), values, jnp.zeros_like(values))


def _moe_gemm_dw_kernel(
    x_gmem: Any,  # [M, K]
    dy_gmem: Any,  # [M, N]
    plan_gmem: Any,
    dw_gmem: Any,  # [E, K, N]
    x_smem: Any,  # [stages, block_k, block_m]
    dy_smem: Any,  # [stages, block_k, block_n]
    full: Any,  # [stages] barriers: TMA has filled the slot
    free: Any,  # [stages] barriers: every reader is done with the slot
    c_smem: Any,  # [warpgroups, slots, 64, columns of 128 bytes]
    cleared: Any,  # barrier: every warpgroup has cleared its share of a slot
    *,
    N: int,
    K: int,
    config: Any,
) -> None:
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    stages, cluster = config.stages, config.cluster
    num_e = dw_gmem.shape[0]
    num_m = _lib.cdiv(K, block_m * cluster)
    num_n = _lib.cdiv(N, block_n)
    wg = lax.axis_index("wg")
    share = block_m // config.warpgroups
    columns = c_smem.shape[-1]

    def each_tile(body: Callable[..., None]) -> None:
        """Calls body with the steps before it, the tile's place, and its expert's rows."""

        def extent(t: jax.Array) -> tuple[jax.Array, jax.Array]:
            e = jnp.minimum(lax.div(t, num_m * num_n), num_e - 1)
            return plan_gmem[EXPERT_START, e], plan_gmem[EXPERT_STOP, e]

        here = extent(lax.axis_index("sm"))

        @plgpu.nd_loop(
            (num_e * num_m * num_n,), collective_axes="sm", init_carry=(jnp.int32(0), *here)
        )
        def _tile(tile: plgpu.NDLoopInfo, carry: Any) -> Any:
            # --- 1. which tile
            done, start, stop = carry
            following = extent(tile.index[0] + lax.axis_size("sm"))  # comes while this one is done
            e, within = lax.div(tile.index[0], num_m * num_n), lax.rem(tile.index[0], num_m * num_n)
            height = max(1, config.group_m // cluster)
            mi, ni = plgpu.planar_snake(within, (num_m, num_n), 0, height)
            if cluster > 1:
                mi = mi * cluster + lax.axis_index("cluster")
            top = pl.multiple_of(lax.div(start, ALIGN) * ALIGN, ALIGN)
            steps = jnp.where(stop > start, lax.div(stop - top + block_k - 1, block_k), 0)
            body(done, e, mi * block_m, ni * block_n, top, start, stop, steps)
            # Steps are counted across tiles: the ring does not stop between them.
            return done + steps, *following

    def slot_of(step: jax.Array) -> jax.Array:
        return lax.rem(step, jnp.int32(stages))

    @pl.when(wg == config.warpgroups)
    def _memory() -> None:
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

        @each_tile
        def _tile(
            done: Any, e: Any, m: Any, n: Any, top: Any, start: Any, stop: Any, steps: Any
        ) -> None:
            del e, start, stop

            @pl.loop(0, steps)
            def _load(ki: jax.Array) -> None:
                slot = slot_of(done + ki)
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
                plgpu.commit_smem()  # a barrier: no warp may fall a whole turn of the ring behind

        # A barrier may not go away, nor a neighbour's arrival come, after its block has ended.
        for slot in range(stages):
            plgpu.barrier_wait(free.at[slot])

    @pl.when(wg < config.warpgroups)
    def _compute() -> None:
        ready_to_compute(config, free)

        @each_tile
        def _tile(
            done: Any, e: Any, m: Any, n: Any, top: Any, start: Any, stop: Any, steps: Any
        ) -> None:
            def accumulate(acc: Any) -> jax.Array:
                # --- 2. main loop
                @pl.loop(0, steps)
                def _step(ki: jax.Array) -> None:
                    slot = slot_of(done + ki)
                    lo, hi = start - top - ki * block_k, stop - top - ki * block_k
                    plgpu.barrier_wait(full.at[slot])

                    @pl.when((lo > 0) | (hi < block_k))
                    def _clear() -> None:
                        for row in range(0, block_k, 32):

                            @pl.when((row < lo) | (row + 32 > hi))
                            def _rows(row: int = row) -> None:
                                for smem in (x_smem, dy_smem):
                                    tile = smem.at[slot]
                                    _clear_rows(tile, row, wg, config.warpgroups, lo, hi)

                        plgpu.commit_smem()
                        plgpu.barrier_arrive(cleared)
                        plgpu.barrier_wait(cleared)

                    own = pl.ds(wg * share, share)
                    plgpu.wgmma(acc, x_smem.at[slot, :, own].T, dy_smem.at[slot])
                    # This product may run on; the one before it is done, and its slot is free.
                    plgpu.wgmma_wait(1)

                    @pl.when(ki > 0)
                    def _release() -> None:
                        plgpu.barrier_arrive(free.at[slot_of(done + ki - 1)])

                return acc[...]  # waits for the last product

            acc = pl.run_scoped(accumulate, plgpu.ACC((share, block_n), jnp.float32))

            @pl.when(steps > 0)
            def _release() -> None:
                plgpu.barrier_arrive(free.at[slot_of(done + steps - 1)])

            # --- 3. epilogue
            dw = acc.astype(dw_gmem.dtype)

            # --- 4. store
            pieces = [
                (i, j) for i in range(0, share, EPILOGUE_M) for j in range(0, block_n, columns)
            ]
            slots = c_smem.shape[1]
            for first in range(0, len(pieces), slots):
                some = pieces[first : first + slots]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for s, (i, j) in enumerate(some):
                    c_smem.at[wg, s][...] = dw[i : i + EPILOGUE_M, j : j + columns]
                plgpu.commit_smem()
                for s, (i, j) in enumerate(some):
                    # Beyond the edges TMA drops what it is given.
                    rows = pl.ds(m + wg * share + i, EPILOGUE_M)
                    plgpu.copy_smem_to_gmem(
                        c_smem.at[wg, s], dw_gmem.at[e, rows, pl.ds(n + j, columns)]
                    )

        plgpu.wait_smem_to_gmem(0)


def ready_to_compute(config: Any, free: Any) -> None:
    """Takes the registers that the memory warpgroup leaves; every slot is free at the start."""
    plgpu.set_max_registers(
        min(232, (512 - MEMORY_REGISTERS) // config.warpgroups // 8 * 8), action="increase"
    )
    for slot in range(config.stages):
        plgpu.barrier_arrive(free.at[slot])


def ring(config: Any, tiles: tuple[tuple[int, int], ...], dtype: Any) -> tuple[list[Any], int]:
    """Shared memory and barriers of the two products: slots, full and free; and the
    bytes of shared memory that are left."""
    taken = config.stages * sum(rows * cols for rows, cols in tiles) * _lib.bits(dtype) // 8
    barrier = (
        functools.partial(plgpu.ClusterBarrier, collective_axes=("cluster",))
        if config.cluster > 1
        else plgpu.Barrier
    )
    found = [
        *(
            plgpu.SMEM((config.stages, *tile), dtype, transforms=_lib.swizzled(dtype))
            for tile in tiles
        ),
        plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
        barrier(num_arrivals=config.warpgroups, num_barriers=config.stages),
    ]
    return found, SHARED_BYTES - taken


def launch(
    kernel: Any,
    name: str,
    config: Any,
    out_type: Any,
    scratch: list[Any],
    *arrays: Any,
    params: Any = FEW_BARRIERS,
) -> Any:
    """One block on each multiprocessor, and in it the compute warpgroups and one for memory."""
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
        compiler_params=params,
        kernel_name=name,
    )(*arrays)


def pitch(columns: int, dtype: Any, unit: int = 0) -> int:
    """Columns, up to where the next row of an array that TMA writes may start."""
    unit = unit or 128 // _lib.bits(dtype)
    return _lib.cdiv(columns, unit) * unit


def product_dw(
    x: jax.Array, dy: jax.Array, plan: Any, out_dtype: Any, config: Any, E: int, K: int, N: int
) -> jax.Array:
    """Each expert's rows of x, transposed, times its rows of dy; both may have more columns."""
    rows_each = EPILOGUE_M * config.warpgroups
    if config.block_m % rows_each or config.block_n > 256:
        raise ValueError(
            f"config: expected a multiple of {rows_each} rows and at most 256 columns for dw, "
            f"got {config.block_m} and {config.block_n}"
        )
    tiles = ((config.block_k, config.block_m), (config.block_k, config.block_n))
    scratch, left = ring(config, tiles, x.dtype)
    # Pieces to store, at most a whole tile: those wait for none of their own stores.
    columns = EPILOGUE_BYTES * 8 // _lib.bits(out_dtype)
    slots = left // (config.warpgroups * EPILOGUE_M * EPILOGUE_BYTES)
    slots = max(1, min(slots, config.block_n // columns))
    pieces = (config.warpgroups, slots, EPILOGUE_M, columns)
    transforms = (plgpu.SwizzleTransform(EPILOGUE_BYTES),)
    scratch.append(plgpu.SMEM(pieces, out_dtype, transforms=transforms))
    scratch.append(plgpu.Barrier(num_arrivals=config.warpgroups))
    return launch(
        functools.partial(_moe_gemm_dw_kernel, N=N, K=K, config=config),
        "moe_gemm_dw_kernel",
        config,
        jax.ShapeDtypeStruct((E, K, pitch(N, out_dtype)), out_dtype),
        scratch,
        _lib.pad(x, 8, 64),
        _lib.pad(dy, 8, 64),
        plan,
    )[:, :, :N]
