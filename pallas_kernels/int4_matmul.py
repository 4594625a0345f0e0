"""Product with four-bit weights: W goes from memory to registers as it is stored.

    y[m, n] = sum_k x[m, k] * W[n, k] + bias[n]
    W[n, k] = (q[n, k] - z[n, k // G]) * s[n, k // G]

    for each tile of y, transposed, and each slice of K (`split_k` of them):
        memory warpgroup, for each 256 of K: wait until the slot is free; TMA words of W, x, scales
        compute warpgroups, 64 rows of W each, for each 256 of K: wait until the slot is full
            for each nibble i of the words: a plane, W's columns 64 i .. 64 i + 63
                w = (plane - zero) * scale          in registers, rounded to x's dtype
                acc += w @ x_tile^T                 accumulated in float32
            free the slot
        store round(acc + bias), or the slice's sums
    with slices, a second kernel adds them in their order; or, of few tokens, the warpgroups of one
    block take slices in place of rows, and one of them adds

W is on the left, for the tensor cores of Hopper multiply 64 rows by as few as 8 columns, and there
are few tokens where this kernel matters. A plane needs no conversion: 128 + q in bfloat16 (1024 + q
in float16) has a constant's bits with q's or-ed in, two at once with one instruction; zero is such
a number too, and the difference is exact.

The order of the nibbles is such that a word's two neighbours, which a thread holds in one register,
are neighbours in every plane: int4_prepack brings weights into it, once. What it takes comes from
int4_quantize, or from GPTQ's and AWQ's files: int4_matmul_checkpoints.py.

Instructions for 8 weights: 3 shifts, 4 and-or, 4 subtractions, 4 multiplications, 1.9 for each. All
of W [28672, 8192] takes an H200 15 us of issue slots, and its bytes 28 us.

Backward: W is written out, rounded to x's dtype, and dx = dy @ W is pallas_kernels/matmul.py's.

Limits: Hopper; bfloat16 and float16; groups of 32, 64, 128 or 256. Scales and zero points of rows
whose number is no multiple of 16 are padded first, in XLA.

Twin: triton_kernels/int4_matmul.py.

Sources: the constant with the code or-ed in is FasterTransformer's and Marlin's way to make floats
of four bits; the float16 one is older. Split K with partial sums follows PyTorch's W4A16 kernels;
warpgroups and ring are those of pallas_kernels/matmul.py, the transposing store Mosaic GPU's own.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, vector
from jaxlib.mlir.dialects import llvm

from . import _lib
from .int4_matmul_prepack import ordered
from .int4_matmul_quantize import quantized
from .matmul import matmul_fwd

DTYPES = (jnp.bfloat16, jnp.float16)
GROUPS = (32, 64, 128, 256)
BLOCK_K, PLANE = (
    256,
    64,
)  # of K: what 128 bytes of a row hold, and what one nibble of its words does
ZERO = 8  # of symmetric weights
MAGIC = {jnp.dtype(jnp.bfloat16): 0x4300, jnp.dtype(jnp.float16): 0x6400}  # 128 and 1024
ROWS = 64  # of W that one wgmma instruction multiplies
SHARED = 226 << 10  # bytes that a block has for its tiles
EPILOGUE_M = 32  # tokens of one store, at most
MEMORY_REGISTERS = 24  # of a thread that only issues copies; the others share what is left
TILE = plgpu.Layout.WGMMA
ROW = TILE.reduce(1)  # one value for each row of W


@dataclass(frozen=True)
class Config:
    """Tile sizes and resources of the kernel; the result does not depend on them.

    block_m, block_n: tokens and rows of W of a block's tile; where a block takes all slices of K
        itself, the rows of all slices together.
    stages: slots of the ring; each holds 256 of K.
    group_m: tiles along m that are visited before the next tile along n.
    warpgroups: compute warpgroups; each takes block_n / warpgroups rows of W (one more loads).
    """

    block_m: int = 16
    block_n: int = 128
    stages: int = 4
    group_m: int = 8
    warpgroups: int = 2

    def __post_init__(self) -> None:
        sizes = (8, 16, 32, 64, 128, 256)
        if self.block_m not in sizes:
            raise ValueError(f"block_m: expected one of {sizes}, got {self.block_m}")
        if self.warpgroups not in (1, 2, 3, 4):
            raise ValueError(f"warpgroups: expected 1, 2, 3 or 4, got {self.warpgroups}")
        if self.block_n < 1 or self.block_n % (ROWS * self.warpgroups):
            raise ValueError(
                f"block_n: expected a multiple of 64 rows for each of {self.warpgroups} "
                f"warpgroups, got {self.block_n}"
            )
        if self.block_n % 128:  # a slot's zero points are its bytes, and TMA writes to whole 128s
            raise ValueError(f"block_n: expected a multiple of 128, got {self.block_n}")
        if self.stages < 2:
            raise ValueError(f"stages: expected at least 2, got {self.stages}")


def default_config(M: int, N: int, K: int, dtype: Any) -> Config:
    """The Config for a product of these sizes on a Hopper with 132 multiprocessors."""
    del N, K, dtype
    # Few tokens: four warpgroups unpack, while 100 KB and more are on their way to them.
    if M <= 64:
        block_m = next(size for size in (8, 16, 32, 64) if size >= M)
        return Config(block_m, 256, 4 if block_m < 64 else 3, warpgroups=4)
    # Two warpgroups with room for the sums of 128 tokens and 128 rows each: rows are cheap, it is x
    # that comes from L2 again for every tile.
    return Config(128, 256, 2)


def default_split(M: int, N: int, K: int) -> int:
    """Slices of K: as few as occupy a Hopper with 132 multiprocessors.

    More would be written and read again for nothing. Sums of the slices round differently, so that
    this depends on the sizes alone, not on the Config.
    """
    tiles = _lib.cdiv(N, 256) * _lib.cdiv(M, 128)
    # No slice of fewer than 4 steps, which would be all prologue.
    return max(1, min(_lib.cdiv(106, tiles), _lib.cdiv(K, BLOCK_K) // 4))


def _offset(code: jax.Array, dtype: Any) -> jax.Array:
    """int16 codes of four bits as 128 + code in bfloat16, 1024 + code in float16."""
    return lax.bitcast_convert_type(code | jnp.int16(MAGIC[jnp.dtype(dtype)]), dtype)


def _registers(warpgroups: int) -> int:
    """Of a thread that computes: its share of what the block was launched with.

    That is a multiple of 8 for each thread; asking for more than is left over waits for ever.
    """
    launched = (1 << 16) // (_lib.WARPGROUP * (warpgroups + 1)) // 8 * 8 * (warpgroups + 1)
    return min(232, (launched - MEMORY_REGISTERS) // warpgroups // 8 * 8)


def _plane(words: jax.Array, i: int, dtype: Any) -> jax.Array:
    """Nibble i of words [64, 64] int16, as _offset has it.

    By hand, for Mosaic would shift each half of a register by itself, with four instructions around
    it, and ptxas take two for the and-or.
    """
    magic = MAGIC[jnp.dtype(dtype)] * 0x10001

    def unpack(_: Any, x: Any) -> Any:
        word, registers = ir.IntegerType.get_signless(32), np.empty_like(x.registers)
        one = ir.VectorType.get((1,), word)
        for at, pair in np.ndenumerate(x.registers):
            both = vector.extract(vector.bitcast(one, pair), [], [0])
            if i:
                both = arith.shrui(both, arith.constant(word, 4 * i))
            # 0xEA: a & b | c
            ptx = f"lop3.b32 $0, $1, 0x000F000F, {magic:#x}, 0xEA;"
            both = llvm.inline_asm(word, [both], ptx, "=r,r")
            registers[at] = vector.bitcast(pair.type, vector.broadcast(one, both))
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=True)

    def in_jax(words: jax.Array) -> jax.Array:
        code = lax.shift_right_logical(words, jnp.int16(4 * i)) & jnp.int16(15)
        return code | jnp.int16(MAGIC[jnp.dtype(dtype)])

    unpack.in_jax = in_jax  # what an interpreter does in its place
    like = plgpu.ShapeDtypeStruct(words.shape, words.dtype, layout=TILE)
    bits = plgpu.inline_mgpu(arg_types=(TILE,), return_type=like)(unpack)(words)
    return lax.bitcast_convert_type(bits, dtype)


def _group_values(
    scale_smem: Any, zero_smem: Any, slot: tuple[Any, ...], rows: Any, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """(zero, scale) of one group, for 64 rows of W."""
    load = functools.partial(plgpu.load, layout=ROW, optimized=False)
    scale = load(scale_smem.at[*slot, rows])
    if zero_smem is None:
        zero = plgpu.layout_cast(jnp.full((ROWS,), ZERO, jnp.int16), ROW)
    else:
        zero = load(zero_smem.at[*slot, rows]).astype(jnp.int16)
    return _offset(zero, dtype), scale


def _weights(words: jax.Array, values: list[tuple[jax.Array, jax.Array]], i: int) -> jax.Array:
    """Plane i of the words; values: of all groups in these 256 of K."""

    def tile(value: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(value, (ROWS, PLANE), [0])

    first = i * len(values) // 4
    zero, scale = map(tile, values[first])
    if len(values) == 8:  # groups of 32: two in a plane
        right = plgpu.broadcasted_iota(jnp.int32, (ROWS, PLANE), 1, layout=TILE) >= 32
        zero_32, scale_32 = map(tile, values[first + 1])
        zero, scale = jnp.where(right, zero_32, zero), jnp.where(right, scale_32, scale)
    return (_plane(words, i, scale.dtype) - zero) * scale


def _int4_matmul_kernel(
    *refs: Any,
    M: int,
    K: int,
    group: int,
    split_k: int,
    inside: int,
    atomic: bool,
    config: Config,
    zeros: bool,
    biased: bool,
) -> None:
    given = iter(refs)
    x_gmem = next(given)  # [M, K]
    w_gmem = next(given)  # [blocks of K, N, 64] int16
    scale_gmem = next(given)  # [K / G, N]
    zero_gmem = next(given) if zeros else None  # [K / G, N] uint8
    bias_gmem = next(given) if biased else None  # [N]
    # y [M, N], or the slices' sums [split_k, N, M] float32, or one sum that all add to
    out_gmem = next(given)
    # [stages, 4, block_m, 64], or [stages, inside, block_m, 256], if slices are a block's own
    x_smem = next(given)
    w_smem = next(given)  # [stages, (inside,) block_n, 64]
    scale_smem = next(given)  # [stages, (inside,) groups, block_n or 128]
    zero_smem = next(given) if zeros else None  # likewise
    # [warpgroups, tokens of a store, 64], or transposed for what is added
    y_smem = next(given) if split_k == inside or atomic else None
    sums_smem = next(given) if inside > 1 else None  # [warpgroups, 64, block_m]
    full = next(given)  # [stages] barriers: TMA has filled the slot
    free = next(given)  # [stages] barriers: every reader is done with the slot
    met = next(given) if inside > 1 else None  # barrier: all warpgroups are here
    block_m, block_n, stages = config.block_m, config.block_n // inside, config.stages
    blocks, num_m = _lib.cdiv(K, BLOCK_K), _lib.cdiv(M, block_m)
    num_n = _lib.cdiv(w_gmem.shape[-2], block_n)
    groups = BLOCK_K // group
    across, columns = split_k // inside, scale_smem.shape[-1]
    wg = lax.axis_index("wg")

    def origin(tile: plgpu.NDLoopInfo) -> tuple[jax.Array, ...]:
        # --- 1. which tile
        # Neighbours share weights or tokens; slices of one tile are far apart.
        part = lax.div(tile.index[0], jnp.int32(num_m * num_n))
        index = lax.rem(tile.index[0], jnp.int32(num_m * num_n))
        mi, ni = plgpu.planar_snake(index, (num_m, num_n), 0, config.group_m)
        start = lax.div(part * blocks, jnp.int32(across))
        stop = lax.div((part + 1) * blocks, jnp.int32(across))
        if inside > 1:  # the first of a block's own; each has as many
            stop = jnp.int32(blocks // inside)
        return part, mi * block_m, ni * block_n, start, stop

    @pl.when(wg == config.warpgroups)
    def _memory() -> None:
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

        # The carry counts steps across tiles: the ring does not stop between them.
        @plgpu.nd_loop((num_m * num_n * across,), collective_axes="sm", init_carry=jnp.int32(0))
        def _tile(tile: plgpu.NDLoopInfo, carry: jax.Array) -> jax.Array:
            _, m, n, start, stop = origin(tile)

            def load(block: jax.Array, done: jax.Array) -> jax.Array:
                slot = lax.rem(done, jnp.int32(stages))
                rows = pl.ds(n, block_n)
                plgpu.barrier_wait(free.at[slot])
                copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=full.at[slot])
                # Of a block's own slices those blocks that are as far: a dimension of its own.
                own = () if inside == 1 else (slice(None),)
                # Beyond the edges TMA fills with zeros.
                copy(w_gmem.at[*own, block, rows], w_smem.at[slot])
                step, width = (PLANE, PLANE) if inside == 1 else (K // inside, BLOCK_K)
                for i in range(x_smem.shape[1]):
                    k = pl.ds(block * BLOCK_K + i * step, width)
                    copy(x_gmem.at[pl.ds(m, block_m), k], x_smem.at[slot, i])
                of_k = *own, pl.ds(block * groups, groups), pl.ds(n, columns)
                copy(scale_gmem.at[*of_k], scale_smem.at[slot])
                if zero_gmem is not None:
                    copy(zero_gmem.at[*of_k], zero_smem.at[slot])
                return done + 1

            return lax.fori_loop(start, stop, load, carry)

        # A barrier may not go away before its block has seen all arrivals.
        for slot in range(stages):
            plgpu.barrier_wait(free.at[slot])

    @pl.when(wg < config.warpgroups)
    def _compute() -> None:
        plgpu.set_max_registers(_registers(config.warpgroups), action="increase")
        for slot in range(stages):
            plgpu.barrier_arrive(free.at[slot])  # every slot is free at the start
        # Which slice of the block's own is this warpgroup's, and which rows.
        teams = config.warpgroups // inside
        own, team = ((), wg) if inside == 1 else ((lax.div(wg, teams),), lax.rem(wg, teams))
        pieces = block_n // teams // ROWS

        @plgpu.nd_loop((num_m * num_n * across,), collective_axes="sm", init_carry=jnp.int32(0))
        def _tile(tile: plgpu.NDLoopInfo, carry: jax.Array) -> jax.Array:
            part, m, n, start, stop = origin(tile)

            def accumulate(*accs: Any) -> tuple[jax.Array, ...]:
                # --- 2. main loop
                def step(block: jax.Array, done: jax.Array) -> jax.Array:
                    del block
                    slot = lax.rem(done, jnp.int32(stages))
                    plgpu.barrier_wait(full.at[slot])
                    for piece, acc in enumerate(accs):
                        rows = pl.ds((team * pieces + piece) * ROWS, ROWS)
                        words = plgpu.load(w_smem.at[slot, *own, rows], layout=TILE)
                        values = [
                            _group_values(
                                scale_smem, zero_smem, (slot, *own, j), rows, x_gmem.dtype
                            )
                            for j in range(groups)
                        ]
                        for i in range(4):
                            plane: tuple[Any, ...] = (i,)
                            if inside > 1:
                                plane = *own, slice(None), pl.ds(i * PLANE, PLANE)
                            weights = _weights(words, values, i)
                            plgpu.wgmma(acc, weights, x_smem.at[slot, *plane].T)
                            # This product may run on; the registers of the one before are free.
                            plgpu.wgmma_wait(1)
                    plgpu.commit_smem()  # what has been read, TMA may overwrite
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(free.at[slot])
                    return done + 1

                lax.fori_loop(start, stop, step, carry)
                return tuple(acc[...] for acc in accs)

            accs = pl.run_scoped(accumulate, *[plgpu.ACC((ROWS, block_m), jnp.float32)] * pieces)

            def finish(acc: jax.Array, row: Any) -> None:
                # --- 3. epilogue
                y = _with_bias(acc, bias_gmem, row).astype(out_gmem.dtype)

                # --- 4. store
                _store_transposed(y, y_smem.at[wg], out_gmem, m, row)

            def meet() -> None:
                plgpu.barrier_arrive(met)
                plgpu.barrier_wait(met)

            for piece, acc in enumerate(accs):
                row = n + (team * pieces + piece) * ROWS
                if atomic:
                    _add(acc, y_smem.at[wg], out_gmem.at[0], row, m)
                elif inside > 1:
                    sums_smem[wg] = acc
                    meet()

                    @pl.when(wg < teams)
                    def _(row: Any = row) -> None:
                        parts = [
                            plgpu.load(sums_smem.at[team + i * teams], layout=TILE, optimized=False)
                            for i in range(inside)
                        ]
                        finish(functools.reduce(lax.add, parts), row)

                    meet()  # what has been read, the next tile may overwrite
                elif split_k > 1:
                    out_gmem[part, pl.ds(row, ROWS), pl.ds(m, block_m)] = acc
                else:
                    finish(acc, row)
            return carry + stop - start

        if y_smem is not None:
            plgpu.wait_smem_to_gmem(0)


def _with_bias(acc: jax.Array, bias_gmem: Any, n: Any) -> jax.Array:
    """acc [64 rows of W, tokens] with each row's bias."""
    if bias_gmem is None:
        return acc
    bias = plgpu.load(bias_gmem.at[pl.ds(n, ROWS)], layout=ROW, optimized=False)
    return acc + lax.broadcast_in_dim(bias.astype(jnp.float32), acc.shape, [0])


