"""The tile sizes that a kernel ran with: what it asked its default_config, what it launched."""

import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from parity.frameworks import Kernel
from parity.frameworks.first_call import watch_configs

# What others call a tile's sizes in a Triton kernel
_ALSO = {
    "block_m": ("BLOCK_M", "BLOCK_SIZE_M", "M_BLOCK", "ROWS", "BLOCK_ROWS"),
    "block_n": ("BLOCK_N", "BLOCK_SIZE_N", "N_BLOCK", "BLOCK_COLS", "BLOCK_SIZE", "BLOCK"),
}


def tiles(
    twin: ModuleType,
    kernel: Kernel,
    fn: Callable[..., Any],
    args: Sequence[Any],
    options: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """{"block_m", "block_n", ...} of every kernel that one call of fn starts, in order.

    A Triton launch says its own; of a Pallas kernel only what its default_config chose is known.
    """
    chosen: list[dict[str, Any]] = []
    if twin.TWIN == "triton":
        from parity.frameworks import triton_interpreter

        with triton_interpreter.launches() as launched:
            fn(*args, **options)
        twin.synchronize()
        chosen = [_sizes(launch.arguments) for launch in launched]
    elif (module := sys.modules.get(getattr(kernel.fwd, "__module__", ""))) is not None:
        undo = watch_configs(module, chosen)
        try:
            twin.witness(fn, args, options, ())  # traces it, and runs nothing
        finally:
            undo()
    return [config for config in chosen if "block_n" in config]


def _sizes(arguments: Mapping[str, Any]) -> dict[str, int]:
    found = {}
    for name, others in _ALSO.items():
        value = next((arguments[n] for n in (name, *others) if n in arguments), None)
        value = getattr(value, "value", value)  # a constexpr
        if isinstance(value, int) and value > 0:
            found[name] = value
    return found
