"""Measures what the page shows of a text: places, masses, losses, pulls and predictions.

The letters in shapes: L layers, H heads, T tokens, C coordinates, W channels of a head.
"""

import math
import sys
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from coords.predictions import (
    PROGRESS_DELAY,
    Predictions,
    check_finite,
    hidden_states,
    predictions,
    stacked,
    with_heads_off,
)
from engine.pulls import visit_pulls
from system.errors import UserError

TSNE_STEPS = 1000
TSNE_POINTS = 4  # fewer have no neighbours


@dataclass
class Attention:
    """All that the law needs for any pull of the text.

    `q` and `k` (L, H, T, W): under gravity where tokens look from and where they pull from, on the
    principal axes of each head's sources, of which the first spreads widest; `k` is `q` under the
    published law. Of a vanilla transformer its queries and keys, scaled so that scores are q.k.
    `heads` is a list of L lists of H dicts: the numbers of each head's law, None for what it lacks.
    `exponent`, `cutoff` and `mass_in_value` are as in the config.
    """

    q: np.ndarray
    k: np.ndarray
    heads: list
    exponent: int | None
    cutoff: str
    mass_in_value: bool


@dataclass
class Measured:
    """One text as one model sees it.

    `kind` is "newton", "published" or "vanilla". `z` (L + 1, T, C): coordinates before the first
    layer and after each; `mass` (T,); a vanilla transformer has neither. `loss` (T,) in nats, of
    each token given those before it, NaN for the first. `profile` (L, H, T) is the share of the
    pull that comes from each distance in tokens, mean over the text. `lens` are the `Predictions`
    (L + 1, T, ...) read from the hidden state before the first layer and after each (logit lens,
    nostalgebraist 2020, https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru); `off` those with each
    head switched off, (L, H, T, ...), or None.
    """

    tokens: list
    kind: str
    z: np.ndarray | None
    mass: np.ndarray | None
    loss: np.ndarray
    attention: Attention
    profile: np.ndarray
    lens: Predictions
    off: Predictions | None


@torch.no_grad()
def measure(model, tokens, live=False):
    """The `Measured` of a text.

    Args:
        model: an NGT or a vanilla transformer.
        tokens: a list of T ids.
        live: leave `off` out if it would take more than half a second.

    Raises:
        UserError: if a number is not finite.
    """
    ids = torch.tensor(tokens, device=model.token_emb.weight.device)
    kind = getattr(model.config, "law", "vanilla")
    with hidden_states(model) as states:
        profile, points, result = _measure_pulls(model, ids)
    z = mass = None
    if kind != "vanilla":
        geometry = result[1]
        z = torch.cat(geometry.layers).cpu().double().numpy()
        mass = geometry.mass[0].cpu().double().numpy()
        check_finite("coordinates", z, mass)
    q, k = (torch.stack(parts).cpu().double().numpy() for parts in zip(*points, strict=True))
    check_finite("pulls", profile, q, k)
    bar = tqdm(states, unit=" layers", desc="predictions", delay=PROGRESS_DELAY, leave=False)
    lens = stacked([predictions(model, h[0], ids) for h in bar])
    return Measured(
        tokens=tokens,
        kind=kind,
        z=z,
        mass=mass,
        loss=np.concatenate([[np.nan], lens.loss[-1, :-1]]),
        attention=_attention(model, q, k, kind),
        profile=profile,
        lens=lens,
        off=with_heads_off(model, ids, live),
    )


def _measure_pulls(model, ids):
    """`(profile, [(q, k) per layer], the forward pass's result)`, with a progress bar."""
    config, count = model.config, len(ids)
    profile = np.zeros((config.num_layers, config.num_heads, count))
    points = []
    total = config.num_layers * count
    bar = tqdm(total=total, unit=" tokens", desc="pulls", delay=PROGRESS_DELAY, leave=False)

    def keep(layer, rows, shares):
        _add_to_profile(profile[layer], rows, shares.cpu().double().numpy())
        bar.update(rows.stop - rows.start)

    def keep_points(layer, q, k):
        points.append((q, k))

    with bar:
        result = visit_pulls(model, ids[None], keep, keep_points)
    return profile / count, points, result


def _add_to_profile(profile, rows, weights):
    """Add shares (H, rows, rows.stop) to the sums by distance in tokens, `profile` (H, T)."""
    for n, row in enumerate(range(rows.start, rows.stop)):
        profile[:, : row + 1] += weights[:, n, row::-1]


def _attention(model, q, k, kind):
    """The `Attention` of points, or of queries and keys, (L, H, T, W) each."""
    config = model.config
    return Attention(
        *_placed(q, k, kind),
        heads=[_law(layer.attn, kind, config.num_heads) for layer in model.layers],
        exponent=config.exponent if kind == "newton" else None,
        cutoff=getattr(config, "cutoff", "none"),
        mass_in_value=getattr(config, "mass_in_value", False),
    )


