"""The scans as declared: the oracles against recurrences written token by token, and the costs."""

import array_api_compat.numpy as xp
import numpy as np
import pytest

from parity.problems import linear_scan, rglru
from parity.spec import Arithmetic

PROBLEMS = (linear_scan.PROBLEM, rglru.PROBLEM)
CI = [(p, w) for p in PROBLEMS for w in p.workloads if "ci" in w.tags]
CASES = pytest.mark.parametrize(("problem", "work"), CI, ids=[f"{p.stem}-{w.name}" for p, w in CI])


def drawn(problem, work, seed=0):
    rng = np.random.default_rng(seed)
    return {n: d.draw(rng) for n, d in (problem.inputs(work) | problem.cotangents(work)).items()}


def of_inputs(problem, work, arrays):
    return {n: arrays[n] for n in problem.inputs(work)}


def gates(arrays, t, first):
    """(a, b) of one token."""
    if "a" in arrays:
        return arrays["a"][t].astype(float), arrays["b"][t].astype(float)
    x, r_pre, i_pre = (arrays[n][t].astype(float) for n in ("x", "r_pre", "i_pre"))
    i = 1 / (1 + np.exp(-i_pre))
    if first and "h0" not in arrays:
        return 0 * x, i * x
    rate = 8 * np.log1p(np.exp(arrays["lam"].astype(float)))
    log_a = -rate / (1 + np.exp(-r_pre))
    return np.exp(log_a), np.sqrt(-np.expm1(2 * log_a)) * i * x


@CASES
def test_the_oracle_is_the_recurrence_token_by_token(problem, work):
    arrays = drawn(problem, work)
    cu, W = arrays["cu_seqlens"], work["W"]
    h, h_T = problem.oracle(Arithmetic.truth(xp), work, **of_inputs(problem, work, arrays))
    for s in range(work["B"]):
        state = arrays["h0"][s].astype(float) if "h0" in arrays else np.zeros(W)
        for t in range(cu[s], cu[s + 1]):
            a, b = gates(arrays, t, t == cu[s])
            state = a * state + b
            assert np.allclose(h[t], state, rtol=1e-12, atol=1e-13)
        assert np.allclose(h_T[s], state, rtol=1e-12, atol=1e-13)


@CASES
def test_the_backward_is_the_derivative(problem, work):
    """<gradient, direction> is the slope of <h, dh> + <h_T, dh_T>, in float64."""
    rng = np.random.default_rng(1)
    arrays = {
        n: x if x.dtype == np.int32 else x.astype(np.float64)
        for n, x in drawn(problem, work).items()
    }
    ar = Arithmetic(xp, "float64", rounds=False)

    def value(**moved):
        out = problem.oracle(ar, work, **(of_inputs(problem, work, arrays) | moved))
        return sum(float((o * arrays[n]).sum()) for o, n in zip(out, ("dh", "dh_T"), strict=True))

    grads = dict(zip(problem.grads(work), problem.oracle_bwd(ar, work, **arrays), strict=True))
    assert set(grads) == {"d" + n for n in problem.inputs(work) if n != "cu_seqlens"}
    for name, grad in grads.items():
        x = arrays[name[1:]]
        step = 1e-6 * rng.standard_normal(x.shape)
        slope = value(**{name[1:]: x + step}) - value(**{name[1:]: x - step})
        assert slope == pytest.approx(2 * float((grad * step).sum()), rel=1e-6), name


@CASES
def test_sequences_know_nothing_of_each_other(problem, work):
    """NaN in one sequence leaves the others' every bit alone."""
    arrays = drawn(problem, work)
    cu = arrays["cu_seqlens"]
    hit = int(np.argmax(np.diff(cu)))
    ar = Arithmetic.truth(xp)
    before = problem.oracle(ar, work, **of_inputs(problem, work, arrays))
    name = "b" if "b" in arrays else "x"
    arrays[name][cu[hit] + 1] = np.nan
    after = problem.oracle(ar, work, **of_inputs(problem, work, arrays))
    for s in range(work["B"]):
        rows = slice(cu[s], cu[s + 1])
        same = np.array_equal(before[0][rows], after[0][rows])
        assert same == (s != hit)
        assert np.array_equal(before[1][s], after[1][s]) == (s != hit)


def test_layouts_and_costs():
    for work in linear_scan.WORKLOADS:
        lengths = linear_scan.lengths(work)
        assert sum(lengths) == work["T"] and len(lengths) == work["B"]
        assert (0 in lengths) == ("ragged" in work.tags)
    work = linear_scan.PROBLEM.workload("lru_9b")
    rows, state = 8 * 8192 * 4096 * 2, 4 * 8 * 4096
    for problem, fwd, bwd in ((PROBLEMS[0], 3, 5), (PROBLEMS[1], 4, 8)):
        small = 4 * 4096 if problem.stem == "rglru" else 0
        assert problem.cost(work, "fwd").bytes == fwd * rows + state + small
        assert problem.cost(work, "bwd").bytes == bwd * rows + 2 * (state + small)


def test_the_workloads_of_the_issue_are_there():
    for problem in PROBLEMS:
        names = {w.name for w in problem.workloads}
        assert names >= {"ci", "lru_2b", "lru_9b", "lru_9b_b1", "packed_32k", "lru_huge"}
        huge = problem.workload("lru_huge")
        assert huge["T"] * huge["W"] > 2**31
