"""Measures how training scales over processes, and computes more GPUs: `benchmark.py scaling`.

Trains under torchrun with each number of processes in turn, reads what the runs logged, and writes
a page: speed, memory per process and bytes sent as measured, then formulas for more GPUs, more
parameters and longer contexts, with the numbers they give.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.flags import TIMED_PRESETS
from benchmarks.models import load_newton
from benchmarks.paper import bytes_on_the_wire, paper_section, parameters_of
from benchmarks.timing import describe_machine, spread
from engine.flops import attention_flops
from engine.models import build_model
from gravity.attention import gravity_attention
from system.errors import UsageError, UserError
from system.files import write_whole
from system.machine import code_version
from system.markdown import markdown_table
from training.config import DEFAULTS, LAW_DEFAULTS, PRESETS, SETTINGS

ROOT = Path(__file__).resolve().parent.parent
TEXT = "The mass of a word is what draws the next one near. "
# the characters of the text that `measure` writes, and the tokenizer's unknown one
VOCAB_SIZE = len({*TEXT, *"0123456789", "�"})
WIDTHS = ("hidden_dim", "num_layers", "num_heads", "block_size")
SHAPES = {
    name: {width: (DEFAULTS | PRESETS[preset])[width] for width in WIDTHS}
    | {"mlp_dim": PRESETS[preset]["mlp_dim"]["newton"]}
    for name, (preset, _) in sorted(TIMED_PRESETS.items())
}
CONTEXTS_ON_PAPER = (512, 4096, 32_768, 262_144, 1_048_576)
CONTEXTS_TIMED = (1024, 4096, 16_384, 65_536, 262_144)


def benchmark_scaling(args, device):
    """Measure trainings and the operator, and print or write the page.

    Returns:
        A dict for JSON: the numbers of every training, and the operator's time by context.

    Raises:
        UsageError: if --steps is too small.
        UserError: if a training fails, or as `load_newton`.
    """
    if args.steps < 6:
        raise UsageError(
            f"--steps {args.steps}: give at least 6, because the first third is warm-up"
        )
    model, whose = trained_or_fresh(args.checkpoint)
    numbers = measure(args, sorted(set(args.ranks)))
    parameters = parameters_of(SHAPES[args.preset] | {"vocab_size": VOCAB_SIZE})
    timed = time_of_contexts(model.layers[0].attn)
    page = "\n\n".join(
        [
            "# How training scales out",
            f"Written by `python benchmark.py {' '.join(args.words)}` at "
            f"{code_version() or 'an unknown version'} on {describe_machine(device)}. No GPU was "
            "measured.",
            measured_section(args, numbers, parameters),
            paper_section(),
            context_section(model, timed, whose),
        ]
    )
    if args.output:
        write_whole(Path(args.output), page)
        print(f"wrote {args.output}")
    else:
        print(page)
    names = {"none": "", "optimizer": " sharded", "model": " sharded model"}
    runs = {f"{n}{names[shard]}": rounds for (n, shard), rounds in numbers.items()}
    return {"runs": runs, "microseconds_a_token": timed}


def trained_or_fresh(path):
    """The NGT whose windows are counted, and words for it: `(model, words)`."""
    if path is None:
        shape = {"mlp_dim": 512, "model_type": "ngt", "vocab_size": 66}
        return build_model(DEFAULTS | LAW_DEFAULTS["newton"] | shape), "an untrained model"
    model, *_ = load_newton(path, "cpu")
    return model, f"`{Path(path).name}`"


def measure(args, ranks):
    """Train with each number of processes and each --shard in turn.

    Returns:
        For each `(ranks, shard)` what `launch` returned in every round.
    """
    # a single process has nothing to shard
    shards = SETTINGS["shard"].metadata["choices"]
    kinds = [(n, shard) for n in ranks for shard in shards if n > 1 or shard == "none"]
    numbers = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "text.txt").write_text("".join(f"{n} {TEXT}" for n in range(20_000)))
        flags = ["--data-path", "text.txt", "--dataset", "shakespeare", "--checkpoint-path"]
        flags += ["c/scaling.pt", "--run-name", "scaling", "--overwrite", "--device", "cpu"]
        for name, value in SHAPES[args.preset].items():
            flags += ["--" + name.replace("_", "-"), value]
        flags += ["--eval-iters", 1, "--batch-size", args.batch_size, "--max-steps", args.steps]
        # a run logs its speed at each evaluation, and the first third is not counted
        flags += ["--eval-interval", max(1, args.steps // 3), "--checkpoint-interval", args.steps]
        total = args.rounds * len(kinds)
        with tqdm(total=total, desc="trainings", unit="run") as bar:
            for _ in range(args.rounds):
                for n, shard in kinds:
                    numbers[n, shard].append(launch(n, [*flags, "--shard", shard], folder))
                    bar.update()
    return numbers


def launch(ranks, flags, folder):
    """Train under torchrun in `folder`, with one thread per process.

    Returns:
        A dict: `tokens_per_s` and `peak_bytes` of the first process, `peak_bytes_before_saving` of
        it until the first checkpoint is written, `wire_bytes` per step.

    Raises:
        UserError: if the training fails.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", ranks, ROOT / "train_shakespeare.py", *flags]
    before = bytes_on_loopback()
    result = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if "error:" in line]
        raise UserError(f"a training of {ranks} processes failed: {(errors or ['?'])[0]}")
    rows = (Path(folder) / "runs" / "scaling" / "metrics.jsonl").read_text().splitlines()
    first, *rows = [json.loads(row) for row in rows]  # the first one's speed includes the warm-up
    return {
        "tokens_per_s": statistics.median(row["tokens_per_s"] for row in rows),
        "peak_bytes": rows[-1]["peak_memory_bytes"],
        "peak_bytes_before_saving": first["peak_memory_bytes"],
        "wire_bytes": (bytes_on_loopback() - before) / rows[-1]["step"],
    }


