"""README's table of times, rendered from the committed records alone."""

from parity.report import ROOT, TWINS, Line, Results, days_of, name_of, short_us, versions_of

README = ROOT / "README.md"
BEGIN, END = "<!-- parity:records -->", "<!-- /parity:records -->"


def table(results: Results) -> str:
    """The Markdown between the markers."""
    if not results.records:
        return (
            "Nothing is recorded yet: `parity bench` on a Hopper GPU writes the rows, `make docs` "
            "renders them here."
        )
    parts = []
    for device in results.records:
        lines = results.lines(device)
        rows = [row for line in lines for row in line.rows.values()]
        parts.append(
            f"{device}; {versions_of(rows)}; {days_of(rows)}. *us* is the median of device time, "
            "*roof* the least time the work needs at the rates measured in the same run over *us*, "
            "*x* the fastest peer's time over ours (above 1 ours is faster; bold where the verdict "
            "is FASTER).\n\n"
            "| workload | pass | Triton us | roof | x | Pallas us | roof | x | fastest peer | us "
            "|\n"
            "|---|---|--:|--:|--:|--:|--:|--:|---|--:|\n"
            + "\n".join(_markdown(line) for line in lines)
        )
    return "\n\n".join(parts)


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
