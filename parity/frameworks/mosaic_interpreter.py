"""JAX's Mosaic GPU interpreter, made to run our kernels unmodified on a CPU.

The only file that touches private names of that interpreter. What the stock one (jax 0.11.2) lacks
and `install` adds:

    run_state           pl.run_state, and with it plgpu.ACC.init
    register_operand    wgmma with its first operand in registers
    accumulator_store   acc[...] = value
    reshaped_store      ref.reshape(...)[...] = value
    predicated_store    copy_smem_to_gmem(predicate=...), which emit_pipeline's out_specs use
    atomics             plgpu.atomic_*: a read and a write, not one step
    tma_reduction       copy_smem_to_gmem(reduction_op="add"): additions do not race with additions
    dependent_launch    griddepcontrol: nothing to wait for
    inline_code         plgpu.inline_mgpu of a function that says, as its attribute `in_jax`, what
                        it computes
    plain_store         a store to contiguous memory may not run on beyond its row: on a GPU it is a
                        plain bulk copy, which only the array's end clips
    nan_maximum         the maximum or minimum of 4096 elements and more: XLA's on a CPU forgets
                        NaN, where a GPU's are max.NaN and min.NaN
    wgmma_races         the race detector sees what wgmma reads, and that it reads until wgmma_wait
    (several devices)   under shard_map: none checks for left-over barriers before all are done
    (time)              its callbacks take the arrays that XLA hands them: making jax arrays of them
                        took longer than most callbacks; and a kernel of several warpgroups is
                        compiled once, not once by each

The race detector's part matters most: wgmma runs on after the instruction is issued, so a slot of
shared memory that is released before wgmma_wait is refilled under the tensor core's eyes. Each
wgmma gets its own entry in a vector clock, which its warpgroup learns by waiting.

`probes` says which of these gaps the stock interpreter of the installed JAX still has (all but the
one that takes several devices to see, and time).
"""

import contextlib
import functools
import importlib
import logging
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from parity.frameworks import DataRace

_ROOT = "jax._src.pallas.mosaic_gpu"
_PRIVATE = {
    "callback": ("jax._src.callback", ("io_callback", "io_callback_impl")),
    "core": ("jax._src.core", ("DropVar", "Jaxpr", "Literal", "no_effects")),
    "state": ("jax._src.state.types", ("AbstractRef", "ReshapeTransform", "TransformedRef")),
    "stores": ("jax._src.state.primitives", ("swap_p",)),
    "discharge": ("jax._src.state.discharge", ("run_state_p",)),
    "spaces": (f"{_ROOT}.core", ("MemorySpace", "UnswizzleRef")),
    "primitives": (
        f"{_ROOT}.primitives",
        (
            "atomic_store_p",
            "griddepcontrol_launch_dependents_p",
            "griddepcontrol_wait_p",
            "inline_mgpu_p",
            "wgmma_accumulator_store_p",
            "wgmma_ref_p",
            "wgmma_wait_p",
        ),
    ),
    "calls": (
        f"{_ROOT}.interpret.gpu_callbacks",
        (
            "HostAllocationKey",
            "TOKEN_SHAPE_DTYPE",
            "_clip_store_to_shape",
            "_get_shared_memory",
            "_remove_noop_transforms",
            "call_allocate_buffer",
            "call_deallocate_buffer",
            "call_get",
            "call_make_allocation_request_array",
            "call_swap",
            "copy_smem_to_gmem",
            "fail_on_exception",
            "get_races",
            "reset_gpu_interpret_mode_state",
            "wgmma",
            "wgmma_accumulator_deref",
        ),
    ),
    "interpret": (f"{_ROOT}.interpret.jaxpr_interpret", ("JaxprInterpreter", "resolve_ref")),
    # The first kernel imports it, and with it comes one more setting of jax, for which jit's caches
    # begin anew: so it is imported before anything is traced.
    "launch": ("jax._src.pallas.mosaic.interpret.interpret_pallas_call", ()),
    "memory": (
        f"{_ROOT}.interpret.shared_memory",
        ("GPUSharedMemory", "_to_int", "get_memory_space_idx"),
    ),
    "gpu_races": (f"{_ROOT}.interpret.race_detection_state", ("GPURaceDetectionState",)),
    "races": (
        "jax._src.pallas.mosaic.interpret.race_detection_state",
        ("RaceDetectionState",),
    ),
    "threads": ("jax._src.pallas.mosaic.interpret.thread_map", ("_run", "_run_jaxpr")),
}

_messages: list[str] = []  # what the race detector has said


@functools.cache
def _jax() -> SimpleNamespace:
    """The private modules, by the names above.

    Raises RuntimeError that names what this JAX no longer has.
    """
    modules = {}
    for short, (path, names) in _PRIVATE.items():
        try:
            modules[short] = importlib.import_module(path)
        except ImportError as error:
            raise RuntimeError(_gone(path)) from error
        for name in names:
            if not hasattr(modules[short], name):
                raise RuntimeError(_gone(f"{path}.{name}"))
    methods = {
        modules["interpret"].JaxprInterpreter: ("interpret", "_interpret_copy_smem_to_gmem_p"),
        modules["memory"].GPUSharedMemory: (
            "add_copy_smem_to_gmem_clocks",
            "assert_no_barriers_allocated",
            "buffer_shape_and_dtype",
            "get_buffer_content",
            "get_next_tma_thread_id",
            "set_failed",
            "store_buffer_content",
            "swap_buffer_content",
        ),
    }
    for cls, names in methods.items():
        for name in names:
            if not hasattr(cls, name):
                raise RuntimeError(_gone(f"{cls.__name__}.{name}"))
    return SimpleNamespace(**modules)


