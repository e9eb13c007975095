"""Times functions in turn and formats the spread of the times."""

import statistics
import time

import torch
from tqdm import tqdm

from system.machine import machine


def synchronize(device):
    """Wait for the GPU's work, which runs after the call that started it has returned."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(function, device):
    """Seconds that a call takes."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def interleaved(functions, rounds, device, label, warm_up=1):
    """Time functions in turn, so that a machine that slows down slows all of them.

    Every second round runs in reverse order, so that no function always follows the same one.

    Args:
        functions: callables without arguments, by name.
        rounds: how often each is timed.
        label: text of the progress bar.
        warm_up: rounds before these that are not counted.

    Returns:
        For each name a list of seconds, one per round.
    """
    seconds = {name: [] for name in functions}
    for n in tqdm(range(-warm_up, rounds), label, leave=False, delay=2, disable=None):
        for name in list(functions)[:: -1 if n % 2 else 1]:
            elapsed = timed(functions[name], device)
            if n >= 0:
                seconds[name].append(elapsed)
    return seconds


def ratios(slow, fast):
    """Ratios of two lists of seconds, round by round; above 1 the second is faster.

    What slows the machine in one round slows both, so ratios per round vary less than speeds.
    """
    return [a / b for a, b in zip(slow, fast, strict=True)]


def spread(values, digits=2):
    """Text: `median (smallest to largest)`."""
    low, middle, high = (
        f"{x:,.{digits}f}" for x in (min(values), statistics.median(values), max(values))
    )
    return f"{middle} ({low} to {high})"


def describe_machine(device):
    """One line of text: the machine and the version of PyTorch."""
    return f"{machine(device)}, PyTorch {torch.__version__}"


def peak_flops(device, dtype):
    """Flops per second of a large matrix product, the best of five."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a @ b  # warm-up
    return 2 * size**3 / min(timed(lambda: a @ b, device) for _ in range(5))
