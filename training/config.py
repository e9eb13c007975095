"""Settings of a run: its fields with their defaults, the presets, and which value wins.

A given flag wins over the checkpoint being resumed, that over the preset of the dataset, that over
the recipe, and that over the default. The result is the run's config: a dict with a value for every
setting.
"""

from dataclasses import MISSING, dataclass, fields

from engine.models import CONFIGS, model_fields, weightless_model
from system.cli import (
    not_negative,
    random_seed,
    share,
    thread_count,
    whole,
    whole_or_zero,
)
from system.errors import UsageError, warn
from system.settings import flag_of, setting
from system.threads import HELP as THREADS_HELP

RECIPES = {
    "gpt2": {},  # the defaults of the settings
    "modern": {
        "norm": "rmsnorm",
        "bias": False,
        "activation": "relu2",
        "zero_init_outputs": True,
        "value_residual": True,
        "embedding_skip": True,
        "logit_softcap": 15.0,
        "pos": "rotary",
        "qk_norm": True,
        "optimizer": "muon",
        "beta2": 0.95,
    },
}
# What a new run gets by its law; the defaults of the fields are what an older checkpoint means.
LAW_DEFAULTS = {
    "newton": {
        **{"background": True, "use_radius_cutoff": False},
        **{"coords_from": "state", "retarded_values": True, "repulsion": False},
    },
    "published": {"recipe": "gpt2"},  # it is there to reproduce what was published
}
# A value may be a dict by kind of model: newton, published or vanilla. A dict under a recipe's name
# holds what is different under that recipe. mlp_dim gives compared models equal parameters, to
# within 1 %, under the recipe gpt2; for the others `_mlp_dim` computes it.
PRESETS = {
    "shakespeare": {"mlp_dim": {"newton": 576, "published": 596, "vanilla": 512}},
    "text": {
        "mlp_dim": {"newton": 596, "published": 604, "vanilla": 512},
        "tokenizer": "bpe",
        "bpe_vocab_size": 2048,
        "block_size": 256,
        "batch_size": 8,
        "recipe": "modern",
        # for texts far longer than a window (reports/study.md)
        **{"farthest_time_scale": 3.5e-4, "fixed_farthest": True},
        # the best of those tried for both models (reports/study.md)
        "modern": {"learning_rate": 8e-3},
        "learning_rate": 4e-3,
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
        "warmup_steps": 2000,
        "max_steps": 15000,
        "eval_interval": 500,
        "eval_iters": 16,
        "checkpoint_interval": 500,
    },
}


