"""The map's numbers against numpy, and its flags. test_map_page.py tests the page itself."""

import gzip
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import first_release_files
import visualize_coords
from conftest import error_line, run
from coords import data as coords_data
from coords import predictions
from engine import pulls
from map_contents import TEXT, data_of, predicted, shares_of, unpacked
from particles import published_by_hand
from small_models import (
    LETTERS,
    lively,
    make_checkpoint,
    make_checkpoint_with_background,
    pull_weights,
)
from system.errors import UserError
from system.markdown import json_for_script
from text.preparation import prepare_data
from text.tokenizer import BPETokenizer, CharTokenizer


def write_map(*flags, expect=0):
    assert visualize_coords.main(["--checkpoint-path", "x.pt", *map(str, flags)]) == expect


def softplus(x):
    return np.log1p(np.exp(np.asarray(x, np.float64)))


def test_page_is_whole_and_needs_no_network(in_tmp):
    make_checkpoint("x.pt")
    write_map("--text", TEXT, "--output", "map.html", "--png", "map.png", "--layer", 0)
    page = (in_tmp / "map.html").read_text()
    assert "<title>x.pt" in page and page.rstrip().endswith("</html>")
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page.split("<script", 1)[0])
    assert "default-src 'none'" in page and not list(in_tmp.glob("*.partial"))
    assert (in_tmp / "map.png").read_bytes().startswith(b"\x89PNG")
    first = (in_tmp / "map.png").read_bytes()
    write_map("--text", TEXT, "--output", "map.html", "--png", "map.png")
    assert (in_tmp / "map.png").read_bytes() != first


def test_texts_are_read_as_a_training_reads_them(in_tmp, capsys):
    """A Windows file, a compressed one and broken bytes give the tokens of the plain text."""
    make_checkpoint("x.pt")
    Path("win.txt").write_bytes(b"\xef\xbb\xbfab\r\ncd\r\n")
    Path("win.txt.gz").write_bytes(gzip.compress(Path("win.txt").read_bytes()))
    labels = [LETTERS.label(token) for token in LETTERS.encode("ab\ncd\n")]
    for flags, expected in (
        (("--text-file", "win.txt"), labels),
        (("--text-file", "win.txt.gz"), labels),
        (("--text", "\ufeffab\r\ncd\r"), labels),
        (("--text", "ab\ncd\udce8"), [*labels[:-1], LETTERS.label(LETTERS.unknown)]),
    ):
        write_map(*flags, "--output", "map.html")
        assert data_of(in_tmp / "map.html")[0]["labels"] == expected
        assert ("CRLF" in capsys.readouterr().out) == (flags[0] == "--text-file")
    os.link("x.pt", "x\udce8.pt")  # a name that is not UTF-8
    visualize_coords.main(["--checkpoint-path", "x\udce8.pt", "--text", TEXT, "--output", "m.html"])
    assert "<title>x\\udce8.pt" in Path("m.html").read_text("utf-8")


def test_points_masses_and_losses(in_tmp):
    """Against an eigen-decomposition of all layers together and a softmax, in numpy."""
    model = make_checkpoint("x.pt", coord_dim=8)
    tokens = LETTERS.encode(TEXT)
    write_map("--text", TEXT, "--output", "map.html")
    (shown,) = data_of(in_tmp / "map.html")
    with torch.no_grad():
        logits, geometry = model.double()(torch.tensor([tokens]), return_geometry=True)
    z = torch.cat(geometry.layers).numpy()
    centred = z.reshape(-1, 8) - z.reshape(-1, 8).mean(0)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    expected = (centred @ vectors)[:, ::-1][:, :3].reshape(3, len(tokens), 3)
    points = np.array(shown["points"])
    assert np.allclose(np.abs(points), np.abs(expected), atol=2e-4)
    signs = np.sign((points * expected).sum((0, 1)))
    assert np.allclose(points, expected * signs, atol=2e-4)
    for title, ratio in zip(shown["axes"], values[::-1] / values.sum(), strict=False):
        assert f"{100 * ratio:.1f} %" in title
    own = unpacked(shown["z"], "<i2").reshape(z.shape) * shown["zScale"]
    assert np.allclose(own, z, atol=1e-3)
    by_hand = softplus(model.mass_emb.weight[tokens, 0].detach().numpy())
    assert np.allclose(shown["mass"], by_hand, atol=1e-5)
    chances = np.exp(logits[0].numpy())
    chances /= chances.sum(-1, keepdims=True)
    losses = [-np.log(chances[n - 1, tokens[n]]) for n in range(1, len(tokens))]
    assert shown["loss"][0] is None and np.allclose(shown["loss"][1:], losses, atol=1e-3)
    best = chances[5].argsort()[::-1][:5]
    found, likely = predicted(shown, "lens")
    assert list(found[2, 5]) == list(best) and np.allclose(
        likely[2, 5], chances[5, best], atol=1e-3
    )
    named = dict(zip(shown["nameIds"], shown["names"], strict=True))
    assert [named[token] for token in best] == [LETTERS.label(int(token)) for token in best]
    assert shown["labels"][3] == "␣" and shown["starts"] == list(range(len(tokens)))
    assert shown["counts"][3] == TEXT.count(" ") and not shown["isCorpus"]


