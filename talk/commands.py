"""The chat in a terminal: prints a conversation's events, and carries out the commands."""

import argparse
import contextlib
import difflib
import math
import signal
import sys
import textwrap
import threading
from pathlib import Path

from tqdm import tqdm

from engine.pulls import newest_pulls
from system.errors import warn
from system.terminal import columns, say
from talk.bars import head_lines, layer_lines, pull_lines, strip_lines, token_lines
from talk.conversation import NO_ANSWER_YET, NO_TEXT_YET, NOTHING_TO_UNDO, READ_AT_ONCE
from talk.line_input import without_broken_bytes
from talk.settings import OPTIONAL_SETTINGS, SETTINGS, shown

SHOWN_TOKENS = 100
COMMANDS = {
    "/help": "list the commands",
    "/retry": "generate a different answer",
    "/undo": "bring back the answer before /retry",
    "/more": "continue the answer",
    "/tokens": "your last text as tokens, with their masses (/tokens all: also if it is long)",
    "/pull": "the tokens that pull the newest one hardest, mean over all layers and heads",
    "/pull heads": "one line per head: how far back it looks, and its hardest pull",
    "/pull N": "the hardest pulls of every head of layer N",
    "/save FILE": "write the conversation to a new file",
    "/set": "show the settings",
    "/set NAME VALUE": f"change {', '.join(SETTINGS)} (off: no value)",
    "/reset": "forget the conversation",
    "/quit": "leave (also Ctrl-D)",
    "//TEXT": "send a text that starts with a slash",
    "Ctrl-C": "stop the answer",
}


class Chat:
    """A `Conversation` at the terminal: what it yields is printed, and commands look into it."""

    def __init__(self, conversation):
        self.conversation = conversation
        self.has_left = False

    def reply(self, text):
        """Print an answer to `text`; returns whether Ctrl-C stopped it."""
        text = without_broken_bytes(text)
        return self._print(lambda stopped: self.conversation.reply(text, stopped))

    def retry(self):
        """Print a different answer; returns whether Ctrl-C stopped it."""
        if not self.conversation.can_retry:
            say(NO_ANSWER_YET)
            return False
        return self._print(self.conversation.retry)

    def undo(self):
        """Print the answer that the last retry replaced, and go on from there."""
        can_undo = self.conversation.can_undo
        say(self.conversation.undo() if can_undo else NOTHING_TO_UNDO)

    def more(self):
        """Print a continuation of the answer; returns whether Ctrl-C stopped it."""
        if not self.conversation.can_go_on:
            say(NO_TEXT_YET)
            return False
        return self._print(self.conversation.more)

    def _print(self, make_events):
        """Print events as they come; returns whether Ctrl-C stopped them."""
        with (
            stop_on_interrupt() as stopped,
            tqdm(desc="reading", disable=None, delay=2, leave=False) as progress,
        ):
            for event in make_events(stopped):
                if event["type"] == "reading":
                    progress.total = math.ceil(event["of"] / READ_AT_ONCE)
                    progress.update()
                    if event["read"] == event["of"]:
                        progress.close()
                else:
                    print_event(event)
        return stopped.is_set()

    def show_tokens(self, everything=False):
        """Print the tokens of the last text."""
        tokens, hidden = self.conversation.prompt, 0
        if not tokens:
            say(NO_TEXT_YET)
            return
        if len(tokens) > SHOWN_TOKENS and not everything:
            tokens, hidden = tokens[:SHOWN_TOKENS], len(tokens) - SHOWN_TOKENS
        labels, _ = self.conversation.labels(tokens)
        for line in token_lines(tokens, labels, self.conversation.masses(tokens)):
            say(line)
        if hidden:
            say(f"(and {hidden:,} more; /tokens all shows them)", "dim")

    def show_pull(self, what=None):
        """Print what pulls the newest token: the mean over heads, every head, or those of a layer.

        Args:
            what: None, "heads", or the number of a layer as text, from 1.
        """
        stream = self.conversation.stream
        config = stream.model.config
        if getattr(config, "law", None) != "newton":
            say("/pull needs a model of the law newton")
            return
        if not self.conversation.can_go_on:
            say(NO_TEXT_YET)
            return
        if what not in (None, "heads", *map(str, range(1, config.num_layers + 1))):
            say(f"/pull, /pull heads, or /pull N for one of the layers 1 to {config.num_layers}")
            return
        weights, tokens = newest_pulls(stream)
        settings = {"has_background": config.background}
        labels, texts = self.conversation.labels(tokens)
        say(f"{labels[-1]} was pulled by, of the last {len(labels):,} tokens:", "dim")
        if what is None:
            shares = weights.mean((0, 1))
            lines = (
                *strip_lines(shares, texts),
                *pull_lines(shares, labels, full=float(shares.max()) or 1.0, **settings),
            )
        elif what == "heads":
            lines = head_lines(weights, labels, **settings)
        else:
            lines = layer_lines(weights[int(what) - 1], labels, int(what), **settings)
        for line in lines:
            print(line)

    def save(self, path):
        """Write the conversation to a new file; prints the reason if that fails."""
        if not path:
            say("/save FILE: name one file")
            return
        try:
            path = Path(path).expanduser()
            with open(path, "x", encoding="utf-8", errors="backslashreplace") as file:
                file.write(self.conversation.transcript.getvalue())
        except FileExistsError:
            say(f"{path} exists already: give another name")
        except (OSError, ValueError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or error
            say(f"{str(path)[:200]} cannot be written: {reason}")
        else:
            say(f"saved in {path}")

    def set(self, *words):
        """Show the settings, or change one."""
        settings = self.conversation.settings
        if not words:
            for key, value in settings.items():
                say(f"{key:20} {shown(value)}")
            return
        key = words[0].replace("-", "_")
        if len(words) != 2 or key not in SETTINGS:
            say(f"/set NAME VALUE: NAME is one of {', '.join(SETTINGS)}")
            return
        try:
            is_off = words[1] == "off" and key in OPTIONAL_SETTINGS
            value = None if is_off else SETTINGS[key](words[1])
        except (ValueError, argparse.ArgumentTypeError) as error:
            say(f"{key} stays as it is: {str(error)[:200]}")
            return
        settings[key] = [value] if key == "stop" and not is_off else value
        if key == "seed":
            self.conversation.reseed()
        say(f"{key} is now {shown(settings[key])}")

    def reset(self):
        """Forget the conversation. Random numbers continue: the same text gets another answer."""
        self.conversation.forget()
        say("(forgotten)", "dim")

    def leave(self):
        self.has_left = True

    def command(self, line):
        """Carry out a /command; returns whether Ctrl-C stopped it."""
        name, _, rest = line.partition(" ")
        name, rest = name.strip(), rest.strip()
        actions = {
            "/help": show_help,
            "/retry": self.retry,
            "/undo": self.undo,
            "/more": self.more,
            "/tokens": lambda: self.show_tokens(rest == "all"),
            "/pull": lambda: self.show_pull(rest or None),
            "/save": lambda: self.save(rest),
            "/set": lambda: self.set(*rest.split(maxsplit=1)),
            "/reset": self.reset,
            "/quit": self.leave,
            "/exit": self.leave,
        }
        if name in actions:
            return bool(actions[name]())
        # cut short, because comparing a very long name takes very long
        near = difflib.get_close_matches(name[:20], command_names(), 1, 0.7)
        hint = f"did you mean {near[0]}?" if near else "/help lists them"
        say(f"no such command: {line[:60].strip()}; {hint}")
        return False


@contextlib.contextmanager
def stop_on_interrupt():
    """Ctrl-C sets the event instead of interrupting the model in the middle of a token."""
    stopped = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: stopped.set())
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def print_event(event):
    """Print an event: text on standard output as it comes, warnings on standard error."""
    kind = event["type"]
    if kind == "tokens":
        print("".join(token.text for token in event["tokens"]), end="", flush=True)
    elif kind == "rest":
        print(event["text"], end="", flush=True)
    elif kind == "notice":
        if event["isWarning"]:
            warn(event["text"])
        else:
            say(f"({event['text']})")
    elif kind == "written":
        print(flush=True)
        if sys.stdout.isatty():
            speed = event["count"] / event["seconds"]
            say(f"({event['count']:,} tokens, {speed:,.0f} tokens/s)", "dim")


