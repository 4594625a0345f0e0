"""What is wrong with an answer: which elements, in which tiles, and which planted fault it is like.

A fault of parity.faults is named only where it explains the error: the answer that the fault makes
of these very inputs is nearer to the wrong answer than a tenth of the error. Where none does, what
remains is what is true of every wrong element: its rows, columns and tiles.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parity import faults
from parity.faults import Case
from parity.judge import TILE_ROWS, Verdict, judge, wrong_elements
from parity.shrink import optional

LARGEST = 1 << 26  # elements of an output that is looked at
MATCHED = 1 << 22  # elements up to which faults are recomputed: some take the oracle once more
EXPLAINED = 0.1  # of the error may be left over where a fault is named
FEW = 8  # wrong elements, below which that could be chance: then all must be explained
SUM_TILES = tuple(2**k for k in range(4, 13))  # of which a sum may miss the last, ragged one
MAP_ROWS, MAP_COLUMNS = 16, 60  # cells of the error map, at most
FINE_COLUMNS = 32  # up to which a tile is divided

UNFAIR = "the model itself fails on these inputs: float32 loses too much of them to tell"
# The judge's reasons that speak of an answer's values
REASONS = ("shape", "dtype", "nonfinite", "zeros", "norm", "tile", "peak", "bias", "probe")

Grid = np.ndarray  # [rows, columns]: an output whose leading axes are one; of a vector, one row
# (case, which output) -> (a name, what went wrong in words, the answer) of each
Suspects = Callable[[Case, int], Iterator[tuple[str, str, Grid]]]


@dataclass(frozen=True)
class Tiles:
    """How the kernel cuts an output: block_m x block_n, or unknown and the judge's 64 x 64."""

    block_m: int
    block_n: int
    warpgroups: int = 0
    known: bool = True

    @staticmethod
    def of(configs: Sequence[Mapping[str, Any]], output: int, outputs: int) -> "Tiles":
        """From the Configs of the kernels that ran: one an output, or the last one's for all."""
        if not configs:
            return Tiles(TILE_ROWS, TILE_ROWS, known=False)
        config = configs[output] if len(configs) == outputs else configs[-1]
        return Tiles(config.get("block_m", 1), config["block_n"], config.get("warpgroups", 0))

    def at(self, row: int, column: int) -> tuple[int, int]:
        return row // self.block_m, column // self.block_n

    def warpgroup(self, row: int, column: int) -> int | None:
        """Which compute warpgroup has the element: they share the rows of a block, or each row is
        shared by several, which take its chunks of block_n columns in turn."""
        if not self.warpgroups:
            return None
        row %= self.block_m
        if self.warpgroups < self.block_m:
            return row // (self.block_m // self.warpgroups)
        share = self.warpgroups // self.block_m
        return row * share + column // self.block_n % share


def diagnosis(
    case: Case,
    model: tuple[Any, ...],
    outputs: tuple[Any, ...],
    failed: Verdict,
    configs: Sequence[Mapping[str, Any]] = (),
    suspects: Suspects | None = None,
) -> dict[str, Any] | None:
    """What can be said of the output that failed, as JSON; None where there is nothing to look at.

    Args:
        case: the pass with its truth, as faults.case_of makes it.
        model: the same in float32, not yet rounded.
        outputs: what the kernel returned.
        failed: the judge's verdict on one of them.
        configs: tile sizes of the kernels that ran, as frameworks.tiles finds them.
        suspects: wrong answers to these inputs to compare with, instead of the planted faults'.

    Returns:
        output, shape; wrong, elements: how many; first_wrong: index, got, expected, looks, tile,
        block, warpgroup; where: a sentence; looks_like: the name of a planted fault or None;
        because: a sentence or ""; map: tile, cell, relative_error by cell (None: not finite). Or
        unfair: a sentence, where the model fails too and no kernel could pass.
    """
    if failed.output not in case.specs:
        return None
    at = list(case.specs).index(failed.output)
    spec = case.specs[failed.output]
    if failed.reason in ("shape", "dtype"):
        return _outside(case, at, outputs[at], failed)
    if not 0 < math.prod(spec.shape) <= LARGEST:
        return None
    terms = case.problem.reduction(case.work, failed.output)
    right = case.good[at], case.truth[at], model[at]
    if not judge(failed.output, *right, spec, family=case.problem.family, terms=terms).ok:
        return {"output": failed.output, "unfair": UNFAIR}
    y, r, m = (grid(x) for x in (outputs[at], case.truth[at], model[at]))
    wrong, allowed = wrong_elements(y, r, m, spec, family=case.problem.family, terms=terms)
    # Rounding alone can move the smallest of elements far: the rounded truth is not wrong.
    off = y != grid(case.good[at])
    wrong = off if failed.reason == "probe" else wrong & off
    tiles = Tiles.of(configs, at, len(case.specs))
    fault, because = _resemblance(case, at, y, r, wrong, allowed, suspects)
    return {
        "output": failed.output,
        "shape": list(spec.shape),
        "wrong": int(wrong.sum()),
        "elements": wrong.size,
        "first_wrong": _first(y, r, wrong, tiles, spec.shape, 2 * allowed),
        "where": _where(wrong, tiles, spec.shape),
        "looks_like": fault,
        "because": because,
        "map": _map(y, r, wrong, tiles, allowed),
    }


