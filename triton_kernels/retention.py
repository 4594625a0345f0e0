"""RetNet's retention over packed sequences: decay attention with a fixed decay for each head.

    S[t] = gamma[h] * S[t-1] + k[t] v[t]^T      gamma[h] = 1 - 2^(-5 - h)
    y[t] = scale * q[t]^T S[t]                  scale: K^-1/2 unless it is given
    q, k [T, H, K]   v [T, H, V]   S0 [B, H, K, V]   ->   y [T, H, V], S_T [B, H, K, V]

    decay_attention with g[h] = log(gamma[h]), which its kernels make themselves, and without i

Backward, where no gate wants a gradient: the attention of other operands, twice against time
    dq = attention(dy, v, k), from S0^T    dk = adjoint(v, dy, q), from dS_T^T
    dv = adjoint(k, q, dy), from dS_T; what leaves it is dS0
which stores no states; with more than 128 keys or values, decay_attention's.

Limits: as decay_attention's. Rotations of q and k, the norm of y and its gate are outside.

Twin: pallas_kernels/retention.py.

Sources: RetNet (arXiv:2307.08621), without the normalisations that its group norm cancels.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _lib
from .decay_attention import Config as _CoreConfig
from .decay_attention import _launch
from .decay_attention import default_config as _core_config
from .decay_attention_bwd import backward, bwd_tiles
from .decay_attention_states import check_states, check_tokens, heads_adjacent


@dataclass(frozen=True)
class Config(_CoreConfig):
    """As decay_attention's."""


def default_config(
    T: int, B: int, H: int, K: int, V: int, dtype: torch.dtype, which: str = "fwd"
) -> Config:
    """The Config for T tokens in B sequences; which: "fwd", "states" or "grads" (of a backward)."""
    return Config(*_lib.fields(_core_config(T, B, H, H, K, V, dtype, which)))


def _sizes(q: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Any, ...]:
    """What default_config wants to know first."""
    return len(q), len(cu_seqlens) - 1, *v.shape[1:2], q.shape[2], v.shape[2], v.dtype


def _fake_fwd(q, k, v, S0, cu_seqlens, scale, chunk, config):
    T, H, V = v.shape
    states = len(cu_seqlens) - 1, H, q.shape[2], V
    return [v.new_empty(T, H, V), v.new_empty(states, dtype=torch.float32)]


@_lib.opaque("retention_fwd", _fake_fwd)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    S0: Tensor | None,
    cu_seqlens: Tensor,
    scale: float,
    chunk: int,
    config: list[int] | None,
) -> list[Tensor]:
    """[y, S_T]."""
    y, S_T = _fake_fwd(q, k, v, S0, cu_seqlens, scale, chunk, config)
    if 0 in q.shape or 0 in v.shape or 0 in S_T.shape:
        return [y.zero_(), S_T.zero_() if S0 is None else S_T.copy_(S0)]
    q, k, v = map(heads_adjacent, (q, k, v))
    S0, cu_seqlens = None if S0 is None else S0.contiguous(), cu_seqlens.contiguous()
    tiles = Config(*config) if config else default_config(*_sizes(q, v, cu_seqlens))
    with _lib.on_device(v):
        _lib.check_gpu()
        gates = (None, True), None, None
        return _launch(q, k, v, *gates, S0, cu_seqlens, scale, chunk, tiles, False)


def _fake_bwd(q, k, v, S0, cu_seqlens, dy, dS_T, scale, chunk, config):
    states = len(cu_seqlens) - 1, v.shape[1], q.shape[2], v.shape[2]
    rows = [x.new_empty(x.shape) for x in (q, k, v)]
    return [*rows, v.new_empty(states, dtype=torch.float32)]


@_lib.opaque("retention_bwd", _fake_bwd)
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    S0: Tensor | None,
    cu_seqlens: Tensor,
    dy: Tensor,
    dS_T: Tensor | None,
    scale: float,
    chunk: int,
    config: list[int] | None,
) -> list[Tensor]:
    """[dq, dk, dv, dS0]."""
    *rows, dS0 = _fake_bwd(q, k, v, S0, cu_seqlens, dy, dS_T, scale, chunk, config)
    if 0 in q.shape or 0 in v.shape or 0 in dS0.shape:
        return [*(x.zero_() for x in rows), dS0.zero_() if dS_T is None else dS0.copy_(dS_T)]
    q, k, v, dy = map(heads_adjacent, (q, k, v, dy))
    S0, dS_T = (None if x is None else x.contiguous() for x in (S0, dS_T))
    cu_seqlens = cu_seqlens.contiguous()

    def attention(q: Tensor, k: Tensor, v: Tensor, S: Tensor | None, *way: bool) -> list[Tensor]:
        tiles = Config(*config) if config else default_config(*_sizes(q, v, cu_seqlens))
        gates = (None, True), None, None
        return _launch(q, k, v, *gates, S, cu_seqlens, scale, chunk, tiles, *way)

    with _lib.on_device(v):
        _lib.check_gpu()
        if max(q.shape[2], v.shape[2]) <= 128:
            dq, _ = attention(dy, v, k, S0, True, False)
            dk, _ = attention(v, dy, q, dS_T, True, True)
            return [dq, dk, *attention(k, q, dy, dS_T, False, True)]
        ask = functools.partial(default_config, *_sizes(q, v, cu_seqlens))
        tiles = bwd_tiles(ask, Config(*config) if config else None)
        gates = (None, True), None, False, None
        dq, dk, dv, _, _, dS0, _ = backward(
            q, k, v, *gates, S0, cu_seqlens, dy, dS_T, scale, chunk, *tiles, False
        )
    return [dq, dk, dv, dS0]