@dataclass
class RunSettings:
    """The settings of a run that do not shape its model, and the kind of model."""

    model_type: str = setting(
        "ngt",
        "NGT, or the vanilla transformer that it is compared with",
        choices=list(CONFIGS),
        flag="--model",
    )
    dataset: str = setting(
        "shakespeare",
        "shakespeare: tiny Shakespeare, or the complete plays if it cannot be downloaded; "
        "wikitext103: from the Hugging Face Hub or local files; text: any UTF-8 text",
        choices=list(PRESETS),
    )
    data_path: str | None = setting(
        None,
        "shakespeare: a text file to use instead; wikitext103: a directory with "
        "wiki.{train,valid,test}.{raw,tokens,txt} or the Hub's parquet files (default: data); "
        "text: a file (split 90/5/5), a directory with train.*, valid.*, test.*, or one of many "
        ".txt, .jsonl or .parquet files (split by file); each plain, .xz or .gz",
        is_path=True,
    )
    tokenizer: str = setting("char", "how text becomes tokens", choices=("char", "bpe", "tiktoken"))
    bpe_vocab_size: int = setting(
        8192, "tokens in the vocabulary of a BPE tokenizer to train", whole
    )
    tokenizer_path: str | None = setting(
        None,
        "a BPE tokenizer file to use; if it does not exist, it is trained and written there "
        "(default: trained, and kept with the token files)",
        is_path=True,
    )
    tiktoken_encoding: str = setting("gpt2", "the name of an encoding that tiktoken knows")
    prepared_tokens: str | None = setting(
        None,
        "a directory of token files that prepare_data.py has written, with their tokenizer: the "
        "text itself is then not needed",
        flag="--token-directory",
        is_path=True,
    )
    recipe: str = setting(
        "gpt2",
        "defaults of the model's parts and of the optimizer: gpt2, as in 2019, or modern",
        choices=list(RECIPES),
    )
    num_parameters: int | None = setting(
        None, "choose --mlp-dim so that the model has about this many parameters", whole
    )
    repulsion: bool = setting(
        True,
        "add a loss that keeps coordinates apart (default: off under newton, on under published)",
    )
    lambda_repulsion: float = setting(0.05, "weight of that loss", not_negative)
    repulsion_interval: int = setting(10, "steps between additions of that loss", whole)
    batch_size: int = setting(12, "windows per micro-step, over all processes", whole)
    gradient_accumulation_steps: int = setting(1, "micro-steps per step", whole)
    optimizer: str = setting(
        "adamw",
        "adamw for all weights, or muon for the matrices inside the model and adamw for the rest",
        choices=("adamw", "muon"),
    )
    learning_rate: float = setting(1e-3, "the highest learning rate of AdamW", not_negative)
    matrix_learning_rate: float | None = setting(
        None, "the highest learning rate of Muon (default: that of AdamW)", not_negative
    )
    beta2: float = setting(0.99, "share of AdamW's mean square that a step keeps", share)
    min_learning_rate: float | None = setting(
        None,
        "learning rate at the end of the cosine (default: a tenth of the highest)",
        not_negative,
    )
    weight_decay: float = setting(0.1, "weight decay, on matrices only", not_negative)
    grad_clip: float = setting(1.0, "largest norm of the gradient; 0: no clipping", not_negative)
    max_steps: int = setting(2000, "steps in total, resumed ones included", whole)
    use_cosine_schedule: bool = setting(
        True, "decay the learning rate along a cosine; otherwise it stays constant"
    )
    warmup_steps: int = setting(100, "steps of linear warm-up", whole_or_zero)
    seed: int = setting(1337, "random seed of weights, batches and dropout", random_seed)
    use_amp: bool = setting(
        None,
        "train in bf16 if the device has it, otherwise in fp16 with a scaler (GPU) (default: on if "
        "a GPU has bf16, otherwise off)",
    )
    compile: bool = setting(
        False, "compile the model with torch.compile; on a GPU record the step as a CUDA graph, too"
    )
    shard: str = setting(
        "none",
        "under torchrun, each process keeps only a part of the optimizer's state, or of the whole "
        "model with it",
        choices=("none", "optimizer", "model"),
    )
    deterministic: bool = setting(False, "bit-identical runs on a GPU too (slower)")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...")
    threads: int | None = setting(None, THREADS_HELP, thread_count)
    eval_interval: int = setting(250, "steps between evaluations", whole)
    eval_iters: int = setting(100, "evaluate on at most 16 x this many fixed windows", whole)
    sample_tokens: int = setting(
        100,
        "length in tokens of the text that the model writes into TensorBoard at evaluations, at "
        "about 50 of them at most; 0: none",
        whole_or_zero,
    )
    checkpoint_interval: int = setting(250, "steps between writes of PATH_last.pt", whole)
    max_skipped_steps: int = setting(
        10, "stop after this many steps in a row with a loss or gradient that is not finite", whole
    )


def _all_settings():
    """Every field with a flag by its name: the run's, then those of both kinds of model."""
    classes = [RunSettings, *CONFIGS.values()]
    return {
        field.name: field
        for config_class in classes
        for field in fields(config_class)
        if field.metadata and field.default is not MISSING
    }


SETTINGS = _all_settings()
DEFAULTS = {name: field.default for name, field in SETTINGS.items()}
CORPUS = (  # what `text.preparation.prepare_data` takes
    *("dataset", "data_path", "tokenizer", "bpe_vocab_size"),
    *("tokenizer_path", "tiktoken_encoding"),
)
FREE_ON_RESUME = {  # they change nothing that the model learns: no warning of a change
    *("device", "threads", "data_path", "tokenizer_path", "prepared_tokens", "shard"),
    *("eval_interval", "eval_iters", "sample_tokens", "checkpoint_interval"),
}


