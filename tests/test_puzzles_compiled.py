"""The puzzles' solutions as machine code for an H200, on a machine that may have no GPU.

Interpreters neither fuse a product and a sum nor care where in shared memory a copy goes.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from parity import compile as gate
from parity.spec import Array
from puzzles.puzzle import HOME, Puzzle, load, track

FUSED = r"fma\.rn\.f32\s.*0f4B400000"  # x * inverse + 1.5 * 2 ** 23 in one rounding
COPY = r"cp\.async\.bulk\.tensor\S*\.shared::cluster\S* \[(%r\d+)\]"


def listings(solutions: Mapping[str, tuple[Puzzle, str]], backend: str, at: Path) -> dict[str, str]:
    """The PTX and machine code of each solution's kernels; every one of them compiles well."""
    problems = []
    for name, (puzzle, text) in solutions.items():
        file = at / f"{name}.py"
        file.write_text(text)
        case = replace(puzzle.problem.workloads[1], passes=("fwd",))
        drawn = {
            n: d.draw(np.random.default_rng(0)) for n, d in puzzle.problem.inputs(case).items()
        }
        problems.append(
            replace(
                puzzle.problem, stem=name, workloads=(case,),
                inputs=lambda _, of=drawn: {n: Array(x.shape, x.dtype.name) for n, x in of.items()},
                implementations={backend: f"{file}:solve"},
            )
        )  # fmt: skip
    names = {w.name for p in problems for w in p.workloads}
    rows = gate.compile_gate(problems, workloads=names, twins=[backend], cache=at)
    assert not [(row.problem, row.message) for row in rows if row.fails]
    found = dict.fromkeys(solutions, "")
    for row in rows:
        found[row.problem] += (at / row.listing).read_text() if row.listing else ""
    return found


def misplaced(ptx: str) -> list[str]:
    """Where in shared memory copies go that may not go there: TMA wants multiples of 128."""
    places = [re.search(rf"add\.s32\s+{r}, %r\d+, (\d+);", ptx) for r in re.findall(COPY, ptx)]
    return [place[1] for place in places if place and int(place[1]) % 128]


def test_triton_solutions_compile_and_round_as_the_interpreter_does(tmp_path: Path):
    solutions = {p.id: (p, p.solution("triton")) for p in track()}
    q03, text = solutions["q03"]
    solutions["fused"] = q03, text.replace(", enable_fp_fusion=False", "")
    found = listings(solutions, "triton", tmp_path)
    fused = [name for name, code in found.items() if re.search(FUSED, code)]
    ties = {p.id for p in track() if hasattr(p.spec, "unrounded")}
    assert "fused" in fused and not ties & {*fused}


def test_pallas_solutions_compile_and_copy_to_where_a_copy_may_go(tmp_path: Path):
    solutions = {p.id: (p, p.solution("pallas")) for p in track()}
    q15 = load(HOME / "q15")
    text = q15.solution("pallas").replace("zero_smem.at[half]", "zero_smem")
    old = "(None, 2 * BLOCK_N), lambda g: (g, ni // 2)"
    solutions["narrow"] = q15, text.replace(old, "(None, BLOCK_N), lambda g: (g, ni)")
    found = listings(solutions, "pallas", tmp_path)
    if gate.find_sass() is None:
        pytest.skip("no .venv-sass with jax's CUDA plugin (make sass), or no cc")
    wrong = {name: misplaced(code) for name, code in found.items() if misplaced(code)}
    assert [*wrong] == ["narrow"]
