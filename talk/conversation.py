"""A conversation with a model: reads text, answers it, and yields what happens as events."""

import contextlib
import io
import threading
import time
from collections import deque
from dataclasses import replace
from typing import NamedTuple

import torch

from engine.generation import TokenStream
from engine.pulls import PullRecord
from model import NGT
from system.safe_text import printable
from talk.events import Token, notice
from text.labels import labels_in_text, unknown_characters
from text.stream import typed_text
from text.tokenizer import CharTokenizer, TextStream

# settings with which tokens are drawn
DRAWING = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
READ_AT_ONCE = 512  # tokens, if none are kept
KEPT_AT_ONCE = 256  # tokens, if some are kept
# pulls take time and memory per pair: at most so many tokens read, times tokens remembered
READ_PAIRS = 1 << 20
LONGEST_LABEL = 200  # characters; any file may bring its own vocabulary
# what the terminal and the page say if `can_go_on`, `can_retry` or `can_undo` does not hold
NO_TEXT_YET, NO_ANSWER_YET = "write something first", "there is no answer yet"
NOTHING_TO_UNDO = "the answer was not retried"


class Conversation:
    """A model's token stream with text around it, the same for the terminal and the page.

    Its methods yield the events of talk/events.py. `read`, `answer`, `reply`, `retry` and `more`
    stop after the current token, or piece of text, once the event `stopped` is set. One thread may
    call them; any may call `kept`.

    Args:
        settings: a dict by the names of talk/settings.py; it may change.
        kept_tokens: how many of the newest tokens are kept, with their masses and pulls. 0: none,
            and no pulls are recorded, which would cost about a forward pass per token; the
            transcript is kept instead.
    """

    def __init__(self, model, tokenizer, settings, kept_tokens=0):
        self.stream = TokenStream(model)
        self.tokenizer, self.settings, self.kept_tokens = tokenizer, settings, kept_tokens
        has_pulls = kept_tokens and getattr(model.config, "law", None) == "newton"
        self.record = PullRecord(model) if has_pulls else None
        self._lock = threading.Lock()
        self.reseed()
        self.forget()

    def forget(self):
        """Start a new conversation."""
        self.stream.reset()
        self._take_pulls()
        self.prompt, self.transcript = [], io.StringIO()
        self.has_warned_of_sliding = False
        self.before_answer = self.before_retry = None
        with self._lock:
            self.tokens = deque(maxlen=self.kept_tokens)
            self.num_tokens = self.turn = 0

    def reseed(self):
        """Start the random numbers again from the seed, or at random if there is none."""
        self.generator = torch.Generator()
        if self.settings["seed"] is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(self.settings["seed"])

    def warm_up(self):
        """Let the model compile what it needs, so that the first answer does not wait for it."""
        self.stream.feed([0])
        self.forget()

    @property
    def can_retry(self):
        return self.before_answer is not None

    @property
    def can_undo(self):
        return self.before_retry is not None

    @property
    def can_go_on(self):
        return self.stream.logits is not None

    def kept(self):
        """The tokens that are kept, oldest first."""
        with self._lock:
            return list(self.tokens)

    @contextlib.contextmanager
    def unrecorded(self):
        """Within this the model may read another text: no pulls are recorded."""
        if self.record is None:
            yield
            return
        was_on, self.record.is_on = self.record.is_on, False
        try:
            yield
        finally:
            self.record.is_on = was_on

    def label(self, token):
        """A token id for people to read, escaped and cut short."""
        return printable(self.tokenizer.label(token)[:LONGEST_LABEL])

    def labels(self, tokens):
        """`labels_in_text` of token ids, escaped and cut short."""
        return (
            [printable(label[:LONGEST_LABEL]) for label in found]
            for found in labels_in_text(self.tokenizer, tokens)
        )

    @torch.inference_mode()
    def masses(self, tokens):
        """The masses of token ids as a list; None if the model has none."""
        if not isinstance(self.stream.model, NGT):
            return None
        return self.stream.model.mass(torch.tensor(tokens, device=self.stream.device)).tolist()

    def reply(self, text, stopped):
        """Read `text`, then answer it."""
        yield from self.read(text, stopped)
        if not stopped.is_set():
            yield from self.more(stopped)

    def retry(self, stopped):
        """Generate a different answer to the last text; `can_retry` must hold."""
        replaced = self._moment()
        self._return_to(self.before_answer)
        yield {"type": "back", "position": self.num_tokens}
        yield from self.more(stopped)
        self.before_retry = replaced

    def undo(self):
        """Bring back the answer that `retry` replaced; `can_undo` must hold.

        The next `undo` brings back the one that it replaces now.

        Returns:
            The answer's text, empty if tokens are kept.
        """
        replaced = self._moment()
        self._return_to(self.before_retry)
        self.before_retry = replaced
        start = len(self.before_answer.transcript)
        return self.transcript.getvalue()[start:]

    def more(self, stopped):
        """Continue the text; `can_go_on` must hold."""
        self.before_answer, self.before_retry = self._moment(), None
        yield from self.answer(stopped)

    def _moment(self):
        return _Moment(
            *(self.stream.copy_of_state(), self.kept(), self.num_tokens),
            self.transcript.getvalue(),
        )

    def _return_to(self, moment):
        self.stream.return_to(moment.stream)
        self.transcript = io.StringIO()
        self.transcript.write(moment.transcript)
        with self._lock:
            self.tokens = deque(moment.tokens, self.kept_tokens)
            self.num_tokens = moment.num_tokens

    def read(self, text, stopped):
        """Let the model read what the user wrote."""
        text = typed_text(text)
        if unknown := unknown_characters(self.tokenizer, text):
            yield notice(unknown)
        tokens = self.tokenizer.encode(text)
        # a model predicts from at least one token
        if not tokens and not self.can_go_on:
            tokens = self.tokenizer.encode("\n") or [0]
        self.prompt, self.turn = tokens, self.turn + 1
        self.before_answer = self.before_retry = None
        pieces, read = _Pieces(self.tokenizer), 0
        while read < len(tokens):
            chunk = tokens[read : read + self._read_at_once(len(tokens) - read)]
            read += len(chunk)
            is_kept = len(tokens) - read < self.kept_tokens
            if self.record is not None:
                self.record.is_on = is_kept
            self.stream.feed(chunk)
            if self.kept_tokens:
                event = self._keep(chunk, pieces, "you")
                if is_kept:
                    yield event
            yield {"type": "reading", "read": read, "of": len(tokens)}
            if stopped.is_set() and read < len(tokens):
                yield notice(f"read as far as token {read:,} of {len(tokens):,}", is_warning=False)
                text = self.tokenizer.decode(tokens[:read])
                break
        yield from self._flush(pieces)
        self._write(text)

    def _read_at_once(self, left):
        """How many of the tokens that are `left` are read next."""
        if not self.kept_tokens:
            return READ_AT_ONCE
        if left > self.kept_tokens:  # what will not be shown is read without its pulls
            return min(KEPT_AT_ONCE, left - self.kept_tokens)
        return max(1, min(KEPT_AT_ONCE, READ_PAIRS // (len(self.stream.context) + 1)))

    def answer(self, stopped):
        """Generate `max_new_tokens` tokens, or fewer if a text of the setting `stop` appears."""
        started, count = time.perf_counter(), 0
        said = _Said(self.settings.get("stop"))
        pieces = _Pieces(self.tokenizer, lambda text: (self._write(text), said.add(text)))
        if self.record is not None:
            self.record.is_on = True
        drawn = self.stream.generate(
            **{name: self.settings.get(name) for name in DRAWING}, generator=self.generator
        )
        for token in drawn:
            count += 1
            yield self._keep([token], pieces, "model")
            if stopped.is_set() or said.has_ended:
                break
        yield from self._flush(pieces)
        yield {"type": "written", "count": count, "seconds": time.perf_counter() - started}
        if self.stream.slides and not self.has_warned_of_sliding:
            self.has_warned_of_sliding = True
            yield notice("the context was full: its older half is forgotten whenever that happens")

    def _write(self, text):
        if not self.kept_tokens:
            self.transcript.write(text)

    def _take_pulls(self):
        return [] if self.record is None else self.record.take()

    def _keep(self, tokens, pieces, author):
        """Keep tokens that were fed; returns their event."""
        pulls = self._take_pulls()
        # tokens that were read with the record off have none
        pulls = [*[None] * (len(tokens) - len(pulls)), *pulls]
        # one look-up per token would slow the terminal, which shows no masses
        masses = self.masses(tokens) if self.kept_tokens else None
        new = [
            Token(
                position=self.num_tokens + n,
                id=token,
                turn=self.turn,
                author=author,
                label=self.label(token),
                text=pieces.push(token),
                mass=None if masses is None else masses[n],
                pulls=pulls[n],
            )
            for n, token in enumerate(tokens)
        ]
        with self._lock:
            self.num_tokens += len(new)
            self.tokens.extend(new)
        return {"type": "tokens", "tokens": new}

    def _flush(self, pieces):
        """Add the text that was held back to the newest token, and yield it."""
        text = pieces.flush()
        if not text:
            return
        if self.tokens:
            with self._lock:
                self.tokens[-1] = replace(self.tokens[-1], text=self.tokens[-1].text + text)
        yield {"type": "rest", "text": text}


class _Moment(NamedTuple):
    """What a conversation needs to return to a moment."""

    stream: tuple  # of `TokenStream.copy_of_state`
    tokens: list
    num_tokens: int
    transcript: str


class _Said:
    """Watches an answer for the texts that end it, also across tokens."""

    def __init__(self, stops):
        self._stops, self._newest = stops or [], ""
        self._kept = max(map(len, self._stops), default=1) - 1
        self.has_ended = False

    def add(self, text):
        text = self._newest + text
        self.has_ended = self.has_ended or any(stop in text for stop in self._stops)
        self._newest = text[max(0, len(text) - self._kept) :]


class _Pieces:
    """Turns token ids into text that is safe to show; `write` gets the original text."""

    def __init__(self, tokenizer, write=lambda text: None):
        self._tokenizer, self._stream, self._write = tokenizer, TextStream(tokenizer), write
        self._newest = ""

    def push(self, token):
        # a character is always whole: the stream would hold an unknown one back
        if isinstance(self._tokenizer, CharTokenizer):
            return self._shown(self._tokenizer.decode([token]))
        return self._shown(self._stream.push(token))

    def flush(self):
        return self._shown(self._stream.flush())

    def _shown(self, text):
        self._write(text)
        shown = printable(text, self._newest)
        self._newest = text[-1:] or self._newest
        return shown
