"""What Q08 is raced against: the two passes that PyTorch makes of it, each its own kernels."""

from collections.abc import Sequence

import torch

from parity.spec import Workload

NAME = "PyTorch eager: largest magnitude, then round"


def draw(work: Workload, generator: torch.Generator) -> Sequence[torch.Tensor]:
    shape = work["M"], work["K"]
    return (torch.randn(shape, generator=generator, device=generator.device).half(),)


def prepared(*inputs: torch.Tensor) -> Sequence[torch.Tensor]:
    """What the baseline takes, made of the inputs before the clock runs."""
    return inputs


def baseline(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    top = x.abs().amax(1).float()
    most = torch.full_like(top, 127)  # a number over a tensor would be a reciprocal and a product
    inverse = most / torch.where(top == 0, 1.0, top)
    q = torch.round(x * inverse[:, None]).to(torch.int8)
    return q, torch.where(top == 0, 1.0, top / most)


def answer(dtype: torch.dtype, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """For the judge: codes before they are rounded, and scales."""
    top = x.abs().amax(1).to(dtype)
    scale = torch.where(top == 0, 127, top) / torch.full_like(top, 127)
    return x.to(dtype) / scale[:, None], scale


def least_bytes(work: Workload) -> float:
    return work["M"] * (3 * work["K"] + 4)
