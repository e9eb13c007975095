"""The chat in use: a single answer, a pipe, and a person at a terminal."""

import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
import time

import pytest
import torch

import chat
from conftest import ROOT, error_line, run
from engine.checkpoint import load_model, save_checkpoint
from small_models import (
    LETTERS,
    make_checkpoint,
    make_checkpoint_with_background,
    pull_weights,
)
from system.safe_text import printable
from talk.conversation import Conversation
from text.tokenizer import BPETokenizer


def answer(capsys, *flags):
    assert chat.main([str(flag) for flag in flags]) == 0
    return capsys.readouterr()


@pytest.mark.parametrize(
    "config",
    [{}, {"law": "published"}, {"model_type": "vanilla"}],
    ids=["newton", "published", "vanilla"],
)
def test_greedy_answer_is_what_the_model_says_without_a_cache(config, in_tmp, capsys):
    """The likeliest token, each by a full forward pass."""
    model = make_checkpoint("x.pt", **config)
    tokens = LETTERS.encode("hello")
    for _ in range(10):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    expected = printable(LETTERS.decode(tokens[5:]))
    flags = ("--prompt", "hello", "--temperature", 0, "--max-new-tokens", 10)
    assert answer(capsys, "--checkpoint-path", "x.pt", *flags).out == expected + "\n"


def test_the_seed_decides(in_tmp, capsys):
    make_checkpoint("x.pt")
    flags = ("--checkpoint-path", "x.pt", "--prompt", "a", "--max-new-tokens", 40)
    one, two, other = (answer(capsys, *flags, "--seed", seed).out for seed in (1, 1, 2))
    assert one == two != other


def test_min_p_and_repetition_penalty(in_tmp, capsys):
    """A min-p of 1 leaves the likeliest token; a penalty is the same from a flag and from /set."""
    make_checkpoint("x.pt")
    flags = ("--checkpoint-path", "x.pt", "--prompt", "a\n", "--max-new-tokens", 40, "--seed", 1)
    drawn, greedy, likeliest, same, penalized = (
        answer(capsys, *flags, *more).out
        for more in (
            (),
            ("--temperature", 0),
            ("--min-p", 1),
            ("--min-p", 0, "--repetition-penalty", 1),
            ("--repetition-penalty", 1.5),
        )
    )
    assert likeliest == greedy != drawn == same != penalized
    lines = ("/set min-p 0.5", "/set min_p off", "/set repetition-penalty 1.5", "a")
    flags = ("--max-new-tokens", 40, "--seed", 1, "--temperature", 0.8)
    *told, found = "\n".join(piped(in_tmp, *lines, flags=flags)).split("\n", 3)
    assert found + "\n" == penalized
    assert told[1:] == ["min_p is now off", "repetition_penalty is now 1.5"]


def test_a_stop_text_ends_an_answer(in_tmp, capsys):
    """Several; across tokens; with a line end; on the command line and by /set."""
    model = make_checkpoint("x.pt")
    tokens = LETTERS.encode("hello\n")
    for _ in range(60):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    whole = LETTERS.decode(tokens[6:])
    stops = [whole[20:23], "never said", whole[10:14]]
    end = min(whole.index(stop) + len(stop) for stop in stops if stop in whole)
    flags = ("--checkpoint-path", "x.pt", "--prompt", "hello\n", "--temperature", 0)
    flags += ("--max-new-tokens", 60)
    assert answer(capsys, *flags).out == printable(whole) + "\n"
    given = [word for stop in stops for word in ("--stop", stop)]
    assert answer(capsys, *flags, *given).out == printable(whole[:end]) + "\n"
    lines = (f"/set stop {stops[0]}", "hello", "/set stop off", "/reset", "hello", "/set stop")
    told = "\n".join(piped(in_tmp, *lines, flags=("--max-new-tokens", 60)))
    end = whole.index(stops[0]) + 3
    assert told.startswith(f"stop is now {stops[0]!r}\n")
    assert f"\n{printable(whole[:end])}\nstop is now off\n" in told
    assert f"(forgotten)\n{printable(whole)}\n/set NAME VALUE" in told
    flags += ("--max-new-tokens", 300, "--temperature", 1.5, "--seed", 1)
    first, rest = answer(capsys, *flags).out.split("\n", 1)
    assert rest and answer(capsys, *flags, "--stop", "\\n").out == first + "\n\n"
    make_checkpoint("x.pt", BPETokenizer.train(["some text"], 260))
    said = answer(capsys, *flags).out
    letter = next(n for n, c in enumerate(said) if ord(c) > 127 and c != "\ufffd")  # two tokens
    cut = answer(capsys, *flags, "--stop", said[letter]).out
    assert cut == said[: letter + 1] + "\n"


