"""The track in IPython and Jupyter, after `%load_ext puzzles`.

    %puzzle q04 [triton]     the statement with its picture, and the next cell, to be filled
    %%puzzle q04 triton      puts the cell into your file of that puzzle and checks it

It is the same file, grader, verdict and progress as `puzzles check` has: work goes on wherever you
left it.
"""

import base64
import io
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

try:
    from IPython.core.error import UsageError
    from IPython.core.magic import Magics, line_cell_magic, magics_class
    from IPython.core.magic_arguments import argument, magic_arguments, parse_argstring
except ModuleNotFoundError as e:
    raise ModuleNotFoundError(
        "the magic needs IPython: pip install 'kernel-parity[notebooks]'", name="IPython"
    ) from e

from rich.console import Console
from rich.terminal_theme import TerminalTheme

from parity.commands.shared import Stop, console_of
from puzzles import show
from puzzles.cli import seed
from puzzles.commands import backend_of, file_of, graded, put_aside, puzzle_named, short
from puzzles.progress import folder_of
from puzzles.puzzle import Puzzle

# Of a verdict on a page: colours that can be read on white and on black
THEME = TerminalTheme(
    (112, 112, 112), (112, 112, 112),  # between which what is dim lies
    [(0, 0, 0), (214, 69, 61), (38, 150, 84), (176, 126, 0), (60, 125, 200)],
)  # fmt: skip
PAGE = '<pre style="line-height:1.25">{code}</pre>'


@magics_class
class PuzzleMagics(Magics):
    """%puzzle and %%puzzle."""

    def __init__(self, shell: Any) -> None:
        super().__init__(shell)
        self.written: dict[Path, str] = {}  # what the cells of this session put there

    @magic_arguments("%puzzle")
    @argument("puzzle", help="q04, say")
    @argument("backend", nargs="?", help="triton or pallas; default: the one you have begun with")
    @argument("--seed", type=seed, help="of an earlier check, to see the same numbers again")
    @argument("--folder", type=Path, help="yours (default: ./my_puzzles)")
    @line_cell_magic
    def puzzle(self, line: str, cell: str | None = None) -> None:
        """Show a puzzle and begin a cell for it; on top of that cell, check it.

        `%puzzle q04` shows the statement and inserts a cell with your file, or with the skeleton.
        `%%puzzle q04 triton` writes its cell to the file and grades it. A file that did not come
        from a cell of this session is kept beside it.
        """
        args = parse_argstring(self.puzzle, line)
        try:
            puzzle = puzzle_named(args.puzzle)
            folder = folder_of(args.folder)
            backend = backend_of(args.backend, puzzle, folder, file=cell is not None)
            file = file_of(folder, puzzle, backend)
            if cell is None:
                self._shows(puzzle, backend, file)
            else:
                self._checks(args, puzzle, backend, file, cell)
        except Stop as stop:
            raise UsageError(str(stop)) from None

    def _shows(self, puzzle: Puzzle, backend: str, file: Path) -> None:
        begun = file.is_file()
        source = file.read_text() if begun else puzzle.skeleton(backend)
        if self._in_a_notebook():
            _display(puzzle)
        else:
            show.statement(console_of(), puzzle)
        what = f"what you have in {short(file)}" if begun else f"the {backend} skeleton"
        print(f"\nThe next cell holds {what}. Run it to have it checked.")
        assert self.shell is not None
        self.shell.set_next_input(f"%%puzzle {puzzle.id} {backend}\n{source}", replace=False)

    def _checks(self, args: Namespace, puzzle: Puzzle, backend: str, file: Path, cell: str) -> None:
        before = self._write(file, cell, puzzle.skeleton(backend))
        if before is not None:
            print(f"{short(file)} was another one: it is {short(before)} now.")
        found = graded(args, puzzle, backend, file)
        if not self._in_a_notebook():
            show.result(console_of(), puzzle, found, short(file), prompt="!")
            return
        from IPython.display import display

        page = Console(file=io.StringIO(), record=True, width=100, highlight=False,
                       force_jupyter=False)  # fmt: skip
        show.result(page, puzzle, found, short(file), prompt="!")
        text = page.export_text(clear=False)
        told = page.export_html(theme=THEME, code_format=PAGE, inline_styles=True)
        display({"text/plain": text, "text/html": told}, raw=True)

    def _write(self, file: Path, cell: str, skeleton: str) -> Path | None:
        """Puts the cell there. What was there before is kept, and the return value says where,
        unless it is the skeleton or an earlier cell of this session."""
        known = (cell, skeleton, self.written.get(file))
        mine = not file.exists() or file.read_text(errors="replace") in known
        before = None if mine else put_aside(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(f".{file.name}.{os.getpid()}")
        beside.write_text(cell)
        os.replace(beside, file)
        self.written[file] = cell
        return before

    def _in_a_notebook(self) -> bool:
        return hasattr(self.shell, "kernel")


def _display(puzzle: Puzzle) -> None:
    """The statement for a page: the picture stands where spec.md has it, its colours its own."""
    from IPython.display import HTML, Markdown, display

    text = puzzle.statement()
    image = show.IMAGE.search(text)
    drawn = puzzle.folder / "picture.svg"
    if image is None or not drawn.is_file():
        display(Markdown(text))
        return
    data = base64.b64encode(drawn.read_bytes()).decode()
    words = image[1].replace('"', "&quot;").replace("\n", " ")
    display(Markdown(text[: image.start()]))
    display(HTML(f'<img src="data:image/svg+xml;base64,{data}" alt="{words}">'))
    display(Markdown(text[image.end() :]))
