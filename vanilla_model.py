"""The baseline: a GPT-2 style transformer, written in parallel to `model.py`.

A token has a hidden state `h`. One layer computes

    a = Attention(LayerNorm(h))
    h = h + a
    h = h + FeedForward(LayerNorm(h))

or what a recipe makes of these parts (`layers/parts.py`). Attention is PyTorch's
scaled_dot_product_attention; positions are learned, rotary (Su et al. 2021, arXiv:2104.09864) or
ALiBi (Press et al. 2022, arXiv:2108.12409). Letters in shapes as in `gravity/law.py`.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from gravity.heads import merge_heads, split_heads
from gravity.retardation import mix_with_token_before
from layers.config import VanillaConfig as VanillaConfig
from layers.head_loss import head_loss
from layers.parts import (
    FeedForward,
    RMSNorm,
    check_context,
    embedding_skip,
    init_weights,
    linear,
    norm,
    skip_weights,
    soft_cap,
    value_residual,
    value_share,
)
from layers.sink import attention_with_sink


def rotation(positions, width):
    """Cosine and sine of the angles by which `rotate` turns a head of so many channels, both
    (T, width / 2): one angle per pair of channels, which grows with the position."""
    half = width // 2
    pairs = torch.arange(half, device=positions.device, dtype=torch.float32)
    frequency = 10000.0 ** (-pairs / half)
    angle = positions[:, None].float() * frequency
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """x (B, H, T, D) with its pairs of channels turned by the angles of `rotation`."""
    half = x.shape[-1] // 2
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def alibi_slopes(num_heads):
    """ALiBi's slopes, (H,): 2^(-8/H), 2^(-16/H), ... if H is a power of two.

    Otherwise those of the next smaller power of two, then every other one of twice as many heads,
    as in the authors' code.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (n + 1) / power) for n in range(power)]
    slopes += [2 ** (-4 * (2 * n + 1) / power) for n in range(num_heads - power)]
    return torch.tensor(slopes)


class Attention(nn.Module):
    """Causal scaled dot-product attention, over the hidden state alone."""

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        self.q_proj = linear(config, config.hidden_dim, config.hidden_dim)
        self.k_proj = linear(config, config.hidden_dim, config.hidden_dim)
        self.v_proj = linear(config, config.hidden_dim, config.hidden_dim)
        self.out_proj = linear(config, config.hidden_dim, config.hidden_dim)
        self.value_share = value_share(config, layer)
        self.dropout = nn.Dropout(config.dropout)
        width = config.hidden_dim // config.num_heads
        if config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(width) for _ in "qk")
        if config.smear != "none":
            # as NGT's retardation: from 0 for a layer's first head to 1 for its last
            steps = torch.arange(config.num_heads) / max(config.num_heads - 1, 1)
            self.key_smear = nn.Parameter(steps.repeat_interleave(width))
        if config.smear == "keys-values":
            self.value_smear = nn.Parameter(torch.zeros(config.hidden_dim))
        self.sink = nn.Parameter(torch.zeros(config.num_heads)) if config.sink else None
        if config.pos == "alibi":
            self.register_buffer("slopes", alibi_slopes(config.num_heads), persistent=False)

    def points(self, h, kv_cache=None, angles=None):
        """Queries and keys as their dot products are taken, both (B, H, T, D)."""
        q, k = self.q_proj(h), self.k_proj(h)
        if self.config.smear != "none":
            # smeared keys: Olsson et al. 2022, arXiv:2209.11895; KV shift: arXiv:2411.19574
            k = mix_with_token_before(k, self.key_smear, kv_cache, self.layer)
        q, k = (split_heads(x, self.config.num_heads) for x in (q, k))
        if self.config.qk_norm:  # Henry et al. 2020, arXiv:2010.04245
            q, k = self.q_norm(q), self.k_norm(k)
        if self.config.pos == "rotary":
            q, k = rotate(q, *angles), rotate(k, *angles)
        return q, k

    def attend(self, q, k, v, positions, key_positions):
        """What each head receives for its queries, (B, H, Tq, D).

        q is (B, H, Tq, D), k and v (B, H, Tk, D), their positions (Tq,) and (Tk,); a single query
        comes before none of its keys.
        """
        mask = None
        if self.config.pos == "alibi":
            distance = positions[:, None] - key_positions[None, :]  # (Tq, Tk)
            mask = -self.slopes[:, None, None] * distance
            mask = mask.masked_fill(distance < 0, -math.inf).to(q.dtype)  # (H, Tq, Tk)
        elif k.shape[2] > q.shape[2] > 1:  # is_causal would match the first query to the first key
            mask = positions[:, None] >= key_positions[None, :]  # (Tq, Tk)
        causal = mask is None and q.shape[2] > 1
        if self.sink is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return attention_with_sink(q, k, v, self.sink, mask, causal)

    def forward(self, h, positions, kv_cache=None, first_values=None, angles=None):
        """What each token receives from itself and those before it, and what it passes on, its
        value: both (B, T, hidden_dim).

        `h` is (B, T, hidden_dim) and normalised, `positions` (T,), increasing, `first_values` the
        values of layer 1, `angles` what `rotation` gives for the positions if they are rotary. What
        a `KVCache` remembers is attended to as well.
        """
        q, k = self.points(h, kv_cache, angles)
        values = self.v_proj(h)
        if self.config.smear == "keys-values":
            values = mix_with_token_before(
                values, self.value_smear, kv_cache, (self.layer, "values")
            )
        values = value_residual(values, first_values, self.value_share)
        v = split_heads(values, self.config.num_heads)
        key_positions = positions
        if kv_cache is not None:
            key_positions, k, v = kv_cache.append(self.layer, positions, k, v)
        a = self.attend(q, k, v, positions, key_positions)
        return self.dropout(self.out_proj(merge_heads(a))), values


