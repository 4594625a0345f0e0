"""What the grouped product does beside multiplying, and the gradients of that.

    x[rows[r]] for x[r]              gathered: a kernel before the product
    y = row_scale * act(h)           activated, scaled
    dh, drow_scale from h, dy        epilogue_bwd
    dbias[e] = sum of dh[rows of e]  dbias: a block for each expert and some columns
    dx[t] = sum of dx of the rows that took row t of x              gather_bwd: they are sorted
    which size or index cannot be                                   wrong_ones

`plan` is what moe_gemm_plan.py makes of the sizes. Nothing here multiplies matrices, and all of it
waits for memory; every sum has one order, whatever the routing.

Twin: triton_kernels/moe_gemm_fusions.py.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import _lib
from .moe_gemm_plan import ALIGN, EXPERT_START, EXPERT_STOP, LIVE

SHARED_BYTES = 226 * 1024  # shared memory of a block, less room for the barriers
PIECE = 64  # columns of h that the epilogue works at together
PAIR_PITCH = 36  # pairs of a row in shared memory: its rows and their neighbours miss each other
ROWS = 8  # rows of a block that moves or scales rows

# Layouts are given where they do not follow from an operand's, and shared memory is cut as told.
PARAMS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)
# A lane holds one element each: of pairs of columns, and of rows that are read column by column
PAIR_LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 4), (16, 4), (8, 4), (1,))),
    warp_dims=(-7,),
    lane_dims=(-3, -2),
    vector_dim=-1,
)
ROW_LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((128,), (32,), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
)


def pair_smem(warpgroups: int) -> Any:
    """Shared memory in which `activated` parts gate and up."""
    return plgpu.SMEM((warpgroups, 64, PAIR_PITCH, 2), jnp.float32)


def put_transposed(smem: Any, values: jax.Array) -> None:
    """smem [rows, columns] = values [columns, rows] as wgmma leaves them."""
    smem.T[...] = plgpu.layout_cast(values, plgpu.Layout.WGMMA_TRANSPOSED)


def put(smem: Any, values: jax.Array) -> None:
    smem[...] = values


def activated(h: jax.Array, pairs: Any) -> jax.Array:
    """silu(gate) * up: [64, 32] of 64 columns x 64 rows of h, whose columns interleave gate and up.

    A register holds both columns of a pair, and none of a lane's others: through shared memory each
    half comes back by itself.
    """

    def half(i: int) -> jax.Array:
        at = pairs.at[:, pl.ds(0, PIECE // 2), i]
        return plgpu.load(at, layout=PAIR_LAYOUT, optimized=False)

    put_transposed(pairs.reshape(64, 2 * PAIR_PITCH).at[:, pl.ds(0, PIECE)], h)
    gate = half(0)
    y = gate / (1 + jnp.exp(-gate))
    plgpu.commit_smem()  # a barrier: the compiler would hold both halves, and run out of registers
    return y * half(1)


def with_bias(h: jax.Array, bias_gmem: Any, e: Any, n: Any) -> jax.Array:
    """h [columns, rows] plus e's bias from column n on."""
    bias = plgpu.load(
        bias_gmem.at[e, pl.ds(n, h.shape[0])],
        layout=plgpu.Layout.WGMMA.reduce(1),
        optimized=False,
    )
    return h + lax.broadcast_in_dim(bias.astype(jnp.float32), h.shape, [0])


def scaled(y: jax.Array, row_scale_gmem: Any, row: Any, layout: Any, axis: int) -> jax.Array:
    """y, whose rows lie along `axis`, each times its scale."""
    scale = plgpu.load(
        row_scale_gmem.at[pl.ds(row, y.shape[axis])],
        layout=layout.reduce(1 - axis),
        optimized=False,
    )
    return y * plgpu.layout_cast(lax.broadcast_in_dim(scale, y.shape, [axis]), layout)


