"""Twins can be read side by side: same names, same parameters, same stages, in the same order."""

import ast
import re
from pathlib import Path

import pytest

from parity.problems import PROBLEMS

ROOT = Path(__file__).parent.parent
STEMS = [p.stem for p in PROBLEMS]
FUNCTIONS = {p.stem: p.implementations["triton"].rpartition(":")[2] for p in PROBLEMS}
DIFFERENTIABLE = {p.stem for p in PROBLEMS if any("bwd" in w.passes for w in p.workloads)}
TWINS = ("triton_kernels", "pallas_kernels")
STAGES = ["1. which tile", "2. main loop", "3. epilogue", "4. store"]
# What may exist in one language only: how many warps or warpgroups share a tile, clusters, and how
# many programs share a multiprocessor. Triton's kernels keep a row in L1, Pallas' in `stages`.
OWN_CONFIG_FIELDS = {
    "triton_kernels": {"warps", "programs"},
    "pallas_kernels": {"warpgroups", "cluster", "programs"},
    "pallas_kernels/softmax": {"stages"},
    "pallas_kernels/int8_quantize": {"stages"},
    # Triton's next tile waits in registers, Pallas' in `stages`
    "pallas_kernels/linear_scan": {"stages"},
    "pallas_kernels/rglru": {"stages"},
    # Triton's walk over the heads of a group ends early where those are too few programs
    "triton_kernels/decay_attention": {"heads"},
    "triton_kernels/retention": {"heads"},
    "triton_kernels/mamba2_ssd": {"heads"},
    # Pallas swaps the operands always
    "triton_kernels/moe_gemm": {"decode"},
}
# Kernels that one language alone needs, by "package/stem", each with its reason.
OWN_KERNELS: dict[str, set[str]] = {
    # Triton gathers rows by pointers, on their way to shared memory
    "pallas_kernels/moe_gemm": {"moe_gemm_gather_kernel"},
    # Pallas' gradients of gates lie chunk by chunk, as TMA stores them, and come back to tokens
    "pallas_kernels/decay_attention": {
        "decay_attention_grads_kernel",
        "decay_attention_gates_bwd_kernel",
    },
    # one program's registers do not hold all gradients of a chunk
    "triton_kernels/decay_attention": {
        "decay_attention_dq_kernel",
        "decay_attention_dkdv_kernel",
    },
    # XLA makes one fusion of it, where PyTorch's operations are seventeen launches
    "triton_kernels/int4_matmul": {"int4_prepack_kernel"},
}


def tree(package: str, stem: str) -> ast.Module:
    return ast.parse((ROOT / package / f"{stem}.py").read_text())


def functions(module: ast.Module) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}


def signature(f: ast.FunctionDef) -> list[tuple[str, str, str | None]]:
    """(kind, name, default) of every parameter, in order; annotations belong to each framework."""
    a = f.args
    plain = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(plain) - len(a.defaults)) + [ast.unparse(d) for d in a.defaults]
    only = [None if d is None else ast.unparse(d) for d in a.kw_defaults]
    return [("plain", p.arg, d) for p, d in zip(plain, defaults, strict=True)] + [
        ("keyword", p.arg, d) for p, d in zip(a.kwonlyargs, only, strict=True)
    ]


def public(module: ast.Module) -> dict[str, ast.FunctionDef]:
    return {name: f for name, f in functions(module).items() if not name.startswith("_")}


def config_fields(package: str, stem: str) -> list[str]:
    """Of the file's Config, or of that of the stem it imports it from."""
    body = tree(package, stem).body
    for node in body:
        if isinstance(node, ast.ImportFrom) and "Config" in [alias.name for alias in node.names]:
            return config_fields(package, node.module or "")
    (config,) = (n for n in body if isinstance(n, ast.ClassDef) and n.name == "Config")
    return [n.target.id for n in config.body if isinstance(n, ast.AnnAssign)]  # pyright: ignore


def parts(package: str, stem: str) -> list[Path]:
    """The files beside a large stem that hold parts of it: moe_gemm_dw.py."""
    return sorted((ROOT / package).glob(f"{stem}_*.py"))


