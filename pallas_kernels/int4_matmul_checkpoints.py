"""Four-bit weights to and from the arrays of GPTQ and AWQ files, once for each model.

    GPTQ   qweight [K / 8, N]   word j of a column holds k = 8j + i at bits 4i
           qzeros  [K / G, N / 8]   in order; version 1 ("gptq") stores each zero point less one
           scales  [K / G, N]   g_idx [K], the group of each k
    AWQ    qweight [K, N / 8]   bits 4i of a word hold column ORDER[i] of its eight
           qzeros  [K / G, N / 8]   likewise   scales [K / G, N]

All words are int32. These are JAX's operations, on arrays of any device: what int4_quantize
returns and int4_prepack takes lies in memory as GPTQ's words do, but for the transposition.

Values are looked at, which waits for the device and is not for jit: weights whose zero points are
all 8 get none, and what a format cannot say raises.

Twin: triton_kernels/int4_matmul_checkpoints.py.

Sources, read for the layouts: AutoGPTQ, GPTQModel, AutoAWQ (its `gemm` version). Bit for bit those
of parity.formats.
"""

import jax
import jax.numpy as jnp
from jax import lax

from . import _lib

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
INVERSE = (0, 4, 1, 5, 2, 6, 3, 7)
ZERO = 8  # of symmetric weights
SCALES = (jnp.bfloat16, jnp.float16, jnp.float32)
WORDS = (jnp.int32,)


