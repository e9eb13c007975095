"""The page of run_gpu_check.sh: one figure per row, and what was not reached.

The file runs/NAME/results.jsonl has three kinds of lines: a stage with its command, as planned; a
row of a command's table (`benchmark.py --json`), first without numbers; and how a stage ended.
"""

import contextlib
import json
from pathlib import Path

from reporting.runs import NOT_RUN, load_run
from system.durations import duration
from system.errors import UserError
from system.files import write_whole
from system.markdown import markdown_block, markdown_code, markdown_table
from system.safe_text import one_line

STEPS_SHOWN = 12
STEP_COLUMNS = {
    "parameters": "parameters",
    "tokens_per_s": "tokens/s",
    "ratio": "ngt's speed over this",
    "mfu": "of the peak of matrix products",
}
SECTIONS = {  # by stage: title, what the numbers are, columns
    "correctness": (
        "Correctness",
        "Relative errors against the formula in float64 of outputs, of the largest gradient of q, "
        "k, v and mass, and of the largest of what each head learns.",
        {
            "good": "within the limits",
            "output": "output",
            "gradients": "gradients",
            "per_head": "per head",
            "same_twice": "two deterministic runs equal",
            "failed": "failed with",
        },
    ),
    "tests": ("The repository's own GPU tests", "", {"result": "result"}),
    "operator": (
        "The operator against attention",
        "Milliseconds of forward, and of forward and backward, in CUDA graphs: bf16, 8 heads, "
        "16 coordinates, values 64 wide, mean of the layers of a fresh model. Ratios are of "
        "forward and backward: above 1 gravity is faster.",
        {
            "ngt_forward_ms": "gravity, forward",
            "flash_forward_ms": "flash",
            "cudnn_forward_ms": "cuDNN",
            "ngt_ms": "gravity, both",
            "flash_ms": "flash, both",
            "cudnn_ms": "cuDNN, both",
            "flash_ratio": "flash over gravity",
            "cudnn_ratio": "cuDNN over gravity",
        },
    ),
    "steps": (
        "A training step",
        "As shipped. eager: a plain GPT-2 trained as nanoGPT does.",
        STEP_COLUMNS,
    ),
    "compiled": (
        "A training step with --compile",
        "compiled: the plain GPT-2 under torch.compile.",
        STEP_COLUMNS,
    ),
}


def write_gpu_page(output, name):
    """Write the page of a check.

    Args:
        output: the `Path` of the .md file.
        name: of the check, a folder below runs/; what it does not have is "not run".
    """
    lines = read_lines(Path("runs") / name / "results.jsonl")
    machines = list(dict.fromkeys(line["machine"] for line in lines if "machine" in line))
    versions = list(dict.fromkeys(line["code_version"] for line in lines if "machine" in line))
    measured = (
        f"Measured on {'; '.join(map(markdown_code, machines))}, at commit "
        f"{', '.join(markdown_code(version or 'unknown') for version in versions)}."
        if machines
        else "Nothing here has been measured at this version yet."
    )
    parts = [
        "# On a GPU",
        "Written by `bash run_gpu_check.sh`, which anybody with an NVIDIA GPU can run. "
        f'{measured} What the check did not reach says "{NOT_RUN}".',
        *(section(stage, lines) for stage in SECTIONS),
        training_section(name),
        "The first run of the CUDA path, of an older version: [gpu_h200.md](gpu_h200.md).",
    ]
    write_whole(output, "\n\n".join(parts) + "\n")


def read_lines(path):
    """The lines of a results.jsonl as dicts; none if it does not exist.

    A kill may have left half a line, which is left out.
    """
    lines = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
    return lines


def section(stage, lines):
    """Markdown: a stage's command, how it ended, and a table of its rows."""
    title, words, columns = SECTIONS[stage]
    mine = [line for line in lines if line.get("stage") == stage]
    command = mine[-1]["command"] if mine else None
    ended = [line for line in mine if line.get("command") == command and "exit" in line]
    rows = {}  # a later line replaces an earlier one, which may be only planned
    for line in lines:
        if "row" in line and line["command"] == command:
            rows[line["row"]] = line
    if stage == "tests" and ended:
        rows = {"all": {"result": ended[-1]["last_line"]}}
    rows = rows or {"all": {}}
    used = {key: title for key, title in columns.items() if any(key in r for r in rows.values())}
    used = used or {"": "result"}
    table = []
    for name, row in rows.items():
        cells = [cell(row.get(key)) for key in used]
        table.append([name, *(cells if any(cells) else [NOT_RUN, *cells[1:]])])
    parts = [f"## {title}", words, command and f"```bash\npython {command}\n```"]
    if ended and ended[-1]["exit"] != "0":
        last = ended[-1]
        parts.append(
            f"**Ended with exit code {last['exit']} after {last['seconds']} s** (124: its time was "
            f"up): {markdown_code(last['last_line'])}"
        )
    return "\n\n".join([*filter(None, parts), markdown_table(["", *used.values()], table)])


def cell(value):
    """A figure as text, "" for None."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, int) or value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if value >= 0.01 else f"{value:.1e}"


def training_section(name):
    """Markdown: both 25M models step by step, and how fast they trained."""
    runs = {model: _run(f"{name}/{model}") for model in ("ngt", "vanilla")}
    steps = sorted({row["step"] for run in runs.values() if run for row in run.rows})
    chosen = steps[:: -(-len(steps) // STEPS_SHOWN) or 1]
    losses = [
        [f"{step:,}", *(_loss(run and run.at_step(step)) for run in runs.values())]
        for step in dict.fromkeys([*chosen, *steps[-1:]])
    ]
    facts, commands = [], []
    for model, run in runs.items():
        if run is None:
            facts.append([model, *[NOT_RUN] * 7])
            continue
        last = run.rows[-1]
        facts.append(
            [
                model,
                f"{run.config['parameters']:,}",
                f"{last['step']:,} of {run.config['max_steps']:,}",
                f"{last['tokens'] / last['step']:,.0f}",
                duration(last["wall_time"]),
                f"{run.median('tokens_per_s'):,.0f}",
                _loss(run.best()),
                cell(last.get("skipped_steps")),
            ]
        )
        commands += [f"# {one_line(run.config['source'])}", one_line(run.command())]
    head = ["", "parameters", "steps", "tokens per step", "time", "tokens/s", "best loss"]
    parts = [
        "## Both models of 25M parameters",
        "Validation losses; one seed, rates not tuned for either. Vanilla has rotary positions.",
        markdown_block("\n".join(commands), "bash") if commands else "",
        markdown_table([*head, "steps left out"], facts),
        markdown_table(["at step", *runs], losses or [["all", NOT_RUN, NOT_RUN]]),
    ]
    return "\n\n".join(filter(None, parts))


def _run(name):
    """A run's files, or None if it has no evaluation yet."""
    try:
        return load_run(Path("runs") / name, name)
    except UserError:
        return None


def _loss(row):
    if row is None:
        return NOT_RUN
    return "not finite" if row["val_loss"] is None else f"{row['val_loss']:.4f}"
