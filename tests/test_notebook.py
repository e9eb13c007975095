"""The notebook, run from top to bottom by a real kernel."""

import re
import shutil

import pytest

from conftest import ROOT
from repository_copy import copy_of_the_repository

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"


def test_it_has_no_outputs():
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type != "code" or (not cell.outputs and cell.execution_count is None)
    assert "STEPS = 200" in "".join(cell.source for cell in notebook.cells)


@pytest.mark.parametrize("steps", [4, pytest.param(200, marks=pytest.mark.slow)])
def test_it_runs(steps, tmp_path, monkeypatch, tiny_shakespeare):
    """Trained, mapped inline, and something written; opened in its own folder."""
    for name, value in copy_of_the_repository(tmp_path).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "data/shakespeare").mkdir(parents=True)
    shutil.copy(tiny_shakespeare, tmp_path / "data/shakespeare/input.txt")
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # everything is here: nothing may be fetched
    notebook = nbformat.read(NOTEBOOK, 4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("STEPS = 200", f"STEPS = {steps}")
    resources = {"metadata": {"path": str(tmp_path / "notebooks")}}
    nbclient.NotebookClient(notebook, timeout=280, resources=resources).execute()
    told = [
        "".join(str(output.get("text") or output.get("data", "")) for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    assert told[0].strip() == "ready"
    assert re.search(rf"step {steps}\b", told[1]) and "wrote quickstart.html" in told[2]
    assert "<iframe srcdoc=" in told[3] and "Look inside" in told[3]
    assert "(200 tokens" in told[4]
    assert (tmp_path / "checkpoints/quickstart.pt_best.pt").exists()
