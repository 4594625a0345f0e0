"""`parity all`: check, compile, bench on a Hopper GPU, report: what `make parity` runs."""

import sys
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from parity.commands.bench import show_bench, timed, worth_timing
from parity.commands.check import judged, show_checks, skipped_row
from parity.commands.compile import gated, show_compiles
from parity.commands.shared import (
    ENVIRONMENT,
    FAILED,
    PAGE,
    PASS,
    USAGE,
    Stop,
    console_of,
    mode_of,
    print_json,
    problems_of,
)


def run(args: Namespace) -> int:
    """Check, compile gate, bench where a Hopper GPU is, HTML report; the worst exit code."""
    from parity import doctor, page, report

    console = console_of()
    codes: list[int] = []
    said: dict[str, Any] = {}

    def part(name: str, run: Callable[[], bool]) -> None:
        if not args.json:
            console.print(f"\n[bold]{name}[/]")
        try:
            codes.append(PASS if run() else FAILED)
        except Stop as stop:
            codes.append(stop.code)
            said[name] = {"error": str(stop)}
            print(f"parity: {name}: {stop}", file=sys.stderr)

    def check() -> bool:
        mode = mode_of(args.device)
        tags = {"ci"} if mode == "cpu" else {"ci", "model"}
        everything = [(p, w) for p in problems_of(()) for w in p.workloads]
        began = time.perf_counter()
        chosen = [(p, w) for p, w in everything if tags & {*w.tags}]
        limit = 300.0 if mode == "cpu" else 600.0
        rows, skipped = judged(chosen, mode=mode, timeout=limit)
        skipped += [skipped_row(p, w) for p, w in everything if not tags & {*w.tags}]
        said["check"] = {"checks": rows, "not_run": skipped}
        if not args.json:
            show_checks(rows, skipped, mode, time.perf_counter() - began)
            if not all(row["ok"] for row in rows):
                console.print("`parity check STEM` looks for the smallest case that fails.")
        return all(row["ok"] for row in rows)

    def gate() -> bool:
        chosen = [(p, w) for p in problems_of(()) for w in p.workloads if "model" in w.tags]
        rows, skipped = gated(chosen)
        said["compile"] = {"kernels": rows, "not_run": skipped}
        if not args.json:
            show_compiles(rows, skipped, only_failures=True)
        return not any(row["status"] == "fail" for row in rows)

    def bench() -> bool:
        rows, left = timed(
            [(p, w) for p in problems_of(()) for w in p.workloads if worth_timing(w)],
            resume=True,
            budget=args.budget,
        )
        said["bench"] = {"rows": rows, "left": left}
        if not args.json:
            show_bench(rows, left)
        return not any(row["check"].startswith("fail") for row in rows)

    def write() -> bool:
        report.replace_text(PAGE, page.html(report.Results.here()))
        said["html"] = str(PAGE)
        if not args.json:
            console.print(f"The report is in {PAGE}", markup=False, soft_wrap=True)
        return True

    part("check", check)
    part("compile", gate)
    if doctor.machine().hopper and args.device != "cpu":
        part("bench", bench)
    part("report", write)
    code = next((c for c in (FAILED, ENVIRONMENT, USAGE) if c in codes), PASS)
    if args.json:
        print_json({"ok": code == PASS, "exit": code} | said)
    return code