def _gone(name: str) -> str:
    return (
        f"jax {jax.__version__} has no {name}: parity.frameworks.mosaic_interpreter was written "
        "for jax 0.11.2 and must be adapted to this version"
    )


@functools.cache
def _stock() -> dict[tuple[Any, str], Any]:
    """The interpreter's own functions that `install` replaces, by owner and name."""
    J = _jax()
    interpreter, shared = J.interpret.JaxprInterpreter, J.memory.GPUSharedMemory
    return {
        (interpreter, "interpret"): interpreter.interpret,
        (interpreter, "_interpret_copy_smem_to_gmem_p"): interpreter._interpret_copy_smem_to_gmem_p,
        (shared, "assert_no_barriers_allocated"): shared.assert_no_barriers_allocated,
        (J.calls, "copy_smem_to_gmem"): J.calls.copy_smem_to_gmem,
        (J.calls, "wgmma"): J.calls.wgmma,
        (J.calls, "wgmma_accumulator_deref"): J.calls.wgmma_accumulator_deref,
        (J.callback, "io_callback_impl"): J.callback.io_callback_impl,
        (J.memory, "_to_int"): J.memory._to_int,
        (J.threads, "_run_jaxpr"): J.threads._run_jaxpr,
    }


@functools.cache
def _replacements() -> dict[tuple[Any, str], Any]:
    J = _jax()
    interpreter = J.interpret.JaxprInterpreter
    guard = J.calls.fail_on_exception
    return {
        (interpreter, "interpret"): _interpret,
        (interpreter, "_interpret_copy_smem_to_gmem_p"): _copy_smem_to_gmem,
        (J.memory.GPUSharedMemory, "assert_no_barriers_allocated"): _assert_no_barriers_allocated,
        (J.calls, "copy_smem_to_gmem"): guard(_tma_store),
        (J.calls, "wgmma"): guard(_wgmma),
        (J.calls, "wgmma_accumulator_deref"): guard(_wgmma_accumulator_deref),
        (J.callback, "io_callback_impl"): _io_callback,
        (J.memory, "_to_int"): _to_int,
        (J.threads, "_run_jaxpr"): _run_jaxpr,
    }


