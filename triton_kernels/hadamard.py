"""Rotation by a randomly signed Hadamard matrix, alone or with the quantizer behind it.

    y[r, :] = H (signs * x[r, :]) / sqrt(n)         H[i, j] = (-1)^(ones in i & j)
    inverse: y[r, :] = signs * (H x[r, :]) / sqrt(n)
    int8: scale[r] = max |y[r, :]| / 127            q = clip(rint(y / scale), -127, 127)
    e4m3: scale[r] = max(max |y[r, :]|, 1e-4) / 448 q = e4m3(y * (1 / scale))

    matrices: for each part of 64 of n, H of 64 with the signs on its rows; in shared memory
    persistent programs, for each tile of rows:
        for each part: acc = x @ matrix             +-1 times x: each term is exact
        the fast transform over the parts
        y = round(acc / sqrt(n)) to x's dtype; store it, or its codes and scales
    inverse: the signs come last, with the factor

The fast transform has 7 additions an element at n = 128, four of them between threads. Here those
within 64 elements are one product on tensor cores, which are idle while memory is read: 64
multiplications an element take a quarter of the time of its 3 bytes. Those between parts of 64 are
additions in registers. Codes are what the quantizers give for the rounded y, bit for bit.

Limits: from Ampere up; bfloat16 and float16; n = 64, 128 or 256.

Twin: pallas_kernels/hadamard.py.

Sources: QuaRot (Ashkboos et al., arXiv:2404.00456) and QuIP# (Tseng et al., arXiv:2402.04396) for
the rotation; HadaCore (Agarwal et al., arXiv:2412.08832) for tensor cores.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _lib
from .fp8_quantize import _e4m3, _larger, _largest, _reciprocal, _times
from .fp8_quantize import _scale as _e4m3_scale
from .int8_quantize import _codes

DTYPES = (torch.bfloat16, torch.float16)
SIZES = (64, 128, 256)
FORMATS = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn}
INTERPRETING = tl.constexpr(_lib.INTERPRETING)


@dataclass(frozen=True)
class Config:
    """Tile sizes and resources of the kernel; beyond the last bits y does not depend on them.

    block_m: rows of a tile.
    stages: tiles of x in flight or in use.
    warps: warps of a program.
    programs: programs for each multiprocessor, which walk over the tiles.
    """

    block_m: int = 64
    stages: int = 3
    warps: int = 4
    programs: int = 2

    def __post_init__(self) -> None:
        if self.block_m < 16 or self.block_m & (self.block_m - 1):
            raise ValueError(f"block_m: expected a power of two >= 16, got {self.block_m}")


def default_config(R: int, n: int, dtype: torch.dtype) -> Config:
    """The Config for R rows of n elements on a Hopper."""
    del R, dtype
    # 64 rows are what a warpgroup multiplies at once. The matrices take 8 to 32 KB, a tile as much:
    # three tiles, two of the largest, and as many programs as fit.
    stages, programs = {64: (3, 5), 128: (3, 3), 256: (2, 2)}[n]
    return Config(64, stages, 4, programs)


@triton.jit
def _butterflies(parts, half: tl.constexpr, count: tl.constexpr):
    """One step of the fast transform over `count` parts: sums and differences of those `half`
    apart."""
    out = ()
    for p in tl.static_range(count):
        if p & half == 0:
            out = out + (parts[p] + parts[p + half],)  # noqa: RUF005
        else:
            out = out + (parts[p - half] - parts[p],)  # noqa: RUF005
    return out


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """float32 to dtype, ties to even; bfloat16 two at once, as one by one takes far longer."""
    rounded = x.to(dtype)
    if not INTERPRETING and dtype == tl.bfloat16:
        rounded = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    return rounded


@triton.jit
def _hadamard_kernel(
    x_ptr,  # [R, n]
    signs_ptr,  # [n]
    y_ptr,  # [R, n]: y, or its codes
    scale_ptr,  # [R] float32, or None
    R, factor, n: tl.constexpr, inverse: tl.constexpr, fmt: tl.constexpr,
    block_m: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    parts: tl.constexpr = n // 64
    column = tl.arange(0, 64)[None, :]
    row = tl.arange(0, 64)[:, None]
    both = row & column
    both ^= both >> 4
    both ^= both >> 2
    both ^= both >> 1
    matrices, factors = (), ()
    for p in tl.static_range(parts):
        if inverse:
            signs = tl.full((64, 1), 1.0, tl.float32)
            last = tl.load(signs_ptr + p * 64 + column).to(tl.float32) * factor
        else:
            signs = tl.load(signs_ptr + p * 64 + row).to(tl.float32)
            last = factor
            if n != 128:  # a power of two: exact before the sums too
                signs, last = signs * factor, 1.0
        matrix = tl.where((both & 1) == 0, signs, -signs).to(dtype)
        matrices, factors = matrices + (matrix,), factors + (last,)  # noqa: RUF005
    for mi in tl.range(
        tl.program_id(0), tl.cdiv(R, block_m), tl.num_programs(0), num_stages=stages
    ):
        # --- 1. which tile
        m = (mi * block_m + tl.arange(0, block_m)).to(tl.int64)
        at = m[:, None] * n + column
        inside = m[:, None] < R

        # --- 2. main loop
        acc = ()
        for p in tl.static_range(parts):
            x = tl.load(x_ptr + at + p * 64, mask=inside, other=0.0)
            acc = acc + (tl.dot(x, matrices[p]),)  # noqa: RUF005

        # --- 3. epilogue
        if parts >= 2:
            acc = _butterflies(acc, 1, parts)
        if parts >= 4:
            acc = _butterflies(acc, 2, parts)
        y = ()
        for p in tl.static_range(parts):
            y = y + (_rounded(acc[p] * factors[p], dtype),)  # noqa: RUF005
        if fmt != "":
            # Rounding keeps the order: the largest is found before it, and rounded then.
            largest = tl.abs(acc[0] * factors[0])
            for p in tl.static_range(1, parts):
                largest = _larger(largest, tl.abs(acc[p] * factors[p]))
            top = _largest(largest, 1).to(dtype).to(tl.float32)  # [block_m]
            if fmt == "int8":
                scale = tl.div_rn(top, 127.0)
                scale = tl.where(scale == 0.0, 1.0, scale)
            else:
                scale = _e4m3_scale(top)
                inverse_scale = _reciprocal(scale)[:, None]
            tl.store(scale_ptr + m, scale, mask=m < R)

        # --- 4. store
        for p in tl.static_range(parts):
            if fmt == "int8":
                out = _codes(y[p], top[:, None], scale[:, None])
            elif fmt == "e4m3":
                out = _e4m3(_times(y[p], inverse_scale))
            else:
                out = y[p]
            tl.store(y_ptr + at + p * 64, out, mask=inside)


def _fake(x, signs, inverse, fmt, config):
    y = x.new_empty(x.shape, dtype=FORMATS.get(fmt, x.dtype))
    return [y, x.new_empty(x.shape[:1], dtype=torch.float32)] if fmt else [y]


@_lib.opaque("hadamard", _fake)
def _rotated(
    x: Tensor, signs: Tensor, inverse: bool, fmt: str, config: list[int] | None
) -> list[Tensor]:
    """[y] of x [R, n], or [q, scale] with a format."""
    R, n = x.shape
    y = x.new_empty(R, n, dtype=torch.uint8 if fmt == "e4m3" else FORMATS.get(fmt, x.dtype))
    scale = x.new_empty(R, dtype=torch.float32) if fmt else None
    if R:
        x, signs = x.contiguous(), signs.contiguous()
        with _lib.on_device(x):
            _lib.check_gpu()
            tiles = Config(*config) if config else default_config(R, n, x.dtype)
            # Few enough for the programs of a multiprocessor to run side by side; where they are
            # two, the second half may as well follow the first.
            room = 65536 // (32 * tiles.warps * tiles.programs) // 8 * 8
            registers = 255 if tiles.programs <= 2 else max(64, min(255, room))
            programs = min(_lib.cdiv(R, tiles.block_m), tiles.programs * _lib.num_sms())
            _hadamard_kernel[(programs,)](
                x, signs, y, scale, R, n**-0.5, n, inverse, fmt,
                tiles.block_m, tiles.stages, num_warps=tiles.warps, maxnreg=registers,
            )  # fmt: skip
    if scale is None:
        return [y]
    return [y.view(FORMATS[fmt]), scale]


def _checked(name: str, x: Tensor, signs: Tensor, inverse: bool, config: Config | None) -> None:
    if not isinstance(x, torch.Tensor) or x.ndim == 0:
        raise TypeError(f"{name}: expected a torch.Tensor of one dimension at least, got {x!r:.80}")
    n = x.shape[-1]
    if n not in SIZES:
        raise ValueError(f"{name}: expected a last dimension of 64, 128 or 256, got {n}")
    _lib.check_tensor(name, x, tuple(x.shape), DTYPES)
    _lib.check_tensor("signs", signs, (n,), (x.dtype, torch.float32, torch.int8))
    _lib.check_same_device(**{name: x, "signs": signs})
    _lib.check_static("inverse", inverse, (bool,))
    _lib.check_config(config, Config)


def hadamard_rotate_fwd(
    x: Tensor, signs: Tensor, *, inverse: bool = False, config: Config | None = None
) -> tuple[Tensor, tuple[Tensor]]:
    """hadamard_rotate and what its backward needs, (signs,). No gradient flows through this."""
    _checked("x", x, signs, inverse, config)
    (y,) = _rotated(x.reshape(-1, x.shape[-1]), signs, inverse, "", _lib.fields(config))
    return y.view(x.shape), (signs,)


def hadamard_rotate_bwd(
    res: tuple[Tensor], dy: Tensor, *, inverse: bool = False, config: Config | None = None
) -> tuple[Tensor]:
    """The gradient (dx,): the rotation is orthogonal, so it is the other way round."""
    (signs,) = res
    _checked("dy", dy, signs, inverse, config)
    flat = dy.reshape(-1, dy.shape[-1])
    (dx,) = _rotated(flat, signs, not inverse, "", _lib.fields(config))
    return (dx.view(dy.shape),)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, signs, inverse, config):
        y, res = hadamard_rotate_fwd(x, signs, inverse=inverse, config=config)
        ctx.save_for_backward(*res)
        ctx.inverse = inverse
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dx = None
        if ctx.needs_input_grad[0]:
            (dx,) = hadamard_rotate_bwd(ctx.saved_tensors, dy, inverse=ctx.inverse)
        return dx, None, None, None


def hadamard_rotate(
    x: Tensor, signs: Tensor, *, inverse: bool = False, config: Config | None = None
) -> Tensor:
    """y [..., n] = H (signs * x) / sqrt(n) along the last dimension; differentiable once in x.

    x: bfloat16 or float16, n = 64, 128 or 256. signs [n]: 1 or -1, in x's dtype, float32 or int8.
    inverse: the rotation back, signs * (H x) / sqrt(n).
    config: tiles of this call; gradients take their own default.

    y has x's dtype; it is summed in float32 and rounded once. A NaN or an infinity reaches the
    whole of its n elements, and nothing else.

    Raises TypeError for dtypes and ValueError for shapes and devices that do not fit, naming the
    argument; NotImplementedError on a GPU older than Ampere.
    """
    return _Rotate.apply(x, signs, inverse, config)


def hadamard_quantize(
    x: Tensor, signs: Tensor, fmt: str, *, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """x [..., n] -> (codes [..., n], scale float32 [...]) of hadamard_rotate(x, signs).

    fmt: "int8": codes int8, those of int8_quantize with groups of n; "e4m3": codes float8_e4m3fn,
        those of fp8_quantize_rows, with a scale for n elements. Both also say what becomes of
        zeros, NaN and infinity. No gradient.
    x, signs and config: as hadamard_rotate, which see for what is raised; ValueError for another
    fmt.
    """
    _checked("x", x, signs, False, config)
    if fmt not in FORMATS:
        raise ValueError(f"fmt: expected int8 or e4m3, got {fmt!r}")
    flat = x.reshape(-1, x.shape[-1])
    q, scale = _rotated(flat, signs, False, fmt, _lib.fields(config))
    return q.view(x.shape), scale.view(x.shape[:-1])
