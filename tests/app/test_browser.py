"""The demo in a browser: what a visitor sees and does, with mouse, keyboard and on a phone, and what the page asks for.

Chromium is found on the path, or named by BPGCN_CHROMIUM; with BPGCN_REQUIRE_BROWSER=1 its absence is a failure.
"""

import os
import re
import shutil
from itertools import pairwise
from urllib.parse import urlsplit

import pytest

pytest.importorskip("gradio")

from .conftest import CLASS_NAMES, NUM_NEIGHBORS

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync"]
WIDTHS = {"desktop": 1280, "phone": 390}
TIMEOUT = 60_000  # milliseconds, on a machine that is busy
ANSWER, NEIGHBORS = "#answer table.classes", "#neighbors figure"


def lacking(what: str) -> None:
    if os.environ.get("BPGCN_REQUIRE_BROWSER") == "1":
        pytest.fail(f"BPGCN_REQUIRE_BROWSER=1, but {what}")
    pytest.skip(what)


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        lacking("Playwright is not installed: pip install playwright")
    program = os.environ.get("BPGCN_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        lacking(f"no Chromium: none of {', '.join(BROWSERS)} is on the path, and BPGCN_CHROMIUM names none")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(params=WIDTHS)
def page(browser, app, request):
    """The page as a new visitor has it; in the end, that it asked no other host and logged no error."""
    context = browser.new_context(viewport={"width": WIDTHS[request.param], "height": 844}, reduced_motion="reduce")
    page = context.new_page()
    page.set_default_timeout(TIMEOUT)
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("websocket", lambda socket: asked.append(socket.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(app.url)
    page.locator("#class").wait_for()
    page.locator("#temperature[aria-valuetext]").wait_for()
    yield page
    context.close()
    assert len(asked) > 5
    hosts = {urlsplit(url).hostname for url in asked if not url.startswith(("data:", "blob:"))}
    assert hosts == {"127.0.0.1"}
    assert errors == []


def shares(page) -> dict[str, float]:
    """Probability by class, from the table."""
    rows = page.locator(f"{ANSWER} tbody tr").all()
    return {row.locator("th").text_content(): float(row.locator("data.share").get_attribute("value")) for row in rows}


def settle(page, change) -> dict[str, float]:
    """The shares after a change that moves them."""
    before = shares(page)
    change()
    page.wait_for_function(
        "before => { const now = [...document.querySelectorAll('#answer data.share')].map(d => Number(d.value));"
        " return now.length && now.join() !== before.join(); }",
        arg=list(before.values()),
    )
    return shares(page)


def send(page, file) -> None:
    page.locator("#upload input[type=file]").set_input_files(file)


def assert_fits(page) -> None:
    width, inner = page.evaluate("[document.scrollingElement.scrollWidth, innerWidth]")
    assert width <= inner


def press_until(page, selector: str, limit: int = 60) -> None:
    """Move the focus there with the keyboard alone."""
    for _ in range(limit):
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"{selector} is not reached with {limit} presses of the Tab key")


def test_a_visit(page, pictures, tmp_path):
    assert_fits(page)
    assert page.locator("#answer table").count() == 0

    # an image is answered
    send(page, pictures / "class 1" / "15.png")
    page.locator(ANSWER).wait_for()
    first = shares(page)
    assert set(first) == set(CLASS_NAMES)  # with their brackets and braces, as text
    assert sum(first.values()) == pytest.approx(1, abs=1e-5)
    assert page.locator("#answer b").count() == 0
    weights = [float(data.get_attribute("value")) for data in page.locator("#neighbors data.weight").all()]
    assert len(weights) == NUM_NEIGHBORS
    assert sum(weights) == pytest.approx(1, abs=1e-4)
    assert weights == sorted(weights, reverse=True)
    status = page.locator("[role=status]", has_text="It rests on")
    assert max(first, key=first.get) in status.text_content()
    assert page.locator("#graph svg").bounding_box()["width"] > 200
    assert_fits(page)

    # sliders, by keyboard
    page.locator("#temperature").focus()
    colder = settle(page, lambda: [page.keyboard.press("ArrowLeft") for _ in range(6)])
    assert colder != first
    page.wait_for_timeout(300)
    assert page.locator("#temperature").evaluate("slider => slider === document.activeElement")
    page.locator("#count").focus()
    page.keyboard.press("ArrowRight")
    page.locator(NEIGHBORS).nth(NUM_NEIGHBORS).wait_for()
    before = shares(page)

    # an added image moves the answer, and is taken back
    page.locator("#class").select_option("0")
    after = settle(page, page.locator("#add").click)
    assert after != before
    added = page.locator("#neighbors figure.added")
    assert added.count() == 1
    assert added.locator("img").get_attribute("alt") == f"Your image, {CLASS_NAMES[0]}"
    assert "added by you" in added.inner_text()
    earlier = [float(data.get_attribute("value")) for data in page.locator("#answer data.before").all()]
    assert sorted(earlier) == pytest.approx(sorted(before.values()))
    assert "You have added 1 image: daisy." in page.locator("#bank").inner_text()
    assert_fits(page)
    assert settle(page, page.locator("#take-back").click) == before
    assert page.locator("#neighbors figure.added").count() == 0

    # a broken file is an alert, and the page goes on
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    send(page.locator("#choose button[aria-label='Remove Image']").click() or page, tmp_path / "broken.png")
    alert = page.locator("[role=alert] .problem")
    alert.wait_for()
    assert "broken" in alert.inner_text() or "no image" in alert.inner_text()
    assert "Traceback" not in page.content()
    assert page.locator(ANSWER).count() == 0
    page.locator("#choose button[aria-label='Remove Image']").click()
    page.locator("#choose .examples button").nth(1).click()
    page.locator(ANSWER).wait_for()
    assert page.locator("[role=alert] .problem").count() == 0


def test_it_can_be_used_by_keyboard_and_with_a_screen_reader(page):
    order = ["#choose .upload-container", "#choose .examples button", "#temperature", "#count", "#class", "#add"]
    for selector in [*order, "#take-back"]:
        press_until(page, selector)
        style = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert style == "solid", f"no focus is seen on {selector}"
    page.locator("#choose .examples button").first.focus()
    page.keyboard.press("Enter")
    page.locator(ANSWER).wait_for()

    assert page.locator("html").get_attribute("lang") == "en"
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4,h5,h6')].map(h => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert page.locator("img:not([alt])").count() == 0
    assert page.locator("#neighbors img[alt='']").count() == 0
    assert page.locator("#graph svg[role=img] > title").count() == 1
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id).filter(id => id)")
    assert len(ids) == len(set(ids))
    for role in ("slider", "combobox", "button"):
        for control in page.get_by_role(role).all():
            snapshot = control.aria_snapshot()
            assert re.match(rf"- '?{role} \"[^\"]+\"", snapshot), snapshot
    for slider in ("#temperature", "#count"):
        assert "the model's own" in page.locator(slider).get_attribute("aria-valuetext")
    for table in page.locator("table").all():
        assert table.locator("caption").count() == 1
        assert table.locator("thead th[scope=col]").count() >= 2
        assert table.locator("tbody th[scope=row]").count() == table.locator("tbody tr").count()
    assert page.evaluate("document.getAnimations().length") == 0  # as the visitor prefers


CONTRAST = """
() => {
    const channel = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
    const color = text => (text.match(/[\\d.]+/g) || []).map(Number);
    const ground = element => {
        for (; element; element = element.parentElement) {
            const c = color(getComputedStyle(element).backgroundColor);
            if (c.length === 3 || c[3] > 0.99) return c;
        }
        return [255, 255, 255];
    };
    const pale = [];
    for (const element of document.querySelectorAll('.gradio-container *')) {
        const own = [...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
        if (!own || element.closest('svg') || !element.checkVisibility() || element.closest('#status')) continue;
        const [a, b] = [light(color(getComputedStyle(element).color)), light(ground(element))];
        const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (contrast < 4.5) pale.push([element.textContent.trim().slice(0, 40), contrast]);
    }
    return pale;
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_told_from_its_ground(browser, app, pictures, scheme):
    context = browser.new_context(viewport={"width": 1280, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(TIMEOUT)
    page.goto(app.url)
    page.locator("#class").wait_for()
    send(page, pictures / "class 0" / "12.png")
    page.locator(ANSWER).wait_for()
    page.locator("#class").select_option("1")
    settle(page, page.locator("#add").click)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    page.wait_for_timeout(500)  # colors fade in
    assert page.evaluate(CONTRAST) == []
    context.close()
