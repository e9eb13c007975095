"""Measure what a checkpoint's loss depends on, on the validation text of its training.

That is the length of the context, the place in the window, the frequency of the token, and whether
the text repeats itself. With --long-range also whether the model uses what is far behind it.
"""

import itertools
import json
import math
from pathlib import Path

import numpy as np

from data import eval_windows
from engine.checkpoint import load_model
from engine.long_range import STRING, long_range
from engine.losses import Losses
from system.cli import choose_device, script_parser, whole, whole_list
from system.errors import UserError, run_script, warn
from system.files import write_whole
from text.token_files import data_of_checkpoint

EXAMPLES = """examples:
  python evaluate.py --checkpoint-path checkpoints/shakespeare.pt_best.pt
  python evaluate.py --checkpoint-path checkpoints/b.pt_best.pt --json runs/b/evaluation.json
  python evaluate.py --checkpoint-path checkpoints/b.pt_best.pt --long-range
"""
TARGETS = 64  # the loss by length of context is that of the last 64 tokens
PLACES = (1, 2, 5, 17, 65, 129, 257, 513, 1025)  # the first place of each group
RANKS = (10, 100, 1000)  # the last rank of each group
GAPS = (20, 100, 200)  # tokens from its first start to its second
RANDOM_LENGTHS = (20, 100)  # tokens of a string of random ids


