"""Why is a kernel as fast as it is: facts of both twins, and the sentences that follow from them.

Facts come from the compile gate (registers, shared memory, machine code), from arithmetic (how many
blocks a multiprocessor holds, rounds and the last, half-empty one, the least work, what a Config
reads twice) and from a measured row, a committed or a fresh one. Every sentence cites the number it
stands on. A cause is named only where its rule holds, and what is left over of the measured time is
printed as unexplained.

Nothing here needs a GPU or a framework. The limits of a multiprocessor are from the CUDA C++
Programming Guide's table for compute capability 9.0; that so many bytes must be on their way to
keep memory busy is Little's law, as Volkov applied it to GPUs (GTC 2010).
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from parity import ptx, record, sass, timing
from parity.compile import TWINS, CompileRow
from parity.spec import Cost, Launch, Plan, Problem, Workload

SMS = 132  # of an H200, and of the compile gate
THREADS, WARPS, BLOCKS = 2048, 64, 32  # that one multiprocessor holds
REGISTERS = 65536  # of a multiprocessor, handed out to warps by 256
SHARED = 228 * 1024  # bytes of a multiprocessor, handed out by 128; each block costs 1 KB more
L1 = 256 * 1024  # bytes of a multiprocessor, shared memory among them
L2 = 60 * 1024 * 1024  # bytes, as an H200's driver tells
# Cycles from a load to its data when nobody else asks: Luo et al., arXiv:2402.13499, on an H100.
LATENCY_CYCLES, CLOCK_GHZ = 479, 1.98
LATENCY_NS = LATENCY_CYCLES / CLOCK_GHZ
WORTH_TELLING = 0.02  # of the time or the bytes: what is smaller is not worth a sentence
IDLE = 0.10  # of the multiprocessors, without work: worth naming


@dataclass(frozen=True)
class Occupancy:
    """How many blocks fit a multiprocessor, and what runs out first."""

    blocks: int
    by: str

    @staticmethod
    def of(threads: int, registers: int | None, shared_bytes: int | None) -> "Occupancy":
        """registers None: not known, so that only the other limits count."""
        warps = -(-threads // 32)
        limits = {"threads": min(THREADS // threads, WARPS // warps), "blocks": BLOCKS}
        if registers:
            for_a_warp = -(-registers * 32 // 256) * 256
            limits["registers"] = REGISTERS // for_a_warp // warps
        if shared_bytes:
            limits["shared memory"] = SHARED // (-(-shared_bytes // 128) * 128 + 1024)
        by = min(limits, key=lambda name: limits[name])
        return Occupancy(limits[by], by)


@dataclass(frozen=True)
class Kernel:
    """One launch of one twin: what the compilers and arithmetic tell about it."""

    row: CompileRow
    listing: str = ""
    plan: Plan | None = None

    @cached_property
    def code(self) -> sass.Code | None:
        code = sass.parse(self.listing)
        return code if code.instructions else None

    @cached_property
    def accesses(self) -> list[ptx.Access]:
        return ptx.accesses(self.listing)

    @property
    def blocks(self) -> int | None:
        """How many blocks the launch has; None where the grid is computed on the device."""
        sizes = [n for n in self.row.grid or () if n is not None]
        return math.prod(sizes) if sizes and len(sizes) == len(self.row.grid or ()) else None

    @property
    def occupancy(self) -> Occupancy | None:
        row = self.row
        return Occupancy.of(row.threads, row.registers, row.shared_bytes) if row.threads else None

    @property
    def resident(self) -> int | None:
        """Blocks on one multiprocessor, where there are enough of them."""
        if self.occupancy is None or self.blocks is None:
            return None
        return min(self.occupancy.blocks, -(-self.blocks // SMS))

    @property
    def rounds(self) -> tuple[int, int, float] | None:
        """(pieces of work, workers that are there at a time, how often they go round)."""
        if not self.resident or not self.blocks:
            return None
        workers = min(self.blocks, self.resident * SMS)
        pieces = self.blocks
        if self.plan is not None and self.plan.tiles > self.blocks:  # blocks walk over tiles
            pieces = self.plan.tiles
        return pieces, workers, pieces / workers

    @property
    def idle_at_last(self) -> int:
        """How many multiprocessors have no work in the last round."""
        if self.rounds is None or self.rounds[2] <= 1:
            return 0
        pieces, workers, rounds = self.rounds
        left = pieces - math.floor(rounds) * workers
        return max(0, min(SMS, workers) - left) if left else 0

    @property
    def tail(self) -> float:
        """That, as a share of all rounds' time."""
        return self.idle_at_last / SMS / math.ceil(self.rounds[2]) if self.rounds else 0.0

    @property
    def again(self) -> float:
        """Bytes read twice. A ring of shared memory that TMA fills leaves that to arithmetic;
        without one the code must show two walks."""
        if self.plan is None or not self.plan.again:
            return 0.0
        ring = self.code is None or self.code.counts.get("TMA load", 0) > 0
        return self.plan.again if ring or ptx.read_twice(self.listing) else 0.0

    @property
    def kept_in(self) -> str:
        """The first cache that holds what all blocks read until they come back to it: "L1", "L2",
        or "" for none. L2 is shared with what is written meanwhile: half of it counts."""
        if self.plan is None or self.resident is None or self.blocks is None:
            return ""
        shared = self.resident * ((self.row.shared_bytes or 0) + 1024)
        if self.resident * self.plan.window <= L1 - shared:
            return "L1"
        return "L2" if self.in_work <= L2 / 2 else ""

    @property
    def in_work(self) -> float:
        """Bytes that all blocks there at a time read until they come back to the first."""
        if self.plan is None or self.resident is None or self.blocks is None:
            return 0.0
        return min(self.blocks, self.resident * SMS) * self.plan.window

    @property
    def in_flight(self) -> int | None:
        """Bytes of loads that can be on their way to one multiprocessor; None if not to be told.

        Loads to registers: those of a loop's longest run without a use of what was loaded. Copies
        to shared memory: no more than it holds.
        """
        if self.code is None or not self.resident or not self.row.threads:
            return None
        counts = self.code.counts
        if counts.get("TMA load") or counts.get("cp.async"):
            return (self.row.shared_bytes or 0) * self.resident
        if not counts.get("global load"):
            return None
        return longest_batch(self.code) // 8 * self.row.threads * self.resident


