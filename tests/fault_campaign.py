"""Kills trainings with SIGKILL at random moments, resumes them, and compares the results with
undisturbed runs.

python tests/fault_campaign.py --kills 50
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.checkpoint import read_checkpoint
from script_runner import StartedScript
from small_runs import same
from system.errors import UserError

CHECKPOINT_INTERVAL = 7
STEPS = 300
SMALL = (
    *("--hidden-dim", 32, "--num-layers", 2, "--num-heads", 2, "--block-size", 32),
    *("--batch-size", 4, "--gradient-accumulation-steps", 2),
    *("--dropout", 0.1, "--warmup-steps", 20, "--device", "cpu"),
    *("--eval-interval", 25, "--eval-iters", 1, "--checkpoint-interval", CHECKPOINT_INTERVAL),
    *("--sample-tokens", 4),
)
VARIANTS = {
    "newton": ("--use-soft-cutoff", "--repulsion", "--repulsion-interval", 3),
    "published": ("--law", "published", "--repulsion-interval", 3),
    "vanilla": ("--model", "vanilla"),
    "bf16": ("--use-amp", "--no-radius-cutoff"),
}
SENTENCE = "The mass of a word is what draws the next one near, and far is what it cannot reach. "
RESUMED = ("model_state", "optimizer_state", "scheduler_state", "iter", "best_val", "rng_state")


def training(folder, name, flags):
    """A training process that continues the run of that name if there is one."""
    arguments = [*SMALL, *flags, "--data-path", "text.txt", "--resume"]
    arguments += ["--checkpoint-path", f"{name}.pt", "--run-name", name]
    steps_file = {"STEPS_FILE": f"{name}.steps"}
    return StartedScript("tests/counted_training.py", arguments, folder, env=steps_file)


def finished(process):
    """Wait for the end of a training, which must succeed."""
    output, errors = process.communicate(timeout=300)
    if process.returncode:
        raise RuntimeError(f"a training ended with {process.returncode}: {output}{errors}")


def saved_step(folder, name):
    """The step that a resumed run starts from.

    Raises:
        UserError: if a checkpoint is damaged.
    """
    steps = [0]
    for kind in ("best", "last"):
        path = folder / f"{name}.pt_{kind}.pt"
        if path.exists():
            steps.append(read_checkpoint(path)["iter"])
    return steps[-1]


def last_step(folder, name):
    """The last step that was finished before the kill, saved or not; 0 if there is none."""
    path = folder / f"{name}.steps"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return int(lines[-1]) if lines else 0


def rows(folder, name):
    """The evaluations of a run, without times and memory."""
    kept = []
    for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        kept.append([row[key] for key in ("step", "tokens", "train_loss", "val_loss", "repulsion")])
    return kept


def wait_for_kill(process, folder, name, until, while_writing):
    """Kill a training at the time `until`, or while it next writes a checkpoint after that.

    Returns:
        "writing" if a half-written checkpoint is left, else "step"; None if it ended first.
    """
    while time.monotonic() < until + 30:
        if process.poll() is not None:
            return None
        late = time.monotonic() >= until
        writing = late and any(folder.glob(f"{name}.pt*.partial"))
        if late and (writing or not while_writing):
            process.kill()
            process.communicate()
            return "writing" if any(folder.glob(f"{name}.pt*.partial")) else "step"
        time.sleep(0.0005)
    raise RuntimeError("no checkpoint was written in 30 seconds")


def campaign(folder, variant, kills, seed=0, say=lambda line: None, steps=STEPS):
    """Kill one run `kills` times, let it end, and compare it with an undisturbed run.

    Every second kill waits until a checkpoint is being written.

    Returns:
        A dict of counts: `kills`; `in_writing`, kills that left a checkpoint half written;
        `resumes`; `most_repeated`, the most steps repeated after one kill; `damaged` checkpoints
        after a kill; `mismatches` of weights, optimizer, random numbers or evaluations at the end.
    """
    folder = Path(folder)
    (folder / "text.txt").write_text(SENTENCE * 300)
    flags = (*VARIANTS[variant], "--max-steps", steps)
    clock = random.Random(f"{variant} {seed}")
    whole, cut = f"{variant}_whole", f"{variant}_cut"
    process = training(folder, whole, flags)
    started = time.monotonic()
    finished(process)
    duration = time.monotonic() - started
    counts = ("kills", "in_writing", "resumes", "most_repeated", "damaged", "mismatches")
    result = dict.fromkeys(counts, 0)
    while result["kills"] < kills:
        if saved_step(folder, cut) >= steps - 4 * CHECKPOINT_INTERVAL:  # nearly done: start over
            for path in (*folder.glob(f"{cut}.*"), folder / "runs" / cut / "metrics.jsonl"):
                path.unlink(missing_ok=True)
        result["resumes"] += saved_step(folder, cut) > 0
        process = training(folder, cut, flags)
        moment = time.monotonic() + clock.uniform(0.2, 0.9) * duration
        how = wait_for_kill(process, folder, cut, moment, while_writing=result["kills"] % 2)
        if how is None:
            finished(process)
            continue
        result["kills"] += 1
        result["in_writing"] += how == "writing"
        try:
            repeated = last_step(folder, cut) - saved_step(folder, cut)
        except UserError:
            result["damaged"] += 1
            break
        result["most_repeated"] = max(result["most_repeated"], repeated)
        say(f"{variant}: killed at {how} {last_step(folder, cut)}, {repeated} steps to repeat")
    result["resumes"] += saved_step(folder, cut) > 0
    finished(training(folder, cut, flags))
    ours, expected = (read_checkpoint(folder / f"{name}.pt_last.pt") for name in (cut, whole))
    result["mismatches"] += sum(not same(ours[key], expected[key]) for key in RESUMED)
    result["mismatches"] += rows(folder, cut) != rows(folder, whole)
    return result


def main():
    """Run the campaign over all variants; returns 1 if anything differed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="total number (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the random moments (default: %(default)s)"
    )
    args = parser.parse_args()
    total = {}
    for number, variant in enumerate(VARIANTS):
        kills = args.kills // len(VARIANTS) + (number < args.kills % len(VARIANTS))
        with tempfile.TemporaryDirectory() as folder, tqdm(total=kills, desc=variant) as bar:

            def say(line, bar=bar):
                bar.update()
                bar.write(line)

            result = campaign(folder, variant, kills, args.seed, say)
        print(f"{variant}: {result}", flush=True)
        for key, value in result.items():
            total[key] = (
                max(total.get(key, 0), value)
                if key == "most_repeated"
                else total.get(key, 0) + value
            )
    print(f"all: {total}")
    return int(total["mismatches"] + total["damaged"] > 0)


if __name__ == "__main__":
    sys.exit(main())
