"""From a config, a plain dict, to the model that it describes."""

from dataclasses import fields

from model import NGT, NGTConfig
from vanilla_model import Vanilla, VanillaConfig

MODELS = {"ngt": (NGT, NGTConfig), "vanilla": (Vanilla, VanillaConfig)}


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
