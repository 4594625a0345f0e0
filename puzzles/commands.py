"""What each command does. Every one takes the parsed arguments and returns an exit code."""

import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path

from parity.commands.shared import (
    FAILED,
    PASS,
    USAGE,
    Stop,
    broken_is_environment,
    console_of,
    nearest,
    print_json,
    runnable,
)
from parity.commands.shared import progress as progress_bar
from puzzles import show
from puzzles.grade import Result, grade, timed
from puzzles.progress import Progress, folder_of
from puzzles.puzzle import HOME, Puzzle, load, names, track


def puzzle_named(word: str) -> Puzzle:
    """q1, Q01 and q01 are the same. Raises Stop with the nearest right name."""
    name = word.lower()
    if name[:1] == "q" and name[1:].isdecimal():
        name = f"q{int(name[1:]):02d}"
    if name not in names():
        raise Stop(USAGE, f"no puzzle {word!r}{nearest(name, names())}")
    return load(HOME / name)


def why_not_timed(backend: str) -> str:
    """Why a solution cannot be timed on this machine, "" if it can."""
    from parity import doctor

    machine = doctor.machine()
    if not machine.gpu:
        return "it needs a GPU"
    return "" if backend in machine.compiled() else "Pallas needs a Hopper GPU"


def _progress(args: Namespace) -> Progress:
    found = Progress.read(folder_of(args.folder))
    if found.broken is not None:
        console_of(stderr=True).print(
            f"puzzles: the progress file could not be read and is kept as {found.broken}"
        )
    return found


def backend_of(asked: str | None, puzzle: Puzzle, folder: Path, *, file: bool = True) -> str:
    """What was asked for; else the language of the one file there is; else what can run here."""
    if asked:
        if asked not in puzzle.backends:
            raise Stop(
                USAGE, f"{puzzle.id} is not offered in {asked!r}{nearest(asked, puzzle.backends)}"
            )
        return asked
    there = [b for b in puzzle.backends if file_of(folder, puzzle, b).is_file()]
    if len(there) == 1:
        return there[0]
    if len(there) > 1 and file:
        raise Stop(USAGE, f"{puzzle.id}: which one, {' or '.join(there)} (-b)?")
    here = runnable(puzzle.backends, "cpu")
    return next(b for b in puzzle.backends if not here[b])


def file_of(folder: Path, puzzle: Puzzle, backend: str) -> Path:
    return folder / f"{puzzle.id}_{backend}.py"


