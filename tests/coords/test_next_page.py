"""The view of the next token, and what if, in a real browser, against float64 in Python."""

import copy
import re

import numpy as np
import pytest
import torch

from map_browser import runs_of, wait_until
from map_contents import TEXT
from small_models import LETTERS, make_checkpoint, pull_weights
from text.tokenizer import BPETokenizer


def ids_of(run):
    return torch.tensor([run["tokens"]])


def percent(text):
    return float(re.search(r"([\d.]+) %", text)[1]) / 100


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
    wait_until(page, "asked.length === 3")
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
    wait_until(page, "asked.length === 5")
    assert page.evaluate("asked[4][1].changes") == [{"kind": "off", "layer": 2, "head": 0}]
