"""Checkpoint files as the first release wrote them, with random parameters."""

import math

import torch

from conftest import SENTENCES

TEXT = "".join(SENTENCES)
CHARACTERS = sorted(set(TEXT))
SIZES = dict(hidden_dim=12, num_layers=2, num_heads=3, mlp_dim=20, max_seq_len=24, dropout=0.1)


def random_state(shapes):
    """Every parameter random: gains around 1, masses and gravity of either sign before softplus."""
    state = {}
    for name, shape in shapes.items():
        if "norm" in name and name.endswith("weight"):
            state[name] = torch.rand(shape) + 0.5
        elif len(shape) == 2 and "emb" not in name:
            state[name] = torch.randn(shape) / math.sqrt(shape[1])
        else:
            state[name] = torch.randn(shape)
    return state


def layer_shapes(n, hidden, mlp):
    prefix = f"layers.{n}."
    shapes = {prefix + "ffn.net.0": (mlp, hidden), prefix + "ffn.net.3": (hidden, mlp)}
    shapes |= {prefix + "attn.v_proj": (hidden, hidden), prefix + "attn.out_proj": (hidden, hidden)}
    norms = {prefix + "norm1": hidden, prefix + "norm2": hidden}
    return shapes, norms


def with_biases(linears, norms):
    shapes = {}
    for name, shape in linears.items():
        shapes |= {name + ".weight": shape, name + ".bias": shape[:1]}
    for name, width in norms.items():
        shapes |= {name + ".weight": (width,), name + ".bias": (width,)}
    return shapes


def ngt_state(vocab_size, coord_dim=10, head_coord_dim=4, **sizes):
    """The first release's NGT under its own parameter names."""
    sizes = SIZES | sizes
    hidden, heads = sizes["hidden_dim"], sizes["num_heads"]
    linears, norms, others = {"head": (vocab_size, hidden)}, {"norm": hidden}, {}
    for n in range(sizes["num_layers"]):
        shapes, layer_norms = layer_shapes(n, hidden, sizes["mlp_dim"])
        linears |= shapes
        linears[f"layers.{n}.attn.coord_proj_attn"] = (heads * head_coord_dim, coord_dim)
        linears[f"layers.{n}.attn.coord_proj_next"] = (coord_dim, hidden)
        norms |= layer_norms | {f"layers.{n}.coord_norm": coord_dim}
        others[f"layers.{n}.attn.gamma"] = (1, heads, 1, 1)
        others[f"layers.{n}.attn.gravity_bias"] = (1, heads, 1, 1)
        others[f"layers.{n}.attn.radius_param"] = ()
    others["token_emb.weight"] = (vocab_size, hidden)
    others["mass_emb.weight"] = (vocab_size, 1)
    others["coord_emb.weight"] = (sizes["max_seq_len"], coord_dim)
    state = random_state(with_biases(linears, norms) | others)
    for n in range(sizes["num_layers"]):  # a radius that about half of all pairs are within
        state[f"layers.{n}.attn.radius_param"] = torch.tensor(1.7 + 0.4 * n)
    state["head.weight"] = state["token_emb.weight"]
    return state


def ngt_config(vocab_size, coord_dim=10, **switches):
    return {
        **SIZES,
        "coord_dim": coord_dim,
        "vocab_size": vocab_size,
        "dataset": "shakespeare",
        "use_radius_cutoff": True,
        "use_rsqrt": False,
        "mass_in_value": False,
        "use_soft_cutoff": False,
        "seed": None,
        "model_type": "ngt",
        "gradient_accumulation_steps": 1,
        **switches,
    }


def char_vocab(kind="char"):
    """A character table; itos was a dict of numbers."""
    vocab = {
        "stoi": {c: i for i, c in enumerate(CHARACTERS)},
        "itos": dict(enumerate(CHARACTERS)),
    }
    return {"type": "char", **vocab} if kind == "char" else vocab


def save(path, state, config, vocab):
    """The dict that the first release's training wrote, with a real optimizer state."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    torch.save(
        {
            "model_state": state,
            "optimizer_state": optimizer.state_dict(),
            "iter": 1234,
            "best_val": 1.5,
            "config": config,
            "vocab": vocab,
        },
        path,
    )
    return path
