"""Runs train_shakespeare.py and writes the number of every finished step to the file STEPS_FILE."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_shakespeare
from system.errors import run_script
from training.trainer import Trainer

take_step = Trainer.step


def counted_step(self):
    """Take a step and write its number to the file at once, so that a kill cannot lose it."""
    result = take_step(self)
    with open(os.environ["STEPS_FILE"], "a", encoding="utf-8") as file:
        file.write(f"{self.iter}\n")
    return result


if __name__ == "__main__":
    Trainer.step = counted_step
    run_script(train_shakespeare.main)
