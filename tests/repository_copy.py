"""A copy of the repository in which its shell scripts can run."""

import os
import shutil
import sys

from conftest import ROOT


def copy_of_the_repository(folder, **settings):
    """Copy the scripts; returns the environment to call them in: this one, and the settings."""
    left = shutil.ignore_patterns("tests", "runs", "checkpoints", ".*", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=left, dirs_exist_ok=True)
    prefix = os.path.dirname(os.path.dirname(sys.executable))
    return {
        **os.environ,
        **{"VIRTUAL_ENV": prefix, "PATH": f"{prefix}/bin:{os.environ['PATH']}"},
        **{"OMP_NUM_THREADS": "1", **settings},
    }
