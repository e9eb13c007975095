"""The flags of training, read from the fields of the settings.

Their argparse default is None, so that `training.config.resolve` can tell which were given.
"""

import argparse

from system.cli import file_path, script_parser
from system.settings import add_flag
from training.config import CORPUS, DEFAULTS, PRESETS, RECIPES, SETTINGS

GROUPS = {  # in the order of --help
    "model kind": ("model_type",),
    "text": (*CORPUS, "prepared_tokens"),
    "size": (
        *("hidden_dim", "coord_dim", "head_coord_dim", "num_layers", "num_heads", "mlp_dim"),
        *("num_parameters", "block_size", "dropout"),
    ),
    "recipe": (
        *("recipe", "norm", "bias", "activation", "zero_init_outputs", "value_residual"),
        *("embedding_skip", "logit_softcap"),
    ),
    "law of attraction (NGT)": (
        *("law", "exponent", "radius", "use_radius_cutoff", "use_soft_cutoff", "mass_in_value"),
        *("coords_from", "retardation", "retarded_values", "background", "background_start"),
        *("farthest_time_scale", "fixed_farthest", "use_rsqrt", "field_tolerance"),
    ),
    "attention (vanilla)": ("pos", "qk_norm", "smear", "sink"),
    "repulsion (NGT)": ("repulsion", "lambda_repulsion", "repulsion_interval"),
    "optimisation": (
        *("batch_size", "gradient_accumulation_steps", "optimizer", "learning_rate"),
        *("matrix_learning_rate", "min_learning_rate", "beta2", "weight_decay"),
        *("grad_clip", "max_steps", "use_cosine_schedule", "warmup_steps", "seed"),
    ),
    "machine": ("use_amp", "compile", "shard", "deterministic", "device", "threads"),
}


def train_parser(description, examples):
    """The parser of train_shakespeare.py."""
    parser = script_parser(description, examples)
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        _add_settings(group, *names)
    help = "older form of --shard optimizer and --shard none"
    group.add_argument("--shard-optimizer", action=_OldShard, help=help)
    run = parser.add_argument_group("run")
    _add_settings(run, "eval_interval", "eval_iters", "sample_tokens")
    run.add_argument(
        "--checkpoint-path",
        type=file_path,
        help="PATH writes PATH_best.pt and PATH_last.pt (default: checkpoints/shakespeare.pt, for "
        "vanilla checkpoints/shakespeare_vanilla.pt, named after the dataset)",
    )
    _add_settings(run, "checkpoint_interval", "max_skipped_steps")
    run.add_argument(
        "--run-name",
        help="directory under runs/ for metrics and TensorBoard (default: PATH's name)",
    )
    run.add_argument(
        "--config",
        metavar="FILE",
        type=file_path,
        help="take the settings of another run from its runs/NAME/config.json; flags win (default: "
        "none)",
    )
    run.add_argument(
        "--resume", action="store_true", help="continue from PATH_last.pt; start if there is none"
    )
    run.add_argument(
        "--resume-from",
        metavar="FILE",
        type=file_path,
        help="continue from this checkpoint instead",
    )
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="prepare the text, print what would be trained, and stop",
    )
    run.add_argument(
        "--overwrite", action="store_true", help="replace an existing run of the same name"
    )
    return parser


class _OldShard(argparse.BooleanOptionalAction):
    def __call__(self, parser, namespace, values, option_string=None):
        namespace.shard = "none" if option_string.startswith("--no-") else "optimizer"


def add_corpus_flags(parser, default_dataset):
    """Add the flags that choose the text and the tokenizer; --dataset has this script's default."""
    defaults = {"dataset": default_dataset}
    _add_settings(parser.add_argument_group("text"), *CORPUS, defaults=defaults)
    parser.set_defaults(**defaults)


def _add_settings(group, *names, defaults=DEFAULTS):
    for name in names:
        help = SETTINGS[name].metadata["help"]
        add_flag(group, SETTINGS[name], help + _stated_default(name, help, defaults))


def _stated_default(name, help, defaults):
    """The default as `--help` states it, presets included; empty if the help has it already."""
    value = (DEFAULTS | defaults)[name]
    if value is None or "(default: " in help:
        return ""
    parts = [_shown(value)]
    special = PRESETS | RECIPES
    for recipe in RECIPES:
        special |= {f"{title} {recipe}": p[recipe] for title, p in PRESETS.items() if recipe in p}
    parts += [f"{title}: {_shown(p[name])}" for title, p in special.items() if name in p]
    return f" (default: {'; '.join(parts)})"


def _shown(value):
    if isinstance(value, dict):  # by kind of model
        return ", ".join(f"{number} for {kind}" for kind, number in value.items())
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)
