"""Guards: the page looks right in a browser: phone and laptop, light and dark, on paper; it asks nothing of a server.

`make test-browser` installs Chromium, if it may, and runs these.
"""

from __future__ import annotations

import re
import shutil

import pytest

from eval.cli import main
from tests import results

pytestmark = pytest.mark.browser
NAMES = ("chromium", "chromium-browser", "google-chrome")
LONG = "runs/" + "aNameWithoutAnEnd" * 15
LIGHTNESS = """colour => { const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(Number).map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; }"""


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.fail("no Chromium here; make test-browser installs it")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Everything that a report can hold, with names that are long, and one that would be a script."""
    folder = tmp_path_factory.mktemp("report")
    files = results.write(
        folder,
        {
            **results.everything(),
            "long": results.ppl(LONG),
            "long-verdict": {**results.verify(), "sink": LONG},
            "script": results.sinks(model="<script>window.done = 1</script><img src=x onerror='window.done = 1'>"),
        },
    )
    runs = [results.write_run(folder, name) for name in ("none", "token")]
    for run in runs:
        results.write_checkpoint(run)
    maps = results.write_maps(folder)
    options = ["--run", *runs, "--json", *files, "--maps", maps, "--output", str(folder / "report")]
    assert main(["report", *options]) == 0
    return (folder / "report" / "report.html").as_uri()


@pytest.fixture
def opened(browser, report, request):
    """The page at a width and in a scheme, with its messages on the console and the addresses that it asked for."""
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page, messages, asked = context.new_page(), [], []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda asking: asked.append(asking.url))
    page.goto(report)
    yield page, messages, asked
    context.close()


SCREENS = [(width, scheme) for width in (320, 375, 768, 1280) for scheme in ("light", "dark")]
each_screen = pytest.mark.parametrize("opened", SCREENS, indirect=True, ids=str)


@each_screen
def test_it_fits_the_screen_and_asks_for_nothing_and_runs_no_script(opened, report):
    page, messages, asked = opened
    width = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.body.getBoundingClientRect().right") <= width
    widest = page.evaluate(
        "Math.max(...[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().right))"
    )
    assert 0 < widest <= width
    assert messages == []
    assert asked == [report]
    assert page.evaluate("window.done") is None
    assert page.locator("script").count() == 0
    assert page.evaluate("document.querySelectorAll('img, iframe, object, link[rel=stylesheet]').length") == 0


@each_screen
def test_every_letter_and_line_of_a_figure_stands_out_from_the_page(opened):
    page, _, _ = opened
    lightness = page.evaluate(
        f"""() => {{ const lightness = {LIGHTNESS}, of = s => [...document.querySelectorAll(s)].map(getComputedStyle);
            return {{paper: lightness(getComputedStyle(document.body).backgroundColor),
                words: of('svg text').map(s => lightness(s.fill)),
                lines: of('svg [id*=line2d] > path').map(s => s.stroke).filter(s => s != 'none').map(lightness)}}; }}"""
    )
    paper = lightness["paper"]
    assert len(lightness["words"]) > 100
    assert len(lightness["lines"]) > 100
    assert min(contrast(paper, word) for word in lightness["words"]) > 7
    assert sorted(contrast(paper, line) for line in lightness["lines"])[len(lightness["lines"]) // 20] > 2


def contrast(one: float, other: float) -> float:
    """WCAG 2's ratio of two relative luminances."""
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


@pytest.mark.parametrize("opened", [(375, "light")], indirect=True, ids=str)
def test_a_wide_table_scrolls_by_itself_on_a_phone_and_letters_in_figures_can_be_read(opened):
    page, _, _ = opened
    assert page.evaluate("[...document.querySelectorAll('.scroll')].some(e => e.scrollWidth > e.clientWidth + 50)")
    sizes = page.evaluate(
        """[...document.querySelectorAll('.panels:not(.small) svg')].flatMap(svg => {
            const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
            return [...svg.querySelectorAll('text')].map(t => scale * parseFloat(getComputedStyle(t).fontSize)); })"""
    )
    assert min(sizes) > 7


@pytest.mark.parametrize("opened", [(1280, "dark")], indirect=True, ids=str)
def test_it_prints_dark_on_white_with_all_that_was_folded(opened):
    page, _, _ = opened
    page.emulate_media(media="print")
    style = "getComputedStyle(document.body)"
    assert page.evaluate(f"({LIGHTNESS})({style}.color)") < 0.05
    assert page.evaluate(f"({LIGHTNESS})({style}.backgroundColor)") > 0.95
    assert page.evaluate(f"{style}.colorScheme") == "light"  # else the page around the body is dark
    unfolded = "getComputedStyle(document.querySelector('details'), '::details-content').contentVisibility"
    assert page.evaluate(unfolded) == "visible"
    assert page.locator("nav").is_hidden()
    page.set_viewport_size({"width": 718, "height": 1000})  # A4 between Chromium's margins, which shrinks what is wider
    widths = page.evaluate("[...document.querySelectorAll('table')].map(table => table.getBoundingClientRect().width)")
    assert len(widths) > 15
    assert max(widths) <= 718
    written = page.pdf(format="A4")
    assert written.startswith(b"%PDF")
    assert 3 < len(re.findall(rb"/Type\s*/Page\b", written)) < 40
