"""What a solution may name, read off its syntax tree before anything of it runs.

An allow-list: modules that a kernel needs, and of the frameworks' functions those that make and
name arrays. Mathematics on whole arrays is what the puzzle asks to write as a kernel; inside a
kernel's own function everything of tl, plgpu, pl, lax and jnp may be used.

What a name stands for is followed through imports and assignments; what cannot be followed
(getattr with a computed name, say) is not allowed. On the learner's own machine no such rule is
a wall: it keeps people from fooling themselves.
"""

import ast
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MODULES = (
    "torch", "triton", "triton.language", "jax", "jax.numpy", "jax.lax",
    "jax.experimental.pallas", "jax.experimental.pallas.mosaic_gpu", "math", "functools",
    "dataclasses", "typing",
)  # fmt: skip
_WHOLE = ("triton", "math", "functools", "dataclasses", "typing", "jax.experimental")

# Of a framework's functions on whole arrays
TORCH = frozenset(
    (
        "empty empty_like zeros zeros_like full Tensor dtype device Size int8 uint8 int16 int32 "
        "int64 float16 bfloat16 float32 float64 float8_e4m3fn float8_e5m2 bool"
    ).split()
)
JAX = frozenset(("ShapeDtypeStruct", "jit", "Array", "lax", "numpy", "experimental"))
JNP = frozenset(
    (
        "pad int8 uint8 int16 uint16 int32 uint32 int64 float16 bfloat16 float32 float8_e4m3fn "
        "float8_e5m2 bool_ ndarray dtype shape reshape ndim"
    ).split()
)

FORBIDDEN = frozenset(
    (
        "exec eval compile open input breakpoint globals locals vars setattr delattr __import__ "
        "memoryview"
    ).split()
)
_METHODS = (
    "matmul mm bmm softmax sort argsort topk amax amin max min sum mean abs round clamp clip div "
    "mul add sub quantize numpy tolist item storage untyped_storage data_ptr set_"
).split()


@dataclass(frozen=True)
class Broken:
    """A rule that the source breaks."""

    line: int
    sentence: str


def broken(
    source: str, allow: Mapping[str, tuple[str, ...]], ban: tuple[str, ...] = ()
) -> list[Broken]:
    """Every rule that this source breaks, in the order of its lines.

    allow: names beyond the lists above, by module. ban: what even a kernel may not name, because
    the puzzle is to write it. Raises SyntaxError.
    """
    tree = ast.parse(source)
    found = [*_Walk(tree, allow).found(), *_banned(tree, ban)]
    return sorted(found, key=lambda b: b.line)


