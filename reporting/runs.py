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
from system.numbers import LARGEST, limited
from system.safe_text import one_line, short_reason
from training.config import described
from training.run_log import read_metrics

NOT_RUN = "not run"
PER_RUN = {  # settings that may differ between runs of one variant
    *("seed", "checkpoint_path", "command", "code_version", "torch_version", "machine", "device"),
    *("token_directory", "prepared_tokens", "data_path", "eval_interval", "checkpoint_interval"),
    *("compile", "threads"),
}
CONDITIONS = ("machine", "threads", "processes")  # what a speed depends on besides the model
# the keys that reports need, and the types of their values
NUMBER = int | float
LOSS = int | float | None  # None: not finite
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


@dataclass
class Run:
    """One run's files; `config` and `rows` are None if there is no such run."""

    name: str
    config: dict | None = None
    rows: list | None = None

    def at_step(self, step):
        """The evaluation at this step, or None."""
        return next((row for row in self.rows if row["step"] == step), None)

    def best(self):
        """The evaluation with the lowest loss; None if no loss is finite."""
        known = (row for row in self.rows if row["val_loss"] is not None)
        return min(known, key=loss_or_worst, default=None)

    def within(self, seconds):
        """The last evaluation after at most this many seconds of training, or None."""
        return next((r for r in reversed(self.rows) if r["wall_time"] <= seconds), None)

    def median(self, key):
        """The median of a value over all evaluations."""
        return statistics.median(row[key] for row in self.rows)

    def command(self):
        """The command that trained this run, as one line for a shell."""
        return shlex.join(["python", *map(str, self.config["command"])])


def loss_or_worst(row):
    """Sort key for evaluations: a loss that is not finite is the worst."""
    return math.inf if row["val_loss"] is None else row["val_loss"]


@dataclass
class Variant:
    """Runs that differ only in their seed; none if the user named a run that does not exist."""

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
    config = read_json(path, "train the run again")
    check_types(config, CONFIG, path, "train the run again")
    of_model = CONFIG_OF_VANILLA if config["model"] == "vanilla" else CONFIG_OF_NGT
    check_types(config, of_model, path, "train the run again")
    path = directory / "metrics.jsonl"
    rows = [_finite(row) for row in read_metrics(path)] if path.exists() else []
    if not rows:
        raise UserError(f"{directory} has no evaluation yet: train the run further")
    for number, row in enumerate(rows, 1):
        check_types(row, EVALUATION, f"{path} line {number}", "remove that line")
    return Run(name, config, rows)


def read_json(path, remedy):
    """Read a JSON file.

    Raises:
        UserError: with the remedy, if it cannot be read or is torn.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({short_reason(error)}): {remedy}") from None


def check_types(found, expected, where, remedy):
    """Check that a run's file is what this program wrote.

    Args:
        found: from its JSON.
        expected: types by key; other keys may have any value.
        where: the file, and the place in it, for the error.
        remedy: what the user can do.

    Raises:
        UserError: if it is not a dictionary, or a key is missing or has another type.
    """
    if not isinstance(found, dict):
        raise UserError(f"{where} holds no dictionary: {remedy}")
    for key, kind in expected.items():
        value = found.get(key)
        is_number = isinstance(value, int | float)  # a table can show neither NaN nor 10^400
        if key not in found or not isinstance(value, kind) or (is_number and not _is_finite(value)):
            problem = f"a wrong {key}" if key in found else f"no {key}"
            raise UserError(f"{where} has {problem}: {remedy}")


def _finite(row):
    # Python reads NaN and Infinity from JSON, and no table can show them
    return {key: x if x is None or _is_finite(x) else None for key, x in row.items()}


def _is_finite(number):
    return abs(number) < 1e300  # also of a whole number too large for a float


def find_runs(names, root=Path("runs")):
    """Load the runs of these names; the name of a folder means all runs in it.

    Returns:
        A list of `Run`, with an empty one for a name that has no run.

    Raises:
        UserError: if none of the names has a run, or if a file is damaged.
    """
    runs = []
    for name in names:
        # the shell completes a name to runs/NAME/
        name = name.rstrip("/").removeprefix(f"{root}/")
        folder = root / name
        if (folder / "config.json").exists():
            runs.append(load_run(folder, name))
            continue
        below = sorted(path.parent for path in folder.glob("*/config.json"))
        found = [load_run(path, str(path.relative_to(root))) for path in below]
        # ratios are taken to the first line, so the baseline comes first
        runs += sorted(found, key=lambda run: run.config["model"] != "vanilla") or [Run(name)]
    if not any(run.config for run in runs):
        raise UserError(f"--runs: there is no run called {' or '.join(names)} below {root}/")
    return runs


def label_of(config):
    """A name for a model of this configuration, in one printable line."""
    return one_line(described(config | {"model_type": config["model"]}))


def group(runs):
    """Group runs that differ only in their seed into one `Variant` each, in the order given."""
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
        if labels.count(variant.label) > 1:  # they differ in a setting that the label does not show
            variant.label = f"{variant.label}, {one_line(variant.runs[0].name)}"
    return variants


def same_conditions(run, other):
    """Whether the times of two runs can be compared: same machine, threads and processes.

    What an older config.json does not say counts as the same.
    """
    pairs = [(run.config.get(name), other.config.get(name)) for name in CONDITIONS]
    return all(None in pair or pair[0] == pair[1] for pair in pairs)


def left_out(runs, first):
    """A sentence on the runs whose times cannot be compared with the first one's, and why; "" if
    there are none."""
    others = [run for run in runs if not same_conditions(run, first)]
    if not others:
        return ""
    names = ", ".join(f"{run.name} ({_conditions(run)})" for run in others)
    return one_line(
        f"Speeds and times are compared only if machine, threads and processes are the same, here "
        f"{_conditions(first)}. Left out: {names}."
    )


def _conditions(run):
    words = [str(run.config["machine"])]
    for name in CONDITIONS[1:]:
        count = run.config.get(name)
        # the name of a CPU ends with the number of threads, and one process is what one expects
        if count is not None and not (name == "threads" and "thread" in words[0]) and count != 1:
            words.append(f"{count} {name}")
    return ", ".join(words)


def of_one_machine(variants):
    """The variants without the runs that `left_out` names, and its sentence.

    Those without any such run are left out, those that were not run at all are not.
    """
    runs = [run for v in variants for run in v.runs]
    kept = []
    for v in variants:
        same = [run for run in v.runs if same_conditions(run, runs[0])]
        if same or not v.runs:
            kept.append(Variant(v.label, same))
    return kept, left_out(runs, runs[0])


def mean(values, form):
    """Text: mean and standard deviation of several values; a single value as it is.

    Args:
        values: numbers; None stands for one that is not finite.
        form: a format specification, such as ".4f". If it has no separators of thousands, a mean
            above a million is `> 1e6`: a perplexity may have hundreds of digits.
    """
    if not values or None in values:
        return "not finite" if values else NOT_RUN
    average = statistics.mean(values)
    if average > LARGEST and "," not in form:
        return limited(average, form)
    if len(set(values)) == 1:  # ± 0 would say nothing
        return format(values[0], form)
    return f"{average:{form}} ± {statistics.stdev(values):{form}}"


def all_values(runs, key):
    """The values that a setting has in these runs, each once, as text."""
    return ", ".join(dict.fromkeys(str(run.config.get(key)) for run in runs))
