"""The graded track on quantized kernels: fill a hole, and be told what is wrong.

puzzle.py    what a puzzle's folder describes      qNN/         the puzzles
grade.py     the parent: seeds, right answers, verdicts, points
process.py   the child process as the parent holds it
child.py     the child: the learner's code under limits
triton_side.py, pallas_side.py   one call, watched
policy.py    what a solution may name              verdicts.py  every verdict, and what helps
gpu_side.py  one call, and a race, on a GPU        speed.py     races and tiers
progress.py  the learner's file                    show.py      how a result looks
author.py    the gates that every puzzle passes    cli.py, commands.py
pictures.py  draws qNN/picture.svg                 magic.py     %puzzle in IPython and Jupyter
"""

from typing import Any


def load_ipython_extension(shell: Any) -> None:
    """`%load_ext puzzles`: the magics %puzzle and %%puzzle, see puzzles.magic."""
    from puzzles.magic import PuzzleMagics

    shell.register_magics(PuzzleMagics)
