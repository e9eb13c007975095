"""The settings of an answer, by name, each with the function that reads and checks its value."""

import argparse

from system.cli import not_negative, positive, random_seed, whole


def temperature(text):
    """A number of 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = None
    if value is None or not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"{text} must be a number from 0 (greedy) to a million")
    return value


def probability(text):
    """A number above 0 and at most 1."""
    value = positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} must be above 0 and at most 1")
    return value


def share_or_all(text):
    """A number from 0 to 1."""
    value = not_negative(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} must be from 0 to 1")
    return value


def stop_text(text):
    r"""A text that ends an answer; `\n` in it stands for a line end and `\t` for a tab."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: give at least one character")
    return text.replace("\\n", "\n").replace("\\t", "\t")


SETTINGS = {
    "temperature": temperature,
    "top_k": whole,
    "top_p": probability,
    "min_p": share_or_all,
    "repetition_penalty": positive,
    "max_new_tokens": whole,
    "seed": random_seed,
    "stop": stop_text,  # there may be several, so the setting is a list of these
}
# these may be off, which is None
OPTIONAL_SETTINGS = ("top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop")


def shown(value):
    """The value of a setting for people."""
    if isinstance(value, list):
        return ", ".join(map(repr, value))
    return "off" if value is None else str(value)
