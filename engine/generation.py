"""Token ids in, token ids out: the KV cache, sampling and the stream. Knows nothing of text."""

import copy
import math

import torch
import torch.nn.functional as F

from engine.kv_cache import KVCache
from gravity.law import TINY, gravity_field
from system.errors import UserError

PREFILL_CHUNK = 512
COLDEST = 1e-6  # temperature, below which the likeliest token is taken


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

    Raises:
        UserError: where the logits are not finite.
    """
    logits = logits.float().cpu()
    if not logits.isfinite().all():
        raise UserError("the model's logits are not finite: its weights are damaged, use another")
    if temperature < COLDEST:
        return int(logits.argmax())
    logits = (logits - logits.max()) / temperature
    if top_k is not None and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    probabilities = torch.softmax(logits, -1)
    if top_p is not None and top_p < 1:
        ordered, index = probabilities.sort(descending=True)
        surplus = ordered.cumsum(0) - ordered >= top_p
        surplus[0] = False
        probabilities[index[surplus]] = 0
    return int(torch.multinomial(probabilities, 1, generator=generator))


class TokenStream:
    """A conversation with a model: feed tokens, draw tokens, over one KV cache.

    A model without absolute positions goes on for ever. One with them slides: when its context is
    full, the newer half of it starts a fresh cache (`slides` counts how often). `context` lists
    the tokens that the model still remembers (of a slow start twice as many at most).
    """

    def __init__(self, model):
        self.model = model.eval()
        self.device = next(model.parameters()).device
        self.reset()

    def reset(self):
        """Forget everything."""
        self.cache, self._before_newest = KVCache(), None
        self.context = []
        self.logits = None
        self.slides = 0

    def copy_of_state(self):
        """What `return_to` takes to come back to this moment."""
        return copy.deepcopy(self.cache), list(self.context), self.logits, self.slides

    def return_to(self, state):
        """Go back to where `copy_of_state` was called; it may be gone back to again."""
        cache, context, self.logits, self.slides = state
        self.cache, self.context = copy.deepcopy(cache), list(context)
        self._before_newest = None

    @torch.inference_mode()
    def feed(self, tokens):
        """Let the model read token ids; `logits` (vocab_size,) is then its next prediction."""
        tokens = list(tokens)
        if self.model.max_context is not None:
            tokens = self._slide(tokens, self.model.max_context)
        while tokens:
            # the newest token alone, so that what it met can be kept for `pulls`
            count = min(PREFILL_CHUNK, max(len(tokens) - 1, 1))
            chunk, tokens = tokens[:count], tokens[count:]
            if not tokens:
                self._before_newest = self.cache.snapshot()
            batch = torch.tensor([chunk], device=self.device)
            self.logits = self.model(batch, kv_cache=self.cache)[0, -1]
            self.context += chunk
            remembered = self.cache.most_remembered()
            if len(self.context) > 2 * remembered:
                del self.context[:-remembered]

    def _slide(self, tokens, limit):
        """Start afresh as often as `tokens` fill the context.

        Returns:
            What is left to be fed; a full context is read once, however long the text was.
        """
        surplus = len(self.context) + len(tokens) - limit
        if surplus <= 0:
            return tokens
        forgotten = limit - limit // 2
        slides = math.ceil(surplus / forgotten)
        tokens = (self.context + tokens)[slides * forgotten :]
        self.slides += slides
        self.cache, self.context = KVCache(), []
        return tokens

    @torch.inference_mode()
    def pulls(self):
        """Which share of the pull on the newest token comes from which that are remembered.

        Returns:
            `(weights, tokens)`: (num_layers, num_heads, N) on the CPU, each row summing to 1 where
            anything reaches, and the N token ids, the newest last.

        Raises:
            ValueError: under another law than newton, and where nothing was fed yet.
        """
        if getattr(self.model.config, "law", None) != "newton":
            raise ValueError("only the law newton has pulls")
        if self._before_newest is None:
            raise ValueError("feed at least one token first")
        rows = []

        def record(attn, inputs, _):
            _, z, _, positions, cache = inputs
            key_positions, k, _, mass = cache.remembered(attn.layer)
            q = attn.probe_proj(z).view(1, 1, attn.config.num_heads, -1).transpose(1, 2)
            field = gravity_field(
                q.float(),
                k.float(),
                mass,
                query_positions=positions,
                key_positions=key_positions,
                **attn.law(),
            )[0, :, 0]
            rows.append(field / (field.sum(-1, keepdim=True) + TINY))

        hooks = [layer.attn.register_forward_hook(record) for layer in self.model.layers]
        try:
            newest = torch.tensor([self.context[-1:]], device=self.device)
            self.model(newest, kv_cache=copy.deepcopy(self._before_newest))
        finally:
            for hook in hooks:
                hook.remove()
        count = max(row.shape[-1] for row in rows)
        weights = torch.stack([F.pad(row, (count - row.shape[-1], 0)) for row in rows])
        return weights.nan_to_num().cpu(), self.context[-count:]

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
