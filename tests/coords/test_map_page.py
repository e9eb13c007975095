"""The map in a real browser: with a mouse, on a touch screen, and with the keyboard alone."""

import io
import re

import matplotlib.image
import numpy as np
import pytest

import visualize_coords
from conftest import BROWSER
from map_contents import TEXT, data_of, unpacked
from small_models import LETTERS, make_checkpoint, make_checkpoint_with_background
from text.tokenizer import BPETokenizer, CharTokenizer

sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright here")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium here")
FLAGS = ["--no-sandbox", "--disable-background-networking", "--enable-unsafe-swiftshader"]
PLOT = "document.querySelector('.scene')"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_map(browser, in_tmp):
    """A function that writes a map and opens it. The page may cause no errors or requests."""
    wrong, contexts = [], []

    def open_map(*flags, width=1280, height=860, **context):
        flags = ("--checkpoint-path", "x.pt", "--output", "map.html", *flags)
        visualize_coords.main([str(flag) for flag in flags])
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **context))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda line: line.type == "error" and wrong.append(line.text))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.on(
            "request",
            lambda request: request.url.startswith(("http", "ws")) and wrong.append(request.url),
        )
        page.goto(f"file://{in_tmp}/map.html")
        page.wait_for_selector("body[data-ready]", state="attached", timeout=60000)
        return page, data_of(in_tmp / "map.html")

    yield open_map
    for context in contexts:
        context.close()
    assert not wrong


def settle(page):
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => setTimeout(done, 100)))")


def drawn(page, trace=1):
    """The points (T, 3) of a trace of the first map."""
    return np.array(page.evaluate(f"() => ['x', 'y', 'z'].map(a => {PLOT}.data[{trace}][a])")).T


def on_screen(page, points):
    """Pixels and depth of points, from the matrices with which the picture was drawn."""
    found = page.evaluate(
        f"""() => {{
        const scene = {PLOT}._fullLayout.scene._scene, box = {PLOT}.getBoundingClientRect();
        const {{model, view, projection}} = scene.glplot.cameraParams;
        return [model, view, projection].map(m => [...m])
            .concat([scene.dataScale, [box.left, box.top, box.width, box.height]]); }}"""
    )
    model, view, projection = (np.array(matrix).reshape(4, 4).T for matrix in found[:3])
    points = np.concatenate([points * np.array(found[3]), np.ones((len(points), 1))], 1)
    x, y, z, w = projection @ view @ model @ points.T
    left, top, width, height = found[4]
    across, down = left + (x / w + 1) / 2 * width, top + (1 - y / w) / 2 * height
    return np.stack([across, down, z / w], 1)


def pixel(page, x, y):
    picture = matplotlib.image.imread(io.BytesIO(page.screenshot()))
    return picture[round(y), round(x), :3] * 255


def strongest(run, layer, head, token):
    """[(source, weight)] of every source in the page's data."""
    shape = (run["numLayers"], run["numHeads"] + 1, len(run["labels"]), run["numStored"])
    sources = unpacked(run["sources"], "<u2").reshape(shape)[layer - 1, head, token]
    weights = unpacked(run["weights"], "<u2").reshape(shape)[layer - 1, head, token] / 65535
    return [(int(s), w) for s, w in zip(sources, weights, strict=True) if w > 0]


def bars(page):
    """[(back, percent)] of the details panel."""
    rows = page.locator(".pulls li").all_inner_texts()
    found = []
    for row in rows:
        percent = float(re.search(r"([\d.]+) %", row)[1])
        found.append((int(re.search(r"(\d+) back", row)[1]) if "back" in row else 0, percent))
    return found


def selected(page):
    return page.locator('.token[aria-selected="true"]').get_attribute("data-token")


