"""Q06, FP8 bit by bit: x float16[N] -> code uint8[N], the nearest e4m3 number.

    float16   s eeeee mmmmmmmmmm    (-1)^s * 1.m * 2^(e - 15), no leading 1 where e is 0
    e4m3      s eeee mmm            (-1)^s * 1.m * 2^(e -  7), no leading 1 where e is 0

Ties go to the even code; beyond 448, the largest, comes 448; NaN is 0x7F or 0xFF.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

BLOCK = 4096


def _cast_kernel(x_gmem, code_gmem):
    """One block of threads for BLOCK numbers, on their bits alone."""
    at = pl.ds(lax.axis_index("blocks") * BLOCK, BLOCK)
    bits = lax.bitcast_convert_type(x_gmem[at], jnp.uint16).astype(jnp.int32)
    sign, magnitude = (bits >> 8) & 0x80, bits & 0x7FFF
    # BEGIN SOLUTION
    # 1. From 2^-6 (magnitude 0x2400) on: take 8 off the exponent, drop 7 bits, ties to even.
    # 2. Below: how many 2^-9 is it? Drop as many bits of the significand as it takes.
    # 3. What is too large becomes the largest code, 0x7E; NaN (magnitude above 0x7C00) 0x7F.
    # 4. Put the sign back and store the code as uint8.
    moved = magnitude - (8 << 10)
    normal = (moved + 0x3F + ((moved >> 7) & 1)) >> 7
    exponent = jnp.maximum(magnitude >> 10, 1)
    significand = (magnitude & 0x3FF) | 0x400
    drop = jnp.maximum(16 - exponent, 1)
    tiny = (significand + (1 << (drop - 1)) - 1 + ((significand >> drop) & 1)) >> drop
    code = jnp.where(magnitude < 0x2400, tiny, normal)
    code = jnp.where(magnitude > 0x7C00, 0x7F, jnp.minimum(code, 0x7E))
    code_gmem[at] = (code | sign).astype(jnp.uint8)
    # END SOLUTION


def solve(x):
    N = x.shape[0]
    padded = -(-N // BLOCK) * BLOCK
    cast = plgpu.kernel(
        _cast_kernel,
        out_type=jax.ShapeDtypeStruct((padded,), jnp.uint8),
        grid=(padded // BLOCK,),
        grid_names=("blocks",),
        kernel_name="cast_kernel",
    )
    return cast(jnp.pad(x, (0, padded - N)))[:N]
