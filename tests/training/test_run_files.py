"""No run overwrites the files of another, however runs are started, stopped and restarted."""

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

import chat
import evaluate
import report
import train_shakespeare
import visualize_coords
from conftest import ROOT
from engine.checkpoint import read_checkpoint
from system.errors import UserError
from training import loop
from training.run_files import RunFiles
from training.trainer import Trainer

SMALL = (
    *("--data-path", "small.txt", "--hidden-dim", 16, "--num-layers", 1, "--num-heads", 2),
    *("--block-size", 16, "--batch-size", 4, "--eval-interval", 10, "--eval-iters", 1),
    *("--checkpoint-interval", 50, "--device", "cpu", "--sample-tokens", 0),
)


def train(*flags):
    assert train_shakespeare.main([*map(str, (*SMALL, *flags))]) == 0


def steps(name):
    path = f"runs/{name}/metrics.jsonl"
    with open(path) as file:
        return [json.loads(line)["step"] for line in file]


@pytest.fixture
def finished(in_tmp, small_text):
    """A run c/a of 20 steps."""
    train("--checkpoint-path", "c/a", "--max-steps", 20)
    return in_tmp


def die(*_):
    raise RuntimeError("killed")


def test_killed_before_its_first_checkpoint_it_starts_again(in_tmp, small_text, monkeypatch):
    """Its own metrics do not stop it; those of another run do."""
    with monkeypatch.context() as patched:
        patched.setattr(loop, "save_checkpoint", die)
        with pytest.raises(RuntimeError):
            train("--checkpoint-path", "c/a", "--max-steps", 20)
    assert steps("a") == [10] and not list(in_tmp.glob("c/*.pt"))
    with pytest.raises(UserError, match="metrics of another run"):
        train("--checkpoint-path", "c/a", "--max-steps", 20)
    with pytest.raises(UserError, match="metrics of another run, c/a"):
        train("--checkpoint-path", "d/a", "--max-steps", 20, "--resume")
    train("--checkpoint-path", "c/a", "--max-steps", 20, "--resume")
    assert steps("a") == [10, 20]


def test_a_forgotten_run_name_is_noticed(finished):
    """Resuming must not truncate another run's metrics."""
    train("--checkpoint-path", "d/a", "--run-name", "other", "--max-steps", 10)
    with pytest.raises(UserError, match=r"metrics of another run, c/a.*--run-name"):
        train("--checkpoint-path", "d/a", "--max-steps", 30, "--resume")
    assert steps("a") == [10, 20]
    train("--checkpoint-path", "d/a", "--run-name", "other", "--max-steps", 30, "--resume")
    assert steps("a") == [10, 20] and steps("other") == [10, 20, 30]


def test_files_of_other_programs_are_kept(finished):
    """A run is refused beside them; --overwrite and --resume leave them as they are."""
    folder = finished / "runs/b"
    with SummaryWriter(folder) as writer:
        writer.add_scalar("loss", 1.0, 1)
        writer.add_embedding(torch.eye(3), tag="theirs", global_step=7)
    (folder / "events.out.tfevents.1.other").write_text("keep")
    (folder / "projector").mkdir()
    (folder / "projector/notes.txt").write_text("keep")
    (folder / "config.json").write_text('{"epochs": 3}')
    theirs = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    refused_for = {path for path in theirs if path.parent.name != "theirs"}
    for n, path in enumerate(refused_for):
        alone = finished / f"runs/alone{n}" / path.relative_to(folder)
        alone.parent.mkdir(parents=True)
        alone.write_bytes(theirs[path])
        name = alone.relative_to(finished)
        with pytest.raises(UserError, match=f"{name} was written by another .* --run-name"):
            train("--checkpoint-path", f"c/alone{n}", "--max-steps", 10)
        assert alone.read_bytes() == theirs[path]
    assert n == 4 and not list(finished.glob("c/alone*.pt"))
    (folder / "config.json").unlink()
    del theirs[folder / "config.json"]
    for flags in (("--overwrite", 20), ("--overwrite", 10), ("--resume", 15)):
        train("--checkpoint-path", "c/b", flags[0], "--max-steps", flags[1])
        listing = folder / "projector_config.pbtxt"
        assert {path: path.read_bytes() for path in theirs} | {listing: theirs[listing]} == theirs
        assert "7/theirs/tensors.tsv" in listing.read_text()
    assert steps("b") == [10, 15] and len(list(folder.glob("events.*"))) == 3
    assert {path.name for path in folder.glob("projector/*")} == {"notes.txt", "00010", "00015"}