def test_select_slide_play_and_colour(open_map):
    make_checkpoint("x.pt")
    page, (run,) = open_map("--text", TEXT)
    points = np.array(run["points"])
    assert np.allclose(drawn(page), points[2]) and "Layer 2 of 2" in page.inner_text("#layer-name")

    # a token is clicked in the picture, where its colour is seen
    settle(page)
    places = on_screen(page, points[2])
    front = int(places[:, 2].argmin())
    x, y, _ = places[front]
    colour = page.evaluate(f"() => {PLOT}.data[1].marker.color[{front}]")
    seen, expected = pixel(page, x, y), np.array(re.findall(r"\d+", colour), float)
    assert np.abs(seen - expected).max() < 12
    page.mouse.move(x + 1, y)
    page.wait_for_selector(".tooltip:not([hidden])")
    told = page.inner_text(".tooltip")
    assert run["labels"][front] in told and f"position {front} " in told
    assert f"mass {run['mass'][front]:.3g}"[:9] in told
    assert all(f"{run['labels'][s]} " in told for s, _ in strongest(run, 2, 2, front)[:3])
    page.mouse.click(x + 1, y)
    assert selected(page) == str(front)

    # a token is clicked in the text: panel, pull lines and rings follow
    page.locator(".token").nth(30).click()
    assert selected(page) == "30"
    pulls = strongest(run, 2, 2, 30)
    shown = bars(page)
    assert [back for back, _ in shown] == [30 - source for source, _ in pulls]
    assert np.allclose([p for _, p in shown], [100 * w for _, w in pulls], atol=0.51)
    assert {
        int(t) for t in page.eval_on_selector_all(".source", "all => all.map(s => s.dataset.token)")
    } == {source for source, _ in pulls}
    for n, (source, _) in enumerate(pulls):
        if source != 30:
            assert np.allclose(drawn(page, 6 + n), points[2][[30, source]])
    widths = page.evaluate(f"() => {PLOT}.data.slice(6).map(t => t.line.width)")
    kept = [w for w, (source, _) in zip(widths, pulls, strict=False) if source != 30]
    assert kept == sorted(kept, reverse=True) and kept[0] > kept[-1]
    twins = [n for n, label in enumerate(run["labels"]) if label == run["labels"][30] and n != 30]
    assert page.locator(".token.twin").count() == len(twins) > 0
    z = unpacked(run["z"], "<i2").reshape(3, len(TEXT), -1) * run["zScale"]
    far = sorted(np.linalg.norm(z[2][30] - z[2][twin]) for twin in twins)
    told = page.locator(".twins b").all_inner_texts()
    assert np.allclose([float(t) for t in told[: len(far)]], far[: len(told)], rtol=0.01)

    # another head, another layer, layer 0
    page.select_option("#head", "1")
    assert [back for back, _ in bars(page)] == [30 - s for s, _ in strongest(run, 2, 1, 30)]
    page.locator("#layer").focus()
    page.keyboard.press("ArrowLeft")
    assert np.allclose(drawn(page), points[1])
    assert [back for back, _ in bars(page)] == [30 - s for s, _ in strongest(run, 1, 1, 30)]
    page.keyboard.press("Home")
    assert np.allclose(drawn(page), points[0]) and "Nothing has pulled yet" in page.inner_text(
        ".details"
    )

    # colours
    before = page.evaluate(f"() => {PLOT}.data[1].marker.color")
    page.select_option("#colour", "loss")
    after = page.evaluate(f"() => {PLOT}.data[1].marker.color")
    assert before != after and "loss" in page.inner_text(".legend")
    light = [sum(map(int, re.findall(r"\d+", c))) for c in after[1:]]
    assert np.argmax(light) == np.argmax(run["loss"][1:])

    # play goes through every layer and stops at the last
    page.click("#play")
    page.get_by_text("Layer 1 of 2").wait_for()
    page.get_by_role("button", name="Play").wait_for()
    assert np.allclose(drawn(page), points[2]) and page.input_value("#layer") == "2"
    trails = drawn(page, 0).reshape(len(TEXT), 4, 3)
    assert np.allclose(trails[:, :3].astype(float).transpose(1, 0, 2), points)


def test_whole_characters_of_a_byte_level_vocabulary(open_map):
    """Korean at a small vocabulary reads as it was written; a part is named by the whole."""
    text = "옛날 옛적에, 옛날"
    bpe = BPETokenizer.train(["plain English\n"] * 3, 256)
    make_checkpoint("x.pt", bpe)
    page, (run,) = open_map("--text", text)
    ids = bpe.encode(text)
    assert page.text_content(".text") == text.replace(" ", "␣") and len(ids) == 24
    assert page.locator(".token").count() == 24 and page.locator(".token.part").count() == 14
    page.locator(".token").nth(1).click()
    assert page.inner_text(".title .chip") == "옛(2/3)"
    assert page.locator(".token").nth(1).get_attribute("aria-label") == "옛(2/3)"
    assert page.locator(".token").nth(1).bounding_box()["width"] > 2  # there is a dot to point at
    # the same token is the same byte, in whatever character
    twins = [n for n, token in enumerate(ids) if token == ids[1] and n != 1]
    assert page.locator(".token.twin").count() == len(twins) > 1
    pulled = page.locator(".pulls .chip").all_inner_texts()
    assert pulled == [run["labels"][source] for source, _ in strongest(run, 2, 2, 1)]
    shown = page.inner_text(".details").split("top guesses")[0]
    assert "\\x" not in shown + page.inner_text(".spoken") + page.inner_text(".text")


