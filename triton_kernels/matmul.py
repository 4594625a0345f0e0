"""Matrix product: persistent, TMA and wgmma; tl.dot on plain pointers where TMA cannot go.

    c[m, n] = sum_k a[m, k] * b[k, n]                       accumulated in float32, rounded once

    for each output tile of this program, in an order that keeps its neighbours' operands in L2:
        for each k: acc += a_tile @ b_tile       the compiler keeps `stages` tiles in flight
        store acc in two halves

The gradients are the same kernel: an operand stored transposed is read where it lies, and its tile
is transposed in shared memory, which 16-bit wgmma takes as it is.

Limits: from Ampere up; bfloat16 and float16 operands. TMA wants Hopper or newer and rows that start
at multiples of 16 bytes; anything else goes through pointers, with no copy.

Twin: pallas_kernels/matmul.py.

Sources: the order of tiles and the loop over k follow the Triton tutorials 03 and 09; the flattened
tile loop and the split epilogue follow tutorial 09.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _lib

DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Config:
    """Tile sizes and resources of the kernel; the result does not depend on them.

    block_m, block_n, block_k: sizes of the tile of c that a program computes, and of the slice of k
        of one step. Powers of two, at least 16.
    stages: steps of the loop over k whose operands are in flight or in use.
    group_m: tiles along m that are visited before the next tile along n.
    warps: warps of a program.
    """

    block_m: int = 128
    block_n: int = 256
    block_k: int = 64
    stages: int = 4
    group_m: int = 8
    warps: int = 8

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(f"{name}: expected a power of two >= 16, got {size}")


def default_config(M: int, N: int, K: int, dtype: torch.dtype) -> Config:
    """The Config for a product of these sizes on a Hopper with 132 multiprocessors."""
    del K, dtype
    # 128 x 256 is the largest tile whose float32 accumulator fits the registers of 8 warps (128 a
    # thread). Each of its operand bytes feeds the most multiplications.
    if _lib.cdiv(M, 128) * _lib.cdiv(N, 256) >= 128:
        return Config()
    # Too few of those to occupy the device: half the tile, twice the programs.
    if _lib.cdiv(M, 128) * _lib.cdiv(N, 128) >= 64:
        return Config(block_n=128, warps=4)
    return Config(block_m=64, block_n=64, block_k=128, warps=4)


# Pointer loads need address registers, and Ada has 99 KB of shared memory: a smaller tile.
POINTER_CONFIG = Config(block_n=128, block_k=32, stages=3)


@triton.jit
def _load_tile(
    x, row, col, rows, cols, stride_r, stride_c,
    block_r: tl.constexpr, block_c: tl.constexpr, tma: tl.constexpr,
):  # fmt: skip
    """x[row : row + block_r, col : col + block_c], zeros beyond the edges."""
    if tma:
        tile = x.load([row, col])
    else:
        r = row + tl.arange(0, block_r)
        c = col + tl.arange(0, block_c)
        mask = (r[:, None] < rows) & (c[None, :] < cols)
        offsets = r.to(tl.int64)[:, None] * stride_r + c.to(tl.int64)[None, :] * stride_c
        tile = tl.load(x + offsets, mask=mask, other=0.0)
    return tile


@triton.jit
def _store_tile(
    x, tile, row, col, rows, cols, stride_r,
    block_r: tl.constexpr, block_c: tl.constexpr, tma: tl.constexpr,
):  # fmt: skip
    """x[row : row + block_r, col : col + block_c] = tile, nothing beyond the edges."""
    if tma:
        x.store([row, col], tile)
    else:
        r = row + tl.arange(0, block_r)
        c = col + tl.arange(0, block_c)
        mask = (r[:, None] < rows) & (c[None, :] < cols)
        tl.store(x + r.to(tl.int64)[:, None] * stride_r + c[None, :], tile, mask=mask)


@triton.jit
def _matmul_kernel(
    a,  # [M, K], or [K, M] when transpose_a: a TMA descriptor, or a pointer
    b,  # [K, N], or [N, K] when transpose_b
    c,  # [M, N]
    M, N, K,
    stride_ar, stride_ac, stride_br, stride_bc, stride_cr,
    transpose_a: tl.constexpr, transpose_b: tl.constexpr, out_dtype: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr,
    group_m: tl.constexpr, num_programs: tl.constexpr, tma: tl.constexpr,
):  # fmt: skip
    num_m, num_n = tl.cdiv(M, block_m), tl.cdiv(N, block_n)
    # Flattened, the two loops are one to the compiler: the operands of the next tile are on their
    # way while this one is stored.
    for tile in tl.range(tl.program_id(0), num_m * num_n, num_programs, flatten=True):
        # --- 1. which tile
        # Programs run side by side: group_m rows of tiles and a few columns share their operands.
        width = group_m * num_n
        first = tile // width * group_m
        height = min(num_m - first, group_m)
        m = (first + tile % width % height) * block_m
        n = tile % width // height * block_n

        # --- 2. main loop
        acc = tl.zeros((block_m, block_n), tl.float32)
        for ki in range(tl.cdiv(K, block_k)):
            k = ki * block_k
            if transpose_a:
                a_tile = _load_tile(a, k, m, K, M, stride_ar, stride_ac, block_k, block_m, tma).T
            else:
                a_tile = _load_tile(a, m, k, M, K, stride_ar, stride_ac, block_m, block_k, tma)
            if transpose_b:
                b_tile = _load_tile(b, n, k, N, K, stride_br, stride_bc, block_n, block_k, tma).T
            else:
                b_tile = _load_tile(b, k, n, K, N, stride_br, stride_bc, block_k, block_n, tma)
            acc = tl.dot(a_tile, b_tile, acc)

        # --- 3. epilogue
        # In two halves: the store then stages half a tile in shared memory, and one more stage of
        # operands fits.
        half: tl.constexpr = block_n // 2
        halves = tl.permute(tl.reshape(acc, (block_m, 2, half)), (0, 2, 1))
        left, right = tl.split(halves)  # [block_m, half] each

        # --- 4. store
        _store_tile(c, left.to(out_dtype), m, n, M, N, stride_cr, block_m, half, tma)
        _store_tile(c, right.to(out_dtype), m, n + half, M, N, stride_cr, block_m, half, tma)


def _fake_product(a: Tensor, b: Tensor, out_dtype: torch.dtype, config: list[int] | None) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)


@_lib.opaque("matmul", _fake_product)
def _product(a: Tensor, b: Tensor, out_dtype: torch.dtype, config: list[int] | None) -> Tensor:
    """a @ b for any strides: an operand whose first axis is the adjacent one is read transposed."""
    (M, K), N = a.shape, b.shape[1]
    c = torch.empty((M, N), device=a.device, dtype=out_dtype)
    if 0 in (M, N, K):
        return c.zero_()
    transpose_a = a.stride(0) == 1 and a.stride(1) > 1
    transpose_b = b.stride(0) == 1 and b.stride(1) > 1
    a, b = a.t() if transpose_a else a, b.t() if transpose_b else b  # as they lie in memory
    with _lib.on_device(a):
        _lib.check_gpu()
        tma = _lib.has_tma() and all(map(_lib.tma_ready, (a, b, c)))
        if config:
            tiles = Config(*config)
        else:
            tiles = default_config(M, N, K, a.dtype) if tma else POINTER_CONFIG
            if out_dtype is torch.float32:  # the store stages twice the bytes in shared memory
                tiles = replace(tiles, stages=3)
        block_m, block_n, block_k = tiles.block_m, tiles.block_n, tiles.block_k

        def operand(x: Tensor, *block: int) -> TensorDescriptor | Tensor:
            return TensorDescriptor.from_tensor(x, list(block)) if tma else x

        programs = min(_lib.num_sms(), _lib.cdiv(M, block_m) * _lib.cdiv(N, block_n))
        _matmul_kernel[(programs,)](
            operand(a, *((block_k, block_m) if transpose_a else (block_m, block_k))),
            operand(b, *((block_n, block_k) if transpose_b else (block_k, block_n))),
            operand(c, block_m, block_n // 2),
            M, N, K, *a.stride(), *b.stride(), N,
            transpose_a, transpose_b, _TRITON_DTYPES[out_dtype],
            block_m, block_n, block_k, tiles.group_m, programs, tma,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return c


_TRITON_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}


def matmul_fwd(
    a: Tensor,
    b: Tensor,
    *,
    out_dtype: torch.dtype | str | None = None,
    config: Config | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """matmul and what its backward needs: (c [M, N], (a, b)). No gradient flows through this."""
    out_dtype = _check(a, b, out_dtype, config)
    return _product(a, b, out_dtype, _lib.fields(config)), (a, b)


def matmul_bwd(
    res: tuple[Tensor, Tensor], dc: Tensor, *, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients (da [M, K], db [K, N]) in the operands' dtype.

    res: (a, b) of matmul_fwd. dc [M, N]: the cotangent; float32 is rounded to the operands' dtype.
    """
    a, b = res
    _check(a, b, None, config)
    _lib.check_tensor("dc", dc, (a.shape[0], b.shape[1]), (*DTYPES, torch.float32))
    _lib.check_same_device(a=a, dc=dc)
    dc, fields = dc.to(a.dtype), _lib.fields(config)
    return _product(dc, b.t(), a.dtype, fields), _product(a.t(), dc, b.dtype, fields)


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, out_dtype, config):
        c, res = matmul_fwd(a, b, out_dtype=out_dtype, config=config)
        ctx.save_for_backward(*res)
        return c

    @staticmethod
    @once_differentiable
    def backward(ctx, dc):
        a, b = ctx.saved_tensors
        need_a, need_b, *_ = ctx.needs_input_grad
        dc = dc.to(a.dtype)
        da = _product(dc, b.t(), a.dtype, None) if need_a else None
        db = _product(a.t(), dc, b.dtype, None) if need_b else None
        return da, db, None, None


