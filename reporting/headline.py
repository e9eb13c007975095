"""The headline of a study: models of one size, compared with the strongest control among them."""

import math
import statistics

from engine.flops import training_flops
from engine.models import weightless_model
from reporting.runs import NOT_RUN, label_of, loss_or_worst, mean
from system.durations import duration
from system.markdown import markdown_table, markdown_text


def by_model(runs):
    """Headline runs by their label, the control first; each list in order of the seeds.

    Runs of one label belong together even if a later version of this program added settings to
    the configurations of some.
    """
    found = {}
    for run in runs:
        found.setdefault(label_of(run.config), []).append(run)
    for same in found.values():
        same.sort(key=lambda run: run.config["seed"])
    return dict(sorted(found.items(), key=lambda item: _strength(item[1][0].config), reverse=True))


def _strength(config):
    """Sort key of a model as a control: the strongest vanilla transformer is the largest."""
    vanilla = config["model"] == "vanilla"
    recipe = config.get("recipe", "gpt2")
    return vanilla, recipe != "gpt2", bool(config.get("sink")), config.get("pos") == "rotary"


def baseline(headline):
    """The headline runs that others are compared with: the first ones, if they are vanilla's."""
    first = next(iter(headline.values()), [])
    return first if first and first[0].config["model"] == "vanilla" else []


def unfinished(run):
    """Text such as (step 300 of 1,000) if a run has not reached its last step, else none."""
    step, steps = run.rows[-1]["step"], run.config["max_steps"]
    return f" (step {step:,} of {steps:,})" if step < steps else ""


def paired(runs, others, key):
    """Pairs of values at the last common step of two runs, for each seed that both models have.

    Runs of one seed read the same batches, so their difference has less noise than that of means.
    """
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


def headline_table(headline):
    head = ["model", "parameters", "seeds", "val loss", "perplexity", "bits per byte"]
    head += [
        "perplexity / control, paired",
        "p",
        "perplexity / rotary gpt2",
        "tokens/s",
        "training time",
    ]
    plain = next((runs for label, runs in headline.items() if label == "vanilla (rotary)"), [])
    lines = []
    for label, runs in headline.items():
        last = [run.rows[-1] for run in runs]
        ratios, to_plain = (
            [a / b for a, b in paired(runs, others, "perplexity")]
            for others in (baseline(headline), plain)
        )
        lines.append(
            [
                label + "".join({unfinished(run) for run in runs}),
                f"{runs[0].config['parameters']:,}",
                ", ".join(str(run.config["seed"]) for run in runs),
                mean([row["val_loss"] for row in last], ".4f"),
                mean([row["perplexity"] for row in last], ".2f"),
                mean([row.get("bits_per_byte") for row in last], ".4f"),
                mean(ratios, ".4f") if ratios else "",
                _p_value(ratios),
                mean(to_plain, ".4f") if to_plain else "",
                mean([run.median("tokens_per_s") for run in runs], ",.0f"),
                duration(statistics.mean(row["wall_time"] for row in last)),
            ]
        )
    if not lines:
        return f"{NOT_RUN}."
    note = (
        f"The control is {markdown_text(next(iter(headline)))}. p: two-sided, of a paired t-test "
        "that the logarithm of the ratio is 0, for three seeds."
    )
    return f"{markdown_table(head, lines)}\n\n{note}"


def _p_value(ratios):
    """The p-value of a paired t-test on three ratios, as text; empty for another number of them.

    With two degrees of freedom Student's distribution has a closed form,
    P(|T| > t) = 1 - t / sqrt(2 + t^2).
    """
    if len(ratios) != 3 or len(set(ratios)) == 1:
        return ""
    logs = [math.log(ratio) for ratio in ratios]
    t = abs(statistics.mean(logs)) / (statistics.stdev(logs) / math.sqrt(3))
    return f"{1 - t / math.sqrt(2 + t * t):.2g}"


def cost_table(headline):
    """What each model needs to reach the last loss of the baseline's run of the same seed."""
    control = {run.config["seed"]: run for run in baseline(headline)}
    if not control:
        return f"{NOT_RUN}: there is no control to compare with."
    head = ["model", "steps to the control's last loss", "of its training time", "of its flops"]
    head += ["loss after the control's time"]
    lines = []
    for label, runs in headline.items():
        steps, times, flops, losses = [], [], [], []
        for run in runs:
            other = control.get(run.config["seed"])
            if other is None:
                continue
            end = other.rows[-1]
            within = run.within(end["wall_time"])
            losses += [within["val_loss"]] if within else []
            reached = next(
                (r for r in run.rows if loss_or_worst(r) <= loss_or_worst(end) < math.inf), None
            )
            if reached is None:
                continue
            # flops and not steps alone: the models' steps cost differently
            steps.append(reached["step"])
            times.append(reached["wall_time"] / end["wall_time"])
            cost = training_flops(_model_of(run.config), reached["tokens"])
            flops.append(cost / training_flops(_model_of(other.config), end["tokens"]))
        lines.append(
            [
                label,
                mean(steps, ",.0f") if steps else "never",
                mean(times, ".2f") if times else "never",
                mean(flops, ".2f") if flops else "never",
                mean(losses, ".4f") if losses else "",
            ]
        )
    note = (
        "The first evaluation at or below the last loss of the baseline with the same seed. A "
        "model that gets there early has not decayed its learning rate as far, which is a "
        "disadvantage."
    )
    return f"{markdown_table(head, lines)}\n\n{note}"


def _model_of(config):
    """The model of a run's config, without memory for its weights."""
    return weightless_model(config | {"model_type": config["model"]})
