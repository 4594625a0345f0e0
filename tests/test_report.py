"""The report: tables that fit a terminal, README's table, coverage without a gap."""

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from made_up import DEVICE, check, pretend
from rich.console import Console

from parity import cli, doctor, page, readme, record, report
from parity.commands import all as everything
from parity.commands import shared
from parity.problems import PROBLEMS


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return pretend(monkeypatch, tmp_path)


def printed(renderable, width: int) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_the_terminal(records: Path, width: int):
    results = report.Results.here()
    lines = results.lines(DEVICE)
    tables = {
        "bench": report.bench_table(lines, width),
        "check": report.check_table(results.checks, width),
        "compile": report.compile_table(results.compiles, width),
        "coverage": report.coverage_table(results, width),
    }
    for name, made in tables.items():
        text = printed(made, width)
        assert max(map(len, text.splitlines())) <= width, name
        words = {"bench": "rms_norm_16384x4096_residual", "coverage": "softmax_8192x8192_causal"}
        assert words.get(name, "pallas") in text, f"{name}: a name was broken over two lines"
    assert "[p10 p90]" in printed(tables["bench"], width)


def test_verdicts_beside_the_best_peer(records: Path):
    results = report.Results.here()
    lines = {(x.workload, x.which): x for x in results.lines(DEVICE)}
    line = lines["softmax_8192x8192", "fwd"]
    assert line.best_peer is not None and line.versus_peer("triton") == (100 / 95, "FASTER")
    assert line.versus_peer("pallas") == (100 / 110, "SLOWER")
    red = lines["gemm_4096", "bwd"]
    assert red.us("pallas") is None and red.versus_peer("pallas") is None
    text = printed(report.bench_table([red], 120), 120)
    assert "fail:tile" in text and "FASTER" in text
    assert "Not timed because their check is red: 1" in report.sentence_of_lines([red])


def test_coverage_has_no_empty_cell(records: Path):
    results = report.Results.here()
    cells = list(results.coverage())
    assert len(cells) == sum(len(w.passes) for p in PROBLEMS for w in p.workloads)
    assert all(set(c) == set(p.implementations) for p, _, _, c in cells)
    assert all(cell.text for *_, c in cells for cell in c.values())
    found = {(w.name, which): c for p, w, which, c in cells if p.stem != "rms_norm"}
    assert found["gemm_4096", "fwd"]["triton"].state == "timed"
    assert found["gemm_4096", "bwd"]["pallas"] == report.Cell("red", "fail: tile")
    assert found["gemm_49152_49152_512", "fwd"]["triton"].state == "missing"


def test_a_result_of_another_source_is_outdated(records: Path):
    results = report.Results.here()
    old = {key: dict(r, source="old") for key, r in results.records[DEVICE].items()}
    changed = dataclasses.replace(results, records={DEVICE: old})
    states = Counter(c.state for *_, cells in changed.coverage() for c in cells.values())
    assert states["timed"] == 0 and states["stale"] > 0
    assert "passes; 20 rows are outdated: a kernel has changed since" in readme.table(changed)
    kept = [dict(c, source="old") for c in results.checks]
    changed = dataclasses.replace(results, checks=tuple(kept))
    found = {(p.stem, w.name, which): c for p, w, which, c in changed.coverage()}
    assert found["softmax", "ci", "fwd"]["triton"].state == "stale"


def test_the_last_row_of_a_key_stands_and_a_cut_line_is_nothing(records: Path):
    target = {"triton": "triton_kernels.softmax:x"}
    report.keep_checks([check("triton", error=3e-4)], "cpu", target)
    with open(report.LOCAL / "check-cpu.jsonl", "a") as file:
        file.write('{"problem": "softmax", "workl')
    checks = {row["impl"]: row for row in report.Results.here().checks}
    assert checks["triton"]["error"] == 3e-4 and len(checks) == 2
    assert checks["pallas"]["error"] is None  # NaN is not JSON


def test_refused_lines_are_named(records: Path, capsys):
    path = record.path_for(DEVICE, "softmax", records)
    with open(path, "a") as file:
        file.write('{"schema": 2}\n')
    line = len(path.read_text().splitlines())
    assert report.Results.here().refused == (
        ("records/nvidia_h200/softmax.jsonl", line, "schema is 2, expected 1"),
    )
    assert cli.main(["report"]) == 0
    out, err = capsys.readouterr()
    assert f"softmax.jsonl:{line} refused" in err and "softmax_8192x8192" in out


