"""The page around the views in a real browser: text, details, address, search, keys, downloads."""

import csv
import html
import io
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from map_browser import selected
from map_contents import TEXT, unpacked
from small_models import LETTERS, make_checkpoint, make_checkpoint_with_background, pull_weights
from text.tokenizer import BPETokenizer, CharTokenizer

LINES = "the quick brown fox\njumps over\nthe lazy dog\n"
TEXT_IN_LINES = 3 * LINES
CHOSEN = 100  # an "o", of which there are many
SHOWN = """async () => {
  await new Promise((done) => setTimeout(done, 160));
  return Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
}"""
LINES_OF_TOKENS = """(all) => all.map((span) => {
  const boxes = [...span.getClientRects()];
  const space = span.previousSibling?.nodeType === Node.TEXT_NODE ? " " : "";
  return [space + span.textContent, boxes[0].top, boxes.at(-1).top];
})"""
MS_PER_SELECTION = """() => {
  const spans = [...document.querySelectorAll(".token")];
  const started = performance.now();
  for (const span of spans) span.click();
  document.body.getBoundingClientRect();
  return (performance.now() - started) / spans.length;
}"""


def rows(page, place):
    """[(label, percent)] of a list of bars in the details."""
    found = page.locator(f"{place} li").all()
    shown = [(row.locator(".chip").inner_text(), row.locator("b").inner_text()) for row in found]
    return [(label, float(share.strip("< %"))) for label, share in shown]


def in_the_text(page, name):
    """The tokens of the text that bear a class."""
    return set(
        page.eval_on_selector_all(f".token.{name}", "all => all.map(s => Number(s.dataset.token))")
    )


def fact(page, name):
    return page.locator(".facts div", has_text=name).locator("dd").inner_text()


def shown(page):
    """The address, once it says what is shown."""
    return page.evaluate(SHOWN)


@torch.no_grad()
def chances_of(model, ids):
    """The chance of every token at each place of a text, (T, V); the first row is of place 1."""
    return torch.softmax(model(torch.tensor([ids])), -1)[0].double().numpy()


