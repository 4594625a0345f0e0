"""The gates that a puzzle passes before a learner meets it: `puzzles author check|mutants|new`, and
the speed that it asks for, measured on this GPU: `puzzles author calibrate`.

statement   at most 60 lines of at most 80 columns, eight numbers and a picture, drawn in text for
            a terminal and by puzzles.pictures for a page; hints
skeleton    obeys the rules, can be imported, and fails
solution    passes, all points, from a cold start within 15 s
mutants     three or more in each language, and each fails with the verdict it names
slow        where speed counts: slow on purpose, and right
"""

import secrets
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from parity.commands.shared import (
    FAILED,
    PASS,
    USAGE,
    Stop,
    broken_is_environment,
    console_of,
    needs_hopper,
    print_json,
    progress,
    runnable,
)
from puzzles.grade import Result, grade
from puzzles.process import Child
from puzzles.puzzle import HOLE, HOME, Mutant, Puzzle, track
from puzzles.show import IMAGE
from puzzles.speed import Raced, keep, tiers_of

LINES, COLUMNS = 60, 80
PICTURE_BYTES = 150_000
COLD_SECONDS = 15.0
MUTANTS, HINTS = 3, 3
NOT_RUN = ("syntax_error", "forbidden", "import_error", "no_entry_point")
SEED = "0" * 7 + "1"  # of the gates' fresh cases


@dataclass(frozen=True)
class Gate:
    puzzle: str
    backend: str
    name: str
    ok: bool
    detail: str
    seconds: float = 0.0


def statement_gates(puzzle: Puzzle) -> Iterator[Gate]:
    """What can be read off the folder."""
    lines = puzzle.statement().splitlines()
    wide = max((len(line) for line in lines), default=0)
    sections = [line.removeprefix("## ") for line in lines if line.startswith("## ")]

    def gate(name: str, ok: bool, detail: str) -> Gate:
        return Gate(puzzle.id, "", name, ok, detail)

    yield gate("length", len(lines) <= LINES, f"{len(lines)} of {LINES} lines")
    yield gate("width", wide <= COLUMNS, f"{wide} of {COLUMNS} columns")
    yield gate("sections", {"Eight numbers", "The picture"} <= {*sections}, ", ".join(sections))
    drawn = puzzle.folder / "picture.svg"
    size = drawn.stat().st_size if drawn.is_file() else 0
    described = IMAGE.search(puzzle.statement())
    yield gate(
        "picture", 0 < size <= PICTURE_BYTES and described is not None and len(described[1]) > 40,
        f"picture.svg {size} of {PICTURE_BYTES} bytes, shown and described in spec.md: "
        f"{described is not None}",
    )  # fmt: skip
    yield gate("hints", len(puzzle.hints) >= HINTS, f"{len(puzzle.hints)} hints")
    sizes = [case.sizes for case in puzzle.cases(np.random.default_rng(int(SEED, 16)))]
    alike = [s for s in sizes if len(s) > 1 and len({*s.values()}) < len(s)]
    yield gate("sizes", not alike, f"{len(sizes)} cases, alike: {alike or None}")
    for backend in puzzle.backends:
        count = sum(backend in mutant.edits for mutant in puzzle.mutants)
        yield Gate(puzzle.id, backend, "mutants", count >= MUTANTS, f"{count} mutants")
        holes = puzzle.skeleton(backend).count(HOLE)
        yield Gate(puzzle.id, backend, "holes", holes > 0, f"{holes} holes")


def solution_gate(puzzle: Puzzle, backend: str) -> Gate:
    """The solution from a cold start."""
    found = grade(puzzle, backend, puzzle.solution(backend), seed=SEED)
    full = found.points["correctness"] + found.points["constraints"]
    whole = puzzle.points.correctness + puzzle.points.constraints
    detail = f"{found.verdict} {found.detail}".strip() + f", {full:g} of {whole} points"
    ok = found.ok and full == whole and found.seconds < COLD_SECONDS
    return Gate(puzzle.id, backend, "solution", ok, detail, found.seconds)


def skeleton_gate(puzzle: Puzzle, backend: str, child: Child | None = None) -> Gate:
    found = _graded(puzzle, backend, puzzle.skeleton(backend), child)
    ok = not found.ok and found.verdict not in NOT_RUN
    return Gate(puzzle.id, backend, "skeleton", ok, found.verdict, found.seconds)


def mutant_gate(puzzle: Puzzle, backend: str, mutant: Mutant, child: Child | None = None) -> Gate:
    found = _graded(puzzle, backend, mutant.source(puzzle, backend), child)
    detail = f"{found.verdict}, expected {mutant.verdict}"
    ok = found.verdict == mutant.verdict
    return Gate(puzzle.id, backend, f"mutant {mutant.name}", ok, detail, found.seconds)


def slow_gate(puzzle: Puzzle, backend: str, child: Child | None = None) -> Gate:
    """What is slow on purpose is right all the same."""
    found = _graded(puzzle, backend, puzzle.slow.source(puzzle, backend), child)
    return Gate(puzzle.id, backend, "slow", found.ok, found.verdict, found.seconds)


def _graded(puzzle: Puzzle, backend: str, source: str, child: Child | None) -> Result:
    return grade(puzzle, backend, source, seed=SEED, explain=False, hasty=True, child=child)


