"""The page in a real browser: on phones and desks, light and dark, by keyboard and on paper."""

import io
import re

import pages
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def text():
    return pages.shown()[1]


@pytest.fixture(scope="module")
def chromium():
    api = pytest.importorskip("playwright.sync_api", reason="no browser test: pip install playwright")
    with api.sync_playwright() as started:
        path = pages.browser_path(started.chromium.executable_path)
        if path is None:
            pytest.skip(
                "no browser test: no Chromium (apt-get install chromium, playwright install chromium, CHROMIUM=)"
            )
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium, text, tmp_path):
    """Opens the page; what the console said and what was asked of the network must be empty at the end."""
    path = tmp_path / "report.html"
    path.write_text(text, "utf-8")
    complaints = []

    def show(width=1280, scheme="light"):
        page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url) if request.url != path.as_uri() else None)
        page.goto(path.as_uri())
        return page

    yield show
    assert complaints == []


WIDER = """() => [...document.querySelectorAll("body *")].filter((each) => !each.closest(".scroll")
  && each.getBoundingClientRect().right > innerWidth + 1).map((each) => each.outerHTML.slice(0, 80))"""
BROKEN = """() => [...document.querySelectorAll("svg, img, svg image")].filter((each) => {
  const box = each.getBoundingClientRect(); return box.width < 5 && box.height < 5 || each.tagName === "IMG"
  && !each.naturalWidth; }).length"""
CUT = """() => [...document.querySelectorAll("figure svg")].flatMap((svg) => [...svg.querySelectorAll("text")].filter(
  (text) => { const a = text.getBoundingClientRect(), b = svg.getBoundingClientRect();
  return a.left < b.left - 2 || a.right > b.right + 2 || a.bottom > b.bottom + 2; })).map((text) => text.textContent)"""
HEADS = """() => [...document.querySelectorAll("thead th[aria-sort]")].filter((each) =>
  each.querySelector("button").offsetWidth || !getComputedStyle(each, "::before").content.includes(each.dataset.name))
  .map((each) => each.dataset.name)"""
ORDER = "(column) => [...document.querySelector('.summary').tBodies[0].rows].map((row) => row.cells[column].innerText)"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_on_phones_and_desks_light_and_dark(opened, width, scheme):
    page = opened(width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width and page.evaluate(WIDER) == []
    assert page.evaluate("document.querySelectorAll('svg').length") == 11
    assert page.evaluate(BROKEN) == 0 and page.evaluate(CUT) == []
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("L")
    shades = picture.histogram()
    background = max(range(256), key=shades.__getitem__)
    assert background > 250 if scheme == "light" else background < 40
    ink = sum(shades[200:]) if scheme == "dark" else sum(shades[:60])
    assert ink > 0.01 * picture.width * picture.height, "text in the colour of the page"


def test_a_keyboard_sorts_the_table_and_what_has_no_value_stays_last(opened):
    page = opened()
    headers = page.evaluate("[...document.querySelectorAll('.summary thead th')].map((each) => each.innerText.trim())")
    column, written = headers.index("norm"), page.evaluate(ORDER, 1)
    page.evaluate("(n) => document.querySelectorAll('.summary thead button')[n - 1].focus()", column)
    page.keyboard.press("Tab")
    seen = {}
    for turn in ("descending", "ascending", "none"):
        page.keyboard.press("Enter")
        head = page.locator(".summary thead th").nth(column)
        assert head.get_attribute("aria-sort") == turn
        seen[turn] = page.evaluate(ORDER, column)
    numbers = [[float(cell.split()[0]) for cell in seen[turn] if cell != "-"] for turn in ("descending", "ascending")]
    assert numbers[0] == sorted(numbers[0], reverse=True) and numbers[1] == sorted(numbers[0]) and len(numbers[0]) == 11
    assert seen["descending"][-1] == seen["ascending"][-1] == "-"  # the failed line
    assert page.evaluate(ORDER, 1) == written
    page.keyboard.press("Tab")
    page.locator(".summary thead button").nth(1).press("Space")
    names = page.evaluate(ORDER, 1)
    assert names == sorted(names, key=str.lower) and names != written


def test_paper_holds_everything(opened):
    page = opened(1031, "dark")  # A4 landscape without its margins
    printed = page.pdf(prefer_css_page_size=True)
    (_, _, wide, high) = map(float, re.search(rb"/MediaBox \[([\d. ]+)\]", printed)[1].split())
    assert wide == pytest.approx(842, abs=2) and high == pytest.approx(595, abs=2)
    page.emulate_media(media="print")
    assert page.evaluate(HEADS) == [], "a head with buttons is not repeated on every sheet"
    assert page.evaluate("[...document.querySelectorAll('details')].every((each) => each.open)")
    assert page.evaluate("[...document.querySelectorAll('body *')].every((each) => each.getBoundingClientRect().right "
                         "<= innerWidth + 1)")  # fmt: skip
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