def install() -> None:
    """Fills the gaps, for the whole process. Calling it again changes nothing.

    Raises RuntimeError on a JAX whose interpreter has changed under the private names used here.
    """
    _stock()  # before anything is replaced
    for (owner, name), function in _replacements().items():
        setattr(owner, name, function)
    # The detector prints what it finds: a print of their own makes these modules tell us instead.
    for module in (_jax().races, _jax().gpu_races):
        vars(module)["print"] = _messages.append
    # A kernel becomes hundreds of callbacks that run a few times: optimizing what is in between
    # takes longer than it saves.
    jax.config.update("jax_disable_most_optimizations", True)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Raises DataRace at its end when kernels that ran inside raced (and races are looked for).

    When an exception passes, the interpreter's state is reset, so that the next kernel can run.
    """
    _messages.clear()
    try:
        yield
        if found := races():
            raise DataRace("\n".join(map(_in_words, found)))
    except BaseException:
        _jax().calls.reset_gpu_interpret_mode_state()
        raise


@contextlib.contextmanager
def interpreting(detect_races: bool = False) -> Iterator[None]:
    """Kernels traced inside run in the interpreter; memory nobody has written reads as NaN.

    detect_races: also look for unordered accesses; `races` says what was found. Trace (and jit)
        inside: a compiled function keeps the mode it was traced in.

    When an exception passes, the interpreter's state is reset, so that the next kernel can run.
    """
    install()
    _messages.clear()
    params = plgpu.InterpretGPUParams(detect_races=detect_races, uninitialized_memory="nan")
    with plgpu.force_gpu_interpret_mode(params):
        try:
            yield
            jax.effects_barrier()
        except BaseException:
            _jax().calls.reset_gpu_interpret_mode_state()
            raise


def races() -> list[str]:
    """The races shown since `interpreting` or `watched` was entered, in words."""
    jax.effects_barrier()
    return list(_messages)


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[list[bool]]:
    """Kernels that run inside fail once so much time has passed: one that waits at a barrier that
    is never completed would wait for ever, and cannot be interrupted.

    The list is not empty any more once that has happened.
    """
    out: list[bool] = []

    def give_up() -> None:
        with contextlib.suppress(AssertionError):  # no kernel is running
            shared = _jax().calls._get_shared_memory()
            out.append(True)
            shared.set_failed(TimeoutError(f"no end after {seconds:g} s"), None, top_level=False)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield out
    finally:
        timer.cancel()


class Touch(NamedTuple):
    """One load or store of global memory by one block of threads."""

    block: tuple[int, ...]  # its place in the grid
    stored: bool
    buffer: int  # rises from argument to argument and then from result to result
    shape: tuple[int, ...]  # of that array
    box: tuple[slice, ...]  # what was asked for: it may reach beyond the shape
    itemsize: int


@dataclass
class Traffic:
    """Bytes that interpreted kernels moved from and to global memory; beyond its edges, none."""

    read: int = 0
    written: int = 0


@contextlib.contextmanager
def traffic(each: Callable[[Touch], None] | None = None) -> Iterator[Traffic]:
    """Counts what the blocks of the kernels that run inside load and store in global memory.

    each: is told every load and store as it happens.
    """
    J = _jax()
    shared, moved = J.memory.GPUSharedMemory, Traffic()
    space = J.memory.get_memory_space_idx(J.spaces.MemorySpace.GMEM)
    stock = {
        name: getattr(shared, name)
        for name in ("get_buffer_content", "store_buffer_content", "swap_buffer_content")
    }

    def seen(memory: Any, key: Any, access: Any, said: dict, stored: bool) -> None:
        where = getattr(said.get("logging_info"), "mesh_location", None)
        if where is None or key.memory_space_id != space:
            return
        of, dtype = memory.buffer_shape_and_dtype(key)
        box = tuple(r if isinstance(r, slice) else slice(r, r + 1) for r in access.range)
        inside = [len(range(*r.indices(n))) for r, n in zip(box, of, strict=True)]
        size = np.dtype(dtype).itemsize
        if stored:
            moved.written += int(np.prod(inside)) * size
        else:
            moved.read += int(np.prod(inside)) * size
        if each:
            each(Touch(where.cluster_coords, stored, key.buffer_id, tuple(of), box, size))

    def get(self: Any, key: Any, access: Any, *rest: Any, **said: Any) -> Any:
        seen(self, key, access, said, False)
        return stock["get_buffer_content"](self, key, access, *rest, **said)

    def store(self: Any, key: Any, access: Any, *rest: Any, **said: Any) -> Any:
        seen(self, key, access, said, True)
        return stock["store_buffer_content"](self, key, access, *rest, **said)

    def swap(self: Any, key: Any, access: Any, *rest: Any, **said: Any) -> Any:
        seen(self, key, access, said, True)
        return stock["swap_buffer_content"](self, key, access, *rest, **said)

    with contextlib.ExitStack() as patched:
        for name, function in zip(stock, (get, store, swap), strict=True):
            patched.enter_context(mock.patch.object(shared, name, function))
        yield moved
        jax.effects_barrier()


_ACCESS = re.compile(
    r"(read|write) of (.*?)\[(.*)\] from (\w*\(.*?\)|.*?), (?:([^\n]+?:\d+)[: ]|$)", re.MULTILINE
)  # what a pipeline does has no line


def _in_words(race: str) -> str:
    """A race in one line: which warpgroup touches what, and on which line of which file."""
    accesses = _ACCESS.findall(race)
    if len(accesses) != 2:
        return race
    spaces = _jax().spaces.MemorySpace
    names = {str(_jax().memory.get_memory_space_idx(s)): s.name for s in (spaces.SMEM, spaces.GMEM)}
    words, blocks = [], set(re.findall(r"block_id=(\d+), warp", race))
    for verb, buffer, where, thread, line in accesses:
        ids = dict(re.findall(r"(\w+)=(\w+)", thread))
        who = f"warpgroup {ids['warpgroup_id']}" if "warpgroup_id" in ids else thread
        space = dict(re.findall(r"(\w+)=(\w+)", buffer)).get("memory_space_id", "")
        # block_id counts inside a cluster: in GMEM two blocks of the grid may be called the same
        if "block_id" in ids and (names.get(space) == "SMEM" or len(blocks) > 1):
            who += f" of block {ids['block_id']}"
        box = re.sub(r"slice\((\d+), (\d+), 1\)", r"\1:\2", where).strip("()").rstrip(",")
        line = line.rpartition("/")[2]
        by = f"({line})" if line else "(a copy of the pipeline)"
        words.append(f"{who} {verb}s {names.get(space, 'memory')}[{box}] {by}")
    return f"RACE: {words[0]}, {words[1]}, and nothing orders the two"


# Equations the stock interpreter does not know. Each takes (interpreter, equation, token, values)
# and returns (token, outputs); the token orders the callbacks of one thread.


def _shape(aval: Any) -> jax.ShapeDtypeStruct:
    aval = aval.inner_aval if isinstance(aval, _jax().state.AbstractRef) else aval
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _read(self: Any, eqn: Any, token: Any, key: Any, aval: Any, transforms: tuple = ()) -> Any:
    if transforms:
        aval = _jax().state.TransformedRef(aval, tuple(transforms)).type
    return _jax().calls.call_get(
        token=token,
        result_shape_and_dtype=_shape(aval),
        mesh_location=self.mesh_location,
        thread=self.thread,
        allocation_key_as_array=key,
        transforms=tuple(transforms),
        source_info=eqn.source_info,
    )


def _write(self: Any, eqn: Any, token: Any, key: Any, value: Any, transforms: tuple = ()) -> Any:
    token, _ = _jax().calls.call_swap(
        token=token,
        result_shape_and_dtype=jax.ShapeDtypeStruct(value.shape, value.dtype),
        mesh_location=self.mesh_location,
        thread=self.thread,
        allocation_key_as_array=key,
        transforms=tuple(transforms),
        val=value,
        mask=None,
        source_info=eqn.source_info,
    )
    return token


def _run_state(self: Any, eqn: Any, token: Any, values: list) -> tuple[Any, list]:
    """A state that is a reference outside already is passed on; any other lives in registers."""
    J = _jax()
    refs = eqn.params["jaxpr"].invars
    given = iter(zip(values, [v.aval for v in eqn.invars], strict=True))
    keys, owned = [], []
    for ref, initialized in zip(refs, eqn.params["is_initialized"], strict=True):
        value, outer = next(given) if initialized else (None, None)
        if isinstance(outer, J.state.AbstractRef):
            keys.append(value)
            owned.append(False)
            continue
        if value is None:
            value = jnp.zeros(ref.aval.shape, ref.aval.dtype)
        token, request = J.calls.call_make_allocation_request_array(
            token=token,
            compute_unit=self.thread,
            memory_space_id=J.memory.get_memory_space_idx(J.spaces.MemorySpace.REGS),
        )
        token, key = J.calls.call_allocate_buffer(
            token=token,
            mesh_location=self.mesh_location,
            thread=self.thread,
            allocation_request_as_array=request,
            value=value,
            source_info=eqn.source_info,
        )
        keys.append(key)
        owned.append(True)
    token, _ = self.interpret(eqn.params["jaxpr"], token, *keys)
    token, _ = _wait(self, eqn, token, [], n=0)
    outputs = []
    for ref, key, own in zip(refs, keys, owned, strict=True):
        if not own:
            outputs.append(key)
            continue
        token, value = _read(self, eqn, token, key, ref.aval)
        token = J.calls.call_deallocate_buffer(
            token=token,
            mesh_location=self.mesh_location,
            thread=self.thread,
            allocation_key_as_array=key,
            source_info=eqn.source_info,
        )
        outputs.append(value)
    return token, outputs


def _accumulator_store(self: Any, eqn: Any, token: Any, values: list) -> tuple[Any, list]:
    J = _jax()
    key, value = values
    # Nothing for the race detector, which would take the registers of the block before for these.
    token = J.callback.io_callback(
        J.calls.fail_on_exception(_accumulator_write),
        J.calls.TOKEN_SHAPE_DTYPE,
        token=token,
        thread=self.thread,
        acc=key,
        value=value,
    )
    # The output is for a later stage of lowering; nobody reads it here.
    return token, [value]


def _reshapes(eqn: Any) -> bool:
    J = _jax()
    if eqn.primitive is not J.stores.swap_p:
        return False
    transforms = jax.tree.unflatten(eqn.params["tree"], eqn.invars[2:])
    return any(isinstance(t, J.state.ReshapeTransform) for t in transforms)


def _reshaped_store(self: Any, eqn: Any, token: Any, values: list) -> tuple[Any, list]:
    key, new, *leaves = values
    transforms = jax.tree.unflatten(eqn.params["tree"], leaves)
    at = [isinstance(t, _jax().state.ReshapeTransform) for t in transforms].index(True)
    before, after = tuple(transforms[:at]), transforms[at + 1 :]
    # Counts as a read and a write of all that is reshaped.
    token, whole = _read(self, eqn, token, key, eqn.invars[0].aval, before)
    shaped = whole.reshape(transforms[at].shape)
    index: tuple[Any, ...] = (...,)
    if after:
        indexer, *transposes = after
        index = tuple(
            slice(i.start, i.start + i.size) if isinstance(i, pl.Slice) else i
            for i in indexer.indices
        )
        if transposes:  # of the part that is stored: ref.reshape(...).at[...].T[...] = value
            assert [t.permutation for t in transposes] == [(1, 0)]
            old, shaped = shaped[index].T, shaped.at[index].set(new.T)
            return _write(self, eqn, token, key, shaped.reshape(whole.shape), before), [old]
    old, shaped = shaped[index], shaped.at[index].set(new)
    return _write(self, eqn, token, key, shaped.reshape(whole.shape), before), [old]


def _atomic(self: Any, eqn: Any, token: Any, values: list) -> tuple[Any, list]:
    operations = {
        "add": jnp.add,
        "max": jnp.maximum,
        "min": jnp.minimum,
        "xor": jnp.bitwise_xor,
        "and": jnp.bitwise_and,
        "or": jnp.bitwise_or,
    }
    key, transforms, value = jax.tree.unflatten(eqn.params["args_tree"], values)
    kind = eqn.params["atomic_type"]
    kind = str(getattr(kind, "name", kind)).lower()
    operation = next(function for name, function in operations.items() if name in kind)
    token, old = _read(self, eqn, token, key, eqn.invars[0].aval, transforms or ())
    new = operation(old, jnp.broadcast_to(value, old.shape)).astype(old.dtype)
    return _write(self, eqn, token, key, new, transforms or ()), []


def _extreme(self: Any, eqn: Any, token: Any, values: list) -> tuple[Any, list]:
    """A maximum or minimum along axes, NaN where there is one."""
    (x,) = values
    found = eqn.primitive.bind(x, **eqn.params)
    if jnp.issubdtype(found.dtype, jnp.floating):
        found = jnp.where(jnp.isnan(x).any(eqn.params["axes"]), jnp.nan, found)
    return token, [found]


def _nothing(self: Any, eqn: Any, token: Any, values: list) -> tuple[Any, list]:
    return token, []


def _inline_code(self: Any, eqn: Any, token: Any, values: list) -> tuple[Any, list]:
    arguments = jax.tree.unflatten(
        eqn.params["pytree_args"], values[: eqn.params["pytree_args"].num_leaves]
    )
    return token, jax.tree.leaves(eqn.params["mgpu_fn"].in_jax(*arguments))


def _wait(self: Any, eqn: Any, token: Any, values: list, n: int | None = None) -> tuple[Any, list]:
    if not self.interpret_params.detect_races:
        return token, []
    n = eqn.params["n"] if n is None else n
    token = _jax().callback.io_callback(
        functools.partial(_jax().calls.fail_on_exception(_wgmma_wait), n=n),
        _jax().calls.TOKEN_SHAPE_DTYPE,
        token=token,
        thread=self.thread,
    )
    return token, []


def _register_operand(self: Any, eqn: Any, token: Any, values: list) -> tuple[Any, list]:
    J = _jax()
    acc, a, b, *leaves = values
    trees = [
        eqn.params[f"{operand}_transforms_tree"] or jax.tree.structure([])
        for operand in ("acc", "a", "b")
    ]
    _, _, transforms = jax.tree.unflatten(jax.tree_util.treedef_tuple(trees), leaves)
    b, transforms = J.interpret.resolve_ref(eqn.invars[2].aval, b, transforms)
    token = J.callback.io_callback(
        functools.partial(
            J.calls.fail_on_exception(_wgmma_register_operand), source_info=eqn.source_info
        ),
        J.calls.TOKEN_SHAPE_DTYPE,
        token=token,
        thread=self.thread,
        acc=acc,
        a=a,
        b=b,
        b_transforms=transforms,
    )
    return token, []


def _rule(eqn: Any) -> Callable[..., tuple[Any, list]] | None:
    """What interprets this equation; None leaves it to the stock interpreter."""
    J = _jax()
    P = J.primitives
    if _reshapes(eqn):
        return _reshaped_store
    if eqn.primitive is P.inline_mgpu_p:
        return _inline_code if hasattr(eqn.params["mgpu_fn"], "in_jax") else None
    if eqn.primitive is P.wgmma_ref_p:
        in_registers = not isinstance(eqn.invars[1].aval, J.state.AbstractRef)
        return _register_operand if in_registers else None
    return {
        J.discharge.run_state_p: _run_state,
        lax.reduce_max_p: _extreme,
        lax.reduce_min_p: _extreme,
        P.wgmma_accumulator_store_p: _accumulator_store,
        P.wgmma_wait_p: _wait,
        P.atomic_store_p: _atomic,
        P.griddepcontrol_wait_p: _nothing,
        P.griddepcontrol_launch_dependents_p: _nothing,
    }.get(eqn.primitive)


def _interpret(self: Any, jaxpr: Any, token: Any, *args: Any) -> tuple[Any, list]:
    """As the stock `interpret`, which still does every equation that has no rule here."""
    core = _jax().core
    stock = _stock()[type(self), "interpret"]
    if not any(_rule(eqn) for eqn in jaxpr.eqns):
        return stock(self, jaxpr, token, *args)
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], args, strict=True))

    def value(var: Any) -> Any:
        return var.val if isinstance(var, core.Literal) else values[var]

    unnamed = jaxpr.debug_info.with_unknown_names()
    for eqn in jaxpr.eqns:
        targets = [var for var in eqn.outvars if not isinstance(var, core.DropVar)]
        if rule := _rule(eqn):
            token, outputs = rule(self, eqn, token, [value(var) for var in eqn.invars])
            values.update(
                (var, out)
                for var, out in zip(eqn.outvars, outputs, strict=True)
                if not isinstance(var, core.DropVar)
            )
        else:
            sources = [var for var in eqn.invars if not isinstance(var, core.Literal)]
            sources = list(dict.fromkeys(sources))
            one = core.Jaxpr([], sources, targets, [eqn], core.no_effects, unnamed)
            token, outputs = stock(self, one, token, *map(value, sources))
            values.update(zip(targets, outputs, strict=True))
    return token, [value(var) for var in jaxpr.outvars]


def _copy_smem_to_gmem(
    self: Any, eqn: Any, token: Any, *values: Any, has_user_predicate: bool, **params: Any
) -> tuple[Any, list]:
    stock = _stock()[type(self), "_interpret_copy_smem_to_gmem_p"]
    copy = functools.partial(stock, self, eqn, has_user_predicate=False, **params)
    if not has_user_predicate:
        return copy(token, *values)
    *rest, predicate = values
    return lax.cond(predicate, lambda t: copy(t, *rest)[0], lambda t: t, token), []


# How callbacks and warpgroups are run.


def _of_the_interpreter(callback: Any) -> bool:
    """Whether a callback is one of those that carry out what kernels do."""
    function = callback.callback_func
    while isinstance(function, functools.partial):
        function = function.func
    return function.__module__.startswith((__name__, "jax._src.pallas."))


def _io_callback(*args: Any, callback: Any, **params: Any) -> Any:
    """The interpreter's callbacks read numbers and copy arrays: NumPy's are as good as jax's."""
    if not _of_the_interpreter(callback):
        stock = _stock()[_jax().callback, "io_callback_impl"]
        return stock(*args, callback=callback, **params)
    try:
        # copies: a task may keep what it was given, and XLA uses that memory again
        return [np.asarray(x) for x in callback(*map(np.array, args))]
    except BaseException:
        # As jax does, in the same words: the log is where the error is whole, with its frames.
        logging.getLogger("jax._src.callback").exception("jax.io_callback failed")
        raise


