"""Which program touches which element: one call of a small kernel, watched in its interpreter.

Both interpreters say what they load and store (parity.frameworks); here both become `Touch`es with
the same fields, so that one picture can show either language.
"""

import contextlib
import inspect
import re
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

PATIENCE = 30.0  # seconds for small kernels in an interpreter
WAITS = "it waits for ever: a barrier gets fewer arrivals than it waits for"
WIDE = 96  # columns of what is said


class Broken(RuntimeError):
    """A kernel raised. A notebook shows the sentence, not the frameworks' hundred frames."""

    def _render_traceback_(self) -> list[str]:
        return textwrap.wrap(f"The kernel failed: {self}.", WIDE, subsequent_indent="  ")


class Touch(NamedTuple):
    """One load or store of one program."""

    launch: int  # from 0, in the order of the call
    program: tuple[int, ...]  # its place in the grid
    stored: bool
    array: str  # a parameter's name; "out", or "out1" and so on; "scratch"
    shape: tuple[int, ...]  # of that array
    at: np.ndarray  # int [lanes, dimensions]: the element each lane asks for
    live: np.ndarray  # bool [lanes]: the lane takes part, and lies inside


@dataclass(frozen=True)
class Trace:
    """What one call returned and did."""

    outputs: tuple[Any, ...]
    touches: tuple[Touch, ...]
    read: int  # bytes
    written: int

    @property
    def programs(self) -> int:
        """How many programs touched anything, over all launches."""
        return len({(t.launch, t.program) for t in self.touches})


def trace(fn: Callable[..., Any], *arrays: Any, **options: Any) -> Trace:
    """Calls fn(*arrays, **options) and notes what its kernels load and store.

    arrays: all torch tensors, or all jax arrays. Keep them small: a touch is kept for every load.
    Raises Broken where a kernel raises.
    """
    names = [p for p in inspect.signature(fn).parameters][: len(arrays)]
    with _told():
        if type(arrays[0]).__module__.startswith("torch"):
            return _triton(fn, names, arrays, options)
        return _pallas(fn, names, arrays, options)


def _triton(fn: Callable[..., Any], names: list[str], arrays: Sequence, options: dict) -> Trace:
    from parity.frameworks import torch as twin
    from parity.frameworks import triton_interpreter

    seen: list[tuple[int, Any]] = []
    with triton_interpreter.launches() as launched:

        def each(touch: Any) -> None:
            addresses, mask = (np.array(x) for x in (touch.addresses, touch.mask))
            seen.append((len(launched) - 1, touch._replace(addresses=addresses, mask=mask)))

        with triton_interpreter.traffic(each) as moved, _banded(arrays) as args:
            outputs = twin.outputs_of(twin.run(fn, args, options))
    known = dict(zip(names, args, strict=True)) | dict(zip(_outs(outputs), outputs, strict=True))
    places = {name: (x.data_ptr(), tuple(x.shape), x.numel()) for name, x in known.items()}
    touches = [_placed(launch, touch, places) for launch, touch in seen]
    return Trace(outputs, tuple(touches), moved.read, moved.written)


def guarded(fn: Callable[..., Any], *arrays: Any, **options: Any) -> Any:
    """fn(*arrays, **options) where a wrong kernel does no harm.

    Triton: tensors that it is given are copies, and they and those it makes lie between guard
    bands. Pallas: a kernel that waits for ever is given up. Raises Broken for it, and where a
    kernel raises.
    """
    if not type(arrays[0]).__module__.startswith("torch"):
        import jax

        from parity.frameworks import mosaic_interpreter

        with mosaic_interpreter.patience(PATIENCE) as late, _told(late):
            return jax.block_until_ready(fn(*arrays, **options))
    with _told(), _banded(arrays) as args:
        out = fn(*args, **options)
    return out.clone() if hasattr(out, "clone") else tuple(x.clone() for x in out)


@contextlib.contextmanager
def _told(late: Sequence[bool] = ()) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise Broken(WAITS if late else sentence(error)) from None


def sentence(error: BaseException) -> str:
    """An exception in a sentence, with the line of the notebook that it came from."""
    chain = [error]
    while (error := chain[0]).__cause__ is not None:
        chain.insert(0, error.__cause__)
    lines = str(error).strip().splitlines() or [""]
    # jax hands on what a kernel raised as text: the last line of a traceback in it says what it was
    inner = [line for line in lines[1:] if re.match(r"\w+(Error|Exception): ", line)]
    first = inner[-1] if inner else f"{type(error).__name__}: {lines[0]}"
    if not inner and first.endswith(":"):  # what differs stands in the next line
        first += " " + next(filter(None, (line.strip(" *") for line in lines[1:])), "")
    first = re.sub(r" of HostAllocationKey\([^)]*\)", "", first).rstrip(".: ")
    first = re.sub(r" on thread Warpgroup\([^)]*\)", "", first)
    if "copy_smem_to_gmem" in first and "before kernel finished" in first:
        first += " (plgpu.wait_smem_to_gmem(0) waits for them)"
    if "TracerBoolConversionError" in first:
        first += " (if, and, max and the like cannot ask a value inside a kernel: jnp.where can)"
    frames = (f for e in chain for f in reversed(traceback.extract_tb(e.__traceback__)))
    for frame in frames:
        if "ipykernel" in frame.filename or "ipython-input" in frame.filename:
            return f"{first}; at `{(frame.line or '').strip()}`"
    return first


