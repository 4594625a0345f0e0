"""Grouped matrix product: each expert of a mixture multiplies its own rows by its own weights.

    h[r] = x[r] @ w[e] + bias[e]     for the rows r of expert e; x[rows[r]] for x[r] with rows
    y[r] = row_scale[r] * act(h[r])  in float32 from the accumulator, rounded once; 0 past the last

    the plan: every tile's expert, first row, last row and columns, from sizes, on the device
    for each tile of this program:
        for each k: acc += x_tile @ w_tile       the compiler keeps `stages` tiles in flight
        bias, activation, row_scale; store the rows of this expert in two halves

Backward: dx is the same kernel with w read the other way round. dw[e] sums over the rows of e:
    for each tile of this program: for each k: acc += x[rows of e, m]^T @ dy[rows of e, n]

A tile may reach into the rows of the next expert. Those are computed and not stored, and where
rows are summed (dw) they are loaded as zeros: TMA itself stops at the last row of an expert.

Limits: from Ampere up; bfloat16 and float16 operands. TMA wants Hopper or newer and rows that start
at multiples of 16 bytes; anything else goes through pointers, with no copy.

Twin: pallas_kernels/moe_gemm.py.

Sources: the order of tiles within an expert follows the Triton tutorial 03 and PyTorch's posts on a
cache-aware grouped GEMM; the flattened loops follow tutorial 09 and its forerunner; descriptors
that end at any row are Triton's own (triton.tools.ragged_tma); sizes that stay on the device are
those of jax.lax.ragged_dot.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.ragged_tma import create_ragged_descriptor, load_ragged, to_ragged_indices
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _lib

DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Config:
    """Tile sizes and resources of the kernels; the result does not depend on them.

    block_m, block_n, block_k: sizes of the tile of y that a program computes, and of the slice of k
        of one step; for dw, columns of x, columns of dy, rows. Powers of two, at least 16.
    stages: steps of the main loop whose operands are in flight or in use.
    group_m: row tiles of an expert that are visited before the next tile of columns.
    decode: operands swapped, for few rows per expert: the columns of w fill the tensor core.
    warps: warps of a program.
    programs: programs for each multiprocessor, which walk over the tiles.
    """

    block_m: int = 128
    block_n: int = 256
    block_k: int = 64
    stages: int = 4
    group_m: int = 16
    decode: bool = False
    warps: int = 8
    programs: int = 1

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(f"{name}: expected a power of two >= 16, got {size}")


def default_config(M: int, N: int, K: int, E: int, dtype: torch.dtype, dw: bool = False) -> Config:
    """The Config for M rows of E experts with weights [K, N] on a Hopper with 132 multiprocessors.

    dw: for the gradient of the weights.
    """
    del N, K, dtype
    # 128 x 256 is the largest tile whose float32 accumulator fits the registers of 8 warps (128 a
    # thread). 16 of them above each other and 8 beside are one wave of programs, and the least
    # rows and columns that 132 tiles can share.
    if dw:
        return Config()
    # Tensor cores multiply 64 rows or more, so with fewer the columns of w take that side. Each
    # program has 160 KB of w on its way.
    if M <= 16 * E:
        return Config(16, 128, 128, 5, 1 << 20, True, 4)
    if M <= 64 * E:  # a tile that fits the rows an expert has
        return Config(block_m=64, stages=5, warps=4)
    return Config()


SHARED_BYTES = 227 * 1024 - 2048  # of a multiprocessor of Hopper, less barriers and the like

# Pointer loads need address registers, and Ada has 99 KB of shared memory: a smaller tile.
POINTER_CONFIG = Config(block_n=128, block_k=32, stages=3)
POINTER_DECODE_CONFIG = Config(16, 64, 64, 3, 1 << 20, True, 4)


@triton.jit
def _moe_gemm_plan_kernel(
    sizes_ptr,  # [E]
    plan_ptr,  # [E] first row of each expert, live rows, tiles, then 4 integers for every tile
    M, E, num_n, group_m, tiles_at,
    block_m: tl.constexpr, block_e: tl.constexpr, block_t: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    expert = tl.program_id(0)
    e = tl.arange(0, block_e)

    # --- 2. main loop
    # Negative sizes count as 0, and what is beyond M rows is cut off: no tile leaves x or y.
    sizes = tl.maximum(tl.load(sizes_ptr + e, mask=e < E, other=0), 0).to(tl.int64)
    ends = tl.cumsum(sizes, 0)
    starts = tl.minimum(ends - sizes, M).to(tl.int32)
    ends = tl.minimum(ends, M).to(tl.int32)
    num_m = tl.cdiv(ends - starts, block_m)  # [block_e]

    # --- 3. epilogue
    start = tl.sum(tl.where(e == expert, starts, 0))
    end = tl.sum(tl.where(e == expert, ends, 0))
    first_tile = tl.sum(tl.where(e < expert, num_m, 0)) * num_n
    tiles = tl.cdiv(end - start, block_m) * num_n

    # --- 4. store
    tl.store(plan_ptr + expert, start)
    if expert == E - 1:
        tl.store(plan_ptr + E, end)
        tl.store(plan_ptr + E + 1, first_tile + tiles)
    # Programs run side by side: group_m rows of tiles and a few columns share their operands.
    width = group_m * num_n
    for t0 in range(0, tiles, block_t):
        t = t0 + tl.arange(0, block_t)
        top = t // width * group_m
        height = tl.minimum(tl.cdiv(end - start, block_m) - top, group_m)
        height = tl.maximum(height, 1)  # of lanes past the last tile
        tile = plan_ptr + tiles_at + (first_tile + t) * 4
        tl.store(tile, expert, mask=t < tiles)
        tl.store(tile + 1, start + (top + t % width % height) * block_m, mask=t < tiles)
        tl.store(tile + 2, end, mask=t < tiles)
        tl.store(tile + 3, t % width // height, mask=t < tiles)


@triton.jit
def _taken_rows(rows_ptr, row, end, T, block_r: tl.constexpr):
    """Which rows of x belong to rows row .. end of y; -1 past the end and for an index beyond T."""
    r = row + tl.arange(0, block_r)
    if rows_ptr is None:
        taken = tl.where(r < end, r, -1)
    else:
        taken = tl.load(rows_ptr + r, mask=r < end, other=-1)
        taken = tl.where((taken >= 0) & (taken < T), taken, -1)
    return taken


@triton.jit
def _load_taken(
    x, taken, col, cols, stride_r, stride_c,
    block_c: tl.constexpr,
):  # fmt: skip
    """Those rows of x, columns col .. col + block_c; zeros for row -1 and beyond the edge."""
    c = col + tl.arange(0, block_c)
    mask = (taken[:, None] >= 0) & (c[None, :] < cols)
    offsets = taken.to(tl.int64)[:, None] * stride_r + c.to(tl.int64)[None, :] * stride_c
    return tl.load(x + offsets, mask=mask, other=0.0)


@triton.jit
def _load_weights(
    w, e, k, n, K, N, stride_we, stride_wk, stride_wn,
    block_k: tl.constexpr, block_n: tl.constexpr, transpose_w: tl.constexpr, tma: tl.constexpr,
):  # fmt: skip
    """w[e, k : k + block_k, n : n + block_n], zeros beyond the edges."""
    if tma:
        if transpose_w:
            tile = w.load([e, n, k]).reshape(block_n, block_k).T
        else:
            tile = w.load([e, k, n]).reshape(block_k, block_n)
    else:
        ks, ns = k + tl.arange(0, block_k), n + tl.arange(0, block_n)
        mask = (ks[:, None] < K) & (ns[None, :] < N)
        offsets = ks.to(tl.int64)[:, None] * stride_wk + ns.to(tl.int64)[None, :] * stride_wn
        tile = tl.load(w + e.to(tl.int64) * stride_we + offsets, mask=mask, other=0.0)
    return tile


@triton.jit
def _store_rows(
    y, tile, row, end, col, cols,
    block_r: tl.constexpr, block_c: tl.constexpr, tma: tl.constexpr,
):  # fmt: skip
    """y[row : end, col : col + block_c] = the first rows of tile, in two halves.

    The store then stages half a tile in shared memory, and one more stage of operands fits.
    """
    half: tl.constexpr = block_c // 2
    halves = tl.split(tl.permute(tl.reshape(tile, (block_r, 2, half)), (0, 2, 1)))
    for i in tl.static_range(2):
        part = halves[i].to(y.dtype if tma else y.dtype.element_ty)  # [block_r, half]
        if tma:
            wrap, stop, at = to_ragged_indices(row, end - row, 0)
            y.store([wrap, stop, at, col + i * half], part.reshape(1, 1, block_r, half))
        else:
            r = row + tl.arange(0, block_r)
            c = col + i * half + tl.arange(0, half)
            mask = (r[:, None] < end) & (c[None, :] < cols)
            tl.store(y + r.to(tl.int64)[:, None] * cols + c[None, :], part, mask=mask)


@triton.jit
def _with_bias(acc, bias_ptr, e, n, N, block_n: tl.constexpr):
    if bias_ptr is not None:
        cols = n + tl.arange(0, block_n)
        bias = tl.load(bias_ptr + e.to(tl.int64) * N + cols, mask=cols < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    return acc


@triton.jit
def _activated(
    h, row_scale_ptr, row, end,
    swiglu: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
):  # fmt: skip
    """row_scale * act(h): [block_m, block_n], or half of the columns when swiglu."""
    if swiglu:
        gate, up = tl.split(tl.reshape(h, (block_m, block_n // 2, 2)))
        h = gate / (1 + tl.exp(-gate)) * up
    if row_scale_ptr is not None:
        r = row + tl.arange(0, block_m)
        h *= tl.load(row_scale_ptr + r, mask=r < end, other=0.0)[:, None]
    return h


@triton.jit
def _zero_dead_rows(
    y, h, live, M, num_n, N,
    num_programs: tl.constexpr,
    swiglu: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, tma: tl.constexpr,
):  # fmt: skip
    """Rows from live on belong to no expert: zeros."""
    pair: tl.constexpr = 2 if swiglu else 1
    for tile in range(tl.program_id(0), tl.cdiv(M - live, block_m) * num_n, num_programs):
        row, n = live + tile // num_n * block_m, tile % num_n * block_n
        zeros = tl.zeros((block_m, block_n // pair), tl.float32)
        _store_rows(y, zeros, row, M, n // pair, N // pair, block_m, block_n // pair, tma)
        if h is not None:
            zeros = tl.zeros((block_m, block_n), tl.float32)
            _store_rows(h, zeros, row, M, n, N, block_m, block_n, tma)


@triton.jit
def _moe_gemm_kernel(
    x,  # [M, K], or [T, K] with rows: a TMA descriptor, or a pointer
    w,  # [E, K, N], or [E, N, K] when transpose_w
    y,  # [M, N], or [M, N / 2] when swiglu
    h,  # [M, N] or None
    plan_ptr, rows_ptr, bias_ptr, row_scale_ptr,
    M, T, N, K, E, tiles_at,
    stride_xr, stride_xc, stride_we, stride_wk, stride_wn,
    transpose_w: tl.constexpr, swiglu: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr,
    num_programs: tl.constexpr, tma: tl.constexpr,
):  # fmt: skip
    x_tma: tl.constexpr = tma and rows_ptr is None
    pair: tl.constexpr = 2 if swiglu else 1
    # Flattened, the two loops are one to the compiler: the operands of the next tile are on their
    # way while this one is stored.
    for tile in tl.range(tl.program_id(0), tl.load(plan_ptr + E + 1), num_programs, flatten=True):
        # --- 1. which tile
        entry = plan_ptr + tiles_at + tile * 4
        e, row, end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
        n = tl.load(entry + 3) * block_n
        taken = row
        if not x_tma:
            taken = _taken_rows(rows_ptr, row, end, T, block_m)

        # --- 2. main loop
        acc = tl.zeros((block_m, block_n), tl.float32)
        for ki in range(tl.cdiv(K, block_k)):
            k = ki * block_k
            if x_tma:  # rows past the expert's last one are not stored
                x_tile = x.load([row, k])
            else:
                x_tile = _load_taken(x, taken, k, K, stride_xr, stride_xc, block_k)
            w_tile = _load_weights(
                w, e, k, n, K, N, stride_we, stride_wk, stride_wn,
                block_k, block_n, transpose_w, tma,
            )  # fmt: skip
            acc = tl.dot(x_tile, w_tile, acc)

        # --- 3. epilogue
        h_tile = _with_bias(acc, bias_ptr, e, n, N, block_n)
        y_tile = _activated(h_tile, row_scale_ptr, row, end, swiglu, block_m, block_n)

        # --- 4. store
        if h is not None:
            _store_rows(h, h_tile, row, end, n, N, block_m, block_n, tma)
        _store_rows(y, y_tile, row, end, n // pair, N // pair, block_m, block_n // pair, tma)
    num_n = tl.cdiv(N, block_n)
    live = tl.load(plan_ptr + E)
    _zero_dead_rows(y, h, live, M, num_n, N, num_programs, swiglu, block_m, block_n, tma)


@triton.jit
def _moe_gemm_decode_kernel(
    x, w, y, h,  # as in _moe_gemm_kernel
    plan_ptr, rows_ptr, bias_ptr, row_scale_ptr,
    M, T, N, K, E, tiles_at,
    stride_xr, stride_xc, stride_we, stride_wk, stride_wn,
    transpose_w: tl.constexpr, swiglu: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr,
    num_programs: tl.constexpr, tma: tl.constexpr,
):  # fmt: skip
    x_tma: tl.constexpr = tma and rows_ptr is None
    pair: tl.constexpr = 2 if swiglu else 1
    for tile in tl.range(tl.program_id(0), tl.load(plan_ptr + E + 1), num_programs, flatten=True):
        # --- 1. which tile
        entry = plan_ptr + tiles_at + tile * 4
        e, row, end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
        n = tl.load(entry + 3) * block_n
        taken = row
        if not x_tma:
            taken = _taken_rows(rows_ptr, row, end, T, block_m)

        # --- 2. main loop
        # Transposed: the columns of w are the side that fills the tensor core.
        acc = tl.zeros((block_n, block_m), tl.float32)
        for ki in range(tl.cdiv(K, block_k)):
            k = ki * block_k
            if x_tma:
                x_tile = x.load([row, k])
            else:
                x_tile = _load_taken(x, taken, k, K, stride_xr, stride_xc, block_k)
            w_tile = _load_weights(
                w, e, k, n, K, N, stride_we, stride_wk, stride_wn,
                block_k, block_n, transpose_w, tma,
            )  # fmt: skip
            acc = tl.dot(w_tile.T, x_tile.T, acc)

        # --- 3. epilogue
        h_tile = _with_bias(acc.T, bias_ptr, e, n, N, block_n)
        y_tile = _activated(h_tile, row_scale_ptr, row, end, swiglu, block_m, block_n)

        # --- 4. store
        if h is not None:
            _store_rows(h, h_tile, row, end, n, N, block_m, block_n, tma)
        _store_rows(y, y_tile, row, end, n // pair, N // pair, block_m, block_n // pair, tma)
    num_n = tl.cdiv(N, block_n)
    live = tl.load(plan_ptr + E)
    _zero_dead_rows(y, h, live, M, num_n, N, num_programs, swiglu, block_m, block_n, tma)


@triton.jit
def _load_group(
    x, rows_ptr, row, end, T, col, cols, stride_r, stride_c,
    block_r: tl.constexpr, block_c: tl.constexpr, tma: tl.constexpr,
):  # fmt: skip
    """x[row : row + block_r, col : col + block_c], zeros from end on and beyond the edge."""
    if tma:
        tile = load_ragged(x, row, end - row, [0, col])
    else:
        taken = _taken_rows(rows_ptr, row, end, T, block_r)
        tile = _load_taken(x, taken, col, cols, stride_r, stride_c, block_c)
    return tile


@triton.jit
def _moe_gemm_dw_kernel(
    a,  # [M, P], or [T, P] with a_rows: a TMA descriptor that ends at any row, or a pointer
    b,  # [M, Q], or [T, Q] with b_rows
    dw,  # [E, P, Q]
    plan_ptr, a_rows_ptr, b_rows_ptr,
    T, P, Q, E,
    stride_ar, stride_ac, stride_br, stride_bc, group_m,
    block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr, block_e: tl.constexpr,
    num_programs: tl.constexpr, tma: tl.constexpr,
):  # fmt: skip
    a_tma: tl.constexpr = tma and a_rows_ptr is None
    b_tma: tl.constexpr = tma and b_rows_ptr is None
    num_m, num_n = tl.cdiv(P, block_m), tl.cdiv(Q, block_n)
    tiles = num_m * num_n  # of each expert
    # All steps of all tiles of this program, in one loop: the operands of the next tile are on
    # their way while this one is stored. An expert without rows takes one step, over zeros.
    pid = tl.program_id(0)
    experts = tl.arange(0, block_e)
    starts = tl.load(plan_ptr + experts, mask=experts < E, other=0)
    ends = tl.load(plan_ptr + experts + 1, mask=experts < E, other=0)
    before = (tl.maximum(experts * tiles - pid, 0) + num_programs - 1) // num_programs
    after = (tl.maximum((experts + 1) * tiles - pid, 0) + num_programs - 1) // num_programs
    mine = tl.maximum(tl.cdiv(ends - starts, block_k), 1) * (after - before)
    total = tl.sum(tl.where(experts < E, mine, 0))

    tile, k, steps = pid - num_programs, -1, 0
    e, start, end, m, n = 0, 0, 0, 0, 0
    acc = tl.zeros((block_m, block_n), tl.float32)
    for _ in tl.range(0, total):
        # --- 1. which tile
        k += 1
        if k == steps:
            k = 0
            tile += num_programs
            e = tile // tiles
            start, end = tl.load(plan_ptr + e), tl.load(plan_ptr + e + 1)
            steps = tl.maximum(tl.cdiv(end - start, block_k), 1)
            width = group_m * num_n
            within = tile % tiles
            first = within // width * group_m
            height = min(num_m - first, group_m)
            m = (first + within % width % height) * block_m
            n = within % width // height * block_n

        # --- 2. main loop
        row = start + k * block_k
        a_tile = _load_group(
            a, a_rows_ptr, row, end, T, m, P, stride_ar, stride_ac, block_k, block_m, a_tma
        )
        b_tile = _load_group(
            b, b_rows_ptr, row, end, T, n, Q, stride_br, stride_bc, block_k, block_n, b_tma
        )
        acc = tl.dot(a_tile.T, b_tile, acc)

        if k == steps - 1:
            # --- 3. epilogue
            half: tl.constexpr = block_n // 2
            halves = tl.split(tl.permute(tl.reshape(acc, (block_m, 2, half)), (0, 2, 1)))
            # --- 4. store
            for i in tl.static_range(2):
                part = halves[i].to(dw.dtype if tma else dw.dtype.element_ty)
                col = n + i * half
                if tma:
                    dw.store([e, m, col], part.reshape(1, block_m, half))
                else:
                    r, c = m + tl.arange(0, block_m), col + tl.arange(0, half)
                    at = (e.to(tl.int64) * P + r[:, None]) * Q + c[None, :]
                    tl.store(dw + at, part, mask=(r[:, None] < P) & (c[None, :] < Q))
            acc = tl.zeros((block_m, block_n), tl.float32)


@triton.jit
def _moe_gemm_epilogue_bwd_kernel(
    h_ptr,  # [M, N]
    dy_ptr,  # [M, N], or [M, N / 2] when swiglu
    row_scale_ptr,  # [M] or None
    dh_ptr,  # [M, N]
    drow_scale_ptr,  # [M] or None
    plan_ptr,
    M, N, E, stride_hr, stride_dyr,
    swiglu: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    r = (tl.program_id(0) * block_m + tl.arange(0, block_m)).to(tl.int64)[:, None]
    live = r < tl.load(plan_ptr + E)
    pair: tl.constexpr = 2 if swiglu else 1
    scale = tl.full((block_m, 1), 1.0, tl.float32)
    if row_scale_ptr is not None:
        scale = tl.load(row_scale_ptr + r, mask=live, other=0.0)
    total = tl.zeros((block_m, 1), tl.float32)

    # --- 2. main loop
    for n in range(0, N // pair, block_n // pair):
        wide = pair * n + tl.arange(0, block_n)[None, :]
        cols = n + tl.arange(0, block_n // pair)[None, :]
        h = tl.load(h_ptr + r * stride_hr + wide, live & (wide < N), 0.0).to(tl.float32)
        dy = tl.load(dy_ptr + r * stride_dyr + cols, live & (cols < N // pair), 0.0)
        dy = dy.to(tl.float32)
        da = dy * scale
        if swiglu:
            gate, up = tl.split(tl.reshape(h, (block_m, block_n // 2, 2)))
            s = 1 / (1 + tl.exp(-gate))
            total += tl.sum(dy * (gate * s * up), 1)[:, None]
            dh = tl.join(da * up * s * (1 + gate * (1 - s)), da * gate * s)
            dh = tl.reshape(dh, (block_m, block_n))
        else:
            total += tl.sum(dy * h, 1)[:, None]
            dh = da
        at = dh_ptr + r * N + wide
        tl.store(at, dh.to(dh_ptr.dtype.element_ty), mask=(r < M) & (wide < N))

    # --- 3. epilogue
    # --- 4. store
    if drow_scale_ptr is not None:
        tl.store(drow_scale_ptr + r, total, mask=r < M)


@triton.jit
def _moe_gemm_dbias_kernel(
    dh_ptr,  # [M, N]
    dbias_ptr,  # [E, N]
    plan_ptr,
    N, stride_dhr,
    block_m: tl.constexpr, block_n: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    e = tl.program_id(0)
    n = tl.program_id(1) * block_n + tl.arange(0, block_n)
    start, end = tl.load(plan_ptr + e), tl.load(plan_ptr + e + 1)

    # --- 2. main loop
    acc = tl.zeros((block_m, block_n), tl.float32)
    for row in range(start, end, block_m):
        r = row + tl.arange(0, block_m)[:, None]
        at = dh_ptr + r.to(tl.int64) * stride_dhr + n[None, :]
        acc += tl.load(at, mask=(r < end) & (n[None, :] < N), other=0.0).to(tl.float32)

    # --- 3. epilogue
    dbias = tl.sum(acc, 0).to(dbias_ptr.dtype.element_ty)

    # --- 4. store
    tl.store(dbias_ptr + e.to(tl.int64) * N + n, dbias, mask=n < N)


@triton.jit
def _moe_gemm_gather_bwd_kernel(
    dxr_ptr,  # [M, K]
    taken_ptr,  # [M]: rows, sorted
    order_ptr,  # [M] int64: where each of them was
    dx_ptr,  # [T, K]
    plan_ptr,
    M, K, E,
    block_n: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    t = tl.program_id(0)
    cols = tl.program_id(1) * block_n + tl.arange(0, block_n)
    live = tl.load(plan_ptr + E)
    at, stop = 0, M  # the first place of t lies between them
    while at < stop:
        middle = (at + stop) // 2
        below = tl.load(taken_ptr + middle) < t
        at = tl.where(below, middle + 1, at)
        stop = tl.where(below, stop, middle)

    # --- 2. main loop
    acc = tl.zeros((block_n,), tl.float32)
    more = tl.load(taken_ptr + at, mask=at < M, other=-1) == t
    while more:
        r = tl.load(order_ptr + at)
        # an index of a dead row counts for nothing
        acc += tl.load(dxr_ptr + r * K + cols, mask=(r < live) & (cols < K), other=0.0)
        at += 1
        more = tl.load(taken_ptr + at, mask=at < M, other=-1) == t

    # --- 3. epilogue
    dx = acc.to(dx_ptr.dtype.element_ty)

    # --- 4. store
    tl.store(dx_ptr + t.to(tl.int64) * K + cols, dx, mask=cols < K)


@triton.jit
def _moe_gemm_check_kernel(
    sizes_ptr,  # [E]
    rows_ptr,  # [M] or None
    found_ptr,  # [3] int64: first expert of negative size, sum of sizes, first row with a bad index
    M, T, E, block_e: tl.constexpr, block_r: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    e = tl.arange(0, block_e)
    sizes = tl.load(sizes_ptr + e, mask=e < E, other=0)
    total = tl.sum(tl.maximum(sizes, 0).to(tl.int64))

    # --- 2. main loop
    bad = M
    if rows_ptr is not None:
        live = tl.minimum(total, M).to(tl.int32)
        for r0 in range(0, live, block_r):
            r = r0 + tl.arange(0, block_r)
            index = tl.load(rows_ptr + r, mask=r < live, other=0)
            bad = tl.minimum(bad, tl.min(tl.where((index < 0) | (index >= T), r, M)))

    # --- 3. epilogue
    negative = tl.min(tl.where(sizes < 0, e, E))

    # --- 4. store
    tl.store(found_ptr, negative)
    tl.store(found_ptr + 1, total)
    tl.store(found_ptr + 2, bad)


def _plan(sizes: Tensor, M: int, block_m: int, num_n: int, group_m: int) -> tuple[Tensor, int]:
    """Where experts start, and every tile in the order of visits; and where the tiles begin."""
    E = len(sizes)
    most = min(E, M)  # experts whose last tile of rows may be a part of one
    tiles_at = _lib.cdiv(E + 2, 4) * 4
    tiles = ((M - most) // block_m + most) * num_n
    plan = torch.empty(tiles_at + 4 * tiles, device=sizes.device, dtype=torch.int32)
    block_e = max(16, _lib.power_of_2(E))
    _moe_gemm_plan_kernel[(E,)](
        sizes.contiguous(), plan, M, E, num_n, min(group_m, _lib.cdiv(M, block_m)), tiles_at,
        block_m, block_e, 256, num_warps=4,
    )  # fmt: skip
    return plan, tiles_at


def _weights_ready(w: Tensor) -> bool:
    """Whether TMA can address w [E, rows, columns]."""
    return _lib.tma_ready(w[0]) and w.stride(0) * w.element_size() % 16 == 0 and w.stride(0) > 0


def _fitting(tiles: Config, staged: int) -> Config:
    """The Config with as many stages as fit beside `staged` bytes that wait to be stored."""
    step = 2 * tiles.block_k * (tiles.block_m + tiles.block_n)
    return replace(tiles, stages=min(tiles.stages, (SHARED_BYTES - staged) // step))


def _columns(N: int, swiglu: bool) -> int:
    return N // 2 if swiglu else N


def _fake_forward(
    x, w, sizes, out_dtype, transpose_w, rows, bias, row_scale, swiglu, keep_h, config
):
    M, N = len(x) if rows is None else len(rows), w.shape[1 if transpose_w else 2]
    y = x.new_empty((M, _columns(N, swiglu)), dtype=out_dtype)
    return [y, x.new_empty((M, N))] if keep_h else [y]


@_lib.opaque("grouped_gemm", _fake_forward)
def _forward(
    x: Tensor,
    w: Tensor,
    sizes: Tensor,
    out_dtype: torch.dtype,
    transpose_w: bool,
    rows: Tensor | None,
    bias: Tensor | None,
    row_scale: Tensor | None,
    swiglu: bool,
    keep_h: bool,
    config: list[int] | None,
) -> list[Tensor]:
    """[y], and h when it is kept; any strides: weights are read as they lie in memory."""
    (T, K), E = x.shape, len(w)
    M, N = T if rows is None else len(rows), w.shape[1 if transpose_w else 2]
    y = x.new_empty((M, _columns(N, swiglu)), dtype=out_dtype)
    h = x.new_empty((M, N)) if keep_h else None
    outputs = [y] if h is None else [y, h]
    if 0 in (T, M, N, K, E):
        return [out.zero_() for out in outputs]
    stored = w if w.stride(2) == 1 or w.stride(1) != 1 else w.transpose(1, 2)
    transposed = transpose_w != (stored is not w)
    rows, bias, row_scale = (None if t is None else t.contiguous() for t in (rows, bias, row_scale))
    with _lib.on_device(x):
        _lib.check_gpu()
        tma = _lib.has_tma() and _weights_ready(stored)
        tma = tma and all(map(_lib.tma_ready, outputs))
        tma = tma and (rows is not None or _lib.tma_ready(x))
        if config:
            tiles = Config(*config)
        else:
            tiles = default_config(M, N, K, E, x.dtype)
            if not tma:
                tiles = POINTER_DECODE_CONFIG if tiles.decode else POINTER_CONFIG
            else:
                staged = _columns(tiles.block_n, swiglu) * y.itemsize
                staged += tiles.block_n * h.itemsize if h is not None else 0
                tiles = _fitting(tiles, tiles.block_m * staged // 2)
        block_m, block_n, block_k = tiles.block_m, tiles.block_n, tiles.block_k
        num_n = _lib.cdiv(N, block_n)
        plan, tiles_at = _plan(sizes, M, block_m, num_n, tiles.group_m)

        def output(t: Tensor | None, columns: int) -> TensorDescriptor | Tensor | None:
            return create_ragged_descriptor(t, [block_m, columns]) if tma and t is not None else t

        x_in, w_in = x, stored
        if tma:
            block = (block_n, block_k) if transposed else (block_k, block_n)
            w_in = TensorDescriptor.from_tensor(stored, [1, *block])
            if rows is None:
                x_in = TensorDescriptor.from_tensor(x, [block_m, block_k])
        stride_wk, stride_wn = stored.stride()[1:][:: -1 if transposed else 1]
        kernel = _moe_gemm_decode_kernel if tiles.decode else _moe_gemm_kernel
        programs = tiles.programs * _lib.num_sms()
        kernel[(programs,)](
            x_in, w_in, output(y, _columns(block_n, swiglu) // 2), output(h, block_n // 2),
            plan, rows, bias, row_scale,
            M, T, N, K, E, tiles_at, *x.stride(), stored.stride(0), stride_wk, stride_wn,
            transposed, swiglu, block_m, block_n, block_k, programs, tma,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return outputs


def _fake_weights(a, b, sizes, a_rows, b_rows, out_dtype, config):
    return a.new_empty((len(sizes), a.shape[1], b.shape[1]), dtype=out_dtype)


@_lib.opaque("grouped_gemm_dw", _fake_weights)
def _weights(
    a: Tensor,
    b: Tensor,
    sizes: Tensor,
    a_rows: Tensor | None,
    b_rows: Tensor | None,
    out_dtype: torch.dtype,
    config: list[int] | None,
) -> Tensor:
    """a[rows of e]^T @ b[rows of e] for every expert e: [E, P, Q]."""
    (A, P), (B, Q), E = a.shape, b.shape, len(sizes)
    M, T = (B, A) if b_rows is None else (A, B)
    dw = a.new_empty((E, P, Q), dtype=out_dtype)
    if 0 in (M, T, P, Q, E):
        return dw.zero_()
    with _lib.on_device(a):
        _lib.check_gpu()
        tma = _lib.has_tma() and _weights_ready(dw)
        tma = tma and (a_rows is not None or _lib.tma_ready(a))
        tma = tma and (b_rows is not None or _lib.tma_ready(b))
        if config:
            tiles = Config(*config)
        else:
            tiles = POINTER_CONFIG
            if tma:
                tiles = default_config(M, Q, P, E, a.dtype, dw=True)
                tiles = _fitting(tiles, tiles.block_m * tiles.block_n * dw.itemsize // 2)
        block_m, block_n, block_k = tiles.block_m, tiles.block_n, tiles.block_k
        plan, _ = _plan(sizes, M, block_m, 0, 1)

        def operand(t: Tensor, rows: Tensor | None, columns: int) -> TensorDescriptor | Tensor:
            ready = tma and rows is None
            return create_ragged_descriptor(t, [block_k, columns]) if ready else t

        programs = tiles.programs * _lib.num_sms()
        # An index is loaded before its row can be: Triton divides its stages between the two.
        gathers = a_rows is not None or b_rows is not None
        stages = 2 * tiles.stages - 1 if gathers else tiles.stages
        _moe_gemm_dw_kernel[(programs,)](
            operand(a, a_rows, block_m), operand(b, b_rows, block_n),
            TensorDescriptor.from_tensor(dw, [1, block_m, block_n // 2]) if tma else dw,
            plan, a_rows, b_rows, T, P, Q, E, *a.stride(), *b.stride(),
            min(tiles.group_m, _lib.cdiv(P, block_m)),
            block_m, block_n, block_k, max(16, _lib.power_of_2(E)), programs, tma,
            num_warps=tiles.warps, num_stages=stages,
        )  # fmt: skip
    return dw


def _fake_epilogue_bwd(h, dy, sizes, row_scale, swiglu):
    dh = h.new_empty(h.shape)
    return [dh] if row_scale is None else [dh, h.new_empty(len(h), dtype=torch.float32)]


@_lib.opaque("grouped_gemm_epilogue_bwd", _fake_epilogue_bwd)
def _epilogue_bwd(
    h: Tensor, dy: Tensor, sizes: Tensor, row_scale: Tensor | None, swiglu: bool
) -> list[Tensor]:
    """[dh], and drow_scale with row_scale."""
    M, N = h.shape
    dh = h.new_empty(M, N)
    drow_scale = None if row_scale is None else h.new_empty(M, dtype=torch.float32)
    if 0 not in (M, N, len(sizes)):
        h, dy = _lib.rows_adjacent(h), _lib.rows_adjacent(dy)
        with _lib.on_device(h):
            _lib.check_gpu()
            plan, _ = _plan(sizes, M, 128, 0, 1)
            # Four rows of 1024 columns: 32 elements for each thread.
            block_n = max(32, min(1024, _lib.power_of_2(N)))
            _moe_gemm_epilogue_bwd_kernel[(_lib.cdiv(M, 4),)](
                h, dy, None if row_scale is None else row_scale.contiguous(), dh, drow_scale,
                plan, M, N, len(sizes), h.stride(0), dy.stride(0), swiglu, 4, block_n, num_warps=4,
            )  # fmt: skip
    elif drow_scale is not None:
        drow_scale.zero_()
    return [dh] if drow_scale is None else [dh, drow_scale]


def _fake_dbias(dh, sizes):
    return dh.new_empty((len(sizes), dh.shape[1]))


@_lib.opaque("grouped_gemm_dbias", _fake_dbias)
def _dbias(dh: Tensor, sizes: Tensor) -> Tensor:
    """Sums of dh over the rows of every expert: [E, N]."""
    (M, N), E = dh.shape, len(sizes)
    dbias = dh.new_empty(E, N)
    if 0 in (M, N, E):
        return dbias.zero_()
    dh = _lib.rows_adjacent(dh)
    with _lib.on_device(dh):
        _lib.check_gpu()
        plan, _ = _plan(sizes, M, 128, 0, 1)
        _moe_gemm_dbias_kernel[(E, _lib.cdiv(N, 64))](
            dh, dbias, plan, N, dh.stride(0), 64, 64, num_warps=4
        )
    return dbias


def _fake_gather_bwd(dxr, sizes, rows, T):
    return dxr.new_empty((T, dxr.shape[1]))


@_lib.opaque("grouped_gemm_gather_bwd", _fake_gather_bwd)
def _gather_bwd(dxr: Tensor, sizes: Tensor, rows: Tensor, T: int) -> Tensor:
    """dx[t] = sum of dxr[r] over the live r with rows[r] = t, in that order: [T, K]."""
    M, K = dxr.shape
    dx = dxr.new_empty(T, K)
    if 0 in (M, K, T, len(sizes)):
        return dx.zero_()
    with _lib.on_device(dxr):
        _lib.check_gpu()
        plan, _ = _plan(sizes, M, 128, 0, 1)
        taken, order = torch.sort(rows, stable=True)
        block_n = max(16, min(1024, _lib.power_of_2(K)))
        _moe_gemm_gather_bwd_kernel[(T, _lib.cdiv(K, block_n))](
            dxr, taken, order, dx, plan, M, K, len(sizes), block_n, num_warps=4
        )
    return dx


def grouped_gemm_check(
    sizes: Tensor, rows: Tensor | None = None, *, M: int, T: int | None = None
) -> None:
    """Raises ValueError if sizes [E] or rows [M] hold what cannot be; it waits for the device.

    M: rows of y. T: rows of x, where rows index into it.
    """
    _lib.check_tensor("sizes", sizes, ("E",), (torch.int32,))
    _lib.check_static("M", M, (int,))
    if rows is not None:
        _lib.check_tensor("rows", rows, (M,), (torch.int32,))
        _lib.check_static("T", T, (int,))
    _lib.check_same_device(sizes=sizes, rows=rows)
    E = len(sizes)
    if E == 0:
        return
    found = torch.empty(3, device=sizes.device, dtype=torch.int64)
    with _lib.on_device(sizes):
        _lib.check_gpu()
        block_e = max(16, _lib.power_of_2(E))
        _moe_gemm_check_kernel[(1,)](
            sizes.contiguous(), None if rows is None else rows.contiguous(), found, M, T or 0, E,
            block_e, 1024, num_warps=4,
        )  # fmt: skip
    negative, total, bad = found.tolist()
    if negative < E:
        got = int(sizes[negative])
        raise ValueError(f"sizes: expected >= 0, got {got} for expert {negative}")
    if total > M:
        raise ValueError(f"sizes: sum to {total}, {total - M} more than the M = {M} rows")
    if rows is not None and bad < M:
        raise ValueError(f"rows: expected indices below T = {T}, got {int(rows[bad])} at row {bad}")


def grouped_gemm_fwd(
    x: Tensor,
    w: Tensor,
    sizes: Tensor,
    *,
    out_dtype: torch.dtype | str | None = None,
    transpose_w: bool = False,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    row_scale: Tensor | None = None,
    activation: str | None = None,
    config: Config | None = None,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """grouped_gemm and what its backward needs. No gradient flows through this.

    Returns (y, (x, w, sizes, rows, bias, row_scale, h)), None for what was not given. h [M, N] in
    x's dtype, before activation and scale, if there is one of them; else None.
    """
    out_dtype = _check(
        x, w, sizes, out_dtype, transpose_w, rows, bias, row_scale, activation, config
    )
    keep_h = activation is not None or row_scale is not None
    y, *h = _forward(
        x, w, sizes, out_dtype, transpose_w, rows, bias, row_scale, activation is not None, keep_h,
        _lib.fields(config),
    )  # fmt: skip
    return y, (x, w, sizes, rows, bias, row_scale, *(h or [None]))


def grouped_gemm_bwd(
    res: tuple[Tensor | None, ...],
    dy: Tensor,
    *,
    transpose_w: bool = False,
    activation: str | None = None,
    config: Config | None = None,
) -> tuple[Tensor, ...]:
    """Gradients (dx, dw), then dbias with a bias and drow_scale [M] float32 with a row_scale.

    res: as grouped_gemm_fwd returns it. dy: the cotangent of y; float32 is rounded to x's dtype.
    With rows, dx [T, K] sums over the rows of y that took each row of x, in ascending order.
    config: tiles of dx and of dw, not one for decode.
    """
    x, w, sizes, rows, bias, row_scale, h = res
    _check(x, w, sizes, None, transpose_w, rows, bias, row_scale, activation, config)
    if config is not None and config.decode:
        raise ValueError("config: expected decode=False for a backward, got True")
    M, N = len(x) if rows is None else len(rows), w.shape[1 if transpose_w else 2]
    dy_shape = (M, _columns(N, activation is not None))
    _lib.check_tensor("dy", dy, dy_shape, (*DTYPES, torch.float32))
    if activation is not None or row_scale is not None:
        _lib.check_tensor("h", h, (M, N), (x.dtype,))
    _lib.check_same_device(x=x, dy=dy, h=h)
    wanted = (True, True, bias is not None, row_scale is not None)
    found = _gradients(res, dy, transpose_w, activation is not None, wanted, _lib.fields(config))
    return tuple(g for g, want in zip(found, wanted, strict=True) if want)


def _gradients(
    res: tuple[Tensor | None, ...],
    dy: Tensor,
    transpose_w: bool,
    swiglu: bool,
    wanted: tuple[bool, bool, bool, bool],
    config: list[int] | None,
) -> tuple[Tensor | None, ...]:
    """(dx, dw, dbias, drow_scale), None for what is not wanted."""
    x, w, sizes, rows, _, row_scale, h = res
    want_dx, want_dw, want_dbias, _ = wanted
    dh, dx, dw, dbias, drow_scale = dy.to(x.dtype), None, None, None, None
    if swiglu or row_scale is not None:
        dh, *scales = _epilogue_bwd(h, dh, sizes, row_scale, swiglu)
        drow_scale = scales[0] if scales else None
    if want_dx:
        (dx,) = _forward(
            dh, w, sizes, x.dtype, not transpose_w, None, None, None, False, False, config
        )
        if rows is not None:
            dx = _gather_bwd(dx, sizes, rows, len(x))
    if want_dw and transpose_w:
        dw = _weights(dh, x, sizes, None, rows, w.dtype, config)
    elif want_dw:
        dw = _weights(x, dh, sizes, rows, None, w.dtype, config)
    if want_dbias:
        dbias = _dbias(dh, sizes)
    return dx, dw, dbias, drow_scale


def grouped_gemm_dw(
    x: Tensor,
    dy: Tensor,
    sizes: Tensor,
    *,
    out_dtype: torch.dtype | str = "float32",
    config: Config | None = None,
) -> Tensor:
    """dw [E, K, N] = x[rows of e]^T @ dy[rows of e] for every expert e; zeros without rows.

    x [M, K], dy [M, N]: bfloat16 or float16; a float32 dy is rounded to x's dtype. sizes [E] int32.
    out_dtype: float32 or x's dtype. Not differentiable. Raises as grouped_gemm does.
    """
    _check_operand("x", x, ("M", "K"), DTYPES)
    _lib.check_tensor("dy", dy, (len(x), "N"), (x.dtype, torch.float32))
    _lib.check_tensor("sizes", sizes, ("E",), (torch.int32,))
    _lib.check_same_device(x=x, dy=dy, sizes=sizes)
    _lib.check_config(config, Config)
    if config is not None and config.decode:
        raise ValueError("config: expected decode=False for dw, got True")
    out_dtype = _check_out_dtype(out_dtype, x.dtype)
    return _weights(x, dy.to(x.dtype), sizes, None, None, out_dtype, _lib.fields(config))


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, w, sizes, out_dtype, transpose_w, rows, bias, row_scale, activation, config
    ):
        out_dtype = _check(
            x, w, sizes, out_dtype, transpose_w, rows, bias, row_scale, activation, config
        )
        swiglu = activation is not None
        keep_h = any(ctx.needs_input_grad) and (swiglu or row_scale is not None)
        y, *h = _forward(
            x, w, sizes, out_dtype, transpose_w, rows, bias, row_scale, swiglu, keep_h,
            _lib.fields(config),
        )  # fmt: skip
        ctx.save_for_backward(x, w, sizes, rows, bias, row_scale, *(h or [None]))
        ctx.options = transpose_w, swiglu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        need_x, need_w, _, _, _, _, need_bias, need_scale, *_ = ctx.needs_input_grad
        wanted = need_x, need_w, need_bias, need_scale
        dx, dw, dbias, drow_scale = _gradients(ctx.saved_tensors, dy, *ctx.options, wanted, None)
        drow_scale = drow_scale if need_scale else None
        return dx, dw, None, None, None, None, dbias, drow_scale, None, None


def grouped_gemm(
    x: Tensor,
    w: Tensor,
    sizes: Tensor,
    *,
    out_dtype: torch.dtype | str | None = None,
    transpose_w: bool = False,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    row_scale: Tensor | None = None,
    activation: str | None = None,
    config: Config | None = None,
) -> Tensor:
    """y [M, N]: the rows of expert e times w[e], accumulated in float32. Differentiable once.

    x [M, K]: bfloat16 or float16, sorted by expert. w [E, K, N] of that dtype, or [E, N, K] with
    transpose_w; a transposed view costs no copy. sizes [E] int32, on the device: rows of each
    expert; rows of y past their sum are 0. No value of sizes is read by the host.
    rows [M] int32: y's row r takes x[rows[r]], of x [T, K]. bias [E, N] of x's dtype. row_scale [M]
    float32 multiplies last. activation "swiglu": y [M, N / 2] = silu(h[:, 0::2]) * h[:, 1::2].
    out_dtype: x's dtype (default) or float32; a torch.dtype or its name.
    config: tiles of this call; gradients take their own default.

    Sizes below 0 count as 0, rows beyond M are cut off, and an index outside x reads a row of
    zeros: grouped_gemm_check says whether there are any.

    Raises TypeError for dtypes and ValueError for shapes and devices that do not fit, naming the
    argument; NotImplementedError on a GPU older than Ampere.
    """
    return _GroupedGemm.apply(
        x, w, sizes, out_dtype, transpose_w, rows, bias, row_scale, activation, config
    )


def _check(
    x: Tensor,
    w: Tensor,
    sizes: Tensor,
    out_dtype: torch.dtype | str | None,
    transpose_w: bool,
    rows: Tensor | None,
    bias: Tensor | None,
    row_scale: Tensor | None,
    activation: str | None,
    config: Config | None,
) -> torch.dtype:
    _lib.check_static("transpose_w", transpose_w, (bool,))
    _check_operand("x", x, ("M" if rows is None else "T", "K"), DTYPES)
    K = x.shape[1]
    _check_operand("w", w, ("E", "N", K) if transpose_w else ("E", K, "N"), (x.dtype,))
    E, N = len(w), w.shape[1 if transpose_w else 2]
    _lib.check_tensor("sizes", sizes, (E,), (torch.int32,))
    if rows is not None:
        _lib.check_tensor("rows", rows, ("M",), (torch.int32,))
    M = len(x) if rows is None else len(rows)
    if bias is not None:
        _lib.check_tensor("bias", bias, (E, N), (x.dtype,))
    if row_scale is not None:
        _lib.check_tensor("row_scale", row_scale, (M,), (torch.float32,))
    if activation not in (None, "swiglu"):
        raise ValueError(f"activation: expected None or 'swiglu', got {activation!r}")
    if activation == "swiglu" and N % 2:
        raise ValueError(f"w: expected an even N for swiglu, which takes pairs, got {N}")
    _lib.check_same_device(x=x, w=w, sizes=sizes, rows=rows, bias=bias, row_scale=row_scale)
    _lib.check_config(config, Config)
    return _check_out_dtype(out_dtype, x.dtype)


def _check_operand(
    name: str, x: Tensor, shape: tuple[int | str, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    if isinstance(x, Tensor) and x.dtype is torch.float32:
        raise TypeError(
            f"{name}: expected dtype bfloat16 or float16, got float32: tensor cores would "
            "round its mantissa to 10 bits (TF32) without a word"
        )
    _lib.check_tensor(name, x, shape, dtypes)


def _check_out_dtype(out_dtype: torch.dtype | str | None, dtype: torch.dtype) -> torch.dtype:
    if isinstance(out_dtype, str):
        out_dtype = getattr(torch, out_dtype, out_dtype)
    if out_dtype not in (None, dtype, torch.float32):
        want = str(dtype).removeprefix("torch.")
        raise TypeError(f"out_dtype: expected {want} or float32, got {out_dtype}")
    return out_dtype or dtype
