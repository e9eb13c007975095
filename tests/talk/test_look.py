"""The live page: its requests by HTTP, valid and hostile, and a real browser."""

import contextlib
import copy
import threading
from pathlib import Path

import pytest
import torch

from asker import Asker
from coords import live
from engine.checkpoint import load_model
from map_browser import wait_until
from small_models import LETTERS, make_checkpoint, make_checkpoint_with_background
from system.safe_text import printable
from talk.conversation import Conversation
from talk.look import ADDED_TOKENS, Look
from talk.server import KEPT_TOKENS, ChatServer, Job
from talk.settings import SETTINGS
from talk.suggestions import suggestions
from text.tokenizer import BPETokenizer
from token_folders import prepare

CHANCE = dict.fromkeys(SETTINGS) | {"temperature": 1.0, "max_new_tokens": 20, "seed": 5}
TEXT = "the king said: hello"
OFF = {"kind": "off", "layer": 2, "head": 1}
CUT = {"kind": "cut", "layer": 1, "head": None, "token": 9, "source": 9}
MASS = {"kind": "mass", "token": 3, "factor": 20}
MOVE = {"kind": "move", "token": 9, "toward": 1, "share": 1}


@contextlib.contextmanager
def served(make=make_checkpoint, **config):
    """A chat's server in threads of this process: `(asker, server)`."""
    make("x.pt", **config)
    model, tokenizer, checkpoint = load_model("x.pt", "cpu")
    conversation = Conversation(model, tokenizer, dict(CHANCE), KEPT_TOKENS)
    look = Look(conversation, checkpoint, "x.pt", live)

    def leave(_):
        raise KeyboardInterrupt

    def work():
        with contextlib.suppress(KeyboardInterrupt):
            server.work()

    with ChatServer("127.0.0.1", 0, conversation, "", look) as server:
        threads = [threading.Thread(target=f) for f in (server.serve_forever, work)]
        for thread in threads:
            thread.start()
        try:
            yield Asker(server.server_address[1]), server
        finally:
            server.stop()
            server.jobs.put(Job(leave))
            server.shutdown()
            for thread in threads:
                thread.join(timeout=30)


def chances_of(model, tokens):
    with torch.no_grad():
        return torch.softmax(model(torch.tensor([tokens]))[0].double(), -1)


def labelled(rows, place):
    return {row[0]: row[place] for row in rows}


def test_answers_are_the_models_and_change_nothing(in_tmp):
    """Losses, what-ifs and branches are those of a copy of the model; afterwards the conversation
    goes on as if nobody had asked."""
    with served(make_checkpoint_with_background) as (asker, server):
        model = server.conversation.stream.model
        weights = copy.deepcopy(model.state_dict())
        asker.talk("send", "hello")
        before = asker.get("/state")
        answer = asker.json("/look", {"text": TEXT})
        (run,) = answer["runs"]
        tokens = LETTERS.encode(TEXT)
        chances = chances_of(model, tokens)
        losses = [-float(chances[n, token].log()) for n, token in enumerate(tokens[1:])]
        assert run["tokens"] == tokens and run["kind"] == "newton" and run["off"]
        assert answer["text"] == TEXT and answer["note"] == "" and answer["layer"] is None
        assert run["loss"][1:] == pytest.approx(losses, abs=2e-4)

        # a head is off if the output map does not read it
        at = 11
        told = asker.json("/look/what-if", {"tokens": tokens, "changes": [OFF], "at": at})
        other = copy.deepcopy(model)
        other.layers[1].attn.out_proj.weight.data[:, 8:] = 0
        after = chances_of(other, tokens)
        following = tokens[at + 1]
        expected = [-float(x[at, following].log()) for x in (chances, after)]
        assert told["loss"] == pytest.approx(expected, rel=1e-4)
        likeliest = torch.maximum(chances[at], after[at]).topk(10).indices.tolist()
        labels = [printable(LETTERS.label(token)) for token in likeliest]
        assert [row[0] for row in told["rows"]] == labels
        for label, token in zip(labels, likeliest, strict=True):
            assert labelled(told["rows"], 1)[label] == pytest.approx(float(chances[at, token]))
            assert labelled(told["rows"], 2)[label] == pytest.approx(float(after[at, token]))
        for change in (CUT, MASS, MOVE, OFF):
            told = asker.json("/look/what-if", {"tokens": tokens, "changes": [change], "at": 9})
            assert any(abs(x - y) > 1e-4 for _, x, y in told["rows"])
        told = asker.json("/look/what-if", {"tokens": tokens, "changes": [OFF], "at": 19})
        assert told["loss"] is None

        # a branch: the text up to a token, another one, and what the model adds to it
        body = {"tokens": tokens, "at": 7, "id": 4}
        branch = asker.json("/look/branch", body)
        grown = branch["runs"][0]["tokens"]
        assert grown[:9] == [*tokens[:8], 4] and len(grown) == 9 + ADDED_TOKENS
        assert branch["token"] == 8 and branch["text"] == LETTERS.decode(grown).replace(
            "\x1b", "\ufffd"
        )
        assert asker.json("/look/branch", body) == branch

        whole = asker.json("/look", {"conversation": True})
        kept = [printable(LETTERS.label(token)) for token in whole["runs"][0]["tokens"]]
        assert kept == [token["label"] for token in before["tokens"]]
        assert asker.get("/state") == before
        assert all(torch.equal(weights[key], x) for key, x in model.state_dict().items())
        asker.talk("more")
        asked = asker.get("/state")["tokens"]
        asker.post("/reset", {})
        asker.talk("send", "hello")
        asker.talk("more")
        assert asker.get("/state")["tokens"] == asked and len(asked) == 45


