"""Byte-level BPE: its letters, its words, and what we take from a file of it."""

import re

from tokenizers import Regex, pre_tokenizers

from system.errors import UserError
from system.safe_text import shown_short

LONGEST_TOKEN = 1000  # letters
LONGEST_SEQUENCE = 8  # normalizers or pre-tokenizers in a row
NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase")
# only known regular expressions are run: one in a stranger's file may never end, or lose text
GPT4_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL_FLAGS = ("add_prefix_space", "trim_offsets", "use_regex")
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LONGEST_WORD = 1000  # characters: training takes minutes if a text without spaces is one word
SHORT_WORDS = GPT2_WORDS.replace("+", f"{{1,{LONGEST_WORD}}}")  # the same words, long ones cut
# without such a run there is no long word; it may be of several words
LONG_RUN = re.compile(f"[^ \\n]{{{LONGEST_WORD}}}|\\s{{{LONGEST_WORD}}}")
KNOWN_WORDS = {  # GPT-2, ours; GPT-4 and Llama 3; Qwen 2: every character is in one of their pieces
    GPT2_WORDS,
    SHORT_WORDS,
    GPT4_WORDS,
    GPT4_WORDS.replace("{1,3}", ""),
}


def _byte_of_letter():
    """Letter of byte-level BPE to byte: printable Latin-1 as itself, the rest from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + n): byte for n, byte in enumerate(others)}


BYTE_OF_LETTER = _byte_of_letter()


def split_into(words):
    """The library's pre-tokenizer that cuts a text into the words of a regular expression."""
    return pre_tokenizers.Split(Regex(words), "isolated")


def has_long_word(text):
    """Whether SHORT_WORDS cuts a word of this text."""
    if LONG_RUN.search(text) is None:
        return False
    short, whole = (split_into(w).pre_tokenize_str(text) for w in (SHORT_WORDS, GPT2_WORDS))
    return short != whole


def byte_level_parts(file):
    """A new `tokenizers` file with the checked parts of another that turn text into ids.

    Raises:
        UserError: if it is not byte-level BPE.
        KeyError, TypeError, AttributeError: if it is no such file.
    """
    model, added = file["model"], file.get("added_tokens") or []
    if model.get("type", "BPE") != "BPE":
        raise UserError(f"its model is {shown_short(model['type'])}, not BPE")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UserError(f"it has {key}, which byte-level BPE does not have")
    vocab, unknown = model["vocab"], model.get("unk_token")
    contents = {token["content"] for token in added}
    for token, i in (*vocab.items(), *((token["content"], token["id"]) for token in added)):
        if type(i) is not int or not 0 <= i < 1 << 31:
            raise UserError(f"its token {shown_short(token)} has no id of 0 or more")
        if not 0 < len(token) <= LONGEST_TOKEN:
            raise UserError(f"it has a token of {len(token):,} letters, not 1 to {LONGEST_TOKEN:,}")
        if token not in contents and not BYTE_OF_LETTER.keys() >= {*token}:
            raise UserError(f"its token {shown_short(token)} is not of byte-level BPE")
    if unknown is not None and unknown not in vocab:
        raise UserError(f"its unknown token {shown_short(unknown)} is not in its vocabulary")
    for part in _sequence(file.get("normalizer"), "normalizers"):
        if part["type"] not in NORMALIZERS:
            raise UserError(
                f"its normalizer is {shown_short(part['type'])}, not {_any(NORMALIZERS)}"
            )
    *before, last = _sequence(file.get("pre_tokenizer"), "pretokenizers") or [{"type": "none"}]
    if last["type"] != "ByteLevel":
        raise UserError(f"its pre-tokenizer is {shown_short(last['type'])}, not ByteLevel")
    for part in before:
        if part["type"] != "Digits" and not _is_known_split(part):
            raise UserError(f"its pre-tokenizer {shown_short(part['type'])} is not a known one")
    # a token that swallowed the spaces around it would lose text
    added = [token | {"lstrip": False, "rstrip": False} for token in added]
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": file.get("normalizer"),
        "pre_tokenizer": file["pre_tokenizer"],
        "decoder": {"type": "ByteLevel", **dict.fromkeys(BYTE_LEVEL_FLAGS, True)},
        "model": model | {"type": "BPE", "dropout": None},
    }


def _sequence(part, key):
    """One normalizer or pre-tokenizer, or a sequence of them, as a list of dicts."""
    if part is None:
        return []
    parts = part[key] if part["type"] == "Sequence" else [part]
    if len(parts) > LONGEST_SEQUENCE:
        raise UserError(f"it has {len(parts):,} {key}: more than {LONGEST_SEQUENCE}")
    return parts


def _is_known_split(part):
    # ("Removed", inverted) removes what the expression does not match, which is nothing
    how = part.get("behavior"), part.get("invert")
    is_whole = how in (("Isolated", False), ("Removed", True))
    return part["type"] == "Split" and is_whole and part["pattern"].get("Regex") in KNOWN_WORDS


def _any(names):
    return f"{', '.join(names[:-1])} or {names[-1]}"
