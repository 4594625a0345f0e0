"""Gradient of the weights: a product over the rows of each expert, so over a ragged axis.

    dw[e] = x[rows of e]^T @ dy[rows of e]      zeros for an expert without rows

    for each tile of dw of this block, expert after expert:
        memory warpgroup:   for each slot of rows: wait until it is free; TMA x and dy into it;
                            clear what is another expert's in the slot before
        compute warpgroups: for each slot of rows: wait until it is full;
                            acc += x_rows^T @ dy_rows; free it
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


# 8 rows of 64 columns, a quarter of it in each warp
GROUP_LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((ALIGN, 64), (2, 64), (4,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)


def _clear_rows(tile_smem: Any, lo: Any, hi: Any) -> None:
    """Zeros in the rows of a tile before lo, at most 7, and from hi on, NaN or not."""
    rows, columns = tile_smem.shape

    def clear(first: Any) -> None:
        for column in range(0, columns, 64):
            piece = tile_smem.at[pl.ds(first, ALIGN), pl.ds(column, 64)]
            at = first + plgpu.broadcasted_iota(jnp.int32, (ALIGN, 64), 0, layout=GROUP_LAYOUT)
            values = plgpu.load(piece, layout=GROUP_LAYOUT)
            piece[...] = jnp.where((at >= lo) & (at < hi), values, jnp.zeros_like(values))

    @pl.when(lo > 0)
    def _first() -> None:
        clear(0)

    @pl.loop(lax.div(hi, ALIGN), rows // ALIGN)
    def _last(group: jax.Array) -> None:
        clear(pl.multiple_of(group * ALIGN, ALIGN))


def _moe_gemm_dw_kernel(
    x_gmem: Any,  # [M, K]
    dy_gmem: Any,  # [M, N]
    plan_gmem: Any,
    dw_gmem: Any,  # [E, K, N]
    x_smem: Any,  # [stages, block_k, block_m]
    dy_smem: Any,  # [stages, block_k, block_n]
    full: Any,  # [2 * stages] barriers: the slot can be read; TMA has filled it
    free: Any,  # [stages] barriers: every reader is done with the slot
    c_smem: Any,  # [warpgroups, slots, 64, columns of 128 bytes]
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

    def each_tile(body: Callable[..., None]) -> tuple[jax.Array, ...]:
        """Calls body with the steps before it and its own, the tile's place, its first row, and
        which rows of its slot ki are the expert's: from lo on, up to hi; of the slot before them
        with ki = -1. Returns all steps, and lo and hi of the last."""

        def extent(t: jax.Array) -> tuple[jax.Array, jax.Array]:
            e = jnp.minimum(lax.div(t, num_m * num_n), num_e - 1)
            return plan_gmem[EXPERT_START, e], plan_gmem[EXPERT_STOP, e]

        here = extent(lax.axis_index("sm"))
        none = (jnp.int32(0), jnp.int32(0), jnp.int32(block_k))

        @plgpu.nd_loop((num_e * num_m * num_n,), collective_axes="sm", init_carry=(*none, *here))
        def end(tile: plgpu.NDLoopInfo, carry: Any) -> Any:
            # --- 1. which tile
            done, *before, start, stop = carry
            following = extent(tile.index[0] + lax.axis_size("sm"))  # comes while this one is done
            e, within = lax.div(tile.index[0], num_m * num_n), lax.rem(tile.index[0], num_m * num_n)
            height = max(1, config.group_m // cluster)
            mi, ni = plgpu.planar_snake(within, (num_m, num_n), 0, height)
            if cluster > 1:
                mi = mi * cluster + lax.axis_index("cluster")
            top = pl.multiple_of(lax.div(start, ALIGN) * ALIGN, ALIGN)
            steps = jnp.where(stop > start, lax.div(stop - top + block_k - 1, block_k), 0)

            def own(ki: Any) -> list[jax.Array]:
                here = (start - top - ki * block_k, stop - top - ki * block_k)
                return [jnp.where(ki < 0, *pair) for pair in zip(before, here, strict=True)]

            body(done, steps, e, mi * block_m, ni * block_n, top, own)
            # Steps are counted across tiles: the ring does not stop between them.
            return done + steps, *own(steps - 1), *following

        return end[:3]

    def mixed(lo: Any, hi: Any) -> Any:
        """Whether a slot holds rows of other experts too."""
        return (lo > 0) | (hi < block_k)

    def slot_of(step: jax.Array) -> jax.Array:
        return lax.rem(step, jnp.int32(stages))

    @pl.when(wg == config.warpgroups)
    def _memory() -> None:
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

        def clear(step: Any, lo: Any, hi: Any) -> None:
            """A slot that TMA has filled with rows of other experts too: those become zeros."""

            @pl.when(mixed(lo, hi))
            def _clear() -> None:
                slot = slot_of(step)
                plgpu.barrier_wait(full.at[stages + slot])
                for smem in (x_smem, dy_smem):
                    _clear_rows(smem.at[slot], lo, hi)
                plgpu.commit_smem()
                for _ in range(2):
                    plgpu.barrier_arrive(full.at[slot])

        def tile(done: Any, steps: Any, e: Any, m: Any, n: Any, top: Any, own: Any) -> None:
            del e

            @pl.loop(0, steps)
            def _load(ki: jax.Array) -> None:
                slot = slot_of(done + ki)
                ks = pl.ds(top + ki * block_k, block_k)
                filled = full.at[slot + jnp.where(mixed(*own(ki)), stages, 0)]
                plgpu.barrier_wait(free.at[slot])
                plgpu.copy_gmem_to_smem(x_gmem.at[ks, pl.ds(m, block_m)], x_smem.at[slot], filled)
                # The blocks of a cluster compute the same columns: each fetches a share of dy's
                # tile and sends it to all.
                plgpu.copy_gmem_to_smem(
                    dy_gmem.at[ks, pl.ds(n, block_n)],
                    dy_smem.at[slot],
                    filled,
                    collective_axes="cluster" if cluster > 1 else None,
                )
                plgpu.commit_smem()  # a barrier: no warp may fall a whole turn of the ring behind
                clear(done + ki - 1, *own(ki - 1))  # its rows have come; these are on their way

        done, *last = each_tile(tile)
        clear(done - 1, *last)

        # A barrier may not go away, nor a neighbour's arrival come, after its block has ended.
        for slot in range(stages):
            plgpu.barrier_wait(free.at[slot])

    @pl.when(wg < config.warpgroups)
    def _compute() -> None:
        ready_to_compute(config, free)

        @each_tile
        def _tile(done: Any, steps: Any, e: Any, m: Any, n: Any, top: Any, own: Any) -> None:
            del top, own

            def accumulate(acc: Any) -> jax.Array:
                # --- 2. main loop
                @pl.loop(0, steps)
                def _step(ki: jax.Array) -> None:
                    slot = slot_of(done + ki)
                    plgpu.barrier_wait(full.at[slot])
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


def ring(config: Any, tiles: tuple[tuple[int, int], ...], dtype: Any, full: int = 1) -> Any:
    """Shared memory and barriers of the two products: slots, `full` barriers for each slot, free
    ones; and the bytes of shared memory that are left."""
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
        plgpu.Barrier(num_arrivals=2, num_barriers=full * config.stages),
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
    if config.block_m % rows_each or config.block_n > 256 or config.stages < 3:
        # A slot is cleared once the next one is on its way, and the one before it still in use.
        raise ValueError(
            f"config: expected a multiple of {rows_each} rows, at most 256 columns and at least 3 "
            f"stages for dw, got {config}"
        )
    tiles = ((config.block_k, config.block_m), (config.block_k, config.block_n))
    scratch, left = ring(config, tiles, x.dtype, full=2)
    # Pieces to store, at most a whole tile: those wait for none of their own stores.
    columns = EPILOGUE_BYTES * 8 // _lib.bits(out_dtype)
    slots = left // (config.warpgroups * EPILOGUE_M * EPILOGUE_BYTES)
    slots = max(1, min(slots, config.block_n // columns))
    pieces = (config.warpgroups, slots, EPILOGUE_M, columns)
    transforms = (plgpu.SwizzleTransform(EPILOGUE_BYTES),)
    scratch.append(plgpu.SMEM(pieces, out_dtype, transforms=transforms))
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
