"""The gallery's pages: small, of the text and model that make.sh names, whole in a browser."""

import re
from pathlib import Path

import pytest

from conftest import ROOT
from map_contents import data_of

GALLERY = ROOT / "docs" / "gallery"
LARGEST = 3_000_000  # bytes of a page
LARGEST_PICTURE = 200_000
MODELS = {"english": "english", "compare": "english", "korean": "korean", "code": "code"}
LINK = re.compile(r"\]\((?:gallery/)?(\w+)\.html(#[^)]+)\)")


def linked():
    """Every (page, address after it) that the docs link."""
    texts = [
        path.read_text(encoding="utf-8")
        for path in (GALLERY / "README.md", GALLERY.parent / "looking_inside.md")
    ]
    return [link for text in texts for link in LINK.findall(text)]


def test_small_pages_and_pictures_all_linked():
    assert {path.stem for path in GALLERY.glob("*.html")} == {*MODELS, "index"}
    index = (GALLERY / "index.html").read_text(encoding="utf-8")
    for name in MODELS:
        assert 0 < (GALLERY / f"{name}.html").stat().st_size < LARGEST
        assert f'href="{name}.html' in index and f'src="{name}.webp"' in index
    assert {name for name, _ in linked()} == set(MODELS)
    docs = "".join(path.read_text(encoding="utf-8") for path in GALLERY.parent.rglob("*.md"))
    for path in GALLERY.glob("*.webp"):
        assert path.stat().st_size < LARGEST_PICTURE and f"{path.name})" in docs


@pytest.mark.parametrize("name", MODELS)
def test_a_page_shows_the_text_and_the_model_of_the_script(name):
    script = (GALLERY / "make.sh").read_text(encoding="utf-8")
    run, *others = data_of(GALLERY / f"{name}.html")
    text = "".join(run["texts"]).translate({0x2423: " ", 0x23CE: "\n", 0x21E5: "\t"})
    whole = (GALLERY / f"{MODELS[name]}.txt").read_text(encoding="utf-8")
    assert whole.startswith(text) and (text == whole or name == "compare")
    assert all(run["tokens"] == other["tokens"] for other in others)
    assert 60 <= len(run["tokens"]) <= 200
    assert [run["kind"], *(run["kind"] for run in others)] == (
        ["newton", "vanilla"] if name == "compare" else ["newton"]
    )
    assert all(run["off"] for run in (run, *others)), "heads can be switched off"
    steps = {
        model: int(steps)
        for model, steps in re.findall(r"train ngt (\w+) .*?--max-steps (\d+)", script)
    }
    steps["english"] = int(re.search(r'"\$2" .*--max-steps (\d+)', script).group(1))
    assert run["step"] <= steps[MODELS[name]]
    vocabulary = re.search(rf"train ngt {MODELS[name]} [^;]*?--bpe-vocab-size (\d+)", script)
    assert len(run["tokens"]) and max(run["nameIds"]) < int(vocabulary[1] if vocabulary else 2048)


def test_every_link_opens_what_it_says(browser):
    """Without an error and without a request; an address that a page does not know is changed."""
    wrong = []
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda line: line.type == "error" and wrong.append(line.text))
    page.on("request", lambda asked: asked.url.startswith("http") and wrong.append(asked.url))
    for name, address in linked():
        page.goto(Path(GALLERY / f"{name}.html").as_uri() + address)
        page.wait_for_selector("body[data-ready]", state="attached")
        page.wait_for_url(re.compile("trails="))
        shown = page.url.split("#")[1].split("&")
        assert set(address[1:].split("&")) <= set(shown), (name, address)
    page.close()
    assert not wrong
