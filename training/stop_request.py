"""Signals to a training: stop after this step, or save a checkpoint and continue."""

import contextlib
import os
import signal
import stat
import time

# seconds in which torchrun repeats a signal that the terminal already sent to its processes
LAUNCHER_ECHO = 2.0
STOPS = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def ignore_requests_to_save():
    """Ignore SIGUSR1, which would end the process, until there is something to save."""
    if hasattr(signal, "SIGUSR1"):  # not on Windows
        with contextlib.suppress(ValueError):  # only the main thread may
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)


class StopRequest:
    """A context in which a signal lets the current step finish; a second one stops at once.

    The signals are Ctrl-C, SIGTERM and a closed terminal. SIGUSR1 asks for a checkpoint only.

    Attributes:
        signal: the number of the signal that all ranks have agreed to stop for, or None.
    """

    def __init__(self):
        self.signal = None
        self._asked = None  # the signal of this process, which the other ranks do not know yet
        self._asked_at = 0.0
        self._save = False
        self._before = {}

    def __enter__(self):
        handlers = {getattr(signal, name): self._asked_to_stop for name in STOPS}
        if hasattr(signal, "SIGUSR1"):
            handlers[signal.SIGUSR1] = self._asked_to_save
        for number, handler in handlers.items():
            # under nohup a closed terminal stays ignored; SIGINT, which a shell ignores for
            # background jobs, is handled: it was sent to this very process
            is_meant = number != getattr(signal, "SIGHUP", None)
            if is_meant or signal.getsignal(number) != signal.SIG_IGN:
                with contextlib.suppress(ValueError):  # only the main thread may
                    self._before[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _asked_to_stop(self, number, _frame):
        if number == getattr(signal, "SIGHUP", None):
            discard_output(terminals_only=True)
        if self._asked is None:
            self._asked, self._asked_at = number, time.monotonic()
        elif not self._is_echo():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _is_echo(self):
        """Whether torchrun only repeats the signal that the terminal sent."""
        is_launched = "TORCHELASTIC_RUN_ID" in os.environ
        return is_launched and time.monotonic() - self._asked_at < LAUNCHER_ECHO

    def _asked_to_save(self, *_):
        self._save = True

    def agree(self, ranks):
        """Make all ranks stop if one was asked to.

        Returns:
            Whether one of them was asked for a checkpoint.
        """
        asked, self._save = self._save, False
        # one number holds both, so that one exchange is enough
        agreed = int(ranks.largest(2 * (self._asked or 0) + asked))
        if agreed // 2:
            self.signal = agreed // 2
            if self._asked is None:  # the signal itself may still come
                self._asked, self._asked_at = self.signal, time.monotonic()
        return bool(agreed % 2)

    @property
    def exit_code(self):
        """The code that a shell reports for a process that the signal ended."""
        return 128 + self.signal


def discard_output(terminals_only=False):
    """From now on discard what is printed: its reader is gone, and writing to it is an error."""
    for number in (1, 2):
        with contextlib.suppress(OSError):
            if not terminals_only or stat.S_ISCHR(os.fstat(number).st_mode):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)
