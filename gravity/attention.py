"""Gravity attention for models: checks the arguments and picks the implementation.

`law.py` has the formula. The compiled kernels for CPUs, the Triton kernels for CUDA and the blocks
in plain PyTorch give the same numbers without ever keeping a T x T matrix, and skip what is
provably too far away to matter. Letters in shapes as in `law.py`.
"""

import functools

import torch

from gravity.blocked import blocked_attention
from gravity.cpu import cpu_attention, cpu_handles
from gravity.cuda import triton_attention, triton_handles, triton_is_available
from gravity.law import CUTOFFS, Law, positions_or_range
from system.errors import warn


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
    background=None,
    mass_in_value=False,
    field_tolerance=0.0,
    query_positions=None,
    key_positions=None,
):
    """For each token the mean of the values v_j, weighted by the fields of `gravity_field`.

    Args:
        q, k, mass, time_scale, time_offset, exponent, radius, cutoff, query_positions,
            key_positions: as for `gravity_field`; positions must increase.
        v: what a token passes on, (B, H, Tk, D).
        background: added to every sum of fields, (H,), positive; None for none.
        mass_in_value: multiply values by the mass, not fields.
        field_tolerance: older tokens are left out as soon as they provably weigh together at most
            this share of the background, or without one of the sum so far. The output is then
            within `2 * field_tolerance * max|v|` of the full sum. 0 leaves nothing out.

    Returns:
        (B, H, Tq, D) in the dtype of `v`; 0 for a token that nothing reaches.

    Raises:
        ValueError: if shapes or settings do not fit.
    """
    if query_positions is None and key_positions is None and q.shape[2] != k.shape[2]:
        raise ValueError("fewer queries than keys need query_positions and key_positions")
    law = Law(
        *(time_scale, time_offset, radius, background, exponent, cutoff, field_tolerance),
        query_positions=positions_or_range(query_positions, q),
        key_positions=positions_or_range(key_positions, k),
    )
    _check(q, k, v, mass, law)
    if mass_in_value:  # handled here, so that the implementations need only one place for the mass
        v = v * mass[:, None, :, None].to(v.dtype)
        mass = torch.ones_like(mass)
    return _attend(q, k, v, mass, law)


def _check(q, k, v, mass, law):
    """Raise `ValueError` if shapes or settings do not fit."""
    batch, heads, num_queries, coords = q.shape
    num_keys = k.shape[2]
    if k.shape != (batch, heads, num_keys, coords) or v.shape[:3] != (batch, heads, num_keys):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit"
        )
    if mass.shape != (batch, num_keys):
        raise ValueError(f"mass is {tuple(mass.shape)}, expected {(batch, num_keys)}")
    if law.time_scale.shape != (heads,) or law.time_offset.shape != (heads,):
        raise ValueError(f"time_scale and time_offset must have shape {(heads,)}")
    if not isinstance(law.exponent, int) or law.exponent < 1:
        raise ValueError(f"exponent must be an integer of at least 1, not {law.exponent!r}")
    if law.cutoff not in CUTOFFS:
        raise ValueError(f"cutoff must be one of {CUTOFFS}, not {law.cutoff!r}")
    if (law.cutoff == "none") != (law.radius is None):
        raise ValueError("a radius is given exactly when cutoff is 'hard' or 'soft'")
    for name in ("radius", "background"):
        if getattr(law, name) is not None and getattr(law, name).shape != (heads,):
            raise ValueError(f"{name} must have shape {(heads,)}")
    for length, positions in ((num_queries, law.query_positions), (num_keys, law.key_positions)):
        if positions.shape != (length,):
            raise ValueError(f"positions are {tuple(positions.shape)}, expected {(length,)}")


def _attend(q, k, v, mass, law):
    """The fastest implementation that takes these tensors."""
    if cpu_handles(q, v):
        return cpu_attention(q, k, v, mass, law)
    if triton_handles(q, k, v):
        return triton_attention(q, k, v, mass, law)
    if q.is_cuda and not triton_is_available():
        _warn_of_no_triton()
    return blocked_attention(q, k, v, mass, law)


@functools.cache
def _warn_of_no_triton():
    warn("Triton is not installed: gravity runs in plain PyTorch, slower (pip install triton)")


def exclude_from_compilation():
    """Make torch.compile skip the operator, whose loops depend on data.

    Call it before a model is compiled. It is not done on import, because `torch.compiler.disable`
    alone takes two seconds to load.
    """
    global _attend
    _attend = torch.compiler.disable(_attend)
