"""A new problem's files: the spec and both twins, ready to run and honestly wrong.

The twins of a fresh problem are whole kernels that copy what they read, while its spec asks for
something else: the first check is red, and the hole that makes it green is one line a kernel.
"""

import ast
import builtins
import importlib.util
import keyword
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from parity import record

ROOT = record.RECORDS.parents[1]
TEMPLATES = Path(__file__).parent / "templates" / "new"
MOST_LETTERS = 30  # names are built from the stem, and lines from names
PAGE = "docs/contribute-a-problem.md"

NEW = {
    "problem": "parity/problems/{}.py",
    "triton": "triton_kernels/{}.py",
    "pallas": "pallas_kernels/{}.py",
}
PROBLEMS = "parity/problems/__init__.py"
EXPORTS = ("triton_kernels/__init__.py", "pallas_kernels/__init__.py")


class Refused(ValueError):
    """This name cannot become a problem; the message says why, in one sentence."""


def is_checkout(root: Path = ROOT) -> bool:
    """Whether the files of a problem can be added here: an installed package is no place."""
    project = root / "pyproject.toml"
    return (
        project.is_file()
        and 'name = "kernel-parity"' in project.read_text()
        and all((root / file).is_file() for file in (PROBLEMS, *EXPORTS))
    )


def rendered(stem: str) -> dict[str, str]:
    """The text of every new file, by its path in the checkout."""
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # Python, not HTML
    )
    return {
        path.format(stem): templates.get_template(f"{name}.py.jinja").render(stem=stem)
        for name, path in NEW.items()
    }


def planned(stem: str, root: Path = ROOT) -> dict[str, str]:
    """Every file that the new problem writes or changes, whole, by its path in the checkout.

    Raises:
        Refused: the name cannot be used, or is in use.
    """
    check_name(stem)
    texts = rendered(stem)
    for path in texts:
        if (root / path).exists():
            raise Refused(f"{path} exists")
    for path in (PROBLEMS, *EXPORTS):
        old = (root / path).read_text()
        if stem in _names(old):
            raise Refused(f"{path} uses the name {stem!r} already")
        texts[path] = _with_problem(old, stem) if path == PROBLEMS else _with_export(old, stem)
    return texts


def check_name(stem: str) -> None:
    """Raises Refused unless stem can name a file, a function and half of a kernel's name."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", stem):
        words = re.sub(r"[^a-z0-9]+", "_", re.sub(r"([a-z])([A-Z])", r"\1_\2", stem).lower())
        better = re.sub(r"^[0-9_]+|_+$", "", words)
        hint = f"; how about {better!r}?" if better else ""
        raise Refused(f"{stem!r}: expected lower-case letters, digits and _, a letter first{hint}")
    if len(stem) > MOST_LETTERS:
        raise Refused(f"{stem!r} has {len(stem)} letters, at most {MOST_LETTERS} fit")
    if keyword.iskeyword(stem) or keyword.issoftkeyword(stem):
        raise Refused(f"{stem!r} is a word of Python")
    if hasattr(builtins, stem):
        raise Refused(f"{stem!r} is a built-in function of Python, which it would hide")
    if stem.endswith(("_fwd", "_bwd", "_kernel")):
        raise Refused(f"{stem!r} ends like a pass: X_fwd, X_bwd and their kernels are made from X")
    if any(stem in _names(text) for text in rendered("_").values()):
        raise Refused(f"{stem!r} is a name that kernel files use for something else")
    if importlib.util.find_spec(stem) is not None:
        raise Refused(f"{stem!r} is a module that Python finds already")


def _names(source: str) -> set[str]:
    """Every name that a file binds or reads, and every name in its __all__."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id=name) | ast.arg(arg=name) | ast.FunctionDef(name=name):
                names.add(name)
            case ast.alias(name=name, asname=short):
                names.add(short or name.partition(".")[0])
            case ast.Constant(value=str(text)):
                names.add(text)
    return names


# The three files that list every problem: names are put in, and nothing else is touched.