def list_(args: Namespace) -> int:
    folder = folder_of(args.folder)
    done = _progress(args)
    rows = []
    for p in track():
        states = {b: done.state(p, b) for b in p.backends}
        best = max((sum(done.of(p.id, b).get("best", {}).values()) for b in p.backends), default=0)
        rows.append(
            {"id": p.id, "title": p.title, "level": p.level, "states": states, "best": best,
             "within_reach": _within_reach(p),
             "all": p.points.correctness + p.points.constraints + p.points.speed,
             "hints": done.hints(p.id)}
        )  # fmt: skip
    if args.json:
        print_json({"folder": str(folder), "puzzles": rows})
        return PASS
    from rich.table import Table

    console = console_of()
    got, reach = sum(r["best"] for r in rows), sum(r["within_reach"] for r in rows)
    solved = sum("solved" in r["states"].values() for r in rows)
    console.print(
        f"{solved} of {len(rows)} puzzles solved, {got:g} of {reach} points within reach on this "
        "machine."
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("", "level", "puzzle", "triton", "pallas", "points"):
        table.add_column(name, justify="right" if name in ("level", "points") else "left")
    for r in rows:
        marks = [
            {"solved": "[green]solved[/]", "solved before": "[yellow]again[/]"}.get(s, s or "-")
            for s in (r["states"].get("triton", "no"), r["states"].get("pallas", "no"))
        ]
        table.add_row(r["id"], str(r["level"]), r["title"], *marks,
                      f"{r['best']:g}/{r['within_reach']}")  # fmt: skip
    console.print(table)
    return PASS


def _within_reach(puzzle: Puzzle) -> int:
    """Points that can be had here: those for speed where a language can be timed."""
    points = puzzle.points
    timed_here = points.speed and not all(why_not_timed(b) for b in puzzle.backends)
    return points.correctness + points.constraints + (points.speed if timed_here else 0)


def next_(args: Namespace) -> int:
    folder = folder_of(args.folder)
    done = _progress(args)
    open_ = [p for p in track() if "solved" not in (done.state(p, b) for b in p.backends)]
    if args.puzzle:
        open_ = [puzzle_named(args.puzzle)]
    elif args.backend:
        open_ = [
            p
            for p in track()
            if args.backend in p.backends and done.state(p, args.backend) != "solved"
        ]
    if not open_:
        console_of().print("Every puzzle is solved. The other language is next: `puzzles next -b`.")
        return PASS
    puzzle = open_[0]
    backend = backend_of(args.backend, puzzle, folder, file=False)
    file = _skeleton(folder, puzzle, backend, done)
    if args.json:
        print_json({"id": puzzle.id, "backend": backend, "file": str(file)})
        return PASS
    console = console_of()
    show.statement(console, puzzle)
    console.print(f"\nfill in  [bold]{short(file)}[/]")
    console.print(f"check    [bold]puzzles check {puzzle.id}[/]")
    other = [b for b in puzzle.backends if b != backend]
    if other:
        console.print(f"[dim]in the other language: puzzles next {puzzle.id} -b {other[0]}[/]")
    return PASS


def _skeleton(folder: Path, puzzle: Puzzle, backend: str, done: Progress) -> Path:
    file = file_of(folder, puzzle, backend)
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(puzzle.skeleton(backend))
        done.write()
    return file


def short(file: Path) -> str:
    try:
        return str(file.relative_to(Path.cwd()))
    except ValueError:
        return str(file)


def check(args: Namespace) -> int:
    puzzle = puzzle_named(args.puzzle)
    folder = folder_of(args.folder)
    backend = backend_of(args.backend, puzzle, folder)
    file = args.file or file_of(folder, puzzle, backend)
    if not file.is_file():
        begin = f"`puzzles next {puzzle.id} -b {backend}` begins it"
        raise Stop(USAGE, f"no file {short(file)}: {'look at the name' if args.file else begin}")
    found = graded(args, puzzle, backend, file)
    if args.json:
        print_json(found.to_json())
    else:
        show.result(console_of(), puzzle, found, short(file))
    return PASS if found.ok else FAILED


def graded(args: Namespace, puzzle: Puzzle, backend: str, file: Path) -> Result:
    """Grades a file and keeps what came of it."""
    runnable((backend,), "cpu")
    done = _progress(args)
    cases = len(puzzle.problem.workloads) + 8
    with broken_is_environment(), progress_bar(cases, f"check {puzzle.id}") as tell:
        source = file.read_text(errors="replace")
        found = grade(puzzle, backend, source, seed=getattr(args, "seed", None) or "", tell=tell)
        found = timed(puzzle, backend, source, found, why_not=why_not_timed(backend), tell=tell)
    done.graded(found.to_json())
    done.write()
    return found


def hint(args: Namespace) -> int:
    puzzle = puzzle_named(args.puzzle)
    done = _progress(args)
    had, all_ = done.hints(puzzle.id), len(puzzle.hints)
    count = min(had + 1, all_)
    done.hint_taken(puzzle.id, count)
    done.write()
    if args.json:
        print_json({"id": puzzle.id, "hints": puzzle.hints[:count], "of": all_})
        return PASS
    console = console_of()
    for number, text in enumerate(puzzle.hints[:count], 1):
        console.print(f"hint {number} of {all_}: {text}", markup=False)
    if had == all_:
        console.print("There are no more.")
    return PASS


def show_(args: Namespace) -> int:
    puzzle = puzzle_named(args.puzzle)
    done = _progress(args)
    backend = backend_of(args.backend, puzzle, done.folder, file=False)
    solved = done.state(puzzle, backend).startswith("solved")
    if args.json:
        print_json(
            {"id": puzzle.id, "statement": puzzle.statement(), "backend": backend,
             "solution": puzzle.solution(backend) if solved else None}
        )  # fmt: skip
        return PASS
    console = console_of()
    show.statement(console, puzzle)
    if solved:
        console.print(f"\n[bold]One solution in {backend}[/]")
        from rich.syntax import Syntax

        console.print(Syntax(puzzle.solution(backend), "python", background_color="default"))
    else:
        console.print(f"\nThe {backend} solution is shown here once you have one of your own.")
    return PASS


def reset(args: Namespace) -> int:
    puzzle = puzzle_named(args.puzzle)
    folder = folder_of(args.folder)
    backend = backend_of(args.backend, puzzle, folder)
    file = file_of(folder, puzzle, backend)
    before = put_aside(file)
    kept = f"; what you had is {short(before)}" if before else ""
    _skeleton(folder, puzzle, backend, _progress(args))
    if args.json:
        print_json({"id": puzzle.id, "backend": backend, "file": str(file)})
    else:
        console_of().print(f"{short(file)} is the skeleton again{kept}. Progress is kept.")
    return PASS


def put_aside(file: Path) -> Path | None:
    """Renames a file that is there to one that is not; None where there was none."""
    if not file.exists():
        return None
    when = time.strftime("%Y%m%d-%H%M%S")
    before = file.with_name(f"{file.stem}.{when}.py.old")
    for again in count(2):  # twice within a second
        if not before.exists():
            break
        before = file.with_name(f"{file.stem}.{when}-{again}.py.old")
    return file.rename(before)


def watch(args: Namespace) -> int:
    """Grades the file that was saved, and no other, until it is interrupted."""
    folder = folder_of(args.folder)
    wanted = [puzzle_named(args.puzzle)] if args.puzzle else list(track())
    files = {
        file_of(folder, p, b): (p, b)
        for p in wanted
        for b in p.backends
        if args.backend in (None, b)
    }
    console = console_of()
    console.print(f"watching {short(folder)}; Ctrl-C ends it")
    seen = {file: _saved(file) for file in files}
    while True:
        for file, (puzzle, backend) in files.items():
            if (now := _saved(file)) == seen[file]:
                continue
            seen[file] = now
            if now:
                found = graded(args, puzzle, backend, file)
                show.result(console, puzzle, found, short(file))
        time.sleep(0.3)


def _saved(file: Path) -> float:
    return file.stat().st_mtime if file.exists() else 0.0


def report(args: Namespace) -> int:
    done = _progress(args)
    if args.json:
        print_json({"schema": 1, "folder": str(done.folder), "puzzles": done.puzzles})
        return PASS
    console = console_of()
    if not done.puzzles:
        console.print("Nothing yet: `puzzles next` is the beginning.")
        return PASS
    for p in track():
        for b in p.backends:
            if known := done.of(p.id, b):
                best = ", ".join(f"{k} {v:g}" for k, v in known.get("best", {}).items())
                state = done.state(p, b)
                console.print(
                    f"{p.id} {b}: {state}, {known['attempts']} attempts, "
                    f"{done.hints(p.id)} hints; best: {best}",
                    markup=False,
                )
    return PASS


def doctor(args: Namespace) -> int:
    from parity.commands import doctor as parity_doctor

    return parity_doctor.run(args)


def author(args: Namespace) -> int:
    from puzzles import author as authors

    return authors.run(args)


COMMANDS: Mapping[str, Callable[[Namespace], int]] = {
    "list": list_,
    "next": next_,
    "check": check,
    "hint": hint,
    "show": show_,
    "reset": reset,
    "watch": watch,
    "report": report,
    "doctor": doctor,
    "author": author,
}
