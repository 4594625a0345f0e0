"""The documents name real places: every link resolves, every picture and probe is current."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README.md")],
    key=lambda file: file.relative_to(ROOT).as_posix(),
)
# [words](target) or [words](target "place: code"); \" inside the code stands for "
LINK = re.compile(r'\[[^\]]*\]\(([^)\s"]+)(?: "((?:[^"\\]|\\.)*)")?\)')


def links(document: Path) -> list[tuple[str, str]]:
    found = LINK.findall(document.read_text())
    return [(target, title.replace('\\"', '"')) for target, title in found]


def place(file: Path, name: str) -> list[str]:
    """The source that `name` means: a stage of each kernel, a function, a class, the file."""
    text = file.read_text()
    if name == "file":
        return [text]
    lines = text.splitlines()
    named = [
        "\n".join(lines[min(n.lineno for n in (node, *node.decorator_list)) - 1 : node.end_lineno])
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name
    ]
    return named or re.findall(
        rf"# --- {re.escape(name)}\b(.*?)(?=# --- |\n\n\n|\Z)", text, re.DOTALL
    )


def plain(code: str) -> str:
    return " ".join(code.split())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document: Path):
    wrong = []
    for target, title in links(document):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        if not file.exists():
            wrong.append(f"{target}: no such file")
        elif anchor and anchor not in headings(file):
            wrong.append(f"{target}: no such heading")
        elif title:
            name, _, code = title.partition(": ")
            if not any(plain(code) in plain(piece) for piece in place(file, name)):
                wrong.append(f"{target}: {code!r} is not in {name!r}")
    assert not wrong, "\n".join(wrong)


def headings(document: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in found}


def test_porting_points_into_both_packages():
    titled = [target for target, title in links(ROOT / "docs" / "porting.md") if title]
    for package in ("triton_kernels", "pallas_kernels"):
        assert sum(package in target for target in titled) >= 15


def named_in(table: str) -> set[str]:
    """The first column of the tables under a heading, where it is a name in backquotes."""
    text = (ROOT / "docs" / "silent-lies.md").read_text()
    section = re.split(r"^## ", text.split(f"## {table}")[1], flags=re.MULTILINE)[0]
    return set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))


def test_every_probe_is_described_and_every_description_has_its_probe():
    from parity.frameworks import mosaic_interpreter, triton_interpreter

    assert named_in("Triton's interpreter") == {p.name for p in triton_interpreter.probes()}
    assert named_in("Mosaic GPU's interpreter") == set(mosaic_interpreter.probe_kernels())


def test_the_picture_is_current(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import picture

    assert picture.PICTURE.read_text() == picture.draw(), "run `make docs`"


def test_what_was_tried_is_current(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import tried

    assert (ROOT / "docs" / "tried.md").read_text() == tried.rendered(), "run `make docs`"


def test_the_bytes_of_decoding_are_current(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import decoding

    book = decoding.Decoding()
    assert decoding.PAGE.read_text() == book.text(), "run `make docs`"
    for model, picture in book.pictures.items():
        # another version of matplotlib may draw the same in other strokes
        assert f">{picture.words}</desc>" in decoding.file(model).read_text(), "run `make docs`"


def test_the_masks_of_the_page_are_the_same_from_both_sides():
    page = (ROOT / "docs" / "flex-masks.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(code, {})
