"""Real-gated linear recurrent unit over packed sequences: gates and recurrence in one pass.

    r = sigmoid(r_pre)    i = sigmoid(i_pre)    log a = -c * r * softplus(lam)
    h[t] = a[t] * h[t-1] + sqrt(1 - a[t]^2) * i[t] * x[t]          h_T[s]: h after the last token
    x, r_pre, i_pre [T, W]   lam [W]   cu_seqlens [B + 1]   h0 [B, W]   ->   h [T, W], h_T [B, W]
    A sequence begins with h0[s]; without h0 its first token enters as it is: a = 0, the root is 1.

    for every tile: a and b = sqrt(1 - a^2) * i * x, in registers; then as linear_scan, with those

Backward, with u the gradient of b (see linear_scan), m = sqrt(1 - a^2) and da = u * h[t-1]:
    dx = u * m * i    di = u * m * x    dm = u * i * x
    dlog a = da * a - dm * a^2 / max(m, 5e-4)          0 at a first token without h0
    dr = -c * softplus(lam) * dlog a    dlam = sum_t -c * r * dlog a * sigmoid(lam)
    dr_pre = dr * r * (1 - r)    di_pre = di * i * (1 - i)
"""

from typing import Any, NamedTuple

from parity.problems.linear_scan import (
    FAULTS,
    NUMERIC,
    before,
    columns,
    cu_seqlens,
    lengths,
    outputs,
    scan,
    scan_back,
    sequences,
    start_of,
    workloads,
)
from parity.spec import Arithmetic, Array, Cost, Normal, Problem, Uniform, Workload

WORKLOADS = workloads()
LEAST_ROOT = 5e-4  # the derivative of the square root counts as at most 1000

# cotangents as linear_scan's


def inputs(work: Workload) -> dict:
    T, W = work["T"], work["W"]
    given = {
        "x": Normal((T, W), work.dtype),
        "r_pre": Normal((T, W), work.dtype),
        "i_pre": Normal((T, W), work.dtype),
        "lam": Uniform((W,), "float32", -9.0, -4.3),  # a from 0.9 to 0.999 where r is 1
        "cu_seqlens": cu_seqlens(work),
        "h0": Normal((work["B"], W), "float32"),
    }
    return {name: d for name, d in given.items() if name not in work.absent}


def cotangents(work: Workload) -> dict:
    return {"d" + name: Normal(a.shape, a.dtype) for name, a in outputs(work).items()}


def grads(work: Workload) -> dict[str, Array]:
    rows = Array((work["T"], work["W"]), work.dtype)
    found = {
        "dx": rows,
        "dr_pre": rows,
        "di_pre": rows,
        "dlam": Array((work["W"],), "float32"),
        "dh0": Array((work["B"], work["W"]), "float32"),
    }
    return {name: a for name, a in found.items() if name[1:] not in work.absent}


class _Gates(NamedTuple):
    x: Any
    r: Any
    i: Any
    a: Any
    m: Any
    rate: Any  # c * softplus(lam)


def _softplus(ar: Arithmetic, lam: Any) -> Any:
    return ar.xp.maximum(lam, 0 * lam) + ar.xp.log1p(ar.xp.exp(-ar.xp.abs(lam)))


def _sigmoid(ar: Arithmetic, x: Any) -> Any:
    e = ar.xp.exp(-ar.xp.abs(x))
    return ar.xp.where(x >= 0, 1 / (1 + e), e / (1 + e))


def _gates(
    ar: Arithmetic, work: Workload, arrays: tuple, lam: Any, rows: slice, cols: slice, fresh: bool
) -> _Gates:
    """Of the rows of one sequence; arrays: (x, r_pre, i_pre); fresh: the first token enters as it
    is."""
    x, r_pre, i_pre = (ar.lift(v[rows, cols]) for v in arrays)
    rate = work.options.get("c", 8.0) * _softplus(ar, ar.lift(lam[cols]))
    r, i = _sigmoid(ar, r_pre), _sigmoid(ar, i_pre)
    a = ar.xp.exp(-rate * r)
    m = ar.xp.sqrt(-ar.xp.expm1(-2 * rate * r))
    if fresh:
        a[:1, :], m[:1, :] = 0, 1
    return _Gates(x, r, i, a, m, rate)


