"""What a user would call instead of the quantizers and the rotation: the lines of their definition,
under torch.compile. Rounding is the compiler's: a code at a tie may be its neighbour."""

from collections.abc import Callable
from typing import Any

from parity.peers import Arrays, Call, Options, _compiled_form, _torch

Lines = Callable[..., tuple[Any, ...]]


def compiled_int8(which: str, inputs: Arrays, cotangents: Arrays, options: Options) -> Call | None:
    """int8_quantize."""
    (x,) = _torch(inputs, "x")
    group = options.get("group")

    def quantize(x: Any) -> tuple[Any, Any]:
        values = x if group is None else x.unflatten(1, (-1, group))
        q, scale = _int8(values)
        return q.view(x.shape), scale

    return _compiled(quantize, x)


def compiled_fp8(which: str, inputs: Arrays, cotangents: Arrays, options: Options) -> Call | None:
    """fp8_quantize_rows, _blocks and _cols."""
    import torch

    (x,) = _torch(inputs, "x")
    M = x.shape[0]
    share_m, share_n = {"fwd": (1, 128), "blocks": (128, 128), "cols": (128, 1)}[which]

    def quantize(x: Any) -> tuple[Any, Any]:
        rows = torch.nn.functional.pad(x, (0, 0, 0, -M % share_m))
        tiles = rows.unflatten(0, (-1, share_m)).unflatten(2, (-1, share_n)).float()
        scale = _e4m3_scale(tiles.abs().amax((1, 3)))
        q = (tiles * (1 / scale)[:, None, :, None]).to(torch.float8_e4m3fn)
        q = q.view(rows.shape)[:M]
        if which == "fwd" and options.get("transposed"):
            beyond = (0, 0, 0, -M % 4)
            scale = torch.nn.functional.pad(scale, beyond, value=1e-4 / 448).t().contiguous()
        return q, scale

    return _compiled(quantize, x)


def torch_hadamard(which: str, inputs: Arrays, cotangents: Arrays, options: Options) -> Call | None:
    """hadamard_rotate as a product with the signed matrix, which is cuBLAS', and the rest fused."""
    import torch

    x, signs = _torch(inputs, "x", "signs")
    (dy,) = _torch(cotangents, "dy")
    n, factor = x.shape[1], x.shape[1] ** -0.5
    matrix = torch.ones((1, 1), device=x.device, dtype=x.dtype)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    inverse = options.get("inverse", False) != (which == "bwd")
    matrix = matrix * signs.to(x.dtype) if inverse else matrix * signs.to(x.dtype)[:, None]

    def rotate(x: Any) -> tuple[Any, ...]:
        y = (torch.mm(x, matrix).float() * factor).to(x.dtype)
        if which == "int8":
            return _int8(y)
        if which == "e4m3":
            scale = _e4m3_scale(y.float().abs().amax(1))
            return (y.float() * (1 / scale)[:, None]).to(torch.float8_e4m3fn), scale
        return (y,)

    return _compiled(rotate, dy if which == "bwd" else x)


def _compiled(lines: Lines, x: Any) -> Call:
    return _compiled_form("fwd", lines, [x], [], [])


def _int8(x: Any) -> tuple[Any, Any]:
    """(codes, scale), a scale for the last dimension."""
    import torch

    values = x.float()
    scale = values.abs().amax(-1) / 127
    scale = torch.where(scale == 0, 1.0, scale)
    return (values / scale[..., None]).round().clamp(-127, 127).to(torch.int8), scale


def _e4m3_scale(top: Any) -> Any:
    return top.clamp(min=1e-4) / 448
