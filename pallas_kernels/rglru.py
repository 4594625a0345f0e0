"""Real-gated linear recurrent unit over packed sequences: gates and recurrence in one pass.

    r = sigmoid(r_pre)    i = sigmoid(i_pre)    log a = -c * r * softplus(lam)
    h[t] = a[t] * h[t-1] + m[t] * i[t] * x[t]    m = sqrt(1 - a^2)    h_T[s]: h after the last token
    A sequence begins with h0[s]; without h0 its first token enters as it is: a = 0 and m = 1.

    for each chunk of time that a sequence leaves unfinished: its map h -> A h + B
    one block of threads for block_c channels of a chunk; TMA loads its tiles into a ring of slots:
        a and m * i * x, row by row; then as linear_scan does with its a and b

    Backward, against time, with v = a[t+1] * u[t+1]:
        r and a, row by row; u = v + dh by the maps v -> a v + a dh
        dm = u * i * x; dlog a = u * h[t-1] * a - dm * a^2 / max(m, 5e-4)
        dx, dr_pre, di_pre; sums of r * dlog a, for dlam, in registers
    each block's sums to a workspace [chunks, 4, W]; a second kernel adds those in a fixed order

m^2 is a polynomial of log a where a is near 1: there 1 - a^2 would cancel.

Limits: Hopper; bfloat16, float16, float32; lam, states and dlam in float32. Rows that do not start
at multiples of 16 bytes are padded, in XLA.

Twin: triton_kernels/rglru.py.

Sources: Griffin (arXiv:2402.19427); its public code for the first token and for the bound on the
derivative of the root.
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
from .linear_scan import DTYPES
from .linear_scan import Config as _ScanConfig
from .linear_scan_walk import (
    PARTS,
    STEP,
    across,
    carried,
    check_backward,
    check_sequences,
    first_sequence,
    flat,
    launch,
    launch_sizes,
    load_channels,
    load_row,
    loader,
    row_layout,
    spread,
    step,
    store_tile,
    tiled,
    tiling,
)


@dataclass(frozen=True)
class Config(_ScanConfig):
    """As linear_scan's."""


