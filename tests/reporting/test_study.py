"""Tests run_study.sh and the report of its runs, on models that train in a second."""

import json
import os
import re
import signal
import statistics
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

import report
from repository_copy import copy_of_the_repository
from run_folders import cells, write_run
from system.errors import UserError

TINY = {
    **{"NAME": "s", "DATASET": "text", "DATA_PATH": "small.txt", "BPE_VOCAB_SIZE": "300"},
    **{"STEPS": "24", "SHORT_STEPS": "12", "RATES": "1e-3", "SEEDS": "1", "JOBS": "2"},
    **{"STAGES": "headline", "ONLY": "*/@(ngt_1|rotary_1|default|exponent_8)"},
    "EXTRA_FLAGS": "--hidden-dim 16 --num-layers 1 --num-heads 2 --block-size 32 --batch-size 2 "
    "--num-parameters 9000 --eval-iters 1 --no-use-amp --device cpu --sample-tokens 4",
}


def parts_of(text):
    return dict(re.findall(r"^##+ (.*?)\n(.*?)(?=^##+ |\Z)", text, re.M | re.S))


@pytest.mark.parametrize(
    "stages",
    [
        "headline",
        pytest.param("headline ablations evaluate report", marks=pytest.mark.slow),
    ],
)
def test_a_study_stopped_and_called_again(stages, in_tmp, small_text):
    """Ctrl-C ends it; called again it finishes every run, and the report has the runs' own numbers;
    it does not continue a run that was trained with other flags."""
    ablations = {"STAGES": stages, "ABLATIONS": "default exponent_8"}
    env = copy_of_the_repository(in_tmp, **TINY | ablations)
    command = ["bash", "run_study.sh"]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=in_tmp, env=env, start_new_session=True, **quiet)
    deadline = time.monotonic() + 120
    while not list(in_tmp.glob("runs/s/headline/*/metrics.jsonl")):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode not in (0, 1) and not (in_tmp / "reports/s.md").exists()

    again = subprocess.run(command, cwd=in_tmp, env=env, **quiet)
    assert again.returncode == 0, again.stdout
    last = {name: last_row(f"s/headline/{name}") for name in ("rotary_1", "ngt_1")}
    assert [row["step"] for row in last.values()] == [24, 24]
    if "report" in stages:
        check_report(last)

    other = subprocess.run(command, cwd=in_tmp, env=env | {"STEPS": "25"}, **quiet)
    assert other.returncode != 0 and "was trained with other flags" in other.stdout


def last_row(run):
    return json.loads(Path(f"runs/{run}/metrics.jsonl").read_text().splitlines()[-1])


def check_report(last):
    """The report's numbers are those of the runs' last evaluations."""
    parts = parts_of(Path("reports/s.md").read_text())
    headline = cells(parts["Headline"])
    for label, name in (("vanilla (rotary)", "rotary_1"), ("ngt (newton)", "ngt_1")):
        assert headline[label][2] == f"{last[name]['val_loss']:.4f}"
        evaluation = json.loads(Path(f"runs/s/headline/{name}/evaluation.json").read_text())
        assert f"{evaluation['by_length'][0]['loss']:.4f}" in parts["Past its training length"]
    assert set(cells(parts["Ablations"])) >= {"default", "exponent_8"}
    assert cells(parts["Ablations"])["exponent_8"][0] == "exponent 8"
    assert parts["In full"].strip() == parts["Other sizes"].strip() == "not run."


@pytest.mark.parametrize(
    "setting, words",
    [
        ({"STAGES": "nonsense"}, "STAGES contains nonsense"),
        ({"SIZE": "huge"}, "small or 25m"),
        ({"ABLATIONS": "wings"}, "no ablation wings"),
        ({"DATA_PATH": "tiny.txt"}, "tiny.txt"),
    ],
)
def test_bad_settings_are_one_line(setting, words, in_tmp, small_text):
    """Also a text that is too short for a validation window."""
    (in_tmp / "tiny.txt").write_text("too short a text\n" * 20)
    env = copy_of_the_repository(in_tmp, **TINY | {"JOBS": "1"} | setting)
    result = subprocess.run(
        ["bash", "run_study.sh"], cwd=in_tmp, env=env, capture_output=True, text=True
    )
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert lines and words in result.stdout + lines[0]
    assert "Traceback" not in result.stderr