def preset_settings(dataset, kind, recipe="gpt2"):
    """The settings of a preset for a kind of model, newton, published or vanilla."""
    preset = PRESETS[dataset] | PRESETS[dataset].get(recipe, {})
    return {
        name: value[kind] if isinstance(value, dict) else value
        for name, value in preset.items()
        if name not in RECIPES
    }


def law_settings(law, given):
    """The defaults of a new run under a law, and what was given, which may change them."""
    settings = dict(LAW_DEFAULTS[law])
    # who names a radius wants one; without a background only a radius bounds what a head must read
    if given.keys() & {"radius", "use_soft_cutoff"} or given.get("background") is False:
        settings["use_radius_cutoff"] = True
    return settings | given


def given_settings(args):
    """The settings that the user gave as flags, by name."""
    values = {name: getattr(args, name, None) for name in SETTINGS}
    return {name: value for name, value in values.items() if value is not None}


def resolve(args, resumed=None):
    """A value for every setting, as a plain dict.

    Args:
        args: what argparse returned.
        resumed: the config of the checkpoint being resumed, or None.

    Raises:
        UsageError: if a given flag contradicts the shape of the resumed model.
    """
    given = given_settings(args)
    if resumed is not None:
        _check_against(given, resumed)
        # what an older config does not say; it is older than bf16 by default
        older = DEFAULTS | {"use_amp": False}
        kept = {name: resumed.get(name, older[name]) for name in SETTINGS}
        if "data_path" in given:  # the text itself instead of token files
            kept["prepared_tokens"] = None
        return _with_minimum_rate(kept, given)
    dataset = given.get("dataset", DEFAULTS["dataset"])
    config = DEFAULTS | given
    kind = "vanilla" if config["model_type"] == "vanilla" else config["law"]
    recipe = (DEFAULTS | PRESETS[dataset] | LAW_DEFAULTS[config["law"]] | given)["recipe"]
    preset = preset_settings(dataset, kind, recipe)
    config |= law_settings(config["law"], given) | RECIPES[recipe] | preset
    config |= {"recipe": recipe} | given
    if "mlp_dim" not in given:
        config["mlp_dim"] = _mlp_dim(config, given, kind, PRESETS[dataset]["mlp_dim"])
    return config | {"min_learning_rate": given.get("min_learning_rate", tenth_of_peak(config))}


def tenth_of_peak(config):
    """The learning rate at the end of the cosine, unless another was given."""
    peak = config["learning_rate"] or config["matrix_learning_rate"] or 0.0
    return float(f"{peak / 10:.12g}")  # 6e-05 and not 5.9999999999999995e-05


def _with_minimum_rate(resumed, given):
    """The settings of a resumed run with what was given: its minimum was chosen, or it follows."""
    config, before = resumed | given, resumed["min_learning_rate"]
    if "min_learning_rate" not in given and before in (None, tenth_of_peak(resumed)):
        config["min_learning_rate"] = after = tenth_of_peak(config)
        if after != before:
            warn(f"--min-learning-rate changes from {before} to {after}, a tenth of the highest")
    return config


def _mlp_dim(config, given, kind, matched):
    """The `mlp_dim` that gives compared models equally many parameters.

    Args:
        config: a value for every setting, `mlp_dim` still as in the preset.
        given: the settings that the user gave.
        kind: of the model.
        matched: the preset's widths by kind, which hold for the recipe gpt2 if no size is given.
    """
    aim = config["num_parameters"]
    sizes = {"hidden_dim", "coord_dim", "head_coord_dim", "num_heads"}
    width = matched["newton"]
    if sizes & given.keys():
        width = 4 * config["hidden_dim"]  # as in GPT-2
    elif aim is None and config["recipe"] == "gpt2":
        return matched[kind]
    if kind == "newton" and aim is None:
        return width

    def parameters(**changes):
        vocab_size = config["bpe_vocab_size"] if config["tokenizer"] == "bpe" else 256
        model = weightless_model(config | {"vocab_size": vocab_size} | changes)
        return sum(p.numel() for p in model.parameters())

    # parameters grow linearly with the width, so two widths give the slope
    aim = aim or parameters(model_type="ngt", law="newton", mlp_dim=width)
    without = parameters(mlp_dim=8)
    per_channel = (parameters(mlp_dim=16) - without) / 8
    return 8 + max(0, round((aim - without) / per_channel / 4) * 4)


