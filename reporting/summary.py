"""Writes the report of a group of runs: Markdown, CSV, a picture and an interactive page."""

import csv
import io
import json
import shlex
from pathlib import Path

from reporting.geometry import geometry_section
from reporting.runs import NOT_RUN, Run, all_values, label_of, of_one_machine
from reporting.tables import result_table, setting_text, settings_table, speed_table
from system.durations import duration
from system.errors import UserError
from system.files import write_whole
from system.markdown import markdown_block, markdown_code, markdown_table, markdown_text
from system.safe_text import one_line


def write_report(output, names, variants, reference):
    """Write the report and, beside it under the same name, .csv, .png and .html.

    Args:
        output: path of the .md file.
        names: what the user gave to --runs.
        variants: these runs, grouped; at least one of them was run.
        reference: path of a file of published figures, or None.

    Raises:
        UserError: if `reference` cannot be used or a file cannot be written.
    """
    from reporting.plots import curves_png, curves_to_draw, page_of_curves  # takes a second

    runs = [run for v in variants for run in v.runs]
    timed, sentence = of_one_machine(variants)
    why = [markdown_text(sentence)] if sentence else []
    title = one_line(f"Report: {', '.join(names)}")
    parts = [
        f"# {markdown_text(title)}",
        *_introduction(runs, output, names, reference),
        *_result_tables(variants, timed),
        *why,
        *("## Speed and memory", "Medians over the evaluation intervals.", *why),
        speed_table(timed),
        *("## Curves", f"![validation loss]({output.stem}.png)"),
        f"Interactive: `{output.stem}.html`; every evaluation: "
        f"[{output.stem}.csv]({output.stem}.csv).",
        *("## Settings", settings_table(variants)),
        "## What the geometry learned",
        *(
            geometry_section(v.label, v.config)
            for v in variants
            if v.runs and v.config["model"] == "ngt"
        ),
        *([reference_section(reference)] if reference else []),
        *("## Commands", markdown_block("\n".join(run.command() for run in runs), "bash")),
        *(f"{markdown_text(v.label)}: {NOT_RUN}." for v in variants if not v.runs),
    ]
    curves = curves_to_draw({v.label: v.runs for v in variants})
    # the .md comes last: it links to the others
    for suffix, content in (
        (".html", page_of_curves(curves, title)),
        (".png", curves_png(curves)),
        (".csv", _csv(runs)),
        (output.suffix, "\n\n".join(parts) + "\n"),
    ):
        write_whole(output.with_suffix(suffix), content)


def _introduction(runs, output, names, reference):
    def values(key):
        return markdown_text(all_values(runs, key))

    steps = ", ".join(f"{run.name} {run.rows[-1]['step']:,}" for run in runs)
    tokens = max(run.rows[-1]["tokens"] for run in runs)
    command = ["python", "report.py", "--runs", *names]
    command += ["--reference", str(reference)] if reference else []
    return [
        f"**Corpus:** {values('source')}. **Steps:** {markdown_text(steps)} (of "
        f"{values('max_steps')} planned), up to {tokens:,} tokens each. **Machine:** "
        f"{values('machine')}. **Seed:** {values('seed')}. **Commit:** {values('code_version')}.",
        f"Written by {markdown_code(shlex.join([*command, '--output', str(output)]))} from the "
        "runs' own files. "
        "`ratio` is the perplexity divided by that of the first line; training time is that of "
        "the steps, without evaluations; losses are nats per token on fixed validation windows.",
    ]


def _result_tables(variants, timed):
    runs = [run for v in variants for run in v.runs]
    # runs may be evaluated at different intervals, or be unfinished
    common = set.intersection(*({row["step"] for row in run.rows} for run in runs))
    shortest = min(run.rows[-1]["wall_time"] for v in timed for run in v.runs)
    if common:
        equal_steps = result_table(variants, lambda run: run.at_step(max(common)))
    else:
        equal_steps = "The runs were never evaluated at the same step."
    return [
        *("## At equal steps", equal_steps),
        *("## At each one's best", result_table(variants, Run.best)),
        f"## At equal training time ({duration(shortest)})",
        result_table(timed, lambda run: run.within(shortest)),
    ]


def reference_section(path):
    """Markdown: a table of figures that others published, marked as theirs.

    Raises:
        UserError: if the file is missing or not in the form of reports/first_release.json.
    """
    try:
        reference = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        head = list(reference["rows"][0])
        lines = [[row[key] for key in head] for row in reference["rows"]]
        title, setting = reference["title"], reference["setting"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"--reference {path} cannot be used ({error}): name a file in the form of "
            "reports/first_release.json"
        ) from None
    lines = [[setting_text(value) for value in line] for line in lines]
    return (
        f"## {markdown_text(title)}\n\nNot measured here, and not comparable with the tables above "
        f"unless the setting is the same: {markdown_text(setting)} (from {markdown_code(path)})."
        f"\n\n{markdown_table(head, lines)}"
    )


def _csv(runs):
    # runs of different versions may log different values
    columns = list(dict.fromkeys(key for run in runs for row in run.rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, ["run", "model", "seed", *columns], lineterminator="\n")
    writer.writeheader()
    for run in runs:
        same = {
            "run": one_line(run.name),
            "model": label_of(run.config),
            "seed": run.config["seed"],
        }
        writer.writerows(same | row for row in run.rows)
    return text.getvalue()
