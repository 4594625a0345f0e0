"""The bootstrap without installing: a stand-in for Python writes down what it was asked for."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
MINOR = f"3.{sys.version_info.minor}"

pytestmark = pytest.mark.skipif(os.name == "nt", reason="a POSIX shell builds the environments")

# Answers as the real interpreter does, except that installing and making environments is recorded.
STAND_IN = """#!/bin/sh
case "$*" in
    "-m venv --clear "*)
        echo "venv $4" >>"$LOG"
        rm -rf "$4" && mkdir -p "$4/bin" && cp "$0" "$4/bin/python"
        echo "VIRTUAL_ENV=$PWD/$4" >"$4/bin/activate" ;;
    "-m pip install "*) shift 3; echo "pip $*" >>"$LOG" ;;
    -V) echo "Python ${{VERSION:-{version}}}" ;;
    *) exec "{python}" "$@" ;;
esac
"""
BROKEN = "#!/bin/sh\necho 'command not found' >&2\nexit 127\n"  # as pyenv's shims answer


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Checkout:
    """A checkout in a path with a space, with its own PATH, home and log."""

    def __init__(self, root: Path):
        self.root = root / "a check out"
        self.root.mkdir()
        for name in ("Makefile", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root)
        shutil.copytree(ROOT / "constraints", self.root / "constraints")
        self.bin = root / "tools here"
        self.home = root / "home"
        self.home.mkdir()
        self.log = root / "log"
        tools = "sh make cat cksum cut dirname env grep head mkdir printf rm cp sort".split()
        self.bin.mkdir()
        for tool in tools:
            (self.bin / tool).symlink_to(shutil.which(tool) or "/nonexistent")
        self.stand_in = STAND_IN.format(python=sys.executable, version=MINOR)

    def python(self, name: str, text: str | None = None) -> None:
        script(self.bin / name, text or self.stand_in)

    def run(self, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
        fixed = {"PATH": str(self.bin), "HOME": str(self.home), "LOG": str(self.log)}
        return subprocess.run(
            command, cwd=self.root, env=fixed | env, capture_output=True, text=True
        )

    def took(self) -> list[str]:
        """What was installed since the last call."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    if any(shutil.which(tool) is None for tool in ("make", "cksum")):
        pytest.skip("needs make")
    return Checkout(tmp_path)


def test_the_second_run_installs_nothing(checkout: Checkout):
    checkout.python(f"python{MINOR}")
    first = checkout.run("make", "venv")
    assert first.returncode == 0, first.stderr
    made, installed = checkout.took()
    assert made == "venv .venv"
    assert "--constraint constraints/verified.txt" in installed
    assert "--editable .[dev]" in installed
    second = checkout.run("make", "venv")
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert checkout.took() == []
    assert list(checkout.home.iterdir()) == []


def test_what_an_environment_depends_on_brings_it_up_to_date(checkout: Checkout):
    checkout.python(f"python{MINOR}")
    checkout.run("make", "venv")
    checkout.took()
    for name in ("pyproject.toml", "constraints/verified.txt"):
        with (checkout.root / name).open("a") as file:
            file.write("\n# changed\n")
        checkout.run("make", "venv")
        (line,) = checkout.took()  # the environment is kept
        assert line.startswith("pip")
    checkout.run("make", "venv", VERSION="3.12.99")
    assert len(checkout.took()) == 1
    moved = checkout.root.rename(checkout.root.with_name("moved there"))
    checkout.root = moved
    checkout.run("make", "venv", VERSION="3.12.99")
    assert [line.split()[0] for line in checkout.took()] == ["venv", "pip"]  # cannot be moved


def test_a_failed_install_is_tried_again(checkout: Checkout):
    fails = checkout.stand_in.replace('echo "pip $*" >>"$LOG"', "exit 1")
    checkout.python(f"python{MINOR}", fails)
    assert checkout.run("make", "venv").returncode != 0
    assert checkout.took() == ["venv .venv"]
    checkout.python(f"python{MINOR}")
    shutil.copy(checkout.bin / f"python{MINOR}", checkout.root / ".venv" / "bin" / "python")
    assert checkout.run("make", "venv").returncode == 0
    assert [line.split()[0] for line in checkout.took()] == ["pip"]


