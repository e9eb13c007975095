"""Where a map's tokens must be on the screen, by a projection of our own, and what is there."""

import io
import json
import re

import matplotlib.image
import numpy as np

from map_contents import TEXT
from small_models import make_checkpoint
from text.tokenizer import BPETokenizer

WORDS = TEXT + " and then sleeps under an old brown tree beside the quick river"
ACCENT, INK, TWIN, CARD = (213, 94, 0), (31, 35, 40), (0, 114, 178), (255, 255, 255)
EYE = 4  # half widths of the longest axis
# what the map draws on its canvas, until the next whole picture: words [text, x, y, width] and
# discs [x, y, radius]
RECORD = """() => {
  const pen = CanvasRenderingContext2D.prototype;
  const [write, clear, arc] = [pen.fillText, pen.fillRect, pen.arc];
  pen.arc = function (...given) {
    window.discs.push(given.slice(0, 3));
    arc.apply(this, given);
  };
  pen.fillText = function (text, x, y) {
    window.written.push([text, x, y, this.measureText(text).width]);
    write.call(this, text, x, y);
  };
  pen.fillRect = function (...box) {
    [window.written, window.discs] = [[], []];
    clear.apply(this, box);
  };
}"""


def words_checkpoint(path="x.pt", **config):
    """A checkpoint whose tokens are parts of words; letters would be drawn as letters."""
    return make_checkpoint(path, BPETokenizer.train([TEXT] * 5, 280), **config)


def settle(page):
    """Wait until what was asked for is drawn: the map draws in the next frame."""
    page.wait_for_timeout(30)
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => setTimeout(done)))")


def camera(page):
    settle(page)
    return np.array(
        page.locator(".scene canvas").first.get_attribute("data-camera").split(","), float
    )


def in_the_box(run, layer):
    """Places of tokens after a layer, in half widths of the longest axis, from the box's middle.

    The box is fitted to the layer, with the shape of that around all layers.
    """
    every = np.array(run["points"])
    low, high = every[layer].min(0), every[layer].max(0)
    half = 1.06 * np.ptp(every, (0, 1)) / 2
    unit = half.max() * (1.06 * (high - low) / 2 / half).max()
    return (every[layer] - (low + high) / 2) / unit


def projected(places, turn, tilt, middle):
    """Pixels (x, y) and depth of places, seen from an eye `EYE` away from the box's middle."""
    left, top, scale = middle
    eye = np.array([np.cos(tilt) * np.cos(turn), np.cos(tilt) * np.sin(turn), np.sin(tilt)])
    right = np.cross([0, 0, 1], eye)
    right /= np.linalg.norm(right)
    up = np.cross(eye, right)
    size = scale * EYE / (EYE - places @ eye)
    return np.stack([left + places @ right * size, top - places @ up * size, places @ eye], 1)


def box_middle(page):
    """The middle of the box in pixels of the page, and the pixels of a half width."""
    canvas = page.locator(".scene canvas").first
    left, top, scale = map(float, canvas.get_attribute("data-middle").split(","))
    frame = canvas.bounding_box()
    return frame["x"] + left, frame["y"] + top, scale


def on_screen(page, run, layer):
    """Pixels (x, y) of the page and depth of tokens, from the camera that the page reports."""
    return projected(in_the_box(run, layer), *camera(page)[:2], box_middle(page))


def written(page):
    """[[text, x, y, width], ...] of the next picture."""
    page.evaluate(RECORD)
    page.focus(".scene canvas")
    page.keyboard.press("0")
    settle(page)
    return page.evaluate("window.written")


def pixels(page):
    page.mouse.move(2, 2)
    settle(page)
    return matplotlib.image.imread(io.BytesIO(page.screenshot()))[..., :3] * 255


def is_colour(picture, place, colour):
    """Whether a pixel within 2 of a place has a colour: an edge may cover the middle."""
    x, y = round(place[0]), round(place[1])
    near = picture[y - 2 : y + 3, x - 2 : x + 3].reshape(-1, 3)
    return np.abs(near - colour).max(1).min() < 14


def rewrite(in_tmp, change):
    """Change the data of runs in the page that was written last."""
    text = (in_tmp / "map.html").read_text(encoding="utf-8")
    found = re.search(r'(id="data"[^>]*>)(.*?)(</script>)', text, re.S)
    data = json.loads(found[2])
    for run in data["runs"]:
        change(run)
    text = text[: found.start(2)] + json.dumps(data) + text[found.end(2) :]
    (in_tmp / "map.html").write_text(text, encoding="utf-8")
