"""Settings of a run: defaults, presets, and which value wins."""

import torch

from engine.models import build_model, model_fields
from system.errors import UsageError, warn

DEFAULTS = {
    "model": "ngt",
    "dataset": "shakespeare",
    "tokenizer": "char",
    "bpe_vocab_size": 8192,
    "tiktoken_encoding": "gpt2",
    "hidden_dim": 128,
    "coord_dim": 64,
    "head_coord_dim": 16,
    "num_layers": 4,
    "num_heads": 4,
    "block_size": 64,
    "dropout": 0.0,
    "law": "newton",
    "exponent": 4,
    "mass_in_value": False,
    "retardation": True,
    "farthest_time_scale": 0.0035,
    "use_radius_cutoff": True,
    "use_soft_cutoff": False,
    "use_rsqrt": False,
    "pos": "learned",
    "repulsion": True,
    "lambda_repulsion": 0.05,
    "repulsion_interval": 10,
    "batch_size": 12,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "min_learning_rate": 1e-4,
    "weight_decay": 0.1,
    "grad_clip": 1.0,
    "max_steps": 2000,
    "use_cosine_schedule": True,
    "warmup_steps": 100,
    "seed": 1337,
    "use_amp": False,
    "compile": False,
    "deterministic": False,
    "device": "auto",
    "eval_interval": 250,
    "eval_iters": 100,
    "sample_tokens": 100,
    "checkpoint_interval": 250,
    "max_skipped_steps": 10,
    "shard_optimizer": False,
}

# mlp_dim makes the parameters of a compared pair equal to within 1 %
PRESETS = {
    "shakespeare": {"mlp_dim": {"newton": 576, "published": 596, "vanilla": 512}},
    "text": {
        "mlp_dim": {"newton": 596, "published": 604, "vanilla": 512},
        "tokenizer": "bpe",
        "bpe_vocab_size": 2048,
        "block_size": 256,
        "batch_size": 8,
        "learning_rate": 4e-3,  # the best of 1e-3 to 8e-3 for both models (reports/study.md)
        "min_learning_rate": 4e-4,
        "max_steps": 6000,
        "eval_interval": 500,
        "eval_iters": 50,
        "checkpoint_interval": 500,
    },
    "wikitext103": {
        "mlp_dim": {"newton": 2048, "published": 2056, "vanilla": 1560},
        "tokenizer": "bpe",
        "hidden_dim": 512,
        "num_layers": 8,
        "num_heads": 8,
        "block_size": 512,
        "batch_size": 16,
        "gradient_accumulation_steps": 2,
        "learning_rate": 6e-4,
        "min_learning_rate": 6e-5,
        "warmup_steps": 2000,
        "max_steps": 15000,
        "eval_interval": 500,
        "eval_iters": 16,
        "checkpoint_interval": 500,
    },
}


def is_given(args, name):
    """Whether the user gave this flag."""
    return getattr(args, name, None) is not None


def resolve(args, resumed=None):
    """One value for every flag, as a plain dict.

    Args:
        args: what argparse returned.
        resumed: the config of the checkpoint being resumed.

    Raises:
        UsageError: where a given flag contradicts the shape of the resumed model.
    """
    names = [*DEFAULTS, "data_path", "tokenizer_path", "mlp_dim", "num_parameters"]
    names += ["radius", "field_tolerance"]
    given = {name: getattr(args, name) for name in names if is_given(args, name)}
    if resumed is not None:
        _check_against(given, resumed)
        config = {name: resumed.get(name, DEFAULTS.get(name)) for name in names} | given
    else:
        preset = dict(PRESETS[given.get("dataset", DEFAULTS["dataset"])])
        matched = preset.pop("mlp_dim")
        config = dict.fromkeys(names) | DEFAULTS | preset | given
        if config["mlp_dim"] is None:
            config["mlp_dim"] = _mlp_dim(config, given, matched)
    return config


def _mlp_dim(config, given, matched):
    kind = "vanilla" if config["model"] == "vanilla" else config["law"]
    aim = config["num_parameters"]
    if (
        aim is None
        and not {"hidden_dim", "coord_dim", "head_coord_dim", "num_heads"} & given.keys()
    ):
        return matched[kind]
    width = 4 * config["hidden_dim"]
    if kind == "newton" and aim is None:
        return width

    def parameters(**changes):
        vocab_size = config["bpe_vocab_size"] if config["tokenizer"] == "bpe" else 256
        shape = config | {"model_type": config["model"], "vocab_size": vocab_size} | changes
        with torch.device("meta"):
            return sum(p.numel() for p in build_model(shape).parameters())

    aim = aim or parameters(model_type="ngt", law="newton", mlp_dim=width)
    without = parameters(mlp_dim=8)
    a_channel = (parameters(mlp_dim=16) - without) / 8
    return 8 + max(0, round((aim - without) / a_channel / 4) * 4)


def _check_against(given, resumed):
    if given.get("model", resumed["model"]) != resumed["model"]:
        raise UsageError(
            f"--model {given['model']} contradicts the checkpoint, which is {resumed['model']}: "
            "drop the flag or give another --checkpoint-path"
        )
    shape = {*model_fields(resumed["model"]), "tokenizer"} - {"dropout", "field_tolerance"}
    for name, value in given.items():
        if name == "dataset" and value != resumed[name]:
            raise UsageError(
                f"--dataset {value} contradicts the checkpoint, which was trained on "
                f"{resumed[name]}: drop the flag or give another --checkpoint-path"
            )
        if name not in shape or value == resumed.get(name):
            if name in resumed and value != resumed[name] and name not in _FREE_ON_RESUME:
                warn(f"--{name.replace('_', '-')} changes from {resumed[name]} to {value}")
            continue
        raise UsageError(
            f"--{name.replace('_', '-')} {value} contradicts the checkpoint, which has "
            f"{resumed.get(name)}: drop the flag or give another --checkpoint-path"
        )


_FREE_ON_RESUME = {
    "device",
    "eval_interval",
    "sample_tokens",
    "checkpoint_interval",
    "data_path",
    "tokenizer_path",
    "shard_optimizer",
}
