"""The chat in a terminal: its commands and settings, and the loop that reads lines."""

import argparse
import difflib
import signal
import sys
import textwrap
from pathlib import Path

import torch

from engine.pulls import newest_pulls
from model import NGT
from system.cli import positive, random_seed, whole
from system.terminal import columns, say
from talk.bars import head_lines, layer_lines, pull_lines, strip_lines, token_lines
from talk.conversation import Conversation


def temperature(text):
    """0 or more."""
    value = float(text)
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"{text} must be a number from 0 (greedy) to a million")
    return value


def probability(text):
    """Above 0, at most 1."""
    value = positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} must be above 0 and at most 1")
    return value


SHOWN_TOKENS = 100
COMMANDS = {
    "/help": "this list",
    "/retry": "answer again, otherwise",
    "/more": "go on writing",
    "/tokens": "how what you wrote was split, with the tokens' masses (/tokens all: however long)",
    "/pull": "which earlier tokens pulled the newest one, and how hard; mean over layers and heads",
    "/pull heads": "a line a head: how far back it looks, and at what",
    "/pull N": "the heads of layer N",
    "/save FILE": "write the conversation to a new file",
    "/set": "show the settings",
    "/set NAME VALUE": "change temperature, top_k, top_p, max_new_tokens or seed; off: none",
    "/reset": "forget the conversation",
    "/quit": "leave (Ctrl-D does too)",
    "//TEXT": "what you write begins with a slash",
    "Ctrl-C": "stop the answer that is being written",
}
OPTIONAL_SETTINGS = ("top_k", "top_p", "seed")
SETTINGS = {
    "temperature": temperature,
    "top_k": whole,
    "top_p": probability,
    "max_new_tokens": whole,
    "seed": random_seed,
}


