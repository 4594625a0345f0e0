"""Two runs beside each other, on synthetic intervals; and what is no comparison at all."""

import json
import subprocess
from pathlib import Path

import pytest

from parity import cli, diff, record

Us = tuple[float, float, float]
H200, H100 = "NVIDIA H200", "NVIDIA H100"


def row(us: Us | None, impl: str = "triton", device: str = H200, **more) -> record.Row:
    times = dict(zip(("p10", "p50", "p90"), us, strict=True)) if us else None
    number = dict.fromkeys(("error", "yardstick", "busy_us", "launch_us", "compile_s", "roof"), 1.0)
    return {
        "schema": 1,
        "problem": "softmax",
        "workload": "softmax_8192x8192",
        "pass": "fwd",
        "dtype": "bfloat16",
        "impl": impl,
        "device": device,
        "check": "pass",
        **number,
        "us": times,
        "flops": 1.0,
        "bytes": 1.0,
        "ceilings": {"copy_gbps": 4200.0, "read_gbps": 4400.0, "gemm_tflops": 720.0},
        "config": {},
        "versions": {"triton": "3.6.0"},
        "commit": "abc",
        "source": "abc",
        "when": "2026-01-01T00:00:00+00:00",
    } | more


def written(path: Path, *rows: record.Row) -> str:
    for one in rows:
        record.append(path, one)
    return str(path)


def parity(*args: str) -> int:
    return cli.main(["diff", *args])


@pytest.fixture
def runs(tmp_path: Path):
    """Writes the two sides of one comparison: runs(old rows, new rows) -> their paths."""

    def write(old: list[record.Row], new: list[record.Row]) -> tuple[str, str]:
        for name in ("old.jsonl", "new.jsonl"):
            (tmp_path / name).unlink(missing_ok=True)
        return written(tmp_path / "old.jsonl", *old), written(tmp_path / "new.jsonl", *new)

    return write


VERDICTS = {
    "FASTER": ((98, 100, 102), (88, 90, 92)),
    "SLOWER": ((98, 100, 102), (108, 110, 112)),
    "SAME": ((98, 100, 102), (99, 101, 103)),
    # apart by 5 %, and yet one interval reaches into the other
    "UNDECIDED": ((98, 100, 104), (103, 105, 107)),
}
EDGES = {
    "disjoint, but under 2 % apart": ("SAME", (99.9, 100, 100.1), (101.5, 101.6, 101.7)),
    "just 2 % apart": ("SLOWER", (99.9, 100, 100.1), (101.9, 102, 102.1)),
    "touching": ("UNDECIDED", (98, 100, 105), (105, 107, 109)),
    "too noisy for a SAME": ("UNDECIDED", (80, 100, 120), (81, 101, 121)),
    "noisy, but far apart": ("FASTER", (180, 200, 240), (80, 100, 120)),
}


@pytest.mark.parametrize(
    ("verdict", "old", "new"),
    [*((v, *sides) for v, sides in VERDICTS.items()), *EDGES.values()],
    ids=[*VERDICTS, *EDGES],
)
def test_the_four_verdicts(verdict: str, old: Us, new: Us, runs, capsys):
    files = runs([row(old)], [row(new)])
    expected = 1 if verdict == "SLOWER" else 0
    assert parity(*files, "--fail-on", "slower", "--json") == expected
    said = json.loads(capsys.readouterr().out)
    assert said["counts"] == {verdict: 1} and said["ok"] is (expected == 0)
    assert [c["verdict"] for c in said["changes"]] == [verdict]
    assert parity(*files) == 0  # without --fail-on it only says so
    assert capsys.readouterr().out.startswith(f"1 {verdict.lower()} of 1 results (NVIDIA H200): ")


def test_the_conclusion_comes_first_and_then_what_changed(runs, capsys):
    (before, after), same = VERDICTS["SLOWER"], VERDICTS["SAME"][1]
    old = [row(before, impl) for impl in ("triton", "pallas", "peer:cublas", "gone")]
    new = [row(after, "triton", versions={"triton": "3.7.0"}), row(same, "pallas"),
           row(after, "peer:cublas"), row(before, "fresh")]  # fmt: skip
    files = runs(old, new)
    assert parity(*files) == 0
    out = capsys.readouterr().out
    assert out.startswith("1 slower, 1 same of 2 results")
    said = " ".join(out.split())  # as one line, however long the names of the files
    assert "Of the peers, whose code is not ours: 1 slower of 1 results. What else" in said
    assert "What else changed: triton 3.6.0 -> 3.7.0. Not compared: 1 only in" in said
    assert "0.91" in out and "pallas" not in out and "3 more with --all" in out
    assert parity(*files, "--all") == 0
    out = capsys.readouterr().out
    words = ("SLOWER", "SAME", "added", "removed")
    assert all(word in out for word in words) and "--all" not in out
    assert out.index("SLOWER") < out.index("SAME") < out.index("peer:cublas")


def test_a_slower_peer_fails_nobody_and_a_red_check_does(runs, capsys):
    before, after = VERDICTS["SLOWER"]
    files = runs([row(before, "peer:cublas")], [row(after, "peer:cublas")])
    assert parity(*files, "--fail-on", "slower") == 0
    files = runs([row(before)], [row(None, check="fail:norm")])
    assert parity(*files, "--fail-on", "slower") == 1
    assert "1 red of 1 results" in capsys.readouterr().out


