"""Checks on what a checkpoint contains, made before a model is built from it.

Checkpoints come from strangers: a size in one must not allocate memory that its file does not have.
"""

import math
from dataclasses import MISSING, fields

import torch

from engine.models import CONFIGS, weightless_model
from system.errors import UserError
from system.safe_text import short_reason, shown_short

LARGEST_SIZE = 1 << 31  # of any integer in a config


def unsound_tensors(state, file_size):
    """Why these cannot be the weights of a checkpoint file of this size; None if they can.

    Args:
        state: what the file has under `model_state`, of any type.
        file_size: bytes.
    """
    if not isinstance(state, dict):
        return "model_state is not a dictionary"
    total = 0
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            return "model_state holds more than named tensors"
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
            return f"{shown_short(name)} is not a tensor of weights"
        # an expanded tensor has any shape and takes the file one number
        if not tensor.is_contiguous():
            return f"{shown_short(name)} repeats its numbers"
        total += tensor.numel() * tensor.element_size()
    # twice, because the weights of a tied head appear under two names
    return "its tensors hold more than the file does" if total > 2 * file_size else None


def contradiction(checkpoint):
    """Why a checkpoint's config, progress and weights do not fit together; None if they do.

    Call it after `unsound_tensors`.
    """
    try:
        return (
            _wrong_config(checkpoint["config"])
            or _wrong_progress(checkpoint)
            or _wrong_weights(checkpoint["config"], checkpoint["model_state"])
        )
    except (KeyError, TypeError, RuntimeError, AttributeError, OverflowError, UserError) as error:
        return short_reason(error)


def _wrong_config(config):
    if not isinstance(config, dict):
        return "config is not a dictionary"
    if not isinstance(config.get("model_type"), str) or config["model_type"] not in CONFIGS:
        return "its model_type is unknown"
    for field in fields(CONFIGS[config["model_type"]]):
        value = config.get(field.name, field.default)
        if value is MISSING:
            return f"it has no {field.name}"
        if not _is_of_type(value, getattr(field.type, "__name__", str(field.type))):
            return f"{field.name} is {shown_short(value)}"
    directory = config.get("token_directory")
    if not isinstance(directory, str | None):
        return f"token_directory is {shown_short(directory)}"
    return None


def _wrong_progress(checkpoint):
    step, best_val = checkpoint.get("iter", 0), checkpoint.get("best_val", 0)
    if type(step) is not int or not 0 <= step < 1 << 62:
        return f"iter is {shown_short(step)}"
    if type(best_val) not in (int, float) or not -1e300 < best_val <= math.inf:
        return f"best_val is {shown_short(best_val)}"
    return None


def _wrong_weights(config, state):
    # these two first: even without weights, a model of 10^9 layers takes memory and time to build
    layers = {name.split(".")[1] for name in state if name.startswith("layers.")}
    if len(layers) != config["num_layers"]:
        return f"{len(layers)} layers of weights for num_layers {config['num_layers']}"
    if tuple(state["token_emb.weight"].shape) != (config["vocab_size"], config["hidden_dim"]):
        return "token_emb.weight is not vocab_size by hidden_dim"
    model = weightless_model(config)
    expected = model.state_dict()
    if expected.keys() != state.keys():
        name = sorted(expected.keys() ^ state.keys())[0]
        return (
            f"{shown_short(name)} is {'missing' if name in expected else 'not part of this model'}"
        )
    for name, tensor in expected.items():
        if tensor.shape != state[name].shape:
            return f"{name} is {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
        # as fp32, which is what the model will store: a float64 weight can be beyond its range
        if not bool(torch.isfinite(state[name].float()).all()):
            return f"{name} holds NaN or infinity"
    if getattr(model.config, "tie_head", False) and not torch.equal(
        state["head.weight"], state["token_emb.weight"]
    ):
        return "its tied head is not its embedding"
    return None


def _is_of_type(value, name):
    """Whether a config's value has the type that a dataclass field is annotated with.

    `isinstance` is not enough: True is an int to Python.
    """
    if value is None:
        return "None" in name
    if name.startswith("int"):
        return type(value) is int and abs(value) < LARGEST_SIZE
    if name.startswith("float"):
        return type(value) in (int, float) and abs(value) < 1e300
    return type(value).__name__ == name