def test_heads_and_masses(open_map):
    model = make_checkpoint("x.pt", num_heads=3, hidden_dim=24)
    page, (run,) = open_map("--text", TEXT)
    page.click("#tab-heads")
    page.wait_for_selector("#panel-heads .chart .main-svg")
    best = max(run["heads"], key=lambda row: row["one_back"])
    answers = page.inner_text(".answers")
    assert f"one token back: layer {best['layer']} head {best['head'] + 1}" in answers
    window = max(row["window"] for row in run["heads"])
    assert re.search(rf"window ends {window:,.0f}" if window >= 100 else "window ends", answers)
    page.get_by_role("button", name="window").click()
    shown = page.locator("tbody tr th button").all_inner_texts()[:6]
    order = sorted(run["heads"], key=lambda row: -row["window"])
    assert shown == [f"layer {row['layer']} · head {row['head'] + 1}" for row in order]
    curves = page.evaluate("() => document.querySelector('.chart').data.map(t => [...t.y])")
    assert np.allclose(curves, run["field"]["of"][0])
    page.get_by_role("button", name="layer 1 · head 3").click()
    assert page.input_value("#head") == "2" and page.input_value("#layer") == "1"
    assert page.is_visible("#panel-map")
    page.click("#tab-vocabulary")
    page.wait_for_selector("#panel-vocabulary .chart .main-svg")
    masses = model.mass_emb.weight[:, 0].exp().log1p().detach().numpy()
    heaviest = [LETTERS.label(int(token)) for token in (-masses).argsort()[:12]]
    table = page.locator("table", has_text="Heaviest")
    assert table.locator("tbody th").all_inner_texts()[:12] == heaviest
    assert float(table.locator("tbody td").first.inner_text()) == pytest.approx(
        masses.max(), rel=1e-3
    )
    assert "tokens shown" in page.inner_text(".vocabulary")


@pytest.mark.parametrize("background", [1e-5, 1e7])
def test_a_background_shows_how_quiet_a_token_is(open_map, background):
    """Beside the pulls, in the tooltip and in the table; also if all pulls are too weak to show."""
    make_checkpoint_with_background("x.pt", background)
    page, (run,) = open_map("--text", TEXT)
    page.locator(".token").nth(30).click()
    quiet = unpacked(run["quiet"], "<u2").reshape(2, 3, -1)[1, 2] / 65535
    found = re.search(r"Quiet ([\d.]+) %", page.inner_text(".details"))
    assert float(found[1]) == pytest.approx(100 * quiet[30], abs=0.51)
    if background < 1:
        rest = re.search(r"All others together: ([\d.]+) %", page.inner_text(".details"))
        shown = sum(percent for _, percent in bars(page))
        assert shown + float(rest[1]) + float(found[1]) == pytest.approx(100, abs=4)
    else:
        assert float(found[1]) == 100 and page.locator(".pulls li").count() == 0
    words = page.inner_text(".details") + page.inner_text(".spoken")
    assert "Nothing reaches" not in words and "NaN" not in words and "no others" not in words
    assert f"quiet {found[1]} %" in page.inner_text(".spoken")
    settle(page)
    places = on_screen(page, np.array(run["points"])[2])
    front = int(places[:, 2].argmin())
    page.mouse.move(places[front][0] + 1, places[front][1])
    page.wait_for_selector(".tooltip:not([hidden])")
    told = page.inner_text(".tooltip")
    assert "quiet" in told and "nothing has pulled" not in told
    assert ("pulled by" in told) == (background < 1)
    page.click("#tab-heads")
    page.wait_for_selector("#panel-heads .chart .main-svg")
    titles = page.locator("thead button").all_inner_texts()
    row = page.locator("#panel-heads tbody tr").first.locator("th, td").all_inner_texts()
    row = dict(zip(titles, row, strict=False))
    assert float(row["background"].replace(",", "")) == pytest.approx(background, rel=0.01)
    told = 100 * run["heads"][0]["quiet"]
    assert float(row["quiet"].rstrip(" %")) == pytest.approx(told, abs=0.51)
    assert "window ends" in page.inner_text(".answers")


