"""What a terminal is shown: text that cannot steer it, cells, bars, and a little colour."""

import os
import shutil
import sys
import unicodedata

JOINERS = "\u200c\u200d"  # emoji and Indic, Persian and Arabic letters need them
FILLERS = "\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0"  # letters that nobody sees
EIGHTHS = " ▏▎▍▌▋▊▉█"
LEVELS = " ▁▂▃▄▅▆▇█"
LEVELS_ASCII = " .:-=+*#@"
STYLES = {"dim": "2", "bold": "1"}
WIDEST = 100  # cells; bars longer than that are hard to compare


def printable(text, before=""):
    """Text that can neither steer a terminal nor pass for other text.

    Letters of every script, emoji, line ends and tabs stay. Control characters (C0, C1), changes of
    direction, invisible and broken characters are written as Python would: `\\x1b`, `\\u202e`.

    Args:
        before: the character that was printed last: joiners and variation selectors are text only
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
    """`printable`, with white space, line ends included, as single spaces."""
    return printable(" ".join(text.split()))


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
    return c in "\n\t" or c.isprintable() or unicodedata.category(c) == "Zs" or _is_emoji(c)


def _is_selector(c):
    return "\ufe00" <= c <= "\ufe0f" or "\U000e0100" <= c <= "\U000e01ef"


def _is_emoji(c):
    """Of the planes kept for pictures, which are newer than some Pythons know."""
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


def cells(text):
    """How many columns printable text of one line takes, as terminals reckon it."""
    total, before = 0, ""
    for c in text:
        if c == "\ufe0f" and before and _width(before) == 1:
            total += 1  # asks for the picture, two columns wide
        elif before != "\u200d":  # what is joined is drawn over what it is joined to
            total += _width(c)
        before = c
    return total


def _width(c):
    if unicodedata.category(c) in ("Mn", "Me", "Cf") or "\u1160" <= c <= "\u11ff":
        return 0
    return 2 if unicodedata.east_asian_width(c) in "FW" or _is_emoji(c) else 1


def fit(text, width):
    """Printable text in exactly `width` columns: padded, or cut with a sign that it is."""
    text = encodable(printable(text))
    if cells(text) > width:
        sign = "…" if can_show("…") else "~"
        end = min(len(text), 16 * width)  # marks take no column: thousands of them are no label
        while end and cells(text[:end]) > width - 1:
            end -= 1
        text = text[:end] + sign
    return text + " " * (width - cells(text))


def bar(share, width):
    """A bar of `share` (0 to 1) of `width` columns, in eighths of one where they can be shown."""
    share = min(max(share, 0.0), 1.0)
    if width < 1:
        return ""
    if not can_show(EIGHTHS):
        return "#" * max(round(share * width), share > 0)
    whole, eighths = divmod(max(round(share * width * 8), share > 0), 8)
    return "█" * whole + EIGHTHS[eighths].strip()


def level(share):
    """One column's height for `share` (0 to 1), the faintest of them blank."""
    levels = LEVELS if can_show(LEVELS) else LEVELS_ASCII
    return levels[round(min(share, 1.0) * 8)]


def columns():
    """Columns to draw on: the terminal's, within reason."""
    return min(max(shutil.get_terminal_size().columns - 1, 20), WIDEST)


def can_show(text):
    """Whether standard output's encoding has these characters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeError, LookupError):
        return False
    return True


def encodable(text):
    """Text as standard output can say it; what it has no code for as `\\u2423`."""
    if can_show(text):
        return text
    text = text.replace("␣", "_").replace("⏎", "\\n").replace("⇥", "\\t")
    encoding = sys.stdout.encoding or "ascii"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def is_capable():
    """Whether standard output is a terminal that understands more than text."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def styled(text, style):
    """Text between the codes of a style where standard output is a terminal with colour."""
    if style is None or not is_capable() or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{STYLES[style]}m{text}\x1b[0m"


def say(text="", style=None):
    """Print a line, or several, that may hold anything."""
    print(styled(printable(text), style))
