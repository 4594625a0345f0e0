"""The graded track: its gates, the verdicts on bad input, cheats, and the learner's commands."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from parity.commands.shared import Stop
from parity.spec import NUMPY_DTYPES, Arithmetic
from puzzles import author, pictures, policy, show, verdicts
from puzzles.cli import main
from puzzles.grade import Constraint, Result, grade, judged
from puzzles.process import Child
from puzzles.progress import Progress
from puzzles.puzzle import HOLE, HOME, Puzzle, load, skeleton_of, track
from puzzles.spec import case

Q01 = load(HOME / "q01")
SEED = author.SEED
BACKENDS = ("triton", "pallas")


# What can be read off the folders


@pytest.mark.parametrize("puzzle", track(), ids=lambda p: p.id)
def test_a_puzzle_keeps_to_the_form(puzzle: Puzzle):
    wrong = [gate for gate in author.statement_gates(puzzle) if not gate.ok]
    assert not wrong
    for backend in puzzle.backends:
        for text in (puzzle.solution(backend), puzzle.skeleton(backend)):
            assert not policy.broken(text, puzzle.allow, puzzle.ban)
        for mutant in puzzle.mutants:
            assert mutant.verdict in verdicts.VERDICTS
            if backend in mutant.edits:
                mutant.source(puzzle, backend)


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_picture_is_current(name: str):
    drawn = (HOME / name / "picture.svg").read_text()
    assert drawn == pictures.PICTURES[name]().standing_alone(), "run `python -m puzzles.pictures`"
    assert not re.search(r"#0000[0-9a-f]{2}", drawn)  # every colour is the theme's


def test_a_skeleton_is_the_solution_with_holes():
    text = (
        "def f(x):\n    # BEGIN SOLUTION\n    # 1. double it\n    # INSTEAD return x\n"
        "    # why\n    return 2 * x  # a secret\n    # END SOLUTION\n\n\ndef g():\n"
        "    y = 1\n    # BEGIN SOLUTION\n    y += 1\n    # END SOLUTION\n    return y\n"
    )
    assert skeleton_of(text) == (
        f"def f(x):\n    # 1. double it\n    # why\n    {HOLE}\n    return x\n\n\ndef g():\n"
        f"    y = 1\n    {HOLE}\n    return y\n"
    )


def test_the_random_numbers_of_q05_are_philoxs_and_round_without_bias():
    spec = load(HOME / "q05").spec
    # Random123's known answer for a counter and a key of zeros
    assert spec.philox(0, np.array([0]))[0] == 0x6627E8D5
    x = np.full((1, 20000), 1 + 0.3 / 128, np.float32)
    (rounded,) = spec.oracle(Arithmetic.truth(np), case("mean", {}, seed=5), x)
    assert set(np.unique(rounded)) == {1, 1 + 1 / 128}
    sigma = np.sqrt(0.3 * 0.7 / x.size) / 128
    assert abs(rounded.astype(np.float64).mean() - float(x[0, 0])) < 4 * sigma


# The gates, where a puzzle runs


@pytest.fixture(scope="module")
def children() -> Iterator[dict[str, Child]]:
    with Child("triton", Q01.limits) as triton, Child("pallas", Q01.limits) as pallas:
        yield {"triton": triton, "pallas": pallas}


def test_a_solution_passes_cold():
    assert author.solution_gate(Q01, "triton").detail == "pass, 10 of 10 points"


# Pallas takes seconds a case: one puzzle here, and all of them in `make puzzles`
GATED = [(p, b) for p in track() for b in p.backends if b == "triton" or p.id == "q01"]


@pytest.mark.parametrize(("puzzle", "backend"), GATED, ids=lambda v: getattr(v, "id", v))
def test_a_skeleton_fails_and_mutants_get_their_verdicts(
    puzzle: Puzzle, backend: str, children: dict[str, Child]
):
    gates = [author.skeleton_gate(puzzle, backend, children[backend])]
    for mutant in puzzle.mutants:
        if backend in mutant.edits:
            gates.append(author.mutant_gate(puzzle, backend, mutant, children[backend]))
    assert not [gate for gate in gates if not gate.ok]


# A failure is explained


def test_a_mistake_is_named_and_shrunk(children: dict[str, Child]):
    mutant = next(m for m in Q01.mutants if m.name == "ignores_the_sign")
    found = grade(Q01, "triton", mutant.source(Q01, "triton"), seed=SEED, child=children["triton"])
    assert found.verdict == "wrong_value" and found.story is not None
    assert found.story.complete and found.story.smallest["N"] <= 3
    assert found.story.diagnosis and found.story.diagnosis["looks_like"] == "ignores_the_sign"
    assert 0 < found.points["correctness"] < Q01.points.correctness


def test_the_first_wrong_code_comes_with_its_number(children: dict[str, Child]):
    puzzle = load(HOME / "q06")
    mutant = next(m for m in puzzle.mutants if m.name == "truncates")
    source = mutant.source(puzzle, "triton")
    found = grade(puzzle, "triton", source, seed=SEED, child=children["triton"])
    assert found.story is not None and found.story.diagnosis is not None
    first = found.story.diagnosis["first_wrong"]
    assert first["bits"] == "0x39 where 0x3A belongs" and first["given"] == "x[1] is 1.1875"


def test_what_several_mistakes_explain_is_called_none_of_them(children: dict[str, Child]):
    """One sum of eight steps stays 4 for three reasons; the other cases tell them apart."""
    puzzle = load(HOME / "q05")
    mutant = next(m for m in puzzle.mutants if m.name == "same_at_every_step")
    source = mutant.source(puzzle, "triton")
    found = grade(puzzle, "triton", source, seed=SEED, child=children["triton"])
    assert found.story is not None and found.story.diagnosis is not None
    assert found.story.case == "eight"
    assert found.story.diagnosis["looks_like"] == "same_at_every_step"


def test_a_mistake_that_does_not_explain_what_is_shown_is_not_named(children: dict[str, Child]):
    """Without its last block a sweep over 8 columns sees none, over 2500 what a known one sees."""
    puzzle, loop = (
        load(HOME / "q08"),
        "for start in range(0, {}, block):\n        k = start + lane\n",
    )
    sweep = "largest = tl.zeros([block], tl.float32)\n    " + loop
    source = puzzle.solution("triton").replace(sweep.format("K"), sweep.format("K - block + 1"))
    assert source != puzzle.solution("triton")
    found = grade(puzzle, "triton", source, seed=SEED, child=children["triton"])
    assert found.verdict == "wrong_value" and found.story is not None and found.story.diagnosis
    assert found.story.case == "eight" and not found.story.diagnosis["looks_like"]


def test_the_search_for_a_mistake_ends_in_time(
    children: dict[str, Child], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("puzzles.grade.STORY_SECONDS", 0.0)
    mutant = next(m for m in Q01.mutants if m.name == "ignores_the_sign")
    found = grade(Q01, "triton", mutant.source(Q01, "triton"), seed=SEED, child=children["triton"])
    assert found.story is not None and found.story.smallest["N"] <= 3
    assert found.story.diagnosis and found.story.diagnosis["looks_like"] is None


def test_a_pass_says_which_points_are_still_there(
    children: dict[str, Child], capsys: pytest.CaptureFixture
):
    child = children["triton"]
    found = grade(Q01, "triton", Q01.solution("triton"), seed=SEED, child=child)
    show.result(Console(), Q01, found, "mine.py")
    assert "still there" not in capsys.readouterr().out
    often = Constraint("reads", 30.377, 16.0, False)
    show.result(Console(), Q01, replace(found, constraints=(often, *found.constraints)), "mine.py")
    assert "points are still there: reads 30.38x, 16x allowed\n" in capsys.readouterr().out


def test_holes_that_nobody_filled_are_said_to_be_untouched(children: dict[str, Child]):
    puzzle, child = load(HOME / "q15"), children["triton"]
    skeleton = "\n# mine\n" + puzzle.skeleton("triton")
    found = grade(puzzle, "triton", skeleton, seed=SEED, child=child)
    line = next(n for n, text in enumerate(skeleton.splitlines(), 1) if HOLE in text)
    assert found.unchanged and found.untouched == (line,)
    assert found.story is None and found.points["correctness"] == 0
    q04 = load(HOME / "q04")
    for name in ("triton", "pallas"):
        assert not q04.untouched(name, q04.solution(name))
    half = load(HOME / "q08").skeleton("pallas")
    half = half.replace(f"{HOLE}\n        return largest", "return jnp.maximum(largest, 0.0)")
    assert len(load(HOME / "q08").untouched("pallas", half)) == 2


def test_a_case_of_zeros_earns_nothing_alone(children: dict[str, Child]):
    puzzle = load(HOME / "q15")
    mutant = next(m for m in puzzle.mutants if m.name == "low_nibbles_twice")
    source = mutant.source(puzzle, "triton")
    child = children["triton"]
    found = grade(puzzle, "triton", source, seed=SEED, explain=False, child=child)
    assert [o.case for o in found.outcomes if o.ok] == ["zeros"]
    assert found.points["correctness"] == 0


def test_a_seed_replays_the_fresh_cases():
    def drawn(seed: str) -> list[dict]:
        return [dict(c.sizes) for c in Q01.cases(np.random.default_rng(int(seed, 16)))]

    assert drawn("ab") == drawn("ab") != drawn("ac")


# Bad input: each its own verdict, and the grader survives


def triton(body: str, before: str = "") -> str:
    """A solution that does something else first."""
    text = Q01.solution("triton")
    return text.replace("def solve(x):\n", f"{before}\n\ndef solve(x):\n    {body}\n")


NATIVE = """
@triton.jit
def _far(x_ptr, N, block: tl.constexpr):
    tl.atomic_add(x_ptr + 1000000000000 + tl.arange(0, block), 1.0)
