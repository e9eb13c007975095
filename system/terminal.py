"""Output for a terminal: safe text, column widths, bars, and a little colour."""

import os
import shutil
import sys
import unicodedata

from system.safe_text import is_emoji, printable

EIGHTHS = " ▏▎▍▌▋▊▉█"
LEVELS = " ▁▂▃▄▅▆▇█"
LEVELS_ASCII = " .:-=+*#@"
STYLES = {"dim": "2", "bold": "1"}
WIDEST = 100  # columns; longer bars are hard to compare


def print_whatever_comes():
    """Let no character and no closed stream end a script that prints: output never decides.

    What the encoding of the output lacks is escaped, and output that was closed is discarded.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # as after `>&-`: the next file opened would get its number
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def cells(text):
    """The number of columns that one line of printable text takes in a terminal."""
    total, before = 0, ""
    for c in text:
        if c == "\ufe0f" and before and _width(before) == 1:
            total += 1  # selects the emoji form, two columns wide
        elif before != "\u200d":  # a joined character is drawn over the one before
            total += _width(c)
        before = c
    return total


def _width(c):
    if unicodedata.category(c) in ("Mn", "Me", "Cf") or "\u1160" <= c <= "\u11ff":
        return 0
    return 2 if unicodedata.east_asian_width(c) in "FW" or is_emoji(c) else 1


def fit(text, width):
    """Printable text in exactly `width` columns: padded, or cut and marked with "…"."""
    text = encodable(printable(text))
    if cells(text) > width:
        sign = "…" if can_show("…") else "~"
        end = min(len(text), 16 * width)  # marks take no column, and there may be thousands
        while end and cells(text[:end]) > width - 1:
            end -= 1
        text = text[:end] + sign
    return text + " " * (width - cells(text))


def bar(share, width):
    """A bar that fills `share` (0 to 1) of `width` columns, in eighths if they can be shown."""
    share = min(max(share, 0.0), 1.0)
    if width < 1:
        return ""
    if not can_show(EIGHTHS):
        return "#" * max(round(share * width), share > 0)
    whole, eighths = divmod(max(round(share * width * 8), share > 0), 8)
    return "█" * whole + EIGHTHS[eighths].strip()


def level(share):
    """One character whose height shows `share` (0 to 1); a blank for the smallest."""
    levels = LEVELS if can_show(LEVELS) else LEVELS_ASCII
    return levels[round(min(share, 1.0) * 8)]


def columns():
    """The number of columns to draw on: the terminal's, from 20 to `WIDEST`."""
    return min(max(shutil.get_terminal_size().columns - 1, 20), WIDEST)


def can_show(text):
    """Whether the encoding of standard output has these characters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeError, LookupError):
        return False
    return True


def encodable(text):
    """Text that standard output can encode; other characters become `\\u2423`."""
    if can_show(text):
        return text
    text = text.replace("␣", "_").replace("⏎", "\\n").replace("⇥", "\\t")
    encoding = sys.stdout.encoding or "ascii"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def is_capable():
    """Whether standard output is a terminal that understands escape codes."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def styled(text, style):
    """Text in a style (a key of `STYLES`) if standard output is a terminal with colour."""
    if style is None or not is_capable() or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{STYLES[style]}m{text}\x1b[0m"


def say(text="", style=None):
    """Print one or more lines of any text, made safe."""
    print(styled(printable(text), style))
