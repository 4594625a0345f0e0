"""Tuning: the search on surfaces with a known optimum, cuts, budgets, wrong answers, and rungs."""

import ast
import dataclasses
import importlib
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from parity import cli, doctor, rungs, space, tune
from parity.commands import tune as command
from parity.compile import CompileRow
from parity.frameworks import compiled
from parity.problems import PROBLEMS, problem
from parity.spec import Workload
from parity.timing import Budget, Interval
from parity.tune import Entry, Results, Task, Tuner, descend, exhaust, key

ROOT = Path(__file__).parent.parent
TWINS = {"triton": "triton_kernels", "pallas": "pallas_kernels"}
AXES = {"block_n": (1024, 2048, 4096, 8192), "warps": (4, 8, 16, 32), "programs": (0, 1, 2, 4)}
START = {"block_n": 4096, "warps": 4, "programs": 0}
BEST = {"block_n": 2048, "warps": 16, "programs": 2}


def bowl(config: dict) -> float:
    """1 at BEST, more with every field's distance from it: no field depends on another."""
    return 1.0 + 0.1 * sum(abs(AXES[n].index(config[n]) - AXES[n].index(BEST[n])) for n in AXES)


def ridge(config: dict) -> float:
    """Warps must grow with the block: off that line everything is worse, along it better."""
    n, w = AXES["block_n"].index(config["block_n"]), AXES["warps"].index(config["warps"])
    return 2.0 + abs(n - w - 2) - 0.1 * w


def on(surface):
    return lambda configs: {key(c): surface(c) for c in configs}


# The search.


def test_descent_finds_the_optimum_where_fields_are_independent():
    seen = []

    def costs(configs):
        seen.extend(map(key, configs))
        return on(bowl)(configs)

    assert descend(START, AXES, costs) == BEST
    assert len(set(seen)) < math.prod(map(len, AXES.values())) / 2


def test_exhaustive_finds_every_optimum():
    for surface in (bowl, ridge):
        best = exhaust(START, AXES, on(surface))
        assert surface(best) == min(map(surface, space.grid(START, AXES)))


def test_descent_stops_on_a_ridge_where_two_fields_must_change_together():
    assert descend(START, AXES, on(ridge)) == START  # what it promises: no one field is better
    assert ridge(exhaust(START, AXES, on(ridge))) < ridge(START)


def test_the_answer_of_a_descent_is_the_best_of_its_star():
    for seed in range(20):
        height = random.Random(seed)
        surface = {key(c): height.uniform(1, 2) for c in space.grid(START, AXES)}
        found = descend(START, AXES, on(lambda c, s=surface: s[key(c)]))
        around = min(surface[key(c)] for c in space.star(found, AXES))
        assert around >= (1 - tune.STEP) * surface[key(found)]


def test_configs_that_cannot_be_used_are_stepped_over():
    def costs(configs):
        return {k: v for k, v in on(bowl)(configs).items() if dict(k)["warps"] != 16}

    assert descend(START, AXES, costs)["warps"] in (8, 32)


# The space.


def test_every_problem_has_axes_for_the_fields_of_its_configs():
    for p in PROBLEMS:
        for twin, package in TWINS.items():
            module = importlib.import_module(f"{package}.{p.stem}")
            fields = vars(module.Config()).copy()
            for which in ("fwd", "bwd"):
                found = space.axes(p, p.workloads[-1], which, twin, fields)
                unread = space.UNREAD.get((p.stem, twin, which), ())
                assert set(found) == set(fields) - set(unread)
                assert all(fields[n] in values for n, values in found.items())


def test_a_tile_stays_under_twice_what_it_covers():
    softmax = problem("softmax")
    small = Workload("small", {"R": 8, "N": 3000}, "float16", ())
    found = space.axes(softmax, small, "fwd", "triton", {"block_n": 64, "warps": 4})
    assert found["block_n"] == (64, 1024, 2048, 4096)


