"""Files of rows: the `text` of each line of a .jsonl file, of each row of a .parquet table."""

import hashlib
import json
from pathlib import Path

from system.errors import UserError
from system.safe_text import short_reason, shown_short
from text.stream import OPENERS, plain_text, read_blocks, sha256_of

BLOCK_CHARS = 1 << 20
LONGEST_LINE = 1 << 24  # characters; parsing a malicious line takes up to 50 bytes for each
ROWS_AT_ONCE = 64  # of a table
SHOWN_COLUMNS = 8
TEXT_TYPES = ("string", "large_string", "string_view", "null")  # null: no row has a value


def read_file(path, changed=None):
    """Yield the `plain_text` of a text file, or of the rows of a file of rows, block after block.

    A newline follows each row that does not end in one. A row whose text is null is left out.

    Args:
        path: a `Path`.
        changed: as for `plain_text`.

    Raises:
        UserError: if it is unreadable, damaged, no file of its format, or holds only white space.
    """
    if not has_rows(path):
        yield from read_blocks(path, changed)
        return
    block, size, is_empty = [], 0, True
    for place, text in _table_rows(path) if path.suffix == ".parquet" else _json_rows(path):
        if text is None:
            continue
        if not isinstance(text, str):
            raise UserError(
                f"{path}, {place}: its `text` is {shown_short(text)}, not text: correct or "
                "remove it"
            )
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{path}, {place}: its `text` holds half a character (a lone surrogate): correct "
                "or remove it"
            ) from None
        text = plain_text(text, changed)
        is_empty = is_empty and not text.strip()
        block.append(text if text.endswith("\n") or not text else f"{text}\n")
        size += len(text)
        if size >= BLOCK_CHARS:
            yield "".join(block)
            block, size = [], 0
    if block:
        yield "".join(block)
    if is_empty:
        raise UserError(f"{path} is empty: give a file with text in it")


def read_files(paths, changed=None):
    """Yield `read_file` of one file after the other; a newline ends each that another follows."""
    last = "\n"
    for path in paths:
        if not last.endswith("\n"):
            yield "\n"
        for block in read_file(path, changed):
            yield block
            last = block or last


def has_rows(path):
    """Whether a file is named as one of rows: .parquet, or .jsonl, which may be packed."""
    name = path.with_suffix("") if path.suffix in OPENERS else path
    return path.suffix == ".parquet" or name.suffix == ".jsonl"


def sha256_of_texts(*paths):
    """As `sha256_of`; another one for files of rows, which earlier versions read as plain text."""
    digest = sha256_of(*paths)
    if any(has_rows(Path(path)) for path in paths):
        return hashlib.sha256(f"rows of {digest}".encode()).hexdigest()
    return digest


def _json_rows(path):
    """Yield `(place, text)` of every line that is not blank."""
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", None) or short_reason(error)
            raise UserError(
                f"{path}, line {number}: it is no JSON ({reason}): correct or remove it"
            ) from None
        if not isinstance(row, dict) or "text" not in row:
            raise UserError(
                f"{path}, line {number}: it has no `text`: give every line the form "
                '{"text": "..."}'
            )
        yield f"line {number}", row["text"]


def _lines(path):
    rest, number = "", 1
    for block in read_blocks(path):
        *lines, rest = (rest + block).split("\n")
        yield from lines
        number += len(lines)
        if len(rest) > LONGEST_LINE:
            raise UserError(
                f"{path}, line {number}: it has more than {LONGEST_LINE:,} characters: cut it "
                "into several"
            )
    yield rest


def _table_rows(path):
    """Yield `(place, text)` of every row of a Parquet table, of which only a part is in memory."""
    import pyarrow.parquet  # takes half a second to import, and few texts need it

    try:
        with open(path, "rb") as file:
            table = pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
            _check_column(path, table.schema_arrow)
            number = 0
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield f"row {number}", text
    except UnicodeDecodeError:
        raise UserError(
            f"{path}, rows {number + 1} to {number + ROWS_AT_ONCE}: a `text` is not UTF-8: "
            "write the table again"
        ) from None
    except (pyarrow.ArrowException, OSError, ValueError, LookupError) as error:
        raise UserError(
            f"{path} is no Parquet table, or damaged ({short_reason(error)}): get it again, or "
            "move it away"
        ) from None


def _check_column(path, schema):
    if schema.names.count("text") != 1:
        names = ", ".join(shown_short(name) for name in schema.names[:SHOWN_COLUMNS])
        raise UserError(
            f"{path} has no single `text` column, but {names or 'none at all'}: rename the one "
            "that holds the text"
        )
    kind = schema.field("text").type
    kind = str(getattr(kind, "value_type", kind)) if str(kind).startswith("dict") else str(kind)
    if kind not in TEXT_TYPES:
        raise UserError(
            f"{path}: its `text` column holds {kind[:40]}, not text: write the text as strings"
        )
