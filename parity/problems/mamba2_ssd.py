"""Mamba-2's state-space duality over packed sequences: decay attention under the model's own names.

    dt' = clamp(dt + dt_bias, *dt_limit), of its softplus with dt_softplus
    h[t] = exp(dt'[t] A) * h[t-1] + dt'[t] * x[t] B[t]^T          h_T[s]: h after the last token
    y[t] = h[t] C[t] + D * x[t], times silu(z[t]) where there is a z
    x, z [T, H, P]   dt [T, H]   A < 0 [H]   B, C [T, G, N]   D [H] or [H, P]   dt_bias [H]
    cu_seqlens [seqs + 1]   h0 [seqs, H, P, N]   ->   y [T, H, P], h_T [seqs, H, P, N]
    dt, A, D, dt_bias and states are float32; D, z, dt_bias and h0 may be missing.

    decay_attention with q = C, k = B, v = x, g = dt' A, weights u = dt', scale 1, S = h^T

Backward, with dy0 the gradient of y before its gate, y0; dq, dk, dv, dg, du are decay_attention's:
    dy0 = dy * silu(z);  dz = dy * y0 * (s + z s (1 - s)),  s = sigmoid(z)
    dC = dq    dB = dk    dx = dv + D * dy0    dD = sum of dy0 * x over tokens (and channels)
    ddt' = du + A dg    dA = sum_t dt' dg
    ddt = ddt' * sigmoid(dt + dt_bias), 0 beyond dt_limit (not at its ends);  ddt_bias = sum_t ddt

u is never divided by: dt' may be 0. The gate is a step of its own, so that the model stores y0 and
dy0 in 16 bits where there is a z.
"""

from dataclasses import replace
from math import inf
from typing import Any, NamedTuple

from parity.problems import decay_attention as core
from parity.problems.linear_scan import NUMERIC, cu_seqlens, lengths
from parity.spec import (
    Arithmetic,
    Array,
    Cost,
    Given,
    Integers,
    Normal,
    Problem,
    Uniform,
    Workload,
)

ARGUMENTS = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "cu_seqlens", "h0")
BY_CHANNEL = "by-channel"  # a tag: D is [H, P]
GATED = {"dt_softplus": True, "dt_limit": (0.004, 0.08)}  # some steps are beyond either limit


def sizes(T: int, B: int, G: int, H: int, N: int, P: int) -> dict[str, int]:
    return {"T": T, "B": B, "G": G, "H": H, "N": N, "P": P}


def _ci(name: str, dims: dict[str, int], *tags: str, **more: Any) -> Workload:
    return Workload(name, dims, "float16", ("ci", "ragged", *tags), **more)


def _model(name: str, dims: dict[str, int], *tags: str) -> Workload:
    tags = ("model", "memory-bound", *tags)
    return Workload(name, dims, "bfloat16", tags, {"dt_softplus": True}, ("z", "h0"))


WORKLOADS = (
    # 7 tokens, none, and 80: two chunks (decay_attention has more); a group of two heads
    _ci("ci", sizes(87, 3, 1, 2, 128, 64), absent=("z", "dt_bias")),
    _ci("ci_gated", sizes(97, 3, 2, 2, 64, 64), BY_CHANNEL, absent=("h0",), options=GATED),
    _model("mamba2_2p7b", sizes(8 * 4096, 8, 1, 80, 128, 64)),
    _model("mamba2_g8", sizes(8 * 4096, 8, 8, 128, 128, 64)),  # Codestral Mamba
    _model("mamba2_64k", sizes(65536, 1, 1, 80, 128, 64)),
    _model("packed_32k", sizes(32768, 40, 1, 80, 128, 64), "ragged"),
)


def inputs(work: Workload) -> dict:
    T, G, H, N, P = (work[n] for n in "TGHNP")
    core.whole_groups(H, G)
    given = {
        "x": Normal((T, H, P), work.dtype),
        "dt": Uniform((T, H), "float32", 0.0, 0.1),
        "A": Uniform((H,), "float32", -4.0, -0.2),  # a state lasts for 5 to 100 tokens
        "B": Normal((T, G, N), work.dtype),
        "C": Normal((T, G, N), work.dtype),
        "D": Normal((H, P) if BY_CHANNEL in work.tags else (H,), "float32"),
        "z": Normal((T, H, P), work.dtype),
        "dt_bias": Uniform((H,), "float32", 0.0, 0.05),
        "cu_seqlens": cu_seqlens(work),
        "h0": Normal(state(work), "float32"),
    }
    if work.options.get("dt_softplus"):  # dt' from 0.001 to 0.1, as Mamba-2 begins with
        given["dt"] = Normal((T, H), "float32", std=0.5)
        given["dt_bias"] = Uniform((H,), "float32", -6.9, -2.3)
    return {name: d for name, d in given.items() if name not in work.absent}


