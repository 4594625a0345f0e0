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

LAYOUT = plgpu.Layout.WGMMA_UPCAST_4X  # a thread holds 8 neighbours of a row
ROWS = 64  # blocks of 64 weights that are decoded at once; 256 share an absmax2


def _lookup(table_gmem, index):
    """table_gmem[index] for an array of int32 indices: Mosaic GPU has no gather.

    A tree of selects, the lowest bit at its leaves.
    """
    values = [lax.broadcast(table_gmem[i], index.shape) for i in range(table_gmem.shape[0])]
    bit = 0
    # BEGIN SOLUTION
    # 1. While there are several values: where bit `bit` of the index is set, the second of each
    #    pair of neighbours wins, otherwise the first. Go on with the winners and the next bit.
    while len(values) > 1:
        is_set = (index >> bit) & 1 == 1
        pairs = zip(values[::2], values[1::2], strict=True)
        values, bit = [lax.select(is_set, second, first) for first, second in pairs], bit + 1
    # END SOLUTION
    return values[0]


def _nf4_kernel(
    twice_gmem, absmax_gmem, code_gmem, absmax2_gmem, code2_gmem, offset_gmem, w_gmem, scale_smem
):
    """One block of threads for one superblock: twice [S * 256, 64], absmax [S * 256].

    Row b of `twice` is block b of the weights: column i holds the byte in which weight i lies.
    """
    s = lax.axis_index("superblocks")
    # BEGIN SOLUTION
    # 2. The scales of the superblock's 256 blocks, into scale_smem. [256]
    q = absmax_gmem[pl.ds(s * 256, 256)].astype(jnp.int32)
    scale_smem[...] = _lookup(code2_gmem, q) * absmax2_gmem[s] + offset_gmem[0]
    # END SOLUTION

    @pl.loop(0, 256 // ROWS)
    def _(step):
        rows = pl.ds(s * 256 + step * ROWS, ROWS)
        byte = plgpu.load(twice_gmem.at[rows], layout=LAYOUT, optimized=False).astype(jnp.int32)
        column = plgpu.broadcasted_iota(jnp.int32, byte.shape, 1, layout=LAYOUT)
        scale = plgpu.load(
            scale_smem.at[pl.ds(step * ROWS, ROWS)], layout=LAYOUT.reduce(1), optimized=False
        )
        scale = lax.broadcast_in_dim(scale, byte.shape, [0])
        # BEGIN SOLUTION
        # 3. The nibble of each weight: the high one in even columns.
        # INSTEAD nibble = column & 15
        nibble = jnp.where(column & 1 == 0, byte >> 4, byte & 15)
        # END SOLUTION
        w_gmem[rows] = (_lookup(code_gmem, nibble) * scale).astype(jnp.float16)


def solve(packed, absmax, code, absmax2, code2, offset):
    P, S = packed.shape[0], absmax2.shape[0]
    dequantize = plgpu.kernel(
        _nf4_kernel,
        out_type=jax.ShapeDtypeStruct((S * 256, 64), jnp.float16),
        grid=(S,),
        grid_names=("superblocks",),
        scratch_types=[plgpu.SMEM((256,), jnp.float32)],
        kernel_name="nf4_kernel",
    )
    # Mosaic GPU cannot take a byte apart into neighbours, so every byte comes twice.
    twice = jnp.repeat(jnp.pad(packed, (0, S * 256 * 32 - P)), 2).reshape(S * 256, 64)
    absmax = jnp.pad(absmax, (0, S * 256 - absmax.shape[0]))
    w = dequantize(twice, absmax, code, absmax2, code2, offset)
    return w.reshape(-1)[: 2 * P]
