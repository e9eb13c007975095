"""Training on several ranks, compared with the same training in one process."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from conftest import ROOT, run
from engine.checkpoint import read_checkpoint
from script_runner import run_on_ranks
from small_runs import assert_same_run

STEPS = 30
SMALL = (
    *("--data-path", "small.txt", "--hidden-dim", 16, "--num-layers", 2, "--num-heads", 2),
    *("--block-size", 16, "--batch-size", 8, "--gradient-accumulation-steps", 2),
    *("--max-steps", STEPS, "--warmup-steps", 5, "--repulsion-interval", 3),
    "--repulsion",
    *("--eval-interval", 10, "--eval-iters", 2, "--checkpoint-interval", 5, "--device", "cpu"),
    *("--sample-tokens", 4),
)


def torchrun(cwd, ranks, *flags, restarts=0):
    """Start a training on several ranks; returns torchrun's process."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc_per_node", ranks, "--max-restarts", restarts]
    return subprocess.Popen(
        [str(word) for word in (*launch, ROOT / "train_shakespeare.py", *SMALL, *flags)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process, code=0):
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code, output
    return output


def on_ranks(cwd, ranks, *flags):
    """Train to the end over several ranks; returns what they print."""
    return run_on_ranks(cwd, ranks, "train_shakespeare.py", *SMALL, *flags)


def named(name):
    return ("--checkpoint-path", f"{name}.pt", "--run-name", name)


def curve(cwd, name):
    lines = (cwd / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def weights(cwd, name):
    return read_checkpoint(cwd / f"{name}.pt_last.pt")["model_state"]


@pytest.mark.parametrize(
    "flags",
    [
        (),
        pytest.param(("--model", "vanilla"), marks=pytest.mark.slow),
        pytest.param(("--law", "published", "--no-radius-cutoff"), marks=pytest.mark.slow),
        pytest.param(("--recipe", "modern"), marks=pytest.mark.slow),
    ],
    ids=["newton", "vanilla", "published", "modern"],
)
def test_any_number_of_ranks_gives_one_curve(flags, in_tmp, small_text, request):
    """Losses of 1, 2 and 4 ranks agree to 1e-5 over 30 steps, also with each
    --shard; to 1e-4 with Muon, which computes in bf16."""
    limit = 1e-4 if "modern" in flags else 1e-5
    run("train_shakespeare.py", *SMALL, *flags, *named("one"), cwd=in_tmp, check=0)
    expected = curve(in_tmp, "one")
    assert expected[-1]["step"] == STEPS and expected[-1]["val_loss"] < expected[0]["val_loss"]
    others = {"two": (2, ()), "sharded": (2, ("--shard-optimizer",))}
    others["parts"] = (2, ("--shard", "model"))
    if flags or request.config.getoption("--slow"):
        others |= {"four": (4, ()), "four parts": (4, ("--shard", "model"))}
    for name, (ranks, more) in others.items():
        output = on_ranks(in_tmp, ranks, *flags, *more, *named(name))
        assert output.count("best validation loss") == 1  # only rank 0 prints
        found = curve(in_tmp, name)
        assert [row["step"] for row in found] == [row["step"] for row in expected]
        for key in ("train_loss", "val_loss"):
            for row, other in zip(found, expected, strict=True):
                assert row[key] == pytest.approx(other[key], abs=limit), (name, row["step"])


def killed(cwd, name, *flags, restarts):
    """Kill the second rank after the first checkpoint; returns what the run prints."""
    process = torchrun(cwd, 2, *flags, *named(name), restarts=restarts)
    last = cwd / f"{name}.pt_last.pt"
    deadline = time.monotonic() + 90
    while not last.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    kill_a_rank(process.pid)
    return finish(process, code=0 if restarts else 1)


@pytest.mark.parametrize(
    "shard, recipe",
    [
        ("optimizer", "gpt2"),
        pytest.param("optimizer", "modern", marks=pytest.mark.slow),
        ("model", "modern"),
    ],
)
def test_resuming_on_two_ranks_is_bit_identical(shard, recipe, in_tmp, small_text):
    """With sharding, and dropout whose random numbers differ from rank to rank."""
    flags = ("--recipe", recipe, "--dropout", 0.1, "--shard", shard)
    flags += ("--no-use-cosine-schedule", "--max-steps")
    on_ranks(in_tmp, 2, *flags, 20, *named("whole"))
    on_ranks(in_tmp, 2, *flags, 10, *named("cut"))
    assert "resuming at step 10" in on_ranks(in_tmp, 2, *flags, 20, "--resume", *named("cut"))
    whole, cut = (read_checkpoint(in_tmp / f"{name}.pt_last.pt") for name in ("whole", "cut"))
    assert_same_run(whole, cut)


LONGER = ("--max-steps", 200, "--dropout", 0.1, "--eval-interval", 100)


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["optimizer", "model"])
def test_a_rank_that_dies_is_replaced(shard, in_tmp, small_text):
    """With --max-restarts the run continues from its last checkpoint, and its weights are
    bit-identical to an undisturbed run's, with dropout and sharding."""
    flags = (*LONGER, "--shard", shard)
    finish(torchrun(in_tmp, 2, *flags, *named("whole")))
    assert "resuming at step" in killed(in_tmp, "cut", *flags, restarts=1)
    ours, expected = weights(in_tmp, "cut"), weights(in_tmp, "whole")
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["optimizer", "model"])
def test_a_rank_that_dies_ends_the_run(shard, in_tmp, small_text):
    """Within 90 seconds, naming the cause; one process can resume what two have written."""
    started = time.monotonic()
    assert "SIGKILL" in killed(in_tmp, "cut", *LONGER, "--shard", shard, restarts=0)
    assert time.monotonic() - started < 90
    assert 5 <= read_checkpoint(in_tmp / "cut.pt_last.pt")["iter"] < 200
    flags = (*SMALL, *LONGER, *named("cut"), "--resume")
    run("train_shakespeare.py", *flags, cwd=in_tmp, check=0)
    assert curve(in_tmp, "cut")[-1]["step"] == 200