def test_an_empty_line_is_no_text(in_tmp):
    """Enter alone neither reads nor answers; there is nothing to go on from."""
    make_checkpoint("x.pt")
    flags = ("--max-new-tokens", 9)
    assert piped(in_tmp, "", "hello", "", "", "/more", flags=flags) == piped(
        in_tmp, "hello", "/more", flags=flags
    )
    assert piped(in_tmp, "", "/more") == ["write something first"]


def test_a_wrong_setting_says_what_it_wants(in_tmp):
    make_checkpoint("x.pt")
    wanted = {
        "temperature off": "from 0 (greedy) to a million",
        "temperature nan": "from 0 (greedy) to a million",
        "top_k off2": "whole number",
        "max_new_tokens off": "whole number",
        "min_p 1.5": "from 0 to 1",
        "repetition_penalty 0": "above 0",
    }
    told = piped(in_tmp, *(f"/set {setting}" for setting in wanted), "/set")
    for line, (setting, words) in zip(told, wanted.items(), strict=False):
        assert line.startswith(f"{setting.split()[0]} stays as it is: ") and words in line
        assert setting.split()[1] in line
    assert "temperature          0.0" in told


def test_past_block_size_newton_goes_on_and_vanilla_says_that_it_slides(in_tmp, capsys):
    flags = ("--checkpoint-path", "x.pt", "--prompt", "a", "--max-new-tokens", 60)
    make_checkpoint("x.pt")
    assert "forgotten" not in answer(capsys, *flags).err
    make_checkpoint("x.pt", model_type="vanilla")
    assert answer(capsys, *flags).err.count("forgotten") == 1


def test_characters_that_it_never_saw_are_marked_and_reported(in_tmp, capsys):
    make_checkpoint("x.pt")
    flags = ("--checkpoint-path", "x.pt", "--prompt", "añ한b", "--max-new-tokens", 3)
    assert "2 characters are new" in answer(capsys, *flags).err


def test_no_token_can_steer_the_terminal(in_tmp, capsys):
    """A model that only ever says ESC prints it as text."""
    model = make_checkpoint("x.pt")
    escape = LETTERS.encode("\x1b")[0]
    state = model.state_dict()
    state["norm.weight"].zero_()
    state["norm.bias"].copy_(state["token_emb.weight"][escape] * 100)
    checkpoint = torch.load("x.pt", weights_only=True) | {"model_state": state}
    save_checkpoint("x.pt", checkpoint)
    flags = ("--prompt", "a", "--temperature", 0, "--max-new-tokens", 3)
    assert answer(capsys, "--checkpoint-path", "x.pt", *flags).out == "\\x1b" * 3 + "\n"


def test_windows_text_is_read_as_plain_text(in_tmp, capsys):
    """A byte order mark and CRLF change neither the answer nor the tokens, wherever they come."""
    make_checkpoint("x.pt")
    flags = ("--checkpoint-path", "x.pt", "--temperature", 0, "--max-new-tokens", 9)
    plain = answer(capsys, *flags, "--prompt", "ab\nc\n")
    windows = answer(capsys, *flags, "--prompt", "\ufeffab\r\nc\r")
    assert windows == plain and not windows.err
    conversation = Conversation(load_model("x.pt", "cpu")[0], LETTERS, {"seed": 1})
    for text in ("\ufeffab\r\n", "ab\n"):  # as the page sends it
        list(conversation.read(text, threading.Event()))
        assert conversation.prompt == LETTERS.encode("ab\n")
    typed = [*map(str, flags)]
    plain = run("chat.py", *typed, cwd=in_tmp, stdin="ab\nc\n", check=0)
    windows = run("chat.py", *typed, cwd=in_tmp, stdin="\ufeffab\r\nc\r\n", check=0)
    assert (windows.stdout, windows.stderr) == (plain.stdout, plain.stderr)


def test_odd_prompts_never_crash(in_tmp, capsys):
    bpe = BPETokenizer.train(["some text to learn from"], 300)
    make_checkpoint("x.pt", bpe)
    for prompt in ("", " ", "\n", "🎉" * 50, "\x00\x1b[31m", "\udcff", "שלום", "a" * 5000):
        answer(capsys, "--checkpoint-path", "x.pt", "--prompt", prompt, "--max-new-tokens", 3)


