"""Trains under `--shard model` and saves what came of it, for test_sharding.py.

It takes the flags of train_shakespeare.py, and torchrun's environment.
"""

import copy
import math
import sys

import torch

from text.preparation import prepare_data
from training.config import resolve
from training.options import train_parser
from training.ranks import joined
from training.trainer import Trainer

STEPS, BAD = 4, 2


def take_steps(trainer, is_bad_here=True):
    """What `STEPS` steps return; the loss of step `BAD` is NaN, under several ranks on some."""
    loss, results = trainer.loss, []
    for step in range(STEPS):
        factor = math.nan if step == BAD and is_bad_here else 1.0
        trainer.loss = lambda *args, factor=factor: tuple(x * factor for x in loss(*args))
        results.append(trainer.step())
    trainer.loss = loss
    return results


def kept(trainer):
    """The shapes of this rank's parts by name, and how many numbers its optimizer has."""
    state = trainer.optimizer.state_dict()["state"]
    averages = [x for group in state.values() for x in group.values() if x.dim()]
    shapes = {name: tuple(part.shape) for name, part in trainer.weights.named.items()}
    return shapes, sum(average.numel() for average in averages)


def step_with_an_overflow(trainer, is_here):
    """Take a step in fp16's manner, in which one rank's gradients alone overflow."""
    hand_over, trainer.scaler = trainer.weights.hand_over_gradients, type(trainer.scaler)("cpu")

    def overflowing():
        hand_over()
        if is_here:
            next(part for part in trainer.weights.named.values() if part.numel()).grad.fill_(
                math.inf
            )

    trainer.weights.hand_over_gradients = overflowing
    trainer.step()


def main():
    config = resolve(train_parser("", "").parse_args(sys.argv[1:]))
    with joined() as ranks:
        data = prepare_data("shakespeare", config["data_path"], say=lambda line: None)
        torch.manual_seed(1)
        trainer = Trainer(config, data, torch.device("cpu"), ranks)
        is_first = ranks.is_main  # its part is never empty
        found = {"results": take_steps(trainer, not is_first)}
        found |= {"state": copy.deepcopy(trainer.state()), "kept": ranks.gathered(kept(trainer))}
        whole_model = trainer.weights.whole_model()
        found["next"] = trainer.step()
        before = copy.deepcopy(trainer.state()["model_state"])
        step_with_an_overflow(trainer, is_first)
        if after := trainer.state()["model_state"]:
            found |= {"before": before, "after": after}
        if is_first:
            found["logits"] = whole_model(torch.arange(12)[None]).detach()
            torch.save(found, "steps.pt")


if __name__ == "__main__":
    main()