def kernels(package: str, stem: str) -> dict[str, str]:
    """Source of every kernel of the stem, without the leading underscore, file by file."""
    texts = [f.read_text() for f in (ROOT / package / f"{stem}.py", *parts(package, stem))]
    return {
        name.strip("_"): ast.get_source_segment(text, f) or ""
        for text in texts
        for name, f in functions(ast.parse(text)).items()
        if name.startswith("_") and name.endswith("_kernel")
    }


def stages(source: str) -> list[str]:
    """The stage markers of a kernel (a remark may follow a colon), in order of first appearance."""
    return list(dict.fromkeys(re.findall(r"# --- ([^:\n]+)", source)))


def test_every_problem_has_its_twins_and_every_twin_its_problem():
    names = [sorted(f.name for f in (ROOT / package).glob("[!_]*.py")) for package in TWINS]
    assert names[0] == names[1]
    for package, other in (TWINS, TWINS[::-1]):
        further = [part for stem in STEMS for part in parts(package, stem)]
        files = {f.stem for f in (ROOT / package).glob("[!_]*.py")}
        assert files == {*STEMS, *(part.stem for part in further)}
        for part in further:
            doc = ast.get_docstring(tree(package, part.stem)) or ""
            assert f"Twin: {other}/{part.name}" in doc


def test_the_packages_export_the_same_names():
    exported = [
        ast.literal_eval(node.value)
        for package in TWINS
        for node in ast.parse((ROOT / package / "__init__.py").read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    assert len(exported) == 2 and exported[0] == exported[1]


@pytest.mark.parametrize("stem", STEMS)
def test_twins_have_the_same_signatures(stem: str):
    ours, theirs = (public(tree(package, stem)) for package in TWINS)
    assert list(ours) == list(theirs)  # the same names in the same order
    for name in ours:
        assert signature(ours[name]) == signature(theirs[name]), name


@pytest.mark.parametrize("stem", STEMS)
def test_twins_share_their_config_fields(stem: str):
    shared = []
    for package in TWINS:
        own = OWN_CONFIG_FIELDS[package] | OWN_CONFIG_FIELDS.get(f"{package}/{stem}", set())
        shared.append([f for f in config_fields(package, stem) if f not in own])
    assert shared[0] == shared[1]


@pytest.mark.parametrize("stem", STEMS)
def test_twins_have_the_same_kernels_in_the_same_stages(stem: str):
    ours, theirs = (kernels(package, stem) for package in TWINS)
    shared = []
    for package, found in zip(TWINS, (ours, theirs), strict=True):
        own = OWN_KERNELS.get(f"{package}/{stem}", set())
        shared.append([name for name in found if name not in own])
    assert shared[0] == shared[1]
    for name, source in (*ours.items(), *theirs.items()):
        assert stages(source) == STAGES, name


@pytest.mark.parametrize("package", TWINS)
@pytest.mark.parametrize("stem", STEMS)
def test_a_kernel_file_holds_the_seven_parts_and_nothing_else(package: str, stem: str):
    module = tree(package, stem)
    text = (ROOT / package / f"{stem}.py").read_text()
    doc = ast.get_docstring(module) or ""
    other = next(p for p in TWINS if p != package)
    assert f"Twin: {other}/{stem}.py" in doc and "Sources:" in doc
    named = public(module)
    name = FUNCTIONS[stem]
    passes = {f"{name}_fwd", f"{name}_bwd"} if stem in DIFFERENTIABLE else set()
    assert {"default_config", name, *passes} <= set(named)
    assert all(ast.get_docstring(f) for f in named.values()), "a public function says what it does"
    called = {ast.unparse(n.func) for n in ast.walk(module) if isinstance(n, ast.Call)}
    assert not called & {"print", "os.getenv", "os.environ.get", "input", "open"}
    assert "__main__" not in text and "os.environ" not in text
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)


@pytest.mark.parametrize("package", TWINS)
def test_public_functions_have_no_backdoor(package: str):
    for stem in STEMS:
        for name, f in public(tree(package, stem)).items():
            parameters = {parameter for _, parameter, _ in signature(f)}
            assert not parameters & {"interpret", "device", "debug"}, name
