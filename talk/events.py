"""A conversation as events for a page: every token with its mass, its position and its pulls."""

import threading
import time
from collections import deque
from dataclasses import dataclass, replace

import torch

from engine.pulls import PullRecord, Pulls
from model import NGT
from system.safe_text import printable
from talk.conversation import Conversation
from talk.line_input import BROKEN
from text.tokenizer import CharTokenizer, TextStream

KEPT_TOKENS = 2000  # of a conversation of any length
READ_AT_ONCE = 256  # tokens; of a long memory fewer
READ_PAIRS = 1 << 20  # tokens that are read times those that are remembered
LONGEST_TEXT = 1000  # characters of one token; of a stranger's vocabulary


@dataclass(frozen=True)
class Token:
    """One token as the page shows it. `position` counts from the start of the conversation."""

    position: int
    turn: int
    author: str  # you, or model
    label: str
    text: str
    mass: float | None
    pulls: Pulls | None

    def to_json(self):
        """Plain types; of the pulls the mean over all heads."""
        kept = ("position", "turn", "author", "label", "text", "mass")
        return {name: getattr(self, name) for name in kept} | {"pulls": self._row(-1)}

    def pull_rows(self):
        """Of every row of `Pulls` the [position, weight] of what pulls, strongest first."""
        return [self._row(n) for n in range(0 if self.pulls is None else len(self.pulls.weights))]

    def _row(self, n):
        if self.pulls is None:
            return []
        pairs = zip(self.pulls.sources[n].tolist(), self.pulls.weights[n].tolist(), strict=True)
        return [[source, round(weight, 5)] for source, weight in pairs if weight > 0]


