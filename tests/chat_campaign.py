"""Sends random malformed prompts to chat.py, through a pipe and at a pseudo-terminal, to both
models with both tokenizers, and looks for crashes, raw control characters in the output, and
growing memory.

python tests/chat_campaign.py --prompts 10000
"""

import argparse
import contextlib
import os
import pty
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import termios
import threading
import time
import unicodedata
from collections import Counter
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from small_models import make_checkpoint
from text.tokenizer import BPETokenizer, CharTokenizer

TERMINAL_SHARE = 0.2
BATCH = 25  # prompts between two checks of the process
LINE_OF_TERMINAL = 4000  # bytes that the kernel keeps of a line while it is typed
ESCAPES = (
    "\x1b[31m",
    "\x1b]0;title\x07",
    "\x1b[2J",
    "\x1bP+q\x1b\\",
    "\x9b5n",
    "\x1b[6n",
    "\x90q\x9c",
)
RTL = "שלום עולם مرحبا بالعالم"
EMOJI = "😀👩‍💻❤️‍🔥🇰🇷👍🏽1️⃣🏴"
BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c"
ODD = "\u2028\u2029\u200b\ufeff\u00ad\u3164\u034f\U000e0041\ufff9\u0085"
WIDE = "漢字かな한국어e\u0301\u0e33ﬁ"
PLAIN = "the quick brown fox, and then? no more.\n"
EVERYTHING = (
    PLAIN + RTL + EMOJI + BIDI + ODD + WIDE + "".join(map(chr, [*range(32), *range(127, 160)]))
)
COMMANDS = (
    *("help", "retry", "more", "tokens", "tokens all", "pull", "pull heads", "pull 1", "pull 2"),
    *("save", "set", "set temperature", "set top_k", "set top_p", "set seed", "reset", ""),
    *("quit?", "undo"),
)
MODELS = {
    "NGT": {},
    "vanilla": {"model_type": "vanilla"},
}


def tokenizers():
    """One that knows every bad character, and one that can write every byte."""
    return {
        "char": CharTokenizer.train(EVERYTHING),
        "BPE": BPETokenizer.train([PLAIN * 9, RTL], 400),
    }


def some(rng, alphabet, most=60):
    return "".join(rng.choices(alphabet, k=rng.randrange(most)))


