"""Tokens with bars beside them, as lines for a terminal: their masses and their pulls."""

import torch

from engine.pulls import quietness
from system.safe_text import printable
from system.terminal import bar, can_show, cells, columns, encodable, fit, level, styled

SHOWN_PULLS = 8  # of one row of weights
SHOWN_PULLS_OF_HEAD = 3  # if many heads are shown
LONGEST_LABEL = 16  # columns
SHORTEST_BAR = 6  # columns
LONGEST_MASS = 12  # columns of the bar of the mass farthest from 1, on either side


def label_width(labels):
    """Columns for a list of labels: of the widest, at most `LONGEST_LABEL` or a sixth of a line."""
    widest = max((cells(encodable(printable(label))) for label in labels), default=1)
    return min(widest, LONGEST_LABEL, columns() // 6)


def token_lines(tokens, labels, masses):
    """One line per token: id, label and, if `masses` is given, its mass as a number and a bar.

    A bar begins at a mass of 1: heavier tokens have it on the right, lighter ones on the left.
    """
    width = label_width(labels)
    farthest = max((abs(mass - 1) for mass in masses or ()), default=0) or 1.0
    # 9 for the id, 15 for "  (mass 1.234) ", 1 for the line in the middle
    room = min((columns() - 9 - width - 15 - 1) // 2, LONGEST_MASS)
    for n, (token, label) in enumerate(zip(tokens, labels, strict=True)):
        line = f"{token:>7}  {fit(label, width)}"
        if masses:
            line += f"  (mass {masses[n]:.3f}) {_two_sided((masses[n] - 1) / farthest, room)}"
        yield line.rstrip()


def _two_sided(share, width):
    """A bar for a share from -1 to 1, to the left or right of a line with `width` columns beside
    it."""
    if width < 1:
        return ""
    middle = "│" if can_show("│") else "|"
    if share >= 0:
        return " " * width + middle + bar(share, width)
    if not can_show("▐█"):
        return bar(-share, width).rjust(width) + middle
    whole, half = divmod(max(1, round(-share * width * 2)), 2)
    return ("▐" * half + "█" * whole).rjust(width) + middle


def pull_lines(shares, labels, count=SHOWN_PULLS, indent="", full=1.0, *, has_background=False):
    """One line per token that pulled hardest: share, label, how far back, bar.

    Args:
        shares: tensor (N,) that sums to 1, or is 0 if nothing reaches the token; with a background
            it sums to less, and a last line says how much is the background's.
        labels: of the N tokens, the newest last.
        full: the share that a bar of full length stands for.
    """
    places = [
        place
        for place in shares.topk(min(count, len(shares))).indices.tolist()
        if shares[place] > 0
    ]
    if not places and not has_background:
        yield f"{indent}nothing within reach"
    width = label_width([labels[place] for place in places])
    distances = [_distance(len(labels) - 1 - place) for place in places]
    distance_width = max(map(len, distances), default=0)
    # a share takes 6 columns, and 2 spaces stand between columns of the table
    room = columns() - len(indent) - 6 - 2 - width - 2 - distance_width - 2
    for place, distance in zip(places, distances, strict=True):
        share = float(shares[place])
        line = f"{indent}{share:6.1%}  {fit(labels[place], width)}  {distance:<{distance_width}}"
        yield f"{line}  {bar(share / full, room)}"
    if has_background:
        yield f"{indent}{float(quietness(shares)):6.1%}  quiet: the background's share"


def _distance(back):
    return f"{back:,} back" if back else "itself"


def strip_lines(shares, labels):
    """Two lines: the newest tokens that fit one line, and under each how hard it pulled.

    Heights are relative to the hardest pull of all.
    """
    text, heights, room = [], [], columns()
    hardest = float(shares.max()) or 1.0
    for label, share in zip(reversed(labels), reversed(shares.tolist()), strict=True):
        label = encodable(printable(label))
        width = max(cells(label), 1)
        if width > room:
            break
        room -= width
        text.append(fit(label, width))
        heights.append(level(share / hardest) * width)
    return "".join(reversed(text)), "".join(reversed(heights)).rstrip()


def mean_back(shares):
    """Mean distance of the pull in tokens back; shares (N,), the newest token last."""
    total = float(shares.sum()) or 1.0  # with a background less than 1
    return float(torch.arange(len(shares) - 1, -1, -1.0) @ shares.float()) / total


def layer_lines(weights, labels, layer, has_background=False):
    """Lines: the hardest pulls of every head of a layer.

    Args:
        weights: (num_heads, N), rows as the shares of `pull_lines`.
        layer: its number, from 1.
    """
    for head, shares in enumerate(weights, 1):
        title = f"layer {layer} head {head}, {mean_back(shares):,.1f} tokens back on average"
        yield styled(title, "dim")
        yield from pull_lines(
            shares, labels, SHOWN_PULLS_OF_HEAD, "  ", has_background=has_background
        )


def head_lines(weights, labels, has_background=False):
    """One line per head, named `layer.head`: how far back it looks, and its hardest pull.

    With a background also how quiet it is: the background's share.

    Args:
        weights: (num_layers, num_heads, N).
    """
    width = label_width([labels[place] for place in weights.argmax(-1).flatten().tolist()])
    yield styled(f" head  mean back  {'quiet  ' if has_background else ''}hardest pull", "dim")
    for layer, heads in enumerate(weights, 1):
        for head, shares in enumerate(heads, 1):
            place = int(shares.argmax())
            if not shares[place]:
                yield f"{f'{layer}.{head}':>5} nothing within reach"
                continue
            line = f"{f'{layer}.{head}':>5} {mean_back(shares):>8,.1f} "
            if has_background:
                line += f"{float(quietness(shares)):6.1%} "
            line += f"{float(shares[place]):6.1%} {fit(labels[place], width)} "
            line += f"{_distance(len(labels) - 1 - place):<9} "
            room = columns() - cells(line)
            yield line + (bar(float(shares[place]), room) if room >= SHORTEST_BAR else "")
