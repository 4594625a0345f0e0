"""Gradients of hybrid attention: two walks over the same tiles, each in a fixed order.

    p[i, j] = exp(x[i, j] - lse[i])     delta[i] = sum_d do[i] o[i] - dlse[i]
    dx = p * (do @ v^T - delta)         under a softcap times 1 - tanh^2
    dv = p^T @ do       dk = scale * dx^T @ q       dq = scale * dx @ k

    delta: for every token and head
    dq: for each tile of queries and head: for each tile of keys that one of them may see:
            x = q @ k^T, dp = do @ v^T, dq += dx @ k
    dk, dv: for each tile of keys and head of theirs: for each of the G heads that share them, for
            each tile of queries that may see one of them:
            x^T = k @ q^T, dp^T = v @ do^T, dv += p^T @ do, dk += dx^T @ q

p^T and dx^T come out of their products as the first operand of the next, in registers: nothing is
transposed. Rows of dead tokens are cleared where a product runs over them.

Twin: triton_kernels/hybrid_attention_bwd.py.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import _lib
from .hybrid_attention_plan import ORDERED, TILE, HybridPlan
from .hybrid_attention_tiles import (
    COLUMN,
    COMPUTE_REGISTERS,
    LAYOUT,
    LOG2E,
    MEMORY_REGISTERS,
    PARAMS,
    ROW,
    WARPGROUPS,
    Tiles,
    across,
    aligned,
    capped,
    clear_dead,
    down,
    filled,
    load,
    padded,
    piece,
    visible,
    warpgroup,
)


def shared(block_m: int, D: int) -> tuple[Any, int]:
    """(the rows of a tile that a warpgroup works at, and the columns of its sums; how many those).

    64 rows each; or all have the same 64, and part the columns of the sums, whose registers they
    would not have alone.
    """
    wide = D if block_m > TILE else D // WARPGROUPS

    def share() -> tuple[Any, Any]:
        if block_m > TILE:
            return pl.ds(warpgroup() * TILE, TILE), pl.ds(0, wide)
        # Row 0 for both, in words that the compiler does not see through: see `warpgroup`.
        return pl.ds(warpgroup() // WARPGROUPS * TILE, TILE), pl.ds(warpgroup() * wide, wide)

    return share, wide


def meet(met: Any) -> None:
    """Neither warpgroup goes on before the other is here."""
    plgpu.barrier_arrive(met)
    plgpu.barrier_wait(met)


def _hybrid_attention_delta_kernel(
    o_gmem: Any,  # [T, Hq, D]
    do_gmem: Any,
    lse_gmem: Any,  # [Hq, T and room up to a multiple of 128]
    dlse_gmem: Any,
    kv_start_gmem: Any,  # [T and that room]
    kv_end_gmem: Any,
    rows_gmem: Any,  # [Hq, 2, as lse]: lse in units of log 2, and delta
    o_smem: Any,  # [128, D]
    do_smem: Any,
    rows_smem: Any,  # [warpgroups, 2, 64]
    full: Any,
) -> None:
    # --- 1. which tile
    h, wg = lax.axis_index("h"), lax.axis_index("wg")
    row = lax.axis_index("rows") * ORDERED + wg * TILE
    own = pl.ds(wg * TILE, TILE)
    plgpu.copy_gmem_to_smem(o_gmem.at[pl.ds(row, TILE), h], o_smem.at[own], full.at[wg])
    plgpu.copy_gmem_to_smem(do_gmem.at[pl.ds(row, TILE), h], do_smem.at[own], full.at[wg])
    lse, dlse = (load(x_gmem.at[h], row, TILE, ROW) for x_gmem in (lse_gmem, dlse_gmem))
    start, stop = (load(x_gmem, row, TILE, ROW) for x_gmem in (kv_start_gmem, kv_end_gmem))
    plgpu.barrier_wait(full.at[wg])

    # --- 2. main loop
    columns = piece(o_smem.shape[1])

    def add(i: Any, total: jax.Array) -> jax.Array:
        o, do = (
            plgpu.load(x.at[own, pl.ds(i * columns, columns)], layout=LAYOUT).astype(jnp.float32)
            for x in (o_smem, do_smem)
        )
        return total + (o * do).sum(axis=1)

    total = lax.fori_loop(0, o_smem.shape[1] // columns, add, filled((TILE,), 0.0))

    # --- 3. epilogue
    rows_smem[wg, 0] = lse * LOG2E
    rows_smem[wg, 1] = jnp.where(start < stop, total - dlse, 0.0)  # dead tokens have NaN
    plgpu.commit_smem()

    # --- 4. store
    plgpu.copy_smem_to_gmem(rows_smem.at[wg], rows_gmem.at[h, :, pl.ds(row, TILE)])
    plgpu.wait_smem_to_gmem(0)


def _hybrid_attention_dq_kernel(
    *refs: Any, scale: float, softcap: float, biased: bool, config: Any
) -> None:
    given = iter(refs)
    q_gmem, k_gmem, v_gmem, do_gmem = (next(given) for _ in range(4))  # [T, heads, D]
    rows_gmem = next(given)  # [Hq, 2, T]: lse in units of log 2, and delta
    kv_start_gmem, kv_end_gmem, q_start_gmem, q_end_gmem, pos_gmem = (
        next(given) for _ in range(5)
    )  # [T]
    tiles_gmem, order_gmem = next(given), next(given)
    alibi_gmem = next(given) if biased else None  # [Hq]
    dq_gmem = next(given)
    q_smem, do_smem, k_smem, v_smem = (next(given) for _ in range(4))
    q_full, q_free, k_full, k_free, v_full, v_free, met = (next(given) for _ in range(7))
    _, Hq, D = q_gmem.shape
    G = Hq // k_gmem.shape[1]
    block_m, block_n, stages = config.block_m, config.block_n, config.stages
    shares = block_m == TILE  # the warpgroups, the rows
    tiles = Tiles(tiles_gmem, block_n)
    wg = lax.axis_index("wg")
    parts = ORDERED // block_m  # tiles of queries of an entry of the order
    items = functools.partial(
        plgpu.nd_loop,
        (order_gmem.shape[0], parts, Hq),
        collective_axes="sm",
        init_carry=jnp.int32(0),
    )

    def place(item: Any) -> Any:
        # --- 1. which tile
        i, part, h = item.index
        mi = order_gmem[i] * parts + part
        low, high = tiles.keys_of(mi * (block_m // TILE), block_m // TILE)
        row = mi * block_m
        return row, h, jnp.minimum(tiles.seek(low, row), high - 1), high

    def slot_of(step: Any) -> Any:
        return lax.rem(step, jnp.int32(stages))

    @pl.when(wg == WARPGROUPS)
    def _memory() -> None:
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

        @items()
        def _item(item: Any, *, carry: Any) -> Any:
            top, h, first, high = place(item)
            rows = pl.ds(top, block_m)
            plgpu.barrier_wait(q_free)
            plgpu.copy_gmem_to_smem(q_gmem.at[rows, h], q_smem, q_full)
            plgpu.copy_gmem_to_smem(do_gmem.at[rows, h], do_smem, q_full)

            def fill(state: Any) -> Any:
                ni, step = state
                slot, keys = slot_of(step), pl.ds(ni * block_n, block_n)
                plgpu.barrier_wait(k_free.at[slot])
                plgpu.copy_gmem_to_smem(k_gmem.at[keys, h // G], k_smem.at[slot], k_full.at[slot])
                plgpu.barrier_wait(v_free.at[slot])
                plgpu.copy_gmem_to_smem(v_gmem.at[keys, h // G], v_smem.at[slot], v_full.at[slot])
                return tiles.seek(ni + 1, top), step + 1

            return lax.while_loop(lambda state: state[0] < high, fill, (first, carry))[1]

        plgpu.barrier_wait(q_free)
        for slot in range(stages):
            plgpu.barrier_wait(k_free.at[slot])
            plgpu.barrier_wait(v_free.at[slot])

    @pl.when(wg < WARPGROUPS)
    def _compute() -> None:
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        plgpu.barrier_arrive(q_free)
        for slot in range(stages):
            plgpu.barrier_arrive(k_free.at[slot])
            plgpu.barrier_arrive(v_free.at[slot])
        share, wide = shared(block_m, D)

        @items()
        def _item(item: Any, *, carry: Any) -> Any:
            top, h, first, high = place(item)
            row = top + share()[0].start
            lse, delta = (load(rows_gmem.at[h, i], row, TILE, ROW) for i in range(2))

            # --- 2. main loop
            def visit(state: Any) -> Any:
                ni, step, acc = state
                slot, n = slot_of(step), ni * block_n
                plgpu.barrier_wait(k_full.at[slot])
                plgpu.barrier_wait(v_full.at[slot])
                dead = tiles.dead(ni)
                clear_dead((k_smem.at[slot],), dead, n, kv_start_gmem, kv_end_gmem, wg, met)

                def gradient(s_acc: Any, dp_acc: Any) -> jax.Array:
                    own, _ = share()
                    plgpu.wgmma(s_acc, q_smem.at[own], k_smem.at[slot].T)
                    plgpu.wgmma(dp_acc, do_smem.at[own], v_smem.at[slot].T)
                    s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
                    slope = pos = theirs = None
                    if alibi_gmem is not None:
                        slope, pos = alibi_gmem[h], load(pos_gmem, row, TILE, ROW)
                        theirs = load(pos_gmem, n, block_n, COLUMN)
                    x, factor, bend = capped(s, scale, softcap, slope, pos, theirs)
                    p = jnp.exp2(x * factor - across(lse, block_n))
                    dx = p * (dp_acc[...] - across(delta, block_n))
                    return dx if bend is None else dx * bend

                def masked(dx: jax.Array) -> jax.Array:
                    start, stop = (
                        load(x_gmem, n, block_n, COLUMN) for x_gmem in (q_start_gmem, q_end_gmem)
                    )
                    return jnp.where(visible(row, start, stop, TILE), dx, 0.0)

                scores = plgpu.ACC((TILE, block_n), jnp.float32)
                dx = pl.run_scoped(gradient, scores, scores)
                plgpu.barrier_arrive(v_free.at[slot])
                free = tiles.seen(ni, row // TILE)
                dx = lax.cond(free, lambda dx: dx, masked, dx).astype(k_smem.dtype)

                def add(dq_acc: Any) -> None:
                    plgpu.wgmma(dq_acc, dx, k_smem.at[slot, :, share()[1]])

                acc = pl.run_state(add)(plgpu.ACC.init(acc))
                plgpu.barrier_arrive(k_free.at[slot])
                return tiles.seek(ni + 1, top), step + 1, acc

            plgpu.barrier_wait(q_full)
            state = (first, carry, filled((TILE, wide), 0.0))
            _, step, acc = lax.while_loop(lambda state: state[0] < high, visit, state)

            # --- 3. epilogue
            dq = (acc * scale).astype(dq_gmem.dtype)

            # --- 4. store
            own, columns = share()
            if shares:
                meet(met)
            q_smem.at[own, columns][...] = dq
            plgpu.commit_smem()
            if shares:
                meet(met)

            @pl.when((wg == 0) | (block_m > TILE))
            def _() -> None:
                plgpu.copy_smem_to_gmem(q_smem.at[own], dq_gmem.at[pl.ds(row, TILE), h])

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(q_free)
            return step

        plgpu.wait_smem_to_gmem(0)


def _hybrid_attention_dkdv_kernel(
    *refs: Any, scale: float, softcap: float, biased: bool, config: Any, summed: bool = False
) -> None:
    given = iter(refs)
    q_gmem, k_gmem, v_gmem, do_gmem = (next(given) for _ in range(4))  # [T, heads, D]
    rows_gmem = next(given)  # [Hq, 2, T]: lse in units of log 2, and delta
    kv_start_gmem, kv_end_gmem, q_start_gmem, q_end_gmem, pos_gmem = (
        next(given) for _ in range(5)
    )  # [T]
    tiles_gmem, order_gmem = next(given), next(given)
    alibi_gmem = next(given) if biased else None  # [Hq]
    dq_gmem = next(given) if summed else None  # float32 sums, as q
    dk_gmem, dv_gmem = next(given), next(given)
    k_smem, v_smem, q_smem, do_smem, rows_smem = (next(given) for _ in range(5))
    kv_full, kv_free, q_full, q_free, do_full, do_free, met = (next(given) for _ in range(7))
    dx_smem, dq_smem = (next(given, None) for _ in range(2))  # where dq is summed
    (_, Hk, D), Hq = k_gmem.shape, q_gmem.shape[1]
    G = Hq // Hk
    block_m, block_n, stages = config.block_m, config.block_n, config.stages
    shares = block_m == TILE  # the warpgroups, the rows
    tiles, fine = Tiles(tiles_gmem, block_n), Tiles(tiles_gmem, TILE)
    wg = lax.axis_index("wg")
    parts = ORDERED // block_m  # tiles of keys of an entry of the order
    items = functools.partial(
        plgpu.nd_loop,
        (order_gmem.shape[0], parts, Hk),
        collective_axes="sm",
        init_carry=jnp.int32(0),
    )

    def place(item: Any) -> Any:
        # --- 1. which tile
        i, part, h = item.index
        mi = order_gmem[i] * parts + part
        low, high = tiles.queries_of(mi * (block_m // TILE), block_m // TILE)
        return mi * block_m, h, low, high

    def slot_of(step: Any) -> Any:
        return lax.rem(step, jnp.int32(stages))

    @pl.when(wg == WARPGROUPS)
    def _memory() -> None:
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

        @items()
        def _item(item: Any, *, carry: Any) -> Any:
            key, h, low, high = place(item)
            keys = pl.ds(key, block_m)
            plgpu.barrier_wait(kv_free)
            plgpu.copy_gmem_to_smem(k_gmem.at[keys, h], k_smem, kv_full)
            plgpu.copy_gmem_to_smem(v_gmem.at[keys, h], v_smem, kv_full)

            @pl.loop(0, G * (high - low))
            def _fill(i: Any) -> None:
                slot = slot_of(carry + i)
                head = h * G + lax.div(i, high - low)
                rows = pl.ds((low + lax.rem(i, high - low)) * block_n, block_n)
                plgpu.barrier_wait(q_free.at[slot])
                for x_gmem, x_smem in (
                    (q_gmem.at[rows, head], q_smem),
                    (rows_gmem.at[head, :, rows], rows_smem),
                ):
                    plgpu.copy_gmem_to_smem(x_gmem, x_smem.at[slot], q_full.at[slot])
                plgpu.barrier_wait(do_free.at[slot])
                plgpu.copy_gmem_to_smem(do_gmem.at[rows, head], do_smem.at[slot], do_full.at[slot])

            return carry + G * (high - low)

        plgpu.barrier_wait(kv_free)
        for slot in range(stages):
            plgpu.barrier_wait(q_free.at[slot])
            plgpu.barrier_wait(do_free.at[slot])

    @pl.when(wg < WARPGROUPS)
    def _compute() -> None:
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        plgpu.barrier_arrive(kv_free)
        for slot in range(stages):
            plgpu.barrier_arrive(q_free.at[slot])
            plgpu.barrier_arrive(do_free.at[slot])

        share, wide = shared(block_m, D)

        def put(slot: Any, own: Any, dx: jax.Array) -> None:
            """dx^T of all keys of the block, where all warpgroups see it."""

            @pl.when((wg == 0) | (block_m > TILE))
            def _() -> None:
                slot.at[own][...] = dx

            plgpu.commit_smem()
            plgpu.barrier_arrive(met)

        def add(slot: Any, step: Any, n: Any, head: Any) -> None:
            """dq += dx @ k, by TMA: half of the columns each, or in turns where half is too few."""
            plgpu.barrier_wait(met)
            width = dq_smem.shape[2]
            wg = warpgroup()
            part = pl.ds(wg * width if width < D else 0, width)

            def own_part() -> None:
                def product(dq_acc: Any) -> jax.Array:
                    plgpu.wgmma(dq_acc, slot.T, k_smem.at[:, part])
                    return dq_acc[...]

                dq = pl.run_scoped(product, plgpu.ACC((block_n, width), jnp.float32))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                dq_smem.at[wg][...] = dq
                plgpu.commit_smem()
                sums = dq_gmem.at[pl.ds(n, block_n), head, part]
                plgpu.copy_smem_to_gmem(dq_smem.at[wg], sums, reduction_op="add")

            if width < D:
                own_part()
            else:
                pl.when(wg == lax.rem(step, WARPGROUPS))(own_part)

        @items()
        def _item(item: Any, *, carry: Any) -> Any:
            first, h, low, high = place(item)

            # --- 2. main loop
            def visit(step: Any, state: Any) -> Any:
                dead, ni, head, dk, dv = state
                own, columns = share()
                key = first + own.start
                slot = slot_of(step)
                n = ni * block_n
                q_slot, do_slot = q_smem.at[slot], do_smem.at[slot]
                # Here, since memory takes its time.
                free = [fine.seen(key // TILE, n // TILE + i) for i in range(block_n // TILE)]
                free = functools.reduce(jnp.logical_and, free)
                plgpu.barrier_wait(q_full.at[slot])
                plgpu.barrier_wait(do_full.at[slot])
                clear_dead((q_slot, do_slot), dead, n, kv_start_gmem, kv_end_gmem, wg, met)

                def masked(p: jax.Array) -> jax.Array:
                    start, stop = (
                        load(x_gmem, key, TILE, ROW) - n for x_gmem in (q_start_gmem, q_end_gmem)
                    )
                    i = plgpu.broadcasted_iota(jnp.int32, p.shape, 1, layout=LAYOUT)
                    # One end after the other: registers are scarce.
                    p = jnp.where(i >= across(start, block_n), p, 0.0)
                    seen = i < across(stop, block_n)
                    return jnp.where(seen, p, 0.0)

                def products(s_acc: Any, dp_acc: Any, dk_acc: Any, dv_acc: Any) -> Any:
                    dk_acc[...] = dk
                    dv_acc[...] = dv
                    delta = load(rows_smem.at[slot, 1], 0, block_n, COLUMN)
                    dp_acc[...] = down(0.0 - delta, TILE)  # before the first product is under way
                    plgpu.wgmma(s_acc, k_smem.at[own], q_slot.T)
                    plgpu.wgmma(dp_acc, v_smem.at[own], do_slot.T)
                    lse = load(rows_smem.at[slot, 0], 0, block_n, COLUMN)
                    plgpu.commit_smem()  # TMA may write there again
                    s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
                    slope = pos = theirs = None
                    if alibi_gmem is not None:
                        slope, pos = alibi_gmem[head], load(pos_gmem, key, TILE, ROW)
                        theirs = load(pos_gmem, n, block_n, COLUMN)
                    x, factor, bend = capped(s, scale, softcap, slope, pos, theirs)
                    p = jnp.exp2(x * factor - down(lse, TILE))
                    p = lax.cond(free, lambda p: p, masked, p)
                    if not summed:
                        plgpu.wgmma(dv_acc, p.astype(q_smem.dtype), do_slot.at[:, columns])
                    dx = p * plgpu.wgmma_accumulator_load(dp_acc, wait_n=0 if summed else 1)
                    dx = dx if bend is None else dx * bend
                    if summed:  # later, since registers are scarcer
                        plgpu.wgmma(dv_acc, p.astype(q_smem.dtype), do_slot.at[:, columns])
                    dx = dx.astype(q_smem.dtype)
                    if summed:
                        put(dx_smem.at[lax.rem(step, 2)], own, dx)
                    plgpu.wgmma(dk_acc, dx, q_slot.at[:, columns])
                    plgpu.wgmma_wait(1)
                    plgpu.barrier_arrive(do_free.at[slot])
                    return dk_acc[...], dv_acc[...]

                sums = plgpu.ACC((TILE, wide), jnp.float32)
                dk, dv = pl.run_scoped(products, square, square, sums, sums)
                plgpu.barrier_arrive(q_free.at[slot])
                if summed:
                    add(dx_smem.at[lax.rem(step, 2)], step, n, head)
                more = ni + 1 < high
                after = jnp.where(more, ni + 1, low)
                return tiles.dead(after), after, jnp.where(more, head, head + 1), dk, dv

            stop = carry + G * (high - low)
            square = plgpu.ACC((TILE, block_n), jnp.float32)
            plgpu.barrier_wait(kv_full)
            dead = Tiles(tiles_gmem, block_m).dead(first // block_m)
            clear_dead((k_smem, v_smem), dead, first, kv_start_gmem, kv_end_gmem, wg, met)
            zero = filled((TILE, wide), 0.0)
            state = (tiles.dead(low), low, h * G, zero, zero)
            *_, dk, dv = lax.fori_loop(carry, stop, visit, state)

            # --- 3. epilogue
            dk, dv = ((x * y).astype(k_smem.dtype) for x, y in ((dk, scale), (dv, 1.0)))

            # --- 4. store
            own, columns = share()
            keys = pl.ds(first + own.start, TILE)
            if shares or summed:  # the other reads these keys
                meet(met)
            k_smem.at[own, columns][...] = dk
            v_smem.at[own, columns][...] = dv
            plgpu.commit_smem()
            if shares:
                meet(met)
            for i, (x_smem, x_gmem) in enumerate(((k_smem, dk_gmem), (v_smem, dv_gmem))):

                @pl.when((wg == i) | (block_m > TILE))
                def _(x_smem: Any = x_smem, x_gmem: Any = x_gmem) -> None:
                    plgpu.copy_smem_to_gmem(x_smem.at[own], x_gmem.at[keys, h])

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(kv_free)
            return stop

        plgpu.wait_smem_to_gmem(0)


def _hybrid_attention_round_kernel(
    sums_gmem: Any,  # [T, Hq, D] float32
    dq_gmem: Any,  # [T, Hq, D]
    sums_smem: Any,  # [128, D]
    dq_smem: Any,
    full: Any,
    *,
    scale: float,
) -> None:
    # --- 1. which tile
    h, wg = lax.axis_index("h"), lax.axis_index("wg")
    row = lax.axis_index("rows") * ORDERED + wg * TILE
    own = pl.ds(wg * TILE, TILE)

    # --- 2. main loop
    plgpu.copy_gmem_to_smem(sums_gmem.at[pl.ds(row, TILE), h], sums_smem.at[own], full.at[wg])
    plgpu.barrier_wait(full.at[wg])

    # --- 3. epilogue
    columns = piece(dq_smem.shape[1])

    @pl.loop(0, dq_smem.shape[1] // columns)
    def _(i: Any) -> None:
        at = own, pl.ds(i * columns, columns)
        sums = plgpu.load(sums_smem.at[at], layout=LAYOUT)
        dq_smem.at[at][...] = (sums * scale).astype(dq_smem.dtype)

    plgpu.commit_smem()

    # --- 4. store
    plgpu.copy_smem_to_gmem(dq_smem.at[own], dq_gmem.at[pl.ds(row, TILE), h])
    plgpu.wait_smem_to_gmem(0)


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    o: jax.Array,
    lse: jax.Array,
    alibi: jax.Array | None,
    plan: HybridPlan,
    do: jax.Array,
    dlse: jax.Array,
    scale: float,
    softcap: float,
    dq_config: Any,
    dkdv_config: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dq, dk, dv); see hybrid_attention_bwd. Without a Config for dq, the kernel of dk and dv adds
    to it on its way, in no order."""
    T, Hq, D = q.shape
    q, k, v, o, do = aligned(q, k, v, o, do)
    room = (Hq, _lib.cdiv(T, ORDERED) * ORDERED)
    lse, dlse = (_lib.pad(x, ORDERED) for x in (lse, dlse))
    tile = functools.partial(plgpu.SMEM, dtype=q.dtype, transforms=_lib.swizzled(q.dtype, D))
    bounds = padded(plan.kv_start, plan.kv_end, plan.q_start, plan.q_end, plan.token_pos)
    launch = functools.partial(plgpu.kernel, thread_name="wg")
    rows = launch(
        _hybrid_attention_delta_kernel,
        out_type=jax.ShapeDtypeStruct((Hq, 2, room[1]), jnp.float32),
        scratch_types=[
            tile((ORDERED, D)),
            tile((ORDERED, D)),
            plgpu.SMEM((WARPGROUPS, 2, TILE), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
        ],
        grid=(Hq, room[1] // ORDERED),
        grid_names=("h", "rows"),
        num_threads=WARPGROUPS,
        compiler_params=PARAMS,
        kernel_name="hybrid_attention_delta_kernel",
    )(o, do, lse, dlse, *bounds[:2])

    def walk(
        kernel: Any, name: str, order: Any, outs: Any, scratch: list, config: Any, *sums: Any
    ) -> Any:
        options = {"scale": scale, "softcap": softcap, "biased": alibi is not None}
        return launch(
            functools.partial(kernel, **options, config=config),
            out_type=outs,
            scratch_types=scratch,
            grid=(_lib.num_sms(),),
            grid_names=("sm",),
            num_threads=WARPGROUPS + 1,
            compiler_params=PARAMS,
            kernel_name=name,
        )(
            q, k, v, do, rows,
            *bounds,
            plan.tiles, order, *([] if alibi is None else [alibi]), *sums,
        )  # fmt: skip

    like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    both = plgpu.Barrier(num_arrivals=WARPGROUPS)
    dq = None
    if dq_config is not None:
        stages, slots = dq_config.stages, (dq_config.stages, dq_config.block_n, D)
        free = plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages)
        full = plgpu.Barrier(num_barriers=stages)
        own = tile((dq_config.block_m, D))
        dq = walk(
            _hybrid_attention_dq_kernel,
            "hybrid_attention_dq_kernel",
            plan.q_order,
            like[0],
            [
                *(own, own, tile(slots), tile(slots)),
                *(plgpu.Barrier(num_arrivals=2), both, full, free, full, free, both),
            ],
            dq_config,
        )
    stages, slots = dkdv_config.stages, (dkdv_config.stages, dkdv_config.block_n, D)
    free = plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages)
    full = [plgpu.Barrier(num_arrivals=n, num_barriers=stages) for n in (2, 1)]
    own = tile((dkdv_config.block_m, D))
    pair = plgpu.SMEM((stages, 2, dkdv_config.block_n), jnp.float32)
    sums, exchanged = (), ()
    if dq is None:
        # Mosaic writes to an array of its own, so that what is added to is given as a reference.
        sums = (jax.new_ref(jnp.zeros(q.shape, jnp.float32)),)
        block_m, block_n = dkdv_config.block_m, dkdv_config.block_n
        width = D // WARPGROUPS if D % ORDERED == 0 else D
        exchanged = (
            tile((2, block_m, block_n)),
            plgpu.SMEM(
                (WARPGROUPS, block_n, width), jnp.float32,
                transforms=_lib.swizzled(jnp.float32, width),
            ),
        )  # fmt: skip
    dk, dv = walk(
        functools.partial(_hybrid_attention_dkdv_kernel, summed=dq is None),
        "hybrid_attention_dkdv_kernel",
        plan.k_order,
        like[1:],
        [
            *(own, own, tile(slots), tile(slots), pair),
            *(plgpu.Barrier(num_arrivals=2), both, full[0], free, full[1], free, both),
            *exchanged,
        ],
        dkdv_config,
        *sums,
    )
    if dq is None:
        dq = launch(
            functools.partial(_hybrid_attention_round_kernel, scale=scale),
            out_type=like[0],
            scratch_types=[
                plgpu.SMEM((ORDERED, D), jnp.float32, transforms=_lib.swizzled(jnp.float32, D)),
                tile((ORDERED, D)),
                plgpu.Barrier(num_barriers=WARPGROUPS),
            ],
            grid=(Hq, room[1] // ORDERED),
            grid_names=("h", "rows"),
            num_threads=WARPGROUPS,
            compiler_params=PARAMS,
            kernel_name="hybrid_attention_round_kernel",
        )(*sums)
    return _lib.vary_alike(dq[:T], dk[:T], dv[:T], q)[:3]
