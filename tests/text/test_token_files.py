"""Token files: written, reused, continued after an interruption, checked for damage."""

import json
import os
from pathlib import Path

import pytest
import tiktoken

from data import check_long_enough
from sample_texts import OFFLINE
from system.errors import UserError
from text import stream, token_files
from text.token_files import open_token_data
from text.tokenizer import CharTokenizer
from token_folders import TINY_SHA256, listing, prepare, read_text, read_tokens


def test_token_files_of_real_text(in_tmp, tiny_shakespeare):
    """Tiny Shakespeare as everybody splits it: 65 characters, 1,003,854 and 111,540 tokens."""
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
    monkeypatch.setattr(stream, "PIECE_CHARS", 50)
    text = "".join(f"line {n * n} 멀리 é😀\n\n" for n in range(500))
    Path("train.txt").write_bytes(text.encode())
    Path("valid.txt").write_bytes(b"never seen: \xe2\x82\xac \t ~~ \xef\xbf\xbd")
    prepared = prepare("text", str(in_tmp), "bpe", 300)
    assert prepared.meta["dtype"] == "<u2"
    assert prepared.tokenizer.decode(read_tokens(prepared.directory, "train").tolist()) == text
    valid = prepared.tokenizer.decode(read_tokens(prepared.directory, "valid").tolist())
    assert valid == "never seen: € \t ~~ \ufffd"


def test_bytes_per_token(in_tmp):
    """UTF-8 bytes per token of the validation text, counted by hand."""
    Path("train.txt").write_text("abc\n" * 10)
    Path("valid.txt").write_text("é안😀\n", encoding="utf-8")
    prepared = prepare("text", str(in_tmp))
    assert prepared.bytes_per_token == (2 + 3 + 4 + 1) / 4
    assert read_text(prepared.directory, "valid") == "\ufffd\ufffd\ufffd\n"
    prepared = prepare("text", str(in_tmp), "bpe", 256)
    assert prepared.bytes_per_token == 1


@pytest.mark.parametrize("dataset", ["shakespeare", "text", "wikitext103"])
def test_windows_text_becomes_plain_text(in_tmp, dataset, monkeypatch):
    """No byte order mark, LF alone: said once, recorded, also after an interruption."""
    monkeypatch.setattr(token_files, "NOTE_SECONDS", 0)
    text = "one\r\ntwo\rthree\n" * 200
    content = b"\xef\xbb\xbf" + text.encode()
    path = Path("own.txt")
    if dataset == "wikitext103":
        path = in_tmp
        Path("wiki.valid.raw").write_bytes(content)
    Path("own.txt").write_bytes(content)
    Path("wiki.train.raw").write_bytes(content)
    plain = "one\ntwo\nthree\n" * 200
    lines = []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CharTokenizer, "encode_array", interrupt)
        prepare(dataset, str(path), say=lines.append)
    assert not any("CR" in line for line in lines)
    prepared = prepare(dataset, str(path), say=lines.append)
    whole = read_text(prepared.directory, "train")
    assert whole == plain[: len(plain) * 9 // 10] if dataset != "wikitext103" else plain
    (line,) = (line for line in lines if "CRLF" in line)
    assert "byte order mark" in line and str(path) in line
    meta = json.loads((prepared.directory / "meta.json").read_text())
    assert len(meta["text_changes"]) == 2 and "CRLF" in " ".join(meta["text_changes"])
    assert meta["source_sha256"] and prepare(dataset, str(path), say=lines.append)
    assert sum("CRLF" in line for line in lines) == 1
    Path("lf.txt").write_bytes(plain.encode())
    assert prepare("text", "lf.txt", say=lines.append).meta["text_changes"] == []
    assert sum("CRLF" in line for line in lines) == 1


def interrupt(*_):
    raise KeyboardInterrupt


def test_token_files_of_an_earlier_version_stay(in_tmp):
    """Those with CR as a token belong to their checkpoints: used as they are, and said so."""
    Path("own.txt").write_bytes(b"one\r\ntwo\r\n" * 50)
    directory = prepare("text", "own.txt").directory
    meta = json.loads((directory / "meta.json").read_text())
    del meta["text_changes"]
    (directory / "meta.json").write_text(json.dumps(meta))
    lines = []
    prepare("text", "own.txt", say=lines.append)
    assert not lines  # nothing was in it
    earlier = CharTokenizer.train("one\r\ntwo")
    vocab = json.dumps(earlier.to_vocab())
    ids = earlier.encode_array(["one\r\ntwo\r\n" * 50]).astype("<u2")
    for split in meta["splits"].values():
        split |= {"tokens": len(ids), "bytes": len(ids)}
    meta |= {"tokenizer_sha256": earlier.fingerprint, "vocab_size": earlier.vocab_size}
    for name in meta["splits"]:
        (directory / f"{name}.bin").write_bytes(ids.tobytes())
    (directory / "vocab.json").write_text(vocab)
    (directory / "meta.json").write_text(json.dumps(meta))
    before = listing(in_tmp / "data")
    data = prepare("text", "own.txt", say=lines.append)
    assert data.directory == directory and read_text(directory, "train").startswith("one\r\n")
    assert listing(in_tmp / "data") == before
    assert len(lines) == 1 and str(directory) in lines[0] and "earlier version" in lines[0]


def test_a_half_of_an_earlier_version_is_not_continued(in_tmp, monkeypatch):
    """Its tokens have the line ends of the source: the rest would have others."""
    monkeypatch.setattr(token_files, "NOTE_SECONDS", 0)
    Path("own.txt").write_bytes(b"one\r\ntwo\r\n" * 50)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CharTokenizer, "encode_array", interrupt)
        prepare("text", "own.txt")
    (path,) = in_tmp.glob("data/tokens/*.partial/progress.json")
    noted = json.loads(path.read_text())
    del noted["source"]["line_ends"], noted["text_changes"]
    path.write_text(json.dumps(noted))
    vocab = json.dumps(CharTokenizer.train("one\r\ntwo").to_vocab())
    path.with_name("vocab.json").write_text(vocab)
    assert "\r" not in prepare("text", "own.txt").tokenizer.itos


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
    """Every damage is found, with directory and remedy; preparing says why and encodes again."""
    directory = prepare("text", str(small_text)).directory
    before = {path: content for path, (content, _) in listing(directory).items()}
    damage(directory)
    with pytest.raises(UserError) as error:
        open_token_data(directory)
    assert f"delete {directory}" in str(error.value) and "\n" not in str(error.value)
    lines = []
    prepare("text", str(small_text), say=lines.append)
    assert any(str(directory) in line and "encoding again" in line for line in lines)
    assert {path: content for path, (content, _) in listing(directory).items()} == before


def test_a_hole_in_a_token_file(in_tmp, small_text, monkeypatch):
    """A hole is found anywhere; on systems that cannot tell of holes files are still read."""
    directory = prepare("text", str(small_text)).directory
    with open(directory / "train.bin", "r+b") as file:
        whole = file.read()
        file.truncate(len(whole) - 20_000)
        file.truncate(len(whole))
        if file.seek(0, os.SEEK_HOLE) == len(whole):
            pytest.skip("this file system has no holes")
    with pytest.raises(UserError, match=r"train\.bin has holes"):
        open_token_data(directory)
    monkeypatch.delattr(os, "SEEK_HOLE")
    assert not open_token_data(directory).train[-10_000:].any()
