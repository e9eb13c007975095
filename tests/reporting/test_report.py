"""Tests report.py: a report shows what the files of the runs hold, and no other number."""

import csv
import itertools
import json
import re
import subprocess
from pathlib import Path

import markdown
import numpy as np
import pytest

import report
from conftest import BROWSER, error_line, run
from reporting.plots import AXES, _points, curves_to_draw
from reporting.runs import find_runs, group
from reporting.tables import result_table
from run_folders import CONFIG, cells, write_run
from system.errors import UserError

SMALL = (
    *("--hidden-dim", 16, "--num-layers", 2, "--num-heads", 2, "--block-size", 8),
    *("--eval-interval", 5, "--eval-iters", 1, "--checkpoint-interval", 5),
)


def make_report(*names, reference=()):
    """Write a report; returns its text, by heading."""
    report.main(["--runs", *names, "--output", "reports/r.md", *reference])
    text = Path("reports/r.md").read_text()
    return text, dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", text, re.M | re.S))


def test_results(in_tmp, capsys):
    """The tables of equal steps, best and equal time, computed by hand from the files."""
    write_run("vanilla", [5.0, 4.0, 3.5], model="vanilla")
    write_run("ngt", [4.8, 3.0, 3.25, 3.4], seconds_a_step=2.0)
    _, parts = make_report("vanilla", "ngt", "published")
    equal = cells(parts["At equal steps"])
    assert equal["vanilla (learned)"][:4] == ["30", "30.0 s", "3.5000", f"{np.exp(3.5):.2f}"]
    assert equal["ngt (newton)"][0] == "30" and equal["ngt (newton)"][2] == "3.2500"
    assert equal["ngt (newton)"][5] == f"{np.exp(3.25 - 3.5):.3f}"
    best = cells(parts["At each one's best"])
    assert best["ngt (newton)"][:3] == ["20", "40.0 s", "3.0000"]
    # vanilla ended after 30 s; by then NGT had been evaluated at step 10 alone
    in_time = cells(parts["At equal training time (30.0 s)"])
    assert in_time["vanilla (learned)"][0] == "30" and in_time["ngt (newton)"][0] == "10"
    speed = cells(parts["Speed and memory"])
    assert speed["ngt (newton)"] == ["0.50", "50", "1 min 20 s", "7 MiB", "0.500"]
    for table in (equal, best, in_time, speed):
        assert table["published"][0] == "not run"
    assert "published: not run." in parts["Commands"]
    assert "not run" in capsys.readouterr().out


def test_seeds_are_mean_and_spread(in_tmp):
    """Runs of one configuration are one line; another learning rate is another line."""
    losses = [3.1, 3.3, 3.8]
    for seed, loss in enumerate(losses):
        where = {"machine": f"machine {seed}", "prepared_tokens": f"tokens{seed}", "threads": seed}
        write_run(f"g/a{seed}", [loss], seed=seed, **where)
    write_run("g/b", [2.0], learning_rate=0.5)
    variants = group(find_runs(["runs/g/"]))
    assert [len(v.runs) for v in variants] == [3, 1]
    table = cells(result_table(variants, lambda run: run.rows[-1]))
    (line,) = [line for label, line in table.items() if "3 seeds" in label]
    assert line[2] == f"{np.mean(losses):.4f} ± {np.std(losses, ddof=1):.4f}"
    perplexities = np.exp(losses)
    assert line[3] == f"{perplexities.mean():.2f} ± {perplexities.std(ddof=1):.2f}"


