"""A puzzle as its folder describes it: puzzles/qNN/.

    puzzle.toml           title, points, limits, allowed names, hints
    spec.py               PROBLEM, a parity.spec.Problem: cases, inputs, oracle; and what is exact
    spec.md               the statement, at most 60 lines
    solution_BACKEND.py   a solution; the lines between its markers are the holes of the skeleton
    mutants/NAME.toml     a mistake: an edit of each solution, the verdict it must get, in words

and where speed counts:

    baseline.py           what a solution is raced against, on a GPU
    slow.toml             an edit that makes each solution slow and leaves it right
    speed.json            the tiers by GPU, written by `puzzles author calibrate`

The skeleton is the solution with each marked piece replaced by the comments that open it and, where
Python needs a statement, `pass`: it cannot drift away from what is known to work.
"""

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np

from parity.spec import Problem, Workload

HOME = Path(__file__).resolve().parent
BEGIN, END = "# BEGIN SOLUTION", "# END SOLUTION"
HOLE = "# YOUR CODE HERE"
INSTEAD = "# INSTEAD "


@dataclass(frozen=True)
class Points:
    correctness: int
    constraints: int
    speed: int = 0


@dataclass(frozen=True)
class Limits:
    """What a solution may use. launches and reads are worth points; the rest keeps the grader up.

    reads: bytes read by the kernels over the bytes of the inputs, where that can be metered.
    """

    launches: int
    reads: float
    case_s: float = 10.0  # for one case, in the interpreter
    wall_s: float = 60.0  # for all
    data_gib: float = 3.0


@dataclass(frozen=True)
class Mutant:
    """A mistake on purpose: `verdict` is what the grader must say of it."""

    name: str
    says: str
    verdict: str
    edits: Mapping[str, tuple[str, str]]  # backend: (old text of the solution, new text)

    def source(self, puzzle: "Puzzle", backend: str) -> str:
        """The solution with the mistake in it. Raises ValueError unless it has one place."""
        old, new = self.edits[backend]
        text = puzzle.solution(backend)
        if text.count(old) != 1:
            raise ValueError(
                f"{puzzle.id} {self.name}: the {backend} solution has {text.count(old)} of {old!r}"
            )
        return text.replace(old, new)


@dataclass(frozen=True)
class Puzzle:
    id: str
    version: int
    title: str
    level: int
    backends: tuple[str, ...]
    signature: str
    points: Points
    limits: Limits
    hints: tuple[str, ...]
    allow: Mapping[str, tuple[str, ...]]  # module -> names beyond those that every puzzle may use
    folder: Path
    requires: tuple[str, ...] = ()
    ban: tuple[str, ...] = ()  # beginnings of names that a solution may not use even in a kernel
    glue: tuple[str, ...] = ()  # framework operations around the kernels, as parity's witness has

    @cached_property
    def spec(self) -> ModuleType:
        return _module(self.folder / "spec.py", f"puzzles_{self.id}_spec")

    @property
    def problem(self) -> Problem:
        return self.spec.PROBLEM

    @cached_property
    def baseline(self) -> ModuleType:
        """What a solution is raced against: needs torch."""
        return _module(self.folder / "baseline.py", f"puzzles_{self.id}_baseline")

    @property
    def exact(self) -> tuple[str, ...]:
        """Outputs that are right bit for bit or wrong."""
        return self.spec.EXACT

    def unrounded(
        self,
        case: Workload,
        arrays: Mapping[str, np.ndarray],
        answer: Mapping[str, np.ndarray],
    ) -> Mapping[str, np.ndarray]:
        """Exact outputs before they were rounded to whole numbers, where the spec tells.

        answer: the outputs that are judged, for those that follow from another one.
        """
        tells = getattr(self.spec, "unrounded", None)
        return {} if tells is None else tells(case, answer, **arrays)

    def statement(self) -> str:
        return (self.folder / "spec.md").read_text()

    def solution(self, backend: str) -> str:
        return (self.folder / f"solution_{backend}.py").read_text()

    def skeleton(self, backend: str) -> str:
        return skeleton_of(self.solution(backend))

    def untouched(self, backend: str, source: str) -> list[int]:
        """The lines of the holes that nothing was written into: what stands around them is there
        still. All of them where only comments of the skeleton were changed."""
        skeleton = self.skeleton(backend)
        theirs, lines = _lines(source), _lines(skeleton)
        found = []
        for at, (_, text) in enumerate(lines):
            if text == HOLE:
                around = [text for _, text in lines[at - 1 : at + 2]]
                for here in range(1, len(theirs)):
                    if [text for _, text in theirs[here - 1 : here + 2]] == around:
                        found.append(theirs[here][0])
        return sorted({*found})

    @cached_property
    def mutants(self) -> tuple[Mutant, ...]:
        return tuple(_mutant(path) for path in sorted((self.folder / "mutants").glob("*.toml")))

    @property
    def slow(self) -> Mutant:
        """The solutions, slow: no mistake, and no tier at the top."""
        return _mutant(self.folder / "slow.toml")

    def cases(self, rng: np.random.Generator) -> list[Workload]:
        """The public cases, which never change, and fresh ones around them."""
        return [*self.problem.workloads, *self.spec.fresh(rng)]


