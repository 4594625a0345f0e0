"""Grouped matrix product: each expert of a mixture multiplies its own rows by its own weights.

    h[r] = x[r] @ w[e] + bias[e]     for the rows r of expert e; x[rows[r]] for x[r] with rows
    y[r] = row_scale[r] * act(h[r])  in float32 from the accumulator, rounded once; 0 past the last

    the plan: every tile's expert, first row, last row and columns, from sizes, on the device
    for each tile of this program:
        for each k: acc += x_tile @ w_tile       the compiler keeps `stages` tiles in flight
        bias, activation, row_scale; store the rows of this expert in two halves

Backward: dx is the same kernel with w read the other way round; dw sums over the rows of an expert
(moe_gemm_dw.py). The plan: moe_gemm_plan.py. What is fused, and its gradients:
moe_gemm_fusions.py.

A tile may reach into the rows of the next expert. Those are computed and not stored.

Limits: from Ampere up; bfloat16 and float16 operands. TMA wants Hopper or newer and rows that start
at multiples of 16 bytes; anything else goes through pointers, with no copy.

Twin: pallas_kernels/moe_gemm.py.

Sources: the order of tiles within an expert follows the Triton tutorial 03 and PyTorch's posts on a
cache-aware grouped GEMM; the flattened loops follow tutorial 09; descriptors that end at any row
are Triton's own (triton.tools.ragged_tma); sizes that stay on the device are those of
jax.lax.ragged_dot.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.ragged_tma import create_ragged_descriptor, to_ragged_indices
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _lib, moe_gemm_dw
from .moe_gemm_fusions import (
    activated,
    dbias,
    epilogue_bwd,
    gather_bwd,
    load_taken,
    taken_rows,
    with_bias,
    wrong_ones,
)
from .moe_gemm_plan import tile_plan

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
    starts_ptr, tiles_ptr, rows_ptr, bias_ptr, row_scale_ptr,
    M, T, N, K, E,
    stride_xr, stride_xc, stride_we, stride_wk, stride_wn,
    transpose_w: tl.constexpr, swiglu: tl.constexpr, decode: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr,
    num_programs: tl.constexpr, tma: tl.constexpr,
):  # fmt: skip
    x_tma: tl.constexpr = tma and rows_ptr is None
    pair: tl.constexpr = 2 if swiglu else 1
    num_tiles = tl.load(starts_ptr + 2 * E + 1)
    # Flattened, the two loops are one to the compiler: the operands of the next tile are on their
    # way while this one is stored.
    for tile in tl.range(tl.program_id(0), num_tiles, num_programs, flatten=True):
        # --- 1. which tile
        entry = tiles_ptr + tile * 4
        e, row, end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
        n = tl.load(entry + 3) * block_n
        taken = row
        if not x_tma:
            taken = taken_rows(rows_ptr, row, end, T, block_m)

        # --- 2. main loop
        acc = tl.zeros((block_n, block_m) if decode else (block_m, block_n), tl.float32)
        for ki in range(tl.cdiv(K, block_k)):
            k = ki * block_k
            if x_tma:  # rows past the expert's last one are not stored
                x_tile = x.load([row, k])
            else:
                x_tile = load_taken(x, taken, k, K, stride_xr, stride_xc, block_k)
            w_tile = _load_weights(
                w, e, k, n, K, N, stride_we, stride_wk, stride_wn,
                block_k, block_n, transpose_w, tma,
            )  # fmt: skip
            if decode:  # the columns of w are the side that fills the tensor core
                acc = tl.dot(w_tile.T, x_tile.T, acc)
            else:
                acc = tl.dot(x_tile, w_tile, acc)

        # --- 3. epilogue
        h_tile = with_bias(acc.T if decode else acc, bias_ptr, e, n, N, block_n)
        y_tile = activated(h_tile, row_scale_ptr, row, end, swiglu, block_m, block_n)

        # --- 4. store
        if h is not None:
            _store_rows(h, h_tile, row, end, n, N, block_m, block_n, tma)
        _store_rows(y, y_tile, row, end, n // pair, N // pair, block_m, block_n // pair, tma)
    num_n = tl.cdiv(N, block_n)
    live = tl.load(starts_ptr + E)
    _zero_dead_rows(y, h, live, M, num_n, N, num_programs, swiglu, block_m, block_n, tma)


def _weights_ready(w: Tensor) -> bool:
    """Whether TMA can address w [E, rows, columns]."""
    return _lib.tma_ready(w[0]) and w.stride(0) * w.element_size() % 16 == 0 and w.stride(0) > 0


def _rows_ready(x: Tensor, rows: Tensor | None) -> bool:
    """Whether TMA can address x, or 16 bytes of a row that is gathered are one load."""
    if rows is None:
        return _lib.tma_ready(x)
    # Triton knows of a size only whether it is a multiple of 16.
    return x.data_ptr() % 16 == 0 and x.stride(1) == 1 and x.stride(0) % 16 == x.shape[1] % 16 == 0


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
        tma = tma and _rows_ready(x, rows)
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
        plan = tile_plan(sizes, M, block_m, num_n, tiles.group_m)

        def output(t: Tensor | None, columns: int) -> TensorDescriptor | Tensor | None:
            return create_ragged_descriptor(t, [block_m, columns]) if tma and t is not None else t

        x_in, w_in = x, stored
        if tma:
            block = (block_n, block_k) if transposed else (block_k, block_n)
            w_in = TensorDescriptor.from_tensor(stored, [1, *block])
            if rows is None:
                x_in = TensorDescriptor.from_tensor(x, [block_m, block_k])
        stride_wk, stride_wn = stored.stride()[1:][:: -1 if transposed else 1]
        programs = tiles.programs * _lib.num_sms()
        _moe_gemm_kernel[(programs,)](
            x_in, w_in, output(y, _columns(block_n, swiglu) // 2), output(h, block_n // 2),
            *plan, rows, bias, row_scale,
            M, T, N, K, E, *x.stride(), stored.stride(0), stride_wk, stride_wn,
            transposed, swiglu, tiles.decode, block_m, block_n, block_k, programs, tma,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return outputs


def _fake_weights(a, b, starts, a_rows, b_rows, out_dtype, config):
    return a.new_empty((starts.shape[1] - 1, a.shape[1], b.shape[1]), dtype=out_dtype)


@_lib.opaque("grouped_gemm_dw", _fake_weights)
def _weights(
    a: Tensor,
    b: Tensor,
    starts: Tensor,
    a_rows: Tensor | None,
    b_rows: Tensor | None,
    out_dtype: torch.dtype,
    config: list[int] | None,
) -> Tensor:
    """a[rows of e]^T @ b[rows of e] for every expert e: [E, P, Q]."""
    dw = _fake_weights(a, b, starts, a_rows, b_rows, out_dtype, config)
    (E, P, Q), M = dw.shape, len(a if a_rows is None else a_rows)
    if 0 in (len(a), len(b), E, P, Q):
        return dw.zero_()
    with _lib.on_device(a):
        _lib.check_gpu()
        tma = _lib.has_tma() and _weights_ready(dw)
        tma = tma and _rows_ready(a, a_rows) and _rows_ready(b, b_rows)
        tiles = Config(*config) if config else POINTER_CONFIG
        if tma and not config:
            tiles = default_config(M, Q, P, E, a.dtype, dw=True)
            if b_rows is not None:  # the addresses of 256 columns a row take too many registers
                tiles = replace(tiles, block_n=min(tiles.block_n, 128))
            tiles = _fitting(tiles, tiles.block_m * tiles.block_n * dw.itemsize // 2)
        moe_gemm_dw.launch(a, b, a_rows, b_rows, starts, dw, tiles, tma)
    return dw


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
    negative, total, bad = wrong_ones(sizes, rows, M, T or 0).tolist()
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
    return _forward_and_res(
        x, w, sizes, out_dtype, transpose_w, rows, bias, row_scale, activation, config, True
    )


def _forward_and_res(
    x, w, sizes, out_dtype, transpose_w, rows, bias, row_scale, activation, config, keep
):
    """keep: whether there will be a backward."""
    out_dtype = _check(
        x, w, sizes, out_dtype, transpose_w, rows, bias, row_scale, activation, config
    )
    swiglu = activation is not None
    y, *h = _forward(
        x, w, sizes, out_dtype, transpose_w, rows, bias, row_scale, swiglu,
        keep and (swiglu or row_scale is not None), _lib.fields(config),
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
    dh, dx, dw, d_bias, drow_scale = dy.to(x.dtype), None, None, None, None
    starts, tiles = tile_plan(sizes, len(dy), 256, 1, 1)
    if swiglu or row_scale is not None:
        dh, *scales = epilogue_bwd(h, dh, starts, row_scale, swiglu)
        drow_scale = scales[0] if scales else None
    if want_dx:
        (dx,) = _forward(
            dh, w, sizes, x.dtype, not transpose_w, None, None, None, False, False, config
        )
        if rows is not None:
            dx = gather_bwd(dx, starts, rows, len(x))
    if want_dw and transpose_w:
        dw = _weights(dh, x, starts, None, rows, w.dtype, config)
    elif want_dw:
        dw = _weights(x, dh, starts, rows, None, w.dtype, config)
    if want_dbias:
        d_bias = dbias(dh, starts, tiles)
    return dx, dw, d_bias, drow_scale


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
    starts, _ = tile_plan(sizes, len(x), 256, 1, 1)
    return _weights(x, dy.to(x.dtype), starts, None, None, out_dtype, _lib.fields(config))


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, w, sizes, out_dtype, transpose_w, rows, bias, row_scale, activation, config
    ):
        y, res = _forward_and_res(
            x, w, sizes, out_dtype, transpose_w, rows, bias, row_scale, activation, config,
            any(ctx.needs_input_grad),
        )  # fmt: skip
        ctx.save_for_backward(*res)
        ctx.options = transpose_w, activation is not None
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


def _check(x, w, sizes, out_dtype, transpose_w, rows, bias, row_scale, activation, config):
    """The dtype of y."""
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
