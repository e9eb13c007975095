"""Writes the gallery's Korean and Python texts into a folder, for make.sh.

- korean.txt: ten bills and the Constitution of the Republic of Korea, from the PyPI package konlpy.
  Laws are not under copyright (Copyright Act of Korea, article 7); none of konlpy's code is used.
- code.txt: the standard library of the Python that runs this, without its tests (PSF licence).
"""

import argparse
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

KONLPY = (
    "konlpy==0.6.0 --hash=sha256:0b7928059e20eb1c72f6fe65a3d12c104fae9e68173904e16beef869cf0ea590\n"
)
COMPARISON = "신 ·구조문대비표"  # a bill's last part, which repeats the old law beside the new one
WIDE = 28  # characters: a line at least this long goes on in the next one
NO_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings"}


def main():
    """Write the two texts, unless they are there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where korean.txt and code.txt are written")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("korean.txt", korean), ("code.txt", code)):
        path = folder / name
        if not path.exists():
            content = text()
            path.write_text(content, encoding="utf-8")
            print(f"wrote {path}: {len(content):,} characters")


def korean():
    """The bills, then the constitution, whose last tenth is thus the validation text."""
    with tempfile.TemporaryDirectory() as folder:
        requirement = Path(folder) / "requirement.txt"
        requirement.write_text(KONLPY)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "-q"]
        subprocess.run([*command, "-d", folder, "-r", str(requirement)], check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            names = sorted(name for name in wheel.namelist() if name.endswith(".txt"))
            texts = {name: wheel.read(name).decode() for name in names if "/corpus/" in name}
    bills = [joined(text) for name, text in texts.items() if "/kobill/" in name]
    return "\n\n".join([*bills, *(text for name, text in texts.items() if "/kolaw/" in name)])


def joined(bill):
    """A bill without its page numbers and comparison, its lines joined to paragraphs."""
    lines = [line for line in bill.split(COMPARISON)[0].splitlines() if line.strip()]
    lines = [line for line in lines if not re.fullmatch(r"\s*- \d+ -\s*", line)]
    ends = ["" if len(line) >= WIDE and not line.rstrip().endswith(".") else "\n" for line in lines]
    return "".join(line + end for line, end in zip(lines, ends, strict=True))


def code():
    """All modules of the standard library, one after the other."""
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in library.rglob("*.py") if not NO_LIBRARY & set(path.parts))
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in files)
    return "\n\n".join(texts)


if __name__ == "__main__":
    main()
