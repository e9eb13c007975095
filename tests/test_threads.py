"""How many threads compute, and that they sleep while they wait for each other."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import benchmark
import chat
import evaluate
import train_shakespeare
from conftest import ROOT, run
from system import threads
from system.threads import ONE_THREAD_UP_TO, SPINS, WAITING, choose_threads
from training.run import _choose_threads

TRAIN = (
    *("train_shakespeare.py", "--dataset", "text", "--data-path", "small.txt", "--hidden-dim", 8),
    *("--tokenizer", "char", "--num-layers", 1, "--num-heads", 2, "--block-size", 8),
    *("--batch-size", 2, "--eval-iters", 1, "--checkpoint-path", "x.pt"),
)


@pytest.fixture
def two_threads(monkeypatch):
    """A process that may choose, and has two threads."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    torch.set_num_threads(2)


@pytest.mark.parametrize(
    "user, expected",
    [
        ({}, ("OMP_WAIT_POLICY = 'PASSIVE'", f"GOMP_SPINCOUNT = '{SPINS}'")),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, ("OMP_WAIT_POLICY = 'ACTIVE'",)),
    ],
)
def test_openmp_is_told_before_it_is_loaded(user, expected, in_tmp):
    """What OpenMP itself says that it was told; what the user has set stays."""
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    result = subprocess.run(
        [sys.executable, ROOT / "chat.py", "--checkpoint-path", "nothing.pt"],
        env=environment | user | {"OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
    )
    if "GOMP_SPINCOUNT" not in result.stderr:
        pytest.skip("PyTorch has another OpenMP here than GNU's")
    for words in expected:
        assert words in result.stderr
    assert user == {} or f"GOMP_SPINCOUNT = '{SPINS}'" not in result.stderr


def test_threads_that_wait_in_vain_do_not_spin_for_a_while(monkeypatch):
    """OpenMP's sleeps are counted by a clock that is set here; what it does is told by its pool."""
    now, sleeps, pools = [100.0], [0], []
    monkeypatch.setattr(threads.time, "monotonic", lambda: now[0])
    usage = SimpleNamespace(getrusage=lambda _: SimpleNamespace(ru_nvcsw=sleeps[0]), RUSAGE_SELF=0)
    monkeypatch.setitem(sys.modules, "resource", usage)
    monkeypatch.setattr(threads, "_own_more_threads", lambda end: (pools.append(end), end.wait()))
    often = threads.OFTEN * torch.get_num_threads()
    waiting = threads._Waiting()

    def after(seconds, per_second):
        now[0], sleeps[0] = now[0] + seconds, sleeps[0] + int(per_second * seconds)
        waiting.adapt()
        return waiting.end is not None

    assert not after(1, 2 * often)  # the user has set how threads wait
    waiting.may_change = True
    assert [after(1, often / 2) for _ in range(3)] == [False] * 3
    assert after(1, 2 * often)
    assert after(9, 9 * often) and not after(2, often)  # tried again after 10 seconds
    assert after(1, 2 * often) and after(19, 0)  # in vain: twice as long
    assert not after(2, 0) and not after(1, 0) and after(1, 2 * often) and not after(11, 0)
    assert len(pools) == 3 and all(pool.is_set() for pool in pools)


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP on Linux")
def test_more_threads_than_cores_do_not_spin(in_tmp):
    """The same 2,000 operations sleep often beside a second pool, and not before or after it."""
    script = in_tmp / "script.py"
    script.write_text(SPINNING)
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    result = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=True
    )
    spinning, sleeping, again = map(int, result.stdout.split())
    if max(spinning, again) > 100 or os.cpu_count() != 2:
        pytest.skip("other programs use the cores")
    assert sleeping > 1000


SPINNING = """
from system.threads import sleep_while_waiting
sleep_while_waiting()
import resource, threading, time
import torch
from system.threads import _own_more_threads

def sleeps():
    x, before = torch.ones(1 << 17), resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
    for _ in range(2000):
        x.add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before

sleeps()
print(sleeps())
end = threading.Event()
thread = threading.Thread(target=_own_more_threads, args=[end])
thread.start()
time.sleep(0.2)
print(sleeps())
end.set()
thread.join()
print(sleeps())
"""


def test_threads_follow_the_size(two_threads, monkeypatch):
    model = nn.Linear(99, 10)  # 1000 parameters
    largest = int(ONE_THREAD_UP_TO / 1000)
    assert choose_threads(None, model, largest) == 1 == torch.get_num_threads()
    torch.set_num_threads(2)
    assert choose_threads(None, model, largest + 1) == 2 == torch.get_num_threads()
    assert choose_threads(3, model, 1) == 3 == torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert choose_threads(None, model, 1) == 3
    assert choose_threads(None, nn.Linear(9, 9, device="meta"), 1) is None


def test_a_resumed_run_keeps_its_threads(two_threads, capsys):
    """Another number would change the last bits. Runs of older versions recorded none."""

    def resumed(recorded, given=None, device="cpu"):
        torch.set_num_threads(2)
        config = {"threads": given or recorded, "batch_size": 1, "block_size": 1}
        ranks = SimpleNamespace(size=1)
        model, device = nn.Linear(3, 3, device=device), torch.device(device)
        trainer = SimpleNamespace(config=config, ranks=ranks, raw_model=model, device=device)
        _choose_threads(trainer, given, {"config": {}})
        return config["threads"]

    assert [resumed(1), resumed(2), resumed(None), resumed(2, given=1)] == [1, 2, 2, 1]
    assert resumed(16, device="meta") is None  # as a GPU, for which threads change nothing
    assert not capsys.readouterr().err
    assert resumed(16) == 2 and "16 threads" in capsys.readouterr().err


def test_the_number_is_shown_and_recorded(in_tmp, small_text):
    """OMP_NUM_THREADS is 1 in tests, so the resumed run has one thread less."""
    shown = run(*TRAIN, "--max-steps", 2, "--threads", 2, cwd=in_tmp, check=0).stdout
    config = json.loads((in_tmp / "runs/x/config.json").read_text())
    assert ", 2 threads" in shown and config["threads"] == 2 and "2 threads" in config["machine"]
    resumed = run(*TRAIN, "--max-steps", 3, "--resume", cwd=in_tmp, check=0)
    assert "had 2 threads" in resumed.stderr and ", 1 thread\n" in resumed.stdout


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "100000", "3000000000"])
@pytest.mark.parametrize(
    "script, words",
    [
        (train_shakespeare, ()),
        (chat, ()),
        (evaluate, ("--checkpoint-path", "x.pt")),
        (benchmark, ("train",)),
    ],
    ids=("train", "chat", "evaluate", "benchmark"),
)
def test_a_wrong_number_is_refused(script, words, value, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main([*words, f"--threads={value}"])
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "argument --threads" in line and value in line


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_kept_for_the_next_step():
    """Ten steps of a training fetch no new pages, or few: a block may have moved once."""
    script = """
import resource, sys, torch
from torch import nn
from system.machine import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
model, x = nn.Sequential(nn.Linear(64, 1024), nn.GELU(), nn.Linear(1024, 64)), torch.ones(1024, 64)
for step in range(20):
    if step == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    model(x).square().mean().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    pages = {}
    for name in ("kept", "default"):
        command = [sys.executable, "-c", script, name]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        pages[name] = int(result.stdout)
    if pages["default"] < 4000:
        pytest.skip("this C library keeps freed memory by itself")
    assert pages["kept"] < pages["default"] / 3
