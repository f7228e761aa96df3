"""The page of a report in a real browser: it shows, sorts and toggles what it was given."""

import functools
import itertools
import json
import re
from pathlib import Path

import pytest

from purepruning_interop.report import (
    Column,
    Commands,
    Curves,
    Facts,
    Profile,
    Report,
    Series,
    Table,
    View,
    colored,
    render,
    write_report,
)

CHROMIUM = Path("/usr/bin/chromium")
EVIL = "</script><script>document.title = 'broken'</script>"


def report():
    curves = [
        Series("random", [(0.5, 0.6, 0.5, 0.7), (0.9, 0.2, 0.1, 0.3)], "weights", baseline=True),
        Series("level", [(0.5, 0.9, 0.85, 0.95), (0.9, 0.7, 0.6, 0.8)], "weights"),
        Series(EVIL, [(0.5, 0.8, None, None), (0.9, 0.1, None, None)], "weights"),
        Series("level", [(0.5, 0.9, 0.85, 0.95), (0.9, 0.4, 0.3, 0.5)], "channels"),
    ]
    leads = [Series("level", [(0.5, 0.3, 0.2, 0.4), (0.9, -0.5, -0.7, -0.3)], "weights")]
    views = [
        View("fine-tuned", "accuracy, %", colored(curves), {"not pruned: 97.0": 0.97}, "deviation"),
        View("lead", "points", colored(leads), {}, "interval", True),
    ]
    rows = [
        ["level", "weights", ("9.5 %", 0.095), "▲ ahead"],
        ["random", "weights", ("10 %", 0.1), None],
        [EVIL, "channels", ("−2 %", -0.02), "▼ behind"],
        ["snip", "channels", None, "▼ behind"],
    ]
    columns = [Column("pruner"), Column("units", choose=True), Column("score", True), Column("is")]
    layers = [("conv", "3 × 3 × 1 × 4", 36), ("fc", "4 × 9", 36)]
    return Report(
        "Pruning study",
        f"made: {EVIL}",
        "Two networks & no more.",
        [("accuracy", "97.0 %", "± 0.3")],
        [
            Curves("Curves", "A note.", "sparsity, %", views, "left", True),
            Table("Rows", "", columns, rows),
            Profile("Layers", "", layers, {"pruner": ["a", "b"]}, [[36, 9], [18, 36]], (1,)),
            Facts("Run", {"Data": EVIL}),
            Commands("Again", "", ["purepruning study made"]),
        ],
        "purepruning",
    )


def test_a_page_without_a_browser(tmp_path):
    write_report(tmp_path / "report.html", report())
    page = (tmp_path / "report.html").read_text()
    assert "Two networks &amp; no more." in page
    assert page.count("</script>") == page.count("<script")
    # Nothing is asked of a network: no address but the names of SVG's elements.
    assert set(re.findall(r"https?://[^\"' ]+", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.findall(r"<(?:link|img|iframe|object)[^>]+(?:src|href)=\"(?!data:)", page)
    for data in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page):
        json.loads(data)


@functools.cache
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"there is no {CHROMIUM}: apt-get install chromium")
    return sync_api


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser().sync_playwright() as playwright:
        found = playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"]
        )
        yield found
        found.close()


@pytest.fixture
def page(chromium, tmp_path):
    """The report, of which the browser must say nothing, and ask for nothing else."""
    file = tmp_path / "report.html"
    file.write_text(render(report()), encoding="utf-8")
    page, said, asked = chromium.new_page(viewport={"width": 1200, "height": 900}), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    yield page
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
    page.close()


def column(page, number):
    rows = page.locator(".table tbody tr:visible").all()
    return [row.locator("th, td").nth(number).inner_text().replace("\xa0", " ") for row in rows]


def test_what_is_written_is_text(page):
    assert page.title() == f"made: {EVIL} · Pruning study"
    assert EVIL in column(page, 0)


def test_columns_sort_by_their_numbers(page):
    head = page.locator(".table thead th").nth(2)
    assert head.get_attribute("aria-sort") == "none"
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert column(page, 2) == ["10 %", "9.5 %", "−2 %", ""]  # what is empty comes last
    head.get_by_role("button").press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert column(page, 2) == ["−2 %", "9.5 %", "10 %", ""]
    page.locator(".table thead th").nth(0).get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "none"
    assert column(page, 0) == sorted(column(page, 0), key=str.casefold)
    assert "sorted by pruner" in page.get_by_role("status").inner_text()


def test_rows_are_chosen(page):
    page.get_by_label("units").select_option("channels")
    assert column(page, 0) == [EVIL, "snip"]
    assert "2 of 4 rows" in page.get_by_role("status").inner_text()
    page.get_by_label("units").select_option("all")
    assert len(column(page, 0)) == 4


