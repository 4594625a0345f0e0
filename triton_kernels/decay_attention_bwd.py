"""Gradients of decay attention: states before and after every chunk, then all chunks side by side.

    S[c] before and dS[c] after each chunk: the states kernel, forwards and against time
    for each chunk and head of q, all at once; for each head h that shares it:
        E[t, j] = exp(b[t] - b[j]) for j <= t, else 0; W = E u[j]; e = scale e^b; a = e^(b_n - b) u
    dq kernel:
        Z = scale * dy v^T * W
        dq += Z k + (e dy) S^T                      old = e dy . (q S)
                                                    rows = rowsum(Z * q k^T) + old
    dk and dv kernel, all transposed:
        P = scale * q k^T * W     Z as above
        dk += Z^T q + (a v) dS^T                    dv = P^T dy + a * (k dS)
        s = e^(b_n - b) v . (k dS)                  du = colsum(scale * dy v^T * E * q k^T) + s
        dg[t] = sum(old) + e^(b_n) <S, dS> - sum of (rows - u du) before t            di = u du

The sums for dg stay within a chunk, on values in float32: a sum of q dq - k dk over a sequence is
the same but for rounding, of which it is a difference. They begin at the chunk's first token, whose
gate decays nothing but the state that enters: without one, dg is 0 there, not what rounding leaves.
P^T and Z^T are products of their own: a product that is transposed and multiplied again is
miscompiled by Triton 3.4 to 3.7.0.
Heads of one q are added up in a program, and what several programs have by a further kernel.

Twin: pallas_kernels/decay_attention_bwd.py.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _lib
from .decay_attention_gates import sum_rows
from .decay_attention_states import (
    decayed,
    decayed_T,
    decays,
    entering_states,
    find_span,
    inside,
    launch_states,
    load_state,
    load_tokens,
    most_spans,
    operand,
    state_operand,
    store_tokens,
    tma_ready,
    token_ptr,
)


@triton.jit
def _decay_attention_dq_kernel(
    q_all,  # [T, Hq, K]: TMA descriptors that end at any token, or pointers
    k_all,  # [T, Hq, K]
    v_all,  # [T, H, V]
    dy_all,  # [T, H, V]
    S_all,  # [slots * H, K, V]: before each chunk
    b_ptr,  # [H, slots, (b, u), chunk] float32; if constant, g [H] or None: RetNet's
    u_ptr,  # as b_ptr; [H, slots, chunk] float32 if constant; None without u
    cu_ptr,  # [B + 1] int32
    dq_ptr,  # [splits, T, Hq, K]
    rows_ptr,  # [H, slots, chunk] float32, what of dg begins with a token's q; None without g
    old_ptr,  # [H, slots] float32, what of it ends with the state before the chunk
    T, B, slots, H, Hq, splits, heads, scale, stride_q, stride_k, stride_v, stride_dy,
    stride_qh: tl.constexpr, stride_kh: tl.constexpr, stride_vh: tl.constexpr,
    stride_dyh: tl.constexpr, K: tl.constexpr, V: tl.constexpr, chunk: tl.constexpr,
    block_k: tl.constexpr, block_v: tl.constexpr, block_b: tl.constexpr,
    constant: tl.constexpr, tma: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    tile = tl.program_id(0)
    part, hq, p = tile % splits, tile // splits % Hq, tile // splits // Hq
    s, t0, end, _, _, _ = find_span(cu_ptr, p, T, B, chunk, chunk, block_b)
    if (s < 0) | (t0 >= end):
        return
    group = H // Hq
    head0 = hq * group + part * heads
    count = tl.minimum(heads, group - part * heads)
    lane = tl.arange(0, chunk)
    q = load_tokens(q_all, stride_q, stride_qh, t0, end, hq, 0, K, chunk, block_k, tma)
    k_tile = load_tokens(k_all, stride_k, stride_kh, t0, end, hq, 0, K, chunk, block_k, tma)
    dq = tl.zeros((chunk, block_k), tl.float32)

    # --- 2. main loop
    for hi in tl.range(0, count, disable_licm=True):
        h = head0 + hi
        b, _b_n, u = decays(b_ptr, u_ptr, h, p, slots, end - t0, lane, constant)
        e = scale * tl.exp2(b)
        Z = tl.zeros((chunk, chunk), tl.float32)  # [t, j]
        old = tl.zeros((chunk,), tl.float32)
        if V <= block_v:  # without a loop within it, this one has tiles of the next head in flight
            v = load_tokens(v_all, stride_v, stride_vh, t0, end, h, 0, V, chunk, block_v, tma)
            dy = load_tokens(dy_all, stride_dy, stride_dyh, t0, end, h, 0, V, chunk, block_v, tma)
            S = load_state(S_all, p * H + h, 0, K, V, block_k, block_v, tma)
            Z, dq, old = _add_columns(q, v, dy, S, e, Z, dq, old, rows_ptr is not None)
        else:
            for v0 in tl.range(0, V, block_v):
                v = load_tokens(v_all, stride_v, stride_vh, t0, end, h, v0, V, chunk, block_v, tma)
                dy = load_tokens(
                    dy_all, stride_dy, stride_dyh, t0, end, h, v0, V, chunk, block_v, tma
                )
                S = load_state(S_all, p * H + h, v0, K, V, block_k, block_v, tma)
                Z, dq, old = _add_columns(q, v, dy, S, e, Z, dq, old, rows_ptr is not None)
        # --- 3. epilogue
        Z *= decayed(b, lane) * (scale * u)[None, :]
        dq = tl.dot(Z.to(k_tile.dtype), k_tile, dq)
        # --- 4. store
        if rows_ptr is not None:
            at = h.to(tl.int64) * slots + p
            tl.store(old_ptr + at, tl.sum(old, 0))
            rows = old + tl.sum(Z * tl.dot(q, k_tile.T), 1)
            tl.store(rows_ptr + at * chunk + lane, rows)
    k = tl.arange(0, block_k)
    at = token_ptr(dq_ptr + part.to(tl.int64) * T * Hq * K, Hq * K, K, t0 + lane, hq, k)
    tl.store(at, dq.to(dq_ptr.dtype.element_ty), inside(t0 + lane, end, k, K))


@triton.jit
def _add_columns(q, v, dy, S, e, Z, dq, old, gated: tl.constexpr):
    """(dy v^T, dq, e dy . (q S)) with what some columns of v add."""
    Z = tl.dot(dy, v.T, Z)
    weighted = dy.to(tl.float32) * e[:, None]
    dq = tl.dot(weighted.to(dy.dtype), S.T, dq)
    if gated:
        old += tl.sum(tl.dot(q, S) * weighted, 1)
    return Z, dq, old


@triton.jit
def _decay_attention_dkdv_kernel(
    q_all,  # [T, Hq, K]: TMA descriptors that end at any token, or pointers
    k_all,  # [T, Hq, K]
    v_all,  # [T, H, V]
    dy_all,  # [T, H, V]
    S_all,  # [slots * H, K, V]: before each chunk
    dS_all,  # [slots * H, K, V]: after each chunk
    b_ptr,  # [H, slots, (b, u), chunk] float32; if constant, g [H] or None: RetNet's
    u_ptr,  # as b_ptr; [H, slots, chunk] float32 if constant; None without u
    D_ptr,  # [H] or [H, V] float32 or None
    cu_ptr,  # [B + 1] int32
    rows_ptr,  # [H, slots, chunk] float32, from the dq kernel; None without g
    old_ptr,  # [H, slots] float32, from the dq kernel
    dk_ptr,  # [splits, T, Hq, K]
    dv_all,  # [T, H, V]
    dg_ptr,  # [T, H] float32, or sums [slots, H] if constant
    du_ptr,  # [T, H] float32 or None: of u, or of log u
    dD_ptr,  # [slots, H, V] float32 or None
    T, B, slots, H, Hq, splits, heads, scale, stride_q, stride_k, stride_v, stride_dy,
    stride_qh: tl.constexpr, stride_kh: tl.constexpr, stride_vh: tl.constexpr,
    stride_dyh: tl.constexpr, stride_D: tl.constexpr, stride_Dv: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, chunk: tl.constexpr, block_k: tl.constexpr,
    block_v: tl.constexpr, block_b: tl.constexpr, constant: tl.constexpr, log_u: tl.constexpr,
    tma: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    tile = tl.program_id(0)
    part, hq, p = tile % splits, tile // splits % Hq, tile // splits // Hq
    s, t0, end, _, _, _ = find_span(cu_ptr, p, T, B, chunk, chunk, block_b)
    if (s < 0) | (t0 >= end):
        return
    group = H // Hq
    head0 = hq * group + part * heads
    count = tl.minimum(heads, group - part * heads)
    lane = tl.arange(0, chunk)
    q = load_tokens(q_all, stride_q, stride_qh, t0, end, hq, 0, K, chunk, block_k, tma)
    k_tile = load_tokens(k_all, stride_k, stride_kh, t0, end, hq, 0, K, chunk, block_k, tma)
    dk = tl.zeros((chunk, block_k), tl.float32)

    # --- 2. main loop
    for hi in tl.range(0, count, disable_licm=True):
        h = head0 + hi
        b, b_n, u = decays(b_ptr, u_ptr, h, p, slots, end - t0, lane, constant)
        f = tl.exp2(b_n - b)
        Z = tl.zeros((chunk, chunk), tl.float32)  # [j, t]
        for v0 in tl.range(0, V, block_v):
            v = load_tokens(v_all, stride_v, stride_vh, t0, end, h, v0, V, chunk, block_v, tma)
            dy = load_tokens(dy_all, stride_dy, stride_dyh, t0, end, h, v0, V, chunk, block_v, tma)
            dS = load_state(dS_all, p * H + h, v0, K, V, block_k, block_v, tma)
            Z = tl.dot(v, dy.T, Z)
            weighted = v.to(tl.float32) * (f * u)[:, None]
            dk = tl.dot(weighted.to(v.dtype), dS.T, dk)
        E = decayed_T(b, lane) * scale
        P = tl.dot(k_tile, q.T) * E
        du = tl.sum(Z * P, 1)
        dk = tl.dot((Z * E * u[:, None]).to(q.dtype), q, dk)
        P = (P * u[:, None]).to(q.dtype)
        # a second walk over the same tiles, as registers do not suffice for one
        new, both = tl.zeros((chunk,), tl.float32), tl.zeros((block_v,), tl.float32)
        for v0 in tl.range(0, V, block_v):
            v = load_tokens(v_all, stride_v, stride_vh, t0, end, h, v0, V, chunk, block_v, tma)
            dy = load_tokens(dy_all, stride_dy, stride_dyh, t0, end, h, v0, V, chunk, block_v, tma)
            dS = load_state(dS_all, p * H + h, v0, K, V, block_k, block_v, tma)
            dv = tl.dot(k_tile, dS)
            if rows_ptr is not None:
                new += tl.sum(dv * v.to(tl.float32), 1)
                S = load_state(S_all, p * H + h, v0, K, V, block_k, block_v, tma)
                both += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 0)
            dv = tl.dot(P, dy, dv * (f * u)[:, None])
            if D_ptr is not None:
                c = v0 + tl.arange(0, block_v)
                D = tl.load(D_ptr + h * stride_D + c * stride_Dv, c < V, 0.0)
                dv += D[None, :] * dy.to(tl.float32)
                dD = tl.sum(dy.to(tl.float32) * v.to(tl.float32), 0)
                tl.store(dD_ptr + (p.to(tl.int64) * H + h) * V + c, dD, c < V)
            store_tokens(dv_all, dv, t0, end, h, v0, H, V, chunk, block_v, tma)
        # --- 3. epilogue
        if rows_ptr is not None:
            du += f * new
            at = h.to(tl.int64) * slots + p
            net = tl.load(rows_ptr + at * chunk + lane) - u * du
            dg = tl.load(old_ptr + at) + tl.exp2(b_n) * tl.sum(both, 0)
            dg -= tl.cumsum(net, 0) - net  # nothing at the first token
            # --- 4. store
            t = t0 + lane
            if constant:
                dg = tl.sum(tl.where(t < end, dg, 0.0), 0)
                tl.store(dg_ptr + p.to(tl.int64) * H + h, dg)
            else:
                tl.store(dg_ptr + t.to(tl.int64) * H + h, dg, t < end)
            if du_ptr is not None:
                if log_u:
                    du *= u
                tl.store(du_ptr + t.to(tl.int64) * H + h, du, t < end)
    k = tl.arange(0, block_k)
    at = token_ptr(dk_ptr + part.to(tl.int64) * T * Hq * K, Hq * K, K, t0 + lane, hq, k)
    tl.store(at, dk.to(dk_ptr.dtype.element_ty), inside(t0 + lane, end, k, K))


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: tuple[Tensor | None, bool],
    u: Tensor | None,
    log_u: bool,
    D: Tensor | None,
    S0: Tensor | None,
    cu_seqlens: Tensor,
    dy: Tensor,
    dS_T: Tensor | None,
    scale: float,
    chunk: int,
    states: Any,
    grads: Any,
    transposed: bool,
) -> list[Tensor]:
    """[dq, dk, dv, dg, du, dS0, dD]; decay, u and D as forward of decay_attention takes them.

    dg is [H] where g is constant; du [T, H] is the gradient of log u if log_u. They mean nothing
    where there is no g, no u. dD is [H, V], None without D. states, grads: a Config for the walks
    over states, and one for the rest.
    """
    (T, Hq, K), (H, V), B = q.shape, v.shape[1:], len(cu_seqlens) - 1
    slots, constant = most_spans(T, B, chunk), decay[1]
    span = _lib.cdiv(_lib.cdiv(T, states.spans), chunk) * chunk
    walk = states.block_v, states.stages, states.warps
    each = [v.new_empty(slots, H, K, V) for _ in range(2)]  # S before and dS after each chunk
    dS0 = v.new_empty(B, H, *((V, K) if transposed else (K, V)), dtype=torch.float32)
    ways = ((k, v, S0, None, False), (q, dy, dS_T, dS0, True))
    for (x, y, initial, leaves, reverse), kept in zip(ways, each, strict=True):
        given = x, y, decay, u, cu_seqlens
        options = span, scale, chunk, walk, transposed, reverse
        enters = entering_states(*given, initial, *options)
        launch_states(*given, enters, kept, leaves, None, *options)

    splits, block_b = _lib.cdiv(H // Hq, grads.heads), max(16, _lib.power_of_2(B))
    block_k, block_v = _lib.power_of_2(K), min(grads.block_v, _lib.power_of_2(V))
    tma = tma_ready(q, k, v, dy)
    dq, dk = (
        q.new_empty(splits, T, Hq, K, dtype=q.dtype if splits == 1 else torch.float32)
        for _ in range(2)
    )
    dv = v.new_empty(T, H, V)
    gated = decay[0] is not None
    rows, old = (
        v.new_empty(H, slots, *size, dtype=torch.float32) if gated else None
        for size in ((chunk,), ())
    )
    # sums over the chunks there are meet zeros in other slots
    dg = v.new_zeros(slots, H, dtype=torch.float32) if constant else rows_like(v)
    du = rows_like(v)
    dD = None if D is None else v.new_zeros(slots, H, V, dtype=torch.float32)
    stride_D = (0, 0) if D is None else (D.stride(0), D.stride(1) if D.dim() == 2 else 0)
    keys = [operand(x, chunk, block_k, tma) for x in (q, k)]

    def tiles(block_v: int, *states: Tensor) -> list[Any]:
        values = [operand(x, chunk, block_v, tma) for x in (v, dy)]
        return keys + values + [state_operand(x, block_k, block_v, tma) for x in states]

    # dq's registers have room for all of a short v
    short = max(block_v, min(64, _lib.power_of_2(V)))
    sizes = (
        T, B, slots, H, Hq, splits, grads.heads, scale, *(x.stride(0) for x in (q, k, v, dy)),
        *(x.stride(1) for x in (q, k, v, dy)),
    )  # fmt: skip
    resources = {"num_warps": grads.warps, "num_stages": grads.stages}
    grid = (slots * Hq * splits,)
    _decay_attention_dq_kernel[grid](
        *tiles(short, each[0]), decay[0], u, cu_seqlens, dq, rows, old, *sizes, K, V, chunk,
        block_k, short, block_b, constant, tma, **resources,
    )  # fmt: skip
    _decay_attention_dkdv_kernel[grid](
        *tiles(block_v, *each), decay[0], u, D, cu_seqlens, rows, old, dk,
        operand(dv, chunk, block_v, tma), dg, None if u is None else du, dD, *sizes, *stride_D, K,
        V, chunk, block_k, block_v, block_b, constant, log_u, tma, **resources,
    )  # fmt: skip
    if splits > 1:
        dq, dk = (sum_rows(x.view(splits, -1), q.dtype) for x in (dq, dk))
    dq, dk = dq.view(T, Hq, K), dk.view(T, Hq, K)
    if constant and gated:
        dg = sum_rows(dg, torch.float32)
    if dD is not None:
        dD = sum_rows(dD.view(slots, H * V), torch.float32).view(H, V)
    return [dq, dk, dv, dg, du, dS0, dD]


def rows_like(v: Tensor) -> Tensor:
    """Room for a number of each token and head of v."""
    return v.new_empty(v.shape[:2], dtype=torch.float32)


def bwd_tiles(ask: Callable[[str], Any], config: Any | None) -> tuple[Any, Any]:
    """Configs of a backward, of the walks over states and of the rest: `config`, or what a
    default_config answers, asked for "states" and for "grads"."""
    return config or ask("states"), config or ask("grads")
