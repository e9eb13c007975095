"""The views of the heads and of the next token in a real browser, against float64 in Python."""

import base64
import copy
import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import visualize_coords
from conftest import BROWSER
from coords.heads import heads_table, pull_by_distance
from coords.page import map_page
from map_contents import TEXT, data_of
from small_models import LETTERS, make_checkpoint, pull_weights
from text.tokenizer import BPETokenizer

sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright here")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium here")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def show(browser, in_tmp):
    """A function that opens a page of given runs, which may cause no errors and no requests."""
    wrong, contexts = [], []

    def show(runs, address, live=False, script="", width=1280, height=800, **context):
        path = in_tmp / "map.html"
        path.write_text(map_page(runs, "a map", 2, live=live), encoding="utf-8")
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **context))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda line: line.type == "error" and wrong.append(line.text))
        page.on("request", lambda asked: asked.url.startswith("http") and wrong.append(asked.url))
        page.add_init_script(script)
        page.goto(f"{path.as_uri()}#{address}")
        page.wait_for_selector("body[data-ready]", state="attached")
        return page

    yield show
    for context in contexts:
        context.close()
    assert not wrong


def runs_of(*flags):
    visualize_coords.main(["--checkpoint-path", "x.pt", "--output", "map.html", *flags])
    return data_of(Path("map.html"))


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


