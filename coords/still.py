"""Draws still pictures as PNG: the map, and every head's field by distance."""

import io

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from system.fonts import fonts_for

NAMED = 10  # the heaviest tokens of the text have their names written beside them
LONGEST_NAME = 24  # characters
# colours that colour-blind people can tell apart (Okabe and Ito 2008), as on the page
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#f0e442", "#22262b")
LINES = ("-", "--", ":", "-.")
INK, SOFT, FAINT = "#22262b", "#5b6470", "#8b93a0"
# masses below 1 green, above 1 purple, as on the page (coords/colours.js)
MASS_COLOURS = LinearSegmentedColormap.from_list("mass", ("#0b5a2a", "#959595", "#6a1b7d"))
LOWEST, HIGHEST = 0.9, 100  # the scale of masses spans at least 10 %, and no more than 100 times
STYLE = {"grid.color": "#e1e5ea", "grid.linewidth": 0.6, "axes.edgecolor": "#b9c0c9"}


def still(runs, layer):
    """The map after a layer, runs side by side, with the trails of the tokens up to there.

    Args:
        runs: a list of one or two `page.Run`.
        layer: 0 for before the first; a run with fewer layers shows its last.

    Returns:
        PNG bytes.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.2 * len(runs), 7.2), dpi=110, facecolor="white")
        scale = mass_scale(runs)
        for n, run in enumerate(runs):
            axes = figure.add_subplot(1, len(runs), n + 1, projection="3d", computed_zorder=False)
            _draw(figure, axes, run, min(layer, len(run.points) - 1), scale)
        return _png(figure)


def mass_scale(runs):
    """The scale of the masses in the text, by their ratio to 1, for all runs: `(1 / high, high)`."""
    masses = np.concatenate([[1.0], *(run.measured.mass for run in runs)])
    masses = masses.clip(1 / HIGHEST, HIGHEST)
    high = float(max(1 / LOWEST, masses.max(), 1 / masses.min()))
    return 1 / high, high


def heads_still(runs):
    """The field of every head by distance, one panel per layer and one row per run.

    Under the published law, in which time plays no part, the measured pull is drawn instead.

    Returns:
        PNG bytes.
    """
    columns = max(len(run.pull[1]) for run in runs)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.1 * columns, 3.0 * len(runs)), dpi=110, facecolor="white")
        panels = figure.subplots(len(runs), columns, squeeze=False)
        for run, row in zip(runs, panels, strict=True):
            is_field = run.field[0] is not None
            back, curves = run.field if is_field else run.pull
            for layer, axes in enumerate(row):
                if layer >= len(curves):
                    axes.set_visible(False)
                    continue
                _draw_heads(axes, back, curves[layer])
                axes.set_title(f"layer {layer + 1}", fontsize=10, color=INK)
            row[0].set_ylabel("field" if is_field else "share of the pull", color=SOFT)
            row[len(curves) - 1].legend(fontsize=7, frameon=False)
        figure.suptitle(
            ", ".join(f"{run.name}, step {run.step:,}" for run in runs),
            fontsize=11,
            color=INK,
            parse_math=False,
        )
        return _png(figure, is_tight=True)


def _draw_heads(axes, back, curves):
    for head, values in enumerate(curves):
        color, style = PALETTE[head % len(PALETTE)], LINES[head // len(PALETTE) % len(LINES)]
        axes.plot(1 + back, values, color=color, linestyle=style, label=f"head {head + 1}")
    ticks = [tick for tick in (0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000) if tick <= back[-1]]
    axes.set_xscale("log")  # of 1 + distance, since the token itself is at 0
    axes.set_xticks([1 + tick for tick in ticks], [f"{tick:,}" for tick in ticks], rotation=45)
    axes.minorticks_off()
    axes.tick_params(labelsize=7, labelcolor=SOFT)
    axes.set_xlabel("tokens back", fontsize=8, color=SOFT)
    axes.grid(True)
    axes.spines[["top", "right"]].set_visible(False)


def _png(figure, is_tight=False):
    png = io.BytesIO()
    with fonts_for(figure):
        if is_tight:
            figure.tight_layout()
        figure.savefig(png, format="png", bbox_inches="tight", pad_inches=0.15)
    return png.getvalue()


def _draw(figure, axes, run, layer, scale):
    """Draw the tokens of a run after a layer, with their trails, names and a scale of masses."""
    points, mass = run.points[layer], run.measured.mass.clip(*scale)
    if layer:
        for trail in run.points[: layer + 1].transpose(1, 2, 0):
            axes.plot(*trail, color=FAINT, linewidth=0.5, alpha=0.35, zorder=1)
    norm = LogNorm(*scale)
    drawn = axes.scatter(
        *points.T,
        c=mass,
        s=40 * 4 ** (2 * norm(mass) - 1),  # an area: the radius is halved or doubled at the ends
        cmap=MASS_COLOURS,
        norm=norm,
        edgecolors="white",
        linewidths=0.4,
        depthshade=False,
        zorder=2,
    )
    for token in _to_name(run.measured.tokens, run.measured.mass):
        axes.text(
            *points[token],
            "  " + run.labels[token][:LONGEST_NAME],
            fontsize=9,
            color=INK,
            zorder=3,
            parse_math=False,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )
    _set_axes(axes, run, layer)
    layers = len(run.points) - 1
    when = "before the first layer" if layer == 0 else f"after layer {layer} of {layers}"
    axes.set_title(
        f"{len(run.labels)} tokens {when}\n{run.name}, step {run.step:,}",
        fontsize=11,
        color=INK,
        y=0.97,
        parse_math=False,
    )
    bar = figure.colorbar(drawn, ax=axes, shrink=0.45, pad=0.06)
    bar.set_label("mass (colour and size)", fontsize=8, color=SOFT)
    bar.set_ticks([scale[0], 1, scale[1]], labels=[f"{x:.2f}" for x in (scale[0], 1, scale[1])])
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=7, labelcolor=FAINT)
    bar.outline.set_visible(False)


def _set_axes(axes, run, layer):
    """Set limits that include the trails, one scale for all three axes, and their titles."""
    passed = run.points[: layer + 1]
    low, high = passed.min((0, 1)), passed.max((0, 1))
    extent = np.maximum(high - low, 1e-9)  # a missing axis has no extent
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


def _to_name(tokens, mass):
    """Places of the heaviest tokens, each its last in the text."""
    last = {token: n for n, token in enumerate(tokens)}
    return sorted(last.values(), key=lambda n: -mass[n])[:NAMED]
