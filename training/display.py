"""Training in the terminal: a table of evaluations and, below it, one line that is updated."""

import contextlib
import os
import signal
import sys
import time

from tqdm import tqdm

from system.durations import duration, short_duration
from system.numbers import limited
from training.stop_request import discard_output

COLUMNS = {"step": 7, "train": 8, "val": 8, "ppl": 9, "bits/byte": 9, "repulsion": 9}
COLUMNS |= {"tokens/s": 9, "left": 9}
SECONDS_BETWEEN_LINES = 60  # if the output is no terminal, where no line can be updated
# The first steps compile and record what later ones only repeat: they say nothing about the rest.
STEPS_TO_SKIP = 10
STEPS_TO_ESTIMATE = 20  # after so many the time of the rest is printed


def _cells(row, seconds_left):
    """The text of each column for one evaluation, by the column's title."""
    repulsion = row["repulsion"]
    if repulsion is None:
        repulsion = "-"
    else:  # huge if all tokens start at the same place, too wide for its column
        repulsion = f"{repulsion:.4f}" if repulsion < 1000 else f"{repulsion:.3g}"
    return {
        "step": str(row["step"]),
        "train": f"{row['train_loss']:.4f}",
        "val": f"{row['val_loss']:.4f}",
        "ppl": limited(row["perplexity"], ".3f" if row["perplexity"] < 1e5 else ".0f"),
        "bits/byte": f"{row['bits_per_byte']:.4f}",
        "repulsion": repulsion,
        "tokens/s": f"{row['tokens_per_s']:,.0f}",
        "left": short_duration(seconds_left),
    }


def _width(terminal):
    """The number of columns of a terminal; 80 if it is unknown."""
    with contextlib.suppress(OSError, ValueError):
        return os.get_terminal_size(terminal.fileno()).columns or 80  # 0 if nobody has set it
    return 80


def _fitting_columns():
    """The titles of the first columns that the terminal has room for; all if it is no terminal."""
    if not sys.stdout.isatty():
        return list(COLUMNS)
    room = _width(sys.stdout)
    fitting, used = [], 0
    for title, width in COLUMNS.items():
        used += width + bool(fitting)
        if used >= room and fitting:
            break
        fitting.append(title)
    return fitting


def _aligned(cells, titles):
    return " ".join(f"{cells[title]:>{COLUMNS[title]}}" for title in titles)


class _Bar(tqdm):
    """A bar that erases the rest of its line by an escape code.

    tqdm overwrites it with spaces, which wrap if the terminal has become narrower.
    """

    @property
    def format_dict(self):
        values = super().format_dict
        room = len("^C") + 1  # what the terminal shows of a Ctrl-C must not wrap either
        return values | {"ncols": values["ncols"] and max(1, values["ncols"] - room)}

    @staticmethod
    def status_printer(file):
        if os.environ.get("TERM", "dumb") == "dumb":
            return tqdm.status_printer(file)

        def print_status(line):
            file.write(f"\r{line}\x1b[K")
            file.flush()

        return print_status


class _Line(_Bar):
    """One line of the terminal; `forms` holds its wordings, the longest first."""

    forms = ("",)

    def __str__(self):
        room = _width(self.fp) - 1  # a full line would wrap in some terminals
        return next((line for line in self.forms if len(line) <= room), self.forms[-1][:room])


