"""The map on its canvas and the charts, in a real browser."""

import base64
import re

import numpy as np
import pytest

from map_browser import selected, wait_until
from map_contents import TEXT, shares_of, unpacked
from map_scene import (
    ACCENT,
    INK,
    RECORD,
    WORDS,
    box_middle,
    camera,
    in_the_box,
    is_colour,
    on_screen,
    pixels,
    projected,
    rewrite,
    settle,
    words_checkpoint,
    written,
)
from small_models import make_checkpoint


def test_tokens_are_where_the_camera_shows_them(open_map):
    """After turning, zooming, by mouse and keys; a click chooses the token in front."""
    words_checkpoint()
    page, (run,) = open_map("--text", WORDS, address="#view=map&token=20&layer=2&head=1&fit=layer")
    order = np.argsort(-shares_of(run)[1, 0, 20])
    sources = [int(n) for n in order[:8] if n != 20 and shares_of(run)[1, 0, 20, n] > 1e-4]
    first = camera(page)

    def check():
        picture, places = pixels(page), on_screen(page, run, 2)
        box = page.locator(".scene canvas").bounding_box()
        inside = (np.abs(places[:, :2] - [box["x"], box["y"]]) > 8).all(1)
        inside &= places[:, 0] < box["x"] + box["width"] - 8
        inside &= places[:, 1] < box["y"] + box["height"] - 8
        seen = [n for n in sources if inside[n]]
        hit = [is_colour(picture, places[n], ACCENT) for n in seen]
        assert len(seen) > 2 and np.mean(hit) > 0.7, hit
        assert is_colour(picture, places[20], INK)
        # every token darkens its place, whatever its depth
        near = [
            picture[round(y) - 2 : round(y) + 3, round(x) - 2 : round(x) + 3] for x, y, _ in places
        ]
        dark = [near[n].min() < 190 for n in np.flatnonzero(inside)]
        assert np.mean(dark) > 0.9
        # the middles of the discs, to a fraction of a pixel
        page.evaluate(f"window.discs ?? ({RECORD})()")
        page.evaluate("[0, 1].forEach(() => document.getElementById('trails').click())")
        settle(page)
        discs = np.array(page.evaluate("window.discs"))[:, :2] + [box["x"], box["y"]]
        off = np.linalg.norm(discs[:, None] - places[:, :2], axis=2).min(0)
        assert off.max() < 0.1
        return places

    before = check()
    middle = page.locator(".scene canvas").bounding_box()
    x, y = middle["x"] + middle["width"] / 2, middle["y"] + middle["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 60, y + 20, steps=3)
    page.mouse.up()
    assert np.allclose(camera(page) - first, [-0.48, 0.16, 0, 0, 0], atol=2e-3)
    assert selected(page) == [20]  # a drag is no click
    turned = check()
    front = before[:, 2].argmax()
    assert turned[front, 0] > before[front, 0] + 5 or before[front, 2] < 0.05
    # the wheel zooms, and what is under the pointer stays there
    frame = [middle["x"], middle["y"]] + np.array([middle["width"], middle["height"]]) / 2
    outer = np.linalg.norm(turned[:, :2] - frame, axis=1).argmax()
    page.mouse.move(*turned[outer, :2])
    page.mouse.wheel(0, -300)
    assert camera(page)[2] == pytest.approx(np.exp(0.45), rel=1e-3)
    zoomed = check()
    assert np.abs(zoomed[outer] - turned[outer]).max() < 1
    # the camera is in the address, and a link opens the same picture
    page.wait_for_timeout(500)
    link = re.search("#.*", page.url)[0]
    again, _ = open_map(address=link)
    assert np.allclose(camera(again), camera(page), atol=1e-3)
    # keys: turn, tilt, zoom, and back to the start
    page.focus(".scene canvas")
    start = camera(page)
    for key in ("Shift+ArrowRight", "Shift+ArrowUp", "+"):
        page.keyboard.press(key)
    assert np.allclose((camera(page) - start)[:2], [0.15, 0.1], atol=1e-3)
    assert camera(page)[2] == pytest.approx(1.1 * start[2], rel=1e-3)
    page.keyboard.press("0")
    assert np.allclose(camera(page), first)

    # two tokens, one behind the other, and no other near them
    points, view = in_the_box(run, 2), box_middle(page)
    marked = {*sources, *np.flatnonzero(np.array(run["tokens"]) == run["tokens"][20])}
    for one, other in np.argwhere(~np.eye(len(points), dtype=bool)):
        x, y, z = points[one] - points[other]  # the eye is on the side of `one`
        turn, tilt = np.round([np.arctan2(y, x), np.arctan2(z, np.hypot(x, y))], 4)
        if abs(tilt) > 1.4 or {one, other} & marked:
            continue
        places = projected(points, turn, tilt, view)
        far = np.linalg.norm((places - places[one])[:, :2], axis=1)
        if far[other] < 2 and np.sort(far)[2] > 12:
            break
    else:
        pytest.fail("no two tokens are behind one another")
    assert places[one, 2] > places[other, 2]
    page.evaluate(
        "(c) => { location.hash = location.hash.replace(/camera=[^&]*/, `camera=${c}`); }",
        f"{turn},{tilt},1,0,0",
    )
    settle(page)
    assert np.allclose(on_screen(page, run, 2), places, atol=0.1)
    page.mouse.click(*places[one, :2])
    assert selected(page) == [one]


def test_names_axes_and_legend(open_map, in_tmp):
    """Inside the frame, none over another; also of a text that is flat or long."""
    words_checkpoint()
    page, (run,) = open_map("--text", WORDS, address="#view=map&token=20&layer=1&head=1&fit=layer")
    found = written(page)
    frame = page.locator(".scene canvas").bounding_box()
    for _, x, y, width in found:
        assert width / 2 <= x <= frame["width"] - width / 2 and 8 < y < frame["height"]
    texts = [text for text, *_ in found]
    shares = [re.search(r"[\d.]+ %", axis)[0] for axis in run["axes"]]
    assert texts[:3] == [f"PC {n + 1} ({share})" for n, share in enumerate(shares)]
    names = found[3:]
    assert texts[3] == run["labels"][20].strip("␣") and 8 <= len(names) <= 20
    boxes = np.array([[x - w / 2, y - 9, x + w / 2, y + 2] for _, x, y, w in names])
    for n, box in enumerate(boxes):
        rest = np.delete(boxes, n, 0)
        apart = (rest[:, :2] >= box[2:]).any(1) | (rest[:, 2:] <= box[:2]).any(1)
        assert apart.all(), names[n]
    stage = page.locator(".stage").bounding_box()
    for part in (".scene .legend", ".scene .note"):
        box = page.locator(part).bounding_box()
        assert box["y"] + box["height"] <= stage["y"] + stage["height"] <= 800
    assert "principal components" in page.inner_text(".scene .note")
    # with the pointer on a token, what it is
    x, y, _ = on_screen(page, run, 1)[20]
    page.mouse.move(x, y)
    told = page.inner_text(".scene .tooltip")
    assert "position 20 " in told and f"mass {run['mass'][20]:.3g}"[:9] in told

    # all tokens at one place in a layer
    def flat(run):
        run["points"][1] = [[0.0, 0.0, 0.0] for _ in run["labels"]]

    rewrite(in_tmp, flat)
    page, (run,) = open_map(address="#view=map&layer=1&token=3&fit=layer")
    left, top, _ = map(float, page.get_attribute(".scene canvas", "data-middle").split(","))
    box = page.locator(".scene canvas").bounding_box()
    assert is_colour(pixels(page), (box["x"] + left, box["y"] + top), INK)

    # 2,500 tokens: the legend says what is not drawn
    times = 2500 // len(run["labels"])

    def repeat(run):
        count = len(run["labels"])

        def tiled(text, dtype, *shape, width):
            values = unpacked(text, dtype).reshape(*shape, count, width)
            return base64.b64encode(np.tile(values, (times, 1)).tobytes()).decode()

        layers, heads, given = run["numLayers"], run["numHeads"], run["attention"]
        run["z"] = tiled(run["z"], "<i2", layers + 1, width=run["numCoords"])
        for name in ("q", "k"):
            if given[name]:
                given[name] = tiled(given[name], "<i2", layers, heads, width=given["width"])
        for name in ("ids", "chances"):
            run["lens"][name] = tiled(run["lens"][name], "<u2", layers + 1, width=5)
        noise = np.random.default_rng(0).normal(0, 0.1, (layers + 1, count * times, 3))
        run["points"] = (np.tile(run["points"], (1, times, 1)) + noise).tolist()
        run["starts"] = list(range(count * times))
        for name in ("tokens", "labels", "texts", "mass", "loss", "counts"):
            run[name] = run[name] * times
        run["off"] = None

    rewrite(in_tmp, repeat)
    page, _ = open_map(address="#view=map&layer=2&token=900")
    assert "too many tokens for trails and names" in page.inner_text(".scene .legend")
    before = pixels(page)
    page.focus(".scene canvas")
    page.keyboard.press("Shift+ArrowRight")
    assert np.abs(pixels(page) - before).mean() > 1


def test_letters_a_phone_and_lines_on_log_axes(open_map, in_tmp):
    """A model of characters shows the letters themselves; curves are where the ticks say."""
    make_checkpoint("x.pt")
    page, (run,) = open_map("--text", TEXT, address="#view=map&token=20&layer=2")
    found = written(page)
    letters = [text for text, *_ in found if not text.startswith("PC")]
    assert sorted(letters) == sorted(run["labels"])
    # on a phone the frame still holds its legend; a finger that moves sideways turns the map, one
    # that moves upwards scrolls the page, two zoom
    page, _ = open_map(address="#view=map", width=390, height=844, has_touch=True, is_mobile=True)
    stage, note = (page.locator(name).bounding_box() for name in (".stage", ".scene .note"))
    assert note["y"] + note["height"] <= stage["y"] + stage["height"]
    box = page.locator(".scene canvas").bounding_box()
    assert box["height"] > 200
    touch = page.context.new_cdp_session(page)

    def swipe(*fingers):
        """Fingers that move from one place to another, both relative to the middle of the map."""
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        for step in range(6):
            points = [
                {"id": n, "x": x + a + (c - a) * step / 5, "y": y + b + (d - b) * step / 5}
                for n, (a, b, c, d) in enumerate(fingers)
            ]
            kind = "touchMove" if step else "touchStart"
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        return camera(page)

    first = camera(page)
    turned = swipe((0, 0, 100, 0))
    assert turned[0] < first[0] - 0.5 and page.evaluate("scrollY") == 0
    zoomed = swipe((-20, 0, -60, 0), (20, 0, 60, 0))
    assert zoomed[2] == pytest.approx(3, rel=0.1)
    page.evaluate("document.body.style.minHeight = '2000px'")
    swiped = swipe((0, 60, 0, -60))
    wait_until(page, "scrollY > 60")
    assert abs(swiped[0] - zoomed[0]) < 0.1

    # curves
    page, _ = open_map(address="#view=heads&layer=1")
    chart = page.locator(".chart").last
    ticks = chart.locator(".tick").evaluate_all(
        "all => all.map(t => ['x', 'y'].map(a => Number(t.getAttribute(a))).concat(t.textContent))"
    )
    across = {float(t): x for x, _, t in ticks if "%" not in t}
    up = {float(t.split()[0]) / 100: y - 4 for _, y, t in ticks if "%" in t and float(t[:-2])}
    paths = chart.locator("path").evaluate_all("all => all.map(p => p.getAttribute('d'))")
    assert len(paths) == run["numHeads"] == 2
    back = np.array(run["pull"]["back"])
    x = np.interp(
        np.log(1 + back),
        *zip(*[(np.log(1 + t), x) for t, x in sorted(across.items())], strict=True),
    )
    y_per_decade = (up[1.0] - up[0.01]) / 2
    for path, values in zip(paths, run["pull"]["of"][0], strict=True):
        points = np.array(re.findall(r"[ML]([-\d.]+),([-\d.]+)", path), float)
        values = np.array(values)
        seen = values > 1e-4
        assert np.allclose(
            points[seen, 1], up[1.0] + y_per_decade * np.log10(values[seen]), atol=0.2
        )
        known = back <= max(across)
        assert np.allclose(points[known, 0], x[known], atol=0.2)
    box = chart.locator(".picture").bounding_box()
    first = re.findall(r"[ML]([-\d.]+),([-\d.]+)", paths[1])[1]
    page.mouse.move(box["x"] + float(first[0]), box["y"] + float(first[1]))
    told = chart.locator(".tooltip").inner_text()
    assert "from 1 back" in told
    chart.get_by_role("button", name="head 2").click()
    faded = chart.locator("path").evaluate_all("all => all.map(p => p.getAttribute('opacity'))")
    assert faded == ["0.15", "1"]
    page.mouse.move(box["x"] + float(first[0]), box["y"] + float(first[1]))
    assert chart.locator(".tooltip").inner_text().startswith("head 2")

    # a vanilla transformer: a sentence that says where to look instead
    def vanilla(run):
        run.update(
            dict.fromkeys(("points", "axes", "z", "zScale", "numCoords", "mass", "vocabulary"))
        )
        law = {"slope": None, "sink": None}
        run["kind"] = run["law"] = "vanilla"
        run["attention"]["heads"] = [[law] * run["numHeads"]] * run["numLayers"]

    rewrite(in_tmp, vanilla)
    page, _ = open_map(address="#view=map")
    for view in ("map", "masses"):
        page.click(f"#tab-{view}")
        assert "See Heads" in page.inner_text(".no-picture:visible")
