"""Attention over packed sequences of causal text and of images that see all of themselves.

    o[q, h] = sum_j p[q, j] v[j, h / G]      over the j that q sees; G = Hq / Hk heads share k and v
    p[q, j] = exp(x[q, j] - lse[h, q])       lse[h, q] = log sum_j exp(x[q, j])
    x[q, j] = scale * q[q, h] . k[j, h / G], soft-capped if asked, less slope[h] |pos[q] - pos[j]|

    for each tile of queries and head of this program, the longest first:
        for the next 32 tiles of keys in its interval: which can be skipped, which need a mask
            for each of the others:
                x = q @ k^T; mask it if it needs one
                acc += p @ v of the tile before, while this one goes through
                the online softmax
        o = acc / row_sum

Nothing of size T x T exists, and nothing is compiled or read by the host when lengths change: the
plan (hybrid_attention_plan.py) is made on the device, once for all layers. A tile may hold tokens
that see nothing, whose memory may be NaN: its v is zeroed, in a loop of its own.
Backward: hybrid_attention_bwd.py.

Limits: from Ampere up; bfloat16 and float16; head dims 64, 96, 128, 256. TMA wants Hopper and rows
that start at multiples of 16 bytes; inputs of other strides are copied.

Twin: pallas_kernels/hybrid_attention.py.

Sources: FlashAttention-2 (arXiv:2307.08691) for the loop, FlashAttention-3 (arXiv:2407.08608) for
p @ v one tile late; skipping and masking by tile is FlexAttention's (arXiv:2412.05496), bounds by
row in place of a mask MagiAttention's and FlashMask's (arXiv:2410.01359).
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _lib
from .hybrid_attention_bwd import backward
from .hybrid_attention_meta import HybridMeta, check
from .hybrid_attention_plan import ORDERED, TILE, HybridPlan, plan_of
from .hybrid_attention_tiles import (
    LANES,
    LOG2_E,
    STRIP,
    after,
    bounds,
    empty_lse,
    load_tile,
    lowest,
    operand,
    per_token,
    readable,
    scores,
    store_tile,
    visible,
    walk,
    zero_dead,
)

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 96, 128, 256)


@dataclass(frozen=True)
class Config:
    """Tile sizes and resources of the kernels; beyond the last bit the result ignores them.

    block_m: rows of the tile that a program keeps: queries, or keys for dk and dv. 64 or 128.
    block_n: rows of the tiles it walks over. 32, 64 or 128.
    stages: tiles of the walk that are in flight or in use.
    warps: warps of a program.
    """

    block_m: int = 64
    block_n: int = 64
    stages: int = 3
    warps: int = 4

    def __post_init__(self) -> None:
        for name, sizes in (("block_m", (64, 128)), ("block_n", (32, 64, 128))):
            size = getattr(self, name)
            if size not in sizes:
                raise ValueError(f"{name}: expected one of {sizes}, got {size}")


def default_config(
    T: int, Hq: int, Hk: int, D: int, dtype: torch.dtype, which: str = "fwd"
) -> Config:
    """The Config for T tokens on a Hopper; which: "fwd", "dq", "dkdv", or "atomic", the kernel of
    hybrid_attention_atomic that makes all gradients."""
    del T, Hq, Hk, dtype
    if which == "atomic":
        # dk and dv take 128 registers, x and dx 64, then dq 32. Twice the keys halve what is added.
        # One program a multiprocessor: nothing else runs while it waits for q and do, but a stage.
        return Config(64, 64, 1, 8) if D > 128 else Config(128, 64, 3, 8)
    if D > 128:
        # 64 rows and their float32 sums take 128 registers of each of 128 threads, two such sums
        # the same of each of 256.
        return Config(128, 64, 2, 8) if which == "fwd" else Config(64, 32, 2, 8)
    # Two programs of 64 rows on a multiprocessor: one multiplies while the other exponentiates.
    # More rows or fewer bytes in flight leave room for one; three would have 168 registers.
    if which == "fwd":
        return Config(64, 64, 3, 4)
    return Config(64, 64, 2, 4)  # do stays too, or v, where a third stage would be


@triton.jit
def _add_values(
    acc, p, shrink, v, n0, kv_start_ptr, kv_end_ptr, h, T, H, D,
    block_n: tl.constexpr, block_d: tl.constexpr, tma: tl.constexpr, dead: tl.constexpr,
):  # fmt: skip
    """acc * shrink + p @ v, of the tokens from n0 on."""
    v_tile = load_tile(v, h, n0, T, H, D, block_n, block_d, tma)
    if dead:
        v_tile = zero_dead(v_tile, kv_start_ptr, kv_end_ptr, n0 + tl.arange(0, block_n), T)
    return tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None])


@triton.jit
def _visit(
    acc, row_sum, row_max, p, shrink, n_before, q_tile, k, v, bits, masked, count, first,
    m, q_pos, slope,
    kv_start_ptr, kv_end_ptr, noise_id_ptr, token_pos_ptr,
    h, T, H, D, scale, softcap, unit,
    block_n: tl.constexpr, block_d: tl.constexpr, strips: tl.constexpr, tma: tl.constexpr,
    capped: tl.constexpr, biased: tl.constexpr, dead: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    """The `count` tiles of keys in `bits`, from tile `first` on, each in so many strips of block_n
    rows. dead: some of their tokens see nothing.

    p and shrink are those of the tile before, at n_before: p @ v is multiplied one tile late, so
    that the tensor cores work while x is exponentiated.
    """
    strip = 0
    for _ in tl.range(0, count * strips, num_stages=stages, disable_licm=True):
        lane = lowest(bits)
        n0 = ((first + lane) * strips + strip) * block_n
        partly = (masked & bits & -bits) != 0
        bits, strip = after(bits, strip, strips)
        j = n0 + tl.arange(0, block_n)
        k_tile = load_tile(k, h, n0, T, H, D, block_n, block_d, tma)
        s = tl.dot(q_tile, k_tile.T)  # [block_m, block_n]
        acc = _add_values(
            acc, p, shrink, v, n_before, kv_start_ptr, kv_end_ptr, h, T, H, D,
            block_n, block_d, tma, dead,
        )  # fmt: skip
        k_pos = j
        if biased:
            k_pos = tl.load(token_pos_ptr + j, mask=j < T, other=0)
        x, _ = scores(s, q_pos[:, None], k_pos[None, :], slope, scale, softcap, capped, biased)
        if partly:
            # Loaded each time, as registers are short.
            start, end, own = per_token(kv_start_ptr, kv_end_ptr, noise_id_ptr, m, T)
            noise = tl.load(noise_id_ptr + j, mask=j < T, other=-1)
            seen = visible(start[:, None], end[:, None], own[:, None], j[None, :], noise[None, :])
            x = tl.where(seen, x, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(x, 1))
        # A row may have seen nothing yet.
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(x * unit - (base * unit)[:, None])
        shrink = tl.exp2((row_max - base) * unit)
        row_sum = row_sum * shrink + tl.sum(p, 1)
        row_max, n_before = new_max, n0
    return acc, row_sum, row_max, p, shrink, n_before


@triton.jit
def _hybrid_attention_kernel(
    q,  # [T, Hq, D]: a TMA descriptor of tiles of a head, or a pointer
    k, v, k_strip, v_strip,  # [T, Hk, D]: tiles, and tiles of STRIP rows
    o,  # [T, Hq, D]
    lse_ptr,  # [Hq, T]
    alibi_ptr,  # [Hq] or None
    kv_start_ptr, kv_end_ptr, noise_id_ptr, token_pos_ptr, tiles_ptr, order_ptr,
    T, Hq, Hk, D, scale, softcap,
    block_m: tl.constexpr, block_n: tl.constexpr, block_d: tl.constexpr, stages: tl.constexpr,
    capped: tl.constexpr, tma: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    # All heads of a tile side by side, those that share keys next to each other: they are in L2.
    biased: tl.constexpr = alibi_ptr is not None
    halves: tl.constexpr = 128 // block_m
    wide: tl.constexpr = block_n if block_n > 64 else 64  # the plan knows no smaller tiles
    i, h = tl.program_id(0) // Hq, tl.program_id(0) % Hq
    mi = tl.load(order_ptr + i // halves) * halves + i % halves
    m = mi * block_m + tl.arange(0, block_m)
    mine = bounds(tiles_ptr, mi, T, block_m // 64)
    q_pos, slope = m, 0.0
    if biased:
        q_pos = tl.load(token_pos_ptr + m, mask=m < T, other=0)
        slope = tl.load(alibi_ptr + h)
    unit = 1.0
    if not (capped or biased):
        unit = scale * LOG2_E

    # --- 2. main loop
    q_tile = load_tile(q, h, mi * block_m, T, Hq, D, block_m, block_d, tma)
    acc = tl.zeros((block_m, block_d), tl.float32)
    row_sum = tl.zeros((block_m,), tl.float32)
    row_max = tl.full((block_m,), float("-inf"), tl.float32)
    begin, stop = tl.maximum(mine[0], 0) // wide, tl.cdiv(tl.minimum(mine[3], T), wide)
    dead_tiles = 0
    for dead in tl.static_range(2):
        if dead:  # apart, so that what this needs of registers is not held above
            stop = tl.where(dead_tiles > 0, stop, begin)
        p = tl.zeros((block_m, STRIP if dead else block_n), tl.float32)
        shrink = tl.full((block_m,), 1.0, tl.float32)
        n_before = T  # no tile: loads zeros
        for first in tl.range(begin, stop, LANES, num_stages=1):
            bits, masked, count, others = walk(
                tiles_ptr, mine, mi * block_m, first, stop, T, block_m, wide, False, dead
            )
            dead_tiles += others
            acc, row_sum, row_max, p, shrink, n_before = _visit(
                acc, row_sum, row_max, p, shrink, n_before,
                q_tile, k_strip if dead else k, v_strip if dead else v,
                bits, masked, count, first, m, q_pos, slope,
                kv_start_ptr, kv_end_ptr, noise_id_ptr, token_pos_ptr,
                h // (Hq // Hk), T, Hk, D, scale, softcap, unit,
                STRIP if dead else block_n, block_d, wide // (STRIP if dead else block_n), tma,
                capped, biased, dead, 1 if dead else stages,
            )  # fmt: skip
        acc = _add_values(
            acc, p, shrink, v_strip if dead else v, n_before, kv_start_ptr, kv_end_ptr,
            h // (Hq // Hk), T, Hk, D, STRIP if dead else block_n, block_d, tma, dead,
        )  # fmt: skip

    # --- 3. epilogue
    # A row that saw nothing has sum 0 and acc 0.
    some = tl.where(row_sum == 0.0, 1.0, row_sum)
    acc = acc / some[:, None]
    lse = (row_max * unit + tl.log2(some)) / LOG2_E
    lse = tl.where(row_sum == 0.0, float("-inf"), lse)

    # --- 4. store
    store_tile(o, acc, h, mi * block_m, T, Hq, D, block_m, block_d, tma)
    tl.store(lse_ptr + h.to(tl.int64) * T + m, lse, mask=m < T)


def _fake_forward(q, k, v, alibi, plan, scale, softcap, config):
    return [q.new_empty(q.shape), empty_lse(q)]


@_lib.opaque("hybrid_attention", _fake_forward)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi: Tensor | None,
    plan: list[Tensor],
    scale: float,
    softcap: float,
    config: list[int] | None,
) -> list[Tensor]:
    """[o, lse]; any strides."""
    (T, Hq, D), Hk = q.shape, k.shape[1]
    o, lse = _fake_forward(q, k, v, alibi, plan, scale, softcap, config)
    if 0 in (T, Hq):
        return [o, lse]
    q, k, v = map(readable, (q, k, v))
    kv_start, kv_end, noise_id, _, _, token_pos, tiles, q_order, _ = plan
    with _lib.on_device(q):
        _lib.check_gpu()
        tiling = Config(*config) if config else default_config(T, Hq, Hk, D, q.dtype)
        if config is None and D > 128 and softcap and alibi is not None:
            tiling = replace(tiling, block_n=32)  # tanh and distances take registers too
        block_m, block_n, block_d = tiling.block_m, tiling.block_n, _lib.power_of_2(D)
        _hybrid_attention_kernel[(len(q_order) * (ORDERED // block_m) * Hq,)](
            operand(q, block_m, block_d),
            *(operand(x, rows, block_d) for rows in (block_n, STRIP.value) for x in (k, v)),
            operand(o, block_m, block_d), lse, None if alibi is None else alibi.contiguous(),
            kv_start, kv_end, noise_id, token_pos, tiles, q_order,
            T, Hq, Hk, D, scale, softcap,
            block_m, block_n, block_d, tiling.stages, softcap > 0, _lib.has_tma(),
            num_warps=tiling.warps, num_stages=tiling.stages,
        )  # fmt: skip
    return [o, lse]


def hybrid_plan(
    meta: HybridMeta, *, tokens: int, window: int | None = None, config: Config | None = None
) -> HybridPlan:
    """What the kernels need to know of a batch of `tokens` tokens, from its segments.

    Made on the device in two launches, without a host read: once for all layers and heads.
    window: a token sees the last `window` tokens, itself among them; an image all of itself too.
    config: nothing of it matters here.

    Segments that no batch can have give a plan of no meaning, and reads stay inside all arrays:
    hybrid_attention_check says what is wrong with them.

    Raises TypeError for dtypes and ValueError for shapes, devices and a window below 1, naming the
    argument; NotImplementedError on a GPU older than Ampere.
    """
    _lib.check_config(config, Config)
    return plan_of(meta, tokens, window)


def hybrid_attention_check(meta: HybridMeta, tokens: int) -> None:
    """Raises ValueError if the arrays of meta hold what cannot be, and says what and where.

    Offsets that do not ascend from 0 to at most `tokens`, sequences that begin within a segment,
    modes there are not, PAD beside other segments. It copies the metadata and waits for the device.
    """
    check(meta, tokens)


def hybrid_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: HybridPlan,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi: Tensor | None = None,
    config: Config | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, ...]]:
    """hybrid_attention and what its backward needs. No gradient flows through this.

    Returns ((o, lse), (q, k, v, o, lse, alibi, *plan)), None for an alibi that was not given.
    """
    _check(q, k, v, plan, softcap, alibi, config)
    o, lse = _forward(
        q, k, v, alibi, list(plan), _scale(scale, q), float(softcap), _lib.fields(config)
    )
    return (o, lse), (q, k, v, o, lse, alibi, *plan)


def hybrid_attention_bwd(
    res: tuple[Tensor | None, ...],
    do: Tensor,
    dlse: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv), bit for bit the same each time. alibi has none.

    res: as hybrid_attention_fwd returns it. do [T, Hq, D]: the cotangent of o; dlse [Hq, T] that of
    lse, None for zeros. config: tiles of dq, and of dk and dv.
    """
    return _backward(res, do, dlse, scale, softcap, config, False)