def test_readmes_table_is_rendered_between_its_markers(records, tmp_path, monkeypatch, capsys):
    file = tmp_path / "README.md"
    file.write_text(f"# Title\n\n{readme.BEGIN}\nold\n{readme.END}\n\nThe end.\n")
    monkeypatch.setattr(readme, "README", file)
    assert cli.main(["report", "--readme", "--check"]) == 1
    assert "old" in file.read_text()
    assert cli.main(["report", "--readme"]) == 0
    text = file.read_text()
    assert text.startswith(f"# Title\n\n{readme.BEGIN}\n") and text.endswith("\n\nThe end.\n")
    assert "| `softmax_8192x8192` | fwd | 95.0 | 95 % | **1.05** | 110 | 82 % | 0.91 |" in text
    assert "| `gemm_4096` | bwd | 95.0 | 95 % | **1.05** | fail:tile |  |  |" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {8, 11}  # the summary; every row
    lines = [x for x in report.Results.here().lines(DEVICE) if x.problem == "softmax"]
    forwards = sum(line.which == "fwd" for line in lines)
    assert f"| `softmax` | fwd | {forwards} | 95 (95 to 95) | 1.05 (1.05 to 1.05) | 82 " in text
    assert f"<code>softmax</code>: {len(lines)} passes</summary>" in text
    assert cli.main(["report", "--readme", "--check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ok"]
    file.write_text("no markers")
    assert cli.main(["report", "--readme"]) == 3


def test_the_checkouts_readme_is_as_rendered():
    text = (Path(__file__).parent.parent / "README.md").read_text()
    assert readme.rendered(text, report.Results.here()) == text, "run `make docs`"


def test_report_json_and_html_together(records, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(page, "html", lambda results: "<!doctype html>")
    file = tmp_path / "deep" / "page.html"
    assert cli.main(["report", "--html", str(file), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert Path(said["html"]) == file and file.read_text().startswith("<!doctype html>")
    assert len(said["coverage"]) == sum(len(w.passes) for p in PROBLEMS for w in p.workloads)
    assert cli.main(["report", "--html", str(tmp_path)]) == 2
    assert cli.main(["report", "--html", str(file / "below.html")]) == 2
    said = capsys.readouterr().err
    assert "a folder; name a file in it" in said and "below.html" in said
    with pytest.raises(OSError):
        report.replace_text(file.parent, "text")
    assert not list(tmp_path.rglob("*.part"))


def test_error_over_yardstick():
    assert report.ratio({"error": 3e-4, "yardstick": 2e-4}) == "1.50"
    assert report.ratio({"error": 0.0, "yardstick": 0.0}) == "exact"
    assert report.ratio({"error": None, "yardstick": None}) == ""
    assert report.ratio({"error": float("nan"), "yardstick": 1.0}) == ""


def test_colour_only_where_it_is_wanted(records: Path):
    code = "import sys; from parity import cli; sys.exit(cli.main(['report', '--coverage']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "\x1b" not in done.stdout and "triton" in done.stdout


def test_all_says_where_the_report_is_and_takes_the_worst_code(
    records, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(doctor, "machine", lambda: doctor.Machine((), "", "no driver"))
    monkeypatch.setattr(page, "html", lambda results: "<!doctype html>")
    monkeypatch.setattr(everything, "PAGE", tmp_path / "index.html")
    monkeypatch.setattr(everything, "judged", lambda *a, **k: ([check("triton")], []))
    kernel = {"problem": "softmax", "workload": "w", "pass": "fwd", "twin": "triton", "kernel": "k"}
    good = kernel | {"status": "ok", "message": ""}
    monkeypatch.setattr(everything, "gated", lambda *a, **k: ([good], []))
    assert cli.main(["all"]) == 0
    out = capsys.readouterr().out
    assert f"The report is in {tmp_path / 'index.html'}" in out
    assert "All 1 checks pass" in out and "All 1 kernels pass" in out
    bad = good | {"status": "fail", "message": "spills 8 bytes"}
    monkeypatch.setattr(everything, "gated", lambda *a, **k: ([bad], []))
    assert cli.main(["all", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["exit"] == 1 and said["compile"]["kernels"][0]["message"] == "spills 8 bytes"

    def broken(*a, **k):
        raise everything.Stop(shared.ENVIRONMENT, "no twin can run here")

    monkeypatch.setattr(everything, "judged", broken)
    monkeypatch.setattr(everything, "gated", lambda *a, **k: ([good], []))
    assert cli.main(["all"]) == 3
