"""A still of the map, as a PNG file."""

import io

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

NAMED = 10  # heaviest tokens of the text
LONGEST_NAME = 24
INK, SOFT, FAINT = "#22262b", "#5b6470", "#8b93a0"
STYLE = {"grid.color": "#e1e5ea", "grid.linewidth": 0.6, "axes.edgecolor": "#b9c0c9"}


def still(runs, layer):
    """The map after `layer` blocks, runs side by side, with the trails that led there.

    Args:
        runs: one or two of `map_page.Run`.

    Returns:
        PNG bytes.
    """
    png = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.2 * len(runs), 7.2), dpi=110, facecolor="white")
        for n, run in enumerate(runs):
            axes = figure.add_subplot(1, len(runs), n + 1, projection="3d", computed_zorder=False)
            _draw(figure, axes, run, min(layer, len(run.points) - 1))
        figure.savefig(png, format="png", bbox_inches="tight", pad_inches=0.15)
    return png.getvalue()


def _draw(figure, axes, run, layer):
    points, mass = run.points[layer], run.measured.mass
    spread = float(np.ptp(mass)) or 1.0
    if layer:
        for trail in run.points[: layer + 1].transpose(1, 2, 0):
            axes.plot(*trail, color=FAINT, linewidth=0.5, alpha=0.35, zorder=1)
    drawn = axes.scatter(
        *points.T,
        c=mass,
        s=14 + 110 * (mass - mass.min()) / spread,
        cmap="cividis",
        edgecolors="white",
        linewidths=0.4,
        depthshade=False,
        zorder=2,
    )
    for token in _to_name(run.labels, mass):
        axes.text(
            *points[token],
            "  " + run.labels[token][:LONGEST_NAME],
            fontsize=9,
            color=INK,
            zorder=3,
            parse_math=False,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )
    passed = run.points[: layer + 1]
    low, high = passed.min((0, 1)), passed.max((0, 1))
    extent = np.maximum(high - low, 1e-9)
    axes.set(
        xlim=(low[0], high[0]) if extent[0] > 1e-9 else None,
        ylim=(low[1], high[1]) if extent[1] > 1e-9 else None,
        zlim=(low[2], high[2]) if extent[2] > 1e-9 else None,
    )
    axes.set_box_aspect(np.maximum(extent, 0.3 * extent.max()), zoom=0.92)
    for axis, name in zip((axes.xaxis, axes.yaxis, axes.zaxis), run.axes, strict=True):
        axis.set_label_text(name, fontsize=8, color=SOFT)
        axis.set_pane_color((0.97, 0.975, 0.98, 1))
        axis.set_tick_params(labelsize=7, labelcolor=FAINT)
    axes.view_init(elev=22, azim=45)
    blocks = len(run.points) - 1
    where = "before the first block" if layer == 0 else f"after block {layer} of {blocks}"
    axes.set_title(
        f"{len(run.labels)} tokens {where}\n{run.name}, step {run.step:,}",
        fontsize=11,
        color=INK,
        y=0.97,
        parse_math=False,
    )
    bar = figure.colorbar(drawn, ax=axes, shrink=0.45, pad=0.06)
    bar.set_label("mass (colour and size)", fontsize=8, color=SOFT)
    bar.ax.tick_params(labelsize=7, labelcolor=FAINT)
    bar.outline.set_visible(False)


def _to_name(labels, mass):
    """The last place in the text of each of its heaviest tokens."""
    last = {label: n for n, label in enumerate(labels)}
    return sorted(last.values(), key=lambda n: -mass[n])[:NAMED]
