"""Malicious files, and the error that each produces.

python tests/hostile_files.py        prints them as a table
"""

import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from conftest import SENTENCES
from hostile_checkpoints import (
    BIG,
    CONTENTS,
    FILES,
    TRAINING,
    attempt_checkpoint,
    attempt_file,
    attempt_resume,
    error_of,
    train_a_little,
)
from text.byte_level import GPT4_WORDS
from text.preparation import prepare_data
from text.token_files import open_token_data
from text.tokenizer import BPETokenizer, load_bpe


def meta(**changes):
    """A change of a prepared text's meta.json."""

    def change(directory):
        path = directory / "meta.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def split(**changes):
    def change(directory):
        splits = json.loads((directory / "meta.json").read_text())["splits"]
        splits["train"] |= changes
        meta(splits=splits)(directory)

    return change


def elsewhere(directory):
    """A split whose name is a path outside the directory."""
    splits = json.loads((directory / "meta.json").read_text())["splits"]
    meta(splits=splits | {"../../../../etc/passwd": splits["train"]})(directory)


def overwrite(name, data):
    return lambda directory: (directory / name).write_bytes(data)


def too_large_ids(directory):
    path = directory / "valid.bin"
    path.write_bytes(b"\xff" * path.stat().st_size)


def two_terabytes_of_holes(directory):
    os.truncate(directory / "train.bin", 2 << 40)
    split(tokens=1 << 40)(directory)


def in_shards(change):
    """A change of token files whose training split is in three shards, and of what lists them."""

    def cut(directory):
        ids = (directory / "train.bin").read_bytes()
        (directory / "train.bin").unlink()
        parts, listed = (ids[:1000], ids[1000:2000], ids[2000:]), []
        for number, part in enumerate(parts):
            (directory / f"train-0000{number}.bin").write_bytes(part)
            listed.append({"tokens": len(part) // 2, "sha256": hashlib.sha256(part).hexdigest()})
        split(shards=change(directory, listed))(directory)

    return cut


def damaged_shard(content):
    def change(directory, listed):
        (directory / "train-00001.bin").write_bytes(content)
        return listed

    return in_shards(change)


def holes_in_a_shard(directory, listed):
    os.truncate(directory / "train-00002.bin", 2 << 40)
    split(tokens=1000 + (1 << 40))(directory)
    return [*listed[:2], listed[2] | {"tokens": 1 << 40}]


TOKEN_FILES = {
    "2 TB of holes": two_terabytes_of_holes,
    "ids that are objects": meta(dtype="|O"),
    "ids of 10^9 bytes": meta(dtype="|V1000000000"),
    "ids as a list": meta(dtype=["<u2"]),
    "a split elsewhere": elsewhere,
    "splits as a list": meta(splits=["train", "valid"]),
    "10^12 tokens": split(tokens=BIG),
    "no tokens": split(tokens=0),
    "half a token": split(tokens=0.5),
    "tokens as text": split(tokens="9"),
    "no bytes": split(bytes=0),
    "an odd length": overwrite("train.bin", b"x" * 12345),
    "ids above the vocabulary": too_large_ids,
    "deep JSON": overwrite("meta.json", b"[" * 1_000_000),
    "a deep vocabulary": overwrite("vocab.json", b'{"a":' * 1_000_000),
    "no UTF-8": overwrite("meta.json", b"\xff\xfe"),
    "a later format": meta(format_version=99),
    "another tokenizer's hash": meta(tokenizer_sha256="0" * 64),
    "a shard that is not there": in_shards(lambda _, shards: [*shards, shards[0]]),
    "a shard left out": in_shards(lambda _, shards: shards[:2]),
    "no shards": in_shards(lambda _, shards: []),
    "shards as text": in_shards(lambda _, shards: "train-00000.bin"),
    "shards as names": in_shards(lambda _, shards: ["../../../../etc/passwd"]),
    "shards of half a token": in_shards(lambda _, shards: [s | {"tokens": 0.5} for s in shards]),
    "a shard of -1 tokens": in_shards(lambda _, shards: [*shards, {"tokens": -1}, {"tokens": 1}]),
    "shards without a hash": in_shards(lambda _, s: [{"tokens": x["tokens"]} for x in s]),
    "a hash that is a list": in_shards(lambda _, shards: [s | {"sha256": []} for s in shards]),
    "a shard cut short": damaged_shard(bytes(999)),
    "another shard of this size": damaged_shard(bytes(1000)),
    "a shard with ids above the vocabulary": damaged_shard(b"\xff" * 1000),
    "2 TB of holes in a shard": in_shards(holes_in_a_shard),
}
"""Changes of a directory of token files."""


BPE_JSON = BPETokenizer.train(["The quick brown fox\n"], 260).to_vocab()["tokenizer_json"]


def exported(**parts):
    """A trained tokenizer file with some parts replaced."""
    return json.dumps(json.loads(BPE_JSON) | parts)


def with_model(**parts):
    return exported(model=json.loads(BPE_JSON)["model"] | parts)


def added_token(content, **parts):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": 260, "content": content, **flags, **parts}


def words(regex, behavior="Isolated", invert=False):
    """A pre-tokenizer like those in Llama 3's files."""
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {"type": "Sequence", "pretokenizers": [split, level | {"use_regex": False}]}


DOUBLING = {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}
BYTE_LEVEL = json.loads(BPE_JSON)["pre_tokenizer"]
TOKENIZERS = {
    "text doubled forty times": exported(
        normalizer={"type": "Sequence", "normalizers": [DOUBLING] * 40}
    ),
    "a regex of exponential time": exported(
        normalizer={"type": "Replace", "pattern": {"Regex": "(e+)+$"}, "content": "e"}
    ),
    "a split of exponential time": exported(pre_tokenizer=words("(e+)+$")),
    "a split that removes the text": exported(pre_tokenizer=words(GPT4_WORDS, "Removed")),
    "bytes of bytes of bytes": exported(
        pre_tokenizer={"type": "Sequence", "pretokenizers": [BYTE_LEVEL] * 3}
    ),
    "a hundred normalizers": exported(
        normalizer={"type": "Sequence", "normalizers": [{"type": "NFKC"}] * 100}
    ),
    "a sequence in a sequence": exported(
        normalizer={"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": []}]}
    ),
    "a normalizer of a list": exported(normalizer={"type": ["NFC"]}),
    "a normalizer that is text": exported(normalizer="NFC"),
    "no pre-tokenizer": exported(pre_tokenizer=None),
    "another pre-tokenizer": exported(pre_tokenizer={"type": "Whitespace"}),
    "an empty sequence": exported(pre_tokenizer={"type": "Sequence", "pretokenizers": []}),
    "a suffix": with_model(end_of_word_suffix="</w>"),
    "an unknown token outside the vocabulary": with_model(unk_token="<unk>"),
    "a token that is no bytes": with_model(vocab={"\u0416": 0, "a": 1}, merges=[]),
    "two tokens with one id": with_model(vocab={"a": 0, "b": 0, "c": 2}, merges=[]),
    "an id of 2^40": with_model(vocab={"a": 0, "b": 1 << 40}, merges=[]),
    "an id as text": with_model(vocab={"a": "0"}, merges=[]),
    "a token of 10^6 letters": with_model(vocab={"a": 0, "b" * 10**6: 1}, merges=[]),
    "an added token of 10^6 letters": exported(added_tokens=[added_token("b" * 10**6)]),
    "an empty added token": exported(added_tokens=[added_token("")]),
    "an added token of a list": exported(added_tokens=[added_token(["b"])]),
    "an added token without a text": exported(added_tokens=[{"id": 260}]),
    "deep JSON": BPE_JSON[:-1] + ',"x":' + "[" * 100_000,
}
"""Files for --tokenizer-path."""


