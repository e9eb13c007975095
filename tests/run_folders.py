"""Writes run folders without training, and reads the tables of a report."""

import json
from pathlib import Path

import numpy as np

CONFIG = {
    "model": "ngt",
    "law": "newton",
    "mass_in_value": False,
    "pos": "learned",
    "seed": 1,
    "learning_rate": 1e-3,
    "parameters": 1234,
    "vocab_size": 300,
    "block_size": 32,
    "hidden_dim": 16,
    "num_layers": 1,
    "num_heads": 2,
    "max_steps": 30,
    "source": "text of the test",
    "machine": "a machine",
    "command": ["train_shakespeare.py", "--seed", "1"],
    "code_version": "abc",
    "checkpoint_path": "checkpoints/none.pt",
}


def write_run(name, losses, seconds_a_step=1.0, **config):
    """A run that was evaluated every ten steps."""
    folder = Path("runs") / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    rows = []
    for n, loss in enumerate(losses, 1):
        rows.append(
            {
                "step": 10 * n,
                "tokens": 1000 * n,
                "train_loss": 9.0,
                "val_loss": loss,
                "perplexity": None if loss is None else round(float(np.exp(loss)), 6),
                "bits_per_byte": None if loss is None else loss / 3,
                "tokens_per_s": 100 / seconds_a_step,
                "steps_per_s": 1 / seconds_a_step,
                "wall_time": 10 * n * seconds_a_step,
                "peak_memory_bytes": 7 << 20,
            }
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def cells(table):
    """The lines of a Markdown table as lists of cells, by their first cell."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    return {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}
