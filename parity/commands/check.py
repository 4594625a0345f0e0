"""`parity check`: both twins against the float64 oracle, in worker processes."""

import contextlib
import os
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parity import new
from parity.commands import failing
from parity.commands.shared import (
    ENVIRONMENT,
    FAILED,
    PASS,
    TWINS,
    USAGE,
    Pair,
    Stop,
    broken_is_environment,
    console_of,
    implementations,
    mode_of,
    nearest,
    needs_room,
    print_json,
    problems_of,
    progress,
    runnable,
    selected,
)

if TYPE_CHECKING:
    import parity.spec

NOT_ON_A_CPU = (
    "bfloat16 at full size: Triton's interpreter gets bfloat16 products wrong, and an interpreter "
    "would take hours (the compile gate compiles it; a GPU checks it)"
)


def skipped_row(p: "parity.spec.Problem", w: "parity.spec.Workload") -> dict[str, str]:
    return {"problem": p.stem, "workload": w.name, "why": NOT_ON_A_CPU}


def run(args: Namespace) -> int:
    impls = implementations(args)
    mode = mode_of(args.device)
    selection = selected(args, ("ci",) if mode == "cpu" else ("ci", "model"))
    _check_sizes(selection, args)
    timeout = args.timeout or (120.0 if impls else 300.0 if mode == "cpu" else 600.0)
    began = time.perf_counter()
    rows, skipped = judged(
        selection,
        mode=mode,
        twins=(args.twin,) if args.twin else TWINS,
        impls=impls,
        seed=args.seed,
        timeout=timeout,
        workers=args.jobs,
        passes=(args.which,) if args.which else None,
        sizes=args.sizes or {},
        without=args.without or (),
    )
    if mode == "cpu" and not args.workload:  # what the default leaves out is said, not hidden
        everything = [(p, w) for p in problems_of(args.stems) for w in p.workloads]
        skipped += [skipped_row(p, w) for p, w in everything if "ci" not in w.tags]
    ok = all(row["ok"] for row in rows)
    if not args.json:
        show_checks(rows, skipped, mode, time.perf_counter() - began)
    smallest = []
    if not ok and args.shrink:
        with broken_is_environment():
            smallest = failing.shrunk(
                rows, selection, args, mode=mode, impls=impls, timeout=timeout, log=_log()
            )
    if args.json:
        said = {"ok": ok, "device": mode, "seed": args.seed, "checks": rows, "not_run": skipped}
        print_json(said | {"smallest": smallest})
    elif not ok:
        failing.show(console_of(), rows, smallest)
    if not args.json and impls is None:
        for stem in dict.fromkeys(row["problem"] for row in rows):
            if step := new.next_step(stem):
                console_of().print(f"\n{step}", markup=False)
    return PASS if ok else FAILED


def _log() -> Path:
    """Where what the workers and their kernels print goes."""
    from parity import report

    return report.LOCAL / "workers.log"


def _check_sizes(selection: Sequence[Pair], args: Namespace) -> None:
    """Stops where a workload has not the sizes, or none of them the options, that are asked for."""
    from parity import shrink

    for p, w in selection:
        for letter in args.sizes or ():
            if letter not in w.sizes:
                raise Stop(USAGE, f"{p.stem} has no size {letter!r}{nearest(letter, [*w.sizes])}")
        try:
            shrink.resized(p, w, args.sizes or {})
        except ValueError as e:
            raise Stop(USAGE, f"{p.stem} cannot have these sizes: {e}") from None
    known = list(dict.fromkeys(name for p, w in selection for name in shrink.optional(p, w)))
    for name in args.without or ():
        if name not in known:
            raise Stop(USAGE, f"nothing to leave out is called {name!r}{nearest(name, known)}")


def judged(
    selection: Sequence[Pair],
    *,
    mode: str,
    twins: Sequence[str] = TWINS,
    impls: dict[str, str] | None = None,
    seed: int = 0,
    timeout: float | None = None,
    workers: int | None = None,
    passes: tuple[str, ...] | None = None,
    sizes: Mapping[str, int] | None = None,
    without: Sequence[str] = (),
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Runs the checks in child processes: (rows in order, what was not run and why)."""
    from parity import report, shrink
    from parity import workers as crew

    able = runnable(tuple(impls or twins), mode)
    jobs, skipped = [], []
    for p, w in selection:
        if mode == "cpu" and "ci" not in w.tags:
            skipped.append(skipped_row(p, w))
            continue
        targets = dict(impls or {twin: p.implementations[twin] for twin in twins})
        skipped += [
            {"problem": p.stem, "workload": w.name, "twin": twin, "why": able[twin]}
            for twin in targets
            if able[twin]
        ]
        targets = {twin: target for twin, target in targets.items() if not able[twin]}
        alone = needs_room(w)
        left_out = tuple(name for name in without if name in shrink.optional(p, w))
        which = tuple(x for x in passes or w.passes if x in w.passes)
        jobs.append(
            crew.Job(
                p.stem, w.name, which, w.dtype, targets, seed, alone, dict(sizes or {}), left_out
            )
        )
    if not jobs and selection:
        raise Stop(ENVIRONMENT, f"none of the workloads runs here: {skipped[0]['why']}")

    log = _log()
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    answers: dict[str, tuple[dict, ...]] = {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = workers or (min(2, cores or 1) if mode == "cpu" and not impls else 1)
    with progress(len(jobs), "check") as tell, broken_is_environment():
        events = crew.run(
            jobs,
            mode=mode,
            workers=workers,
            timeout=timeout,
            give_up=impls is not None,
            log=log,
        )
        with contextlib.closing(events):
            for event in events:
                if event.rows is None:
                    tell(event.phrase)
                    continue
                answers[event.job.name] = event.rows
                if impls is None and not sizes and not without:
                    report.keep_checks(event.rows, mode, event.job.impls)
                bad = next((row["reason"] for row in event.rows if not row["ok"]), "")
                tell(f"{event.job.name}: {bad or 'ok'}", len(answers))
    return [row for job in jobs for row in answers[job.name]], skipped


def show_checks(rows: list[dict], skipped: list[dict], mode: str, seconds: float) -> None:
    from parity import report

    console = console_of()
    bad = [row for row in rows if not row["ok"]]
    console.print(report.sentence_of_checks(rows, mode) + f" ({seconds:.0f} s)")
    console.print(report.check_table(rows, console.width))
    alike: dict[tuple[str, str], list[str]] = {}
    for row in bad:
        name = f"{row['problem']} {row['workload']} {row['which']} {row['impl']}"
        alike.setdefault((row["reason"], row["detail"]), []).append(name)
    for (reason, detail), names in alike.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        console.print(f"[bold red]{reason}[/]: {', '.join(names[:3])}{more}")
        console.print(f"  {detail}", markup=False)
    if any(row["reason"] in ("crash", "timeout") for row in bad):
        console.print(f"What the workers printed: {report.LOCAL / 'workers.log'}", markup=False)
    by_reason: dict[str, list[dict]] = {}
    for item in skipped:
        by_reason.setdefault(item["why"], []).append(item)
    for why, items in by_reason.items():
        names = list(dict.fromkeys(i.get("twin") or i["problem"] for i in items))
        console.print(
            f"Not run: {len(items)} workloads of {', '.join(names)}. {why[0].upper() + why[1:]}.",
            markup=False,
        )
