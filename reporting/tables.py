"""Makes tables of runs, for the terminal and for Markdown."""

import statistics

from reporting.runs import NOT_RUN, mean, same_conditions
from system.durations import duration
from system.markdown import markdown_table
from system.terminal import cells

SETTINGS = {  # keys of a config.json, and their titles in the table
    "parameters": "parameters",
    "hidden_dim": "hidden_dim",
    "coord_dim": "coord_dim",
    "head_coord_dim": "head_coord_dim",
    "num_layers": "layers",
    "num_heads": "heads",
    "mlp_dim": "mlp_dim",
    "block_size": "block_size",
    "vocab_size": "vocabulary",
    "dropout": "dropout",
    "exponent": "exponent",
    "radius": "radius at the start",
    "batch_size": "batch_size",
    "gradient_accumulation_steps": "micro-steps",
    "learning_rate": "learning rate",
    "min_learning_rate": "at the end",
    "warmup_steps": "warm-up steps",
    "weight_decay": "weight decay",
    "max_steps": "steps planned",
    "use_amp": "--use-amp",
    "torch_version": "PyTorch",
}
# a config.json of vanilla has these too, without effect
ONLY_NGT = {"coord_dim", "head_coord_dim", "exponent", "radius"}


def terminal_table(variants):
    """Text for the terminal: a line for each variant with its last evaluation.

    Speeds that cannot be compared with the first run's are left out.
    """
    first = next(run for v in variants for run in v.runs)
    head = ("model", "parameters", "step", "val loss", "perplexity", "steps/s", "tokens/s")
    lines = [head]
    for v in variants:
        last = [run.rows[-1] for run in v.runs]
        timed = [run for run in v.runs if same_conditions(run, first)]
        lines.append(
            (
                v.label,
                f"{v.config['parameters']:,}" if last else NOT_RUN,
                # one seed may be further than another
                f"{min(row['step'] for row in last):,}" if last else "",
                mean([row["val_loss"] for row in last], ".4f") if last else "",
                mean([row["perplexity"] for row in last], ".3f") if last else "",
                mean([run.median("steps_per_s") for run in timed], ".2f") if timed else "",
                mean([run.median("tokens_per_s") for run in timed], ",.0f") if timed else "",
            )
        )
    return aligned(lines)


def aligned(lines):
    """Tuples of texts as lines for the terminal: the first column to the left, others to the right.

    The first may hold wide characters, the others do not.
    """
    first = max(cells(line[0]) for line in lines)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)][1:]
    return "\n".join(
        "  ".join([line[0] + " " * (first - cells(line[0])), *map(str.rjust, line[1:], widths)])
        for line in lines
    )


def result_table(variants, choose):
    """Markdown: a line for each variant with one evaluation of every run.

    Args:
        choose: takes a run and returns the evaluation to show, or None if it has none.
    """
    first = next(run for v in variants for run in v.runs)
    head = ["model", "step", "training time", "val loss", "perplexity", "bits per byte", "ratio"]
    lines, baseline = [], None
    for v in variants:
        rows = [choose(run) for run in v.runs]
        if not rows or None in rows:
            lines.append([v.label, NOT_RUN if not rows else "no evaluation", *[""] * 5])
            continue
        perplexities = [row["perplexity"] for row in rows]
        finite = None not in perplexities
        if finite and baseline is None:  # ratios are taken to the first line that has a perplexity
            baseline = statistics.mean(perplexities)
        seeds = f" ({len(rows)} seeds)" if len(rows) > 1 else ""
        times = [choose(run)["wall_time"] for run in v.runs if same_conditions(run, first)]
        lines.append(
            [
                v.label + seeds,
                mean([row["step"] for row in rows], ",.0f"),
                duration(statistics.mean(times)) if times else "",
                mean([row["val_loss"] for row in rows], ".4f"),
                mean(perplexities, ".2f"),
                mean([row.get("bits_per_byte") for row in rows], ".4f"),
                mean([statistics.mean(perplexities) / baseline], ".3f") if finite else "",
            ]
        )
    return markdown_table(head, lines)


def speed_table(variants):
    """Markdown: a line for each variant with speed, time and memory of its training."""
    head = ["model", "steps/s", "tokens/s", "training time", "peak memory", "ratio of tokens/s"]
    lines, baseline = [], None
    for v in variants:
        if not v.runs:
            lines.append([v.label, NOT_RUN, *[""] * 4])
            continue
        speeds = [run.median("tokens_per_s") for run in v.runs]
        baseline = baseline or statistics.mean(speeds)
        peaks = [row.get("peak_memory_bytes") for run in v.runs for row in run.rows]
        lines.append(
            [
                v.label,
                mean([run.median("steps_per_s") for run in v.runs], ".2f"),
                mean(speeds, ",.0f"),
                duration(statistics.mean(run.rows[-1]["wall_time"] for run in v.runs)),
                f"{max(peaks) / 2**20:,.0f} MiB" if None not in peaks else "not measured",
                f"{statistics.mean(speeds) / baseline:.3f}",
            ]
        )
    return markdown_table(head, lines)


def settings_table(variants):
    """Markdown: a line for each setting, a column for each variant."""
    ran = [v for v in variants if v.runs]
    lines = []
    for key, title in SETTINGS.items():
        values = [v.config.get(key) for v in ran]
        if all(value is None for value in values):
            continue
        shown = [
            "" if key in ONLY_NGT and v.config["model"] == "vanilla" else setting_text(value)
            for v, value in zip(ran, values, strict=True)
        ]
        lines.append([title, *shown])
    lines.append(["seeds", *(", ".join(str(r.config["seed"]) for r in v.runs) for v in ran)])
    return markdown_table(["", *(v.label for v in ran)], lines)


def setting_text(value):
    """A setting as people write it: on, off, 1,234, or nothing if it is not set."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else str(value)
