"""Reading Hopper machine code: what a disassembled kernel is made of, and where its loops are.

Text in, numbers out: nothing here compiles, and nothing knows which language the kernel was written
in. A listing is what nvdisasm prints. Loops are the natural loops of the control flow graph (a back
edge goes to a block that every way to it must pass), so that a wait that the assembler has moved
behind the kernel's end, and that jumps back, is not mistaken for one.

Opcode names are those of NVIDIA's CUDA Binary Utilities guide, tables for Hopper.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_REGISTER = re.compile(r"(?<![\w.])R(\d+)")


@dataclass(frozen=True)
class Instruction:
    """One instruction; `guard` is the predicate it runs under, "" for always."""

    address: int
    opcode: str  # with its modifiers: "LDG.E.128"
    operands: str
    guard: str = ""
    target: int | None = None  # of a branch

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def kind(self) -> str:
        """What it does, in one word of KINDS."""
        return next((kind for kind, pattern in _KINDS if pattern.match(self.opcode)), "other")

    @property
    def bits(self) -> int:
        """How wide one lane's access to memory is; 0 for what is none."""
        if self.kind not in _MEMORY:
            return 0
        width = re.search(r"\.(?:U|S)?(8|16|64|128)(?:\.|$)", self.opcode)
        return int(width[1]) if width else 32

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {self.operands}".strip()


# What an instruction does: the first pattern that its opcode starts with.
_KINDS = [
    (kind, re.compile(pattern))
    for kind, pattern in (
        ("wgmma", r"[HQIB]GMMA\b"),
        ("mma.sync", r"(HMMA|QMMA|IMMA|DMMA|BMMA)\b"),
        ("TMA load", r"UTMALDG|UBLKCP\.S\.G"),
        ("TMA store", r"UTMASTG|UTMAREDG|UBLKCP\.G\.S|UBLKRED"),
        ("cp.async", r"LDGSTS"),
        ("global load", r"(LDG|LD)\b"),
        ("global store", r"(STG|ST)\b"),
        ("atomic", r"(ATOM|ATOMG|ATOMS|RED|REDG)\b"),
        ("local memory", r"(LDL|STL)\b"),
        ("ldmatrix", r"LDSM"),
        ("stmatrix", r"STSM"),
        ("shared load", r"LDS\b"),
        ("shared store", r"STS\b"),
        ("wait", r"SYNCS\.PHASECHK|DEPBAR|WARPGROUP\.DEPBAR|NANOSLEEP|UCGABAR_WAIT|WARPSYNC"),
        ("barrier", r"BAR\b|B2R|SYNCS\.ARRIVE|UCGABAR_ARV"),
        ("fence", r"MEMBAR|FENCE|WARPGROUP\.ARRIVE|ERRBAR|CCTL|UTMACMDFLUSH|LDGDEPBAR"),
        ("fma", r"FFMA|DFMA|HFMA2\.(?!MMA)|HFMA2$|HFMA2\.MMA\.BF16|HFMA2\.BF16"),
        ("multiply", r"(FMUL|DMUL|HMUL2)\b"),
        ("add", r"(FADD|DADD|HADD2)\b"),
        ("compare", r"FMNMX|FSEL|FSETP|FSET|HMNMX2"),
        ("special", r"MUFU"),
        ("convert", r"F2FP|F2F\b|I2F|F2I|I2FP|FRND|HADD2\.F32"),
        ("shuffle", r"SHFL|REDUX|MATCH"),
        ("branch", r"BRA|BRX|JMP|EXIT|RET|CALL|BSSY|BSYNC|BREAK|WARPGROUP|NOP|PREEXIT"),
    )
]
KINDS = (*(kind for kind, _ in _KINDS), "other")
_MEMORY = ("global load", "global store", "cp.async", "shared load", "shared store", "local memory")

