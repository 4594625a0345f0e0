"""Records: appended whole, read with foreign and truncated lines refused, the last row standing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parity import record


def row(**changes: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "problem": "softmax",
        "workload": "softmax_8192x8192",
        "pass": "fwd",
        "dtype": "bfloat16",
        "impl": "triton",
        "device": "NVIDIA H200",
        "check": "pass",
        "error": 1.7e-3,
        "yardstick": 1.6e-3,
        "us": {"p10": 66.0, "p50": 67.0, "p90": 68.0},
        "busy_us": 67.0,
        "launch_us": 50.0,
        "compile_s": 0.3,
        "flops": 3.3e8,
        "bytes": 2.7e8,
        "roof": 0.97,
        "ceilings": {"copy_gbps": 4120.0, "read_gbps": 4300.0, "gemm_tflops": 814.0},
        "config": {"block_m": 1},
        "versions": {"torch": "2.11.0"},
        "commit": "0123456789ab",
        "source": "ba9876543210",
        "when": "2026-11-20T14:00:00+00:00",
    } | changes


def lines(*rows: dict) -> bytes:
    return b"".join(json.dumps(r).encode() + b"\n" for r in rows)


def test_what_is_appended_is_read(tmp_path: Path):
    path = tmp_path / "device" / "softmax.jsonl"
    record.append(path, row())
    record.append(path, row(impl="pallas", us=None, ceilings=None, roof=None, error=None))
    found = record.read(path)
    assert [r["impl"] for r in found.rows] == ["triton", "pallas"] and found.refused == ()
    assert found.rows[0] == row()


def test_a_file_that_is_not_there_has_no_rows(tmp_path: Path):
    assert record.read(tmp_path / "no.jsonl") == record.Records((), ())


def test_the_last_row_of_a_key_stands():
    old, new = row(roof=0.5), row(roof=0.9)
    found = record.parse(lines(old, row(impl="pallas"), new, row(**{"pass": "bwd"})))
    assert len(found.rows) == 4 and len(found.latest) == 3
    assert found.latest[record.key(new)]["roof"] == 0.9


def test_not_measured_is_null_never_nan(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    record.append(path, row(error=float("nan"), versions={"a": [float("inf")]}))
    assert record.read(path).rows[0]["error"] is None
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"[1, 2]", "not a JSON object"),
        (b"not json", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'{"schema": 1', "not JSON"),
        (b"{}", "schema is None"),
        (b"[" * 100_000, "not JSON"),
        (lines(row(schema=2)).strip(), "schema is 2"),
        (lines(row(schema=True)).strip(), "schema is True"),
        (lines(row(impl=None)).strip(), "impl: expected text"),
        (lines(row(check="maybe")).strip(), "check: expected pass"),
        (lines(row(check="fail:")).strip(), "check: expected pass"),
        (lines(row(flops="1")).strip(), "flops: expected a number"),
        (lines(row(roof=True)).strip(), "roof: expected a number"),
        (b'{"schema": 1, "problem": NaN}', "problem: expected text"),
        (lines({k: v for k, v in row().items() if k != "roof"}).strip(), "roof is missing"),
        (lines({k: v for k, v in row().items() if k != "us"}).strip(), "us is missing"),
        (lines(row(config=[])).strip(), "config: expected an object"),
        (lines(row(us={"p10": 1, "p50": 2})).strip(), "us: expected p10, p50 and p90"),
        (lines(row(us={"p10": 3, "p50": 2, "p90": 4})).strip(), "p10 <= p50"),
        (lines(row(us={"p10": 0, "p50": 2, "p90": 4})).strip(), "0 < p10"),
        (lines(row(ceilings={})).strip(), "ceilings: expected"),
    ],
)
def test_a_foreign_line_is_refused_by_its_number(line: bytes, why: str):
    found = record.parse(lines(row()) + line + b"\n" + lines(row(impl="pallas")))
    assert [r["impl"] for r in found.rows] == ["triton", "pallas"]
    (refused,) = found.refused
    assert refused.line == 2 and why in refused.why


def test_blank_lines_are_nothing():
    found = record.parse(b"\n" + lines(row()) + b"  \n\r\n")
    assert len(found.rows) == 1 and found.refused == ()


def test_every_truncation_keeps_the_rows_before_it():
    whole = lines(row(), row(impl="pallas"))
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole) - 1, 7):
        found = record.parse(whole[:end])
        assert [r["impl"] for r in found.rows] == ["triton"]
        assert [(r.line, r.why) for r in found.refused] == (
            [(2, "truncated")] if end > first else []
        )
    assert len(record.parse(whole[:-1]).rows) == 2  # only the line's end is missing


def test_appending_behind_a_truncated_line_spoils_nothing(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines(row()) + lines(row(impl="pallas"))[:40])
    record.append(path, row(impl="peer:cublas"))
    found = record.read(path)
    assert [r["impl"] for r in found.rows] == ["triton", "peer:cublas"]
    assert [r.line for r in found.refused] == [2]


def test_a_row_that_breaks_the_schema_is_not_written(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    record.append(path, row())
    before = path.read_bytes()
    with pytest.raises(ValueError, match="dtype: expected text"):
        record.append(path, row(dtype=None))
    with pytest.raises(ValueError, match="flops"):
        record.append(path, row(flops=float("nan")))
    assert path.read_bytes() == before


text = st.text(max_size=20)


@given(st.lists(st.one_of(st.binary(max_size=60), text.map(lambda t: lines(row(impl=t))))))
def test_any_content_gives_rows_and_refusals_and_no_exception(parts: list[bytes]):
    found = record.parse(b"\n".join(parts))
    assert all(record.wrong_with(r) == "" for r in found.rows)
    numbers = [r.line for r in found.refused]
    assert numbers == sorted(set(numbers))


@given(st.lists(st.tuples(text, text), max_size=6))
def test_rows_survive_any_text(pairs: list[tuple[str, str]]):
    rows = [row(impl=a, workload=b) for a, b in pairs]
    found = record.parse(b"".join(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in rows))
    assert list(found.rows) == rows


def test_a_killed_run_leaves_whole_rows(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    code = (
        "import itertools, json, pathlib, sys; from parity import record\n"
        "row = json.loads(sys.argv[2])\n"
        "for i in itertools.count():\n"
        "    record.append(pathlib.Path(sys.argv[1]), row | {'workload': f'w{i}'})\n"
    )
    root = str(Path(record.__file__).parent.parent)
    env = {**os.environ, "PYTHONPATH": root}
    run = subprocess.Popen([sys.executable, "-c", code, str(path), json.dumps(row())], env=env)
    try:
        deadline = time.monotonic() + 30
        while not (path.exists() and path.stat().st_size > 3000):
            assert time.monotonic() < deadline and run.poll() is None
            time.sleep(0.01)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    found = record.read(path)
    assert len(found.rows) >= 3
    assert [r["workload"] for r in found.rows] == [f"w{i}" for i in range(len(found.rows))]
    assert [r.why for r in found.refused] in ([], ["truncated"])


def test_places_and_hashes(tmp_path: Path):
    assert record.slug("NVIDIA H200") == "nvidia_h200" and record.slug("") == "unknown"
    assert record.path_for("NVIDIA H200", "softmax", tmp_path) == (
        tmp_path / "nvidia_h200" / "softmax.jsonl"
    )
    record.append(record.path_for("NVIDIA H200", "softmax", tmp_path), row())
    assert list(record.read_device("NVIDIA H200", tmp_path)) == ["softmax"]
    source = tmp_path / "kernel.py"
    source.write_text("one")
    before = record.source_hash(source, "a")
    source.write_text("two")
    assert len(before) == 12 and (after := record.source_hash(source, "a")) != before
    (tmp_path / "kernel_part.py").write_text("three")
    assert record.source_hash(source, "a") != after
    assert record.identity(a=1, b=[2]) == record.identity(b=[2], a=1) != record.identity(a=1, b=[3])


def test_the_committed_records_are_rows():
    for path in record.RECORDS.rglob("*.jsonl"):
        found = record.read(path)
        assert found.rows and not found.refused, f"{path}: {found.refused[:3]}"
