"""The report's page: it stands alone, leaves no cell empty, and a browser shows it to everybody."""

import html.parser
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from browser import PROGRAM, Browser, chromium
from made_up import DEVICE, check, pretend, row, write

from parity import drawings, page, report
from parity.problems import PROBLEMS

ROOT = Path(__file__).parent.parent
OTHER = {"triton": 200.0, "peer:cublas": 100.0}  # on another device
AA, AA_GRAPHICS = 4.5, 3.0  # WCAG 2.2: text, and marks that carry meaning


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return pretend(monkeypatch, tmp_path)


class Page(html.parser.HTMLParser):
    """What a screen reader and a link checker look for."""

    VOID = frozenset("meta link br wbr img input hr path use line".split())

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, dict]] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags[tag] += 1
        self.attributes.append((tag, dict(attrs)))
        if tag in ("td", "th"):
            self.cells.append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags[tag] += 1
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & {*self.open}:
            self.cells[-1] += data.strip()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of made-up results; gemm_8192 was measured three times, and once the twins' ULP."""
    where = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        root = pretend(patch, where)
        p = PROBLEMS[0]
        w = p.workload("gemm_8192")
        for commit, us in (("second000000", 94.0), ("third0000000", 80.0)):
            when = f"2026-02-0{len(commit) % 9 + (us < 90)}T00:00:00+00:00"
            for impl in ("triton", "peer:cublas"):
                more = {"commit": commit, "when": when, "ulp": {"0": 0.9, "1": 0.0999, ">8": 1e-4}}
                write(root, p.stem, [row(p, w, "fwd", impl, us, **more)])
        other = [row(p, w, "fwd", i, us, device="NVIDIA H100") for i, us in OTHER.items()]
        write(root, p.stem, other, "NVIDIA H100")
        file = where / "index.html"
        file.write_text(page.html(report.Results.here()))
    return file


def test_the_page_stands_alone_and_is_well_formed(made: Path):
    text = made.read_text()
    found = Page(text)
    assert not found.open
    assert found.tags["script"] == 1 and "&lt;script&gt;alert(1)" in text
    assert found.tags["table"] == found.tags["caption"] > len(PROBLEMS)
    for tag, attributes in found.attributes:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:,")), (tag, attributes)
        scopes = ("col", "row", "rowgroup", "colgroup")
        assert tag != "th" or attributes.get("scope") in scopes
        if attributes.get("class") == "scroll":
            assert attributes["tabindex"] == "0" and attributes["aria-label"]
    assert not re.search(r"url\((?!#)|@import", text)
    ids = [a["id"] for _, a in found.attributes if "id" in a]
    assert len(ids) == len(set(ids))
    wanted = [a["href"][1:] for tag, a in found.attributes if tag == "a"]
    for name in ("aria-labelledby", "aria-describedby"):
        wanted += [a[name] for _, a in found.attributes if name in a]
    assert set(wanted) <= set(ids)
    assert len(text) < 200_000 * len(PROBLEMS)  # the tables and pictures of each