def state(work: Workload) -> tuple[int, ...]:
    return (work["B"], work["H"], work["P"], work["N"])


def outputs(work: Workload) -> dict[str, Array]:
    return {
        "y": Array((work["T"], work["H"], work["P"]), work.dtype),
        "h_T": Array(state(work), "float32"),
    }


def cotangents(work: Workload) -> dict:
    return {"d" + name: Normal(a.shape, a.dtype) for name, a in outputs(work).items()}


def grads(work: Workload) -> dict[str, Array]:
    found = inputs(work)
    del found["cu_seqlens"]
    gates = ["dt", "A", "dt_bias"]
    if "z" not in work.absent:
        gates.append("D")  # what it sums was rounded
    of = {n: work.dtype if n in gates else "" for n in found}
    return {"d" + n: Array(d.shape, d.dtype, of=of[n]) for n, d in found.items()}


def sigmoid(ar: Arithmetic, x: Any) -> Any:
    e = ar.xp.exp(-ar.xp.abs(x))
    return ar.xp.where(x >= 0, 1 / (1 + e), e / (1 + e))


class _Steps(NamedTuple):
    """dt' [T, H], its slope in dt, and A [H]."""

    dt: Any
    slope: Any
    A: Any


def _steps(ar: Arithmetic, work: Workload, dt: Any, A: Any, dt_bias: Any) -> _Steps:
    xp, raw = ar.xp, ar.lift(dt)
    raw = raw if dt_bias is None else raw + ar.lift(dt_bias)
    slope = xp.ones_like(raw)
    if work.options.get("dt_softplus", False):
        slope = sigmoid(ar, raw)
        raw = xp.where(raw > 0, raw, 0 * raw) + xp.log1p(xp.exp(-xp.abs(raw)))
    low, high = work.options.get("dt_limit", (0.0, inf))
    slope = xp.where((raw >= low) & (raw <= high), slope, 0 * slope)
    return _Steps(xp.clip(raw, low, high), slope, ar.lift(A))


def _core(
    ar: Arithmetic, work: Workload, steps: _Steps, x: Any, B: Any, C: Any, h0: Any, cu: Any
) -> core.Core:
    S0 = None if h0 is None else ar.lift(h0).mT
    g, chunk = steps.dt * steps.A, work.options.get("chunk", 64)
    return core.Core(C, B, x, g, steps.dt, S0, cu, work.dtype, 1.0, chunk)


def _by_channel(ar: Arithmetic, D: Any) -> Any:
    """[H, P] or [H, 1]."""
    return ar.lift(D if D.ndim == 2 else D[:, None])


def _ungated(ar: Arithmetic, seen: core.Core, D: Any) -> tuple[Any, Any]:
    """(y0, S_T)"""
    y, S_T = core.forward(ar, seen)
    if D is not None:
        for rows in row_blocks(y):
            y[rows, ...] += _by_channel(ar, D) * ar.lift(seen.v[rows, ...])
    return y, S_T


