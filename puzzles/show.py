"""How a result is shown: a headline, what is known of the failure, three bars, what to do next."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from parity.commands.failing import element, show_map
from puzzles.grade import Result
from puzzles.puzzle import HOLE, Puzzle
from puzzles.verdicts import VERDICTS

if TYPE_CHECKING:
    import rich.console

IMAGE = re.compile(r"!\[([^\]]*)\]\(picture\.svg\)\n\n?")  # Markdown's, its words in group 1
RAN = ("wrong_value", "not_written", "wrong_shape", "wrong_dtype", "no_launch", "no_effect")
_PRINTED = 8  # lines of what the learner's code printed


def result(
    console: "rich.console.Console", puzzle: Puzzle, found: Result, file: str, *, prompt: str = ""
) -> None:
    """A graded solution in at most some twenty lines. prompt: before a command of the shell."""
    how = f"{found.backend}, interpreted"
    console.print(
        f"[bold]{puzzle.id.upper()} {escape(puzzle.title)}[/]   [dim]{how}, seed {found.seed}[/]"
    )
    meaning = VERDICTS[found.verdict]
    if found.ok:
        console.print("[bold green]PASS[/]  every case is right, and the kernel did the work")
    else:
        says = "nothing is filled in yet" if found.unchanged else meaning.says
        console.print(f"[bold red]FAIL[/]  {escape(says)}")
        if not found.unchanged:
            _failure(console, found, file)
    _bars(console, found)
    if found.output.strip():
        _printed(console, found.output)
    if found.ok:
        for c in found.constraints:
            if not c.ok:
                share = found.possible["constraints"] / len(found.constraints)
                used, most = (f"{n:.4g}{'x' * (c.name == 'reads')}" for n in (c.measured, c.limit))
                console.print(f"{share:g} points are still there: {c.name} {used}, {most} allowed")
        console.print(f"next: [bold]{prompt}puzzles next[/]")
        return
    if helps := _helps(found, file):
        console.print(f"help: {escape(helps)}")
    console.print(f"next: [bold]{prompt}puzzles hint {found.puzzle}[/]")
    console.print(
        f"same numbers again: [bold]{prompt}puzzles check {found.puzzle} -b {found.backend} "
        f"--seed {found.seed}[/]",
        soft_wrap=True,
    )


def _helps(found: Result, file: str) -> str:
    """What to do about the verdict."""
    if found.unchanged or (found.untouched and found.verdict in RAN):
        lines = ", ".join(map(str, found.untouched))
        each = "s" * (len(found.untouched) > 1)
        rest = "" if found.unchanged else " Nothing is filled in there."
        return f"Look for `{HOLE.lstrip('# ')}` in {file}, line{each} {lines}.{rest}"
    bad = next((o for o in found.outcomes if not o.ok), None)
    if found.verdict == "raised" and (bad is None or bad.line is None):
        return "Read the message. Which line of your file it is about is not known."
    return VERDICTS[found.verdict].helps


def _failure(console: "rich.console.Console", found: Result, file: str) -> None:
    from rich.table import Table

    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")

    def line(label: str, text: str) -> None:
        grid.add_row(f"  {label}", escape(text))

    bad = next((o for o in found.outcomes if not o.ok), None)
    if bad is None:
        return
    at = f"{file}:{bad.line}" if bad.line else ""
    if at:
        line("where", f"{at}  {bad.code}")
    if bad.detail:
        sizes = f" ({_sizes(bad.sizes)})" if bad.sizes else ""
        place = f"case {bad.case}{sizes}" if bad.sizes else bad.case
        line("what", f"{bad.detail}; {place}" if bad.sizes else bad.detail)
    story = found.story
    told: Mapping[str, Any] = (story.diagnosis if story else None) or {}
    if like := told.get("looks_like") or told.get("because"):
        name = str(told["looks_like"] or "").replace("_", " ")
        words = ": ".join(filter(None, (name, told["because"])))
        line("looks like", words if like else "")
    if story:
        rest = "" if story.complete else "; out of time, smaller ones may fail too"
        line("smallest", f"{_sizes(story.smallest)} fails the same way{rest}")
    if first := told.get("first_wrong"):
        line("first wrong", element(told, first))
        if beneath := ", ".join(filter(None, (first.get("bits"), first.get("given")))):
            line("", beneath)
    if told.get("where") and told.get("elements", 0) > 1:
        line("pattern", told["where"])
    console.print(grid)
    if told.get("map") and story:
        show_map(console, f"case {story.case}", told)


def _sizes(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{letter}={n}" for letter, n in sizes.items())


def _bars(console: "rich.console.Console", found: Result) -> None:
    """Correctness, constraints, speed; what is locked is not lost."""
    right = sum(o.ok for o in found.outcomes if o.sizes)
    tried = len([o for o in found.outcomes if o.sizes])
    cases = f"{right} of {tried} cases" if tried else "nothing was run"
    measured = ", ".join(
        f"{c.name} " + ("not metered" if c.measured is None else f"{c.measured:g}".rstrip("."))
        + f" of {c.limit:g}" + ("" if c.ok else " [red]too many[/]")
        if c.name == "launches" or c.measured is None
        else f"{c.name} {c.measured:.2f}x of {c.limit:g}x" + ("" if c.ok else " [red]too many[/]")
        for c in found.constraints
    )  # fmt: skip
    told = {"correctness": cases, "constraints": measured, "speed": _speed(found)}
    for name, text in told.items():
        possible, got = found.possible[name], found.points[name]
        if not possible:
            continue
        if name == "speed" and (found.speed is None or found.speed.state != "timed"):
            console.print(f"  {name:<12}{'·' * 10}     [dim]{text}[/]")
            continue
        full = round(10 * got / possible)
        blocks = console.encoding.startswith("utf")
        bar = ("█" if blocks else "#") * full + ("░" if blocks else "-") * (10 - full)
        colour = "green" if got == possible else "yellow"
        console.print(f"  {name:<12}[{colour}]{bar}[/] {got:g} of {possible:g}   [dim]{text}[/]")


def _speed(found: Result) -> str:
    speed = found.speed
    if speed is None:
        return "after everything else, on a GPU"
    if speed.state == "locked":
        return f"locked: {speed.detail}; nothing is lost"
    times = (
        f"{speed.us:.1f} us, {speed.low:.2f}x of {speed.baseline} ({speed.baseline_us:.1f} us), "
        f"{speed.roof:.0%} of the roof"
    )
    if speed.state != "timed":
        return f"{escape(speed.detail)}; {times}"
    beyond = [tier for tier in speed.tiers if tier > speed.low]
    after = f"; the next tier is at {beyond[0]:g}x" if beyond else ""
    return f"tier {speed.tier} of {len(speed.tiers)}: {times}{after}"


def _printed(console: "rich.console.Console", output: str) -> None:
    lines = [line for line in output.splitlines() if line.strip()]
    console.print("  it printed:")
    for line in lines[:_PRINTED]:
        console.print(f"    {escape(line[:200])}", overflow="ellipsis", no_wrap=True)
    if len(lines) > _PRINTED:
        console.print(f"    ... and {len(lines) - _PRINTED} more lines")


def statement(console: "rich.console.Console", puzzle: Puzzle) -> None:
    """spec.md as it is written, less the drawing that only a page can show."""
    from rich.text import Text

    for line in IMAGE.sub("", puzzle.statement()).splitlines():
        style = "bold" if line.startswith("#") else ""
        console.print(Text(line.lstrip("# ") if line.startswith("#") else line, style=style),
                      soft_wrap=True)  # fmt: skip
