"""A map page in a real browser: the fixtures, which conftest.py imports, and what tests read."""

import pytest

import visualize_coords
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
def open_map(browser, in_tmp):
    """A function that writes a map and opens it. The page may cause no errors or requests.

    `address` is the part of the address after the file's name; flags without any open the page
    that was written last.
    """
    wrong, contexts = [], []

    def open_map(*flags, width=1280, height=800, address="", **context):
        if flags:
            flags = ("--checkpoint-path", "x.pt", "--output", "map.html", *flags)
            visualize_coords.main([str(flag) for flag in flags])
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **context))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda line: line.type == "error" and wrong.append(line.text))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.on(
            "request",
            lambda request: request.url.startswith(("http", "ws")) and wrong.append(request.url),
        )
        page.goto(f"file://{in_tmp}/map.html{address}")
        page.wait_for_selector("body[data-ready]", state="attached", timeout=60000)
        return page, data_of(in_tmp / "map.html")

    yield open_map
    for context in contexts:
        context.close()
    assert not wrong


def selected(page):
    """The selected tokens' positions, one per run."""
    chosen = '.token[aria-selected="true"]'
    return page.eval_on_selector_all(chosen, "all => all.map(span => Number(span.dataset.token))")
