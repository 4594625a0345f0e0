"""What the numbers of a case look like. Every kind is there for the mistake that it shows."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Numbers:
    """Values of some content, from a seed.

    normal    no surprise
    zeros     nothing else: what is divided by the largest?
    ones      a constant
    ties      halves, whose largest is 63.5: with a scale of 1/2 every odd quarter is a tie
    nan       some are NaN
    outlier   one is a hundred times the rest
    negative  the largest magnitude is negative
    positive  none is below zero, as after a ReLU
    rows      every row has its own size, from 1/16 to 16
    columns   every column has
    dead      some rows are zero, among others that are not
    """

    shape: tuple[int, ...]
    content: str = "normal"
    dtype: str = "float32"

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        x = rng.standard_normal(self.shape, np.float32)
        flat = x.reshape(-1)
        at = int(rng.integers(flat.size)) if flat.size else 0
        match self.content:
            case "normal":
                pass
            case "zeros":
                flat[:] = 0
            case "ones":
                flat[:] = 1
            case "ties":
                flat[:] = rng.integers(-253, 254, flat.size) / np.float32(4)
                flat[at] = 63.5
            case "nan":
                flat[rng.random(flat.size) < 0.1] = np.nan
                flat[at] = np.nan
            case "outlier":
                flat[at] = 100
            case "negative":
                flat[at] = -2 * np.abs(flat).max()
            case "positive":
                np.maximum(flat, 0, out=flat)
            case "rows":
                x *= _sizes(rng, self.shape[0])[:, None]
            case "columns":
                x *= _sizes(rng, self.shape[-1])
            case "dead":
                x[1::3] = 0
            case _:
                raise ValueError(f"no content {self.content!r}")
        return x.astype(self.dtype)


def _sizes(rng: np.random.Generator, n: int) -> np.ndarray:
    return (2.0 ** rng.uniform(-4, 4, n)).astype(np.float32)
