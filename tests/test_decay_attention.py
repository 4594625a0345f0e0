"""Decay attention, retention and Mamba-2 as declared: the oracles against recurrences written token
by token, what the judge grants and refuses, and the costs."""

from dataclasses import replace

import array_api_compat.numpy as xp
import numpy as np
import pytest

from parity import frameworks
from parity.faults import case_of
from parity.frameworks import Kernel
from parity.judge import judge, judge_exact, truth_and_model
from parity.problems import decay_attention, mamba2_ssd, retention
from parity.problems.linear_scan import lengths
from parity.spec import Arithmetic

PROBLEMS = (decay_attention.PROBLEM, retention.PROBLEM, mamba2_ssd.PROBLEM)
CI = [(p, w) for p in PROBLEMS for w in p.workloads if "ci" in w.tags]
CASES = pytest.mark.parametrize(("problem", "work"), CI, ids=[f"{p.stem}-{w.name}" for p, w in CI])
EXACT = Arithmetic(xp, "float64", rounds=False)  # of float64 inputs: nothing is rounded


def drawn(problem, work, seed=0):
    rng = np.random.default_rng(seed)
    return {n: d.draw(rng) for n, d in (problem.inputs(work) | problem.cotangents(work)).items()}


def widened(arrays):
    return {n: x if x.dtype == np.int32 else x.astype(np.float64) for n, x in arrays.items()}


def of_inputs(problem, work, arrays):
    return {n: arrays[n] for n in problem.inputs(work)}


def by_token(work, a):
    """(q, k, v, g, u, S0, scale) of the recurrence, from a problem's own inputs in float64."""
    scale = work.options.get("scale", 1.0)
    if "x" in a:
        dt = a["dt"] + a.get("dt_bias", 0.0)
        dt = np.log1p(np.exp(dt)) if work.options.get("dt_softplus") else dt
        dt = np.clip(dt, *work.options.get("dt_limit", (0.0, np.inf)))
        S0 = a["h0"].swapaxes(2, 3) if "h0" in a else None
        return a["C"], a["B"], a["x"], dt * a["A"], dt, S0, 1.0
    T, H = a["v"].shape[:2]
    if "g" in a:
        g = np.broadcast_to(a["g"], (T, H))
    else:
        g = np.broadcast_to(np.log(1 - 2.0 ** (-5 - np.arange(H))), (T, H))
        scale = work.options.get("scale", work["K"] ** -0.5)
    u = np.exp(a["i"]) if "i" in a else np.ones((T, H))
    return a["q"], a["k"], a["v"], g, u, a.get("S0"), scale