@pytest.mark.parametrize("mass_in_value", [False, True])
@pytest.mark.parametrize("law", ["newton", "published"])
def test_tokens_without_mass(law, mass_in_value, in_tmp):
    """Masses that underflow to 0 still give a page, and shares that are numbers."""
    make_checkpoint("x.pt", law=law, mass_in_value=mass_in_value, block_size=64)
    contents = torch.load("x.pt", weights_only=True)
    contents["model_state"]["mass_emb.weight"].fill_(-200)
    torch.save(contents, "x.pt")
    flags = ("--png", "map.png", "--heads-png", "heads.png")
    write_map("--text", TEXT, "--output", "map.html", *flags)
    (shown,) = data_of(in_tmp / "map.html")
    assert max(shown["mass"]) == 0
    shares = shares_of(shown)
    if law == "published" and mass_in_value:  # the law's weights have no mass in them
        assert np.allclose(shares.sum(-1), 1)
    elif law == "newton" and not mass_in_value:
        assert shares.max() == 0


@pytest.mark.parametrize("law", ["newton", "published"])
def test_pulls_that_are_no_numbers(law, in_tmp, monkeypatch):
    make_checkpoint("x.pt", law=law, block_size=64)
    function = {"newton": "gravity_field", "published": "published_gravity_attention"}[law]
    whole = getattr(pulls, function)
    monkeypatch.setattr(pulls, function, lambda *a, **k: whole(*a, **k) * float("nan"))
    with pytest.raises(UserError, match="pulls of this checkpoint are not finite"):
        write_map("--text", TEXT)


@pytest.mark.parametrize("law", ["newton", "published"])
@pytest.mark.parametrize("pairs", [1 << 18, 50])
def test_pulls_heads_and_distances(law, pairs, in_tmp, monkeypatch):
    """What the page needs for every share, and where heads look, from whole matrices in float64."""
    monkeypatch.setattr(pulls, "PULL_PAIRS", pairs)
    model = make_checkpoint("x.pt", law=law, block_size=64, num_heads=4, head_coord_dim=3)
    tokens = LETTERS.encode(TEXT)
    write_map("--text", TEXT, "--output", "map.html")
    (shown,) = data_of(in_tmp / "map.html")
    with torch.no_grad():
        weights = pull_weights(model.double(), torch.tensor([tokens])).numpy()
    assert np.allclose(weights.sum(-1), 1, atol=1e-6) and weights.dtype == np.float64
    assert np.allclose(shares_of(shown), weights, atol=2e-3)
    for row in shown["heads"]:
        head = weights[row["layer"] - 1, row["head"]]
        profile = np.array([np.trace(head, -back) for back in range(len(tokens))]) / len(tokens)
        assert row["most_distance"] == profile.argmax()
        assert row["one_back"] == pytest.approx(profile[1], abs=1e-5)
        assert row["mean_distance"] == pytest.approx(profile @ np.arange(len(tokens)), abs=1e-4)
        near = profile.cumsum()
        assert near[row["within"]] >= 0.9 - 1e-6
        assert row["within"] == 0 or near[row["within"] - 1] < 0.9
        back, shares = shown["pull"]["back"], shown["pull"]["of"][row["layer"] - 1][row["head"]]
        assert np.allclose(shares[:33], profile[:33], atol=2e-5) and back[-1] == len(tokens) - 1
        spans = np.diff([*back, len(tokens)])
        assert np.dot(shares, spans) == pytest.approx(1, abs=1e-3)


