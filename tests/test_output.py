"""What is printed never decides over work: consoles that lack letters, output that fails."""

import io
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

import chat
import evaluate
import prepare_data
import report
import train_shakespeare
import visualize_coords
from engine.checkpoint import load_model, read_checkpoint
from script_runner import StartedScript
from small_models import make_checkpoint
from small_runs import TINY
from system.errors import run_script

NAME, ESCAPED = "модель", "\\u043c\\u043e\\u0434\\u0435\\u043b\\u044c"
TRAIN = (*TINY, "--data-path", f"{NAME}.txt", "--checkpoint-path", f"ck/{NAME}", "--device", "cpu")


def printed(monkeypatch, script, *words):
    """What a script prints at a console of the code page cp1252; it must end with code 0."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", write_through=True)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "stdout", stream)
        run_script(lambda: script.main([str(word) for word in words]))
    output = stream.buffer.getvalue().decode("cp1252")
    assert ended.value.code == 0, output
    return output


def test_a_console_without_these_letters(in_tmp, small_text, monkeypatch):
    """Every script escapes what a code page lacks, ends with 0, and has written its files."""
    small_text.rename(f"{NAME}.txt")
    prepare = ("--dataset", "shakespeare", "--data-path", f"{NAME}.txt")
    assert f"{ESCAPED}.txt" in printed(monkeypatch, prepare_data, *prepare)
    trained = printed(monkeypatch, train_shakespeare, *TRAIN, "--max-steps", 20)
    assert f"in ck/{ESCAPED}_best.pt" in trained and Path(f"runs/{NAME}/metrics.jsonl").exists()
    best = f"ck/{NAME}_best.pt"
    shown = printed(monkeypatch, report, "--runs", NAME, "--output", f"{NAME}.md")
    assert f"wrote {ESCAPED}.md" in shown and NAME in Path(f"{NAME}.md").read_text("utf-8")
    pictures = ("--output", f"{NAME}.html", "--png", f"{NAME}.png")
    drawn = printed(monkeypatch, visualize_coords, "--checkpoint-path", best, *pictures)
    assert f"wrote {ESCAPED}.html" in drawn and f"wrote {ESCAPED}.png" in drawn
    assert Path(f"{NAME}.png").read_bytes().startswith(b"\x89PNG")
    measured = ("--num-windows", 2, "--context-lengths", 64, "--json", "e.json")
    assert "loss" in printed(monkeypatch, evaluate, "--checkpoint-path", best, *measured)
    make_checkpoint("x.pt")
    answer = ("--prompt", "a", "--max-new-tokens", 200, "--temperature", 5)
    assert "\\ufffd" in printed(monkeypatch, chat, "--checkpoint-path", "x.pt", *answer)


def cp1252_console():
    sys.stdout.reconfigure(encoding="cp1252", errors="strict")


def test_signals_at_such_a_console_save(in_tmp, small_text):
    """SIGUSR1 saves and the training goes on; Ctrl-C saves, exits with 130."""
    small_text.rename(f"{NAME}.txt")
    flags = (*TRAIN, "--max-steps", 100_000, "--checkpoint-interval", 100_000)
    flags = (*flags, "--eval-interval", 50)
    process = StartedScript("train_shakespeare.py", flags, in_tmp, prepare=cp1252_console)
    metrics, last = Path(f"runs/{NAME}/metrics.jsonl"), Path(f"ck/{NAME}_last.pt")
    deadline = time.monotonic() + 60

    def until(condition):
        while not condition():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)

    until(lambda: metrics.exists() and metrics.read_text())
    process.send_signal(signal.SIGUSR1)
    until(last.exists)
    saved_at = read_checkpoint(last)["iter"]
    rows = len(metrics.read_text().splitlines())
    until(lambda: len(metrics.read_text().splitlines()) > rows)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, output + errors
    assert f"SIGUSR1 at step {saved_at}: ck/{ESCAPED}_last.pt" in output
    stopped_at = read_checkpoint(last)["iter"]
    assert stopped_at > saved_at and f"stopped at step {stopped_at}; continue with" in output


class Broken(io.StringIO):
    """An output that nothing can be written to, as on a full disk."""

    def write(self, text):
        raise OSError(28, "No space left on device")


def test_what_cannot_be_said_is_saved(in_tmp, small_text, monkeypatch):
    """On an output that fails, the files of each script are whole before its first line."""
    flags = ("--data-path", small_text, "--checkpoint-path", "x.pt", "--max-steps", 20)
    train_shakespeare.main([str(word) for word in (*TINY, *flags)])
    best = ("--checkpoint-path", "x.pt_best.pt")
    small = ("--num-windows", "2", "--context-lengths", "64")
    monkeypatch.setattr(sys, "stdout", Broken())
    for script, words in (
        (visualize_coords, (*best, "--output", "m.html", "--png", "m.png")),
        (evaluate, (*best, *small, "--json", "e.json")),
        (report, ("--runs", "x", "--output", "r.md")),
    ):
        with pytest.raises(OSError, match="No space"):
            script.main(words)
    assert Path("m.png").read_bytes().startswith(b"\x89PNG") and Path("m.html").exists()
    assert json.loads(Path("e.json").read_text())["by_length"]
    assert "ngt (newton" in Path("r.md").read_text()


def test_the_best_is_saved_before_its_row_is_shown(make_trainer, monkeypatch):
    """If the table cannot be written, the checkpoint of its row is there, and so is the row."""
    from training import loop as training_loop
    from training.run_files import RunFiles
    from training.run_log import RunLog

    trainer, files = make_trainer("--max-steps", 20, "--eval-interval", 10), RunFiles("x.pt", None)
    log = RunLog(files.directory, trainer.saved_config())

    def fail(self, row):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training_loop.TrainingDisplay, "row", fail)
    with pytest.raises(OSError, match="No space"):
        training_loop.loop(trainer, log, files)
    assert json.loads(Path("runs/x/metrics.jsonl").read_text())["step"] == 10
    assert load_model("x.pt_best.pt", trainer.device)[2]["iter"] == 10


def printing_to_a_pipe():
    os.dup2(os.open("pipe", os.O_WRONLY), 1)
    printing_to_a_pipe.before = sys.stdout  # whose end would close the pipe
    sys.stdout = os.fdopen(1, "w")


def test_a_training_whose_output_fails_saves(in_tmp, small_text):
    """As `| head` ends, the training saves and stops, as if its terminal was closed."""
    flags = ("--data-path", small_text, "--checkpoint-path", "x.pt", "--max-steps", 1_000_000)
    flags = (*TINY, *flags, "--checkpoint-interval", 1_000_000, "--eval-interval", 50)
    os.mkfifo("pipe")
    process = StartedScript("train_shakespeare.py", flags, in_tmp, prepare=printing_to_a_pipe)
    with open("pipe") as pipe:
        assert any(line.startswith("     50 ") for line in pipe)
    assert process.wait(60) == 129
    assert read_checkpoint("x.pt_last.pt")["iter"] > 50


def test_closed_output_is_discarded(in_tmp, small_text, monkeypatch):
    """After `>&-` Python has no stdout at all: scripts that ask it for its encoding still work."""
    make_checkpoint("x.pt")
    monkeypatch.setattr(sys, "stdout", None)
    for words in (("--prompt", "a"), ()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("a\n/tokens\n"))
        with pytest.raises(SystemExit) as ended:
            run_script(lambda words=words: chat.main(["--checkpoint-path", "x.pt", *words]))
        assert ended.value.code == 0