def row_blocks(x: Any) -> list[slice]:
    """Tokens at a time: intermediates of about 2^26 elements."""
    step = max(1, (1 << 26) // max(1, x.shape[1] * x.shape[2]))
    return core.chunks(slice(0, x.shape[0]), step)


def oracle(
    ar: Arithmetic, work: Workload, x: Any, dt: Any, A: Any, B: Any, C: Any, cu_seqlens: Any,
    D: Any = None, z: Any = None, dt_bias: Any = None, h0: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
    steps = _steps(ar, work, dt, A, dt_bias)
    y, S_T = _ungated(ar, _core(ar, work, steps, x, B, C, h0, cu_seqlens), D)
    if z is not None:
        for rows in row_blocks(y):
            zr = ar.lift(z[rows, ...])
            y[rows, ...] = ar.stored(y[rows, ...], work.dtype) * zr * sigmoid(ar, zr)
    return y, S_T.mT


def oracle_bwd(
    ar: Arithmetic, work: Workload, x: Any, dt: Any, A: Any, B: Any, C: Any, cu_seqlens: Any,
    dy: Any, dh_T: Any, D: Any = None, z: Any = None, dt_bias: Any = None, h0: Any = None,
) -> tuple[Any, ...]:  # fmt: skip
    xp, steps = ar.xp, _steps(ar, work, dt, A, dt_bias)
    seen = _core(ar, work, steps, x, B, C, h0, cu_seqlens)
    found: dict[str, Any] = {}
    if z is not None:
        y0, _ = _ungated(ar, seen, D)
        dz, dy0 = (ar.empty(y0.shape, like=y0) for _ in range(2))
        for rows in row_blocks(y0):
            zr, dyr = ar.lift(z[rows, ...]), ar.lift(dy[rows, ...])
            s = sigmoid(ar, zr)
            dz[rows, ...] = dyr * ar.stored(y0[rows, ...], work.dtype) * (s + zr * s * (1 - s))
            dy0[rows, ...] = ar.stored(dyr * zr * s, work.dtype)
        dy, found["dz"] = dy0, dz
    dC, dB, dx, dg, du, dS0 = core.backward(ar, seen, dy, dh_T.mT)
    if D is not None:
        dD = 0 * _by_channel(ar, D)
        for rows in row_blocks(dx):
            dyr = ar.lift(dy[rows, ...])
            dx[rows, ...] += _by_channel(ar, D) * dyr
            by_channel = xp.sum(dyr * ar.lift(x[rows, ...]), axis=0)
            dD += by_channel if D.ndim == 2 else xp.sum(by_channel, axis=1)[:, None]
        found["dD"] = xp.reshape(dD, D.shape)
    ddt = (du + steps.A * dg) * steps.slope
    found |= {"dx": dx, "ddt": ddt, "dA": xp.sum(steps.dt * dg, axis=0), "dB": dB, "dC": dC}
    if dt_bias is not None:
        found["ddt_bias"] = xp.sum(ddt, axis=0)
    if h0 is not None:
        found["dh0"] = dS0.mT
    return tuple(found["d" + n] for n in ARGUMENTS if "d" + n in found)


def probe(work: Workload) -> dict | None:
    """Without decay all is whole: A is 0 and dt' 0, 1 or 2."""
    if work.name != "ci":
        return None
    whole = {
        n: d if isinstance(d, Given) else Integers(d.shape, d.dtype, -1, 1)
        for n, d in (inputs(work) | cotangents(work)).items()
    }
    flat = {"A": Integers((work["H"],), "float32", 0, 0)}
    return whole | flat | {"dt": Integers((work["T"], work["H"]), "float32", 0, 2)}


def cost(work: Workload, which: str) -> Cost:
    """As decay_attention's; and D * x, and what a gate reads and writes."""
    T, G, H, N, P = (work[n] for n in "TGHNP")
    both, gated = 1 if which == "fwd" else 2, "z" not in work.absent
    # B, C, x, y, z; B, C, dB, dC, x, dy, dx, z, dz
    rows = both * 2 * T * G * N + (both + 1 + both * gated) * T * H * P
    states = (1 + both * ("h0" not in work.absent)) * work["B"] * H * N * P
    skip = 0 if "D" in work.absent else both * 2 * T * H * P
    flops = (4 if which == "fwd" else 10) * T * H * N * P + skip
    return Cost(flops, rows * work.itemsize + 4 * (both * T * H + states))


def reduction(work: Workload, name: str) -> int:
    return work["T"] if name in ("dA", "dD", "ddt_bias") else max(lengths(work))


# Wrong answers that only this can give: see parity.faults.


def without_the_skip(case: Any) -> Any:
    """D * x is left out."""
    return core.changed(case, {"D": 0 * case.arrays["D"]}) if "D" in case.arrays else None


def without_the_gate(case: Any) -> Any:
    """The gate is left out of y."""
    if case.which != "fwd" or "z" not in case.arrays:
        return None
    arrays = {n: x for n, x in case.arrays.items() if n != "z"}
    return case.recomputed(Arithmetic.model(case.xp), case.work, arrays)


def without_the_bias(case: Any) -> Any:
    """dt_bias is not added."""
    if "dt_bias" not in case.arrays:
        return None
    return core.changed(case, {"dt_bias": 0 * case.arrays["dt_bias"]})


def without_the_limits(case: Any) -> Any:
    """dt' is not clamped, or the gradient passes where it is."""
    if "dt_limit" not in case.work.options:
        return None
    options = {k: v for k, v in case.work.options.items() if k != "dt_limit"}
    work = replace(case.work, options=options)
    return case.recomputed(Arithmetic.model(case.xp), work, case.arrays)


def neighbours_decay(case: Any) -> Any:
    """Heads decay by A of the head beside theirs."""
    return core.changed(case, {"A": case.xp.roll(case.arrays["A"], 1, axis=0)})


PROBLEM = Problem(
    stem="mamba2_ssd",
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
    probe=probe,
    implementations={
        "triton": "triton_kernels.mamba2_ssd:mamba2_ssd",
        "pallas": "pallas_kernels.mamba2_ssd:mamba2_ssd",
    },
    peers={
        "mamba_ssm": "parity.peers.decay:mamba_ssm",
        "fla": "parity.peers.decay:fla_as_mamba2",
        "torch.compile": "parity.peers.decay:compiled_ssd",
        "jax.jit": "parity.peers.decay:jax_ssd",
    },
    arguments=ARGUMENTS,
    bwd_options=("dt_softplus", "dt_limit", "chunk"),
    faults=core.OF_STATES
    | {
        without_the_skip: NUMERIC,
        without_the_gate: NUMERIC,
        without_the_bias: NUMERIC,
        without_the_limits: NUMERIC,
        neighbours_decay: NUMERIC,
    },
    glue=core.PROBLEM.glue,
)