def test_few_tokens_are_tried_in_small_tiles_by_many_warpgroups():
    int4 = problem("int4_matmul")
    pallas = vars(importlib.import_module("pallas_kernels.int4_matmul").Config()).copy()
    tokens = {
        "llama70b_up_m1": (8,),
        "llama70b_up_m16": (8, 16),
        "llama70b_up_m64": (8, 16, 32, 64),
    }
    for name, tiles in tokens.items():
        found = space.axes(int4, int4.workload(name), "fwd", "pallas", pallas | {"block_m": 8})
        assert found["block_m"] == tiles and found["warpgroups"] == (1, 2, 3, 4)
    dense = space.axes(problem("matmul"), problem("matmul").workloads[-1], "fwd", "pallas", pallas)
    assert 4 not in dense["warpgroups"]  # its family's


def test_a_problem_of_an_unknown_family_is_said_so():
    odd = dataclasses.replace(problem("softmax"), stem="scan", family="recurrence")
    with pytest.raises(LookupError, match="no axes for the family 'recurrence'"):
        space.axes(odd, problem("softmax").workloads[0], "fwd", "triton", START)


# A task, on a machine that is only a surface.


class Surface:
    """Takes surface(config) microseconds, 10 % around it at most; the default is START."""

    def __init__(self, surface=bowl, *, wrong=(), unconfirmed=(), noise=0.001, on_prepare=None):
        self.surface, self.wrong, self.unconfirmed = surface, wrong, unconfirmed
        self.noise, self.on_prepare = noise, on_prepare
        self.called: list[dict] = []
        self.asks = [{"of": {"N": 4096}, "default": dict(START), "ladder": dict(START)}]

    def refuses(self, config):
        return "block_n: expected at most 4096, got 8192" if config["block_n"] == 8192 else ""

    def prepare(self, config):
        if config is None:
            return tune.GOOD
        self.called.append(config)
        if self.on_prepare:
            self.on_prepare(config)
        return ("wrong", "tile: y[3, 4] is off") if config in self.wrong else tune.GOOD

    def interval(self, config):
        us = 100 * self.surface(config)
        return Interval(us * (1 - self.noise), us, us * (1 + self.noise))

    def time(self, configs, rounds):
        assert len(configs) <= tune.BESIDE
        return [self.interval(c) for c in configs], self.interval(START)

    def confirm(self, config):
        return "witness: torch did the work" if config in self.unconfirmed else ""


def task(which="fwd", stem="softmax", twin="triton") -> Task:
    p = problem(stem)
    return Task(p, next(w for w in p.workloads if "model" in w.tags), which, twin)


def no_gate(configs):
    return [tune.GOOD] * len(configs)


def tuned(subject, gate=no_gate, search="descent", **how) -> Entry:
    entry = Entry.new(task(), "source")
    Tuner(entry, subject, gate, **how).run(lambda start: AXES, search)
    return entry


def test_the_winner_is_the_optimum_and_says_by_how_much():
    for search in ("descent", "exhaustive"):
        entry = tuned(Surface(), search=search)
        winner = entry.row["winner"]
        assert winner["config"] == BEST and winner["verdict"] == "FASTER" and entry.row["finished"]
        assert winner["share"] == pytest.approx(bowl(BEST) / bowl(START))
        assert entry.row["asks"][0]["default"] == START
        assert min(entry.measured, key=lambda c: c["share"])["config"] == BEST


def test_a_fast_wrong_config_never_wins():
    entry = tuned(Surface(wrong=[BEST]), search="exhaustive")
    assert bowl(entry.row["winner"]["config"]) == pytest.approx(1.1)
    assert entry.known[key(BEST)] == {
        "config": BEST,
        "pruned": "wrong",
        "why": "tile: y[3, 4] is off",
    }


def test_a_winner_must_pass_the_whole_check():
    entry = tuned(Surface(unconfirmed=[BEST]))
    assert entry.row["winner"]["config"] != BEST
    assert entry.known[key(BEST)]["why"] == "witness: torch did the work"