def _to_int(x: Any) -> Any:
    if isinstance(x, (np.ndarray, np.generic)):
        return int(x)
    return _stock()[_jax().memory, "_to_int"](x)


_compiling = threading.Lock()


@functools.lru_cache(maxsize=64)
def _one_for_all(jaxpr: Any) -> list:
    """Holds what the warpgroups of one kernel run, once the first of them has compiled it."""
    return []


def _run_jaxpr(jaxpr: Any, consts: Any, *args: Any) -> None:
    compiled = _one_for_all(jaxpr)
    with _compiling:
        if not compiled:
            run = jax.jit(_jax().threads._run, static_argnums=0)
            compiled.append(run.lower(jaxpr, consts, *args).compile())
    compiled[0](consts, *args)


# Callbacks: they run in the host process, on the interpreter's model of memory.


def _assert_no_barriers_allocated(shared: Any) -> None:
    shared.barrier.wait()  # of all devices; a failing one aborts it
    _stock()[type(shared), "assert_no_barriers_allocated"](shared)


def _in_flight(shared: Any, thread: Any) -> list:
    """Clocks of the wgmmas that this warpgroup has issued and not waited for, oldest first."""
    table = vars(shared).setdefault("wgmma_in_flight", {})
    return table.setdefault(thread, [])


