"""Interleaved timing, and how its spread is printed."""

import statistics
import time

import torch
from tqdm import tqdm

from system.machine import machine


def synchronize(device):
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
    """Time functions in turn, every second round in reverse order.

    Returns:
        For each name a list of seconds, one a round.
    """
    seconds = {name: [] for name in functions}
    for n in tqdm(range(-warm_up, rounds), label, leave=False, delay=2, disable=None):
        for name in list(functions)[:: -1 if n % 2 else 1]:
            elapsed = timed(functions[name], device)
            if n >= 0:
                seconds[name].append(elapsed)
    return seconds


def ratios(slow, fast):
    """Of two lists of seconds, round by round: how much faster the second is."""
    return [a / b for a, b in zip(slow, fast, strict=True)]


def spread(values, digits=2):
    """`median (smallest to largest)` as text."""
    low, middle, high = (
        f"{x:,.{digits}f}" for x in (min(values), statistics.median(values), max(values))
    )
    return f"{middle} ({low} to {high})"


def describe_machine(device):
    """One line: what this was measured on."""
    return f"{machine(device)}, PyTorch {torch.__version__}"


def peak_flops(device, dtype):
    """Flops a second of a large matrix product, the best of several."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a @ b
    return 2 * size**3 / min(timed(lambda: a @ b, device) for _ in range(5))
