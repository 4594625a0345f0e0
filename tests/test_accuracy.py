"""docs/accuracy.md: current, complete, and what its script computes."""

import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from parity import formats

ROOT = Path(__file__).parent.parent


@pytest.fixture
def accuracy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import accuracy

    return accuracy


def test_the_page_and_its_pictures_are_current(accuracy: ModuleType):
    book = accuracy.Accuracy()
    assert accuracy.PAGE.read_text() == book.text(), "run `make docs`"
    for name, picture in book.pictures.items():
        # another version of matplotlib may draw the same in other strokes
        drawn = accuracy.PICTURES[name].read_text()
        assert f">{picture.words}</desc>" in drawn, "run `make docs`"


def test_every_row_is_there_and_every_quantizer_is_asked(accuracy: ModuleType):
    wanted = {("format", data, *key) for data in accuracy.DATA for key in accuracy.FORMATS}
    wanted |= {("rotation", *key) for key in accuracy.PREDICTED}
    wanted |= {("sizes", *key) for key in accuracy.PREDICTED_SIZES}
    wanted |= {("quiet", "outliers", *key) for key in accuracy.PREDICTED_QUIET}
    wanted |= {("attention", "fa3", *key) for key in accuracy.PREDICTED_ATTENTION}
    assert set(accuracy.recorded()) == wanted
    source = Path(accuracy.__file__).read_text()
    quantizers = {name for name in formats.__all__ if "_quantize" in name}
    assert all(name in source for name in quantizers)


@pytest.mark.parametrize(
    "key",
    [
        ("format", "outliers", "e4m3", "1 x 128"),
        ("format", "fa3", "int4 with zeros", "group of 128"),
        ("format", "fa3", "NF4", "block of 64"),
        ("format", "fa3", "MXFP4, floor", "group of 32"),
        ("rotation", "outliers", "int4", "group of 128"),
        ("quiet", "outliers", "e4m3", "row"),
        ("sizes", "fa3", "int8", "row"),
    ],
    ids=" ".join,
)
def test_a_row_is_what_the_script_computes(accuracy: ModuleType, key: tuple[str, ...]):
    study, data, *of = key
    fmt = accuracy.FORMATS[tuple(of)]
    again = {
        "format": lambda: accuracy.measured(data, fmt),
        "rotation": lambda: accuracy.measured_rotation(data, fmt),
        "quiet": lambda: accuracy.measured_quiet(fmt),
        "sizes": lambda: accuracy.measured_sizes(data, fmt),
    }[study]()
    recorded = accuracy.recorded()[key]
    assert again.keys() == recorded.keys()
    for name, value in recorded.items():
        if isinstance(value, float):  # a unit in the fourth digit, if sums round otherwise
            assert math.isclose(again[name], value, rel_tol=1e-3), name
        else:
            assert again[name] == value, name


def test_attention_is_what_the_script_computes(
    accuracy: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    """On two draws of a quarter of the tokens: its errors are of the recorded size."""
    monkeypatch.setattr(accuracy, "T", 256)
    monkeypatch.setattr(accuracy, "DRAWS", 2)
    again = accuracy.measured_attention(("int8", "tensor"))
    recorded = accuracy.recorded()["attention", "fa3", "int8", "tensor"]
    assert again["rotated"] < again["plain"]
    assert again["rotated_logits"] == pytest.approx(recorded["rotated_logits"], rel=0.5)


def test_a_uniform_error_is_that_of_a_step(accuracy: ModuleType):
    """int8 of a row: a step over the square root of 12, which the predictions rest on."""
    x, _ = accuracy.drawn("gaussian")
    values = np.asarray(x, np.float64)
    step = np.abs(values).max(axis=1) / 127
    want = math.sqrt(np.mean(step**2) / 12 / np.mean(values**2))
    row = accuracy.recorded()["format", "gaussian", "int8", "row"]
    assert row["sqnr_db"] == pytest.approx(accuracy.decibels(want), abs=0.1)


def test_a_rotation_is_undone_and_leaves_products_alone(accuracy: ModuleType):
    x, w = (a[:8] for a in accuracy.drawn("fa3"))
    turned = accuracy.rotated(x), accuracy.rotated(w)
    assert accuracy.distance(accuracy.rotated_back(turned[0]), x) < 2**-8
    assert accuracy.distance(accuracy.product(*turned), accuracy.product(x, w)) < 2**-7