# What each kind is to a reader of a loop: for the legend and the margin.
ROLES: Mapping[str, tuple[str, str]] = {
    "wgmma": ("multiply", "tensor cores, 128 threads together, both tiles from shared memory"),
    "mma.sync": ("multiply", "tensor cores, 32 threads together, operands from registers"),
    "TMA load": ("load", "the copy engine fetches a whole tile; one thread asks, nobody waits"),
    "TMA store": ("store", "the copy engine writes a whole tile"),
    "cp.async": ("load", "memory to shared memory, past the registers"),
    "global load": ("load", "memory to registers; the first use of the register waits"),
    "global store": ("store", "registers to memory"),
    "atomic": ("store", "read, change and write in one step"),
    "local memory": ("spill", "registers that did not fit, kept in memory"),
    "ldmatrix": ("load", "shared memory to registers, in the order of mma.sync"),
    "stmatrix": ("store", "registers to shared memory, from the order of the accumulator"),
    "shared load": ("load", "shared memory to registers"),
    "shared store": ("store", "registers to shared memory"),
    "wait": ("wait", "until a copy, a barrier or a product is done"),
    "barrier": ("wait", "threads meet, or say that they have arrived"),
    "fence": ("wait", "orders memory accesses for other threads and the copy engine"),
    "fma": ("multiply", "multiply and add in one instruction, on the ordinary cores"),
    "multiply": ("multiply", "on the ordinary cores"),
    "add": ("compute", "on the ordinary cores"),
    "compare": ("compute", "maximum, or choose by a condition"),
    "special": ("compute", "exp2, reciprocal, square root: a quarter of the rate or less"),
    "convert": ("compute", "from one number format to another"),
    "shuffle": ("compute", "lanes of a warp exchange values"),
    "branch": ("", ""),
    "other": ("", ""),
}


@dataclass(frozen=True)
class Loop:
    """A natural loop: its blocks in the order of the code."""

    blocks: tuple[int, ...]  # numbers of basic blocks
    instructions: tuple[Instruction, ...]
    every_trip: frozenset[int]  # addresses of what runs on each trip, not only on some
    depth: int  # 1 for the outermost
    innermost: bool

    @cached_property
    def kinds(self) -> Counter[str]:
        return Counter(i.kind for i in self.instructions)

    @property
    def spins(self) -> bool:
        """It only waits."""
        return set(self.kinds) <= {"wait", "branch", "other"} and len(self.instructions) <= 12


@dataclass(frozen=True)
class Code:
    """One kernel's machine code."""

    instructions: tuple[Instruction, ...]

    @cached_property
    def blocks(self) -> list[list[Instruction]]:
        """Straight pieces: entered at their start, left at their end."""
        return _blocks(self.instructions)

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """All loops that are more than a wait, outer ones before those inside."""
        return tuple(_loops(self.instructions))

    @cached_property
    def counts(self) -> dict[str, int]:
        """How many instructions of each kind: static, wherever they stand."""
        found = Counter(i.kind for i in self.instructions)
        return {kind: found[kind] for kind in KINDS if found[kind]}

    @cached_property
    def wgmma(self) -> dict[str, int]:
        """{"64x256x16 BF16": how many}."""
        products = [i for i in self.instructions if i.kind == "wgmma"]
        return dict(Counter(shape_of(i) for i in products))

    def widths(self, kind: str) -> dict[int, int]:
        """{bits of one lane's access: how many instructions}, widest first."""
        found = Counter(i.bits for i in self.instructions if i.kind == kind)
        return dict(sorted(found.items(), reverse=True))

    @cached_property
    def unfused(self) -> int:
        """Additions of a product that was just rounded: one FFMA does both.

        Only within a straight piece of code, and only where nothing else uses the product.
        """
        return sum(map(_unfused, self.blocks))

    @cached_property
    def main_loop(self) -> Loop | None:
        """The innermost loop with the most products; without any, with the most bytes loaded."""
        inner = [loop for loop in self.loops if loop.innermost]
        return max(inner, key=_weight, default=None)

    @cached_property
    def copy_loop(self) -> Loop | None:
        """In a kernel whose roles are split: the loop of the threads that only order copies."""
        main = self.main_loop
        others = [
            loop
            for loop in self.loops
            if loop.innermost and loop is not main and loop.kinds["TMA load"]
        ]
        if main is None or main.kinds["TMA load"] or main.kinds["cp.async"]:
            return None
        return max(others, key=lambda loop: loop.kinds["TMA load"], default=None)

    @cached_property
    def load_loops(self) -> int:
        """How many separate loops, none inside another, read from memory."""
        return sum(
            loop.innermost and any(loop.kinds[k] for k in ("global load", "cp.async", "TMA load"))
            for loop in self.loops
        )


