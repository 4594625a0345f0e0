"""Lesson 13's NumPy codecs: the solutions are right, and planted wrong ones are refused."""

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from notebooks import _codecs as codecs
from notebooks import build
from parity import formats

LESSON = next(lesson for lesson in build.lessons() if lesson.number == "13")
CELLS = {cell.id: cell.source for cell in LESSON.notebook(solved=True).cells}
GIVEN = {cell.id: cell.source for cell in LESSON.notebook().cells}
CELL = {"int8": "int8_encode"} | {name: name for name in ("int4", "e4m3", "nf4", "mx")}
PLANTED = tomllib.loads((Path(__file__).parent / "lessons" / "13.toml").read_text())["codec"]


def answer_of(name: str, source: str) -> str:
    scope: dict[str, Any] = {"np": np, "formats": formats}
    exec(source, scope)
    return codecs.judged(name, *(scope[function] for function in codecs.CODECS[name]()))


@pytest.mark.parametrize("name", codecs.CODECS)
def test_the_solution_agrees_and_the_gap_does_not(name: str):
    assert answer_of(name, CELLS[CELL[name]]) == ""
    assert "not yet" in answer_of(name, GIVEN[CELL[name]])


@pytest.mark.parametrize("wrong", PLANTED, ids=lambda w: f"{w['cell']}: {w['says']}")
def test_a_wrong_codec_is_refused(wrong: dict):
    old, new = wrong["edit"]
    assert CELLS[wrong["cell"]].count(old) == 1
    name = next(name for name, cell in CELL.items() if cell == wrong["cell"])
    assert wrong["answer"] in answer_of(name, CELLS[wrong["cell"]].replace(old, new))


def test_every_codec_has_two_wrong_answers():
    planted = [wrong["cell"] for wrong in PLANTED]
    assert all(planted.count(cell) >= 2 for cell in CELL.values())


def test_what_is_not_an_array_of_the_right_kind_is_a_sentence():
    def wide(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return np.rint(x / scale)

    assert "int8 is wanted" in codecs.judged("int8", wide)
    assert "ValueError: no" in codecs.judged(
        "nf4", lambda x: (_ for _ in ()).throw(ValueError("no"))
    )
    assert "is wanted" in codecs.judged("nf4", lambda x: np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match="functions"):
        codecs.judged("e4m3", wide)
