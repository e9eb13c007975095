"""What a model expects next: after each layer, and with one head switched off.

The letters in shapes: L layers, H heads, T tokens, V tokens of the vocabulary.
"""

import contextlib
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from engine.interventions import head_off
from layers.parts import soft_cap
from system.errors import UserError

KEPT = 5  # the likeliest tokens
LOGITS_AT_ONCE = 1 << 22
MOST_WORK = 200e9  # multiplications to switch each head off, about half a minute on two cores
AT_ONCE = 1e9  # multiplications that take less than half a second there
MOST_ROWS = 1 << 15  # heads times tokens, which is a megabyte of the page
PROGRESS_DELAY = 1.0  # seconds before a progress bar appears


class Predictions(NamedTuple):
    """What is expected after each token: the `KEPT` likeliest (fewer if V is smaller).

    `ids` (..., T, KEPT), likeliest first, and `chances` of the same shape their probabilities;
    `loss` (..., T) in nats of the token that follows, 0 for the last.
    """

    ids: np.ndarray
    chances: np.ndarray
    loss: np.ndarray


@torch.no_grad()
def predictions(model, h, tokens):
    """The `Predictions` of hidden states.

    Args:
        h: (T, hidden_dim), before the last norm.
        tokens: (T,) ids.
    """
    following = torch.cat([tokens[1:], tokens[:1]])[:, None]
    rows, found = max(1, LOGITS_AT_ONCE // model.config.vocab_size), []
    for part, wanted in zip(h.split(rows), following.split(rows), strict=True):
        logits = soft_cap(model.head(model.norm(part)), model.config.logit_softcap)
        log_chance = F.log_softmax(logits.float(), -1)
        best = log_chance.topk(min(KEPT, log_chance.shape[1]))
        found.append((best.indices, best.values.exp(), -log_chance.gather(1, wanted)[:, 0]))
    ids, chances, loss = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
    loss[-1] = 0
    check_finite("losses", loss, chances)
    return Predictions(ids, chances, loss)


def check_finite(what, *arrays):
    """Raise `UserError` if numbers of a checkpoint are not finite."""
    if not all(np.isfinite(array).all() for array in arrays):
        raise UserError(f"the {what} of this checkpoint are not finite: use another")


def stacked(parts):
    """`Predictions` with one dimension more, from a list of them."""
    return Predictions(*(np.stack(arrays) for arrays in zip(*parts, strict=True)))


@contextlib.contextmanager
def hidden_states(model):
    """Within this, a forward pass adds to the list that it gives the hidden state (B, T,
    hidden_dim) before the first layer and after each, and computes the last token's logits only."""
    found = []
    with contextlib.ExitStack() as hooks:
        first = model.layers[0].register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
        hooks.callback(first.remove)
        for layer in model.layers:
            hook = layer.register_forward_hook(lambda _, inputs, outputs: found.append(outputs[0]))
            hooks.callback(hook.remove)
        last = model.norm.register_forward_hook(lambda _, inputs, h: h[:, -1:])
        hooks.callback(last.remove)
        yield found


@torch.no_grad()
def with_heads_off(model, tokens, live=False):
    """`Predictions` (L, H, T, ...) with each head off in turn; None if that would take too long.

    Args:
        tokens: (T,) ids.
        live: whether half a second is too long.
    """
    config, count = model.config, len(tokens)
    heads = config.num_layers * config.num_heads
    per_token = sum(parameter.numel() for parameter in model.parameters())
    per_token += count * config.num_layers * config.hidden_dim  # of attention
    most_work = AT_ONCE if live else MOST_WORK
    if heads * count > MOST_ROWS or heads * count * per_token > most_work:
        return None
    found = []
    bar = tqdm(total=heads, unit=" heads", desc="heads off", delay=PROGRESS_DELAY, leave=False)
    with bar:
        for layer, head in np.ndindex(config.num_layers, config.num_heads):
            with head_off(model, layer + 1, head), hidden_states(model) as states:
                model(tokens[None])
            found.append(predictions(model, states[-1][0], tokens))
            bar.update()
    shape = (config.num_layers, config.num_heads)
    return Predictions(*(x.reshape(*shape, *x.shape[1:]) for x in stacked(found)))
