"""Four-bit weights, brought into the order in which int4_matmul's kernels read them; done once.

    for each block of 256 of K and each row of W: 64 words of 16 bits
        a word's nibbles come from four planes of 64 neighbours, one from each
    scales and zero points, transposed

JAX's operations: XLA makes one fusion of the words, in which every byte is written once.

Twin: triton_kernels/int4_matmul_prepack.py, a kernel.
"""

import jax
import jax.numpy as jnp
from jax import lax

from . import _lib

BLOCK_K, PLANE = 256, 64


def ordered(
    w_packed: jax.Array, w_scale: jax.Array, w_zero: jax.Array | None, group: int
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(words, w_scale, w_zero), as int4_prepack returns them."""
    N, K = w_packed.shape[0], 2 * w_packed.shape[1]
    if K % BLOCK_K:
        w_packed = jnp.pad(w_packed, ((0, 0), (0, -K % BLOCK_K // 2)), constant_values=0x88)
    code = _codes(w_packed).astype(jnp.int16)
    code = code.reshape(N, _lib.cdiv(K, BLOCK_K), 4, PLANE).transpose(1, 2, 0, 3)
    words = code[:, 0] | code[:, 1] << 4 | code[:, 2] << 8 | code[:, 3] << 12
    if w_zero is not None:
        w_zero = _codes(w_zero)[:, : K // group].T
    return words, w_scale.T, w_zero


def _codes(packed: jax.Array) -> jax.Array:
    """uint8 [rows, n] -> [rows, 2n], the low nibble first.

    By a shift that differs, which XLA computes in place; of two stacked arrays it asks for each
    element which one it is from.
    """
    shift = lax.iota(jnp.uint8, 2) << 2
    return (packed[:, :, None] >> shift & 15).reshape(len(packed), 2 * packed.shape[1])
