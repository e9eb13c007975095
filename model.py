"""Newton Gravity Transformer: tokens are particles, attention is gravity.

A token has a hidden state `h`, coordinates `z` and a positive mass `m`. One layer computes

    a = GravityAttention(LayerNorm(h), z, m)
    h = h + a
    h = h + FeedForward(LayerNorm(h))
    z = LayerNorm(z + W_z a)

`vanilla_model.py` is written in parallel: the same names in the same order, with dot-product
attention and without coordinates. Letters in shapes as in `gravity/law.py`.
"""

import math
from dataclasses import MISSING, dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from gravity.attention import gravity_attention
from gravity.heads import merge_heads, softplus_inverse, split_heads
from gravity.law import reach
from gravity.published import PublishedGravityAttention
from system.cli import positive, share, whole
from system.errors import UsageError
from system.settings import check_settings, setting

LAWS = ("newton", "published")
PUBLISHED_RADIUS = math.log1p(math.exp(4.0))  # softplus(4), where the first release starts
NEWTON_RADIUS = 16.0
LARGEST_EXPONENT = 1024  # the field is then practically a Gaussian
NEAREST_TIME_SCALE = 0.35  # softenings per token, of each layer's first head at the start


@dataclass
class ModelConfig:
    """The settings of both kinds of model; those made by `setting` are flags, except vocab_size."""

    vocab_size: int = setting(MISSING, "tokens of the vocabulary, set by the tokenizer", whole)
    block_size: int = setting(64, "tokens of a training window", whole)
    hidden_dim: int = setting(128, "channels of the hidden state", whole)
    num_layers: int = setting(4, "layers", whole)
    num_heads: int = setting(4, "attention heads per layer", whole)
    mlp_dim: int = setting(
        512,
        "width of the feed-forward layer (default: the preset's, which gives compared models equal "
        "parameters; if sizes are given, 4 x hidden-dim for newton, and for the others the width "
        "that gives them as many parameters)",
        whole,
    )
    dropout: float = setting(
        0.0, "dropout on embeddings and on the outputs of attention and feed-forward", share
    )
    tie_head: bool = True  # the output layer shares its matrix with the token embedding

    def __post_init__(self):
        check_settings(self)
        if self.hidden_dim % self.num_heads:
            raise UsageError(
                f"--hidden-dim {self.hidden_dim} is not divisible by --num-heads "
                f"{self.num_heads}: every head takes an equal share of the channels"
            )


@dataclass
class NGTConfig(ModelConfig):
    """Everything that shapes an NGT."""

    coord_dim: int = setting(64, "dimensions of the space that tokens live in (NGT)", whole)
    head_coord_dim: int = setting(16, "dimensions of that space that one head sees (NGT)", whole)
    law: str = setting("newton", "newton, or the published law of the first release", choices=LAWS)
    exponent: int = setting(4, "exponent of the field mass / (1 + r2)^exponent (newton)", whole)
    radius: float | None = setting(
        None,
        "radius of the cutoff, in softenings; fixed under the hard cutoff of newton, otherwise "
        "learned, starting there (default: newton 16, published 4.02)",
        positive,
    )
    use_radius_cutoff: bool = setting(
        True,
        "no pull from beyond the radius; --no-radius-cutoff: no limit",
        flag="--radius-cutoff",
    )
    use_soft_cutoff: bool = setting(
        False, "fade out towards a learned radius instead of a hard edge"
    )
    use_rsqrt: bool = setting(False, "compute 1/r2 by a reciprocal root (published law only)")
    mass_in_value: bool = setting(False, "multiply values by the mass, not the pull")
    retardation: bool = setting(
        True,
        "let a token pull, by a learned share, from the place of the token before it (newton; "
        "without it the loss is 0.09 higher after 1500 steps: reports/study.md)",
    )
    background: bool = setting(
        False,
        "add a learned number per head to the sum of fields, so that what a token receives fades "
        "with the field (newton)",
    )
    background_start: float = setting(
        0.0015, "where that number starts (newton with a background)", positive
    )
    farthest_time_scale: float = setting(
        0.0035,
        "initial softenings per token of the head that looks farthest back (newton)",
        positive,
    )
    field_tolerance: float | None = setting(
        None,
        "leave out older tokens that together provably weigh less than this share "
        "(default: 1e-6, under bf16 and fp16 1e-4; 0: leave out nothing)",
        share,
    )

    def __post_init__(self):
        if self.radius is None:
            self.radius = NEWTON_RADIUS if self.law == "newton" else PUBLISHED_RADIUS
        super().__post_init__()
        if self.exponent > LARGEST_EXPONENT:
            raise UsageError(f"--exponent is {self.exponent}: give at most {LARGEST_EXPONENT}")
        if self.use_soft_cutoff and not self.use_radius_cutoff:
            raise UsageError(
                "--no-radius-cutoff and --use-soft-cutoff exclude each other: drop one of them"
            )

    @property
    def cutoff(self):
        """The argument of the operator: one of `gravity.law.CUTOFFS`."""
        if not self.use_radius_cutoff:
            return "none"
        return "soft" if self.use_soft_cutoff else "hard"


