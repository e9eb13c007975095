"""Perplexity per word of WikiText: each loss from a forward pass of its own, summed by hand."""

import json
import math
from pathlib import Path

import pytest
import torch

import evaluate
from engine.losses import Losses
from engine.wikitext import articles, detokenized, wikitext
from small_models import lively, make_checkpoint
from system.errors import UsageError
from text.tokenizer import CharTokenizer

TEXT = """
 = Robert =

 He had a guest @-@ starring role ( in 2000 ) . " It 's good , " he said .

 = = Career = =

 In 1 @,@ 984 , he was 3 @.@ 5 years old ; then more : 20 ° C .

 = Rome =

 Rome is a city . It is old .
"""
READ = [
    ' = Robert =\n\nHe had a guest-starring role (in 2000). "It\'s good," he said .\n\n'
    "== Career ==\n\nIn 1,984, he was 3.5 years old; then more: 20°C .\n",
    " = Rome =\n\nRome is a city. It is old .\n",
]
WORDS = 51 + 14  # with one before the first and one after the last word of an article
TOKENIZER = CharTokenizer.train([*READ])


def nats(model, text, context):
    """The sum of losses of a text, each token after `context(n, last)` tokens before it."""
    ids = torch.tensor(TOKENIZER.encode("\n" + text))
    total, last = 0.0, len(ids) - 1
    for n in range(1, len(ids)):
        logits = model(ids[None, max(0, n - context(n, last)) : n])[0, -1]
        total -= float(logits.double().log_softmax(-1)[ids[n]])
    return total


@pytest.fixture
def file(in_tmp):
    Path("wiki.test.tokens").write_text(TEXT, encoding="utf-8")
    return Path("wiki.test.tokens")


def in_window(n, last, predicted):
    """How many tokens before token n are read if windows of 16 predict so many, the first all."""
    end = 16 + predicted * max(0, math.ceil((n - 16) / predicted))
    return n - (min(end, last) - 16) if n > 16 else n


@torch.no_grad()
def test_losses_of_each_context(file):
    assert [detokenized(article) for article in articles(TEXT)] == READ
    model = lively("newton background", vocab_size=TOKENIZER.vocab_size)
    found = wikitext(Losses(model, {}), TOKENIZER, file, 16, stride=6)
    assert (found["articles"], found["words"]) == (2, WORDS)
    assert found["bytes"] == len(TEXT.encode()) - 2  # two line ends stand between articles
    for name, context in (
        ("windows of 16", lambda n, last: in_window(n, last, 16)),
        ("windows of 16, stride 6", lambda n, last: in_window(n, last, 6)),
        ("the whole article", lambda n, last: n),
    ):
        whole = sum(nats(model, text, context) for text in READ)
        row = next(row for row in found["by_context"] if row["context"] == name)
        assert row["nats"] * found["tokens"] == pytest.approx(whole, rel=1e-5)
        assert row["word_perplexity"] == pytest.approx(math.exp(whole / WORDS), rel=1e-4)
        assert row["bits_per_byte"] == pytest.approx(whole / found["bytes"] / math.log(2))


def test_what_is_printed_and_refused(file, capsys):
    make_checkpoint("x.pt", TOKENIZER, model_type="vanilla", pos="rotary")
    command = ["--checkpoint-path", "x.pt", "--wikitext", "."]
    assert evaluate.main([*command, "--stride", "4", "--json", "e.json"]) == 0
    rows = json.loads(Path("e.json").read_text())["by_context"]
    assert [row["context"] for row in rows] == ["windows of 16", "windows of 16, stride 4"]
    printed = capsys.readouterr().out
    assert all(f"{row['bits_per_byte']:.4f}" in printed for row in rows)
    for flags, words in (
        (["--wikitext", "elsewhere"], "elsewhere has no wiki.test.raw"),
        (["--wikitext", "valid"], "data has no wiki.valid.raw"),
        (["--wikitext", ".", "--stride", "17"], "16 tokens"),
        (["--stride", "4"], "--stride needs --wikitext"),
    ):
        with pytest.raises(UsageError, match=words):
            evaluate.main(["--checkpoint-path", "x.pt", *flags])
