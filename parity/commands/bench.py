"""`parity bench`: times both twins beside their peers, on a Hopper GPU."""

import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parity.commands.shared import (
    ENVIRONMENT,
    FAILED,
    PASS,
    TWINS,
    USAGE,
    Pair,
    Stop,
    console_of,
    implementations,
    needs_hopper,
    print_json,
    progress,
    runnable,
    selected,
)

if TYPE_CHECKING:
    import parity.spec


def run(args: Namespace) -> int:
    impls = implementations(args)
    selection = selected(args, ("model",))
    if not args.workload:
        selection = [(p, w) for p, w in selection if worth_timing(w)]
    if any("ci" in w.tags for _, w in selection):
        raise Stop(USAGE, "ci workloads are too small to be timed; choose model ones")
    rows, left = timed(
        selection,
        twins=(args.twin,) if args.twin else TWINS,
        impls=impls,
        out=args.out,
        resume=args.resume,
        budget=args.budget,
        rounds=args.rounds,
        peers=not args.no_peers,
    )
    red = any(row["check"].startswith("fail") for row in rows)
    if args.json:
        print_json({"ok": not red, "rows": rows, "left": left})
    else:
        show_bench(rows, left)
    return FAILED if red else PASS


def worth_timing(w: "parity.spec.Workload") -> bool:
    return "model" in w.tags and "huge" not in w.tags


def timed(
    selection: Sequence[Pair],
    *,
    twins: Sequence[str] = TWINS,
    impls: dict[str, str] | None = None,
    out: Path | None = None,
    resume: bool = False,
    budget: float | None = None,
    rounds: int | None = None,
    peers: bool = True,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Measures and records: (new rows, the steps that the budget did not reach)."""
    needs_hopper()
    runnable(tuple(impls or twins), "gpu")
    from parity import frameworks, report
    from parity.bench import Campaign, Machine
    from parity.device import WarmCache
    from parity.timing import NothingSeen

    frameworks.gpu()
    if impls is not None:  # someone's own kernel never lands among the twins' records
        out = out or report.LOCAL / "bench-impl.jsonl"
    end = None if budget is None else time.monotonic() + budget
    rows: list[dict[str, Any]] = []
    left: list[str] = []
    by_problem: dict[str, list[tuple[Any, Any]]] = {}
    for p, w in selection:
        by_problem.setdefault(p.stem, []).append((p, w))
    total = sum(len(w.passes) for _, w in selection)
    done = 0
    with progress(total, "bench") as tell:
        try:
            machine = Machine.here()
            for pairs in by_problem.values():
                p = pairs[0][0]
                how: dict[str, Any] = {"peers": peers, "progress": tell}
                how["impls"] = impls or {twin: p.implementations[twin] for twin in twins}
                if rounds:
                    how["rounds"] = rounds
                campaign = Campaign(
                    pairs,
                    out=out,
                    resume=resume,
                    budget=None if end is None else max(0.0, end - time.monotonic()),
                    machine=machine,
                    **how,
                )
                done += len(campaign.standing)
                remaining = len(campaign.left)
                for row in campaign:
                    rows.append(row)
                    finished = remaining - len(campaign.left)
                    tell(f"{row['problem']} {row['workload']} {row['pass']}", done + finished)
                done += remaining
                left += [f"{s.problem.stem} {s.work.name} {s.which}" for s in campaign.left]
        except (NothingSeen, WarmCache) as e:
            raise Stop(ENVIRONMENT, f"nothing can be timed here: {e} (`parity doctor`)") from None
    return rows, left


def show_bench(rows: list[dict], left: list[str]) -> None:
    from parity import report

    console = console_of()
    lines = report.lines_of(rows)
    if lines:
        console.print(report.sentence_of_lines(lines))
        console.print(report.bench_table(lines, console.width))
    else:
        console.print("Nothing was left to measure." if not left else "Nothing was measured.")
    for row in rows:
        if row.get("note"):
            name = f"{row['workload']} {row['pass']} {row['impl']}"
            console.print(f"Not timed: {name}: {row['note']}", markup=False)
    if left:
        console.print(
            f"The budget is spent. Left: {len(left)}, first {left[0]}; "
            "`parity bench --resume` goes on.",
            markup=False,
        )
