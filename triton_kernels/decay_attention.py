"""Decay linear attention over packed sequences, with a state that enters and one that leaves.

    S[t] = exp(g[t]) S[t-1] + exp(i[t]) k[t] v[t]^T        y[t] = scale * q[t]^T S[t]
    q, k [T, Hq, K]   v [T, H, V]   g [T, H] or [H]   i [T, H]   ->   y [T, H, V], S_T [B, H, K, V]

    for each chunk of a sequence, S being the state before it, b the sums of g within the chunk:
        W[t, j] = exp(b[t] - b[j] + i[j]) for j <= t, else 0        exponents are masked before exp
        y = scale * ((q k^T * W) v + e^b * (q S))
        S = e^(b_n) S + k^T (e^(b_n - b + i) * v)

    Few long sequences are cut into spans of chunks, to fill the GPU: what every span adds to a
    state; a scan over the spans of a sequence; then the walk above from the state that enters.

Backward, per chunk, from the states S before and dS after it: decay_attention_bwd.py.

exp(i) is a weight u that multiplies: nothing is divided by it, so that an adapter may have u = 0.
Sums of g never leave their chunk, and exp(-b) is never formed. q k^T * W, the weighted v, and S
where q multiplies it are rounded to the input dtype; the state stays in float32.
Nothing depends on what cu_seqlens holds but the work; a state never passes from one sequence to
another, be it NaN.

Limits: from Ampere up; bfloat16, float16; gates and states float32, gates finite; K and V multiples
of 16, K at most 256.

Twin: pallas_kernels/decay_attention.py.

Sources: the chunked form of RetNet (arXiv:2307.08621), Mamba-2 (arXiv:2405.21060) and GLA
(arXiv:2312.06635).
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
from .decay_attention_bwd import backward, bwd_tiles
from .decay_attention_gates import gates
from .decay_attention_states import (
    check_gates,
    check_states,
    check_tokens,
    constant_decay,
    decayed,
    decayed_T,
    decays,
    entering_states,
    find_span,
    heads_adjacent,
    load_tokens,
    most_spans,
    operand,
    state_ptr,
    store_tokens,
    tma_ready,
)
from .linear_scan import linear_scan_check


@dataclass(frozen=True)
class Config:
    """Tile sizes and resources of the kernels; beyond the last bits the result ignores them.

    block_v: columns of v of a program, and of a step of the gradients' walk over v.
    spans: into how many parts time is cut, each of whose sequences is a program's; 1: sequences
        stay whole and k and v are read just once.
    heads: of those that share a head of q, how many a program of the gradients adds up.
    stages: tiles in flight.
    warps: warps of a program.
    """

    block_v: int = 64
    spans: int = 1
    heads: int = 1
    stages: int = 2
    warps: int = 4

    def __post_init__(self) -> None:
        if self.block_v < 16 or self.block_v & (self.block_v - 1):
            raise ValueError(f"block_v: expected a power of two >= 16, got {self.block_v}")
        for name in ("spans", "heads", "stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"warps: expected a power of two <= 16, got {self.warps}")


def default_config(
    T: int, B: int, Hq: int, H: int, K: int, V: int, dtype: torch.dtype, which: str = "fwd"
) -> Config:
    """The Config for T tokens in B sequences; which: "fwd", "states" or "grads" (of a backward)."""
    warps = 8 if K > 128 else 4
    if which == "grads":
        # Heads that share q and k share one sum of their gradients: as many in a program as leave
        # eight programs for each multiprocessor. Walks of two steps at least take fewer registers.
        splits = _lib.cdiv(8 * 132, (_lib.cdiv(T, 64) + B) * Hq)
        return Config(32 if V <= 64 else 64, 1, _lib.cdiv(H // Hq, splits), 2, warps)
    block_v, stages = min(64, _lib.power_of_2(V)), 2
    if which == "fwd" and K <= 128 and V > 64:  # q and k are read half as often, and further ahead
        block_v, stages, warps = 128, 3, 8
    programs = B * H * _lib.cdiv(V, block_v)
    if which == "states":
        programs *= _lib.cdiv(K, 128)
    # A span more reads k and v once more: only where most multiprocessors would have no program.
    # Two programs of 4 warps, or one of 8, are on a multiprocessor; two rounds of them.
    spans = 1 if programs >= 120 else (4 if warps == 4 else 2) * 132 // programs
    return Config(block_v, max(1, min(spans, T // 512)), 1, stages, warps)


@triton.jit
def _decay_attention_fwd_kernel(
    q_all,  # [T, Hq, K]: a TMA descriptor that ends at any token, or a pointer
    k_all,  # [T, Hq, K]
    v_all,  # [T, H, V]
    b_ptr,  # [H, slots, (b, u), chunk] float32; if constant, g [H] or None: RetNet's
    u_ptr,  # as b_ptr; [H, slots, chunk] float32 if constant; None without u
    D_ptr,  # [H] float32 or None: y += D v
    cu_ptr,  # [B + 1] int32
    enters_ptr,  # [spans, H, K, V] float32 or None
    y_all,  # [T, H, V]
    S_T_ptr,  # [B, H, K, V] float32
    T, B, span, slots, H, group, scale, stride_q, stride_k, stride_v,
    stride_qh: tl.constexpr, stride_kh: tl.constexpr, stride_vh: tl.constexpr,
    stride_D: tl.constexpr, stride_Dv: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    chunk: tl.constexpr, block_k: tl.constexpr, block_v: tl.constexpr, block_b: tl.constexpr,
    constant: tl.constexpr, transposed: tl.constexpr, reverse: tl.constexpr, tma: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    num_v: tl.constexpr = (V + block_v - 1) // block_v
    k = tl.arange(0, block_k)
    tile = tl.program_id(0)
    v0 = tile % num_v * block_v
    v = v0 + tl.arange(0, block_v)
    h = tile // num_v % H
    p = tile // num_v // H
    s, first, end, begins, ends, slot = find_span(cu_ptr, p, T, B, span, chunk, block_b)
    if s < 0:
        return
    exist = (k < K)[:, None] & (v < V)[None, :]
    S = tl.zeros((block_k, block_v), tl.float32)
    if enters_ptr is not None:
        S = tl.load(state_ptr(enters_ptr, p, h, H, k, v, K, V, transposed), exist, 0.0)
    # Up to 128 keys all is transposed: the state is multiplied from registers, no product is made
    # twice by eight warps. The copy of a larger one is in shared memory, for want of registers.
    in_registers: tl.constexpr = block_k <= 128
    if in_registers:
        S = S.T
    s = tl.where(begins if reverse else ends, s, -1)
    if D_ptr is not None and stride_Dv == 0:
        D = tl.load(D_ptr + h * stride_D)
    lane = tl.arange(0, chunk)
    if constant:  # the same in every chunk
        g = constant_decay(b_ptr, h) * lane
        always = decayed_T(g, lane) if in_registers and not reverse else decayed(g, lane)

    # --- 2. main loop
    chunks = tl.cdiv(end - first, chunk)
    for c in tl.range(0, chunks, disable_licm=True):
        ci = chunks - 1 - c if reverse else c
        t0 = first + ci * chunk
        hq = h // group
        q = load_tokens(q_all, stride_q, stride_qh, t0, end, hq, 0, K, chunk, block_k, tma)
        k_tile = load_tokens(k_all, stride_k, stride_kh, t0, end, hq, 0, K, chunk, block_k, tma)
        n = tl.minimum(end - t0, chunk)
        b, b_n, u = decays(b_ptr, u_ptr, h, slot + ci, slots, n, lane, constant)
        before, after = scale * tl.exp2(b), tl.exp2(b_n - b) * u  # from S to y, from k v^T to S
        if reverse:
            before, after = after, before

        # (in this order, v as late as can be, all fits into registers)
        if in_registers:
            p_tile = tl.dot(k_tile, q.T)  # [j, t]
            if reverse:
                p_tile *= always if constant else decayed(b, lane)
                p_tile *= (scale * u)[None, :]
            else:
                p_tile *= always if constant else decayed_T(b, lane)
                p_tile *= (scale * u)[:, None]
            p_tile = p_tile.to(q.dtype)
            acc = tl.dot(S.to(q.dtype), q.T) * before[None, :]  # [block_v, t]
            v_tile = load_tokens(v_all, stride_v, stride_vh, t0, end, h, v0, V, chunk, block_v, tma)
            acc = tl.dot(v_tile.T, p_tile, acc).T
            v_weighted = (v_tile.T.to(tl.float32) * after[None, :]).to(v_tile.dtype)
            S = tl.dot(v_weighted, k_tile, S * tl.exp2(b_n))
        else:
            tl.static_assert(not reverse)
            p_tile = tl.dot(q, k_tile.T)  # [t, j]
            p_tile *= always if constant else decayed(b, lane)
            p_tile *= (scale * u)[None, :]
            old = tl.dot(q, S.to(q.dtype)) * before[:, None]  # [t, block_v]
            v_tile = load_tokens(v_all, stride_v, stride_vh, t0, end, h, v0, V, chunk, block_v, tma)
            # (a sum would become one product upon the other, made by all warps twice)
            acc = tl.fma(tl.dot(p_tile.to(v_tile.dtype), v_tile), 1.0, old)
            v_weighted = (v_tile.to(tl.float32) * after[:, None]).to(v_tile.dtype)
            S = tl.dot(k_tile.T, v_weighted, S * tl.exp2(b_n))

        # --- 3. epilogue
        if D_ptr is not None:
            if stride_Dv != 0:
                D = tl.load(D_ptr + h * stride_D + v * stride_Dv, v < V, 0.0)[None, :]
            acc += D * v_tile.to(tl.float32)
        # --- 4. store
        store_tokens(y_all, acc, t0, end, h, v0, H, V, chunk, block_v, tma)
    if in_registers:
        S = S.T
    if s >= 0:
        tl.store(state_ptr(S_T_ptr, s, h, H, k, v, K, V, transposed), S, exist)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: tuple[Tensor | None, bool],
    u: Tensor | None,
    D: Tensor | None,
    S0: Tensor | None,
    cu_seqlens: Tensor,
    scale: float,
    chunk: int,
    tiles: Config,
    transposed: bool,
    reverse: bool = False,
) -> list[Tensor]:
    """[y, S_T] with decays and weights as gates makes them, or decays (None, True): RetNet's. D [H]
    or [H, V]: y += D v. States are [B, H, V, K] if transposed. reverse: the adjoint, against time,
        dS[t] = scale * k[t] v[t]^T + exp(g[t+1]) dS[t+1]        y[t] = exp(i[t]) * q[t]^T dS[t]
    S0 what comes from beyond a sequence's end, S_T what leaves its beginning; K at most 128."""
    (T, Hq, K), (H, V), B = q.shape, v.shape[1:], len(cu_seqlens) - 1
    y = v.new_empty(T, H, V)
    S_T = v.new_empty(B, H, *((V, K) if transposed else (K, V)), dtype=torch.float32)
    span = _lib.cdiv(_lib.cdiv(T, tiles.spans), chunk) * chunk
    block_k, block_v = _lib.power_of_2(K), min(tiles.block_v, _lib.power_of_2(V))
    walk = tiles.block_v, tiles.stages, tiles.warps
    weight = scale if reverse else 1.0
    enters = entering_states(
        k, v, decay, u, cu_seqlens, S0, span, weight, chunk, walk, transposed, reverse
    )
    stride_D = (0, 0) if D is None else (D.stride(0), D.stride(1) if D.dim() == 2 else 0)
    tma = tma_ready(q, k, v)
    tokens = (operand(x, chunk, block_k, tma) for x in (q, k))
    _decay_attention_fwd_kernel[(most_spans(T, B, span) * H * _lib.cdiv(V, block_v),)](
        *tokens, operand(v, chunk, block_v, tma), decay[0], u, D, cu_seqlens, enters,
        operand(y, chunk, block_v, tma), S_T, T, B, span, most_spans(T, B, chunk), H, H // Hq,
        scale, q.stride(0), k.stride(0), v.stride(0), q.stride(1), k.stride(1), v.stride(1),
        *stride_D, K, V, chunk, block_k, block_v, max(16, _lib.power_of_2(B)), decay[1],
        transposed, reverse, tma,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return [y, S_T]


def _fake_fwd(q, k, v, g, i, S0, cu_seqlens, scale, chunk, config):
    T, H, V = v.shape
    states = len(cu_seqlens) - 1, H, q.shape[2], V
    return [v.new_empty(T, H, V), v.new_empty(states, dtype=torch.float32)]


@_lib.opaque("decay_attention_fwd", _fake_fwd)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    i: Tensor | None,
    S0: Tensor | None,
    cu_seqlens: Tensor,
    scale: float,
    chunk: int,
    config: list[int] | None,
) -> list[Tensor]:
    """[y, S_T]."""
    y, S_T = _fake_fwd(q, k, v, g, i, S0, cu_seqlens, scale, chunk, config)
    if 0 in q.shape or 0 in v.shape or 0 in S_T.shape:
        return [y.zero_(), S_T.zero_() if S0 is None else S_T.copy_(S0)]
    q, k, v = map(heads_adjacent, (q, k, v))
    S0, cu_seqlens = None if S0 is None else S0.contiguous(), cu_seqlens.contiguous()
    with _lib.on_device(v):
        _lib.check_gpu()
        decay, u = gates(g, i, cu_seqlens, chunk)
        tiles = Config(*config) if config else default_config(*_sizes(q, v, cu_seqlens))
        return _launch(q, k, v, decay, u, None, S0, cu_seqlens, scale, chunk, tiles, False)


