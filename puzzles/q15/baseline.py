"""What Q15 is raced against: the same product with weights that are float16 in memory."""

from collections.abc import Sequence

import torch

from parity.spec import Workload

NAME = "cuBLAS, float16 weights"
GROUP = 128


def draw(work: Workload, generator: torch.Generator) -> Sequence[torch.Tensor]:
    M, N, G = (work[letter] for letter in "MNG")
    where = {"generator": generator, "device": generator.device}
    x = torch.randn(M, G * GROUP, **where).half()
    packed = torch.randint(0, 256, (N, G * GROUP // 2), dtype=torch.uint8, **where)
    scale = (0.005 + 0.01 * torch.rand(G, N, **where)).half()
    return x, packed, scale, torch.randint(0, 16, (G, N), dtype=torch.uint8, **where)


def prepared(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
) -> Sequence[torch.Tensor]:
    """What the baseline takes, made of the inputs before the clock runs."""
    return x, _weights(packed, scale, zero).half()


def baseline(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (x @ w.T,)


def answer(
    dtype: torch.dtype, x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor,
    zero: torch.Tensor,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """The product in dtype, for the judge; in float32 weights are rounded as a kernel may."""
    w = _weights(packed, scale, zero)
    w = w.half() if dtype == torch.float32 else w
    return (x.to(dtype) @ w.to(dtype).T,)


def _weights(packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """float32 [N, K], exact: a whole number under 16 times a float16."""
    code = torch.stack((packed & 15, packed >> 4), dim=2)
    code = code.reshape(packed.shape[0], -1, GROUP).float()
    w = (code - zero.T[:, :, None].float()) * scale.T[:, :, None].float()
    return w.reshape(packed.shape[0], -1)


def least_bytes(work: Workload) -> float:
    M, N, G = (work[letter] for letter in "MNG")
    return G * (GROUP * (2 * M + N / 2) + 3 * N) + 2 * M * N
