"""Texts to begin with, for a page on which nothing was written yet."""

from system.errors import UserError
from text.labels import unknown_characters
from text.token_files import data_of_checkpoint

COUNT = 3
READ_TOKENS = 4000  # of the validation text
SHORTEST, LONGEST = 12, 60  # characters of a line, of which the rest is cut off
GENERAL = (
    "Once upon a time there was a king who",
    "The sun rose over the hills, and the",
    "She opened the door and said: I have",
)


def suggestions(checkpoint, tokenizer):
    """A list of at most `COUNT` lines: from the text that the checkpoint was validated on, or
    general ones if that is not on this machine."""
    try:
        ids = data_of_checkpoint(checkpoint, tokenizer, "").valid[:READ_TOKENS]
    except UserError:
        return [line for line in GENERAL if not unknown_characters(tokenizer, line)]
    # the first line may have begun before the split
    lines = [line.strip() for line in tokenizer.decode(ids.tolist()).split("\n")[1:-1]]
    lines = [line for line in lines if len(line) >= SHORTEST and line[0].isalpha()]
    lines = [line for line in dict.fromkeys(map(_beginning, lines)) if line.isprintable()]
    return lines[:: max(1, -(-len(lines) // COUNT))]


def _beginning(line):
    """As many words of a line as fit into `LONGEST` characters."""
    if len(line) <= LONGEST:
        return line
    return line[: line.rfind(" ", 0, LONGEST + 1)] if " " in line[:LONGEST] else line[:LONGEST]
