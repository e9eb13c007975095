"""What the tests share: the repository's place, small corpora, and running a script for real."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from gravity import attention, blocked, cpu
from gravity.tiles import PackedInputs
from script_runner import run_script

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


# a job started in the background of a script ignores Ctrl-C, and so would all that it starts
signal.signal(signal.SIGINT, signal.default_int_handler)
# pytest's readline exports the size of its terminal, which is not that of terminals in tests
for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run slow tests too")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="slow: bash run_tests.sh --slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def seeded_and_single_threaded():
    """Tensors here are small: a second thread only waits, and the tests run on both cores.

    A training in this process flushes denormals; the next test shall not find that.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """Work in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiny_shakespeare():
    """The real tiny Shakespeare; skips where it does not lie beside the repository."""
    path = SHARED / "tinyshakespeare.txt"
    if not path.exists():
        pytest.skip("tiny Shakespeare is not beside the repository")
    return path


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that a few dozen tokens make many, ragged at the end."""

    def set_blocks(rows=5, pairs=70, chunk=7):
        monkeypatch.setattr(blocked, "tile_rows", lambda matrices: rows)
        monkeypatch.setattr(blocked, "TILE_PAIRS", pairs)
        monkeypatch.setattr(blocked, "CHUNK_STEP", chunk)
        monkeypatch.setattr(blocked, "LONGEST_CHUNK", chunk)

    set_blocks()
    return set_blocks


@pytest.fixture(params=["compiled", "pytorch"])
def either_path(request, monkeypatch):
    """With the compiled kernels, and with the blocked path alone, for fp32 and bf16."""
    if request.param == "pytorch":
        monkeypatch.setattr(attention, "can_attend", lambda q, v: False)
    elif cpu.library() is None:
        pytest.skip("no C++ compiler")


@pytest.fixture
def visited(monkeypatch):
    """A list that grows by the number of pairs each time that a tile of the field is computed."""
    pairs = []
    inverse = PackedInputs.inverse

    def counting(self, heads, rows, columns):
        pairs.append((heads[1] - heads[0]) * (rows[1] - rows[0]) * (columns[1] - columns[0]))
        return inverse(self, heads, rows, columns)

    monkeypatch.setattr(PackedInputs, "inverse", counting)
    return pairs


SENTENCES = (
    "The quick brown fox jumps over the lazy dog.\n",
    "Pack my box with five dozen liquor jugs!\n",
    "How vexingly quick daft zebras jump; 12 or 3?\n",
    "\n",
)


@pytest.fixture
def small_text(tmp_path):
    """A text file of 24,000 characters that has something to learn."""
    path = tmp_path / "small.txt"
    text = "".join(SENTENCES[(7 * n * n + n) % len(SENTENCES)] for n in range(1000))
    path.write_text(text[:24000], encoding="utf-8")
    return path


def run(*command, cwd, stdin="", check=None, env=None):
    """Run a script of the repository in a new process.

    Args:
        check: the exit code to insist on.

    Returns:
        The `CompletedProcess` with text output.
    """
    result = run_script(command[0], command[1:], cwd, stdin, env)
    if check is not None:
        assert result.returncode == check, result.stdout + result.stderr
    return result


def left_behind():
    """What lies in data/ besides empty lock files."""
    files = [path for path in Path("data").rglob("*") if path.is_file()]
    return [path for path in files if path.parent != Path("data/locks") or path.stat().st_size]


def error_line(result):
    """The one line that a user sees of an error."""
    assert "Traceback" not in result.stderr, result.stderr
    lines = [line for line in result.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1, result.stderr
    return lines[0]
