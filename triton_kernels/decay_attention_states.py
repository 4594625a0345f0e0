"""States of decay attention: where sequences are cut, the walk that leaves states only, the scan.

    span    a part of one sequence, a multiple of `chunk` tokens from the sequence's start on: what
            one program walks over. A sequence without tokens has one span, without tokens.
    slot    the number of a chunk among those of all sequences, in order

    states kernel, forwards:     S = e^(b_n) S + k^T (e^(b_n - b) u v)       chunk by chunk
            against time:        dS = e^(b_n) dS + q^T (scale e^b dy)
    scan kernel: from what every span adds to a state, and how far it decays one: what enters each

Programs find their span in cu_seqlens by themselves; there are at most T // span + B. Sequence
bounds are clamped to 0 .. T, so that wrong ones lead to no address outside the arrays.

Twin: pallas_kernels/decay_attention_states.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor, to_ragged_indices
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _lib

DTYPES = (torch.bfloat16, torch.float16)
CHUNKS = (16, 32, 64)


def check_tokens(tokens: dict[str, Tensor], chunk: int) -> None:
    """Raises unless q, k [T, Hq, K] and v [T, H, V] of one dtype, by the names of their arguments,
    fit one another and the kernels' tiles."""
    for name, x in tokens.items():
        if isinstance(x, Tensor) and x.dtype is torch.float32:
            raise TypeError(
                f"{name}: expected dtype bfloat16 or float16, got float32: tensor cores would "
                "round its mantissa to 10 bits (TF32) without a word"
            )
    (q_name, q), (k_name, k), (v_name, v) = tokens.items()
    _lib.check_tensor(q_name, q, ("T", "Hq", "K"), DTYPES)
    T, Hq, K = q.shape
    _lib.check_tensor(k_name, k, (T, Hq, K), (q.dtype,))
    _lib.check_tensor(v_name, v, (T, "H", "V"), (q.dtype,))
    H, V = v.shape[1:]
    if K % 16 or K > 256:
        raise ValueError(f"{q_name}: expected a width K of 16, 32, .. 256, got {K}")
    if V % 16:
        raise ValueError(f"{v_name}: expected a width V that is a multiple of 16, got {V}")
    if H and (Hq == 0 or H % Hq):
        raise ValueError(
            f"{v_name}: expected heads that are a multiple of the {Hq} of {q_name}, got {H}"
        )
    _lib.check_static("chunk", chunk, (int,))
    if chunk not in CHUNKS:
        raise ValueError(f"chunk: expected one of {CHUNKS}, got {chunk}")


def check_gates(g: Tensor, i: Tensor | None, T: int, H: int) -> None:
    """Raises unless g is [T, H] or [H], and i [T, H] if there is one."""
    constant = isinstance(g, Tensor) and g.dim() == 1
    _lib.check_tensor("g", g, (H,) if constant else (T, H), (torch.float32,))
    if i is not None:
        _lib.check_tensor("i", i, (T, H), (torch.float32,))


def check_states(q: Tensor, v: Tensor, cu_seqlens: Tensor, **states: Tensor | None) -> None:
    """Raises unless cu_seqlens has the form of bounds, and states [B, H, K, V] fit q and v; it does
    not look at what the bounds are."""
    _lib.check_tensor("cu_seqlens", cu_seqlens, ("B + 1",), (torch.int32,))
    if len(cu_seqlens) == 0:
        raise ValueError("cu_seqlens: expected shape [B + 1], got [0]")
    shape = len(cu_seqlens) - 1, v.shape[1], q.shape[2], v.shape[2]
    for name, S in states.items():
        if S is not None:
            _lib.check_tensor(name, S, shape, (torch.float32,))


