"""The tokenizers: text round-trips, unknowns are marked, damage is reported."""

import io
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import requests
import tiktoken
import tiktoken.load
import torch
from tokenizers import Tokenizer, models

from conftest import ROOT
from sample_texts import BPE_JSON, ENGLISH, HANGUL, OFFLINE, TEXTS
from system.errors import UserError
from text.byte_level import LONGEST_TOKEN
from text.tokenizer import (
    LONGEST_LABEL,
    BPETokenizer,
    CharTokenizer,
    TextStream,
    TiktokenTokenizer,
    load_bpe,
    tokenizer_from_vocab,
)

TRAINED = {
    "bpe of nothing": lambda: BPETokenizer.train([], 256),
    "bpe of bytes": lambda: BPETokenizer.train(ENGLISH, 256),
    "bpe of English": lambda: BPETokenizer.train(ENGLISH * 20, 400),
    "bpe of Hangul": lambda: BPETokenizer.train(HANGUL * 20, 290),
    "tiktoken": lambda: TiktokenTokenizer(OFFLINE),
}
READY = {}

every_text = pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())


@pytest.fixture(params=TRAINED)
def tokenizer(request):
    """The tokenizers that must round-trip every text."""
    if request.param not in READY:
        READY[request.param] = TRAINED[request.param]()
    return READY[request.param]


@pytest.fixture
def byte_ids():
    """A BPE without merges, and the id of each byte: its ids are bytes, which we can decode."""
    tokenizer = BPETokenizer.train([], 256)
    letters = Tokenizer.from_str(tokenizer.to_vocab()["tokenizer_json"]).get_vocab()
    # GPT-2's table, as tiktoken builds it: printable bytes as themselves, the rest from U+0100
    printable = [byte for byte in range(256) if chr(byte).isprintable() and byte != 0x20]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: letters[chr(byte)] for byte in printable}
    table |= {byte: letters[chr(256 + n)] for n, byte in enumerate(others)}
    assert sorted(table.values()) == list(range(256))
    return tokenizer, [table[byte] for byte in range(256)]


def streamed(tokenizer, ids):
    stream = TextStream(tokenizer)
    return "".join([stream.push(i) for i in ids]) + stream.flush()


