"""Shares of the pull: of a whole text, of the newest token, and of every token as it is fed."""

import numpy as np
import pytest
import torch

from engine import pulls
from engine.generation import TokenStream
from engine.pulls import PullRecord, newest_pulls
from small_models import BLOCK, NEWTON, PUBLISHED, ids, lively, pull_weights


@pytest.mark.parametrize("name", [*NEWTON, *PUBLISHED])
def test_blocks_of_any_size_give_the_same_shares(name, monkeypatch):
    """Several blocks of tokens give what one gives, and no hook is left on the model."""
    model, tokens = lively(name), ids(BLOCK)
    whole = pull_weights(model, tokens)
    monkeypatch.setattr(pulls, "PULL_PAIRS", 3 * 4 * BLOCK)
    torch.testing.assert_close(pull_weights(model, tokens), whole)
    assert not any(layer.attn._forward_pre_hooks for layer in model.layers)


@pytest.mark.parametrize("name", NEWTON)
def test_pulls_on_the_newest_token(name):
    """Computed from the cache, they equal the last row of a full pass."""
    model = lively(name)
    stream = TokenStream(model)
    tokens = ids(3 * BLOCK)[0].tolist()
    with pytest.raises(ValueError, match="feed"):
        newest_pulls(stream)
    for start, end in ((0, 1), (1, BLOCK), (BLOCK, 3 * BLOCK - 2), (3 * BLOCK - 2, 3 * BLOCK)):
        stream.feed(tokens[start:end])
        weights, labels = newest_pulls(stream)
        expected = pull_weights(model, torch.tensor([tokens[:end]]))[:, :, -1]
        count = weights.shape[-1]
        assert labels == tokens[end - count : end] and count == stream.cache.most_remembered()
        # beyond a radius nothing pulls, and with a background next to nothing
        assert expected[:, :, : end - count].sum(-1).max() <= (1e-6 if "background" in name else 0)
        torch.testing.assert_close(weights, expected[:, :, end - count :], rtol=1e-3, atol=1e-5)
    state, logits = stream.copy_of_state(), stream.logits
    newest_pulls(stream)
    stream.feed([1])
    moved = stream.logits
    stream.return_to(state)
    assert torch.equal(stream.logits, logits)
    stream.feed([1])
    torch.testing.assert_close(stream.logits, moved)  # looking changed nothing


@pytest.mark.parametrize("name", NEWTON)
def test_the_record_keeps_the_strongest_of_every_row(name, monkeypatch):
    """Fed in chunks and in small blocks: each layer's heads, their mean, and the mean over all."""
    monkeypatch.setattr(pulls, "PULL_PAIRS", 200)
    model = lively(name)
    record, stream, tokens = PullRecord(model), TokenStream(model), ids(3 * BLOCK)[0].tolist()
    for start, end in ((0, 5), (5, 6), (6, 2 * BLOCK), (2 * BLOCK, 3 * BLOCK)):
        stream.feed(tokens[start:end])
    found = record.take()
    assert len(found) == len(tokens) and record.take() == []
    weights = pull_weights(model, torch.tensor([tokens])).numpy()
    rows = np.concatenate([weights, weights.mean(1, keepdims=True)], 1).reshape(-1, *[48] * 2)
    rows = np.concatenate([rows, weights.mean((0, 1))[None]])
    for position in (0, 4, 5, 6, 20, 47):
        expected = rows[:, position]
        of_token = found[position]
        assert np.allclose(of_token.weights, -np.sort(-expected, -1)[:, :8], atol=1e-5)
        there = of_token.weights > 0
        sources = np.where(there, of_token.sources, 0)
        shares = np.take_along_axis(expected, sources, -1)
        assert np.allclose(shares[there], of_token.weights[there], atol=1e-5)
