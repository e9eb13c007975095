"""What a training does when it is asked to stop, or to save and go on."""

import contextlib
import os
import signal
import time

LAUNCHER_ECHO = 2.0  # seconds in which torchrun passes on the signal that its processes also got
STOPS = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class StopRequest:
    """Within it Ctrl-C, SIGTERM and a closed terminal let the current step finish; a second signal
    stops at once. SIGUSR1 asks for a checkpoint and stops nothing.

    Attributes:
        signal: the number of the signal that asked to stop, or None.
    """

    def __init__(self):
        self.signal = None
        self._save = False
        self._asked_at = 0.0
        self._before = {}

    def __enter__(self):
        handlers = {getattr(signal, name): self._asked for name in STOPS}
        if hasattr(signal, "SIGUSR1"):  # not on Windows
            handlers[signal.SIGUSR1] = self._asked_to_save
        for number, handler in handlers.items():
            # nohup ignores a closed terminal; a script that starts a job in the background ignores
            # Ctrl-C, but whoever sends that to this very process means it
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                with contextlib.suppress(ValueError):  # only the main thread may
                    self._before[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _asked(self, number, _frame):
        if self.signal is None:
            self.signal, self._asked_at = number, time.monotonic()
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
        agreed = int(ranks.largest(2 * (self.signal or 0) + asked))
        if self.signal is None and agreed // 2:  # the signal itself may still come
            self.signal, self._asked_at = agreed // 2, time.monotonic()
        return bool(agreed % 2)

    @property
    def exit_code(self):
        """As the shell reports a process that the signal ended."""
        return 128 + self.signal
