"""Token files: written piece by piece, continued after an interruption, read by memory map.

A prepared corpus is a directory with `train.bin`, `valid.bin` (and `test.bin`): flat little-endian
uint16 ids (uint32 above 65,535), with `vocab.json`, the tokenizer, and `meta.json`, which has
the sizes and the hashes of tokenizer and source. A very large split is in shards, `train-00000.bin`
and so on, whose sizes and hashes meta.json lists. The directory's name ends in `.partial` until it
is complete.
"""

import itertools
import json
import shutil
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from system.errors import UserError
from system.files import write_whole
from system.safe_text import one_line
from text import shards
from text.shards import TokenFilesError
from text.stream import PIECE_CHARS, byte_bar, pieces, say_what_changed
from text.tokenizer import tokenizer_from_vocab

FORMAT_VERSION = 1
BATCH_PIECES = 32
BATCH_CHARS = BATCH_PIECES * PIECE_CHARS  # pieces of long lines are larger: Ctrl-C must not wait
NOTE_SECONDS = 5.0  # between notes of the progress on disk
DTYPES = ("<u2", "<u4")
COUNTS = ("pieces", "tokens", "bytes", "encoded_bytes")


class TextMissing(UserError):
    """The text that a checkpoint was trained on is not on this machine."""


@dataclass
class TokenData:
    """A prepared corpus: `train` and `valid` (and `test`) are token ids, read by memory map."""

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
        """UTF-8 bytes per token of the validation text, which turn nats into bits per byte."""
        split = self.meta["splits"]["valid"]
        return split["bytes"] / split["tokens"]


def open_token_data(directory):
    """Open a prepared corpus.

    Raises:
        TokenFilesError: if a file is missing, damaged, or holds ids above the vocabulary.
    """
    directory = Path(directory)
    try:
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        vocab = json.loads((directory / "vocab.json").read_text(encoding="utf-8"))
        tokenizer = tokenizer_from_vocab(vocab)
        are_splits = {"train", "valid"} <= {*meta["splits"]} <= {"train", "valid", "test"}
        is_ours = meta["format_version"] == FORMAT_VERSION and meta["dtype"] in DTYPES
        is_ours = is_ours and all(type(meta[key]) is str for key in ("source", "source_sha256"))
        if not (is_ours and are_splits):
            raise TokenFilesError(f"{directory}/meta.json is of another program", directory)
        if tokenizer.fingerprint != meta["tokenizer_sha256"]:
            raise TokenFilesError(f"{directory}/vocab.json is not what encoded it", directory)
        dtype = np.dtype(meta["dtype"])
        splits = {}
        for name, split in meta["splits"].items():
            counts = [split[key] for key in ("tokens", "bytes")]
            if not all(type(count) is int and 0 < count < 1 << 62 for count in counts):
                raise TokenFilesError(f"{directory}/meta.json has impossible counts", directory)
            splits[name] = shards.open_split(directory, name, split, dtype, tokenizer.vocab_size)
    except TokenFilesError:
        raise
    except UserError as error:
        raise TokenFilesError(f"{directory}/vocab.json: {error}", directory) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TokenFilesError(f"{directory} is damaged ({error})", directory) from None
    meta["source"] = one_line(meta["source"])  # a stranger's text, which will be printed
    return TokenData(directory, meta, tokenizer, splits)


def data_of_checkpoint(checkpoint, tokenizer, remedy):
    """The `TokenData` of the text that a checkpoint was trained on.

    Args:
        checkpoint, tokenizer: as `engine.checkpoint.load_model` returns them.
        remedy: what the user can do if the text is missing, for the error message.

    Raises:
        TextMissing: if it is not on this machine.
        UserError: if it is damaged, or was encoded by another tokenizer.
    """
    directory = checkpoint["config"].get("token_directory")
    if not directory or not Path(directory).is_dir():
        raise TextMissing(
            f"the text that this checkpoint was trained on is not at {directory or '?'}: {remedy}"
        )
    data = open_token_data(directory)
    if data.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(f"{directory} has another tokenizer than this checkpoint: {remedy}")
    return data


def write_token_files(directory, corpus, make_tokenizer, say):
    """Encode a corpus into `directory`; continues where an interrupted call stopped.

    Args:
        make_tokenizer: called with {split: UTF-8 bytes} unless an interrupted call left one.
        say: called with lines for the user.

    Raises:
        UserError: if the text is unusable or the disk is full; nothing is left behind then.
    """
    partial = directory.with_name(f"{directory.name}.partial")
    try:
        progress = _Progress(partial, corpus)
        if progress.tokenizer is None:
            sizes = split_sizes(corpus)
            progress.begin(sizes, make_tokenizer(sizes), corpus.changed)
        elif progress.tokens():
            say(f"continuing {partial}, which has {progress.tokens():,} tokens already")
        for split, reader in corpus.readers.items():
            _encode_split(progress, split, reader)
        meta = {
            "format_version": FORMAT_VERSION,
            "dataset": corpus.name,
            "source": corpus.description,
            "source_sha256": corpus.sha256,
            "source_bytes": corpus.source_bytes,
            "tokenizer_sha256": progress.tokenizer.fingerprint,
            "vocab_size": progress.tokenizer.vocab_size,
            "dtype": progress.dtype.str,
            "text_changes": progress.text_changes,  # missing in older files, which changed nothing
            "splits": {
                name: {"tokens": split["tokens"], "bytes": split["bytes"]}
                | shards.finish_split(partial, name, split["tokens"])
                for name, split in progress.splits.items()
            },
        }
        (partial / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")
        if directory.exists():
            shutil.rmtree(directory)
        # the rename is what makes the corpus complete for other processes
        partial.rename(directory)
        (directory / "progress.json").unlink()
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"token files cannot be written to {directory}: {error.strerror or error}; "
            "free some space or start from a directory that you may write to"
        ) from None
    except UserError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    tokens = ", ".join(f"{name} {s['tokens']:,}" for name, s in meta["splits"].items())
    say_what_changed(corpus.description, progress.text_changes, say)
    say(f"wrote {directory}: {tokens} tokens, vocabulary {progress.tokenizer.vocab_size:,}")


