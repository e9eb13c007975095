"""What a run gives the page, and the law as the page computes it, against the models themselves."""

import json

import numpy as np
import pytest
import torch

import vanilla_model
from conftest import BROWSER
from coords.draw import read_run
from coords.page import page_texts, run_data
from map_contents import predicted, shares_of
from particles import squared_distances
from small_models import ALL, LETTERS, NEWTON, PUBLISHED, VANILLA, lively, pull_weights
from system.markdown import json_for_script

sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright here")
COUNT = 14
ONE_TOKEN = "newton background"
PAGE = """<!doctype html><meta charset="utf-8"><script id="data" type="application/json">{}</script>
<script>{}; window.runs = RUNS;</script>"""
ASK = """() => runs.map((run) => {
  const numbers = (of) => [...Array(run.numLayers).keys()].map((layer) =>
    [...Array(run.numHeads).keys(), "mean"].map((head) =>
      run.labels.map((_, token) => of(layer + 1, head, token))));
  return {
    shares: numbers((...at) => [...run.shares(...at)]),
    pulls: numbers((...at) => run.pulls(...at)),
    quiet: numbers((...at) => run.quietOf(...at)),
    orbit: numbers((layer, head, token) => head === "mean" ? null :
      run.orbit(layer, head, token) && Object.fromEntries(
        Object.entries(run.orbit(layer, head, token)).map(([name, x]) => [name, [...x]]))),
    without: numbers((...at) => at[1] === "mean" ? null : run.without(...at)),
    losses: numbers((...at) => at[1] === "mean" ? null : run.lossWithout(...at)),
    next: [...Array(run.numLayers + 1).keys()].map((layer) =>
      run.labels.map((_, token) => run.next(layer, token))),
    first: [run.pulls(0, "mean", run.count - 1), run.quietOf(0, 0, 0), run.orbit(0, 0, 0)],
    beyond: [...run.shares(99, 99, run.count - 1)],
    surprise: run.labels.map((_, token) => run.surprise(token)),
  };
})"""


def page_run(name, count=COUNT):
    """`(model, tokens, the run as the page gets it)`."""
    torch.manual_seed(sorted(ALL).index(name))
    model = lively(name, vocab_size=LETTERS.vocab_size)
    tokens = torch.randint(LETTERS.vocab_size, (count,)).tolist()
    return (
        model,
        tokens,
        run_data(read_run((model, LETTERS, {"config": {}}), name, tokens, "the text")),
    )


@pytest.fixture(scope="module")
def shown():
    """By name: `(model, tokens, run, what the page computes from the run)`."""
    given = {name: page_run(name) for name in ALL} | {"one token": page_run(ONE_TOKEN, 1)}
    if BROWSER is None:
        pytest.skip("no chromium here")
    scripts = page_texts(["web/shared.js", "coords/colours.js", "coords/data.js"])
    data = json_for_script({"layer": 1, "live": False, "runs": [run for *_, run in given.values()]})
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page, wrong = browser.new_page(), []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.set_content(PAGE.format(data, scripts))
        answers = page.evaluate(ASK)
        browser.close()
    assert not wrong
    return {name: (*parts, answers[n]) for n, (name, parts) in enumerate(given.items())}


def triangle(rows):
    """(L, H, T, T) of rows that end with their own token."""
    return np.array(
        [
            [[np.pad(row, (0, len(head) - len(row))) for row in head] for head in layer]
            for layer in rows
        ]
    )


@pytest.mark.parametrize("name", ALL)
def test_the_page_computes_the_law(name, shown, monkeypatch):
    """Shares of every source, by head and as the mean, their order, and what is left of them."""
    model, tokens, run, page = shown[name]
    if name in VANILLA:
        truth = attention_by_hand(model, tokens, monkeypatch)
    else:
        truth = pull_weights(model.double(), torch.tensor([tokens])).numpy()
    truth = np.concatenate([truth, truth.mean(1, keepdims=True)], 1)
    shares = triangle(page["shares"])
    assert np.abs(shares - truth).max() < 2e-3  # 16-bit places
    assert np.allclose(shares[:, :-1], shares_of(run), atol=1e-9)
    assert np.allclose(page["beyond"], shares[-1, -1, -1])  # a head that it lacks: the mean
    for at in np.ndindex(shares.shape[:3]):
        pulls = page["pulls"][at[0]][at[1]][at[2]]
        order = [share for _, share in pulls]
        assert order == sorted(order, reverse=True) and len(pulls) <= 8
        assert all(share == shares[at][source] > 1e-4 for source, share in pulls)
        assert len(pulls) == min(8, (shares[at] > 1e-4).sum())
    quiet = np.array(page["quiet"], float)
    has_rest = "background" in name or (name in VANILLA and "modern" in name)
    assert np.isfinite(quiet).all() == has_rest
    if has_rest:
        assert np.allclose(quiet, 1 - truth.sum(-1), atol=2e-3) and quiet.max() > 0.05
    assert page["first"] == [[], None, None]