def _with_problem(source: str, stem: str) -> str:
    tree = ast.parse(source)
    imported = next(
        node
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module == "parity.problems"
    )
    listed = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "PROBLEMS" and node.value
    )
    source = _inserted(source, listed, f"{stem}.PROBLEM", last=True)
    return _inserted(source, imported, stem)


def _with_export(source: str, stem: str) -> str:
    exported = next(
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    return _inserted(source, exported, f'"{stem}"')


def _inserted(source: str, node: ast.stmt | ast.expr, item: str, *, last: bool = False) -> str:
    """source with one more item in a list, tuple or import; formatted as ruff formats it."""
    lines = source.splitlines(keepends=True)
    items = node.names if isinstance(node, ast.ImportFrom) else node.elts  # pyright: ignore
    texts = [ast.get_source_segment(source, x) or "" for x in items]
    at = len(items) if last else next(
        (i for i, text in enumerate(texts) if _order(text) > _order(item)), len(items)
    )  # fmt: skip
    first, end = node.lineno - 1, node.end_lineno or node.lineno
    if end - first > 1:  # one item a line
        row = items[at].lineno - 1 if at < len(items) else (items[-1].end_lineno or 0)
        return "".join([*lines[:row], f"    {item},\n", *lines[row:]])
    texts.insert(at, item)
    line = lines[first].rstrip("\n")
    start, stop = items[0].col_offset, items[-1].end_col_offset
    before, after = line[:start], line[stop:]
    whole = before + ", ".join(texts) + after
    if len(whole) > 100:
        opening, closing = ("(", ")") if isinstance(node, ast.ImportFrom) else ("", "")
        body = "".join(f"    {text},\n" for text in texts)
        whole = f"{before}{opening}\n{body}{closing}{after}"
    return "".join([*lines[:first], whole + "\n", *lines[end:]])


def _order(name: str) -> list[tuple[str, int]]:
    """Sorts names as ruff does: numbers in them by their value."""
    return [(text, int(part or -1)) for text, part in re.findall(r"(\D*)(\d*)", name.strip('"'))]


def write(texts: Mapping[str, str], root: Path = ROOT) -> None:
    """Writes all files, or none: what was replaced is put back if anything goes wrong.

    Raises:
        OSError: a file could not be written; the checkout is as it was.
    """
    before = {path: (root / path).read_bytes() for path in texts if (root / path).exists()}
    parts: dict[str, Path] = {}
    done: list[str] = []
    try:
        for path, text in texts.items():
            with tempfile.NamedTemporaryFile(
                "w", dir=(root / path).parent, suffix=".part", delete=False
            ) as part:
                parts[path] = Path(part.name)
                part.write(text)
            mode = (root / path).stat().st_mode if path in before else 0o644
            os.chmod(part.name, mode & 0o777)
        for path, part in parts.items():
            done.append(path)
            os.replace(part, root / path)
    except BaseException:
        for path in done:
            if path in before:
                (root / path).write_bytes(before[path])
            else:
                (root / path).unlink(missing_ok=True)
        raise
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


# What a fresh problem still lacks.


def untouched(stem: str, root: Path = ROOT) -> tuple[str, ...]:
    """Which of the problem's files are still as they were made."""
    files = ((root / path, text) for path, text in rendered(stem).items())
    return tuple(
        str(file.relative_to(root))
        for file, text in files
        if file.is_file() and file.read_text() == text
    )


def next_step(stem: str, root: Path = ROOT) -> str:
    """What a newcomer does next about a fresh problem; "" for one that is under way."""
    spec, *twins = (path.format(stem) for path in NEW.values())
    fresh = untouched(stem, root)
    if left := " and ".join(twin for twin in twins if twin in fresh):
        return (
            f"As `parity new` made it, and so far a copy: {left}. Stage 3 of each kernel is yours, "
            f"`y = ...` and `dx = ...`, as {spec} defines them; {PAGE} shows how."
        )
    if spec in fresh:
        return (
            f"As `parity new` made it, and so far the square: {spec}. Say there what {stem} "
            f"computes; {PAGE} shows how."
        )
    return ""