def test_text_and_details(open_map, capsys):
    """What pulled a token, how surprising it was and what was expected, as the model has it."""
    model = make_checkpoint("x.pt")
    page, (run,) = open_map("--text", TEXT_IN_LINES)
    ids = run["tokens"]
    # first: the most surprising word of the second half
    half = range(len(ids) // 2, len(ids))
    words = [n for n in half if TEXT_IN_LINES[n].isalpha() and TEXT_IN_LINES[n - 1] in " \n"]
    assert selected(page) == [max(words, key=lambda n: run["loss"][n])]
    # everything is in the first screen
    assert page.evaluate("document.documentElement.scrollHeight <= innerHeight")
    assert page.evaluate(
        "(d => d.scrollHeight <= d.clientHeight)(document.querySelector('.details'))"
    )

    # the text is the text: spaces, lines, and no mark until one points at a token
    assert page.text_content(".text") == TEXT_IN_LINES
    tops = page.eval_on_selector_all(".token", "all => all.map(s => s.getClientRects()[0].top)")
    assert tops[20] > tops[18] and len(set(tops[:19])) == 1
    wide = "document.querySelector('.token.end').getClientRects()[0].width"
    assert page.evaluate(wide) > 6  # there is something to point at
    mark = "(n) => getComputedStyle(document.querySelectorAll('.token')[n], '::before').content"
    assert page.evaluate(mark, 3) == "none"
    page.locator(".token").nth(3).hover()
    assert page.evaluate(mark, 3) == '"␣"'

    page.locator(".token").nth(CHOSEN).click()
    page.click("#tab-map")
    page.select_option("#head", "mean")
    page.fill("#layer", "2")
    assert selected(page) == [CHOSEN]
    weights = pull_weights(model, torch.tensor([ids]))[1].double().numpy()
    expected = np.sort(weights.mean(0)[CHOSEN])[::-1][:6]
    shares = rows(page, ".pulls:not(.expected)")
    assert np.allclose([share for _, share in shares], 100 * expected, atol=0.51)
    assert shares[0][0] == run["labels"][int(weights.mean(0)[CHOSEN].argmax())]
    assert in_the_text(page, "source") == set(np.flatnonzero(weights.mean(0)[CHOSEN] >= 0.005))
    page.select_option("#head", "1")
    page.select_option("#fit", "one")
    shares = rows(page, ".pulls:not(.expected)")
    assert np.allclose(
        [share for _, share in shares], 100 * np.sort(weights[1, CHOSEN])[::-1][:6], atol=0.51
    )

    # the nearest six of the same token are ringed
    z = unpacked(run["z"], "<i2").reshape(3, len(ids), -1)[2] * run["zScale"]
    twins = [n for n, token in enumerate(ids) if token == ids[CHOSEN] and n != CHOSEN]
    twins.sort(key=lambda twin: np.linalg.norm(z[CHOSEN] - z[twin]))
    assert in_the_text(page, "twin") == set(twins[:6]) and len(twins) > 6
    page.get_by_text("The same token elsewhere", exact=True).click()
    told = page.locator(".twins b").all_inner_texts()
    far = [np.linalg.norm(z[CHOSEN] - z[twin]) for twin in twins]
    assert np.allclose([float(t) for t in told], far[: len(told)], rtol=0.01)

    # how surprising, and what was expected
    chances = chances_of(model, ids)[CHOSEN - 1]
    assert fact(page, "surprise") == f"{-np.log(chances[ids[CHOSEN]]):.3g} nats"
    guesses = rows(page, ".expected")
    best = chances.argsort()[::-1][:5]
    assert [label for label, _ in guesses[:5]] == [LETTERS.label(int(n)) for n in best]
    assert np.allclose([share for _, share in guesses[:5]], 100 * chances[best], atol=0.51)
    came = page.locator(".expected li", has_text="what came")
    assert came.locator(".chip").inner_text() == run["labels"][CHOSEN]
    page.locator("#layer").fill("0")
    assert "Nothing has pulled yet" in page.inner_text(".details")

    # no line under the text before a colour is chosen
    width = "getComputedStyle(document.querySelector('.token')).borderBottomWidth"
    assert page.evaluate(width) == "0px"
    page.select_option("#colour", "surprise")
    assert page.evaluate(width) == "2px"
    light = page.eval_on_selector_all(
        ".token", "all => all.map(s => s.style.getPropertyValue('--own'))"
    )
    light = [sum(map(int, re.findall(r"\d+", colour))) for colour in light[1:]]
    assert np.argmin(light) == np.argmax(run["loss"][1:])  # the darkest on a light page
    with capsys.disabled():
        print(f"\na selection takes {page.evaluate(MS_PER_SELECTION):.1f} ms on the map")


def test_address_search_and_keys(open_map):
    """By keyboard alone, in the dark."""
    make_checkpoint("x.pt")
    address = "#view=map&token=17&layer=1&head=2&colour=mass&split=axes&fit=layer&trails=off"
    dark = dict(color_scheme="dark")
    page, _ = open_map("--text", LINES, address=address, **dark)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    first = shown(page)
    assert {**first, "camera": ""} == {**dict(re.findall(r"(\w+)=(\w+)", address)), "camera": ""}
    assert selected(page) == [17] and page.input_value("#head") == "1"
    assert page.input_value("#layer") == "1" and page.input_value("#colour") == "mass"
    assert not page.is_checked("#trails") and page.input_value("#fit") == "fit"

    # whatever an address says wrong is left out, the rest holds
    wrong = "#view=__proto__&token=99999&layer=-1&head=3&colour=<b>&token2=%FF&fit=&layer=1&="
    page.evaluate("(hash) => { location.hash = hash; }", wrong)
    assert shown(page) == {**first, "camera": shown(page).get("camera")}
    page.evaluate("location.hash = '#token=3&view=heads'")
    page.wait_for_selector("#tab-heads[aria-selected=true]")
    assert selected(page) == [17] or selected(page) == [3]

    # tabs: with arrows, and with numbers from anywhere
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "tab-heads"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("tab", selected=True).inner_text() == "Next token"
    page.keyboard.press("2")
    assert shown(page)["view"] == "map" and selected(page) == [3]

    # tokens and layers by arrows, in the text
    page.locator(".text").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    assert selected(page) == [4] and shown(page)["layer"] == "2"
    active = page.get_by_role("listbox").get_attribute("aria-activedescendant")
    assert page.locator(f"#{active}").get_attribute("data-token") == "4"
    page.keyboard.press("End")
    assert selected(page) == [len(LINES) - 1]
    page.keyboard.press("Home")
    # the same token: the next place and the one before, around the end
    places = [n for n, letter in enumerate(LINES) if letter == "t"]
    page.keyboard.press("n")
    assert selected(page) == [places[1]] and places[0] == 0
    page.keyboard.press("p")
    page.keyboard.press("p")
    assert selected(page) == [places[-1]]

    # a word of several tokens is found, without regard to case, and no key acts while one types
    page.keyboard.press("/")
    page.keyboard.type("THE")
    assert page.inner_text("#found") == "2 found" and selected(page) == [places[-1]]
    found = []
    for key in ("Enter", "Enter", "Shift+Enter"):
        page.keyboard.press(key)
        found.append((selected(page), page.inner_text("#found")))
    here = [LINES.rindex("the")]
    assert found == [(here, "2 of 2"), ([0], "1 of 2"), (here, "2 of 2")]
    page.keyboard.type("n?1/")
    assert page.inner_text("#found") == "none" and selected(page) == here
    page.keyboard.press("Escape")
    assert page.input_value("#search") == "" and not in_the_text(page, "found")
    page.keyboard.press("?")
    assert page.is_visible("#keys") and "the same token" in page.inner_text("#keys")
    page.keyboard.press("3")
    assert shown(page)["view"] == "map"
    page.keyboard.press("Escape")
    assert page.is_hidden("#keys")

    # play by layers until the last
    page.locator("#layer").fill("1")
    page.locator(".text").focus()
    page.keyboard.press("Space")
    page.get_by_role("button", name="Pause").wait_for()
    page.get_by_role("button", name="Play").wait_for()
    assert shown(page)["layer"] == "2"

    # a copied link opens the same page
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(); }")
    page.click("#copy")  # in a browser that closes the clipboard to a page, the older way serves
    page.get_by_text("Copied").wait_for()
    link = page.evaluate("navigator.clipboard.readText()")
    assert link == page.url and "token=" in link
    again, _ = open_map(address="#" + link.split("#")[1], **dark)
    assert shown(again) == shown(page) and selected(again) == here


