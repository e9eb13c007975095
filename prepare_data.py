"""Fetch a corpus, train its tokenizer and write token files, ahead of training."""

from system.cli import script_parser
from system.errors import run_script
from training.config import CORPUS, resolve
from training.options import add_corpus_flags

EXAMPLES = """examples:
  python prepare_data.py                                    WikiText-103, BPE of 8192 tokens
  python prepare_data.py --dataset wikitext103 --tokenizer bpe --bpe-vocab-size 8192
  python prepare_data.py --dataset shakespeare
  python prepare_data.py --dataset text --data-path books/ --tokenizer bpe --bpe-vocab-size 4096
"""


def main(argv=None):
    """Prepare the corpus; returns the exit code."""
    parser = script_parser(__doc__, EXAMPLES)
    add_corpus_flags(parser, default_dataset="wikitext103")
    args = parser.parse_args(argv)
    from text.preparation import check_tokenizer_file, prepare_data  # slow to import

    check_tokenizer_file(args.tokenizer_path, args.bpe_vocab_size)
    config = resolve(args)
    data = prepare_data(**{name: config[name] for name in CORPUS})
    print(f"ready: {data.meta['source']}")
    for name, split in data.meta["splits"].items():
        print(f"  {name:6} {split['tokens']:>12,} tokens  {split['bytes']:>12,} bytes")
    print(f"  in {data.directory}")
    return 0


if __name__ == "__main__":
    run_script(main)
