"""The blocked path of gravity attention: plain PyTorch, nothing of T x T is ever kept.

Query blocks meet key blocks from the newest to the oldest and stop where what is left provably
cannot matter; the backward pass recomputes the same tiles. `gravity.py` holds the formula.
"""

import torch

TINY = 1e-30  # added to every sum of fields: nothing in reach means output 0, never NaN
QUERY_BLOCK = 128
KEY_BLOCK = 256


def inverse_power(base, exponent):
    """`base ** -exponent` for an integer exponent >= 1, by squaring (pow costs 8 times as much)."""
    inverse = base.reciprocal()
    power = None
    while exponent:
        if exponent & 1:
            power = inverse if power is None else power * inverse
        exponent >>= 1
        if exponent:
            inverse = inverse * inverse
    return power


def reach(time_scale, time_offset, radius):
    """How many tokens back a head can feel anything: beyond it the field is exactly 0, (H,).

    `time_offset + radius / time_scale`, with one token of slack for rounding.
    """
    return time_offset + radius / time_scale + 1


def field_bound(time_scale, time_offset, exponent, max_mass, length):
    """What all sources older than `dt` can weigh together, whatever their coordinates are.

    Returns:
        (H, length) in float64: entry `dt` is
        `max_mass * sum_{d=dt+1..length-1} (1 + (time_scale*(d - time_offset))^2)^-exponent`,
        rounded up.
    """
    d = torch.arange(length, dtype=torch.float64, device=time_scale.device)
    time_term = (time_scale.double()[:, None] * (d - time_offset.double()[:, None])).square()
    field = inverse_power(1 + time_term, exponent)
    # summed from the far end and shifted: subtracting `field` would lose what is far below it
    older = torch.zeros_like(field)
    older[:, :-1] = field[:, 1:].flip(-1).cumsum(-1).flip(-1)
    return older * max_mass * (1 + 1e-6) + 1e-300


def blocked_attention(q, *args):
    """`gravity.gravity_attention` with checked arguments, in the order of `_BlockedGravity`."""
    # the operator chooses its own precisions
    with torch.autocast(q.device.type, enabled=False):
        return _BlockedGravity.apply(q, *args)


class _Heads:
    """The heads that still work on a query block; all of them are addressed without a copy."""

    def __init__(self, index, total):
        self.index = index
        self.all = len(index) == total

    def take(self, tensor, dim):
        return tensor if self.all else tensor.index_select(dim, self.index)

    def add(self, tensor, dim, part):
        if self.all:
            tensor += part
        else:
            tensor.index_add_(dim, self.index, part)


