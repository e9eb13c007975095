"""Talk to a checkpoint. It goes on writing where your text ends, as the text it learned from does.

Commands: /help, /retry, /more, /tokens, /pull, /save FILE, /set NAME VALUE, /reset, /quit. Ctrl-C
stops an answer, Ctrl-D leaves.
"""

import argparse
import contextlib
import signal
import sys
import threading
import time

import torch
from tqdm import tqdm

from checkpoint import load_model
from errors import run_script, warn
from generation import TokenStream
from model import NGT
from options import choose_device, positive, script_parser, whole, whole_or_zero
from tokenizer import CharTokenizer, TextStream

EXAMPLES = """examples:
  python chat.py --checkpoint-path checkpoints/shakespeare.pt_best.pt
  python chat.py --prompt "ROMEO:" --seed 1 --max-new-tokens 300
  echo "ROMEO:" | python chat.py --temperature 0
"""

HELP = """/help                 this list
/retry                answer again, otherwise
/more                 go on writing
/tokens               how what you wrote was split, with the tokens' masses
/pull                 which earlier tokens pulled the newest one, and how hard
/save FILE            write the conversation to a new file
/set                  show the settings
/set NAME VALUE       change temperature, top_k, top_p, max_new_tokens or seed
/reset                forget the conversation
/quit                 leave (Ctrl-D does too)
Ctrl-C                stop the answer that is being written"""


def temperature(text):
    """0 or more."""
    value = float(text)
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"{text} must be 0 (greedy) or more")
    return value


def probability(text):
    """Above 0, at most 1."""
    value = positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} must be above 0 and at most 1")
    return value


PULL_CONTEXT = 256  # tokens
SHOWN_PULLS = 8
SETTINGS = {
    "temperature": temperature,
    "top_k": whole,
    "top_p": probability,
    "max_new_tokens": whole,
    "seed": whole_or_zero,
}


