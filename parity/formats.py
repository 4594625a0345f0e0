"""Number formats of quantized kernels, bit for bit, in NumPy: from a value to its code, and back.

    e4m3 e5m2 e2m1   sign, exponent, mantissa; subnormals; round to nearest, ties to even
    e8m0             a power of two, the block scale of MX formats
    int8 int4        whole numbers times a scale; ties to even; two codes of 4 bits to a byte
    nf4              sixteen quantiles of a normal distribution, times a block's largest magnitude

Codes are uint8 (int8: int8), values float32. `encode` rounds once, from float32; `decode` is exact.
A value too large saturates to the largest finite one, infinity included, unless `saturate=False`
asks for what IEEE casts do. NaN has a code where the format has one; each function says what it
becomes where not.

Sources: the OCP 8-bit floating point and Microscaling (MX) v1.0 specifications; NF4 from the QLoRA
paper, its sixteen values and its rule at a tie as bitsandbytes has them.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_INFINITY = np.uint32(0x7F800000)


@dataclass(frozen=True)
class SmallFloat:
    """A float of at most 8 bits: a sign, `exponent_bits`, `mantissa_bits`.

    special: "ieee" gives the top exponent to infinities and NaNs; "nan" only its last code to NaN;
        "none" has neither, and NaN becomes the largest value (as PTX's cvt does).
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    special: Literal["ieee", "nan", "none"]

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def largest_code(self) -> int:
        """The code of the largest finite value."""
        last = (1 << (self.bits - 1)) - 1
        return last - {"ieee": 1 << self.mantissa_bits, "nan": 1, "none": 0}[self.special]

    @property
    def nan_code(self) -> int:
        quiet = (1 << self.mantissa_bits) >> 1
        return self.largest_code + {"ieee": 1 + quiet, "nan": 1, "none": 0}[self.special]

    @property
    def largest(self) -> float:
        return float(self.values[self.largest_code])

    @property
    def smallest(self) -> float:
        """The smallest positive value, a subnormal."""
        return float(self.values[1])

    @cached_property
    def values(self) -> np.ndarray:
        """float32 [2 ** bits]: the value of every code."""
        code = np.arange(1 << self.bits)
        exponent = (code >> self.mantissa_bits) & ((1 << self.exponent_bits) - 1)
        mantissa = code & ((1 << self.mantissa_bits) - 1)
        normal = exponent > 0
        significand = mantissa + (normal << self.mantissa_bits)
        power = np.maximum(exponent, 1) - self.bias - self.mantissa_bits
        value = np.ldexp(significand.astype(np.float32), power)
        magnitude = code & ((1 << (self.bits - 1)) - 1)
        if self.special == "ieee":
            value = np.where(magnitude == self.largest_code + 1, np.inf, value)
        if self.special != "none":
            first_nan = self.largest_code + (2 if self.special == "ieee" else 1)
            value = np.where(magnitude >= first_nan, np.nan, value)
        negative = code >> (self.bits - 1) == 1
        table = np.copysign(value, np.where(negative, -1, 1)).astype(np.float32)
        table.setflags(write=False)
        return table

    def encode(self, x: np.ndarray, *, saturate: bool = True) -> np.ndarray:
        """The codes, uint8, of float32 values; the sign of zeros and NaNs is kept.

        saturate=False: beyond the largest value comes infinity, or NaN where there is no infinity.

        Raises TypeError unless x is float32, ValueError for saturate=False where the format has
        neither.
        """
        if not saturate and self.special == "none":
            raise ValueError(f"saturate: {self.name} has neither infinity nor NaN to overflow to")
        raw = _float32(x).view(np.uint32)
        magnitude = raw & _MAGNITUDE
        # Subnormals of the format: adding this constant leaves the rounded code in the low bits.
        constant = np.float32(2.0 ** (24 - self.bias - self.mantissa_bits))
        tiny = magnitude < np.uint32((128 - self.bias) << 23)
        small = np.where(tiny, magnitude, np.uint32(0)).view(np.float32) + constant
        small_code = small.view(np.uint32) - constant.view(np.uint32)
        # The rest: move the exponent, then round the mantissa with integers; a carry is right too.
        shift = np.uint32(23 - self.mantissa_bits)
        moved = np.where(tiny, np.uint32(0), magnitude - np.uint32((127 - self.bias) << 23))
        odd = (moved >> shift) & np.uint32(1)
        code = (moved + (np.uint32(1) << (shift - np.uint32(1))) - np.uint32(1) + odd) >> shift
        code = np.where(tiny, small_code, code)
        code = np.minimum(code, np.uint32(self.largest_code + (0 if saturate else 1)))
        is_nan = magnitude > _INFINITY
        code = np.where(is_nan, np.uint32(self.nan_code), code)
        negative = raw >> np.uint32(31)
        if self.special == "none":
            negative = np.where(is_nan, np.uint32(0), negative)
        return (code | negative << np.uint32(self.bits - 1)).astype(np.uint8)

    def decode(self, code: np.ndarray) -> np.ndarray:
        """The values, float32, of uint8 codes. Raises IndexError for a code of too many bits."""
        return self.values[code]


E4M3 = SmallFloat("e4m3", 4, 3, "nan")
E5M2 = SmallFloat("e5m2", 5, 2, "ieee")
E2M1 = SmallFloat("e2m1", 2, 1, "none")


def e8m0_encode(
    x: np.ndarray, *, rounding: Literal["nearest", "floor", "ceil"] = "nearest"
) -> np.ndarray:
    """The codes, uint8, of the powers of two next to float32 values >= 0; code c is 2 ** (c - 127).

    nearest: a tie (1.5 times a power of two) goes up. Zero and what is too small become code 0
    (2 ** -127), what is too large 254 (2 ** 127); NaN, infinity, negative values 255, which is NaN.
    """
    raw = _float32(x).view(np.uint32)
    magnitude = raw & _MAGNITUDE
    exponent = (magnitude >> np.uint32(23)).astype(np.int32)
    fraction = (magnitude & np.uint32(0x7FFFFF)).astype(np.int32)
    # Below float32's normal range 2 ** -127 is the fraction 0x400000 at exponent 0.
    least = np.where(exponent == 0, 0x400000, 0)
    step = np.where(exponent == 0, 0x400000, 0x800000)
    above = {"floor": step, "ceil": 1, "nearest": step // 2}[rounding]
    code = exponent + (fraction - least >= above)
    code = np.clip(code, 0, 254)
    invalid = (magnitude >= _INFINITY) | (raw > np.uint32(0x80000000))
    return np.where(invalid, 255, code).astype(np.uint8)


def e8m0_decode(code: np.ndarray) -> np.ndarray:
    """2 ** (code - 127) as float32; NaN for code 255."""
    code = np.asarray(code, np.uint8)
    power = np.ldexp(np.float32(1), np.minimum(code, 254).astype(np.int32) - 127)
    return np.where(code == 255, np.float32(np.nan), power)


def int8_encode(x: np.ndarray, scale: np.ndarray | np.float32) -> np.ndarray:
    """round(x / scale), ties to even, within -127 .. 127; NaN becomes 0. A scale of 0 counts as 1.

    x float32, scale float32 broadcast against it (absmax / 127 uses the range fully) -> int8.
    """
    return _whole(x, scale, -127, 127).astype(np.int8)


def int4_encode(
    x: np.ndarray, scale: np.ndarray | np.float32, zero: np.ndarray | int = 8
) -> np.ndarray:
    """round(x / scale) + zero, ties to even, within 0 .. 15; NaN becomes `zero`.

    x float32, scale and zero broadcast against it -> uint8. A scale of 0 counts as 1.
    """
    zero = np.asarray(zero, np.int32)
    return (_whole(x, scale, -zero, 15 - zero) + zero).astype(np.uint8)


def int4_decode(
    code: np.ndarray, scale: np.ndarray | np.float32, zero: np.ndarray | int = 8
) -> np.ndarray:
    """(code - zero) * scale in float32, rounded once. zero=8 makes int4 symmetric."""
    return (np.asarray(code, np.int32) - zero).astype(np.float32) * np.float32(scale)


def int8_decode(code: np.ndarray, scale: np.ndarray | np.float32) -> np.ndarray:
    """code * scale in float32."""
    return np.asarray(code).astype(np.float32) * np.float32(scale)


def pack_nibbles(code: np.ndarray, *, low_first: bool) -> np.ndarray:
    """Two 4-bit codes to a byte along the last axis: uint8 [..., 2n] -> uint8 [..., n].

    low_first: element 2j in the low nibble of byte j (int4, e2m1; GPTQ's little-endian words);
        otherwise in the high nibble (nf4 as bitsandbytes packs it).

    Raises ValueError for an odd number of codes, or one above 15.
    """
    code = np.asarray(code, np.uint8)
    if code.shape[-1] % 2:
        raise ValueError(f"code: expected an even number of codes, got {code.shape[-1]}")
    if code.size and code.max() > 15:
        raise ValueError(f"code: expected codes of 4 bits, got {code.max()}")
    low, high = (code[..., 0::2], code[..., 1::2])[:: 1 if low_first else -1]
    return low | high << 4


def unpack_nibbles(packed: np.ndarray, *, low_first: bool) -> np.ndarray:
    """The inverse of pack_nibbles: uint8 [..., n] -> uint8 [..., 2n]."""
    packed = np.asarray(packed, np.uint8)
    pair = (packed & 15, packed >> 4)[:: 1 if low_first else -1]
    return np.stack(pair, axis=-1).reshape(*packed.shape[:-1], 2 * packed.shape[-1])


NF4 = np.array(
    "-1 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 "
    "-0.18477343022823334 -0.09105003625154495 0 0.07958029955625534 0.16093020141124725 "
    "0.24611230194568634 0.33791524171829224 0.44070982933044434 0.5626170039176941 "
    "0.7229568362236023 1".split(),
    np.float32,
)
NF4_THRESHOLDS = (NF4[1:] + NF4[:-1]) / np.float32(2)


def nf4_encode(x: np.ndarray) -> np.ndarray:
    """The nearest of sixteen values, x float32 in [-1, 1] -> uint8. Ties go down, NaN to code 0."""
    x = _float32(x)
    code = np.searchsorted(NF4_THRESHOLDS, x, side="left")
    return np.where(np.isnan(x), 0, code).astype(np.uint8)


def nf4_decode(code: np.ndarray) -> np.ndarray:
    return NF4[code]


def _float32(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x)
    if x.dtype != np.float32:
        raise TypeError(f"x: expected float32, which is rounded once, got {x.dtype}")
    return np.ascontiguousarray(x)


def _whole(x: np.ndarray, scale: np.ndarray | np.float32, low: object, high: object) -> np.ndarray:
    scale = np.asarray(scale, np.float32)
    whole = np.rint(_float32(x) / np.where(scale == 0, np.float32(1), scale))
    return np.where(np.isnan(whole), 0, np.clip(whole, low, high)).astype(np.int32)  # pyright: ignore
