"""Tuned rungs: what `parity tune --emit` writes into a kernel file, and nothing else of it.

A rung is an `if` at the top of `default_config` that answers exactly one question, the arguments of
one measured workload, with the Config that won there; its comment is the row it stands on. Whoever
lifts the kernel file out takes the rungs along. A question that the ladder below already answers
with the winner gets none, so that most files have none at all:

    # tuned: `parity tune softmax --emit` wrote these rungs, each for exactly these arguments
    if (R, N, dtype, which) == (4096, 32768, torch.bfloat16, "fwd"):
        # softmax_4096x32768 fwd: 137.1 us, 143.2 us before (NVIDIA H200, 2026-11-20)
        return Config(block_m=1, block_n=16384, stages=1, warps=32, programs=0)
    # tuned: end
"""

import ast
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEGIN = (
    "    # tuned: `parity tune {stem} --emit` wrote these rungs, each for exactly these arguments"
)
END = "    # tuned: end"
WIDTH = 100
DTYPES = {"triton": "torch", "pallas": "jnp"}  # how a kernel file names a dtype


@dataclass(frozen=True)
class Rung:
    """One question to default_config, its answer, and why: comment lines."""

    of: Mapping[str, Any]  # default_config's arguments by name, a dtype by its name
    config: Mapping[str, int]
    reasons: tuple[str, ...]


def bare(text: str) -> str:
    """A kernel file's text without tuned rungs."""
    lines = text.splitlines(keepends=True)
    marks = [i for i, line in enumerate(lines) if line.startswith("    # tuned: ")]
    if not marks:
        return text
    if len(marks) != 2 or lines[marks[1]].rstrip() != END:
        raise ValueError("tuned rungs: expected one block that ends in '# tuned: end'")
    return "".join(lines[: marks[0]] + lines[marks[1] + 1 :])


def only(text: str, workload: str) -> str:
    """A kernel file's text with the rungs that one workload asks for alone: what its results stand
    on."""
    without = bare(text)
    if without == text:
        return text
    lines = text.splitlines(keepends=True)
    first, last = (i for i, line in enumerate(lines) if line.startswith("    # tuned: "))
    block = "".join(lines[first + 1 : last])
    asked = [
        rung for rung in re.split(r"^(?=    if )", block, flags=re.M) if f"# {workload} " in rung
    ]
    return "".join([*lines[:first], *asked, *lines[last + 1 :]])


def ladder(module: Any) -> Callable[..., Any]:
    """A kernel module's default_config without tuned rungs."""
    text = Path(module.__file__).read_text()
    without = bare(text)
    if without == text:
        return module.default_config
    names = dict(vars(module))
    exec(ast.unparse(_default_config(without)), names)
    return names["default_config"]


def emit(text: str, stem: str, twin: str, rungs: Sequence[Rung]) -> str:
    """The kernel file's text with these rungs in place of those it has.

    Raises ValueError where default_config has other parameters than a rung's question.
    """
    text = bare(text)
    if not rungs:
        return text
    function = _default_config(text)
    parameters = [a.arg for a in function.args.args]
    block = [BEGIN.format(stem=stem)]
    for rung in rungs:
        if list(rung.of) != parameters:
            raise ValueError(
                f"{stem}.{twin}: default_config takes ({', '.join(parameters)}), and the results "
                f"are about ({', '.join(rung.of)}): tune again"
            )
        block += _lines(rung, twin)
    block.append(END)
    lines = text.splitlines(keepends=True)
    end = function.body[0].end_lineno or 0  # the docstring's
    return "".join([*lines[:end], *(line + "\n" for line in block), *lines[end:]])


def _default_config(text: str) -> ast.FunctionDef:
    functions = [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)]
    found = next((f for f in functions if f.name == "default_config"), None)
    if found is None or ast.get_docstring(found) is None:
        raise ValueError("the kernel file has no default_config with a docstring")
    return found


def _lines(rung: Rung, twin: str) -> list[str]:
    values = [
        f"{DTYPES[twin]}.{v}" if name == "dtype" else f'"{v}"' if isinstance(v, str) else repr(v)
        for name, v in rung.of.items()
    ]
    inner = " " * 8
    lines = [f"    if ({', '.join(rung.of)}) == ({', '.join(values)}):"]
    for reason in rung.reasons:
        lines += textwrap.wrap(
            reason, WIDTH, initial_indent=inner + "# ", subsequent_indent=inner + "# "
        )
    fields = ", ".join(f"{n}={v}" for n, v in rung.config.items())
    answer = f"{inner}return Config({fields})"
    if len(answer) <= WIDTH:
        return [*lines, answer]
    return [*lines, f"{inner}return Config(", f"{inner}    {fields}", f"{inner})"]


def of_results(rows: Iterable[Mapping[str, Any]], device: str) -> tuple[list[Rung], list[str]]:
    """(the rungs that finished results ask for, what else there is to say of them).

    A question that two passes ask, with different winners, gets no rung.
    """
    asked: dict[tuple, list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    for row in rows:
        for ask in row["asks"]:
            asked.setdefault(tuple(ask["of"].items()), []).append((row, ask))
    rungs, said = [], []
    for question, answers in asked.items():
        chosen = [(row["winner"] or {}).get("config") or ask["default"] for row, ask in answers]
        if any(c != chosen[0] for c in chosen):
            names = " and ".join(f"{row['workload']} {row['pass']}" for row, _ in answers)
            said.append(f"{names} ask the same and have different winners: no rung for them")
        elif chosen[0] != answers[0][1]["ladder"]:
            reasons = tuple(_reason(row, device) for row, _ in answers)
            rungs.append(Rung(dict(question), chosen[0], reasons))
    return rungs, said


def _reason(row: Mapping[str, Any], device: str) -> str:
    name, when = f"{row['workload']} {row['pass']}", row["when"][:10]
    winner = row["winner"]
    if winner is None:
        return f"{name}: no Config was faster ({device}, {when})"
    us, before = winner["us"]["p50"], winner["default_us"]["p50"]
    return f"{name}: {us:.1f} us, {before:.1f} us before ({device}, {when})"