def test_a_background_is_the_rest_of_the_pull(in_tmp):
    """How quiet each head is, by token and in the table; curves are shares of what it feels."""
    model = make_checkpoint_with_background("x.pt")
    tokens = LETTERS.encode(TEXT)
    write_map("--text", TEXT, "--output", "map.html", "--heads-png", "heads.png")
    (shown,) = data_of(in_tmp / "map.html")
    with torch.no_grad():
        backgrounds = [layer.attn.background.tolist() for layer in model.layers]
        weights = pull_weights(model.double(), torch.tensor([tokens])).numpy()
    quiet = 1 - weights.sum(-1)
    assert np.allclose(1 - shares_of(shown).sum(-1), quiet, atol=2e-3) and 0.1 < quiet.mean() < 0.9
    for row in shown["heads"]:
        layer, head = row["layer"] - 1, row["head"]
        assert row["quiet"] == pytest.approx(quiet[layer, head].mean(), abs=2e-5)
        assert row["background"] == pytest.approx(backgrounds[layer][head], rel=1e-5)
        own = weights[layer, head]
        profile = np.array([np.trace(own, -back) for back in range(len(tokens))]) / own.sum()
        assert row["one_back"] == pytest.approx(profile[1], abs=1e-5)
        assert row["mean_distance"] == pytest.approx(profile @ np.arange(len(tokens)), abs=1e-3)
        back, shares = shown["pull"]["back"], shown["pull"]["of"][layer][head]
        assert np.dot(shares, np.diff([*back, len(tokens)])) == pytest.approx(1, abs=1e-3)
    windows = [row["window"] for row in shown["heads"]]
    assert None not in windows and max(windows) < shown["field"]["back"][-1] + 1
    make_checkpoint("x.pt")
    write_map("--text", TEXT, "--output", "map.html")
    (shown,) = data_of(in_tmp / "map.html")
    assert shown["attention"]["heads"][0][0]["background"] is None
    assert shown["heads"][0]["quiet"] is None and shown["heads"][0]["background"] is None


def test_published_weights_are_the_first_releases(in_tmp):
    """Under every cutoff, against the formula in float64."""
    tokens = torch.tensor([LETTERS.encode(TEXT[:16])])
    for settings in ({}, {"use_soft_cutoff": True}, {"use_radius_cutoff": False}):
        for mass_in_value in (False, True):
            config = {"law": "published", "mass_in_value": mass_in_value, "radius": 3.0, **settings}
            model = make_checkpoint("x.pt", **config).double()
            attn = model.layers[0].attn
            z = model.coord_emb.weight[None, :16]
            x = attn.coord_proj_attn(z).view(1, 16, 2, 16).transpose(1, 2)
            mass = model.mass(tokens).double()
            data = {
                **{"x": x, "mass": mass, "v": torch.eye(16).double().expand(1, 2, -1, -1)},
                **{"gamma": torch.nn.functional.softplus(attn.gamma_raw)},
                **{"bias": attn.gravity_bias},
            }
            expected = published_by_hand(data, attn.radius, model.config.cutoff, mass_in_value)[0]
            if mass_in_value:
                expected = expected / mass
            assert torch.allclose(pull_weights(model, tokens)[0], expected.detach(), atol=1e-5)


def test_a_first_release_file_has_a_map(in_tmp):
    size = len(first_release_files.CHARACTERS)
    config = first_release_files.ngt_config(size)
    state = first_release_files.ngt_state(size)
    first_release_files.save(in_tmp / "x.pt", state, config, first_release_files.char_vocab())
    write_map(
        "--text", first_release_files.TEXT, "--output", "map.html", "--heads-png", "heads.png"
    )
    (shown,) = data_of(in_tmp / "map.html")
    assert shown["law"] == "published" and shown["step"] == 1234 and shown["field"] is None
    assert shown["heads"][0]["gamma"] == shown["attention"]["heads"][0][0]["gamma"] > 0
    assert (in_tmp / "heads.png").read_bytes().startswith(b"\x89PNG")


