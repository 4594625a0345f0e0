"""RetNet's retention over packed sequences: decay attention with one fixed decay for each head.

    S[t] = gamma[h] * S[t-1] + k[t] v[t]^T     gamma[h] = 1 - 2^(-5 - h)
    y[t] = scale * q[t]^T S[t]                 S_T[s]: S after the last token
    q, k [T, H, K]   v [T, H, V]   S0 [B, H, K, V] or none   cu_seqlens [B + 1]
    ->   y [T, H, V], S_T [B, H, K, V] float32         scale: K^-1/2 unless it is given

    decay_attention with g[h] = log(gamma[h]) and weights of 1: within a chunk, decays depend on
    t - j alone

Rotations of q and k, the norm of y and its gate are outside. Backward: decay_attention's dq, dk,
dv and dS0.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from parity.problems import decay_attention as core
from parity.problems.linear_scan import NUMERIC, cu_seqlens, lengths
from parity.spec import Arithmetic, Array, Cost, Normal, Problem, Workload

ARGUMENTS = ("q", "k", "v", "S0", "cu_seqlens")

# outputs and cotangents are decay_attention's


def sizes(T: int, B: int, H: int, K: int, V: int) -> dict[str, int]:
    return {"T": T, "B": B, "H": H, "K": K, "V": V}


def _ci(name: str, dims: dict[str, int], **more: Any) -> Workload:
    return Workload(name, dims, "float16", ("ci", "ragged"), **more)


def _model(name: str, dims: dict[str, int], *tags: str) -> Workload:
    return Workload(name, dims, "bfloat16", ("model", "memory-bound", *tags), absent=("S0",))


WORKLOADS = (
    # 3 tokens, none, and 82: two chunks (decay_attention has more)
    _ci("ci", sizes(85, 3, 2, 64, 128)),
    _ci("ci_scale", sizes(101, 3, 1, 128, 64), options={"scale": 0.21}, absent=("S0",)),
    _model("retnet_k128", sizes(8 * 4096, 8, 16, 128, 128)),
    _model("retnet_k256_v512", sizes(4 * 4096, 4, 16, 256, 512)),  # RetNet 6.7B
    _model("packed_32k", sizes(32768, 40, 16, 128, 128), "ragged"),
)


def inputs(work: Workload) -> dict:
    T, H, K = work["T"], work["H"], work["K"]
    given = {
        "q": Normal((T, H, K), work.dtype),
        "k": Normal((T, H, K), work.dtype),
        "v": Normal((T, H, work["V"]), work.dtype),
        "S0": Normal(core.state(work), "float32", std=5.0),
        "cu_seqlens": cu_seqlens(work),
    }
    return {name: d for name, d in given.items() if name not in work.absent}


def grads(work: Workload) -> dict[str, Array]:
    found = inputs(work)
    del found["cu_seqlens"]
    return {"d" + name: Array(d.shape, d.dtype) for name, d in found.items()}


def log_decays(heads: int) -> np.ndarray:
    """g [H]."""
    return np.log1p(-(2.0 ** (-5.0 - np.arange(heads))))


def _core(ar: Arithmetic, work: Workload, q: Any, k: Any, v: Any, S0: Any, cu: Any) -> core.Core:
    T, H = work["T"], work["H"]
    g = ar.empty((T, H), like=v)
    for h, rate in enumerate(log_decays(H)):
        g[:, h] = float(rate)
    scale = work.options.get("scale", work["K"] ** -0.5)
    S0 = None if S0 is None else ar.lift(S0)
    return core.Core(q, k, v, g, None, S0, cu, work.dtype, scale, work.options.get("chunk", 64))


def oracle(
    ar: Arithmetic, work: Workload, q: Any, k: Any, v: Any, cu_seqlens: Any, S0: Any = None,
    weights: core.Weights = core.decays,
) -> tuple[Any, Any]:  # fmt: skip
    return core.forward(ar, _core(ar, work, q, k, v, S0, cu_seqlens), weights)


def oracle_bwd(
    ar: Arithmetic, work: Workload, q: Any, k: Any, v: Any, cu_seqlens: Any, dy: Any, dS_T: Any,
    S0: Any = None,
) -> tuple[Any, ...]:  # fmt: skip
    dq, dk, dv, _, _, dS0 = core.backward(ar, _core(ar, work, q, k, v, S0, cu_seqlens), dy, dS_T)
    return (dq, dk, dv) if S0 is None else (dq, dk, dv, dS0)


def cost(work: Workload, which: str) -> Cost:
    """decay_attention's, without any gates."""
    plain = replace(
        work,
        sizes={**work.sizes, "Hq": work["H"]},
        tags=(*work.tags, core.CONSTANT),
        absent=(*work.absent, "i"),
    )
    return core.cost(plain, which)


def reduction(work: Workload, name: str) -> int:
    return max(lengths(work))


def heads_decay_alike(case: Any) -> Any:
    """Every head decays as the first one does."""
    if case.which != "fwd" or case.work["H"] == 1:
        return None

    def first_heads(ar: Arithmetic, b: Any, u: Any) -> Any:
        return core.decays(ar, ar.xp.broadcast_to(b[:1, ...], b.shape), u)

    return core.with_weights(case, first_heads)


PROBLEM = Problem(
    stem="retention",
    doc=__doc__ or "",
    family="scan",
    workloads=WORKLOADS,
    inputs=inputs,
    cotangents=core.cotangents,
    outputs=core.outputs,
    grads=grads,
    oracle=oracle,
    oracle_bwd=oracle_bwd,
    cost=cost,
    reduction=reduction,
    implementations={
        "triton": "triton_kernels.retention:retention",
        "pallas": "pallas_kernels.retention:retention",
    },
    peers={
        "fla": "parity.peers.decay:fla_retention",
        "torch.compile": "parity.peers.decay:compiled_retention",
        "jax.jit": "parity.peers.decay:jax_retention",
    },
    arguments=ARGUMENTS,
    bwd_options=("scale", "chunk"),
    faults=core.OF_STATES | core.OF_SCORES | {heads_decay_alike: NUMERIC},
    glue=core.PROBLEM.glue,
)
