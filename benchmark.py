"""Measure speed and memory: NGT against vanilla, interleaved in one process.

Every number is a median over rounds, after a warm-up, with the smallest and the largest beside it;
a ratio is the median of the rounds' own ratios. Above 1 NGT is the faster one.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmarks.attention import benchmark_attention
from benchmarks.decoding import benchmark_decode
from benchmarks.models import DTYPES, SHAPES
from benchmarks.reading import benchmark_data
from benchmarks.scaling import SHAPES as SCALED_SHAPES
from benchmarks.scaling import benchmark_scaling
from benchmarks.timing import describe_machine
from benchmarks.training import benchmark_train
from model import LAWS
from system.cli import choose_device, script_parser, whole, whole_or_zero
from system.errors import UsageError, run_script
from system.files import write_whole

EXAMPLES = """examples:
  python benchmark.py train --preset 25m --batch-size 4 --dtype bf16 --json train.json
  python benchmark.py train --preset 25m --batch-size 4 --law published --against first-release
  python benchmark.py attention --checkpoint checkpoints/text.pt_best.pt --block-sizes 512,8192
  python benchmark.py decode --contexts 256,16384 --chat-tokens 100000
  python benchmark.py data --data-path data/shakespeare/input.txt
  python benchmark.py scaling --checkpoint checkpoints/text.pt_best.pt --output reports/scaling.md
"""


def whole_list(text):
    """Whole numbers of at least 1, separated by commas."""
    return [whole(part) for part in text.split(",")]


def make_parser():
    """The parser of benchmark.py."""
    parser = script_parser(__doc__, EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, help, example):
        sub = commands.add_parser(
            name,
            help=help,
            description=help,
            epilog=f"example:\n  python benchmark.py {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--json", metavar="FILE", help="write the numbers here, too")
        sub.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
        sub.add_argument("--threads", type=whole, help="CPU threads (default: PyTorch's choice)")
        return sub

    def shape(sub):
        sub.add_argument(
            "--preset", choices=list(SHAPES), default="25m", help="model sizes (default: 25m)"
        )

    def precision(sub):
        sub.add_argument(
            "--dtype", choices=list(DTYPES), default="fp32", help="of products (default: fp32)"
        )

    train = command(
        "train",
        "tokens/s and peak memory of whole training steps: forward, backward, clip, AdamW",
        "train --preset 25m --batch-size 4 --dtype bf16",
    )
    shape(train)
    precision(train)
    train.add_argument("--batch-size", type=whole, help="windows a step (default: the preset's)")
    train.add_argument("--block-size", type=whole, help="tokens of one (default: the preset's)")
    train.add_argument("--compile", action="store_true", help="torch.compile both models")
    train.add_argument(
        "--model", choices=("both", "ngt", "vanilla"), default="both", help="(default: both)"
    )
    train.add_argument("--law", choices=LAWS, default="newton", help="NGT's (default: newton)")
    train.add_argument(
        "--against",
        choices=("vanilla", "first-release"),
        default="vanilla",
        help="what NGT is compared with; first-release: the published law computed as NGT's first "
        "release did, over a tensor of all coordinate differences (default: vanilla)",
    )
    train.add_argument("--steps", type=whole, default=10, help="timed steps each (default: 10)")
    train.add_argument("--peak-only", action="store_true", help=argparse.SUPPRESS)

    attention = command(
        "attention",
        "the operator alone against scaled_dot_product_attention, causal, values 64 wide",
        "attention --block-sizes 512,8192 --checkpoint checkpoints/text.pt_best.pt",
    )
    precision(attention)
    attention.add_argument("--batch-size", type=whole, default=1, help="(default: 1)")
    attention.add_argument(
        "--block-sizes",
        type=whole_list,
        default=[512, 1024, 2048, 4096, 8192],
        help="tokens (default: 512,1024,2048,4096,8192)",
    )
    attention.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="an NGT whose own points, masses and scales are used, on the text it learned from; "
        "what is skipped depends on them (default: a fresh 25m model on random tokens)",
    )
    attention.add_argument(
        "--text", metavar="FILE", help="text for --checkpoint instead of its own"
    )
    attention.add_argument("--steps", type=whole, default=5, help="rounds (default: 5)")

    decode = command(
        "decode",
        "tokens/s of one token after the other with the KV cache, at several contexts",
        "decode --contexts 256,16384",
    )
    shape(decode)
    precision(decode)
    decode.add_argument(
        "--contexts",
        type=whole_list,
        default=[256, 1024, 4096, 16384],
        help="tokens in the cache (default: 256,1024,4096,16384)",
    )
    decode.add_argument("--checkpoint", metavar="FILE", help="an NGT to use instead of a fresh one")
    decode.add_argument("--steps", type=whole, default=32, help="rounds (default: 32)")
    decode.add_argument(
        "--chat-tokens",
        type=whole_or_zero,
        default=0,
        help="then let NGT alone write so many tokens and watch its memory (default: 0)",
    )

    data = command(
        "data",
        "MB/s of tokenizing and of fetching batches",
        "data --data-path data/shakespeare/input.txt",
    )
    data.add_argument(
        "--data-path", metavar="FILE", help="text (default: this repository's own sources)"
    )
    data.add_argument(
        "--bpe-vocab-size", type=whole, default=1024, help="tokens to train (default: 1024)"
    )
    data.add_argument("--steps", type=whole, default=5, help="rounds (default: 5)")

    scaling = command(
        "scaling",
        "trainings of 1, 2, ... processes, and on paper from there to 64 GPUs, 1B and 1M tokens",
        "scaling --output reports/scaling.md",
    )
    add = scaling.add_argument
    add("--ranks", default="1,2", help="numbers of processes to measure (default: %(default)s)")
    add("--rounds", type=whole, default=3, help="runs of each, in turn (default: %(default)s)")
    add("--steps", type=whole, default=12, help="steps of a run (default: %(default)s)")
    add("--batch-size", type=whole, default=4, help="windows a step (default: %(default)s)")
    add(
        "--preset",
        choices=list(SCALED_SHAPES),
        default="25m",
        help="model sizes to measure (default: %(default)s)",
    )
    add(
        "--checkpoint",
        metavar="FILE",
        help="an NGT of the law newton whose windows say what far contexts cost (default: one "
        "that has learned nothing)",
    )
    add("--output", metavar="FILE", help="write the page here (default: print it)")
    return parser


COMMANDS = {
    "train": benchmark_train,
    "attention": benchmark_attention,
    "decode": benchmark_decode,
    "data": benchmark_data,
    "scaling": benchmark_scaling,
}


def main(argv=None):
    """Measure, print, and write JSON; returns the exit code."""
    args = make_parser().parse_args(argv)
    args.words = sys.argv[1:] if argv is None else argv
    device = choose_device(args.device)
    if args.json is not None and not Path(args.json).resolve().parent.is_dir():
        raise UsageError(f"--json {args.json}: there is no such folder, make it first")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if not getattr(args, "peak_only", False):
        print(describe_machine(device))
    numbers = COMMANDS[args.command](args, device)
    if args.json is not None:
        numbers |= {
            "machine": describe_machine(device),
            "settings": {
                k: v for k, v in vars(args).items() if k not in ("peak_only", "json", "words")
            },
        }
        write_whole(Path(args.json), (json.dumps(numbers, indent=2) + "\n").encode())
    return 0


if __name__ == "__main__":
    run_script(main)
