"""The report of run_study.sh: one table a question, every number from the runs' own files."""

import io
import math
import statistics
from pathlib import Path

import torch

from engine.flops import training_flops
from engine.models import build_model
from reporting.geometry import geometry_section
from reporting.runs import (
    NOT_RUN,
    all_values,
    find_runs,
    label_of,
    loss_or_worst,
    mean,
    read_evaluation,
)
from system.durations import duration
from system.errors import UserError
from system.files import write_whole
from system.markdown import markdown_block, markdown_code, markdown_table, markdown_text
from system.safe_text import one_line, short_reason

BASELINE = "rotary"
STAGES = ("rates", "ablations", "headline", "full", "sizes")
MOST_LAYERS = 200
NOT_A_CHANGE = {
    *("seed", "checkpoint_path", "command", "code_version", "torch_version", "machine", "device"),
    *("parameters", "mlp_dim", "source", "token_directory", "data_path", "compile"),
    *("eval_interval", "checkpoint_interval", "vocab_size", "model_type", "deterministic"),
}


def write_study(output, name):
    """Write the study of `runs/<name>/` as Markdown, with its pictures beside it.

    Raises:
        UserError: where nothing of it was run.
    """
    from reporting.plots import (
        save_lengths_png,  # a second to import
        save_png,  # a second to import
    )

    stages = {stage: _stage(name, stage) for stage in STAGES}
    runs = [run for found in stages.values() for run in found]
    if not runs:
        raise UserError(f"--study: there is no run below runs/{name}: start with run_study.sh")
    headline = _by_model(stages["headline"])
    configs = [run.config for run in runs]
    evaluations = {label: read_evaluation(found[0]) for label, found in headline.items()}
    evaluations |= {
        f"{_short(run)}, {run.rows[-1]['step']:,} steps": read_evaluation(run)
        for run in (*stages["full"], *stages["ablations"])
    }
    evaluations = {label: found for label, found in evaluations.items() if found}

    def values(key):
        return markdown_text(all_values(configs, key))

    parts = [
        f"# The study {markdown_code(name)}: gravity against dot-product attention",
        f"**Corpus:** {values('source')}, SHA-256 "
        f"{markdown_code(all_values(configs, 'source_sha256'))}. **Machine:** "
        f"{values('machine')}. **Commits:** {values('code_version')}. "
        f"**Cost:** {len(runs)} runs, "
        f"{duration(sum(run.rows[-1]['wall_time'] for run in runs))} of training in all, each on "
        "the threads named.",
        f"Written by {markdown_code(f'python report.py --study {name} --output {output}')} from "
        "the runs' own files. Losses are nats a token on fixed validation windows; ± is the "
        "standard deviation over seeds; a paired difference is taken between runs of the same "
        "seed, which read the same batches. Commands of all runs stand at the end.",
        "## Headline",
        _headline_table(headline),
    ]
    if stages["headline"]:
        curves = [(label, run.name, run.rows) for label, rs in headline.items() for run in rs]
        picture = io.BytesIO()
        save_png(picture, curves)
        write_whole(output.with_suffix(".png"), picture.getvalue())
        parts.append(f"![validation loss]({output.stem}.png)")
        parts += ["### At equal cost", _cost_table(headline)]
    parts += ["## Learning rates", _rate_table(stages["rates"])]
    parts += ["## Ablations", _ablation_table(stages["ablations"])]
    parts += ["### In full", _full_table(stages["full"], headline)]
    parts += ["## Other sizes", _size_table(stages["sizes"])]
    parts += ["## Past its training length", _length_table(evaluations)]
    if evaluations:
        picture = io.BytesIO()
        save_lengths_png(picture, {label: e["by_length"] for label, e in evaluations.items()})
        write_whole(output.with_name(f"{output.stem}_lengths.png"), picture.getvalue())
        parts.append(f"![loss by context]({output.stem}_lengths.png)")
    parts += ["## Where each wins", *_where_it_wins(evaluations)]
    parts.append("## What the geometry learned")
    parts += [
        geometry_section(label, found[0].config)
        for label, found in headline.items()
        if found[0].config["model"] == "ngt"
    ] + [
        geometry_section(f"{_short(run)} (ablation)", run.config)
        for run in stages["ablations"]
        if run.config["model"] == "ngt" and run.config.get("use_soft_cutoff")
    ] or [f"{NOT_RUN}."]
    parts.append("## Commands")
    commands = [
        one_line(f"# {run.name}, commit {str(run.config.get('code_version'))[:12]}")
        + "\n"
        + run.command()
        for run in runs
    ]
    parts.append(markdown_block("\n".join(commands), "bash"))
    write_whole(output, ("\n\n".join(parts) + "\n").encode())


def _stage(name, stage):
    try:
        return find_runs([f"{name}/{stage}"])
    except UserError:
        if any((Path("runs") / name / stage).glob("*/config.json")):
            raise
        return []


def _short(run):
    return one_line(run.name.split("/")[-1])


