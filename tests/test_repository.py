"""The repository as a whole: its shape, the help of its scripts, and its shell scripts."""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import benchmark
import chat
import evaluate
import export
import lm_eval_ngt
import prepare_data
import report
import train_shakespeare
import visualize_coords
from conftest import ROOT, error_line, run
from repository_copy import copy_of_the_repository
from small_models import make_checkpoint
from training.options import train_parser

SCRIPTS = (
    *(train_shakespeare, prepare_data, chat, visualize_coords, report, benchmark, evaluate),
    *(export, lm_eval_ngt),
)
MODULES = (".py", ".cpp", ".js", ".css", ".html", ".sh")
LAYERS = (
    "system",
    "layers",
    "gravity text web",
    "data model vanilla_model",
    "engine",
    "training talk coords",
    "reporting benchmarks",
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_help_explains_and_shows_examples(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and f"python {script.__name__}.py" in text


LIST_IMPORTS = """
import runpy, sys
sys.argv.pop(0)
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(*{name for name in sys.modules if "torch._" in name or "." not in name}, file=sys.stderr)
"""


def imported(*command):
    """The modules that a script has imported at its end: packages, and parts of PyTorch."""
    words = [sys.executable, "-c", LIST_IMPORTS, ROOT / command[0], *command[1:]]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(result.stderr.splitlines()[-1].split())


@pytest.mark.parametrize("command", [*(f"{s.__name__}.py" for s in SCRIPTS), "benchmark.py train"])
def test_help_imports_nothing_heavy(command):
    """PyTorch takes a second, and who asks for help need not wait for it."""
    modules = imported(*command.split(), "--help")
    assert "argparse" in modules
    heavy = {"torch", "numpy", "tokenizers", "tiktoken", "tensorboard", "matplotlib", "plotly"}
    assert not modules & (heavy | {"sklearn", "datasets", "triton", "tqdm", "filelock"})


def test_chat_starts_without_what_it_does_not_use(in_tmp):
    """PyTorch's compiler takes two seconds, longer than PyTorch itself."""
    make_checkpoint("x.pt")
    modules = imported("chat.py", "--checkpoint-path", "x.pt", "--prompt", "a", "--seed", "1")
    assert "torch" in modules
    heavy = {"tensorboard", "matplotlib", "plotly", "sklearn", "sympy", "datasets"}
    assert not modules & (heavy | {"torch._dynamo", "torch._inductor"})


def test_every_training_flag_has_help_with_its_default():
    """A default that the help does not state is one that the user cannot know."""
    from training.config import DEFAULTS

    for action in train_parser("", "")._actions:
        assert action.help, action.option_strings
        if DEFAULTS.get(action.dest) is not None:
            assert "default: " in action.help, action.option_strings


def tracked_files():
    """The paths that git knows; skips outside a git repository."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git repository")
    return [Path(line) for line in listed.stdout.splitlines()]


def test_the_root_is_small():
    """Besides .ci, which only the automatic checks use."""
    paths = tracked_files()
    assert len([path for path in paths if len(path.parts) == 1]) <= 25
    assert len({path.parts[0] for path in paths if len(path.parts) > 1} - {".ci"}) <= 15


def test_no_module_is_long():
    """Kernels may be: their parts only make sense together."""
    for path in tracked_files():
        if path.parts[0] in ("tests", "reports", "docs") or path.suffix not in MODULES:
            continue
        lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
        if not path.match("gravity/cuda_*.py") and path != Path("gravity/cpu.cpp"):
            assert lines <= 400, path


def imports(path):
    """The names of all modules that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports hide which room is meant"
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_imports_point_one_way():
    """Each room uses only those of an earlier row of LAYERS, and nothing uses a script."""
    layer = {name: n for n, names in enumerate(LAYERS) for name in names.split()}
    scripts = {path.stem for path in ROOT.glob("*.py")} - layer.keys()
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert rooms <= layer.keys() and len(scripts) == len(SCRIPTS)
    for path in [
        *ROOT.glob("*.py"),
        *(path for room in rooms for path in (ROOT / room).glob("*.py")),
    ]:
        name = path.stem if path.parent == ROOT else path.parent.name
        for module in imports(path):
            used = module.split(".")[0]
            assert used not in scripts, f"{path} imports the script {used}"
            if used != name and used in layer:
                assert layer[used] < layer.get(name, len(LAYERS)), f"{path} imports {module}"


def test_nothing_outside_tests_names_the_workplace():
    kinds = (".py", ".sh", ".md", ".txt", ".toml", ".js", ".html", ".css", ".cpp", "")
    for path in [*ROOT.glob("*.*"), *ROOT.glob("[a-z]*/*.*"), *(ROOT / ".ci").iterdir()]:
        if path.is_file() and path.suffix in kinds and path.parent != ROOT / "tests":
            assert "../shared" not in path.read_text(encoding="utf-8"), path


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
    "EXTRA_FLAGS": "--sample-tokens 4",
}


def test_run_wikitext103_interrupted_and_called_again(in_tmp, small_text):
    """Ctrl-C ends it with 130 before the next model; called again it ends as if never stopped."""
    env = copy_of_the_repository(in_tmp, **TINY_25M, RUNS="ngt rotary")
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
    assert "== training vanilla" not in output
    assert output.splitlines()[-1] == "continue with: bash run_wikitext103_25m.sh"
    assert not (in_tmp / "runs/w3_25m/vanilla_rotary_25m").exists()
    stopped_at = torch.load("checkpoints/w3_25m/ngt_mass_in_value.pt_last.pt")["iter"]
    assert 10 <= stopped_at < 60

    again = subprocess.run(command, cwd=in_tmp, env=env, **quiet)
    assert again.returncode == 0, again.stdout
    assert f"resuming at step {stopped_at}" in again.stdout
    for name in ("ngt_mass_in_value", "vanilla_rotary_25m"):
        assert (in_tmp / f"checkpoints/w3_25m/{name}.pt_best.pt").exists()
        assert "best validation loss" in (in_tmp / f"logs/w3_25m/{name}.log").read_text()
    report = (in_tmp / "reports/w3_25m_summary.md").read_text()
    assert "106.01" in report and "| ngt (newton, background, mass in value) | 60 |" in report

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


@pytest.mark.parametrize("script", ["run_shakespeare.sh", "run_study.sh", "run_gpu_check.sh"])
def test_a_misspelt_text_ends_a_script(script, in_tmp):
    """Called from another directory, in which no such text is; nothing else is trained on."""
    settings = {"DATA_PATH": "my_bok.txt", "TINY": "1"}
    settings["STAGES"] = "training" if "gpu" in script else "headline"
    copy = in_tmp / "repository"
    env = copy_of_the_repository(copy, **settings)
    (copy / "tests").mkdir()
    shutil.copy(ROOT / "tests/requirements.txt", copy / "tests")
    result = subprocess.run(
        ["bash", f"repository/{script}"], env=env, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert f"--data-path {in_tmp}/my_bok.txt does not exist" in error_line(result)
    assert not (copy / "checkpoints").exists() and not list(copy.glob("runs/**/metrics.jsonl"))


def run_gpu_check(folder, **settings):
    """Run run_gpu_check.sh in a copy of the repository; returns the finished process."""
    env = copy_of_the_repository(folder, **settings)
    shutil.copytree(ROOT / "tests", folder / "tests", dirs_exist_ok=True)
    return subprocess.run(
        ["bash", "run_gpu_check.sh"], cwd=folder, env=env, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"PATH": "/usr/bin:/bin"}, "no NVIDIA GPU"),
        ({"TINY": "1", "MINUTES": "ten"}, "MINUTES=ten"),
        ({"TINY": "1", "STAGES": "steps nonsense"}, "nonsense"),
    ],
)
def test_run_gpu_check_bad_settings(settings, words, in_tmp):
    if shutil.which("nvidia-smi"):
        pytest.skip("there is a GPU here")
    result = run_gpu_check(in_tmp, **settings)
    assert result.returncode == 1 and words in error_line(result)
    assert not (in_tmp / "runs").exists()


