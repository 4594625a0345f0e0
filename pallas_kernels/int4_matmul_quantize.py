"""Four-bit weights with a scale, and a zero point if asymmetric, for each group of neighbours in K.

    symmetric:   s = max |w| / 7                                   z = 8
    asymmetric:  s = (hi - lo) / 15, lo = min(w, 0), hi = max(w, 0)
                 z = clip(rint(-lo / s), 0, 15)
    q = clip(rint(w / s) + z, 0, 15)            s rounded to w's dtype first, and 1 where it is 0

    one block of threads for some groups, which TMA brings:
        lo, hi -> s, z;  codes, eight to a word     a group stays within a warp
        TMA stores them

There is one right answer, which is parity.formats.int4_quantize's: quotients are float32's,
correctly rounded, and ties go to the even number. No division is needed for it. w and s have 11
bits at most, so that w / s is a tie or 2^-12 away from one, and w * (1 / s), taken to 13 bits after
the point, has the ties where they belong. The test goes through all of them.

10 instructions an element take an H200 23 us for [8192, 8192], whose bytes take 41 us.

Groups are taken without regard to rows. Where a row's zero points are not whole words, XLA fills
those up, in a 256th of the bytes.

Twin: triton_kernels/int4_matmul_quantize.py.

Sources: the range that always holds 0, so that 0 has a code of its own, is Jacob et al.'s
(arXiv:1712.05877); one byte for two codes, the first one low, is how GPTQ's words lie in memory;
the parts of 1 / 15 are Dekker's double length (Numerische Mathematik 18, 1971).
"""

import functools
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

ELEMENTS = 8192  # of a block of threads, 64 for each
OF_LANE = 32  # of a group that one lane holds; every lane of a group computes its scale
SNAP, ROUND = 1536.0, 12582912.0  # 1.5 * 2^10 leaves multiples of 2^-13, 1.5 * 2^23 whole numbers


def _share(span: Any, symmetric: bool) -> Any:
    """span / 7, good enough for 16 bits, whose ties no quotient comes near; or span / 15 in
    float32, correctly rounded.

    The product with the first bits of 1 / 15 is exact, the sum within 2^-34 of the quotient.
    """
    if symmetric:
        return span * np.float32(1 / 7)
    first = np.float32(2184 / 2**15)
    rest = np.float32(1 / 15 - float(first))
    # So that no part of it leaves float32's normal numbers.
    small = span < 2.0**-60
    scaled = span * jnp.where(small, np.float32(2.0**64), np.float32(1.0))
    high = lax.bitcast_convert_type(
        lax.bitcast_convert_type(scaled, jnp.int32) & -4096, jnp.float32
    )  # 12 bits
    share = high * first + ((scaled - high) * first + scaled * rest)
    share *= jnp.where(small, np.float32(2.0**-64), np.float32(1.0))
    return jnp.where(span == jnp.inf, span, share)  # infinity less infinity would be NaN


def _rounding(scale: Any) -> tuple[Any, Any, Any, Any]:
    """(r, snap, rest, none): _rounded's, and the bits in which it returns 0."""
    # The reciprocals of bfloat16's smallest numbers are infinite. Less by a power of two are the
    # three constants, and the bits of the sum are the same.
    tiny = scale < 2.0**-100
    less = jnp.where(tiny, np.float32(2.0**-32), np.float32(1.0))
    r = 1.0 / (scale * jnp.where(tiny, np.float32(2.0**32), np.float32(1.0)))
    # The bits of less * ROUND, written out: `none` is multiplied as a whole number, and for
    # (x * ROUND) * c ptxas 12.8 to 13.5 computes x * (ROUND * c), the inner product in float32.
    none = jnp.where(tiny, jnp.int32(0x3B400000), jnp.int32(0x4B400000))
    return r, less * SNAP, less * (ROUND - SNAP), none


def _rounded(x: Any, r: Any, snap: Any, rest: Any) -> Any:
    """rint(x / scale) within 15 of 0, in the low bits of what it returns.

    x and scale have 11 bits, so that x / scale lies on a tie or 2^-12 and more away from it. x * r
    is 2^-18 off: among the multiples of 2^-13 it is back on the tie, which goes to the even number.
    """
    return lax.bitcast_convert_type((x * r + snap) + rest, jnp.int32)


def _tile(group: int) -> tuple[int, int]:
    """(groups that a warpgroup holds at once, lanes of one)"""
    lanes = group // OF_LANE
    return _lib.WARPGROUP // lanes, lanes


