"""What a checkpoint's loss depends on, measured on the validation text of its training."""

import itertools

import numpy as np

from data import eval_windows
from engine.long_range import STRING, long_range
from engine.losses import Losses
from system.errors import UserError, warn
from text.token_files import data_of_checkpoint

TARGETS = 64  # the loss by length of context is that of the last 64 tokens
PLACES = (1, 2, 5, 17, 65, 129, 257, 513, 1025)  # the first place of each group
RANKS = (10, 100, 1000)  # the last rank of each group
GAPS = (20, 100, 200)  # tokens from its first start to its second
RANDOM_LENGTHS = (20, 100)  # tokens of a string of random ids


def evaluation(model, tokenizer, checkpoint, context_lengths, num_windows, trials):
    """Evaluate a model that `load_model` returned.

    Args:
        context_lengths: in tokens, a list.
        num_windows: number of windows of the longest context and of repeated strings.
        trials: of each question of `long_range`; None asks none.

    Returns:
        A dict of tables, each a list of dicts.

    Raises:
        UserError: if the validation text is not here, or is shorter than a window.
    """
    remedy = "prepare it with prepare_data.py, in the directory where it was trained"
    data = data_of_checkpoint(checkpoint, tokenizer, remedy)
    losses = Losses(model, checkpoint["config"])
    tokens = np.asarray(data.valid).astype(np.int64)
    vocab_size, block_size = model.config.vocab_size, model.config.block_size
    if len(tokens) <= block_size:
        raise UserError(
            f"the validation text has {len(tokens):,} tokens, a window {block_size:,}: "
            "prepare a longer text"
        )
    ranks = frequency_ranks(data.train, vocab_size)
    places, frequencies = by_place_and_rank(losses, tokens, ranks, block_size)
    result = {
        "by_length": by_length(losses, tokens, context_lengths, num_windows),
        "by_place": places,
        "by_frequency": frequencies,
        "repeats": on_repeats(losses, tokens, vocab_size, num_windows, block_size),
    }
    if trials:
        result["long_range"] = long_range(losses, tokens, tokenizer, trials, block_size)
    return result


def by_length(losses, tokens, lengths, num_windows):
    """Loss of the same target tokens after contexts of several lengths.

    Lengths below TARGETS are left out, and with a warning those that the text is too short for.

    Returns:
        A list of dicts, one per length; the loss is None beyond the positions of the model.
    """
    lengths = sorted(length for length in lengths if length >= TARGETS)
    while lengths and len(tokens) <= lengths[-1]:
        warn(f"the validation text is shorter than {lengths[-1]} tokens: that length is left out")
        lengths.pop()
    if not lengths:
        return []
    longest = lengths[-1]
    count = min(num_windows, (len(tokens) - 1) // longest)
    # contexts of every length end at the same places, spread evenly over the text
    ends = (np.arange(count) + 1) * ((len(tokens) - 1) // count) + 1
    rows = []
    for length in lengths:
        row = {"context": length, "tokens": count * TARGETS, "loss": None}
        if losses.limit is None or length <= losses.limit:
            sequences = np.stack([tokens[end - length - 1 : end] for end in ends])
            row["loss"] = float(losses.of_all(sequences, TARGETS, f"context {length}").mean())
        rows.append(row)
    return rows


def by_place_and_rank(losses, tokens, ranks, block_size):
    """Loss by place of the token in the window, and by its rank in the training text.

    Args:
        tokens: of the validation text.
        ranks: by id, from `frequency_ranks`.

    Returns:
        `(places, frequencies)`, each a list of dicts; a group that has no token is left out.
    """
    starts = eval_windows(tokens, block_size, eval_iters=50)
    sequences = np.stack([tokens[start : start + block_size + 1] for start in starts])
    found = losses.of_all(sequences, block_size, "windows")
    places, frequencies = [], []
    for first, end in itertools.pairwise(PLACES):
        if first <= block_size:
            part = found[:, first - 1 : end - 1]
            row = {"first": first, "last": min(end - 1, block_size), "loss": float(part.mean())}
            places.append(row)
    rank = ranks[sequences[:, 1:]]
    for first, last in zip((1, *(r + 1 for r in RANKS)), (*RANKS, len(ranks)), strict=True):
        chosen = (rank >= first) & (rank <= last)
        if chosen.any():
            row = {"first": first, "last": last, "tokens": int(chosen.sum())}
            frequencies.append(row | {"loss": float(found[chosen].mean())})
    return places, frequencies


def frequency_ranks(tokens, vocab_size):
    """Rank of every id in the training text, (vocab_size,), 1 for the most frequent.

    Only the first 50 million tokens are counted, which bounds the time on a large corpus.
    """
    counts = np.bincount(np.asarray(tokens[:50_000_000]), minlength=vocab_size)
    ranks = np.empty(vocab_size, dtype=np.int64)
    ranks[np.argsort(-counts, kind="stable")] = np.arange(1, vocab_size + 1)
    return ranks


def on_repeats(losses, tokens, vocab_size, count, block_size):
    """Loss of a string that is repeated, and of the same string without the repetition.

    Real text: a string, other text, and the string again, GAPS tokens after its first start. Random
    text: ids drawn uniformly, and the same ids again. The first token of a string is not counted,
    because nothing before it tells that the string begins.

    Args:
        tokens: of the validation text.
        count: number of strings behind each number.

    Returns:
        A list of dicts, one per gap and one per length of random text that fits into `block_size`.
    """
    generator = np.random.default_rng(0)  # every model gets the same strings
    rows = []
    for gap in GAPS:
        before = block_size - gap - STRING
        if before < 0 or len(tokens) < 4 * block_size:
            continue
        starts = generator.integers(0, len(tokens) - block_size, (count, 2))
        once = np.stack([tokens[a : a + block_size] for a, _ in starts])
        string = np.stack([tokens[b : b + STRING] for _, b in starts])
        twice = once.copy()
        twice[:, before : before + STRING] = string
        once[:, -STRING:] = twice[:, -STRING:] = string
        first = losses.of_all(once, STRING - 1, f"string after {gap}").mean()
        second = losses.of_all(twice, STRING - 1, f"string after {gap}").mean()
        rows.append({"text": "real", "gap": gap, "once": float(first), "again": float(second)})
    for length in RANDOM_LENGTHS:
        if 2 * length > block_size:
            continue
        ids = generator.integers(0, vocab_size, (count, length))
        found = losses.of_all(np.concatenate([ids, ids], 1), 2 * length - 1, f"random {length}")
        again = float(found[:, length:].mean())
        rows.append(
            {"text": "random", "gap": length, "once": float(found[:, : length - 1].mean())}
            | {"again": again}
        )
    return rows
