"""What a user would call instead of int4_matmul: the same weights in 16 bits, torch's own W4A16,
and the Triton kernels of gemlite and conch where they are installed.

Weights are unpacked, rounded or put into the peer's order once, before any call.
"""

import functools
from typing import Any

from parity import frameworks
from parity.peers import Arrays, Call, Options, _quickest, _torch


def cublas_bf16(which: str, inputs: Arrays, cotangents: Arrays, options: Options) -> Call | None:
    """torch's product with weights of 16 bits, which is cuBLAS: four times the bytes."""
    import torch

    if which not in ("fwd", "bwd"):
        return None
    w = _weights(inputs, options["group"])
    if which == "fwd":
        x, bias = _torch(inputs, "x", "bias")
        return lambda: torch.nn.functional.linear(x, w, bias)
    (dy,) = _torch(cotangents, "dy")
    return lambda: (torch.mm(dy, w),)


def torch_int4pack(which: str, inputs: Arrays, cotangents: Arrays, options: Options) -> Call | None:
    """torch's int4 product (tinygemm), at the quickest of its three orders of weights.

    It takes bfloat16 alone, W = (q - 8) * scale + offset, and has no backward.
    """
    import torch

    x, w_scale, bias = _torch(inputs, "x", "w_scale", "bias")
    if which != "fwd" or frameworks.interpreted() or x.dtype != torch.bfloat16:
        return None
    group, (N, K) = options["group"], (_rows(inputs), x.shape[1])
    if N % 8 or K % 128:
        return None
    code, zero = _codes(inputs, group)
    scale = w_scale if _prepacked(inputs) else w_scale.T  # [K / G, N]
    offset = torch.zeros_like(scale) if zero is None else (8 - zero.T) * scale
    values = torch.stack((scale, offset.to(scale.dtype)), dim=2).contiguous()
    pairs = code[:, 0::2] << 4 | code[:, 1::2]
    forms = []
    for tiles in (2, 4, 8):
        ordered = torch._convert_weight_to_int4pack(pairs, tiles)

        def call(ordered: Any = ordered) -> Any:
            y = torch._weight_int4pack_mm(x, ordered, group, values)
            return y if bias is None else y + bias

        forms.append(({"inner_k_tiles": tiles}, lambda call=call: call))
    return _quickest(forms)


def gemlite(which: str, inputs: Arrays, cotangents: Arrays, options: Options) -> Call | None:
    """gemlite's product, which searches its settings in the first call; with codes in words of 32
    bits, its default, or of 8, which it advises for data centers.

    Where there are zero points it keeps -zero * scale, rounded. It has no backward. The calls are
    those of gemlite 0.6.0.
    """
    if which != "fwd" or frameworks.interpreted():
        return None
    try:
        from gemlite import DType, GemLiteLinear  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    import torch

    group, (code, zero) = options["group"], _codes(inputs, options["group"])
    x, w_scale, bias = _torch(inputs, "x", "w_scale", "bias")
    scale = w_scale.T.contiguous() if _prepacked(inputs) else w_scale  # [N, K / G]
    dtype = DType.BF16 if x.dtype == torch.bfloat16 else DType.FP16
    (N, K), shift = code.shape, 8 if zero is None else zero.to(x.dtype).contiguous()

    def form(bits: int) -> Call:
        layer = GemLiteLinear(
            4, group_size=group, in_features=K, out_features=N,
            input_dtype=dtype, output_dtype=dtype,
        )  # fmt: skip
        layer.pack(code, scale, shift, bias=bias, packing_bitwidth=bits)
        return lambda: layer(x)

    return _quickest([({"word": bits}, functools.partial(form, bits)) for bits in (32, 8)])


def conch(which: str, inputs: Arrays, cotangents: Arrays, options: Options) -> Call | None:
    """conch's product, on words in GPTQ's order. It has neither a bias nor a backward, and reads
    whole tiles of 64 by 64, each in one group. The calls are those of conch 1.3.
    """
    if which != "fwd" or frameworks.interpreted():
        return None
    try:
        from conch.ops.quantization import gemm  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    import torch

    group, (code, zero) = options["group"], _codes(inputs, options["group"])
    x, w_scale, bias = _torch(inputs, "x", "w_scale", "bias")
    N, K = code.shape
    if N % 64 or K % 64 or group % 64:
        return None
    words = torch.zeros((N, K // 8), dtype=torch.int32, device=code.device)
    for i in range(8):
        words |= code[:, i::8].to(torch.int32) << 4 * i
    words = words.T.contiguous()  # [K / 8, N]
    scale = w_scale if _prepacked(inputs) else w_scale.T.contiguous()  # [K / G, N]
    zero = None if zero is None else zero.T.contiguous().to(torch.int32)
    taken_off = 8 if zero is None else 0

    def call() -> Any:
        y = gemm.mixed_precision_gemm(x, words, scale, zero, 4, taken_off, group)
        return y if bias is None else y + bias

    return call


def _prepacked(inputs: Arrays) -> bool:
    return len(inputs["w_packed"].shape) == 3


def _rows(inputs: Arrays) -> int:
    return inputs["w_packed"].shape[1 if _prepacked(inputs) else 0]


def _codes(inputs: Arrays, group: int) -> tuple[Any, Any]:
    """q uint8 [N, K] and z [N, K / G], or None: those of parity.problems.int4_matmul."""
    import torch

    packed, zero = _torch(inputs, "w_packed", "w_zero")
    K = inputs["x"].shape[1]
    if not _prepacked(inputs):
        code = torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)
        if zero is not None:
            zero = torch.stack((zero & 15, zero >> 4), dim=2).flatten(1)[:, : K // group]
        return code, zero
    blocks, N, words = packed.shape
    code = torch.empty((N, blocks, 4, words), dtype=torch.uint8, device=packed.device)
    for i in range(4):
        code[:, :, i] = (packed >> 4 * i & 15).transpose(0, 1)
    return code.flatten(1)[:, :K].contiguous(), None if zero is None else zero.T


def _weights(inputs: Arrays, group: int) -> Any:
    """W [N, K] in x's dtype."""
    code, zero = _codes(inputs, group)
    x, scale = _torch(inputs, "x", "w_scale")
    scale = scale.T if _prepacked(inputs) else scale  # [N, K / G]
    w = code.new_empty(code.shape, dtype=x.dtype)
    for rows in (slice(n, n + 1024) for n in range(0, len(w), 1024)):  # float32 is 8 times the size
        steps = code[rows].float().unflatten(1, (-1, group))
        steps = steps - (8 if zero is None else zero[rows, :, None].float())
        w[rows] = (steps * scale[rows, :, None].float()).flatten(1).to(x.dtype)
    return w