def _layout(group: int, vector: int) -> Any:
    """Of w [groups, group], `vector` = 8 elements at once, and of codes, four bytes: a lane has
    four vectors of a group, and its lanes read side by side."""
    groups, lanes = _tile(group)
    columns = group * vector // 8
    tiles = (groups, columns), (groups // 4, columns), (lanes * vector,), (vector,)
    warps, of_lanes = (-6,), (-4, -2)
    if lanes == 1:
        tiles, warps, of_lanes = (*tiles[:2], (vector,)), (-5,), (-3,)
    return plgpu.Layout.TILED(
        plgpu.Tiling(tiles), warp_dims=warps, lane_dims=of_lanes, vector_dim=-1
    )


def _packed(bits: jax.Array, none: jax.Array, keep: jax.Array, group: int, fill: int) -> jax.Array:
    """bits - none, two to a byte, the first one low: uint8 [groups, group / 2].

    bits, none, keep: int32 [groups, group], the latter two alike in a group; keep is -1, or 0 for
    `fill` in each place. By hand: Mosaic has no way to bring neighbours of one thread together.
    Eight codes less `none` are added up, each times its power of 16, and what overflows belongs to
    `none`.
    """

    def pack(_: Any, *given: Any) -> Any:
        word, byte = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(8)
        all_bits, all_none, all_keep = (x.registers for x in given)
        registers = np.empty_like(all_bits)
        ptx = f"""{{
            .reg .b32 a, b, c, d;
            mad.lo.u32 a, $2, 16, $1;
            mad.lo.u32 b, $4, 16, $3;
            mad.lo.u32 c, $6, 16, $5;
            mad.lo.u32 d, $8, 16, $7;
            mad.lo.u32 a, b, 256, a;
            mad.lo.u32 c, d, 256, c;
            mad.lo.u32 a, c, 65536, a;
            mad.lo.u32 a, $9, {-0x11111111 & 0xFFFFFFFF:#x}, a;
            lop3.b32 $0, a, $10, {fill * 0x11111111:#x}, 0xE2;
        }}"""  # 0xE2: $10 ? a : fill
        for at, eight in np.ndenumerate(all_bits):
            each = [vector.extract(eight, [], [i]) for i in range(8)]
            each += [vector.extract(alike[at], [], [0]) for alike in (all_none, all_keep)]
            four = llvm.inline_asm(word, each, ptx, "=r" + ",r" * 10)
            four = vector.broadcast(ir.VectorType.get((1,), word), four)
            registers[at] = vector.bitcast(ir.VectorType.get((4,), byte), four)
        return mgpu.FragmentedArray(
            _registers=registers, _layout=_layout(group, 4).to_mgpu(), _is_signed=False
        )

    def in_jax(bits: jax.Array, none: jax.Array, keep: jax.Array) -> jax.Array:
        code = jnp.where(keep == 0, fill, (bits - none) & 15)
        return (code[:, 0::2] | code[:, 1::2] << 4).astype(jnp.uint8)

    pack.in_jax = in_jax  # what an interpreter does in its place
    like = plgpu.ShapeDtypeStruct((bits.shape[0], group // 2), jnp.uint8, layout=_layout(group, 4))
    return plgpu.inline_mgpu(arg_types=(_layout(group, 8),) * 3, return_type=like)(pack)(
        bits, none, keep
    )


def _paired(zero: jax.Array, group: int) -> jax.Array:
    """int32 [groups] as _layout(group, 8) leaves them -> uint8 [groups / 2], the first one low.

    By hand: neighbours are in other lanes.
    """
    groups, lanes = _tile(group)
    layout = plgpu.Layout.TILED(
        plgpu.Tiling(((groups // 2,), (groups // 8,), (1,))),
        warp_dims=(-3,),
        lane_dims=(-2, plgpu.Replicated(2 * lanes)),
        vector_dim=-1,
    )

    def pair(_: Any, x: Any) -> Any:
        word, byte = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(8)
        ptx = f"""{{
            .reg .b32 lane, even, odd;
            mov.u32 lane, %laneid;
            and.b32 even, lane, {31 - lanes};
            or.b32 odd, lane, {lanes};
            shfl.sync.idx.b32 even, $1, even, 31, -1;
            shfl.sync.idx.b32 odd, $1, odd, 31, -1;
            mad.lo.u32 $0, odd, 16, even;
        }}"""
        (own,) = x.registers.flat
        both = llvm.inline_asm(
            word, [vector.extract(own, [], [0])], ptx, "=r,r", has_side_effects=True
        )
        registers = np.full(layout.to_mgpu().registers_shape((groups // 2,)), None, dtype=object)
        registers.fill(vector.broadcast(ir.VectorType.get((1,), byte), arith.trunci(byte, both)))
        return mgpu.FragmentedArray(
            _registers=registers, _layout=layout.to_mgpu(), _is_signed=False
        )

    def in_jax(zero: jax.Array) -> jax.Array:
        return (zero[0::2] | zero[1::2] << 4).astype(jnp.uint8)

    pair.in_jax = in_jax
    like = plgpu.ShapeDtypeStruct((groups // 2,), jnp.uint8, layout=layout)
    own = _layout(group, 8).reduce(1)
    return plgpu.inline_mgpu(arg_types=(own,), return_type=like)(pair)(zero)


def _int4_quantize_kernel(*refs: Any, symmetric: bool) -> None:
    given = iter(refs)
    w_gmem = next(given)  # [1, all groups, group]
    packed_gmem = next(given)  # [1, all groups, group / 2] uint8
    scale_gmem = next(given)  # [room for all groups]
    zero_gmem = None if symmetric else next(given)  # [half of that] uint8, two to a byte
    w_smem = next(given)  # [groups of a block, group]
    packed_smem = next(given)  # [groups of a block, group / 2]
    full = next(given)  # barrier: TMA has filled it
    of_block, group = w_smem.shape
    groups, _ = _tile(group)
    layout = _layout(group, 8)

    # --- 1. which tile
    start = lax.axis_index("block") * of_block
    # Beyond the last group TMA loads zeros.
    plgpu.copy_gmem_to_smem(w_gmem.at[0, pl.ds(start, of_block)], w_smem, full)
    plgpu.barrier_wait(full)

    def along(values: Any) -> Any:
        return plgpu.layout_cast(lax.broadcast_in_dim(values, (groups, group), [0]), layout)

    # --- 2. main loop
    for i in range(of_block // groups):
        own = pl.ds(i * groups, groups)
        w = plgpu.load(w_smem.at[own], layout=layout, optimized=False)
        down = jnp.maximum(-w.min(axis=1).astype(jnp.float32), 0.0)
        span = jnp.maximum(w.max(axis=1).astype(jnp.float32), 0.0)
        span = jnp.maximum(span, down) if symmetric else span + down

        # --- 3. epilogue
        scale = _share(span, symmetric).astype(w.dtype)
        wide = scale.astype(jnp.float32)
        scale, wide = (jnp.where(wide == 0.0, jnp.ones_like(s), s) for s in (scale, wide))
        *rounding, none = _rounding(wide)
        # Of what is not finite no codes are left but the zero point.
        keep = jnp.where(wide < jnp.inf, -1, 0)
        if symmetric:
            zero = (keep & 0) + 8
        else:
            zero = jnp.minimum(_rounded(down, *rounding) - none, 15) & keep
        lowest = -zero.astype(jnp.float32)
        # Limits rounded to 16 bits are still rounded to 0 and 15.
        inside = jnp.maximum(w, along((lowest * wide).astype(w.dtype)))
        inside = jnp.minimum(inside, along(((lowest + 15.0) * wide).astype(w.dtype)))
        bits = _rounded(inside.astype(jnp.float32), *map(along, rounding))

        # --- 4. store
        packed_smem[own] = _packed(
            bits, along(none - zero), along(keep), group, 8 if symmetric else 0
        )
        at = pl.ds(start + i * groups, groups)
        scale_gmem[at] = scale
        if zero_gmem is not None:
            at = pl.ds((start + i * groups) // 2, groups // 2)
            zero_gmem[at] = _paired(zero, group)
    plgpu.commit_smem()
    _lib.store_row_chunk(packed_smem, packed_gmem, 0, start)
    plgpu.wait_smem_to_gmem(0)


def quantized(w: jax.Array, group: int, symmetric: bool) -> list[jax.Array]:
    """[w_packed, w_scale], and w_zero unless symmetric."""
    (N, K), dtype = w.shape, w.dtype
    groups = K // group
    if w.size == 0:
        found = [jnp.zeros((N, K // 2), jnp.uint8), jnp.zeros((N, groups), dtype)]
        return found + ([] if symmetric else [jnp.zeros((N, 0), jnp.uint8)])
    total, (step, _) = N * groups, _tile(group)
    of_block = min(ELEMENTS // group, _lib.cdiv(total, step) * step)
    blocks = _lib.cdiv(total, of_block)
    packed, *of_groups = plgpu.kernel(
        functools.partial(_int4_quantize_kernel, symmetric=symmetric),
        out_type=[
            jax.ShapeDtypeStruct((1, total, group // 2), jnp.uint8),
            jax.ShapeDtypeStruct((blocks * of_block,), dtype),
            *([] if symmetric else [jax.ShapeDtypeStruct((blocks * of_block // 2,), jnp.uint8)]),
        ],
        scratch_types=[
            plgpu.SMEM((of_block, group), dtype),
            plgpu.SMEM((of_block, group // 2), jnp.uint8),
            plgpu.Barrier(),
        ],
        grid=(blocks,),
        grid_names=("block",),
        compiler_params=_lib.ROW_PARAMS,
        kernel_name="int4_quantize_kernel",
    )(w.reshape(1, total, group))
    scale, *zero = of_groups
    found = [packed.reshape(N, K // 2), scale[:total].reshape(N, groups)]
    if not symmetric and groups % 8 == 0:
        found.append(zero[0][: total // 2].reshape(N, groups // 2))
    elif not symmetric:  # rows of whole words: taken apart, filled up, put together again
        each = zero[0][:, None] >> (lax.iota(jnp.uint8, 2) << 2) & 15
        each = each.reshape(-1)[:total].reshape(N, groups)
        each = jnp.pad(each, ((0, 0), (0, -groups % 8)), constant_values=8).reshape(N, -1, 2)
        found.append(each[:, :, 0] | each[:, :, 1] << 4)
    return list(_lib.vary_alike(*found, w)[:-1])