def test_hostile_questions_are_refused_in_one_line(in_tmp):
    """Whatever is wrong, the server goes on and the model is as it was."""
    with served() as (asker, server):
        tokens = LETTERS.encode(TEXT)

        def what_if(*changes, **others):
            body = {"tokens": tokens, "changes": [*changes], "at": 5} | others
            return "/look/what-if", body

        def branch(**others):
            return "/look/branch", {"tokens": tokens, "at": 5, "id": 1} | others

        strange = [None, True, "1", 1.5, [], {}, -1, 10**400, float("nan"), float("inf")]
        wrong = [("/look", body) for body in ({}, {"text": 7}, {"text": ""}, {"text": "a\x1b[2J"})]
        wrong += [("/look", {"text": None, "conversation": "yes"}), ("/look", {"text": "a\x00"})]
        wrong += [what_if(OFF, **{name: value}) for name in ("tokens", "at") for value in strange]
        wrong += [what_if(OFF, changes=value) for value in (*strange[:8], [OFF] * 9, OFF)]
        wrong += [what_if(change) for change in (*strange, {"kind": ["off"]}, {"kind": "eval"})]
        wrong += [what_if(OFF | {"extra": 1}), what_if({"kind": "off", "layer": 1})]
        for change in (OFF, CUT, MASS, MOVE):
            for field in change.keys() - {"kind"}:
                fine = (None, True) if field == "head" and change is CUT else ()
                bad = [*strange, 10**9]
                if field in ("factor", "share"):
                    bad.remove(1.5)
                    bad += [1e300]
                wrong += [what_if(change | {field: value}) for value in bad if value not in fine]
        wrong += [what_if(CUT | {"source": 10}), what_if(MOVE | {"share": 1.01})]
        wrong += [what_if(OFF, tokens=x) for x in ([1] * 513, [1, 99], [1, True], [[1]], ["a"])]
        wrong += [branch(**{name: value}) for name in ("tokens", "at", "id") for value in strange]
        wrong += [branch(id=LETTERS.vocab_size), branch(at=len(tokens))]
        before = server.conversation.stream.model.state_dict()
        before = {name: weight.clone() for name, weight in before.items()}
        for path, body in wrong:
            status, text = asker.post(path, body)
            assert status == 400, (path, body, text)
            assert text.count("\n") == 1 and text[:-1].isprintable() and len(text) < 300
            assert "Traceback" not in text
        assert asker.post("/look", {"conversation": True}) == (409, "write something first\n")
        for path in ("/look", "/look/what-if", "/look/branch"):
            headers = {"Content-Type": "application/json", "Origin": "http://evil.example"}
            response, connection = asker.ask("POST", path, b"{}", headers)
            assert response.status == 403
            connection.close()
            response, connection = asker.ask("POST", path, b"{}", {"Content-Type": "text/plain"})
            assert response.status == 415
            connection.close()
        for path in ("/look/", "/look/../x.pt", "/look/what-if", "/lookx", "/live.js"):
            response, connection = asker.ask("GET", path)
            assert response.status == 404
            connection.close()
        response, connection = asker.begin_endless()
        for path, body in (("/look", {"text": "a"}), what_if(OFF), branch()):
            status, text = asker.post(path, body)
            assert status == 409 and "being written" in text
        asker.post("/stop", {})
        asker.wait_until_idle()
        response.read()
        connection.close()
        assert asker.post(*what_if(OFF))[0] == 200
        model = server.conversation.stream.model
        assert all(torch.equal(before[key], x) for key, x in model.state_dict().items())
        # a policy that allows no inline script, so none is in the page
        page, connection = asker.ask("GET", "/look")
        text = page.read().decode()
        assert "script-src 'self'" in page.headers["Content-Security-Policy"]
        assert "unsafe" not in text + page.headers["Content-Security-Policy"]
        assert "http-equiv" not in text and "{{" not in text
        assert "<style" not in text.partition("<noscript>")[0]
        assert text.count("<script") == 2 and 'src="/look.js"' in text
        connection.close()