@pytest.mark.parametrize(
    "other, words",
    [
        ({"machine": "a slow machine"}, "a slow machine"),
        ({"threads": 4}, "a machine, 4 threads"),
    ],
    ids=str,
)
def test_times_of_other_machines_and_threads_are_left_out(other, words, in_tmp, capsys):
    """Their losses are compared, and the report says whose times are not; `d` says nothing."""
    here = {"threads": 1, "processes": 1}
    write_run("a", [5.0, 4.0, 3.0], 3.0, model="vanilla", **here)
    write_run("b", [4.8, 3.7], 0.25, **here | other)
    write_run("c1", [4.6, 3.6], 2.0, exponent=3, **here)
    write_run("c2", [4.4, 3.4], 0.5, exponent=3, seed=2, **here | other)
    write_run("d", [4.9, 3.9], 2.0, exponent=4)
    _, parts = make_report("a", "b", "c1", "c2", "d")
    speed = cells(parts["Speed and memory"])
    assert speed["vanilla (learned)"][4] == "1.000"
    assert [speed["ngt (newton), c1"][n] for n in (0, 1, 4)] == ["0.50", "50", "1.500"]
    assert speed["ngt (newton), d"][1] == "50" and "ngt (newton), b" not in speed
    in_time = cells(parts["At equal training time (40.0 s)"])
    assert "ngt (newton), b" not in in_time and in_time["vanilla (learned)"][0] == "10"
    assert in_time["ngt (newton), c1"][2] == "3.6000"
    equal = cells(parts["At equal steps"])
    assert equal["ngt (newton), b"][:3] == ["20", "", "3.7000"]
    assert equal["ngt (newton), c1 (2 seeds)"][1] == "40.0 s"
    assert equal["ngt (newton), c1 (2 seeds)"][2].startswith("3.5000")
    why = f"here a machine. Left out: b ({words}), c2 ({words})."
    screen = capsys.readouterr().out
    assert why in parts["Speed and memory"] and why in parts["At equal training time (40.0 s)"]
    assert why in screen and screen.count("a machine") == 1 + (why.count("a machine") - 1)
    lines = {line.split("  ")[0]: line.split() for line in screen.splitlines()}
    assert lines["ngt (newton), b"][-1] == f"{np.exp(3.7):.3f}"  # the perplexity, and no speed
    assert lines["ngt (newton), c1"][-2:] == ["0.50", "50"]


def test_curves_by_time_are_of_one_machine(in_tmp):
    write_run("a", [5.0, 4.0])
    write_run("b", [4.5, 3.5], exponent=3, machine="another")
    write_run("c", [4.5, 3.5], exponent=4, processes=1)  # `a` does not say how many it had
    write_run("d", [4.5, 3.5], exponent=4, processes=2)
    curves = curves_to_draw({v.label: v.runs for v in group(find_runs(["c", "b", "a", "d"]))})
    by_step, by_time = ([len(_points(r, key, 1)[0]) for _, _, r in curves] for key, *_ in AXES)
    assert (by_step, by_time) == ([2, 2, 2, 2], [2, 0, 2, 0])


@pytest.mark.parametrize("lost", [None, float("nan")])
def test_a_loss_that_is_not_finite(in_tmp, lost):
    """A run that diverged is reported as such; its best is the last good one."""
    write_run("a", [4.0, 3.0])
    write_run("b", [4.0, lost], exponent=9)
    _, parts = make_report("a", "b")
    assert cells(parts["At equal steps"])["ngt (newton), b"][2] == "not finite"
    assert cells(parts["At each one's best"])["ngt (newton), b"][2] == "4.0000"
    write_run("c", [lost], exponent=7)
    _, parts = make_report("a", "c")
    assert cells(parts["At each one's best"])["ngt (newton), c"][0] == "no evaluation"


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_perplexity_that_overflows(in_tmp):
    """A finite loss has none if it is large."""
    write_run("a", [4.0, 800.0])
    _, parts = make_report("a")
    assert cells(parts["At equal steps"])["ngt (newton)"][2:4] == ["800.0000", "not finite"]


def test_a_perplexity_of_many_digits(in_tmp, capsys):
    """More than a million is said as that: at the terminal, in tables, ratios and the curves."""
    write_run("good", [4.0, 3.0])
    for seed, losses in ((1, [138.0, 140.0]), (2, [500.0, 600.0])):
        write_run(f"bad_{seed}", losses, exponent=7, seed=seed)
    text, parts = make_report("good", "bad_1", "bad_2")
    shown = cells(parts["At equal steps"])["ngt (newton), bad_1 (2 seeds)"]
    assert shown[3] == shown[5] == "> 1e6" and shown[2].startswith("370.0000 ± ")
    assert cells(parts["At equal steps"])["ngt (newton), good"][3] == "20.09"
    printed = capsys.readouterr().out
    page = Path("reports/r.html").read_text()
    for place in (text, printed, page.split("<body", 1)[1].rsplit("Plotly.newPlot", 1)[1]):
        assert "1e6" in place and not re.search(r"\d{20}", place)


def test_every_number_is_of_the_files(in_tmp):
    """Every loss printed is in a metrics.jsonl or in the reference, or is computed from those."""
    write_run("vanilla", [5.1234, 4.4321], model="vanilla")
    write_run("ngt", [4.9876, 4.2109])
    text, _ = make_report("vanilla", "ngt")
    known = {"5.1234", "4.4321", "4.9876", "4.2109"}
    known |= {f"{float(loss) / 3:.4f}" for loss in known}
    assert set(re.findall(r"\b\d\.\d{4}\b", text)) <= known
    reference = {
        "title": "Theirs",
        "setting": "elsewhere",
        "rows": [{"model": "m", "val_loss": 1.2345}],
    }
    Path("ref.json").write_text(json.dumps(reference))
    text, parts = make_report("vanilla", "ngt", reference=("--reference", "ref.json"))
    assert "1.2345" in parts["Theirs"] and "Not measured here" in parts["Theirs"]
    assert "1.2345" not in text.replace(parts["Theirs"], "")


