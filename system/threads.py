"""How many threads compute on a CPU, and what they do while they wait for each other."""

import os

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SPINS = 10_000  # turns of a loop, 150 microseconds on a Xeon of 2023
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
    waits for all threads. A short spin costs little there, and on a quiet machine it saves
    putting a thread to sleep between two operations: a third of Shakespeare's speed is lost at
    1,000 turns, none at 10,000 (reports/performance.md). Whatever the user has set stays.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # all that other OpenMP libraries know
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def threads_for(parameters, tokens, most):
    """The number of threads that computes a model fastest: one, or the most there are.

    A second thread must be woken for each operation, which pays only if the operation is long.
    The limit lies between a token that Shakespeare's model (0.8M parameters) generates, which is
    faster with one thread, and its training step of hundreds of tokens, which takes all.

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