def _check_against(given, resumed):
    """Refuse what contradicts the resumed model, and warn of what changes the run."""
    fixed = {"model_type", "dataset", "tokenizer", "recipe", "optimizer"}
    fixed |= set(model_fields(resumed["model_type"]))
    fixed -= {"dropout", "field_tolerance"}  # they change no shape and no meaning of the weights
    for name, value in given.items():
        flag, before = flag_of(SETTINGS[name]), resumed.get(name, DEFAULTS[name])
        if name in fixed and value != before:
            raise UsageError(
                f"{flag} {value} contradicts the checkpoint, which has {before}: "
                "drop the flag or give another --checkpoint-path"
            )
        if name not in FREE_ON_RESUME and value != before:
            warn(f"{flag} changes from {before} to {value}")


def described(config):
    """A model in words: its kind, and in brackets what a reader must know of it."""
    c = DEFAULTS | config
    if c["model_type"] == "vanilla":
        words = [c["pos"]]
        words += [f"smear {c['smear']}"] if c["smear"] != "none" else []
        words += ["sink"] if c["sink"] else []
    else:
        words = [c["law"]]
        words += [name.replace("_", " ") for name in ("background", "mass_in_value") if c[name]]
    words += [c["recipe"]] if c["recipe"] != "gpt2" else []
    return f"{c['model_type']} ({', '.join(words)})"


def warn_of_rates(config):
    """Warn if the learning rate cannot fall to its minimum, or only rises."""
    peak, low = config["learning_rate"], config["min_learning_rate"]
    if config["use_cosine_schedule"] and 0 < peak < low:
        warn(
            f"--min-learning-rate {low} is above --learning-rate {peak}: the learning rate stays "
            f"at {peak} after the warm-up; give a smaller minimum, or none for a tenth"
        )
    warmup, steps = config["warmup_steps"], config["max_steps"]
    if warmup >= steps:
        warn(
            f"--warmup-steps {warmup:,} takes all of --max-steps {steps:,}: the learning rate only "
            f"rises, to {peak * steps / warmup:.3g} of {peak}; give fewer"
        )


def warn_of_no_effect(args, config):
    """One warning for each given flag that this run does not use."""
    given = given_settings(args).keys() - getattr(args, "from_file", set())
    if config["prepared_tokens"] is not None:
        for name in sorted(given & {*CORPUS} - {"dataset", "bpe_vocab_size"}):  # they set sizes
            warn(f"{flag_of(SETTINGS[name])} has no effect with --token-directory")
    if "matrix_learning_rate" in given and config["optimizer"] != "muon":
        warn("--matrix-learning-rate has no effect without --optimizer muon")
    if config["model_type"] == "vanilla":
        others = set(model_fields("ngt")) - set(model_fields("vanilla"))
        if "mlp_dim" not in given:  # they give the size of the NGT to match
            others -= {"coord_dim", "head_coord_dim"}
        for name in sorted(given & others):
            warn(f"{flag_of(SETTINGS[name])} has no effect on --model vanilla")
        return
    if "pos" in given:
        warn("--pos has no effect on --model ngt, which knows time as a dimension of space")
    for name in sorted(given & {"qk_norm", "sink", "smear"}):
        warn(f"{flag_of(SETTINGS[name])} has no effect on --model ngt")
    if config["use_rsqrt"] and config["law"] == "newton":
        warn("--use-rsqrt has no effect under --law newton")
    of_newton = {"exponent", "retardation", "farthest_time_scale", "fixed_farthest"}
    of_newton |= {"background_start"}
    if config["law"] == "published":
        for name in sorted(given & of_newton):
            warn(f"{flag_of(SETTINGS[name])} has no effect under --law published")
    elif "background_start" in given and not config["background"]:
        warn("--background-start has no effect without --background")