def test_a_torn_last_line(in_tmp, capsys):
    """A crash while a row was written: the other rows are used, with one line of warning."""
    write_run("a", [4.0, 3.0])
    path = Path("runs/a/metrics.jsonl")
    path.write_text(path.read_text() + '{"step": 30, "val_lo')
    make_report("a")
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "runs/a/metrics.jsonl" in error and "incomplete" in error
    lines = Path("reports/r.csv").read_text().splitlines()
    assert len(lines) == 3


ROW = {"step": 1, "tokens": 9, "steps_per_s": 1.0, "tokens_per_s": 9.0, "wall_time": 1.0}
ROW |= {"val_loss": 4.0, "perplexity": 54.6}
BAD = {
    "no metrics": ("metrics.jsonl", None, "no evaluation"),
    "no rows": ("metrics.jsonl", "", "no evaluation"),
    "damaged line": ("metrics.jsonl", '{"step": 1\n{"step": 2}\n', "line 1"),
    "a list": ("metrics.jsonl", "[1]\n", "line 1"),
    "row without a loss": ("metrics.jsonl", '{"step": 1}\n', "line 1 has no tokens"),
    "a step of text": ("metrics.jsonl", json.dumps(ROW | {"step": "x"}) + "\n", "line 1"),
    "no speed": ("metrics.jsonl", json.dumps(ROW | {"tokens_per_s": None}), "a wrong tokens_per_s"),
    "an endless time": ("metrics.jsonl", json.dumps(ROW | {"wall_time": 1e999}), "wall_time"),
    "config cut short": ("config.json", '{"model": "ng', "cannot be read"),
    "config of nothing": ("config.json", "null", "no dictionary"),
    "config that is not text": ("config.json", b"\xff\xfe", "cannot be read"),
    "config of something else": ("config.json", '{"model": "ngt"}', "has no source"),
    "layers as text": ("config.json", json.dumps(CONFIG | {"num_layers": "1"}), "num_layers"),
    "a law that is a number": ("config.json", json.dumps(CONFIG | {"law": 1}), "a wrong law"),
    "rate as text": ("config.json", json.dumps(CONFIG | {"learning_rate": "1e-3"}), "rate"),
}


@pytest.mark.parametrize("name, content, words", BAD.values(), ids=BAD.keys())
def test_damaged_runs(in_tmp, name, content, words):
    """Files that are missing, torn or of another program end in one line, with a remedy."""
    write_run("a", [4.0, 3.0])
    path = Path("runs/a") / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        report.main(["--runs", "a", "--output", "r.md"])
    assert words in str(error.value) and "runs/a" in str(error.value)
    assert "\n" not in str(error.value) and re.search("again|further|remove", str(error.value))
    assert not Path("r.md").exists()


def test_a_run_without_its_config(in_tmp):
    """It is listed as not run; alone it is an error."""
    write_run("a", [4.0])
    write_run("b", [4.0])
    Path("runs/a/config.json").unlink()
    _, parts = make_report("a", "b")
    assert cells(parts["At equal steps"])["a"][0] == "not run"
    with pytest.raises(UserError, match="called a"):
        report.main(["--runs", "a"])


TRAPS = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "![x](http://evil.example/x.png)",
    "[x](javascript:alert(1))",
    "`` ` | a | b\n\n# c\n```\n<b>",
    "x\x1b]0;PWNED\x07\x9b2J\u202e\ud800",
    "$\\badmath{$",
)


