"""Mamba-2's state space duality over packed sequences: decay attention with step sizes.

    u[t] = clamp(softplus(dt[t] + dt_bias))                       softplus if dt_softplus
    h[t] = exp(u[t] A) h[t-1] + u[t] x[t] B[t]^T                  y[t] = h[t] C[t] + D x[t]
    y = y * silu(z) where there is a z
    x [T, H, P]   dt [T, H]   A [H]   B, C [T, G, N]   D [H] or [H, P]   z [T, H, P]   dt_bias [H]
    h0 [B, H, P, N]   ->   y [T, H, P], h_T [B, H, P, N]

    decay_attention with q = C, k = B, v = x, g = u A and weights u, not their logarithms, as a step
    size may be 0; states transposed where they are read and written; D x joins y before it is
    rounded. The gate of z is a pass of its own.

Backward: decay_attention's, with dx += D dy, and from its dg and du
    du' = du + A dg    ddt = du' * (derivative of the softplus, 0 outside the limits)
    dA = sum of u dg    ddt_bias = sum of ddt    dD = sum of dy x
    dz = dy * y * silu'(z), before it the gradient of y: dy * silu(z)

Limits: as decay_attention's, P its V and N its K. The convolution before it is outside.

Twin: pallas_kernels/mamba2_ssd.py.

Sources: Mamba-2 (arXiv:2405.21060).
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _lib
from .decay_attention import Config as _CoreConfig
from .decay_attention import _launch
from .decay_attention import default_config as _core_config
from .decay_attention_bwd import backward, bwd_tiles
from .decay_attention_gates import gates, step_size, sum_rows
from .decay_attention_states import check_tokens, heads_adjacent

INFINITY = float("inf")


@dataclass(frozen=True)
class Config(_CoreConfig):
    """As decay_attention's."""


def default_config(
    T: int, B: int, G: int, H: int, N: int, P: int, dtype: torch.dtype, which: str = "fwd"
) -> Config:
    """The Config for T tokens in B sequences; which: "fwd", "states" or "grads" (of a backward)."""
    return Config(*_lib.fields(_core_config(T, B, G, H, N, P, dtype, which)))


def _sizes(x: Tensor, B: Tensor, cu_seqlens: Tensor) -> tuple[Any, ...]:
    """What default_config wants to know first."""
    (T, G, N), (H, P) = B.shape, x.shape[1:]
    return T, len(cu_seqlens) - 1, G, H, N, P, x.dtype


