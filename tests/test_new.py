"""A new problem: right from the start but for its answer, and green when the page is followed."""

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pallas_kernels
import parity.problems
import triton_kernels
from parity import cli, new
from parity.check import check

ROOT = Path(__file__).parent.parent
STEM = "relu_squared"  # the page's example
PAGE = ROOT / new.PAGE
LONGEST = "a" * new.MOST_LETTERS


def copy_of_the_checkout(root: Path) -> Path:
    for name in ("parity", "triton_kernels", "pallas_kernels"):
        shutil.copytree(
            ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "records")
        )
    (root / "tests").mkdir()
    for name in ("pyproject.toml", "tests/test_twins.py", "tests/test_layering.py"):
        shutil.copy(ROOT / name, root / name)
    return root


def called(root: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Runs `python ARGS` on the copy."""
    env = os.environ | {"PYTHONPATH": str(root), "GIT_CEILING_DIRECTORIES": str(root.parent)}
    return subprocess.run(
        [sys.executable, *args], cwd=root, env=env, capture_output=True, text=True, check=False
    )


def command(root: Path, *args: str) -> subprocess.CompletedProcess[str]:
    main = "import sys; from parity.cli import main; sys.exit(main(sys.argv[1:]))"
    return called(root, "-c", main, *args)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout with three new problems: the page's, a short and the longest name."""
    root = copy_of_the_checkout(tmp_path_factory.mktemp("fresh"))
    done = command(root, "new", STEM)
    assert done.returncode == 0 and f"parity check {STEM}" in done.stdout, done.stderr
    for stem in ("ab", LONGEST):
        new.write(new.planned(stem, root), root)
    return root


def test_a_fresh_problem_passes_lint(fresh: Path):
    written = [path for stem in (STEM, "ab", LONGEST) for path in new.rendered(stem)]
    written += [new.PROBLEMS, *new.EXPORTS]
    for how in (("check",), ("format", "--check")):
        done = called(fresh, "-m", "ruff", *how, "--no-cache", *written)
        assert done.returncode == 0, done.stdout
    specs = [path for path in written if path.startswith("parity/")]
    done = called(fresh, "-m", "pyright", "--pythonpath", sys.executable, *specs)
    assert done.returncode == 0, done.stdout


def test_a_fresh_problem_passes_the_tests_of_twins_and_layers(fresh: Path):
    """Those that read syntax trees: the others start processes, and know no stem."""
    done = called(
        fresh, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider",
        "tests/test_twins.py", "tests/test_layering.py",
        "-k", "twin or packages or seven_parts or backdoor or downwards or heart or a_kernel",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 30  # pyright: ignore


def test_a_fresh_problem_is_listed_last_and_imports_no_framework(fresh: Path):
    code = (
        "import sys; from parity.problems import PROBLEMS; import triton_kernels, pallas_kernels; "
        "print(*(p.stem for p in PROBLEMS), {'torch', 'jax'} & set(sys.modules), "
        "triton_kernels.__all__ == pallas_kernels.__all__ == sorted(triton_kernels.__all__))"
    )
    said = called(fresh, "-c", code).stdout.split()
    assert said[-5:] == [STEM, "ab", LONGEST, "set()", "True"]


def test_the_first_check_is_red_and_says_what_to_do(fresh: Path):
    done = command(fresh, "check", STEM, "-w", "ci_tiles", "--twin", "triton", "--no-shrink")
    said = " ".join(done.stdout.split())
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    assert said.startswith("2 of 2 checks fail")
    assert f"a copy: triton_kernels/{STEM}.py and pallas_kernels/{STEM}.py. Stage 3" in said
    assert said.endswith(f"{new.PAGE} shows how.")


def test_following_the_page_ends_green(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    """Red in both languages for the right reason; then the page's patch, and all is right."""
    for package in (triton_kernels, pallas_kernels, parity.problems):
        folder = fresh / package.__name__.replace(".", "/")
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    assert [row.reason for row in results("fwd")] == ["norm", "norm"]
    patch = "".join(re.findall(r"^```diff\n(.*?)^```$", PAGE.read_text(), re.M | re.S))
    git = ["git", "apply", "--whitespace=nowarn", "-"]
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(fresh.parent)}
    subprocess.run(git, cwd=fresh, env=env, input=patch, text=True, check=True)
    rows = results("fwd", "bwd")
    assert [f"{row.impl} {row.which} {row.reason} {row.detail}" for row in rows if not row.ok] == []
    assert len(rows) == 4
    assert new.next_step(STEM, fresh) == ""


def results(*passes: str) -> list:
    """Both twins on one ci workload, as the files are now."""
    for name in [name for name in sys.modules if name.endswith(f".{STEM}")]:
        del sys.modules[name]
    problem = importlib.import_module(f"parity.problems.{STEM}").PROBLEM
    return check(problem, problem.workload("ci_tiles"), passes=passes)


def test_what_is_left_to_do_follows_the_files(tmp_path: Path):
    root = copy_of_the_checkout(tmp_path)
    new.write(new.planned(STEM, root), root)
    spec, *twins = new.rendered(STEM)
    assert new.untouched(STEM, root) == (spec, *twins)
    for twin in twins:
        assert twin in new.next_step(STEM, root)
        (root / twin).write_text((root / twin).read_text() + "\n")
    assert spec in new.next_step(STEM, root) and "the square" in new.next_step(STEM, root)
    (root / spec).write_text("")
    assert new.next_step(STEM, root) == ""
    assert new.next_step("matmul", root) == ""


@pytest.mark.parametrize(
    ("stem", "why"),
    [
        ("top-k", "how about 'top_k'?"),
        ("TopK", "how about 'top_k'?"),
        ("3d", "how about 'd'?"),
        ("_hidden", "letter first"),
        ("", "letter first"),
        ("../evil", "letter first"),
        ("naïve", "lower-case"),
        ("class", "word of Python"),
        ("match", "word of Python"),
        ("sum", "built-in"),
        ("json", "Python finds already"),
        ("numpy", "Python finds already"),
        ("torch", "something else"),
        ("x", "something else"),
        ("problem", "uses the name"),
        ("attention_fwd", "ends like a pass"),
        ("a" * 31, "at most 30"),
        ("softmax", "exists"),
    ],
)
def test_bad_names_are_refused_and_nothing_is_written(stem: str, why: str, capsys):
    before = tree(ROOT)
    assert cli.main(["new", stem]) == 2
    out, err = capsys.readouterr()
    assert why in err and "nothing was written" in err and err.count("\n") == 1 and not out
    assert tree(ROOT) == before


def tree(root: Path) -> dict[str, float]:
    folders = [root / Path(path).parent for path in new.NEW.values()]
    return {
        str(f): f.stat().st_mtime for folder in folders for f in folder.glob("*") if f.is_file()
    }


def test_a_dry_run_is_a_patch_and_writes_nothing(fresh: Path, tmp_path: Path, monkeypatch, capsys):
    root = copy_of_the_checkout(tmp_path)
    monkeypatch.setattr(new, "ROOT", root)
    before = tree(root)
    assert cli.main(["new", STEM, "--dry-run"]) == 0
    patch = capsys.readouterr().out
    assert patch.startswith("3 new files") and tree(root) == before
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    subprocess.run(["git", "apply", "-"], cwd=root, env=env, input=patch, text=True, check=True)
    made = {path: (root / path).read_text() for path in new.rendered(STEM)}
    assert made == new.rendered(STEM)
    assert ast.unparse(ast.parse((root / new.PROBLEMS).read_text())).count(STEM) == 2


def test_json_names_the_files(tmp_path: Path, monkeypatch, capsys):
    root = copy_of_the_checkout(tmp_path)
    monkeypatch.setattr(new, "ROOT", root)
    assert cli.main(["new", STEM, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["new"] == list(new.rendered(STEM)) and len(said["changed"]) == 3
    assert all((root / path).is_file() for path in said["new"])
    assert cli.main(["new", STEM]) == 2  # nothing is overwritten
    assert "exists; nothing was written" in capsys.readouterr().err


def test_all_files_or_none(tmp_path: Path, monkeypatch, capsys):
    root = copy_of_the_checkout(tmp_path)
    monkeypatch.setattr(new, "ROOT", root)
    before, real, done = tree(root), os.replace, []

    def full_disk(source, target):
        if len(done) == 4:
            raise OSError(28, "No space left on device")
        done.append(target)
        real(source, target)

    monkeypatch.setattr(new.os, "replace", full_disk)
    texts = {path: (root / path).read_text() for path in (new.PROBLEMS, *new.EXPORTS)}
    assert cli.main(["new", STEM]) == 3
    assert "No space left" in capsys.readouterr().err
    assert set(tree(root)) == set(before) and len(done) == 4
    assert texts == {path: (root / path).read_text() for path in texts}


def test_an_installed_package_is_no_place(tmp_path: Path, monkeypatch, capsys):
    root = copy_of_the_checkout(tmp_path)
    (root / "pyproject.toml").unlink()
    monkeypatch.setattr(new, "ROOT", root)
    assert cli.main(["new", STEM]) == 3
    assert "clone the repository" in capsys.readouterr().err


@pytest.mark.parametrize("trailing", ["", ",\n"])
def test_names_are_put_in_their_place(trailing: str):
    names = ["ab", "int4_matmul", "int8_matmul", "rms_norm", "softmax"]
    if trailing:  # one item a line, with a remark that must survive
        body = "".join(f'    "{name}",{"  # wide" * (name == "ab")}\n' for name in names)
        source = f"__all__ = [\n{body}]\n"
    else:
        source = "__all__ = [" + ", ".join(f'"{name}"' for name in names) + "]\n"
    for stem in ("aa", "int16_matmul", "zz"):
        source = new._with_export(source, stem)
    found = ast.literal_eval(source.partition("=")[2].strip())
    assert found == ["aa", *names[:3], "int16_matmul", *names[3:], "zz"]
    assert ("# wide" in source) is bool(trailing)
    for stem in ("linear_cross_entropy", "hybrid_attention"):  # one line holds them no longer
        source = new._with_export(source, stem)
    for how in (("check", "--select", "RUF022"), ("format", "--check", "--line-length", "100")):
        ruff = [sys.executable, "-m", "ruff", *how, "--no-cache", "-"]
        done = subprocess.run(ruff, input=source, text=True, capture_output=True, check=False)
        assert done.returncode == 0, source + done.stdout
