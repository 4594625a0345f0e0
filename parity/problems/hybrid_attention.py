"""Attention over packed sequences of causal text and of images that see all of themselves.

    o[q, h] = sum_j p[q, j] v[j, h / G]      over the j that q sees; G = Hq / Hk heads share k and v
    p[q, j] = exp(x[q, j] - lse[h, q])       lse[h, q] = log sum_j exp(x[q, j])
    x[q, j] = scale * q[q, h] . k[j, h / G]  softcap * tanh(x / softcap) if softcap is given,
                                             - slope[h] |pos[q] - pos[j]| with ALiBi
    q [T, Hq, D]   k, v [T, Hk, D]   ->   o [T, Hq, D], lse [Hq, T] float32
    q sees j  iff  kv_start[q] <= j < kv_end[q]  and  noise_id[j] is -1 or noise_id[q]

Segments tile the tokens. CAUSAL: text, sees what is before it. FULL: an image, sees all of itself
too. NOISE: an image under diffusion, likewise, but nobody else sees it. PAD, a sequence of its own
or what is after the last, sees nothing: o is 0 and lse -inf. A window of W leaves a token the last
W, and an image the whole of itself. Intervals grow with q: a tile of queries needs one interval of
keys, and a key one interval of queries.

    hybrid_plan: bounds for every token, for every tile of 64, and the longest tiles first
    for every tile of queries (mi, h):
        for every tile of keys in its interval (ni): skip, or mask, or not even that
            x = q[mi] @ k[ni]^T; online softmax
            acc += p @ v[ni]                     float32, in registers
        o[mi] = acc / row_sum

Backward, with delta = sum_d do * o - dlse:   dx = p * (do @ v^T - delta)
    dv = p^T @ do    dq = scale * dx @ k    dk = scale * dx^T @ q
    and under a softcap dx is multiplied by 1 - tanh^2
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np

from parity.spec import Arithmetic, Array, Cost, Further, Given, Normal, Problem, Workload

CAUSAL, FULL, NOISE, PAD = range(4)
TILE, ORDERED = 64, 128  # tokens that a row of `tiles`, an entry of `q_order` stands for

META = ("cu_seqlens", "seg_off", "seg_mode", "pos")
PLAN = (
    "kv_start", "kv_end", "noise_id", "q_start", "q_end", "token_pos", "tiles", "q_order", "k_order"
)  # fmt: skip

# Layouts: for every sequence its segments, (length, mode).

Layout = list[list[tuple[int, int]]]


def _ci() -> Layout:
    """All four modes; a segment of one token; two images under diffusion side by side; a sequence
    without tokens; an image that crosses tiles; one under diffusion that comes first; a sequence
    of three tiles."""
    return [
        [(30, CAUSAL), (131, FULL), (1, CAUSAL), (20, NOISE), (33, NOISE), (57, CAUSAL)],
        [],
        [(5, NOISE), (1, FULL), (7, CAUSAL), (1, NOISE), (2, CAUSAL)],
        [(3, PAD)],
        [(7, CAUSAL), (5, FULL)],
    ]


def _ci_short() -> Layout:
    """Most of that within two tiles."""
    first = [(30, CAUSAL), (40, FULL), (1, CAUSAL), (20, NOISE), (17, NOISE), (9, CAUSAL)]
    return [first, [], [(3, PAD)], [(11, CAUSAL)]]


def _bagel(total: int) -> Layout:
    """Documents as BAGEL packs them: text, an image to understand, one to generate, text."""
    rng = np.random.default_rng(total)
    made: Layout = []
    left = total
    while left:
        drawn = [
            (int(rng.integers(50, 501)), CAUSAL),
            (int(rng.integers(256, 4901)) + 2, FULL),
            (int(rng.integers(1024, 4097)) + 2, NOISE),
            (int(rng.integers(50, 501)), CAUSAL),
        ]
        document = []
        for length, mode in drawn:
            if length <= left:
                document.append((length, mode))
                left -= length
        if not document:  # the rest is text
            document, left = [(left, CAUSAL)], 0
        made.append(document)
    return made


def _jagged(total: int, median: int) -> Layout:
    rng = np.random.default_rng(total)
    made: Layout = []
    left = total
    while left:
        length = min(left, max(1, int(rng.lognormal(np.log(median), 1.0))))
        made.append([(length, CAUSAL)])
        left -= length
    return made


SPANS = [(512, CAUSAL), (1024, FULL), (256, CAUSAL), (1024, FULL), (1280, CAUSAL)]

LAYOUTS: Mapping[str, Callable[[], Layout]] = {
    "ci_alibi": _ci_short,
    "ci_d256": _ci_short,
    "bagel_32k": lambda: _bagel(32768),
    "bagel_36k": lambda: _bagel(36864),
    "pack_16k": lambda: 4 * [SPANS],
    "transfusion_4k": lambda: [[(200, CAUSAL), (1024, FULL)] * 3 + [(424, CAUSAL)]],
    "gemma_window_d256": lambda: [[(700, CAUSAL), (256, FULL)] * 8 + [(544, CAUSAL)]],
    "prefix_8k_2k": lambda: [[(2048, FULL), (6144, CAUSAL)]],
    "jagged_8k": lambda: _jagged(8192, 540),
    "jagged_1m": lambda: _jagged(1_048_704, 540),
    "video_120x256": lambda: [[(64, CAUSAL)] + [(256, FULL), (8, CAUSAL)] * 120],
    "dense_causal_16k": lambda: [[(16384, CAUSAL)]],
    "dense_full_16k": lambda: [[(16384, FULL)]],
}


def _ci_work(name: str, T: int, Hq: int, Hk: int, D: int, W: int = 0, **more: Any) -> Workload:
    sizes = {"T": T, "Hq": Hq, "Hk": Hk, "D": D} | ({"W": W} if W else {})
    more = {"absent": ("pos", "alibi")} | more
    return Workload(name, sizes, "float16", ("ci",), **more)


def _model(
    name: str, T: int, Hq: int, Hk: int, D: int, *tags: str, W: int = 0, **more: Any
) -> Workload:
    sizes = {"T": T, "Hq": Hq, "Hk": Hk, "D": D} | ({"W": W} if W else {})
    tags = ("model", "compute-bound", *tags)
    return Workload(name, sizes, "bfloat16", tags, absent=("pos", "alibi"), **more)


PLANNED = ("fwd", "bwd", "plan")

WORKLOADS = (
    _ci_work("ci", 307, 2, 1, 128, passes=PLANNED),
    _ci_work("ci_window", 307, 1, 1, 96, W=37, passes=PLANNED, options={"softcap": 2.5}),
    _ci_work("ci_alibi", 139, 4, 2, 64, W=1, absent=(), options={"scale": 0.21}),
    _ci_work("ci_d256", 139, 1, 1, 256),
    _model("bagel_32k", 32768, 28, 4, 128, passes=PLANNED),
    _model("bagel_36k", 36864, 28, 4, 128, passes=PLANNED),
    _model("pack_16k", 16384, 16, 16, 128, passes=PLANNED),
    _model("transfusion_4k", 4096, 32, 32, 128),
    _model("gemma_window_d256", 8192, 16, 8, 256, W=1024),
    _model("prefix_8k_2k", 8192, 32, 8, 128),
    _model("jagged_8k", 8192, 32, 8, 128),
    _model("video_120x256", 31744, 28, 4, 128),
    _model("dense_causal_16k", 16384, 16, 16, 128),
    _model("dense_full_16k", 16384, 16, 16, 128),
    _model("jagged_1m", 1_048_704, 16, 2, 128, "huge"),  # q beyond 2^31 elements
)


# Metadata: what the kernels are told, and what a plan makes of it.


@cache
def _meta(name: str, T: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(cu_seqlens, seg_off, seg_mode) with an unused entry each; what exceeds T is cut off."""
    layout = LAYOUTS.get(name, _ci)()
    lengths = [sum(length for length, _ in sequence) for sequence in layout]
    segments = [segment for sequence in layout for segment in sequence]
    ends = np.cumsum([length for length, _ in segments])
    # tokens that no sequence has are a PAD segment; the last entry of each is a spare one
    cu = np.minimum([0, *np.cumsum(lengths), sum(lengths)], T)
    off = np.minimum([0, *ends, T, T], T)
    mode = np.array([*(mode for _, mode in segments), PAD, PAD])
    return cu.astype(np.int32), off.astype(np.int32), mode.astype(np.int8)


