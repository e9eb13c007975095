"""Writes the report of run_study.sh: one table per question, every number from the runs' files."""

import statistics
from pathlib import Path

from reporting.evaluations import length_table, read_evaluation, what_is_far, where_it_wins
from reporting.geometry import geometry_section
from reporting.headline import baseline, by_model, cost_table, headline_table, paired, unfinished
from reporting.runs import (
    NOT_RUN,
    PER_RUN,
    all_values,
    find_runs,
    left_out,
    loss_or_worst,
    mean,
    same_conditions,
)
from system.durations import duration
from system.errors import UserError
from system.files import write_whole
from system.markdown import markdown_block, markdown_code, markdown_table, markdown_text
from system.safe_text import one_line

STAGES = ("rates", "ablations", "sketches", "ablations_before", "headline", "full", "sizes")
# settings that differ between an ablation and its default for other reasons
NOT_A_CHANGE = PER_RUN | {
    *("parameters", "mlp_dim", "source", "vocab_size", "model_type", "deterministic")
}


def write_study(output, name):
    """Write the study of `runs/<name>/` as Markdown, with its pictures beside it.

    Raises:
        UserError: if it has no run yet, or if a file of a run is damaged.
    """
    stages = {stage: _stage(name, stage) for stage in STAGES}
    runs = [run for found in stages.values() for run in found]
    if not runs:
        raise UserError(f"--study: there is no run below runs/{name}: start with run_study.sh")
    headline = by_model(stages["headline"])
    evaluations = _evaluations(headline, [*stages["full"], *stages["ablations"]])
    parts = [
        *_introduction(runs, name, output),
        *_notes(name),
        *("## Headline", headline_table(headline)),
        *(_curves_and_cost(output, headline) if headline else []),
        *("## Learning rates", _rate_table(stages["rates"])),
        *("## Ablations", _ablation_table(stages["ablations"])),
        *("### Sketches, one seed each", _ablation_table(stages["sketches"])),
        *(
            "### Of the law before, without a background",
            _ablation_table(stages["ablations_before"]),
        ),
        *("### In full", _full_table(stages["full"], headline)),
        *("## Other sizes", _size_table(stages["sizes"])),
        *("## Past its training length", length_table(evaluations)),
        *(_lengths_picture(output, evaluations) if evaluations else []),
        *("## Is what is far used?", *what_is_far(evaluations)),
        *("## Where each wins", *where_it_wins(evaluations)),
        *("## What the geometry learned", *_geometry(headline, stages["ablations"])),
        *("## Commands", _commands(runs)),
    ]
    write_whole(output, "\n\n".join(parts) + "\n")


def _notes(name):
    """What `runs/<name>/notes.md` says, which no table can; nothing if there is no such file."""
    path = Path("runs") / name / "notes.md"
    return [path.read_text(encoding="utf-8").strip()] if path.exists() else []


def _stage(name, stage):
    """The runs of one stage of the study; an empty list if it has none yet."""
    has_runs = any((Path("runs") / name / stage).glob("*/config.json"))
    return find_runs([f"{name}/{stage}"]) if has_runs else []


def _short(run):
    """The last part of a run's name."""
    return one_line(run.name.split("/")[-1])


def _evaluations(headline, others):
    """What evaluate.py wrote, by the label of the run: the first seed of a model, and others."""
    labels = {label: runs[0] for label, runs in headline.items()}
    labels |= {f"{_short(run)}, {run.rows[-1]['step']:,} steps": run for run in others}
    # runs that were not evaluated are left out
    found = {label: read_evaluation(run) for label, run in labels.items()}
    return {label: evaluation for label, evaluation in found.items() if evaluation}


def _introduction(runs, name, output):
    def values(key):
        return markdown_text(all_values(runs, key))

    command = f"python report.py --study {name} --output {output}"
    trained = duration(sum(run.rows[-1]["wall_time"] for run in runs))
    return [
        f"# The study {markdown_code(name)}: gravity against dot-product attention",
        f"**Corpus:** {values('source')}, SHA-256 "
        f"{markdown_code(all_values(runs, 'source_sha256'))}. **Machine:** {values('machine')}. "
        f"**Commits:** {values('code_version')}. **Cost:** {len(runs)} runs, {trained} of training "
        "in all, each on the threads named.",
        f"Written by {markdown_code(command)} from the runs' own files. Losses are nats per token "
        "on fixed validation windows; ± is the standard deviation over seeds; a paired difference "
        "is taken between runs of the same seed, which read the same batches. The commands of all "
        "runs are at the end.",
    ]


def _curves_and_cost(output, headline):
    from reporting.plots import curves_png, curves_to_draw  # takes a second to import

    write_whole(output.with_suffix(".png"), curves_png(curves_to_draw(headline)))
    return [f"![validation loss]({output.stem}.png)", "### At equal cost", cost_table(headline)]


def _lengths_picture(output, evaluations):
    from reporting.plots import lengths_png  # takes a second to import

    picture = lengths_png({label: found["by_length"] for label, found in evaluations.items()})
    write_whole(output.with_name(f"{output.stem}_lengths.png"), picture)
    return [f"![loss by context]({output.stem}_lengths.png)"]


