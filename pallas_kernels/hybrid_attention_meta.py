"""Segments as the user has them: where sequences and segments begin, and each segment's mode.

    CAUSAL    text: a token sees what is before it
    FULL      an image: all of it, and what is before it
    NOISE     an image under diffusion: the same, but nobody else sees it
    PAD       nothing, and nothing sees it: a sequence of its own

Of the size of the batch's structure, not of its tokens; constructors from what models have. The
kernels read what hybrid_attention_plan.py makes of it.

Twin: triton_kernels/hybrid_attention_meta.py.

Sources: segments as BAGEL packs them (data/data_utils.py there).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import _lib

CAUSAL, FULL, NOISE, PAD = range(4)
MODES = ("causal", "full", "noise", "pad")
DENSE_TOKENS = 8192  # a mask of more is not drawn


def _mode(mode: Any) -> int:
    if mode in MODES:
        return MODES.index(mode)
    if isinstance(mode, (int, np.integer)) and 0 <= mode < len(MODES):
        return int(mode)
    raise ValueError(f"mode: expected one of {', '.join(MODES)} or 0 to 3, got {mode!r}")


def _filled(name: str, values: Any, most: int | None, fill: Any, dtype: Any) -> jax.Array:
    """The values, then `fill` up to `most` of them."""
    found = np.asarray(values, dtype)
    if most is not None and len(found) > most:
        raise ValueError(f"{name}: expected at least {len(found)} for this batch, got {most}")
    more = 0 if most is None else most - len(found)
    return jnp.asarray(np.concatenate([found, np.full(more, fill, dtype)]))


class HybridMeta(NamedTuple):
    """Sequences and segments of packed tokens. Unused entries at the end repeat the last offset.

    cu_seqlens: [B + 1] int32, where sequences start, and where the last stops.
    seg_off: [S + 1] int32, likewise for segments. Each sequence starts where a segment does.
    seg_mode: [S] int8: CAUSAL, FULL, NOISE or PAD. Tokens behind the last segment are PAD.
    pos: [T] int32, positions for ALiBi, or None: a token's place in the batch.

    The constructors raise ValueError for lengths or modes that make no batch. With max_sequences
    and max_segments the arrays have room for so many: batches of one room share compiled code.
    """

    cu_seqlens: jax.Array
    seg_off: jax.Array
    seg_mode: jax.Array
    pos: jax.Array | None = None

    @classmethod
    def from_segments(
        cls,
        sequences: Sequence[Sequence[tuple[int, Any]]],
        *,
        max_sequences: int | None = None,
        max_segments: int | None = None,
        pos: jax.Array | None = None,
    ) -> "HybridMeta":
        """For every sequence its segments: (length, mode), mode a number or its name."""
        segments = [
            (int(length), _mode(mode)) for sequence in sequences for length, mode in sequence
        ]
        for length, _ in segments:
            if length < 0:
                raise ValueError(f"segments: expected lengths of at least 0, got {length}")
        lengths = [sum(int(length) for length, _ in sequence) for sequence in sequences]
        cu = np.cumsum([0, *lengths])
        off = np.cumsum([0, *(length for length, _ in segments)])
        rooms = [None if most is None else most + 1 for most in (max_sequences, max_segments)]
        made = cls(
            _filled("max_sequences", cu, rooms[0], cu[-1], np.int32),
            _filled("max_segments", off, rooms[1], off[-1], np.int32),
            _filled("max_segments", [m for _, m in segments], max_segments, PAD, np.int8),
            pos,
        )
        check(made, int(cu[-1]))
        return made

    @classmethod
    def from_cu_seqlens(
        cls, cu_seqlens: Any, mode: Any = CAUSAL, *, max_sequences: int | None = None
    ) -> "HybridMeta":
        """Every sequence is one segment. cu_seqlens may be a traced array: it is not looked at."""
        mode = _mode(mode)
        if not isinstance(cu_seqlens, jax.Array):
            cu_seqlens = np.asarray(cu_seqlens, np.int32)
            _sorted("cu_seqlens", cu_seqlens)
        cu = jnp.asarray(cu_seqlens, jnp.int32)
        more = 0 if max_sequences is None else max_sequences + 1 - len(cu)
        if more < 0:
            raise ValueError(
                f"max_sequences: expected at least {len(cu) - 1} for this batch, got "
                f"{max_sequences}"
            )
        cu = jnp.concatenate([cu, jnp.broadcast_to(cu[-1:], (more,))])
        return cls(cu, cu, jnp.full(len(cu) - 1, mode, jnp.int8))

    @classmethod
    def from_prefix_lengths(
        cls,
        lengths: Sequence[int],
        prefix_lengths: Sequence[int],
        *,
        max_sequences: int | None = None,
    ) -> "HybridMeta":
        """Sequences whose prefix sees all of itself, and whose rest is text."""
        if len(lengths) != len(prefix_lengths):
            raise ValueError(
                f"prefix_lengths: expected one for each of {len(lengths)} sequences, got "
                f"{len(prefix_lengths)}"
            )
        for i, (length, prefix) in enumerate(zip(lengths, prefix_lengths, strict=True)):
            if not 0 <= prefix <= length:
                raise ValueError(
                    f"prefix_lengths: expected 0 to {length} for sequence {i}, got {prefix}"
                )
        pairs = zip(lengths, prefix_lengths, strict=True)
        return cls.from_segments(
            [[(prefix, FULL), (length - prefix, CAUSAL)] for length, prefix in pairs],
            max_sequences=max_sequences,
            max_segments=None if max_sequences is None else 2 * max_sequences,
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
        pos: jax.Array | None = None,
    ) -> "HybridMeta":
        """From BAGEL's batch: splits of all samples in a row, modes 'causal', 'full', 'noise'."""
        if len(split_lens) != len(attn_modes):
            raise ValueError(
                f"attn_modes: expected one for each of {len(split_lens)} splits, got "
                f"{len(attn_modes)}"
            )
        splits = list(zip(map(int, split_lens), attn_modes, strict=True))
        sequences, at = [], 0
        for i, sample in enumerate(map(int, sample_lens)):
            sequence, left = [], sample
            while at < len(splits) and (left > 0 or splits[at][0] == 0):
                sequence.append(splits[at])
                left -= splits[at][0]
                at += 1
            if left:
                raise ValueError(f"split_lens: they do not tile sample {i} of {sample} tokens")
            sequences.append(sequence)
        if at < len(splits):
            raise ValueError(
                f"sample_lens: they have {sum(map(int, sample_lens))} tokens, the splits "
                f"{sum(length for length, _ in splits)}"
            )
        return cls.from_segments(
            sequences, max_sequences=max_sequences, max_segments=max_segments, pos=pos
        )

    def to_dense(self, tokens: int, window: int | None = None) -> np.ndarray:
        """The mask [tokens, tokens] as bools, on the host: for tests and pictures.

        Raises ValueError above 8192 tokens.
        """
        if tokens > DENSE_TOKENS:
            raise ValueError(f"tokens: expected at most {DENSE_TOKENS}, got {tokens}")
        reach = reach_of(tokens, window)
        cu, off, mode = (np.asarray(x).astype(np.int32) for x in self[:3])
        t = np.arange(tokens)
        g = np.searchsorted(off, t, side="right") - 1
        s = np.searchsorted(cu, t, side="right") - 1
        inside = (g < len(mode)) & (s < len(cu) - 1)
        g, s = np.minimum(g, len(mode) - 1), np.minimum(s, len(cu) - 2)
        live = inside & (mode[g] != PAD)
        of_segment = (mode[g], off[g], off[g + 1], cu[s], cu[s + 1])
        kv_start, kv_end, noise, _, _ = intervals(np, t, g, *of_segment, live, reach)
        seen = (t >= kv_start[:, None]) & (t < kv_end[:, None])
        return seen & ((noise == -1) | (noise == noise[:, None]))


