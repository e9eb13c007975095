"""The orbit view in a real browser, held against the law in Python."""

import re

import numpy as np
import pytest
import torch

from engine.pulls import listen
from gravity.law import gravity_field
from map_contents import TEXT
from small_models import LETTERS, make_checkpoint, make_checkpoint_with_background


@pytest.fixture
def open_orbit(open_map):
    """A function that writes a page of x.pt and opens it at an address."""

    def open_orbit(address="", *flags, text=TEXT, motion="reduce", **more):
        page, _ = open_map(
            *("--text", text, *flags), address=f"#{address}", reduced_motion=motion, **more
        )
        return page

    return open_orbit


@torch.no_grad()
def law_of(model, text, layer, head, token):
    """What the law says of the sources of a token: `space`, `time`, `distance`, `share`, `mass` and
    the `place` of each source along the first two principal axes of all."""
    heard = []
    tokens = torch.tensor([LETTERS.encode(text)])
    with listen(model, lambda attn, z, mass, *_: heard.append((attn, z.double(), mass.double()))):
        model(tokens)
    attn, z, mass = heard[layer - 1]
    attn.double()
    q, k = (x[:, head : head + 1] for x in attn.points(z))
    law = dict(attn.field_law())
    for name in ("time_scale", "time_offset", "radius"):
        law[name] = None if law[name] is None else law[name][head : head + 1].double()
    field = gravity_field(q, k, mass, **law)[0, 0, token, : token + 1]
    background = 0 if attn.background is None else attn.background[head].double()
    age = token - torch.arange(token + 1)
    space = (q[0, 0, token] - k[0, 0, : token + 1]).norm(dim=-1)
    time = (law["time_scale"] * (age - law["time_offset"])).abs()
    centred = (k[0, 0] - k[0, 0].mean(0)).numpy()
    axes = np.linalg.svd(centred, full_matrices=False)[2][:2]
    found = {"space": space, "time": time, "distance": (space**2 + time**2).sqrt()}
    found |= {"share": field / (background + field.sum()), "mass": mass[0, : token + 1]}
    attn.float()
    return {name: value.numpy() for name, value in found.items()} | {"place": centred @ axes.T}


def drawn(page):
    """What the picture shows: per source [x, y, radius, width of its line], by its position."""
    found = page.evaluate(
        """() => [...document.querySelectorAll('.sky .dots circle')].map(circle => {
        const source = circle.dataset.source;
        const line = document.querySelector(`.sky line[data-source="${source}"]`);
        const width = line.getAttribute('visibility') === 'visible'
            ? line.getAttribute('stroke-width') : 0;
        return [source, ...['cx', 'cy', 'r'].map(name => circle.getAttribute(name)), width]
            .map(Number) })"""
    )
    return np.array(sorted(found))[:, 1:]


def centre(page):
    return np.array(
        page.evaluate(
            """() => { const text = document.querySelector('.sky .centre text');
            return ['x', 'y'].map(name => Number(text.getAttribute(name))) }"""
        )
    )


def is_straight(x, y):
    """Whether y grows with x along a straight line; returns that line."""
    line = np.polyfit(x, y, 1)
    assert line[0] > 0 and np.abs(np.polyval(line, x) - y).max() < 0.4
    return line


def softened(distance):
    """The logarithm of a distance as the law softens it."""
    return np.log(np.sqrt(1 + np.square(distance)))


def selected(page):
    return int(page.locator('.token[aria-selected="true"]').get_attribute("data-token"))


