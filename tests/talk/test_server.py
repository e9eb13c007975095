"""The chat's page: a real server with valid and hostile requests, and a real browser."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

import chat
from asker import Asker
from conftest import BROWSER, ROOT
from coords import live
from engine.checkpoint import load_model
from small_models import make_checkpoint, make_checkpoint_with_background, pull_weights
from system.errors import UserError
from system.safe_text import printable
from talk import conversation as talk_conversation
from talk import server as talk_server
from talk.conversation import Conversation
from talk.look import Look
from talk.server import KEPT_TOKENS, ChatServer
from text.tokenizer import BPETokenizer, CharTokenizer

HOSTILE = ("<script>document.title='pwned'</script>", "<img src=x onerror=alert(1)>", "\u202e")
LETTERS = CharTokenizer([*"abcdefghijklmnopqrstuvwxyz :\n\x1b", *HOSTILE])
SETTINGS = {"temperature": 1.0, "top_k": None, "top_p": None, "max_new_tokens": 40, "seed": 5}
SETTINGS |= {"min_p": None, "repetition_penalty": None, "stop": None}


def tokens_of(events, author=None):
    """Tokens of a stream of events, as the page gets them, with their final text."""
    found = []
    for event in events:
        if event["type"] == "tokens":
            found += [
                token if isinstance(token, dict) else token.to_json() for token in event["tokens"]
            ]
        elif event["type"] == "rest":
            found[-1]["text"] += event["text"]
    return [token for token in found if author in (None, token["author"])]


def text_of(events):
    return "".join(token["text"] for token in tokens_of(events, "model"))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """chat.py --serve as a process; at the end Ctrl-C stops it in the middle of an answer."""
    folder = tmp_path_factory.mktemp("served")
    model = make_checkpoint(folder / "x.pt", LETTERS)
    flags = ("--serve", "--port", "0", "--checkpoint-path", "x.pt")
    with open(folder / "stderr", "w") as errors:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "chat.py"), *flags],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    line = process.stdout.readline()
    assert line.startswith("chat at http://127.0.0.1:"), (folder / "stderr").read_text()
    port = int(line.split("/")[2].rpartition(":")[2])
    asker = Asker(port)
    yield SimpleNamespace(url=f"http://127.0.0.1:{port}/", model=model, asker=asker, folder=folder)
    _, connection = asker.begin_endless()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    connection.close()
    assert process.stdout.read() == ""
    assert (folder / "stderr").read_text() == "interrupted\n"


def assert_true_pulls(rows, reference, position):
    """Compare the page's rows with the formula in float64, (layers, heads, T, T): the strongest
    sources are all there, in order, with their shares."""
    layers, heads = reference.shape[:2]
    shares = reference[:, :, position]
    expected = torch.cat([torch.cat([shares, shares.mean(1, keepdim=True)], 1).flatten(0, 1)])
    expected = torch.cat([expected, shares.mean((0, 1))[None]])
    assert len(rows) == len(expected) == layers * (heads + 1) + 1
    for row, truth in zip(rows, expected, strict=True):
        weights = [weight for _, weight in row]
        strongest = truth.topk(min(8, len(truth))).values
        assert weights == pytest.approx(strongest[: len(row)].tolist(), abs=2e-5)
        assert float(strongest[len(row) :].sum()) < 1e-4
        assert [float(truth[source]) for source, _ in row] == pytest.approx(weights, abs=2e-5)


def test_answers_are_the_terminals_and_pulls_are_the_formulas(server, capsys):
    """The text equals that of `chat.py --prompt`; masses and pulls equal the float64 model's."""
    asker = server.asker
    asker.post("/reset", {})
    events = asker.talk("send", "hello there", **SETTINGS)
    flags = ("--prompt", "hello there", "--temperature", "1", "--max-new-tokens", "40")
    path = str(server.folder / "x.pt")
    assert chat.main(["--checkpoint-path", path, *flags, "--seed", "5"]) == 0
    assert text_of(events) + "\n" == capsys.readouterr().out

    tokens = tokens_of(events)
    assert [token["position"] for token in tokens] == list(range(51))
    assert asker.get("/state")["tokens"] == tokens
    id_of = {printable(LETTERS.label(n)): n for n in range(LETTERS.vocab_size)}
    ids = torch.tensor([[id_of[token["label"]] for token in tokens]])
    assert LETTERS.decode(ids[0, :11].tolist()) == "hello there"
    masses = server.model.mass(ids)[0].tolist()
    assert [token["mass"] for token in tokens] == pytest.approx(masses, rel=1e-6)
    copy = make_checkpoint(server.folder / "copy.pt", LETTERS).double()
    reference = pull_weights(copy, ids)
    for position in (0, 1, 7, 10, 11, 30, 50):
        rows = asker.get(f"/pulls?position={position}")["rows"]
        assert_true_pulls(rows, reference, position)
        assert rows[-1] == tokens[position]["pulls"]

    # a different answer, back and forth, then a longer one; the prompt stays
    again = asker.talk("retry")
    assert again[1] == {"type": "back", "position": 11} and text_of(again) != text_of(events)
    version = asker.get("/state")["version"]
    for expected in (tokens, tokens[:11] + tokens_of(again)):
        status, told = asker.post("/undo", {})
        told, version = json.loads(told), version + 1
        assert status == 200 and told == asker.get("/state")
        assert told["tokens"] == expected and told["canUndo"] and told["version"] == version
    more = asker.talk("more", max_new_tokens=7)
    assert [token["position"] for token in tokens_of(more)] == list(range(51, 58))
    whole = tokens[:11] + tokens_of(again) + tokens_of(more)
    assert asker.get("/state")["tokens"] == whole
    assert asker.post("/undo", {}) == (409, "the answer was not retried\n")
    # after a reset, the same seed gives the same conversation
    asker.post("/reset", {})
    assert text_of(asker.talk("send", "hello there", max_new_tokens=40)) == text_of(events)


