"""The shares of the pull of every layer as one tensor, for small models and short texts."""

from engine.pulls import visit_pulls


def pull_weights(model, tokens):
    """(num_layers, num_heads, T, T) of tokens (1, T): rows are pulled, columns pull."""
    count, config = tokens.shape[1], model.config
    shape = (config.num_layers, config.num_heads, count, count)
    weights = model.token_emb.weight.new_zeros(shape)

    def keep(layer, rows, shares):
        weights[layer, :, rows, : rows.stop] = shares

    visit_pulls(model, tokens, keep)
    return weights