def heads_adjacent(x: Tensor) -> Tensor:
    """x [T, H, C], copied only if the channels of a head do not lie side by side."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def tma_ready(*tokens: Tensor) -> bool:
    """Whether TMA can address all of these [T, H, C]: heads and rows at multiples of 16 bytes."""
    return _lib.has_tma() and all(
        x.stride(2) == 1
        and x.data_ptr() % 16 == 0
        and all(n > 0 and n * x.element_size() % 16 == 0 for n in x.stride()[:2])
        for x in tokens
    )


def operand(x: Tensor, chunk: int, block: int, tma: bool) -> TensorDescriptor | Tensor:
    """x [T, H, C] as kernels take it: a descriptor of tiles of a head, that ends at any token."""
    return create_ragged_descriptor(x.transpose(0, 1), [1, chunk, block], 1) if tma else x


def state_operand(S: Tensor, block_k: int, block_v: int, tma: bool) -> TensorDescriptor | Tensor:
    """S [.., K, V] as load_state takes it."""
    S = S.flatten(0, -3)
    return TensorDescriptor.from_tensor(S, [1, block_k, block_v]) if tma else S


def most_spans(T: int, B: int, span: int) -> int:
    """Room for the spans that any B sequences of T tokens in all can have."""
    return T // span + B


@triton.jit
def find_span(cu_ptr, p, T, B, span, chunk: tl.constexpr, block_b: tl.constexpr):
    """(sequence, first token, token past the last, whether the sequence begins, whether it ends,
    slot of the first chunk) of span p; sequence -1 if there is none."""
    s = tl.arange(0, block_b)
    start = tl.minimum(tl.maximum(tl.load(cu_ptr + s, s < B, 0), 0), T)
    stop = tl.minimum(tl.maximum(tl.load(cu_ptr + s + 1, s < B, 0), start), T)
    count = tl.where(s < B, tl.maximum(tl.cdiv(stop - start, span), 1), 0)
    after = tl.cumsum(count, 0)
    mine = (p < after) & (p >= after - count)
    seq = tl.max(tl.where(mine, s, -1), 0)
    begin = tl.sum(tl.where(mine, start, 0), 0)
    length = tl.sum(tl.where(mine, stop - start, 0), 0)
    skipped = (p - tl.sum(tl.where(mine, after - count, 0), 0)) * span
    slots = tl.where(s < seq, tl.maximum(tl.cdiv(stop - start, chunk), 1), 0)
    slot = tl.sum(slots, 0) + skipped // chunk
    end = tl.minimum(skipped + span, length)
    # sequences that overlap may have more chunks than there are slots
    room = tl.maximum(T // chunk + B - slot, 0) * chunk
    stop = tl.minimum(end, skipped + room)
    return seq, begin + skipped, begin + stop, skipped == 0, end == length, slot


@triton.jit
def token_ptr(x_ptr, stride_t, stride_h: tl.constexpr, t, h, c):
    """Addresses of channels c of head h of tokens t. [t, c]"""
    return x_ptr + h * stride_h + t.to(tl.int64)[:, None] * stride_t + c[None, :]


@triton.jit
def load_tokens(
    x, stride_t, stride_h: tl.constexpr, t0, end, h, c0,
    C: tl.constexpr, chunk: tl.constexpr, block_c: tl.constexpr, tma: tl.constexpr,
):  # fmt: skip
    """Head h of tokens from t0 on, channels from c0 on; zeros from token `end` on, whose own memory
    is not read, and from channel C on. [chunk, block_c]"""
    if tma:
        i, j, row = to_ragged_indices(t0, end - t0, 0)
        return x.load([i, j, h, row, c0]).reshape(chunk, block_c)
    else:
        t, c = t0 + tl.arange(0, chunk), c0 + tl.arange(0, block_c)
        exist = (t < end)[:, None] & (c < C)[None, :]
        return tl.load(token_ptr(x, stride_t, stride_h, t, h, c), exist, 0.0)


@triton.jit
def store_tokens(
    x, tile, t0, end, h, c0, H,
    C: tl.constexpr, chunk: tl.constexpr, block_c: tl.constexpr, tma: tl.constexpr,
):  # fmt: skip
    """tile [chunk, block_c] where load_tokens would load it from, of x [T, H, C]."""
    if tma:
        i, j, row = to_ragged_indices(t0, end - t0, 0)
        x.store([i, j, h, row, c0], tile.to(x.dtype).reshape(1, 1, 1, chunk, block_c))
    else:
        t, c = t0 + tl.arange(0, chunk), c0 + tl.arange(0, block_c)
        exist = (t < end)[:, None] & (c < C)[None, :]
        tl.store(token_ptr(x, H * C, C, t, h, c), tile.to(x.dtype.element_ty), exist)


@triton.jit
def inside(t, end, c, C: tl.constexpr):
    """Tokens before `end`, channels below C. [t, c]"""
    return (t < end)[:, None] & (c < C)[None, :]


@triton.jit
def state_ptr(
    S_ptr, at, h, H, k, v,
    K: tl.constexpr, V: tl.constexpr, transposed: tl.constexpr = False,
):  # fmt: skip
    """Addresses in states [.., H, K, V], or [.., H, V, K] if transposed. [k, v]"""
    first = S_ptr + (at.to(tl.int64) * H + h) * (K * V)
    if transposed:
        return first + v[None, :] * K + k[:, None]
    else:
        return first + k[:, None] * V + v[None, :]


@triton.jit
def load_state(
    S, at, v0, K: tl.constexpr, V: tl.constexpr,
    block_k: tl.constexpr, block_v: tl.constexpr, tma: tl.constexpr,
):  # fmt: skip
    """S[at, :, v0 : v0 + block_v] of states [.., K, V], zeros beyond. [block_k, block_v]"""
    if tma:
        return S.load([at, 0, v0]).reshape(block_k, block_v)
    else:
        k, v = tl.arange(0, block_k), v0 + tl.arange(0, block_v)
        exist = (k < K)[:, None] & (v < V)[None, :]
        return tl.load(state_ptr(S, at, 0, 1, k, v, K, V), exist, 0.0)


@triton.jit
def store_state(
    S, tile, at, k0, v0, K: tl.constexpr, V: tl.constexpr,
    block_k: tl.constexpr, block_v: tl.constexpr, tma: tl.constexpr,
):  # fmt: skip
    """tile [block_k, block_v] where load_state would load it from, but for keys from k0 on."""
    if tma:
        S.store([at, k0, v0], tile.to(S.dtype).reshape(1, block_k, block_v))
    else:
        k, v = k0 + tl.arange(0, block_k), v0 + tl.arange(0, block_v)
        exist = (k < K)[:, None] & (v < V)[None, :]
        tl.store(state_ptr(S, at, 0, 1, k, v, K, V), tile.to(S.dtype.element_ty), exist)


@triton.jit
def constant_decay(g_ptr, h):
    """g of head h in units of log 2; RetNet's where none is given."""
    if g_ptr is None:
        # log(1 - x), x = 2^(-5 - h): 1 - x would have few bits of x
        x = tl.exp2(-5.0 - h)
        g = 1.0 + x * (1.0 / 2 + x * (1.0 / 3 + x * (1.0 / 4 + x * (1.0 / 5 + x * (1.0 / 6)))))
        g = -x * g
    else:
        g = tl.load(g_ptr + h)
    return g * 1.4426950408889634


