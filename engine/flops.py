"""Floating-point operations of training: matrix products only, forward and backward.

A product of sizes (m, k) and (k, n) takes 2 m k n, and the backward pass twice the forward pass.
Nothing is recomputed, and attention counts causal pairs only.
"""

import torch.nn as nn


def attention_flops(pairs, distance, width):
    """Flops of the two products over pairs of tokens in a head.

    Args:
        pairs: how many pairs, of tokens and heads together.
        distance: coordinates that a pair's score is computed from.
        width: channels of a value.
    """
    return 3 * 2 * (distance + width) * pairs


def training_flops(model, tokens):
    """Flops of training a model on so many tokens, in windows of its `block_size`.

    Args:
        model: an NGT or a Vanilla; one on the device "meta" will do. A weight that needs no
            gradient is not counted.
    """
    c = model.config
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    weights = sum(weight.numel() for weight in weights if weight.requires_grad)
    width = c.hidden_dim // c.num_heads
    distance = getattr(c, "head_coord_dim", width)
    pairs_per_token = (c.block_size + 1) / 2 * c.num_heads * c.num_layers
    return (6 * weights + attention_flops(pairs_per_token, distance, width)) * tokens