def test_a_gain_under_two_percent_leaves_the_default():
    entry = tuned(
        Surface(lambda c: 1.0 if c == START else 0.983 if c == START | {"warps": 8} else 1.5)
    )
    assert entry.row["winner"] is None and "SAME at 0.983" in entry.row["why"]


def test_a_gain_inside_the_noise_leaves_the_default():
    entry = tuned(Surface(noise=0.5))
    assert entry.row["winner"] is None and "UNDECIDED" in entry.row["why"]


def test_where_nothing_but_the_default_can_be_used_the_default_stands():
    entry = tuned(Surface(), lambda configs: [("spills", "spills 8 bytes")] * len(configs))
    assert entry.row["winner"] is None and entry.row["finished"]
    several = Surface()
    several.asks.append(several.asks[0] | {"default": START | {"warps": 8}})
    entry = tuned(several, lambda configs: [("spills", "spills 8 bytes")] * len(configs))
    assert entry.row["winner"] is None and not entry.measured


def test_a_pass_with_several_defaults_starts_from_the_first_as_from_any_config():
    several = Surface()
    several.asks.append(several.asks[0] | {"default": START | {"warps": 8}})
    assert tuned(several).row["winner"]["config"] == BEST
    assert START in several.called


def test_a_wrong_default_is_no_measure():
    subject = Surface()
    subject.prepare = lambda config: ("wrong", "norm: y is off")
    with pytest.raises(ValueError, match="no measure of anything: norm"):
        tuned(subject)


def test_pruned_configs_never_run_and_are_counted_by_reason():
    def gate(configs):
        return [
            ("spills", "spills 8 bytes") if c["warps"] == 4 and c["block_n"] == 1024 else tune.GOOD
            for c in configs
        ]

    subject = Surface()
    entry = tuned(subject, gate, search="exhaustive")
    assert entry.pruned == {"refused": 16, "spills": 4}
    assert not [c for c in subject.called if c["block_n"] == 8192]
    assert not [c for c in subject.called if c["warps"] == 4 and c["block_n"] == 1024]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"spills": 8, "message": "spills 8 bytes at 255 registers"}, "spills"),
        ({"local": 3, "message": "3 local-memory instructions"}, "spills"),
        ({"serialised_wgmma": True, "message": "wgmma serialised: ..."}, "serialised wgmma"),
        ({"message": "OutOfResources: out of resource: shared memory, Required"}, "shared memory"),
        (
            {"message": "ValueError: Mosaic GPU kernel exceeds available shared memory"},
            "shared memory",
        ),
        ({"message": "ValueError: block_n: expected a power of two, got 3"}, "refused"),
        ({"message": "no answer in 300 s: the compiler was stopped"}, "too slow to compile"),
        ({"message": "NotImplementedError: no such layout"}, "does not compile"),
    ],
)
def test_each_red_row_of_the_gate_has_a_reason(row, kind):
    good = CompileRow("softmax", "w", "fwd", "triton", "k", "ok")
    bad = CompileRow("softmax", "w", "fwd", "triton", "k", "fail", **row)
    assert tune.sorted_out([good]) == tune.GOOD
    assert tune.sorted_out([good, bad]) == (kind, row["message"])


# Many tasks, cut and resumed.


@pytest.fixture
def green(monkeypatch):
    """A compile gate that finds everything good and compiles nothing."""

    def trials(found, **how):
        config = dict(START)
        return [
            [CompileRow("softmax", "w", t.which, t.twin, "k", "ok", config=t.config or config)]
            for t in found
        ]

    monkeypatch.setattr(tune, "compile_trials", trials)
    monkeypatch.setattr(tune, "axes", lambda *args: AXES)


def campaign(tasks, folder, subject, **how):
    facts = {"device": "NVIDIA H200", "versions": {"triton": "3.6.0"}, "commit": "abc"}
    return tune.Campaign(tasks, folder, subject=lambda task: subject, **(facts | how))


