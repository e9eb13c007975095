"""Reads the files of runs, groups runs that differ only in their seed, and formats numbers.

The files under `runs/` are our own, so only what an accident causes is caught: a missing or torn
file, and a file of another program.
"""

import json
import math
import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path

from system.errors import UserError
from system.safe_text import one_line
from training.run_log import read_metrics

NOT_RUN = "not run"
PER_RUN = {
    *("seed", "checkpoint_path", "command", "code_version", "torch_version", "machine", "device"),
    *("token_directory", "data_path", "eval_interval", "checkpoint_interval", "compile"),
}
# the keys that reports need, and the types of their values
NUMBER = int | float
LOSS = int | float | None
CONFIG = {
    **dict.fromkeys(("model", "source", "machine", "checkpoint_path"), str),
    **dict.fromkeys(("parameters", "max_steps", "seed"), int),
    **dict.fromkeys(("vocab_size", "block_size", "hidden_dim", "num_layers", "num_heads"), int),
    **{"command": list, "learning_rate": NUMBER},
}
CONFIG_OF_NGT = {"law": str, "mass_in_value": bool}
CONFIG_OF_VANILLA = {"pos": str}
EVALUATION = {
    **{"step": int, "tokens": int, "val_loss": LOSS, "perplexity": LOSS},
    **dict.fromkeys(("steps_per_s", "tokens_per_s", "wall_time"), NUMBER),
}
SPAN = {"first": int, "last": int, "loss": NUMBER}
EVALUATED = {  # the tables of an evaluation.json
    "by_length": {"context": int, "tokens": int, "loss": LOSS},
    "by_place": SPAN,
    "by_frequency": SPAN,
    "repeats": {"text": str, "gap": int, "again": NUMBER, "once": NUMBER},
}


@dataclass
class Run:
    """One run's files; `config` and `rows` are None if there is no such run."""

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

    def command(self):
        """The command that trained this run, as one line for a shell."""
        return shlex.join(["python", *map(str, self.config["command"])])


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
    """Read one run's config.json and metrics.jsonl.

    A number that is not finite becomes None, as RunLog writes it.

    Raises:
        UserError: if a file is missing, is not JSON or is of another program, or if there is no
            evaluation yet.
    """
    path = directory / "config.json"
    config = _read_json(path, "train the run again")
    _check(config, CONFIG, path, "train the run again")
    of_model = CONFIG_OF_VANILLA if config["model"] == "vanilla" else CONFIG_OF_NGT
    _check(config, of_model, path, "train the run again")
    path = directory / "metrics.jsonl"
    rows = [_finite(row) for row in read_metrics(path)] if path.exists() else []
    if not rows:
        raise UserError(f"{directory} has no evaluation yet: train the run further")
    for number, row in enumerate(rows, 1):
        _check(row, EVALUATION, f"{path} line {number}", "remove that line")
    return Run(name, config, rows)


def read_evaluation(run):
    """Read what evaluate.py wrote about a run; None if it was not evaluated.

    Raises:
        UserError: if the file is not JSON or is of another program.
    """
    path = Path("runs") / run.name / "evaluation.json"
    if not path.exists():
        return None
    remedy = "write it again with evaluate.py"
    found = _read_json(path, remedy)
    _check(found, dict.fromkeys(EVALUATED, list), path, remedy)
    for key, expected in EVALUATED.items():
        for row in found[key]:
            _check(row, expected, f"{path}, {key}", remedy)
    return found


def _read_json(path, remedy):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): {remedy}") from None


def _check(found, expected, where, remedy):
    """Refuse anything but a dictionary that has these keys with values of these types."""
    if not isinstance(found, dict):
        raise UserError(f"{where} holds no dictionary: {remedy}")
    for key, kind in expected.items():
        if key not in found or not isinstance(found[key], kind):
            problem = f"a wrong {key}" if key in found else f"no {key}"
            raise UserError(f"{where} has {problem}: {remedy}")


def _finite(row):
    return {key: x if x is None or math.isfinite(x) else None for key, x in row.items()}


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
