"""The masses of the vocabulary, and how often each token occurs."""

import numpy as np
import torch
from tqdm import tqdm

from system.errors import UserError, warn
from text.token_files import TextMissing, data_of_checkpoint

COUNTED_AT_ONCE = 1 << 22  # tokens, which bounds the memory for a large corpus
LISTED = 20  # of the heaviest tokens, and of the lightest
PLOTTED = 4000  # tokens; more points make the page slow


def frequencies(data, tokens, vocab_size):
    """How often each token occurs in the training text, or without one in the shown text.

    Args:
        data: the `TokenData` of the training text, or None.
        tokens: ids of the shown text.

    Returns:
        `(counts (vocab_size,), what was counted, in words)`.
    """
    if data is None:
        return np.bincount(tokens, minlength=vocab_size), f"the {len(tokens):,} tokens shown"
    ids, counts = data.train, np.zeros(vocab_size, np.int64)
    bar = tqdm(total=len(ids), unit=" tokens", unit_scale=True, desc="counting", delay=1.0)
    with bar:
        for start in range(0, len(ids), COUNTED_AT_ONCE):
            part = np.asarray(ids[start : start + COUNTED_AT_ONCE])
            counts += np.bincount(part, minlength=vocab_size)
            bar.update(len(part))
    return counts, f"the {len(ids):,} tokens of the training text"


def training_text_or_none(checkpoint, tokenizer):
    """`data_of_checkpoint`, or None: without the text, or with a warning if it is unusable."""
    try:
        return data_of_checkpoint(checkpoint, tokenizer, "prepare it again")
    except TextMissing:
        return None
    except UserError as error:
        warn(f"frequencies are of the shown text: {error}")
        return None


@torch.no_grad()
def vocabulary(model, tokenizer, counts):
    """Masses and counts of the vocabulary, heaviest token first.

    Args:
        counts: (vocab_size,), how often each token occurs.

    Returns:
        A dict: `size` of the vocabulary; `labels`, `masses` and `counts` of at most `PLOTTED`
        tokens, among them the `LISTED` heaviest and lightest; the `median` mass of all.
    """
    device = model.token_emb.weight.device
    masses = model.mass(torch.arange(model.config.vocab_size, device=device)).cpu().numpy()
    order = (-masses).argsort(kind="stable")
    if len(order) > PLOTTED:
        middle = np.linspace(LISTED, len(order) - LISTED - 1, PLOTTED - 2 * LISTED).astype(int)
        order = np.concatenate([order[:LISTED], order[middle], order[-LISTED:]])
    return {
        "size": len(masses),
        "labels": [tokenizer.label(int(token)) for token in order],
        "masses": [round(float(masses[token]), 5) for token in order],
        "counts": [int(counts[token]) for token in order],
        "median": float(np.median(masses)),
    }