def _geometry(headline, ablations):
    """A section for every NGT of the headline, and for ablations with the soft cutoff."""
    runs = [(label, found[0]) for label, found in headline.items()]
    runs += [
        (f"{_short(run)} (ablation)", run) for run in ablations if run.config.get("use_soft_cutoff")
    ]
    sections = [
        geometry_section(label, run.config) for label, run in runs if run.config["model"] == "ngt"
    ]
    return sections or [f"{NOT_RUN}."]


def _commands(runs):
    lines = []
    for run in runs:
        commit = str(run.config.get("code_version"))[:12]
        lines += [one_line(f"# {run.name}, commit {commit}"), run.command()]
    return markdown_block("\n".join(lines), "bash")


def _last(run, key, form):
    return mean([run.rows[-1][key]], form)


def _rate_table(runs):
    if not runs:
        return f"{NOT_RUN}."
    models = {}
    for run in runs:
        model = _short(run).rsplit("_", 1)[0]  # run_study.sh names these runs MODEL_RATE
        models.setdefault(model, {})[run.config["learning_rate"]] = run
    rates = sorted({rate for found in models.values() for rate in found})
    lines = []
    for model, found in models.items():
        best = min(found, key=lambda rate: loss_or_worst(found[rate].rows[-1]))
        shown = [
            _last(found[rate], "val_loss", ".4f") + unfinished(found[rate])
            if rate in found
            else NOT_RUN
            for rate in rates
        ]
        lines.append([model, all_values(found.values(), "max_steps"), *shown, f"{best:g}"])
    note = f"Validation loss, seed {all_values(runs, 'seed')}; no headline uses this seed."
    head = ["model", "steps", *(f"{rate:g}" for rate in rates), "best"]
    return f"{note}\n\n{markdown_table(head, lines)}"


def _change(config, default):
    """The settings in which a configuration differs from the default, as text."""
    # a setting that the default's commit did not have was off there
    names = [k for k in config if k not in NOT_A_CHANGE and config[k] != default.get(k, False)]
    return ", ".join(f"{name} {config.get(name)}" for name in names) or "none"


def _ablation_table(runs):
    names = {}  # by the name without its seed
    for run in runs:
        name = _short(run).removesuffix(f"_{run.config['seed']}")
        names.setdefault(name, []).append(run)
    defaults = names.get("default")
    if defaults is None:
        return f"{NOT_RUN}."
    head = ["name", "what changes", "parameters", "val loss", "perplexity", "seed", "difference"]
    head += ["repulsion", "tokens/s"]
    lines = []
    for name, same in sorted(names.items(), key=lambda item: _mean_difference(item[1], defaults)):
        last = [run.rows[-1] for run in same]
        differences = [a - b for a, b in paired(same, defaults, "val_loss")]
        timed = [run for run in same if same_conditions(run, defaults[0])]
        lines.append(
            [
                name + "".join({unfinished(run) for run in same}),
                _change(same[0].config, defaults[0].config),
                f"{same[0].config['parameters']:,}",
                mean([row["val_loss"] for row in last], ".4f"),
                mean([row["perplexity"] for row in last], ".2f"),
                ", ".join(str(run.config["seed"]) for run in same),
                ", ".join(f"{difference:+.4f}" for difference in differences),
                mean([row.get("repulsion") or 0 for row in last], ".4f"),
                mean([run.median("tokens_per_s") for run in timed], ",.0f") if timed else "",
            ]
        )
    note = (
        f"One change at a time from `default`, {defaults[0].config['max_steps']:,} steps, same "
        "batches. Difference: of the loss from the default's with the same seed; below 0 is better "
        "than the default. Repulsion: the energy of the final coordinates, which grows without "
        f"bound if they collapse. {markdown_text(left_out(runs, defaults[0]))}"
    )
    return f"{note}\n\n{markdown_table(head, lines)}"


def _mean_difference(runs, defaults):
    pairs = paired(runs, defaults, "val_loss")
    return statistics.mean(a - b for a, b in pairs) if pairs else 0.0


def _full_table(runs, headline):
    if not runs:
        return f"{NOT_RUN}."
    lines = []
    for run in runs:
        pairs = paired([run], baseline(headline), "perplexity")
        lines.append(
            [
                _short(run) + unfinished(run),
                run.config["seed"],
                _last(run, "val_loss", ".4f"),
                _last(run, "perplexity", ".2f"),
                mean([pairs[0][0] / pairs[0][1]], ".4f") if pairs else "",
            ]
        )
    return markdown_table(["name", "seed", "val loss", "perplexity", "perplexity / control"], lines)


def _size_table(runs):
    if not runs:
        return f"{NOT_RUN}."
    head = ["run", "parameters", "tokens", "val loss", "perplexity", "tokens/s", "training time"]
    lines = [
        [
            _short(run) + unfinished(run),
            f"{run.config['parameters']:,}",
            f"{run.rows[-1]['tokens']:,}",
            _last(run, "val_loss", ".4f"),
            _last(run, "perplexity", ".2f"),
            *(
                (f"{run.median('tokens_per_s'):,.0f}", duration(run.rows[-1]["wall_time"]))
                if same_conditions(run, runs[0])
                else ("", "")
            ),
        ]
        for run in runs
    ]
    return f"{markdown_table(head, lines)}\n\n{markdown_text(left_out(runs, runs[0]))}".strip()
