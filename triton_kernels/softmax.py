"""Softmax over rows, with an optional mask; a row that keeps nothing is all zeros.

    y[r, n] = exp(scale * x[r, n] - top[r]) / sum_j exp(scale * x[r, j] - top[r])    over the kept j

    for each tile of rows:
        walk over the row: every run of 8 columns updates its own (max, sum)
        merge the runs
        walk back over it: load again, store y

The second walk finds the row in L1, or the end of a longer one in L2: it goes backwards because
what was read last is still there. So no row has to fit registers or shared memory, and a program
needs few of them: while one waits for its row another on the same multiprocessor stores.
Backward: dx = scale * y * (dy - sum_n y * dy), in the same two walks.

Limits: from Ampere up; bfloat16, float16, float32; statistics in float32.

Twin: pallas_kernels/softmax.py.

Sources: the online pass is Milakov and Gimelshein's (arXiv:1805.02867), kept per run of columns and
merged once; one row a program follows the Triton tutorial 02.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _lib

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Config:
    """Tile sizes and resources of the kernels; beyond the last bit the result ignores them.

    block_m: rows of a tile.
    block_n: columns of a tile of the first walk; the second takes half, as it loads and stores.
    warps: warps of a program.
    """

    block_m: int = 1
    block_n: int = 4096
    warps: int = 4

    def __post_init__(self) -> None:
        for name, least in (("block_m", 1), ("block_n", 16)):
            size = getattr(self, name)
            if size < least or size & (size - 1):
                raise ValueError(f"{name}: expected a power of two >= {least}, got {size}")


def default_config(R: int, N: int, dtype: torch.dtype, which: str = "fwd") -> Config:
    """The Config for R rows of N columns on a Hopper; which: "fwd" or "bwd"."""
    del R
    block_n = max(64, _lib.power_of_2(N))
    most = 65536 // dtype.itemsize  # columns in 64 KB
    if which == "fwd" and block_n > most // 8:
        # Half a row beyond 8 KB: exp keeps the registers busy, and two tiles overlap.
        block_n = most if block_n > most else block_n // 2
    block_n = min(block_n, most)
    block_m = max(1, most // 8 // block_n)
    # 64 bytes of a tile for each thread: four loads of 16 bytes in flight.
    return Config(block_m, block_n, warps=block_m * block_n * dtype.itemsize // 2048)


@triton.jit
def _scores(
    x_ptr, mask_ptr, m, n, R, N, stride_xr, stride_mr, scale, causal_offset,
    masked: tl.constexpr, causal: tl.constexpr, rising: tl.constexpr, policy: tl.constexpr,
):  # fmt: skip
    """scale * x at rows m and columns n, -inf where nothing is or nothing is kept.

    scale holds a factor log2(e): exp2 is one instruction, exp is several. rising: it is > 0.
    """
    rows = m.to(tl.int64)[:, None]
    keep = (m[:, None] < R) & (n[None, :] < N)
    if rising and not (masked or causal):  # the load writes -inf: no instruction for each element
        x = tl.load(
            x_ptr + rows * stride_xr + n[None, :], keep, float("-inf"), eviction_policy=policy
        )
        return x.to(tl.float32) * scale
    x = tl.load(x_ptr + rows * stride_xr + n[None, :], keep, 0.0, eviction_policy=policy)
    s = x.to(tl.float32) * scale
    if causal:
        keep = keep & (n[None, :] <= (m + causal_offset)[:, None])
    if masked:
        keep = keep & tl.load(mask_ptr + rows * stride_mr + n[None, :], keep, 0).to(tl.int1)
    # Masked before exp2: what x holds there never matters.
    return tl.where(keep, s, float("-inf"))


@triton.jit
def _softmax_fwd_kernel(
    x_ptr,  # [R, N]
    mask_ptr,  # [R, N] uint8 or None
    y_ptr,  # [R, N]
    R, N, stride_xr, stride_mr, scale, causal_offset,
    causal: tl.constexpr, rising: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr,
):  # fmt: skip
    masked: tl.constexpr = mask_ptr is not None
    # --- 1. which tile
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)
    n = tl.arange(0, block_n)

    # --- 2. main loop
    # Each run of 8 columns has its own maximum and sum: no thread waits for another.
    run_max = tl.full((block_m, block_n // 8), float("-inf"), tl.float32)
    run_sum = tl.zeros((block_m, block_n // 8), tl.float32)
    for n0 in tl.range(0, N, block_n):
        s = _scores(
            x_ptr, mask_ptr, m, n0 + n, R, N, stride_xr, stride_mr, scale, causal_offset,
            masked, causal, rising, "evict_last",
        )  # [block_m, block_n]  # fmt: skip
        s = tl.reshape(s, (block_m, block_n // 8, 8))
        new_max = tl.maximum(run_max, tl.max(s, 2))
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
        run_sum = run_sum * tl.exp2(run_max - base) + tl.sum(tl.exp2(s - base[:, :, None]), 2)
        run_max = new_max

    # --- 3. epilogue
    top = tl.max(run_max, 1)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(run_sum * tl.exp2(run_max - top[:, None]), 1)
    # A row that keeps nothing has total 0, and every exp2 of it is 0.
    norm = 1.0 / tl.where(total == 0.0, 1.0, total)[:, None]

    # --- 4. store
    half: tl.constexpr = block_n // 2
    last = (N - 1) // half * half
    for back in tl.range(0, N, half):
        cols = last - back + tl.arange(0, half)
        s = _scores(
            x_ptr, mask_ptr, m, cols, R, N, stride_xr, stride_mr, scale, causal_offset,
            masked, causal, rising, "evict_first",
        )  # [block_m, block_n / 2]  # fmt: skip
        y = (tl.exp2(s - top[:, None]) * norm).to(y_ptr.dtype.element_ty)
        y_tile = y_ptr + m.to(tl.int64)[:, None] * N + cols[None, :]
        inside = (m[:, None] < R) & (cols[None, :] < N)
        tl.store(y_tile, y, mask=inside, eviction_policy="evict_first")


@triton.jit
def _softmax_bwd_kernel(
    y_ptr,  # [R, N]
    dy_ptr,  # [R, N]
    dx_ptr,  # [R, N]
    R, N, stride_yr, stride_dyr, scale,
    block_m: tl.constexpr, block_n: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)[:, None]
    rows = m.to(tl.int64)
    y_rows, dy_rows = y_ptr + rows * stride_yr, dy_ptr + rows * stride_dyr

    # --- 2. main loop
    run_sum = tl.zeros((block_m, block_n // 8), tl.float32)
    for n0 in tl.range(0, N, block_n):
        cols = n0 + tl.arange(0, block_n)[None, :]
        inside = (m < R) & (cols < N)
        y = tl.load(y_rows + cols, inside, 0.0, eviction_policy="evict_last")
        dy = tl.load(dy_rows + cols, inside, 0.0, eviction_policy="evict_last")
        products = y.to(tl.float32) * dy.to(tl.float32)
        run_sum += tl.sum(tl.reshape(products, (block_m, block_n // 8, 8)), 2)

    # --- 3. epilogue
    total = tl.sum(run_sum, 1)[:, None]

    # --- 4. store
    half: tl.constexpr = block_n // 2
    last = (N - 1) // half * half
    for back in tl.range(0, N, half):
        cols = last - back + tl.arange(0, half)[None, :]
        inside = (m < R) & (cols < N)
        y = tl.load(y_rows + cols, inside, 0.0, eviction_policy="evict_first").to(tl.float32)
        dy = tl.load(dy_rows + cols, inside, 0.0, eviction_policy="evict_first").to(tl.float32)
        dx = (scale * y * (dy - total)).to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + rows * N + cols, dx, mask=inside, eviction_policy="evict_first")


def _fake_fwd(x, mask, scale, causal_offset, config):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_lib.opaque("softmax_fwd", _fake_fwd)
def _forward(
    x: Tensor,
    mask: Tensor | None,
    scale: float,
    causal_offset: int | None,
    config: list[int] | None,
) -> Tensor:
    R, N = x.shape
    y = torch.empty((R, N), device=x.device, dtype=x.dtype)
    if 0 in (R, N):
        return y
    x = _lib.rows_adjacent(x)
    if mask is not None:
        mask = _lib.rows_adjacent(mask).view(torch.uint8)
    with _lib.on_device(x):
        _lib.check_gpu()
        tiles = Config(*config) if config else default_config(R, N, x.dtype, "fwd")
        _softmax_fwd_kernel[(_lib.cdiv(R, tiles.block_m),)](
            x, mask, y, R, N, x.stride(0), 0 if mask is None else mask.stride(0), scale * LOG2_E,
            # Beyond these bounds all or nothing is kept.
            0 if causal_offset is None else max(-R, min(N, causal_offset)),
            causal_offset is not None, scale > 0,
            tiles.block_m, tiles.block_n,
            num_warps=tiles.warps, maxnreg=_lib.registers(tiles.warps),
        )  # fmt: skip
    return y


def _fake_bwd(y, dy, scale, config):
    return torch.empty_like(y, memory_format=torch.contiguous_format)


@_lib.opaque("softmax_bwd", _fake_bwd)
def _backward(y: Tensor, dy: Tensor, scale: float, config: list[int] | None) -> Tensor:
    R, N = y.shape
    dx = torch.empty((R, N), device=y.device, dtype=y.dtype)
    if 0 in (R, N):
        return dx
    y, dy = _lib.rows_adjacent(y), _lib.rows_adjacent(dy)
    with _lib.on_device(y):
        _lib.check_gpu()
        tiles = Config(*config) if config else default_config(R, N, y.dtype, "bwd")
        _softmax_bwd_kernel[(_lib.cdiv(R, tiles.block_m),)](
            y, dy, dx, R, N, y.stride(0), dy.stride(0), scale,
            tiles.block_m, tiles.block_n,
            num_warps=tiles.warps, maxnreg=_lib.registers(tiles.warps),
        )  # fmt: skip
    return dx


def softmax_fwd(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float = 1.0,
    causal_offset: int | None = None,
    config: Config | None = None,
) -> tuple[Tensor, tuple[Tensor]]:
    """softmax and what its backward needs: (y [R, N], (y,)). No gradient flows through this."""
    _lib.check_tensor("x", x, ("R", "N"), DTYPES)
    if mask is not None:
        _lib.check_tensor("mask", mask, tuple(x.shape), (torch.bool,))
    _lib.check_same_device(x=x, mask=mask)
    _lib.check_static("scale", scale, (float, int))
    if causal_offset is not None:
        _lib.check_static("causal_offset", causal_offset, (int,))
    _lib.check_config(config, Config)
    y = _forward(x, mask, float(scale), causal_offset, _lib.fields(config))
    return y, (y,)


def softmax_bwd(
    res: tuple[Tensor], dy: Tensor, *, scale: float = 1.0, config: Config | None = None
) -> tuple[Tensor]:
    """Gradient (dx [R, N],) in y's dtype. res: (y,) of softmax_fwd. dy [R, N]: the cotangent."""
    (y,) = res
    _lib.check_tensor("y", y, ("R", "N"), DTYPES)
    _lib.check_tensor("dy", dy, tuple(y.shape), (y.dtype,))
    _lib.check_same_device(y=y, dy=dy)
    _lib.check_static("scale", scale, (float, int))
    _lib.check_config(config, Config)
    return (_backward(y, dy, float(scale), _lib.fields(config)),)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mask, scale, causal_offset, config):
        y, res = softmax_fwd(x, mask, scale=scale, causal_offset=causal_offset, config=config)
        ctx.save_for_backward(*res)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (dx,) = softmax_bwd(ctx.saved_tensors, dy, scale=ctx.scale)
        return dx, None, None, None, None


def softmax(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float = 1.0,
    causal_offset: int | None = None,
    config: Config | None = None,
) -> Tensor:
    """y [R, N] = softmax of scale * x [R, N] along rows, over what is kept. Differentiable once.

    x: bfloat16, float16 or float32; y has its dtype.
    mask [R, N] bool: True keeps. A masked x may hold NaN or infinity and does not matter.
    causal_offset: row r keeps columns n <= r + causal_offset. With a mask, both must keep.
    config: tiles of this call; the gradient takes its own default.

    A row that keeps nothing is zeros; a row that keeps +inf or NaN is NaN.

    Raises TypeError for dtypes and ValueError for shapes and devices that do not fit, naming the
    argument; NotImplementedError on a GPU older than Ampere.
    """
    return _Softmax.apply(x, mask, scale, causal_offset, config)
