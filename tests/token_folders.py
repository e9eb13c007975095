"""Prepares a text without printing, and reads the token files by hand."""

import json

import numpy as np

from text import preparation

TINY_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def prepare(*args, **settings):
    """prepare_data without its lines for the user."""
    return preparation.prepare_data(*args, **{"say": lambda line: None, **settings})


def read_tokens(directory, split):
    """A token file's ids, read by hand: 2 or 4 bytes each, the lowest first."""
    dtype = json.loads((directory / "meta.json").read_text())["dtype"]
    assert dtype in ("<u2", "<u4")
    raw = (directory / f"{split}.bin").read_bytes()
    size = int(dtype[2])
    digits = np.frombuffer(raw, dtype=np.uint8).reshape(-1, size).astype(np.int64)
    return (digits << (8 * np.arange(size))).sum(axis=1)


def read_text(directory, split):
    """The text of a char token file, by the vocabulary as it lies on disk."""
    itos = json.loads((directory / "vocab.json").read_text(encoding="utf-8"))["itos"]
    return "".join(itos[i] for i in read_tokens(directory, split))


def listing(folder):
    """Everything below a folder: path -> (bytes, time of writing)."""
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}