@every_text
def test_round_trip(tokenizer, text):
    """decode(encode(text)) is the text, also of a BPE that never saw such characters."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    several = tokenizer.encode_array([text, "x", text]).tolist()
    assert several == [*ids, *tokenizer.encode("x"), *ids]


@every_text
def test_stream_gives_the_text(tokenizer, text):
    """Id by id, the same text comes out as goes in."""
    assert streamed(tokenizer, tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", ["emoji", "hangul", "combining", "all planes 1"])
def test_stream_holds_back_no_more_than_a_character(byte_ids, name):
    """After every byte, all complete characters are out and nothing of the incomplete one."""
    tokenizer, ids = byte_ids
    data = TEXTS[name].encode()
    stream, out = TextStream(tokenizer), ""
    for n, byte in enumerate(data, 1):
        out += stream.push(ids[byte])
        assert out == data[:n].decode(errors="ignore")


def test_stream_survives_broken_bytes(byte_ids):
    """Bytes that are no UTF-8 (an untrained model's) stay within themselves when streamed."""
    tokenizer, ids = byte_ids
    rng = random.Random(0)
    for _ in range(200):
        data = bytes(rng.choice(b"\xf0\x9f\x98\x80\xc3\xa9A\xe2\xff") for _ in range(12))
        assert streamed(tokenizer, [ids[byte] for byte in data]) == data.decode(errors="replace")


def test_a_stream_of_broken_bytes_alone_goes_on(byte_ids):
    """Each comes out once the next is in, and no more than one character's bytes are kept."""
    tokenizer, ids = byte_ids
    stream, out = TextStream(tokenizer), ""
    for n in range(300):
        out += stream.push(ids[0x80 + n % 64])
        assert out == "\ufffd" * n and len(stream._pending) <= 4
    assert stream.push(ids[ord("A")]) == "\ufffdA"


def test_flush_empties_the_stream(byte_ids):
    """What was flushed does not come again, and a stream can be used on."""
    tokenizer, ids = byte_ids
    stream = TextStream(tokenizer)
    assert stream.push(ids[0xC3]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""
    assert stream.push(ids[ord("A")]) == "A"


@every_text
def test_bpe_without_merges_is_utf8(byte_ids, text):
    """With 256 tokens the ids are the UTF-8 bytes, one for one."""
    tokenizer, ids = byte_ids
    assert tokenizer.vocab_size == 256
    assert tokenizer.encode(text) == [ids[byte] for byte in text.encode()]


def test_every_id_has_a_text_and_a_label(tokenizer):
    """A model may pick any id below vocab_size: none crashes, each is visible to people."""
    for i in range(tokenizer.vocab_size):
        assert isinstance(tokenizer.decode([i]), str)
        label = tokenizer.label(i)
        assert label and label.isprintable() and " " not in label, (i, label)


def test_tiktoken_ids_are_the_published_ones():
    """cl100k's known ids; names of special tokens in a text are text, not special tokens."""
    tokenizer = TiktokenTokenizer(OFFLINE)
    assert tokenizer.encode("hello world") == [15339, 1917]
    assert 100257 not in tokenizer.encode("<|endoftext|>")
    assert tokenizer.vocab_size == 100277


def test_long_line_round_trips(tokenizer):
    """A line of 50,000 characters without a word boundary, and one of nothing but spaces."""
    for text in ("가" * 50_000, " " * 50_000, "x" * 50_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bpe_merges_what_is_frequent():
    """The trained vocabulary is used: fewer tokens than bytes, and its size is as asked."""
    tokenizer = BPETokenizer.train(ENGLISH * 20, 300)
    assert tokenizer.vocab_size == 300
    assert len(tokenizer.encode(ENGLISH[0])) < len(ENGLISH[0]) * 0.7


def test_char_ids_are_the_sorted_characters():
    """Ids follow the order of code points; the unknown is last, once."""
    for text in ("hello world\n", "hello\ufffd world\n"):
        tokenizer = CharTokenizer.train(text)
        known = ["\n", " ", "d", "e", "h", "l", "o", "r", "w"]
        assert tokenizer.itos == [*known, "\ufffd"]
        assert tokenizer.encode("he d") == [4, 3, 1, 2]
        assert tokenizer.decode([4, 3, 1, 2]) == "he d"
        assert tokenizer.vocab_size == 10


@every_text
def test_char_marks_what_it_never_saw(text):
    """Unseen characters become U+FFFD, seen ones stay; both ways to encode agree."""
    tokenizer = CharTokenizer.train("the quick brown 멀리 é\n")
    expected = "".join(c if c in "the quick brown 멀리 é\n" else "\ufffd" for c in text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == expected
    array = tokenizer.encode_array(text)
    assert isinstance(array, np.ndarray) and array.tolist() == ids
    assert streamed(tokenizer, ids) == expected
    assert tokenizer.num_unknown(text.replace("\ufffd", "")) == sum(
        c not in "the quick brown 멀리 é\n\ufffd" for c in text
    )


@every_text
def test_char_round_trips_its_own_text(text):
    """Trained on a text, nothing in it is unknown."""
    tokenizer = CharTokenizer.train(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.num_unknown(text) == 0


@pytest.mark.parametrize("form", ["list", "dict", "typed"])
def test_first_release_vocabulary(form):
    """A vocabulary without an unknown leaves out what it cannot say, and never invents ids."""
    itos = ["\n", " ", "a", "b"]
    vocab = {"stoi": {c: i for i, c in enumerate(itos)}, "itos": itos}
    if form == "dict":
        vocab["itos"] = dict(enumerate(itos))
    if form == "typed":
        vocab["type"] = "char"
    tokenizer = tokenizer_from_vocab(vocab)
    assert tokenizer.vocab_size == 4
    assert tokenizer.encode("a\ufffdbé a") == [2, 3, 1, 2]
    assert tokenizer.encode_array("a\ufffdbé a").tolist() == [2, 3, 1, 2]
    assert tokenizer.decode([2, 3, 1, 2, 0]) == "ab a\n"
    assert tokenizer.num_unknown("abc") == 1


def test_labels_show_spaces_and_line_ends():
    """People see words, spaces and line ends, not the letters that byte-level BPE uses inside."""
    tokenizer = BPETokenizer.train(ENGLISH * 20, 400)
    labels = [tokenizer.label(i) for i in range(tokenizer.vocab_size)]
    assert not [label for label in labels if "Ġ" in label or "Ċ" in label]
    (the,) = tokenizer.encode(" the")
    assert tokenizer.label(the) == "␣the"
    (end,) = tokenizer.encode("\n")
    assert tokenizer.label(end) == "⏎"
    char = CharTokenizer.train("a \n\t\x00é")
    shown = [char.label(i) for i in range(char.vocab_size)]
    assert shown == ["\\x00", "⇥", "⏎", "␣", "a", "é", "\ufffd"]


def test_labels_of_bytes(byte_ids):
    """Each of the 256 bytes has its own label, those above 127 in hex."""
    tokenizer, ids = byte_ids
    labels = [tokenizer.label(i) for i in ids]
    assert len(set(labels)) == 256
    assert labels[0x21:0x7F] == [chr(byte) for byte in range(0x21, 0x7F)]
    assert labels[0x80:] == [f"\\x{byte:02x}" for byte in range(0x80, 0x100)]


def test_labels_of_tiktoken():
    """A space shows, and half a character shows as bytes."""
    tokenizer = TiktokenTokenizer(OFFLINE)
    assert tokenizer.label(1917) == "␣world"
    halves = [i for i in tokenizer.encode("뷁") if "\ufffd" in tokenizer.decode([i])]
    assert halves
    raw = tiktoken.get_encoding(OFFLINE).decode_single_token_bytes
    for i in halves:
        assert tokenizer.label(i) == "".join(f"\\x{byte:02x}" for byte in raw(i))


def vocabularies():
    return {
        "char": CharTokenizer.train("hello 멀리"),
        "char of another order": tokenizer_from_vocab({"itos": ["b", "a"], "stoi": {}}),
        "char of one order": tokenizer_from_vocab({"itos": ["a", "b"], "stoi": {}}),
        "bpe": BPETokenizer.train(ENGLISH * 20, 300),
        "bpe of one more": BPETokenizer.train(ENGLISH * 20, 301),
        "bpe of other text": BPETokenizer.train(HANGUL * 20, 300),
        "tiktoken": TiktokenTokenizer(OFFLINE),
    }


@pytest.mark.parametrize("name", vocabularies())
def test_vocab_round_trip(name):
    """A vocabulary survives JSON and a checkpoint read with weights_only=True."""
    tokenizer = vocabularies()[name]
    vocab = tokenizer.to_vocab()
    file = io.BytesIO()
    torch.save({"vocab": vocab}, file)
    file.seek(0)
    for copy in (
        json.loads(json.dumps(vocab)),
        torch.load(file, weights_only=True)["vocab"],
    ):
        again = tokenizer_from_vocab(copy)
        assert type(again) is type(tokenizer)
        assert again.vocab_size == tokenizer.vocab_size
        assert again.fingerprint == tokenizer.fingerprint
        for text in ("The window 안녕 멀리 😀 hello", TEXTS["all planes 1"], "abba"):
            assert again.encode(text) == tokenizer.encode(text)
            assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_fingerprints_tell_vocabularies_apart():
    """Another text, size, order or kind is another fingerprint."""
    prints = [tokenizer.fingerprint for tokenizer in vocabularies().values()]
    assert len(set(prints)) == len(prints)
    assert all(len(p) == 64 and int(p, 16) >= 0 for p in prints)


def test_training_is_deterministic():
    """The same text gives the same JSON and fingerprints, in another process too."""
    code = (
        "import json, sys; from text.tokenizer import *;"
        "texts = json.load(sys.stdin); bpe = BPETokenizer.train(texts, 500);"
        "print(json.dumps([bpe.to_vocab(), bpe.fingerprint,"
        " CharTokenizer.train(''.join(texts)).fingerprint]))"
    )
    texts = [*ENGLISH, *HANGUL, *TEXTS.values(), "abcd bcda cdab dabc " * 9]
    bpe = BPETokenizer.train(texts, 500)
    here = [bpe.to_vocab(), bpe.fingerprint, CharTokenizer.train("".join(texts)).fingerprint]
    for hash_seed in ("1", "2"):
        result = subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps(texts),
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
        )
        assert json.loads(result.stdout) == here
    assert BPETokenizer.train(texts, 500).to_vocab() == bpe.to_vocab()


PANICS = json.loads(BPE_JSON)  # the library panics on a prefix longer than a merged token
PANICS["model"]["continuing_subword_prefix"] = "########"
DAMAGED = {
    "None": None,
    "a list": ["a", "b"],
    "a text": "abc",
    "a number": 3,
    "empty": {},
    "unknown type": {"type": "word", "itos": ["a"]},
    "type of a wrong kind": {"type": ["char"], "itos": ["a"]},
    "char without itos": {"type": "char", "stoi": {"a": 0}},
    "char with nothing": {"type": "char", "itos": []},
    "char with numbers": {"type": "char", "itos": [1, 2]},
    "char with empty strings": {"type": "char", "itos": ["a", ""]},
    "char with a gap": {"type": "char", "itos": {0: "a", 2: "b"}},
    "char with None": {"itos": None},
    "bpe without json": {"type": "bpe"},
    "bpe with None": {"type": "bpe", "tokenizer_json": None},
    "bpe with no json": {"type": "bpe", "tokenizer_json": "hello"},
    "bpe with other json": {"type": "bpe", "tokenizer_json": '{"a": [1]}'},
    "bpe cut short": {"type": "bpe", "tokenizer_json": BPE_JSON[: len(BPE_JSON) // 2]},
    "bpe that panics": {"type": "bpe", "tokenizer_json": json.dumps(PANICS)},
    "char of a novel": {"type": "char", "itos": ["a", "e" * (LONGEST_TOKEN + 1)]},
    "tiktoken without name": {"type": "tiktoken"},
    "tiktoken with None": {"type": "tiktoken", "encoding_name": None},
    "tiktoken with a list": {"type": "tiktoken", "encoding_name": ["gpt2"]},
    "tiktoken of nobody": {"type": "tiktoken", "encoding_name": "no_such_encoding"},
}


@pytest.mark.parametrize("vocab", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_vocabulary_is_a_user_error(vocab):
    """A damaged vocabulary is an error, never a traceback or a wrong tokenizer."""
    with pytest.raises(UserError):
        tokenizer_from_vocab(vocab)


def test_labels_are_short():
    """A vocabulary of long texts does not make a page of them."""
    tokenizer = tokenizer_from_vocab({"itos": ["a", "b" * LONGEST_TOKEN, "\x00" * 100]})
    assert tokenizer.label(1) == "b" * (LONGEST_LABEL - 1) + "…"
    assert len(tokenizer.label(2)) == LONGEST_LABEL and tokenizer.label(0) == "a"


def test_unknown_encoding_lists_the_known():
    """A misspelt name is named, with the names that would do."""
    with pytest.raises(UserError) as error:
        TiktokenTokenizer("cl100k_bas")
    message = str(error.value)
    assert "--tiktoken-encoding cl100k_bas" in message
    assert OFFLINE in message and "gpt2" in message and "\n" not in message


@pytest.mark.parametrize("kind", [ConnectionError, requests.exceptions.ConnectionError, OSError])
def test_encoding_without_connection(monkeypatch, kind):
    """If the table cannot be downloaded, the message says what to do without a connection."""

    def fail(name):
        raise kind("Max retries exceeded\nwith url")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(UserError) as error:
        TiktokenTokenizer("gpt2")
    message = str(error.value)
    assert "--tiktoken-encoding gpt2" in message and "\n" not in message
    assert "connect" in message and "TIKTOKEN_CACHE_DIR" in message and "bpe" in message


def test_encoding_with_a_damaged_table(monkeypatch, tmp_path):
    """A table that arrives damaged (a portal's login page) is not an encoding "not installed"."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.load, "read_file", lambda path: b"<html>Please log in</html>")
    with pytest.raises(UserError) as error:
        TiktokenTokenizer("p50k_edit")
    message = str(error.value)
    assert "p50k_edit" in message and "not installed" not in message
    assert "TIKTOKEN_CACHE_DIR" in message


def test_tokenizer_file(tmp_path):
    """A saved file is the library's own: it reads it, load_bpe reads it, nothing else is left."""
    tokenizer = BPETokenizer.train(ENGLISH * 20, 300)
    path = tmp_path / "new" / "folder" / "tokenizer.json"
    tokenizer.save(path)
    text = "The window 안녕 😀"
    assert Tokenizer.from_file(str(path)).encode(text).ids == tokenizer.encode(text)
    again = load_bpe(path)
    assert again.encode(text) == tokenizer.encode(text)
    assert again.fingerprint == tokenizer.fingerprint
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as Windows editors save it
    assert load_bpe(path).fingerprint == tokenizer.fingerprint
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]


BAD_FILES = {
    "another model": Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")).to_str().encode(),
    "empty": b"",
    "not JSON": b"hello",
    "not UTF-8": b"\xff\xfe{}",
    "other JSON": b'{"vocab": ["a"]}',
    "cut short": BPE_JSON.encode()[:-30],
}


@pytest.mark.parametrize("data", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_tokenizer_file(tmp_path, data):
    """The message names flag, file and what to do."""
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data)
    with pytest.raises(
        UserError, match=r"--tokenizer-path .*tokenizer\.json cannot be used .*another"
    ):
        load_bpe(path)


def test_unreadable_tokenizer_file(tmp_path):
    """A missing file and a directory are named too."""
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(UserError) as error:
            load_bpe(path)
        assert f"--tokenizer-path {path} cannot be read" in str(error.value)


@pytest.mark.parametrize("path", ["file/tokenizer.json", "x" * 300 + ".json"])
def test_tokenizer_file_that_cannot_be_written(in_tmp, path):
    """A path below a file, or too long a name, is one clear error."""
    (in_tmp / "file").write_text("not a directory")
    with pytest.raises(UserError, match="cannot be written"):
        BPETokenizer.train([], 256).save(path)
    assert (in_tmp / "file").read_text() == "not a directory"
