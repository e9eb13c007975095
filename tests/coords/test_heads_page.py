"""The view of the heads in a real browser, against float64 in Python."""

import base64
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from coords.heads import heads_table, pull_by_distance
from map_browser import runs_of
from map_contents import TEXT
from small_models import make_checkpoint, pull_weights


def ids_of(run):
    return torch.tensor([run["tokens"]])


def percent(text):
    return float(re.search(r"([\d.]+) %", text)[1]) / 100


def pixels(canvas, places):
    """The colours (N, 3) of a canvas at places in CSS pixels."""
    found = canvas.evaluate(
        """(canvas, places) => {
            const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
            return places.map(([x, y]) => {
                const at = 4 * (Math.floor(y) * canvas.width + Math.floor(x));
                return [...data.slice(at, at + 3)]; }); }""",
        np.array(places).tolist(),
    )
    return np.array(found)


def heat(share):
    """The colours (..., 3) of shares: from the light paper over the accent to the ink."""
    stops = np.array([[255, 255, 255], [0xD5, 0x5E, 0], [0x1F, 0x23, 0x28]])
    return np.stack([np.interp(np.sqrt(share), [0, 0.6, 1], x) for x in stops.T], -1)


def test_heads_at_a_glance_and_one_large(show):
    """The drawn colours and the words are Python's shares of the pull; the keyboard is enough."""
    model = make_checkpoint("x.pt", num_heads=3, hidden_dim=24).double()
    runs = runs_of("--text", TEXT)
    shares = pull_weights(model, ids_of(runs[0])).numpy()
    page = show(runs, "view=heads&token=30&head=mean&layer=1")
    told = page.locator(".answers li").all_inner_texts()
    one_back = np.array([[np.diag(x, -1).sum() / len(x) for x in layer] for layer in shares])
    layer, head = np.unravel_index(one_back.argmax(), one_back.shape)
    assert f"one token back: layer {layer + 1} head {head + 1}" in told[1]
    assert "window ends" in told[3] and "counting" not in told[0]
    grid, text = page.locator(".multiples").bounding_box(), page.locator(".answers").bounding_box()
    assert (
        text["y"] > 0 and grid["y"] + grid["height"] < 800 and page.locator(".small").count() == 6
    )

    # the selected token's row: bars as high as the root of their shares
    page.get_by_role("button", name="the selected token", exact=True).click()
    canvas = page.locator(".small canvas").nth(4)
    size = canvas.bounding_box()
    room, tall = size["width"] / len(TEXT), round(size["height"])
    for source in np.argsort(shares[1, 1, 30])[-3:]:
        column = pixels(canvas, [((source + 0.5) * room, y) for y in range(tall)])
        high = (np.abs(column - [0xD5, 0x5E, 0]).max(1) < 8).sum()
        assert high == pytest.approx(tall * np.sqrt(shares[1, 1, 30, source]), abs=1.5)

    # by the keyboard to layer 2 head 2, which becomes large
    page.locator(".modes button").last.focus()
    page.keyboard.press("Tab")
    for key in ("ArrowDown", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    assert page.is_hidden(".multiples") and "layer 2 · head 2" in page.inner_text(".told")
    canvas = page.locator(".heatmap canvas")
    side = canvas.evaluate("canvas => canvas.clientWidth") - 84
    cell = side / len(TEXT)
    token, source = np.array([(0, 0), (30, 29), (30, 27), (42, 40), (20, 25)]).T
    drawn = pixels(canvas, np.stack([84 + (source + 0.5) * cell, 7 + (token + 0.5) * cell], 1))
    assert np.allclose(drawn, heat(shares[1, 1, token, source]), atol=6)
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 84 + 27.5 * cell, box["y"] + 7 + 30.5 * cell)
    told = page.inner_text(".heatmap output")
    assert "(30)" in told and "(27), 3 back" in told
    assert percent(told) == pytest.approx(shares[1, 1, 30, 27], abs=0.0051)
    canvas.focus()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    page.wait_for_url("**token=29**")
    assert "layer=2&head=2" in page.url
    page.get_by_role("button", name="Show in orbit").click()
    assert page.get_by_role("tab", selected=True).inner_text() == "Orbit"

    page = show(runs, "view=heads&shown=all", width=390, height=844, color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    # a heatmap from corner to corner
    canvas = page.locator(".small canvas").nth(5)
    size = canvas.bounding_box()
    corner, beyond = pixels(canvas, [(0.5, 0.5), (size["width"] - 1.5, 0.5)])
    assert np.abs(beyond - [0x1B, 0x1F, 0x24]).max() < 3 < np.abs(corner - beyond).max()
    page.locator(".small").nth(5).click()
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def placed(run, heads, law):
    """Give a run of two layers with two heads places of our own; returns their shares (2, 2, T, T).

    Args:
        heads: per head `(q, k)`, (T, W) each.
        law: per head its `(timeScale, timeOffset)`.
    """
    q, k = (np.stack(x).reshape(2, 2, len(run["tokens"]), -1) for x in zip(*heads, strict=True))
    scale = np.abs(q).max() / 32767
    packed = [base64.b64encode(np.rint(x / scale).astype("<i2").tobytes()).decode() for x in (q, k)]
    numbers = [
        {"timeScale": scale, "timeOffset": offset, "background": None, "radius": None}
        for scale, offset in law
    ]
    run["attention"] = {
        **run["attention"],
        **{"width": q.shape[-1], "cutoff": "none", "massInValue": True, "q": packed[0]},
        **{"k": packed[1], "scale": [[scale] * 2] * 2, "heads": [numbers[:2], numbers[2:]]},
    }
    age = np.arange(q.shape[2])[:, None] - np.arange(q.shape[2])
    time = [scale * (age - offset) for scale, offset in law]
    r2 = np.square(q[..., :, None, :] - k[..., None, :, :]).sum(-1)
    field = np.tril((1 + r2 + np.square(time).reshape(r2.shape)) ** -4.0)
    return field / field.sum(-1, keepdims=True)


def test_words_of_heads_that_copy_find_look_back_and_see_far(show):
    """Heads that are made to do so; the measure of copying is that of Python's loops."""
    text = "".join(random.Random(3).choices("abcdef", k=90))
    model = make_checkpoint("x.pt")
    (run,) = runs_of("--text", text)
    code = np.eye(6)[[ord(letter) - ord("a") for letter in text]] * 2
    before, nowhere = np.roll(code, 1, 0), np.zeros_like(code)
    before[0] = -2
    shares = placed(
        run,
        [(code, before), (code, code), (nowhere + 1, nowhere + 1), (nowhere, nowhere)],
        [(0.001, 0.0), (0.001, 0.0), (3.0, 1.0), (0.0, 0.0)],
    )
    profile = np.zeros(shares.shape[:3])
    for token in range(len(text)):
        profile[:, :, : token + 1] += shares[:, :, token, token::-1] / len(text)
    looks = heads_table(model, SimpleNamespace(kind="newton", profile=profile))
    run["heads"] = [old | new for old, new in zip(run["heads"], looks, strict=True)]
    back, pull = pull_by_distance(profile, False)
    run["pull"] = {"back": back.tolist(), "of": pull.tolist()}

    copied, whole = 0, 0
    for token in range(1, len(text)):
        after = [n + 1 for n in range(token - 1) if text[n] == text[token]]
        copied += shares[0, 0, token, after].sum()
        whole += bool(after)
    page = show([run], "view=heads")
    words = page.locator(".small .does").all_inner_texts()
    assert [re.sub(r" \d+ %", "", word) for word in words] == [
        *("copies", "the same token before", "one back", "far and wide")
    ]
    assert percent(words[0]) == pytest.approx(copied / whole, abs=0.006) and copied / whole > 0.5
    told = page.locator(".answers li").first.inner_text()
    assert "Copies: layer 1 head 1" in told and f"{100 * copied / whole:.0f} %" in told
    # a head that copies must give such places more than their distance explains
    assert percent(told.split("alone")[1]) < 0.3
