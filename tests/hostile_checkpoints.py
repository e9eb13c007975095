"""Malicious checkpoints, and other files in their place; some try to waste memory."""

import copy
import hashlib
import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import torch

import train_shakespeare
from conftest import SENTENCES
from engine.checkpoint import load_model
from engine.models import build_model
from small_models import make_checkpoint
from system.errors import UserError
from text.tokenizer import BPETokenizer

BIG = 10**12
BPE_JSON = BPETokenizer.train(["some text"], 260).to_vocab()["tokenizer_json"]
BPE_JSON = BPE_JSON.replace('":3,', '": 3,', 1)


class Malice:
    """Unpickling it makes a directory."""

    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def state(tensor_of):
    """A change of the first layer's value projection."""

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


def laughs(depth=60):
    """A list that is small in memory but endless if written out (a "billion laughs" attack)."""
    value = ["ha"]
    for _ in range(depth):
        value = [value] * 10
    return value


def repeated(tensor):
    """A tensor of the same shape that takes one number in the file."""
    return torch.zeros(1).expand(tensor.shape)


def huge_model(checkpoint):
    """10^11 weights that agree with the config, and take one number in the file."""
    checkpoint["config"] |= {"hidden_dim": 10**6, "mlp_dim": 10**5, "num_heads": 2}
    with torch.device("meta"):
        shapes = build_model(checkpoint["config"]).state_dict()
    checkpoint["model_state"] = {name: repeated(tensor) for name, tensor in shapes.items()}


def one_layer_a_hundred_times(checkpoint):
    """A hundred layers that share the memory of one tensor."""
    checkpoint["config"]["num_layers"] = 100
    with torch.device("meta"):
        shapes = build_model(checkpoint["config"]).state_dict()
    storage = torch.zeros(10_000)
    checkpoint["model_state"] = {
        name: storage[: tensor.numel()].view(tensor.shape) for name, tensor in shapes.items()
    }


def first_release(**changes):
    """A change to a minimal first-release checkpoint, without radii, whose config has `changes`."""

    def change(checkpoint):
        settings = {"num_layers": 1, "num_heads": 1, "max_seq_len": 4, "model_type": "ngt"}
        state = {
            **{"token_emb.weight": torch.zeros(3, 4), "head.weight": torch.zeros(3, 4)},
            **{"coord_emb.weight": torch.zeros(4, 2)},
            **{"layers.0.ffn.net.0.weight": torch.zeros(8, 4)},
            **{"layers.0.attn.coord_proj_attn.weight": torch.zeros(2, 2)},
        }
        checkpoint.clear()
        checkpoint |= {"model_state": state, "config": settings | changes, "vocab": {}}

    return change


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


