"""Tokens in a text as people read them."""

from types import SimpleNamespace

from sample_texts import OFFLINE
from text.labels import labels_in_text, unknown_characters
from text.tokenizer import BPETokenizer, CharTokenizer, TiktokenTokenizer

TEXT = "옛날 é\n🎉 ab"


def test_a_character_of_several_tokens_is_named_whole():
    """Without merges each byte is a token; the encoding of the characters is Python's."""
    tokenizer = BPETokenizer.train(["x"], 256)
    labels, texts = labels_in_text(tokenizer, tokenizer.encode(TEXT))
    shown = TEXT.replace(" ", "␣").replace("\n", "⏎")
    sizes = [len(c.encode()) for c in TEXT]
    assert labels == [
        c if size == 1 else f"{c}({n}/{size})"
        for c, size in zip(shown, sizes, strict=True)
        for n in range(1, size + 1)
    ]
    assert texts == [
        part for c, size in zip(shown, sizes, strict=True) for part in (c, *[""] * (size - 1))
    ]


def test_tokens_across_characters_and_broken_ones():
    """A token that ends one character and begins the next; bytes that make none are in hex."""
    pieces = [b"a\xec", b"\x98\x9b\xeb", b"\x82", b"\xa0 b", b"\x9b", b"\xff\xec\x98"]
    tokenizer = SimpleNamespace(label=lambda n: f"label {n}", bytes_of=pieces.__getitem__)
    labels, texts = labels_in_text(tokenizer, range(6))
    assert labels == ["a옛(1/2)", "옛(2/2)날(1/3)", "날(2/3)", "날(3/3)␣b", "label 4", "label 5"]
    assert texts == ["a옛", "날", "", "␣b", "label 4", "label 5"]
    tokenizer = BPETokenizer.train(["x"], 256)
    ids = tokenizer.encode("옛a옛")[1:-1]  # the ends of the part that is shown cut characters
    labels, texts = labels_in_text(tokenizer, ids)
    assert labels == texts == ["\\x98", "\\x9b", "a", "\\xec", "\\x98"]


def test_whole_tokens_have_their_own_labels():
    for tokenizer in (
        CharTokenizer.train("옛날 \nab"),
        BPETokenizer.train(["옛날 ab\n"] * 9, 300),
        TiktokenTokenizer(OFFLINE),
    ):
        ids = tokenizer.encode("ab \n")
        labels, texts = labels_in_text(tokenizer, ids)
        assert labels == texts == [tokenizer.label(token) for token in ids]
    labels, texts = labels_in_text(tokenizer, tokenizer.encode(TEXT))
    assert "".join(texts) == TEXT.replace(" ", "␣").replace("\n", "⏎") and "날(1/2)" in labels


def test_characters_that_a_vocabulary_lacks():
    tokenizer = CharTokenizer.train("abc")
    found = [unknown_characters(tokenizer, text) for text in ("abc", "añ", "añ한b")]
    ends = " new to this model's vocabulary"
    assert found == ["", f"1 character is{ends}", f"2 characters are{ends}"]
    assert unknown_characters(BPETokenizer.train(["x"], 256), "añ한b") == ""