def _fake_bwd(q, k, v, g, i, S0, cu_seqlens, dy, dS_T, scale, chunk, config):
    T, H, V = v.shape
    states = len(cu_seqlens) - 1, H, q.shape[2], V
    small = [g.new_empty(g.shape), g.new_empty(T, H), v.new_empty(states, dtype=torch.float32)]
    return [q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *small]


@_lib.opaque("decay_attention_bwd", _fake_bwd)
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    i: Tensor | None,
    S0: Tensor | None,
    cu_seqlens: Tensor,
    dy: Tensor,
    dS_T: Tensor | None,
    scale: float,
    chunk: int,
    config: list[int] | None,
) -> list[Tensor]:
    """[dq, dk, dv, dg, di, dS0]."""
    found = _fake_bwd(q, k, v, g, i, S0, cu_seqlens, dy, dS_T, scale, chunk, config)
    if 0 in q.shape or 0 in v.shape or len(cu_seqlens) == 1:
        if dS_T is not None:
            found[-1].copy_(dS_T)
        return [x.zero_() for x in found[:-1]] + [
            found[-1] if dS_T is not None else found[-1].zero_()
        ]
    q, k, v, dy = map(heads_adjacent, (q, k, v, dy))
    S0, dS_T = (None if x is None else x.contiguous() for x in (S0, dS_T))
    cu_seqlens = cu_seqlens.contiguous()
    with _lib.on_device(v):
        _lib.check_gpu()
        decay, u = gates(g, i, cu_seqlens, chunk)
        ask = functools.partial(default_config, *_sizes(q, v, cu_seqlens))
        tiles = bwd_tiles(ask, Config(*config) if config else None)
        *grads, _ = backward(
            q, k, v, decay, u, i is not None, None, S0, cu_seqlens, dy, dS_T, scale, chunk,
            *tiles, False,
        )  # fmt: skip
    return grads


