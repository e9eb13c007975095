"""Builds the map as one HTML document, from the measured data and the page's own files."""

import base64
import html
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coords.data import Measured
from system.markdown import json_for_script

ROOT = Path(__file__).resolve().parent.parent
STYLES = (
    *("web/style.css", "coords/page.css", "coords/orbit.css", "coords/scene.css"),
    "coords/heads.css",
)
SCRIPTS = (
    *("web/shared.js", "web/chart.js", "coords/colours.js", "coords/data.js", "coords/orbit.js"),
    *("coords/camera.js", "coords/scene.js", "coords/multiples.js", "coords/heads.js", "coords/next.js"),
    *("coords/masses.js", "coords/side.js", "coords/url.js", "coords/download.js"),
    *("coords/live.js", "coords/page.js"),
)
LARGEST_SHARE = 65535  # a share of 1, stored as an unsigned 16-bit integer
LARGEST_COORDINATE = 32767  # the largest coordinate, stored as a signed one


@dataclass
class Run:
    """One checkpoint on one text: all that the page shows of it.

    `labels` and `texts` come from `labels_in_text`, `guesses` are tokens as people read them,
    `starts` the character of the text at which each token begins, `counts` how often each occurs
    in the text that `counted` names;
    `is_corpus` says whether that is the training text. `points` and `axes` come from
    `data.project`, `heads`, `field` and `pull` from coords/heads.py.
    """

    name: str
    step: int
    law: str
    source: str
    labels: list
    texts: list
    guesses: list
    starts: list
    measured: Measured
    points: np.ndarray
    axes: list
    counts: list
    counted: str
    is_corpus: bool
    heads: list
    field: tuple
    pull: tuple
    vocabulary: dict


def run_data(run):
    """A run as plain types for JSON, large arrays in base64 (little-endian)."""
    measured, pulls = run.measured, run.measured.pulls
    scale = float(np.abs(measured.z).max()) / LARGEST_COORDINATE
    back, field = run.field
    layers, heads, _, stored = pulls.sources.shape
    return {
        "name": run.name,
        "step": run.step,
        "law": run.law,
        "source": run.source,
        "tokens": measured.tokens,
        "labels": run.labels,
        "texts": run.texts,
        "guesses": run.guesses,
        "chances": _rounded(measured.chances, 4),
        "starts": run.starts,
        "mass": _rounded(measured.mass, 5),
        "loss": [None, *_rounded(measured.loss[1:], 4)],
        "counts": run.counts,
        "counted": run.counted,
        "isCorpus": run.is_corpus,
        "points": _significant(run.points, 5),
        "axes": run.axes,
        "numLayers": layers,
        "numHeads": heads - 1,
        "numStored": stored,
        "numCoords": measured.z.shape[2],
        "z": _packed(measured.z / scale, "<i2"),
        "zScale": scale,
        "sources": _packed(pulls.sources, "<u2"),
        "weights": _packed(pulls.weights * LARGEST_SHARE, "<u2"),
        "quiet": None if pulls.quiet is None else _packed(pulls.quiet * LARGEST_SHARE, "<u2"),
        "heads": run.heads,
        "field": None if back is None else {"back": back.tolist(), "of": _significant(field, 4)},
        "pull": {"back": run.pull[0].tolist(), "of": _significant(run.pull[1], 6)},
        "vocabulary": run.vocabulary,
    }


def _packed(values, dtype):
    return base64.b64encode(np.rint(values).astype(dtype).tobytes()).decode()


def _rounded(values, digits):
    return np.round(values, digits).tolist()


def _significant(values, digits):
    """Nested lists, all rounded to the last of `digits` significant digits of the largest."""
    largest = float(np.abs(values).max())
    return (
        _rounded(values, digits - int(np.ceil(np.log10(largest)))) if largest else values.tolist()
    )


def map_page(runs, title, layer, live=False):
    """The HTML document, a string.

    Args:
        runs: a list of one or two results of `run_data`; on the live page of none.
        title: of the page.
        layer: the layer at which the page opens.
        live: whether a server answers the page's questions.
    """
    parts = {
        "title": html.escape(title),
        "style": page_style(),
        "data": json_for_script({"layer": layer, "live": live, "runs": runs}),
        "script": page_script(),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _texts(["coords/page.html"]))


def page_style():
    """All CSS of the page, as one text."""
    return _texts(STYLES)


def page_script():
    """All JavaScript of the page, as one text: the files inside one function."""
    return f'(() => {{\n"use strict";\n{_texts(SCRIPTS)}\n}})();'


def _texts(names):
    return "\n".join((ROOT / name).read_text(encoding="utf-8") for name in names)
