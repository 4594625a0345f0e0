"""One profiler for both languages: torch.profiler (Kineto over CUPTI) sees this process's kernels.

It sees torch's, Triton's and JAX's kernels alike, on one clock. CUPTI has one subscriber, so no
other profiler may be open in this process: not jax.profiler, not Mosaic GPU's own, not ncu.
"""

import functools
import gc
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from parity.timing import Kernel, NothingSeen, cut, quantile

FLUSHED = 32  # times the size of L2: about a millisecond; some backwards take half to launch
_MASK = 0x5A5A5A5A


def kernels(call: Callable[[], Any]) -> list[Kernel]:
    """The kernels, copies and fills of one call, in the order they started; the cache is as it is.

    Raises:
        NothingSeen: there is no GPU, or another profiler holds CUPTI.
    """
    with _session() as seen:
        wait_for(call())
    return seen


def cold(
    calls: Sequence[Callable[[], Any]], during: Callable[[int], None] | None = None
) -> list[list[Kernel]]:
    """The kernels of each call, run in order in one profiler session, each on a cold L2 cache.

    Each call is queued behind a kernel that reads and writes several times L2's size, on the stream
    of the call's framework. That leaves the cache full of dirty lines of no use: evicting them
    costs the call what it saves by leaving its own last lines there. And it lasts until the host
    has launched the whole call, so that no gap between two of its kernels is the host's.
    Before the first of them, each distinct call runs once and is not timed.
    `during` is called with the number of a call that was just launched, to read the clocks.

    Raises:
        NothingSeen: there is no GPU, another profiler holds CUPTI, or samples cannot be told apart.
    """
    needs_gpu()
    device = torch.cuda.current_device()
    each = {id(call): call for call in calls}
    flush_of = {key: _flush_for(call(), device) for key, call in each.items()}
    # A pause of the garbage collector between two launches of one call would count as its time.
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        with _session() as seen:
            for i, call in enumerate(calls):
                flush_of[id(call)]()
                out = call()
                if during is not None:
                    during(i)
                wait_for(out)
                del out
    finally:
        if collects:
            gc.enable()
    return cut(seen, {flush.kernel for flush in flush_of.values()}, len(calls))


def launches(
    calls: Mapping[str, Callable[[], Any]], samples: int = 5
) -> dict[str, list[dict[str, Any]]]:
    """The kernels of each call one by one, in the order they start: {"name", "us", "share", "grid",
    "block", "registers", "shared_bytes"}.

    us: the median on a cold cache; share: of their sum. The rest is null for copies and fills, and
    where the profiler does not tell.

    Raises:
        NothingSeen: as `cold` does.
    """
    runs = cold([call for _ in range(samples) for call in calls.values()])
    of_call = {name: runs[n :: len(calls)] for n, name in enumerate(calls)}
    known = shapes(list(calls.values()))
    complete = len(known) == sum(len(runs[-1]) for runs in of_call.values())
    found: dict[str, list[dict[str, Any]]] = {}
    for name, seen in of_call.items():
        count = len(seen[-1])
        alike = [run for run in seen if len(run) == count]
        medians = [
            quantile([run[n].end_us - run[n].start_us for run in alike], 0.5) for n in range(count)
        ]
        geometry = known[:count] if complete else [{}] * count
        known = known[count:]
        found[name] = [
            {"name": kernel.name, "us": us, "share": us / (sum(medians) or 1.0)}
            | {key: shape.get(key) for key in ("grid", "block", "registers", "shared_bytes")}
            for kernel, us, shape in zip(seen[-1], medians, geometry, strict=True)
        ]
    return found


def shapes(calls: Sequence[Callable[[], Any]]) -> list[dict[str, Any]]:
    """How each kernel of some calls was launched, as Kineto writes it into a trace file."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        with profile(activities=[ProfilerActivity.CUDA]) as session:
            for call in calls:
                wait_for(call())
        trace = Path(folder, "trace.json")
        session.export_chrome_trace(str(trace))
        return shapes_of(json.loads(trace.read_text()))


def shapes_of(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """The kernels, copies and fills of a Chrome trace of Kineto's, in the order they start."""
    work = ("kernel", "gpu_memcpy", "gpu_memset")
    events = [e for e in trace.get("traceEvents", ()) if e.get("cat") in work]
    found = []
    for event in sorted(events, key=lambda e: float(e["ts"])):
        args = event.get("args", {})
        found.append(
            {
                "grid": args.get("grid"),
                "block": args.get("block"),
                "registers": args.get("registers per thread"),
                "shared_bytes": args.get("shared memory"),
            }
        )
    return found


class _Flush:
    """Reads and writes a buffer of several times L2's size, by a kernel that no call will use: an
    exclusive or of 32-bit integers. Its name marks where a sample begins."""

    def __init__(self, device: int, by_jax: bool) -> None:
        size = FLUSHED * torch.cuda.get_device_properties(device).L2_cache_size
        if not by_jax:
            self._buffer = torch.zeros(size // 4, dtype=torch.int32, device=f"cuda:{device}")
            self._xor = lambda x: x.bitwise_xor_(_MASK)
        else:
            import jax

            self._buffer = jax.numpy.zeros(size // 4, "int32")
            self._xor = jax.jit(lambda x: x ^ _MASK, donate_argnums=0)
        wait_for(self())
        names = {k.name for k in kernels(self)}
        if len(names) != 1:
            raise NothingSeen(f"the cache flush should be one kernel, the profiler saw {names}")
        self.kernel = names.pop()

    def __call__(self) -> Any:
        self._buffer = self._xor(self._buffer)
        return self._buffer


_flush = functools.cache(_Flush)


def _flush_for(out: Any, device: int) -> _Flush:
    """The flush of the framework that made `out`, which has a stream of its own."""
    wait_for(out)
    return _flush(device, any(hasattr(leaf, "block_until_ready") for leaf in _leaves(out)))


def wait_for(out: Any) -> None:
    """Waits for the device, and first for what JAX has yet to launch from threads of its own."""
    for leaf in _leaves(out):
        if hasattr(leaf, "block_until_ready"):
            leaf.block_until_ready()
    torch.cuda.synchronize()


def _leaves(out: Any) -> Iterator[Any]:
    if isinstance(out, (tuple, list)):
        for x in out:
            yield from _leaves(x)
    else:
        yield out


def needs_gpu() -> None:
    """Raises NothingSeen where there is no CUDA device."""
    if not torch.cuda.is_available():
        raise NothingSeen("there is no CUDA device: speed exists only on a GPU")


@contextmanager
def _session() -> Iterator[list[Kernel]]:
    """Yields a list, and fills it with the device's kernels, copies and fills when it closes."""
    needs_gpu()
    seen: list[Kernel] = []
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it forgets between cycles; here is one
        with profile(activities=[ProfilerActivity.CUDA]) as session:
            yield seen
            torch.cuda.synchronize()
    results = session.profiler.kineto_results if session.profiler else None
    events = [
        e
        for e in (results.events() if results else ())
        if e.device_type().name == "CUDA" and not e.is_user_annotation()
    ]
    if not events:
        raise NothingSeen(
            "the profiler saw no kernel. CUPTI has one subscriber: close ncu, nsys, jax.profiler "
            "and Mosaic GPU's profiler; a container may have to allow it"
        )
    # Integers first: nanoseconds since 1970 are more than a float64 can tell apart.
    origin = min(e.start_ns() for e in events)
    seen += [
        Kernel(e.name(), (e.start_ns() - origin) / 1e3, (e.end_ns() - origin) / 1e3) for e in events
    ]
    seen.sort(key=lambda k: (k.start_us, k.end_us))
