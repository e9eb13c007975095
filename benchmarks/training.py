"""Measures the speed and the peak memory of training steps: `benchmark.py train`."""

import json
import math
import os
import statistics
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from benchmarks.flags import PLAIN, TIMED_PRESETS, law_given
from benchmarks.models import DTYPES, use_threads_as_shipped
from benchmarks.plain_gpt import PlainTraining
from benchmarks.timing import interleaved, peak_flops, ratios, spread
from engine.flops import training_flops
from gravity import published
from gravity.cpu import cpp_compiler
from system.errors import UsageError, warn
from system.machine import cpu_multiplies_bf16, peak_memory_bytes
from system.settings import flag_of
from training.config import SETTINGS, resolve
from training.trainer import Trainer

SCRIPT = Path(__file__).resolve().parent.parent / "benchmark.py"


def benchmark_train(args, device):
    """Time training steps of the compared models in turn and print a table.

    Returns:
        A dict of numbers for JSON; None with --peak-only, which prints its one number.

    Raises:
        UsageError: if --against and --law do not fit together.
    """
    if "first-release" in args.against and args.law != "published":
        raise UsageError("--against first-release computes --law published: add that flag")
    if "compiled" in args.against and device.type == "cpu" and len(cpp_compiler() or ()) != 1:
        raise UsageError(
            "--against compiled needs a C++ compiler, g++ or CXX: install one, or drop it"
        )
    if args.peak_only:
        return print_peak(args, device)
    if args.dtype == "bf16" and device.type == "cpu" and not cpu_multiplies_bf16():
        warn("this CPU does not multiply bf16 in hardware: expect fp32 to be faster")
    names = ["ngt", *dict.fromkeys(args.against)] if args.model == "both" else [args.model]
    trainers = {name: make_trainer(args, name, device) for name in names}
    first = trainers[names[0]]
    use_threads_as_shipped(args, first.raw_model, first.tokens_per_step)
    steps = {name: partial(train_step, trainer, name) for name, trainer in trainers.items()}
    args.results.plan(names)
    # the first steps compile the model and make the optimizer's state, which is not to be timed; on
    # a GPU one with repulsion must come three times before it is recorded
    warm_up = 3 if device.type == "cuda" else 2
    seconds = interleaved(steps, args.steps, device, "training steps", warm_up)
    peak = peak_flops(device, DTYPES[args.dtype])
    numbers = {"peak_flops": peak}
    print(
        f"{'model':<14} {'parameters':>11} {'layers x width, inner':>22} {'tokens/s':>30} "
        f"{'peak memory':>12} {'floor':>21} {'mfu':>6}"
    )
    for name, trainer in trainers.items():
        found = numbers_of(args, name, trainer, seconds[name], peak)
        if name != names[0]:
            rounds = ratios(seconds[name], seconds["ngt"])
            found |= {"ratio": statistics.median(rounds), "ratio_rounds": rounds}
        print_row(name, trainer.raw_model.config, found)
        args.results.row(name, **found)
        numbers |= {f"{name.replace('-', '_')}_{key}": value for key, value in found.items()}
        if "ratio" in found:  # without the model's name it is that of the first in --against
            numbers = {key: found[key] for key in ("ratio", "ratio_rounds")} | numbers
    for name in names[1:]:
        rounds = numbers[f"{name.replace('-', '_')}_ratio_rounds"]
        print(f"ratio {spread(rounds, 3)}: tokens/s of ngt over those of {name}")
    print(f"peak of a matrix product {peak / 1e9:,.0f} GF/s")
    if args.profile:
        print_profiles(steps, device)
    return numbers


def print_profiles(steps, device, count=3, longest=12):
    """Print which operations take longest themselves, in `count` calls of each model's step."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler writes of itself
    unit = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    for name, step in steps.items():
        with torch.profiler.profile() as profile:
            for _ in range(count):
                step()
        operations = sorted(profile.key_averages(), key=lambda x: -getattr(x, unit))
        total = sum(getattr(x, unit) for x in operations)  # microseconds
        calls = sum(x.count for x in operations) / count
        print(
            f"{name}: {calls:,.0f} operations a step, {total / count / 1e3:,.1f} ms while profiled"
        )
        for x in operations[:longest]:
            milliseconds = getattr(x, unit) / count / 1e3
            share = 100 * getattr(x, unit) / total
            print(
                f"  {x.key[:48]:<48} {milliseconds:9.2f} ms {share:4.0f}% {x.count / count:6.0f} x"
            )


def numbers_of(args, name, trainer, seconds, peak):
    """A dict of the numbers of one model.

    Args:
        seconds: of its timed steps.
        peak: flops per second of a large matrix product; `mfu` is the model's share of it.
    """
    speeds = [trainer.tokens_per_step / s for s in seconds]
    flops = training_flops(trainer.raw_model, trainer.tokens_per_step)
    return {
        "parameters": sum(p.numel() for p in trainer.raw_model.parameters()),
        "tokens_per_s": statistics.median(speeds),
        "tokens_per_s_rounds": speeds,
        "peak_bytes": None if args.no_peak else child_peak(args, name),
        "floor_flops": flops,
        "floor_bytes": step_bytes(trainer.raw_model),
        "mfu": flops / statistics.median(seconds) / peak,
    }


def print_row(name, config, numbers):
    """Print a model's line of the table."""
    shape = f"{config.num_layers} x {config.hidden_dim}, {config.mlp_dim}"
    memory = numbers["peak_bytes"]
    floor = f"{numbers['floor_flops'] / 1e9:,.0f} GF, {numbers['floor_bytes'] / 2**30:.2f} GiB"
    print(
        f"{name:<14} {numbers['parameters']:>11,} {shape:>22} "
        f"{spread(numbers['tokens_per_s_rounds'], 0):>30} "
        f"{'?' if memory is None else f'{memory / 2**20:,.0f} MiB':>12} "
        f"{floor:>21} {numbers['mfu']:>6.1%}"
    )


