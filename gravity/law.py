"""The law of gravity attention: the formula, and the proof of what may be skipped.

Token i is pulled by itself and by the tokens before it. For each head,

    r2_ij    = |q_i - k_j|^2 + (time_scale * (t_i - t_j - time_offset))^2
    field_ij = mass_j / (1 + r2_ij)^exponent             for t_j <= t_i, else 0
    out_i    = sum_j field_ij v_j / (background + sum_j field_ij)

The background, a positive number per head, makes what a token receives fade with the strength of
the field instead of always being a full-strength mean. A law without one has TINY in its place.
Kin, in dot-product attention: softmax off by one (E. Miller 2023,
https://www.evanmiller.org/attention-is-off-by-one.html), attention sinks (Xiao et al. 2023,
https://arxiv.org/abs/2309.17453) and learned sink logits (gpt-oss 2025,
https://arxiv.org/abs/2508.10925).

The hard cutoff sets the field to 0 if r2 > radius^2; the soft cutoff multiplies it by
relu(1 - r2 / radius^2)^2. Every implementation in this folder computes this.

Letters in shapes: B batch, H heads, T tokens (Tq queries, Tk keys), C coordinates per head, D width
of a value.
"""

import math
from typing import NamedTuple

import torch

CUTOFFS = ("none", "hard", "soft")
WITHOUT_FLOAT64 = ("mps",)  # Apple's GPUs
TINY = 1e-30  # in place of a background, so that a token which nothing pulls gets 0, not NaN


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
    """The field of every source at every query, (B, H, Tq, Tk); 0 if the key is later.

    Args:
        q: where each token looks from, (B, H, Tq, C), in units of the softening.
        k: where each token pulls from, (B, H, Tk, C).
        mass: (B, Tk), positive.
        time_scale: softening units per token, (H,).
        time_offset: tokens, (H,).
        exponent: integer >= 1; 1 is Newton's inverse square with Plummer softening
            (H. C. Plummer, MNRAS 71, 1911, https://doi.org/10.1093/mnras/71.5.460).
        radius: softening units, (H,); given unless `cutoff` is "none".
        cutoff: "none", "hard" or "soft".
        mass_in_value: leave the mass out of the field.
        query_positions, key_positions: integers, (Tq,), (Tk,); counted from 0 if None.
    """
    t_i = positions_or_range(query_positions, q)[:, None]  # (Tq, 1)
    t_j = positions_or_range(key_positions, k)  # (Tk,)
    age = (t_i - t_j).to(q.dtype)  # (Tq, Tk)
    time_scale, time_offset = time_scale[:, None, None], time_offset[:, None, None]  # (H, 1, 1)
    r2 = (q[:, :, :, None] - k[:, :, None]).square().sum(-1)  # (B, H, Tq, Tk)
    r2 = r2 + (time_scale * (age - time_offset)).square()
    field = 1 / (1 + r2) ** exponent  # (B, H, Tq, Tk)
    if not mass_in_value:
        field = mass[:, None, None, :] * field
    if cutoff == "hard":
        field = field * (r2 <= radius[:, None, None].square())
    elif cutoff == "soft":
        field = field * torch.relu(1 - r2 / radius[:, None, None].square()).square()
    return field * (age >= 0)


def gravity_attention_reference(q, k, v, mass, *, background=None, mass_in_value=False, **law):
    """Gravity attention exactly as the formula says, with T x T matrices and plain autograd.

    Slow, and the reference that every other implementation is tested against.

    Args:
        v: (B, H, Tk, D); the others as for `gravity_field`.
        background: added to every sum of fields, (H,), positive; None for none.
        mass_in_value: multiply values by the mass, not fields.

    Returns:
        (B, H, Tq, D).
    """
    field = gravity_field(q, k, mass, mass_in_value=mass_in_value, **law)  # (B, H, Tq, Tk)
    if mass_in_value:
        v = v * mass[:, None, :, None]
    background = TINY if background is None else background[:, None, None]
    return field @ v / (background + field.sum(-1, keepdim=True))


def wide(x):
    """x in float64, or in float32 on a device that has no float64."""
    return x.float() if x.device.type in WITHOUT_FLOAT64 else x.double()


def positions_or_range(given, points):
    """The given positions of points (B, H, T, C), or 0, 1, ..., T - 1 if None are given, (T,)."""
    return torch.arange(points.shape[2], device=points.device) if given is None else given


