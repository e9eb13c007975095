"""Models and tokens that are timed: trained ones, or fresh ones of a preset's size."""

from pathlib import Path

import numpy as np
import torch

from engine.checkpoint import load_model
from engine.models import build_model
from model import NGT
from system.errors import UserError
from text.token_files import data_of_checkpoint
from training.config import DEFAULTS, PRESETS

SHAPES = {
    "shakespeare": ("shakespeare", 66),
    "25m": ("wikitext103", 8192),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VALUE_WIDTH = 64


def load_newton(path, device):
    """`(model, tokenizer, checkpoint)` of an NGT under the law newton."""
    network, tokenizer, checkpoint = load_model(path, device)
    if not isinstance(network, NGT) or network.config.law != "newton":
        raise UserError(f"--checkpoint {path} is no NGT under --law newton: name one that is")
    return network, tokenizer, checkpoint


def fresh_model(args, name, device, block_size=None):
    preset, vocab_size = SHAPES[args.preset]
    sizes = dict(PRESETS[preset]) | {"vocab_size": vocab_size, "model_type": name}
    sizes["mlp_dim"] = sizes["mlp_dim"]["vanilla" if name == "vanilla" else "newton"]
    if block_size is not None:
        sizes["block_size"] = block_size
    torch.manual_seed(0)
    return build_model(DEFAULTS | sizes).to(device).eval()


def some_tokens(args, network, tokenizer, checkpoint, count):
    """Token ids of real text for a checkpoint, random ones for a fresh model."""
    if tokenizer is None:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(network.config.vocab_size, (count,), generator=generator)
    if getattr(args, "text", None) is not None:
        try:
            ids = tokenizer.encode(Path(args.text).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--text {args.text} cannot be read: {error}") from None
    else:
        remedy = "name a text with --text"
        ids = data_of_checkpoint(checkpoint, tokenizer, remedy).valid[:count]
    if len(ids) < count:
        raise UserError(f"the text has {len(ids)} tokens, {count} are needed: name a longer one")
    return torch.from_numpy(np.asarray(ids[:count]).astype(np.int64))
