"""Linear attention whose state decays, over packed sequences: the core of RetNet and Mamba-2.

    S[t] = exp(g[t]) * S[t-1] + exp(i[t]) * k[t] v[t]^T     in a sequence; before it: S0[s], or 0
    y[t] = scale * q[t]^T S[t]                              S_T[s]: S after the last token, or S0[s]
    q, k [T, Hq, K]   v [T, H, V]   g <= 0 [T, H] or, the same at all times, [H]   i [T, H] or none
    S0 [B, H, K, V]   cu_seqlens [B + 1]   ->   y [T, H, V], S_T [B, H, K, V] float32
    Head h reads the queries and keys of head h // (H / Hq). g, i and states are float32.

    for every sequence and head, and every chunk of it, n tokens:
        b = cumsum(g);  u = exp(i)                    from here on only exponents <= 0
        W[t, j] = exp(b[t] - b[j]) * u[j]  for j <= t, else 0;  a[j] = exp(b[n] - b[j]) * u[j]
        y = (scale * q k^T * W) v + scale * exp(b) * (q S)
        S = exp(b[n]) * S + (a * k)^T v               float32, from chunk to chunk

Backward, chunks against time, with dS the gradient of the state that a chunk leaves:
    Z = scale * dy v^T * W;  R = Z * q k^T
    dq = Z k + scale * exp(b) * dy S^T    dk = Z^T q + a * v dS^T
    dv = (scale * q k^T * W)^T dy + a * k dS
    di = colsum(R) + st                  st = a * v . (k dS);  inter = scale * exp(b) * q . (dy S^T)
    db = rowsum(R) - colsum(R) + inter - st;  db[n] += sum(st) + exp(b[n]) * <dS, S>
    dg[t] = sum of db from t to the chunk's end
    dS = exp(b[n]) * dS + scale * (exp(b) * q)^T dy

A kernel multiplies 16-bit tiles, so the model rounds what enters a product and was not read from
memory: the weighted scores, Z, a * k, exp(b) * q, and S and dS as tiles; <dS, S> is that of the
tiles, which a kernel has at hand. What is carried from chunk to chunk, R, the gates and all sums
stay float32: S_T, dg and di are stored in float32 but made of those products, so that their
yardstick is the model's error and no rounding of a store.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from parity.problems.linear_scan import (
    NUMERIC,
    boundary_off_by_one,
    cu_seqlens,
    lengths,
    sequences,
    state_leaks,
)
from parity.spec import (
    Arithmetic,
    Array,
    Cost,
    Given,
    Integers,
    Normal,
    Problem,
    Uniform,
    Workload,
)

ARGUMENTS = ("q", "k", "v", "g", "i", "S0", "cu_seqlens")
STEEP = "steep"  # a tag: decays so strong that exp(-b) would overflow within a chunk
CONSTANT = "constant"  # a tag: g is the same at all times


def sizes(T: int, B: int, Hq: int, H: int, K: int, V: int) -> dict[str, int]:
    return {"T": T, "B": B, "Hq": Hq, "H": H, "K": K, "V": V}


def _ci(name: str, dims: dict[str, int], *tags: str, **more: Any) -> Workload:
    return Workload(name, dims, "float16", ("ci", "ragged", *tags), **more)


def _model(name: str, dims: dict[str, int], *tags: str) -> Workload:
    tags = ("model", "memory-bound", *tags)
    return Workload(name, dims, "bfloat16", tags, {"scale": dims["K"] ** -0.5}, ("i", "S0"))


WORKLOADS = (
    # 6 tokens, none, and 143: three chunks, the last one of 15; two groups of two heads
    _ci("ci", sizes(149, 3, 2, 4, 64, 64), options={"scale": 0.125}),
    _ci("ci_constant", sizes(155, 3, 1, 1, 128, 128), CONSTANT, absent=("i", "S0")),
    _ci("ci_steep", sizes(141, 3, 2, 2, 64, 64), STEEP, options={"scale": 0.21}, absent=("S0",)),
    _model("gla_k128", sizes(8 * 4096, 8, 16, 16, 128, 128)),
    _model("gla_64k", sizes(65536, 1, 16, 16, 128, 128)),
    _model("packed_32k", sizes(32768, 40, 16, 16, 128, 128), "ragged"),
    _model("gla_huge", sizes(262_656, 8, 4, 64, 64, 128), "huge"),  # v beyond 2^31 elements
)


def inputs(work: Workload) -> dict:
    T, H = work["T"], work["H"]
    whole_groups(H, work["Hq"])
    # A state lasts for some fifty tokens: what crosses chunks matters. In the few tokens of `ci`,
    # for twenty: what a gate's gradient is made of crosses many tokens, whose errors are one.
    low = -0.1 if "ci" in work.tags else -0.04
    low = -4.0 if STEEP in work.tags else low
    given = {
        "q": Normal((T, work["Hq"], work["K"]), work.dtype),
        "k": Normal((T, work["Hq"], work["K"]), work.dtype),
        "v": Normal((T, H, work["V"]), work.dtype),
        "g": Uniform((H,) if CONSTANT in work.tags else (T, H), "float32", low, 0.0),
        "i": Normal((T, H), "float32", std=0.7),
        "S0": Normal(state(work), "float32", std=5.0),
        "cu_seqlens": cu_seqlens(work),
    }
    return {name: d for name, d in given.items() if name not in work.absent}


def whole_groups(heads: int, groups: int) -> None:
    """Raises ValueError unless every group has as many heads as any other."""
    if groups < 1 or heads % groups:
        raise ValueError(f"{heads} heads make no {groups} groups of one size")


def state(work: Workload) -> tuple[int, ...]:
    return (work["B"], work["H"], work["K"], work["V"])


def outputs(work: Workload) -> dict[str, Array]:
    return {
        "y": Array((work["T"], work["H"], work["V"]), work.dtype),
        "S_T": Array(state(work), "float32"),
    }


def cotangents(work: Workload) -> dict:
    return {"d" + name: Normal(a.shape, a.dtype) for name, a in outputs(work).items()}


def grads(work: Workload) -> dict[str, Array]:
    found = inputs(work)
    del found["cu_seqlens"]
    gates = {"g": work.dtype, "i": work.dtype}
    return {"d" + n: Array(d.shape, d.dtype, of=gates.get(n, "")) for n, d in found.items()}


# The oracle: all heads of a chunk at once, [Hq, H / Hq, tokens, ...].


class Core(NamedTuple):
    """What the recurrence reads: q, k, v as stored, the rest in the working precision."""

    q: Any
    k: Any
    v: Any
    g: Any  # [T, H]
    u: Any  # [T, H], the weight exp(i), or None
    S0: Any  # [B, H, K, V] or None
    cu_seqlens: Any
    dtype: str
    scale: float
    chunk: int


class _Chunk(NamedTuple):
    q: Any  # [Hq, 1, n, K]
    k: Any
    v: Any  # [Hq, r, n, V]
    b: Any  # [Hq, r, n]: log decays up to and with a token
    u: Any  # [Hq, r, n]


Weights = Callable[[Arithmetic, Any, Any], Any]


def by_group(ar: Arithmetic, x: Any, groups: int) -> Any:
    """[n, H, ...] as [groups, H / groups, n, ...]."""
    n, H, *rest = x.shape
    x = ar.xp.reshape(x, (n, groups, H // groups, *rest))
    return ar.xp.permute_dims(x, (1, 2, 0, *range(3, x.ndim)))


def by_token(ar: Arithmetic, x: Any) -> Any:
    """Back to [n, H, ...]."""
    x = ar.xp.permute_dims(x, (2, 0, 1, *range(3, x.ndim)))
    return ar.xp.reshape(x, (x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:]))


def of_groups(ar: Arithmetic, x: Any) -> Any:
    """Summed over the heads of each group: [n, groups, ...]."""
    x = ar.xp.sum(x, axis=1)
    return ar.xp.permute_dims(x, (1, 0, *range(2, x.ndim)))


def chunks(rows: slice, chunk: int) -> list[slice]:
    starts = range(rows.start, rows.stop, chunk)
    return [slice(start, min(start + chunk, rows.stop)) for start in starts]


def _chunk(ar: Arithmetic, core: Core, c: slice) -> _Chunk:
    groups = core.q.shape[1]
    q, k, v = (by_group(ar, ar.lift(x[c, ...]), groups) for x in (core.q, core.k, core.v))
    g = by_group(ar, core.g[c, :], groups)
    u = ar.xp.ones_like(g) if core.u is None else by_group(ar, core.u[c, :], groups)
    return _Chunk(q, k, v, ar.xp.cumulative_sum(g, axis=-1), u)


def decays(ar: Arithmetic, b: Any, u: Any) -> Any:
    """exp(b[t] - b[j]) * u[j] for j <= t, else 0; what is masked would overflow."""
    n, xp = b.shape[-1], ar.xp
    seen = xp.tril(xp.ones_like(b[0, 0, :, None] + b[0, 0, None, :])) > 0
    apart = b[..., :, None] - b[..., None, :]
    apart = xp.where(seen, apart, xp.full_like(apart[:1, :1, :1, :1], -xp.inf))
    return xp.exp(apart) * xp.reshape(u, (*u.shape[:2], 1, n))


def _first_state(ar: Arithmetic, core: Core, s: int) -> Any:
    """[Hq, r, K, V] before sequence s."""
    groups, (H, V), K = core.q.shape[1], core.v.shape[1:], core.k.shape[2]
    S = ar.empty((groups, H // groups, K, V), like=core.v)
    S[...] = 0 if core.S0 is None else ar.xp.reshape(core.S0[s, ...], S.shape)
    return S


def _left(ar: Arithmetic, core: Core, x: _Chunk, S: Any) -> Any:
    """The state that a chunk leaves when S enters."""
    last = x.b[..., -1:]
    a = ar.xp.exp(last - x.b) * x.u
    ak = ar.stored(a[..., None] * x.k, core.dtype)
    return ar.xp.exp(last)[..., None] * S + ak.mT @ x.v


def forward(ar: Arithmetic, core: Core, weights: Weights = decays) -> tuple[Any, Any]:
    """(y [T, H, V], S_T [B, H, K, V]); weights: faults bring their own."""
    B, (T, H, V), K = core.cu_seqlens.shape[0] - 1, core.v.shape, core.k.shape[2]
    y, S_T = ar.empty((T, H, V), like=core.v), ar.empty((B, H, K, V), like=core.v)
    for s, rows in sequences(core.cu_seqlens):
        S = _first_state(ar, core, s)
        for c in chunks(rows, core.chunk):
            x = _chunk(ar, core, c)
            p = ar.stored(core.scale * (x.q @ x.k.mT) * weights(ar, x.b, x.u), core.dtype)
            old = ar.xp.exp(x.b)[..., None] * (x.q @ ar.stored(S, core.dtype))
            y[c, ...] = by_token(ar, p @ x.v + core.scale * old)
            S = _left(ar, core, x, S)
        S_T[s, ...] = ar.xp.reshape(S, (H, K, V))
    return y, S_T


def backward(ar: Arithmetic, core: Core, dy: Any, dS_T: Any) -> tuple[Any, ...]:
    """(dq, dk [T, Hq, K], dv [T, H, V], dg, du [T, H], dS0 [B, H, K, V]); dy as stored."""
    xp, groups = ar.xp, core.q.shape[1]
    dq, dk, dv = (ar.empty(x.shape, like=x) for x in (core.q, core.k, core.v))
    dg, du = (ar.empty(core.g.shape, like=core.g) for _ in range(2))
    dS0 = ar.empty(dS_T.shape, like=dS_T)
    for s, rows in sequences(core.cu_seqlens):
        entering, S = [], _first_state(ar, core, s)
        for c in chunks(rows, core.chunk):
            entering.append(S)
            S = _left(ar, core, _chunk(ar, core, c), S)
        dS = xp.reshape(ar.lift(dS_T[s, ...]), S.shape)
        for c, S in zip(reversed(chunks(rows, core.chunk)), reversed(entering), strict=True):
            x, dyc = _chunk(ar, core, c), by_group(ar, ar.lift(dy[c, ...]), groups)
            last, eb = x.b[..., -1:], xp.exp(x.b)[..., None]
            fades = xp.exp(last - x.b)[..., None]
            a = fades * x.u[..., None]
            plain = decays(ar, x.b, xp.ones_like(x.u))  # without u, by which du would be divided
            weights = plain * x.u[..., None, :]
            S16, dS16 = ar.stored(S, core.dtype), ar.stored(dS, core.dtype)
            qk, dp = x.q @ x.k.mT, core.scale * (dyc @ x.v.mT)
            p, z = (ar.stored(m * weights, core.dtype) for m in (core.scale * qk, dp))
            from_old, into_new = core.scale * eb * (dyc @ S16.mT), x.k @ dS16
            dq[c, ...] = of_groups(ar, z @ x.k + from_old)
            dk[c, ...] = of_groups(ar, z.mT @ x.q + a * (x.v @ dS16.mT))
            dv[c, ...] = by_token(ar, p.mT @ dyc + a * into_new)
            pairs = dp * qk
            st = xp.sum(x.v * into_new, axis=-1)
            du[c, :] = by_token(ar, xp.sum(pairs * plain, axis=-2) + fades[..., 0] * st)
            r, st = pairs * weights, a[..., 0] * st
            db = xp.sum(r, axis=-1) - xp.sum(r, axis=-2) + xp.sum(x.q * from_old, axis=-1) - st
            kept = xp.exp(last) * xp.sum(xp.sum(dS16 * S16, axis=-1), axis=-1)[..., None]
            db[..., -1:] += xp.sum(st, axis=-1)[..., None] + kept
            later = xp.cumulative_sum(xp.flip(db, axis=-1), axis=-1)
            dg[c, :] = by_token(ar, xp.flip(later, axis=-1))
            qb = ar.stored(eb * x.q, core.dtype)
            dS = xp.exp(last)[..., None] * dS + core.scale * (qb.mT @ dyc)
        dS0[s, ...] = xp.reshape(dS, dS_T.shape[1:])
    return dq, dk, dv, dg, du, dS0


def _core(
    ar: Arithmetic, work: Workload, q: Any, k: Any, v: Any, g: Any, i: Any, S0: Any, cu: Any
) -> Core:
    g, S0 = ar.lift(g), None if S0 is None else ar.lift(S0)
    if g.ndim == 1:
        g = ar.xp.broadcast_to(g[None, :], (v.shape[0], g.shape[0]))
    u = None if i is None else ar.xp.exp(ar.lift(i))
    scale, chunk = work.options.get("scale", 1.0), work.options.get("chunk", 64)
    return Core(q, k, v, g, u, S0, cu, work.dtype, scale, chunk)


def oracle(
    ar: Arithmetic, work: Workload, q: Any, k: Any, v: Any, g: Any, cu_seqlens: Any,
    i: Any = None, S0: Any = None, weights: Weights = decays,
) -> tuple[Any, Any]:  # fmt: skip
    return forward(ar, _core(ar, work, q, k, v, g, i, S0, cu_seqlens), weights)


def oracle_bwd(
    ar: Arithmetic, work: Workload, q: Any, k: Any, v: Any, g: Any, cu_seqlens: Any, dy: Any,
    dS_T: Any, i: Any = None, S0: Any = None,
) -> tuple[Any, ...]:  # fmt: skip
    core = _core(ar, work, q, k, v, g, i, S0, cu_seqlens)
    dq, dk, dv, dg, du, dS0 = backward(ar, core, dy, dS_T)
    found = [dq, dk, dv, dg if g.ndim == 2 else ar.xp.sum(dg, axis=0)]
    if core.u is not None:
        found.append(core.u * du)
    return tuple(found) if S0 is None else (*found, dS0)


def probe(work: Workload) -> dict | None:
    """Without decay, and with weights of 1, all is whole: states below 256, scale a power of 2."""
    if work.name != "ci":
        return None
    whole = {
        n: d if isinstance(d, Given) else Integers(d.shape, d.dtype, -1, 1)
        for n, d in (inputs(work) | cotangents(work)).items()
    }
    return whole | {n: Integers(whole[n].shape, "float32", 0, 0) for n in ("g", "i")}


def cost(work: Workload, which: str) -> Cost:
    """Products with the states alone; what tokens of a chunk see of each other depends on its
    length."""
    T, Hq, H, K, V = (work[n] for n in ("T", "Hq", "H", "K", "V"))
    both = 1 if which == "fwd" else 2
    rows = both * 2 * T * Hq * K + (both + 1) * T * H * V  # q, k, v, y; q, k, v, dy, dq, dk, dv
    gates = 0 if CONSTANT in work.tags else both * T * H
    gates += both * T * H if "i" not in work.absent else 0
    # S_T; dS_T, and S0 and dS0 where there is an S0
    states = (1 + both * ("S0" not in work.absent)) * work["B"] * H * K * V
    flops = (4 if which == "fwd" else 10) * T * H * K * V
    return Cost(flops, rows * work.itemsize + 4 * (gates + states))


def reduction(work: Workload, name: str) -> int:
    return work["T"] if name == "dg" and CONSTANT in work.tags else max(lengths(work))


# Wrong answers that only this can give: see parity.faults.


def changed(case: Any, arrays: Mapping[str, Any], **more: Any) -> Any:
    arrays = {**case.arrays, **arrays}
    return case.rounded(
        case.problem.oracle_of(case.which)(Arithmetic.model(case.xp), case.work, **arrays, **more)
    )


def with_weights(case: Any, weights: Weights) -> Any:
    return changed(case, {}, weights=weights) if case.which == "fwd" else None


def sees_not_itself(case: Any) -> Any:
    """The mask hides a token from itself too."""

    def strict(ar: Arithmetic, b: Any, u: Any) -> Any:
        return ar.xp.tril(decays(ar, b, u), k=-1)

    return with_weights(case, strict)


def sees_the_next(case: Any) -> Any:
    """The mask lets a token see the one after it."""

    def loose(ar: Arithmetic, b: Any, u: Any) -> Any:
        own = decays(ar, b, u)
        next_one = ar.xp.zeros_like(own)
        next_one[..., :-1, 1:] = ar.xp.reshape(u, (*u.shape[:2], 1, -1))[..., 1:]
        beside = ar.xp.tril(ar.xp.triu(ar.xp.ones_like(own[0, 0, :, :]), k=1), k=1) > 0
        return ar.xp.where(beside, next_one, own)

    return with_weights(case, loose)


def weights_as_a_quotient(case: Any) -> Any:
    """exp(b[t]) * exp(-b[j]) overflows where decays are strong."""
    if STEEP not in case.work.tags:
        return None

    def quotient(ar: Arithmetic, b: Any, u: Any) -> Any:
        with np.errstate(over="ignore", invalid="ignore"):
            return ar.xp.tril(ar.xp.exp(b)[..., :, None] * (u * ar.xp.exp(-b))[..., None, :])

    with np.errstate(invalid="ignore"):
        return with_weights(case, quotient)


def gate_off_by_one(case: Any) -> Any:
    """Every token decays by the gate of the token before it."""
    if case.arrays["g"].ndim == 1:
        return None
    return changed(case, {"g": case.xp.roll(case.arrays["g"], 1, axis=0)})


def state_lost_at_a_chunk(case: Any) -> Any:
    """Token 70 is met without a state, as if a chunk that it begins were a sequence."""
    if case.which != "fwd" or case.arrays["g"].ndim == 1:
        return None
    g = case.xp.asarray(case.arrays["g"], copy=True)
    g[70, :] = -1e4
    return changed(case, {"g": g})


def forgotten_state(case: Any) -> Any:
    """The state that enters counts as zero."""
    name = next((n for n in ("S0", "h0") if n in case.arrays), None)
    return changed(case, {name: 0 * case.arrays[name]}) if name else None


def neighbours_keys(case: Any) -> Any:
    """Heads read the keys of the group beside theirs."""
    if case.arrays["k"].shape[1] == 1:
        return None
    return changed(case, {"k": case.xp.roll(case.arrays["k"], 1, axis=1)})


def last_state_has_no_gradient(case: Any) -> Any:
    """Whoever differentiates through S_T gets nothing of it."""
    name = next((n for n in ("dS_T", "dh_T") if n in case.arrays), None)
    return changed(case, {name: 0 * case.arrays[name]}) if name else None


def scale_ignored(case: Any) -> Any:
    if "scale" not in case.work.options:
        return None
    options = {k: v for k, v in case.work.options.items() if k != "scale"}
    work = replace(case.work, options=options)
    return case.recomputed(Arithmetic.model(case.xp), work, case.arrays)


def gates_from_rounded_gradients(case: Any) -> Any:
    """dg as a sum of q . dq - k . dk over all later tokens: an identity, but what it subtracts was
    rounded before."""
    if case.which != "bwd" or case.arrays["g"].ndim == 1 or case.work["Hq"] != case.work["H"]:
        return None
    xp = case.xp
    at = list(case.specs)
    q, k, dq, dk = (
        xp.astype(x, xp.float32)
        for x in (
            case.arrays["q"],
            case.arrays["k"],
            *(case.good[at.index(n)] for n in ("dq", "dk")),
        )
    )
    db = xp.sum(q * dq - k * dk, axis=-1)
    _, S_T = case.problem.oracle(
        Arithmetic.model(xp), case.work,
        **{n: case.arrays[n] for n in case.problem.inputs(case.work)},
    )  # fmt: skip
    dg = xp.empty_like(case.good[at.index("dg")])
    for s, rows in sequences(case.arrays["cu_seqlens"]):
        later = xp.flip(xp.cumulative_sum(xp.flip(db[rows, :], axis=0), axis=0), axis=0)
        last = xp.sum(xp.sum(S_T[s, ...] * case.arrays["dS_T"][s, ...], axis=-1), axis=-1)
        dg[rows, :] = later + last[None, :]
    wrong = list(case.good)
    wrong[at.index("dg")] = dg
    return tuple(wrong)


def empty_sequence_not_written(case: Any) -> Any:
    """The state after a sequence without tokens is never written: it still holds NaN."""
    states = ("S_T", "h_T", "dS0", "dh0")
    name = next((n for n in states if n in case.specs), None)
    empty = [s for s, rows in sequences(case.arrays["cu_seqlens"]) if rows.start == rows.stop]
    if name is None or not empty:
        return None
    at = list(case.specs).index(name)
    state = case.xp.asarray(case.good[at], copy=True)
    state[empty[0], ...] = case.xp.nan
    return (*case.good[:at], state, *case.good[at + 1 :])


OF_STATES = {
    state_leaks: NUMERIC,
    boundary_off_by_one: NUMERIC,
    forgotten_state: NUMERIC,
    last_state_has_no_gradient: NUMERIC,
    empty_sequence_not_written: ("nonfinite",),
}
OF_SCORES = {sees_not_itself: NUMERIC, sees_the_next: NUMERIC, scale_ignored: NUMERIC}
OF_GATES = {
    weights_as_a_quotient: ("nonfinite",),
    gate_off_by_one: NUMERIC,
    state_lost_at_a_chunk: NUMERIC,
    neighbours_keys: NUMERIC,
    gates_from_rounded_gradients: NUMERIC,
}

PROBLEM = Problem(
    stem="decay_attention",
    doc=__doc__ or "",
    family="scan",
    workloads=WORKLOADS,
    inputs=inputs,
    cotangents=cotangents,
    outputs=outputs,
    grads=grads,
    oracle=oracle,
    oracle_bwd=oracle_bwd,
    cost=cost,
    reduction=reduction,
    probe=probe,
    implementations={
        "triton": "triton_kernels.decay_attention:decay_attention",
        "pallas": "pallas_kernels.decay_attention:decay_attention",
    },
    peers={
        "fla": "parity.peers.decay:fla_simple_gla",
        "torch.compile": "parity.peers.decay:compiled_chunks",
        "jax.jit": "parity.peers.decay:jax_chunks",
    },
    arguments=ARGUMENTS,
    bwd_options=("scale", "chunk"),
    faults=OF_STATES | OF_SCORES | OF_GATES,
    glue=("pad", "slice", "copy", "convert_element_type"),
)
