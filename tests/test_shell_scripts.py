"""The shell scripts as users meet them: called from anywhere, misspelt, interrupted, with CUDA.

Python, pip and NVIDIA's tool are stand-ins that note their calls, so that nothing is installed.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, error_line

RUN_SCRIPTS = (
    "run_shakespeare.sh",
    "run_study.sh",
    "run_wikitext103_25m.sh",
    "run_gpu_check.sh",
)
GALLERY = "docs/gallery/make.sh"
SCRIPTS = (*RUN_SCRIPTS, GALLERY, "run_tests.sh", "setup_venv.sh")
# each trains once
SMALL = {"SEEDS": "1", "RUNS": "ngt", "JOBS": "1", "TINY": "1"}
STAGES = {"run_study.sh": "headline", "run_gpu_check.sh": "training"}
PYTHON = f"""\
#!/bin/bash
[ "$1" != -c ] || exec {shlex.quote(sys.executable)} -c "import sys
sys.version_info = (*map(int, '$VERSION'.split('.')), 0)
$2" "${{@:3}}"
[ "$1" != --version ] || exec echo "Python $VERSION"
echo "$(basename "$0") $*" >>"$CALLS"
case "$*" in
    *"-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    *"-m pip"*)
        echo "pip is here"
        case "$*" in *download.pytorch.org*) exit "$INDEX" ;; esac
        ;;
    *train_shakespeare.py*--resume*)
        if [ -n "$CTRL_C" ]; then
            trap 'echo SIGINT >>"$CALLS"' INT
            kill -INT -- -"$TERMINAL"
            sleep 0.3
            exit 130
        fi
        ;;
esac
"""


@pytest.fixture
def call(tmp_path):
    """A function that calls a script of a small copy; returns the process, and what was called."""
    repository = tmp_path / "the repository"
    for folder in ("tests", "docs/gallery"):
        (repository / folder).mkdir(parents=True)
    for name in (*SCRIPTS, "requirements.txt", "tests/requirements.txt"):
        shutil.copy(ROOT / name, repository / name)
    places, calls = tmp_path / "active" / "bin", tmp_path / "calls"
    places.mkdir(parents=True)
    programs = dict.fromkeys(("python", "torchrun", "python3.14"), PYTHON)
    programs |= {"ruff": "#!/bin/sh\n", "nvidia-smi": '#!/bin/sh\nexit "$DRIVER"\n'}
    for name, text in programs.items():
        (places / name).write_text(text)
        (places / name).chmod(0o755)

    def run_script(script, *words, cwd=repository, **settings):
        calls.unlink(missing_ok=True)
        environment = {
            **{name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ},
            **{"PATH": f"{places}:/usr/bin:/bin", "CALLS": str(calls), "VERSION": "3.11"},
            **{"VIRTUAL_ENV": str(places.parent), "DRIVER": "1", "INDEX": "0", "CTRL_C": ""},
            **settings,
        }
        name = os.path.relpath(repository / script, cwd)
        result = subprocess.run(
            # Ctrl-C goes to all processes of the group whose number is in TERMINAL
            ["bash", "-c", 'TERMINAL=$$ exec bash "$@"', "-", name, *words],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            start_new_session=True,
        )
        return result, calls.read_text().splitlines() if calls.exists() else []

    run_script.repository = repository
    return run_script


def interrupted(call, script, **settings):
    """The lines that a script prints if Ctrl-C stops its training."""
    settings = SMALL | {"STAGES": STAGES.get(script, "")} | settings
    result, calls = call(script, CTRL_C="1", **settings)
    assert result.returncode == 128 + signal.SIGINT, result.stdout + result.stderr
    trainings = [line for line in calls if "train_shakespeare.py" in line and "--resume" in line]
    assert len(trainings) == 1 and "error" not in result.stderr
    assert calls.count("SIGINT") == 1, "a second signal ends a training unsaved"
    return result.stdout.splitlines()


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_prints_the_manual(script, call):
    result, calls = call(script, "--help")
    comment = [
        line[2:] for line in (ROOT / script).read_text().split("\nset -euo")[0].splitlines()[1:]
    ]
    assert result.returncode == 0 and not result.stderr and not calls
    assert result.stdout.splitlines()[:6] == comment[:6]
    assert f"bash {script}" in result.stdout and "TORCH" in result.stdout
    assert "fail MESSAGE" not in result.stdout


@pytest.mark.parametrize("word", ["--max-steps", "MAX_STEPS=200"])
@pytest.mark.parametrize("script", [*RUN_SCRIPTS, GALLERY, "setup_venv.sh"])
def test_unknown_words_are_refused(script, word, call):
    result, calls = call(script, word)
    line = error_line(result)
    assert result.returncode == 2 and not calls and not result.stdout
    assert word in line and "--help" in line


@pytest.mark.parametrize("script", RUN_SCRIPTS)
def test_ctrl_c_ends_with_the_command_to_continue(script, call):
    """Also after trainings that xargs has left behind; the settings stand in the line before."""
    name = "a name that is longer than a terminal is wide" * 3
    *_, settings, last = interrupted(call, script, NAME=name)
    assert last == f"continue with: bash {script}"
    assert f"NAME={shlex.quote(name)}".replace("'", "") in settings.replace("\\", "")


def test_ctrl_c_without_settings_and_from_elsewhere(call, tmp_path):
    result, _ = call("run_shakespeare.sh", CTRL_C="1", cwd=tmp_path)
    *lines, last = result.stdout.splitlines()
    assert last == "continue with: bash the\\ repository/run_shakespeare.sh"
    assert not any("same settings" in line for line in lines)


def test_the_gallery_continues_with_the_same_pages(call):
    *_, settings, last = interrupted(call, GALLERY, PAGES="korean")
    assert settings == "with the same settings: PAGES=korean"
    assert last == f"continue with: bash {GALLERY}"


@pytest.mark.parametrize("script", RUN_SCRIPTS)
def test_a_text_is_looked_for_where_the_script_was_called(script, call, tmp_path):
    """A relative path means what it means in the user's shell; so do the paths of EXTRA_FLAGS."""
    here = tmp_path / "elsewhere"
    here.mkdir()
    settings = SMALL | {"DATASET": "text", "STAGES": STAGES.get(script, "")}
    settings |= {"EXTRA_FLAGS": "--tokenizer-path=tok.json --resume-from ~/x.pt --seed 3"}
    result, calls = call(script, cwd=here, DATA_PATH="book.txt", **settings)
    training = [line for line in calls if "train_shakespeare.py" in line]
    assert result.returncode == 0 and training, result.stderr
    home = os.environ["HOME"]
    for line in training:
        assert f"--data-path {here}/book.txt" in line
        assert f"--tokenizer-path={here}/tok.json --resume-from {home}/x.pt --seed 3" in line


