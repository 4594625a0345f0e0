"""What a user would call instead of our kernels, each in its best honest form.

Every peer is `peer(which, inputs, cotangents, options) -> call or None`: which is "fwd" or "bwd";
inputs and cotangents are the harness' arrays by name, options the workload's. The call takes
nothing and returns the outputs (or gradients) in the order of the problem. Everything that a user
does once (conversion, compilation, a backward's forward) has happened before. None: this peer is
not installed, or does not offer that pass.

A call may carry `config`, a dict that says in which form the peer was called.
"""

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from parity import frameworks

Call = Callable[[], Any]
Arrays = Mapping[str, Any]
Options = Mapping[str, Any]


# matmul


def cublas_matmul(which: str, inputs: Arrays, cotangents: Arrays, options: Options) -> Call | None:
    """torch's product, which is cuBLAS; the backward is two of them, on transposed views."""
    import torch

    a, b = _torch(inputs, "a", "b")
    if which == "fwd":
        out_dtype = options.get("out_dtype")
        if out_dtype in (None, "bfloat16", "float16"):
            return lambda: torch.mm(a, b)
        if not a.is_cuda:
            return lambda: torch.mm(a.float(), b.float())
        return lambda: torch.mm(a, b, out_dtype=getattr(torch, out_dtype))
    dc = _torch(cotangents, "dc")[0].to(a.dtype)
    return lambda: (torch.mm(dc, b.T), torch.mm(a.T, dc))


def jax_matmul(which: str, inputs: Arrays, cotangents: Arrays, options: Options) -> Call | None:
    """jnp.matmul under jit: XLA chooses between cuBLAS and its own kernels."""
    import jax
    import jax.numpy as jnp

    a, b = _jax(inputs, "a", "b")
    if which == "fwd":
        out_dtype = options.get("out_dtype")
        product = functools.partial(jnp.matmul, preferred_element_type=out_dtype)
        return functools.partial(jax.jit(product), a, b)
    dc = _jax(cotangents, "dc")[0].astype(a.dtype)
    grads = jax.jit(lambda a, b, dc: (jnp.matmul(dc, b.T), jnp.matmul(a.T, dc)))
    return functools.partial(grads, a, b, dc)


def jax_mosaic_matmul(
    which: str, inputs: Arrays, cotangents: Arrays, options: Options
) -> Call | None:
    """The Hopper example in JAX's wheel, at the quickest of some of its own search's settings.

    It has no backward: it reads neither operand transposed.
    """
    if which != "fwd" or options.get("out_dtype") or frameworks.interpreted():
        return None
    try:
        from jax.experimental.pallas.ops.gpu import hopper_matmul_mgpu as example
    except ImportError:
        return None
    import jax

    a, b = _jax(inputs, "a", "b")
    dims = example.MatmulDimension
    # 128 x 256 for two warpgroups, in each of the ways to split and to visit it
    settings = [
        {"wg_dimension": wg, "grid_minor_dim": minor, "grid_tile_width": 8, "cluster_dimension": c}
        for wg, minor, c in (
            (dims.N, dims.N, None),
            (dims.N, dims.M, None),
            (dims.M, dims.N, None),
            (dims.N, dims.N, dims.M),
        )
    ]
    forms = []
    for setting in settings:
        tile_n = 128 if setting["wg_dimension"] == dims.N else 256
        tile_m = 128 if setting["wg_dimension"] == dims.N else 64
        config = example.TuningConfig(
            tile_m=tile_m, tile_n=tile_n, tile_k=64, max_concurrent_steps=4, **setting
        )
        product = jax.jit(functools.partial(example.matmul, c=None, config=config))
        shown = {"tile_m": tile_m, "tile_n": tile_n} | {k: str(v) for k, v in setting.items()}
        forms.append((shown, lambda product=product: functools.partial(product, a, b)))
    return _quickest(forms)


# softmax


def torch_softmax(which: str, inputs: Arrays, cotangents: Arrays, options: Options) -> Call | None:
    """torch.softmax as it is, one operation at a time."""
    return _torch_form(which, *_softmax_in_torch(inputs, cotangents, options, fused=False))