def test_one_answer_at_a_time_and_nobody_there_means_stop(server):
    asker = server.asker
    response, _ = asker.begin_endless()
    status, why = asker.post("/talk", {"action": "send", "text": "me too"})
    assert status == 409 and "being written" in why and why.count("\n") == 1
    assert asker.post("/reset", {})[0] == 409
    assert asker.post("/stop", {}) == (200, '{"wasBusy":true}')
    lines = response.read().decode().splitlines()
    assert [json.loads(line)["type"] for line in lines[-2:]] == ["written", "end"]
    assert asker.post("/stop", {}) == (200, '{"wasBusy":false}')

    version = asker.get("/state")["version"]
    asker.talk("more", max_new_tokens=1)
    status, why = asker.post("/talk", {"action": "more", "version": version})
    assert status == 409 and "another tab" in why

    _, connection = asker.begin_endless()
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    asker.wait_until_idle()
    asker.post("/reset", {})
    for action in ("more", "retry"):
        assert asker.post("/talk", {"action": action})[0] == 409


def test_strangers_and_nonsense_are_refused_in_one_line(server):
    """4xx, one line, no traceback; and the server still works."""
    asker, port = server.asker, server.asker.port
    as_json = {"Content-Type": "application/json"}
    long_number = b'{"action":"more","settings":{"top_k":' + b"9" * 5000 + b"}}"

    def talk(settings=None, **request):
        return ("POST", "/talk", {"action": "send", "text": "a", **request, **(settings or {})}, {})

    def setting(**settings):
        return talk(settings={"settings": settings})

    refused = [
        (403, ("GET", "/state", None, {"Host": "evil.example"})),
        (403, ("GET", "/", None, {"Host": f"evil.example:{port}"})),
        (403, ("GET", "/state", None, {"Host": f"localhost.evil.example:{port}"})),
        (403, ("GET", "/state", None, {"Host": f"192.168.1.5:{port}"})),
        (403, ("GET", "/state", None, {"Origin": "http://evil.example"})),
        (403, ("POST", "/reset", {}, {"Origin": "null"})),
        (403, ("POST", "/reset", {}, {"Origin": f"http://localhost:{port}"})),
        (403, ("POST", "/stop", {}, {"Origin": f"https://127.0.0.1:{port}"})),
        (403, ("POST", "/undo", {}, {"Origin": "http://evil.example"})),
        (404, ("GET", "/undo", None, {})),
        (415, ("POST", "/reset", b"{}", {"Content-Type": "text/plain"})),
        (415, ("POST", "/reset", b"{}", {})),
        (405, ("PUT", "/talk", {}, {})),
        (405, ("OPTIONS", "/talk", None, {"Origin": f"http://127.0.0.1:{port}"})),
        (404, ("GET", "/chat.py", None, {})),
        (404, ("GET", "/../x.pt", None, {})),
        (404, ("GET", "/%2e%2e/x.pt", None, {})),
        (404, ("GET", "//etc/passwd", None, {})),
        (404, ("GET", "/talk", None, {})),
        (404, ("GET", "/reset", None, {})),
        (404, ("POST", "/state", {}, {})),
        (404, ("GET", "/pulls?position=99999999", None, {})),
        (400, ("GET", "/pulls?position=-1", None, {})),
        (400, ("GET", "/pulls?position=" + "9" * 9000, None, {})),
        (400, ("GET", "/pulls?position=%D9%A1", None, {})),
        (413, ("POST", "/talk", {"action": "send", "text": "a" * (1 << 20)}, {})),
        (400, ("POST", "/talk", b'{"action":"send","text":"\x1b"}', as_json)),
        (400, ("POST", "/talk", b'{"action":', as_json)),
        (400, ("POST", "/talk", b"[" * 200_000, as_json)),
        (400, ("POST", "/talk", b"\xff\xfe", as_json)),
        (400, ("POST", "/talk", long_number, as_json)),
        (400, ("POST", "/talk", [], {})),
        (400, ("POST", "/talk", b"{}", as_json | {"Content-Length": "-5"})),
        (400, ("POST", "/talk", {"action": "__init__"}, {})),
        (400, ("POST", "/talk", {"action": ["send"]}, {})),
        (400, talk(text=None)),
        (400, talk(text=["a"])),
        (400, talk(text="")),
        (400, talk(text="a\x1b[31m")),
        (400, talk(text="a\x00")),
        (400, talk(version="1")),
        (400, talk(settings={"settings": [1]})),
        (400, setting(temperature="0.5")),
        (400, setting(temperature=True)),
        (400, setting(temperature=-1)),
        (400, setting(temperature=None)),
        (400, setting(temperature=float("inf"))),
        (400, setting(temperature=float("nan"))),
        (400, setting(temperature=10**400)),
        (400, setting(top_k=0)),
        (400, setting(top_k=1.5)),
        (400, setting(top_p=2)),
        (400, setting(max_new_tokens=0)),
        (400, setting(seed=1 << 63)),
        (400, setting(min_p=1.5)),
        (400, setting(repetition_penalty=0)),
        (400, setting(stop="a")),
        (400, setting(stop=["a", 1])),
        (400, setting(stop=[""])),
        (400, setting(**{"\x1b[2J": 1})),
    ]
    before = asker.get("/state")
    for status, (method, path, body, headers) in refused:
        response, connection = asker.ask(method, path, body, headers)
        text = response.read().decode()
        assert response.status == status, (method, path, str(body)[:99], headers, text)
        assert text.count("\n") == 1 and text.endswith("\n") and text[:-1].isprintable()
        assert "Traceback" not in text and len(text) < 400
        assert "Access-Control-Allow-Origin" not in response.headers
        connection.close()
    for junk in (b"\x16\x03\x01\x02\x00\x01\n\n", b"GET\r\n\r\n", b"G" * 70_000, b"GET /\r\n"):
        with socket.create_connection(("127.0.0.1", port), 10) as raw:
            raw.sendall(junk)
            raw.shutdown(socket.SHUT_WR)
            raw.recv(100)
    assert asker.get("/state") == before

    page, connection = asker.ask("GET", "/", headers={"Host": f"localhost:{port}"})
    policy = page.headers["Content-Security-Policy"]
    assert page.status == 200 and policy.startswith("default-src 'none';")
    assert "unsafe" not in policy and page.headers["X-Content-Type-Options"] == "nosniff"
    connection.close()


