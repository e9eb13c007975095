"""The gravity operator: what pulls on a token, and how hard.

`gravity_attention` is the one door. It computes, per head,

    r2[i,j] = |q_i - k_j|^2 + (time_scale * (t_i - t_j - time_offset))^2
    field   = mass_j / (1 + r2) ** exponent
    out_i   = sum_{j<=i} field * v_j / (sum_{j<=i} field + TINY)

`gravity_attention_reference` is that formula and defines the truth; the paths behind the door
(compiled for the CPU, Triton for CUDA, plain PyTorch everywhere else) give the same numbers without
ever keeping a T x T matrix, and skip what is provably too far to matter.
`published_gravity_attention` is the law of NGT's first release.

The letters in shapes: B batch, H heads, T tokens (Tq queries, Tk keys), C coordinates a head,
D width of a value.
"""

import functools
import math

import torch

from errors import warn
from gravity_blocked import TINY, blocked_attention
from gravity_cpu import can_attend, cpu_attention
from gravity_triton import triton_attention, triton_handles, triton_is_available

CUTOFFS = ("none", "hard", "soft")


def _check(q, k, v, mass, time_scale, time_offset, exponent, radius, cutoff, positions):
    batch, heads, _, coords = q.shape
    num_keys = k.shape[2]
    if k.shape != (batch, heads, num_keys, coords) or v.shape[:3] != (batch, heads, num_keys):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit"
        )
    if mass.shape != (batch, num_keys):
        raise ValueError(f"mass is {tuple(mass.shape)}, expected {(batch, num_keys)}")
    if time_scale.shape != (heads,) or time_offset.shape != (heads,):
        raise ValueError(f"time_scale and time_offset must have shape {(heads,)}")
    if not isinstance(exponent, int) or exponent < 1:
        raise ValueError(f"exponent must be an integer of at least 1, not {exponent!r}")
    if cutoff not in CUTOFFS:
        raise ValueError(f"cutoff must be one of {CUTOFFS}, not {cutoff!r}")
    if (cutoff == "none") != (radius is None):
        raise ValueError("a radius is given exactly when cutoff is 'hard' or 'soft'")
    if radius is not None and radius.shape != (heads,):
        raise ValueError(f"radius must have shape {(heads,)}")
    for length, position in zip((q.shape[2], num_keys), positions, strict=True):
        if position is not None and position.shape != (length,):
            raise ValueError(f"positions are {tuple(position.shape)}, expected {(length,)}")
    if positions[0] is None and positions[1] is None and q.shape[2] != num_keys:
        raise ValueError("fewer queries than keys need query_positions and key_positions")


def _positions(given, length, device):
    return torch.arange(length, device=device) if given is None else given


def gravity_field(
    q,
    k,
    mass,
    *,
    time_scale,
    time_offset,
    exponent=4,
    radius=None,
    cutoff="none",
    mass_in_value=False,
    query_positions=None,
    key_positions=None,
):
    """The field of every source at every query, written as the formula.

    Args:
        q: where tokens look from, (B, H, Tq, C), in units of the softening.
        k: where tokens pull from, (B, H, Tk, C).
        mass: (B, Tk), positive.
        time_scale, time_offset: (H,), softening units a token and tokens.
        exponent: integer >= 1; 1 is Newton's inverse square with Plummer softening
            (H. C. Plummer, MNRAS 71, 1911).
        radius: (H,) in softening units, for `cutoff` "hard" (0 beyond it) or "soft"
            (times relu(1 - r2/radius^2)^2).
        mass_in_value: leave the mass out of the field.
        query_positions, key_positions: (Tq,), (Tk,) integers; counted from 0 where None.

    Returns:
        (B, H, Tq, Tk); 0 where the key is later than the query.
    """
    t_query = _positions(query_positions, q.shape[2], q.device)
    t_key = _positions(key_positions, k.shape[2], q.device)
    distance = (t_query[:, None] - t_key[None, :]).to(q.dtype)  # (Tq, Tk)
    scale, offset = time_scale[:, None, None], time_offset[:, None, None]
    r2 = (q[:, :, :, None] - k[:, :, None]).square().sum(-1)  # (B, H, Tq, Tk)
    r2 = r2 + (scale * (distance - offset)).square()
    field = 1 / (1 + r2) ** exponent
    if not mass_in_value:
        field = mass[:, None, None, :] * field
    if cutoff == "hard":
        field = field * (r2 <= radius[:, None, None].square())
    elif cutoff == "soft":
        field = field * torch.relu(1 - r2 / radius[:, None, None].square()).square()
    return field * (distance >= 0)


