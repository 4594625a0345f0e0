"""Gradients of hybrid attention: two walks over the same tiles, each sum in one order.

    delta = sum_d do * o - dlse      a kernel of its own, once
    p  = exp(x - lse)                recomputed, as nothing of size T x T is kept
    dx = p * (do @ v^T - delta)      * (1 - tanh^2) under a soft cap
    dq = scale * dx @ k              a tile of queries stays, keys pass by
    dk = scale * dx^T @ q            a tile of keys stays; the queries that can see it pass by, of
    dv = p^T @ do                    all heads that share it

A query that sees nothing has delta 0 and lse 0 here; tiles with one have their q and do zeroed, as
tiles with such a key have their k.

Twin: pallas_kernels/hybrid_attention_bwd.py.

Sources: FlashAttention-2 (arXiv:2307.08691) for delta and for recomputing p; two kernels that each
own what they write, in place of one that adds to dq atomically, are the Triton tutorial 06's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _lib
from .hybrid_attention_tiles import (
    LANES,
    LOG2_E,
    STRIP,
    add_tile,
    after,
    alive,
    bounds,
    load_alive,
    load_tile,
    lowest,
    operand,
    per_token,
    readable,
    scores,
    store_tile,
    visible,
    walk,
    zero_dead,
)


@triton.jit
def padded(T):
    """Up to whole tiles of 128, so that loads of lse and delta need no masks."""
    return (T + 127) // 128 * 128


@triton.jit
def _hybrid_attention_delta_kernel(
    o, do,  # [T, Hq, D]
    lse_ptr,  # [Hq, T]
    dlse_ptr,  # [Hq, T] or None
    lse_2_ptr, delta_ptr,  # [Hq, padded(T)]: lse in units of log 2, delta; 0 for what sees nothing
    kv_start_ptr, kv_end_ptr,
    T, Hq, D,
    block_m: tl.constexpr, block_d: tl.constexpr, tma: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    mi, h = tl.program_id(0) // Hq, tl.program_id(0) % Hq
    m = mi * block_m + tl.arange(0, block_m)
    live = alive(kv_start_ptr, kv_end_ptr, m, T)

    # --- 2. main loop
    o_tile = load_tile(o, h, mi * block_m, T, Hq, D, block_m, block_d, tma).to(tl.float32)
    do_tile = load_tile(do, h, mi * block_m, T, Hq, D, block_m, block_d, tma).to(tl.float32)

    # --- 3. epilogue
    at = h * T + m  # an int32 can count Hq * T: q itself would be 256 GB
    delta = tl.sum(o_tile * do_tile, 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + at, mask=live, other=0.0)
    lse = tl.load(lse_ptr + at, mask=live, other=0.0)

    # --- 4. store
    at = h * padded(T) + m
    tl.store(lse_2_ptr + at, lse * LOG2_E)
    tl.store(delta_ptr + at, tl.where(live, delta, 0.0))


@triton.jit
def _visit_keys(
    acc, q_tile, do_tile, k, v, bits, masked, count, first,
    kv_start, kv_end, q_noise, q_pos, lse, delta, slope,
    kv_start_ptr, kv_end_ptr, noise_id_ptr, token_pos_ptr,
    h, T, H, D, scale, softcap, unit,
    block_n: tl.constexpr, block_d: tl.constexpr, strips: tl.constexpr, tma: tl.constexpr,
    capped: tl.constexpr, biased: tl.constexpr, dead: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    """acc += dx @ k over the `count` tiles of keys in `bits`, each in so many strips of block_n
    rows. dead: some of them see nothing."""
    strip = 0
    for _ in tl.range(0, count * strips, num_stages=stages):
        lane = lowest(bits)
        n0 = ((first + lane) * strips + strip) * block_n
        bits, strip = after(bits, strip, strips)
        j = n0 + tl.arange(0, block_n)
        k_tile = load_tile(k, h, n0, T, H, D, block_n, block_d, tma)
        v_tile = load_tile(v, h, n0, T, H, D, block_n, block_d, tma)
        if dead:
            k_tile = zero_dead(k_tile, kv_start_ptr, kv_end_ptr, j, T)
            v_tile = zero_dead(v_tile, kv_start_ptr, kv_end_ptr, j, T)
        s = tl.dot(q_tile, k_tile.T)  # [block_m, block_n]
        dp = tl.dot(do_tile, v_tile.T)  # while p is exponentiated
        k_pos = j
        if biased:
            k_pos = tl.load(token_pos_ptr + j, mask=j < T, other=0)
        x, bent = scores(s, q_pos[:, None], k_pos[None, :], slope, scale, softcap, capped, biased)
        p = tl.exp2(x * unit - lse[:, None])
        if ((masked >> lane) & 1) != 0:
            noise = tl.load(noise_id_ptr + j, mask=j < T, other=-1)
            seen = visible(
                kv_start[:, None], kv_end[:, None], q_noise[:, None], j[None, :], noise[None, :]
            )
            p = tl.where(seen, p, 0.0)
        dx = p * (dp - delta[:, None])
        if capped:
            dx *= 1.0 - bent * bent
        acc = tl.dot(dx.to(k_tile.dtype), k_tile, acc)
    return acc


@triton.jit
def _hybrid_attention_dq_kernel(
    q, do, k, v, k_strip, v_strip, dq,
    lse_ptr, delta_ptr, alibi_ptr,
    kv_start_ptr, kv_end_ptr, noise_id_ptr, token_pos_ptr, tiles_ptr, order_ptr,
    T, Hq, Hk, D, scale, softcap,
    block_m: tl.constexpr, block_n: tl.constexpr, block_d: tl.constexpr, stages: tl.constexpr,
    capped: tl.constexpr, tma: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    biased: tl.constexpr = alibi_ptr is not None
    halves: tl.constexpr = 128 // block_m
    wide: tl.constexpr = block_n if block_n > 64 else 64  # the plan knows no smaller tiles
    i, h = tl.program_id(0) // Hq, tl.program_id(0) % Hq
    mi = tl.load(order_ptr + i // halves) * halves + i % halves
    m = mi * block_m + tl.arange(0, block_m)
    kv_start, kv_end, noise_id = per_token(kv_start_ptr, kv_end_ptr, noise_id_ptr, m, T)
    mine = bounds(tiles_ptr, mi, T, block_m // 64)
    lse = tl.load(lse_ptr + (h * padded(T) + m))
    delta = tl.load(delta_ptr + (h * padded(T) + m))
    q_pos, slope = m, 0.0
    if biased:
        q_pos = tl.load(token_pos_ptr + m, mask=m < T, other=0)
        slope = tl.load(alibi_ptr + h)
    unit = 1.0
    if not (capped or biased):
        unit = scale * LOG2_E

    # --- 2. main loop
    q_tile = load_tile(q, h, mi * block_m, T, Hq, D, block_m, block_d, tma)
    do_tile = load_tile(do, h, mi * block_m, T, Hq, D, block_m, block_d, tma)
    acc = tl.zeros((block_m, block_d), tl.float32)
    begin, stop = tl.maximum(mine[0], 0) // wide, tl.cdiv(tl.minimum(mine[3], T), wide)
    dead_tiles = 0
    for dead in tl.static_range(2):
        if dead:
            stop = tl.where(dead_tiles > 0, stop, begin)
        for first in tl.range(begin, stop, LANES, num_stages=1):
            bits, masked, count, others = walk(
                tiles_ptr, mine, mi * block_m, first, stop, T, block_m, wide, False, dead
            )
            dead_tiles += others
            acc = _visit_keys(
                acc, q_tile, do_tile, k_strip if dead else k, v_strip if dead else v,
                bits, masked, count, first, kv_start, kv_end, noise_id, q_pos, lse, delta, slope,
                kv_start_ptr, kv_end_ptr, noise_id_ptr, token_pos_ptr,
                h // (Hq // Hk), T, Hk, D, scale, softcap, unit,
                STRIP if dead else block_n, block_d, wide // (STRIP if dead else block_n), tma,
                capped, biased, dead, 1 if dead else stages,
            )  # fmt: skip

    # --- 3. epilogue
    # Rows of tokens that see nothing may hold anything so far.
    acc = tl.where((kv_start < kv_end)[:, None], acc * scale, 0.0)

    # --- 4. store
    store_tile(dq, acc, h, mi * block_m, T, Hq, D, block_m, block_d, tma)


@triton.jit
def _visit_queries(
    dk, dv, k_tile, v_tile, q, do, dq, bits, masked, count, first,
    j, k_pos, hk, G,
    lse_ptr, delta_ptr, alibi_ptr,
    kv_start_ptr, kv_end_ptr, q_start_ptr, q_end_ptr, token_pos_ptr,
    T, H, D, scale, softcap, unit,
    block_n: tl.constexpr, block_d: tl.constexpr, strips: tl.constexpr, tma: tl.constexpr,
    capped: tl.constexpr, biased: tl.constexpr, dead: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    """dk += dx^T @ q and dv += p^T @ do over the `count` tiles of queries in `bits`, of G heads,
    each in so many strips of block_n rows. dead: some of their tokens see nothing.

    Unless dq is None, dq += dx @ k as well: k and v are then zero for keys that see nothing.
    """
    h, left, strip = hk * G, bits, 0
    # What does not change in the loop is not kept through it, and delta is loaded where it is
    # needed: registers are short. lse is waited for before the products it runs beside.
    for _ in tl.range(0, count * strips * G, num_stages=stages, disable_licm=True):
        lane = lowest(left)
        m0 = ((first + lane) * strips + strip) * block_n
        m = m0 + tl.arange(0, block_n)
        q_tile = load_tile(q, h, m0, T, H, D, block_n, block_d, tma)
        do_tile = load_tile(do, h, m0, T, H, D, block_n, block_d, tma)
        q_pos, slope = m, 0.0
        if biased:
            q_pos = tl.load(token_pos_ptr + m, mask=m < T, other=0)
            slope = tl.load(alibi_ptr + h)
        if dead:
            q_tile = zero_dead(q_tile, kv_start_ptr, kv_end_ptr, m, T)
            do_tile = zero_dead(do_tile, kv_start_ptr, kv_end_ptr, m, T)
        lse = tl.load(lse_ptr + (h * padded(T) + m))
        s = tl.dot(k_tile, q_tile.T)  # [block_m keys, block_n queries]
        dp = tl.dot(v_tile, do_tile.T)  # while p is exponentiated
        x, bent = scores(s, q_pos[None, :], k_pos[:, None], slope, scale, softcap, capped, biased)
        p = tl.exp2(x * unit - lse[None, :])
        if (masked & left & -left) != 0:
            # A key is seen by one interval of queries, whatever its noise.
            q_start = tl.load(q_start_ptr + j, mask=j < T, other=0)
            q_end = tl.load(q_end_ptr + j, mask=j < T, other=0)
            seen = (m[None, :] >= q_start[:, None]) & (m[None, :] < q_end[:, None])
            p = tl.where(seen, p, 0.0)
        dv = tl.dot(p.to(do_tile.dtype), do_tile, dv)
        delta = tl.load(delta_ptr + (h * padded(T) + m))
        dx = p * (dp - delta[None, :])
        if capped:
            dx *= 1.0 - bent * bent
        if dq is not None and block_d > 128 and (masked & left & -left) != 0:
            # Is 0 there as it is: with this branch ptxas finds enough registers, and not without.
            dx = tl.where(p > 0.0, dx, 0.0)
        dx = dx.to(q_tile.dtype)
        if dq is not None:
            # Its transpose: dx, [keys, queries], is then read as it is written, from shared memory.
            dq_tile = tl.dot(k_tile.T, dx).T
        dk = tl.dot(dx, q_tile, dk)
        if dq is not None:
            add_tile(dq, dq_tile, h, m0, T, H, D, block_n, block_d)
        # The tiles of one head, and then again of the next: to the loads it is one loop.
        left, strip = after(left, strip, strips)
        h = tl.where(left == 0, h + 1, h)
        left = tl.where(left == 0, bits, left)
    return dk, dv


@triton.jit
def _hybrid_attention_dkdv_kernel(
    k, v, q, do, dq, q_strip, do_strip, dq_strip,  # dq: float32 sums to add to, or None
    dk, dv,
    lse_ptr, delta_ptr, alibi_ptr,
    kv_start_ptr, kv_end_ptr, q_start_ptr, q_end_ptr, token_pos_ptr, tiles_ptr, order_ptr,
    T, Hq, Hk, D, scale, softcap,
    block_m: tl.constexpr, block_n: tl.constexpr, block_s: tl.constexpr, block_d: tl.constexpr,
    stages: tl.constexpr, capped: tl.constexpr, tma: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    biased: tl.constexpr = alibi_ptr is not None
    halves: tl.constexpr = 128 // block_m
    wide: tl.constexpr = block_n if block_n > 64 else 64  # the plan knows no smaller tiles
    i, hk = tl.program_id(0) // Hk, tl.program_id(0) % Hk
    mi = tl.load(order_ptr + i // halves) * halves + i % halves
    j = mi * block_m + tl.arange(0, block_m)
    mine = bounds(tiles_ptr, mi, T, block_m // 64)
    begin, stop = T, 0
    for pair in tl.static_range(block_m // 64):
        row = mi * (block_m // 64) + pair
        there = row * 64 < T
        begin = tl.minimum(begin, tl.load(tiles_ptr + row * 8 + 6, mask=there, other=T))
        stop = tl.maximum(stop, tl.load(tiles_ptr + row * 8 + 7, mask=there, other=0))
    k_pos = j
    if biased:
        k_pos = tl.load(token_pos_ptr + j, mask=j < T, other=0)
    unit = 1.0
    if not (capped or biased):
        unit = scale * LOG2_E

    # --- 2. main loop
    if dq is None:
        k_tile = load_tile(k, hk, mi * block_m, T, Hk, D, block_m, block_d, tma)
        v_tile = load_tile(v, hk, mi * block_m, T, Hk, D, block_m, block_d, tma)
    else:  # dq sums over keys, and 0 * NaN is NaN
        k_tile = load_alive(k, hk, kv_start_ptr, kv_end_ptr, j, T, Hk, D, block_d)
        v_tile = load_alive(v, hk, kv_start_ptr, kv_end_ptr, j, T, Hk, D, block_d)
    dk_acc = tl.zeros((block_m, block_d), tl.float32)
    dv_acc = tl.zeros((block_m, block_d), tl.float32)
    begin, stop = tl.maximum(begin, 0) // wide, tl.cdiv(tl.minimum(stop, T), wide)
    dead_tiles = 0
    for dead in tl.static_range(2):
        if dead:
            stop = tl.where(dead_tiles > 0, stop, begin)
        for first in tl.range(begin, stop, LANES, num_stages=1):
            bits, masked, count, others = walk(
                tiles_ptr, mine, mi * block_m, first, stop, T, block_m, wide, True, dead
            )
            dead_tiles += others
            dk_acc, dv_acc = _visit_queries(
                dk_acc, dv_acc, k_tile, v_tile,
                q_strip if dead else q, do_strip if dead else do, dq_strip if dead else dq,
                bits, masked, count, first, j, k_pos, hk, Hq // Hk,
                lse_ptr, delta_ptr, alibi_ptr,
                kv_start_ptr, kv_end_ptr, q_start_ptr, q_end_ptr, token_pos_ptr,
                T, Hq, D, scale, softcap, unit,
                block_s if dead else block_n, block_d, wide // (block_s if dead else block_n), tma,
                capped, biased, dead, 1 if dead else stages,
            )  # fmt: skip

    # --- 3. epilogue
    dk_acc = zero_dead(dk_acc * scale, kv_start_ptr, kv_end_ptr, j, T)
    dv_acc = zero_dead(dv_acc, kv_start_ptr, kv_end_ptr, j, T)

    # --- 4. store
    store_tile(dk, dk_acc, hk, mi * block_m, T, Hk, D, block_m, block_d, tma)
    store_tile(dv, dv_acc, hk, mi * block_m, T, Hk, D, block_m, block_d, tma)


@triton.jit
def _hybrid_attention_round_kernel(
    sums, dq,  # [T, Hq, D]: float32, and rounded
    kv_start_ptr, kv_end_ptr,
    T, Hq, D, scale,
    block_m: tl.constexpr, block_d: tl.constexpr, tma: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    mi, h = tl.program_id(0) // Hq, tl.program_id(0) % Hq
    m = mi * block_m + tl.arange(0, block_m)

    # --- 2. main loop
    tile = load_tile(sums, h, mi * block_m, T, Hq, D, block_m, block_d, tma)

    # --- 3. epilogue
    tile = zero_dead(tile * scale, kv_start_ptr, kv_end_ptr, m, T)

    # --- 4. store
    store_tile(dq, tile, h, mi * block_m, T, Hq, D, block_m, block_d, tma)


def _fake_backward(q, k, v, o, lse, alibi, plan, do, dlse, scale, softcap, config):
    return [x.new_empty(x.shape) for x in (q, k, v)]


@_lib.opaque("hybrid_attention_bwd", _fake_backward)
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    alibi: Tensor | None,
    plan: list[Tensor],
    do: Tensor,
    dlse: Tensor | None,
    scale: float,
    softcap: float,
    config: list[int],
) -> list[Tensor]:
    """[dq, dk, dv]; any strides. config: the fields of a Config for dk and dv, then of one for dq;
    without the second, the kernel of dk and dv adds to dq on its way, in no order."""
    (T, Hq, D), Hk = q.shape, k.shape[1]
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    if 0 in (T, Hq):
        return [dq, dk.zero_(), dv.zero_()]
    q, k, v, o, do = map(readable, (q, k, v, o, do))
    lse, dlse, alibi = (None if x is None else x.contiguous() for x in (lse, dlse, alibi))
    kv_start, kv_end, noise_id, q_start, q_end, token_pos, tiles, q_order, k_order = plan
    padded_lse = (Hq, 128 * len(q_order))
    lse_2, delta = (q.new_empty(padded_lse, dtype=torch.float32) for _ in range(2))
    block_d, tma, numbers = _lib.power_of_2(D), _lib.has_tma(), (T, Hq, Hk, D, scale, softcap)
    of_rows = (2 * len(q_order) * Hq,)
    with _lib.on_device(q):
        _lib.check_gpu()
        _hybrid_attention_delta_kernel[of_rows](
            operand(o, 64, block_d), operand(do, 64, block_d), lse, dlse, lse_2, delta,
            kv_start, kv_end,
            T, Hq, D, 64, block_d, tma, num_warps=4,
        )  # fmt: skip
        (block_m, block_n, stages, warps), of_dq = config[:4], config[4:]
        sums, block_s = None, STRIP.value
        if not of_dq:  # wgmma makes at least 64 rows of it at once
            sums, block_s = q.new_zeros(q.shape, dtype=torch.float32), 64
        _hybrid_attention_dkdv_kernel[(len(k_order) * (128 // block_m) * Hk,)](
            *((operand(x, block_m, block_d) for x in (k, v)) if of_dq
              else (k.contiguous(), v.contiguous())),
            *(operand(x, size, block_d, adds=x is sums)
              for size in (block_n, block_s) for x in (q, do, sums)),
            operand(dk, block_m, block_d), operand(dv, block_m, block_d),
            lse_2, delta, alibi, kv_start, kv_end, q_start, q_end, token_pos, tiles, k_order,
            *numbers, block_m, block_n, block_s, block_d, stages, softcap > 0, tma,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if not of_dq:
            _hybrid_attention_round_kernel[of_rows](
                operand(sums, 64, block_d), operand(dq, 64, block_d), kv_start, kv_end,
                T, Hq, D, scale, 64, block_d, tma, num_warps=4,
            )  # fmt: skip
            return [dq, dk, dv]
        block_m, block_n, stages, warps = of_dq
        _hybrid_attention_dq_kernel[(len(q_order) * (128 // block_m) * Hq,)](
            operand(q, block_m, block_d), operand(do, block_m, block_d),
            *(operand(x, size, block_d) for size in (block_n, STRIP.value) for x in (k, v)),
            operand(dq, block_m, block_d),
            lse_2, delta, alibi, kv_start, kv_end, noise_id, token_pos, tiles, q_order,
            *numbers, block_m, block_n, block_d, stages, softcap > 0, tma,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return [dq, dk, dv]