def chat_server(conversation, host="127.0.0.1"):
    return ChatServer(host, 0, conversation, "", Look(conversation, {"config": {}}, "x.pt", live))


def make_conversation(tokenizer=LETTERS, kept_tokens=KEPT_TOKENS, **config):
    make_checkpoint("x.pt", tokenizer, **config)
    return Conversation(*load_model("x.pt", "cpu")[:2], dict(SETTINGS), kept_tokens)


def test_memory_stays_as_it_is_and_the_newest_stay_true(in_tmp, monkeypatch):
    """Of a long text and a long answer the newest tokens are kept, with their true pulls."""
    monkeypatch.setattr(talk_conversation, "READ_PAIRS", 4000)
    conversation = make_conversation(kept_tokens=50)
    fed, feed = [], conversation.stream.feed
    monkeypatch.setattr(
        conversation.stream, "feed", lambda tokens: (fed.extend(tokens), feed(tokens))
    )
    text = "what pulls what is old news: " * 11
    events = list(conversation.reply(text, threading.Event()))
    assert len(tokens_of(events, "you")) == 50 and len(fed) == len(text) + 40
    kept = conversation.kept()
    assert [token.position for token in kept] == list(range(len(fed) - 50, len(fed)))
    model = load_model("x.pt", "cpu")[0].double()
    reference = pull_weights(model, torch.tensor([fed]))
    for token in kept[::7]:
        assert_true_pulls(token.pull_rows(), reference, token.position)
    assert conversation.transcript.getvalue() == ""


