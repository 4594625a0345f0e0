"""README's tables of times, rendered from the committed records alone."""

import statistics
from collections.abc import Callable, Sequence

from parity.report import ROOT, TWINS, Line, Results, days_of, name_of, short_us, versions_of

README = ROOT / "README.md"
BEGIN, END = "<!-- parity:records -->", "<!-- /parity:records -->"
SUMMARY = (
    "| problem | pass | workloads | Triton roof, % | x | Pallas roof, % | x |\n"
    "|---|---|--:|--:|--:|--:|--:|\n"
)
ROWS = (
    "| workload | pass | Triton us | roof | x | Pallas us | roof | x | fastest peer | us |\n"
    "|---|---|--:|--:|--:|--:|--:|--:|---|--:|\n"
)


def table(results: Results) -> str:
    """The Markdown between the markers: a line for each problem, and its rows to unfold."""
    if not results.records:
        return (
            "Nothing is recorded yet: `parity bench` on a Hopper GPU writes the rows, `make docs` "
            "renders them here."
        )
    return "\n\n".join(_of_device(results, device) for device in results.records)


def _of_device(results: Results, device: str) -> str:
    lines = results.lines(device)
    rows = [row for line in lines for row in line.rows.values()]
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((line.problem, line.which), []).append(line)
    parts = [
        f"{device}; {versions_of(rows)}; {days_of(rows)}. *roof* is the least time the work needs "
        "at the rates measured in the same run over the median of its device time, *x* the fastest "
        "peer's time over ours (above 1 ours is faster). Here their median and geometric mean over "
        "a problem's workloads, with the least and the most; below, every row, bold where the "
        "verdict is FASTER, times (*us*) in microseconds.",
        SUMMARY + "\n".join(_summary(*key, of_key) for key, of_key in groups.items()),
    ]
    for stem in dict.fromkeys(line.problem for line in lines):
        mine = [line for line in lines if line.problem == stem]
        old = sum(results.stale(row) for line in mine for row in line.rows.values())
        aged = f"; {old} rows are outdated: a kernel has changed since" if old else ""
        parts.append(
            f"<details><summary><code>{stem}</code>: {len(mine)} passes{aged}</summary>\n\n"
            + ROWS
            + "\n".join(_markdown(line) for line in mine)
            + "\n\n</details>"
        )
    return "\n\n".join(parts)


def _summary(stem: str, which: str, lines: Sequence[Line]) -> str:
    cells = [f"`{stem}`", which, str(len(lines))]
    for twin in TWINS:
        roofs = [100 * r["roof"] for x in lines if (r := x.rows.get(twin)) and r["roof"]]
        ratios = [beside[0] for line in lines if (beside := line.versus_peer(twin))]
        cells.append(_spread(statistics.median, roofs, "{:.0f}"))
        cells.append(_spread(statistics.geometric_mean, ratios, "{:.2f}"))
    return "| " + " | ".join(cells) + " |"


def _spread(middle: Callable[[Sequence[float]], float], found: Sequence[float], form: str) -> str:
    """The middle of some numbers, and the least and the most of them."""
    if not found:
        return ""
    shown = form.format(middle(found))
    if len(found) == 1:
        return shown
    return f"{shown} ({form.format(min(found))} to {form.format(max(found))})"


def _markdown(line: Line) -> str:
    cells = [f"`{line.workload}`", line.which]
    for twin in TWINS:
        row, us, beside = line.rows.get(twin), line.us(twin), line.versus_peer(twin)
        if row is None or us is None:
            cells += [row["check"] if row and row["check"] != "pass" else "", "", ""]
            continue
        share = f"{100 * row['roof']:.0f} %" if row["roof"] else ""
        ratio = f"{beside[0]:.2f}" if beside else ""
        cells += [
            short_us(us.p50),
            share,
            f"**{ratio}**" if beside and beside[1] == "FASTER" else ratio,
        ]
    peer = line.best_peer
    peer_us = line.us(peer) if peer else None
    cells += [name_of(peer) if peer else "none", short_us(peer_us.p50) if peer_us else ""]
    return "| " + " | ".join(cells) + " |"


def rendered(text: str, results: Results) -> str:
    """README with the table between its markers rendered again.

    Raises:
        ValueError: the markers are missing or in the wrong order.
    """
    begin, end = text.find(BEGIN), text.find(END)
    if not 0 <= begin < end:
        raise ValueError(f"expected {BEGIN} ... {END} in it")
    return f"{text[: begin + len(BEGIN)]}\n{table(results)}\n{text[end:]}"
