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
    *("web/shared.js", "web/chart.js", "coords/colours.js", "coords/data.js"),
    *("coords/distances.js", "coords/picture.js", "coords/why.js", "coords/strip.js"),
    *("coords/orbit.js", "coords/camera.js", "coords/scene.js", "coords/multiples.js"),
    "coords/heatmap.js",
    *("coords/head_table.js", "coords/heads.js", "coords/compare.js", "coords/what_if.js"),
    "coords/next.js",
    *("coords/masses.js", "coords/side.js", "coords/details.js", "coords/url.js"),
    *("coords/download.js", "coords/live.js", "coords/keys.js", "coords/page.js"),
)
LARGEST_SHARE = 65535  # a probability of 1, stored as an unsigned 16-bit integer
LARGEST_COORDINATE = 32767  # the largest coordinate, stored as a signed one
THOUSANDTHS = 1000  # of a nat, in which losses are stored


@dataclass
class Run:
    """One checkpoint on one text: all that the page shows of it.

    `labels` and `texts` come from `labels_in_text`, `starts` is the character of the text at which
    each token begins, `counts` how often each occurs in the text that `counted` names;
    `is_corpus` says whether that is the training text. `names` are the labels of the tokens that
    predictions name, by id. `points` and `axes` come from `data.project`, `heads`, `field` and
    `pull` from coords/heads.py. A vanilla transformer has no points, axes and vocabulary of masses.
    """

    name: str
    step: int
    law: str
    source: str
    labels: list
    texts: list
    starts: list
    names: dict
    measured: Measured
    points: np.ndarray | None
    axes: list | None
    counts: list
    counted: str
    is_corpus: bool
    heads: list
    field: tuple
    pull: tuple
    vocabulary: dict | None


def run_data(run):
    """A run as plain types for JSON, large arrays in base64 (little-endian)."""
    measured, attention = run.measured, run.measured.attention
    layers, heads = attention.q.shape[:2]
    back, field = run.field
    ids = np.array(sorted(run.names))
    return {
        "name": run.name,
        "step": run.step,
        "kind": measured.kind,
        "law": run.law,
        "source": run.source,
        "tokens": measured.tokens,
        "labels": run.labels,
        "texts": run.texts,
        "starts": run.starts,
        "mass": None if measured.mass is None else [float(f"{x:.6g}") for x in measured.mass],
        "loss": [None, *_rounded(measured.loss[1:], 4)],
        "counts": run.counts,
        "counted": run.counted,
        "isCorpus": run.is_corpus,
        "numLayers": layers,
        "numHeads": heads,
        **_places(run),
        "attention": _attention(attention),
        "names": [run.names[token] for token in ids.tolist()],
        "nameIds": ids.tolist(),
        "lens": _predictions(measured.lens, ids),
        "off": None
        if measured.off is None
        else {
            **_predictions(measured.off, ids),
            "loss": _packed((measured.off.loss * THOUSANDTHS).clip(0, 65535), "<u2"),
        },
        "heads": run.heads,
        "field": None if back is None else {"back": back.tolist(), "of": _significant(field, 4)},
        "pull": {"back": run.pull[0].tolist(), "of": _significant(run.pull[1], 6)},
        "vocabulary": run.vocabulary,
    }


def _places(run):
    """The part of `run_data` that a vanilla transformer lacks."""
    z = run.measured.z
    if z is None:
        return dict.fromkeys(("points", "axes", "z", "zScale", "numCoords"))
    scale = float(np.abs(z).max()) / LARGEST_COORDINATE or 1.0
    return {
        "points": _significant(run.points, 5),
        "axes": run.axes,
        "z": _packed(z / scale, "<i2"),
        "zScale": scale,
        "numCoords": z.shape[2],
    }


def _attention(attention):
    """Where tokens look from and pull from, and the law, packed."""
    q, k = attention.q, attention.k
    scale = np.maximum(np.abs(q).max((2, 3)), np.abs(k).max((2, 3))) / LARGEST_COORDINATE
    scale = np.where(scale > 0, scale, 1.0)  # (L, H)
    packed = [_packed(x / scale[:, :, None, None], "<i2") for x in (q, k)]
    return {
        "width": q.shape[3],
        "exponent": attention.exponent,
        "cutoff": attention.cutoff,
        "massInValue": attention.mass_in_value,
        "q": packed[0],
        "k": None if q is k else packed[1],
        "scale": scale.tolist(),
        "heads": attention.heads,
    }


def _predictions(predictions, ids):
    """Packed `ids`, as places in the sorted array `ids`, and `chances`."""
    return {
        "ids": _packed(
            np.searchsorted(ids, predictions.ids), "<u2" if len(ids) <= 65536 else "<u4"
        ),
        "chances": _packed(predictions.chances * LARGEST_SHARE, "<u2"),
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
        layer: at which the page opens; None: where a head pulls the first token most.
        live: whether a server answers the page's questions.
    """
    parts = {
        "title": html.escape(title),
        "style": page_style(),
        "data": json_for_script({"layer": layer, "live": live, "runs": runs}),
        "script": page_script(),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], page_texts(["coords/page.html"]))


def page_style():
    """All CSS of the page, as one text."""
    return page_texts(STYLES)


def page_script():
    """All JavaScript of the page, as one text: the files inside one function."""
    return f'(() => {{\n"use strict";\n{page_texts(SCRIPTS)}\n}})();'


def page_texts(names):
    """Files of the repository, one after the other."""
    return "\n".join((ROOT / name).read_text(encoding="utf-8") for name in names)