def downloaded(page, entry):
    page.click("#download summary")
    with page.expect_download() as waiting:
        page.click(f"#download button:has-text('{entry}')")
    return waiting.value.path().read_bytes()


def test_downloads(open_map):
    model = make_checkpoint("x.pt")
    page, (run,) = open_map("--text", LINES, address="#view=orbit&token=30&layer=2&head=2")
    weights = pull_weights(model, torch.tensor([run["tokens"]])).double().numpy()[:, :, 30, :31]
    (data,) = json.loads(downloaded(page, "JSON"))
    assert data["tokens"] == run["tokens"] and data["losses"] == run["loss"]
    assert data["masses"] == run["mass"] and data["labels"] == run["labels"]
    chosen = data["selected"]
    assert chosen["position"] == 30 and len(chosen["expected"]) == 5
    assert [(h["layer"], h["head"]) for h in chosen["heads"]] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    shares = [head["shares"] for head in chosen["heads"]]
    assert np.allclose(shares, weights.reshape(4, -1), atol=2e-4)

    table = list(csv.DictReader(io.StringIO(downloaded(page, "CSV").decode())))
    assert [row["token"] for row in table] == run["labels"]
    assert [float(row["mass"]) for row in table] == pytest.approx(run["mass"])
    assert table[0]["loss"] == "" and float(table[9]["loss"]) == pytest.approx(run["loss"][9])
    assert np.allclose([float(row["share"]) for row in table[:31]], weights[1, 1], atol=2e-4)
    assert np.allclose(
        [float(row["distance"]) for row in table[:31]], chosen["heads"][3]["distances"]
    )
    assert {row["share"] for row in table[31:]} == {""}

    picture = downloaded(page, "SVG").decode()
    svg = ElementTree.fromstring(picture)
    assert svg.tag.endswith("}svg") and run["labels"][30] in "".join(svg.itertext())
    fills = [e.get("style") for e in svg.iter() if e.tag.endswith("}circle")]
    assert fills and all("fill:" in style for style in fills)
    assert downloaded(page, "PNG").startswith(b"\x89PNG")
    page.click("#tab-map")
    png = downloaded(page, "PNG")
    assert png.startswith(b"\x89PNG") and len(png) > 3000


