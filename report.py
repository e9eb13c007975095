"""Print one table over finished runs, from the files they left under runs/."""

import json
from pathlib import Path

from errors import UserError, run_script
from metrics import read_metrics
from options import script_parser

EXAMPLES = """examples:
  python report.py --runs shakespeare_vanilla shakespeare
"""


def load_run(directory):
    """`(config, rows)` of a run.

    Raises:
        UserError: where there is no such run, or it has no evaluation yet.
    """
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        rows = read_metrics(directory / "metrics.jsonl")
    except (OSError, ValueError) as error:
        raise UserError(f"--runs: {directory} is no run ({error}): train it first") from None
    if not rows:
        raise UserError(f"--runs: {directory} has no evaluation yet: train it further")
    return config, rows


def table(runs):
    """Lines of a table: one a run, its last evaluation, medians of the speeds."""
    head = ("model", "parameters", "step", "val loss", "perplexity", "steps/s", "tokens/s")
    lines = [head]
    for config, rows in runs:
        last = rows[-1]
        speeds = sorted(row["steps_per_s"] for row in rows)
        speed = speeds[len(speeds) // 2]
        kind = config["pos"] if config["model"] == "vanilla" else config["law"]
        lines.append(
            (
                f"{config['model']} ({kind})",
                f"{config['parameters']:,}",
                f"{last['step']:,}",
                f"{last['val_loss']:.4f}",
                f"{last['perplexity']:.3f}",
                f"{speed:.1f}",
                f"{speed * last['tokens'] / last['step']:,.0f}",
            )
        )
    widths = [max(len(line[n]) for line in lines) for n in range(len(head))]
    return [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]


def main(argv=None):
    """Print the table; returns the exit code."""
    parser = script_parser(__doc__, EXAMPLES)
    parser.add_argument("--runs", nargs="+", required=True, help="names of directories under runs/")
    args = parser.parse_args(argv)
    runs = [load_run(Path("runs") / name) for name in args.runs]
    print("\n".join(table(runs)))
    for source in dict.fromkeys(config["source"] for config, _ in runs):
        print(f"text: {source}")
    for name, (config, _) in zip(args.runs, runs, strict=True):
        command = " ".join(["python", *config["command"]])
        print(f"{name}: {config['machine']}, seed {config['seed']}, {command}")
    return 0


if __name__ == "__main__":
    run_script(main)
