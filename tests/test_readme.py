"""What the READMEs and docs/ promise: each command works as it is pasted, each link exists."""

import argparse
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser as torchrun_parser

from conftest import ROOT, SHARED, run
from repository_copy import copy_of_the_repository
from training.options import train_parser

READMES = ("README.md", "README_KO.md")
# The guide to training comes first: its commands train what the other pages show.
PAGES = (
    *("docs/training.md", "README.md", "docs/looking_inside.md", "docs/reliability.md"),
    *("docs/sharing.md", "docs/credits.md", "docs/gallery/README.md"),
)
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
STAND_IN = f"""\
#!/bin/bash
[ "$1" != -c ] || exec {shlex.quote(sys.executable)} "$@"
echo "$(basename "$0") $(printf '%q ' "$@")" >>"$CALLS"
"""


def commands(page):
    """The commands of a page in order: lines of its bash blocks, and those named in its prose."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = [block.replace("\\\n", " ") for block in re.findall(r"```bash\n(.*?)```", text, re.S)]
    lines = [" ".join(line.split("#")[0].split()) for line in "\n".join(blocks).splitlines()]
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    lines += re.findall(
        r"`((?:[A-Z_]+=\S+ )*(?:bash|python|torchrun|pip) [^`\n]*\.[^`\n]+)`", prose
    )
    return [line for line in lines if line]


COMMANDS = list(dict.fromkeys(line for page in PAGES for line in commands(page)))


def how(line):
    """How a command is tested.

    "run": as it is pasted, with smaller sizes. "parse": only by the parser of its script, because
    it takes minutes, waits for a visitor or needs the network. "script": a shell script, with a
    stand-in for Python.
    """
    first = shlex.split(line)[0]
    if first == "bash" or "=" in first:
        return "script"
    if re.match(r"(torchrun|tensorboard|pip|python (tests/|benchmark|lm_eval))", line):
        return "parse"
    return "parse" if "--serve" in line else "run"


def by_kind(kind):
    return [line for line in COMMANDS if how(line) == kind]


class Parsed(BaseException):
    """Raised in place of what a script does after it has read its flags."""


def parse(script, flags, monkeypatch):
    """Let a script read these flags and stop it there."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        original(self, args, namespace)
        raise Parsed

    with monkeypatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(sys, "argv", [script, *flags])
        runpy.run_path(str(ROOT / script), run_name="__main__")


def install(flags, requirements=ROOT):
    """Check what pip is told to install: files that exist, or packages pinned as in them."""
    for flag, value in zip(flags, [*flags[1:], ""], strict=True):
        if flag == "-r":
            assert (requirements / value).exists(), value
        elif "==" in flag:
            assert flag in (ROOT / "requirements.txt").read_text().split()


def test_both_readmes_have_the_same_commands_and_the_docs_explain_them():
    english, korean = map(commands, READMES)
    assert english == korean and len(english) >= 8
    explained = {line for page in PAGES if page.startswith("docs") for line in commands(page)}
    assert set(english) <= explained
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")} <= set(PAGES)
    for line in FIRST_RELEASE:
        assert " ".join(line.split()) in COMMANDS, line


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1200


