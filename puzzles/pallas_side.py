"""The learner's Pallas code, called and watched.

Mosaic GPU's interpreter does most of it: unwritten memory is NaN, races are found, and JAX's arrays
cannot be written to. Kernels are counted in the jaxpr. For the ghost replay the two functions that
make a kernel are replaced before the learner's file is imported.
"""

import contextlib
import functools
import logging
import traceback
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
    with _first_failure():
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


class _Failures(logging.Handler):
    """What the interpreter's callbacks raised; of jax's log, which prints the frames of each."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[BaseException] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            self.seen.append(record.exc_info[1])


@contextlib.contextmanager
def _first_failure() -> Iterator[None]:
    """Raises what a callback of the interpreter raised, and not jax's report of it.

    Its `places` are the lines that made the operation that failed, the innermost first.
    """
    log, failures = logging.getLogger("jax._src.callback"), _Failures()
    propagated, log.propagate = log.propagate, False
    log.addHandler(failures)
    try:
        yield
    except Exception as reported:
        if not failures.seen:
            raise
        for e in failures.seen:
            vars(e)["places"] = _places(e)
        # Other threads only say that one failed.
        raise max(failures.seen, key=lambda e: bool(vars(e)["places"])) from reported
    finally:
        log.removeHandler(failures)
        log.propagate = propagated


def _places(error: BaseException) -> list[tuple[str, int]]:
    """(file, line) of the calls that traced the equation whose callback raised."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        info = frame.f_locals.get("source_info")
        if info is not None and info.traceback is not None:
            return [(f.file_name, f.line_num) for f in info.traceback.frames]
    return []


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
