"""PyTorch and Triton, as the harness sees them; parity.frameworks lists the names both offer."""

import contextlib
import gc
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from parity import frameworks
from parity.frameworks import Kernel, load_target
from parity.spec import (
    Descriptor,
    Given,
    Integers,
    Keep,
    Normal,
    Routing,
    Uniform,
    dtype_named,
    with_dead,
)

TWIN = "triton"

# aten operations that move or name memory and compute nothing
_STRUCTURE = frozenset(
    (
        "empty empty_like empty_strided new_empty new_empty_strided zeros zeros_like new_zeros "
        "zero_ fill_ view _unsafe_view reshape as_strided alias detach slice select expand "
        "permute transpose t unsqueeze squeeze unflatten split clone copy_ _to_copy contiguous "
        "resize_ set_ lift_fresh"
    ).split()
)


def device() -> str:
    return "cpu" if frameworks.interpreted() else "cuda"


def load(target: str) -> Kernel:
    """The kernel behind "module:function"; without X_fwd and X_bwd beside it, autograd serves."""
    public, module = load_target(target)
    fwd = getattr(module, f"{public.__name__}_fwd", None)
    bwd = getattr(module, f"{public.__name__}_bwd", None)
    if fwd is None or bwd is None:
        fwd, bwd = _through_autograd(public)
    return Kernel(public, fwd, bwd, str(module.__file__), vars(module))


def _through_autograd(public: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def fwd(*inputs: Any, **options: Any) -> tuple[Any, Any]:
        leaves = [
            x.detach().requires_grad_() if x is not None and x.is_floating_point() else x
            for x in inputs
        ]
        with torch.enable_grad():
            out = public(*leaves, **options)
        outs = out if isinstance(out, tuple) else (out,)
        detached = tuple(o.detach() for o in outs)
        return (detached if isinstance(out, tuple) else detached[0]), (leaves, outs)

    def bwd(res: Any, *cotangents: Any, **options: Any) -> tuple[Any, ...]:
        leaves, outs = res
        wanted = [x for x in leaves if x is not None and x.requires_grad]
        if not any(o.requires_grad for o in outs):
            raise TypeError("the function's result does not depend on its inputs through autograd")
        return torch.autograd.grad(outs, wanted, cotangents, retain_graph=True)

    return fwd, bwd


def draw(descriptors: Mapping[str, Descriptor], seed: int) -> dict[str, Any]:
    """Harness arrays for the descriptors: by NumPy on a CPU, on the device itself on a GPU."""
    if device() == "cpu":
        rng = np.random.default_rng(seed)
        return {name: d.draw(rng) for name, d in descriptors.items()}
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return {name: _draw_on_device(d, generator) for name, d in descriptors.items()}


def _draw_on_device(d: Descriptor, generator: torch.Generator) -> torch.Tensor:
    x = torch.empty(d.shape, dtype=dtype_named(torch, d.dtype), device="cuda")
    if isinstance(d, Given):
        return x.copy_(torch.from_numpy(np.array(d.make())))
    if isinstance(d, Routing):
        return x.copy_(_group_sizes(d, generator))
    flat = x.view(-1)
    step = 1 << 28  # elements at a time: the float32 draw of a huge array would not be small
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step]
        match d:
            case Normal():
                part.copy_(torch.randn(part.shape, generator=generator, device="cuda") * d.std)
            case Uniform():
                drawn = torch.rand(part.shape, generator=generator, device="cuda")
                part.copy_(drawn * (d.high - d.low) + d.low)
            case Integers():
                part.copy_(
                    torch.randint(d.low, d.high + 1, part.shape, generator=generator, device="cuda")
                )
            case Keep():
                part.copy_(torch.rand(part.shape, generator=generator, device="cuda") < d.p)
    if isinstance(d, Keep):
        x[list(d.dead_rows)] = False
    return with_dead(x, d) if isinstance(d, (Normal, Integers)) else x


def _group_sizes(d: Routing, generator: torch.Generator) -> torch.Tensor:
    if d.kind == "ragged":
        return torch.from_numpy(d.draw(np.random.default_rng()))
    share = torch.from_numpy(d.shares()).cuda()
    share = share[torch.randperm(d.shape[0], generator=generator, device="cuda")]
    experts = torch.multinomial(share, d.rows, replacement=True, generator=generator)
    return torch.bincount(experts, minlength=d.shape[0])


def native(x: Any) -> Any:
    """A harness array as a torch tensor on the same memory."""
    if x is None or isinstance(x, torch.Tensor):
        return x
    x = np.ascontiguousarray(x)
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def harness(x: Any) -> Any:
    """A native array as the harness keeps it: NumPy on a CPU, the tensor itself on a GPU."""
    if x is None or x.is_cuda:
        return x
    x = x.detach()
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    if x.dtype == torch.float8_e4m3fn:
        return x.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    return x.numpy()