def longest_batch(code: sass.Code) -> int:
    """Bits that one thread can have on their way: loads up to the first use of any of them."""
    most = 0
    for block in code.blocks:
        waiting: set[str] = set()
        bits = 0
        for i in block:
            if bits and waiting & set(sass.registers_read(i)):
                most, bits, waiting = max(most, bits), 0, set()
            if i.kind == "global load":
                waiting |= set(sass.registers_written(i))
                bits += i.bits
        most = max(most, bits)
    return most


@dataclass(frozen=True)
class Measured:
    """A measured row, and where it is from."""

    row: Mapping[str, Any]
    source: str  # "parity/records/nvidia_h200/softmax.jsonl:12" or "measured now"

    @property
    def us(self) -> timing.Interval:
        return timing.Interval.from_json(self.row["us"])

    @property
    def ceilings(self) -> timing.Ceilings:
        return timing.Ceilings(**{k: self.row["ceilings"][k] for k in _CEILINGS})

    @property
    def moved(self) -> float | None:
        """Bytes that memory moved, where counters saw every launch."""
        counted = [x.get("dram_bytes") for x in self.row.get("launches") or []]
        return sum(counted) if counted and None not in counted else None


_CEILINGS = ("copy_gbps", "read_gbps", "gemm_tflops")


@dataclass(frozen=True)
class Side:
    """One twin on one pass."""

    twin: str
    kernels: tuple[Kernel, ...]
    measured: Measured | None = None
    why_not: str = ""  # why there is nothing to show

    @property
    def again(self) -> float:
        return sum(k.again for k in self.kernels)

    @property
    def shared(self) -> float:
        return sum(k.plan.shared for k in self.kernels if k.plan)

    @property
    def extra(self) -> float:
        return sum(k.plan.extra for k in self.kernels if k.plan)

    @property
    def current(self) -> Measured | None:
        """What was measured, if it was measured of this Config."""
        if self.measured is None or not self.kernels:
            return None
        then = self.measured.row["config"]
        configs = [k.row.config for k in self.kernels]
        several = then and all(isinstance(c, dict) for c in then.values())
        known = list(then.values()) if several else [then]
        return self.measured if not then or all(c in configs for c in known) else None

    @property
    def carriers(self) -> list[Kernel]:
        """The kernels that carry the work: those with a plan, or else all."""
        return [k for k in self.kernels if k.plan] or list(self.kernels)


@dataclass(frozen=True)
class Sentence:
    """One true sentence. `topic` is a word to find it by, `cause` says that it names a fault."""

    topic: str
    twin: str  # "" for both
    text: str
    cause: bool = False
    numbers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """A share of the measured time. `least`: what the work needs; else at most so much."""

    what: str
    us: float
    at_most: bool = False