@CASES
def test_the_oracle_is_the_recurrence_token_by_token(problem, work):
    arrays = widened(drawn(problem, work))
    q, k, v, g, u, S0, scale = by_token(work, arrays)
    cu, (T, H, V) = arrays["cu_seqlens"], v.shape
    q, k = (x.repeat(H // x.shape[1], axis=1) for x in (q, k))
    y, S_T = problem.oracle(EXACT, work, **of_inputs(problem, work, arrays))
    S_T = S_T.mT if "x" in arrays else S_T
    wanted = np.zeros((T, H, V))
    for s in range(work["B"]):
        S = np.zeros(S_T.shape[1:]) if S0 is None else S0[s]
        for t in range(cu[s], cu[s + 1]):
            step = (u[t, :, None] * k[t])[:, :, None] * v[t, :, None, :]
            S = np.exp(g[t])[:, None, None] * S + step
            wanted[t] = scale * (q[t][:, None, :] @ S)[:, 0, :]
        assert np.allclose(S_T[s], S, rtol=1e-11, atol=1e-12)
    if "D" in arrays:
        D = arrays["D"]
        wanted += (D if D.ndim == 2 else D[:, None]) * v
    if "z" in arrays:
        wanted *= arrays["z"] / (1 + np.exp(-arrays["z"]))
    assert np.allclose(y, wanted, rtol=1e-11, atol=1e-11)


@CASES
def test_the_backward_is_the_derivative(problem, work):
    """<gradient, direction> is the slope of the outputs times their cotangents, in float64."""
    rng = np.random.default_rng(1)
    arrays = widened(drawn(problem, work))
    names = list(problem.cotangents(work))

    def value(**moved):
        out = problem.oracle(EXACT, work, **(of_inputs(problem, work, arrays) | moved))
        return sum(float((o * arrays[n]).sum()) for o, n in zip(out, names, strict=True))

    found = problem.oracle_bwd(EXACT, work, **arrays)
    grads = dict(zip(problem.grads(work), found, strict=True))
    assert set(grads) == {"d" + n for n in problem.inputs(work) if n != "cu_seqlens"}
    for name, grad in grads.items():
        x = arrays[name[1:]]
        assert grad.shape == x.shape == problem.grads(work)[name].shape
        step = 1e-6 * rng.standard_normal(x.shape)
        slope = value(**{name[1:]: x + step}) - value(**{name[1:]: x - step})
        assert slope == pytest.approx(2 * float((grad * step).sum()), rel=1e-6), name


@CASES
def test_the_length_of_a_chunk_decides_roundings_alone(problem, work):
    arrays = widened(drawn(problem, work))
    inputs = of_inputs(problem, work, arrays)
    other = replace(work, options={**work.options, "chunk": 23})
    for fn, read in ((problem.oracle, inputs), (problem.oracle_bwd, arrays)):
        for x, y in zip(fn(EXACT, work, **read), fn(EXACT, other, **read), strict=True):
            assert np.linalg.norm(x - y) <= 1e-10 * np.linalg.norm(x)


@CASES
def test_sequences_know_nothing_of_each_other(problem, work):
    """NaN in one sequence leaves the others' every bit alone."""
    arrays = drawn(problem, work)
    cu = arrays["cu_seqlens"]
    hit = int(np.argmax(np.diff(cu)))
    ar = Arithmetic.truth(xp)
    before = problem.oracle(ar, work, **of_inputs(problem, work, arrays))
    arrays["x" if "x" in arrays else "v"][cu[hit] + 1] = np.nan
    after = problem.oracle(ar, work, **of_inputs(problem, work, arrays))
    for s in range(work["B"]):
        rows = slice(cu[s], cu[s + 1])
        assert np.array_equal(before[0][rows], after[0][rows]) == (s != hit)
        assert np.array_equal(before[1][s], after[1][s]) == (s != hit)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.stem)
def test_every_fault_of_these_is_planted_somewhere(problem):
    """That the judge catches them, tests/test_judge.py sees."""
    planted = set()
    for work in (w for w in problem.workloads if "ci" in w.tags):
        arrays = drawn(problem, work)
        for which in work.passes:
            read = {n: arrays[n] for n in problem.reads(work, which)}
            case = case_of(problem, work, which, read, *truth_and_model(problem, work, which, read))
            planted |= {f for f in set(problem.faults) - planted if f(case) is not None}
    assert planted == set(problem.faults)


@pytest.mark.parametrize(
    ("problem", "work"), [(p, w) for p, w in CI if p.probe and p.probe(w)], ids=lambda x: ""
)
def test_whole_numbers_leave_no_room(problem, work):
    """The model's own roundings change nothing in a probe: every kernel can be exact."""
    rng = np.random.default_rng(0)
    arrays = {n: d.draw(rng) for n, d in problem.probe(work).items()}
    for which in work.passes:
        read = {n: arrays[n] for n in problem.reads(work, which)}
        truth, model = (
            problem.oracle_of(which)(ar, work, **read)
            for ar in (Arithmetic.truth(xp), Arithmetic.model(xp))
        )
        specs = problem.results(work, which)
        for (name, spec), r, m in zip(specs.items(), truth, model, strict=True):
            assert np.any(r != 0), name
            assert judge_exact(name, m.astype(spec.dtype), r, spec).ok, name


STEEP = decay_attention.PROBLEM.workload("ci_steep")


def verdicts(work, monkeypatch, rounded):
    """What the judge says of the model's gradients, with `stored` taken by `rounded` instead."""
    arrays = drawn(decay_attention.PROBLEM, work)
    truth, model = (
        decay_attention.oracle_bwd(ar, work, **arrays)
        for ar in (Arithmetic.truth(xp), Arithmetic.model(xp))
    )
    monkeypatch.setattr(Arithmetic, "stored", rounded)
    other = decay_attention.oracle_bwd(Arithmetic.model(xp), work, **arrays)
    specs = decay_attention.grads(work)
    return {
        n: judge(n, y.astype(s.dtype), r, m, s, family="scan", terms=141)
        for (n, s), y, r, m in zip(specs.items(), other, truth, model, strict=True)
    }


def test_a_kernel_may_round_less_than_the_model(monkeypatch):
    found = verdicts(STEEP, monkeypatch, lambda ar, x, dtype: x)
    assert [v.detail for v in found.values() if not v.ok] == []


def test_a_kernel_may_not_drop_bits_of_its_tiles(monkeypatch):
    """Tiles of bfloat16 for inputs of float16."""
    found = verdicts(STEEP, monkeypatch, lambda ar, x, dtype: ar.rounded(x, "bfloat16"))
    assert {v.ok for v in found.values()} == {False}


def test_what_is_absent_is_passed_as_none():
    """Arguments in the middle keep their places."""
    twin = frameworks.twin("triton")
    for problem in PROBLEMS:
        work = next(w for w in problem.workloads if "ci" in w.tags and w.absent)
        seen = []
        kernel = Kernel(lambda *args, seen=seen, **how: seen.extend(args), len, len, "")
        arrays = drawn(problem, work)
        fn, args, options = frameworks.prepared(twin, kernel, problem, work, "fwd", arrays)
        fn(*args, **options)
        names = problem.arguments
        assert [n for n, x in zip(names, seen, strict=True) if x is None] == [
            n for n in names if n in work.absent
        ]
        assert options == work.options


def test_peers_know_sequences_of_one_length(monkeypatch):
    """Without gathering: places of chunks are tokens."""
    import torch

    from parity.peers.decay import compiled_chunks

    monkeypatch.setattr(torch, "compile", lambda fn, **how: fn)
    problem = decay_attention.PROBLEM
    work = replace(
        problem.workload("ci"), tags=(), sizes=decay_attention.sizes(256, 2, 1, 2, 32, 16)
    )
    arrays = drawn(problem, work)
    inputs = of_inputs(problem, work, arrays)
    call = compiled_chunks("fwd", inputs, {}, work.options)
    for y, r in zip(call(), problem.oracle(Arithmetic.truth(xp), work, **inputs), strict=True):
        assert np.linalg.norm(y.double().numpy() - r) <= 2e-3 * np.linalg.norm(r)


def test_layouts_and_costs():
    for problem in PROBLEMS:
        for work in problem.workloads:
            found = lengths(work)
            assert sum(found) == work["T"] and len(found) == work["B"]
            assert (0 in found) == ("ragged" in work.tags)
    T, H, K, V, B = 8 * 4096, 16, 128, 128, 8
    rows, states = 2 * T * H * (2 * K + 2 * V), 4 * B * H * K * V
    core, ret = (
        p.cost(p.workload(n), "fwd")
        for p, n in ((PROBLEMS[0], "gla_k128"), (PROBLEMS[1], "retnet_k128"))
    )
    assert core.flops == ret.flops == 4 * T * H * K * V
    assert ret.bytes == rows + states and core.bytes == ret.bytes + 4 * T * H
    back = PROBLEMS[0].cost(PROBLEMS[0].workload("gla_k128"), "bwd")
    assert back.flops == 10 * T * H * K * V
    # q, k, v, dy, dq, dk, dv; g and dg; dS_T
    assert back.bytes == 2 * T * H * (4 * K + 3 * V) + 8 * T * H + states
    H, N, P = 80, 128, 64
    ssd = PROBLEMS[2].cost(PROBLEMS[2].workload("mamba2_2p7b"), "fwd")
    assert ssd.flops == T * H * (4 * N * P + 2 * P)
    assert ssd.bytes == 2 * T * (2 * N + 2 * H * P) + 4 * T * H + 4 * B * H * N * P


def test_the_workloads_of_the_issue_are_there():
    core, ret, ssd = ({w.name for w in p.workloads} for p in PROBLEMS)
    assert core >= {"gla_k128", "packed_32k", "gla_huge"}
    assert ret >= {"retnet_k128", "retnet_k256_v512", "packed_32k"}
    assert ssd >= {"mamba2_2p7b", "mamba2_g8", "mamba2_64k", "packed_32k"}
    huge = PROBLEMS[0].workload("gla_huge")
    assert huge["T"] * huge["H"] * huge["V"] > 2**31
