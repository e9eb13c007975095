"""The vocabulary's masses and how often each token occurs."""

import numpy as np
import torch
from tqdm import tqdm

from system.errors import UserError, warn
from text.token_files import TextMissing, data_of_checkpoint

COUNTED_AT_ONCE = 1 << 22
LISTED = 20  # heaviest, and lightest
PLOTTED = 4000


def frequencies(data, tokens, vocab_size):
    """How often each token occurs in the training text, or in the shown text where that is gone.

    Args:
        data: a `TokenData`, or None.
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
    """`data_of_checkpoint`, or None; warns if the text is there but cannot be used."""
    try:
        return data_of_checkpoint(checkpoint, tokenizer, "prepare it again")
    except TextMissing:
        return None
    except UserError as error:
        warn(f"frequencies are of the shown text: {error}")
        return None


@torch.no_grad()
def vocabulary(model, tokenizer, counts):
    """Masses and counts, heaviest first.

    Returns:
        A dict: `size`; `labels`, `masses`, `counts` of at most `PLOTTED` tokens, the heaviest and
        the lightest `LISTED` among them and the others evenly over the order; `median`.
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