@dataclass(frozen=True)
class Explanation:
    """Everything there is to say about one pass of one workload."""

    problem: Problem
    work: Workload
    which: str
    cost: Cost
    sides: tuple[Side, ...]
    ceilings: timing.Ceilings | None = None
    ceilings_source: str = ""
    counted: tuple[Sentence, ...] = ()  # what hardware counters say

    @property
    def compute_bound(self) -> bool:
        """By the ceilings, which side of the roof's ridge the work is on."""
        c = self.ceilings
        return c is not None and self.cost.flops / self.cost.bytes > ridge(c)

    @property
    def least_us(self) -> float | None:
        return self.ceilings and self.ceilings.least_us(self.cost.flops, self.cost.bytes)

    @cached_property
    def sentences(self) -> list[Sentence]:
        found = [s for rule in RULES for s in rule(self)]
        once = {s.text: s for s in found}  # two launches of one kernel say the same
        return [*once.values(), *self.counted]

    @property
    def beside_us(self) -> float:
        """What memory takes for the least bytes, where the tensor cores take longer and that is
        worth telling; else 0."""
        if self.ceilings is None or self.least_us is None or not self.compute_bound:
            return 0.0
        us = self.cost.bytes / self.ceilings.copy_gbps / 1e3
        return us if us >= IDLE * self.least_us else 0.0

    def accounts(self, side: Side) -> list[Part]:
        """Where a side's measured time went, as far as that can be told; the last part is what
        cannot."""
        if side.current is None:
            return []
        us, c = side.current.us.p50, side.current.ceilings
        parts = [Part("the least work at the ceiling", c.least_us(*_work(self.cost)))]
        busy = side.current.row.get("busy_us")
        if busy and len(side.kernels) > 1 and us - busy > 0.001 * us:
            parts.append(Part("between kernels", us - busy))
        if self.beside_us:
            parts.append(Part("memory traffic beside it", self.beside_us, at_most=True))
        moved = side.current.moved
        if not self.compute_bound and moved is not None:
            more = max(0.0, moved - self.cost.bytes) / c.copy_gbps / 1e3
            parts.append(Part("more bytes than the least, counted", more))
        elif not self.compute_bound:
            missed = sum(k.again for k in side.kernels if k.kept_in != "L1")
            for what, moved in (("intermediate results", side.extra), ("second reads", missed)):
                if moved:
                    parts.append(Part(what, moved / c.copy_gbps / 1e3, at_most=True))
        tail = max((k.tail for k in side.carriers), default=0.0)
        if tail:
            parts.append(Part("the last round", tail * us, at_most=True))
        sure = sum(p.us for p in parts if not p.at_most)
        parts = [
            Part(p.what, min(p.us, max(0.0, us - sure)), True) if p.at_most else p for p in parts
        ]
        left = us - sum(p.us for p in parts)
        return [*parts, Part("unexplained", max(0.0, left))]


def ridge(ceilings: timing.Ceilings) -> float:
    """FLOPs a byte where memory and tensor cores take equally long."""
    return ceilings.gemm_tflops * 1e3 / ceilings.copy_gbps


def _work(cost: Cost) -> tuple[float, float]:
    return cost.flops, cost.bytes


# Measured rows.


