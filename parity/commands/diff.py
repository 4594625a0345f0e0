"""`parity diff`: compares two record files."""

import sys
from argparse import Namespace

from parity.commands.shared import FAILED, PASS, USAGE, Stop, console_of, nearest, print_json


def run(args: Namespace) -> int:
    from parity import record, report

    files = []
    for path in (args.old, args.new):
        if not path.is_file():
            beside = [p.name for p in path.parent.glob("*.jsonl")] if path.parent.is_dir() else []
            near = nearest(path.name, beside) if beside else ""
            raise Stop(USAGE, f"no file {str(path)!r}{near if near.startswith(';') else ''}")
        found = record.read(path)
        for refused in found.refused:
            print(f"parity: {path}:{refused.line} refused: {refused.why}", file=sys.stderr)
        files.append(found)
    changes = report.changes(*files)
    verdicts = [change.verdict for change in changes]
    counts = {word: verdicts.count(word) for word in dict.fromkeys(verdicts)}
    bad = counts.get("red", 0) + counts.get("SLOWER", 0)
    failed = args.fail_on == "slower" and bad > 0
    if args.json:
        print_json({"ok": not failed, "counts": counts, "changes": [c.to_json() for c in changes]})
    else:
        console = console_of()
        said = ", ".join(f"{n} {word.lower()}" for word, n in counts.items())
        both = ", ".join(sorted({r["device"] for f in files for r in f.rows}))
        console.print(f"{len(changes)} results compared: {said or 'none'} ({both}).")
        if changes:
            console.print(report.change_table(changes, console.width))
    return FAILED if failed else PASS
