"""`parity explain`: why the twins are as fast as they are, and what sets them apart."""

import dataclasses
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from parity import compile as gate
from parity import doctor, explain, ncu, record, sass, waterfall
from parity.commands.bench import timed
from parity.commands.shared import (
    ENVIRONMENT,
    FAILED,
    PASS,
    TWINS,
    USAGE,
    Stop,
    console_of,
    implementations,
    nearest,
    print_json,
    problems_of,
    progress,
    runnable,
)
from parity.explain import Explanation, Kernel, Measured, Sentence, Side
from parity.spec import Problem, Workload

ROUNDS = 4  # of the ruler, where explain measures by itself


def run(args: Namespace) -> int:
    if args.before or args.after:
        return compare(args)
    problem, work = chosen(args)
    passes = [args.which] if args.which else list(work.passes)
    impls = implementations(args)
    twins = (args.twin,) if args.twin and not impls else TWINS
    if args.sass and not args.which:
        passes = passes[:1]

    here = gpu_is_here()
    if args.ncu and not here:
        raise Stop(ENVIRONMENT, "--ncu reads hardware counters, and here is no Hopper GPU")
    if args.out and not here:
        raise Stop(ENVIRONMENT, "--out keeps what is measured now, and here is no Hopper GPU")
    rows, missing = compiled(problem, work, passes, twins, impls)
    fresh = here and not args.recorded and not args.sass
    measured = (
        measure(problem, work, passes, twins, impls, rows)
        if fresh
        else known(problem, work, passes, twins, impls or {})
    )
    targets = {twin: (impls or {}).get(twin, problem.implementations[twin]) for twin in twins}
    found = []
    for which in passes:
        counted = count(problem, work, which, targets, measured[which]) if args.ncu else []
        found.append(
            explain.explanation(
                problem,
                work,
                which,
                rows,
                measured[which],
                listing=listing_of,
                foreign=tuple(impls or ()),
                why_not=missing,
                counted=counted,
            )
        )
    if args.out:
        keep(args.out, measured)
    broken = any(row.fails and row.registers is None for row in rows)  # nothing to explain
    if args.json:
        told = [explain.as_json(e) | (loops_json(e) if args.sass else {}) for e in found]
        print_json({"ok": not broken, "explanations": told})
    elif args.sass:
        for e in found:
            show_loops(e, console_of())
    else:
        console = console_of()
        console.print(heading(problem, work, found), markup=False)
        for e in found:
            show(e, console)
    return FAILED if broken else PASS


# What was asked.


def chosen(args: Namespace) -> tuple[Problem, Workload]:
    """The one workload that is asked for; without -w the problem's first that is no `ci`."""
    if len(args.stems) != 1:
        there = ", ".join(p.stem for p in problems_of(()))
        raise Stop(USAGE, f"explain takes one STEM (there are: {there})")
    (problem,) = problems_of(args.stems)
    names = [w.name for w in problem.workloads]
    if args.workload is None:
        model = [w for w in problem.workloads if "ci" not in w.tags]
        return problem, (model or list(problem.workloads))[0]
    if args.workload not in names:
        raise Stop(
            USAGE,
            f"{problem.stem} has no workload {args.workload!r}{nearest(args.workload, names)}",
        )
    work = problem.workload(args.workload)
    if args.which and args.which not in work.passes:
        raise Stop(
            USAGE, f"{work.name} has no pass {args.which!r} (it has: {', '.join(work.passes)})"
        )
    return problem, work


# Facts.


def compiled(
    problem: Problem,
    work: Workload,
    passes: Sequence[str],
    twins: Sequence[str],
    impls: Mapping[str, str] | None,
) -> tuple[list[Any], dict[str, str]]:
    """The compile gate's rows of one workload, and why a twin has none."""

    able = runnable(tuple(twins), "cpu")
    with progress(len(twins), "compile") as tell:
        rows = gate.compile_gate(
            [problem],
            workloads=[work.name],
            twins=[twin for twin in twins if not able[twin]],
            passes=passes,
            implementations=impls,
            progress=lambda done, _, what: tell(what, done),
        )
    return rows, {twin: why for twin, why in able.items() if why}


