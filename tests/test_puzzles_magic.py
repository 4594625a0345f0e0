"""%puzzle and %%puzzle, in a shell of IPython as it runs in a terminal and in a notebook."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from puzzles.puzzle import HOLE, HOME, load

Q01 = load(HOME / "q01")
BROKEN = "def solve(x:\n"


def test_without_ipython_the_reason_is_told(monkeypatch: pytest.MonkeyPatch):
    import puzzles

    monkeypatch.setitem(sys.modules, "IPython", None)
    for name in [name for name in sys.modules if name.startswith("IPython.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "puzzles.magic", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"kernel-parity\[notebooks\]"):
        puzzles.load_ipython_extension(None)


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    reason = "IPython comes with the extra `notebooks`, which `make test` does not install"
    interactive = pytest.importorskip("IPython.core.interactiveshell", reason=reason)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    made = interactive.InteractiveShell()
    made.next_inputs = []
    made.set_next_input = lambda text, replace=False: made.next_inputs.append((text, replace))
    made.run_cell("%load_ext puzzles")
    yield made
    made.history_manager.end_session()


def said(shell: Any, capsys: pytest.CaptureFixture, cell: str) -> str:
    """What a cell prints, and where it fails why."""
    capsys.readouterr()
    done = shell.run_cell(cell)
    told = capsys.readouterr()
    return told.out + told.err + str(done.error_in_exec or "")


def mine(tmp_path: Path) -> list[str]:
    return sorted(file.name for file in (tmp_path / "my_puzzles").glob("q01*"))


def test_the_line_shows_the_statement_and_begins_a_cell(
    shell: Any, capsys: pytest.CaptureFixture, tmp_path: Path
):
    shown = said(shell, capsys, "%puzzle q1 triton")
    assert "One scale for a whole tensor" in shown and "picture.svg" not in shown
    assert all(len(line) <= 80 for line in shown.splitlines())
    ((text, replace),) = shell.next_inputs
    assert text.startswith("%%puzzle q01 triton\n") and HOLE in text and not replace
    assert not (tmp_path / "my_puzzles").exists()  # nothing is written before something is run


def test_a_cell_is_the_learners_file_and_is_checked(
    shell: Any, capsys: pytest.CaptureFixture, tmp_path: Path
):
    shown = said(shell, capsys, f"%%puzzle q01 triton --seed ab\n{Q01.solution('triton')}")
    assert "PASS" in shown and "seed ab" in shown
    file = tmp_path / "my_puzzles" / "q01_triton.py"
    assert file.read_text() == Q01.solution("triton")
    known = json.loads((file.parent / "progress.json").read_text())["puzzles"]["q01"]["triton"]
    assert known["attempts"] == 1 and known["solved"]
    said(shell, capsys, "%puzzle q01")
    assert shell.next_inputs[-1][0] == f"%%puzzle q01 triton\n{file.read_text()}"


def test_no_work_is_lost(shell: Any, capsys: pytest.CaptureFixture, tmp_path: Path):
    folder = tmp_path / "my_puzzles"
    folder.mkdir()
    file = folder / "q01_triton.py"
    file.write_text(Q01.skeleton("triton"))
    said(shell, capsys, f"%%puzzle q01 triton\n{BROKEN}")
    assert mine(tmp_path) == ["q01_triton.py"]  # a skeleton is no work
    said(shell, capsys, f"%%puzzle q01 triton\n{BROKEN}# again\n")
    assert mine(tmp_path) == ["q01_triton.py"]  # a cell of this session is still in the history
    for text in ("# written in an editor\n", "# and once more\n"):
        file.write_text(text)
        shown = said(shell, capsys, f"%%puzzle q01 triton\n{BROKEN}")
        assert "Python cannot read the file" in shown
        (kept,) = [k for k in folder.glob("*.old") if k.read_text() == text]
        assert kept.name in shown
    assert len(mine(tmp_path)) == 3  # though both within a second


def test_a_notebook_gets_pictures_and_one_verdict(
    shell: Any, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    shown: list[Any] = []
    monkeypatch.setattr(shell, "kernel", object(), raising=False)
    monkeypatch.setattr("IPython.display.display", lambda what, **how: shown.append(what))
    said(shell, capsys, "%puzzle q01 triton")
    before, image, after = (what.data for what in shown)
    assert before.startswith("# Q01") and before.endswith("## The picture\n\n")
    assert image.startswith('<img src="data:image/svg+xml;base64,') and 'alt="A stair' in image
    assert "What is checked" in after and "picture.svg" not in before + after
    shown.clear()
    said(shell, capsys, f"%%puzzle q01 triton\n{BROKEN}")
    (verdict,) = shown
    assert "Python cannot read the file" in verdict["text/plain"]
    assert "<pre" in verdict["text/html"] and "FAIL" in verdict["text/html"]


@pytest.mark.parametrize(
    ("cell", "why"),
    [
        ("%puzzle q99", "no puzzle 'q99'"),
        ("%%puzzle q01 tritn\nx = 1", "did you mean 'triton'"),
        ("%puzzle", "required: puzzle"),
        ("%%puzzle q01 triton --seed xyz\nx = 1", "hexadecimal"),
    ],
)
def test_a_mistake_is_told_in_a_line(
    shell: Any, capsys: pytest.CaptureFixture, tmp_path: Path, cell: str, why: str
):
    shown = said(shell, capsys, cell)
    assert why in shown and "Traceback" not in shown
    assert not (tmp_path / "my_puzzles").exists()
