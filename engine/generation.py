"""Generates token ids: sampling, and a stream over one KV cache. It knows nothing of text."""

import copy
import math

import torch

from engine.kv_cache import KVCache
from system.errors import UserError
from system.threads import adapt_waiting

PREFILL_CHUNK = 512  # tokens per forward pass of a long prompt, which bounds its memory
COLDEST = 1e-6  # lower temperatures take the likeliest token


def sample(logits, temperature=1.0, top_k=None, top_p=None, generator=None, min_p=None):
    """Draw one token from logits (vocab_size,).

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keep the k likeliest tokens.
        top_p: keep the likeliest tokens whose probabilities add up to p (nucleus sampling,
            Holtzman et al. 2020, https://arxiv.org/abs/1904.09751).
        generator: a `torch.Generator` on the CPU.
        min_p: keep the tokens that are at least this share as probable as the likeliest (Nguyen et
            al. 2024, https://arxiv.org/abs/2407.01082).

    Returns:
        The token id, an int.

    Raises:
        UserError: if the logits are not finite.
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
        # dropped if the likelier tokens add up to top_p already; the likeliest always stays
        dropped = ordered.cumsum(0) - ordered >= top_p
        dropped[0] = False
        probabilities[index[dropped]] = 0
    if min_p is not None:
        probabilities[probabilities < min_p * probabilities.max()] = 0
    return int(torch.multinomial(probabilities, 1, generator=generator))


def penalize(logits, seen, penalty):
    """Logits with those of tokens that occurred made smaller (Keskar et al. 2019, CTRL).

    As in other programs, a positive logit is divided by the penalty and a negative one multiplied
    (https://arxiv.org/abs/1909.05858, section 4.1, divides both).

    Args:
        logits: (vocab_size,).
        seen: (vocab_size,) bool, the tokens that occurred.
        penalty: above 0; 1 changes nothing.
    """
    logits = logits.float().cpu()
    largest = torch.finfo(logits.dtype).max  # an extreme penalty makes no infinity
    smaller = torch.where(logits > 0, logits / penalty, logits * penalty).clamp(-largest, largest)
    return torch.where(seen, smaller, logits)


class TokenStream:
    """A stream of tokens through a model: feed some, generate some, over one KV cache.

    A model without absolute positions can go on without limit. With them the context slides: when
    it is full, its newer half is read into a fresh cache.

    Attributes:
        logits: (vocab_size,), the prediction of the next token; None before anything was fed.
        context: ids of the tokens that the model remembers, and at most as many older ones.
        seen: (vocab_size,) bool, the tokens fed since the start.
        slides: how often the context has slid.
        before_newest: a snapshot of the cache before the newest token, or None.
    """

    def __init__(self, model):
        self.model = model.eval()
        self.device = next(model.parameters()).device
        self.reset()

    def reset(self):
        """Forget everything."""
        self.cache, self.before_newest = KVCache(), None
        self.context = []
        self.seen = torch.zeros(self.model.config.vocab_size, dtype=torch.bool)
        self.logits = None
        self.slides = 0

    def copy_of_state(self):
        """The state of the stream, for `return_to`."""
        caches = copy.deepcopy((self.cache, self.before_newest))  # at once: they share memory
        return *caches, list(self.context), self.seen.clone(), self.logits, self.slides

    def return_to(self, state):
        """Go back to a state from `copy_of_state`, which can be used again afterwards."""
        *caches, context, seen, self.logits, self.slides = state
        self.cache, self.before_newest = copy.deepcopy(caches)
        self.context, self.seen = list(context), seen.clone()

    @torch.inference_mode()
    def feed(self, tokens):
        """Let the model read token ids, and update `logits`."""
        adapt_waiting()
        tokens = list(tokens)
        self.seen[tokens] = True
        if self.model.max_context is not None:
            tokens = self._slide(tokens, self.model.max_context)
        while tokens:
            # the newest token alone, so that `newest_pulls` can read it once more
            count = min(PREFILL_CHUNK, max(len(tokens) - 1, 1))
            chunk, tokens = tokens[:count], tokens[count:]
            if not tokens:
                self.before_newest = self.cache.snapshot()
            batch = torch.tensor([chunk], device=self.device)
            self.logits = self.model(batch, kv_cache=self.cache)[0, -1]
            self.context += chunk
            remembered = self.cache.most_remembered()
            if len(self.context) > 2 * remembered:
                del self.context[:-remembered]

    def _slide(self, tokens, limit):
        """Make room for tokens: if they fill the context, start a fresh cache.

        Returns:
            The ids to feed: all of `tokens`, or after slides the tokens that the context now ends
            with. A long text slides several times at the cost of one.
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

    def generate(self, max_new_tokens, repetition_penalty=None, **settings):
        """Yield new token ids one by one, each already fed to the model.

        Args:
            repetition_penalty: as in `penalize`; None for none.
            settings: those of `sample`.

        Raises:
            ValueError: if nothing was fed yet.
        """
        if self.logits is None:
            raise ValueError("feed at least one token first")
        for _ in range(max_new_tokens):
            logits = self.logits
            if repetition_penalty is not None:
                logits = penalize(logits, self.seen, repetition_penalty)
            token = sample(logits, **settings)
            self.feed([token])
            yield token