def gates(puzzle: Puzzle, backend: str, *, only_mutants: bool = False) -> Iterator[Gate]:
    """All gates of a puzzle in one language; what need not start cold shares a process."""
    if not only_mutants:
        yield solution_gate(puzzle, backend)
    with Child(backend, puzzle.limits) as child:
        if not only_mutants:
            yield skeleton_gate(puzzle, backend, child)
        for mutant in puzzle.mutants:
            if backend in mutant.edits:
                yield mutant_gate(puzzle, backend, mutant, child)
        if puzzle.points.speed:
            yield slow_gate(puzzle, backend, child)


# The command.


def run(args: Namespace) -> int:
    from puzzles.commands import puzzle_named

    if args.action == "new":
        return _new(args)
    chosen = [puzzle_named(word) for word in args.puzzles] or list(track())
    if args.action == "calibrate":
        return _calibrate(args, [p for p in chosen if p.points.speed])
    pairs = [(p, b) for p in chosen for b in p.backends if args.backend in (None, b)]
    runnable(sorted({b for _, b in pairs}), "cpu")
    found = [] if args.action == "mutants" else [g for p in chosen for g in statement_gates(p)]
    with broken_is_environment(), progress(len(pairs), "author") as tell:
        for done, (puzzle, backend) in enumerate(pairs, 1):
            for gate in gates(puzzle, backend, only_mutants=args.action == "mutants"):
                found.append(gate)
                tell(f"{puzzle.id} {backend} {gate.name}")
            tell(f"{puzzle.id} {backend}", done)
    bad = [gate for gate in found if not gate.ok]
    if args.json:
        print_json({"ok": not bad, "gates": [asdict(gate) for gate in found]})
        return FAILED if bad else PASS
    from rich.markup import escape
    from rich.table import Table

    console = console_of()
    console.print(f"{len(found) - len(bad)} of {len(found)} gates are open.")
    table = Table.grid(padding=(0, 2))
    for gate in bad if args.action == "check" else found:
        mark = "[green]ok[/]" if gate.ok else "[red]no[/]"
        table.add_row(mark, gate.puzzle, gate.backend, gate.name, escape(gate.detail))
    console.print(table)
    return FAILED if bad else PASS


# Speed.


def calibrated(puzzle: Puzzle, origin: Mapping[str, Any]) -> dict[str, Any]:
    """Races the solutions, and slow ones, on this GPU and writes the puzzle's speed.json.

    origin: when, and from which commit. Returns what was written of this GPU.

    Raises parity.commands.shared.Stop if an answer was wrong, the machine is too noisy, or the
    tiers would not tell a solution from a slow one.
    """
    solves = {b: (b, puzzle.solution(b)) for b in puzzle.backends}
    solves |= {f"slow_{b}": (b, puzzle.slow.source(puzzle, b)) for b in puzzle.slow.edits}
    with Child(puzzle.backends[0], puzzle.limits, gpu=True) as child:
        answer = child.race(puzzle.id, solves, secrets.randbits(32))
    if not answer["ok"]:
        raise Stop(FAILED, f"{puzzle.id}: {answer['detail']}")
    raced = Raced(**answer["raced"])
    try:
        tiers = {backend: tiers_of(raced, backend) for backend in puzzle.backends}
    except ValueError as e:
        raise Stop(FAILED, f"{puzzle.id} {e}") from None
    for name in solves:
        backend = name.removeprefix("slow_")
        speed = raced.speed(name, tiers[backend])
        if speed.state != "timed":
            raise Stop(FAILED, f"{puzzle.id} {name}: {speed.state}, {speed.detail}")
        if name != backend and speed.tier == len(speed.tiers):
            raise Stop(FAILED, f"{puzzle.id} {name} reaches the top tier, {speed.tiers[-1]:g}x")
    return keep(puzzle.folder, puzzle.version, raced, origin)


def _calibrate(args: Namespace, chosen: list[Puzzle]) -> int:
    from datetime import UTC, datetime

    from parity import record

    needs_hopper()
    origin = {"commit": record.commit(), "when": datetime.now(UTC).isoformat(timespec="seconds")}
    with broken_is_environment(), progress(len(chosen), "calibrate") as tell:
        rows = {}
        for done, puzzle in enumerate(chosen, 1):
            rows[puzzle.id] = calibrated(puzzle, origin)
            tell(puzzle.id, done)
    if args.json:
        print_json({"ok": True, "puzzles": rows})
        return PASS
    console = console_of()
    for name, row in rows.items():
        for backend, tiers in row["tiers"].items():
            reached = row["measured"][backend]["low"]
            asked = ", ".join(f"{tier:g}x" for tier in tiers)
            console.print(f"{name} {backend}: {reached:g}x of {row['baseline']}; tiers {asked}")
    return PASS


def _new(args: Namespace) -> int:
    """A folder that is honestly unfinished: the first puzzle under another name."""
    import re
    import shutil

    if len(args.puzzles) != 1 or not re.fullmatch(r"q\d\d", args.puzzles[0]):
        raise Stop(USAGE, "author new takes one name like q42")
    name, like = args.puzzles[0], "q01"
    folder = HOME / name
    if folder.exists():
        raise Stop(USAGE, f"{name} is there already")
    shutil.copytree(HOME / like, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in folder.rglob("*.*"):
        _rename(path, like, name)
    console_of().print(
        f"{name} is a copy of {like}, made {time.strftime('%Y-%m-%d')}: write its statement, "
        f"spec, solutions and mutants, then `puzzles author check {name}`."
    )
    return PASS


def _rename(path: Path, old: str, new: str) -> None:
    text = path.read_text().replace(old, new)
    path.write_text(text.replace(old.upper(), new.upper()))
