"""Diagonal linear recurrence over packed sequences, with a state that enters and one that leaves.

    h[t] = a[t] * h[t-1] + b[t]      within a sequence; before its first token: h0[s], or 0
    h_T[s] = h[cu[s+1] - 1]          of an empty sequence: h0[s]

    for each chunk of time that a sequence leaves unfinished: its map h -> A h + B
    one block of threads for block_c channels of a chunk; TMA loads its tiles into a ring of slots:
        for each sequence that has a part in a tile (tokens of others are the identity):
            the 4 parts of the tile become maps, row by row; the parts exchange them
            h = a * h + b, row by row; where the sequence ends: h_T = h, and the next one's h0
        TMA stores the slot

    Backward, the same against time, for v = a[t+1] * u[t+1]:
        u = v + dh; v = a * u                  a map too: v -> a v + a dh
        da = u * h[t-1]; db = u                where the sequence begins: dh0 = v

Nothing depends on what cu_seqlens holds but the work: nothing is compiled or read by the host when
lengths change. A state never passes from one sequence to another, be it NaN.
How tiles, parts and sequences are walked over: linear_scan_walk.py.

Limits: Hopper; bfloat16, float16, float32; states in float32. The product of all a of a tile must
be finite (|a| <= 1, mostly). Rows that do not start at multiples of 16 bytes are padded, in XLA.

Twin: triton_kernels/linear_scan.py.

Sources: Blelloch, Prefix sums and their applications (CMU-CS-90-190), for maps that compose; Martin
and Cundy (arXiv:1709.04057) for the recurrence and its gradient as such scans.
"""

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import _lib
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

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


@dataclass(frozen=True)
class Config:
    """Tile sizes and resources of the kernels; beyond the last bits the result ignores them.

    block_t: tokens of a tile, a quarter of them for each warp.
    block_c: channels of a block of threads.
    chunks: how many chunks time is cut into; 1 reads a and b just once.
    stages: slots for tiles, all but one of them being loaded or stored.
    """

    block_t: int = 32
    block_c: int = 128
    chunks: int = 1
    stages: int = 4

    def __post_init__(self) -> None:
        if self.block_t < 2 * PARTS or self.block_t % PARTS or self.block_t > 256:
            raise ValueError(
                f"block_t: expected a multiple of {PARTS} from 8 to 256, got {self.block_t}"
            )
        if self.block_c not in (32, 64, 128, 256):
            raise ValueError(f"block_c: expected 32, 64, 128 or 256, got {self.block_c}")
        if self.chunks < 1:
            raise ValueError(f"chunks: expected at least 1, got {self.chunks}")
        if not 2 <= self.stages <= 32:
            raise ValueError(f"stages: expected 2 to 32, got {self.stages}")


def default_config(T: int, W: int, B: int, dtype: Any, which: str = "fwd") -> Config:
    """The Config for T tokens in B sequences of W channels; which: "fwd" or "bwd"."""
    # Each lane takes up to 32 elements of a tile.
    return Config(*tiling(T, W, B, dtype, which, 4096, 2 if which == "fwd" else 3))


def _linear_scan_carry_kernel(
    *refs: Any, T: int, W: int, B: int, chunk: int, given: bool, reverse: bool, config: Config
) -> None:
    a_gmem, b_gmem, cu_gmem, *state_gmem, carry_gmem, a_smem, b_smem, maps_smem, full = refs
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

    load = loader(((a_gmem, a_smem), (b_gmem, b_smem)), full, channel, trips, place)
    zero = plgpu.layout_cast(jnp.zeros((config.block_c,), jnp.float32), layout.reduce(0))
    state = zero
    if given:
        entering = load_channels(state_gmem[0].at[s, channel], layout)
        state = jnp.where(starts, entering, zero)
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
            a, b = (load_row(x, slot, r, layout) for x in (a_smem, b_smem))
            a, b = jnp.where(inside, a, 1.0), jnp.where(inside, b, 0.0)
            b_part = a * (b_part + b) if reverse else a * b_part + b
            a_part = a_part * a
        _, state, a_all = across(maps_smem, lax.rem(q, 2), a_part, b_part, state, layout, reverse)
        load(q + config.stages - 1)
        return state, product * a_all

    # --- 3. epilogue
    state, product = lax.fori_loop(0, trips, tile, (state, zero + 1))

    # --- 4. store
    @pl.when(unfinished)
    def _():
        carry_gmem[ci, 0, channel] = product
        carry_gmem[ci, 1, channel] = state


