"""The report as people see it: in a real browser, light and dark, on a phone and on a desk."""

import shutil

import pytest

from lark_fast.report.config import ReportConfig
from lark_fast.report.run import make_report
from lark_fast.scoring.run import ScoreConfig, score_pool
from lark_fast.selection.run import SelectConfig, select
from tests.reports import write_harmful, write_large

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Reports on a pool of 4 problems that means harm, on one of 10, and on one of 10,000."""
    made = {}
    directory = tmp_path_factory.mktemp("harmful")
    pool, student = write_harmful(directory)
    scores = directory / "scores"
    score_pool(
        ScoreConfig(
            pool=(str(pool),), student=str(student), out=str(scores), per_token=True, dtype="float32", workers=0
        )
    )
    made["harmful"] = directory, scores
    for problems in (10, 10_000):
        directory = tmp_path_factory.mktemp(f"of-{problems}")
        made[str(problems)] = directory, write_large(directory / "scores", problems)
    for directory, scores in made.values():
        select(SelectConfig(scores=str(scores), out=str(directory / "selection"), budget=2))
        selection = str(directory / "selection")
        make_report(ReportConfig(scores=str(scores), selection=selection, out=str(directory / "r.html")))
    return {name: directory / "r.html" for name, (directory, _) in made.items()}


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium, pages):
    """Opens a report; at the end nothing may have gone wrong, been asked of a network, or called alert."""
    contexts, faults = [], []

    def open_page(name, scheme="light", width=1280):
        context = chromium.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: (faults.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda asked: None if asked.url == pages[name].as_uri() else faults.append(asked.url))
        page.goto(pages[name].as_uri())
        page.locator(f"html[data-drawn={scheme}]").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


def luminance(colour):
    """Relative luminance of "rgb(r, g, b)" (WCAG 2.2)."""
    parts = [int(part) / 255 for part in colour[4:-1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(page, selector):
    """Of an element's text with the page's ground."""
    colours = page.evaluate(
        "selector => [getComputedStyle(document.querySelector(selector)).color,"
        " getComputedStyle(document.body).backgroundColor]",
        selector,
    )
    low, high = sorted(map(luminance, colours))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["10", "10000"])
def test_it_is_drawn_and_fits(opened, name, scheme, width):
    page = opened(name, scheme, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = page.evaluate(
        """[...document.querySelectorAll("[data-chart]")].map(box => {
            const drawn = box.querySelector("svg").getBoundingClientRect(), inside = box.getBoundingClientRect();
            return [drawn.width, drawn.height, inside.width, box.querySelectorAll("path").length];
        })"""
    )
    assert len(boxes) >= 10
    for drawn_width, height, inside, paths in boxes:
        assert height > 60
        assert inside / 2 < drawn_width <= inside + 1
        assert paths > 3
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(ground) < 0.1) == (scheme == "dark")
    for selector in ("h2", "main p", "figcaption p", "dt", "nav a"):
        assert contrast(page, selector) >= 4.5, selector


def test_charts_follow_when_it_gets_dark(opened):
    page = opened("10")
    colour = "getComputedStyle(document.querySelector('.role-axis-label text')).fill"
    before = page.evaluate(colour)
    page.emulate_media(color_scheme="dark")
    page.locator("html[data-drawn=dark]").wait_for()
    assert page.evaluate(colour) != before


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_harmful_texts_are_read_and_do_nothing(opened, scheme):
    page = opened("harmful", scheme, 390)
    page.locator("details.problem > summary").first.click()
    for summary in page.locator("details.problem[open] details.candidate > summary").all():
        summary.click()
    shown = page.locator("details.problem[open]").inner_text()
    assert "<script>alert(1)</script>" in shown
    assert "{{ 7*7 }} {% raw %} ${7*7}" in shown
    assert "\\u202e" in shown
    hot = page.locator("details.problem[open] .heat span").first
    assert hot.is_visible()
    assert "nll" in hot.get_attribute("title")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("main img, main iframe, main script").count() == 0
    assert "datum.x" in page.locator("[data-chart=teachers]").inner_text()


def test_by_keyboard(opened):
    page = opened("harmful")
    page.locator("details.problem > summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("details.problem[open]").count() == 1