def test_the_picture_is_what_the_law_says(open_orbit):
    model = make_checkpoint_with_background("x.pt")
    page = open_orbit("token=30&layer=2&head=2")
    law = law_of(model, TEXT, 2, 1, 30)
    dots = drawn(page)
    assert len(dots) == 31

    # distance, on rings with numbers
    x, y = (dots[:, :2] - centre(page)).T
    out = np.hypot(x, y)
    line = is_straight(softened(law["distance"]), out)
    rings = page.evaluate(
        """() => Object.fromEntries([...document.querySelectorAll('.rings text:not(.caption)')]
        .map(text => [text.textContent, Number(text.getAttribute('y'))]))"""
    )
    assert len(rings) > 1
    for ring, height in rings.items():
        assert centre(page)[1] - height == pytest.approx(
            np.polyval(line, softened(float(ring))), abs=0.5
        )

    # direction; an axis has no sign of its own
    angle = np.arctan2(-y, x)
    signs = [(a, b) for a in (1, -1) for b in (1, -1)]
    places = [law["place"][:31] * sign for sign in signs]
    wrong = [np.angle(np.exp(1j * (np.arctan2(*p.T[::-1]) - angle))) for p in places]
    assert min(np.abs(w * out).max() for w in wrong) < 1

    # lines by the share of the pull, dots by mass
    strong = law["share"] > 0.002
    assert np.ptp(dots[strong, 3] / np.sqrt(law["share"][strong])) < 0.1
    assert np.all(dots[law["share"] < 0.001, 3] == 0) and strong.sum() > 5
    order = law["mass"].argsort()
    assert np.all(np.diff(dots[order, 2]) >= 0) and np.ptp(dots[:, 2]) > 0.5

    # in words
    best = int(law["share"].argmax())
    why = page.inner_text(".orbit-why")
    assert page.inner_text(".orbit-why .chip") == LETTERS.label(LETTERS.encode(TEXT)[best])
    assert f"{law['distance'][best]:.2g}" in why
    assert f"the middle source {np.median(law['distance']):.2g}" in why
    percent = float(re.search(r"\(([\d.]+) %\)", why)[1])
    assert percent == pytest.approx(100 * law["share"][best], abs=0.51)
    space, time = (np.median(law[part]) for part in ("space", "time"))
    usual = (1 + space**2 + time**2) ** -model.config.exponent
    near = (1 + law["space"][best] ** 2 + time**2) ** -model.config.exponent >= 2 * usual
    recent = (1 + space**2 + law["time"][best] ** 2) ** -model.config.exponent >= 2 * usual
    assert ("near in space" in why) == near
    assert ("recent" in why or "near in time" in why) == recent
    heavier = law["mass"][best] / np.median(law["mass"])
    told = float(re.search(r"([\d.]+)\u00a0× by mass", why)[1])
    assert told == pytest.approx(heavier, rel=0.06) and ("adds" in why) == (heavier >= 1.1)
    quiet = float(re.search(r"Quiet ([\d.]+) %", why)[1])
    assert quiet == pytest.approx(100 * (1 - law["share"].sum()), abs=0.51)

    # names do not cover each other
    boxes = page.eval_on_selector_all(
        ".name text",
        """all => all.map(text => { const { x, y, width, height } = text.getBBox();
        return [x, y, x + width, y + height] })""",
    )
    assert 3 < len(boxes) <= 8
    for n, one in enumerate(boxes):
        for other in boxes[:n]:
            apart = [one[k] >= other[k + 2] - 1 or other[k] >= one[k + 2] - 1 for k in (0, 1)]
            assert any(apart), (one, other)

    # a note at the pointer; two axes; a click
    box = page.locator(".sky").bounding_box()
    far = int(out.argmax())
    at = [box["x"] + dots[far, 0], box["y"] + dots[far, 1]]
    page.mouse.move(*at)
    told = page.inner_text(".orbit-note")
    for part in ("distance", "space", "time"):
        assert f"{law[part][far]:.2g}".rstrip("0").rstrip(".") in told
    page.get_by_role("radio", name="as two axes").check()
    split = drawn(page)
    is_straight(softened(law["space"]), split[:, 0])
    is_straight(softened(law["time"]), -split[:, 1])
    page.get_by_role("radio", name="as colour").check()
    assert np.array_equal(drawn(page), dots)
    page.mouse.click(*at)
    assert selected(page) == far and len(drawn(page)) == far + 1
    page.keyboard.press("Home")
    assert "The first token" in page.inner_text(".orbit-why") and len(drawn(page)) == 1