def meta_of(work: Workload) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return _meta(work.name, work["T"])


def planned(
    cu_seqlens: np.ndarray, seg_off: np.ndarray, seg_mode: np.ndarray, pos: Any, T: int, W: int = 0
) -> tuple[np.ndarray, ...]:
    """The plan, array by array as PLAN names them, in plain words of NumPy. W: 0 is no window."""
    t = np.arange(T)
    g = np.searchsorted(seg_off, t, side="right") - 1
    s = np.searchsorted(cu_seqlens, t, side="right") - 1
    inside = (g < len(seg_mode)) & (s < len(cu_seqlens) - 1)
    g, s = np.minimum(g, len(seg_mode) - 1), np.minimum(s, len(cu_seqlens) - 2)
    mode, a, b = seg_mode[g], seg_off[g], seg_off[g + 1]
    first, last = cu_seqlens[s], cu_seqlens[s + 1]
    live = inside & (mode != PAD)
    reach = W or T + 1
    image = (mode == FULL) | (mode == NOISE)
    oldest = t - reach + 1
    kv_start = np.maximum(first, np.where(image, np.minimum(a, oldest), oldest))
    kv_end = np.where(image, b, t + 1)
    q_start = np.where(image, a, t)
    latest = np.minimum(last, np.maximum(t + reach, np.where(image, b, t + 1)))
    q_end = np.where(mode == NOISE, b, latest)
    noise = np.where(live & (mode == NOISE), g, -1)
    kv_start, kv_end, q_start, q_end = (
        np.where(live, x, t) for x in (kv_start, kv_end, q_start, q_end)
    )
    rows = []
    for start in range(0, T, TILE):
        tile = slice(start, min(start + TILE, T))
        alive = live[tile]
        # a tile with a token that sees nothing, or that overhangs, is never free of a mask
        whole = bool(alive.all()) and start + TILE <= T
        rows.append([
            min(kv_start[tile][alive], default=T), max(kv_start[tile]) if whole else T,
            min(kv_end[tile]) if whole else 0, max(kv_end[tile][alive], default=0),
            min(noise[tile]), max(noise[tile]),
            min(q_start[tile][alive], default=T), max(q_end[tile][alive], default=0),
        ])  # fmt: skip
    tiles = np.array(rows).reshape(-1, 8)

    def longest_first(start: np.ndarray, end: np.ndarray) -> np.ndarray:
        step = ORDERED // TILE
        at = np.arange(0, len(tiles), step)
        length = np.maximum.reduceat(end, at) - np.minimum.reduceat(start, at)
        return np.argsort(-np.maximum(0, length), kind="stable")

    orders = longest_first(tiles[:, 0], tiles[:, 3]), longest_first(tiles[:, 6], tiles[:, 7])
    where = t if pos is None else pos
    found = (kv_start, kv_end, noise, q_start, q_end, where, tiles, *orders)
    return tuple(np.asarray(x).astype(np.int32) for x in found)


