"""Token files in several shards: the same ids in the same order, whatever happens meanwhile."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import ROOT
from data import eval_batches, get_batch
from text import shards, token_files
from text.shards import ShardedTokens
from token_folders import listing, prepare


def test_batches_do_not_depend_on_shards(in_tmp, small_text, monkeypatch):
    """In 1 shard and in 7: the same bytes on disk, the same batches bit for bit."""
    whole = prepare("text", str(small_text))
    shutil.move(whole.directory, "whole")
    whole = token_files.open_token_data("whole")
    monkeypatch.setattr(shards, "SHARD_TOKENS", len(whole.train) // 7 + 1)
    cut = prepare("text", str(small_text))
    names = [f"train-{number:05}.bin" for number in range(7)]
    assert sorted(p.name for p in cut.directory.iterdir()) == [
        *("meta.json", "test.bin", *names, "valid.bin", "vocab.json")
    ]
    contents = [(cut.directory / name).read_bytes() for name in names]
    assert b"".join(contents) == Path("whole/train.bin").read_bytes()
    assert cut.meta["splits"]["train"].pop("shards") == [
        {"tokens": len(c) // 2, "sha256": hashlib.sha256(c).hexdigest()} for c in contents
    ]
    assert cut.meta == whole.meta
    for step in range(20):
        for one, seven in zip(
            get_batch(whole.train, 8, 100, 1337, step, step % 3),
            get_batch(cut.train, 8, 100, 1337, step, step % 3),
            strict=True,
        ):
            assert torch.equal(one, seven)
    batches = (eval_batches(tokens, 64, 100, 9) for tokens in (whole.train, cut.train))
    for (inputs, targets), (others, goals) in zip(*batches, strict=True):
        assert torch.equal(inputs, others) and torch.equal(targets, goals)


@pytest.mark.parametrize("cuts", [[1, 2, 3], [50, 51, 90], [99]])
def test_shards_read_like_an_array(cuts):
    """Numbers, slices and arrays of numbers give what numpy gives for the whole."""
    whole = np.random.default_rng(0).integers(0, 9999, 100).astype("<u2")
    tokens = ShardedTokens(np.split(whole, cuts))
    assert len(tokens) == 100 and np.array_equal(np.asarray(tokens), whole)
    grid = np.arange(100).reshape(4, 25)[:, ::-1]
    for index in (
        *(0, 99, -1, -100, np.int64(51), slice(None), slice(5, 5), slice(49, 92), slice(-7, 500)),
        *(slice(90, 2, -3), slice(60, 40), grid, grid - 100, np.arange(0), [3, 1, 98]),
    ):
        found = tokens[index]
        assert np.array_equal(found, whole[index]) and found.dtype == whole.dtype
        assert np.shape(found) == np.shape(whole[index])
    for index in (100, -101, [0, 100]):
        with pytest.raises(IndexError):
            tokens[index]


KILLED = """
import os, random, signal, sys, time
from text import preparation, shards, stream, token_files, tokenizer
stream.PIECE_CHARS = 100
shards.SHARD_TOKENS = 3000
token_files.BATCH_PIECES, token_files.NOTE_SECONDS = 1, 0
encode = tokenizer.CharTokenizer.encode_array

def slowly(self, texts):
    time.sleep(0.002)
    return encode(self, texts)

def written():
    return len([*token_files.Path("data").glob("tokens/*.partial/train*.bin")])

tokenizer.CharTokenizer.encode_array = slowly
rng, signals = random.Random(int(sys.argv[1])), [signal.SIGKILL] * 4 + [signal.SIGINT]
for number in signals:
    child = os.fork()
    if not child:
        try:
            preparation.prepare_data("text", "books")
        except KeyboardInterrupt:
            os._exit(130)
        os._exit(0)
    while not written():
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.2))
    asked = time.monotonic()
    os.kill(child, number)
    _, status = os.waitpid(child, 0)
    print("ENDED", os.waitstatus_to_exitcode(status), written(), time.monotonic() - asked < 3)
preparation.prepare_data("text", "books")
"""


def test_killed_at_random_moments(in_tmp):
    """SIGKILL and Ctrl-C again and again leave shards that the next call goes on after; in the end
    the token files are byte for byte those of a call that nobody disturbed."""
    rng = random.Random(1)
    Path("books").mkdir()
    for name in range(60):
        words = ("".join(rng.choices("abcdé ", k=9)) + "\n" for _ in range(100))
        Path(f"books/{name:02}.txt").write_text("".join(words))
    seed = random.randrange(10**6)
    result = subprocess.run(
        [sys.executable, "-c", KILLED, str(seed)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, f"seed {seed}: {result.stderr[-2000:]}"
    ends = [line.split()[1:] for line in result.stdout.splitlines() if line.startswith("ENDED")]
    assert [code for code, *_ in ends] == ["-9"] * 4 + ["130"], f"seed {seed}: {ends}"
    assert all(int(count) and within == "True" for _, count, within in ends), f"{seed}: {ends}"
    assert "continuing " in result.stdout, f"seed {seed}"
    (directory,) = Path("data/tokens").iterdir()
    killed = {path.name: content for path, (content, _) in listing(directory).items()}
    assert len(killed) > 15 and len(killed["train-00000.bin"]) == 6000
    shutil.rmtree("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_TOKENS", 3000)
        prepare("text", "books")
    undisturbed = {path.name: content for path, (content, _) in listing(directory).items()}
    assert undisturbed == killed, f"seed {seed}"


def test_a_partial_without_a_shard_begins_again(in_tmp, small_text, monkeypatch):
    """Somebody removed or cut a shard of an interrupted call: that split is encoded anew."""
    monkeypatch.setattr(shards, "SHARD_TOKENS", 3000)
    directory = prepare("text", str(small_text)).directory
    whole = {path.name: content for path, (content, _) in listing(directory).items()}
    partial = directory.with_name(f"{directory.name}.partial")
    for damage in (lambda p: p.unlink(), lambda p: p.write_bytes(b"\0")):
        directory.rename(partial)
        meta = json.loads((partial / "meta.json").read_text())
        (partial / "meta.json").unlink()
        source = {key: meta[key] for key in ("format_version", "source_sha256", "source_bytes")}
        source |= {"piece_chars": 1 << 16, "line_ends": "LF", "shard_tokens": 3000}
        splits = {
            name: {"pieces": 1, "tokens": 20_000, "bytes": split["bytes"], "encoded_bytes": 20_000}
            if name == "train"
            else {"pieces": 0, "tokens": 0, "bytes": split["bytes"], "encoded_bytes": 0}
            for name, split in meta["splits"].items()
        }
        noted = {"source": source, "splits": splits, "text_changes": []}
        (partial / "progress.json").write_text(json.dumps(noted))
        damage(partial / "train-00002.bin")
        lines = []
        assert prepare("text", str(small_text), say=lines.append).directory == directory
        assert any("continuing" in line for line in lines)
        assert {path.name: content for path, (content, _) in listing(directory).items()} == whole
