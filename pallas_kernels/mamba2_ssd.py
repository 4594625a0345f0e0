"""Mamba-2's state space duality over packed sequences: decay attention with step sizes.

    u[t] = clamp(softplus(dt[t] + dt_bias))                       softplus if dt_softplus
    h[t] = exp(u[t] A) h[t-1] + u[t] x[t] B[t]^T                  y[t] = h[t] C[t] + D x[t]
    y = y * silu(z) where there is a z
    x [T, H, P]   dt [T, H]   A [H]   B, C [T, G, N]   D [H] or [H, P]   z [T, H, P]   dt_bias [H]
    h0 [B, H, P, N]   ->   y [T, H, P], h_T [B, H, P, N]

    decay_attention with q = C, k = B, v = x, g = u A and weights u, not their logarithms, as a step
    size may be 0; states transposed where they are read and written; D x joins y before it is
    rounded. The gate of z is a pass of its own.

Backward: decay_attention's, with dx += D dy, and from its dg and du
    du' = du + A dg    ddt = du' * (derivative of the softplus, 0 outside the limits)
    dA = sum of u dg    ddt_bias = sum of ddt    dD = sum of dy x
    dz = dy * y * silu'(z), before it the gradient of y: dy * silu(z)

Limits: as decay_attention's, P its V and N its K. The convolution before it is outside.

Twin: triton_kernels/mamba2_ssd.py.

Sources: Mamba-2 (arXiv:2405.21060).
"""

import functools
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import _lib
from .decay_attention import Config as _CoreConfig
from .decay_attention import _forward, _gradients
from .decay_attention import default_config as _core_config
from .decay_attention_gates import (
    HEADS,
    StepSizes,
    gates_of,
    load_lanes,
    no_heads,
    room_for,
    step_size,
    store_tokens,
    sum_along,
)
from .decay_attention_states import (
    CHUNK,
    PITCH,
    check_states,
    check_tokens,
    find_span,
    launch,
)

INFINITY = float("inf")
PIECE = 1024  # elements that a warpgroup gates at once, 16 bytes a lane


@dataclass(frozen=True)
class Config(_CoreConfig):
    """As decay_attention's."""


def default_config(
    T: int, B: int, G: int, H: int, N: int, P: int, dtype: Any, which: str = "fwd"
) -> Config:
    """The Config for T tokens in B sequences on a Hopper; which: "fwd" or "bwd"."""
    return Config(**asdict(_core_config(T, B, G, H, N, P, dtype, which)))


