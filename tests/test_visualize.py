"""The map: what is on the page, and that a real browser draws it."""

import json
import re
import subprocess

import numpy as np
import pytest
import torch

import visualize_coords
from conftest import BROWSER, error_line, run
from errors import UserError
from page import to_page
from test_chat import LETTERS, make_checkpoint
from tokenizer import CharTokenizer

TEXT = "the quick brown fox jumps over the lazy dog"


def write_map(*flags, expect=0):
    assert visualize_coords.main(["--checkpoint-path", "x.pt", *map(str, flags)]) == expect


def test_page_is_whole_and_needs_no_network(in_tmp):
    make_checkpoint("x.pt")
    write_map("--text", TEXT, "--output", "map.html")
    page = (in_tmp / "map.html").read_text()
    assert "<title>" in page and page.rstrip().endswith("</html>")
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)
    assert not list(in_tmp.glob("*.partial"))


def test_points_are_the_principal_components(in_tmp):
    """Against an eigen-decomposition by numpy; size and colour follow the mass."""
    model = make_checkpoint("x.pt")
    tokens = LETTERS.encode(TEXT)
    z, mass = visualize_coords.coordinates(model, tokens, None)
    figure = visualize_coords.figure(z, mass, [LETTERS.label(t) for t in tokens], "title")
    points = np.stack([figure.data[0].x, figure.data[0].y, figure.data[0].z], 1)
    centred = (z - z.mean(0)).astype(np.float64)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    expected = (centred @ vectors)[:, ::-1][:, :3]
    assert np.allclose(np.abs(points), np.abs(expected), atol=1e-4)
    share = values[::-1] / values.sum()
    scene = figure.layout.scene
    for axis, ratio in zip((scene.xaxis, scene.yaxis, scene.zaxis), share, strict=False):
        assert f"{100 * ratio:.1f} %" in axis.title.text
    marker = figure.data[0].marker
    by_hand = torch.nn.functional.softplus(model.mass_emb.weight[tokens, 0]).detach().numpy()
    assert np.allclose(marker.color, by_hand, atol=1e-6)
    assert (np.argsort(marker.size) == np.argsort(marker.color)).all()
    assert figure.data[0].customdata[3] == ["␣", 3, f"{by_hand[3]:.4f}"]


def test_layers_differ_and_layer_0_is_the_embedding(in_tmp):
    model = make_checkpoint("x.pt")
    tokens = LETTERS.encode("abab abab")
    first, _ = visualize_coords.coordinates(model, tokens, 0)
    last, _ = visualize_coords.coordinates(model, tokens, None)
    assert np.allclose(first[0], first[2], atol=1e-6) and not np.allclose(last[0], last[2])
    assert not np.allclose(first, last)


def test_validation_text_is_the_default(in_tmp, small_text):
    """After a real training: the tokens shown are the first of the validation split."""
    run(
        *("train_shakespeare.py", "--data-path", small_text, "--max-steps", 3),
        *("--hidden-dim", 16, "--num-heads", 2, "--num-layers", 1, "--block-size", 8),
        cwd=in_tmp,
        check=0,
    )
    path = "checkpoints/shakespeare.pt_best.pt"
    run(
        *("visualize_coords.py", "--checkpoint-path", path, "--output", "coords.html"),
        *("--num-tokens", 9),
        cwd=in_tmp,
        check=0,
    )
    page = (in_tmp / "coords.html").read_text()
    text = small_text.read_text()
    start = text[int(len(text) * 0.9) :][:9]
    label = CharTokenizer.train(text).label
    data = json.loads(re.search(r'"customdata":(\[\[.*?\]\])', page).group(1))
    expected = [label(i) for i in CharTokenizer.train(text).encode(start)]
    assert [row[0] for row in data] == expected


@pytest.mark.parametrize("text, words", [("abc", "at least 4"), ("", "at least 4")])
def test_too_little_text(text, words, in_tmp):
    make_checkpoint("x.pt")
    with pytest.raises(UserError, match=words):
        write_map("--text", text)


def test_bad_input_is_one_line(in_tmp):
    make_checkpoint("x.pt", model_type="vanilla")
    line = error_line(run("visualize_coords.py", "--checkpoint-path", "x.pt", cwd=in_tmp, check=2))
    assert "vanilla" in line
    make_checkpoint("x.pt")
    with pytest.raises(UserError, match="--text"):
        write_map()
    with pytest.raises(UserError, match="--layer 9"):
        write_map("--layer", 9)
    with pytest.raises(UserError, match="--text-file"):
        write_map("--text-file", "nothing.txt")
    with pytest.raises(UserError, match="cannot be written"):
        write_map("--text", TEXT, "--output", "x.pt/map.html")


def test_coordinates_that_are_nowhere(in_tmp):
    model = make_checkpoint("x.pt")
    tokens = LETTERS.encode(TEXT)
    with torch.no_grad():
        model.layers[-1].coord_norm.weight.zero_()
        z, mass = visualize_coords.coordinates(model, tokens, None)
        with pytest.raises(UserError, match="same place"):
            visualize_coords.figure(z, mass, ["a"] * len(z), "title")
        model.layers[-1].coord_norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        visualize_coords.coordinates(model, tokens, None)


@pytest.mark.skipif(BROWSER is None, reason="no chromium here: install it to run browser tests")
def test_a_real_browser_draws_it_and_runs_no_token(in_tmp):
    """Chromium has the points and a canvas; a token that looks like HTML stays text."""
    hostile = CharTokenizer(["<script>document.title='pwned'</script>", "<b>", "a", "b"])
    make_checkpoint("x.pt", hostile)
    model, *_ = visualize_coords.load_model("x.pt")
    z, mass = visualize_coords.coordinates(model, [0, 1, 2, 3, 2, 1], None)
    labels = [hostile.label(i) for i in (0, 1, 2, 3, 2, 1)]
    title = "<script>document.title='pwned'</script>"
    figure = visualize_coords.figure(z, mass, labels, title)
    assert all("<" not in row[0] for row in figure.data[0].customdata)
    probe = """<script>window.addEventListener('load', () => setTimeout(() => {
        const plot = document.querySelector('.js-plotly-plot');
        document.body.dataset.points = plot._fullData[0]._length;
        document.body.dataset.canvas = plot.querySelectorAll('canvas').length;
        const buttons = [...plot.querySelectorAll('.modebar-btn')].map(b => b.outerHTML).join();
        document.body.dataset.cloud = /cloud|share/i.test(buttons);
        document.body.dataset.title = document.title;
    }, 500));</script></body>"""
    page = probe.join(to_page(figure, title).rsplit("</body>", 1))
    (in_tmp / "map.html").write_text(page)
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run"
    flags += " --enable-unsafe-swiftshader --virtual-time-budget=8000 --dump-dom"
    result = subprocess.run(
        [BROWSER, *flags.split(), f"--user-data-dir={in_tmp}/profile", f"file://{in_tmp}/map.html"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert 'data-points="6"' in result.stdout, result.stderr[-2000:]
    assert 'data-canvas="0"' not in result.stdout and "data-canvas" in result.stdout
    assert 'data-cloud="false"' in result.stdout
    assert 'data-title="pwned"' not in result.stdout