def parse(listing: str) -> Code:
    """The kernel in a listing. An empty listing has no instructions."""
    labels: dict[str, int] = {}
    waiting: list[str] = []
    raw: list[tuple[int, str, str, str]] = []
    for line in listing.splitlines():
        label = _LABEL.match(line)
        if label:
            waiting.append(label[1])
            continue
        found = _LINE.search(line)
        if found:
            address = int(found[1], 16)
            if raw and address <= raw[-1][0]:
                break  # the next kernel begins: one listing, one kernel
            for name in waiting:
                labels[name] = address
            waiting = []
            raw.append((address, found[3], found[4], found[2] or ""))
    instructions = []
    for address, opcode, operands, guard in raw:
        target = re.search(r"`\((\.L_x_\d+)\)", operands)
        goes = labels.get(target[1]) if target else None
        instructions.append(Instruction(address, opcode, operands, guard, goes))
    return Code(tuple(instructions))


def shape_of(product: Instruction) -> str:
    """ "64x256x16 BF16": the tile of one wgmma and what it multiplies."""
    parts = product.opcode.split(".")
    kinds = [p for p in parts[2:] if p not in ("F32", "F16", "S32")] or parts[2:3]
    return " ".join([parts[1], *kinds[:1]])


def straight(code: Code) -> Loop:
    """All of a kernel that has no loop, as if it were one of a single trip."""
    everything = code.instructions
    return Loop((), everything, frozenset(i.address for i in everything), 0, True)


@dataclass(frozen=True)
class Line:
    """A line of an annotated loop: one instruction, or what was left out between two."""

    role: str  # "load", "multiply", "wait", "store", "compute", "spill" or ""
    text: str
    sometimes: bool = False  # not on every trip


def annotated(loop: Loop) -> list[Line]:
    """What a loop loads, stores, waits for and multiplies on tensor cores, one by one; arithmetic
    between, addresses, and what does not run on every trip are counted."""
    lines: list[Line] = []
    between: list[Instruction] = []
    for i in loop.instructions:
        always = i.address in loop.every_trip
        if always and _stands_alone(i):
            lines += _counted(between, loop)
            between = []
            lines.append(Line(ROLES[i.kind][0], str(i)))
        else:
            if between and always != (between[0].address in loop.every_trip):
                lines += _counted(between, loop)
                between = []
            between.append(i)
    return lines + _counted(between, loop)


def _stands_alone(i: Instruction) -> bool:
    return ROLES[i.kind][0] in ("load", "store", "wait", "spill") or i.kind in ("wgmma", "mma.sync")


def _counted(run: Sequence[Instruction], loop: Loop) -> list[Line]:
    """One line for a run of instructions: arithmetic by opcode, then how many more."""
    if not run:
        return []
    sometimes = run[0].address not in loop.every_trip
    told = [i for i in run if ROLES[i.kind][0]]
    names = [i.kind if sometimes or i.kind in ("convert", "shuffle") else i.name for i in told]
    text = ", ".join(f"{n} {name}" for name, n in Counter(names).most_common(6))
    rest = len(run) - len(told)
    if rest:
        few = ", ".join(n for n, _ in Counter(i.name for i in run if i not in told).most_common(3))
        text = f"{text}{', ' if text else ''}{rest} more ({few})"
    roles = {ROLES[i.kind][0] for i in told}
    role = next((r for r in ("multiply", "compute") if r in roles), "") if not sometimes else ""
    return [Line(role, f"... {text}", sometimes)]