def _linear_scan_fwd_kernel(
    *refs: Any, T: int, W: int, B: int, chunk: int, given: bool, config: Config
) -> None:
    a_gmem, b_gmem, cu_gmem, *more, h_gmem, h_T_gmem, a_smem, b_smem, maps_smem, full = refs
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

    load = loader(((a_gmem, a_smem), (b_gmem, b_smem)), full, channel, trips, place)
    zero = plgpu.layout_cast(jnp.zeros((config.block_c,), jnp.float32), layout.reduce(0))

    def initial(s):
        if h0_gmem is None:
            return zero
        return load_channels(h0_gmem.at[jnp.minimum(s, B - 1), channel], layout)

    s = first_sequence(cu_gmem, first, B, False)
    begin, stop = cu_gmem[s], cu_gmem[s + 1]
    h = carried(carry_gmem, channel, initial(s), begin, stop, ci, chunk, layout, False)
    part = plgpu.broadcasted_iota(jnp.int32, (PARTS, config.block_c), 0, layout=layout)

    # --- 2. main loop
    def tile(q, carry):
        slot = lax.rem(q, config.stages)
        plgpu.barrier_wait(full.at[slot])
        t0 = place(q)
        t1 = jnp.minimum(t0 + config.block_t, end)

        def sequence(carry):
            _, turn, s, begin, stop, h = carry
            a, b, kept = [], [], []
            a_part, b_part = spread(zero, layout) + 1, spread(zero, layout)
            for r in range(rows):
                t = t0 + part * rows + r
                inside = (t >= begin) & (t < stop)
                a_row, b_row = (load_row(x, slot, r, layout) for x in (a_smem, b_smem))
                kept.append((inside, b_row))
                a.append(jnp.where(inside, a_row, 1.0))
                b.append(jnp.where(inside, b_row, 0.0))
                a_part, b_part = a_part * a[r], a[r] * b_part + b[r]
            # --- 3. epilogue
            h_row, h, _ = across(maps_smem, turn, a_part, b_part, h, layout, False)
            # --- 4. store
            for r in range(rows):
                h_row = a[r] * h_row + b[r]
                inside, b_row = kept[r]
                b_smem[slot, :, r] = jnp.where(inside, h_row, b_row).astype(b_smem.dtype)
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
        store_tile(((b_smem, h_gmem),), slot, t0, channel)
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        load(q + config.stages - 1)
        return carry[1:]

    lax.fori_loop(0, trips, tile, (jnp.int32(0), s, begin, stop, h))
    plgpu.wait_smem_to_gmem(0)


