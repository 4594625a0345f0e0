"""Q15, four-bit weights, sixteen-bit sums: y[M, N] = x[M, K] @ W[N, K].T

    W[n, k] = (code[n, k] - zero[k // 128, n]) * scale[k // 128, n]      float16
    y       = x @ W.T                                                    summed in float32

packed uint8[N, K / 2]: W[n, 2j] in the low nibble of byte j, W[n, 2j + 1] in the high one.
W is never written to memory. One launch.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

BLOCK_M, BLOCK_N = 16, 64  # a tensor core multiplies 64 rows of W by 8, 16, ... tokens
STAGES = 4
TILES = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
BYTES = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(64))


def _w4_kernel(x_gmem, packed_gmem, scale_gmem, zero_gmem, y_gmem, y_smem):
    """One block of threads for a tile of y, [BLOCK_M, BLOCK_N]; x [2, M, K / 2].

    x[0] holds the even columns, x[1] the odd ones.
    """
    mi, ni = lax.axis_index("m"), lax.axis_index("n")

    def group(_, x_smem, packed_smem, scale_smem, zero_smem, acc):
        row = plgpu.Layout.WGMMA.reduce(1)
        byte = plgpu.load(packed_smem, layout=plgpu.Layout.WGMMA, optimized=False)
        scale = plgpu.load(scale_smem, layout=row, optimized=False)
        half = pl.ds(ni % 2 * BLOCK_N, BLOCK_N)
        zero = plgpu.load(zero_smem.at[half], layout=row, optimized=False)
        plgpu.commit_smem()  # they have been read before they are filled again
        byte = byte.astype(jnp.int16)
        zero = zero.astype(jnp.int16)
        zero = lax.broadcast_in_dim(zero, byte.shape, [0])
        scale = lax.broadcast_in_dim(scale.astype(jnp.float32), acc.shape, [0])
        # BEGIN SOLUTION
        # 1. The low nibbles and the high ones, as float16, minus the zero point: two pieces of a
        #    group's codes, [BLOCK_N, 64] each.
        # 2. The sum over the group: in an accumulator, pl.run_scoped(product, plgpu.ACC(acc.shape,
        #    jnp.float32)), a piece times the columns of x that belong to it (plgpu.wgmma; of a
        #    reference's part the transpose is x_smem.at[0].T), and the other;
        #    plgpu.wgmma_wait(0) before it is read.
        # 3. Return acc plus that, times the scale.
        # A float16 with the bits 0x6400 | q is 1024 + q, which is quicker than a conversion; and a
        # high nibble where it is, at the bits 0xf0, makes it 1024 + 16 q: no shift.
        # INSTEAD return acc
        low, high, zero = (
            lax.bitcast_convert_type(q | 0x6400, jnp.float16) for q in (byte & 15, byte & 240, zero)
        )
        low, high = low - zero, high * 0.0625 - (zero - 960.0)  # (1024 + 16 q) / 16 is 64 + q

        def product(part):
            plgpu.wgmma(part, low, x_smem.at[0].T)
            plgpu.wgmma(part, high, x_smem.at[1].T)
            plgpu.wgmma_wait(0)
            return part[...]

        return acc + pl.run_scoped(product, plgpu.ACC(acc.shape, jnp.float32)) * scale
        # END SOLUTION

    zeros = jnp.zeros((BLOCK_N, BLOCK_M), jnp.float32)
    acc = plgpu.emit_pipeline(
        group,
        grid=(scale_gmem.shape[0],),
        in_specs=[
            plgpu.BlockSpec((2, BLOCK_M, 64), lambda g: (0, mi, g), transforms=TILES),
            plgpu.BlockSpec((BLOCK_N, 64), lambda g: (ni, g), transforms=BYTES),
            plgpu.BlockSpec((None, BLOCK_N), lambda g: (g, ni)),
            # In shared memory each copy begins at a multiple of 128 bytes: those of two tiles.
            plgpu.BlockSpec((None, 2 * BLOCK_N), lambda g: (g, ni // 2)),
        ],
        max_concurrent_steps=STAGES,
        init_carry=plgpu.layout_cast(zeros, plgpu.Layout.WGMMA),
    )(x_gmem, packed_gmem, scale_gmem, zero_gmem)
    y = plgpu.layout_cast(acc.astype(jnp.float16), plgpu.Layout.WGMMA_TRANSPOSED)
    y_smem.T[...] = y
    plgpu.commit_smem()
    rows, columns = pl.ds(mi * BLOCK_M, BLOCK_M), pl.ds(ni * BLOCK_N, BLOCK_N)
    plgpu.copy_smem_to_gmem(y_smem, y_gmem.at[rows, columns])
    plgpu.wait_smem_to_gmem(0)


def solve(x, packed, scale, zero):
    (M, K), N = x.shape, packed.shape[0]
    padded_m, padded_n = -(-M // BLOCK_M) * BLOCK_M, -(-N // BLOCK_N) * BLOCK_N
    more_n = padded_n - N
    x = jnp.pad(x, ((0, padded_m - M), (0, 0)))
    x = x.reshape(padded_m, K // 2, 2).transpose(2, 0, 1)
    packed = jnp.pad(packed, ((0, more_n), (0, 0)))
    scale = jnp.pad(scale, ((0, 0), (0, more_n)))
    zero = jnp.pad(zero, ((0, 0), (0, more_n + padded_n % (2 * BLOCK_N))))
    multiply = plgpu.kernel(
        _w4_kernel,
        out_type=jax.ShapeDtypeStruct((padded_m, padded_n), jnp.float16),
        grid=(padded_m // BLOCK_M, padded_n // BLOCK_N),
        grid_names=("m", "n"),
        scratch_types=[
            plgpu.SMEM((BLOCK_M, BLOCK_N), jnp.float16, transforms=(plgpu.SwizzleTransform(128),))
        ],
        kernel_name="w4_kernel",
    )
    return multiply(x, packed, scale, zero)[:M, :N]
