"""Fonts for matplotlib's pictures that have the letters of other scripts, and emoji."""

import contextlib
import re
import unicodedata
import warnings

from matplotlib.font_manager import FontProperties, findfont, findSystemFonts, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

from system.errors import warn
from system.safe_text import is_emoji

SPECIAL = re.compile("bold|black|heavy|light|thin|medium|italic|oblique|mono|serif", re.IGNORECASE)
NAMED = 5  # letters in the warning


@contextlib.contextmanager
def fonts_for(figure):
    """A context in which a figure is drawn with fonts of this computer that have its letters.

    If there is none for a letter, one line says which package has it. What matplotlib itself says
    about fonts and layout is not printed.
    """
    lines = [line for line in figure.findobj(Text) if not line.get_text().isascii()]
    missing = {c for line in lines for c in line.get_text() if _is_drawn(c)}
    missing -= _letters(findfont(FontProperties()), missing)
    if missing:
        families, missing = _families_with(missing)
        for line in lines:
            line.set_fontfamily([*line.get_fontfamily(), *families])
    if missing:
        some = ", ".join(sorted(missing)[:NAMED]) + (", ..." if len(missing) > NAMED else "")
        packages = ", ".join(sorted({_package(c) for c in missing}))
        warn(f"no font here can draw {some} in the picture: install {packages} (Debian, Ubuntu)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _families_with(missing):
    """`(names of font families, letters that none has)` of the fonts on this computer.

    All files are searched, because matplotlib's own list is older than a font installed just now.
    """
    families = []
    # plain fonts first
    for path in sorted(findSystemFonts(), key=lambda path: (bool(SPECIAL.search(path)), path)):
        found = _letters(path, missing)
        if found:
            fontManager.addfont(path)
            families.append(FontProperties(fname=path).get_name())
            missing = missing - found
        if not missing:
            break
    return families, missing


def _letters(path, wanted):
    """Those of the letters that a font can draw; it may hold bitmaps, or glyphs without a shape."""
    try:
        font = FT2Font(path)
        font.set_size(12, 72)
        return {
            c for c in wanted if font.get_char_index(ord(c)) and any(font.load_char(ord(c)).bbox)
        }
    except (OSError, RuntimeError, ValueError):
        return set()


def _is_drawn(c):
    # marks, spaces and controls have no shape of their own
    return unicodedata.category(c)[0] not in "CMZ" or is_emoji(c)


def _package(c):
    if is_emoji(c) or unicodedata.category(c) == "So":
        return "fonts-symbola"
    return "fonts-noto-cjk" if unicodedata.east_asian_width(c) in "WFH" else "fonts-noto-core"
