"""hybrid_attention with another backward: five products for a pair of tiles in place of seven.

    q [T, Hq, D]   k, v [T, Hk, D]   ->   o [T, Hq, D], lse [Hq, T] float32      as hybrid_attention

    for every tile of keys, and every tile of queries that can see one of them:
        p = exp(x - lse);   dx = p * (do @ v^T - delta)
        dv += p^T @ do;   dk += scale * dx^T @ q
        dq += scale * dx @ k                 in memory, as programs come by

The same mathematics, layouts, costs and peers; dq is summed in float32 in no order. The forward is
hybrid_attention's own and is judged there.
"""

from dataclasses import replace

from parity.problems import hybrid_attention

NAMES = ("ci", "bagel_32k", "bagel_36k", "pack_16k", "gemma_window_d256", "prefix_8k_2k")

WORKLOADS = tuple(
    replace(hybrid_attention.PROBLEM.workload(name), passes=("bwd",)) for name in NAMES
)

PROBLEM = replace(
    hybrid_attention.PROBLEM,
    stem="hybrid_attention_atomic",
    doc=__doc__ or "",
    workloads=WORKLOADS,
    implementations={
        twin: f"{twin}_kernels.hybrid_attention_atomic:hybrid_attention_atomic"
        for twin in ("triton", "pallas")
    },
    further={},
    unordered=("dq",),
)
