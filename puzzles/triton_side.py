"""The learner's Triton code, called and watched: guard bands, poison, launches, traffic.

A load or store outside what a kernel was given is stopped before it happens. Every tensor that is
made while it runs lies between two guard bands, and starts as poison: a bit pattern that no kernel
stores by chance. Sizes and names of what is made are no secret, values are.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from parity.frameworks import torch as twin
from parity.frameworks import triton_interpreter
from puzzles.seen import POISON, Seen

GUARD = 1 << 14  # elements on either side: as far as a stray block reaches
_MAKES = ("empty", "zeros", "ones", "full", "new_", "rand")
_EMPTY = ("empty", "new_empty")
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class StrayError(IndexError):
    """A kernel loads or stores where none of its tensors is."""


class _Band:
    """A tensor between two guard bands in one buffer."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        size = int(np.prod(shape, dtype=np.int64))
        self.buffer = torch.empty(size + 2 * GUARD, dtype=dtype)
        self._bits = self.buffer.view(_BITS[dtype.itemsize])
        self._bits.fill_(POISON[dtype.itemsize])
        self.inside = self.buffer[GUARD : GUARD + size].view(tuple(shape))

    def touched(self) -> bool:
        poison = POISON[self.buffer.element_size()]
        ends = torch.cat((self._bits[:GUARD], self._bits[-GUARD:]))
        return bool((ends != poison).any())


class GuardBands(TorchDispatchMode):
    """Puts bands around what is allocated inside."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and importing the compiler takes two seconds

    def __init__(self) -> None:
        super().__init__()
        self.made: list[_Band] = []
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func.overloadpacket).removeprefix("aten.")
        self.operations.append(name)
        if not name.startswith(_MAKES) or not isinstance(out, torch.Tensor):
            return out
        if not out.numel() or not out.is_contiguous() or out.dtype.itemsize not in _BITS:
            return out
        band = _Band(out.shape, out.dtype)
        if not name.startswith(_EMPTY):
            band.inside.copy_(out)
        self.made.append(band)
        return band.inside


def call(
    solve: Callable[..., Any],
    arrays: Mapping[str, np.ndarray],
    options: Mapping[str, Any],
    glue: Sequence[str],
) -> tuple[tuple[np.ndarray, ...], Seen]:
    """The outputs of one call, and what was seen of it."""
    bands = {name: _Band(x.shape, twin.native(x).dtype) for name, x in arrays.items()}
    for name, band in bands.items():
        band.inside.copy_(twin.native(arrays[name]))
    args = [band.inside for band in bands.values()]
    before = [twin.fingerprint(twin.harness(x)) for x in args]
    with (
        triton_interpreter.launches() as launched,
        triton_interpreter.traffic(lambda touch: _must_lie_inside(touch, launched)) as traffic,
        GuardBands() as made,
    ):
        out = twin.outputs_of(solve(*args, **options))
    outputs = tuple(twin.harness(_tensor(x)) for x in out)
    changed = [
        name
        for name, x, hashed in zip(bands, args, before, strict=True)
        if twin.fingerprint(twin.harness(x)) != hashed
    ]
    beside = [f"input {name}" for name, band in bands.items() if band.touched()]
    beside += [f"a tensor of shape {list(b.inside.shape)}" for b in made.made if b.touched()]
    return outputs, Seen(
        launches=len(launched),
        read=traffic.read,
        written=traffic.written,
        allocated=sum(b.inside.numel() * b.inside.element_size() for b in made.made),
        inputs=sum(x.nbytes for x in arrays.values()),
        changed=changed,
        beside=beside,
        foreign=twin.foreign(made.operations, glue),
    )


def _must_lie_inside(touch: triton_interpreter.Touch, launched: Sequence[Any]) -> None:
    """Raises StrayError where a lane that takes part is in no tensor of the kernel's arguments."""
    lanes = np.broadcast_to(touch.addresses, touch.mask.shape)[touch.mask].astype(np.int64)
    outside = np.ones(lanes.shape, bool)
    extents = list(_extents(launched[-1].arguments))
    for _, start, end, _ in extents:
        outside &= (lanes < start) | (lanes >= end)
    if not outside.any():
        return
    first = int(lanes[outside][0])
    lost = int(outside.sum())
    who, s = ("1 lane", "s") if lost == 1 else (f"{lost} lanes", "")
    does = f"store{s} to" if touch.stored else f"load{s} from"
    program = ", ".join(map(str, touch.program))
    says = f"{who} of program ({program}) {does} addresses outside"
    if not extents:
        raise StrayError(f"{says}: the kernel was given no tensor")
    name, start, end, x = min(extents, key=lambda e: max(e[1] - first, first - e[2]))
    at = (first - start) // x.element_size()
    raise StrayError(
        f"{says} what the kernel was given: the first is element {at} of {name}, which has "
        f"{(end - start) // x.element_size()} elements"
    )


def _extents(arguments: Mapping[str, Any]) -> Iterator[tuple[str, int, int, torch.Tensor]]:
    """Of each tensor its name, its first address, and the first one after it."""
    for name, x in arguments.items():
        x = getattr(x, "base", x) if hasattr(x, "block_shape") else x  # a tensor descriptor
        if isinstance(x, torch.Tensor) and x.numel():
            reach = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
            yield name, x.data_ptr(), x.data_ptr() + (reach + 1) * x.element_size(), x


def ghost(
    solve: Callable[..., Any], arrays: Mapping[str, np.ndarray], options: Mapping[str, Any]
) -> tuple[np.ndarray, ...]:
    """What solve returns when its kernels do nothing."""
    args = [twin.native(x.copy()) for x in arrays.values()]
    with triton_interpreter.launches(ghost=True), GuardBands():
        return tuple(twin.harness(_tensor(x)) for x in twin.outputs_of(solve(*args, **options)))


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """Around the import of the learner's file: nothing to prepare."""
    yield


def _tensor(x: Any) -> torch.Tensor:
    if type(x) is not torch.Tensor:
        raise TypeError(f"solve returned a {type(x).__name__} where a torch.Tensor was expected")
    return x.contiguous()