@pytest.mark.slow
def test_run_gpu_check_small_and_called_again(in_tmp, small_text):
    """Every stage but --compile on a CPU; the second call repeats none."""
    for _ in range(2):
        result = run_gpu_check(in_tmp, TINY="1", DATA_PATH=str(small_text))
        assert result.returncode == 0, result.stdout + result.stderr
        page = (in_tmp / "reports/gpu_tiny.md").read_text()
        assert page.count("not run") == 1 + 1  # --compile, and the sentence that explains it
        assert "| decoding, 5 queries | yes |" in page and "| eager | " in page
        assert "## Both models" in page and page.count("| 4 of 4 |") == 2
    assert result.stdout.count("done already") == 4
    assert result.stdout.count("finished already") == 2


@pytest.mark.slow
def test_run_shakespeare_from_a_copy(in_tmp, small_text):
    """The README's first command, with the environment that runs this test."""
    env = copy_of_the_repository(in_tmp, MAX_STEPS="20", DATA_PATH=str(small_text))
    for _ in range(2):
        result = subprocess.run(
            ["bash", "run_shakespeare.sh"], cwd=in_tmp, env=env, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        assert "ngt (newton, background)" in result.stdout and "vanilla (rotary)" in result.stdout
    assert result.stdout.count("finished already") == 2
    assert (in_tmp / "coords_shakespeare.html").exists()