@triton.jit
def decays(b_ptr, u_ptr, h, slot, slots, n, lane, constant: tl.constexpr):
    """(b, b_n, u) of a chunk of n tokens: the logarithms of what decays a state until after each
    token, the last for lanes without one, and until after the last, in units of log 2; weights, 1
    where none are given."""
    u = tl.full(lane.shape, 1.0, tl.float32)
    if constant:
        g = constant_decay(b_ptr, h)
        b, b_n = g * tl.minimum(lane + 1, n), g * n
        if u_ptr is not None:
            u = tl.load(u_ptr + (h.to(tl.int64) * slots + slot) * lane.shape[0] + lane)
    else:
        rows: tl.constexpr = 1 if u_ptr is None else 2  # one address for both
        row = b_ptr + (h.to(tl.int64) * slots + slot) * (rows * lane.shape[0])
        b, b_n = tl.load(row + lane), tl.load(row + lane.shape[0] - 1)
        if u_ptr is not None:
            u = tl.load(row + lane.shape[0] + lane)
    return b, b_n, u


@triton.jit
def decayed(b, lane):
    """exp(b[t] - b[j]) for j <= t, else 0: what is masked could overflow. [t, j]"""
    seen = lane[:, None] >= lane[None, :]
    return tl.exp2(tl.where(seen, b[:, None] - b[None, :], float("-inf")))


@triton.jit
def decayed_T(b, lane):
    """Its transpose. [j, t]"""
    seen = lane[:, None] <= lane[None, :]
    return tl.exp2(tl.where(seen, b[None, :] - b[:, None], float("-inf")))


