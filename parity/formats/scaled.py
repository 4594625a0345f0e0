"""Small floats in blocks that share a scale: FP8 by 128 as DeepSeek-V3 has it, and MX by 32.

    FP8   scale = max(absmax, 1e-4) / 448, float32      code = e4m3(x * (1 / scale))
    MX    scale = 2 ** e, stored as e8m0                code = element(x / 2 ** e)

FP8's operations are DeepGEMM's (utils/math.py): a division for the scale, a reciprocal, a product,
each rounded to float32, and a saturating cast to e4m3 (448 at most). Its floor of 1e-4 keeps an
all-zero block at zero; DeepSeek's first kernels had none.

MX's e follows from the block's largest magnitude m, by one of three rules:

    floor   floor(log2 m) - emax       as OCP MX v1.0, 6.3, asks; elements may saturate
    even    the same, of m rounded to the element's mantissa, ties to even (torchao's EVEN)
    rceil   ceil(log2(m / largest))    nothing saturates (torchao's RCEIL, cuBLAS, DeepGEMM)

where `largest` is the element's (448, 57344, 6) and emax its exponent (8, 15, 2). The rules are
exact here, in integers; the float32 quotient that others take gives the same rceil at all 2 ** 23
mantissas. An infinity makes the scale NaN, as in torchao's newest version; 0.18 gave it a number.
"""

import numpy as np

from parity.formats import _arguments as arguments
from parity.formats.floats import (
    E2M1,
    E4M3,
    E5M2,
    SmallFloat,
    e8m0_decode,
    e8m0_encode,
)
from parity.formats.integers import pack_nibbles, unpack_nibbles

BLOCK = 128
MX_BLOCK = 32
ELEMENTS = {fmt.name: fmt for fmt in (E4M3, E5M2, E2M1)}
SCALE_MODES = ("floor", "rceil", "even")


