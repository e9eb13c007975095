"""The chat at a terminal: safe text, columns, bars, and a person at a real terminal (tmux)."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import unicodedata

import pytest
import torch

import chat
from chat_campaign import campaign
from conftest import ROOT, error_line, run
from engine.checkpoint import save_checkpoint
from small_models import LETTERS, make_checkpoint
from system import terminal as system_terminal
from system.errors import UserError, run_script, warn
from system.safe_text import printable
from system.terminal import bar, cells, fit
from talk.commands import print_event
from talk.conversation import Conversation
from text.tokenizer import CharTokenizer

TEXTS = (
    *(
        "plain\n\ttext",
        "שלום עולם",
        "مرحبا",
        "می‌خواهم",
        "क्‍ष",
        "漢字かな",
        "한국어",
        "e\u0301\u20dd",
    ),
    *("😀", "👩‍💻", "❤️‍🔥", "🇰🇷", "👍🏽", "1️⃣", "🫨", "\u3000\u00a0", "“—…”", "葛\U000e0100"),
)


def test_no_character_steers_a_terminal_and_text_stays_text():
    """Of all code points only letters, marks, signs, spaces and the planes of emoji pass."""
    for code in range(0x110000):
        shown = printable(chr(code))
        if shown == chr(code):
            known = unicodedata.category(shown)
            picture = 0x1F000 <= code < 0x1FB00
            assert known[0] in "LMNPS" or known == "Zs" or shown in "\n\t" or picture, hex(code)
        else:
            assert shown.isascii() and shown.isprintable() and int(shown[2:], 16) == code
    for text in TEXTS:
        assert printable(text) == text
        pieces = [printable(c, before) for before, c in zip(["", *text], text, strict=False)]
        assert "".join(pieces) == text  # as it is streamed
    hidden = {
        "a\u200db": "a\\u200db",
        "م\u200d\u200dم": "م\u200d\\u200dم",
        "a\ufe0f\ufe0f": "a\ufe0f\\ufe0f",
        "\u202etxt.exe": "\\u202etxt.exe",
        "\x1b[31m\x9b\x07": "\\x1b[31m\\x9b\\x07",
        "\udcff\u3164\U000e0041": "\\udcff\\u3164\\U000e0041",
    }
    assert {text: printable(text) for text in hidden} == hidden


def test_errors_and_warnings_are_one_safe_line(capsys):
    def hostile():
        raise UserError("layer \x1b[2J\n\n is \u202e off")

    with pytest.raises(SystemExit):
        run_script(hostile)
    warn("token \x9b5n\nerror: forged")
    expected = "error: layer \\x1b[2J is \\u202e off\nwarning: token \\x9b5n error: forged\n"
    assert capsys.readouterr().err == expected


class Tmux:
    """A real terminal, with a tmux server of its own."""

    def __init__(self, folder, command, width=80, height=24, **environment):
        self._server = ["tmux", "-f", "/dev/null", "-S", str(folder / f"tmux{id(self)}")]
        settings = {"LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1", "NO_COLOR": "", **environment}
        line = shlex.join(["env", *(f"{k}={v}" for k, v in settings.items()), *map(str, command)])
        size = ("-x", str(width), "-y", str(height))
        self("new-session", "-d", *size, "-c", str(folder), f"{line}; echo left with $?; cat")

    def __call__(self, *arguments):
        command = [*self._server, "-u", *arguments]
        environment = os.environ | {"LC_ALL": "C.UTF-8"}
        result = subprocess.run(
            command, capture_output=True, text=True, env=environment, check=True
        )
        return result.stdout

    def screen(self, *flags):
        return self("capture-pane", "-p", "-S", "-500", *flags)

    def expect(self, pattern, seconds=60):
        """Wait until the screen matches; returns the match."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.screen())):
            assert time.monotonic() < deadline, f"no {pattern!r} on\n{self.screen().rstrip()}"
            time.sleep(0.05)
        return found

    def keys(self, *keys):
        self("send-keys", *keys)

    def close(self):
        self("kill-server")


needs_tmux = pytest.mark.skipif(not shutil.which("tmux"), reason="no tmux")


