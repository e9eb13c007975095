"""What the heads and masses of a trained NGT have become, as tables."""

import torch

from engine.checkpoint import best_path, load_model
from engine.learned import heads_learned
from system.errors import UserError
from system.markdown import markdown_code, markdown_table, markdown_text

SHOWN_TOKENS = 12


def geometry_section(label, config):
    """Markdown: a line a head, and the heaviest and lightest tokens of a run's best checkpoint."""
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
    "newton": "Time scale: softenings a token of time. Retardation: how far a source is felt where "
    "its predecessor is, mean over the head's coordinates. Window: tokens of time after which "
    "nothing reaches, which is the radius (in softenings) in time.",
    "published": "Gamma scales the score -gamma / r2; the radius is one a layer.",
}


def heads_table(model):
    """A table with a line per head of every layer."""
    heads, num_heads = heads_learned(model), model.config.num_heads
    lines = [
        [*divmod(n, num_heads), *map(_number, numbers.values())] for n, numbers in enumerate(heads)
    ]
    return markdown_table(["layer", "head", *(name.replace("_", " ") for name in heads[0])], lines)


def _number(value):
    if value is None:
        return "none"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"


@torch.no_grad()
def mass_lines(model, tokenizer):
    """The heaviest and the lightest tokens, with their masses."""
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
