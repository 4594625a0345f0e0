"""Linear attention whose state decays, over packed sequences: the core of RetNet and Mamba-2.

    S[t] = exp(g[t]) * S[t-1] + exp(i[t]) * k[t] v[t]^T     in a sequence; before it: S0[s], or 0
    y[t] = scale * q[t]^T S[t]                              S_T[s]: S after the last token, or S0[s]

    gates kernel: for every chunk of 64 tokens and head: b = cumsum(g), u = exp(i)
    where sequences are cut: the states that enter their parts (decay_attention_states.py)
    one block of threads for a part of a sequence, one or two heads or parts of v, side by side:
        for each chunk of it, by TMA in a ring of slots, S in registers:
            S_tile = S; w = e^(b_n - b) u v                           to shared memory
            x = q @ k^T; o = q @ S_tile; S = e^(b_n) S + k^T @ w      three products at once
            p = scale e^(b_t - b_j) u_j x for j <= t, else 0
            y = scale e^b o + p @ v
        where the sequence ends: S_T = S

Exponents are differences that are not above 0, whatever the gates; a masked one is dropped. Chunks
are cut at sequence starts: rows of other sequences are cleared in shared memory, and not stored.
Nothing depends on what cu_seqlens holds but the work.

Backward: decay_attention_bwd.py.

Limits: Hopper; bfloat16 and float16; K up to 256. K and V that are no multiples of 64 are padded,
in XLA. chunk is 64: the rows of a wgmma.

Twin: triton_kernels/decay_attention.py.

Sources: the chunked form is that of RetNet (arXiv:2307.08621), of GLA (arXiv:2312.06635) and of
Mamba-2 (arXiv:2405.21060).
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import _lib
from .decay_attention_bwd import backward
from .decay_attention_gates import gates_bwd, gates_of
from .decay_attention_states import (
    CHUNK,
    COLUMN,
    GATES,
    ROW,
    Walk,
    across,
    barriers,
    check_gates,
    check_states,
    check_tokens,
    clear,
    down,
    entering_states,
    filled,
    find_span,
    iota,
    launch,
    load_gates,
    load_state,
    load_tile,
    meet,
    most_spans,
    panel,
    slot_of,
    store_rows,
    store_state,
    stored,
    swizzled,
)
from .linear_scan import linear_scan_check


@dataclass(frozen=True)
class Config:
    """Tile sizes and resources of the kernels; beyond the last bits the result ignores them.

    block_v: columns of v, and of the state, of a warpgroup.
    spans: how many parts a sequence of T tokens is cut into; 1 reads k and v just once.
    stages: slots of the ring.
    warpgroups: parts of v or heads that share q and k of a block of threads.
    """

    block_v: int = 64
    spans: int = 1
    stages: int = 2
    warpgroups: int = 2

    def __post_init__(self) -> None:
        if self.block_v not in (64, 128):
            raise ValueError(f"block_v: expected 64 or 128, got {self.block_v}")
        if self.spans < 1:
            raise ValueError(f"spans: expected at least 1, got {self.spans}")
        if self.stages < 1:
            raise ValueError(f"stages: expected at least 1, got {self.stages}")
        if self.warpgroups not in (1, 2):
            raise ValueError(f"warpgroups: expected 1 or 2, got {self.warpgroups}")


def default_config(
    T: int, B: int, Hq: int, H: int, K: int, V: int, dtype: Any, which: str = "fwd"
) -> Config:
    """The Config for T tokens in B sequences on a Hopper; which: "fwd" or "bwd"."""
    del dtype
    panels = _lib.cdiv(V, 64) * H
    # A second warpgroup shares q and k, but of K = 256 the forward has no shared memory for it.
    warpgroups = 1 if panels // Hq % 2 or (K > 128 and which == "fwd") else 2
    blocks = panels // warpgroups * max(1, B)
    # Few sequences and heads do not fill a GPU: their parts do, and k and v are read twice.
    spans = 1 if blocks >= 120 else min(_lib.cdiv(264, blocks), _lib.cdiv(T, 512))
    return Config(64, max(1, spans), 2 if K > 128 else 3, warpgroups)


def _span_of(T: int, config: Config) -> int:
    """Tokens of a span."""
    return max(CHUNK, _lib.cdiv(_lib.cdiv(T, config.spans), CHUNK) * CHUNK)


def _decay_attention_fwd_kernel(
    *refs: Any, scale: float, span: int, given: bool, transposed: bool, skips: bool, config: Config
) -> None:
    q_gmem, k_gmem, v_gmem, gates_gmem, cu_gmem, *more = refs[:-10]
    q_smem, k_smem, v_smem, gates_smem, w_smem, S_smem, y_smem, full, free, met = refs[-10:]
    enters_gmem = more.pop(0) if given else None  # [B or, if cut, spans, H, K, V]
    D_gmem = more.pop(0) if skips else None  # [H, V]
    y_gmem, S_T_gmem = more
    T, groups, K = q_gmem.shape
    _, H, V = v_gmem.shape
    block_v, warpgroups = config.block_v, config.warpgroups
    # --- 1. which tile
    wg = lax.axis_index("wg")
    p = lax.axis_index("span")
    s, first, end, _, ends = find_span(cu_gmem, p, T, span)
    start = jnp.clip(cu_gmem[s], 0, T)
    chunks = lax.div(end - first + CHUNK - 1, CHUNK)
    place = functools.partial(panel, warpgroups, heads=H // groups, block_v=block_v, V=V)
    h, v = place(wg)

    def copy(c: Any, slot: Any, barrier: Any) -> None:
        t = first + c * CHUNK
        rows, at, group = pl.ds(t, CHUNK), slot_of(s, start, t), lax.axis_index("group")
        plgpu.copy_gmem_to_smem(q_gmem.at[rows, group], q_smem.at[slot], barrier)
        plgpu.copy_gmem_to_smem(k_gmem.at[rows, group], k_smem.at[slot], barrier)
        for w in range(warpgroups):
            h, v = place(w)
            plgpu.copy_gmem_to_smem(v_gmem.at[rows, h, v], v_smem.at[slot, w], barrier)
            gates = gates_gmem.at[at, h, pl.ds(0, GATES)]
            plgpu.copy_gmem_to_smem(gates, gates_smem.at[slot, w], barrier)

    walk = Walk(full, free, config.stages, chunks, copy)
    together = K * block_v <= 128 * 64  # else registers hold the state and one product besides
    S = filled((K, block_v), 0.0)
    if enters_gmem is not None:
        cut = span < T
        S = load_state(enters_gmem, p if cut else s, h, v, transposed and not cut)

    # --- 2. main loop
    def chunk(c: Any, S: jax.Array) -> jax.Array:
        # Asked anew, what follows from it is not kept from chunk to chunk: addresses alone would
        # fill 30 registers.
        wg = lax.axis_index("wg")
        h, v = place(wg)
        slot = walk.enter(c)
        t = first + c * CHUNK
        live = jnp.minimum(end - t, CHUNK)
        q_tile, k_tile = q_smem.at[slot], k_smem.at[slot]
        v_tile, gates = v_smem.at[slot, wg], gates_smem.at[slot, wg]

        @pl.when(live < CHUNK)
        def _() -> None:
            pl.when(wg == 0)(lambda: clear(k_tile, live))
            clear(v_tile, live)
            plgpu.commit_smem()
            meet(met, warpgroups)

        b, u, b_n = load_gates(gates, 0, ROW), load_gates(gates, 1, ROW), gates[CHUNK - 1]
        S_smem[wg] = S.astype(S_smem.dtype)
        w = load_tile(v_tile) * across(jnp.exp2(b_n - b) * u, block_v)
        w_smem[wg] = w.astype(w_smem.dtype)
        plgpu.commit_smem()

        def products(x_acc: Any, y_acc: Any, S_acc: Any) -> tuple[jax.Array, jax.Array]:
            S_acc[...] = S * jnp.exp2(b_n)
            plgpu.wgmma(x_acc, q_tile, k_tile.T)
            if together:
                plgpu.wgmma(y_acc, q_tile, S_smem.at[wg])
                plgpu.wgmma(S_acc, k_tile.T, w_smem.at[wg])
            x = plgpu.wgmma_accumulator_load(x_acc, wait_n=2 if together else 0)
            theirs = [down(load_gates(gates, i, COLUMN), CHUNK) for i in range(2)]
            x = x * jnp.exp2(across(b, CHUNK) - theirs[0]) * (theirs[1] * scale)
            seen = iota(x.shape, 1) + c <= iota(x.shape, 0) + c
            x = jnp.where(seen, x, 0.0).astype(v_smem.dtype)
            if not together:
                plgpu.wgmma(y_acc, q_tile, S_smem.at[wg])
            y = plgpu.wgmma_accumulator_load(y_acc, wait_n=1 if together else 0)
            y_acc[...] = y * across(jnp.exp2(b) * scale, block_v)
            plgpu.wgmma(y_acc, x, v_tile)
            if not together:
                plgpu.wgmma(S_acc, k_tile.T, w_smem.at[wg])
            return y_acc[...], S_acc[...]

        y, S = pl.run_scoped(
            products,
            plgpu.ACC((CHUNK, CHUNK), jnp.float32),
            plgpu.ACC((CHUNK, block_v), jnp.float32),
            plgpu.ACC((K, block_v), jnp.float32),
        )
        # --- 3. epilogue
        if D_gmem is not None:
            D = plgpu.load(D_gmem.at[h, v], layout=COLUMN, optimized=False)
            y = y + load_tile(v_tile) * down(D, CHUNK)
        # --- 4. store
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for i in range(block_v // 64):
            y_smem[wg, i] = y[:, i * 64 : (i + 1) * 64].astype(y_smem.dtype)
        plgpu.commit_smem()
        walk.leave(slot)
        for i in range(block_v // 64):
            store_rows(
                y_smem.at[wg, i], live,
                lambda lo, n, i=i: y_gmem.at[pl.ds(t + lo, n), h, pl.ds(v.start + i * 64, 64)],
            )  # fmt: skip
        return S

    S = lax.fori_loop(0, chunks, chunk, S)

    @pl.when(ends)
    def _() -> None:
        store_state(S_T_gmem, s, h, v, S, transposed)

    walk.end()
    plgpu.wait_smem_to_gmem(0)


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, gates: jax.Array, S0: jax.Array | None,
    D: jax.Array | None, cu_seqlens: jax.Array, *, scale: float, transposed: bool,
    config: Config | None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(y, S_T). D [H, V]: y + D v. transposed: S0 and S_T are [B, H, V, K]."""
    (T, groups, K), (_, H, V), B = q.shape, v.shape, len(cu_seqlens) - 1
    config = config or default_config(T, B, groups, H, K, V, q.dtype)
    _check_fits(config, groups, H, K, V)
    (q, k, v, D), S0 = _padded(config, q, k, v, D), _padded_state(config, S0, transposed)
    (T_room, _, K_room), V_room = q.shape, v.shape[2]
    block_v, wgs, stages = config.block_v, config.warpgroups, config.stages
    span = _span_of(T_room, config)
    enters = entering_states(
        k, v, gates, cu_seqlens, S0, span=span, scale=scale, transposed=transposed, reverse=False,
        config=config,
    )  # fmt: skip
    kernel = functools.partial(
        _decay_attention_fwd_kernel, scale=scale, span=span, given=enters is not None,
        transposed=transposed, skips=D is not None, config=config,
    )  # fmt: skip
    state = (V_room, K_room) if transposed else (K_room, V_room)
    y, S_T = launch(
        kernel, "decay_attention_fwd_kernel",
        [
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            jax.ShapeDtypeStruct((B, H, *state), jnp.float32),
        ],
        [
            swizzled((stages, CHUNK, K_room), q.dtype),
            swizzled((stages, CHUNK, K_room), q.dtype),
            swizzled((stages, wgs, CHUNK, block_v), q.dtype),
            plgpu.SMEM((stages, wgs, GATES), jnp.float32),
            swizzled((wgs, CHUNK, block_v), q.dtype),
            swizzled((wgs, K_room, block_v), q.dtype),
            stored((wgs, block_v // 64, CHUNK, 64), q.dtype),
            *barriers(config, 2 + 2 * wgs),
        ],
        (
            most_spans(T_room, B, span) if span < T_room else B,
            groups,
            H // groups * (V_room // block_v) // wgs,
        ),
        (q, k, v, gates, cu_seqlens, *(x for x in (enters, D) if x is not None)), wgs,
    )  # fmt: skip
    rows, columns = (V, K) if transposed else (K, V)
    return y[:T, :, :V], S_T[:, :, :rows, :columns]


def _gradients(
    q: jax.Array, k: jax.Array, v: jax.Array, dy: jax.Array, gates: jax.Array,
    S0: jax.Array | None, dS_T: jax.Array | None, D: jax.Array | None, cu_seqlens: jax.Array, *,
    scale: float, transposed: bool, config: Config | None,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """(dS0, dq, dk, dv, dgates), and dD [H, V] with D; dgates [slots, H, 132] as gates are."""
    (T, groups, K), (_, H, V), B = q.shape, v.shape, len(cu_seqlens) - 1
    config = config or default_config(T, B, groups, H, K, V, q.dtype, "bwd")
    _check_fits(config, groups, H, K, V)
    q, k, v, dy, D = _padded(config, q, k, v, dy.astype(v.dtype), D)
    S0, dS_T = (_padded_state(config, S, transposed) for S in (S0, dS_T))
    dS0, dq, dk, dv, dgates, *dD = backward(
        q, k, v, dy, gates, S0, dS_T, D, cu_seqlens, span=_span_of(q.shape[0], config), scale=scale,
        transposed=transposed, config=config,
    )  # fmt: skip
    rows, columns = (V, K) if transposed else (K, V)
    found = (dS0[:, :, :rows, :columns], dq[:T, :, :K], dk[:T, :, :K], dv[:T, :, :V], dgates)
    return *found, *(x[:, :V] for x in dD)


def _check(q, k, v, g, i, S0, cu_seqlens, scale, chunk, config) -> None:
    check_tokens({"q": q, "k": k, "v": v}, chunk)
    T, H, V = v.shape
    check_gates(g, i, T, H)
    check_states(cu_seqlens, (H, q.shape[2], V), S0=S0)
    _lib.check_static("scale", scale, (float, int))
    _lib.check_config(config, Config)


def decay_attention_check(cu_seqlens: jax.Array, *, T: int) -> None:
    """Raises ValueError if cu_seqlens [B + 1] does not grow from 0 to T; it waits for the device.

    The kernels do not: what they then return is not defined, but they stay inside their arrays.
    """
    linear_scan_check(cu_seqlens, T=T)


def decay_attention_fwd(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    i: jax.Array | None,
    S0: jax.Array | None,
    cu_seqlens: jax.Array,
    *,
    scale: float = 1.0,
    chunk: int = 64,
    config: Config | None = None,
) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    """As `decay_attention`, and what the backward needs: res = (q, k, v, g, i, S0, cu_seqlens)."""
    _check(q, k, v, g, i, S0, cu_seqlens, scale, chunk, config)
    (T, H, V), K, B = v.shape, q.shape[2], len(cu_seqlens) - 1
    res = (q, k, v, g, i, S0, cu_seqlens)
    if 0 in (T, H, K, V, B):
        S_T = jnp.zeros((B, H, K, V), jnp.float32) if S0 is None else S0
        return (jnp.zeros_like(v), S_T), res
    y, S_T = _forward(
        q, k, v, gates_of(g, i, cu_seqlens, T, H), S0, None, cu_seqlens, scale=float(scale),
        transposed=False, config=config,
    )  # fmt: skip
    y, S_T = _lib.vary_alike(y, S_T, q)[:2]
    return (y, S_T), res


def decay_attention_bwd(
    res: tuple[Any, ...],
    dy: jax.Array,
    dS_T: jax.Array | None = None,
    *,
    scale: float = 1.0,
    chunk: int = 64,
    config: Config | None = None,
) -> tuple[jax.Array, ...]:
    """Gradients of `decay_attention`.

    res: (q, k, v, g, i, S0, cu_seqlens) as decay_attention_fwd returns it.
    dy: [T, H, V], the cotangent of y; another dtype is rounded to v's.
    dS_T: [B, H, K, V] float32, that of S_T; None is zero.

    Returns (dq, dk, dv, dg), then di if there is an i, and dS0 if there is an S0.
    """
    q, k, v, g, i, S0, cu_seqlens = res
    _check(*res, scale, chunk, config)
    (T, H, V), K, B = v.shape, q.shape[2], len(cu_seqlens) - 1
    if 0 in (T, H, K, V, B):
        dS0 = jnp.zeros((B, H, K, V), jnp.float32) if dS_T is None else dS_T
        found = [jnp.zeros_like(x) for x in (q, k, v, g, i) if x is not None]
        return (*found, *([] if S0 is None else [dS0]))
    _lib.check_array("dy", dy, tuple(v.shape), None)
    check_states(cu_seqlens, (H, K, V), dS_T=dS_T)
    gates = gates_of(g, i, cu_seqlens, T, H)
    dS0, dq, dk, dv, dgates = _gradients(
        q, k, v, dy, gates, S0, dS_T, None, cu_seqlens, scale=float(scale), transposed=False,
        config=config,
    )  # fmt: skip
    dg, di = gates_bwd(
        dgates, gates, cu_seqlens, T, constant=g.ndim == 1, weighted=i is not None,
        entered=S0 is not None,
    )  # fmt: skip
    found = [dq, dk, dv, dg]
    if i is not None:
        found.append(di)
    if S0 is not None:
        found.append(dS0)
    return _lib.vary_alike(*found, q)[:-1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _decay_attention(q, k, v, g, i, S0, cu_seqlens, scale, config):
    return decay_attention_fwd(q, k, v, g, i, S0, cu_seqlens, scale=scale, config=config)[0]


def _decay_attention_fwd(q, k, v, g, i, S0, cu_seqlens, scale, config):
    return decay_attention_fwd(q, k, v, g, i, S0, cu_seqlens, scale=scale, config=config)


def _decay_attention_bwd(scale, config, res, cotangents):
    del config  # gradients take their own default
    dq, dk, dv, dg, *more = decay_attention_bwd(res, *cotangents, scale=scale)
    di, dS0 = (None if x is None else more.pop(0) for x in (res[4], res[5]))
    return dq, dk, dv, dg, di, dS0, None


_decay_attention.defvjp(_decay_attention_fwd, _decay_attention_bwd)


def decay_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    i: jax.Array | None,
    S0: jax.Array | None,
    cu_seqlens: jax.Array,
    *,
    scale: float = 1.0,
    chunk: int = 64,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """y[T, H, V] in v's dtype, and the last states S_T[B, H, K, V] float32. Differentiable.

    q, k: [T, Hq, K], v: [T, H, V], bfloat16 or float16, the same; K up to 256. Head h reads the
        queries and keys of head h // (H / Hq).
    g: [T, H] float32, not above 0: the logarithm of what a token leaves of the state; or [H], the
        same at all times.
    i: [T, H] float32, the logarithm of the weight with which a token enters; None is 0.
    S0: [B, H, K, V] float32, the states before the first tokens; None is zero.
    cu_seqlens: [B + 1] int32, from 0 to T: the tokens of sequence s begin at cu_seqlens[s]. It is
        read on the device alone: decay_attention_check looks at what it holds.
    scale: of y. chunk: 64.
    config: tiles of this call; gradients take their own default.

    Raises ValueError for a wrong rank or size and TypeError for a wrong dtype or config.
    """
    _check(q, k, v, g, i, S0, cu_seqlens, scale, chunk, config)
    alike = iter(_lib.vary_alike(*(x for x in (q, k, v, g, i, S0, cu_seqlens) if x is not None)))
    given = (None if x is None else next(alike) for x in (q, k, v, g, i, S0, cu_seqlens))
    return _decay_attention(*given, float(scale), config)


def _padded(config: Config, *arrays: jax.Array | None) -> list[Any]:
    """Arrays [T, heads, columns] and [heads, columns] with whole tiles of columns, and rows in
    eights, the rows of a piece of swizzled shared memory."""
    q, k, v, *more = arrays
    rows = [_lib.pad(x, 8, 1, 64) for x in (q, k)] + [_lib.pad(v, 8, 1, config.block_v)]
    for x in more:
        tiles = (8, 1, config.block_v)[3 - (0 if x is None else x.ndim) :]
        rows.append(None if x is None else _lib.pad(x, *tiles))
    return rows


def _padded_state(config: Config, S: jax.Array | None, transposed: bool) -> jax.Array | None:
    tiles = (config.block_v, 64) if transposed else (64, config.block_v)
    return None if S is None else _lib.pad(S, *tiles)


def _check_fits(config: Config, groups: int, H: int, K: int, V: int) -> None:
    """Raises for a Config that these sizes do not fit."""
    panels = H // groups * _lib.cdiv(V, config.block_v)
    if panels % config.warpgroups:
        raise ValueError(
            f"warpgroups: expected a divisor of the {panels} parts of {config.block_v} columns "
            f"that share q and k, got {config.warpgroups}"
        )
    if _lib.cdiv(K, 64) * config.block_v > 256:
        raise ValueError(f"block_v: expected 64 for K = {K}, got {config.block_v}")