class Geometry(NamedTuple):
    """The particles: their masses, and where they are."""

    mass: torch.Tensor  # (B, T)
    z: torch.Tensor  # (B, T, coord_dim), after the last layer
    layers: tuple  # num_layers + 1 of (B, T, coord_dim): before the first layer and after each


class FeedForward(nn.Module):
    """Two linear maps with a GELU between them, (B, T, hidden_dim) to the same shape."""

    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_dim, config.mlp_dim)
        self.down_proj = nn.Linear(config.mlp_dim, config.hidden_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, h):
        return self.dropout(self.down_proj(F.gelu(self.up_proj(h))))


class GravityAttention(nn.Module):
    """Attention under `--law newton`: the pull of earlier tokens, by `gravity/law.py`.

    A head looks from `q = P z`, tokens pull from `k = S z`; time is one more dimension of space.
    With retardation, k is partly that of the token before (`retarded`), so that one layer can find
    what once followed a token like this one.
    """

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        heads, points = config.num_heads, config.num_heads * config.head_coord_dim
        self.probe_proj = nn.Linear(config.coord_dim, points)
        self.source_proj = nn.Linear(config.coord_dim, points)
        self.retardation = nn.Parameter(torch.empty(points)) if config.retardation else None
        self.v_proj = nn.Linear(config.hidden_dim, config.hidden_dim)
        self.out_proj = nn.Linear(config.hidden_dim, config.hidden_dim)
        self.dropout = nn.Dropout(config.dropout)
        self.time_scale_raw = nn.Parameter(torch.empty(heads))
        self.time_offset = nn.Parameter(torch.empty(heads))
        radius = softplus_inverse(torch.full((heads,), config.radius))
        if config.cutoff == "soft":
            self.radius_raw = nn.Parameter(radius)
        else:
            self.register_buffer("radius_raw", radius, persistent=False)
        self.background_raw = nn.Parameter(torch.empty(heads)) if config.background else None

    @torch.no_grad()
    def reset_geometry(self):
        """Start with distances of about 1 softening, and heads that look 3 to 300 tokens back."""
        # PyTorch's start gives |q - k|^2 of about 2/3 per coordinate; 8 makes it 1.3 for 16 of them
        for proj in (self.probe_proj, self.source_proj):
            proj.reset_parameters()
            proj.weight /= math.sqrt(8)
            proj.bias /= math.sqrt(8)
        heads = self.config.num_heads
        # from 0 for a layer's nearest head to 1 for its farthest
        steps = torch.arange(heads, dtype=torch.float64) / max(heads - 1, 1)
        far = self.config.farthest_time_scale
        nearest = max(NEAREST_TIME_SCALE, far)
        self.time_scale_raw.copy_(softplus_inverse(nearest * (far / nearest) ** steps))
        self.time_offset.copy_(steps)
        if self.background_raw is not None:
            self.background_raw.fill_(softplus_inverse(self.config.background_start))
        if self.retardation is not None:
            self.retardation.copy_(steps.repeat_interleave(self.config.head_coord_dim))

    @property
    def time_scale(self):
        """Softening units per token, (H,)."""
        return F.softplus(self.time_scale_raw.float())

    @property
    def radius(self):
        """Softening units, (H,); None without a cutoff."""
        return None if self.config.cutoff == "none" else F.softplus(self.radius_raw.float())

    @property
    def background(self):
        """What is added to each head's sum of fields, (H,); None for none."""
        return None if self.background_raw is None else F.softplus(self.background_raw.float())

    @property
    def window(self):
        """How many tokens back each head feels anything, (H,); inf without a cutoff."""
        if self.radius is None:
            return torch.full_like(self.time_offset, math.inf)
        return reach(self.time_scale, self.time_offset, self.radius).clamp(min=1)

    def points(self, z, kv_cache=None):
        """Where tokens look from, and where they pull from, both (B, H, T, head_coord_dim)."""
        source = self.retarded(self.source_proj(z), kv_cache)
        return tuple(split_heads(x, self.config.num_heads) for x in (self.probe_proj(z), source))

    def retarded(self, source, kv_cache=None):
        """Where tokens pull from, (B, T, H*C): their own place mixed with that of the token before,
        in the learned shares `1 - retardation` and `retardation`.

        Args:
            source: each token's own place, (B, T, H*C); a text's first token always keeps it.
            kv_cache: remembers the token before the first one of the next call.
        """
        if self.retardation is None:
            return source
        first = source[:, :1] if kv_cache is None else kv_cache.exchange(self.layer, source)
        before = torch.cat([first, source[:, :-1]], 1)
        return torch.lerp(source, before, self.retardation.to(source.dtype))

    def law(self):
        """The keyword arguments of `gravity_field` for this layer."""
        return dict(
            time_scale=self.time_scale,
            time_offset=self.time_offset,
            exponent=self.config.exponent,
            radius=self.radius,
            cutoff=self.config.cutoff,
            background=self.background,
            mass_in_value=self.config.mass_in_value,
        )

    def learned(self):
        """What the heads learned, by name: (H,), retardation (H * head_coord_dim,).

        A radius or retardation that the model does not have is None.
        """
        names = ("time_scale", "time_offset", "retardation", "radius", "window")
        return {name: getattr(self, name) for name in names}

    def forward(self, h, z, mass, positions, kv_cache=None):
        """What each token receives from itself and those before it, (B, T, hidden_dim).

        `h` is (B, T, hidden_dim) and normalised, `z` (B, T, coord_dim), `mass` (B, T), `positions`
        (T,), increasing. What a `KVCache` remembers pulls too.
        """
        q, k = self.points(z, kv_cache)
        v = split_heads(self.v_proj(h), self.config.num_heads)
        tolerance = self.config.field_tolerance
        if tolerance is None:  # 16-bit values lose more than 1e-4 by their rounding
            tolerance = 1e-4 if v.dtype in (torch.bfloat16, torch.float16) else 1e-6
        key_positions = positions
        if kv_cache is not None:
            key_positions, k, v, mass = kv_cache.append(self.layer, positions, k, v, mass)
        law = self.law() | {"query_positions": positions, "key_positions": key_positions}
        a = gravity_attention(q, k, v, mass, field_tolerance=tolerance, **law)
        if kv_cache is not None:
            kv_cache.forget_beyond(self.layer, lambda: self.window)
        return self.dropout(self.out_proj(merge_heads(a)))