def test_paired_ratios_by_hand(in_tmp):
    """Ratios to rotary of the same seed; a seed without its pair is left out.

    The cost is counted at the first evaluation that is as good as rotary's last.
    """
    same = {"block_size": 32, "vocab_size": 300, "hidden_dim": 16, "num_layers": 1, "num_heads": 2}
    same |= {"mlp_dim": 16, "source_sha256": "0", "learning_rate": 1e-3}
    rotary = same | {"model": "vanilla", "pos": "rotary", "model_type": "vanilla"}
    newton = same | {"model_type": "ngt"}
    write_run("s/headline/rotary_1", [5.0, 4.5, 4.0], seed=1, **rotary)
    write_run("s/headline/rotary_2", [5.0, 4.6, 4.2], seed=2, **rotary)
    write_run("s/headline/ngt_1", [4.8, 4.0, 3.9], 2.0, seed=1, **newton)
    write_run("s/headline/ngt_2", [4.8, 4.4, 4.3], 2.0, seed=2, **newton)
    write_run("s/headline/ngt_3", [4.8, 4.4, 1.0], 2.0, seed=3, **newton)
    write_run("s/headline/learned_1", [5.0, 4.9, 4.8], seed=1, **rotary | {"pos": "learned"})
    report.main(["--study", "s", "--output", "reports/s.md"])
    parts = parts_of(Path("reports/s.md").read_text())
    ratios = np.exp([3.9 - 4.0, 4.3 - 4.2])
    headline = cells(parts["Headline"])
    expected = f"{ratios.mean():.4f} ± {statistics.stdev(ratios.tolist()):.4f}"
    assert headline["ngt (newton)"][5] == expected
    assert headline["vanilla (rotary)"][5] == "1.0000"
    cost = cells(parts["At equal cost"])
    # seed 1 got there at step 20 after 40 s of rotary's 30; seed 2 never did
    assert cost["ngt (newton)"][:2] == ["20", "1.33"]
    assert cost["vanilla (rotary)"][:3] == ["30", "1.00", "1.00"]
    assert cost["vanilla (learned)"] == ["never", "never", "never", "4.8000"]
    assert parts["At equal cost"].count("| ngt (newton) |") == 1
    assert parts["Ablations"].strip() == parts["Learning rates"].strip() == "not run."
    assert Path("reports/s.png").exists()


def test_times_of_two_machines_are_not_compared(in_tmp):
    """Seed 2 of NGT ran elsewhere: its losses count, its speed and its time do not."""
    for seed, machine in ((1, "one"), (2, "two")):
        write_run(f"s/headline/rotary_{seed}", [5.0, 4.0], seed=seed, machine="one", **ROTARY)
        where = SHAPE | {"seed": seed, "machine": machine}
        write_run(f"s/headline/ngt_{seed}", [4.0, 3.0], 2.0 * seed, **where)
        write_run(f"s/ablations/default_{seed}", [4.0, 3.0], seed, **where)
        write_run(f"s/sizes/ngt_{seed}", [4.0, 3.0], seed, **where)
    report.main(["--study", "s", "--output", "reports/s.md"])
    parts = parts_of(Path("reports/s.md").read_text())
    headline = cells(parts["Headline"])
    assert headline["ngt (newton)"][2] == "3.0000"
    assert headline["ngt (newton)"][-2:] == ["50", "40.0 s"]
    # at step 10 NGT of seed 1 was as good as rotary at its end, after 20 seconds as well
    steps, time, _, loss = cells(parts["At equal cost"])["ngt (newton)"]
    assert (steps, time, loss) == ("10", "1.00", "4.0000")
    assert cells(parts["Ablations"])["default"][-1] == "100"
    sizes = cells(parts["Other sizes"])
    assert sizes["ngt_1"][-2:] == ["100", "20.0 s"] and sizes["ngt_2"][-1] == "20.09"
    for title, run in (("Headline", "headline/ngt"), ("Ablations", "ablations/default")):
        assert f"here one. Left out: s/{run}_2 (two)." in parts[title]
    assert "here one. Left out: s/sizes/ngt_2 (two)." in parts["Other sizes"]


