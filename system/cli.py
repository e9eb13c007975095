"""Types of command-line values, the scripts' parser, and the choice of a device."""

import argparse
import math

import torch

from system.errors import UsageError


def whole(text):
    """An integer of at least 1."""
    value = _number(int, text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is too small: give at least 1")
    return value


def whole_or_zero(text):
    """An integer of at least 0."""
    value = _number(int, text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative: give at least 0")
    return value


def whole_list(text):
    """Integers of at least 1, separated by commas."""
    return [whole(part) for part in text.split(",")]


def random_seed(text):
    """What a PyTorch generator takes."""
    value = whole_or_zero(text)
    if value >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text} is too large: give less than 2^63")
    return value


def positive(text):
    """A finite number above 0."""
    value = _number(float, text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a number above 0")
    return value


def not_negative(text):
    """A finite number of at least 0."""
    value = _number(float, text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a number of at least 0")
    return value


def share(text):
    """A number from 0 to below 1."""
    value = _number(float, text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be from 0 to below 1")
    return value


def _number(kind, text):
    try:
        return kind(text)
    except ValueError:
        what = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"{text!r} is no {what}") from None


def script_parser(description, examples):
    """A script's parser, whose help keeps the line ends of its manual and examples."""
    return argparse.ArgumentParser(
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def choose_device(name):
    """The device that `--device` names.

    Raises:
        UsageError: where there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, AttributeError):
        raise UsageError(
            f"--device {name} is not available here: use --device cpu, or --device auto"
        ) from None
    return device
