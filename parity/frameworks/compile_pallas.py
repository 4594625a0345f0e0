"""The Pallas half of the compile gate: cross-lowering for CUDA through jax's public API.

Lowering at production shapes checks layouts, alignment, TMA and wgmma rules and shared memory; the
lowered module also tells grid, shared memory and TMA descriptors. Registers and spills need ptxas:
`parity.frameworks.compile_sass`, where the environment for it exists. Runs in a process of its own
on the CPU platform: `from parity.frameworks.compile_pallas import main; main(cache)`.

Not public, checked on jax 0.11.2: the custom call's name and attribute, and the names of the
operations inside the module.
"""

import functools
import importlib
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax.extend.mlir import ir

from parity.frameworks import Kernel
from parity.frameworks.compile_sass import Assembler
from parity.frameworks.compile_worker import (
    Configs,
    Request,
    Row,
    failure,
    serve,
)
from parity.frameworks.jax import load

NUM_SMS = 132
_DIALECT = "stable_mosaic_gpu."


def main(cache: str, environment: str = "") -> None:
    """`cache` is the folder for listings, `environment` that with jax's CUDA plugin; empty:
    lowering alone."""
    # persistent kernels size their grid by the GPU: answer for the one that is not here
    vars(importlib.import_module("pallas_kernels._lib"))["num_sms"] = lambda: NUM_SMS
    assemble = Assembler(Path(environment), Path(cache)) if environment else None
    try:
        serve(lambda request: compile_one(assemble, request))
    finally:
        if assemble is not None:
            assemble.close()


def compile_one(assemble: Assembler | None, request: Request) -> list[Row]:
    """Rows of both passes of one request: every Mosaic GPU call that each of them lowers to."""
    kernel = load(request["implementation"])
    configs = Configs(kernel.public, request["config"])
    inputs = [_argument(kernel, d) for d in request["inputs"]]
    cotangents = [_struct(d) for d in request["cotangents"]]
    # asked for the backward alone, a Config is the backward's
    keywords = configs.keywords if "fwd" in request["passes"] else {}
    named = request["keywords"]
    inputs += [_struct(d) for d in named.values()]

    def forward(*args: Any) -> Any:
        by_keyword = dict(zip(named, args[len(args) - len(named) :], strict=True))
        plain = args[: len(args) - len(named)]
        return kernel.fwd(*plain, **by_keyword, **request["options"], **keywords)

    rows: list[Row] = []
    if "fwd" in request["passes"]:
        rows += _lower(assemble, request, "fwd", configs, forward, inputs)
    if "bwd" in request["passes"]:
        try:
            _, res = jax.eval_shape(forward, *inputs)
        except Exception as error:
            return [*rows, failure("bwd", request, error)]
        options = request["bwd_options"] if _has_launchers(kernel) else request["options"]
        backward = functools.partial(kernel.bwd, **options, **configs.keywords)
        rows += _lower(assemble, request, "bwd", configs, backward, [res, *cotangents])
    for which, further in request["further"].items():
        if which in request["passes"]:
            function = kernel.beside[further["function"]]
            function = functools.partial(function, **further["options"], **configs.keywords)
            args = [_argument(kernel, d) for d in further["inputs"]]
            rows += _lower(assemble, request, which, configs, function, args)
    return rows


def _lower(
    assemble: Assembler | None,
    request: Request,
    which: str,
    configs: Configs,
    function: Callable[..., Any],
    args: list[Any],
) -> list[Row]:
    with configs:
        try:
            traced = jax.jit(lambda *a: function(*a)).trace(*args)
            lowered: Any = traced.lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")
            modules = list(dict.fromkeys(_mosaic_modules(lowered.operation)))
            if not modules:
                return [failure(which, request, "lowered to no Mosaic GPU kernel")]
            rows: list[Row] = []
            for module, config in zip(modules, configs.of_calls(len(modules)), strict=True):
                row = _read(module, lowered.context) | {"status": "lowered", "message": ""}
                row |= {} if assemble is None else assemble(module)
                row |= {"status": "fail", "message": waits} if (waits := row.pop("waits")) else {}
                rows.append(row | {"pass": which, "config": config})
            return rows
        except Exception as error:
            return [failure(which, request, error, config=configs.latest())]