@cache
def _plan(name: str, T: int, W: int) -> tuple[np.ndarray, ...]:
    pos = _positions(name, T) if name == "ci_alibi" else None
    return planned(*_meta(name, T), pos, T, W)


def plan_of(work: Workload) -> dict[str, np.ndarray]:
    return dict(zip(PLAN, _plan(work.name, work["T"], work.sizes.get("W", 0)), strict=True))


def _positions(name: str, T: int) -> np.ndarray:
    """One position for all of an image, as BAGEL numbers its tokens."""
    _, off, mode = _meta(name, T)
    lengths = np.diff(off)
    steps = [np.ones(n) if m == CAUSAL else np.arange(n) < 1
             for n, m in zip(lengths, mode, strict=True)]  # fmt: skip
    return np.cumsum(np.concatenate(steps)).astype(np.int32)


def _dead(work: Workload) -> tuple[tuple[int, int], ...]:
    """The runs of tokens that see nothing: their memory holds NaN."""
    plan = plan_of(work)
    dead = np.concatenate([[False], plan["kv_start"] == plan["kv_end"], [False]])
    edges = np.flatnonzero(dead[1:] != dead[:-1])
    return tuple((int(a), int(b)) for a, b in edges.reshape(-1, 2))


def _slopes(work: Workload) -> np.ndarray:
    heads = np.arange(1, work["Hq"] + 1)
    return (2.0 ** (-8 * heads / work["Hq"])).astype(np.float32)


