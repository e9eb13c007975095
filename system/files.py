"""Writing files so that a crash leaves no half of one."""

import contextlib

from system.errors import UserError


def write_whole(path, data):
    """Write bytes, or a text as UTF-8, to a file, all or none; missing folders are created.

    Args:
        path: a `Path`; an older file there stays until the new one is complete.
        data: characters that UTF-8 lacks, as file names may hold them, are escaped.

    Raises:
        UserError: if it cannot be written.
    """
    if isinstance(data, str):
        data = data.encode(errors="backslashreplace")
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(path)  # a reader sees the old file or the new one, never a part
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
