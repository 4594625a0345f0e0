"""Hybrid attention as declared: the plan against the mask in words, the oracle against a dense
computation that shares nothing with it, and finite differences."""

import numpy as np
import pytest

from parity.problems import hybrid_attention as problem
from parity.problems.hybrid_attention import CAUSAL, FULL, NOISE, PAD
from parity.spec import Arithmetic, Workload

CI = [w for w in problem.WORKLOADS if "ci" in w.tags]


def in_words(cu, off, mode, T: int, W: int) -> np.ndarray:
    """The mask [T, T], pair by pair, from what the docstring says."""
    seen = np.zeros((T, T), bool)
    at = [(int(np.searchsorted(cu, t, "right")) - 1, int(np.searchsorted(off, t, "right")) - 1)
          for t in range(T)]  # fmt: skip
    for q, (sq, gq) in enumerate(at):
        if sq >= len(cu) - 1 or gq >= len(mode) or mode[gq] == PAD:
            continue
        for j, (sj, gj) in enumerate(at):
            image = mode[gq] in (FULL, NOISE) and gq == gj
            before = j <= q and (not W or q - j < W)
            hidden = gj < len(mode) and mode[gj] == NOISE and gj != gq
            seen[q, j] = sj == sq and (image or before) and not hidden
    return seen