def listing_of(row: Any) -> str:

    return (gate.CACHE / row.listing).read_text() if row.listing else ""


def known(
    problem: Problem,
    work: Workload,
    passes: Sequence[str],
    twins: Sequence[str],
    impls: Mapping[str, str],
) -> dict[str, dict[str, Measured]]:
    """pass -> twin -> its measured row, of the committed records; nobody recorded an --impl."""

    found = {}
    for which in passes:
        rows = explain.recorded(problem, work, which)
        found[which] = {t: row for t, row in rows.items() if t in twins and t not in impls}
    return found


def gpu_is_here() -> bool:

    return bool(doctor.machine().hopper)


def measure(
    problem: Problem,
    work: Workload,
    passes: Sequence[str],
    twins: Sequence[str],
    impls: Mapping[str, str] | None,
    compiled_rows: Sequence[Any],
) -> dict[str, dict[str, Measured]]:
    """As `known`, measured now: the ruler's samples, fewer rounds, no peers."""

    targets = {twin: (impls or {}).get(twin, problem.implementations[twin]) for twin in twins}
    only = dataclasses.replace(work, passes=tuple(passes))
    with tempfile.TemporaryDirectory() as folder:
        rows, _ = timed(
            [(problem, only)], impls=targets, out=Path(folder, "rows"), rounds=ROUNDS, peers=False
        )
    found: dict[str, dict[str, Measured]] = {which: {} for which in passes}
    for row in rows:
        if row["us"] is None:
            note = row.get("note") or row["check"]
            print(f"parity: {row['impl']} {row['pass']} was not timed: {note}", file=sys.stderr)
            continue
        ours = [r for r in compiled_rows if (r.twin, r.which) == (row["impl"], row["pass"])]
        for launch in row["launches"]:  # what the compile gate knows of each
            kernel = next((r for r in ours if r.kernel in launch["name"]), None)
            if kernel is not None:
                ours.remove(kernel)
                if counts := sass.parse(listing_of(kernel)).counts:
                    launch["instructions"] = counts
        source = f"this run of {row['samples']} samples"
        found[row["pass"]][row["impl"]] = explain.Measured(row, source)
    return found


def count(
    problem: Problem,
    work: Workload,
    which: str,
    targets: Mapping[str, str],
    measured: Mapping[str, Measured],
) -> list[Sentence]:
    """Sentences from hardware counters; each launch of a measured row gains its bytes."""

    told = []
    least = problem.cost(work, which).bytes
    for twin, target in targets.items():
        try:
            kernels = ncu.counters(target, problem.stem, work.name, which, twin)
        except ncu.NoCounters as e:
            told.append(Sentence("counters", twin, f"No counters of {twin}: {e}."))
            continue
        launches = measured[twin].row.get("launches", []) if twin in measured else []
        for n, kernel in enumerate(kernels):
            if len(launches) == len(kernels) and "dram_read_bytes" in kernel:
                moved = kernel["dram_read_bytes"] + kernel.get("dram_write_bytes", 0)
                launches[n]["dram_bytes"] = moved
            said = "; ".join(ncu.sentences(kernel, least))
            text = f"{twin}'s {kernel['name']}, counted by ncu: {said}."
            told.append(Sentence("counters", twin, text, numbers=kernel))
    return told


def keep(path: Path, measured: Mapping[str, Mapping[str, Measured]]) -> None:

    for of_pass in measured.values():
        for m in of_pass.values():
            record.append(path, dict(m.row))


# From one row to another.


