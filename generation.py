"""Token ids in, token ids out: the KV cache, sampling and the stream. Knows nothing of text."""

import torch

PREFILL_CHUNK = 512


class KVCache:
    """What attention still needs of the tokens seen so far.

    `length` counts all tokens ever seen; a layer may have forgotten the oldest of them.
    """

    def __init__(self):
        self.length = 0
        self._layers = {}

    def append(self, layer, positions, *entries):
        """Add new tokens to a layer and return all that it remembers.

        Args:
            positions: (T,) of the new tokens.
            entries: tensors of the new tokens, (B, H, T, C) or (B, T).

        Returns:
            `(positions, *entries)` over all remembered tokens.
        """
        new = (positions, *entries)
        old = self._layers.get(layer)
        if old is not None:
            new = tuple(torch.cat([a, b], _token_dim(b)) for a, b in zip(old, new, strict=True))
        self._layers[layer] = new
        return new

    def keep_newest(self, layer, count):
        """Forget all but the newest `count` tokens of a layer."""
        entries = self._layers[layer]
        extra = len(entries[0]) - count
        if extra > 0:
            self._layers[layer] = tuple(
                e.narrow(_token_dim(e), extra, count).clone() for e in entries
            )

    def num_bytes(self):
        """Memory of all layers' tensors in bytes."""
        return sum(e.numel() * e.element_size() for layer in self._layers.values() for e in layer)


def _token_dim(entry):
    return {1: 0, 2: 1, 4: 2}[entry.dim()]


def sample(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw one token from logits (vocab_size,).

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keep the k likeliest.
        top_p: keep the likeliest whose probabilities add up to p (nucleus sampling, Holtzman et
            al. 2020, arXiv:1904.09751).
        generator: a `torch.Generator` on the CPU.

    Returns:
        The token id, an int.
    """
    logits = logits.float().cpu()
    if temperature == 0:
        return int(logits.argmax())
    logits = (logits - logits.max()) / temperature
    if top_k is not None and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    probabilities = torch.softmax(logits, -1)
    if top_p is not None and top_p < 1:
        ordered, index = probabilities.sort(descending=True)
        surplus = ordered.cumsum(0) - ordered >= top_p  # the first is always kept
        probabilities[index[surplus]] = 0
    return int(torch.multinomial(probabilities, 1, generator=generator))


class TokenStream:
    """A conversation with a model: feed tokens, draw tokens, over one KV cache.

    A model without absolute positions goes on for ever. One with them slides: when its context is
    full, the newer half of it starts a fresh cache (`slides` counts how often).
    """

    def __init__(self, model):
        self.model = model.eval()
        self.device = next(model.parameters()).device
        self.reset()

    def reset(self):
        """Forget everything."""
        self.cache = KVCache()
        self.context = []
        self.logits = None
        self.slides = 0

    @torch.inference_mode()
    def feed(self, tokens):
        """Let the model read token ids; `logits` (vocab_size,) is then its next prediction."""
        tokens = list(tokens)
        limit = self.model.max_context
        while tokens:
            room = PREFILL_CHUNK
            if limit is not None:
                if self.cache.length == limit:
                    self.slides += 1
                    kept = self.context[-(limit // 2) :] if limit > 1 else []
                    self.cache, self.context = KVCache(), []
                    tokens = kept + tokens
                room = min(room, limit - self.cache.length)
            chunk, tokens = tokens[:room], tokens[room:]
            batch = torch.tensor([chunk], device=self.device)
            self.logits = self.model(batch, kv_cache=self.cache)[0, -1]
            if limit is not None:
                self.context += chunk

    def generate(self, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None):
        """Yield new token ids one by one, each already part of the context.

        Raises:
            ValueError: where nothing was fed yet.
        """
        if self.logits is None:
            raise ValueError("feed at least one token first")
        for _ in range(max_new_tokens):
            token = sample(self.logits, temperature, top_k, top_p, generator)
            self.feed([token])
            yield token
