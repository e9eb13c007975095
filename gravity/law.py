"""The law of gravity attention as a formula, and the bound on what may be skipped."""

import math
from typing import NamedTuple

import torch

CUTOFFS = ("none", "hard", "soft")


class Law(NamedTuple):
    """What every implementation of gravity attention is given besides q, k, v and mass.

    The learned tensors come first: as inputs of an autograd function, after q, k, v and mass.
    """

    time_scale: torch.Tensor  # (H,)
    time_offset: torch.Tensor  # (H,)
    radius: torch.Tensor | None  # (H,); None without a cutoff
    exponent: int
    cutoff: str  # one of CUTOFFS
    tolerance: float  # share of the sum of fields that may be left out; 0 leaves nothing out
    query_positions: torch.Tensor  # (Tq,) integers that increase
    key_positions: torch.Tensor  # (Tk,) integers that increase

    @property
    def learned(self):
        """The tensors that need gradients: time_scale, time_offset and radius."""
        return self[:3]

    @property
    def fixed(self):
        """All that needs no gradients; `Law(*learned, *fixed)` is the law again."""
        return self[3:]


def positions_or_range(given, points):
    """The given positions of points (B, H, T, C), or 0, 1, ..., T - 1 if None are given, (T,)."""
    return torch.arange(points.shape[2], device=points.device) if given is None else given


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
    t_query = positions_or_range(query_positions, q)
    t_key = positions_or_range(key_positions, k)
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


TINY = 1e-30  # added to every sum of fields: nothing in reach means output 0, never NaN


def reach(time_scale, time_offset, radius):
    """How many tokens back a head can feel anything: beyond it the field is exactly 0, (H,).

    `time_offset + radius / time_scale`, with one token of slack for rounding.
    """
    return time_offset + radius / time_scale + 1


def proven_window(smallest_sum, time_scale, time_offset, exponent, max_mass, tolerance):
    """How many tokens back must be kept so that all older ones together cannot matter.

    Whatever the coordinates are, what is older than `n` tokens weighs together at most
    `max_mass * sum_{d>n} (1 + (time_scale*(d - time_offset))^2)^-exponent`, and for
    `n >= time_offset` the integral from n of `(time_scale*(d - time_offset))^(-2*exponent)` is
    more than that sum. The window is the n at which that integral is `tolerance * smallest_sum`.

    Args:
        smallest_sum: the least sum of fields kept so far; further fields only add to it.

    Returns:
        A float of at least `time_offset`; inf where the sum is 0 or NaN.
    """
    if not smallest_sum > 0 or not time_scale > 0:
        return math.inf
    p = 2 * exponent - 1
    log_window = math.log(max_mass / p) - math.log(tolerance) - math.log(smallest_sum)
    log_window = (log_window - (p + 1) * math.log(time_scale)) / p
    return time_offset + math.exp(log_window) * (1 + 1e-6) if log_window < 700 else math.inf
