"""Checkpoints: written whole or not at all, read without running anything that is in them.

A checkpoint is a dict of tensors and plain types with the keys `model_state`, `optimizer_state`,
`iter`, `best_val`, `config`, `vocab` (as in the first release) and `format_version`,
`scheduler_state`, `scaler_state`, `rng_state`, `data_state`.
"""

import math
import pickle
import tempfile
from dataclasses import MISSING, fields
from pathlib import Path

import torch

from archive import (
    DamagedArchive,
    check_archive,
    check_may_be_replaced,
    partial_path,
    write_archive,
)
from errors import UserError
from first_release import from_first_release
from model import NGT, NGTConfig
from tokenizer import tokenizer_from_vocab
from vanilla_model import Vanilla, VanillaConfig

FORMAT_VERSION = 2
KEYS = {
    *("model_state", "optimizer_state", "iter", "best_val", "config", "vocab", "format_version"),
    *("scheduler_state", "scaler_state", "rng_state", "data_state"),
}
FIRST_RELEASE_KEYS = KEYS - {"format_version"}
LARGEST_SIZE = 1 << 31
MODELS = {"ngt": (NGT, NGTConfig), "vanilla": (Vanilla, VanillaConfig)}


def best_path(path):
    return Path(f"{path}_best.pt")


def last_path(path):
    return Path(f"{path}_last.pt")


def model_fields(model_type):
    """The config fields that shape this kind of model, in order."""
    return [field.name for field in fields(MODELS[model_type][1])]


def model_config(config):
    """The dataclass of a config (a plain dict with `model_type`); what is no field is left out.

    Raises:
        UsageError: where a size cannot be.
    """
    _, config_class = MODELS[config["model_type"]]
    names = model_fields(config["model_type"])
    return config_class(**{name: config[name] for name in names if name in config})


def build_model(config):
    """The model that a config describes, freshly initialised. Raises as `model_config`."""
    model_class, _ = MODELS[config["model_type"]]
    return model_class(model_config(config))


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
        raise UserError(f"checkpoint {path} holds {_shown(unknown.pop())}, as none does: refused")
    if not is_old and not _is_plain(checkpoint["format_version"], FORMAT_VERSION):
        raise UserError(
            f"checkpoint {path} is of format {_shown(checkpoint['format_version'])}, this program "
            f"reads {FORMAT_VERSION}: use the release that wrote it"
        )
    try:
        why = _unsound_tensors(checkpoint["model_state"], path.stat().st_size)
        if why is None and is_old:
            checkpoint = from_first_release(checkpoint)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"checkpoint {path} is no complete first-release one ({_first_words(error)}): "
            "use another"
        ) from None
    config = checkpoint.get("config")
    if why is None and not is_old and isinstance(config, dict):  # older ones do not say
        config.setdefault("retardation", "layers.0.attn.retardation" in checkpoint["model_state"])
    try:
        why = why or _contradiction(checkpoint)
    except (KeyError, TypeError, RuntimeError, AttributeError, OverflowError, UserError) as error:
        why = _first_words(error)
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


def _unsound_tensors(state, file_size):
    """Why these are no weights that a file of this size can hold; None where they are."""
    if not isinstance(state, dict):
        return "model_state is no dictionary"
    total = 0
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            return "model_state holds more than named tensors"
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
            return f"{_shown(name)} is no tensor of weights"
        if not tensor.is_contiguous():
            return f"{_shown(name)} repeats its numbers"
        total += tensor.numel() * tensor.element_size()
    # a tied head is named twice
    return "its tensors hold more than the file does" if total > 2 * file_size else None


def _contradiction(checkpoint):
    """Why this cannot be a checkpoint, in a few words; None where it can."""
    config, state = checkpoint["config"], checkpoint["model_state"]
    if not isinstance(config, dict):
        return "config is no dictionary"
    if not isinstance(config.get("model_type"), str) or config["model_type"] not in MODELS:
        return "its model_type is unknown"
    for field in fields(MODELS[config["model_type"]][1]):
        value = config.get(field.name, field.default)
        if value is MISSING:
            return f"it has no {field.name}"
        if not _is_of_type(value, getattr(field.type, "__name__", str(field.type))):
            return f"{field.name} is {_shown(value)}"
    step, best_val = checkpoint.get("iter", 0), checkpoint.get("best_val", 0)
    if type(step) is not int or not 0 <= step < 1 << 62:
        return f"iter is {_shown(step)}"
    if type(best_val) not in (int, float) or not -1e300 < best_val <= math.inf:
        return f"best_val is {_shown(best_val)}"
    directory = config.get("token_directory")
    if not isinstance(directory, str | None):
        return f"token_directory is {_shown(directory)}"
    layers = {name.split(".")[1] for name in state if name.startswith("layers.")}
    if len(layers) != config["num_layers"]:
        return f"{len(layers)} layers of weights for num_layers {config['num_layers']}"
    if tuple(state["token_emb.weight"].shape) != (config["vocab_size"], config["hidden_dim"]):
        return "token_emb.weight is not vocab_size by hidden_dim"
    with torch.device("meta"):  # shapes alone
        model = build_model(config)
    expected = model.state_dict()
    if expected.keys() != state.keys():
        name = sorted(expected.keys() ^ state.keys())[0]
        return f"{_shown(name)} is {'missing' if name in expected else 'of no such model'}"
    for name, tensor in expected.items():
        if tensor.shape != state[name].shape:
            return f"{name} is {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
        if not bool(torch.isfinite(state[name].float()).all()):  # as the model will have it
            return f"{name} holds NaN or infinity"
    if getattr(model.config, "tie_head", False) and not torch.equal(
        state["head.weight"], state["token_emb.weight"]
    ):
        return "its tied head is not its embedding"
    return None


def _is_plain(value, expected):
    return type(value) is type(expected) and value == expected


def _shown(value):
    """A stranger's value in an error: short, and never written out where it is deep."""
    if isinstance(value, str):
        return repr(value[:40])
    if value is None or isinstance(value, bool | float):
        return repr(value)
    if isinstance(value, int):
        return repr(value) if abs(value) < 10**40 else "a very large number"
    return f"a {type(value).__name__}"


def _is_of_type(value, name):
    """Whether a config's value is of a dataclass field's annotated type."""
    if value is None:
        return "None" in name
    if name.startswith("int"):
        return type(value) is int and abs(value) < LARGEST_SIZE
    if name.startswith("float"):
        return type(value) in (int, float) and abs(value) < 1e300
    return type(value).__name__ == name


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
        reason = _first_words(error)
        raise UserError(f"checkpoint {path} has no usable vocabulary ({reason})") from None
    model = build_model(checkpoint["config"])
    model.load_state_dict(checkpoint["model_state"])
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(
            f"checkpoint {path} contradicts itself (vocabulary of {tokenizer.vocab_size} for "
            f"{model.config.vocab_size} embeddings): use another"
        )
    return model.to(device).eval(), tokenizer, checkpoint


def _first_words(error):
    return " ".join(str(error).split())[:200]


def is_first_release(checkpoint):
    """Whether a checkpoint that was read came from the first release."""
    return checkpoint["format_version"] == 1