def _backward(res, do, dlse, scale, softcap, config, atomic):
    q, k, v, _, lse, alibi, *plan = res
    _check(q, k, v, HybridPlan(*plan), softcap, alibi, config)
    _lib.check_tensor("do", do, tuple(q.shape), (q.dtype,))
    if dlse is not None:
        _lib.check_tensor("dlse", dlse, tuple(lse.shape), (torch.float32,))
    _lib.check_same_device(q=q, do=do, dlse=dlse)
    return _gradients(res, do, dlse, _scale(scale, q), softcap, config, atomic)


def _gradients(res, do, dlse, scale, softcap, config, atomic):
    q, k, v, o, lse, alibi, *plan = res
    kernels = ("atomic",) if atomic else ("dkdv", "dq")
    tilings = [config] * len(kernels)
    if config is None:
        (T, Hq, D), Hk = q.shape, k.shape[1]
        tilings = [default_config(T, Hq, Hk, D, q.dtype, which) for which in kernels]
        if softcap:  # dk and dv take 128 registers, x and dx 64, and tanh has to stay as well
            smaller = {"block_m": 64} if atomic else {"block_n": 32}
            tilings[0] = replace(tilings[0], **smaller)
    flat = [field for tiling in tilings for field in _lib.fields(tiling)]
    return tuple(backward(q, k, v, o, lse, alibi, plan, do, dlse, scale, float(softcap), flat))