def compiled_softmax(
    which: str, inputs: Arrays, cotangents: Arrays, options: Options
) -> Call | None:
    """torch.compile of torch.softmax."""
    return _compiled_form(which, *_softmax_in_torch(inputs, cotangents, options, fused=True))


def _softmax_in_torch(
    inputs: Arrays, cotangents: Arrays, options: Options, *, fused: bool
) -> tuple:
    """A causal mask is computed where it is used if that is `fused`, and beforehand if not."""
    import torch

    x, mask = _torch(inputs, "x", "mask")
    scale, offset = options.get("scale", 1.0), options.get("causal_offset")

    def kept() -> Any:
        if offset is None:
            return mask
        rows, columns = (torch.arange(n, device=x.device) for n in x.shape)
        causal = columns <= rows[:, None] + offset
        return causal if mask is None else mask & causal

    before = None if fused else kept()

    def softmax(x: Any) -> tuple[Any]:
        s = x if scale == 1 else x * scale
        keep = kept() if fused else before
        return (torch.softmax(s if keep is None else s.masked_fill(~keep, -torch.inf), dim=-1),)

    return softmax, [x], [x], _torch(cotangents, "dy")


def jax_softmax(which: str, inputs: Arrays, cotangents: Arrays, options: Options) -> Call | None:
    """jax.nn.softmax under jit."""
    import jax
    import jax.numpy as jnp

    x, mask = _jax(inputs, "x", "mask")
    scale, offset = options.get("scale", 1.0), options.get("causal_offset")

    def softmax(x: Any, mask: Any) -> tuple[Any]:
        if offset is not None:
            rows, columns = map(jnp.arange, x.shape)
            causal = columns <= rows[:, None] + offset
            mask = causal if mask is None else mask & causal
        return (jax.nn.softmax(x if scale == 1 else x * scale, where=mask),)

    if which == "fwd":
        return functools.partial(jax.jit(softmax), x, mask)
    return _jax_backward(lambda x: softmax(x, mask), [x], _jax(cotangents, "dy"))


# rms_norm


def compiled_rms_norm(
    which: str, inputs: Arrays, cotangents: Arrays, options: Options
) -> Call | None:
    """torch.compile of the lines one finds in a model."""
    import torch

    eps, w_offset = options.get("eps", 1e-6), options.get("w_offset", 0.0)
    cast = options.get("cast_before_weight", False)
    x, w, residual = _torch(inputs, "x", "w", "residual")

    def rms_norm(x: Any, w: Any, residual: Any = None) -> tuple[Any, ...]:
        h = x if residual is None else x + residual
        h32 = h.float()
        xh = h32 * torch.rsqrt(h32.square().mean(-1, keepdim=True) + eps)
        y = ((xh.to(x.dtype) if cast else xh) * (w.float() + w_offset)).to(x.dtype)
        return (y,) if residual is None else (y, h)

    args = [x, w] if residual is None else [x, w, residual]
    return _compiled_form(which, rms_norm, args, [x, w], _torch(cotangents, "dy", "dh"))


def liger_rms_norm(which: str, inputs: Arrays, cotangents: Arrays, options: Options) -> Call | None:
    """Liger's Triton kernels, fused with the residual where there is one.

    The backward works in place, as Liger does by default: on copies of our cotangents, because it
    overwrites them.
    """
    if frameworks.interpreted():
        return None
    try:
        plain = importlib.import_module("liger_kernel.ops.rms_norm")
        fused = importlib.import_module("liger_kernel.ops.fused_add_rms_norm")
    except ImportError:
        return None
    mode = "llama" if options.get("cast_before_weight") else "gemma"
    eps, w_offset = options.get("eps", 1e-6), options.get("w_offset", 0.0)
    x, w, residual = _torch(inputs, "x", "w", "residual")

    def rms_norm(x: Any, w: Any, residual: Any = None) -> tuple[Any, ...]:
        if residual is None:
            return (plain.LigerRMSNormFunction.apply(x, w, eps, w_offset, mode, True),)
        apply = fused.LigerFusedAddRMSNormFunction.apply
        return apply(x, residual, w, eps, w_offset, mode, True)

    args = [x, w] if residual is None else [x, w, residual]
    dys = [dy.clone() for dy in _torch(cotangents, "dy", "dh") if dy is not None]
    call = _torch_form(which, rms_norm, args, [x, w], dys)
    return _with_config(call, {"casting_mode": mode, "in_place": True})


