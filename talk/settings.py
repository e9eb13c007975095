"""The settings of an answer, by name, each with the function that reads and checks its value."""

import argparse

from system.cli import positive, random_seed, whole


def temperature(text):
    """A number of 0 or more."""
    value = float(text)
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"{text} must be a number from 0 (greedy) to a million")
    return value


def probability(text):
    """A number above 0 and at most 1."""
    value = positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} must be above 0 and at most 1")
    return value


SETTINGS = {
    "temperature": temperature,
    "top_k": whole,
    "top_p": probability,
    "max_new_tokens": whole,
    "seed": random_seed,
}
OPTIONAL_SETTINGS = ("top_k", "top_p", "seed")  # these may be off, which is None
