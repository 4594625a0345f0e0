"""Triton's private names the checks need: its interpreter, and launches. Triton 3.6 to 3.9.

`probes()` runs what the interpreter is known to get wrong without saying so (docs/silent-lies.md);
the tests assert that each is still wrong, so that a fix upstream shows and a rule here can go.
"""

# A constexpr parameter takes a Python value, which triton's annotations do not say.
# pyright: reportArgumentType=false

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl

from parity import frameworks


class Probe(NamedTuple):
    name: str
    wrong: bool  # still wrong, as documented
    detail: str


class Launch(NamedTuple):
    kernel: str
    arguments: dict[str, Any]  # by parameter name, without num_warps and the like


class Touch(NamedTuple):
    """One load or store of one program: an address for each lane, and which lanes take part."""

    program: tuple[int, int, int]
    stored: bool
    addresses: np.ndarray
    mask: np.ndarray  # bool
    itemsize: int


@dataclass
class Traffic:
    """Bytes that interpreted kernels moved between memory and registers; masked lanes do not."""

    read: int = 0
    written: int = 0


@contextlib.contextmanager
def traffic(each: Callable[[Touch], None] | None = None) -> Iterator[Traffic]:
    """Counts what the kernels inside load and store through pointers and descriptors.

    each: is told every load and store as it happens.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    moved = Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def seen(self: Any, pointers: Any, mask: Any, stored: bool) -> int:
        itemsize = pointers.get_element_ty().primitive_bitwidth // 8
        lanes = np.asarray(mask.data).astype(bool)  # of a descriptor, mask is an array
        if each:
            each(Touch(self.grid_idx, stored, pointers.data, lanes, itemsize))
        return int(lanes.sum()) * itemsize

    def loaded(self: Any, ptrs: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        moved.read += seen(self, ptrs, mask, False)
        return load(self, ptrs, mask, *rest, **named)

    def stored(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        moved.written += seen(self, ptrs, mask, True)
        return store(self, ptrs, value, mask, *rest, **named)

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", loaded),
        mock.patch.object(InterpreterBuilder, "create_masked_store", stored),
    ):
        yield moved


@contextlib.contextmanager
def launches(*, ghost: bool = False) -> Iterator[list[Launch]]:
    """The Triton kernels launched inside the block, interpreted or compiled.

    ghost: they are noted and do nothing.
    """
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

    seen: list[Launch] = []
    owner, method = (GridExecutor, "__call__") if frameworks.interpreted() else (JITFunction, "run")
    launch = getattr(owner, method)

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        parameters = inspect.signature(self.fn).parameters
        named = {k: v for k, v in kwargs.items() if k in parameters}
        given = dict(zip(parameters, args, strict=False)) | named
        seen.append(Launch(getattr(self.fn, "__name__", str(self.fn)), given))
        return None if ghost else launch(self, *args, **kwargs)

    with mock.patch.object(owner, method, recorded):
        yield seen


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, n: tl.constexpr):
    i = tl.arange(0, n)[:, None] * n + tl.arange(0, n)[None, :]
    tl.store(c_ptr + i, tl.dot(tl.load(a_ptr + i), tl.load(b_ptr + i)))


@triton.jit
def _cast_kernel(x_ptr, y_ptr, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))


@triton.jit
def _beyond_kernel(x_ptr, n: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, n), 1.0)


def probes() -> list[Probe]:
    """Runs each known lie of the interpreter once. Needs CPU mode."""
    n = 16
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, n, generator=generator) for _ in range(2))

    def dot(dtype: torch.dtype) -> float:
        c = torch.empty(n, n)
        _dot_kernel[(1,)](a.to(dtype), b.to(dtype), c, n)
        truth = a.to(dtype).double() @ b.to(dtype).double()
        return float((c - truth).norm() / truth.norm())

    x = torch.randn(1 << 12, generator=generator)

    def cast(dtype: torch.dtype) -> float:
        y = torch.empty(x.shape, dtype=dtype)
        _cast_kernel[(1,)](x, y, x.numel())
        return float((y.float() != x.to(dtype).float()).double().mean())

    good, bad = dot(torch.float16), dot(torch.bfloat16)
    guarded = torch.zeros(32)
    _beyond_kernel[(1,)](guarded[:16], 32)
    found = [
        Probe("bf16_dot", bad > 1, f"bf16 tl.dot is off by {bad:.2g} (fp16: {good:.2g})"),
        *(
            Probe(
                f"cast_{str(d).removeprefix('torch.')}",
                wrong > 0,
                f"{wrong:.1%} of casts differ from round-to-nearest",
            )
            for d, wrong in ((d, cast(d)) for d in (torch.bfloat16, torch.float8_e4m3fn))
        ),
        Probe(
            "out_of_bounds",
            bool(guarded[16:].any()),
            "a store past the end of a tensor goes unnoticed",
        ),
    ]
    try:
        q = torch.from_numpy(np.random.default_rng(0).integers(-9, 9, (n, n), np.int8))
        c = torch.empty(n, n, dtype=torch.int32)
        _dot_kernel[(1,)](q, q, c, n)
        found.append(Probe("int8_dot", False, "int8 tl.dot runs"))
    except Exception as e:
        found.append(Probe("int8_dot", True, f"int8 tl.dot raises {type(e).__name__}"))
    return found
