"""The law of NGT's first release: its operator, computed in tiles, and its attention layer.

Letters in shapes as in `law.py`.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from gravity.heads import merge_heads, softplus_inverse, split_heads
from gravity.law import positions_or_range
from layers.parts import linear, value_residual, value_share

TILE_PAIRS = 1 << 18  # pairs per tile: few enough that its tensors stay in the cache


def published_gravity_attention(
    q,
    k,
    v,
    query_mass,
    key_mass,
    *,
    gamma,
    bias,
    radius=None,
    cutoff="none",
    mass_in_value=False,
    use_rsqrt=False,
    dropout=0.0,
    query_positions=None,
    key_positions=None,
):
    """Attention by the law of NGT's first release: a softmax over repelling scores.

        r2_ij    = |q_i - k_j|^2
        score_ij = (bias - gamma / (r2_ij + 1e-6)) * mass_i * mass_j
        out_i    = sum_j softmax_j(score_ij) v_j                  over t_j <= t_i

    The soft cutoff multiplies the score by relu(1 - r2 / radius^2), the hard one leaves out what is
    beyond the radius.

    Args:
        q, k: the same point of each token, (B, H, Tq, C) and (B, H, Tk, C).
        v: (B, H, Tk, D).
        query_mass, key_mass: (B, Tq), (B, Tk).
        gamma, bias: (H,).
        radius: one number for all heads; not read without a cutoff.
        cutoff: "none", "hard" or "soft".
        mass_in_value: multiply values by the mass, not scores.
        use_rsqrt: compute 1/r2 as the square of a reciprocal root.
        dropout: probability of dropping a weight.
        query_positions, key_positions: (Tq,), (Tk,) integers that increase; from 0 if None.

    Returns:
        (B, H, Tq, D) in the dtype of `v`.

    Source: Taegyu Lee, Newton Gravity Transformer, first public release (MIT).
    """
    t_query = positions_or_range(query_positions, q)
    t_key = positions_or_range(key_positions, k)
    seed = int(torch.randint(2**62, ())) if dropout else 0
    if radius is None:
        radius = torch.ones((), device=q.device)
    settings = (cutoff, mass_in_value, use_rsqrt, dropout, seed, t_query, t_key)
    with torch.autocast(q.device.type, enabled=False):
        return _PublishedRows.apply(
            settings, q, k, v, query_mass, key_mass, gamma, bias, torch.as_tensor(radius)
        )


def _tiles(settings, q, k):
    """Yield `(batch, rows, number of keys)` per tile: all heads, some queries, all their keys."""
    t_query, t_key = settings[-2:]
    batch, heads, queries, _ = q.shape
    rows = max(16, min(128, TILE_PAIRS // max(1, heads * k.shape[2])))
    for b in range(batch):
        for start in range(0, queries, rows):
            row = slice(start, min(start + rows, queries))
            yield slice(b, b + 1), row, int(torch.searchsorted(t_key, t_query[row][-1], right=True))


def _tile_output(settings, number, q, k, v, query_mass, key_mass, gamma, bias, radius):
    """The output of one tile, (1, H, rows, D), in plain PyTorch.

    Args:
        number: the tile's number: with the seed it repeats the same dropout in the backward pass.
        q, k, v, query_mass, key_mass: those of the tile; `settings` has its positions.
    """
    cutoff, mass_in_value, use_rsqrt, dropout, seed, t_query, t_key = settings
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    distance = t_query[:, None] - t_key[None, :]  # (Tq, Tk)
    q, k = q.to(accumulate), k.to(accumulate)
    # r2 does not change, but |q|^2 + |k|^2 - 2 q.k loses fewer digits near the origin
    centre = k.detach().mean(2, keepdim=True)  # (1, H, 1, C)
    q, k = q - centre, k - centre
    r2 = q.square().sum(-1)[..., None] + k.square().sum(-1)[:, :, None, :]
    r2 = torch.baddbmm(r2[0], q[0], k[0].transpose(-1, -2), alpha=-2)[None].clamp(min=0)
    r2 = r2.masked_fill(distance == 0, 0)  # (1, H, Tq, Tk); a token's own distance is exactly 0
    inverse = torch.rsqrt(r2 + 1e-6).square() if use_rsqrt else 1 / (r2 + 1e-6)
    score = bias[:, None, None] - gamma[:, None, None] * inverse
    if not mass_in_value:
        score = score * (query_mass[:, None, :, None] * key_mass[:, None, None, :])
    if cutoff == "soft":
        score = score * torch.relu(1 - r2 / radius**2)
    elif cutoff == "hard":
        score = score.masked_fill(r2 > radius**2, -math.inf)
    weight = torch.softmax(score.masked_fill(distance < 0, -math.inf), -1)
    if dropout:
        generator = torch.Generator(q.device).manual_seed((seed + number) % 2**63)
        kept = torch.rand(weight.shape, generator=generator, device=q.device) >= dropout
        weight = weight * kept / (1 - dropout)
    if mass_in_value:
        v = v * key_mass[:, None, :, None].to(v.dtype)
    return weight.to(v.dtype) @ v


class _PublishedRows(torch.autograd.Function):
    """The published law, tile by tile; the backward pass recomputes each tile."""

    @staticmethod
    def forward(ctx, settings, q, k, v, query_mass, key_mass, gamma, bias, radius):
        inputs = q, k, v, query_mass, key_mass, gamma, bias, radius
        batch, heads, queries, _ = q.shape
        # heads of a token side by side, as the next layer reads them
        out = v.new_empty(batch, queries, heads, v.shape[-1]).transpose(1, 2)
        for number, (b, row, keys) in enumerate(_tiles(settings, q, k)):
            tile_settings, tile = _tile_inputs(settings, inputs, b, row, keys)
            out[b, :, row] = _tile_output(tile_settings, number, *tile)
        ctx.settings = settings
        ctx.save_for_backward(*inputs)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        inputs = ctx.saved_tensors
        grads = [
            torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in inputs
        ]
        d_q, d_k, d_v, d_query_mass, d_key_mass, *per_head = grads
        with torch.autocast(grad_out.device.type, enabled=False):
            for number, (b, row, keys) in enumerate(_tiles(ctx.settings, *inputs[:2])):
                settings, tile = _tile_inputs(ctx.settings, inputs, b, row, keys)
                tile = [x.detach().requires_grad_() for x in tile]
                with torch.enable_grad():
                    out = _tile_output(settings, number, *tile)
                found = torch.autograd.grad(out, tile, grad_out[b, :, row], materialize_grads=True)
                d_q[b, :, row] += found[0]
                d_k[b, :, :keys] += found[1]
                d_v[b, :, :keys] += found[2]
                d_query_mass[b, row] += found[3]
                d_key_mass[b, :keys] += found[4]
                for total, part in zip(per_head, found[5:], strict=True):
                    total += part
        return None, *(g.to(x.dtype) for g, x in zip(grads, inputs, strict=True))


def _tile_inputs(settings, inputs, b, row, keys):
    """Settings and inputs of one tile."""
    *others, t_query, t_key = settings
    q, k, v, query_mass, key_mass, *per_head = inputs
    masses = query_mass[b, row], key_mass[b, :keys]
    tensors = q[b, :, row], k[b, :, :keys], v[b, :, :keys], *masses, *per_head
    return (*others, t_query[row], t_key[:keys]), tensors


class PublishedGravityAttention(nn.Module):
    """Attention under `--law published`: the first release's softmax, one point per head."""

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        heads = config.num_heads
        self.coord_proj_attn = linear(config, config.coord_dim, heads * config.head_coord_dim)
        self.v_proj = linear(config, config.hidden_dim, config.hidden_dim)
        self.out_proj = linear(config, config.hidden_dim, config.hidden_dim)
        self.value_share = value_share(config, layer)
        self.gamma_raw = nn.Parameter(torch.zeros(heads))
        self.gravity_bias = nn.Parameter(torch.zeros(heads))
        self.radius_raw = nn.Parameter(softplus_inverse(config.radius))

    def reset_geometry(self):
        """Start with points a few units apart, at which the law's scores differ."""
        self.coord_proj_attn.reset_parameters()

    @property
    def radius(self):
        """One number for all heads, (); None without a cutoff."""
        return None if self.config.cutoff == "none" else F.softplus(self.radius_raw.float())

    def points(self, z):
        """The same points for queries and keys, (B, H, T, head_coord_dim) twice."""
        x = split_heads(self.coord_proj_attn(z), self.config.num_heads)
        return x, x

    def law(self):
        """The keyword arguments of `published_gravity_attention` for this layer."""
        return dict(
            gamma=F.softplus(self.gamma_raw.float()),
            bias=self.gravity_bias.float(),
            radius=self.radius,
            cutoff=self.config.cutoff,
            mass_in_value=self.config.mass_in_value,
            use_rsqrt=self.config.use_rsqrt,
        )

    def learned(self, largest_mass):
        """What the heads learned, by name: gamma (H,), bias (H,), and one radius () or None.

        `largest_mass` is for the law newton; here nothing depends on it.
        """
        return {
            "gamma": F.softplus(self.gamma_raw),
            "bias": self.gravity_bias,
            "radius": self.radius,
        }

    def forward(self, h, z, mass, positions, kv_cache=None, first_values=None):
        """As `GravityAttention.forward` of newton.py: (B, T, hidden_dim) twice."""
        q, k = self.points(z)
        values = value_residual(self.v_proj(h), first_values, self.value_share)
        v = split_heads(values, self.config.num_heads)
        key_positions, key_mass = positions, mass
        if kv_cache is not None:
            key_positions, k, v, key_mass = kv_cache.append(self.layer, positions, k, v, mass)
        law = self.law() | {"query_positions": positions, "key_positions": key_positions}
        dropout = self.config.dropout if self.training else 0.0
        a = published_gravity_attention(q, k, v, mass, key_mass, dropout=dropout, **law)
        return self.out_proj(merge_heads(a)), values