def _sorted(name: str, offsets: np.ndarray) -> None:
    if offsets.ndim != 1 or len(offsets) < 1 or offsets[0] != 0:
        raise ValueError(f"{name}: expected offsets that start with 0, got {offsets[:4]}")
    falls = np.flatnonzero(np.diff(offsets) < 0)
    if falls.size:
        i = int(falls[0])
        raise ValueError(
            f"{name}: expected sorted offsets, got {offsets[i]} and then {offsets[i + 1]} at {i}"
        )


def check(meta: HybridMeta, tokens: int) -> None:
    """Raises ValueError that names what is wrong in the values of meta, TypeError under jit."""
    for name, x in zip(meta._fields, meta, strict=True):
        if isinstance(x, jax.core.Tracer):
            raise TypeError(f"{name}: expected an array with values, got a tracer")
    cu, off, mode = (np.asarray(x).astype(np.int64) for x in meta[:3])
    _sorted("cu_seqlens", cu)
    _sorted("seg_off", off)
    if len(mode) != len(off) - 1:
        raise ValueError(f"seg_mode: expected {len(off) - 1} modes, got {len(mode)}")
    if unknown := [int(m) for m in mode if not 0 <= m < len(MODES)]:
        raise ValueError(f"seg_mode: expected 0 to 3, got {unknown[0]}")
    if cu[-1] > tokens:
        raise ValueError(f"cu_seqlens: expected at most {tokens} tokens, got {cu[-1]}")
    live_end = max([0, *off[1:][mode != PAD]])
    if off[-1] < cu[-1] or live_end > cu[-1]:
        raise ValueError(
            f"seg_off: segments do not tile the sequences: they end at {off[-1]} (the last that "
            f"is not PAD at {live_end}), the sequences at {cu[-1]}"
        )
    if strange := sorted(set(cu.tolist()) - set(off.tolist())):
        raise ValueError(
            f"seg_off: segments do not tile the sequences: none starts at {strange[0]}, where a "
            "sequence does"
        )
    for i, (first, last) in enumerate(pairwise(cu)):
        own = mode[(off[:-1] >= first) & (off[1:] <= last) & (off[1:] > off[:-1])]
        if (own == PAD).any() and len(own) > 1:
            raise ValueError(
                f"seg_mode: sequence {i} has a PAD segment beside others; PAD is a sequence of "
                "its own, or behind the last"
            )


