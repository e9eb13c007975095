"""Gravity attention on CUDA GPUs: launches the Triton kernels of `cuda_*.py`.

Here are the tables that the kernels read, the sizes of their blocks, and the autograd function
around them. Nothing here waits for the device. Letters in shapes as in `law.py`.
"""

import math
from typing import NamedTuple

import torch

from gravity.law import TINY, Law, windows

try:
    from gravity.cuda_backward import key_gradient_kernel, query_gradient_kernel
    from gravity.cuda_forward import forward_kernel
    from gravity.cuda_tiles import norm_kernel
except ImportError:  # PyTorch for the CPU comes without Triton
    forward_kernel = None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 256  # of coordinates and of values: a tile of them must fit on the chip
NORM_BLOCK = 128  # tokens per program of `norm_kernel`


def triton_is_available():
    """Whether Triton is installed; the kernels also need a CUDA device."""
    return forward_kernel is not None


def triton_handles(q, k, v):
    """Whether `triton_attention` takes these tensors: on CUDA, not float64, not too wide."""
    return (
        triton_is_available()
        and q.is_cuda
        and all(tensor.dtype in DTYPES for tensor in (q, k, v))
        and max(q.shape[-1], v.shape[-1]) <= MAX_WIDTH
    )


class Launch(NamedTuple):
    """The sizes of a kernel's blocks and how many warps and pipeline stages run one."""

    query: int  # tokens per query block
    key: int  # tokens per key block
    warps: int
    stages: int

    def options(self):
        """Keyword arguments of a launch that Triton itself reads."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


def launches(dtype, width, num_queries):
    """The `Launch` of the forward, the query-gradient and the key-gradient kernel.

    The backward blocks divide the forward ones, so that all three compute the same pairs.

    Args:
        dtype: the wider type of coordinates and values.
        width: the larger of C and D, padded.
    """
    few = num_queries <= 16  # decoding
    if dtype == torch.float32:  # products without tensor cores
        query, half = (16, 16) if few else (64, 32)
        if width > 64:
            return Launch(query, 32, 4, 2), Launch(half, 32, 4, 1), Launch(half, 32, 4, 1)
        return Launch(query, 32, 4, 2), Launch(half, 32, 4, 2), Launch(half, 32, 4, 2)
    if width > 128:
        query, half = (16, 16) if few else (64, 32)
        return Launch(query, 64, 4, 2), Launch(query, 64, 4, 1), Launch(half, 64, 8, 1)
    query, half, warps = (16, 16, 4) if few else (128, 64, 8)
    return Launch(query, 64, warps, 3), Launch(query, 64, warps, 2), Launch(half, 64, 4, 1)


def triton_attention(q, k, v, mass, law):
    """`gravity_attention` with checked arguments, on a CUDA device.

    Args:
        q, k: (B, H, Tq, C), (B, H, Tk, C), any strides; fp32, bf16 or fp16.
        v: (B, H, Tk, D), any strides.
        mass: (B, Tk), ones if the mass is in the values.
        law: a `law.Law`.

    Returns:
        (B, H, Tq, D) in the dtype of v, laid out so that merging the heads costs nothing.
    """
    with torch.autocast(q.device.type, enabled=False):
        return _TritonGravity.apply(q, k, v, mass, *law)


class _Times(NamedTuple):
    """Positions of queries and keys as the kernels read them."""

    tq: torch.Tensor  # (Tq,) fp32, relative to the newest key
    tk: torch.Tensor  # (Tk,) fp32, likewise
    visible: torch.Tensor  # (Tq,) int32, how many keys are not later than a query
    first_seen: torch.Tensor  # (Tk,) int32, the first query that is not earlier than a key


def _times(tq, tk):
    tq, tk = tq.contiguous(), tk.contiguous()
    return _Times(
        (tq - tk[-1]).float(),
        (tk - tk[-1]).float(),
        torch.searchsorted(tk, tq, right=True, out_int32=True),
        torch.searchsorted(tq, tk, out_int32=True),
    )


def _squared_norm(x):
    """|x|^2 over the last dimension in fp32, (B, H, T), without an fp32 copy of x."""
    batch, heads, length, width = x.shape
    norm = torch.empty(batch, heads, length, dtype=torch.float32, device=x.device)
    norm_kernel[(_blocks(length, NORM_BLOCK) * batch * heads,)](
        *(x, norm, *x.stride(), heads, length),
        WIDTH=width,
        C=_padded(width),
        BLOCK=NORM_BLOCK,
    )
    return norm


def _padded(width):
    """The power of two to which a matrix product pads a width: at least 16."""
    return max(16, 1 << (width - 1).bit_length())


def _blocks(length, block):
    return -(-length // block)


class _TritonGravity(torch.autograd.Function):
    """The kernels with their gradients; the backward pass recomputes the tiles."""

    @staticmethod
    def forward(ctx, q, k, v, mass, *law):
        law = Law(*law)
        ctx.dtypes = [None if t is None else t.dtype for t in law.learned]
        ctx.fixed = law.fixed
        # gradients get the strides of their inputs, which need not be kept for that
        ctx.like_q, ctx.like_k, ctx.like_v = (torch.empty_like(t, device="meta") for t in (q, k, v))
        with torch.cuda.device_of(q):
            out, saved = attend(q, k, v, mass, law)
        ctx.save_for_backward(mass, *saved)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        mass, *saved = ctx.saved_tensors
        with torch.autocast(grad_out.device.type, enabled=False), torch.cuda.device_of(grad_out):
            return _backward(ctx, grad_out, mass, _Saved(*saved))


class _Saved(NamedTuple):
    """What the backward pass recomputes the tiles from."""

    q: torch.Tensor  # (B, H, Tq, C); the mean key is subtracted if fp32
    q_norm: torch.Tensor  # (B, H, Tq) fp32
    k: torch.Tensor  # (B, H, Tk, C), likewise
    k_norm: torch.Tensor  # (B, H, Tk) fp32
    v: torch.Tensor  # (B, H, Tk, D)
    mass: torch.Tensor  # (B, Tk) fp32
    tq: torch.Tensor  # (Tq,) fp32, as all four of `_Times`
    tk: torch.Tensor  # (Tk,) fp32
    time_scale: torch.Tensor  # (H,) fp32
    time_offset: torch.Tensor  # (H,) fp32
    radius: torch.Tensor  # (H,) fp32; time_scale without a cutoff
    window: torch.Tensor  # (H,) fp32, whole numbers or inf
    visible: torch.Tensor  # (Tq,) int32
    first_seen: torch.Tensor  # (Tk,) int32
    out: torch.Tensor  # (B, H, Tq, D) fp32
    inverse_total: torch.Tensor  # (B, H, Tq) fp32, 1 / (sum of fields + background)
    first_kept: torch.Tensor | None  # (B, H, query blocks) int32; None if windows are all it takes


def attend(q, k, v, mass, law):
    """The forward pass; arguments as for `triton_attention`.

    Returns:
        `(out, _Saved)`: `first_kept` is the oldest key that each query block summed; the block's
        pairs with older keys are left out.
    """
    batch, heads, num_queries, _ = q.shape
    num_keys, width = v.shape[2:]
    coordinates = torch.promote_types(q.dtype, k.dtype)
    q, k = q.to(coordinates), k.to(coordinates)
    if coordinates == torch.float32:
        # r2 does not change, but |q|^2 + |k|^2 - 2 q.k loses fewer digits near the origin; in 16
        # bits rounding the difference would lose more than it gains
        centre = k.mean(2, keepdim=True)  # (B, H, 1, C)
        q, k = q - centre, k - centre
    q_norm, k_norm = _squared_norm(q), _squared_norm(k)
    mass, time_scale, time_offset = (
        t.float().contiguous() for t in (mass, law.time_scale, law.time_offset)
    )
    times = _times(law.query_positions, law.key_positions)
    launch = launches(
        torch.promote_types(coordinates, v.dtype), _padded(max(q.shape[-1], width)), num_queries
    )[0]
    radius, background = time_scale, torch.full_like(time_scale, TINY)
    if law.cutoff != "none":  # else any tensor will do: the kernels do not read it
        radius = law.radius.float().contiguous()
    if law.background is not None:
        background = law.background.float().contiguous()
    max_mass = mass.max()
    window = windows(law, max_mass).float()  # whole numbers, as positions: fp32 is exact
    # without a background the sums of fields say how far back to look
    by_sum = law.background is None and law.tolerance > 0 and num_keys > launch.key
    log_share = math.log2(law.tolerance * (2 * law.exponent - 1)) if by_sum else 0.0
    # heads of a token side by side: merging them is a view
    out = torch.empty(batch, num_queries, heads, width, dtype=v.dtype, device=v.device)
    out = out.transpose(1, 2)
    exact = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    inverse_total = torch.empty_like(q_norm)  # (B, H, Tq)
    blocks = _blocks(num_queries, launch.query)
    first_kept = None
    if by_sum:
        first_kept = torch.empty(batch, heads, blocks, dtype=torch.int32, device=q.device)
    forward_kernel[(blocks * batch * heads,)](
        *(q, q_norm, k, k_norm, v, mass, times.tq, times.tk, time_scale, time_offset, radius),
        *(background, window, max_mass, times.visible),
        *(out, None if exact is out else exact, inverse_total, first_kept),
        *(*q.stride(), *k.stride(), *v.stride(), *out.stride()[:3]),
        *(batch * heads, heads, num_queries, num_keys, log_share),
        BY_SUM=by_sum,
        **_constants(law.exponent, law.cutoff, width, q.shape[-1]),
        M=launch.query,
        N=launch.key,
        **launch.options(),
    )
    saved = _Saved(
        *(q, q_norm, k, k_norm, v, mass, times.tq, times.tk, time_scale, time_offset, radius),
        *(window, times.visible, times.first_seen, exact, inverse_total, first_kept),
    )
    return out, saved


def _constants(exponent, cutoff, width, coordinates):
    """The compile-time constants that all kernels share."""
    return {
        "EXPONENT": exponent,
        "BITS": exponent.bit_length(),
        "CUTOFF": cutoff,
        "WIDTH": width,
        "COORDS": coordinates,
        "C": _padded(coordinates),
        "D": _padded(width),
    }


def _backward(ctx, grad_out, mass, saved):
    """The gradients of all arguments of `_TritonGravity.forward`; None for those without one."""
    exponent, cutoff = ctx.fixed[:2]
    batch, heads, num_queries, width = grad_out.shape
    num_keys = saved.k.shape[2]
    device = grad_out.device
    grad_out = grad_out.to(saved.v.dtype)
    forward, for_query, for_key = launches(
        torch.promote_types(saved.q.dtype, saved.v.dtype),
        _padded(max(saved.q.shape[-1], width)),
        num_queries,
    )
    dq, dk, dv = (torch.empty_like(t, device=device) for t in (ctx.like_q, ctx.like_k, ctx.like_v))
    delta = torch.empty_like(saved.inverse_total)  # (B, H, Tq), gradient times output
    dmass = torch.empty_like(saved.k_norm)  # (B, H, Tk)
    blocks = _blocks(num_queries, for_query.query)
    per_head = torch.empty(
        4 if cutoff == "soft" else 3, blocks, batch, heads, dtype=torch.float32, device=device
    )
    rows_and_columns = (saved.q, saved.q_norm, saved.k, saved.k_norm, saved.v, saved.mass)
    scalars = (saved.tq, saved.tk, saved.time_scale, saved.time_offset, saved.radius, saved.window)
    strides = (*saved.q.stride(), *saved.k.stride(), *saved.v.stride())
    sizes = (batch * heads, heads, num_queries, num_keys)
    constants = _constants(exponent, cutoff, width, saved.q.shape[-1])
    constants |= {"BY_SUM": saved.first_kept is not None, "FORWARD_M": forward.query}
    query_gradient_kernel[(blocks * batch * heads,)](
        *(*rows_and_columns, *scalars, saved.visible, saved.out, saved.inverse_total),
        *(saved.first_kept, grad_out, delta, dq, per_head),
        *(*strides, *saved.out.stride()[:3], *grad_out.stride(), *dq.stride(), *sizes),
        **constants,
        M=for_query.query,
        N=for_query.key,
        **for_query.options(),
    )
    blocks = _blocks(num_keys, for_key.key)
    key_gradient_kernel[(blocks * batch * heads,)](
        *(*rows_and_columns, *scalars, saved.first_seen, saved.inverse_total, saved.first_kept),
        *(grad_out, delta, dk, dv, dmass),
        *(*strides, *grad_out.stride(), *dk.stride(), *dv.stride(), *sizes),
        **constants,
        M=for_key.query,
        N=for_key.key,
        **for_key.options(),
    )
    d_scale, d_offset, d_background, *d_radius = per_head.sum((1, 2))  # (H,) each
    learned = (d_scale, d_offset, d_radius[0] if d_radius else None, d_background)
    learned = [
        None if grad is None or dtype is None else grad.to(dtype)
        for grad, dtype in zip(learned, ctx.dtypes, strict=True)
    ]
    return dq, dk, dv, dmass.sum(1).to(mass.dtype), *learned, *(None for _ in ctx.fixed)
