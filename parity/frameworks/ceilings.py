"""What the device can do at best, as calls to be timed beside the kernels, and its facts."""

import gc
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from parity.spec import dtype_named

CONTROL_BYTES = 16 << 20  # read + written: well inside L2, so that a warm cache would show
LARGEST = 4 << 30  # a footprint follows the work, up to here: 2^30 integers of 32 bits
GEMM = 8192
BLOCK = 8192


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
    """The driver's copy, which reads and writes `nbytes` in all, and the bytes it really moves."""
    x, y = _two_halves(nbytes)
    return (lambda: y.copy_(x)), 8.0 * x.numel()


def negate(nbytes: float) -> tuple[Callable[[], Any], float]:
    """A kernel that moves what `copy` moves: quicker than the driver below a gigabyte."""
    x, y = _two_halves(nbytes)
    return (lambda: torch.bitwise_not(x, out=y)), 8.0 * x.numel()


def read(nbytes: float) -> tuple[Callable[[], Any], float]:
    """A sum that reads `nbytes`, and the bytes it really reads: torch's own is slower.

    On an H200 a program for each block was quicker than loops, pipelined ones and TMA.
    """
    blocks = max(1, int(min(nbytes, LARGEST)) // (4 * BLOCK))
    x = torch.randint(-(2**31), 2**31 - 1, (blocks * BLOCK,), dtype=torch.int32, device="cuda")
    sums = torch.empty(blocks, dtype=torch.int32, device="cuda")
    launch: Any = _read_kernel[(blocks,)]
    return (lambda: launch(x, sums, BLOCK, num_warps=8)), 4.0 * len(x)


@triton.jit
def _read_kernel(x_ptr, sums_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    x = tl.load(x_ptr + i.to(tl.int64) * BLOCK + tl.arange(0, BLOCK))
    tl.store(sums_ptr + i, tl.sum(x))


def _two_halves(nbytes: float) -> tuple[torch.Tensor, torch.Tensor]:
    half = max(1, int(min(nbytes, LARGEST)) // 8)
    x = torch.randint(-(2**31), 2**31 - 1, (half,), dtype=torch.int32, device="cuda")
    return x, torch.empty_like(x)


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


def release() -> None:
    """Gives back what torch keeps of the memory that nothing uses: jax allocates beside it."""
    gc.collect()
    torch.cuda.empty_cache()