def test_field_by_distance_is_the_formula(in_tmp):
    model = make_checkpoint("x.pt", num_heads=4, exponent=3, radius=9.0)
    write_map("--text", TEXT, "--output", "map.html")
    (shown,) = data_of(in_tmp / "map.html")
    back = np.array(shown["field"]["back"])
    for layer in range(2):
        attn = model.layers[layer].attn
        scale = softplus(attn.time_scale_raw.detach().numpy())
        offset = attn.time_offset.detach().numpy().astype(float)
        for head in range(4):
            r2 = (scale[head] * (back - offset[head])) ** 2
            field = np.where(r2 <= 81, (1 + r2) ** -3.0, 0)
            assert np.allclose(shown["field"]["of"][layer][head], field, atol=1e-4)
            row = shown["heads"][4 * layer + head]
            assert row["window"] == pytest.approx(
                max(1, 1 + offset[head] + 9 / scale[head]), rel=1e-3
            )
            assert row["time_scale"] == pytest.approx(scale[head], rel=1e-4)
            assert row["radius"] == pytest.approx(9, rel=1e-4)
            retardation = attn.retardation.detach().view(4, -1)[head].mean()
            assert row["retardation"] == pytest.approx(float(retardation), abs=1e-5)
    assert list(back[:33]) == list(range(33)) and back[-1] >= len(TEXT) - 1
    make_checkpoint("x.pt", use_radius_cutoff=False, retardation=False)
    write_map("--text", TEXT, "--output", "map.html")
    (shown,) = data_of(in_tmp / "map.html")
    assert shown["heads"][0]["window"] is None and shown["heads"][0]["retardation"] is None


def test_the_checkpoints_own_text(in_tmp, small_text, capsys):
    """Splits, an offset, and the counts of tokens in the training text."""
    prepared = prepare_data("text", small_text, say=lambda line: None)
    tokenizer, directory = prepared.tokenizer, str(prepared.directory)
    model = make_checkpoint("x.pt", tokenizer, token_directory=directory)
    text = small_text.read_text()
    length = len(prepared.train)
    for flags, start in (
        ((), length),
        (("--split", "train", "--offset", 7), 7),
        (("--split", "valid", "--offset", 3), length + 3),
    ):
        write_map("--num-tokens", 9, "--output", "map.html", *flags)
        (shown,) = data_of(in_tmp / "map.html")
        expected = tokenizer.encode(text[start : start + 9])
        assert shown["labels"] == [tokenizer.label(token) for token in expected]
    vocabulary = shown["vocabulary"]
    by_label = {tokenizer.label(tokenizer.stoi[c]): text[:length].count(c) for c in set(text)}
    assert shown["isCorpus"] and f"{length:,}" in shown["counted"]
    for label, count in zip(vocabulary["labels"], vocabulary["counts"], strict=True):
        assert count == by_label.get(label, 0)
    masses = softplus(model.mass_emb.weight[:, 0].detach().numpy())
    assert np.allclose(vocabulary["masses"], np.sort(masses)[::-1], atol=1e-4)
    with pytest.raises(UserError, match="--offset 99999"):
        write_map("--offset", 99999)
    make_checkpoint("x.pt", token_directory=directory)
    with pytest.raises(UserError, match="another tokenizer than this checkpoint: give --text"):
        write_map()
    capsys.readouterr()
    write_map("--text", TEXT)
    assert "frequencies are of the shown text" in capsys.readouterr().err


def test_two_runs_of_one_text(in_tmp):
    """The second run's tokenizer encodes the same characters."""
    make_checkpoint("x.pt")
    bpe = BPETokenizer.train([TEXT] * 5, 280)
    make_checkpoint("y.pt", bpe, num_layers=3, law="published", block_size=512)
    write_map("--text", TEXT, "--compare", "y.pt", "--output", "map.html", "--png", "map.png")
    one, two = data_of(in_tmp / "map.html")
    assert two["labels"] == [bpe.label(token) for token in bpe.encode(TEXT)]
    assert len(two["labels"]) < len(one["labels"]) and two["numLayers"] == 3
    for label, start in zip(two["labels"], two["starts"], strict=True):
        assert TEXT[start : start + len(label)] == label.replace("␣", " ")


