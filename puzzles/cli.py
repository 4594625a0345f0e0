"""The `puzzles` command."""

from collections.abc import Sequence

_NOTHING_YET = """\
There are no puzzles yet: the graded track on quantized kernels is being written.
What it will build on is here: `python -c "help('parity.formats')"` shows the number formats,
`parity list` the kernels.\
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Says what exists. Exit status 0."""
    del argv  # nothing to choose from
    print(_NOTHING_YET)
    return 0
