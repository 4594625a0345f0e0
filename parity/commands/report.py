"""`parity report`: tables and a page from the records and the latest results."""

import sys
from argparse import Namespace
from typing import Any

from parity.commands.shared import (
    ENVIRONMENT,
    FAILED,
    PASS,
    USAGE,
    Stop,
    console_of,
    print_json,
    progress,
)


def run(args: Namespace) -> int:
    from parity import page, report

    if args.check and not args.readme:
        raise Stop(USAGE, "--check goes with --readme")
    if args.html is not None and args.html.is_dir():
        raise Stop(USAGE, f"--html {args.html}: a folder; name a file in it")
    results = report.Results.here()
    for name, line, why in results.refused:
        print(f"parity: {name}:{line} refused: {why}; the good rows are kept", file=sys.stderr)
    said: dict[str, Any] = {"ok": True, "refused": [list(r) for r in results.refused]}
    if args.readme:
        said |= _readme(results, only_check=args.check)
    if args.html is not None:
        with progress(1, "report") as tell:
            tell("drawing")
            try:
                report.replace_text(args.html, page.html(results))
            except OSError as e:
                raise Stop(USAGE, f"--html {args.html}: {e.strerror}") from None
            tell(f"{args.html}", 1)
        said["html"] = str(args.html.resolve())
    if args.json:
        said["records"] = [row for rows in results.records.values() for row in rows.values()]
        said["checks"] = list(results.checks)
        said["kernels"] = list(results.compiles)
        said["coverage"] = [
            {
                "problem": p.stem,
                "workload": w.name,
                "pass": which,
                "dtype": w.dtype,
                "twins": {twin: {"state": c.state, "text": c.text} for twin, c in cells.items()},
            }
            for p, w, which, cells in results.coverage()
        ]
        print_json(said)
        return PASS if said["ok"] else FAILED
    console = console_of()
    if args.readme:
        console.print(said["readme"], markup=False)
    if args.html is not None:
        console.print(f"The report is in {said['html']}", markup=False, soft_wrap=True)
    if args.coverage:
        console.print(report.sentence_of_coverage(results))
        console.print(report.coverage_table(results, console.width))
        console.print(report.COVERAGE_LEGEND, markup=False)
    elif not args.readme and args.html is None:
        _show_report(results)
    return PASS if said["ok"] else FAILED


def _readme(results: Any, *, only_check: bool) -> dict[str, Any]:
    from parity import readme, report

    try:
        text = readme.README.read_text()
        fresh = readme.rendered(text, results)
    except (OSError, ValueError) as e:
        raise Stop(ENVIRONMENT, f"{readme.README}: {e}") from None
    if fresh == text:
        return {"readme": "README.md's table is what the records say."}
    if only_check:
        stale = "README.md's table is stale: `parity report --readme` renders it again."
        return {"ok": False, "readme": stale}
    report.replace_text(readme.README, fresh)
    return {"readme": "README.md's table was rendered again."}


def _show_report(results: Any) -> None:
    from parity import report

    console = console_of()
    if not results.records:
        console.print("No committed records: nothing has been timed on a Hopper GPU yet.")
    for device in results.records:
        lines = list(results.lines(device))
        console.print(f"[bold]{report.escape(device)}[/]: {report.sentence_of_lines(lines)}")
        console.print(report.bench_table(lines, console.width))
    for mode in ("gpu", "cpu"):
        rows = [row for row in results.checks if row["device"] == mode]
        if rows:
            console.print(f"Checked here last: {report.sentence_of_checks(rows, mode)}")
    if results.compiles:
        console.print(f"Compiled here last: {report.sentence_of_compiles(results.compiles)}")
    console.print(report.sentence_of_coverage(results) + " `parity report --coverage` shows them.")
