"""Number formats of quantized kernels, bit for bit, in NumPy: from values to codes, and back.

    floats        e4m3 e5m2 e2m1: sign, exponent, mantissa; e8m0: a power of two
    integers      int8, uint8 and int4: whole numbers times a scale; nibbles, two codes to a byte
    checkpoints   int4 to and from the files of GPTQ (v1, v2) and AWQ
    nf4           sixteen quantiles of a normal distribution, as bitsandbytes stores them
    scaled        FP8 with a scale per 1 x 128, 128 x 1 or 128 x 128; MX with one per 32

Two layers: `X_encode` and `X_decode` turn values into codes for scales that are given; `X_quantize`
chooses the scales too, and `X_dequantize` takes both back to values. Values are float32, float16 or
bfloat16, lifted to float32 (which is exact) before anything is computed, and each step is a
correctly rounded float32 operation, so that a kernel can agree to the last bit.

A group that holds a NaN or an infinity decodes to NaN throughout, and no other group notices (but
for NF4's second quantization, which has one mean for all); each function says which codes and scale
that takes. An all-zero group decodes to zeros.
"""

from parity.formats.checkpoints import (
    Awq,
    Gptq,
    int4_from_awq,
    int4_from_gptq,
    int4_to_awq,
    int4_to_gptq,
)
from parity.formats.floats import E2M1, E4M3, E5M2, SmallFloat, e8m0_decode, e8m0_encode
from parity.formats.integers import (
    int4_decode,
    int4_dequantize,
    int4_encode,
    int4_pack_zeros,
    int4_quantize,
    int4_unpack_zeros,
    int8_decode,
    int8_dequantize,
    int8_encode,
    int8_quantize,
    pack_nibbles,
    uint8_decode,
    uint8_encode,
    uint8_quantize,
    unpack_nibbles,
)
from parity.formats.nf4 import (
    DYNAMIC_MAP,
    NF4,
    NF4_THRESHOLDS,
    Nf4State,
    nf4_absmax,
    nf4_decode,
    nf4_dequantize,
    nf4_encode,
    nf4_quantize,
)
from parity.formats.scaled import (
    fp8_dequantize,
    fp8_quantize_blocks,
    fp8_quantize_cols,
    fp8_quantize_rows,
    mx_dequantize,
    mx_quantize,
    mx_scale,
)

__all__ = [
    "DYNAMIC_MAP",
    "E2M1",
    "E4M3",
    "E5M2",
    "NF4",
    "NF4_THRESHOLDS",
    "Awq",
    "Gptq",
    "Nf4State",
    "SmallFloat",
    "e8m0_decode",
    "e8m0_encode",
    "fp8_dequantize",
    "fp8_quantize_blocks",
    "fp8_quantize_cols",
    "fp8_quantize_rows",
    "int4_decode",
    "int4_dequantize",
    "int4_encode",
    "int4_from_awq",
    "int4_from_gptq",
    "int4_pack_zeros",
    "int4_quantize",
    "int4_to_awq",
    "int4_to_gptq",
    "int4_unpack_zeros",
    "int8_decode",
    "int8_dequantize",
    "int8_encode",
    "int8_quantize",
    "mx_dequantize",
    "mx_quantize",
    "mx_scale",
    "nf4_absmax",
    "nf4_decode",
    "nf4_dequantize",
    "nf4_encode",
    "nf4_quantize",
    "pack_nibbles",
    "uint8_decode",
    "uint8_encode",
    "uint8_quantize",
    "unpack_nibbles",
]
