"""Softmax in Pallas, deliberately slow: one fault each, for `parity explain` to name.

    parity explain softmax -w softmax_8192x8192 --pass fwd \\
        --impl tests/variants/pallas_softmax.py:spilling --as pallas
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def _rows_kernel(x, scale, blocks, warpgroups=1):
    """Each block takes every blocks-th row, whole, into the registers of one warpgroup."""
    R, N = x.shape

    def rows_kernel(x_gmem, y_gmem):
        layout = plgpu.Layout.WG_STRIDED((N,), vec_size=8)

        @pl.loop(0, (R + blocks - 1) // blocks)
        def _(trip):
            row = jnp.minimum(lax.axis_index("rows") + trip * blocks, R - 1)
            s = plgpu.load(x_gmem.at[row], layout=layout, optimized=False)
            s = s.astype(jnp.float32) * scale
            e = jnp.exp(s - s.max())
            y_gmem[row] = (e * (1.0 / e.sum())).astype(y_gmem.dtype)

    return plgpu.kernel(
        rows_kernel,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(blocks,),
        grid_names=("rows",),
        kernel_name="rows_kernel",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(x)


def spilling(x, mask=None, *, scale=1.0, causal_offset=None):
    """A whole row in the registers of one warpgroup: 256 values a thread for rows of 32768."""
    return _rows_kernel(x, scale, x.shape[0])


def few_blocks(x, mask=None, *, scale=1.0, causal_offset=None):
    """Sixteen blocks, whatever the device."""
    return _rows_kernel(x, scale, 16)


def uncoalesced(x, mask=None, *, scale=1.0, causal_offset=None):
    """Each lane walks along a row of its own: neighbouring lanes are a row apart."""
    R, N = x.shape

    def columns_kernel(x_gmem, y_gmem):
        layout = plgpu.Layout.WG_STRIDED((128,), vec_size=1)
        rows = pl.ds(lax.axis_index("rows") * 128, 128)

        def scores(n):
            return (
                plgpu.load(x_gmem.at[rows, n], layout=layout, optimized=False).astype(jnp.float32)
                * scale
            )

        def accumulate(n, carry):
            top, total = carry
            s = scores(n)
            new_top = jnp.maximum(top, s)
            return new_top, total * jnp.exp(top - new_top) + jnp.exp(s - new_top)

        start = [plgpu.layout_cast(jnp.full((128,), v, jnp.float32), layout) for v in (-1e30, 0.0)]
        top, total = lax.fori_loop(0, N, accumulate, tuple(start))

        @pl.loop(0, N)
        def _(n):
            y_gmem[rows, n] = (jnp.exp(scores(n) - top) / total).astype(y_gmem.dtype)

    return plgpu.kernel(
        columns_kernel,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(R // 128,),
        grid_names=("rows",),
        kernel_name="columns_kernel",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(x)