def jax_rms_norm(which: str, inputs: Arrays, cotangents: Arrays, options: Options) -> Call | None:
    """The same lines in jax.numpy, under jit."""
    import jax
    import jax.numpy as jnp

    eps, w_offset = options.get("eps", 1e-6), options.get("w_offset", 0.0)
    cast = options.get("cast_before_weight", False)
    x, w, residual = _jax(inputs, "x", "w", "residual")

    def rms_norm(x: Any, w: Any, residual: Any) -> tuple[Any, ...]:
        h = x if residual is None else x + residual
        h32 = h.astype(jnp.float32)
        xh = h32 * jax.lax.rsqrt(jnp.mean(h32 * h32, axis=-1, keepdims=True) + eps)
        weight = w.astype(jnp.float32) + w_offset
        y = ((xh.astype(x.dtype) if cast else xh) * weight).astype(x.dtype)
        return (y,) if residual is None else (y, h)

    if which == "fwd":
        return functools.partial(jax.jit(rms_norm), x, w, residual)
    return _jax_backward(
        lambda x, w: rms_norm(x, w, residual), [x, w], _jax(cotangents, "dy", "dh")
    )


# moe_gemm


def torch_grouped_mm(
    which: str, inputs: Arrays, cotangents: Arrays, options: Options
) -> Call | None:
    """torch._grouped_mm; the fused forms are what a user writes around it, compiled.

    Rows past the end, which it leaves unwritten, are set to zero where there are any. It wants
    rows that start at multiples of 16 bytes, and gives its operands' dtype only.
    """
    import torch

    x, w, sizes, rows, bias, row_scale = _torch(
        inputs, "x", "w", "sizes", "rows", "bias", "row_scale"
    )
    if options.get("out_dtype") or any(t.stride(-2) * t.element_size() % 16 for t in (x, w)):
        return None
    (dy,) = _torch(cotangents, "dy")
    ends = sizes.cumsum(0, dtype=torch.int32)
    end = int(ends[-1])
    w = w.transpose(1, 2) if options.get("transpose_w") else w

    def grouped(x: Any, w: Any) -> Any:
        y = torch._grouped_mm(x, w, offs=ends)
        if end < y.shape[0]:
            y[end:] = 0
        return y

    def weights(x: Any, dy: Any) -> Any:
        dw = torch._grouped_mm(x.t(), dy, offs=ends)
        return dw.transpose(1, 2) if options.get("transpose_w") else dw

    plain = all(t is None for t in (rows, bias, row_scale)) and not options.get("activation")
    if plain:
        return {
            "fwd": lambda: grouped(x, w),
            "bwd": lambda: (grouped(dy, w.transpose(1, 2)), weights(x, dy)),
            "dw": lambda: weights(x, dy),
        }[which]
    if bias is not None or row_scale is not None or end < (x if rows is None else rows).shape[0]:
        return None  # no model has these by themselves

    def fused(x: Any, w: Any) -> tuple[Any]:
        h = torch._grouped_mm(x if rows is None else x[rows], w, offs=ends)
        if options.get("activation"):
            h = torch.nn.functional.silu(h[:, 0::2]) * h[:, 1::2]
        return (h,)

    return _compiled_form(which, fused, [x, w], [x, w], [dy])


def cublas_dense(which: str, inputs: Arrays, cotangents: Arrays, options: Options) -> Call | None:
    """One dense product of equal FLOPs: what cuBLAS makes of these rows if all have one expert.

    Not for a few rows an expert: there the bytes of the weights decide, and it reads one expert's.
    """
    import torch

    x, w, rows = _torch(inputs, "x", "w", "rows")
    if rows is not None or options or x.shape[0] < 64 * w.shape[0]:
        return None
    (dy,) = _torch(cotangents, "dy")
    call = {
        "fwd": lambda: torch.mm(x, w[0]),
        "bwd": lambda: (torch.mm(dy, w[0].t()), torch.mm(x.t(), dy)),
        "dw": lambda: torch.mm(x.t(), dy),
    }[which]
    return _with_config(call, {"computes": "one dense product of equal FLOPs"})


