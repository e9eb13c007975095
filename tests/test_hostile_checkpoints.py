"""Files made to do harm or to waste memory: each is refused in one line, and quickly."""

import io
import os
import pickle
import time
import zipfile

import pytest
import torch

from checkpoint import load_model, read_checkpoint
from errors import UserError
from test_chat import LETTERS, make_checkpoint

BIG = 10**12


class Malice:
    """Unpickled, it would make a directory."""

    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def state(tensor_of):
    """Change the first block's value projection."""

    def change(checkpoint):
        name = "layers.0.attn.v_proj.weight"
        checkpoint["model_state"][name] = tensor_of(checkpoint["model_state"][name])

    return change


def setting(**changes):
    def change(checkpoint):
        checkpoint["config"] |= changes

    return change


def vocabulary(vocab):
    def change(checkpoint):
        checkpoint["vocab"] = vocab

    return change


def key(**changes):
    def change(checkpoint):
        checkpoint |= changes

    return change


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


HOSTILE = {
    "10^12 channels": setting(hidden_dim=BIG),
    "10^12 layers": setting(num_layers=BIG),
    "10^9 layers": setting(num_layers=10**9),
    "10^12 heads": setting(num_heads=BIG),
    "10^12 tokens": setting(vocab_size=BIG),
    "10^9 in the feed-forward": setting(mlp_dim=10**9),
    "10^9 coordinates": setting(coord_dim=10**9),
    "10^9 coordinates a head": setting(head_coord_dim=10**9),
    "no layers": setting(num_layers=0),
    "a negative width": setting(hidden_dim=-16),
    "more layers than there are": setting(num_layers=3),
    "a width as text": setting(hidden_dim="16"),
    "a width as a fraction": setting(hidden_dim=16.0),
    "a width as truth": setting(num_heads=True),
    "a switch as text": setting(mass_in_value="no"),
    "a radius of NaN": setting(radius=float("nan")),
    "an endless radius": setting(radius=float("inf")),
    "an unknown law": setting(law="hooke"),
    "a law as a list": setting(law=["newton"]),
    "an unknown kind of model": setting(model_type="gpt"),
    "no kind of model": setting(model_type=None),
    "the other model": setting(model_type="vanilla"),
    "no settings": key(config=None),
    "settings as a list": key(config=[1, 2]),
    "weights as a list": key(model_state=[torch.zeros(2)]),
    "an unknown key": key(shellcode="rm"),
    "an unknown format": key(format_version=99),
    "a format as text": key(format_version="2"),
    "NaN weights": state(lambda x: x * float("nan")),
    "endless weights": state(lambda x: x / 0),
    "transposed weights": state(lambda x: x[:8]),
    "weights of whole numbers": state(lambda x: x.int()),
    "sparse weights": state(lambda x: x.to_sparse()),
    "weights that are text": state(lambda x: "x"),
    "weights missing": lambda c: c["model_state"].pop("norm.weight"),
    "weights too many": lambda c: c["model_state"].update(backdoor=torch.zeros(2)),
    "no vocabulary": vocabulary(None),
    "a vocabulary of numbers": vocabulary({"type": "char", "itos": [1, 2, 3]}),
    "a short vocabulary": vocabulary({"type": "char", "itos": ["a"], "stoi": {"a": 0}}),
    "a vocabulary of an unknown type": vocabulary({"type": "runes"}),
    "broken merges": vocabulary({"type": "bpe", "tokenizer_json": '{"model": {"type": "BPE"}}'}),
    "no JSON": vocabulary({"type": "bpe", "tokenizer_json": "<script>"}),
    "deep JSON": vocabulary({"type": "bpe", "tokenizer_json": "[" * 100_000}),
    "an encoding that is a path": vocabulary({"type": "tiktoken", "encoding_name": "../../etc"}),
    "deeply nested": key(iter=nested(300)),
}


@pytest.fixture
def good(in_tmp):
    make_checkpoint("x.pt")
    load_model("x.pt")
    return torch.load("x.pt", weights_only=True)


def refused(path):
    """The line that `load_model` refuses a file with, within a second or two."""
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        load_model(path)
    assert time.monotonic() - started < 10
    assert not os.path.exists("pwned")
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 500
    return message


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_contents(name, good):
    HOSTILE[name](good)
    torch.save(good, "evil.pt")
    refused("evil.pt")


def archive(entries, compression=zipfile.ZIP_STORED):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", compression) as file:
        for name, content in entries.items():
            file.writestr(name, content)
    return data.getvalue()


FILES = {
    "a pickle": lambda: pickle.dumps(Malice()),
    "a pickle in an archive": lambda: archive({"x/data.pkl": pickle.dumps(Malice())}),
    "a bomb": lambda: archive({"x/data.pkl": b"\0" * 50_000_000}, zipfile.ZIP_DEFLATED),
    "path traversal": lambda: archive({"../../pwned/data.pkl": b"x", "x/version": b"3"}),
    "an absolute path": lambda: archive({"/pwned": b"x"}),
    "an archive of nothing": lambda: archive({}),
    "a text": lambda: b"hello",
    "nothing": lambda: b"",
    "zeros": lambda: b"\0" * 10_000,
    "HTML": lambda: b"<html><script>alert(1)</script></html>",
}


@pytest.mark.parametrize("name", FILES)
def test_hostile_files(name, in_tmp):
    (in_tmp / "evil.pt").write_bytes(FILES[name]())
    refused("evil.pt")


def test_a_global_in_the_pickle(good):
    """What `torch.load` itself would run without `weights_only`."""
    good["vocab"] = Malice()
    torch.save(good, "evil.pt")
    assert "could run code" in refused("evil.pt")


def test_older_checkpoints_are_read(good):
    """One written before there was retardation says nothing of it, and has none."""
    config = {k: v for k, v in good["config"].items() if k != "retardation"}
    torch.save(good | {"config": config}, "quiet.pt")
    assert load_model("quiet.pt")[0].config.retardation
    weights = {k: v for k, v in good["model_state"].items() if "retardation" not in k}
    torch.save(good | {"config": config, "model_state": weights}, "older.pt")
    model, tokenizer, _ = load_model("older.pt")
    assert not model.config.retardation and tokenizer.vocab_size == LETTERS.vocab_size
    assert read_checkpoint("older.pt")["iter"] == 7
