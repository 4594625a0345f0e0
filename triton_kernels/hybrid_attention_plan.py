"""Who sees whom: segments as the user has them, and what the kernels make of them once a batch.

    HybridMeta    where sequences and segments begin, and each segment's mode: a kilobyte
    hybrid_plan   for every token t the interval of keys it sees and of queries that see it
        g, s = the segment and the sequence of t      two binary searches
        first, last = where s begins and ends; a, b = where g does
                       keys                           queries
        CAUSAL         first .. t + 1                 t .. last
        FULL           first .. b                     a .. last
        NOISE          first .. b                     a .. b       and no other images under noise
        PAD            nothing                        nothing
        a window of W: first is at least t - W + 1, last at most t + W, but never inside an image
    for every 64 tokens the least and the largest of these; tiles of 128, the longest first

A tile of queries whose largest first key is not past a tile of keys, and whose least end is not
before its end, needs no mask: six numbers of each decide about 64 x 64 pairs.

Twin: pallas_kernels/hybrid_attention_plan.py.

Sources: the modes are those of BAGEL (arXiv:2505.14683) and Transfusion (arXiv:2408.11039); tiles
that are skipped, masked or neither are FlexAttention's BlockMask (arXiv:2412.05496), which stores
lists of them where this stores bounds; longest first is Graham's rule for unequal jobs.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _lib

CAUSAL, FULL, NOISE, PAD = range(4)
MODES = ("causal", "full", "noise", "pad")
TILE, ORDERED = 64, 128  # tokens that a row of `tiles`, an entry of an order stands for


class HybridMeta(NamedTuple):
    """Sequences of segments, one after the other.

    cu_seqlens [B + 1] int32: where sequences begin, and where the last ends. seg_off [S + 1] int32:
    the same of segments; where a sequence begins a segment does. seg_mode [S] int8: CAUSAL, FULL,
    NOISE or PAD. pos [T] int32 or None: positions for ALiBi, by default the token's number.

    Entries that are not used repeat the last offset, with mode PAD: shapes stay as they are when
    lengths change, and nothing is compiled anew.
    """

    cu_seqlens: Tensor
    seg_off: Tensor
    seg_mode: Tensor
    pos: Tensor | None = None

    @classmethod
    def from_segments(
        cls,
        sequences: Sequence[Sequence[tuple[int, int | str]]],
        *,
        max_sequences: int | None = None,
        max_segments: int | None = None,
        pos: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> "HybridMeta":
        """For every sequence its segments: (length, mode), the mode a number or its name.

        max_sequences, max_segments: room for as many (default: as many as there are).
        device: where pos is, or else the current GPU.

        Raises ValueError for a mode there is not, a length below 0, a PAD beside another segment
        in a sequence, and more of them than there is room for.
        """
        segments = [(n, _mode("sequences", mode)) for sequence in sequences for n, mode in sequence]
        for i, (length, _) in enumerate(segments):
            if length < 0:
                raise ValueError(f"sequences: segment {i} has the length {length}")
        cu = [0, *accumulate(sum(length for length, _ in sequence) for sequence in sequences)]
        off = [0, *accumulate(length for length, _ in segments)]
        modes = [mode for _, mode in segments]
        if wrong := _wrong(cu, off, modes, off[-1]):
            raise ValueError(wrong)
        cu += [cu[-1]] * _spare("max_sequences", len(sequences), max_sequences)
        spare = _spare("max_segments", len(segments), max_segments)
        off, modes = off + [off[-1]] * spare, modes + [PAD] * spare
        where = _device(device if pos is None else pos.device)
        cu, off = (torch.tensor(x, dtype=torch.int32, device=where) for x in (cu, off))
        return cls(cu, off, torch.tensor(modes, dtype=torch.int8, device=where), pos)

    @classmethod
    def from_cu_seqlens(
        cls,
        cu_seqlens: Tensor | Sequence[int],
        mode: int | str = CAUSAL,
        *,
        max_sequences: int | None = None,
        device: torch.device | str | None = None,
    ) -> "HybridMeta":
        """Packed sequences, each one segment: jagged text, or an encoder's with FULL.

        cu_seqlens [B + 1]: begins with 0. An int32 tensor stays on its device, unread: it is not
        checked, and nothing waits for it.
        """
        mode = _mode("mode", mode)
        if not isinstance(cu_seqlens, Tensor):
            if not len(cu_seqlens) or cu_seqlens[0] != 0 or list(cu_seqlens) != sorted(cu_seqlens):
                raise ValueError(
                    f"cu_seqlens: expected ascending offsets from 0 on, got {list(cu_seqlens)[:8]}"
                )
            cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32, device=_device(device))
        _lib.check_tensor("cu_seqlens", cu_seqlens, ("B + 1",), (torch.int32,))
        spare = _spare("max_sequences", len(cu_seqlens) - 1, max_sequences)
        cu = torch.cat([cu_seqlens, cu_seqlens[-1:].expand(spare)])
        return cls(cu, cu, torch.full_like(cu[1:], mode, dtype=torch.int8))

    @classmethod
    def from_prefix_lengths(
        cls,
        lengths: Sequence[int],
        prefix_lengths: Sequence[int],
        *,
        max_sequences: int | None = None,
        device: torch.device | str | None = None,
    ) -> "HybridMeta":
        """Prefix language models: the prefix of each sequence sees all of itself, the rest is text.

        Raises ValueError for a prefix longer than its sequence.
        """
        if len(prefix_lengths) != len(lengths):
            raise ValueError(
                f"prefix_lengths: expected {len(lengths)}, one for each sequence, "
                f"got {len(prefix_lengths)}"
            )
        for i, (prefix, length) in enumerate(zip(prefix_lengths, lengths, strict=True)):
            if not 0 <= prefix <= length:
                raise ValueError(f"prefix_lengths: {prefix} of the {length} tokens of sequence {i}")
        pairs = zip(prefix_lengths, lengths, strict=True)
        return cls.from_segments(
            [[(p, FULL), (n - p, CAUSAL)] for p, n in pairs],
            max_sequences=max_sequences,
            max_segments=None if max_sequences is None else 2 * max_sequences,
            device=device,
        )

    @classmethod
    def from_splits(
        cls,
        split_lens: Sequence[int],
        attn_modes: Sequence[str],
        sample_lens: Sequence[int],
        *,
        max_sequences: int | None = None,
        max_segments: int | None = None,
        pos: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> "HybridMeta":
        """As BAGEL packs a batch: splits with their modes, and how many tokens each sample has.

        attn_modes: "causal", "full" or "noise". BAGEL makes a causal sample of the tokens that fill
        up a batch: leave it out, and they cost nothing.

        Raises ValueError for other modes, and for splits that do not tile the samples.
        """
        if len(split_lens) != len(attn_modes):
            raise ValueError(f"attn_modes: expected {len(split_lens)}, got {len(attn_modes)}")
        for i, mode in enumerate(attn_modes):
            if mode not in MODES[:PAD]:
                raise ValueError(f"attn_modes: split {i} has the unknown mode {mode!r}")
        splits = list(zip(split_lens, attn_modes, strict=True))
        sequences: list[list[tuple[int, str]]] = []
        for i, tokens in enumerate(sample_lens):
            sequence, left = [], tokens
            while left > 0 and splits:
                sequence.append(splits.pop(0))
                left -= sequence[-1][0]
            if left:
                raise ValueError(f"split_lens: no split ends where sample {i} does")
            sequences.append(sequence)
        if any(length for length, _ in splits):
            raise ValueError(f"sample_lens: {len(splits)} splits belong to no sample")
        return cls.from_segments(
            sequences,
            max_sequences=max_sequences,
            max_segments=max_segments,
            pos=pos,
            device=device,
        )

    def to_dense(self, tokens: int, window: int | None = None) -> Tensor:
        """The mask [tokens, tokens] bool, True where a query (row) sees a key: to look at.

        Raises ValueError beyond 8192 tokens: a mask is what the kernels do without.
        """
        if tokens > 8192:
            raise ValueError(f"tokens: expected at most 8192 for a dense mask, got {tokens}")
        reach = _window(window) or tokens + 1
        t = torch.arange(tokens, device=self.seg_off.device)
        g, s = (torch.searchsorted(x, t, right=True) - 1 for x in (self.seg_off, self.cu_seqlens))
        live = (g < len(self.seg_mode)) & (s < len(self.cu_seqlens) - 1)
        modes = torch.nn.functional.pad(self.seg_mode, (0, 1), value=PAD)[g]
        live &= modes != PAD
        image, noise = (modes == FULL) | (modes == NOISE), modes == NOISE
        same = g[:, None] == g[None, :]
        near = (t[None, :] <= t[:, None]) & (t[None, :] > t[:, None] - reach)
        # a window never cuts the image that a token is in
        seen = near | (same & image[:, None])
        seen &= (s[:, None] == s[None, :]) & (same | ~noise[None, :])
        return seen & live[:, None] & live[None, :]


def _mode(name: str, mode: Any) -> int:
    if mode in MODES:
        return MODES.index(mode)
    if mode not in range(len(MODES)):
        raise ValueError(f"{name}: expected one of {', '.join(MODES)} or 0 to 3, got {mode!r}")
    return int(mode)


def _device(device: torch.device | str | None) -> torch.device | str:
    return device or ("cpu" if _lib.INTERPRETING else "cuda")


def _spare(name: str, count: int, room: int | None) -> int:
    if room is not None and count > room:
        raise ValueError(f"{name}: no room for {count} in {room}")
    return 0 if room is None else room - count


def _window(window: int | None) -> int:
    """0 for none."""
    if window is None:
        return 0
    _lib.check_static("window", window, (int,))
    if window < 1:
        raise ValueError(f"window: expected >= 1, got {window}")
    return window


def _wrong(cu: list[int], off: list[int], modes: list[int], tokens: int) -> str:
    """What is wrong with these offsets and modes, in a sentence; nothing if nothing is."""
    for name, x in (("cu_seqlens", cu), ("seg_off", off)):
        if not x or x[0] != 0:
            return f"{name}: expected 0 first, got {x[:1]}"
        for i, (a, b) in enumerate(pairwise(x)):
            if b < a:
                return f"{name}: not ascending: {a} and then {b} at {i + 1}"
        if x[-1] > tokens:
            return f"{name}: {x[-1]} tokens, and there are {tokens}"
    if extra := set(cu) - set(off):
        return f"seg_off: no segment begins or ends at {min(extra)}, where a sequence does"
    sequence, begun = 0, {}
    for i, (mode, (a, b)) in enumerate(zip(modes, pairwise(off), strict=True)):
        if mode not in range(len(MODES)):
            return f"seg_mode: segment {i} has the unknown mode {mode}"
        while sequence < len(cu) - 1 and cu[sequence + 1] <= a:
            sequence += 1
        if a == b:
            continue
        if sequence == len(cu) - 1 and mode != PAD:
            return f"seg_off: segment {i} ({MODES[mode]}) lies past the last sequence"
        if sequence < len(cu) - 1 and (mode == PAD) != begun.setdefault(sequence, mode == PAD):
            return f"seg_mode: sequence {sequence} has PAD beside other segments, at segment {i}"
    return ""


def check(meta: HybridMeta, tokens: int) -> None:
    """Raises ValueError if the arrays of meta hold what cannot be; it waits for the device."""
    _check(meta, tokens)
    wrong = _wrong(*(x.tolist() for x in meta[:3]), tokens)
    if wrong:
        raise ValueError(wrong)


def _check(meta: Any, tokens: Any) -> None:
    if not isinstance(meta, HybridMeta):
        raise TypeError(f"meta: expected a HybridMeta, got {type(meta).__name__}")
    _lib.check_static("tokens", tokens, (int,))
    if not 0 <= tokens < 1 << 30:
        raise ValueError(f"tokens: expected 0 to 2^30, got {tokens}")
    _lib.check_tensor("cu_seqlens", meta.cu_seqlens, ("B + 1",), (torch.int32,))
    _lib.check_tensor("seg_off", meta.seg_off, ("S + 1",), (torch.int32,))
    segments = (len(meta.seg_off) - 1,)
    _lib.check_tensor("seg_mode", meta.seg_mode, segments, (torch.int8,))
    if meta.pos is not None:
        _lib.check_tensor("pos", meta.pos, (tokens,), (torch.int32,))
    for name in ("cu_seqlens", "seg_off"):
        if not len(getattr(meta, name)):
            raise ValueError(f"{name}: expected at least one offset, got none")
    _lib.check_same_device(**meta._asdict())


class HybridPlan(NamedTuple):
    """What the kernels read; all int32. hybrid_plan makes it, once for all layers.

    Token t sees the keys kv_start[t] .. kv_end[t] but for those under another noise_id than its own
    and -1, and only queries q_start[t] .. q_end[t] can see it [T]. token_pos [T]: where it is.
    tiles [ceil(T / 64), 8], each of 64 tokens: the least and largest kv_start, kv_end and noise_id,
    the least q_start, the largest q_end. A tile with a token that sees nothing has T and 0 for the
    largest kv_start and the least kv_end: no tile of keys is free of a mask, to it.
    q_order, k_order [ceil(T / 128)]: tiles of queries, and of keys, the longest interval first.
    """

    kv_start: Tensor
    kv_end: Tensor
    noise_id: Tensor
    q_start: Tensor
    q_end: Tensor
    token_pos: Tensor
    tiles: Tensor
    q_order: Tensor
    k_order: Tensor


@triton.jit
def _segment_of(offsets_ptr, t, count, steps):
    """How many of the ascending offsets are <= t, less one."""
    low, high = tl.zeros_like(t), tl.zeros_like(t) + count
    for _ in range(steps):
        middle = (low + high) // 2
        offset = tl.load(offsets_ptr + middle, mask=low < high, other=0)
        below = (low < high) & (offset <= t)
        high = tl.where(below, high, middle)
        low = tl.where(below, middle + 1, low)
    return low - 1


@triton.jit
def _hybrid_attention_plan_kernel(
    cu_seqlens_ptr, seg_off_ptr, seg_mode_ptr, pos_ptr,  # pos_ptr: [T] or None
    kv_start_ptr, kv_end_ptr, noise_id_ptr, q_start_ptr, q_end_ptr, token_pos_ptr, tiles_ptr,
    T, B, S, reach, steps,
    block_r: tl.constexpr, block_t: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    r = tl.program_id(0) * block_r + tl.arange(0, block_r)
    t = r[:, None] * block_t + tl.arange(0, block_t)[None, :]  # [block_r, block_t]
    exists = t < T

    # --- 2. main loop
    g = _segment_of(seg_off_ptr, t, S + 1, steps)
    s = _segment_of(cu_seqlens_ptr, t, B + 1, steps)
    inside = exists & (g >= 0) & (g < S) & (s >= 0) & (s < B)
    mode = tl.load(seg_mode_ptr + g, mask=inside, other=3).to(tl.int32)
    a = tl.load(seg_off_ptr + g, mask=inside, other=0)
    b = tl.load(seg_off_ptr + g + 1, mask=inside, other=0)
    first = tl.load(cu_seqlens_ptr + s, mask=inside, other=0)
    last = tl.load(cu_seqlens_ptr + s + 1, mask=inside, other=0)

    # --- 3. epilogue
    live, image, noisy = mode != 3, (mode == 1) | (mode == 2), mode == 2
    oldest = t - reach + 1
    kv_start = tl.maximum(first, tl.where(image, tl.minimum(a, oldest), oldest))
    kv_end = tl.where(image, b, t + 1)
    latest = tl.minimum(last, tl.maximum(t + reach, kv_end))
    q_end = tl.where(noisy, b, latest)
    kv_start, kv_end = tl.where(live, kv_start, t), tl.where(live, kv_end, t)
    q_start, q_end = tl.where(live & image, a, t), tl.where(live, q_end, t)
    noise_id = tl.where(noisy, g, -1)
    # A tile with a token that sees nothing, or that overhangs, is never free of a mask.
    whole = tl.min(live.to(tl.int32), 1) == 1

    # --- 4. store
    tl.store(kv_start_ptr + t, kv_start, mask=exists)
    tl.store(kv_end_ptr + t, kv_end, mask=exists)
    tl.store(noise_id_ptr + t, noise_id, mask=exists)
    tl.store(q_start_ptr + t, q_start, mask=exists)
    tl.store(q_end_ptr + t, q_end, mask=exists)
    where = t
    if pos_ptr is not None:
        where = tl.load(pos_ptr + t, mask=exists, other=0)
    tl.store(token_pos_ptr + t, where, mask=exists)
    row, some = tiles_ptr + r * 8, r * block_t < T
    tl.store(row, tl.min(tl.where(live, kv_start, T), 1), mask=some)
    tl.store(row + 1, tl.where(whole, tl.max(kv_start, 1), T), mask=some)
    tl.store(row + 2, tl.where(whole, tl.min(kv_end, 1), 0), mask=some)
    tl.store(row + 3, tl.max(tl.where(live, kv_end, 0), 1), mask=some)
    tl.store(row + 4, tl.min(tl.where(exists, noise_id, S), 1), mask=some)
    tl.store(row + 5, tl.max(noise_id, 1), mask=some)
    tl.store(row + 6, tl.min(tl.where(live, q_start, T), 1), mask=some)
    tl.store(row + 7, tl.max(tl.where(live, q_end, 0), 1), mask=some)


@triton.jit
def _length(tiles_ptr, i, rows, start, end, pair: tl.constexpr):
    """From the least start to the largest end of `pair` rows of tiles; -1 past the last."""
    low, high = tl.zeros_like(i) + (1 << 30), tl.zeros_like(i)
    for k in tl.static_range(pair):
        at = i * pair + k
        low = tl.minimum(low, tl.load(tiles_ptr + at * 8 + start, mask=at < rows, other=1 << 30))
        high = tl.maximum(high, tl.load(tiles_ptr + at * 8 + end, mask=at < rows, other=0))
    return tl.where(i * pair < rows, tl.maximum(high - low, 0), -1)


@triton.jit
def _hybrid_attention_order_kernel(
    tiles_ptr, q_order_ptr, k_order_ptr, rows, num_o,
    pair: tl.constexpr, block_o: tl.constexpr,
):  # fmt: skip
    # --- 1. which tile
    of_keys = tl.program_id(1)
    start, end = of_keys * 6, of_keys * 4 + 3
    i = tl.program_id(0) * block_o + tl.arange(0, block_o)
    length = _length(tiles_ptr, i, rows, start, end, pair)

    # --- 2. main loop
    # The place of a tile: how many are longer, or as long and before it.
    place = tl.zeros_like(i)
    for j0 in range(0, num_o, block_o):
        j = j0 + tl.arange(0, block_o)
        other = _length(tiles_ptr, j, rows, start, end, pair)
        before = (other[None, :] > length[:, None]) | (
            (other[None, :] == length[:, None]) & (j[None, :] < i[:, None])
        )
        place += tl.sum(before.to(tl.int32), 1)

    # --- 3. epilogue
    order_ptr = q_order_ptr
    if of_keys == 1:
        order_ptr = k_order_ptr

    # --- 4. store
    tl.store(order_ptr + place, i, mask=i < num_o)


def _fake_plan(cu_seqlens, seg_off, seg_mode, pos, tokens, window):
    of_tokens = [seg_off.new_empty(tokens) for _ in range(6)]
    tiles = seg_off.new_empty((_lib.cdiv(tokens, TILE), 8))
    return [*of_tokens, tiles, *(seg_off.new_empty(_lib.cdiv(tokens, ORDERED)) for _ in range(2))]


@_lib.opaque("hybrid_plan", _fake_plan)
def _plan(
    cu_seqlens: Tensor,
    seg_off: Tensor,
    seg_mode: Tensor,
    pos: Tensor | None,
    tokens: int,
    window: int,
) -> list[Tensor]:
    """The arrays of a HybridPlan. window: 0 is none."""
    arrays = _fake_plan(cu_seqlens, seg_off, seg_mode, pos, tokens, window)
    if tokens == 0:
        return arrays
    *of_tokens, tiles, q_order, k_order = arrays
    meta = [x if x is None else x.contiguous() for x in (cu_seqlens, seg_off, seg_mode, pos)]
    with _lib.on_device(seg_off):
        _lib.check_gpu()
        steps = max(len(cu_seqlens), len(seg_off)).bit_length()
        # 256 tokens for 4 warps: 32768 of them are a program for each multiprocessor.
        _hybrid_attention_plan_kernel[(_lib.cdiv(len(tiles), 4),)](
            *meta, *of_tokens, tiles, tokens, len(cu_seqlens) - 1, len(seg_mode),
            window or tokens + 1, steps, 4, TILE, num_warps=4,
        )  # fmt: skip
        _hybrid_attention_order_kernel[(_lib.cdiv(len(q_order), 64), 2)](
            tiles, q_order, k_order, len(tiles), len(q_order), ORDERED // TILE, 64, num_warps=4
        )
    return arrays


def plan_of(meta: HybridMeta, tokens: int, window: int | None) -> HybridPlan:
    """hybrid_plan, without a Config."""
    _check(meta, tokens)
    return HybridPlan(*_plan(*meta, tokens, _window(window)))
