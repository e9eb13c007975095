"""Which token pulls which: each source's share of the pull, measured as an NGT reads tokens.

For a vanilla transformer the shares are its attention weights.
"""

import contextlib
import copy
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from gravity.law import TINY, gravity_field
from gravity.published import published_gravity_attention

PULL_PAIRS = 1 << 18  # heads times pairs of tokens whose shares are computed at once
NUM_STRONGEST = 8  # sources kept per row of shares


def share_of_pull(field, background=None):
    """Each source's share of the pull, field / (background + sum), along the last dimension.

    Args:
        field: (B, H, Tq, Tk).
        background: (H,), or None for none. With one, shares sum to less than 1.
    """
    background = TINY if background is None else background[:, None, None]
    return field / (background + field.sum(-1, keepdim=True))


def quietness(shares):
    """The background's share, from shares of the pull (..., N): what they lack to a sum of 1."""
    return (1 - shares.sum(-1)).clamp(min=0)


def listen(model, heard):
    """Call `heard(attn, z, mass, positions, kv_cache)` before each attention layer of an NGT runs.

    Returns:
        A context manager; leaving it stops the calls.
    """
    # inputs[0] is the hidden state, on which no pull depends
    return _before_attention(model, lambda attn, inputs: heard(attn, *inputs[1:]))


def _before_attention(model, heard):
    """Call `heard(attn, inputs)` before each attention layer; returns as `listen`."""
    hooks = contextlib.ExitStack()
    for layer in model.layers:
        hooks.callback(layer.attn.register_forward_pre_hook(heard).remove)
    return hooks


def layer_pulls(attn, z, mass, positions, kv_cache=None):
    """Yield the shares of the pull on each new token of one layer, a block of tokens at a time.

    Args:
        attn, z, mass, positions, kv_cache: as `listen` passes them, before the layer has run;
            batch size 1. With a cache only under the law newton.

    Yields:
        `(rows, shares)`: a slice of the new tokens, and (num_heads, rows, N). The N sources are all
        that the layer remembers, up to the last token of the slice. Rows sum to 1, or are
        0 if no source reaches the token; with a background they sum to less.
    """
    key_mass, key_positions = mass, positions
    if kv_cache is None:
        q, k = attn.points(z)  # (1, H, T, head_coord_dim) each
    else:
        before = kv_cache.snapshot()  # `points` writes to its cache, and the layer will do so too
        q, k = attn.points(z, before)
        if kv_cache.length:
            old_positions, old_k, _, old_mass = before.remembered(attn.layer)
            k, key_mass = torch.cat([old_k, k], 2), torch.cat([old_mass, mass], 1)
            key_positions = torch.cat([old_positions, positions])
    shares_of = _published_weights if attn.config.law == "published" else _newton_shares
    for rows, keys in _blocks(q, k):
        shares = shares_of(
            attn,
            q[:, :, rows].float(),
            k[:, :, keys].float(),
            mass[:, rows].float(),
            key_mass[:, keys].float(),
            query_positions=positions[rows],
            key_positions=key_positions[keys],
        )
        yield rows, shares[0]


