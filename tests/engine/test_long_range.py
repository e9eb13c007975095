"""Tests the long-range questions on models whose answers are known, and on the texts they ask."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine import long_range
from engine.losses import Losses
from small_models import lively
from text.tokenizer import BPETokenizer, CharTokenizer

ALPHABET = "".join(map(chr, range(32, 127))) + "\n"
CHARS = CharTokenizer.train(ALPHABET)
SURE = 20.0  # the logit of what a model is sure of; the others have 0
BLOCK = 96


@pytest.fixture
def text():
    """12,000 random letters: no 12 of them occur twice."""
    return "".join(np.random.default_rng(5).choice([*"abcdefghijklmnopqrstuvwxyz "], 12000))


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Distances and books that the text above is long enough for, and that take little time."""
    monkeypatch.setattr(long_range, "DISTANCES", (64, 256, 1024))
    monkeypatch.setattr(long_range, "BOOKS", (2, 8, 32))


class Reader(torch.nn.Module):
    """Is sure of the next letter if `next_letter` finds it in the text so far; else of nothing."""

    max_context = None
    config = SimpleNamespace()

    def __init__(self, next_letter):
        super().__init__()
        self.next_letter = next_letter
        self.unused = torch.nn.Parameter(torch.zeros(()))

    def forward(self, tokens):
        logits = torch.zeros(*tokens.shape, CHARS.vocab_size)
        for row, ids in zip(logits, tokens.tolist(), strict=True):
            read = CHARS.decode(ids)
            for t in range(len(ids) - 30, len(ids)):  # no answer is longer
                if letter := self.next_letter(read[: t + 1]):
                    row[t, CHARS.stoi[letter]] = SURE
        return logits


def answer_of_memory(read):
    """The next letter of a number that was named before, if it is asked for now."""
    asked = re.search(r"\n(The pass key is|[A-Z][a-z]+:)( \d{0,4})?$", read)
    named = asked and re.search(rf"\n{asked[1]}( \d{{5}})", read)
    return named and named[1][len(asked[2] or "")]


def copy_of_memory(read):
    """The letter that followed the last 12 letters when they were read before."""
    before = read.rfind(read[-12:], 0, len(read) - 1)
    return read[before + 12] if before >= 0 else None


def asked(next_letter, text, count=6):
    tokens = np.array(CHARS.encode(text))
    losses = Losses(Reader(next_letter), {})
    return long_range.long_range(losses, tokens, CHARS, count, BLOCK)


def test_a_model_that_remembers_everything(text):
    """It is sure of the named digits, and of the other ones if those were named instead."""
    found = asked(answer_of_memory, text)
    assert [row["distance"] for row in found["passkey"]] == [64, 256, 1024]
    assert [row["names"] for row in found["phone_book"]] == [2, 8, 32]
    for row in found["passkey"] + found["phone_book"]:
        assert row["exact"] == 1 and row["loss"] < 1e-6
        # the reference has other digits in every place, and a model that is sure of them
        assert row["gain"] == pytest.approx(SURE, abs=1e-6) and row["error"] < 1e-6
    assert all(row["gain"] == 0 for row in found["repeats"])


def test_a_model_that_copies(text):
    """It gains nothing from the first 11 tokens of a repeated string and all from the others."""
    found = asked(copy_of_memory, text)
    assert [row["distance"] for row in found["repeats"]] == [20, 64, 256, 1024]
    uniform = np.log(CHARS.vocab_size)
    for row in found["repeats"]:
        assert row["reference"] == pytest.approx(uniform)
        assert row["loss"] == pytest.approx(uniform * 11 / 19)
        assert row["gain"] == pytest.approx(uniform * 8 / 19) and row["share"] == pytest.approx(1)


def test_a_model_that_knows_nothing(text):
    """It never finds an answer, and gains nothing: exactly, or within its noise if it guesses."""
    found = asked(lambda read: None, text)
    for row in found["passkey"] + found["phone_book"] + found["repeats"]:
        assert row["exact"] == row["gain"] == row["error"] == 0
        assert row["loss"] == pytest.approx(np.log(CHARS.vocab_size))
    assert all(row["share"] is None for row in found["repeats"])
    generator = np.random.default_rng(1)
    guesses = asked(lambda read: str(generator.integers(10)), text, count=40)
    for row in guesses["passkey"] + guesses["phone_book"]:
        assert row["exact"] == 0 and abs(row["gain"]) < 3 * row["error"] < 3


class Recorder:
    """Keeps the texts that it is asked about; finds digits with a loss of 1, and nothing else."""

    def __init__(self, tokenizer, limit=None):
        self.limit, self.texts = limit, {}
        labels = map(tokenizer.label, range(tokenizer.vocab_size))
        self.is_digit = np.array([any(c.isdigit() for c in label) for label in labels])

    def graded_all(self, sequences, count, title):
        self.texts.setdefault(title, []).append(sequences)
        found = self.is_digit[sequences[:, -count:]]
        return np.where(found, 1.0, 100.0), found


def recorded(tokenizer, text, limit=None):
    recorder = Recorder(tokenizer, limit)
    tokens = np.array(tokenizer.encode(text))
    rows = long_range.long_range(recorder, tokens, tokenizer, 5, BLOCK)
    return recorder.texts, rows


def tokenizers(text):
    digits = " ".join(f"{n:05d}" for n in range(0, 100000, 7))
    return CHARS, BPETokenizer.train([text + digits + long_range.NAMES + long_range.FACT], 300)