def oracle(
    ar: Arithmetic, work: Workload, x: Any, r_pre: Any, i_pre: Any, lam: Any, cu_seqlens: Any,
    h0: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
    h, h_T = ar.empty(x.shape, like=x), ar.empty((work["B"], work["W"]), like=x)
    for cols in columns(work):
        for s, rows in sequences(cu_seqlens):
            g = _gates(ar, work, (x, r_pre, i_pre), lam, rows, cols, h0 is None)
            h_T[s, cols] = start_of(ar, h0, s, cols, like=x)
            h[rows, cols] = scan(ar, g.a, g.m * g.i * g.x, h_T[s, cols])
            if rows.stop > rows.start:
                h_T[s, cols] = h[rows.stop - 1, cols]
    return h, h_T


def oracle_bwd(
    ar: Arithmetic, work: Workload, x: Any, r_pre: Any, i_pre: Any, lam: Any, cu_seqlens: Any,
    dh: Any, dh_T: Any, h0: Any = None,
) -> tuple[Any, ...]:  # fmt: skip
    dx, dr_pre, di_pre = (ar.empty(x.shape, like=x) for _ in range(3))
    dh0, dlam = ar.empty((work["B"], work["W"]), like=x), 0 * ar.lift(lam)
    c, slope = work.options.get("c", 8.0), _sigmoid(ar, ar.lift(lam))
    for cols in columns(work):
        for s, rows in sequences(cu_seqlens):
            g = _gates(ar, work, (x, r_pre, i_pre), lam, rows, cols, h0 is None)
            start = start_of(ar, h0, s, cols, like=x)
            h = ar.stored(scan(ar, g.a, g.m * g.i * g.x, start), work.dtype)
            u = scan_back(ar, g.a, ar.lift(dh[rows, cols]), ar.lift(dh_T[s, cols]))
            da, dm = u * before(ar, h, start), u * g.i * g.x
            least = ar.xp.where(g.m > LEAST_ROOT, g.m, LEAST_ROOT + 0 * g.m)
            dlog_a = da * g.a - dm * g.a**2 / least
            if h0 is None:
                dlog_a[:1, :] = 0
            dx[rows, cols] = u * g.m * g.i
            di_pre[rows, cols] = u * g.m * g.x * g.i * (1 - g.i)
            dr_pre[rows, cols] = -g.rate * dlog_a * g.r * (1 - g.r)
            dlam[cols] += ar.xp.sum(-c * g.r * dlog_a, axis=0) * slope[cols]
            dh0[s, cols] = ar.lift(dh_T[s, cols])
            if rows.stop > rows.start:
                dh0[s, cols] = g.a[0, :] * u[0, :]
    found = (dx, dr_pre, di_pre, dlam)
    return found if h0 is None else (*found, dh0)


def cost(work: Workload, which: str) -> Cost:
    T, W = work["T"], work["W"]
    arrays = 4 if which == "fwd" else 8  # x, r_pre, i_pre, h; and dh, dx, dr_pre, di_pre
    small = 4 * W * (1 + work["B"]) * (1 if which == "fwd" else 2)
    return Cost((20 if which == "fwd" else 45) * T * W, arrays * T * W * work.itemsize + small)


def reduction(work: Workload, name: str) -> int:
    return work["T"] if name == "dlam" else max(lengths(work))


def gate_off_by_one(case: Any) -> Any:
    """Every token decays by the gate of the token before it."""
    arrays = dict(case.arrays) | {"r_pre": case.xp.roll(case.arrays["r_pre"], 1, axis=0)}
    return case.recomputed(Arithmetic.model(case.xp), case.work, arrays)


PROBLEM = Problem(
    stem="rglru",
    doc=__doc__ or "",
    family="scan",
    workloads=WORKLOADS,
    inputs=inputs,
    cotangents=cotangents,
    outputs=outputs,
    grads=grads,
    oracle=oracle,
    oracle_bwd=oracle_bwd,
    cost=cost,
    reduction=reduction,
    implementations={
        "triton": "triton_kernels.rglru:rglru",
        "pallas": "pallas_kernels.rglru:rglru",
    },
    peers={
        "torch.compile": "parity.peers.scan:compiled_rglru",
        "jax.lax.associative_scan": "parity.peers.scan:jax_associative_rglru",
    },
    bwd_options=("c",),
    faults=FAULTS | {gate_off_by_one: NUMERIC},
    glue=("pad", "slice", "copy", "convert_element_type"),
)
