"""Softmax over rows, with an optional mask; a row that keeps nothing is all zeros.

    y[r, n] = exp(scale * x[r, n] - top[r]) / sum_j exp(scale * x[r, j] - top[r])    over the kept j

    for each tile of rows of this program:
        a row fits a tile:  load it once; top, sum and y from registers
        a longer row:       for each chunk: every run of 8 columns updates its own (max, sum)
                            merge the runs; walk back over the chunks: load again, store y

The second walk goes backwards because the chunks read last are the ones still in the caches.
Backward: dx = scale * y * (dy - sum_n y * dy), in the same two shapes.

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


@dataclass(frozen=True)
class Config:
    """Tile sizes and resources of the kernels; beyond the last bit the result ignores them.

    block_m: rows of a tile.
    block_n: columns of a tile. A row that is longer is read twice, in chunks of block_n.
    stages: tiles in flight or in use; 1 leaves that to the programs that share a multiprocessor.
    warps: warps of a program.
    programs: programs for each multiprocessor, which walk over the tiles; 0: one for each tile.
    """

    block_m: int = 1
    block_n: int = 4096
    stages: int = 1
    warps: int = 4
    programs: int = 0

    def __post_init__(self) -> None:
        for name, least in (("block_m", 1), ("block_n", 16)):
            size = getattr(self, name)
            if size < least or size & (size - 1):
                raise ValueError(f"{name}: expected a power of two >= {least}, got {size}")


def default_config(R: int, N: int, dtype: torch.dtype, which: str = "fwd") -> Config:
    """The Config for R rows of N columns; which: "fwd" or "bwd" (which holds two rows, not one)."""
    del R, dtype
    if N > 65536:
        return Config(1, 16384, stages=1, warps=32)
    block_n = max(64, _lib.power_of_2(N))
    # 16 elements of a row for each thread: two loads of 16 bytes in flight
    warps = min(32, max(4, block_n // 1024))
    return Config(max(1, 2048 // block_n), block_n, stages=1, warps=warps)


@triton.jit
def _keep(
    rows, n, mask_ptr, R, N, stride_mr, causal_offset, masked: tl.constexpr, causal: tl.constexpr
):
    """Which elements of a tile exist and are kept. [block_m, block_n]"""
    keep = (rows[:, None] < R) & (n[None, :] < N)
    if causal:
        keep = keep & (n[None, :] <= rows[:, None] + causal_offset)
    if masked:
        keep = keep & (
            tl.load(mask_ptr + rows[:, None] * stride_mr + n[None, :], mask=keep, other=0) != 0
        )
    return keep


@triton.jit
def _softmax_fwd_kernel(
    x_ptr, mask_ptr, y_ptr, R, N, stride_xr, stride_mr, scale, causal_offset,
    masked: tl.constexpr, causal: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, whole: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    n = tl.arange(0, block_n)
    for mi in tl.range(
        tl.program_id(0), tl.cdiv(R, block_m), tl.num_programs(0), num_stages=stages
    ):
        # --- 1. which tile
        rows = (mi * block_m + tl.arange(0, block_m)).to(tl.int64)
        x_rows = x_ptr + rows[:, None] * stride_xr
        y_rows = y_ptr + rows[:, None] * N
        exists = rows[:, None] < R

        # --- 2. main loop
        if whole:
            inside = exists & (n[None, :] < N)
            x = tl.load(x_rows + n[None, :], mask=inside, other=0.0).to(tl.float32)
            keep = _keep(rows, n, mask_ptr, R, N, stride_mr, causal_offset, masked, causal)
            # Masked before exp: what x holds there never matters.
            s = tl.where(keep, x * scale, float("-inf"))  # [block_m, block_n]
            top = tl.max(s, 1)
            top = tl.where(top == float("-inf"), 0.0, top)
            e = tl.exp(s - top[:, None])
            total = tl.sum(e, 1)
        else:
            # Each run of 8 columns has its own maximum and sum: no thread waits for another.
            run_max = tl.full((block_m, block_n // 8), float("-inf"), tl.float32)
            run_sum = tl.zeros((block_m, block_n // 8), tl.float32)
            for n0 in tl.range(0, N, block_n):
                inside = exists & (n0 + n[None, :] < N)
                x = tl.load(
                    x_rows + n0 + n[None, :], mask=inside, other=0.0, eviction_policy="evict_last"
                )
                keep = _keep(rows, n0 + n, mask_ptr, R, N, stride_mr, causal_offset, masked, causal)
                s = tl.where(keep, x.to(tl.float32) * scale, float("-inf"))
                s = tl.reshape(s, (block_m, block_n // 8, 8))
                new_max = tl.maximum(run_max, tl.max(s, 2))
                base = tl.where(new_max == float("-inf"), 0.0, new_max)
                run_sum = run_sum * tl.exp(run_max - base) + tl.sum(tl.exp(s - base[:, :, None]), 2)
                run_max = new_max
            top = tl.max(run_max, 1)
            top = tl.where(top == float("-inf"), 0.0, top)
            total = tl.sum(run_sum * tl.exp(run_max - top[:, None]), 1)

        # --- 3. epilogue
        # A row that keeps nothing has total 0, and every e is 0.
        norm = 1.0 / tl.where(total == 0.0, 1.0, total)

        # --- 4. store
        if whole:
            y = e * norm[:, None]
            tl.store(y_rows + n[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)
        else:
            last = (N - 1) // block_n * block_n
            for back in tl.range(0, N, block_n):
                n0 = last - back
                inside = exists & (n0 + n[None, :] < N)
                x = tl.load(
                    x_rows + n0 + n[None, :], mask=inside, other=0.0, eviction_policy="evict_first"
                )
                keep = _keep(rows, n0 + n, mask_ptr, R, N, stride_mr, causal_offset, masked, causal)
                s = tl.where(keep, x.to(tl.float32) * scale, float("-inf"))
                y = tl.exp(s - top[:, None]) * norm[:, None]
                tl.store(
                    y_rows + n0 + n[None, :],
                    y.to(y_ptr.dtype.element_ty),
                    mask=inside,
                    eviction_policy="evict_first",
                )


@triton.jit
def _softmax_bwd_kernel(
    y_ptr, dy_ptr, dx_ptr, R, N, stride_yr, stride_dyr, scale,
    block_m: tl.constexpr, block_n: tl.constexpr, whole: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    n = tl.arange(0, block_n)
    for mi in tl.range(
        tl.program_id(0), tl.cdiv(R, block_m), tl.num_programs(0), num_stages=stages
    ):
        # --- 1. which tile
        rows = (mi * block_m + tl.arange(0, block_m)).to(tl.int64)
        y_rows = y_ptr + rows[:, None] * stride_yr
        dy_rows = dy_ptr + rows[:, None] * stride_dyr
        dx_rows = dx_ptr + rows[:, None] * N
        exists = rows[:, None] < R

        # --- 2. main loop
        # Where y is 0, masked or not, dy has no say: it may hold anything.
        if whole:
            inside = exists & (n[None, :] < N)
            y = tl.load(y_rows + n[None, :], mask=inside, other=0.0).to(tl.float32)
            dy = tl.load(dy_rows + n[None, :], mask=inside, other=0.0).to(tl.float32)
            dot = tl.sum(tl.where(y == 0.0, 0.0, y * dy), 1)
        else:
            dots = tl.zeros((block_m, block_n), tl.float32)
            for n0 in tl.range(0, N, block_n):
                inside = exists & (n0 + n[None, :] < N)
                y = tl.load(
                    y_rows + n0 + n[None, :], mask=inside, other=0.0, eviction_policy="evict_last"
                ).to(tl.float32)
                dy = tl.load(
                    dy_rows + n0 + n[None, :], mask=inside, other=0.0, eviction_policy="evict_last"
                ).to(tl.float32)
                dots += tl.where(y == 0.0, 0.0, y * dy)
            dot = tl.sum(dots, 1)

        # --- 3. epilogue
        # The row's share of the gradient, which keeps the sum of y at 1.
        dot = dot[:, None]

        # --- 4. store
        if whole:
            dx = tl.where(y == 0.0, 0.0, scale * y * (dy - dot))
            tl.store(dx_rows + n[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
        else:
            last = (N - 1) // block_n * block_n
            for back in tl.range(0, N, block_n):
                n0 = last - back
                inside = exists & (n0 + n[None, :] < N)
                y = tl.load(
                    y_rows + n0 + n[None, :], mask=inside, other=0.0, eviction_policy="evict_first"
                ).to(tl.float32)
                dy = tl.load(
                    dy_rows + n0 + n[None, :], mask=inside, other=0.0, eviction_policy="evict_first"
                ).to(tl.float32)
                dx = tl.where(y == 0.0, 0.0, scale * y * (dy - dot))
                tl.store(
                    dx_rows + n0 + n[None, :],
                    dx.to(dx_ptr.dtype.element_ty),
                    mask=inside,
                    eviction_policy="evict_first",
                )


def _programs(R: int, config: Config) -> int:
    tiles = _lib.cdiv(R, config.block_m)
    return min(tiles, config.programs * _lib.num_sms()) if config.programs else tiles


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
        _softmax_fwd_kernel[(_programs(R, tiles),)](
            x, mask, y, R, N, x.stride(0), 0 if mask is None else mask.stride(0), scale,
            # Beyond these bounds all or nothing is kept.
            0 if causal_offset is None else max(-R, min(N, causal_offset)),
            mask is not None, causal_offset is not None,
            tiles.block_m, tiles.block_n, N <= tiles.block_n, tiles.stages, num_warps=tiles.warps,
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
        _softmax_bwd_kernel[(_programs(R, tiles),)](
            y, dy, dx, R, N, y.stride(0), dy.stride(0), scale,
            tiles.block_m, tiles.block_n, N <= tiles.block_n, tiles.stages, num_warps=tiles.warps,
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
