"""What the child process saw of one call of the learner's code, and what unwritten memory holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# By bytes an element: for floats a quiet NaN that no arithmetic makes
POISON: Mapping[int, int] = {1: 0xA5, 2: 0x7FE5, 4: 0x7FE5A5A5, 8: 0x7FFDA5A5A5A5A5A5}


@dataclass(frozen=True)
class Seen:
    launches: int
    inputs: int  # bytes of the arrays handed in
    read: int | None = None  # bytes that kernels loaded; None: not metered
    written: int | None = None
    allocated: int | None = None
    changed: Sequence[str] = ()  # inputs that were written to
    beside: Sequence[str] = ()  # what was written past its ends
    foreign: Sequence[str] = ()  # sentences: what else did part of the work
    any_nan: bool = False  # unwritten memory holds just any NaN, not POISON


def unwritten(x: np.ndarray, any_nan: bool) -> np.ndarray:
    """Where the elements are what they were before anybody wrote to them, as far as bits tell."""
    if any_nan:
        return np.isnan(x) if x.dtype.kind == "f" else np.zeros(x.shape, bool)
    if x.dtype.itemsize not in POISON:
        return np.zeros(x.shape, bool)
    return x.view(f"uint{8 * x.dtype.itemsize}") == POISON[x.dtype.itemsize]