@triton.jit
def _decay_attention_states_kernel(
    x_all,  # [T, Hq, K]: k, or q against time: a TMA descriptor, or a pointer
    y_all,  # [T, H, V]: v, or dy against time
    b_ptr,  # [H, slots, (b, u), chunk] float32; if constant, g [H] or None: RetNet's
    u_ptr,  # as b_ptr; [H, slots, chunk] float32 if constant; None without u
    cu_ptr,  # [B + 1] int32
    enters_ptr,  # [spans, H, K, V] float32 or None: the state that enters each span
    each,  # [slots * H, K, V] as state_operand gives it, or None: the state that enters each chunk
    leaves_ptr,  # [B, H, K, V] float32 or None, or [spans, ..] with total_ptr: the one that leaves
    total_ptr,  # [spans, H] float32 or None: the logarithm of the decay over the span
    T, B, span, slots, H, group, scale, stride_x, stride_y,
    stride_xh: tl.constexpr, stride_yh: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    chunk: tl.constexpr, block_k: tl.constexpr, block_v: tl.constexpr, block_b: tl.constexpr,
    constant: tl.constexpr, transposed: tl.constexpr, reverse: tl.constexpr, tma: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    num_k: tl.constexpr = (K + block_k - 1) // block_k
    num_v: tl.constexpr = (V + block_v - 1) // block_v
    tile = tl.program_id(0)
    k0, v0 = tile % num_k * block_k, tile // num_k % num_v * block_v
    k, v = k0 + tl.arange(0, block_k), v0 + tl.arange(0, block_v)
    h = tile // (num_k * num_v) % H
    p = tile // (num_k * num_v) // H
    s, first, end, begins, ends, slot = find_span(cu_ptr, p, T, B, span, chunk, block_b)
    if s < 0:
        return
    exist = (v < V)[:, None] & (k < K)[None, :]
    S = tl.zeros((block_v, block_k), tl.float32)  # transposed: the smaller operand has the weights
    if enters_ptr is not None:
        at = state_ptr(enters_ptr, p, h, H, v, k, V, K, not transposed)
        S = tl.load(at, exist, 0.0)
    total = 0.0
    lane = tl.arange(0, chunk)

    # --- 2. main loop
    chunks = tl.cdiv(end - first, chunk)
    for c in tl.range(0, chunks, disable_licm=True):
        ci = c
        if reverse:
            ci = chunks - 1 - c
        t0 = first + ci * chunk
        hq = h // group
        x = load_tokens(x_all, stride_x, stride_xh, t0, end, hq, k0, K, chunk, block_k, tma)
        y = load_tokens(y_all, stride_y, stride_yh, t0, end, h, v0, V, chunk, block_v, tma)
        n = tl.minimum(end - t0, chunk)
        b, b_n, u = decays(b_ptr, u_ptr, h, slot + ci, slots, n, lane, constant)
        w = scale * tl.exp2(b) if reverse else tl.exp2(b_n - b) * u
        if each is not None:
            store_state(each, S.T, (slot + ci) * H + h, k0, v0, K, V, block_k, block_v, tma)
        y = (y.T.to(tl.float32) * w[None, :]).to(y.dtype)
        S = tl.dot(y, x, S * tl.exp2(b_n))
        total += b_n

    # --- 3. epilogue
    if total_ptr is not None:
        at, leaving = p, True
        if tile % (num_k * num_v) == 0:
            tl.store(total_ptr + p.to(tl.int64) * H + h, total)
    else:
        at, leaving = s, begins if reverse else ends
    # --- 4. store
    if leaves_ptr is not None:
        if leaving:
            to = state_ptr(leaves_ptr, at, h, H, v, k, V, K, not transposed)
            tl.store(to, S, exist)


@triton.jit
def _decay_attention_scan_kernel(
    S_ptr,  # [spans, H, K * V] float32: what each span adds to a state; then what enters it
    total_ptr,  # [spans, H] float32
    S0_ptr,  # [B, H, K * V] float32 or None
    cu_ptr,  # [B + 1] int32
    T, B, span, H, size,
    block: tl.constexpr, block_b: tl.constexpr, reverse: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    c = tl.program_id(0) * block + tl.arange(0, block)
    h, s = tl.program_id(1), tl.program_id(2)
    lane = tl.arange(0, block_b)
    start = tl.minimum(tl.maximum(tl.load(cu_ptr + lane, lane < B, 0), 0), T)
    stop = tl.minimum(tl.maximum(tl.load(cu_ptr + lane + 1, lane < B, 0), start), T)
    count = tl.where(lane < B, tl.maximum(tl.cdiv(stop - start, span), 1), 0)
    p = tl.sum(tl.where(lane < s, count, 0), 0)
    spans = tl.minimum(tl.sum(tl.where(lane == s, count, 0), 0), T // span + B - p)
    S = tl.zeros((block,), tl.float32)
    if S0_ptr is not None:
        S = tl.load(S0_ptr + (s.to(tl.int64) * H + h) * size + c, c < size, 0.0)
    # --- 2. main loop
    for j in tl.range(0, spans):
        row = p + j
        if reverse:
            row = p + spans - 1 - j
        at = (row.to(tl.int64) * H + h) * size + c
        added = tl.load(S_ptr + at, c < size, 0.0)
        total = tl.load(total_ptr + row.to(tl.int64) * H + h)
        # --- 3. epilogue
        # --- 4. store
        tl.store(S_ptr + at, S, c < size)
        S = tl.exp2(total) * S + added


def launch_states(
    x: Tensor,
    y: Tensor,
    decay: tuple[Tensor | None, bool],
    u: Tensor | None,
    cu_seqlens: Tensor,
    enters: Tensor | None,
    each: Tensor | None,
    leaves: Tensor | None,
    total: Tensor | None,
    span: int,
    scale: float,
    chunk: int,
    tiles: tuple[int, int, int],
    transposed: bool,
    reverse: bool,
) -> None:
    """The states kernel over all spans; decay: (b, False), (g, True) or (None, True); tiles:
    block_v, stages and warps."""
    (T, Hq, K), (H, V), B = x.shape, y.shape[1:], len(cu_seqlens) - 1
    block_v, stages, warps = tiles
    block_k, block_v = min(128, _lib.power_of_2(K)), min(block_v, _lib.power_of_2(V))
    grid = most_spans(T, B, span) * H * _lib.cdiv(K, block_k) * _lib.cdiv(V, block_v)
    tma = tma_ready(x, y)
    if each is not None:
        each = state_operand(each, block_k, block_v, tma)
    _decay_attention_states_kernel[(grid,)](
        operand(x, chunk, block_k, tma), operand(y, chunk, block_v, tma), decay[0], u, cu_seqlens,
        enters, each, leaves, total, T, B, span, most_spans(T, B, chunk), H, H // Hq, scale,
        x.stride(0), y.stride(0), x.stride(1), y.stride(1), K, V, chunk, block_k, block_v,
        max(16, _lib.power_of_2(B)), decay[1], transposed, reverse, tma,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def entering_states(
    x: Tensor,
    y: Tensor,
    decay: tuple[Tensor | None, bool],
    u: Tensor | None,
    cu_seqlens: Tensor,
    initial: Tensor | None,
    span: int,
    scale: float,
    chunk: int,
    tiles: tuple[int, int, int],
    transposed: bool,
    reverse: bool,
) -> Tensor | None:
    """The states that enter every span, from those that enter sequences; tiles as above."""
    (T, _, K), (H, V), B = x.shape, y.shape[1:], len(cu_seqlens) - 1
    if span >= T:  # a span is a sequence
        return initial
    spans = most_spans(T, B, span)
    S = x.new_empty(spans, H, K * V, dtype=torch.float32)
    total = x.new_empty(spans, H, dtype=torch.float32)
    launch_states(
        x, y, decay, u, cu_seqlens, None, None, S, total, span, scale, chunk, tiles, transposed,
        reverse,
    )  # fmt: skip
    _decay_attention_scan_kernel[(_lib.cdiv(K * V, 1024), H, B)](
        S, total, initial, cu_seqlens, T, B, span, H, K * V, 1024,
        max(16, _lib.power_of_2(B)), reverse, num_warps=4,
    )  # fmt: skip
    return S
