"""Root-mean-square normalisation of rows, with an optional residual added first.

    h = round(x + residual)      rstd[r] = (mean_n h[r, n]^2 + eps)^(-1/2)
    y = h * rstd * (w + w_offset)

    for each tile of rows:
        walk over the row: squares += h * h; rstd; walk back over it: load again, store y

    Backward, with xh = h * rstd and g = dy * (w + w_offset):
        dx = rstd * (g - xh * mean_n(g * xh)) + dh          dw = sum_r dy * xh
    for each tile of rows of this program:
        mean of g * xh over the whole row; then dx; and dw += dy * xh, in registers
    this program's dw to a workspace [programs, N]; a second kernel adds those in a fixed order

Limits: from Ampere up; bfloat16, float16, float32; statistics and dw in float32.

Twin: pallas_kernels/rms_norm.py.

Sources: Zhang and Sennrich (arXiv:1910.07467); partial weight gradients for each program and a
second kernel that adds them follow the Triton tutorial 05 (there with locks, here without).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _lib

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CHUNKS = 16  # of block_n columns, whose dw one program of the backward keeps in registers


@dataclass(frozen=True)
class Config:
    """Tile sizes and resources of the kernels; beyond the last bits the result ignores them.

    block_m: rows of a tile; the backward takes longer rows than block_n one by one.
    block_n: columns of a tile. The forward reads a row twice, in tiles of block_n and back from L1
        in tiles of half of that, the backward only one that is longer than block_n.
    stages: tiles of the backward in flight or in use.
    warps: warps of a program.
    programs: programs of the backward for each multiprocessor, which walk over the tiles.
    """

    block_m: int = 1
    block_n: int = 4096
    stages: int = 1
    warps: int = 4
    programs: int = 1

    def __post_init__(self) -> None:
        for name, least in (("block_m", 1), ("block_n", 16)):
            size = getattr(self, name)
            if size < least or size & (size - 1):
                raise ValueError(f"{name}: expected a power of two >= {least}, got {size}")


def default_config(R: int, N: int, dtype: torch.dtype, which: str = "fwd") -> Config:
    """The Config for R rows of N columns on a Hopper.

    which: "fwd" or "bwd", + "_residual" with a residual, which is one more row to hold.
    """
    # tuned: `parity tune rms_norm --emit` wrote these rungs, each for exactly these arguments
    if (R, N, dtype, which) == (4096, 32768, torch.bfloat16, "bwd_residual"):
        # rms_norm_4096x32768_residual bwd: 358.4 us, 374.4 us before (NVIDIA H200, 2026-11-21)
        return Config(block_m=4, block_n=2048, stages=1, warps=32, programs=1)
    # tuned: end
    block_n = max(64, _lib.power_of_2(N))
    if which.startswith("bwd"):
        if block_n * dtype.itemsize > 16384:
            # 16 chunks of dw take half of the registers, 64 for each thread of 16 warps; a quarter
            # where wider elements or a ragged end want registers too.
            large = N % 2048 == 0 and N <= 32768 and dtype.itemsize == 2
            return Config(1, 2048 if large else 1024, warps=16, programs=1)
        # Tiles of 8192 elements, 16 for each thread, and fewer where programs would find no rows.
        # Two tiles are on their way to shared memory while one is worked on.
        block_m = min(8192 // block_n, _lib.power_of_2(_lib.cdiv(R, 132)))
        return Config(block_m, block_n, 3 if _lib.has_tma() else 1, warps=16, programs=1)
    # The first walk takes a row as one tile of up to 64 KB, the second half of that: 64 bytes of it
    # for each thread, four loads of 16 bytes in flight. At 64 KB x alone leaves registers for 128.
    most = 65536 // dtype.itemsize
    block_n = min(block_n, most)
    block_m = max(1, most // 8 // block_n)
    warps = block_m * block_n * dtype.itemsize // 2048
    return Config(block_m, block_n, warps=16 if block_n == most and which == "fwd" else warps)


@triton.jit
def _weight(w, w_offset: tl.constexpr):
    """The weight that multiplies, in float32."""
    w = w.to(tl.float32)
    if w_offset != 0.0:
        w += w_offset
    return w


@triton.jit
def _load_h(x, residual, offsets, inside, has_residual: tl.constexpr, policy: tl.constexpr):
    """The normalised quantity, rounded as it is stored, in float32."""
    h = tl.load(x + offsets, mask=inside, other=0.0, eviction_policy=policy)
    if has_residual:
        r = tl.load(residual + offsets, mask=inside, other=0.0, eviction_policy=policy)
        added = h.to(tl.float32) + r.to(tl.float32)
        h = added.to(h.dtype)
    return h.to(tl.float32)


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr,  # [R, N]
    w_ptr,  # [N]
    residual_ptr,  # [R, N] or None
    y_ptr,  # [R, N]
    h_ptr,  # [R, N] or None
    rstd_ptr,  # [R]
    R, N, stride_xr, stride_rr, eps,
    w_offset: tl.constexpr, cast_before_weight: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr,
):  # fmt: skip
    has_residual: tl.constexpr = residual_ptr is not None
    # --- 1. which tile
    m = (tl.program_id(0) * block_m + tl.arange(0, block_m)).to(tl.int64)
    rows = m[:, None]
    x, y = x_ptr + rows * stride_xr, y_ptr + rows * N
    residual, h_out = x, y
    if has_residual:
        residual, h_out = residual_ptr + rows * stride_rr, h_ptr + rows * N

    # --- 2. main loop
    squares = tl.zeros((block_m, block_n // 8), tl.float32)
    for n0 in tl.range(0, N, block_n):
        cols = n0 + tl.arange(0, block_n)[None, :]
        inside = (rows < R) & (cols < N)
        h = _load_h(x, residual, cols, inside, has_residual, "evict_last")  # [block_m, block_n]
        # Eight adjacent columns belong to one thread.
        squares += tl.sum(tl.reshape(h * h, (block_m, block_n // 8, 8)), 2)

    # --- 3. epilogue
    rstd = tl.rsqrt(tl.sum(squares, 1) / N + eps)  # [block_m]
    tl.store(rstd_ptr + m, rstd, mask=m < R)
    rstd = rstd[:, None]

    # --- 4. store
    half: tl.constexpr = block_n // 2
    last = (N - 1) // half * half
    for back in tl.range(0, N, half):
        cols = last - back + tl.arange(0, half)[None, :]
        inside = (rows < R) & (cols < N)
        h = _load_h(x, residual, cols, inside, has_residual, "evict_first")
        w = tl.load(w_ptr + cols, mask=cols < N, other=0.0, eviction_policy="evict_last")
        xh = h * rstd
        dtype: tl.constexpr = y_ptr.dtype.element_ty
        if cast_before_weight:
            xh = xh.to(dtype).to(tl.float32)
        y_tile = (xh * _weight(w, w_offset)).to(dtype)
        tl.store(y + cols, y_tile, mask=inside, eviction_policy="evict_first")
        if has_residual:
            tl.store(h_out + cols, h.to(dtype), mask=inside, eviction_policy="evict_first")


@triton.jit
def _load_hdy(h_rows, dy_rows, cols, inside, policy: tl.constexpr):
    """h and dy as they are stored."""
    other = None if inside is None else 0.0
    h = tl.load(h_rows + cols, inside, other, eviction_policy=policy)
    dy = tl.load(dy_rows + cols, inside, other, eviction_policy=policy)
    return h, dy


@triton.jit
def _load_dh(dh_row, cols, N, even: tl.constexpr):
    exist = None if even else cols < N
    return tl.load(dh_row + cols, exist, None if even else 0.0, eviction_policy="evict_first")


@triton.jit
def _products(h, dy, w, w_offset: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr):
    """g * h, summed over runs of 8 columns, which one thread holds: [block_m, block_n / 8].

    Their sum along a row is the mean of g * xh, but for a factor.
    """
    products = h.to(tl.float32) * (dy.to(tl.float32) * _weight(w, w_offset))
    return tl.sum(tl.reshape(products, (block_m, block_n // 8, 8)), 2)


@triton.jit
def _store_dx(
    dx_rows, cols, inside, h, dy, dh, w, rstd, mean,
    w_offset: tl.constexpr,
):  # fmt: skip
    """Stores dx and returns this tile's terms of dw."""
    xh = h.to(tl.float32) * rstd
    dx = rstd * (dy.to(tl.float32) * _weight(w, w_offset) - xh * mean)
    if dh is not None:
        dx += dh.to(tl.float32)
    tl.store(dx_rows + cols, dx.to(dx_rows.dtype.element_ty), mask=inside)
    return dy.to(tl.float32) * xh