@needs_tmux
def test_cells_are_those_of_a_real_terminal(tmp_path):
    """The cursor of tmux shows how wide a text is; bars rely on it to line up."""
    pane = Tmux(tmp_path, ["true"])
    try:
        pane.expect("left with 0")
        for text in ("abc", "漢字かな", "한국어", "e\u0301a\u0308", "שלום", "😀😀", "ﬁ·…█▏", "กำ"):
            pane.keys("-l", text)
            deadline = time.monotonic() + 20
            while int(pane("display-message", "-p", "#{cursor_x}")) != cells(text):
                assert time.monotonic() < deadline, (text, cells(text), pane.screen())
                time.sleep(0.02)
            pane.keys("Enter")
            while int(pane("display-message", "-p", "#{cursor_x}")):
                time.sleep(0.02)
    finally:
        pane.close()
    for text in (*TEXTS[1:], "a" * 30, "漢" * 9, "\u0301" * 999):
        assert cells(fit(text, 8)) == 8


def test_bars_are_as_long_as_the_shares_say(monkeypatch):
    assert [bar(share, 10) for share in (0, 1e-9, 0.5, 0.5625, 1, 7)] == [
        *("", "▏", "█████", "█████▋", "██████████", "██████████")
    ]
    assert bar(0.5, 0) == bar(0.5, -3) == ""
    monkeypatch.setattr(system_terminal, "can_show", lambda text: text.isascii())
    assert [bar(share, 10) for share in (0, 1e-9, 0.5, 1)] == ["", "#", "#####", "##########"]
    assert (
        fit("a⏎", 4) == "a\\n "
        and system_terminal.level(1) == "@"
        and system_terminal.level(0) == " "
    )


WORDS = CharTokenizer.train("abcdefghijklmnopqrstuvwxyz :\n한漢")


@needs_tmux
def test_a_person_at_a_terminal(tmp_path):
    """Editing with arrows, history over sessions, completion, every command, Ctrl-C, 40 columns."""
    make_checkpoint(tmp_path / "x.pt", WORDS)
    command = [sys.executable, ROOT / "chat.py", "--checkpoint-path", "x.pt", "--temperature", 0.7]
    command += ["--max-new-tokens", 30, "--seed", 2]
    state = tmp_path / "state"
    pane = Tmux(tmp_path, command, 80, 50, XDG_STATE_HOME=state)
    try:
        pane.expect(r"NGT \(newton\), [\d,]+ parameters, step 7\n.*\nyou>")
        pane.keys("helo wrld", "Left", "Left", "Left", "o", "Home", "Right", "Right", "l", "Enter")
        pane.expect(r"you> hello world\n(?s:.)+\(30 tokens, [\d,]+ tokens/s\)\nyou>")
        pane.keys("/retry", "Enter")
        pane.expect(r"/retry\n(?s:.)+\(30 tokens(?s:.)+you>")
        pane.keys("/pul", "Tab", "Enter")
        rows = pane.expect(
            r"was pulled by, of the last \d+ tokens:\n.*\n.*\n((?:.*back.*\n|.*itself.*\n)+)"
        )[1]
        pane.keys("/pull 2", "Enter")
        pane.expect(r"layer 2 head 2, [\d.]+ tokens back on average\n +[\d.]+%")
        pane.keys("/set temp", "Tab", "1", "Enter")
        pane.expect("temperature is now 1.0")
        pane.keys("/sav", "Tab", "talk.txt", "Enter")
        pane.expect("saved in talk.txt")
        pane.keys("/set max_new_tokens 1000000", "Enter", "go", "Enter")
        pane.expect("you> go\n(?s:.)+\n.{9}")
        pane.keys("C-c")
        pane.expect(r"\^C.*\n+\([\d,]+ tokens, [\d,]+ tokens/s\)\nyou>")
        pane.keys("half", "C-c")
        pane.expect("Ctrl-D or /quit leaves")
        colours = set(re.findall(r"\x1b\[[\d;]*m", pane.screen("-e")))
        assert colours
        pane.keys("C-d")
        pane.expect("left with 0")
    finally:
        pane.close()
    # the strongest is first, and every bar begins in the same column
    rows = rows.splitlines()
    shares = [float(row.split("%")[0]) for row in rows]
    bars = [re.search("[█▏▎▍▌▋▊▉]", row) for row in rows]
    assert shares == sorted(shares, reverse=True) and len(rows) == 8
    assert len({cells(row[: found.start()]) for row, found in zip(rows, bars, strict=True)}) == 1
    history = (state / "newton-gravity" / "chat_history").read_text().splitlines()
    assert history[0] == "hello world" and history[-1] == "go" and "half" not in history
    pane = Tmux(tmp_path, command, 40, 24, XDG_STATE_HOME=state, NO_COLOR=1)
    try:
        pane.expect("you>")
        pane.keys("Up", "Up", "Enter")
        pane.expect("max_new_tokens is now 1000000")
        pane.keys("/set max_new_tokens 9", "Enter", "hi", "Enter")
        pane.expect(r"\(9 tokens")
        pane("set-buffer", "two\nlines \x1b[31m")
        pane("paste-buffer", "-p", "-r")
        pane.keys("Enter")
        pane.expect(r"you> two\nlines \^\[\[31m\nwarning.*\n(?s:[^>]+)\(9 tokens")  # is one text
        pane.keys("/pull heads", "Enter")
        lines = pane.expect(r"hardest pull\n((?: +\d\.\d .*\n){4})")[1].splitlines()
        assert max(map(len, lines)) < 40
        pane("clear-history")
        pane.keys("C-l", "/help", "Enter")
        pane.expect("Ctrl-C +stop the answer")
        assert "\x1b[" not in pane.screen("-e")
    finally:
        pane.close()