@contextlib.contextmanager
def _banded(arrays: Sequence[Any]) -> Iterator[list[Any]]:
    """Copies of torch tensors between guard bands; what is made inside lies between some too."""
    import torch

    from puzzles.triton_side import GuardBands

    with GuardBands():
        yield [torch.empty(x.shape, dtype=x.dtype).copy_(x) for x in arrays]


def _placed(launch: int, touch: Any, places: dict[str, tuple[int, tuple, int]]) -> Touch:
    """The lanes' elements, from their addresses; a masked lane's by its place in the tile."""
    lanes, mask = touch.addresses.astype(np.int64), touch.mask.astype(bool)
    mask = np.broadcast_to(mask, lanes.shape)
    first = int(lanes[mask].min()) if mask.any() else int(lanes.flat[0])
    program = tuple(int(i) for i in touch.program)
    inside = (n for n, (b, _, size) in places.items() if b <= first < b + size * touch.itemsize)
    name = next(inside, "scratch")
    if name == "scratch":
        at = (lanes.reshape(-1, 1) - first) // touch.itemsize
        return Touch(launch, program, touch.stored, name, (), at, mask.reshape(-1))
    base, shape, size = places[name]
    flat = (lanes - base) // touch.itemsize
    if len(shape) == lanes.ndim == 2 and shape[1]:  # a tile: its corner says where each lane is
        corner = np.array(np.divmod(flat.flat[0], shape[1]))
        at = corner + np.argwhere(np.ones_like(lanes))
    elif len(shape) == 1:
        at = flat.reshape(-1, 1)
    else:
        within = np.clip(flat.reshape(-1), 0, max(0, size - 1))
        at = np.stack(np.unravel_index(within, shape or (1,)), -1)
    return Touch(launch, program, touch.stored, name, shape, at, mask.reshape(-1))


def _pallas(fn: Callable[..., Any], names: list[str], arrays: Sequence, options: dict) -> Trace:
    from parity.frameworks import jax as twin
    from parity.frameworks import mosaic_interpreter

    seen: list[Any] = []
    with mosaic_interpreter.traffic(seen.append) as moved, mosaic_interpreter.patience(PATIENCE):
        outputs = twin.outputs_of(twin.run(fn, arrays, options))
    buffers = sorted({touch.buffer for touch in seen})
    labels = [*names, *_outs(outputs)]
    if len(labels) != len(buffers):  # several kernels, or an array that nobody touched
        labels = [f"array {i}" for i in range(len(buffers))]
    label = dict(zip(buffers, labels, strict=True))
    touches = []
    for touch in seen:
        sides = [np.arange(s.start, s.stop, s.step or 1) for s in touch.box]
        at = np.stack(np.meshgrid(*sides, indexing="ij"), -1).reshape(-1, len(sides))
        live = np.asarray(((at >= 0) & (at < np.array(touch.shape))).all(1))
        program = tuple(map(int, touch.block))
        touches.append(Touch(0, program, touch.stored, label[touch.buffer], touch.shape, at, live))
    return Trace(outputs, tuple(touches), moved.read, moved.written)


def _outs(outputs: Sequence[Any]) -> list[str]:
    return ["out", *(f"out{i}" for i in range(1, len(outputs)))]


class Conflict(NamedTuple):
    """An element that two programs of one launch touch, one of them storing, with no order."""

    first: tuple[int, ...]
    second: tuple[int, ...]
    both_store: bool
    lanes: int  # how many elements are contested, over all programs


class Watch:
    """Finds what Triton's interpreter lets pass: programs that meet.

    Give `each` to triton_interpreter.traffic, inside triton_interpreter.launches() as launched.
    Atomics do not come by here: they are ordered.
    """

    def __init__(self, launched: Sequence[Any]) -> None:
        self._launched = launched
        self._seen: dict[tuple[int, bool], list[tuple[tuple[int, ...], np.ndarray]]] = {}

    def each(self, touch: Any) -> None:
        at = np.unique(np.broadcast_to(touch.addresses, touch.mask.shape)[touch.mask])
        program, stored = tuple(map(int, touch.program)), bool(touch.stored)
        self._seen.setdefault((len(self._launched), stored), []).append((program, at))

    def conflict(self) -> Conflict | None:
        for launch, stored in sorted(self._seen):
            if not stored:
                continue
            writers, owner, programs = self._owners(launch, True)
            again = np.flatnonzero((writers[1:] == writers[:-1]) & (owner[1:] != owner[:-1]))
            if again.size:
                i = int(again[0])
                two = programs[owner[i]], programs[owner[i + 1]]
                return Conflict(*two, True, int(np.unique(writers[again]).size))
            if (launch, False) not in self._seen:
                continue
            readers, reader, _ = self._owners(launch, False)
            place = np.minimum(np.searchsorted(writers, readers), len(writers) - 1)
            meet = np.flatnonzero((writers[place] == readers) & (owner[place] != reader))
            if meet.size:
                i = int(meet[0])
                two = programs[reader[i]], programs[owner[place[i]]]
                return Conflict(*two, False, int(np.unique(readers[meet]).size))
        return None

    def _owners(self, launch: int, stored: bool) -> tuple[np.ndarray, np.ndarray, list]:
        """(addresses in order, the number of the program behind each, programs by number)."""
        found = self._seen[launch, stored]
        all_of_it = found + self._seen.get((launch, not stored), [])
        programs = sorted({program for program, _ in all_of_it})
        number = {program: i for i, program in enumerate(programs)}
        at = np.concatenate([a for _, a in found])
        who = np.concatenate([np.full(a.size, number[p]) for p, a in found])
        pairs = np.unique(np.stack([at.astype(np.int64), who]), axis=1)
        return pairs[0], pairs[1], programs
