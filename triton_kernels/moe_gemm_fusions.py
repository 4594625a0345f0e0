"""What the grouped product does beside multiplying, and the gradients of that.

    x[rows[r]] for x[r]              taken_rows, load_taken
    h = acc + bias[e]                with_bias
    y = row_scale * act(h)           activated
    dh, drow_scale from h, dy        epilogue_bwd
    dbias[e] = sum of dh[rows of e]  dbias: tiles of rows first, then the tiles of an expert
    dx[t] = sum of dx of the rows that took row t of x              gather_bwd: they are sorted
    which size or index cannot be                                   wrong_ones

`starts` and `tiles` are the plan of moe_gemm_plan.py. Nothing here multiplies matrices, and all
of it waits for memory; every sum has one order, whatever the routing.

Twin: pallas_kernels/moe_gemm_fusions.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _lib


@triton.jit
def taken_rows(rows_ptr, row, end, T, block_r: tl.constexpr):
    """Which rows of x belong to rows row .. end of y; -1 past the end and for an index beyond T."""
    r = row + tl.arange(0, block_r)
    if rows_ptr is None:
        taken = tl.where(r < end, r, -1)
    else:
        taken = tl.load(rows_ptr + r, mask=r < end, other=-1)
        taken = tl.where((taken >= 0) & (taken < T), taken, -1)
    return taken


@triton.jit
def load_taken(
    x, taken, col, cols, stride_r, stride_c,
    block_c: tl.constexpr,
):  # fmt: skip
    """Those rows of x, columns col .. col + block_c; zeros for row -1 and beyond the edge."""
    c = col + tl.arange(0, block_c)
    mask = (taken[:, None] >= 0) & (c[None, :] < cols)
    offsets = taken.to(tl.int64)[:, None] * stride_r + c.to(tl.int64)[None, :] * stride_c
    return tl.load(x + offsets, mask=mask, other=0.0)


@triton.jit
def with_bias(acc, bias_ptr, e, n, N, block_n: tl.constexpr):
    if bias_ptr is not None:
        cols = n + tl.arange(0, block_n)
        bias = tl.load(bias_ptr + e.to(tl.int64) * N + cols, mask=cols < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    return acc


@triton.jit
def activated(
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
def _moe_gemm_epilogue_bwd_kernel(
    h_ptr,  # [M, N]
    dy_ptr,  # [M, N], or [M, N / 2] when swiglu
    row_scale_ptr,  # [M] or None
    dh_ptr,  # [M, N]
    drow_scale_ptr,  # [M] or None
    starts_ptr,
    M, N, E, stride_hr, stride_dyr,
    swiglu: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    r = (tl.program_id(0) * block_m + tl.arange(0, block_m)).to(tl.int64)[:, None]
    live = r < tl.load(starts_ptr + E)
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
    x_ptr,  # [rows, N]
    sums_ptr,  # [count, N]: sums of x's rows bounds[i] .. bounds[i + 1] - 1, i a multiple of stride
    bounds_ptr, count_ptr,
    N, stride, stride_xr,
    block_m: tl.constexpr, block_n: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    num_n = tl.cdiv(N, block_n)
    s = tl.program_id(0) // num_n
    if count_ptr is not None:
        if s >= tl.load(count_ptr):
            return
    n = tl.program_id(0) % num_n * block_n + tl.arange(0, block_n)
    first, stop = tl.load(bounds_ptr + s * stride), tl.load(bounds_ptr + s * stride + 1)

    # --- 2. main loop
    acc = tl.zeros((block_m, block_n), tl.float32)
    for row in range(first, stop, block_m):
        r = row + tl.arange(0, block_m)[:, None]
        at = x_ptr + r.to(tl.int64) * stride_xr + n[None, :]
        acc += tl.load(at, mask=(r < stop) & (n[None, :] < N), other=0.0).to(tl.float32)

    # --- 3. epilogue
    sums = tl.sum(acc, 0).to(sums_ptr.dtype.element_ty)

    # --- 4. store
    tl.store(sums_ptr + s.to(tl.int64) * N + n, sums, mask=n < N)


@triton.jit
def _moe_gemm_gather_bwd_kernel(
    dxr_ptr,  # [M, K]
    taken_ptr,  # [M]: rows, sorted
    order_ptr,  # [M] int64: where each of them was
    dx_ptr,  # [T, K]
    starts_ptr,
    M, K, E,
    block_n: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    t = tl.program_id(0)
    cols = tl.program_id(1) * block_n + tl.arange(0, block_n)
    live = tl.load(starts_ptr + E)
    at, stop = 0, M  # the first place of t lies between them
    while at < stop:
        middle = (at + stop) // 2
        below = tl.load(taken_ptr + middle) < t
        at = tl.where(below, middle + 1, at)
        stop = tl.where(below, stop, middle)

    # --- 2. main loop
    # One after the other: a row of x has k of them in a mixture, and many programs run at once.
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


def _fake_epilogue_bwd(h, dy, starts, row_scale, swiglu):
    dh = h.new_empty(h.shape)
    return [dh] if row_scale is None else [dh, h.new_empty(len(h), dtype=torch.float32)]


@_lib.opaque("grouped_gemm_epilogue_bwd", _fake_epilogue_bwd)
def epilogue_bwd(
    h: Tensor, dy: Tensor, starts: Tensor, row_scale: Tensor | None, swiglu: bool
) -> list[Tensor]:
    """[dh], and drow_scale with row_scale."""
    M, N = h.shape
    dh = h.new_empty(M, N)
    drow_scale = None if row_scale is None else h.new_empty(M, dtype=torch.float32)
    outputs = [dh] if drow_scale is None else [dh, drow_scale]
    if 0 in (M, N, starts.shape[1] - 1):
        return [out.zero_() for out in outputs]
    h, dy = _lib.rows_adjacent(h), _lib.rows_adjacent(dy)
    with _lib.on_device(h):
        _lib.check_gpu()
        # Four rows of 1024 columns: 32 elements for each thread.
        block_n = max(32, min(1024, _lib.power_of_2(N)))
        _moe_gemm_epilogue_bwd_kernel[(_lib.cdiv(M, 4),)](
            h, dy, None if row_scale is None else row_scale.contiguous(), dh, drow_scale, starts,
            M, N, starts.shape[1] - 1, h.stride(0), dy.stride(0), swiglu, 4, block_n, num_warps=4,
        )  # fmt: skip
    return outputs


def _fake_dbias(dh, starts, tiles):
    return dh.new_empty((starts.shape[1] - 1, dh.shape[1]))


@_lib.opaque("grouped_gemm_dbias", _fake_dbias)
def dbias(dh: Tensor, starts: Tensor, tiles: Tensor) -> Tensor:
    """Sums of dh over the rows of every expert: [E, N]. tiles: of rows, one beside the other."""
    (M, N), E = dh.shape, starts.shape[1] - 1
    sums = dh.new_empty((E, N))
    if 0 in (M, N, E):
        return sums.zero_()
    dh, parts = _lib.rows_adjacent(dh), dh.new_empty((len(tiles), N), dtype=torch.float32)
    num_n = _lib.cdiv(N, 64)
    with _lib.on_device(dh):
        _lib.check_gpu()
        # Each tile of rows, and then the tiles of each expert: an expert that has all rows keeps
        # as many programs busy as many experts do.
        bounds, count = tiles.view(-1)[1:], starts[1, E:]
        _moe_gemm_dbias_kernel[(len(tiles) * num_n,)](
            dh, parts, bounds, count, N, 4, dh.stride(0), 64, 64, num_warps=4
        )
        _moe_gemm_dbias_kernel[(E * num_n,)](
            parts, sums, starts[1], None, N, 1, N, 64, 64, num_warps=4
        )
    return sums


def _fake_gather_bwd(dxr, starts, rows, T):
    return dxr.new_empty((T, dxr.shape[1]))


@_lib.opaque("grouped_gemm_gather_bwd", _fake_gather_bwd)
def gather_bwd(dxr: Tensor, starts: Tensor, rows: Tensor, T: int) -> Tensor:
    """dx[t] = sum of dxr[r] over the live r with rows[r] = t, in that order: [T, K]."""
    (M, K), E = dxr.shape, starts.shape[1] - 1
    dx = dxr.new_empty((T, K))
    if 0 in (M, K, T, E):
        return dx.zero_()
    with _lib.on_device(dxr):
        _lib.check_gpu()
        taken, order = torch.sort(rows, stable=True)
        block_n = max(16, min(1024, _lib.power_of_2(K)))
        _moe_gemm_gather_bwd_kernel[(T, _lib.cdiv(K, block_n))](
            dxr, taken, order, dx, starts, M, K, E, block_n, num_warps=4
        )
    return dx


def wrong_ones(sizes: Tensor, rows: Tensor | None, M: int, T: int) -> Tensor:
    """[first expert of negative size or E, sum of sizes, first live row whose index T does not have
    or M], int64."""
    found = torch.empty(3, device=sizes.device, dtype=torch.int64)
    with _lib.on_device(sizes):
        _lib.check_gpu()
        rows = None if rows is None else rows.contiguous()
        block_e = max(16, _lib.power_of_2(len(sizes)))
        _moe_gemm_check_kernel[(1,)](
            sizes.contiguous(), rows, found, M, T, len(sizes), block_e, 4096, num_warps=8
        )
    return found
