"""The judge: is this output right? Errors may be what float32 mathematics loses, and no more.

With r the float64 oracle, e(y) = ||y - r|| / ||r|| and e* = e(model), an output passes iff

* its shape and dtype are right, it is finite exactly where r (rounded) is, 0 where r is 0, and not
  0 where r is a thousandth of its row or more: whoever skips an element leaves a zero. In a product
  a sum may come to 0 by chance, and does among 10^9: there the rest of its row says what float32
  may leave, a millionth; a row of zeros (no terms) allows nothing. In attention and scans the
  factors of a sum are 16 bits wide: two or three terms of up to four times their row's size may
  cancel, so 0 may stand where r is below four of their roundings; so it is with a gather's
  gradient, which adds a few rows of 16 bits. In scans whole sums cancel, as where a gate weighs no
  state: what float64 leaves of them, beside the largest element, is 0 too;
* e(y) <= 1.5 e* + 1e-6 over the whole array, and <= 3 e* + floor in every tile of 64 rows: one bad
  tile cannot hide in a norm;
* no element is off by more than ten times that, measured against the largest element;
* errors of 16-bit outputs do not lean to one side: a store that truncates shrinks every element,
  and must fail even where e* is large because of roundings before it.

No number here was chosen to let a kernel pass.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import array_api_compat
import numpy as np

from parity.spec import Arithmetic, Array, Problem, Workload, dtype_name, dtype_named

TILE_ROWS = 64
FLOOR = 1e-6
NOISE = 1e-12  # what is left in float64 where large terms cancel

# A cap on top of the yardstick: relative Frobenius error by family and output dtype (SPECS 0.3).
CAP = {
    ("gemm", "bfloat16"): 3e-3,
    ("gemm", "float16"): 5e-4,
    ("norm", "bfloat16"): 3e-3,
    ("norm", "float16"): 5e-4,
    ("attention", "bfloat16"): 8e-3,  # dq and dk; e* is what holds o and dv
    ("attention", "float16"): 2e-3,
    ("scan", "bfloat16"): 1.5e-2,  # gradients of gates; e* is what holds the rest
    ("scan", "float16"): 5e-3,
}
# Roundings of 16-bit factors add up to nearly nothing or to several times the usual, as luck has
# it: the model's error says what is usual only where there are more numbers than this. Of fewer in
# float32, which are sums of such products, the cap alone is asked.
FEW = 64
# SPECS 0.3 for gradients of gates in float32, of however many numbers.
GATES = 1e-4
# of a number in a dtype of 16 bits, relative to it
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11}


@dataclass(frozen=True)
class Verdict:
    """What the judge says of one output. On failure: `reason`, a word, and `detail`, a sentence."""

    output: str
    ok: bool
    reason: str = ""
    detail: str = ""
    error: float = math.nan
    yardstick: float = math.nan
    worst_tile: int = -1  # the tile of 64 rows with the largest error over its limit
    first_wrong: tuple[int, ...] = field(default=())

    def to_json(self) -> dict:
        return asdict(self)


def limit(family: str, spec: Array, yardstick: float, terms: int) -> float:
    """The largest relative error allowed over a whole array whose sums have `terms` terms."""
    allowed = 1.5 * yardstick + FLOOR
    if spec.dtype != "float32":
        return min(allowed, CAP.get((family, spec.dtype), math.inf))
    # no rounding of the output to hide behind: SPECS 0.3 for a sum of that length
    allowed = max(allowed, 2e-6 * math.sqrt(max(1, terms) / 1024) + 1e-6)
    if spec.of:
        few = math.prod(spec.shape) < FEW
        allowed = max(allowed, CAP[family, spec.of] if few else GATES)
    return allowed


def judge(
    output: str, y: Any, r: Any, model: Any, spec: Array, *, family: str, terms: int
) -> Verdict:
    """Compares one output with the truth.

    Args:
        output: its name, for the verdict.
        y: what the kernel returned, in its storage dtype.
        r: the float64 oracle.
        model: the same mathematics in float32, not yet rounded to the storage dtype.
        spec: the shape and dtype y must have.
        family: "gemm", "norm", "attention" or "scan", the row of SPECS 0.3 that caps the error.
        terms: how many terms the sum behind an element has.
    """
    if tuple(y.shape) != tuple(spec.shape):
        return Verdict(
            output, False, "shape", f"{output} is {_s(y.shape)}, expected {_s(spec.shape)}"
        )
    if dtype_name(y.dtype) != spec.dtype:
        return Verdict(
            output, False, "dtype", f"{output} is {dtype_name(y.dtype)}, expected {spec.dtype}"
        )
    if math.prod(spec.shape) == 0:
        return Verdict(output, True, error=0.0, yardstick=0.0)
    if spec.exact or "int" in spec.dtype:  # a bound, an index, a code: right or wrong
        return judge_exact(output, y, r, spec)

    xp = array_api_compat.array_namespace(r)
    y, r, model = (_rows(x) for x in (y, r, model))
    error, truth, allowed, biggest, worst, lean, weight = [], [], [], 0.0, 0.0, 0.0, 0.0
    for start in range(0, y.shape[0], step := _rows_at_once(y.shape[1])):
        rows = slice(start, start + step)
        yb, rb = xp.astype(y[rows, :], xp.float64), r[rows, :]
        stored = _stored(xp, rb, spec.dtype)
        wrong = ~_same_kind(xp, yb, rb, stored, family, spec)
        if bool(xp.any(wrong)):
            at = _first(xp, wrong, start)
            got, want = (float(v[at[0] - start, at[1]]) for v in (yb, rb))
            # a leftover NaN is unwritten memory
            reason = "zeros" if math.isfinite(got) and math.isfinite(want) else "nonfinite"
            where = _unflat(at, spec.shape)
            return Verdict(
                output,
                False,
                reason,
                f"{output}{list(where)} is {got:g}, expected {want:g}",
                first_wrong=where,
            )
        finite = xp.isfinite(stored)
        zero = xp.zeros_like(rb)
        mb = _stored(xp, model[rows, :], spec.dtype)
        rb = xp.where(finite, rb, zero)  # first: infinities have no difference
        dy = xp.where(finite, yb, zero) - rb
        dm = xp.where(xp.isfinite(mb), xp.where(finite, mb, zero) - rb, zero)
        error.append(_host(xp.sum(dy * dy, axis=1)))
        allowed.append(_host(xp.sum(dm * dm, axis=1)))
        truth.append(_host(xp.sum(rb * rb, axis=1)))
        biggest = max(biggest, float(xp.max(xp.abs(rb))))
        worst = max(worst, float(xp.max(xp.abs(dy))))
        lean += float(xp.sum(xp.sign(rb) * dy))
        weight += float(xp.sum(xp.abs(rb)))

    err2, mod2, ref2 = (np.concatenate(v) for v in (error, allowed, truth))
    norm = math.sqrt(ref2.sum()) or 1.0
    e, yardstick = math.sqrt(err2.sum()) / norm, math.sqrt(mod2.sum()) / norm
    bound = limit(family, spec, yardstick, terms)

    tiles = [np.add.reduceat(v, np.arange(0, len(v), TILE_ROWS)) for v in (err2, mod2, ref2)]
    tile_norm = np.sqrt(np.where(tiles[2] > 0, tiles[2], 1.0))
    tile_e, tile_star = np.sqrt(tiles[0]) / tile_norm, np.sqrt(tiles[1]) / tile_norm
    # float32 outputs: a tile may have what the whole may have
    tile_bound = np.maximum(3 * np.maximum(tile_star, yardstick) + FLOOR, bound)
    tile = int(np.argmax(tile_e / tile_bound))

    bias = abs(lean) / (weight or 1.0)
    # fair rounding leans by about e* / sqrt(elements), truncation by about e*
    bias_bound = yardstick * (0.25 + 8 / math.sqrt(math.prod(spec.shape))) + FLOOR

    fails = detail = ""
    if e > bound:
        fails = "norm"
        detail = f"{output}: error {e:.3g} exceeds {bound:.3g} (the model's own is {yardstick:.3g})"
    elif tile_e[tile] > tile_bound[tile]:
        fails = "tile"
        detail = (
            f"{output}: tile {tile} has error {tile_e[tile]:.3g}, allowed {tile_bound[tile]:.3g}"
        )
    elif worst > 10 * bound * biggest:
        fails = "peak"
        detail = (
            f"{output}: largest error {worst:.3g} exceeds {10 * bound:.3g} of the largest element"
        )
    elif bias > bias_bound and spec.dtype != "float32":
        fails = "bias"
        side = "small" if lean < 0 else "large"
        detail = f"{output}: magnitudes are {bias:.3g} too {side} on average, as if truncated"
    if not fails:
        return Verdict(output, True, "", "", e, yardstick, tile)
    at = _first_large(xp, y, r, tile, float(3 * max(tile_star[tile], yardstick) + FLOOR))
    where = _unflat(at, spec.shape)
    return Verdict(
        output, False, fails, f"{detail}; first at {list(where)}", e, yardstick, tile, where
    )


def wrong_elements(
    y: Any, r: Any, model: Any, spec: Array, *, family: str, terms: int
) -> tuple[np.ndarray, float]:
    """(bool [rows, columns]: which elements are out of line by themselves, the relative error that
    a tile may have).

    An element is, if it is finite, NaN or zero where the truth is not, or off by more than four
    times what a tile may be off, measured against itself or its row. Takes NumPy arrays.
    """
    stored = _stored(np, r, spec.dtype)
    finite = np.isfinite(stored)
    truth = np.where(finite, r, 0.0)
    norm = math.sqrt(float((truth**2).sum())) or 1.0
    rounded = _stored(np, model, spec.dtype)
    off = np.where(finite & np.isfinite(rounded), rounded, truth) - truth
    yardstick = math.sqrt(float((off**2).sum())) / norm
    allowed = max(3 * yardstick + FLOOR, limit(family, spec, yardstick, terms))
    row = np.sqrt((truth**2).mean(axis=1, keepdims=True))
    far = np.abs(np.where(finite, y, 0.0) - truth) > 4 * allowed * np.maximum(np.abs(truth), row)
    return ~_same_kind(np, y, r, stored, family, spec) | far, allowed


def judge_exact(output: str, y: Any, r: Any, spec: Array) -> Verdict:
    """The integer probe: y must equal r, rounded once to the storage dtype, bit for bit."""
    xp = array_api_compat.array_namespace(r)
    if tuple(y.shape) != tuple(spec.shape) or dtype_name(y.dtype) != spec.dtype:
        return judge(output, y, r, r, spec, family="gemm", terms=1)
    if math.prod(spec.shape) == 0:
        return Verdict(output, True, error=0.0, yardstick=0.0)
    y, r = _rows(y), _rows(r)
    count, first = 0, None
    for start in range(0, y.shape[0], step := _rows_at_once(y.shape[1])):
        rows = slice(start, start + step)
        wrong = xp.astype(y[rows, :], xp.float64) != _stored(xp, r[rows, :], spec.dtype)
        if bool(xp.any(wrong)):
            count += int(xp.sum(xp.astype(wrong, xp.int64)))
            first = first or _first(xp, wrong, start)
    if first is None:
        return Verdict(output, True, error=0.0, yardstick=0.0)
    where = _unflat(first, spec.shape)
    got, want = float(y[first[0], first[1]]), float(r[first[0], first[1]])
    detail = (
        f"{output}{list(where)} is {got:g} on whole numbers, expected exactly {want:g} "
        f"({count / math.prod(spec.shape):.1%} of the elements are off)"
    )
    return Verdict(output, False, "probe", detail, first_wrong=where)


def judge_twins(
    output: str, a: Any, b: Any, r: Any, yardstick: float, spec: Array, bound: float
) -> Verdict:
    """The twins may differ by at most 3 e* ||r|| (float32 outputs: by twice the larger bound)."""
    xp = array_api_compat.array_namespace(r)
    a, b, r = (_rows(x) for x in (a, b, r))
    gap = norm = 0.0
    for start in range(0, r.shape[0], step := _rows_at_once(r.shape[1])):
        rows = slice(start, start + step)
        rb = r[rows, :]
        finite = xp.isfinite(rb)
        ab, bb, rb = (
            xp.where(finite, xp.astype(x, xp.float64), xp.zeros_like(rb))
            for x in (a[rows, :], b[rows, :], rb)
        )
        gap += float(xp.sum((ab - bb) ** 2))
        norm += float(xp.sum(rb**2))
    apart = math.sqrt(gap) / (math.sqrt(norm) or 1.0)
    allowed = max(3 * yardstick + FLOOR, 2 * bound if spec.dtype == "float32" else 0.0)
    if apart <= allowed:
        return Verdict(output, True, error=apart, yardstick=yardstick)
    detail = f"{output}: the twins are {apart:.3g} apart, allowed {allowed:.3g}"
    return Verdict(output, False, "twins", detail, apart, yardstick)


def ulp_histogram(a: Any, b: Any, largest: int = 8) -> dict[str, float]:
    """Shares of elements by distance in units in the last place: {"0": .., "1": .., ..., ">8": ..}.

    Takes arrays of one storage dtype, on the host or a GPU. Floats of one sign order like their bit
    patterns read as integers.
    """
    xp = array_api_compat.array_namespace(a, b)
    bits = getattr(xp, f"int{8 * a.dtype.itemsize}")
    lowest = -(1 << (8 * a.dtype.itemsize - 1))  # the bits of -0.0

    def ordered(x: Any) -> Any:
        pattern = xp.astype(x.view(bits), xp.int64)
        return xp.where(pattern < 0, lowest - pattern, pattern)

    counts = [0] * (largest + 2)
    a, b = _rows(a), _rows(b)
    for start in range(0, a.shape[0], step := _rows_at_once(a.shape[1])):
        rows = slice(start, start + step)
        steps = xp.abs(ordered(a[rows, :]) - ordered(b[rows, :]))
        for d in range(largest + 1):
            counts[d] += int(xp.count_nonzero(steps == d))
        counts[-1] += int(xp.count_nonzero(steps > largest))
    names = [*map(str, range(largest + 1)), f">{largest}"]
    size = max(1, math.prod(a.shape))
    return {name: count / size for name, count in zip(names, counts, strict=True) if count}


def truth_and_model(problem: Problem, work: Workload, which: str, arrays: dict[str, Any]) -> tuple:
    """(truth, model) of one pass, tuples in the order of its outputs; the judge rounds model."""
    xp = array_api_compat.array_namespace(*arrays.values())
    return tuple(
        answer(problem, work, which, arrays, ar)
        for ar in (Arithmetic.truth(xp), Arithmetic.model(xp))
    )


def answer(
    problem: Problem, work: Workload, which: str, arrays: dict[str, Any], ar: Arithmetic
) -> tuple:
    """What the oracle of one pass says in that arithmetic."""
    return problem.oracle_of(which)(ar, work, **arrays)


def _stored(xp: Any, x: Any, dtype: str) -> Any:
    with np.errstate(over="ignore"):  # beyond the dtype: infinity is the rounded truth
        return xp.astype(xp.astype(x, dtype_named(xp, dtype)), xp.float64)


def _same_kind(xp: Any, y: Any, r: Any, stored: Any, family: str, spec: Array) -> Any:
    """True where y is finite, NaN, infinite or zero as the truth is."""
    rounded = spec.few or family in ("attention", "scan")
    least = max(1e-3, 4 * ROUNDING.get(spec.dtype, 0.0)) if rounded else 1e-3
    finite = xp.isfinite(stored)
    size = xp.where(finite, xp.abs(r), xp.zeros_like(r))
    row = xp.sqrt(xp.mean(size**2, axis=1 if r.shape[1] > 1 else 0, keepdims=True))
    noise = NOISE * xp.max(size) if family == "scan" else 0.0
    skipped = (y == 0) & (stored != 0) & (size > least * row) & (size > noise)
    by_chance = FLOOR * row if family == "gemm" else 0 * row
    right = xp.isfinite(y) & finite & ((r != 0) | (xp.abs(y) <= by_chance)) & ~skipped
    return right | (~finite & (y == stored)) | (xp.isnan(y) & xp.isnan(stored))


def _rows(x: Any) -> Any:
    if x.ndim <= 1:
        return x.reshape(-1, 1)
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # -1 fails where a size is 0


def _rows_at_once(columns: int) -> int:
    """A multiple of the tile height, about 2^27 elements: temporaries stay at a few GB."""
    return max(1, (1 << 27) // max(1, columns) // TILE_ROWS) * TILE_ROWS


def _host(x: Any) -> np.ndarray:
    return x if isinstance(x, np.ndarray) else x.cpu().numpy()


def _first(xp: Any, wrong: Any, start: int) -> tuple[int, int]:
    flat = int(xp.argmax(xp.astype(xp.reshape(wrong, (-1,)), xp.int32)))
    return start + flat // wrong.shape[1], flat % wrong.shape[1]


def _first_large(xp: Any, y: Any, r: Any, tile: int, bound: float) -> tuple[int, int]:
    """The first element of the worst tile whose own error is out of line with the tile's scale."""
    rows = slice(tile * TILE_ROWS, (tile + 1) * TILE_ROWS)
    rb, zero = r[rows, :], xp.zeros_like(r[rows, :])
    finite = xp.isfinite(rb)
    rb = xp.where(finite, rb, zero)
    d = xp.abs(xp.where(finite, xp.astype(y[rows, :], xp.float64), zero) - rb)
    scale = xp.sqrt(xp.mean(rb**2))
    wrong = d > xp.maximum(4 * bound * scale, xp.max(d) / 4)
    return _first(xp, wrong, rows.start)


def _unflat(at: tuple[int, int], shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) <= 1:
        return (at[0],)
    return tuple(int(i) for i in np.unravel_index(at[0] * shape[-1] + at[1], shape))


def _s(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