def _mamba2_ssd_gate_kernel(*refs: Any, back: bool) -> None:
    y_gmem, z_gmem, *more = refs  # [pieces, 1024]: y before the gate
    dy_gmem = more.pop(0) if back else None
    out_gmem, *dz_gmem = more  # y * silu(z), or dy * silu(z) and dz
    # --- 1. which tile
    at = lax.axis_index("piece")
    layout = plgpu.Layout.WG_STRIDED((PIECE,), vec_size=PIECE // _lib.WARPGROUP)

    def load(x_gmem: Any) -> jax.Array:
        return plgpu.load(x_gmem.at[at], layout=layout).astype(jnp.float32)

    # --- 2. main loop: one piece
    y, z = load(y_gmem), load(z_gmem)
    # --- 3. epilogue
    s = 1.0 / (1.0 + jnp.exp(-z))
    factor = y if dy_gmem is None else load(dy_gmem)
    # --- 4. store
    out_gmem[at] = (factor * z * s).astype(out_gmem.dtype)
    if back:
        dz_gmem[0][at] = (factor * y * s * (1.0 + z * (1.0 - s))).astype(out_gmem.dtype)


def _mamba2_ssd_dt_kernel(*refs: Any, T: int, softplus: bool, low: float, high: float) -> None:
    dt_gmem, dgates_gmem, A_gmem, *bias_gmem, cu_gmem, ddt_gmem, sums_gmem = refs[:-4]
    dt_smem, dgates_smem, ddt_smem, full = refs[-4:]
    # --- 1. which tile
    p, heads = lax.axis_index("slot"), pl.ds(lax.axis_index("heads") * HEADS, HEADS)
    _, first, end, _, _ = find_span(cu_gmem, p, T, CHUNK)
    live = end - first
    plgpu.copy_gmem_to_smem(dt_gmem.at[pl.ds(first, CHUNK), heads], dt_smem, full)
    plgpu.copy_gmem_to_smem(dgates_gmem.at[p, heads], dgates_smem, full)
    A = load_lanes(A_gmem, heads)
    bias = load_lanes(bias_gmem[0], heads) if bias_gmem else None
    plgpu.barrier_wait(full)

    # --- 2. main loop
    def token(t: Any, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        u, slope = step_size(load_lanes(dt_smem, t), bias, softplus, low, high)
        dg, du = (load_lanes(dgates_smem, pl.ds(0, HEADS), i * CHUNK + t) for i in range(2))
        ddt = (du + dg * A) * slope
        ddt_smem[t] = ddt
        return sums[0] + u * dg, sums[1] + ddt

    # --- 3. epilogue
    sums = lax.fori_loop(0, live, token, (no_heads(), no_heads()))
    plgpu.commit_smem()

    # --- 4. store
    for i in range(2):
        sums_gmem[p, i, heads] = sums[i]
    store_tokens(ddt_smem, live, ddt_gmem, first)
    plgpu.wait_smem_to_gmem(0)


def _gate(y: jax.Array, z: jax.Array, dy: jax.Array | None) -> list[jax.Array]:
    """[y * silu(z)], or [dy * silu(z), dz]."""
    arrays = [_lib.pad(x.reshape(-1), PIECE) for x in (y, z, dy) if x is not None]
    arrays = [x.reshape(-1, PIECE) for x in arrays]
    out = jax.ShapeDtypeStruct(arrays[0].shape, y.dtype)
    made = plgpu.kernel(
        functools.partial(_mamba2_ssd_gate_kernel, back=dy is not None),
        out_type=[out] * (len(arrays) - 1),
        grid=(out.shape[0],),
        grid_names=("piece",),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="mamba2_ssd_gate_kernel",
    )(*arrays)
    return [x.reshape(-1)[: y.size].reshape(y.shape) for x in made]


def _dt_bwd(
    dt: jax.Array, dgates: jax.Array, steps: StepSizes, cu_seqlens: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(ddt [T, H], dA [H], ddt_bias [H])."""
    (T, H), slots = dt.shape, dgates.shape[0]
    dt = _lib.pad(dt, 4)
    A, bias = (None if x is None else _lib.pad(x, HEADS) for x in steps[:2])
    kernel = functools.partial(
        _mamba2_ssd_dt_kernel, T=T, softplus=steps.softplus, low=steps.low, high=steps.high
    )
    ddt, sums = launch(
        kernel, "mamba2_ssd_dt_kernel",
        [
            jax.ShapeDtypeStruct((T, room_for(H)), jnp.float32),
            jax.ShapeDtypeStruct((slots, 2, _lib.cdiv(H, HEADS) * HEADS), jnp.float32),
        ],
        [
            plgpu.SMEM((CHUNK, HEADS), jnp.float32),
            plgpu.SMEM((HEADS, PITCH), jnp.float32),
            plgpu.SMEM((CHUNK, HEADS), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
        ],
        (slots, _lib.cdiv(H, HEADS)),
        (dt, dgates, A, *([] if bias is None else [bias]), cu_seqlens),
    )  # fmt: skip
    both = sum_along(sums.reshape(slots, -1), 0).reshape(2, -1)
    return ddt[:, :H], both[0, :H], both[1, :H]


def _check(
    x, dt, A, B, C, D, z, dt_bias, cu_seqlens, h0, dt_softplus, dt_limit, chunk, config
) -> tuple[float, float]:  # fmt: skip
    """(low, high) of dt_limit."""
    check_tokens({"C": C, "B": B, "x": x}, chunk)
    (T, H, P), N = x.shape, B.shape[2]
    floats = (jnp.float32,)
    _lib.check_array("dt", dt, (T, H), floats)
    _lib.check_array("A", A, (H,), floats)
    if D is not None:
        by_channel = getattr(D, "ndim", 1) == 2
        _lib.check_array("D", D, (H, P) if by_channel else (H,), floats)
    if z is not None:
        _lib.check_array("z", z, (T, H, P), (x.dtype,))
    if dt_bias is not None:
        _lib.check_array("dt_bias", dt_bias, (H,), floats)
    check_states(cu_seqlens, (H, P, N), h0=h0)
    _lib.check_static("dt_softplus", dt_softplus, (bool,))
    _lib.check_static("dt_limit", dt_limit, (tuple, list))
    if len(dt_limit) != 2 or not dt_limit[0] <= dt_limit[1]:
        raise ValueError(f"dt_limit: expected (low, high) with low <= high, got {dt_limit}")
    _lib.check_config(config, Config)
    return float(dt_limit[0]), float(dt_limit[1])


def _by_channel(D: jax.Array | None, H: int, P: int) -> jax.Array | None:
    return D if D is None or D.ndim == 2 else jnp.broadcast_to(D[:, None], (H, P))


def mamba2_ssd_fwd(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None,
    z: jax.Array | None,
    dt_bias: jax.Array | None,
    cu_seqlens: jax.Array,
    h0: jax.Array | None,
    *,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, INFINITY),
    chunk: int = 64,
    config: Config | None = None,
) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    """mamba2_ssd and what its backward needs.

    Returns ((y, h_T), (x, dt, A, B, C, D, z, dt_bias, cu_seqlens, h0, y before the gate or None)).
    """
    given = (x, dt, A, B, C, D, z, dt_bias, cu_seqlens, h0)
    low, high = _check(*given, dt_softplus, dt_limit, chunk, config)
    (T, H, P), N, sequences = x.shape, B.shape[2], len(cu_seqlens) - 1
    if 0 in (T, H, P, N, sequences):
        h_T = jnp.zeros((sequences, H, P, N), jnp.float32) if h0 is None else h0
        y = jnp.zeros_like(x)
        return (y, h_T), (*given, None if z is None else y)
    steps = StepSizes(A, dt_bias, dt_softplus, low, high)
    gates = gates_of(dt, None, cu_seqlens, T, H, steps)
    config = config or default_config(T, sequences, B.shape[1], H, N, P, x.dtype)
    y, h_T = _forward(
        C, B, x, gates, h0, _by_channel(D, H, P), cu_seqlens, scale=1.0, transposed=True,
        config=config,
    )  # fmt: skip
    y, h_T = _lib.vary_alike(y, h_T, x)[:2]
    if z is None:
        return (y, h_T), (*given, None)
    return (_lib.vary_alike(*_gate(y, z, None), x)[0], h_T), (*given, y)


def mamba2_ssd_bwd(
    res: tuple[Any, ...],
    dy: jax.Array,
    dh_T: jax.Array | None = None,
    *,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, INFINITY),
    chunk: int = 64,
    config: Config | None = None,
) -> tuple[jax.Array, ...]:
    """Gradients (dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dh0) of what was given, in the shapes and
    dtypes of the arguments. The same inputs give the same bits.

    res: as mamba2_ssd_fwd returns it. dy [T, H, P], dh_T [B, H, P, N] float32: cotangents of y and
    h_T; dh_T None is zero.
    """
    *given, before = res
    x, dt, A, B, C, D, z, dt_bias, cu_seqlens, h0 = given
    low, high = _check(*given, dt_softplus, dt_limit, chunk, config)
    (T, H, P), N, sequences = x.shape, B.shape[2], len(cu_seqlens) - 1
    _lib.check_array("dy", dy, (T, H, P), None)
    check_states(cu_seqlens, (H, P, N), dh_T=dh_T)
    if 0 in (T, H, P, N, sequences):
        dh0 = jnp.zeros((sequences, H, P, N), jnp.float32) if dh_T is None else dh_T
        found = [jnp.zeros_like(v) for v in given[:8] if v is not None]
        return (*found, *([] if h0 is None else [dh0]))
    steps = StepSizes(A, dt_bias, dt_softplus, low, high)
    gates = gates_of(dt, None, cu_seqlens, T, H, steps)
    dy, dz = dy.astype(x.dtype), []
    if z is not None:
        dy, *dz = _gate(before, z, dy)
    config = config or default_config(T, sequences, B.shape[1], H, N, P, x.dtype, "bwd")
    dh0, dC, dB, dx, dgates, *dD = _gradients(
        C, B, x, dy, gates, h0, dh_T, _by_channel(D, H, P), cu_seqlens, scale=1.0, transposed=True,
        config=config,
    )  # fmt: skip
    if D is not None and D.ndim == 1:
        dD = [sum_along(dD[0], 1)]
    ddt, dA, ddt_bias = _dt_bwd(dt, dgates, steps, cu_seqlens)
    found = [dx, ddt, dA, dB, dC, *dD, *dz]
    found += [v for v, of in ((ddt_bias, dt_bias), (dh0, h0)) if of is not None]
    return _lib.vary_alike(*found, x)[:-1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(10, 11, 12))
def _mamba2_ssd(x, dt, A, B, C, D, z, dt_bias, cu_seqlens, h0, softplus, limit, config):
    given = (x, dt, A, B, C, D, z, dt_bias, cu_seqlens, h0)
    return mamba2_ssd_fwd(*given, dt_softplus=softplus, dt_limit=limit, config=config)[0]


def _mamba2_ssd_fwd(x, dt, A, B, C, D, z, dt_bias, cu_seqlens, h0, softplus, limit, config):
    given = (x, dt, A, B, C, D, z, dt_bias, cu_seqlens, h0)
    return mamba2_ssd_fwd(*given, dt_softplus=softplus, dt_limit=limit, config=config)


def _mamba2_ssd_bwd(softplus, limit, config, res, cotangents):
    del config  # gradients take their own default
    found = iter(mamba2_ssd_bwd(res, *cotangents, dt_softplus=softplus, dt_limit=limit))
    of = (*res[:8], None, res[9])
    return tuple(None if v is None else next(found) for v in of)


_mamba2_ssd.defvjp(_mamba2_ssd_fwd, _mamba2_ssd_bwd)


def mamba2_ssd(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None,
    z: jax.Array | None,
    dt_bias: jax.Array | None,
    cu_seqlens: jax.Array,
    h0: jax.Array | None,
    *,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, INFINITY),
    chunk: int = 64,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """y [T, H, P] = h C + D x, times silu(z), and the last states h_T [B, H, P, N]; h is the state
    before, times exp(u A), and u x B^T; u is dt, with its bias, softened and limited.
    Differentiable once.

    x, z [T, H, P], B, C [T, G, N]: bfloat16 or float16, the same; y has their dtype. Heads
    g * H / G and on share B and C of group g. dt [T, H], A [H] (below 0), D [H] or [H, P], dt_bias
    [H], h0 [B, H, P, N]: float32. D, z, dt_bias and h0 may be None: no D x, no gate, no bias, zero.
    B sequences lie one after the other, the tokens of sequence s from cu_seqlens[s] on. cu_seqlens
    [B + 1] int32, from 0 to T, is read on the device alone: decay_attention_check looks at what it
    holds. dt_softplus: whether dt + dt_bias goes through softplus; dt_limit: what it is clamped to
    then, without gradient outside. chunk, config: as in decay_attention.

    Raises ValueError for a wrong rank or size and TypeError for a wrong dtype or config.
    """
    given = (x, dt, A, B, C, D, z, dt_bias, cu_seqlens, h0)
    limit = _check(*given, dt_softplus, dt_limit, chunk, config)
    alike = iter(_lib.vary_alike(*(v for v in given if v is not None)))
    given = (None if v is None else next(alike) for v in given)
    return _mamba2_ssd(*given, dt_softplus, limit, config)