def test_the_strongest_control_comes_first(in_tmp):
    """All models are compared with the vanilla transformer that has the modern recipe and a sink,
    and with plain rotary of 2019; p is Student's, integrated numerically here."""
    vanilla = SHAPE | {"model": "vanilla", "pos": "rotary", "model_type": "vanilla"}
    control = vanilla | {"recipe": "modern", "smear": "keys-values", "sink": True}
    losses = {"rotary_gpt2": (4.4, 4.5, 4.3), "control": (4.1, 4.3, 4.0), "ngt": (3.9, 4.15, 3.85)}
    configs = {"rotary_gpt2": vanilla, "control": control, "ngt": SHAPE | {"recipe": "modern"}}
    for name, of_seeds in losses.items():
        for seed, loss in enumerate(of_seeds, 1):
            write_run(f"s/headline/{name}_{seed}", [5.0, loss], seed=seed, **configs[name])
    report.main(["--study", "s", "--output", "reports/s.md"])
    headline = cells(parts_of(Path("reports/s.md").read_text())["Headline"])
    best = "vanilla (rotary, smear keys-values, sink, modern)"
    assert next(name for name in headline if "(" in name) == best
    ngt = headline["ngt (newton, modern)"]
    differences = np.subtract(losses["ngt"], losses["control"])
    to_rotary = np.exp(np.subtract(losses["ngt"], losses["rotary_gpt2"]))
    assert ngt[5].split()[0] == f"{np.exp(differences).mean():.4f}"
    assert ngt[7].split()[0] == f"{to_rotary.mean():.4f}"
    t = abs(differences.mean()) / (differences.std(ddof=1) / np.sqrt(3))
    angle = np.linspace(np.arctan(t), np.pi / 2, 400_001)[
        :-1
    ]  # x = tan(angle), to integrate to inf
    density = (2 + np.tan(angle) ** 2) ** -1.5 / np.cos(angle) ** 2
    expected = 2 * np.trapezoid(density, angle)
    assert float(ngt[6]) == pytest.approx(expected, rel=0.02)
    assert headline[best][5:8] == ["1.0000", "", headline[best][7]]


SHAPE = {"block_size": 32, "vocab_size": 300, "hidden_dim": 16, "num_layers": 1, "num_heads": 2}
SHAPE |= {"mlp_dim": 16, "source_sha256": "0", "learning_rate": 1e-3, "model_type": "ngt"}
SHAPE |= {"max_steps": 20}
ROTARY = SHAPE | {"model": "vanilla", "pos": "rotary", "model_type": "vanilla"}
EVALUATION = {
    "by_length": [{"context": 64, "tokens": 640, "loss": None}],
    "by_place": [{"first": 1, "last": 1, "loss": 4.0}],
    "by_frequency": [],
    "repeats": [{"text": "<b>|`", "gap": 32, "again": 1.0, "once": 2.0}],
}


def write_study_of(losses):
    """Write a run of each stage, and one of rotary."""
    write_run("s/headline/rotary_1", losses, **ROTARY)
    write_run("s/headline/ngt_1", losses, **SHAPE)
    for place in ("rates/ngt_1", "rates/ngt_2", "ablations/default", "full/x_1", "sizes/x_1"):
        write_run(f"s/{place}", losses, **SHAPE)
    (Path("runs/s/headline/ngt_1") / "evaluation.json").write_text(json.dumps(EVALUATION))