class LiveConversation(Conversation):
    """A conversation that yields what happens instead of printing it.

    It keeps the newest `KEPT_TOKENS` tokens. One thread may change it; any may look at it.
    """

    def __init__(self, model, tokenizer, settings):
        self.lock = threading.Lock()
        config = model.config
        self.record = PullRecord(model) if getattr(config, "law", None) == "newton" else None
        self.version = 0
        super().__init__(model, tokenizer, settings)

    def forget(self):
        """Start a conversation; under a seed it goes as the first one went."""
        super().forget()
        if self.record is not None:
            self.record.take()
        with self.lock:
            self.tokens = deque(maxlen=KEPT_TOKENS)
            self.num_tokens = self.turn = 0
            self.version += 1
        self.reseed()

    def start(self, settings):
        """Take over settings for what comes; another seed starts its chances afresh."""
        has_new_seed = settings["seed"] != self.settings["seed"]
        self.settings.update(settings)
        if has_new_seed:
            self.reseed()
        self.version += 1

    @property
    def can_retry(self):
        return self.before_answer is not None

    @property
    def can_go_on(self):
        return self.stream.logits is not None

    def kept(self):
        """The tokens that are kept, oldest first."""
        with self.lock:
            return list(self.tokens)

    def reply(self, text, stopped):
        """Read `text`, then answer it; yields events."""
        yield from self.read(text, stopped)
        if not stopped.is_set():
            yield from self.more(stopped)

    def retry(self, stopped):
        """Answer the last text again."""
        state, tokens, num_tokens = self.before_answer
        self.stream.return_to(state)
        with self.lock:
            self.tokens, self.num_tokens = deque(tokens, KEPT_TOKENS), num_tokens
        yield {"type": "back", "position": num_tokens}
        yield from self.more(stopped)

    def more(self, stopped):
        """Go on writing where the text ends."""
        self.before_answer = self.stream.copy_of_state(), self.kept(), self.num_tokens
        yield from self.answer(stopped)

    def read(self, text, stopped):
        """Let the model read what the user wrote."""
        text = BROKEN.sub("\ufffd", text)
        if isinstance(self.tokenizer, CharTokenizer):
            unknown = self.tokenizer.num_unknown(text)
            if unknown:
                are = "character is" if unknown == 1 else "characters are"
                yield _notice(f"{unknown:,} {are} new to this model's vocabulary")
        tokens = self.tokenizer.encode(text)
        if not tokens and not self.can_go_on:
            tokens = self.tokenizer.encode("\n") or [0]
        self.before_answer, self.turn, self._last_shown = None, self.turn + 1, ""
        pieces, start = TextStream(self.tokenizer), 0
        while start < len(tokens):
            unseen = len(tokens) - KEPT_TOKENS - start
            if unseen > 0:  # what the page will not show is read without its pulls
                at_once = min(READ_AT_ONCE, unseen)
            else:
                at_once = max(1, min(READ_AT_ONCE, READ_PAIRS // (len(self.stream.context) + 1)))
            chunk = tokens[start : start + at_once]
            start += len(chunk)
            event = self._feed(chunk, pieces, "you", is_seen=unseen <= 0)
            if unseen <= 0:
                yield event
            yield {"type": "reading", "read": start, "of": len(tokens)}
            if stopped.is_set() and start < len(tokens):
                yield _notice(f"read as far as token {start:,} of {len(tokens):,}")
                break
        yield from self._flush(pieces)

    def answer(self, stopped):
        """Write until it is long enough or stopped."""
        s, started, count = self.settings, time.perf_counter(), 0
        pieces = TextStream(self.tokenizer)
        self._last_shown = ""
        drawn = self.stream.generate(
            s["max_new_tokens"], s["temperature"], s["top_k"], s["top_p"], self.generator
        )
        for token in drawn:
            count += 1
            yield self._keep([token], pieces, "model")
            if stopped.is_set():
                break
        yield from self._flush(pieces)
        if self.stream.slides and not self.said_sliding:
            self.said_sliding = True
            yield _notice("the context was full: its older half is forgotten whenever that happens")
        yield {"type": "written", "count": count, "seconds": time.perf_counter() - started}

    def _feed(self, tokens, pieces, author, is_seen):
        if self.record is not None:
            self.record.is_on = is_seen
        try:
            self.stream.feed(tokens)
        finally:
            if self.record is not None:
                self.record.is_on = True
        return self._keep(tokens, pieces, author)

    def _keep(self, tokens, pieces, author):
        """Remember tokens that were fed; returns their event."""
        pulls = self.record.take() if self.record is not None else []
        pulls = [*[None] * (len(tokens) - len(pulls)), *pulls]
        masses = [None] * len(tokens)
        if isinstance(self.stream.model, NGT):
            ids = torch.tensor(tokens, device=self.stream.device)
            with torch.inference_mode():
                masses = self.stream.model.mass(ids).tolist()
        kept = [
            Token(
                position=self.num_tokens + n,
                turn=self.turn,
                author=author,
                label=self.label(token),
                text=self._shown(self._piece(token, pieces)),
                mass=masses[n],
                pulls=pulls[n],
            )
            for n, token in enumerate(tokens)
        ]
        with self.lock:
            self.num_tokens += len(kept)
            self.tokens.extend(kept)
        return {"type": "tokens", "tokens": [token.to_json() for token in kept]}

    def _piece(self, token, pieces):
        """The text that a token brings; where tokens are characters an unknown one is whole."""
        if isinstance(self.tokenizer, CharTokenizer):
            return self.tokenizer.decode([token])
        return pieces.push(token)

    def _flush(self, pieces):
        """What was held back of a character belongs to the newest token."""
        text = self._shown(pieces.flush())
        if text and self.tokens:
            with self.lock:
                newest = replace(self.tokens[-1], text=self.tokens[-1].text + text)
                self.tokens[-1] = newest
            yield {"type": "rest", "text": text}

    def _shown(self, text):
        if not text:
            return ""
        shown = printable(text, self._last_shown)
        self._last_shown = text[-1]
        return shown if len(shown) <= LONGEST_TEXT else shown[:LONGEST_TEXT] + "…"


def _notice(text):
    return {"type": "notice", "text": text}
