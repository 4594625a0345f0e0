"""Peers of the scans: fla-core's HGRN kernels, torch's and JAX's associative scans.

fla-core's take log a, which is computed beforehand. The associative scans know no sequences: a is
0 at a first token, whose b holds what the state before leaves of itself.
"""

import functools
import importlib
import itertools
from typing import Any

from parity import frameworks
from parity.peers import (
    Arrays,
    Call,
    Options,
    _compiled_form,
    _jax,
    _jax_backward,
    _quickest,
    _torch,
    _torch_form,
    _with_config,
)


def fla_hgrn(which: str, inputs: Arrays, cotangents: Arrays, options: Options) -> Call | None:
    """fla-core's fused_recurrent_hgrn, or its chunk_hgrn where all sequences are alike and begin
    with nothing; the gradient is that of log a."""
    if frameworks.interpreted():
        return None
    try:
        hgrn = importlib.import_module("fla.ops.hgrn")
    except ImportError:
        return None
    a, b, cu, h0 = _torch(inputs, "a", "b", "cu_seqlens", "h0")
    (T, W), B = a.shape, len(cu) - 1
    log_a = a.float().log().to(a.dtype)
    lengths = {int(q) - int(p) for p, q in itertools.pairwise(cu.tolist())}
    alike = len(lengths) == 1

    def recurrent(b: Any, log_a: Any) -> Any:
        if alike:
            h, h_T = hgrn.fused_recurrent_hgrn(
                b.view(B, T // B, W), log_a.view(B, T // B, W), h0, output_final_state=True
            )
        else:
            h, h_T = hgrn.fused_recurrent_hgrn(
                b[None], log_a[None], h0, output_final_state=True, cu_seqlens=cu.long()
            )
        return h.view(T, W), h_T.float()

    def chunked(b: Any, log_a: Any) -> Any:
        rows = (x.view(B, T // B, W) for x in (b, log_a))
        h, h_T = hgrn.chunk_hgrn(*rows, output_final_state=True)
        return h.view(T, W), h_T.float()

    dys = _torch(cotangents, "dh", "dh_T") if which == "bwd" else []
    forms = [({"form": "fused_recurrent_hgrn"}, recurrent)]
    if alike and h0 is None:
        forms.append(({"form": "chunk_hgrn"}, chunked))
    made = [
        (config, functools.partial(_torch_form, which, fn, [b, log_a], [log_a, b], dys))
        for config, fn in forms
    ]
    call = _quickest(made)
    return _with_config(call, {**call.config, "computes": "with log a given"})  # type: ignore


def compiled_scan(which: str, inputs: Arrays, cotangents: Arrays, options: Options) -> Call | None:
    """torch.compile of torch's associative scan, a prototype there; it has no backward."""
    if which == "bwd":
        return None
    a, b, cu, h0 = _torch(inputs, "a", "b", "cu_seqlens", "h0")
    layout = _layout_in_torch(a, cu)
    fn = functools.partial(_scan_in_torch, layout=layout, h0=h0, dtype=a.dtype)
    return _compiled_form(which, fn, [a, b], [a, b], [])


def compiled_rglru(which: str, inputs: Arrays, cotangents: Arrays, options: Options) -> Call | None:
    """torch.compile of the gates and of torch's associative scan; it has no backward."""
    import torch

    if which == "bwd":
        return None
    x, r_pre, i_pre, lam, cu, h0 = _torch(inputs, "x", "r_pre", "i_pre", "lam", "cu_seqlens", "h0")
    layout, c = _layout_in_torch(x, cu), options.get("c", 8.0)

    def rglru(x: Any, r_pre: Any, i_pre: Any, lam: Any) -> Any:
        log_a = -c * torch.sigmoid(r_pre.float()) * torch.nn.functional.softplus(lam)
        a, m = torch.exp(log_a), torch.sqrt(-torch.expm1(2 * log_a))
        if h0 is None:
            a, m = a.where(~layout[0], 0), m.where(~layout[0], 1)
        b = m * torch.sigmoid(i_pre.float()) * x.float()
        return _scan_in_torch(a, b, layout=layout, h0=h0, dtype=x.dtype)

    args = [x, r_pre, i_pre, lam]
    return _compiled_form(which, rglru, args, args, [])


def _layout_in_torch(x: Any, cu: Any) -> tuple[Any, Any, Any, Any]:
    """(is a first token [T, 1], its sequence [T], is empty [B, 1], last token [B])."""
    import torch

    t = torch.arange(len(x), device=x.device)
    s = torch.searchsorted(cu[1:].contiguous(), t, right=True)
    starts = (t == cu[s])[:, None]
    return starts, s, (cu[1:] == cu[:-1])[:, None], (cu[1:].long() - 1).clamp(min=0)


def _scan_in_torch(a: Any, b: Any, *, layout: Any, h0: Any, dtype: Any) -> tuple[Any, Any]:
    import torch
    from torch._higher_order_ops.associative_scan import associative_scan

    starts, s, empty, last = layout
    a, b = a.float(), b.float()
    if h0 is not None:
        b = torch.where(starts, a * h0[s] + b, b)
    a = torch.where(starts, 0.0, a)
    mode = "pointwise" if a.is_cuda else "generic"
    _, h = associative_scan(
        lambda p, q: (p[0] * q[0], q[0] * p[1] + q[1]), (a, b), 0, combine_mode=mode
    )
    before = torch.zeros((), device=a.device) if h0 is None else h0
    return h.to(dtype), torch.where(empty, before, h[last])


def jax_associative_scan(
    which: str, inputs: Arrays, cotangents: Arrays, options: Options
) -> Call | None:
    """jax.lax.associative_scan in float32, under jit, and its derivative."""
    import jax

    a, b, cu, h0 = _jax(inputs, "a", "b", "cu_seqlens", "h0")
    wanted = [a, b] if h0 is None else [a, b, h0]

    def scan(a: Any, b: Any, h0: Any = None) -> Any:
        return _scan_in_jax(a, b, cu, h0, a.dtype)

    if which == "fwd":
        return functools.partial(jax.jit(scan), *wanted)
    return _jax_backward(scan, wanted, _jax(cotangents, "dh", "dh_T"))


def jax_associative_rglru(
    which: str, inputs: Arrays, cotangents: Arrays, options: Options
) -> Call | None:
    """The gates in jax.numpy and jax.lax.associative_scan, under jit, and their derivative."""
    import jax
    import jax.numpy as jnp

    x, r_pre, i_pre, lam, cu, h0 = _jax(inputs, "x", "r_pre", "i_pre", "lam", "cu_seqlens", "h0")
    wanted = [x, r_pre, i_pre, lam] + ([] if h0 is None else [h0])
    c = options.get("c", 8.0)

    def rglru(x: Any, r_pre: Any, i_pre: Any, lam: Any, h0: Any = None) -> Any:
        x, r_pre, i_pre, dtype = *(v.astype(jnp.float32) for v in (x, r_pre, i_pre)), x.dtype
        log_a = -c * jax.nn.sigmoid(r_pre) * jax.nn.softplus(lam)
        fresh = (_starts(cu, len(x))[0] & (h0 is None))[:, None]
        log_a = jnp.where(fresh, -1.0, log_a)  # whatever: it is not used, nor is its gradient
        a, m = jnp.exp(log_a), jnp.sqrt(-jnp.expm1(2 * log_a))
        b = jnp.where(fresh, 1, m) * jax.nn.sigmoid(i_pre) * x
        return _scan_in_jax(jnp.where(fresh, 0, a), b, cu, h0, dtype)

    if which == "fwd":
        return functools.partial(jax.jit(rglru), *wanted)
    return _jax_backward(rglru, wanted, _jax(cotangents, "dh", "dh_T"))


def _starts(cu: Any, T: int) -> tuple[Any, Any]:
    """(is a first token, its sequence) of every token."""
    import jax.numpy as jnp

    t = jnp.arange(T)
    s = jnp.searchsorted(cu[1:], t, side="right")
    return t == cu[s], s


def _scan_in_jax(a: Any, b: Any, cu: Any, h0: Any, dtype: Any) -> tuple[Any, Any]:
    import jax
    import jax.numpy as jnp

    starts, s = _starts(cu, len(a))
    a, b, starts = a.astype(jnp.float32), b.astype(jnp.float32), starts[:, None]
    before = jnp.zeros((len(cu) - 1, a.shape[1])) if h0 is None else h0
    b = jnp.where(starts, a * before[s] + b, b)
    a = jnp.where(starts, 0, a)
    _, h = jax.lax.associative_scan(lambda p, q: (p[0] * q[0], q[0] * p[1] + q[1]), (a, b))
    empty = (cu[1:] == cu[:-1])[:, None]
    return h.astype(dtype), jnp.where(empty, before, h[jnp.maximum(cu[1:] - 1, 0)])
