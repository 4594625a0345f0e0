"""Hardware counters of each kernel, from Nsight Compute's command line tool, where it is and may.

`ncu` runs a process of its own that calls one twin once (parity.frameworks.counted): it replays
each kernel several times to read all counters, so its times are never taken for speed. Clocks are
left as they are. Metric names and the CSV's columns are those of NVIDIA's Nsight Compute CLI and
Kernel Profiling Guide.
"""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS = {
    "dram__bytes_read.sum": "dram_read_bytes",
    "dram__bytes_write.sum": "dram_write_bytes",
    "dram__sectors_read.sum": "dram_read_sectors",
    "dram__sectors_write.sum": "dram_write_sectors",
    "lts__t_sector_hit_rate.pct": "l2_hit",
    "l1tex__t_sector_hit_rate.pct": "l1_hit",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "tensor",
    "smsp__inst_executed.sum": "instructions_executed",
}
_STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
STALLS = {
    "long_scoreboard": "for memory",
    "short_scoreboard": "for shared memory or special functions",
    "barrier": "for other warps at a barrier",
    "gmma": "for the tensor cores",
    "wait": "a fixed time for an earlier instruction",
    "math_pipe_throttle": "for a busy arithmetic unit",
    "mio_throttle": "for the shared memory queue",
    "lg_throttle": "for the queue of loads",
    "membar": "for a memory fence",
    "sleeping": "asleep",
    "no_instruction": "for instructions to be fetched",
    "not_selected": "because another warp went first",
}


class NoCounters(RuntimeError):
    """Counters cannot be read here; the message is one sentence that says why."""


def counters(
    target: str,
    stem: str,
    workload: str,
    which: str,
    twin: str,
    timeout: float = 240.0,
) -> list[dict[str, Any]]:
    """Each kernel of one call, in order: {"name", "dram_read_bytes", ..., "stalls": {reason: ..}}.

    stalls: warps that stand still for a reason, per instruction issued.

    Raises:
        NoCounters: there is no ncu, the driver forbids counters, or it saw no kernel.
    """
    ncu = shutil.which("ncu")
    if ncu is None:
        raise NoCounters("there is no ncu on the PATH (it is part of NVIDIA Nsight Compute)")
    metrics = [*METRICS, *(_STALL.format(reason) for reason in STALLS)]
    job = json.dumps([target, stem, workload, which, twin])
    code = f"from parity.frameworks.counted import main; main(*{job})"
    command = [
        ncu,
        *("--csv", "--print-units", "base", "--target-processes", "all"),
        *("--profile-from-start", "off", "--clock-control", "none"),
        *("--metrics", ",".join(metrics)),
        *(sys.executable, "-c", code),
    ]
    root = Path(__file__).resolve().parent.parent
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=root)
    except subprocess.TimeoutExpired:
        raise NoCounters(f"ncu was not done in {timeout:.0f} s") from None
    return read(done.stdout + "\n" + done.stderr)


def read(output: str) -> list[dict[str, Any]]:
    """What ncu printed, CSV and all. Raises NoCounters with the reason it gives."""
    if "ERR_NVGPUCTRPERM" in output:
        raise NoCounters(
            "the driver keeps performance counters for administrators (ERR_NVGPUCTRPERM; "
            "NVreg_RestrictProfilingToAdminUsers=0 opens them)"
        )
    lines = [line for line in output.splitlines() if line.startswith('"')]
    kernels: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines))):
        name, metric = row.get("Kernel Name"), row.get("Metric Name")
        if not name or not metric:
            continue
        kernel = kernels.setdefault(row["ID"], {"name": name, "stalls": {}})
        try:
            value = float(row["Metric Value"].replace(",", ""))
        except ValueError:  # "n/a"
            continue
        stall = re.fullmatch(_STALL.format(r"(\w+)").replace(".ratio", r"\.ratio"), metric)
        if stall:
            kernel["stalls"][stall[1]] = value
        elif metric in METRICS:
            kernel[METRICS[metric]] = value
    if not kernels:
        said = [line for line in output.splitlines() if "==ERROR==" in line or "Error" in line]
        why = said[0].replace("==ERROR==", "").strip() if said else "it printed no counters"
        raise NoCounters(f"ncu saw no kernel: {why}")
    return list(kernels.values())


def sentences(kernel: Mapping[str, Any], least: float) -> list[str]:
    """What the counters of one kernel say. least: bytes that the whole pass must move."""
    from parity.explain import number, size

    told = []
    read_bytes, written = kernel.get("dram_read_bytes"), kernel.get("dram_write_bytes")
    if read_bytes is not None and written is not None:
        sectors = kernel.get("dram_read_sectors", 0) + kernel.get("dram_write_sectors", 0)
        told.append(
            f"memory moved {size(read_bytes + written)} ({size(read_bytes)} read, "
            f"{sectors:.3g} sectors), {(read_bytes + written) / least:.2f} times the least"
        )
    for key, words in (
        ("l2_hit", "of L2's sectors were hits"),
        ("l1_hit", "of L1's sectors were hits"),
        ("occupancy", "of the warps that fit were there"),
        ("tensor", "of its cycles the tensor pipe was busy"),
    ):
        if kernel.get(key):
            told.append(f"{kernel[key]:.0f}% {words}")
    stalls = sorted(kernel["stalls"].items(), key=lambda item: -item[1])[:2]
    for reason, warps in stalls:
        if warps >= 0.1:
            words = STALLS.get(reason, "")
            told.append(
                f"{number(warps)} warps wait {words} ({reason}) for each instruction issued"
            )
    return told