def test_overwrite_keeps_the_earlier_run_until_it_has_saved(finished, monkeypatch):
    """If the new run fails at its first step, the earlier run is unchanged."""
    before = (finished / "c" / "a_last.pt").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", die)
        with pytest.raises(RuntimeError):
            train("--checkpoint-path", "c/a", "--max-steps", 30, "--overwrite")
    assert (finished / "c" / "a_last.pt").read_bytes() == before and steps("a") == [10, 20]
    assert not list(finished.rglob("*.old"))
    train("--checkpoint-path", "c/a", "--max-steps", 10, "--overwrite")
    assert read_checkpoint("c/a_last.pt")["iter"] == 10 and steps("a") == [10]
    assert not list(finished.rglob("*.old"))


def test_what_was_set_aside_outlives_a_kill(in_tmp):
    """Killed attempts do not lose the run that was there before the first of them."""
    files = RunFiles("c/a")
    metrics = files.directory / "metrics.jsonl"
    for path in (files.last, metrics):
        path.parent.mkdir(parents=True)
        path.write_text("good")
    files.set_aside()
    metrics.write_text("of an attempt that was killed before it saved anything")
    again = RunFiles("c/a")
    again.set_aside()
    again.bring_back()
    assert files.last.read_text() == metrics.read_text() == "good"


def test_the_best_of_another_run_is_not_called_its_own(finished, capsys):
    """A run that continues another's checkpoint has no best before its own first evaluation."""
    torch.manual_seed(0)
    train("--resume-from", "c/a_last.pt", "--checkpoint-path", "c/b", "--max-steps", 30)
    assert "in c/b_best.pt" in capsys.readouterr().out
    assert read_checkpoint("c/b_best.pt")["iter"] == 30
    train(
        "--resume-from", "c/b_last.pt", "--checkpoint-path", "c/a", "--max-steps", 40, "--overwrite"
    )
    assert read_checkpoint("c/a_best.pt")["iter"] == 40 and steps("a") == [40]


DIVERGE = ("--learning-rate", 5, "--min-learning-rate", 5)  # whatever follows is worse


def rows(name):
    with open(f"runs/{name}/metrics.jsonl") as file:
        return {row["step"]: row["val_loss"] for row in map(json.loads, file)}


def test_the_best_starts_anew_if_its_file_is_gone(finished, capsys, monkeypatch):
    """Also if it is deleted during the run; the end names no file that is not there."""
    resume = ("--resume", "--checkpoint-path", "c/a", "--max-steps")
    (finished / "c/a_best.pt").unlink()
    train(*resume, 30, *DIVERGE)
    assert rows("a")[30] > rows("a")[20]
    best = read_checkpoint("c/a_best.pt")
    assert (best["iter"], best["best_val"]) == (30, rows("a")[30])
    assert f"loss {rows('a')[30]:.4f} in c/a_best.pt" in capsys.readouterr().out
    monkeypatch.setattr(loop, "save", lambda *_: None)
    (finished / "c/a_best.pt").unlink()
    train(*resume, 40)
    assert "c/a_best.pt" not in capsys.readouterr().out


def test_the_best_starts_anew_on_other_windows(finished, capsys):
    """The earlier one is kept. More windows than the text has are the same windows."""
    capsys.readouterr()
    resume = ("--resume", "--checkpoint-path", "c/a", "--max-steps")
    train(*resume, 30, *DIVERGE, "--eval-iters", 10)
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "--eval-iters" in x]
    assert "--eval-iters changes from 1 to 10" in line and "the best starts anew" in line
    assert read_checkpoint("c/a_best.pt")["best_val"] == rows("a")[30] > rows("a")[20]
    assert read_checkpoint("c/a_best.pt.old")["iter"] == 20
    train(*resume, 40, "--learning-rate", 50, "--min-learning-rate", 50, "--eval-iters", 11)
    assert "--eval-iters" not in capsys.readouterr().err
    assert rows("a")[40] > rows("a")[30] and read_checkpoint("c/a_best.pt")["iter"] == 30