def _check(q, k, v, S0, cu_seqlens, scale, chunk, config) -> float:
    check_tokens({"q": q, "k": k, "v": v}, chunk)
    _lib.check_tensor("q", q, (q.shape[0], v.shape[1], q.shape[2]), (v.dtype,))
    check_states(q, v, cu_seqlens, S0=S0)
    _lib.check_same_device(q=q, k=k, v=v, S0=S0, cu_seqlens=cu_seqlens)
    _lib.check_config(config, Config)
    if scale is None:
        return q.shape[2] ** -0.5 if q.shape[2] else 1.0
    _lib.check_static("scale", scale, (float, int))
    return float(scale)


def retention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    S0: Tensor | None,
    cu_seqlens: Tensor,
    *,
    scale: float | None = None,
    chunk: int = 64,
    config: Config | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, ...]]:
    """retention and what its backward needs. No gradient flows through this.

    Returns ((y, S_T), (q, k, v, S0, cu_seqlens)).
    """
    factor = _check(q, k, v, S0, cu_seqlens, scale, chunk, config)
    y, S_T = _forward(q, k, v, S0, cu_seqlens, factor, chunk, _lib.fields(config))
    return (y, S_T), (q, k, v, S0, cu_seqlens)


def retention_bwd(
    res: tuple[Tensor | None, ...],
    dy: Tensor,
    dS_T: Tensor | None = None,
    *,
    scale: float | None = None,
    chunk: int = 64,
    config: Config | None = None,
) -> tuple[Tensor, ...]:
    """Gradients (dq, dk [T, H, K], dv [T, H, V] in their dtypes), and dS0 [B, H, K, V] float32 if
    there was an S0. The same inputs give the same bits.

    res: as retention_fwd returns it. dy [T, H, V], dS_T [B, H, K, V] float32: cotangents of y and
    S_T; dS_T None is zero.
    """
    q, k, v, S0, cu_seqlens = res
    factor = _check(q, k, v, S0, cu_seqlens, scale, chunk, config)
    _lib.check_tensor("dy", dy, tuple(v.shape), (v.dtype,))
    check_states(q, v, cu_seqlens, dS_T=dS_T)
    _lib.check_same_device(q=q, dy=dy, dS_T=dS_T)
    grads = _backward(*res, dy, dS_T, factor, chunk, _lib.fields(config))
    return tuple(grads[: 3 + (S0 is not None)])


class _Retention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, S0, cu_seqlens, scale, chunk, config):
        options = {"scale": scale, "chunk": chunk}
        out, res = retention_fwd(q, k, v, S0, cu_seqlens, **options, config=config)
        ctx.save_for_backward(*res)
        ctx.set_materialize_grads(False)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dS_T):
        res = ctx.saved_tensors
        if dy is None:  # only S_T was used
            dy = torch.zeros_like(res[2])
        grads = (*retention_bwd(res, dy, dS_T, **ctx.options), None)[:4]
        needed = zip(grads, ctx.needs_input_grad, strict=False)
        return *(g if need else None for g, need in needed), None, None, None, None


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    S0: Tensor | None,
    cu_seqlens: Tensor,
    *,
    scale: float | None = None,
    chunk: int = 64,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """y [T, H, V] = scale * q S, and the last states S_T [B, H, K, V]: S is the state before, times
    1 - 2^(-5 - h), and k v^T. Differentiable once.

    q, k [T, H, K], v [T, H, V]: bfloat16 or float16, the same; y has their dtype. B sequences lie
    one after the other, the tokens of sequence s from cu_seqlens[s] on. cu_seqlens [B + 1] int32,
    from 0 to T, is read on the device alone: decay_attention_check looks at what it holds. S0
    [B, H, K, V] float32: the states before the first tokens; None is zero.
    scale: K^-1/2 by default. chunk, config: as in decay_attention.

    Raises TypeError for dtypes and ValueError for shapes and devices that do not fit, naming the
    argument; NotImplementedError on a GPU older than Ampere.
    """
    return _Retention.apply(q, k, v, S0, cu_seqlens, scale, chunk, config)
