"""Malicious files: each produces a one-line error, quickly and without much memory."""

import ctypes
import os
import time
from pathlib import Path

import pytest
import torch

import hostile_checkpoints
import hostile_files
from engine.checkpoint import load_model, read_checkpoint
from hostile_checkpoints import CONTENTS, FILES, TRAINING, Malice
from hostile_files import TOKEN_FILES, TOKENIZERS
from small_models import LETTERS, make_checkpoint
from system.machine import peak_memory_bytes

CPU = torch.device("cpu")
MOST_SECONDS = 20
MOST_BYTES = 400_000_000


def reset_peak_memory():
    """Reset this process's peak memory, or an earlier test hides this one's.

    Returns:
        Whether the system can do that.
    """
    path = Path("/proc/self/clear_refs")
    if path.exists():
        ctypes.CDLL(None).malloc_trim(0)  # what earlier tests freed, training has kept
        path.write_text("5")
    return path.exists()


@pytest.fixture
def watched(in_tmp):
    """Fails the test if it took long or much memory, or if code from a file has run."""
    reset_peak_memory()
    started, before = time.monotonic(), peak_memory_bytes(CPU)
    yield
    assert time.monotonic() - started < MOST_SECONDS
    assert peak_memory_bytes(CPU) - before < MOST_BYTES
    assert not os.path.exists("pwned") and not os.path.exists("planted.json")


def is_one_clear_line(message, name="evil"):
    return name in message and "\n" not in message and len(message) < 500 and message.isprintable()


@pytest.mark.parametrize("name", CONTENTS)
def test_contents(name, watched):
    assert is_one_clear_line(hostile_checkpoints.attempt_checkpoint(CONTENTS[name]))


@pytest.mark.parametrize("name", FILES)
def test_files(name, watched):
    assert is_one_clear_line(hostile_checkpoints.attempt_file(FILES[name]()))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """`(directory, checkpoint)` of a short real run."""
    folder = tmp_path_factory.mktemp("trained")
    before = os.getcwd()
    os.chdir(folder)
    try:
        return folder, hostile_checkpoints.train_a_little()
    finally:
        os.chdir(before)


NAMED = {
    "a device without memory": "--device meta",
    "text that never ends": "/dev/zero",
}


@pytest.mark.parametrize("name", TRAINING)
def test_resumed(name, trained, watched, monkeypatch):
    monkeypatch.chdir(trained[0])
    message = hostile_checkpoints.attempt_resume(trained[1], TRAINING[name])
    if name == "a tokenizer written elsewhere":  # the checkpoint's own is used
        assert message == ""
    else:
        assert is_one_clear_line(message, NAMED.get(name, "evil"))
    assert not (trained[0] / "planted.json").exists()


def test_the_unchanged_checkpoint_resumes(trained, monkeypatch, capsys):
    """So the errors of the others come from what was changed."""
    monkeypatch.chdir(trained[0])
    assert hostile_checkpoints.attempt_resume(trained[1], lambda checkpoint: None) == ""
    assert "resuming at step 2" in capsys.readouterr().out


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers(name, watched, capfd):
    """Refused before the library reads it, so it does not panic."""
    message = hostile_files.attempt_tokenizer(TOKENIZERS[name])
    assert is_one_clear_line(message, "--tokenizer-path evil.json cannot be used")
    assert "panicked" not in capfd.readouterr().err


def test_the_memory_check_notices_large_use(in_tmp):
    """Even if an earlier peak was as large."""
    earlier = b"x" * (2 * MOST_BYTES)
    del earlier
    if not reset_peak_memory():
        pytest.skip("this system cannot reset a peak")
    before = peak_memory_bytes(CPU)
    again = b"x" * (2 * MOST_BYTES)
    assert peak_memory_bytes(CPU) - before > MOST_BYTES and again


@pytest.mark.parametrize("name", TOKEN_FILES)
def test_token_files(name, watched):
    assert is_one_clear_line(hostile_files.attempt_tokens(TOKEN_FILES[name]), "data/tokens")


def test_a_pipe_is_not_waited_for(watched):
    os.mkfifo("evil.pt")
    assert "ordinary" in hostile_checkpoints.error_of(lambda: load_model("evil.pt"))


def test_a_global_in_the_pickle(watched):
    """It is refused, though `torch.load` without `weights_only` runs it."""
    message = hostile_checkpoints.attempt_checkpoint(
        lambda checkpoint: checkpoint.update(vocab=Malice())
    )
    assert "could run code" in message
    torch.load("evil.pt", weights_only=False)
    assert os.path.exists("pwned")
    os.rmdir("pwned")


def test_older_checkpoints_are_read(in_tmp):
    """A config that does not mention retardation has it if the weights do."""
    make_checkpoint("x.pt")
    good = torch.load("x.pt", weights_only=True)
    config = {k: v for k, v in good["config"].items() if k != "retardation"}
    torch.save(good | {"config": config}, "quiet.pt")
    assert load_model("quiet.pt")[0].config.retardation
    weights = {k: v for k, v in good["model_state"].items() if "retardation" not in k}
    torch.save(good | {"config": config, "model_state": weights}, "older.pt")
    model, tokenizer, _ = load_model("older.pt")
    assert not model.config.retardation and tokenizer.vocab_size == LETTERS.vocab_size
    assert read_checkpoint("older.pt")["iter"] == 7
