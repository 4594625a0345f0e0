"""Peers of decay attention: kernels of fla-core and mamba_ssm, and the chunked form by compilers.

fla-core (0.5) knows no weights and no groups of heads: where there are some, it gets v times its
weights and repeated q and k, made beforehand. mamba_ssm (2.3) has sequences of one length in a
batch, or tells packed ones apart by an index for every token; then it has no states that enter, and
no gradient of those that leave. Its Triton kernels import only with its CUDA extension built.

The chunked form is one text for torch.compile and jax.jit: all chunks side by side, and the states
that enter them by one product with a matrix of decays from chunk to chunk.
"""

import functools
import importlib
import itertools
import math
from collections.abc import Callable
from math import inf
from typing import Any, NamedTuple

import numpy as np

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
from parity.problems.retention import log_decays

CORE = ("q", "k", "v", "g", "i", "S0", "cu_seqlens")
RETENTION = ("q", "k", "v", "S0", "cu_seqlens")
SSD = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "cu_seqlens", "h0")


# fla-core


def fla_simple_gla(which: str, inputs: Arrays, cotangents: Arrays, options: Options) -> Call | None:
    """The quickest of chunk_, fused_chunk_ and fused_recurrent_simple_gla."""
    q, k, v, g, i, S0, cu = _torch(inputs, *CORE)
    if frameworks.interpreted() or i is not None:
        return None
    repeat = v.shape[1] // q.shape[1]
    q, k = (x.repeat_interleave(repeat, 1) if repeat > 1 else x for x in (q, k))
    if g.ndim == 1 and which == "bwd":
        return None  # it takes constant decays as given
    gates = {"g_gamma" if g.ndim == 1 else "g": g}
    wanted = [q, k, v, g, *([] if S0 is None else [S0])]
    call = _fla("simple_gla", which, (q, k, v), gates, S0, cu, wanted, cotangents, options)
    if call is None or repeat == 1:
        return call
    return _with_config(call, {**call.config, "computes": "with q and k repeated for all heads"})


def fla_retention(which: str, inputs: Arrays, cotangents: Arrays, options: Options) -> Call | None:
    """The quickest of chunk_, fused_chunk_ and fused_recurrent_retention."""
    if frameworks.interpreted():
        return None
    q, k, v, S0, cu = _torch(inputs, *RETENTION)
    wanted = [q, k, v, *([] if S0 is None else [S0])]
    return _fla("retention", which, (q, k, v), {}, S0, cu, wanted, cotangents, options)


def fla_as_mamba2(which: str, inputs: Arrays, cotangents: Arrays, options: Options) -> Call | None:
    """simple_gla on what mamba2_ssd makes of its inputs, without D, gate and gradient of steps."""
    x, dt, A, B, C, z, dt_bias, cu, h0 = _torch(
        inputs, "x", "dt", "A", "B", "C", "z", "dt_bias", "cu_seqlens", "h0"
    )
    if frameworks.interpreted() or z is not None:
        return None
    import torch

    steps = _steps(torch, dt, dt_bias, options)
    repeat = x.shape[1] // B.shape[1]
    q, k = (t.repeat_interleave(repeat, 1) for t in (C, B))
    v, S0 = (x * steps[..., None]).to(x.dtype), None if h0 is None else h0.mT.contiguous()
    dy, dh_T = _torch(cotangents, "dy", "dh_T")
    dys, gates = {"dy": dy, "dS_T": dh_T.mT.contiguous()}, {"g": steps * A}
    call = _fla("simple_gla", which, (q, k, v), gates, S0, cu, [q, k, v], dys, {"scale": 1.0})
    what = "simple_gla of dt x, with B and C repeated for all heads, without D"
    return call and _with_config(call, {**call.config, "computes": what})


def _fla(
    op: str, which: str, qkv: tuple, gates: dict, S0: Any, cu: Any, wanted: list,
    cotangents: Arrays, options: Options,
) -> Any:  # fmt: skip
    try:
        ops = importlib.import_module(f"fla.ops.{op}")
    except ImportError:
        return None
    lengths = {int(b) - int(a) for a, b in itertools.pairwise(cu.tolist())}
    B, T = (len(cu) - 1, lengths.pop()) if len(lengths) == 1 else (1, qkv[0].shape[0])
    more: dict[str, Any] = {"scale": options.get("scale", 1.0 if op == "simple_gla" else None)}
    if lengths:  # of more than one kind
        more["cu_seqlens"] = cu.long()
    (name, g), *_ = gates.items() or [("", None)]
    dtypes = qkv[2].dtype, qkv[2].shape

    def form(fn: Callable[..., Any]) -> Callable[..., Any]:
        def run(q: Any, k: Any, v: Any, g: Any, S0: Any) -> Any:
            rows = [t.view(B, T, *t.shape[1:]) for t in (q, k, v)]
            gate = {} if g is None else {name: g if g.ndim == 1 else g.view(B, T, -1)}
            y, S_T = fn(*rows, **gate, **more, initial_state=S0, output_final_state=True)
            return y.to(dtypes[0]).view(dtypes[1]), S_T.float()

        return run

    dys = _torch(cotangents, "dy", "dS_T") if which == "bwd" else []
    args = [*qkv, g, S0]
    made = [
        (
            {"form": n},
            functools.partial(_torch_form, which, form(getattr(ops, n)), args, wanted, dys),
        )
        for n in (f"{kind}_{op}" for kind in ("chunk", "fused_chunk", "fused_recurrent"))
        if hasattr(ops, n)
    ]
    return _quickest(made)


