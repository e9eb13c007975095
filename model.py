"""Newton Gravity Transformer: tokens are particles, attention is gravity.

A token has a hidden state `h`, coordinates `z` and a positive mass `m`. One layer computes

    a = GravityAttention(LayerNorm(h), z, m)
    h = h + a
    h = h + FeedForward(LayerNorm(h))
    z = LayerNorm(z + W_z h)        h of unit size; or W_z a, with --coords-from pull

or what a recipe makes of these parts (`layers/parts.py`).

`vanilla_model.py` is written in parallel: the same names in the same order, with dot-product
attention and without coordinates. Letters in shapes as in `gravity/law.py`.
"""

import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from gravity.newton import GravityAttention
from gravity.published import PublishedGravityAttention
from layers.config import NGTConfig as NGTConfig
from layers.head_loss import head_loss
from layers.parts import (
    FeedForward,
    check_context,
    embedding_skip,
    init_weights,
    inverse_rms,
    linear,
    norm,
    skip_weights,
    soft_cap,
)

MAX_POSITIONS = 64  # of a window whose particles repel each other


class Geometry(NamedTuple):
    """The particles: their masses, and where they are."""

    mass: torch.Tensor  # (B, T)
    z: torch.Tensor  # (B, T, coord_dim), after the last layer
    layers: tuple  # num_layers + 1 of (B, T, coord_dim): before the first layer and after each


class Layer(nn.Module):
    """One layer: attention, feed-forward, coordinate update."""

    def __init__(self, config, layer):
        super().__init__()
        attention = GravityAttention if config.law == "newton" else PublishedGravityAttention
        self.skip = skip_weights(config)
        self.norm1 = norm(config, config.hidden_dim)
        self.attn = attention(config, layer)
        self.norm2 = norm(config, config.hidden_dim)
        self.ffn = FeedForward(config)
        self.moved_by_state = config.coords_from == "state"
        self.coord_proj_next = linear(config, config.hidden_dim, config.coord_dim)
        self.coord_norm = norm(config, config.coord_dim)

    def forward(self, h, z, mass, positions, kv_cache, embedding, first_values, moves=True):
        """The new h (B, T, hidden_dim) and z (B, T, coord_dim), and this layer's values.

        `embedding` is h before the first layer, `first_values` the first layer's values; `moves`
        says whether somebody wants the new z; the other arguments are as for the attention.
        """
        h = embedding_skip(h, embedding, self.skip)
        a, v = self.attn(self.norm1(h), z, mass, positions, kv_cache, first_values=first_values)
        h = h + a
        h = h + self.ffn(self.norm2(h))
        if moves:
            z = self.coord_norm(z + self.motion(h, a))
        return h, z, v

    def leave_motion_unlearned(self):
        """Make no gradients for what moves the coordinates: in the last layer, whose z nothing but
        repulsion and a map reads."""
        for module in (self.coord_proj_next, self.coord_norm):
            module.requires_grad_(False)

    def motion(self, h, a):
        """What is added to a token's coordinates, (B, T, coord_dim), before they are normalised."""
        proj = self.coord_proj_next
        if not self.moved_by_state:
            return proj(a)
        # W (h / |h|) is (W h) / |h|: the numbers are divided where there are fewer of them
        motion = F.linear(h, proj.weight) * inverse_rms(h)
        return motion if proj.bias is None else motion + proj.bias


