"""Text as a stream: cut the same, whatever blocks it comes in."""

import bz2
import codecs
import gzip
import io
import lzma
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from system.errors import UserError
from text import stream


@pytest.mark.parametrize("length", [1, 999, 1000, 5000])
def test_pieces_do_not_depend_on_blocks(length, monkeypatch):
    """Short lines, lines longer than a piece may be, none at all: the same cuts for any blocks."""
    monkeypatch.setattr(stream, "PIECE_CHARS", 50)
    monkeypatch.setattr(stream, "LONGEST_PIECE", 200)
    line = "word " * 9
    for text in (line * (length // 45 + 1), "x" * length, (line[:30] + "\n") * (length // 30 + 1)):
        whole = list(stream.pieces([text]))
        assert "".join(whole) == text
        assert max(map(len, whole)) <= 200
        for size in (1, 7, 64, 333):
            blocks = [text[start : start + size] for start in range(0, len(text), size)]
            assert list(stream.pieces(blocks)) == whole
        assert all(piece[-1] in "\n" for piece in whole[:-1]) or "\n" not in text


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1 << 20])
def test_blocks_of_any_size(in_tmp, monkeypatch, size):
    """Characters and lines that straddle blocks arrive whole; a bad byte is counted right."""
    monkeypatch.setattr(stream, "BLOCK_BYTES", size)
    text = "é안😀\n \n\n = A = \nlast, without its newline"
    Path("x.txt").write_bytes(text.encode())
    assert "".join(stream.read_blocks(Path("x.txt"))) == text
    kept = "".join(stream.kept_lines(stream.read_blocks(Path("x.txt"))))
    assert kept == "é안😀\n = A = \nlast, without its newline\n"
    for start, end in ((0, 3), (2, 9), (5, 5), (7, 100)):
        part = stream.between(stream.read_blocks(Path("x.txt")), start, end)
        assert "".join(part) == text[start:end]
    Path("bad.txt").write_bytes(text.encode() + b"\xe9 and more")
    with pytest.raises(UserError, match=rf"byte {len(text.encode())}\)"):
        list(stream.read_blocks(Path("bad.txt")))
    Path("cut.txt").write_bytes("안녕".encode()[:-1])
    with pytest.raises(UserError, match=r"byte 3\)"):
        list(stream.read_blocks(Path("cut.txt")))


BOM = b"\xef\xbb\xbf"
MARK, ENDS = "its byte order mark was left out", "its line ends CRLF or CR were read as LF"


@pytest.mark.parametrize("size", [1, 2, 3, 1 << 20])
@pytest.mark.parametrize(
    "data, text, changes",
    [
        (BOM + "é\r\n\r\nb\r\n".encode(), "é\n\nb\n", {MARK, ENDS}),
        (b"a\rb\r\rc\n\r\nd\r", "a\nb\n\nc\n\nd\n", {ENDS}),
        (BOM + b"a\n" + BOM + b"b\n", "a\n\ufeffb\n", {MARK}),
        (b"a\n\x0b\x0c\x85\n".replace(b"\x85", "\x85\u2028".encode()), None, set()),
    ],
)
def test_windows_text(in_tmp, monkeypatch, size, data, text, changes):
    """BOM at the start, CRLF and CR, cut anywhere; what else ends a line stays."""
    monkeypatch.setattr(stream, "BLOCK_BYTES", size)
    text = data.decode() if text is None else text
    for name, content in (("x.txt", data), ("x.xz", lzma.compress(data))):
        Path(name).write_bytes(content)
        changed = set()
        assert "".join(stream.read_blocks(Path(name), changed)) == text
        assert changed == changes
    assert stream.plain_text(data.decode()) == text


WORDS = "some words of a text\n" * 50
TABLE = pyarrow.BufferOutputStream()
pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), TABLE)
ZIP = io.BytesIO()
with zipfile.ZipFile(ZIP, "w") as archive:
    archive.writestr("book.txt", WORDS)
WRONG_NAMES = {
    "gzip.txt": (gzip.compress(WORDS.encode()), "compressed with gzip.*name it gzip.txt.gz$"),
    "xz.txt": (lzma.compress(WORDS.encode()), "compressed with xz.*name it xz.txt.xz$"),
    "bz2.txt": (bz2.compress(WORDS.encode()), "bzip2.*bunzip2"),
    "zip.txt": (ZIP.getvalue(), "zip archive.*unpack"),
    "table.txt": (TABLE.getvalue().to_pybytes(), "Parquet table"),
    "utf16.txt": (WORDS.encode("utf-16"), "UTF-16.*iconv -f UTF-16"),
    "utf16be.txt": (codecs.BOM_UTF16_BE + "안녕".encode("utf-16-be"), "iconv -f UTF-16"),
    "utf32.txt": (WORDS.encode("utf-32"), "iconv -f UTF-32"),
    "utf16_without_mark.txt": (WORDS.encode("utf-16-le"), "UTF-16"),
    "pdf.txt": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "a PDF"),
    "program.txt": (b"\x7fELF\2\1\1\0\0\0\0", "is binary"),
    "plain.gz": (WORDS.encode(), "not compressed.*name it plain$"),
    "plain.txt.xz": (WORDS.encode(), "not compressed.*name it plain.txt$"),
    "xz.txt.gz": (lzma.compress(WORDS.encode()), "compressed with xz.*name it xz.txt.xz$"),
    "gzip.xz": (gzip.compress(WORDS.encode()), "compressed with gzip.*name it gzip.gz$"),
    "twice.gz": (gzip.compress(gzip.compress(WORDS.encode())), "holds a file.*gzip: unpack it$"),
    "table.gz": (gzip.compress(TABLE.getvalue().to_pybytes()), "holds a file.*Parquet"),
}


@pytest.mark.parametrize("name", WRONG_NAMES)
def test_files_of_a_wrong_name(in_tmp, name):
    """One line says what the file is and what to do; doing it works, where it is a new name."""
    content, message = WRONG_NAMES[name]
    Path(name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        list(stream.read_blocks(Path(name)))
    assert str(error.value).startswith(f"{name} ") and "\n" not in str(error.value)
    if " name it " in str(error.value):
        right = Path(name).rename(str(error.value).split(" name it ")[1])
        assert "".join(stream.read_blocks(right)) == WORDS
    with pytest.raises(UserError, match=r"^--text nothing.txt cannot be read"):
        stream.read_text("nothing.txt", "--text")


def test_what_only_begins_like_another_format_is_read(in_tmp):
    """The first letters alone make no archive of a text."""
    for text in ("BZh is a word\n", "PAR1 and PAR2\n", "%PDF is how they begin\n", "MZ\n"):
        Path("x.txt").write_text(text)
        assert stream.read_text("x.txt", "--text") == text
