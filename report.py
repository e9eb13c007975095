"""Turn finished runs into a report: tables, curves and what the geometry learned.

Every number comes from the files that the runs left: runs/<name>/metrics.jsonl and config.json, and
for the geometry the checkpoint that config.json names. Runs that differ only in their seed are one
row, mean and standard deviation.
"""

import csv
import io
import json
import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path

from errors import UserError, run_script, write_whole
from metrics import read_metrics
from options import script_parser
from report_geometry import geometry_section, markdown

EXAMPLES = """examples:
  python report.py --runs shakespeare_vanilla shakespeare
  python report.py --runs w3_25m --output reports/w3_25m_summary.md
  python report.py --runs w3_25m --reference reports/first_release.json --output reports/w3.md
"""
NOT_RUN = "not run"
NEEDED = ("step", "tokens", "val_loss", "perplexity", "steps_per_s", "tokens_per_s", "wall_time")
PER_RUN = {
    *("seed", "checkpoint_path", "command", "code_version", "torch_version", "machine", "device"),
    *("token_directory", "data_path", "eval_interval", "checkpoint_interval", "compile"),
}
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


@dataclass
class Run:
    """One run's files; `config` is None where there is no such run."""

    name: str
    config: dict | None = None
    rows: list | None = None

    def at_step(self, step):
        return next((row for row in self.rows if row["step"] == step), None)

    def best(self):
        return min((r for r in self.rows if r["val_loss"] is not None), key=_loss, default=None)

    def within(self, seconds):
        """The last evaluation after at most so much training."""
        return next((r for r in reversed(self.rows) if r["wall_time"] <= seconds), None)

    def median(self, key):
        return statistics.median(row[key] for row in self.rows)


def _loss(row):
    return row["val_loss"]


@dataclass
class Variant:
    """Runs that differ only in their seed. None of them: it was asked for and never run."""

    label: str
    runs: list

    @property
    def config(self):
        return self.runs[0].config


def load_run(directory, name):
    """A run's files.

    Raises:
        UserError: where they are damaged, or there is no evaluation yet.
    """
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        label_of(config), config["seed"], config["command"], config["parameters"]
        rows = read_metrics(directory / "metrics.jsonl")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--runs: {directory} is no run ({error}): train it first") from None
    if not rows:
        raise UserError(f"--runs: {directory} has no evaluation yet: train it further")
    for number, row in enumerate(rows, 1):
        missing = [key for key in NEEDED if not isinstance(row, dict) or key not in row]
        if missing:
            raise UserError(
                f"--runs: {directory}/metrics.jsonl line {number} has no {missing[0]}: "
                "remove that line, or train the run anew"
            )
    return Run(name, config, rows)


def find_runs(names, root=Path("runs")):
    """The runs of some names; the name of a folder of runs stands for all of them.

    Raises:
        UserError: where there is not a single one.
    """
    runs = []
    for name in names:
        name = name.rstrip("/").removeprefix(f"{root}/")  # as the shell completes it
        folder = root / name
        if (folder / "config.json").exists():
            runs.append(load_run(folder, name))
            continue
        below = sorted(path.parent for path in folder.glob("*/config.json"))
        found = [load_run(path, str(path.relative_to(root))) for path in below]
        # what others are compared with comes first
        runs += sorted(found, key=lambda run: run.config["model"] != "vanilla") or [Run(name)]
    if not any(run.config for run in runs):
        raise UserError(f"--runs: there is no run called {' or '.join(names)} below {root}/")
    return runs


def label_of(config):
    """What people call a model of this configuration."""
    if config["model"] == "vanilla":
        return f"vanilla ({config['pos']})"
    where = ", mass in value" if config["mass_in_value"] else ""
    return f"ngt ({config['law']}{where})"


def group(runs):
    """Runs that differ only in their seed become one `Variant`, in the order given."""
    variants = {}
    for run in runs:
        if run.config is None:
            variants[run.name] = Variant(run.name, [])
            continue
        key = json.dumps({k: v for k, v in run.config.items() if k not in PER_RUN}, sort_keys=True)
        variants.setdefault(key, Variant(label_of(run.config), [])).runs.append(run)
    variants = list(variants.values())
    labels = [variant.label for variant in variants]
    for variant in variants:
        if labels.count(variant.label) > 1:  # they differ in something that the label leaves out
            variant.label = f"{variant.label}, {variant.runs[0].name}"
    return variants


