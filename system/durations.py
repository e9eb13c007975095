"""Durations as people read them."""


def duration(seconds, to_the_minute=False):
    """A duration in words: 9.0 s, 3 min 09 s, 1 h 02 min.

    Args:
        to_the_minute: round to whole minutes and leave seconds out, as an estimate should.
    """
    if to_the_minute:
        seconds = 60 * round(seconds / 60)
    elif seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min" if to_the_minute else f"{minutes} min {seconds:02d} s"


def short_duration(seconds):
    """A duration in a few letters: 9s, 3m09s, 1h02m, 12d03h."""
    seconds = round(seconds)
    for unit, smaller, size, part in (
        ("d", "h", 86400, 3600),
        ("h", "m", 3600, 60),
        ("m", "s", 60, 1),
    ):
        if seconds >= size:
            return f"{seconds // size}{unit}{seconds % size // part:02d}{smaller}"
    return f"{seconds}s"