def random_prompt(rng, kind, longest):
    """A line, in bytes and without its end."""
    if kind == "empty":
        return b""
    if kind == "invalid UTF-8":
        return rng.randbytes(rng.randrange(1, 200)).replace(b"\n", b"\xff")
    if kind == "surrogates":
        return "".join(chr(rng.randrange(0xD800, 0xE000)) for _ in range(9)).encode(
            "utf-8", "surrogatepass"
        )
    if kind == "long":
        piece = some(rng, PLAIN[:-1] + RTL + EMOJI, 999).encode() or b"a"
        return (piece * (longest // len(piece) + 1))[:longest]
    if kind == "command":
        garbage = rng.choice(
            (
                "",
                some(rng, EVERYTHING),
                str(rng.uniform(-9, 9)),
                "9" * 5000,
                "nan",
                "-1",
                "\x00",
                "1",
            )
        )
        if rng.random() < 0.5:  # a command that there is; files stay in this folder
            line = f"/{rng.choice(COMMANDS)} {garbage.replace('/', '')}"
        else:
            line = "/" + some(rng, EVERYTHING).replace("quit", "").replace("exit", "")
        return line.replace("\n", " ").replace("max_new_tokens", "").encode()
    alphabet = {
        "control characters": [chr(c) for c in (*range(32), *range(127, 160))],
        "emoji": EMOJI,
        "right to left": RTL + BIDI,
        "ANSI escapes": [*ESCAPES, *PLAIN],
        "wide and odd": WIDE + ODD,
        "plain": PLAIN,
    }[kind]
    return some(rng, alphabet).replace("\n", " ").encode()


KINDS = (
    *("empty", "invalid UTF-8", "surrogates", "command", "control characters", "emoji"),
    *("right to left", "ANSI escapes", "wide and odd", "plain"),
)


def bad_characters(text, allowed="\n\t"):
    """Count the characters that can steer a terminal or hide: controls, formats, surrogates, line
    ends; the two joiners are allowed, as letters and emoji need them.
    """
    found = Counter()
    for c in set(text):
        if c in allowed or c in "\u200c\u200d":
            continue
        if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            found[f"U+{ord(c):04X}"] = text.count(c)
    return found


class Conversation:
    """A chat.py process on a pipe or a pseudo-terminal; all its output is kept."""

    def __init__(self, folder, checkpoint, at_terminal):
        self.at_terminal = at_terminal
        command = [sys.executable, str(ROOT / "chat.py"), "--checkpoint-path", checkpoint]
        command += ["--max-new-tokens", "6", "--temperature", "1", "--seed", "1", "--device", "cpu"]
        # a dumb terminal without colour: no escape sequence is allowed at all
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "NO_COLOR": "1"}
        environment |= {"PYTHONIOENCODING": "", "XDG_STATE_HOME": str(folder)}
        if at_terminal:
            self._end, slave = pty.openpty()
            modes = termios.tcgetattr(slave)
            modes[0] &= ~termios.IXON  # no byte of a prompt stops the output,
            modes[1] &= ~termios.OPOST  # line ends stay as chat.py writes them
            modes[3] &= ~termios.ECHO  # and nothing comes back but what it writes
            termios.tcsetattr(slave, termios.TCSANOW, modes)
            streams = dict(stdin=slave, stdout=slave, stderr=slave)
        else:
            streams = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, start_new_session=True, **streams
        )
        if at_terminal:
            os.close(slave)
            self._input = self._output = self._end
        else:
            self._input = self.process.stdin.fileno()
            self._output = self.process.stdout.fileno()
        self.output, self.failures, self._markers = bytearray(), [], 0
        self._checked = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        with contextlib.suppress(OSError):
            while data := os.read(self._output, 1 << 16):
                self.output += data

    def send(self, line):
        if self.at_terminal:
            line = re.sub(
                rb"[\x00-\x1f\x7f\xff]", lambda c: b"\x16" + c[0], line[: LINE_OF_TERMINAL // 2]
            )
        data = memoryview(line + b"\n")
        while data:
            data = data[os.write(self._input, data) :]

    def wait(self, seconds=300):
        """Wait until everything that was sent is answered; returns whether all is well."""
        self._markers += 1
        marker = f"/marker{self._markers}!"
        self.send(marker.encode())
        expected, deadline = f"no such command: {marker}".encode(), time.monotonic() + seconds
        while self.output.find(expected, self._checked) < 0:
            if self.process.poll() is not None:
                return self._fail(f"left with {self.process.returncode}")
            if time.monotonic() > deadline:
                return self._fail("no answer")
            time.sleep(0.002)
        return self.check()

    def check(self):
        """Check the output since the last call; returns whether it is clean."""
        data = bytes(self.output)
        # up to a line end, so that no character is cut in half
        end = data.rfind(b"\n") + 1
        new, self._checked = data[self._checked : end], end
        try:
            text = new.decode("utf-8")
        except UnicodeDecodeError as error:
            return self._fail(f"output is not UTF-8: {error}")
        if bad := bad_characters(text):
            return self._fail(f"raw characters: {dict(bad)}")
        if "Traceback" in text or "Error:" in text:
            return self._fail("a traceback")
        return True

    def _fail(self, what):
        tail = bytes(self.output[-2000:]).decode("utf-8", "replace")
        self.failures.append(f"{what}; it ends: {tail!a}")
        return False

    def memory(self):
        """Resident bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024

    def leave(self):
        """End it with an end of file, as a person does."""
        with contextlib.suppress(OSError):
            os.write(self._input, b"\x04") if self.at_terminal else self.process.stdin.close()
        try:
            code = self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = "no end"
        if code != 0:
            self._fail(f"exit code {code}")
        self._reader.join(10)
        if self.at_terminal:
            os.close(self._end)


def campaign(
    folder, prompts, seed=0, long_prompts=None, longest=1 << 20, only=None, tick=lambda: None
):
    """Talk to every model.

    Args:
        long_prompts: how many prompts are `longest` bytes long; None: 1 in 500.
        only: pairs of a model's name and whether it is at a terminal; None: all.

    Returns:
        A dict: `kinds` (prompts of each kind), `output_bytes`, `memory` (name to first and last
        quarter's median in bytes, after warm-up), `failures` (a list of strings).
    """
    rng, folder = random.Random(seed), Path(folder)
    result = {"kinds": Counter(), "output_bytes": 0, "memory": {}, "failures": []}
    names = []
    for tokenizer_name, tokenizer in tokenizers().items():
        for model_name, config in MODELS.items():
            names.append(f"{model_name}-{tokenizer_name}")
            make_checkpoint(folder / f"{names[-1]}.pt", tokenizer, **config)
    pairs = only or [(name, at_terminal) for at_terminal in (False, True) for name in names]
    shares = [TERMINAL_SHARE if at_terminal else 1 - TERMINAL_SHARE for _, at_terminal in pairs]
    plan = [
        (name, at_terminal, round(prompts * share / sum(shares)))
        for (name, at_terminal), share in zip(pairs, shares, strict=True)
    ]
    long_prompts = prompts // 500 if long_prompts is None else long_prompts
    for number, (name, at_terminal, count) in enumerate(plan):
        label = f"{name} {'terminal' if at_terminal else 'pipe'}"
        chat, samples = Conversation(folder, f"{name}.pt", at_terminal), []
        kinds = rng.choices(KINDS, k=count)
        for n in range(long_prompts):
            if n % len(plan) == number:
                kinds[rng.randrange(count // 4 + 1)] = "long"
        for n, kind in enumerate(kinds, 1):
            result["kinds"][kind] += 1
            chat.send(random_prompt(rng, kind, longest))
            tick()
            if n % BATCH == 0 or n == count:
                # the text of a conversation is kept for /save; a reset empties it
                chat.send(b"/reset")
                if not chat.wait():
                    break
                samples.append(chat.memory())
        chat.leave()
        chat.check()
        result["output_bytes"] += len(chat.output)
        result["failures"] += [f"{label}: {failure}" for failure in chat.failures]
        steady = samples[len(samples) // 2 :]
        if len(steady) >= 4:
            half = len(steady) // 2
            result["memory"][label] = tuple(
                statistics.median(part) for part in (steady[:half], steady[half:])
            )
    return result


def main():
    """Run the campaign; returns 1 if anything failed or memory grew by more than 2 %."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--prompts", type=int, default=10_000, help="number of prompts (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the prompts (default: %(default)s)")
    add("--long-prompts", type=int, help="how many of them have 1 MiB (default: 1 in 500)")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder, tqdm(total=args.prompts, unit="prompt") as bar:
        result = campaign(
            folder, args.prompts, args.seed, long_prompts=args.long_prompts, tick=bar.update
        )
    for kind, count in result["kinds"].most_common():
        print(f"{count:>7,}  {kind}")
    print(f"{result['kinds'].total():>7,}  prompts, {result['output_bytes']:,} bytes of output")
    grew = 0
    for name, (first, last) in result["memory"].items():
        print(
            f"{name:24} {first / 1e6:7.1f} MB, then {last / 1e6:7.1f} MB ({last / first - 1:+.1%})"
        )
        grew += last / first > 1.02
    for failure in result["failures"]:
        print(f"FAILED {failure}")
    print(f"{len(result['failures'])} failures, {grew} processes that grew")
    return int(bool(result["failures"]) or grew > 0)


if __name__ == "__main__":
    sys.exit(main())
