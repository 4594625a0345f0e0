"""Makes notebooks/NN_name.ipynb of notebooks/src/NN_name.py, and a learner's copies of them.

    python notebooks/build.py [NN ...]          build: run the lesson as a learner gets it, keep it
    python notebooks/build.py [NN ...] --check  prove: the committed cells are those of the source,
                                                every cell runs, every exercise fails as given and
                                                passes with its solution, every prediction is right
    python notebooks/build.py --mine            copy the lessons to my_lessons/, or bring the copies
                                                there up to date; answers stay

A source is a jupytext percent script. In it stand the solutions, between `# BEGIN SOLUTION` and
`# END SOLUTION` as in the puzzles, and the right number in every `course.predict(...)`; the
learner's notebook has neither.
"""

import argparse
import hashlib
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from puzzles.puzzle import BEGIN, END, INSTEAD, skeleton_of

HOME = Path(__file__).resolve().parent
ROOT = HOME.parent
MINE = ROOT / "my_lessons"
OUTCOME = "application/vnd.kernel-parity.outcome+json"
LIMIT = 120  # seconds of one run of a lesson, on two cores
AIM = 30
PICTURE = 150_000  # bytes
PREDICT = re.compile(r'^(course\.predict\("\w+", )([^()\n]+)\)', re.MULTILINE)


@dataclass(frozen=True)
class Lesson:
    """One source: its number, its name, its cells."""

    number: str
    name: str
    source: Path

    @property
    def built(self) -> Path:
        return HOME / f"{self.name}.ipynb"

    def notebook(self, *, solved: bool = False) -> NotebookNode:
        """The notebook without outputs, as the learner gets it or with the solutions."""
        import jupytext

        script = jupytext.reads(self.source.read_text(), fmt="py:percent")
        cells = []
        for i, cell in enumerate(script.cells):
            answer = cell.metadata.get("answer")
            said = {k: cell.metadata[k] for k in ("answer", "setup") if k in cell.metadata}
            text = cell.source
            if cell.cell_type == "code":
                text = solved_of(text) if solved else given_of(text)
            if answer and not solved:
                said["given"] = fingerprint(text)
            make = getattr(nbformat.v4, f"new_{cell.cell_type}_cell")
            cells.append(make(text, id=answer or f"{self.number}-{i:02d}", metadata=said))
        # as ipykernel calls itself: JupyterLab would mark a fresh copy as changed otherwise
        python = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
        about = {"kernelspec": python, "language_info": {"name": "python"}, "lesson": self.number}
        return nbformat.v4.new_notebook(cells=cells, metadata=about)


def lessons(numbers: list[str] | None = None) -> list[Lesson]:
    """The lessons with these numbers, all by default. Raises ValueError for one that is not."""
    found = [Lesson(p.stem[:2], p.stem, p) for p in sorted((HOME / "src").glob("[0-9][0-9]_*.py"))]
    unknown = set(numbers or ()) - {lesson.number for lesson in found}
    if unknown:
        raise ValueError(f"no lesson {', '.join(sorted(unknown))} in notebooks/src")
    return [lesson for lesson in found if not numbers or lesson.number in numbers]


def given_of(source: str) -> str:
    """A code cell as the learner gets it."""
    text = skeleton_of(source).rstrip("\n") if BEGIN in source else source
    return PREDICT.sub(r"\1...)", text)


def solved_of(source: str) -> str:
    """A code cell with its solution, without the marks."""
    marks = (BEGIN, END)
    lines = [
        line
        for line in source.splitlines()
        if line.strip() not in marks and not line.strip().startswith(INSTEAD)
    ]
    return "\n".join(lines)


