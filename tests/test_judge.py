"""The judge on trial: it passes the model and catches every planted fault for the right reason."""

import ml_dtypes
import numpy as np
import pytest
import torch

from parity import faults
from parity.judge import judge, judge_exact, judge_twins, limit, ulp_histogram
from parity.problems import PROBLEMS
from parity.shrink import resized
from parity.spec import Array

CI = [(p, w) for p in PROBLEMS for w in p.workloads if "ci" in w.tags]
SCANS = ("linear_scan", "rglru")
# Who cheats does so at any size, and scans walk row by row. The forward of the atomic variant
# is that of hybrid_attention.
SMALLEST = [
    (p, resized(p, w, {"T": 29} if p.stem in SCANS else {}))
    for p, w in (next(pw for pw in CI if pw[0] is p) for p in PROBLEMS)
    if p.stem != "hybrid_attention_atomic"
]


@pytest.fixture(scope="module")
def tally(request):
    """Collects every planted fault and prints the kill rate at the end."""
    rows: list[faults.Caught] = []
    yield rows
    planted = [row for row in rows if row.fault != "none"]
    killed = sum(row.ok for row in planted)
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    reporter.write_line(
        f"\nkill rate: {killed} of {len(planted)} planted faults caught, reason right"
    )


@pytest.mark.parametrize(("problem", "work"), CI, ids=lambda v: getattr(v, "stem", None) or v.name)
def test_every_wrong_answer_is_caught_and_the_model_passes(problem, work, tally):
    rows = list(faults.answers(problem, work))
    tally += rows
    assert [row for row in rows if not row.ok] == []
    results = [s for which in work.passes for s in problem.results(work, which).values()]
    exact = all(spec.exact or "int" in spec.dtype for spec in results)  # nothing is rounded there
    of_any = {"shifted_by_one"} if exact else {"unwritten_tail", "one_precision_lower"}
    of_scans = {"state_leaks", "empty_sequence_not_written"} if problem.stem in SCANS else set()
    assert {row.fault for row in rows} >= {"none"} | of_any | of_scans


@pytest.mark.parametrize("twin", ["triton", "pallas"])
@pytest.mark.parametrize(("problem", "work"), SMALLEST, ids=[p.stem for p, _ in SMALLEST])
def test_every_cheating_kernel_is_caught(problem, work, twin, tally):
    rows = list(faults.behaviours(problem, work, twin))
    tally += rows
    assert [row for row in rows if not row.ok] == []


def test_limits_follow_the_yardstick_and_the_caps():
    bf16, f32 = Array((64, 64), "bfloat16"), Array((64, 64), "float32")
    assert limit("gemm", bf16, 1.6e-3, 4096) == pytest.approx(2.4e-3 + 1e-6)
    assert limit("gemm", bf16, 2.5e-3, 4096) == 3e-3
    assert limit("gemm", f32, 1e-7, 4096) == pytest.approx(5e-6)


def test_a_few_sums_of_rounded_products_make_no_yardstick():
    """Their error is luck: the cap for gradients of gates is all that is asked, and of many that
    they are as float32's."""
    for shape, of, allowed in (
        ((4,), "float16", 5e-3),
        ((4,), "bfloat16", 1.5e-2),
        ((4,), "", 3e-5 + 1e-6),
        ((64,), "float16", 1e-4),
    ):
        spec = Array(shape, "float32", of=of)
        assert limit("scan", spec, 2e-5, 141) == pytest.approx(allowed)


def test_one_bad_tile_cannot_hide_in_a_large_norm():
    rng = np.random.default_rng(0)
    r = rng.standard_normal((64 * 200, 256))
    model = r.astype(np.float32)
    y = r.astype(np.float16)
    spec = Array(y.shape, "float16")
    assert judge("y", y, r, model, spec, family="gemm", terms=1).ok
    y[640:704] *= np.float16(1.003)
    found = judge("y", y, r, model, spec, family="gemm", terms=1)
    assert (found.reason, found.worst_tile) == ("tile", 10)
    assert found.first_wrong[0] in range(640, 704)


@pytest.mark.parametrize(
    ("y", "r", "ok"),
    [
        ([1.0, np.nan], [1.0, np.nan], True),
        ([1.0, 2.0], [1.0, np.nan], False),  # NaN is never a wildcard
        ([1.0, np.nan], [1.0, 2.0], False),
        ([1.0, np.inf], [1.0, 70000.0], True),  # beyond float16: infinity is the rounded truth
        ([1.0, -np.inf], [1.0, np.inf], False),
        ([1.0, 1e-7], [1.0, 0.0], False),  # exactly zero means exactly zero
        ([1.0, -0.0], [1.0, 0.0], True),
    ],
)
def test_non_finite_and_zero_elements(y, r, ok):
    r = np.array(r)
    verdict = judge(
        "y", np.array(y, np.float16), r, r, Array((2,), "float16"), family="norm", terms=1
    )
    assert verdict.ok is ok