def _banned(tree: ast.Module, ban: tuple[str, ...]) -> Iterator[Broken]:
    """Attributes, imports, and dtypes given as a string, that begin with a banned word."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name) | ast.alias(name=name):
                pass
            case ast.Constant(value=str(name)):
                pass
            case _:
                continue
        if ban and name.startswith(ban):
            yield Broken(node.lineno, f"{name} is what this puzzle asks you to write")


class _Walk:
    def __init__(self, tree: ast.Module, allow: Mapping[str, tuple[str, ...]]) -> None:
        self.tree, self.allow = tree, allow
        self.names: dict[str, str] = {}  # local name -> dotted name it stands for
        self.kernels = _kernels(tree)

    def found(self) -> Iterator[Broken]:
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                yield from self._imported(node)
        yield from self._visit(self.tree, inside=False)

    def _imported(self, node: ast.Import | ast.ImportFrom) -> Iterator[Broken]:
        for alias in node.names:
            if isinstance(node, ast.Import):
                full = alias.name
                self.names[alias.asname or full.split(".")[0]] = (
                    full if alias.asname else full.split(".")[0]
                )
                known = full in MODULES
            else:
                full = f"{node.module}.{alias.name}"
                self.names[alias.asname or alias.name] = full
                known = node.module in MODULES or full in MODULES
                known = known or node.module in ("jax.experimental", "triton.language")
                if known and full not in MODULES and (why := self._not_of(full, inside=False)):
                    yield Broken(node.lineno, why)
            if alias.name == "*" or (isinstance(node, ast.ImportFrom) and node.level):
                known = False
            if not known:
                may = ", ".join(MODULES)
                yield Broken(node.lineno, f"imports {full}; a solution may import {may}")

    def _visit(self, node: ast.AST, inside: bool) -> Iterator[Broken]:
        inside = inside or node in self.kernels
        for child in ast.iter_child_nodes(node):
            yield from self._one(child, inside)
            yield from self._visit(child, inside)

    def _one(self, node: ast.AST, inside: bool) -> Iterator[Broken]:
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Name):
            if node.id in FORBIDDEN:
                yield Broken(line, f"{node.id} is not for a solution")
            elif node.id in ("getattr", "type"):
                yield Broken(line, f"{node.id}: name the attribute itself, so that it can be read")
            elif isinstance(node.ctx, ast.Store) and node.id in self.names:
                yield Broken(line, f"{node.id} is an import: it cannot be assigned")
        elif isinstance(node, ast.Attribute):
            dotted = self._dotted(node)
            if node.attr.startswith("__"):
                yield Broken(line, f"{node.attr} reaches behind Python's back")
            elif isinstance(node.ctx, ast.Store) and dotted is not None:
                yield Broken(line, f"{dotted} is not yours to replace")
            elif dotted is not None:
                if why := self._not_of(dotted, inside):
                    yield Broken(line, why)
            elif not inside and node.attr in _METHODS:
                why = f".{node.attr} on a whole array: that is what the kernel is for"
                if node.attr not in self.allow.get("methods", ()):
                    yield Broken(line, why)
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult) and not inside:
            yield Broken(line, "@ on whole arrays: that is what the kernel is for")
        elif isinstance(node, (ast.Try, ast.TryStar)):
            yield Broken(line, "try: a solution that fails says so")
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            yield Broken(line, "a solution keeps nothing between calls")
        elif isinstance(node, (ast.AsyncFunctionDef, ast.Await)):
            yield Broken(line, "async: a solution returns when it is done")

    def _dotted(self, node: ast.AST) -> str | None:
        """The full name that an attribute stands for, if it starts at an import."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute) and (base := self._dotted(node.value)):
            return f"{base}.{node.attr}"
        return None

    def _not_of(self, dotted: str, inside: bool) -> str:
        """Why this name of a framework may not be used here; "" if it may."""
        for module, names in (
            ("jax.numpy", JNP), ("jax.lax", frozenset(("axis_index",))),
            ("torch", TORCH), ("jax", JAX),
        ):  # fmt: skip
            if dotted == module or not dotted.startswith(module + "."):
                continue
            if dotted.startswith("jax.experimental.pallas"):
                return ""
            name = dotted.removeprefix(module + ".").split(".")[0]
            if f"{module}.{name}" in MODULES or name in names:
                return ""
            if name in self.allow.get(module, ()):
                return ""
            if inside and module in ("jax.numpy", "jax.lax"):
                return ""
            if inside and module == "jax":
                return "" if name in ("nn", "named_scope") else f"{dotted} inside a kernel"
            if near := difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.8):
                return f"{dotted} is not for a solution; did you mean {near[0]}?"
            return (
                f"{dotted} computes on whole arrays, or reaches beyond them: a kernel has to do it"
            )
        return ""


def _kernels(tree: ast.Module) -> set[Any]:
    """Functions that run on the device: decorated with jit, handed to kernel or pallas_call, or
    called by no others."""
    handed: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            name = node.func.id if isinstance(node.func, ast.Name) else name
            if name in ("kernel", "pallas_call") and node.args:
                handed |= {n.id for n in ast.walk(node.args[0]) if isinstance(n, ast.Name)}
    found: set[Any] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            marks = [ast.unparse(d) for d in node.decorator_list]
            if node.name in handed or any(m.startswith("triton.jit") for m in marks):
                found.add(node)
            elif any(m.startswith("plgpu.kernel") for m in marks):
                found.add(node)
    helpers = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n not in found]
    for node in reversed(helpers):  # callers stand below what they call
        users = {top for top in tree.body if top is not node and node.name in _named(top)}
        if node.name != "solve" and users <= found:
            found.add(node)
    return found


def _named(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
