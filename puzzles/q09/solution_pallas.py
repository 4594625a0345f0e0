"""Q09, sixteen uneven steps: NF4 with double quantization back to float16.

    b       = i // 64                                            the block of weight i
    scale   = code2[absmax[b]] * absmax2[b // 256] + offset[0]
    w[i]    = code[nibble i] * scale                             rounded once, to float16

packed uint8[P]: w[2j] in the high nibble of byte j, w[2j + 1] in the low one. One launch.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 32  # blocks of 64 weights that are decoded at once; 256 share an absmax2
# Of [ROWS, 32, 2] a warp has every fourth row, a lane one byte of it: two weights side by side.
LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((4, 32, 2),)), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
)


def _lookup(table_gmem, index, start=0, count=16):
    """table_gmem[start + index % count] for an array of indices: Mosaic GPU has no gather.

    A tree of selects, its lowest bit at the leaves; count is a power of two.
    """
    if count == 1:
        return lax.broadcast(table_gmem[start], index.shape)
    # BEGIN SOLUTION
    # 1. Look index up in both halves of the table. Where the bit `count // 2` of the index is set
    #    the second one's value is right, otherwise the first one's.
    # INSTEAD return _lookup(table_gmem, index, start, 1)
    half = count // 2
    first = _lookup(table_gmem, index, start, half)
    second = _lookup(table_gmem, index, start + half, half)
    return lax.select(index & half != 0, second, first)
    # END SOLUTION


def _nf4_kernel(
    packed_gmem, absmax_gmem, code_gmem, absmax2_gmem, code2_gmem, offset_gmem, w_gmem, scale_smem
):
    """One block of threads for one superblock: packed [S * 256, 32], absmax [S * 256]."""
    s = lax.axis_index("superblocks")
    q = absmax_gmem[pl.ds(s * 256, 256)].astype(jnp.int32)

    def piece(i, fine):
        """fine, with code2[q] where q is one of 16 i .. 16 i + 15: few values at a time."""
        return jnp.where(q >> 4 == i, _lookup(code2_gmem, q, 16 * i), fine)

    fine = lax.fori_loop(0, 16, piece, jnp.zeros(256, jnp.float32))
    # BEGIN SOLUTION
    # 2. The scales of the superblock's 256 blocks, of fine = code2[absmax], into scale_smem.
    scale_smem[...] = fine * absmax2_gmem[s] + offset_gmem[0]
    # END SOLUTION

    @pl.loop(0, 256 // ROWS)
    def _(step):
        rows = pl.ds(s * 256 + step * ROWS, ROWS)
        shape = ROWS, 32, 2
        byte = plgpu.load(packed_gmem.at[rows], layout=LAYOUT.reduce(2), optimized=False)
        byte = lax.broadcast_in_dim(byte.astype(jnp.int32), shape, [0, 1])
        scale = plgpu.load(
            scale_smem.at[pl.ds(step * ROWS, ROWS)], layout=LAYOUT.reduce((1, 2)), optimized=False
        )
        scale = lax.broadcast_in_dim(scale, shape, [0])
        which = plgpu.broadcasted_iota(jnp.int32, shape, 2, layout=LAYOUT)  # 0 or 1, of a byte
        # BEGIN SOLUTION
        # 3. The nibble of each weight: the high one is the first.
        # INSTEAD nibble = which & 15
        nibble = jnp.where(which == 0, byte >> 4, byte & 15)
        # END SOLUTION
        w_gmem[rows] = (_lookup(code_gmem, nibble) * scale).astype(jnp.float16)


def solve(packed, absmax, code, absmax2, code2, offset):
    P, S = packed.shape[0], absmax2.shape[0]
    dequantize = plgpu.kernel(
        _nf4_kernel,
        out_type=jax.ShapeDtypeStruct((S * 256, 32, 2), jnp.float16),
        grid=(S,),
        grid_names=("superblocks",),
        scratch_types=[plgpu.SMEM((256,), jnp.float32)],
        kernel_name="nf4_kernel",
    )
    packed = jnp.pad(packed, (0, S * 256 * 32 - P)).reshape(S * 256, 32)
    absmax = jnp.pad(absmax, (0, S * 256 - absmax.shape[0]))
    return dequantize(packed, absmax, code, absmax2, code2, offset).reshape(-1)[: 2 * P]
