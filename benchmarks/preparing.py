"""Measures the preparation of a large text over time: `benchmark.py data --gigabytes`."""

import itertools
import random
import re
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from system.errors import UserError
from text.stream import read_blocks

ROOT = Path(__file__).resolve().parent.parent
FILES = 200
SECONDS_BETWEEN = 0.5  # measurements
LATER = 1.15  # than the row before, in seconds: the next row of the table
TARGET = 10.0  # GB, for which time and memory are extrapolated
SAME = ("starting", "training", "merging")  # phases that take as long for any large text
BAR = re.compile(r"(hashing|reading|training|merging|encoding|checking)[^:\r]*:[^\r]*$")


def benchmark_preparing(args):
    """Prepare a folder of many files, made of --data-path, and print memory and speed.

    Returns:
        A dict for JSON.

    Raises:
        UserError: if the system does not tell a process's memory, or preparing fails.
    """
    if not Path("/proc/self/status").exists():
        raise UserError("--gigabytes reads a process's memory from /proc: run it on Linux")
    if args.data_path is None:
        raise UserError("--gigabytes repeats a text: name one with --data-path", 2)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        gigabytes = write_texts(Path(args.data_path), folder / "texts", args.gigabytes)
        print(f"text: {gigabytes:.2f} GB in {FILES} files, {args.data_path} again and again")
        curve = watched(folder, args.bpe_vocab_size)
    numbers = {"gigabytes": gigabytes, "curve": curve, **summary(curve, gigabytes)}
    print_summary(numbers)
    return numbers


def write_texts(source, folder, gigabytes):
    """Write FILES files in a new folder; returns how many GB they have together."""
    folder.mkdir()
    texts, written = changed_texts(source), 0
    for number in range(FILES):
        with open(folder / f"{number:04}.txt", "wb") as file:
            while file.tell() < gigabytes * 1e9 / FILES:
                file.write(next(texts))
            written += file.tell()
    return written / 1e9


def changed_texts(source):
    """Yield blocks of a text again and again, in UTF-8, each time with two other letters in each
    other's place, so that the number of different words grows as in new text."""
    for repetition in itertools.count():
        one, other = random.Random(repetition).sample(string.ascii_lowercase, 2)
        letters = (one + other).encode()
        swapped = bytes.maketrans(letters, letters[::-1] if repetition else letters)
        for block in read_blocks(source):
            yield block.encode().translate(swapped)


def watched(folder, vocab_size):
    """Prepare `folder`/texts in a new process, and print a table as it goes.

    Returns:
        A list of `(seconds since the start, what it does, MB of memory)`.

    Raises:
        UserError: if the process fails.
    """
    command = [sys.executable, str(ROOT / "prepare_data.py"), "--dataset", "text"]
    command += ["--data-path", "texts", "--tokenizer", "bpe", "--bpe-vocab-size", str(vocab_size)]
    curve, phase, printed, begun = [], "starting", (0.0, ""), time.perf_counter()
    print("\n| seconds | phase | memory, MB |\n|---|---|---|")
    with open(folder / "bars", "wb") as bars:
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=bars)
        try:
            while process.poll() is None:
                seconds, phase = time.perf_counter() - begun, doing(folder / "bars") or phase
                curve.append((seconds, phase, memory(process)))
                if phase != printed[1] or seconds > LATER * max(1, printed[0]):
                    print(f"| {seconds:,.0f} | {phase} | {curve[-1][2]:,.0f} |", flush=True)
                    printed = seconds, phase
                time.sleep(SECONDS_BETWEEN)
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        reason = (folder / "bars").read_text(encoding="utf-8", errors="replace").splitlines()
        raise UserError(f"prepare_data.py failed: {(reason or ['?'])[-1]}")
    return curve


def doing(bars):
    """The first word of the progress bar that is being drawn, or None."""
    with open(bars, "rb") as file:
        file.seek(max(0, bars.stat().st_size - 1000))
        found = BAR.search(file.read().decode(errors="replace").rstrip("\r"))
    return found[1] if found else None


def memory(process):
    """MB of memory that a process uses; 0 if it ended."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return 0.0
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    return int(found[1]) * 1024 / 1e6 if found else 0.0


def summary(curve, gigabytes):
    """Seconds and peak of every phase, and what TARGET GB would take.

    All phases read the whole text but those of SAME, whose time is taken as it is.
    """
    phases = {}
    for (begin, phase, megabytes), (end, *_) in itertools.pairwise([*curve, curve[-1]]):
        row = phases.setdefault(phase, {"seconds": 0.0, "peak_mb": 0.0})
        row["seconds"] += end - begin
        row["peak_mb"] = max(row["peak_mb"], megabytes)
    same = sum(row["seconds"] for phase, row in phases.items() if phase in SAME)
    whole = sum(row["seconds"] for row in phases.values())
    encoding = [megabytes for _, phase, megabytes in curve if phase == "encoding"]
    halves = encoding[: len(encoding) // 2], encoding[len(encoding) // 2 :]
    return {
        "phases": phases,
        "peak_mb": max(megabytes for *_, megabytes in curve),
        "mb_per_s": gigabytes * 1e3 / whole,
        "peak_of_halves_mb": [max(half, default=0.0) for half in halves],
        "hours_for_target": (same + (whole - same) * TARGET / gigabytes) / 3600,
    }


def print_summary(numbers):
    """Print the summary as Markdown."""
    megabytes = numbers["gigabytes"] * 1e3
    print("\n| phase | seconds | MB/s of the text | peak, MB |\n|---|---|---|---|")
    for phase, row in numbers["phases"].items():
        speed = "" if phase in SAME else f"{megabytes / max(row['seconds'], 1e-9):,.1f}"
        print(f"| {phase} | {row['seconds']:,.0f} | {speed} | {row['peak_mb']:,.0f} |")
    first, second = numbers["peak_of_halves_mb"]
    print(
        f"\npeak {numbers['peak_mb']:,.0f} MB; {numbers['mb_per_s']:.1f} MB/s in all\n"
        f"encoding: at most {first:,.0f} MB in the first half, {second:,.0f} MB in the second\n"
        f"{TARGET:.0f} GB at these speeds: {numbers['hours_for_target']:.1f} hours"
    )