def make_parser():
    parser = script_parser(__doc__, EXAMPLES)
    add = parser.add_argument
    add(
        "--checkpoint-path",
        default="checkpoints/shakespeare.pt_best.pt",
        help="an NGT or a vanilla checkpoint, of this or the first release (default: %(default)s)",
    )
    add("--prompt", help="answer this text once, on standard output, and leave")
    add(
        "--temperature",
        type=temperature,
        default=0.8,
        help="how adventurous; 0 always takes the likeliest token (default: %(default)s)",
    )
    add("--top-k", type=whole, help="draw from the k likeliest tokens only (default: all)")
    add(
        "--top-p",
        type=probability,
        help="draw from the likeliest tokens that together have this probability (default: all)",
    )
    add("--max-new-tokens", type=whole, default=300, help="(default: %(default)s)")
    add("--seed", type=whole_or_zero, help="the same seed gives the same answer (default: chance)")
    add("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    return parser


def printable(text):
    """Text that cannot steer a terminal: control characters are shown, not sent."""
    return "".join(
        c if c in "\n\t" or c.isprintable() or (c.isspace() and c > "\x85") else f"\\x{ord(c):02x}"
        for c in text
    )


class Chat:
    """One conversation: a model's token stream with text around it."""

    def __init__(self, model, tokenizer, settings):
        self.stream = TokenStream(model)
        self.tokenizer = tokenizer
        self.settings = settings
        self.reseed()
        self.forget()

    def forget(self):
        """Start a conversation."""
        self.stream.reset()
        self.said_sliding = False
        self.tokens, self.prompt, self.transcript = [], [], []
        self.before_answer = None

    def reseed(self):
        self.generator = torch.Generator()
        if self.settings["seed"] is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(self.settings["seed"])

    def reply(self, text):
        """Read `text` and answer it on standard output; returns whether Ctrl-C stopped that."""
        with stop_on_interrupt() as stopped:
            self.read(text, stopped)
        return stopped.is_set() or self.more()

    def remember(self):
        """Keep this moment, so that /retry can come back to it."""
        kept = len(self.tokens), len(self.transcript)
        self.before_answer = (self.stream.copy_of_state(), *kept)

    def retry(self):
        """Answer the last text again."""
        if self.before_answer is None:
            print("nothing was answered yet")
            return
        state, tokens, pieces = self.before_answer
        self.stream.return_to(state)
        del self.tokens[tokens:], self.transcript[pieces:]
        self.more()

    def more(self):
        """Go on writing where the text ends; returns whether Ctrl-C stopped that."""
        if self.stream.logits is None:
            print("write something first")
            return False
        self.remember()
        with stop_on_interrupt() as stopped:
            self.answer(print_now, stopped)
        return stopped.is_set()

    def show_tokens(self):
        """How the last text was split."""
        if not self.prompt:
            print("write something first")
            return
        masses = [None] * len(self.prompt)
        if isinstance(self.stream.model, NGT):
            ids = torch.tensor(self.prompt, device=self.stream.device)
            masses = self.stream.model.mass(ids).tolist()
        for token, mass in zip(self.prompt, masses, strict=True):
            label = printable(self.tokenizer.label(token))
            print(f"{token:>7}  {label}" + ("" if mass is None else f"  (mass {mass:.3f})"))

    def show_pull(self):
        """The earlier tokens that pulled the newest one hardest, mean over layers and heads."""
        model = self.stream.model
        if getattr(model.config, "law", None) != "newton":
            print("only the law newton has a pull to show")
            return
        if not self.tokens:
            print("write something first")
            return
        recent = self.tokens[-PULL_CONTEXT:]
        weights = model.pull_weights(torch.tensor([recent], device=self.stream.device))
        shares = weights[:, :, -1].mean((0, 1))
        label = printable(self.tokenizer.label(recent[-1]))
        print(f"{label} was pulled by, of the last {len(recent)} tokens:")
        for place in shares.argsort(descending=True)[:SHOWN_PULLS].tolist():
            share, back = float(shares[place]), len(recent) - 1 - place
            bar = "#" * max(1, round(share * 40))
            where = f"{back} back" if back else "itself"
            label = printable(self.tokenizer.label(recent[place]))
            print(f"{share:6.1%}  {label:<16} {where:<9} {bar}")

    def save(self, path):
        """Write the conversation to a file that is not there yet."""
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write("".join(self.transcript))
        except FileExistsError:
            print(f"{path} exists already: give another name")
        except OSError as error:
            print(f"{path} cannot be written: {error.strerror or error}")
        else:
            print(f"saved in {path}")

    def read(self, text, stopped):
        """Let the model read what the user wrote."""
        text = text.encode("utf-8", "replace").decode("utf-8")
        if isinstance(self.tokenizer, CharTokenizer):
            unknown = self.tokenizer.num_unknown(text)
            if unknown:
                warn(f"{unknown} characters are new to this model's vocabulary")
        tokens = self.tokenizer.encode(text)
        if not tokens and self.stream.logits is None:
            tokens = self.tokenizer.encode("\n") or [0]
        self.prompt = tokens
        self.transcript.append(text)
        for start in tqdm(
            range(0, len(tokens), 512), desc="reading", disable=None, delay=2, leave=False
        ):
            self.stream.feed(tokens[start : start + 512])
            self.tokens += tokens[start : start + 512]
            if stopped.is_set() and start + 512 < len(tokens):
                print(f"(read as far as token {start + 512} of {len(tokens)})")
                return

    def answer(self, write, stopped):
        """Stream an answer to `write(text)` until it is long enough or stopped."""
        s, started, count = self.settings, time.perf_counter(), 0
        text = TextStream(self.tokenizer)
        tokens = self.stream.generate(
            s["max_new_tokens"], s["temperature"], s["top_k"], s["top_p"], self.generator
        )
        for token in tokens:
            count += 1
            self.tokens.append(token)
            self._write(text.push(token), write)
            if stopped.is_set():
                break
        self._write(text.flush(), write)
        write("\n")
        if sys.stdout.isatty():
            seconds = time.perf_counter() - started
            print(f"({count} tokens, {count / seconds:,.0f} tokens/s)")
        if self.stream.slides and not self.said_sliding:
            self.said_sliding = True
            warn("the context was full: its older half is forgotten whenever that happens")

    def _write(self, text, write):
        self.transcript.append(text)
        write(printable(text))

    def command(self, line):
        """Carry out a /command; returns False where the user wants to leave."""
        name, *words = line.split()
        if name in ("/quit", "/exit"):
            return False
        if name == "/help":
            print(HELP)
        elif name == "/reset":
            self.forget()
            print("(forgotten)")
        elif name == "/retry":
            self.retry()
        elif name == "/more":
            self.more()
        elif name == "/tokens":
            self.show_tokens()
        elif name == "/pull":
            self.show_pull()
        elif name == "/save":
            self.save(words[0]) if len(words) == 1 else print("/save FILE: name one file")
        elif name == "/set" and not words:
            for key, value in self.settings.items():
                print(f"{key:15} {'-' if value is None else value}")
        elif name == "/set" and len(words) == 2 and words[0].replace("-", "_") in SETTINGS:
            self._set(words[0].replace("-", "_"), words[1])
        else:
            print(f"no such command: {printable(line)}; /help lists them")
        return True

    def _set(self, key, text):
        try:
            self.settings[key] = SETTINGS[key](text)
        except (ValueError, argparse.ArgumentTypeError) as error:
            print(f"{key} stays as it is: {error}")
            return
        if key == "seed":
            self.reseed()
        print(f"{key} is now {self.settings[key]}")


def print_now(text):
    print(text, end="", flush=True)


@contextlib.contextmanager
def stop_on_interrupt():
    """Ctrl-C sets the event instead of cutting a token in half."""
    stopped = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: stopped.set())
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def converse(chat):
    """Read lines until the user leaves."""
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):  # line editing and history, where there is any
            import readline  # noqa: F401
        # a shell that starts its jobs with Ctrl-C ignored would leave this prompt deaf to it
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("write something; /help lists the commands, Ctrl-D leaves")
    while True:
        try:
            line = input("you> " if interactive else "")
        except EOFError:
            if interactive:
                print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)")
            continue
        except UnicodeDecodeError:
            warn("that line is not UTF-8 and was left out")
            continue
        if line.startswith("/"):
            if not chat.command(line):
                return
            continue
        chat.reply(line + "\n")


def main(argv=None):
    """Chat; returns the exit code."""
    args = make_parser().parse_args(argv)
    model, tokenizer, checkpoint = load_model(args.checkpoint_path, choose_device(args.device))
    chat = Chat(model, tokenizer, {name: getattr(args, name) for name in SETTINGS})
    if args.prompt is not None:
        return 130 if chat.reply(args.prompt) else 0
    if sys.stdin.isatty():
        kind = checkpoint["config"]["model_type"]
        print(f"{args.checkpoint_path}: {kind}, step {checkpoint.get('iter', '?')}")
        chat.stream.feed([0])  # what has to be compiled is, before anyone waits for an answer
        chat.stream.reset()
    converse(chat)
    return 0


if __name__ == "__main__":
    run_script(main)
