"""HTML, JSON and Markdown in which text from strangers stays text."""

import html
import json
import re

from system.safe_text import one_line, printable

MARKUP = "&<>|`[]"


def to_page(figure, title):
    """A Plotly figure as one HTML document that needs no network and uploads nothing."""
    document = figure.to_html(
        include_plotlyjs=True,
        default_height="96vh",
        config={"displaylogo": False, "showSendToCloud": False},
    )
    return document.replace("<head>", f"<head><title>{html.escape(title)}</title>", 1)


def json_for_script(data):
    """JSON for a <script> element, whose text cannot end the element or a line."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", errors="backslashreplace").decode()  # lone surrogates


def markdown_text(value):
    """One line of Markdown text that cannot start HTML, a link, picture, code or table cell."""
    return "".join(f"&#{ord(c)};" if c in MARKUP else c for c in one_line(str(value)))


def markdown_code(value):
    """One line as code, with any backticks in it; not for table cells, which a bar would end."""
    text = one_line(str(value))
    fence = "`" * (_longest_run(text) + 1)
    inner = f" {text} " if "`" in text else text
    return f"{fence}{inner}{fence}"


def markdown_block(text, language=""):
    """Lines as a block of code, with any backticks in them."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{printable(text)}\n{fence}"


def _longest_run(text):
    return max(map(len, re.findall("`+", text)), default=0)


def markdown_table(head, lines):
    """A table of texts; the first column aligned left, the others right."""
    # within a cell ">" starts nothing, and "&#62; 1e6" would be hard to read
    lines = [
        [markdown_text(cell).replace("&#62;", ">") for cell in line] for line in (head, *lines)
    ]
    lines.insert(1, ["---", *["---:"] * (len(head) - 1)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
