"""Batches and evaluation windows: what is drawn."""

import numpy as np
import pytest
import torch

from data import eval_batches, eval_windows, get_batch
from token_folders import prepare

COUNTING = np.arange(60_000, dtype="<u2")  # a token that is its own position


def starts_of(batch):
    inputs, targets = batch
    assert inputs.dtype == targets.dtype == torch.int64
    block_size = inputs.shape[1]
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(block_size))
    assert torch.equal(targets, inputs + 1)
    return inputs[:, 0].tolist()


def test_batch_is_a_pure_function():
    """The same (seed, step, micro_step) is the same batch, whatever else was drawn meanwhile."""
    first = get_batch(COUNTING, 8, 32, 1337, 7, 2)
    np.random.seed(5)
    torch.manual_seed(5)
    get_batch(COUNTING, 3, 16, 1337, 8)
    again = get_batch(COUNTING, 8, 32, 1337, 7, 2)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert first[0].shape == first[1].shape == (8, 32)


def test_batches_differ():
    """Every other seed, step or micro-step is another batch, swapped ones too."""
    keys = [(seed, step, micro) for seed in range(4) for step in range(5) for micro in range(4)]
    batches = {tuple(starts_of(get_batch(COUNTING, 8, 32, *key))) for key in keys}
    assert len(batches) == len(keys)


def test_batch_reaches_every_window():
    """The first and the last window come up, and none beyond."""
    tokens = COUNTING[:10]
    starts = set()
    for step in range(100):
        starts.update(starts_of(get_batch(tokens, 4, 4, 0, step)))
    assert starts == {0, 1, 2, 3, 4, 5}
    assert set(starts_of(get_batch(tokens, 4, 9, 0, 0))) == {0}


def test_batch_of_real_tokens(in_tmp, small_text):
    """Inputs and targets of a memory map are the text and the text one character on."""
    text = small_text.read_text()[: 24000 * 9 // 10]
    prepared = prepare("text", str(small_text))
    itos = prepared.tokenizer.itos
    inputs, targets = get_batch(prepared.train, 16, 50, 1, 1)
    for row, shifted in zip(inputs.tolist(), targets.tolist(), strict=True):
        window = "".join(itos[i] for i in [*row, shifted[-1]])
        assert window in text
        assert "".join(itos[i] for i in shifted) == window[1:]


@pytest.mark.parametrize("length", [33, 64, 65, 1000, 12_345])
@pytest.mark.parametrize("eval_iters", [1, 3, 10_000])
def test_eval_windows(length, eval_iters):
    """As many as asked or as there is room for, in range, apart, spread over the whole split."""
    block_size, tokens = 32, COUNTING[:length]
    starts = eval_windows(tokens, block_size, eval_iters).tolist()
    room = (length - 1) // block_size
    assert len(starts) == min(room, 16 * eval_iters)
    assert starts[0] == 0
    steps = np.diff(starts)
    assert (steps >= block_size).all()
    assert starts[-1] + block_size + 1 <= length
    if len(starts) == room:
        assert starts == [n * block_size for n in range(room)]
    else:
        assert steps.max() - steps.min() <= block_size
        assert length - starts[-1] < 3 * steps.max()


@pytest.mark.parametrize("eval_iters", [2, 10_000])
def test_eval_batches_do_not_depend_on_batch_size(eval_iters):
    """Batches of 1, 7 and 64 hold the same windows in the same order, each once."""
    tokens = COUNTING[:5000]
    contents = []
    for batch_size in (1, 7, 64):
        batches = list(eval_batches(tokens, 32, eval_iters, batch_size))
        assert all(len(inputs) == batch_size for inputs, _ in batches[:-1])
        assert 1 <= len(batches[-1][0]) <= batch_size
        contents.append([start for batch in batches for start in starts_of(batch)])
    assert contents[0] == contents[1] == contents[2]
    expected = 32 if eval_iters == 2 else 4999 // 32
    assert len(set(contents[0])) == len(contents[0]) == expected


def test_full_evaluation_predicts_every_token_once():
    """Asked for more than there is, each token but the first and an odd rest is a target once."""
    tokens = COUNTING[:1001]
    targets = [t for _, batch in eval_batches(tokens, 100, 1000, 7) for t in batch.flatten()]
    assert sorted(map(int, targets)) == list(range(1, 1001))