def _placed(q, k, kind):
    """`Attention.q` and `.k`."""
    if kind == "vanilla":
        # both of one size, so that both are stored equally well
        size = np.sqrt(np.abs(k).max((2, 3)) / np.maximum(np.abs(q).max((2, 3)), 1e-30))
        size = np.where(size > 0, size, 1.0)[:, :, None, None]
        return q * size / math.sqrt(q.shape[-1]), k / size
    centre = k.mean(2, keepdims=True)
    spread = (k - centre).swapaxes(2, 3) @ (k - centre)  # (L, H, W, W)
    axes = principal_axes(spread)[1]
    places = (k - centre) @ axes
    return places if kind == "published" else (q - centre) @ axes, places


def principal_axes(spread):
    """`(variances (..., W), axes (..., W, W))` of sums of products, the widest first.

    The axes are columns; the largest entry of each is positive, so that no chance decides.
    """
    variances, axes = np.linalg.eigh(spread)
    variances, axes = variances[..., ::-1], axes[..., ::-1]
    largest = np.take_along_axis(axes, np.abs(axes).argmax(-2)[..., None, :], -2)
    return variances.clip(min=0), axes * np.where(largest < 0, -1.0, 1.0)


def _law(attn, kind, num_heads):
    """`Attention.heads` of one layer."""
    if kind == "newton":
        law = attn.law()
        names = {"timeScale": "time_scale", "timeOffset": "time_offset"}
        names |= {"background": "background", "radius": "radius"}
    elif kind == "published":
        law, names = attn.law(), {"gamma": "gamma", "bias": "bias", "radius": "radius"}
    else:
        law = {"slope": getattr(attn, "slopes", None), "sink": attn.sink}
        names = {"slope": "slope", "sink": "sink"}
    values = {
        key: [None] * num_heads if law[name] is None else law[name].expand(num_heads).tolist()
        for key, name in names.items()
    }
    return [{key: column[head] for key, column in values.items()} for head in range(num_heads)]


def project(z, method):
    """Coordinates in 3-D.

    One projection serves all layers, so that only a token that has moved also moves in the picture.

    Args:
        z: (L + 1, T, C).
        method: "pca" or "tsne".

    Returns:
        `(points (L + 1, T, 3), titles of the three axes)`; an axis along which nothing differs,
        because there are too few coordinates or tokens, is 0.
    """
    layers, count, coords = z.shape
    flat = z.reshape(-1, coords)
    if method == "tsne":
        points = _tsne(flat)
        axes = [f"t-SNE {n + 1}" for n in range(3)]
        return points.reshape(layers, count, 3), axes
    centred = flat - flat.mean(0)
    variances, directions = principal_axes(centred.T @ centred)
    points, axes = np.zeros((len(flat), 3)), []
    for n, name in enumerate(("first", "second", "third")):
        # what is smaller is rounding
        if n < coords and variances[n] > 1e-12 * max(variances[0], np.square(flat).sum()):
            points[:, n] = centred @ directions[:, n]
            percent = 100 * variances[n] / variances.sum()
            axes.append(f"component {n + 1} ({percent:.1f} % of variance)")
        else:
            axes.append(f"no {name} component")
    return points.reshape(layers, count, 3), axes


def align(points, like):
    """Mirror the axes of `points` so that tokens are on the same sides as in `like`.

    A projection may flip any axis. The places after the last layer show which axes are flipped.

    Args:
        points, like: (L + 1, T, 3), with the same tokens; the numbers of layers may differ.

    Returns:
        The mirrored `points`, of the same shape.
    """
    ours, theirs = (x[-1] - x[-1].mean(0) for x in (points, like))
    return points * np.where((ours * theirs).sum(0) < 0, -1.0, 1.0)


def _tsne(points):
    """t-SNE (van der Maaten & Hinton 2008) of points, (N, C) to (N, 3)."""
    from sklearn.manifold import TSNE  # takes a second to import

    if len(points) < TSNE_POINTS:
        raise UserError("t-SNE needs more tokens: use --method pca")
    # scikit-learn reports progress only as text on standard output
    print(f"t-SNE places {len(points):,} points, which can take minutes", file=sys.stderr)
    tsne = TSNE(
        n_components=3,
        perplexity=min(30.0, (len(points) - 1) / 3),
        max_iter=TSNE_STEPS,
        init="pca" if points.shape[1] >= 3 else "random",
        random_state=0,
    )
    found = tsne.fit_transform(points.astype(np.float32))
    if not np.isfinite(found).all():
        raise UserError("t-SNE found no places for these coordinates: use --method pca")
    return found.astype(np.float64)