def ranks_of(launcher):
    """The process ids of the launcher's trainings, in the order of their start."""
    listing = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(launcher)], capture_output=True, text=True, check=True
    ).stdout.split()
    return sorted(int(pid) for pid in listing)


def kill_a_rank(launcher):
    """SIGKILL the second of the launcher's trainings."""
    os.kill(ranks_of(launcher)[-1], signal.SIGKILL)


def test_batches_that_cannot_be_shared_out(in_tmp, small_text):
    output = finish(torchrun(in_tmp, 2, "--batch-size", 7, *named("odd")), code=1)
    assert "error: --batch-size 7 cannot be shared out among 2 processes" in output


def test_half_of_torchruns_environment(in_tmp, small_text):
    result = run("train_shakespeare.py", *SMALL, cwd=in_tmp, check=2, env={"WORLD_SIZE": "2"})
    assert "start with torchrun" in result.stderr


@pytest.mark.slow
def test_ctrl_c_under_torchrun_saves(in_tmp, small_text):
    """The terminal signals every process, and torchrun signals its own again: one request."""
    process = torchrun(in_tmp, 2, "--max-steps", 100_000, *named("cut"))
    last = in_tmp / "cut.pt_last.pt"
    deadline = time.monotonic() + 90
    while not last.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    step = read_checkpoint(last)["iter"]
    assert f"stopped at step {step}; continue with: torchrun --nproc_per_node=2" in output
    assert process.returncode != 0


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all(in_tmp, small_text):
    """At any time, also during an evaluation: all ranks agree to stop."""
    flags = ("--max-steps", 100_000, "--eval-interval", 2, "--eval-iters", 60)
    for name in ("one", "two", "three"):
        process = torchrun(in_tmp, 2, *flags, *named(name), "--sample-tokens", 0)
        metrics = in_tmp / "runs" / name / "metrics.jsonl"
        deadline = time.monotonic() + 90
        while not metrics.exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(ranks_of(process.pid)[-1], signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        step = read_checkpoint(in_tmp / f"{name}.pt_last.pt")["iter"]
        assert f"stopped at step {step}; continue with" in output


@pytest.fixture
def two_hosts():
    """Two network namespaces with a cable between them; skips if they are not allowed.

    Yields:
        The prefix of a command that runs on each, and the address of the first.
    """
    names, address = [f"ngt{os.getpid()}{end}" for end in "ab"], "10.99.87.1"

    def ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable1")
        ip("link", "set", "cable1", "netns", names[1])
        for number, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.99.87.{number + 1}/24", "dev", f"cable{number}")
            ip("-n", name, "link", "set", f"cable{number}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield [("ip", "netns", "exec", name) for name in names], address
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {error}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def on_a_host(cwd, host, number, address):
    """Start a training on one of two hosts, which resumes if there is a checkpoint."""
    launch = [*host, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    launch += ["--nproc_per_node", "1", "--node_rank", number]
    launch += ["--master_addr", address, "--master_port", "29511"]
    command = [*launch, ROOT / "train_shakespeare.py", *SMALL, *named("two"), "--resume"]
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=cwd / f"host{number}",
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": f"cable{number}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_two_hosts_give_the_curve_of_one_process(two_hosts, in_tmp, small_text):
    """Two nodes that share only a network; each has its own directory."""
    run("train_shakespeare.py", *SMALL, *named("one"), cwd=in_tmp, check=0)
    hosts, address = two_hosts
    for number in range(2):
        (in_tmp / f"host{number}").mkdir()
        (in_tmp / f"host{number}" / "small.txt").write_text(small_text.read_text())

    def start():
        return [on_a_host(in_tmp, host, number, address) for number, host in enumerate(hosts)]

    for process in start():
        finish(process)
    found, expected = curve(in_tmp / "host0", "two"), curve(in_tmp, "one")
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row["val_loss"] == pytest.approx(other["val_loss"], abs=1e-5)
    assert not (in_tmp / "host1" / "runs").exists()  # only the first rank writes
    # called again, the first host would resume and the second would start anew
    outputs = [finish(process, code=1) for process in start()]
    assert any("on a file system that all of them share" in output for output in outputs)
