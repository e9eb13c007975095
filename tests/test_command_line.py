"""What the scripts share on their command lines: paths, devices, and no environment."""

import argparse
import contextlib
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import ROOT
from gravity import attention, law, trial
from gravity.attention import gravity_attention
from system.cli import choose_device

# each with words that let it reach its heavy imports
SCRIPTS = {
    "train_shakespeare": [],
    "prepare_data": [],
    "chat": [],
    "visualize_coords": [],
    "report": ["--runs", "x"],
    "benchmark": ["data"],
    "evaluate": ["--checkpoint-path", "x"],
    "export": ["--checkpoint-path", "x", "--output", "y"],
    "lm_eval_ngt": ["--checkpoint-path", "x", "--tasks", "y"],
}
WORDS_OF_A_PATH = {"path", "file", "directory", "output", "reference", "json", "png", "checkpoint"}
WORDS_OF_A_PATH |= {"compare"}
NO_PATHS = {"--checkpoint-interval", "--resume"}


def flags(script, monkeypatch):
    """The actions of a script's parser, and of its subparsers."""
    found = []

    class Parsed(BaseException):
        pass

    def parse(parser, *_):
        found.append(parser)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        with pytest.raises(Parsed):
            importlib.import_module(script).main([])
    parsers = found + [
        sub
        for action in found[0]._actions
        if isinstance(action, argparse._SubParsersAction)
        for sub in action.choices.values()
    ]
    return [action for parser in parsers for action in parser._actions if action.option_strings]


def names_a_path(action):
    (name,) = [x for x in action.option_strings if x.startswith("--")][:1]
    is_file = action.metavar in ("FILE", "CHECKPOINT")
    return name not in NO_PATHS and (is_file or bool({*name[2:].split("-")} & WORDS_OF_A_PATH))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_path_flag_expands_the_home_directory(script, monkeypatch):
    """No shell does it in --flag=~/x, and a folder named ~ is not what anybody wants."""
    monkeypatch.setenv("HOME", "/home/of/somebody")
    paths = [action for action in flags(script, monkeypatch) if names_a_path(action)]
    assert paths
    for action in paths:
        assert action.type("~/x") == "/home/of/somebody/x", action.option_strings
        assert action.type("x/~y") == "x/~y" and action.type("/x") == "/x"


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_the_environment_one_line(script):
    """A Python without any package, as in a shell where nothing was activated."""
    command = [sys.executable, "-S", ROOT / f"{script}.py", *SCRIPTS[script]]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 1
    assert line.startswith("error: ") and "`source .venv/bin/activate`" in line
    assert re.search(r"no package [a-z]+: ", line) and sys.executable in line


def test_a_module_of_ours_that_is_missing_is_no_missing_environment():
    code = "from system.errors import run_script; run_script(lambda: __import__('text.nothing'))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" in result.stderr and "activate" not in result.stderr


@pytest.mark.parametrize("version, is_refused", [((3, 10), True), ((3, 11), False)])
def test_an_old_python_is_named(version, is_refused):
    code = f"import sys; sys.version_info = {version}; import system"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == is_refused
    assert ("Python 3.10 is too old" in result.stderr) == is_refused
    assert ("`source .venv/bin/activate`" in result.stderr) == is_refused
    assert "Traceback" not in result.stderr


def test_auto_takes_an_apple_gpu_that_computes(monkeypatch):
    """After CUDA, before the CPU, and only if gravity is right on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", lambda device: True) == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    asked = []
    assert choose_device("auto", lambda device: asked.append(device) or True).type == "mps"
    assert asked == [torch.device("mps")]
    assert choose_device("auto", lambda device: False).type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto", lambda device: pytest.fail("asked")).type == "cuda"


def test_the_trial_of_a_device(monkeypatch):
    """A device that lacks operations fails it, and so does one that computes something else."""
    state = torch.random.get_rng_state()
    assert trial.computes("cpu")
    assert not trial.computes("meta")
    assert torch.equal(torch.random.get_rng_state(), state)
    monkeypatch.setattr(trial, "gravity_attention", lambda **x: gravity_attention(**x) * 1.01)
    assert not trial.computes("cpu")


class NoFloat64(TorchDispatchMode):
    """Refuses float64, as Apple's GPUs do."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if any(torch.is_tensor(x) and x.dtype == torch.float64 for x in tree_leaves(out)):
            raise TypeError("no float64 here")
        return out


@pytest.mark.parametrize("knows", [True, False])
def test_the_plain_operator_needs_no_float64(knows, monkeypatch):
    """On a device without it; elsewhere it takes it, so that such a device fails the trial."""
    compute = trial._output_and_gradients

    def limited(attention, inputs, device, dtype):
        with NoFloat64() if dtype == torch.float32 else contextlib.nullcontext():
            return compute(attention, inputs, device, dtype)

    monkeypatch.setattr(attention, "cpu_handles", lambda q, v: False)
    monkeypatch.setattr(law, "WITHOUT_FLOAT64", ("cpu",) if knows else ())
    monkeypatch.setattr(trial, "_output_and_gradients", limited)
    assert trial.computes("cpu") == knows


def examples():
    """All text that shows commands: the READMEs, docs/, and the manuals of the scripts."""
    files = [*ROOT.glob("README*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*.sh")]
    files += [ROOT / f"{script}.py" for script in SCRIPTS]
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


def test_git_ignores_what_the_examples_write():
    """And the texts that they read: `git add .` must not take them, nor hide what is tracked."""
    flag = r"--(?:output|png|heads-png|json|tokenizer-path|checkpoint-path|data-path)[ =]"
    named = re.findall(rf"(?:{flag}|DATA_PATH=)([a-z][\w./]*)", examples())
    named = {name.rstrip(".") for name in named} | {"coords_other.html", "coords.html"}
    reports = {str(Path(name).with_suffix("")) for name in named if name.endswith(".md")}
    named |= {report + end for report in reports for end in (".csv", ".png", ".html")}
    git = ["git", "-C", str(ROOT)]
    listed = subprocess.run([*git, "ls-files"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git repository")
    tracked = set(listed.stdout.split())
    stems = {os.path.splitext(name)[0] for name in tracked}
    wanted = {name for name in named if os.path.splitext(name)[0] not in stems}
    assert {"books/", "heads.png", "train.json", "be.html", "reports/mine.md"} <= wanted
    ignored = subprocess.run(
        [*git, "check-ignore", "--no-index", "--stdin"],
        input="\n".join(wanted),
        capture_output=True,
        text=True,
    )
    assert wanted - set(ignored.stdout.splitlines()) == set()
    hidden = subprocess.run(
        [*git, "check-ignore", "--no-index", "--stdin"],
        input=listed.stdout,
        capture_output=True,
        text=True,
    )
    assert not hidden.stdout
