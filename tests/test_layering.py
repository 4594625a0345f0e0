"""Who may import whom (read off the syntax trees), and what importing the harness costs."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

TORCH, JAX = {"torch", "triton"}, {"jax", "jaxlib"}
FRAMEWORKS = TORCH | JAX
KERNELS = {"triton_kernels", "pallas_kernels"}
ABOVE = {"puzzles", "notebooks", "tests"}

# folder or file -> what it may not import, at the top or inside a function; the longest match rules
FORBIDDEN: dict[str, set[str]] = {
    "triton_kernels": JAX | {"pallas_kernels", "parity", "packing"} | ABOVE,
    "pallas_kernels": TORCH | {"triton_kernels", "parity", "packing"} | ABOVE,
    "parity": FRAMEWORKS | KERNELS | ABOVE,
    "parity/frameworks": ABOVE,
    # What a user would call instead is written in the frameworks, and loaded by name.
    "parity/peers": KERNELS | ABOVE,
    "packing": FRAMEWORKS | KERNELS | {"notebooks", "tests"},
    "puzzles": KERNELS | {"notebooks", "tests"},
}

# The heart: truth and judgement need arrays, and nothing of this project that runs a kernel.
HEART = {"spec", "formats", "judge", "problems"}
HEART_MAY_IMPORT = {"numpy", "ml_dtypes", "array_api_compat", "parity"} | sys.stdlib_module_names


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything the file imports, wherever in it."""
    package = file.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            # `from parity import frameworks` names a module too
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def files(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def rule_for(file: Path) -> set[str]:
    path = file.relative_to(ROOT).as_posix()
    matches = [rule for rule in FORBIDDEN if path == rule or path.startswith(rule + "/")]
    return FORBIDDEN[max(matches, key=len)]


@pytest.mark.parametrize("folder", [rule for rule in FORBIDDEN if "/" not in rule])
def test_imports_point_downwards(folder: str):
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in files(folder)
        for line, name in imports(file)
        if name.split(".")[0] in rule_for(file)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_heart_knows_no_framework():
    heart = [
        f
        for f in files("parity")
        if f.relative_to(ROOT / "parity").parts[0].removesuffix(".py") in HEART
    ]
    wrong = []
    for file in heart:
        for line, name in imports(file):
            top, *rest = name.split(".")
            if top not in HEART_MAY_IMPORT or (top == "parity" and rest[0] not in HEART):
                wrong.append(f"{file.relative_to(ROOT)}:{line} imports {name}")
    assert heart and not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", sorted(KERNELS))
def test_a_kernel_imports_its_own_lib_or_a_stem(folder: str):
    stems = {file.stem for file in files(folder)}
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in files(folder)
        for line, name in imports(file)
        if name.split(".")[0] == folder and not {*name.split(".")[1:]} & stems
    ]
    assert not wrong, "\n".join(wrong)


def test_the_readers_of_syntax_trees_see_every_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "pack").mkdir()
    file = tmp_path / "pack" / "module.py"
    file.write_text(
        "import a.b as c\nfrom . import d\nfrom .e import f\ndef g():\n    from h import i"
    )
    assert list(imports(file)) == [(1, "a.b"), (2, "pack.d"), (3, "pack.e.f"), (5, "h.i")]


def _fresh(code: str) -> str:
    """Runs code in a new process, without this one's CPU mode."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "JAX_PLATFORMS")}
    env["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


LOADED = f"import sys; print(*sorted({FRAMEWORKS!r} & set(sys.modules)))"


@pytest.mark.parametrize(
    "code",
    [
        "import parity, parity.problems, parity.judge",
        "import triton_kernels, pallas_kernels",
        "import parity.cli",
    ],
)
def test_importing_loads_no_framework(code: str):
    assert _fresh(f"{code}; {LOADED}") == ""


def test_the_harness_imports_in_under_a_third_of_a_second():
    # The best of three: the machine that runs the tests is busy with them.
    clock = "import time; began = time.perf_counter(); {}; print(time.perf_counter() - began)"
    assert min(float(_fresh(clock.format("import parity"))) for _ in range(3)) < 0.3


def test_listing_the_problems_is_quick():
    # Processor time, the interpreter's own start included: the machine is busy with the tests.
    code = (
        "import time; from parity.cli import main; assert main(['list']) == 0; "
        "print(); print(time.process_time())"
    )
    assert min(float(_fresh(code).split()[-1]) for _ in range(3)) < 0.6
