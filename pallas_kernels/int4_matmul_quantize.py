"""Four-bit weights with a scale, and a zero point if asymmetric, for each group of neighbours in K.

    symmetric:   s = max |w| / 7                                   z = 8
    asymmetric:  s = (hi - lo) / 15, lo = min(w, 0), hi = max(w, 0)
                 z = clip(rint(-lo / s), 0, 15)
    q = clip(rint(w / s) + z, 0, 15)            s rounded to w's dtype first, and 1 where it is 0

    one block of threads for some groups of a row, which TMA brings:
        lo, hi -> s, z;  codes, two to a byte   a group stays within a warp
        TMA stores them

Every quotient is float32's, correctly rounded, and ties go to the even number: there is one right
answer, which is parity.formats.int4_quantize's. Mosaic's division is two units off, so that what is
divided is multiplied by the reciprocal as the sum of two float32, the first of 12 bits: the product
with the first is exact, the sum within 2^-34 of the quotient, and next to a tie there is nothing.

Zero points leave the kernel one to a byte; XLA puts two together, a 256th of the bytes.

Twin: triton_kernels/int4_matmul_quantize.py.

Sources: the range that always holds 0, so that 0 has a code of its own, is Jacob et al.'s
(arXiv:1712.05877); one byte for two codes, the first one low, is how GPTQ's words lie in memory; a
sum of two floats for a number is Dekker's double length (Numerische Mathematik 18, 1971).
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
from jax.extend.mlir.dialects import vector
from jaxlib.mlir.dialects import llvm

from . import _lib

ELEMENTS = 8192  # of a block of threads: 128 bytes for each


def _leading_bits(x: Any) -> Any:
    """x cut off after the first 12 bits of its significand."""
    bits = lax.bitcast_convert_type(x, jnp.int32) & -4096
    return lax.bitcast_convert_type(bits, jnp.float32)


def _share(span: Any, steps: int) -> Any:
    """span / steps in float32, correctly rounded; steps is 7 or 15.

    Below float32's normal numbers the quotient has the bits of a whole number: span in their unit.
    """
    first = np.float32(np.floor(2**15 / steps) / 2**15)
    rest = np.float32(1 / steps - float(first))
    high = _leading_bits(span)
    share = high * first + ((span - high) * first + span * rest)
    bits = lax.bitcast_convert_type(span, jnp.int32)
    exponent = jnp.minimum(bits >> 23, 5)
    units = (bits & 0x7FFFFF) | jnp.where(exponent == 0, 0, 1 << 23)
    units = lax.div((units << jnp.maximum(exponent - 1, 0)) + steps // 2, jnp.int32(steps))
    share = jnp.where(bits >> 23 < 5, lax.bitcast_convert_type(units, jnp.float32), share)
    return jnp.where(bits >= 0x7F800000, span, share)  # infinity less infinity would be NaN


def _factors(scale: Any) -> tuple[Any, Any, Any]:
    """What x is multiplied by: a power of two, and both parts of 1 / (scale * power)."""
    bits = lax.bitcast_convert_type(scale, jnp.int32)
    # By a power of two, so that neither reciprocals nor their rests leave float32's range.
    power = lax.bitcast_convert_type((254 << 23) - (bits & 0x7F800000), jnp.float32)
    divisor = scale * power
    reciprocal = _leading_bits(1.0 / divisor)
    first = _leading_bits(divisor)
    rest = 1.0 - reciprocal * first - reciprocal * (divisor - first)  # all of it exact
    return power, reciprocal, rest / divisor


def _quotient(x: Any, factors: tuple[Any, Any, Any]) -> Any:
    power, reciprocal, rest = factors
    scaled = x * power
    return scaled * reciprocal + scaled * rest


def _rounded(x: Any) -> Any:
    """rint(x), in the low bits of what it returns: adding 1.5 * 2^23 rounds to a whole number."""
    return lax.bitcast_convert_type(x + 12582912.0, jnp.int32)


def _halves(group: int, dtype: Any) -> Any:
    """The layout of packed codes [groups, group / 2]: four bytes where _lib.piece_tile has eight
    elements."""
    runs, _ = _lib.piece_tile(group, dtype)
    tiles, warps, lanes = ((runs, group // 2), (runs // 4, group // 2), (4,)), (-5,), (-3, -2)
    if runs == 4:
        tiles, warps, lanes = ((runs, group // 2), (4,)), (-3,), (-2,)
    return plgpu.Layout.TILED(plgpu.Tiling(tiles), warp_dims=warps, lane_dims=lanes, vector_dim=-1)


def _pairs(code: jax.Array, layout: Any, halves: Any) -> jax.Array:
    """int8 codes [groups, group] -> uint8 [groups, group / 2], the first of two in the low bits.

    By hand: Mosaic has no way to bring neighbours of one thread together.
    """
    shape = (code.shape[0], code.shape[1] // 2)

    def pack(_: Any, x: Any) -> Any:
        word, byte = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(8)
        registers = np.empty_like(x.registers)
        for at, eight in np.ndenumerate(x.registers):
            words = vector.bitcast(ir.VectorType.get((2,), word), eight)
            both = [vector.extract(words, [], [i]) for i in range(2)]
            ptx = """{
                .reg .b32 a, b;
                shr.u32 a, $1, 4;
                or.b32 a, a, $1;
                shr.u32 b, $2, 4;
                or.b32 b, b, $2;
                prmt.b32 $0, a, b, 0x6420;
            }"""
            four = llvm.inline_asm(word, both, ptx, "=r,r,r")
            four = vector.broadcast(ir.VectorType.get((1,), word), four)
            registers[at] = vector.bitcast(ir.VectorType.get((4,), byte), four)
        return mgpu.FragmentedArray(
            _registers=registers, _layout=halves.to_mgpu(), _is_signed=False
        )

    def in_jax(code: jax.Array) -> jax.Array:
        return (code[:, 0::2] | code[:, 1::2] << 4).astype(jnp.uint8)

    pack.in_jax = in_jax  # what an interpreter does in its place
    like = plgpu.ShapeDtypeStruct(shape, jnp.uint8, layout=halves)
    return plgpu.inline_mgpu(arg_types=(layout,), return_type=like)(pack)(code)


def _int4_quantize_kernel(*refs: Any, group: int, symmetric: bool) -> None:
    given = iter(refs)
    w_gmem = next(given)  # [N, groups, group]
    packed_gmem = next(given)  # [N, groups, group / 2] uint8
    scale_gmem = next(given)  # [N, room for groups]
    zero_gmem = None if symmetric else next(given)  # [N, room for groups] uint8
    w_smem = next(given)  # [groups of a block, group]
    packed_smem = next(given)  # [groups of a block, group / 2]
    full = next(given)  # barrier: TMA has filled it
    runs, layout = _lib.piece_tile(group, w_smem.dtype)
    halves = _halves(group, w_smem.dtype)

    # --- 1. which tile
    n, start = lax.axis_index("n"), lax.axis_index("part") * w_smem.shape[0]
    # Beyond the last group TMA loads zeros.
    plgpu.copy_gmem_to_smem(w_gmem.at[n, pl.ds(start, w_smem.shape[0])], w_smem, full)
    plgpu.barrier_wait(full)

    def along(values: Any) -> Any:
        return plgpu.layout_cast(lax.broadcast_in_dim(values, (runs, group), [0]), layout)

    # --- 2. main loop
    for i in range(w_smem.shape[0] // runs):
        own = pl.ds(i * runs, runs)
        w = plgpu.load(w_smem.at[own], layout=layout).astype(jnp.float32)
        if symmetric:
            span = jnp.abs(w).max(axis=1)
        else:
            down = jnp.maximum((-w).max(axis=1), 0.0)
            span = jnp.maximum(w.max(axis=1), 0.0) + down

        # --- 3. epilogue
        scale = _share(span, 7 if symmetric else 15).astype(scale_gmem.dtype)
        wide = scale.astype(jnp.float32)
        scale, wide = (jnp.where(wide == 0.0, jnp.ones_like(s), s) for s in (scale, wide))
        factors = _factors(wide)
        # Of what is not finite no codes are left but the zero point.
        known = lax.bitcast_convert_type(wide, jnp.int32) & 0x7F800000
        keep = jnp.where(known == 0x7F800000, 0, 15)
        if symmetric:
            zero = (keep & 0) + 8
        else:
            zero = _rounded(jnp.minimum(_quotient(down, factors), 15.0)) & keep
        offset, fill = zero.astype(jnp.float32), jnp.where(keep == 0, zero, 0)
        inside = jnp.maximum(_quotient(w, tuple(map(along, factors))), along(-offset))
        inside = jnp.minimum(inside, along(15.0 - offset))
        code = ((_rounded(inside) + along(zero)) & along(keep)) | along(fill)

        # --- 4. store
        packed_smem[own] = _pairs(code.astype(jnp.int8), layout, halves)
        at = pl.ds(start + i * runs, runs)
        scale_gmem[n, at] = scale
        if zero_gmem is not None:
            zero_gmem[n, at] = zero.astype(jnp.uint8)
    plgpu.commit_smem()
    _lib.store_row_chunk(packed_smem, packed_gmem, n, start)
    plgpu.wait_smem_to_gmem(0)


def quantized(w: jax.Array, group: int, symmetric: bool) -> list[jax.Array]:
    """[w_packed, w_scale], and w_zero unless symmetric."""
    (N, K), dtype = w.shape, w.dtype
    groups = K // group
    if w.size == 0:
        found = [jnp.zeros((N, K // 2), jnp.uint8), jnp.zeros((N, groups), dtype)]
        return found + ([] if symmetric else [jnp.zeros((N, 0), jnp.uint8)])
    runs, _ = _lib.piece_tile(group, dtype)
    of_block = min(ELEMENTS // group, _lib.cdiv(groups, runs) * runs)
    parts = _lib.cdiv(groups, of_block)
    room = (N, parts * of_block)
    packed, scale, *zero = plgpu.kernel(
        functools.partial(_int4_quantize_kernel, group=group, symmetric=symmetric),
        out_type=[
            jax.ShapeDtypeStruct((N, groups, group // 2), jnp.uint8),
            jax.ShapeDtypeStruct(room, dtype),
            *([] if symmetric else [jax.ShapeDtypeStruct(room, jnp.uint8)]),
        ],
        scratch_types=[
            plgpu.SMEM((of_block, group), dtype),
            plgpu.SMEM((of_block, group // 2), jnp.uint8),
            plgpu.Barrier(),
        ],
        grid=(N, parts),
        grid_names=("n", "part"),
        compiler_params=_lib.ROW_PARAMS,
        kernel_name="int4_quantize_kernel",
    )(w.reshape(N, groups, group))
    found = [packed.reshape(N, K // 2), scale[:, :groups]]
    if not symmetric:
        fill = ((0, 0), (0, -groups % 8))
        words = jnp.pad(zero[0][:, :groups], fill, constant_values=8).reshape(N, -1, 2)
        found.append(words[:, :, 0] | words[:, :, 1] << 4)
    return list(_lib.vary_alike(*found, w)[:-1])
