"""What a user would call instead of hybrid_attention: FlexAttention, and dense attention where the
mask is plain or there is room for it.

FlexAttention takes the mask as a function and skips blocks by a BlockMask, made once a batch like
our plan. The others return no lse that can be differentiated; they are marks, not peers.
"""

import functools
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
    _torch,
    _torch_form,
    _with_config,
)

BOUNDS = ("kv_start", "kv_end", "noise_id")


def flex_attention(which: str, inputs: Arrays, cotangents: Arrays, options: Options) -> Call | None:
    """torch's FlexAttention, compiled, at the quicker of its defaults and its own search."""
    import torch
    from torch.nn.attention import flex_attention as flex

    if frameworks.interpreted():
        return None
    q, k, v, alibi = _heads_first(inputs)
    at = _torch(inputs, "token_pos")[0]
    mask = _mask_of(inputs)
    tokens = q.shape[2]
    block_mask = functools.partial(
        torch.compile(flex.create_block_mask), mask, None, None, tokens, tokens, device=q.device
    )
    if which == "plan":
        return _with_config(block_mask, {"computes": "a BlockMask, compiled"})
    made, softcap = block_mask(), options.get("softcap", 0.0)

    def score(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        if softcap:
            s = softcap * torch.tanh(s / softcap)
        return s if alibi is None else s - alibi[h] * (at[i] - at[j]).abs()

    def attend(q: Any, k: Any, v: Any) -> tuple[Any, Any]:
        o, more = flex.flex_attention(
            q, k, v, block_mask=made, scale=options.get("scale"),
            score_mod=score if softcap or alibi is not None else None,
            enable_gqa=q.shape[1] != k.shape[1], return_aux=flex.AuxRequest(lse=True),
        )  # type: ignore[misc]  # fmt: skip
        return o[0].transpose(0, 1), more.lse[0]  # type: ignore[union-attr]

    dys = _torch(cotangents, "do", "dlse")
    call = _compiled_form(which, attend, [q, k, v], [q, k, v], dys)
    if which == "fwd":
        return call
    return _with_config(lambda: _tokens_first(call()), call.config)  # type: ignore[attr-defined]


def torch_sdpa(which: str, inputs: Arrays, cotangents: Arrays, options: Options) -> Call | None:
    """scaled_dot_product_attention with a dense mask for every sequence, one after another."""
    import torch

    if which == "plan" or options or "alibi" in inputs:
        return None
    q, k, v, _ = _heads_first(inputs)
    seen = _mask_of(inputs)
    cu = [int(x) for x in _torch(inputs, "cu_seqlens")[0]]
    spans = [(a, b) for a, b in itertools.pairwise(cu) if b > a]
    if max(b - a for a, b in spans) > 16384:
        return None  # a gigabyte of mask
    masks = []
    for a, b in spans:
        i = torch.arange(a, b, device=q.device)
        masks.append(seen(0, 0, i[:, None], i[None, :])[None, None])

    def attend(q: Any, k: Any, v: Any) -> Any:
        parts = [
            torch.nn.functional.scaled_dot_product_attention(
                q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], attn_mask=mask,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            for (a, b), mask in zip(spans, masks, strict=True)
        ]  # fmt: skip
        unused = q.new_zeros(1, q.shape[1], q.shape[2] - spans[-1][1], q.shape[3])
        return torch.cat([*parts, unused], dim=2)[0].transpose(0, 1)

    dys = _torch(cotangents, "do")
    call = _torch_form(which, attend, [q, k, v], [q, k, v], dys)
    return _with_config(call, {"computes": "no lse"})


def cudnn_attention(
    which: str, inputs: Arrays, cotangents: Arrays, options: Options
) -> Call | None:
    """cuDNN's attention through torch, where the mask is plainly causal or there is none."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kind = _dense(inputs)
    if which == "plan" or options or "alibi" in inputs or kind is None or frameworks.interpreted():
        return None
    q, k, v, _ = _heads_first(inputs)

    def attend(q: Any, k: Any, v: Any) -> Any:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            o = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=kind == "causal", enable_gqa=q.shape[1] != k.shape[1]
            )
        return o[0].transpose(0, 1)

    dys = _torch(cotangents, "do")
    call = _torch_form(which, attend, [q, k, v], [q, k, v], dys)
    return _with_config(call, {"computes": f"{kind}, no lse"})


def jax_cudnn_attention(
    which: str, inputs: Arrays, cotangents: Arrays, options: Options
) -> Call | None:
    """cuDNN's attention through jax.nn, where the mask is plainly causal or there is none."""
    import jax

    kind = _dense(inputs)
    if which == "plan" or options or "alibi" in inputs or kind is None or frameworks.interpreted():
        return None
    q, k, v = _jax(inputs, "q", "k", "v")
    (do,) = _jax(cotangents, "do")

    def attend(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=kind == "causal", implementation="cudnn"
        )

    if which == "fwd":
        call = functools.partial(jax.jit(attend), q, k, v)
    else:
        call = _jax_backward(attend, [q, k, v], [do])
    return _with_config(call, {"computes": f"{kind}, no lse"})


def _heads_first(inputs: Arrays) -> tuple[Any, Any, Any, Any]:
    """q, k, v as views [1, heads, T, D], and the slopes."""
    q, k, v, alibi = _torch(inputs, "q", "k", "v", "alibi")
    return (*(x.transpose(0, 1)[None] for x in (q, k, v)), alibi)  # type: ignore[return-value]


def _tokens_first(grads: Any) -> tuple[Any, ...]:
    return tuple(g[0].transpose(0, 1) for g in grads)


def _mask_of(inputs: Arrays) -> Any:
    """The mask as FlexAttention wants it: a function of numbers of a query and a key."""
    start, end, noise = _torch(inputs, *BOUNDS)

    def seen(b: Any, h: Any, i: Any, j: Any) -> Any:
        own = (noise[j] < 0) | (noise[j] == noise[i])
        return (j >= start[i]) & (j < end[i]) & own

    return seen


def _dense(inputs: Arrays) -> str | None:
    """causal or full for one sequence of one segment without a window; None for others."""
    import torch

    start, end, noise = _torch(inputs, *BOUNDS)
    if bool((start != 0).any()) or bool((noise >= 0).any()):
        return None
    if bool((end == end.numel()).all()):
        return "full"
    after = torch.arange(1, end.numel() + 1, device=end.device)
    return "causal" if bool((end == after).all()) else None
