"""The files of texts that people exchange, as in exchanged_models.py."""

import contextlib
import copy
import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import math
from pathlib import Path
from unittest import mock

import numpy as np
from hypothesis import strategies as st

from conftest import SENTENCES
from data import check_long_enough
from engine.wikitext import articles, detokenized, read_wikitext
from exchanged_models import check_tokenizer, write_text
from mutations import (
    changed_bytes,
    changed_json,
    changed_values,
    json_bytes,
)
from system.errors import UserError
from text import shards
from text.corpora import find_corpus
from text.rows import read_file
from text.stream import read_blocks
from text.token_files import open_token_data
from text.tokenizer import tokenizer_from_vocab
from token_folders import prepare


def text():
    """A text, plain and packed: what is accepted is its UTF-8 with plain line ends."""
    valid = ("\ufeff" + "".join(SENTENCES) * 3 + "naïve 🙂\r\n").encode()
    unpack = {"": bytes, ".gz": gzip.decompress, ".xz": lzma.decompress}
    pack = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}

    def read(case):
        suffix, file = case
        path = Path(f"evil.txt{suffix}")
        path.write_bytes(file)
        found = "".join(read_blocks(path))
        plain = unpack[suffix](file).decode("utf-8").removeprefix("\ufeff")
        assert found == plain.replace("\r\n", "\n").replace("\r", "\n") and found.strip()
        corpus = find_corpus("text", str(path))
        assert "".join("".join(reader()) for reader in corpus.readers.values()) == found

    for suffix in pack:
        read((suffix, pack[suffix](valid)))
    return st.one_of(
        changed_bytes(valid).map(lambda file: ("", file)),
        *(
            strategy
            for z in (".gz", ".xz")
            for strategy in (
                changed_bytes(valid).map(lambda file, z=z: (z, pack[z](file))),
                changed_bytes(pack[z](valid)).map(lambda file, z=z: (z, file)),
            )
        ),
    ), read


def published_detokenizer():
    """lm-evaluation-harness's own; only its file is imported, the package takes seconds."""
    folder = Path(importlib.util.find_spec("lm_eval").origin).parent
    path = folder / "tasks/wikitext/preprocess_wikitext.py"
    spec = importlib.util.spec_from_file_location("preprocess_wikitext", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda article: module.wikitext_detokenizer({"page": article})


def wiki_file():
    """evaluate.py --wikitext: the words are those of lm-evaluation-harness, but none takes long."""
    valid = ' = A =\n\n It \' s ( in 2000 ) 3 @.@ 5 " x " , [ a ] { b }\n = B =\n\n The end .\n'
    published = published_detokenizer()

    def read(case):
        Path("wiki.test.raw").write_bytes(case)
        for article in articles(read_wikitext(Path("wiki.test.raw"))):
            found = detokenized(article)
            if len(article) < 1000:  # or the published expressions take hours
                assert found == published(article)

    read(valid.encode())
    others = [b' ( " [ { \' ) " ] } ' * 9, "\x1c( \u2003x\x85 )\u3000".encode()]
    return changed_bytes(valid.encode(), others), read


def rows():
    """Files of rows, .jsonl and .parquet: what is accepted is the text of their rows."""
    import pyarrow
    import pyarrow.parquet

    lines = ["", *" = A =\n".splitlines(), *SENTENCES, "naïve 🙂\r\n", None]
    objects = [{"text": line, "n": n} for n, line in enumerate(lines)]
    valid = {"evil.jsonl": b"\n".join(map(json_bytes, objects)) + b"\n"}
    for n, compression in enumerate(("snappy", "none")):
        file = io.BytesIO()
        table = pyarrow.table({"text": lines, "n": range(len(lines))})
        pyarrow.parquet.write_table(table, file, compression=compression)
        valid[f"{n}.parquet"] = file.getvalue()

    def texts_of(name, file):
        if name.endswith(".jsonl"):
            read = (json.loads(line) for line in file.decode().split("\n") if line.strip())
            return [row["text"] for row in read]
        table = pyarrow.parquet.read_table(io.BytesIO(file), columns=["text"])
        return table.column("text").to_pylist()

    def read(case):
        name, file = case
        Path(name).write_bytes(file)
        found = "".join(read_file(Path(name)))
        texts = [text.removeprefix("\ufeff") for text in texts_of(name, file) if text]
        texts = [text.replace("\r\n", "\n").replace("\r", "\n") for text in texts]
        assert found == "".join(text if text.endswith("\n") else f"{text}\n" for text in texts)
        assert found.encode("utf-8").strip()

    for item in valid.items():
        read(item)
    changed = changed_values(objects).filter(lambda value: isinstance(value, list))
    return st.one_of(
        changed.map(lambda value: ("evil.jsonl", b"\n".join(map(json_bytes, value)))),
        *(
            changed_bytes(file, [*valid.values()]).map(lambda file, name=name: (name, file))
            for name, file in valid.items()
        ),
    ), read


def token_files():
    """A prepared text, its training split in shards: one file is changed, and for half of the cases
    meta.json gets the right hashes and counts."""
    with mock.patch.object(shards, "SHARD_TOKENS", 1500):
        directory = prepare("text", write_text()).directory
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    meta, vocab = json.loads(files["meta.json"]), json.loads(files["vocab.json"])
    second = "train-00001.bin"

    def read(case):
        changed = files | case
        for name, data in changed.items():
            (directory / name).write_bytes(data)
        data = open_token_data(directory)
        for name, split in data.splits.items():
            stored = data.meta["splits"][name]
            names = [f"{name}-{n:05}.bin" for n in range(len(stored.get("shards", ())))]
            raw = b"".join(changed[part] for part in names or [f"{name}.bin"])
            ids = np.frombuffer(raw, data.meta["dtype"])
            assert np.array_equal(split, ids) and len(ids) == stored["tokens"] > 0
            assert ids.max() < data.tokenizer.vocab_size
            assert isinstance(data.tokenizer.decode(ids[:50].tolist()), str)
            for part, shard in zip(names, stored.get("shards", ()), strict=True):
                assert hashlib.sha256(changed[part]).hexdigest() == shard["sha256"]
        assert 0 < data.bytes_per_token < math.inf
        # what a training says of it
        assert data.meta["source"].isprintable() and isinstance(data.meta["source_sha256"], str)
        with contextlib.suppress(UserError):
            check_long_enough(data.train, 1 << 40, "train", data)
        check_tokenizer(data.tokenizer)

    def with_sums(file):
        changed = copy.deepcopy(meta)
        split = changed["splits"]["train"]
        count, digest = len(file) // 2, hashlib.sha256(file).hexdigest()
        split["tokens"] += count - split["shards"][1]["tokens"]
        split["shards"][1] = {"tokens": count, "sha256": digest}
        return {second: file, "meta.json": json_bytes(changed)}

    def with_hash(value):
        try:
            digest = tokenizer_from_vocab(value).fingerprint
        except UserError:
            digest = ""
        return {
            "vocab.json": json_bytes(value),
            "meta.json": json_bytes(meta | {"tokenizer_sha256": digest}),
        }

    read({})
    return st.one_of(
        changed_json(meta).map(lambda file: {"meta.json": file}),
        changed_values(vocab).map(with_hash),
        changed_bytes(files["valid.bin"]).map(lambda file: {"valid.bin": file}),
        changed_bytes(files[second]).map(lambda file: {second: file}),
        changed_bytes(files[second], [files["valid.bin"]]).map(with_sums),
        changed_bytes(files["vocab.json"]).map(lambda file: {"vocab.json": file}),
    ), read
