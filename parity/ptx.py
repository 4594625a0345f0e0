"""Which memory the lanes of a warp touch together, worked out from PTX, the assembler's input.

Memory moves in sectors of 32 bytes. When the 32 lanes of a warp load neighbouring elements their
bytes fill whole sectors; when each lane is a row apart, every lane costs a sector of its own, and
most of what moves is thrown away. `accesses` computes the address of every load and store for the
lanes of the first warp of the first block, and counts the sectors.

Values come backwards from the address: each register by its first definition in the text, which for
a loop's counter is where it starts. Kernel parameters stand in by size: a pointer is a far apart,
aligned address, an integer is 2^20, so that a row pitch given at run time is a long one. What
depends on loaded data stays unknown, and so does the access.

Instructions as in NVIDIA's PTX ISA; the measure is Nsight Compute's sectors per request.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

LANES = 32
SECTOR = 32  # bytes
INTEGER = 1 << 20  # stands in for a 32-bit parameter: a pitch, a count
_POINTER = 1 << 40  # the first pointer parameter; the others are its multiples

Values = tuple[int, ...]  # one for each lane

_INSTRUCTION = re.compile(r"^(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s+(.*?);")
_TYPE = re.compile(r"[.:]([busf])(8|16|32|64|128)\b")
_SPECIAL: dict[str, Callable[[int], int]] = {
    "%tid.x": lambda lane: lane,
    "%laneid": lambda lane: lane,
    "%warpid": lambda lane: 0,
    "%ntid.x": lambda lane: 128,
}


@dataclass(frozen=True)
class Access:
    """One load or store: what a warp wants of it and what memory has to move."""

    kind: str  # "load" or "store"
    text: str
    lane_bytes: int
    useful: int  # distinct bytes that the active lanes want
    sectors: int  # of 32 bytes that hold them

    @property
    def used(self) -> float:
        """The share of the moved bytes that somebody wanted."""
        return self.useful / (self.sectors * SECTOR)

    @property
    def scattered(self) -> bool:
        """At least four times the sectors that these bytes would fill, side by side."""
        return self.sectors >= 4 * -(-self.useful // SECTOR)


def accesses(ptx: str) -> list[Access]:
    """Every access to global memory whose addresses can be worked out, in the order of the text."""
    return list(_Reader(ptx).accesses())


def read_twice(ptx: str) -> bool:
    """Whether the code reads an array twice: the same place by two loads, or in two loops, neither
    of them inside the other."""
    seen: dict[int, list[_Place]] = {}
    for place in _Reader(ptx).places():
        for other in seen.setdefault(place.pointer, []):
            # Loads before a loop do not count: a pipeline starts with them.
            if place.loop == other.loop:
                same = (place.first, place.size) == (other.first, other.size)
            else:
                same = None not in (place.loop, other.loop)
            if same:
                return True
        seen[place.pointer].append(place)
    return False


@dataclass(frozen=True)
class _Place:
    """Where a load of more than one value starts, and the innermost loop it is in."""

    pointer: int
    first: int
    size: int
    loop: tuple[int, int] | None


class _Reader:
    def __init__(self, ptx: str) -> None:
        self._first: dict[str, tuple[str, list[str], int]] = {}  # register -> op, operands, which
        self._known: dict[str, Values | None] = {}
        self._accesses: list[tuple[str, list[str], bool, str, str, int]] = []
        labels: dict[str, int] = {}
        self._loops: list[tuple[int, int]] = []  # lines of their first and last instruction
        self._pointers: dict[str, int] = {}
        for at, line in enumerate(ptx.splitlines()):
            if label := re.match(r"(\$L__BB\w+):", line):
                labels[label[1]] = at
            found = _INSTRUCTION.match(line.strip())
            if found is None:
                continue
            negated, guard, op, rest = found.groups()
            operands = _split(rest)
            if re.match(r"(ld|st)\.(?!param|shared|local|const)|cp\.async\.c[ag]\.", op):
                self._accesses.append((op, operands, negated == "!", guard or "", line.strip(), at))
            if op.startswith("bra") and operands and operands[-1] in labels:
                self._loops.append((labels[operands[-1]], at))
            if re.match(r"(st|red|bar|bra|ret|cp)\b", op):
                continue
            for number, register in enumerate(re.findall(r"%\w+", operands[0] if operands else "")):
                self._first.setdefault(register, (op, operands, number))

    def accesses(self) -> Iterator[Access]:
        return (access for access, _ in self._found())

    def places(self) -> Iterator[_Place]:
        """Loads of neighbouring values, which are of arrays."""
        for access, (first, at) in self._found():
            if access.kind == "load" and access.useful > access.lane_bytes:
                around = [loop for loop in self._loops if loop[0] <= at <= loop[1]]
                loop = min(around, key=lambda loop: loop[1] - loop[0], default=None)
                yield _Place(first // _POINTER, first, access.lane_bytes, loop)

    def _found(self) -> Iterator[tuple[Access, tuple[int, int]]]:
        """Each access with its lowest address and its line."""
        for op, operands, negated, guard, text, at in self._accesses:
            brackets = [o for o in operands if o.startswith("[")]
            copies = op.startswith("cp.async")
            if not brackets or (copies and len(brackets) < 2):
                continue
            addresses = self._address(brackets[1 if copies else 0])
            if addresses is None or min(addresses) < _POINTER:  # unknown, or shared memory
                continue
            size = int(operands[2], 0) if copies else _bytes(op)
            active = range(LANES)
            allowed = self.value(guard) if guard else None
            if allowed is not None:
                active = [n for n in range(LANES) if bool(allowed[n]) != negated] or active
            touched = {addresses[n] + i for n in active for i in range(size)}
            sectors = {a // SECTOR for a in touched}
            kind = "store" if op.startswith("st") else "load"
            yield Access(kind, text, size, len(touched), len(sectors)), (min(touched), at)

    def _address(self, bracket: str) -> Values | None:
        base, _, offset = bracket.strip("[] ").partition("+")
        values = self.value(base.strip())
        shift = int(offset.strip(), 0) if offset.strip() else 0
        return None if values is None else tuple(v + shift for v in values)

    def value(self, name: str) -> Values | None:
        """The value of an operand in each lane; None if it cannot be known here."""
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)", name):
            return (int(name, 0),) * LANES
        if name in _SPECIAL:
            return tuple(map(_SPECIAL[name], range(LANES)))
        if re.fullmatch(r"%(n?ctaid|cluster_\w+|tid|ntid|nctaid)(\.[xyz])?", name):
            return (1 if name.startswith("%n") else 0,) * LANES
        if not name.startswith("%"):
            return None if name in ("true", "false") else (0,) * LANES  # a place in shared memory
        if name not in self._known:
            self._known[name] = None  # a register that needs itself is not known
            definition = self._first.get(name)
            try:
                self._known[name] = self._run(*definition) if definition else None
            except RecursionError:
                return None
        return self._known[name]

    def _run(self, op: str, operands: list[str], which: int) -> Values | None:
        if op.startswith("ld.param"):
            return self._parameter(op, operands[1])
        name = op.split(".")[0]
        if name in ("ld", "atom", "elect", "mapa"):
            return None if name != "elect" else tuple(int(n == 0) for n in range(LANES))
        args = [self.value(o) for o in operands[1:] if not o.startswith("{")]
        if name == "mov":
            return self._moved(op, operands, which)
        if name == "shfl":  # from one lane to all, or unknown
            if ".idx" in op and args[0] is not None and args[1] is not None:
                source, lane = args[0], args[1]
                return tuple(source[n % LANES] for n in lane)
            return None
        known = [a for a in args if a is not None]
        if len(known) < len(operands) - 1 or name not in _OPERATIONS:
            return None
        lanes = list(zip(*known, strict=True))
        kind, bits = _type(op)
        wide = 2 * bits if ".wide" in op else bits
        # of mad.wide, factors are narrow and the addend is wide
        sizes = [bits, bits, wide, bits]
        run = _OPERATIONS[name]
        try:
            results = [
                run(op, *(_as(kind, *v) for v in zip(sizes, x, strict=False))) for x in lanes
            ]
        except TypeError:  # a form of the instruction with other operands
            return None
        known_results = [r for r in results if r is not None]
        if len(known_results) < LANES:
            return None
        return tuple(_as(kind, wide, r) for r in known_results)

    def _moved(self, op: str, operands: list[str], which: int) -> Values | None:
        source, bits = operands[1], _type(op)[1]
        if source.startswith("{"):  # two halves into one
            halves = [self.value(r) for r in source.strip("{}").split(",")]
            low, high = halves[0], halves[-1]
            if len(halves) != 2 or low is None or high is None:
                return None
            half = bits // 2
            return tuple(
                lo & (1 << half) - 1 | hi << half for lo, hi in zip(low, high, strict=True)
            )
        values = self.value(source)
        if values is None or not operands[0].startswith("{"):
            return values
        parts = operands[0].count(",") + 1
        return tuple(v >> which * bits // parts & (1 << bits // parts) - 1 for v in values)

    def _parameter(self, op: str, source: str) -> Values | None:
        kind, bits = _type(op)
        if kind == "f" or bits == 128 or op.count(".v"):
            return None
        if bits == 64:
            number = self._pointers.setdefault(source, len(self._pointers) + 1)
            return (number * _POINTER,) * LANES
        return (INTEGER if bits == 32 else 1,) * LANES


def _split(operands: str) -> list[str]:
    """Operands between commas; braces and brackets keep theirs."""
    return [o.strip() for o in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", operands)]


def _type(op: str) -> tuple[str, int]:
    """The last type in an opcode is that of the result, for cvt the first."""
    found = _TYPE.findall(op)
    if not found:
        return "b", 1 if ".pred" in op else 32
    kind, bits = found[0] if op.startswith("cvt") else found[-1]
    return kind, int(bits)


def _bytes(op: str) -> int:
    vector = re.search(r"\.v(\d)", op)
    return _type(op)[1] // 8 * (int(vector[1]) if vector else 1)


def _as(kind: str, bits: int, value: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if kind == "s" and value >> (bits - 1) else value


def _compare(op: str, a: int, b: int, *_: int) -> int | None:
    how = op.split(".")[1]
    tests: dict[str, bool] = {
        "eq": a == b,
        "ne": a != b,
        "lt": a < b,
        "le": a <= b,
        "gt": a > b,
        "ge": a >= b,
        "lo": a < b,
        "ls": a <= b,
        "hi": a > b,
        "hs": a >= b,
    }
    combined = op.split(".")[2] in ("and", "or", "xor")
    return None if combined or how not in tests else int(tests[how])


def _lop3(op: str, a: int, b: int, c: int, table: int) -> int:
    result = 0
    for bit in range(32):
        row = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1)
        result |= (table >> row & 1) << bit
    return result


_OPERATIONS: dict[str, Callable[..., int | None]] = {
    "add": lambda op, a, b: a + b,
    "sub": lambda op, a, b: a - b,
    "mul": lambda op, a, b: a * b if ".hi" not in op else None,
    "mad": lambda op, a, b, c: a * b + c if ".hi" not in op else None,
    "div": lambda op, a, b: abs(a) // abs(b) * (1 if a * b >= 0 else -1) if b else None,
    "rem": lambda op, a, b: abs(a) % abs(b) * (1 if a >= 0 else -1) if b else None,
    "shl": lambda op, a, b: a << b if b < 64 else 0,
    "shr": lambda op, a, b: a >> b,
    "and": lambda op, a, b: a & b,
    "or": lambda op, a, b: a | b,
    "xor": lambda op, a, b: a ^ b,
    "not": lambda op, a: ~a if ".pred" not in op else 1 - a,
    "neg": lambda op, a: -a,
    "abs": lambda op, a: abs(a),
    "min": lambda op, a, b: min(a, b),
    "max": lambda op, a, b: max(a, b),
    "cvt": lambda op, a: a,
    "cvta": lambda op, a: a,
    "selp": lambda op, a, b, p: a if p else b,
    "setp": _compare,
    "bfe": lambda op, a, start, length: a >> start & (1 << length) - 1,
    "bfi": lambda op, a, b, start, length: (
        b & ~(((1 << length) - 1) << start) | (a & (1 << length) - 1) << start
    ),
    "lop3": _lop3,
}
