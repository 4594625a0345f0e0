"""What the device can do at best, as calls to be timed beside the kernels, and its facts."""

from collections.abc import Callable
from typing import Any

import torch

from parity.spec import dtype_named

CONTROL_BYTES = 16 << 20  # read + written: well inside L2, so that a warm cache would show
LARGEST = 4 << 30  # a ceiling's footprint follows the work's, up to here
GEMM = 8192
ROW = 16384


def facts() -> dict[str, Any]:
    """The current CUDA device: name, uuid, sizes and what runs on it."""
    p = torch.cuda.get_device_properties()
    return {
        "name": p.name,
        "uuid": str(p.uuid),
        "sms": p.multi_processor_count,
        "l2_bytes": p.L2_cache_size,
        "memory_bytes": p.total_memory,
        "capability": f"{p.major}.{p.minor}",
    }


def copy(nbytes: float) -> tuple[Callable[[], Any], float]:
    """A copy that reads and writes `nbytes` in all, and the bytes it really moves."""
    half = max(1, int(min(nbytes, LARGEST)) // 8)
    x = torch.randint(-(2**31), 2**31 - 1, (half,), dtype=torch.int32, device="cuda")
    y = torch.empty_like(x)
    return (lambda: y.copy_(x)), 8.0 * half


def read(nbytes: float) -> tuple[Callable[[], Any], float]:
    """Sums of rows that read `nbytes`, and the bytes they really read; what they write is little.

    Rows, because a sum of everything takes a second, small launch.
    """
    rows = max(1, int(min(nbytes, LARGEST)) // (4 * ROW))
    x = torch.randn(rows, ROW, device="cuda")
    return (lambda: x.sum(1)), 4.0 * x.numel()


def gemm(dtype: str) -> tuple[Callable[[], Any], float]:
    """torch's own product of two random square matrices, and its operations."""
    kind = dtype_named(torch, dtype)
    a, b = (torch.randn(GEMM, GEMM, device="cuda").to(kind) for _ in range(2))
    return (lambda: a @ b), 2.0 * GEMM**3


def control() -> tuple[Callable[[], Any], float]:
    """The same small copy twice: the second one finds its data in the cache, the first may not."""
    call, moved = copy(CONTROL_BYTES)

    def twice() -> None:
        call()
        call()

    return twice, moved


def synchronize() -> None:
    torch.cuda.synchronize()
