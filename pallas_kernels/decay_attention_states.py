"""States of decay attention: where sequences are cut, the walk that leaves states only, the scan.

    span    a part of one sequence, a multiple of 64 tokens from the sequence's start on: what one
            block of threads walks over. A sequence without tokens has one span, without tokens.
    slot    the number of a chunk of 64 tokens among those of all sequences

    states kernel, forwards:     S = e^(b_n) S + (e^(b_n - b) u k)^T v       chunk by chunk
            against time:        dS = e^(b_n) dS + (scale e^b q)^T dy
    scan kernel: from what every span adds to a state, and how far it decays one: what enters each

Spans are numbered with gaps: those of sequence s begin at cu_seqlens[s] // span + s, where they
always find room, whatever comes before them. So a block finds its own by halving, and nothing has
to be summed. Slots are spans of 64 tokens. Bounds of sequences are clamped to 0 .. T, so that wrong
ones lead to no address outside the arrays.

Twin: triton_kernels/decay_attention_states.py.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import _lib

CHUNK = 64  # tokens of a chunk: the rows of a wgmma
GATES = 2 * CHUNK  # of a chunk and head: b in units of log 2, and u
PITCH = GATES + 4  # their room: 128 rows of them, written column by column, miss each other's banks
PARAMS = plgpu.CompilerParams(
    approx_math=True,
    reduction_scratch_bytes=0,  # rows alone are reduced, within warps
    lowering_semantics=plgpu.LoweringSemantics.Lane,
)
LOG2E = 1.4426950408889634
LANES = plgpu.Layout.TILED(
    plgpu.Tiling(((128,), (32,), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
)  # a head for each lane
LAYOUT = plgpu.Layout.WGMMA
ROW, COLUMN = LAYOUT.reduce(1), LAYOUT.reduce(0)  # one value for each row, for each column


DTYPES = (jnp.bfloat16, jnp.float16)


def check_tokens(tokens: dict[str, Any], chunk: Any = CHUNK, rows: str = "T") -> None:
    """Raises unless q, k [T, Hq, K] and v [T, H, V] of one dtype, by the names of their arguments,
    fit one another and the kernels' tiles."""
    for name, x in tokens.items():
        if getattr(x, "dtype", None) == jnp.float32:
            raise TypeError(
                f"{name}: expected dtype bfloat16 or float16, got float32, which wgmma would round "
                "to TF32 (10 bits of mantissa)"
            )
    (q_name, q), (k_name, k), (v_name, v) = tokens.items()
    _lib.check_array(q_name, q, (rows, "Hq", "K"), DTYPES)
    T, Hq, K = q.shape
    _lib.check_array(k_name, k, (T, Hq, K), (q.dtype,))
    _lib.check_array(v_name, v, (T, "H", "V"), (q.dtype,))
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
    if chunk != CHUNK:
        raise ValueError(f"chunk: expected {CHUNK}, the rows of a wgmma, got {chunk}")


def check_gates(g: Any, i: Any, T: int, H: int) -> None:
    """Raises unless g is [T, H] or [H], and i [T, H] if there is one."""
    constant = getattr(g, "ndim", 2) == 1
    _lib.check_array("g", g, (H,) if constant else (T, H), (jnp.float32,))
    if i is not None:
        _lib.check_array("i", i, (T, H), (jnp.float32,))


def check_states(cu_seqlens: Any, sizes: tuple[int, ...], **states: Any) -> None:
    """Raises unless cu_seqlens has the form of bounds, and states are [B, *sizes]; it does not look
    at what the bounds are."""
    _lib.check_array("cu_seqlens", cu_seqlens, ("B + 1",), (jnp.int32,))
    if len(cu_seqlens) == 0:
        raise ValueError("cu_seqlens: expected shape [B + 1], got [0]")
    for name, S in states.items():
        if S is not None:
            _lib.check_array(name, S, (len(cu_seqlens) - 1, *sizes), (jnp.float32,))


def most_spans(T: int, B: int, span: int) -> int:
    """Room for the spans that any B sequences of T tokens in all can have."""
    return T // span + B


