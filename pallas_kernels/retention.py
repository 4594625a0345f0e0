"""RetNet's retention over packed sequences: decay attention with a fixed decay for each head.

    S[t] = gamma[h] * S[t-1] + k[t] v[t]^T      gamma[h] = 1 - 2^(-5 - h)
    y[t] = scale * q[t]^T S[t]                  scale: K^-1/2 unless it is given
    q, k [T, H, K]   v [T, H, V]   S0 [B, H, K, V]   ->   y [T, H, V], S_T [B, H, K, V]

    decay_attention with g[h] = log(gamma[h]), and without i

Limits: as decay_attention's. Rotations of q and k, the norm of y and its gate are outside.

Twin: triton_kernels/retention.py.

Sources: RetNet (arXiv:2307.08621), without the normalisations that its group norm cancels.
"""

import functools
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp

from . import _lib
from .decay_attention import Config as _CoreConfig
from .decay_attention import _forward, _gradients
from .decay_attention import default_config as _core_config
from .decay_attention_gates import gates_of
from .decay_attention_states import check_states, check_tokens


@dataclass(frozen=True)
class Config(_CoreConfig):
    """As decay_attention's."""


def default_config(
    T: int, B: int, H: int, K: int, V: int, dtype: Any, which: str = "fwd"
) -> Config:
    """The Config for T tokens in B sequences on a Hopper; which: "fwd" or "bwd"."""
    return Config(**asdict(_core_config(T, B, H, H, K, V, dtype, which)))


def _check(q, k, v, S0, cu_seqlens, scale, chunk, config) -> float:
    check_tokens({"q": q, "k": k, "v": v}, chunk)
    (T, H, V), K = v.shape, q.shape[2]
    _lib.check_array("q", q, (T, H, K), (v.dtype,))
    check_states(cu_seqlens, (H, K, V), S0=S0)
    _lib.check_config(config, Config)
    if scale is None:
        return K**-0.5 if K else 1.0
    _lib.check_static("scale", scale, (float, int))
    return float(scale)


def retention_fwd(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    S0: jax.Array | None,
    cu_seqlens: jax.Array,
    *,
    scale: float | None = None,
    chunk: int = 64,
    config: Config | None = None,
) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    """As `retention`, and what the backward needs: res = (q, k, v, S0, cu_seqlens)."""
    factor = _check(q, k, v, S0, cu_seqlens, scale, chunk, config)
    (T, H, V), K, B = v.shape, q.shape[2], len(cu_seqlens) - 1
    res = (q, k, v, S0, cu_seqlens)
    if 0 in (T, H, K, V, B):
        S_T = jnp.zeros((B, H, K, V), jnp.float32) if S0 is None else S0
        return (jnp.zeros_like(v), S_T), res
    config = config or default_config(T, B, H, K, V, v.dtype)
    gates = gates_of(None, None, cu_seqlens, T, H)
    y, S_T = _forward(
        q, k, v, gates, S0, None, cu_seqlens, scale=factor, transposed=False, config=config
    )  # fmt: skip
    y, S_T = _lib.vary_alike(y, S_T, q)[:2]
    return (y, S_T), res


def retention_bwd(
    res: tuple[Any, ...],
    dy: jax.Array,
    dS_T: jax.Array | None = None,
    *,
    scale: float | None = None,
    chunk: int = 64,
    config: Config | None = None,
) -> tuple[jax.Array, ...]:
    """Gradients (dq, dk [T, H, K], dv [T, H, V] in their dtypes), and dS0 [B, H, K, V] float32 if
    there was an S0. The same inputs give the same bits.

    res: as retention_fwd returns it. dy [T, H, V], dS_T [B, H, K, V] float32: cotangents of y and
    S_T; dS_T None is zero.
    """
    q, k, v, S0, cu_seqlens = res
    factor = _check(q, k, v, S0, cu_seqlens, scale, chunk, config)
    (T, H, V), K, B = v.shape, q.shape[2], len(cu_seqlens) - 1
    _lib.check_array("dy", dy, (T, H, V), None)
    check_states(cu_seqlens, (H, K, V), dS_T=dS_T)
    if 0 in (T, H, K, V, B):
        dS0 = jnp.zeros((B, H, K, V), jnp.float32) if dS_T is None else dS_T
        found = (*map(jnp.zeros_like, (q, k, v)), dS0)
        return found[: 3 + (S0 is not None)]
    config = config or default_config(T, B, H, K, V, v.dtype, "bwd")
    gates = gates_of(None, None, cu_seqlens, T, H)
    dS0, dq, dk, dv, _ = _gradients(
        q, k, v, dy, gates, S0, dS_T, None, cu_seqlens, scale=factor, transposed=False,
        config=config,
    )  # fmt: skip
    return _lib.vary_alike(*(dq, dk, dv, dS0)[: 3 + (S0 is not None)], q)[:-1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _retention(q, k, v, S0, cu_seqlens, scale, config):
    return retention_fwd(q, k, v, S0, cu_seqlens, scale=scale, config=config)[0]


def _retention_fwd(q, k, v, S0, cu_seqlens, scale, config):
    return retention_fwd(q, k, v, S0, cu_seqlens, scale=scale, config=config)


def _retention_bwd(scale, config, res, cotangents):
    del config  # gradients take their own default
    dq, dk, dv, *dS0 = retention_bwd(res, *cotangents, scale=scale)
    return dq, dk, dv, dS0[0] if dS0 else None, None


_retention.defvjp(_retention_fwd, _retention_bwd)


def retention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    S0: jax.Array | None,
    cu_seqlens: jax.Array,
    *,
    scale: float | None = None,
    chunk: int = 64,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """y [T, H, V] = scale * q S, and the last states S_T [B, H, K, V]: S is the state before, times
    1 - 2^(-5 - h), and k v^T. Differentiable once.

    q, k [T, H, K], v [T, H, V]: bfloat16 or float16, the same; y has their dtype. B sequences lie
    one after the other, the tokens of sequence s from cu_seqlens[s] on. cu_seqlens [B + 1] int32,
    from 0 to T, is read on the device alone: decay_attention_check looks at what it holds. S0
    [B, H, K, V] float32: the states before the first tokens; None is zero.
    scale: K^-1/2 by default. chunk, config: as in decay_attention.

    Raises ValueError for a wrong rank or size and TypeError for a wrong dtype or config.
    """
    factor = _check(q, k, v, S0, cu_seqlens, scale, chunk, config)
    alike = iter(_lib.vary_alike(*(x for x in (q, k, v, S0, cu_seqlens) if x is not None)))
    given = (None if x is None else next(alike) for x in (q, k, v, S0, cu_seqlens))
    return _retention(*given, factor, config)
