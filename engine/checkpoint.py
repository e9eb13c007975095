"""Writes checkpoints atomically, and reads them without running anything that they contain.

A checkpoint is a dict of tensors and plain types with the keys `model_state`, `optimizer_state`,
`iter`, `best_val`, `config`, `vocab` (as in the first release) and `format_version`,
`scheduler_state`, `scaler_state`, `rng_state`, `data_state`.
"""

import pickle
import sys
import tempfile
from pathlib import Path

import torch

from engine.checks import contradiction, unsound_tensors
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
from system.safe_text import one_line, short_reason, shown_short
from text.tokenizer import tokenizer_from_vocab

FORMAT_VERSION = 2
KEYS = {
    *("model_state", "optimizer_state", "iter", "best_val", "config", "vocab", "format_version"),
    *("scheduler_state", "scaler_state", "rng_state", "data_state"),
}
FIRST_RELEASE_KEYS = KEYS - {"format_version"}


def best_path(path):
    """The checkpoint with the lowest validation loss, for --checkpoint-path `path`."""
    return Path(f"{path}_best.pt")


def last_path(path):
    """The newest checkpoint, for --checkpoint-path `path`."""
    return Path(f"{path}_last.pt")


def find_checkpoint(path):
    """The path of a file to read: this one, or if it does not exist one of the same run.

    PATH without a suffix means PATH_best.pt. A run that was stopped before its first evaluation has
    only PATH_last.pt, which is then read instead. Prints what is read instead on stderr.
    """
    path = Path(path)
    run = str(path).removesuffix("_best.pt")
    candidates = (path, best_path(run), last_path(run))
    found = next((file for file in candidates if file.exists()), path)
    if found != path:
        print(
            f"{one_line(str(path))} does not exist: reading {one_line(str(found))}", file=sys.stderr
        )
    return found


def check_writable(path):
    """Raise `UserError` if checkpoints could not be written at this path later.

    It also removes partial files, which a run that was killed while writing leaves behind.
    """
    folder = last_path(path).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for file in (best_path(path), last_path(path)):
            check_may_be_replaced(file)
            partial_path(file).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"--checkpoint-path {path} cannot be written ({error.strerror or error}): give another"
        ) from None


def save_checkpoint(path, checkpoint):
    """Write a checkpoint atomically: the file is complete, or what it was before.

    Raises:
        UserError: if it cannot be written.
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
    """A checkpoint of this or the first release, as a dict with this release's names.

    The file's own checksums are verified first, then only tensors and plain types are loaded
    (`weights_only=True`), and what they contain is checked before anything is built from it.

    Raises:
        UserError: if the file is missing, damaged, not a checkpoint, or contradicts itself.
    """
    path = Path(path)
    checkpoint = _read_plain(path)
    _check_format(checkpoint, path)
    reason = unsound_tensors(checkpoint["model_state"], path.stat().st_size)
    if reason is None:
        checkpoint = _with_current_names(checkpoint, path)
        reason = contradiction(checkpoint)
    if reason is not None:
        raise UserError(f"checkpoint {path} contradicts itself ({reason}): use another")
    return checkpoint


def _check_format(checkpoint, path):
    """Raise `UserError` unless this has the keys and the version of a known format."""
    if not isinstance(checkpoint, dict) or not {"model_state", "vocab"} <= checkpoint.keys():
        raise UserError(f"checkpoint {path} lacks model_state or vocab: name one of this program")
    is_first_release = "format_version" not in checkpoint
    unknown = checkpoint.keys() - (FIRST_RELEASE_KEYS if is_first_release else KEYS)
    if unknown:
        raise UserError(
            f"checkpoint {path} has an unknown key {shown_short(unknown.pop())}: use another"
        )
    version = checkpoint.get("format_version")
    # the type too: True and 2.0 are no versions, and a tensor cannot be compared
    if not is_first_release and (type(version) is not int or version != FORMAT_VERSION):
        raise UserError(
            f"checkpoint {path} has format {shown_short(version)}, this program reads "
            f"{FORMAT_VERSION}: use the release that wrote it"
        )


def _with_current_names(checkpoint, path):
    """The checkpoint with the names and config fields that this release expects."""
    if "format_version" not in checkpoint:
        try:
            return from_first_release(checkpoint)
        except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
            raise UserError(
                f"checkpoint {path} lacks parts of a first-release checkpoint "
                f"({short_reason(error)}): use another"
            ) from None
    config = checkpoint.get("config")
    if isinstance(config, dict):  # checkpoints written before there was retardation do not say
        config.setdefault("retardation", "layers.0.attn.retardation" in checkpoint["model_state"])
        if config.get("shard_optimizer") is True:  # the setting before there was "shard"
            config.setdefault("shard", "optimizer")
    return checkpoint


def _read_plain(path):
    """What the file contains, if its bytes are intact and it has only tensors and plain types."""
    if path.is_dir():
        raise UserError(f"checkpoint {path} is a directory: name the .pt file in it")
    if not path.exists():
        raise UserError(
            f"checkpoint {path} does not exist: name yours, or train one with "
            "python train_shakespeare.py"
        )
    if not path.is_file():  # reading from a pipe would wait for a writer
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
            f"checkpoint {path} is refused: it holds more than tensors and plain types, and "
            "loading it could run code"
        ) from None
    except Exception:  # malformed pickles raise many exception types
        raise UserError(f"checkpoint {path} is truncated, or no checkpoint: use another") from None


def tokenizer_of(checkpoint, path):
    """The tokenizer in a checkpoint read from `path`; raises `UserError` if it is damaged."""
    try:
        return tokenizer_from_vocab(checkpoint["vocab"])
    except (KeyError, TypeError, ValueError, AttributeError, UserError) as error:
        reason = short_reason(error)
        raise UserError(f"checkpoint {path} has no usable vocabulary ({reason})") from None


def load_model(path, device="cpu"):
    """Read a checkpoint and build its model.

    Returns:
        `(model, tokenizer, checkpoint)`; the model in evaluation mode on `device`.

    Raises:
        UserError: as `read_checkpoint`, and if the vocabulary is unusable or of another size.
    """
    checkpoint = read_checkpoint(path)
    tokenizer = tokenizer_of(checkpoint, path)
    model = build_model(checkpoint["config"])
    model.load_state_dict(checkpoint["model_state"])
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(
            f"checkpoint {path} contradicts itself (vocabulary of {tokenizer.vocab_size} for "
            f"{model.config.vocab_size} embeddings): use another"
        )
    return model.to(device).eval(), tokenizer, checkpoint