@triton.jit
def _mamba2_ssd_gate_kernel(
    y_ptr,  # [T, H, P] before the gate
    z_ptr,  # [T, H, P]
    dy_ptr,  # [T, H, P] or None: forward
    out_ptr,  # [T, H, P]: y * silu(z), or dy * silu(z)
    dz_ptr,  # [T, H, P] or None
    T, W, P: tl.constexpr, stride_z, stride_zh: tl.constexpr, stride_dy, stride_dyh: tl.constexpr,
    block_t: tl.constexpr, block_w: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    t = tl.program_id(0) * block_t + tl.arange(0, block_t)
    w = tl.program_id(1) * block_w + tl.arange(0, block_w)
    exist = (t < T)[:, None] & (w < W)[None, :]
    row = t.to(tl.int64)[:, None]
    h, c = (w // P)[None, :], (w % P)[None, :]
    # --- 2. main loop: one tile
    y = tl.load(y_ptr + row * W + w[None, :], exist, 0.0).to(tl.float32)
    z = tl.load(z_ptr + row * stride_z + h * stride_zh + c, exist, 0.0).to(tl.float32)
    # --- 3. epilogue
    s = 1.0 / (1.0 + tl.exp(-z))
    factor = y
    if dy_ptr is not None:
        at = dy_ptr + row * stride_dy + h * stride_dyh + c
        factor = tl.load(at, exist, 0.0).to(tl.float32)
    out = factor * z * s
    # --- 4. store
    tl.store(out_ptr + row * W + w[None, :], out.to(out_ptr.dtype.element_ty), exist)
    if dy_ptr is not None:
        dz = factor * y * s * (1.0 + z * (1.0 - s))
        tl.store(dz_ptr + row * W + w[None, :], dz.to(dz_ptr.dtype.element_ty), exist)


@triton.jit
def _mamba2_ssd_dt_kernel(
    dt_ptr,  # [T, H] float32
    A_ptr,  # [H] float32
    bias_ptr,  # [H] float32 or None
    dg_ptr,  # [T, H] float32
    du_ptr,  # [T, H] float32
    ddt_ptr,  # [T, H] float32
    sums_ptr,  # [blocks, 2, H] float32: of u dg, for dA, and of ddt, for the bias
    T, H, stride_dt, low, high, softplus: tl.constexpr,
    block_t: tl.constexpr, block_h: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    ti = tl.program_id(0)
    t = ti * block_t + tl.arange(0, block_t)
    h = tl.program_id(1) * block_h + tl.arange(0, block_h)
    exist = (t < T)[:, None] & (h < H)[None, :]
    row = t.to(tl.int64)[:, None]
    at = row * H + h[None, :]
    # --- 2. main loop: one tile
    dt = tl.load(dt_ptr + row * stride_dt + h[None, :], exist, 0.0)
    dg, du = tl.load(dg_ptr + at, exist, 0.0), tl.load(du_ptr + at, exist, 0.0)
    # --- 3. epilogue
    u, slope = step_size(dt, bias_ptr, h, H, low, high, softplus)
    ddt = (du + dg * tl.load(A_ptr + h, h < H, 0.0)[None, :]) * slope
    dA = tl.sum(tl.where(exist, u * dg, 0.0), 0)
    bias = tl.sum(tl.where(exist, ddt, 0.0), 0)
    # --- 4. store
    tl.store(ddt_ptr + at, ddt, exist)
    sums = sums_ptr + 2 * ti.to(tl.int64) * H + h
    tl.store(sums, dA, h < H)
    tl.store(sums + H, bias, h < H)


def _gate(y: Tensor, z: Tensor, dy: Tensor | None) -> list[Tensor]:
    """[y * silu(z)], or [dy * silu(z), dz]."""
    T, H, P = y.shape
    out = [y.new_empty(T, H, P) for _ in range(1 + (dy is not None))]
    z, dy = heads_adjacent(z), None if dy is None else heads_adjacent(dy)
    _mamba2_ssd_gate_kernel[(_lib.cdiv(T, 8), _lib.cdiv(H * P, 512))](
        y, z, dy, out[0], None if dy is None else out[1], T, H * P, P, z.stride(0), z.stride(1),
        0 if dy is None else dy.stride(0), 0 if dy is None else dy.stride(1), 8, 512, num_warps=4,
    )  # fmt: skip
    return out


def _fake_fwd(x, dt, A, B, C, D, z, dt_bias, cu_seqlens, h0, softplus, low, high, chunk, config):
    T, H, P = x.shape
    states = len(cu_seqlens) - 1, H, P, B.shape[2]
    y, h_T = x.new_empty(T, H, P), x.new_empty(states, dtype=torch.float32)
    return [y, h_T] if z is None else [y, h_T, x.new_empty(T, H, P)]


@_lib.opaque("mamba2_ssd_fwd", _fake_fwd)
def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor,
    h0: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
    chunk: int,
    config: list[int] | None,
) -> list[Tensor]:
    """[y, h_T], and y before the gate if there is one."""
    given = x, dt, A, B, C, D, z, dt_bias, cu_seqlens, h0
    y, h_T, *before = _fake_fwd(*given, softplus, low, high, chunk, config)
    if 0 in x.shape or 0 in B.shape or 0 in h_T.shape:
        h_T = h_T.zero_() if h0 is None else h_T.copy_(h0)
        return [y.zero_(), h_T, *(rows.zero_() for rows in before)]
    x, B, C = map(heads_adjacent, (x, B, C))
    h0, A, dt_bias = (None if v is None else v.contiguous() for v in (h0, A, dt_bias))
    cu_seqlens = cu_seqlens.contiguous()
    tiles = Config(*config) if config else default_config(*_sizes(x, B, cu_seqlens))
    with _lib.on_device(x):
        _lib.check_gpu()
        step = A, dt_bias, softplus, (low, high)
        decay, u = gates(dt, None, cu_seqlens, chunk, step)
        y, h_T = _launch(C, B, x, decay, u, D, h0, cu_seqlens, 1.0, chunk, tiles, True)
        return [y, h_T] if z is None else [*_gate(y, z, None), h_T, y]


def _fake_bwd(
    x, dt, A, B, C, D, z, dt_bias, cu_seqlens, h0, before, dy, dh_T, softplus, low, high, chunk,
    config,
):  # fmt: skip
    found = [v.new_empty(v.shape) for v in (x, dt, A, B, C)]
    D_like, bias_like = (A if v is None else v for v in (D, dt_bias))
    states = len(cu_seqlens) - 1, x.shape[1], x.shape[2], B.shape[2]
    found += [D_like.new_empty(D_like.shape), x.new_empty(x.shape)]
    return [*found, bias_like.new_empty(A.shape), x.new_empty(states, dtype=torch.float32)]


@_lib.opaque("mamba2_ssd_bwd", _fake_bwd)
def _backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor,
    h0: Tensor | None,
    before: Tensor | None,
    dy: Tensor,
    dh_T: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
    chunk: int,
    config: list[int] | None,
) -> list[Tensor]:
    """[dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dh0]; of what was not given, memory."""
    given = x, dt, A, B, C, D, z, dt_bias, cu_seqlens, h0, before, dy, dh_T
    *found, dh0 = _fake_bwd(*given, softplus, low, high, chunk, config)
    if 0 in x.shape or 0 in B.shape or 0 in dh0.shape:
        return [*(g.zero_() for g in found), dh0.zero_() if dh_T is None else dh0.copy_(dh_T)]
    dD, dz = found[5:7]
    x, B, C, dy = map(heads_adjacent, (x, B, C, dy))
    h0, A, dt_bias, dh_T = (None if v is None else v.contiguous() for v in (h0, A, dt_bias, dh_T))
    cu_seqlens = cu_seqlens.contiguous()
    ask = functools.partial(default_config, *_sizes(x, B, cu_seqlens))
    tiles = bwd_tiles(ask, Config(*config) if config else None)
    with _lib.on_device(x):
        _lib.check_gpu()
        if before is not None and z is not None:
            dy, dz = _gate(before, z, dy)
        step = A, dt_bias, softplus, (low, high)
        decay, u = gates(dt, None, cu_seqlens, chunk, step)
        dC, dB, dx, dg, du, dh0, by_channel = backward(
            C, B, x, decay, u, False, D, h0, cu_seqlens, dy, dh_T, 1.0, chunk, *tiles, True
        )
        if D is not None:
            dD = by_channel if D.dim() == 2 else sum_rows(by_channel.t(), torch.float32)
        (T, H), block_t = dt.shape, 64
        ddt, blocks = torch.empty_like(dg), _lib.cdiv(T, block_t)
        sums = dg.new_empty(blocks, 2, H)
        dt = _lib.rows_adjacent(dt)
        _mamba2_ssd_dt_kernel[(blocks, _lib.cdiv(H, 32))](
            dt, A, dt_bias, dg, du, ddt, sums, T, H, dt.stride(0), low, high, softplus,
            block_t, 32, num_warps=4,
        )  # fmt: skip
        dA, ddt_bias = (sum_rows(sums[:, n], torch.float32) for n in range(2))
    return [dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dh0]


def _check(
    x, dt, A, B, C, D, z, dt_bias, cu_seqlens, h0, softplus, limits, chunk, config
) -> tuple[bool, float, float]:  # fmt: skip
    check_tokens({"C": C, "B": B, "x": x}, chunk)
    (T, H, P), N = x.shape, B.shape[2]
    floats = (torch.float32,)
    _lib.check_tensor("dt", dt, (T, H), floats)
    _lib.check_tensor("A", A, (H,), floats)
    if D is not None:
        by_channel = isinstance(D, Tensor) and D.dim() == 2
        _lib.check_tensor("D", D, (H, P) if by_channel else (H,), floats)
    if z is not None:
        _lib.check_tensor("z", z, (T, H, P), (x.dtype,))
    if dt_bias is not None:
        _lib.check_tensor("dt_bias", dt_bias, (H,), floats)
    _check_states(x, N, cu_seqlens, h0=h0)
    _lib.check_same_device(
        x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, cu_seqlens=cu_seqlens, h0=h0
    )
    _lib.check_static("dt_softplus", softplus, (bool,))
    _lib.check_static("dt_limit", limits, (tuple, list))
    if len(limits) != 2 or not limits[0] <= limits[1]:
        raise ValueError(f"dt_limit: expected (low, high) with low <= high, got {limits}")
    _lib.check_config(config, Config)
    return softplus, float(limits[0]), float(limits[1])


def _check_states(x: Tensor, N: int, cu_seqlens: Tensor, **states: Tensor | None) -> None:
    _lib.check_tensor("cu_seqlens", cu_seqlens, ("B + 1",), (torch.int32,))
    if len(cu_seqlens) == 0:
        raise ValueError("cu_seqlens: expected shape [B + 1], got [0]")
    for name, h in states.items():
        if h is not None:
            _lib.check_tensor(name, h, (len(cu_seqlens) - 1, *x.shape[1:], N), (torch.float32,))


def mamba2_ssd_fwd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor,
    h0: Tensor | None,
    *,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, INFINITY),
    chunk: int = 64,
    config: Config | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, ...]]:
    """mamba2_ssd and what its backward needs. No gradient flows through this.

    Returns ((y, h_T), (x, dt, A, B, C, D, z, dt_bias, cu_seqlens, h0, y before the gate or None)).
    """
    given = x, dt, A, B, C, D, z, dt_bias, cu_seqlens, h0
    step = _check(*given, dt_softplus, dt_limit, chunk, config)
    y, h_T, *before = _forward(*given, *step, chunk, _lib.fields(config))
    return (y, h_T), (*given, *(before or [None]))


