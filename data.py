"""Corpora become token files, token files become batches.

A prepared corpus is a directory with `train.bin`, `valid.bin` (and `test.bin`): flat little-endian
uint16 ids (uint32 above 65,535), read by memory map, and `meta.json`, which names the tokenizer,
the source and their hashes. Batches are a pure function of (seed, step, micro-step).
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from corpora import find_corpus
from errors import UsageError, UserError
from tokenizer import (
    BPETokenizer,
    CharTokenizer,
    TiktokenTokenizer,
    load_bpe,
    tokenizer_from_vocab,
)

FORMAT_VERSION = 1
PIECE_CHARS = 1 << 16
EVAL_WINDOWS_PER_ITER = 16


@dataclass
class TokenData:
    """A prepared corpus: `train` and `valid` (and `test`) are memory maps of token ids."""

    directory: Path
    meta: dict
    tokenizer: object
    splits: dict

    @property
    def train(self):
        return self.splits["train"]

    @property
    def valid(self):
        return self.splits["valid"]

    @property
    def bytes_per_token(self):
        """UTF-8 bytes of the validation text a token, which turns nats into bits per byte."""
        split = self.meta["splits"]["valid"]
        return split["bytes"] / split["tokens"]


def prepare_data(
    dataset,
    data_path=None,
    tokenizer="char",
    bpe_vocab_size=8192,
    tokenizer_path=None,
    tiktoken_encoding="gpt2",
    say=print,
):
    """Find a corpus, train or load its tokenizer, and write or reuse its token files.

    Args:
        dataset: "shakespeare", "wikitext103" or "text".
        data_path: a file or directory of local text; see `corpora.find_corpus`.
        tokenizer: "char", "bpe" or "tiktoken".
        tokenizer_path: a BPE tokenizer file; trained and written where it does not exist.
        say: called with lines for the user.

    Returns:
        A `TokenData`.

    Raises:
        UserError: for everything that the user can put right.
    """
    corpus = find_corpus(dataset, data_path, say)
    given = texts = None
    if tokenizer == "bpe":
        if bpe_vocab_size < 256:
            raise UsageError(
                f"--bpe-vocab-size is {bpe_vocab_size}: give at least 256, a byte each"
            )
        key = f"bpe{bpe_vocab_size}"
        if tokenizer_path is not None:
            if not Path(tokenizer_path).exists():
                texts = corpus.read_splits()
                _train_tokenizer("bpe", texts["train"], bpe_vocab_size, say).save(tokenizer_path)
            given = load_bpe(tokenizer_path)
            key = f"bpe-{given.fingerprint[:10]}"
    elif tokenizer == "tiktoken":
        given = TiktokenTokenizer(tiktoken_encoding)
        key = f"tiktoken-{tiktoken_encoding}"
    else:
        key = "char"
    directory = Path("data") / "tokens" / f"{corpus.name}-{corpus.sha256[:12]}-{key}"
    if not (directory / "meta.json").exists():
        say(f"corpus: {corpus.description}")
        texts = texts or corpus.read_splits()
        trained = given or _train_tokenizer(tokenizer, texts["train"], bpe_vocab_size, say)
        _write_token_files(directory, corpus, texts, trained, say)
    return open_token_data(directory)


def _train_tokenizer(kind, text, bpe_vocab_size, say):
    if kind == "char":
        return CharTokenizer.train(text)
    say(f"training a BPE tokenizer of {bpe_vocab_size} tokens")
    return BPETokenizer.train(_pieces(text), bpe_vocab_size, show_progress=True)


def _pieces(text):
    """Cut at line ends into pieces of about `PIECE_CHARS`; the same text always cuts the same."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + PIECE_CHARS) + 1 or len(text)
        yield text[start:end]
        start = end


def _encode_pieces(tokenizer, text):
    """Yield (number of characters, ids) for one stretch of text after another."""
    if isinstance(tokenizer, CharTokenizer):
        for piece in _pieces(text):
            yield len(piece), tokenizer.encode_array(piece)
        return
    batch = []
    for piece in _pieces(text):
        batch.append(piece)
        if len(batch) == 32:
            yield sum(map(len, batch)), np.concatenate(_arrays(tokenizer, batch))
            batch = []
    if batch:
        yield sum(map(len, batch)), np.concatenate(_arrays(tokenizer, batch))


def _arrays(tokenizer, texts):
    return [np.asarray(ids, dtype=np.int64) for ids in tokenizer.encode_many(texts)]


