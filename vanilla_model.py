"""The baseline: a GPT-2 style transformer, written in parallel to `model.py`.

A token has a hidden state `h`. One layer computes

    a = Attention(LayerNorm(h))
    h = h + a
    h = h + FeedForward(LayerNorm(h))

Attention is PyTorch's scaled_dot_product_attention; positions are learned, rotary
(Su et al. 2021, arXiv:2104.09864) or ALiBi (Press et al. 2022, arXiv:2108.12409). Letters in shapes
as in `gravity/law.py`.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from gravity.heads import merge_heads, split_heads
from model import FeedForward, ModelConfig, check_context, init_weights
from system.errors import UsageError
from system.settings import setting

POSITIONS = ("learned", "rotary", "alibi")


@dataclass
class VanillaConfig(ModelConfig):
    """Everything that shapes a vanilla transformer."""

    pos: str = setting("learned", "position encoding of a vanilla model", choices=POSITIONS)
    head_bias: bool = False  # True only for checkpoints of the first release that have one

    def __post_init__(self):
        super().__post_init__()
        if self.pos == "rotary" and self.hidden_dim // self.num_heads % 2:
            raise UsageError(
                f"--pos rotary turns pairs of channels: --hidden-dim {self.hidden_dim} over "
                f"--num-heads {self.num_heads} leaves an odd number per head"
            )


def rotate(x, positions):
    """x (B, H, T, D) with its pairs of channels turned by angles that grow with the position."""
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = positions[:, None].float() * frequency  # (T, half)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
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
        self.q_proj = nn.Linear(config.hidden_dim, config.hidden_dim)
        self.k_proj = nn.Linear(config.hidden_dim, config.hidden_dim)
        self.v_proj = nn.Linear(config.hidden_dim, config.hidden_dim)
        self.out_proj = nn.Linear(config.hidden_dim, config.hidden_dim)
        self.dropout = nn.Dropout(config.dropout)
        if config.pos == "alibi":
            self.register_buffer("slopes", alibi_slopes(config.num_heads), persistent=False)

    def forward(self, h, positions, kv_cache=None):
        """What each token receives from itself and those before it, (B, T, hidden_dim).

        `h` is (B, T, hidden_dim) and normalised, `positions` (T,), increasing. What a `KVCache`
        remembers is attended to as well.
        """
        heads = self.config.num_heads
        q, k = split_heads(self.q_proj(h), heads), split_heads(self.k_proj(h), heads)
        v = split_heads(self.v_proj(h), heads)
        if self.config.pos == "rotary":
            q, k = rotate(q, positions), rotate(k, positions)
        key_positions = positions
        if kv_cache is not None:
            key_positions, k, v = kv_cache.append(self.layer, positions, k, v)
        mask = None
        if self.config.pos == "alibi":
            distance = positions[:, None] - key_positions[None, :]  # (Tq, Tk)
            mask = -self.slopes[:, None, None] * distance
            mask = mask.masked_fill(distance < 0, -math.inf).to(q.dtype)  # (H, Tq, Tk)
        elif k.shape[2] > q.shape[2] > 1:  # is_causal would match the first query to the first key
            mask = positions[:, None] >= key_positions[None, :]  # (Tq, Tk)
        causal = mask is None and q.shape[2] > 1
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.dropout(self.out_proj(merge_heads(a)))


class Layer(nn.Module):
    """One layer: attention and feed-forward."""

    def __init__(self, config, layer):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_dim)
        self.attn = Attention(config, layer)
        self.norm2 = nn.LayerNorm(config.hidden_dim)
        self.ffn = FeedForward(config)

    def forward(self, h, positions, kv_cache=None):
        """The new h, (B, T, hidden_dim); arguments as for the attention."""
        a = self.attn(self.norm1(h), positions, kv_cache)
        h = h + a
        return h + self.ffn(self.norm2(h))


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
        self.norm = nn.LayerNorm(config.hidden_dim)
        self.head = nn.Linear(config.hidden_dim, config.vocab_size, bias=config.head_bias)
        init_weights(self)

    @property
    def max_context(self):
        """How many tokens fit into one context: nothing was learned past the training length."""
        return self.config.block_size

    def forward(self, tokens, kv_cache=None):
        """Logits of the next token after each, (B, T, vocab_size).

        Args:
            tokens: ids, (B, T).
            kv_cache: a `KVCache`; `tokens` then follow those that it has seen.

        Raises:
            ValueError: if learned positions are given more than `block_size` tokens.
        """
        start = 0 if kv_cache is None else kv_cache.length
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        h = self.token_emb(tokens)  # (B, T, hidden_dim)
        if self.config.pos == "learned":
            check_context(self, start + tokens.shape[1])
            h = h + self.pos_emb(positions)
        h = self.dropout(h)
        for layer in self.layers:
            h = layer(h, positions, kv_cache)
        if kv_cache is not None:
            kv_cache.length += tokens.shape[1]
        return self.head(self.norm(h))  # (B, T, vocab_size)
