"""Lessons: their shape, that what is committed is what the source says, and that the exercises
refuse planted wrong answers. `make notebooks` runs every cell of every lesson."""

import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

from notebooks import _course as course
from notebooks import _tracer, build

LESSONS = {lesson.number: lesson for lesson in build.lessons()}
PLANTED = Path(__file__).parent / "lessons"
WRONG = [
    pytest.param(number, wrong, id=f"{number}: {wrong['says']}")
    for number in LESSONS
    for wrong in tomllib.loads((PLANTED / f"{number}.toml").read_text())["wrong"]
]


@pytest.mark.parametrize("number", LESSONS)
def test_a_lesson_says_what_it_is_for(number: str):
    notebook = LESSONS[number].notebook()
    head = notebook.cells[0].source
    assert re.match(rf"# {number} \S", head)
    assert re.findall(r"^\d\. ", head, re.MULTILINE) == ["1. ", "2. ", "3. "]
    assert "**Time:**" in head and "**You need:**" in head
    prose = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    five = prose.rpartition("## In five lines")[2]
    assert re.findall(r"^\d\. ", five, re.MULTILINE) == [f"{i}. " for i in range(1, 6)]
    code = "\n".join(c.source for c in notebook.cells if c.cell_type == "code")
    for call in ("begin", "predict", "reveal", "show", "check", "twins", "end"):
        assert f"course.{call}(" in code, f"it never calls course.{call}"
    predicted, revealed = (
        set(re.findall(rf'course\.{call}\("(\w+)"', code)) for call in ("predict", "reveal")
    )
    assert predicted == revealed
    closed = set(re.findall(r'course\.reveal\("(\w+)"\)', code))
    assert closed == set(tomllib.loads(course.QUIZ.read_text())[number])


@pytest.mark.parametrize("number", LESSONS)
def test_what_is_committed_is_built_from_its_source(number: str):
    lesson = LESSONS[number]
    assert build.stale(lesson) == []
    notebook = nbformat.read(lesson.built, as_version=4)
    assert build.unfit(notebook) == []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    given = build.outcomes(notebook)
    assert given and not any(said["ok"] for said in given.values()), "it gives answers away"


def answers(number: str, exercise: str, edits: dict[str, list], folder: Path) -> ModuleType:
    """The lesson's imports and the solved cells of one exercise, edited, as a module."""
    cells = LESSONS[number].notebook(solved=True).cells
    parts = []
    for cell in cells:
        if "setup" in cell.metadata:
            parts.append(cell.source)
        twin = cell.id.removeprefix(f"{exercise}_")
        if twin in ("triton", "pallas"):
            text = cell.source
            for old, new in edits.get(twin, ()):
                assert text.count(old) == 1, f"{old!r} is not once in {cell.id}"
                text = text.replace(old, new)
            parts.append(text)
    path = folder / f"lesson_{number}_{exercise}.py"
    path.write_text("\n\n".join(parts))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def verdicts(number: str, exercise: str, edits: dict[str, list], folder: Path) -> dict[str, str]:
    """twin -> the word for it; only the edited ones, all if nothing is edited."""
    module = answers(number, exercise, edits, folder)
    asked = importlib.import_module(f"notebooks.exercises.{exercise}")
    kernels = {
        twin: getattr(module, f"{exercise}_{twin}")
        for twin in asked.PROBLEM.implementations
        if twin in edits or not edits
    }
    found = course.judged(asked.PROBLEM, getattr(asked, "LIMITS", course.Limits()), kernels)
    return {a.twin: a.reason or "pass" for a in found}


