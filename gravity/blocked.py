"""Gravity attention in blocks: plain PyTorch that never keeps a T x T matrix.

A block of queries visits its newest keys first. The background, or else the fields summed so far,
decide how far back each head must look, because older keys provably cannot matter
(`law.proven_window`). The backward
pass recomputes the same tiles. `tiles.py` packs the inputs; letters in shapes as in `law.py`.
"""

import bisect
import itertools
import math

import torch

from gravity.law import TINY, Law, proven_window, wide
from gravity.tiles import PackedInputs

TILE_PAIRS = 1 << 18  # pairs computed at once: three fp32 buffers of that size stay near the L2
CHUNK_STEP, LONGEST_CHUNK = 64, 1024  # keys that a block of queries visits at once


def tile_rows(matrices):
    """Queries per block: more if there are few (batch, head) matrices to fill a tile with."""
    return 64 if matrices >= 16 else 128 if matrices >= 8 else 256


def integer_power(base, exponent, out=None):
    """`base ** exponent` for an integer >= 1, by squaring: `pow` is 8 times as slow.

    Args:
        out: where the result goes; may be `base` itself if the exponent is a power of two.
    """
    if exponent == 1:
        return base if out is None else out.copy_(base)
    power = base
    for bit in bin(exponent)[3:]:
        power = torch.mul(power, power, out=out)
        if bit == "1":
            power = torch.mul(power, base, out=out)
    return power


def blocked_attention(q, k, v, mass, law):
    """`gravity_attention` with checked arguments, on any device and in any precision."""
    # the operator chooses its own precisions
    with torch.autocast(q.device.type, enabled=False):
        return _BlockedGravity.apply(q, k, v, mass, *law)


class _BlockedGravity(torch.autograd.Function):
    """Both passes over the same tiles; tensors of a tile are recomputed, never saved."""

    @staticmethod
    def forward(ctx, q, k, v, mass, *law):
        law = Law(*law)
        out, total, visited = _forward_pass(PackedInputs(q, k, v, mass, law))
        ctx.fixed, ctx.visited = law.fixed, visited
        ctx.save_for_backward(q, k, v, mass, *law.learned, out, total)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        *inputs, out, total = ctx.saved_tensors
        with torch.autocast(grad_out.device.type, enabled=False):
            packed = PackedInputs(*inputs[:4], Law(*inputs[4:], *ctx.fixed))
            grads = _backward_pass(packed, grad_out, out, total, ctx.visited)
        given = [None if x is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True)]
        return *given, *(None for _ in ctx.fixed)


def _forward_pass(packed):
    """Every block of queries against its keys, newest first.

    Returns:
        `(out, total, visited)`: out (B, H, Tq, D); total, the sums of fields in packed order,
        (H * B, Tq, 1); visited, the tiles as `(first head, rows, columns)`.
    """
    height = tile_rows(packed.heads * packed.batch)
    num_queries, width = len(packed.tq), packed.value.shape[2]  # width: D + 1, the mass included
    # heads of a token side by side, as the next layer reads them
    shape = (packed.batch, num_queries, packed.heads, width - 1)
    out = torch.empty(shape, dtype=packed.out_dtype, device=packed.tq.device).transpose(1, 2)
    total = packed.probe.new_empty(len(packed.probe), num_queries, 1)
    background = TINY
    if packed.background is not None:
        background = packed.background.repeat_interleave(packed.batch).to(packed.dtype)[
            :, None, None
        ]
    visited = []
    for start in range(0, num_queries, height):
        rows = (start, min(start + height, num_queries))
        oldest, newest = (packed.query_positions[row] for row in (rows[0], rows[1] - 1))
        sums = packed.buffer("sums", (len(packed.probe), rows[1] - rows[0], width)).zero_()
        end = bisect.bisect_right(packed.key_positions, newest)
        begin = bisect.bisect_left(packed.key_positions, oldest - min(height, CHUNK_STEP))
        first = 0  # heads before it are done with this block
        while end > 0 and first < packed.heads:
            columns = (min(begin, end - 1), end)
            for heads in _head_groups(packed, first, rows, columns):
                _add_tile(packed, sums, heads, rows, columns)
            visited.append((first, rows, columns))
            end = columns[0]
            if end > 0:
                first, begin = _what_is_left(packed, sums, rows, end)
        row = slice(*rows)
        torch.add(sums[..., -1:], background, out=total[:, row])
        out[:, :, row] = packed.by_batch(sums[..., :-1].div_(total[:, row]))
    return out, total, visited


