"""PyTorch's archives on disk: written whole or not at all, and read only where every byte is right.

`torch.save` writes a zip whose checksums cover what is in it, not its headers and padding. Here the
zip's comment, its last bytes, is the SHA-256 of all before it.
"""

import contextlib
import hashlib
import os
import stat
import zipfile
import zlib
from pathlib import Path

import torch

SEAL = b"sha256:"
SEAL_SIZE = len(SEAL) + hashlib.sha256().digest_size * 2
END_OF_ZIP = b"PK\x05\x06"
END_OF_ZIP_SIZE = 22


class DamagedArchive(Exception):
    """A file whose bytes are not those that were written; the message says what is wrong."""


def check_may_be_replaced(path):
    """Raise `PermissionError` where somebody made this file read-only: renaming would not ask."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_IMODE(os.stat(path).st_mode) & 0o222:
            raise PermissionError(None, "it is read-only", str(path))


def partial_path(path):
    """Where a file is written before it takes its name."""
    return Path(path).with_name(Path(path).name + ".partial")


def write_archive(path, contents):
    """Write what `torch.save` can under a temporary name, flush it to disk, and rename it.

    Raises:
        OSError, RuntimeError: where it cannot be written; the file that was there is untouched.
    """
    path = Path(path)
    check_may_be_replaced(path)
    try:
        _write_whole_archive(path, contents)
    except FileNotFoundError:  # somebody has renamed or removed the directory meanwhile
        _write_whole_archive(path, contents)
    _flush_directory(path.parent)


def _write_whole_archive(path, contents):
    partial = partial_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(partial, "w+b") as file:
            _save(contents, file)
            _seal(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def _save(contents, file):
    """`torch.save`, which would hide why a disk refused behind an error of its own."""
    refused = []

    class Writer:
        """What `torch.save` needs of a file."""

        flush = file.flush

        def write(self, data):
            try:
                return file.write(data)
            except OSError as error:
                refused.append(error)
                raise

    try:
        torch.save(contents, Writer())
    except RuntimeError as error:
        raise (refused or [error])[0] from None


def _seal(file):
    file.seek(-2, os.SEEK_END)  # where a zip says how long its comment is
    file.write(SEAL_SIZE.to_bytes(2, "little") + SEAL)
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(0, os.SEEK_END)
    file.write(digest.encode())


def _flush_directory(directory):
    """So that a rename outlives a power cut, where the system can do that."""
    with contextlib.suppress(OSError):
        number = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def check_archive(path):
    """Refuse a file with a byte that is not as it was written; nothing in it is interpreted.

    Archives of other writers have no seal: for them the zip's own checksums must do.

    Raises:
        DamagedArchive: where it is truncated, changed or no archive, or unpacks to more than it is.
        OSError: where it cannot be read.
    """
    size = os.path.getsize(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise DamagedArchive("is compressed, as no checkpoint is")
            if sum(entry.file_size for entry in entries) > size:
                raise DamagedArchive("unpacks to more than it is")
            if _is_sealed(path, size):
                return
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DamagedArchive("is truncated, or no checkpoint") from error
    except (ValueError, UnicodeDecodeError, OverflowError) as error:
        raise DamagedArchive("is damaged in its table of contents") from error
    if damaged is not None:
        raise DamagedArchive(f"is damaged (checksum of {damaged[:80]!r})")


def _is_sealed(path, size):
    """Whether there is a seal; it is right then."""
    with open(path, "rb") as file:
        file.seek(-min(size, SEAL_SIZE), os.SEEK_END)
        seal = file.read()
        if not seal.startswith(SEAL):
            if seal[-END_OF_ZIP_SIZE:][:4] != END_OF_ZIP:
                raise DamagedArchive("is damaged (something follows the archive's end)")
            return False
        file.seek(0)
        digest, left = hashlib.sha256(), size - SEAL_SIZE + len(SEAL)
        while left and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
    if digest.hexdigest().encode() != seal[len(SEAL) :]:
        raise DamagedArchive("is damaged (its SHA-256 is not what was written)")
    return True