CONTENTS = {
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
    "more layers than weights": setting(num_layers=3),
    "a width as text": setting(hidden_dim="16"),
    "a width as a fraction": setting(hidden_dim=16.0),
    "heads as a boolean": setting(num_heads=True),
    "a switch as text": setting(mass_in_value="no"),
    "a radius of NaN": setting(radius=float("nan")),
    "an infinite radius": setting(radius=float("inf")),
    "an unknown law": setting(law="hooke"),
    "an unknown norm": setting(norm="maxnorm"),
    "a norm as a list": setting(norm=["rmsnorm"]),
    "parts without weights": setting(embedding_skip=True),
    "biases as a number": setting(bias=0),
    "a negative cap of the logits": setting(logit_softcap=-1.0),
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
    "infinite weights": state(lambda x: x / 0),
    "transposed weights": state(lambda x: x[:8]),
    "integer weights": state(lambda x: x.int()),
    "sparse weights": state(lambda x: x.to_sparse()),
    "weights that are text": state(lambda x: "x"),
    "missing weights": lambda c: c["model_state"].pop("norm.weight"),
    "additional weights": lambda c: c["model_state"].update(backdoor=torch.zeros(2)),
    "no vocabulary": vocabulary(None),
    "a vocabulary of numbers": vocabulary({"type": "char", "itos": [1, 2, 3]}),
    "a short vocabulary": vocabulary({"type": "char", "itos": ["a"], "stoi": {"a": 0}}),
    "a vocabulary of an unknown type": vocabulary({"type": "runes"}),
    "broken merges": vocabulary({"type": "bpe", "tokenizer_json": '{"model": {"type": "BPE"}}'}),
    "no JSON in the vocabulary": vocabulary({"type": "bpe", "tokenizer_json": "<script>"}),
    "deep JSON": vocabulary({"type": "bpe", "tokenizer_json": "[" * 100_000}),
    "an encoding that is a path": vocabulary({"type": "tiktoken", "encoding_name": "../../etc"}),
    "deeply nested": key(iter=nested(300)),
    "an exponent of 2^31": setting(exponent=(1 << 31) - 1),
    "a setting of a billion laughs": setting(hidden_dim=laughs()),
    "a kind of model of a billion laughs": setting(model_type=laughs()),
    "a format of a billion laughs": key(format_version=laughs()),
    "a step of a billion laughs": key(iter=laughs()),
    "a step of 10^5000": key(iter=10**5000),
    "a step before the first": key(iter=-1),
    "a best loss of NaN": key(best_val=float("nan")),
    "a best loss of minus infinity": key(best_val=float("-inf")),
    "weights beyond fp32": state(lambda x: x.double() * 1e300),
    "a tied head unlike its embedding": lambda c: c["model_state"].update(
        {"head.weight": c["model_state"]["head.weight"] + 1}
    ),
    "a text directory as a list": setting(token_directory=["/"]),
    "a vocabulary of a billion laughs": vocabulary({"type": laughs()}),
    "characters of a billion laughs": vocabulary({"type": "char", "itos": laughs()}),
    "an encoding of a billion laughs": vocabulary({"type": "tiktoken", "encoding_name": laughs()}),
    "JSON of a billion laughs": vocabulary({"type": "bpe", "tokenizer_json": laughs()}),
    "ids with a gap": vocabulary(
        {"type": "bpe", "tokenizer_json": BPE_JSON.replace(": 3,", ": 70000,", 1)}
    ),
    "negative ids": vocabulary(
        {"type": "bpe", "tokenizer_json": BPE_JSON.replace(": 3,", ": -3,", 1)}
    ),
    "weights that repeat themselves": state(repeated),
    "10^11 weights stored as one number": huge_model,
    "one layer a hundred times": one_layer_a_hundred_times,
    "first release of 10^12 layers": first_release(num_layers=BIG),
    "first release of no heads": first_release(num_heads=0),
    "first release with heads as text": first_release(num_heads="2"),
    "first release of a billion laughs": first_release(num_layers=laughs()),
}


def archive(entries, compression=zipfile.ZIP_STORED):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", compression) as file:
        for name, content in entries.items():
            file.writestr(name, content)
    return data.getvalue()


def sealed(data):
    """The archive with the seal that engine/sealed_file.py writes."""
    data = data[:-2] + struct.pack("<H", 71) + b"sha256:"
    return data + hashlib.sha256(data).hexdigest().encode()


def overlapping():
    """A zip whose entries share the same bytes, so that it unpacks to 100 times its size."""
    data = archive({"x/data.pkl": b"\0" * 100_000})
    start = data.index(b"PK\1\2")
    entry = data[start : data.index(b"PK\5\6")]
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 100, 100, 100 * len(entry), start, 0)
    return data[:start] + 100 * entry + end


FILES = {
    "a pickle": lambda: pickle.dumps(Malice()),
    "a pickle in an archive": lambda: archive({"x/data.pkl": pickle.dumps(Malice())}),
    "a bomb": lambda: archive({"x/data.pkl": b"\0" * 50_000_000}, zipfile.ZIP_DEFLATED),
    "path traversal": lambda: archive({"../../pwned/data.pkl": b"x", "x/version": b"3"}),
    "entries that overlap": overlapping,
    "sealed entries that overlap": lambda: sealed(overlapping()),
    "a sealed pickle": lambda: sealed(archive({"x/data.pkl": pickle.dumps(Malice())})),
    "something after the end": lambda: archive({"x/data.pkl": b"N."}) + b"#!/bin/sh",
    "an absolute path": lambda: archive({"/pwned": b"x"}),
    "an archive of nothing": lambda: archive({}),
    "a text": lambda: b"hello",
    "nothing": lambda: b"",
    "zeros": lambda: b"\0" * 10_000,
    "HTML": lambda: b"<html><script>alert(1)</script></html>",
}


def averages(change_of):
    """A change of the optimizer's averages of the first parameter."""

    def change(checkpoint):
        change_of(checkpoint["optimizer_state"]["state"][0])

    return change


def progress(**changes):
    def change(checkpoint):
        checkpoint["data_state"] |= changes

    return change


def number_state(value):
    def change(checkpoint):
        checkpoint["rng_state"]["torch"] = value

    return change


