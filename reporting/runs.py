"""Runs as their files tell them: which there are, which belong together, how numbers are shown."""

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from errors import UserError
from metrics import read_metrics
from terminal import one_line

NOT_RUN = "not run"
LONGEST_NAME = 64
LONGEST_TEXT = 4096  # as paths may be
MOST_ARGUMENTS = 1000
TRAINING = "train_shakespeare.py"  # what a command to be pasted may call
LARGEST_NUMBER = 1e40  # sums of such, and pictures of them, are numbers still
LARGEST_PERPLEXITY = 1e305
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


def wrong_value(found, expected, others):
    """What is wrong with a dictionary of a stranger's, in words; None where nothing is.

    Args:
        expected: for each key that must be there `(whether a value is right, what is right)`.
        others: the same for all other keys.
    """
    if not isinstance(found, dict):
        return "is no dictionary"
    for key in expected:
        if key not in found:
            return f"has no {key}"
    for key, value in found.items():
        is_right, words = expected.get(key, others)
        if not key.isidentifier() or len(key) > LONGEST_NAME:
            return f"has {key[:40]!r}, as no run does"
        if not is_right(value):
            return f"has {key} {shown_short(value)}, not {words}"
    return None


def shown_short(value):
    """A stranger's value in an error."""
    if isinstance(value, list | dict):
        return f"a {type(value).__name__}"
    if isinstance(value, int) and abs(value) > LARGEST_NUMBER:
        return "a very large number"
    return repr(value)[:40]


def is_text(value):
    return isinstance(value, str) and len(value) <= LONGEST_TEXT


def is_name(value):
    return isinstance(value, str) and len(value) <= LONGEST_NAME


def is_plain(value):
    return value is None or isinstance(value, bool) or is_number(value) or is_text(value)


def is_number(value):
    return type(value) in (int, float) and abs(value) <= LARGEST_NUMBER  # NaN is not


def is_whole(value):
    return type(value) is int and 0 < value <= LARGEST_NUMBER


def _is_perplexity(value):
    return value is None or (type(value) in (int, float) and 0 < value <= LARGEST_PERPLEXITY)


def _is_command(value):
    is_short = isinstance(value, list) and len(value) <= MOST_ARGUMENTS
    return is_short and value[:1] == [TRAINING] and all(map(is_text, value))


def _is_kind(value):
    return isinstance(value, str) and value in CONFIG_OF_MODEL


WHOLE = (is_whole, "a whole number above 0")
WHOLE_OR_0 = (lambda value: type(value) is int and 0 <= value <= LARGEST_NUMBER, "a whole number")
NUMBER = (is_number, "a number")
NUMBER_ABOVE_0 = (lambda value: is_number(value) and value > 0, "a number above 0")
NUMBER_OR_NULL = (lambda value: value is None or is_number(value), "a number or null")
TEXT = (is_text, f"a text of at most {LONGEST_TEXT:,} characters")
NAME = (is_name, f"a text of at most {LONGEST_NAME} characters")
PLAIN = (is_plain, "a number, a switch or a short text")
EVALUATION = {
    **{"step": WHOLE, "tokens": WHOLE, "val_loss": NUMBER_OR_NULL},
    **{"perplexity": (_is_perplexity, "a number above 0 or null")},
    **dict.fromkeys(("steps_per_s", "tokens_per_s", "wall_time"), NUMBER_ABOVE_0),
}
CONFIG = {
    **{"model": (_is_kind, "ngt or vanilla")},
    **{"parameters": WHOLE, "max_steps": WHOLE, "seed": WHOLE_OR_0},
    **dict.fromkeys(("source", "machine", "checkpoint_path"), TEXT),
    **{"command": (_is_command, f"{TRAINING} and its flags")},
}
SPAN = {"first": WHOLE, "last": WHOLE, "loss": NUMBER}
EVALUATED = {  # the rows of an evaluation.json
    "by_length": {"context": WHOLE, "tokens": WHOLE, "loss": NUMBER_OR_NULL},
    **{"by_place": SPAN, "by_frequency": SPAN},
    "repeats": {"text": NAME, "gap": WHOLE, "again": NUMBER, "once": NUMBER},
}
CONFIG_OF_MODEL = {
    "ngt": {"law": NAME, "mass_in_value": (lambda x: isinstance(x, bool), "true or false")},
    "vanilla": {"pos": NAME},
}


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
    of_kind = CONFIG_OF_MODEL[kind] if _is_kind(kind) else {}
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


def duration(seconds):
    """As people read it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def all_values(configs, key):
    """The values of a setting, each once."""
    values = dict.fromkeys(str(config.get(key)) for config in configs)
    return ", ".join(values)