@pytest.mark.parametrize("page", [*READMES, *PAGES[:1], *PAGES[2:]])
def test_links_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!http)([^)#]+)", text)
    assert targets
    for target in targets:
        assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", READMES)
def test_every_room_and_script_stands_in_the_tree(page):
    """And nothing else does."""
    blocks = re.findall(r"```(\w*)\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)
    tree = [text for language, text in blocks if not language][-1]
    names = {line.split()[0] for line in tree.splitlines()}
    rooms = {f"{path.parent.name}/" for path in ROOT.glob("*/__init__.py")}
    scripts = {path.name for kind in ("*.py", "*.sh") for path in ROOT.glob(kind)}
    assert names == rooms | scripts | {"web/", "tests/", "docs/", "reports/", "notebooks/"}


def test_every_training_flag_stands_in_the_guide():
    guide = set(
        re.findall(r"`(--[a-z0-9-]+)", (ROOT / "docs/training.md").read_text(encoding="utf-8"))
    )
    for action in train_parser("", "")._actions:
        assert set(action.option_strings) & (guide | {"--help"}), action.option_strings


def test_commands_work_as_pasted(in_tmp):
    """In one folder, on real text; sizes and steps are cut down by flags added at the end."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*/*.py")))
    for folder, end in (("books", "txt"), ("data", "tokens")):
        (in_tmp / folder).mkdir()
        name = "wiki." if folder == "data" else ""
        (in_tmp / folder / f"{name}train.{end}").write_text(text[:200_000], encoding="utf-8")
        for split, part in (("valid", text[-50_000:]), ("test", text[-60_000:-50_000])):
            (in_tmp / folder / f"{name}{split}.{end}").write_text(part, encoding="utf-8")
    shakespeare = SHARED / "tinyshakespeare.txt"
    if shakespeare.exists():
        (in_tmp / "data/shakespeare").mkdir()
        shutil.copy(shakespeare, in_tmp / "data/shakespeare/input.txt")
    shutil.copytree(ROOT / "reports", "reports", ignore=shutil.ignore_patterns("study_runs"))
    cut = {
        "train_shakespeare.py": "--max-steps 3 --eval-iters 2 --num-layers 1",
        "chat.py": "--max-new-tokens 20",
        "evaluate.py": "--context-lengths 64 --num-windows 4 --long-range 2",
    }
    further = {
        FIRST_RELEASE[1]: "--max-steps 5",
        FIRST_RELEASE[-1]: f"{cut['train_shakespeare.py']} --hidden-dim 32 --mlp-dim 64"
        " --block-size 32 --batch-size 2",
    }
    for line in by_kind("run"):
        _, script, *flags = words = shlex.split(line)
        if words[0] == "source" or script == "-m":
            subprocess.run(
                ["bash", "-ec", line.replace("venv .", "venv --without-pip .")], check=True
            )
            continue
        shell_scripts_have_run(in_tmp)
        if (
            script == "train_shakespeare.py"
            and "--dataset" not in flags
            and not shakespeare.exists()
        ):
            flags += ["--data-path", "books/train.txt"]  # the original would be downloaded
        if "--offset" in flags:
            flags += ["--offset", "100"]  # the text here is shorter
        flags += shlex.split(further.get(" ".join(words), cut.get(script, "")))
        result = run(script, *flags, cwd=in_tmp, stdin="ROMEO:\n/quit\n")
        assert result.returncode == 0, (line, result.stdout, result.stderr)
        for name in re.findall(r"--(?:output|png|heads-png|tokenizer-path) (\S+)", line):
            assert (in_tmp / name).exists(), (line, name)


def shell_scripts_have_run(folder):
    """Put a small model in the place of each that the shell scripts would have trained."""
    small = {"w3_25m/ngt_mass_in_value": "shakespeare", "mine/headline/ngt_1": "shakespeare"}
    small["shakespeare_vanilla"] = "rotary"
    for name, source in small.items():
        checkpoint = folder / f"checkpoints/{name}.pt_best.pt"
        trained = folder / f"checkpoints/{source}.pt_best.pt"
        if trained.exists() and not checkpoint.exists():
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(trained, checkpoint)
            shutil.copytree(folder / f"runs/{source}", folder / "runs" / name)


@pytest.mark.parametrize("line", by_kind("parse"))
def test_commands_that_take_long_are_parsed(line, monkeypatch):
    words = shlex.split(line)
    if words[0] == "torchrun":
        words = torchrun_parser().parse_args(words[1:])
        parse(words.training_script, words.training_script_args, monkeypatch)
    elif words[0] == "tensorboard":
        from tensorboard import default, program

        program.TensorBoard(default.get_plugins()).configure(words)
    elif words[0] == "pip":
        assert words[1] == "install"
        install(words[2:])
    elif words[1] == "tests/hostile_files.py":
        assert (ROOT / words[1]).exists() and len(words) == 2, "it takes no flags"
    else:
        if words[1] == "tests/screenshots.py":
            pytest.importorskip("playwright.sync_api", reason="no playwright here")
        parse(words[1], words[2:], monkeypatch)


@pytest.mark.parametrize("line", by_kind("script"))
def test_shell_scripts_start_what_they_should(line, in_tmp, monkeypatch):
    """Each runs with a stand-in for Python that notes its calls; their scripts parse the flags."""
    copy_of_the_repository(in_tmp)
    shutil.copytree(ROOT / "tests", "tests", ignore=shutil.ignore_patterns("*_*", "test_*"))
    places = Path("environment/bin")
    places.mkdir(parents=True)
    for name in ("python", "torchrun", "ruff", "nvidia-smi"):
        (places / name).write_text(STAND_IN)
        (places / name).chmod(0o755)
    environment = {
        **os.environ,
        **{"VIRTUAL_ENV": str(in_tmp / "environment"), "CALLS": str(in_tmp / "calls")},
        "PATH": f"{in_tmp}/{places}:{os.environ['PATH']}",
    }
    for name in re.findall(r"\b([A-Z_]+)=", line):
        assert re.search(rf"\b{name}\b", Path(line.split()[-1]).read_text()), name
    result = subprocess.run(
        ["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stdout + result.stderr
    calls = [shlex.split(call) for call in Path("calls").read_text().splitlines()]
    started = [call[1:] for call in calls if call[0] == "python"]
    assert started
    for script, *flags in map(list, dict.fromkeys(map(tuple, started))):
        if script != "-m":
            parse(script, flags, monkeypatch)
        elif flags[0] == "pip":
            install(flags[1:])
        else:
            assert flags[0] == "pytest"
