"""Renders docs/tried.md: where a speed bar was missed or just met, and what was tried."""

import json
from pathlib import Path

HERE = Path(__file__).parent
RECORDS = HERE.parent / "parity" / "records" / "nvidia_h200"

INTRO = """# What was tried

Where a speed bar was hard to meet: what limits the twin, and the structures and
Configs that were tried, each with what it was predicted to give and what it gave on an H200, as
shares of a copy bandwidth of 4250 GB/s. What is shipped stands in the committed records, what was
tried and dropped in `docs/tried.jsonl`. Rendered by `make docs`.
"""


def main() -> None:
    (HERE / "tried.md").write_text(rendered())


def rendered() -> str:
    parts = [INTRO]
    for line in (HERE / "tried.jsonl").read_text().splitlines():
        bar = json.loads(line)
        parts.append(
            f"\n## `{bar['workload']}`, {bar['pass']}, {bar['impl']}\n\n"
            f"Bar {bar['bar']:.2f}, recorded {_recorded(bar):.2f}. {bar['limits']}\n\n"
            "| tried | predicted | got |\n|---|---|---|\n"
        )
        parts += [f"| {t['what']} | {t['predicted']} | {t['got']} |\n" for t in bar["tried"]]
    return "".join(parts)


def _recorded(bar: dict) -> float:
    """The share of the roof in the last committed row of this workload, pass and twin."""
    key = ("workload", "pass", "impl")
    rows = map(json.loads, (RECORDS / f"{bar['problem']}.jsonl").read_text().splitlines())
    return [row["roof"] for row in rows if all(row[k] == bar[k] for k in key)][-1]
