"""The KV cache: what attention still needs of the tokens seen so far."""

import copy
import math

MIN_CAPACITY = 256  # tokens for which a layer has memory at least


class KVCache:
    """What attention still needs of the tokens seen so far.

    `length` counts all tokens seen; a layer may have forgotten the oldest of them. Each layer's
    memory doubles when it is full, so that a new token seldom copies old ones. It stops growing
    as soon as forgotten tokens leave enough space for new ones. `largest_mass` is that of any token
    of the vocabulary, set by an NGT on the first call: windows of heads may depend on it.
    """

    def __init__(self):
        self.length, self.largest_mass = 0, None
        self._layers = {}  # layer: _Memory
        self._newest = {}  # name: (B, 1, C), see `exchange`
        self._fixed = {}  # name: see `once`

    def append(self, layer, positions, *entries):
        """Add new tokens to a layer.

        Args:
            positions: those of the new tokens, (T,).
            entries: tensors of the new tokens, (B, H, T, C) or (B, T).

        Returns:
            `(positions, *entries)` of all remembered tokens: views, valid until the next call.
        """
        new = (positions, *entries)
        memory = self._layers.get(layer)
        if memory is None:
            memory = self._layers[layer] = _Memory(new)
        return memory.append(new)

    def exchange(self, name, entries):
        """Keep the last of `entries`, (B, T, C), and return the one kept before under this name.

        Args:
            name: a layer, or whatever tells its entries from others.

        Returns:
            (B, 1, C); the first of `entries` if none was kept.
        """
        before = self._newest.get(name, entries[:, :1])
        self._newest[name] = entries[:, -1:].clone()
        return before

    def forget_beyond(self, layer, window):
        """Forget the tokens that are too old for a layer's heads to feel.

        Args:
            window: a function that returns how many tokens back each head must look, (H,);
                inf keeps everything. It is called once per layer and cache: the law does not
                change during decoding, and reading a number from a GPU waits for it.
        """
        farthest = self.once((layer, "window"), lambda: float(window().detach().max()))
        if math.isfinite(farthest):
            self.keep_newest(layer, math.ceil(farthest))

    def once(self, name, function):
        """What `function()` returned when this cache was first asked for `name`."""
        if name not in self._fixed:
            self._fixed[name] = function()
        return self._fixed[name]

    def keep_newest(self, layer, count):
        """Forget all but the newest `count` tokens of a layer."""
        memory = self._layers[layer]
        memory.start = max(memory.start, memory.stop - count)

    def num_remembered(self, layer):
        """How many tokens a layer still remembers."""
        return self._layers[layer].stop - self._layers[layer].start

    def most_remembered(self):
        """How many tokens the layer with the longest memory remembers."""
        return max(map(self.num_remembered, self._layers), default=0)

    def remembered(self, layer):
        """`(positions, *entries)` of a layer: views, valid until the next `append`."""
        return self._layers[layer].remembered()

    def snapshot(self):
        """A cache that stays as this one is now; shares its memory, to which tokens are only added.

        Make a deep copy of it before anything is appended to it.
        """
        cache = KVCache()
        cache.length, cache.largest_mass = self.length, self.largest_mass
        cache._newest = dict(self._newest)
        cache._fixed = dict(self._fixed)
        cache._layers = {layer: copy.copy(memory) for layer, memory in self._layers.items()}
        return cache

    def num_bytes(self):
        """How much memory the layers hold, in bytes."""
        entries = [entry for memory in self._layers.values() for entry in memory.entries]
        return sum(x.numel() * x.element_size() for x in (*entries, *self._newest.values()))


class _Memory:
    """Tensors with space for more tokens; those from `start` to `stop` are remembered."""

    def __init__(self, like):
        self.start = self.stop = self.capacity = 0
        self.entries = [entry.narrow(_token_dim(entry), 0, 0) for entry in like]

    def append(self, new):
        count = len(new[0])
        if self.stop + count > self.capacity:
            self._grow(count)
        for entry, tokens in zip(self.entries, new, strict=True):
            entry.narrow(_token_dim(entry), self.stop, count).copy_(tokens)
        self.stop += count
        return self.remembered()

    def _grow(self, count):
        """Move what is remembered to the front of new memory, larger unless half of it is free."""
        kept = self.stop - self.start
        if 2 * (kept + count) > self.capacity:
            self.capacity = max(MIN_CAPACITY, 2 * (kept + count))
        moved = []
        for entry, old in zip(self.entries, self.remembered(), strict=True):
            shape = list(entry.shape)
            shape[_token_dim(entry)] = self.capacity
            moved.append(entry.new_empty(shape))
            moved[-1].narrow(_token_dim(entry), 0, kept).copy_(old)
        self.entries, self.start, self.stop = moved, 0, kept

    def remembered(self):
        length = self.stop - self.start
        return tuple(e.narrow(_token_dim(e), self.start, length) for e in self.entries)


def _token_dim(entry):
    """Which dimension counts tokens in (T,), (B, T) and (B, H, T, C)."""
    return {1: 0, 2: 1, 4: 2}[entry.dim()]