def fingerprint(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# Running


def run(notebook: NotebookNode) -> float:
    """Runs all cells, in the project's folder; the outputs are in the notebook after it. Seconds.

    Raises nbclient's CellExecutionError for a cell that fails.
    """
    from nbclient import NotebookClient

    os.environ["LESSON_BUILD"] = "1"
    os.environ["PYTHONPATH"] = str(ROOT)
    for name, folder in {
        "IPYTHONDIR": "ipython", "JUPYTER_CONFIG_DIR": "jupyter/config",
        "JUPYTER_DATA_DIR": "jupyter/data", "JUPYTER_RUNTIME_DIR": "jupyter/runtime",
        "MPLCONFIGDIR": "matplotlib", "TRITON_HOME": "triton",
    }.items():  # fmt: skip
        os.environ.setdefault(name, str(ROOT / ".cache" / folder))
    began = time.monotonic()
    client = NotebookClient(
        notebook, timeout=LIMIT, kernel_name="python3", record_timing=False,
        resources={"metadata": {"path": str(ROOT)}},
        extra_arguments=["--log-level=40"],  # it warns that it talks over TCP: to this machine
    )  # fmt: skip
    client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    return time.monotonic() - began


def outcomes(notebook: NotebookNode) -> dict[str, dict[str, Any]]:
    """What _course said of predictions and exercises, by name."""
    found = {}
    for _, data in _data(notebook):
        if OUTCOME in data:
            said = data[OUTCOME]
            found[said.get("check") or said["predict"]] = said
    return found


def _data(notebook: NotebookNode) -> Iterator[tuple[str, Any]]:
    """(the cell's id, the MIME bundle) of every output that has one."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if "data" in output:
                yield cell.id, output["data"]


def unfit(notebook: NotebookNode) -> list[str]:
    """Sentences: what in these outputs belongs to one machine, is too large, or went wrong."""
    wrong = []
    places = {str(ROOT), str(Path.home()), sys.prefix, "/tmp/", "ipykernel_"}
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            text = json.dumps(output)
            # the longest alone: a checkout may lie in /tmp
            found = max((p for p in places if p in text), key=len, default="")
            wrong += [f"cell {cell.id} shows {found!r}"] if found else []
            if output.get("name") == "stderr":
                wrong.append(f"cell {cell.id} writes to stderr: {output['text'][:200]}")
            for picture in re.findall(r"data:image/svg\+xml;base64,[^\"\\]*", text):
                if len(picture) > PICTURE:
                    wrong.append(f"cell {cell.id}: a picture of {len(picture) >> 10} kB")
            if "<img " in text and '<img alt=\\"' not in text:
                wrong.append(f"cell {cell.id}: a picture without a description")
    return wrong


# The three commands


def build(lesson: Lesson) -> list[str]:
    """Runs the learner's notebook and writes it. Sentences about what is wrong with it."""
    notebook = lesson.notebook()
    took = run(notebook)
    wrong = unfit(notebook)
    if not wrong:
        nbformat.validate(notebook)
        lesson.built.write_text(nbformat.writes(notebook) + "\n")
    print(f"{lesson.name}: {took:.0f} s, {lesson.built.stat().st_size >> 10} kB", flush=True)
    return wrong


def check(lesson: Lesson) -> list[str]:
    """Sentences about all that does not hold of a lesson; two runs."""
    wrong = stale(lesson)
    given, solved = lesson.notebook(), lesson.notebook(solved=True)
    times = [run(given), run(solved)]
    before, after = outcomes(given), outcomes(solved)
    wrong += [*unfit(given), *unfit(solved)]
    wrong += [f"{n} passes as it is given" for n, o in before.items() if "check" in o and o["ok"]]
    wrong += [f"{n} fails with its solution: {o}" for n, o in after.items() if not o["ok"]]
    if not after:
        wrong.append("it has neither a prediction nor an exercise")
    slow = max(times)
    if slow > LIMIT:
        wrong.append(f"a run takes {slow:.0f} s, {LIMIT} are allowed")
    note = f", aim at {AIM}" if slow > AIM else ""
    print(f"{lesson.name}: as given {times[0]:.0f} s, solved {times[1]:.0f} s{note}", flush=True)
    return wrong


def stale(lesson: Lesson) -> list[str]:
    """Whether the committed notebook has other cells than its source. Runs nothing."""
    if not lesson.built.exists():
        return [f"{lesson.built.name} is not built"]
    wanted, found = lesson.notebook(), nbformat.read(lesson.built, as_version=4)
    if _sources(wanted) == _sources(found):
        return []
    return [f"{lesson.built.name} is not what its source says: run notebooks/build.py"]


def _sources(notebook: NotebookNode) -> list[tuple]:
    return [(c.cell_type, c.id, c.source, dict(c.metadata)) for c in notebook.cells]


def refresh(built: Path, mine: Path) -> str:
    """Makes or updates a learner's copy of a built notebook; says in a word what was done.

    An answer cell that the learner has changed stays as it is, and so do cells that the learner has
    added, each after the cell it stood behind. Everything else is the new lesson's. What was there
    before an update is kept, in a hidden folder beside it.
    """
    fresh = nbformat.read(built, as_version=4)
    fresh.metadata["built"] = fingerprint(json.dumps(_sources(fresh)))
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    if not mine.exists():
        mine.parent.mkdir(parents=True, exist_ok=True)
        mine.write_text(nbformat.writes(fresh) + "\n")
        return "new"
    old = nbformat.read(mine, as_version=4)
    if old.metadata.get("built") == fresh.metadata["built"]:
        return "as it was"
    answers = {
        c.id: c.source
        for c in old.cells
        if "answer" in c.metadata and fingerprint(c.source) != c.metadata.get("given")
    }
    known = {c.id for c in fresh.cells}
    theirs = re.compile(rf"{fresh.metadata['lesson']}-\d\d")
    cells, behind = list(fresh.cells), ""
    for cell in fresh.cells:
        cell.source = answers.pop(cell.id, cell.source)
    for cell in old.cells:
        lost = cell.id in answers  # an answer to what the lesson no longer asks
        if cell.id in known or (
            not lost and ("answer" in cell.metadata or theirs.fullmatch(cell.id))
        ):
            behind = cell.id if cell.id in known else behind
            continue
        at = next((i for i, c in enumerate(cells) if c.id == behind), len(cells) - 1)
        cells.insert(at + 1, cell)
        behind = cell.id
    fresh.cells = cells
    kept = _place_before(mine)
    kept.write_text(mine.read_text())
    mine.write_text(nbformat.writes(fresh) + "\n")
    return f"brought up to date, your answers kept; as it was: {kept.relative_to(mine.parent)}"


def _place_before(mine: Path) -> Path:
    """Where the copy is kept as it was: a new name each time, out of JupyterLab's sight."""
    folder = mine.parent / ".before"
    folder.mkdir(exist_ok=True)
    names = (folder / f"{mine.stem}.{n}.ipynb" for n in itertools.count(1))
    return next(name for name in names if not name.exists())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Builds, proves or copies the lessons.")
    parser.add_argument("numbers", nargs="*", metavar="NN", help="lessons (default: all)")
    parser.add_argument("--check", action="store_true", help="prove, and write nothing")
    parser.add_argument("--mine", action="store_true", help="copy to my_lessons/, answers stay")
    args = parser.parse_args(argv)
    if args.mine:
        for left in sorted(MINE.glob("*.before.ipynb")):  # where they were kept once
            left.rename(_place_before(left.with_name(left.name.replace(".before", ""))))
        for path in sorted(HOME.glob("[0-9][0-9]_*.ipynb")):
            print(f"my_lessons/{path.name}: {refresh(path, MINE / path.name)}")
        return 0
    try:
        chosen = lessons(args.numbers)
    except ValueError as error:
        parser.error(str(error))
    failed = 0
    for lesson in chosen:
        for sentence in (check if args.check else build)(lesson):
            print(f"{lesson.name}: {sentence}", file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
