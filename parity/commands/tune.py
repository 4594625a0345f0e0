"""`parity tune`: searches for faster Configs, and writes the winners into the kernel files."""

import difflib
import itertools
import math
import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parity.commands.shared import (
    ENVIRONMENT,
    FAILED,
    PASS,
    ROOT,
    TWINS,
    USAGE,
    Stop,
    console_of,
    needs_hopper,
    print_json,
    problems_of,
    progress,
    runnable,
    selected,
)

if TYPE_CHECKING:
    import parity.tune


def run(args: Namespace) -> int:
    if args.emit:
        return emit(args)
    tasks = tasks_of(args)
    search = "exhaustive" if args.exhaustive else "descent"
    try:
        if args.dry_run:
            return rehearse(args, tasks, search)
        needs_hopper()
    except Stop as stop:
        if args.dry_run or stop.code != ENVIRONMENT:
            raise
        rehearse(args, tasks, search, because=f"{stop}; nothing was timed")
        if not args.json:
            print(f"parity: {stop}; `parity tune --dry-run` ends well without one", file=sys.stderr)
        return ENVIRONMENT
    return measure(args, tasks, search)


def tasks_of(args: Namespace) -> list["parity.tune.Task"]:
    from parity.commands.bench import worth_timing
    from parity.spec import PASSES
    from parity.tune import Task

    selection = selected(args, ("model",))
    if not args.workload:
        selection = [(p, w) for p, w in selection if worth_timing(w)]
    if any("ci" in w.tags for _, w in selection):
        raise Stop(USAGE, "ci workloads are too small to be timed; choose model ones")
    twins = (args.twin,) if args.twin else TWINS
    passes = (args.which,) if args.which else PASSES
    tasks = [
        Task(p, w, which, twin)
        for p, w in selection
        for twin in twins
        for which in w.passes
        if which in passes and p.launches(which)
    ]
    if not tasks:
        raise Stop(USAGE, "nothing to tune: no kernel of ours in these passes of these workloads")
    return tasks


def gate_step(tell: Callable[..., None]) -> Callable[[int, int, str], None]:
    return lambda done, total, what: tell(f"compile gate, {done} of {total} Configs: {what}")