def random_layout(rng: np.random.Generator, T: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    cu, off, mode, t = [0], [0], [], 0
    while t < T - 4:
        for _ in range(rng.integers(1, 4)):
            t = min(T, t + int(rng.integers(0, 8)))
            off.append(t)
            mode.append(int(rng.choice([CAUSAL, CAUSAL, FULL, NOISE])))
        cu.append(t)
    off.append(T)
    mode.append(PAD)
    return np.array(cu, np.int32), np.array(off, np.int32), np.array(mode, np.int8)


def of_plan(plan: tuple[np.ndarray, ...]) -> np.ndarray:
    kv_start, kv_end, noise = plan[:3]
    j = np.arange(len(kv_start))[None, :]
    own = (noise[None, :] < 0) | (noise[None, :] == noise[:, None])
    return (j >= kv_start[:, None]) & (j < kv_end[:, None]) & own


@pytest.mark.parametrize("W", [0, 1, 5])
def test_a_plan_is_its_mask(W: int):
    rng = np.random.default_rng(W)
    for _ in range(30):
        T = int(rng.integers(6, 150))
        meta = random_layout(rng, T)
        plan = problem.planned(*meta, None, T, W)
        mask = of_plan(plan)
        assert (mask == in_words(*meta, T, W)).all()
        kv_start, kv_end, _, q_start, q_end = plan[:5]
        live = kv_end > kv_start
        assert (np.diff(kv_start[live]) >= 0).all() and (np.diff(kv_end[live]) >= 0).all()
        for j in np.flatnonzero(live):
            queries = np.flatnonzero(mask[:, j])
            assert q_start[j] <= queries.min() and queries.max() < q_end[j]
        tiles = plan[6]
        for i, row in enumerate(tiles):
            tile = slice(i * problem.TILE, min((i + 1) * problem.TILE, T))
            columns = np.flatnonzero(mask[tile].any(axis=0))
            if len(columns):
                assert row[0] <= columns[0] and columns[-1] < row[3]
            if row[1] <= row[2] and row[5] < 0:  # no mask is needed there
                assert mask[tile, row[1] : row[2]][:, plan[2][row[1] : row[2]] < 0].all()
        for order in plan[7:]:
            assert sorted(order) == list(range(-(-T // problem.ORDERED)))


def dense(work: Workload, a: dict) -> tuple[np.ndarray, ...]:
    """(o, lse, dq, dk, dv) with whole score matrices, in float64."""
    mask = in_words(*problem.meta_of(work), work["T"], work.sizes.get("W", 0))
    live = mask.any(axis=1)
    q, k, v, do = (np.where(live[:, None, None], a[n], 0).astype(np.float64) for n in
                   ("q", "k", "v", "do"))  # fmt: skip
    dlse = np.where(live, a["dlse"], 0).astype(np.float64)
    G, scale = work["Hq"] // work["Hk"], work.options.get("scale", work["D"] ** -0.5)
    cap = work.options.get("softcap", 0.0)
    o, lse = np.zeros_like(q), np.full((work["Hq"], work["T"]), -np.inf)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for h in range(work["Hq"]):
        g = h // G
        x = scale * q[:, h] @ k[:, g].T
        bent = np.tanh(x / cap) if cap else None
        x = x if bent is None else cap * bent
        if "alibi" in a:
            at = a["token_pos"].astype(np.float64)
            x = x - a["alibi"][h] * np.abs(at[:, None] - at[None, :])
        e = np.where(mask, np.exp(x), 0)
        total = e.sum(axis=1)
        p = e / np.where(live, total, 1)[:, None]
        lse[h, live] = np.log(total[live])
        o[:, h] = p @ v[:, g]
        dx = p * (do[:, h] @ v[:, g].T - ((do[:, h] * o[:, h]).sum(axis=1) - dlse[h])[:, None])
        dx = dx if bent is None else dx * (1 - bent**2)
        dq[:, h] = scale * dx @ k[:, g]
        dk[:, g] += scale * dx.T @ q[:, h]
        dv[:, g] += p.T @ do[:, h]
    return o, lse, dq, dk, dv


@pytest.mark.parametrize("work", CI, ids=lambda w: w.name)
def test_the_oracle_is_dense_attention(work: Workload):
    rng = np.random.default_rng(0)
    a = {n: d.draw(rng) for n, d in (problem.inputs(work) | problem.cotangents(work)).items()}
    ar = Arithmetic.truth(np)
    found = problem.oracle(ar, work, **{n: a[n] for n in problem.inputs(work)})
    found += problem.oracle_bwd(ar, work, **a)
    for y, r in zip(found, dense(work, a), strict=True):
        assert (np.isfinite(y) == np.isfinite(r)).all()
        finite = np.isfinite(r)
        assert np.abs(y[finite] - r[finite]).max() < 1e-12


def test_the_backward_is_the_derivative():
    work = Workload("ci", {"T": 60, "Hq": 2, "Hk": 1, "D": 4, "W": 9}, "float64", ("ci",),
                    {"softcap": 1.5}, ("pos", "alibi"))  # fmt: skip
    rng = np.random.default_rng(1)
    a = {n: d.draw(rng) for n, d in (problem.inputs(work) | problem.cotangents(work)).items()}
    ar, live = Arithmetic.truth(np), a["kv_end"] > a["kv_start"]

    def loss(**changed: np.ndarray) -> float:
        given = {n: a[n] for n in problem.inputs(work)} | changed
        o, lse = problem.oracle(ar, work, **given)
        return float((o * a["do"])[live].sum() + (lse * a["dlse"])[:, live].sum())

    for name, grad in zip("qkv", problem.oracle_bwd(ar, work, **a), strict=True):
        step = np.where(live[:, None, None], rng.standard_normal(a[name].shape), 0)
        up, down = (loss(**{name: a[name] + s * 1e-6 * step}) for s in (1, -1))
        assert np.isclose((up - down) / 2e-6, (grad * step).sum(), rtol=1e-6)


def test_pairs_are_counted_exactly():
    for work in CI:
        T, W = work["T"], work.sizes.get("W", 0)
        pairs = in_words(*problem.meta_of(work), T, W).sum()
        assert problem.cost(work, "fwd").flops == 4 * work["Hq"] * work["D"] * pairs


@pytest.mark.parametrize("name", ["bagel_32k", "video_120x256", "dense_full_16k"])
def test_layers_fill_their_batch(name: str):
    work = problem.PROBLEM.workload(name)
    cu, off, _ = problem.meta_of(work)
    assert cu[-1] == off[-1] == work["T"]
    # 241 segments of video take more than a kilobyte
    assert sum(x.nbytes for x in problem.meta_of(work)) <= (2048 if "video" in name else 1024)
