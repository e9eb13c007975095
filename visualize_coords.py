"""Draw what a checkpoint does with a text: what pulls each token, and what comes next.

Writes one self-contained HTML page: the sources of a token at their distances, the way of all
tokens through the layers in 3-D, what each head looks at, the masses, and what the model expects
next. A vanilla transformer has attention weights in place of pulls, and no places and masses.
"""

from pathlib import Path

from system.cli import choose_device, file_path, script_parser, whole, whole_or_zero
from system.errors import UsageError, run_script

EXAMPLES = """examples:
  python visualize_coords.py --checkpoint-path checkpoints/shakespeare.pt_best.pt
  python visualize_coords.py --text "To be, or not to be, that is the question" --output be.html
  python visualize_coords.py --split train --offset 1000 --num-tokens 512 --method tsne
  python visualize_coords.py --compare checkpoints/other.pt_best.pt --output two.html
  python visualize_coords.py --layer 0 --png first.png --heads-png heads.png
"""
MAX_TOKENS = 1 << 16  # the page then has more than a hundred megabytes


def make_parser():
    parser = script_parser(__doc__, EXAMPLES)
    add = parser.add_argument
    add(
        "--checkpoint-path",
        type=file_path,
        default="checkpoints/shakespeare.pt_best.pt",
        help="of an NGT or a vanilla transformer; if it does not exist, the same path with "
        "_best.pt or _last.pt is read (default: %(default)s)",
    )
    add(
        "--compare",
        type=file_path,
        metavar="CHECKPOINT",
        help="a second checkpoint of either kind, shown beside it under the same text",
    )
    add(
        "--output",
        type=file_path,
        default="coords.html",
        help="the page to write (default: %(default)s)",
    )
    add(
        "--png",
        type=file_path,
        metavar="FILE",
        help="also write a still of the map, which only an NGT has (default: none)",
    )
    add(
        "--heads-png",
        type=file_path,
        metavar="FILE",
        help="also write each head's field by distance (default: none)",
    )
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", help="the text to show (default: that of --split)")
    text.add_argument("--text-file", type=file_path, help="a UTF-8 file with the text to show")
    text.add_argument(
        "--split",
        choices=("train", "valid"),
        help="the part of the checkpoint's own text to show (default: valid)",
    )
    add(
        "--offset",
        type=whole_or_zero,
        default=0,
        help="skip this many tokens at the start of the text (default: %(default)s)",
    )
    add(
        "--num-tokens",
        type=whole,
        default=256,
        help="show at most this many (default: %(default)s)",
    )
    add(
        "--method",
        choices=("pca", "tsne"),
        default="pca",
        help="how coordinates are projected to 3-D, all layers together (default: %(default)s)",
    )
    add(
        "--layer",
        type=whole_or_zero,
        help="the layer at which the page opens and that the still shows; 0: before the first "
        "(default: the page where one head pulls strongly, the still the last)",
    )
    add("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    return parser


def check_files(args):
    """Raise `UsageError` if a file would be both read and written, or written twice."""
    taken = {
        Path(path).resolve()
        for path in (args.checkpoint_path, args.compare, args.text_file)
        if path
    }
    for flag in ("output", "png", "heads_png"):
        path = getattr(args, flag)
        if path is None:
            continue
        if Path(path).resolve() in taken:
            raise UsageError(
                f"--{flag.replace('_', '-')} {path} is another flag's file: name another"
            )
        taken.add(Path(path).resolve())


def main(argv=None):
    """Write the page and the stills; returns the exit code."""
    args = make_parser().parse_args(argv)
    if args.num_tokens > MAX_TOKENS:
        raise UsageError(f"--num-tokens {args.num_tokens}: a map shows at most {MAX_TOKENS:,}")
    from coords.draw import draw_map  # PyTorch takes a second to import; --help does not wait
    from engine.checkpoint import find_checkpoint
    from gravity.trial import computes

    args.checkpoint_path = find_checkpoint(args.checkpoint_path)
    args.compare = args.compare and find_checkpoint(args.compare)
    check_files(args)
    draw_map(args, choose_device(args.device, computes))
    return 0


if __name__ == "__main__":
    run_script(main)