def _moe_gemm_gather_kernel(
    x_gmem: Any,  # [T, pieces of a row, piece]
    rows_gmem: Any,  # [M]
    plan_gmem: Any,
    taken_gmem: Any,  # [M, pieces of a row, piece]
    x_smem: Any,  # [rows, pieces of a row, piece]
    full: Any,  # [rows] barriers
) -> None:
    # --- 1. which tile
    first = lax.axis_index("block") * x_smem.shape[0]
    live = plan_gmem[LIVE, 0]
    T = x_gmem.shape[0]

    # --- 2. main loop
    for i in range(x_smem.shape[0]):

        @pl.when(first + i < live)
        def _load(i: int = i) -> None:
            row = rows_gmem[first + i]
            # Behind the last row TMA finds zeros: there goes an index that x does not have.
            row = jnp.where((row >= 0) & (row < T), row, T)
            plgpu.copy_gmem_to_smem(
                x_gmem.at[pl.ds(row, 1)],
                x_smem.at[pl.ds(i, 1)],
                full.at[i],
                oob_mode=plgpu.OOBFillMode.ZEROS,
            )

    # --- 3. epilogue: none, rows move as they are

    # --- 4. store
    for i in range(x_smem.shape[0]):

        @pl.when(first + i < live)
        def _store(i: int = i) -> None:
            plgpu.barrier_wait(full.at[i])
            plgpu.copy_smem_to_gmem(x_smem.at[i], taken_gmem.at[first + i])

    plgpu.wait_smem_to_gmem(0)


