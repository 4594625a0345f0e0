"""The kernels in Pallas, lowered by Mosaic GPU for Hopper: one file a stem, each readable alone."""

from importlib import import_module
from typing import Any

__all__ = ["matmul", "rms_norm", "softmax"]


def __getattr__(name: str) -> Any:
    # Importing the package imports no JAX. A function is named like its file, so the function takes the place of the
    # submodule that the import system binds here; `from pallas_kernels.matmul import Config` reaches into the file.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = getattr(import_module(f"{__name__}.{name}"), name)
    globals()[name] = function
    return function


def __dir__() -> list[str]:
    return __all__
