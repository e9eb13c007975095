"""Writes what a benchmark found: one JSON file at the end, or lines of a .jsonl file at once."""

import json
from pathlib import Path

from benchmarks.timing import describe_machine
from system.errors import UsageError
from system.files import write_whole
from system.machine import code_version
from training.event_file import append_whole


class Results:
    """The file of --json.

    If its name ends in .jsonl, every row is appended as soon as it is known, so that a kill loses
    nothing, and what other commands wrote there stays.

    Args:
        args: the command line, with `words` as typed; `json` is None for no file.

    Raises:
        UsageError: if the file's folder does not exist.
    """

    def __init__(self, args, device):
        self.path = None if args.json is None else Path(args.json)
        if self.path is not None and not self.path.resolve().parent.is_dir():
            raise UsageError(f"--json {args.json}: there is no such folder: make it first")
        self.grows = self.path is not None and self.path.suffix == ".jsonl"
        self.args, self.device = args, device

    def plan(self, names):
        """Write the names of the rows to come, so that a reader knows what a kill left out."""
        for name in names:
            self.row(name)

    def row(self, name, **numbers):
        """Write one row of the benchmark's table; a later one of this name replaces it."""
        if self.grows:
            command = " ".join(self.args.words).replace(f" --json {self.args.json}", "")
            line = {"command": f"benchmark.py {command}", "row": name, **self._facts(), **numbers}
            append_whole(self.path, (json.dumps(line) + "\n").encode())

    def whole(self, numbers):
        """Write all numbers, if the file is no .jsonl."""
        if self.path is not None and not self.grows:
            hidden = ("peak_only", "json", "words", "results")
            settings = {k: v for k, v in vars(self.args).items() if k not in hidden}
            numbers = numbers | self._facts() | {"settings": settings}
            write_whole(self.path, (json.dumps(numbers, indent=2) + "\n").encode())

    def _facts(self):
        return {"machine": describe_machine(self.device), "code_version": code_version()}