def test_campaign_of_random_prompts_in_short(tmp_path):
    """Real processes, on a pipe and at a terminal: no crash, no raw control character."""
    only = [("vanilla-BPE", False), ("NGT-char", True)]
    result = campaign(tmp_path, 200, seed=1, long_prompts=2, longest=1 << 16, only=only)
    assert result["failures"] == [] and result["kinds"].total() == 200
    assert len(result["kinds"]) == 11 and result["output_bytes"] > 8000


def test_ctrl_c_ends_a_pipe(tmp_path):
    make_checkpoint(tmp_path / "x.pt")
    command = [sys.executable, ROOT / "chat.py", "--checkpoint-path", "x.pt"]
    process = subprocess.Popen(
        [*map(str, command), "--max-new-tokens", "100000000"],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    process.stdin.write(b"hello\nagain\n")
    process.stdin.flush()
    assert len(os.read(process.stdout.fileno(), 1)) == 1  # it is answering
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130


def test_ctrl_c_while_it_reads(tmp_path, capsys):
    """The part that was read stays in the context and in the transcript."""
    model = make_checkpoint(tmp_path / "x.pt")
    settings = dict(temperature=0, top_k=None, top_p=None, max_new_tokens=4, seed=1)
    talk, stopped = Conversation(model, LETTERS, settings), threading.Event()
    stopped.set()
    for event in talk.read("ab" * 1000, stopped):
        print_event(event)
    assert talk.stream.cache.length == 512 and talk.transcript.getvalue() == "ab" * 256
    assert "read as far as token 512 of 2,000" in capsys.readouterr().out
    with torch.inference_mode():
        expected = model(torch.tensor([LETTERS.encode("ab" * 256)]))[0, -1]
    torch.testing.assert_close(talk.stream.logits, expected, rtol=1e-4, atol=1e-4)


def test_the_path_that_training_was_given_will_do(in_tmp, capsys):
    make_checkpoint("run.pt_last.pt")
    assert chat.main(["--checkpoint-path", "run.pt", "--prompt", "/", "--max-new-tokens", "2"]) == 0
    assert "reading run.pt_last.pt" in capsys.readouterr().err
    make_checkpoint("run.pt_best.pt")
    chat.main(["--checkpoint-path", "run.pt", "--prompt", "a", "--max-new-tokens", "2"])
    assert "reading run.pt_best.pt" in capsys.readouterr().err
    line = error_line(run("chat.py", cwd=in_tmp, check=1))
    assert "checkpoints/shakespeare.pt_best.pt" in line and "python train_shakespeare.py" in line


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("norm.weight", 3e38, "not finite"),
        ("layers.0.attn.probe_proj.weight", 3e38, "not finite"),
        ("layers.1.attn.time_scale_raw", -3e38, None),  # a head with an endless window
        ("layers.1.attn.time_offset", 3e38, None),  # a head that feels nothing
        ("mass_emb.weight", -3e38, None),  # masses of 0
    ],
)
def test_weights_that_are_finite_and_absurd(name, value, error, in_tmp):
    """Either one line reports it, or the chat goes on without NaN."""
    make_checkpoint("x.pt")
    checkpoint = torch.load("x.pt", weights_only=True)
    checkpoint["model_state"][name].fill_(value)
    save_checkpoint("x.pt", checkpoint)
    asked = "hello\n/tokens\n/pull\n/pull 2\n/pull heads\n"
    flags = ("--checkpoint-path", "x.pt", "--max-new-tokens", 30)
    result = run("chat.py", *flags, cwd=in_tmp, stdin=asked, check=1 if error else 0)
    if error:
        assert error in error_line(result)
    else:
        assert "nan" not in result.stdout and "2.2 " in result.stdout and not result.stderr
