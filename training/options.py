"""The command line of training: flags, presets, and which value wins.

Every flag's argparse default is None, so that "not given" can be told from "given": what the user
gives wins over the checkpoint being resumed, that over the preset of the dataset, that over the
common default.
"""

import argparse
import math
from collections import defaultdict

import torch

from checkpoint import MODELS, build_model, model_fields
from errors import UsageError, UserError, warn
from model import LAWS
from vanilla_model import POSITIONS

MOST_TOKENS = 1 << 28  # a micro-step that a checkpoint may ask for
MOST_TOKENS_A_STEP = 1 << 33
MOST = defaultdict(lambda: 1 << 31, seed=1 << 63, sample_tokens=100_000)  # of whole numbers
LONGEST_SETTING = 4096

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


def _default(name):
    """How `--help` states a default, presets included."""

    def show(value):
        if isinstance(value, bool):
            return "on" if value else "off"
        return str(value)

    parts = [show(DEFAULTS[name])] if name in DEFAULTS else []
    for preset, values in PRESETS.items():
        if name in values and not isinstance(values[name], dict):
            parts.append(f"{preset}: {show(values[name])}")
    return f" (default: {'; '.join(parts)})" if parts else ""


class _Group:
    """Adds flags to one titled group of a parser, each help text with its defaults."""

    def __init__(self, parser, title):
        self._group = parser.add_argument_group(title)

    def add(self, flag, help, dest=None, **settings):
        dest = dest or flag.removeprefix("--").replace("-", "_")
        self._group.add_argument(flag, dest=dest, help=help + _default(dest), **settings)

    def switch(self, flag, help, dest=None):
        self.add(flag, help, dest=dest, action=argparse.BooleanOptionalAction)