def inputs(work: Workload) -> dict:
    T, D = work["T"], work["D"]
    dead = _dead(work)
    of_plan = {n: Given(x.shape, "int32", lambda x=x: x) for n, x in plan_of(work).items()}
    cu, off, mode = meta_of(work)
    given = {
        "q": Normal((T, work["Hq"], D), work.dtype, dead=dead),
        "k": Normal((T, work["Hk"], D), work.dtype, dead=dead),
        "v": Normal((T, work["Hk"], D), work.dtype, dead=dead),
        **of_plan,
        "cu_seqlens": Given(cu.shape, "int32", lambda: cu),
        "seg_off": Given(off.shape, "int32", lambda: off),
        "seg_mode": Given(mode.shape, "int8", lambda: mode),
        "pos": Given((T,), "int32", lambda: _positions(work.name, T)),
        "alibi": Given((work["Hq"],), "float32", lambda: _slopes(work)),
    }
    return {name: d for name, d in given.items() if name not in work.absent}


def outputs(work: Workload) -> dict[str, Array]:
    T, Hq = work["T"], work["Hq"]
    return {"o": Array((T, Hq, work["D"]), work.dtype), "lse": Array((Hq, T), "float32")}


def cotangents(work: Workload) -> dict:
    o, lse = outputs(work).values()
    dead = _dead(work)
    return {
        "do": Normal(o.shape, o.dtype, dead=dead),
        "dlse": Normal(lse.shape, lse.dtype, dead=dead, axis=1),
    }


def grads(work: Workload) -> dict[str, Array]:
    T, D = work["T"], work["D"]
    heads = {"dq": work["Hq"], "dk": work["Hk"], "dv": work["Hk"]}
    return {name: Array((T, H, D), work.dtype) for name, H in heads.items()}


# The oracle: blocks of queries against their interval of keys, in full.


def _alive(ar: Arithmetic, x: Any, live: Any) -> Any:
    """x [T, heads, D] as [heads, T, D] in the working precision, zero where a token is dead."""
    x = ar.xp.where(live[:, None, None], ar.lift(x), ar.xp.zeros_like(ar.lift(x[:1, :1, :1])))
    return ar.xp.permute_dims(x, (1, 0, 2))


def _host(x: Any) -> np.ndarray:
    return x if isinstance(x, np.ndarray) else x.cpu().numpy()


def _on(like: Any, x: np.ndarray) -> Any:
    """A host array where the others are."""
    if isinstance(like, np.ndarray):
        return x
    import array_api_compat

    xp = array_api_compat.array_namespace(like)
    return xp.asarray(x, device=array_api_compat.device(like))


def _blocks(work: Workload, plan: Mapping[str, Any]) -> Iterator[tuple[slice, slice]]:
    """(queries, the interval of keys that they see), small enough for float64 scores."""
    G, start, T = work["Hq"] // work["Hk"], 0, work["T"]
    kv_start, kv_end = (_host(plan[n]) for n in ("kv_start", "kv_end"))
    while start < T:
        stop = min(start + 1024, T)
        while True:
            rows = slice(start, stop)
            live = kv_end[rows] > kv_start[rows]
            if not live.any():
                break
            first, last = kv_start[rows][live].min(), kv_end[rows][live].max()
            if stop - start <= 64 or G * (stop - start) * (last - first) <= 1 << 26:
                yield rows, slice(int(first), int(last))
                break
            stop = start + (stop - start) // 2
        start = stop


