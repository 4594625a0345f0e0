"""Renders docs/tried.md: where a speed bar was missed or just met, and what was tried."""

import json
from pathlib import Path

HERE = Path(__file__).parent
RECORDS = HERE.parent / "parity" / "records" / "nvidia_h200"

INTRO = """# What was tried

Where a speed bar was hard to meet: what limits the twin, and the structures and
Configs that were tried, each with what it was predicted to give and what it gave on an H200:
microseconds, or shares of a copy bandwidth of 4250 GB/s. What is shipped stands in the committed
records, what was tried and dropped in `docs/tried.jsonl`. Rendered by `make docs`.
"""


def main() -> None:
    (HERE / "tried.md").write_text(rendered())


def rendered() -> str:
    parts = [INTRO]
    for line in (HERE / "tried.jsonl").read_text().splitlines():
        bar = json.loads(line)
        parts.append(
            f"\n## `{bar['workload']}`, {bar['pass']}, {bar['impl']}\n\n"
            f"{_bar(bar)}{bar['limits']}\n\n"
            "| tried | predicted | got |\n|---|---|---|\n"
        )
        parts += [f"| {t['what']} | {t['predicted']} | {t['got']} |\n" for t in bar["tried"]]
    return "".join(parts)


def _bar(bar: dict) -> str:
    if bar["bar"] is None:
        return f"No bar; {bar['unit']}. "
    recorded = _recorded(bar)
    words = "not recorded yet" if recorded is None else f"recorded {recorded:.2f}"
    return f"Bar {bar['bar']:.2f} {bar['unit']}, {words}. "


def _recorded(bar: dict) -> float | None:
    """The last committed row of this workload, pass and twin: its share of the roof, or how much
    faster it is than the peer that the bar names."""
    last = {}
    file = RECORDS / f"{bar['problem']}.jsonl"
    for line in file.read_text().splitlines() if file.exists() else []:
        row = json.loads(line)
        if (row["workload"], row["pass"]) == (bar["workload"], bar["pass"]) and row["us"]:
            last[row["impl"]] = row
    ours, peer = last.get(bar["impl"]), last.get(f"peer:{bar.get('peer')}")
    if ours is None or "peer" not in bar:
        return None if ours is None else ours["roof"]
    return None if peer is None else peer["us"]["p50"] / ours["us"]["p50"]