def make_parser():
    """The parser of evaluate.py."""
    parser = script_parser(__doc__, EXAMPLES)
    add = parser.add_argument
    add("--checkpoint-path", required=True, help="an NGT or a vanilla checkpoint")
    add(
        "--context-lengths",
        type=whole_list,
        default=[64, 128, 256, 512, 1024, 2048, 4096],
        help="tokens, separated by commas (default: 64,128,256,512,1024,2048,4096)",
    )
    add(
        "--num-windows",
        type=whole,
        default=200,
        help="number of windows of the longest context and of repeated strings (default: "
        "%(default)s)",
    )
    add(
        "--long-range",
        type=whole,
        nargs="?",
        const=100,
        metavar="TRIALS",
        help="also ask for a pass key and for a string after up to 4,096 tokens, and for numbers "
        "of a phone book, each in so many trials (default: off; without a number: 100)",
    )
    add("--json", metavar="FILE", help="also write the numbers to this file")
    add("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    return parser


def by_length(losses, tokens, lengths, num_windows):
    """Loss of the same target tokens after contexts of several lengths.

    Lengths below TARGETS are left out, and with a warning those that the text is too short for.

    Returns:
        A list of dicts, one per length; the loss is None beyond the positions of the model.
    """
    lengths = sorted(length for length in lengths if length >= TARGETS)
    while lengths and len(tokens) <= lengths[-1]:
        warn(f"the validation text is shorter than {lengths[-1]} tokens: that length is left out")
        lengths.pop()
    if not lengths:
        return []
    longest = lengths[-1]
    count = min(num_windows, (len(tokens) - 1) // longest)
    # contexts of every length end at the same places, spread evenly over the text
    ends = (np.arange(count) + 1) * ((len(tokens) - 1) // count) + 1
    rows = []
    for length in lengths:
        row = {"context": length, "tokens": count * TARGETS, "loss": None}
        if losses.limit is None or length <= losses.limit:
            sequences = np.stack([tokens[end - length - 1 : end] for end in ends])
            row["loss"] = float(losses.of_all(sequences, TARGETS, f"context {length}").mean())
        rows.append(row)
    return rows


def by_place_and_rank(losses, tokens, ranks, block_size):
    """Loss by place of the token in the window, and by its rank in the training text.

    Args:
        tokens: of the validation text.
        ranks: by id, from `frequency_ranks`.

    Returns:
        `(places, frequencies)`, each a list of dicts; a group that has no token is left out.
    """
    starts = eval_windows(tokens, block_size, eval_iters=50)
    sequences = np.stack([tokens[start : start + block_size + 1] for start in starts])
    found = losses.of_all(sequences, block_size, "windows")
    places, frequencies = [], []
    for first, end in itertools.pairwise(PLACES):
        if first <= block_size:
            part = found[:, first - 1 : end - 1]
            row = {"first": first, "last": min(end - 1, block_size), "loss": float(part.mean())}
            places.append(row)
    rank = ranks[sequences[:, 1:]]
    for first, last in zip((1, *(r + 1 for r in RANKS)), (*RANKS, len(ranks)), strict=True):
        chosen = (rank >= first) & (rank <= last)
        if chosen.any():
            row = {"first": first, "last": last, "tokens": int(chosen.sum())}
            frequencies.append(row | {"loss": float(found[chosen].mean())})
    return places, frequencies


def frequency_ranks(tokens, vocab_size):
    """Rank of every id in the training text, (vocab_size,), 1 for the most frequent.

    Only the first 50 million tokens are counted, which bounds the time on a large corpus.
    """
    counts = np.bincount(tokens[:50_000_000], minlength=vocab_size)
    ranks = np.empty(vocab_size, dtype=np.int64)
    ranks[np.argsort(-counts, kind="stable")] = np.arange(1, vocab_size + 1)
    return ranks


def on_repeats(losses, tokens, vocab_size, count, block_size):
    """Loss of a string that is repeated, and of the same string without the repetition.

    Real text: a string, other text, and the string again, GAPS tokens after its first start. Random
    text: ids drawn uniformly, and the same ids again. The first token of a string is not counted,
    because nothing before it tells that the string begins.

    Args:
        tokens: of the validation text.
        count: number of strings behind each number.

    Returns:
        A list of dicts, one per gap and one per length of random text that fits into `block_size`.
    """
    generator = np.random.default_rng(0)  # every model gets the same strings
    rows = []
    for gap in GAPS:
        before = block_size - gap - STRING
        if before < 0 or len(tokens) < 4 * block_size:
            continue
        starts = generator.integers(0, len(tokens) - block_size, (count, 2))
        once = np.stack([tokens[a : a + block_size] for a, _ in starts])
        string = np.stack([tokens[b : b + STRING] for _, b in starts])
        twice = once.copy()
        twice[:, before : before + STRING] = string
        once[:, -STRING:] = twice[:, -STRING:] = string
        first = losses.of_all(once, STRING - 1, f"string after {gap}").mean()
        second = losses.of_all(twice, STRING - 1, f"string after {gap}").mean()
        rows.append({"text": "real", "gap": gap, "once": float(first), "again": float(second)})
    for length in RANDOM_LENGTHS:
        if 2 * length > block_size:
            continue
        ids = generator.integers(0, vocab_size, (count, length))
        found = losses.of_all(np.concatenate([ids, ids], 1), 2 * length - 1, f"random {length}")
        again = float(found[:, length:].mean())
        rows.append(
            {"text": "random", "gap": length, "once": float(found[:, : length - 1].mean())}
            | {"again": again}
        )
    return rows


def show(result):
    """Print the tables."""
    print(f"\nloss of the last {TARGETS} tokens after a context of")
    for row in result["by_length"]:
        shown = "longer than its positions" if row["loss"] is None else f"{row['loss']:8.4f}"
        print(f"  {row['context']:>6,} tokens  {shown}")
    print("\nloss by place in the window")
    for row in result["by_place"]:
        print(f"  {row['first']:>6} to {row['last']:<6} {row['loss']:8.4f}")
    print("\nloss by rank of the token in the training text")
    for row in result["by_frequency"]:
        print(
            f"  {row['first']:>6} to {row['last']:<6} {row['loss']:8.4f}  {row['tokens']:,} tokens"
        )
    print("\nloss of a repeated string (of the same string, not repeated)")
    for row in result["repeats"]:
        print(
            f"  {row['text']:>6}, after {row['gap']:<4} {row['again']:8.4f}  ({row['once']:.4f})"
            f"  a probability {math.exp(min(50, row['once'] - row['again'])):,.1f} times as large"
        )


def show_long_range(found):
    """Print the tables of `long_range`."""
    print(
        f"\nis what is far used? {found['trials']:,} trials each\n"
        "loss of an answer that the text gave before (of the same answer, not given before)"
    )
    for key, title, size, unit in (
        ("passkey", "a pass key of five digits", "distance", "tokens later"),
        ("phone_book", "a number from a phone book", "names", "names"),
        ("repeats", "a string that comes again", "distance", "tokens later"),
    ):
        print(f"\n{title}" + ("" if found[key] else ": left out"))
        for row in found[key]:
            line = f"  {row[size]:>6,} {unit}  "
            if row["loss"] is None:
                print(line + "longer than its positions")
                continue
            line += f"{row['loss']:8.4f}  ({row['reference']:.4f})  gain {row['gain']:+.4f}"
            line += "" if row["error"] is None else f" ± {row['error']:.4f}"
            if key != "repeats":
                line += f"  all digits right {row['exact']:.1%}"
            elif row["share"] is not None:
                line += f"  {row['share']:.1%} of the first"
            print(line)


def main(argv=None):
    """Evaluate; returns the exit code."""
    args = make_parser().parse_args(argv)
    model, tokenizer, checkpoint = load_model(args.checkpoint_path, choose_device(args.device))
    remedy = "prepare it with prepare_data.py, in the directory where it was trained"
    data = data_of_checkpoint(checkpoint, tokenizer, remedy)
    losses = Losses(model, checkpoint["config"])
    tokens = np.asarray(data.valid).astype(np.int64)
    vocab_size, block_size = model.config.vocab_size, model.config.block_size
    if len(tokens) <= block_size:
        raise UserError(
            f"the validation text has {len(tokens):,} tokens, a window {block_size:,}: "
            "prepare a longer text"
        )
    ranks = frequency_ranks(np.asarray(data.train), vocab_size)
    places, frequencies = by_place_and_rank(losses, tokens, ranks, block_size)
    result = {
        "checkpoint": str(args.checkpoint_path),
        "step": checkpoint.get("iter"),
        "by_length": by_length(losses, tokens, args.context_lengths, args.num_windows),
        "by_place": places,
        "by_frequency": frequencies,
        "repeats": on_repeats(losses, tokens, vocab_size, args.num_windows, block_size),
    }
    if args.long_range:
        result["long_range"] = long_range(losses, tokens, tokenizer, args.long_range, block_size)
    show(result)
    if args.long_range:
        show_long_range(result["long_range"])
    if args.json:
        write_whole(Path(args.json), json.dumps(result, indent=1).encode())
    return 0


if __name__ == "__main__":
    run_script(main)
