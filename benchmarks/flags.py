"""The flags of benchmark.py's commands, without PyTorch, so that --help answers at once."""

import argparse

from layers.config import LAWS
from system.cli import file_path, positive, whole, whole_list, whole_or_zero
from system.settings import add_flag
from training.config import LAW_DEFAULTS, SETTINGS

TIMED_PRESETS = {  # --preset: the preset of training, and the vocabulary size of its text
    "shakespeare": ("shakespeare", 66),
    "text": ("text", 2048),
    "25m": ("wikitext103", 8192),
}
PLAIN = ("eager", "compiled")  # of --against: a plain GPT-2
LAW_SETTINGS = ("background", "use_radius_cutoff")


def add_preset_flag(parser):
    parser.add_argument(
        "--preset", choices=list(TIMED_PRESETS), default="25m", help="model sizes (default: 25m)"
    )


def add_dtype_flag(parser):
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16"),
        default="fp32",
        help="precision of matrix products (default: fp32)",
    )


def add_law_flags(parser):
    """Add the flags of training that shape the law of a fresh NGT; `law_given` reads them."""
    for name in LAW_SETTINGS:
        default = "on" if LAW_DEFAULTS["newton"][name] else "off"
        help = f"of a fresh NGT: {SETTINGS[name].metadata['help']} (default: {default})"
        add_flag(parser, SETTINGS[name], help)


def law_given(args):
    """The settings that `add_law_flags` read, as a dict of those that were given."""
    return {name: value for name in LAW_SETTINGS if (value := getattr(args, name)) is not None}


def add_train_flags(parser):
    """Add the flags of `benchmark.py train`."""
    add_preset_flag(parser)
    add_dtype_flag(parser)
    add = parser.add_argument
    add("--batch-size", type=whole, help="windows per step (default: the preset's)")
    add("--block-size", type=whole, help="tokens per window (default: the preset's)")
    add("--compile", action="store_true", help="torch.compile both models")
    add(
        "--model",
        choices=("both", "ngt", "vanilla"),
        default="both",
        help="models to train (default: both)",
    )
    add("--law", choices=LAWS, default="newton", help="law of NGT (default: newton)")
    add_law_flags(parser)
    add(
        "--against",
        nargs="+",
        choices=("vanilla", *PLAIN, "first-release"),
        default=["vanilla"],
        help="what NGT is compared with, one or several; eager, compiled: a plain GPT-2 with as "
        "many parameters, trained as nanoGPT does, without and with torch.compile; first-release: "
        "the published law, computed as in NGT's first release from a tensor of all coordinate "
        "differences (default: vanilla)",
    )
    add("--steps", type=whole, default=10, help="timed steps of each model (default: 10)")
    add("--no-peak", action="store_true", help="do not start a process per model for its peak")
    add(
        "--profile",
        action="store_true",
        help="also print which operations a step of each model spends its time in",
    )
    add("--peak-only", metavar="MODEL", help=argparse.SUPPRESS)  # for child_peak


def add_attention_flags(parser):
    """Add the flags of `benchmark.py attention`."""
    add_dtype_flag(parser)
    add_law_flags(parser)
    add = parser.add_argument
    add("--batch-size", type=whole, default=1, help="sequences per batch (default: 1)")
    add(
        "--batch-tokens",
        type=whole,
        help="at each block size as many sequences as make this many tokens, at least one "
        "(default: --batch-size sequences)",
    )
    add(
        "--block-sizes",
        type=whole_list,
        default=[512, 1024, 2048, 4096, 8192],
        help="tokens per sequence, separated by commas (default: 512,1024,2048,4096,8192)",
    )
    add(
        "--checkpoint",
        type=file_path,
        metavar="FILE",
        help="an NGT whose points, masses and scales are used, on its validation text; what the "
        "operator skips depends on them (default: a fresh 25m model on random tokens)",
    )
    add("--text", type=file_path, metavar="FILE", help="use this text instead of the checkpoint's")
    add("--steps", type=whole, default=5, help="timed rounds (default: 5)")


def add_correctness_flags(parser):
    """Add the flags of `benchmark.py correctness`."""
    add = parser.add_argument
    add("--batch-size", type=whole, default=16, help="sequences per batch (default: 16)")
    add("--block-size", type=whole, default=512, help="tokens per sequence (default: 512)")
    add("--longest", type=whole, default=8192, help="tokens of the long case (default: 8192)")
    add(
        "--jobs",
        type=whole,
        default=1,
        help="cases at the same time, each in a new process, because compiling the kernels is what "
        "takes long (default: 1, in this process)",
    )


def add_decode_flags(parser):
    """Add the flags of `benchmark.py decode`."""
    add_preset_flag(parser)
    add_dtype_flag(parser)
    add_law_flags(parser)
    add = parser.add_argument
    add(
        "--contexts",
        type=whole_list,
        default=[256, 1024, 4096, 16384],
        help="tokens in the cache, separated by commas (default: 256,1024,4096,16384)",
    )
    add("--checkpoint", type=file_path, metavar="FILE", help="an NGT to use (default: a fresh one)")
    add("--steps", type=whole, default=32, help="timed rounds (default: 32)")
    add(
        "--chat-tokens",
        type=whole_or_zero,
        default=0,
        help="then generate this many tokens with NGT and print its memory (default: 0)",
    )


def add_data_flags(parser):
    """Add the flags of `benchmark.py data`."""
    add = parser.add_argument
    add(
        "--data-path",
        type=file_path,
        metavar="FILE",
        help="text file (default: this repository's own sources)",
    )
    add("--bpe-vocab-size", type=whole, default=1024, help="vocabulary of the BPE (default: 1024)")
    add("--steps", type=whole, default=5, help="timed rounds (default: 5)")
    add(
        "--gigabytes",
        type=positive,
        metavar="GB",
        help="instead, write FILE again and again, changed, into a temporary folder of 200 files "
        "of so many GB, prepare it, and print memory and speed over time (default: off)",
    )


def add_scaling_flags(parser):
    """Add the flags of `benchmark.py scaling`."""
    add = parser.add_argument
    add(
        "--ranks",
        type=whole_list,
        default=[1, 2],
        help="numbers of processes, separated by commas (default: 1,2)",
    )
    add("--rounds", type=whole, default=3, help="runs of each number (default: %(default)s)")
    add("--steps", type=whole, default=12, help="steps per run (default: %(default)s)")
    add("--batch-size", type=whole, default=4, help="windows per step (default: %(default)s)")
    add(
        "--preset",
        choices=sorted(TIMED_PRESETS),
        default="25m",
        help="model sizes (default: %(default)s)",
    )
    add(
        "--checkpoint",
        type=file_path,
        metavar="FILE",
        help="an NGT of --law newton, whose windows give the cost of long contexts (default: an "
        "untrained one)",
    )
    add(
        "--output",
        type=file_path,
        metavar="FILE",
        help="write the page to this file (default: print it)",
    )
