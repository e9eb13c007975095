"""Makes the models and tokens that are timed: a checkpoint's, or fresh ones of a preset's size."""

from types import SimpleNamespace

import numpy as np
import torch

from benchmarks.flags import TIMED_PRESETS, law_given
from engine.checkpoint import find_checkpoint, load_model
from engine.models import build_model
from model import NGT
from system.errors import UsageError, UserError
from system.settings import flag_of
from system.threads import choose_threads
from text.stream import read_text
from text.token_files import data_of_checkpoint
from training.config import SETTINGS, resolve

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VALUE_WIDTH = 64  # of a head, in `benchmark.py attention`


def use_threads_as_shipped(args, model, tokens):
    """Set the number of CPU threads as training and chat do, and print it.

    Args:
        args: the flags; their `threads` becomes that number.
        tokens: in one call of the model.
    """
    args.threads = choose_threads(args.threads, model, tokens)
    if args.threads is not None:
        print(f"threads: {args.threads}")


def newton_model(args, device):
    """The NGT of --checkpoint, or a fresh one of the size of --preset.

    Returns:
        `(model, tokenizer, checkpoint)`; the last two are None for a fresh model.

    Raises:
        UsageError: if flags of a fresh model are given beside a checkpoint.
        UserError: as `load_newton`.
    """
    law = law_given(args)
    if not args.checkpoint:
        return fresh_model(args.preset, "ngt", device, **law), None, None
    for name in law:
        raise UsageError(
            f"{flag_of(SETTINGS[name])} shapes a fresh NGT, but --checkpoint has its own law: drop "
            "one of them"
        )
    return load_newton(args.checkpoint, device)


def load_newton(path, device):
    """Load an NGT under Newton's law.

    Returns:
        `(model, tokenizer, checkpoint)`.

    Raises:
        UserError: if the checkpoint cannot be used or holds another model.
    """
    network, tokenizer, checkpoint = load_model(find_checkpoint(path), device)
    if not isinstance(network, NGT) or network.config.law != "newton":
        raise UserError(f"--checkpoint {path} is not an NGT of --law newton: name one that is")
    return network, tokenizer, checkpoint


def fresh_model(preset, kind, device, **changes):
    """A model with random weights, in eval mode.

    Args:
        preset: one of `TIMED_PRESETS`.
        kind: ngt or vanilla.
        changes: settings that replace the preset's.
    """
    name, vocab_size = TIMED_PRESETS[preset]
    config = resolve(SimpleNamespace(dataset=name, model_type=kind, **changes))
    torch.manual_seed(0)
    return build_model(config | {"vocab_size": vocab_size}).to(device).eval()


def some_tokens(args, network, tokenizer, checkpoint, count):
    """Token ids of real text for a checkpoint, random ones for a fresh model.

    The text is that of --text, or else the validation text of the checkpoint's training.

    Args:
        tokenizer, checkpoint: from `newton_model`.

    Returns:
        An int64 tensor, (count,).

    Raises:
        UserError: if the text cannot be read or is too short.
    """
    if tokenizer is None:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(network.config.vocab_size, (count,), generator=generator)
    if getattr(args, "text", None) is not None:
        ids = tokenizer.encode(read_text(args.text, "--text"))
    else:
        remedy = "name a text with --text"
        ids = data_of_checkpoint(checkpoint, tokenizer, remedy).valid[:count]
    if len(ids) < count:
        raise UserError(f"the text has {len(ids)} tokens, {count} are needed: name a longer one")
    return torch.from_numpy(np.asarray(ids[:count]).astype(np.int64))