def test_whole_characters_of_a_byte_level_vocabulary(open_map):
    """Korean at a small vocabulary reads as it was written; a part is named by the whole."""
    text = "옛날 옛적에, 옛날"
    bpe = BPETokenizer.train(["plain English\n"] * 3, 256)
    make_checkpoint("x.pt", bpe)
    page, _ = open_map("--text", text)
    ids = bpe.encode(text)
    assert page.text_content(".text") == text and len(ids) == 24
    assert page.locator(".token").count() == 24 and page.locator(".token.part").count() == 14
    page.locator(".token").nth(1).click()
    assert page.inner_text(".title .chip") == "옛(2/3)"
    assert page.locator(".token").nth(1).get_attribute("aria-label") == "옛(2/3)"
    assert page.locator(".token").nth(1).bounding_box()["width"] > 2  # there is a dot to point at
    # the same token is the same byte, in whatever character
    twins = [n for n, token in enumerate(ids) if token == ids[1] and n != 1]
    assert in_the_text(page, "twin") <= set(twins) and len(in_the_text(page, "twin")) > 1
    shown = page.inner_text(".details").split("Expected")[0]
    assert "\\x" not in shown + page.inner_text(".spoken") + page.inner_text(".text")


def test_where_a_page_opens(open_map):
    """At the strongest pull by a word more than one back; --layer and the address win."""
    bpe = BPETokenizer.train([TEXT] * 5, 280)
    model = make_checkpoint("x.pt", bpe, num_layers=3, num_heads=2, hidden_dim=24)
    page, (run,) = open_map("--text", TEXT)
    (token,) = selected(page)
    weights = pull_weights(model, torch.tensor([run["tokens"]]))[:, :, token]
    weights *= torch.tensor([any(map(str.isalnum, text)) for text in run["texts"]])

    def strongest(end):
        return np.unravel_index(int(weights[..., :end].amax(-1).argmax()), weights.shape[:2])

    layer, head = strongest(token - 1)
    assert page.input_value("#layer") == str(layer + 1)
    assert page.input_value("#head") == str(head)
    assert (layer, head) not in (strongest(token), strongest(token + 1))
    page, _ = open_map("--text", TEXT, "--layer", "1")
    assert page.input_value("#layer") == "1" and page.input_value("#head") == "mean"
    page, _ = open_map("--text", TEXT, "--layer", "1", address="#layer=2&head=1")
    assert page.input_value("#layer") == "2" and page.input_value("#head") == "0"
    # inside another page, as the notebook shows it, there is no address to write
    given = html.escape(Path("map.html").read_text(encoding="utf-8"))
    Path("frame.html").write_text(f'<iframe srcdoc="{given}"></iframe>', encoding="utf-8")
    page.goto(f"file://{Path.cwd()}/frame.html")
    page.frames[1].wait_for_selector("body[data-ready]", state="attached")
    page.frames[1].evaluate("document.getElementById('tab-heads').click()")
    page.wait_for_timeout(250)