def test_more_extras_keep_what_was_installed_for_fewer(checkout: Checkout):
    checkout.python(f"python{MINOR}")
    venv = ("sh", "constraints/venv.sh", "checkout", ".venv", "verified.txt")
    for extras in ("dev", "dev,notebooks"):
        checkout.run(*venv, extras)
    assert [line.split()[0] for line in checkout.took()] == ["venv", "pip", "pip"]
    for extras in ("dev", "dev,notebooks"):
        checkout.run(*venv, extras)
    assert checkout.took() == []


def test_a_gpu_gets_jax_its_plugin(checkout: Checkout):
    checkout.python(f"python{MINOR}")
    script(checkout.bin / "nvidia-smi", "#!/bin/sh\necho 'GPU 0: NVIDIA H200'\n")
    checkout.run("make", "venv")
    assert ".[dev,cuda]" in checkout.took()[1]
    script(checkout.bin / "nvidia-smi", "#!/bin/sh\nexit 9\n")  # a driver without a device
    checkout.run("make", "venv")
    assert ".[dev] " in checkout.took()[0] + " "


def test_packages_come_alone(checkout: Checkout):
    checkout.python(f"python{MINOR}")
    command = ("sh", "constraints/venv.sh", "packages", ".venv-x", "verified.txt", "one", "two")
    assert checkout.run(*command).returncode == 0
    _, installed = checkout.took()
    assert installed.endswith("--no-deps one two")


def test_a_shim_that_only_has_the_name_is_passed_over_for_pyenvs_version(checkout: Checkout):
    for name in ("python3.12", "python3.13", "python3", "python"):
        checkout.python(name, BROKEN)
    pyenv = checkout.home / ".pyenv"
    for patch, text in (("2", BROKEN), ("9", checkout.stand_in), ("10", checkout.stand_in)):
        script(pyenv / "versions" / f"{MINOR}.{patch}" / "bin" / "python", text)
    found = checkout.run("sh", "constraints/venv.sh", "python")
    assert found.stdout.strip() == str(pyenv / "versions" / f"{MINOR}.10" / "bin" / "python")


def test_a_named_interpreter_is_taken_or_refused_never_replaced(checkout: Checkout):
    checkout.python(f"python{MINOR}")
    checkout.python("mine")
    found = checkout.run("sh", "constraints/venv.sh", "python", PYTHON="mine")
    assert found.stdout.strip() == "mine"
    checkout.python("mine", BROKEN)
    refused = checkout.run("make", "venv", PYTHON="mine")
    assert refused.returncode != 0 and "PYTHON=mine is not" in refused.stderr
    assert checkout.took() == []


def test_no_python_is_said_in_one_sentence(checkout: Checkout):
    checkout.python("python3", BROKEN)
    missing = checkout.run("sh", "constraints/venv.sh", "python")
    assert missing.returncode == 3 and missing.stdout == ""
    (line,) = missing.stderr.splitlines()
    assert line.startswith("No Python >= 3.12") and "PYTHON=" in line


# What the files say


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "constraints" / name).read_text().splitlines()
    pinned = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(package): version for package, version in pinned}


def test_every_dependency_is_pinned_within_its_bounds():
    extras = project()["optional-dependencies"]
    wanted = [Requirement(text) for text in sum(extras.values(), project()["dependencies"])]
    verified, newest = pins("verified.txt"), pins("newest.txt")
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        assert requirement.specifier.contains(verified[name]), requirement
        if name in newest:
            assert requirement.specifier.contains(newest[name]), requirement


def test_the_scripts_exist():
    for target in project()["scripts"].values():
        module, _, function = target.partition(":")
        assert callable(getattr(import_module(module), function))


def test_readme_has_a_place_for_the_records():
    text = (ROOT / "README.md").read_text()
    assert re.search(r"<!-- parity:records -->.*<!-- /parity:records -->", text, re.DOTALL)
    assert text.count("parity:records -->") == 2


def test_the_shell_scripts_are_sound():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    for shell, file in (("bash", ".ci/run"), ("sh", "constraints/venv.sh")):
        if shutil.which(shell):
            subprocess.run([shell, "-n", str(ROOT / file)], check=True)


def test_no_file_names_a_machine_or_a_registry():
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs git")
    if listed.returncode:
        pytest.skip("not a git checkout")
    foreign = re.compile(
        "|".join(["/wo" + "rk/", "/ro" + "ot/", "py" + "pi.org", "pythonho" + "sted"])
    )
    found = []
    for name in listed.stdout.splitlines():
        file = ROOT / name
        if file.is_file() and (hit := foreign.search(file.read_text(errors="replace"))):
            found.append(f"{name}: {hit[0]}")
    assert not found, "\n".join(found)
