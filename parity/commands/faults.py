"""`parity faults`: plants faults and sees that the judge catches each."""

from argparse import Namespace
from dataclasses import asdict
from typing import Any

from parity.commands.shared import (
    FAILED,
    PASS,
    TWINS,
    console_of,
    mode_of,
    print_json,
    progress,
    runnable,
    selected,
)


def run(args: Namespace) -> int:
    """Wrong answers on each workload; kernels that cheat on the problem's first, which is plain."""
    pairs = selected(args, ("ci",))
    mode = mode_of(args.device)
    wanted = (args.twin,) if args.twin else TWINS
    twins = [twin for twin, why in runnable(wanted, mode).items() if not why]
    from parity import faults, frameworks

    frameworks.interpreters() if mode == "cpu" else frameworks.gpu()
    firsts = {p.stem: w for p, w in reversed(pairs)}  # after which the kernels that cheat follow
    rows: list[faults.Caught] = []
    with progress(len(pairs), "faults") as tell:
        for done, (p, w) in enumerate(pairs, 1):
            tell(f"{p.stem} {w.name}")
            rows += faults.answers(p, w)
            for twin in twins if firsts[p.stem] is w else ():
                tell(f"{p.stem} {p.workloads[0].name}: {twin} cheats")
                rows += faults.behaviours(p, p.workloads[0], twin)
            tell(f"{p.stem} {w.name}", done)
    ok = all(row.ok for row in rows)
    if args.json:
        print_json([asdict(row) | {"ok": row.ok} for row in rows])
        return PASS if ok else FAILED
    _show_faults(rows, mode)
    return PASS if ok else FAILED


def _show_faults(rows: list[Any], mode: str) -> None:
    from rich.table import Table

    console = console_of()
    planted = [row for row in rows if row.fault != "none"]
    killed = sum(row.ok for row in planted)
    where = "in the interpreters" if mode == "cpu" else "on the GPU"
    console.print(
        f"Kill rate {killed} of {len(planted)} {where}: each fault was planted on purpose, and "
        f"counts as caught only for the right reason. The right answers passed "
        f"{sum(row.ok for row in rows if row.fault == 'none')} times."
    )
    table = Table(box=None, header_style="bold")
    for column in ("fault", "caught", "planted", "for being"):
        table.add_column(column, justify="right" if column in ("caught", "planted") else "left")
    for fault in dict.fromkeys(row.fault for row in planted):
        of = [row for row in planted if row.fault == fault]
        found = ", ".join(sorted({row.found or "nothing" for row in of}))
        table.add_row(fault.replace("_", " "), str(sum(r.ok for r in of)), str(len(of)), found)
    console.print(table)
    for row in rows:
        if not row.ok:
            console.print(
                f"[red]{row.problem} {row.workload} {row.which}[/red]: {row.fault} was judged "
                f"{row.found or 'right'!r}, expected {' or '.join(row.reasons) or 'a pass'}. "
                f"{row.detail}"
            )
