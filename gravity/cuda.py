"""Gravity attention on CUDA GPUs: launches the Triton kernels of `cuda_*.py`.

Here are the tables that the kernels read, the sizes of their tiles, and the autograd function
around them. Nothing here waits for the device. Letters in shapes as in `law.py`; K columns of a
packed point and D of a packed value, which are padded, as are rows to whole tiles.
"""

import functools
import math
from typing import NamedTuple

import torch

from gravity.law import Law

try:
    from gravity import cuda_backward, cuda_forward, cuda_tiles
except ImportError:  # PyTorch for the CPU comes without Triton
    cuda_tiles = None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_COORDS, MAX_WIDTH = 122, 256  # coordinates and values: a tile of them must fit on the chip
BLOCK = 32  # tokens per program of the kernels that only pack
FEW = 16  # queries, at most, for which keys are split over many programs
SHARES = 16  # into which they are split


def triton_is_available():
    """Whether Triton is installed; the kernels also need a CUDA device."""
    return cuda_tiles is not None


def triton_handles(q, k, v):
    """Whether `triton_attention` takes these tensors: on CUDA, not fp64, not too wide."""
    return (
        triton_is_available()
        and q.is_cuda
        and all(tensor.dtype in DTYPES for tensor in (q, k, v))
        and q.shape[-1] <= MAX_COORDS
        and v.shape[-1] <= MAX_WIDTH
    )


class Launch(NamedTuple):
    """The tile of the kernels that go through pairs, and how a multiprocessor runs them."""

    query: int  # tokens per query block
    key: int  # tokens per key block
    warps: int
    stages: int  # of the pipeline that loads tiles
    # at most, in the forward pass and for queries: 128 let 16 warps run on a multiprocessor
    registers: int | None = None

    def options(self, limited=True):
        """Keyword arguments of a launch, among them those that Triton itself reads."""
        found = {"M": self.query, "N": self.key, "num_warps": self.warps, "num_stages": self.stages}
        return found | {"maxnreg": self.registers if limited else None, "enable_fp_fusion": True}


def launch_for(dtype, points, values):
    """The `Launch` for a packed type and the padded widths of packed points and values."""
    if dtype == torch.float32:  # products without tensor cores
        return Launch(32, 32, 4, 1 if values > 64 else 2)
    if values > 128:
        return Launch(64, 64, 8, 1)
    return Launch(64, 64, 4, 2, 128 if max(points, values) <= 64 else None)


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
    inputs = (q, k, v, mass, *law.learned)
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    with torch.autocast(q.device.type, enabled=False), torch.cuda.device_of(q):
        if q.shape[2] <= FEW and not learns:
            return decode(q, k, v, mass, law)
        return _TritonGravity.apply(q, k, v, mass, *law)


class _TritonGravity(torch.autograd.Function):
    """The kernels with their gradients; the backward pass recomputes the tiles."""

    @staticmethod
    def forward(ctx, q, k, v, mass, *law):
        law = Law(*law)
        ctx.fixed, ctx.coords = law.fixed, q.shape[-1]
        ctx.dtypes = [None if x is None else x.dtype for x in (q, k, v, mass, *law.learned)]
        out, saved = attend(q, k, v, mass, law)
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        saved = Saved(*ctx.saved_tensors)
        with torch.autocast(grad_out.device.type, enabled=False), torch.cuda.device_of(grad_out):
            gradients = pull_back(grad_out, saved, ctx.coords, ctx.dtypes, *ctx.fixed[:2])
        return *gradients, *(None for _ in ctx.fixed)


class Saved(NamedTuple):
    """What the backward pass recomputes the tiles from; the first seven are packed."""

    q: torch.Tensor  # (B * H, rows, K), see `cuda_tiles.py`; the mean key is subtracted if fp32
    k: torch.Tensor  # (B * H, rows, K), likewise
    v: torch.Tensor  # (B * H, rows, D), times the mass
    mass: torch.Tensor  # (B, rows, 16), see `cuda_tiles.mass_columns`
    q_age: torch.Tensor  # (rows,) fp32, tokens since the first query of the block
    k_age: torch.Tensor  # (rows,) fp32, tokens since the first key of the block
    law: torch.Tensor  # (H, 8) fp32, see `cuda_tiles.load_law`
    tq: torch.Tensor  # (Tq,) integers
    tk: torch.Tensor  # (Tk,) integers
    exact: torch.Tensor  # (B, Tq, H, width of a value) fp32, the output
    inverse_total: torch.Tensor  # (B, H, Tq) fp32, 1 / (background + sum of fields)


