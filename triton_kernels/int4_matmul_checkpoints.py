"""Four-bit weights to and from the tensors of GPTQ and AWQ files, once for each model.

    GPTQ   qweight [K / 8, N]   word j of a column holds k = 8j + i at bits 4i
           qzeros  [K / G, N / 8]   in order; version 1 ("gptq") stores each zero point less one
           scales  [K / G, N]   g_idx [K], the group of each k
    AWQ    qweight [K, N / 8]   bits 4i of a word hold column ORDER[i] of its eight
           qzeros  [K / G, N / 8]   likewise   scales [K / G, N]

All words are int32. These are PyTorch's operations, on tensors of any device: what int4_quantize
returns and int4_prepack takes lies in memory as GPTQ's words do, but for the transposition.

Values are looked at, which waits for the device and is not for torch.compile: weights whose zero
points are all 8 get none, and what a format cannot say raises.

Twin: pallas_kernels/int4_matmul_checkpoints.py.

Sources, read for the layouts: AutoGPTQ, GPTQModel, AutoAWQ (its `gemm` version). Bit for bit those
of parity.formats.
"""

import torch
from torch import Tensor

from . import _lib

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
INVERSE = (0, 4, 1, 5, 2, 6, 3, 7)
ZERO = 8  # of symmetric weights
SCALES = (torch.bfloat16, torch.float16, torch.float32)
WORDS = (torch.int32,)


def int4_from_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None = None, *, version: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A GPTQ layer's tensors as (w_packed [N, K / 2] uint8, w_scale [N, K / G], w_zero or None).

    version: 1 for `checkpoint_format: gptq`, 2 for `gptq_v2`.

    Raises TypeError for dtypes and ValueError for another version, shapes that do not fit, a g_idx
    out of order (`desc_act`), and in version 1 a stored 15, of which readers make 0 or 16.
    """
    _check_version(version)
    _check("qweight", qweight, ("K / 8", "N"), WORDS)
    K, N = 8 * qweight.shape[0], qweight.shape[1]
    zero = _zeros_of(qzeros, scales, K, N)
    if g_idx is not None:
        _check("g_idx", g_idx, (K,), WORDS)
        if not torch.equal(g_idx, _group_of(K, len(scales), g_idx)):
            raise ValueError("g_idx: expected k // group, got groups out of order (desc_act)")
    if version == 1:
        if (zero == 15).any():
            raise ValueError("qzeros: version 1 stores 15, which readers take for 0 or for 16")
        zero = zero + 1
    return qweight.t().contiguous().view(torch.uint8), scales.t().contiguous(), _packed(zero)


def int4_to_gptq(
    w_packed: Tensor, w_scale: Tensor, w_zero: Tensor | None = None, *, version: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """int4_quantize's tensors as a GPTQ layer's (qweight, qzeros, scales, g_idx).

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
    qweight = w_packed.contiguous().view(torch.int32).t().contiguous()
    qzeros = _words(zero - 1 if version == 1 else zero)
    g_idx = _group_of(K, w_scale.shape[1], qweight)
    return qweight, qzeros, w_scale.t().contiguous(), g_idx


def int4_from_awq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """An AWQ layer's tensors as (w_packed [N, K / 2] uint8, w_scale [N, K / G], w_zero or None).

    Raises TypeError for dtypes and ValueError for shapes that do not fit, or an odd K.
    """
    _check("qweight", qweight, ("K", "N / 8"), WORDS)
    K, N = qweight.shape[0], 8 * qweight.shape[1]
    if K % 2:
        raise ValueError(f"qweight: expected an even K, got {K}")
    zero = _ordered(_zeros_of(qzeros, scales, K, N), INVERSE)
    code = _ordered(_codes(qweight), INVERSE).t()
    return _bytes(code), scales.t().contiguous(), _packed(zero)


