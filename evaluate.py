"""Measure what a checkpoint's loss depends on, on the validation text of its training.

That is the length of the context, the place in the window, the frequency of the token, and whether
the text repeats itself. With --long-range also whether the model uses what is far behind it, and
with --wikitext the perplexity per word, which models with other tokenizers have too; with
--minimal-pairs whether it finds the grammatical one of two sentences.
"""

import json
import math
from pathlib import Path

from system.cli import choose_device, file_path, script_parser, thread_count, whole, whole_list
from system.errors import UsageError, run_script
from system.files import write_whole
from system.numbers import limited
from system.threads import HELP as THREADS_HELP
from system.threads import choose_threads

EXAMPLES = """examples:
  python evaluate.py --checkpoint-path checkpoints/shakespeare.pt_best.pt
  python evaluate.py --checkpoint-path checkpoints/b.pt_best.pt --json runs/b/evaluation.json
  python evaluate.py --checkpoint-path checkpoints/b.pt_best.pt --long-range
  python evaluate.py --checkpoint-path checkpoints/b.pt_best.pt --wikitext data/ --stride 64
"""


def make_parser():
    """The parser of evaluate.py."""
    parser = script_parser(__doc__, EXAMPLES)
    add = parser.add_argument
    add(
        "--checkpoint-path",
        type=file_path,
        required=True,
        help="an NGT or a vanilla checkpoint; if it does not exist, the same path with _best.pt or "
        "_last.pt is read",
    )
    add(
        "--context-lengths",
        type=whole_list,
        default=[64, 128, 256, 512, 1024, 2048, 4096],
        help="tokens, at least 64, separated by commas (default: 64,128,256,512,1024,2048,4096)",
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
    add(
        "--wikitext",
        type=file_path,
        metavar="DIR_OR_SPLIT",
        help="measure only the perplexity per word of WikiText's wiki.test.* in this directory, or "
        "of the split valid or test in data/ (default: off)",
    )
    add(
        "--stride",
        type=whole,
        help="with --wikitext: also with windows that predict so many new tokens each and have the "
        "others as context (default: only windows that follow each other)",
    )
    add(
        "--minimal-pairs",
        action="store_true",
        help="measure only how often the grammatical one of two English sentences has the higher "
        "probability (default: off)",
    )
    add("--json", type=file_path, metavar="FILE", help="also write the numbers to this file")
    add("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    add("--threads", type=thread_count, help=THREADS_HELP)
    return parser


def show(result, targets):
    """Print the tables; losses by length are those of the last `targets` tokens."""
    if result["by_length"]:
        print(f"\nloss of the last {targets} tokens after a context of")
    else:
        print("\nloss by length of the context: left out, the validation text is too short")
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
    if result["repeats"]:
        print("\nloss of a repeated string (of the same string, not repeated)")
    else:
        print("\nloss of a repeated string: left out, a window is too short for two of them")
    for row in result["repeats"]:
        times = limited(math.exp(min(50, row["once"] - row["again"])), ",.1f")
        print(
            f"  {row['text']:>6}, after {row['gap']:<4} {row['again']:8.4f}  ({row['once']:.4f})"
            f"  a probability {times} times as large"
        )


def show_wikitext(result):
    """Print the table of `wikitext`."""
    print(
        f"\n{result['file']}: {result['articles']:,} articles, {result['words']:,} words, "
        f"{result['bytes']:,} bytes, {result['tokens']:,} of this model's tokens\n"
        f"detokenizer: {result['detokenizer']}\n"
        f"{'context':<34}{'per word':>12}{'bits/byte':>12}{'nats/token':>12}"
    )
    for row in result["by_context"]:
        perplexity = limited(row["word_perplexity"], ",.2f")
        print(
            f"{row['context']:<34}{perplexity:>12}{row['bits_per_byte']:>12.4f}{row['nats']:>12.4f}"
        )


def show_minimal_pairs(rows):
    """Print the table of `minimal_pairs`."""
    print(f"\n{'the grammatical sentence is likelier':<38}{'pairs':>6}{'share':>17}")
    for row in rows:
        share = f"{row['accuracy']:.1%} ± {row['error']:.1%}"
        print(f"{row['phenomenon']:<38}{row['pairs']:>6}{share:>17}")


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


def write_json(path, result):
    """Write the numbers, before anything is printed: the output may fail."""
    if path:
        write_whole(Path(path), json.dumps(result, indent=1).encode())


def main(argv=None):
    """Evaluate; returns the exit code."""
    args = make_parser().parse_args(argv)
    # PyTorch takes a second to import, which --help does not wait for
    from engine.checkpoint import find_checkpoint, load_model
    from engine.evaluation import TARGETS, evaluation
    from engine.losses import TOKENS_AT_ONCE, Losses
    from gravity.trial import computes

    if args.minimal_pairs and args.wikitext is not None:
        raise UsageError("--wikitext and --minimal-pairs exclude each other: run them one by one")
    if args.stride is not None and args.wikitext is None:
        raise UsageError("--stride needs --wikitext: add it")
    if min(args.context_lengths) < TARGETS:
        raise UsageError(
            f"--context-lengths {min(args.context_lengths)}: give at least {TARGETS}, since the "
            f"loss is that of the last {TARGETS} tokens"
        )
    path = find_checkpoint(args.checkpoint_path)
    model, tokenizer, checkpoint = load_model(path, choose_device(args.device, computes))
    choose_threads(args.threads, model, TOKENS_AT_ONCE)
    result = {"checkpoint": str(path), "step": checkpoint.get("iter")}
    if args.minimal_pairs:
        from engine.minimal_pairs import minimal_pairs

        losses = Losses(model, checkpoint["config"])
        result["minimal_pairs"] = minimal_pairs(losses, tokenizer)
        write_json(args.json, result)
        show_minimal_pairs(result["minimal_pairs"])
        return 0
    if args.wikitext is not None:
        from engine.wikitext import find_wikitext, wikitext

        file, block_size = find_wikitext(args.wikitext), model.config.block_size
        if args.stride is not None and args.stride > block_size:
            raise UsageError(
                f"--stride {args.stride}: a window has {block_size} tokens, give at most as many"
            )
        losses = Losses(model, checkpoint["config"])
        result |= wikitext(losses, tokenizer, file, block_size, args.stride)
        write_json(args.json, result)
        show_wikitext(result)
        return 0
    result |= evaluation(
        *(model, tokenizer, checkpoint),
        *(args.context_lengths, args.num_windows, args.long_range),
    )
    write_json(args.json, result)
    show(result, TARGETS)
    if args.long_range:
        show_long_range(result["long_range"])
    return 0


if __name__ == "__main__":
    run_script(main)