def numbered_rows(path: Path) -> Iterator[tuple[int, record.Row]]:
    """(line, row) of the good rows of a record file."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        for row in record.parse(line).rows:
            yield number, row


def recorded(
    problem: Problem, work: Workload, which: str, root: Path = record.RECORDS
) -> dict[str, Measured]:
    """twin -> the committed row that stands for a pass, the newest where several devices have one.

    Rows of peers are left out; so are rows where nothing was timed.
    """
    found: dict[str, Measured] = {}
    for path in sorted(root.glob(f"*/{problem.stem}.jsonl")):
        for number, row in numbered_rows(path):
            here = (row["workload"], row["pass"]) == (work.name, which)
            if not here or row["us"] is None or row["impl"].startswith("peer:"):
                continue
            known = found.get(row["impl"])
            if known is None or known.row["when"] <= row["when"]:
                place = "/".join(path.parts[-4:])
                found[row["impl"]] = Measured(row, f"{place}:{number}")
    return found


def ceilings_for(
    problem: Problem, measured: Mapping[str, Measured], root: Path = record.RECORDS
) -> tuple[timing.Ceilings | None, str]:
    """Ceilings of the run that measured this pass; without one, of the newest row of the problem,
    or else of any."""
    for known in measured.values():
        return known.ceilings, known.source
    paths = sorted(root.glob(f"*/{problem.stem}.jsonl")) or sorted(root.glob("*/*.jsonl"))
    rows = [(row["when"], str(path), n, row) for path in paths for n, row in numbered_rows(path)]
    timed = [r for r in rows if r[3].get("ceilings")]
    if not timed:
        return None, ""
    _, path, number, row = max(timed, key=lambda r: r[:3])
    source = "/".join(Path(path).parts[-4:])
    return timing.Ceilings(**{k: row["ceilings"][k] for k in _CEILINGS}), f"{source}:{number}"


def explanation(
    problem: Problem,
    work: Workload,
    which: str,
    rows: Sequence[CompileRow],
    measured: Mapping[str, Measured],
    *,
    listing: Callable[[CompileRow], str],
    foreign: Sequence[str] = (),
    why_not: Mapping[str, str] | None = None,
    counted: Sequence[Sentence] = (),
) -> Explanation:
    """Puts the facts of one pass together.

    rows: of the compile gate, of this workload; other passes are left out.
    measured: twin -> its measured row.
    listing: gives the text that a row's listing names.
    foreign: twins in whose place somebody's own kernel stands: the problem's plan is not theirs.
    why_not: twin -> why it has no rows.
    counted: sentences from hardware counters.
    """
    sides = []
    twins: list[str] = [*(why_not or {}), *(row.twin for row in rows)]
    for twin in sorted(set(twins), key=TWINS.index):
        own = [row for row in rows if (row.twin, row.which) == (twin, which)]
        if twin in measured:
            own = _with_registers(own, measured[twin].row.get("launches") or [])
        kernels = []
        for number, row in enumerate(own):
            kernel = Kernel(row, listing(row))
            plan = None
            if problem.plan is not None and kernel.blocks is not None and twin not in foreign:
                launch = Launch(twin, kernel.row.kernel, number, kernel.blocks, row.config)
                plan = problem.plan(work, which, launch)
            kernels.append(Kernel(row, kernel.listing, plan))
        why = (why_not or {}).get(twin, "")
        sides.append(Side(twin, tuple(kernels), measured.get(twin), why))
    ceilings, source = ceilings_for(problem, measured)
    cost = problem.cost(work, which)
    return Explanation(problem, work, which, cost, tuple(sides), ceilings, source, tuple(counted))


def _with_registers(rows: list[CompileRow], launches: list[Any]) -> list[CompileRow]:
    """Where only a lowered module is known, the profiler's registers of the kernels that ran."""
    found, left = [], list(launches)
    for row in rows:
        launch = next((x for x in left if row.kernel in x["name"]), None)
        if launch is not None:
            left.remove(launch)
            if row.registers is None:
                row = dataclasses.replace(row, registers=launch.get("registers"))
        found.append(row)
    return found


# The rules. Each looks at the facts and says nothing unless its condition holds.


def _bound(e: Explanation) -> Iterator[Sentence]:
    if e.ceilings is None or e.least_us is None:
        yield Sentence(
            "bound",
            "",
            f"No record holds ceilings of a device, so that {size(e.cost.bytes)} and "
            f"{flops(e.cost.flops)} have no least time yet (`parity bench` measures them).",
        )
        return
    c, intensity = e.ceilings, e.cost.flops / e.cost.bytes
    if e.compute_bound:
        why = f"{flops(e.cost.flops)} at {c.gemm_tflops:.0f} TFLOP/s"
    else:
        why = f"{size(e.cost.bytes)} at {c.copy_gbps:.0f} GB/s"
    yield Sentence(
        "bound",
        "",
        f"The work is bound by {'the tensor cores' if e.compute_bound else 'memory'}: "
        f"{number(intensity)} FLOPs a byte, and the roof bends at {ridge(c):.0f}. It takes at "
        f"least {e.least_us:.1f} us ({why}, the ceilings of {e.ceilings_source}).",
        numbers={"intensity": intensity, "ridge": ridge(c), "least_us": e.least_us},
    )


def _beside(e: Explanation) -> Iterator[Sentence]:
    if e.beside_us and e.ceilings:
        yield Sentence(
            "beside",
            "",
            f"Its {size(e.cost.bytes)} take memory {e.beside_us:.1f} us at "
            f"{e.ceilings.copy_gbps:.0f} GB/s: where tiles are not stored while the next are "
            "multiplied, the two times add up.",
            numbers={"us": e.beside_us},
        )


def _compiled(e: Explanation) -> Iterator[Sentence]:
    for side in e.sides:
        if side.why_not:
            yield Sentence("missing", side.twin, f"{side.twin} is not shown: {side.why_not}.")
        for k in side.kernels:
            if k.row.fails and not (k.row.spills or k.row.local or k.row.serialised_wgmma):
                text = f"{side.twin}'s {k.row.kernel} does not compile: {k.row.message}"
                yield Sentence("broken", side.twin, text.rstrip(".") + ".", cause=True)
        if any(k.row.status == "lowered" for k in side.kernels):
            ran = all(k.row.registers for k in side.kernels)
            yield Sentence(
                "missing",
                side.twin,
                f"{side.twin}'s {'' if ran else 'registers, '}spills and machine code are not "
                "known here: there is no ptxas for it (`make sass` installs one). Grid, threads, "
                "shared memory and the counts shown are those of the lowered module.",
            )


