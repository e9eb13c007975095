"""Turn finished runs into a report: tables, curves and what the geometry learned.

Every number comes from the files that the runs left: runs/<name>/metrics.jsonl and config.json, and
for the geometry the checkpoint that config.json names. Runs that differ only in their seed are one
row, mean and standard deviation.
"""

import csv
import io
import itertools
import json
import shlex
import statistics
from pathlib import Path

from errors import UserError, run_script, write_whole
from options import script_parser
from page import markdown_block, markdown_code, markdown_table, markdown_text
from report_geometry import geometry_section
from report_runs import (
    NOT_RUN,
    Run,
    all_values,
    duration,
    find_runs,
    group,
    is_plain,
    label_of,
    mean,
)
from report_study import write_study
from terminal import cells, one_line

EXAMPLES = """examples:
  python report.py --runs shakespeare_vanilla shakespeare
  python report.py --runs w3_25m --output reports/w3_25m_summary.md
  python report.py --study study --output reports/study.md
  python report.py --runs w3_25m --reference reports/first_release.json --output reports/w3.md
"""
SETTINGS = {
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
ONLY_NGT = {"coord_dim", "head_coord_dim", "exponent", "radius"}


def terminal_table(variants):
    """The same in short for the screen: each variant's last evaluation."""
    head = ("model", "parameters", "step", "val loss", "perplexity", "steps/s", "tokens/s")
    lines = [head]
    for v in variants:
        last = [run.rows[-1] for run in v.runs]
        lines.append(
            (
                v.label,
                f"{v.config['parameters']:,}" if last else NOT_RUN,
                f"{min(row['step'] for row in last):,}" if last else "",
                mean([row["val_loss"] for row in last], ".4f") if last else "",
                mean([row["perplexity"] for row in last], ".3f") if last else "",
                mean([run.median("steps_per_s") for run in v.runs], ".2f") if last else "",
                mean([run.median("tokens_per_s") for run in v.runs], ",.0f") if last else "",
            )
        )
    label_width = max(cells(line[0]) for line in lines)
    widths = [max(len(line[n]) for line in lines) for n in range(1, len(head))]
    return "\n".join(
        "  ".join(
            [line[0] + " " * (label_width - cells(line[0])), *map(str.rjust, line[1:], widths)]
        )
        for line in lines
    )


def result_table(variants, choose):
    """A line a variant: what `choose(run)` picks among its evaluations."""
    head = ["model", "step", "training time", "val loss", "perplexity", "bits a byte", "ratio"]
    lines, baseline = [], None
    for v in variants:
        rows = [choose(run) for run in v.runs]
        if not rows or None in rows:
            lines.append([v.label, NOT_RUN if not rows else "no evaluation", *[""] * 5])
            continue
        perplexities = [row["perplexity"] for row in rows]
        finite = None not in perplexities
        if finite and baseline is None:
            baseline = statistics.mean(perplexities)
        seeds = f" ({len(rows)} seeds)" if len(rows) > 1 else ""
        lines.append(
            [
                v.label + seeds,
                mean([row["step"] for row in rows], ",.0f"),
                duration(statistics.mean(row["wall_time"] for row in rows)),
                mean([row["val_loss"] for row in rows], ".4f"),
                mean(perplexities, ".2f"),
                mean([row.get("bits_per_byte") for row in rows], ".4f"),
                f"{statistics.mean(perplexities) / baseline:.3f}" if finite else "",
            ]
        )
    return markdown_table(head, lines)


def speed_table(variants):
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
    """A line a setting, a column a variant."""
    ran = [v for v in variants if v.runs]
    lines = []
    for key, title in SETTINGS.items():
        values = [v.config.get(key) for v in ran]
        if all(value is None for value in values):
            continue
        shown = [
            "" if key in ONLY_NGT and v.config["model"] == "vanilla" else _setting(value)
            for v, value in zip(ran, values, strict=True)
        ]
        lines.append([title, *shown])
    lines.append(["seeds", *(", ".join(str(r.config["seed"]) for r in v.runs) for v in ran)])
    return markdown_table(["", *(v.label for v in ran)], lines)


def _setting(value):
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else str(value)


def reference_section(path):
    """Figures that others published, marked as theirs.

    Raises:
        UserError: where the file is missing or not in the form of reports/first_release.json.
    """
    try:
        reference = json.loads(Path(path).read_text(encoding="utf-8"))
        head = list(reference["rows"][0])
        lines = [[row[key] for key in head] for row in reference["rows"]]
        title, setting = reference["title"], reference["setting"]
        if not all(map(is_plain, (title, setting, *head, *itertools.chain(*lines)))):
            raise ValueError("a value in it is no number and no short text")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(
            f"--reference {path} cannot be used ({error}): name a file in the form of "
            "reports/first_release.json"
        ) from None
    lines = [[_setting(value) for value in line] for line in lines]
    return (
        f"## {markdown_text(title)}\n\nNot measured here, and not comparable with the tables above "
        f"unless the setting is the same: {markdown_text(setting)} (from {markdown_code(path)})."
        f"\n\n{markdown_table(head, lines)}"
    )


def write_report(output, names, variants, reference):
    """Write the report and, beside it under the same name, .csv, .png and .html."""
    from report_plots import page_of_curves, save_png  # a second to import

    ran = [v for v in variants if v.runs]
    runs = [run for v in ran for run in v.runs]
    curves = [(v.label, one_line(run.name), run.rows) for v in ran for run in v.runs]
    title = one_line(f"Report: {', '.join(names)}")
    common = set.intersection(*({row["step"] for row in run.rows} for run in runs))
    shortest = min(run.rows[-1]["wall_time"] for run in runs)
    configs = [run.config for run in runs]
    steps = ", ".join(f"{run.name} {run.rows[-1]['step']:,}" for run in runs)
    tokens = max(run.rows[-1]["tokens"] for run in runs)
    command = ["python", "report.py", "--runs", *names]
    command += ["--reference", str(reference)] if reference else []

    def values(key):
        return markdown_text(all_values(configs, key))

    parts = [
        f"# {markdown_text(title)}",
        f"**Corpus:** {values('source')}. **Steps:** {markdown_text(steps)} (of "
        f"{values('max_steps')} planned), up to {tokens:,} tokens each. **Machine:** "
        f"{values('machine')}. **Seed:** {values('seed')}. **Commit:** {values('code_version')}.",
        f"Written by {markdown_code(shlex.join([*command, '--output', str(output)]))} from the "
        "runs' own files. "
        "`ratio` is the perplexity over that of the first line; training time is that of the "
        "steps, evaluations not counted; losses are nats a token on fixed validation windows.",
        "## At equal steps",
        result_table(variants, lambda run: run.at_step(max(common)))
        if common
        else "The runs were never evaluated at the same step.",
        "## At each one's best",
        result_table(variants, Run.best),
        f"## At equal training time ({duration(shortest)})",
        result_table(variants, lambda run: run.within(shortest)),
        "## Speed and memory",
        "Medians over the evaluation intervals.",
        speed_table(variants),
        "## Curves",
        f"![validation loss]({output.stem}.png)",
        f"Interactive: `{output.stem}.html`; every evaluation: "
        f"[{output.stem}.csv]({output.stem}.csv).",
        "## Settings",
        settings_table(variants),
        "## What the geometry learned",
        *(geometry_section(v.label, v.runs[0].config) for v in ran if v.config["model"] == "ngt"),
    ]
    if reference:
        parts.append(reference_section(reference))
    commands = [shlex.join(["python", *run.config["command"]]) for run in runs]
    parts += ["## Commands", markdown_block("\n".join(commands), "bash")]
    parts += [f"{markdown_text(v.label)}: {NOT_RUN}." for v in variants if not v.runs]
    page = page_of_curves(curves, title).encode()
    picture = io.BytesIO()
    save_png(picture, curves)
    for suffix, content in (
        (".html", page),
        (".png", picture.getvalue()),
        (".csv", _csv(runs)),
        (output.suffix, ("\n\n".join(parts) + "\n").encode()),
    ):
        write_whole(output.with_suffix(suffix), content)


def _csv(runs):
    columns = list(dict.fromkeys(key for run in runs for row in run.rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, ["run", "model", "seed", *columns], lineterminator="\n")
    writer.writeheader()
    for run in runs:
        same = {
            "run": one_line(run.name),
            "model": label_of(run.config),
            "seed": run.config["seed"],
        }
        writer.writerows(same | row for row in run.rows)
    return text.getvalue().encode()


def main(argv=None):
    """Print the table and write the report; returns the exit code."""
    parser = script_parser(__doc__, EXAMPLES)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--runs",
        nargs="+",
        help="names of directories under runs/, or of folders of such; one that is not there is "
        "listed as not run",
    )
    what.add_argument(
        "--study",
        metavar="NAME",
        help="write the report of run_study.sh's runs, those below runs/NAME (needs --output)",
    )
    parser.add_argument(
        "--output",
        help="write the report here, a .md file, and beside it .csv, .png and .html (default: "
        "print a table only)",
    )
    parser.add_argument(
        "--reference",
        help="a JSON file of published figures to print beside, marked as theirs (default: none)",
    )
    args = parser.parse_args(argv)
    if args.output is not None and Path(args.output).suffix != ".md":
        parser.error(f"--output {args.output} must end in .md")
    if args.study is not None:
        if args.output is None:
            parser.error("--study needs --output, the .md file to write")
        write_study(Path(args.output), args.study)
        print(f"wrote {args.output}")
        return 0
    variants = group(find_runs(args.runs))
    runs = [run for v in variants for run in v.runs]
    print(terminal_table(variants))
    for source in dict.fromkeys(run.config["source"] for run in runs):
        print(one_line(f"text: {source}"))
    for run in runs:
        command = shlex.join(["python", *run.config["command"]])
        told = f"{run.name}: {run.config['machine']}, seed {run.config['seed']}, {command}"
        print(one_line(told))
    if args.output is not None:
        write_report(Path(args.output), args.runs, variants, args.reference)
        print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    run_script(main)
