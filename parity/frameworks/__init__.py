"""The two frameworks behind one interface. Only files in this folder import torch, triton or jax.

`parity.frameworks.torch` and `parity.frameworks.jax` offer the same names, so that the harness
never asks which language it is judging:

    TWIN                         "triton" or "pallas"
    load(target)                 "module:function" or "FILE.py:function" -> Kernel
    native(x), harness(x)        harness array <-> the framework's own, without a copy on a GPU
    run(fn, args, options)       calls fn on native arrays and waits for its result
    thunk(fn, args, options)     a zero-argument call of it, compiled and ready to be timed
    witness(fn, args, options, glue)  what, besides kernels of ours, did the work: a list of
    sentences

Harness arrays are NumPy arrays on a CPU and torch CUDA tensors on a GPU: both languages read the
same addresses there. Environment variables of either framework are set in this folder and nowhere
else.
"""

import atexit
import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from parity.spec import Problem, Workload

_cpu_mode: list[contextlib.ExitStack] = []

TWINS = {"triton": "parity.frameworks.torch", "pallas": "parity.frameworks.jax"}


class DataRace(RuntimeError):
    """Mosaic's race detector saw two accesses that nothing orders."""

    parity_reason = "race"


@dataclass(frozen=True)
class Kernel:
    """One implementation: the public function and its two passes.

    fwd(*inputs, **options) -> (outputs, res); bwd(res, *cotangents, **options) -> grads.
    """

    public: Callable[..., Any]
    fwd: Callable[..., Any]
    bwd: Callable[..., Any]
    where: str  # the source file, hashed into records
    beside: Mapping[str, Any] = field(default_factory=dict)  # what else that file defines


def twin(name: str) -> ModuleType:
    """The framework module of one twin: "triton" or "pallas"."""
    if name not in TWINS:
        raise ValueError(f"no twin {name!r}: expected one of {', '.join(TWINS)}")
    return importlib.import_module(TWINS[name])


def prepared(
    twin: ModuleType,
    kernel: Kernel,
    problem: Problem,
    work: Workload,
    which: str,
    arrays: Mapping[str, Any],
) -> tuple[Callable[..., Any], list[Any], dict[str, Any]]:
    """The function of a pass, its native arguments, and its options: static ones, and arrays that
    the function takes by keyword. A backward's forward has run.

    arrays: harness arrays by name.
    """

    def made(argument: str) -> Any:
        if argument not in problem.bundles:
            return None if argument in work.absent else twin.native(arrays[argument])
        name, of = problem.bundles[argument]
        parts = (None if n in work.absent else twin.native(arrays[n]) for n in of)
        return kernel.beside[name](*parts)

    if which in problem.further:
        further = problem.further[which]
        args = [made(n) for n in further.reads]
        return kernel.beside[further.function], args, further.options(work)
    args = [made(n) for n in problem.positional(work)]
    by_keyword = {n: made(n) for n in problem.inputs(work) if n in problem.keywords}
    options = dict(work.options) | by_keyword
    if which == "fwd":
        return kernel.public, args, options
    _, res = twin.run(kernel.fwd, args, options)
    cotangents = [twin.native(arrays[n]) for n in problem.cotangents(work)]
    options = {k: v for k, v in work.options.items() if k in problem.bwd_options}
    return kernel.bwd, [res, *cotangents], options


def interpreters(*, detect_races: bool = True, only: str | None = None) -> None:
    """Puts this process into CPU mode: Triton's interpreter and Mosaic GPU's, kernels unchanged.

    Call it before a kernel is first imported; calling it again does nothing. Mosaic's interpreter
    runs with its data-race detector unless `detect_races` is False. only="triton": Mosaic's stays
    out, and with it the import of jax.

    Raises:
        RuntimeError: triton, or jax with a GPU backend, is already in use in this process.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        if "triton" in sys.modules:
            raise RuntimeError(
                "triton was imported before parity.frameworks.interpreters(): its kernels decide "
                "at import time whether they are interpreted. Call interpreters() first."
            )
        os.environ["TRITON_INTERPRET"] = "1"
    if only == "triton":
        return
    # XLA's CPU client reads it once, for the size of its thread pool: one thread a core is too few.
    # Mosaic's interpreter waits for barriers on those threads, and two cores wait for ever.
    os.environ.setdefault("NPROC", "32")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if os.environ["JAX_PLATFORMS"] != "cpu":
        raise RuntimeError(
            f"JAX_PLATFORMS is {os.environ['JAX_PLATFORMS']!r}: the interpreters need 'cpu'"
        )
    if not _cpu_mode:
        from parity.frameworks import mosaic_interpreter

        mode = contextlib.ExitStack()
        mode.enter_context(mosaic_interpreter.interpreting(detect_races=detect_races))
        atexit.register(mode.close)
        _cpu_mode.append(mode)


def interpreted() -> bool:
    """Whether this process runs kernels through the interpreters."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def gpu() -> None:
    """Puts this process into GPU mode: jax leaves the memory pool to be shared with torch.

    Its pool grows by doubling, and never shrinks: without a bound it would have taken half of the
    memory for a fifth, and left torch no room for the truth in float64.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.4")


def load_target(target: str) -> tuple[Callable[..., Any], ModuleType]:
    """Finds "module:function" or "path/to/FILE.py:function".

    Raises:
        ValueError: the target has not that form, or names nothing; the message says which part is
        missing.
    """
    path, _, name = target.rpartition(":")
    if not path or not name:
        raise ValueError(f"{target!r} is not of the form module:function or FILE.py:function")
    if path.endswith(".py"):
        spec = importlib.util.spec_from_file_location(f"parity_impl_{abs(hash(path))}", path)
        if spec is None or spec.loader is None or not os.path.exists(path):
            raise ValueError(f"no file {path!r}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(path)
    if not callable(getattr(module, name, None)):
        raise ValueError(f"{path} has no function {name!r}")
    return getattr(module, name), module
