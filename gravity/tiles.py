"""Inputs of the blocked path, packed so that a tile of pairs is a few matrix products.

A pair is one query and one key of one head. A tile holds the pairs of a block of queries with a
block of keys, for some neighbouring heads; its ranges of heads, rows (queries) and columns (keys)
are given as `(first, end)`. Letters in shapes as in `law.py`.
"""

import math

import torch

from gravity.law import wide, windows
from system.machine import cpu_multiplies_bf16


class PackedInputs:
    """q, k, v, mass and the law in the layout of the tiles, and one tile's `1 / (1 + r2)`.

    `probe @ source^T` is 1 plus the spatial part of r2, because
    `(-2 q, |q|^2 + 1, 1) . (k, 1, |k|^2) = 1 + |q - k|^2`. `value` is `(m v, m)`, so that one
    product with the fields gives the sum of values and the sum of fields.

    Heads are sorted from the shortest window to the longest: those that still have keys to visit
    are always the last ones, addressed without a copy.
    """

    def __init__(self, q, k, v, mass, law):
        # the precision of distances, fields and sums; values may have less, see `_pack_values`
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.batch, self.heads, _, self.coords = q.shape
        self.exponent, self.cutoff, self.tolerance = law.exponent, law.cutoff, law.tolerance
        self.time_scale, self.time_offset = wide(law.time_scale), wide(law.time_offset)
        # `proven_window` is time_offset plus a part that grows about as 1 / time_scale
        self.order = torch.argsort(self.time_offset + 1 / self.time_scale)  # (H,)
        self.is_sorted = bool((self.order[1:] > self.order[:-1]).all())
        self.radius = None if law.radius is None else self.sorted(wide(law.radius))
        self.background = None if law.background is None else self.sorted(wide(law.background))
        self.time_scale, self.time_offset = map(self.sorted, (self.time_scale, self.time_offset))
        self._pack_points(q, k)
        self._pack_values(v, mass)
        # how many tokens back each head must look, if that is known already
        self.windows = self.sorted(windows(law, self.max_mass)).tolist()
        self._prepare_time(law.query_positions, law.key_positions)
        self.weakest = self._weakest()
        self._buffers = {}

    def sorted(self, by_head):
        """A tensor (H, ...) with its heads in packed order."""
        return by_head if self.is_sorted else by_head[self.order]

    def unsorted(self, by_head):
        """A packed tensor (H, ...) with its heads in the order in which they were given."""
        return by_head if self.is_sorted else by_head[torch.argsort(self.order)]

    def by_batch(self, packed):
        """(H * B, T, C) in packed order to (B, H, T, C)."""
        by_head = packed.view(self.heads, self.batch, *packed.shape[1:])
        return self.unsorted(by_head).transpose(0, 1)

    def matrices(self, heads):
        """The slice of packed (H * B) matrices that belong to a range of heads."""
        return slice(heads[0] * self.batch, heads[1] * self.batch)

    def per_head(self, values, heads):
        """One number per head, (H,), to broadcast over a tile, (heads, 1, 1, 1)."""
        return values[slice(*heads)].to(self.dtype)[:, None, None, None]

    def buffer(self, name, shape):
        """Memory of that shape, the same for every tile so that it stays in the cache."""
        size = math.prod(shape)
        flat = self._buffers.get(name)
        if flat is None or len(flat) < size:
            flat = self._buffers[name] = self.probe.new_empty(size)
        return flat[:size].view(shape)

    def product(self, a, b):
        """Batched matrix product; the result lives in a buffer."""
        return torch.bmm(a, b, out=self.buffer("product", (len(a), a.shape[1], b.shape[2])))

    def value_product(self, a, b):
        """Batched matrix product in the precision of values."""
        if self.value.dtype != self.dtype:
            return torch.bmm(a.to(self.value.dtype), b.to(self.value.dtype))
        return self.product(a, b)

    def inverse(self, heads, rows, columns):
        """`1 / (1 + r2)` of a tile, and the root of the soft cutoff's factor.

        Returns:
            `(inverse, rho)`, both (heads * B, rows, columns): inverse is 0 if the field is 0; rho
            is `relu(1 - r2/radius^2)` under the soft cutoff, else None.
        """
        block = self.matrices(heads)
        probe = self.probe[block, slice(*rows)]  # (heads * B, rows, C + 2)
        source = self.source[block, slice(*columns), : self.coords + 2]
        u = self.buffer("inverse", (len(probe), probe.shape[1], source.shape[1]))
        torch.bmm(probe, source.transpose(1, 2), out=u)  # 1 + |q - k|^2
        if self.must_clamp:
            u.clamp_(min=1)
        by_head = u.view(-1, self.batch, *u.shape[1:])  # (heads, B, rows, columns)
        by_head += self._time_tile(heads, rows, columns)  # 1 + r2
        rho = None
        if self.cutoff == "soft":
            steepness = self.per_head(self.radius, heads).square().reciprocal()
            rho = self.buffer("rho", u.shape)
            torch.mul(by_head, -steepness, out=rho.view_as(by_head))
            rho.view_as(by_head).add_(1 + steepness)
            rho.clamp_(min=0)
        u.reciprocal_()
        self._cut(by_head, heads, rows, columns)
        return u, rho

    def _cut(self, inverse, heads, rows, columns):
        """Set to 0 what is below `weakest`, in the heads whose tile may hold such pairs."""
        age = self.query_positions[rows[1] - 1] - self.key_positions[columns[0]]
        for head in range(*heads):
            lag = max(abs(age - self.offsets[head]), abs(self.offsets[head]))
            largest = 1 + self.largest_distance2[head] + (self.scales[head] * lag) ** 2
            # 0.999 leaves room for rounding; `not <` is true for NaN as well
            if not largest * self.weakest[head] < 0.999:
                torch.threshold_(inverse[head - heads[0]], self.weakest[head], 0.0)

    def _empty(self, tokens, width, dtype):
        shape = (self.heads, self.batch, tokens, width)
        return torch.empty(shape, dtype=dtype, device=self.order.device)

    def _pack_points(self, q, k):
        coords = self.coords
        # r2 does not change, but |q|^2 + |k|^2 - 2 q.k loses fewer digits near the origin
        centre = k.mean(2, keepdim=True, dtype=self.dtype)  # (B, H, 1, C)
        probe, q2 = self._centred(q, centre, 2)
        source, k2 = self._centred(k, centre, 4)  # the backward pass fills the last two columns
        probe[..., :coords] *= -2
        torch.add(q2, 1, out=probe[..., coords : coords + 1])
        probe[..., coords + 1] = 1
        source[..., coords] = 1
        source[..., coords + 1 : coords + 2] = k2
        self.probe = probe.flatten(0, 1)  # (H * B, Tq, C + 2)
        self.source = source.flatten(0, 1)  # (H * B, Tk, C + 4)
        farthest = q2.amax((1, 2, 3)).sqrt() + k2.amax((1, 2, 3)).sqrt()  # (H,)
        self.largest_distance2 = wide(farthest).square().tolist()
        # rounding must not bring a token much nearer than its time alone allows
        self.must_clamp = not max(self.largest_distance2) * torch.finfo(self.dtype).eps < 1e-4

    def _centred(self, points, centre, extra):
        """Packed points with `extra` empty columns, (H, B, T, C + extra), and |point|^2."""
        points, centre = (self.sorted(x.transpose(0, 1)) for x in (points, centre))
        packed = self._empty(points.shape[2], self.coords + extra, self.dtype)
        points = torch.sub(points, centre, out=packed[..., : self.coords])
        return packed, (points * points) @ points.new_ones(self.coords, 1)

    def _pack_values(self, v, mass):
        fast_bf16 = v.is_cuda or cpu_multiplies_bf16()
        dtype = torch.bfloat16 if v.dtype == torch.bfloat16 and fast_bf16 else self.dtype
        self.out_dtype = v.dtype
        self.max_mass, self.mass = float(mass.max()), mass.to(self.dtype)
        value = self._empty(v.shape[2], v.shape[3] + 1, dtype)
        value[..., -1] = self.mass
        # with the mass in the same type, so that products are rounded once
        torch.mul(self.sorted(v.transpose(0, 1)), value[..., -1:], out=value[..., :-1])
        self.value = value.flatten(0, 1)  # (H * B, Tk, D + 1)

    def _weakest(self):
        """`1 / (1 + r2)` below which the field is set to 0, a list with one number per head.

        Below it a pair is beyond the hard radius, or its power would be a denormal number, which
        is slow.
        """
        tiny, rounding = (1e-36, 1e-7) if self.dtype == torch.float32 else (1e-300, 1e-15)
        weakest = tiny ** (1 / self.exponent)
        if self.cutoff != "hard":
            return [weakest] * self.heads
        return [max(weakest, (1 - rounding) / (1 + r * r)) for r in self.radius.tolist()]

    def _prepare_time(self, tq, tk):
        """Positions, and for consecutive positions the table of all time terms."""
        self.tq, self.tk = tq, tk  # (Tq,), (Tk,)
        self.query_positions, self.key_positions = tq.tolist(), tk.tolist()
        self.scales, self.offsets = self.time_scale.tolist(), self.time_offset.tolist()
        oldest_query, newest_query = self.query_positions[0], self.query_positions[-1]
        oldest, newest = self.key_positions[0], self.key_positions[-1]
        spans = (newest_query - oldest_query + 1, newest - oldest + 1)
        self.consecutive = spans == (len(tq), len(tk))
        if self.consecutive:  # a time term then depends on row - column alone
            lags = torch.arange(newest_query - oldest, oldest_query - newest - 1, -1)
            self.time_table = self._time_term(lags.to(tq.device))  # (H, Tq + Tk - 1)
            self.time_tiles = {}

    def _time_term(self, lag):
        """`(time_scale * (lag - time_offset))^2`, inf for keys in the future, (H, *lag.shape)."""
        shape = (-1,) + (1,) * lag.dim()
        term = (self.time_scale.view(shape) * (lag - self.time_offset.view(shape))).square()
        return term.masked_fill_(lag < 0, math.inf).to(self.dtype)

    def _time_tile(self, heads, rows, columns):
        """The time term of a tile, to broadcast over the batch: (heads, 1, rows, columns)."""
        first, end = heads
        height, width = rows[1] - rows[0], columns[1] - columns[0]
        if not self.consecutive:
            lag = self.tq[slice(*rows), None] - self.tk[None, slice(*columns)]  # (rows, columns)
            return self._time_term(lag)[first:end, None]
        key = (first, end, rows[0] - columns[0], height, width)
        if key not in self.time_tiles:
            length = self.time_table.shape[1]
            start = first * length + len(self.tq) - rows[1] + columns[0]
            shape, strides = (end - first, height, width), (length, 1, 1)
            # the newest query first: each row then starts one entry further in the table
            upwards = self.time_table.as_strided(shape, strides, start)
            order = torch.arange(height - 1, -1, -1, device=self.tq.device)
            if len(self.time_tiles) >= 16:  # else they would outgrow all other memory
                self.time_tiles.clear()
            self.time_tiles[key] = upwards.index_select(1, order)[:, None]
        return self.time_tiles[key]