def gravity_attention_reference(q, k, v, mass, *, mass_in_value=False, **law):
    """Gravity attention as the formula, T x T and plain autograd. Arguments as `gravity_field`.

    Returns:
        (B, H, Tq, D).
    """
    field = gravity_field(q, k, mass, mass_in_value=mass_in_value, **law)
    if mass_in_value:
        v = v * mass[:, None, :, None]
    return field @ v / (field.sum(-1, keepdim=True) + TINY)


def gravity_attention(
    q,
    k,
    v,
    mass,
    *,
    time_scale,
    time_offset,
    exponent=4,
    radius=None,
    cutoff="none",
    mass_in_value=False,
    field_tolerance=0.0,
    query_positions=None,
    key_positions=None,
):
    """Gravity attention: every token is pulled by itself and by earlier tokens.

    Args:
        q, k, mass, time_scale, time_offset, exponent, radius, cutoff, query_positions,
            key_positions: as `gravity_field`; positions must increase.
        v: what a token hands on, (B, H, Tk, D).
        mass_in_value: multiply values by the mass instead of fields.
        field_tolerance: older sources are left out once together they provably weigh no more than
            this share of what was summed; the output is then within
            `2 * field_tolerance * max|v|` of the full sum. 0 leaves nothing out.

    Returns:
        (B, H, Tq, D) in the dtype of `v`. A token that nothing reaches gets 0.

    Raises:
        ValueError: where shapes or settings do not fit.
    """
    positions = (query_positions, key_positions)
    _check(q, k, v, mass, time_scale, time_offset, exponent, radius, cutoff, positions)
    if mass_in_value:
        v = v * mass[:, None, :, None].to(v.dtype)
        mass = torch.ones_like(mass)
    return _attend(
        q,
        k,
        v,
        mass,
        time_scale,
        time_offset,
        radius,
        exponent,
        cutoff,
        field_tolerance,
        _positions(query_positions, q.shape[2], q.device),
        _positions(key_positions, k.shape[2], q.device),
    )


def _attend(q, k, v, *settings):
    """The fastest path that takes these tensors."""
    if can_attend(q, v):
        return cpu_attention(q, k, v, *settings)
    if q.is_cuda and triton_handles(q, k, v):
        return triton_attention(q, k, v, *settings)
    if q.is_cuda and not triton_is_available():
        _warn_of_no_triton()
    return blocked_attention(q, k, v, *settings)


@functools.cache
def _warn_of_no_triton():
    warn("Triton is not installed: gravity runs in plain PyTorch, slower (pip install triton)")


def step_around_when_compiling():
    """Let torch.compile leave the operator alone, whose loops depend on data.

    Called when something is to be compiled: the decorator alone takes two seconds to import.
    """
    global _attend
    _attend = torch.compiler.disable(_attend)


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
    """The law of NGT's first release: a softmax over repelling, mass-weighted scores.

    `score = -gamma / (r2 + 1e-6) + bias`, times `m_i m_j` unless `mass_in_value`, times
    `relu(1 - r2/radius^2)` under the soft cutoff, masked beyond the radius under the hard one.

    Args:
        q, k: one and the same point of each token, (B, H, Tq, C) and (B, H, Tk, C).
        v: (B, H, Tk, D).
        query_mass, key_mass: (B, Tq), (B, Tk).
        gamma, bias: (H,).
        radius: one number for all heads.
        use_rsqrt: compute 1/r2 as a squared reciprocal root.
        dropout: probability with which a weight is dropped.

    Returns:
        (B, H, Tq, D) in the dtype of `v`.

    Source: Taegyu Lee, Newton Gravity Transformer, first public release (MIT).
    """
    t_query = _positions(query_positions, q.shape[2], q.device)
    t_key = _positions(key_positions, k.shape[2], q.device)
    seed = int(torch.randint(2**62, ())) if dropout else 0
    if radius is None:
        radius = torch.ones((), device=q.device)
    settings = (cutoff, mass_in_value, use_rsqrt, dropout, seed, t_query, t_key)
    with torch.autocast(q.device.type, enabled=False):
        return _PublishedRows.apply(
            settings, q, k, v, query_mass, key_mass, gamma, bias, torch.as_tensor(radius)
        )


