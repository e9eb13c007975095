"""What pulls each token, kept as the tokens are fed: no second forward pass is made for it."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from gravity.law import TINY, gravity_field

PULL_PAIRS = 1 << 18  # pairs whose pull is shown at once


NUM_STRONGEST = 8  # sources kept of one row of weights


class Pulls(NamedTuple):
    """What pulled one token: the strongest sources of every row and their shares of the pull.

    Rows are, a layer after the other, its heads and the mean of them; the last row is the mean
    over all. `sources` (rows, N) are positions in the stream, `weights` (rows, N) go with them,
    strongest first; 0 where there is none.
    """

    sources: np.ndarray
    weights: np.ndarray


class PullRecord:
    """Listens to the attention of an NGT under the law newton while a KV cache is fed.

    Attributes:
        is_on: whether it listens; it costs about as much as the forward pass of one token.
    """

    def __init__(self, model):
        self.num_layers = model.config.num_layers
        self.is_on = True
        self._rows, self._sum, self._taken = [], None, []
        for layer in model.layers:
            layer.attn.register_forward_pre_hook(self._record)

    def take(self):
        """`Pulls` of each token that was fed since the last call, oldest first."""
        taken, self._taken = self._taken, []
        return taken

    def _record(self, attn, inputs):
        _, z, mass, positions, cache = inputs
        if cache is None or not self.is_on:
            return
        # of a copy: what the layer itself is about to remember stays its own affair
        before = cache.snapshot()
        q, k = attn.points(z, before)
        key_positions, key_mass = positions, mass
        if cache.length:
            old_positions, old_k, _, old_mass = before.remembered(attn.layer)
            key_positions = torch.cat([old_positions, positions])
            k, key_mass = torch.cat([old_k, k], 2), torch.cat([old_mass, mass], 1)
        step = max(1, PULL_PAIRS // (len(key_positions) * q.shape[1]))
        rows, means = [], []
        for start in range(0, len(positions), step):
            part = slice(start, min(start + step, len(positions)))
            field = gravity_field(
                q[:, :, part].float(),
                k.float(),
                key_mass,
                query_positions=positions[part],
                key_positions=key_positions,
                **attn.law(),
            )[0]
            shares = (field / (field.sum(-1, keepdim=True) + TINY)).nan_to_num()  # (H, part, N)
            means.append(shares.mean(0))
            rows.append(strongest(torch.cat([shares, means[-1][None]])))
        if attn.layer == 0:
            self._rows, self._sum = [], torch.zeros(len(positions), 0, device=z.device)
        after_newest = cache.length + len(positions)
        sources, weights = (torch.cat(parts, 1) for parts in zip(*rows, strict=True))
        self._rows.append((sources + (after_newest - len(key_positions)), weights))
        self._sum = _add(self._sum, torch.cat(means))
        if attn.layer == self.num_layers - 1:
            sources, weights = strongest(self._sum[None] / self.num_layers)
            self._rows.append((sources + (after_newest - self._sum.shape[1]), weights))
            sources, weights = (
                torch.cat(parts).transpose(0, 1).cpu().numpy()
                for parts in zip(*self._rows, strict=True)
            )
            self._taken += [Pulls(*pulls) for pulls in zip(sources, weights, strict=True)]


def _add(one, other):
    """Sum of (T, N) and (T, M): both end at the same token, and a layer forgets the oldest."""
    width = max(one.shape[1], other.shape[1])
    return sum(F.pad(x, (width - x.shape[1], 0)) for x in (one, other))


def strongest(shares):
    """Places and values of the largest along the last dimension, always `NUM_STRONGEST`."""
    shares = F.pad(shares, (0, max(0, NUM_STRONGEST - shares.shape[-1])))
    weights, places = shares.topk(NUM_STRONGEST)
    return torch.where(weights > 0, places, 0), weights
