"""Tests the page of run_gpu_check.sh: what was measured, and what was not reached."""

import json
from pathlib import Path

import report

CHECK = "benchmark.py correctness --jobs 4"
OPERATOR = "benchmark.py attention --dtype bf16"


def write_results(*lines):
    folder = Path("runs/gpu")
    folder.mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "results.jsonl").write_text(text + '{"stage": "oper')  # as a kill leaves it


def page():
    report.main(["--gpu-check", "gpu", "--output", "reports/gpu.md"])
    return Path("reports/gpu.md").read_text()


def test_nothing_measured(in_tmp):
    text = page()
    assert text.count("| all | not run |") == 6 and "| vanilla | not run |" in text
    assert "Nothing here has been measured" in text


def test_a_check_that_was_killed(in_tmp):
    """Rows that were reached have figures, the others and the later stages say so."""
    facts = {"machine": "H100, PyTorch 2.13.0", "code_version": "abc"}
    errors = {"good": False, "output": 2.5e-3, "gradients": 0.25, "per_head": None}
    write_results(
        {"stage": "correctness", "command": CHECK},
        {"stage": "operator", "command": OPERATOR},
        *({"command": CHECK, "row": row, **facts} for row in ("training", "long")),
        {"command": CHECK, "row": "training", **facts, **errors, "same_twice": True},
        {"stage": "correctness", "command": CHECK}
        | {"exit": "124", "seconds": "90", "last_line": "training  2.5e-03"},
        {"command": OPERATOR, "row": "16 x 512", **facts},
        {"command": OPERATOR, "row": "16 x 512", **facts}
        | {"ngt_ms": 0.2, "flash_ms": 0.1, "flash_ratio": 0.5},
    )
    text = page()
    assert "| training | **no** | 2.5e-03 | 0.250 |  | yes |" in text
    assert "| long | not run |  |  |  |  |" in text
    assert "exit code 124 after 90 s" in text
    assert "| 16 x 512 | 0.200 | 0.100 | 0.500 |" in text and "cuDNN, both" not in text
    assert "`H100, PyTorch 2.13.0`, at commit `abc`" in text
    assert text.count("| all | not run |") == 4


def test_output_is_needed(in_tmp, capsys):
    try:
        report.main(["--gpu-check", "gpu"])
    except SystemExit as stop:
        assert stop.code == 2 and "--gpu-check needs --output" in capsys.readouterr().err
