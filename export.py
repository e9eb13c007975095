"""Write a checkpoint in a form that other programs load, or read such a folder back.

safetensors: the weights and the config. huggingface: the same with the model's code and tokenizer,
for `AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`.
"""

from pathlib import Path

from system.cli import file_path, script_parser
from system.errors import run_script

EXAMPLES = """examples:
  python export.py --checkpoint-path checkpoints/b.pt_best.pt --output exported/weights
  python export.py --checkpoint-path checkpoints/b.pt --output exported/b --format huggingface
  python export.py --from exported/b --output checkpoints/again.pt
"""


def make_parser():
    """The parser of export.py."""
    parser = script_parser(__doc__, EXAMPLES)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--checkpoint-path",
        type=file_path,
        help="an NGT or a vanilla checkpoint; if it does not exist, the same path with _best.pt or "
        "_last.pt is read",
    )
    source.add_argument(
        "--from",
        dest="folder",
        type=file_path,
        metavar="DIR",
        help="a folder that this script wrote, to be made a checkpoint again",
    )
    parser.add_argument(
        "--output",
        type=file_path,
        required=True,
        help="the new folder, or with --from the new checkpoint; nothing is overwritten",
    )
    parser.add_argument(
        "--format",
        choices=("safetensors", "huggingface"),
        default="safetensors",
        help="the form of the folder (default: %(default)s)",
    )
    return parser


def main(argv=None):
    """Export or read back; returns the exit code."""
    args = make_parser().parse_args(argv)
    from engine.checkpoint import find_checkpoint  # PyTorch takes a second to import
    from engine.export import export, restore

    if args.folder is not None:
        restore(Path(args.folder), Path(args.output))
    else:
        export(find_checkpoint(args.checkpoint_path), Path(args.output), args.format)
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    run_script(main)
