"""What a checkpoint may say: checked before anything is built from it."""

import math
from dataclasses import MISSING, fields

import torch

from engine.models import MODELS, build_model
from system.safe_text import shown_short

LARGEST_SIZE = 1 << 31


def unsound_tensors(state, file_size):
    """Why these are no weights that a file of this size can hold; None where they are."""
    if not isinstance(state, dict):
        return "model_state is no dictionary"
    total = 0
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            return "model_state holds more than named tensors"
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
            return f"{shown_short(name)} is no tensor of weights"
        if not tensor.is_contiguous():
            return f"{shown_short(name)} repeats its numbers"
        total += tensor.numel() * tensor.element_size()
    # a tied head is named twice
    return "its tensors hold more than the file does" if total > 2 * file_size else None


def contradiction(checkpoint):
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
            return f"{field.name} is {shown_short(value)}"
    step, best_val = checkpoint.get("iter", 0), checkpoint.get("best_val", 0)
    if type(step) is not int or not 0 <= step < 1 << 62:
        return f"iter is {shown_short(step)}"
    if type(best_val) not in (int, float) or not -1e300 < best_val <= math.inf:
        return f"best_val is {shown_short(best_val)}"
    directory = config.get("token_directory")
    if not isinstance(directory, str | None):
        return f"token_directory is {shown_short(directory)}"
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
        return f"{shown_short(name)} is {'missing' if name in expected else 'of no such model'}"
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


def is_plain(value, expected):
    return type(value) is type(expected) and value == expected


def _is_of_type(value, name):
    """Whether a config's value is of a dataclass field's annotated type."""
    if value is None:
        return "None" in name
    if name.startswith("int"):
        return type(value) is int and abs(value) < LARGEST_SIZE
    if name.startswith("float"):
        return type(value) in (int, float) and abs(value) < 1e300
    return type(value).__name__ == name
