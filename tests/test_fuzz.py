"""Thousands of changed files of every format that people exchange: none harms, none takes long.

A file is refused with one line, or it is accepted and then holds what its format promises.
"""

import json
import lzma
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings

import exchanged_models as models
import exchanged_texts as texts
from engine.models import weightless_model
from engine.wikitext import PAIRS, detokenized, read_wikitext
from hostile_requests import chat_requests
from reporting.runs import load_run
from run_folders import CONFIG, write_run
from system.errors import UserError
from system.machine import peak_memory_bytes
from system.safe_text import one_line
from test_hostile_files import reset_peak_memory
from text.token_files import open_token_data
from text.tokenizer import tokenizer_from_vocab
from token_folders import prepare
from training.config import resolve
from training.config_file import take_from_file
from training.options import train_parser

FORMATS = {
    "checkpoint": (models.checkpoint, 2500, 30),
    "resumed": (models.resumed, 300, 0),
    "tokenizer": (models.tokenizer, 1500, 40),
    "config": (models.config, 1200, 40),
    "run folder": (models.run_folder, 1000, 40),
    "exported folder": (models.exported_folder, 800, 20),
    "token files": (texts.token_files, 1000, 40),
    "text": (texts.text, 800, 40),
    "wiki file": (texts.wiki_file, 500, 30),
    "rows": (texts.rows, 800, 40),
    "chat": (chat_requests, 1000, 20),
}
"""Per format: its function, and how many cases the slow and the ordinary suite try."""
MOST_SECONDS = 2  # of processor time, which a busy machine does not change
MOST_BYTES = 1 << 30


def attempt(read, case):
    """Read one case within the limits of time and memory: "accepted" or "refused"."""
    reset_peak_memory()
    before, started = peak_memory_bytes(torch.device("cpu")), time.process_time()
    try:
        read(case)
        result = "accepted"
    except UserError as error:
        line = one_line(str(error))
        assert line.isprintable() and 0 < len(line) < 500
        result = "refused"
    assert time.process_time() - started < MOST_SECONDS
    assert peak_memory_bytes(torch.device("cpu")) - before < MOST_BYTES
    return result


def try_cases(make, count):
    """How many of so many cases were accepted and refused: always the same cases."""
    cases, read, *close = make()
    found = Counter()

    @seed(21)
    @settings(
        max_examples=count, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(cases)
    def try_one(case):
        found[attempt(read, case)] += 1

    try:
        try_one()
    finally:
        for function in close:
            function()
    return found


@pytest.mark.parametrize("name", [name for name, (_, _, few) in FORMATS.items() if few])
def test_a_few(name, in_tmp):
    make, _, few = FORMATS[name]
    found = try_cases(make, few)
    assert found["refused"] > 0 and found.total() >= few


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_ten_thousand(name, in_tmp, capsys):
    make, many, _ = FORMATS[name]
    found = try_cases(make, many)
    with capsys.disabled():
        print(f"\n{name}: {found['accepted']:,} accepted, {found['refused']:,} refused")
    assert found["refused"] > 0 and found.total() >= many


def test_they_are_ten_thousand():
    assert sum(many for _, many, _ in FORMATS.values()) >= 10_000


def with_settings(**changes):
    """The error of a config.json with these settings, for --config."""
    settings = {"model_type": "ngt", "dataset": "text", "hidden_dim": 16, "num_heads": 2} | changes
    Path("evil.json").write_text(json.dumps(settings))
    args = train_parser("", "").parse_args(["--config", "evil.json"])
    take_from_file(args)
    weightless_model(resolve(args) | {"vocab_size": 100})


def with_source(**changes):
    """Open token files whose meta.json has these values."""
    directory = prepare("text", models.write_text()).directory
    meta = json.loads((directory / "meta.json").read_text()) | changes
    (directory / "meta.json").write_text(json.dumps(meta))
    open_token_data(directory)


def with_run(**files):
    write_run("evil", [3.0])
    for name, data in files.items():
        Path("runs/evil", name.replace("_json", ".json")).write_text(data)
    load_run(Path("runs/evil"), "evil")


def packed_wikitext():
    """20 million letters in a file of 3 kB."""
    Path("evil.xz").write_bytes(lzma.compress(b"a" * 20_000_000))
    read_wikitext(Path("evil.xz"))


FOUND = {
    "a billion layers": lambda: with_settings(num_layers=10**9),
    "sizes whose product overflows": lambda: with_settings(hidden_dim=1 << 31, mlp_dim=1 << 31),
    "a size of 10^400": lambda: with_settings(num_parameters=10**400),
    "a path with a zero byte": lambda: with_settings(tokenizer_path="a\0b"),
    "a choice of 3,000 letters": lambda: with_settings(recipe="x" * 3000),
    "a choice of nested lists": lambda: with_settings(norm=[["x" * 3000]]),
    "token files without a source": lambda: with_source(source=None),
    "token files without a hash": lambda: with_source(source_sha256=1),
    "a text of 10^400 bytes": lambda: with_source(
        splits={name: {"tokens": 1, "bytes": 10**400} for name in ("train", "valid")}
    ),
    "a vocabulary's type of 3,000 letters": lambda: tokenizer_from_vocab({"type": "x" * 3000}),
    "a run's config of deep JSON": lambda: with_run(config_json="[" * 100_000),
    "a run with a rate of 10^400": lambda: with_run(
        config_json=json.dumps(CONFIG | {"learning_rate": 10**400})
    ),
    "a packed WikiText file": packed_wikitext,
}
"""What the fuzz found: each crashed, took long, or printed pages, and is refused since."""


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found(name, in_tmp):
    assert attempt(lambda make: make(), FOUND[name]) == "refused"


def test_only_a_point_becomes_a_point():
    """The expression for " @.@ " once took any character for the point."""
    assert detokenized("3 @.@ 5 and 3 @/@ 5") == "3.5 and 3 @/@ 5"


def test_brackets_and_spaces():
    """The published expressions need hours for these; with an end, the spaces go."""
    for opening, closing in PAIRS:
        spaces = " " * 30_000
        started = time.process_time()
        assert detokenized(f"{opening}{spaces}x{spaces}{closing}") == f"{opening}x{closing}"
        assert len(detokenized(f"a{opening}{spaces}")) == 30_002
        assert detokenized(opening * 30_000).count(opening) == 30_000
        assert time.process_time() - started < MOST_SECONDS


def test_a_source_cannot_control_the_terminal(in_tmp):
    directory = prepare("text", models.write_text()).directory
    meta = json.loads((directory / "meta.json").read_text()) | {"source": "\x1b[2Jtext\nerror: x"}
    (directory / "meta.json").write_text(json.dumps(meta))
    assert open_token_data(directory).meta["source"] == "\\x1b[2Jtext error: x"