def find_span(cu_gmem: Any, p: Any, T: int, span: int) -> tuple[Any, Any, Any, Any, Any]:
    """(sequence, first token, token past the last, whether the sequence begins, whether it ends) of
    span p; without tokens, and neither begins nor ends, if there is none."""
    B = cu_gmem.shape[0] - 1

    def bound(s: Any) -> Any:
        return jnp.clip(cu_gmem[s], 0, T)

    def halve(_: Any, found: tuple[Any, Any]) -> tuple[Any, Any]:
        low, high = found  # the last sequence whose spans begin at p or before is one of these
        mid = lax.div(low + high + 1, 2)
        before = lax.div(bound(mid), span) + mid <= p
        return jnp.where(before, mid, low), jnp.where(before, high, mid - 1)

    s = p
    if span < T:
        sequences = (jnp.int32(0), jnp.int32(B - 1))
        s = lax.fori_loop(0, (B - 1).bit_length(), halve, sequences)[0]
    start = bound(s)
    stop = jnp.maximum(bound(s + 1), start)
    skipped = (p - (lax.div(start, span) + s)) * span if span < T else 0
    # before a sequence lies nothing but what a wrong cu_seqlens makes of it
    first = jnp.where(skipped < 0, stop, jnp.minimum(start + skipped, stop))
    end = jnp.minimum(first + span, stop)
    begins = skipped == 0
    exists = begins | (first < stop)
    return s, first, end, exists & begins, exists & (end == stop)


def slot_of(s: Any, start: Any, first: Any) -> Any:
    """The slot of the chunk at token `first` of sequence s, which begins at token `start`."""
    return lax.div(start, CHUNK) + s + lax.div(first - start, CHUNK)


def swizzled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory that TMA fills and wgmma reads."""
    return plgpu.SMEM(shape, dtype, transforms=_lib.swizzled(dtype))


def stored(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory that TMA stores any rows of."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.SwizzleTransform(128),))


def filled(shape: tuple[int, ...], value: float) -> jax.Array:
    """float32 in registers, laid out as an accumulator or as one of its columns."""
    layout = LAYOUT if len(shape) == 2 else ROW
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def across(x: jax.Array, columns: int) -> jax.Array:
    return lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


def down(x: jax.Array, rows: int) -> jax.Array:
    return lax.broadcast_in_dim(x, (rows, x.shape[0]), [1])


def iota(shape: tuple[int, int], dimension: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=LAYOUT)


def load_tile(smem: Any) -> jax.Array:
    return plgpu.load(smem, layout=LAYOUT).astype(jnp.float32)


def load_gates(gates_smem: Any, which: int, layout: Any) -> jax.Array:
    """b (0) or u (1) of a chunk's tokens. [64]"""
    at = gates_smem.at[pl.ds(which * CHUNK, CHUNK)]
    return plgpu.load(at, layout=layout, optimized=False)