def test_piped_conversation(in_tmp):
    """No prompt is printed, settings and commands work, an unknown command is not answered."""
    make_checkpoint("x.pt")
    lines = (
        "/set temperature 0\n/set top-k nonsense\nhello\n/reset\nhello\n/nonsense\n/quit\nmore\n"
    )
    result = run(
        *("chat.py", "--checkpoint-path", "x.pt", "--max-new-tokens", 5),
        cwd=in_tmp,
        stdin=lines,
        check=0,
    )
    assert "you>" not in result.stdout and "no such command: /nonsense" in result.stdout
    assert "temperature is now 0.0" in result.stdout and "top_k stays" in result.stdout
    first, second = result.stdout.split("(forgotten)\n")
    assert first.split("\n", 2)[2].strip("\n") == second.split("no such")[0].strip("\n")


def piped(cwd, *lines, flags=()):
    command = ("chat.py", "--checkpoint-path", "x.pt", "--temperature", 0, *flags)
    return run(*command, cwd=cwd, stdin="\n".join((*lines, "")), check=0).stdout.splitlines()


def test_more_goes_on_and_retry_answers_again(in_tmp):
    """10 tokens and 10 more equal one answer of 20; a greedy answer is the same every time."""
    make_checkpoint("x.pt")
    drawn = ("--temperature", 1, "--seed", 3)
    piped(in_tmp, "hello", "/save whole", flags=(*drawn, "--max-new-tokens", 20))
    parts = ("hello", "/more", "/save parts", "/retry", "/save retried")
    piped(in_tmp, *parts, flags=(*drawn, "--max-new-tokens", 10))
    whole, parts, retried = ((in_tmp / name).read_text() for name in ("whole", "parts", "retried"))
    assert parts == whole and len(set(whole)) > 8
    assert len(retried) == len(whole) == 26 and retried[:16] == whole[:16] and retried != whole
    piped(in_tmp, "hello", "/save one", "/retry", "/save two", flags=("--max-new-tokens", 9))
    assert (in_tmp / "one").read_text() == (in_tmp / "two").read_text()
    nothing, early = piped(in_tmp, "/retry", "/more")
    assert "no answer yet" in nothing and "write something" in early


def test_undo_brings_back_the_answer_before_a_retry(in_tmp):
    """And again the newer one; what follows goes on from the answer that is there."""
    make_checkpoint("x.pt")
    flags = ("--temperature", 1, "--seed", 3, "--max-new-tokens", 10)
    lines = ("hello", "/save one", "/pull", "/retry", "/save two", "/undo", "/save three", "/pull")
    lines += ("/undo", "/save four", "/undo", "/set temperature 0", "/more", "/save more", "/undo")
    told = "\n".join(piped(in_tmp, *lines, flags=flags))
    one, two, three, four, more = (
        (in_tmp / name).read_text() for name in ("one", "two", "three", "four", "more")
    )
    assert one == three != two == four and len(one) == 16
    assert f"\n{printable(one[6:])}\nsaved in three" in told
    assert f"\n{printable(two[6:])}\nsaved in four" in told
    pulls = told.split("was pulled by")
    assert len(pulls) == 3 and pulls[1].split("%")[:8] == pulls[2].split("%")[:8]
    model = load_model("x.pt", "cpu")[0]
    tokens = LETTERS.encode(one)
    for _ in range(10):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    assert more == LETTERS.decode(tokens)
    assert told.splitlines()[-1] == "the answer was not retried"
    assert "the answer was not retried" in piped(in_tmp, "hello", "/undo", flags=flags)