def _add(acc: jax.Array, sums_smem: Any, sums_gmem: Any, n: Any, m: Any) -> None:
    """Adds acc [64 rows of W, tokens] to sums_gmem[n.., m..], through sums_smem [64, tokens]."""
    tokens = sums_smem.shape[1]
    for j in range(0, acc.shape[1], tokens):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        sums_smem[...] = acc[:, j : j + tokens]
        plgpu.commit_smem()
        at = pl.ds(n, ROWS), pl.ds(m + j, tokens)
        plgpu.copy_smem_to_gmem(sums_smem, sums_gmem.at[at], reduction_op="add")


def _store_transposed(y: jax.Array, y_smem: Any, y_gmem: Any, m: Any, n: Any) -> None:
    """Stores y [64 rows of W, tokens] to y_gmem[m.., n..], through y_smem [tokens, 64]."""
    tokens = y_smem.shape[0]
    for j in range(0, y.shape[1], tokens):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        y_smem.T[...] = plgpu.layout_cast(y[:, j : j + tokens], plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        # Beyond the edges TMA drops what it is given.
        plgpu.copy_smem_to_gmem(y_smem, y_gmem.at[pl.ds(m + j, tokens), pl.ds(n, ROWS)])


def _int4_reduce_kernel(*refs: Any, split_k: int, biased: bool) -> None:
    given = iter(refs)
    parts_gmem = next(given)  # [split_k, N, M] float32
    bias_gmem = next(given) if biased else None  # [N]
    y_gmem = next(given)  # [M, N]
    y_smem = next(given)  # [tokens of a tile, 64]
    tokens = y_smem.shape[0]

    # --- 1. which tile
    m, n = lax.axis_index("m") * tokens, lax.axis_index("n") * ROWS

    # --- 2. main loop
    parts = [
        plgpu.load(
            parts_gmem.at[part, pl.ds(n, ROWS), pl.ds(m, tokens)], layout=TILE, optimized=False
        )
        for part in range(split_k)
    ]
    acc = functools.reduce(lax.add, parts)  # in this order, whoever was done first

    # --- 3. epilogue
    y = _with_bias(acc, bias_gmem, n).astype(y_gmem.dtype)

    # --- 4. store
    _store_transposed(y, y_smem, y_gmem, m, n)
    plgpu.wait_smem_to_gmem(0)


def _int4_dequantize_kernel(*refs: Any, group: int, zeros: bool) -> None:
    given = iter(refs)
    w_gmem = next(given)  # [blocks of K, N, 64] int16
    scale_gmem = next(given)  # [K / G, N]
    zero_gmem = next(given) if zeros else None  # [K / G, N]
    out_gmem = next(given)  # [N, K]
    w_smem = next(given)  # [64, 64]
    scale_smem = next(given)  # [groups, 128]
    zero_smem = next(given) if zeros else None  # [groups, 128]
    out_smem = next(given)  # [4, 64, 64]
    full = next(given)  # barrier: TMA has filled them

    # --- 1. which tile
    block, n = lax.axis_index("block"), lax.axis_index("n") * ROWS
    groups = BLOCK_K // group
    of_k, rows = pl.ds(block * groups, groups), pl.ds(n, 2 * ROWS)
    plgpu.copy_gmem_to_smem(w_gmem.at[block, pl.ds(n, ROWS)], w_smem, full)
    plgpu.copy_gmem_to_smem(scale_gmem.at[of_k, rows], scale_smem, full)
    if zero_gmem is not None:
        plgpu.copy_gmem_to_smem(zero_gmem.at[of_k, rows], zero_smem, full)
    plgpu.barrier_wait(full)

    # --- 2. main loop
    words, own = plgpu.load(w_smem, layout=TILE), pl.ds(0, ROWS)
    values = [
        _group_values(scale_smem, zero_smem, (j,), own, out_gmem.dtype) for j in range(groups)
    ]
    for i in range(4):
        # --- 3. epilogue
        out_smem[i] = _weights(words, values, i)

    # --- 4. store
    plgpu.commit_smem()
    for i in range(4):  # beyond the edges TMA drops what it is given
        k = pl.ds(block * BLOCK_K + i * PLANE, PLANE)
        plgpu.copy_smem_to_gmem(out_smem.at[i], out_gmem.at[pl.ds(n, ROWS), k])
    plgpu.wait_smem_to_gmem(0)


def int4_quantize(
    w: jax.Array, *, group: int = 128, symmetric: bool = True
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Weights in four bits, in the order of files; one launch and one read of w, no gradient.

    w: [N, K], bfloat16 or float16.
    group: 32, 64, 128 or 256 neighbours along K share a scale and a zero point.
    symmetric: scale = max |w| / 7 and 8 as zero point. Otherwise the range from lo = min(w, 0) to
        hi = max(w, 0) is covered: scale = (hi - lo) / 15, zero = clip(rint(-lo / scale), 0, 15).

    Returns (w_packed [N, K / 2] uint8, w_scale [N, K / group] in w's dtype, w_zero [N, 4 *
    ceil(K / group / 8)] uint8, or None if symmetric): what int4_prepack takes.

    All zeros, or a scale too small for its dtype: scale 1. A NaN, an infinity or a range too large:
    the scale is NaN or infinity and every code the zero point (8, or 0 where not symmetric).

    Raises ValueError for a wrong rank, another group or one that does not divide K and TypeError
    for a wrong dtype or keyword.
    """
    _lib.check_array("w", w, ("N", "K"), DTYPES)
    _check_group(group, w.shape[1])
    _lib.check_static("symmetric", symmetric, (bool,))
    packed, scale, *zero = quantized(w, group, symmetric)
    return packed, scale, None if symmetric else zero[0]


def int4_prepack(
    w_packed: jax.Array, w_scale: jax.Array, w_zero: jax.Array | None = None, *, group: int = 128
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Weights in the order in which the kernels read them; done once, with JAX's operations.

    w_packed: [N, K / 2] uint8, k = 2j in the low nibble of byte j. w_scale: [N, K / group].
    w_zero: [N, 4 * ceil(K / group / 8)] uint8, packed likewise, or None.

    Returns ([ceil(K / 256), N, 64] int16: nibble i of word c of a row's block b is k = 256 b + 64 i
    + c, and 8 beyond K; [K / group, N]; [K / group, N] uint8, one to a byte, or None). Nothing is
    lost: the same codes in another order.

    Raises as int4_matmul does.
    """
    if _check_weights(w_packed, w_scale, w_zero, group, None)[2]:
        raise ValueError("w_packed: expected shape [N, K / 2], got weights that are prepacked")
    return ordered(w_packed, w_scale, w_zero, group)


def _prepacked(
    w_packed: jax.Array, w_scale: jax.Array, w_zero: jax.Array | None, group: int
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The kernels' arrays: as they are if they have been prepacked, else made now."""
    if w_packed.ndim == 2:
        return int4_prepack(w_packed, w_scale, w_zero, group=group)
    return w_packed, w_scale, w_zero


def _inside(config: Config, slices: int, M: int, K: int, group: int) -> int:
    """How many slices a block takes itself: all of them, or one.

    All: its warpgroups have 64 rows of W each, those who share rows in place of other ones, and
    there is no second kernel. Every slice brings its own x, which has to be small beside W's words.
    """
    few = M <= config.block_m == 8 and config.block_n == ROWS * config.warpgroups
    slot = 128 * config.block_n + slices * (512 * 8 + 3 * (BLOCK_K // group) * 128)
    fits = config.stages * slot + config.warpgroups * ROWS * 8 * (4 + 2) <= SHARED
    even = config.warpgroups % slices == 0 == K % (slices * BLOCK_K)
    return slices if few and fits and even else 1


def _rings(config: Config, dtype: Any, group: int, zeros: bool, inside: int) -> list[Any]:
    """Shared memory of the operands."""
    own = () if inside == 1 else (inside,)
    block_m, block_n = config.block_m, config.block_n // inside
    tile = functools.partial(plgpu.SMEM, transforms=_lib.swizzled(dtype))
    of_x = (4, block_m, PLANE) if inside == 1 else (inside, block_m, BLOCK_K)
    of_groups = config.stages, *own, BLOCK_K // group, max(128, block_n)
    rings = [
        tile((config.stages, *of_x), dtype),
        tile((config.stages, *own, block_n, PLANE), jnp.int16),
        plgpu.SMEM(of_groups, dtype),
    ]
    if zeros:
        rings.append(plgpu.SMEM(of_groups, jnp.uint8))
    return rings


def _whole_tiles(
    w_packed: jax.Array, w_scale: jax.Array, w_zero: jax.Array | None
) -> list[jax.Array]:
    """The weights with rows for whole tiles of 8, as Mosaic's TMA wants them, and 16 bytes."""
    given = [_lib.pad(w_packed, 8, 1), _lib.pad(w_scale, 16)]
    return given if w_zero is None else [*given, _lib.pad(w_zero, 16)]


def _product(
    x: jax.Array,
    w_packed: jax.Array,
    w_scale: jax.Array,
    w_zero: jax.Array | None,
    bias: jax.Array | None,
    group: int,
    split_k: int | str,
    atomic: bool,
    config: Config | None,
) -> jax.Array:
    """x @ W^T + bias; the weights are prepacked."""
    (M, K), N = x.shape, w_scale.shape[1]
    if 0 in (M, N, K):
        y = jnp.zeros((M, N), x.dtype)
        return y if bias is None else y + bias
    config = config or default_config(M, N, K, x.dtype)
    slices = default_split(M, N, K) if isinstance(split_k, str) else split_k
    block_m, block_n = config.block_m, config.block_n
    rows, tokens = _lib.cdiv(N, block_n) * block_n, _lib.cdiv(M, block_m) * block_m
    y_type = jax.ShapeDtypeStruct((M, _lib.cdiv(N, 8) * 8), x.dtype)
    store = min(EPILOGUE_M, block_m)
    transposing = functools.partial(plgpu.SMEM, transforms=(plgpu.SwizzleTransform(128),))
    atomic = atomic and slices > 1
    inside = 1 if atomic else _inside(config, slices, M, K, group)
    done = slices == inside  # by the first kernel
    sums_type = jax.ShapeDtypeStruct((1 if atomic else slices, rows, tokens), jnp.float32)
    zeros, biased = w_zero is not None, bias is not None and done
    scratch = _rings(config, x.dtype, group, zeros, inside)
    if done:
        scratch.append(transposing((config.warpgroups, store, ROWS), x.dtype))
    elif atomic:
        scratch.append(plgpu.SMEM((config.warpgroups, ROWS, min(16, block_m)), jnp.float32))
    if inside > 1:
        scratch.append(plgpu.SMEM((config.warpgroups, ROWS, block_m), jnp.float32))
    copies = (4 if inside == 1 else inside) + 2 + zeros
    scratch += [
        plgpu.Barrier(num_arrivals=copies, num_barriers=config.stages),
        plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages),
    ]
    if inside > 1:
        scratch.append(plgpu.Barrier(num_arrivals=config.warpgroups))
    out = plgpu.kernel(
        functools.partial(
            _int4_matmul_kernel,
            M=M,
            K=K,
            group=group,
            split_k=slices,
            inside=inside,
            atomic=atomic,
            config=config,
            zeros=zeros,
            biased=biased,
        ),
        out_type=() if atomic else y_type if done else sums_type,
        scratch_types=scratch,
        grid=(_lib.num_sms(),),
        grid_names=("sm",),
        num_threads=config.warpgroups + 1,
        thread_name="wg",
        kernel_name="int4_matmul_kernel",
    )
    bias = None if bias is None else _lib.pad(bias, block_n)
    given = _whole_tiles(w_packed, w_scale, w_zero)
    if inside > 1:
        given = [a.reshape(inside, len(a) // inside, *a.shape[1:]) for a in given]
    x = _lib.pad(x, 8 if M > 8 else 1, PLANE)
    given = [x, *given, *([bias] if biased else [])]
    if atomic:
        sums = jax.new_ref(jnp.zeros(sums_type.shape, sums_type.dtype))
        out(*given, sums)
        y = sums[...]
    else:
        y = out(*given)
    if not done:
        y = plgpu.kernel(
            functools.partial(
                _int4_reduce_kernel, split_k=sums_type.shape[0], biased=bias is not None
            ),
            out_type=y_type,
            scratch_types=[transposing((store, ROWS), x.dtype)],
            grid=(tokens // store, rows // ROWS),
            grid_names=("m", "n"),
            kernel_name="int4_reduce_kernel",
        )(y, *([] if bias is None else [bias]))
    return _lib.vary_alike(y[:, :N], x)[0]


def _dequantized(
    w_packed: jax.Array, w_scale: jax.Array, w_zero: jax.Array | None, group: int
) -> jax.Array:
    """W [N, K] in the scales' dtype; the weights are prepacked."""
    N, K = w_scale.shape[1], w_scale.shape[0] * group
    if 0 in (N, K):
        return jnp.zeros((N, K), w_scale.dtype)
    dtype, groups, zeros = w_scale.dtype, BLOCK_K // group, w_zero is not None
    tile = functools.partial(plgpu.SMEM, transforms=_lib.swizzled(dtype))
    scratch = [
        tile((ROWS, PLANE), jnp.int16),
        plgpu.SMEM((groups, 2 * ROWS), dtype),
        *([plgpu.SMEM((groups, 2 * ROWS), jnp.uint8)] if zeros else []),
        tile((4, ROWS, PLANE), dtype),
        plgpu.Barrier(num_arrivals=3 if zeros else 2),
    ]
    kernel = plgpu.kernel(
        functools.partial(_int4_dequantize_kernel, group=group, zeros=zeros),
        out_type=jax.ShapeDtypeStruct((_lib.cdiv(N, 8) * 8, _lib.cdiv(K, PLANE) * PLANE), dtype),
        scratch_types=scratch,
        grid=(_lib.cdiv(N, ROWS), _lib.cdiv(K, BLOCK_K)),
        grid_names=("n", "block"),
        kernel_name="int4_dequantize_kernel",
    )
    w = kernel(*_whole_tiles(w_packed, w_scale, w_zero))[:N, :K]
    return _lib.vary_alike(w, w_scale)[0]


def int4_matmul_fwd(
    x: jax.Array,
    w_packed: jax.Array,
    w_scale: jax.Array,
    w_zero: jax.Array | None = None,
    *,
    group: int = 128,
    split_k: int | str = "auto",
    bias: jax.Array | None = None,
    config: Config | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array | None]]:
    """As `int4_matmul`, and what the backward needs: res = (w_packed, w_scale, w_zero), as
    int4_prepack returns them."""
    _check(x, w_packed, w_scale, w_zero, group, split_k, bias, config)
    res = _prepacked(w_packed, w_scale, w_zero, group)
    return _product(x, *res, bias, group, split_k, False, config), res


def int4_matmul_bwd(
    res: tuple[jax.Array, jax.Array, jax.Array | None],
    dy: jax.Array,
    *,
    group: int = 128,
    config: Config | None = None,
) -> tuple[jax.Array]:
    """The gradient (dx[M, K],) in x's dtype; the weights are frozen.

    res: of int4_matmul_fwd. dy: [M, N], the cotangent. config: unused, for the product is matmul's.
    """
    w_packed, w_scale, w_zero = res
    N, _, prepacked = _check_weights(w_packed, w_scale, w_zero, group, None)
    if not prepacked:
        raise ValueError(f"res: expected prepacked weights, got w_packed {list(w_packed.shape)}")
    _lib.check_array("dy", dy, ("M", N), (w_scale.dtype,))
    _lib.check_config(config, Config)
    return (matmul_fwd(dy, _dequantized(w_packed, w_scale, w_zero, group))[0],)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _int4_matmul(
    x: jax.Array, w_packed: Any, w_scale: Any, w_zero: Any, bias: Any,
    group: int, split_k: int | str, atomic: bool, config: Config | None,
) -> jax.Array:  # fmt: skip
    return _product(x, w_packed, w_scale, w_zero, bias, group, split_k, atomic, config)


def _int4_matmul_fwd(
    x: jax.Array, w_packed: Any, w_scale: Any, w_zero: Any, bias: Any,
    group: int, split_k: int | str, atomic: bool, config: Config | None,
) -> Any:  # fmt: skip
    y = _product(x, w_packed, w_scale, w_zero, bias, group, split_k, atomic, config)
    return y, (w_packed, w_scale, w_zero, bias)


def _int4_matmul_bwd(
    group: int, split_k: int | str, atomic: bool, config: Config | None, res: Any, dy: jax.Array
) -> Any:
    del split_k, atomic, config
    *weights, bias = res
    (dx,) = int4_matmul_bwd(tuple(weights), dy, group=group)
    # The weights and the bias are frozen: to JAX they have a gradient, and it is 0.
    nothing = (jnp.zeros_like(weights[1]), None, None if bias is None else jnp.zeros_like(bias))
    return dx, None, *nothing


_int4_matmul.defvjp(_int4_matmul_fwd, _int4_matmul_bwd)


def int4_matmul(
    x: jax.Array,
    w_packed: jax.Array,
    w_scale: jax.Array,
    w_zero: jax.Array | None = None,
    *,
    group: int = 128,
    split_k: int | str = "auto",
    bias: jax.Array | None = None,
    config: Config | None = None,
) -> jax.Array:
    """x @ W^T + bias with W [N, K] in four bits. Differentiable, in x alone.

    x: [M, K], bfloat16 or float16.
    w_packed, w_scale, w_zero: as int4_prepack returns them: [ceil(K / 256), N, 64] int16,
        [K / group, N] in x's dtype, [K / group, N] uint8 or None, which stands for 8 everywhere. Or
        as it takes them: [N, K / 2], [N, K / group], [N, 4 * ceil(K / group / 8)]; they are then
        prepacked in every call, which takes longer than the product.
    group: 32, 64, 128 or 256 neighbours along K share a scale and a zero point.
    split_k: K is summed in so many slices of whole blocks of 256, and these are added in order. The
        rounding of the sums depends on it. "auto" chooses by the sizes.
    bias: [N], x's dtype, or None.
    config: tile sizes; None takes default_config.

    Returns y[M, N] in x's dtype. A NaN or an infinity among the scales makes NaN of what it belongs
    to.

    Raises ValueError for shapes, groups and slices that do not fit and TypeError for a wrong dtype
    or config, naming the argument.
    """
    return _public(x, w_packed, w_scale, w_zero, bias, group, split_k, False, config)


def int4_matmul_atomic(
    x: jax.Array,
    w_packed: jax.Array,
    w_scale: jax.Array,
    w_zero: jax.Array | None = None,
    *,
    group: int = 128,
    split_k: int | str = "auto",
    bias: jax.Array | None = None,
    config: Config | None = None,
) -> jax.Array:
    """int4_matmul whose slices of K are added as they come: its last bits differ from run to run.

    Arguments, gradient and errors are int4_matmul's. One sum is zeroed, added to and read, where
    int4_matmul writes and reads split_k of them.
    """
    return _public(x, w_packed, w_scale, w_zero, bias, group, split_k, True, config)


def _public(
    x: Any, w_packed: Any, w_scale: Any, w_zero: Any, bias: Any,
    group: int, split_k: int | str, atomic: bool, config: Config | None,
) -> jax.Array:  # fmt: skip
    _check(x, w_packed, w_scale, w_zero, group, split_k, bias, config)
    weights = _prepacked(w_packed, w_scale, w_zero, group)
    given = [array for array in (x, *weights, bias) if array is not None]
    alike = iter(_lib.vary_alike(*given))
    x, w_packed, w_scale, w_zero, bias = (
        None if array is None else next(alike) for array in (x, *weights, bias)
    )
    return _int4_matmul(x, w_packed, w_scale, w_zero, bias, group, split_k, atomic, config)


def _check(
    x: Any,
    w_packed: Any,
    w_scale: Any,
    w_zero: Any,
    group: int,
    split_k: Any,
    bias: Any,
    config: Any,
) -> None:
    if getattr(x, "dtype", None) == jnp.float32:
        raise TypeError("x: expected dtype bfloat16 or float16, got float32")
    _lib.check_array("x", x, ("M", "K"), DTYPES)
    N, K, _ = _check_weights(w_packed, w_scale, w_zero, group, x)
    if bias is not None:
        _lib.check_array("bias", bias, (N,), (x.dtype,))
    _lib.check_config(config, Config)
    if split_k != "auto":
        _lib.check_static("split_k", split_k, (int,))
        if not 1 <= split_k <= max(1, _lib.cdiv(K, BLOCK_K)):
            raise ValueError(
                f'split_k: expected "auto" or 1 .. {_lib.cdiv(K, BLOCK_K)}, the blocks of 256 '
                f"that K = {K} has, got {split_k}"
            )


def _check_group(group: int, K: int) -> None:
    _lib.check_static("group", group, (int,))
    if group not in GROUPS:
        raise ValueError(f"group: expected 32, 64, 128 or 256, got {group}")
    if K % group:
        raise ValueError(f"group: expected {group} to divide K = {K}")


def _check_weights(
    w_packed: Any, w_scale: Any, w_zero: Any, group: int, x: Any
) -> tuple[int, int, bool]:
    """(N, K, whether they are prepacked)"""
    _check_group(group, 0)
    prepacked = len(getattr(w_packed, "shape", ())) == 3
    codes = (jnp.int16 if prepacked else jnp.uint8,)
    shape = ("ceil(K / 256)", "N", PLANE) if prepacked else ("N", "K / 2")
    _lib.check_array("w_packed", w_packed, shape, codes)
    N = w_packed.shape[1] if prepacked else w_packed.shape[0]
    dtypes = DTYPES if x is None else (x.dtype,)
    if x is not None:
        K = x.shape[1]
    elif prepacked:
        _lib.check_array("w_scale", w_scale, ("K / group", N), dtypes)
        K = w_scale.shape[0] * group
    else:
        K = w_packed.shape[1] * 2
    _check_group(group, K)
    groups = K // group
    packed = (_lib.cdiv(K, BLOCK_K), N, PLANE) if prepacked else (N, K // 2)
    _lib.check_array("w_packed", w_packed, packed, codes)
    _lib.check_array("w_scale", w_scale, (groups, N) if prepacked else (N, groups), dtypes)
    if w_zero is not None:
        shape = (groups, N) if prepacked else (N, 4 * _lib.cdiv(groups, 8))
        _lib.check_array("w_zero", w_zero, shape, (jnp.uint8,))
    return N, K, prepacked
