"""A map page in a real browser: the fixtures, which conftest.py imports, and what tests read."""

from pathlib import Path

import pytest

import visualize_coords
from coords.page import map_page
from map_contents import data_of

FLAGS = ["--no-sandbox", "--disable-background-networking"]


@pytest.fixture(scope="module")
def browser():
    from conftest import BROWSER  # which imports this file

    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright here")
    if BROWSER is None:
        pytest.skip("no chromium here")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def new_page(browser):
    """A function that makes an empty page. It may cause no errors, dialogs or requests."""
    wrong, contexts = [], []

    def new_page(width=1280, height=800, **context):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **context))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda line: line.type == "error" and wrong.append(line.text))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.on(
            "request",
            lambda request: request.url.startswith(("http", "ws")) and wrong.append(request.url),
        )
        return page

    yield new_page
    for context in contexts:
        context.close()
    assert not wrong


def wait_until(page, condition, arg=None):
    """Wait for a condition in JavaScript. The page's policy forbids `wait_for_function` to poll."""
    for _ in range(400):
        if page.evaluate(condition, arg):
            return
        page.wait_for_timeout(25)
    raise AssertionError(f"never: {condition}")


def wait_until_drawn(page):
    page.wait_for_selector("body[data-ready]", state="attached", timeout=60000)


@pytest.fixture
def open_map(new_page, in_tmp):
    """A function that writes a map and opens it.

    `address` is the part of the address after the file's name; flags without any open the page
    that was written last.
    """

    def open_map(*flags, address="", **context):
        if flags:
            flags = ("--checkpoint-path", "x.pt", "--output", "map.html", *flags)
            visualize_coords.main([str(flag) for flag in flags])
        page = new_page(**context)
        page.goto(f"file://{in_tmp}/map.html{address}")
        wait_until_drawn(page)
        return page, data_of(in_tmp / "map.html")

    return open_map


@pytest.fixture
def show(new_page, in_tmp):
    """A function that opens a page of given runs."""

    def show(runs, address, live=False, script="", **context):
        path = in_tmp / "map.html"
        path.write_text(map_page(runs, "a map", 2, live=live), encoding="utf-8")
        page = new_page(**context)
        page.add_init_script(script)
        page.goto(f"{path.as_uri()}#{address}")
        wait_until_drawn(page)
        return page

    return show


def runs_of(*flags):
    """The runs in the page of x.pt that these flags make."""
    visualize_coords.main(["--checkpoint-path", "x.pt", "--output", "map.html", *flags])
    return data_of(Path("map.html"))


def selected(page):
    """The selected tokens' positions, one per run."""
    chosen = '.token[aria-selected="true"]'
    return page.eval_on_selector_all(chosen, "all => all.map(span => Number(span.dataset.token))")
