"""What the files of a run may hold."""

from system.safe_text import shown_short

LONGEST_NAME = 64
LONGEST_TEXT = 4096  # as paths may be
MOST_ARGUMENTS = 1000
TRAINING = "train_shakespeare.py"  # what a command to be pasted may call
LARGEST_NUMBER = 1e40  # sums of such, and pictures of them, are numbers still
LARGEST_PERPLEXITY = 1e305


def wrong_value(found, expected, others):
    """What is wrong with a dictionary of a stranger's, in words; None where nothing is.

    Args:
        expected: for each key that must be there `(whether a value is right, what is right)`.
        others: the same for all other keys.
    """
    if not isinstance(found, dict):
        return "is no dictionary"
    for key in expected:
        if key not in found:
            return f"has no {key}"
    for key, value in found.items():
        is_right, words = expected.get(key, others)
        if not key.isidentifier() or len(key) > LONGEST_NAME:
            return f"has {key[:40]!r}, as no run does"
        if not is_right(value):
            return f"has {key} {shown_short(value)}, not {words}"
    return None


def is_text(value):
    return isinstance(value, str) and len(value) <= LONGEST_TEXT


def is_name(value):
    return isinstance(value, str) and len(value) <= LONGEST_NAME


def is_plain(value):
    return value is None or isinstance(value, bool) or is_number(value) or is_text(value)


def is_number(value):
    return type(value) in (int, float) and abs(value) <= LARGEST_NUMBER  # NaN is not


def is_whole(value):
    return type(value) is int and 0 < value <= LARGEST_NUMBER


def _is_perplexity(value):
    return value is None or (type(value) in (int, float) and 0 < value <= LARGEST_PERPLEXITY)


def _is_command(value):
    is_short = isinstance(value, list) and len(value) <= MOST_ARGUMENTS
    return is_short and value[:1] == [TRAINING] and all(map(is_text, value))


def is_kind(value):
    return isinstance(value, str) and value in CONFIG_OF_MODEL


WHOLE = (is_whole, "a whole number above 0")
WHOLE_OR_0 = (lambda value: type(value) is int and 0 <= value <= LARGEST_NUMBER, "a whole number")
NUMBER = (is_number, "a number")
NUMBER_ABOVE_0 = (lambda value: is_number(value) and value > 0, "a number above 0")
NUMBER_OR_NULL = (lambda value: value is None or is_number(value), "a number or null")
TEXT = (is_text, f"a text of at most {LONGEST_TEXT:,} characters")
NAME = (is_name, f"a text of at most {LONGEST_NAME} characters")
PLAIN = (is_plain, "a number, a switch or a short text")
EVALUATION = {
    **{"step": WHOLE, "tokens": WHOLE, "val_loss": NUMBER_OR_NULL},
    **{"perplexity": (_is_perplexity, "a number above 0 or null")},
    **dict.fromkeys(("steps_per_s", "tokens_per_s", "wall_time"), NUMBER_ABOVE_0),
}
CONFIG = {
    **{"model": (is_kind, "ngt or vanilla")},
    **{"parameters": WHOLE, "max_steps": WHOLE, "seed": WHOLE_OR_0},
    **dict.fromkeys(("source", "machine", "checkpoint_path"), TEXT),
    **{"command": (_is_command, f"{TRAINING} and its flags")},
}
SPAN = {"first": WHOLE, "last": WHOLE, "loss": NUMBER}
EVALUATED = {  # the rows of an evaluation.json
    "by_length": {"context": WHOLE, "tokens": WHOLE, "loss": NUMBER_OR_NULL},
    **{"by_place": SPAN, "by_frequency": SPAN},
    "repeats": {"text": NAME, "gap": WHOLE, "again": NUMBER, "once": NUMBER},
}
CONFIG_OF_MODEL = {
    "ngt": {"law": NAME, "mass_in_value": (lambda x: isinstance(x, bool), "true or false")},
    "vanilla": {"pos": NAME},
}
