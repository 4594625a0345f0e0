"""What `parity check` adds to a failure: the smallest case, the first wrong element, a map.

The search runs in a child process of its own, one job at a time, so that a candidate that crashes
or hangs costs that candidate.
"""

import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parity.commands.shared import Pair, needs_room, progress

if TYPE_CHECKING:
    import rich.console

MOST = 3  # failures that are shrunk: whoever mends these runs the check again
HANGS_AFTER = 10.0  # seconds without an answer of a process that is up; smaller cases take less
HANG_SECONDS = 120.0  # for the whole search among candidates that may hang
# What a failure is called whose reason is no word of everyday language
MEANING: Mapping[str, str] = {
    "zeros": "zero where it must not be, or not zero where it must",
    "nonfinite": "NaN or infinite where the truth is not",
    "norm": "the error is too large",
    "tile": "the error of a tile is too large",
    "peak": "an element is far off",
    "bias": "rounded to one side, as if truncated",
    "probe": "whole numbers do not come out exactly",
    "race": "a data race",
    "timeout": "it hangs",
    "crash": "it crashes",
    "twins": "the twins differ",
    "cached": "it remembers an earlier answer",
    "mutated": "it writes to an input",
    "nondeterministic": "two runs differ",
    "witness": "something else did the work",
}