def jax_ragged_dot(which: str, inputs: Arrays, cotangents: Arrays, options: Options) -> Call | None:
    """jax.lax.ragged_dot under jit, and its own gradients."""
    import jax.numpy as jnp

    if {"rows", "bias", "row_scale"} & inputs.keys() or options.get("activation"):
        return None
    x, w, sizes = _jax(inputs, "x", "w", "sizes")
    (dy,) = _jax(cotangents, "dy")
    transposed, out_dtype = options.get("transpose_w", False), options.get("out_dtype")
    fwd, of_both, of_w = _ragged_passes(transposed, out_dtype)
    if which == "fwd":
        return functools.partial(fwd, x, w, sizes)
    if (end := int(sizes.sum())) < x.shape[0]:  # its gradients read dead rows
        x, dy = x.at[end:].set(0), dy.at[end:].set(0)
    if which == "bwd":
        return _pulled(of_both, [x, w], [dy], [sizes])
    if transposed or jnp.dtype(out_dtype or x.dtype) != x.dtype:
        return None
    return _pulled(of_w, [w], [dy], [x, sizes])


@functools.cache  # one compilation for all routings
def _ragged_passes(transposed: bool, out_dtype: str | None) -> tuple[Callable, tuple, tuple]:
    """The product under jit, and what its gradients need: of x and w, of w alone."""
    import jax

    def product(x: Any, w: Any, sizes: Any) -> tuple[Any]:
        w = w.swapaxes(1, 2) if transposed else w
        return (jax.lax.ragged_dot(x, w, sizes, preferred_element_type=out_dtype),)

    of_w = _jax_passes(lambda w, x, sizes: product(x, w, sizes))
    return jax.jit(product), _jax_passes(product), of_w


def jax_mosaic_ragged_dot(
    which: str, inputs: Arrays, cotangents: Arrays, options: Options
) -> Call | None:
    """The Mosaic GPU examples in JAX's wheel, at the quickest of some of their searches' settings.

    ragged_dot makes y and dx, transposed_ragged_dot dw.
    """
    if frameworks.interpreted() or options or {"rows", "bias", "row_scale"} & inputs.keys():
        return None
    try:
        _mosaic_rows()
    except ImportError:
        return None
    x, w, sizes = _jax(inputs, "x", "w", "sizes")
    (dy,) = _jax(cotangents, "dy")
    common = {"block_k": 64, "max_concurrent_steps": 4}
    settings = [
        common | {"block_m": m, "block_n": n, "grid_block_n": g}
        for m, n, g in ((128, 128, 8), (128, 128, 1), (64, 128, 8), (64, 64, 8))
    ]

    def best(make: Callable[..., Any], *args: Any) -> Call:
        return _quickest([(s, lambda s=s: functools.partial(make(**s), *args)) for s in settings])

    if which == "fwd":
        return best(_mosaic_rows, x, w, sizes)
    dw = best(_mosaic_weights, x, dy, sizes)
    if which == "dw":
        return dw
    dx = best(functools.partial(_mosaic_rows, transpose_rhs=True), dy, w, sizes)
    parts = {"dx": dx.config, "dw": dw.config}  # type: ignore[attr-defined]
    return _with_config(lambda: (dx(), dw()), parts)


@functools.cache  # one compilation for all routings
def _mosaic_rows(**setting: Any) -> Callable[..., Any]:
    import jax
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

    return jax.jit(lambda x, w, sizes: ragged_dot(x, w, group_sizes=sizes, **setting))


@functools.cache
def _mosaic_weights(**setting: Any) -> Callable[..., Any]:
    import jax
    from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import transposed_ragged_dot

    return jax.jit(lambda x, dy, sizes: transposed_ragged_dot(x, dy, group_sizes=sizes, **setting))


