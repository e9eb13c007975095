"""Kills trainings with SIGKILL at random moments, resumes them, and compares what comes out with
runs that were never disturbed.

python tests/fault_campaign.py --kills 50
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from checkpoint import read_checkpoint  # noqa: E402

CHECKPOINT_INTERVAL = 7
STEPS = 400
SMALL = (
    *("--hidden-dim", 32, "--num-layers", 2, "--num-heads", 2, "--block-size", 32),
    *("--batch-size", 4, "--gradient-accumulation-steps", 2, "--max-steps", STEPS),
    *("--dropout", 0.1, "--warmup-steps", 20, "--repulsion-interval", 3, "--device", "cpu"),
    *("--eval-interval", 50, "--eval-iters", 1, "--checkpoint-interval", CHECKPOINT_INTERVAL),
)
VARIANTS = {
    "newton": ("--use-soft-cutoff",),
    "published": ("--law", "published"),
    "vanilla": ("--model", "vanilla"),
}
SENTENCE = "The mass of a word is what draws the next one near, and far is what it cannot reach. "


def training(folder, name, flags):
    """A training process, to go on where an earlier one of that name was killed."""
    command = [ROOT / "train_shakespeare.py", *SMALL, *flags, "--data-path", "text.txt"]
    command += ["--checkpoint-path", f"{name}.pt", "--run-name", name, "--resume"]
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process):
    output, _ = process.communicate(timeout=300)
    if process.returncode:
        raise RuntimeError(f"a training ended with {process.returncode}: {output}")
    return output


def step_of(folder, name):
    """The step that a resumed run starts from."""
    path = folder / f"{name}.pt_last.pt"
    return read_checkpoint(path)["iter"] if path.exists() else 0


def rows(folder, name):
    """Evaluations, without what a clock or a memory gauge says."""
    kept = []
    for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        kept.append([row[key] for key in ("step", "tokens", "train_loss", "val_loss", "repulsion")])
    return kept


def same(a, b):
    """Whether two checkpoints' parts are bit-identical."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def campaign(folder, variant, kills, seed=0, say=lambda line: None):
    """Kill one run `kills` times, let it end, and compare it with an undisturbed one.

    Returns:
        A dict: `kills`, `in_writing` (while a checkpoint was being written), `most_repeated`
        (steps done again after one kill), `mismatches` (of weights, optimizer, evaluations).
    """
    folder = Path(folder)
    (folder / "text.txt").write_text(SENTENCE * 300)
    flags, clock = VARIANTS[variant], random.Random(seed)
    whole, cut = f"{variant}_whole", f"{variant}_cut"
    started = time.monotonic()
    finished(training(folder, whole, flags))
    duration = time.monotonic() - started
    result = {"kills": 0, "in_writing": 0, "most_repeated": 0, "mismatches": 0}
    while result["kills"] < kills:
        if step_of(folder, cut) >= STEPS - 2 * CHECKPOINT_INTERVAL:  # nearly done: start over
            for path in (*folder.glob(f"{cut}.pt*"), folder / "runs" / cut / "metrics.jsonl"):
                path.unlink(missing_ok=True)
        process = training(folder, cut, flags)
        try:
            output, _ = process.communicate(timeout=clock.uniform(0.3, 1.0) * duration)
            if process.returncode:
                raise RuntimeError(f"a resumed training ended by itself: {output}")
            continue  # it was quicker than the clock
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
        result["kills"] += 1
        result["in_writing"] += any(folder.glob(f"{cut}.pt*.partial"))
        reached = last_step_said(output)
        result["most_repeated"] = max(result["most_repeated"], reached - step_of(folder, cut))
        say(f"{variant}: killed at step {reached} or later")
    finished(training(folder, cut, flags))
    ours, expected = (read_checkpoint(folder / f"{name}.pt_last.pt") for name in (cut, whole))
    for key in ("model_state", "optimizer_state", "iter", "best_val", "rng_state"):
        result["mismatches"] += not same(ours[key], expected[key])
    result["mismatches"] += rows(folder, cut) != rows(folder, whole)
    return result


def last_step_said(output):
    """The last step that a training's table shows; 0 where it shows none."""
    steps = [line.split()[0] for line in output.splitlines() if line[:7].strip().isdigit()]
    return int(steps[-1]) if steps else 0


def main():
    """Run the campaign over all variants; returns 1 where anything differed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    args = parser.parse_args()
    mismatches = 0
    for number, variant in enumerate(VARIANTS):
        kills = args.kills // len(VARIANTS) + (number < args.kills % len(VARIANTS))
        with tempfile.TemporaryDirectory() as folder, tqdm(total=kills, desc=variant) as bar:
            result = campaign(folder, variant, kills, args.seed, lambda _, bar=bar: bar.update())
        print(f"{variant}: {result}")
        mismatches += result["mismatches"]
    return int(mismatches > 0)


if __name__ == "__main__":
    sys.exit(main())
