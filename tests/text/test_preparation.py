"""Preparing a text: once for all processes, reused later, continued after an interruption."""

import errno
import hashlib
import itertools
import json
import lzma
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT, error_line, left_behind, run
from sample_texts import OFFLINE
from system.errors import UserError
from text import corpora as text_corpora
from text import preparation, stream
from text import token_files as text_token_files
from text.token_files import open_token_data
from text.tokenizer import BPETokenizer, CharTokenizer, TiktokenTokenizer
from token_folders import listing, prepare, read_text, read_tokens


@pytest.mark.parametrize("kind", ["char", "bpe", "tiktoken"])
def test_second_call_reuses(in_tmp, small_text, monkeypatch, kind):
    """The second call writes nothing, trains nothing and does not read the text."""
    settings = dict(bpe_vocab_size=280, tiktoken_encoding=OFFLINE)
    first = prepare("text", str(small_text), kind, **settings)
    before = listing(in_tmp)
    for name in ("encode", "encode_array"):
        for tokenizer in (CharTokenizer, BPETokenizer, TiktokenTokenizer):
            monkeypatch.setattr(tokenizer, name, lambda *a: pytest.fail("encoded"))
    monkeypatch.setattr(text_corpora, "read_file", lambda *a: pytest.fail("read the text"))
    again = prepare("text", str(small_text), kind, **settings)
    assert again.directory == first.directory
    assert np.array_equal(again.train, first.train) and len(again.train) > 1000
    assert listing(in_tmp) == before


def test_changed_text_is_not_reused(in_tmp):
    """The same path with other content gives other token files."""
    Path("own.txt").write_text("abc\n" * 100)
    first = prepare("text", "own.txt").directory
    Path("own.txt").write_text("abd\n" * 100)
    second = prepare("text", "own.txt").directory
    assert first != second
    assert read_text(second, "train") == "abd\n" * 90
    assert read_text(first, "train") == "abc\n" * 90


INTERRUPTIONS = {
    "Ctrl-C": (KeyboardInterrupt(), KeyboardInterrupt),
    "no space": (OSError(errno.ENOSPC, "No space left on device"), UserError),
    "no memory": (MemoryError(), MemoryError),
}


