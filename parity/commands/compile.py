"""`parity compile`: both twins to sm_90a machine code, no GPU needed."""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from parity.commands.shared import (
    ENVIRONMENT,
    FAILED,
    PASS,
    TWINS,
    Pair,
    Stop,
    console_of,
    implementations,
    print_json,
    progress,
    runnable,
    selected,
)


def run(args: Namespace) -> int:
    rows, skipped = gated(
        selected(args, ("model",)),
        twins=(args.twin,) if args.twin else TWINS,
        impls=implementations(args),
        sass=True if args.sass else None,
    )
    ok = not any(row["status"] == "fail" for row in rows)
    if args.json:
        print_json({"ok": ok, "kernels": rows, "not_run": skipped})
    else:
        show_compiles(rows, skipped)
    return PASS if ok else FAILED


def gated(
    selection: Sequence[Pair],
    *,
    twins: Sequence[str] = TWINS,
    impls: dict[str, str] | None = None,
    sass: bool | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Runs the compile gate: (rows, what was not run and why)."""
    from parity import report
    from parity.compile import compile_gate

    able = runnable(tuple(impls or twins), "cpu")
    chosen = [twin for twin in (impls or twins) if not able[twin]]
    skipped = [{"twin": twin, "why": why} for twin, why in able.items() if why]
    problems = list({p.stem: p for p, _ in selection}.values())
    names = {w.name for _, w in selection}  # words of -w mean the same in every problem
    with progress(len(selection) * len(chosen), "compile") as tell:
        try:
            found = compile_gate(
                problems,
                workloads=names,
                twins=chosen,
                implementations=impls,
                sass=sass,
                progress=lambda done, _, what: tell(what, done),
            )
        except FileNotFoundError as e:
            raise Stop(ENVIRONMENT, str(e)) from None
    rows = [row.to_json() for row in found]
    if impls is None:
        report.keep_compiles(rows)
    return rows, skipped


def show_compiles(rows: list[dict], skipped: list[dict], *, only_failures: bool = False) -> None:
    from parity import report

    console = console_of()
    console.print(report.sentence_of_compiles(rows))
    bad = [row for row in rows if row["status"] == "fail"]
    shown = bad if only_failures else rows
    if shown:
        console.print(report.compile_table(shown, console.width))
    for row in bad:
        place = f"{row['problem']} {row['workload']} {row['pass']} {row['twin']} {row['kernel']}"
        console.print(f"{place}: {row['message']}", markup=False)
    for item in skipped:
        console.print(f"Not compiled: {item['twin']} ({item['why']}).", markup=False)