def clear(smem: Any, live: Any) -> None:
    """Zeros for the rows from `live` on, another sequence's tokens: 0 * NaN would not be 0."""

    @pl.loop(0, smem.shape[1] // 64)
    def _(i: Any) -> None:
        piece = smem.at[:, pl.ds(i * 64, 64)]
        rows = plgpu.load(piece, layout=LAYOUT)
        piece[...] = jnp.where(iota(rows.shape, 0) < live, rows, jnp.zeros_like(rows))


def meet(met: Any, warpgroups: int) -> None:
    """None of the warpgroups goes on before all are here."""
    if warpgroups > 1:
        plgpu.barrier_arrive(met)
        plgpu.barrier_wait(met)


def store_rows(y_smem: Any, live: Any, target: Callable[[Any, int], Any]) -> None:
    """Stores the first `live` rows: shapes of a copy are static, so one for each bit of `live`.

    target(lo, n): where rows lo .. lo + n go, or their first columns. It lies inside the array if
    it is contiguous memory: Mosaic turns such a copy into a plain bulk copy, which does not end
    where the rows end but runs on into what comes next (jax 0.11.2; the interpreter clips it).
    """
    lo, size = 0, y_smem.shape[0]
    while size:

        @pl.when((live & size) != 0)
        def _(lo: Any = lo, size: int = size) -> None:
            rows, to = y_smem.at[pl.ds(lo, size)], target(lo, size)
            if to.shape[1] < y_smem.shape[1]:
                rows = rows.at[:, pl.ds(0, to.shape[1])]
            plgpu.copy_smem_to_gmem(rows, to, commit_group=False)

        lo += live & size
        size //= 2
    plgpu.commit_smem_to_gmem_group()


def load_state(S_gmem: Any, at: Any, h: Any, v: Any, transposed: bool) -> jax.Array:
    """[K, block_v] of states [.., H, K, V], or [.., H, V, K] if transposed."""
    if transposed:
        S = plgpu.load(
            S_gmem.at[at, h, v, :].T, layout=plgpu.Layout.WGMMA_TRANSPOSED, optimized=False
        )
        return plgpu.layout_cast(S, LAYOUT)
    return plgpu.load(S_gmem.at[at, h, :, v], layout=LAYOUT, optimized=False)


def store_state(S_gmem: Any, at: Any, h: Any, v: Any, S: jax.Array, transposed: bool) -> None:
    if transposed:
        S_gmem.at[at, h, v, :].T[...] = plgpu.layout_cast(S, plgpu.Layout.WGMMA_TRANSPOSED)
    else:
        S_gmem[at, h, :, v] = S


class Walk:
    """The ring of slots in which the warpgroups of a block meet chunk after chunk.

    copy(c, slot, barrier) starts the copies of chunk c. The first warpgroup calls it, once all have
    left the slot.
    """

    def __init__(
        self, full: Any, free: Any, stages: int, chunks: Any, copy: Callable[[Any, Any, Any], None]
    ):
        self.full, self.free, self.stages, self.chunks, self.copy = full, free, stages, chunks, copy
        for slot in range(stages):  # all is free at the start
            plgpu.barrier_arrive(free.at[slot])

        @pl.loop(0, stages - 1)
        def _(c: Any) -> None:
            self.load(c)

    def load(self, c: Any) -> None:
        @pl.when((lax.axis_index("wg") == 0) & (c < self.chunks))
        def _() -> None:
            slot = lax.rem(c, self.stages)
            plgpu.barrier_wait(self.free.at[slot])
            self.copy(c, slot, self.full.at[slot])

    def enter(self, c: Any, loads: bool = True) -> Any:
        """The slot of chunk c, once it is there; later ones are on their way then, as far as the
        first warpgroup is here."""
        if loads:
            self.load(c + self.stages - 1)
        slot = lax.rem(c, self.stages)
        plgpu.barrier_wait(self.full.at[slot])
        return slot

    def leave(self, slot: Any) -> None:
        plgpu.barrier_arrive(self.free.at[slot])

    def end(self) -> None:
        """A barrier may not go away before all its completions were waited for."""

        @pl.when(lax.axis_index("wg") == 0)
        def _() -> None:
            for slot in range(self.stages):
                plgpu.barrier_wait(self.free.at[slot])


def panel(warpgroups: int, w: Any, heads: int, block_v: int, V: int) -> tuple[Any, Any]:
    """(head, columns of v) of warpgroup w of this block; heads: those of a group."""
    parts = V // block_v
    i = lax.axis_index("panels") * warpgroups + w
    h = lax.axis_index("group") * heads + lax.div(i, parts)
    return h, pl.ds(lax.rem(i, parts) * block_v, block_v)


def _decay_attention_states_kernel(
    *refs: Any, scale: float, span: int, cut: bool, given: bool, each: bool, carries: bool,
    transposed: bool, reverse: bool, config: Any,
) -> None:  # fmt: skip
    x_gmem, y_gmem, gates_gmem, cu_gmem, *more = refs[:-8]
    x_smem, y_smem, gates_smem, w_smem, S_smem, full, free, met = refs[-8:]
    enters_gmem = more.pop(0) if given else None  # [B or, if cut, spans, H, K, V]
    each_gmem = more.pop(0) if each else None  # [slots, H, K, V]
    leaves_gmem, *total_gmem = more  # [B, H, K, V], or [spans, H, K, V] and [spans, H]
    T, groups, _ = x_gmem.shape
    _, H, V = y_gmem.shape
    warpgroups, _, block_v = S_smem.shape
    # --- 1. which tile
    wg = lax.axis_index("wg")
    p = lax.axis_index("span")
    s, first, end, begins, ends = find_span(cu_gmem, p, T, span)
    start = jnp.clip(cu_gmem[s], 0, T)
    chunks = lax.div(end - first + CHUNK - 1, CHUNK)
    place = functools.partial(panel, warpgroups, heads=H // groups, block_v=block_v, V=V)
    h, v = place(wg)
    exists = begins | (first < end)

    def token(c: Any) -> Any:
        return first + (chunks - 1 - c if reverse else c) * CHUNK

    def copy(c: Any, slot: Any, barrier: Any) -> None:
        t = token(c)
        rows, at = pl.ds(t, CHUNK), slot_of(s, start, t)
        plgpu.copy_gmem_to_smem(x_gmem.at[rows, lax.axis_index("group")], x_smem.at[slot], barrier)
        for w in range(warpgroups):
            h, v = place(w)
            plgpu.copy_gmem_to_smem(y_gmem.at[rows, h, v], y_smem.at[slot, w], barrier)
            gates = gates_gmem.at[at, h, pl.ds(0, GATES)]
            plgpu.copy_gmem_to_smem(gates, gates_smem.at[slot, w], barrier)

    walk = Walk(full, free, config.stages, chunks, copy)
    S = filled((x_gmem.shape[2], block_v), 0.0)
    if enters_gmem is not None:
        S = load_state(enters_gmem, p if cut else s, h, v, transposed and not cut)

    # --- 2. main loop
    def chunk(c: Any, carry: Any) -> Any:
        S, total = carry
        slot = walk.enter(c)
        t = token(c)
        live = jnp.minimum(end - t, CHUNK)
        x_tile, y_tile, gates = x_smem.at[slot], y_smem.at[slot, wg], gates_smem.at[slot, wg]

        @pl.when(live < CHUNK)
        def _() -> None:
            pl.when(wg == 0)(lambda: clear(x_tile, live))
            clear(y_tile, live)
            plgpu.commit_smem()
            meet(met, warpgroups)

        b, b_n = load_gates(gates, 0, ROW), gates[CHUNK - 1]
        if reverse:
            w = scale * jnp.exp2(b)
        else:
            w = jnp.exp2(b_n - b) * load_gates(gates, 1, ROW)
        if each_gmem is not None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            S_smem[wg] = S.astype(S_smem.dtype)
        for i in range(0, x_gmem.shape[2], 64):
            x = load_tile(x_tile.at[:, pl.ds(i, 64)]) * across(w, 64)
            w_smem.at[wg, :, pl.ds(i, 64)][...] = x.astype(w_smem.dtype)
        plgpu.commit_smem()
        if each_gmem is not None:
            at = slot_of(s, start, t)
            plgpu.copy_smem_to_gmem(S_smem.at[wg], each_gmem.at[at, h, :, v])

        def add(S_acc: Any) -> None:
            plgpu.wgmma(S_acc, w_smem.at[wg].T, y_tile)

        S = pl.run_state(add)(plgpu.ACC.init(S * jnp.exp2(b_n)))
        walk.leave(slot)
        return S, total + b_n

    S, total = lax.fori_loop(0, chunks, chunk, (S, jnp.float32(0)))

    # --- 3. epilogue
    walk.end()
    plgpu.wait_smem_to_gmem(0)

    # --- 4. store
    if carries:

        @pl.when(exists)
        def _() -> None:
            store_state(leaves_gmem, p, h, v, S, False)

            @pl.when(v.start == 0)
            def _() -> None:
                total_gmem[0][p, h] = total
    else:

        @pl.when(begins if reverse else ends)
        def _() -> None:
            store_state(leaves_gmem, s, h, v, S, transposed)


def _decay_attention_scan_kernel(
    *refs: Any, T: int, span: int, given: bool, transposed: bool, reverse: bool
) -> None:
    added_gmem, total_gmem, cu_gmem, *S0_gmem, enters_gmem = refs
    # --- 1. which tile
    s, h = lax.axis_index("sequence"), lax.axis_index("head")
    v = pl.ds(lax.axis_index("panel") * 64, 64)
    start = jnp.clip(cu_gmem[s], 0, T)
    stop = jnp.clip(cu_gmem[s + 1], start, T)
    p = lax.div(start, span) + s
    spans = jnp.maximum(lax.div(stop - start + span - 1, span), 1)
    S = filled((added_gmem.shape[2], 64), 0.0)
    if given:
        S = load_state(S0_gmem[0], s, h, v, transposed)

    # --- 2. main loop
    def one(j: Any, S: jax.Array) -> jax.Array:
        at = p + (spans - 1 - j if reverse else j)
        # --- 3. epilogue
        new = S * jnp.exp2(total_gmem[at, h]) + load_state(added_gmem, at, h, v, False)
        # --- 4. store
        store_state(enters_gmem, at, h, v, S, False)
        return new

    lax.fori_loop(0, spans, one, S)


def launch_states(
    x: jax.Array, y: jax.Array, gates: jax.Array, cu_seqlens: jax.Array, enters: jax.Array | None,
    *, span: int, scale: float, each: bool, carries: bool, transposed: bool, reverse: bool,
    config: Any,
) -> list[jax.Array]:  # fmt: skip
    """The states kernel over all spans: [the state that enters each chunk, in x's dtype, if each],
    then those that leave the sequences, or if carries what the spans add, and their decays."""
    (T, groups, K), (_, H, V), B = x.shape, y.shape, len(cu_seqlens) - 1
    block_v, wgs, stages = config.block_v, config.warpgroups, config.stages
    cut, given = span < T, enters is not None
    spans = most_spans(T, B, span) if cut else B
    out = []
    if each:
        out.append(jax.ShapeDtypeStruct((most_spans(T, B, CHUNK), H, K, V), x.dtype))
    if carries:
        out += [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((spans, H, K, V), (spans, H))]
    else:
        out.append(jax.ShapeDtypeStruct((B, H, *((V, K) if transposed else (K, V))), jnp.float32))
    kernel = functools.partial(
        _decay_attention_states_kernel, scale=scale, span=span, cut=cut, given=given, each=each,
        carries=carries, transposed=transposed, reverse=reverse, config=config,
    )  # fmt: skip
    return launch(
        kernel, "decay_attention_states_kernel", out,
        [
            swizzled((stages, CHUNK, K), x.dtype),
            swizzled((stages, wgs, CHUNK, block_v), x.dtype),
            plgpu.SMEM((stages, wgs, GATES), jnp.float32),
            swizzled((wgs, CHUNK, K), x.dtype),
            swizzled((wgs, K, block_v), x.dtype),
            *barriers(config, 1 + 2 * wgs),
        ],
        (spans, groups, H // groups * (V // block_v) // wgs),
        (x, y, gates, cu_seqlens, *([enters] if enters is not None else [])), wgs,
    )  # fmt: skip


def barriers(config: Any, copies: int) -> tuple[Any, Any, Any]:
    """Of a Walk whose slots `copies` fill, and one for `meet`."""
    stages, warpgroups = config.stages, config.warpgroups
    return (
        plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        plgpu.Barrier(num_arrivals=warpgroups),
    )


def launch(
    kernel: Any, name: str, out_type: Any, scratch: list[Any], grid: tuple[int, ...],
    arrays: tuple[Any, ...], warpgroups: int = 1,
) -> Any:  # fmt: skip
    names = ("span", "group", "panels") if len(grid) == 3 else ("slot", "heads")
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch,
        grid=grid,
        grid_names=names,
        num_threads=warpgroups,
        thread_name="wg",
        compiler_params=PARAMS,
        kernel_name=name,
    )(*arrays)


def entering_states(
    x: jax.Array, y: jax.Array, gates: jax.Array, cu_seqlens: jax.Array, initial: jax.Array | None,
    *, span: int, scale: float, transposed: bool, reverse: bool, config: Any,
) -> jax.Array | None:  # fmt: skip
    """The states that enter every span, from those that enter sequences."""
    T, (_, H, V), B = x.shape[0], y.shape, len(cu_seqlens) - 1
    if span >= T:  # a span is a sequence
        return initial
    added, total = launch_states(
        x, y, gates, cu_seqlens, None, span=span, scale=scale, each=False, carries=True,
        transposed=transposed, reverse=reverse, config=config,
    )  # fmt: skip
    kernel = functools.partial(
        _decay_attention_scan_kernel, T=T, span=span, given=initial is not None,
        transposed=transposed, reverse=reverse,
    )  # fmt: skip
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(added.shape, jnp.float32),
        grid=(B, H, V // 64),
        grid_names=("sequence", "head", "panel"),
        compiler_params=PARAMS,
        kernel_name="decay_attention_scan_kernel",
    )(added, total, cu_seqlens, *([initial] if initial is not None else []))
