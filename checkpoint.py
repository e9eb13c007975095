"""Checkpoints: written whole or not at all, read without running anything that is in them.

A checkpoint is a dict of tensors and plain types with the keys `model_state`, `optimizer_state`,
`iter`, `best_val`, `config`, `vocab` (as in the first release) and `format_version`,
`scheduler_state`, `scaler_state`, `rng_state`, `data_state`.
"""

import contextlib
import math
import os
import pickle
import tempfile
import zipfile
from dataclasses import fields
from pathlib import Path

import torch

from errors import UserError
from model import NGT, NGTConfig
from tokenizer import tokenizer_from_vocab
from vanilla_model import Vanilla, VanillaConfig

FORMAT_VERSION = 2
KEYS = {
    *("model_state", "optimizer_state", "iter", "best_val", "config", "vocab", "format_version"),
    *("scheduler_state", "scaler_state", "rng_state", "data_state"),
}
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
    except OSError as error:
        raise UserError(
            f"--checkpoint-path {path} cannot be written ({error.strerror or error}): give another"
        ) from None


def save_checkpoint(path, checkpoint):
    """Write a checkpoint under a temporary name, flush it to disk, and rename it.

    Raises:
        UserError: where it cannot be written; the file that was there before is untouched.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"checkpoint {path} cannot be written ({reason}): free some space or give another "
            "--checkpoint-path"
        ) from None


def read_checkpoint(path):
    """Read a checkpoint of this or the first release; nothing in it is ever executed.

    The archive's own checksums are verified first, only tensors and plain types are accepted
    (`weights_only=True`), and what they say is checked before anything is built from it. A
    first-release checkpoint comes back with this release's names.

    Raises:
        UserError: where the file is missing, damaged or not a checkpoint, or contradicts itself.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"checkpoint {path} is a directory: name the .pt file in it")
    if not path.exists():
        raise UserError(f"checkpoint {path} does not exist: train one with train_shakespeare.py")
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise UserError(f"checkpoint {path} is compressed, as none is: refused")
            damaged = archive.testzip()
        if damaged is not None:
            raise UserError(f"checkpoint {path} is damaged (checksum of {damaged}): use another")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read: {error.strerror or error}") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"checkpoint {path} holds more than tensors and plain types: refused, since loading "
            "it could run code"
        ) from None
    except UserError:
        raise
    except Exception:  # what a damaged pickle raises is anybody's guess
        raise UserError(f"checkpoint {path} is truncated, or no checkpoint: use another") from None
    if not isinstance(checkpoint, dict) or not {"model_state", "vocab"} <= checkpoint.keys():
        raise UserError(f"checkpoint {path} lacks model_state or vocab: it is of another program")
    try:
        if "format_version" not in checkpoint:
            checkpoint = _from_first_release(checkpoint)
            _check(checkpoint, path)
            return checkpoint
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise UserError(f"checkpoint {path} is no complete first-release one ({error})") from None
    if checkpoint["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"checkpoint {path} is of format {checkpoint['format_version']}, this program reads "
            f"{FORMAT_VERSION}: use the release that wrote it"
        )
    if isinstance(checkpoint.get("config"), dict):  # older ones do not say
        retarded = "layers.0.attn.retardation" in checkpoint["model_state"]
        checkpoint["config"].setdefault("retardation", retarded)
    unknown = sorted(str(key) for key in checkpoint.keys() - KEYS)
    if unknown:
        raise UserError(f"checkpoint {path} holds {unknown[0][:80]!r}, as none does: refused")
    _check(checkpoint, path)
    return checkpoint


def _check(checkpoint, path):
    """Refuse what contradicts itself, before memory is taken for it."""
    try:
        why = _contradiction(checkpoint["config"], checkpoint["model_state"])
        for name, kinds in (("iter", (int,)), ("best_val", (int, float))):
            if why is None and type(checkpoint.get(name, 0)) not in kinds:
                why = f"{name} is no number"
    except (KeyError, TypeError, RuntimeError, AttributeError, OverflowError, UserError) as error:
        why = _first_words(error)
    if why:
        raise UserError(f"checkpoint {path} contradicts itself ({why}): use another")