def grid(x: Any) -> Grid:
    """float64 on the host, [rows, columns]."""
    if not isinstance(x, np.ndarray):
        x = x.double().cpu().numpy()
    x = x.astype(np.float64)
    return x.reshape(-1, x.shape[-1]) if x.ndim > 1 else x.reshape(1, -1)


def _outside(case: Case, at: int, y: Any, failed: Verdict) -> dict[str, Any]:
    """An answer of another shape or dtype: are its values right where there are any?"""
    spec, y, r = case.specs[failed.output], np.atleast_2d(grid(y)), grid(case.good[at])
    found = {"output": failed.output, "shape": list(spec.shape), "looks_like": None, "because": ""}
    if y.shape == r.shape and _explains(y, r):
        return found | {
            "looks_like": "wrong_dtype",
            "because": f"the values are right once they are rounded to {spec.dtype}",
        }
    if y.shape == (r.shape[0], r.shape[1] - 1) and _explains(y, r[:, :-1]):
        return found | {
            "looks_like": "wrong_shape",
            "because": "the last column is missing; the values of the others are right",
        }
    if y.shape == r.T.shape and _explains(y, r.T):
        return found | {"because": "it is the truth transposed"}
    return found


def _explains(y: Grid, expected: Grid) -> bool:
    scale = float(np.linalg.norm(expected)) or 1.0
    return bool(np.isfinite(y).all()) and float(np.linalg.norm(y - expected)) <= 1e-2 * scale


# The first wrong element.


def _first(
    y: Grid, r: Grid, wrong: np.ndarray, tiles: Tiles, shape: tuple[int, ...], close: float
) -> dict[str, Any]:
    if wrong.any():
        flat = int(np.argmax(wrong))
    else:  # none is out of line by itself: the farthest
        flat = int(np.argmax(np.abs(np.where(np.isfinite(y - r), y - r, 0.0))))
    row, column = divmod(flat, y.shape[1])
    block = (tiles.block_m, tiles.block_n)
    vector = len(shape) == 1
    return {
        "index": [int(i) for i in np.unravel_index(flat, shape)],
        "got": _number(y[row, column]),
        "expected": _number(r[row, column]),
        "looks": _looks(y, r, row, column, close),
        "tile": list(tiles.at(row, column)[vector:]),
        "block": list(block[vector:]),
        "block_known": tiles.known,
        "warpgroup": None if vector else tiles.warpgroup(row, column),
    }


def _number(x: float) -> float | str:
    return float(x) if math.isfinite(x) else str(x)


def _looks(y: Grid, r: Grid, row: int, column: int, close: float) -> str:
    """What one wrong value may be, to a relative error of `close`; "" if nothing fits."""
    got, want = float(y[row, column]), float(r[row, column])
    if math.isnan(got):
        return "NaN, as memory that nobody wrote holds, or made from it"
    if math.isinf(got):
        return "infinite"
    if not math.isfinite(want):
        return "finite where the truth is not"
    if got == 0:
        return "zero"
    if want == 0:
        return "exactly zero was due"

    def alike(a: float, b: float) -> bool:
        return abs(a - b) <= close * abs(b)

    for words, value in (("the sign is wrong", -want), ("twice the truth", 2 * want)):
        if alike(got, value):
            return words
    if alike(got, want / 2):
        return "half the truth"
    for i, j in ((0, -1), (0, 1), (-1, 0), (1, 0)):
        i, j = row + i, column + j
        if 0 <= i < r.shape[0] and 0 <= j < r.shape[1] and alike(got, float(r[i, j])):
            place = f"row {i}" if j == column else f"column {j}"
            return f"the value that belongs in {place} beside it"
    share = got / want
    return f"{share:.3g} times the truth" if abs(share - 1) >= 0.005 and abs(share) < 1e3 else ""


