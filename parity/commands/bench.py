"""`parity bench`: times both twins beside their peers, on a Hopper GPU."""

import json
import subprocess
import sys
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
    needs_room,
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
        which=args.which,
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
    which: str | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Measures and records: (new rows, the steps that the budget did not reach).

    A pass that needs the device to itself is measured in a process of its own: what one framework's
    allocator has kept, the other cannot have.
    """
    needs_hopper()
    runnable(tuple(impls or twins), "gpu")
    from parity import frameworks, report
    from parity.bench import Campaign, Machine
    from parity.device import WarmCache
    from parity.spec import PASSES
    from parity.timing import NothingSeen

    frameworks.gpu()
    if impls is not None:  # someone's own kernel never lands among the twins' records
        out = out or report.LOCAL / "bench-impl.jsonl"
    end = None if budget is None else time.monotonic() + budget
    rows: list[dict[str, Any]] = []
    left: list[str] = []
    passes = (which,) if which else PASSES
    steps = [(p, w, x) for p, w in selection for x in w.passes if x in passes]
    apart = impls is None and len(steps) > 1
    alone = [step for step in steps if apart and needs_room(step[1])]
    by_problem: dict[str, list[tuple[Any, Any]]] = {}
    for p, w in selection:
        if not (apart and needs_room(w)):
            by_problem.setdefault(p.stem, []).append((p, w))
    total, done = len(steps), 0
    with progress(total, "bench") as tell:
        try:
            machine = Machine.here()
            # first: while this process has allocated nothing
            for p, w, x in alone:
                seconds = None if end is None else end - time.monotonic()
                tell(f"{p.stem} {w.name} {x}", done)
                if seconds is not None and seconds <= 0:
                    left.append(f"{p.stem} {w.name} {x}")
                else:
                    rows += _alone(p, w, x, twins, out, resume, seconds, rounds, peers)
                done += 1
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
                    passes=passes,
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


def _alone(
    p: "parity.spec.Problem",
    w: "parity.spec.Workload",
    which: str,
    twins: Sequence[str],
    out: Path | None,
    resume: bool,
    budget: float | None,
    rounds: int | None,
    peers: bool,
) -> list[dict[str, Any]]:
    """One pass in a process of its own, by this command: its rows, which it has recorded."""
    command = [sys.executable, "-c", "import sys; from parity.cli import main; sys.exit(main())"]
    command += ["bench", "--json", "-w", f"{p.stem}/{w.name}", "--pass", which]
    command += ["--twin", *twins] if len(twins) == 1 else []
    command += ["--out", str(out)] if out else []
    command += ["--resume"] if resume else []
    command += ["--no-peers"] if not peers else []
    command += ["--budget", f"{max(1, int(budget))}s"] if budget is not None else []
    command += ["--rounds", str(rounds)] if rounds else []
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode not in (PASS, FAILED):
        said = ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"]
        raise Stop(ENVIRONMENT, f"{p.stem} {w.name} {which}, in a process of its own: {said[-1]}")
    return json.loads(ran.stdout)["rows"]


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