class Layer(nn.Module):
    """One layer: attention, feed-forward, coordinate update."""

    def __init__(self, config, layer):
        super().__init__()
        attention = GravityAttention if config.law == "newton" else PublishedGravityAttention
        self.norm1 = nn.LayerNorm(config.hidden_dim)
        self.attn = attention(config, layer)
        self.norm2 = nn.LayerNorm(config.hidden_dim)
        self.ffn = FeedForward(config)
        self.coord_proj_next = nn.Linear(config.hidden_dim, config.coord_dim)
        self.coord_norm = nn.LayerNorm(config.coord_dim)

    def forward(self, h, z, mass, positions, kv_cache=None):
        """The new h (B, T, hidden_dim) and z (B, T, coord_dim); arguments as for the attention."""
        a = self.attn(self.norm1(h), z, mass, positions, kv_cache)
        h = h + a
        h = h + self.ffn(self.norm2(h))
        z = self.coord_norm(z + self.coord_proj_next(a))
        return h, z


@torch.no_grad()
def init_weights(model):
    """Start as GPT-2: normal(0, 0.02), divided by sqrt(2 layers) for what is added to `h`."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            std = 0.02
            if name.endswith(("out_proj", "down_proj")):
                std /= math.sqrt(2 * model.config.num_layers)
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    if model.config.tie_head:
        model.head.weight = model.token_emb.weight


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
            self.coord_proj = nn.Linear(config.hidden_dim, config.coord_dim)
            self.coord_norm = nn.LayerNorm(config.coord_dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(config, n) for n in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_dim)
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

    def forward(self, tokens, kv_cache=None, return_geometry=False):
        """Logits of the next token after each, (B, T, vocab_size).

        Args:
            tokens: ids, (B, T).
            kv_cache: a `KVCache`; `tokens` then follow those that it has seen.
            return_geometry: return `(logits, Geometry)`.

        Raises:
            ValueError: if the published law is given more than `block_size` tokens.
        """
        start = 0 if kv_cache is None else kv_cache.length
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        check_context(self, start + tokens.shape[1])
        h = self.dropout(self.token_emb(tokens))  # (B, T, hidden_dim)
        mass = self.mass(tokens)  # (B, T)
        if self.config.law == "published":
            z = self.coord_emb(positions).expand(len(tokens), -1, -1)
        else:
            z = self.coord_norm(self.coord_proj(h))
        path = [z]  # each (B, T, coord_dim)
        for layer in self.layers:
            h, z = layer(h, z, mass, positions, kv_cache)
            path.append(z)
        if kv_cache is not None:
            kv_cache.length += tokens.shape[1]
        logits = self.head(self.norm(h))  # (B, T, vocab_size)
        return (logits, Geometry(mass, z, tuple(path))) if return_geometry else logits


def check_context(model, length):
    """Raise `ValueError` if a model has fewer positions than `length` tokens need."""
    if model.max_context is not None and length > model.max_context:
        raise ValueError(f"{length} tokens do not fit block_size {model.max_context} of this model")


def repulsion_loss(z, mass, max_positions=64, generator=None):
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