def _reads(shared: Any, thread: Any, operands: list, source_info: Any) -> None:
    """Tells the race detector that a wgmma of this warpgroup reads these operands from now on."""
    if not shared.detect_races:
        return
    shared.incr_clock(thread)
    clock = shared.get_clock(thread)
    pending = _in_flight(shared, thread)
    # The tensor core counts in the clock entry of the warpgroup's first warp, which stands still
    # in a warpgroup that computes as a whole.
    for _ in range(len(pending) + 1):
        clock.inc(shared.thread_to_vc_position(thread.warp(0)))
    pending.append(clock)
    for key, access in operands:
        _jax().calls.get_races().check_read(
            thread, clock.async_smem_clock.copy(), key, access, source_info=source_info
        )


def _wgmma_wait(*, token: Any, thread: Any, n: int) -> Any:
    shared = _jax().calls._get_shared_memory()
    if shared.detect_races:
        pending = _in_flight(shared, thread)
        done = max(0, len(pending) - n)
        with shared.lock:
            for clock in pending[:done]:
                shared.clocks[thread].update(clock)
        del pending[:done]
    return token


def _operand(shared: Any, key: Any, transforms: Any) -> tuple[Any, Any]:
    calls = _jax().calls
    key = calls.HostAllocationKey.from_array(key)
    transforms = jax.tree.map(int, calls._remove_noop_transforms(transforms))
    return key, shared.access(key, transforms)


