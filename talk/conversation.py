"""A conversation with a model in text: read, answer, answer again, go on."""

import contextlib
import io
import signal
import sys
import threading
import time

import torch
from tqdm import tqdm

from engine.generation import TokenStream
from system.errors import warn
from system.safe_text import printable
from system.terminal import say
from talk.line_input import without_broken_bytes
from text.tokenizer import CharTokenizer, TextStream

READ_AT_ONCE = 512  # tokens
LONGEST_LABEL = 200  # characters; of a stranger's vocabulary


class Conversation:
    """A model's token stream with text around it.

    What it keeps does not grow with the conversation, but for the text itself, which can be saved.

    Args:
        settings: a dict: `max_new_tokens`, `temperature`, `top_k`, `top_p`, `seed`; it may change.
    """

    def __init__(self, model, tokenizer, settings):
        self.stream = TokenStream(model)
        self.tokenizer = tokenizer
        self.settings = settings
        self.reseed()
        self.forget()

    def forget(self):
        """Start a conversation."""
        self.stream.reset()
        self.said_sliding = False
        self.prompt, self.transcript = [], io.StringIO()
        self.before_answer = None
        self._last_shown = ""

    def reseed(self):
        self.generator = torch.Generator()
        if self.settings["seed"] is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(self.settings["seed"])

    def reply(self, text):
        """Read `text` and answer it on standard output; returns whether Ctrl-C stopped that."""
        with stop_on_interrupt() as stopped:
            self.read(text, stopped)
        return stopped.is_set() or self.more()

    def retry(self):
        """Answer the last text again."""
        if self.before_answer is None:
            say("nothing was answered yet")
            return False
        state, length = self.before_answer
        self.stream.return_to(state)
        self.transcript.seek(length)
        self.transcript.truncate()
        return self.more()

    def more(self):
        """Go on writing where the text ends; returns whether Ctrl-C stopped that."""
        if self.stream.logits is None:
            say("write something first")
            return False
        with stop_on_interrupt() as stopped:
            self.before_answer = self.stream.copy_of_state(), self.transcript.tell()
            self.answer(print_now, stopped)
        return stopped.is_set()

    def label(self, token):
        """A token for people to read, whatever a stranger's vocabulary says."""
        return printable(self.tokenizer.label(token)[:LONGEST_LABEL])

    def read(self, text, stopped):
        """Let the model read what the user wrote."""
        text = without_broken_bytes(text)
        if isinstance(self.tokenizer, CharTokenizer):
            unknown = self.tokenizer.num_unknown(text)
            if unknown:
                are = "character is" if unknown == 1 else "characters are"
                warn(f"{unknown} {are} new to this model's vocabulary")
        tokens = self.tokenizer.encode(text)
        if not tokens and self.stream.logits is None:
            tokens = self.tokenizer.encode("\n") or [0]
        self.prompt = tokens
        self.before_answer = None
        for start in tqdm(
            range(0, len(tokens), READ_AT_ONCE), desc="reading", disable=None, delay=2, leave=False
        ):
            end = min(start + READ_AT_ONCE, len(tokens))
            self.stream.feed(tokens[start:end])
            if stopped.is_set() and end < len(tokens):
                say(f"(read as far as token {end:,} of {len(tokens):,})")
                self.transcript.write(self.tokenizer.decode(tokens[:end]))
                return
        self.transcript.write(text)

    def answer(self, write, stopped):
        """Stream an answer to `write(text)` until it is long enough or stopped."""
        s, started, count = self.settings, time.perf_counter(), 0
        text = TextStream(self.tokenizer)
        tokens = self.stream.generate(
            s["max_new_tokens"], s["temperature"], s["top_k"], s["top_p"], self.generator
        )
        self._last_shown = ""
        for token in tokens:
            count += 1
            self._write(text.push(token), write)
            if stopped.is_set():
                break
        self._write(text.flush(), write)
        write("\n")
        if sys.stdout.isatty():
            seconds = time.perf_counter() - started
            say(f"({count:,} tokens, {count / seconds:,.0f} tokens/s)", "dim")
        if self.stream.slides and not self.said_sliding:
            self.said_sliding = True
            warn("the context was full: its older half is forgotten whenever that happens")

    def _write(self, text, write):
        if text:
            self.transcript.write(text)
            write(printable(text, self._last_shown))
            self._last_shown = text[-1]


def print_now(text):
    print(text, end="", flush=True)


@contextlib.contextmanager
def stop_on_interrupt():
    """Ctrl-C sets the event instead of cutting a token in half."""
    stopped = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: stopped.set())
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
