"""Records, checks and compile rows that nobody measured, for the tests of what is shown."""

import json
from functools import cache
from pathlib import Path

import pytest

from parity import record, report
from parity.problems import PROBLEMS

DEVICE = "NVIDIA H200"


@cache
def _results() -> report.Results:
    return report.Results.here()


@cache
def current(target: str, workload: str) -> str:
    """The hash of a twin's files, so that its rows are not outdated."""
    return _results()._hash(target, workload)


def row(problem, work, which: str, impl: str, us: float | None, **more) -> dict:
    cost = problem.cost(work, which)
    return {
        "schema": 1,
        "problem": problem.stem,
        "workload": work.name,
        "pass": which,
        "dtype": work.dtype,
        "impl": impl,
        "device": DEVICE,
        "check": "none" if impl.startswith("peer:") else "pass",
        "error": 1.7e-3,
        "yardstick": 1.6e-3,
        "us": us and {"p10": us * 0.995, "p50": us, "p90": us * 1.005},
        "busy_us": us,
        "launch_us": 12.0,
        "compile_s": 3.0,
        "flops": cost.flops,
        "bytes": cost.bytes,
        "roof": us and 90.0 / us,
        "ceilings": {"copy_gbps": 4200.0, "read_gbps": 4400.0, "gemm_tflops": 720.0},
        "config": {"block_m": 128},
        "versions": {"torch": "2.11.0", "triton": "3.6.0", "jax": "0.11.2"},
        "commit": "0123456789ab",
        "source": current(problem.implementations.get(impl, ""), work.name),
        "when": "2026-01-02T03:04:05+00:00",
    } | more


def check(impl: str, ok: bool = True, **more) -> dict:
    return {
        "problem": "softmax",
        "workload": "ci",
        "which": "fwd",
        "impl": impl,
        "dtype": "float16",
        "ok": ok,
        "reason": "" if ok else "tile",
        "detail": "" if ok else "y: tile 3 <script>alert(1)</script>; first at [192, 7]",
        "error": float("nan") if not ok else 2e-4,
        "yardstick": 2e-4,
        "verdicts": [],
        "seconds": 1.0,
        "ulp": {"0": 0.97, "1": 0.03},
    } | more


def write(root: Path, stem: str, rows: list[dict], device: str = DEVICE) -> None:
    """Appends rows, without a flush to the disk for each."""
    assert not any(map(record.wrong_with, rows))
    path = record.path_for(device, stem, root)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.writelines(json.dumps(r) + "\n" for r in rows)


def pretend(monkeypatch: pytest.MonkeyPatch, where: Path) -> Path:
    """Records of every model workload, one twin red, one peer missing; checks and compile rows."""
    root = where / "records"
    monkeypatch.setattr(report, "LOCAL", where / "results")
    times = {"triton": 95.0, "pallas": 110.0}
    for p in PROBLEMS:
        rows = []
        for w in p.workloads:
            for which in w.passes if "model" in w.tags and "huge" not in w.tags else ():
                for impl in (*p.implementations, *(f"peer:{name}" for name in p.peers)):
                    us = times.get(impl, 100.0)
                    red = (w.name, which, impl) == ("gemm_4096", "bwd", "pallas")
                    more = {"check": "fail:tile", "note": "tile <3>"} if red else {}
                    rows.append(row(p, w, which, impl, None if red else us, **more))
        write(root, p.stem, rows)
    target = {"triton": "triton_kernels.softmax:x", "pallas": "pallas_kernels.softmax:x"}
    report.keep_checks([check("triton"), check("pallas", ok=False)], "cpu", target)
    kernel = {"problem": "softmax", "workload": "softmax_8192x8192", "pass": "fwd"}
    numbers = {"registers": 64, "spills": 0, "shared_bytes": 2048, "wgmma": 0, "tma_load": 2}
    report.keep_compiles(
        [
            kernel | numbers | {"twin": twin, "kernel": "k", "status": s, "message": m}
            for twin, s, m in (("triton", "ok", ""), ("pallas", "fail", "spills 8 bytes"))
        ]
    )
    monkeypatch.setattr(record, "RECORDS", root)
    here = report.Results.here
    monkeypatch.setattr(report.Results, "here", staticmethod(lambda: here(root)))
    return root