"""
HUGE = "big = torch.full((8 << 30,), 1.0, dtype=torch.float32)"

BAD = {
    "syntax_error": "def solve(x:\n    return x\n",
    "timeout": triton("while True: N = 1"),
    "memory": triton(HUGE),
    "flood": triton("while True: print('again and again, without an end')"),
    "crashed": triton("_far[(1,)](x, 8, 1024)", NATIVE),
    "no_entry_point": Q01.solution("triton").replace("def solve", "def answer"),
    "import_error": "import math\n\nhalf = math.sqrt(-1)\n",
    "raised": triton("x.nothing"),
    "wrong_dtype": Q01.solution("triton").replace("dtype=torch.int8", "dtype=torch.int16"),
    "wrong_shape": Q01.solution("triton").replace("return q, scale", "return q, scale, top"),
    "past_the_end": Q01.solution("triton").replace("tl.int8), mask=i < N)", "tl.int8))"),
}


@pytest.mark.parametrize("verdict", BAD)
def test_bad_input_has_its_verdict(verdict: str, children: dict[str, Child]):
    hasty = replace(Q01, limits=replace(Q01.limits, case_s=3.0))
    child = children["triton"]
    child.limits = hasty.limits
    found = grade(hasty, "triton", BAD[verdict], seed=SEED, explain=False, hasty=True, child=child)
    child.limits = Q01.limits
    assert found.verdict == verdict, found.detail
    assert not found.ok and verdicts.VERDICTS[verdict].helps


@pytest.mark.parametrize(
    ("old", "new", "verdict", "says"),
    [
        ("q_gmem[pl.ds(i *", "q_gmem[pl.ds((i + 1) *", "past_the_end",
         "[1024:2048] of an array of shape (1024,) is written to"),
        ("x = x_gmem[pl.ds(i *", "x = x_gmem[pl.ds((i + 1) *", "past_the_end",
         "[1024:2048] of an array of shape (1024,) is read"),
        ("scale_gmem[...] = jnp.full(scale_gmem.shape,",
         "scale_gmem[jnp.arange(4) * 0] = jnp.full(4,", "raised", "TypeError: only "),
    ],
)  # fmt: skip
def test_a_crash_inside_pallas_interpreter_has_its_line_and_its_words(
    old: str, new: str, verdict: str, says: str, children: dict[str, Child]
):
    text = Q01.solution("pallas")
    assert old in text
    child = children["pallas"]
    source = text.replace(old, new)
    found = grade(Q01, "pallas", source, seed=SEED, explain=False, hasty=True, child=child)
    assert found.verdict == verdict and found.detail.startswith(says)
    assert new in found.outcomes[0].code and not found.output


def test_a_load_beyond_the_end_of_a_tensor_is_seen(children: dict[str, Child]):
    """What lies there does no harm to the answer: nothing but the access itself shows it."""
    puzzle = load(HOME / "q09")
    text = puzzle.solution("triton")
    source = text.replace("absmax_ptr + b, mask=b < B, other=0", "absmax_ptr + b")
    child = children["triton"]
    found = grade(puzzle, "triton", source, seed=SEED, explain=False, hasty=True, child=child)
    assert found.verdict == "past_the_end"
    assert "62 lanes of program (0, 0, 0) load from" in found.detail
    assert "the first is element 2 of absmax_ptr, which has 2 elements" in found.detail
    assert found.outcomes[0].code == "q = tl.load(absmax_ptr + b).to(tl.int32)"


# Cheats: solutions that are right, or look so, and are not what was asked for

REFERENCE = """
def solve(x):
    x = torch.where(x == x, x, 0.0)
    top = x.abs().max().reshape(1)
    q = (x * (torch.full((1,), 127.0) / torch.where(top == 0, 1.0, top))).round().to(torch.int8)
    return q, torch.where(top == 0, 1.0, top / 127)
