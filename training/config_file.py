"""Settings from the config.json of another run, for `train_shakespeare.py --config`."""

import json
from pathlib import Path

from system.errors import UsageError
from system.safe_text import shown_short
from system.settings import objection
from training.config import DEFAULTS, SETTINGS, given_settings, tenth_of_peak

LARGEST = 1 << 20  # bytes


def take_from_file(args):
    """Set the flags that were not given to the values of the file that --config names.

    The names of these are then in `args.from_file`, so that nobody is warned of flags that he did
    not type. A minimum of the learning rate that is a tenth of the file's peak follows the peak.

    Raises:
        UsageError: if the file is no config.json of a run.
    """
    found = _settings(Path(args.config))
    given = given_settings(args)
    if {"learning_rate", "matrix_learning_rate"} & given.keys():
        rates = DEFAULTS | found
        if rates["min_learning_rate"] == tenth_of_peak(rates):
            found.pop("min_learning_rate", None)
    args.from_file = found.keys() - given.keys()
    for name in args.from_file:
        setattr(args, name, found[name])


def _settings(path):
    """The settings in a run's config.json that are not None, by name."""
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError("it is too large")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--config {path} cannot be read ({reason}): name a config.json") from None
    if not isinstance(config, dict) or not {"model_type", "dataset"} <= config.keys():
        raise UsageError(f"--config {path} is no config.json of a run: name one below runs/")
    if config.get("shard_optimizer") is True:  # the setting before there was "shard"
        config.setdefault("shard", "optimizer")
    found = {}
    for name, field in SETTINGS.items():
        value = config.get(name)
        if value is None:
            continue
        if reason := objection(field, value):
            raise UsageError(f"--config {path}: {name} is {shown_short(value)}, {reason}")
        found[name] = value
    return found
