"""Tests the formulas of the scaling page against brute force, and the page with real trainings."""

import json
import math
from pathlib import Path

import pytest
import torch

import benchmark
from benchmarks import scaling
from benchmarks.paper import (
    SIZES,
    bytes_on_the_wire,
    efficiency,
    memory_of_a_rank,
    parameters_of,
    saved_bytes,
)
from engine.models import build_model
from training.config import DEFAULTS


def test_sizes_are_what_they_are_called():
    for name, shape in SIZES.items():
        with torch.device("meta"):
            model = build_model(DEFAULTS | shape)
        assert parameters_of(shape) == sum(p.numel() for p in model.parameters())
        called = float(name[:-1]) * {"M": 1e6, "B": 1e9}[name[-1]]
        assert parameters_of(shape) == pytest.approx(called, rel=0.15), name


def test_pairs_are_counted_one_by_one():
    for windows, tokens in (([[3, 8], [1, 40]], 20), ([[5]], 5), ([[100]], 7)):
        counts = []
        for window in (w for layer in windows for w in layer):
            seen = [min(place + 1, window) for place in range(tokens)]
            counts.append(sum(seen) / tokens)
        assert scaling.mean_pairs(windows, tokens) == pytest.approx(sum(counts) / len(counts))


@pytest.mark.parametrize("background", [False, True])
def test_the_cache_is_as_long_as_the_windows(background):
    """With a background it ends without a radius, and without either it holds the whole context."""
    shape = {"mlp_dim": 8, "model_type": "ngt", "vocab_size": 66, "use_radius_cutoff": False}
    model = build_model(DEFAULTS | shape | {"background": background})
    page = scaling.context_section(model, {1024: 1.0}, "a model")
    (row,) = (line for line in page.splitlines() if "1,048,576" in line)
    longest = 1_048_576
    if background:
        longest = max(map(max, (x.attn.window(1.0).tolist() for x in model.layers)))
        assert longest < 1_048_576
    kept = 4 * math.ceil(longest) * (128 + 4 * 17) * 4 / 2**20
    assert f"{kept:,.1f} MiB" in row


def test_what_a_ring_sends():
    """An all-reduce by hand: every rank sends a part 2 (ranks - 1) times."""
    parameters, ranks = 1200, 4
    part = 4 * parameters / ranks
    assert bytes_on_the_wire(parameters, ranks, False) == 2 * (ranks - 1) * part
    assert bytes_on_the_wire(parameters, ranks, True) == 3 * (ranks - 1) * part
    assert bytes_on_the_wire(parameters, 1, True) == 0


def test_memory_of_a_rank():
    """Of a model whose weights are counted by hand: 5 layers, on 4 ranks rows are padded."""
    shape = {"vocab_size": 10, "hidden_dim": 8, "num_layers": 5, "num_heads": 2, "mlp_dim": 6}
    shape |= {"model_type": "vanilla", "pos": "rotary", "bias": False, "norm": "rmsnorm"}
    layer = 4 * 8 * 8 + 2 * 6 * 8 + 2 * 8
    root = 10 * 8 + 8  # the head is the embedding
    parameters = 5 * layer + root
    assert memory_of_a_rank(shape, 4, "none") == 16 * parameters
    assert memory_of_a_rank(shape, 4, "optimizer") == 10 * parameters
    part = 5 * (4 * 2 * 8 + 2 * 8 + 2 * 6 + 2 * 2) + 3 * 8 + 2
    assert memory_of_a_rank(shape, 4, "model") == 16 * part + 20 * layer + 8 * root


def test_saved_bytes_are_those_of_a_real_layer():
    """At least what the matrix products must keep, and at most a few times that."""
    shape = {"hidden_dim": 64, "num_layers": 3, "num_heads": 2, "mlp_dim": 256, "block_size": 512}
    least = 3 * 2 * (64 + 64 + 64 + 256)  # inputs of the projections and both of the feed-forward
    assert least < saved_bytes(shape) < 8 * least


def test_efficiency_falls_with_fewer_tokens():
    shape = SIZES["124M"]
    shares = [efficiency(shape, parameters_of(shape), 64, tokens) for tokens in (512, 4096, 65536)]
    assert 0 < shares[0] < shares[1] < shares[2] <= 1
    assert efficiency(shape, parameters_of(shape), 1, 512) == 1


@pytest.mark.slow
def test_the_page_is_of_real_trainings(in_tmp):
    flags = ["--preset", "shakespeare", "--rounds", "1", "--steps", "6", "--json", "s.json"]
    assert benchmark.main(["scaling", *flags, "--output", "s.md"]) == 0
    page, numbers = Path("s.md").read_text(), json.loads(Path("s.json").read_text())
    assert "## Measured" in page and "1,048,576" in page
    assert {"1", "2", "2 sharded", "2 sharded model"} == numbers["runs"].keys()
    two = numbers["runs"]["2"][0]
    parameters = parameters_of(scaling.SHAPES["shakespeare"] | {"vocab_size": scaling.VOCAB_SIZE})
    assert two["wire_bytes"] > 2 * bytes_on_the_wire(parameters, 2, False)