# the forms


def _torch(arrays: Arrays, *names: str) -> list[Any]:
    """The named arrays as torch tensors on the same memory; None for one that is absent."""
    twin = frameworks.twin("triton")
    return [twin.native(arrays.get(name)) for name in names]


def _jax(arrays: Arrays, *names: str) -> list[Any]:
    twin = frameworks.twin("pallas")
    return [twin.native(arrays.get(name)) for name in names]


def _torch_form(which: str, fn: Callable, args: list, wanted: list, cotangents: list) -> Call:
    """fn on args without autograd; or only the backward, for the arguments in `wanted`.

    The graph is kept, and gradients are returned, not added to anything.
    """
    import torch

    if which == "fwd":

        def forward() -> Any:
            with torch.no_grad():
                return fn(*args)

        return forward
    # leaves of our own on the same memory
    leaf = {id(x): x.detach().requires_grad_() for x in wanted}
    with torch.enable_grad():
        outs = fn(*[leaf.get(id(x), x) for x in args])
    leaves, dys = [leaf[id(x)] for x in wanted], [dy for dy in cotangents if dy is not None]
    return lambda: torch.autograd.grad(outs, leaves, dys, retain_graph=True)


def _compiled_form(which: str, fn: Callable, args: list, wanted: list, cotangents: list) -> Call:
    """The quicker of torch.compile's default and its search without CUDA graphs."""
    import torch
    import torch._dynamo
    import torch._functorch.config

    def form(mode: str) -> Call:
        torch._dynamo.reset()
        # A donated buffer could serve one backward only, and the graph is kept for many.
        with torch._functorch.config.patch(donated_buffer=False):
            compiled = torch.compile(fn, mode=mode, fullgraph=True, dynamic=False)
            call = _torch_form(which, compiled, args, wanted, cotangents)
            call()  # compiles the backward too
        return call

    modes = ("default", "max-autotune-no-cudagraphs")
    return _quickest([({"mode": mode}, functools.partial(form, mode)) for mode in modes])


def _jax_backward(fn: Callable, wanted: list, cotangents: list) -> Call:
    """Only the backward of fn: what its forward keeps is computed here, once."""
    return _pulled(_jax_passes(fn), wanted, cotangents)


def _jax_passes(fn: Callable) -> tuple[Callable, Callable]:
    """(forward of `wanted` and constants: outputs and pull; backward of pull and cotangents)."""
    import jax

    def forward(wanted: list, constants: Sequence[Any]) -> Any:
        return jax.vjp(lambda *xs: fn(*xs, *constants), *wanted)

    return jax.jit(forward), jax.jit(lambda pull, dys: pull(dys))


def _pulled(
    passes: tuple[Callable, Callable], wanted: list, cotangents: list, constants: Sequence[Any] = ()
) -> Call:
    forward, backward = passes
    outs, pull = forward(wanted, constants)
    del outs
    return functools.partial(backward, pull, tuple(dy for dy in cotangents if dy is not None))


def _with_config(call: Call, config: Mapping[str, Any]) -> Call:
    def configured() -> Any:
        return call()

    configured.config = dict(config)  # type: ignore[attr-defined]
    return configured


def _quickest(forms: Sequence[tuple[dict[str, Any], Callable[[], Call]]]) -> Call:
    """The quickest of some forms of one peer, by the ruler itself; forms that fail drop out."""
    made: list[Call] = []
    failed: Exception | None = None
    for config, make in forms:
        try:
            call = make()
            call()
        except Exception as e:  # a setting that these sizes cannot take
            failed = e
            continue
        made.append(_with_config(call, config))
    if not made:
        raise RuntimeError("no form of this peer ran") from failed
    if len(made) == 1 or frameworks.interpreted():
        return made[0]
    from parity import timing
    from parity.frameworks import tracer

    timings = timing.measure({str(i): call for i, call in enumerate(made)}, tracer.cold, rounds=4)
    return min(enumerate(made), key=lambda form: timings[str(form[0])].us.p50)[1]
