"""The output of a training in a real terminal (tmux) and through a pipe."""

import os
import re
import shutil
import subprocess
import sys
import time

import pytest

from conftest import ROOT
from small_runs import TINY, evaluation
from system.durations import duration, short_duration
from training import display as training_display
from training.display import TrainingDisplay
from training.validation import perplexity

LIVE = re.compile(r"/100,?000\b.* loss ")


def test_a_duration_as_people_read_it():
    seconds = [0.4, 59.4, 59.6, 185, 3600, 3600 * 26 + 60]
    assert [*map(short_duration, seconds)] == ["0s", "59s", "1m00s", "3m05s", "1h00m", "1d02h"]
    assert [*map(duration, (9, 189, 3725))] == ["9.0 s", "3 min 09 s", "1 h 02 min"]
    assert [duration(s, to_the_minute=True) for s in (89, 3590)] == ["1 min", "1 h 00 min"]


def test_through_a_pipe_lines_are_plain(capsys, monkeypatch):
    """Rows, and a line per minute between two that are far apart."""
    clock = [1000.0]
    monkeypatch.setattr(training_display.time, "monotonic", lambda: clock[0])
    with TrainingDisplay(15000, 5000, 768) as display:
        for step in range(5001, 5014):
            clock[0] += 10
            display.step(2.5, 10.0)
            if step == 5010:
                display.row(evaluation(step, 2.0))
    output, errors = capsys.readouterr()
    assert not set("\r\x1b") & set(output + errors)
    header, row = output.splitlines()
    assert header.split()[:3] == ["step", "train", "val"] and row.split()[0] == "5010"
    assert row.split()[-1] == "1d03h"
    (line,) = errors.splitlines()
    assert line == "step 5,007/15,000 (33%)  loss 2.5000  77 tokens/s  1d03h left"


@pytest.mark.parametrize("evaluated_at", [15, 30])
def test_the_expected_time_is_that_of_the_steps_to_come(evaluated_at, capsys, monkeypatch):
    """What is compiled and recorded once does not count, nor does it stand inside the table."""
    clock = [1000.0]
    monkeypatch.setattr(training_display.time, "monotonic", lambda: clock[0])
    with TrainingDisplay(1000, 0, 768) as display:
        for step in range(1, 31):
            seconds = {1: 600.0, 3: 30.0}.get(step, 2.0)
            clock[0] += seconds
            display.step(2.5, seconds)
            if step == evaluated_at:
                display.row(evaluation(step, 2.0))
    *above, header, row = capsys.readouterr().out.splitlines()
    assert header.split()[0] == "step" and row.split()[0] == str(evaluated_at)
    left = {15: "32m50s", 30: "32m20s"}  # 985 and 970 steps of 2 seconds
    assert row.split()[-1] == left[evaluated_at]
    expected = "expected: 33 min for the 980 steps that are left, plus evaluations"  # 1960 seconds
    assert above == ([expected] if evaluated_at == 30 else [])


def test_columns_stay_apart_at_any_perplexity():
    """A perplexity that its column cannot hold loses its decimals, then its digits."""
    losses = [2.0, 11.0, 12.0, 13.5, 14.0, 138.0, 701.0]
    titles = training_display.COLUMNS
    lines = [dict(zip(titles, titles, strict=True))]
    for loss in losses:
        row = evaluation(1, 2.0) | {"perplexity": perplexity(loss)}
        lines.append(training_display._cells(row, 50))
    header, *rows = (training_display._aligned(cells, titles) for cells in lines)
    end = header.index("ppl") + len("ppl")
    shown = [row[end - 9 : end].strip() for row in rows]
    assert shown == ["7.389", "59874.142", "162755", "729416", "> 1e6", "> 1e6", "> 1e6"]
    assert {row[end - 10] for row in rows} | {row[end] for row in rows} == {" "}
    assert {len(row) for row in rows} == {len(header)}


@pytest.fixture
def terminal(in_tmp, small_text):
    """A tmux server of its own with a training in it; gives a function that runs tmux commands."""
    if shutil.which("tmux") is None:
        pytest.skip("no tmux")
    flags = [*TINY, "--data-path", small_text, "--max-steps", 100000, "--eval-interval", 300]
    flags += ["--checkpoint-interval", 100000]
    command = [sys.executable, ROOT / "train_shakespeare.py", *flags]

    def tmux(*words):
        return subprocess.run(
            ["tmux", "-S", "tmux.socket", "-f", "/dev/null", *map(str, words)],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        ).stdout

    tmux("new-session", "-d", "-x", 80, "-y", 24, "sh")
    tmux("set-option", "-g", "remain-on-exit", "on")
    tmux("respawn-pane", "-k", *command)
    yield tmux
    tmux("kill-server")


def until(tmux, condition, seconds=60):
    """The lines of the screen and its history as soon as they satisfy a condition."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        lines = tmux("capture-pane", "-p", "-S", "-").rstrip().splitlines()
        if condition(lines):
            return lines
        time.sleep(0.1)
    raise AssertionError("\n".join(lines))


def rows(lines):
    """Steps of the table's rows."""
    return [int(line.split()[0]) for line in lines if re.match(r" *\d+ +\d\.\d{4} ", line)]


def below(lines, title):
    """The lines below the newest header that ends with `title`."""
    headers = [n for n, line in enumerate(lines) if re.fullmatch(rf" +step +train .*{title}", line)]
    return lines[headers[-1] + 1 :] if headers else []


def test_one_line_is_updated_below_the_table(terminal):
    """At 80 columns, at 40, at 80 again; then Ctrl-C leaves a clean screen."""
    lines = until(terminal, lambda lines: len(rows(lines)) >= 3 and LIVE.search(lines[-1]))
    assert len([line for line in lines if LIVE.search(line)]) == 1
    assert re.fullmatch(
        r"step [\d,]+/100,000 \(\d+%\)  loss \d\.\d{4}  [\d,]+ tokens/s  \S+ left", lines[-1]
    )
    assert rows(lines) == [300 * n for n in range(1, len(rows(lines)) + 1)]
    assert sum("bits/byte" in line for line in lines) == 1

    terminal("resize-window", "-x", 40, "-y", 10)
    lines = until(terminal, lambda lines: len(rows(below(lines, "ppl"))) >= 2)
    narrow = below(lines, "ppl")
    assert max(map(len, narrow)) < 40 and len([x for x in narrow if LIVE.search(x)]) <= 1

    terminal("resize-window", "-x", 80, "-y", 24)
    until(terminal, lambda lines: rows(below(lines, "left"))[:1] > rows(narrow)[-1:])
    terminal("send-keys", "C-c")
    lines = until(terminal, lambda lines: any("stopped at" in line for line in lines))
    assert rows(lines) == [300 * n for n in range(1, len(rows(lines)) + 1)]
    # a resize may leave one line that the narrower terminal had wrapped
    assert len([line for line in lines if LIVE.search(line)]) <= 1
    assert sum(bool(re.match(" +step +train", line)) for line in lines) == 3
    assert not any("Traceback" in line for line in lines)
