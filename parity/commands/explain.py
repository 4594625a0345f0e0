"""`parity explain`: why the twins are as fast as they are, and what sets them apart."""

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from parity.commands.shared import (
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

if TYPE_CHECKING:
    import rich.console
    import rich.table

    from parity.explain import Explanation, Kernel, Measured, Side
    from parity.spec import Problem, Workload


def run(args: Namespace) -> int:
    problem, work = chosen(args)
    passes = [args.which] if args.which else list(work.passes)
    impls = implementations(args)
    twins = (args.twin,) if args.twin else TWINS
    from parity import explain

    rows, missing = compiled(problem, work, passes, twins, impls)
    measured = known(args, problem, work, passes, impls or {})
    found = [
        explain.explanation(
            problem,
            work,
            which,
            rows,
            measured[which],
            listing=listing_of,
            foreign=tuple(impls or ()),
            why_not=missing,
        )
        for which in passes
    ]
    broken = any(row.fails for row in rows)
    if args.json:
        print_json({"ok": not broken, "explanations": [explain.as_json(e) for e in found]})
    else:
        console = console_of()
        console.print(heading(problem, work, found), markup=False)
        for e in found:
            show(e, console)
    return FAILED if broken else PASS


# What was asked.


def chosen(args: Namespace) -> tuple["Problem", "Workload"]:
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
    problem: "Problem",
    work: "Workload",
    passes: Sequence[str],
    twins: Sequence[str],
    impls: Mapping[str, str] | None,
) -> tuple[list[Any], dict[str, str]]:
    """The compile gate's rows of one workload, and why a twin has none."""
    from parity.compile import compile_gate

    able = runnable(tuple(twins), "cpu")
    with progress(len(twins), "compile") as tell:
        rows = compile_gate(
            [problem],
            workloads=[work.name],
            twins=[twin for twin in twins if not able[twin]],
            passes=passes,
            implementations=impls,
            progress=lambda done, _, what: tell(what, done),
        )
    return rows, {twin: why for twin, why in able.items() if why}


def listing_of(row: Any) -> str:
    from parity.compile import CACHE

    return (CACHE / row.listing).read_text() if row.listing else ""


def known(
    args: Namespace,
    problem: "Problem",
    work: "Workload",
    passes: Sequence[str],
    impls: Mapping[str, str],
) -> dict[str, dict[str, "Measured"]]:
    """pass -> twin -> its measured row, of the committed records; nobody recorded an --impl."""
    from parity import explain

    found = {which: explain.recorded(problem, work, which) for which in passes}
    for rows in found.values():
        for twin in list(rows):
            if twin in impls or (args.twin and twin != args.twin):
                del rows[twin]
    return found


# What is shown.


def heading(problem: "Problem", work: "Workload", found: Sequence["Explanation"]) -> str:
    from parity import explain

    sizes = ", ".join(f"{letter} {size}" for letter, size in work.sizes.items())
    said = "\n".join(explain.conclusion(e) for e in found)
    return f"{problem.stem} {work.name} ({sizes}, {work.dtype}), for an H200:\n{said}"


def show(e: "Explanation", console: "rich.console.Console") -> None:
    console.print()
    console.print(fact_table(e, console.width))
    for sentence in e.sentences:
        style = "bold red" if sentence.cause else None
        console.print(f"* {sentence.text}", style=style, markup=False)


def fact_table(e: "Explanation", width: int) -> "rich.table.Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
    table.add_column(e.which, style="bold", no_wrap=width >= 70)
    for side in e.sides:
        table.add_column(side.twin, ratio=1, overflow="fold")
    for label, values in fact_rows(e):
        if any(values):
            table.add_row(label, *(Text(v or "-") for v in values))
    return table


def fact_rows(e: "Explanation") -> Iterator[tuple[str, list[str]]]:
    """(what, one text a twin) of one pass."""
    from parity import explain

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
        yield "least time", [f"{e.least_us:.1f} us" for _ in e.sides]
    yield from measured_rows(e)


