"""Q03, a code for zero: x float32[R, C] -> q uint8[R, C], scale float32[R], zero uint8[R].

    low, high = min(row, 0), max(row, 0)
    scale     = (high - low) / 255                1 where both are 0
    inverse   = 255 / (high - low)                anything where both are 0
    zero      = round(-low * inverse)
    q         = round(x * inverse) + zero         kept to 0 .. 255

Ties go to the even number.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu


def _row_kernel(x_gmem, q_gmem, scale_gmem, zero_gmem):
    """One block of threads for a whole row; refs are [R, lanes], zeros fill them up."""
    r = lax.axis_index("rows")
    # BEGIN SOLUTION
    # 1. Read row r; find low and high, which are never above and below 0.
    # 2. Fill the 128 elements of scale_gmem[r] with the scale; a row of zeros has 1.
    # 3. Round -low * inverse, ties to even (0 must not divide); fill zero_gmem[r], as uint8.
    # 4. Round x * inverse, add the zero point, keep to 0 .. 255, store as uint8.
    x = x_gmem[r]
    low = jnp.minimum(jnp.min(x), 0.0)
    high = jnp.maximum(jnp.max(x), 0.0)
    span = high - low
    scale_gmem[r] = jnp.full((128,), jnp.where(span == 0.0, 1.0, span / 255))
    inverse = 255 / jnp.where(span == 0.0, 1.0, span)
    zero = jnp.round(-low * inverse)
    zero_gmem[r] = jnp.full((128,), zero.astype(jnp.uint8))
    q = jnp.minimum(jnp.maximum(jnp.round(x * inverse) + zero, 0.0), 255.0)
    q_gmem[r] = q.astype(jnp.uint8)
    # END SOLUTION


def solve(x):
    R, C = x.shape
    lanes = -(-C // 128) * 128  # a warpgroup's 128 threads share them evenly
    quantize = plgpu.kernel(
        _row_kernel,
        out_type=(
            jax.ShapeDtypeStruct((R, lanes), jnp.uint8),
            jax.ShapeDtypeStruct((R, 128), jnp.float32),
            jax.ShapeDtypeStruct((R, 128), jnp.uint8),
        ),
        grid=(R,),
        grid_names=("rows",),
        kernel_name="row_kernel",
    )
    q, scale, zero = quantize(jnp.pad(x, ((0, 0), (0, lanes - C))))
    return q[:, :C], scale[:, 0], zero[:, 0]