def test_heads_by_mouse_and_keyboard(open_orbit):
    model = make_checkpoint("x.pt")
    page = open_orbit("token=20&layer=1&head=1")
    page.locator(".strip button").nth(3).click()
    assert page.input_value("#layer") == "2" and page.input_value("#head") == "1"
    law = law_of(model, TEXT, 2, 1, 20)
    x, y = (drawn(page)[:, :2] - centre(page)).T
    is_straight(softened(law["distance"]), np.hypot(x, y))
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowUp")
    chosen = page.locator('.strip button[aria-pressed="true"]')
    assert chosen.count() == 1 and selected(page) == 20
    assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
    page.locator(".strip button:focus[title]").wait_for()
    law = law_of(model, TEXT, 1, 0, 20)
    best = LETTERS.label(LETTERS.encode(TEXT)[int(law["share"].argmax())])
    assert chosen.get_attribute("title").startswith(f"layer 1, head 1: {best} pulls ")
    width = chosen.evaluate("button => parseFloat(button.style.getPropertyValue('--most'))")
    assert width == pytest.approx(100 * law["share"].max(), abs=0.2)
    # the strongest sources can be reached and chosen without a mouse
    name = page.locator(".name.first")
    name.focus()
    assert page.is_visible(".orbit-note")
    page.keyboard.press("Enter")
    strongest = int(law["share"].argmax())
    assert selected(page) == strongest
    page.keyboard.press("Enter")
    assert selected(page) == int(law_of(model, TEXT, 1, 0, strongest)["share"].argmax())


def test_the_sentence_is_played(open_orbit):
    make_checkpoint("x.pt")
    text = "the quick brown fox\njumps"
    page = open_orbit("token=22&layer=1&head=1", text=text, motion="no-preference")
    page.evaluate(
        """() => { window.seen = [];
        const note = () => { const shown = document.querySelector('.sky .centre text').textContent;
            if (shown !== seen.at(-1)) seen.push(shown); };
        new MutationObserver(note).observe(document.querySelector('.sky .centre'),
            { childList: true, subtree: true }); }"""
    )
    page.click("#play")
    page.get_by_role("button", name="Play").wait_for()
    assert page.evaluate("seen") == list("jumps")
    assert selected(page) == len(text) - 1
    page.locator('.names[opacity="1"]').wait_for(state="attached")
    glided = drawn(page)
    page.emulate_media(reduced_motion="reduce")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowRight")
    assert np.array_equal(drawn(page), glided)
    # from the end it begins again; any other action stops it
    page.click("#play")
    page.locator(".dots circle:nth-child(3)").wait_for()
    page.locator(".token").nth(9).click()
    page.get_by_role("button", name="Play").wait_for()
    assert selected(page) == 9


def test_what_cannot_be_drawn_is_said(open_orbit):
    make_checkpoint("x.pt", model_type="vanilla")
    page = open_orbit("view=orbit")
    assert "has no masses and distances" in page.inner_text(".orbit")
    page.get_by_role("button", name="Show its heads").click()
    assert page.get_by_role("tab", selected=True).inner_text() == "Heads"

    make_checkpoint("x.pt", radius=1e-3)
    page = open_orbit("token=20")
    assert "Nothing reaches it" in page.inner_text(".orbit-why") and len(drawn(page)) == 21
    make_checkpoint("x.pt", law="published", block_size=64)
    page = open_orbit("token=20")
    assert "distance alone does not decide" in page.inner_text(".orbit-why")
    assert page.get_by_role("radio").count() == 0 and len(drawn(page)) == 21


def test_of_many_sources_some_are_drawn(open_orbit):
    model = make_checkpoint_with_background("x.pt")
    text = TEXT * 17
    flags = ["token=720&layer=1&head=1", "--num-tokens", "760"]
    page = open_orbit(*flags, text=text, width=390, height=844, has_touch=True)
    shares = law_of(model, text, 1, 0, 720)["share"]
    sources = page.eval_on_selector_all(".dots circle", "all => all.map(c => +c.dataset.source)")
    strongest = np.flatnonzero(shares > np.sort(shares)[-300])
    assert len(sources) <= 600 and set(strongest) <= set(sources) and len(strongest) > 100
    assert f"300 strongest of {len(shares)} sources" in page.inner_text(".sample")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.locator(".name.first text").tap()
    assert selected(page) == int(shares.argmax())
