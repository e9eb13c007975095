"""From a corpus to its token files; of several processes only one makes them."""

import contextlib
import itertools
import json
import threading
from concurrent.futures import Future, wait
from pathlib import Path

from filelock import FileLock, Timeout

from system.errors import UsageError, UserError, warn
from text.corpora import find_corpus
from text.stream import byte_bar, pieces, plain_text
from text.token_files import (
    TokenFilesError,
    open_token_data,
    split_sizes,
    write_token_files,
)
from text.tokenizer import BPETokenizer, CharTokenizer, TiktokenTokenizer, load_bpe

TOKENS = Path("data") / "tokens"
LOCKS = Path("data") / "locks"
LOOKED_AT = 1 << 16  # tokens, whose text is looked at
SECONDS_BETWEEN_SIGNS = 0.5  # of life, while a tokenizer is trained
SECONDS_TO_STOP = 1.0
SAMPLE_BYTES = 600_000_000  # more text than WikiText-103's is not needed to train a tokenizer


def prepare_data(
    dataset,
    data_path=None,
    tokenizer="char",
    bpe_vocab_size=8192,
    tokenizer_path=None,
    tiktoken_encoding="gpt2",
    say=print,
    given=None,
):
    """Find a corpus, train or load its tokenizer, and write or reuse its token files.

    Of several processes that start at once, one prepares and the others wait for it.

    Args:
        dataset: "shakespeare", "wikitext103" or "text".
        data_path: a file or directory of local text; see `corpora.find_corpus`.
        tokenizer: "char", "bpe" or "tiktoken".
        tokenizer_path: a BPE tokenizer file; if it does not exist, it is trained and written.
        say: called with lines for the user.
        given: a BPE tokenizer to use instead of training or loading one.

    Returns:
        A `TokenData`.

    Raises:
        UserError: if there is no such text or tokenizer, or files cannot be written.
    """
    if tokenizer == "bpe" and bpe_vocab_size < 256:
        raise UsageError(
            f"--bpe-vocab-size is {bpe_vocab_size}: give at least 256, one for each byte"
        )
    corpus = find_corpus(dataset, data_path, say)
    if tokenizer == "tiktoken":
        given = TiktokenTokenizer(tiktoken_encoding)
    elif given is None and tokenizer_path is not None and Path(tokenizer_path).exists():
        given = load_bpe(tokenizer_path)
    is_missing = tokenizer == "bpe" and tokenizer_path is not None and given is None
    # without the lock first: a finished corpus needs no waiting
    if not is_missing:
        directory = _directory(corpus, tokenizer, bpe_vocab_size, given)
        ready, _ = _reusable(directory, corpus)
        if ready is not None:
            _say_if_unchanged(ready, say)
            return ready
    with _one_process(f"{corpus.name}-{corpus.sha256[:12]}", say):
        if is_missing:
            _make_tokenizer_file(corpus, bpe_vocab_size, tokenizer_path, say)
            given = load_bpe(tokenizer_path)
            directory = _directory(corpus, tokenizer, bpe_vocab_size, given)
        ready, why_not = _reusable(directory, corpus)  # another process may have made them by now
        if ready is not None:
            return ready
        if not is_missing:
            say(f"corpus: {corpus.description}")
        if why_not is not None:
            say(f"{why_not}: encoding again")

        def make_tokenizer(sizes):
            if given is not None:
                return given
            if tokenizer == "char":
                return CharTokenizer.train(corpus.readers["train"]())
            return _train_bpe(corpus, bpe_vocab_size, sizes["train"], say)

        write_token_files(directory, corpus, make_tokenizer, say)
    return open_token_data(directory)


def check_tokenizer_file(path, bpe_vocab_size):
    """Refuse a tokenizer file that has more tokens than --bpe-vocab-size; warn if it has fewer.

    Args:
        path: of the file, or None.
        bpe_vocab_size: as the user gave it, or None.

    Raises:
        UsageError: if it has more.
    """
    if path is None or bpe_vocab_size is None or not Path(path).exists():
        return
    vocab_size = load_bpe(path).vocab_size
    if vocab_size > bpe_vocab_size:
        raise UsageError(
            f"--tokenizer-path {path} has {vocab_size:,} tokens, more than --bpe-vocab-size "
            f"{bpe_vocab_size:,}: drop one of the two flags, or name a file that does not exist yet"
        )
    if vocab_size < bpe_vocab_size:  # a small text has no more pairs to merge
        warn(f"--tokenizer-path {path} has {vocab_size:,} tokens, not {bpe_vocab_size:,}")