@pytest.mark.parametrize(("number", "wrong"), WRONG)
def test_an_exercise_refuses_a_wrong_answer(
    number: str, wrong: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if wrong["verdict"] == "timeout":
        monkeypatch.setattr(_tracer, "PATIENCE", 2.0)
    edits = {twin: wrong[twin] for twin in ("triton", "pallas") if twin in wrong}
    assert edits
    found = verdicts(number, wrong["exercise"], edits, tmp_path)
    assert found == dict.fromkeys(edits, wrong["verdict"])


def test_every_exercise_has_wrong_answers():
    asked = {path.stem for path in (build.HOME / "exercises").glob("[a-z]*.py")}
    planted = [(wrong["exercise"], twin) for _, wrong in (p.values for p in WRONG)
               for twin in ("triton", "pallas") if twin in wrong]  # fmt: skip
    for exercise in asked:
        problem = importlib.import_module(f"notebooks.exercises.{exercise}").PROBLEM
        for twin in problem.implementations:
            assert planted.count((exercise, twin)) >= 2, f"{exercise} in {twin}: plant two or more"


# What the machinery promises


def test_a_learner_never_sees_a_solution():
    cell = (
        'course.predict("n", 3 * 7)\n'
        "def f(x):\n    # BEGIN SOLUTION\n    # 1. Double it.\n    # INSTEAD return x\n"
        "    return 2 * x\n    # END SOLUTION"
    )
    assert build.given_of(cell) == (
        'course.predict("n", ...)\n'
        "def f(x):\n    # 1. Double it.\n    # YOUR CODE HERE\n    return x"
    )
    assert build.solved_of(cell) == (
        'course.predict("n", 3 * 7)\ndef f(x):\n    # 1. Double it.\n    return 2 * x'
    )


def lesson(folder: Path, *sources: tuple[str, str], number: str = "99") -> Path:
    """A built notebook: (id, source) of its cells; those named like answers are answers."""
    cells = [
        nbformat.v4.new_code_cell(
            source, id=id, metadata={} if id.startswith(number) else
            {"answer": id, "given": build.fingerprint(source)},
        )
        for id, source in sources
    ]  # fmt: skip
    path = folder / "99_made_up.ipynb"
    path.write_text(
        nbformat.writes(nbformat.v4.new_notebook(cells=cells, metadata={"lesson": number}))
    )
    return path


def test_answers_survive_an_update(tmp_path: Path):
    mine = tmp_path / "mine" / "99_made_up.ipynb"
    built = lesson(tmp_path, ("99-00", "old text"), ("touched", "hole 1"), ("untouched", "hole 2"),
                   ("dropped", "hole 3"))  # fmt: skip
    assert build.refresh(built, mine) == "new"
    assert build.refresh(built, mine) == "as it was"
    rerun = nbformat.read(built, as_version=4)
    rerun.cells[0].outputs = [nbformat.v4.new_output("stream", name="stdout", text="a new record")]
    built.write_text(nbformat.writes(rerun))
    assert build.refresh(built, mine) == "as it was"  # other outputs are no reason to touch it
    notebook = nbformat.read(mine, as_version=4)
    notebook.cells[0].source = "old text, scribbled over"
    notebook.cells[1].source = "my answer"
    notebook.cells[3].source = "my answer to what is no longer asked"
    notebook.cells.insert(2, nbformat.v4.new_code_cell("my own cell", id="f00d"))
    mine.write_text(nbformat.writes(notebook))
    before = mine.read_text()
    lesson(tmp_path, ("99-00", "new text"), ("touched", "hole 1, reworded"),
           ("untouched", "hole 2, reworded"), ("99-03", "more text"))  # fmt: skip
    assert "answers kept" in build.refresh(built, mine)
    cells = [cell.source for cell in nbformat.read(mine, as_version=4).cells]
    assert cells == ["new text", "my answer", "my own cell", "hole 2, reworded",
                     "my answer to what is no longer asked", "more text"]  # fmt: skip
    kept = mine.parent / ".before"
    assert (kept / "99_made_up.1.ipynb").read_text() == before
    lesson(tmp_path, ("99-00", "newer text"))
    again = mine.read_text()
    assert ".before/99_made_up.2.ipynb" in build.refresh(built, mine)
    assert (kept / "99_made_up.1.ipynb").read_text() == before  # none is written over
    assert (kept / "99_made_up.2.ipynb").read_text() == again
    assert [p.name for p in mine.parent.glob("*.ipynb")] == [mine.name]


def test_a_copy_left_beside_a_lesson_is_put_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lesson(tmp_path, ("99-00", "text"))
    mine = tmp_path / "mine"
    monkeypatch.setattr(build, "HOME", tmp_path)
    monkeypatch.setattr(build, "MINE", mine)
    assert build.main(["--mine"]) == 0
    (mine / "99_made_up.before.ipynb").write_text("once")
    assert build.main(["--mine"]) == 0
    assert [p.name for p in mine.glob("*.ipynb")] == ["99_made_up.ipynb"]
    assert (mine / ".before" / "99_made_up.1.ipynb").read_text() == "once"


def test_what_belongs_to_one_machine_is_found():
    output = nbformat.v4.new_output("stream", name="stdout", text=f"see {build.ROOT}/x.py")
    cell = nbformat.v4.new_code_cell("1", id="a", outputs=[output])
    assert build.unfit(nbformat.v4.new_notebook(cells=[cell])) == [
        f"cell a shows {str(build.ROOT)!r}"
    ]


def test_stages_are_cut_from_the_real_files():
    source = (
        "import x\n\n@jit\ndef f(a):\n    # --- 1. one\n    a = 1\n\n    # --- 2. two\n    b = 2\n"
    )
    assert course.cut(source, "f") == (3, source[source.index("@jit") :].rstrip())
    assert course.cut(source, "f", 2) == (8, "# --- 2. two\nb = 2")
    for bad, argument in ((("g",), "function"), (("f", 3), "stage")):
        with pytest.raises(ValueError, match=argument):
            course.cut(source, *bad)


def test_both_languages_are_metered_alike(tmp_path: Path):
    import torch

    from notebooks._tracer import trace

    module = answers("01", "scale_add", {}, tmp_path)
    x = torch.arange(19.0 * 264).reshape(19, 264)
    y = 1 - x
    one = trace(module.scale_add_triton, x, y, scale=2.0)
    two = trace(module.scale_add_pallas, *map(module.jnp.asarray, (x, y)), scale=2.0)
    for seen in (one, two):
        assert (seen.read, seen.written) == (2 * 19 * 264 * 4, 19 * 264 * 4)
        assert seen.programs == 9
        assert {t.array for t in seen.touches} == {"x", "y", "out"}
        stored = sum(int(t.live.sum()) for t in seen.touches if t.stored)
        assert stored == 19 * 264


@pytest.mark.parametrize(
    ("wait", "says"),
    [
        ("plgpu.barrier_wait()", "TypeError: .*missing 1 required"),
        ("plgpu.barrier_wait(arrived)\n    plgpu.barrier_wait(arrived)", "waits for ever"),
        ("plgpu.barrier_wait(arrived)\n    plgpu.copy_smem_to_gmem(x_smem, out_gmem.at[part])",
         r"wait_smem_to_gmem\(0\) waits for them"),
    ],
)  # fmt: skip
def test_a_broken_kernel_is_told_in_a_sentence(
    wait: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(_tracer, "PATIENCE", 2.0)
    edits = {"pallas": [["plgpu.barrier_wait(arrived)", wait]]}
    module = answers("02", "double", edits, tmp_path)
    with pytest.raises(_tracer.Broken, match=says) as raised:
        _tracer.guarded(module.double_pallas, module.jnp.zeros(128))
    told = raised.value._render_traceback_()
    assert told[0].startswith("The kernel failed: ") and len(told) <= 2


def shown(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What _course displays from now on."""
    outputs: list[dict] = []
    monkeypatch.setattr(course, "_display", outputs.append)
    monkeypatch.setattr(course, "_lesson", course._Lesson("01"))
    return outputs


def test_a_prediction_is_compared_and_a_question_stays_closed(monkeypatch: pytest.MonkeyPatch):
    said = shown(monkeypatch)
    course.predict("bytes", 980)
    course.reveal("bytes", 1000, within=0.02)
    course.reveal("A")
    course.predict("A", 1)
    course.reveal("A")
    course.end()
    words = [data["text/plain"] for data in said]
    assert "close enough" in words[1]
    assert words[2] == "A: choose first, above."
    assert "not so" in words[4] and "rows 16, 17 and 18" in words[4]
    assert "1 of 2 predictions" in words[5]
    assert [data[course.OUTCOME]["ok"] for data in said if course.OUTCOME in data] == [
        True, None, False
    ]  # fmt: skip
    with pytest.raises(TypeError, match="bytes"):
        course.predict("bytes", "many")


def test_a_recorded_row_is_shown_with_its_stamp(monkeypatch: pytest.MonkeyPatch):
    said = shown(monkeypatch)
    monkeypatch.setenv("LESSON_BUILD", "1")
    course.measured("softmax", "softmax_16384x4096")
    row = course.rows("softmax", "softmax_16384x4096")["triton"]
    assert f"{row['us']['p50']:.4g}" in said[0]["text/html"]
    for part in (row["device"], row["commit"][:7], row["when"][:10], row["versions"]["driver"]):
        assert part in said[0]["text/plain"]
    with pytest.raises(ValueError, match="no record"):
        course.rows("softmax", "softmax_of_nothing")


def test_pictures_describe_themselves_and_are_small(monkeypatch: pytest.MonkeyPatch):
    import torch

    from notebooks import _pictures as pictures
    from notebooks._tracer import trace

    said = shown(monkeypatch)
    monkeypatch.setenv("LESSON_BUILD", "1")

    def copy(x):  # no kernel: nobody stores anything
        return x

    with pytest.raises(ValueError, match="nobody stores"):
        pictures.ownership({"nobody": trace(copy, torch.zeros(3))})
    course.show(pictures.traffic({"unfused": (4096, 2048), "fused": (2048, 1024)}, (2048, 1024)))
    course.slider(
        lambda at: pictures.roofline({"softmax": 1.25}, 4000, 800, "a GPU", at),
        [1, 10, 100, 1000], 10, "FLOP per byte",
    )  # fmt: skip
    drawn = [data["text/html"] for data in said if "text/html" in data]
    assert len(drawn) == 4  # one, and three positions of the slider
    assert "unfused reads 4,096 and writes 2,048 bytes" in drawn[0]
    assert "which it reaches at 200 FLOP per byte" in drawn[1]
    for page in drawn:
        assert page.startswith('<img alt="') and len(page) < build.PICTURE