def jobs() -> int:
    """Compilers at a time: half of the processors, the other half belongs to the other twin."""
    return max(1, min(8, (os.cpu_count() or 1) // 2))


# Without a GPU: prune, and say what would be measured.


def rehearse(
    args: Namespace, tasks: Sequence["parity.tune.Task"], search: str, because: str = ""
) -> int:
    from parity import tune
    from parity.compile import find_sass

    runnable(tuple({task.twin for task in tasks}), "cpu")
    kept: dict[tuple[str, str], tune.Results] = {}
    entries: dict[tune.Task, tune.Entry] = {}
    with _asked_right():
        for task in tasks:
            source, at = tune.source_of(task), (task.problem.stem, task.twin)
            entries[task] = tune.Entry.new(task, source)
            if args.out:
                results = kept.setdefault(at, tune.Results.open(args.out, *at, ""))
                entries[task] = results.entry(task, source, None, args.resume)
        with progress(len(tasks), "tune") as tell:
            tune.prune(entries, search, jobs=jobs(), progress=gate_step(tell))
    for results in kept.values():
        results.save()
    unseen = any(task.twin == "pallas" for task in tasks) and find_sass() is None
    if args.json:
        found = [_named(task, entry) for task, entry in entries.items()]
        print_json({"ok": not because, "why": because, "results": found, "ptxas": not unseen})
        return PASS
    console = console_of()
    console.print(
        f"What `parity tune` would measure: {search}, every Config that the compile gate leaves "
        f"{'of the space' if search == 'exhaustive' else 'one field away from the default'}. "
        "Nothing here was timed.",
        markup=False,
    )
    console.print(_plan(list(entries.items())))
    _show_pruned(console, list(entries.items()))
    if unseen:
        console.print(
            "Pallas was only cross-lowered: no ptxas here (`make sass`), so a Config that spills "
            "shows on the GPU, at its first call."
        )
    return PASS


def _plan(entries: Sequence[tuple["parity.tune.Task", "parity.tune.Entry"]]) -> Any:
    table = _table("workload", "pass", "twin", "space", "pruned", "left", "would be measured")
    for task, entry in entries:
        start = entry.row["start"]
        table.add_row(
            task.work.name,
            task.which,
            task.twin,
            str(math.prod(len(v) for v in entry.row["space"].values())),
            str(sum(entry.pruned.values())),
            str(len(entry.waiting)),
            " · ".join(_beside(row["config"], start) for row in entry.waiting) or "nothing",
        )
    return table


# On a GPU.


def measure(args: Namespace, tasks: Sequence["parity.tune.Task"], search: str) -> int:
    runnable(tuple({task.twin for task in tasks}), "gpu")
    from parity import device, frameworks, record, tune
    from parity.bench import Machine
    from parity.device import WarmCache
    from parity.timing import NothingSeen

    frameworks.gpu()
    with progress(len(tasks), "tune") as tell, _asked_right():
        try:
            machine = Machine.here()
            from parity.frameworks import tracer

            device.prove_cold(tracer.cold, machine.facts["hbm_gbps"])
            name = machine.facts["name"]
            campaign = tune.Campaign(
                tasks,
                args.out or tune.TUNED / record.slug(name),
                device=name,
                versions=machine.versions,
                commit=machine.commit,
                search=search,
                budget=args.budget,
                resume=args.resume,
                jobs=jobs(),
                tell=tell,
            )
            campaign.prune(gate_step(tell))
            standing = len(tasks) - len(campaign.left)
            for done, (task, entry) in enumerate(campaign, start=standing + 1):
                said = entry.row["why"] or "a faster Config"
                tell(f"{task.problem.stem} {task.name}: {said}", done)
        except (NothingSeen, WarmCache) as e:
            raise Stop(ENVIRONMENT, f"nothing can be timed here: {e} (`parity doctor`)") from None
    if args.json:
        found = [_named(task, campaign.entries[task]) for task in tasks]
        left = [f"{task.problem.stem} {task.name}" for task in campaign.left]
        wrong = {f"{t.problem.stem} {t.name}": why for t, why in campaign.wrong.items()}
        print_json({"ok": not wrong, "results": found, "left": left, "wrong": wrong})
        return FAILED if wrong else PASS
    show(campaign, tasks)
    return FAILED if campaign.wrong else PASS


def show(campaign: Any, tasks: Sequence["parity.tune.Task"]) -> None:
    entries = [(t, campaign.entries[t]) for t in tasks]
    tuned = [(t, e) for t, e in entries if e.row["finished"]]
    won = sum(e.row["winner"] is not None for _, e in tuned)
    console = console_of()
    console.print(
        f"{len(tuned)} of {len(tasks)} passes tuned: {won} have a Config FASTER than the present "
        f"default, for {len(tuned) - won} the default stands. us: from a call's first kernel to "
        "its last, cold L2, median. share: of the default's time in the same run.",
        markup=False,
    )
    if any(e.measured for _, e in entries):
        console.print(_outcome([(t, e) for t, e in entries if e.measured]))
    _show_pruned(console, entries)
    for task, why in campaign.wrong.items():
        console.print(f"Not tuned: {task.problem.stem} {task.name}: {why}", markup=False)
    left = [t for t in campaign.left if t not in campaign.wrong]
    if left:
        console.print(
            f"The budget is spent. Left: {len(left)}, first {left[0].problem.stem} "
            f"{left[0].name}; `parity tune --resume` goes on.",
            markup=False,
        )
    elif won:
        console.print("`parity tune --emit` writes the winners into default_config.")


def _outcome(entries: Sequence[tuple["parity.tune.Task", "parity.tune.Entry"]]) -> Any:
    table = _table(
        "workload", "pass", "twin", "default us", "best us", "share", "best", "tried", "verdict"
    )
    for task, entry in entries:
        row, best = entry.row, entry.row["winner"]
        verdict = best["verdict"] if best else "default stands" if row["finished"] else "unfinished"
        best = best or entry.measured[0]
        default = best.get("default_us", best["us"])
        table.add_row(
            task.work.name,
            task.which,
            task.twin,
            f"{default['p50']:.1f}",
            f"{best['us']['p50']:.1f}",
            f"{best['share']:.3f}",
            _beside(best["config"], row["asks"][0]["default"]),
            str(len(entry.measured)),
            verdict,
        )
    return table


def _show_pruned(
    console: Any, entries: Sequence[tuple["parity.tune.Task", "parity.tune.Entry"]]
) -> None:
    """How many Configs each reason ended, with one of them in full."""
    for twin in TWINS:
        count: dict[str, int] = {}
        example: dict[str, str] = {}
        for task, entry in entries:
            for row in entry.row["configs"] if task.twin == twin else ():
                if kind := row.get("pruned"):
                    count[kind] = count.get(kind, 0) + 1
                    example.setdefault(kind, re.split(r" \(|\. ", row["why"])[0])
        for kind, number in sorted(count.items(), key=lambda item: -item[1]):
            console.print(f"{twin}: {number} pruned, {kind}: {example[kind]}", markup=False)


def _beside(config: dict[str, int], default: dict[str, int]) -> str:
    changed = [f"{n}={v}" for n, v in config.items() if default.get(n) != v]
    return " ".join(changed) or "the default"


def _table(*columns: str) -> Any:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, pad_edge=False)
    numbers = {"default us", "best us", "share", "tried", "space", "pruned", "left"}
    for column in columns:
        right = column in numbers
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    return table


def _named(task: "parity.tune.Task", entry: "parity.tune.Entry") -> dict[str, Any]:
    return {"problem": task.problem.stem, "twin": task.twin} | entry.row


@contextmanager
def _asked_right() -> Iterator[None]:
    """Results that are none, and a problem without a space, end in one sentence."""
    try:
        yield
    except (LookupError, ValueError) as e:
        raise Stop(USAGE, str(e.args[0])) from None


# What stands in the kernel files.


def emit(args: Namespace) -> int:
    """Writes the winners of the results into the kernel files and prints the difference."""
    from parity import rungs, tune

    folder = args.out or _only_folder(tune.TUNED)
    changes: list[tuple[Path, str, str]] = []
    said: list[str] = []
    stale: list[str] = []
    found = 0
    for p, twin in itertools.product(problems_of(args.stems), TWINS):
        path = folder / f"{p.stem}.{twin}.json"
        if args.twin not in (None, twin) or not path.exists():
            continue
        with _asked_right():
            results = tune.Results.read(path)
        rows = [e.row for e in results.entries.values() if e.row["finished"]]
        found += len(rows)
        place = p.implementations[twin].rpartition(":")[0]
        file = ROOT.joinpath(*place.split(".")).with_suffix(".py")
        now = tune.source_of(tune.Task(p, p.workloads[0], "fwd", twin))
        if any(row["source"] != now for row in rows):
            stale.append(
                f"{file.relative_to(ROOT)} has changed since it was tuned and is left as it is; "
                f"`parity tune {p.stem} --twin {twin}` again"
            )
            continue
        with _asked_right():
            made, remarks = rungs.of_results(rows, results.device)
            text = file.read_text()
            after = rungs.emit(text, p.stem, twin, made)
        said += [f"{p.stem} {twin}: {remark}" for remark in remarks]
        if after != text:
            changes.append((file, text, after))
        elif rows:
            needed = "its rungs stand as they are" if made else "no rung is needed"
            said.append(f"{p.stem} {twin}: default_config already gives every winner; {needed}")
    if not found:
        stems = " ".join(args.stems) or "any problem"
        hint = "`parity tune STEM` on a Hopper GPU makes them"
        raise Stop(USAGE, f"no tuned results of {stems} in {folder}: {hint}")
    for file, _, after in changes:
        file.write_text(after)
    diffs = [_diff(*change) for change in changes]
    if args.json:
        names = [str(file.relative_to(ROOT)) for file, _, _ in changes]
        print_json({"ok": not stale, "changed": names, "diff": diffs, "said": said + stale})
        return FAILED if stale else PASS
    console = console_of()
    console.print(
        f"{len(changes)} kernel files changed, from {found} tuned passes in {folder}.", markup=False
    )
    for text in diffs:
        console.print(text, markup=False, soft_wrap=True)
    for sentence in said + stale:
        console.print(f"{sentence}.", markup=False)
    return FAILED if stale else PASS


def _diff(file: Path, before: str, after: str) -> str:
    name = str(file.relative_to(ROOT))
    lines = difflib.unified_diff(
        before.splitlines(keepends=True), after.splitlines(keepends=True), name, name
    )
    return "".join(lines).rstrip()


def _only_folder(root: Path) -> Path:
    folders = sorted(f for f in root.glob("*") if f.is_dir() and any(f.glob("*.json")))
    if len(folders) == 1:
        return folders[0]
    if not folders:
        raise Stop(
            USAGE, "there are no tuned results: `parity tune STEM` on a Hopper GPU makes them"
        )
    names = ", ".join(f.name for f in folders)
    raise Stop(USAGE, f"results of several devices ({names}); name one folder with --out")