class _BlockedGravity(torch.autograd.Function):
    """Query blocks against key blocks, newest first; tiles are recomputed in the backward pass."""

    @staticmethod
    def forward(
        ctx, q, k, v, mass, time_scale, time_offset, radius, exponent, cutoff, tolerance, tq, tk
    ):
        accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
        state = _Tiles(q, k, mass, time_scale, time_offset, radius, exponent, cutoff, tq, tk)
        batch, heads, num_queries, _ = q.shape
        out = torch.zeros(batch, heads, num_queries, v.shape[-1], dtype=accumulate, device=q.device)
        total = torch.zeros(batch, heads, num_queries, dtype=accumulate, device=q.device)
        blocks = []
        bound = None
        if tolerance > 0 and len(tk) > KEY_BLOCK:
            span = int(tq[-1] - tk[0]) + 1
            bound = field_bound(time_scale, time_offset, exponent, float(mass.max()), span)
        heads_reach = state.reach()
        for rows in state.query_blocks():
            newest = int(torch.searchsorted(tk, tq[rows][-1], right=True))
            active = torch.arange(heads, device=q.device)
            kept = []
            end = newest
            while end > 0 and len(active):
                start = max(0, end - KEY_BLOCK)
                columns = slice(start, end)
                chosen = _Heads(active, heads)
                field = state.tile(rows, columns, chosen)[0]
                values = chosen.take(v[:, :, columns], 1)
                pull = (field.to(v.dtype) @ values).to(accumulate)
                chosen.add(out[:, :, rows], 1, pull)
                chosen.add(total[:, :, rows], 1, field.sum(-1))
                kept.append((columns, chosen))
                end = start
                if end > 0:
                    active = state.unfinished(
                        active, rows, end, total, bound, tolerance, heads_reach
                    )
            blocks.append((rows, kept))
        out /= total[..., None] + TINY
        ctx.state, ctx.blocks = state, blocks
        ctx.save_for_backward(v, out, total)
        return out.to(v.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        with torch.autocast(grad_out.device.type, enabled=False):
            return _blocked_backward(ctx, grad_out)


def _blocked_backward(ctx, grad_out):
    """Gradients by the formulas of one recomputation; the same pairs as in the forward pass."""
    state = ctx.state
    v, out, total = ctx.saved_tensors
    accumulate = out.dtype
    grad_out = grad_out.contiguous()
    delta = (grad_out.to(accumulate) * out).sum(-1)
    inverse_total = 1 / (total + TINY)
    p = state.exponent
    dq = torch.zeros_like(state.q, dtype=accumulate)
    dk = torch.zeros_like(state.k, dtype=accumulate)
    dv = torch.zeros_like(v, dtype=accumulate)
    dmass = torch.zeros_like(state.mass, dtype=accumulate)
    per_head = torch.zeros(3, v.shape[1], dtype=accumulate, device=v.device)
    for rows, kept in ctx.blocks:
        for columns, heads in kept:
            field, power, u, rho, lag = state.tile(rows, columns, heads, for_backward=True)
            g = heads.take(grad_out[:, :, rows], 1)
            weight = field * heads.take(inverse_total[:, :, rows], 1)[..., None]
            tile_dv = weight.to(v.dtype).transpose(-1, -2) @ g.to(v.dtype)
            heads.add(dv[:, :, columns], 1, tile_dv.to(accumulate))
            # dL/dfield, times total: what a pull brings above the mean pull
            gain = (g.to(v.dtype) @ heads.take(v[:, :, columns], 1).transpose(-1, -2)).to(
                accumulate
            )
            gain -= heads.take(delta[:, :, rows], 1)[..., None]
            gain *= heads.take(inverse_total[:, :, rows], 1)[..., None]
            gain *= power
            mass = state.mass[:, None, None, columns]
            if state.cutoff == "soft":
                inverse_radius = 1 / heads.take(state.radius, 0)[:, None, None]
                edge = gain * rho  # one factor of rho: the cutoff is rho^2
                dmass[:, columns] += (edge * rho).sum((1, 2))
                edge *= mass
                slope = -p * edge * rho / u - 2 * edge * inverse_radius.square()
                r2 = u - 1
                dradius = (4 * edge * r2).sum((0, 2, 3)) * inverse_radius[:, 0, 0] ** 3
                heads.add(per_head[2], 0, dradius)
            else:
                dmass[:, columns] += gain.sum((1, 2))
                slope = -p * gain * mass / u
            q, k = heads.take(state.q[:, :, rows], 1), heads.take(state.k[:, :, columns], 1)
            low = slope.to(q.dtype)
            tile_dq = slope.sum(-1)[..., None] * q - (low @ k).to(accumulate)
            tile_dk = slope.sum(-2)[..., None] * k - (low.transpose(-1, -2) @ q).to(accumulate)
            heads.add(dq[:, :, rows], 1, 2 * tile_dq)
            heads.add(dk[:, :, columns], 1, 2 * tile_dk)
            slope = slope.sum(0)  # (H, rows, columns)
            scale = heads.take(state.time_scale, 0)
            heads.add(per_head[0], 0, 2 * scale * (slope * lag * lag).sum((1, 2)))
            heads.add(per_head[1], 0, -2 * scale * scale * (slope * lag).sum((1, 2)))
    dtypes = state.input_dtypes
    grads = [dq, dk, dv, dmass, *per_head]
    grads = [grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=False)]
    if state.cutoff != "soft":
        grads[6] = None
    return (*grads, None, None, None, None, None)