@pytest.mark.parametrize("config", [{"law": "published"}, {"model_type": "vanilla"}])
def test_other_models_and_long_texts(config, in_tmp):
    """Of a text that is longer than the model reads its end is shown, and that is said."""
    with served(**config) as (asker, _):
        answer = asker.json("/look", {"text": TEXT})
        (run,) = answer["runs"]
        tokens = LETTERS.encode(TEXT)[-16:]
        assert run["tokens"] == tokens and run["kind"] == config.get("law", "vanilla")
        assert answer["note"] == "the last 16 of 20 tokens are shown: this model reads no more"
        for change in (MASS, MOVE, OFF, CUT):
            body = {"tokens": tokens, "changes": [change], "at": 12}
            status, text = asker.post("/look/what-if", body)
            is_refused = "law" not in config and change in (MASS, MOVE)
            assert status == (400 if is_refused else 200) and ("no masses" in text) == is_refused
        branch = asker.json("/look/branch", {"tokens": tokens, "at": 15, "id": 3})
        assert len(branch["runs"][0]["tokens"]) == 16
        for text in ("x" * 5000, "한", "\n"):
            answer = asker.json("/look", {"text": text})
            assert ("new to this model" in answer["note"]) == (text == "한")


def test_damaged_weights_are_one_line(in_tmp):
    with served() as (asker, server):
        weight = server.conversation.stream.model.norm.weight.data
        whole = weight.clone()
        weight.fill_(float("nan"))
        tokens = LETTERS.encode(TEXT)
        for path, body in (
            ("/look", {"text": TEXT}),
            ("/look/what-if", {"tokens": tokens, "changes": [OFF], "at": 3}),
            ("/look/branch", {"tokens": tokens, "at": 3, "id": 1}),
        ):
            status, text = asker.post(path, body)
            assert status == 400 and "not finite" in text and text.count("\n") == 1
        weight.copy_(whole)
        assert asker.post("/look", {"text": TEXT})[0] == 200