def _check_plain_store(copy: dict[str, Any]) -> None:
    """Raises IndexError where a plain bulk copy would run on into the next rows: a tiled TMA copy
    is clipped in every dimension, and a plain one, which Mosaic makes of a copy without swizzle
    whose target is contiguous, where the array ends."""
    shared = _jax().calls._get_shared_memory()
    target, written = _operand(shared, copy["dst_allocation_key_as_array"], copy["dst_transforms"])
    shape = tuple(shared.buffer_shape_and_dtype(target).shape)
    starts = [r.start if isinstance(r, slice) else r for r in written.range]
    sizes = [r.stop - r.start if isinstance(r, slice) else 1 for r in written.range]
    first = next((n for n, size in enumerate(sizes) if size > 1), 0)
    plain = tuple(sizes[first + 1 :]) == shape[first + 1 :] and not any(
        isinstance(t, _jax().spaces.UnswizzleRef) for t in copy["src_transforms"]
    )
    if plain and starts[first] + sizes[first] > shape[first] and any(n > 1 for n in shape[:first]):
        raise IndexError(
            f"copy_smem_to_gmem of {sizes} to {starts} of an array of shape {list(shape)} is a "
            f"plain copy of contiguous memory: it would run on beyond dimension {first}"
        )


def _tma_store(
    *, token: Any, thread: Any, reduction_op: str | None, source_info: Any = None, **rest: Any
) -> Any:
    calls = _jax().calls
    if reduction_op is None:
        _check_plain_store(rest)
        stock = _stock()[calls, "copy_smem_to_gmem"]
        return stock(token=token, thread=thread, reduction_op=None, source_info=source_info, **rest)
    if reduction_op != "add" or rest["predicate"] is not None:
        raise NotImplementedError(f"reduction_op={reduction_op!r}, or one with a predicate")
    shared = calls._get_shared_memory()
    (source, read), (target, written) = (
        _operand(shared, rest[f"{x}_allocation_key_as_array"], rest[f"{x}_transforms"])
        for x in ("src", "dst")
    )
    if shared.detect_races:
        clock = shared.incr_clock(thread)
        clock.inc(shared.get_next_tma_thread_id())
        seen = clock.async_smem_clock.copy()
        calls.get_races().check_read(thread, seen, source, read, source_info=source_info)
        shared.add_copy_smem_to_gmem_clocks(thread, clock.copy(), clock)
    value, _, _ = shared.get_buffer_content(source, read, thread)
    inside = calls._clip_store_to_shape(
        written, value, tuple(shared.buffer_shape_and_dtype(target).shape)
    )
    if inside is not None:
        written, value = inside
        old, _, _ = shared.get_buffer_content(target, written, thread)
        shared.store_buffer_content(target, written, old + value, thread)
    return token


