"""Draws loss curves of several runs, as a PNG and as an interactive page."""

import html
import io
import math

import matplotlib
import plotly.graph_objects as go
from matplotlib import pyplot as plt
from plotly.subplots import make_subplots

from reporting.runs import same_conditions
from system.fonts import fonts_for
from system.markdown import to_page
from system.numbers import limited
from system.safe_text import one_line

matplotlib.use("Agg")  # it draws files only, and needs no display

AXES = (("step", 1, "step"), ("wall_time", 1 / 60, "minutes of training"))
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")


def curves_to_draw(runs_by_label):
    """What `curves_png` and `page_of_curves` take.

    A run whose times cannot be compared with the first one's has no curve by time.
    """
    pairs = [(label, run) for label, runs in runs_by_label.items() for run in runs]
    first = pairs[0][1]
    return [
        (
            label,
            one_line(run.name),
            run.rows
            if same_conditions(run, first)
            else [row | {"wall_time": None} for row in run.rows],
        )
        for label, run in pairs
    ]


def curves_png(curves):
    """Validation loss by step and by time, as the bytes of a PNG.

    Args:
        curves: `(label, name, rows)` of each run; runs of one label share a colour.
    """
    colours = _colours(curves)
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for panel, (key, scale, title) in zip(panels, AXES, strict=True):
        named = set()
        for label, _, rows in curves:
            shown = None if label in named else label  # one legend entry for all seeds
            panel.plot(*_points(rows, key, scale), color=colours[label], label=shown, lw=1.4)
            named.add(label)
        panel.set_xlabel(title)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("validation loss (nats per token)")
    return _png(figure, panels[0])


def lengths_png(rows_by_label):
    """Loss by length of the context, a line for each model, as the bytes of a PNG.

    Args:
        rows_by_label: for each label the "by_length" rows of evaluate.py.
    """
    figure, panel = plt.subplots(figsize=(7, 4.2))
    for label, rows in rows_by_label.items():
        rows = [row for row in rows if row["loss"] is not None]
        contexts, losses = [r["context"] for r in rows], [r["loss"] for r in rows]
        panel.plot(contexts, losses, marker="o", lw=1.4, label=label)
    panel.set_xscale("log", base=2)
    panel.set_xlabel("tokens of context")
    panel.set_ylabel("loss of the last 64 tokens (nats per token)")
    panel.grid(alpha=0.3)
    return _png(figure, panel)


def page_of_curves(curves, title):
    """The curves of `curves_png` as an HTML page; hovering shows the run and its perplexity."""
    colours = _colours(curves)
    figure = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.04)
    named = set()
    for label, name, rows in curves:
        evaluated = [row["perplexity"] for row in rows if row["val_loss"] is not None]
        perplexities = [limited(math.inf if x is None else x, ".2f") for x in evaluated]
        for column, (key, scale, axis) in enumerate(AXES, 1):
            x, y = _points(rows, key, scale)
            curve = go.Scatter(
                x=x,
                y=y,
                mode="lines+markers",
                name=html.escape(label),  # Plotly shows markup in names as markup
                legendgroup=label,
                showlegend=column == 1 and label not in named,
                line={"color": colours[label]},
                customdata=perplexities,
                hovertemplate=(
                    f"{html.escape(name)}<br>{axis} %{{x:,.0f}}<br>loss %{{y:.4f}}"
                    "<br>perplexity %{customdata}<extra></extra>"
                ),
            )
            figure.add_trace(curve, 1, column)
            figure.update_xaxes(title_text=axis, row=1, col=column)
        named.add(label)
    figure.update_yaxes(title_text="validation loss (nats per token)", row=1, col=1)
    figure.update_layout(title={"text": html.escape(title)})
    return to_page(figure, title)


def _colours(curves):
    labels = dict.fromkeys(label for label, _, _ in curves)
    return {label: COLOURS[n % len(COLOURS)] for n, label in enumerate(labels)}


def _points(rows, key, scale):
    """`(x, y)` of a curve, two lists; evaluations without a loss or a place are left out."""
    kept = [row for row in rows if None not in (row["val_loss"], row[key])]
    return [row[key] * scale for row in kept], [row["val_loss"] for row in kept]


def _png(figure, panel):
    """The figure as the bytes of a PNG, with the legend in `panel`."""
    for text in panel.legend().get_texts():
        text.set_parse_math(False)  # a label with a dollar sign is not a formula
    png = io.BytesIO()
    try:
        with fonts_for(figure):
            figure.tight_layout()
            figure.savefig(png, dpi=110, format="png")
    finally:
        plt.close(figure)  # matplotlib would keep it in memory
    return png.getvalue()