def test_called_in_the_repository_paths_stay_as_they_are(call):
    """An earlier study was trained with such flags, and would not continue with others."""
    (call.repository / "books").mkdir()
    _, calls = call("run_study.sh", DATASET="text", DATA_PATH="books", STAGES="headline", SEEDS="1")
    assert any("train_shakespeare.py" in line and "--data-path books " in line for line in calls)


DRIVER = {"DRIVER": "0"}


@pytest.mark.parametrize(
    "settings, build",
    [
        ({}, "cpu"),
        (DRIVER, "cuda"),
        (DRIVER | {"TORCH": "cpu"}, "cpu"),
        ({"TORCH": "cuda"}, "cuda"),
        ({"INDEX": "1"}, "none"),
    ],
    ids=str,
)
@pytest.mark.parametrize("script", ["setup_venv.sh", "run_shakespeare.sh", "run_tests.sh"])
def test_cuda_is_never_a_surprise(script, settings, build, call):
    """The size is said before pip runs; without a driver the CPU's PyTorch comes first."""
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has a driver")
    result, calls = call(script, **settings)
    assert result.returncode == 0, result.stderr
    said, _ = result.stdout.split("pip is here", 1)
    assert ("about 3 GB" in said) == (build == "cuda")
    assert "450 MB" in said
    assert ("cannot be reached" in result.stdout) == (build == "none")
    pip = [shlex.split(line) for line in calls if "-m pip" in line]
    if build != "cuda":
        first = pip.pop(0)
        assert first[first.index("--index-url") + 1] == "https://download.pytorch.org/whl/cpu"
        assert "torch==2.13.0" in first and "--no-deps" in first
        assert [first[first.index(x) + 1] for x in ("--retries", "--timeout")] == ["0", "10"]
    (everything,) = pip
    assert "requirements.txt" in everything and "--index-url" not in everything
    again, calls = call(script, **settings)
    assert "MB" not in again.stdout and not [line for line in calls if "-m pip" in line]


def test_an_unknown_build_of_pytorch_is_refused(call):
    result, calls = call("run_shakespeare.sh", TORCH="rocm")
    assert result.returncode == 1 and not calls and "TORCH=rocm" in error_line(result)


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13", "3.14", "3.15"])
def test_versions_of_python(version, call):
    """Those of a machine of today; what PYTHON names is not replaced by another."""
    result, calls = call("setup_venv.sh", VIRTUAL_ENV="", PYTHON="python3.14", VERSION=version)
    if version in ("3.10", "3.15"):
        assert result.returncode == 1 and not calls
        assert "PYTHON=python3.14" in error_line(result)
        assert "3.11 to 3.14" in error_line(result)
        return
    assert result.returncode == 0, result.stderr
    assert calls[0] == "python3.14 -m venv .venv" and "-m pip" in calls[-1]
    assert f"creating .venv with Python {version}" in result.stdout
    assert result.stdout.splitlines()[-1] == "ready: source .venv/bin/activate"


def test_an_active_environment_of_an_old_python_is_refused(call):
    result, calls = call("run_shakespeare.sh", VERSION="3.10")
    assert result.returncode == 1 and not calls
    assert "3.10" in error_line(result)
