"""The command line of training: flags, presets, and which value wins.

Every flag's argparse default is None, so that "not given" can be told from "given": what the user
gives wins over the checkpoint being resumed, that over the preset of the dataset, that over the
common default.
"""

import argparse
from collections import defaultdict

from engine.models import MODELS, model_fields
from model import LAWS
from system.cli import (
    not_negative,
    positive,
    random_seed,
    script_parser,
    share,
    whole,
    whole_or_zero,
)
from system.errors import UserError, warn
from training.config import DEFAULTS, PRESETS, is_given
from vanilla_model import POSITIONS

MOST_TOKENS = 1 << 28  # a micro-step that a checkpoint may ask for
MOST_TOKENS_A_STEP = 1 << 33
MOST = defaultdict(lambda: 1 << 31, seed=1 << 63, sample_tokens=100_000)  # of whole numbers
LONGEST_SETTING = 4096


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
