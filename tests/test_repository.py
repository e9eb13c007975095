"""The promises of the README: every command it shows works, and every flag is explained."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time

import pytest
import torch

import benchmark
import chat
import evaluate
import prepare_data
import report
import train_shakespeare
import visualize_coords
from conftest import ROOT, SHARED, error_line, run
from repository_copy import copy_of_the_repository
from training.options import train_parser

SCRIPTS = (*(train_shakespeare, prepare_data, chat, visualize_coords, report, benchmark, evaluate),)
FIRST_RELEASE = """\
python train_shakespeare.py
python train_shakespeare.py --resume
python chat.py --checkpoint-path checkpoints/shakespeare.pt_best.pt
python visualize_coords.py --checkpoint-path checkpoints/shakespeare.pt_best.pt --output coords.html
python prepare_data.py --dataset wikitext103
python train_shakespeare.py --dataset wikitext103 --data-path data --tokenizer bpe \
--bpe-vocab-size 8192 --tokenizer-path data/tokenizer_bpe_8192.json --hidden-dim 512 \
--coord-dim 64 --num-layers 8 --num-heads 8 --mlp-dim 2048 --block-size 512 --batch-size 16 \
--gradient-accumulation-steps 2 --use-amp --use-cosine-schedule --warmup-steps 2000 \
--checkpoint-path checkpoints/w3_ngt.pt""".splitlines()


def readme_commands(name):
    """Every `python SCRIPT ...` line inside the code blocks of a README."""
    blocks = re.findall(r"```(?:bash|sh)?\n(.*?)```", (ROOT / name).read_text(), re.S)
    text = "\n".join(blocks).replace("\\\n", " ")
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    return [line for line in lines if line.startswith("python ") and ".py" in line]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_help_explains_and_shows_examples(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and f"python {script.__name__}.py" in text


def test_every_training_flag_has_help_with_its_default():
    """A default that the help does not state is one that the user cannot know."""
    from training.config import DEFAULTS

    for action in train_parser("", "")._actions:
        assert action.help, action.option_strings
        if DEFAULTS.get(action.dest) is not None:
            assert "default: " in action.help, action.option_strings


def test_readme_commands_parse():
    """Every training command of both READMEs is accepted by the parser as it is pasted."""
    english, korean = readme_commands("README.md"), readme_commands("README_KO.md")
    assert english == korean and len(english) >= 8
    for line in FIRST_RELEASE:
        assert " ".join(shlex.split(line)) in [" ".join(shlex.split(c)) for c in english], line
    for line in english:
        _, script, *flags = shlex.split(line)
        assert (ROOT / script).exists(), line
        if script == "train_shakespeare.py":
            train_parser("", "").parse_args(flags)


def test_readme_links_and_files_exist():
    for name in ("README.md", "README_KO.md"):
        text = (ROOT / name).read_text()
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (ROOT / target).exists(), (name, target)
        for script in ROOT.glob("*.py"):
            assert script.name in text, (name, script.name)


def test_nothing_outside_tests_names_the_workplace():
    for path in [*ROOT.glob("*.*"), *(ROOT / ".ci").iterdir()]:
        if path.is_file() and path.suffix in (".py", ".sh", ".md", ".txt", ".toml", ""):
            assert "../shared" not in path.read_text(), path


def test_first_release_commands_work_as_pasted(in_tmp, tiny_shakespeare):
    """On real text, with sizes and steps cut down by flags appended to the pasted line."""
    (in_tmp / "data" / "shakespeare").mkdir(parents=True)
    shutil.copy(tiny_shakespeare, in_tmp / "data" / "shakespeare" / "input.txt")
    wikitext = SHARED / "wikitext-103"
    shutil.copy(wikitext / "wiki.valid.tokens", in_tmp / "data" / "wiki.train.tokens")
    shutil.copy(wikitext / "wiki.test.tokens", in_tmp / "data" / "wiki.valid.tokens")
    cut = "--max-steps 3 --eval-iters 2 --num-layers 1"
    extra = {
        FIRST_RELEASE[0]: cut,
        FIRST_RELEASE[1]: "--max-steps 5",
        FIRST_RELEASE[2]: "--max-new-tokens 20",
        FIRST_RELEASE[-1]: f"{cut} --hidden-dim 32 --mlp-dim 64 --block-size 32 --batch-size 2",
    }
    for line in FIRST_RELEASE:
        _, script, *flags = shlex.split(f"{line} {extra.get(line, '')}")
        result = run(script, *flags, cwd=in_tmp, stdin="ROMEO:\n/quit\n")
        assert result.returncode == 0, (line, result.stdout, result.stderr)
    for path in (
        "checkpoints/shakespeare.pt_best.pt",
        "checkpoints/shakespeare.pt_last.pt",
        "checkpoints/w3_ngt.pt_last.pt",
        "data/tokenizer_bpe_8192.json",
        "coords.html",
    ):
        assert (in_tmp / path).exists(), path


def test_report_prints_what_the_runs_wrote(in_tmp, small_text):
    sizes = ("--hidden-dim", 16, "--num-layers", 1, "--num-heads", 2, "--block-size", 8)
    run(
        *("train_shakespeare.py", "--data-path", small_text, "--max-steps", 4, *sizes),
        cwd=in_tmp,
        check=0,
    )
    text = run("report.py", "--runs", "shakespeare", cwd=in_tmp, check=0).stdout
    row = json.loads((in_tmp / "runs/shakespeare/metrics.jsonl").read_text().splitlines()[-1])
    config = json.loads((in_tmp / "runs/shakespeare/config.json").read_text())
    assert f"{row['val_loss']:.4f}" in text and f"{config['parameters']:,}" in text
    missing = run("report.py", "--runs", "nothing", cwd=in_tmp, check=1)
    assert "nothing" in missing.stderr and "Traceback" not in missing.stderr


TINY_25M = {
    **{"DATASET": "text", "DATA_PATH": "corpus", "BPE_VOCAB_SIZE": "300", "MAX_STEPS": "60"},
    **{"HIDDEN_DIM": "16", "COORD_DIM": "8", "HEAD_COORD_DIM": "4", "NUM_LAYERS": "1"},
    **{"NUM_HEADS": "2", "BLOCK_SIZE": "16", "BATCH_SIZE": "2", "EVAL_ITERS": "1"},
    **{"GRADIENT_ACCUMULATION_STEPS": "2", "CHECKPOINT_INTERVAL": "7", "DEVICE": "cpu"},
}


def test_run_wikitext103_interrupted_and_called_again(in_tmp, small_text):
    """Ctrl-C ends it with 130 before the next model; called again it ends as if never stopped."""
    env = copy_of_the_repository(in_tmp, **TINY_25M, RUNS="ngt vanilla")
    (in_tmp / "corpus").mkdir()
    (in_tmp / "corpus" / "train.txt").write_text(small_text.read_text())
    (in_tmp / "corpus" / "valid.txt").write_text(small_text.read_text()[:4000])
    command = ["bash", "run_wikitext103_25m.sh"]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=in_tmp, env=env, start_new_session=True, **quiet)
    metrics = in_tmp / "runs/w3_25m/ngt_mass_in_value/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "== training vanilla" not in output and "continue with: " in output
    assert not (in_tmp / "runs/w3_25m/vanilla_25m").exists()
    stopped_at = torch.load("checkpoints/w3_25m/ngt_mass_in_value.pt_last.pt")["iter"]
    assert 10 <= stopped_at < 60

    again = subprocess.run(command, cwd=in_tmp, env=env, **quiet)
    assert again.returncode == 0, again.stdout
    assert f"resuming at step {stopped_at}" in again.stdout
    for name in ("ngt_mass_in_value", "vanilla_25m"):
        assert (in_tmp / f"checkpoints/w3_25m/{name}.pt_best.pt").exists()
        assert "best validation loss" in (in_tmp / f"logs/w3_25m/{name}.log").read_text()
    report = (in_tmp / "reports/w3_25m_summary.md").read_text()
    assert "106.01" in report and "| ngt (newton, mass in value) | 60 |" in report

    config = json.loads((in_tmp / "runs/w3_25m/ngt_mass_in_value/config.json").read_text())
    script, *flags = config["command"]
    for flag, value in (("--checkpoint-path", "c/whole.pt"), ("--run-name", "whole")):
        flags[flags.index(flag) + 1] = value
    run(script, *flags, cwd=in_tmp, check=0)
    one = torch.load("checkpoints/w3_25m/ngt_mass_in_value.pt_last.pt")["model_state"]
    other = torch.load("c/whole.pt_last.pt")["model_state"]
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"RUNS": "ngt nonsense"}, ("RUNS", "nonsense", "vanilla")),
        ({"MAX_STEPS": "many"}, ("MAX_STEPS=many",)),
        ({"NPROC": "0"}, ("NPROC=0",)),
        ({"DATA_PATH": "nowhere"}, ("--data-path nowhere",)),
        ({"HIDDEN_DIM": "-1"}, ("--hidden-dim",)),
    ],
)
def test_run_wikitext103_bad_settings(settings, words, in_tmp, small_text):
    """One line, and nothing is trained."""
    env = copy_of_the_repository(in_tmp, **{**TINY_25M, "DATA_PATH": str(small_text), **settings})
    result = subprocess.run(
        ["bash", "run_wikitext103_25m.sh"], cwd=in_tmp, env=env, capture_output=True, text=True
    )
    assert result.returncode in (1, 2)
    line = error_line(result)
    assert all(word in line for word in words)
    assert not (in_tmp / "checkpoints").exists() and not (in_tmp / "runs").exists()


@pytest.mark.slow
def test_run_shakespeare_from_a_copy(in_tmp, small_text):
    """The README's first command, with the environment that runs this test."""
    env = copy_of_the_repository(in_tmp, MAX_STEPS="20", DATA_PATH=str(small_text))
    for _ in range(2):
        result = subprocess.run(
            ["bash", "run_shakespeare.sh"], cwd=in_tmp, env=env, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        assert "ngt (newton)" in result.stdout and "vanilla (learned)" in result.stdout
    assert result.stdout.count("finished already") == 2
    assert (in_tmp / "coords_shakespeare.html").exists()
