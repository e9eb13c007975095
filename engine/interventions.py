"""What a model would say if something in it were different: one forward pass with changes.

A change is a dict:

    {"kind": "mass", "token": t, "factor": f}     the mass of token t is f times what it is
    {"kind": "move", "token": t, "toward": s, "share": x}
                                                  before every layer token t is not at its own place
                                                  but this share of the way to token s
    {"kind": "cut", "layer": l, "head": h, "token": t, "source": s}
                                                  token t feels nothing of s; head None: in no head
    {"kind": "off", "layer": l, "head": h}        the head passes on nothing

Tokens are places in the text, from 0; layers count from 1 and heads from 0, as in the page's data.
The changes are hooks, which are removed in any case: the model itself never changes.
"""

from collections import defaultdict
from contextlib import ExitStack

import torch

from gravity.attention import gravity_attention
from gravity.heads import split_heads
from gravity.published import published_gravity_attention


@torch.inference_mode()
def logits_after(model, tokens, changes):
    """Logits of the next token after each of the text, (T, vocab_size), with the changes.

    Args:
        model: an NGT or a vanilla transformer, which has no masses and places to change.
        tokens: a list of T ids.
        changes: a list of those above.
    """
    kinds = defaultdict(list)
    for change in changes:
        kinds[change["kind"]].append(change)
    with ExitStack() as hooks:
        for change in kinds["off"]:
            hooks.enter_context(head_off(model, change["layer"], change["head"]))
        for layer, cuts in _cuts_by_layer(kinds["cut"], model.config.num_heads).items():
            _cut_pulls(attention(model, layer), cuts, hooks)
        if kinds["mass"] or kinds["move"]:
            for layer in model.layers:
                hook = _changed_particles(kinds["mass"], kinds["move"])
                hooks.enter_context(layer.attn.register_forward_pre_hook(hook))
        ids = torch.tensor([tokens], device=model.token_emb.weight.device)
        return model(ids)[0]


def attention(model, layer):
    """The attention of a layer, counted from 1.

    Raises:
        ValueError: if there is no such layer.
    """
    if not 1 <= layer <= len(model.layers):
        raise ValueError(f"layer {layer}: this model has layers 1 to {len(model.layers)}")
    return model.layers[layer - 1].attn


def head_off(model, layer, head):
    """Switch a head off, so that it passes on nothing: its part of the layer's output map gets 0.

    Args:
        layer: from 1.
        head: from 0.

    Returns:
        A context manager; leaving it switches the head on again.
    """
    width = model.config.hidden_dim // model.config.num_heads
    channels = slice(head * width, (head + 1) * width)

    def silence(_, inputs):
        heads = inputs[0].clone()  # (B, T, hidden_dim), the heads side by side
        heads[..., channels] = 0
        return (heads,)

    return attention(model, layer).out_proj.register_forward_pre_hook(silence)


def _changed_particles(masses, moves):
    """A hook before an attention layer of an NGT, which then sees other masses and places."""

    def change_inputs(_, inputs):
        h, z, mass, *others = inputs
        new_z, new_mass = z.clone(), mass.clone()
        for change in masses:
            new_mass[:, change["token"]] *= change["factor"]
        for change in moves:
            token = change["token"]
            new_z[:, token] += change["share"] * (z[:, change["toward"]] - z[:, token])
        return h, new_z, new_mass, *others

    return change_inputs


def _cuts_by_layer(cuts, num_heads):
    """{layer: {(token, sources that it does not feel): heads}} of the changes of kind cut."""
    sources = defaultdict(set)
    for cut in cuts:
        heads = range(num_heads) if cut["head"] is None else [cut["head"]]
        for head in heads:
            sources[cut["layer"], cut["token"], head].add(cut["source"])
    layers = defaultdict(lambda: defaultdict(list))
    for (layer, token, head), removed in sources.items():
        layers[layer][token, frozenset(removed)].append(head)
    return layers


def _cut_pulls(attn, cuts, hooks):
    """Compute what some tokens receive once more, without some of their sources.

    Args:
        attn: the attention of a layer.
        cuts: {(token, sources): heads}.
        hooks: an `ExitStack` that removes the hooks.
    """
    width = attn.config.hidden_dim // attn.config.num_heads
    received = []

    def keep(_, inputs):
        received[:] = inputs

    def with_other_rows(_, inputs, output):
        _, values = output
        rows = received[0].clone()  # (1, T, hidden_dim), the heads side by side
        for (token, sources), heads in cuts.items():
            without = _received_without(attn, inputs, values, token, sources)  # (H, D)
            for head in heads:
                rows[0, token, head * width : (head + 1) * width] = without[head]
        return attn.out_proj(rows), values

    hooks.enter_context(attn.out_proj.register_forward_pre_hook(keep))
    hooks.enter_context(attn.register_forward_hook(with_other_rows))


def _received_without(attn, inputs, values, token, sources):
    """What each head gives a token if these sources do not exist for it, (H, D).

    Args:
        inputs: of the attention layer.
        values: what its tokens pass on, (1, T, hidden_dim).
    """
    config = attn.config
    others = [place for place in range(token + 1) if place not in sources]
    if not others:
        return values.new_zeros(config.num_heads, values.shape[-1] // config.num_heads)
    v = split_heads(values, config.num_heads)[:, :, others]
    if getattr(config, "law", None) is None:
        h, positions, _, _, angles = inputs
        q, k = attn.points(h, angles=angles)
        found = attn.attend(
            q[:, :, [token]], k[:, :, others], v, positions[[token]], positions[others]
        )
        return found[0, :, 0]
    _, z, mass, positions, *_ = inputs
    q, k = attn.points(z)
    q, k = q[:, :, [token]], k[:, :, others]
    law = attn.law() | {"query_positions": positions[[token]], "key_positions": positions[others]}
    if config.law == "newton":
        return gravity_attention(q, k, v, mass[:, others], **law)[0, :, 0]
    found = published_gravity_attention(q, k, v, mass[:, [token]], mass[:, others], **law)
    return found[0, :, 0].nan_to_num()  # a hard cutoff may leave nothing within reach