def test_by_keyboard_alone_and_in_the_dark(open_map):
    make_checkpoint("x.pt")
    page, (run,) = open_map("--text", TEXT, color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "tab-map"
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("tab", selected=True).inner_text() == "Heads"
    assert page.is_visible("#panel-heads") and page.is_hidden("#panel-map")
    page.keyboard.press("Home")
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.className").startswith("scene"):
            break
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert selected(page) == "1"
    page.keyboard.press("ArrowDown")
    assert page.input_value("#layer") == "1"
    eye = f"() => Object.values({PLOT}._fullLayout.scene._scene.getCamera().eye)"
    before = page.evaluate(eye)
    page.keyboard.press("Shift+ArrowRight")
    assert not np.allclose(page.evaluate(eye), before)
    page.keyboard.press("Tab")
    page.keyboard.press("End")
    assert selected(page) == str(len(TEXT) - 1)
    listbox = page.get_by_role("listbox")
    active = listbox.get_attribute("aria-activedescendant")
    assert page.locator(f"#{active}").get_attribute("data-token") == str(len(TEXT) - 1)
    page.keyboard.press("Escape")
    assert page.locator('[aria-selected="true"].token').count() == 0
    page.locator(".ranked button").first.focus()
    page.keyboard.press("Enter")
    heaviest = int(np.argmax(run["mass"]))
    chosen = int(selected(page))
    assert run["labels"][chosen] == run["labels"][heaviest]
    page.keyboard.press("ArrowRight")
    assert selected(page) == str(chosen + 1)


def test_on_a_phone_with_tokens_that_look_like_html(open_map):
    """380 px wide, on a touch screen, with malicious labels wherever a label is shown."""
    script = "<script>document.title='pwned'</script>"
    image = "</script><img src=x onerror=alert(1)>"
    labels = [script, image, "<b>bold</b>", "&lt;i&gt;", "\u2028", "$x_1$", "a", "b", "${a}`"]
    tokenizer = CharTokenizer(labels)
    tokenizer.encode = lambda text: [int(digit) for digit in text]
    make_checkpoint("x.pt", tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CharTokenizer, "encode", lambda self, text: [int(digit) for digit in text])
        page, (run,) = open_map(
            "--text", "01234567801234567", width=380, height=760, has_touch=True
        )
    title = page.title()
    for tab in ("heads", "vocabulary", "map"):
        page.tap(f"#tab-{tab}")
        settle(page)
        assert page.evaluate("document.documentElement.scrollWidth") == 380, tab
    page.locator(".scene").scroll_into_view_if_needed()
    settle(page)
    places = on_screen(page, np.array(run["points"][2]))
    x, y, _ = places[places[:, 2].argmin()]
    page.touchscreen.tap(x, y)
    assert selected(page) == str(places[:, 2].argmin())
    page.locator(".token").nth(9).tap()
    assert page.inner_text(".title .chip") == script
    page.locator(".token").nth(10).tap()
    assert page.inner_text(".title .chip") == tokenizer.label(1)
    assert page.evaluate("document.querySelectorAll('main img, main script').length") == 0
    texts = page.evaluate(f"() => {PLOT}.data.flatMap(t => t.text ?? [])")
    # Plotly's 3-D text reads tags: none is left whole but our own
    assert texts and not any(re.search(r"<(?!/?b>$|b>|/b><br>|br>|\u200b)", t) for t in texts)
    assert any("\u200bscript>" in text for text in texts)
    assert page.title() == title


def test_two_runs_side_by_side(open_map):
    """One slider moves both, and a selection goes by the place in the text."""
    make_checkpoint("x.pt")
    bpe = BPETokenizer.train([TEXT] * 5, 280)
    make_checkpoint("y.pt", bpe, num_layers=3, law="published", block_size=512)
    page, (one, two) = open_map("--text", TEXT, "--compare", "y.pt")
    assert page.locator(".scene").count() == 2 and page.input_value("#layer") == "3"
    second = page.locator(".view").nth(1)
    second.locator(".token").nth(5).click()
    first = page.locator(".view").nth(0)
    token = int(first.locator('.token[aria-selected="true"]').get_attribute("data-token"))
    assert one["starts"][token] == two["starts"][5] > 5
    assert second.locator('.token[aria-selected="true"]').get_attribute("data-token") == "5"
    page.click("#tab-heads")
    assert page.locator(".heads").count() == 2
    assert "do not depend on time" in page.locator(".heads").nth(1).inner_text()
