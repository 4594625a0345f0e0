"""The device: its facts, its clocks and why they are held back, and the ceilings of a run.

Clocks are only read. They come from NVML (the module `pynvml`), or else from nvidia-smi.
"""

import importlib
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from parity.timing import Ceilings, Kernel, Timing, quantile

# NVML's bits for why a clock is below what was asked for; idling is none of them
THROTTLE = {
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x20: "sw_thermal",
    0x40: "hw_thermal",
    0x80: "hw_power_brake",
}


class WarmCache(RuntimeError):
    """The control copy shows that the cache was not cold: no sample of this run counts."""


@dataclass(frozen=True)
class Reading:
    """Clocks at one moment."""

    sm_mhz: int
    memory_mhz: int
    throttle: tuple[str, ...]
    temperature_c: int = 0
    power_w: float = 0.0


def facts() -> dict[str, Any]:
    """The current CUDA device, its driver, and the rate at which its memory's pins can move bytes.

    hbm_gbps is the highest memory clock times two times the width of the bus, as NVML reports them;
    0 where it does not.
    """
    from parity.frameworks import ceilings

    found = ceilings.facts()
    return found | _nvml_facts(found["uuid"])


def reader(uuid: str) -> Callable[[], Reading | None]:
    """A function that reads the clocks now; it returns None where nobody tells them."""
    nvml = _nvml()
    if nvml is not None:
        module, handle = nvml[0], _handle(nvml[0], uuid)
        return lambda: _read_nvml(module, handle)
    if shutil.which("nvidia-smi"):
        return lambda: _read_smi(uuid)
    return lambda: None


def clocks(readings: Sequence[Reading | None]) -> dict[str, Any]:
    """Some readings as one JSON object: {} if there are none."""
    known = [r for r in readings if r is not None]
    if not known:
        return {}
    sm = [float(r.sm_mhz) for r in known]
    return {
        "sm_mhz": {"low": min(sm), "median": quantile(sm, 0.5), "high": max(sm)},
        "memory_mhz": min(r.memory_mhz for r in known),
        "throttle": sorted({why for r in known for why in r.throttle}),
        "temperature_c": max(r.temperature_c for r in known),
        "power_w": max(r.power_w for r in known),
    }


def contenders(nbytes: float, dtype: str) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """What runs beside the kernels so that their roof is of the same run: calls, and their work.

    Two ways to copy, of which the quicker is the roof; one to read; a dense product.
    """
    from parity.frameworks import ceilings

    made = {
        "ceiling:copy": ceilings.copy(nbytes),
        "ceiling:negate": ceilings.negate(nbytes),
        "ceiling:read": ceilings.read(nbytes),
        "ceiling:gemm": ceilings.gemm(dtype),
    }
    return {n: call for n, (call, _) in made.items()}, {n: work for n, (_, work) in made.items()}


def ceilings_of(timings: Mapping[str, Timing], work: Mapping[str, float]) -> Ceilings:
    """The rates the contenders reached, in their median sample."""
    return _ceilings({name: amount / timings[name].us.p50 for name, amount in work.items()})


def best_ceilings_of(timings: Mapping[str, Timing], work: Mapping[str, float]) -> Ceilings:
    """The rates the contenders reached in their best sample: nothing may be much faster."""
    return _ceilings({name: amount / timings[name].best_us for name, amount in work.items()})


def _ceilings(rate: Mapping[str, float]) -> Ceilings:  # per microsecond
    return Ceilings(
        copy_gbps=max(rate["ceiling:copy"], rate["ceiling:negate"]) / 1e3,
        read_gbps=rate["ceiling:read"] / 1e3,
        gemm_tflops=rate["ceiling:gemm"] / 1e6,
    )


def prove_cold(
    trace: Callable[[Sequence[Callable[[], Any]]], Sequence[Sequence[Kernel]]],
    hbm_gbps: float,
    repeats: int = 10,
) -> dict[str, float]:
    """Copies something that fits in L2, twice a sample: the first copy must come from memory.

    Returns {"cold_gbps", "warm_gbps"} of the two.

    Raises:
        WarmCache: the first copy was faster than the memory's pins, or as fast as the second.
    """
    from parity.frameworks import ceilings

    call, moved = ceilings.control()
    return judge_control(trace([call] * (repeats + 2))[2:], moved, hbm_gbps)


def judge_control(
    samples: Sequence[Sequence[Kernel]], moved: float, hbm_gbps: float
) -> dict[str, float]:
    """`prove_cold` on a trace: `moved` bytes a copy, two copies a sample."""
    pairs = [sorted(s, key=lambda k: k.start_us) for s in samples]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise WarmCache("the control ran other kernels than its two copies")
    cold, warm = (
        moved / quantile([p[i].end_us - p[i].start_us for p in pairs], 0.5) / 1e3 for i in (0, 1)
    )
    if hbm_gbps and cold > hbm_gbps:
        raise WarmCache(
            f"a copy ran at {cold:.0f} GB/s after the flush, and the memory cannot do more than "
            f"{hbm_gbps:.0f}: it came from the cache"
        )
    if cold > 0.9 * warm:
        raise WarmCache(
            f"a copy ran at {cold:.0f} GB/s after the flush and at {warm:.0f} GB/s without one: "
            "the flush did nothing"
        )
    return {"cold_gbps": cold, "warm_gbps": warm}


def _nvml() -> tuple[Any] | None:
    try:
        pynvml = importlib.import_module("pynvml")
        pynvml.nvmlInit()
    except Exception:  # no module, no driver, or no right to ask it
        return None
    return (pynvml,)


def _handle(nvml: Any, uuid: str) -> Any:
    name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    try:
        return nvml.nvmlDeviceGetHandleByUUID(name)
    except nvml.NVMLError:
        return nvml.nvmlDeviceGetHandleByIndex(0)


def _read_nvml(nvml: Any, handle: Any) -> Reading | None:
    try:
        bits = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        return Reading(
            nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            tuple(why for bit, why in THROTTLE.items() if bits & bit),
            nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
        )
    except nvml.NVMLError:
        return None


_QUERY = "clocks.sm,clocks.mem,clocks_throttle_reasons.active,temperature.gpu,power.draw"


def _read_smi(uuid: str) -> Reading | None:
    name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits", "-i", name]
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_smi(out)


def parse_smi(out: str) -> Reading | None:
    """One line of nvidia-smi's answer; fields it does not know read "[N/A]"."""
    fields = [f.strip() for f in out.strip().splitlines()[0].split(",")] if out.strip() else []
    try:
        bits = int(fields[2], 16)
        return Reading(
            int(fields[0]),
            int(fields[1]),
            tuple(why for bit, why in THROTTLE.items() if bits & bit),
            int(fields[3]),
            float(fields[4]),
        )
    except (IndexError, ValueError):
        return None


def _nvml_facts(uuid: str) -> dict[str, Any]:
    nvml = _nvml()
    if nvml is None:
        return {"driver": "", "hbm_gbps": 0.0}
    module = nvml[0]
    handle = _handle(module, uuid)
    found: dict[str, Any] = {"driver": "", "hbm_gbps": 0.0}
    try:
        driver = module.nvmlSystemGetDriverVersion()
        found["driver"] = driver.decode() if isinstance(driver, bytes) else driver
        mhz = module.nvmlDeviceGetMaxClockInfo(handle, module.NVML_CLOCK_MEM)
        bits = module.nvmlDeviceGetMemoryBusWidth(handle)
        found["hbm_gbps"] = 2 * mhz * bits / 8 / 1e3
    except module.NVMLError:
        pass
    return found
