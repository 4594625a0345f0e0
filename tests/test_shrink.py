"""The smallest failing case is the smallest, and what is said of a wrong answer is true."""

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from parity import cli, diagnose, doctor, faults, report, shrink, workers
from parity.check import check
from parity.commands import failing
from parity.diagnose import Tiles
from parity.frameworks import Kernel, twin
from parity.frameworks.torch import draw
from parity.judge import judge, truth_and_model
from parity.problems import PROBLEMS, problem
from parity.shrink import Case, resized, signature

# The search


def tiles(n: int, block: int) -> int:
    return -(-n // block)


GEMM = {"M": 72, "N": 136, "K": 152}
ROWS = {"R": 9, "N": 1003}


@pytest.mark.parametrize(
    ("start", "fails", "least"),
    [
        (ROWS, lambda R, N: N > 256 and N % 8 != 0, {"R": 1, "N": 257}),
        (ROWS, lambda R, N: N % 64 == 43, {"R": 1, "N": 43}),
        (ROWS, lambda R, N: R >= 1, {"R": 1, "N": 1}),  # off by one at the last row
        (ROWS, lambda R, N: R > 1, {"R": 2, "N": 1}),  # the last of several rows
        (GEMM, lambda M, N, K: tiles(M, 64) * tiles(N, 64) >= 2, {"M": 1, "N": 65, "K": 1}),
        (GEMM, lambda M, N, K: tiles(K, 64) > 2, {"M": 1, "N": 1, "K": 129}),
        (GEMM, lambda M, N, K: M > 64 and N % 64 and K % 16, {"M": 65, "N": 1, "K": 1}),
        (GEMM, lambda M, N, K: M * K > 9000, {"M": 60, "N": 1, "K": 151}),
        (GEMM, lambda M, N, K: (M, N, K) == (72, 136, 152), GEMM),
    ],
)
def test_planted_bugs_shrink_to_their_smallest_case(start, fails, least):
    assert fails(**start) and fails(**least)
    found = shrink.shrink(Case(start), (), lambda case: bool(fails(**case.sizes)))
    assert found.complete and dict(found.case.sizes) == least


def test_options_and_inputs_that_do_not_matter_go():
    """A bug that shows only in a masked row needs the mask and nothing else."""
    p = problem("softmax")
    work = p.workload("ci_mask")
    assert shrink.optional(p, work) == ("scale", "causal_offset", "mask")

    def fails(case: Case) -> bool:
        return "mask" not in case.without

    found = shrink.shrink(Case(dict(work.sizes)), shrink.optional(p, work), fails)
    assert found.case == Case({"R": 1, "N": 1}, ("scale", "causal_offset"))


def test_cases_that_a_problem_refuses_do_not_count():
    """N is a multiple of the groups G: no size alone can go to 1."""

    def fails(case: Case) -> bool:
        return case.sizes["N"] % case.sizes["G"] == 0 and case.sizes["G"] >= 2

    found = shrink.shrink(Case({"G": 8, "N": 64}), (), fails)
    assert fails(found.case) and found.case.sizes["N"] <= 8


SIZE = st.integers(1, 2000)


@given(start=st.tuples(SIZE, SIZE), bound=SIZE, modulus=st.integers(1, 8), data=st.data())
@settings(max_examples=60, deadline=None)
def test_bounds_and_remainders_are_found_exactly(start, bound, modulus, data):
    remainder = data.draw(st.integers(0, modulus - 1))

    def right(n: int) -> bool:
        return n >= bound and n % modulus == remainder

    least = next(n for n in range(bound, bound + modulus) if n % modulus == remainder)
    rows, n = start[0], least + modulus * (start[1] // modulus)
    found = shrink.shrink(
        Case({"R": rows, "N": n}), (), lambda case: right(case.sizes["N"]), tries=2000
    )
    assert dict(found.case.sizes) == {"R": 1, "N": least}


@given(holes=st.sets(st.integers(1, 300)), start=st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_whatever_fails_the_case_found_fails_and_is_judged_once(holes, start):
    judged: list[int] = []

    def fails(case: Case) -> bool:
        judged.append(case.sizes["N"])
        return case.sizes["N"] == start or case.sizes["N"] in holes

    found = shrink.shrink(Case({"N": start}), (), fails)
    n = found.case.sizes["N"]
    assert n <= start and (n == start or n in holes)
    assert len(judged) == len(set(judged)) == found.tries
    assert shrink.shrink(Case({"N": start}), (), fails).case == found.case


def test_the_limits_hold_and_keep_the_best_so_far():
    def fails(case: Case) -> bool:
        return case.sizes["N"] > 300

    cut = shrink.shrink(Case({"N": 10_000}), (), fails, tries=5)
    assert cut.tries == 5 and not cut.complete and 300 < cut.case.sizes["N"] < 10_000
    none = shrink.shrink(Case({"N": 10_000}), (), fails, seconds=0.0)
    assert (none.tries, none.complete, none.case) == (0, False, Case({"N": 10_000}))


def test_a_failure_is_the_same_only_for_the_same_reason():
    row = {"ok": False, "reason": "tile", "detail": "y: tile 3 is off"}
    assert signature(row) == signature(row | {"reason": "norm"})  # one tile is the whole
    assert signature(row) != signature(row | {"reason": "zeros"})
    crash = {"ok": False, "reason": "crash", "detail": "ValueError: x: expected [3, 70]"}
    assert signature(crash) == signature(crash | {"detail": "ValueError: x: expected [1, 1]"})
    assert signature(crash) != signature(crash | {"detail": "IndexError: 3"})
    assert signature(row | {"ok": True}) == ""


def test_another_size_makes_another_workload():
    p = problem("softmax")
    work = resized(p, p.workload("ci_mask"), {"R": 2}, ("scale", "mask"))
    assert dict(work.sizes) == {"R": 2, "N": 264} and work.name == "ci_mask R=2 -scale -mask"
    assert work.options == {"causal_offset": 260} and list(p.inputs(work)) == ["x"]
    assert resized(p, p.workload("ci"), {}) is p.workload("ci")
    for sizes, without in (({"M": 2}, ()), ({}, ("mask",)), ({"R": -1}, ())):
        with pytest.raises(ValueError, match=r"no size 'M'|no option 'mask'|not negative"):
            resized(p, p.workload("ci"), sizes, without)


def test_the_replay_is_understood():
    p = problem("softmax")
    case = Case({"R": 1, "N": 65}, ("scale",))
    told = shrink.replay(
        p, p.workload("ci"), case, "fwd", twin="triton", impl="my file.py:softmax", seed=3
    )
    words = shlex.split(told)
    assert words[:2] == ["parity", "check"]
    args = cli._parse(words[1:])
    assert (args.stems, args.workload, args.which) == (["softmax"], ["softmax/ci"], "fwd")
    assert (args.sizes, args.without, args.seed) == ({"R": 1, "N": 65}, ("scale",), 3)
    assert (args.impl, args.impl_as) == ("my file.py:softmax", "triton")


# The diagnosis


def judged(p, work, which, wrong=lambda case: case.good, configs=(), like=lambda x: x):
    """The diagnosis of a wrong answer to one pass; None where the fault changes nothing.

    like: makes the harness's arrays of another kind.
    """
    drawn = draw({**p.inputs(work), **p.cotangents(work)}, 0)
    drawn = {n: like(x) for n, x in drawn.items()}
    arrays = {n: drawn[n] for n in p.reads(work, which)}
    truth, model = truth_and_model(p, work, which, arrays)
    case = faults.case_of(p, work, which, arrays, truth, model)
    answer = wrong(case)
    if answer is None or faults._same(case.xp, answer, case.good):
        return None
    for (name, spec), y, r, m in zip(case.specs.items(), answer, truth, model, strict=True):
        terms = p.reduction(work, name)
        verdict = judge(name, y, r, m, spec, family=p.family, terms=terms)
        if not verdict.ok:
            return diagnose.diagnosis(case, model, answer, verdict, configs)
    raise AssertionError("the judge passes it")


def exact(p, work, which):
    """Whole numbers and codes: other faults are planted there."""
    first = next(iter(p.results(work, which).values()))
    return first.exact or "int" in first.dtype


FLOATS = [p for p in PROBLEMS if not exact(p, p.workload("ci"), p.workload("ci").passes[0])]
SHORT = [
    (p, w) for p in PROBLEMS for w in p.workloads if "ci" in w.tags and w.name != "ci_long_row"
]


def called(work, which, name, columns):
    """Where two faults make the same answer, either name is true: a tile has all columns, or the
    last term of a softmax reaches no unmasked element but itself."""
    if name == "dropped_tail" and columns <= 64:
        return "skipped_tile"
    if (work.name, which, name) == ("ci_mask", "fwd", "last_term_missing"):
        return "dropped_tail"
    return name


@pytest.mark.parametrize(("p", "work"), SHORT, ids=lambda v: getattr(v, "stem", None) or v.name)
def test_every_planted_answer_is_called_by_its_name(p, work):
    for which in work.passes:
        if exact(p, work, which):
            continue
        for fault in faults.ANSWERS:
            found = judged(p, work, which, fault)
            if found is None:
                continue
            name = fault.__name__
            columns = next(iter(p.results(work, which).values())).shape[-1]
            expected = called(work, which, name, columns)
            assert found["looks_like"] == expected and found["because"], (which, name)


def test_on_a_gpu_the_arrays_are_tensors_and_bfloat16():
    p = problem("matmul")
    work = replace(p.workload("ci"), dtype="bfloat16")
    named = {}
    for fault in faults.ANSWERS:
        if found := judged(p, work, "fwd", fault, like=twin("triton").native):
            named[fault.__name__] = found["looks_like"]
    assert named == {name: name for name in named} and len(named) >= 10


@pytest.mark.parametrize("share", [1.0, 0.3, 0.02])
@pytest.mark.parametrize("p", FLOATS, ids=lambda p: p.stem)
def test_noise_is_like_nothing(p, share):
    rng = np.random.default_rng(int(100 * share))

    def noisy(case):
        def edit(y):
            hit = rng.random(y.shape) < share
            scale = np.sqrt(np.mean(np.square(y.astype(np.float64))))
            y += (hit * rng.standard_normal(y.shape) * scale).astype(y.dtype)

        return case.edited(edit)

    found = judged(p, p.workload("ci"), p.workload("ci").passes[0], noisy)
    assert found["looks_like"] is None and found["because"] == ""
    assert found["wrong"] > 0 and found["where"]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("p", FLOATS, ids=lambda p: p.stem)
def test_noise_in_a_few_elements_is_like_nothing(p, seed):
    rng = np.random.default_rng(seed)
    sizes = dict.fromkeys(p.workload("ci").sizes, 2)

    def noisy(case):
        return case.edited(
            lambda y: y.__iadd__(rng.choice((-1, 1), y.shape).astype(y.dtype) * (abs(y) + 0.1) / 3)
        )

    small = resized(p, p.workload("ci"), sizes)
    found = judged(p, small, small.passes[0], noisy)
    assert found["looks_like"] is None and found["because"] == ""


def test_where_the_model_fails_too_no_kernel_is_blamed():
    """rms_norm's gradient of a single column is a difference that float32 cannot see."""
    p = problem("rms_norm")
    work = resized(p, p.workload("ci"), {"R": 1, "N": 1})
    rows = check(p, work, impls={"triton": p.implementations["triton"]}, passes=("bwd",))
    assert "the model itself fails" in rows[0].diagnosis["unfair"]
    assert failing.chosen([row.to_json() for row in rows]) == []


def edited(change):
    return lambda case: case.edited(change)


def zero(at):
    return edited(lambda y: y.__setitem__(at, 0))


@pytest.mark.parametrize(
    ("wrong", "like", "words"),
    [
        (zero(np.s_[-1, :]), "dropped_tail", "row 71 (the last)"),
        (zero(np.s_[:, 100:]), "dropped_tail", "columns >= 100 (of 136)"),
        (zero(np.s_[8:16, 32:64]), "skipped_tile", "rows 8 to 15 (of 72), columns 32 to 63"),
        (zero(np.s_[:, 60::64]), None, "columns 60, 124: zero"),
        (edited(lambda y: y.__imul__(np.float16(2))), None, "2 times the truth"),
        (edited(lambda y: y[3:5].__imul__(np.float16(0.5))), None, "0.5 times the truth there"),
        (lambda c: (c.good[0][::-1],), None, ""),
        (lambda c: (np.ascontiguousarray(c.good[0].T),), None, "transposed"),
        (lambda c: faults.shifted_by_one(c, by=-1, axis=0), "shifted_by_one", "neighbour"),
        (lambda c: faults.last_term_missing(c, terms=24), "last_term_missing", "24 terms early"),
    ],
)
def test_what_else_a_wrong_product_is_like(wrong, like, words):
    found = judged(problem("matmul"), problem("matmul").workload("ci"), "fwd", wrong)
    assert found["looks_like"] == like
    assert words in found["because"] if words else found["because"] == ""


def test_an_ignored_mask_is_recognised():
    p = problem("softmax")
    found = judged(
        p, p.workload("ci_mask"), "fwd", lambda case: faults.option_ignored(case, "mask")
    )
    assert (found["looks_like"], found["because"]) == (
        "option_ignored",
        "it is the answer without mask",
    )


def test_the_first_wrong_element_and_the_place_of_all():
    def change(y):
        y[70, 130:] *= 3

    p = problem("matmul")
    config = {"block_m": 64, "block_n": 64, "warpgroups": 1}
    found = judged(p, p.workload("ci"), "fwd", edited(change), [config])
    first = found["first_wrong"]
    assert first["index"] == [70, 130] and first["tile"] == [1, 2] and first["block"] == [64, 64]
    assert first["warpgroup"] == 0 and first["looks"] == "3 times the truth"
    assert found["where"] == (
        "every wrong element lies in row 70, columns >= 130 (of 136); all in tile (1, 2) of 2 x 3"
    )
    assert (found["wrong"], found["elements"]) == (6, 72 * 136)
    json.dumps(found)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (lambda y: 0, "zero"),
        (lambda y: np.nan, "NaN"),
        (lambda y: np.inf, "infinite"),
        (lambda y: -y[5, 7], "the sign is wrong"),
        (lambda y: 2 * y[5, 7], "twice the truth"),
        (lambda y: y[5, 7] / 2, "half the truth"),
        (lambda y: y[5, 8], "belongs in column 8"),
        (lambda y: y[4, 7], "belongs in row 4"),
    ],
)
def test_what_one_wrong_element_looks_like(value, words):
    def change(y):
        y[5, 7] = value(y)

    found = judged(problem("matmul"), problem("matmul").workload("ci"), "fwd", edited(change))
    assert found["first_wrong"]["index"] == [5, 7] and words in found["first_wrong"]["looks"]
    assert found["where"] == "one element is wrong: row 5, column 7"


def test_an_error_spread_over_all_has_no_place():
    p = problem("matmul")
    found = judged(p, p.workload("ci"), "fwd", faults.truncating_store)
    assert found["where"].startswith("no element is out of line") and found["wrong"] == 0


@pytest.mark.parametrize(
    ("tiles", "at", "warpgroup"),
    [
        (Tiles(128, 64, 2), (70, 0), 1),  # each takes half of the tile's rows
        (Tiles(128, 64, 2), (130, 0), 0),
        (Tiles(1, 256, 4), (3, 700), 2),  # four share a row, chunk by chunk
        (Tiles(4, 256, 4), (6, 700), 2),  # one for each row of the block
        (Tiles(2, 256, 4), (1, 300), 3),  # two for each
        (Tiles(64, 64), (3, 3), None),
    ],
)
def test_which_warpgroup_has_an_element(tiles, at, warpgroup):
    assert tiles.warpgroup(*at) == warpgroup


def test_a_map_has_as_many_marks_as_a_terminal_can_show():
    p = problem("matmul")

    def grid(work, block):
        config = {"block_m": block, "block_n": block}
        found = judged(p, work, "fwd", zero(np.s_[-1, -1]), [config])["map"]
        error = found["relative_error"]
        return found["cell"], error

    work = p.workload("ci")
    cell, error = grid(resized(p, work, {"M": 600, "N": 800, "K": 8}), 2)
    assert cell == [38, 14] and (len(error), len(error[0])) == (16, 58)  # several tiles a mark
    assert error[-1][-1] > 1e-2 and error[0][0] < 1e-3
    cell, error = grid(work, 64)
    assert cell == [8, 8] and (len(error), len(error[0])) == (9, 17)  # parts of a tile


@triton.jit
def _copy_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    for start in range(0, N // BLOCK * BLOCK, BLOCK):  # forgets the ragged end
        at = row * N + start + tl.arange(0, BLOCK)
        tl.store(y_ptr + at, tl.load(x_ptr + at))


def _forgetful(x, *, scale=1.0, config=None):
    import torch

    right = torch.softmax(scale * x.float(), 1).to(x.dtype)
    y = torch.zeros_like(x)
    _copy_kernel[(x.shape[0],)](right, y, x.shape[1], BLOCK=64)
    return y


def test_a_check_that_fails_says_what_it_looks_like_and_in_which_tile():
    kernel = Kernel(_forgetful, lambda *a, **k: (_forgetful(*a, **k), ()), _forgetful, __file__)
    p = problem("softmax")
    work = resized(p, p.workload("ci"), {"R": 2, "N": 150})
    (row,) = check(p, work, impls={"triton": kernel}, passes=("fwd",))
    found = row.diagnosis
    assert row.reason == "zeros" and found["looks_like"] == "dropped_tail"
    assert found["because"] == "columns >= 128 (of 150): zero, and nothing else is wrong"
    assert found["first_wrong"]["index"] == [0, 128] and found["first_wrong"]["tile"] == [0, 2]
    assert found["first_wrong"]["block"] == [1, 64] and found["first_wrong"]["block_known"]
    json.dumps(row.to_json())


def test_what_only_whole_numbers_show_is_diagnosed_on_them():
    def off_on_integers(a, b, *, config=None):
        c = a.float() @ b.float()
        if bool((a == a.round()).all()):
            c[3, 5] += 1
        return c.to(a.dtype)

    def fwd(*inputs, **options):
        return off_on_integers(*inputs, **options), ()

    p = problem("matmul")
    work = resized(p, p.workload("ci"), {"M": 8, "N": 9, "K": 10})
    kernel = Kernel(off_on_integers, fwd, fwd, __file__)
    (row,) = check(p, work, impls={"triton": kernel}, passes=("fwd",))
    assert row.reason == "probe" and row.diagnosis["first_wrong"]["index"] == [3, 5]
    assert row.diagnosis["where"] == "one element is wrong: row 3, column 5"


@pytest.mark.parametrize(
    ("stem", "sizes"), [("softmax", {"R": 0}), ("rms_norm", {"R": 0}), ("matmul", {"K": 0})]
)
def test_sizes_of_zero_are_judged_too(stem, sizes):
    p = problem(stem)
    rows = check(p, resized(p, p.workload("ci"), sizes))
    assert len(rows) == 4 and [row.detail for row in rows if not row.ok] == []


def test_a_diagnosis_that_fails_leaves_the_verdict(monkeypatch):
    def broken(*args):
        raise ZeroDivisionError("no luck")

    monkeypatch.setattr(diagnose, "diagnosis", broken)
    kernel = Kernel(_forgetful, lambda *a, **k: (_forgetful(*a, **k), ()), _forgetful, __file__)
    p = problem("softmax")
    work = resized(p, p.workload("ci"), {"R": 2, "N": 150})
    (row,) = check(p, work, impls={"triton": kernel}, passes=("fwd",))
    assert row.reason == "zeros" and row.diagnosis == {"failed": "ZeroDivisionError: no luck"}


# The command

# A child that keeps the workers' protocol; what a target is called, it does from N = 65 on
# (a hang at every size).
FAKE = """
import json, os, sys, time
N = {"ci": 1003, "ci_causal": 3, "ci_mask": 264, "ci_long_row": 60003}
for line in sys.stdin:
    job = json.loads(line)
    (which,) = job["passes"]
    rows, n = [], job["sizes"].get("N", N[job["workload"]])
    for impl, target in job["impls"].items():
        print(json.dumps({"step": f"softmax {job['workload']} {which}: {impl}"}), flush=True)
        bad = n >= (1 if target == "hang" else 65) and target != "fine"
        if bad and target == "hang":
            time.sleep(60)
        if bad and target == "abort":
            os.abort()
        map = {"shape": [1, n], "tile": [1, 64], "tile_known": True, "cell": [1, 64],
               "allowed": 1e-3, "relative_error": [[0.0] * (n // 64) + [None]]}
        first = {"index": [0, 64], "got": "nan", "expected": 0.5, "looks": "NaN", "tile": [0, 1],
                 "block": [1, 64], "block_known": True, "warpgroup": 1}
        diagnosis = {"output": "y", "shape": [1, n], "wrong": 1, "elements": n, "map": map,
                     "first_wrong": first, "where": "it is here", "looks_like": "unwritten_tail",
                     "because": "column 64: never written"}
        rows.append({"problem": "softmax", "workload": job["workload"], "which": which,
                     "impl": impl, "dtype": job["dtype"], "ok": not bad,
                     "reason": "nonfinite" if bad else "", "detail": "y[0, 64] is nan" * bad,
                     "error": 1e-3, "yardstick": 1e-3, "verdicts": [], "seconds": 0.0, "ulp": None,
                     "diagnosis": diagnosis if bad else None})
    print(json.dumps({"rows": rows}), flush=True)
"""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(doctor, "machine", lambda: doctor.Machine((), "", "no NVIDIA driver"))
    monkeypatch.setattr(report, "LOCAL", tmp_path / "results")
    monkeypatch.setattr(report, "source_of", lambda target: "abc")
    monkeypatch.setattr(workers, "command", lambda mode: [sys.executable, "-c", FAKE])
    monkeypatch.setattr(failing, "HANGS_AFTER", 0.5)
    implementations = problem("softmax").implementations
    monkeypatch.setitem(implementations, "triton", "fine")

    def target(name: str) -> None:
        monkeypatch.setitem(implementations, "pallas", name)

    return target


def parity(*args: str) -> int:
    return cli.main(args)


def test_a_failure_is_told_on_one_screen(fake, capsys, monkeypatch):
    fake("wrong")
    monkeypatch.setenv("COLUMNS", "80")
    assert parity("check", "softmax", "-w", "softmax/ci", "--twin", "pallas") == 1
    out, err = capsys.readouterr()
    assert out.startswith("2 of 2 checks fail (nonfinite)")
    assert "looks like" in out and "unwritten tail: column 64: never written" in out
    assert "R=1, N=65 without scale" in out and "y[0, 64] is nan, expected 0.5 (NaN)" in out
    assert "tile (0, 1) of 1 x 64, warpgroup 1" in " ".join(out.split())
    assert "···············N" in out and "N not finite" in out
    replay = (
        "parity check softmax -w softmax/ci -s R=1,N=65 --without scale --pass fwd --twin pallas"
    )
    assert out.rstrip().endswith(replay) and "shrink 1/1" in err
    assert all(len(line.rstrip()) <= 80 or "parity check" in line for line in out.splitlines())
    assert len(out.splitlines()) <= 24


def test_without_shrinking_nothing_is_tried_again(fake, capsys):
    fake("wrong")
    assert parity("check", "softmax", "-w", "softmax/ci", "--no-shrink", "--json") == 1
    said = json.loads(capsys.readouterr().out)
    assert said["smallest"] == [] and said["checks"][1]["diagnosis"]["wrong"] == 1
    assert parity("check", "softmax", "-w", "softmax/ci", "--no-shrink") == 1
    out = capsys.readouterr().out
    assert "unwritten tail" in out and "N not finite" in out and "smallest" not in out


@pytest.mark.parametrize(
    ("target", "reason", "n"), [("abort", "crash", 65), ("hang", "timeout", 1)]
)
def test_what_kills_or_hangs_a_worker_is_shrunk_too(fake, capsys, target, reason, n):
    fake(target)
    args = ("check", "softmax", "-w", "ci_mask", "--pass", "fwd", "--timeout", "1", "--json")
    assert parity(*args) == 1
    (story,) = json.loads(capsys.readouterr().out)["smallest"]
    assert (story["reason"], story["impl"]) == (reason, "pallas")
    assert story["sizes"] == {"R": 1, "N": n} and story["complete"] and story["again"]
    assert ("--timeout 0.5" in story["replay"]) == (target == "hang")


def test_a_replay_is_judged_at_its_sizes_and_kept_nowhere(fake, capsys):
    fake("wrong")
    at = ("check", "softmax", "-w", "softmax/ci", "--pass", "fwd", "--without", "scale", "-s")
    assert parity(*at, "R=1,N=64") == 0
    assert parity(*at, "R=1,N=65") == 1
    assert "no smaller case of ci fails this way" in " ".join(capsys.readouterr().out.split())
    assert not report.Results.here().checks


def test_what_fails_once_is_said_to(fake, capsys, monkeypatch):
    fake("wrong")
    monkeypatch.setattr(failing, "MOST", 1)
    real = shrink.signature
    seen: list[str] = []

    def forgetful(row):
        seen.append(row["workload"])
        return real(row) if len(seen) <= 2 else ""  # the run, and never again

    monkeypatch.setattr(shrink, "signature", forgetful)
    assert parity("check", "softmax", "-w", "softmax/ci", "--twin", "pallas", "--pass", "fwd") == 1
    assert "did not fail when it ran again" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["matmul", "-s", "R=3"], "no size 'R'"),
        (["softmax", "-s", "R"], "expected M=3,N=70"),
        (["softmax", "-s", "R=1,R=2"], "expected M=3,N=70"),
        (["softmax", "-s", "R=-1"], "expected M=3,N=70"),
        (["softmax", "--without", "msak"], "'mask'"),
        (["softmax", "--pass", "forward"], "'fwd'"),
    ],
)
def test_sizes_that_make_no_sense(args, hint, capsys, fake):
    assert parity("check", *args) == 2
    out, err = capsys.readouterr()
    assert hint in err and err.count("\n") == 1 and not out


def test_a_wrong_forward_is_mended_before_its_backward():
    def row(which, impl, reason="zeros", **more):
        place = {"problem": "softmax", "workload": "ci", "which": which, "impl": impl}
        found = {"ok": not reason, "reason": reason, "detail": "", "verdicts": []}
        return place | found | more

    rows = [row("fwd", "triton"), row("bwd", "triton", "norm"), row("fwd", "triton", "race")]
    rows += [row("fwd", "pallas", ""), row("bwd", "pallas")]
    rows += [row("fwd", "pallas", "timeout", detail="not run: the fwd ran out of time")]
    rows += [row("fwd", "x", "crash", verdicts=[{"output": "load"}])]
    found = [(r["which"], r["impl"], r["reason"]) for r in failing.chosen(rows)]
    assert found == [
        ("fwd", "triton", "zeros"), ("fwd", "triton", "race"), ("bwd", "pallas", "zeros"),
    ]  # fmt: skip
