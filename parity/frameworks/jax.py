"""JAX and Pallas, as the harness sees them; parity.frameworks lists the names both offer."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jcore

from parity import frameworks
from parity.frameworks import Kernel, load_target

TWIN = "pallas"

# primitives that contain others, or move and name memory, and compute nothing themselves
_STRUCTURE = frozenset(
    (
        "jit pjit closed_call core_call custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr "
        "custom_vmap_call remat shard_map reshape broadcast_in_dim squeeze expand_dims "
        "stop_gradient iota optimization_barrier new_ref"
    ).split()
)
_MOSAIC = frozenset(("pallas_call", "core_map", "mpmd_map"))


def load(target: str) -> Kernel:
    """The kernel behind "module:function"; without X_fwd and X_bwd beside it, jax.vjp serves."""
    public, module = load_target(target)
    fwd = getattr(module, f"{public.__name__}_fwd", None)
    bwd = getattr(module, f"{public.__name__}_bwd", None)
    if fwd is None or bwd is None:
        fwd, bwd = _through_vjp(public)
    return Kernel(public, fwd, bwd, str(module.__file__), vars(module))


def _through_vjp(public: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def fwd(*inputs: Any, **options: Any) -> tuple[Any, Any]:
        return public(*inputs, **options), inputs

    def bwd(res: Any, *cotangents: Any, **options: Any) -> tuple[Any, ...]:
        out, pull = jax.vjp(functools.partial(public, **options), *res)
        grads = pull(cotangents if isinstance(out, tuple) else cotangents[0])
        return tuple(g for g in grads if g is not None and g.dtype != jax.dtypes.float0)

    return fwd, bwd


def native(x: Any) -> Any:
    """A harness array as a jax array; on a GPU the same memory, handed over by DLPack."""
    if x is None or isinstance(x, jax.Array):
        return x
    if isinstance(x, np.ndarray):
        return jnp.asarray(x)
    import torch

    if (
        x.dtype == torch.bool
    ):  # DLPack's bool is not exchanged by every version: same bytes, same address
        return jax.dlpack.from_dlpack(x.view(torch.uint8)).view(jnp.bool_)
    return jax.dlpack.from_dlpack(x)


def harness(x: Any) -> Any:
    """As the harness keeps it: NumPy on a CPU, a torch tensor on the same memory on a GPU."""
    if x is None:
        return None
    if frameworks.interpreted():
        return np.asarray(x)
    import torch

    if x.dtype == jnp.float8_e4m3fn:  # DLPack's float8 is not exchanged by every version
        return torch.from_dlpack(x.view(jnp.uint8)).view(torch.float8_e4m3fn)
    return torch.from_dlpack(x)


def same_bits(x: Any, y: Any) -> bool:
    """Bit for bit equal (NaNs included)."""
    if x is None or y is None:
        return x is y
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}[x.dtype.itemsize]
    return bool(jnp.array_equal(*(v.view(bits) if v.dtype != jnp.bool_ else v for v in (x, y))))


@functools.lru_cache(maxsize=256)
def _jitted(fn: Callable[..., Any], options: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    return jax.jit(functools.partial(fn, **dict(options)))


def _compiled(fn: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    arrays = {k: v for k, v in options.items() if isinstance(v, jax.Array)}
    static = sorted((k, v) for k, v in options.items() if k not in arrays)
    return functools.partial(_jitted(fn, tuple(static)), **arrays)


def run(fn: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """Calls fn under jit and waits for it. In the interpreter a data race is an error (DataRace).

    On a GPU the pool is dirtied with NaN first: an element nobody wrote shows.
    """
    if not frameworks.interpreted():
        _dirty_pool([*args, *options.values()])
        return jax.block_until_ready(_compiled(fn, options)(*args))
    from parity.frameworks import mosaic_interpreter

    with mosaic_interpreter.interpreting(detect_races=True), mosaic_interpreter.watched():
        return jax.block_until_ready(_compiled(fn, options)(*args))


def _dirty_pool(args: Sequence[Any]) -> None:
    most = 1 << 30  # bytes: huge workloads need the memory themselves
    arrays = [x for x in jax.tree.leaves(args) if isinstance(x, jax.Array)]
    sizes = [min(most, x.size * x.dtype.itemsize) for x in arrays] or [0]
    garbage = [jnp.full(max(1, size // 2), jnp.nan, jnp.bfloat16) for size in 2 * sizes]
    jax.block_until_ready(garbage)


def thunk(
    fn: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any]
) -> Callable[[], Any]:
    compiled = _compiled(fn, options)
    return lambda: compiled(*args)


def synchronize() -> None:
    jax.effects_barrier()


def outputs_of(out: Any) -> tuple[Any, ...]:
    return tuple(out) if isinstance(out, (tuple, list)) else (out,)


def _equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation, inside calls and control flow too, but not inside a Mosaic kernel."""
    for eqn in jaxpr.eqns:
        yield eqn
        if eqn.primitive.name in _MOSAIC:
            continue
        for value in jax.tree.leaves(
            list(eqn.params.values()),
            is_leaf=lambda v: isinstance(v, (jcore.Jaxpr, jcore.ClosedJaxpr)),
        ):
            if isinstance(value, jcore.ClosedJaxpr):
                yield from _equations(value.jaxpr)
            elif isinstance(value, jcore.Jaxpr):
                yield from _equations(value)


