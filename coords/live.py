"""The page for a server: its files apart, and each run as it is asked for."""

import html
import re

from coords.draw import read_run
from coords.page import ROOT, page_script, page_style, run_data
from system.markdown import json_for_script
from system.safe_text import printable


def live_files(name, suggestions):
    """Contents and type of the page and its files, by path.

    Args:
        name: of the model, for the title.
        suggestions: a few texts to begin with.
    """
    given = {"layer": None, "live": True, "runs": [], "suggestions": suggestions}
    page = (ROOT / "coords/page.html").read_text(encoding="utf-8")
    # a policy that allows inline scripts is for a page without a server
    page = re.sub(r"<meta http-equiv[^>]*>\n", "", page)
    parts = {
        "<style>{{style}}</style>": '<link rel="icon" href="data:,">\n'
        '<link rel="stylesheet" href="/look.css">',
        "<script>\n{{script}}\n</script>": '<script src="/look.js"></script>',
        "{{title}}": html.escape(f"Look inside {printable(str(name))}"),
        "{{data}}": json_for_script(given),
    }
    for placeholder, part in parts.items():
        page = page.replace(placeholder, part)
    style = page_style() + (ROOT / "coords/live.css").read_text(encoding="utf-8")
    return {
        "/look": (page.encode(), "text/html; charset=utf-8"),
        "/look.css": (style.encode(), "text/css; charset=utf-8"),
        "/look.js": (page_script().encode(), "text/javascript; charset=utf-8"),
    }


def live_run(loaded, path, tokens, source):
    """The page's data of one text. The arguments are those of `read_run`."""
    return run_data(read_run(loaded, path, tokens, source, live=True))
