"""Where a run keeps its files; no run may overwrite those of another."""

import contextlib
import json
import os
import shlex
import sys
from pathlib import Path

from filelock import FileLock, Timeout

from engine.checkpoint import best_path, last_path
from system.errors import UsageError, UserError
from training.tensorboard_log import dashboard_files

DEFAULT_PATH = "checkpoints/shakespeare.pt"
BEGUN = ".launch"  # a file in the run's directory: the torchrun launch that began the run


class RunFiles:
    """The checkpoints `PATH_best.pt` and `PATH_last.pt` of a run, and its directory under runs/.

    Args:
        path: --checkpoint-path; the name of one of the two files is accepted too.
        run_name: --run-name; None for a name taken from the path.
    """

    def __init__(self, path, run_name=None):
        self.path = str(path).removesuffix("_last.pt").removesuffix("_best.pt")
        self.run_name = run_name
        self.directory = Path("runs") / (run_name or Path(self.path).name.removesuffix(".pt"))
        self.best, self.last = best_path(self.path), last_path(self.path)
        self._aside = {}

    def is_own(self, source):
        """Whether a checkpoint is one of this run's."""
        return source in (self.best, self.last, Path(self.path))

    def to_resume(self):
        """This run's checkpoint to continue from, or None if there is none."""
        for path in (self.last, self.best, Path(self.path)):
            if path.exists():
                return path
        return None

    def check_nothing_is_lost(self, source, is_resumed):
        """Refuse to write over checkpoints or metrics of another run, or another program's files.

        Args:
            source: the checkpoint that is being resumed, or None.
            is_resumed: whether --resume was given, even if there is no checkpoint yet.

        Raises:
            UsageError: if some would be lost; it names the file and the flags that help.
        """
        remedy = "or start over with --overwrite"
        for file in (self.last, self.best):
            if file.exists() and not self.is_own(source):
                raise UsageError(
                    f"{file} exists already: continue it with --resume, give another "
                    f"--checkpoint-path, {remedy}"
                )
        if not self.is_own(source):
            for file in self._foreign():
                raise UsageError(
                    f"{file} was written by another program: give another --run-name, {remedy}"
                )
        metrics = self.directory / "metrics.jsonl"
        if not metrics.exists() or not metrics.stat().st_size:
            return
        owner = self._owner()
        is_own = owner is not None and os.path.abspath(owner) == os.path.abspath(self.path)
        # a run that was killed before its first checkpoint has metrics but no checkpoint
        if (not is_own and (owner is not None or source is None)) or not (source or is_resumed):
            whose = f"another run, {owner}" if owner and not is_own else "another run"
            raise UsageError(
                f"{metrics} holds the metrics of {whose}: give another --run-name, {remedy}"
            )

    def _foreign(self):
        """What a run would write over, or mix with its own curves, and what no run has written."""
        _, foreign = dashboard_files(self.directory)
        config = self.directory / "config.json"
        return foreign + [config] * (config.exists() and self._owner() is None)

    def _owner(self):
        """The --checkpoint-path of the run whose metrics are here; None if it is unknown."""
        with contextlib.suppress(OSError, ValueError, RecursionError):
            config = json.loads((self.directory / "config.json").read_text(encoding="utf-8"))
            if isinstance(config, dict) and isinstance(config.get("checkpoint_path"), str):
                return config["checkpoint_path"]
        return None

    @contextlib.contextmanager
    def locked(self):
        """A context in which no other process may train this run.

        Raises:
            UserError: if another one does.
        """
        place = Path(self.path)
        # hidden, so that it does not look like a checkpoint
        lock = FileLock(place.with_name(f".{place.name}.lock"))
        with contextlib.suppress(OSError, NotImplementedError):  # a disk without locks
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise UserError(
                    f"{self.path} is being trained by another process: wait for it, or give "
                    "another --checkpoint-path"
                ) from None
        try:
            yield
        finally:
            lock.release()

    def begin(self):
        """Note that this torchrun launch has begun the run.

        After a crash torchrun starts the processes again with the same flags, --overwrite included.
        """
        if "TORCHELASTIC_RUN_ID" in os.environ:
            with contextlib.suppress(OSError):
                (self.directory / BEGUN).write_text(os.environ["TORCHELASTIC_RUN_ID"])

    def has_begun(self):
        """Whether this torchrun launch began the run before a restart."""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return (self.directory / BEGUN).read_text() == os.environ.get("TORCHELASTIC_RUN_ID")
        return False

    def set_aside(self):
        """Rename the files that --overwrite replaces to NAME.old, until the new run is saved."""
        checkpoints = (self.best, self.last)
        metrics = (self.directory / name for name in ("metrics.jsonl", "config.json"))
        # a run that was killed before its first checkpoint has nothing worth keeping
        was_killed = not any(path.exists() for path in checkpoints)
        for path in (*checkpoints, *metrics):
            old = path.with_name(path.name + ".old")
            if path.exists() and not (was_killed and old.exists()):
                path.replace(old)
            if old.exists():
                self._aside[path] = old

    def keep_best(self):
        """Rename a PATH_best.pt that the next best cannot be compared with to PATH_best.pt.old."""
        if self.best.exists():
            self.best.replace(self.best.with_name(self.best.name + ".old"))

    def forget_earlier(self):
        """Delete what was set aside; called when the new run is on disk."""
        for old in self._aside.values():
            with contextlib.suppress(OSError):
                old.unlink()
        self._aside = {}

    def bring_back(self):
        """Rename what was set aside back; called if the new run saved nothing."""
        for path, old in self._aside.items():
            with contextlib.suppress(OSError):
                old.replace(path)
        self._aside = {}

    def resume_command(self):
        """The command to continue this run; all other settings are in its checkpoint."""
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        hosts = int(os.environ.get("WORLD_SIZE", "1")) // local
        words = ["python"]
        if hosts * local > 1:
            words = ["torchrun", *([f"--nnodes={hosts}"] if hosts > 1 else [])]
            words.append(f"--nproc_per_node={local}")
        words += [sys.argv[0], "--resume"]
        if self.path != DEFAULT_PATH:
            words += flag("--checkpoint-path", self.path)
        if self.run_name:
            words += flag("--run-name", self.run_name)
        return shlex.join(words)


def flag(name, value):
    """A flag and its value as words of a command; the value may look like a flag."""
    return [f"{name}={value}"] if str(value).startswith("-") else [name, str(value)]
