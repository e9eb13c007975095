"""HTML documents that need no network, and JSON that is safe inside them."""

import html
import json


def to_page(figure, title):
    """A Plotly figure as one HTML document that needs no network and uploads nothing."""
    document = figure.to_html(
        include_plotlyjs=True,
        default_height="96vh",
        config={"displaylogo": False, "showSendToCloud": False},
    )
    return document.replace("<head>", f"<head><title>{html.escape(title)}</title>", 1)


def json_for_script(data):
    """JSON for a <script> element: no text in it can end the element or a line of it."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", errors="backslashreplace").decode()  # lone surrogates