def _linear_scan_bwd_kernel(
    *refs: Any, T: int, W: int, B: int, chunk: int, given: bool, given_T: bool, config: Config
) -> None:
    inputs, outputs, scratch = refs[: 4 + given + given_T], refs[-8:-5], refs[-5:]
    a_gmem, dh_gmem, h_gmem, cu_gmem, *states = inputs
    h0_gmem = states[0] if given else None
    dh_T_gmem = states[-1] if given_T else None
    carry_gmem = refs[len(inputs)] if len(refs) > len(inputs) + 8 else None
    da_gmem, db_gmem, dh0_gmem = outputs
    a_smem, dh_smem, h_smem, maps_smem, full = scratch
    rows = config.block_t // PARTS
    layout = row_layout(config.block_c)
    # --- 1. which tile
    channel = pl.ds(lax.axis_index("channels") * config.block_c, config.block_c)
    ci = lax.axis_index("chunks")
    first, end = ci * chunk, jnp.minimum((ci + 1) * chunk, T)
    trips = lax.div(end - first + config.block_t - 1, config.block_t)

    def place(q):
        return first + (trips - 1 - q) * config.block_t

    copies = ((a_gmem, a_smem), (dh_gmem, dh_smem), (h_gmem, h_smem))
    load = loader(copies, full, channel, trips, place, shifted=2)
    zero = plgpu.layout_cast(jnp.zeros((config.block_c,), jnp.float32), layout.reduce(0))

    def initial(state_gmem, s):
        if state_gmem is None:
            return zero
        return load_channels(state_gmem.at[jnp.maximum(s, 0), channel], layout)

    s = first_sequence(cu_gmem, end, B, True)
    begin, stop = cu_gmem[s], cu_gmem[s + 1]
    v = carried(carry_gmem, channel, initial(dh_T_gmem, s), begin, stop, ci, chunk, layout, True)
    part = plgpu.broadcasted_iota(jnp.int32, (PARTS, config.block_c), 0, layout=layout)

    # --- 2. main loop
    def tile(q, carry):
        slot = lax.rem(q, config.stages)
        plgpu.barrier_wait(full.at[slot])
        t0 = place(q)

        def read(smem, r):
            return load_row(smem, slot, r, layout)

        def sequence(carry):
            _, turn, s, begin, stop, v = carry
            a, dh, kept = [None] * rows, [None] * rows, [None] * rows
            a_part, b_part = spread(zero, layout) + 1, spread(zero, layout)
            for r in range(rows)[::-1]:
                t = t0 + part * rows + r
                inside = (t >= begin) & (t < jnp.minimum(stop, end))
                dh_row = read(dh_smem, r)
                kept[r] = (inside, t == begin, dh_row)
                a[r] = jnp.where(inside, read(a_smem, r), 1.0)
                dh[r] = jnp.where(inside, dh_row, 0.0)
                a_part, b_part = a_part * a[r], a[r] * (b_part + dh[r])
            # --- 3. epilogue
            v_row, v, _ = across(maps_smem, turn, a_part, b_part, v, layout, True)
            # --- 4. store
            h_start = spread(initial(h0_gmem, s), layout)
            for r in range(rows)[::-1]:
                u = v_row + dh[r]
                v_row = a[r] * u
                inside, starts, dh_row = kept[r]
                h_row = read(h_smem, r)
                da = u * jnp.where(starts, h_start, h_row)
                h_smem[slot, :, r] = jnp.where(inside, da, h_row).astype(h_smem.dtype)
                dh_smem[slot, :, r] = jnp.where(inside, u, dh_row).astype(dh_smem.dtype)
            done = begin >= t0

            @pl.when(done)
            def _():
                dh0_gmem[s, channel] = v

            following = s - jnp.where(done, 1, 0)
            v = jnp.where(done, initial(dh_T_gmem, following), v)
            stop = jnp.where(done, begin, stop)
            begin = cu_gmem[jnp.maximum(following, 0)]
            going = done & (following >= 0) & ((stop > t0) | (t0 == 0))
            return going, 1 - turn, following, begin, stop, v

        carry = lax.while_loop(lambda carry: carry[0], sequence, (carry[1] >= 0, *carry))
        store_tile(((h_smem, da_gmem), (dh_smem, db_gmem)), slot, t0, channel)
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        load(q + config.stages - 1)
        return carry[1:]

    lax.fori_loop(0, trips, tile, (jnp.int32(0), s, begin, stop, v))
    plgpu.wait_smem_to_gmem(0)