def test_tokens_and_pull(in_tmp):
    """Each token of the text with its mass; shares of the pull equal the formula in float64."""
    model = make_checkpoint("x.pt")
    lines = piped(in_tmp, "abcab", "/tokens", "/pull", flags=("--max-new-tokens", 1))
    ids = LETTERS.encode("abcab\n")
    table = [line.split() for line in lines if "(mass" in line]
    assert [int(row[0]) for row in table] == ids
    for row, mass in zip(table, model.mass(torch.tensor(ids)), strict=True):
        assert float(row[3].rstrip(")")) == pytest.approx(mass.item(), abs=1e-3)
    # bars begin at a mass of 1, in the middle: 12 columns for the farthest from it
    farthest = max(abs(mass - 1) for mass in model.mass(torch.tensor(ids)).tolist())
    bars = [line.split(") ")[1].split("│") for line in lines if "(mass" in line]
    for (left, right), mass in zip(bars, model.mass(torch.tensor(ids)).tolist(), strict=True):
        assert len(left) == 12
        length = 12 * (mass - 1) / farthest
        filled, empty = (right, left) if length > 0 else (left, right)
        assert len(filled.strip()) == pytest.approx(abs(length), abs=1) and not empty.strip()
    (start,) = (n for n, line in enumerate(lines) if "was pulled by, of the last 7 tokens" in line)
    shares = {row.split()[2]: row.split()[0] for row in lines[start + 1 :] if "back" in row}
    tokens = torch.tensor([[*ids, LETTERS.encode(lines[0])[0] if lines[0] else ids[-1]]])
    weights = pull_weights(model.double(), tokens)
    assert torch.allclose(weights.sum(-1), torch.ones(()).double(), atol=1e-6)
    mean = weights[:, :, -1].mean((0, 1))
    for back, share in shares.items():
        assert float(share.rstrip("%")) == pytest.approx(100 * float(mean[6 - int(back)]), abs=0.06)
    assert len(shares) >= 5
    make_checkpoint("x.pt", model_type="vanilla")
    assert "of the law newton" in piped(in_tmp, "/pull")[0]


def test_pull_with_a_background(in_tmp):
    """Every view of the pull says how quiet it is: what the shares lack to 1, in float64."""
    model = make_checkpoint_with_background("x.pt")
    flags = ("--max-new-tokens", 1, "--temperature", 0)
    lines = piped(in_tmp, "abcab", "/pull", "/pull heads", "/pull 2", flags=flags)
    ids = LETTERS.encode("abcab\n" + lines[0])
    assert len(ids) == 7
    weights = pull_weights(model.double(), torch.tensor([ids]))[:, :, -1]
    quiet = 1 - weights.sum(-1)

    def share(line):
        return float(line.split("%")[0]) / 100

    found = [share(line) for line in lines if "quiet: the background's share" in line]
    assert found == pytest.approx([float(quiet.mean()), *quiet[1].tolist()], abs=6e-4)
    (start,) = (n for n, line in enumerate(lines) if "mean back  quiet  hardest pull" in line)
    for line, row, own in zip(
        lines[start + 1 : start + 5], weights.flatten(0, 1), quiet.flatten(), strict=True
    ):
        _, back, of_quiet, hardest, *_ = line.split()
        assert float(of_quiet.rstrip("%")) == pytest.approx(100 * float(own), abs=0.06)
        assert float(hardest.rstrip("%")) == pytest.approx(100 * float(row.max()), abs=0.06)
        mean = float(row @ torch.arange(6, -1, -1.0).double()) / float(row.sum())
        assert float(back) == pytest.approx(mean, abs=0.06)
    assert "within reach" not in "".join(lines)


def test_pull_weights_are_what_attention_uses(in_tmp):
    """Weights times values, through the output projection, give the output of the layer."""
    model = make_checkpoint("x.pt").double()
    tokens = torch.tensor([LETTERS.encode("hello there you")])
    seen = {}
    attn = model.layers[1].attn
    attn.register_forward_hook(lambda _, inputs, output: seen.update(h=inputs[0], out=output))
    weights = pull_weights(model, tokens)[1]
    v = attn.v_proj(seen["h"]).view(1, -1, 2, 8).transpose(1, 2)[0]
    expected = attn.out_proj((weights @ v).transpose(0, 1).flatten(1))
    assert torch.allclose(seen["out"][0], expected, atol=1e-6)


def test_save_overwrites_nothing(in_tmp):
    make_checkpoint("x.pt")
    lines = piped(in_tmp, "hello", "/save talk.txt", "/save talk.txt", "/save no/such/talk.txt")
    assert (in_tmp / "talk.txt").read_text().startswith("hello\n")
    assert [line.split()[0] for line in lines[-3:]] == ["saved", "talk.txt", "no/such/talk.txt"]