# Where the wrong elements lie.


def _where(wrong: np.ndarray, tiles: Tiles, shape: tuple[int, ...]) -> str:
    """A sentence that is true of every wrong element."""
    if not wrong.any():
        return "no element is out of line by itself: the error is spread over all"
    if wrong.all():
        return "every element is wrong"
    rows, columns = (np.flatnonzero(wrong.any(axis=axis)) for axis in (1, 0))
    words = [_indices(columns, wrong.shape[1], "column", tiles.block_n)]
    if len(shape) > 1:
        words.insert(0, _indices(rows, wrong.shape[0], "row", tiles.block_m))
    inside = int(wrong.sum()) / (len(rows) * len(columns))
    if len(rows) * len(columns) == wrong.size:
        return f"{_percent(inside)} of the elements are wrong, all over"
    share = "" if inside > 0.995 else f" ({_percent(inside)} of those are wrong)"
    if int(wrong.sum()) == 1:
        sentence = f"one element is wrong: {', '.join(words)}"
    else:
        sentence = f"every wrong element lies in {', '.join(words)}{share}"
    i, j = np.nonzero(wrong)
    if len(rows) > 1 and len(set((j - i).tolist())) == 1:
        sentence += f", on the diagonal column = row {int(j[0] - i[0]):+d}"
    return sentence + _in_tiles(i, j, wrong.shape, tiles)


def _percent(share: float) -> str:
    return f"{share:.0%}" if share > 0.1 else f"{share:.1%}"


