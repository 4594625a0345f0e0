"""What every format asks of its arguments; an error names the argument and what came instead."""

from collections.abc import Sequence

import numpy as np


def lifted(x: np.ndarray, name: str = "x") -> np.ndarray:
    """x as contiguous float32, which holds every float16 and bfloat16.

    Raises TypeError for any other dtype: from float64 a value would be rounded twice.
    """
    x = np.asarray(x)
    if x.dtype.name not in ("float32", "float16", "bfloat16"):
        raise TypeError(f"{name}: expected float32, float16 or bfloat16, got {x.dtype}")
    return np.asarray(x, np.float32, order="C")


def codes(code: np.ndarray, bits: int, name: str = "code") -> np.ndarray:
    """code as uint8; TypeError unless whole numbers, ValueError for one outside 0 .. 2**bits - 1.

    Without the second check a negative or a long code would silently read another one's value.
    """
    code = np.asarray(code)
    if not np.issubdtype(code.dtype, np.integer):
        raise TypeError(f"{name}: expected whole numbers, got {code.dtype}")
    if code.size and not 0 <= code.min() <= code.max() < 1 << bits:
        wrong = code.min() if code.min() < 0 else code.max()
        raise ValueError(f"{name}: expected codes of {bits} bits, got {wrong}")
    return code.astype(np.uint8)


def dtype(x: np.ndarray, expected: type[np.generic], name: str) -> np.ndarray:
    x = np.asarray(x)
    if x.dtype != expected:
        raise TypeError(f"{name}: expected {np.dtype(expected).name}, got {x.dtype}")
    return x


def shape(x: np.ndarray, expected: tuple[int, ...], name: str) -> None:
    if np.shape(x) != expected:
        raise ValueError(f"{name}: expected the shape {list(expected)}, got {list(np.shape(x))}")


def rank(x: np.ndarray, expected: int, name: str) -> None:
    if np.ndim(x) != expected:
        raise ValueError(f"{name}: expected {expected} dimensions, got {list(np.shape(x))}")


def multiple(size: int, of: int, name: str) -> int:
    """How often `of` goes into size; ValueError unless it does."""
    if of < 1 or size % of:
        raise ValueError(f"{name}: expected {of} to divide {size}")
    return size // of


def one_of(value: object, choices: Sequence[object], name: str) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, choices))}; got {value!r}")
