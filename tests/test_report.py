"""The report: tables that fit, a page that stands alone, README's table, coverage without a gap."""

import dataclasses
import html.parser
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from parity import cli, doctor, record, report
from parity.commands import all as everything
from parity.commands import shared
from parity.problems import PROBLEMS

DEVICE = "NVIDIA H200"


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
        "source": report.Results.here()._file_hash(problem.implementations.get(impl, "")),
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


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Records of every model workload, one twin red, one peer missing; checks and compile rows."""
    root, local = tmp_path / "records", tmp_path / "results"
    monkeypatch.setattr(report, "LOCAL", local)
    times = {"triton": 95.0, "pallas": 110.0}
    for p in PROBLEMS:
        for w in p.workloads:
            for which in w.passes if "model" in w.tags and "huge" not in w.tags else ():
                for impl in (*p.implementations, *(f"peer:{name}" for name in p.peers)):
                    us = times.get(impl, 100.0)
                    red = (w.name, which, impl) == ("gemm_4096", "bwd", "pallas")
                    more = {"check": "fail:tile", "note": "tile <3>"} if red else {}
                    made = row(p, w, which, impl, None if red else us, **more)
                    record.append(record.path_for(DEVICE, p.stem, root), made)
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


class Page(html.parser.HTMLParser):
    """What a screen reader and a link checker look for."""

    VOID = frozenset("meta link br img input hr path use line".split())

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, dict]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags[tag] += 1
        self.attributes.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags[tag] += 1
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"


def test_the_page_stands_alone_and_is_well_formed(records: Path):
    text = report.html(report.Results.here())
    page = Page(text)
    assert not page.open
    assert page.tags["script"] == 0 and "&lt;script&gt;alert(1)" in text
    assert page.tags["table"] == page.tags["caption"] == 6
    for tag, attributes in page.attributes:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#"), (tag, attributes)
        assert tag != "th" or attributes.get("scope") in ("col", "row")
        if attributes.get("class") == "scroll":
            assert attributes["tabindex"] == "0" and attributes["aria-label"]
    assert not re.search(r"url\((?!#)|@import", text)
    assert "prefers-color-scheme: dark" in text and '<html lang="en">' in text
    ids = [a["id"] for _, a in page.attributes if "id" in a]
    anchors = [a["href"][1:] for tag, a in page.attributes if tag == "a"]
    assert set(anchors) <= set(ids)
    images = [a for _, a in page.attributes if a.get("role") == "img"]
    assert len(images) == len(PROBLEMS)
    assert all("share of the roof" in a["aria-label"] for a in images)
    assert "softmax_8192x8192 fwd: triton 95 %, pallas 82 %" in text


def test_the_page_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(report, "LOCAL", tmp_path)
    page = Page(report.html(report.Results.here(tmp_path)))
    assert not page.open and page.tags["table"] == 1


def test_charts_take_the_pages_colours(records: Path):
    svg, alt = report.chart(report.Results.here().lines(DEVICE), "all")
    assert svg.startswith("<svg ") and "var(--triton)" in svg and "var(--ink)" in svg
    assert "gemm_8192 fwd" in alt and "w3.org/1999/xlink" in svg
    assert report.chart(report.Results.here().lines(DEVICE), "all")[0] == svg


def test_readmes_table_is_rendered_between_its_markers(records, tmp_path, monkeypatch, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nThe end.\n")
    monkeypatch.setattr(report, "README", readme)
    assert cli.main(["report", "--readme", "--check"]) == 1
    assert "old" in readme.read_text()
    assert cli.main(["report", "--readme"]) == 0
    text = readme.read_text()
    assert text.startswith(f"# Title\n\n{report.BEGIN}\n") and text.endswith("\n\nThe end.\n")
    assert "| `softmax_8192x8192` | fwd | 95.0 | 95 % | **1.05** | 110 | 82 % | 0.91 |" in text
    assert "| `gemm_4096` | bwd | 95.0 | 95 % | **1.05** | fail:tile |  |  |" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
    assert cli.main(["report", "--readme", "--check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ok"]
    readme.write_text("no markers")
    assert cli.main(["report", "--readme"]) == 3


def test_the_checkouts_readme_has_the_markers():
    text = (Path(__file__).parent.parent / "README.md").read_text()
    assert report.BEGIN in report.render_readme(text, report.Results.here())


def test_report_json_and_html_together(records, tmp_path, capsys):
    page = tmp_path / "deep" / "page.html"
    assert cli.main(["report", "--html", str(page), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert Path(said["html"]) == page and page.read_text().startswith("<!doctype html>")
    assert len(said["coverage"]) == sum(len(w.passes) for p in PROBLEMS for w in p.workloads)
    assert not list(page.parent.glob("*.part"))


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
    monkeypatch.setattr(everything, "PAGE", tmp_path / "index.html")
    monkeypatch.setattr(everything, "judged", lambda *a, **k: ([check("triton")], []))
    kernel = {"problem": "softmax", "workload": "w", "pass": "fwd", "twin": "triton", "kernel": "k"}
    good = kernel | {"status": "ok", "message": ""}
    monkeypatch.setattr(everything, "gated", lambda *a, **k: ([good], []))
    assert cli.main(["all"]) == 0
    out = capsys.readouterr().out
    assert f"The report is in {tmp_path / 'index.html'}" in out
    assert "All 1 checks pass" in out and "All 1 kernels pass" in out
    monkeypatch.setattr(report, "html", lambda results: "<!doctype html>")
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
