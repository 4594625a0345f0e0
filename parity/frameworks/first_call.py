"""The first call of a kernel: how long it compiles, and which Configs it chooses."""

import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from types import ModuleType
from typing import Any

from parity.frameworks import tracer


def first_call(
    twin: ModuleType, fn: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any]
) -> tuple[Callable[[], Any], float, dict[str, Any]]:
    """(a call ready to be timed, the seconds of its first run, the Configs it chose).

    The seconds are those of compiling from nothing: Triton's caches of the kernel's module are
    emptied and its disk cache is a new folder; JAX traces and compiles anew. Configs: {} if the
    kernel did not ask its default_config, one Config's fields, or several as {"1": .., "2": ..}.
    """

    def anew(*args: Any, **options: Any) -> Any:  # a function that no jit has seen
        return fn(*args, **options)

    module = sys.modules[getattr(fn, "__module__", "")]
    call = twin.thunk(anew, args, options)
    chosen: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        undo = [watch_configs(module, chosen)]
        if twin.TWIN == "triton":
            undo.append(_empty_triton_caches(module, folder))
        start = time.perf_counter()
        try:
            tracer.wait_for(call())
            seconds = time.perf_counter() - start
        finally:
            for step in undo:
                step()
    distinct = [c for i, c in enumerate(chosen) if c not in chosen[:i]]
    several = {str(i): c for i, c in enumerate(distinct, start=1)}
    return call, seconds, distinct[0] if len(distinct) == 1 else several


def watch_configs(module: ModuleType, chosen: list[dict[str, Any]]) -> Callable[[], None]:
    """Collects the fields of each Config that default_config gives; returns the undo."""
    ladder = getattr(module, "default_config", None)
    if ladder is None:
        return lambda: None

    def watched(*args: Any, **kwargs: Any) -> Any:
        config = ladder(*args, **kwargs)
        if is_dataclass(config) and not isinstance(config, type):
            chosen.append(asdict(config))
        return config

    module.default_config = watched  # type: ignore[attr-defined]
    return lambda: setattr(module, "default_config", ladder)


def _empty_triton_caches(module: ModuleType, folder: str) -> Callable[[], None]:
    import triton
    from triton import knobs

    for value in vars(module).values():
        if isinstance(value, triton.runtime.JITFunction):
            value.device_caches.clear()
    before = knobs.cache.dir
    knobs.cache.dir = folder
    return lambda: setattr(knobs.cache, "dir", before)
