"""Text from strangers made safe to print: it cannot control a terminal or imitate other text."""

import re
import unicodedata

JOINERS = "\u200c\u200d"  # emoji and Indic, Persian and Arabic letters need them
BROKEN = re.compile("[\ud800-\udfff]")  # Python reads each byte that is not UTF-8 as one of these
FILLERS = "\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0"  # invisible letters


def printable(text, before=""):
    """The text with everything dangerous escaped as Python does: `\\x1b`, `\\u202e`.

    Escaped are control characters (C0, C1), changes of direction, invisible and broken characters.
    Letters of every script, emoji, line ends and tabs stay.

    Args:
        before: the character that was printed last. Joiners and variation selectors stay only
            after one that they can belong to.
    """
    if text.isascii() and text.isprintable():
        return text
    shown = []
    for c in text:
        shown.append(c if _is_text(c, before) else _escape(c))
        before = c
    return "".join(shown)


def one_line(text):
    """`printable` text in one line: each run of white space becomes one space."""
    return printable(" ".join(text.split()))


def shown_short(value):
    """A value from an untrusted file as an error message shows it: at most 40 characters of text.

    Lists, dictionaries and other objects are named by their type alone, since writing out a deeply
    nested one could take all memory.
    """
    if isinstance(value, str):
        return repr(value[:40])
    if value is None or isinstance(value, bool | float):
        return repr(value)
    if isinstance(value, int):  # Python refuses to print integers of more than 4,300 digits
        return repr(value) if abs(value) < 10**40 else "a very large number"
    return f"a {type(value).__name__}"


def short_reason(error):
    """The message of an exception on one line, at most 200 characters."""
    return " ".join(str(error).split())[:200]


def _is_text(c, before):
    if c in JOINERS:
        return (
            bool(before)
            and not before.isascii()
            and before not in JOINERS
            and _is_text(before, "x")
        )
    if _is_selector(c):
        return bool(before) and before.isprintable() and before != " " and not _is_selector(before)
    if c in FILLERS:
        return False
    return c in "\n\t" or c.isprintable() or unicodedata.category(c) == "Zs" or is_emoji(c)


def _is_selector(c):
    return "\ufe00" <= c <= "\ufe0f" or "\U000e0100" <= c <= "\U000e01ef"


def is_emoji(c):
    """Whether it is in the planes for pictures; some are newer than Python's own tables."""
    return "\U0001f000" <= c <= "\U0001faff"


def _escape(c):
    code = ord(c)
    return (
        f"\\x{code:02x}"
        if code < 0x100
        else f"\\u{code:04x}"
        if code < 0x10000
        else f"\\U{code:08x}"
    )
