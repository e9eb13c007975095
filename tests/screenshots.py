"""Takes pictures of a map's page in a real browser, for the docs.

python tests/screenshots.py docs/looking_inside.md docs/gallery/README.md
python tests/screenshots.py docs/gallery/english.html --address "view=orbit&token=67" --until 80

Of a Markdown file: each picture in it that links to a page, [![...](picture)](page.html#...), is
taken anew from that page as the link opens it. Of a page: an animation of what Play does, up to a
token, without the header.
"""

import argparse
import io
import re
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from conftest import BROWSER

FLAGS = ("--no-sandbox", "--disable-background-networking")
LINKED_PICTURE = re.compile(r"\[!\[[^\]]*\]\(([^)]+)\)\]\(([^)#]+\.html)#([^)]*)\)")
SIZE = (1280, 800)
SETTLED = 1500  # ms
AN_HOUR = 3_600_000  # ms, later than any page takes to load
FRAME = 150  # ms of the page's clock between two frames
LAST_FRAME = 3000  # ms that the last frame stays, before the animation starts again
LONGEST = 400  # frames
QUALITY = {"still": 70, "animation": 40}  # as WebP counts it


def main():
    """Take the pictures that each Markdown file links, or one animation of a page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("sources", nargs="+", help="Markdown files, or one page")
    add("--address", default="", help="what follows the # in the page's address (default: nothing)")
    add("--output", default="orbit.webp", help="the animation's file (default: %(default)s)")
    add("--until", type=int, metavar="TOKEN", help="stop Play there (default: at the end)")
    add("--width", type=int, default=SIZE[0], help="pixels (default: %(default)s)")
    add("--height", type=int, default=SIZE[1], help="pixels (default: %(default)s)")
    args = parser.parse_args()
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=FLAGS)
        view = {"viewport": {"width": args.width, "height": args.height}}
        for source in args.sources:
            if source.endswith(".md"):
                for picture, address in linked_pictures(Path(source)):
                    page = browser.new_page(**view)
                    save_still(page, address, picture)
                    page.close()
            else:
                page = browser.new_page(**view)
                save_animation(page, address_of(source, args.address), args.until, args.output)
        browser.close()


def linked_pictures(document):
    """[(picture's path, address of the page that it shows)] of a Markdown file."""
    found = LINKED_PICTURE.findall(document.read_text(encoding="utf-8"))
    folder = document.parent
    return [(folder / picture, address_of(folder / page, end)) for picture, page, end in found]


def address_of(page, end):
    return f"{Path(page).resolve().as_uri()}#{end}"


def save_still(page, address, output):
    """Save what an address opens."""
    opened(page, address)
    page.wait_for_timeout(SETTLED)
    picture_of(page).save(output, quality=QUALITY["still"], method=6)
    print(f"wrote {output}")


def save_animation(page, address, until, output):
    """Press Play, and save the frames until it has ended or has come to a token."""
    page.clock.install(time=0)
    opened(page, address)
    # The page's clock stands still between two frames, so that a slow computer drops none.
    page.clock.pause_at(AN_HOUR)
    page.click("#play")
    panel = page.locator("#panel")
    frames = [picture_of(panel)]
    while page.get_attribute("#play", "aria-pressed") == "true" and len(frames) < LONGEST:
        if page.get_attribute('.token[aria-selected="true"]', "data-token") == str(until):
            page.click("#play")
        page.clock.run_for(FRAME)
        frames.append(picture_of(panel))
    page.clock.run_for(SETTLED)
    frames[-1] = picture_of(panel)
    frames[0].save(
        output,
        save_all=True,
        append_images=frames[1:],
        duration=[FRAME] * (len(frames) - 1) + [LAST_FRAME],
        loop=0,
        quality=QUALITY["animation"],
        method=6,
    )
    print(f"wrote {output}: {len(frames)} frames")


def opened(page, address):
    """Open an address, and wait until the page is drawn."""
    page.goto(address)
    page.wait_for_selector("body[data-ready]", state="attached")
    page.mouse.move(0, 0)


def picture_of(part):
    """What a page, or a part of it, shows now, in RGB."""
    return Image.open(io.BytesIO(part.screenshot())).convert("RGB")


if __name__ == "__main__":
    main()