def chosen(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The failures to shrink: one for each kernel and reason, the forward before the backward.

    Not those that no other inputs can change, nor those where the model fails too.
    A wrong forward hands wrong residuals to its backward, so that the backward waits its turn.
    """
    from parity.check import LOADING
    from parity.shrink import signature

    def depends_on_its_inputs(row: Mapping[str, Any]) -> bool:
        loading = any(verdict["output"] == LOADING for verdict in row["verdicts"])
        unfair = (row.get("diagnosis") or {}).get("unfair")
        return not (row["ok"] or loading or unfair or row["detail"].startswith("not run"))

    bad = [row for row in rows if depends_on_its_inputs(row)]
    order = sorted(bad, key=lambda row: row["which"] != "fwd")
    first = {(row["problem"], row["impl"]): row["which"] for row in reversed(order)}
    kinds: dict[tuple, Mapping[str, Any]] = {}
    for row in bad:
        if row["which"] == first[row["problem"], row["impl"]]:
            impl = "" if row["reason"] == "twins" else row["impl"]
            kinds.setdefault((row["problem"], impl, signature(row)), row)
    return list(kinds.values())


def shrunk(
    rows: Sequence[Mapping[str, Any]],
    selection: Sequence[Pair],
    args: Namespace,
    *,
    mode: str,
    impls: Mapping[str, str] | None,
    timeout: float,
    log: Path,
) -> list[dict[str, Any]]:
    """The smallest failing case of each kind of failure, as JSON."""
    failures = chosen(rows)[:MOST]
    stories = []
    with progress(len(failures), "shrink") as tell:
        for done, row in enumerate(failures, 1):
            name = f"{row['problem']} {row['which']} {row['impl']}"

            def said(phrase: str, name: str = name, done: int | None = None) -> None:
                tell(f"{name}: {phrase}", done)

            p, w = next(
                (p, w)
                for p, w in selection
                if (p.stem, w.name) == (row["problem"], row["workload"].split()[0])
            )
            targets = impls or p.implementations
            story = _story(row, p, w, targets, args, mode, timeout, log, said)
            stories.append(story)
            said(f"{story['smallest']} after {story['tries']} tries", done=done)
    return stories


def _story(
    row: Mapping[str, Any],
    p: Any,
    w: Any,
    targets: Mapping[str, str],
    args: Namespace,
    mode: str,
    timeout: float,
    log: Path,
    said: Any,
) -> dict[str, Any]:
    from parity import shrink
    from parity import workers as crew

    kind, hangs = shrink.signature(row), row["reason"] == "timeout"
    start = shrink.Case(
        {**w.sizes, **(args.sizes or {})},
        tuple(n for n in args.without or () if n in shrink.optional(p, w)),
    )
    if kind != "twins":
        targets = {row["impl"]: targets[row["impl"]]}
    limit = min(timeout, HANGS_AFTER if hangs else 2 * HANGS_AFTER + 4 * row["seconds"])
    answers: dict[tuple, Mapping[str, Any]] = {start.key: row}
    tries = 0

    with crew.one(mode, limit, log) as ask:

        def fails(case: shrink.Case) -> bool:
            nonlocal tries
            try:
                shrink.resized(p, w, case.sizes, case.without)
            except ValueError:  # the problem has no such case
                return False
            tries += 1
            said(f"try {tries}, {case}")
            which = (row["which"],)
            job = crew.Job(p.stem, w.name, which, w.dtype, targets, args.seed,
                           needs_room(w), dict(case.sizes), case.without)  # fmt: skip
            (found,) = (r for r in ask(job, lambda phrase: None) if r["impl"] == row["impl"])
            answers[case.key] = found
            unfair = (found.get("diagnosis") or {}).get("unfair")
            return shrink.signature(found) == kind and not unfair

        found = shrink.shrink(
            start,
            shrink.optional(p, w),
            fails,
            seconds=HANG_SECONDS if hangs else shrink.SECONDS,
        )
        again = found.case != start or (found.complete and fails(start))
    more = ["--timeout", f"{limit:g}"] if hangs else []
    if args.device != "auto":
        more += ["--device", args.device]
    return {
        "problem": p.stem,
        "workload": w.name,
        "which": row["which"],
        "impl": row["impl"],
        "reason": row["reason"],
        "from": dict(start.sizes),
        "smallest": str(found.case),
        "sizes": dict(found.case.sizes),
        "without": list(found.case.without),
        "dropped": [name for name in found.case.without if name not in start.without],
        "tries": tries,
        "seconds": found.seconds,
        "complete": found.complete,
        "again": again,
        "check": answers[found.case.key],
        "replay": shrink.replay(
            p, w, found.case, row["which"],
            twin=None if kind == "twins" else row["impl"],
            impl=args.impl, seed=args.seed, more=more,
        ),
    }  # fmt: skip


# How it is shown.


def show(
    console: "rich.console.Console",
    rows: Sequence[Mapping[str, Any]],
    stories: Sequence[Mapping[str, Any]],
) -> None:
    """Each kind of failure with what is known of it; without stories nothing was shrunk."""
    failures = chosen(rows)
    for why, unfair in _unfair(rows).items():
        console.print(f"\nNo fault of {', '.join(unfair)}: {why}.", markup=False)
    for row, story in zip_longest(failures[:MOST], stories):
        _show(console, row, story)
    if len(failures) > MOST:
        console.print(f"\n{len(failures) - MOST} more kinds of failure: mend these first.")


def _unfair(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in rows:
        if why := (row.get("diagnosis") or {}).get("unfair"):
            name = f"{row['problem']} {row['workload']} {row['which']} {row['impl']}"
            found.setdefault(why, []).append(name)
    return found


def _show(
    console: "rich.console.Console", row: Mapping[str, Any], story: Mapping[str, Any] | None
) -> None:
    """The smallest case first, then what is wrong in the workload that failed."""
    from rich.markup import escape
    from rich.table import Table

    said = Table.grid(padding=(0, 1))

    def line(label: str, text: str) -> None:
        said.add_row(f"  {label}", escape(text))

    meaning = MEANING.get(row["reason"], row["reason"])
    who = f"{row['problem']} {row['which']}, {row['impl']}"
    console.print(f"\n[bold red]{escape(who)}[/]: {escape(meaning)}")
    whole = row.get("diagnosis") or {}
    least = story["check"].get("diagnosis") or {} if story else {}
    like = next((d for d in (whole, least) if d.get("looks_like") or d.get("because")), {})
    if like:
        name = (like["looks_like"] or "").replace("_", " ")
        there = "" if like is whole else " (in the smallest case)"
        line("looks like", ": ".join(filter(None, (name, like["because"]))) + there)
    if story:
        line("smallest", _smallest(story))
    nearest = least if story else whole
    if first := nearest.get("first_wrong"):
        line("first wrong", element(nearest, first))
    elif detail := (story["check"] if story else row)["detail"]:
        line("there", detail)
    if whole.get("where"):
        count = f"{whole['wrong']} of {whole['elements']} " if whole["wrong"] else ""
        line("where", f"{whole['where']} ({count}in {row['workload']})")
    console.print(said)
    if whole.get("map"):
        show_map(console, row["workload"], whole)
    if story:
        console.print(f"  [bold]{escape(story['replay'])}[/]", soft_wrap=True)


def _smallest(story: Mapping[str, Any]) -> str:
    sizes = story["smallest"]
    if story["dropped"]:
        sizes += f" without {', '.join(story['dropped'])}"
    before = ", ".join(f"{k}={n}" for k, n in story["from"].items())
    tries = "1 try" if story["tries"] == 1 else f"{story['tries']} tries"
    spent = f"{tries}, {story['seconds']:.0f} s"
    if not story["again"]:
        return f"unknown: {before} did not fail when it ran again, alone ({spent})"
    rest = "" if story["complete"] else "; out of time, smaller ones may fail too"
    if story["sizes"] == story["from"]:
        return f"{sizes}: no smaller case of {story['workload']} fails this way ({spent}{rest})"
    return f"{sizes} ({story['workload']} has {before}; {spent}{rest})"


def element(diagnosis: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    """The first wrong element in one line."""
    got, expected = (str(x) if isinstance(x, str) else f"{float(x):.6g}"
                     for x in (first["got"], first["expected"]))  # fmt: skip
    looks = f" ({first['looks']})" if first["looks"] else ""
    text = f"{diagnosis['output']}{first['index']} is {got}, expected {expected}{looks}"
    if not first["block_known"]:
        return text
    block = " x ".join(map(str, first["block"]))
    text += f"; tile {tuple(first['tile'])} of {block}".replace(",)", ")")
    return text + ("" if first["warpgroup"] is None else f", warpgroup {first['warpgroup']}")


# From this share of the truth on: the mark, the mark where a terminal has no blocks, the legend
SHADES: tuple[tuple[float, str, str, str], ...] = (
    (1.0, "█", "@", "100 % or more"),
    (0.1, "▓", "#", "over 10 %"),
    (0.01, "▒", "+", "over 1 %"),
    (0.0, "░", "-", "too much"),
)
RIGHT, NOT_FINITE = ("·", "."), "N"


def show_map(console: "rich.console.Console", name: str, diagnosis: Mapping[str, Any]) -> None:
    """Where an answer is wrong: one mark a tile, or a part of one."""
    from rich.text import Text

    found = diagnosis["map"]
    cell, tile, error = found["cell"], found["tile"], found["relative_error"]
    if len(error) * len(error[0]) <= 1:
        return
    blocks = console.encoding.startswith("utf")
    right = RIGHT[0 if blocks else 1]
    shades = [(share, block if blocks else plain, words) for share, block, plain, words in SHADES]

    def mark(e: float | None) -> str:
        if e is None:
            return NOT_FINITE
        if e <= found["allowed"]:
            return right
        return next(mark for share, mark, _ in shades if e >= share)

    lines = [[mark(e) for e in row] for row in error]
    seen = {c for row in lines for c in row}
    legend = [
        (right, "right"),
        *((mark, words) for _, mark, words in reversed(shades)),
        (NOT_FINITE, "not finite"),
    ]
    rows, columns = found["shape"]
    console.print(f"  error map of {diagnosis['output']} in {name}: {_cells(found)}", markup=False)
    edge = tile[1] // cell[1] if 1 < tile[1] // cell[1] < len(error[0]) else 0
    pad = len(str(rows - 1))
    for i, row in enumerate(lines):
        marked = [c + ("│" if blocks else "|") * (edge and (j + 1) % edge == 0)
                  for j, c in enumerate(row)]  # fmt: skip
        text = Text(f"    row {i * cell[0]:>{pad}} ")
        for c in "".join(marked):
            text.append(c, style="dim" if c in (right, "│", "|") else "red")
        console.print(text)
    meanings = "  ".join(f"{c} {words}" for c, words in legend if c in seen)
    console.print(f"    {'':>{pad + 4}} columns 0 to {columns - 1}   {meanings}", markup=False)


def _cells(found: Mapping[str, Any]) -> str:
    """What one character stands for."""
    cell, tile = found["cell"], found["tile"]
    tiles = f"tiles of {tile[0]} x {tile[1]}"
    if not found["tile_known"]:
        size = "one element" if math.prod(cell) == 1 else f"{cell[0]} x {cell[1]} elements"
        return f"a mark is {size}, tiles unknown"
    if cell == tile:
        return f"each mark is a tile of {tile[0]} x {tile[1]}"
    many = [math.ceil(c / t) for c, t in zip(cell, tile, strict=True)]
    if cell[0] >= tile[0] and cell[1] >= tile[1]:
        return f"each mark stands for {many[0]} x {many[1]} {tiles}"
    return f"each mark is {cell[0]} x {cell[1]} elements, in {tiles}"