def fp8_quantize_rows(x: np.ndarray, *, ue8m0: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """x [M, K] -> (e4m3 codes uint8 [M, K], scale float32 [M, K / 128]): 1 x 128, for activations.

    ue8m0: the scale is rounded up to a power of two.

    All-zero blocks: scale 1e-4 / 448, codes 0. A NaN: scale NaN, codes 0x7F. An infinity: scale
    infinity, code 0x7F for what is infinite and 0 or -0 for the rest. Either block decodes to NaN.

    Raises TypeError unless x is float32, float16 or bfloat16; ValueError unless it has two
    dimensions and 128 divides K.
    """
    return _fp8_quantize(x, "x", (1, BLOCK), ue8m0)


def fp8_quantize_cols(x: np.ndarray, *, ue8m0: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """x [M, K] -> (e4m3 codes uint8 [M, K], scale float32 [M / 128, K]): 128 x 1, along tokens.

    As fp8_quantize_rows, which see; here 128 must divide M.
    """
    return _fp8_quantize(x, "x", (BLOCK, 1), ue8m0)


def fp8_quantize_blocks(w: np.ndarray, *, ue8m0: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """w [N, K] -> (e4m3 codes uint8 [N, K], scale float32 [ceil(N / 128), ceil(K / 128)]).

    As fp8_quantize_rows, which see; for weights, whose last blocks may be ragged.
    """
    return _fp8_quantize(w, "w", (BLOCK, BLOCK), ue8m0, ragged=True)


def fp8_dequantize(code: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """e4m3 codes uint8 [M, K] times their scale, float32, rounded once.

    scale [M, ceil(K / 128)], [ceil(M / 128), K] or [ceil(M / 128), ceil(K / 128)]: its shape says
    which.

    Raises TypeError unless code is uint8 and scale float32; ValueError for another shape of either.
    """
    code = arguments.dtype(code, np.uint8, "code")
    scale = arguments.dtype(scale, np.float32, "scale")
    arguments.rank(code, 2, "code")
    arguments.rank(scale, 2, "scale")
    for axis, size in enumerate(code.shape):
        if scale.shape[axis] != size:
            if scale.shape[axis] != -(-size // BLOCK):
                raise ValueError(
                    f"scale: expected {size} or {-(-size // BLOCK)} along dimension {axis}, "
                    f"got {list(scale.shape)}"
                )
            scale = np.take(np.repeat(scale, BLOCK, axis), np.arange(size), axis)
    with np.errstate(invalid="ignore"):
        return E4M3.decode(code) * scale


def mx_quantize(
    x: np.ndarray, fmt: str, *, scale_mode: str = "floor"
) -> tuple[np.ndarray, np.ndarray]:
    """x [..., K] -> (codes uint8, scale uint8 [..., K / 32]), the scale in e8m0.

    fmt: "e4m3" or "e5m2" (MXFP8), codes [..., K]; "e2m1" (MXFP4), packed [..., K / 2] with the even
        k in the low nibble.
    scale_mode: "floor", "rceil" or "even", see above. Elements beyond the largest saturate.

    All-zero blocks: scale 0 (2 ** -127), codes 0. A NaN or an infinity: scale 255, which is NaN,
    codes 0.

    Raises TypeError unless x is float32, float16 or bfloat16; ValueError for another fmt or
    scale_mode, or unless 32 divides K.
    """
    element = _element(fmt)
    x = arguments.lifted(x)
    blocks = _mx_blocks(x, "x")
    scale = mx_scale(np.max(np.abs(blocks), axis=-1), fmt, scale_mode=scale_mode)
    known = scale[..., None] < 255
    shift = 127 - scale[..., None].astype(np.int32)
    code = element.encode(np.ldexp(np.where(known, blocks, np.float32(0)), shift))
    code = code.reshape(x.shape)
    return pack_nibbles(code, low_first=True) if element is E2M1 else code, scale


def mx_scale(absmax: np.ndarray, fmt: str, *, scale_mode: str = "floor") -> np.ndarray:
    """The e8m0 scales, uint8, of blocks whose largest magnitudes are absmax >= 0; e is within -127
    .. 127. NaN and infinity become 255. Raises as mx_quantize does."""
    element = _element(fmt)
    arguments.one_of(scale_mode, SCALE_MODES, "scale_mode")
    absmax = arguments.lifted(absmax, "absmax")
    raw = absmax.view(np.int32)
    exponent, fraction = raw >> 23, raw & 0x7FFFFF
    largest = np.float32(element.largest).view(np.int32)
    above = {
        "floor": 0x800000,
        "rceil": (largest & 0x7FFFFF) + 1,
        # From half a step of the mantissa below the next power of two, rounding reaches it.
        "even": 0x800000 - (0x400000 >> element.mantissa_bits),
    }[scale_mode]
    # A subnormal absmax needs no care: its scale is 2 ** -127 in any case.
    code = exponent + (fraction >= above) - ((largest >> 23) - 127)
    return np.where(np.isfinite(absmax), np.clip(code, 0, 254), 255).astype(np.uint8)


def mx_dequantize(code: np.ndarray, scale: np.ndarray, fmt: str) -> np.ndarray:
    """The values, float32 [..., K], of mx_quantize's arrays: exact; infinity above float32's range.

    Raises TypeError unless code and scale are uint8; ValueError for another fmt, or a scale of
    another shape.
    """
    element = _element(fmt)
    arguments.dtype(scale, np.uint8, "scale")
    if element is E2M1:
        code = unpack_nibbles(code, low_first=True)
    blocks = _mx_blocks(element.decode(arguments.dtype(code, np.uint8, "code")), "code")
    arguments.shape(scale, blocks.shape[:-1], "scale")
    wide = e8m0_decode(scale)[..., None]
    with np.errstate(over="ignore", invalid="ignore"):
        return (blocks * wide).reshape(code.shape)


def _fp8_quantize(
    x: np.ndarray, name: str, block: tuple[int, int], ue8m0: bool, *, ragged: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    values = arguments.lifted(x, name)
    arguments.rank(values, 2, name)
    if not ragged:
        for size, step in zip(values.shape, block, strict=True):
            arguments.multiple(size, step, name)
    rows, cols = values.shape
    padded = np.pad(values, [(0, -rows % block[0]), (0, -cols % block[1])])
    tiles = padded.reshape(padded.shape[0] // block[0], block[0], -1, block[1])
    absmax = np.max(np.abs(tiles), axis=(1, 3), initial=0)
    scale = np.maximum(absmax, np.float32(1e-4)) / np.float32(E4M3.largest)
    if ue8m0:
        scale = e8m0_decode(e8m0_encode(scale, rounding="ceil"))
    with np.errstate(invalid="ignore"):
        scaled = tiles * (np.float32(1) / scale)[:, None, :, None]
    # A NaN has one code, whatever sign the product gave it.
    scaled = np.where(np.isnan(scaled), np.float32(np.nan), scaled)
    return E4M3.encode(scaled.reshape(padded.shape)[:rows, :cols]), scale


def _element(fmt: str) -> SmallFloat:
    arguments.one_of(fmt, tuple(ELEMENTS), "fmt")
    return ELEMENTS[fmt]


def _mx_blocks(x: np.ndarray, name: str) -> np.ndarray:
    count = arguments.multiple(x.shape[-1], MX_BLOCK, name)
    return x.reshape(*x.shape[:-1], count, MX_BLOCK)
