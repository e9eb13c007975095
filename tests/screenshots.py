"""Takes a picture of a map's page in a real browser, for the README.

python tests/screenshots.py coords.html --output reports/map_page.png
"""

import argparse
import io
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from conftest import BROWSER

FLAGS = ("--no-sandbox", "--disable-background-networking", "--enable-unsafe-swiftshader")
SETTLED = 1500  # ms
COLOURS = 128  # enough for a page, and the file is half as large


def main():
    """Show from what a token of high loss was predicted, and take a picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("page", help="page written by visualize_coords.py")
    add("--output", default="map_page.png", help="(default: %(default)s)")
    add("--width", type=int, default=1360, help="pixels (default: %(default)s)")
    add("--height", type=int, default=800, help="pixels (default: %(default)s)")
    args = parser.parse_args()
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=FLAGS)
        page = browser.new_page(viewport={"width": args.width, "height": args.height})
        page.goto(Path(args.page).resolve().as_uri())
        page.wait_for_timeout(3 * SETTLED)
        page.locator(".details .go").last.scroll_into_view_if_needed()
        losses = page.get_by_text("Highest loss").locator("..")
        losses.locator(".go").nth(-6).click()
        page.wait_for_timeout(SETTLED)
        page.get_by_text("what pulled that").first.click()
        page.mouse.move(0, 0)
        page.wait_for_timeout(SETTLED)
        picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        browser.close()
    picture.quantize(COLOURS).save(args.output, optimize=True)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