class TrainingDisplay:
    """The output of a training, a context manager.

    In a terminal one line shows step, loss, speed and time left, and evaluations are written above
    it. Elsewhere evaluations are plain lines, with one line per minute between them. The table of
    evaluations begins with the first of them, so that the expected time can stand above it.

    Args:
        total: steps of the run.
        initial: steps already done.
        tokens_per_step: of all processes together.
        shown: False on ranks other than the main one.
    """

    def __init__(self, total, initial, tokens_per_step, shown=True):
        self.total, self.initial, self.done = total, initial, initial
        self.tokens_per_step = tokens_per_step
        self.shown = shown
        self._titles = None
        self._first = None  # the clock after the first step
        self._seconds_per_step = 0.0  # a running average, so that a change of speed shows
        self._seconds_stepping = 0.0
        self._last_line_at = time.monotonic()
        terminal = next((s for s in (sys.stderr, sys.stdout) if s.isatty()), None)
        self._line = _Line(
            total=total,
            initial=initial,
            file=terminal or sys.stderr,
            disable=not (shown and terminal),
            leave=False,
            dynamic_ncols=True,
        )
        self._line.forms = (f"step {initial:,}/{total:,}",)

    def __enter__(self):
        self._line.refresh()
        return self

    def __exit__(self, *_):
        self._line.close()

    def step(self, loss, seconds):
        """Show a step that took so many seconds."""
        now = time.monotonic()
        self.done += 1
        if self._first is None:
            self._first = now
        else:
            self._seconds_stepping += seconds
        steps = self.done - self.initial
        # so long as the average counts few steps it is their mean
        weight = max(0.1, 1 / max(1, steps - STEPS_TO_SKIP))
        self._seconds_per_step += weight * (seconds - self._seconds_per_step)
        if steps == STEPS_TO_ESTIMATE and self._titles is None:  # later the table says it
            self._say_expected_time()
        self._line.forms = self._wordings(loss, now)
        self._line.update()
        if self._line.disable and self.shown and now - self._last_line_at > SECONDS_BETWEEN_LINES:
            self._last_line_at = now
            with _saving_if_it_fails():
                print(self._line.forms[0], file=sys.stderr, flush=True)

    def _say_expected_time(self):
        left = self.total - self.done
        seconds = left * self._seconds_per_step
        if round(seconds / 60):
            self.say(
                f"expected: {duration(seconds, to_the_minute=True)} for the {left:,} steps that "
                "are left, plus evaluations"
            )

    def _seconds_left(self, now):
        # evaluations and checkpoints take time too: their average per step is added
        other_seconds = max(0.0, now - self._first - self._seconds_stepping)
        pace = self._seconds_per_step + other_seconds / max(1, self.done - self.initial - 1)
        return (self.total - self.done) * pace

    def _wordings(self, loss, now):
        """The line in four lengths, for terminals of any width."""
        left = short_duration(self._seconds_left(now))
        speed = self.tokens_per_step / self._seconds_per_step
        short = tqdm.format_sizeof(speed)
        share = f"{100 * self.done // self.total}%"
        step = f"{self.done:,}/{self.total:,}"
        return (
            f"step {step} ({share})  loss {loss:.4f}  {speed:,.0f} tokens/s  {left} left",
            f"step {step}  loss {loss:.3f}  {short} tokens/s  {left} left",
            f"{self.done}/{self.total} loss {loss:.3f} {short} tok/s {left}",
            f"{share} {loss:.3f} {short}/s {left}",
        )

    def _write_header(self):
        """Write the table's header above its first row, and if the terminal changed its width."""
        titles = _fitting_columns()
        if titles != self._titles:
            self.say(_aligned({title: title for title in titles}, titles))
            self._titles = titles

    def row(self, row):
        """Write an evaluation into the table."""
        self._write_header()
        left = self._seconds_left(time.monotonic())
        self.say(_aligned(_cells(row, left), self._titles))

    def say(self, line):
        """Write a line above the one that is updated."""
        self._last_line_at = time.monotonic()
        with _saving_if_it_fails():
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()


@contextlib.contextmanager
def _saving_if_it_fails():
    """A context for output: if it fails, the training does as if its terminal was closed."""
    try:
        yield
    except OSError:  # the disk of a log is full, or the program that read it has ended
        discard_output()
        signal.raise_signal(signal.SIGHUP)


def evaluation_bar(batches, count, shown=True):
    """Iterate over an evaluation's batches, with a bar if it takes more than two seconds.

    The bar replaces the training's line for that time: a second line would scroll the screen.
    """
    return _Bar(
        batches,
        "evaluating",
        count,
        leave=False,
        delay=2,
        disable=None if shown else True,
        position=0,
        dynamic_ncols=True,
    )


@contextlib.contextmanager
def above_the_line():
    """A context in which lines printed on stderr appear above the line that is updated."""
    with tqdm.external_write_mode(file=sys.stderr):
        yield
