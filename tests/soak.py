"""Trains small models for a long time and checks that memory and open files do not grow.

python tests/soak.py --minutes 60
"""

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from script_runner import StartedScript

SENTENCE = "The mass of a word is what draws the next one near, and far is what it cannot reach. "
SMALL = (
    *("--hidden-dim", 32, "--num-layers", 2, "--num-heads", 2, "--block-size", 32),
    *("--batch-size", 4, "--dropout", 0.1, "--device", "cpu", "--max-steps", 10_000_000),
    *("--eval-interval", 50, "--eval-iters", 2, "--checkpoint-interval", 50),
)
MODELS = {"ngt": (), "vanilla": ("--model", "vanilla")}
WARM_UP = 0.2  # share of the time that is not measured
SLACK = 0.02  # allowed growth of the memory, as a share


def start(folder, name):
    """Start a training that ends only when it is asked to; returns its process."""
    flags = [*SMALL, *MODELS[name], "--data-path", "text.txt"]
    flags += ["--checkpoint-path", f"{name}.pt", "--run-name", name]
    return StartedScript("train_shakespeare.py", flags, folder)


def resident_bytes(pid):
    """The memory of a process in bytes, without the files that it maps (Linux)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(x.split()[1]) * 1024 for x in lines if x.startswith("RssAnon"))


def open_files(pid):
    """The number of file descriptors of a process (Linux)."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def event_bytes(folder, name):
    """The size in bytes of everything in the run's folder."""
    run = Path(folder) / "runs" / name
    return sum(path.stat().st_size for path in run.rglob("*") if path.is_file())


def steps_of(folder, name):
    """The step of the last evaluation; 0 if there is none."""
    lines = (Path(folder) / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return int(lines[-1].split('"step": ')[1].split(",")[0]) if lines else 0


def soak(folder, name, seconds, say=lambda line: None):
    """Train for `seconds`, then ask the training to stop.

    Returns:
        A dict: `steps`; `memory_after_warm_up` and `memory` (bytes, medians of the first and the
        last quarter of the samples after the warm-up); `growth` (their ratio minus 1);
        `files_after_warm_up` and `files` (open files, in the same way); `run_bytes`; `exit_code`.
    """
    folder = Path(folder)
    (folder / "text.txt").write_text(SENTENCE * 300)
    process = start(folder, name)
    metrics = folder / "runs" / name / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        if process.poll() is not None:
            raise RuntimeError("".join(process.communicate()))
        time.sleep(0.1)
    before, started, samples = steps_of(folder, name), time.monotonic(), []
    while (now := time.monotonic() - started) < seconds:
        if process.poll() is not None:
            raise RuntimeError("".join(process.communicate()))
        samples.append((now, resident_bytes(process.pid), open_files(process.pid)))
        say(f"{name} {samples[-1][1] / 2**20:,.0f} MiB, {samples[-1][2]} files")
        time.sleep(seconds / 200)
    process.send_signal(signal.SIGTERM)
    exit_code = process.wait(timeout=60)
    kept = [sample for sample in samples if sample[0] >= WARM_UP * seconds]
    part = max(1, len(kept) // 4)
    ends = kept[:part], kept[-part:]
    first, last = (statistics.median(sample[1] for sample in end) for end in ends)
    files = [int(statistics.median(sample[2] for sample in end)) for end in ends]
    return {
        "steps": steps_of(folder, name) - before,
        "memory_after_warm_up": int(first),
        "memory": int(last),
        "growth": last / first - 1,
        "files_after_warm_up": files[0],
        "files": files[1],
        "run_bytes": event_bytes(folder, name),
        "exit_code": exit_code,
    }


def main():
    """Train one model after the other; returns 1 if anything grew."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=60.0, help="per model (default: %(default)s)")
    add("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="(default: both)")
    args = parser.parse_args()
    grown = 0
    for name in args.models:
        with (
            tempfile.TemporaryDirectory() as folder,
            tqdm(total=200, desc=name, bar_format="{desc} {percentage:3.0f}% {postfix}") as bar,
        ):

            def say(line, bar=bar):
                bar.set_postfix_str(line)
                bar.update()

            result = soak(folder, name, 60 * args.minutes, say)
        print(f"{name}: {result}", flush=True)
        grown += result["growth"] > SLACK or result["files"] > result["files_after_warm_up"]
    return int(grown > 0)


if __name__ == "__main__":
    sys.exit(main())
