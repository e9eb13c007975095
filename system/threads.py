"""How many threads compute on a CPU, and what they do while they wait for each other."""

import os
import sys
import threading
import time

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SPINS = 20_000  # turns of a loop, 300 microseconds on a Xeon of 2023
OFTEN = 400  # a second: a thread sleeps that often only if it waits in vain, or may not spin
ONE_THREAD_UP_TO = 5e6  # parameters times tokens
HELP = (
    "threads on the CPU (default: OMP_NUM_THREADS; if it is not set, one for a model so small that "
    "more do not pay, otherwise all)"
)


def sleep_while_waiting():
    """Make OpenMP's threads sleep while they wait for each other; call it before PyTorch is loaded.

    By default they spin for 300,000 turns, about five milliseconds
    (https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html). If another program keeps one
    thread from its core, the others then spin at each of the hundreds of points where a step
    waits for all threads. A shorter spin costs less there, and on a quiet machine it saves
    putting a thread to sleep between two operations (reports/performance.md). `adapt_waiting` does
    the rest. Whatever the user has set stays.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # all that other OpenMP libraries know
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
        _waiting.may_change = sys.platform == "linux"


def adapt_waiting():
    """Let OpenMP's threads spin while they wait, or not at all, whichever is faster now.

    Training calls it at every step, generation at every token. If two threads share a core, because
    other programs use the rest, each waits for the other until it gives up and sleeps; how often
    threads sleep shows that. Then no thread spins for some seconds.
    """
    _waiting.adapt()


class _Waiting:
    """How threads wait, and since when."""

    LONGEST = 40  # seconds without spinning

    def __init__(self):
        self.may_change = False
        self.since, self.sleeps, self.rest = 0.0, 0, 5.0
        self.end = None  # of the time without spinning, an event

    def adapt(self):
        now = time.monotonic()
        if not self.may_change or now - self.since < (self.rest if self.end else 0.5):
            return
        import resource  # not on Windows

        import torch

        often = OFTEN * torch.get_num_threads()
        sleeps = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
        if self.end:
            self.end.set()
            self.end = None
        elif self.since and sleeps - self.sleeps > often * (now - self.since):
            self.rest = min(2 * self.rest, self.LONGEST)
            self.end = threading.Event()
            threading.Thread(target=_own_more_threads, args=[self.end], daemon=True).start()
        else:
            self.rest = 5.0
        self.since, self.sleeps = now, sleeps


def _own_more_threads(end):
    """Compute something with threads of this thread's own, and keep them until `end` is set.

    OpenMP's threads do not spin while there are more of them than cores: `do_spin` in
    https://gcc.gnu.org/git/?p=gcc.git;a=blob;f=libgomp/config/linux/wait.h
    """
    import torch

    torch.ones(1 << 18).add_(1)
    end.wait()


_waiting = _Waiting()


def threads_for(parameters, tokens, most):
    """The number of threads that computes a model fastest: one, or the most there are.

    A second thread must be woken for each operation, which pays only if the operation is long.
    The limit lies between a token that Shakespeare's model (0.8M parameters) generates, which one
    thread does as fast, and one of 25M or a training step, which take all (reports/performance.md).

    Args:
        parameters: of the model.
        tokens: in one call of the model; 1 when it generates.
        most: how many threads there are.
    """
    return 1 if parameters * tokens <= ONE_THREAD_UP_TO else most


def choose_threads(asked, model, tokens):
    """Set the number of threads for a model on the CPU.

    Args:
        asked: a number, or None for OMP_NUM_THREADS or else `threads_for`.
        tokens: in one call of the model.

    Returns:
        The number; None for a model on a GPU if none was asked for.
    """
    import torch

    weights = list(model.parameters())
    if asked is None and weights[0].device.type != "cpu":
        return None
    if asked is None and "OMP_NUM_THREADS" not in os.environ:
        parameters = sum(weight.numel() for weight in weights)
        asked = threads_for(parameters, tokens, torch.get_num_threads())
    if asked is not None:
        torch.set_num_threads(asked)
    return torch.get_num_threads()
