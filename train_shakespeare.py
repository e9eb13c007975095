"""Train a Newton Gravity Transformer, or the vanilla one it is compared with, on any text."""

import sys

from system.errors import run_script
from training.options import train_parser
from training.stop_request import ignore_requests_to_save

EXAMPLES = """examples:
  python train_shakespeare.py                               NGT on Shakespeare, minutes on a CPU
  python train_shakespeare.py --model vanilla               the baseline, a vanilla transformer
  python train_shakespeare.py --resume                      continue where it stopped
  python train_shakespeare.py --dataset text --data-path book.txt --checkpoint-path checkpoints/b.pt
  torchrun --nproc_per_node=2 train_shakespeare.py --batch-size 12      2 processes share each batch
"""


def main(argv=None):
    """Train; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    args = train_parser(__doc__, EXAMPLES).parse_args(words)
    ignore_requests_to_save()
    from training.ranks import joined  # PyTorch takes a second to import; --help does not wait
    from training.run import run

    with joined() as ranks:
        return run(args, ranks, words)


if __name__ == "__main__":
    run_script(main)