def test_what_a_stopped_run_left_is_read(finished, capsys):
    """PATH is enough for every script; without a best checkpoint it is the last one."""
    scripts = {
        chat: ("--prompt", "The", "--max-new-tokens", 3),
        evaluate: ("--context-lengths", 64, "--num-windows", 2, "--json", "e.json"),
        visualize_coords: ("--text", "The quick brown fox"),
    }

    def read(path):
        """The checkpoint that each script names on stderr."""
        for script, flags in scripts.items():
            capsys.readouterr()
            assert script.main(["--checkpoint-path", path, *map(str, flags)]) == 0
            yield capsys.readouterr().err.split("reading ")[-1].split()[0]

    assert {*read("c/a")} == {"c/a_best.pt"}
    before = (finished / "c/a_best.pt").read_bytes()
    with pytest.raises(UserError, match="--png"):
        visualize_coords.main(["--checkpoint-path", "c/a", "--png", "c/a_best.pt"])
    assert (finished / "c/a_best.pt").read_bytes() == before
    (finished / "c/a_best.pt").unlink()
    for path in ("c/a", "c/a_best.pt"):
        assert {*read(path)} == {"c/a_last.pt"}
    assert json.loads((finished / "e.json").read_text())["checkpoint"] == "c/a_last.pt"
    report.main(["--runs", "a", "--output", "r.md"])
    assert "From `c/a_last.pt`." in (finished / "r.md").read_text()


def test_the_name_of_a_file_of_the_run_is_accepted_as_its_path(finished):
    train("--resume", "--checkpoint-path", "c/a_last.pt", "--max-steps", 30)
    assert sorted(path.name for path in finished.glob("c/*.pt")) == ["a_best.pt", "a_last.pt"]
    assert read_checkpoint("c/a_last.pt")["iter"] == 30


def test_one_process_at_a_time(finished):
    files = RunFiles("c/a")
    with files.locked(), pytest.raises(UserError, match="another process"):
        train("--resume", "--checkpoint-path", "c/a", "--max-steps", 30)
    train("--resume", "--checkpoint-path", "c/a", "--max-steps", 30)


def test_restarted_by_torchrun_it_goes_on_from_its_own_last(finished, monkeypatch):
    """Neither --resume-from nor --overwrite of the first attempt is applied again."""
    train("--checkpoint-path", "c/old", "--max-steps", 10)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this launch")
    fork = ("--resume-from", "c/a_last.pt", "--checkpoint-path", "c/b", "--max-steps")
    train(*fork, 30)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train(*fork, 40)
    assert steps("b") == [30, 40]
    # the first attempt of --overwrite died before it began: the files are still the earlier run's
    train("--checkpoint-path", "c/old", "--max-steps", 20, "--overwrite", "--seed", 7)
    assert read_checkpoint("c/old_last.pt")["config"]["seed"] == 7


def test_a_path_like_a_flag(in_tmp, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_shakespeare.py"])
    command = RunFiles("-q", "-r").resume_command()
    assert command == "python train_shakespeare.py --resume --checkpoint-path=-q --run-name=-r"
    assert RunFiles("checkpoints/shakespeare.pt").resume_command().endswith("py --resume")


def test_a_closed_terminal_saves(finished):
    """When its pseudo-terminal closes, training saves a checkpoint and exits with 129."""
    master, slave = pty.openpty()
    command = [sys.executable, ROOT / "train_shakespeare.py", *SMALL, "--resume"]
    command += ["--checkpoint-path", "c/a", "--max-steps", 100_000]
    process = subprocess.Popen(
        [*map(str, command)],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(slave)
    deadline, seen = time.monotonic() + 60, b""
    while b"   30 " not in seen:
        assert time.monotonic() < deadline
        seen += os.read(master, 65536)
    os.close(master)
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
    assert read_checkpoint("c/a_last.pt")["iter"] >= 30


def test_a_signal_before_there_is_anything_to_save(in_tmp, small_text):
    """SIGUSR1 during the start does not end the training."""
    command = [sys.executable, ROOT / "train_shakespeare.py", *SMALL, "--max-steps", 10]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE)
    while b"text:" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    process.stdout.read()
    assert process.wait(timeout=60) == 0
