"""Builds the model that a config describes; a config is a plain dict."""

from dataclasses import fields

from model import NGT, NGTConfig
from vanilla_model import Vanilla, VanillaConfig

MODELS = {"ngt": (NGT, NGTConfig), "vanilla": (Vanilla, VanillaConfig)}


def model_fields(model_type):
    """The names of the config fields that shape this kind of model, in order."""
    return [field.name for field in fields(MODELS[model_type][1])]


def model_config(config):
    """The config as the model's dataclass; keys that are not fields of it are left out.

    Args:
        config: a dict with `model_type`, "ngt" or "vanilla".

    Raises:
        UsageError: if a size or setting is out of range.
    """
    _, config_class = MODELS[config["model_type"]]
    names = model_fields(config["model_type"])
    return config_class(**{name: config[name] for name in names if name in config})


def build_model(config):
    """A freshly initialised model of this config. Raises what `model_config` raises."""
    model_class, _ = MODELS[config["model_type"]]
    return model_class(model_config(config))
