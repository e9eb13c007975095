"""Reads the evaluation.json that evaluate.py wrote for a run, and makes tables of several."""

from pathlib import Path

from reporting.runs import LOSS, NOT_RUN, NUMBER, check_types, read_json
from system.markdown import markdown_table

SPAN = {"first": int, "last": int, "loss": NUMBER}
TABLES = {  # of an evaluation.json: the keys of a row and their types
    "by_length": {"context": int, "tokens": int, "loss": LOSS},
    "by_place": SPAN,
    "by_frequency": SPAN,
    "repeats": {"text": str, "gap": int, "again": NUMBER, "once": NUMBER},
}


def read_evaluation(run):
    """What evaluate.py wrote for a run, a dict; None if the run was not evaluated.

    Raises:
        UserError: if the file is not JSON or was written by another program.
    """
    path = Path("runs") / run.name / "evaluation.json"
    if not path.exists():
        return None
    remedy = "write it again with evaluate.py"
    found = read_json(path, remedy)
    check_types(found, dict.fromkeys(TABLES, list), path, remedy)
    for key, expected in TABLES.items():
        for row in found[key]:
            check_types(row, expected, f"{path}, {key}", remedy)
    return found


def length_table(evaluations):
    """Markdown: loss by length of the context.

    Args:
        evaluations: what `read_evaluation` returned, by the label of the run.
    """
    if not evaluations:
        return f"{NOT_RUN}."
    tokens = [row["tokens"] for found in evaluations.values() for row in found["by_length"]]
    if not tokens:
        return f"{NOT_RUN}: the validation text is too short."
    note = (
        f"Loss of the same {tokens[0]:,} tokens after contexts of several lengths; empty if the "
        "context is longer than the positions that the model has learned."
    )
    table = _table(evaluations, "by_length", "context", lambda row: f"{row['context']:,}")
    return f"{note}\n\n{table}"


def where_it_wins(evaluations):
    """Markdown, in parts: loss by place, by frequency of the token, and on repeated text."""
    if not evaluations:
        return [f"{NOT_RUN}."]

    def span(row):
        return f"{row['first']:,} to {row['last']:,}"

    def repeated(row):
        return f"{row['text']}, after {row['gap']}"

    return [
        "### By place in the window",
        _table(evaluations, "by_place", "place", span),
        "### By the token's rank in the training text",
        _table(evaluations, "by_frequency", "rank", span),
        "### On repeated text",
        "Loss of a string of real text (20 tokens), or of random ids, that is repeated after this "
        "many tokens; the second table has the loss of the same string without the repetition.",
        _table(evaluations, "repeats", "repeated", repeated, "again"),
        _table(evaluations, "repeats", "not repeated", repeated, "once"),
    ]


def _table(evaluations, key, title, name_of, value="loss"):
    """Markdown: a line for each row of evaluate.py's table `key`, a column for each model."""
    rows = {}  # a model may lack rows that another has: its block size may be smaller
    for label, evaluation in evaluations.items():
        for row in evaluation[key]:
            rows.setdefault(name_of(row), {})[label] = row[value]
    lines = []
    for name, found in rows.items():
        values = [found.get(label) for label in evaluations]
        lines.append([name, *("" if v is None else f"{v:.4f}" for v in values)])
    return markdown_table([title, *evaluations], lines)