def _primitives(
    fn: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any]
) -> list[str]:
    jaxpr = jax.make_jaxpr(functools.partial(fn, **options))(*args)
    return [eqn.primitive.name for eqn in _equations(jaxpr.jaxpr)]


def launched(fn: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any]) -> int:
    """How many Mosaic kernels one call of fn names; one inside a loop counts once."""
    return sum(name in _MOSAIC for name in _primitives(fn, args, options))


def witness(
    fn: Callable[..., Any],
    args: Sequence[Any],
    options: Mapping[str, Any],
    glue: Sequence[str],
    *,
    share: bool = False,
) -> list[str]:
    """Who did the work? Sentences about what computes outside a Mosaic kernel.

    With `share`, on a GPU: nine tenths of the device time must be in Mosaic kernels (on real sizes;
    around a tiny kernel the glue takes longer than the kernel).
    """
    names = _primitives(fn, args, options)
    foreign = sorted(set(names) - _STRUCTURE - _MOSAIC - set(glue))
    wrong = [f"jax primitive {name} did part of the work" for name in foreign]
    if not _MOSAIC & set(names):
        wrong.append("no Mosaic GPU kernel was called")
    elif share and not frameworks.interpreted():
        from parity.frameworks.torch import share_of_ours

        call = thunk(fn, args, options)
        wrong += share_of_ours(lambda: jax.block_until_ready(call()), ("mosaic_gpu_kernel",))
    return wrong


def library(stem: str) -> Callable[..., Any] | None:
    """The same mathematics in JAX's own operations: planted as a library call in disguise."""

    def matmul(a: Any, b: Any, *, out_dtype: str | None = None) -> Any:
        c = jnp.matmul(a, b, precision="highest", preferred_element_type=jnp.float32)
        return c.astype(out_dtype or a.dtype)

    def softmax(x: Any, *, scale: float = 1.0) -> Any:
        return jax.nn.softmax(scale * x.astype(jnp.float32), axis=1).astype(x.dtype)

    def rms_norm(x: Any, w: Any, *, eps: float = 1e-6) -> Any:
        h = x.astype(jnp.float32)
        y = h * jax.lax.rsqrt(jnp.mean(h * h, axis=1, keepdims=True) + eps)
        return (y * w.astype(jnp.float32)).astype(x.dtype)

    def moe_gemm(x: Any, w: Any, sizes: Any, **options: Any) -> Any:
        return jax.lax.ragged_dot(x, w, sizes)

    known = {"matmul": matmul, "softmax": softmax, "rms_norm": rms_norm, "moe_gemm": moe_gemm}
    return known.get(stem)