def _has_launchers(kernel: Kernel) -> bool:
    return hasattr(sys.modules[kernel.public.__module__], f"{kernel.public.__name__}_bwd")


def _argument(kernel: Kernel, described: Any) -> Any:
    """An array, None, or a bundle of some."""
    if described is None or isinstance(described, list):
        return described and _struct(described)
    parts = (None if d is None else _struct(d) for d in described["of"])
    return kernel.beside[described["bundle"]](*parts)


def _struct(descriptor: list[Any]) -> jax.ShapeDtypeStruct:
    shape, dtype = descriptor
    return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))


def _operations(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region:
            for op in block:
                yield op.operation
                yield from _operations(op.operation)


def _mosaic_modules(lowered: Any) -> Iterator[bytes]:
    for op in _operations(lowered):
        if op.name == "stablehlo.custom_call" and "mosaic_gpu" in str(
            op.attributes["call_target_name"]
        ):
            config = ir.DictAttr(op.attributes["mhlo.backend_config"])
            yield ir.StringAttr(config["module"]).value_bytes


def _read(module: bytes, context: Any) -> Row:
    """What a serialised Mosaic GPU module says about its kernel."""
    context.allow_unregistered_dialects = True  # the serialised dialect is registered nowhere
    parsed = ir.Module.parse(module, context=context).operation
    # read as text: Python looks for an unregistered dialect anew at every operation it is shown
    text = str(parsed.get_asm(print_generic_op_form=True))
    return {
        "kernel": ir.StringAttr(parsed.attributes["sym_name"]).value,
        "wgmma": text.count("wgmma.mma_async"),
        "tma_load": text.count(f'"{_DIALECT}nvvm.cp.async.bulk.tensor.shared.cluster.global"'),
        "tma_store": text.count(f'"{_DIALECT}nvvm.cp.async.bulk.tensor.global.shared.cta"')
        + text.count("cp.async.bulk.global.shared::cta.bulk_group"),  # of a row, in inline PTX
        "tma_descriptors": text.count("callee = @mosaic_gpu_init_tma_desc"),
        **(launch := _launch(text)),
        "waits": _waits(text, launch.get("threads")),
    }


def _waits(text: str, threads: int | None) -> str:
    """Says so if warpgroups ask for more registers than the block starts with: they would wait for
    them for ever. One warpgroup is taken to have given some back, and all others to ask for more.
    """
    asked = {op: int(n) for op, n in re.findall(r"setmaxnreg\.(inc|dec)\.\S+ (\d+);", text)}
    if threads is None or asked.keys() != {"inc", "dec"}:
        return ""
    groups = threads // 128
    has = 65536 // threads // 8 * 8 * groups  # as ptxas allots them: a multiple of 8 a thread
    wants = asked["dec"] + (groups - 1) * asked["inc"]
    if wants <= has:
        return ""
    return f"waits for ever: {groups} warpgroups want {wants} registers of a thread's, of {has}"


def _launch(text: str) -> Row:
    launch = re.search(rf'"{_DIALECT}gpu\.launch"\(([^)]*)\)', text)
    if launch is None:
        return {}
    # an async token, grid x y z, block x y z, perhaps cluster x y z, then the shared memory
    values = [_constant(text[: launch.start()], name) for name in launch[1].split(", ")[1:]]
    block = [size for size in values[3:6] if size is not None]
    threads = math.prod(block) if len(block) == 3 else None
    return {"grid": values[:3], "threads": threads, "shared_bytes": values[-1]}


def _constant(text: str, name: str) -> int | None:
    """The integer called `name` in generic MLIR, through casts; None where it is computed."""
    definition = re.search(rf'{name} = "{_DIALECT}arith\.(\w+)"\((%?\w*)\)([^\n]*)', text)
    if definition is None:
        return None
    if definition[1] == "index_cast":
        return _constant(text, definition[2])
    value = re.search(r"value = (-?\d+) :", definition[3])
    return int(value[1]) if value else None