def split_sizes(corpus):
    """UTF-8 bytes of every split; reading all of it finds damage before anything is written.

    Raises:
        UserError: as the readers, or if a split has no text.
    """
    for split, reader in corpus.readers.items():
        if split not in corpus.sizes:
            with byte_bar(f"reading {split}") as bar:
                for block in reader():
                    bar.update(len(block.encode()))
            if not bar.n:
                raise UserError(
                    f"{corpus.description} is too short to have a {split} split: give more"
                )
            corpus.sizes[split] = bar.n
    return dict(corpus.sizes)


class _Progress:
    """The progress of the encoding in a `.partial` directory, as far as it is safely on disk."""

    def __init__(self, directory, corpus):
        self.directory = directory
        self.source = {
            "format_version": FORMAT_VERSION,
            "source_sha256": corpus.sha256,
            "source_bytes": corpus.source_bytes,
            "piece_chars": PIECE_CHARS,
            "line_ends": "LF",  # older versions kept those of the source
            "shard_tokens": shards.SHARD_TOKENS,
        }
        self.tokenizer, self.splits, self.text_changes = None, {}, []
        try:
            noted = json.loads((directory / "progress.json").read_text(encoding="utf-8"))
            vocab = json.loads((directory / "vocab.json").read_text(encoding="utf-8"))
            is_same = noted["splits"].keys() == corpus.readers.keys()
            counts = [split[key] for split in noted["splits"].values() for key in COUNTS]
            are_counts = all(type(count) is int and count >= 0 for count in counts)
            if noted["source"] == self.source and is_same and are_counts:
                self.text_changes = [str(change) for change in noted["text_changes"]]
                self.tokenizer, self.splits = tokenizer_from_vocab(vocab), noted["splits"]
        except (OSError, LookupError, ValueError, TypeError, AttributeError, RecursionError):
            pass  # nothing to continue: the encoding starts from the beginning
        except UserError:  # the tokenizer is damaged
            pass

    @property
    def dtype(self):
        return np.dtype("<u2" if self.tokenizer.vocab_size <= 1 << 16 else "<u4")

    def begin(self, sizes, tokenizer, changed):
        """Empty the directory and save the tokenizer, so that it is trained only once."""
        self.tokenizer, self.text_changes = tokenizer, sorted(changed)
        self.splits = {s: dict.fromkeys(COUNTS, 0) | {"bytes": n} for s, n in sizes.items()}
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)
        vocab = json.dumps(tokenizer.to_vocab(), ensure_ascii=False)
        (self.directory / "vocab.json").write_text(vocab, encoding="utf-8")
        self.note()

    def tokens(self):
        """How many tokens are encoded so far."""
        return sum(split["tokens"] for split in self.splits.values())

    def note(self):
        """Write the progress to disk."""
        noted = {
            "source": self.source,
            "splits": self.splits,
            "text_changes": self.text_changes,
        }
        write_whole(self.directory / "progress.json", json.dumps(noted).encode())


def _encode_split(progress, split, reader):
    """Append the rest of a split to its token file, noting the progress every few seconds."""
    done = progress.splits[split]
    if done["encoded_bytes"] == done["bytes"]:
        return
    if not shards.are_written(progress.directory, split, progress.dtype, done["tokens"]):
        done.update(pieces=0, tokens=0, encoded_bytes=0)
    # what a crash lost after the last note is encoded again, what it added is cut off
    writer = shards.ShardWriter(progress.directory, split, progress.dtype, done["tokens"])
    todo = itertools.islice(pieces(reader()), done["pieces"], None)
    noted = time.monotonic()
    with byte_bar(f"encoding {split}", done["bytes"], done["encoded_bytes"]) as bar:
        for batch, ids in _encoded(progress.tokenizer, todo):
            writer.write(ids)
            size = sum(len(piece.encode()) for piece in batch)
            bar.update(size)
            done["pieces"] += len(batch)
            done["tokens"] += len(ids)
            done["encoded_bytes"] += size
            if time.monotonic() - noted > NOTE_SECONDS:
                writer.to_disk()
                progress.note()
                noted = time.monotonic()
    writer.to_disk()
    if done["encoded_bytes"] != done["bytes"]:
        raise UserError(f"the {split} text changed while it was encoded: call again")
    progress.note()


def _next_batch(texts):
    """The next texts of an iterator, at most BATCH_PIECES and about BATCH_CHARS."""
    batch, characters = [], 0
    while len(batch) < BATCH_PIECES and characters < BATCH_CHARS:
        text = next(texts, None)
        if text is None:
            break
        batch.append(text)
        characters += len(text)
    return batch


def _encoded(tokenizer, texts):
    """Yield (batch of texts, ids); the next batches are encoded while one is written."""
    workers, coming = ThreadPoolExecutor(2), deque()
    try:
        while batch := _next_batch(texts):
            coming.append((batch, workers.submit(tokenizer.encode_array, batch)))
            if len(coming) > 2:  # more would only take memory
                batch, ids = coming.popleft()
                yield batch, ids.result()
        for batch, ids in coming:
            yield batch, ids.result()
    finally:
        workers.shutdown(cancel_futures=True)
