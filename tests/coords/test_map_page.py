"""The page around the views in a real browser: mouse, keyboard, touch, address, downloads."""

from map_browser import selected
from map_contents import TEXT
from small_models import make_checkpoint


def test_the_page_opens(open_map):
    make_checkpoint("x.pt")
    page, (run,) = open_map("--text", TEXT)
    assert page.locator(".token").count() == len(run["tokens"])
    assert selected(page)[0] >= len(TEXT) // 2
