"""Checkpoints: written whole or not at all, read without running anything that is in them.

A checkpoint is a dict of tensors and plain types with the keys `model_state`, `optimizer_state`,
`iter`, `best_val`, `config`, `vocab` (as in the first release) and `format_version`,
`scheduler_state`, `scaler_state`, `rng_state`, `data_state`.
"""

import pickle
import tempfile
from pathlib import Path

import torch

from engine.checks import contradiction, is_plain, unsound_tensors
from engine.first_release import from_first_release
from engine.models import build_model
from engine.sealed_file import (
    DamagedArchive,
    check_archive,
    check_may_be_replaced,
    partial_path,
    write_archive,
)
from system.errors import UserError
from system.safe_text import short_reason, shown_short
from text.tokenizer import tokenizer_from_vocab

FORMAT_VERSION = 2
KEYS = {
    *("model_state", "optimizer_state", "iter", "best_val", "config", "vocab", "format_version"),
    *("scheduler_state", "scaler_state", "rng_state", "data_state"),
}
FIRST_RELEASE_KEYS = KEYS - {"format_version"}


def best_path(path):
    return Path(f"{path}_best.pt")


def last_path(path):
    return Path(f"{path}_last.pt")


def check_writable(path):
    """Raise `UserError` where checkpoints of this path could not be written later."""
    folder = last_path(path).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for file in (best_path(path), last_path(path)):
            check_may_be_replaced(file)
            partial_path(file).unlink(missing_ok=True)  # of a run that was killed while writing
    except OSError as error:
        raise UserError(
            f"--checkpoint-path {path} cannot be written ({error.strerror or error}): give another"
        ) from None


def save_checkpoint(path, checkpoint):
    """Write a checkpoint whole or not at all.

    Raises:
        UserError: where it cannot be written; the file that was there before is untouched.
    """
    try:
        write_archive(path, checkpoint)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        kept = "; the one before it is untouched" if Path(path).exists() else ""
        raise UserError(
            f"checkpoint {path} cannot be written ({reason}){kept}: free some space, make it "
            "writable, or give another --checkpoint-path"
        ) from None


def read_checkpoint(path):
    """Read a checkpoint of this or the first release; nothing in it is ever executed.

    Every byte is checked against the file's own checksums first, only tensors and plain types are
    accepted (`weights_only=True`), and what they say is checked before anything is built from it.
    A first-release checkpoint comes back with this release's names.

    Raises:
        UserError: where the file is missing, damaged or not a checkpoint, or contradicts itself.
    """
    path = Path(path)
    checkpoint = _read_plain(path)
    if not isinstance(checkpoint, dict) or not {"model_state", "vocab"} <= checkpoint.keys():
        raise UserError(f"checkpoint {path} lacks model_state or vocab: it is of another program")
    is_old = "format_version" not in checkpoint
    unknown = checkpoint.keys() - (FIRST_RELEASE_KEYS if is_old else KEYS)
    if unknown:
        raise UserError(
            f"checkpoint {path} holds {shown_short(unknown.pop())}, as none does: refused"
        )
    if not is_old and not is_plain(checkpoint["format_version"], FORMAT_VERSION):
        raise UserError(
            f"checkpoint {path} is of format {shown_short(checkpoint['format_version'])}, this "
            f"program reads {FORMAT_VERSION}: use the release that wrote it"
        )
    try:
        why = unsound_tensors(checkpoint["model_state"], path.stat().st_size)
        if why is None and is_old:
            checkpoint = from_first_release(checkpoint)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"checkpoint {path} is no complete first-release one ({short_reason(error)}): "
            "use another"
        ) from None
    config = checkpoint.get("config")
    if why is None and not is_old and isinstance(config, dict):  # older ones do not say
        config.setdefault("retardation", "layers.0.attn.retardation" in checkpoint["model_state"])
    try:
        why = why or contradiction(checkpoint)
    except (KeyError, TypeError, RuntimeError, AttributeError, OverflowError, UserError) as error:
        why = short_reason(error)
    if why:
        raise UserError(f"checkpoint {path} contradicts itself ({why}): use another")
    return checkpoint


def _read_plain(path):
    """What a file holds, if its bytes are right and it holds tensors and plain types alone."""
    if path.is_dir():
        raise UserError(f"checkpoint {path} is a directory: name the .pt file in it")
    if not path.exists():
        raise UserError(f"checkpoint {path} does not exist: train one with train_shakespeare.py")
    if not path.is_file():  # a pipe would be waited for
        raise UserError(f"checkpoint {path} is no ordinary file: name a .pt file")
    try:
        check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except DamagedArchive as error:
        raise UserError(f"checkpoint {path} {error}: use another") from None
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read: {error.strerror or error}") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"checkpoint {path} holds more than tensors and plain types: refused, since loading "
            "it could run code"
        ) from None
    except Exception:  # what a damaged pickle raises is anybody's guess
        raise UserError(f"checkpoint {path} is truncated, or no checkpoint: use another") from None


def load_model(path, device="cpu"):
    """Read a checkpoint and build what it describes.

    Returns:
        `(model, tokenizer, checkpoint)`; the model in evaluation mode on `device`.

    Raises:
        UserError: as `read_checkpoint`, and where weights and config contradict each other.
    """
    checkpoint = read_checkpoint(path)
    try:
        tokenizer = tokenizer_from_vocab(checkpoint["vocab"])
    except (KeyError, TypeError, ValueError, AttributeError, UserError) as error:
        reason = short_reason(error)
        raise UserError(f"checkpoint {path} has no usable vocabulary ({reason})") from None
    model = build_model(checkpoint["config"])
    model.load_state_dict(checkpoint["model_state"])
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(
            f"checkpoint {path} contradicts itself (vocabulary of {tokenizer.vocab_size} for "
            f"{model.config.vocab_size} embeddings): use another"
        )
    return model.to(device).eval(), tokenizer, checkpoint


def is_first_release(checkpoint):
    """Whether a checkpoint that was read came from the first release."""
    return checkpoint["format_version"] == 1
