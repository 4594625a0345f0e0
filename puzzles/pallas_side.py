"""The learner's Pallas code, called and watched.

Mosaic GPU's interpreter does most of it: unwritten memory is NaN, races are found, and JAX's arrays
cannot be written to. Kernels are counted in the jaxpr. For the ghost replay the two functions that
make a kernel are replaced before the learner's file is imported.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from parity.frameworks import jax as twin
from puzzles.seen import Seen

_ghostly = [False]


def call(
    solve: Callable[..., Any],
    arrays: Mapping[str, np.ndarray],
    options: Mapping[str, Any],
    glue: Sequence[str],
) -> tuple[tuple[np.ndarray, ...], Seen]:
    """The outputs of one call, and what was seen of it."""
    args = [twin.native(x) for x in arrays.values()]
    outputs = _outputs(twin.run(solve, args, options))
    foreign = twin.witness(solve, args, options, glue)
    return outputs, Seen(
        launches=twin.launched(solve, args, options),
        inputs=sum(x.nbytes for x in arrays.values()),
        foreign=[sentence for sentence in foreign if "was called" not in sentence],
        any_nan=True,
    )


def ghost(
    solve: Callable[..., Any], arrays: Mapping[str, np.ndarray], options: Mapping[str, Any]
) -> tuple[np.ndarray, ...]:
    """What solve returns when its kernels do nothing."""
    jax.clear_caches()  # the learner's own jit may remember the kernels
    _ghostly[0] = True
    try:
        return _outputs(solve(*map(twin.native, arrays.values()), **options))
    finally:
        _ghostly[0] = False
        jax.clear_caches()


def _outputs(out: Any) -> tuple[np.ndarray, ...]:
    found = twin.outputs_of(out)
    for x in found:
        if not isinstance(x, jax.Array):
            raise TypeError(f"solve returned a {type(x).__name__} where a jax.Array was expected")
    return tuple(np.array(x) for x in found)


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """Around the import of the learner's file, which may take the two functions by name."""
    made = {(plgpu, "kernel"): plgpu.kernel, (pl, "pallas_call"): pl.pallas_call}
    for (module, name), function in made.items():
        setattr(module, name, _able_to_do_nothing(function))
    yield


def _able_to_do_nothing(make: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make)
    def made(body: Any = None, *args: Any, **options: Any) -> Any:
        if body is None:  # a decorator with arguments
            return functools.partial(made, *args, **options)
        kernel = make(body, *args, **options)
        types = options.get("out_type", options.get("out_shape"))

        def call(*arrays: Any) -> Any:
            return jax.tree.map(_poison, types) if _ghostly[0] else kernel(*arrays)

        return call

    return made


def _poison(kind: Any) -> jax.Array:
    if jnp.issubdtype(kind.dtype, jnp.floating):
        return jnp.full(kind.shape, jnp.nan, kind.dtype)
    return jnp.full(kind.shape, 0xA5, jnp.uint8).astype(kind.dtype)