def _by_model(runs):
    """Headline runs by their label, the baseline first; each list in order of the seeds.

    Runs that run_study.sh names alike but for the seed belong together, whatever a later version
    of this program has added to their configurations.
    """
    found = {}
    for run in runs:
        found.setdefault(label_of(run.config), []).append(run)
    for same in found.values():
        same.sort(key=lambda run: run.config["seed"])
    return dict(sorted(found.items(), key=lambda item: BASELINE not in item[0]))


def _baseline(headline):
    return next((runs for label, runs in headline.items() if BASELINE in label), [])


def _last(run, key, form):
    return mean([run.rows[-1][key]], form)


def _unfinished(run):
    step, steps = run.rows[-1]["step"], run.config["max_steps"]
    return f" (step {step:,} of {steps:,})" if step < steps else ""


def _paired(runs, others, key):
    """`(run's, other's)` values at their last common step, for seeds that both have."""
    others = {run.config["seed"]: run for run in others}
    pairs = []
    for run in runs:
        other = others.get(run.config["seed"])
        if other is None:
            continue
        common = {row["step"] for row in run.rows} & {row["step"] for row in other.rows}
        if common:
            pairs.append((run.at_step(max(common))[key], other.at_step(max(common))[key]))
    return [pair for pair in pairs if None not in pair]


def _headline_table(headline):
    head = ["model", "parameters", "seeds", "val loss", "perplexity", "bits a byte"]
    head += ["perplexity / rotary, paired", "tokens/s", "training time"]
    lines = []
    for label, runs in headline.items():
        last = [run.rows[-1] for run in runs]
        ratios = [a / b for a, b in _paired(runs, _baseline(headline), "perplexity")]
        lines.append(
            [
                label + "".join({_unfinished(run) for run in runs}),
                f"{runs[0].config['parameters']:,}",
                ", ".join(str(run.config["seed"]) for run in runs),
                mean([row["val_loss"] for row in last], ".4f"),
                mean([row["perplexity"] for row in last], ".2f"),
                mean([row.get("bits_per_byte") for row in last], ".4f"),
                mean(ratios, ".4f") if ratios else "",
                mean([run.median("tokens_per_s") for run in runs], ",.0f"),
                duration(statistics.mean(row["wall_time"] for row in last)),
            ]
        )
    return markdown_table(head, lines) if lines else f"{NOT_RUN}."


def _model_of(config):
    """The model of a run's config, without memory for its weights.

    Raises:
        UserError: if the config describes no model that can be built.
    """
    try:
        if not 0 < config["num_layers"] <= MOST_LAYERS or config["block_size"] < 1:
            raise ValueError("num_layers or block_size is out of bounds")
        with torch.device("meta"):
            return build_model(config)
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError, UserError) as error:
        reason = short_reason(f"{type(error).__name__}: {error}")
        raise UserError(
            f"--study: the run of {config['checkpoint_path']} is of no model that can be built "
            f"({reason}): train it anew"
        ) from None


def _cost_table(headline):
    """What it takes each model to reach the loss at which the baseline ends, by seed."""
    baseline = {run.config["seed"]: run for run in _baseline(headline)}
    if not baseline:
        return f"{NOT_RUN}: there is no {BASELINE} run to compare with."
    head = ["model", "steps to rotary's last loss", "of its training time", "of its flops"]
    head += ["loss after rotary's time"]
    lines = []
    for label, runs in headline.items():
        steps, times, flops, losses = [], [], [], []
        for run in runs:
            other = baseline.get(run.config["seed"])
            if other is None:
                continue
            end = other.rows[-1]
            within = run.within(end["wall_time"])
            losses += [within["val_loss"]] if within else []
            there = next(
                (r for r in run.rows if loss_or_worst(r) <= loss_or_worst(end) < math.inf), None
            )
            if there is None:
                continue
            steps.append(there["step"])
            times.append(there["wall_time"] / end["wall_time"])
            cost = training_flops(_model_of(run.config), there["tokens"])
            flops.append(cost / training_flops(_model_of(other.config), end["tokens"]))
        never = "never"
        lines.append(
            [
                label,
                mean(steps, ",.0f") if steps else never,
                mean(times, ".2f") if times else never,
                mean(flops, ".2f") if flops else never,
                mean(losses, ".4f") if losses else "",
            ]
        )
    note = (
        "The first evaluation at or below the baseline's last loss, by seed. A model that is "
        "quicker has decayed its learning rate less by then, which counts against it."
    )
    return f"{markdown_table(head, lines)}\n\n{note}"


def _rate_table(runs):
    if not runs:
        return f"{NOT_RUN}."
    models = {}
    for run in runs:
        model = _short(run).rsplit("_", 1)[0]
        models.setdefault(model, {})[run.config["learning_rate"]] = run
    rates = sorted({rate for found in models.values() for rate in found})
    lines = []
    for model, found in models.items():
        best = min(found, key=lambda rate: loss_or_worst(found[rate].rows[-1]))
        shown = [
            _last(found[rate], "val_loss", ".4f") + _unfinished(found[rate])
            if rate in found
            else NOT_RUN
            for rate in rates
        ]
        lines.append([model, *shown, f"{best:g}"])
    seed = all_values([run.config for run in runs], "seed")
    steps = all_values([run.config for run in runs], "max_steps")
    note = f"Validation loss after {steps} steps, seed {seed}, which no other table has."
    return f"{note}\n\n{markdown_table(['model', *(f'{rate:g}' for rate in rates), 'best'], lines)}"


