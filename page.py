"""A Plotly figure as one HTML document."""

import html


def to_page(figure, title):
    """A figure as one HTML document that needs no network and uploads nothing."""
    document = figure.to_html(
        include_plotlyjs=True,
        default_height="96vh",
        config={"displaylogo": False, "showSendToCloud": False},
    )
    return document.replace("<head>", f"<head><title>{html.escape(title)}</title>", 1)
