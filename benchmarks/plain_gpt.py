"""A plain GPT-2 and its training as nanoGPT describes it: what people would pick instead.

`benchmark.py train --against eager` or `compiled` times it. Written from GPT-2's paper (Radford et
al. 2019, https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf)
and nanoGPT's README (Karpathy 2022, https://github.com/karpathy/nanoGPT), without their code.
"""

import contextlib
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


class Layer(nn.Module):
    """Attention and feed-forward, each after a LayerNorm; h is (B, T, hidden_dim)."""

    def __init__(self, config, bias):
        super().__init__()
        self.num_heads, width = config.num_heads, config.hidden_dim
        self.norm1 = nn.LayerNorm(width, bias=bias)
        self.qkv = nn.Linear(width, 3 * width, bias)  # one product for queries, keys and values
        self.out = nn.Linear(width, width, bias)
        self.norm2 = nn.LayerNorm(width, bias=bias)
        self.up = nn.Linear(width, config.mlp_dim, bias)
        self.down = nn.Linear(config.mlp_dim, width, bias)

    def forward(self, h):
        q, k, v = self.qkv(self.norm1(h)).chunk(3, -1)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        h = h + self.out(a.transpose(1, 2).flatten(-2))
        return h + self.down(F.gelu(self.up(self.norm2(h))))


class PlainGPT(nn.Module):
    """GPT-2 with learned positions and a tied head.

    Args:
        config: `vocab_size`, `block_size`, `hidden_dim`, `mlp_dim`, `num_layers`, `num_heads`.
        bias: biases in linear maps and LayerNorms; nanoGPT trains without.
    """

    def __init__(self, config, bias=False):
        super().__init__()
        self.config = config
        self.token_emb = nn.Embedding(config.vocab_size, config.hidden_dim)
        self.pos_emb = nn.Embedding(config.block_size, config.hidden_dim)
        self.layers = nn.ModuleList(Layer(config, bias) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_dim, bias=bias)
        self.head = nn.Linear(config.hidden_dim, config.vocab_size, bias=False)
        self.head.weight = self.token_emb.weight
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens, targets=None):
        """Logits (B, T, vocab_size), or the mean cross-entropy if there are targets (B, T)."""
        h = self.token_emb(tokens) + self.pos_emb.weight[: tokens.shape[1]]
        for layer in self.layers:
            h = layer(h)
        logits = self.head(self.norm(h))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class PlainTraining:
    """A training of `PlainGPT` with the parts of `Trainer` that are timed.

    Args:
        config: the settings of a run, a dict, with `vocab_size`.
        tokens: ids, a NumPy array.
        dtype: bf16 for autocast, or fp32.
        compiled: use torch.compile, the loss included.
    """

    def __init__(self, config, tokens, device, dtype, compiled):
        self.config, self.tokens, self.device = config, tokens, device
        self.raw_model = PlainGPT(SimpleNamespace(**config)).to(device)
        self.model = torch.compile(self.raw_model) if compiled else self.raw_model
        parameters = list(self.raw_model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        is_cuda = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, 1e-3, (0.9, 0.99), fused=is_cuda or None)
        self.autocast = contextlib.nullcontext()
        if dtype == torch.bfloat16:
            self.autocast = torch.autocast(device.type, dtype)
        self.generator = np.random.default_rng(0)

    @property
    def tokens_per_step(self):
        return self.config["batch_size"] * self.config["block_size"]

    def step(self):
        """Fetch a batch, forward, backward, clip, AdamW."""
        inputs, targets = self._batch()
        with self.autocast:
            loss = self.model(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.raw_model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _batch(self):
        """Random windows and what follows each token, both (batch_size, block_size)."""
        length = self.config["block_size"]
        starts = self.generator.integers(0, len(self.tokens) - length, self.config["batch_size"])
        windows = np.stack([self.tokens[n : n + length + 1] for n in starts]).astype(np.int64)
        windows = torch.from_numpy(windows)
        if self.device.type == "cuda":
            windows = windows.pin_memory().to(self.device, non_blocking=True)
        return windows[:, :-1], windows[:, 1:]