TRAINING = {
    "10^12 windows per step": setting(batch_size=BIG),
    "2^30 windows per step": setting(batch_size=1 << 30),
    "a negative number of windows": setting(batch_size=-1),
    "windows as text": setting(batch_size="4"),
    "windows of a billion laughs": setting(batch_size=laughs()),
    "a learning rate of NaN": setting(learning_rate=float("nan")),
    "a learning rate as text": setting(learning_rate="1e-3"),
    "a seed as a boolean": setting(seed=True),
    "a seed of 10^400": setting(seed=10**400),
    "no windows at all": setting(batch_size=None),
    "no device": setting(device=None),
    "no learning rate": setting(learning_rate=None),
    "10^12 micro-steps": setting(gradient_accumulation_steps=BIG),
    "a warm-up of 10^400 steps": setting(warmup_steps=10**400),
    "samples of 10^12 tokens": setting(sample_tokens=BIG),
    "a device without memory": setting(device="meta"),
    "text that never ends": setting(data_path="/dev/zero"),
    "a switch as a number": setting(use_amp=1),
    "steps as a list": setting(max_steps=[6]),
    "an unknown text": setting(dataset="/etc/passwd"),
    "a text path of 10^6 letters": setting(data_path="x" * 10**6),
    "a tokenizer written elsewhere": setting(tokenizer_path="planted.json"),
    "settings that lack a run": key(config={"model_type": "ngt"}),
    "another text's hash": setting(source_sha256="0" * 64),
    "a hash of a billion laughs": setting(source_sha256=laughs()),
    "averages of another shape": averages(lambda x: x.update(exp_avg=torch.zeros(3))),
    "averages of NaN": averages(lambda x: x["exp_avg_sq"].fill_(float("nan"))),
    "averages as text": averages(lambda x: x.update(exp_avg="x")),
    "integer averages": averages(lambda x: x.update(exp_avg=x["exp_avg"].long())),
    "negative squares": averages(lambda x: x["exp_avg_sq"].fill_(-1.0)),
    "a step below 0": averages(lambda x: x["step"].fill_(-5.0)),
    "no averages of any parameter": lambda c: c["optimizer_state"]["state"].clear(),
    "averages of another optimizer": averages(lambda x: x.update(momentum_buffer=1)),
    "averages of the other optimizer": setting(optimizer="muon"),
    "an unknown optimizer": setting(optimizer="lion"),
    "an unknown recipe": setting(recipe="stale"),
    "averages of parameter -1": lambda c: c["optimizer_state"]["state"].update({-1: {}}),
    "averages of parameter 10^12": lambda c: c["optimizer_state"]["state"].update({BIG: {}}),
    "no optimizer state": key(optimizer_state=None),
    "an optimizer as a list": key(optimizer_state=[1]),
    "no random numbers": key(rng_state={}),
    "random numbers as text": number_state("x"),
    "too few random numbers": number_state(torch.zeros(5, dtype=torch.uint8)),
    "random numbers of zeros": number_state(torch.zeros(5056, dtype=torch.uint8)),
    "progress as text": progress(tokens="many"),
    "progress of NaN": progress(wall_time=float("nan")),
    "progress of a billion laughs": progress(tokens=laughs()),
    "no progress": key(data_state=None),
}
"""Changes of a trained checkpoint, from which training is then resumed."""


def attempt_checkpoint(change):
    """The error of `load_model` for a changed checkpoint; empty if it is accepted."""
    make_checkpoint("x.pt")
    contents = torch.load("x.pt", weights_only=True)
    change(contents)
    torch.save(contents, "evil.pt")
    return error_of(lambda: load_model("evil.pt"))


def attempt_file(data):
    """The error of `load_model` for a file of these bytes."""
    Path("evil.pt").write_bytes(data)
    return error_of(lambda: load_model("evil.pt"))


def train_a_little():
    """The checkpoint c/evil_last.pt of two training steps."""
    Path("text.txt").write_text("".join(SENTENCES) * 100)
    flags = ("--data-path", "text.txt", "--checkpoint-path", "c/evil", "--max-steps", 2)
    flags += ("--hidden-dim", 16, "--num-layers", 1, "--num-heads", 2, "--block-size", 8)
    assert train_shakespeare.main([*map(str, flags)]) == 0
    return torch.load("c/evil_last.pt", weights_only=True)


def attempt_resume(trained, change):
    """The error of resuming from a changed checkpoint; empty if it is accepted."""
    contents = copy.deepcopy(trained)
    change(contents)
    torch.save(contents, "c/evil_last.pt")
    flags = ("--checkpoint-path", "c/evil", "--resume", "--max-steps", "4")
    return error_of(lambda: train_shakespeare.main([*flags]))


def error_of(function):
    """The message of the `UserError` that a function raises; empty if it raises none."""
    try:
        function()
    except UserError as error:
        return str(error)
    return ""