def test_the_terminal_keeps_no_tokens_and_records_no_pulls(in_tmp):
    """The same text as on the page, and a transcript for /save."""
    page, terminal = make_conversation(), make_conversation(kept_tokens=0)
    events = list(terminal.reply("hello there", threading.Event()))
    assert text_of(events) == text_of(page.reply("hello there", threading.Event())) != ""
    assert printable(terminal.transcript.getvalue()) == "hello there" + text_of(events)
    assert terminal.kept() == [] and all(token["pulls"] == [] for token in tokens_of(events))
    layers = terminal.stream.model.layers
    assert not any(layer.attn._forward_pre_hooks for layer in layers)


def test_every_part_of_a_character_is_a_token_and_the_text_is_whole(in_tmp):
    conversation = make_conversation(BPETokenizer.train(["some text to learn from"], 300))
    events = list(conversation.read("a 🎉 ok 한\ud800", threading.Event()))
    tokens = tokens_of(events)
    assert "".join(token["text"] for token in tokens) == "a 🎉 ok 한\ufffd"
    assert [token["text"] for token in tokens if token["label"].startswith("\\x")].count("") >= 5
    characters = make_conversation(CharTokenizer.train("abc"))
    notice, *events = characters.read("a한ñb", threading.Event())
    assert notice["text"] == "2 characters are new to this model's vocabulary"
    assert [token["text"] for token in tokens_of(events)] == ["a", "\ufffd", "\ufffd", "b"]


@pytest.mark.parametrize("config", [{"law": "published"}, {"model_type": "vanilla"}])
def test_without_pulls_one_can_still_talk(config, in_tmp):
    conversation = make_conversation(**config)
    events = list(conversation.reply("hello", threading.Event()))
    tokens = tokens_of(events)
    assert len(tokens) == 45 and all(token["pulls"] == [] for token in tokens)
    assert all((token["mass"] is None) == (config != {"law": "published"}) for token in tokens)
    assert any("forgotten" in event["text"] for event in events if event["type"] == "notice")


def test_a_damaged_model_is_one_line_and_the_server_goes_on(in_tmp):
    conversation = make_conversation()
    weight = conversation.stream.model.norm.weight.data
    whole = weight.clone()
    with chat_server(conversation) as server:

        def events_of_talk():
            job = server.talk({"action": "send", "text": "ab"})
            server.job = None
            job.run()
            return [job.events.get() for _ in range(job.events.qsize())]

        weight.fill_(float("nan"))
        *_, failed, end = events_of_talk()
        assert failed["type"] == "failed" and "not finite" in failed["text"]
        assert end["canGoOn"] is False and conversation.kept() == []
        weight.copy_(whole)
        assert len(tokens_of(events_of_talk())) == 42