def _sizes(q: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Any, ...]:
    """What default_config wants to know first."""
    (T, Hq, K), (H, V) = q.shape, v.shape[1:]
    return T, len(cu_seqlens) - 1, Hq, H, K, V, v.dtype


def _check(q, k, v, g, i, S0, cu_seqlens, scale, chunk, config) -> None:
    check_tokens({"q": q, "k": k, "v": v}, chunk)
    check_gates(g, i, *v.shape[:2])
    check_states(q, v, cu_seqlens, S0=S0)
    _lib.check_same_device(q=q, k=k, v=v, g=g, i=i, S0=S0, cu_seqlens=cu_seqlens)
    _lib.check_static("scale", scale, (float, int))
    _lib.check_config(config, Config)


def decay_attention_check(cu_seqlens: Tensor, *, T: int) -> None:
    """Raises ValueError if cu_seqlens [B + 1] does not grow from 0 to T; it waits for the device.

    The kernels do not: what they then return is not defined, but they stay inside their arrays.
    """
    linear_scan_check(cu_seqlens, T=T)


def decay_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    i: Tensor | None,
    S0: Tensor | None,
    cu_seqlens: Tensor,
    *,
    scale: float = 1.0,
    chunk: int = 64,
    config: Config | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, ...]]:
    """decay_attention and what its backward needs. No gradient flows through this.

    Returns ((y, S_T), (q, k, v, g, i, S0, cu_seqlens)).
    """
    _check(q, k, v, g, i, S0, cu_seqlens, scale, chunk, config)
    y, S_T = _forward(q, k, v, g, i, S0, cu_seqlens, float(scale), chunk, _lib.fields(config))
    return (y, S_T), (q, k, v, g, i, S0, cu_seqlens)