def mean(values, form):
    """Mean and standard deviation of several seeds; a single value as it is."""
    if not values or None in values:
        return "not finite" if values else NOT_RUN
    if len(set(values)) == 1:
        return format(values[0], form)
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form}}"


def duration(seconds):
    """As people read it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


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
    widths = [max(len(line[n]) for line in lines) for n in range(len(head))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
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
    return markdown(head, lines)


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
    return markdown(head, lines)


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
    return markdown(["", *(v.label for v in ran)], lines)


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
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"--reference {path} cannot be used ({error}): name a file in the form of "
            "reports/first_release.json"
        ) from None
    lines = [[_setting(value) for value in line] for line in lines]
    return (
        f"## {title}\n\nNot measured here, and not comparable with the tables above unless the "
        f"setting is the same: {setting} (from `{path}`).\n\n{markdown(head, lines)}"
    )


def write_report(output, names, variants, reference):
    """Write the report and, beside it under the same name, .csv, .png and .html."""
    from report_plots import page_of_curves, save_png  # a second to import

    ran = [v for v in variants if v.runs]
    runs = [run for v in ran for run in v.runs]
    curves = [(v.label, run.name, run.rows) for v in ran for run in v.runs]
    title = f"Report: {', '.join(names)}"
    common = set.intersection(*({row["step"] for row in run.rows} for run in runs))
    shortest = min(run.rows[-1]["wall_time"] for run in runs)
    configs = [run.config for run in runs]
    steps = ", ".join(f"{run.name} {run.rows[-1]['step']:,}" for run in runs)
    tokens = max(run.rows[-1]["tokens"] for run in runs)
    command = ["python", "report.py", "--runs", *names]
    command += ["--reference", str(reference)] if reference else []
    parts = [
        f"# {title}",
        f"**Corpus:** {_all(configs, 'source')}. **Steps:** {steps} (of "
        f"{_all(configs, 'max_steps')} planned), up to {tokens:,} tokens each. "
        f"**Machine:** {_all(configs, 'machine')}. **Seed:** {_all(configs, 'seed')}. "
        f"**Commit:** {_all(configs, 'code_version')}.",
        f"Written by `{shlex.join([*command, '--output', str(output)])}` from the runs' own files. "
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
    parts += ["## Commands", "```bash\n" + "\n".join(commands) + "\n```"]
    parts += [f"{v.label}: {NOT_RUN}." for v in variants if not v.runs]
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


def _all(configs, key):
    """The values of a setting, each once."""
    values = dict.fromkeys(str(config.get(key)) for config in configs)
    return ", ".join(values)


def _csv(runs):
    columns = list(dict.fromkeys(key for run in runs for row in run.rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, ["run", "model", "seed", *columns], lineterminator="\n")
    writer.writeheader()
    for run in runs:
        same = {"run": run.name, "model": label_of(run.config), "seed": run.config["seed"]}
        writer.writerows(same | row for row in run.rows)
    return text.getvalue().encode()


def main(argv=None):
    """Print the table and write the report; returns the exit code."""
    parser = script_parser(__doc__, EXAMPLES)
    parser.add_argument(
        "--runs",
        nargs="+",
        required=True,
        help="names of directories under runs/, or of folders of such; one that is not there is "
        "listed as not run",
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
    variants = group(find_runs(args.runs))
    runs = [run for v in variants for run in v.runs]
    print(terminal_table(variants))
    for source in dict.fromkeys(run.config["source"] for run in runs):
        print(f"text: {source}")
    for run in runs:
        command = shlex.join(["python", *run.config["command"]])
        print(f"{run.name}: {run.config['machine']}, seed {run.config['seed']}, {command}")
    if args.output is not None:
        write_report(Path(args.output), args.runs, variants, args.reference)
        print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    run_script(main)