def command_names():
    return sorted({name.split()[0] for name in COMMANDS if name[:2] != "//" and name[0] == "/"})


def completions(line):
    """The words that can complete the last word of `line`, each with a space after it."""
    *before, word = line.split(" ")
    if not before:
        words = command_names() if word.startswith("/") else []
    else:
        words = {"/set": list(SETTINGS), "/pull": ["heads"], "/tokens": ["all"]}.get(before[0], [])
        words = words if len(before) == 1 else []
    return [known + " " for known in words if known.startswith(word)]


def show_help():
    """Print every command with what it does, wrapped to the terminal's width."""
    left = max(map(len, COMMANDS)) + 2
    for name, what in COMMANDS.items():
        for n, line in enumerate(textwrap.wrap(what, columns() - left)):
            say(f"{'' if n else name:{left}}{line}")


def converse(chat, lines):
    """Answer lines until the user leaves; returns the exit code."""
    if lines.is_interactive:
        # a shell may start its jobs with Ctrl-C ignored, but here it must stop an answer
        signal.signal(signal.SIGINT, signal.default_int_handler)
        say("write something; /help lists the commands, Ctrl-D leaves", "dim")
    while not chat.has_left:
        try:
            stopped = turn(chat, lines.read())
        except EOFError:
            if lines.is_interactive:
                say()
            return 0
        except KeyboardInterrupt:
            if not lines.is_interactive:
                raise
            say("\n(Ctrl-D or /quit leaves)", "dim")
            continue
        if stopped and not lines.is_interactive:
            return 130
        sys.stdout.flush()
    return 0


def turn(chat, line):
    """Answer one line, or carry out its command; an empty one does nothing.

    Returns:
        Whether Ctrl-C stopped it.
    """
    if line.startswith("/") and not line.startswith("//"):
        return chat.command(line)
    if not line:
        return False
    return chat.reply(line.removeprefix("/") + "\n")
