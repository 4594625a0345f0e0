"""Symmetric int8 with a scale for each row, or for each group of neighbours in it.

    scale[m, g] = max_k |x[m, k]| / 127 over the k of group g             1 where that is 0
    q[m, k] = clip(rint(x[m, k] / scale[m, g]), -127, 127)                ties to even

    one block of threads for block_m rows; each warpgroup has slots that TMA fills with chunks:
        for each chunk: top = max |x|
        the runs of a row, in all the warpgroups that share it, exchange top; scale = top / 127
        for each chunk: codes, into a slot of their own; TMA stores it
    a group that is no more than a warp reads at once (512 bytes, a power of two) stays within its
    warp, and lanes take a group each for its scale; others count as rows, x [M * K / group, group]

Both quotients are those of float32, correctly rounded, though no element is divided.
float16: x is multiplied by 1 / scale as the sum of two float32, the first of 12 bits. Its product
with the 11 bits of x is exact, and the sum comes within 2^-34 of the quotient, whether or not a
compiler fuses it; next to a tie nothing else lies within 2^-19.
bfloat16: one product. Where top is no multiple of 127 the only tie is top / 2, 63.5 but for what
rounding did to scale: the reciprocal is moved three units to the side that top / scale rounds to.
Else scale is a power of two. No other quotient is so near a tie that the units would matter.
Tests go through all mantissas of both types. None rounds to more than 127: nothing is clipped.

Of a row longer than its slots, they keep the end, and only the beginning is read again.

Limits: Hopper; bfloat16 and float16. Rows of a number of columns that 64 does not divide are padded
first, in XLA.

Twin: triton_kernels/int8_quantize.py.

Sources: LLM.int8() (Dettmers et al., arXiv:2208.07339) for a scale per token; a sum of two floats
for a number is Dekker's double length (Numerische Mathematik 18, 1971).
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
SHARED_BYTES = 224 * 1024  # of the 227 KB that a block of threads can have, for the slots


@dataclass(frozen=True)
class Config:
    """Tile sizes and resources of the kernel; the result does not depend on them.

    block_m: rows of a block of threads; warpgroups / block_m warpgroups share each.
    block_n: columns of a chunk, the part of a row in one slot.
    stages: slots of each warpgroup; more than a row has chunks are of no use.
    warpgroups: warpgroups of a block of threads.
    """

    block_m: int = 1
    block_n: int = 8192
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


def default_config(R: int, N: int, dtype: Any) -> Config:
    """The Config for R rows of N columns on a Hopper."""
    del R
    column = _lib.bits(dtype) // 8 + 1  # bytes of x and of its code
    # Many small blocks of one warpgroup: some load while others compute.
    split = 1 if N <= 8192 else 2 if N <= 16384 else 4
    block_n = _lib.row_chunk(N, split, 8192, dtype)
    room = SHARED_BYTES // (split * block_n * column)
    return Config(1, block_n, min(_lib.cdiv(N, split * block_n), room, 32 // split), split)


def _leading_bits(x: Any) -> Any:
    """x cut off after the first 12 bits of its significand."""
    bits = lax.bitcast_convert_type(x, jnp.int32) & -4096
    return lax.bitcast_convert_type(bits, jnp.float32)


def _factors(top: Any, scale: Any, dtype: Any) -> tuple[Any, ...]:
    """What a scaled x is multiplied by: one for bfloat16, else both parts of 1 / scale."""
    scale = jnp.where(_known(scale), scale, 1.0)
    power = _power(scale)
    divisor = scale * power
    if dtype == jnp.bfloat16:
        left = top * power - 128 * divisor + divisor  # top - 127 * scale, all of it exact
        units = jnp.where(left < divisor * -(2.0**-18), -3, 3)
        inverse = lax.bitcast_convert_type(1.0 / divisor, jnp.int32) + units
        exact = (254 << 23) - lax.bitcast_convert_type(divisor, jnp.int32)  # of a power of two
        inverse = jnp.where(left == 0, exact, inverse)
        return (lax.bitcast_convert_type(inverse, jnp.float32),)
    reciprocal = _leading_bits(1.0 / divisor)
    first = _leading_bits(divisor)
    rest = 1.0 - reciprocal * first - reciprocal * (divisor - first)  # all of it exact
    return reciprocal, rest / divisor


def _power(scale: Any) -> Any:
    """A power of two that keeps reciprocals of scale * power and their rests within float32."""
    bits = lax.bitcast_convert_type(scale, jnp.int32)
    return lax.bitcast_convert_type((254 << 23) - (bits & 0x7F800000), jnp.float32)


def _known(scale: Any) -> Any:
    """Neither infinite nor NaN."""
    return (lax.bitcast_convert_type(scale, jnp.int32) & 0x7F800000) != 0x7F800000


def _codes(x: Any, scale: Any, factors: Any, along: Any) -> Any:
    """The codes of a tile x [runs, piece] for scale [runs]; along: [runs] -> [runs, piece]."""
    keep = jnp.where(_known(scale), -1, 0).astype(jnp.int16)
    x = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int16) & along(keep), x.dtype)
    power = _power(jnp.where(_known(scale), scale, 1.0))
    if x.dtype == jnp.bfloat16:  # two at once; exact, or so small that the code is 0
        scaled = (x * along(power.astype(x.dtype))).astype(jnp.float32)
    else:
        scaled = x.astype(jnp.float32) * along(power)
    quotient, *rest = (scaled * along(factor) for factor in factors)
    quotient = functools.reduce(jnp.add, rest, quotient)
    # Adding 1.5 * 2^23 rounds to a whole number, which the low bits hold in two's complement.
    return lax.bitcast_convert_type(quotient + 12582912.0, jnp.int32).astype(jnp.int8)


def _scale(top: Any) -> Any:
    """top / 127, correctly rounded, for a top of at most 11 bits, and 1 where that is 0.

    Mosaic's division is two units off, and XLA's on a CPU multiplies by 1 / 127. That number is
    129 / 2^14 and a 127th of 2^-14 (its bits repeat); the product with the first is exact. Below
    float32's normal numbers the scale has the bits of a whole number: top in their unit, by 127.
    """
    bits = lax.bitcast_convert_type(top, jnp.int32) & 0x7FFFFFFF  # a NaN may have a sign
    exponent, fraction = bits >> 23, bits & 0x7FFFFF
    ratio = lax.bitcast_convert_type(fraction | 0x3F800000, jnp.float32)  # 1 to 2
    ratio = ratio * (129 / 2**14) + ratio * (1 / (127 * 2**14))
    scale = lax.bitcast_convert_type(ratio, jnp.int32) + ((exponent - 127) << 23)
    units = fraction | jnp.where(exponent == 0, 0, 1 << 23)
    units = lax.div((units << jnp.clip(exponent - 1, 0, 7)) + 63, jnp.int32(127))
    units = jnp.where(units == 0, 0x3F800000, units)
    scale = lax.bitcast_convert_type(jnp.where(exponent < 8, units, scale), jnp.float32)
    return jnp.where(exponent == 255, top, scale)


def _int8_quantize_kernel(
    x_gmem: Any,
    q_gmem: Any,
    scale_gmem: Any,
    x_smem: Any,
    q_smem: Any,
    stats_smem: Any,
    full: Any,
    met: Any,
    *,
    R: int,
    grouped: bool,
    config: Config,
) -> None:
    pieces, piece = x_smem.shape[2:]
    runs, layout = _lib.piece_tile(piece, x_smem.dtype)
    tiles = range(pieces // runs)
    split = config.warpgroups // config.block_m
    num_n = _lib.cdiv(x_gmem.shape[1], split * pieces)
    # Chunks that the slots cannot keep until the second pass: those are loaded twice.
    dropped = 0 if grouped else max(0, num_n - config.stages)

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

    def read(q, i):
        return plgpu.load(x_smem.at[*slot(q), pl.ds(i * runs, runs)], layout=layout)

    def along(values):
        return plgpu.layout_cast(lax.broadcast_in_dim(values, (runs, piece), [0]), layout)

    for q in range(min(config.stages, num_n)):
        load(q)

    # --- 2. main loop
    def accumulate(q, largest):
        plgpu.barrier_wait(full_at(q))
        for i in tiles:
            largest = jnp.maximum(largest, jnp.abs(read(q, i)))
        if dropped:

            @pl.when(q < dropped)
            def _():
                plgpu.commit_smem()
                load(q + config.stages)

        return largest

    def of_groups(j, i):
        """Row j of stats_smem, for the runs of tile i."""
        part = stats_smem.at[wg, j, pl.ds(i * runs, runs)]
        return plgpu.load(part, layout=layout.reduce(1), optimized=False)

    def scales_of(q):
        """A scale and its factors for each group of a chunk, a lane each."""
        for i in tiles:
            top = jnp.abs(read(q, i).astype(jnp.float32)).max(axis=1)
            stats_smem[wg, 0, pl.ds(i * runs, runs)] = top
        plgpu.commit_smem()
        lanes = plgpu.Layout.WG_STRIDED(stats_smem.shape[2:], vec_size=1)
        top = plgpu.load(stats_smem.at[wg, 0], layout=lanes)
        scale = _scale(top)
        for j, factor in enumerate((scale, *_factors(top, scale, x_smem.dtype))):
            stats_smem[wg, j] = factor
        plgpu.commit_smem()

    # --- 3. epilogue
    row_scale = []
    if not grouped:
        zero = plgpu.layout_cast(jnp.zeros((runs, piece), x_smem.dtype), layout)
        largest = lax.fori_loop(0, num_n, accumulate, zero)
        stats_smem[wg] = largest.astype(jnp.float32).max(axis=1)  # [runs]
        plgpu.barrier_arrive(met.at[group])
        plgpu.barrier_wait(met.at[group])
        tops = [stats_smem[group * split + i, run] for i in range(split) for run in range(runs)]
        top = functools.reduce(jnp.maximum, tops)
        scale = _scale(top)
        row_scale = [
            plgpu.layout_cast(jnp.full((runs,), factor), layout.reduce(1))
            for factor in (scale, *_factors(top, scale, x_smem.dtype))
        ]

        @pl.when(jnp.logical_and(part == 0, row < R))
        def _():
            scale_gmem[row] = scale

    # --- 4. store
    @pl.loop(dropped, num_n + dropped)
    def _(q):
        if grouped:
            plgpu.barrier_wait(full_at(q))
            scales_of(q)
        elif dropped:

            @pl.when(q >= num_n)
            def _():
                plgpu.barrier_wait(full_at(q))

        for i in tiles:
            if grouped:
                scale, *factors = (of_groups(j, i) for j in range(stats_smem.shape[1]))

                @pl.when(row < R)
                def _(i=i, scale=scale):
                    scale_gmem[row, pl.ds(start_of(q) + i * runs, runs)] = scale

            else:
                scale, *factors = row_scale
            codes = _codes(read(q, i), scale, factors, along)
            q_smem[*slot(q), pl.ds(i * runs, runs)] = codes
        plgpu.commit_smem()
        _lib.store_row_chunk(q_smem.at[slot(q)], q_gmem, row, start_of(q))
        if num_n > config.stages:

            @pl.when(q + config.stages < num_n + dropped)
            def _():
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                load(q + config.stages)

    plgpu.wait_smem_to_gmem(0)


def _quantize(x: jax.Array, grouped: bool, config: Config | None) -> tuple[jax.Array, jax.Array]:
    """Codes of rows in pieces x [R, pieces, piece], and a scale for each row or, grouped, piece."""
    R, columns, piece = x.shape
    config = config or default_config(R, columns * piece, x.dtype)
    runs, _ = _lib.piece_tile(piece, x.dtype)
    if config.block_n % (runs * piece):
        raise ValueError(
            f"block_n: expected a multiple of {runs * piece} (16 bytes for each lane of a "
            f"warpgroup), got {config.block_n}"
        )
    split, pieces = config.warpgroups // config.block_m, config.block_n // piece
    slots = (config.warpgroups, config.stages, pieces, piece)
    # Beyond the last group of a row there is room for those that fill its last chunk.
    room = _lib.cdiv(columns, split * pieces) * split * pieces
    # The largest of each run; or of each group, its scale and factors, a lane each.
    lanes = _lib.cdiv(pieces, _lib.WARPGROUP) * _lib.WARPGROUP
    stats = (2 if x.dtype == jnp.bfloat16 else 3, lanes) if grouped else (runs,)
    q, scale = plgpu.kernel(
        functools.partial(_int8_quantize_kernel, R=R, grouped=grouped, config=config),
        out_type=(
            jax.ShapeDtypeStruct(x.shape, jnp.int8),
            jax.ShapeDtypeStruct((R, room) if grouped else (R,), jnp.float32),
        ),
        scratch_types=[
            plgpu.SMEM(slots, x.dtype),
            plgpu.SMEM(slots, jnp.int8),
            plgpu.SMEM((config.warpgroups, *stats), jnp.float32),
            plgpu.Barrier(num_barriers=config.warpgroups * config.stages),
            plgpu.Barrier(num_arrivals=split, num_barriers=config.block_m),
        ],
        grid=(_lib.cdiv(R, config.block_m),),
        grid_names=("rows",),
        num_threads=config.warpgroups,
        thread_name="wg",
        compiler_params=_lib.ROW_PARAMS,
        kernel_name="int8_quantize_kernel",
    )(x)
    return q, scale[:, :columns] if grouped else scale


def int8_quantize(
    x: jax.Array, *, axis: int, group: int | None = None, config: Config | None = None
) -> tuple[jax.Array, jax.Array]:
    """x [M, K] -> (codes int8 [M, K], scale float32), one launch and one read of x; no gradient.

    x: bfloat16 or float16.
    axis: -1 (or 1), the last: the one that is scaled as a whole.
    group: None gives each row a scale, [M]; else that many neighbours share one, [M, K / group].
    config: tiles of this call.

    All zeros, or a scale too small for float32: scale 1, codes 0. A NaN or an infinity: the scale
    is NaN or infinity, and the codes of what shares it are 0.

    Raises ValueError for a wrong rank, another axis or a group that does not divide K, and
    TypeError for a wrong dtype, config or keyword.
    """
    _lib.check_array("x", x, ("M", "K"), DTYPES)
    _lib.check_static("axis", axis, (int,))
    if axis not in (-1, 1):
        raise ValueError(f"axis: expected -1, the last of x, got {axis}")
    if group is not None:
        _lib.check_static("group", group, (int,))
        if group < 1 or x.shape[1] % group:
            raise ValueError(f"group: expected a divisor of K = {x.shape[1]}, got {group}")
    _lib.check_config(config, Config)
    M, K = x.shape
    shared = (M,) if group is None else (M, K // group)
    if 0 in (M, K):
        return jnp.zeros((M, K), jnp.int8), jnp.ones(shared, jnp.float32)
    x = lax.stop_gradient(x)
    # A group within a warp: at least 16 bytes, which one lane reads, at most 512.
    lane = 128 // _lib.bits(x.dtype)
    if group is not None and group & (group - 1) == 0 and lane <= group <= 32 * lane:
        q, scale = _quantize(x.reshape(M, K // group, group), True, config)
        return q.reshape(M, K), scale
    rows = x if group is None else x.reshape(-1, group)
    (in_pieces,) = _lib.row_pieces(rows)
    q, scale = _quantize(in_pieces, False, config)
    return q.reshape(rows.shape[0], -1)[:, : rows.shape[1]].reshape(M, K), scale.reshape(shared)