def kernel_rows(
    e: "Explanation", kernels: Sequence["Kernel | None"]
) -> Iterator[tuple[str, list[str]]]:
    from parity import explain

    def each(fact: Any) -> list[str]:
        return [fact(k) if k is not None else "" for k in kernels]

    def counted(*kinds: str) -> list[str]:
        def text(k: "Kernel") -> str:
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


def launch_text(k: "Kernel") -> str:
    blocks = "?" if k.blocks is None else str(k.blocks)
    return f"{blocks} x {k.row.threads}"


def registers_text(k: "Kernel") -> str:
    return "" if k.row.registers is None else f"{k.row.registers}, {k.row.spills or 0} bytes"


def occupancy_text(k: "Kernel") -> str:
    if k.occupancy is None or k.resident is None or k.row.threads is None:
        return ""
    why = f"by {k.occupancy.by}" if k.resident == k.occupancy.blocks else "no more launched"
    return f"{k.resident} ({why}), {k.resident * -(-k.row.threads // 32)} of 64 warps"


def rounds_text(k: "Kernel") -> str:
    if k.rounds is None:
        return ""
    pieces, workers, rounds = k.rounds
    return f"{rounds:.2f} ({pieces} on {workers})"


def loop_text(k: "Kernel") -> str:
    loop = k.code.main_loop if k.code else None
    if k.code is None:
        return ""
    return f"{len(loop.instructions)} instructions" if loop else "none: straight code"


def wgmma_text(k: "Kernel") -> str:
    if k.code is None:
        return f"{k.row.wgmma} (lowered)" if k.row.wgmma else ""
    return ", ".join(f"{n} of {shape}" for shape, n in k.code.wgmma.items())


def tma_text(k: "Kernel") -> str:
    if not (k.row.tma_load or k.row.tma_store):
        return ""
    return f"{k.row.tma_load} + {k.row.tma_store}{'' if k.code else ' (lowered)'}"


def widths_text(k: "Kernel", kind: str) -> str:
    widths = k.code.widths(kind) if k.code else {}
    return ", ".join(f"{n} of {bits // 8} bytes" for bits, n in widths.items())


def sectors_text(k: "Kernel") -> str:
    wide = [a for a in k.accesses if a.useful > a.lane_bytes]
    if not wide:
        return ""
    return f"{min(a.used for a in wide):.0%} at least, of {len(wide)} accesses"


def arithmetic_text(k: "Kernel") -> str:
    counts = k.code.counts if k.code else {}
    three = [counts.get(kind, 0) for kind in ("fma", "multiply", "add")]
    return " / ".join(map(str, three)) if any(three) else ""


def measured_rows(e: "Explanation") -> Iterator[tuple[str, list[str]]]:
    def each(fact: Any) -> list[str]:
        return [fact(side, side.measured) if side.measured else "" for side in e.sides]

    def rates(side: "Side", m: "Measured") -> str:
        return (
            f"{e.cost.bytes / m.us.p50 / 1e3:.0f} GB/s, {e.cost.flops / m.us.p50 / 1e6:.1f} TFLOP/s"
        )

    def ceilings(side: "Side", m: "Measured") -> str:
        c = m.ceilings
        return f"{c.copy_gbps:.0f} GB/s, {c.gemm_tflops:.0f} TFLOP/s"

    def clock(side: "Side", m: "Measured") -> str:
        clocks = m.row.get("clocks")
        return f"{clocks['sm_mhz']['median']:.0f} MHz, {clocks['power_w']:.0f} W" if clocks else ""

    def launch(side: "Side", m: "Measured") -> str:
        return f"{m.row['launch_us']:.0f} us of the host" if m.row.get("launch_us") else ""

    def kernels(side: "Side", m: "Measured") -> str:
        told = m.row.get("launches") or []
        return ", ".join(f"{x['name']} {x['us']:.1f} us" for x in told) if len(told) > 1 else ""

    yield "measured", each(lambda side, m: f"{m.us.p50:.1f} us, {m.row['roof']:.0%} of the roof")
    yield "time by kernel", each(kernels)
    yield "reached", each(rates)
    yield "ceilings", each(ceilings)
    yield "launch", each(launch)
    yield "clock", each(clock)
    yield "from", each(lambda side, m: m.source)
