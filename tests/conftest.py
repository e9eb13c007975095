"""What all tests share: the repository's folder, small corpora, and running a script."""

import functools
import os
import re
import shutil
import signal
from pathlib import Path

from script_runner import ONE_THREAD, run_script

os.environ.update(ONE_THREAD)  # before PyTorch reads it, and for every process that a test starts

import pytest
import torch

from gravity import attention, blocked, cpu
from gravity.tiles import PackedInputs
from map_browser import browser, new_page, open_map, show  # noqa: F401, fixtures
from system.machine import cpu_multiplies_bf16

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
needs_bf16 = pytest.mark.skipif(
    not cpu_multiplies_bf16(), reason="this CPU does not multiply bf16 in hardware"
)

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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Tests of a file with fixtures for the whole file share a process, all others take any.

    A browser or Triton's interpreter then starts once per file. (`--dist loadgroup` does this by
    marks, but xdist 3.8 cannot under pytest 9.2.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path = nodeid.split("::")[0]
            return path if _is_kept_together(path) else nodeid

    return Scheduling(config, log)


@functools.cache
def _is_kept_together(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    return re.search(r'scope="module"|\b(open_map|show|new_page|browser)\b', text) is not None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Let every process that a test starts begin with the default of each signal.

    nohup ignores a closed terminal, a script ignores Ctrl-C in its background jobs, and a process
    inherits what its parent ignores. A handler is not inherited, so pytest itself goes on ignoring.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


@pytest.fixture(autouse=True)
def seeded_and_single_threaded():
    """Undo what an earlier test may have set: threads, or denormals that a training flushes."""
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
    """The path of the real tiny Shakespeare; skips if it is not beside the repository."""
    path = SHARED / "tinyshakespeare.txt"
    if not path.exists():
        pytest.skip("tiny Shakespeare is not beside the repository")
    return path


@pytest.fixture
def small_blocks(monkeypatch):
    """Make blocks so small that a few dozen tokens fill several, the last one partly."""

    def set_blocks(rows=5, pairs=70, chunk=7):
        monkeypatch.setattr(blocked, "tile_rows", lambda matrices: rows)
        monkeypatch.setattr(blocked, "TILE_PAIRS", pairs)
        monkeypatch.setattr(blocked, "CHUNK_STEP", chunk)
        monkeypatch.setattr(blocked, "LONGEST_CHUNK", chunk)

    set_blocks()
    return set_blocks


@pytest.fixture(params=["compiled", "pytorch"])
def either_path(request, monkeypatch):
    """Run a test with the compiled kernels, and again with only the blocked path."""
    if request.param == "pytorch":
        monkeypatch.setattr(attention, "cpu_handles", lambda q, v: False)
    elif cpu.library() is None:
        pytest.skip("no C++ compiler")


@pytest.fixture
def visited(monkeypatch):
    """A list of how many pairs each computed tile of the field has."""
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
    """The path of a text of 24,000 characters from which a model can learn."""
    path = tmp_path / "small.txt"
    text = "".join(SENTENCES[(7 * n * n + n) % len(SENTENCES)] for n in range(1000))
    path.write_text(text[:24000], encoding="utf-8")
    return path


def run(*command, cwd, stdin="", check=None, env=None):
    """Run a script of the repository in a new process.

    Args:
        check: the exit code that the script must have; None allows any.

    Returns:
        The `CompletedProcess` with text output.
    """
    result = run_script(command[0], command[1:], cwd, stdin, env)
    if check is not None:
        assert result.returncode == check, result.stdout + result.stderr
    return result


def left_behind():
    """The files in data/, except empty lock files."""
    files = [path for path in Path("data").rglob("*") if path.is_file()]
    return [path for path in files if path.parent != Path("data/locks") or path.stat().st_size]


def error_line(result):
    """The only error line that the user sees."""
    assert "Traceback" not in result.stderr, result.stderr
    lines = [line for line in result.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.fixture
def make_trainer(in_tmp, small_text):
    """A function that makes a trainer in this process."""
    from small_runs import SMALL
    from text.preparation import prepare_data
    from training.config import resolve
    from training.options import train_parser
    from training.trainer import Trainer

    data = prepare_data("shakespeare", str(small_text), say=lambda line: None)

    def make(*flags, **settings):
        flags = (*SMALL, "--data-path", small_text, "--dropout", 0, *flags)
        config = resolve(train_parser("", "").parse_args([str(flag) for flag in flags]))
        torch.manual_seed(1)
        return Trainer(config, data, torch.device("cpu"), **settings)

    return make