def matmul(
    a: Tensor,
    b: Tensor,
    *,
    out_dtype: torch.dtype | str | None = None,
    config: Config | None = None,
) -> Tensor:
    """c [M, N] = a [M, K] @ b [K, N], accumulated in float32. Differentiable once.

    a, b: bfloat16 or float16, the same; any strides (a transposed view costs no copy).
    out_dtype: that dtype (default) or float32; a torch.dtype or its name.
    config: tiles of this call; gradients take their own default.

    Raises TypeError for dtypes and ValueError for shapes and devices that do not fit, naming the
    argument; NotImplementedError on a GPU older than Ampere.
    """
    return _Matmul.apply(a, b, out_dtype, config)


def _check(a: Tensor, b: Tensor, out_dtype: torch.dtype | str | None, config: Config | None):
    for name, x, shape in (("a", a, ("M", "K")), ("b", b, ("K", "N"))):
        if isinstance(x, Tensor) and x.dtype is torch.float32:
            raise TypeError(
                f"{name}: expected dtype bfloat16 or float16, got float32: tensor cores would "
                "round its mantissa to 10 bits (TF32) without a word"
            )
        _lib.check_tensor(name, x, shape, DTYPES)
    _lib.check_tensor("b", b, (a.shape[1], "N"), (a.dtype,))
    _lib.check_same_device(a=a, b=b)
    _lib.check_config(config, Config)
    if isinstance(out_dtype, str):
        out_dtype = getattr(torch, out_dtype, out_dtype)
    if out_dtype not in (None, a.dtype, torch.float32):
        want = str(a.dtype).removeprefix("torch.")
        raise TypeError(f"out_dtype: expected {want} or float32, got {out_dtype}")
    return out_dtype or a.dtype
