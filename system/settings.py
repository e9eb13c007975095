"""Dataclass fields that are also flags: default, type, help and legal range stand in one place."""

import argparse
import dataclasses

from system.cli import file_path
from system.errors import UsageError
from system.safe_text import short_reason, shown_short


def setting(default, help, type=None, choices=None, flag=None, is_path=False):
    """A dataclass field that carries all that its flag needs.

    Args:
        default: the only place of the default; None if it depends on other settings, and `help`
            then states it as "(default: ...)".
        type: a function of `system.cli` that turns text into a legal value; not for bool, whose
            flag is a switch, nor for text.
        choices: the legal values, if they can be listed.
        flag: the flag's name, if it is not the field's name with dashes.
        is_path: the flag names a file or directory, whose ~ is expanded.
    """
    metadata = {"help": help, "type": type, "choices": choices, "flag": flag, "is_path": is_path}
    return dataclasses.field(default=default, metadata=metadata)


def flag_of(field):
    """The flag that gives this field, as a user types it."""
    return field.metadata["flag"] or "--" + field.name.replace("_", "-")


def add_flag(group, field, help):
    """Add a field's flag to a group of a parser. Its default is None: the flag was not given."""
    kind = file_path if field.metadata["is_path"] else field.metadata["type"]
    options = {"type": kind, "choices": field.metadata["choices"]}
    if field.type is bool:
        options = {"action": argparse.BooleanOptionalAction}
    group.add_argument(flag_of(field), dest=field.name, help=help, **options)


def objection(field, value):
    """Why the command line would refuse this value of a field, in words; None if it would not."""
    if value is None:
        return None if field.default is None else "it is missing"
    if field.type is bool:
        return None if type(value) is bool else f"{shown_short(value)} is neither on nor off"
    # a file may hold what no command line can
    is_path = isinstance(value, str) and "\0" not in value
    if not isinstance(value, str | int | float) or (field.metadata["is_path"] and not is_path):
        return f"{shown_short(value)} is of another type"
    if isinstance(value, int) and abs(value) >= 1 << 63:
        return "it is too large: give less than 2^63"
    # what was parsed must be the value itself: 4.0 or "4" is no legal 4
    try:
        parsed = (field.metadata["type"] or str)(str(value))
    except argparse.ArgumentTypeError as error:
        return short_reason(error)
    choices = field.metadata["choices"]
    if choices is not None and value not in choices:
        return f"{shown_short(value)} is not known: choose one of {', '.join(choices)}"
    return None if parsed == value else f"{shown_short(value)} is of another type"


def check_settings(config):
    """Check every field of a dataclass that `setting` made.

    Raises:
        UsageError: if a value is outside its legal range; it names the flag.
    """
    for field in dataclasses.fields(config):
        if field.metadata and (reason := objection(field, getattr(config, field.name))):
            raise UsageError(f"{flag_of(field)}: {reason}")
