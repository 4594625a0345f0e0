"""Symmetric int8 with a scale for each row, or for each group of neighbours in it.

    scale[m, g] = max_k |x[m, k]| / 127 over the k of group g             1 where that is 0
    q[m, k] = clip(rint(x[m, k] / scale[m, g]), -127, 127)                ties to even

    groups are short rows: x [M, K] is looked at as [M * K / group, group]
    for each block of rows, in tiles of block_n columns:
        top = max |x|, in all tiles; scale = top / 127
        x is still in registers (more than 8 tiles are not: walk again, from L1): codes

Both quotients are those of float32, correctly rounded, though no element is divided.
float16: x is multiplied by 1 / scale as the sum of two float32, the first of 12 bits. Its product
with the 11 bits of x is exact, and the sum comes within 2^-34 of the quotient, whether or not a
compiler fuses it; next to a tie nothing else lies within 2^-19.
bfloat16: one product. Where top is no multiple of 127 the only tie is top / 2, 63.5 but for what
rounding did to scale: the reciprocal is moved three units to the side that top / scale rounds to.
Else scale is a power of two. No other quotient is so near a tie that the units would matter.
Tests go through all mantissas of both types. None rounds to more than 127: nothing is clipped.

Limits: from Ampere up; bfloat16 and float16.

Twin: pallas_kernels/int8_quantize.py.

Sources: LLM.int8() (Dettmers et al., arXiv:2208.07339) for a scale per token; a sum of two floats
for a number is Dekker's double length (Numerische Mathematik 18, 1971).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _lib

DTYPES = (torch.bfloat16, torch.float16)
# Enough for ptxas to issue all loads of a row at once; 4 programs of 8 warps fit.
REGISTERS = 64
KEPT = 8  # tiles of a row that stay in registers
INTERPRETING = tl.constexpr(_lib.INTERPRETING)
SCALED_F16 = tl.constexpr("""{ .reg .b32 pair; .reg .b16 first, second; .reg .f32 low, high;
    and.b32 pair, $2, $5;
    mov.b32 {first, second}, pair;
    cvt.f32.f16 low, first;
    cvt.f32.f16 high, second;
    mul.rn.f32 $0, low, $3;
    mul.rn.f32 $1, high, $4; }""")
SCALED_BF16 = tl.constexpr("""{ .reg .b32 pair, zero;
    mov.b32 zero, 0x80008000;
    fma.rn.bf16x2 pair, $2, $3, zero;
    mul.lo.u32 $0, pair, $4;
    and.b32 $1, pair, $7; }""")
# Adding it rounds to a whole number, which the low bits hold in two's complement.
MAGIC = tl.constexpr(1.5 * 2**23)
LOW_BYTES = tl.constexpr("""{ .reg .b32 low, high;
    prmt.b32 low, $1, $2, 0x0040;
    prmt.b32 high, $3, $4, 0x0040;
    prmt.b32 $0, low, high, 0x5410; }""")


@dataclass(frozen=True)
class Config:
    """Tile sizes and resources of the kernel; the result does not depend on them.

    block_m: rows (or groups) of a tile.
    block_n: columns of a tile; a row of more than 8 tiles is walked over twice.
    warps: warps of a program.
    """

    block_m: int = 1
    block_n: int = 8192
    warps: int = 8

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n"):
            size = getattr(self, name)
            if size < 1 or size & (size - 1):
                raise ValueError(f"{name}: expected a power of two, got {size}")


def default_config(R: int, N: int, dtype: torch.dtype) -> Config:
    """The Config for R rows (or groups) of N columns on a Hopper."""
    del R, dtype
    # 16 elements for each thread: 4 warps for as many short rows as fill them, up to 16 for a long
    # one. A longer one goes on in tiles of 4096 in place of one that is a power of two, which 14336
    # is not; all its loads are in flight together.
    columns = max(16, _lib.power_of_2(N))
    warps = min(16, max(4, columns // 512))
    return Config(max(1, 2048 // columns), min(columns, 4096), warps)


@triton.jit
def _magnitude(x):
    return tl.abs(x.to(tl.float32))


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
def _leading_bits(x):
    """x cut off after the first 12 bits of its significand."""
    return (x.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)


@triton.jit
def _scaled(x, power, known):
    """x * power as float32, and 0 where not known; PTX takes two x at once."""
    if INTERPRETING:
        scaled = tl.where(known, x.to(tl.float32) * power, 0.0)
    elif x.dtype == tl.float16:
        keep = tl.where(known, -1, 0).to(tl.int16)
        scaled = tl.inline_asm_elementwise(
            SCALED_F16, "=r,=r,r,r,r,r", [x, power, keep], dtype=tl.float32, is_pure=True, pack=2
        )
    else:
        # By a power of two bfloat16 is exact, or so small that its code is 0. float32 has the same
        # bits, 16 to the left; a factor or a mask of 0 instead makes 0 of what is not known.
        factor, mask = tl.where(known, 1 << 16, 0), tl.where(known, -1 << 16, 0)
        scaled = tl.inline_asm_elementwise(
            SCALED_BF16,
            "=r,=r,r,r,r,r,r,r",
            [x, power.to(tl.bfloat16), factor, mask],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    return scaled


@triton.jit
def _low_bytes(x):
    """The low 8 bits of int32."""
    if INTERPRETING:
        return x.to(tl.int8)
    return tl.inline_asm_elementwise(
        LOW_BYTES, "=r,r,r,r,r", [x], dtype=tl.int8, is_pure=True, pack=4
    )


@triton.jit
def _codes(x, top, scale):
    """The codes of x [block_m, block_n] for max |x| and scale [block_m, 1]."""
    known = (scale.to(tl.int32, bitcast=True) & 0x7F800000) != 0x7F800000  # not infinite, not NaN
    scale = tl.where(known, scale, 1.0)
    bits = scale.to(tl.int32, bitcast=True)
    # By a power of two, so that neither reciprocals nor their rests leave float32's range.
    power = ((254 << 23) - (bits & 0x7F800000)).to(tl.float32, bitcast=True)
    divisor = scale * power
    scaled = _scaled(x, power, known)
    if x.dtype == tl.bfloat16:
        left = top * power - 128 * divisor + divisor  # top - 127 * scale, all of it exact
        units = tl.where(left < divisor * -(2.0**-18), -3, 3)
        inverse = (1.0 / divisor).to(tl.int32, bitcast=True) + units
        exact = (254 << 23) - divisor.to(tl.int32, bitcast=True)  # of a power of two
        inverse = tl.where(left == 0, exact, inverse)
        rounded = scaled * inverse.to(tl.float32, bitcast=True) + MAGIC
    else:
        reciprocal = _leading_bits(1.0 / divisor)
        first = _leading_bits(divisor)
        rest = 1.0 - reciprocal * first - reciprocal * (divisor - first)  # all of it exact
        rounded = scaled * reciprocal + scaled * (rest / divisor) + MAGIC
    return _low_bytes(rounded.to(tl.int32, bitcast=True))


@triton.jit
def _int8_quantize_kernel(
    x_ptr,  # [R, N]
    q_ptr,  # [R, N] int8
    scale_ptr,  # [R] float32
    R, N, stride_xr, block_m: tl.constexpr, block_n: tl.constexpr, kept: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    m = (tl.program_id(0) * block_m + tl.arange(0, block_m)).to(tl.int64)
    rows, n = m[:, None], tl.arange(0, block_n)[None, :]
    x_rows, q_rows = x_ptr + rows * stride_xr, q_ptr + rows * N

    # --- 2. main loop
    parts = ()
    if kept:
        for i in tl.static_range(kept):
            inside = (rows < R) & (i * block_n + n < N)
            x = tl.load(
                x_rows + i * block_n + n, mask=inside, other=0.0, eviction_policy="evict_first"
            )
            parts = parts + (x,)  # noqa: RUF005
        largest = _magnitude(parts[0])
        for i in tl.static_range(1, kept):
            largest = _larger(largest, _magnitude(parts[i]))
    else:
        largest = tl.zeros((block_m, block_n), tl.float32)
        for n0 in tl.range(0, N, block_n):
            inside = (rows < R) & (n0 + n < N)
            x = tl.load(x_rows + n0 + n, mask=inside, other=0.0, eviction_policy="evict_last")
            largest = _larger(largest, _magnitude(x))

    # --- 3. epilogue
    top = _largest(largest, 1)  # [block_m]
    scale = tl.div_rn(top, 127.0)
    scale = tl.where(scale == 0.0, 1.0, scale)
    tl.store(scale_ptr + m, scale, mask=m < R)

    # --- 4. store
    top, scale = top[:, None], scale[:, None]
    if kept:
        for i in tl.static_range(kept):
            inside = (rows < R) & (i * block_n + n < N)
            q = _codes(parts[i], top, scale)
            tl.store(q_rows + i * block_n + n, q, mask=inside, eviction_policy="evict_first")
    else:
        for n0 in tl.range(0, N, block_n):
            inside = (rows < R) & (n0 + n < N)
            x = tl.load(x_rows + n0 + n, mask=inside, other=0.0, eviction_policy="evict_first")
            tl.store(
                q_rows + n0 + n, _codes(x, top, scale), mask=inside, eviction_policy="evict_first"
            )


def _fake(x, group, config):
    rows = (x.shape[0],) if group is None else (x.shape[0], x.shape[1] // group)
    return [x.new_empty(x.shape, dtype=torch.int8), x.new_empty(rows, dtype=torch.float32)]


@_lib.opaque("int8_quantize", _fake)
def _quantize(x: Tensor, group: int | None, config: list[int] | None) -> list[Tensor]:
    """[q, scale]."""
    q, scale = _fake(x, group, config)
    if x.numel() == 0:
        return [q, scale.fill_(1.0)]
    x = _lib.rows_adjacent(x) if group is None else x.contiguous().view(-1, group)
    R, N = x.shape
    with _lib.on_device(x):
        _lib.check_gpu()
        tiles = Config(*config) if config else default_config(R, N, x.dtype)
        parts = _lib.cdiv(N, tiles.block_n)
        _int8_quantize_kernel[(_lib.cdiv(R, tiles.block_m),)](
            x, q, scale, R, N, x.stride(0), tiles.block_m, tiles.block_n,
            parts if parts <= KEPT else 0,
            num_warps=tiles.warps, maxnreg=REGISTERS,
        )  # fmt: skip
    return [q, scale]


def int8_quantize(
    x: Tensor, *, axis: int, group: int | None = None, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """x [M, K] -> (codes int8 [M, K], scale float32), one launch and one read of x; no gradient.

    x: bfloat16 or float16; rows may have any pitch.
    axis: -1 (or 1), the last: the one that is scaled as a whole.
    group: None gives each row a scale, [M]; else that many neighbours share one, [M, K / group].
    config: tiles of this call.

    All zeros, or a scale too small for float32: scale 1, codes 0. A NaN or an infinity: the scale
    is NaN or infinity, and the codes of what shares it are 0.

    Raises TypeError for dtypes; ValueError for shapes and devices that do not fit, another axis and
    a group that does not divide K, naming the argument; NotImplementedError on a GPU older than
    Ampere.
    """
    _lib.check_tensor("x", x, ("M", "K"), DTYPES)
    _lib.check_static("axis", axis, (int,))
    if axis not in (-1, 1):
        raise ValueError(f"axis: expected -1, the last of x, got {axis}")
    if group is not None:
        _lib.check_static("group", group, (int,))
        if group < 1 or x.shape[1] % group:
            raise ValueError(f"group: expected a divisor of K = {x.shape[1]}, got {group}")
    _lib.check_config(config, Config)
    q, scale = _quantize(x, group, _lib.fields(config))
    return q, scale
