"""From one measured row to another: which part of the difference the rows themselves explain.

A row holds its time, its own run's ceilings, the least work, the time of each launch, and how each
was launched. From these follow, in microseconds: a faster or slower device (the ceilings), other
work, time between kernels, kernels that came or went, and bytes that counters saw. The rest is
unexplained, beside facts that changed without a time of their own: Config, registers, occupancy,
instructions.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from parity import timing
from parity.explain import Occupancy, number, size

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """One part of the difference, and the numbers it stands on. us < 0: the time became shorter."""

    what: str
    us: float
    why: str


@dataclass(frozen=True)
class Waterfall:
    before: float  # us
    after: float
    verdict: str  # FASTER, SLOWER, SAME or UNDECIDED, as `parity diff` decides
    steps: tuple[Step, ...]  # their us add up to after - before; the last is what is unexplained
    changed: tuple[str, ...]  # facts that differ, without a time
    missing: tuple[str, ...]  # what these rows do not hold


def waterfall(before: Row, after: Row) -> Waterfall:
    """Raises ValueError where the rows are not of one problem, pass and dtype, or not timed."""
    for name in ("problem", "pass", "dtype"):
        if before[name] != after[name]:
            raise ValueError(
                f"the rows are not of one {name}: {before[name]!r} and {after[name]!r} "
                "(only rows of the same work explain each other)"
            )
    for which, row in (("before", before), ("after", after)):
        if row["us"] is None:
            raise ValueError(f"the row {which} was not timed: {row.get('note', row['check'])}")
    start, end = before["us"]["p50"], after["us"]["p50"]
    steps = list(_steps(before, after))
    left = end - start - sum(step.us for step in steps)
    why = "what these rows do not hold" if steps else "these rows hold nothing that explains it"
    steps.append(Step("unexplained", left, why))
    intervals = [timing.Interval.from_json(row["us"]) for row in (after, before)]
    return Waterfall(
        start,
        end,
        timing.verdict(*intervals),
        tuple(steps),
        tuple(_changed(before, after)),
        tuple(_missing(before, after)),
    )


def _steps(before: Row, after: Row) -> Iterator[Step]:
    start = before["us"]["p50"]
    was, now = _ceilings(before), _ceilings(after)
    work, new_work = (before["flops"], before["bytes"]), (after["flops"], after["bytes"])
    least = was.least_us(*work)
    on_new_device = now.least_us(*work)
    if abs(on_new_device / least - 1) > 1e-3:
        compute = work[0] / was.gemm_tflops / 1e6 > work[1] / was.copy_gbps / 1e3
        rates = (
            f"{was.gemm_tflops:.0f} -> {now.gemm_tflops:.0f} TFLOP/s"
            if compute
            else f"{was.copy_gbps:.0f} -> {now.copy_gbps:.0f} GB/s"
        )
        yield Step("the device", start * (on_new_device / least - 1), f"ceiling {rates}")
    if work != new_work:
        ratio = (now.least_us(*new_work) - on_new_device) / least
        yield Step("the work", start * ratio, f"least bytes {size(work[1])} -> {size(new_work[1])}")
    idle, now_idle = _between(before), _between(after)
    if idle is not None and now_idle is not None and abs(now_idle - idle) > 1e-3 * start:
        kernels = f"{len(before['kernels'])} -> {len(after['kernels'])} kernels"
        why = f"{idle:.1f} -> {now_idle:.1f} us idle, {kernels}"
        yield Step("between kernels", now_idle - idle, why)
    yield from _came_and_went(before, after)
    moved, now_moved = _dram(before), _dram(after)
    if moved is not None and now_moved is not None and work == new_work:
        us = (now_moved - moved) / now.copy_gbps / 1e3
        why = f"counted {size(moved)} -> {size(now_moved)}, least {size(after['bytes'])}"
        yield Step("bytes moved", us, why)


def _came_and_went(before: Row, after: Row) -> Iterator[Step]:
    then, now = _launches(before), _launches(after)
    if not then or not now:
        return
    gone = [x for x in then if x["name"] not in {y["name"] for y in now}]
    new = [x for x in now if x["name"] not in {y["name"] for y in then}]
    if len(gone) == len(then):  # nothing in common: another kernel, not one more or less
        return
    if gone:
        told = ", ".join(f"{x['name']} {x['us']:.1f} us" for x in gone)
        yield Step("kernels gone", -sum(x["us"] for x in gone), told)
    if new:
        told = ", ".join(f"{x['name']} {x['us']:.1f} us" for x in new)
        yield Step("kernels come", sum(x["us"] for x in new), told)


def _changed(before: Row, after: Row) -> Iterator[str]:
    for name in ("workload", "impl", "device"):
        if before[name] != after[name]:
            yield f"{name}: {before[name]} -> {after[name]}"
    if before["source"] != after["source"]:
        yield f"source of the kernel: {before['source']} -> {after['source']}"
    told = before["config"] and after["config"]  # {}: nobody was asked for one
    for name in sorted({*before["config"], *after["config"]}) if told else ():
        old, new = before["config"].get(name), after["config"].get(name)
        if old != new:
            yield f"Config {name}: {old} -> {new}"
    for name in sorted({*before["versions"], *after["versions"]}):
        old, new = before["versions"].get(name), after["versions"].get(name)
        if old != new:
            yield f"{name}: {old} -> {new}"
    clocks = [row.get("clocks") or {} for row in (before, after)]
    if all(clocks) and clocks[0]["sm_mhz"]["median"] != clocks[1]["sm_mhz"]["median"]:
        mhz = [f"{c['sm_mhz']['median']:.0f}" for c in clocks]
        yield f"clock: {mhz[0]} -> {mhz[1]} MHz"
    then, now = _launches(before), _launches(after)
    names = {x["name"] for x in now}
    pairs = [
        (x, next(y for y in now if y["name"] == x["name"])) for x in then if x["name"] in names
    ]
    if len(then) == len(now) == 1 and not pairs:
        pairs = [(then[0], now[0])]
    for x, y in pairs:
        for label, old, new in (
            ("registers", x.get("registers"), y.get("registers")),
            ("shared bytes", x.get("shared_bytes"), y.get("shared_bytes")),
            ("grid", x.get("grid"), y.get("grid")),
            ("block", x.get("block"), y.get("block")),
            ("blocks on a multiprocessor", _resident(x), _resident(y)),
        ):
            if None not in (old, new) and old != new:
                yield f"{y['name']} {label}: {old} -> {new}"
        mix, new_mix = x.get("instructions") or {}, y.get("instructions") or {}
        for kind in sorted({*mix, *new_mix}) if mix and new_mix else ():
            many, now_many = mix.get(kind, 0), new_mix.get(kind, 0)
            if many != now_many:
                yield f"{y['name']} {kind}: {many} -> {now_many} instructions"


def _missing(before: Row, after: Row) -> Iterator[str]:
    rows = (before, after)
    if not all(_launches(row) for row in rows):
        yield "the time and shape of each launch (rows measured since `launches` was added have it)"
    elif not all(x.get("instructions") for row in rows for x in _launches(row)):
        yield "the instruction mix (`parity explain --out FILE` on a GPU adds it)"
    if any(_dram(row) is None for row in rows):
        yield "the bytes that memory moved (`parity explain --ncu --out FILE` adds them)"
    if not all(row.get("clocks") for row in rows):
        yield "clocks"


def _ceilings(row: Row) -> timing.Ceilings:
    names = ("copy_gbps", "read_gbps", "gemm_tflops")
    return timing.Ceilings(**{name: row["ceilings"][name] for name in names})


def _launches(row: Row) -> list[dict[str, Any]]:
    """The launches under the names that both twins have in common."""
    return [
        dict(x, name=x["name"].removeprefix("_").removesuffix("_mosaic_gpu_kernel"))
        for x in row.get("launches") or []
    ]


def _between(row: Row) -> float | None:
    return row["us"]["p50"] - row["busy_us"] if row.get("busy_us") is not None else None


def _dram(row: Row) -> float | None:
    counted = [x.get("dram_bytes") for x in _launches(row)]
    known = [x for x in counted if x is not None]
    return sum(known) if known and len(known) == len(counted) else None


def _resident(launch: Mapping[str, Any]) -> int | None:
    block = launch.get("block")
    if not block or launch.get("registers") is None:
        return None
    threads = block[0] * block[1] * block[2]
    return Occupancy.of(threads, launch["registers"], launch.get("shared_bytes")).blocks


def bar(step: Step, most: float, width: int = 20) -> str:
    """A bar as long as its share of the longest step."""
    filled = round(width * abs(step.us) / most) if most else 0
    return ("-" if step.us < 0 else "+") * filled


def signed(us: float) -> str:
    return f"{'+' if us >= 0 else '-'}{number(abs(us))} us"
