"""A run from another run's config.json, and what `report.py --diff` says of the two."""

import json
from pathlib import Path

import pytest

import report
import train_shakespeare
from system.errors import UsageError, UserError
from training.config import SETTINGS

FIRST = (
    *("--dataset", "text", "--data-path", "small.txt"),
    *("--tokenizer", "char", "--hidden-dim", 16, "--num-layers", 1, "--num-heads", 2),
    *("--block-size", 16, "--batch-size", 4, "--max-steps", 4, "--eval-interval", 2),
    *("--eval-iters", 1, "--warmup-steps", 1, "--recipe", "modern", "--learning-rate", 0.004),
    *("--seed", 5, "--threads", 1),
)


def config(name):
    return json.loads(Path(f"runs/{name}/config.json").read_text())


def losses(name):
    rows = Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["val_loss"] for row in rows]


def test_a_run_from_a_file(in_tmp, small_text, capsys):
    """The same settings give the same losses; flags win, and the minimum follows a new peak."""
    train = train_shakespeare.main
    assert train([*map(str, FIRST), "--checkpoint-path", "a.pt"]) == 0
    source = ["--config", "runs/a/config.json"]
    capsys.readouterr()
    assert train([*source, "--checkpoint-path", "b.pt"]) == 0
    assert "no effect" not in capsys.readouterr().err
    assert losses("b") == losses("a")
    assert {name: config("b")[name] for name in SETTINGS} == {
        name: config("a")[name] for name in SETTINGS
    }
    flags = ["--learning-rate", "0.002", "--exponent", "3"]
    assert train([*source, *flags, "--checkpoint-path", "c.pt"]) == 0
    changed = {name for name in SETTINGS if config("c")[name] != config("a")[name]}
    assert changed == {"learning_rate", "min_learning_rate", "exponent"}
    assert config("c")["min_learning_rate"] == pytest.approx(0.0002)

    capsys.readouterr()
    assert report.main(["--diff", "a", "runs/c/"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    told = {words[0]: words[1:] for words in lines}
    assert told["exponent"] == ["4", "3"] and told["learning_rate"] == ["0.004", "0.002"]
    assert told["val_loss"] == [f"{losses(name)[-1]:.6g}" for name in "ac"]
    assert "seed" not in told and "command" not in told
    assert report.main(["--diff", "a", "b"]) == 0
    assert "the same settings" in capsys.readouterr().out
    with pytest.raises(UserError, match="no run called nothing"):
        report.main(["--diff", "a", "nothing"])


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "cannot be read"),
        ("[" * 100000, "cannot be read"),
        ("[]", "no config.json of a run"),
        ('{"model_type": "ngt", "dataset": "moon"}', "dataset is 'moon'"),
        ('{"model_type": "ngt", "dataset": "text", "num_heads": 0}', "num_heads is 0"),
        ('{"model_type": "ngt", "dataset": "text", "use_amp": "yes"}', "use_amp is 'yes'"),
        ('{"model_type": "ngt", "dataset": "text", "seed": {}}', "seed is a dict"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_none(content, words, in_tmp):
    if content is not None:
        Path("c.json").write_text(content)
    with pytest.raises(UsageError, match=words):
        train_shakespeare.main(["--config", "c.json", "--dry-run"])