@pytest.mark.parametrize("background", [1e-5, 1e7])
def test_a_background_shows_how_quiet_a_token_is(open_map, background):
    """Beside the pulls; also if all pulls are too weak to show."""
    model = make_checkpoint_with_background("x.pt", background)
    page, (run,) = open_map("--text", TEXT, address="#view=map&token=30&layer=2&head=mean")
    quiet = 1 - float(pull_weights(model, torch.tensor([run["tokens"]]))[1, :, 30].sum(-1).mean())
    found = re.search(r"Quiet ([\d.]+) %", page.inner_text(".details"))
    assert float(found[1]) == pytest.approx(100 * quiet, abs=0.51)
    shares = rows(page, ".pulls:not(.expected)")
    if background < 1:
        rest = re.search(r"All others together: ([\d.]+) %", page.inner_text(".details"))
        whole = sum(share for _, share in shares) + float(rest[1]) + float(found[1])
        assert whole == pytest.approx(100, abs=4)
    else:
        assert float(found[1]) == 100 and not shares
    words = page.inner_text(".details") + page.inner_text(".spoken")
    assert "Nothing reaches" not in words and "NaN" not in words and "no others" not in words
    assert f"quiet {found[1]} %" in page.inner_text(".spoken")


def test_on_a_phone(open_map):
    make_checkpoint("x.pt")
    page, _ = open_map("--text", LINES * 6, width=390, height=844, has_touch=True, is_mobile=True)
    picture, sheet = (page.locator(name).bounding_box() for name in (".sky", "#sheet"))
    assert picture["y"] + picture["height"] <= sheet["y"] and page.is_hidden("#controls")
    assert sheet["y"] + sheet["height"] == pytest.approx(844, abs=1)
    assert page.is_visible(".title .chip") and fact(page, "surprise")
    # a selection opens the sheet, which leaves the middle of the picture free, and can be closed
    page.locator(".token").nth(5).tap()
    assert selected(page) == [5]
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(100)
    opened = page.locator("#sheet").bounding_box()
    assert opened["height"] > 2 * sheet["height"]
    assert opened["y"] > picture["y"] + picture["height"] / 2
    page.get_by_role("button", name="Close", exact=True).tap()
    assert page.locator("#sheet").bounding_box()["height"] == sheet["height"]
    page.tap("#more")
    assert page.is_visible("#layer") and page.get_attribute("#more", "aria-expanded") == "true"
    page.tap("#more")
    # the whole text can be reached: the page scrolls and the sheet stays below its end
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    page.wait_for_timeout(100)
    last = page.locator(".token").last.bounding_box()
    assert last["y"] + last["height"] < page.locator("#sheet").bounding_box()["y"]
    for tab in page.get_by_role("tab").all():
        tab.tap()
        assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_bad_input(open_map, browser, in_tmp):
    """Labels that look like HTML, formulas or run from right to left, one token, no JavaScript."""
    script = "<script>document.title='pwned'</script>"
    image = "</script><img src=x onerror=alert(1)>"
    labels = [script, image, "<b>bold</b>", "&lt;i&gt;", "\u2028", "=1+1", "שלום", "b", "${a}`"]
    tokenizer = CharTokenizer(labels)
    make_checkpoint("x.pt", tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CharTokenizer, "encode", lambda self, text: [int(digit) for digit in text])
        page, _ = open_map("--text", "0123456780123456" * 2, width=380, has_touch=True)
    title = page.title()
    for tab in page.get_by_role("tab").all():
        tab.click()
        assert page.evaluate("document.documentElement.scrollWidth") == 380
    for token in range(9):
        page.evaluate("(n) => document.querySelectorAll('.token')[n].click()", token)
        page.evaluate("document.querySelectorAll('.details details').forEach(d => d.open = true)")
        page.wait_for_timeout(20)
    page.locator("#tab-map").click()
    assert page.inner_text(".title .chip") == tokenizer.label(8)
    assert page.evaluate("document.querySelectorAll('main img, main script, main b b').length") == 0
    assert page.title() == title
    table = list(csv.DictReader(io.StringIO(downloaded(page, "CSV").decode())))
    names = [row["token"] for row in table[:9]]
    assert names[5] == "'=1+1"  # a spreadsheet would take it for a formula
    assert names[:5] + names[6:] == [tokenizer.label(n) for n in (0, 1, 2, 3, 4, 6, 7, 8)]

    make_checkpoint("x.pt")
    page, _ = open_map("--text", "a")
    assert selected(page) == [0] and "nothing was expected" in page.inner_text(".details")
    for tab in page.get_by_role("tab").all():
        tab.click()
        assert len(page.inner_text("#panel")) > 20 and "NaN" not in page.inner_text("#panel")
    for key in ("n", "p", "ArrowRight", "Space", "Space"):
        page.keyboard.press(key)
    assert selected(page) == [0]

    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"file://{in_tmp}/map.html")
    words = "This page needs JavaScript, which is switched off here."
    assert page.inner_text("body").strip() == words
    context.close()