def test_characters_that_it_never_saw_are_reported(in_tmp, capsys):
    """As chat.py says it; with --compare also those that the other vocabulary lacks."""
    make_checkpoint("x.pt")
    make_checkpoint("y.pt", CharTokenizer.train("the quick"))
    (in_tmp / "text.txt").write_text("añ한b the")
    for flags, expected in (
        (("--text", "añ한b the"), ["2 characters are new to this model's vocabulary"]),
        (("--text-file", "text.txt"), ["2 characters are new to this model's vocabulary"]),
        (("--text", "the quick"), []),
        (("--text", "the fox", "--compare", "y.pt"), ["3 characters are new to y.pt's vocabulary"]),
    ):
        write_map("--output", "map.html", *flags)
        told = capsys.readouterr().err.splitlines()
        assert [line for line in told if "warning" in line and "frequencies" not in line] == [
            f"warning: {line}" for line in expected
        ]


def test_two_runs_of_the_same_tokens_face_the_same_way(in_tmp):
    """A mirrored picture of the same run is mirrored back; distances stay."""
    points = np.random.default_rng(0).normal(size=(3, 20, 3))
    mirrored = points * [1, -1, -1]
    assert np.allclose(coords_data.align(mirrored, points), points)
    make_checkpoint("x.pt")
    write_map("--text", TEXT, "--compare", "x.pt", "--output", "map.html")
    one, two = data_of(in_tmp / "map.html")
    assert one["points"] == two["points"]


