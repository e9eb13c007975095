"""Reading, cutting and hashing text of any size: only one block at a time is in memory."""

import codecs
import gzip
import hashlib
import lzma
import zlib

from tqdm import tqdm

from system.errors import UserError

BLOCK_BYTES = 1 << 20
PIECE_CHARS = 1 << 16
LONGEST_PIECE = 1 << 20  # characters; only very long lines reach it


def read_blocks(path):
    """Yield the text of a UTF-8 file, plain, .xz or .gz, block after block.

    Args:
        path: a `Path`.

    Raises:
        UserError: if it is unreadable, damaged, not UTF-8, or holds only white space.
    """
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    decoder = codecs.getincrementaldecoder("utf-8")()
    is_empty, start = True, 0  # start: position of the first byte not decoded yet
    try:
        with opener(path, "rb") as file:
            while True:
                data = file.read(BLOCK_BYTES)
                pending = len(decoder.getstate()[0])
                text = decoder.decode(data, final=not data)
                start += pending + len(data) - len(decoder.getstate()[0])
                is_empty = is_empty and not text.strip()
                if text:
                    yield text
                if not data:
                    break
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte {start + error.start}): convert it, for example with iconv"
        ) from None
    except (lzma.LZMAError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}): get it again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if is_empty:
        raise UserError(f"{path} is empty: give a file with text in it")


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
    for path in paths:
        try:
            # reading a pipe or device may never end
            if path.exists() and not path.is_file() and not path.is_dir():
                raise UserError(f"{path} is not an ordinary file: name a text file")
            with open(path, "rb") as file:
                digests.append(_digest(file, path).hexdigest())
        except IsADirectoryError:
            raise UserError(f"{path} is a directory: name the text file in it") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _digest(file, path):
    digest = hashlib.sha256()
    total = path.stat().st_size
    with tqdm(total=total, desc=f"hashing {path.name}", unit="B", unit_scale=True, delay=2) as bar:
        while data := file.read(BLOCK_BYTES):
            digest.update(data)
            bar.update(len(data))
    return digest
