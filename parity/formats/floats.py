"""Floats of at most 8 bits, and the powers of two that scale blocks of them.

    e4m3 e5m2 e2m1   sign, exponent, mantissa; subnormals; round to nearest, ties to even
    e8m0             a power of two, the block scale of MX formats

Codes are uint8, values float32. `encode` rounds once; `decode` is exact. A value too large
saturates to the largest finite one, infinity included, unless `saturate=False` asks for what IEEE
casts do. NaN has a code where the format has one.

Sources: the OCP 8-bit floating point and Microscaling (MX) v1.0 specifications. MX counts on ties
to even; some public e2m1 encoders send them towards zero (DeepGEMM's at 0.75, 1.75 and 3.5).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from parity.formats import _arguments as arguments

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
        """The codes, uint8, of the values x; the sign of zeros and NaNs is kept.

        saturate=False: beyond the largest value comes infinity, or NaN where there is no infinity.

        Raises TypeError unless x is float32, float16 or bfloat16, ValueError for saturate=False
        where the format has neither.
        """
        if not saturate and self.special == "none":
            raise ValueError(f"saturate: {self.name} has neither infinity nor NaN to overflow to")
        x = arguments.lifted(x)
        raw = np.atleast_1d(x).view(np.uint32)  # scalars would warn where they wrap around
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
        return (code | negative << np.uint32(self.bits - 1)).astype(np.uint8).reshape(x.shape)

    def decode(self, code: np.ndarray) -> np.ndarray:
        """The values, float32, of whole numbers.

        Raises TypeError for other numbers, ValueError for a code of too many bits.
        """
        return np.asarray(self.values[arguments.codes(code, self.bits)])


E4M3 = SmallFloat("e4m3", 4, 3, "nan")
E5M2 = SmallFloat("e5m2", 5, 2, "ieee")
E2M1 = SmallFloat("e2m1", 2, 1, "none")


def e8m0_encode(x: np.ndarray, *, rounding: str = "nearest") -> np.ndarray:
    """The codes, uint8, of the powers of two next to values x >= 0; code c is 2 ** (c - 127).

    rounding: "floor", "ceil", or "nearest", where a tie (1.5 times a power of two) goes up.

    Zero and what is too small become code 0 (2 ** -127), what is too large 254 (2 ** 127); NaN,
    infinity, negative values 255, which is NaN.

    Raises TypeError unless x is float32, float16 or bfloat16, ValueError for another rounding.
    """
    arguments.one_of(rounding, ("nearest", "floor", "ceil"), "rounding")
    raw = arguments.lifted(x).view(np.uint32)
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
    """2 ** (code - 127) as float32; NaN for code 255. Raises as SmallFloat.decode does."""
    code = arguments.codes(code, 8)
    power = np.ldexp(np.float32(1), np.minimum(code, 254).astype(np.int32) - 127)
    return np.where(code == 255, np.float32(np.nan), power)
