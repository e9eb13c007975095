"""What each head learned: its numbers, its field by distance, and where its pull comes from."""

import itertools

import numpy as np
import torch

from engine.learned import heads_learned
from gravity.law import gravity_field

LONGEST_FIELD = 100_000  # tokens back
NEAR = 32  # tokens back; every distance up to here is shown
FAR_STEPS = 60  # distances beyond it, evenly spaced on a logarithmic scale


def distances(limit):
    """Distances in whole tokens up to `limit`: every near one, and fewer the farther they are."""
    near = np.arange(min(NEAR, limit) + 1)
    if limit <= NEAR:
        return near
    far = np.geomspace(NEAR, limit, FAR_STEPS).round().astype(int)
    return np.unique(np.concatenate([near, far]))


def heads_table(model, measured):
    """A dict per head: what it learned, and what it looks at in the text.

    Args:
        measured: the `data.Measured` of the text.

    Returns:
        L * H dicts of numbers, `layer` from 1 and `head` from 0; None if the law or the head has
        no such number. `quiet` is the share of the background or sink, mean over the text.
    """
    profile = measured.profile
    learned = (
        itertools.chain(*measured.attention.heads)
        if measured.kind == "vanilla"
        else heads_learned(model)
    )
    return [
        {
            **{"layer": layer + 1, "head": head, **numbers, **_looks(profile[layer, head])},
            "quiet": float(1 - profile[layer, head].sum()) if fades(model) else None,
        }
        for (layer, head), numbers in zip(np.ndindex(profile.shape[:2]), learned, strict=True)
    ]


def fades(model):
    """Whether shares may sum to less than 1: with a background, or the sink of a vanilla model."""
    return getattr(model.config, "background", False) or getattr(model.config, "sink", False)


def _looks(profile):
    """From shares by distance (T,): the strongest distance, the mean, and the reach of 90 %."""
    total = profile.sum()
    if total == 0:
        return dict.fromkeys(("most_distance", "most_share", "one_back", "mean_distance", "within"))
    shares = profile / total
    most = int(shares.argmax())
    return {
        "most_distance": most,
        "most_share": float(shares[most]),
        "one_back": float(shares[1]) if len(shares) > 1 else 0.0,
        "mean_distance": float(shares @ np.arange(len(shares))),
        # less the rounding of a sum that is 0.9 exactly
        "within": int(np.searchsorted(shares.cumsum(), 0.9 - 1e-9)),
    }


@torch.no_grad()
def field_by_distance(model, num_tokens):
    """The possible field by distance in time: of a mass of 1 at the same place in space.

    Returns:
        `(distances (D,), field (L, H, D))`, distances in tokens; `(None, None)` unless the law is
        newton: in the published one time plays no part.
    """
    if getattr(model.config, "law", None) != "newton":
        return None, None
    attns = [layer.attn for layer in model.layers]
    largest_mass = model.largest_mass()
    windows = torch.cat([attn.window(largest_mass) for attn in attns])
    reached = windows[windows.isfinite()]
    longest = float(reached.max()) if len(reached) else 0.0
    # the curves end one token beyond the longest window, or with the text if that is longer
    back = distances(int(min(max(num_tokens - 1, np.ceil(longest) + 1), LONGEST_FIELD)))
    heads, device = model.config.num_heads, windows.device
    q = torch.zeros(1, heads, 1, 1, device=device)
    k = torch.zeros(1, heads, len(back), 1, device=device)
    mass = torch.ones(1, len(back), device=device)
    # one query at the last position, and one source at each distance before it
    now = int(back[-1])
    positions = now - torch.as_tensor(back, device=device)
    here = torch.tensor([now], device=device)
    at = {"query_positions": here, "key_positions": positions}
    fields = [gravity_field(q, k, mass, **at, **attn.field_law()) for attn in attns]
    return back, torch.stack([field[0, :, 0] for field in fields]).cpu().numpy()


def pull_by_distance(profile, has_background):
    """Shares of the pull by distance in tokens; far distances are averaged in spans.

    With a background they are shares of what the head feels at all, however little that is.

    Args:
        profile: (L, H, T), see `data.Measured`.

    Returns:
        `(distances (D,), shares (L, H, D))`; each distance is the first of its span.
    """
    if has_background:
        total = profile.sum(-1, keepdims=True)
        profile = profile / np.where(total > 0, total, 1)
    edges = distances(profile.shape[-1] - 1)
    ends = np.append(edges[1:], profile.shape[-1])
    # differences of running sums give each span's sum
    sums = np.concatenate([np.zeros((*profile.shape[:2], 1)), profile.cumsum(-1)], -1)
    return edges, (sums[..., ends] - sums[..., edges]) / (ends - edges)