def _directory(corpus, tokenizer, bpe_vocab_size, given):
    """The directory for the token files of this text and this tokenizer."""
    start = f"{corpus.name}-{corpus.sha256[:12]}"
    if tokenizer == "tiktoken":
        return TOKENS / f"{start}-tiktoken-{given.encoding_name}"
    if tokenizer == "bpe" and given is None:
        return TOKENS / f"{start}-bpe{bpe_vocab_size}"
    if tokenizer == "bpe":
        # a tokenizer file may be the one trained for earlier token files of this text
        for path, meta in _all_meta(f"{start}-bpe*"):
            if meta.get("tokenizer_sha256") == given.fingerprint:
                return path
        return TOKENS / f"{start}-bpe-{given.fingerprint[:10]}"
    return TOKENS / f"{start}-{tokenizer}"


def _all_meta(pattern):
    """Yield `(directory, meta)` of the prepared corpora whose names match."""
    for path in sorted(TOKENS.glob(f"{pattern}/meta.json")):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            meta = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(meta, dict):
                yield path.parent, meta


def _reusable(directory, corpus):
    """Returns `(TokenData, None)`, or `(None, reason)`; the reason is None if nothing is there."""
    if not directory.exists():
        return None, _changed_source(directory, corpus)
    try:
        ready = open_token_data(directory)
    except TokenFilesError as error:
        return None, error.reason
    if ready.meta["source_sha256"] != corpus.sha256:
        return None, f"{directory} was made from a source with another SHA-256"
    if ready.meta.get("source_bytes", corpus.source_bytes) != corpus.source_bytes:
        return None, f"{directory} was made from a source of another size"
    return ready, None


def _say_if_unchanged(data, say):
    """Say so if token files of an earlier version hold what `plain_text` changes today."""
    changed = set()
    if "text_changes" not in data.meta:
        plain_text(data.tokenizer.decode(data.train[:LOOKED_AT].tolist()), changed)
    if changed:
        say(
            f"{data.directory} is of an earlier version, which made tokens of byte order marks and "
            "CR: its checkpoints need it, but move it away for a new run"
        )


def _changed_source(directory, corpus):
    """A sentence if the same source had another content when it was last encoded; else None."""
    key = directory.name.removeprefix(f"{corpus.name}-{corpus.sha256[:12]}-")
    for path, meta in _all_meta(f"{corpus.name}-*-{key}"):
        if meta.get("source") == corpus.description:
            return (
                f"{corpus.description} is no longer what {path} was made of (SHA-256 "
                f"{str(meta.get('source_sha256'))[:12]}, now {corpus.sha256[:12]})"
            )
    return None


@contextlib.contextmanager
def _one_process(name, say):
    """A context for one process at a time; each other one prints that it waits."""
    try:
        LOCKS.mkdir(parents=True, exist_ok=True)
        lock = FileLock(LOCKS / f"{name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"waiting: another process is preparing {name}")
            lock.acquire()
    except OSError as error:
        raise UserError(
            f"{LOCKS} cannot be written: {error.strerror or error}; "
            "start from a directory that you may write to"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _make_tokenizer_file(corpus, vocab_size, path, say):
    """Write a BPE tokenizer file: that of earlier token files, or a newly trained one."""
    if Path(path).exists():  # another process made it while this one waited
        return
    same, _ = _reusable(_directory(corpus, "bpe", vocab_size, None), corpus)
    if same is not None:
        same.tokenizer.save(path)
        say(f"wrote {path}, the tokenizer of {same.directory}")
        return
    say(f"corpus: {corpus.description}")
    _train_bpe(corpus, vocab_size, split_sizes(corpus)["train"], say).save(path)


def _train_bpe(corpus, vocab_size, size, say):
    """A tokenizer trained on the train split of `size` bytes, or on evenly spread pieces of it."""
    every = -(-size // SAMPLE_BYTES)
    line = f"training a BPE tokenizer of {vocab_size} tokens"
    if every > 1:
        line += f" on a sample, one of every {every} pieces of 64 KB of the training text"
    say(line)
    is_stopped = threading.Event()

    with byte_bar("training the tokenizer", size // every) as bar:

        def texts():
            for piece in itertools.islice(pieces(corpus.readers["train"]()), 0, None, every):
                if is_stopped.is_set():
                    raise KeyboardInterrupt
                yield piece
                bar.update(len(piece.encode()))
            bar.bar_format = "merging pairs: {elapsed}"  # how many there will be is not known

        return _watched(lambda: BPETokenizer.train(texts(), vocab_size), bar, is_stopped)


def _watched(work, bar, is_stopped):
    """What `work()` returns, called in another thread: Ctrl-C does not wait for its end.

    The library merges pairs for seconds or minutes, in which it neither reports its progress nor
    hears a signal. The thread is a daemon, which ends with the process.

    Args:
        bar: shown again and again, so that its clock goes on.
        is_stopped: an event that is set if `work` is not to go on.
    """
    result = Future()

    def call():
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    worker = threading.Thread(target=call, daemon=True)
    worker.start()
    try:
        while not wait([result], timeout=SECONDS_BETWEEN_SIGNS).done:
            bar.refresh()
    except KeyboardInterrupt:
        is_stopped.set()
        worker.join(SECONDS_TO_STOP)  # while it reads text it stops at once
        raise
    return result.result()
