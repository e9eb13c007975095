"""The blocked path of gravity attention: plain PyTorch, nothing of T x T is ever kept.

A block of queries meets its newest keys first; what those pull decides how far back each head must
still look, because what is older provably cannot matter. The backward pass recomputes the same
tiles. `gravity.py` holds the formula. Inputs are packed once, heads sorted from the shortest window
to the longest: those that still look on are always the last ones, addressed without a copy.

Letters as in `gravity.py`; a pair is one query and one key of one head.
"""

import bisect
import itertools
import math

import torch

from gravity.law import TINY, Law, proven_window, reach
from system.machine import cpu_multiplies_bf16

TILE_PAIRS = 1 << 18  # pairs computed at once: three fp32 buffers of that size stay near the L2
CHUNK_STEP, LONGEST_CHUNK = 64, 1024  # keys that a block of queries meets at once


def tile_rows(matrices):
    """Queries of a block, for so many (batch, head) matrices: few matrices make taller tiles."""
    return 64 if matrices >= 16 else 128 if matrices >= 8 else 256


def integer_power(base, exponent, out=None):
    """`base ** exponent` for an integer >= 1, by squaring (pow costs 8 times as much).

    Args:
        out: where to; may be `base` itself where the exponent is a power of two.
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
    """`gravity.gravity_attention` with checked arguments."""
    # the operator chooses its own precisions
    with torch.autocast(q.device.type, enabled=False):
        return _BlockedGravity.apply(q, k, v, mass, *law)


class _BlockedGravity(torch.autograd.Function):
    """Both passes over the same tiles; tensors of a tile are recomputed, never saved."""

    @staticmethod
    def forward(ctx, q, k, v, mass, *law):
        law = Law(*law)
        out, total, visited = _Tiles(q, k, v, mass, law).pull()
        ctx.fixed, ctx.visited = law.fixed, visited
        ctx.save_for_backward(q, k, v, mass, *law.learned, out, total)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        *inputs, out, total = ctx.saved_tensors
        with torch.autocast(grad_out.device.type, enabled=False):
            tiles = _Tiles(*inputs[:4], Law(*inputs[4:], *ctx.fixed))
            grads = tiles.gradients(grad_out, out, total, ctx.visited)
        given = [None if x is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True)]
        return *given, *(None for _ in ctx.fixed)


class _Tiles:
    """All that a tile is computed from, packed so that a tile is a few matrix products.

    `probe @ source^T` is 1 plus the spatial part of r2:
    `(-2 q, |q|^2 + 1, 1) . (k, 1, |k|^2)`; source has two more columns, for the moments of time
    that gradients need. `value` is `(m v, m)`: its products are the pull and the sum of fields.
    """

    def __init__(self, q, k, v, mass, law):
        self.real = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.batch, self.heads, _, self.coords = q.shape
        self.exponent, self.cutoff, self.tolerance = law.exponent, law.cutoff, law.tolerance
        self.time_scale, self.time_offset = law.time_scale.double(), law.time_offset.double()
        self.order = torch.argsort(self.time_offset + 1 / self.time_scale)
        self.is_sorted = bool((self.order[1:] > self.order[:-1]).all())
        self.radius = None if law.radius is None else self._sorted(law.radius.double())
        self.time_scale, self.time_offset = map(self._sorted, (self.time_scale, self.time_offset))
        self._pack_points(q, k)
        self._pack_values(v, mass)
        self._prepare_time(law.query_positions, law.key_positions)
        self.weakest = self._weakest()
        self._buffers = {}

    def _sorted(self, by_head):
        return by_head if self.is_sorted else by_head[self.order]

    def _unsorted(self, by_head):
        return by_head if self.is_sorted else by_head[torch.argsort(self.order)]

    def _packed(self, tokens, width, dtype):
        shape = (self.heads, self.batch, tokens, width)
        return torch.empty(shape, dtype=dtype, device=self.order.device)

    def _pack_points(self, q, k):
        coords, real = self.coords, self.real
        # r2 does not change, but |q|^2 + |k|^2 - 2 q.k loses fewer digits near the origin
        centre = k.mean(2, keepdim=True, dtype=real)
        probe, q2 = self._centred(q, centre, 2)
        source, k2 = self._centred(k, centre, 4)
        probe[..., :coords] *= -2
        torch.add(q2, 1, out=probe[..., coords : coords + 1])
        probe[..., coords + 1] = 1
        source[..., coords] = 1
        source[..., coords + 1 : coords + 2] = k2
        self.probe, self.source = probe.flatten(0, 1), source.flatten(0, 1)
        farthest = q2.amax((1, 2, 3)).sqrt() + k2.amax((1, 2, 3)).sqrt()
        self.largest_distance2 = farthest.double().square().tolist()
        # rounding must not bring a token much nearer than its time alone allows
        self.must_clamp = not max(self.largest_distance2) * torch.finfo(real).eps < 1e-4

    def _centred(self, points, centre, extra):
        """Packed points with room for more columns, (H, B, T, C + extra), and |point|^2."""
        points, centre = (self._sorted(x.transpose(0, 1)) for x in (points, centre))
        packed = self._packed(points.shape[2], self.coords + extra, self.real)
        points = torch.sub(points, centre, out=packed[..., : self.coords])
        return packed, (points * points) @ points.new_ones(self.coords, 1)

    def _pack_values(self, v, mass):
        fast_bf16 = v.is_cuda or cpu_multiplies_bf16()
        self.matrix = torch.bfloat16 if v.dtype == torch.bfloat16 and fast_bf16 else self.real
        self.out_dtype = v.dtype
        self.max_mass, self.mass = float(mass.max()), mass.to(self.real)
        value = self._packed(v.shape[2], v.shape[3] + 1, self.matrix)
        value[..., -1] = self.mass
        # with the mass in the same type, so that products are rounded once
        torch.mul(self._sorted(v.transpose(0, 1)), value[..., -1:], out=value[..., :-1])
        self.value = value.flatten(0, 1)

    def _weakest(self):
        """1 / (1 + r2) below which a head feels nothing: a hard radius, or denormals, a list."""
        tiny, rounding = (1e-36, 1e-7) if self.real == torch.float32 else (1e-300, 1e-15)
        weakest = tiny ** (1 / self.exponent)
        if self.cutoff != "hard":
            return [weakest] * self.heads
        return [max(weakest, (1 - rounding) / (1 + r * r)) for r in self.radius.tolist()]

    def _prepare_time(self, tq, tk):
        """Positions, and for consecutive ones the table of all time terms."""
        self.tq, self.tk = tq, tk
        self.query_positions, self.key_positions = tq.tolist(), tk.tolist()
        self.scales, self.offsets = self.time_scale.tolist(), self.time_offset.tolist()
        self.windows = None
        if self.radius is not None:
            self.windows = reach(self.time_scale, self.time_offset, self.radius).tolist()
        oldest_query, newest_query = self.query_positions[0], self.query_positions[-1]
        oldest, newest = self.key_positions[0], self.key_positions[-1]
        spans = (newest_query - oldest_query + 1, newest - oldest + 1)
        self.consecutive = spans == (len(tq), len(tk))
        if self.consecutive:
            lags = torch.arange(newest_query - oldest, oldest_query - newest - 1, -1)
            self.time_table = self._time_term(lags.to(tq.device))  # (H, Tq + Tk - 1)
            self.time_tiles = {}

    def _time_term(self, lag):
        """`(time_scale * (lag - time_offset))^2`, inf for what is yet to come, (H, *lag.shape)."""
        shape = (-1,) + (1,) * lag.dim()
        term = (self.time_scale.view(shape) * (lag - self.time_offset.view(shape))).square()
        return term.masked_fill_(lag < 0, math.inf).to(self.real)

    def _time_tile(self, heads, rows, columns):
        """The time term of a tile, broadcast over the batch: (heads, 1, rows, columns)."""
        first, last = heads
        height, width = rows[1] - rows[0], columns[1] - columns[0]
        if not self.consecutive:
            lag = self.tq[slice(*rows), None] - self.tk[None, slice(*columns)]
            return self._time_term(lag)[first:last, None]
        key = (first, last, rows[0] - columns[0], height, width)
        if key not in self.time_tiles:
            length = self.time_table.shape[1]
            start = first * length + len(self.tq) - rows[1] + columns[0]
            shape, strides = (last - first, height, width), (length, 1, 1)
            # the table read one further for every row upwards
            upwards = self.time_table.as_strided(shape, strides, start)
            order = torch.arange(height - 1, -1, -1, device=self.tq.device)
            if len(self.time_tiles) >= 16:
                self.time_tiles.clear()
            self.time_tiles[key] = upwards.index_select(1, order)[:, None]
        return self.time_tiles[key]

    def _head_groups(self, first, rows, columns):
        """Split the heads from `first` on so that a tile has about TILE_PAIRS pairs."""
        pairs = self.batch * (rows[1] - rows[0]) * (columns[1] - columns[0])
        step = max(1, TILE_PAIRS // pairs)
        for start in range(first, self.heads, step):
            yield start, min(start + step, self.heads)

    def _matrices(self, heads):
        return slice(heads[0] * self.batch, heads[1] * self.batch)

    def _buffer(self, name, shape):
        """Memory of that shape, the same for every tile so that it stays in the cache."""
        size = math.prod(shape)
        flat = self._buffers.get(name)
        if flat is None or len(flat) < size:
            flat = self._buffers[name] = self.probe.new_empty(size)
        return flat[:size].view(shape)

    def inverse(self, heads, rows, columns):
        """`1 / (1 + r2)` of a tile, (heads * B, rows, columns), 0 where nothing is felt; and the
        soft cutoff's `relu(1 - r2/radius^2)`, shaped alike, or None."""
        block = self._matrices(heads)
        probe = self.probe[block, slice(*rows)]
        source = self.source[block, slice(*columns), : self.coords + 2]
        u = self._buffer("inverse", (len(probe), probe.shape[1], source.shape[1]))
        torch.bmm(probe, source.transpose(1, 2), out=u)
        if self.must_clamp:
            u.clamp_(min=1)
        by_head = u.view(-1, self.batch, *u.shape[1:])
        by_head += self._time_tile(heads, rows, columns)
        rho = None
        if self.cutoff == "soft":
            steepness = self._per_head(self.radius, heads).square().reciprocal()
            rho = self._buffer("rho", u.shape)
            torch.mul(by_head, -steepness, out=rho.view_as(by_head))
            rho.view_as(by_head).add_(1 + steepness)
            rho.clamp_(min=0)
        u.reciprocal_()
        self._cut(by_head, heads, rows, columns)
        return u, rho

    def _per_head(self, values, heads):
        return values[slice(*heads)].to(self.real)[:, None, None, None]

    def _cut(self, inverse, heads, rows, columns):
        """Set to 0 what is weaker than `weakest`, in the heads where the tile may hold such."""
        age = self.query_positions[rows[1] - 1] - self.key_positions[columns[0]]
        for head in range(*heads):
            lag = max(abs(age - self.offsets[head]), abs(self.offsets[head]))
            largest = 1 + self.largest_distance2[head] + (self.scales[head] * lag) ** 2
            if not largest * self.weakest[head] < 0.999:
                torch.threshold_(inverse[head - heads[0]], self.weakest[head], 0.0)

    def _product(self, a, b, name="product"):
        """Batched matrix product in the precision of values; the result lives in a buffer."""
        if self.matrix != self.real:
            return torch.bmm(a.to(self.matrix), b.to(self.matrix))
        return torch.bmm(a, b, out=self._buffer(name, (len(a), a.shape[1], b.shape[2])))

    def pull(self):
        """Forward.

        Returns:
            `(out, total, visited)`: out (B, H, Tq, D), total (H, B, Tq, 1), the sums of fields
            in packed order; visited, the tiles as `(first head, rows, columns)`.
        """
        height = tile_rows(self.heads * self.batch)
        num_queries, width = len(self.tq), self.value.shape[2]
        # heads of a token side by side, as the next layer reads them
        shape = (self.batch, num_queries, self.heads, width - 1)
        out = torch.empty(shape, dtype=self.out_dtype, device=self.probe.device).transpose(1, 2)
        total = self.probe.new_empty(len(self.probe), num_queries, 1)
        visited = []
        for start in range(0, num_queries, height):
            rows = (start, min(start + height, num_queries))
            oldest, newest = (self.query_positions[row] for row in (rows[0], rows[1] - 1))
            sums = self._buffer("sums", (len(self.probe), rows[1] - rows[0], width)).zero_()
            end = bisect.bisect_right(self.key_positions, newest)
            begin = bisect.bisect_left(self.key_positions, oldest - min(height, CHUNK_STEP))
            first = 0
            while end > 0 and first < self.heads:
                columns = (min(begin, end - 1), end)
                for heads in self._head_groups(first, rows, columns):
                    self._pull_tile(sums, heads, rows, columns)
                visited.append((first, rows, columns))
                end = columns[0]
                if end > 0:
                    first, begin = self._what_is_left(sums, rows, end)
            row = slice(*rows)
            torch.add(sums[..., -1:], TINY, out=total[:, row])
            pull = sums[..., :-1].div_(total[:, row])
            out[:, :, row] = self._by_batch(pull)
        return out, total, visited

    def _by_batch(self, packed):
        """(H * B, T, C) in sorted order to (B, H, T, C)."""
        by_head = packed.view(self.heads, self.batch, *packed.shape[1:])
        return self._unsorted(by_head).transpose(0, 1)

    def _pull_tile(self, sums, heads, rows, columns):
        inverse, rho = self.inverse(heads, rows, columns)
        power_of_two = self.exponent & (self.exponent - 1) == 0
        out = inverse if power_of_two else self._buffer("power", inverse.shape)
        field = integer_power(inverse, self.exponent, out)
        if rho is not None:
            field = rho.square_().mul_(field)
        matrices = self._matrices(heads)
        sums[matrices] += self._product(field, self.value[matrices, slice(*columns)])

    def _what_is_left(self, sums, rows, end):
        """The first head that must look at what is before `end`, and from where on."""
        oldest = self.query_positions[rows[0]]
        begins = [0] * self.heads
        smallest = None
        if self.tolerance > 0:
            smallest = sums[..., -1].view(self.heads, -1).amin(1).tolist()
        for head in range(self.heads):
            window = math.inf if self.windows is None else self.windows[head]
            if self.tolerance > 0:
                proven = proven_window(
                    *(smallest[head], self.scales[head], self.offsets[head]),
                    *(self.exponent, self.max_mass, self.tolerance),
                )
                window = min(window, proven)
            if window < math.inf:
                position = math.floor(oldest - window)
                begins[head] = bisect.bisect_left(self.key_positions, position)
        first = next((head for head, begin in enumerate(begins) if begin < end), self.heads)
        pairs = max(1, (self.heads - first) * self.batch * (rows[1] - rows[0]))
        steps = max(1, TILE_PAIRS // pairs // CHUNK_STEP)
        chunk = min(LONGEST_CHUNK, steps * CHUNK_STEP)
        return first, max(min(begins[first:], default=0), end - chunk)

    def gradients(self, grad_out, out, total, visited):
        """Backward, by the formulas of one recomputation over the same tiles.

        Returns:
            Gradients of q, k, v, mass, time_scale, time_offset and radius.
        """
        coords, num_keys, real = self.coords, len(self.tk), self.real
        matrices, num_queries, _ = self.probe.shape
        d_probe = self.probe.new_zeros(matrices, num_queries, coords + 4)
        d_source = self.source.new_zeros(matrices, coords + 2, num_keys)
        d_value = self.source.new_zeros(matrices, num_keys, self.value.shape[2])
        d_radius = torch.zeros_like(self.time_scale)
        lag = torch.empty(num_queries, dtype=torch.float64, device=out.device)
        for rows, tiles in itertools.groupby(visited, key=lambda tile: tile[1]):
            row = slice(*rows)
            push = self._push(grad_out[:, :, row], out[:, :, row], total[:, row])
            middle = (self.query_positions[rows[0]] + self.query_positions[rows[1] - 1]) / 2
            lag[row] = self.tq[row] - middle
            for first, _, columns in tiles:
                column = slice(*columns)
                t = (self.tk[column] - middle).to(real)
                moments = torch.stack([t, t * t], -1)
                for heads in self._head_groups(first, rows, columns):
                    block = self._matrices(heads)
                    weight, slope, in_radius = self._slopes(push[block], heads, rows, columns)
                    d_value[block, column] += self._product(weight.mT, push[block])
                    source, probe = self.source[block, column], self.probe[block, row]
                    source[..., coords + 2 :] = moments
                    d_probe[block, row] += self._real_product(slope, source)
                    d_source[block, :, column] += self._real_product(probe.mT, slope)
                    if in_radius is not None:
                        d_radius[slice(*heads)] += in_radius
        sign = -1.0 if self.cutoff == "soft" else -float(self.exponent)
        d_probe *= sign
        d_time = self._time_gradients(d_probe, lag)
        # probe holds -2 q
        d_q = -self.probe[..., :coords] * d_probe[..., coords, None] - 2 * d_probe[..., :coords]
        d_source = d_source.mul_(sign).mT
        d_k = 2 * self.source[..., :coords] * d_source[..., -1:] + d_source[..., :coords]
        per_head = (self._unsorted(x) for x in (*d_time, d_radius))
        return (
            self._by_batch(d_q),
            self._by_batch(d_k),
            *self._value_gradients(d_value),
            *per_head,
        )

    def _real_product(self, a, b):
        return torch.bmm(a, b, out=self._buffer("product", (len(a), a.shape[1], b.shape[2])))

    def _push(self, grad_out, out, total):
        """Gradient of the sums `(pull, field)` of a block: `(g, -g.out) / total`."""
        g, out = grad_out.transpose(1, 2), out.transpose(1, 2)  # as they lie in memory
        product = torch.mul(g, out, out=self._buffer("product", g.shape))
        delta = product.sum(-1).permute(2, 0, 1)
        push = self._buffer("push", (self.heads, self.batch, g.shape[1], g.shape[3] + 1))
        push[..., :-1] = self._sorted(grad_out.transpose(0, 1))
        torch.neg(self._sorted(delta), out=push[..., -1])
        return push.flatten(0, 1).div_(total).to(self.matrix)

    def _slopes(self, push, heads, rows, columns):
        """What a tile's gradients are made of.

        Returns:
            `(weight, slope, d_radius)`: the field without the mass, and dL/dr2 up to a factor,
            both (heads * B, rows, columns); the radius' gradient under the soft cutoff, or None.
        """
        inverse, rho = self.inverse(heads, rows, columns)
        power = integer_power(inverse, self.exponent, self._buffer("power", inverse.shape))
        slope = self._buffer("slope", inverse.shape)
        value = self.value[self._matrices(heads), slice(*columns)].mT
        if self.matrix == self.real:
            torch.bmm(push, value, out=slope)
        else:
            slope.copy_(torch.bmm(push, value))
        slope *= power
        if rho is None:
            slope *= inverse
            return power, slope, None
        slope *= rho
        weight = power.mul_(rho).mul_(rho)
        radius = self._per_head(self.radius, heads)
        by_head = (len(radius), self.batch, *slope.shape[1:])
        edge = slope.view(by_head) * (1 - rho.view(by_head))
        d_radius = 4 / radius.flatten() * edge.sum((1, 2, 3))
        rho.mul_(inverse).mul_(self.exponent).view(by_head).add_(2 / radius.square())
        return weight, slope.mul_(rho), d_radius

    def _time_gradients(self, d_probe, lag):
        """Gradients of time_scale and time_offset from moments of dL/dr2 over time, (H,) each.

        Args:
            lag: from the origin of its row's moments to a query, (Tq,).
        """
        moments = d_probe.view(self.heads, self.batch, len(lag), -1).double().sum(1)  # over batch
        zeroth, first, second = (moments[..., self.coords + n] for n in (0, 2, 3))
        lag = lag - self.time_offset[:, None]  # (H, Tq)
        moment1 = (lag * zeroth - first).sum(1)
        moment2 = (lag * (lag * zeroth - 2 * first) + second).sum(1)
        return 2 * self.time_scale * moment2, -2 * self.time_scale.square() * moment1

    def _value_gradients(self, d_value):
        """Gradients of v and mass from that of `(m v, m)`, (H * B, Tk, D + 1)."""
        by_batch = self._by_batch(d_value).transpose(1, 2)  # (B, Tk, H, D + 1)
        d_v = by_batch[..., :-1] * self.mass[..., None, None]
        d_mass = self._by_batch((self.value * d_value).sum(-1, keepdim=True))[..., 0].sum(1)
        return d_v.transpose(1, 2), d_mass / self.mass.clamp(min=TINY)