# mamba_ssm


def mamba_ssm(which: str, inputs: Arrays, cotangents: Arrays, options: Options) -> Call | None:
    """mamba_chunk_scan_combined at the quicker of chunks of 128 and 256."""
    if frameworks.interpreted():
        return None
    try:
        ssd = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    except ImportError:
        return None
    import torch

    x, dt, A, B, C, D, z, dt_bias, cu, h0 = _torch(inputs, *SSD)
    lengths = {int(b) - int(a) for a, b in itertools.pairwise(cu.tolist())}
    alike, T = len(lengths) == 1, x.shape[0]
    if not alike and h0 is not None:
        return None
    seqs = len(cu) - 1 if alike else 1
    how: dict[str, Any] = {
        "dt_softplus": options.get("dt_softplus", False),
        "dt_limit": tuple(options.get("dt_limit", (0.0, inf))),
    }
    computes = {}
    if alike:
        how["return_final_states"] = True
    else:
        token = torch.arange(T, device=x.device)
        which_one = torch.searchsorted(cu[1:].contiguous(), token, right=True)
        how["seq_idx"] = which_one.to(torch.int32)[None]
        if which == "fwd":
            how |= {"return_varlen_states": True, "cu_seqlens": cu}
        else:
            computes = {"computes": "without the gradient of h_T"}

    def form(chunk: int) -> Callable[..., Any]:
        def run(x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, z: Any, bias: Any, h0: Any) -> Any:
            x, dt, B, C = (t.view(seqs, T // seqs, *t.shape[1:]) for t in (x, dt, B, C))
            gate = None if z is None else z.view(x.shape)
            out = ssd.mamba_chunk_scan_combined(
                x, dt, A, B, C, chunk, D=D, z=gate, dt_bias=bias, initial_states=h0, **how
            )
            if not isinstance(out, tuple):
                return (out.view(T, *x.shape[2:]),)
            return out[0].view(T, *x.shape[2:]), out[1].float()

        return run

    args = [x, dt, A, B, C, D, z, dt_bias, h0]
    wanted = [t for t in args if t is not None]
    dys = _torch(cotangents, "dy", "dh_T")[: 2 if alike else 1] if which == "bwd" else []
    made = [
        ({"chunk": n}, functools.partial(_torch_form, which, form(n), args, wanted, dys))
        for n in (256, 128)
    ]
    call = _quickest(made)
    return _with_config(call, {**call.config, **computes})  # type: ignore[attr-defined]


# the chunked form, for compilers


def compiled_chunks(
    which: str, inputs: Arrays, cotangents: Arrays, options: Options
) -> Call | None:
    """torch.compile of decay_attention's chunked form."""
    return _in_torch(which, _core_form, CORE, inputs, _torch(cotangents, "dy", "dS_T"), options)


def compiled_retention(
    which: str, inputs: Arrays, cotangents: Arrays, options: Options
) -> Call | None:
    """torch.compile of retention's chunked form."""
    dys = _torch(cotangents, "dy", "dS_T")
    return _in_torch(which, _retention_form, RETENTION, inputs, dys, options)


def compiled_ssd(which: str, inputs: Arrays, cotangents: Arrays, options: Options) -> Call | None:
    """torch.compile of mamba2_ssd's chunked form, its steps, D and gate."""
    return _in_torch(which, _ssd_form, SSD, inputs, _torch(cotangents, "dy", "dh_T"), options)


def jax_chunks(which: str, inputs: Arrays, cotangents: Arrays, options: Options) -> Call | None:
    """decay_attention's chunked form in jax.numpy, under jit, and its derivative."""
    return _in_jax(which, _core_form, CORE, inputs, _jax(cotangents, "dy", "dS_T"), options)


def jax_retention(which: str, inputs: Arrays, cotangents: Arrays, options: Options) -> Call | None:
    """retention's chunked form in jax.numpy, under jit, and its derivative."""
    dys = _jax(cotangents, "dy", "dS_T")
    return _in_jax(which, _retention_form, RETENTION, inputs, dys, options)


def jax_ssd(which: str, inputs: Arrays, cotangents: Arrays, options: Options) -> Call | None:
    """mamba2_ssd's chunked form, its steps, D and gate in jax.numpy, and its derivative."""
    return _in_jax(which, _ssd_form, SSD, inputs, _jax(cotangents, "dy", "dh_T"), options)


def _in_torch(
    which: str, form: Callable[..., Any], names: tuple[str, ...], inputs: Arrays, dys: list,
    options: Options,
) -> Call:  # fmt: skip
    import torch

    arrays = dict(zip(names, _torch(inputs, *names), strict=True))
    cu = arrays.pop("cu_seqlens")
    at = _layout(cu.tolist(), lambda x: torch.from_numpy(x).to(cu.device))
    given = [n for n, x in arrays.items() if x is not None]
    language = _Language(torch, lambda x, dtype: x.to(dtype))

    def run(*args: Any) -> Any:
        return form(language, at, options, **dict(zip(given, args, strict=True)))

    args = [arrays[n] for n in given]
    return _compiled_form(which, run, args, args, dys)


def _in_jax(
    which: str, form: Callable[..., Any], names: tuple[str, ...], inputs: Arrays, dys: list,
    options: Options,
) -> Call:  # fmt: skip
    import jax
    import jax.numpy as jnp

    arrays = dict(zip(names, _jax(inputs, *names), strict=True))
    at = _layout(arrays.pop("cu_seqlens").tolist(), jnp.asarray)
    given = [n for n, x in arrays.items() if x is not None]
    language = _Language(jnp, lambda x, dtype: x.astype(dtype))

    def run(*args: Any) -> Any:
        return form(language, at, options, **dict(zip(given, args, strict=True)))

    args = [arrays[n] for n in given]
    if which == "fwd":
        return functools.partial(jax.jit(run), *args)
    return _jax_backward(run, args, dys)


class _Language(NamedTuple):
    xp: Any  # torch or jax.numpy
    to: Callable[[Any, Any], Any]  # an array in a dtype

    def f32(self, x: Any) -> Any:
        return self.to(x, self.xp.float32)

    def dot(self, equation: str, a: Any, b: Any) -> Any:
        """A product of 16-bit arrays: the framework adds in float32 and rounds once."""
        return self.f32(self.xp.einsum(equation, a, b))


class _Layout(NamedTuple):
    """Chunks of n tokens, in batches that know nothing of each other."""

    n: int
    batch: int
    rows: Any  # [chunks, n]: the token of every place; None where places are tokens
    live: Any  # [chunks, n, 1, 1]
    place: Any  # [T]: the place of every token
    own: Any  # [batch, chunks / batch, chunks / batch, 1, 1]: a later chunk of the same sequence
    sequence: Any  # [chunks]
    first: Any  # [chunks]: the first chunk of the same sequence
    last: Any  # [B]: the last chunk of every sequence
    empty: Any  # [B, 1, 1, 1]


def _layout(bounds: list[int], on: Callable[[np.ndarray], Any]) -> _Layout:
    """`on` puts an array where the others are."""
    lengths = np.diff(bounds)
    # short sequences are not filled up with much; the matrix from chunk to chunk stays small
    n = next(n for n, most in ((32, 256), (128, 8192), (256, math.inf)) if max(lengths) <= most)
    starts = [(s, t) for s, (a, b) in enumerate(itertools.pairwise(bounds)) for t in range(a, b, n)]
    sequence, begins = np.array(starts).T
    rows = begins[:, None] + np.arange(n)
    live = rows < np.array(bounds)[sequence + 1][:, None]
    place = np.zeros(bounds[-1], np.int64)
    place[rows[live]] = np.flatnonzero(live)
    regular = len(set(lengths)) == 1 and bool(live.all())
    batch = len(lengths) if regular else 1
    of = sequence.reshape(batch, -1)
    later = np.tril(np.ones((of.shape[1], of.shape[1]), bool), k=-1)
    own = later & (of[:, :, None] == of[:, None, :])
    first = np.searchsorted(sequence, sequence)
    last = np.maximum(np.searchsorted(sequence, np.arange(len(lengths)), side="right") - 1, 0)
    return _Layout(
        n,
        batch,
        None if regular else on(np.where(live, rows, 0)),
        on(live[:, :, None, None]),
        on(place),
        on(own[..., None, None]),
        on(sequence),
        on(first),
        on(last),
        on((lengths == 0)[:, None, None, None]),
    )


def _chunked(
    lang: _Language, at: _Layout, scale: float, q: Any, k: Any, v: Any, g: Any, u: Any, S0: Any
) -> tuple[Any, Any]:
    """(y [T, H, V] float32, S_T); g, u [T, H]."""
    xp, (T, H, V), (G, K) = lang.xp, v.shape, q.shape[1:]
    r, low = H // G, v.dtype

    def chunks(x: Any) -> Any:
        return x.reshape(-1, at.n, *x.shape[1:]) if at.rows is None else x[at.rows]

    q, k, v = chunks(q), chunks(k), chunks(v.reshape(T, G, r, V))
    g, u = (xp.where(at.live, chunks(x.reshape(T, G, r)), 0.0) for x in (g, u))
    # within chunks; heads first for the scores
    b = xp.cumsum(g, 1)
    bh, uh = (xp.moveaxis(x, 1, 3) for x in (b, u))
    seen = xp.tril(xp.ones_like(bh[0, 0, 0, :, None] + bh[0, 0, 0, None, :])) > 0
    weights = xp.exp(xp.where(seen, bh[..., :, None] - bh[..., None, :], -inf)) * uh[..., None, :]
    scores = lang.dot("cngk,cjgk->cgnj", q, k)[:, :, None]
    y = lang.dot("cgrnj,cjgrv->cngrv", lang.to(scale * scores * weights, low), v)
    # what every chunk adds to the state, and what enters each
    a = xp.exp(b[:, -1:] - b) * u
    new = lang.dot("cngrk,cngrv->cgrkv", lang.to(a[..., None] * k[:, :, :, None], low), v)
    whole = b[:, -1].reshape(at.batch, -1, G, r)
    until = xp.cumsum(whole, 1)
    since = until - whole
    carry = xp.exp(xp.where(at.own, since[:, :, None] - until[:, None], -inf))
    S = xp.einsum("bedgr,bdgrx->begrx", carry, new.reshape(at.batch, -1, G, r, K * V))
    S = S.reshape(-1, G, r, K, V)
    none = 0.0
    if S0 is not None:
        since = since.reshape(-1, G, r)
        fade = xp.exp(since - since[at.first])[..., None, None]
        none = S0.reshape(-1, G, r, K, V)
        S = S + fade * none[at.sequence]
        none = none.reshape(-1, H, K, V)
    y = y + scale * xp.exp(b)[..., None] * lang.dot("cngk,cgrkv->cngrv", q, lang.to(S, low))
    left = (xp.exp(b[:, -1])[..., None, None] * S + new).reshape(-1, H, K, V)
    y = y.reshape(-1, H, V)
    return (y if at.rows is None else y[at.place]), xp.where(at.empty, none, left[at.last])


def _core_form(
    lang: _Language, at: _Layout, options: Options, q: Any, k: Any, v: Any, g: Any, i: Any = None,
    S0: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
    xp, rows = lang.xp, v.shape[:2]
    g = xp.broadcast_to(g, rows)
    u = xp.ones_like(g) if i is None else xp.exp(i)
    y, S_T = _chunked(lang, at, options.get("scale", 1.0), q, k, v, g, u, S0)
    return lang.to(y, v.dtype), S_T


def _retention_form(
    lang: _Language, at: _Layout, options: Options, q: Any, k: Any, v: Any, S0: Any = None
) -> tuple[Any, Any]:
    zeros = 0 * lang.f32(v[:, :, 0])
    g = lang.xp.stack([zeros[:, h] + float(x) for h, x in enumerate(log_decays(v.shape[1]))], 1)
    scale = options.get("scale", q.shape[2] ** -0.5)
    y, S_T = _chunked(lang, at, scale, q, k, v, g, zeros + 1, S0)
    return lang.to(y, v.dtype), S_T


def _ssd_form(
    lang: _Language, at: _Layout, options: Options, x: Any, dt: Any, A: Any, B: Any, C: Any,
    D: Any = None, z: Any = None, dt_bias: Any = None, h0: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
    xp = lang.xp
    steps = _steps(xp, dt, dt_bias, options)
    S0 = None if h0 is None else xp.swapaxes(h0, 2, 3)
    y, S_T = _chunked(lang, at, 1.0, C, B, x, steps * A, steps, S0)
    if D is not None:
        y = y + (D if D.ndim == 2 else D[:, None]) * lang.f32(x)
    if z is not None:
        z = lang.f32(z)
        y = y * z / (1 + xp.exp(-z))
    return lang.to(y, x.dtype), xp.swapaxes(S_T, 2, 3)


def _steps(xp: Any, dt: Any, dt_bias: Any, options: Options) -> Any:
    """mamba2_ssd's dt'."""
    dt = dt if dt_bias is None else dt + dt_bias
    if options.get("dt_softplus"):
        dt = xp.where(dt > 0, dt, 0.0) + xp.log1p(xp.exp(-xp.abs(dt)))
    return xp.clip(dt, *options.get("dt_limit", (0.0, inf)))
