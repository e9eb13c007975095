"""Tests evaluate.py: each loss against the same loss computed another way."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import evaluate
from conftest import error_line, run
from engine import evaluation
from engine.checkpoint import load_model
from small_models import make_checkpoint
from system.errors import UsageError
from text.preparation import prepare_data
from text.token_files import open_token_data

TRAIN = (
    *("train_shakespeare.py", "--dataset", "text", "--data-path", "small.txt"),
    *("--tokenizer", "char", "--hidden-dim", 16, "--num-layers", 2, "--num-heads", 2),
    *("--block-size", 64, "--batch-size", 4, "--max-steps", 30, "--eval-interval", 30),
    *("--eval-iters", 50, "--warmup-steps", 5, "--checkpoint-path", "x.pt"),
)


@pytest.fixture(params=[(), ("--model", "vanilla", "--pos", "learned")], ids=["newton", "vanilla"])
def trained(request, in_tmp, small_text):
    """Train a short run; returns its last validation loss."""
    run(*TRAIN, *request.param, cwd=in_tmp, check=0)
    return json.loads((in_tmp / "runs/x/metrics.jsonl").read_text().splitlines()[-1])["val_loss"]


def evaluated(*flags):
    command = ["--checkpoint-path", "x.pt_best.pt", "--json", "e.json", *flags]
    assert evaluate.main([str(word) for word in command]) == 0
    return json.loads(Path("e.json").read_text())


def test_parts_make_up_the_whole(trained, capsys):
    """The mean of the groups, weighted by their tokens, is the trainer's loss.

    What is printed of the long range is what is written.
    """
    result = evaluated("--context-lengths", 64, "--num-windows", 3, "--long-range", 2)
    places = result["by_place"]
    weights = [row["last"] - row["first"] + 1 for row in places]
    assert sum(weights) == 64
    assert np.average([row["loss"] for row in places], weights=weights) == pytest.approx(trained)
    ranks = result["by_frequency"]
    mean = np.average([row["loss"] for row in ranks], weights=[row["tokens"] for row in ranks])
    assert mean == pytest.approx(trained)
    printed = capsys.readouterr().out
    assert result["long_range"]["trials"] == 2 and "pass key of five digits: left out" in printed
    for row in result["long_range"]["repeats"]:
        number = "longer than" if row["gain"] is None else f"gain {row['gain']:+.4f} ±"
        assert re.search(rf"{row['distance']:,} tokens later .*{re.escape(number)}", printed)


@torch.no_grad()
def test_length_by_hand(trained):
    """The loss of the same 64 tokens after each context, one sequence at a time."""
    result = evaluated("--context-lengths", "64,100,250", "--num-windows", 4)
    model, _, checkpoint = load_model("x.pt_best.pt")
    tokens = np.asarray(open_token_data(Path(checkpoint["config"]["token_directory"])).valid)
    stride = (len(tokens) - 1) // 4
    vanilla = checkpoint["config"]["model"] == "vanilla"
    for row in result["by_length"]:
        assert row["tokens"] == 4 * 64
        if vanilla and row["context"] > 64:
            assert row["loss"] is None  # vanilla has no positions beyond its block size
            continue
        losses = []
        for n in range(1, 5):
            piece = torch.tensor(tokens[n * stride - row["context"] : n * stride + 1].astype(int))
            logits = model(piece[None, :-1])[0, -64:]
            losses.append(F.cross_entropy(logits, piece[-64:]).item())
        assert row["loss"] == pytest.approx(np.mean(losses), abs=1e-5)


class Copier(torch.nn.Module):
    """Predicts what followed the last occurrence of the token; if there is none, any token."""

    max_context = None

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size = vocab_size
        self.config = None
        self.unused = torch.nn.Parameter(torch.zeros(()))

    def forward(self, tokens):
        logits = torch.zeros(*tokens.shape, self.vocab_size)
        for b, row in enumerate(tokens.tolist()):
            followed = {}
            for t, token in enumerate(row):
                if token in followed:
                    logits[b, t, followed[token]] = 20.0
                if t + 1 < len(row):
                    followed[token] = row[t + 1]
        return logits


def test_repeats_of_a_model_that_copies():
    """If no token of the text repeats, a model that copies predicts only the repeated strings."""
    vocab_size = 3000
    tokens = np.arange(2900)
    losses = evaluation.Losses(Copier(vocab_size), {})
    rows = evaluation.on_repeats(losses, tokens, vocab_size, 4, 250)
    assert [(row["text"], row["gap"]) for row in rows] == [
        *(("real", gap) for gap in (20, 100, 200)),
        *(("random", gap) for gap in (20, 100)),
    ]
    for row in rows:
        assert row["once"] > 5 and row["again"] < 2, row
    assert rows[0]["again"] < 0.01


def test_a_table_without_lines_says_why(in_tmp, small_text, capsys):
    """A context shorter than the tokens that are judged, a short text, a short window."""
    with pytest.raises(UsageError, match="--context-lengths 10: give at least 64"):
        evaluate.main(["--checkpoint-path", "no.pt", "--context-lengths", "128,10"])
    prepared = prepare_data("text", small_text, tokenizer="char", say=lambda line: None)
    make_checkpoint("x.pt", prepared.tokenizer, token_directory=str(prepared.directory))
    flags = ["--checkpoint-path", "x.pt", "--num-windows", "2", "--context-lengths"]
    assert evaluate.main([*flags, "9999"]) == 0
    told = capsys.readouterr().out
    assert "loss by length of the context: left out, the validation text is too short" in told
    assert "loss of a repeated string: left out, a window is too short" in told
    rows = {"text": "real", "gap": 20, "again": 1.0, "once": 60.0}
    empty = {"by_length": [], "by_place": [], "by_frequency": []}
    evaluate.show(empty | {"repeats": [rows, rows | {"once": 3.0}]}, 64)
    told = capsys.readouterr().out
    assert "a probability > 1e6 times as large" in told and "a probability 7.4 times" in told


def test_ranks():
    ranks = evaluation.frequency_ranks(np.array([3, 3, 3, 1, 1, 0]), 5)
    assert ranks.tolist() == [3, 2, 4, 1, 5]


def test_bad_input_is_one_line(in_tmp, small_text):
    result = run("evaluate.py", "--checkpoint-path", "no.pt", cwd=in_tmp, check=1)
    assert "no.pt does not exist" in error_line(result)
    run(*TRAIN, cwd=in_tmp, check=0)
    result = run("evaluate.py", "--checkpoint-path", "x.pt_best.pt", cwd=in_tmp, check=0)
    assert result.stderr.count("is left out") == 2  # 2048 and 4096 tokens of a short text
    (in_tmp / "data").rename(in_tmp / "elsewhere")
    result = run("evaluate.py", "--checkpoint-path", "x.pt_best.pt", cwd=in_tmp, check=1)
    assert "prepare_data.py" in error_line(result)
