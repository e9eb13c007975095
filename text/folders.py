"""A folder of text files: which file belongs to which split."""

import hashlib
import json
import os
from pathlib import Path

from system.errors import UserError
from text.rows import sha256_of_texts

SPLITS = ("train", "valid", "test")
ENDS = (".txt", ".txt.xz", ".txt.gz", ".jsonl", ".jsonl.xz", ".jsonl.gz", ".parquet")
ONE_IN = 20  # files for validation, and as many for the test: 90/5/5
NAMES = {"train": "training", "valid": "validation", "test": "the test"}


def files_of_splits(folder, say):
    """The files of a folder, {split: sorted paths}.

    Files or folders named train.*, valid.* and test.* in it are the splits. If there is none, all
    files in it and its subfolders are divided 90/5/5, by a hash of their names, and `say` is called
    with a line about it.

    Raises:
        UserError: if a split has no file or several files claim to be it, or one is of no known
            format.
    """
    named = {}
    for split in SPLITS:
        found = sorted(p for p in folder.iterdir() if p.name.split(".")[0] == split)
        if len(found) > 1:
            raise UserError(f"--data-path {folder} has several {split}.* files: keep one")
        if found:
            named[split] = text_files(found[0]) if found[0].is_dir() else found
    if not named:
        return _by_file(folder, say)
    for split in SPLITS[:2]:
        if not named.get(split):
            raise UserError(
                f"--data-path {folder} has no {split}.* file: put train.txt and valid.txt there "
                "(or .xz, .gz), or name one text file to have it split 90/5/5"
            )
    return {split: paths for split, paths in named.items() if paths}


def folder_sha256(files):
    """SHA-256 of the files of all splits; of one file each, as earlier versions computed it."""
    digest = sha256_of_texts(*(path for paths in files.values() for path in paths))
    counts = {split: len(paths) for split, paths in files.items()}
    if max(counts.values()) > 1:
        return hashlib.sha256(json.dumps([counts, digest]).encode()).hexdigest()
    return digest


def text_files(folder):
    """The sorted files of a folder and its subfolders, without hidden ones.

    Raises:
        UserError: if it cannot be read, or one is of no known format.
    """

    def refuse(error):
        raise UserError(f"{error.filename} cannot be read: {error.strerror or error}")

    found, unknown = [], []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                (found if name.endswith(ENDS) else unknown).append(Path(parent, name))
    if unknown:
        raise UserError(
            f"{min(unknown)} is of no known format ({', '.join(ENDS)}): move it out of {folder}, "
            "or unpack or rename it"
        )
    return sorted(found)


def _by_file(folder, say):
    paths = text_files(folder)
    if len(paths) < len(SPLITS):
        raise UserError(
            f"--data-path {folder} has no train.* and valid.*, and {len(paths)} text files, too "
            "few to be split by file: put train.txt and valid.txt there (or .xz, .gz, .jsonl, "
            ".parquet) or at least 3 files, or name one text file to have it split 90/5/5"
        )

    def place(path):  # a new file moves few others into another split
        return hashlib.sha256(os.fsencode(path.relative_to(folder).as_posix())).digest()

    count = max(1, len(paths) // ONE_IN)
    order = sorted(paths, key=place)
    files = {"valid": sorted(order[:count]), "test": sorted(order[count : 2 * count])}
    files = {"train": sorted(order[2 * count :]), **files}
    megabytes = {s: sum(p.stat().st_size for p in files[s]) / 1e6 for s in files}
    parts = [f"{len(files[s]):,} for {NAMES[s]} ({megabytes[s]:,.1f} MB)" for s in SPLITS]
    say(f"{folder}, split by file: {', '.join(parts)}")
    return files