class _HybridAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale, softcap, alibi, config, atomic, *plan):
        outputs, res = hybrid_attention_fwd(
            q, k, v, HybridPlan(*plan), scale=scale, softcap=softcap, alibi=alibi, config=config
        )
        ctx.save_for_backward(*res)
        ctx.set_materialize_grads(False)
        ctx.options = _scale(scale, q), softcap, None, atomic
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dlse):
        res = ctx.saved_tensors
        grads = (None, None, None)
        if do is not None or dlse is not None:
            do = torch.zeros_like(res[0]) if do is None else do
            grads = _gradients(res, do, dlse, *ctx.options)
        return *grads, *(None,) * (5 + len(HybridPlan._fields))


def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: HybridPlan,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """(o [T, Hq, D], lse [Hq, T] float32): attention over what the plan lets each token see.

    q [T, Hq, D], k and v [T, Hk, D]: bfloat16 or float16, D 64, 96, 128 or 256; query heads
    h * Hq / Hk and on share the keys of head h. Strided views, as of a fused projection, cost no
    copy if rows begin at multiples of 16 bytes. plan: hybrid_plan's, for T tokens.
    scale: D ** -0.5 by default. softcap: 0 for none; else scores are softcap * tanh(x / softcap).
    alibi [Hq] float32: slopes, which get no gradient; distances are those of the plan's token_pos.
    config: tiles of this call; gradients take their own defaults.

    A token that sees nothing has o 0 and lse -inf, zero gradients, and memory that does not matter.
    NaN or infinity of a token that does may reach all queries of the tiles that see it.
    Differentiable once, through o and lse.

    Raises TypeError for dtypes and ValueError for shapes, devices and a scale that is not above 0,
    naming the argument; NotImplementedError on a GPU older than Ampere.
    """
    _check_plan(plan)
    return _HybridAttention.apply(q, k, v, scale, softcap, alibi, config, False, *plan)