def _in_tiles(i: np.ndarray, j: np.ndarray, shape: tuple[int, ...], tiles: Tiles) -> str:
    num_m, num_n = -(-shape[0] // tiles.block_m), -(-shape[1] // tiles.block_n)
    touched = set(zip((i // tiles.block_m).tolist(), (j // tiles.block_n).tolist(), strict=True))
    if not tiles.known or num_m * num_n == 1:
        return ""
    if len(touched) == 1:
        return f"; all in tile {next(iter(touched))} of {num_m} x {num_n}"
    if num_n > 1 and {n for _, n in touched} == {num_n - 1}:
        return f"; all in the last of {num_n} columns of tiles"
    if num_m > 1 and {m for m, _ in touched} == {num_m - 1}:
        return f"; all in the last of {num_m} rows of tiles"
    return f"; in {len(touched)} of {num_m * num_n} tiles"


def _indices(at: np.ndarray, n: int, noun: str, block: int) -> str:
    """'columns >= 64', 'row 5 (the last)', 'columns 60 to 63 of every tile', ..."""
    first, last, count = int(at[0]), int(at[-1]), len(at)
    if count == n:
        return f"all {n} {noun}s" if n > 1 else f"{noun} 0"
    if count == 1:
        return f"{noun} {first}" + (" (the last)" if first == n - 1 else "")
    if count == last - first + 1:
        if last == n - 1:
            return f"{noun}s >= {first} (of {n})"
        return f"{noun}s {first} to {last} (of {n})"
    if count <= 3:
        return f"{noun}s {', '.join(map(str, at.tolist()))}"
    steps = np.unique(np.diff(at))
    if len(steps) == 1:
        return f"{noun}s {first}, {at[1]}, ... (every {steps[0]})"
    inside = np.unique(at % block)
    if (
        block < n
        and len(inside) < block
        and count == int(np.isin(np.arange(n) % block, inside).sum())
    ):
        if len(inside) == inside[-1] - inside[0] + 1:
            span = f"{inside[0]} to {inside[-1]}" if len(inside) > 1 else f"{inside[0]}"
            return f"{noun}s {span} of every {block}"
    return f"{count} of {n} {noun}s ({first} to {last})"


# Which planted fault it looks like.


def _resemblance(
    case: Case,
    at: int,
    y: Grid,
    r: Grid,
    wrong: np.ndarray,
    allowed: float,
    suspects: Suspects | None = None,
) -> tuple[str | None, str]:
    """(the name of a fault or None, a sentence or "")."""
    blank = _blank(y, r, wrong)
    if blank and blank[0] != "skipped_tile" and suspects is None:
        return blank  # whoever brings suspects knows better what zeros come from
    if int(wrong.sum()) == 1 and np.allclose(y[wrong], -r[wrong], rtol=2 * allowed):
        return "wrong_element", "one element has the wrong sign"
    kept = np.isfinite(y) & np.isfinite(r)
    error = float(np.linalg.norm((y - r)[kept]))
    if not error or (wrong.any() and not (wrong & kept).any()):
        return blank or (None, "")
    name, why, left = None, "", EXPLAINED
    if 0 < int((wrong & kept).sum()) < FEW:
        left = min(left, 2 * allowed * float(np.linalg.norm(y[kept])) / error)
    if y.size <= MATCHED:
        for fault, sentence, expected in (suspects or _recomputed)(case, at):
            finite = kept & np.isfinite(expected)
            apart = float(np.linalg.norm((y - expected)[finite])) / error
            if apart < left or (name is None and apart == 0):
                name, why, left = fault, sentence, apart
    if name is None:
        return blank or (None, _factor(y, r, kept, error))
    if not kept.all() and (rest := _blank(y, r, ~np.isfinite(y) & np.isfinite(r))):
        why += f"; and {rest[1].removesuffix(_ALONE)}"
    return name, why


_ALONE = ", and nothing else is wrong"


def _blank(y: Grid, r: Grid, wrong: np.ndarray) -> tuple[str | None, str] | None:
    """The only wrong rows and columns, if they hold nothing but zero or nothing but NaN."""
    if not wrong.any():
        return None
    rows, columns = (np.flatnonzero(wrong.any(axis=axis)) for axis in (1, 0))
    inside = y[np.ix_(rows, columns)]
    if np.isnan(inside).all():
        blank, says, tail = np.isnan(y), "NaN (never written, or computed so)", "unwritten_tail"
    elif (inside == 0).all():
        blank, says, tail = y == 0, "zero", "dropped_tail"
    else:
        return None
    # Elements so small that zero is not far from them belong to the same piece.
    columns = _grown(columns, np.all(blank[rows, :], axis=0), np.any(r[rows, :] != 0, axis=0))
    rows = _grown(rows, np.all(blank[:, columns], axis=1), np.any(r[:, columns] != 0, axis=1))
    all_rows, all_columns = bool(np.all(blank[:, columns])), bool(np.all(blank[rows, :]))
    if all_rows and all_columns:
        return ("skipped_tile" if says == "zero" else tail), f"every element is {says}"
    num_rows, num_columns = y.shape
    places = [
        _indices(at, n, noun, n)
        for at, n, noun, whole in (
            (rows, num_rows, "row", all_rows or num_rows == 1),
            (columns, num_columns, "column", all_columns),
        )
        if not whole
    ]
    sentence = f"{', '.join(places)}: {says}{_ALONE}"
    solid = [int(at[-1] - at[0]) + 1 == len(at) for at in (rows, columns)]
    if (all_rows and solid[1] and columns[-1] == num_columns - 1) or (
        all_columns and solid[0] and rows[-1] == num_rows - 1
    ):
        return tail, sentence
    return ("skipped_tile" if all(solid) else None), sentence


def _grown(at: np.ndarray, blank: np.ndarray, due: np.ndarray) -> np.ndarray:
    """A range of indices with its holes filled, where they are blank, and longer at both ends as
    long as it is blank there and should not be."""
    first, last = int(at[0]), int(at[-1])
    if not blank[first : last + 1].all():
        return at
    blank = blank & due
    while first > 0 and blank[first - 1]:
        first -= 1
    while last + 1 < len(blank) and blank[last + 1]:
        last += 1
    return np.arange(first, last + 1)


def _recomputed(case: Case, at: int) -> Iterator[tuple[str, str, Grid]]:
    """(name, what it does, the answer it gives) of the faults that are applied to these inputs."""
    summed = faults.reduced_input(case)
    n = case.arrays[summed].shape[-1] if summed else 0
    # all that lies beyond the last whole tile, for the tiles there are
    tails = sorted({1, *((n - 1) % tile + 1 for tile in SUM_TILES if n > tile)})
    variants: list[tuple[Callable[..., Any], dict[str, Any]]] = [
        *((faults.shifted_by_one, {"by": by, "axis": axis}) for axis in (-1, 0) for by in (1, -1)),
        *((faults.mask_off_by_one, {"by": by}) for by in (1, -1)),
        *((faults.last_term_missing, {"terms": terms}) for terms in tails),
        *((fault, {}) for fault in _RECOMPUTED),
        *((faults.option_ignored, {"name": name}) for name in optional(case.problem, case.work)),
    ]
    for fault, how in variants:
        with np.errstate(all="ignore"):  # overflow, of inputs no real kernel sees
            answer = fault(case, **how)
        if answer is None or tuple(answer[at].shape) != tuple(case.good[at].shape):
            continue
        expected = grid(answer[at])
        if np.array_equal(expected, grid(case.good[at]), equal_nan=True):
            continue  # on these inputs it changes nothing
        sentence = " ".join((fault.__doc__ or "").split("\n\n")[0].split())
        sentence = sentence[:1].lower() + sentence[1:].rstrip(".")
        if "name" in how:
            sentence = f"it is the answer without {how['name']}"
        if how.get("terms", 1) > 1:
            sentence = f"the sum stops {how['terms']} terms early"
        yield fault.__name__, sentence, expected


_RECOMPUTED = (
    faults.one_precision_lower,
    faults.truncating_store,
    faults.accumulated_in_storage,
)


def _factor(y: Grid, r: Grid, kept: np.ndarray, error: float) -> str:
    """Whether the answer, or each row of it, is a multiple of the truth."""
    y, r = np.where(kept, y, 0.0), np.where(kept, r, 0.0)
    if r.shape[1] < FEW:
        return ""
    by_row = (y * r).sum(axis=1) / np.maximum((r * r).sum(axis=1), 1e-300)
    if float(np.linalg.norm(y - by_row[:, None] * r)) > EXPLAINED * error:
        return ""
    off = by_row[np.abs(by_row - 1) > 1e-3 * np.abs(by_row)]
    if not off.size:
        return ""
    low, high = float(off.min()), float(off.max())
    if high - low <= 1e-3 * abs(high):
        return f"it is {low:.4g} times the truth" + ("" if off.size == len(by_row) else " there")
    return f"each of these rows is off by one factor of its own, {low:.4g} to {high:.4g}"


# The map.


def _map(y: Grid, r: Grid, wrong: np.ndarray, tiles: Tiles, allowed: float) -> dict[str, Any]:
    """Relative error by cell: a tile, several of too many tiles, a part of one of a few."""
    cell = (
        _cell(tiles.block_m, y.shape[0], MAP_ROWS, MAP_ROWS),
        _cell(tiles.block_n, y.shape[1], MAP_COLUMNS, FINE_COLUMNS),
    )
    error: list[list[float | None]] = []
    kept = np.isfinite(y) & np.isfinite(r)
    off, size = np.where(kept, y - r, 0.0) ** 2, np.where(kept, r, 0.0) ** 2
    lost = wrong & ~kept
    starts = [range(0, n, step) for n, step in zip(y.shape, cell, strict=True)]
    for i in starts[0]:
        error.append([])
        for j in starts[1]:
            at = slice(i, i + cell[0]), slice(j, j + cell[1])
            norm = math.sqrt(float(size[at].sum()))
            e = math.sqrt(float(off[at].sum()))
            relative = e / norm if norm else float(e > 0)
            error[-1].append(None if lost[at].any() else relative)
    return {
        "shape": list(y.shape),
        "tile": [tiles.block_m, tiles.block_n],
        "tile_known": tiles.known,
        "cell": list(cell),
        "allowed": allowed,
        "relative_error": error,
    }


def _cell(block: int, n: int, most: int, fine: int) -> int:
    count = -(-n // block)
    if count > most:
        return block * -(-count // most)
    while block % 2 == 0 and 2 * -(-n // block) <= fine:
        block //= 2
    return block
