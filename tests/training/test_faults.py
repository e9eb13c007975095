"""Training that is killed or stopped, or loses its disk; `fault_campaign.py` kills more often."""

import contextlib
import functools
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

import train_shakespeare
from conftest import error_line, run
from engine.checkpoint import best_path, last_path, read_checkpoint, save_checkpoint
from fault_campaign import CHECKPOINT_INTERVAL, campaign
from script_runner import StartedScript
from soak import soak
from system.errors import UserError
from training import trainer as training_trainer

SMALL = (
    *("--data-path", "small.txt", "--hidden-dim", 32, "--num-layers", 1, "--num-heads", 2),
    *("--block-size", 16, "--batch-size", 4, "--eval-interval", 20, "--eval-iters", 1),
    *("--checkpoint-interval", 10, "--checkpoint-path", "c/x", "--device", "cpu"),
    *("--sample-tokens", 4),
)


@pytest.mark.parametrize(
    "variant, kills",
    [
        ("newton", 4),
        pytest.param("published", 3, marks=pytest.mark.slow),
        pytest.param("vanilla", 3, marks=pytest.mark.slow),
        pytest.param("bf16", 3, marks=pytest.mark.slow),
    ],
)
def test_killed_anywhere(variant, kills, tmp_path):
    """SIGKILL at random moments, some while a checkpoint is being written: the result is
    bit-identical to an undisturbed run, and at most one checkpoint interval is repeated."""
    result = campaign(tmp_path, variant, kills, steps=70)
    assert result["kills"] == kills and result["mismatches"] == result["damaged"] == 0, result
    assert result["in_writing"] >= 1
    assert result["most_repeated"] <= CHECKPOINT_INTERVAL


def started(cwd, *flags, prepare=None):
    """A training in a process of its own."""
    return StartedScript("train_shakespeare.py", (*SMALL, *flags), cwd, prepare=prepare)


def ended(process, code):
    """`(stdout, stderr)` of a training that must end with this exit code and no traceback."""
    output, errors = process.communicate(timeout=120)
    assert process.returncode == code, output + errors
    assert "Traceback" not in errors, errors
    return output, errors


def until(condition, process=None):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline and (process is None or process.poll() is None)
        time.sleep(0.002)


def one_error(errors):
    (line,) = (line for line in errors.splitlines() if "error:" in line)
    return line


@pytest.fixture
def trained(in_tmp, small_text):
    """Train for ten steps; returns the path of the last checkpoint."""
    run("train_shakespeare.py", *SMALL, "--max-steps", 10, cwd=in_tmp, check=0)
    return in_tmp / last_path("c/x")


ASKED_TWICE = """
import os, signal, sys, time
from training.ranks import Ranks
from training.stop_request import StopRequest
first, second = (getattr(signal, name) for name in sys.argv[1:3])
with StopRequest() as stop:
    os.kill(os.getpid(), first)
    stop.agree(Ranks())
    assert stop.signal == first and stop.exit_code == 128 + first
    print("asked", flush=True)
    os.kill(os.getpid(), second)
    print("still here", flush=True)
"""


