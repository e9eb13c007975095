"""A copy of the repository in which its shell scripts can run."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from conftest import ROOT
from script_runner import python_for_shell_scripts


def copy_of_the_repository(folder, **settings):
    """Copy the scripts; returns the environment to call them in: this one, and the settings.

    Where there is /proc, `python` is a quick stand-in for it.
    """
    left = shutil.ignore_patterns("tests", "runs", "checkpoints", ".*", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=left, dirs_exist_ok=True)
    prefix = os.path.dirname(os.path.dirname(sys.executable))
    python = {"PATH": f"{prefix}/bin:{os.environ['PATH']}"}
    if os.path.exists("/proc/self/fd"):
        python = python_for_shell_scripts(Path(tempfile.mkdtemp()))
    return {**os.environ, **python, "VIRTUAL_ENV": prefix, "OMP_NUM_THREADS": "1", **settings}