def reach_of(tokens: int, window: int | None) -> int:
    """How many tokens back one may see at most, itself included."""
    if window is None:
        return tokens + 1
    _lib.check_static("window", window, (int,))
    if window < 1:
        raise ValueError(f"window: expected at least 1 (a token sees itself) or None, got {window}")
    return window


def intervals(
    xp: Any, t: Any, g: Any, mode: Any, a: Any, b: Any, first: Any, last: Any, live: Any, reach: int
) -> tuple[Any, ...]:
    """Intervals of tokens t of segments g: [a, b), in sequences [first, last)."""
    image = (mode == FULL) | (mode == NOISE)
    oldest, latest = t - (reach - 1), t + reach
    kv_start = xp.maximum(first, xp.where(image, xp.minimum(a, oldest), oldest))
    kv_end = xp.where(image, b, t + 1)
    q_start = xp.where(image, a, t)
    q_end = xp.minimum(last, xp.maximum(latest, kv_end))
    q_end = xp.where(mode == NOISE, b, q_end)
    noise = xp.where(live & (mode == NOISE), g, -1)
    kv_start, kv_end, q_start, q_end = (
        xp.where(live, x, t) for x in (kv_start, kv_end, q_start, q_end)
    )
    return kv_start, kv_end, noise, q_start, q_end
