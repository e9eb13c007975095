"""The files of a run in runs/NAME: metrics.jsonl, config.json and TensorBoard's."""

import contextlib
import json
import math
from pathlib import Path

from system.errors import UserError, warn
from system.files import write_whole
from training.event_file import append_whole
from training.tensorboard_log import Dashboard, dashboard_files


class RunLog:
    """Writes `runs/<name>/`.

    Args:
        directory: the run's.
        config: all settings and facts of the run, in plain types.
        start_step: 0 for a new run, else the resumed step; rows after it are deleted.

    Raises:
        UserError: if something cannot be written; so do its methods.
    """

    def __init__(self, directory, config, start_step=0):
        self.directory = Path(directory)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if start_step == 0:
                self._clear()
            rows = self._cut_rows(start_step)
            self._config = json.dumps(config, indent=2).encode()
            write_whole(self.directory / "config.json", self._config)
            self.dashboard = Dashboard(self.directory, config, start_step, rows)
        except OSError as error:
            raise UserError(
                f"{self.directory} cannot be written ({error.strerror or error}): free it or give "
                "another --run-name"
            ) from None

    def _clear(self):
        """Delete the TensorBoard files of the run that was here before."""
        own, _ = dashboard_files(self.directory)
        for path in own:
            path.unlink()
            for folder in path.relative_to(self.directory).parents[:-1]:
                with contextlib.suppress(OSError):  # it is not empty yet
                    (self.directory / folder).rmdir()

    def _cut_rows(self, start_step):
        """Keep only the rows up to `start_step`; returns them."""
        # steps after the checkpoint are trained again, so their rows would come twice
        path = self.directory / "metrics.jsonl"
        if not path.exists():
            return []
        rows = []
        if start_step:
            rows = [row for row in read_metrics(path) if row["step"] <= start_step]
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        return rows

    def evaluation(self, row):
        """Append one evaluation to metrics.jsonl and TensorBoard."""
        # JSON has no NaN
        finite = {k: v if v is None or math.isfinite(v) else None for k, v in row.items()}
        append_whole(self.directory / "metrics.jsonl", (json.dumps(finite) + "\n").encode())
        if not (self.directory / "config.json").exists():  # somebody deleted it during the run
            write_whole(self.directory / "config.json", self._config)
        self.dashboard.row(row)


def read_metrics(path):
    """The rows of a metrics.jsonl; an incomplete last line, as a crash leaves it, is left out.

    Raises:
        UserError: if any other line is damaged.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8: remove it, or its damaged lines") from None
    rows = []
    for number, line in enumerate(lines, 1):
        row = None
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
        if row is None and number == len(lines):
            warn(f"{path}: the last line is incomplete and left out")
        elif _is_row(row):
            rows.append(row)
        else:
            raise UserError(f"{path} line {number} is damaged: remove that line")
    return rows


def _is_row(row):
    """Whether it is an evaluation: a dict of numbers, one of them the step."""
    return (
        isinstance(row, dict)
        and type(row.get("step")) is int
        and all(isinstance(value, int | float | None) for value in row.values())
    )
