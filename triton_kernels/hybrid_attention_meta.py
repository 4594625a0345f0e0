"""Segments as the user has them: where sequences and segments begin, and each segment's mode.

    CAUSAL    text: a token sees what is before it
    FULL      an image: all of it, and what is before it
    NOISE     an image under diffusion: the same, but nobody else sees it
    PAD       nothing, and nothing sees it: a sequence of its own

A kilobyte for a batch of 32k, on the device; constructors from what models have. The kernels read
what hybrid_attention_plan.py makes of it.

Twin: pallas_kernels/hybrid_attention_meta.py.

Sources: the modes are those of BAGEL (arXiv:2505.14683) and Transfusion (arXiv:2408.11039).
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _lib

CAUSAL, FULL, NOISE, PAD = range(4)
MODES = ("causal", "full", "noise", "pad")


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
        reach = window_of(window) or tokens + 1
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


def window_of(window: int | None) -> int:
    """A window as a number: 0 for none."""
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
    check_shapes(meta, tokens)
    wrong = _wrong(*(x.tolist() for x in meta[:3]), tokens)
    if wrong:
        raise ValueError(wrong)


def check_shapes(meta: Any, tokens: Any) -> None:
    """Raises for what the host can see without the values."""
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
