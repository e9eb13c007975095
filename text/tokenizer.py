"""Three tokenizers behind one interface: characters, byte-level BPE and tiktoken's encodings.

Each has `vocab_size`, `encode(text) -> list of ids`, `decode(ids) -> text`, `label(id)` for people,
`to_vocab()`, its contents in plain types for checkpoints, and `fingerprint`, their SHA-256.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import tiktoken
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from system.errors import UserError
from system.files import write_whole
from system.safe_text import short_reason, shown_short
from text.byte_level import (
    BYTE_OF_LETTER,
    LONGEST_TOKEN,
    SHORT_WORDS,
    byte_level_parts,
    has_long_word,
    split_into,
)

LONGEST_CHARACTER = 4  # bytes, in UTF-8
LONGEST_LABEL = 200  # letters
UNKNOWN = "\ufffd"  # stands for a character that is not in the vocabulary


def marked(text):
    """The text with visible spaces and line ends, and in hex what cannot be printed."""
    shown = text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in shown)


class _Tokenizer:
    """What the three have in common."""

    @property
    def fingerprint(self):
        """SHA-256 of `to_vocab()`, in hex."""
        text = json.dumps(self.to_vocab(), sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def label(self, token):
        """A token as a short label: spaces and line ends visible, broken bytes in hex."""
        text = self.decode([token])
        if UNKNOWN in text:
            text = self.bytes_of(token).decode("utf-8", errors="backslashreplace")
        shown = marked(text) or "∅"
        return shown if len(shown) <= LONGEST_LABEL else shown[: LONGEST_LABEL - 1] + "…"

    def bytes_of(self, token):
        """The bytes that a token stands for."""
        return self.decode([token]).encode("utf-8", errors="replace")


class CharTokenizer(_Tokenizer):
    """One id per character; the last id stands for all characters that the corpus lacks."""

    name = "char"

    def __init__(self, characters):
        self.itos = list(characters)
        self.stoi = {character: i for i, character in enumerate(self.itos)}
        self.unknown = self.stoi.get(UNKNOWN)
        self.vocab_size = len(self.itos)

    @classmethod
    def train(cls, texts):
        """A tokenizer with every character of an iterable of texts, sorted, and the unknown."""
        characters = set()
        for text in texts:
            characters.update(text)
        return cls([*sorted(characters - {UNKNOWN}), UNKNOWN])

    def encode(self, text):
        # vocabularies of the first release have no unknown: other characters are left out
        ids = (self.stoi.get(character, self.unknown) for character in text)
        return [i for i in ids if i is not None]

    def encode_array(self, texts):
        """`encode` for several texts into one int64 array, fast enough for a whole corpus."""
        codes = np.frombuffer("".join(texts).encode("utf-32-le"), dtype=np.uint32)
        fallback = -1 if self.unknown is None else self.unknown
        table = np.full(0x110000, fallback, dtype=np.int64)
        for character, i in self.stoi.items():
            if len(character) == 1:
                table[ord(character)] = i
        ids = table[codes]
        return ids[ids >= 0]

    def num_unknown(self, text):
        """The number of characters of `text` that are not in the vocabulary."""
        return sum(character not in self.stoi for character in text)

    def decode(self, ids):
        return "".join(self.itos[i] for i in ids)

    def to_vocab(self):
        return {"type": "char", "stoi": self.stoi, "itos": self.itos}


class BPETokenizer(_Tokenizer):
    """Byte-level BPE like GPT-2's (Radford et al. 2019), run by the `tokenizers` library.

    Only the parts of a file that turn text into ids are used. Those that cut, pad or add ids
    (truncation, padding, post-processor, dropout) and its decoder are ignored.

    Raises:
        UserError: if it is no such file, or another kind of tokenizer.
    """

    name = "bpe"

    def __init__(self, tokenizer_json):
        try:
            used = json.dumps(byte_level_parts(json.loads(tokenizer_json)))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(
                f"not a file of the tokenizers library: {short_reason(error)}"
            ) from None
        try:
            self._tokenizer = Tokenizer.from_str(used)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises bare Exception, or panics
            raise UserError(
                f"not a file of the tokenizers library: {short_reason(error)}"
            ) from None
        self._json = tokenizer_json
        self.vocab_size = self._tokenizer.get_vocab_size()
        if {*self._tokenizer.get_vocab().values()} != {*range(self.vocab_size)}:
            raise UserError(f"its {self.vocab_size:,} ids are not those from 0 on")

    @classmethod
    def train(cls, texts, vocab_size):
        """A tokenizer trained on an iterable of texts; it can encode every UTF-8 text.

        Words longer than LONGEST_WORD are cut, here and when it encodes.
        """
        is_cut = False

        def watched():
            nonlocal is_cut
            for text in texts:
                is_cut = is_cut or has_long_word(text)
                yield text

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                split_into(SHORT_WORDS),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=[],
            max_token_length=LONGEST_TOKEN,
            show_progress=False,
        )
        tokenizer.train_from_iterator(watched(), trainer)
        if not is_cut:  # then the tokenizer is the same as that of earlier versions
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return cls(tokenizer.to_str())

    def encode(self, text):
        with _failures_named():
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_array(self, texts):
        """`encode` for several texts into one int64 array, on all cores."""
        with _failures_named():
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return np.concatenate([np.array(e.ids, dtype=np.int64) for e in encodings])

    def decode(self, ids):
        with _failures_named():
            return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def bytes_of(self, token):
        piece = self._tokenizer.id_to_token(token) or UNKNOWN
        is_of_bytes = BYTE_OF_LETTER.keys() >= {*piece}  # an added token may be any text
        return bytes(map(BYTE_OF_LETTER.get, piece)) if is_of_bytes else piece.encode()

    def to_vocab(self):
        return {"type": "bpe", "tokenizer_json": self._json}

    def save(self, path):
        """Write the JSON file of the `tokenizers` library, whole or not at all."""
        write_whole(Path(path), self._json.encode())


def _no_tokenizer(error):
    return f"not a file of the tokenizers library: {short_reason(error)}"


@contextlib.contextmanager
def _failures_named():
    """A context that turns the library's own errors, bare Exception or a panic, into UserError."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"the tokenizer failed on a text ({error}): use another") from None


