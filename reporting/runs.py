"""Runs as their files tell them: which there are, which belong together, how numbers are shown."""

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from reporting.checks import (
    CONFIG,
    CONFIG_OF_MODEL,
    EVALUATED,
    EVALUATION,
    NUMBER_OR_NULL,
    PLAIN,
    is_kind,
    wrong_value,
)
from system.errors import UserError
from system.safe_text import one_line
from training.run_log import read_metrics

NOT_RUN = "not run"
PER_RUN = {
    *("seed", "checkpoint_path", "command", "code_version", "torch_version", "machine", "device"),
    *("token_directory", "data_path", "eval_interval", "checkpoint_interval", "compile"),
}


@dataclass
class Run:
    """One run's files; `config` is None where there is no such run."""

    name: str
    config: dict | None = None
    rows: list | None = None

    def at_step(self, step):
        return next((row for row in self.rows if row["step"] == step), None)

    def best(self):
        known = (row for row in self.rows if row["val_loss"] is not None)
        return min(known, key=loss_or_worst, default=None)

    def within(self, seconds):
        """The last evaluation after at most so much training."""
        return next((r for r in reversed(self.rows) if r["wall_time"] <= seconds), None)

    def median(self, key):
        return statistics.median(row[key] for row in self.rows)


def loss_or_worst(row):
    """To order evaluations by: a loss that is not finite is the worst."""
    return math.inf if row["val_loss"] is None else row["val_loss"]


@dataclass
class Variant:
    """Runs that differ only in their seed. None of them: it was asked for and never run."""

    label: str
    runs: list

    @property
    def config(self):
        return self.runs[0].config


def load_run(directory, name):
    """A run's files, every value of the type that it should be.

    Raises:
        UserError: where they are damaged, or there is no evaluation yet.
    """
    try:
        for file in ("config.json", "metrics.jsonl"):
            if not (directory / file).is_file():  # a pipe would be waited for
                raise ValueError(f"{file} is not there")
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        rows = read_metrics(directory / "metrics.jsonl")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--runs: {directory} is no run ({error}): train it first") from None
    kind = config.get("model") if isinstance(config, dict) else None
    of_kind = CONFIG_OF_MODEL[kind] if is_kind(kind) else {}
    if why := wrong_value(config, CONFIG | of_kind, PLAIN):
        raise UserError(f"--runs: {directory} is no run (config.json {why}): train it anew")
    if not rows:
        raise UserError(f"--runs: {directory} has no evaluation yet: train it further")
    for number, row in enumerate(rows, 1):
        if why := wrong_value(row, EVALUATION, NUMBER_OR_NULL):
            raise UserError(
                f"--runs: {directory}/metrics.jsonl line {number} {why}: remove that line, or "
                "train the run anew"
            )
    return Run(name, config, rows)


def read_evaluation(run):
    """What evaluate.py wrote of a run; None where it was not evaluated.

    Raises:
        UserError: where it is damaged.
    """
    path = Path("runs") / run.name / "evaluation.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for key, expected in EVALUATED.items():
            if not isinstance(found[key], list):
                raise ValueError(f"{key} is no list")
            for row in found[key]:
                if why := wrong_value(row, expected, PLAIN):
                    raise ValueError(f"{key}: a row {why}")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): write it anew with evaluate.py") from None
    return found


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
    """What people call a model of this configuration, in one printable line."""
    if config["model"] == "vanilla":
        return one_line(f"vanilla ({config['pos']})")
    where = ", mass in value" if config["mass_in_value"] else ""
    return one_line(f"ngt ({config['law']}{where})")


def group(runs):
    """Runs that differ only in their seed become one `Variant`, in the order given."""
    variants = {}
    for run in runs:
        if run.config is None:
            variants[run.name] = Variant(one_line(run.name), [])
            continue
        key = json.dumps({k: v for k, v in run.config.items() if k not in PER_RUN}, sort_keys=True)
        variants.setdefault(key, Variant(label_of(run.config), [])).runs.append(run)
    variants = list(variants.values())
    labels = [variant.label for variant in variants]
    for variant in variants:
        if labels.count(variant.label) > 1:  # they differ in something that the label leaves out
            variant.label = f"{variant.label}, {one_line(variant.runs[0].name)}"
    return variants


def mean(values, form):
    """Mean and standard deviation of several seeds; a single value as it is."""
    if not values or None in values:
        return "not finite" if values else NOT_RUN
    if len(set(values)) == 1:
        return format(values[0], form)
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form}}"


def all_values(configs, key):
    """The values of a setting, each once."""
    values = dict.fromkeys(str(config.get(key)) for config in configs)
    return ", ".join(values)
