"""Text as a stream: cut the same, whatever blocks it comes in."""

from pathlib import Path

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
    text = "é안😀\r\n \n\n = A = \nlast, without its newline"
    Path("x.txt").write_bytes(text.encode())
    assert "".join(stream.read_blocks(Path("x.txt"))) == text
    kept = "".join(stream.kept_lines(stream.read_blocks(Path("x.txt"))))
    assert kept == "é안😀\r\n = A = \nlast, without its newline\n"
    for start, end in ((0, 3), (2, 9), (5, 5), (7, 100)):
        part = stream.between(stream.read_blocks(Path("x.txt")), start, end)
        assert "".join(part) == text[start:end]
    Path("bad.txt").write_bytes(text.encode() + b"\xe9 and more")
    with pytest.raises(UserError, match=rf"byte {len(text.encode())}\)"):
        list(stream.read_blocks(Path("bad.txt")))
    Path("cut.txt").write_bytes("안녕".encode()[:-1])
    with pytest.raises(UserError, match=r"byte 3\)"):
        list(stream.read_blocks(Path("cut.txt")))