@triton.jit
def _rms_norm_bwd_kernel(
    h_ptr,  # [R, N]
    w_ptr,  # [N]
    rstd_ptr,  # [R]
    dy_ptr,  # [R, N]
    dh_ptr,  # [R, N] or None
    dx_ptr,  # [R, N]
    dw_ptr,  # [programs, N] float32: this program's row of partial sums
    R, N, stride_hr, stride_dyr, stride_dhr, w_offset: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, chunks: tl.constexpr, groups: tl.constexpr,
    even: tl.constexpr, packed: tl.constexpr, whole: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    has_dh: tl.constexpr = dh_ptr is not None
    if packed:  # one offset serves all
        stride_hr, stride_dyr, stride_dhr = N, N, N
    # This program stores dx and sums dw of `chunks` tiles along n, from the first on. A row has
    # more where its dw would not fit the registers: then `groups` programs walk over the same rows.
    first = 0 if groups == 1 else tl.program_id(1) * chunks
    n = tl.arange(0, block_n)[None, :]
    dw = ()
    for _ in tl.static_range(chunks):
        dw = dw + (tl.zeros((block_m, block_n), tl.float32),)  # noqa: RUF005
    if whole:
        w = tl.load(w_ptr + n, mask=n < N, other=0.0)
        num_m = tl.cdiv(R, block_m)
        # disable_licm: w waits in its own dtype, in half the registers.
        for mi in tl.range(
            tl.program_id(0), num_m, tl.num_programs(0), num_stages=stages, disable_licm=True
        ):
            # --- 1. which tile
            rows = (mi * block_m + tl.arange(0, block_m)[:, None]).to(tl.int64)
            inside = (rows < R) & (n < N)
            dh_rows = dh_ptr + rows * stride_dhr if has_dh else None
            # --- 2. main loop
            h, dy = _load_hdy(h_ptr + rows * stride_hr, dy_ptr + rows * stride_dyr, n, inside, "")
            total = tl.sum(_products(h, dy, w, w_offset, block_m, block_n), 1)[:, None]
            # --- 3. epilogue
            rstd = tl.load(rstd_ptr + rows, mask=rows < R, other=0.0)
            mean = total * rstd / N
            # --- 4. store
            dh = tl.load(dh_rows + n, mask=inside, other=0.0) if has_dh else None
            terms = _store_dx(dx_ptr + rows * N, n, inside, h, dy, dh, w, rstd, mean, w_offset)
            dw = (dw[0] + terms,)
    else:
        # A longer row is walked over twice, one at a time (block_m = 1): for the mean in tiles so
        # wide that all loads in flight fill the wait, then chunk by chunk, from L1.
        wide: tl.constexpr = 4 * block_n
        row = tl.program_id(0).to(tl.int64)
        for _ in tl.range(tl.program_id(0), R, tl.num_programs(0), num_stages=1, disable_licm=True):
            h_row, dy_row = h_ptr + row * stride_hr, dy_ptr + row * stride_dyr
            products = tl.zeros((1, wide // 8), tl.float32)
            for n0 in tl.range(0, N, wide):
                cols = n0 + tl.arange(0, wide)[None, :]
                exist = None if even else cols < N
                h, dy = _load_hdy(h_row, dy_row, cols, exist, "evict_last")
                w = tl.load(w_ptr + cols, mask=exist, other=None if even else 0.0)
                products += _products(h, dy, w, w_offset, 1, wide)
            rstd = tl.load(rstd_ptr + row)
            mean = tl.sum(products) * rstd / N
            # dh is read once, not from L1: it is on its way four chunks early.
            dh_row = dh_ptr + row * stride_dhr if has_dh else None
            dh = ()
            for ni in tl.static_range(min(4, chunks) if has_dh else 0):
                cols = (first + ni) * block_n + n
                dh = dh + (_load_dh(dh_row, cols, N, even),)  # noqa: RUF005
            for ni in tl.static_range(chunks):
                cols = (first + ni) * block_n + n
                # Where tiles fill the row, whether columns exist is no question, nor a register.
                exist = None if even else cols < N
                if has_dh and ni + 4 < chunks:
                    dh = dh + (_load_dh(dh_row, cols + 4 * block_n, N, even),)  # noqa: RUF005
                h, dy = _load_hdy(h_row, dy_row, cols, exist, "evict_first")
                w = tl.load(w_ptr + cols, mask=exist, other=None if even else 0.0)
                terms = _store_dx(
                    dx_ptr + row * N, cols, exist, h, dy, dh[ni] if has_dh else None, w, rstd, mean,
                    w_offset,
                )  # fmt: skip
                dw = dw[:ni] + (dw[ni] + terms,) + dw[ni + 1 :]  # noqa: RUF005
            row += tl.num_programs(0)

    for ni in tl.static_range(chunks):
        cols = (first + ni) * block_n + n
        partial = dw_ptr + tl.program_id(0).to(tl.int64) * N + cols
        tl.store(partial, tl.sum(dw[ni], 0)[None, :], mask=cols < N)


@triton.jit
def _rms_norm_dw_kernel(
    partial_ptr,  # [P, N] float32
    dw_ptr,  # [N] float32
    P, N, block_p: tl.constexpr, block_n: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    n = tl.program_id(0) * block_n + tl.arange(0, block_n)
    # --- 2. main loop
    acc = tl.zeros((block_p, block_n), tl.float32)
    for p0 in tl.range(0, P, block_p):
        p = p0 + tl.arange(0, block_p)[:, None]
        acc += tl.load(partial_ptr + p.to(tl.int64) * N + n, mask=(p < P) & (n < N), other=0.0)
    # --- 3. epilogue
    dw = tl.sum(acc, 0)
    # --- 4. store
    tl.store(dw_ptr + n, dw, mask=n < N)


def _fake_fwd(x, w, residual, eps, w_offset, cast_before_weight, config):
    y, rstd = x.new_empty(x.shape), x.new_empty(x.shape[:1], dtype=torch.float32)
    return [y, rstd] if residual is None else [y, rstd, x.new_empty(x.shape)]


@_lib.opaque("rms_norm_fwd", _fake_fwd)
def _forward(
    x: Tensor,
    w: Tensor,
    residual: Tensor | None,
    eps: float,
    w_offset: float,
    cast_before_weight: bool,
    config: list[int] | None,
) -> list[Tensor]:
    """[y, rstd], and h with a residual."""
    R, N = x.shape
    y, rstd = x.new_empty(R, N), x.new_empty(R, dtype=torch.float32)
    h = None if residual is None else x.new_empty(R, N)
    if 0 in (R, N):
        rstd.fill_(eps**-0.5 if eps > 0 else float("inf"))
    else:
        x, w = _lib.rows_adjacent(x), _lib.rows_adjacent(w)
        residual = None if residual is None else _lib.rows_adjacent(residual)
        with _lib.on_device(x):
            _lib.check_gpu()
            which = "fwd" if residual is None else "fwd_residual"
            tiles = Config(*config) if config else default_config(R, N, x.dtype, which)
            _rms_norm_fwd_kernel[(_lib.cdiv(R, tiles.block_m),)](
                x, w, residual, y, h, rstd, R, N,
                x.stride(0), 0 if residual is None else residual.stride(0), eps, w_offset,
                cast_before_weight, tiles.block_m, tiles.block_n, num_warps=tiles.warps,
                maxnreg=_lib.registers(tiles.warps),
            )  # fmt: skip
    return [y, rstd] if h is None else [y, rstd, h]


def _fake_bwd(h, w, rstd, dy, dh, w_offset, config):
    return [h.new_empty(h.shape), h.new_empty(h.shape[1:], dtype=torch.float32)]


@_lib.opaque("rms_norm_bwd", _fake_bwd)
def _backward(
    h: Tensor,
    w: Tensor,
    rstd: Tensor,
    dy: Tensor,
    dh: Tensor | None,
    w_offset: float,
    config: list[int] | None,
) -> list[Tensor]:
    """[dx, dw]."""
    R, N = h.shape
    dx, dw = h.new_empty(R, N), h.new_empty(N, dtype=torch.float32)
    if 0 in (R, N):
        return [dx, dw.zero_()]
    h, w, rstd, dy = map(_lib.rows_adjacent, (h, w, rstd, dy))
    dh = None if dh is None else _lib.rows_adjacent(dh)
    with _lib.on_device(h):
        _lib.check_gpu()
        which = "bwd" if dh is None else "bwd_residual"
        tiles = Config(*config) if config else default_config(R, N, h.dtype, which)
        chunks = min(CHUNKS, _lib.cdiv(N, tiles.block_n))
        groups = _lib.cdiv(N, chunks * tiles.block_n)
        resident = max(1, tiles.programs * _lib.num_sms() // groups)
        block_m = tiles.block_m if N <= tiles.block_n else 1
        programs = min(_lib.cdiv(R, block_m), resident)
        even = N % (chunks * tiles.block_n) == 0 and N % (4 * tiles.block_n) == 0
        packed = all(t is None or t.stride(0) == N for t in (h, dy, dh))
        partial = h.new_empty(programs, N, dtype=torch.float32)
        _rms_norm_bwd_kernel[(programs, groups)](
            h, w, rstd, dy, dh, dx, partial, R, N,
            h.stride(0), dy.stride(0), 0 if dh is None else dh.stride(0), w_offset,
            block_m, tiles.block_n, chunks, groups,
            even, packed, N <= tiles.block_n, tiles.stages,
            num_warps=tiles.warps,
        )  # fmt: skip
        # 32 columns are one 128-byte line of float32; 64 rows of them keep 4 warps busy.
        _rms_norm_dw_kernel[(_lib.cdiv(N, 32),)](partial, dw, programs, N, 64, 32, num_warps=4)
    return [dx, dw]


def rms_norm_fwd(
    x: Tensor,
    w: Tensor,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-6,
    w_offset: float = 0.0,
    cast_before_weight: bool = False,
    config: Config | None = None,
) -> tuple[Tensor | tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """rms_norm and what its backward needs. No gradient flows through this.

    Returns (y, (h, w, rstd)), or ((y, h), (h, w, rstd)) with a residual; without one h is x itself.
    rstd [R] is float32.
    """
    _lib.check_tensor("x", x, ("R", "N"), DTYPES)
    _lib.check_tensor("w", w, (x.shape[1],), (x.dtype, torch.float32))
    if residual is not None:
        _lib.check_tensor("residual", residual, tuple(x.shape), (x.dtype,))
    _lib.check_same_device(x=x, w=w, residual=residual)
    _lib.check_static("eps", eps, (float, int))
    _lib.check_static("w_offset", w_offset, (float, int))
    _lib.check_static("cast_before_weight", cast_before_weight, (bool,))
    _lib.check_config(config, Config)
    y, rstd, *stored = _forward(
        x, w, residual, float(eps), float(w_offset), cast_before_weight, _lib.fields(config)
    )
    if residual is None:
        return y, (x, w, rstd)
    (h,) = stored
    return (y, h), (h, w, rstd)


def rms_norm_bwd(
    res: tuple[Tensor, Tensor, Tensor],
    dy: Tensor,
    dh: Tensor | None = None,
    *,
    w_offset: float = 0.0,
    cast_before_weight: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients (dx [R, N] in h's dtype, dw [N] float32); dx is also the gradient of residual.

    res: (h, w, rstd) of rms_norm_fwd. dy, dh [R, N]: cotangents of y and h; dh None is zero.
    cast_before_weight: the cast counts as the identity, so this changes nothing.
    The same inputs give the same bits: dw is added in an order that only sizes and config decide.
    """
    h, w, rstd = res
    _lib.check_tensor("h", h, ("R", "N"), DTYPES)
    _lib.check_tensor("w", w, (h.shape[1],), (h.dtype, torch.float32))
    _lib.check_tensor("rstd", rstd, (h.shape[0],), (torch.float32,))
    _lib.check_tensor("dy", dy, tuple(h.shape), (h.dtype,))
    if dh is not None:
        _lib.check_tensor("dh", dh, tuple(h.shape), (h.dtype,))
    _lib.check_same_device(h=h, w=w, rstd=rstd, dy=dy, dh=dh)
    _lib.check_static("w_offset", w_offset, (float, int))
    _lib.check_static("cast_before_weight", cast_before_weight, (bool,))
    _lib.check_config(config, Config)
    dx, dw = _backward(h, w, rstd, dy, dh, float(w_offset), _lib.fields(config))
    return dx, dw


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, residual, eps, w_offset, cast_before_weight, config):
        out, res = rms_norm_fwd(
            x, w, residual,
            eps=eps, w_offset=w_offset, cast_before_weight=cast_before_weight, config=config,
        )  # fmt: skip
        ctx.save_for_backward(*res)
        ctx.set_materialize_grads(False)
        ctx.w_offset = w_offset
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dh=None):
        h, w, rstd = ctx.saved_tensors
        if dy is None:  # only h was used
            dy = torch.zeros_like(h)
        dx, dw = rms_norm_bwd((h, w, rstd), dy, dh, w_offset=ctx.w_offset)
        need_x, need_w, need_residual, *_ = ctx.needs_input_grad
        dx, dw = dx if need_x or need_residual else None, dw.to(w.dtype) if need_w else None
        return dx if need_x else None, dw, dx if need_residual else None, None, None, None, None


def rms_norm(
    x: Tensor,
    w: Tensor,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-6,
    w_offset: float = 0.0,
    cast_before_weight: bool = False,
    config: Config | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y [R, N] = h / rms(h) * (w + w_offset), h = x (+ residual). Differentiable once.

    x [R, N], residual [R, N]: bfloat16, float16 or float32, the same. w [N]: that or float32.
    With a residual returns (y, h), h = x + residual rounded to x's dtype before the statistics.
    eps: added to the mean square. w_offset: 1.0 for Gemma's weights.
    cast_before_weight: rounds h * rstd to x's dtype before the weight, as Llama's reference does.
    config: tiles of this call; gradients take their own default. w's gradient has w's dtype.

    Raises TypeError for dtypes and ValueError for shapes and devices that do not fit, naming the
    argument; NotImplementedError on a GPU older than Ampere.
    """
    return _RmsNorm.apply(x, w, residual, eps, w_offset, cast_before_weight, config)