def int4_from_gptq(
    qweight: jax.Array,
    qzeros: jax.Array,
    scales: jax.Array,
    g_idx: jax.Array | None = None,
    *,
    version: int,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """A GPTQ layer's arrays as (w_packed [N, K / 2] uint8, w_scale [N, K / G], w_zero or None).

    version: 1 for `checkpoint_format: gptq`, 2 for `gptq_v2`.

    Raises TypeError for dtypes and ValueError for another version, shapes that do not fit, a g_idx
    out of order (`desc_act`), and in version 1 a stored 15, of which readers make 0 or 16.
    """
    _check_version(version)
    _lib.check_array("qweight", qweight, ("K / 8", "N"), WORDS)
    K, N = 8 * qweight.shape[0], qweight.shape[1]
    zero = _zeros_of(qzeros, scales, K, N)
    if g_idx is not None:
        _lib.check_array("g_idx", g_idx, (K,), WORDS)
        if not jnp.array_equal(g_idx, _group_of(K, len(scales))):
            raise ValueError("g_idx: expected k // group, got groups out of order (desc_act)")
    if version == 1:
        if (zero == 15).any():
            raise ValueError("qzeros: version 1 stores 15, which readers take for 0 or for 16")
        zero = zero + jnp.uint8(1)
    return _bytes_of(qweight.T), scales.T, _packed(zero)


def int4_to_gptq(
    w_packed: jax.Array, w_scale: jax.Array, w_zero: jax.Array | None = None, *, version: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """int4_quantize's arrays as a GPTQ layer's (qweight, qzeros, scales, g_idx).

    Raises TypeError for dtypes and ValueError for another version, shapes that do not fit, N or K
    not a multiple of 8, and in version 1 a zero point of 0, which it cannot hold.
    """
    _check_version(version)
    zero = _zeros(w_packed, w_scale, w_zero)
    K = 2 * w_packed.shape[1]
    if K % 8:
        raise ValueError(f"w_packed: expected 8 to divide K = {K}")
    if version == 1 and (zero == 0).any():
        raise ValueError("w_zero: version 1 cannot hold a zero point of 0; version 2 can")
    qweight = _words_of(w_packed).T
    qzeros = _words(zero - jnp.uint8(1) if version == 1 else zero)
    return qweight, qzeros, w_scale.T, _group_of(K, w_scale.shape[1])


def int4_from_awq(
    qweight: jax.Array, qzeros: jax.Array, scales: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """An AWQ layer's arrays as (w_packed [N, K / 2] uint8, w_scale [N, K / G], w_zero or None).

    Raises TypeError for dtypes and ValueError for shapes that do not fit, or an odd K.
    """
    _lib.check_array("qweight", qweight, ("K", "N / 8"), WORDS)
    K, N = qweight.shape[0], 8 * qweight.shape[1]
    if K % 2:
        raise ValueError(f"qweight: expected an even K, got {K}")
    zero = _ordered(_zeros_of(qzeros, scales, K, N), INVERSE)
    code = _ordered(_codes(qweight), INVERSE).T
    return _bytes(code), scales.T, _packed(zero)


def int4_to_awq(
    w_packed: jax.Array, w_scale: jax.Array, w_zero: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """int4_quantize's arrays as an AWQ layer's (qweight, qzeros, scales).

    Raises as int4_to_gptq does, but for K, which need not be a multiple of 8.
    """
    zero = _zeros(w_packed, w_scale, w_zero)
    code = _nibbles(w_packed).T
    return _words(_ordered(code, ORDER)), _words(_ordered(zero, ORDER)), w_scale.T


def _check_version(version: int) -> None:
    _lib.check_static("version", version, (int,))
    if version not in (1, 2):
        raise ValueError(f"version: expected 1 or 2, got {version}")


def _zeros_of(qzeros: jax.Array, scales: jax.Array, K: int, N: int) -> jax.Array:
    """A file's zero points as stored, [K / G, N], after all sizes have been checked."""
    _lib.check_array("scales", scales, ("K / group", N), SCALES)
    groups = scales.shape[0]
    if N % 8:
        raise ValueError(f"qweight: expected 8 to divide N = {N}")
    if not groups or K % groups:
        raise ValueError(f"scales: expected groups that divide K = {K}, got {groups}")
    _lib.check_array("qzeros", qzeros, (groups, N // 8), WORDS)
    return _codes(qzeros)


def _zeros(w_packed: jax.Array, w_scale: jax.Array, w_zero: jax.Array | None) -> jax.Array:
    """Our zero points, [K / G, N], one to a byte, after all sizes have been checked."""
    _lib.check_array("w_packed", w_packed, ("N", "K / 2"), (jnp.uint8,))
    N, K = w_packed.shape[0], 2 * w_packed.shape[1]
    _lib.check_array("w_scale", w_scale, (N, "K / group"), SCALES)
    groups = w_scale.shape[1]
    if N % 8:
        raise ValueError(f"w_packed: expected 8 to divide N = {N}")
    if not groups or K % groups:
        raise ValueError(f"w_scale: expected groups that divide K = {K}, got {groups}")
    if w_zero is None:
        return jnp.full((groups, N), ZERO, jnp.uint8)
    _lib.check_array("w_zero", w_zero, (N, 4 * _lib.cdiv(groups, 8)), (jnp.uint8,))
    return _nibbles(w_zero)[:, :groups].T


def _packed(zero: jax.Array) -> jax.Array | None:
    """[K / G, N] -> [N, 4 * ceil(K / G / 8)], whole words filled with 8s; None if all are 8."""
    if (zero == ZERO).all():
        return None
    return _bytes(jnp.pad(zero.T, ((0, 0), (0, -zero.shape[0] % 8)), constant_values=ZERO))


def _group_of(K: int, groups: int) -> jax.Array:
    """int32 [K]: the group of each k, in order."""
    return jnp.arange(K, dtype=jnp.int32) // (K // groups)


def _nibbles(packed: jax.Array) -> jax.Array:
    """uint8 [rows, n] -> codes uint8 [rows, 2n], the low nibble first."""
    return jnp.stack((packed & 15, packed >> 4), axis=2).reshape(len(packed), 2 * packed.shape[1])


def _bytes(code: jax.Array) -> jax.Array:
    """The inverse of _nibbles."""
    return code[:, 0::2] | code[:, 1::2] << 4


def _bytes_of(words: jax.Array) -> jax.Array:
    """int32 [rows, n] -> uint8 [rows, 4n], little-endian."""
    return lax.bitcast_convert_type(words, jnp.uint8).reshape(len(words), 4 * words.shape[1])


def _words_of(packed: jax.Array) -> jax.Array:
    """The inverse of _bytes_of."""
    return lax.bitcast_convert_type(packed.reshape(len(packed), packed.shape[1] // 4, 4), jnp.int32)


def _codes(words: jax.Array) -> jax.Array:
    """int32 [rows, n] -> codes uint8 [rows, 8n], that at bits 4i of word j at 8j + i."""
    return _nibbles(_bytes_of(words))


def _words(code: jax.Array) -> jax.Array:
    """The inverse of _codes."""
    return _words_of(_bytes(code))


def _ordered(code: jax.Array, order: tuple[int, ...]) -> jax.Array:
    """Each run of eight codes along the rows in that order."""
    return code.reshape(len(code), code.shape[1] // 8, 8)[:, :, jnp.array(order)].reshape(
        code.shape
    )