def _contradiction(config, state):
    """Why these weights cannot be of such a model, in a few words; None where they can."""
    if not isinstance(config, dict) or not isinstance(state, dict):
        return "config or model_state is no dictionary"
    if not isinstance(config.get("model_type"), str) or config["model_type"] not in MODELS:
        return "its model_type is unknown"
    for field in fields(MODELS[config["model_type"]][1]):
        value = config.get(field.name, field.default)
        if not _is_of_type(value, getattr(field.type, "__name__", str(field.type))):
            return f"{field.name} is {str(value)[:40]!r}"
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            return "model_state holds more than named tensors"
        if not tensor.is_floating_point() or tensor.layout != torch.strided:
            return f"{name[:80]} is no tensor of weights"
    layers = {name.split(".")[1] for name in state if name.startswith("layers.")}
    if len(layers) != config["num_layers"]:
        return f"{len(layers)} layers of weights for num_layers {config['num_layers']}"
    if tuple(state["token_emb.weight"].shape) != (config["vocab_size"], config["hidden_dim"]):
        return "token_emb.weight is not vocab_size by hidden_dim"
    with torch.device("meta"):  # shapes alone
        expected = build_model(config).state_dict()
    if expected.keys() != state.keys():
        name = sorted(expected.keys() ^ state.keys())[0]
        return f"{name[:80]} is {'missing' if name in expected else 'of no such model'}"
    for name, tensor in expected.items():
        if tensor.shape != state[name].shape:
            return f"{name} is {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
        if not bool(torch.isfinite(state[name]).all()):
            return f"{name} holds NaN or infinity"
    return None


def _is_of_type(value, name):
    """Whether a config's value is of a dataclass field's annotated type."""
    if value is None:
        return "None" in name
    if name.startswith("int"):
        return type(value) is int and abs(value) < LARGEST_SIZE
    if name.startswith("float"):
        return type(value) in (int, float) and math.isfinite(value)
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


def _from_first_release(checkpoint):
    """Give a first-release checkpoint (design: law `published`) this release's names."""
    old = {
        name.replace("_orig_mod.", "").removeprefix("module."): tensor
        for name, tensor in checkpoint["model_state"].items()
    }
    state = {}
    for name, tensor in old.items():
        name = name.replace(".ffn.net.0.", ".ffn.up_proj.")
        name = name.replace(".ffn.net.3.", ".ffn.down_proj.")
        name = name.replace(".attn.coord_proj_next.", ".coord_proj_next.")
        name = name.replace(".attn.radius_param", ".attn.radius_raw")
        if name.endswith(".attn.gamma"):
            name, tensor = name + "_raw", tensor.flatten()
        elif name.endswith(".attn.gravity_bias"):
            tensor = tensor.flatten()
        state[name] = tensor
    config = dict(checkpoint["config"])
    config["block_size"] = config.pop("max_seq_len")
    config["mlp_dim"] = state["layers.0.ffn.up_proj.weight"].shape[0]
    config["vocab_size"] = state["token_emb.weight"].shape[0]
    config["tie_head"] = torch.equal(state["head.weight"], state["token_emb.weight"])
    config.setdefault("model_type", "ngt" if "coord_emb.weight" in state else "vanilla")
    if config["model_type"] == "ngt":
        points = state["layers.0.attn.coord_proj_attn.weight"].shape[0]
        config["head_coord_dim"] = points // config["num_heads"]
        config["law"] = "published"
        if "layers.0.attn.radius_raw" not in state:
            config["use_radius_cutoff"] = False
            for layer in range(config["num_layers"]):
                state[f"layers.{layer}.attn.radius_raw"] = torch.tensor(4.0)
        if not config.get("use_radius_cutoff", True):
            config["use_soft_cutoff"] = False
    else:
        config["pos"] = "learned"
        config["head_bias"] = "head.bias" in state
    return {**checkpoint, "model_state": state, "config": config, "format_version": 1}


def is_first_release(checkpoint):
    """Whether a checkpoint that was read came from the first release."""
    return checkpoint["format_version"] == 1