def bytes_on_loopback():
    """Bytes that this machine has sent to itself so far; 0 if the system has no /proc."""
    path = Path("/proc/net/dev")
    if not path.exists():
        return 0
    # after the name and a colon come eight numbers of what was received, then the bytes sent
    (line,) = (line for line in path.read_text().splitlines() if line.split(":")[0].strip() == "lo")
    return int(line.split(":")[1].split()[8])


def measured_section(args, numbers, parameters):
    """Markdown: a table of what the runs logged, beside the formula for the bytes sent."""
    head = ["processes", "--shard", "tokens/s", "of one process", "peak memory of the first"]
    head += ["before saving"]
    head += ["bytes sent per step", "formula"]
    alone = numbers[min(numbers)]
    lines = []
    for (n, shard), rounds in numbers.items():
        speeds = [one["tokens_per_s"] for one in rounds]
        shares = [a / b["tokens_per_s"] for a, b in zip(speeds, alone, strict=True)]
        peak, before = (
            statistics.median(one[name] for one in rounds)
            for name in ("peak_bytes", "peak_bytes_before_saving")
        )
        sent = statistics.median(one["wire_bytes"] for one in rounds)
        formula = n * bytes_on_the_wire(parameters, n, shard != "none")
        lines.append(
            [
                str(n),
                shard,
                spread(speeds, 0),
                f"{statistics.median(shares):.2f}",
                f"{peak / 2**20:,.0f} MiB",
                f"{before / 2**20:,.0f} MiB",
                f"{sent / 1e6:,.1f} MB" if n > 1 else "-",
                f"{formula / 1e6:,.1f} MB" if n > 1 else "-",
            ]
        )
    return (
        f"## Measured\n\nThe shape {args.preset} with a vocabulary of characters "
        f"({parameters / 1e6:.1f}M parameters), {args.batch_size} windows of "
        f"{SHAPES[args.preset]['block_size']} tokens per step for any number of processes, "
        f"fp32, one thread per process, gloo over loopback; {args.rounds} rounds in turn, medians "
        "(smallest to largest). Bytes are those of the loopback device over the whole run. They "
        "include evaluations, rendezvous and gathering what is sharded for the checkpoints, which "
        "is also when the first process needs most memory: it holds them whole.\n\n"
        + markdown_table(head, lines)
    )