def test_no_cell_is_empty_and_headings_are_in_order(made: Path):
    found = Page(made.read_text())
    assert found.cells and all(found.cells)
    levels = [int(tag[1]) for tag, _ in found.attributes if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    assert "fail: tile, not timed: tile &lt;3&gt;" in made.read_text()
    passes = [w for w in PROBLEMS[0].workloads if {"model", "huge"} & {*w.tags} == {"model"}]
    assert f"1 of {2 * len(passes)} fail" in made.read_text()


def test_the_extremes_come_first(made: Path):
    text = made.read_text()
    behind = text[text.index('id="furthest-behind"') : text.index("</section>")]
    assert re.search(r">gemm_8192</a> fwd</th>.*?Triton.*?0\.50.*?cublas", behind, re.S)
    assert behind.count("<tr>") - 1 == page.EXTREMES
    assert "NVIDIA H100" in text and 'id="matmul-roofline2"' in text


def test_the_page_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(report, "LOCAL", tmp_path)
    text = page.html(report.Results.here(tmp_path))
    found = Page(text)
    assert not found.open and all(found.cells)
    for says in (
        "Nothing was checked",
        "not timed",
        "no check",
        "not compiled",
        "None is recorded",
    ):
        assert says in text


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_the_palette_can_be_read(theme: int):
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    colours = {name: both[theme] for name, both in drawings.PALETTE.items()}
    words = set(colours) - {"paper", "shade", "line"}
    for name in words:
        assert contrast(colours[name], colours["paper"]) >= AA, name
    for name in ("ink", "faint", "link"):
        assert contrast(colours[name], colours["shade"]) >= AA, name
    twins = contrast(colours["triton"], colours["pallas"])
    assert twins < AA_GRAPHICS  # too alike in lightness to be told apart by it:
    assert len(set(drawings.MARKER.values())) == len(report.TWINS)  # so their marks differ


def lines(records: Path, stem: str = "softmax") -> list[report.Line]:
    found = [line for line in report.Results.here().lines(DEVICE) if line.problem == stem]
    return found[2:4] if stem == "softmax" else found


def test_pictures_take_the_pages_colours_and_say_what_they_show(records: Path):
    def drawn() -> list[drawings.Picture]:
        strip = drawings.Errors("w fwd", [drawings.Error("triton", 1.0, 1.5, True, "1.00")])
        roofline = drawings.roofline(lines(records), "b", "Roofline")
        errors = drawings.errors({"here": [strip]}, "c", "Errors")
        assert roofline is not None and errors is not None
        past = {"triton": [lines(records)[0].rows["triton"]] * 2}
        return [
            drawings.bars(lines(records), "a", "Bars"),
            roofline,
            errors,
            drawings.history(past, "d", "History"),
        ]

    pictures = drawn()
    assert [p.svg for p in pictures] == [p.svg for p in drawn()]
    for picture in pictures:
        assert not re.search("#[0-9a-f]{6}", picture.svg) and "var(--ink)" in picture.svg
        assert "<title id=" in picture.svg and picture.words in picture.svg
        named = re.findall(r' id="([^"]+)"', picture.svg)
        assert len(named) == len(set(named)) and all(
            n[:2] in ("a-", "b-", "c-", "d-") for n in named
        )
        used = re.findall(r'(?:href="#|url\(#)([^")]+)', picture.svg)
        assert set(used) <= set(named)
        alone = picture.standing_alone()
        assert all(light in alone and dark in alone for light, dark in drawings.PALETTE.values())
    bars = pictures[0]
    assert "softmax_8192x8192 fwd: Triton 95 %, " in bars.words and "Pallas 82 %" in bars.words
    tip = "Pallas, softmax_8192x8192 fwd: 110 [109 111] us, 82 % of the roof; 0.91 x the best peer"
    assert f"<title>{tip}: SLOWER</title>" in bars.svg


def test_pictures_of_nothing(records: Path):
    assert drawings.roofline([], "a", "t") is None and drawings.errors({}, "a", "t") is None
    red = [line for line in lines(records, "matmul") if line.workload == "gemm_4096"]
    assert "Pallas fail: tile, not timed: tile <3>" in drawings.bars(red, "a", "t").words


def test_earlier_records_are_the_history(made: Path):
    text = made.read_text()
    section = text[text.index('id="matmul-history"') : text.index('id="softmax"')]
    assert all(commit in section for commit in ("0123456", "second0", "third00"))
    said: dict[str, list[str]] = {}
    for who, word in re.findall(r"<td>([\w.]+)</td><td>2026.*?class=.says.>(\w+)<", section, re.S):
        said.setdefault(who, []).append(word)
    assert said["Triton"] == ["first", "SAME", "FASTER"] and said["Pallas"] == ["first"]
    assert said["cublas"] == ["first", "FASTER", "FASTER"]
    after = text[text.index('id="softmax-history"') : text.index('id="rms_norm"')]
    assert "One measurement of each pass so far (2026-01-02, at 0123456789ab)" in after


def test_the_distance_between_the_twins_comes_from_where_it_is_said_to(made: Path, records: Path):
    text = made.read_text()
    section = text[text.index('id="matmul-ulp"') : text.index('id="matmul-compile"')]
    assert f"Recorded on {DEVICE}, 2026-02-0" in section
    assert "90.0 %" in section and "10.0 %" in section and "0.01 %" in section
    (found,) = report.Results.here().distances("softmax")
    assert found.where == "checked here, interpreted" and found.shares == {"0": 0.97, "1": 0.03}
    assert not found.stale
    report.keep_checks([check("triton", ulp=None)], "cpu", {"triton": "triton_kernels.softmax:x"})
    assert report.Results.here().distances("softmax") == [found]  # one twin alone says nothing
    assert report.Results.here().distances("rms_norm") == []


def test_what_is_outdated_is_called_so(records: Path):
    results = report.Results.here()
    assert "outdated" not in str(page.Standing.of(results, DEVICE, PROBLEMS[1], "triton"))
    old = tuple(check | {"source": "old"} for check in results.checks)
    changed = replace(results, checks=old)
    found = page.Standing.of(changed, DEVICE, PROBLEMS[1], "triton")
    assert ("stale", "1 pass", "here, interpreted, outdated") in found.checks
    red = page.Standing.of(changed, DEVICE, PROBLEMS[1], "pallas")
    assert ("fail", "1 of 1 fail", "here, interpreted, outdated") in red.checks


def test_shares_are_never_rounded_away():
    assert [page.share_text(s) for s in (1.0, 0.9999, 0.97, 1e-5)] == [
        "100 %", "> 99.9 %", "97.0 %", "0.001 %"
    ]  # fmt: skip


def test_reading_a_report_is_current(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import reading

    book = reading.Reading()
    assert reading.PAGE.read_text() == book.text(), "run `make docs`"
    for file, picture in ((reading.BARS, book.bars), (reading.ROOFLINE, book.roofline)):
        # another version of matplotlib may draw the same in other strokes
        assert f">{picture.words}</desc>" in file.read_text(), "run `make docs`"
        assert "prefers-color-scheme:dark" in file.read_text()


# In a browser.

CONTRASTS = """
(() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const known = {};
  const solid = (colour) => (known[colour] ??= painted(colour));
  const painted = (colour) => {  // whatever notation the browser answers in
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (c) => {
    const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = c.slice(0, 3).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = solid(getComputedStyle(e).backgroundColor);
      if (c[3] === 255) return c;
    }
    return [255, 255, 255, 255];
  };
  const worst = {};
  for (const e of document.querySelectorAll("body *:not(svg *)")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || ["SCRIPT", "OPTION"].includes(e.tagName)) continue;
    const [a, b] = [light(solid(getComputedStyle(e).color)), light(behind(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) worst[`${e.tagName}.${e.className} ${e.textContent.slice(0, 30)}`] = ratio;
  }
  return worst;
})()
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    if PROGRAM is None:
        pytest.skip("no Chromium on this machine")
    with chromium(tmp_path_factory.mktemp("chromium")) as one:
        yield one


def test_both_themes_render_without_a_complaint(browser: Browser, made: Path):
    papers = {}
    for theme, width in (("light", 1600), ("light", 400), ("dark", 400), ("dark", 1000)):
        browser.open(made, theme, width)
        assert browser.run("document.documentElement.scrollWidth") <= width
        papers[theme] = browser.run("getComputedStyle(document.body).backgroundColor")
        if width != 400:
            browser.run("document.querySelectorAll('details').forEach((d) => (d.open = true))")
            assert browser.run(CONTRASTS) == {}
    assert papers["light"] != papers["dark"]
    # a bar's fill is the theme's own colour, and the choice of a theme beats the system's
    fill = "getComputedStyle(document.querySelector('figure svg path[style*=triton]')).fill"
    dark = browser.run(fill)
    browser.run(
        "(() => {const s = document.querySelector('select'); s.value = 'light'; s.onchange()})()"
    )
    assert browser.run(fill) != dark
    assert browser.heard == []


def test_the_keyboard_reaches_everything(browser: Browser, made: Path):
    browser.open(made, "light", 1000)
    focus = "document.activeElement.outerHTML.slice(0, 60)"
    browser.press("Tab")
    assert 'class="skip"' in browser.run(focus)
    assert browser.run("document.activeElement.getBoundingClientRect().left") >= 0  # in sight
    browser.press("Enter")
    assert browser.run("location.hash") == "#main"
    browser.press("Tab")
    assert 'class="scroll"' in browser.run(focus)
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    reachable = browser.run(
        "[...document.querySelectorAll('summary, a[href], button, select, .scroll')]"
        ".filter((e) => e.tabIndex < 0).length"
    )
    assert reachable == 0


def test_a_screen_reader_hears_names(browser: Browser, made: Path):
    browser.open(made, "light", 1000)
    nodes = browser("Accessibility.getFullAXTree")["nodes"]

    def named(*roles: str) -> list[str]:
        return [
            node.get("name", {}).get("value", "")
            for node in nodes
            if node.get("role", {}).get("value") in roles and not node.get("ignored")
        ]

    pictures = named("image", "img")
    assert len(pictures) >= 4 * len(PROBLEMS) and all(pictures)
    assert "Share of the roof, softmax forward on NVIDIA H200" in pictures
    assert all(named("table")) and all(named("region")) and all(named("button"))
    headings = named("heading")
    assert headings[0] == "kernel-parity report" and {p.stem for p in PROBLEMS} <= {*headings}


def test_tables_sort_and_everything_is_there_without_scripts(browser: Browser, made: Path):
    browser.open(made, "light", 1000)
    times = f"""document.querySelector('[aria-label="Times of matmul on {DEVICE}"] table')"""
    cells = f"[...{times}.tBodies[0].rows].map((r) => r.cells[3].dataset.by).filter((x) => x)"
    before = browser.run(cells)
    browser.run(f"{times}.tHead.rows[0].cells[3].querySelector('button').click()")
    after = [float(us) for us in browser.run(cells)]
    assert after == sorted(map(float, before)) and before != browser.run(cells)
    assert browser.run(f"{times}.tHead.rows[0].cells[3].ariaSort") == "ascending"
    last = browser.run(f"{times}.tBodies[0].rows[{times}.tBodies[0].rows.length - 1].textContent")
    assert "not timed" in last  # what is no number comes last
    browser("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(made, "light", 1000)
    browser("Emulation.setScriptExecutionDisabled", value=False)
    assert browser.run("document.querySelectorAll('button, select').length") == 0
    assert browser.run("document.querySelectorAll('table, svg').length") > 6 * len(PROBLEMS)
    assert browser.heard == []