def test_hosts_ports_and_flags(in_tmp, capsys, monkeypatch):
    """Accepted host names; a port in use; a warning if other computers can connect."""
    conversation = make_conversation()

    def knows(host):
        with chat_server(conversation, host) as server:
            own = f":{server.server_address[1]}"
            names = ("localhost", "127.0.0.1", "192.168.1.5", "evil.example", "", "[::1]")
            return [name for name in names if server.knows(name + own)]

    assert knows("127.0.0.1") == ["localhost", "127.0.0.1", "[::1]"]
    assert knows("0.0.0.0") == ["localhost", "127.0.0.1", "192.168.1.5", "[::1]"]

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(talk_server.ChatServer, "work", interrupt)
    flags = ["--checkpoint-path", "x.pt", "--serve"]
    with pytest.raises(KeyboardInterrupt):
        chat.main([*flags, "--port", "0", "--host", "0.0.0.0"])
    assert "anyone who can reach this port" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(UserError, match=f"--port {port} cannot be used .*--port 0"):
            chat.main([*flags, "--port", port])
    with pytest.raises(UserError, match=r"--host nowhere\.invalid"):
        chat.main([*flags, "--host", "nowhere.invalid"])
    with pytest.raises(UserError, match="--serve and --prompt"):
        chat.main([*flags, "--prompt", "a"])
    with pytest.raises(UserError, match="--port needs --serve"):
        chat.main(["--port", "1"])


