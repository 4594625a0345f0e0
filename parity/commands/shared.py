"""What the commands share: exit codes, what was asked, what can run here, how it is shown."""

import contextlib
import difflib
import importlib.util
import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import rich.console

    import parity.spec

PASS, FAILED, USAGE, ENVIRONMENT, INTERRUPTED = 0, 1, 2, 3, 130
TWINS = ("triton", "pallas")
ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "report" / "index.html"

Pair = tuple["parity.spec.Problem", "parity.spec.Workload"]


class Stop(Exception):
    """Ends the command with one sentence on stderr and an exit code."""

    def __init__(self, code: int, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


# What was asked.


def nearest(word: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else f" (there are: {', '.join(choices)})"


def problems_of(stems: Sequence[str]) -> list["parity.spec.Problem"]:
    from parity.problems import PROBLEMS, problem

    try:
        return [problem(stem) for stem in dict.fromkeys(stems)] if stems else list(PROBLEMS)
    except KeyError as e:
        raise Stop(USAGE, e.args[0]) from None


def needs_room(w: "parity.spec.Workload") -> bool:
    """Whether a workload wants the device for itself: frameworks keep the memory they once had."""
    return not {"huge", "large"}.isdisjoint(w.tags)


def selected(args: Namespace, default: Sequence[str]) -> list[Pair]:
    """The workloads that the words of -w mean, in the order of the problems.

    A word is a tag, or else a name: where a workload is named like a tag, the tag is meant.
    STEM/NAME is exactly one workload.
    """
    problems = problems_of(args.stems)
    everything = [(p, w) for p in problems for w in p.workloads]
    tags = dict.fromkeys(("all", *(tag for _, w in everything for tag in w.tags)))
    wanted: set[tuple[str, str]] = set()
    for word in args.workload or default:
        tag = word in tags
        found = {
            (p.stem, w.name)
            for p, w in everything
            if word in (("all", *w.tags) if tag else (w.name, f"{p.stem}/{w.name}"))
        }
        if not found and args.workload:
            names = [f"{p.stem}/{w.name}" if "/" in word else w.name for p, w in everything]
            near = nearest(word, [*tags, *dict.fromkeys(names)])
            near = near if near.startswith(";") else " (`parity list` shows them)"
            where = ", ".join(p.stem for p in problems)
            raise Stop(USAGE, f"{where} has no workload {word!r}{near}")
        wanted |= found
    return [(p, w) for p, w in everything if (p.stem, w.name) in wanted]


def implementations(args: Namespace) -> dict[str, str] | None:
    """What --impl and --as ask for: {twin: target}, or None for the twins of each problem."""
    if not args.impl:
        if args.impl_as:
            raise Stop(USAGE, "--as goes with --impl FILE.py:function")
        return None
    if len(args.stems) != 1:
        raise Stop(USAGE, "--impl needs exactly one STEM to be checked against")
    place, _, name = args.impl.rpartition(":")
    if not place or not name.isidentifier():
        raise Stop(USAGE, f"--impl takes FILE.py:function, not {args.impl!r}")
    twin = args.impl_as or args.twin
    if twin is None:
        raise Stop(USAGE, "--impl needs --as triton or --as pallas")
    if args.twin not in (None, twin):
        raise Stop(USAGE, f"--twin {args.twin} contradicts --as {twin}")
    if not place.endswith(".py"):
        return {twin: args.impl}
    path = Path(place)
    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        near = nearest(path.name, beside) if beside else ""
        raise Stop(USAGE, f"no file {place!r}{near if near.startswith(';') else ''}")
    return {twin: f"{path.resolve()}:{name}"}


# What can run here.


def mode_of(device: str) -> str:
    """ "cpu" for the interpreters or "gpu" for compiled kernels."""
    from parity import doctor

    machine = doctor.machine()
    if device == "gpu" and not machine.compiled():
        why = machine.problem or machine.sentence()
        raise Stop(ENVIRONMENT, f"--device gpu: {why} (`parity check --device cpu` works here)")
    return "cpu" if device == "cpu" or not machine.compiled() else "gpu"


def runnable(twins: Sequence[str], mode: str) -> dict[str, str]:
    """{twin: why it cannot run here}, "" for one that can."""
    from parity import doctor

    needs = {"triton": ("torch", "triton"), "pallas": ("torch", "jax")}
    why = dict.fromkeys(twins, "")
    for twin in twins:
        missing = [name for name in needs[twin] if importlib.util.find_spec(name) is None]
        if missing:
            why[twin] = f"{' and '.join(missing)} not installed"
        elif mode == "gpu" and twin not in doctor.machine().compiled():
            why[twin] = "the Pallas twins need a Hopper GPU (--device cpu interprets them)"
    if all(why.values()):
        reasons = "; ".join(f"{twin}: {reason}" for twin, reason in why.items())
        raise Stop(ENVIRONMENT, f"no twin can run here ({reasons}); `parity doctor` says more")
    return why


def needs_hopper() -> None:
    from parity import doctor

    machine = doctor.machine()
    if not machine.hopper:
        here = machine.gpu.name if machine.gpu else machine.problem
        raise Stop(ENVIRONMENT, f"timing needs a Hopper GPU, and here is none: {here}")


@contextlib.contextmanager
def broken_is_environment() -> Iterator[None]:
    from parity.workers import Broken

    try:
        yield
    except Broken as e:
        raise Stop(ENVIRONMENT, f"no check can run here: {e} (`parity doctor` says more)") from None


# What is shown.


def console_of(*, stderr: bool = False) -> "rich.console.Console":
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    wide = None if stream.isatty() or "COLUMNS" in os.environ else 120
    return Console(stderr=stderr, highlight=False, width=wide, soft_wrap=False)


def print_json(value: Any) -> None:
    from parity.workers import finite

    print(json.dumps(finite(value), default=str))


@contextlib.contextmanager
def progress(total: int, what: str) -> Iterator[Callable[..., None]]:
    """A bar on stderr; where stderr is no terminal, one plain line per finished step.

    Yields tell(phrase, done=None): `done` steps are finished, `phrase` is what happens now.
    """
    if not sys.stderr.isatty():
        last = 0

        def plain(phrase: str, done: int | None = None) -> None:
            nonlocal last
            if done is not None and done > last:
                last = done
                print(f"{what} {done}/{total}: {phrase}", file=sys.stderr, flush=True)

        yield plain
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn(what),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console_of(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total or None)

        def tell(phrase: str, done: int | None = None) -> None:
            bar.update(task, description=phrase, completed=done)

        yield tell
