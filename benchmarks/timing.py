"""Times functions in turn and formats the spread of the times."""

import statistics
import time

import torch
from tqdm import tqdm

from system.errors import warn
from system.machine import machine
from system.safe_text import short_reason

CUDA_CALLS = 10  # in a row, so that the host's work for the first is little beside them


def calls_per_round(device):
    """How often `timed` calls a function."""
    return CUDA_CALLS if device.type == "cuda" else 1


def timed(function, device):
    """Seconds that a call takes, by the host's clock on a CPU and by the GPU's own on CUDA.

    A GPU works while the host goes on, so its calls follow each other without waiting, as in a
    training, between two events in its stream.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream(device)
    stream.synchronize()
    start.record(stream)
    for _ in range(CUDA_CALLS):
        function()
    end.record(stream)
    end.synchronize()
    return 1e-3 * start.elapsed_time(end) / CUDA_CALLS


def graphed(function, device):
    """A function that repeats what `function` does on a GPU without gaps between its kernels, as a
    CUDA graph; on a CPU `function` itself, and with a warning also if it cannot be captured."""
    if device.type != "cuda":
        return function
    try:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # kernels are compiled and chosen before the capture
            for _ in range(3):
                function()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
    except RuntimeError as error:
        warn(f"timed with the gaps between its kernels, no CUDA graph: {short_reason(error)}")
        return function

    def replay(function=function):  # keeps the tensors that the graph reads
        graph.replay()

    return replay


def interleaved(functions, rounds, device, label, warm_up=1):
    """Time functions in turn, so that a machine that slows down slows all of them.

    Every second round runs in reverse order, so that no function always follows the same one.

    Args:
        functions: callables without arguments, by name.
        rounds: how often each is timed.
        label: text of the progress bar.
        warm_up: rounds before these that are not counted.

    Returns:
        For each name a list of seconds per call, one per round.
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