def _write_token_files(directory, corpus, texts, tokenizer, say):
    """Write into a directory of another name, renamed once everything is on disk."""
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    partial = directory.with_name(f"{directory.name}.{os.getpid()}.partial")
    meta = {
        "format_version": FORMAT_VERSION,
        "dataset": corpus.name,
        "source": corpus.description,
        "source_sha256": corpus.sha256,
        "tokenizer_sha256": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype,
        "splits": {},
    }
    for split, text in texts.items():
        if not text:
            raise UserError(f"{corpus.description} is too short to have a {split} split: give more")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a killed run that had our number
        partial.mkdir(parents=True)
        for split, text in texts.items():
            count = 0
            with (
                open(partial / f"{split}.bin", "wb") as file,
                tqdm(total=len(text), desc=f"tokens {split}", unit="char", unit_scale=True) as bar,
            ):
                for length, ids in _encode_pieces(tokenizer, text):
                    ids.astype(dtype).tofile(file)
                    count += len(ids)
                    bar.update(length)
            meta["splits"][split] = {"tokens": count, "bytes": len(text.encode())}
        vocab = json.dumps(tokenizer.to_vocab(), ensure_ascii=False)
        (partial / "vocab.json").write_text(vocab, encoding="utf-8")
        (partial / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")
        if directory.exists():
            shutil.rmtree(directory)
        partial.rename(directory)
    except OSError as error:
        raise UserError(
            f"token files cannot be written to {directory}: {error.strerror or error}; "
            "free some space or start from a directory that you may write to"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    tokens = ", ".join(f"{name} {s['tokens']:,}" for name, s in meta["splits"].items())
    say(f"wrote {directory}: {tokens} tokens, vocabulary {tokenizer.vocab_size:,}")


def open_token_data(directory):
    """Open a prepared corpus.

    Raises:
        UserError: where a file is missing, damaged, or holds ids above the vocabulary.
    """
    directory = Path(directory)
    remedy = f"delete {directory} and it is made anew"
    try:
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        vocab = json.loads((directory / "vocab.json").read_text(encoding="utf-8"))
        tokenizer = _stored_tokenizer(vocab, directory, remedy)
        if meta["format_version"] != FORMAT_VERSION or not {"train", "valid"} <= {*meta["splits"]}:
            raise UserError(f"{directory}/meta.json is of another program or incomplete: {remedy}")
        if tokenizer.fingerprint != meta["tokenizer_sha256"]:
            raise UserError(f"{directory}/vocab.json is not the one that wrote it: {remedy}")
        dtype = np.dtype(meta["dtype"])
        splits = {}
        for name, split in meta["splits"].items():
            tokens = np.memmap(directory / f"{name}.bin", dtype=dtype, mode="r")
            if len(tokens) != split["tokens"]:
                raise UserError(f"{directory / name}.bin has {len(tokens)} tokens: {remedy}")
            if len(tokens) and int(tokens.max()) >= tokenizer.vocab_size:
                raise UserError(f"{directory / name}.bin has ids above the vocabulary: {remedy}")
            splits[name] = tokens
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{directory} is damaged ({error}): {remedy}") from None
    return TokenData(directory, meta, tokenizer, splits)


def _stored_tokenizer(vocab, directory, remedy):
    try:
        return tokenizer_from_vocab(vocab)
    except UserError as error:
        raise UserError(f"{directory}/vocab.json: {error}; or {remedy}") from None


def check_long_enough(tokens, block_size, split, data):
    """Raise `UserError` where a split is too short for a single block and its target."""
    if len(tokens) < block_size + 1:
        raise UserError(
            f"the {split} split of {data.meta['source']} has {len(tokens)} tokens, fewer than "
            f"--block-size {block_size} and one more: give more text or a smaller --block-size"
        )


def get_batch(tokens, batch_size, block_size, seed, step, micro_step=0):
    """A random training batch, the same for the same (seed, step, micro_step).

    Returns:
        inputs and targets, both (batch_size, block_size) int64.
    """
    rng = np.random.default_rng([seed, step, micro_step])
    starts = rng.integers(0, len(tokens) - block_size, size=batch_size)
    return _windows(tokens, starts, block_size)


def eval_windows(tokens, block_size, eval_iters):
    """Starts of the fixed evaluation windows: evenly spread, without overlap.

    At most `eval_iters * EVAL_WINDOWS_PER_ITER` of them, and never more than the split holds.
    """
    available = (len(tokens) - 1) // block_size
    count = min(available, eval_iters * EVAL_WINDOWS_PER_ITER)
    return np.arange(count) * available // count * block_size


def eval_batches(tokens, block_size, eval_iters, batch_size):
    """Yield the fixed evaluation windows, (<= batch_size, block_size) inputs and targets."""
    starts = eval_windows(tokens, block_size, eval_iters)
    for first in range(0, len(starts), batch_size):
        yield _windows(tokens, starts[first : first + batch_size], block_size)


def _windows(tokens, starts, block_size):
    index = np.asarray(starts)[:, None] + np.arange(block_size + 1)
    windows = torch.from_numpy(tokens[index].astype(np.int64))
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
