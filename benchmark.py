"""Measure speed and memory of NGT against vanilla, in turn in one process.

Every number is a median over rounds after a warm-up, followed by the smallest and the largest; a
ratio is the median of the ratios of each round. If it is above 1, NGT is faster. On a GPU its own
events are the clock, around several calls in a row.
"""

import argparse
import sys

from benchmarks import flags
from system.cli import choose_device, file_path, script_parser, thread_count
from system.errors import run_script
from system.threads import HELP as THREADS_HELP

EXAMPLES = """examples:
  python benchmark.py train --preset 25m --batch-size 4 --dtype bf16 --json train.json
  python benchmark.py train --preset 25m --batch-size 4 --law published --against first-release
  python benchmark.py train --preset shakespeare --against vanilla eager compiled
  python benchmark.py attention --checkpoint checkpoints/text.pt_best.pt --block-sizes 512,8192
  python benchmark.py decode --contexts 256,16384 --chat-tokens 100000
  python benchmark.py data --data-path data/shakespeare/input.txt
  python benchmark.py scaling --checkpoint checkpoints/text.pt_best.pt --output reports/scaling.md
"""
# for each command the function that adds its flags, its help, an example
COMMANDS = {
    "train": (
        flags.add_train_flags,
        "tokens/s and peak memory of whole training steps: forward, backward, clip, AdamW",
        "train --preset 25m --batch-size 4 --dtype bf16",
    ),
    "attention": (
        flags.add_attention_flags,
        "the operator alone against scaled_dot_product_attention, causal, values 64 wide",
        "attention --block-sizes 512,8192 --checkpoint checkpoints/text.pt_best.pt",
    ),
    "correctness": (
        flags.add_correctness_flags,
        "errors of the operator against the formula in float64, on the shapes of a training",
        "correctness --jobs 4 --json results.jsonl",
    ),
    "decode": (
        flags.add_decode_flags,
        "tokens/s of generation token by token with the KV cache, after several contexts",
        "decode --contexts 256,16384",
    ),
    "data": (
        flags.add_data_flags,
        "MB/s of tokenizing and of fetching batches",
        "data --data-path data/shakespeare/input.txt",
    ),
    "scaling": (
        flags.add_scaling_flags,
        "speed of 1, 2, ... processes, and formulas for 64 GPUs, 1B parameters and 1M tokens",
        "scaling --output reports/scaling.md",
    ),
}


def make_parser():
    """The parser of benchmark.py, with a subparser for each command."""
    parser = script_parser(__doc__, EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add_flags, help, example) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=help,
            description=help,
            epilog=f"example:\n  python benchmark.py {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add = command.add_argument
        add(
            "--json",
            type=file_path,
            metavar="FILE",
            help="also write the numbers to this file; to a .jsonl file the rows of train, "
            "attention and correctness are appended as soon as they are known",
        )
        add("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
        add("--threads", type=thread_count, help=THREADS_HELP)
        add_flags(command)
    return parser


def main(argv=None):
    """Measure, print, and write JSON; returns the exit code."""
    args = make_parser().parse_args(argv)
    args.words = sys.argv[1:] if argv is None else argv  # for the pages and lines that name them
    # these import PyTorch, which takes a second: --help and a wrong flag do not wait for it
    import torch

    from benchmarks import attention, correctness, decoding, reading, scaling, training
    from benchmarks.results import Results
    from benchmarks.timing import describe_machine
    from gravity.trial import computes

    measure = {
        "train": training.benchmark_train,
        "attention": attention.benchmark_attention,
        "correctness": correctness.benchmark_correctness,
        "decode": decoding.benchmark_decode,
        "data": reading.benchmark_data,
        "scaling": scaling.benchmark_scaling,
    }[args.command]
    device = choose_device(args.device, computes)
    args.results = Results(args, device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if not getattr(args, "peak_only", False):  # its parent process reads one line of JSON
        print(describe_machine(device))
    args.results.whole(measure(args, device))
    return 0


if __name__ == "__main__":
    run_script(main)