def _check_plan(plan: HybridPlan) -> None:
    if not isinstance(plan, HybridPlan):
        raise TypeError(f"plan: expected a HybridPlan, got {type(plan).__name__}")


def _scale(scale: float | None, q: Tensor) -> float:
    if scale is None:
        return q.shape[2] ** -0.5
    _lib.check_static("scale", scale, (float, int))
    if not scale > 0:  # the largest score is kept unscaled
        raise ValueError(f"scale: expected > 0, got {scale}")
    return float(scale)


def _check(q, k, v, plan, softcap, alibi, config):
    for name, x in (("q", q), ("k", k), ("v", v)):
        if isinstance(x, Tensor) and x.dtype is torch.float32:
            raise TypeError(
                f"{name}: expected dtype bfloat16 or float16, got float32: tensor cores would "
                "round its mantissa to 10 bits (TF32) without a word"
            )
    _lib.check_tensor("q", q, ("T", "Hq", "D"), DTYPES)
    T, Hq, D = q.shape
    if D not in HEAD_DIMS:
        raise ValueError(f"q: expected a head dim of 64, 96, 128 or 256, got {D}")
    _lib.check_tensor("k", k, (T, "Hk", D), (q.dtype,))
    Hk = k.shape[1]
    if Hk == 0 or Hq % Hk:
        raise ValueError(f"k: expected heads that divide the Hq = {Hq} of q, got {Hk}")
    _lib.check_tensor("v", v, (T, Hk, D), (q.dtype,))
    _check_plan(plan)
    shapes = {"tiles": (_lib.cdiv(T, TILE), 8)}
    shapes |= dict.fromkeys(("q_order", "k_order"), (_lib.cdiv(T, ORDERED),))
    for name, x in plan._asdict().items():
        _lib.check_tensor(f"plan.{name}", x, shapes.get(name, (T,)), (torch.int32,))
    _lib.check_static("softcap", softcap, (float, int))
    if not softcap >= 0:
        raise ValueError(f"softcap: expected >= 0, got {softcap}")
    if alibi is not None:
        _lib.check_tensor("alibi", alibi, (Hq,), (torch.float32,))
    _lib.check_same_device(q=q, k=k, v=v, alibi=alibi, **plan._asdict())
    _lib.check_config(config, Config)
