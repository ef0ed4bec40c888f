"""Pages as people see them, in a real browser: on a phone and on a desk, in light and in dark."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.train.browser import Browser, found
from tests.train.command import Command
from tests.train.dataset import build
from tests.train.test_report import HOSTILE, NAME

pytestmark = pytest.mark.skipif(found() is None, reason="no chromium here")

# How readable the text of an element is: WCAG 2.1's contrast with the background of the nearest element that has one.
CONTRAST = """
(() => {
  const rgb = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = c => { const [r, g, b] = c.slice(0, 3).map(v => v / 255).map(
    v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = e => { for (; e; e = e.parentElement) {
    const c = rgb(getComputedStyle(e).backgroundColor); if (c.length === 3) return c; } return [255, 255, 255]; };
  const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const of = e => ratio(light(rgb(getComputedStyle(e)[e instanceof SVGElement ? "fill" : "color"])), light(behind(e)));
  const texts = "h1, h2, h3, p, span, b, code, figcaption, td, th, summary, svg text";
  return Math.min(...[...document.querySelectorAll(texts)].map(of));
})()
"""
# The smallest text of a chart, in CSS pixels as shown.
SMALLEST = """
Math.min(...[...document.querySelectorAll("svg text")].map(t => parseFloat(getComputedStyle(t).fontSize)
  * t.ownerSVGElement.getBoundingClientRect().width / t.ownerSVGElement.viewBox.baseVal.width))
"""
# Tiles that cannot hold the count of tokens of the 95M job.
TILES = """
(() => {
  document.querySelectorAll(".tiles b").forEach(b => b.textContent = "1,966,080,000");
  return [...document.querySelectorAll(".tiles div")].filter(t => t.scrollWidth > t.clientWidth).length;
})()
"""
# Texts of a chart that stick out of it.
CLIPPED = """
[...document.querySelectorAll("svg text")].filter(t => {
  const a = t.getBoundingClientRect(), b = t.ownerSVGElement.getBoundingClientRect();
  return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1;
}).map(t => t.textContent)
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def pages(train: Command, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The report of a run full of markup, and its comparison with a twin."""
    folder = tmp_path_factory.mktemp("pages")
    data = build(folder / "set", train=120, val=10, length=128, texts=[HOSTILE], url='"><script>' + 99 * "long")
    run, twin = folder / NAME, folder / "twin"
    settings: dict[str, object] = {
        "model.layers": 3,
        "probe.every": 4,
        "sample.every": 12,
        "eval.every": 6,
        "checkpoint.every": 0,
    }
    faults = [("report",), ("short_window", 6, 6.0), ("poison", 7), ("spike", 5.0, 17)]
    assert train.run(data, run, "--steps", 18, settings=settings, faults=faults).code == 0
    assert train.run(data, twin, "--steps", 18, settings={**settings, "model.quantization": "none"}).code == 0
    assert train("compare", run, twin, "--out", folder / "compare.html").code == 0
    return {"report": run / "report.html", "compare": folder / "compare.html"}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("page", ["report", "compare"])
def test_a_page_can_be_read(browser: Browser, pages: dict[str, Path], page: str, width: int, dark: bool) -> None:
    browser.open(pages[page], width=width, dark=dark)
    browser.value("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert browser.value("document.documentElement.scrollWidth") == width, "nothing makes the page scroll sideways"
    assert browser.value("document.querySelectorAll('svg').length") >= 4
    assert browser.value(SMALLEST) >= 9.5
    assert browser.value(CLIPPED) == []
    assert browser.value(TILES) == 0
    assert browser.value(CONTRAST) >= 4.5, "WCAG 2.1, 1.4.3"
    background = browser.value("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(18, 20, 23)" if dark else "rgb(255, 255, 255)")


@pytest.mark.parametrize("page", ["report", "compare"])
def test_a_page_asks_for_nothing_and_runs_nothing(browser: Browser, pages: dict[str, Path], page: str) -> None:
    browser.open(pages[page], width=1280)
    assert browser.requests == [pages[page].absolute().as_uri()] and browser.dialogs == []
    assert browser.value("document.querySelectorAll('script, img, iframe, a, link, object').length") == 0
    title = browser.value("document.title")
    assert title == (NAME if page == "report" else f"{NAME} and twin")
    text = browser.value("document.body.textContent")
    assert NAME in text and (page == "compare" or HOSTILE in text)


def test_the_policy_would_stop_a_script_that_got_through(browser: Browser, pages: dict[str, Path]) -> None:
    """The second lock behind the escaping, seen to hold."""
    leaky = pages["report"].with_name("leaky.html")
    leaky.write_text(pages["report"].read_text().replace("<body>", "<body><script>document.title = 'pwned'</script>"))
    browser.open(leaky, width=1280)
    assert browser.value("document.title") == NAME