def _moe_gemm_epilogue_bwd_kernel(
    *refs: Any, activation: str | None, scaled: bool, chunk: int
) -> None:
    given = iter(refs)
    h_gmem = next(given)  # [M, N], or [M, N / 2, 2] under swiglu
    dy_gmem = next(given)  # [M, columns]
    plan_gmem = next(given)
    row_scale_gmem = next(given) if scaled else None  # [M]
    dh_gmem = next(given)  # as h
    drow_scale_gmem = next(given) if scaled else None  # [M]
    M, columns = dy_gmem.shape

    def load(ref: Any, *at: Any) -> jax.Array:
        return plgpu.load(ref.at[at], layout=ROW_LAYOUT, optimized=False).astype(jnp.float32)

    # --- 1. which tile
    @pl.loop(0, ROWS)
    def _row(i: jax.Array) -> None:
        row = lax.axis_index("block") * ROWS + i

        @pl.when(row < M)
        def _() -> None:
            scale = None if row_scale_gmem is None else row_scale_gmem[row]

            # --- 2. main loop
            def step(ni: jax.Array, dot: jax.Array) -> jax.Array:
                cols = pl.ds(ni * chunk, chunk)
                dy = load(dy_gmem, row, cols)
                da = dy if scale is None else dy * scale
                if activation:
                    gate, up = (load(h_gmem, row, cols, half) for half in range(2))
                    s = 1 / (1 + jnp.exp(-gate))
                    dh_gmem[row, cols, 0] = (da * up * s * (1 + gate * (1 - s))).astype(
                        dh_gmem.dtype
                    )
                    dh_gmem[row, cols, 1] = (da * gate * s).astype(dh_gmem.dtype)
                    return dot + dy * gate * s * up
                dh_gmem[row, cols] = da.astype(dh_gmem.dtype)
                return dot + dy * load(h_gmem, row, cols)

            zero = plgpu.layout_cast(jnp.zeros((chunk,), jnp.float32), ROW_LAYOUT)
            dot = lax.fori_loop(0, columns // chunk, step, zero)

            # --- 3. epilogue
            total = dot.sum()

            # --- 4. store
            if drow_scale_gmem is not None:
                drow_scale_gmem[row] = jnp.where(row < plan_gmem[LIVE, 0], total, 0.0)


def _moe_gemm_dbias_kernel(
    dh_gmem: Any,  # [M, N]
    plan_gmem: Any,
    dbias_gmem: Any,  # [E, N]
    *,
    chunk: int,
) -> None:
    # --- 1. which tile
    e = lax.axis_index("expert")
    cols = pl.ds(lax.axis_index("columns") * chunk, chunk)
    start, stop = plan_gmem[EXPERT_START, e], plan_gmem[EXPERT_STOP, e]

    # --- 2. main loop
    def step(ki: jax.Array, total: jax.Array) -> jax.Array:
        row = start + ki * ROWS
        values = [
            plgpu.load(
                dh_gmem.at[jnp.minimum(row + i, stop - 1), cols], layout=ROW_LAYOUT, optimized=False
            )
            for i in range(ROWS)
        ]
        for i, value in enumerate(values):
            total += jnp.where(row + i < stop, value.astype(jnp.float32), 0.0)
        return total

    zero = plgpu.layout_cast(jnp.zeros((chunk,), jnp.float32), ROW_LAYOUT)
    total = lax.fori_loop(0, (stop - start + ROWS - 1) // ROWS, step, zero)

    # --- 3. epilogue
    dbias = total.astype(dbias_gmem.dtype)

    # --- 4. store
    dbias_gmem[e, cols] = dbias


def _moe_gemm_gather_bwd_kernel(
    dxr_gmem: Any,  # [M, K]
    order_gmem: Any,  # [2, M]: rows in ascending order, and where in `rows` each of them was
    plan_gmem: Any,
    dx_gmem: Any,  # [T, K]
    *,
    chunk: int,
) -> None:
    M, T = dxr_gmem.shape[0], dx_gmem.shape[0]
    cols = pl.ds(lax.axis_index("columns") * chunk, chunk)
    live = plan_gmem[LIVE, 0]

    # --- 1. which tile
    @pl.loop(0, ROWS)
    def _token(i: jax.Array) -> None:
        t = lax.axis_index("block") * ROWS + i

        def halve(_: Any, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            below, above = bounds
            middle = (below + above) // 2
            before = order_gmem[0, jnp.minimum(middle, M - 1)] < t
            more = below < above
            return (
                jnp.where(more & before, middle + 1, below),
                jnp.where(more & ~before, middle, above),
            )

        @pl.when(t < T)
        def _() -> None:
            bounds = (jnp.int32(0), jnp.int32(M))
            start, _ = lax.fori_loop(0, M.bit_length(), halve, bounds)

            # --- 2. main loop
            def mine(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
                at = jnp.minimum(carry[0], M - 1)
                # A row's places are in ascending order, those of dead rows last.
                return (carry[0] < M) & (order_gmem[0, at] == t) & (order_gmem[1, at] < live)

            def add(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                at, total = carry
                row = plgpu.load(
                    dxr_gmem.at[order_gmem[1, at], cols], layout=ROW_LAYOUT, optimized=False
                )
                return at + 1, total + row.astype(jnp.float32)

            zero = plgpu.layout_cast(jnp.zeros((chunk,), jnp.float32), ROW_LAYOUT)
            _, total = lax.while_loop(mine, add, (start, zero))

            # --- 3. epilogue
            dx = total.astype(dx_gmem.dtype)

            # --- 4. store
            dx_gmem[t, cols] = dx


def _moe_gemm_check_kernel(
    sizes_gmem: Any,  # [a multiple of 128], zeros at the end
    rows_gmem: Any,  # [a multiple of 128], zeros at the end
    found_gmem: Any,  # [128]: the first bad expert, sum(sizes), the first bad row
    *,
    T: int,
) -> None:
    # --- 1. which tile
    layout = plgpu.Layout.WG_STRIDED((_lib.WARPGROUP,), 1)
    lane = plgpu.broadcasted_iota(jnp.int32, (_lib.WARPGROUP,), 0, layout=layout)
    most = jnp.iinfo(jnp.int32).max

    def chunk(ref: Any, i: Any) -> Any:
        at = ref.at[pl.ds(i * _lib.WARPGROUP, _lib.WARPGROUP)]
        return plgpu.load(at, layout=layout), i * _lib.WARPGROUP + lane

    # --- 2. main loop
    def expert(i: Any, carry: Any) -> Any:
        bad, total = carry
        size, index = chunk(sizes_gmem, i)
        return jnp.minimum(bad, jnp.where(size < 0, index, most)), total + jnp.maximum(size, 0)

    def row(i: Any, bad: Any) -> Any:
        taken, index = chunk(rows_gmem, i)
        wrong = (index < live) & ((taken < 0) | (taken >= T))
        return jnp.minimum(bad, jnp.where(wrong, index, most))

    none = plgpu.layout_cast(jnp.full((_lib.WARPGROUP,), most, jnp.int32), layout)
    chunks = [ref.shape[0] // _lib.WARPGROUP for ref in (sizes_gmem, rows_gmem)]
    bad_size, total = lax.fori_loop(0, chunks[0], expert, (none, jnp.zeros_like(none)))
    live = total.sum()
    bad_row = lax.fori_loop(0, chunks[1], row, none)

    # --- 3. epilogue
    found = jnp.where(lane == 0, bad_size.min(), jnp.where(lane == 1, live, bad_row.min()))

    # --- 4. store
    found_gmem[...] = found


def _chunk(columns: int) -> int:
    """Columns, a multiple of 128, that a warpgroup works at together."""
    return next(chunk for chunk in (1024, 512, 256, 128) if columns % chunk == 0)


def _launch_rows(
    kernel: Any,
    name: str,
    grid: tuple[int, ...],
    names: tuple[str, ...],
    out_type: Any,
    *arrays: Any,
) -> Any:
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=grid,
        grid_names=names,
        compiler_params=PARAMS,
        kernel_name=name,
    )(*arrays)


def gathered(x: jax.Array, rows: jax.Array | None, plan: jax.Array) -> jax.Array:
    """x[rows], as far as rows are alive; zeros for an index that x does not have."""
    if rows is None:
        return x
    (pieces,) = _lib.row_pieces(x)
    row = pieces.shape[1:]
    M = _lib.cdiv(rows.shape[0], ALIGN) * ALIGN
    block = max(1, min(ROWS, SHARED_BYTES // (row[0] * row[1] * _lib.bits(x.dtype) // 8)))
    taken = plgpu.kernel(
        _moe_gemm_gather_kernel,
        out_type=jax.ShapeDtypeStruct((M, *row), x.dtype),
        scratch_types=[plgpu.SMEM((block, *row), x.dtype), plgpu.Barrier(num_barriers=block)],
        grid=(_lib.cdiv(rows.shape[0], block),),
        grid_names=("block",),
        compiler_params=PARAMS,
        kernel_name="moe_gemm_gather_kernel",
    )(pieces, rows, plan)
    return taken.reshape(M, -1)


def epilogue_bwd(
    h: jax.Array,
    dy: jax.Array,
    row_scale: jax.Array | None,
    plan: jax.Array,
    activation: str | None,
) -> list[jax.Array]:
    """[dh], or [dh, drow_scale]; dh may have more columns than h."""
    M, N = h.shape
    dy = _lib.pad(dy, _lib.WARPGROUP)
    h = _lib.pad(h.reshape(M, N // 2, 2), _lib.WARPGROUP, 1) if activation else _lib.pad(h, 128)
    out_type = [jax.ShapeDtypeStruct(h.shape, h.dtype)]
    arrays = [h, dy, plan]
    if row_scale is not None:
        out_type.append(jax.ShapeDtypeStruct((M,), jnp.float32))
        arrays.append(row_scale)
    kernel = functools.partial(
        _moe_gemm_epilogue_bwd_kernel,
        activation=activation,
        scaled=row_scale is not None,
        chunk=_chunk(dy.shape[1]),
    )
    name = "moe_gemm_epilogue_bwd_kernel"
    dh, *drow_scale = _launch_rows(
        kernel, name, (_lib.cdiv(M, ROWS),), ("block",), out_type, *arrays
    )
    return [dh.reshape(M, -1), *drow_scale]


def dbias(dh: jax.Array, plan: jax.Array, bias: jax.Array) -> jax.Array:
    """Sums of dh over the rows of every expert, as bias."""
    dh = _lib.pad(dh, _lib.WARPGROUP)
    chunk = min(256, _chunk(dh.shape[1]))
    return _launch_rows(
        functools.partial(_moe_gemm_dbias_kernel, chunk=chunk),
        "moe_gemm_dbias_kernel",
        (bias.shape[0], dh.shape[1] // chunk),
        ("expert", "columns"),
        jax.ShapeDtypeStruct((bias.shape[0], dh.shape[1]), bias.dtype),
        dh,
        plan,
    )[:, : bias.shape[1]]


def gather_bwd(dxr: jax.Array, rows: jax.Array, plan: jax.Array, T: int, K: int) -> jax.Array:
    """For each row of x the sum of the rows that took it, in their order."""
    order = lax.sort((rows, lax.iota(jnp.int32, rows.shape[0])), num_keys=1, is_stable=True)
    columns = dxr.shape[1]
    chunk = _chunk(columns)
    dx = _launch_rows(
        functools.partial(_moe_gemm_gather_bwd_kernel, chunk=chunk),
        "moe_gemm_gather_bwd_kernel",
        (_lib.cdiv(T, ROWS), columns // chunk),
        ("block", "columns"),
        jax.ShapeDtypeStruct((T, columns), dxr.dtype),
        dxr,
        lax.concatenate([part[None] for part in order], 0),
        plan,
    )
    return dx[:, :K]


def wrong_ones(sizes: jax.Array, rows: jax.Array | None, T: int) -> jax.Array:
    """[first expert of negative size, sum of sizes, first live row whose index x does not have], at
    the front of a longer array; 2^31 - 1 where all are right."""
    none = jnp.zeros(_lib.WARPGROUP, jnp.int32)
    return plgpu.kernel(
        functools.partial(_moe_gemm_check_kernel, T=T),
        out_type=jax.ShapeDtypeStruct((_lib.WARPGROUP,), jnp.int32),
        grid=(1,),
        grid_names=("block",),
        kernel_name="moe_gemm_check_kernel",
    )(_lib.pad(sizes, _lib.WARPGROUP), none if rows is None else _lib.pad(rows, _lib.WARPGROUP))
