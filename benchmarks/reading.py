"""Speed of tokenizers and batches."""

import statistics
import tempfile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from benchmarks.timing import interleaved, spread
from data import get_batch
from system.cli import whole
from system.errors import UserError
from text.corpora import Corpus
from text.stream import pieces
from text.token_files import BATCH_PIECES, write_token_files
from text.tokenizer import BPETokenizer, CharTokenizer


def add_flags(parser):
    """Add the flags of `benchmark.py data`."""
    add = parser.add_argument
    add("--data-path", metavar="FILE", help="text (default: this repository's own sources)")
    add("--bpe-vocab-size", type=whole, default=1024, help="tokens to train (default: 1024)")
    add("--steps", type=whole, default=5, help="rounds (default: 5)")


def benchmark_data(args, device):
    if args.data_path:
        source = args.data_path
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--data-path {source} cannot be read: {error}") from None
    else:
        source = "the sources of this repository"
        root = Path(__file__).resolve().parent.parent
        files = sorted([*root.glob("*.py"), *root.glob("[a-z]*/*.py")])
        text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    if not text:
        raise UserError(f"--data-path {source} is empty: name a file with text")
    megabytes = len(text.encode()) / 1e6
    parts = list(pieces([text]))
    char, bpe = CharTokenizer.train(parts), BPETokenizer.train(parts, args.bpe_vocab_size)
    library = Tokenizer.from_str(bpe.to_vocab()["tokenizer_json"])
    corpus = Corpus("text", str(source), "", 0, {"train": lambda: iter(parts)})
    tokens = np.random.default_rng(0).integers(0, 8192, 10**6).astype(np.uint16)

    def encode_batch():
        for start in range(0, len(parts), BATCH_PIECES):
            library.encode_batch(parts[start : start + BATCH_PIECES])

    def token_files():
        with tempfile.TemporaryDirectory() as folder:
            write_token_files(Path(folder) / "tokens", corpus, lambda sizes: bpe, lambda line: None)

    functions = {
        "char": lambda: char.encode_array(parts),
        "encode_batch": encode_batch,
        "bpe": token_files,
        "batches": lambda: [get_batch(tokens, 16, 512, 0, step) for step in range(20)],
    }
    size = dict.fromkeys(functions, megabytes) | {"batches": 20 * 16 * 512 * 2 / 1e6}
    seconds = interleaved(functions, args.steps, device, "reading")
    numbers = {"source": str(source), "megabytes": megabytes}
    print(
        f"text: {source}, {megabytes:.2f} MB; bpe: {bpe.vocab_size} tokens, into token "
        "files, beside the library's own encode_batch; batches of 16 x 512 uint16 tokens"
    )
    for name, elapsed in seconds.items():
        speeds = [size[name] / s for s in elapsed]
        numbers[f"{name}_mb_per_s"] = statistics.median(speeds)
        print(f"{name:<12} {spread(speeds, 1)} MB/s")
    return numbers