def skeleton_of(solution: str) -> str:
    """The solution without its marked pieces.

    Of a piece the comments that stand before its first line of code stay: they say what to do.
    `# INSTEAD statement` among them is what stands there until something better does.
    """
    out: list[str] = []
    inside, indent, code = False, "", False
    instead: list[str] = []
    for line in solution.splitlines():
        stripped = line.strip()
        if stripped == BEGIN:
            inside, code, instead = True, False, []
            indent = line[: len(line) - len(line.lstrip())]
        elif stripped == END:
            inside = False
            out.append(f"{indent}{HOLE}")
            if instead or _needs_statement(out):
                out += instead or [f"{indent}pass"]
        elif inside:
            code = code or not stripped.startswith("#")
            if stripped.startswith(INSTEAD):
                instead.append(f"{indent}{stripped.removeprefix(INSTEAD)}")
            elif not code:
                out.append(line)
        else:
            out.append(line)
    return "\n".join(out) + "\n"


def _needs_statement(lines: list[str]) -> bool:
    """Whether the last block that was opened holds nothing but comments so far."""
    code = next((x for x in reversed(lines) if x.strip() and not x.strip().startswith("#")), "")
    return code.rstrip().endswith((":", '"""')) and not code.startswith('"""')


def _lines(source: str) -> list[tuple[int, str]]:
    """The lines that are not blank, each with its number from 1."""
    numbered = enumerate((line.strip() for line in source.splitlines()), 1)
    return [(number, text) for number, text in numbered if text]


def track() -> tuple[Puzzle, ...]:
    """All puzzles, in order."""
    return tuple(load(path.parent) for path in sorted(HOME.glob("q[0-9][0-9]/puzzle.toml")))


def names() -> list[str]:
    return [path.parent.name for path in sorted(HOME.glob("q[0-9][0-9]/puzzle.toml"))]


def load(folder: Path) -> Puzzle:
    """Reads puzzle.toml. Raises ValueError that names a missing or unknown entry."""
    described = tomllib.loads((folder / "puzzle.toml").read_text())
    try:
        return Puzzle(
            **described
            | {
                "folder": folder,
                "backends": tuple(described["backends"]),
                "requires": tuple(described.get("requires", ())),
                "hints": tuple(described["hints"]),
                "ban": tuple(described.get("ban", ())),
                "glue": tuple(described.get("glue", ())),
                "points": Points(**described["points"]),
                "limits": Limits(**described["limits"]),
                "allow": {k: tuple(v) for k, v in described.get("allow", {}).items()},
            }
        )
    except (KeyError, TypeError) as e:
        raise ValueError(f"{folder.name}/puzzle.toml: {e}") from None


def _mutant(path: Path) -> Mutant:
    described = tomllib.loads(path.read_text())
    edits = {k: (v["old"], v["new"]) for k, v in described.items() if isinstance(v, dict)}
    return Mutant(path.stem, described["says"], described["verdict"], edits)


def _module(path: Path, name: str) -> ModuleType:
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def primes(rng: np.random.Generator, low: int, high: int) -> Iterator[int]:
    """Primes in [low, high) in random order, none twice: sizes that no tile divides."""
    numbers = [n for n in range(max(2, low), high) if all(n % d for d in range(2, int(n**0.5) + 1))]
    yield from (int(n) for n in rng.permutation(numbers))
