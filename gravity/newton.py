"""The attention layer of `--law newton`: what each head learns, and how a layer feels the law.

Letters in shapes as in `law.py`.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from gravity.attention import gravity_attention
from gravity.heads import merge_heads, softplus_inverse, split_heads
from gravity.law import Law, reach, windows
from gravity.retardation import mix_with_token_before
from layers.parts import linear, value_residual, value_share

NEAREST_TIME_SCALE = 0.35  # softenings per token, of each layer's first head at the start


def field_tolerance(config, dtype):
    """The share of the fields that a model whose values are of this dtype may leave out."""
    if config.field_tolerance is not None:
        return config.field_tolerance
    # 16-bit values lose more than 1e-4 by their rounding; with a background 1e-4 lets heads read
    # about half as many tokens as 1e-6, so that no radius is needed for speed
    return 1e-4 if config.background or dtype in (torch.bfloat16, torch.float16) else 1e-6


class GravityAttention(nn.Module):
    """Attention under `--law newton`: the pull of earlier tokens, by `gravity/law.py`.

    A head looks from `q = P z`, tokens pull from `k = S z`; time is one more dimension of space.
    With retardation, k is partly that of the token before (`retarded`), so that one layer can find
    what once followed a token like this one; with retarded values a token also passes on a share of
    what the one before it does.
    """

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        heads, points = config.num_heads, config.num_heads * config.head_coord_dim
        self.probe_proj = linear(config, config.coord_dim, points)
        self.source_proj = linear(config, config.coord_dim, points)
        self.retardation = nn.Parameter(torch.empty(points)) if config.retardation else None
        self.v_proj = linear(config, config.hidden_dim, config.hidden_dim)
        self.out_proj = linear(config, config.hidden_dim, config.hidden_dim)
        if config.retarded_values:
            self.value_retardation = nn.Parameter(torch.zeros(config.hidden_dim))
        self.value_share = value_share(config, layer)
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
            if proj.bias is not None:
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
        scale = F.softplus(self.time_scale_raw.float())
        if self.config.fixed_farthest:
            scale = torch.cat([scale[:-1], scale[-1:].detach()])
        return scale

    @property
    def radius(self):
        """Softening units, (H,); None without a cutoff."""
        return None if self.config.cutoff == "none" else F.softplus(self.radius_raw.float())

    @property
    def background(self):
        """What is added to each head's sum of fields, (H,); None for none."""
        return None if self.background_raw is None else F.softplus(self.background_raw.float())

    def window(self, largest_mass, dtype=torch.float32):
        """How many tokens back each head must look, (H,); inf if it must look at all.

        What is older is beyond the radius, or with a background provably weighs, all together, at
        most half of the tolerance times the background, for every query now and later. The other
        half is left to the operator, which may leave out what is not forgotten.

        Args:
            largest_mass: that of any token of the vocabulary, ().
            dtype: of the values; the tolerance depends on it.
        """
        scale, offset = self.time_scale, self.time_offset
        found = torch.full_like(offset, math.inf)
        if self.radius is not None:
            found = reach(scale, offset, self.radius)
        if self.background is not None:
            half = field_tolerance(self.config, dtype) / 2
            law = Law(
                *(scale, offset, None, self.background, self.config.exponent, "none", half),
                query_positions=None,
                key_positions=None,
            )
            proven = windows(law, 1.0 if self.config.mass_in_value else largest_mass)
            found = torch.minimum(found, proven.to(found))
        return found.clamp(min=1)

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
        return mix_with_token_before(source, self.retardation, kv_cache, self.layer)

    def law(self):
        """The keyword arguments of `gravity_attention` for this layer."""
        return self.field_law() | {"background": self.background}

    @torch.no_grad()
    def fixed_law(self):
        """The same while nothing is learned."""
        return self.law()

    def field_law(self):
        """The keyword arguments of `gravity_field` for this layer."""
        return dict(
            time_scale=self.time_scale,
            time_offset=self.time_offset,
            exponent=self.config.exponent,
            radius=self.radius,
            cutoff=self.config.cutoff,
            mass_in_value=self.config.mass_in_value,
        )

    def learned(self, largest_mass):
        """What the heads learned, by name: (H,), retardation (H * head_coord_dim,).

        A radius, retardation or background that the model does not have is None; `largest_mass`
        is as for `window`.
        """
        names = ("time_scale", "time_offset", "retardation", "radius", "background")
        return {name: getattr(self, name) for name in names} | {"window": self.window(largest_mass)}

    def forward(self, h, z, mass, positions, kv_cache=None, first_values=None):
        """What each token receives from itself and those before it, and what it passes on, its
        value: both (B, T, hidden_dim).

        `h` is (B, T, hidden_dim) and normalised, `z` (B, T, coord_dim), `mass` (B, T), `positions`
        (T,), increasing, `first_values` the values of layer 1. What a `KVCache` remembers pulls
        too.
        """
        q, k = self.points(z, kv_cache)
        values = self.v_proj(h)
        if self.config.retarded_values:
            values = mix_with_token_before(
                values, self.value_retardation, kv_cache, (self.layer, "values")
            )
        values = value_residual(values, first_values, self.value_share)
        v = split_heads(values, self.config.num_heads)
        tolerance = field_tolerance(self.config, v.dtype)
        key_positions = positions
        if kv_cache is not None:
            key_positions, k, v, mass = kv_cache.append(self.layer, positions, k, v, mass)
            if self.background_raw is not None:
                tolerance /= 2  # the other half is for what the cache forgets
        law = self.law() if kv_cache is None else kv_cache.once((self.layer, "law"), self.fixed_law)
        law = law | {"query_positions": positions, "key_positions": key_positions}
        a = gravity_attention(q, k, v, mass, field_tolerance=tolerance, **law)
        if kv_cache is not None:
            kv_cache.forget_beyond(self.layer, lambda: self.window(kv_cache.largest_mass, v.dtype))
        return self.dropout(self.out_proj(merge_heads(a))), values