def reach(time_scale, time_offset, radius):
    """How many tokens back each head feels anything, (H,); beyond that the field is exactly 0.

    r2 is at least its time term, which is larger than radius^2 for all tokens more than
    `time_offset + radius / time_scale` tokens back. One more token allows for rounding.
    """
    return time_offset + radius / time_scale + 1


def proven_window(smallest_sum, time_scale, time_offset, exponent, max_mass, tolerance):
    """How many tokens back a head must look so that all older tokens together cannot matter.

    The proof, for n >= time_offset: wherever a token is in space, r2 is at least its time term, so
    the field of a token d tokens back is at most

        max_mass * (time_scale * (d - time_offset))^(-2 * exponent).

    No two tokens have the same position, and the bound falls as d grows. So all tokens with
    d >= n + 1 weigh together less than the integral of the bound from n on,

        max_mass * time_scale^(-2 * exponent) * (n - time_offset)^(-p) / p,  p = 2 * exponent - 1.

    The window is the n at which this is `tolerance * smallest_sum`; a token less than one further
    back is still needed, so whoever compares whole numbers rounds n up. Fields that are added later
    only make the sum larger, so what lies beyond the window stays below that share of it. The
    output is a mean of values: leaving out that share moves it by at most 2 * tolerance * max|v|.

    A background is part of the sum from the start, so that `smallest_sum = background` gives a
    window that holds for every query, now and later, whatever the coordinates are. With S the sum
    of field * v and F that of the field, of which D is left out, D <= tolerance * background:

        |S / (background + F) - S' / (background + F')| <= 2 D max|v| / (background + F),

    because |S - S'| <= D max|v|, |S'| <= F' max|v| and F - F' = D.

    Args:
        smallest_sum: the smallest sum of fields so far, over all queries that use the window, the
            background included.
        max_mass: the largest mass of any token.

    Returns:
        A float of at least `time_offset`; inf if the sum is 0 or NaN, which proves nothing.
    """
    if not smallest_sum > 0 or not time_scale > 0:
        return math.inf
    p = 2 * exponent - 1
    # in logarithms, because the powers overflow
    log_window = math.log(max_mass / p) - math.log(tolerance) - math.log(smallest_sum)
    log_window = (log_window - (p + 1) * math.log(time_scale)) / p  # log(n - time_offset)
    # a factor of 1 + 1e-6 is more than rounding loses; exp would overflow beyond 709
    return time_offset + math.exp(log_window) * (1 + 1e-6) if log_window < 700 else math.inf


def windows(law, max_mass):
    """How many tokens back each head must look, as far as that is known before any field is.

    Args:
        law: a `Law`; its radius bounds a head by `reach`, its background by `proven_window`.
        max_mass: the largest mass of any token that will be read; 1 if masses multiply values.

    Returns:
        (H,) whole numbers as floats, on the law's device: what is more tokens back may be left out.
        inf where nothing is known. Nothing waits for a GPU.
    """
    scale, offset = wide(law.time_scale), wide(law.time_offset)
    found = torch.full_like(scale, math.inf)
    if law.radius is not None:
        found = reach(scale, offset, wide(law.radius))
    if law.background is not None and law.tolerance > 0:
        # `proven_window` with `smallest_sum = background`, for all heads at once
        p = 2 * law.exponent - 1
        log_window = torch.as_tensor(max_mass, dtype=scale.dtype, device=scale.device).log()
        log_window = log_window - math.log(p * law.tolerance) - wide(law.background).log()
        log_window = (log_window - (p + 1) * scale.log()) / p
        # what is not below inf is NaN, which proves nothing
        proven = offset + log_window.exp() * (1 + 1e-6)
        found = torch.where(proven < found, proven, found)
    return found.ceil()  # `proven_window` says why up


class Law(NamedTuple):
    """What every implementation of gravity attention is given besides q, k, v and mass.

    `Function.apply` takes it unpacked, `*law`: autograd sees only tensors that are direct inputs.
    """

    time_scale: torch.Tensor  # (H,)
    time_offset: torch.Tensor  # (H,)
    radius: torch.Tensor | None  # (H,); None without a cutoff
    background: torch.Tensor | None  # (H,); None for none
    exponent: int
    cutoff: str  # one of CUTOFFS
    tolerance: float  # share of the sum of fields that may be left out; 0 leaves nothing out
    query_positions: torch.Tensor  # (Tq,) integers that increase
    key_positions: torch.Tensor  # (Tk,) integers that increase

    @property
    def learned(self):
        """The tensors that need gradients: time_scale, time_offset, radius and background."""
        return self[:4]

    @property
    def fixed(self):
        """All that needs no gradients; `Law(*learned, *fixed)` is the law again."""
        return self[4:]