def run_all(made) -> None:
    made.prune()
    for _ in made:
        pass


def whole(folder) -> dict:
    return json.loads((folder / "softmax.triton.json").read_text())


def test_a_cut_run_goes_on_where_it_stopped(tmp_path, green):
    straight = Surface()
    run_all(campaign([task()], tmp_path / "straight", straight))
    count = 0

    def cut(config):
        nonlocal count
        count += 1
        if count == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all(campaign([task()], tmp_path / "cut", Surface(on_prepare=cut)))
    (half,) = whole(tmp_path / "cut")["results"]
    measured = [c["config"] for c in half["configs"] if "us" in c and c["config"] != START]
    assert 0 < len(measured) < 7 and not half["finished"]
    rest = Surface()
    run_all(campaign([task()], tmp_path / "cut", rest, resume=True))
    (done,), (same,) = (whole(tmp_path / f)["results"] for f in ("cut", "straight"))
    assert done["winner"] == same["winner"]
    finals = [c["config"] for c in Entry.of(done).measured[: tune.FINALISTS]]
    assert not [c for c in rest.called if c in measured and c not in finals]
    again = Surface()
    run_all(campaign([task()], tmp_path / "cut", again, resume=True))
    assert not again.called  # finished is finished


def test_a_config_that_took_the_process_down_is_left_alone(tmp_path, green):
    run_all(campaign([task()], tmp_path, Surface()))
    file = tmp_path / "softmax.triton.json"
    found = json.loads(file.read_text())
    (row,) = found["results"]
    deadly = START | {"warps": 8}
    row |= {"finished": False, "under_way": deadly}
    row["configs"] = [c for c in row["configs"] if c["config"] != deadly]
    file.write_text(json.dumps(found))
    subject = Surface()
    run_all(campaign([task()], tmp_path, subject, resume=True))
    assert deadly not in subject.called
    (row,) = whole(tmp_path)["results"]
    assert Entry.of(row).pruned["ended the run"] == 1 and "under_way" not in row


def test_results_of_another_source_or_version_are_not_resumed(tmp_path, green, monkeypatch):
    run_all(campaign([task()], tmp_path, Surface()))
    for change in ({"versions": {"triton": "9"}}, {}):
        if not change:
            monkeypatch.setattr(tune, "source_of", lambda task: "edited")
        assert campaign([task()], tmp_path, Surface(), resume=True, **change).left


def test_the_budget_stops_between_steps_and_says_what_is_left(tmp_path, green, monkeypatch):
    now = 0.0
    monkeypatch.setattr(tune.time, "monotonic", lambda: now)

    def second(config):
        nonlocal now
        now += 1.0

    tasks = [task("fwd"), task("bwd")]
    made = campaign(tasks, tmp_path, Surface(on_prepare=second), budget=25, clock=lambda: now)
    run_all(made)
    assert made.left and now <= 25
    resumed = campaign(tasks, tmp_path, Surface(), resume=True)
    assert resumed.left == made.left
    run_all(resumed)
    assert not resumed.left and all(
        e.row["winner"]["config"] == BEST for e in resumed.entries.values()
    )


def test_a_step_longer_than_what_is_left_does_not_start():
    clock = iter([0, 0, 10, 10, 10, 10]).__next__
    budget = Budget(12, lambda: clock())
    assert budget.fits()
    budget.spent(10)
    assert not budget.fits()


def test_results_are_read_by_people_and_refused_when_broken(tmp_path, green):
    run_all(campaign([task()], tmp_path, Surface()))
    text = (tmp_path / "softmax.triton.json").read_text()
    lines = [line for line in text.splitlines() if '"config"' in line]
    assert len(lines) >= len(whole(tmp_path)["results"][0]["configs"])  # a Config a line
    with pytest.raises(ValueError, match="results of NVIDIA H200, and this is NVIDIA H100"):
        campaign([task()], tmp_path, Surface(), device="NVIDIA H100")
    (tmp_path / "softmax.triton.json").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match="not the results of `parity tune`"):
        Results.read(tmp_path / "softmax.triton.json")