def attend(q, k, v, mass, law):
    """The forward pass; arguments as for `triton_attention`. Returns `(out, Saved)`."""
    batch, heads, queries, coords = q.shape
    keys, width = v.shape[2:]
    # products of 16-bit numbers are bf16's: fields may be too small for fp16
    in_bf16 = q.dtype == k.dtype == v.dtype == torch.bfloat16
    dtype = torch.bfloat16 if in_bf16 else torch.float32
    # r2 does not change, but |q|^2 + |k|^2 - 2 q.k loses fewer digits near the origin; in 16 bits
    # rounding the difference would lose more than it gains
    centre = None if in_bf16 else k.mean(2, dtype=torch.float32)  # (B, H, C)
    columns = {"K": _padded(coords + 6), "D": _padded(width), "WIDTH": width}
    launch = launch_for(dtype, columns["K"], columns["D"])
    query_rows, key_rows = (_whole(queries, launch.query), _whole(keys, launch.key))
    empty = functools.partial(torch.empty, dtype=dtype, device=q.device)
    packed = (
        empty(batch * heads, query_rows, columns["K"]),
        empty(batch * heads, key_rows, columns["K"]),
        empty(batch * heads, key_rows, columns["D"]),
        empty(batch, key_rows, 16),
        empty(query_rows, dtype=torch.float32),
        empty(key_rows, dtype=torch.float32),
        empty(heads, 8, dtype=torch.float32),
    )
    sizes = (heads, queries, keys, query_rows, key_rows)
    tq, tk = law.query_positions.contiguous(), law.key_positions.contiguous()
    cuda_tiles.pack_kernel[batch * heads, max(query_rows, key_rows) // BLOCK](
        *(_strided(q), _strided(k), _strided(v), mass.contiguous(), centre),
        *(_law_pointers(mass, law), tq, tk, packed, *sizes, _log_share(law)),
        EXPONENT=law.exponent,
        COORDS=coords,
        M=launch.query,
        N=launch.key,
        BLOCK=BLOCK,
        **columns,
    )
    # heads of a token side by side: merging them is a view
    out = empty(batch, queries, heads, width, dtype=v.dtype)
    exact = out if v.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    inverse_total = empty(batch, heads, queries, dtype=torch.float32)
    cuda_forward.forward_kernel[batch * heads, query_rows // launch.query](
        *(packed, tq, tk, out, None if exact is out else exact, inverse_total, *sizes),
        **_constants(law.exponent, law.cutoff),
        **columns,
        **launch.options(),
    )
    return out.transpose(1, 2), Saved(*packed, tq, tk, exact, inverse_total)