def int4_to_awq(
    w_packed: Tensor, w_scale: Tensor, w_zero: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """int4_quantize's tensors as an AWQ layer's (qweight, qzeros, scales).

    Raises as int4_to_gptq does, but for K, which need not be a multiple of 8.
    """
    zero = _zeros(w_packed, w_scale, w_zero)
    code = _nibbles(w_packed).t()
    return (
        _words(_ordered(code, ORDER)),
        _words(_ordered(zero, ORDER)),
        w_scale.t().contiguous(),
    )


def _check(name: str, x: Tensor, shape: tuple[int | str, ...], dtypes: tuple) -> None:
    """_lib.check_tensor's, but for the device: files are loaded to the host too."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    sizes = [
        isinstance(want, str) or want == got for want, got in zip(shape, x.shape, strict=False)
    ]
    if x.ndim != len(shape) or not all(sizes):
        letters = ", ".join(map(str, shape))
        raise ValueError(f"{name}: expected shape [{letters}], got {list(x.shape)}")
    if x.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        got = str(x.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: expected dtype {names}, got {got}")


def _check_version(version: int) -> None:
    _lib.check_static("version", version, (int,))
    if version not in (1, 2):
        raise ValueError(f"version: expected 1 or 2, got {version}")


def _zeros_of(qzeros: Tensor, scales: Tensor, K: int, N: int) -> Tensor:
    """A file's zero points as stored, [K / G, N], after all sizes have been checked."""
    _check("scales", scales, ("K / group", N), SCALES)
    groups = scales.shape[0]
    if N % 8:
        raise ValueError(f"qweight: expected 8 to divide N = {N}")
    if not groups or K % groups:
        raise ValueError(f"scales: expected groups that divide K = {K}, got {groups}")
    _check("qzeros", qzeros, (groups, N // 8), WORDS)
    return _codes(qzeros)


def _zeros(w_packed: Tensor, w_scale: Tensor, w_zero: Tensor | None) -> Tensor:
    """Our zero points, [K / G, N], one to a byte, after all sizes have been checked."""
    _check("w_packed", w_packed, ("N", "K / 2"), (torch.uint8,))
    N, K = w_packed.shape[0], 2 * w_packed.shape[1]
    _check("w_scale", w_scale, (N, "K / group"), SCALES)
    groups = w_scale.shape[1]
    if N % 8:
        raise ValueError(f"w_packed: expected 8 to divide N = {N}")
    if not groups or K % groups:
        raise ValueError(f"w_scale: expected groups that divide K = {K}, got {groups}")
    if w_zero is None:
        return w_packed.new_full((groups, N), ZERO)
    _check("w_zero", w_zero, (N, 4 * _lib.cdiv(groups, 8)), (torch.uint8,))
    return _nibbles(w_zero)[:, :groups].t()


def _packed(zero: Tensor) -> Tensor | None:
    """[K / G, N] -> [N, 4 * ceil(K / G / 8)], whole words filled with 8s; None if all are 8."""
    if (zero == ZERO).all():
        return None
    return _bytes(torch.nn.functional.pad(zero.t(), (0, -zero.shape[0] % 8), value=ZERO))


def _group_of(K: int, groups: int, like: Tensor) -> Tensor:
    """int32 [K]: the group of each k, in order."""
    return torch.arange(K, dtype=torch.int32, device=like.device) // (K // groups)


def _nibbles(packed: Tensor) -> Tensor:
    """uint8 [rows, n] -> codes uint8 [rows, 2n], the low nibble first."""
    return torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)


def _bytes(code: Tensor) -> Tensor:
    """The inverse of _nibbles."""
    return (code[:, 0::2] | code[:, 1::2] << 4).contiguous()


def _codes(words: Tensor) -> Tensor:
    """int32 [rows, n] -> codes uint8 [rows, 8n], that at bits 4i of word j at 8j + i."""
    return _nibbles(words.contiguous().view(torch.uint8))


def _words(code: Tensor) -> Tensor:
    """The inverse of _codes."""
    return _bytes(code).view(torch.int32)


def _ordered(code: Tensor, order: tuple[int, ...]) -> Tensor:
    """Each run of eight codes along the rows in that order."""
    return code.unflatten(1, (-1, 8))[:, :, list(order)].flatten(1)
