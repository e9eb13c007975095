"""Letters of other scripts in pictures, with fonts that are made here."""

import io

import matplotlib.image
import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.figure import Figure

import report
import visualize_coords
from run_folders import write_run
from small_models import make_checkpoint
from system import fonts
from system.fonts import fonts_for
from text.tokenizer import CharTokenizer

TEXT = "옛날中文🫠Ω"


def make_font(path, letters, size):
    """A font that draws each of the letters as a square of `size` thousandths of an em."""
    pen = TTGlyphPen(None)
    if size:
        pen.moveTo((0, 0))
        for corner in ((0, size), (size, size), (size, 0)):
            pen.lineTo(corner)
        pen.closePath()
    square = pen.glyph()
    names = [".notdef", *(f"letter{n}" for n in range(len(letters)))]
    builder = FontBuilder(1000)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(c): name for c, name in zip(letters, names[1:], strict=True)})
    builder.setupGlyf(dict.fromkeys(names, square))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=1000, descent=0)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return str(path)


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """A function that makes some fonts the only ones of this computer."""

    def install(**letters_and_sizes):
        paths = [
            make_font(tmp_path / f"{name}.ttf", letters, size)
            for name, (letters, size) in letters_and_sizes.items()
        ]
        monkeypatch.setattr(fonts, "findSystemFonts", lambda: paths)

    install()
    return install


def picture(text):
    """The text in points of 36, at 72 per inch: brightness (rows, columns) from 0 to 1."""
    figure = Figure(figsize=(8, 2), dpi=72)
    figure.text(0.1, 0.3, text, fontsize=36, parse_math=False)
    png = io.BytesIO()
    with fonts_for(figure):
        figure.savefig(png, format="png")
    png.seek(0)
    return matplotlib.image.imread(png)[..., 0]


def test_a_font_of_the_computer_draws_what_the_default_lacks(installed, capsys, recwarn):
    """Squares of 0.5 em; a font whose glyph has no shape does not count, nor does a broken file."""
    installed(Empty=("옛", 0), Squares=("옛中🫠", 500))
    for text, squares in (("옛", 1), ("옛中🫠", 3), ("옛\ufe0f中", 2)):
        dark = float((1 - picture(text)).sum())
        assert dark == pytest.approx(squares * 18**2, rel=0.03), text
    assert not capsys.readouterr().err and not [w for w in recwarn if "lyph" in str(w.message)]
    # the letters that the default has are drawn as before
    plain = picture("Ω é ж")
    installed()
    assert np.array_equal(plain, picture("Ω é ж"))


def test_without_such_a_font_one_line_names_a_package(installed, capsys, recwarn):
    installed(Empty=("옛", 0))
    for text, package in (
        *(("옛날", "fonts-noto-cjk"), ("中文", "fonts-noto-cjk"), ("かな", "fonts-noto-cjk")),
        *(("🫠", "fonts-symbola"), ("ꦗ", "fonts-noto-core")),
    ):
        picture(text)
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and f"install {package} (" in told and text[0] in told
    picture(TEXT + "ꦗ")
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "fonts-noto-cjk, fonts-noto-core, fonts-symbola" in told
    assert not list(recwarn)


def test_the_map_and_the_report_draw_with_it(installed, in_tmp, capsys, recwarn):
    """No warning of a library on the way: names of tokens, of the checkpoint, of a run."""
    make_checkpoint("한국.pt", CharTokenizer.train(TEXT))
    flags = ["--checkpoint-path", "한국.pt", "--text", TEXT]
    visualize_coords.main([*flags, "--png", "map.png"])
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "fonts-noto-cjk, fonts-symbola" in told
    visualize_coords.main([*flags, "--heads-png", "heads.png"])
    assert capsys.readouterr().err.count("install fonts-noto-cjk (") == 1
    write_run("한국", [4.0, 3.0], exponent=7)
    write_run("plain", [4.0, 3.5])
    report.main(["--runs", "plain", "한국", "--output", "reports/r.md"])
    assert capsys.readouterr().err.count("install fonts-noto-cjk (") == 1
    assert not [w for w in recwarn if "lyph" in str(w.message)]
