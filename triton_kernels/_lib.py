"""What every Triton twin needs: sizes, checks, the GPU's facts, and a door for torch.compile.

Kernel files call these as module attributes (`_lib.num_sms()`), so that a compile-only gate can
answer for a GPU that is not there.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.runtime import driver

# Kernels are bound to the interpreter or to the compiler when they are defined: read the flag once.
INTERPRETING: bool = bool(triton.knobs.runtime.interpret)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is >= n: Triton's tiles have no other sizes."""
    return 1 << max(0, n - 1).bit_length()


def num_sms() -> int:
    """Number of streaming multiprocessors of the current GPU: the grid of a persistent kernel.

    The interpreter answers 2, so that a persistent loop takes several trips on a small tensor too.
    """
    if INTERPRETING:
        return 2
    return _multiprocessors(driver.active, driver.active.get_current_device())


@functools.cache
def _multiprocessors(active: Any, device: int) -> int:
    # Asking the driver takes a millisecond (measured on an H200): once is enough.
    return active.utils.get_device_properties(device)["multiprocessor_count"]


def registers(warps: int) -> int:
    """What a thread of a program can have, as `maxnreg` of kernels that wait for memory.

    Told so, ptxas issues all loads of a tile at once. Left to itself it saves registers, and uses
    the first loads before it issues the last.
    """
    return min(128, 65536 // (32 * warps))


def has_tma() -> bool:
    """Whether tensor memory access exists: Hopper and newer. The interpreter imitates it."""
    return INTERPRETING or driver.active.get_current_target().arch >= 90


def tma_ready(x: torch.Tensor) -> bool:
    """Whether TMA can address x [rows, columns]: it wants rows of adjacent elements whose starts
    lie at multiples of 16 bytes."""
    pitch = x.stride(0) * x.element_size()
    return x.stride(1) == 1 and pitch >= 16 and pitch % 16 == 0 and x.data_ptr() % 16 == 0


def rows_adjacent(x: torch.Tensor) -> torch.Tensor:
    """x, copied only if its rows are not runs of adjacent elements; any pitch will do."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Makes x's GPU the current one, where Triton launches; the current stream stays as it is."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def check_tensor(
    name: str, x: Any, shape: tuple[int | str, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    """Raises unless x is a tensor of that shape (a letter stands for any size), of one of those
    dtypes, on a device where the kernel can run."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    fits = len(x.shape) == len(shape) and all(
        isinstance(want, str) or want == got for want, got in zip(shape, x.shape, strict=True)
    )
    if not fits:
        letters = ", ".join(str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{letters}], got {list(x.shape)}")
    if x.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        got = str(x.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: expected dtype {names}, got {got}")
    if INTERPRETING:
        if x.device.type != "cpu":
            raise ValueError(
                f"{name}: expected a CPU tensor (Triton's interpreter is on), got {x.device}"
            )
        if x.dtype is torch.bfloat16:
            raise TypeError(
                f"{name}: expected float16 or float32, got bfloat16: Triton's interpreter "
                "multiplies bfloat16 as raw bits and truncates its stores"
            )
    elif x.device.type != "cuda" and not (x.device.type == "meta" and _compiling_only()):
        raise ValueError(
            f"{name}: expected a CUDA tensor, got one on {x.device} (TRITON_INTERPRET=1, set "
            "before triton is first imported, runs the kernels on CPU tensors)"
        )


def _compiling_only() -> bool:
    # A compile-only driver launches nothing, so that tensors without memory will do.
    return driver.active.get_active_torch_device().type != "cuda"


def check_same_device(**tensors: torch.Tensor | None) -> None:
    """Raises unless all tensors lie on the device of the first."""
    given = {name: x for name, x in tensors.items() if x is not None}
    (first, x), *rest = given.items()
    for name, other in rest:
        if other.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} as {first}, got {other.device}")


def check_config(config: Any, cls: type) -> None:
    if config is not None and not isinstance(config, cls):
        raise TypeError(
            f"config: expected {cls.__module__}.{cls.__name__} or None, got {type(config).__name__}"
        )


def check_static(name: str, value: Any, types: tuple[type, ...]) -> None:
    """Raises unless value is a Python value of one of those types."""
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        names = " or ".join(t.__name__ for t in types)
        raise TypeError(f"{name}: expected a Python {names}, got {type(value).__name__}")


def check_gpu() -> None:
    """Raises unless the current GPU is one these kernels have code for."""
    arch = 90 if INTERPRETING else driver.active.get_current_target().arch
    if not isinstance(arch, int) or arch < 80:
        raise NotImplementedError(
            "triton_kernels need an NVIDIA GPU from Ampere up (compute capability 8.0), got "
            f"{torch.cuda.get_device_name()} ({arch})"
        )


def fields(config: Any) -> list[int] | None:
    """A Config as a list of integers, which is what an operator of torch.library can take."""
    return None if config is None else [getattr(config, f) for f in type(config).__match_args__]


def opaque(name: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Decorates a launcher: torch.compile sees it as one operator, whose shapes `fake` tells.

    Eager calls go straight to the launcher and pay nothing for this.
    """

    def decorate(launch: Callable) -> Callable:
        op = torch.library.custom_op(f"triton_kernels::{name}", launch, mutates_args=())
        op.register_fake(fake)

        @functools.wraps(launch)
        def call(*args: Any) -> Any:
            return op(*args) if torch.compiler.is_compiling() else launch(*args)

        return call

    return decorate
