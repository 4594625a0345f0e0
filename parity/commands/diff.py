"""`parity diff`: what became faster or slower between two runs."""

import sys
from argparse import Namespace
from pathlib import Path

from parity import diff
from parity.commands.shared import FAILED, PASS, USAGE, Stop, console_of, nearest, print_json
from parity.diff import Change, Run


def run(args: Namespace) -> int:
    old, new = sides(args.old, args.new)
    for line in (*old.refused, *new.refused):
        print(f"parity: {line}", file=sys.stderr)
    for side in (old, new):
        if not side.rows:
            raise Stop(USAGE, f"{side.name} holds no result: nothing was compared")
    if not set(old.devices) & set(new.devices):
        of = ", ".join(old.devices), ", ".join(new.devices)
        raise Stop(
            USAGE,
            f"{old.name} was measured on {of[0]}, {new.name} on {of[1]}: times of different "
            "devices say nothing about a change",
        )
    found = diff.changes(old, new)
    told = [change for change in found if change.verdict in diff.TOLD]
    if not told:
        raise Stop(USAGE, nothing_told(old, new, diff.counts(found)))
    ours = [change for change in told if not change.peer]
    peers = [change for change in told if change.peer]
    failed = args.fail_on == "slower" and any(change.verdict in diff.BAD for change in ours)
    if args.json:
        print_json(
            {
                "ok": not failed,
                "old": old.name,
                "new": new.name,
                "counts": diff.counts(ours),
                "peers": diff.counts(peers),
                "versions": diff.versions(old, new),
                "changes": [change.to_json() for change in found],
            }
        )
    else:
        show(old, new, found, everything=args.all)
    return FAILED if failed else PASS


def sides(first: str | None, second: str | None) -> tuple[Run, Run]:
    """OLD and NEW. One word: a path is NEW, beside the committed records; a revision is OLD, beside
    the records as they lie here. No word: the committed records and those that lie here."""
    if first and second:
        if Path(first).exists() and Path(second).exists() and Path(first).samefile(second):
            raise Stop(USAGE, f"OLD and NEW are the same: {first}")
        return side(first), side(second)
    if not first or not Path(first).exists():
        return (side(first) if first else diff.committed()), diff.from_here()
    return diff.committed(), side(first)


def side(word: str) -> Run:
    path = Path(word)
    if path.exists():
        try:
            return diff.from_path(path)
        except OSError as e:
            raise Stop(USAGE, f"{word} cannot be read: {e.strerror}") from None
    if found := diff.from_revision(word):
        return found
    beside = [p.name for p in path.parent.glob("*.jsonl")] if path.parent.is_dir() else []
    near = nearest(path.name, beside) if beside else ""
    near = near if near.startswith(";") else ""
    raise Stop(USAGE, f"no file, folder or git revision {word!r}{near}")


def nothing_told(old: Run, new: Run, counts: dict[str, int]) -> str:
    if "unchanged" in counts:
        return f"every result of {new.name} is a row of {old.name}: nothing was measured since"
    return f"no result is in both {old.name} and {new.name}: nothing was compared"


def show(old: Run, new: Run, found: list[Change], *, everything: bool) -> None:
    console = console_of()
    told = [change for change in found if change.verdict in diff.TOLD]
    both = f" ({', '.join(dict.fromkeys(c.device for c in told))}): {old.name}, then {new.name}."
    for who, some in (
        ("", [change for change in told if not change.peer]),
        ("Of the peers, whose code is not ours: ", [change for change in told if change.peer]),
    ):
        if some:
            said = ", ".join(f"{n} {word.lower()}" for word, n in diff.counts(some).items())
            console.print(f"{who}{said} of {len(some)} results{both}", markup=False)
            both = "."  # which runs, said once
    if moved := diff.versions(old, new):
        console.print(f"What else changed: {', '.join(moved)}.", markup=False)
    alone = diff.counts(change for change in found if change.verdict not in diff.TOLD)
    words = {
        "untimed": f"checked but not timed in {new.name}",
        "added": f"only in {new.name}",
        "removed": f"only in {old.name}",
        "unchanged": "not measured again",
    }
    if alone:
        said = "; ".join(f"{n} {words[word]}" for word, n in alone.items())
        console.print(f"Not compared: {said}.", markup=False)
    shown = [c for c in found if everything or c.verdict in (*diff.BAD, "FASTER")]
    if shown:
        console.print(diff.change_table(shown, console.width))
    if len(shown) < len(found):
        console.print(f"{len(found) - len(shown)} more with --all.")