def _scores(
    ar: Arithmetic, work: Workload, q: Any, k: Any, bounds: Mapping[str, Any], alibi: Any,
    rows: slice, keys: slice,
) -> tuple[Any, Any]:  # fmt: skip
    """(x [G, rows, keys], 1 - tanh^2 or None); -inf where a query does not see a key."""
    xp = ar.xp
    x = work.options.get("scale", work["D"] ** -0.5) * (q @ k.T)
    slope = None
    if softcap := work.options.get("softcap", 0.0):
        bent = xp.tanh(x / softcap)
        x, slope = softcap * bent, 1 - bent**2
    if alibi is not None:
        at = bounds["token_pos"]
        apart = xp.abs(at[rows][:, None] - at[keys][None, :])
        x = x - ar.lift(alibi)[:, None, None] * xp.astype(apart, x.dtype)
    j = bounds["token"][keys][None, :]
    noise = bounds["noise_id"][keys][None, :]
    seen = (j >= bounds["kv_start"][rows][:, None]) & (j < bounds["kv_end"][rows][:, None])
    seen = seen & ((noise < 0) | (noise == bounds["noise_id"][rows][:, None]))
    return xp.where(seen[None, :, :], x, xp.full_like(x[:1, :1, :1], -xp.inf)), slope


def _bounds(work: Workload, plan: Mapping[str, Any]) -> dict[str, Any]:
    """What the plan says of every token, and its number."""
    token = _on(plan["kv_start"], np.arange(work["T"], dtype=np.int32))
    return {**plan, "token": token, "live": plan["kv_end"] > plan["kv_start"]}


def _softmax(xp: Any, x: Any) -> tuple[Any, Any, Any]:
    """(exp(x - top), its sum, log of the sum of exp x) by rows; a row of -inf has 0, 1, -inf."""
    top = xp.max(x, axis=-1, keepdims=True)
    top = xp.where(top == -xp.inf, xp.zeros_like(top), top)
    e = xp.exp(x - top)
    total = xp.sum(e, axis=-1, keepdims=True)
    some = xp.where(total == 0, xp.ones_like(total), total)
    lse = xp.where(total == 0, xp.full_like(total, -xp.inf), top + xp.log(some))
    return e, some, lse[..., 0]


def _forward(
    ar: Arithmetic, work: Workload, q: Any, k: Any, v: Any, alibi: Any, bounds: Mapping[str, Any]
) -> tuple[Any, Any]:
    """(o [Hq, T, D], lse [Hq, T])"""
    xp, G = ar.xp, work["Hq"] // work["Hk"]
    q, k, v = (_alive(ar, x, bounds["live"]) for x in (q, k, v))
    o, lse = xp.zeros_like(q), ar.empty((work["Hq"], work["T"]), like=q)
    lse[...] = -xp.inf
    for rows, keys in _blocks(work, bounds):
        for h in range(work["Hk"]):
            heads = slice(h * G, (h + 1) * G)
            slopes = None if alibi is None else alibi[heads]
            x, _ = _scores(ar, work, q[heads, rows, :], k[h, keys, :], bounds, slopes, rows, keys)
            e, total, lse[heads, rows] = _softmax(xp, x)
            # the kernel multiplies p in 16 bits, before it divides
            o[heads, rows, :] = (ar.stored(e, work.dtype) @ v[h, keys, :]) / total
    return o, lse


def oracle(
    ar: Arithmetic, work: Workload, q: Any, k: Any, v: Any, alibi: Any = None, **plan: Any
) -> tuple[Any, Any]:
    o, lse = _forward(ar, work, q, k, v, alibi, _bounds(work, plan))
    return ar.xp.permute_dims(o, (1, 0, 2)), lse


