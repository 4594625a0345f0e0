"""Every verdict the grader can come to: what it means, and what helps. A closed set."""

from collections.abc import Mapping
from typing import NamedTuple


class Meaning(NamedTuple):
    says: str  # in the headline
    helps: str


VERDICTS: Mapping[str, Meaning] = {
    "pass": Meaning("right", ""),
    # before anything runs
    "syntax_error": Meaning(
        "Python cannot read the file", "The mistake may be on the line before."
    ),
    "forbidden": Meaning(
        "the file uses what a solution may not",
        "Whole arrays may be made, named and reshaped; what computes belongs into the kernel.",
    ),
    "import_error": Meaning(
        "the file fails while it is imported",
        "Only imports, kernels and functions belong at the top level.",
    ),
    "no_entry_point": Meaning(
        "there is no function solve",
        "Keep `def solve(...)` as the skeleton has it; `puzzles reset` brings it back.",
    ),
    # the answer
    "wrong_shape": Meaning("an output has the wrong shape", "The statement gives every shape."),
    "wrong_dtype": Meaning("an output has the wrong dtype", "The statement gives every dtype."),
    "not_written": Meaning(
        "part of an output was never written",
        "It still holds the poison it was filled with. Look at the grid and at the store's mask.",
    ),
    "wrong_value": Meaning(
        "wrong values", "Work the first wrong element through by hand, from the statement."
    ),
    "cached": Meaning(
        "it remembers an earlier answer", "A solution depends on its arguments and nothing else."
    ),
    # behaviour
    "past_the_end": Meaning(
        "it reaches beyond the end of a tensor",
        "On a GPU that reads or destroys somebody else's data, or faults. Is the mask missing or "
        "wrong, or the address?",
    ),
    "input_changed": Meaning(
        "an input was written to", "Allocate outputs; inputs belong to the caller."
    ),
    "nondeterministic": Meaning(
        "two runs on the same input differ", "Nothing random or left over may enter the answer."
    ),
    "race": Meaning(
        "a data race",
        "Two accesses are not ordered: a barrier_wait or commit_smem is missing between them.",
    ),
    "no_launch": Meaning(
        "no kernel was launched", "The work has to be done by a kernel that solve launches."
    ),
    "no_effect": Meaning(
        "the kernel does not matter",
        "With kernels that do nothing solve gave the right answer all the same.",
    ),
    "foreign_work": Meaning(
        "something other than the kernel did the work",
        "Library operations on whole arrays are not what is asked for here.",
    ),
    # on a GPU
    "wrong_on_gpu": Meaning(
        "right in the interpreter, wrong on the GPU",
        "Programs run at once there: no block may rely on another one, nor on what memory held. "
        "A product and a sum may be rounded once, and a division be off in its last place.",
    ),
    "impossible": Meaning(
        "faster than the memory of this GPU",
        "Some answer was not computed from its input while the clock ran.",
    ),
    # the process
    "raised": Meaning(
        "it raised an exception", "Read the message; the line of your file stands above it."
    ),
    "timeout": Meaning("it did not finish in time", "Is there a loop whose end is never reached?"),
    "memory": Meaning(
        "it asked for more memory than a puzzle needs",
        "Allocate outputs and small scratch; look for a size that is multiplied by mistake.",
    ),
    "flood": Meaning("it prints without end", "Remove the print from the loop."),
    "crashed": Meaning(
        "the process died",
        "Native code failed: most often a pointer far outside its tensor. Check the offsets.",
    ),
    "outside": Meaning(
        "it reached outside its folder", "A solution computes: no files, processes, connections."
    ),
    "patched": Meaning("it replaced a function of a library", "Leave other people's modules be."),
    "forged": Meaning("it wrote on the grader's own line", "Return the answer from solve instead."),
}

# What parity's judge calls a wrong answer
OF_JUDGE: Mapping[str, str] = {"shape": "wrong_shape", "dtype": "wrong_dtype"}