def _wgmma(*, token: Any, thread: Any, source_info: Any = None, **rest: Any) -> Any:
    stock = _stock()[_jax().calls, "wgmma"]
    token = stock(token=token, thread=thread, source_info=source_info, **rest)
    shared = _jax().calls._get_shared_memory()
    operands = [
        _operand(shared, rest[f"{x}_allocation_key_as_array"], rest[f"{x}_transforms"])
        for x in ("a", "b")
    ]
    _reads(shared, thread, operands, source_info)
    return token


def _wgmma_accumulator_deref(*, token: Any, thread: Any, wait_n: int | None, **rest: Any) -> Any:
    if wait_n is not None:
        token = _wgmma_wait(token=token, thread=thread, n=wait_n)
    stock = _stock()[_jax().calls, "wgmma_accumulator_deref"]
    return stock(token=token, thread=thread, wait_n=wait_n, **rest)


def _accumulator_write(*, token: Any, thread: Any, acc: Any, value: Any) -> Any:
    shared = _jax().calls._get_shared_memory()
    key, access = _operand(shared, acc, ())
    shared.store_buffer_content(key, access, np.array(value), thread)
    return token


def _wgmma_register_operand(
    *, token: Any, thread: Any, acc: Any, a: Any, b: Any, b_transforms: Any, source_info: Any
) -> Any:
    shared = _jax().calls._get_shared_memory()
    acc_key, acc_access = _operand(shared, acc, ())
    b_key, b_access = _operand(shared, b, b_transforms)
    value, _, _ = shared.get_buffer_content(b_key, b_access, thread)
    old, _, _ = shared.get_buffer_content(acc_key, acc_access, thread)
    new = old + np.matmul(np.asarray(a), value, dtype=old.dtype)
    shared.store_buffer_content(acc_key, acc_access, new, thread)
    _reads(shared, thread, [(b_key, b_access)], source_info)
    return token


# Probes: one small kernel for each gap, run by the stock interpreter.


class Probe(NamedTuple):
    """name: the gap, as the module's docstring has it. ok: the stock interpreter can do it.
    detail: what it said instead."""

    name: str
    ok: bool
    detail: str


def _kernel(body: Callable[..., None], *scratch: Any) -> Callable[..., jax.Array]:
    """body(x[64, 64] bfloat16, y[64, 64] float32, *scratch), both in global memory."""
    out = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    return plgpu.kernel(body, out_type=out, scratch_types=scratch)


def _run_state_body(x: Any, y: Any, x_smem: Any, barrier: Any) -> None:
    plgpu.copy_gmem_to_smem(x, x_smem, barrier)
    plgpu.barrier_wait(barrier)
    start = plgpu.ACC.init(jnp.zeros((64, 64), jnp.float32))
    y[...] = pl.run_state(lambda acc: plgpu.wgmma(acc, x_smem, x_smem))(start)


def _register_operand_body(x: Any, y: Any, x_smem: Any, barrier: Any) -> None:
    plgpu.copy_gmem_to_smem(x, x_smem, barrier)
    plgpu.barrier_wait(barrier)

    def product(acc: Any) -> jax.Array:
        plgpu.wgmma(acc, x_smem[...], x_smem)
        return acc[...]

    y[...] = pl.run_scoped(product, plgpu.ACC((64, 64), jnp.float32))


def _accumulator_store_body(x: Any, y: Any) -> None:
    def store(acc: Any) -> jax.Array:
        acc[...] = x[...].astype(jnp.float32)
        return acc[...]

    y[...] = pl.run_scoped(store, plgpu.ACC((64, 64), jnp.float32))


def _reshaped_store_body(x: Any, y: Any, y_smem: Any) -> None:
    y_smem.reshape(64, 64).at[:, pl.ds(0, 64)][...] = x[...].astype(jnp.float32)
    y[...] = y_smem[:, :, 0]


def _predicated_store_body(x: Any, y: Any, y_smem: Any) -> None:
    y_smem[...] = x[...].astype(jnp.float32)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(y_smem, y, predicate=y_smem.shape[0] == jnp.int32(64))
    plgpu.wait_smem_to_gmem(0)


def _atomics_body(x: Any, y: Any) -> None:
    y[...] = x[...].astype(jnp.float32)
    plgpu.atomic_add(y, jnp.ones((64, 64), jnp.float32))


