"""Gradients of decay attention: two walks for the states, and a block for every chunk and group.

    S entering each chunk, and dS, the gradient of the state that each leaves: the states kernel of
        decay_attention_states.py, forwards and against time, in the dtype of q
    for each chunk and group of heads, two warpgroups, q and k in shared memory:
        for each head h of the group and 64 columns of v, by TMA in a ring:
            the first one, tokens t as rows:        Z = scale dy v^T * W
                dq += Z k + (scale e^b dy) S^T
                r += rowsum(Z * q k^T) + scale e^b rowsum(dy * q S)       e += rowsum(S * dS)
            the second one, tokens j as rows:       Z^T = scale v dy^T * W^T
                dk += Z^T q + (a v) dS^T            dv = (scale k q^T * W^T) dy + a * k dS
                du += rowsum(Z^T / u * k q^T) + a / u rowsum(v * k dS)
        dg[t] = sum over j >= t of (r - u du)[j]
                + sum over all j of (a rowsum(v * k dS) + e^b_n e)[j]
    gates kernel, backward: from chunks to tokens, di = u du (decay_attention_gates.py)

K above 128: blocks of threads share its columns, 64 each, as sums of 64 x 256 do not fit registers.
r, du, e and st are sums over K, which are added up last; dv needs all of k q^T and k dS, and the
blocks make it in turn, each for other columns of v.

Every sum has one order. Each product is made as rows of t and of j, so that nothing is transposed,
and both sums over a row of Z * q k^T stay within a warp. u du is never divided by u.

Twin: triton_kernels/decay_attention_bwd.py.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .decay_attention_gates import sum_along
from .decay_attention_states import (
    CHUNK,
    COLUMN,
    GATES,
    PITCH,
    ROW,
    Walk,
    across,
    clear,
    down,
    entering_states,
    filled,
    find_span,
    iota,
    launch,
    launch_states,
    load_gates,
    load_tile,
    meet,
    most_spans,
    store_rows,
    stored,
    swizzled,
)


def _decay_attention_grads_kernel(*refs: Any, scale: float, skips: bool, stages: int) -> None:
    q_gmem, k_gmem, v_gmem, dy_gmem, gates_gmem, S_gmem, dS_gmem, cu_gmem, *more = refs[:-15]
    D_gmem = more.pop(0) if skips else None  # [H, V]
    dq_gmem, dk_gmem, dv_gmem, dgates_gmem, *dD_gmem = more
    q_smem, k_smem, v_smem, dy_smem, gates_smem, S_smem, dS_smem = refs[-15:-8]
    dv_smem, out_smem, rows_smem, columns_smem, once, full, free, met = refs[-8:]
    T, groups, _ = q_gmem.shape
    _, H, V = v_gmem.shape
    parts, heads = V // 64, H // groups
    cuts, _, width = q_smem.shape
    # --- 1. which tile
    wg, p, group = (lax.axis_index(name) for name in ("wg", "slot", "heads"))
    group, cut = (group, 0) if cuts == 1 else (lax.div(group, cuts), lax.rem(group, cuts))
    _, first, end, _, _ = find_span(cu_gmem, p, T, CHUNK)
    live = end - first
    rows = pl.ds(first, CHUNK)
    steps = jnp.where(live > 0, heads * parts, 0)

    def place(i: Any) -> tuple[Any, Any]:
        return group * heads + lax.div(i, parts), pl.ds(lax.rem(i, parts) * 64, 64)

    def turn(i: Any) -> Any:
        """Whether this block makes what of step i needs all of K."""
        return True if cuts == 1 else lax.rem(i, cuts) == cut

    def hidden() -> Any:
        """0, in words that the compiler does not see through: what it is added to is worked out in
        each step. Kept instead, such addresses and masks would fill 50 registers."""
        return lax.div(lax.axis_index("wg"), 2)

    def copy(i: Any, slot: Any, barrier: Any) -> None:
        zero = hidden()
        (h, v), rows, at = place(i), pl.ds(first + zero, CHUNK), p + zero
        plgpu.copy_gmem_to_smem(v_gmem.at[rows, h, v], v_smem.at[slot], barrier)
        plgpu.copy_gmem_to_smem(dy_gmem.at[rows, h, v], dy_smem.at[slot], barrier)
        own = pl.ds(cut * width, width)
        plgpu.copy_gmem_to_smem(S_gmem.at[at, h, own, v], S_smem.at[slot], barrier)
        for n in range(cuts):
            needed = (cut == n) | turn(i)

            @pl.when(needed)
            def _(n: int = n) -> None:
                own = pl.ds(n * width, width)
                plgpu.copy_gmem_to_smem(dS_gmem.at[at, h, own, v], dS_smem.at[slot, n], barrier)

            if cuts > 1:
                pl.when(~needed)(lambda: plgpu.barrier_arrive(barrier))
        plgpu.copy_gmem_to_smem(gates_gmem.at[at, h, pl.ds(0, GATES)], gates_smem.at[slot], barrier)

    @pl.when((wg == 0) & (live > 0))
    def _() -> None:
        for n in range(cuts):
            own = pl.ds(n * width, width)
            plgpu.copy_gmem_to_smem(q_gmem.at[rows, group, own], q_smem.at[n], once)
            plgpu.copy_gmem_to_smem(k_gmem.at[rows, group, own], k_smem.at[n], once)

    walk = Walk(full, free, stages, steps, copy)
    none = filled((CHUNK,), 0.0)

    def products(*sums: list[tuple[Any, Any]]) -> list[jax.Array]:
        """Sums of products, of 64 rows and 64 columns each."""

        def made(*accs: Any) -> list[jax.Array]:
            for acc, pairs in zip(accs, sums, strict=True):
                for a, b in pairs:
                    plgpu.wgmma(acc, a, b)
            return [acc[...] for acc in accs]

        return pl.run_scoped(made, *[plgpu.ACC((CHUNK, CHUNK), jnp.float32)] * len(sums))

    def entered(i: Any, loads: bool) -> Any:
        """The slot of step i, rows of other sequences cleared."""
        slot = walk.enter(i, loads)

        @pl.when(live < CHUNK)
        def _() -> None:
            clear((v_smem if loads else dy_smem).at[slot], live)
            plgpu.commit_smem()
            meet(met, 2)

        return slot

    def put(own: int, target: Any, total: jax.Array) -> None:
        """Stores dq or dk."""
        zero = hidden()
        t, h = first + zero, group + zero
        for n in range(width // 64):
            out_smem[own, n] = total[:, n * 64 : (n + 1) * 64].astype(out_smem.dtype)
        plgpu.commit_smem()
        for n in range(width // 64):
            columns = pl.ds(cut * width + n * 64, 64)
            store_rows(
                out_smem.at[own, n], live + zero,
                lambda lo, size, columns=columns: target.at[pl.ds(t + lo, size), h, columns],
            )  # fmt: skip

    @pl.when(live > 0)
    def _() -> None:
        plgpu.barrier_wait(once)

        @pl.when(live < CHUNK)
        def _() -> None:
            for n in range(cuts):
                pl.when(wg == 0)(lambda n=n: clear(q_smem.at[n], live))
                pl.when(wg == 1)(lambda n=n: clear(k_smem.at[n], live))
            plgpu.commit_smem()
            meet(met, 2)

    if dD_gmem:

        @pl.when((wg == 1) & (live == 0) & (cut == 0))
        def _none() -> None:
            @pl.loop(0, heads * parts)
            def _(i: Any) -> None:
                h, v = place(i)
                dD_gmem[0][p, h, v] = none

    # --- 2. main loop
    @pl.when((wg == 0) & (live > 0))
    def _queries() -> None:
        def step(i: Any, carry: Any) -> Any:
            dq, r, e = carry
            slot = entered(i, True)
            zero = hidden()
            q_tile, k_tile = q_smem.at[cut + zero], k_smem.at[cut + zero]
            v_tile, dy_tile, gates = v_smem.at[slot], dy_smem.at[slot], gates_smem.at[slot]
            S_tile, dS_tile = S_smem.at[slot], dS_smem.at[slot, cut]
            b, b_n = load_gates(gates, 0, ROW), gates[CHUNK - 1]
            z, qk = products([(dy_tile, v_tile.T)], [(q_tile, k_tile.T)])
            theirs = [down(load_gates(gates, n, COLUMN), CHUNK) for n in range(2)]
            z = z * jnp.exp2(across(b, CHUNK) - theirs[0]) * (theirs[1] * scale)
            z = jnp.where(iota(z.shape, 1) + zero <= iota(z.shape, 0), z, 0.0)
            r = r + (z * qk).sum(axis=1)
            z = z.astype(q_smem.dtype)
            dy = load_tile(dy_tile) * across(jnp.exp2(b) * scale, 64)
            r = r + (products([(q_tile, S_tile)])[0] * dy).sum(axis=1)
            dy = dy.astype(q_smem.dtype)

            def add(acc: Any) -> None:
                plgpu.wgmma(acc, z, k_tile)
                plgpu.wgmma(acc, dy, S_tile.T)

            dq = pl.run_state(add)(plgpu.ACC.init(dq))
            for n in range(0, width, 64):
                own = pl.ds(n, 64)
                e = e + (load_tile(S_tile.at[own]) * load_tile(dS_tile.at[own])).sum(axis=1)
            if dD_gmem:
                # sums over tokens, within warps: the diagonal of a product
                h, v = place(i)

                @pl.when(turn(i))
                def _() -> None:
                    (pairs,) = products([(dy_tile.T, v_tile)])
                    diagonal = iota(pairs.shape, 0) + zero == iota(pairs.shape, 1)
                    dD_gmem[0][p + zero, h, v] = jnp.where(diagonal, pairs, 0.0).sum(axis=1)

            plgpu.commit_smem()
            walk.leave(slot)
            done = lax.rem(i, parts) == parts - 1

            # --- 3. epilogue
            @pl.when(done)
            def _() -> None:
                h, turn = lax.div(i, parts), lax.rem(lax.div(i, parts), 2)
                rows_smem[zero] = r
                rows_smem[zero + 1] = e * jnp.exp2(b_n)
                plgpu.commit_smem()
                meet(met, 2)
                mine, over, ours, st = (
                    plgpu.load(x, layout=COLUMN, optimized=False)
                    for x in (
                        rows_smem.at[0], rows_smem.at[1],
                        columns_smem.at[turn, 0], columns_smem.at[turn, 1],
                    )
                )  # fmt: skip
                later = iota((CHUNK, CHUNK), 1) >= iota((CHUNK, CHUNK), 0)
                dg = jnp.where(later, down(mine - ours, CHUNK), 0.0) + down(over + st, CHUNK)
                # --- 4. store
                dgates_gmem[cut, p + zero, group * heads + h, pl.ds(0, CHUNK)] = dg.sum(axis=1)

            return dq, jnp.where(done, none, r), jnp.where(done, none, e)

        dq, _, _ = lax.fori_loop(0, steps, step, (filled((CHUNK, width), 0.0), none, none))
        put(0, dq_gmem, dq)

    @pl.when((wg == 1) & (live > 0))
    def _keys() -> None:
        def step(i: Any, carry: Any) -> Any:
            dk, du, st = carry
            slot = entered(i, False)
            h, v = place(i)
            zero = hidden()
            q_tile, k_tile = q_smem.at[cut + zero], k_smem.at[cut + zero]
            v_tile, dy_tile, gates = v_smem.at[slot], dy_smem.at[slot], gates_smem.at[slot]
            dS_tile = dS_smem.at[slot, cut]
            b, u, b_n = load_gates(gates, 0, ROW), load_gates(gates, 1, ROW), gates[CHUNK - 1]
            fade = jnp.exp2(b_n - b)

            def faded(x: jax.Array) -> jax.Array:
                """Times what remains of row j at column t; 0 where t < j."""
                later = down(load_gates(gates, 0, COLUMN), CHUNK)
                x = x * jnp.exp2(later - across(b, CHUNK)) * scale
                return jnp.where(iota(x.shape, 1) + zero < iota(x.shape, 0), 0.0, x)

            def weighted(x: jax.Array) -> jax.Array:
                return (x * across(u, CHUNK)).astype(q_smem.dtype)

            kq, z = products([(k_tile, q_tile.T)], [(v_tile, dy_tile.T)])
            x = weighted(faded(kq)) if cuts == 1 else None
            z = faded(z)
            du = du + (z * kq).sum(axis=1)
            z = weighted(z)
            (into,) = products([(k_tile, dS_tile)])
            own = load_tile(v_tile)
            new = (own * into).sum(axis=1) * fade
            du, st = du + new, st + new * u

            def values(x: jax.Array | None, into: jax.Array) -> None:
                if x is None:
                    again = hidden()
                    whole = [n + again for n in range(cuts)]
                    (x,) = products([(k_smem.at[n], q_smem.at[n].T) for n in whole])
                    x = weighted(faded(x))
                    (into,) = products([(k_smem.at[n], dS_smem.at[slot, n]) for n in whole])
                dv = into * across(fade * u, 64)
                if D_gmem is not None:
                    D = plgpu.load(D_gmem.at[h + zero, v], layout=COLUMN, optimized=False)
                    dv = dv + load_tile(dy_tile) * down(D, CHUNK)
                dv = pl.run_state(lambda acc: plgpu.wgmma(acc, x, dy_tile))(plgpu.ACC.init(dv))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                dv_smem.at[zero][...] = dv.astype(dv_smem.dtype)
                plgpu.commit_smem()
                store_rows(
                    dv_smem.at[zero], live + zero,
                    lambda lo, n: dv_gmem.at[pl.ds(first + zero + lo, n), h + zero, v],
                )  # fmt: skip

            pl.when(turn(i))(lambda: values(x, into))
            own = (load_tile(v_tile) * across(fade * u, 64)).astype(q_smem.dtype)

            def add(acc: Any) -> None:
                plgpu.wgmma(acc, z, q_tile)
                plgpu.wgmma(acc, own, dS_tile.T)

            dk = pl.run_state(add)(plgpu.ACC.init(dk))
            plgpu.commit_smem()
            walk.leave(slot)
            done = lax.rem(i, parts) == parts - 1

            # --- 3. epilogue
            @pl.when(done)
            def _() -> None:
                turn = lax.rem(lax.div(i + zero, parts), 2)
                columns_smem[turn, zero] = du * u
                columns_smem[turn, zero + 1] = st
                plgpu.commit_smem()
                meet(met, 2)
                # --- 4. store
                at = lax.axis_index("slot") + zero
                dgates_gmem[cut, at, h, pl.ds(CHUNK, CHUNK)] = du

            return dk, jnp.where(done, none, du), jnp.where(done, none, st)

        dk, _, _ = lax.fori_loop(0, steps, step, (filled((CHUNK, width), 0.0), none, none))
        put(1, dk_gmem, dk)

    walk.end()
    plgpu.wait_smem_to_gmem(0)


def grads(
    q: jax.Array, k: jax.Array, v: jax.Array, dy: jax.Array, gates: jax.Array, S: jax.Array,
    dS: jax.Array, D: jax.Array | None, cu_seqlens: jax.Array, *, scale: float, stages: int,
) -> list[jax.Array]:  # fmt: skip
    """[dq, dk, dv, dgates], with D the parts [slots, H, V] of dD too. dgates [slots, H, 132]: of
    each chunk and head 64 of dg, 64 of du, and room."""
    (T, groups, K), (_, H, V), B = q.shape, v.shape, len(cu_seqlens) - 1
    slots = most_spans(T, B, CHUNK)
    tile = (stages, CHUNK, 64)
    width = K if K <= 128 else 64
    cuts = K // width
    made = launch(
        functools.partial(
            _decay_attention_grads_kernel, scale=scale, skips=D is not None, stages=stages
        ),
        "decay_attention_grads_kernel",
        [
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)),
            jax.ShapeDtypeStruct((cuts, slots, H, PITCH), jnp.float32),
            *([] if D is None else [jax.ShapeDtypeStruct((slots, H, V), jnp.float32)]),
        ],
        [
            swizzled((cuts, CHUNK, width), q.dtype),
            swizzled((cuts, CHUNK, width), q.dtype),
            swizzled(tile, q.dtype),
            swizzled(tile, q.dtype),
            plgpu.SMEM((stages, GATES), jnp.float32),
            swizzled((stages, width, 64), q.dtype),
            swizzled((stages, cuts, width, 64), q.dtype),
            stored((1, CHUNK, 64), q.dtype),
            stored((2, width // 64, CHUNK, 64), q.dtype),
            plgpu.SMEM((2, CHUNK), jnp.float32),
            plgpu.SMEM((2, 2, CHUNK), jnp.float32),
            plgpu.Barrier(num_arrivals=2 * cuts),
            plgpu.Barrier(num_arrivals=4 + cuts, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2),
        ],
        (slots, groups * cuts),
        (q, k, v, dy, gates, S, dS, cu_seqlens, *([] if D is None else [D])),
        2,
    )  # fmt: skip
    dgates = made[3] if cuts == 1 else sum_along(made[3].reshape(cuts, -1), 0)
    made[3] = dgates.reshape(slots, H, PITCH)
    return made


def backward(
    q: jax.Array, k: jax.Array, v: jax.Array, dy: jax.Array, gates: jax.Array,
    S0: jax.Array | None, dS_T: jax.Array | None, D: jax.Array | None, cu_seqlens: jax.Array, *,
    span: int, scale: float, transposed: bool, config: Any,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """(dS0, dq, dk, dv, dgates), and dD [H, V] with D, of arrays that are whole tiles; dgates as
    `grads` says."""
    states = []
    for x, y, initial, reverse in ((k, v, S0, False), (q, dy, dS_T, True)):
        how = {"span": span, "scale": scale, "reverse": reverse, "transposed": transposed}
        enters = entering_states(x, y, gates, cu_seqlens, initial, config=config, **how)
        states.append(launch_states(
            x, y, gates, cu_seqlens, enters, each=True, carries=False, config=config, **how
        ))  # fmt: skip
    (S, _), (dS, dS0) = states
    stages = min(config.stages, 2)  # a third slot takes the last registers
    made = grads(q, k, v, dy, gates, S, dS, D, cu_seqlens, scale=scale, stages=stages)
    if D is not None:
        made[4] = sum_along(made[4].reshape(made[4].shape[0], -1), 0).reshape(D.shape)
    return dS0, *made
