"""Texts to begin with, for a page on which nothing was written yet."""

from system.errors import UserError
from text.labels import unknown_characters
from text.token_files import data_of_checkpoint

COUNT = 3
READ_TOKENS = 4000  # of the validation text
SHORTEST, LONGEST = 16, 72  # characters of a line
GENERAL = (
    "Once upon a time there was a king who",
    "The sun rose over the hills, and the",
    "She opened the door and said: I have",
)


def suggestions(checkpoint, tokenizer):
    """A list of at most `COUNT` lines: of the text that the checkpoint was validated on, or if it
    is not on this machine of a general kind."""
    try:
        ids = data_of_checkpoint(checkpoint, tokenizer, "").valid[:READ_TOKENS]
    except UserError:
        return [line for line in GENERAL if not unknown_characters(tokenizer, line)]
    # the first line may have begun before the split
    lines = [line.strip() for line in tokenizer.decode(ids.tolist()).split("\n")[1:-1]]
    lines = [line for line in lines if SHORTEST <= len(line) <= LONGEST and line.isprintable()]
    return list(dict.fromkeys(lines))[:COUNT]
