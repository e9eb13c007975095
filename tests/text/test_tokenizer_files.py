"""Files of the `tokenizers` library give the library's own ids and lose no text."""

import json
import random

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from sample_texts import BPE_JSON, ENGLISH, HANGUL, TEXTS
from system.errors import UserError
from text.byte_level import GPT4_WORDS, LONGEST_TOKEN
from text.tokenizer import BPETokenizer, load_bpe, tokenizer_from_vocab


def test_what_would_cut_or_pad_a_text_is_not_used():
    """Exported files carry truncation; every id of the text is wanted, and no other."""
    text = "".join(ENGLISH) * 50
    plain = BPETokenizer(BPE_JSON)
    library = Tokenizer.from_str(BPE_JSON)
    library.enable_truncation(64)
    library.enable_padding(length=2000)
    assert len(library.encode(text).ids) == 2000
    library.post_processor = processors.TemplateProcessing(single="$A $A $A", special_tokens=[])
    library.decoder = decoders.Sequence([decoders.Replace("e", "ee")] * 40)
    changed = json.loads(library.to_str())
    changed["padding"]["strategy"] = {"Fixed": 2_000_000_000}
    changed["model"]["dropout"] = 0.9
    tokenizer = BPETokenizer(json.dumps(changed))
    assert tokenizer.encode(text) == plain.encode(text)
    assert tokenizer.encode_array([text, "e"]).tolist() == plain.encode(text) + plain.encode("e")
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.fingerprint != plain.fingerprint


def library_files():
    """As people export them with the `tokenizers` library."""

    def trained(special=(), **parts):
        tokenizer = Tokenizer(models.BPE(unk_token=special[0] if special else None))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        for name, part in parts.items():
            setattr(tokenizer, name, part)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=list(special),
            initial_alphabet=alphabet,
            show_progress=False,
        )
        tokenizer.train_from_iterator([*ENGLISH, *HANGUL] * 20, trainer)
        return tokenizer

    def split(regex, *how):
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        words = pre_tokenizers.Split(Regex(regex), *how)
        return pre_tokenizers.Sequence([words, pre_tokenizers.Digits(), level])

    gpt2 = trained(
        ["<|endoftext|>"],
        decoder=decoders.ByteLevel(),
        post_processor=processors.ByteLevel(trim_offsets=False),
    )
    gpt2.add_tokens([AddedToken("<｜end▁of▁turn｜>", lstrip=True, rstrip=True)])
    old = json.loads(gpt2.to_str())  # as GPT-2's own: no type, pairs as texts
    del old["model"]["type"], old["model"]["byte_fallback"], old["model"]["ignore_merges"]
    old["model"] |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    old["model"]["merges"] = [" ".join(pair) for pair in old["model"]["merges"]]
    return {
        "GPT-2": gpt2,
        "GPT-2 of old": Tokenizer.from_str(json.dumps(old)),
        "NeoX": trained(normalizer=normalizers.NFC()),
        "two normalizers": trained(
            normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        ),
        "Llama 3": trained(pre_tokenizer=split(GPT4_WORDS, "isolated"), special=["<a>", "<b c>"]),
        "Qwen 2": trained(pre_tokenizer=split(GPT4_WORDS.replace("{1,3}", ""), "removed", True)),
        "spaces before": trained(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    }


@pytest.mark.parametrize("name", library_files())
def test_files_of_the_tokenizers_library(tmp_path, name):
    """The ids are the library's own, the text comes back."""
    library = library_files()[name]
    path = tmp_path / "tokenizer.json"
    library.save(str(path))
    tokenizer = load_bpe(path)
    assert tokenizer.vocab_size == library.get_vocab_size()
    for text in ("The window 12345 안녕 😀  it's\n\n x", "a<|endoftext|>b", *TEXTS.values()):
        ids = library.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == ids
        if name in ("GPT-2", "GPT-2 of old", "Llama 3", "Qwen 2"):
            assert tokenizer.decode(ids) == text
    if name.startswith("GPT-2"):
        text = "a <｜end▁of▁turn｜> b"
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_long_run_makes_no_endless_token():
    """A line of dashes: tokens stay within what is taken, and the rest is still learned."""
    texts = ["-" * 4000 + "\n", *ENGLISH * 20]
    tokenizer = BPETokenizer.train(texts, 310)
    assert tokenizer.vocab_size == 310
    longest = max(len(tokenizer.decode([i])) for i in range(310))
    assert 100 < longest <= LONGEST_TOKEN
    assert tokenizer.decode(tokenizer.encode(texts[0])) == texts[0]
    assert tokenizer_from_vocab(tokenizer.to_vocab()).vocab_size == 310


def test_a_panic_of_the_library_is_a_user_error(monkeypatch):
    """It is no Exception, and would end chat.py with the library's own trace."""

    class PanicException(BaseException):
        pass

    class Panics:
        def encode(self, text, add_special_tokens):
            raise PanicException("called `Result::unwrap()` on an `Err` value")

        encode_batch_fast = encode

        def decode(self, ids, skip_special_tokens):
            raise Exception("no such thing")

    tokenizer = BPETokenizer(BPE_JSON)
    monkeypatch.setattr(tokenizer, "_tokenizer", Panics())
    for fails in (tokenizer.encode, tokenizer.encode_array, tokenizer.decode):
        with pytest.raises(UserError, match="failed on a text"):
            fails("e")


def library_trained(texts, vocab_size):
    """What the library alone makes of texts, as earlier versions asked it to."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=LONGEST_TOKEN,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def test_words_without_end_are_cut():
    """Training and encoding see 1,000 characters at once: as if the text came in such parts."""
    rng = random.Random(1)
    for letters, space in (
        ("ACGT", ""),
        ("a", ""),
        ("멀리가나다라마바사", " "),
        ("?!-", ""),
        ("\t ", ""),
    ):
        text = space + "".join(rng.choice(letters) for _ in range(4500))
        starts = [0, *range(1000 + len(space), len(text), 1000)]
        parts = [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
        tokenizer, by_parts = BPETokenizer.train([text], 300), library_trained(parts, 300)
        model = json.loads(tokenizer.to_vocab()["tokenizer_json"])["model"]
        assert model == json.loads(by_parts.to_str())["model"]
        ids = [i for part in parts for i in by_parts.encode(part).ids]
        assert tokenizer.encode(text) == tokenizer.encode_array([text]).tolist() == ids
        assert tokenizer.decode(ids) == text
        again = tokenizer_from_vocab(tokenizer.to_vocab())
        assert again.encode(text) == ids and again.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("end", ["\n", "", ", "])
def test_a_text_of_ordinary_words_gives_the_tokenizer_of_earlier_versions(end):
    """To the letter, so that old token files and checkpoints agree with new ones."""
    texts = ["".join(line.rstrip() + end for line in ENGLISH * 50), *HANGUL, " " * 1000]
    texts += ["가나다라, 마바사! " * 500, "a1!" * 2000, "x" * 1000, " " + "y" * 1000]
    expected = library_trained(texts, 400).to_str()
    assert BPETokenizer.train(texts, 400).to_vocab()["tokenizer_json"] == expected