def time_of_contexts(attn):
    """Time one layer's operator on random points, forward and backward.

    Returns:
        For each of `CONTEXTS_TIMED` the microseconds per token.
    """
    # the layer is fixed here: only the random points, values and masses get gradients
    law = {k: v.detach() if torch.is_tensor(v) else v for k, v in attn.law().items()}
    heads, width = attn.config.num_heads, attn.config.hidden_dim // attn.config.num_heads
    numbers = {}
    for tokens in tqdm(CONTEXTS_TIMED, desc="contexts"):
        generator = torch.Generator().manual_seed(0)
        shape = (1, heads, tokens, attn.config.head_coord_dim)
        q, k = (torch.randn(shape, generator=generator).requires_grad_() for _ in range(2))
        v = torch.randn((1, heads, tokens, width), generator=generator).requires_grad_()
        mass = torch.ones(1, tokens, requires_grad=True)
        seconds = []
        for _ in range(2 if tokens > 50_000 else 4):
            started = time.perf_counter()
            gravity_attention(q, k, v, mass, field_tolerance=1e-6, **law).sum().backward()
            seconds.append(time.perf_counter() - started)
        # the shortest time: other work on the machine can only make it longer
        numbers[tokens] = 1e6 * min(seconds) / tokens
    return numbers


def mean_pairs(windows, tokens):
    """Mean number of pairs per token and head.

    Args:
        windows: for each layer the windows of its heads, in tokens; no head looks further back.
        tokens: of the context.
    """
    pairs = []
    for window in (w for layer in windows for w in layer):
        w = min(window, tokens)
        pairs.append((w * (w + 1) / 2 + (tokens - w) * w) / tokens)
    return statistics.mean(pairs)


def context_section(model, timed, whose):
    """Markdown: pairs, flops and cache of NGT and vanilla by context, and the times measured.

    Args:
        timed: microseconds per token, from `time_of_contexts`.
        whose: words for the model.
    """
    c = model.config
    largest_mass = model.largest_mass()
    windows = [layer.attn.window(largest_mass).tolist() for layer in model.layers]
    flat = sorted(w for layer in windows for w in layer)
    lines = []
    for tokens in CONTEXTS_ON_PAPER:
        ngt = mean_pairs(windows, tokens)
        vanilla = (tokens + 1) / 2
        cache = sum(math.ceil(min(tokens, max(layer))) for layer in windows)
        per_token = (c.hidden_dim + c.num_heads * (c.head_coord_dim + 1)) * 4
        lines.append(
            [
                f"{tokens:,}",
                f"{ngt:,.0f}",
                f"{vanilla:,.0f}",
                f"{vanilla / ngt:,.1f}",
                f"{attention_flops(ngt, c.head_coord_dim, c.hidden_dim // c.num_heads) / 1e6:,.2f}",
                f"{attention_flops(vanilla, *[c.hidden_dim // c.num_heads] * 2) / 1e6:,.2f}",
                f"{cache * per_token / 2**20:,.1f} MiB",
                f"{tokens * c.num_layers * c.hidden_dim * 2 * 4 / 2**20:,.1f} MiB",
            ]
        )
    head = ["context", "pairs per token and head, NGT", "vanilla", "ratio"]
    head += ["MFLOP per token and head"]
    head += ["vanilla", "cache, NGT, fp32", "vanilla"]
    clock = markdown_table(
        ["context", "microseconds per token"],
        [[f"{tokens:,}", f"{value:.1f}"] for tokens, value in timed.items()],
    )
    return f"""## Cost of gravity as the context grows

If a head has a radius, nothing beyond `window = time_offset + radius / time_scale` tokens reaches
it. With a background, what is beyond a window that depends on the parameters alone provably does
not matter (`gravity/law.py`). So a token costs `min(context / 2, window)` pairs instead of
`context / 2`, and a text O(T W). Windows of {whose}: {len(flat)} heads, {flat[0]:,.0f} to
{flat[-1]:,.0f} tokens, median {statistics.median(flat):,.0f}. FLOPs are those of the two products
of a pair, forward and backward (3 x 2 x (coordinates + values)). What --field-tolerance skips
inside the window is not counted.

{markdown_table(head, lines)}

Measured: forward and backward of the operator with the first layer's law, random points, fp32,
{torch.get_num_threads()} threads:

{clock}

Once the context is longer than the window, the cost per token stays the same up to 1M tokens and
beyond; the rest of the model costs a constant per token. Activations of a training window of 1M
tokens do not fit on one GPU with any attention: that needs sequence parallelism, in which gravity
would send only the points, values and masses of the newest `window` tokens to the next rank. It is
not built.
"""