class TiktokenTokenizer(_Tokenizer):
    """An encoding of the tiktoken library, by name."""

    name = "tiktoken"

    def __init__(self, encoding_name):
        self.encoding_name = encoding_name
        known = tiktoken.list_encoding_names()
        if encoding_name not in known:
            raise UserError(
                f"--tiktoken-encoding {encoding_name[:80]} is not installed; there are: "
                f"{', '.join(known)}"
            )
        try:
            self._encoding = tiktoken.get_encoding(encoding_name)
        except Exception as error:  # a download fails in many ways
            raise UserError(
                f"the table of --tiktoken-encoding {encoding_name} could not be fetched "
                f"({type(error).__name__}): connect once, or point TIKTOKEN_CACHE_DIR at a copy, "
                "or name an encoding that a plug-in brings, or use --tokenizer bpe"
            ) from None
        self.vocab_size = self._encoding.n_vocab

    def encode(self, text):
        return self._encoding.encode_ordinary(text)

    def encode_array(self, texts):
        """`encode` for several texts into one int64 array, on all cores."""
        batch = self._encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)
        return np.concatenate([np.array(ids, dtype=np.int64) for ids in batch])

    def decode(self, ids):
        return b"".join(map(self.bytes_of, ids)).decode("utf-8", errors="replace")

    def bytes_of(self, token):
        try:
            return self._encoding.decode_single_token_bytes(token)
        except KeyError:  # encodings have gaps below n_vocab
            return UNKNOWN.encode()

    def to_vocab(self):
        return {"type": "tiktoken", "encoding_name": self.encoding_name}


class TextStream:
    """Turns ids into text one by one; a character is held back until its bytes are complete."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._pending, self._given = [], 0

    def push(self, token):
        """Add one id; returns the text that is new and certain."""
        self._pending.append(token)
        text = self._tokenizer.decode(self._pending)
        # characters may be split over several tokens; only the last one can be incomplete
        certain = text.removesuffix(UNKNOWN)
        new = certain[self._given :]
        if certain == text:
            self._pending, self._given = [], 0
        else:
            # the bytes of an incomplete character are in the newest tokens, so older ones can go
            if len(self._pending) > LONGEST_CHARACTER:
                self._pending = self._pending[-LONGEST_CHARACTER:]
                certain = self._tokenizer.decode(self._pending).removesuffix(UNKNOWN)
            self._given = len(certain)
        return new

    def flush(self):
        """Returns the text that is still held back."""
        text = self._tokenizer.decode(self._pending)[self._given :]
        self._pending, self._given = [], 0
        return text


def tokenizer_from_vocab(vocab):
    """The tokenizer that a checkpoint's `vocab` describes.

    Raises:
        UserError: if it is none that this program or its first release writes.
    """
    try:
        kind = vocab.get("type", "char" if "itos" in vocab else None)
        if not isinstance(kind, str | None):  # a nested value may be too deep to print
            raise TypeError("its type is no text")
        if kind == "char":
            return CharTokenizer(_char_list(vocab))
        if kind == "bpe":
            return BPETokenizer(_text(vocab["tokenizer_json"]))
        if kind == "tiktoken":
            return TiktokenTokenizer(_text(vocab["encoding_name"]))
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"the vocabulary is damaged ({type(error).__name__}: {error})") from None
    raise UserError(f"the vocabulary is of an unknown type: {shown_short(kind)}")


def _text(value):
    if not isinstance(value, str):
        raise TypeError(f"a {type(value).__name__} instead of a text")
    return value


def _char_list(vocab):
    itos = vocab["itos"]
    if isinstance(itos, dict):
        itos = [itos[i] for i in range(len(itos))]
    if not itos or not all(isinstance(c, str) and c for c in itos):
        raise ValueError("itos must list characters")
    longest = max(map(len, itos))
    if longest > LONGEST_TOKEN:
        raise ValueError(f"itos holds {longest:,} letters as one, more than {LONGEST_TOKEN:,}")
    return itos


def load_bpe(path):
    """The `BPETokenizer` of a file; raises `UserError` if it is unreadable or of another kind."""
    try:
        return BPETokenizer(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"--tokenizer-path {path} cannot be read: {error}") from None
    except (UnicodeDecodeError, UserError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else error
        raise UserError(
            f"--tokenizer-path {path} cannot be used ({reason}): "
            "name another, or one that does not exist yet to have it trained"
        ) from None