class NGT(nn.Module):
    """The language model: token ids (B, T) to logits (B, T, vocab_size)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        published = config.law == "published"
        self.token_emb = nn.Embedding(config.vocab_size, config.hidden_dim)
        self.mass_emb = nn.Embedding(config.vocab_size, 1)
        if published:
            self.coord_emb = nn.Embedding(config.block_size, config.coord_dim)
        else:
            self.coord_proj = linear(config, config.hidden_dim, config.coord_dim)
            self.coord_norm = norm(config, config.coord_dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(config, n) for n in range(config.num_layers))
        self.norm = norm(config, config.hidden_dim)
        self.head = nn.Linear(config.hidden_dim, config.vocab_size, bias=published)
        init_weights(self)
        nn.init.constant_(self.mass_emb.weight, math.log(math.expm1(1.0)))  # a mass of 1
        if published:
            nn.init.normal_(self.coord_emb.weight)
        else:
            self.coord_proj.reset_parameters()
        for layer in self.layers:
            layer.attn.reset_geometry()

    @property
    def max_context(self):
        """How many tokens fit into one context; None if there is no limit."""
        return self.config.block_size if self.config.law == "published" else None

    def mass(self, tokens):
        """Masses of token ids: softplus of a learned embedding, in the shape of `tokens`."""
        return F.softplus(self.mass_emb(tokens).squeeze(-1).float())

    @torch.no_grad()
    def largest_mass(self):
        """The largest mass of any token of the vocabulary, ()."""
        return F.softplus(self.mass_emb.weight.max().float())

    def forward(self, tokens, kv_cache=None, return_geometry=False, targets=None):
        """Logits of the next token after each, (B, T, vocab_size).

        Args:
            tokens: ids, (B, T).
            kv_cache: a `KVCache`; `tokens` then follow those that it has seen.
            return_geometry: return `(logits, Geometry)`.
            targets: ids, (B, T); their mean cross-entropy then stands in place of the logits.

        Raises:
            ValueError: if the published law is given more than `block_size` tokens.
        """
        start = 0 if kv_cache is None else kv_cache.length
        if kv_cache is not None and kv_cache.largest_mass is None:
            kv_cache.largest_mass = self.largest_mass()
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        check_context(self, start + tokens.shape[1])
        h = embedding = self.dropout(self.token_emb(tokens))  # (B, T, hidden_dim)
        mass = self.mass(tokens)  # (B, T)
        if self.config.law == "published":
            z = self.coord_emb(positions).expand(len(tokens), -1, -1)
        else:
            z = self.coord_norm(self.coord_proj(h))
        path = [z]  # each (B, T, coord_dim)
        first_values = None
        for layer in self.layers:
            moves = return_geometry or layer is not self.layers[-1]
            h, z, v = layer(h, z, mass, positions, kv_cache, embedding, first_values, moves)
            first_values = v if first_values is None else first_values
            path.append(z)
        if kv_cache is not None:
            kv_cache.length += tokens.shape[1]
        h, cap = self.norm(h), self.config.logit_softcap
        if targets is None:
            result = soft_cap(self.head(h), cap)  # (B, T, vocab_size)
        else:
            result = head_loss(h, self.head, cap, targets)
        return (result, Geometry(mass, z, tuple(path))) if return_geometry else result


def repulsion_loss(z, mass, max_positions=MAX_POSITIONS, generator=None):
    """A loss that pushes particles apart, so that coordinates do not collapse: a scalar in fp32.

    It is the mean of `m_i m_j / max(|z_i - z_j|^2, 1e-6)` over all pairs i < j of at most
    `max_positions` sampled tokens; 0 for fewer than two tokens.

    Args:
        z: (B, T, coord_dim).
        mass: (B, T).
        generator: a CPU `torch.Generator` for the sample; None takes the global one.
    """
    tokens = z.shape[1]
    if tokens > max_positions:
        sample = torch.randperm(tokens, generator=generator)[:max_positions].to(z.device)
        z, mass = z[:, sample], mass[:, sample]
    if tokens < 2:
        return z.sum() * 0.0  # 0 with a gradient
    z, mass = z.float(), mass.float()
    i, j = torch.triu_indices(z.shape[1], z.shape[1], offset=1, device=z.device)
    distance2 = (z[:, i] - z[:, j]).square().sum(-1)  # (B, pairs)
    return (mass[:, i] * mass[:, j] / distance2.clamp(min=1e-6)).mean()