def _change(config, default):
    """What a run's configuration changes, in the flags' words."""
    names = [k for k in config if k not in NOT_A_CHANGE and config[k] != default.get(k)]
    return ", ".join(f"{name} {config.get(name)}" for name in names) or "none"


def _ablation_table(runs):
    default = next((run for run in runs if run.name.endswith("/default")), None)
    if default is None:
        return f"{NOT_RUN}."
    head = ["name", "what changes", "parameters", "val loss", "perplexity", "difference of loss"]
    head += ["repulsion", "tokens/s"]
    lines = []
    for run in sorted(runs, key=lambda run: loss_or_worst(run.rows[-1])):
        pairs = _paired([run], [default], "val_loss")
        lines.append(
            [
                _short(run) + _unfinished(run),
                _change(run.config, default.config),
                f"{run.config['parameters']:,}",
                _last(run, "val_loss", ".4f"),
                _last(run, "perplexity", ".2f"),
                f"{pairs[0][0] - pairs[0][1]:+.4f}" if pairs else "",
                f"{run.rows[-1].get('repulsion') or 0:.4f}",
                f"{run.median('tokens_per_s'):,.0f}",
            ]
        )
    note = (
        f"One change at a time from `default`, {default.config['max_steps']:,} steps, seed "
        f"{default.config['seed']}, same batches; below 0 is better than the default. One seed: "
        "runs of the default at other seeds say which differences mean anything. Repulsion: the "
        "energy of the final coordinates, which grows without bound where they collapse."
    )
    return f"{note}\n\n{markdown_table(head, lines)}"


def _full_table(runs, headline):
    if not runs:
        return f"{NOT_RUN}."
    lines = []
    for run in runs:
        pairs = _paired([run], _baseline(headline), "perplexity")
        lines.append(
            [
                _short(run) + _unfinished(run),
                run.config["seed"],
                _last(run, "val_loss", ".4f"),
                _last(run, "perplexity", ".2f"),
                f"{pairs[0][0] / pairs[0][1]:.4f}" if pairs else "",
            ]
        )
    return markdown_table(["name", "seed", "val loss", "perplexity", "perplexity / rotary"], lines)


def _size_table(runs):
    if not runs:
        return f"{NOT_RUN}."
    head = ["run", "parameters", "tokens", "val loss", "perplexity", "tokens/s", "training time"]
    lines = [
        [
            _short(run) + _unfinished(run),
            f"{run.config['parameters']:,}",
            f"{run.rows[-1]['tokens']:,}",
            _last(run, "val_loss", ".4f"),
            _last(run, "perplexity", ".2f"),
            f"{run.median('tokens_per_s'):,.0f}",
            duration(run.rows[-1]["wall_time"]),
        ]
        for run in runs
    ]
    return markdown_table(head, lines)


def _evaluated(evaluations, key, title, name_of, value="loss"):
    """A line a row of evaluate.py's, a column a model."""
    rows = {}
    for label, evaluation in evaluations.items():
        for row in evaluation[key]:
            rows.setdefault(name_of(row), {})[label] = row[value]
    lines = []
    for name, found in rows.items():
        values = [found.get(label) for label in evaluations]
        lines.append([name, *("" if v is None else f"{v:.4f}" for v in values)])
    return markdown_table([title, *evaluations], lines)


def _length_table(evaluations):
    if not evaluations:
        return f"{NOT_RUN}."
    tokens = [row["tokens"] for found in evaluations.values() for row in found["by_length"]]
    if not tokens:
        return f"{NOT_RUN}: the validation text is too short."
    note = (
        f"Loss of the same {tokens[0]:,} tokens after contexts of several lengths; "
        "empty where the model's positions end."
    )
    table = _evaluated(evaluations, "by_length", "context", lambda row: f"{row['context']:,}")
    return f"{note}\n\n{table}"


def _where_it_wins(evaluations):
    if not evaluations:
        return [f"{NOT_RUN}."]

    def span(row):
        return f"{row['first']:,} to {row['last']:,}"

    def repeated(row):
        return f"{row['text']}, after {row['gap']}"

    return [
        "### By place in the window",
        _evaluated(evaluations, "by_place", "place", span),
        "### By the token's rank in the training text",
        _evaluated(evaluations, "by_frequency", "rank", span),
        "### On what comes again",
        "Loss of a string of 20 tokens of real text, or of random ids, when it comes again after "
        "so many tokens; below it, where the same string comes once.",
        _evaluated(evaluations, "repeats", "comes again", repeated, "again"),
        _evaluated(evaluations, "repeats", "comes once", repeated, "once"),
    ]
