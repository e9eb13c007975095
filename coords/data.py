"""Measures what the map shows: coordinates, masses, losses and pulls of a text.

The letters in shapes: L layers, H heads, T tokens, C coordinates, K stored sources per token.
"""

import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from tqdm import tqdm

from engine.pulls import quietness, visit_pulls
from system.errors import UserError

STORED_SOURCES = 8  # the strongest, per token and head
GUESSES = 3
TSNE_STEPS = 1000
PROGRESS_DELAY = 1.0  # seconds before a progress bar appears


@dataclass
class Pulls:
    """Which token pulls which. Head H, the last, is the mean over heads.

    `sources` (L, H + 1, T, K) int are places in the text, strongest first; `weights` of the same
    shape are their shares of the pull, 0 if a token has fewer sources; `profile` (L, H, T) is the
    share that comes from each distance in tokens, mean over the text; `quiet` (L, H + 1, T) is the
    background's share, None for a model without a background.
    """

    sources: np.ndarray
    weights: np.ndarray
    profile: np.ndarray
    quiet: np.ndarray | None


@dataclass
class Measured:
    """One text as one model sees it.

    `z` (L + 1, T, C): coordinates before the first layer and after each; `mass` (T,); `loss` (T,)
    in nats, of each token given those before it, NaN for the first; `guesses` (T, GUESSES) the ids
    that the model expected most at this place, and `chances` (T, GUESSES) their probabilities.
    """

    tokens: list
    z: np.ndarray
    mass: np.ndarray
    loss: np.ndarray
    guesses: np.ndarray
    chances: np.ndarray
    pulls: Pulls


@torch.no_grad()
def measure(model, tokens):
    """The `Measured` of a text.

    Args:
        model: an NGT.
        tokens: a list of T ids.

    Raises:
        UserError: if a number is not finite, or all tokens are at the same place in every layer.
    """
    pulls, logits, geometry = _measure_pulls(model, tokens)
    z = torch.cat(geometry.layers).cpu().double().numpy()
    mass = geometry.mass[0].cpu().double().numpy()
    _check_finite("coordinates", z, mass)
    _check_finite("pulls", pulls.weights, pulls.profile)
    # np.ptp: highest minus lowest, over the tokens
    if float(np.ptp(z, axis=1).max()) < 1e-6 * max(1.0, float(np.abs(z).max())):
        raise UserError("all tokens are at the same place: there is nothing to show")
    loss, guesses, chances = _predictions(logits[0].cpu().double(), tokens)
    return Measured(tokens, z, mass, loss, guesses, chances, pulls)


def _check_finite(what, *arrays):
    if not all(np.isfinite(array).all() for array in arrays):
        raise UserError(f"the {what} of this checkpoint are not finite: use another")


def _measure_pulls(model, tokens):
    """`(Pulls, logits, Geometry)` from one forward pass, with a progress bar."""
    config, count = model.config, len(tokens)
    shape = (config.num_layers, config.num_heads + 1, count, STORED_SOURCES)
    pulls = Pulls(
        np.zeros(shape, np.int64),
        np.zeros(shape),
        np.zeros((config.num_layers, config.num_heads, count)),
        np.zeros(shape[:-1]) if config.background else None,
    )
    total = config.num_layers * count
    bar = tqdm(total=total, unit=" tokens", desc="pulls", delay=PROGRESS_DELAY, leave=False)

    def keep(layer, rows, shares):
        shares = shares.cpu().double()
        _add_to_profile(pulls.profile[layer], rows, shares.numpy())
        shares = torch.cat([shares, shares.mean(0, keepdim=True)])  # (H + 1, rows, rows.stop)
        strongest = shares.topk(min(STORED_SOURCES, rows.stop))
        stored = slice(strongest.values.shape[-1])
        pulls.weights[layer, :, rows, stored] = strongest.values.numpy()
        pulls.sources[layer, :, rows, stored] = strongest.indices.numpy()
        if pulls.quiet is not None:
            pulls.quiet[layer, :, rows] = quietness(shares).numpy()
        bar.update(rows.stop - rows.start)

    with bar:
        ids = torch.tensor([tokens], device=model.token_emb.weight.device)
        logits, geometry = visit_pulls(model, ids, keep)
    pulls.profile /= count
    return pulls, logits, geometry


def _add_to_profile(profile, rows, weights):
    """Add shares (H, rows, rows.stop) to the sums by distance in tokens, `profile` (H, T)."""
    for n, row in enumerate(range(rows.start, rows.stop)):
        profile[:, : row + 1] += weights[:, n, row::-1]


def _predictions(logits, tokens):
    """`loss`, `guesses` and `chances` of `Measured`, from logits (T, vocab_size)."""
    log_chance = F.log_softmax(logits, -1)
    _check_finite("losses", log_chance.exp().numpy())
    best = log_chance[:-1].exp().topk(min(GUESSES, log_chance.shape[1]))
    nothing = np.zeros((1, best.indices.shape[1]))  # no token precedes the first
    loss = -log_chance[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()
    return (
        np.concatenate([[np.nan], loss]),
        np.concatenate([nothing, best.indices.numpy()]).astype(int),
        np.concatenate([nothing, best.values.numpy()]),
    )


def project(z, method):
    """Coordinates in 3-D.

    One projection serves all layers, so that only a token that has moved also moves in the picture.

    Args:
        z: (L + 1, T, C).
        method: "pca" or "tsne".

    Returns:
        `(points (L + 1, T, 3), titles of the three axes)`; with fewer than three coordinates the
        missing axes are 0.
    """
    layers, count, coords = z.shape
    flat = z.reshape(-1, coords)
    if method == "tsne":
        points = _tsne(flat)
        axes = [f"t-SNE {n + 1}" for n in range(3)]
    else:
        pca = PCA(n_components=min(3, coords), svd_solver="full")
        points = pca.fit_transform(flat)
        axes = [
            f"component {n + 1} ({100 * ratio:.1f} % of variance)"
            for n, ratio in enumerate(pca.explained_variance_ratio_)
        ]
        missing = 3 - len(axes)
        points = np.pad(points, ((0, 0), (0, missing)))
        axes += ["no third component", "no second component"][:missing][::-1]
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
