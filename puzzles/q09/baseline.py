"""What Q09 is raced against: table lookups in PyTorch, each its own kernel."""

from collections.abc import Sequence

import torch

from parity import formats
from parity.spec import Workload

NAME = "PyTorch eager: lookups in two tables"


def draw(work: Workload, generator: torch.Generator) -> Sequence[torch.Tensor]:
    """Any bytes are a quantized tensor."""
    count = -(-work["P"] // 32)
    where = {"generator": generator, "device": generator.device}

    def some_bytes(n: int) -> torch.Tensor:
        return torch.randint(0, 256, (n,), dtype=torch.uint8, **where)

    tables = (torch.from_numpy(t).to(generator.device) for t in (formats.NF4, formats.DYNAMIC_MAP))
    code, code2 = tables
    absmax2 = torch.rand(-(-count // 256), **where)
    return some_bytes(work["P"]), some_bytes(count), code, absmax2, code2, torch.rand(1, **where)


def prepared(*inputs: torch.Tensor) -> Sequence[torch.Tensor]:
    """What the baseline takes, made of the inputs before the clock runs."""
    return inputs


def baseline(
    packed: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, absmax2: torch.Tensor,
    code2: torch.Tensor, offset: torch.Tensor,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    return (_decoded(packed, absmax, code, absmax2, code2, offset).half(),)


def answer(dtype: torch.dtype, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same, for the judge; NF4 is defined in float32."""
    return (_decoded(*inputs).to(dtype),)


def _decoded(
    packed: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, absmax2: torch.Tensor,
    code2: torch.Tensor, offset: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    coarse = absmax2.repeat_interleave(256)[: absmax.shape[0]]
    scale = (code2[absmax.int()] * coarse + offset).repeat_interleave(64)
    both = torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1)
    return code[both.int()] * scale[: both.shape[0]]


def least_bytes(work: Workload) -> float:
    blocks = -(-work["P"] // 32)
    return 5 * work["P"] + blocks + 4 * -(-blocks // 256)