def oracle_bwd(
    ar: Arithmetic, work: Workload, q: Any, k: Any, v: Any, do: Any, dlse: Any, alibi: Any = None,
    **plan: Any,
) -> tuple[Any, Any, Any]:  # fmt: skip
    xp, bounds, G = ar.xp, _bounds(work, plan), work["Hq"] // work["Hk"]
    scale = work.options.get("scale", work["D"] ** -0.5)
    o, lse = _forward(ar, work, q, k, v, alibi, bounds)
    q, k, v, do = (_alive(ar, x, bounds["live"]) for x in (q, k, v, do))
    delta = xp.sum(do * ar.stored(o, work.dtype), axis=-1)
    delta = delta - xp.where(bounds["live"][None, :], ar.lift(dlse), xp.zeros_like(delta))
    dq, dk, dv = xp.zeros_like(q), xp.zeros_like(k), xp.zeros_like(v)
    for rows, keys in _blocks(work, bounds):
        for h in range(work["Hk"]):
            heads = slice(h * G, (h + 1) * G)
            slopes = None if alibi is None else alibi[heads]
            x, bent = _scores(
                ar, work, q[heads, rows, :], k[h, keys, :], bounds, slopes, rows, keys
            )
            norm = lse[heads, rows][:, :, None]
            norm = xp.where(norm == -xp.inf, xp.zeros_like(norm), norm)
            p = xp.exp(x - norm)
            dp = do[heads, rows, :] @ v[h, keys, :].T
            dx = p * (dp - delta[heads, rows][:, :, None])
            dx = dx if bent is None else dx * bent
            p, dx = ar.stored(p, work.dtype), ar.stored(dx, work.dtype)
            dq[heads, rows, :] = scale * (dx @ k[h, keys, :])
            for i in range(G):
                dv[h, keys, :] += p[i, :, :].T @ do[h * G + i, rows, :]
                dk[h, keys, :] += scale * (dx[i, :, :].T @ q[h * G + i, rows, :])
    return tuple(xp.permute_dims(x, (1, 0, 2)) for x in (dq, dk, dv))  # type: ignore[return-value]


def _plan_outputs(work: Workload) -> dict[str, Array]:
    return {n: Array(x.shape, "int32") for n, x in plan_of(work).items()}


def oracle_plan(ar: Arithmetic, work: Workload, **meta: Any) -> tuple[Any, ...]:
    like = next(iter(meta.values()))
    return tuple(ar._cast(_on(like, x), ar.working) for x in plan_of(work).values())


# Cost.


@cache
def _visible(name: str, T: int, W: int) -> int:
    """How many pairs of a query and a key see each other."""
    kv_start, kv_end, noise = _plan(name, T, W)[:3]
    before = np.concatenate([[0], np.cumsum(noise < 0, dtype=np.int64)])  # clean tokens before t
    _, own = np.unique(noise[noise >= 0], return_counts=True)
    return int((before[kv_end] - before[kv_start]).sum() + (own.astype(np.int64) ** 2).sum())


def cost(work: Workload, which: str) -> Cost:
    T, Hq, Hk, D, item = work["T"], work["Hq"], work["Hk"], work["D"], work.itemsize
    if which == "plan":
        made = sum(x.size for x in plan_of(work).values())
        return Cost(8 * T, 4 * made + sum(x.nbytes for x in meta_of(work)))
    visible = _visible(work.name, T, work.sizes.get("W", 0))
    q, kv, lse = T * Hq * D * item, T * Hk * D * item, 4 * Hq * T
    if which == "fwd":
        return Cost(4 * Hq * D * visible, 2 * q + 2 * kv + lse)
    return Cost(10 * Hq * D * visible, 4 * q + 4 * kv + 2 * lse)


def reduction(work: Workload, name: str) -> int:
    return work["D"] if name == "lse" else work["T"]


# Wrong answers that only these masks can have: see parity.faults.


def _changed(case: Any, change: Callable[[Any, Any], dict[str, Any]]) -> Any:
    """The answer to arrays that say something else: change(xp, arrays) has those that differ."""
    if case.which == "plan":
        return None
    arrays = dict(case.arrays)
    return case.recomputed(Arithmetic.model(case.xp), case.work, arrays | change(case.xp, arrays))


def sees_one_too_few(case: Any) -> Any:
    """The newest token that a query may see is hidden: its own, in text."""

    def change(xp: Any, a: Any) -> dict[str, Any]:
        live = a["kv_end"] > a["kv_start"]
        return {"kv_end": xp.where(live, a["kv_end"] - 1, a["kv_end"])}

    return _changed(case, change)