def mamba2_ssd_bwd(
    res: tuple[Tensor | None, ...],
    dy: Tensor,
    dh_T: Tensor | None = None,
    *,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, INFINITY),
    chunk: int = 64,
    config: Config | None = None,
) -> tuple[Tensor, ...]:
    """Gradients (dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dh0) of what was given, in the shapes and
    dtypes of the arguments. The same inputs give the same bits.

    res: as mamba2_ssd_fwd returns it. dy [T, H, P], dh_T [B, H, P, N] float32: cotangents of y and
    h_T; dh_T None is zero.
    """
    *given, before = res
    x, cu_seqlens = given[0], given[8]
    step = _check(*given, dt_softplus, dt_limit, chunk, config)
    for name, rows in (("y", before), ("dy", dy)):
        if rows is not None:
            _lib.check_tensor(name, rows, tuple(x.shape), (x.dtype,))
    _check_states(x, given[3].shape[2], cu_seqlens, dh_T=dh_T)
    _lib.check_same_device(x=x, dy=dy, dh_T=dh_T)
    grads = _backward(*res, dy, dh_T, *step, chunk, _lib.fields(config))
    of = (*given[:8], given[9])
    return tuple(g for v, g in zip(of, grads, strict=True) if v is not None)


class _Mamba2Ssd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        *given, dt_softplus, dt_limit, chunk, config = args
        options = {"dt_softplus": dt_softplus, "dt_limit": dt_limit, "chunk": chunk}
        out, res = mamba2_ssd_fwd(*given, **options, config=config)
        ctx.save_for_backward(*res)
        ctx.set_materialize_grads(False)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dh_T):
        res = ctx.saved_tensors
        if dy is None:  # only h_T was used
            dy = torch.zeros_like(res[0])
        found = iter(mamba2_ssd_bwd(res, dy, dh_T, **ctx.options))
        of = (*res[:8], None, res[9])
        grads = [None if v is None else next(found) for v in of]
        needed = zip(grads, ctx.needs_input_grad, strict=False)
        return *(g if need else None for g, need in needed), None, None, None, None


