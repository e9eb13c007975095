"""Builds the model that a config describes; a config is a plain dict."""

from dataclasses import fields

from layers.config import NGTConfig, VanillaConfig

CONFIGS = {"ngt": NGTConfig, "vanilla": VanillaConfig}


def model_fields(model_type):
    """The names of the config fields that shape this kind of model, in order."""
    return [field.name for field in fields(CONFIGS[model_type])]


def model_config(config):
    """The config as the model's dataclass; keys that are not fields of it are left out.

    Args:
        config: a dict with `model_type`, "ngt" or "vanilla".

    Raises:
        UsageError: if a size or setting is out of range.
    """
    names = model_fields(config["model_type"])
    values = {name: config[name] for name in names if name in config}
    return CONFIGS[config["model_type"]](**values)


def build_model(config):
    """A freshly initialised model of this config. Raises what `model_config` raises."""
    from model import NGT  # PyTorch takes a second to import, and --help needs only the settings
    from vanilla_model import Vanilla

    model_class = {"ngt": NGT, "vanilla": Vanilla}[config["model_type"]]
    return model_class(model_config(config))


def weightless_model(config):
    """The model of a config for its names and shapes: large weights are on "meta", none is filled.

    `torch.device("meta")` alone gives the same, but loads PyTorch's compiler, which takes two
    seconds, for the few operations that initialise weights.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class Weightless(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if function is torch.empty:
                kwargs["device"] = "meta"
            elif function.__name__.endswith("_") and not function.__name__.endswith("__"):
                return args[0] if args else kwargs["tensor"]  # in place: left as it is
            elif function.__name__.startswith("repeat"):  # small values become as many as weights
                args = (args[0].to("meta"), *args[1:])
            return function(*args, **kwargs)

    with Weightless():
        return build_model(config)