def sees_another_sequence(case: Any) -> Any:
    """The last token before its sequence, or its window, is seen too."""

    def change(xp: Any, a: Any) -> dict[str, Any]:
        live = a["kv_end"] > a["kv_start"]
        return {"kv_start": xp.where(live & (a["kv_start"] > 0), a["kv_start"] - 1, a["kv_start"])}

    return _changed(case, change)


def noise_seen_by_all(case: Any) -> Any:
    """An image under diffusion is seen by what follows it."""
    return _changed(case, lambda xp, a: {"noise_id": 0 * a["noise_id"] - 1})


def images_masked_as_text(case: Any) -> Any:
    """Images are causal too."""

    def change(xp: Any, a: Any) -> dict[str, Any]:
        after = _on(a["kv_end"], np.arange(1, case.work["T"] + 1, dtype=np.int32))
        return {"kv_end": xp.where(a["kv_end"] > after, after, a["kv_end"])}

    return _changed(case, change)


def wrong_kv_head(case: Any) -> Any:
    """Query heads take their keys from the neighbour of their own head."""
    return _changed(case, lambda xp, a: {"k": xp.roll(a["k"], 1, axis=1)})


def lse_in_bits(case: Any) -> Any:
    """lse in units of log 2, as the kernel's exponentials have it."""
    if case.which != "fwd":
        return None
    return (case.good[0], case.good[1] / np.float32(np.log(2)))


def dlse_ignored(case: Any) -> Any:
    """Whoever differentiates through lse gets nothing of it."""
    if case.which != "bwd":
        return None
    return _changed(case, lambda xp, a: {"dlse": xp.zeros_like(a["dlse"])})


def dead_tokens_not_zero(case: Any) -> Any:
    """Tokens that see nothing get what the last one that does has."""
    dead = _dead(case.work)
    if case.which != "fwd" or not dead:
        return None

    def edit(o: Any) -> None:
        o[dead[-1][0] : dead[-1][1], ...] = o[dead[-1][0] - 1, ...]

    return case.edited(edit)


def bound_off_by_one(case: Any) -> Any:
    """One token's bound in the plan is one off."""
    if case.which != "plan":
        return None

    def edit(kv_start: Any) -> None:
        kv_start[case.work["T"] // 2] += 1

    return case.edited(edit)


_NUMERIC = ("norm", "tile", "peak", "bias", "zeros")

PROBLEM = Problem(
    stem="hybrid_attention",
    doc=__doc__ or "",
    family="attention",
    workloads=WORKLOADS,
    inputs=inputs,
    cotangents=cotangents,
    outputs=outputs,
    grads=grads,
    oracle=oracle,
    oracle_bwd=oracle_bwd,
    cost=cost,
    reduction=reduction,
    implementations={
        "triton": "triton_kernels.hybrid_attention:hybrid_attention",
        "pallas": "pallas_kernels.hybrid_attention:hybrid_attention",
    },
    peers={
        "flex_attention": "parity.peers.attention:flex_attention",
        "sdpa_dense_mask": "parity.peers.attention:torch_sdpa",
        "cudnn": "parity.peers.attention:cudnn_attention",
        "jax.nn.cudnn": "parity.peers.attention:jax_cudnn_attention",
    },
    bwd_options=("scale", "softcap"),
    # where T is no multiple of a tile: bounds up to it, and results without what is beyond
    glue=("pad", "slice", "convert_element_type"),
    keywords=("alibi",),
    arguments=("q", "k", "v", "plan"),
    bundles={"plan": ("HybridPlan", PLAN), "meta": ("HybridMeta", META)},
    further={
        "plan": Further(
            "hybrid_plan",
            ("meta",),
            lambda work: {"window": work.sizes.get("W"), "tokens": work["T"]},
            _plan_outputs,
            oracle_plan,
        )
    },
    faults={
        sees_one_too_few: (*_NUMERIC, "nonfinite"),  # a window of one: nothing is left
        sees_another_sequence: _NUMERIC,
        noise_seen_by_all: _NUMERIC,
        images_masked_as_text: _NUMERIC,
        wrong_kv_head: _NUMERIC,
        lse_in_bits: _NUMERIC,
        dlse_ignored: _NUMERIC,
        dead_tokens_not_zero: ("zeros",),
        bound_off_by_one: ("probe",),
    },
)