def shown(page, panel=0):
    found = page.locator(".panel").nth(panel).locator("g.series").all()
    return [g.get_attribute("data-series") for g in found]


def test_curves_are_hidden_and_shown(page):
    assert shown(page) == ["random", "level", EVIL]
    button = page.locator(".panel").nth(0).get_by_role("button", name="level", exact=True)
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert shown(page) == ["random", EVIL]
    assert shown(page, 1) == ["level"]  # the other panel has its own
    button.press("Space")
    assert button.get_attribute("aria-pressed") == "true"
    assert shown(page) == ["random", "level", EVIL]


def test_another_view_of_the_curves(page):
    page.get_by_label("lead", exact=True).check(force=True)
    assert shown(page) == ["level"]
    legend = page.locator(".panel").nth(0).locator(".legend li[data-name]:visible")
    assert legend.all_inner_texts() == ["level"]
    assert "+25" in page.locator(".panel").nth(0).locator(".grid").text_content()


def test_curves_lie_where_their_values_are(page):
    """The axis of sparsities is logarithmic in what is left, that of scores linear."""
    plot = page.locator(".plot-focus > svg").nth(0)
    ticks = {
        g.text_content(): float(g.get_attribute("y")) - 4 for g in plot.locator(".grid text").all()
    }
    lines = plot.locator("g[data-series=level] .line").get_attribute("d")
    (x1, y1), (x2, y2) = (map(float, p.split(",")) for p in lines[1:].split("L"))
    scale = (ticks["80"] - ticks["40"]) / 40
    assert y1 == pytest.approx(ticks["80"] + 10 * scale, abs=0.01)
    assert y2 == pytest.approx(ticks["80"] - 10 * scale, abs=0.01)
    (whisker, _) = plot.locator("g[data-series=level] .whisker").all()
    low, high = re.fullmatch(r"M.*,(.*)V(.*)", whisker.get_attribute("d")).groups()
    assert float(low) - float(high) == pytest.approx(-10 * scale, abs=0.01)
    assert x2 > x1


def test_keys_read_the_values(page):
    plot = page.get_by_role("slider").nth(0)
    plot.focus()
    assert plot.get_attribute("aria-valuetext").startswith("50\xa0%: level 90.0 ± 5.0, ")
    plot.press("ArrowRight")
    text = plot.get_attribute("aria-valuetext")
    assert text.startswith("90\xa0%: level 70.0 ± 10.0, random 20.0 ± 10.0, ")
    readout = page.locator(".readout").nth(0)
    assert readout.is_visible()
    assert "sparsity: 90" in readout.inner_text()
    plot.press("Escape")
    assert not readout.is_visible()


def test_layers_of_another_choice(page):
    rows = page.locator(".layers tbody tr")
    assert [r.split("\t")[-2] for r in rows.all_inner_texts()] == ["50.0 %", "100.0 %"]
    page.get_by_label("pruner").select_option("a")
    assert [r.split("\t")[-2] for r in rows.all_inner_texts()] == ["100.0 %", "25.0 %"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(page, scheme):
    page.set_viewport_size({"width": 360, "height": 740})
    page.emulate_media(color_scheme=scheme)
    page.wait_for_function("document.querySelector('.plot-focus > svg').clientWidth < 360")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert (
        min(
            page.locator(".legend button:visible").evaluate_all(
                "buttons => buttons.map((b) => b.getBoundingClientRect().height)"
            )
        )
        >= 32
    )
    colors = page.evaluate(CONTRAST)
    assert min(colors.values()) >= 4.5, colors


#: The contrast ratio (WCAG 2) of every text's colour to the ground of the page.
CONTRAST = """() => {
  const light = (text) => {
    const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = light(getComputedStyle(document.body).backgroundColor);
  const found = {};
  const texts = ["h1", ".note", ".lead", "a", ".up", ".down", ".tile dt", "footer", ".plot text"];
  for (const name of texts) {
    const element = document.querySelector(name), style = getComputedStyle(element);
    const color = light(name === ".plot text" ? style.fill : style.color);
    found[name] = (Math.max(color, ground) + 0.05) / (Math.min(color, ground) + 0.05);
  }
  return found;
}"""


def test_everything_is_named_for_screen_readers(page):
    """Every control has a name, headings go down one at a time, the page has its landmarks."""
    tree = page.locator("body").aria_snapshot()
    for role in ("banner", "main", "navigation", "contentinfo", "region", "table", "slider"):
        assert re.search(rf"^\s*- {role}\b", tree, re.MULTILINE), role
    unnamed = re.findall(r"^\s*- (?:button|combobox|slider|radio)(?:\s*$|:)", tree, re.MULTILINE)
    assert unnamed == []
    levels = [int(n) for n in re.findall(r"heading .*\[level=(\d)\]", tree)]
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