def decay_attention_bwd(
    res: tuple[Tensor | None, ...],
    dy: Tensor,
    dS_T: Tensor | None = None,
    *,
    scale: float = 1.0,
    chunk: int = 64,
    config: Config | None = None,
) -> tuple[Tensor, ...]:
    """Gradients (dq, dk [T, Hq, K], dv [T, H, V] in their dtypes, dg float32 in g's shape), then di
    [T, H] float32 if there was an i, dS0 [B, H, K, V] float32 if there was an S0.

    res: as decay_attention_fwd returns it. dy [T, H, V], dS_T [B, H, K, V] float32: cotangents of y
    and S_T; dS_T None is zero. The same inputs give the same bits: all sums have an order that only
    sizes and config decide.
    """
    q, k, v, g, i, S0, cu_seqlens = res
    _check(q, k, v, g, i, S0, cu_seqlens, scale, chunk, config)
    _lib.check_tensor("dy", dy, tuple(v.shape), (v.dtype,))
    check_states(q, v, cu_seqlens, dS_T=dS_T)
    _lib.check_same_device(q=q, dy=dy, dS_T=dS_T)
    *grads, di, dS0 = _backward(*res, dy, dS_T, float(scale), chunk, _lib.fields(config))
    further = ((i, di), (S0, dS0))
    return (*grads, *(dx for x, dx in further if x is not None))