def compare(args: Namespace) -> int:

    if not (args.before and args.after):
        raise Stop(USAGE, "--before ROW goes with --after ROW")
    before, after = (row_of(word, args) for word in (args.before, args.after))
    try:
        found = waterfall.waterfall(before, after)
    except ValueError as e:
        raise Stop(USAGE, str(e)) from None
    if args.json:
        print_json({"ok": True} | dataclasses.asdict(found))
        return PASS
    console = console_of()
    name = f"{after['problem']} {after['workload']} {after['pass']} {after['impl']}"
    apart = found.after - found.before
    console.print(
        f"{name}: {found.verdict}, {found.before:.1f} -> {found.after:.1f} us "
        f"({apart:+.1f} us, {apart / found.before:+.1%}).",
        markup=False,
    )
    console.print(step_table(found, console.width))
    for title, lines in (
        ("Changed too, without a time of its own", found.changed),
        ("Not in these rows", found.missing),
    ):
        if lines:
            console.print(f"{title}:")
            for line in lines:
                console.print(f"* {line}", markup=False)
    return PASS


def row_of(word: str, args: Namespace) -> Mapping[str, Any]:
    """FILE.jsonl:LINE, or FILE.jsonl and what -w, --pass and --twin choose."""

    place, _, line = word.rpartition(":")
    path, number = (Path(place), int(line)) if place and line.isdecimal() else (Path(word), None)
    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*.jsonl")] if path.parent.is_dir() else []
        near = nearest(path.name, beside) if beside else ""
        raise Stop(USAGE, f"no file {str(path)!r}{near if near.startswith(';') else ''}")
    rows = dict(explain.numbered_rows(path))
    if number is not None:
        if number not in rows:
            raise Stop(
                USAGE,
                f"{path} has no row in line {number} (its lines: 1 to {max(rows, default=0)})",
            )
        return rows[number]
    asked = {"workload": args.workload, "pass": args.which, "impl": args.twin}
    if args.stems:
        asked["problem"] = args.stems[0]
    fits = {
        record.key(row): row
        for row in rows.values()
        if row["us"] is not None and all(v is None or row[k] == v for k, v in asked.items())
    }
    if len(fits) != 1:
        raise Stop(
            USAGE,
            f"{path} has {len(fits)} timed rows like that, not one: say FILE:LINE, or -w, --pass "
            "and --twin",
        )
    return next(iter(fits.values()))


