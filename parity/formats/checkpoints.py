"""Packed int4 weights to and from the tensors that GPTQ and AWQ checkpoints hold.

Both keep W transposed, [K, N] for a layer from K inputs to N outputs, eight codes to an int32 word:

           qweight       packed along                qzeros          scales      g_idx
    GPTQ   [K/8, N]      K, k = 8j + i at bits 4i    [K/G, N/8]      [K/G, N]    [K], k's group
    AWQ    [K, N/8]      N, in AWQ_ORDER             [K/G, N/8]      [K/G, N]

GPTQ packs qzeros along N, in order; AWQ in AWQ_ORDER: bits 4i of a word hold column AWQ_ORDER[i] of
its eight. `checkpoint_format: gptq_v2` stores zero points as they are, and so does AWQ; GPTQ's
first version ("gptq") stores each less one. Scales are copied, whatever float dtype they have.

Sources, read for the layouts: AutoGPTQ (qlinear_cuda.py), GPTQModel (utils/model.py), AutoAWQ
(modules/linear/gemm.py, utils/packing_utils.py). AutoAWQ's `gemv` variant is another layout.
"""

from typing import NamedTuple

import numpy as np

from parity.formats import _arguments as arguments
from parity.formats.integers import (
    ZERO,
    int4_pack_zeros,
    int4_unpack_zeros,
    pack_nibbles,
    unpack_nibbles,
)

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_AWQ_INVERSE = tuple(AWQ_ORDER.index(i) for i in range(8))


class Gptq(NamedTuple):
    """A GPTQ layer's tensors, under the names they have in a file."""

    qweight: np.ndarray  # int32 [K / 8, N]
    qzeros: np.ndarray  # int32 [K / G, N / 8]
    scales: np.ndarray  # [K / G, N]
    g_idx: np.ndarray  # int32 [K]


class Awq(NamedTuple):
    """An AWQ layer's tensors, under the names they have in a file."""

    qweight: np.ndarray  # int32 [K, N / 8]
    qzeros: np.ndarray  # int32 [K / G, N / 8]
    scales: np.ndarray  # [K / G, N]


def int4_to_gptq(
    packed: np.ndarray, scale: np.ndarray, zero: np.ndarray | None = None, *, version: int
) -> Gptq:
    """int4_quantize's arrays (low nibble first) as GPTQ keeps them.

    packed uint8 [N, K/2], scale [N, K/G], zero uint8 [N, 4 * ceil(K/G / 8)] or None.

    Raises TypeError for packed or zero of another dtype; ValueError for another version than 1 and
    2, shapes that do not fit, N or K not a multiple of 8, and with version 1 for a zero point of 0:
    it would be stored as -1, which readers take for 15 + 1 = 16, for 0, or for a borrow from the
    zero point beside it.
    """
    arguments.one_of(version, (1, 2), "version")
    code, shift = _codes_and_zeros(packed, scale, zero)
    if version == 1 and (shift == 0).any():
        raise ValueError("zero: version 1 cannot hold a zero point of 0; version 2 can")
    arguments.multiple(code.shape[1], 8, "packed")
    stored = shift - np.uint8(1) if version == 1 else shift
    return Gptq(
        np.ascontiguousarray(_words(code).T),
        _words(np.ascontiguousarray(stored.T)),
        np.ascontiguousarray(scale.T),
        _group_of(code.shape[1], scale.shape[1]),
    )