def test_two_runs_side_by_side(open_map):
    """Gravity beside attention: one slider moves both, a selection goes by the word in the text."""
    make_checkpoint("x.pt")
    bpe = BPETokenizer.train([TEXT] * 5, 280)
    make_checkpoint("y.pt", bpe, num_layers=3, model_type="vanilla", block_size=512)
    page, (one, two) = open_map(
        "--text", TEXT, "--compare", "y.pt", address="#view=map&layer=3&head=mean"
    )
    assert page.locator(".stage").count() == 2 and page.input_value("#layer") == "3"
    page.locator(".words").nth(1).locator(".token").nth(6).click()
    first, second = selected(page)
    word = two["texts"][6]
    assert (
        word[0] == "␣"
        and second == 6
        and "".join(one["texts"][first : first + len(word) - 1]) == word[1:]
    )
    assert one["starts"][first] == two["starts"][6] + 1
    assert page.evaluate("document.documentElement.scrollHeight <= innerHeight")
    details = [box.bounding_box() for box in page.locator(".details").all()]
    stages = [box.bounding_box() for box in page.locator(".stage").all()]
    for box, stage in zip(details, stages, strict=True):
        assert stage["x"] < box["x"] < box["x"] + box["width"] <= stage["x"] + stage["width"] + 1
        assert box["y"] >= stage["y"] + stage["height"] and box["y"] + box["height"] <= 800
    # lines break between words only
    shown = page.locator(".words .text").nth(1)
    assert shown.text_content() == "".join(two["texts"]).replace("␣", " ").replace("⏎", "\n")
    lines = page.locator(".words").nth(1).locator(".token").evaluate_all(LINES_OF_TOKENS)
    for (text, first, _), (before, _, last) in zip(lines[1:], lines, strict=False):
        assert first == last or text.startswith(" ") or before.endswith(" ")
    assert len({last for _, _, last in lines}) > 1
    assert "Pulled in" in page.locator(".details").nth(0).inner_text()
    assert "Attention in" in page.locator(".details").nth(1).inner_text()
    page.click("#tab-orbit")
    assert downloaded(page, "PNG").startswith(b"\x89PNG")  # of the one that has a picture
    page.click("#tab-heads")
    assert page.locator(".stage:visible").count() == 2
