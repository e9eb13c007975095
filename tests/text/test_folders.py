"""Folders of many files: split by file, read by their format, refused with the remedy."""

import gzip
import hashlib
import json
import lzma
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from conftest import left_behind
from system.errors import UserError
from text import rows
from text.corpora import find_corpus
from token_folders import listing, prepare, read_text


def as_lines(texts):
    """JSON lines with other keys around `text`, a blank line between, no newline at the end."""
    return "\n\n".join(json.dumps({"id": n, "text": t}) for n, t in enumerate(texts)).encode()


def as_table(texts):
    sink = pyarrow.BufferOutputStream()
    columns = {"id": list(range(len(texts))), "text": texts}
    pyarrow.parquet.write_table(pyarrow.table(columns), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


def as_text(texts):
    return "".join(t if t.endswith("\n") else f"{t}\n" for t in texts).encode()


FORMATS = {
    ".txt": as_text,
    ".txt.xz": lambda texts: lzma.compress(as_text(texts)),
    ".txt.gz": lambda texts: gzip.compress(as_text(texts)),
    ".jsonl": as_lines,
    ".jsonl.gz": lambda texts: gzip.compress(as_lines(texts)),
    ".parquet": as_table,
}


def write_many(folder, count):
    """Files of all formats, every other one in a subfolder; returns path -> its two rows."""
    texts = {}
    for number in range(count):
        suffix = list(FORMATS)[number % len(FORMATS)]
        path = folder / ("", "deeper")[number % 2] / f"{number:03}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        texts[path] = [f"<{number}> begins é 0123456789", f"and {number} ends\n"]
        path.write_bytes(FORMATS[suffix](texts[path]))
    return texts


def files_in(directory, texts):
    """Split -> the files whose text is in it, in the order of the text, each whole."""
    found = {}
    for split in ("train", "valid", "test"):
        text = read_text(directory, split)
        places = {text.find(as_text(t).decode()): path for path, t in texts.items()}
        found[split] = [places[place] for place in sorted(places) if place >= 0]
        assert sum(len(as_text(texts[path]).decode()) for path in found[split]) == len(text)
    return found


def test_a_folder_is_split_by_file(in_tmp):
    """Each of 43 files is whole in one split, 39, 2 and 2 of them; a new one moves few others."""
    texts = write_many(in_tmp / "books", 43)
    Path("books/.hidden.pdf").write_bytes(b"%PDF")
    Path("books/.git").mkdir()
    Path("books/.git/HEAD").write_bytes(b"\0")
    lines = []
    prepared = prepare("text", "books", say=lines.append)
    found = files_in(prepared.directory, texts)
    assert {split: len(paths) for split, paths in found.items()} == dict(train=39, valid=2, test=2)
    assert sorted(path for paths in found.values() for path in paths) == sorted(texts)
    assert all(paths == sorted(paths) for paths in found.values())
    assert "39 for training (0.0 MB), 2 for validation (0.0 MB), 2 for the test" in lines[0]
    before = listing(in_tmp)
    assert prepare("text", "books").directory == prepared.directory
    assert listing(in_tmp) == before
    texts |= write_many(in_tmp / "books", 44)
    again = files_in(prepare("text", "books").directory, texts)
    moved = [p for split in found for p in found[split] if p not in again[split]]
    assert len(moved) <= 2 and {len(again["valid"]), len(again["test"])} == {2}


def test_three_files_are_enough(in_tmp):
    """One for each split; two are refused, and so is none."""
    texts = write_many(in_tmp / "books", 3)
    found = files_in(prepare("text", "books").directory, texts)
    assert [len(paths) for paths in found.values()] == [1, 1, 1]
    for count in (2, 1, 0):
        max(Path("books").rglob("*.*")).unlink()
        with pytest.raises(UserError, match=rf"books has .* {count} text files.* at least 3"):
            prepare("text", "books")


@pytest.mark.parametrize("suffix", FORMATS)
def test_formats_give_the_same_tokens(in_tmp, suffix):
    """The same rows in any format, as train.* and valid.* or in folders of these names."""
    text = ["one\r\ntwo", "", "\ufeffthree \u2028 é\n", "four"] * 40
    plain = as_text(text).decode().replace("\r\n", "\n").replace("\ufeff", "")
    plain = plain.replace("two\n\n", "two\n") if "txt" not in suffix else plain
    if "txt" in suffix:  # there a byte order mark and an empty line are of the text
        text = [t.removeprefix("\ufeff") for t in text]
    for name in ("train", "valid"):
        Path(f"{name}{suffix}").write_bytes(FORMATS[suffix](text))
    prepared = prepare("text", ".")
    assert read_text(prepared.directory, "train") == plain
    assert len(prepared.meta["text_changes"]) == (1 if "txt" in suffix else 2)
    for name in ("train", "valid"):
        folder = Path("split", name)
        folder.mkdir(parents=True)
        for part in ("a", "b"):
            (folder / f"{part}{suffix}").write_bytes(FORMATS[suffix](text))
    prepared = prepare("text", "split")
    assert [read_text(prepared.directory, s) for s in prepared.splits] == [plain * 2] * 2


def test_a_newline_between_files(in_tmp):
    """A file without one at its end does not run into the next; nothing else is added."""
    for split in ("train", "valid"):
        Path(split).mkdir()
        for name, text in (("a", "one"), ("b", "two\n"), ("c", "three")):
            Path(split, f"{name}.txt").write_text(text)
    prepared = prepare("text", ".")
    assert read_text(prepared.directory, "train") == "one\ntwo\nthree"


def test_hashes_of_earlier_versions_stay(in_tmp):
    """train.txt and valid.txt: token files made before are found; rows were once read as text."""
    Path("train.txt").write_text("some text\n")
    Path("valid.txt").write_text("other text\n")
    digests = [
        hashlib.sha256(Path(f"{s}.txt").read_bytes()).hexdigest() for s in ("train", "valid")
    ]
    whole = hashlib.sha256("".join(digests).encode()).hexdigest()
    assert find_corpus("text", ".").sha256 == whole
    assert find_corpus("text", "train.txt").sha256 == digests[0]
    for split in ("train", "valid"):
        Path(f"{split}.txt").rename(f"{split}.jsonl")
    assert find_corpus("text", ".").sha256 != whole
    assert find_corpus("text", "train.jsonl").sha256 != digests[0]


def test_one_file_of_rows(in_tmp):
    """It is split 90/5/5 by position, as a text is."""
    Path("all.parquet").write_bytes(as_table(["0123456789abcdefghi"] * 50))
    prepared = prepare("text", "all.parquet")
    text = "0123456789abcdefghi\n" * 50
    assert read_text(prepared.directory, "train") == text[:900]
    assert read_text(prepared.directory, "test") == text[950:]


TABLE = as_table(["a text", "another"])
PAGE = TABLE[TABLE.index(b"a text") - 30 : TABLE.index(b"a text")]
NUMBERS = pyarrow.BufferOutputStream()
pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), NUMBERS)
WORDS = pyarrow.BufferOutputStream()
pyarrow.parquet.write_table(pyarrow.table({"words": ["a"]}), WORDS)
GOOD = b'{"text": "a"}\n'
REFUSED = {
    "gzip.txt": (gzip.compress(b"a text\n"), "is compressed with gzip.*name it gzip.txt.gz"),
    "gzip.jsonl": (gzip.compress(GOOD), "is compressed with gzip.*name it gzip.jsonl.gz"),
    "plain.jsonl.gz": (GOOD, "is not compressed.*name it .*plain.jsonl$"),
    "cut.jsonl.gz": (gzip.compress(GOOD * 99)[:-9], "is damaged.*get it again"),
    "broken.jsonl": (GOOD + GOOD + b'{"text": "a\n', "line 3: it is no JSON.*correct or remove"),
    "deep.jsonl": (GOOD + b"[" * 60_000, "line 2: it is no JSON.*correct or remove"),
    "digits.jsonl": (b'{"text": ' + b"9" * 5000 + b"}", "line 1: it is no JSON.*correct or"),
    "list.jsonl": (b'["text"]', "line 1: it has no `text`: give every line"),
    "key.jsonl": (GOOD + b'\n{"Text": "a"}', "line 3: it has no `text`: give every line"),
    "number.jsonl": (GOOD + b'{"text": 5}', "line 2: its `text` is 5, not text: correct"),
    "nested.jsonl": (b'{"text": [["a"]]}', "line 1: its `text` is a list, not text: correct"),
    "half.jsonl": (b'{"text": "\\ud83d"}', "line 1: .*half a character.*correct or remove"),
    "long.jsonl": (GOOD + b'{"text": "' + b"a" * 70_000, "line 2: it has more than 65,536 char"),
    "blank.jsonl": (b'{"text": " "}\n{"text": null}', "is empty: give"),
    "latin.jsonl": (b'{"text": "caf\xe9"}', r"is not UTF-8 \(byte 13\): convert"),
    "text.parquet": (b"a text\n" * 99, "is no Parquet table, or damaged.*get it again"),
    "nothing.parquet": (b"", "is no Parquet table, or damaged.*get it again"),
    "cut.parquet": (TABLE[:-9], "is no Parquet table, or damaged.*get it again"),
    "changed.parquet": (TABLE.replace(b"a text", b"a te\xfft"), "rows 1 to 64: .*not UTF-8: write"),
    "page.parquet": (TABLE.replace(PAGE, b"\xff" * 30), "no Parquet table, or damaged"),
    "numbers.parquet": (NUMBERS.getvalue().to_pybytes(), "holds int64, not text: write"),
    "words.parquet": (
        WORDS.getvalue().to_pybytes(),
        "no single `text` column, but 'words': rename",
    ),
    "book.pdf": (b"%PDF-1.7", r"is of no known format \(.txt, .*move it out of books"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_not_their_format(in_tmp, monkeypatch, name):
    """One line names the file, its line and the remedy; nothing is left behind."""
    monkeypatch.setattr(rows, "LONGEST_LINE", 1 << 16)
    monkeypatch.setattr("text.stream.BLOCK_BYTES", 1 << 16)
    content, message = REFUSED[name]
    write_many(in_tmp / "books", 4)
    Path("books/deeper", name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        prepare("text", "books")
    assert str(error.value).startswith(f"books/deeper/{name}") and "\n" not in str(error.value)
    assert not left_behind()