"""
START = "import torch\nimport triton\nimport triton.language as tl\n"

CHEATS: dict[str, tuple[str, str]] = {
    "calls the library": (START + REFERENCE, "forbidden"),
    "hides its name": (
        START + "def solve(x):\n    return getattr(torch, 'ro' + 'und')(x), x\n", "forbidden"
    ),
    "reads the answer": (
        "from parity import formats\n\ndef solve(x):\n    return x\n", "forbidden"
    ),
    "patches the clock": (
        START + "import time\n\ntime.perf_counter = None\n\ndef solve(x):\n    return x\n",
        "forbidden",
    ),
    "patches the framework": (triton("torch.empty = torch.zeros"), "forbidden"),
    "catches everything": (triton("try: N = 1\n    except: pass"), "forbidden"),
    "keeps a global": (triton("global kept\n    kept = x", "kept = 0"), "forbidden"),
    "writes a file": (triton("open('/tmp/answer', 'w')"), "forbidden"),
    "computes with operators": (triton("x = x * 1"), "foreign_work"),
    "remembers the first answer": (
        triton("if x.shape in kept: return kept[x.shape]", "kept = {}").replace(
            "    return q, scale", "    kept[x.shape] = q, scale\n    return q, scale"
        ),
        "cached",
    ),
    "returns zeros": (
        triton("return torch.zeros(x.shape[0], dtype=torch.int8), torch.zeros(1)"), "wrong_value"
    ),
    "returns a constant": (
        triton("return torch.full(x.shape, 1, dtype=torch.int8), torch.full((1,), 0.01)"),
        "wrong_value",
    ),
    "rounds the scale to half": (
        Q01.solution("triton").replace(
            "top / 127.0)", "(top / 127.0).to(tl.float16).to(tl.float32))"
        ),
        "wrong_value",
    ),
    "writes to its input": (
        Q01.solution("triton").replace(
            "    top = tl.max(largest, axis=0)\n",
            "    top = tl.max(largest, axis=0)\n    tl.store(x_ptr, 0.0)\n",
        ),
        "input_changed",
    ),
    "launches for show": (
        Q01.solution("triton").replace(
            "    return q, scale", "    return q.new_empty(x.shape[0]).copy_(q + 0), scale"
        ),
        "foreign_work",
    ),
    "launches nothing": (
        START + "def solve(x):\n    return torch.zeros(x.shape[0], dtype=torch.int8), "
        "torch.zeros(1)\n",
        "wrong_value",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_is_caught(name: str, children: dict[str, Child]):
    source, verdict = CHEATS[name]
    child = children["triton"]
    found = grade(Q01, "triton", source, seed=SEED, explain=False, hasty=True, child=child)
    assert found.verdict == verdict, found.detail


LOWER = {"float32": "float16", "float16": "bfloat16"}


@pytest.mark.parametrize("puzzle", track(), ids=lambda p: p.id)
def test_zeros_constants_and_less_precision_are_wrong(puzzle: Puzzle):
    """In some case, each: a puzzle is solved in all of them."""
    wrong: dict[str, int] = {}
    for number, work in enumerate(puzzle.cases(np.random.default_rng(0))):
        rng = np.random.default_rng(number)
        arrays = {n: d.draw(rng) for n, d in puzzle.problem.inputs(work).items()}
        specs = puzzle.problem.outputs(work)
        blank = [np.zeros(s.shape, NUMPY_DTYPES[s.dtype]) for s in specs.values()]
        truth = judged(puzzle, work, arrays, blank).truth
        right = [r.astype(x.dtype) for r, x in zip(truth, blank, strict=True)]
        answers = {"zeros": blank, "ones": [np.ones_like(x) for x in blank]}
        for at, (name, spec) in enumerate(specs.items()):
            if spec.dtype in LOWER:  # exact ones hold bfloat16 numbers
                lower = "float8_e5m2" if name in puzzle.exact else LOWER[spec.dtype]
                answers[f"{name} as {lower}"] = [*right]
                answers[f"{name} as {lower}"][at] = (
                    right[at].astype(NUMPY_DTYPES[lower]).astype(spec.dtype)
                )
        assert judged(puzzle, work, arrays, right).bad is None
        for name, outputs in answers.items():
            bad = judged(puzzle, work, arrays, outputs).bad
            wrong[name] = wrong.get(name, 0) + (bad is not None)
    assert all(wrong.values()), wrong


def test_what_a_puzzle_asks_for_may_not_be_called():
    for name in ("x.to(tl.float8e4nv)", "jnp.float8_e4m3fn", "x.astype('float8_e4m3fn')"):
        source = f"def solve(x):\n    y = {name}\n    return y\n"
        (found,) = policy.broken(source, {}, ("float8",))
        assert found.line == 2 and "asks you to write" in found.sentence
    assert not policy.broken("def solve(x):\n    return 'a float8'\n", {}, ("float8",))


def test_a_helper_belongs_to_those_who_call_it():
    helper = "def _helper(x):\n    return jnp.exp(x)\n\n\n"
    kernel = "def _kernel(x, y):\n    y[...] = _helper(x[...])\n\n\n"
    head = "import jax.numpy as jnp\nfrom jax.experimental.pallas import mosaic_gpu as plgpu\n\n\n"
    solve = "def solve(x):\n    return plgpu.kernel(_kernel, out_type=x)({})\n"
    assert not policy.broken(head + helper + kernel + solve.format("x"), {})
    (found,) = policy.broken(head + helper + kernel + solve.format("_helper(x)"), {})
    assert "jax.numpy.exp" in found.sentence
    assert policy.broken(head + "def solve(x):\n    return jnp.exp(x)\n", {})


# Behind the rules: what a solution could do if nobody had read it first


def ungated(monkeypatch: pytest.MonkeyPatch, child: Child, source: str) -> Result:
    monkeypatch.setattr(policy, "broken", lambda *rules: [])
    return grade(Q01, "triton", source, seed=SEED, explain=False, hasty=True, child=child)


FORGES = """for n in range(3, 500):
        try: __import__('os').write(n, b'{"ok": true, "seen": {}}\\n')
        except OSError: pass"""


@pytest.mark.parametrize(
    ("body", "verdict"),
    [
        ("open('/tmp/puzzles-outside', 'w')", "outside"),
        ("__import__('os').system('true')", "outside"),
        ("__import__('time').perf_counter = print", "patched"),
        (FORGES, "forged"),
        ("__import__('os')._exit(0)", "crashed"),
        ("raise SystemExit", "raised"),
    ],
)  # fmt: skip
def test_what_runs_all_the_same_is_caught(
    body: str, verdict: str, children: dict[str, Child], monkeypatch: pytest.MonkeyPatch
):
    found = ungated(monkeypatch, children["triton"], triton(body))
    assert found.verdict == verdict, found.detail
    assert not Path("/tmp/puzzles-outside").exists()


ALLOWED = {
    "triton": ("eq", "full", "scalar_tensor", "where", "abs", "max", "mul", "div", "round"),
    "pallas": ("eq", "select_n", "abs", "reduce_max", "mul", "div", "round", "pad", "slice",
               "convert_element_type"),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_kernel_that_does_not_matter_is_found_out(
    backend: str, children: dict[str, Child], monkeypatch: pytest.MonkeyPatch
):
    """The library computes the answer, a kernel is launched for show, and no rule is in the way."""
    library = {
        "triton": REFERENCE.replace("def solve(x):", "def answer(x):"),
        "pallas": "def answer(x):\n    x = jnp.where(x == x, x, 0.0)\n    top = jnp.abs(x).max()\n"
        "    whole = jnp.round(x * (127 / jnp.where(top == 0, 1.0, top)))\n"
        "    return whole.astype(jnp.int8), jnp.where(top == 0, 1, top / 127).reshape(1)\n",
    }[backend]
    text = Q01.solution(backend).replace("def solve", f"{library}\n\ndef solve")
    head, _, _ = text.rpartition("    return ")
    monkeypatch.setattr(policy, "broken", lambda *rules: [])
    found = grade(
        replace(Q01, glue=ALLOWED[backend]), backend, head + "    return answer(x)\n", seed=SEED,
        explain=False, hasty=True, child=children[backend],
    )  # fmt: skip
    assert found.verdict == "no_effect", found.detail


# The learner's commands


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "my_puzzles"


def test_from_the_skeleton_to_a_pass(mine: Path, capsys: pytest.CaptureFixture):
    assert main(["next", "q08", "-b", "pallas"]) == 0
    assert "puzzles check q08" in capsys.readouterr().out
    assert HOLE in (mine / "q08_pallas.py").read_text()
    assert main(["next", "-b", "triton"]) == 0
    shown = capsys.readouterr().out
    assert "One scale for a whole tensor" in shown and "my_puzzles/q01_triton.py" in shown
    file = mine / "q01_triton.py"
    assert HOLE in file.read_text()
    file.write_text("def solve(x:\n")
    assert main(["check", "q1"]) == 1
    assert "Python cannot read the file" in capsys.readouterr().out
    file.write_text(Q01.solution("triton"))
    assert main(["check", "Q01", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] and told["points"]["correctness"] == 8
    assert main(["list"]) == 0
    assert "1 of" in capsys.readouterr().out
    assert main(["show", "q01"]) == 0
    assert "One solution" in capsys.readouterr().out
    assert main(["reset", "q01"]) == 0
    assert HOLE in file.read_text() and list(mine.glob("*.old"))
    capsys.readouterr()
    assert main(["report", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["puzzles"]["q01"]["triton"]["attempts"] == 2


def test_hints_come_one_by_one(mine: Path, capsys: pytest.CaptureFixture):
    for count in (1, 2):
        assert main(["hint", "q01", "--json"]) == 0
        assert len(json.loads(capsys.readouterr().out)["hints"]) == count
    assert main(["hint", "q01"]) == 0
    assert "no more" not in capsys.readouterr().out
    assert main(["hint", "q01"]) == 0
    assert capsys.readouterr().out.endswith("There are no more.\n")


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["check", "q99"], "no puzzle"),
        (["next", "q99"], "no puzzle"),
        (["chek"], "did you mean 'check'"),
        (["check", "q8", "-b", "pallas"], "`puzzles next q08 -b pallas` begins it"),
    ],
)
def test_usage_is_said_in_one_sentence(
    argv: list[str], word: str, mine: Path, capsys: pytest.CaptureFixture
):
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert word in line


def test_progress_is_never_lost(tmp_path: Path):
    done = Progress.read(tmp_path)
    done.hint_taken("q01", 2)
    done.write()
    assert Progress.read(tmp_path).hints("q01") == 2
    (tmp_path / "progress.json").write_text('{"schema": 99, "puzzles": {}}')
    with pytest.raises(Stop, match="schema 99"):
        Progress.read(tmp_path)
    (tmp_path / "progress.json").write_text("half a fi")
    assert Progress.read(tmp_path).broken is not None
    assert list(tmp_path.glob("*.unreadable"))


def test_an_old_pass_is_kept_and_shown_as_one_to_look_at_again(tmp_path: Path):
    done = Progress(tmp_path)
    passed = {"puzzle": "q01", "backend": "triton", "version": Q01.version - 1, "verdict": "pass",
              "seed": "1", "source": "a", "points": {"correctness": 8}}  # fmt: skip
    done.graded(passed)
    assert done.state(Q01, "triton") == "solved before"
    done.graded(passed | {"version": Q01.version, "verdict": "timeout"})
    assert done.state(Q01, "triton") == "solved before"
    done.graded(passed | {"version": Q01.version})
    assert done.state(Q01, "triton") == "solved"