class _Tiles:
    """Everything that a tile of the field is computed from."""

    def __init__(self, q, k, mass, time_scale, time_offset, radius, exponent, cutoff, tq, tk):
        accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
        # r2 does not change, but |q|^2 + |k|^2 - 2 q.k loses fewer digits near the origin
        centre = k.mean(2, keepdim=True, dtype=accumulate)
        self.q, self.k = (q - centre).to(q.dtype), (k - centre).to(k.dtype)
        self.q2 = self.q.to(accumulate).square().sum(-1)
        self.k2 = self.k.to(accumulate).square().sum(-1)
        self.mass = mass.to(accumulate)
        self.time_scale, self.time_offset = time_scale.to(accumulate), time_offset.to(accumulate)
        self.radius = None if radius is None else radius.to(accumulate)
        self.exponent, self.cutoff = exponent, cutoff
        self.tq, self.tk = tq, tk
        scalar = time_scale.dtype
        radius_dtype = scalar if radius is None else radius.dtype
        self.input_dtypes = (q.dtype, k.dtype, q.dtype, mass.dtype, scalar, scalar, radius_dtype)

    def query_blocks(self):
        for start in range(0, len(self.tq), QUERY_BLOCK):
            yield slice(start, min(start + QUERY_BLOCK, len(self.tq)))

    def reach(self):
        """Tokens back that each head can feel, (H,), or None without a radius."""
        if self.radius is None:
            return None
        return reach(self.time_scale.double(), self.time_offset.double(), self.radius.double())

    def unfinished(self, active, rows, end, total, bound, tolerance, heads_reach):
        """Those of the active heads that the keys before `end` may still matter to."""
        t_rows, t_oldest_kept = self.tq[rows], self.tk[end]
        needed = torch.ones(len(active), dtype=torch.bool, device=active.device)
        if heads_reach is not None:
            newest_dropped = self.tk[end - 1]
            needed &= heads_reach[active] >= (t_rows[0] - newest_dropped)
        if bound is not None:
            age = (t_rows - t_oldest_kept).clamp(min=0)
            tail = bound[active][:, age]  # (heads, rows)
            summed = total[:, active, rows].double().amin(0)
            done = (summed > 0) & (tail <= tolerance * summed) & (t_rows >= t_oldest_kept)
            needed &= ~done.all(-1)
        return active[needed]

    def tile(self, rows, columns, heads, for_backward=False):
        """Fields of `columns` at `rows`, (B, heads, rows, columns), and what gradients need."""
        q, k = heads.take(self.q[:, :, rows], 1), heads.take(self.k[:, :, columns], 1)
        q2, k2 = heads.take(self.q2[:, :, rows], 1), heads.take(self.k2[:, :, columns], 1)
        scale = heads.take(self.time_scale, 0)[:, None, None]
        offset = heads.take(self.time_offset, 0)[:, None, None]
        distance = self.tq[rows][:, None] - self.tk[columns][None, :]
        lag = distance.to(self.mass.dtype) - offset  # (heads, rows, columns)
        u = (q @ k.transpose(-1, -2)).to(self.mass.dtype).mul_(-2)
        u += q2[..., None]
        u += k2[:, :, None, :]
        # rounding must not bring a token nearer than its time alone allows: the bound rests on it
        u.clamp_(min=0)
        u += (scale * lag).square_().add_(1)
        power = inverse_power(u, self.exponent)
        if self.tq[rows.start] < self.tk[columns.stop - 1]:
            power = power.masked_fill_(distance < 0, 0)
        rho = None
        if self.cutoff == "hard":
            radius = heads.take(self.radius, 0)[:, None, None]
            power = power.masked_fill_(u - 1 > radius.square(), 0)
        field = power * self.mass[:, None, None, columns]
        if self.cutoff == "soft":
            radius = heads.take(self.radius, 0)[:, None, None]
            rho = torch.relu(1 - (u - 1) / radius.square())
            field *= rho.square()
        return (field, power, u, rho, lag) if for_backward else (field,)