def mamba2_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor,
    h0: Tensor | None,
    *,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, INFINITY),
    chunk: int = 64,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """y [T, H, P] = h C + D x, times silu(z), and the last states h_T [B, H, P, N]; h is the state
    before, times exp(u A), and u x B^T; u is dt, with its bias, softened and limited.
    Differentiable once.

    x, z [T, H, P], B, C [T, G, N]: bfloat16 or float16, the same; y has their dtype. Heads
    g * H / G and on share B and C of group g. dt [T, H], A [H] (below 0), D [H] or [H, P], dt_bias
    [H], h0 [B, H, P, N]: float32. D, z, dt_bias and h0 may be None: no D x, no gate, no bias, zero.
    Strided views, as of a fused projection, cost no copy.
    B sequences lie one after the other, the tokens of sequence s from cu_seqlens[s] on. cu_seqlens
    [B + 1] int32, from 0 to T, is read on the device alone: decay_attention_check looks at what it
    holds. dt_softplus: whether dt + dt_bias goes through softplus; dt_limit: what it is clamped to
    then, without gradient outside. chunk, config: as in decay_attention.

    Raises TypeError for dtypes and ValueError for shapes and devices that do not fit, naming the
    argument; NotImplementedError on a GPU older than Ampere.
    """
    given = x, dt, A, B, C, D, z, dt_bias, cu_seqlens, h0
    return _Mamba2Ssd.apply(*given, dt_softplus, dt_limit, chunk, config)
