"""What each interpreter does with what a GPU would not forgive: lesson 02's table, found by trying.

Triton's side asks parity's own probes, and runs two small kernels more; Pallas' side runs one small
kernel a row. The GPU's column is words: no GPU is asked.
"""

# A constexpr parameter takes a Python value, which triton's annotations do not say.
# pyright: reportArgumentType=false, reportAbstractUsage=false

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import triton
import triton.language as tl
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from parity.frameworks import DataRace, triton_interpreter
from parity.frameworks import jax as twin

COLUMNS = ("Triton, here", "Pallas, here", "on a GPU")
ON_A_GPU = {
    "a product of bfloat16": "right",
    "rounding to bfloat16": "right",
    "rounding to float8": "right",
    "a store past the end": "wrong: other data",
    "two programs, one element": "wrong: one is lost",
    "reading before the barrier": "wrong: old data",
    "memory nobody wrote": "wrong: old data",
}


def table() -> dict[str, tuple[str, str, str]]:
    """row -> what the interpreters do, found now, and what a GPU does."""
    triton_side, pallas_side = _triton(), _pallas()
    return {row: (triton_side[row], pallas_side[row], gpu) for row, gpu in ON_A_GPU.items()}


def bf16_product_error() -> float:
    """Relative error of a 32 x 32 product of bfloat16 in Triton's interpreter."""
    a, b = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    c = torch.empty(32, 32)
    _dot_kernel[(1,)](a, b, c, 32)
    truth = a.double() @ b.double()
    return float((c - truth).norm() / truth.norm())


def wrong_casts(dtype: torch.dtype) -> float:
    """The share of casts to dtype, in Triton's interpreter, that are not round-to-nearest."""
    x = torch.randn(1 << 12, generator=torch.Generator().manual_seed(0))
    y = torch.empty(x.shape, dtype=dtype)
    _cast_kernel[(1,)](x, y, x.numel())
    return float((y.float() != x.to(dtype).float()).double().mean())


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, n: tl.constexpr):
    i = tl.arange(0, n)[:, None] * n + tl.arange(0, n)[None, :]
    tl.store(c_ptr + i, tl.dot(tl.load(a_ptr + i), tl.load(b_ptr + i)))


@triton.jit
def _cast_kernel(x_ptr, y_ptr, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))


@triton.jit
def _meeting_kernel(x_ptr, n: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, n), tl.load(x_ptr + tl.arange(0, n)) + 1.0)


def _triton() -> dict[str, str]:
    known = {probe.name: probe.wrong for probe in triton_interpreter.probes()}
    product, (bf16, fp8) = (
        bf16_product_error(),
        map(wrong_casts, (torch.bfloat16, torch.float8_e4m3fn)),
    )
    whole, half = torch.zeros(16), torch.empty(32)
    return {
        "a product of bfloat16": f"wrong: off by 10^{np.log10(product):.0f}"
        if product > 1
        else "right",
        "rounding to bfloat16": f"wrong: {bf16:.0%} wrong" if bf16 else "right",
        "rounding to float8": f"wrong: {fp8:.0%} wrong" if fp8 else "right",
        "a store past the end": "unseen" if known["out_of_bounds"] else "caught",
        "two programs, one element": _ran_on(lambda: _meeting_kernel[(4,)](whole, 16)),
        "reading before the barrier": ": has no barriers",
        "memory nobody wrote": _ran_on(lambda: _meeting_kernel[(1,)](half, 16)),
    }


def _ran_on(launch: Callable[[], Any]) -> str:
    try:
        launch()
    except Exception:
        return "caught"
    return "unseen"


def _pallas() -> dict[str, str]:
    x = jax.random.normal(jax.random.key(0), (64, 64), jnp.bfloat16)
    long = jax.random.normal(jax.random.key(0), (1 << 12,))
    line = jnp.arange(128.0)

    def cast(dtype: Any) -> str:
        got, _ = _ran(lambda x, y: _store(y, x[...].astype(dtype)), long, dtype)
        return "right" if np.array_equal(got, np.asarray(long.astype(dtype))) else "wrong"

    product, _ = _ran(_product, x, jnp.float32, _tile(), plgpu.Barrier())
    exact = np.asarray(x, np.float64) @ np.asarray(x, np.float64)
    close = product is not None and np.allclose(product, exact, rtol=1e-5, atol=1e-4)
    blank, _ = _ran(lambda x, y: _store(y.at[pl.ds(0, 64)], x[pl.ds(0, 64)]), line, jnp.float32)
    _, past = _ran(lambda x, y: _store(y.at[pl.ds(64, 128)], x[...]), line, jnp.float32)
    _, meet = _ran(lambda x, y: _store(y, x[...]), line, jnp.float32, blocks=2)
    _, early = _ran(_early, line, jnp.float32, plgpu.SMEM((128,), jnp.float32), plgpu.Barrier())
    return {
        "a product of bfloat16": "right" if close else "wrong",
        "rounding to bfloat16": cast(jnp.bfloat16),
        "rounding to float8": cast(jnp.float8_e4m3fn),
        "a store past the end": "caught: refused" if past else "unseen",
        "two programs, one element": "caught" if isinstance(meet, DataRace) else "unseen",
        "reading before the barrier": "caught" if isinstance(early, DataRace) else "unseen",
        "memory nobody wrote": "caught: reads NaN" if blank is not None and np.isnan(blank).any()
        else "unseen",
    }  # fmt: skip


def _store(ref: Any, value: Any) -> None:
    ref[...] = value


def _tile() -> Any:
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM((64, 64), jnp.bfloat16, transforms=transforms)


def _product(x: Any, y: Any, x_smem: Any, barrier: Any) -> None:
    plgpu.copy_gmem_to_smem(x, x_smem, barrier)
    plgpu.barrier_wait(barrier)

    def product(acc: Any) -> Any:
        plgpu.wgmma(acc, x_smem, x_smem)
        return acc[...]

    y[...] = pl.run_scoped(product, plgpu.ACC((64, 64), jnp.float32))


def _early(x: Any, y: Any, x_smem: Any, barrier: Any) -> None:
    plgpu.copy_gmem_to_smem(x, x_smem, barrier)
    y[...] = x_smem[...]
    plgpu.barrier_wait(barrier)


def _ran(
    body: Callable[..., None], x: Any, dtype: Any, *scratch: Any, blocks: int = 1
) -> tuple[np.ndarray | None, Exception | None]:
    """What a kernel of that body returned, or what it was refused with."""

    def named(*refs: Any) -> None:
        lax.axis_index("block")
        body(*refs)

    kernel = plgpu.kernel(
        named, out_type=jax.ShapeDtypeStruct(x.shape, dtype), scratch_types=scratch,
        grid=(blocks,), grid_names=("block",),
    )  # fmt: skip
    try:
        return np.asarray(twin.run(lambda x: kernel(x), [x], {})), None
    except Exception as error:
        return None, error