def whole(text):
    """An integer of at least 1."""
    value = _number(int, text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is too small: give at least 1")
    return value


def whole_or_zero(text):
    """An integer of at least 0."""
    value = _number(int, text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative: give at least 0")
    return value


def random_seed(text):
    """What a PyTorch generator takes."""
    value = whole_or_zero(text)
    if value >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text} is too large: give less than 2^63")
    return value


def positive(text):
    """A finite number above 0."""
    value = _number(float, text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a number above 0")
    return value


def not_negative(text):
    """A finite number of at least 0."""
    value = _number(float, text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a number of at least 0")
    return value


def share(text):
    """A number from 0 to below 1."""
    value = _number(float, text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be from 0 to below 1")
    return value


def _number(kind, text):
    try:
        return kind(text)
    except ValueError:
        what = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"{text!r} is no {what}") from None


def add_corpus_flags(parser, dataset=DEFAULTS["dataset"]):
    """Flags that say which text and which tokenizer; `dataset` is what a script takes unasked."""
    group = _Group(parser, "text")
    group._group.add_argument(
        "--dataset",
        help="shakespeare: tiny Shakespeare, or the complete plays where it cannot be reached; "
        "wikitext103: from the Hugging Face Hub or local files; text: any UTF-8 text "
        f"(default: {dataset})",
        choices=list(PRESETS),
    )
    group.add(
        "--data-path",
        "shakespeare: a text file to use instead; wikitext103: directory with "
        "wiki.{train,valid,test}.{raw,tokens,txt} or the Hub's parquet files (default: data); "
        "text: a file (split 90/5/5) or a directory with train.*, valid.*, test.*; each plain, "
        ".xz or .gz",
    )
    group.add("--tokenizer", "how text becomes tokens", choices=("char", "bpe", "tiktoken"))
    group.add("--bpe-vocab-size", "tokens of a BPE vocabulary to train", type=whole)
    group.add(
        "--tokenizer-path",
        "a BPE tokenizer file to use; where it does not exist it is trained and written there "
        "(default: trained, and kept with the token files)",
    )
    group.add("--tiktoken-encoding", "any encoding that tiktoken knows, by name")


def script_parser(description, examples):
    """A script's parser, whose help keeps the line ends of its manual and examples."""
    return argparse.ArgumentParser(
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def train_parser(description, examples):
    """The parser of train_shakespeare.py."""
    parser = script_parser(description, examples)
    _Group(parser, "model kind").add(
        "--model", "gravity, or the transformer it is compared with", choices=list(MODELS)
    )
    add_corpus_flags(parser)

    group = _Group(parser, "size")
    group.add("--hidden-dim", "channels of the hidden state", type=whole)
    group.add("--coord-dim", "dimensions of the space that tokens live in (NGT)", type=whole)
    group.add("--head-coord-dim", "dimensions that one head sees of it (NGT)", type=whole)
    group.add("--num-layers", "blocks", type=whole)
    group.add("--num-heads", "attention heads a block", type=whole)
    group.add(
        "--mlp-dim",
        "width of the feed-forward (default: the preset's, which gives compared models equal "
        "parameters; where sizes are given 4 x hidden-dim for newton, and for the others what "
        "gives them as many parameters as that)",
        type=whole,
    )
    group.add(
        "--num-parameters", "choose --mlp-dim so that the model has as many, nearly", type=whole
    )
    group.add("--block-size", "tokens of a training window", type=whole)
    group.add("--dropout", "on embeddings and on what attention and feed-forward add", type=share)

    group = _Group(parser, "law of attraction (NGT)")
    group.add("--law", "newton, or the first release's published one", choices=LAWS)
    group.add("--exponent", "field = mass / (1 + r2)^exponent (newton)", type=whole)
    group.add(
        "--radius",
        "where the cutoff ends, in softenings; stays there under the hard cutoff of newton, is "
        "learned from there otherwise (default: newton 16, published 4.02)",
        type=positive,
    )
    group.switch(
        "--radius-cutoff",
        "let nothing pull from beyond the radius; --no-radius-cutoff: no limit",
        dest="use_radius_cutoff",
    )
    group.switch("--use-soft-cutoff", "fade out towards a learned radius instead of a hard edge")
    group.switch("--mass-in-value", "multiply values by the mass, not the pull")
    group.switch(
        "--retardation",
        "feel a token, by a learned share, where its predecessor is (newton; without it the loss "
        "is 0.09 higher after 1500 steps: reports/study.md)",
    )
    group.add(
        "--farthest-time-scale",
        "softenings a token, at the start, of the head that looks farthest back (newton)",
        type=positive,
    )
    group.switch("--use-rsqrt", "compute 1/r2 by a reciprocal root (published law only)")
    group.add(
        "--field-tolerance",
        "leave out older tokens that together provably weigh less than this share "
        "(default: 1e-6, under bf16 and fp16 1e-4; 0: leave out nothing)",
        type=share,
    )
    _Group(parser, "positions (vanilla)").add(
        "--pos", "how a vanilla model knows order", choices=POSITIONS
    )

    group = _Group(parser, "repulsion (NGT)")
    group.switch("--repulsion", "add a loss that keeps coordinates apart; --no-repulsion: without")
    group.add("--lambda-repulsion", "its weight", type=not_negative)
    group.add("--repulsion-interval", "add it every so many steps", type=whole)

    group = _Group(parser, "optimisation")
    group.add("--batch-size", "windows a micro-step, over all processes", type=whole)
    group.add("--gradient-accumulation-steps", "micro-steps a step", type=whole)
    group.add("--learning-rate", "peak of AdamW's learning rate", type=not_negative)
    group.add("--min-learning-rate", "where the cosine ends", type=not_negative)
    group.add("--weight-decay", "on matrices only", type=not_negative)
    group.add("--grad-clip", "largest norm of the gradient; 0: no clipping", type=not_negative)
    group.add("--max-steps", "steps in all, resumed ones included", type=whole)
    group.switch("--use-cosine-schedule", "decay the learning rate; else it stays constant")
    group.add("--warmup-steps", "steps of linear warm-up", type=whole_or_zero)
    group.add("--seed", "of weights, batches and dropout", type=random_seed)

    group = _Group(parser, "machine")
    group.switch(
        "--use-amp", "train in bf16 where the device has it, else in fp16 with a scaler (GPU)"
    )
    group.switch("--compile", "torch.compile the model")
    group.switch(
        "--shard-optimizer", "under torchrun, each process keeps its share of AdamW's state"
    )
    group.switch("--deterministic", "bit-identical runs on a GPU too (slower)")
    group.add("--device", "auto, cpu, cuda, cuda:1, ...")

    group = _Group(parser, "run")
    group.add("--eval-interval", "steps between evaluations", type=whole)
    group.add("--eval-iters", "evaluate on at most 16 times so many fixed windows", type=whole)
    group.add(
        "--sample-tokens",
        "tokens of text that the model writes into TensorBoard at evaluations, at most some 50 "
        "times; 0: none",
        type=whole_or_zero,
    )
    group.add(
        "--checkpoint-path",
        "PATH writes PATH_best.pt and PATH_last.pt (default: checkpoints/shakespeare.pt, for "
        "vanilla checkpoints/shakespeare_vanilla.pt, named after the dataset)",
    )
    group.add("--checkpoint-interval", "steps between writes of _last", type=whole)
    group.add("--max-skipped-steps", "stop after so many non-finite steps in a row", type=whole)
    group.add(
        "--run-name", "directory under runs/ for metrics and TensorBoard (default: PATH's name)"
    )
    run = group._group
    run.add_argument(
        "--resume", action="store_true", help="go on from PATH_last.pt; start where there is none"
    )
    run.add_argument("--resume-from", metavar="FILE", help="go on from this checkpoint instead")
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="prepare the text, say what would be trained, and stop",
    )
    run.add_argument(
        "--overwrite", action="store_true", help="start anew over an existing run of that name"
    )
    return parser


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


def check_settings(config, path):
    """Refuse settings of a checkpoint that the command line would not take.

    Raises:
        UserError: naming the first of them.
    """
    for action in train_parser("", "")._actions:
        if action.dest in config and not _is_acceptable(action, config[action.dest]):
            raise UserError(f"{path} has a {action.dest} that no run has: use another checkpoint")
    c = DEFAULTS | config
    tokens = c["batch_size"] * c["block_size"]
    if tokens > MOST_TOKENS or tokens * c["gradient_accumulation_steps"] > MOST_TOKENS_A_STEP:
        raise UserError(f"{path} trains on {tokens:,} tokens at once: use another checkpoint")


def _is_acceptable(action, value):
    if value is None:
        return action.dest not in DEFAULTS
    if isinstance(value, int) and abs(value) >= MOST[action.dest]:
        return False
    if isinstance(action, argparse.BooleanOptionalAction):
        return type(value) is bool
    if type(value) not in (int, float, str) or len(str(value)) > LONGEST_SETTING:
        return False
    try:
        parsed = (action.type or str)(str(value))
    except argparse.ArgumentTypeError:
        return False
    return parsed == value and (action.choices is None or value in action.choices)


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


def warn_of_no_effect(args, config):
    """One warning for each given flag that this kind of model does not listen to."""
    given = [name for name in vars(args) if is_given(args, name)]
    if config["model"] == "vanilla":
        others = set(model_fields("ngt")) - set(model_fields("vanilla"))
        if "mlp_dim" not in given:  # they say how large the NGT is that it shall match
            others -= {"coord_dim", "head_coord_dim"}
        for name in set(given) & others:
            warn(f"--{name.replace('_', '-')} has no effect on --model vanilla")
        return
    if "pos" in given:
        warn("--pos has no effect on --model ngt, which knows time as a dimension of space")
    if config["use_rsqrt"] and config["law"] == "newton":
        warn("--use-rsqrt has no effect under --law newton")
    for name in {"exponent", "retardation", "farthest_time_scale"} & set(given):
        if config["law"] == "published":
            warn(f"--{name.replace('_', '-')} has no effect under --law published")


def choose_device(name):
    """The device that `--device` names.

    Raises:
        UsageError: where there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, AttributeError):
        raise UsageError(
            f"--device {name} is not available here: use --device cpu, or --device auto"
        ) from None
    return device