def _spills(e: Explanation) -> Iterator[Sentence]:
    for side, k in _kernels(e):
        if k.row.serialised_wgmma:
            yield Sentence(
                "serialised",
                side.twin,
                f"{side.twin}'s {k.row.kernel} waits for each product before the next: ptxas "
                f"serialised its wgmma ({k.row.registers} registers a thread).",
                cause=True,
            )
        if not (k.row.spills or k.row.local):
            continue
        moved = f"{k.row.spills} bytes of spill code" if k.row.spills else "an array in memory"
        yield Sentence(
            "spills",
            side.twin,
            f"{side.twin}'s {k.row.kernel} spills: {k.row.registers} registers a thread are not "
            f"enough, and {k.row.local or 'some'} instructions move what did not fit to local "
            f"memory and back ({moved}, a stack of {k.row.stack} bytes a thread). A smaller tile, "
            "or the same tile over more warps, needs fewer.",
            cause=True,
            numbers={"registers": k.row.registers, "local": k.row.local, "spills": k.row.spills},
        )


def _scattered(e: Explanation) -> Iterator[Sentence]:
    for side, k in _kernels(e):
        everything = sum(a.useful for a in k.accesses)
        bad = [a for a in k.accesses if a.scattered]
        share = sum(a.useful for a in bad) / everything if everything else 0.0
        if share < IDLE:
            continue
        worst = max(bad, key=lambda a: a.sectors / a.useful)
        yield Sentence(
            "uncoalesced",
            side.twin,
            f"{side.twin}'s {k.row.kernel} is uncoalesced: a warp's {worst.kind} of "
            f"{worst.useful} bytes touches {worst.sectors} sectors of {ptx.SECTOR} bytes, and "
            f"{worst.used:.0%} of what moves is used ({len(bad)} of {len(k.accesses)} accesses to "
            "memory are like that). Neighbouring lanes should read neighbouring columns.",
            cause=True,
            numbers={"useful": worst.useful, "sectors": worst.sectors, "accesses": len(bad)},
        )


def _narrow(e: Explanation) -> Iterator[Sentence]:
    for side, k in _kernels(e):
        loads = [a for a in k.accesses if a.kind == "load" and a.useful > a.lane_bytes]
        narrow = [a for a in loads if a.lane_bytes < 8 and not a.scattered]
        if k not in side.carriers or 2 * len(narrow) <= len(loads):
            continue
        if k.row.tma_load:  # operands come that way, and these are numbers about them
            continue
        lane = max(a.lane_bytes for a in narrow)
        yield Sentence(
            "narrow",
            side.twin,
            f"{side.twin}'s {k.row.kernel} loads {lane} bytes a lane in {len(narrow)} of "
            f"{len(loads)} loads, where 16 would be one instruction: {16 // lane} times the "
            "instructions for the same bytes.",
            numbers={"lane_bytes": lane},
        )


