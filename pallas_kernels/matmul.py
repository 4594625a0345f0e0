"""Matrix product: warp-specialized, persistent, TMA and wgmma, through a ring of shared memory.

    c[m, n] = sum_k a[m, k] * b[k, n]                       accumulated in float32, rounded once

    for each output tile of this block, in an order that keeps its neighbours' operands in L2:
        memory warpgroup:   for each k: wait until the slot is free; TMA a and b tiles into it
        compute warpgroups: for each k: wait until the slot is full; acc += a_tile @ b_tile; free it
                            store acc in 64-row pieces, while the ring fills for the next tile

One ring serves all tiles of a block, so the memory warpgroup is already loading the next tile while
the compute warpgroups store this one. The gradients are the same kernel: an operand stored
transposed is read through a transposed view of shared memory, which 16-bit wgmma takes as it is.

Limits: Hopper; bfloat16 and float16 operands. Rows that do not start at multiples of 16 bytes are
padded first, in XLA.

Twin: triton_kernels/matmul.py.

Sources: the roles of the warpgroups and the ring of full and free barriers follow CUTLASS's
persistent warp-specialized kernels; raster and sub-tiled epilogue follow JAX's own Hopper example
(jax.experimental.pallas.ops.gpu.hopper_matmul_mgpu).
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

DTYPES = (jnp.bfloat16, jnp.float16)
EPILOGUE_M = 64  # rows of one store: those of one wgmma instruction
EPILOGUE_BYTES = 128  # bytes of one row of a store: one swizzle row
MEMORY_REGISTERS = 40  # of a thread that only issues copies; of 512, the others share what is left


@dataclass(frozen=True)
class Config:
    """Tile sizes and resources of the kernel; the result does not depend on them.

    block_m, block_n, block_k: sizes of the tile of c that a block of threads computes, and of the
        slice of k in one slot of the ring.
    stages: slots of the ring.
    group_m: tiles along m that are visited before the next tile along n.
    warpgroups: compute warpgroups; each takes block_m / warpgroups rows (one more loads).
    cluster: blocks along m that share each tile of b by multicast: 1 or 2.
    """

    block_m: int = 128
    block_n: int = 256
    block_k: int = 64
    stages: int = 4
    group_m: int = 16
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


# Each with the time of one tile beside the first's: a wave of tiles with K = 4096 on an H200.
CANDIDATES = (
    # The largest tile whose float32 accumulator fits the registers of two warpgroups (128 a
    # thread), in pairs that share b: each byte fetched feeds the most multiplications.
    (Config(), 1.0),
    # A tile nearly as good, for sizes that it fits better.
    (Config(block_n=192), 0.8),
    # Half the tile and less, when there are too few to occupy the device. They feed on more
    # bytes, so more of them have to be on their way: the ring keeps its 192 KB.
    (Config(block_n=128, stages=6, group_m=8, cluster=1), 0.55),
    (Config(block_m=64, block_n=128, stages=8, group_m=8, warpgroups=1, cluster=1), 0.41),
    (Config(block_m=64, block_n=64, stages=12, group_m=8, warpgroups=1, cluster=1), 0.35),
)


def default_config(M: int, N: int, K: int, dtype: Any) -> Config:
    """The Config for a product of these sizes on a Hopper with 132 multiprocessors.

    Blocks that share the device finish in waves: the candidate with the least waves times the time
    of a tile. The length of K scales all alike.
    """
    del K, dtype

    def cost(candidate: tuple[Config, float]) -> float:
        config, time = candidate
        tiles = _lib.cdiv(M, config.block_m * config.cluster) * _lib.cdiv(N, config.block_n)
        return _lib.cdiv(tiles, 132 // config.cluster) * time

    return min(CANDIDATES, key=cost)[0]


def _matmul_kernel(
    a_gmem: Any,  # [M, K], or [K, M] when transpose_a
    b_gmem: Any,  # [K, N], or [N, K] when transpose_b
    c_gmem: Any,  # [M, N]
    a_smem: Any,  # [stages, *tile of a]
    b_smem: Any,  # [stages, *tile of b]
    c_smem: Any,  # [warpgroups, 2, 64, columns of 128 bytes]
    full: Any,  # [stages] barriers: TMA has filled the slot
    free: Any,  # [stages] barriers: every reader is done with the slot
    *,
    sizes: tuple[int, int, int],
    config: Config,
    transpose_a: bool,
    transpose_b: bool,
) -> None:
    M, N, K = sizes
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    stages, cluster = config.stages, config.cluster
    num_m = _lib.cdiv(M, block_m * cluster)
    num_n = _lib.cdiv(N, block_n)
    num_k = _lib.cdiv(K, block_k)
    wg = lax.axis_index("wg")
    rows = block_m // config.warpgroups
    columns = c_smem.shape[-1]

    def origin(tile: plgpu.NDLoopInfo) -> tuple[jax.Array, jax.Array]:
        # --- 1. which tile
        mi, ni = plgpu.planar_snake(
            tile.index[0], (num_m, num_n), 0, max(1, config.group_m // cluster)
        )
        if cluster > 1:
            mi = mi * cluster + lax.axis_index("cluster")
        return mi * block_m, ni * block_n

    def slot_of(tile: plgpu.NDLoopInfo, ki: jax.Array) -> jax.Array:
        # Steps are counted across tiles: the ring does not stop between them.
        return lax.rem(tile.local_index * num_k + ki, jnp.int32(stages))

    @pl.when(wg == config.warpgroups)
    def _memory() -> None:
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

        @plgpu.nd_loop((num_m * num_n,), collective_axes="sm")
        def _tile(tile: plgpu.NDLoopInfo) -> None:
            m, n = origin(tile)

            @pl.loop(0, num_k)
            def _load(ki: jax.Array) -> None:
                slot = slot_of(tile, ki)
                ms, ns, ks = pl.ds(m, block_m), pl.ds(n, block_n), pl.ds(ki * block_k, block_k)
                plgpu.barrier_wait(free.at[slot])
                # Beyond the edges TMA fills with zeros.
                plgpu.copy_gmem_to_smem(
                    a_gmem.at[ks, ms] if transpose_a else a_gmem.at[ms, ks],
                    a_smem.at[slot],
                    full.at[slot],
                )
                # The blocks of a cluster compute the same columns: each fetches a share of b's
                # tile and sends it to all.
                plgpu.copy_gmem_to_smem(
                    b_gmem.at[ns, ks] if transpose_b else b_gmem.at[ks, ns],
                    b_smem.at[slot],
                    full.at[slot],
                    collective_axes="cluster" if cluster > 1 else None,
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
            m, n = origin(tile)
            m += wg * rows

            def accumulate(acc: Any) -> jax.Array:
                # --- 2. main loop
                @pl.loop(0, num_k)
                def _step(ki: jax.Array) -> None:
                    slot = slot_of(tile, ki)
                    own = pl.ds(wg * rows, rows)
                    a_tile = a_smem.at[slot, :, own].T if transpose_a else a_smem.at[slot, own]
                    b_tile = b_smem.at[slot].T if transpose_b else b_smem.at[slot]
                    plgpu.barrier_wait(full.at[slot])
                    plgpu.wgmma(acc, a_tile, b_tile)
                    # This product may run on; the one before it is done, and its slot is free.
                    plgpu.wgmma_wait(1)

                    @pl.when(ki > 0)
                    def _release() -> None:
                        plgpu.barrier_arrive(free.at[slot_of(tile, ki - 1)])

                return acc[...]  # waits for the last product

            acc = pl.run_scoped(accumulate, plgpu.ACC((rows, block_n), jnp.float32))
            plgpu.barrier_arrive(free.at[slot_of(tile, jnp.int32(num_k - 1))])

            # --- 3. epilogue
            c = acc.astype(c_gmem.dtype)

            # --- 4. store
            pieces = [
                (i, j) for i in range(0, rows, EPILOGUE_M) for j in range(0, block_n, columns)
            ]
            for piece, (i, j) in enumerate(pieces):
                # Counted across tiles too; the store before the last one has read this slot.
                c_slot = c_smem.at[wg, (tile.local_index * len(pieces) + piece) & 1]
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                c_slot[...] = c[i : i + EPILOGUE_M, j : j + columns]
                plgpu.commit_smem()
                # Beyond the edges TMA drops what it is given.
                plgpu.copy_smem_to_gmem(
                    c_slot, c_gmem.at[pl.ds(m + i, EPILOGUE_M), pl.ds(n + j, columns)]
                )

        plgpu.wait_smem_to_gmem(0)


def _product(
    a: jax.Array,
    b: jax.Array,
    out_dtype: Any,
    config: Config | None,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
) -> jax.Array:
    """a @ b, where a is stored [K, M] when transpose_a and b is stored [N, K] when transpose_b."""
    K, M = a.shape if transpose_a else a.shape[::-1]
    N = b.shape[0] if transpose_b else b.shape[1]
    if 0 in (M, N, K):
        return jnp.zeros((M, N), out_dtype)
    config = config or default_config(M, N, K, a.dtype)
    pitch = 128 // _lib.bits(out_dtype)
    tile_a = (config.block_m, config.block_k)
    tile_b = (config.block_k, config.block_n)
    ring = functools.partial(plgpu.SMEM, transforms=_lib.swizzled(a.dtype))
    columns = EPILOGUE_BYTES * 8 // _lib.bits(out_dtype)
    clustered = config.cluster > 1
    barrier = (
        functools.partial(plgpu.ClusterBarrier, collective_axes=("cluster",))
        if clustered
        else plgpu.Barrier
    )
    kernel = plgpu.kernel(
        functools.partial(
            _matmul_kernel,
            sizes=(M, N, K),
            config=config,
            transpose_a=transpose_a,
            transpose_b=transpose_b,
        ),
        out_type=jax.ShapeDtypeStruct((M, _lib.cdiv(N, pitch) * pitch), out_dtype),
        scratch_types=[
            ring((config.stages, *(tile_a[::-1] if transpose_a else tile_a)), a.dtype),
            ring((config.stages, *(tile_b[::-1] if transpose_b else tile_b)), b.dtype),
            plgpu.SMEM(
                (config.warpgroups, 2, EPILOGUE_M, columns),
                out_dtype,
                transforms=(plgpu.SwizzleTransform(128),),
            ),
            plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
            barrier(num_arrivals=config.warpgroups, num_barriers=config.stages),
        ],
        grid=(_lib.num_sms() // config.cluster,),
        grid_names=("sm",),
        cluster=(config.cluster,) if clustered else (),
        cluster_names=("cluster",) if clustered else (),
        num_threads=config.warpgroups + 1,
        thread_name="wg",
        kernel_name="matmul_kernel",
    )
    c = kernel(_lib.pad(a, 8, 64), _lib.pad(b, 8, 64))[:, :N]
    return _lib.vary_alike(c, a)[0]


def matmul_fwd(
    a: jax.Array, b: jax.Array, *, out_dtype: Any = None, config: Config | None = None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """As `matmul`, and what the backward needs: res = (a, b)."""
    out_dtype = jnp.dtype(out_dtype or a.dtype)
    return _product(a, b, out_dtype, config), (a, b)


def matmul_bwd(
    res: tuple[jax.Array, jax.Array], dc: jax.Array, *, config: Config | None = None
) -> tuple[jax.Array, jax.Array]:
    """Gradients of `matmul`.

    res: (a[M, K], b[K, N]) as matmul_fwd returns it.
    dc: [M, N], the cotangent of c. A float32 one is rounded to the operands' dtype, because both
        operands of wgmma have one dtype.

    Returns (da[M, K] in a's dtype, db[K, N] in b's dtype).
    """
    a, b = res
    dc = dc.astype(a.dtype)
    da = _product(dc, b, a.dtype, config, transpose_b=True)
    db = _product(a, dc, b.dtype, config, transpose_a=True)
    return da, db


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul(a: jax.Array, b: jax.Array, out_dtype: Any, config: Config | None) -> jax.Array:
    return _product(a, b, out_dtype, config)


def _matmul_fwd(a: jax.Array, b: jax.Array, out_dtype: Any, config: Config | None) -> Any:
    return matmul_fwd(a, b, out_dtype=out_dtype, config=config)


def _matmul_bwd(out_dtype: Any, config: Config | None, res: Any, dc: jax.Array) -> Any:
    del out_dtype
    return matmul_bwd(res, dc, config=config)


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def matmul(
    a: jax.Array, b: jax.Array, *, out_dtype: Any = None, config: Config | None = None
) -> jax.Array:
    """a @ b, accumulated in float32 and rounded once. Differentiable.

    a: [M, K], bfloat16 or float16.
    b: [K, N], the same dtype.
    out_dtype: the operands' dtype (None) or float32, as a dtype or its name.
    config: tile sizes, of the forward and the backward; None takes default_config for each product.

    Returns c[M, N] in out_dtype.

    Raises ValueError for a wrong rank or size and TypeError for a wrong dtype or config.
    """
    if getattr(a, "dtype", None) == jnp.float32 or getattr(b, "dtype", None) == jnp.float32:
        raise TypeError(
            "a, b: expected dtype bfloat16 or float16, got float32, which wgmma would round to "
            "TF32 (10 bits of mantissa)"
        )
    _lib.check_array("a", a, ("M", "K"), DTYPES)
    _lib.check_array("b", b, (a.shape[1], "N"), (a.dtype,))
    out_dtype = jnp.dtype(a.dtype if out_dtype is None else out_dtype)
    if out_dtype not in (a.dtype, jnp.float32):
        raise TypeError(
            f"out_dtype: expected {jnp.dtype(a.dtype).name} or float32, got {out_dtype.name}"
        )
    _lib.check_config(config, Config)
    return _matmul(*_lib.vary_alike(a, b), out_dtype, config)
