"""e4m3 with a scale for each 1 x 128, 128 x 1 or 128 x 128 elements.

    scale[b] = max(max_b |x|, 1e-4) / 448                 over block b; ue8m0: up to a power of two
    q[m, k] = e4m3(x[m, k] * (1 / scale[b]))              ties to even

    rows    1 x 128    activations, along what a product sums over: scale [M, K / 128]
    cols    128 x 1    the same for a product that sums over tokens: scale [M / 128, K]
    blocks  128 x 128  weights: scale [ceil(N / 128), ceil(K / 128)]

    for each tile, which holds whole blocks:
        top = max |x| of each block; scale; its reciprocal
        x is still in registers: codes

A division for the scale, a reciprocal, a product, each rounded to float32, then the cast: those are
DeepGEMM's operations, and codes agree bit for bit. Nothing exceeds 448 but what is infinite.

Limits: from Ampere up; bfloat16 and float16.

Twin: pallas_kernels/fp8_quantize.py.

Sources: DeepSeek-V3 (arXiv:2412.19437), section 3.3, for the blocks; DeepGEMM for the roundings.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _lib

DTYPES = (torch.bfloat16, torch.float16)
BLOCK = 128
# Enough for ptxas to issue all loads of a tile at once; 4 programs of 8 warps fit.
REGISTERS = 64
INTERPRETING = tl.constexpr(_lib.INTERPRETING)
# Two x at once, by a factor each. float32 has bfloat16's bits, 16 to the left.
TIMES_BF16 = tl.constexpr("""{ .reg .b32 low, high;
    shl.b32 low, $2, 16;
    and.b32 high, $2, 0xFFFF0000;
    mul.rn.f32 $0, low, $3;
    mul.rn.f32 $1, high, $4; }""")
TIMES_F16 = tl.constexpr("""{ .reg .b16 first, second; .reg .f32 low, high;
    mov.b32 {first, second}, $2;
    cvt.f32.f16 low, first;
    cvt.f32.f16 high, second;
    mul.rn.f32 $0, low, $3;
    mul.rn.f32 $1, high, $4; }""")


@dataclass(frozen=True)
class Config:
    """Tile sizes and resources of the kernel; the result does not depend on them.

    block_m: rows of a tile. block_n: its columns. Where 128 share a scale, 128 at least.
    warps: warps of a program.
    """

    block_m: int = 128
    block_n: int = 128
    warps: int = 8

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n"):
            size = getattr(self, name)
            if size < 1 or size & (size - 1):
                raise ValueError(f"{name}: expected a power of two, got {size}")


def default_config(M: int, K: int, dtype: torch.dtype, which: str = "rows") -> Config:
    """The Config for x [M, K] on a Hopper; which: "rows", "rows_transposed", "cols" or "blocks"."""
    del M, dtype
    if which == "rows":
        # 16 elements for each thread, of as many rows as leave no tile half empty. Larger programs
        # are no better while they run, and leave more idle as the last ones end.
        block_n = min(2048, K & -K)
        return Config(2048 // block_n, block_n, 4)
    # 32 rows: their scales fill a line of 128 bytes, one below the other
    return Config(32, 256, 8) if which == "rows_transposed" else Config(128, 128, 8)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest(magnitude, axis: tl.constexpr):
    """The largest of float32 magnitudes along an axis, NaN where there is one."""
    if INTERPRETING:  # fast with tl.max, which passes over NaN; as whole numbers NaN is on top
        bits = tl.max(magnitude.to(tl.int32, bitcast=True), axis)
        return bits.to(tl.float32, bitcast=True)
    return tl.reduce(magnitude, axis, _larger)


@triton.jit
def _scale(top):
    """max(top, 1e-4) / 448, correctly rounded, for a top of at most 11 bits.

    1 / 448 is 585 / 2^18 and a 448th of 2^-12 (its bits repeat); the product with 585 is exact.
    """
    scale = top * (585 / 2**18) + top * (1 / (448 * 2**12))
    return _larger(scale, 1e-4 / 448)


@triton.jit
def _reciprocal(scale):
    """1 / scale, correctly rounded for every scale there is (a test goes through them)."""
    if INTERPRETING:  # which neither runs PTX nor fuses products with sums
        return tl.div_rn(1.0, scale)
    # A unit off: a step of Newton's.
    near = tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=r,r", [scale], dtype=tl.float32, is_pure=True, pack=1
    )
    inverse = tl.fma(tl.fma(-scale, near, 1.0), near, near)
    return tl.where(scale == float("inf"), 0.0, inverse)


@triton.jit
def _times(x, factor):
    """x * factor in float32."""
    if INTERPRETING:
        return x.to(tl.float32) * factor
    # By hand: a compiler lifts x once, for the maximum too, and keeps twice the registers.
    ptx: tl.constexpr = TIMES_BF16 if x.dtype == tl.bfloat16 else TIMES_F16
    return tl.inline_asm_elementwise(
        ptx, "=r,=r,r,r,r", [x, factor], dtype=tl.float32, is_pure=True, pack=2
    )


@triton.jit
def _e4m3(x):
    """x, float32 of at most 448, as e4m3 codes."""
    if not INTERPRETING:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    # The interpreter's cast does not round to nearest: in whole numbers. Below 2^-6 the code is in
    # the low bits of a sum, above a carry of the rounded significand into the exponent is right.
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    moved = size - (120 << 23)
    large = (moved + 0x7FFFF + ((moved >> 20) & 1)) >> 20
    code = tl.where(size < (121 << 23), small, large) | ((bits >> 24) & 0x80)
    return tl.where(size > 0x7F800000, 0x7F, code).to(tl.uint8)


@triton.jit
def _fp8_quantize_kernel(
    x_ptr,  # [M, K]
    q_ptr,  # [M, K] uint8
    scale_ptr,  # [SM, SK] float32, of any strides
    M, K, num_n, SM, SK, stride_xm, stride_sm, stride_sk, ue8m0: tl.constexpr,
    share_m: tl.constexpr, share_n: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    mi, ni = tl.program_id(0) // num_n, tl.program_id(0) % num_n
    m = (mi * block_m + tl.arange(0, block_m)[:, None]).to(tl.int64)
    n = ni * block_n + tl.arange(0, block_n)[None, :]
    if share_n == 1:  # 8 columns for each thread, not the 16 whose codes it could store at once
        n = tl.max_contiguous(n, (1, 8))
    inside = (m < M) & (n < K)

    # --- 2. main loop
    x = tl.load(x_ptr + m * stride_xm + n, mask=inside, other=0.0, eviction_policy="evict_first")
    shape: tl.constexpr = (block_m // share_m, share_m, block_n // share_n, share_n)
    x = tl.reshape(x, shape)
    top = _largest(
        _largest(tl.abs(x.to(tl.float32)), 3), 1
    )  # [block_m / share_m, block_n / share_n]

    # --- 3. epilogue
    scale = _scale(top)
    if ue8m0:
        bits = scale.to(tl.int32, bitcast=True)
        power = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
        scale = tl.where(bits < 0x7F800000, power, float("nan"))
    sm = (mi * (block_m // share_m) + tl.arange(0, block_m // share_m)[:, None]).to(tl.int64)
    sk = ni * (block_n // share_n) + tl.arange(0, block_n // share_n)[None, :]
    at = sm * stride_sm + sk.to(tl.int64) * stride_sk
    tl.store(scale_ptr + at, scale, mask=(sm < SM) & (sk < SK))

    # --- 4. store
    scaled = _times(x, _reciprocal(scale)[:, None, :, None])
    code = tl.reshape(_e4m3(scaled), (block_m, block_n))
    tl.store(q_ptr + m * K + n, code, mask=inside, eviction_policy="evict_first")


_SHARES = {
    "rows": (1, BLOCK),
    "rows_transposed": (1, BLOCK),
    "cols": (BLOCK, 1),
    "blocks": (BLOCK, BLOCK),
}


def _scale_shape(M: int, K: int, which: str) -> tuple[int, int]:
    """The shape of the scales; transposed, whole 16 bytes of them in a row."""
    if which == "rows_transposed":
        return K // BLOCK, _lib.cdiv(M, 4) * 4
    share_m, share_n = _SHARES[which]
    return _lib.cdiv(M, share_m), _lib.cdiv(K, share_n)


def _fake(x, which, ue8m0, config):
    scale = x.new_empty(_scale_shape(*x.shape, which), dtype=torch.float32)
    return [x.new_empty(x.shape, dtype=torch.float8_e4m3fn), scale]


@_lib.opaque("fp8_quantize", _fake)
def _quantize(x: Tensor, which: str, ue8m0: bool, config: list[int] | None) -> list[Tensor]:
    """[q, scale]."""
    M, K = x.shape
    q = x.new_empty(x.shape, dtype=torch.uint8)
    scale = x.new_empty(_scale_shape(M, K, which), dtype=torch.float32)
    if x.numel():
        x = _lib.rows_adjacent(x)
        by_row = scale.t() if which == "rows_transposed" else scale
        with _lib.on_device(x):
            _lib.check_gpu()
            tiles = Config(*config) if config else default_config(M, K, x.dtype, which)
            num_m, num_n = _lib.cdiv(M, tiles.block_m), _lib.cdiv(K, tiles.block_n)
            _fp8_quantize_kernel[(num_m * num_n,)](
                x, q, by_row, M, K, num_n, *by_row.shape, x.stride(0), *by_row.stride(), ue8m0,
                *_SHARES[which], tiles.block_m, tiles.block_n,
                num_warps=tiles.warps, maxnreg=REGISTERS,
            )  # fmt: skip
    return [q.view(torch.float8_e4m3fn), scale]


def _checked(name: str, x: Tensor, which: str, ue8m0: bool, config: Config | None) -> None:
    _lib.check_tensor(name, x, ("M", "K"), DTYPES)
    _lib.check_static("ue8m0", ue8m0, (bool,))
    _lib.check_config(config, Config)
    shares = _SHARES[which]
    if which != "blocks":
        for letter, size, share in zip("MK", x.shape, shares, strict=True):
            if size % share:
                raise ValueError(f"{name}: expected {share} to divide {letter}, got {size}")
    if config is not None:
        # a row of transposed scales is filled up to a multiple of 4
        least = (4 if which == "rows_transposed" else shares[0], shares[1])
        for field, size in zip(("block_m", "block_n"), least, strict=True):
            if getattr(config, field) < size:
                raise ValueError(
                    f"config: expected {field} >= {size}, got {getattr(config, field)}"
                )


def fp8_quantize_rows(
    x: Tensor, *, ue8m0: bool = False, transposed: bool = False, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """x [M, K] -> (float8_e4m3fn [M, K], scale float32 [M, K / 128]): 1 x 128; no gradient.

    x: bfloat16 or float16; rows may have any pitch.
    ue8m0: the scale is rounded up to a power of two.
    transposed: the scale as [K / 128, ceil(M / 4) * 4], rows of whole 16 bytes as TMA wants them;
        what is beyond M scales zeros.
    config: tiles of this call.

    All-zero blocks: scale 1e-4 / 448, codes 0. A NaN: scale NaN, codes 0x7F. An infinity: scale
    infinity (NaN with ue8m0), code 0x7F for what is infinite and 0 or -0 for the rest.

    Raises TypeError for dtypes; ValueError for shapes and devices that do not fit, 128 that does
    not divide K, and a config whose tile is smaller than a block, naming the argument;
    NotImplementedError on a GPU older than Ampere.
    """
    _lib.check_static("transposed", transposed, (bool,))
    which = "rows_transposed" if transposed else "rows"
    _checked("x", x, which, ue8m0, config)
    q, scale = _quantize(x, which, ue8m0, _lib.fields(config))
    return q, scale


def fp8_quantize_blocks(
    w: Tensor, *, ue8m0: bool = False, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """w [N, K] -> (float8_e4m3fn [N, K], scale float32 [ceil(N / 128), ceil(K / 128)]).

    As fp8_quantize_rows, which see; for weights, whose last blocks may be ragged.
    """
    _checked("w", w, "blocks", ue8m0, config)
    q, scale = _quantize(w, "blocks", ue8m0, _lib.fields(config))
    return q, scale


def fp8_quantize_cols(
    x: Tensor, *, ue8m0: bool = False, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """x [M, K] -> (float8_e4m3fn [M, K], scale float32 [M / 128, K]): 128 x 1, along tokens.

    As fp8_quantize_rows, which see; here 128 must divide M.
    """
    _checked("x", x, "cols", ue8m0, config)
    q, scale = _quantize(x, "cols", ue8m0, _lib.fields(config))
    return q, scale