def step_table(found: Any, width: int) -> Table:

    table = Table(box=None, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
    for heading_ in ("step", "us", "", "from"):
        table.add_column(heading_, justify="right" if heading_ == "us" else "left")
    most = max((abs(step.us) for step in found.steps), default=0.0)
    table.add_row("before", f"{found.before:.1f}", "", "")
    for step in found.steps:
        bar = Text(waterfall.bar(step, most), style="green" if step.us < 0 else "red")
        table.add_row(step.what, f"{step.us:+.1f}", bar, Text(step.why))
    table.add_row("after", f"{found.after:.1f}", "", "")
    return table


# What is shown.


def heading(problem: Problem, work: Workload, found: Sequence[Explanation]) -> str:

    sizes = ", ".join(f"{letter} {size}" for letter, size in work.sizes.items())
    said = "\n".join(explain.conclusion(e) for e in found)
    return f"{problem.stem} {work.name} ({sizes}, {work.dtype}), for an H200:\n{said}"


def show(e: Explanation, console: Console) -> None:
    console.print()
    console.print(fact_table(e, console.width))
    for sentence in e.sentences:
        style = "bold red" if sentence.cause else None
        console.print(f"* {sentence.text}", style=style, markup=False)


def fact_table(e: Explanation, width: int) -> Table:

    table = Table(box=None, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
    table.add_column(e.which, style="bold", no_wrap=width >= 70)
    for side in e.sides:
        table.add_column(side.twin, ratio=1, overflow="fold")
    for label, values in fact_rows(e):
        if any(values):
            table.add_row(label, *(Text(v or "-") for v in values))
    return table


def fact_rows(e: Explanation) -> Iterator[tuple[str, list[str]]]:
    """(what, one text a twin) of one pass."""

    def each(fact: Any) -> list[str]:
        return [fact(side) if side.kernels else "" for side in e.sides]

    yield "launches", each(lambda side: str(len(side.kernels)))
    most = max((len(side.kernels) for side in e.sides), default=0)
    for n in range(most):
        kernels = [side.kernels[n] if n < len(side.kernels) else None for side in e.sides]
        yield from kernel_rows(e, kernels)
    least = f"{explain.size(e.cost.bytes)}, {explain.flops(e.cost.flops)}"
    yield "least work", [least for _ in e.sides]
    for label, value in (
        ("read twice", lambda side: side.again),
        ("read from L2", lambda side: side.shared),
        ("partial results", lambda side: side.extra),
    ):
        yield (
            label,
            each(lambda side, value=value: explain.size(value(side)) if value(side) else ""),
        )
    if e.ceilings and e.least_us:
        side_of = "compute" if e.compute_bound else "memory"
        intensity = explain.number(e.cost.flops / e.cost.bytes)
        where = f"{side_of}: {intensity} FLOP/B, ridge {explain.ridge(e.ceilings):.0f}"
        yield "roofline", [where for _ in e.sides]
        yield "least time", [f"{e.least_us:.1f} us" for _ in e.sides]
    yield from measured_rows(e)


def kernel_rows(
    e: Explanation, kernels: Sequence[Kernel | None]
) -> Iterator[tuple[str, list[str]]]:

    def each(fact: Any) -> list[str]:
        return [fact(k) if k is not None else "" for k in kernels]

    def counted(*kinds: str) -> list[str]:
        def text(k: Kernel) -> str:
            counts = k.code.counts if k.code else {}
            return (
                " + ".join(str(counts.get(kind, 0)) for kind in kinds)
                if any(counts.get(kind) for kind in kinds)
                else ""
            )

        return each(text)

    yield "kernel", each(lambda k: k.row.kernel)
    yield "blocks x threads", each(launch_text)
    yield "Config", each(lambda k: explain.fields_of(k.row.config) if k.row.config else "")
    yield "registers, spills", each(registers_text)
    yield (
        "shared memory",
        each(lambda k: explain.size(k.row.shared_bytes) if k.row.shared_bytes else ""),
    )
    yield "blocks on each SM", each(occupancy_text)
    yield "rounds", each(rounds_text)
    yield (
        "loads on their way",
        each(lambda k: f"{explain.size(k.in_flight)} per SM" if k.in_flight else ""),
    )
    yield "instructions", each(lambda k: str(len(k.code.instructions)) if k.code else "")
    yield "main loop", each(loop_text)
    yield "wgmma", each(wgmma_text)
    yield "mma.sync", counted("mma.sync")
    yield "TMA load + store", each(tma_text)
    yield "cp.async", counted("cp.async")
    yield "ldmatrix + stmatrix", counted("ldmatrix", "stmatrix")
    yield "global loads", each(lambda k: widths_text(k, "global load"))
    yield "global stores", each(lambda k: widths_text(k, "global store"))
    yield "sectors used", each(sectors_text)
    yield "shared load + store", counted("shared load", "shared store")
    yield "FFMA / FMUL / FADD", each(arithmetic_text)
    yield "exp2, rsqrt, 1/x", counted("special")
    yield "barriers + waits", counted("barrier", "wait")
    yield "local memory", counted("local memory")


def launch_text(k: Kernel) -> str:
    blocks = "?" if k.blocks is None else str(k.blocks)
    return f"{blocks} x {k.row.threads}"


def registers_text(k: Kernel) -> str:
    if k.row.registers is None:
        return ""
    spills = "not known" if k.row.spills is None else f"{k.row.spills} bytes"
    return f"{k.row.registers}, {spills}"


def occupancy_text(k: Kernel) -> str:
    if k.occupancy is None or k.resident is None or k.row.threads is None:
        return ""
    why = f"by {k.occupancy.by}" if k.resident == k.occupancy.blocks else "no more launched"
    return f"{k.resident} ({why}), {k.resident * -(-k.row.threads // 32)} of 64 warps"


def rounds_text(k: Kernel) -> str:
    if k.rounds is None:
        return ""
    pieces, workers, rounds = k.rounds
    return f"{rounds:.2f} ({pieces} on {workers})"


def loop_text(k: Kernel) -> str:
    loop = k.code.main_loop if k.code else None
    if k.code is None:
        return ""
    return f"{len(loop.instructions)} instructions" if loop else "none: straight code"


def wgmma_text(k: Kernel) -> str:
    if k.code is None:
        return f"{k.row.wgmma} (lowered)" if k.row.wgmma else ""
    return ", ".join(f"{n} of {shape}" for shape, n in k.code.wgmma.items())


def tma_text(k: Kernel) -> str:
    if not (k.row.tma_load or k.row.tma_store):
        return ""
    return f"{k.row.tma_load} + {k.row.tma_store}{'' if k.code else ' (lowered)'}"


def widths_text(k: Kernel, kind: str) -> str:
    widths = k.code.widths(kind) if k.code else {}
    return ", ".join(f"{n} of {bits // 8} bytes" for bits, n in widths.items())


def sectors_text(k: Kernel) -> str:
    wide = [a for a in k.accesses if a.useful > a.lane_bytes]
    if not wide:
        return ""
    return f"{min(a.used for a in wide):.0%} at least, of {len(wide)} accesses"


def arithmetic_text(k: Kernel) -> str:
    counts = k.code.counts if k.code else {}
    three = [counts.get(kind, 0) for kind in ("fma", "multiply", "add")]
    return " / ".join(map(str, three)) if any(three) else ""


def measured_rows(e: Explanation) -> Iterator[tuple[str, list[str]]]:
    def each(fact: Any) -> list[str]:
        return [fact(side, side.measured) if side.measured else "" for side in e.sides]

    def rates(side: Side, m: Measured) -> str:
        return (
            f"{e.cost.bytes / m.us.p50 / 1e3:.0f} GB/s, {e.cost.flops / m.us.p50 / 1e6:.1f} TFLOP/s"
        )

    def ceilings(side: Side, m: Measured) -> str:
        c = m.ceilings
        return f"{c.copy_gbps:.0f} GB/s, {c.gemm_tflops:.0f} TFLOP/s"

    def clock(side: Side, m: Measured) -> str:
        clocks = m.row.get("clocks")
        return f"{clocks['sm_mhz']['median']:.0f} MHz, {clocks['power_w']:.0f} W" if clocks else ""

    def launch(side: Side, m: Measured) -> str:
        return f"{m.row['launch_us']:.0f} us of the host" if m.row.get("launch_us") else ""

    def kernels(side: Side, m: Measured) -> str:
        told = m.row.get("launches") or []
        return ", ".join(f"{x['name']} {x['us']:.1f} us" for x in told) if len(told) > 1 else ""

    yield "measured", each(lambda side, m: f"{m.us.p50:.1f} us, {m.row['roof']:.0%} of the roof")
    yield "time by kernel", each(kernels)
    yield "reached", each(rates)
    yield "ceilings", each(ceilings)
    yield "launch", each(launch)
    yield "clock", each(clock)
    yield "from", each(lambda side, m: m.source)


# The main loops in machine code.

STYLES = {
    "load": "cyan",
    "multiply": "green",
    "wait": "yellow",
    "store": "magenta",
    "spill": "bold red",
    "compute": "blue",
}
WIDE = 120  # columns from which two listings stand side by side


def show_loops(e: Explanation, console: Console) -> None:
    """The two main loops, side by side where there is room."""

    shown = [(side, k) for side in e.sides for k in side.carriers[:1]]
    told = [f"{side.twin}: {loop_sentence(k)}" for side, k in shown]
    console.print(
        f"{e.problem.stem} {e.work.name} {e.which}, main loops. " + " ".join(told), markup=False
    )
    for side in e.sides:
        if side.why_not:
            console.print(f"{side.twin} is not shown: {side.why_not}.", markup=False)
    listings = [loop_lines(k) for _, k in shown]
    columns = [
        [Text(f"{role:8} {text}", style=STYLES.get(role, "dim")) for role, text in lines]
        for lines in listings
    ]
    if console.width >= WIDE and len(columns) > 1:
        table = Table(box=None, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
        for side, _ in shown:
            table.add_column(side.twin, ratio=1, overflow="ellipsis", no_wrap=True)
        for n in range(max(map(len, columns), default=0)):
            table.add_row(*(lines[n] if n < len(lines) else Text("") for lines in columns))
        console.print(table)
    else:
        for (side, _), lines in zip(shown, columns, strict=True):
            console.print(f"\n{side.twin}", style="bold")
            for line in lines:
                console.print(line)
    for side, k in shown:
        if text := accumulator_text(k):
            console.print(f"\n{side.twin}'s accumulator: {text}", markup=False)
    legend(e, shown, console)


def loop_sentence(k: Kernel) -> str:
    if k.code is None:
        return f"{k.row.kernel} has no machine code here (`make sass`)."
    loop = k.code.main_loop
    if loop is None:
        return f"{k.row.kernel} has no loop; all {len(k.code.instructions)} instructions are shown."
    products = loop.kinds["wgmma"] + loop.kinds["mma.sync"]
    what = f"{products} products" if products else "its loads"
    often = sum(i.address in loop.every_trip for i in loop.instructions)
    always = "" if often == len(loop.instructions) else f", {often} of them on every trip"
    return f"the innermost loop with {what} has {len(loop.instructions)} instructions{always}."


def loop_lines(k: Kernel) -> list[tuple[str, str]]:
    """(role, text) of the main loop, and of the loop that orders copies where that is another."""

    if k.code is None:
        return []
    main, copies = k.code.main_loop, k.code.copy_loop
    if main is None:
        main = sass.straight(k.code)
    found: list[tuple[str, str]] = []
    for title, loop in (("", main), ("another loop, of the threads that order copies", copies)):
        if loop is None:
            continue
        if title:
            found += [("", ""), ("", f"-- {title}:")]
        for line in sass.annotated(loop):
            found.append((line.role, f"{'? ' if line.sometimes else '  '}{line.text}"))
    return found


def accumulator_text(k: Kernel) -> str:

    loop = k.code.main_loop if k.code else None
    products = [i for i in loop.instructions if i.kind == "wgmma"] if loop else []
    held = sass.accumulator(products[0]) if products else None
    if held is None:
        return ""
    first, count = held
    shape = sass.shape_of(products[0])
    return (
        f"R{first} to R{first + count - 1} of each of 128 threads hold the float32 tile of "
        f"{shape.split('x')[0]} x {shape.split('x')[1]}. Lane l of warp w has rows 16 w + l / 4 "
        f"and 8 below. R{first} and the next: columns 2 (l mod 4) and 2 (l mod 4) + 1 of the upper "
        "row; the two after them: the same columns of the lower row; then 8 columns on, and so "
        "forth (PTX ISA, matrix fragments of wgmma)."
    )


def legend(e: Explanation, shown: Sequence[Any], console: Console) -> None:

    kinds: dict[str, str] = {}
    for _, k in shown:
        for i in k.code.instructions if k.code else ():
            kinds.setdefault(i.kind, i.name)
    if not kinds:
        return
    console.print("\nLegend (`?`: not on every trip):")
    for kind, (role, words) in sass.ROLES.items():
        if role and kind in kinds:
            line = Text(f"{role:8} ", style=STYLES.get(role, ""))
            console.print(line.append(f"{kind} ({kinds[kind]}): {words}", style="default"))


def loops_json(e: Explanation) -> dict[str, Any]:
    return {
        "loops": {
            side.twin: [
                {"role": role, "text": text}
                for k in side.carriers[:1]
                for role, text in loop_lines(k)
            ]
            for side in e.sides
        }
    }