def attempt_tokenizer(content):
    """The error of `load_bpe` for a tokenizer file; empty if it is accepted."""
    Path("evil.json").write_text(content)
    return error_of(lambda: load_bpe("evil.json"))


def attempt_tokens(change):
    """The error of `open_token_data` for changed token files; empty if they are accepted."""
    Path("text.txt").write_text("".join(SENTENCES) * 100)
    directory = prepare_data("text", "text.txt", say=lambda line: None).directory
    change(directory)
    return error_of(lambda: open_token_data(directory))


def everything():
    """Yield `(kind, name, error)` of every file, written in the current directory."""
    for name, change in CONTENTS.items():
        yield "checkpoint", name, attempt_checkpoint(change)
    for name, make in FILES.items():
        yield "file", name, attempt_file(make())
    with contextlib.redirect_stdout(io.StringIO()):
        trained = train_a_little()
    for name, change in TRAINING.items():
        yield "resumed", name, attempt_resume(trained, change)
    for name, content in TOKENIZERS.items():
        yield "tokenizer", name, attempt_tokenizer(content)
    for name, change in TOKEN_FILES.items():
        yield "token files", name, attempt_tokens(change)


def main():
    """Print the table. Returns 1 if a file was accepted, else 0."""
    accepted = 0
    print("| kind | file | error |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for kind, name, message in everything():
            accepted += not message
            print(f"| {kind} | {name} | {message.replace('|', '/') or 'ACCEPTED'} |", flush=True)
    return int(accepted > 0)


if __name__ == "__main__":
    sys.exit(main())