def registers_written(i: Instruction) -> Iterator[str]:
    """The registers of a load's destination: "R4" to "R7" for one of 128 bits."""
    first = re.match(r"R(\d+)", i.operands)
    if first:
        for n in range(max(1, i.bits // 32)):
            yield f"R{int(first[1]) + n}"


def registers_read(i: Instruction) -> Iterator[str]:
    """The registers named after the first operand, which is where the result goes; for a store, a
    branch or the like all of them."""
    rest = i.operands.partition(",")[2]
    stores = i.kind in ("global store", "shared store", "stmatrix", "local memory", "barrier")
    yield from re.findall(r"(?<![\w.])R\d+", i.operands if stores else rest)


def accumulator(product: Instruction) -> tuple[int, int] | None:
    """(first register, how many) that hold a float32 accumulator of one wgmma, in each thread."""
    shape = re.match(r"(\d+)x(\d+)x", shape_of(product))
    registers = _REGISTER.search(product.operands)
    if shape is None or registers is None:
        return None
    return int(registers[1]), int(shape[1]) * int(shape[2]) // 128


# The control flow graph.


def _blocks(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """Basic blocks: straight pieces that are entered at their start and left at their end."""
    starts = {i.target for i in code if i.target is not None}
    blocks: list[list[Instruction]] = []
    fresh = True
    for i in code:
        if fresh or i.address in starts:
            blocks.append([])
        blocks[-1].append(i)
        fresh = i.target is not None or i.name in ("EXIT", "RET", "BRX", "JMP")
    return blocks


def _successors(blocks: list[list[Instruction]]) -> list[list[int]]:
    at = {block[0].address: n for n, block in enumerate(blocks)}
    found: list[list[int]] = []
    for n, block in enumerate(blocks):
        last = block[-1]
        goes: list[int] = []
        ends = last.name in ("EXIT", "RET", "BRX", "JMP")
        # a branch may carry its predicate as an operand: BRA.U !UP1, `(.L_x_3)
        conditional = bool(last.guard) or bool(re.search(r"U?P\d", last.operands))
        if last.target in at and last.name == "BRA":
            goes.append(at[last.target])
            ends = not conditional
        elif ends:
            ends = not last.guard
        if not ends and n + 1 < len(blocks):
            goes.append(n + 1)
        found.append(goes)
    return found


def _dominators(successors: list[list[int]]) -> list[int]:
    """For each block, a bit set of the blocks that every way to it passes; 0 if unreachable."""
    before: list[list[int]] = [[] for _ in successors]
    for n, goes in enumerate(successors):
        for m in goes:
            before[m].append(n)
    everything = (1 << len(successors)) - 1
    found = [everything] * len(successors)
    if found:
        found[0] = 1
    changed = True
    while changed:
        changed = False
        for n in range(1, len(successors)):
            meet = everything
            for m in before[n]:
                meet &= found[m]
            meet = (meet | 1 << n) if before[n] else 1 << n
            if meet != found[n]:
                found[n], changed = meet, True
    return [bits if bits & 1 else 0 for bits in found]


def _loops(code: Sequence[Instruction]) -> Iterator[Loop]:
    blocks = _blocks(code)
    successors = _successors(blocks)
    dominators = _dominators(successors)
    before: list[list[int]] = [[] for _ in successors]
    for n, goes in enumerate(successors):
        for m in goes:
            before[m].append(n)
    bodies: dict[int, set[int]] = {}
    ends: dict[int, list[int]] = {}
    for n, goes in enumerate(successors):
        for head in goes:
            if dominators[n] >> head & 1:
                body = bodies.setdefault(head, {head})
                ends.setdefault(head, []).append(n)
                waiting = [n]
                while waiting:
                    m = waiting.pop()
                    if m not in body:
                        body.add(m)
                        waiting += before[m]
    found = []
    for head, body in bodies.items():
        always = dominators[ends[head][0]]
        for end in ends[head]:
            always &= dominators[end]
        inside = tuple(i for n in sorted(body) for i in blocks[n])
        steady = frozenset(i.address for n in body if always >> n & 1 for i in blocks[n])
        found.append((head, body, inside, steady))
    waits = {
        head for head, body, inside, steady in found if Loop((), inside, steady, 1, True).spins
    }
    real = [f for f in found if f[0] not in waits]
    for head, body, inside, steady in sorted(real, key=lambda f: (-len(f[1]), f[0])):
        depth = sum(head in other for _, other, *_ in real)
        innermost = not any(h != head and h in body for h, *_ in real)
        yield Loop(tuple(sorted(body)), inside, steady, depth, innermost)


def _weight(loop: Loop) -> tuple[int, int, int, int]:
    products = loop.kinds["wgmma"] * 1000 + loop.kinds["mma.sync"]
    from_memory = [i for i in loop.instructions if i.kind in ("global load", "cp.async")]
    from_shared = [i for i in loop.instructions if i.kind == "shared load"]
    loaded = sum(i.bits for i in (*from_memory, *from_shared))
    return products, loaded, loop.depth, len(loop.instructions)


def _unfused(block: Sequence[Instruction]) -> int:
    product: dict[str, int] = {}  # register -> times its product was read
    summed: set[str] = set()
    found = 0

    def settle(register: str) -> int:
        reads = product.pop(register, 0)
        alone = register in summed and reads == 1
        summed.discard(register)
        return int(alone)

    for i in block:
        parts = [p.strip() for p in i.operands.split(",")]
        written = re.match(r"R\d+", parts[0]) if parts else None
        for part in parts[1:]:
            for register in re.findall(r"R\d+", part):
                if register in product:
                    product[register] += 1
                    if i.name == "FADD":
                        summed.add(register)
        if written:
            found += settle(written[0])
            if i.name == "FMUL":
                product[written[0]] = 0
    # a product that is still there at the end may be used beyond the block
    return found
