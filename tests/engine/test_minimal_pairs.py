"""Minimal pairs: the sentences themselves, and each probability by a forward pass of its own."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

import evaluate
from engine.minimal_pairs import pairs
from small_models import make_checkpoint
from system.errors import UsageError
from text.tokenizer import CharTokenizer


def test_pairs_differ_in_one_word_or_in_its_place():
    every = [pair for found in pairs().values() for pair in found]
    assert len(every) > 200 and len(set(every)) == len(every)
    for good, bad in every:
        one, two = good.split(), bad.split()
        changed = sum(a != b for a, b in zip(one, two, strict=True))
        assert changed == 1 or (changed == 2 and Counter(one) == Counter(two))


@torch.no_grad()
def test_the_likelier_sentence_is_the_answer(in_tmp, capsys):
    every = pairs()
    tokenizer = CharTokenizer.train(
        [sentence for _, p in every.items() for pair in p for sentence in pair] + ["\n"]
    )
    model = make_checkpoint("x.pt", tokenizer, block_size=64)

    def probability(sentence):
        ids = torch.tensor([tokenizer.encode("\n" + sentence)])
        return model(ids)[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None]).sum()

    right = {n: [probability(a) > probability(b) for a, b in p] for n, p in every.items()}
    assert evaluate.main(["--checkpoint-path", "x.pt", "--minimal-pairs", "--json", "e.json"]) == 0
    *rows, whole = json.loads(Path("e.json").read_text())["minimal_pairs"]
    for row, (name, found) in zip(rows, right.items(), strict=True):
        assert (row["phenomenon"], row["pairs"]) == (name, len(found))
        assert row["accuracy"] == pytest.approx(sum(found) / len(found))
    assert whole["pairs"] == sum(map(len, right.values()))
    assert f"{whole['accuracy']:.1%} ± {whole['error']:.1%}" in capsys.readouterr().out
    with pytest.raises(UsageError, match="exclude each other"):
        evaluate.main(["--checkpoint-path", "x.pt", "--minimal-pairs", "--wikitext", "."])
