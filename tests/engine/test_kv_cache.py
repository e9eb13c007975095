"""Models with a KV cache: the logits of one pass, and what is forgotten."""

import copy

import pytest
import torch

from engine import kv_cache
from engine.kv_cache import KVCache
from gravity.newton import GravityAttention
from small_models import ALL, BLOCK, NEWTON, RADIUS, VANILLA, ids, lively

UNLIMITED = [*NEWTON, *(name for name in VANILLA if "learned" not in name)]


def in_chunks(model, tokens, sizes):
    """`(logits, cache)` of tokens that are fed through one KV cache in pieces."""
    cache, start, logits = KVCache(), 0, []
    for size in sizes:
        logits.append(model(tokens[:, start : start + size], kv_cache=cache))
        start += size
    assert start == tokens.shape[1] == cache.length
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_cached_equals_uncached(name):
    """Pieces of 1, 2, 5, 13, ... tokens through the cache give the logits of one pass, to 1e-4."""
    model = lively(name)
    length = 3 * BLOCK if name in UNLIMITED else BLOCK
    tokens = ids(length, batch=2)
    full = model(tokens)
    assert full.std() > 0.3
    for sizes in ([1] * length, [5, 1, 1, 2], [length - 1, 1], [13, 1, 2]):
        sizes = [*sizes, *([] if sum(sizes) == length else [length - sum(sizes)])]
        cached, _ = in_chunks(model, tokens, sizes)
        assert (cached - full).abs().max() < 1e-4


@pytest.mark.parametrize("name", [n for n in NEWTON if "radius" in NEWTON[n]])
@torch.no_grad()
def test_newton_with_a_radius_forgets(name, monkeypatch):
    """The cache stops growing, and the logits equal those of a pass that forgets nothing."""
    monkeypatch.setattr(kv_cache, "MIN_CAPACITY", 2)
    model = lively(name)
    tokens = ids(5 * BLOCK)
    full = model(tokens)
    cache, sizes, memory, logits = KVCache(), [], [], []
    for t in range(tokens.shape[1]):
        logits.append(model(tokens[:, t : t + 1], kv_cache=cache))
        sizes.append(cache.num_remembered(0))
        memory.append(cache.num_bytes())
    assert sizes[0] < sizes[5] < sizes[-1] and memory[0] < memory[5] < memory[-1]
    assert len(set(sizes[20:])) == 1 and len(set(memory[50:])) == 1
    # memory is at most twice what is remembered, including the new token
    assert memory[-1] <= memory[0] / 2 * 2 * (sizes[-1] + 1)
    assert (torch.cat(logits, 1) - full).abs().max() < 1e-4
    # radius / time_scale + offset + slack of the farthest head, in tokens of q, k, v and mass
    assert 1 + RADIUS / 0.25 <= sizes[-1] <= 1 + RADIUS / 0.25 + 3
    # what is remembered matters: without half of it the logits differ
    for layer in range(2):
        cache.keep_newest(layer, 4)
    other = model(tokens[:, -1:], kv_cache=cache)
    again, _ = in_chunks(model, torch.cat([tokens, tokens[:, -1:]], 1), [80, 1])
    assert (other[:, -1] - again[:, -1]).abs().max() > 1e-2


@torch.no_grad()
def test_the_window_is_computed_once_per_layer_and_cache(monkeypatch):
    """A decoding step reads it from the cache, from a snapshot and from a deep copy as well."""
    computed, window = [], GravityAttention.window

    def counting(attn, *given):
        computed.append(attn.layer)
        return window(attn, *given)

    monkeypatch.setattr(GravityAttention, "window", counting)
    model, cache = lively("newton background"), KVCache()
    for _ in range(3):
        model(ids(1), kv_cache=cache)
    for copied in (cache.snapshot(), copy.deepcopy(cache)):
        model(ids(1), kv_cache=copied)
    assert computed == [0, 1]


@torch.no_grad()
def test_cache_without_a_radius_keeps_everything():
    """Without a cutoff every token is remembered."""
    model, cache, sizes = lively("newton none"), KVCache(), []
    for _ in range(40):
        model(ids(1), kv_cache=cache)
        sizes.append(cache.num_remembered(1))
    assert sizes == list(range(1, 41))


@torch.no_grad()
def test_newton_with_a_background_forgets(monkeypatch):
    """A conversation of many tokens takes constant memory, and its logits are those of one pass."""
    monkeypatch.setattr(kv_cache, "MIN_CAPACITY", 2)
    model = lively("newton background")
    tokens = ids(40 * BLOCK)
    full = model(tokens)
    cache, sizes, memory, logits = KVCache(), [], [], []
    for chunk in tokens.split(4, dim=1):
        logits.append(model(chunk, kv_cache=cache))
        sizes.append(cache.num_remembered(0))
        memory.append(cache.num_bytes())
    assert len(set(sizes[25:])) == 1 and len(set(memory[40:])) == 1
    assert 20 < sizes[-1] < 60
    assert (torch.cat(logits, 1) - full).abs().max() < 1e-4
    # an operator that leaves out nothing remembers everything
    model = lively("newton background")
    model.config.field_tolerance = 0.0
    cache = KVCache()
    model(tokens, kv_cache=cache)
    assert cache.num_remembered(0) == tokens.shape[1]