def int4_from_gptq(
    qweight: np.ndarray,
    qzeros: np.ndarray,
    scales: np.ndarray,
    g_idx: np.ndarray | None = None,
    *,
    version: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """A GPTQ layer's tensors as int4_quantize returns them: (packed, scale, zero or None).

    The shapes are Gptq's. zero is None where every zero point is 8, as in symmetric files.

    Raises TypeError unless the words and g_idx are int32; ValueError for another version than 1 and
    2, shapes that do not fit, a g_idx that is not k // G (`desc_act`: x's columns would have to be
    permuted too), and in version 1 for a stored 15, of which readers make 0 or 16.
    """
    arguments.one_of(version, (1, 2), "version")
    arguments.rank(qweight, 2, "qweight")
    code = _unworded(np.ascontiguousarray(qweight.T), "qweight")  # [N, K]
    shift = _unworded(qzeros, "qzeros")  # [K / G, N]
    _fits(code.T, shift, scales)
    if g_idx is not None:
        in_order = _group_of(code.shape[1], scales.shape[0])
        if not np.array_equal(arguments.dtype(g_idx, np.int32, "g_idx"), in_order):
            raise ValueError("g_idx: expected k // G, got groups out of order (desc_act)")
    if version == 1:
        if (shift == 15).any():
            raise ValueError("qzeros: version 1 stores 15, which readers take for 0 or for 16")
        shift = shift + np.uint8(1)
    return _packed(code, scales, shift)


def int4_to_awq(packed: np.ndarray, scale: np.ndarray, zero: np.ndarray | None = None) -> Awq:
    """int4_quantize's arrays (low nibble first) as AWQ's `gemm` version keeps them.

    Arguments and errors are int4_to_gptq's, but for K, which need not be a multiple of 8.
    """
    code, shift = _codes_and_zeros(packed, scale, zero)
    return Awq(
        _words(_reordered(code.T, AWQ_ORDER)),
        _words(_reordered(shift.T, AWQ_ORDER)),
        np.ascontiguousarray(scale.T),
    )


def int4_from_awq(
    qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """An AWQ layer's tensors as int4_quantize returns them: (packed, scale, zero or None).

    The shapes are Awq's. zero is None where every zero point is 8. Raises TypeError unless the
    words are int32, ValueError for shapes that do not fit or an odd K.
    """
    code = _reordered(_unworded(qweight, "qweight"), _AWQ_INVERSE)  # [K, N]
    shift = _reordered(_unworded(qzeros, "qzeros"), _AWQ_INVERSE)  # [K / G, N]
    _fits(code, shift, scales)
    arguments.multiple(code.shape[0], 2, "qweight")
    return _packed(np.ascontiguousarray(code.T), scales, shift)


def _codes_and_zeros(
    packed: np.ndarray, scale: np.ndarray, zero: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Codes [N, K] and zero points [N, K / G], one to an element."""
    arguments.rank(packed, 2, "packed")
    arguments.rank(scale, 2, "scale")
    code = unpack_nibbles(packed, low_first=True)
    rows, groups = code.shape[0], scale.shape[1]
    arguments.shape(scale, (rows, groups), "scale")
    arguments.multiple(code.shape[1], groups, "scale")
    arguments.multiple(rows, 8, "packed")
    if zero is None:
        return code, np.full(scale.shape, ZERO, np.uint8)
    shift = int4_unpack_zeros(zero, groups)
    arguments.shape(shift, scale.shape, "zero")
    return code, shift


def _packed(
    code: np.ndarray, scales: np.ndarray, shift: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """From codes [N, K] and the file's scales and zero points [K / G, N]."""
    zero = None if (shift == ZERO).all() else int4_pack_zeros(np.ascontiguousarray(shift.T))
    return pack_nibbles(code, low_first=True), np.ascontiguousarray(scales.T), zero


def _fits(code: np.ndarray, shift: np.ndarray, scales: np.ndarray) -> None:
    """code [K, N], shift and scales [K / G, N]."""
    arguments.rank(scales, 2, "scales")
    arguments.shape(scales, (scales.shape[0], code.shape[1]), "scales")
    arguments.multiple(code.shape[0], scales.shape[0], "scales")
    arguments.shape(shift[:, ::8], (scales.shape[0], code.shape[1] // 8), "qzeros")


def _group_of(size: int, groups: int) -> np.ndarray:
    """int32 [size]: the group of each k, in order."""
    return np.repeat(np.arange(groups, dtype=np.int32), size // groups)


def _words(code: np.ndarray) -> np.ndarray:
    """Codes [..., 8n] -> int32 [..., n], code 8j + i at bits 4i of word j."""
    return pack_nibbles(code, low_first=True).view("<i4").astype(np.int32)


def _unworded(words: np.ndarray, name: str) -> np.ndarray:
    """The inverse of _words."""
    arguments.rank(words, 2, name)
    little = np.ascontiguousarray(arguments.dtype(words, np.int32, name), "<i4")
    return unpack_nibbles(little.view(np.uint8), low_first=True)


def _reordered(code: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    return np.ascontiguousarray(code.reshape(code.shape[0], -1, 8)[..., order].reshape(code.shape))