def attention_by_hand(model, tokens, monkeypatch):
    """The softmax in float64 of what PyTorch's attention really receives, (L, H, T, T)."""
    found = []

    def keep(q, k, v, sink=None, mask=None, causal=True, attn_mask=None, is_causal=None):
        mask = attn_mask if mask is None else mask
        score = q @ k.mT / q.shape[-1] ** 0.5 + (0 if mask is None else mask)
        weights = score.exp().tril()
        rest = 0 if sink is None else sink.exp()[:, None, None]
        found.append(weights / (weights.sum(-1, keepdim=True) + rest))
        return found[-1] @ v

    monkeypatch.setattr(vanilla_model, "attention_with_sink", keep)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", keep)
    with torch.no_grad():
        model.double()(torch.tensor([tokens]))
    return torch.cat(found).numpy()


@pytest.mark.parametrize("name", [*NEWTON, *PUBLISHED, "vanilla rotary"])
def test_orbits_are_the_distances_of_the_law(name, shown):
    model, tokens, _, page = shown[name]
    if name in VANILLA:
        assert page["orbit"][0][0] == [None] * COUNT
        return
    model = model.double()
    with torch.no_grad():
        _, geometry = model(torch.tensor([tokens]), return_geometry=True)
        for layer in range(2):
            attn = model.layers[layer].attn
            q, k = attn.points(geometry.layers[layer])
            nothing = torch.zeros(q.shape[1])
            law = (
                attn.law()
                if name in NEWTON
                else dict.fromkeys(("time_scale", "time_offset"), nothing)
            )
            space2 = squared_distances(
                {"q": q, "k": k, "time_scale": nothing, "time_offset": nothing}
            )[0]
            r2 = squared_distances({"q": q, "k": k} | law)[0]
            for head in range(4):
                rows = page["orbit"][layer][head]
                for token, orbit in enumerate(rows):
                    here = (head, token, slice(token + 1))
                    assert np.allclose(orbit["distance"], r2[here].sqrt(), atol=5e-3)
                    assert np.allclose(orbit["space"], space2[here].sqrt(), atol=5e-3)
                    sides = np.hypot(orbit["space"], orbit["time"])
                    assert np.allclose(orbit["distance"], sides)
                    flat = np.hypot(orbit["x"], orbit["y"])
                    assert (flat <= np.array(orbit["space"]) + 1e-9).all()
                # along the widest axes: no two others can hold more of the sources' spread
                last = np.array([rows[-1]["x"], rows[-1]["y"]])
                spread = np.linalg.eigvalsh(np.cov(k[0, head].T.numpy()))[::-1]
                assert np.allclose(np.diag(np.cov(last)), spread[:2], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["newton state", "published modern", "vanilla alibi modern"])
def test_what_would_come_next(name, shown):
    """After each layer: the model that ends there. With a head off: the model without its part."""
    model, tokens, run, page = shown[name]
    model, ids = model.double(), torch.tensor([tokens])
    following = [*tokens[1:], None]

    def check(rows, logits, losses=None):
        chance = logits[0].softmax(-1)
        for token, row in enumerate(rows):
            best = chance[token].topk(5)
            assert [label for label, _, _ in row] == [
                LETTERS.label(i) for i in best.indices.tolist()
            ]
            assert [id for _, _, id in row] == best.indices.tolist()
            assert np.allclose([chance for _, chance, _ in row], best.values, atol=1e-4)
            if losses and following[token] is not None:
                expected = -chance[token, following[token]].log()
                assert losses[token] == pytest.approx(float(expected), abs=1e-3)

    layers, width = list(model.layers), model.config.hidden_dim // 4
    with torch.no_grad():
        logits = model(ids)
        check(page["next"][2], logits, [*page["surprise"][1:], None])
        assert page["surprise"][0] is None
        for layer in range(2):
            out = layers[layer].attn.out_proj.weight
            for head in range(4):
                whole = out.clone()
                out[:, head * width : (head + 1) * width] = 0
                losses = page["losses"][layer][head]
                check(page["without"][layer][head], model(ids), losses)
                assert losses[-1] is None
                out.copy_(whole)
            model.layers = torch.nn.ModuleList(layers[:layer])
            check(page["next"][layer], model(ids))
            model.layers = torch.nn.ModuleList(layers)
        assert torch.equal(model(ids), logits)  # nothing that listens was left behind
    assert predicted(run, "lens")[0].shape == (3, COUNT, 5)


def test_one_token(shown):
    """It has no axes, no losses and only its own pull."""
    *_, run, page = shown["one token"]
    assert run["loss"] == [None] and np.array(run["points"]).shape == (3, 1, 3)
    (share,), quiet = page["shares"][0][0][0], page["quiet"][0][0][0]
    assert share + quiet == pytest.approx(1) and page["orbit"][0][0][0]["space"] != [None]
    assert len(page["next"][2][0]) == 5 and page["losses"][0][0] == [None]
    assert "NaN" not in json.dumps(page)
