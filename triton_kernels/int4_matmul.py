"""Product with four-bit weights: W goes from memory to registers as it is stored.

    y[m, n] = sum_k x[m, k] * W[n, k] + bias[n]
    W[n, k] = (q[n, k] - z[n, k // G]) * s[n, k // G]

    for each tile of y, transposed, and each slice of K (`split_k` of them):
        for each 256 of K: the tile's 128 bytes a row, as 64 words of 16 bits
            for each nibble i of the words: a plane, W's columns 64 i .. 64 i + 63
                codes = plane - zero                          in registers, exact
                up to 16 tokens:
                    group_sum += codes @ x_tile^T             accumulated in float32
                    after a group: acc += group_sum * scale
                more:
                    acc += (codes * scale) @ x_tile^T         weights rounded to x's dtype
        store round(acc + bias), or the slice's sums
    with slices, a second kernel adds them in their order

W is on the left: its operand comes from registers, and there are few tokens where this kernel
matters. A plane needs no conversion: 128 + q in bfloat16 (1024 + q in float16) has a constant's
bits with q's or-ed in, two at once with one instruction; zero is such a number too, and the
difference is exact.

The order of the nibbles is such that a word's two neighbours, which a thread holds in one register,
are neighbours in every plane: int4_prepack brings weights into it, once. So words go through shared
memory as they are, 16 rows of 16 words in one ldmatrix, and a tensor core's operand is unpacked
where it is used. Triton sees to that as long as everything from tl.load to tl.dot is elementwise
and in the loop, which is why W does not come by TMA, nor a scale that weights are multiplied by
from the step before.

Instructions for 8 weights: 3 shifts, 4 and-or, 4 subtractions, and 4 multiplications if weights are
scaled: 1.4 or 1.9 for each. Compiled, with loads and products: 2.4 for one token, 2.7 for 16, 3.3
for 64. All of W [28672, 8192] then takes an H200 18 to 25 us of issue slots, and its bytes 28 us.

Up to 16 tokens: a batch of products of 16 rows each, which Triton gives to mma.sync, a warp each.
Wgmma would have all warps of a group wait for its result before they unpack into its registers.

Backward: W is written out, rounded to x's dtype, and dx = dy @ W is triton_kernels/matmul.py's.

Limits: from Ampere up; bfloat16 and float16; groups of 32, 64, 128 or 256.

Twin: pallas_kernels/int4_matmul.py.

Sources: the constant with the code or-ed in is FasterTransformer's and Marlin's way to make floats
of four bits; the float16 one is older. Split K with partial sums follows PyTorch's W4A16 kernels.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _lib
from .int4_matmul_prepack import ordered
from .int4_matmul_quantize import quantized
from .matmul import matmul_fwd

DTYPES = (torch.bfloat16, torch.float16)
GROUPS = (32, 64, 128, 256)
BLOCK_K = 256  # of K: what 128 bytes of a row hold
PLANE = 64  # of K: what one nibble of its words holds
ZERO = tl.constexpr(8)  # of symmetric weights


@dataclass(frozen=True)
class Config:
    """Tile sizes and resources of the kernel; the result does not depend on them.

    block_m, block_n: tokens and rows of W of a program's tile. Powers of two, at least 8 and 16.
    stages: steps of 256 of K, or of 128, whose operands are in flight or in use.
    group_m: tiles along m that are visited before the next tile along n.
    warps: warps of a program.
    """

    block_m: int = 16
    block_n: int = 64
    stages: int = 3
    group_m: int = 8
    warps: int = 4

    def __post_init__(self) -> None:
        for name, least in (("block_m", 8), ("block_n", 16)):
            size = getattr(self, name)
            if size < least or size & (size - 1):
                raise ValueError(f"{name}: expected a power of two >= {least}, got {size}")


# Up to so many tokens are multiplied by mma.sync: no warp waits for others, and a group's sums are
# scaled in place of its weights. Wgmma, which wants whole warpgroups, multiplies more by weights.
FEW_M = 16


def default_config(M: int, N: int, K: int, dtype: torch.dtype) -> Config:
    """The Config for a product of these sizes on a Hopper with 132 multiprocessors."""
    del dtype
    # One token is little beside W: small tiles fill the last wave. Every tile of rows reads all
    # tokens from L2: tall tiles where these are more.
    if M <= 2:
        return Config(block_m=8, block_n=32, stages=4, warps=2)
    if M <= FEW_M:
        rows = 128 if _lib.cdiv(N, 128) * default_split(M, N, K) >= 200 else 64
        return Config(block_m=8 if M <= 8 else 16, block_n=rows, stages=4, warps=rows // 16)
    if M <= 64:
        return Config(block_m=32 if M <= 32 else 64, block_n=256, stages=4, warps=16)
    # Two programs to a multiprocessor: one unpacks while the other waits for its products.
    return Config(block_m=128, block_n=128, stages=3, warps=8)


def default_split(M: int, N: int, K: int) -> int:
    """Slices of K: as few as occupy a Hopper with 132 multiprocessors.

    More would be written and read again for nothing. Sums of the slices round differently, so that
    this depends on the sizes alone, not on the Config.
    """
    # No slice of fewer than 4 blocks, which would be all prologue.
    least = 4
    if M <= FEW_M:
        tiles, enough = _lib.cdiv(N, 16), 1600  # warps, twelve to a multiprocessor
        # A row's sums, 8 M bytes written and read, at most an eighth of its 128 bytes a block.
        least = max(least, M // 2)
    else:
        tiles, enough = _lib.cdiv(N, 256) * _lib.cdiv(M, 128), 106  # programs of 16 warps
    return max(1, min(_lib.cdiv(enough, tiles), _lib.cdiv(K, BLOCK_K) // least))


# More tokens than these, and it takes less time to write W out once and multiply by that: unpacking
# it again for every tile of tokens costs more than its 2 N K bytes, written and read.
DENSE_M = 1024

# Two words of 16 bits at once: nibble i of both, as floats, less zero, by an fma: bfloat16 has one
# from Ampere on, a subtraction from Hopper on.
_CODES = """{{
    .reg .b32 w, minus_one;
    mov.b32 minus_one, {minus_one};
    shr.u32 w, $1, {shift};
    lop3.b32 w, w, 0x000F000F, {magic}, 0xEA;
    fma.rn.{kind}x2 $0, $2, minus_one, w;
}}"""
# Times scale: an fma whose addend is -0.
_SCALED = """{{
    .reg .b32 nothing;
    mov.b32 nothing, 0x80008000;
    fma.rn.{kind}x2 $0, $1, $2, nothing;
}}"""
_BF16 = {"kind": "bf16", "magic": "0x43004300", "minus_one": "0xBF80BF80"}
_F16 = {"kind": "f16", "magic": "0x64006400", "minus_one": "0xBC00BC00"}
_PTX = {
    f"{d['kind']}_{i}": _CODES.format(shift=4 * i, **d) for d in (_BF16, _F16) for i in range(4)
}
BF16_0, BF16_1, BF16_2, BF16_3, F16_0, F16_1, F16_2, F16_3 = map(tl.constexpr, _PTX.values())
BF16_SCALED, F16_SCALED = (tl.constexpr(_SCALED.format(**d)) for d in (_BF16, _F16))
BF16_MAGIC, F16_MAGIC = tl.constexpr(0x4300), tl.constexpr(0x6400)  # 128 and 1024
INTERPRETING = tl.constexpr(_lib.INTERPRETING)


@triton.jit
def _codes(words, zero, i: tl.constexpr):
    """Plane i of words [rows, columns] int16 less zero [rows], in zero's dtype: exact."""
    bf16: tl.constexpr = zero.dtype == tl.bfloat16
    zero = tl.broadcast_to(zero[:, None], words.shape)
    if INTERPRETING:  # which cannot run PTX
        q = ((words >> (4 * i)) & 15) | (BF16_MAGIC if bf16 else F16_MAGIC)
        codes = q.to(tl.int16).to(zero.dtype, bitcast=True) - zero
    else:
        if i == 0:
            ptx: tl.constexpr = BF16_0 if bf16 else F16_0
        elif i == 1:
            ptx: tl.constexpr = BF16_1 if bf16 else F16_1
        elif i == 2:
            ptx: tl.constexpr = BF16_2 if bf16 else F16_2
        else:
            ptx: tl.constexpr = BF16_3 if bf16 else F16_3
        codes = tl.inline_asm_elementwise(
            ptx, "=r,r,r", [words, zero], dtype=zero.dtype, is_pure=True, pack=2
        )
    return codes