@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("how", INTERRUPTIONS)
def test_interrupted_encoding_goes_on(in_tmp, small_text, monkeypatch, kind, how):
    """Stopped half-way, no file is taken as complete, and nothing is encoded twice."""
    raised, seen = INTERRUPTIONS[how]
    tokenizer = CharTokenizer if kind == "char" else BPETokenizer
    whole = prepare("text", str(small_text), kind, 280).directory
    expected = {path.name: content for path, (content, _) in listing(whole).items()}
    shutil.rmtree(in_tmp / "data")
    encode, calls = tokenizer.encode_array, []

    def encode_some(self, texts):
        calls.append(texts)
        if len(calls) == 100:
            raise raised
        return encode(self, texts)

    monkeypatch.setattr(stream, "PIECE_CHARS", 100)
    monkeypatch.setattr(text_token_files, "BATCH_PIECES", 1)
    monkeypatch.setattr(text_token_files, "NOTE_SECONDS", 0)
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "encode_array", encode_some)
        with pytest.raises(seen) as error:
            prepare("text", str(small_text), kind, 280)
    (partial,) = list((in_tmp / "data" / "tokens").iterdir()) or [None]
    if seen is UserError:
        assert "No space left on device" in str(error.value)
        assert "\n" not in str(error.value)
        assert partial is None, "half-written files are left behind"
        again = len(calls)
    else:
        assert partial.name.endswith(".partial") and not (partial / "meta.json").exists()
        with pytest.raises(UserError):
            open_token_data(partial)
        again = len(calls) - 3  # two more were under way, and one was not written yet
        monkeypatch.setattr(tokenizer, "train", lambda *a, **k: pytest.fail("trained again"))
    lines, counted = [], []

    def encode_counted(self, texts):
        counted.append(texts)
        return encode(self, texts)

    monkeypatch.setattr(tokenizer, "encode_array", encode_counted)
    prepared = prepare("text", str(small_text), kind, 280, say=lines.append)
    pieces = sum(len(list(stream.pieces([part]))) for part in split_text(small_text))
    if partial is not None:
        assert len(counted) <= pieces - again + 3
        assert any("continuing " in line for line in lines)
    else:
        assert len(counted) == pieces
    assert not partial or not partial.exists()
    text = prepared.tokenizer.decode(read_tokens(prepared.directory, "train").tolist())
    assert text == small_text.read_text()[: 24000 * 9 // 10]
    # the same text with the same tokenizer gives the same bytes, however often interrupted
    if kind == "char":
        written = {path.name: content for path, (content, _) in listing(whole).items()}
        assert written == expected


def split_text(path):
    text = path.read_text()
    ends = [0, *(int(len(text) * share) for share in (0.9, 0.95, 1.0))]
    return [text[start:end] for start, end in itertools.pairwise(ends)]


def test_killed_while_encoding(in_tmp, small_text):
    """kill -9 in the middle of a real process: the next call ends with the same bytes."""
    script = (
        "import os\nfrom text import preparation, stream, token_files, tokenizer\n"
        "stream.PIECE_CHARS = 100\n"
        "token_files.BATCH_PIECES = 1; token_files.NOTE_SECONDS = 0\n"
        "encode, calls = tokenizer.BPETokenizer.encode_array, []\n"
        "def encode_array(self, texts):\n"
        "    calls.append(1)\n"
        "    if len(calls) == STOP: os.kill(os.getpid(), 9)\n"
        "    return encode(self, texts)\n"
        "tokenizer.BPETokenizer.encode_array = encode_array\n"
        f"preparation.prepare_data('text', {str(small_text)!r}, 'bpe', 280)\n"
        "print('encoded', len(calls))\n"
    )
    codes, outputs = [], []
    for stop in (60, 0):
        result = subprocess.run(
            [sys.executable, "-c", script.replace("STOP", str(stop))],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        codes.append(result.returncode)
        outputs.append(result.stdout)
    assert codes == [-9, 0], outputs
    pieces = sum(len(list(stream.pieces([part]))) for part in split_text(small_text))
    assert "continuing " in outputs[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "PIECE_CHARS", 100)
        pieces = sum(len(list(stream.pieces([part]))) for part in split_text(small_text))
    assert int(outputs[1].split("encoded")[1]) <= pieces - 60 + 3
    (directory,) = (in_tmp / "data" / "tokens").iterdir()
    killed = {path.name: content for path, (content, _) in listing(directory).items()}
    shutil.rmtree(in_tmp / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "PIECE_CHARS", 100)
        prepare("text", str(small_text), "bpe", 280)
    assert {path.name: content for path, (content, _) in listing(directory).items()} == killed


def test_a_partial_of_another_text_is_not_gone_on_with(in_tmp, small_text):
    """What an interrupted call of another text left under this name, or damaged, is dropped."""
    first = prepare("text", str(small_text)).directory
    expected = read_text(first, "train")
    for damage in ("source", "short", "garbage"):
        partial = first.with_name(f"{first.name}.partial")
        first.rename(partial)
        (partial / "meta.json").unlink()
        source = {"format_version": 1, "source_bytes": 24_000}
        source |= {"source_sha256": "0" * 64, "piece_chars": stream.PIECE_CHARS}
        if damage != "source":
            source["source_sha256"] = hashlib.sha256(small_text.read_bytes()).hexdigest()
        done = {"pieces": 1, "tokens": 21_600, "bytes": 21_600, "encoded_bytes": 20_000}
        rest = {"pieces": 0, "tokens": 0, "bytes": 1_200, "encoded_bytes": 0}
        splits = {"train": done, "valid": rest, "test": rest}
        noted = json.dumps({"source": source, "splits": splits})
        (partial / "progress.json").write_text("{" if damage == "garbage" else noted)
        (partial / "train.bin").write_bytes(b"\7\0" * (10 if damage == "short" else 21_600))
        prepared = prepare("text", str(small_text))
        assert prepared.directory == first and not partial.exists()
        assert read_text(first, "train") == expected


def test_two_processes_prepare_once(in_tmp, small_text):
    """Started at once, one prepares, the others wait, say so, and use the same files."""
    script = (
        "import sys, time\nfrom text import preparation, tokenizer\n"
        "train = tokenizer.BPETokenizer.train\n"
        "def slowly(*a, **k):\n"
        "    print('TRAINED', flush=True); time.sleep(3); return train(*a, **k)\n"
        "tokenizer.BPETokenizer.train = slowly\n"
        "print('READY', flush=True); sys.stdin.readline()\n"
        f"preparation.prepare_data('text', {str(small_text)!r}, 'bpe', 280)\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout.readline() == "READY\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sum("TRAINED" in output for output in outputs) == 1
    assert sum("waiting: another process is preparing" in output for output in outputs) == 2


@pytest.mark.parametrize("limit", [500, 30_000, 43_190, 46_000])
def test_a_full_disk_is_noticed(in_tmp, limit):
    """If the system refuses to write more, no incomplete token file is used."""
    text = "abcdefgh\n" * 2400 + "ab"
    Path("train.txt").write_text(text)
    Path("valid.txt").write_text(text * 2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(UserError, match="cannot be written"):
            prepare("text", str(in_tmp))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((in_tmp / "data" / "tokens").iterdir())
    assert read_text(prepare("text", str(in_tmp)).directory, "valid") == text * 2


def test_data_that_is_no_directory(in_tmp, small_text):
    """A file named data is in the way: one error, and the file stays."""
    Path("data").write_text("mine")
    with pytest.raises(UserError, match="cannot be written"):
        prepare("text", str(small_text))
    assert Path("data").read_text() == "mine"


def test_one_long_word_can_be_interrupted(in_tmp):
    """3 MB of DNA: progress is shown within seconds, and Ctrl-C ends it while pairs are merged."""
    rng = random.Random(2)
    Path("dna.txt").write_text("".join(rng.choices("ACGT", k=3_000_000)))
    command = ("--dataset", "text", "--data-path", "dna.txt", "--tokenizer", "bpe")
    with open("errors", "wb") as errors:
        process = subprocess.Popen(
            [sys.executable, ROOT / "prepare_data.py", *command, "--bpe-vocab-size", "20000"],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    assert "corpus" in process.stdout.readline() and "training" in process.stdout.readline()
    begun = time.monotonic()
    while not Path("errors").read_bytes():
        assert time.monotonic() - begun < 4  # 2 on a quiet machine
        time.sleep(0.01)
    while b"merging pairs" not in Path("errors").read_bytes():
        assert process.poll() is None
        time.sleep(0.01)
    asked = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert time.monotonic() - asked < 3
    assert process.returncode == 130
    assert "Traceback" not in Path("errors").read_text() and not left_behind()


def test_a_batch_of_long_lines_is_no_larger(in_tmp, monkeypatch):
    """Lines of a million characters: what one call encodes stays small, as Ctrl-C waits for it."""
    Path("train.txt").write_text(("x" * (1 << 20) + "\n") * 6)
    Path("valid.txt").write_text("x\n")
    sizes, encode = [], CharTokenizer.encode_array

    def sized(self, texts):
        sizes.append(sum(map(len, texts)))
        return encode(self, texts)

    monkeypatch.setattr(CharTokenizer, "encode_array", sized)
    prepared = prepare("text", str(in_tmp))
    assert len(prepared.train) == 6 * ((1 << 20) + 1)
    assert max(sizes) < 2 * text_token_files.BATCH_CHARS == 1 << 22


def test_memory_does_not_grow_with_the_text(in_tmp):
    """120 MB of text, from a small archive, within 300 MB above what the program itself takes."""
    Path("train.txt.xz").write_bytes(lzma.compress(b"the same line again\n" * 6_000_000, preset=0))
    Path("valid.txt").write_text("the same line again\n" * 100)
    script = (
        "import torch; from text import preparation\n"
        "from system.machine import peak_memory_bytes as peak\n"
        "before = peak(torch.device('cpu'))\n"
        "ready = preparation.prepare_data('text', '.', 'char')\n"
        "print('grown by', peak(torch.device('cpu')) - before, len(ready.train))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    grown, tokens = map(int, result.stdout.split("grown by")[1].split())
    assert tokens == 120_000_000
    assert grown < 300e6, f"{grown:,}"


def test_a_large_text_trains_on_a_sample(in_tmp, small_text, monkeypatch):
    """Above SAMPLE_BYTES every k-th piece, evenly spread; the tokenizer of smaller texts stays."""
    monkeypatch.setattr(stream, "PIECE_CHARS", 100)
    pieces = list(stream.pieces([small_text.read_text()[:21_600]]))
    whole = prepare("text", str(small_text), "bpe", 300)
    assert whole.tokenizer.fingerprint == BPETokenizer.train(pieces, 300).fingerprint
    shutil.rmtree("data")
    monkeypatch.setattr(preparation, "SAMPLE_BYTES", 21_599 // 6)
    sample = BPETokenizer.train(pieces[::7], 300).fingerprint
    lines = []
    assert (
        prepare("text", "small.txt", "bpe", 300, say=lines.append).tokenizer.fingerprint == sample
    )
    assert any("a sample, one of every 7 pieces" in line for line in lines)
    shutil.rmtree("data")
    assert prepare("text", "small.txt", "bpe", 300, "tok.json").tokenizer.fingerprint == sample
    assert sample != whole.tokenizer.fingerprint


def test_a_mismatch_says_why(in_tmp):
    """Changed text, or token files whose JSON names another source: encoded again, with why."""
    Path("own.txt").write_text("abc\n" * 100)
    first = prepare("text", "own.txt").directory
    Path("own.txt").write_text("abd\n" * 100)
    lines = []
    second = prepare("text", "own.txt", say=lines.append).directory
    assert any("no longer" in line and str(first) in line for line in lines)
    for key, value, word in (("source_bytes", 7, "size"), ("source_sha256", "0" * 64, "SHA-256")):
        meta = json.loads((second / "meta.json").read_text())
        assert meta["source_bytes"] == 400
        assert meta["source_sha256"] == hashlib.sha256(b"abd\n" * 100).hexdigest()
        (second / "meta.json").write_text(json.dumps(meta | {key: value}))
        lines.clear()
        assert prepare("text", "own.txt", say=lines.append).directory == second
        assert any(word in line and "encoding again" in line for line in lines)


def test_script_shakespeare(in_tmp, small_text):
    """The script's numbers are those of the files."""
    command = ("prepare_data.py", "--dataset", "shakespeare", "--data-path", small_text)
    result = run(*command, cwd=in_tmp, check=0)
    (directory,) = (in_tmp / "data" / "tokens").iterdir()
    assert str(directory.relative_to(in_tmp)) in result.stdout
    assert re.search(r"train +21,600 tokens +21,600 bytes", result.stdout)
    assert re.search(r"valid +2,400 tokens +2,400 bytes", result.stdout)
    assert read_text(directory, "valid") == small_text.read_text()[21_600:]


def test_script_trains_and_reuses_a_tokenizer(in_tmp, small_text):
    """--tokenizer-path is trained once, written, and used as it is for another text."""
    command = ("prepare_data.py", "--dataset", "text", "--tokenizer", "bpe")
    command += ("--bpe-vocab-size", 290, "--tokenizer-path", "new/tok.json", "--data-path")
    run(*command, small_text, cwd=in_tmp, check=0)
    path = in_tmp / "new" / "tok.json"
    written = path.read_bytes(), path.stat().st_mtime_ns
    other = in_tmp / "other.txt"
    other.write_text("안녕하세요 😀\n" * 200, encoding="utf-8")
    run(*command, other, cwd=in_tmp, check=0)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == written
    assert [p.name for p in path.parent.iterdir()] == ["tok.json"]
    texts = set()
    for directory in (in_tmp / "data" / "tokens").iterdir():
        vocab = json.loads((directory / "vocab.json").read_text(encoding="utf-8"))
        tokenizer = BPETokenizer(path.read_text(encoding="utf-8"))
        assert vocab["tokenizer_json"] == path.read_text(encoding="utf-8")
        assert tokenizer.vocab_size == 290
        texts.add(tokenizer.decode(read_tokens(directory, "train").tolist()))
    assert texts == {small_text.read_text()[:21_600], "안녕하세요 😀\n" * 180}


@pytest.mark.parametrize(
    "flags, code, named",
    [
        (["--data-path", "missing.txt"], 1, "missing.txt"),
        (["--data-path", "small.txt", "--bpe-vocab-size", "100"], 2, "--bpe-vocab-size"),
    ],
)
def test_script_errors(in_tmp, small_text, flags, code, named):
    """Bad input ends in one line that names it, with the exit code of its kind."""
    result = run("prepare_data.py", "--dataset", "text", *flags, cwd=in_tmp, check=code)
    assert named in error_line(result)
    assert not (in_tmp / "data").exists()


@pytest.mark.parametrize("path", ["small.txt", "small.txt/tok.json"])
def test_bad_tokenizer_path(in_tmp, small_text, path):
    """A text file for a tokenizer file, and a path below a file, are one clear error."""
    with pytest.raises(UserError, match=re.escape(path)):
        prepare("text", str(small_text), "bpe", 280, path)
    assert not left_behind()
    assert sorted(p.name for p in in_tmp.iterdir() if p.name != "data") == ["small.txt"]


def test_a_tokenizer_path_finds_what_was_prepared(in_tmp, small_text, monkeypatch):
    """The tokenizer of prepared files is written, not trained again, and the files are used."""
    first = prepare("text", str(small_text), "bpe", 280)
    monkeypatch.setattr(BPETokenizer, "train", lambda *a, **k: pytest.fail("trained again"))
    monkeypatch.setattr(BPETokenizer, "encode_array", lambda *a: pytest.fail("encoded again"))
    for _ in range(2):
        again = prepare("text", str(small_text), "bpe", 280, "tok.json")
        assert again.directory == first.directory
    assert BPETokenizer(Path("tok.json").read_text()).fingerprint == first.tokenizer.fingerprint


def test_a_tokenizer_file_of_another_size(in_tmp, small_text):
    """More tokens than asked for are refused with the way out, fewer are used with a warning."""
    flags = ("--dataset", "text", "--data-path", small_text, "--tokenizer", "bpe")
    flags += ("--tokenizer-path", "tok.json", "--bpe-vocab-size")
    run("prepare_data.py", *flags, 290, cwd=in_tmp, check=0)
    for script in ("prepare_data.py", "train_shakespeare.py"):
        line = error_line(run(script, *flags, 280, cwd=in_tmp, check=2))
        assert "tok.json" in line and "--bpe-vocab-size 280" in line
    result = run("prepare_data.py", *flags, 300, cwd=in_tmp, check=0)
    assert "warning: --tokenizer-path tok.json has 290 tokens, not 300" in result.stderr
