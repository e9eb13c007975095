"""What a training does when it is asked to stop, or to save and go on."""

import contextlib
import os
import signal
import stat
import time

LAUNCHER_ECHO = 2.0  # seconds in which torchrun passes on the signal that its processes also got
STOPS = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def ignore_requests_to_save():
    """Until there is something to save SIGUSR1 does nothing, where it would end the process."""
    if hasattr(signal, "SIGUSR1"):  # not on Windows
        with contextlib.suppress(ValueError):  # only the main thread may
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)


class StopRequest:
    """Within it Ctrl-C, SIGTERM and a closed terminal let the current step finish; a second signal
    stops at once. SIGUSR1 asks for a checkpoint and stops nothing.

    Attributes:
        signal: the number of the signal that all ranks have agreed to stop for, or None.
    """

    def __init__(self):
        self.signal = None
        self._asked = None  # what this process was told; the others do not know it yet
        self._asked_at = 0.0
        self._save = False
        self._before = {}

    def __enter__(self):
        handlers = {getattr(signal, name): self._asked_to_stop for name in STOPS}
        if hasattr(signal, "SIGUSR1"):
            handlers[signal.SIGUSR1] = self._asked_to_save
        for number, handler in handlers.items():
            # nohup ignores a closed terminal; a script that starts a job in the background ignores
            # Ctrl-C, but whoever sends that to this very process means it
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
            _write_to_no_terminal()
        if self._asked is None:
            self._asked, self._asked_at = number, time.monotonic()
        elif not self._is_echo():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _is_echo(self):
        """Whether torchrun repeats what the terminal already said."""
        is_launched = "TORCHELASTIC_RUN_ID" in os.environ
        return is_launched and time.monotonic() - self._asked_at < LAUNCHER_ECHO

    def _asked_to_save(self, *_):
        self._save = True

    def agree(self, ranks):
        """All ranks stop where one was asked to; returns whether a checkpoint was asked for."""
        asked, self._save = self._save, False
        agreed = int(ranks.largest(2 * (self._asked or 0) + asked))
        if agreed // 2:
            self.signal = agreed // 2
            if self._asked is None:  # the signal itself may still come
                self._asked, self._asked_at = self.signal, time.monotonic()
        return bool(agreed % 2)

    @property
    def exit_code(self):
        """As the shell reports a process that the signal ended."""
        return 128 + self.signal


def _write_to_no_terminal():
    """A terminal that is gone answers every line with an error."""
    for number in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(number).st_mode):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)
