"""What each head of an NGT learned, as plain numbers."""

import math

import torch


@torch.no_grad()
def heads_learned(model):
    """One dict per head, layer by layer: the numbers of `attn.learned()` by name.

    A value that a head has per coordinate is given as its mean, one that a layer has once is
    repeated for its heads; None stands for what the model lacks, and for infinity.
    """
    heads, largest_mass = [], model.largest_mass()
    for layer in model.layers:
        numbers = {
            name: _per_head(values, model.config.num_heads)
            for name, values in layer.attn.learned(largest_mass).items()
        }
        heads += [
            dict(zip(numbers, row, strict=True)) for row in zip(*numbers.values(), strict=True)
        ]
    return heads


def _per_head(values, num_heads):
    if values is None:
        return [None] * num_heads
    if values.dim() == 0:
        values = values.expand(num_heads)
    numbers = values.reshape(num_heads, -1).mean(1).tolist()
    return [number if math.isfinite(number) else None for number in numbers]