@pytest.mark.parametrize(
    "first, second",
    [("SIGINT", "SIGINT"), ("SIGTERM", "SIGTERM"), ("SIGINT", "SIGTERM"), ("SIGHUP", "SIGINT")],
)
def test_a_second_signal_exits_at_once(first, second, in_tmp, monkeypatch):
    """Whatever the first was; torchrun's repetition of a Ctrl-C does not count as the second."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    (in_tmp / "asked.py").write_text(ASKED_TWICE)
    for launched, code in (({}, -getattr(signal, second)), ({"TORCHELASTIC_RUN_ID": "x"}, 0)):
        result = run(in_tmp / "asked.py", first, second, cwd=in_tmp, check=code, env=launched)
        assert "asked" in result.stdout
        assert ("still here" in result.stdout) == bool(launched)


def test_two_signals_damage_nothing(trained, in_tmp):
    """The second may come while the checkpoint for the first is being written."""
    process = started(in_tmp, "--resume", "--max-steps", 100_000)
    before = trained.stat().st_mtime_ns
    until(lambda: trained.stat().st_mtime_ns != before, process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGTERM, 143)
    step = read_checkpoint(trained)["iter"]
    done = run(
        "train_shakespeare.py", *SMALL, "--resume", "--max-steps", step + 5, cwd=in_tmp, check=0
    )
    assert f"resuming at step {step}" in done.stdout


def test_the_printed_command_continues(trained, in_tmp):
    process = started(in_tmp, "--resume", "--max-steps", 100_000, "--run-name", "other")
    until(lambda: read_checkpoint(trained)["iter"] >= 20, process)
    process.send_signal(signal.SIGTERM)
    output, _ = ended(process, 143)
    step = read_checkpoint(trained)["iter"]
    (command,) = re.findall("continue with: python (.*)", output)
    assert f"stopped at step {step}" in output and "--run-name other" in command
    words = [*command.split()[1:], "--max-steps", str(step + 1)]
    again = run("train_shakespeare.py", *words, cwd=in_tmp, check=0)
    assert f"resuming at step {step}" in again.stdout
    assert (in_tmp / "runs" / "other" / "metrics.jsonl").exists()


@contextlib.contextmanager
def full_disk(folder, kib):
    """Mount a file system of `kib` KiB; skips if that is not allowed."""
    made = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(made, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills(trained, in_tmp):
    """The previous checkpoint stays, and training continues from it once there is room."""
    contents = trained.read_bytes()
    with full_disk(in_tmp / "c", kib=len(contents) // 1024 * 7 // 4):
        trained.write_bytes(contents)
        process = started(in_tmp, "--resume", "--max-steps", 40)
        line = one_error(ended(process, 1)[1])
        assert "No space left" in line and "free some space" in line and "c/x" in line
        assert trained.read_bytes() == contents and not list(in_tmp.glob("c/*.partial"))
    done = run("train_shakespeare.py", *SMALL, "--resume", "--max-steps", 40, cwd=in_tmp, check=0)
    assert "resuming at step 10" in done.stdout


def test_a_limit_on_file_sizes(trained, in_tmp):
    """The previous checkpoint stays if the next one is larger than files may be."""
    contents = trained.read_bytes()
    limit = (len(contents) * 3 // 4, resource.RLIM_INFINITY)
    limited = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, limit)
    process = started(in_tmp, "--resume", "--max-steps", 40, prepare=limited)
    line = one_error(ended(process, 1)[1])
    assert "c/x" in line and "free some space" in line
    assert trained.read_bytes() == contents and not list(in_tmp.glob("c/*.partial"))


def test_a_missing_directory_is_made_again(trained, in_tmp):
    process = started(in_tmp, "--resume", "--max-steps", 200)
    before = trained.stat().st_mtime_ns
    until(lambda: trained.stat().st_mtime_ns != before, process)
    (in_tmp / "c").rename(in_tmp / "gone")
    ended(process, 0)
    assert read_checkpoint(trained)["iter"] == 200


def test_a_directory_that_becomes_a_file(trained, in_tmp):
    process = started(in_tmp, "--resume", "--max-steps", 100_000)
    before = trained.stat().st_mtime_ns
    until(lambda: trained.stat().st_mtime_ns != before, process)
    (in_tmp / "c").rename(in_tmp / "gone")
    (in_tmp / "c").write_text("mine")
    assert "--checkpoint-path" in one_error(ended(process, 1)[1])
    assert (in_tmp / "c").read_text() == "mine"
    assert read_checkpoint(in_tmp / "gone" / trained.name)["iter"] >= 20


def test_a_read_only_checkpoint_is_kept(trained, in_tmp):
    """A rename would replace it without asking, and who made it read-only wants to keep it."""
    contents = trained.read_bytes()
    trained.chmod(0o444)
    result = run("train_shakespeare.py", *SMALL, "--resume", "--max-steps", 40, cwd=in_tmp, check=1)
    assert "read-only" in error_line(result) and trained.read_bytes() == contents
    with pytest.raises(UserError, match="read-only"):
        save_checkpoint(trained, {})
    assert trained.read_bytes() == contents


def resumed(flags=("--resume",)):
    return train_shakespeare.main([*map(str, SMALL), *flags, "--max-steps", "12"])


def test_a_damaged_checkpoint_is_reported(trained, in_tmp, capsys):
    """Cut at every tenth of its length; `_best` is used only if the user names it."""
    contents = trained.read_bytes()
    for tenth in range(10):
        trained.write_bytes(contents[: len(contents) * tenth // 10])
        with pytest.raises(UserError, match=r"x_last\.pt.*--resume-from"):
            resumed()
    with pytest.raises(UserError, match="x_last"):
        resumed()
    assert resumed(("--resume-from", str(best_path("c/x")))) == 0
    assert "resuming at step 10" in capsys.readouterr().out
    assert read_checkpoint(trained)["iter"] == 12


def test_every_flipped_byte_is_seen(trained):
    """Also in headers, padding and table of contents, which a zip's checksums do not cover."""
    contents = trained.read_bytes()
    edges = [*range(0, 300), *range(len(contents) - 300, len(contents))]
    for place in (*edges, *range(300, len(contents) - 300, 499)):
        flipped = bytearray(contents)
        flipped[place] ^= 1 << place % 8
        trained.write_bytes(flipped)
        with pytest.raises(UserError, match=r"damaged|truncated|compressed|claims"):
            read_checkpoint(trained)
    trained.write_bytes(contents + b"\0")
    with pytest.raises(UserError, match="damaged"):
        read_checkpoint(trained)
    trained.write_bytes(contents)
    assert read_checkpoint(trained)["iter"] == 10


def test_a_half_written_file_is_removed(trained, in_tmp):
    partial = Path(f"{best_path('c/x')}.partial")
    partial.write_bytes(b"half")
    assert resumed() == 0
    assert not partial.exists()


@pytest.mark.parametrize("recipe", ["gpt2", "modern"])
def test_an_fp16_overflow_does_not_count_as_skipped(recipe, in_tmp, small_text):
    """The scaler halves its scale until the gradients fit; then training goes on. Under the modern
    recipe neither AdamW nor Muon takes a step before."""
    from text.preparation import prepare_data
    from training.config import resolve
    from training.options import train_parser

    flags = [*map(str, SMALL), "--no-repulsion", "--warmup-steps", "0", "--recipe", recipe]
    config = resolve(train_parser("", "").parse_args(flags))
    data = prepare_data("shakespeare", str(small_text), say=lambda line: None)
    trainer = training_trainer.Trainer(config, data, torch.device("cpu"))
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = {k: v.clone() for k, v in trainer.raw_model.state_dict().items()}
    trainer.step()
    after = trainer.raw_model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert trainer.progress["skipped"] == trainer.progress["skipped_in_a_row"] == 0
    assert trainer.scaler.get_scale() == 2.0**126
    for _ in range(20):
        trainer.step()
    assert trainer.progress["skipped"] == 0 and trainer.is_sound()
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads Linux's /proc")
def test_nothing_grows(tmp_path):
    """Memory and open files of a training stay the same; `soak.py --minutes 60` takes longer."""
    result = soak(tmp_path, "ngt", seconds=4)
    assert result["growth"] < 0.05 and result["files"] <= result["files_after_warm_up"], result
    assert result["exit_code"] == 143 and result["steps"] > 0