def pull_back(grad_out, saved, coords, dtypes, exponent, cutoff):
    """The backward pass.

    Args:
        grad_out: (B, H, Tq, width of a value), any strides.
        coords: how many coordinates q and k had.
        dtypes: of q, k, v, mass and `Law.learned`; None for what is not there.

    Returns:
        Gradients of what has a dtype, else None; those of q, k and v have the heads of a token side
        by side in memory. The gradient of a hard radius is None too.
    """
    batch, queries, heads, width = saved.exact.shape
    keys, (query_rows, columns) = len(saved.tk), saved.q.shape[1:]
    key_rows, value_columns = saved.v.shape[1:]
    programs = batch * heads
    empty = functools.partial(torch.empty, dtype=torch.float32, device=grad_out.device)
    gradients = (
        empty(programs, query_rows, value_columns, dtype=saved.v.dtype),
        empty(programs, query_rows, 16, dtype=saved.v.dtype),
    )
    sums = empty(programs, query_rows, columns)  # from which dq is made
    d_background = empty(query_rows // BLOCK, batch, heads)
    cuda_backward.pack_gradient_kernel[programs, query_rows // BLOCK](
        *(_strided(grad_out), saved.exact, saved.inverse_total, gradients, sums, d_background),
        *(heads, queries, query_rows),
        *(width, columns, value_columns, BLOCK),
    )
    launch = launch_for(saved.v.dtype, columns, value_columns)
    constants = _constants(exponent, cutoff)
    constants |= {"COORDS": coords, "WIDTH": width, "K": columns, "D": value_columns}
    given = (saved[:7], gradients, saved.tq, saved.tk, sums)
    sizes = (heads, queries, keys, query_rows, key_rows)
    repeatable = torch.are_deterministic_algorithms_enabled()
    if repeatable:
        cuda_backward.query_gradient_kernel[programs, query_rows // launch.query](
            *given, *sizes, **constants, **launch.options()
        )
    dq, dk, dv = (
        empty(batch, tokens, heads, size, dtype=dtype)
        for tokens, size, dtype in zip(
            (queries, keys, keys), (coords, coords, width), dtypes[:3], strict=True
        )
    )
    d_mass = empty(batch, heads, keys)
    blocks = key_rows // launch.key
    d_law = empty(3, blocks, batch, heads)
    cuda_backward.key_gradient_kernel[programs, blocks](
        *(*given, dk, dv, d_mass, d_law, *sizes),
        ATOMIC=not repeatable,
        **constants,
        **launch.options(limited=False),
    )
    cuda_backward.finish_kernel[programs, query_rows // BLOCK](
        *(sums, saved.q, dq, heads, queries, query_rows, exponent, coords, columns, BLOCK)
    )
    by_head = d_law.sum((1, 2))  # (3, H)
    found = (*(x.transpose(1, 2) for x in (dq, dk, dv)), d_mass.sum(1), by_head[0], by_head[1])
    found += (by_head[2] if cutoff == "soft" else None, d_background.sum((0, 1)))
    return [
        None if dtype is None or x is None else x.to(dtype)
        for x, dtype in zip(found, dtypes, strict=True)
    ]


def decode(q, k, v, mass, law):
    """The forward pass for a few queries, without what gradients need.

    Nothing is packed, and the keys of a query are split over many programs. Arguments and result as
    for `triton_attention`.
    """
    batch, heads, queries, coords = q.shape
    keys, width = v.shape[2:]
    padded = _padded(width)
    sums = torch.empty(batch * heads * queries, SHARES, padded, device=q.device)
    total = torch.empty(batch * heads * queries, SHARES, device=q.device)
    pointers = _law_pointers(mass, law)
    cuda_forward.decode_kernel[batch * heads * queries, SHARES](
        *(_strided(q), _strided(k), _strided(v), mass.contiguous(), pointers),
        *(law.query_positions.contiguous(), law.key_positions.contiguous(), sums, total),
        *(heads, queries, keys, _log_share(law)),
        **_constants(law.exponent, law.cutoff),
        COORDS=coords,
        WIDTH=width,
        C=_padded(coords),
        D=padded,
        N=64 if padded <= 64 else 16,
    )
    out = torch.empty(batch, queries, heads, width, dtype=v.dtype, device=v.device)
    cuda_forward.combine_kernel[(batch * heads * queries,)](
        *(sums, total, pointers[3], out, heads, queries, width, padded, SHARES)
    )
    return out.transpose(1, 2)


def _law_pointers(mass, law):
    """What `cuda_tiles.head_law` reads."""
    learned = (None if x is None else x.contiguous() for x in law.learned)
    return *learned, mass.max()


def _log_share(law):
    """The share of the sum that may be left out as `cuda_tiles.head_law` needs it."""
    share = law.tolerance * (2 * law.exponent - 1)
    return math.log2(share) if share > 0 else -math.inf


def _constants(exponent, cutoff):
    return {"EXPONENT": exponent, "BITS": exponent.bit_length(), "CUTOFF": cutoff}


def _strided(x):
    """A tensor and its strides, as kernels take it."""
    return x, x.stride()


def _padded(width):
    """The power of two to which a matrix product pads a width: at least 16."""
    return max(16, 1 << (width - 1).bit_length())


def _whole(length, block):
    return -(-length // block) * block
