"""What the map shows of one checkpoint on one text, measured.

The letters in shapes: L layers, H heads, T tokens, C coordinates, K stored sources of a token.
"""

import contextlib
import io
import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from tqdm import tqdm

from engine.pulls import visit_pulls
from system.errors import UserError

STORED_SOURCES = 8  # of a token, a head: the strongest
GUESSES = 3
TSNE_STEPS = 1000
PROGRESS_DELAY = 1.0  # seconds that may pass without a bar


@dataclass
class Pulls:
    """Who pulls whom. Head H, the last, is the mean over heads.

    `sources` (L, H + 1, T, K) int, strongest first, and `weights` of the same shape, shares of the
    pull, 0 where a token has fewer sources; `profile` (L, H, T): the share that comes from so many
    tokens back, mean over the text.
    """

    sources: np.ndarray
    weights: np.ndarray
    profile: np.ndarray


@dataclass
class Measured:
    """One text as one model sees it.

    `z` (L + 1, T, C): coordinates before the first block and after each; `mass` (T,); `loss` (T,)
    nats of each token given those before it, NaN for the first; `guesses` (T, GUESSES) ids that the
    model held likeliest in its place and `chances` (T, GUESSES) their probabilities.
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
    """Coordinates, masses, losses and pulls of tokens.

    Raises:
        UserError: where numbers are not finite, or every token stays at one and the same place.
    """
    config, count = model.config, len(tokens)
    shape = (config.num_layers, config.num_heads + 1, count, STORED_SOURCES)
    pulls = Pulls(
        np.zeros(shape, np.int64),
        np.zeros(shape),
        np.zeros((config.num_layers, config.num_heads, count)),
    )
    total = config.num_layers * count
    bar = tqdm(total=total, unit=" tokens", desc="pulls", delay=PROGRESS_DELAY, leave=False)

    def keep(layer, rows, weights):
        weights = weights.cpu().double()
        _add_to_profile(pulls.profile[layer], rows, weights.numpy())
        weights = torch.cat([weights, weights.mean(0, keepdim=True)])
        strongest = weights.topk(min(STORED_SOURCES, rows.stop))
        stored = slice(strongest.values.shape[-1])
        pulls.weights[layer, :, rows, stored] = strongest.values.numpy()
        pulls.sources[layer, :, rows, stored] = strongest.indices.numpy()
        bar.update(rows.stop - rows.start)

    with bar:
        ids = torch.tensor([tokens], device=model.token_emb.weight.device)
        logits, geometry = visit_pulls(model, ids, keep)
    pulls.profile /= count
    z = torch.cat(geometry.layers).cpu().double().numpy()
    mass = geometry.mass[0].cpu().double().numpy()
    if not (np.isfinite(z).all() and np.isfinite(mass).all()):
        raise UserError("the coordinates of this checkpoint are not finite: use another")
    if not (np.isfinite(pulls.weights).all() and np.isfinite(pulls.profile).all()):
        raise UserError("the pulls of this checkpoint are not finite: use another")
    if float(np.ptp(z, axis=1).max()) < 1e-6 * max(1.0, float(np.abs(z).max())):
        raise UserError("all tokens are at the same place: there is nothing to show")
    log_chance = F.log_softmax(logits[0].cpu().double(), -1)  # (T, vocab_size)
    if not torch.isfinite(log_chance.exp()).all():
        raise UserError("the losses of this checkpoint are not finite: use another")
    best = log_chance[:-1].exp().topk(min(GUESSES, config.vocab_size))
    first = np.zeros((1, best.indices.shape[1]))
    loss = -log_chance[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()
    return Measured(
        tokens=tokens,
        z=z,
        mass=mass,
        loss=np.concatenate([[np.nan], loss]),
        guesses=np.concatenate([first, best.indices.numpy()]).astype(int),
        chances=np.concatenate([first, best.values.numpy()]),
        pulls=pulls,
    )


def _add_to_profile(profile, rows, weights):
    """Add the shares (H, rows, rows.stop) to the sums by distance, (H, T)."""
    for n, row in enumerate(range(rows.start, rows.stop)):
        profile[:, : row + 1] += weights[:, n, row::-1]


def project(z, method):
    """One picture for all layers, so that movement is movement.

    Args:
        z: (L + 1, T, C).
        method: "pca" or "tsne".

    Returns:
        `(points (L + 1, T, 3), titles of the three axes)`; an axis that does not exist is 0.
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
    """Mirror axes of a picture so that the same tokens lie on the same sides as in another.

    Args:
        points, like: (L + 1, T, 3) of the same tokens; of their last layers.
    """
    ours, theirs = (x[-1] - x[-1].mean(0) for x in (points, like))
    return points * np.where((ours * theirs).sum(0) < 0, -1.0, 1.0)


def _tsne(points):
    """(N, C) to (N, 3), with a bar: scikit-learn tells how far it is in words alone."""
    bar = tqdm(total=TSNE_STEPS, desc="t-SNE", unit=" steps", delay=PROGRESS_DELAY, leave=False)

    class Steps(io.StringIO):
        def write(self, text):
            for step in re.findall(r"Iteration (\d+):", text):
                bar.update(int(step) - bar.n)
            return len(text)

    tsne = TSNE(
        n_components=3,
        perplexity=min(30.0, (len(points) - 1) / 3),
        max_iter=TSNE_STEPS,
        init="pca" if points.shape[1] >= 3 else "random",
        random_state=0,
        verbose=2,
    )
    with bar, contextlib.redirect_stdout(Steps()):
        found = tsne.fit_transform(points.astype(np.float32))
    if not np.isfinite(found).all():
        raise UserError("t-SNE found no places for these coordinates: use --method pca")
    return found.astype(np.float64)