@pytest.fixture
def new_page(server):
    """A function that opens the chat; fails on page errors and on requests to other servers."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright here")
    if BROWSER is None:
        pytest.skip("no chromium here")
    wrong, answers = [], []  # what was not expected; what the page's questions are answered with

    def on_dialog(dialog):
        if not answers:
            wrong.append(dialog.message)
        if answers and answers.pop(0):
            dialog.accept()
        else:
            dialog.dismiss()

    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", "--disable-background-networking"]
        )

        def new_page(width=1280, height=860, at=server, **context):
            size = {"width": width, "height": height}
            page = browser.new_context(viewport=size, **context).new_page()
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("console", lambda line: line.type == "error" and wrong.append(line.text))
            page.on("dialog", on_dialog)
            page.on(
                "request",
                lambda request: request.url.startswith(at.url) or wrong.append(request.url),
            )
            page.goto(at.url)
            page.wait_for_selector("body[data-ready]")
            return page

        new_page.answers = answers
        yield new_page
        browser.close()
    # a refusal is logged by the browser itself
    assert [line for line in wrong if "409" not in line] == []


def wait_until_written(page):
    page.wait_for_selector("body[data-busy=no]", timeout=60000)


def shown_text(page, author):
    return page.evaluate(
        """author => [...document.querySelectorAll(`.turn.${author} .token`)]
            .map(x => x.textContent.replace("⏎\\n", "\\n")).join("")""",
        author,
    )


def lit(page):
    """{position: strength in percent} of the tokens that are marked as sources."""
    return dict(
        page.evaluate(
            """() => [...document.querySelectorAll(".token.source")].map(x =>
                [Number(x.dataset.position), parseFloat(x.style.getPropertyValue("--pull"))])"""
        )
    )


def test_in_a_browser(server, new_page):
    """Type, hover, click, arrow keys, stop, retry; a hostile vocabulary; a second tab; a phone."""
    asker = server.asker
    asker.post("/reset", {})
    page = new_page()
    page.click("summary")
    for name, value in (("temperature", 1), ("max_new_tokens", 300), ("seed", 5)):
        page.fill(f"[name={name}]", str(value))
    page.fill("#prompt", "hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("there")
    page.keyboard.press("Enter")
    wait_until_written(page)
    state = asker.get("/state")
    tokens = state["tokens"]
    assert state["settings"] == {**SETTINGS, "max_new_tokens": 300}
    assert page.input_value("#prompt") == "" and "300 tokens" in page.inner_text("#notice")
    assert shown_text(page, "you") == "hello\nthere\n"
    assert shown_text(page, "model") == "".join(x["text"] for x in tokens[12:])

    # a hostile vocabulary is shown as text
    seen = shown_text(page, "model")
    assert HOSTILE[0] in seen and HOSTILE[1] in seen and "\\u202e" in seen and "\\x1b" in seen
    assert page.title() == "Chat: what pulls each token"
    assert page.locator("main img, main script").count() == 0

    # the pulls of the newest token show by themselves; hover shows another's, a click keeps them
    assert lit(page).keys() == {source for source, _ in tokens[-1]["pulls"]}
    page.locator("#token-5").hover()
    page.wait_for_selector("#token-5.shown")
    assert "5" in page.inner_text(".facts dd >> nth=0")
    strengths = lit(page)
    assert strengths.keys() == {source for source, _ in tokens[5]["pulls"]}
    order = [strengths[source] for source, _ in tokens[5]["pulls"]]
    assert order == sorted(order, reverse=True) and order[0] > order[-1]
    rows = [row.split("\n") for row in page.locator(".pulls li").all_inner_texts()]
    assert [row[0] for row in rows] == [tokens[s]["label"] for s, _ in tokens[5]["pulls"]]
    for row, (_, weight) in zip(rows, tokens[5]["pulls"], strict=True):
        assert float(row[1].rstrip(" %")) == pytest.approx(100 * weight, abs=0.51)
    page.locator("#token-9").click()
    page.mouse.move(2, 2)
    assert page.get_attribute("#token-9", "aria-selected") == "true"
    mass = float(page.inner_text(".facts dd >> nth=1"))
    assert mass == pytest.approx(tokens[9]["mass"], rel=0.01)

    # one head, by the list of heads and by the selector
    page.wait_for_selector(".by-head")
    head_rows = asker.get("/pulls?position=9")["rows"]
    page.click(".by-head li >> nth=3")
    assert page.input_value("#head") == "4"
    assert lit(page).keys() == {source for source, _ in head_rows[4]}
    page.select_option("#head", label="layer 1, mean of heads")
    assert lit(page).keys() == {source for source, _ in head_rows[2]}

    # the keyboard alone
    page.focus("#conversation")
    page.keyboard.press("ArrowRight")
    assert page.get_attribute("#token-10", "aria-selected") == "true"
    assert page.get_attribute("#conversation", "aria-activedescendant") == "token-10"
    page.keyboard.press("End")
    assert page.get_attribute("#token-311", "aria-selected") == "true"
    page.keyboard.press("Escape")
    assert page.locator("[aria-selected=true]").count() == 0

    # a different answer; then an endless one, stopped; the page keeps the newest tokens
    page.click("#retry")
    wait_until_written(page)
    assert shown_text(page, "you") == "hello\nthere\n"
    again = shown_text(page, "model")
    assert again == "".join(x["text"] for x in asker.get("/state")["tokens"][12:]) != seen
    page.fill("[name=max_new_tokens]", "1000000")
    page.click("#more")
    page.wait_for_selector("#token-400", state="attached", timeout=60000)
    page.wait_for_selector(".token.source")
    assert page.is_disabled("#send")
    other = new_page(width=380, height=780, color_scheme="dark", has_touch=True)
    assert "another tab" in other.inner_text("#notice") and other.is_disabled("#send")
    page.keyboard.press("Escape")
    wait_until_written(page)
    wait_until_written(other)
    assert not asker.get("/state")["isBusy"] and page.is_enabled("#send")

    # the other tab shows the same, and this one notices what is said there
    assert shown_text(other, "model") == shown_text(page, "model")
    assert other.evaluate("document.documentElement.scrollWidth") <= 380
    last = other.locator(".token").last
    last.tap()
    assert last.get_attribute("aria-selected") == "true"
    other.click("summary")
    other.fill("[name=max_new_tokens]", "5")
    other.fill("#prompt", "me")
    other.keyboard.press("Enter")
    wait_until_written(other)
    page.fill("#prompt", "stale")
    page.keyboard.press("Enter")
    page.wait_for_selector("#notice:has-text('another tab')")
    assert page.input_value("#prompt") == "stale"
    assert shown_text(page, "you") == shown_text(other, "you")
    new_page.answers.append(True)
    page.click("#reset")
    page.wait_for_selector(".empty")
    assert page.locator(".token").count() == 0 and asker.get("/state")["tokens"] == []
    page.click("#reset")  # there is nothing to ask about


def test_retry_and_reset_lose_nothing_by_accident_in_a_browser(server, new_page):
    """Undo brings the first answer back, Reset asks first; the settings of drawing are read."""
    asker = server.asker
    asker.post("/reset", {})
    page = new_page()
    page.click("summary")
    settings = {"temperature": 1, "max_new_tokens": 300, "seed": 5, "min_p": 0.01}
    for name, value in (settings | {"repetition_penalty": 1.1, "stop": "ab\n\\n\n"}).items():
        page.fill(f"[name={name}]", str(value))
    assert "Least share 0.01, Against repetition 1.1" in page.text_content("#settings-now")
    assert "Stop at ab or \\n" in page.text_content("#settings-now")
    page.fill("#prompt", "hello")
    page.keyboard.press("Enter")
    wait_until_written(page)
    state = asker.get("/state")
    assert state["settings"] == SETTINGS | settings | {
        **{"repetition_penalty": 1.1, "stop": ["ab", "\n"]}
    }
    first = shown_text(page, "model")
    assert first.endswith(("ab", "\n")) and len(first) < 300 and first.count("\n") <= 1
    assert page.is_disabled("#undo")
    page.fill("[name=stop]", "")
    page.click("#retry")
    wait_until_written(page)
    second = shown_text(page, "model")
    assert second != first and asker.get("/state")["settings"]["stop"] is None
    for expected in (first, second, first):
        page.click("#undo")
        deadline = time.monotonic() + 20
        while shown_text(page, "model") != expected:
            assert time.monotonic() < deadline
            page.wait_for_timeout(20)
    new_page.answers[:] = [False, True]
    page.click("#reset")
    assert shown_text(page, "model") == first and new_page.answers == [True]
    page.click("#reset")
    page.wait_for_selector(".empty")
    assert asker.get("/state")["tokens"] == [] and page.is_disabled("#undo")


def test_a_background_in_a_browser(new_page, in_tmp):
    """The page says how quiet a token is: for the mean of all heads, for one, and for each."""
    make_checkpoint_with_background("x.pt", tokenizer=LETTERS)
    conversation = Conversation(*load_model("x.pt", "cpu")[:2], dict(SETTINGS), KEPT_TOKENS)
    list(conversation.reply("hello there", threading.Event()))
    with chat_server(conversation) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = new_page(at=server)
        asker = Asker(server.server_address[1])
        tokens = asker.get("/state")["tokens"]
        told = asker.get("/pulls?position=9")
        page.locator("#token-9").click()
        page.wait_for_selector(".by-head")

        def quiet_shown(selector="#details"):
            text = page.inner_text(selector)
            assert "Nothing reaches" not in text and "no others" not in text
            return float(re.search(r"[Qq]uiet ([\d.]+) %", text)[1]) / 100

        assert quiet_shown() == pytest.approx(tokens[9]["quiet"], abs=0.0051)
        assert told["quiet"][-1] == tokens[9]["quiet"] and len(told["quiet"]) == 7
        for head, row in enumerate((0, 1, 3, 4)):  # rows 2 and 5 are means of a layer's heads
            selector = f".by-head li:nth-child({head + 1})"
            assert quiet_shown(selector) == pytest.approx(told["quiet"][row], abs=0.0051)
        page.select_option("#head", "4")
        assert quiet_shown() == pytest.approx(told["quiet"][4], abs=0.0051)
        assert "quiet" in page.text_content("#spoken")
        server.shutdown()
    model = load_model("x.pt", "cpu")[0].double()
    fed = torch.tensor([LETTERS.encode("hello ther")])
    lacking = 1 - pull_weights(model, fed)[:, :, -1].sum(-1)
    of_heads = [told["quiet"][row] for row in (0, 1, 3, 4)]
    assert of_heads == pytest.approx(lacking.flatten().tolist(), abs=2e-5)
