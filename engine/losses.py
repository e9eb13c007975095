"""The losses of a model's predictions on given texts, in batches."""

import contextlib

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from system.machine import cpu_multiplies_bf16

TOKENS_AT_ONCE = 8192


def learned_limit(model):
    """The most tokens that a model can read at once, None if there is no limit.

    Learned positions end with the window, rotary and ALiBi do not; an NGT has no `pos`, and its
    limit is None, or under the published law its window.
    """
    has_learned_positions = getattr(model.config, "pos", "learned") == "learned"
    return model.max_context if has_learned_positions else None


def start_of_text(tokenizer):
    """The id from which the first token of a text is predicted: a line end, for want of a start."""
    return (tokenizer.encode("\n") or [0])[0]


class Losses:
    """Computes losses of a model's predictions, in bf16 if it was trained in bf16.

    Args:
        model: an NGT or a vanilla transformer.
        config: that of its checkpoint.
    """

    def __init__(self, model, config):
        self.model = model
        self.device = next(model.parameters()).device
        is_fast = self.device.type == "cuda" or cpu_multiplies_bf16()
        self.amp = bool(config.get("use_amp")) and is_fast
        self.limit = learned_limit(model)

    @torch.no_grad()
    def graded(self, tokens, count):
        """Losses of the last tokens of several sequences, and whether greedy decoding finds them.

        Args:
            tokens: ids, int64, (B, T + 1).
            count: number of tokens at the end, at most T.

        Returns:
            Losses in nats as a NumPy array of float64, and whether each token was the likeliest,
            both (B, count).
        """
        tokens = torch.as_tensor(tokens).to(self.device)
        autocast = torch.autocast(self.device.type, torch.bfloat16)
        with autocast if self.amp else contextlib.nullcontext():
            logits = self.model(tokens[:, :-1])[:, -count:]
        targets = tokens[:, -count:]
        losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        is_right = logits.argmax(-1) == targets
        return losses.view(targets.shape).cpu().double().numpy(), is_right.cpu().numpy()

    def graded_all(self, sequences, count, title):
        """`graded` for any number of sequences, in batches of about TOKENS_AT_ONCE.

        Args:
            title: of the progress bar.
        """
        rows = max(1, TOKENS_AT_ONCE // sequences.shape[1])
        starts = range(0, len(sequences), rows)
        parts = [
            self.graded(sequences[start : start + rows], count)
            for start in tqdm(starts, title, leave=False, delay=2, disable=None)
        ]
        losses, is_right = zip(*parts, strict=True)
        return np.concatenate(losses), np.concatenate(is_right)

    def of_all(self, sequences, count, title):
        """The losses of `graded_all` alone."""
        return self.graded_all(sequences, count, title)[0]
