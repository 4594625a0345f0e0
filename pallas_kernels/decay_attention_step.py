"""Decay attention, one token of each sequence: what decoding does.

    S = exp(g) S + exp(i) k v^T    y = scale * q^T S     one block for 64 columns of a head's state

Twin: triton_kernels/decay_attention_step.py.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import _lib
from .decay_attention_states import (
    COLUMN,
    LAYOUT,
    LOG2E,
    ROW,
    across,
    check_gates,
    check_tokens,
    down,
    filled,
)


def _decay_attention_step_kernel(
    *refs: Any, scale: float, constant: bool, weighted: bool, given: bool
) -> None:
    q_gmem, k_gmem, v_gmem, g_gmem, *more, y_gmem, S_T_gmem = refs
    i_gmem = more.pop(0) if weighted else None
    S_gmem = more.pop(0) if given else None
    # --- 1. which tile
    b, h = lax.axis_index("sequence"), lax.axis_index("head")
    v = pl.ds(lax.axis_index("panel") * 64, 64)
    K, group = q_gmem.shape[2], lax.div(h, v_gmem.shape[1] // q_gmem.shape[1])

    def tile(x: Any, layout: Any) -> jax.Array:
        return plgpu.load(x, layout=layout, optimized=False).astype(jnp.float32)

    decay = jnp.exp2((g_gmem[h] if constant else g_gmem[b, h]) * LOG2E)
    weight = 1.0 if i_gmem is None else jnp.exp2(i_gmem[b, h] * LOG2E)
    value = down(tile(v_gmem.at[b, h, v], COLUMN), 64)

    # --- 2. main loop: over the state's rows
    def some(n: Any, y: jax.Array) -> jax.Array:
        rows = pl.ds(n * 64, 64)
        S = across(tile(k_gmem.at[b, group, rows], ROW) * weight, 64) * value
        if S_gmem is not None:
            S = S + tile(S_gmem.at[b, h, rows, v], LAYOUT) * decay
        S_T_gmem[b, h, rows, v] = S
        return y + across(tile(q_gmem.at[b, group, rows], ROW), 64) * S

    y = lax.fori_loop(0, K // 64, some, filled((64, 64), 0.0))

    # --- 3. epilogue
    y = (y * scale).sum(axis=0)

    # --- 4. store
    y_gmem[b, h, v] = y.astype(y_gmem.dtype)


def decay_attention_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    i: jax.Array | None,
    S: jax.Array | None,
    *,
    scale: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """One token of each of B sequences: (y[B, H, V] in v's dtype, the states after it, float32).

    q, k: [B, Hq, K], v: [B, H, V], g: [B, H] or [H], i: [B, H] or None, S: [B, H, K, V] or None, as
    in decay_attention. There is no gradient.
    """
    check_tokens({"q": q, "k": k, "v": v}, rows="B")
    (B, H, V), K = v.shape, q.shape[2]
    check_gates(g, i, B, H)
    if S is not None:
        _lib.check_array("S", S, (B, H, K, V), (jnp.float32,))
    _lib.check_static("scale", scale, (float, int))
    if 0 in (B, H, K, V):
        return jnp.zeros_like(v), jnp.zeros((B, H, K, V), jnp.float32)
    given = _lib.vary_alike(*(x for x in (q, k, v, g, i, S) if x is not None))
    q, k, v, *more = given
    arrays = [_lib.pad(q, 64), _lib.pad(k, 64), _lib.pad(v, 64), *more]
    if S is not None:
        arrays[-1] = _lib.pad(arrays[-1], 64, 64)
    state = (B, H, arrays[0].shape[2], arrays[2].shape[2])
    y, S_T = plgpu.kernel(
        functools.partial(
            _decay_attention_step_kernel, scale=float(scale), constant=g.ndim == 1,
            weighted=i is not None, given=S is not None,
        ),
        out_type=[
            jax.ShapeDtypeStruct(arrays[2].shape, v.dtype),
            jax.ShapeDtypeStruct(state, jnp.float32),
        ],
        grid=(B, H, state[3] // 64),
        grid_names=("sequence", "head", "panel"),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="decay_attention_step_kernel",
    )(*arrays)  # fmt: skip
    return _lib.vary_alike(y[:, :, :V], S_T[:, :, :K, :V], q)[:2]
