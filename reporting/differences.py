"""In which settings two runs differ."""

from reporting.runs import find_runs
from reporting.tables import aligned
from system.errors import UserError
from system.safe_text import one_line

# where a run is kept, what follows from other settings, and what is measured
LEFT_OUT = {"command", "checkpoint_path", "token_directory", "model"}
RESULTS = ("step", "train_loss", "val_loss", "perplexity", "tokens_per_s", "wall_time")
LONGEST = 60  # characters of a value


def differences(*names):
    """A table for the terminal: each setting that differs, and both runs' last evaluations.

    Args:
        names: of two runs, below runs/.

    Raises:
        UserError: if there is no such run, or its files cannot be read.
    """
    found = [find_runs([name]) for name in names]
    for name, runs in zip(names, found, strict=True):
        if len(runs) != 1:
            raise UserError(f"--diff {name} is a folder of {len(runs)} runs: name one of them")
    runs = [run for (run,) in found]
    one, two = (run.config for run in runs)
    keys = [key for key in {**one, **two} if key not in LEFT_OUT and one.get(key) != two.get(key)]
    lines = [("setting", *names)]
    lines += [(key, *(_shown(config.get(key)) for config in (one, two))) for key in keys]
    if not keys:
        lines.append(("(the same settings)", "", ""))
    lines.append(("last evaluation", "", ""))
    lines += [(key, *(_shown(run.rows[-1].get(key)) for run in runs)) for key in RESULTS]
    return aligned(lines)


def _shown(value):
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None else one_line(str(value))[:LONGEST]