@pytest.mark.parametrize("losses", [[None, None], [4.0, None], [None, 4.0]])
def test_losses_that_are_not_finite(losses, in_tmp):
    """Such a run does not stop the report; markup in an evaluation is shown as text."""
    write_study_of(losses)
    row = json.loads(Path("runs/s/full/x_1/metrics.jsonl").read_text().splitlines()[0])
    del row["bits_per_byte"]  # older runs have none
    Path("runs/s/full/x_1/metrics.jsonl").write_text(json.dumps(row) + "\n")
    report.main(["--study", "s", "--output", "reports/s.md"])
    text = Path("reports/s.md").read_text()
    assert ("not finite" in text) and "<b>" not in text
    headline = cells(parts_of(text)["Headline"])["ngt (newton)"]
    assert headline[2] == ("not finite" if losses[-1] is None else "4.0000")


def answer(gain, exact, **row):
    return {"gain": gain, "error": gain and 0.25, "exact": exact, **row}


def test_what_is_far(in_tmp):
    """A column for each model that was asked; empty cells beyond the positions of a model."""
    write_study_of([4.0, 3.0])
    report.main(["--study", "s", "--output", "reports/s.md"])
    before = parts_of(Path("reports/s.md").read_text())
    assert before["Is what is far used?"].startswith("\nnot run")
    ngt = {
        "trials": 50,
        "passkey": [answer(1.5, 0.125, distance=64), answer(0.0, 0.0, distance=2048)],
        "phone_book": [],
        "repeats": [
            answer(2.0, 0.0, distance=20, share=1.0),
            answer(1.1, 0.0, distance=2048, share=0.55),
        ],
    }
    rotary = {
        "trials": 50,
        "passkey": [answer(0.5, 0.0, distance=64), answer(None, None, distance=2048)],
        "phone_book": [],
        "repeats": [answer(0.25, 0.0, distance=20, share=None)],
    }
    for name, found in (("ngt_1", ngt), ("rotary_1", rotary)):
        path = Path(f"runs/s/headline/{name}/evaluation.json")
        path.write_text(json.dumps(EVALUATION | {"long_range": found}))
    report.main(["--study", "s", "--output", "reports/s.md"])
    parts = parts_of(Path("reports/s.md").read_text())
    key, book = cells(parts["A pass key"]), parts["A phone book"]
    assert key["64"] == ["+0.500 ± 0.250 (0.0%)", "+1.500 ± 0.250 (12.5%)"]
    assert key["2,048"] == ["", "+0.000 ± 0.000 (0.0%)"]
    assert "not run" in book
    strings = cells(parts["A string that comes again"])
    assert strings["20"] == ["+0.250 ± 0.250", "+2.000 ± 0.250 (100.0%)"]
    assert strings["2,048"] == ["", "+1.100 ± 0.250 (55.0%)"]


SHORTEST = {"by_length": [], "by_place": [], "by_frequency": [], "repeats": []}


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"by_length": [', "cannot be read"),
        ("[1]", "no dictionary"),
        ('{"by_length": []}', "no by_place"),
        (json.dumps(SHORTEST | {"by_frequency": {"first": 1}}), "a wrong by_frequency"),
        (json.dumps(SHORTEST | {"by_place": [[1, 2]]}), "no dictionary"),
        (json.dumps(SHORTEST | {"repeats": [{"text": "real", "gap": 1}]}), "no again"),
        (json.dumps(SHORTEST | {"long_range": []}), "no dictionary"),
        (json.dumps(SHORTEST | {"long_range": {"trials": 9, "passkey": 1}}), "a wrong passkey"),
    ],
)
def test_damaged_evaluations_are_one_line(text, words, in_tmp):
    write_study_of([4.0, 3.0])
    (Path("runs/s/headline/ngt_1") / "evaluation.json").write_text(text)
    with pytest.raises(UserError) as error:
        report.main(["--study", "s", "--output", "reports/s.md"])
    assert words in str(error.value) and "ngt_1/evaluation.json" in str(error.value)
    assert "evaluate.py" in str(error.value) and "\n" not in str(error.value)
    assert not Path("reports/s.md").exists()


def test_a_study_that_was_never_run(in_tmp):
    with pytest.raises(UserError, match=r"run_study\.sh"):
        report.main(["--study", "none", "--output", "reports/s.md"])
    with pytest.raises(SystemExit):
        report.main(["--study", "none"])