class _DecayAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, i, S0, cu_seqlens, scale, chunk, config):
        options = {"scale": scale, "chunk": chunk}
        out, res = decay_attention_fwd(q, k, v, g, i, S0, cu_seqlens, **options, config=config)
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
        found = iter(decay_attention_bwd(res, dy, dS_T, **ctx.options))
        grads = [None if x is None else next(found) for x in res[:6]]
        needed = zip(grads, ctx.needs_input_grad, strict=False)
        return *(g if need else None for g, need in needed), None, None, None, None


def decay_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    i: Tensor | None,
    S0: Tensor | None,
    cu_seqlens: Tensor,
    *,
    scale: float = 1.0,
    chunk: int = 64,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """y [T, H, V] = scale * q S, and the last states S_T [B, H, K, V]: S is what is left of the
    state before, S * exp(g), and exp(i) * k v^T. Differentiable once.

    q, k [T, Hq, K], v [T, H, V]: bfloat16 or float16, the same; y has their dtype. Heads
    h * H / Hq and on of v share head h of q and k. Strided views, as of a fused projection, cost no
    copy. g [T, H] float32, or [H], the same at all times: logarithms of decays, not above 0. i
    [T, H] float32: logarithms of what a token weighs; None is zero.
    B sequences lie one after the other, the tokens of sequence s from cu_seqlens[s] on. cu_seqlens
    [B + 1] int32, from 0 to T, is read on the device alone: decay_attention_check looks at what it
    holds. S0 [B, H, K, V] float32: the states before the first tokens; None is zero.
    chunk: 16, 32 or 64 tokens, cut from the start of each sequence: what products over tokens
    take at once, so that it decides the rounding. config: tiles of this call; gradients take their
    own defaults.

    Raises TypeError for dtypes and ValueError for shapes and devices that do not fit, naming the
    argument; NotImplementedError on a GPU older than Ampere.
    """
    return _DecayAttention.apply(q, k, v, g, i, S0, cu_seqlens, scale, chunk, config)
