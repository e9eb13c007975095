"""Reading, cutting and hashing text of any size: only one block at a time is in memory.

All text enters here, files by `read_blocks` and what a user types by `typed_text`, so that a model
reads what is like the text it was trained on.
"""

import codecs
import gzip
import hashlib
import lzma
import os
import zlib
from pathlib import Path

from tqdm import tqdm

from system.errors import UserError
from system.safe_text import BROKEN

BLOCK_BYTES = 1 << 20
PIECE_CHARS = 1 << 16
LONGEST_PIECE = 1 << 20  # characters; only very long lines reach it
HEAD_BYTES = 8000  # a zero byte in so many means a binary file, as it does for git
OPENERS = {".gz": gzip.open, ".xz": lzma.open}
GZIP, XZ = b"\x1f\x8b", b"\xfd7zXZ\0"  # their first bytes
FORMATS = (  # first bytes, what such a file is, and the remedy
    (GZIP, "compressed with gzip", "name it {stem}.gz"),
    (XZ, "compressed with xz", "name it {stem}.xz"),
    (b"BZh", "compressed with bzip2", "unpack it with bunzip2"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it with unzstd"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"PK\3\4", "a zip archive", "unpack it, or save the document in it as plain text"),
    (b"PAR1", "a Parquet table", "write its text into a plain file"),
    (b"%PDF", "a PDF", "convert it, for example with pdftotext"),
    (codecs.BOM_UTF32_LE, "UTF-32", "convert it with iconv -f UTF-32 -t UTF-8"),
    (codecs.BOM_UTF32_BE, "UTF-32", "convert it with iconv -f UTF-32 -t UTF-8"),
    (codecs.BOM_UTF16_LE, "UTF-16", "convert it with iconv -f UTF-16 -t UTF-8"),
    (codecs.BOM_UTF16_BE, "UTF-16", "convert it with iconv -f UTF-16 -t UTF-8"),
)


def plain_text(text, changed=None, is_start=True):
    """A text as models read it: without a byte order mark, with LF for CRLF and CR.

    Args:
        changed: a set that gets what was changed, in words.
        is_start: whether the text begins here, where a byte order mark may stand.
    """
    changed = set() if changed is None else changed
    if is_start and text.startswith("\ufeff"):
        changed.add("its byte order mark was left out")
        text = text[1:]
    if "\r" in text:
        changed.add("its line ends CRLF or CR were read as LF")
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text


def typed_text(text):
    """The `plain_text` of what a user typed; U+FFFD stands for each byte that was not UTF-8."""
    return plain_text(BROKEN.sub("\ufffd", text))


def say_what_changed(source, changed, say):
    """Call `say` with one line, if anything in a source was changed."""
    if changed:
        say(f"{source}: {' and '.join(sorted(changed))}")


def read_text(path, flag):
    """The whole `plain_text` of the file that a flag names; prints a line if it was changed.

    Raises:
        UserError: as `read_blocks`.
    """
    changed = set()
    try:
        text = "".join(read_blocks(Path(path), changed))
    except UserError as error:
        raise UserError(f"{flag} {error}") from None
    say_what_changed(path, changed, print)
    return text


def read_blocks(path, changed=None):
    """Yield the `plain_text` of a UTF-8 file, plain, .xz or .gz, block after block.

    Args:
        path: a `Path`.
        changed: as for `plain_text`.

    Raises:
        UserError: if it is unreadable, damaged, not UTF-8, or holds only white space.
    """
    held, is_start, is_empty = "", True, True
    for block in _decoded(path):
        block = held + block
        held = "\r" if block.endswith("\r") else ""  # an LF may follow
        text = plain_text(block.removesuffix(held), changed, is_start)
        is_start, is_empty = False, is_empty and not text.strip()
        if text:
            yield text
    if held:
        yield plain_text(held, changed)
    if is_empty:
        raise UserError(f"{path} is empty: give a file with text in it")


def _decoded(path):
    """Yield the characters of a file as they stand there, block after block, no block empty."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    head, start = b"", 0  # start: position of the first byte not decoded yet
    try:
        with OPENERS.get(path.suffix, open)(path, "rb") as file:
            while True:
                data = file.read(BLOCK_BYTES)
                head = head or data[:HEAD_BYTES]
                if start == 0 and b"\0" in head:
                    raise UserError(_no_text(path, head))
                pending = len(decoder.getstate()[0])
                text = decoder.decode(data, final=not data)
                start += pending + len(data) - len(decoder.getstate()[0])
                if text:
                    yield text
                if not data:
                    break
    except UnicodeDecodeError as error:
        raise UserError(_no_text(path, head, f"byte {start + error.start}")) from None
    except (lzma.LZMAError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(_no_archive(path, error)) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _no_text(path, head, place=None):
    """What a file is that is no UTF-8, and the remedy, in one line.

    Args:
        head: its first bytes, unpacked if its name says that it is compressed.
        place: of the first byte that is wrong; None for a zero byte.
    """
    is_packed = path.suffix in OPENERS
    for first, what, remedy in FORMATS:
        if head.startswith(first) and is_packed:
            return f"{path} holds a file that is {what}: unpack it"
        if head.startswith(first):
            return f"{path} is {what}, not plain text: {remedy.format(stem=path.name)}"
    if place is None:
        return f"{path} is binary, or UTF-16, not UTF-8 text: name a text file, or convert it"
    return f"{path} is not UTF-8 ({place}): convert it, for example with iconv"


def _no_archive(path, error):
    """Why a .gz or .xz file cannot be unpacked, and the remedy, in one line."""
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    if not head or head.startswith({".gz": GZIP, ".xz": XZ}[path.suffix]):
        return f"{path} is damaged ({error}): get it again"
    for first, what, remedy in FORMATS:
        if head.startswith(first):
            return f"{path} is {what}, unlike its name: {remedy.format(stem=path.stem)}"
    return f"{path} is not compressed, unlike its name: name it {path.stem}"


def kept_lines(blocks):
    """WikiText's lines without the blank ones, one newline after each."""
    rest = ""
    for block in blocks:
        *lines, rest = (rest + block).split("\n")
        yield "".join(kept_line(line) for line in lines)
    yield kept_line(rest)


def kept_line(line):
    """A line with one newline; empty if the line is blank."""
    return line.rstrip("\n") + "\n" if line.strip() else ""


def between(blocks, start, end):
    """Yield the characters from `start` to before `end` of a text."""
    position = 0
    for block in blocks:
        if position >= end:
            return
        yield block[max(0, start - position) : end - position]
        position += len(block)


def pieces(blocks):
    """Cut text at line ends into pieces of at least `PIECE_CHARS`, apart from the last.

    The cuts depend on the text only, not on its blocks, so that an interrupted encoding can
    continue. A line longer than `LONGEST_PIECE` is cut before its last space within that length,
    or at that length if it has none.
    """
    text, searched = "", PIECE_CHARS  # searched: where to look for the next line end
    for block in blocks:
        text += block
        start = 0
        while True:
            end = text.find("\n", searched) + 1
            if end == 0 and len(text) - start < LONGEST_PIECE:
                break
            if end == 0 or end - start > LONGEST_PIECE:
                space = text.rfind(" ", start + 1, start + LONGEST_PIECE)
                end = space if space > start else start + LONGEST_PIECE
            yield text[start:end]
            start, searched = end, end + PIECE_CHARS
        text = text[start:]
        searched = max(len(text), PIECE_CHARS)
    if text:
        yield text


def sha256_of(*paths):
    """SHA-256 of a file, or of the hashes of several files, in hex.

    Raises:
        UserError: if one is no readable file.
    """
    digests = []
    title = f"hashing {paths[0].name if len(paths) == 1 else f'{len(paths):,} files'}"
    with byte_bar(
        title, sum(os.path.getsize(path) for path in paths if os.path.isfile(path))
    ) as bar:
        for path in paths:
            try:
                # reading a pipe or device may never end
                if path.exists() and not path.is_file() and not path.is_dir():
                    raise UserError(f"{path} is not an ordinary file: name a text file")
                with open(path, "rb") as file:
                    digests.append(_digest(file, bar).hexdigest())
            except IsADirectoryError:
                raise UserError(f"{path} is a directory: name the text file in it") from None
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _digest(file, bar):
    digest = hashlib.sha256()
    while data := file.read(BLOCK_BYTES):
        digest.update(data)
        bar.update(len(data))
    return digest


def byte_bar(title, total=None, start=0):
    """A progress bar that shows MB/s and, if the total is known, the time left."""
    return tqdm(
        total=total, initial=start, desc=title, unit="B", unit_scale=True, delay=1, leave=False
    )
