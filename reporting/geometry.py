"""Makes tables of the heads and masses of a trained NGT."""

import torch

from engine.checkpoint import best_path, find_checkpoint, load_model
from engine.learned import heads_learned
from system.errors import UserError
from system.markdown import markdown_code, markdown_table, markdown_text

SHOWN_TOKENS = 12
EXPLAINED = {  # the columns of the table of heads, for each law
    "newton": "Time scale: softenings per token of time. Retardation: how far a source's point is "
    "moved towards that of its predecessor, mean over the head's coordinates. Background: what is "
    "added to the sum of fields. Window: tokens of time beyond which nothing reaches, which is the "
    "radius (in softenings) in time; with a background, beyond which all fields together are next "
    "to nothing beside it.",
    "published": "Gamma scales the score -gamma / r2; each layer has one radius.",
}


def geometry_section(label, config):
    """Markdown: a line for each head, and the heaviest and lightest tokens.

    They are those of the best checkpoint of the run. If it cannot be loaded, the section gives the
    reason.

    Args:
        label: the heading.
        config: the run's config.json.
    """
    path = find_checkpoint(best_path(config["checkpoint_path"]))
    try:
        model, tokenizer, checkpoint = load_model(path)
        if checkpoint["config"]["model_type"] != "ngt":
            raise UserError(f"{path} is of a vanilla transformer, which has no coordinates")
    except UserError as error:  # its checkpoint may be deleted, and the report is still wanted
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


def heads_table(model):
    """Markdown: a table with a line per head of every layer."""
    heads, num_heads = heads_learned(model), model.config.num_heads
    lines = [
        [n // num_heads + 1, n % num_heads + 1, *map(_number, numbers.values())]
        for n, numbers in enumerate(heads)
    ]
    return markdown_table(["layer", "head", *(name.replace("_", " ") for name in heads[0])], lines)


def _number(value):
    if value is None:
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
