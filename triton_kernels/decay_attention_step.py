"""One token of decay attention for each of many sequences: what a model that writes text does.

    S' = exp(g) S + exp(i) k v^T        y = scale * q^T S'

    for each sequence, head and tile of v: the state once through registers, in float32

Limits: as decay_attention's. No gradient.

Twin: pallas_kernels/decay_attention_step.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _lib
from .decay_attention_states import check_gates, check_tokens, heads_adjacent, state_ptr


@triton.jit
def _decay_attention_step_kernel(
    q_ptr,  # [B, Hq, K]
    k_ptr,  # [B, Hq, K]
    v_ptr,  # [B, H, V]
    g_ptr,  # [B, H] float32, or [H] if constant
    i_ptr,  # [B, H] float32 or None
    S_ptr,  # [B, H, K, V] float32
    y_ptr,  # [B, H, V]
    S_next_ptr,  # [B, H, K, V] float32
    H, group, scale, stride_q, stride_k, stride_v, stride_g, stride_i,
    stride_qh: tl.constexpr, stride_kh: tl.constexpr, stride_vh: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, block_k: tl.constexpr, block_v: tl.constexpr,
    constant: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    v = tl.program_id(0) * block_v + tl.arange(0, block_v)
    k = tl.arange(0, block_k)
    h, s = tl.program_id(1), tl.program_id(2)
    row = s.to(tl.int64)
    exist = (k < K)[:, None] & (v < V)[None, :]
    # --- 2. main loop: one token
    key = h // group
    q = tl.load(q_ptr + row * stride_q + key * stride_qh + k, k < K, 0.0).to(tl.float32)
    k_row = tl.load(k_ptr + row * stride_k + key * stride_kh + k, k < K, 0.0).to(tl.float32)
    v_row = tl.load(v_ptr + row * stride_v + h * stride_vh + v, v < V, 0.0).to(tl.float32)
    g = tl.load(g_ptr + h) if constant else tl.load(g_ptr + row * stride_g + h)
    if i_ptr is not None:
        v_row *= tl.exp(tl.load(i_ptr + row * stride_i + h))
    S = tl.load(state_ptr(S_ptr, s, h, H, k, v, K, V), exist, 0.0)
    S = tl.exp(g) * S + k_row[:, None] * v_row[None, :]
    # --- 3. epilogue
    y = scale * tl.sum(q[:, None] * S, 0)
    # --- 4. store
    tl.store(y_ptr + (row * H + h) * V + v, y.to(y_ptr.dtype.element_ty), v < V)
    tl.store(state_ptr(S_next_ptr, s, h, H, k, v, K, V), S, exist)


def decay_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    i: Tensor | None,
    S: Tensor,
    *,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """One token of each of B sequences: (y [B, H, V] in v's dtype, the next S [B, H, K, V]).

    q, k [B, Hq, K], v [B, H, V], g [B, H] or [H], i [B, H] or None, S [B, H, K, V] float32 as in
    decay_attention. All in float32 within. No gradient flows through this.
    """
    check_tokens({"q": q, "k": k, "v": v}, 64)
    (B, Hq, K), (H, V) = q.shape, v.shape[1:]
    check_gates(g, i, B, H)
    _lib.check_tensor("S", S, (B, H, K, V), (torch.float32,))
    _lib.check_same_device(q=q, k=k, v=v, g=g, i=i, S=S)
    _lib.check_static("scale", scale, (float, int))
    y, S_next = v.new_empty(B, H, V), torch.empty_like(S, memory_format=torch.contiguous_format)
    if 0 in (B, H, K, V):
        return y, S_next
    q, k, v = map(heads_adjacent, (q, k, v))
    g, i = (None if x is None else _lib.rows_adjacent(x) for x in (g, i))
    block_k = _lib.power_of_2(K)
    block_v = max(16, min(_lib.power_of_2(V), 8192 // block_k))
    with _lib.on_device(v):
        _lib.check_gpu()
        _decay_attention_step_kernel[(_lib.cdiv(V, block_v), H, B)](
            q, k, v, g, i, S.contiguous(), y, S_next, H, H // Hq, float(scale),
            q.stride(0), k.stride(0), v.stride(0), g.stride(0), 0 if i is None else i.stride(0),
            q.stride(1), k.stride(1), v.stride(1), K, V, block_k, block_v, g.dim() == 1,
            num_warps=4,
        )  # fmt: skip
    return y, S_next
