"""Chat with a checkpoint. It continues your text in the style of the text it was trained on.

Commands: /help, /retry, /undo, /more, /tokens, /pull, /save FILE, /set NAME VALUE, /reset, /quit.
Ctrl-C stops an answer, Ctrl-D leaves. --serve opens the chat on a local web page that shows what
pulls each token. Arrow up brings back what you wrote, also in earlier sessions: the history is kept
in ~/.local/state/newton-gravity/chat_history, or under XDG_STATE_HOME. NO_COLOR=1 turns colour off.
"""

import argparse

from system.cli import (
    choose_device,
    file_path,
    random_seed,
    script_parser,
    thread_count,
    whole,
    whole_or_zero,
)
from system.errors import UsageError, run_script
from system.safe_text import one_line
from system.terminal import say
from system.threads import HELP as THREADS_HELP
from system.threads import choose_threads
from talk.line_input import LineInput
from talk.settings import SETTINGS

EXAMPLES = """examples:
  python chat.py --checkpoint-path checkpoints/shakespeare.pt_best.pt
  python chat.py --prompt "ROMEO:" --seed 1 --max-new-tokens 300
  echo "ROMEO:" | python chat.py --temperature 0 --stop "JULIET:"
  python chat.py --serve
"""
DEFAULT_CHECKPOINT = "checkpoints/shakespeare.pt_best.pt"
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000


def port_number(text):
    """The number of a port; 0 means any free one."""
    value = whole_or_zero(text)
    if value > 65535:
        raise argparse.ArgumentTypeError(f"{text} is too large: ports end at 65535")
    return value


def make_parser():
    parser = script_parser(__doc__, EXAMPLES)
    add = parser.add_argument
    add(
        "--checkpoint-path",
        type=file_path,
        default=DEFAULT_CHECKPOINT,
        help="an NGT or a vanilla checkpoint, of this or the first release; if it does not exist, "
        "the same path with _best.pt or _last.pt is read (default: %(default)s)",
    )
    add("--prompt", help="answer this text on standard output and leave")
    add(
        "--temperature",
        type=SETTINGS["temperature"],
        default=0.8,
        help="how random the answer is; 0 always takes the likeliest token (default: %(default)s)",
    )
    add("--top-k", type=whole, help="draw from the k likeliest tokens only (default: all)")
    add(
        "--top-p",
        type=SETTINGS["top_p"],
        help="draw from the likeliest tokens that together have this probability (default: all)",
    )
    add(
        "--min-p",
        type=SETTINGS["min_p"],
        help="draw from the tokens that are at least this share as probable as the likeliest, "
        "0 to 1 (default: all)",
    )
    add(
        "--repetition-penalty",
        type=SETTINGS["repetition_penalty"],
        help="make tokens that occurred in the conversation less likely: their logits are divided "
        "by this number, negative ones multiplied; 1 changes nothing (default: off)",
    )
    add(
        "--max-new-tokens",
        type=whole,
        default=300,
        help="length of an answer (default: %(default)s)",
    )
    add("--seed", type=random_seed, help="the same seed gives the same answer (default: random)")
    add(
        "--stop",
        type=SETTINGS["stop"],
        action="append",
        metavar="TEXT",
        help="end an answer once it contains this text, which is still written; \\n stands for a "
        "line end; may be given several times (default: none)",
    )
    add("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    add("--threads", type=thread_count, help=THREADS_HELP)
    add(
        "--serve",
        action="store_true",
        help="chat on a web page that shows what pulls each token, with a page that looks inside "
        "the model for any sentence and changes it (/look); only this computer can open them",
    )
    add(
        "--host",
        help="with --serve: the address to listen at; any other than the default lets other "
        f"computers open the page (default: {DEFAULT_HOST})",
    )
    add(
        "--port",
        type=port_number,
        help=f"with --serve: the port; 0 takes any free one (default: {DEFAULT_PORT})",
    )
    return parser


def introduction(model, checkpoint, path):
    """A line about the model: its kind, its size, and how long it was trained."""
    config = checkpoint["config"]
    kind = f"NGT ({config.get('law', 'newton')})" if config["model_type"] == "ngt" else "vanilla"
    size = sum(parameter.numel() for parameter in model.parameters())
    return f"{path}: {kind}, {size:,} parameters, step {checkpoint.get('iter', '?')}"


def check_flags(args):
    """Check the flags that depend on each other.

    Raises:
        UsageError: if two of them exclude each other.
    """
    if args.serve and args.prompt is not None:
        raise UsageError("--serve and --prompt exclude each other: drop one of them")
    for name in ("host", "port"):
        if getattr(args, name) is not None and not args.serve:
            raise UsageError(f"--{name} needs --serve: add it")


def main(argv=None):
    """Run the chat; returns the exit code."""
    args = make_parser().parse_args(argv)
    check_flags(args)
    # these import PyTorch, which takes a second: --help and a wrong flag do not wait for it
    from engine.checkpoint import find_checkpoint, load_model
    from gravity.trial import computes
    from talk.commands import Chat, completions, converse
    from talk.conversation import Conversation

    path = find_checkpoint(args.checkpoint_path)
    model, tokenizer, checkpoint = load_model(path, choose_device(args.device, computes))
    choose_threads(args.threads, model, tokens=1)
    settings = {name: getattr(args, name) for name in SETTINGS}
    about = introduction(model, checkpoint, path)
    if args.serve:
        from coords import live
        from talk.look import Look
        from talk.server import KEPT_TOKENS, serve

        conversation = Conversation(model, tokenizer, settings, KEPT_TOKENS)
        conversation.warm_up()
        host = DEFAULT_HOST if args.host is None else args.host
        port = DEFAULT_PORT if args.port is None else args.port
        look = Look(conversation, checkpoint, path, live)
        return serve(conversation, host, port, one_line(about), look)
    conversation = Conversation(model, tokenizer, settings)
    chat = Chat(conversation)
    if args.prompt is not None:
        return 130 if chat.reply(args.prompt) else 0
    lines = LineInput("you> ", completions)
    if lines.is_interactive:
        say(about, "dim")
        conversation.warm_up()
    return converse(chat, lines)


if __name__ == "__main__":
    run_script(main)
