"""The Triton half of the compile gate: launchers on meta tensors under the compile-only driver.

Runs in a process of its own without the interpreter:
`from parity.frameworks.compile_triton import main; main(cache)`.
"""

import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch

from parity.frameworks import Kernel, triton_compile_only
from parity.frameworks.compile_worker import (
    Configs,
    Request,
    Row,
    failure,
    serve,
)
from parity.frameworks.torch import load


def main(cache: str) -> None:
    """`cache` is the folder for listings."""
    with tempfile.TemporaryDirectory() as compiled:
        gate = triton_compile_only.install(Path(compiled), Path(cache))
        serve(lambda request: compile_one(gate, request))


def compile_one(gate: triton_compile_only.CompileOnly, request: Request) -> list[Row]:
    """Rows of both passes of one request: every kernel that each call launches."""
    kernel = load(request["implementation"])
    configs = Configs(kernel.public, request["config"])
    inputs = [_argument(kernel, d) for d in request["inputs"]]
    by_keyword = {name: _meta(d) for name, d in request["keywords"].items()}
    cotangents = [_meta(d) for d in request["cotangents"]]
    # asked for the backward alone, a Config is the backward's
    keywords = configs.keywords if "fwd" in request["passes"] else {}
    rows: list[Row] = []
    res: Any = None

    def forward() -> None:
        nonlocal res
        _, res = kernel.fwd(*inputs, **request["options"], **by_keyword, **keywords)

    def backward() -> None:
        kernel.bwd(res, *cotangents, **request["bwd_options"], **configs.keywords)

    fails = False
    if {"fwd", "bwd"} & {*request["passes"]}:
        forward_rows, fails = _call(gate, request, "fwd", configs, forward)
        rows += forward_rows if "fwd" in request["passes"] else []
    if "bwd" in request["passes"]:
        if fails:
            rows.append(failure("bwd", request, "not compiled: the forward fails"))
        else:
            rows += _call(gate, request, "bwd", configs, backward)[0]
    for which, further in request["further"].items():
        if which in request["passes"]:
            function = kernel.beside[further["function"]]
            args = [_argument(kernel, d) for d in further["inputs"]]
            call = functools.partial(function, *args, **further["options"], **configs.keywords)
            rows += _call(gate, request, which, configs, call)[0]
    return rows


def _call(
    gate: triton_compile_only.CompileOnly,
    request: Request,
    which: str,
    configs: Configs,
    call: Callable[[], None],
) -> tuple[list[Row], bool]:
    error: str | Exception | None = None
    gate.config = configs.latest
    with configs, gate.record() as launched:
        try:
            call()
        except Exception as raised:
            error = raised
    rows = [row | {"pass": which} for row in launched]
    if error is None and not rows:
        error = "launched no Triton kernel"
    if error is not None:
        known = {"config": configs.latest()} | gate.unloaded
        rows.append(failure(which, request, error, **known))
    return rows, error is not None


def _argument(kernel: Kernel, described: Any) -> Any:
    """An array, None, or a bundle of some."""
    if described is None or isinstance(described, list):
        return described and _meta(described)
    parts = (None if d is None else _meta(d) for d in described["of"])
    return kernel.beside[described["bundle"]](*parts)


def _meta(descriptor: list[Any]) -> torch.Tensor:
    shape, dtype = descriptor
    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
