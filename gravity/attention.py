"""Gravity attention for models: checks the arguments and picks the implementation.

`law.py` has the formula. The compiled kernels for CPUs, the Triton kernels for CUDA and the blocks
in plain PyTorch give the same numbers without ever keeping a T x T matrix, and skip what is
provably too far away to matter. Letters in shapes as in `law.py`.
"""

import functools

import torch

from gravity.blocked import blocked_attention
from gravity.cpu import cpu_attention, cpu_backward, cpu_forward, cpu_handles, cpu_results
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
    """The fastest implementation that takes these tensors; to a compiler it is one operation."""
    if torch.compiler.is_compiling():
        return _as_one_operation(q, k, v, mass, *law)[0]
    return _implementation(q, k, v, mass, law)


def _implementation(q, k, v, mass, law):
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


# What follows is for torch.compile alone. It cannot trace loops that depend on data, so it is told
# which tensors come back and how their gradients are computed:
# https://docs.pytorch.org/tutorials/advanced/python_custom_ops.html
_INPUTS = (  # q, k, v, mass and the fields of a `Law`
    "Tensor q, Tensor k, Tensor v, Tensor mass, "
    "Tensor time_scale, Tensor time_offset, Tensor? radius, Tensor? background, "
    "int exponent, str cutoff, float tolerance, Tensor query_positions, Tensor key_positions"
)
_KEPT = "Tensor out, Tensor total, Tensor first"  # what the backward pass of the CPU needs


@torch.library.custom_op(
    "gravity::attention", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor, Tensor)"
)
def _as_one_operation(q, k, v, mass, *law):
    """`(out, total, first)` as `cpu_forward` returns them; the last two are empty elsewhere."""
    if cpu_handles(q, v):
        return cpu_forward(q, k, v, mass, Law(*law))
    out, *kept = _results(q, k, v, mass, *law)
    return out.copy_(_implementation(q, k, v, mass, Law(*law))), *kept


@_as_one_operation.register_fake
def _results(q, k, v, mass, *law):
    """Tensors as the operation returns them: with the same strides, or the compiler is misled."""
    if cpu_handles(q, v):
        out, *kept = cpu_results(q, v)
        return out.to(v.dtype), *kept
    return _by_token(v, q.shape[2]), q.new_empty(0), q.new_empty(0)


@torch.library.custom_op(
    "gravity::attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, {_INPUTS}, {_KEPT}) -> Tensor[]",
)
def _gradients(grad_out, q, k, v, mass, *law_and_kept):
    """The gradients of q, k, v, mass and `law.learned`, without those that are None."""
    law, kept = Law(*law_and_kept[:-3]), law_and_kept[-3:]
    if cpu_handles(q, v):
        found = cpu_backward(grad_out, q, k, v, mass, law, *kept)
        # those of the law are rows of one tensor, which an operation must not return
        return [x if x.dim() > 1 else x.clone() for x in found if x is not None]
    # elsewhere the forward pass is repeated
    inputs = [
        x if x is None else x.detach().requires_grad_() for x in (q, k, v, mass, *law.learned)
    ]
    with torch.enable_grad():
        out = _implementation(*inputs[:4], Law(*inputs[4:], *law.fixed))
    given = [x for x in inputs if x is not None]
    found = torch.autograd.grad(out, given, grad_out, materialize_grads=True)
    return [like.copy_(gradient) for like, gradient in zip(_like(given), found, strict=True)]


@_gradients.register_fake
def _(grad_out, q, k, v, mass, *law_and_kept):
    return _like([q, k, v, mass, *Law(*law_and_kept[:-3]).learned])


def _like(inputs):
    """Memory for the gradients of the inputs that are not None."""
    return [_by_token(x) if x.dim() == 4 else x.new_empty(x.shape) for x in inputs if x is not None]


def _by_token(x, length=None):
    """Memory for a tensor like x, (B, H, T, C), with the heads of a token side by side."""
    batch, heads, tokens, width = x.shape
    return x.new_empty(batch, length or tokens, heads, width).transpose(1, 2)


def _remember(ctx, inputs, output):
    """Save for `_backward` what `_gradients` needs."""
    law = Law(*inputs[4:])
    ctx.law = law.exponent, law.cutoff, law.tolerance
    ctx.save_for_backward(*inputs[:8], *inputs[11:], *output)


def _backward(ctx, grad_out, *_):
    *tensors, tq, tk, out, total, first = ctx.saved_tensors
    found = iter(_gradients(grad_out, *tensors, *ctx.law, tq, tk, out, total, first))
    return *(None if x is None else next(found) for x in tensors), *(None for _ in range(5))


_as_one_operation.register_autograd(_backward, setup_context=_remember)