def _plain_store_body(x: Any, y: Any, y_smem: Any) -> None:
    y[...] = x[...].astype(jnp.float32)
    y_smem[...] = jnp.zeros((1, 128), jnp.float32)
    plgpu.commit_smem()
    start = (x[0, 0] * 0).astype(jnp.int32)
    plgpu.copy_smem_to_gmem(y_smem, y.at[pl.ds(start, 1), pl.ds(start, 128)])  # y has 64 columns
    plgpu.wait_smem_to_gmem(0)


def _tma_reduction_body(x: Any, y: Any, y_smem: Any) -> None:
    y_smem[...] = x[...].astype(jnp.float32)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(y_smem, y)
    plgpu.wait_smem_to_gmem(0)
    plgpu.copy_smem_to_gmem(y_smem, y, reduction_op="add")
    plgpu.wait_smem_to_gmem(0)


def _dependent_launch_body(x: Any, y: Any) -> None:
    plgpu.griddepcontrol_wait()
    y[...] = x[...].astype(jnp.float32)


def _inline_code_body(x: Any, y: Any) -> None:
    def same(_: Any, value: Any) -> Any:
        return value

    vars(same)["in_jax"] = lambda value: value
    like = plgpu.ShapeDtypeStruct((64, 64), jnp.float32, layout=plgpu.Layout.WGMMA)
    inline = plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=like)
    y[...] = inline(same)(x[...].astype(jnp.float32))


def _nan_maximum_body(x: Any, y: Any) -> None:
    """x, and NaN if a maximum forgets one."""
    value = x[...].astype(jnp.float32)
    index = plgpu.broadcasted_iota(jnp.int32, (64, 64), 1, layout=plgpu.Layout.WGMMA)
    top = jnp.where(index == 5, jnp.nan, value).max(axis=1)
    kept = lax.broadcast_in_dim(jnp.isnan(top), (64, 64), [0])
    y[...] = jnp.where(kept, value, jnp.nan)


def _wgmma_races_body(x: Any, y: Any, x_smem: Any, barrier: Any) -> None:
    plgpu.copy_gmem_to_smem(x, x_smem, barrier)
    plgpu.barrier_wait(barrier)

    def product(acc: Any) -> jax.Array:
        plgpu.wgmma(acc, x_smem, x_smem)
        plgpu.copy_gmem_to_smem(x, x_smem, barrier)  # under the running wgmma
        plgpu.barrier_wait(barrier)
        return acc[...]

    y[...] = pl.run_scoped(product, plgpu.ACC((64, 64), jnp.float32))


def _tile() -> tuple[Any, Any]:
    return plgpu.SMEM((64, 64), jnp.bfloat16), plgpu.Barrier()


def probe_kernels() -> dict[str, Callable[[jax.Array], jax.Array]]:
    """A kernel for each gap: takes x[64, 64] bfloat16, returns float32 of the same shape."""
    return {
        "run_state": _kernel(_run_state_body, *_tile()),
        "register_operand": _kernel(_register_operand_body, *_tile()),
        "accumulator_store": _kernel(_accumulator_store_body),
        "reshaped_store": _kernel(_reshaped_store_body, plgpu.SMEM((64, 64, 1), jnp.float32)),
        "predicated_store": _kernel(_predicated_store_body, plgpu.SMEM((64, 64), jnp.float32)),
        "atomics": _kernel(_atomics_body),
        "tma_reduction": _kernel(_tma_reduction_body, plgpu.SMEM((64, 64), jnp.float32)),
        "plain_store": _kernel(_plain_store_body, plgpu.SMEM((1, 128), jnp.float32)),
        "dependent_launch": _kernel(_dependent_launch_body),
        "inline_code": _kernel(_inline_code_body),
        "nan_maximum": _kernel(_nan_maximum_body),
        "wgmma_races": _kernel(_wgmma_races_body, *_tile()),
    }


def probes() -> list[Probe]:
    """Which gaps the stock interpreter of this JAX still has: a Probe for each, `ok` once closed.

    Runs with our additions taken out, and puts them back.
    """
    install()
    for (owner, name), function in _stock().items():
        setattr(owner, name, function)
    logging.disable(logging.CRITICAL)  # a failing callback logs its traceback
    try:
        return [_probe(name, kernel) for name, kernel in probe_kernels().items()]
    finally:
        logging.disable(logging.NOTSET)
        install()


def _probe(name: str, kernel: Callable[[jax.Array], jax.Array]) -> Probe:
    detect = name == "wgmma_races"
    _messages.clear()
    try:
        params = plgpu.InterpretGPUParams(detect_races=detect)
        with plgpu.force_gpu_interpret_mode(params):
            y = jax.block_until_ready(
                jax.jit(lambda x: kernel(x))(jnp.ones((64, 64), jnp.bfloat16))
            )
        if name == "nan_maximum" and bool(jnp.isnan(y).any()):
            return Probe(name, False, "a maximum forgot NaN")
        if detect and not races():
            return Probe(name, False, "no race reported")
        if name == "plain_store":
            return Probe(name, False, "no error reported")
    except Exception as error:
        _jax().calls.reset_gpu_interpret_mode_state()
        return Probe(name, False, f"{type(error).__name__}: {str(error).strip()}".splitlines()[-1])
    return Probe(name, True, "")
