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
ANSWER = {"gain": LOSS, "error": LOSS, "exact": LOSS}
LONG_RANGE = {  # of its long_range, which evaluate.py --long-range adds
    "passkey": {"distance": int, **ANSWER},
    "phone_book": {"names": int, **ANSWER},
    "repeats": {"distance": int, "share": LOSS, **ANSWER},
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
    _check_rows(found, TABLES, path, remedy)
    if "long_range" in found:
        check_types(found["long_range"], {"trials": int}, path, remedy)
        _check_rows(found["long_range"], LONG_RANGE, f"{path}, long_range", remedy)
    return found


def _check_rows(found, tables, path, remedy):
    check_types(found, dict.fromkeys(tables, list), path, remedy)
    for key, expected in tables.items():
        for row in found[key]:
            check_types(row, expected, f"{path}, {key}", remedy)


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
        _table(
            evaluations, "repeats", "repeated", repeated, lambda row: _four_digits(row, "again")
        ),
        _table(
            evaluations, "repeats", "not repeated", repeated, lambda row: _four_digits(row, "once")
        ),
    ]


def what_is_far(evaluations):
    """Markdown, in parts: what a model gains from an answer that stood far back in the text.

    Models that were evaluated without --long-range are left out.
    """
    found = {label: e["long_range"] for label, e in evaluations.items() if "long_range" in e}
    if not found:
        return [f"{NOT_RUN}: evaluate.py --long-range."]
    trials = ", ".join(sorted({f"{far['trials']:,}" for far in found.values()}))

    def table(key, title, size, share):
        if not any(far[key] for far in found.values()):
            return f"{NOT_RUN}: the text is too short, or its vocabulary cannot spell the question."

        def shown(row):
            if row["gain"] is None:
                return ""
            error = "" if row["error"] is None else f" ± {row['error']:.3f}"
            in_brackets = "" if row[share] is None else f" ({row[share]:.1%})"
            return f"{row['gain']:+.3f}{error}{in_brackets}"

        return _table(found, key, title, lambda row: f"{row[size]:,}", shown)

    return [
        "Gain: nats per token by which the answer is likelier if the text gave it than if the same "
        f"text gave another or none; ± is the standard error over {trials} trials. A gain of 0 "
        "means that what was far had no effect. Empty if the text is longer than the positions "
        "that the model has learned.",
        "### A pass key",
        "Five digits named in one sentence and asked for after so many tokens of real text; in "
        "brackets how often greedy decoding finds all five.",
        table("passkey", "tokens between", "distance", "exact"),
        "### A phone book",
        "One of so many numbers of five digits, asked for by name; in brackets how often greedy "
        "decoding finds all five.",
        table("phone_book", "names", "names", "exact"),
        "### A string that comes again",
        "Twenty tokens of real text that come again so many tokens after their first start; in "
        "brackets the share of the gain at the shortest distance, if that gain is more than two "
        "standard errors.",
        table("repeats", "after", "distance", "share"),
    ]


def _four_digits(row, key="loss"):
    return "" if row[key] is None else f"{row[key]:.4f}"


def _table(evaluations, key, title, name_of, shown=_four_digits):
    """Markdown: a line for each row of evaluate.py's table `key`, a column for each model.

    Args:
        name_of, shown: take a row and return the text of its first cell, and of a model's cell.
    """
    rows = {}  # a model may lack rows that another has: its block size may be smaller
    for label, evaluation in evaluations.items():
        for row in evaluation[key]:
            rows.setdefault(name_of(row), {})[label] = shown(row)
    lines = [
        [name, *(found.get(label, "") for label in evaluations)] for name, found in rows.items()
    ]
    return markdown_table([title, *evaluations], lines)