def test_only_the_last_row_of_a_key_stands(runs):
    before, after = VERDICTS["SLOWER"]
    same = VERDICTS["SAME"][1]
    assert parity(*runs([row(before)], [row(after), row(same)]), "--fail-on", "slower") == 0
    assert parity(*runs([row(after), row(before)], [row(after)]), "--fail-on", "slower") == 1


def test_what_is_checked_but_no_longer_timed_is_said(runs, capsys):
    before, after = VERDICTS["SAME"]
    files = runs([row(before), row(before, "pallas")], [row(after), row(None, "pallas")])
    assert parity(*files) == 0
    assert "1 checked but not timed in" in capsys.readouterr().out


def test_a_truncated_line_is_refused_by_its_number_and_the_rest_compared(runs, capsys):
    old, new = runs([row((98, 100, 102))], [row((108, 110, 112))])
    with open(new, "a") as file:
        file.write('{"schema": 1, "probl')
    assert parity(old, new, "--fail-on", "slower") == 1
    out, err = capsys.readouterr()
    assert "1 slower" in out and err == f"parity: {new}:2 refused: truncated\n"


@pytest.mark.parametrize("content", ["", "\n\n", "not a record\n"])
def test_a_file_without_results_is_no_pass(content: str, runs, capsys):
    old, new = runs([row((98, 100, 102))], [])
    Path(new).write_text(content)
    assert parity(old, new, "--fail-on", "slower") == 2
    assert parity(new, old, "--fail-on", "slower") == 2
    assert "new.jsonl holds no result: nothing was compared" in capsys.readouterr().err


def test_nothing_in_common_is_no_pass(runs, capsys):
    assert parity(*runs([row((1, 2, 3))], [row((1, 2, 3), "other")]), "--fail-on", "slower") == 2
    assert "no result is in both" in capsys.readouterr().err


def test_other_devices_are_not_compared(runs, capsys):
    same = VERDICTS["SAME"]
    assert parity(*runs([row(same[0])], [row(same[1], device=H100)])) == 2
    err = capsys.readouterr().err
    assert H200 in err and H100 in err and err.count("\n") == 1
    # with one device in common that one is compared, and the other named
    both = [row(same[1]), row((1, 2, 3), device=H100)]
    assert parity(*runs([row(same[0])], both), "--all") == 0
    out = capsys.readouterr().out
    assert "1 same of 1 results (NVIDIA H200)" in out and H100 in out and "added" in out


def test_a_file_beside_itself_is_refused(runs, capsys):
    old, new = runs([row((98, 100, 102))], [row((98, 100, 102))])
    assert parity(old, old) == 2 and "the same" in capsys.readouterr().err
    # two files with the very same rows: nobody measured twice
    assert parity(old, new) == 2 and "nothing was measured" in capsys.readouterr().err


def test_a_misspelt_file_is_answered_with_its_neighbour(runs, capsys):
    old, new = runs([row((98, 100, 102))], [row((98, 100, 102))])
    assert parity(old, new.replace("new", "nwe")) == 2
    assert capsys.readouterr().err.endswith("did you mean 'new.jsonl'?\n")
    assert parity("--output=x") == 2  # no option of ours, and none of git's


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose records were committed twice: 100 us, then 90 us."""
    records = tmp_path / "records"

    def git(*words: str) -> None:
        identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True)

    monkeypatch.delenv("GIT_CEILING_DIRECTORIES", raising=False)
    git("init", "-q")
    for us in VERDICTS["FASTER"]:
        written(records / "nvidia_h200" / "softmax.jsonl", row(us))
        git("add", ".")
        git("commit", "-q", "-m", "rows")
    monkeypatch.setattr(record, "RECORDS", records)
    return records


def test_committed_records_are_the_reference(checkout: Path, tmp_path: Path, capsys):
    new = written(tmp_path / "new.jsonl", row((108, 110, 112)))
    assert parity(new, "--fail-on", "slower") == 1  # 90 us was committed last
    assert ": HEAD, then" in capsys.readouterr().out
    assert parity("HEAD~1", new, "--json") == 0
    assert json.loads(capsys.readouterr().out)["counts"] == {"SLOWER": 1}
    # the records here are those of HEAD, until someone measures
    assert parity() == 2 and "nothing was measured since" in capsys.readouterr().err
    assert parity("HEAD~1") == 0
    assert capsys.readouterr().out.startswith("1 faster of 1 results (NVIDIA H200): HEAD~1, then")
    written(checkout / "nvidia_h200" / "softmax.jsonl", row((98, 100, 102)))
    assert parity("--fail-on", "slower") == 1
    assert parity("HEAD~1", "HEAD", "--fail-on", "slower") == 0
    assert parity("HEAD~7") == 2 and "no file, folder or git revision" in capsys.readouterr().err


def test_without_git_the_records_that_came_along_are_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(record, "RECORDS", tmp_path)
    written(tmp_path / "softmax.jsonl", row((98, 100, 102)))
    assert diff.from_revision("HEAD") is None
    assert len(diff.committed().rows) == 1
