"""Gates of decay attention: sums of logarithms within chunks, weights, and Mamba-2's step sizes.

    b = sum of g within the chunk of a token, up to it, in units of log 2        u = exp(i)
    Mamba-2: u = clamp(softplus(dt + bias)), g = u A      RetNet: g = log(1 - 2^(-5 - h))

One pass over [T, H] that leaves [slots, H, 132]: of a chunk and a head 64 of b and 64 of u, side by
side, so that one copy brings them. What a chunk lacks at a sequence's end is filled up (g = 0,
u = 0). The backward kernel takes gradients of that shape back to tokens.

Twin: triton_kernels/decay_attention_gates.py.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import _lib
from .decay_attention_states import (
    CHUNK,
    LANES,
    LOG2E,
    PITCH,
    find_span,
    launch,
    most_spans,
    store_rows,
)

HEADS = 128  # of a block, one for each lane


class StepSizes(NamedTuple):
    """How Mamba-2 makes gates of dt."""

    A: jax.Array  # [H]
    bias: jax.Array | None  # [H]
    softplus: bool
    low: float
    high: float


def step_size(dt: Any, bias: Any, softplus: bool, low: float, high: float) -> tuple[Any, Any]:
    """(clamp(softplus(dt + bias)), its derivative with respect to dt) of heads. [heads]"""
    if bias is not None:
        dt = dt + bias
    slope = jnp.ones_like(dt)
    if softplus:
        z = jnp.exp2(jnp.abs(dt) * -LOG2E)
        slope = jnp.where(dt >= 0, 1.0, z) / (1.0 + z)
        # log(1 + z) = 2 atanh(z / (2 + z)), to the last bits where z is small
        w = z / (2.0 + z)
        w2 = w * w
        series = 1.0 / 9 + w2 * (1.0 / 11 + w2 * (1.0 / 13 + w2 * (1.0 / 15)))
        series = 1.0 + w2 * (1.0 / 3 + w2 * (1.0 / 5 + w2 * (1.0 / 7 + w2 * series)))
        dt = jnp.maximum(dt, 0.0) + 2.0 * w * series
    outside = (dt < low) | (dt > high)
    limited = jnp.where(dt < low, low, jnp.where(dt > high, high, dt))  # NaN stays
    return limited, jnp.where(outside, 0.0, slope)


def load_lanes(x_gmem: Any, *at: Any) -> jax.Array:
    return plgpu.load(x_gmem.at[at], layout=LANES, optimized=False)


def room_for(H: int) -> int:
    """Columns of an array [T, H] for store_tokens: whole copies and, if several, whole blocks."""
    return _lib.cdiv(H, 4) * 4 if H <= HEADS else _lib.cdiv(H, HEADS) * HEADS


def store_tokens(x_smem: Any, live: Any, x_gmem: Any, first: Any) -> None:
    """Stores the first `live` tokens of a chunk to x_gmem [T, heads], from token `first` on.

    TMA leaves out the heads that x_gmem lacks, but not of one token, which is contiguous memory
    (see store_rows): it is told how many there are.
    """
    own = lax.axis_index("heads") * HEADS
    some = min(HEADS, x_gmem.shape[1])

    def target(lo: Any, n: int) -> Any:
        return x_gmem.at[pl.ds(first + lo, n), pl.ds(own, HEADS if n > 1 else some)]

    store_rows(x_smem, live, target)


def no_heads() -> jax.Array:
    return plgpu.layout_cast(jnp.zeros((HEADS,), jnp.float32), LANES)


def _decay_attention_gates_kernel(
    *refs: Any, T: int, constant: bool, weighted: bool, steps: tuple[Any, ...] | None
) -> None:
    g_gmem, *more, cu_gmem, gates_gmem, g_smem, i_smem, gates_smem, full = refs
    # --- 1. which tile
    p, heads = lax.axis_index("slot"), pl.ds(lax.axis_index("heads") * HEADS, HEADS)
    _, first, end, _, _ = find_span(cu_gmem, p, T, CHUNK)
    rows = pl.ds(first, CHUNK)
    i_gmem = more.pop(0) if weighted else None  # [T, H]
    # Beyond T and H TMA fills with zeros.
    if not constant:
        plgpu.copy_gmem_to_smem(g_gmem.at[rows, heads], g_smem, full.at[0])
        plgpu.barrier_wait(full.at[0])
    if i_gmem is not None:
        plgpu.copy_gmem_to_smem(i_gmem.at[rows, heads], i_smem, full.at[1])
        plgpu.barrier_wait(full.at[1])
    zero = no_heads()
    always = load_lanes(g_gmem, heads) if constant else None
    A, *bias = (load_lanes(x, heads) for x in more) if steps is not None else (None,)

    # --- 2. main loop
    def token(t: Any, b: jax.Array) -> jax.Array:
        inside = first + t < end
        g, u = load_lanes(g_smem, t) if always is None else always, zero + 1
        if steps is not None:
            u, _ = step_size(g, bias[0] if bias else None, *steps)
            g = u * A
        b = b + jnp.where(inside, g * LOG2E, zero)
        if weighted:
            u = jnp.exp2(load_lanes(i_smem, t) * LOG2E)
        gates_smem[:, t] = b
        gates_smem[:, CHUNK + t] = jnp.where(inside, u, zero)
        return b

    lax.fori_loop(0, CHUNK, token, zero)

    # --- 3. epilogue
    plgpu.commit_smem()

    # --- 4. store
    live = jnp.minimum(gates_gmem.shape[1] - heads.start, HEADS)
    store_rows(gates_smem, live, lambda lo, n: gates_gmem.at[p, pl.ds(heads.start + lo, n)])
    plgpu.wait_smem_to_gmem(0)


def _decay_attention_gates_bwd_kernel(
    *refs: Any, T: int, constant: bool, weighted: bool, entered: bool
) -> None:
    dgates_gmem, gates_gmem, cu_gmem, dg_gmem, *di_gmem = refs[:-5]
    dgates_smem, gates_smem, dg_smem, di_smem, full = refs[-5:]
    # --- 1. which tile
    p, heads = lax.axis_index("slot"), pl.ds(lax.axis_index("heads") * HEADS, HEADS)
    _, first, end, begins, _ = find_span(cu_gmem, p, T, CHUNK)
    live = end - first
    plgpu.copy_gmem_to_smem(dgates_gmem.at[p, heads], dgates_smem, full.at[0])
    plgpu.barrier_wait(full.at[0])
    if weighted:
        plgpu.copy_gmem_to_smem(gates_gmem.at[p, heads], gates_smem, full.at[1])
        plgpu.barrier_wait(full.at[1])

    # --- 2. main loop
    def token(t: Any, total: jax.Array) -> jax.Array:
        at = pl.ds(0, HEADS)
        dg = load_lanes(dgates_smem, at, t)
        if not entered:  # nothing decays at a first token: what is left of its sums is rounding
            dg = jnp.where(begins & (t == 0), no_heads(), dg)
        if not constant:
            dg_smem[t] = dg
        if weighted:
            di_smem[t] = load_lanes(dgates_smem, at, CHUNK + t) * load_lanes(
                gates_smem, at, CHUNK + t
            )
        return total + dg

    total = lax.fori_loop(0, live, token, no_heads())

    # --- 3. epilogue
    plgpu.commit_smem()

    # --- 4. store
    if constant:
        dg_gmem[p, heads] = total
    else:
        store_tokens(dg_smem, live, dg_gmem, first)
    if weighted:
        store_tokens(di_smem, live, di_gmem[0], first)
    plgpu.wait_smem_to_gmem(0)


def _decay_attention_sum_kernel(x_gmem: Any, sum_gmem: Any, *, along: int) -> None:
    # --- 1. which tile
    own = pl.ds(lax.axis_index("columns") * HEADS, HEADS)
    count, some = x_gmem.shape[along], 16  # loads under way at once

    # --- 2. main loop
    def rows(n: Any, total: jax.Array) -> jax.Array:
        at = [jnp.minimum(n * some + i, count - 1) for i in range(some)]
        read = [load_lanes(x_gmem, *((r, own) if along == 0 else (own, r))) for r in at]
        for i, x in enumerate(read):
            total = total + jnp.where(n * some + i < count, x, 0.0)
        return total

    # --- 3. epilogue
    total = lax.fori_loop(0, _lib.cdiv(count, some), rows, no_heads())

    # --- 4. store
    sum_gmem[own] = total


def sum_along(x: jax.Array, along: int) -> jax.Array:
    """The sums of a float32 matrix over its rows (0) or columns (1), in their order."""
    size = x.shape[1 - along]
    x = _lib.pad(x, HEADS) if along == 0 else _lib.pad(x, HEADS, 1)
    room = x.shape[1 - along]
    return plgpu.kernel(
        functools.partial(_decay_attention_sum_kernel, along=along),
        out_type=jax.ShapeDtypeStruct((room,), jnp.float32),
        grid=(room // HEADS,),
        grid_names=("columns",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="decay_attention_sum_kernel",
    )(x)[:size]


def gates_of(
    g: jax.Array | None, i: jax.Array | None, cu_seqlens: jax.Array, T: int, H: int,
    steps: StepSizes | None = None,
) -> jax.Array:  # fmt: skip
    """[slots, H, 132] float32: of each chunk and head 64 of b, 64 of u, and room.

    g: [T, H]; [H], the same at all times; None for RetNet's. With steps it holds step sizes dt.
    """
    if g is None:
        g = jnp.array([math.log1p(-(2.0 ** (-5 - h))) for h in range(H)], jnp.float32)
    slots = most_spans(T, len(cu_seqlens) - 1, CHUNK)
    # TMA wants rows at multiples of 16 bytes; what is the same at all times is read directly.
    arrays = [_lib.pad(x, HEADS if x.ndim == 1 else 4) for x in (g, i) if x is not None]
    if steps is not None:
        arrays += [_lib.pad(x, HEADS) for x in steps[:2] if x is not None]
    kernel = functools.partial(
        _decay_attention_gates_kernel, T=T, constant=g.ndim == 1, weighted=i is not None,
        steps=None if steps is None else steps[2:],
    )  # fmt: skip
    return launch(
        kernel, "decay_attention_gates_kernel",
        jax.ShapeDtypeStruct((slots, H, PITCH), jnp.float32),
        [
            plgpu.SMEM((CHUNK, HEADS if g.ndim == 2 else 4), jnp.float32),
            plgpu.SMEM((CHUNK, HEADS if i is not None else 4), jnp.float32),
            plgpu.SMEM((HEADS, PITCH), jnp.float32),
            plgpu.Barrier(num_barriers=2),
        ],
        (slots, _lib.cdiv(H, HEADS)),
        (*arrays, cu_seqlens),
    )  # fmt: skip


def gates_bwd(
    dgates: jax.Array, gates: jax.Array, cu_seqlens: jax.Array, T: int, *, constant: bool,
    weighted: bool, entered: bool,
) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
    """(dg, di): [T, H], or for a constant g [H]; None without an i. entered: by states."""
    slots, H, _ = gates.shape
    room = _lib.cdiv(H, HEADS) * HEADS if constant else room_for(H)
    row = jax.ShapeDtypeStruct((T, room_for(H)), jnp.float32)
    dg, *di = launch(
        functools.partial(
            _decay_attention_gates_bwd_kernel,
            T=T,
            constant=constant,
            weighted=weighted,
            entered=entered,
        ),
        "decay_attention_gates_bwd_kernel",
        [
            jax.ShapeDtypeStruct((slots if constant else T, room), jnp.float32),
            *([row] if weighted else []),
        ],
        [
            plgpu.SMEM((HEADS, PITCH), jnp.float32),
            plgpu.SMEM((HEADS, PITCH), jnp.float32),
            plgpu.SMEM((CHUNK, HEADS), jnp.float32),
            plgpu.SMEM((CHUNK, HEADS), jnp.float32),
            plgpu.Barrier(num_barriers=2),
        ],
        (slots, _lib.cdiv(H, HEADS)),
        (dgates, gates, cu_seqlens),
    )
    if constant:
        dg = sum_along(dg, 0)
    return dg[..., :H], di[0][:, :H] if weighted else None
