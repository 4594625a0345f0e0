"""Rotation by a randomly signed Hadamard matrix, alone or with the quantizer behind it.

    y[r, :] = H (signs * x[r, :]) / sqrt(n)         H[i, j] = (-1)^(ones in i & j)
    inverse: y[r, :] = signs * (H x[r, :]) / sqrt(n)
    int8: scale[r] = max |y[r, :]| / 127            q = clip(rint(y / scale), -127, 127)
    e4m3: scale[r] = max(max |y[r, :]|, 1e-4) / 448 q = e4m3(y * (1 / scale))

    matrices: for each part of 64 of n, H of 64 with the signs on its rows; in shared memory
    persistent blocks of warpgroups, each with a ring of slots that TMA keeps full, for each tile:
        for each part: acc = x @ matrix             +-1 times x: each term is exact
        the fast transform over the parts
        y = round(acc / sqrt(n)) to x's dtype; y, or its codes, to a slot that TMA stores; scales
    inverse: the signs come last, with the factor

The fast transform has 7 additions an element at n = 128, four of them between threads. Here those
within 64 elements are one product on tensor cores, which are idle while memory is read: 64
multiplications an element take a quarter of the time of its 3 bytes. Those between parts of 64 are
additions in registers. Codes are what the quantizers give for the rounded y, bit for bit.

Limits: Hopper; bfloat16 and float16; n = 64, 128 or 256. A number of rows that 8 does not divide is
padded first, in XLA.

Twin: triton_kernels/hadamard.py.

Sources: QuaRot (Ashkboos et al., arXiv:2404.00456) and QuIP# (Tseng et al., arXiv:2402.04396) for
the rotation; HadaCore (Agarwal et al., arXiv:2412.08832) for tensor cores.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import _lib
from .fp8_quantize import _reciprocal
from .fp8_quantize import _scale as _e4m3_scale
from .int8_quantize import _codes, _factors
from .int8_quantize import _scale as _int8_scale

DTYPES = (jnp.bfloat16, jnp.float16)
SIZES = (64, 128, 256)
FORMATS = {"int8": jnp.int8, "e4m3": jnp.float8_e4m3fn}


@dataclass(frozen=True)
class Config:
    """Tile sizes and resources of the kernel; beyond the last bits y does not depend on them.

    block_m: rows of a tile, which one warpgroup multiplies.
    stages: tiles of x in flight or in use, for each warpgroup.
    warpgroups: warpgroups of a block of threads.
    programs: blocks for each multiprocessor, which walk over the tiles.
    """

    block_m: int = 64
    stages: int = 3
    warpgroups: int = 3
    programs: int = 1

    def __post_init__(self) -> None:
        if self.block_m < 64 or self.block_m % 64:
            raise ValueError(f"block_m: expected a multiple of 64, got {self.block_m}")
        if not 1 <= self.stages <= 32 // self.warpgroups:
            raise ValueError(
                f"stages: expected 1 to {32 // self.warpgroups} (32 barriers of a kind), "
                f"got {self.stages}"
            )


def default_config(R: int, n: int, dtype: Any) -> Config:
    """The Config for R rows of n elements on a Hopper."""
    del R, dtype
    # The matrices take 8 to 32 KB, a tile as much, and so does what is stored: as many warpgroups
    # as that leaves room for, up to 4. In two blocks they wait for each other less.
    return {64: Config(64, 3, 4, 1), 128: Config(64, 2, 2, 2), 256: Config(64, 2, 2, 1)}[n]


def _hadamard_kernel(
    x_gmem: Any, signs_gmem: Any, y_gmem: Any, *refs: Any, inverse: bool, fmt: str, config: Config
) -> None:
    scale_gmem, (x_smem, y_smem, matrix_smem, full, ready) = (None, refs) if not fmt else (
        refs[0], refs[1:]
    )  # fmt: skip
    R, n = x_gmem.shape
    block_m, stages = config.block_m, config.stages
    parts, dtype, layout = n // 64, x_smem.dtype, plgpu.Layout.WGMMA
    factor = 1 / math.sqrt(n)
    # A power of two is exact before the sums too.
    early = factor if n != 128 else 1.0

    wg = lax.axis_index("wg")
    first = lax.axis_index("sm") * config.warpgroups + wg
    stride = lax.axis_size("sm") * config.warpgroups
    trips = lax.div(_lib.cdiv(R, block_m) - first + stride - 1, stride)

    def rows(trip):
        return pl.ds((first + trip * stride) * block_m, block_m)

    def slot(trip):
        return wg, lax.rem(trip, stages)

    def full_at(trip):
        return full.at[wg * stages + lax.rem(trip, stages)]

    def load(trip):
        @pl.when(trip < trips)
        def _():
            # Beyond the last row TMA loads zeros and stores nothing.
            plgpu.copy_gmem_to_smem(x_gmem.at[rows(trip)], x_smem.at[slot(trip)], full_at(trip))

    @pl.loop(0, stages)
    def _(trip):
        load(trip)

    def part_of_signs(p, axis):
        """64 of the signs, along one axis of a matrix. [64, 64]"""
        part = signs_gmem.at[pl.ds(p * 64, 64)]
        signs = plgpu.load(part, layout=layout.reduce(1 - axis), optimized=False)
        return lax.broadcast_in_dim(signs.astype(jnp.float32), (64, 64), [axis])

    @pl.loop(wg, parts, step=config.warpgroups)
    def _(p):
        row, column = (
            plgpu.broadcasted_iota(jnp.int32, (64, 64), axis, layout=layout) for axis in (0, 1)
        )
        both = row & column
        both = both ^ (both >> 4)
        both = both ^ (both >> 2)
        both = both ^ (both >> 1)
        signs = 1.0 if inverse else part_of_signs(p, 0) * early
        matrix = jnp.where((both & 1) == 0, signs, -signs)
        matrix_smem[p] = matrix.astype(dtype)

    plgpu.commit_smem()
    plgpu.barrier_arrive(ready)
    plgpu.barrier_wait(ready)

    @pl.loop(0, trips)
    def _(trip):
        # --- 1. which tile
        plgpu.barrier_wait(full_at(trip))

        # --- 2. main loop
        def products(*acc):
            for p in range(parts):
                x = x_smem.at[*slot(trip), :, pl.ds(p * 64, 64)]
                plgpu.wgmma(acc[p], x, matrix_smem.at[p])
            return [one[...] for one in acc]

        acc = pl.run_scoped(products, *[plgpu.ACC((block_m, 64), jnp.float32)] * parts)
        load(trip + stages)

        # --- 3. epilogue
        for half in (1, 2)[: parts.bit_length() - 1]:
            acc = [
                acc[p - half] - acc[p] if p & half else acc[p] + acc[p + half] for p in range(parts)
            ]
        if inverse:
            acc = [acc[p] * (part_of_signs(p, 1) * factor) for p in range(parts)]
        elif early == 1.0:
            acc = [one * factor for one in acc]
        acc = acc[0] if parts == 1 else jnp.concatenate(acc, axis=1)  # [block_m, n]
        y = acc.astype(dtype)
        if fmt:
            # Rounding keeps the order: the largest is found before it, and rounded then.
            top = jnp.abs(acc).max(axis=1).astype(dtype).astype(jnp.float32)  # [block_m]

            def along(values):
                return lax.broadcast_in_dim(values, (block_m, n), [0])

            if fmt == "int8":
                scale = _int8_scale(top)
                y = _codes(y, scale, _factors(top, scale, dtype), along)
            else:
                scale = _e4m3_scale(top, False)
                # All bits, which a compiler cannot know. It would lift y again without packing it,
                # and then round one by one, which takes far longer than two at once.
                keep = along(jnp.where(scale == 0, 0, -1).astype(jnp.int16))
                y = lax.bitcast_convert_type(lax.bitcast_convert_type(y, jnp.int16) & keep, dtype)
                y = (y.astype(jnp.float32) * along(_reciprocal(scale))).astype(y_smem.dtype)
            scale_gmem[rows(trip)] = scale

        # --- 4. store
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        y_smem[wg] = y
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(y_smem.at[wg], y_gmem.at[rows(trip)])

    plgpu.wait_smem_to_gmem(0)


def _rotated(
    x: jax.Array, signs: jax.Array, inverse: bool, fmt: str, config: Config | None
) -> tuple[jax.Array, ...]:
    """(y,) of x [R, n], or (q, scale) with a format."""
    R, n = x.shape
    out = FORMATS.get(fmt, x.dtype)
    if R == 0:
        return (jnp.zeros((R, n), out), jnp.zeros(R, jnp.float32))[: 2 if fmt else 1]
    config = config or default_config(R, n, x.dtype)
    tiles = _lib.cdiv(R, config.block_m)
    x = _lib.pad(x, 8, n)  # swizzled tiles have 8 rows
    y = jax.ShapeDtypeStruct(x.shape, out)
    # Room for the scales of whole tiles: what is beyond R is cut off below.
    scale = jax.ShapeDtypeStruct((tiles * config.block_m,), jnp.float32)
    slots = (config.warpgroups, config.stages, config.block_m, n)
    result = plgpu.kernel(
        functools.partial(_hadamard_kernel, inverse=inverse, fmt=fmt, config=config),
        out_type=(y, scale) if fmt else (y,),
        scratch_types=[
            plgpu.SMEM(slots, x.dtype, transforms=_lib.swizzled(x.dtype)),
            plgpu.SMEM((slots[0], *slots[2:]), out, transforms=_lib.swizzled(out, n)),
            plgpu.SMEM((n // 64, 64, 64), x.dtype, transforms=_lib.swizzled(x.dtype)),
            plgpu.Barrier(num_barriers=config.warpgroups * config.stages),
            plgpu.Barrier(num_arrivals=config.warpgroups),
        ],
        grid=(min(_lib.cdiv(tiles, config.warpgroups), config.programs * _lib.num_sms()),),
        grid_names=("sm",),
        num_threads=config.warpgroups,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="hadamard_kernel",
    )(x, signs)
    return tuple(part[:R] for part in result)


def _checked(name: str, x: Any, signs: Any, inverse: bool, config: Config | None) -> None:
    if getattr(x, "ndim", 0) == 0:
        raise TypeError(f"{name}: expected a JAX array of one dimension at least, got {x!r:.80}")
    n = x.shape[-1]
    if n not in SIZES:
        raise ValueError(f"{name}: expected a last dimension of 64, 128 or 256, got {n}")
    _lib.check_array(name, x, tuple(x.shape), DTYPES)
    _lib.check_array("signs", signs, (n,), (x.dtype, jnp.float32, jnp.int8))
    _lib.check_static("inverse", inverse, (bool,))
    _lib.check_config(config, Config)


def hadamard_rotate_fwd(
    x: jax.Array, signs: jax.Array, *, inverse: bool = False, config: Config | None = None
) -> tuple[jax.Array, tuple[jax.Array]]:
    """As `hadamard_rotate`, and what the backward needs: res = (signs,)."""
    (y,) = _rotated(x.reshape(-1, x.shape[-1]), signs, inverse, "", config)
    return y.reshape(x.shape), (signs,)


def hadamard_rotate_bwd(
    res: tuple[jax.Array], dy: jax.Array, *, inverse: bool = False, config: Config | None = None
) -> tuple[jax.Array]:
    """The gradient (dx,): the rotation is orthogonal, so it is the other way round."""
    (signs,) = res
    (dx,) = _rotated(dy.reshape(-1, dy.shape[-1]), signs, not inverse, "", config)
    return (dx.reshape(dy.shape),)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _rotate(x: Any, signs: Any, inverse: bool, config: Any) -> jax.Array:
    return hadamard_rotate_fwd(x, signs, inverse=inverse, config=config)[0]


def _rotate_fwd(x: Any, signs: Any, inverse: bool, config: Any) -> Any:
    return hadamard_rotate_fwd(x, signs, inverse=inverse, config=config)


def _rotate_bwd(inverse: bool, config: Any, res: Any, dy: Any) -> Any:
    del config
    return (*hadamard_rotate_bwd(res, dy, inverse=inverse), None)


_rotate.defvjp(_rotate_fwd, _rotate_bwd)


def hadamard_rotate(
    x: jax.Array, signs: jax.Array, *, inverse: bool = False, config: Config | None = None
) -> jax.Array:
    """y [..., n] = H (signs * x) / sqrt(n) along the last dimension; differentiable in x.

    x: bfloat16 or float16, n = 64, 128 or 256. signs [n]: 1 or -1, in x's dtype, float32 or int8.
    inverse: the rotation back, signs * (H x) / sqrt(n).
    config: tiles of this call; gradients take their own default.

    y has x's dtype; it is summed in float32 and rounded once. A NaN or an infinity reaches the
    whole of its n elements, and nothing else.

    Raises ValueError for a wrong size and TypeError for a wrong dtype, config or keyword.
    """
    _checked("x", x, signs, inverse, config)
    return _rotate(x, signs, inverse, config)


def hadamard_quantize(
    x: jax.Array, signs: jax.Array, fmt: str, *, config: Config | None = None
) -> tuple[jax.Array, jax.Array]:
    """x [..., n] -> (codes [..., n], scale float32 [...]) of hadamard_rotate(x, signs).

    fmt: "int8": codes int8, those of int8_quantize with groups of n; "e4m3": codes float8_e4m3fn,
        those of fp8_quantize_rows, with a scale for n elements. Both also say what becomes of
        zeros, NaN and infinity. No gradient.
    x, signs and config: as hadamard_rotate, which see for what is raised; ValueError for another
    fmt.
    """
    _checked("x", x, signs, False, config)
    if fmt not in FORMATS:
        raise ValueError(f"fmt: expected int8 or e4m3, got {fmt!r}")
    flat = lax.stop_gradient(x).reshape(-1, x.shape[-1])
    q, scale = _rotated(flat, lax.stop_gradient(signs), False, fmt, config)
    return q.reshape(x.shape), scale.reshape(x.shape[:-1])