PUBLISHED_TILE = 1 << 18  # pairs of a tile, so that what is computed from it stays in the cache


def _published_tiles(settings, q, k):
    """`(batch, rows, number of keys)` of the tiles: all heads, a block of queries, all its past."""
    t_query, t_key = settings[-2:]
    batch, heads, queries, _ = q.shape
    rows = max(16, min(128, PUBLISHED_TILE // max(1, heads * k.shape[2])))
    for b in range(batch):
        for start in range(0, queries, rows):
            row = slice(start, min(start + rows, queries))
            yield slice(b, b + 1), row, int(torch.searchsorted(t_key, t_query[row][-1], right=True))


def _published_tile(settings, number, q, k, v, query_mass, key_mass, gamma, bias, radius):
    """One tile by plain autograd. Positions and the tile's number (for dropout) as given."""
    cutoff, mass_in_value, use_rsqrt, dropout, seed, t_query, t_key = settings
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    distance = t_query[:, None] - t_key[None, :]  # (Tq, Tk)
    q, k = q.to(accumulate), k.to(accumulate)
    centre = k.detach().mean(2, keepdim=True)
    q, k = q - centre, k - centre
    r2 = q.square().sum(-1)[..., None] + k.square().sum(-1)[:, :, None, :]
    r2 = torch.baddbmm(r2[0], q[0], k[0].transpose(-1, -2), alpha=-2)[None].clamp(min=0)
    r2 = r2.masked_fill(distance == 0, 0)  # (1, H, Tq, Tk)
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
    """The published law tile by tile; the backward pass computes each tile anew."""

    @staticmethod
    def forward(ctx, settings, q, k, v, query_mass, key_mass, gamma, bias, radius):
        inputs = q, k, v, query_mass, key_mass, gamma, bias, radius
        batch, heads, queries, _ = q.shape
        # heads of a token side by side, as the next layer reads them
        out = v.new_empty(batch, queries, heads, v.shape[-1]).transpose(1, 2)
        for number, where in enumerate(_published_tiles(settings, q, k)):
            tile_settings, tile = _published_inputs(settings, where, inputs)
            out[where[0], :, where[1]] = _published_tile(tile_settings, number, *tile)
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
            for number, where in enumerate(_published_tiles(ctx.settings, *inputs[:2])):
                settings, tile = _published_inputs(ctx.settings, where, inputs)
                tile = [x.detach().requires_grad_() for x in tile]
                b, row, keys = where
                with torch.enable_grad():
                    out = _published_tile(settings, number, *tile)
                found = torch.autograd.grad(out, tile, grad_out[b, :, row], materialize_grads=True)
                d_q[b, :, row] += found[0]
                d_k[b, :, :keys] += found[1]
                d_v[b, :, :keys] += found[2]
                d_query_mass[b, row] += found[3]
                d_key_mass[b, :keys] += found[4]
                for total, part in zip(per_head, found[5:], strict=True):
                    total += part
        return None, *(g.to(x.dtype) for g, x in zip(grads, inputs, strict=True))


def _published_inputs(settings, where, inputs):
    """Settings and inputs of one tile."""
    b, row, keys = where
    *others, t_query, t_key = settings
    q, k, v, query_mass, key_mass, *per_head = inputs
    return (*others, t_query[row], t_key[:keys]), (
        q[b, :, row],
        k[b, :, :keys],
        v[b, :, :keys],
        query_mass[b, row],
        key_mass[b, :keys],
        *per_head,
    )
