"""Times tokenizing and fetching batches: `benchmark.py data`."""

import statistics
import tempfile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from benchmarks.preparing import benchmark_preparing
from benchmarks.timing import interleaved, spread
from data import get_batch
from text.corpora import Corpus
from text.stream import pieces, read_text
from text.token_files import BATCH_PIECES, write_token_files
from text.tokenizer import BPETokenizer, CharTokenizer

ROOT = Path(__file__).resolve().parent.parent
BATCHES = (20, 16, 512)  # batches per round, windows per batch, tokens per window


def benchmark_data(args, device):
    """Time the tokenizers and the fetching of batches in turn, and print their speeds.

    Returns:
        A dict for JSON.

    Raises:
        UserError: if --data-path cannot be read or is empty.
    """
    if args.gigabytes is not None:
        return benchmark_preparing(args)
    source, text = text_of(args.data_path)
    megabytes = len(text.encode()) / 1e6
    parts = list(pieces([text]))
    bpe = BPETokenizer.train(parts, args.bpe_vocab_size)
    seconds = interleaved(functions_to_time(source, parts, bpe), args.steps, device, "reading")
    numbers = {"source": source, "megabytes": megabytes}
    count, batch, block = BATCHES
    print(
        f"text: {source}, {megabytes:.2f} MB; bpe: {bpe.vocab_size} tokens, into token "
        f"files, beside the library's own encode_batch; batches of {batch} x {block} uint16 tokens"
    )
    for name, elapsed in seconds.items():
        size = count * batch * block * 2 / 1e6 if name == "batches" else megabytes
        speeds = [size / s for s in elapsed]
        numbers[f"{name}_mb_per_s"] = statistics.median(speeds)
        print(f"{name:<12} {spread(speeds, 1)} MB/s")
    return numbers


def text_of(path):
    """`(name, text)` of a file, or of this repository's Python files if `path` is None."""
    if path is None:
        files = sorted([*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")])
        text = "\n".join(file.read_text(encoding="utf-8") for file in files)
        return "the sources of this repository", text
    return path, read_text(path, "--data-path")


def functions_to_time(source, parts, bpe):
    """What is timed: callables without arguments, by name.

    Args:
        source: the name of the text.
        parts: the text in pieces, as the preparation of a corpus reads it.
        bpe: a trained BPE tokenizer.
    """
    char = CharTokenizer.train(parts)
    # for comparison: the library alone, without our token files
    library = Tokenizer.from_str(bpe.to_vocab()["tokenizer_json"])
    corpus = Corpus("text", source, "", 0, {"train": lambda: iter(parts)})
    tokens = np.random.default_rng(0).integers(0, 8192, 10**6).astype(np.uint16)
    count, batch, block = BATCHES

    def encode_batch():
        for start in range(0, len(parts), BATCH_PIECES):
            library.encode_batch(parts[start : start + BATCH_PIECES])

    def token_files():
        with tempfile.TemporaryDirectory() as folder:
            write_token_files(Path(folder) / "tokens", corpus, lambda sizes: bpe, lambda line: None)

    return {
        "char": lambda: char.encode_array(parts),
        "encode_batch": encode_batch,
        "bpe": token_files,
        "batches": lambda: [get_batch(tokens, batch, block, 0, step) for step in range(count)],
    }
