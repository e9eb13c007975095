"""Numbers as people read them in a table."""

LARGEST = 1e6


def limited(value, form):
    """A number as text, `> 1e6` above a million: the perplexity of a bad model has many digits.

    Args:
        form: a format specification, such as ".3f".
    """
    return "> 1e6" if value > LARGEST else format(value, form)
