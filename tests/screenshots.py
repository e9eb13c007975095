"""Takes a picture of a map's page in a real browser, for the README.

python tests/screenshots.py coords.html --output reports/map_page.png
python tests/screenshots.py coords.html --animation --output reports/map.webp
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
COLOURS = 128  # enough for a page, and a file of half the size
AN_HOUR = 3_600_000  # ms, later than any page takes to load
FRAME = 140  # ms of the page's clock between two frames
LAST_FRAME = 2500  # ms that the last frame stays, before the animation starts again
QUALITY = 40  # of the animation's frames, as WebP counts it


def main():
    """Write one picture: a still of the page, or an animation of its map."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("page", help="page written by visualize_coords.py")
    add("--output", default="map_page.png", help="(default: %(default)s)")
    add("--width", type=int, default=1360, help="pixels (default: %(default)s)")
    add("--height", type=int, default=800, help="pixels (default: %(default)s)")
    add("--animation", action="store_true", help="press Play and write an animated WebP")
    add("--token", type=int, default=-1, help="the token selected in it (default: the last)")
    args = parser.parse_args()
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=FLAGS)
        page = browser.new_page(viewport={"width": args.width, "height": args.height})
        if args.animation:
            save_animation(page, args)
        else:
            save_still(page, args)
        browser.close()
    print(f"wrote {args.output}")


def save_still(page, args):
    """Select what the token of the highest loss was predicted from, and save the whole page."""
    page.goto(Path(args.page).resolve().as_uri())
    page.wait_for_timeout(3 * SETTLED)
    page.locator(".details .go").last.scroll_into_view_if_needed()
    losses = page.get_by_text("Highest loss").locator("..")
    losses.locator(".go").nth(-6).click()
    page.wait_for_timeout(SETTLED)
    page.get_by_text("what pulled that").first.click()
    page.mouse.move(0, 0)
    page.wait_for_timeout(SETTLED)
    picture_of(page).quantize(COLOURS).save(args.output, optimize=True)


def save_animation(page, args):
    """Select one token, press Play, and save the frames from before the first layer to the last."""
    page.clock.install(time=0)
    page.goto(Path(args.page).resolve().as_uri())
    page.wait_for_selector("body[data-ready]", state="attached")
    page.locator(".token").nth(args.token).click()
    page.locator("#layer").focus()
    page.keyboard.press("Home")
    page.mouse.move(0, 0)
    page.wait_for_timeout(SETTLED)
    # The page's clock stands still between two frames, so that a slow computer drops none.
    page.clock.pause_at(AN_HOUR)
    frames = [picture_of(page)]
    page.click("#play")
    while page.inner_text("#play") != "Play":
        page.clock.run_for(FRAME)
        frames.append(picture_of(page))
    durations = [FRAME] * (len(frames) - 1) + [LAST_FRAME]
    frames[0].save(
        args.output,
        save_all=True,
        append_images=frames[1:],
        duration=durations,
        loop=0,
        quality=QUALITY,
        method=6,
    )


def picture_of(page):
    """What the page shows now, in RGB."""
    return Image.open(io.BytesIO(page.screenshot())).convert("RGB")


if __name__ == "__main__":
    main()