@pytest.mark.parametrize(
    ("y", "r", "ok"),
    [
        ([[1.0, 5e-7]], [[1.0, 0.0]], True),  # a sum that is zero by chance
        ([[1.0, 2e-6]], [[1.0, 0.0]], False),
        ([[1.0, 1.0], [0.0, 1e-7]], [[1.0, 1.0], [0.0, 0.0]], False),  # a row without terms
        ([[1.0, 0.0]], [[1.0, 1.0]], False),
    ],
)
def test_zeros_of_products(y, r, ok):
    r = np.array(r)
    y = np.array(y, np.float32)
    verdict = judge("y", y, r, r, Array(y.shape, "float32"), family="gemm", terms=256)
    assert verdict.ok is ok
    assert ok or verdict.reason == "zeros"


@pytest.mark.parametrize(("family", "left", "ok"), [
    ("scan", -3e-14, True),
    ("scan", 1e-9, False),
    ("norm", 3e-14, False),  # nothing cancels there: a small share is one
    ("gemm", 3e-14, False),
])  # fmt: skip
def test_zeros_where_the_truth_is_what_cancelling_left(family, left, ok):
    """The gradient of a first token's gate without a state, say: 1 - 1, in float64."""
    r = np.array([[left, left / 2], [8.0, -5.0]])
    y = np.array([[0, 0], [8, -5]], np.float32)
    verdict = judge("dg", y, r, r, Array(y.shape, "float32"), family=family, terms=64)
    assert verdict.ok is ok
    assert ok or verdict.reason == "zeros"


@pytest.mark.parametrize(("family", "few", "at", "ok"), [
    ("attention", False, 0.012, True),  # two terms of bfloat16 factors that cancel
    ("attention", False, 0.02, False),
    ("norm", False, 0.012, False),
    ("gemm", True, 0.012, True),  # two rows of bfloat16
    ("gemm", True, 0.02, False),
    ("gemm", False, 0.012, False),
])  # fmt: skip
def test_zeros_of_sums_of_rounded_factors(family, few, at, ok):
    r = np.random.default_rng(0).standard_normal((64, 64))
    r[3, 5] = at
    y = r.astype(ml_dtypes.bfloat16)
    y[3, 5] = 0
    spec = Array(r.shape, "bfloat16", few=few)
    verdict = judge("o", y, r, r, spec, family=family, terms=2)
    assert verdict.ok is ok, verdict
    assert ok or (verdict.reason, verdict.first_wrong) == ("zeros", (3, 5))


def test_the_exact_probe_names_the_first_wrong_element():
    r = np.arange(12.0).reshape(3, 4)
    y = r.astype(np.float32)
    assert judge_exact("c", y, r, Array((3, 4), "float32")).ok
    y[1, 2] += 1
    found = judge_exact("c", y, r, Array((3, 4), "float32"))
    assert (found.reason, found.first_wrong) == ("probe", (1, 2))
    assert "is 7" in found.detail and "expected exactly 6" in found.detail


def test_empty_outputs_pass():
    empty = np.zeros((0, 5))
    y = empty.astype(np.float16)
    assert judge("y", y, empty, empty, Array((0, 5), "float16"), family="norm", terms=5).ok


def test_twins_too_far_apart_fail():
    r = np.ones((4, 4))
    a, b = r.astype(np.float16), (r * 1.01).astype(np.float16)
    spec = Array((4, 4), "float16")
    assert judge_twins("y", a, a, r, 2e-4, spec, 3e-4).ok
    assert judge_twins("y", a, b, r, 2e-4, spec, 3e-4).reason == "twins"


def test_ulp_histogram_counts_steps_across_zero():
    a = np.array([1.0, 0.0, -0.0, 1.0], np.float16)
    one_up = np.nextafter(a[0], np.float16(2))
    b = np.array([one_up, np.float16(6e-8), np.float16(-6e-8), 2.0], np.float16)
    assert ulp_histogram(a, b) == {"1": 0.75, ">8": 0.25}
    on_torch = (torch.from_numpy(x).view(2, 2).T for x in (a, b))  # as on a GPU; any strides
    assert ulp_histogram(*on_torch) == {"1": 0.75, ">8": 0.25}