def test_tsne_is_one_picture_of_all_layers(in_tmp, capsys):
    """Neighbours in coordinates are neighbours in the picture; one line says that it takes long."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(3, 6)) * 30
    cluster = np.arange(144) % 3
    z = (centres[cluster] + generator.normal(size=(144, 6))).reshape(2, 72, 6)
    points, axes = coords_data.project(z, "tsne")
    flat = points.reshape(144, 3)
    far = np.linalg.norm(flat[:, None] - flat[None], axis=-1) + np.eye(144) * 1e9
    assert (cluster[far.argmin(1)] == cluster).mean() > 0.95 and points.shape == (2, 72, 3)
    said = capsys.readouterr()
    assert "t-SNE 1" in axes[0] and not said.out and said.err.startswith("t-SNE places 144 points")


@pytest.mark.parametrize("coord_dim", [2, 3])
def test_few_coordinates_still_make_a_map(coord_dim, in_tmp):
    make_checkpoint("x.pt", coord_dim=coord_dim)
    write_map("--text", TEXT, "--output", "map.html", "--png", "map.png")
    (shown,) = data_of(in_tmp / "map.html")
    assert np.array(shown["points"]).shape == (3, len(TEXT), 3)


def test_texts_with_next_to_nothing_to_show(in_tmp):
    """One token, and tokens that are all at the same place: axes without extent are flat."""
    make_checkpoint("x.pt")
    for text in ("a", "aaaaaa"):
        write_map("--text", text, "--output", "map.html", *(["--png", "map.png"] * (text == "a")))
        (shown,) = data_of(in_tmp / "map.html")
        points = np.array(shown["points"])
        assert points.shape == (3, len(text), 3)  # three places, so that two axes hold them
        assert (np.abs(points).max((0, 1)) == 0).tolist() == [False, False, True]
        assert shown["axes"][2] == "no third component"
    with pytest.raises(UserError, match="--method pca"):
        write_map("--text", "a", "--method", "tsne")
    with pytest.raises(UserError, match="at least one"):
        write_map("--text", "")


def test_a_vanilla_transformer_has_a_page(in_tmp):
    """Alone, and beside an NGT under one text: attention, losses and heads, but no coordinates."""
    make_checkpoint("x.pt", model_type="vanilla", block_size=64, sink=True, pos="alibi")
    write_map("--text", TEXT, "--output", "map.html", "--heads-png", "heads.png")
    (shown,) = data_of(in_tmp / "map.html")
    missing = ("mass", "vocabulary", "points", "axes", "z", "zScale", "numCoords", "field")
    assert shown["kind"] == "vanilla" and [shown[name] for name in missing] == [None] * 8
    shares = shares_of(shown)
    for row in shown["heads"]:
        head = shares[row["layer"] - 1, row["head"]]
        assert row["one_back"] == pytest.approx(np.trace(head, -1) / head.sum(), abs=1e-3)
        assert row["quiet"] == pytest.approx(1 - head.sum() / len(TEXT), abs=1e-3)
        assert (row["slope"], type(row["sink"])) == ((1 / 16, 1 / 256)[row["head"]], float)
    make_checkpoint("y.pt")
    flags = ("--text", TEXT, "--compare", "y.pt", "--output", "map.html")
    write_map(*flags)
    one, two = data_of(in_tmp / "map.html")
    assert (one["kind"], two["kind"]) == ("vanilla", "newton") and one["tokens"] == two["tokens"]
    model = make_checkpoint("x.pt", model_type="vanilla", block_size=64)
    with torch.no_grad():
        model.layers[0].attn.q_proj.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="pulls of this checkpoint are not finite"):
        coords_data.measure(model, LETTERS.encode(TEXT))


def test_heads_are_switched_off_if_that_is_quick(monkeypatch):
    """Not above a bound on the cost, lower for a live page, or on the size of the page."""
    model, tokens = lively("newton modern"), [1, 2, 3, 4, 5]
    assert coords_data.measure(model, tokens).off.loss.shape == (2, 4, 5)
    assert coords_data.measure(model, tokens, live=True).off is not None
    monkeypatch.setattr(predictions, "AT_ONCE", 2e5)
    assert coords_data.measure(model, tokens, live=True).off is None
    for bound, value in (("MOST_WORK", 2e5), ("MOST_ROWS", 39)):
        with monkeypatch.context() as patch:
            patch.setattr(predictions, bound, value)
            assert coords_data.measure(model, tokens).off is None


def test_bad_input_is_one_line(in_tmp):
    make_checkpoint("x.pt", model_type="vanilla")
    flags = ("--checkpoint-path", "x.pt", "--text", TEXT, "--png", "map.png")
    line = error_line(run("visualize_coords.py", *flags, cwd=in_tmp, check=2))
    assert "--png: x.pt is a vanilla transformer" in line
    make_checkpoint("x.pt")
    with pytest.raises(UserError, match="--text"):
        write_map()
    with pytest.raises(UserError, match="--layer 9"):
        write_map("--layer", 9)
    with pytest.raises(UserError, match="--offset 99"):
        write_map("--text", TEXT, "--offset", 99)
    with pytest.raises(UserError, match="--num-tokens"):
        write_map("--text", TEXT, "--num-tokens", 100_000)
    with pytest.raises(UserError, match=r"--text-file nothing\.txt cannot be read"):
        write_map("--text-file", "nothing.txt")
    before = (in_tmp / "x.pt").read_bytes()
    with pytest.raises(UserError, match="--output"):
        write_map("--text", TEXT, "--output", "x.pt")
    with pytest.raises(UserError, match="--png"):
        write_map("--text", TEXT, "--png", "coords.html")
    assert (in_tmp / "x.pt").read_bytes() == before
    with pytest.raises(UserError, match="cannot be written"):
        write_map("--text", TEXT, "--output", "x.pt/map.html")


def test_coordinates_that_are_no_numbers(in_tmp):
    model = make_checkpoint("x.pt")
    tokens = LETTERS.encode(TEXT)
    with torch.no_grad():
        model.layers[-1].coord_norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        coords_data.measure(model, tokens)
    model = make_checkpoint("x.pt")
    with torch.no_grad():
        model.norm.weight.fill_(float("inf"))
    with pytest.raises(UserError, match="losses"):
        coords_data.measure(model, tokens)


def test_json_cannot_end_its_script():
    hostile = "</script><!--<script>&\u2028\u2029\"'\\\ud800"
    text = json_for_script({"a": hostile})
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == {"a": hostile}
    text.encode()