# What the compilers say, and what default_config is asked.

PTXAS = """ptxas info    : Compiling entry function 'k' for 'sm_90a'
    0 bytes stack frame, {0} bytes spill stores, {0} bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""


def test_the_compilers_words_are_overheard_and_the_streams_given_back(capfd):
    with compiled.overheard() as rows:
        os.write(1, (PTXAS.format(0) + PTXAS.format(12)).encode())
        assert os.environ["MOSAIC_GPU_DUMP_PTXAS"] == "1"
    os.write(1, b"afterwards")
    assert [row["status"] for row in rows] == ["ok", "fail"] and "24 bytes" in rows[1]["message"]
    assert "MOSAIC_GPU_DUMP_PTXAS" not in os.environ
    assert capfd.readouterr().out == "afterwards"


def test_questions_to_default_config_are_kept_once_with_both_answers(tmp_path, monkeypatch):
    (tmp_path / "toy_kernel.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("toy_kernel")
    with tune.asked(module) as asks:
        for n in (8, 8, 16):
            module.default_config(n, "bfloat16")
    assert asks == [
        {"of": {"N": 8, "dtype": "bfloat16"}, "default": {"block_n": 1}, "ladder": {"block_n": 8}},
        {
            "of": {"N": 16, "dtype": "bfloat16"},
            "default": {"block_n": 16},
            "ladder": {"block_n": 16},
        },
    ]
    assert module.default_config.__name__ == "default_config"


TOY = '''
from dataclasses import dataclass

@dataclass(frozen=True)
class Config:
    block_n: int = 1

def default_config(N, dtype):
    """The Config."""
    # tuned: `parity tune toy_kernel --emit` wrote these rungs, each for exactly these arguments
    if (N, dtype) == (8, "bfloat16"):
        return Config(block_n=1)
    # tuned: end
    return Config(N)
'''


# Rungs in copies of the real kernel files.

QUESTIONS = {
    "matmul": {"M": 8191, "N": 512, "K": 77, "dtype": "bfloat16"},
    "softmax": {"R": 77, "N": 4099, "dtype": "bfloat16", "which": "bwd"},
    "rms_norm": {"R": 77, "N": 4099, "dtype": "bfloat16", "which": "fwd_residual"},
}
KERNELS = [(p.stem, twin) for p in PROBLEMS for twin in TWINS if p.stem in QUESTIONS]


def result(stem, twin, config, ladder, **changes) -> dict:
    us = {"p10": 89.0, "p50": 90.0, "p90": 91.0}
    winner = {"config": config, "us": us, "default_us": {k: v + 10 for k, v in us.items()}}
    ask = {"of": QUESTIONS[stem], "default": ladder, "ladder": ladder}
    row = {"workload": "softmax_77x4099", "pass": "bwd", "when": "2026-11-20T10:00:00+00:00"}
    return row | {"asks": [ask], "winner": winner, "finished": True} | changes


def kernel(stem, twin):
    package = TWINS[twin]
    module = importlib.import_module(f"{package}.{stem}")
    framework = {"triton": "torch", "pallas": "jax.numpy"}[twin]
    return module, rungs.bare((ROOT / package / f"{stem}.py").read_text()), framework


def answers(module, text, stem, framework, **changes):
    """default_config of a kernel file's text, asked this stem's question."""
    names = dict(vars(module))
    function = next(n for n in ast.parse(text).body if getattr(n, "name", "") == "default_config")
    exec(ast.unparse(function), names)
    asked = QUESTIONS[stem] | changes
    dtype = getattr(importlib.import_module(framework), asked["dtype"])
    return names["default_config"](**(asked | {"dtype": dtype}))


@pytest.mark.parametrize(("stem", "twin"), KERNELS)
def test_a_rung_answers_its_question_and_no_other(stem, twin):
    module, before, framework = kernel(stem, twin)
    ladder = vars(answers(module, before, stem, framework)).copy()
    other = ladder | {"stages": ladder.get("stages", 1) + 1, "block_n": 2 * ladder["block_n"]}
    other = {n: other[n] for n in ladder}
    made, said = rungs.of_results([result(stem, twin, other, ladder)], "NVIDIA H200")
    after = rungs.emit(before, stem, twin, made)
    assert said == [] and "90.0 us, 100.0 us before (NVIDIA H200, 2026-11-20)" in after
    assert vars(answers(module, after, stem, framework)) == other
    for change in ({"N": 4100}, {"dtype": "float16"}):
        theirs = answers(module, after, stem, framework, **change)
        assert theirs == answers(module, before, stem, framework, **change)
    assert rungs.emit(after, stem, twin, made) == after  # idempotent
    assert rungs.emit(after, stem, twin, []) == before == rungs.bare(after)
    assert rungs.only(after, "another") == before != rungs.only(after, "softmax_77x4099")
    formatted = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--config", str(ROOT / "pyproject.toml"), "-"],
        input=after, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    added = set(after.splitlines()) - set(before.splitlines())
    assert formatted == after and max(map(len, added)) <= 100


def test_a_ladder_that_already_gives_the_winner_gets_no_rung():
    config = {"block_m": 1, "block_n": 4096}
    same = result("softmax", "triton", config, config)
    assert rungs.of_results([same], "NVIDIA H200") == ([], [])
    stands = result("softmax", "triton", config, config, winner=None)
    assert rungs.of_results([stands], "NVIDIA H200") == ([], [])


def test_a_rung_that_stands_is_kept_when_it_is_tuned_again():
    row = result("softmax", "triton", {}, {"warps": 4}, winner=None)
    row["asks"][0]["default"] = {"warps": 8}  # what the rung answers
    (rung,), _ = rungs.of_results([row], "NVIDIA H200")
    assert rung.config == {"warps": 8}


def test_passes_that_ask_the_same_and_disagree_get_no_rung():
    pair = [result("softmax", "triton", {"warps": w}, {"warps": 4}) for w in (8, 16)]
    made, (said,) = rungs.of_results(pair, "NVIDIA H200")
    assert made == [] and "have different winners" in said


def test_a_rung_for_other_parameters_is_refused():
    _, text, _ = kernel("softmax", "triton")
    rung = rungs.Rung({"N": 8}, {"warps": 4}, ())
    with pytest.raises(ValueError, match="default_config takes"):
        rungs.emit(text, "softmax", "triton", [rung])


# The commands.


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(doctor, "machine", lambda: doctor.Machine((), "", "no NVIDIA driver"))


def test_without_a_gpu_it_prunes_says_what_is_left_and_never_a_time(no_gpu, green, capsys):
    ask = ("tune", "softmax", "-w", "softmax_8192x8192", "--twin", "triton", "--pass", "fwd")
    assert cli.main(ask) == 3
    out, err = capsys.readouterr()
    assert "Nothing here was timed" in out and "warps=8" in out and " us" not in out
    assert "timing needs a Hopper GPU" in err
    assert cli.main((*ask, "--dry-run", "--json")) == 0
    (row,) = json.loads(capsys.readouterr().out)["results"]
    assert len(row["configs"]) == 9 and not [c for c in row["configs"] if "us" in c]


def test_a_dry_run_leaves_its_verdicts_for_the_gpu(no_gpu, green, tmp_path):
    ask = ("tune", "softmax", "-w", "softmax_16384x4096", "--twin", "triton", "--pass", "fwd")
    assert cli.main((*ask, "--dry-run", "--out", str(tmp_path))) == 0
    made = campaign([task()], tmp_path, Surface(), resume=True)
    (entry,) = made.entries.values()
    assert len(entry.waiting) == 9
    run_all(made)
    assert whole(tmp_path)["device"] == "NVIDIA H200"


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("tune", "sofmax"), "softmax"),
        (("tune", "softmax", "-w", "ci"), "too small to be timed"),
        (("tune", "softmax", "--pass", "backward"), "no --pass 'backward'"),
        (("tune", "softmax", "-w", "nothing"), "has no workload 'nothing'"),
        (("tune", "--emit", "--out", "nowhere"), "no tuned results of any problem in nowhere"),
    ],
)
def test_bad_input_is_one_sentence(args, sentence, no_gpu, capsys):
    assert cli.main(args) == 2
    assert sentence in capsys.readouterr().err


def test_emit_writes_prints_and_does_nothing_twice(tmp_path, monkeypatch, capsys):
    (tmp_path / "triton_kernels").mkdir()
    file = tmp_path / "triton_kernels" / "softmax.py"
    before = rungs.bare((ROOT / "triton_kernels" / "softmax.py").read_text())
    file.write_text(before)
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(tune, "source_of", lambda task: "source")
    results = Results(tmp_path / "softmax.triton.json", "softmax", "triton", "NVIDIA H200")
    row = result("softmax", "triton", {"warps": 8}, {"warps": 4}, source="source", configs=[])
    results.entries["softmax_77x4099", "bwd"] = Entry.of(row)
    results.save()
    ask = ("tune", "softmax", "--emit", "--out", str(tmp_path))
    assert cli.main(ask) == 0
    assert "+        return Config(warps=8)" in capsys.readouterr().out
    after = file.read_text()
    assert cli.main(ask) == 0 and file.read_text() == after
    assert "its rungs stand as they are" in capsys.readouterr().out
    monkeypatch.setattr(tune, "source_of", lambda task: "edited")
    assert cli.main(ask) == 1 and file.read_text() == after
    assert "has changed since it was tuned" in capsys.readouterr().out


# What stands in the checkout.


def test_committed_results_hold_what_they_claim():
    for file in sorted(tune.TUNED.rglob("*.json")):
        results = Results.read(file)
        assert file.name == f"{results.stem}.{results.twin}.json"
        for entry in results.entries.values():
            winner = entry.row["winner"]
            if winner is not None:
                us, default = (Interval.from_json(winner[n]) for n in ("us", "default_us"))
                assert tune.verdict(us, default) == winner["verdict"] == "FASTER"
                assert "pruned" not in entry.known[key(winner["config"])]


# Tuning never changes what a kernel computes.

TINY = {
    "matmul": {"M": 72, "N": 72, "K": 72},
    "softmax": {"R": 3, "N": 1160},
    "rms_norm": {"R": 3, "N": 1160},
}


def covering(configs, axes):
    """Few of the Configs that have every value that any of them has, field by field."""
    missing = {(n, c[n]) for c in configs for n in axes}
    while missing:
        best = max(configs, key=lambda c: len(missing & set(c.items())))
        missing -= set(best.items())
        yield best


@pytest.mark.parametrize("stem", list(TINY))
@pytest.mark.parametrize("twin", list(TWINS))
def test_every_value_of_every_field_gives_the_same_answer(stem, twin):
    """To the judge. Mosaic's interpreter takes seconds a Config: there the forward of two of
    them; `parity tune` itself judges every Config that it times, at full size."""
    p = problem(stem)
    absent = tuple({"mask", "residual"} & set(p.inputs(p.workloads[-1])) | {"mask", "residual"})
    tiny = Workload("tiny", TINY[stem], "float16", ("ci",), absent=absent)
    for which in ("fwd", "bwd") if twin == "triton" else ("fwd",):
        subject = tune.OnDevice(Task(p, tiny, which, twin))
        assert subject.prepare(None) == tune.GOOD
        start = subject.asks[0]["default"]
        axes = space.axes(p, tiny, which, twin, start)
        usable = [c for c in space.grid(start, axes) if not subject.refuses(c)]
        tried = list(covering(usable, axes))[: None if twin == "triton" else 2]
        assert len(tried) > 1
        assert {key(c): subject.prepare(c) for c in tried} == {key(c): tune.GOOD for c in tried}
