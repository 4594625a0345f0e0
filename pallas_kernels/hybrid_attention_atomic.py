"""Hybrid attention whose gradients take five products for a pair of tiles in place of seven.

    for each tile of keys, and each tile of queries that can see one of them:
        p = exp(x - lse)
        dx = p * (do @ v^T - delta)
        dv += p^T @ do                       in registers
        dk += scale * dx^T @ q               in registers
        dq += scale * dx @ k                 in memory, float32, as blocks come by

One walk over the pairs, where hybrid_attention takes two. The order in which blocks add to a row of
dq differs from run to run, and so do its last bits; o, lse, dk and dv are bit for bit the same each
time. The sums of dq take 4 bytes an element while the backward runs.

Limits, masks and the forward: those of hybrid_attention, with the same plan. Above a head dim of
128 the sums of dq find no room in registers: there the gradients are hybrid_attention's.

Twin: triton_kernels/hybrid_attention_atomic.py.

Sources: FlashAttention-2's backward (arXiv:2307.08691) adds to dq atomically; FlashAttention-3's
(arXiv:2407.08608) lets TMA add.
"""

from typing import Any

import jax

from .hybrid_attention import Config, HybridPlan, _attend, _backward, hybrid_attention_fwd
from .hybrid_attention import default_config as _default_config


def default_config(T: int, Hq: int, Hk: int, D: int, dtype: Any, which: str = "fwd") -> Config:
    """The Config for T tokens on a Hopper; which: "fwd" or "atomic"."""
    return _default_config(T, Hq, Hk, D, dtype, which)


def hybrid_attention_atomic_fwd(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    plan: HybridPlan,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi: jax.Array | None = None,
    config: Config | None = None,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array | None, ...]]:
    """hybrid_attention_fwd, as it is."""
    return hybrid_attention_fwd(
        q, k, v, plan, scale=scale, softcap=softcap, alibi=alibi, config=config
    )


def hybrid_attention_atomic_bwd(
    res: tuple[jax.Array | None, ...],
    do: jax.Array,
    dlse: jax.Array | None = None,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients (dq, dk, dv); dq differs in its last bits from run to run. alibi has none.

    Arguments and errors as hybrid_attention_bwd's. config: tiles of the one kernel; block_m keys
    stay and block_n queries pass.
    """
    return _backward(res, do, dlse, scale, softcap, config, True)


def hybrid_attention_atomic(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    plan: HybridPlan,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi: jax.Array | None = None,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(o [T, Hq, D], lse [Hq, T] float32): hybrid_attention, with a backward that adds atomically.

    Arguments, errors and the meaning of tokens that see nothing are hybrid_attention's, and so are
    o and lse, bit for bit. dq is not the same each time.
    """
    return _attend(q, k, v, plan, scale, softcap, alibi, config, True)