@triton.jit
def _scaled(codes, scale):
    """codes [rows, columns] times scale [rows]: weights, rounded to their dtype."""
    scale = tl.broadcast_to(scale[:, None], codes.shape)
    if INTERPRETING:
        weights = codes * scale
    else:
        ptx: tl.constexpr = BF16_SCALED if scale.dtype == tl.bfloat16 else F16_SCALED
        weights = tl.inline_asm_elementwise(
            ptx, "=r,r,r", [codes, scale], dtype=scale.dtype, is_pure=True, pack=2
        )
    return weights


@triton.jit
def _load_groups(ptr, block, c, rows, N, K, group: tl.constexpr, whole: tl.constexpr):
    """What [K / G, N] holds for rows, of the groups that planes' columns from c on lie in.

    A tuple of [rows]: one for each plane, or for as many planes as a group spans. Beyond N 0;
    beyond K, where x is zeros, the last group's.
    """
    values = ()
    for k in tl.static_range(0, 256, max(group, 64)):
        g = tl.minimum((block * 256 + k + c) // group, K // group - 1)
        at = ptr + g.to(tl.int64) * N + rows
        values += (tl.load(at) if whole else tl.load(at, mask=rows < N, other=0),)
    return values


@triton.jit
def _zeros(
    zero_ptr, block, c, rows, N, K,
    group: tl.constexpr, whole: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The zero points likewise, as a plane has them: 128 or 1024 more, in dtype."""
    magic: tl.constexpr = 128.0 if dtype == tl.bfloat16 else 1024.0
    zeros = ()
    if zero_ptr is None:
        for _ in tl.static_range(0, 256, max(group, 64)):
            zeros += (tl.full(rows.shape, ZERO + magic, dtype),)
    else:
        codes = _load_groups(zero_ptr, block, c, rows, N, K, group, whole)
        for i in tl.static_range(256 // max(group, 64)):
            zeros += ((codes[i].to(tl.float32) + magic).to(dtype),)
    return zeros


@triton.jit
def _expect_scales(scale_ptr, block, n, N, K, group: tl.constexpr, block_n: tl.constexpr):
    """Has L2 fetch a block's scales, which are used as soon as they are loaded."""
    if not INTERPRETING:
        rows = tl.minimum(n + tl.arange(0, max(1, block_n // 64)) * 64, N - 1)  # 128 bytes each
        for k in tl.static_range(0, 256, group):
            g = tl.minimum((block * 256 + k) // group, K // group - 1)
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l",
                [(scale_ptr + g.to(tl.int64) * N + rows).to(tl.int64)],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip


@triton.jit
def _load_words(w_ptr, block, c, rows, N, width: tl.constexpr, whole: tl.constexpr):
    """[rows, width] of the words of one block of K, from column c on."""
    at = (block * N + rows[:, None]).to(tl.int64) * 64 + (c + tl.arange(0, width))[None, :]
    return tl.load(w_ptr + at) if whole else tl.load(w_ptr + at, mask=rows[:, None] < N, other=0)


@triton.jit
def _load_x(
    x_ptr, m, k, M, K, stride_xm, stride_xk,
    block_m: tl.constexpr, width: tl.constexpr, whole: tl.constexpr,
):  # fmt: skip
    """x[m : m + block_m, k : k + width], zeros beyond the edges."""
    r, c = m + tl.arange(0, block_m), k + tl.arange(0, width)
    mask = r[:, None] < M
    if not whole:
        mask = mask & (c[None, :] < K)
    at = r.to(tl.int64)[:, None] * stride_xm + c.to(tl.int64)[None, :] * stride_xk
    return tl.load(x_ptr + at, mask=mask, other=0.0)


@triton.jit
def _int4_matmul_kernel(
    x_ptr,  # [M, K]
    w_ptr,  # [blocks of K, N, 64] int16
    scale_ptr,  # [K / G, N]
    zero_ptr,  # [K / G, N] or None
    bias_ptr,  # [N] or None
    out_ptr,  # y [M, N], or the slices' sums [split_k, M, N], or one sum that all add to
    M, N, K, stride_xm, stride_xk,
    group: tl.constexpr, split_k: tl.constexpr, atomic: tl.constexpr,
    few: tl.constexpr,  # tokens, multiplied in
    batch: tl.constexpr,  # products side by side
    width: tl.constexpr,  # columns of a block of K that a step reads: 4 * width of K
    whole: tl.constexpr,  # N and K are whole tiles
    block_m: tl.constexpr, block_n: tl.constexpr, group_m: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    # Neighbours share weights or tokens: group_m tiles of tokens, then the next rows of W.
    num_m, num_n = tl.cdiv(M, block_m), tl.cdiv(N, block_n)
    panel = group_m * num_n
    first = tl.program_id(0) // panel * group_m
    height = min(num_m - first, group_m)
    m = (first + tl.program_id(0) % panel % height) * block_m
    n = tl.program_id(0) % panel // height * block_n
    rows = n + tl.arange(0, block_n)
    pieces: tl.constexpr = 64 // width
    blocks = tl.cdiv(K, 256)
    part = tl.program_id(1)
    start, stop = blocks * part // split_k * pieces, blocks * (part + 1) // split_k * pieces

    # --- 2. main loop
    dtype: tl.constexpr = scale_ptr.dtype.element_ty
    span: tl.constexpr = max(group, 64)  # of K that a scale is good for in a step
    if few:
        acc = tl.zeros((batch, block_n // batch, block_m), tl.float32)
        block, c = start // pieces, start % pieces * width
        scales = _load_groups(scale_ptr, block, c, rows, N, K, group, whole)
    else:
        acc = tl.zeros((block_n, block_m), tl.float32)
    for step in range(start, stop):
        block, c = step // pieces, step % pieces * width
        words = _load_words(w_ptr, block, c, rows, N, width, whole)
        zeros = _zeros(zero_ptr, block, c, rows, N, K, group, whole, dtype)
        if few:  # the scales of the next step, which have until then to arrive
            after, c_after = (step + 1) // pieces, (step + 1) % pieces * width
            next_scales = _load_groups(scale_ptr, after, c_after, rows, N, K, group, whole)
            group_sum = tl.zeros_like(acc)
        else:
            scales = _load_groups(scale_ptr, block, c, rows, N, K, group, whole)
            _expect_scales(scale_ptr, block + 2, n, N, K, group, block_n)
        for k in tl.static_range(0, 256, 64):
            x_tile = _load_x(
                x_ptr, m, block * 256 + k + c, M, K, stride_xm, stride_xk, block_m, width, whole
            )
            codes = _codes(words, zeros[k // span], k // 64)
            if few:
                codes = codes.reshape(batch, block_n // batch, width)
                x_tiles = tl.broadcast_to(x_tile.T[None, :, :], (batch, width, block_m))
                group_sum = tl.dot(codes, x_tiles, group_sum)
                if (k + 64) % span == 0:
                    scale = scales[k // span].to(tl.float32)
                    acc += group_sum * scale.reshape(batch, block_n // batch, 1)
                    group_sum = tl.zeros_like(acc)
            else:
                acc = tl.dot(_scaled(codes, scales[k // span]), x_tile.T, acc)
        if few:
            scales = next_scales
        else:
            acc = _waited(acc)

    # --- 3. epilogue
    tile = acc.reshape(block_n, block_m).T
    if bias_ptr is not None:
        tile += tl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)[None, :]

    # --- 4. store
    r = m + tl.arange(0, block_m)
    mask = (r[:, None] < M) & (rows[None, :] < N)
    if atomic:
        at = r.to(tl.int64)[:, None] * N + rows[None, :]
        tl.atomic_add(out_ptr + at, tile, mask=mask, sem="relaxed")
    else:
        at = (part * M + r).to(tl.int64)[:, None] * N + rows[None, :]
        tl.store(out_ptr + at, tile.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _waited(acc):
    """acc, once the tensor cores are done with it.

    Left running into the next step, a product reads weights from registers which that step is about
    to write, and ptxas puts all products one after the other (C7513). Whoever reads acc waits.
    """
    if not INTERPRETING:
        acc = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=f,f", [acc], dtype=tl.float32, is_pure=True, pack=1
        )
    return acc


@triton.jit
def _int4_reduce_kernel(
    parts_ptr,  # [split_k, M, N] float32
    bias_ptr,  # [N] or None
    y_ptr,  # [M, N]
    M, N,
    split_k: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    mask = at < M * N

    # --- 2. main loop
    acc = tl.zeros((block,), tl.float32)
    for part in tl.static_range(split_k):  # in this order, whoever was done first
        acc += tl.load(parts_ptr + part * M * N + at, mask=mask, other=0.0)

    # --- 3. epilogue
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + at % N, mask=mask, other=0.0).to(tl.float32)

    # --- 4. store
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _int4_dequantize_kernel(
    w_ptr,  # [blocks of K, N, 64] int16
    scale_ptr,  # [K / G, N]
    zero_ptr,  # [K / G, N] or None
    out_ptr,  # [N, K]
    N, K,
    group: tl.constexpr, block_n: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    width: tl.constexpr = min(group, 64)
    span: tl.constexpr = max(group, 64)
    n, block, c = tl.program_id(1) * block_n, tl.program_id(0), tl.program_id(2) * width
    rows = n + tl.arange(0, block_n)
    words = _load_words(w_ptr, block, c, rows, N, width, False)
    scales = _load_groups(scale_ptr, block, c, rows, N, K, group, False)
    zeros = _zeros(zero_ptr, block, c, rows, N, K, group, False, out_ptr.dtype.element_ty)

    # --- 2. main loop
    for i in tl.static_range(4):
        # --- 3. epilogue
        weights = _scaled(_codes(words, zeros[i * 64 // span], i), scales[i * 64 // span])

        # --- 4. store
        k = block * 256 + i * 64 + c + tl.arange(0, width)
        at = rows.to(tl.int64)[:, None] * K + k[None, :]
        tl.store(out_ptr + at, weights, mask=(rows[:, None] < N) & (k[None, :] < K))


def int4_quantize(
    w: Tensor, *, group: int = 128, symmetric: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weights in four bits, in the order of files; one launch and one read of w, no gradient.

    w: [N, K], bfloat16 or float16.
    group: 32, 64, 128 or 256 neighbours along K share a scale and a zero point.
    symmetric: scale = max |w| / 7 and 8 as zero point. Otherwise the range from lo = min(w, 0) to
        hi = max(w, 0) is covered: scale = (hi - lo) / 15, zero = clip(rint(-lo / scale), 0, 15).

    Returns (w_packed [N, K / 2] uint8, w_scale [N, K / group] in w's dtype, w_zero [N, 4 *
    ceil(K / group / 8)] uint8, or None if symmetric): what int4_prepack takes.

    All zeros, or a scale too small for its dtype: scale 1. A NaN, an infinity or a range too large:
    the scale is NaN or infinity and every code the zero point (8, or 0 where not symmetric).

    Raises TypeError for dtypes and ValueError for shapes and devices that do not fit, another
    group or one that does not divide K, naming the argument; NotImplementedError on a GPU older
    than Ampere.
    """
    _lib.check_tensor("w", w, ("N", "K"), DTYPES)
    _check_group(group, w.shape[1])
    _lib.check_static("symmetric", symmetric, (bool,))
    packed, scale, *zero = quantized(w, group, symmetric)
    return packed, scale, None if symmetric else zero[0]


def int4_prepack(
    w_packed: Tensor, w_scale: Tensor, w_zero: Tensor | None = None, *, group: int = 128
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weights in the order in which the kernels read them; done once, in one launch.

    w_packed: [N, K / 2] uint8, k = 2j in the low nibble of byte j. w_scale: [N, K / group].
    w_zero: [N, 4 * ceil(K / group / 8)] uint8, packed likewise, or None.

    Returns ([ceil(K / 256), N, 64] int16: nibble i of word c of a row's block b is k = 256 b + 64 i
    + c, and 8 beyond K; [K / group, N]; [K / group, N] uint8, one to a byte, or None). Nothing is
    lost: the same codes in another order.

    Raises as int4_matmul does.
    """
    if _check_weights(w_packed, w_scale, w_zero, group, None)[2]:
        raise ValueError("w_packed: expected shape [N, K / 2], got weights that are prepacked")
    _lib.check_same_device(w_packed=w_packed, w_scale=w_scale, w_zero=w_zero)
    words, scale, *zero = ordered(w_packed, w_scale, w_zero, group)
    return words, scale, zero[0] if zero else None


def _prepacked(
    w_packed: Tensor, w_scale: Tensor, w_zero: Tensor | None, group: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The kernels' arrays: as they are if they have been prepacked, else made now."""
    if w_packed.ndim == 2:
        return int4_prepack(w_packed, w_scale, w_zero, group=group)
    zero = None if w_zero is None else w_zero.contiguous()
    return w_packed.contiguous(), w_scale.contiguous(), zero


def _fake_product(x, w_packed, w_scale, w_zero, bias, group, split_k, atomic, config):
    return x.new_empty((x.shape[0], w_scale.shape[1]))


@_lib.opaque("int4_matmul", _fake_product)
def _product(
    x: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    w_zero: Tensor | None,
    bias: Tensor | None,
    group: int,
    split_k: int,
    atomic: bool,
    config: list[int] | None,
) -> Tensor:
    """x @ W^T + bias; the weights are prepacked, and split_k is 0 for "auto"."""
    (M, K), N = x.shape, w_scale.shape[1]
    y = x.new_empty((M, N))
    if 0 in (M, N):
        return y
    if K == 0:
        return y.zero_() if bias is None else y.copy_(bias.expand(M, N))
    bias = None if bias is None else bias.contiguous()
    if M > DENSE_M and bias is None and not split_k and not config:
        return matmul_fwd(x, _dequantized(w_packed, w_scale, w_zero, group).t())[0]
    with _lib.on_device(x):
        _lib.check_gpu()
        few = M <= FEW_M
        tiles = Config(*config) if config else default_config(M, N, K, x.dtype)
        if not (few or config or _lib.has_tma()):  # older than Hopper: Ada has 99 KB of memory
            tiles = Config(block_m=32, block_n=64, stages=3)
        split_k = split_k or default_split(M, N, K)
        block_m, block_n = tiles.block_m, tiles.block_n
        # Of a plane, what has one scale; with large tiles of x half as much, to hold more steps.
        width = min(group, PLANE if block_m <= 64 else 32)
        whole = N % block_n == 0 and K % BLOCK_K == 0
        atomic = atomic and split_k > 1
        parts = y
        if atomic:
            parts = x.new_zeros((1, M, N), dtype=torch.float32)
        elif split_k > 1:
            parts = x.new_empty((split_k, M, N), dtype=torch.float32)
        grid = _lib.cdiv(M, block_m) * _lib.cdiv(N, block_n), split_k
        _int4_matmul_kernel[grid](
            x, w_packed, w_scale, w_zero, bias if split_k == 1 else None, parts,
            M, N, K, *x.stride(), group, split_k, atomic,
            few, min(tiles.warps, block_n // 16), width, whole,
            block_m, block_n, tiles.group_m,
            num_warps=tiles.warps, num_stages=tiles.stages, maxnreg=_lib.registers(tiles.warps),
        )  # fmt: skip
        if split_k > 1:
            grid = (_lib.cdiv(M * N, 1024),)
            _int4_reduce_kernel[grid](parts, bias, y, M, N, len(parts), 1024)
    return y


def _fake_dequantized(w_packed, w_scale, w_zero, group):
    return w_scale.new_empty((w_scale.shape[1], w_scale.shape[0] * group))


@_lib.opaque("int4_dequantize", _fake_dequantized)
def _dequantized(w_packed: Tensor, w_scale: Tensor, w_zero: Tensor | None, group: int) -> Tensor:
    """W [N, K] in the scales' dtype; the weights are prepacked."""
    w = _fake_dequantized(w_packed, w_scale, w_zero, group)
    if w.numel():
        N, K = w.shape
        with _lib.on_device(w):
            _lib.check_gpu()
            grid = _lib.cdiv(K, BLOCK_K), _lib.cdiv(N, 64), _lib.cdiv(PLANE, group)
            _int4_dequantize_kernel[grid](
                w_packed, w_scale, w_zero, w, N, K, group, 64, num_warps=4
            )
    return w


def int4_matmul_fwd(
    x: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    w_zero: Tensor | None = None,
    *,
    group: int = 128,
    split_k: int | str = "auto",
    bias: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor | None]]:
    """int4_matmul and what its backward needs: (y, (w_packed, w_scale, w_zero)), prepacked.

    No gradient flows through this.
    """
    return _forward(x, w_packed, w_scale, w_zero, group, split_k, bias, config, False)


def _forward(x, w_packed, w_scale, w_zero, group, split_k, bias, config, atomic):
    _check(x, w_packed, w_scale, w_zero, group, split_k, bias, config)
    res = _prepacked(w_packed, w_scale, w_zero, group)
    slices = 0 if isinstance(split_k, str) else split_k
    return _product(x, *res, bias, group, slices, atomic, _lib.fields(config)), res


def int4_matmul_bwd(
    res: tuple[Tensor, Tensor, Tensor | None],
    dy: Tensor,
    *,
    group: int = 128,
    config: Config | None = None,
) -> tuple[Tensor]:
    """The gradient (dx [M, K],) in x's dtype; the weights are frozen.

    res: of int4_matmul_fwd. dy [M, N]: the cotangent. config: unused, for the product is matmul's.
    """
    w_packed, w_scale, w_zero = res
    N, _, prepacked = _check_weights(w_packed, w_scale, w_zero, group, None)
    if not prepacked:
        raise ValueError(f"res: expected prepacked weights, got w_packed {list(w_packed.shape)}")
    _lib.check_tensor("dy", dy, ("M", N), (w_scale.dtype,))
    _lib.check_same_device(w_packed=w_packed, dy=dy)
    _lib.check_config(config, Config)
    return (matmul_fwd(dy, _dequantized(w_packed, w_scale, w_zero, group))[0],)


class _Int4Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_packed, w_scale, w_zero, group, split_k, bias, config, atomic):
        y, res = _forward(x, w_packed, w_scale, w_zero, group, split_k, bias, config, atomic)
        ctx.save_for_backward(*res)
        ctx.group = group
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (dx,) = int4_matmul_bwd(ctx.saved_tensors, dy, group=ctx.group)
        return dx, *[None] * 8


def int4_matmul(
    x: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    w_zero: Tensor | None = None,
    *,
    group: int = 128,
    split_k: int | str = "auto",
    bias: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """y [M, N] = x [M, K] @ W^T + bias, W [N, K] in four bits. Differentiable once, in x alone.

    x: bfloat16 or float16; any strides.
    w_packed, w_scale, w_zero: as int4_prepack returns them: [ceil(K / 256), N, 64] int16,
        [K / group, N] in x's dtype, [K / group, N] uint8 or None, which stands for 8 everywhere. Or
        as it takes them: [N, K / 2], [N, K / group], [N, 4 * ceil(K / group / 8)]; they are then
        prepacked in every call, which takes longer than the product.
    group: 32, 64, 128 or 256 neighbours along K share a scale and a zero point.
    split_k: K is summed in so many slices of whole blocks of 256, and these are added in order. The
        rounding of the sums depends on it. "auto" chooses by the sizes.
    bias: [N], x's dtype, or None.
    config: tiles of this call.

    Raises TypeError for dtypes and ValueError for shapes, groups, slices and devices that do not
    fit, naming the argument; NotImplementedError on a GPU older than Ampere. A NaN or an infinity
    among the scales makes NaN or infinity of what it belongs to.
    """
    return _Int4Matmul.apply(x, w_packed, w_scale, w_zero, group, split_k, bias, config, False)


def int4_matmul_atomic(
    x: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    w_zero: Tensor | None = None,
    *,
    group: int = 128,
    split_k: int | str = "auto",
    bias: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """int4_matmul whose slices of K are added as they come: its last bits differ from run to run.

    Arguments, gradient and errors are int4_matmul's. One sum is zeroed, added to and read, where
    int4_matmul writes and reads split_k of them.
    """
    return _Int4Matmul.apply(x, w_packed, w_scale, w_zero, group, split_k, bias, config, True)


def _check(x, w_packed, w_scale, w_zero, group, split_k, bias, config) -> None:
    if isinstance(x, Tensor) and x.dtype is torch.float32:
        raise TypeError("x: expected dtype bfloat16 or float16, got float32")
    _lib.check_tensor("x", x, ("M", "K"), DTYPES)
    N, K, _ = _check_weights(w_packed, w_scale, w_zero, group, x)
    if bias is not None:
        _lib.check_tensor("bias", bias, (N,), (x.dtype,))
    _lib.check_same_device(x=x, w_packed=w_packed, w_scale=w_scale, w_zero=w_zero, bias=bias)
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
    w_packed: Tensor, w_scale: Tensor, w_zero: Tensor | None, group: int, x: Tensor | None
) -> tuple[int, int, bool]:
    """(N, K, whether they are prepacked)"""
    _check_group(group, 0)
    prepacked = isinstance(w_packed, Tensor) and w_packed.ndim == 3
    codes = (torch.int16 if prepacked else torch.uint8,)
    shape = ("ceil(K / 256)", "N", PLANE) if prepacked else ("N", "K / 2")
    _lib.check_tensor("w_packed", w_packed, shape, codes)
    N = w_packed.shape[1] if prepacked else w_packed.shape[0]
    dtypes = DTYPES if x is None else (x.dtype,)
    if x is not None:
        K = x.shape[1]
    elif prepacked:
        _lib.check_tensor("w_scale", w_scale, ("K / group", N), dtypes)
        K = w_scale.shape[0] * group
    else:
        K = w_packed.shape[1] * 2
    _check_group(group, K)
    groups = K // group
    packed = (_lib.cdiv(K, BLOCK_K), N, PLANE) if prepacked else (N, K // 2)
    _lib.check_tensor("w_packed", w_packed, packed, codes)
    _lib.check_tensor("w_scale", w_scale, (groups, N) if prepacked else (N, groups), dtypes)
    if w_zero is not None:
        shape = (groups, N) if prepacked else (N, 4 * _lib.cdiv(groups, 8))
        _lib.check_tensor("w_zero", w_zero, shape, (torch.uint8,))
    return N, K, prepacked
