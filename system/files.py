"""Files written whole or not at all."""

import contextlib

from system.errors import UserError


def write_whole(path, data):
    """Write bytes to a file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
