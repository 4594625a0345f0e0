"""Gradients of decay attention: states before and after every chunk, then all chunks side by side.

    S[c] before and dS[c] after each chunk: the states kernel, forwards and against time
    for each chunk and head of q, all at once:
        for each head h that shares it, E[t, j] = exp(b[t] - b[j]) for j <= t, W = E u[j]:
            P = scale * q k^T * W     Z = scale * dy v^T * W     a[j] = exp(b_n - b[j]) u[j]
            dv  = P^T dy + a * (k dS)
            dq += Z k + scale e^b * (dy S^T)          dk += Z^T q + a * (v dS^T)
            R = scale * dy v^T * E * q k^T            s[j] = exp(b_n - b[j]) k[j] dS v[j]
            du = colsum(R) + s                        di = u du
            db = rowsum(R u) - u colsum(R) + scale e^b * (q S dy) - u s
            dg[t] = sum of db from t on + sum(u s) + e^(b_n) <S, dS>

The sums for dg stay within a chunk, on values in float32: a sum of q dq - k dk over a sequence is
the same but for rounding, of which it is a difference. P^T and Z^T are products of their own: a
product that is transposed and multiplied again is miscompiled by Triton 3.4 to 3.7.0.
Heads of one q are added up in a program, and what several programs have by a second kernel.

Twin: pallas_kernels/decay_attention_bwd.py.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _lib
from .decay_attention_states import (
    decays,
    entering_states,
    find_span,
    inside,
    launch_states,
    most_spans,
    state_ptr,
    token_ptr,
    weights,
)


@triton.jit
def _decay_attention_grads_kernel(
    q_ptr,  # [T, Hq, K]
    k_ptr,  # [T, Hq, K]
    v_ptr,  # [T, H, V]
    b_ptr,  # [H, T] float32; if constant, g [H] or None: RetNet's
    u_ptr,  # [H, T] float32 or None
    D_ptr,  # [H] or [H, V] float32 or None
    cu_ptr,  # [B + 1] int32
    dy_ptr,  # [T, H, V]
    S_ptr,  # [slots, H, K, V]: before each chunk
    dS_ptr,  # [slots, H, K, V]: after each chunk
    dq_ptr,  # [splits, T, Hq, K]
    dk_ptr,  # [splits, T, Hq, K]
    dv_ptr,  # [T, H, V]
    dg_ptr,  # [T, H] float32; if constant, the sums [slots, H]; None without g
    du_ptr,  # [T, H] float32 or None: of u, or of log u
    dD_ptr,  # [slots, H, V] float32 or None
    T, B, H, Hq, slots, splits, heads, scale, stride_q, stride_k, stride_v, stride_dy,
    stride_qh: tl.constexpr, stride_kh: tl.constexpr, stride_vh: tl.constexpr,
    stride_dyh: tl.constexpr, stride_D: tl.constexpr, stride_Dv: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, chunk: tl.constexpr, block_k: tl.constexpr,
    block_v: tl.constexpr, block_b: tl.constexpr, constant: tl.constexpr, log_u: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    k = tl.arange(0, block_k)
    tile = tl.program_id(0)
    part, hq, p = tile % splits, tile // splits % Hq, tile // splits // Hq
    s, first, end, _, _, _ = find_span(cu_ptr, p, T, B, chunk, chunk, block_b)
    group = H // Hq
    head0 = hq * group + part * heads
    head1 = tl.minimum(head0 + heads, (hq + 1) * group)
    if (s < 0) | (first == end):  # sums over chunks meet zeros
        for h in tl.range(head0, head1):
            if constant and dg_ptr is not None:
                tl.store(dg_ptr + p.to(tl.int64) * H + h, 0.0)
            if dD_ptr is not None:
                for v0 in tl.range(0, V, block_v):
                    v = v0 + tl.arange(0, block_v)
                    at = dD_ptr + (p.to(tl.int64) * H + h) * V + v
                    tl.store(at, tl.zeros((block_v,), tl.float32), v < V)
        return
    lane = tl.arange(0, chunk)
    t = first + lane
    row = t.to(tl.int64)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    own = inside(t, end, k, K)
    q = tl.load(token_ptr(q_ptr, stride_q, stride_qh, t, hq, k), own, 0.0)  # [chunk, block_k]
    k_tile = tl.load(token_ptr(k_ptr, stride_k, stride_kh, t, hq, k), own, 0.0)
    kq = tl.dot(k_tile, q.T)  # [j, t]
    dq = tl.zeros((chunk, block_k), tl.float32)
    dk = tl.zeros((chunk, block_k), tl.float32)

    # --- 2. main loop
    for hi in tl.range(0, head1 - head0):
        h = head0 + hi
        b, b_n = decays(b_ptr, h, t, first, end, T, constant)
        u = weights(u_ptr, h, t, end, T)
        e, f = scale * tl.exp2(b), tl.exp2(b_n - b)
        seen = (lane[:, None] >= lane[None, :]) & (t < end)[:, None]  # [t, j]
        E = tl.exp2(tl.where(seen, b[:, None] - b[None, :], float("-inf")))
        seen_T = (lane[:, None] <= lane[None, :]) & (t < end)[None, :]  # [j, t]
        E_T = scale * tl.exp2(tl.where(seen_T, b[None, :] - b[:, None], float("-inf")))
        P_T = (kq * E_T * u[:, None]).to(dtype)
        dP = tl.zeros((chunk, chunk), tl.float32)
        dP_T = tl.zeros((chunk, chunk), tl.float32)
        dqS = tl.zeros((chunk, block_k), tl.float32)
        dkS = tl.zeros((chunk, block_k), tl.float32)
        both = tl.zeros((block_v,), tl.float32)
        for v0 in tl.range(0, V, block_v):
            v = v0 + tl.arange(0, block_v)
            exist = inside(t, end, v, V)
            v_tile = tl.load(token_ptr(v_ptr, stride_v, stride_vh, t, h, v), exist, 0.0)
            dy = tl.load(token_ptr(dy_ptr, stride_dy, stride_dyh, t, h, v), exist, 0.0)
            there = (k < K)[:, None] & (v < V)[None, :]
            S = tl.load(state_ptr(S_ptr, p, h, H, k, v, K, V), there, 0.0)
            dS = tl.load(state_ptr(dS_ptr, p, h, H, k, v, K, V), there, 0.0)
            dP = tl.dot(dy, v_tile.T, dP)
            dP_T = tl.dot(v_tile, dy.T, dP_T)
            dqS = tl.dot(dy, S.T, dqS)
            dkS = tl.dot(v_tile, dS.T, dkS)
            both += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 0)
            dv = tl.dot(k_tile, dS) * (f * u)[:, None]
            dv = tl.dot(P_T, dy, dv)
            if D_ptr is not None:
                D = tl.load(D_ptr + h * stride_D + v * stride_Dv, v < V, 0.0)
                dv += D[None, :] * dy.to(tl.float32)
                dD = tl.sum(dy.to(tl.float32) * v_tile.to(tl.float32), 0)
                tl.store(dD_ptr + (p.to(tl.int64) * H + h) * V + v, dD, v < V)
            tl.store(token_ptr(dv_ptr, H * V, V, t, h, v), dv.to(dtype), exist)

        # --- 3. epilogue
        Z = (scale * dP * E * u[None, :]).to(dtype)
        Z_T = (dP_T * E_T * u[:, None]).to(dtype)
        dq = tl.dot(Z, k_tile, dq + dqS * e[:, None])
        dk = tl.dot(Z_T, q, dk + dkS * (f * u)[:, None])
        R_T = dP_T * E_T * kq  # [j, t]
        du = tl.sum(R_T, 1)
        from_state = f * tl.sum(dkS * k_tile.to(tl.float32), 1)
        into_state = e * tl.sum(dqS * q.to(tl.float32), 1)
        by_row = tl.sum(R_T * u[:, None], 0)
        db = by_row - u * du + into_state - u * from_state
        total = tl.sum(u * from_state, 0) + tl.exp2(b_n) * tl.sum(both, 0)
        dg = tl.cumsum(db, 0, reverse=True) + total
        # --- 4. store
        if dg_ptr is not None:
            if constant:
                dg = tl.sum(tl.where(t < end, dg, 0.0), 0)
                tl.store(dg_ptr + p.to(tl.int64) * H + h, dg)
            else:
                tl.store(dg_ptr + row * H + h, dg, t < end)
        if du_ptr is not None:
            du += from_state
            if log_u:
                du *= u
            tl.store(du_ptr + row * H + h, du, t < end)
    at = token_ptr(dq_ptr + part.to(tl.int64) * T * Hq * K, Hq * K, K, t, hq, k)
    tl.store(at, dq.to(dq_ptr.dtype.element_ty), own)
    at = token_ptr(dk_ptr + part.to(tl.int64) * T * Hq * K, Hq * K, K, t, hq, k)
    tl.store(at, dk.to(dk_ptr.dtype.element_ty), own)


@triton.jit
def _decay_attention_sum_kernel(
    x_ptr,  # [N, W] float32
    y_ptr,  # [W]: the sum over the rows, in their order
    N, W, stride_n, stride_w, block_n: tl.constexpr, block_w: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    w = tl.program_id(0).to(tl.int64) * block_w + tl.arange(0, block_w)
    n = tl.arange(0, block_n)
    acc = tl.zeros((block_n, block_w), tl.float32)
    # --- 2. main loop
    for n0 in tl.range(0, N, block_n):
        at = (n0 + n).to(tl.int64)[:, None] * stride_n + w[None, :] * stride_w
        acc += tl.load(x_ptr + at, (n0 + n < N)[:, None] & (w < W)[None, :], 0.0)
    # --- 3. epilogue
    y = tl.sum(acc, 0)
    # --- 4. store
    tl.store(y_ptr + w, y.to(y_ptr.dtype.element_ty), w < W)


def sum_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of x [N, W] float32 over its first axis, always in the same order."""
    N, W = x.shape
    y = x.new_empty(W, dtype=dtype)
    block_n = min(64, _lib.power_of_2(N))  # few rows are long ones: a gradient's partial sums
    block_w = 2048 // block_n
    _decay_attention_sum_kernel[(_lib.cdiv(W, block_w),)](
        x, y, N, W, x.stride(0), x.stride(1), block_n, block_w, num_warps=4
    )
    return y


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

    splits = _lib.cdiv(H // Hq, grads.heads)
    wide = q.dtype if splits == 1 else torch.float32
    dq, dk = (q.new_empty(splits, T, Hq, K, dtype=wide) for _ in range(2))
    dv = v.new_empty(T, H, V)
    dg = v.new_empty(slots if constant else T, H, dtype=torch.float32)
    du = v.new_empty(T, H, dtype=torch.float32)
    dD = None if D is None else v.new_empty(slots, H, V, dtype=torch.float32)
    stride_D = (0, 0) if D is None else (D.stride(0), D.stride(1) if D.dim() == 2 else 0)
    block_v = min(grads.block_v, _lib.power_of_2(V))
    _decay_attention_grads_kernel[(slots * Hq * splits,)](
        q, k, v, decay[0], u, D, cu_seqlens, dy, *each, dq, dk, dv,
        dg if decay[0] is not None else None, None if u is None else du,
        dD, T, B, H, Hq, slots, splits, grads.heads, scale, q.stride(0), k.stride(0), v.stride(0),
        dy.stride(0), q.stride(1), k.stride(1), v.stride(1), dy.stride(1), *stride_D, K, V, chunk,
        _lib.power_of_2(K), block_v, max(16, _lib.power_of_2(B)), constant, log_u,
        num_warps=grads.warps, num_stages=grads.stages,
    )  # fmt: skip
    if splits > 1:
        dq, dk = (sum_rows(x.view(splits, -1), q.dtype) for x in (dq, dk))
    dq, dk = dq.view(T, Hq, K), dk.view(T, Hq, K)
    if constant and decay[0] is not None:
        dg = sum_rows(dg, torch.float32)
    if dD is not None:
        dD = sum_rows(dD.view(slots, H * V), torch.float32).view(H, V)
    return [dq, dk, dv, dg, du, dS0, dD]
