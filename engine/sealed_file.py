"""PyTorch archives on disk: written atomically, and rejected if a single byte has changed.

`torch.save` writes a zip whose checksums cover its contents, but not its headers and padding. So we
store the SHA-256 of the whole file as the zip's comment, which is its last bytes: the seal.
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
    """The file's bytes are not what was written; the message continues after the file's name."""


def check_may_be_replaced(path):
    """Raise `PermissionError` if this file is read-only, since renaming over it would succeed."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_IMODE(os.stat(path).st_mode) & 0o222:
            raise PermissionError(None, "it is read-only", str(path))


def partial_path(path):
    """The temporary name under which a file is written."""
    return Path(path).with_name(Path(path).name + ".partial")


def write_archive(path, contents):
    """Write contents with `torch.save` to a temporary file, flush it to disk, and rename it.

    Raises:
        OSError, RuntimeError: if it cannot be written; a file that was there is untouched.
    """
    path = Path(path)
    check_may_be_replaced(path)
    try:
        _write_and_rename(path, contents)
    except FileNotFoundError:  # the directory was renamed or removed while we wrote
        _write_and_rename(path, contents)
    _flush_directory(path.parent)


def _write_and_rename(path, contents):
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
    """`torch.save`, but a failed write raises its `OSError`: PyTorch raises another one instead."""
    failures = []

    class Writer:
        """The methods that `torch.save` calls on a file."""

        flush = file.flush

        def write(self, data):
            try:
                return file.write(data)
            except OSError as error:
                failures.append(error)
                raise

    try:
        torch.save(contents, Writer())
    except RuntimeError as error:
        raise (failures or [error])[0] from None


def _seal(file):
    file.seek(-2, os.SEEK_END)  # the last two bytes of a zip are the length of its comment
    file.write(SEAL_SIZE.to_bytes(2, "little") + SEAL)
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(0, os.SEEK_END)
    file.write(digest.encode())


def _flush_directory(directory):
    """Make a rename survive a power cut, on systems that can flush a directory."""
    with contextlib.suppress(OSError):
        number = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def check_archive(path):
    """Check that a file is as it was written, without unpickling anything.

    Archives from other programs have no seal; for them we rely on the zip's own checksums.

    Raises:
        DamagedArchive: if it is truncated, changed, no archive, or claims more bytes than it has.
        OSError: if it cannot be read.
    """
    size = os.path.getsize(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise DamagedArchive("is compressed, as no checkpoint is")
            # entries that overlap in the file would use memory many times its size
            if sum(entry.file_size for entry in entries) > size:
                raise DamagedArchive("claims to hold more bytes than it has")
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
    """Whether the file has a seal. Raises `DamagedArchive` if the seal does not match."""
    with open(path, "rb") as file:
        file.seek(-min(size, SEAL_SIZE), os.SEEK_END)
        seal = file.read()
        if not seal.startswith(SEAL):
            # zipfile ignores what is appended to an archive
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