class Chat(Conversation):
    """A conversation whose commands show what the model does."""

    def show_tokens(self, everything=False):
        """How the last text was split."""
        if not self.prompt:
            say("write something first")
            return
        tokens, hidden = self.prompt, 0
        if len(tokens) > SHOWN_TOKENS and not everything:
            tokens, hidden = tokens[:SHOWN_TOKENS], len(tokens) - SHOWN_TOKENS
        masses = None
        if isinstance(self.stream.model, NGT):
            ids = torch.tensor(tokens, device=self.stream.device)
            masses = self.stream.model.mass(ids).tolist()
        for line in token_lines(tokens, [self.label(token) for token in tokens], masses):
            say(line)
        if hidden:
            say(f"(and {hidden:,} more; /tokens all shows them)", "dim")

    def show_pull(self, what=None):
        """What pulled the newest token: in the mean, or head by head."""
        model = self.stream.model
        if getattr(model.config, "law", None) != "newton":
            say("only the law newton has a pull to show")
            return
        if self.stream.logits is None:
            say("write something first")
            return
        num_layers = model.config.num_layers
        if what not in (None, "heads", *map(str, range(1, num_layers + 1))):
            say(f"/pull, /pull heads, or /pull N for one of the layers 1 to {num_layers}")
            return
        weights, tokens = newest_pulls(self.stream)
        labels = [self.label(token) for token in tokens]
        say(f"{labels[-1]} was pulled by, of the last {len(labels):,} tokens:", "dim")
        if what is None:
            shares = weights.mean((0, 1))
            lines = (
                *strip_lines(shares, labels),
                *pull_lines(shares, labels, full=float(shares.max()) or 1.0),
            )
        elif what == "heads":
            lines = head_lines(weights, labels)
        else:
            lines = layer_lines(weights[int(what) - 1], labels, int(what))
        for line in lines:
            print(line)

    def save(self, path):
        """Write the conversation to a file that is not there yet."""
        if not path:
            say("/save FILE: name one file")
            return
        try:
            path = Path(path).expanduser()
            with open(path, "x", encoding="utf-8", errors="backslashreplace") as file:
                file.write(self.transcript.getvalue())
        except FileExistsError:
            say(f"{path} exists already: give another name")
        except (OSError, ValueError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or error
            say(f"{str(path)[:200]} cannot be written: {reason}")
        else:
            say(f"saved in {path}")

    def command(self, line):
        """Carry out a /command.

        Returns:
            Whether to go on, and whether Ctrl-C stopped it.
        """
        name, _, rest = line.partition(" ")
        name, rest = name.strip(), rest.strip()
        stopped = False
        if name in ("/quit", "/exit"):
            return False, False
        if name == "/help":
            show_help()
        elif name == "/reset":
            self.forget()
            say("(forgotten)", "dim")
        elif name == "/retry":
            stopped = self.retry()
        elif name == "/more":
            stopped = self.more()
        elif name == "/tokens":
            self.show_tokens(rest == "all")
        elif name == "/pull":
            self.show_pull(rest or None)
        elif name == "/save":
            self.save(rest)
        elif name == "/set":
            self.set(*rest.split())
        else:
            near = difflib.get_close_matches(name[:20], command_names(), 1, 0.7)
            hint = f"did you mean {near[0]}?" if near else "/help lists them"
            say(f"no such command: {line[:60].strip()}; {hint}")
        return True, stopped

    def set(self, *words):
        """Show the settings, or change one."""
        if not words:
            for key, value in self.settings.items():
                say(f"{key:15} {'off' if value is None else value}")
            return
        key = words[0].replace("-", "_")
        if len(words) != 2 or key not in SETTINGS:
            say(f"/set NAME VALUE, where NAME is one of {', '.join(SETTINGS)}")
            return
        try:
            is_off = words[1] == "off" and key in OPTIONAL_SETTINGS
            self.settings[key] = None if is_off else SETTINGS[key](words[1])
        except (ValueError, argparse.ArgumentTypeError) as error:
            say(f"{key} stays as it is: {str(error)[:200]}")
            return
        if key == "seed":
            self.reseed()
        say(f"{key} is now {'off' if is_off else self.settings[key]}")


def command_names():
    return sorted({name.split()[0] for name in COMMANDS if name[:2] != "//" and name[0] == "/"})


def completions(line):
    """The words that may stand where the last one of `line` is being written."""
    *before, word = line.split(" ")
    if not before:
        words = command_names() if word.startswith("/") else []
    else:
        words = {"/set": list(SETTINGS), "/pull": ["heads"], "/tokens": ["all"]}.get(before[0], [])
        words = words if len(before) == 1 else []
    return [known + " " for known in words if known.startswith(word)]


def show_help():
    """The commands, side by side with what they do where there is room."""
    left = max(map(len, COMMANDS)) + 2
    for name, what in COMMANDS.items():
        for n, line in enumerate(textwrap.wrap(what, columns() - left)):
            say(f"{'' if n else name:{left}}{line}")


def converse(chat, lines):
    """Answer lines until the user leaves; returns the exit code."""
    if lines.is_interactive:
        # a shell that starts its jobs with Ctrl-C ignored would leave this prompt deaf to it
        signal.signal(signal.SIGINT, signal.default_int_handler)
        say("write something; /help lists the commands, Ctrl-D leaves", "dim")
    while True:
        try:
            goes_on, stopped = turn(chat, lines.read())
        except EOFError:
            if lines.is_interactive:
                say()
            return 0
        except KeyboardInterrupt:
            if not lines.is_interactive:
                raise
            say("\n(Ctrl-D or /quit leaves)", "dim")
            continue
        if not goes_on:
            return 0
        if stopped and not lines.is_interactive:
            return 130
        sys.stdout.flush()


def turn(chat, line):
    """Answer one line; returns as `Chat.command`."""
    if line.startswith("/") and not line.startswith("//"):
        return chat.command(line)
    return True, chat.reply(line.removeprefix("/") + "\n")
