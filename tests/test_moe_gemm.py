"""The grouped product's spec beside sums written element by element, its routings and its costs."""

import array_api_compat.numpy as xp
import numpy as np
import pytest

from parity.problems.moe_gemm import PROBLEM
from parity.spec import Arithmetic, Routing

KINDS = ("uniform", "zipf", "onehot", "half", "ragged")
PLAIN = PROBLEM.workload("ci")


def _draw(work, seed=0):
    rng = np.random.default_rng(seed)
    return {n: d.draw(rng) for n, d in (PROBLEM.inputs(work) | PROBLEM.cotangents(work)).items()}


@pytest.mark.parametrize("name", [w.name for w in PROBLEM.workloads if "ci" in w.tags])
def test_the_oracle_is_each_rows_own_product(name):
    """Row by row, with the expert looked up for each: no groups, no slices."""
    work = PROBLEM.workload(name)
    arrays = {n: a for n, a in _draw(work).items() if n in PROBLEM.inputs(work)}
    (y,) = PROBLEM.oracle(Arithmetic.truth(xp), work, **arrays)
    expert = np.repeat(np.arange(work["E"]), arrays["sizes"])
    rows = arrays.get("rows", np.arange(work["M"]))
    for r in range(work["M"]):
        if r >= len(expert):
            assert not y[r].any()
            continue
        w = arrays["w"][expert[r]].astype(np.float64)
        w = w.T if work.options.get("transpose_w") else w
        h = np.einsum("k,kn->n", arrays["x"][rows[r]].astype(np.float64), w)
        h = h + arrays["bias"][expert[r]] if "bias" in arrays else h
        if work.options.get("activation"):
            h = np.array([g / (1 + np.exp(-g)) * u for g, u in h.reshape(-1, 2)])
        h = h * arrays["row_scale"][r] if "row_scale" in arrays else h
        assert np.allclose(y[r], h, rtol=1e-12, atol=1e-12)


def test_dw_alone_is_the_backwards_and_zero_for_an_empty_expert():
    arrays, ar = _draw(PLAIN), Arithmetic.truth(xp)
    empty = arrays["sizes"] == 0
    assert empty.any() and (arrays["sizes"] == 1).any()
    _, dw = PROBLEM.oracle_bwd(ar, PLAIN, **arrays)
    further = PROBLEM.further["dw"]
    (alone,) = further.oracle(ar, PLAIN, **{n: arrays[n] for n in further.reads})
    assert np.array_equal(dw, alone) and np.isfinite(dw).all()
    assert not dw[empty].any() and dw[~empty].any(axis=(1, 2)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_routing_sends_every_row_somewhere_and_always_the_same_way(kind):
    routing = Routing((12,), 4096, kind)
    sizes = routing.draw(np.random.default_rng(7))
    assert sizes.dtype == np.int32 and sizes.sum() == 4096 and (sizes >= 0).all()
    assert np.array_equal(sizes, routing.draw(np.random.default_rng(7)))
    assert np.count_nonzero(sizes) == pytest.approx(routing.active, abs=0.01)
    want = np.sort(routing.expected)
    assert np.allclose(np.sort(sizes), want, atol=5 * np.sqrt(want.max()))
    drawn = {tuple(routing.draw(np.random.default_rng(seed))) for seed in range(9)}
    assert len(drawn) == 1 if kind == "ragged" else len(drawn) > 3  # who is popular is drawn too


def test_the_shapes_of_routings():
    zipf = np.sort(Routing((8,), 1 << 20, "zipf").draw(np.random.default_rng(0)))[::-1]
    assert zipf[0] / zipf[3] == pytest.approx(4, rel=0.02)
    assert np.count_nonzero(Routing((8,), 999, "half").draw(np.random.default_rng(0))) == 4
    for rows, experts in ((0, 5), (1, 5), (140, 5), (9, 1), (9, 2), (0, 0)):
        sizes = Routing((experts,), rows, "ragged").draw(np.random.default_rng(0))
        assert sizes.sum() == rows and len(sizes) == experts
    assert list(Routing((5,), 140, "ragged").draw(np.random.default_rng(0))) == [70, 0, 1, 35, 34]


def test_routings_drawn_by_torch_are_routings(monkeypatch):
    """What a GPU draws, drawn by torch on the CPU."""
    torch = pytest.importorskip("torch")
    from parity.frameworks import torch as memory

    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    here = {n: getattr(torch, n) for n in ("randperm",)}
    monkeypatch.setattr(
        torch, "randperm", lambda n, generator, device: here["randperm"](n, generator=generator)
    )
    for kind in KINDS:
        routing = Routing((12,), 4096, kind)
        sizes = memory._group_sizes(routing, torch.Generator().manual_seed(3)).numpy()
        assert sizes.shape == (12,) and sizes.sum() == 4096
        assert np.count_nonzero(sizes) == pytest.approx(routing.active, abs=0.01)


def test_dead_rows_are_poisoned():
    arrays = _draw(PROBLEM.workload("ci_fused"))
    live = arrays["sizes"].sum()
    assert live < len(arrays["rows"])
    assert (arrays["rows"][live:] == -1).all() and (arrays["rows"][:live] >= 0).all()
    assert np.isnan(arrays["dy"][live:]).all() and np.isnan(arrays["row_scale"][live:]).all()
    assert np.isnan(_draw(PLAIN)["x"][140:]).all() and np.isfinite(arrays["x"]).all()


def test_costs_count_active_experts_alone():
    decode = PROBLEM.workload("dsv3_decode_t64")
    arrays = {"sizes": np.eye(1, 256, 3, dtype=np.int32)[0] * decode["M"]}
    one = PROBLEM.cost_of(decode, "fwd", arrays).bytes
    item, (M, K, N) = 2, (decode[n] for n in "MKN")
    assert one == item * (K * N + M * K + M * N)
    expected = PROBLEM.cost(decode, "fwd").bytes - one
    active = 256 * (1 - (1 - 1 / 256) ** M)
    assert expected == pytest.approx(item * K * N * (active - 1))
    up = PROBLEM.workload("mixtral_up")
    fwd, bwd, dw = (PROBLEM.cost(up, which) for which in up.passes)
    assert fwd.flops == dw.flops == bwd.flops / 2 == 2 * 16384 * 4096 * 14336


def test_the_workloads_of_the_issue_are_there():
    names = {w.name for w in PROBLEM.workloads}
    skews = {f"{m}_up_{k}" for m in ("mixtral", "qwen3") for k in ("zipf", "onehot", "half")}
    decode = {f"{m}_decode_t{t}" for m in ("mixtral", "dsv3") for t in (1, 8, 32, 64)}
    layers = "mixtral_up mixtral_down mixtral8x22_up dsv3_up dsv3_up_131k qwen3_up gptoss_up"
    assert names >= {*layers.split(), *skews, *decode}
