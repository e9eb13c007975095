"""What the scripts' command lines share: types of values, the parser, the device."""

import argparse
import math
import os

from system.errors import UsageError

MOST_THREADS = 1024  # with many more a step does not end, or the process cannot start them


def whole(text):
    """Argparse type: an integer of at least 1."""
    value = _number(int, text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is too small: give at least 1")
    return value


def thread_count(text):
    """Argparse type: a number of threads that a machine can start."""
    value = whole(text)
    if value > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{text} is too large: give at most {MOST_THREADS}")
    return value


def whole_or_zero(text):
    """Argparse type: an integer of at least 0."""
    value = _number(int, text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative: give at least 0")
    return value


def whole_list(text):
    """Argparse type: a list of integers of at least 1, from a text with commas between them."""
    return [whole(part) for part in text.split(",")]


def random_seed(text):
    """Argparse type: a seed that PyTorch's generators accept, an integer from 0 to below 2^63."""
    value = whole_or_zero(text)
    if value >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text} is too large: give less than 2^63")
    return value


def positive(text):
    """Argparse type: a finite number above 0."""
    value = _number(float, text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a number above 0")
    return value


def not_negative(text):
    """Argparse type: a finite number of at least 0."""
    value = _number(float, text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a number of at least 0")
    return value


def share(text):
    """Argparse type: a number from 0 to below 1."""
    value = _number(float, text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be from 0 to below 1")
    return value


def file_path(text):
    """Argparse type: a path. No shell expands the ~ of --flag=~/x, so it is expanded here."""
    return os.path.expanduser(text)


def _number(kind, text):
    try:
        return kind(text)
    except ValueError:
        what = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"{text!r} is not a {what}") from None


def script_parser(description, examples):
    """A script's parser; its --help keeps the line ends of the manual and the examples."""
    return argparse.ArgumentParser(
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def choose_device(name, computes=None):
    """The `torch.device` that `--device` names; "auto" is a GPU if there is one, else the CPU.

    A GPU with a number becomes the current one, to which streams, events and graphs belong.

    Args:
        computes: a function that tells whether the models can be computed on a device. "auto" asks
            it before it takes an Apple GPU, where operations of PyTorch may be missing.

    Raises:
        UsageError: if there is no such device here.
    """
    import torch  # takes a second, which --help does not wait for

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        mps = torch.device("mps")
        takes_mps = torch.backends.mps.is_available() and (computes is None or computes(mps))
        return mps if takes_mps else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # a device may have a name and still not work
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, AttributeError):
        raise UsageError(
            f"--device {name} is not available here: use --device cpu, or --device auto"
        ) from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device