class Layer(nn.Module):
    """One layer: attention and feed-forward."""

    def __init__(self, config, layer):
        super().__init__()
        self.skip = skip_weights(config)
        self.norm1 = norm(config, config.hidden_dim)
        self.attn = Attention(config, layer)
        self.norm2 = norm(config, config.hidden_dim)
        self.ffn = FeedForward(config)

    def forward(self, h, positions, kv_cache, embedding, first_values, angles):
        """The new h, (B, T, hidden_dim), and this layer's values.

        `embedding` is h before the first layer, `first_values` the first layer's values; the other
        arguments are as for the attention.
        """
        h = embedding_skip(h, embedding, self.skip)
        a, v = self.attn(self.norm1(h), positions, kv_cache, first_values, angles)
        h = h + a
        h = h + self.ffn(self.norm2(h))
        return h, v


class Vanilla(nn.Module):
    """The language model: token ids (B, T) to logits (B, T, vocab_size)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.token_emb = nn.Embedding(config.vocab_size, config.hidden_dim)
        if config.pos == "learned":
            self.pos_emb = nn.Embedding(config.block_size, config.hidden_dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(config, n) for n in range(config.num_layers))
        self.norm = norm(config, config.hidden_dim)
        self.head = nn.Linear(config.hidden_dim, config.vocab_size, bias=config.head_bias)
        init_weights(self)

    @property
    def max_context(self):
        """How many tokens fit into one context: nothing was learned past the training length."""
        return self.config.block_size

    def forward(self, tokens, kv_cache=None, targets=None):
        """Logits of the next token after each, (B, T, vocab_size).

        Args:
            tokens: ids, (B, T).
            kv_cache: a `KVCache`; `tokens` then follow those that it has seen.
            targets: ids, (B, T); their mean cross-entropy then stands in place of the logits.

        Raises:
            ValueError: if learned positions are given more than `block_size` tokens.
        """
        start = 0 if kv_cache is None else kv_cache.length
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        h = self.token_emb(tokens)  # (B, T, hidden_dim)
        if self.config.pos == "learned":
            check_context(self, start + tokens.shape[1])
            h = h + self.pos_emb(positions)
        h = embedding = self.dropout(h)
        angles, first_values = None, None
        if self.config.pos == "rotary":  # the same for all layers
            angles = rotation(positions, self.config.hidden_dim // self.config.num_heads)
        for layer in self.layers:
            h, v = layer(h, positions, kv_cache, embedding, first_values, angles)
            first_values = v if first_values is None else first_values
        if kv_cache is not None:
            kv_cache.length += tokens.shape[1]
        h, cap = self.norm(h), self.config.logit_softcap
        if targets is not None:
            return head_loss(h, self.head, cap, targets)
        return soft_cap(self.head(h), cap)  # (B, T, vocab_size)