def default_config(T: int, W: int, B: int, dtype: Any, which: str = "fwd") -> Config:
    """The Config for T tokens in B sequences of W channels; which: "fwd" or "bwd"."""
    # In a backward a row takes more registers, and a tile more arrays.
    elements, arrays = (4096, 3) if which == "fwd" else (16384 // _lib.bits(dtype) * 2, 5)
    return Config(*tiling(T, W, B, dtype, which, elements, arrays))


def _sigmoid(x: Any) -> Any:
    s = lax.rsqrt(1.0 + jnp.exp2(x * -1.4426950408889634))  # a division would take longer
    return s * s


def _power(lam: Any, factor: float) -> Any:
    """log2(a) / r = -factor * softplus(lam) / ln 2, as precise for lam far below 0, where models
    have it. [block_c]"""
    z = jnp.exp(-jnp.abs(lam))
    w = z / (2.0 + z)  # log(1 + z) = 2 atanh(w)
    w2 = w * w
    series = 1.0 / 9 + w2 * (1.0 / 11 + w2 * (1.0 / 13 + w2 * (1.0 / 15)))
    series = 1.0 + w2 * (1.0 / 3 + w2 * (1.0 / 5 + w2 * (1.0 / 7 + w2 * series)))
    return -1.4426950408889634 * factor * (jnp.maximum(lam, 0.0) + 2.0 * w * series)


def _decay(r_pre: Any, power: Any, inside: Any, fresh: Any) -> tuple[Any, Any, Any]:
    """(r, a, 1 - a^2); fresh: where the token enters as it is, or None. A token that is not inside:
    a = 1."""
    r = _sigmoid(r_pre)
    log2_a = power * r
    if fresh is not None:
        log2_a = jnp.where(fresh, -jnp.inf, log2_a)
    log2_a = jnp.where(inside, log2_a, 0.0)
    a = jnp.exp2(log2_a)
    # of 1 - 2^(2 x) for small x: the polynomial of degree 4 with the least relative error, 3e-7
    near = -0.9608487 + log2_a * (-0.4424275 + log2_a * -0.1393648)
    near = log2_a * (-1.386294 + log2_a * near)
    return r, a, jnp.where(log2_a > -0.18, near, 1.0 - a * a)


def _map(x: Any, r_pre: Any, i_pre: Any, power: Any, inside: Any, fresh: Any) -> tuple[Any, Any]:
    """a and b of a row."""
    _, a, square = _decay(r_pre, power, inside, fresh)
    # m * i = sqrt(square) / (1 + e) with one root; the bound keeps 0 * inf away, and the absolute
    # value shows the compiler that no root is of a subnormal number, which it would scale
    e = jnp.exp2(jnp.minimum(i_pre * -1.4426950408889634, 60.0))
    m_i = square * lax.rsqrt(jnp.abs(square * (1.0 + e) * (1.0 + e)) + 1e-37)
    return a, jnp.where(inside, m_i * x, 0.0)


def _rglru_carry_kernel(
    *refs: Any, T: int, B: int, chunk: int, c: float, given: bool, fresh: bool, reverse: bool,
    config: Config,
) -> None:  # fmt: skip
    gmem, refs = refs[: 2 + (not reverse)], refs[2 + (not reverse) :]
    smem, maps_smem, full = refs[-2 - len(gmem) : -2], refs[-2], refs[-1]
    lam_gmem, cu_gmem, *state_gmem, carry_gmem = refs[: -2 - len(gmem)]
    rows = config.block_t // PARTS
    layout = row_layout(config.block_c)
    # --- 1. which tile
    channel = pl.ds(lax.axis_index("channels") * config.block_c, config.block_c)
    ci = lax.axis_index("chunks") + reverse
    low, high = ci * chunk, jnp.minimum((ci + 1) * chunk, T)
    last = low if reverse else high
    s = first_sequence(cu_gmem, last, B, reverse)
    begin, stop = cu_gmem[s], cu_gmem[s + 1]
    starts = stop <= high if reverse else begin >= low
    low, high = jnp.maximum(low, begin), jnp.minimum(high, stop)
    t0 = low - lax.rem(low, config.block_t)
    # a sequence goes on in the next chunk
    unfinished = (begin < last) & (stop > last)
    trips = jnp.where(unfinished, lax.div(high - t0 + config.block_t - 1, config.block_t), 0)

    def place(q):
        return t0 + (trips - 1 - q if reverse else q) * config.block_t

    load = loader(tuple(zip(gmem, smem, strict=True)), full, channel, trips, place)
    zero = plgpu.layout_cast(jnp.zeros((config.block_c,), jnp.float32), layout.reduce(0))
    state = zero
    if given:
        state = jnp.where(starts, load_channels(state_gmem[0].at[s, channel], layout), zero)
    power = spread(_power(load_channels(lam_gmem.at[channel], layout), c), layout)
    part = plgpu.broadcasted_iota(jnp.int32, (PARTS, config.block_c), 0, layout=layout)

    # --- 2. main loop
    def tile(q, carry):
        state, product = carry
        slot = lax.rem(q, config.stages)
        plgpu.barrier_wait(full.at[slot])
        a_part, b_part = spread(zero, layout) + 1, spread(zero, layout)
        for r in range(rows)[:: -1 if reverse else 1]:
            t = place(q) + part * rows + r
            inside = (t >= low) & (t < high)
            first, r_pre, *i_pre = (load_row(x, slot, r, layout) for x in smem)
            enters = t == begin if fresh else None
            if reverse:
                _, a, _ = _decay(r_pre, power, inside, enters)
                b_part = a * (b_part + jnp.where(inside, first, 0.0))
            else:
                a, b = _map(first, r_pre, *i_pre, power, inside, enters)
                b_part = a * b_part + b
            a_part = a_part * a
        turn = lax.rem(q, 2)
        _, state, a_all = across(maps_smem, turn, a_part, b_part, state, layout, reverse)
        load(q + config.stages - 1)
        return state, product * a_all

    # --- 3. epilogue
    state, product = lax.fori_loop(0, trips, tile, (state, zero + 1))

    # --- 4. store
    @pl.when(unfinished)
    def _():
        carry_gmem[ci, 0, channel] = product
        carry_gmem[ci, 1, channel] = state


def _rglru_fwd_kernel(
    *refs: Any, T: int, B: int, chunk: int, c: float, given: bool, config: Config
) -> None:
    x_gmem, r_gmem, i_gmem, lam_gmem, cu_gmem, *more = refs[:-7]
    h_gmem, h_T_gmem, x_smem, r_smem, i_smem, maps_smem, full = refs[-7:]
    h0_gmem = more.pop(0) if given else None
    carry_gmem = more.pop(0) if more else None
    rows = config.block_t // PARTS
    layout = row_layout(config.block_c)
    # --- 1. which tile
    channel = pl.ds(lax.axis_index("channels") * config.block_c, config.block_c)
    ci = lax.axis_index("chunks")
    first, end = ci * chunk, jnp.minimum((ci + 1) * chunk, T)
    trips = lax.div(end - first + config.block_t - 1, config.block_t)

    def place(q):
        return first + q * config.block_t

    copies = ((x_gmem, x_smem), (r_gmem, r_smem), (i_gmem, i_smem))
    load = loader(copies, full, channel, trips, place)
    zero = plgpu.layout_cast(jnp.zeros((config.block_c,), jnp.float32), layout.reduce(0))

    def initial(s):
        if h0_gmem is None:
            return zero
        return load_channels(h0_gmem.at[jnp.minimum(s, B - 1), channel], layout)

    s = first_sequence(cu_gmem, first, B, False)
    begin, stop = cu_gmem[s], cu_gmem[s + 1]
    h = carried(carry_gmem, channel, initial(s), begin, stop, ci, chunk, layout, False)
    power = spread(_power(load_channels(lam_gmem.at[channel], layout), c), layout)
    part = plgpu.broadcasted_iota(jnp.int32, (PARTS, config.block_c), 0, layout=layout)

    # --- 2. main loop
    def tile(q, carry):
        slot = lax.rem(q, config.stages)
        plgpu.barrier_wait(full.at[slot])
        t0 = place(q)
        t1 = jnp.minimum(t0 + config.block_t, end)

        def read(smem, r):
            return load_row(smem, slot, r, layout)

        def sequence(carry):
            _, turn, s, begin, stop, h = carry
            a, b, within = [], [], []
            a_part, b_part = spread(zero, layout) + 1, spread(zero, layout)
            for r in range(rows):
                t = t0 + part * rows + r
                inside = (t >= begin) & (t < stop)
                enters = None if given else t == begin
                x, r_pre, i_pre = (read(smem, r) for smem in (x_smem, r_smem, i_smem))
                a_row, b_row = _map(x, r_pre, i_pre, power, inside, enters)
                within.append(inside)
                a.append(a_row)
                b.append(b_row)
                a_part, b_part = a_part * a_row, a_row * b_part + b_row
            # --- 3. epilogue
            h_row, h, _ = across(maps_smem, turn, a_part, b_part, h, layout, False)
            # --- 4. store
            for r in range(rows):
                h_row = a[r] * h_row + b[r]
                h_kept = jnp.where(within[r], h_row, read(x_smem, r))
                x_smem[slot, :, r] = h_kept.astype(x_smem.dtype)
            done = stop <= t1

            @pl.when(done)
            def _():
                h_T_gmem[s, channel] = h

            following = s + jnp.where(done, 1, 0)
            h = jnp.where(done, initial(following), h)
            begin = jnp.where(done, stop, begin)
            stop = cu_gmem[jnp.minimum(following + 1, B)]
            going = done & (following < B) & ((begin < t1) | (t1 == T))
            return going, 1 - turn, following, begin, stop, h

        carry = lax.while_loop(lambda carry: carry[0], sequence, (carry[1] < B, *carry))
        store_tile(((x_smem, h_gmem),), slot, t0, channel)
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        load(q + config.stages - 1)
        return carry[1:]

    lax.fori_loop(0, trips, tile, (jnp.int32(0), s, begin, stop, h))
    plgpu.wait_smem_to_gmem(0)


def _rglru_bwd_kernel(
    *refs: Any, T: int, B: int, chunk: int, c: float, given: bool, given_T: bool, config: Config
) -> None:
    x_gmem, r_gmem, i_gmem, dh_gmem, h_gmem, lam_gmem, cu_gmem, *states = refs[:-12]
    dx_gmem, dr_gmem, di_gmem, sums_gmem, dh0_gmem = refs[-12:-7]
    x_smem, r_smem, i_smem, dh_smem, h_smem, maps_smem, full = refs[-7:]
    h0_gmem = states.pop(0) if given else None
    dh_T_gmem = states.pop(0) if given_T else None
    carry_gmem = states.pop(0) if states else None
    rows = config.block_t // PARTS
    layout = row_layout(config.block_c)
    # --- 1. which tile
    channel = pl.ds(lax.axis_index("channels") * config.block_c, config.block_c)
    ci = lax.axis_index("chunks")
    first, end = ci * chunk, jnp.minimum((ci + 1) * chunk, T)
    trips = lax.div(end - first + config.block_t - 1, config.block_t)

    def place(q):
        return first + (trips - 1 - q) * config.block_t

    gmem = (x_gmem, r_gmem, i_gmem, dh_gmem, h_gmem)
    smem = (x_smem, r_smem, i_smem, dh_smem, h_smem)
    copies = tuple(zip(gmem, smem, strict=True))
    load = loader(copies, full, channel, trips, place, shifted=4)
    zero = plgpu.layout_cast(jnp.zeros((config.block_c,), jnp.float32), layout.reduce(0))

    def initial(state_gmem, s):
        if state_gmem is None:
            return zero
        return load_channels(state_gmem.at[jnp.maximum(s, 0), channel], layout)

    s = first_sequence(cu_gmem, end, B, True)
    begin, stop = cu_gmem[s], cu_gmem[s + 1]
    v = carried(carry_gmem, channel, initial(dh_T_gmem, s), begin, stop, ci, chunk, layout, True)
    power = spread(_power(load_channels(lam_gmem.at[channel], layout), c), layout)
    slope = power * 0.6931471805599453
    part = plgpu.broadcasted_iota(jnp.int32, (PARTS, config.block_c), 0, layout=layout)

    # --- 2. main loop
    def tile(q, carry):
        slot = lax.rem(q, config.stages)
        plgpu.barrier_wait(full.at[slot])
        t0 = place(q)

        def read(smem, row):
            return load_row(smem, slot, row, layout)

        def sequence(carry):
            _, turn, s, begin, stop, v, sums = carry
            a, r, square, within = ([None] * rows for _ in range(4))
            a_part, b_part = spread(zero, layout) + 1, spread(zero, layout)
            for row in range(rows)[::-1]:
                t = t0 + part * rows + row
                within[row] = (t >= begin) & (t < jnp.minimum(stop, end))
                enters = None if given else t == begin
                r_pre = read(r_smem, row)
                r[row], a[row], square[row] = _decay(r_pre, power, within[row], enters)
                dh = jnp.where(within[row], read(dh_smem, row), 0.0)
                a_part, b_part = a_part * a[row], a[row] * (b_part + dh)
            # --- 3. epilogue
            v_row, v, _ = across(maps_smem, turn, a_part, b_part, v, layout, True)
            # --- 4. store
            h_start = spread(initial(h0_gmem, s), layout)
            for row in range(rows)[::-1]:
                inside, starts = within[row], t0 + part * rows + row == begin
                i, x = _sigmoid(read(i_smem, row)), read(x_smem, row)
                u = v_row + jnp.where(inside, read(dh_smem, row), 0.0)
                v_row = a[row] * u
                root = lax.rsqrt(jnp.abs(square[row]) + 1e-37)  # as in _map
                m, di = square[row] * root, u * i
                dx = di * m
                di = di * x
                h = jnp.where(starts, h_start, read(h_smem, row))
                dlog_a = v_row * h - di * a[row] * a[row] * jnp.minimum(root, 2000.0)
                if not given:
                    dlog_a = jnp.where(starts, 0.0, dlog_a)
                dlog_a = dlog_a * r[row]
                sums = sums + jnp.where(inside, dlog_a, 0.0)
                di = di * m
                for out_smem, grad in (
                    (x_smem, dx),
                    (r_smem, dlog_a * (slope - slope * r[row])),
                    (i_smem, di - di * i),
                ):
                    kept = jnp.where(inside, grad, read(out_smem, row))
                    out_smem[slot, :, row] = kept.astype(out_smem.dtype)
            done = begin >= t0

            @pl.when(done)
            def _():
                dh0_gmem[s, channel] = v

            following = s - jnp.where(done, 1, 0)
            v = jnp.where(done, initial(dh_T_gmem, following), v)
            stop = jnp.where(done, begin, stop)
            begin = cu_gmem[jnp.maximum(following, 0)]
            going = done & (following >= 0) & ((stop > t0) | (t0 == 0))
            return going, 1 - turn, following, begin, stop, v, sums

        carry = lax.while_loop(lambda carry: carry[0], sequence, (carry[1] >= 0, *carry))
        store_tile(((x_smem, dx_gmem), (r_smem, dr_gmem), (i_smem, di_gmem)), slot, t0, channel)
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        load(q + config.stages - 1)
        return carry[1:]

    carry = (jnp.int32(0), s, begin, stop, v, spread(zero, layout))
    *_, sums = lax.fori_loop(0, trips, tile, carry)
    sums_gmem[ci, :, channel] = sums
    plgpu.wait_smem_to_gmem(0)


def _rglru_dlam_kernel(sums_gmem: Any, lam_gmem: Any, dlam_gmem: Any, *, c: float) -> None:
    # --- 1. which tile
    channel = pl.ds(lax.axis_index("channels") * _lib.WARPGROUP, _lib.WARPGROUP)
    layout = plgpu.Layout.WG_STRIDED((_lib.WARPGROUP,), vec_size=1)

    # --- 2. main loop
    def add(i, total):
        return total + plgpu.load(sums_gmem.at[i, channel], layout=layout, optimized=False)

    zero = plgpu.layout_cast(jnp.zeros((_lib.WARPGROUP,), jnp.float32), layout)
    total = lax.fori_loop(0, sums_gmem.shape[0], add, zero)
    # --- 3. epilogue
    lam = plgpu.load(lam_gmem.at[channel], layout=layout, optimized=False)
    # --- 4. store
    dlam_gmem[channel] = -c * total * _sigmoid(lam)


def _rglru_step_kernel(*refs: Any, c: float, given: bool) -> None:
    x_gmem, r_gmem, i_gmem, *h0_gmem, lam_gmem, h_gmem, h_T_gmem = refs
    # --- 1. which tile
    channel = pl.ds(lax.axis_index("channels") * STEP, STEP)
    at = (lax.axis_index("sequences"), channel)
    layout = plgpu.Layout.WG_STRIDED((STEP,), vec_size=STEP // _lib.WARPGROUP)
    # --- 2. main loop: one token
    x, r_pre, i_pre = (
        plgpu.load(ref.at[at], layout=layout).astype(jnp.float32)
        for ref in (x_gmem, r_gmem, i_gmem)
    )
    power = _power(plgpu.load(lam_gmem.at[channel], layout=layout), c)
    # --- 3. epilogue
    if given:
        a, h = _map(x, r_pre, i_pre, power, True, None)
        h = a * plgpu.load(h0_gmem[0].at[at], layout=layout) + h
    else:
        h = _sigmoid(i_pre) * x
    # --- 4. store
    h_gmem[at] = h.astype(h_gmem.dtype)
    h_T_gmem[at] = h


def rglru_fwd(
    x: jax.Array,
    r_pre: jax.Array,
    i_pre: jax.Array,
    lam: jax.Array,
    cu_seqlens: jax.Array,
    h0: jax.Array | None = None,
    *,
    c: float = 8.0,
    config: Config | None = None,
) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    """As `rglru`, and what the backward needs: res = (x, r_pre, i_pre, lam, h, cu_seqlens, h0)."""
    (T, W), B = x.shape, len(cu_seqlens) - 1
    if 0 in (T, W, B):
        h_T = jnp.zeros((B, W), jnp.float32) if h0 is None else h0
        return (jnp.zeros_like(x), h_T), (x, r_pre, i_pre, lam, x, cu_seqlens, h0)
    config = config or default_config(T, W, B, x.dtype)
    chunk, grid = launch_sizes(T, W, config)
    rows = tiled(config, x, r_pre, i_pre)
    columns = grid[1] * config.block_c
    small = (_lib.pad(lam, columns), cu_seqlens, *(() if h0 is None else (_lib.pad(h0, columns),)))
    static = {"T": T, "B": B, "chunk": chunk, "c": c, "given": h0 is not None}
    carry = ()
    if grid[0] > 1:
        carry_type = jax.ShapeDtypeStruct((grid[0], 2, columns), jnp.float32)
        carry = (launch(
            _rglru_carry_kernel, "rglru_carry_kernel", rows, small, carry_type,
            (grid[0] - 1, grid[1]), config, fresh=h0 is None, reverse=False, **static,
        ),)  # fmt: skip
    out_type = [
        jax.ShapeDtypeStruct(rows[0].shape, x.dtype),
        jax.ShapeDtypeStruct((B, columns), jnp.float32),
    ]
    h, h_T = launch(
        _rglru_fwd_kernel, "rglru_fwd_kernel", rows, (*small, *carry), out_type, grid, config,
        **static,
    )  # fmt: skip
    h, h_T = _lib.vary_alike(flat(h, T, W), h_T[:, :W], x)[:2]
    return (h, h_T), (x, r_pre, i_pre, lam, h, cu_seqlens, h0)


def rglru_bwd(
    res: tuple[Any, ...],
    dh: jax.Array,
    dh_T: jax.Array | None = None,
    *,
    c: float = 8.0,
    config: Config | None = None,
) -> tuple[jax.Array, ...]:
    """Gradients of `rglru`.

    res: (x, r_pre, i_pre, lam, h, cu_seqlens, h0) as rglru_fwd returns it.
    dh: [T, W], the cotangent of h; another dtype is rounded to x's.
    dh_T: [B, W] float32, the cotangent of h_T; None is zero.

    Returns (dx, dr_pre, di_pre)[T, W] in x's dtype, dlam[W] float32, and dh0[B, W] float32 if there
    was an h0.
    """
    x, r_pre, i_pre, lam, h, cu_seqlens, h0 = res
    (T, W), B = x.shape, len(cu_seqlens) - 1
    if 0 in (T, W, B):
        zeros = (*(jnp.zeros_like(x) for _ in range(3)), jnp.zeros_like(lam))
        dh0 = jnp.zeros((B, W), jnp.float32) if dh_T is None else dh_T
        return (*zeros, dh0)[: 4 + (h0 is not None)]
    config = config or default_config(T, W, B, x.dtype, "bwd")
    check_backward(config, x.dtype)
    chunk, grid = launch_sizes(T, W, config)
    *rows, h = tiled(config, x, r_pre, i_pre, dh.astype(x.dtype), h)
    rows = (*rows, h.reshape(-1, h.shape[2]))
    columns = grid[1] * config.block_c
    lam_padded = _lib.pad(lam, columns)
    h0_padded, dh_T = (None if s is None else _lib.pad(s, columns) for s in (h0, dh_T))
    static = {"T": T, "B": B, "chunk": chunk, "c": c}
    carry = ()
    if grid[0] > 1:
        states = () if dh_T is None else (dh_T,)
        carry_type = jax.ShapeDtypeStruct((grid[0], 2, columns), jnp.float32)
        carry = (launch(
            _rglru_carry_kernel, "rglru_carry_kernel", (rows[3], rows[1]),
            (lam_padded, cu_seqlens, *states), carry_type, (grid[0] - 1, grid[1]), config,
            fresh=h0 is None, reverse=True, given=dh_T is not None, **static,
        ),)  # fmt: skip
    states = tuple(s for s in (h0_padded, dh_T) if s is not None)
    out_type = [
        *(jax.ShapeDtypeStruct(rows[0].shape, x.dtype) for _ in range(3)),
        jax.ShapeDtypeStruct((grid[0], PARTS, columns), jnp.float32),
        jax.ShapeDtypeStruct((B, columns), jnp.float32),
    ]
    dx, dr, di, sums, dh0 = launch(
        _rglru_bwd_kernel, "rglru_bwd_kernel", rows, (lam_padded, cu_seqlens, *states, *carry),
        out_type, grid, config, arrivals=4 + PARTS, given=h0 is not None, given_T=dh_T is not None,
        **static,
    )  # fmt: skip
    sums, lam_padded = (_lib.pad(s, _lib.WARPGROUP) for s in (sums, lam_padded))
    dlam = plgpu.kernel(
        functools.partial(_rglru_dlam_kernel, c=c),
        out_type=jax.ShapeDtypeStruct(lam_padded.shape, jnp.float32),
        grid=(lam_padded.size // _lib.WARPGROUP,),
        grid_names=("channels",),
        compiler_params=_lib.ROW_PARAMS,
        kernel_name="rglru_dlam_kernel",
    )(sums.reshape(-1, lam_padded.size), lam_padded)
    grads = _lib.vary_alike(*(flat(g, T, W) for g in (dx, dr, di)), dlam[:W], dh0[:, :W], x)
    return grads[: 4 + (h0 is not None)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _rglru(
    x: Any, r_pre: Any, i_pre: Any, lam: Any, cu_seqlens: Any, h0: Any, c: float, config: Any
) -> Any:
    return rglru_fwd(x, r_pre, i_pre, lam, cu_seqlens, h0, c=c, config=config)[0]


def _rglru_fwd(
    x: Any, r_pre: Any, i_pre: Any, lam: Any, cu_seqlens: Any, h0: Any, c: float, config: Any
) -> Any:
    return rglru_fwd(x, r_pre, i_pre, lam, cu_seqlens, h0, c=c, config=config)


def _rglru_bwd(c: float, config: Any, res: Any, cotangents: Any) -> Any:
    del config
    dx, dr, di, dlam, *dh0 = rglru_bwd(res, *cotangents, c=c)
    return dx, dr, di, dlam, None, dh0[0] if dh0 else None


_rglru.defvjp(_rglru_fwd, _rglru_bwd)


def rglru(
    x: jax.Array,
    r_pre: jax.Array,
    i_pre: jax.Array,
    lam: jax.Array,
    cu_seqlens: jax.Array,
    h0: jax.Array | None = None,
    *,
    c: float = 8.0,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """h[T, W] = a * (h of the token before) + sqrt(1 - a^2) * sigmoid(i_pre) * x, and the last
    states h_T[B, W]; log a = -c * sigmoid(r_pre) * softplus(lam). Differentiable.

    x, r_pre, i_pre: [T, W], bfloat16, float16 or float32, the same; h has their dtype.
    lam: [W] float32.
    cu_seqlens: [B + 1] int32, from 0 to T: the tokens of sequence s begin at cu_seqlens[s]. It is
        read on the device alone: linear_scan_check looks at what it holds.
    h0: [B, W] float32, the states before the first tokens. None: each sequence begins anew, and its
        first token enters as it is, neither decayed nor scaled by the root. h_T is float32.
    config: tiles of this call; gradients take their own default.

    Raises ValueError for a wrong rank or size and TypeError for a wrong dtype, config or keyword.
    """
    _lib.check_array("x", x, ("T", "W"), DTYPES)
    for name, gate in (("r_pre", r_pre), ("i_pre", i_pre)):
        _lib.check_array(name, gate, tuple(x.shape), (x.dtype,))
    _lib.check_array("lam", lam, (x.shape[1],), (jnp.float32,))
    check_sequences(cu_seqlens, x.shape[1], h0=h0)
    _lib.check_static("c", c, (float, int))
    _lib.check_config(config, Config)
    given = (x, r_pre, i_pre, lam, cu_seqlens, *(() if h0 is None else (h0,)))
    x, r_pre, i_pre, lam, cu_seqlens, *states = _lib.vary_alike(*given)
    h0 = states[0] if states else None
    return _rglru(x, r_pre, i_pre, lam, cu_seqlens, h0, float(c), config)


def rglru_step(
    x: jax.Array,
    r_pre: jax.Array,
    i_pre: jax.Array,
    lam: jax.Array,
    h0: jax.Array | None = None,
    *,
    c: float = 8.0,
) -> tuple[jax.Array, jax.Array]:
    """One token of each of B sequences: (h[B, W] in x's dtype, h_T[B, W] float32).

    x, r_pre, i_pre: [B, W], lam: [W] float32, h0: [B, W] float32 or None as in rglru; h_T is the
    next step's h0. There is no gradient.
    """
    _lib.check_array("x", x, ("B", "W"), DTYPES)
    for name, gate in (("r_pre", r_pre), ("i_pre", i_pre)):
        _lib.check_array(name, gate, tuple(x.shape), (x.dtype,))
    _lib.check_array("lam", lam, (x.shape[1],), (jnp.float32,))
    if h0 is not None:
        _lib.check_array("h0", h0, tuple(x.shape), (jnp.float32,))
    _lib.check_static("c", c, (float, int))
    rows = (x, r_pre, i_pre, *(() if h0 is None else (h0,)))
    return step(
        _rglru_step_kernel, "rglru_step_kernel", rows, (lam,), c=float(c), given=h0 is not None
    )