def _blocks(q, k):
    """Yield `(queries, keys)`, two slices: a block of queries and all keys that may pull them."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    step = max(1, PULL_PAIRS // (num_keys * q.shape[1]))
    for start in range(0, num_queries, step):
        rows = slice(start, min(start + step, num_queries))
        yield rows, slice(num_keys - num_queries + rows.stop)  # no later token pulls these


def _newton_shares(attn, q, k, query_mass, key_mass, **positions):
    field = gravity_field(q, k, key_mass, **positions, **attn.field_law())
    return share_of_pull(field, attn.background)


def _published_weights(attn, q, k, query_mass, key_mass, **positions):
    if attn.config.mass_in_value:  # the mass then scales what a source hands on, not its weight
        query_mass, key_mass = torch.ones_like(query_mass), torch.ones_like(key_mass)
    # attention over the identity matrix gives back the softmax weights
    identity = torch.eye(k.shape[2], device=k.device).expand(*k.shape[:2], -1, -1)
    return published_gravity_attention(
        q, k, identity, query_mass, key_mass, **positions, **attn.law()
    )


def attention_weights(attn, h, positions, kv_cache=None, first_values=None, angles=None):
    """As `layer_pulls`, for a layer of a vanilla transformer without a cache."""
    q, k = attn.points(h, angles=angles)
    for rows, keys in _blocks(q, k):
        score = q[:, :, rows].float() @ k[:, :, keys].float().transpose(-1, -2)
        score = score / math.sqrt(q.shape[-1])  # (1, H, rows, keys)
        age = positions[rows, None] - positions[keys]
        if attn.config.pos == "alibi":
            score = score - attn.slopes[:, None, None] * age
        score = score.masked_fill(age < 0, -math.inf)
        if attn.sink is not None:  # one key more, which passes on nothing
            sink = attn.sink.float()[:, None, None].expand(*score.shape[:3], 1)
            score = torch.cat([score, sink], -1)
        yield rows, score.softmax(-1)[0, :, :, : rows.stop]


@torch.no_grad()
def visit_pulls(model, tokens, visit, visit_points=None):
    """Run a model on a text and show the shares of the pull of every layer, in bounded memory.

    Args:
        tokens: (1, T) ids.
        visit: called with `(layer, rows, shares)`; `layer` from 0, the others as in `layer_pulls`:
            shares (num_heads, rows, rows.stop).
        visit_points: called before with `(layer, q, k)`, (num_heads, T, D) each: where tokens look
            from and where they pull from, or the queries and keys of a vanilla transformer.

    Returns:
        What the forward pass returns: `(logits, Geometry)`, or the logits of a vanilla transformer.
    """
    has_gravity = hasattr(model.config, "law")

    def heard(attn, inputs):
        h, *others = inputs
        if visit_points is not None:
            q, k = attn.points(others[0]) if has_gravity else attn.points(h, angles=others[-1])
            visit_points(attn.layer, q[0], k[0])
        shown = layer_pulls(attn, *others) if has_gravity else attention_weights(attn, *inputs)
        for rows, shares in shown:
            visit(attn.layer, rows, shares)

    with _before_attention(model, heard):
        return model(tokens, return_geometry=True) if has_gravity else model(tokens)


@torch.inference_mode()
def newest_pulls(stream):
    """The shares of the pull on the newest token of a `TokenStream`, which is read once more.

    Returns:
        `(shares, tokens)`: (num_layers, num_heads, N) on the CPU, each row summing to 1 or 0, or
        with a background to less than 1, and the ids of the N tokens that the model remembers, the
        newest last.

    Raises:
        ValueError: if the law is not newton, or nothing was fed yet.
    """
    if getattr(stream.model.config, "law", None) != "newton":
        raise ValueError("only the law newton has pulls")
    if stream.before_newest is None:
        raise ValueError("feed at least one token first")
    cache, layers = copy.deepcopy(stream.before_newest), []

    def heard(attn, *inputs):
        layers.extend(shares[:, 0] for _, shares in layer_pulls(attn, *inputs))

    with listen(stream.model, heard):
        newest = torch.tensor([stream.context[-1:]], device=stream.device)
        stream.model(newest, kv_cache=cache)
    count = cache.most_remembered()
    # a layer may remember fewer tokens than another, or have forgotten its oldest just now
    shares = torch.stack([F.pad(x, (count - x.shape[-1], 0)) for x in layers])
    return shares.nan_to_num().cpu(), stream.context[-count:]


class Pulls(NamedTuple):
    """What pulled one token: the strongest sources per row of shares.

    The rows are, layer by layer, its heads and their mean; the last row is the mean over all.
    `sources` (rows, NUM_STRONGEST) are positions in the stream and `weights` of the same shape
    their shares of the pull, strongest first; 0 if there are fewer sources. `quiet` (rows,) is the
    background's share, None for a model without a background.
    """

    sources: np.ndarray
    weights: np.ndarray
    quiet: np.ndarray | None


class PullRecord:
    """Records the pulls on every token that is fed to an NGT (law newton) with a KV cache.

    It needs no second forward pass.

    Attributes:
        is_on: whether it records; that costs about as much as the forward pass of one token.
    """

    def __init__(self, model):
        self.num_layers = model.config.num_layers
        self.has_background = model.config.background
        self.is_on = True
        self._rows, self._sum, self._finished = [], None, []
        listen(model, self._record)

    def take(self):
        """`Pulls` of each token that was fed since the last call, oldest first."""
        finished, self._finished = self._finished, []
        return finished

    def _record(self, attn, z, mass, positions, kv_cache):
        if kv_cache is None or not self.is_on:
            return
        count = len(positions)
        if attn.layer == 0:
            # all that any layer can remember during this call, (T, N); the newest token is last
            width = kv_cache.most_remembered() + count
            self._rows, self._sum = [], torch.zeros(count, width, device=z.device)
        blocks = []
        for rows, shares in layer_pulls(attn, z, mass, positions, kv_cache):
            shares = shares.nan_to_num()  # (H, rows, N)
            mean, num_sources = shares.mean(0), shares.shape[-1]
            end = self._sum.shape[1] - (count - rows.stop)
            self._sum[rows, end - num_sources : end] += mean
            shares = torch.cat([shares, mean[None]])
            places, weights = strongest(shares)
            places += kv_cache.length + rows.stop - num_sources
            blocks.append((places, weights, quietness(shares)))
        self._rows.append([torch.cat(parts, 1) for parts in zip(*blocks, strict=True)])
        if attn.layer == self.num_layers - 1:
            shares = self._sum[None] / self.num_layers
            places, weights = strongest(shares)
            first = kv_cache.length + count - self._sum.shape[1]
            self._rows.append((places + first, weights, quietness(shares)))
            self._finish()

    def _finish(self):
        """Turn the rows of all layers into one `Pulls` per token."""
        sources, weights, quiet = (
            torch.cat(parts).transpose(0, 1).cpu().numpy()  # (T, rows, NUM_STRONGEST), (T, rows)
            for parts in zip(*self._rows, strict=True)
        )
        if not self.has_background:
            quiet = [None] * len(sources)
        self._finished += [Pulls(*pulls) for pulls in zip(sources, weights, quiet, strict=True)]


def strongest(shares):
    """Places and values of the `NUM_STRONGEST` largest along the last dimension, padded with 0."""
    shares = F.pad(shares, (0, max(0, NUM_STRONGEST - shares.shape[-1])))
    weights, places = shares.topk(NUM_STRONGEST)
    return torch.where(weights > 0, places, 0), weights
