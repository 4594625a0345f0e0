"""e4m3 with a scale for each 1 x 128, 128 x 1 or 128 x 128 elements.

    scale[b] = max(max_b |x|, 1e-4) / 448                 over block b; ue8m0: up to a power of two
    q[m, k] = e4m3(x[m, k] * (1 / scale[b]))              ties to even

    rows    1 x 128    activations, along what a product sums over: scale [M, K / 128]
    cols    128 x 1    the same for a product that sums over tokens: scale [M / 128, K]
    blocks  128 x 128  weights: scale [ceil(N / 128), ceil(K / 128)]

    each warpgroup takes 128 columns of a tile of rows, which TMA brings to shared memory:
        top = max |x| along 128 columns, within a warp; along rows, between warps: through shared
        memory, where each warp reads the rows of the others
        scale; its reciprocal; codes, into a slot of their own, which TMA stores

A division for the scale, a reciprocal, a product, each rounded to float32, then the cast: those are
DeepGEMM's operations, and codes agree bit for bit. Nothing exceeds 448 but what is infinite.

Limits: Hopper; bfloat16 and float16. Columns that 128 does not divide are padded first, in XLA.

Twin: triton_kernels/fp8_quantize.py.

Sources: DeepSeek-V3 (arXiv:2412.19437), section 3.3, for the blocks; DeepGEMM for the roundings.
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
BLOCK = 128


@dataclass(frozen=True)
class Config:
    """Tile sizes and resources of the kernel; the result does not depend on them.

    block_m: rows of a tile, 128 or 256; 128 where so many share a scale.
    block_n: its columns, 128 for each warpgroup.
    """

    block_m: int = 128
    block_n: int = 128

    def __post_init__(self) -> None:
        if self.block_m not in (128, 256):
            raise ValueError(f"block_m: expected 128 or 256, got {self.block_m}")
        if self.block_n < 128 or self.block_n % 128:
            raise ValueError(f"block_n: expected a multiple of 128, got {self.block_n}")


def default_config(M: int, K: int, dtype: Any, which: str = "rows") -> Config:
    """The Config for x [M, K] on a Hopper; which: "rows", "rows_transposed", "cols" or "blocks"."""
    del M, K, dtype, which
    # 48 KB of shared memory: four blocks of one warpgroup, some load while others compute.
    return Config(128, 128)


def _leading_bits(x: Any) -> Any:
    """x cut off after the first 12 bits of its significand."""
    bits = lax.bitcast_convert_type(x, jnp.int32) & -4096
    return lax.bitcast_convert_type(bits, jnp.float32)


def _scale(top: Any, ue8m0: bool) -> Any:
    """max(top, 1e-4) / 448, correctly rounded, for a top of at most 11 bits.

    1 / 448 is 585 / 2^18 and a 448th of 2^-12 (its bits repeat); the product with 585 is exact.
    Mosaic's own division is two units off.
    """
    scale = top * (585 / 2**18) + top * (1 / (448 * 2**12))
    scale = jnp.maximum(scale, 1e-4 / 448)
    if not ue8m0:
        return scale
    bits = lax.bitcast_convert_type(scale, jnp.int32) & 0x7FFFFFFF  # a NaN may have a sign
    power = lax.bitcast_convert_type((bits + 0x7FFFFF) & 0x7F800000, jnp.float32)
    return jnp.where(bits < 0x7F800000, power, jnp.nan)


def _reciprocal(scale: Any) -> Any:
    """1 / scale, correctly rounded for every scale there is (a test goes through them).

    A step of Newton's from Mosaic's quotient, two units off. What is left of 1 is taken in products
    of 12 bits each, which are exact: it does not matter whether a compiler fuses them.
    """
    bits = lax.bitcast_convert_type(scale, jnp.int32)
    # By a power of two, so that nothing leaves float32's range.
    power = lax.bitcast_convert_type((254 << 23) - (bits & 0x7F800000), jnp.float32)
    divisor = scale * power
    first = _leading_bits(divisor)
    last = divisor - first
    inverse = 1.0 / divisor
    high = _leading_bits(inverse)
    low = inverse - high
    left = 1.0 - high * first - high * last - low * first - low * last
    inverse = (inverse + left * inverse) * power
    # 1 / infinity
    return jnp.where(bits == 0x7F800000, 0.0, inverse)


def _fp8_quantize_kernel(
    x_gmem: Any,
    q_gmem: Any,
    scale_gmem: Any,
    x_smem: Any,
    q_smem: Any,
    *scratch: Any,
    which: str,
    ue8m0: bool,
    config: Config,
) -> None:
    *between_warps, full = scratch
    runs, layout = _lib.piece_tile(BLOCK, x_smem.dtype)
    tiles = range(config.block_m // runs)

    # --- 1. which tile
    wg = lax.axis_index("wg")
    mi, ki = lax.axis_index("m"), lax.axis_index("n") * (config.block_n // BLOCK) + wg
    start = mi * config.block_m
    # Beyond the last row and column TMA loads zeros and stores nothing.
    tile = (pl.ds(start, config.block_m), ki)
    plgpu.copy_gmem_to_smem(x_gmem.at[tile], x_smem.at[wg], full.at[wg])

    def read(i):
        return plgpu.load(x_smem.at[wg, pl.ds(i * runs, runs)], layout=layout)

    def along(values):
        return plgpu.layout_cast(lax.broadcast_in_dim(values, (runs, BLOCK), [0]), layout)

    # --- 2. main loop
    plgpu.barrier_wait(full.at[wg])
    if which in ("cols", "blocks"):
        tops_smem, scale_smem = between_warps
        top = functools.reduce(jnp.maximum, (jnp.abs(read(i)) for i in tiles))
        if which == "blocks":
            top = along(top.astype(jnp.float32).max(axis=1)).astype(x_smem.dtype)
        # Written twice, one below the other: row r finds the others in the rows r + 1, r + 2, ...
        for copy in range(2):
            tops_smem[wg, pl.ds(copy * runs, runs)] = top
        plgpu.commit_smem()
        for r in range(1, runs):
            other = plgpu.load(tops_smem.at[wg, pl.ds(r, runs)], layout=layout)
            top = jnp.maximum(top, other)

        # --- 3. epilogue
        scale = _scale(top.astype(jnp.float32), ue8m0)  # [runs, BLOCK], all rows alike
        factor = _reciprocal(scale)
        scale_smem[wg] = scale

    else:
        (rows_smem,) = between_warps
        # Both halves of a row meet first, two elements at once.
        halves, half_layout = _lib.piece_tile(BLOCK // 2, x_smem.dtype)
        for i in range(config.block_m // halves):
            rows = pl.ds(i * halves, halves)
            left, right = (
                jnp.abs(plgpu.load(x_smem.at[wg, rows, columns], layout=half_layout))
                for columns in (pl.ds(0, BLOCK // 2), pl.ds(BLOCK // 2, BLOCK // 2))
            )
            rows_smem[wg, rows] = jnp.maximum(left, right).astype(jnp.float32).max(axis=1)
        plgpu.commit_smem()
        # A row for each lane, though eight of them found its largest.
        lanes = plgpu.Layout.WG_STRIDED((config.block_m,), vec_size=1)
        scale = _scale(plgpu.load(rows_smem.at[wg], layout=lanes), ue8m0)
        rows_smem[wg] = _reciprocal(scale)
        if which == "rows":
            scale_gmem[pl.ds(start, config.block_m), ki] = scale
        else:
            scale_gmem[ki, pl.ds(start, config.block_m)] = scale
        plgpu.commit_smem()

    # --- 4. store
    for i in tiles:
        if which.startswith("rows"):
            part = rows_smem.at[wg, pl.ds(i * runs, runs)]
            factor = along(plgpu.load(part, layout=layout.reduce(1), optimized=False))
        x = read(i).astype(jnp.float32)
        q_smem[wg, pl.ds(i * runs, runs)] = (x * factor).astype(q_smem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_smem.at[wg], q_gmem.at[tile])
    if which == "cols":
        plgpu.copy_smem_to_gmem(scale_smem.at[wg, 0], scale_gmem.at[mi, ki])
    elif which == "blocks":
        scale_gmem[mi, ki] = scale_smem[wg, 0, 0]
    plgpu.wait_smem_to_gmem(0)


_SHARES = {
    "rows": (1, BLOCK),
    "rows_transposed": (1, BLOCK),
    "cols": (BLOCK, 1),
    "blocks": (BLOCK, BLOCK),
}


def _quantize(
    x: jax.Array, which: str, ue8m0: bool, config: Config | None
) -> tuple[jax.Array, jax.Array]:
    M, K = x.shape
    share_m, share_n = _SHARES[which]
    shape = _lib.cdiv(M, share_m), _lib.cdiv(K, share_n)
    if which == "rows_transposed":
        shape = (shape[1], _lib.cdiv(M, 4) * 4)  # whole 16 bytes in a row
    if 0 in (M, K):
        return jnp.zeros((M, K), jnp.float8_e4m3fn), jnp.zeros(shape, jnp.float32)
    config = config or default_config(M, K, x.dtype, which)
    x = _lib.pad(lax.stop_gradient(x), BLOCK)
    columns, warpgroups = x.shape[1] // BLOCK, config.block_n // BLOCK
    num_m, num_n = _lib.cdiv(M, config.block_m), _lib.cdiv(columns, warpgroups)
    runs, _ = _lib.piece_tile(BLOCK, x.dtype)
    # Room for the scales of whole tiles: what is beyond x is cut off below.
    rows = num_m * config.block_m
    room = {
        "rows": (rows, num_n * warpgroups),
        "rows_transposed": (num_n * warpgroups, rows),
        "cols": (num_m, columns, BLOCK),
        "blocks": (num_m, num_n * warpgroups),
    }[which]
    tile = (warpgroups, config.block_m, BLOCK)
    between_warps = (
        (plgpu.SMEM((warpgroups, config.block_m), jnp.float32),)
        if share_m == 1
        else (
            plgpu.SMEM((warpgroups, 2 * runs, BLOCK), x.dtype),
            plgpu.SMEM((warpgroups, runs, BLOCK), jnp.float32),
        )
    )
    q, scale = plgpu.kernel(
        functools.partial(_fp8_quantize_kernel, which=which, ue8m0=ue8m0, config=config),
        out_type=(
            jax.ShapeDtypeStruct((M, columns, BLOCK), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct(room, jnp.float32),
        ),
        scratch_types=[
            plgpu.SMEM(tile, x.dtype),
            plgpu.SMEM(tile, jnp.float8_e4m3fn),
            *between_warps,
            plgpu.Barrier(num_barriers=warpgroups),
        ],
        grid=(num_m, num_n),
        grid_names=("m", "n"),
        num_threads=warpgroups,
        thread_name="wg",
        compiler_params=_lib.ROW_PARAMS,
        kernel_name="fp8_quantize_kernel",
    )(x.reshape(M, columns, BLOCK))
    scale = scale.reshape(scale.shape[0], -1)[: shape[0], : shape[1]]
    return q.reshape(M, -1)[:, :K], scale


def _checked(name: str, x: jax.Array, which: str, ue8m0: bool, config: Config | None) -> None:
    _lib.check_array(name, x, ("M", "K"), DTYPES)
    _lib.check_static("ue8m0", ue8m0, (bool,))
    _lib.check_config(config, Config)
    share_m, share_n = _SHARES[which]
    if which != "blocks":
        for letter, size, share in zip("MK", x.shape, (share_m, share_n), strict=True):
            if size % share:
                raise ValueError(f"{name}: expected {share} to divide {letter}, got {size}")
    if config is not None and config.block_m != BLOCK and share_m == BLOCK:
        raise ValueError(f"config: expected block_m = {BLOCK}, got {config.block_m}")


def fp8_quantize_rows(
    x: jax.Array, *, ue8m0: bool = False, transposed: bool = False, config: Config | None = None
) -> tuple[jax.Array, jax.Array]:
    """x [M, K] -> (float8_e4m3fn [M, K], scale float32 [M, K / 128]): 1 x 128; no gradient.

    x: bfloat16 or float16.
    ue8m0: the scale is rounded up to a power of two.
    transposed: the scale as [K / 128, ceil(M / 4) * 4], rows of whole 16 bytes as TMA wants them;
        what is beyond M scales zeros.
    config: tiles of this call.

    All-zero blocks: scale 1e-4 / 448, codes 0. A NaN: scale NaN, codes 0x7F. An infinity: scale
    infinity (NaN with ue8m0), code 0x7F for what is infinite and 0 or -0 for the rest.

    Raises ValueError for a wrong rank, 128 that does not divide K and a config that does not fit,
    TypeError for a wrong dtype, config or keyword.
    """
    _checked("x", x, "rows", ue8m0, config)
    _lib.check_static("transposed", transposed, (bool,))
    return _quantize(x, "rows_transposed" if transposed else "rows", ue8m0, config)


def fp8_quantize_blocks(
    w: jax.Array, *, ue8m0: bool = False, config: Config | None = None
) -> tuple[jax.Array, jax.Array]:
    """w [N, K] -> (float8_e4m3fn [N, K], scale float32 [ceil(N / 128), ceil(K / 128)]).

    As fp8_quantize_rows, which see; for weights, whose last blocks may be ragged.
    """
    _checked("w", w, "blocks", ue8m0, config)
    return _quantize(w, "blocks", ue8m0, config)


def fp8_quantize_cols(
    x: jax.Array, *, ue8m0: bool = False, config: Config | None = None
) -> tuple[jax.Array, jax.Array]:
    """x [M, K] -> (float8_e4m3fn [M, K], scale float32 [M / 128, K]): 128 x 1, along tokens.

    As fp8_quantize_rows, which see; here 128 must divide M.
    """
    _checked("x", x, "cols", ue8m0, config)
    return _quantize(x, "cols", ue8m0, config)