def fingerprint(x: Any) -> Any:
    """Changes when the harness array does: a hash of its bytes, on a GPU sums over its words."""
    if isinstance(x, np.ndarray):
        return hashlib.sha256(np.ascontiguousarray(x).view(np.uint8)).hexdigest()
    flat = x.contiguous().view(-1)
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    flat = flat.view(words)
    return int(flat.sum(dtype=torch.int64)), int(flat[1::2].sum(dtype=torch.int64))


def release() -> None:
    """Hands cached GPU memory back, so that jax can have it."""
    if device() == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def same_bits(x: Any, y: Any) -> bool:
    """Bit for bit equal (NaNs included)."""
    if x is None or y is None:
        return x is y
    as_bytes = [t.contiguous().view(torch.uint8) if t.numel() else t for t in (x, y)]
    return x.dtype == y.dtype and x.shape == y.shape and torch.equal(*as_bytes)


def run(fn: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """Calls fn with every new tensor filled with NaN first, and waits for it."""
    with _filled_with_nan():
        out = fn(*args, **options)
    synchronize()
    return out


@contextlib.contextmanager
def _filled_with_nan() -> Iterator[None]:
    """torch.empty gives NaN (the largest integer for integers): an element nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def thunk(
    fn: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any]
) -> Callable[[], Any]:
    return lambda: fn(*args, **options)


def synchronize() -> None:
    if device() == "cuda":
        torch.cuda.synchronize()


def outputs_of(out: Any) -> tuple[Any, ...]:
    return tuple(out) if isinstance(out, (tuple, list)) else (out,)


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func.overloadpacket).removeprefix("aten."))
        return func(*args, **(kwargs or {}))


def witness(
    fn: Callable[..., Any],
    args: Sequence[Any],
    options: Mapping[str, Any],
    glue: Sequence[str],
    *,
    share: bool = False,
) -> list[str]:
    """Who did the work? Sentences about torch operations that compute, or about no launch.

    On a GPU also: at least nine tenths of the device time must be in kernels launched through
    Triton.
    """
    from parity.frameworks import triton_interpreter

    with triton_interpreter.launches() as launched, _Operations() as operations:
        fn(*args, **options)
    synchronize()
    wrong = foreign(operations.seen, glue)
    if not launched:
        wrong.append("no Triton kernel was launched")
    elif share and device() == "cuda":
        wrong += share_of_ours(lambda: fn(*args, **options), [launch.kernel for launch in launched])
    return wrong


def foreign(operations: Sequence[str], glue: Sequence[str]) -> list[str]:
    """A sentence for each of these torch operations that computes and is no glue."""
    allowed = _STRUCTURE | set(glue)
    found = sorted({op for op in operations if op.split(".")[0] not in allowed})
    return [f"torch operation {op} did part of the work" for op in found]


def share_of_ours(call: Callable[[], Any], ours: Sequence[str]) -> list[str]:
    """A sentence if kernels named like none of `ours` take over a tenth of the device time."""
    from parity.frameworks import tracer

    kernels = tracer.kernels(call)
    total = sum(k.end_us - k.start_us for k in kernels)
    foreign: dict[str, float] = {}
    for k in kernels:
        if not any(name in k.name for name in ours):
            foreign[k.name] = foreign.get(k.name, 0.0) + k.end_us - k.start_us
    if total and sum(foreign.values()) <= 0.1 * total:
        return []
    if not total:
        return ["the profiler saw no kernel at all"]
    worst = max(foreign, key=lambda name: foreign[name])
    return [
        f"{sum(foreign.values()) / total:.0%} of the device time is not ours, most in {worst[:80]}"
    ]


def library(stem: str) -> Callable[..., Any] | None:
    """The same mathematics in PyTorch's own operations: planted as a library call in disguise."""

    def matmul(a: Any, b: Any, *, out_dtype: str | None = None) -> Any:
        return (a.float() @ b.float()).to(dtype_named(torch, out_dtype) if out_dtype else a.dtype)

    def softmax(x: Any, *, scale: float = 1.0) -> Any:
        return torch.softmax(scale * x.float(), 1).to(x.dtype)

    def rms_norm(x: Any, w: Any, *, eps: float = 1e-6) -> Any:
        return torch.nn.functional.rms_norm(x.float(), x.shape[1:], w.float(), eps).to(x.dtype)

    def moe_gemm(x: Any, w: Any, sizes: Any, **options: Any) -> Any:
        ends = sizes.cumsum(0).tolist()
        groups = zip([0, *ends], ends, w, strict=False)
        live = [x[a:b].float() @ each.float() for a, b, each in groups]
        dead = [x.new_zeros((x.shape[0] - ends[-1], w.shape[2])).float()]
        return torch.cat(live + dead).to(x.dtype)

    known = {"matmul": matmul, "softmax": softmax, "rms_norm": rms_norm, "moe_gemm": moe_gemm}
    return known.get(stem)