def _occupied(e: Explanation) -> Iterator[Sentence]:
    for side in e.sides:
        for k in side.carriers:
            if k.blocks is None or k.resident is None or k.occupancy is None:
                continue
            threads = k.row.threads or 0
            warps = k.resident * -(-threads // 32)
            idle = 1 - k.blocks / SMS
            if idle >= IDLE:
                yield Sentence(
                    "under-occupied",
                    side.twin,
                    f"{side.twin}'s {k.row.kernel} leaves the device under-occupied: {k.blocks} "
                    f"block{'s' * (k.blocks > 1)} for {SMS} multiprocessors, of which "
                    f"{SMS - k.blocks} have nothing to do.",
                    cause=True,
                    numbers={"blocks": k.blocks},
                )
                continue
            if e.compute_bound or e.ceilings is None or k.in_flight is None:
                continue
            need = LATENCY_NS * read_share(e) * e.ceilings.copy_gbps / SMS  # bytes
            if k.in_flight >= need:
                continue
            scarce = (
                f"{k.blocks} blocks were launched"
                if k.resident < k.occupancy.blocks
                else f"{k.occupancy.by} let no more in"
            )
            yield Sentence(
                "under-occupied",
                side.twin,
                f"{side.twin}'s {k.row.kernel} leaves multiprocessors under-occupied: {warps} of "
                f"{WARPS} warps each ({scarce}), and at most {size(k.in_flight)} of loads on their "
                f"way to each. Memory answers after {LATENCY_NS:.0f} ns at best, so that "
                f"{size(need)} would have to be, and no more than {k.in_flight / need:.0%} of the "
                "bandwidth can be reached.",
                cause=True,
                numbers={"warps": warps, "in_flight": k.in_flight, "needed": need},
            )


def read_share(e: Explanation) -> float:
    """How much of the least bytes is read, and not written."""
    work = e.work
    results = e.problem.results(work, e.which).values()
    written = sum(math.prod(a.shape) * itemsize(a.dtype) for a in results)
    return max(0.0, 1 - written / e.cost.bytes)


def _tail(e: Explanation) -> Iterator[Sentence]:
    for text, twins in _alike(_tail_of(e)).items():
        yield Sentence(
            "tail", twins[0] if len(twins) == 1 else "", f"{' and '.join(twins)}: {text}"
        )


def _tail_of(e: Explanation) -> Iterator[tuple[str, str]]:
    for side in e.sides:
        for k in side.carriers:
            if k.rounds is None or k.tail < WORTH_TELLING:
                continue
            pieces, workers, rounds = k.rounds
            what = "tiles" if k.plan and pieces == k.plan.tiles else "blocks"
            where = "multiprocessors" if workers == SMS else f"places ({k.resident} blocks on each)"
            yield (
                side.twin,
                f"{pieces} {what} on {workers} {where} are {rounds:.2f} rounds. In the last, round "
                f"{math.ceil(rounds)}, {k.idle_at_last} of {SMS} multiprocessors have nothing to "
                f"do: that costs up to {k.tail:.1%} of the time.",
            )


def _alike(said: Iterator[tuple[str, str]]) -> dict[str, list[str]]:
    """text -> the twins of which it is true, each once."""
    found: dict[str, list[str]] = {}
    for twin, text in said:
        twins = found.setdefault(text, [])
        if twin not in twins:
            twins.append(twin)
    return found


def _again(e: Explanation) -> Iterator[Sentence]:
    if e.compute_bound:
        return
    for side in e.sides:
        if side.again < WORTH_TELLING * e.cost.bytes:
            continue
        k = max(side.kernels, key=lambda k: k.again)
        most = e.cost.bytes / (e.cost.bytes + side.again)
        window = k.plan.window if k.plan else 0.0
        text = (
            f"{side.twin} reads {size(side.again)} twice, beside the {size(e.cost.bytes)} that the "
            f"work needs. "
        )
        if k.kept_in == "L1":
            text += (
                f"A multiprocessor works on {k.resident} x {size(window)} at a time, which fit its "
                f"{size(L1)} of L1: the second read should cost no memory traffic."
            )
        else:
            text += (
                f"{k.resident} x {size(window)} on each multiprocessor are more than its L1 holds, "
                f"and all that is at work comes to {size(k.in_work)} of the {size(L2)} of L2, "
                "through which goes what is written, too. If no second read hit, "
                f"{most:.0%} of the roof would be the most."
            )
        if side.current is not None and side.current.moved is not None:
            counted = side.current.moved
            missed = min(1.0, max(0.0, counted - e.cost.bytes) / side.again)
            text += (
                f" Counted: memory moved {size(counted)}, so that {1 - missed:.0%} of the second "
                "reads or more were answered by a cache."
            )
        elif side.current is not None:
            us, gbps = side.current.us.p50, side.current.ceilings.copy_gbps
            moved = us * gbps * 1e3
            hit = 1 - max(0.0, moved - e.cost.bytes) / side.again
            if hit > 0:
                text += (
                    f" In its {us:.1f} us memory can have moved {size(moved)}: at least {hit:.0%} "
                    "of the second reads were answered by a cache."
                )
        yield Sentence("read twice", side.twin, text, numbers={"again": side.again, "most": most})


def _operands(e: Explanation) -> Iterator[Sentence]:
    if not any(side.shared >= 0.1 * e.cost.bytes for side in e.sides):
        return
    parts = []
    for side in e.sides:
        if not side.shared:
            continue
        text = f"{side.twin}'s blocks ask for {size(side.shared)}"
        if side.current is not None and e.compute_bound:
            text += f" ({side.shared / side.current.us.p50 / 1e6:.1f} TB/s)"
        parts.append(text)
    yield Sentence(
        "operands",
        "",
        f"What many blocks read alike comes mostly from L2: {', '.join(parts)}, beside "
        f"{size(e.cost.bytes)} that must cross memory's pins once.",
        numbers={side.twin: side.shared for side in e.sides},
    )


def _intermediate(e: Explanation) -> Iterator[Sentence]:
    told = [s for s in e.sides if s.extra >= WORTH_TELLING * e.cost.bytes]
    if not told:
        return
    parts = [
        f"{s.twin} {size(s.extra / 2)} ({s.extra / e.cost.bytes:.1%} more bytes)" for s in told
    ]
    yield Sentence(
        "intermediate",
        told[0].twin if len(told) == 1 else "",
        f"Partial sums are written and read again by the next kernel: {', '.join(parts)}; L2 may "
        "keep them.",
        numbers={s.twin: s.extra for s in told},
    )


def _unfused(e: Explanation) -> Iterator[Sentence]:
    for side, k in _kernels(e):
        if k.code is None or k.code.unfused < 8:
            continue
        fused = k.code.counts.get("fma", 0)
        yield Sentence(
            "unfused",
            side.twin,
            f"{side.twin}'s {k.row.kernel} multiplies and adds in two instructions "
            f"{k.code.unfused} times (and in one, fused, {fused} times): as many instructions "
            "could go.",
            numbers={"unfused": k.code.unfused, "fma": fused},
        )


def _launches(e: Explanation) -> Iterator[Sentence]:
    for side in e.sides:
        m = side.measured
        if m is None:
            continue
        us, busy = m.us.p50, m.row.get("busy_us")
        shares = m.row.get("launches") or []
        if len(shares) > 1:
            told = ", ".join(f"{x['name']} {x['share']:.0%}" for x in shares)
            yield Sentence("launches", side.twin, f"{side.twin}'s time is shared by: {told}.")
        if busy and us - busy > WORTH_TELLING * us:
            yield Sentence(
                "gaps",
                side.twin,
                f"{side.twin}'s {len(m.row['kernels'])} kernels leave the device idle for "
                f"{us - busy:.1f} us between them, {(us - busy) / us:.0%} of the time.",
            )


def _host(e: Explanation) -> Iterator[Sentence]:
    told = []
    for side in e.sides:
        host = side.measured.row.get("launch_us") if side.measured else None
        if side.measured and host and host > side.measured.us.p50:
            told.append((side.twin, host, side.measured.us.p50))
    if told:
        longer = ", ".join(f"{twin} {host:.0f} us (device {us:.0f})" for twin, host, us in told)
        yield Sentence(
            "host",
            told[0][0] if len(told) == 1 else "",
            f"A call costs the host longer than the device: {longer}. One call after another is "
            "bound by the host, unless a CUDA graph or jit holds many of them.",
        )


def _clocks(e: Explanation) -> Iterator[Sentence]:
    for side in e.sides:
        clocks = side.measured.row.get("clocks") if side.measured else None
        if clocks and clocks.get("throttle"):
            yield Sentence(
                "clocks",
                "",
                f"The clocks were held back ({', '.join(clocks['throttle'])}) at "
                f"{clocks['sm_mhz']['median']:.0f} MHz and {clocks['power_w']:.0f} W; the ceilings "
                "of the same run felt it too.",
            )
            return


def _left(e: Explanation) -> Iterator[Sentence]:
    for side in e.sides:
        if side.measured is None:
            continue
        us = side.measured.us.p50
        if side.current is None:
            then = fields_of(side.measured.row["config"])
            yield Sentence(
                "unexplained",
                side.twin,
                f"{side.twin}'s {us:.1f} us ({side.measured.source}) were measured of another "
                f"Config ({then}): they are not accounted for.",
            )
            continue
        parts = e.accounts(side)
        rest = parts[-1].us
        told = ", ".join(
            f"{'up to ' if p.at_most else ''}{p.us:.1f} us {p.what}" for p in parts[:-1]
        )
        if us <= parts[0].us:
            text = (
                f"{side.twin}'s {us:.1f} us are as fast as the ceiling allows ({parts[0].us:.1f} "
                "us): nothing is unexplained."
            )
        elif any(s.cause and s.twin == side.twin for rule in CAUSES for s in rule(e)):
            text = (
                f"Of {side.twin}'s {us:.1f} us: {told}; the other {rest:.1f} us ({rest / us:.0%}) "
                "are the named cause's and what is unexplained."
            )
        elif rest < 0.005 * us:
            text = f"{side.twin}'s {us:.1f} us can be accounted for: {told}."
        else:
            text = (
                f"Of {side.twin}'s {us:.1f} us: {told}; at least {rest:.1f} us ({rest / us:.0%}) "
                "unexplained."
            )
        yield Sentence("unexplained", side.twin, text, numbers={"us": rest})


def fields_of(config: Mapping[str, Any]) -> str:
    """ "block_m 1, block_n 4096"."""
    return ", ".join(f"{name} {value}" for name, value in config.items()) or "none told"


def _kernels(e: Explanation) -> Iterator[tuple[Side, Kernel]]:
    return ((side, k) for side in e.sides for k in side.kernels)


CAUSES = (_spills, _scattered, _occupied)  # the rules that name faults
RULES: tuple[Callable[[Explanation], Iterator[Sentence]], ...] = (
    _bound,
    _beside,
    _compiled,
    _spills,
    _scattered,
    _narrow,
    _occupied,
    _again,
    _operands,
    _intermediate,
    _unfused,
    _tail,
    _launches,
    _host,
    _clocks,
    _left,
)


def conclusion(e: Explanation) -> str:
    """The first line: what the numbers come to."""
    causes = list(dict.fromkeys(f"{s.twin} {s.topic}" for s in e.sentences if s.cause))
    timed = {side.twin: side.measured for side in e.sides if side.measured}
    named = f" Named causes: {', '.join(causes)}." if causes else ""
    if other := [side.twin for side in e.sides if side.measured and not side.current]:
        named += f" Measured of another Config than today's: {' and '.join(other)}."
    if len(timed) == 2:
        (a, m), (b, n) = timed.items()
        verdict = timing.verdict(m.us, n.us)
        apart = max(m.us.p50, n.us.p50) / min(m.us.p50, n.us.p50)
        both = f"{a} {m.us.p50:.1f} us, {b} {n.us.p50:.1f} us"
        said = {
            timing.FASTER: f"{a} is {apart:.2f} times as fast",
            timing.SLOWER: f"{b} is {apart:.2f} times as fast",
            timing.SAME: "both take the same time",
            timing.UNDECIDED: "which is faster, this run cannot tell",
        }
        return f"{e.which}: {said[verdict]} ({both}).{named}"
    if e.least_us is not None:
        return f"{e.which}: at least {e.least_us:.1f} us by the recorded ceilings.{named}"
    return f"{e.which}: compiled, never measured.{named}"


# Numbers as people read them.


def size(count: float) -> str:
    """Bytes: "537 MB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= scale:
            return f"{number(count / scale)} {unit}"
    return f"{count:.0f} bytes"


def flops(count: float) -> str:
    """ "1.10 TFLOP"."""
    for unit, scale in (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6)):
        if count >= scale:
            return f"{number(count / scale)} {unit}"
    return f"{count:.0f} FLOP"


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def itemsize(dtype: str) -> int:
    from parity.spec import NUMPY_DTYPES

    return NUMPY_DTYPES[dtype].itemsize


def as_json(e: Explanation) -> dict[str, Any]:
    """The facts and sentences, for --json."""
    return {
        "problem": e.problem.stem,
        "workload": e.work.name,
        "pass": e.which,
        "conclusion": conclusion(e),
        "flops": e.cost.flops,
        "bytes": e.cost.bytes,
        "least_us": e.least_us,
        "bound": "compute" if e.compute_bound else "memory",
        "ceilings": e.ceilings.to_json() if e.ceilings else None,
        "ceilings_source": e.ceilings_source,
        "sides": {side.twin: _side_json(e, side) for side in e.sides},
        "sentences": [
            {"topic": s.topic, "twin": s.twin, "cause": s.cause, "text": s.text}
            | {"numbers": dict(s.numbers)}
            for s in e.sentences
        ],
    }


def _side_json(e: Explanation, side: Side) -> dict[str, Any]:
    kernels = []
    for k in side.kernels:
        facts = {key: v for key, v in k.row.to_json().items() if key != "listing"}
        rounds = k.rounds[2] if k.rounds else None
        facts |= {
            "blocks": k.blocks,
            "resident": k.resident,
            "limited_by": k.occupancy.by if k.occupancy else None,
            "rounds": rounds,
            "in_flight": k.in_flight,
            "tiles": k.plan.tiles if k.plan else None,
        }
        if k.code is not None:
            facts["instructions"] = dict(k.code.counts)
            facts["wgmma_shapes"] = k.code.wgmma
            facts["unfused"] = k.code.unfused
        facts["accesses"] = [[a.kind, a.lane_bytes, a.useful, a.sectors] for a in k.accesses]
        kernels.append(facts)
    measured = side.measured
    return {
        "kernels": kernels,
        "read_twice": side.again,
        "shared": side.shared,
        "intermediate": side.extra,
        "measured": json.loads(json.dumps(measured.row)) if measured else None,
        "measured_source": measured.source if measured else None,
        "accounts": [[p.what, p.us, p.at_most] for p in e.accounts(side)],
    }
