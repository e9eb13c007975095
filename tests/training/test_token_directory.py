"""Training from token files alone, on a machine that has no text."""

import json
import shutil
from pathlib import Path

import pytest

import train_shakespeare
from engine.checkpoint import read_checkpoint
from small_runs import TINY, assert_same_run
from system.errors import run_script
from token_folders import prepare


def train(*flags):
    words = [*TINY, "--dataset", "text", "--max-steps", 6, "--sample-tokens", 0, *flags]
    return train_shakespeare.main([str(word) for word in words])


def refused(capsys, *flags):
    """The line on stderr of a training that is refused."""
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: train(*flags))
    error = capsys.readouterr().err.strip()
    assert stop.value.code and error.count("\n") == 0, error
    return error


@pytest.fixture
def tokens(in_tmp, small_text):
    """A directory of token files, with nothing of the text left."""
    assert train("--data-path", small_text, "--checkpoint-path", "c/text") == 0
    (made,) = Path("data/tokens").iterdir()
    shutil.copytree(made, "copied")
    shutil.rmtree("data")
    small_text.unlink()
    return Path("copied")


def test_it_is_the_same_training(tokens):
    """Weights and curve are those of a training on the text, and --resume knows the directory."""
    flags = ("--token-directory", tokens, "--checkpoint-path", "c/tokens")
    assert train(*flags) == 0
    assert_same_run(read_checkpoint("c/text_last.pt"), read_checkpoint("c/tokens_last.pt"))
    assert train("--resume", "--checkpoint-path", "c/tokens", "--max-steps", 8) == 0
    assert read_checkpoint("c/tokens_last.pt")["iter"] == 8
    # a run that began with the text goes on without it
    assert train("--resume", "--checkpoint-path", "c/text", *flags[:2], "--max-steps", 8) == 0
    assert_same_run(read_checkpoint("c/text_last.pt"), read_checkpoint("c/tokens_last.pt"))


def test_the_tokenizer_in_the_checkpoint_is_enough(in_tmp, small_text, capsys):
    """Its file was moved and the token files are gone: the run goes on as if they were there."""
    bpe = ("--data-path", small_text, "--tokenizer", "bpe", "--bpe-vocab-size", 270)
    for name, path in (("one", "one.json"), ("two", "two.json")):
        assert train(*bpe, "--tokenizer-path", path, "--checkpoint-path", f"c/{name}") == 0
    assert train("--resume", "--checkpoint-path", "c/one", "--max-steps", 8) == 0
    Path("two.json").rename("moved.json")
    shutil.rmtree("data")
    resume = ("--resume", "--checkpoint-path", "c/two")
    assert train(*resume, "--max-steps", 7) == 0 and "two.json" not in capsys.readouterr().err
    assert train(*resume, "--max-steps", 8, "--tokenizer-path", "two.json") == 0
    line = "--tokenizer-path two.json does not exist: using the tokenizer in c/two_last.pt"
    assert line in capsys.readouterr().err and not Path("two.json").exists()
    assert_same_run(read_checkpoint("c/one_last.pt"), read_checkpoint("c/two_last.pt"))
    assert train(*resume, "--max-steps", 10, "--tokenizer-path", "moved.json") == 0


def test_what_cannot_be_used_is_one_line(tokens, capsys):
    small = Path("other.txt")
    small.write_text("other letters: xyz. " * 400)
    other = prepare("text", small).directory
    flags = ("--resume", "--checkpoint-path", "c/text")
    line = refused(capsys, *flags, "--token-directory", other)
    assert "another text" in line and "--token-directory" in line
    meta, wanted = (json.loads((x / "meta.json").read_text()) for x in (other, tokens))
    meta["source_sha256"] = wanted["source_sha256"]
    (other / "meta.json").write_text(json.dumps(meta))
    line = refused(capsys, *flags, "--token-directory", other)
    assert "another tokenizer" in line and "--token-directory" in line
    (tokens / "train.bin").unlink()
    line = refused(capsys, "--token-directory", tokens, "--checkpoint-path", "c/x")
    assert "--token-directory" in line and "train.bin" in line and "prepare_data.py" in line
    for missing in ("nowhere", "other.txt"):
        line = refused(capsys, "--token-directory", missing, "--checkpoint-path", "c/x")
        assert "--token-directory" in line and missing in line
    assert not list(Path("c").glob("x*"))