def terminal(cwd, *flags, interrupt=signal.SIG_DFL):
    """Start chat.py on a pseudo-terminal.

    Its history cannot be saved: a file is in the place of its folder.

    Args:
        interrupt: what SIGINT is set to at the start: the default, or ignored as in the background.

    Returns:
        The process, the other end of the terminal, a function that reads until a text appears.
    """
    master, slave = pty.openpty()

    def become_a_session():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, interrupt)

    process = subprocess.Popen(
        [sys.executable, str(ROOT / "chat.py"), *map(str, flags)],
        cwd=cwd,
        env=os.environ | {"TERM": "xterm", "NO_COLOR": "1", "XDG_STATE_HOME": f"{cwd}/x.pt"},
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=become_a_session,
    )
    os.close(slave)

    seen = ""

    def expect(text, press=b"", seconds=90):
        """Read until `text` appears; press a key every few seconds, as it may be lost at first."""
        nonlocal seen
        deadline, next_press = time.monotonic() + seconds, time.monotonic() + 0.5
        while text not in seen:
            assert time.monotonic() < deadline, f"no {text!r} in {seen!r}"
            if press and time.monotonic() > next_press:
                os.write(master, press)
                next_press = time.monotonic() + 5
            if select.select([master], [], [], 0.2)[0]:
                seen += os.read(master, 65536).decode(errors="replace")
        seen = seen.split(text, 1)[1]  # the rest is for the next call

    return process, master, expect


@pytest.mark.parametrize("interrupt", [signal.SIG_DFL, signal.SIG_IGN], ids=["default", "ignored"])
def test_at_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_leaves(interrupt, in_tmp):
    """Also if it is started as scripts start background jobs: with Ctrl-C ignored."""
    make_checkpoint("x.pt")
    process, master, expect = terminal(
        *(in_tmp, "--checkpoint-path", "x.pt", "--max-new-tokens", 1_000_000),
        interrupt=interrupt,
    )
    expect("you> ")
    os.write(master, b"/help\n")
    expect("/reset")
    expect("you> ")
    os.write(master, b"hello\n")
    expect("hello")
    time.sleep(1.0)
    os.write(master, b"\x03")
    expect("you> ")
    assert process.poll() is None
    expect("leaves", press=b"\x03")
    expect("you> ")
    os.write(master, b"\x04")
    assert process.wait(timeout=20) == 0


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda path: None, ("does not exist",)),
        (lambda path: path.write_bytes(b""), ("truncated",)),
        (lambda path: path.write_text("hello"), ("truncated",)),
        (lambda path: path.mkdir(), ("directory",)),
        (lambda path: torch.save([1, 2], path), ("model_state",)),
        (lambda path: torch.save({"model_state": {}, "vocab": {}}, path), ("first-release",)),
    ],
    ids=["absent", "empty", "text", "directory", "list", "hollow"],
)
def test_what_is_no_checkpoint_is_one_line(make, words, in_tmp):
    make(in_tmp / "x.pt")
    result = run("chat.py", "--checkpoint-path", "x.pt", cwd=in_tmp, check=1)
    line = error_line(result)
    assert "x.pt" in line and all(word in line for word in words)


class Malice:
    """A hostile pickle: loading it creates a folder."""

    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def test_a_hostile_pickle_is_refused_and_not_run(in_tmp):
    torch.save({"model_state": {}, "vocab": Malice()}, "evil.pt")
    line = error_line(run("chat.py", "--checkpoint-path", "evil.pt", cwd=in_tmp, check=1))
    assert "refused" in line and not (in_tmp / "pwned").exists()
    # the attack is real: an unsafe load runs it
    torch.load("evil.pt", weights_only=False)
    assert (in_tmp / "pwned").exists()


def test_truncated_flipped_and_contradictory_checkpoints(in_tmp, capsys):
    from system.errors import UserError

    make_checkpoint("x.pt")
    whole = (in_tmp / "x.pt").read_bytes()
    for tenth in range(1, 10):
        (in_tmp / "cut.pt").write_bytes(whole[: len(whole) * tenth // 10])
        with pytest.raises(UserError, match="truncated"):
            chat.main(["--checkpoint-path", "cut.pt", "--prompt", "a"])
    flipped = bytearray(whole)
    flipped[whole.index(b"data/0") + 500] ^= 16
    (in_tmp / "flipped.pt").write_bytes(flipped)
    with pytest.raises(UserError, match=r"damaged|truncated"):
        chat.main(["--checkpoint-path", "flipped.pt", "--prompt", "a"])
    checkpoint = torch.load("x.pt", weights_only=True)
    checkpoint["config"]["hidden_dim"] = 32
    save_checkpoint("liar.pt", checkpoint)
    with pytest.raises(UserError, match="contradicts itself"):
        chat.main(["--checkpoint-path", "liar.pt", "--prompt", "a"])


@pytest.mark.parametrize(
    "flags",
    [("--temperature", -1), ("--top-p", 2), ("--top-k", 0), ("--max-new-tokens", "x")],
)
def test_bad_settings_are_usage_errors(flags, in_tmp):
    result = run("chat.py", *flags, cwd=in_tmp, check=2)
    assert flags[0] in error_line(result)
