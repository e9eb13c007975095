"""Makes tables of the heads and masses of a trained NGT."""

import torch
import torch.nn.functional as F

from engine.checkpoint import best_path, load_model
from system.errors import UserError
from system.markdown import markdown_code, markdown_table, markdown_text

SHOWN_TOKENS = 12


def geometry_section(label, config):
    """Markdown: a line for each head, and the heaviest and lightest tokens.

    They are those of the best checkpoint of the run with this config. If it cannot be loaded, the
    section gives the reason.
    """
    path = best_path(config["checkpoint_path"])
    try:
        model, tokenizer, checkpoint = load_model(path)
        if checkpoint["config"]["model_type"] != "ngt":
            raise UserError(f"{path} is of a vanilla transformer, which has no coordinates")
    except UserError as error:
        return f"### {markdown_text(label)}\n\nNot shown: {markdown_text(error)}."
    step = checkpoint.get("iter", 0)
    return "\n\n".join(
        [
            f"### {markdown_text(label)}, step {step:,}",
            f"From {markdown_code(path)}. {EXPLAINED[model.config.law]}",
            heads_table(model),
            *mass_lines(model, tokenizer),
        ]
    )


EXPLAINED = {
    "newton": "Time scale: softenings per token of time. Retardation: how far a source's point is "
    "moved towards that of its predecessor, mean over the head's coordinates. Window: tokens of "
    "time beyond which nothing reaches, which is the radius (in softenings) in time.",
    "published": "Gamma scales the score -gamma / r2; each layer has one radius.",
}


@torch.no_grad()
def heads_table(model):
    """A line a head of every layer: (num_layers * num_heads) lines."""
    if model.config.law == "newton":
        titles = ["time scale", "time offset", "retardation", "radius", "window"]
    else:
        titles = ["gamma", "bias", "radius"]
    lines = []
    heads = model.config.num_heads
    for n, layer in enumerate(model.layers):
        attn = layer.attn
        if model.config.law == "newton":
            retardation = attn.retardation
            if retardation is not None:
                retardation = retardation.view(heads, -1).mean(1)
            columns = [attn.time_scale, attn.time_offset, retardation, attn.radius, attn.window]
        else:
            columns = [F.softplus(attn.gamma_raw), attn.gravity_bias, attn.radius]
        columns = [None if c is None else c.flatten().tolist() for c in columns]
        for head in range(heads):
            values = [None if c is None else c[head % len(c)] for c in columns]
            lines.append([n, head, *map(_number, values)])
    return markdown_table(["layer", "head", *titles], lines)


def _number(value):
    if value is None or value == float("inf"):
        return "none"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"


@torch.no_grad()
def mass_lines(model, tokenizer):
    """Markdown, in parts: the heaviest and the lightest tokens with their masses, and the range."""
    masses = model.mass(torch.arange(model.config.vocab_size)).flatten()
    order = masses.argsort(descending=True).tolist()

    def shown(tokens):
        return ", ".join(
            f"{markdown_code(tokenizer.label(t))} {float(masses[t]):.3f}" for t in tokens
        )

    return [
        f"Heaviest tokens: {shown(order[:SHOWN_TOKENS])}.",
        f"Lightest tokens: {shown(order[::-1][:SHOWN_TOKENS])}.",
        f"Masses from {float(masses.min()):.3f} to {float(masses.max()):.3f}, "
        f"median {float(masses.median()):.3f}.",
    ]