@torch.no_grad()
def lens_of(model, tokens):
    """Chances of the next token after each layer, (L + 1, T, V)."""
    states = []
    hooks = [
        layer.register_forward_hook(
            lambda _, inputs, outputs: states.extend([inputs[0], outputs[0]])
        )
        for layer in model.layers
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    kept = [states[0], *states[1::2]]
    return torch.stack([model.head(model.norm(h))[0] for h in kept]).softmax(-1).numpy()


@torch.no_grad()
def without(model, layer, head, tokens):
    """Chances (T, V) by a model that has no such head: its columns of the output map are 0."""
    model = copy.deepcopy(model)
    weight = model.layers[layer].attn.out_proj.weight
    width = weight.shape[1] // model.config.num_heads
    weight[:, head * width : (head + 1) * width] = 0
    return model(tokens)[0].softmax(-1).numpy()


def likeliest(chances):
    return [(LETTERS.label(int(n)), chances[n]) for n in np.argsort(-chances)[:5]]


def moved(before, after):
    """At least this much of the chance moves, by the five likeliest of both."""
    (old, new), found = (np.argsort(-chances)[:5] for chances in (before, after)), []
    for come, go, ids, others in ((after, before, new, old), (before, after, old, new)):
        known = [come[n] - (go[n] if n in others else go[others[-1]]) for n in ids]
        found.append(sum(x for x in known if x > 0))
    return max(found)


def test_next_token_layer_by_layer_and_without_each_head(show):
    model = make_checkpoint("x.pt", num_heads=3, hidden_dim=24).double()
    runs = runs_of("--text", TEXT)
    tokens, token = ids_of(runs[0]), 12
    lens = lens_of(model, tokens)[:, token]
    page = show(runs, f"view=next&token={token}")
    for row, chances in zip(page.locator(".lens tr").all(), lens, strict=True):
        shown = [cell.get_attribute("title").rsplit(" ", 2) for cell in row.locator("td").all()]
        assert [label for label, *_ in shown] == [label for label, _ in likeliest(chances)]
        chance = [float(number) / 100 for _, number, _ in shown]
        assert np.allclose(chance, np.sort(chances)[:-6:-1], atol=0.0051)
    first = [int(chances.argmax()) for chances in lens]
    layer = next(n for n in range(3) if len(set(first[n:])) == 1)
    assert "embedding on" if layer == 0 else f"from layer {layer} on" in page.inner_text(".sides")
    follows = runs[0]["tokens"][token + 1]
    assert percent(page.locator("tr.real").inner_text()) == pytest.approx(
        lens[-1, follows], abs=0.0051
    )

    # every head off, ranked by what at least moves, which is less than all that does
    heads = [(layer, head) for layer in range(2) for head in range(3)]
    off = {at: without(model, *at, tokens)[token] for at in heads}
    ranked = sorted(heads, key=lambda at: -moved(lens[-1], off[at]))
    rows = page.locator(".whatif .ranked li").all_inner_texts()
    for row, at in zip(rows, ranked, strict=False):
        assert f"layer {at[0] + 1} head {at[1] + 1}" in row
        assert percent(row) == pytest.approx(moved(lens[-1], off[at]), abs=0.0051)
        assert percent(row) < 0.5 * np.abs(lens[-1] - off[at]).sum() + 0.0051
        assert likeliest(off[at])[0][0] in row.split("→")[1]

    # one of them, before and after
    page.get_by_role("button", name="without layer 2 head 3", exact=False).first.click()
    after = off[1, 2]
    told = page.inner_text(".result")
    (was, _), (becomes, chance) = likeliest(lens[-1])[0], likeliest(after)[0]
    if was == becomes:
        assert f"still say {was}" in told
    else:
        assert f"would say {becomes}" in told and f"instead of {was}" in told
        assert percent(told) == pytest.approx(chance, abs=0.0051)
    nats = [float(x) for x in re.search(r": ([\d.]+) in place of ([\d.]+) nats", told).groups()]
    assert nats == pytest.approx([-np.log(after[follows]), -np.log(lens[-1, follows])], abs=0.01)
    for row in page.locator(".result tbody tr").all():
        label, *both = row.locator("th, td").all_inner_texts()
        place = [LETTERS.label(n) for n in range(LETTERS.vocab_size)].index(label)
        for text, true in zip(both, (lens[-1, place], after[place]), strict=True):
            bound = percent(text)
            assert true < bound + 0.0051 if "<" in text else abs(true - bound) < 0.0051

    # the most surprising words, and the strip, go there
    loss = np.array([0, *runs[0]["loss"][1:]])
    page.locator(".chosen .go").first.click()
    assert f"(position {loss.argmax()})" in page.inner_text(".next h2")
    strip = page.locator(".strip").bounding_box()
    page.mouse.click(strip["x"] + 20.5 / len(TEXT) * strip["width"], strip["y"] + 5)
    assert "(position 20)" in page.inner_text(".next h2")
    # offline nothing can be branched
    assert page.locator(".chances .go").count() == 0 and "--serve" in page.inner_text(".next")
    page.keyboard.press("End")
    assert "The text ends here" in page.inner_text(".next")


def test_gravity_against_attention_token_by_token(show):
    """Two vocabularies: what is compared are the pieces of text that both have."""
    gravity = make_checkpoint("x.pt").double()
    bpe = BPETokenizer.train([TEXT] * 5, 270)
    vanilla = make_checkpoint("y.pt", bpe, model_type="vanilla", block_size=64).double()
    runs = runs_of("--text", TEXT, "--compare", "y.pt")
    one, two = runs
    assert len(two["tokens"]) < len(one["tokens"])
    page = show(runs, "view=next&token=20")
    ends = [*two["starts"][1:], len(TEXT)]
    pieces = [(start, end) for start, end in zip(two["starts"], ends, strict=True)]
    differ = [
        two["loss"][n] - sum(one["loss"][start:end]) for n, (start, end) in enumerate(pieces) if n
    ]
    better = sum(x > 0 for x in differ)
    told = page.locator(".next").first.inner_text()
    assert f"{'better' if sum(differ) > 0 else 'worse'} than y.pt" in told
    assert f"better at {better} of {len(differ)}" in told
    assert float(re.search(r"by ([\d.,]+) nats", told)[1].replace(",", "")) == pytest.approx(
        abs(sum(differ)), rel=0.006
    )
    strip = page.locator(".strip").first.bounding_box()
    n = int(np.abs(differ).argmax())
    x = strip["x"] + (n + 0.5) / len(differ) * strip["width"]
    page.mouse.move(x, strip["y"] + 9)
    told = page.locator(".next output").first.inner_text()
    found = [float(x) for x in re.findall(r"([\d.]+)(?: nats)? for", told)]
    assert found[1] - found[0] == pytest.approx(differ[n], abs=0.06)
    page.mouse.click(x, strip["y"] + 9)
    assert f"(position {pieces[n + 1][0]})" in page.locator(".next h2").first.inner_text()

    page = show(runs, "view=heads&token=30")
    mine = pull_weights(gravity, ids_of(one)).mean((0, 1))[30]
    here = max(n for n, start in enumerate(two["starts"]) if start <= 30)
    theirs = pull_weights(vanilla, ids_of(two)).mean((0, 1))[here]
    both = [(float(mine[a:b].sum()), float(theirs[n])) for n, (a, b) in enumerate(pieces)]
    most = max(range(len(both)), key=lambda n: abs(both[n][0] - both[n][1]))
    told = page.locator(".differ p").first.locator(".go").first.inner_text()
    shown = [float(x) / 100 for x in re.findall(r"([\d.]+) %", told)]
    assert shown == pytest.approx(both[most], abs=0.0051)
    page.get_by_text("In the whole text they differ most").wait_for()
    page.locator(".small").first.click()  # both show the same head
    assert page.locator(".heatmap:visible").count() == 2
    assert "attention" in page.locator(".answers").last.inner_text()
    assert "window" not in page.locator(".answers").last.inner_text()


STUB = """window.asked = [];
window.fetch = async (path, given) => {
  const body = JSON.parse(given.body);
  window.asked.push([path, body]);
  if (body.changes.some((change) => change.kind === "off"))
    return { ok: false, text: async () => "The model is busy: try again." };
  const answer = { rows: [["x", 0.5, 0.125], ["y", 0.25, 0.75]], loss: [1, 2.5] };
  return { ok: true, json: async () => answer };
};"""


def test_changes_are_asked_of_the_server(show):
    make_checkpoint("x.pt")
    (run,) = runs_of("--text", TEXT)
    run["off"] = None
    page = show([run], "view=next&token=12&layer=1&head=2", live=True, script=STUB)
    assert page.locator(".result").inner_text() == "" and page.locator(".chances .go").count() > 0
    page.get_by_label("Mass of").fill("2")
    page.get_by_text("with 2 times the mass").wait_for()
    told = page.inner_text(".result")
    assert "would say y (75 %) instead of x (50 %)" in told.replace("\n", " ")
    assert "more: 2.50 in place of 1.00" in told and "Computed now" in told
    pulls = page.get_by_label("Cut the pull").locator("option").all()[1:]
    source = int(pulls[0].get_attribute("value"))
    page.get_by_label("Cut the pull").select_option(str(source))
    page.get_by_label("Move nearer").select_option(str(source))
    page.wait_for_function("asked.length === 3")
    assert page.evaluate("asked[2]") == [
        "/look/what-if",
        {
            "tokens": run["tokens"],
            "at": 12,
            "changes": [
                {"kind": "mass", "token": 12, "factor": 2},
                {"kind": "cut", "layer": 1, "head": 1, "token": 12, "source": source},
                {"kind": "move", "token": source, "toward": 12, "share": 0.5},
            ],
        },
    ]
    page.get_by_role("button", name="without layer 2 head 1").click()
    page.get_by_text("The model is busy").wait_for()
    # what belongs to one token ends with it, a head that is off stays off
    page.keyboard.press("ArrowRight")
    page.wait_for_function("asked.length === 5")
    assert page.evaluate("asked[4][1].changes") == [{"kind": "off", "layer": 2, "head": 0}]