def _linear_scan_step_kernel(*refs: Any, given: bool) -> None:
    a_gmem, b_gmem, *h0_gmem, h_gmem, h_T_gmem = refs
    # --- 1. which tile
    at = (lax.axis_index("sequences"), pl.ds(lax.axis_index("channels") * STEP, STEP))
    layout = plgpu.Layout.WG_STRIDED((STEP,), vec_size=STEP // _lib.WARPGROUP)
    # --- 2. main loop: one token
    a, b = (plgpu.load(x.at[at], layout=layout).astype(jnp.float32) for x in (a_gmem, b_gmem))
    # --- 3. epilogue
    h = a * plgpu.load(h0_gmem[0].at[at], layout=layout) + b if given else b
    # --- 4. store
    h_gmem[at] = h.astype(h_gmem.dtype)
    h_T_gmem[at] = h


def linear_scan_check(cu_seqlens: jax.Array, *, T: int) -> None:
    """Raises ValueError if cu_seqlens [B + 1] does not grow from 0 to T; it waits for the device.

    The kernels do not: what they then return is not defined, but they stay inside their arrays.
    """
    _lib.check_array("cu_seqlens", cu_seqlens, ("B + 1",), (jnp.int32,))
    _lib.check_static("T", T, (int,))
    bounds = [int(t) for t in cu_seqlens]
    if not bounds or bounds[0] != 0:
        raise ValueError(f"cu_seqlens: expected to begin with 0, got {bounds[:1]}")
    for s, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if stop < start:
            raise ValueError(
                f"cu_seqlens: expected in ascending order, got {stop} after {start} (sequence {s})"
            )
    if bounds[-1] != T:
        raise ValueError(f"cu_seqlens: expected to end with T = {T}, got {bounds[-1]}")


def linear_scan_fwd(
    a: jax.Array,
    b: jax.Array,
    cu_seqlens: jax.Array,
    h0: jax.Array | None = None,
    *,
    config: Config | None = None,
) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    """As `linear_scan`, and what the backward needs: res = (a, h, cu_seqlens, h0)."""
    (T, W), B = a.shape, len(cu_seqlens) - 1
    if 0 in (T, W, B):
        h_T = jnp.zeros((B, W), jnp.float32) if h0 is None else h0
        return (jnp.zeros_like(a), h_T), (a, a, cu_seqlens, h0)
    config = config or default_config(T, W, B, a.dtype)
    chunk, grid = launch_sizes(T, W, config)
    rows = tiled(config, a, b)
    columns = grid[1] * config.block_c
    states = () if h0 is None else (_lib.pad(h0, columns),)
    static = {"T": T, "W": W, "B": B, "chunk": chunk, "given": h0 is not None}
    carry = ()
    if grid[0] > 1:
        carry_type = jax.ShapeDtypeStruct((grid[0], 2, columns), jnp.float32)
        carry = (launch(
            _linear_scan_carry_kernel, "linear_scan_carry_kernel", rows, (cu_seqlens, *states),
            carry_type, (grid[0] - 1, grid[1]), config, reverse=False, **static,
        ),)  # fmt: skip
    out_type = [
        jax.ShapeDtypeStruct(rows[0].shape, a.dtype),
        jax.ShapeDtypeStruct((B, columns), jnp.float32),
    ]
    h, h_T = launch(
        _linear_scan_fwd_kernel, "linear_scan_fwd_kernel", rows, (cu_seqlens, *states, *carry),
        out_type, grid, config, **static,
    )  # fmt: skip
    h, h_T = _lib.vary_alike(flat(h, T, W), h_T[:, :W], a)[:2]
    return (h, h_T), (a, h, cu_seqlens, h0)


def linear_scan_bwd(
    res: tuple[Any, ...],
    dh: jax.Array,
    dh_T: jax.Array | None = None,
    *,
    config: Config | None = None,
) -> tuple[jax.Array, ...]:
    """Gradients of `linear_scan`.

    res: (a[T, W], h[T, W], cu_seqlens[B + 1], h0[B, W] or None) as linear_scan_fwd returns it.
    dh: [T, W], the cotangent of h; another dtype is rounded to a's.
    dh_T: [B, W] float32, the cotangent of h_T; None is zero.

    Returns (da, db)[T, W] in a's dtype, and dh0[B, W] float32 if there was an h0.
    """
    a, h, cu_seqlens, h0 = res
    (T, W), B = a.shape, len(cu_seqlens) - 1
    if 0 in (T, W, B):
        dh0 = jnp.zeros((B, W), jnp.float32) if dh_T is None else dh_T
        grads = (jnp.zeros_like(a), jnp.zeros_like(a), dh0)
        return grads[: 2 + (h0 is not None)]
    config = config or default_config(T, W, B, a.dtype, "bwd")
    check_backward(config, a.dtype)
    chunk, grid = launch_sizes(T, W, config)
    *rows, h = tiled(config, a, dh.astype(a.dtype), h)
    rows = (*rows, h.reshape(-1, h.shape[2]))
    columns = grid[1] * config.block_c
    h0_padded, dh_T = (None if x is None else _lib.pad(x, columns) for x in (h0, dh_T))
    sizes = {"T": T, "W": W, "B": B, "chunk": chunk}
    carry = ()
    if grid[0] > 1:
        states = () if dh_T is None else (dh_T,)
        carry_type = jax.ShapeDtypeStruct((grid[0], 2, columns), jnp.float32)
        carry = (launch(
            _linear_scan_carry_kernel, "linear_scan_carry_kernel", rows[:2],
            (cu_seqlens, *states), carry_type, (grid[0] - 1, grid[1]), config,
            reverse=True, given=dh_T is not None, **sizes,
        ),)  # fmt: skip
    states = tuple(x for x in (h0_padded, dh_T) if x is not None)
    out_type = [
        jax.ShapeDtypeStruct(rows[0].shape, a.dtype),
        jax.ShapeDtypeStruct(rows[0].shape, a.dtype),
        jax.ShapeDtypeStruct((B, columns), jnp.float32),
    ]
    da, db, dh0 = launch(
        _linear_scan_bwd_kernel, "linear_scan_bwd_kernel", rows, (cu_seqlens, *states, *carry),
        out_type, grid, config, arrivals=2 + PARTS, given=h0 is not None, given_T=dh_T is not None,
        **sizes,
    )  # fmt: skip
    grads = _lib.vary_alike(flat(da, T, W), flat(db, T, W), dh0[:, :W], a)
    return grads[: 2 + (h0 is not None)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _linear_scan(a: Any, b: Any, cu_seqlens: Any, h0: Any, config: Any) -> Any:
    return linear_scan_fwd(a, b, cu_seqlens, h0, config=config)[0]


def _linear_scan_fwd(a: Any, b: Any, cu_seqlens: Any, h0: Any, config: Any) -> Any:
    return linear_scan_fwd(a, b, cu_seqlens, h0, config=config)


def _linear_scan_bwd(config: Any, res: Any, cotangents: Any) -> Any:
    da, db, *dh0 = linear_scan_bwd(res, *cotangents)
    return da, db, None, dh0[0] if dh0 else None


_linear_scan.defvjp(_linear_scan_fwd, _linear_scan_bwd)


def linear_scan(
    a: jax.Array,
    b: jax.Array,
    cu_seqlens: jax.Array,
    h0: jax.Array | None = None,
    *,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """h[T, W] = a * (h of the token before) + b, and the last states h_T[B, W]. Differentiable.

    a, b: [T, W], bfloat16, float16 or float32, the same; h has their dtype.
    cu_seqlens: [B + 1] int32, from 0 to T: the tokens of sequence s begin at cu_seqlens[s]. It is
        read on the device alone: linear_scan_check looks at what it holds.
    h0: [B, W] float32, the states before the first tokens; None is zero. h_T is float32.
    config: tiles of this call; gradients take their own default.

    Raises ValueError for a wrong rank or size and TypeError for a wrong dtype or config.
    """
    _lib.check_array("a", a, ("T", "W"), DTYPES)
    _lib.check_array("b", b, tuple(a.shape), (a.dtype,))
    check_sequences(cu_seqlens, a.shape[1], h0=h0)
    _lib.check_config(config, Config)
    given = (a, b, cu_seqlens) if h0 is None else (a, b, cu_seqlens, h0)
    a, b, cu_seqlens, *states = _lib.vary_alike(*given)
    return _linear_scan(a, b, cu_seqlens, states[0] if states else None, config)


def linear_scan_step(
    a: jax.Array, b: jax.Array, h0: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """One token of each of B sequences: (h[B, W] in a's dtype, h_T[B, W] float32).

    a, b: [B, W], h0: [B, W] float32 or None as in linear_scan; h_T is the next step's h0. There is
    no gradient.
    """
    _lib.check_array("a", a, ("B", "W"), DTYPES)
    _lib.check_array("b", b, tuple(a.shape), (a.dtype,))
    if h0 is not None:
        _lib.check_array("h0", h0, tuple(a.shape), (jnp.float32,))
    given = (a, b, *(() if h0 is None else (h0,)))
    return step(_linear_scan_step_kernel, "linear_scan_step_kernel", given, given=h0 is not None)