def make_trainer(args, name, device):
    """The training of a model, `ngt` or one of --against, on random tokens: the real `Trainer`, or
    a `PlainTraining`."""
    preset, vocab_size = TIMED_PRESETS[args.preset]
    is_ngt = name in ("ngt", "first-release")
    law = "published" if name == "first-release" else args.law
    kind = {"model_type": "ngt" if is_ngt else "vanilla", "law": law, "compile": args.compile}
    config = resolve(SimpleNamespace(dataset=preset, **kind, **law_given(args)))
    config["gradient_accumulation_steps"] = 1  # a step is one batch of --batch-size
    for flag in ("batch_size", "block_size"):
        if getattr(args, flag) is not None:
            config[flag] = getattr(args, flag)
    tokens = np.random.default_rng(0).integers(0, vocab_size, config["block_size"] * 64 + 1)
    tokens = tokens.astype(np.uint16)
    dtype = DTYPES[args.dtype]
    torch.manual_seed(config["seed"])
    if name in PLAIN:
        config["vocab_size"] = vocab_size
        return PlainTraining(config, tokens, device, dtype, name == "compiled")
    # all that Trainer needs of a corpus and its tokenizer
    tokenizer = SimpleNamespace(vocab_size=vocab_size)
    trainer = Trainer(config, SimpleNamespace(train=tokens, tokenizer=tokenizer), device)
    # --dtype alone decides: --use-amp would fall back to fp32 on a CPU without bf16
    is_bf16 = dtype == torch.bfloat16
    trainer.autocast = partial(torch.autocast, device.type, dtype, enabled=is_bf16)
    return trainer


def train_step(trainer, name):
    """Take one training step; first-release computes the first release's attention."""
    with computed_as_first_release() if name == "first-release" else nullcontext():
        trainer.step()


def step_bytes(model):
    """Bytes that a training step moves at least: fp32 weights and what AdamW keeps of them.

    Per weight: two reads in forward and backward, one write of the gradient; AdamW reads the
    weight, the gradient and two averages, and writes all but the gradient.
    """
    numbers_moved = 2 + 1 + 4 + 3
    return 4 * numbers_moved * sum(p.numel() for p in model.parameters())


def child_peak(args, name):
    """Peak memory in bytes of a new process that trains this model alone for two steps.

    This process holds both models, so its own peak says nothing about one. Returns None, with a
    warning, if the new process fails.
    """
    command = [sys.executable, str(SCRIPT), "train", "--peak-only", name]
    for flag in ("preset", "dtype", "batch_size", "block_size", "law", "threads", "device"):
        if getattr(args, flag) is not None:
            command += ["--" + flag.replace("_", "-"), str(getattr(args, flag))]
    for setting, is_on in law_given(args).items():
        command.append(("--" if is_on else "--no-") + flag_of(SETTINGS[setting]).removeprefix("--"))
    if args.compile:
        command.append("--compile")
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        warn(f"no peak memory of {name}: {(result.stderr.strip().splitlines() or ['?'])[-1]}")
        return None
    return json.loads(result.stdout.splitlines()[-1])["peak_bytes"]


def print_peak(args, device):
    """Train two steps and print the peak memory as JSON, for `child_peak` to read."""
    trainer = make_trainer(args, args.peak_only, device)
    for _ in range(2):  # the second has AdamW's averages beside the gradients
        train_step(trainer, args.peak_only)
    print(json.dumps({"peak_bytes": peak_memory_bytes(device)}))


def first_release_attention(
    q, k, v, query_mass, key_mass, *, gamma, bias, radius, cutoff, mass_in_value, **_
):
    """The published law as the first release computed it, through (B, H, T, T, C) differences.

    Written from the formula for comparison only; without positions, dropout or a cache.

    Args:
        q, k: points of the tokens, (B, H, T, C).
        v: values, (B, H, T, D).
        query_mass, key_mass: (B, T).
        gamma, bias: one number per head, (H,).

    Returns:
        (B, H, T, D) in the dtype of `v`.
    """
    r2 = (q[:, :, :, None] - k[:, :, None]).pow(2).sum(-1)  # (B, H, T, T)
    score = bias[:, None, None] - gamma[:, None, None] / (r2 + 1e-6)
    if not mass_in_value:
        score = score * query_mass[:, None, :, None] * key_mass[:, None, None, :]
    if cutoff == "soft":
        score = score * torch.relu(1 - r2 / radius**2)
    elif cutoff == "hard":
        score = score.masked_fill(r2 > radius**2, -math.inf)
    future = torch.ones(r2.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    weight = torch.softmax(score.masked_fill(future, -math.inf), -1)
    if mass_in_value:
        v = v * key_mass[:, None, :, None]
    return weight.to(v.dtype) @ v


@contextmanager
def computed_as_first_release():
    """Within it, NGT's published law runs as `first_release_attention`.

    The function is replaced in its module because NGT has no option for this old computation, and
    should have none for a benchmark alone.
    """
    ours = published.published_gravity_attention
    published.published_gravity_attention = first_release_attention
    try:
        yield
    finally:
        published.published_gravity_attention = ours