def test_in_a_browser(browser, in_tmp):
    """From typing to what if, a branch, a link that opens the same, and the chat's "Map this"."""
    wrong = []
    with served(make_checkpoint_with_background) as (asker, server):
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda line: line.type == "error" and wrong.append(line.text))
        page.on(
            "request", lambda request: request.url.startswith(server.url) or wrong.append(request)
        )

        def shown():
            page.wait_for_selector("body:not(.unread) form.live button:enabled")
            wait_until(page, "document.querySelectorAll('#panel .token').length")
            return page.input_value("#sentence")

        page.goto(server.url + "look")
        page.wait_for_selector("#sentence:focus")
        assert not page.is_visible("#controls")
        page.keyboard.press("Control+Enter")
        assert "Write a sentence" in page.inner_text(".live [role=status]")
        page.keyboard.type(TEXT)
        page.keyboard.press("Control+Enter")
        assert shown() == TEXT and page.is_visible("#controls")
        tokens = LETTERS.encode(TEXT)
        assert page.locator("#panel .token").count() == len(tokens)

        # the second head of layer 2 is switched off for the token before the last
        page.locator("#panel .token").nth(18).click()
        page.click("#tab-next")
        page.click(".whatif .switches button >> nth=3")
        page.wait_for_selector(".whatif .chances td")
        body = {"tokens": tokens, "changes": [OFF], "at": 18}
        told = asker.json("/look/what-if", body)
        cells = page.locator(".whatif .chances tbody tr").first.locator("th, td").all_inner_texts()
        label, before, after = max(told["rows"], key=lambda row: max(row[1:]))
        assert cells[0] == label
        for cell, chance in zip(cells[1:], (before, after), strict=True):
            assert float(cell.rstrip(" %")) == pytest.approx(100 * chance, abs=0.51)
        assert "computed now" in page.inner_text(".whatif .result").lower()

        # another token than the one that came, and what the model adds to it
        other = page.locator("#panel button.go:has-text('continue with this')").first
        label = other.locator(".chip").inner_text()
        other.click()
        wait_until(page, "text => document.querySelector('#sentence').value !== text", arg=TEXT)
        grown = shown()
        assert grown.startswith(TEXT[:18]) and len(grown) == 19 + ADDED_TOKENS
        chosen = page.locator("#panel .token[aria-selected=true]")
        assert chosen.get_attribute("data-token") == "18" and grown[18] == label.replace("␣", " ")

        # its link opens the same text and view; a wrong one is a sentence
        wait_until(page, "text => location.hash.includes(text)", arg=grown[:3])
        page.reload()
        assert shown() == grown and "tab-next" in page.get_attribute("#panel", "aria-labelledby")
        page.fill("#sentence", "a" * 300_000)
        page.click("text=Look inside >> nth=-1")
        page.wait_for_selector(".live .bad:has-text('too long')")
        assert wrong.pop() and not wrong

        # a chat that begins with a suggestion; its text in a file, in the clipboard and on the page
        server.look.suggestions = ["tell <b>me</b>"]
        page.goto(server.url)
        assert not page.is_enabled("#save")
        page.click("text=tell <b>me</b>")
        page.keyboard.press("Enter")
        page.wait_for_selector("#save:enabled")
        page.wait_for_selector("body[data-busy=no]")
        said = "".join(token["text"] for token in asker.get("/state")["tokens"])
        with page.expect_download() as download:
            page.click("#save")
        assert download.value.suggested_filename == "conversation.txt"
        assert download.value.path().read_text() == said
        page.click("#copy")
        page.wait_for_selector("#notice:has-text('Copied')")
        with page.expect_popup() as popup:
            page.click("text=Map this")
        chat, page = page, popup.value
        assert shown() == said.replace("\\x1b", "\ufffd")
        page.set_viewport_size({"width": 390, "height": 844})
        wait_until(page, "document.documentElement.scrollWidth <= 390")
        chat.close()
        page.close()
    assert not wrong


def test_suggestions_are_lines_of_the_text(in_tmp):
    """Whole words from different places of the validation text, or general lines without it."""
    lines = [f"Line {n} of a text, {'long ' * (n % 9)}and more" for n in range(400)]
    Path("book.txt").write_text("\n".join(lines))
    data = prepare("text", "book.txt", tokenizer="char")
    checkpoint = {"config": {"token_directory": str(data.directory)}}
    found = suggestions(checkpoint, data.tokenizer)
    assert len(set(found)) == 3 and all(len(line) <= 60 for line in found)
    for line in found:
        assert any(whole == line or whole.startswith(line + " ") for whole in lines[300:])
    assert suggestions({"config": {}}, LETTERS) == []
    general = suggestions({"config": {}}, BPETokenizer.train(["any text"], 300))
    assert len(general) == 3 and general[0].startswith("Once upon")