def _head_groups(packed, first, rows, columns):
    """Split the heads from `first` on so that a tile has about TILE_PAIRS pairs."""
    pairs = packed.batch * (rows[1] - rows[0]) * (columns[1] - columns[0])
    step = max(1, TILE_PAIRS // pairs)
    for start in range(first, packed.heads, step):
        yield start, min(start + step, packed.heads)


def _add_tile(packed, sums, heads, rows, columns):
    """Add a tile's `field @ (m v, m)` to the sums of its block, (H * B, rows, D + 1)."""
    inverse, rho = packed.inverse(heads, rows, columns)
    power_of_two = packed.exponent & (packed.exponent - 1) == 0
    out = inverse if power_of_two else packed.buffer("power", inverse.shape)
    field = integer_power(inverse, packed.exponent, out)  # of a unit mass
    if rho is not None:
        field = rho.square_().mul_(field)
    matrices = packed.matrices(heads)
    sums[matrices] += packed.value_product(field, packed.value[matrices, slice(*columns)])


def _what_is_left(packed, sums, rows, end):
    """What a block of queries must visit next.

    Returns:
        `(first, begin)`: heads before `first` are done, the others visit keys `begin` to `end`.
    """
    oldest = packed.query_positions[rows[0]]
    begins = [0] * packed.heads
    by_sum = packed.tolerance > 0 and packed.background is None
    if by_sum:  # what holds for the smallest sum of fields holds for all rows
        smallest = sums[..., -1].view(packed.heads, -1).amin(1).tolist()
    for head in range(packed.heads):
        window = packed.windows[head]
        if by_sum:
            proven = proven_window(
                *(smallest[head], packed.scales[head], packed.offsets[head]),
                *(packed.exponent, packed.max_mass, packed.tolerance),
            )
            window = min(window, proven)
        if window < math.inf:
            position = math.floor(oldest - window)
            begins[head] = bisect.bisect_left(packed.key_positions, position)
    first = next((head for head, begin in enumerate(begins) if begin < end), packed.heads)
    pairs = max(1, (packed.heads - first) * packed.batch * (rows[1] - rows[0]))
    steps = max(1, TILE_PAIRS // pairs // CHUNK_STEP)
    chunk = min(LONGEST_CHUNK, steps * CHUNK_STEP)
    return first, max(min(begins[first:], default=0), end - chunk)


def _backward_pass(packed, grad_out, out, total, visited):
    """Gradients from one recomputation of the tiles that the forward pass visited.

    The slope of a pair is dL/dr2. With time kept as two more columns of `source`, t and t^2, the
    product `slope @ source` holds all that gradients of queries, time_scale and time_offset need.

    Returns:
        Gradients of q, k, v, mass, time_scale, time_offset, radius and background.
    """
    coords, num_keys = packed.coords, len(packed.tk)
    matrices, num_queries, _ = packed.probe.shape
    d_probe = packed.probe.new_zeros(matrices, num_queries, coords + 4)
    d_source = packed.probe.new_zeros(matrices, coords + 2, num_keys)  # transposed
    d_value = packed.probe.new_zeros(matrices, num_keys, packed.value.shape[2])
    d_radius, d_background = (torch.zeros_like(packed.time_scale) for _ in range(2))
    lag = torch.empty(num_queries, dtype=packed.time_scale.dtype, device=out.device)
    for rows, tiles in itertools.groupby(visited, key=lambda tile: tile[1]):
        row = slice(*rows)
        grad_sums = _gradient_of_sums(packed, grad_out[:, :, row], out[:, :, row], total[:, row])
        d_background += wide(grad_sums[..., -1]).view(packed.heads, -1).sum(1)
        # moments are taken about the block's middle, so that they lose no digits late in a text
        middle = (packed.query_positions[rows[0]] + packed.query_positions[rows[1] - 1]) / 2
        lag[row] = packed.tq[row] - middle
        for first, _, columns in tiles:
            column = slice(*columns)
            t = (packed.tk[column] - middle).to(packed.dtype)
            moments = torch.stack([t, t * t], -1)  # (columns, 2)
            for heads in _head_groups(packed, first, rows, columns):
                block = packed.matrices(heads)
                weight, slope, in_radius = _slopes(packed, grad_sums[block], heads, rows, columns)
                d_value[block, column] += packed.value_product(weight.mT, grad_sums[block])
                source, probe = packed.source[block, column], packed.probe[block, row]
                source[..., coords + 2 :] = moments
                d_probe[block, row] += packed.product(slope, source)
                d_source[block, :, column] += packed.product(probe.mT, slope)
                if in_radius is not None:
                    d_radius[slice(*heads)] += in_radius
    sign = -1.0 if packed.cutoff == "soft" else -float(packed.exponent)
    d_probe *= sign
    d_time = _time_gradients(packed, d_probe, lag)
    # probe holds -2 q
    d_q = -packed.probe[..., :coords] * d_probe[..., coords, None] - 2 * d_probe[..., :coords]
    d_source = d_source.mul_(sign).mT  # (H * B, Tk, C + 2)
    d_k = 2 * packed.source[..., :coords] * d_source[..., -1:] + d_source[..., :coords]
    return (
        packed.by_batch(d_q),
        packed.by_batch(d_k),
        *_value_gradients(packed, d_value),
        *(packed.unsorted(x) for x in (*d_time, d_radius, d_background)),
    )


def _gradient_of_sums(packed, grad_out, out, total):
    """Gradient of a block's two sums, `field @ m v` and `field @ m`: `(g, -g.out) / total`.

    Returns:
        (H * B, rows, D + 1) in packed order and in the precision of values.
    """
    g, out = grad_out.transpose(1, 2), out.transpose(1, 2)  # as they lie in memory
    product = torch.mul(g, out, out=packed.buffer("product", g.shape))
    delta = product.sum(-1).permute(2, 0, 1)  # (H, B, rows)
    grad_sums = packed.buffer("grad_sums", (packed.heads, packed.batch, g.shape[1], g.shape[3] + 1))
    grad_sums[..., :-1] = packed.sorted(grad_out.transpose(0, 1))
    torch.neg(packed.sorted(delta), out=grad_sums[..., -1])
    return grad_sums.flatten(0, 1).div_(total).to(packed.value.dtype)


def _slopes(packed, grad_sums, heads, rows, columns):
    """The factors that a tile's gradients are computed from.

    Args:
        grad_sums: from `_gradient_of_sums`, (heads * B, rows, D + 1).

    Returns:
        `(weight, slope, d_radius)`: the field without the mass, and dL/dr2 up to a factor
        (-exponent, or -1 under the soft cutoff), both (heads * B, rows, columns); the radius'
        gradient under the soft cutoff, (heads,), else None.
    """
    inverse, rho = packed.inverse(heads, rows, columns)
    power = integer_power(inverse, packed.exponent, packed.buffer("power", inverse.shape))
    slope = packed.buffer("slope", inverse.shape)
    value = packed.value[packed.matrices(heads), slice(*columns)].mT
    if packed.value.dtype == packed.dtype:
        torch.bmm(grad_sums, value, out=slope)
    else:
        slope.copy_(torch.bmm(grad_sums, value))
    slope *= power
    if rho is None:
        slope *= inverse
        return power, slope, None
    slope *= rho
    weight = power.mul_(rho).mul_(rho)
    radius = packed.per_head(packed.radius, heads)
    by_head = (len(radius), packed.batch, *slope.shape[1:])
    edge = slope.view(by_head) * (1 - rho.view(by_head))
    d_radius = 4 / radius.flatten() * edge.sum((1, 2, 3))
    rho.mul_(inverse).mul_(packed.exponent).view(by_head).add_(2 / radius.square())
    return weight, slope.mul_(rho), d_radius


def _time_gradients(packed, d_probe, lag):
    """Gradients of time_scale and time_offset from moments of dL/dr2 over time, (H,) each.

    Args:
        lag: each query's position, counted from the origin of its row's moments, (Tq,).
    """
    moments = d_probe.view(packed.heads, packed.batch, len(lag), -1).to(lag.dtype).sum(1)
    zeroth, first, second = (moments[..., packed.coords + n] for n in (0, 2, 3))  # (H, Tq) each
    lag = lag - packed.time_offset[:, None]  # (H, Tq)
    moment1 = (lag * zeroth - first).sum(1)
    moment2 = (lag * (lag * zeroth - 2 * first) + second).sum(1)
    return 2 * packed.time_scale * moment2, -2 * packed.time_scale.square() * moment1


def _value_gradients(packed, d_value):
    """Gradients of v and mass from that of `(m v, m)`, (H * B, Tk, D + 1)."""
    by_batch = packed.by_batch(d_value).transpose(1, 2)  # (B, Tk, H, D + 1)
    d_v = by_batch[..., :-1] * packed.mass[..., None, None]
    d_mass = packed.by_batch((packed.value * d_value).sum(-1, keepdim=True))[..., 0].sum(1)
    return d_v.transpose(1, 2), d_mass / packed.mass.clamp(min=TINY)