def test_distances_and_answers(text):
    """Distances are counted in tokens, and the text between is the corpus's own."""
    for tokenizer in tokenizers(text):
        texts, rows = recorded(tokenizer, text)
        sizes = set()
        assert all(row["loss"] == row["exact"] == 1 for row in rows["passkey"])
        trial = long_range.passkey_trial(
            np.array(tokenizer.encode(text)), tokenizer, np.random.default_rng(2)
        )
        assert re.fullmatch(r" ?\d{5}", tokenizer.decode(trial.answer))
        for row in rows["passkey"]:
            named, other = texts[f"pass key after {row['distance']}"]
            assert named.shape == other.shape == (5, row["context"] + 1)
            for ids, reference in zip(named.tolist(), other.tolist(), strict=True):
                read = tokenizer.decode(ids)
                digits = re.findall(r"The pass key is (\d{5})", read)
                assert len(digits) == 2 and digits[0] == digits[1]  # named once, and asked for
                assert read.endswith(f"\nThe pass key is {digits[0]}")
                fact = tokenizer.encode(long_range.FACT.format(digits[0]))
                question = tokenizer.encode(f"\nThe pass key is {digits[0]}")
                sizes.add(len(question))
                start = len(ids) - len(question) - row["distance"]
                assert ids[start - len(fact) : start] == fact
                between = tokenizer.decode(ids[start : start + row["distance"]])
                assert between in text and "pass key" not in between
                assert tokenizer.decode(ids[: start - len(fact)]) + between in text
                wrong, right = re.findall(r"The pass key is (\d{5})", tokenizer.decode(reference))
                assert right == digits[0] and all(a != b for a, b in zip(wrong, right, strict=True))
        assert tokenizer is CHARS or len(sizes) > 1  # this BPE joins some digits
        string, reference = texts["string after 256"]
        assert (string[:, -20:] == string[:, -276:-256]).all()
        assert (string[:, -256:] == reference[:, -256:]).all()
        for ids in reference:  # without the first occurrence it is one piece of the corpus
            assert tokenizer.decode(ids[:-20].tolist()) in text
            once = tokenizer.decode(ids[-20:].tolist())
            assert once in text and once not in tokenizer.decode(ids[:-20].tolist())


def test_a_phone_book_names_each_once(text):
    texts, _ = recorded(CHARS, text)
    named, other = texts["phone book of 32"]
    for ids, reference in zip(named.tolist(), other.tolist(), strict=True):
        lines = dict(re.findall(r"\n([A-Z][a-z]+): (\d{5})(?=\n)", CHARS.decode(ids)))
        wrong = dict(re.findall(r"\n([A-Z][a-z]+): (\d{5})(?=\n)", CHARS.decode(reference)))
        name, number = re.search(r"\n([A-Z][a-z]+): (\d{5})$", CHARS.decode(ids)).groups()
        assert len(lines) == 32 and lines[name] == number
        assert [key for key in lines if lines[key] != wrong[key]] == [name]


def test_the_same_trials_for_every_model(text):
    """Also for one whose positions end: it is not asked, and its cells are empty."""
    texts, rows = recorded(CHARS, text)
    longest = rows["phone_book"][-1]["context"]
    for limit in (longest, longest - 1):
        again, rows = recorded(CHARS, text, limit)
        assert 0 < len(again) < len(texts)
        for title, pair in again.items():
            assert all(map(np.array_equal, pair, texts[title]))
        for row in rows["passkey"] + rows["phone_book"] + rows["repeats"]:
            assert (row["gain"] is None) == (row["context"] > limit)


def test_what_cannot_be_asked(text, capsys):
    """A vocabulary without digits, and distances that the text is too short for, up to all."""
    tokenizer = CharTokenizer.train(text)
    _, rows = recorded(tokenizer, text[:2000])
    assert rows["passkey"] == rows["phone_book"] == []
    assert [row["distance"] for row in rows["repeats"]] == [20, 64, 256]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "lacks digits" in lines[0] and "string after 1024" in lines[1]
    _, rows = recorded(CHARS, text[:5])
    assert rows["passkey"] == rows["phone_book"] == rows["repeats"] == []


@pytest.mark.parametrize("name", ["newton hard", "vanilla rotary"])
def test_gain_by_hand(name, text):
    """The pass key's numbers of a real model, one text at a time."""
    model = lively(name)
    tokenizer = CharTokenizer.train("0123456789 Thepasky.RmbrIt\n")
    tokenizer = CharTokenizer([*tokenizer.itos][: model.config.vocab_size])
    generator = np.random.default_rng(3)
    tokens = generator.integers(model.config.vocab_size, size=5000)
    trials = [long_range.passkey_trial(tokens, tokenizer, generator) for _ in range(3)]
    questions = long_range._Questions(Losses(model, {}), tokens, 3, model.config.block_size)
    row = questions._row(trials, 40, "pass key")
    gains = []
    for trial in trials:
        losses = []
        for given in (trial.other, trial.given):
            ids = torch.tensor(trial.text(tokens, given, 40, row["context"] + 1))
            with torch.no_grad():
                log_probs = model(ids[None, :-1])[0].log_softmax(-1)
            size = len(trial.answer)
            losses.append(-log_probs[-size:].gather(1, ids[-size:, None]).mean().item())
        gains.append(losses[0] - losses[1])
    assert row["gain"] == pytest.approx(np.mean(gains), abs=1e-5)
    assert row["error"] == pytest.approx(np.std(gains, ddof=1) / 3**0.5, abs=1e-5)