@pytest.mark.parametrize("trap", TRAPS)
def test_what_strangers_write_is_text(trap, in_tmp, capfd):
    """On the terminal, and in the HTML that another program makes of the Markdown."""
    command = ["train_shakespeare.py", "--data-path", trap]
    settings = {"source": trap, "machine": trap, "command": command, "code_version": trap}
    settings |= {"torch_version": trap, "checkpoint_path": f"{trap}.pt"}
    write_run("vanilla", [5.0, 4.0], model="vanilla", pos=trap, **settings)
    write_run("ngt", [4.5, 3.0], law=trap, **settings)
    reference = {"title": trap, "setting": trap, "rows": [{"model": trap, trap: trap}] * 2}
    Path("ref.json").write_text(json.dumps(reference))
    text, parts = make_report("vanilla", "ngt", reference=("--reference", "ref.json"))
    shown = capfd.readouterr().out
    assert all(c == "\n" or c.isprintable() for c in shown)
    assert all(c == "\n" or c.isprintable() for c in text)
    assert shown.count("\n") == 3 + 1 + 1  # the table, the text, what was written
    page = markdown.markdown(text, extensions=["tables", "fenced_code"])
    assert not re.search("<(script|b)[> ]", page)
    assert re.findall("<(?:img|a) [^>]*>", page) == [
        '<img alt="validation loss" src="r.png" />',
        '<a href="r.csv">',
    ]
    assert page.count("<h1>") == 1 and len(re.findall("<h2>", page)) == len(parts)
    table = re.search(r"Speed and memory.*?</table>", page, re.S)[0]
    assert [row.count("<td") for row in table.split("</tr>")[1:3]] == [6, 6]
    with open("reports/r.csv", newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["10", "20", "10", "20"]
    assert Path("reports/r.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input_is_one_line(in_tmp):
    write_run("a", [4.0])
    line = error_line(run("report.py", "--runs", "b", cwd=in_tmp, check=1))
    assert "called b" in line
    assert "--output" in error_line(
        run("report.py", "--runs", "a", "--output", "r.txt", cwd=in_tmp, check=2)
    )
    for content in (None, "{", '{"rows": []}', '{"rows": [{"a": 1}]}'):
        if content is not None:
            Path("ref.json").write_text(content)
        with pytest.raises(UserError, match=r"ref\.json"):
            report.main(["--runs", "a", "--output", "r.md", "--reference", "ref.json"])
    Path("file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        report.main(["--runs", "a", "--output", "file/r.md"])


def test_real_runs(in_tmp, small_text):
    """Two real trainings, one of them resumed: each has one curve, and NGT its geometry by head."""
    train = ("train_shakespeare.py", "--data-path", small_text, *SMALL)
    ngt = ("--checkpoint-path", "c/ngt.pt", "--run-name", "pair/ngt")
    run(*train, *ngt, "--max-steps", 10, cwd=in_tmp, check=0)
    run(*train, *ngt, "--max-steps", 20, "--resume", cwd=in_tmp, check=0)
    vanilla = ("--model", "vanilla", "--checkpoint-path", "c/v.pt", "--run-name", "pair/vanilla")
    run(*train, *vanilla, "--max-steps", 20, cwd=in_tmp, check=0)
    run("report.py", "--runs", "pair", "--output", "reports/pair.md", cwd=in_tmp, check=0)
    text = Path("reports/pair.md").read_text()
    rows = [json.loads(x) for x in Path("runs/pair/ngt/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    assert all(a["wall_time"] < b["wall_time"] for a, b in itertools.pairwise(rows))
    assert text.count(f"{rows[-1]['val_loss']:.4f}") >= 1
    lines = list(csv.reader(Path("reports/pair.csv").read_text().splitlines()))
    assert [line[3] for line in lines[1:] if line[0] == "pair/ngt"] == ["5", "10", "15", "20"]
    heads = re.findall(r"^\| (\d) \| (\d) \|", text, re.M)
    assert heads == [("1", "1"), ("1", "2"), ("2", "1"), ("2", "2")]
    assert "Heaviest tokens: `" in text
    # vanilla comes first: the ratio is to the first line
    first = text.index("| vanilla (learned) |"), text.index("| ngt (newton, background) |")
    assert first[0] < first[1]
    assert Path("reports/pair.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.skipif(BROWSER is None, reason="no chromium here: install it to run browser tests")
def test_a_real_browser_draws_the_curves(in_tmp):
    """Chromium draws both curves in both panels, with their values."""
    write_run("<b>vanilla", [5.0, 4.0], model="vanilla")
    write_run("ngt", [4.5, 3.0])
    make_report("<b>vanilla", "ngt")
    probe = """<script>window.addEventListener('load', () => setTimeout(() => {
        const plot = document.querySelector('.js-plotly-plot');
        const curves = plot._fullData.map(c => Array.from(c.y).join('-')).join(' ');
        document.body.dataset.curves = curves;
        document.body.dataset.drawn = plot.querySelectorAll('.scatterlayer .trace').length;
    }, 500));</script></body>"""
    page = Path("reports/r.html")
    page.write_text(probe.join(page.read_text().rsplit("</body>", 1)))
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run"
    flags += " --virtual-time-budget=8000 --dump-dom"
    result = subprocess.run(
        [BROWSER, *flags.split(), f"--user-data-dir={in_tmp}/profile", page.resolve().as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert 'data-curves="5-4 5-4 4.5-3 4.5-3"' in result.stdout, result.stderr[-2000:]
    assert 'data-drawn="4"' in result.stdout
