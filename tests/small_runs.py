"""Flags of small training runs, a made-up evaluation, and the comparison of two runs."""

import math

import torch

TINY = (
    *("--hidden-dim", 16, "--coord-dim", 8, "--head-coord-dim", 4, "--num-layers", 1),
    *("--num-heads", 2, "--mlp-dim", 16, "--block-size", 16, "--batch-size", 2),
    *("--eval-iters", 1, "--warmup-steps", 5, "--dropout", 0.1, "--no-use-cosine-schedule"),
)
SMALL = (
    *("--hidden-dim", 32, "--coord-dim", 8, "--head-coord-dim", 4, "--num-layers", 2),
    *("--num-heads", 2, "--mlp-dim", 48, "--block-size", 16, "--batch-size", 4),
    *("--eval-interval", 20, "--eval-iters", 2, "--checkpoint-interval", 15),
    *("--warmup-steps", 10, "--dropout", 0.1, "--gradient-accumulation-steps", 2),
    *("--sample-tokens", 4),
)


def evaluation(step, val_loss):
    return {
        **{"step": step, "tokens": step * 512, "train_loss": val_loss + 0.1},
        **{"val_loss": val_loss, "perplexity": math.exp(val_loss), "bits_per_byte": val_loss * 1.4},
        **{"repulsion": None, "tokens_per_s": 1000.0, "wall_time": step * 1.5},
    }


def same(a, b):
    """Bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(one, other):
    """Weights, optimizer, RNG and the curve of two runs are identical."""
    for key in ("model_state", "optimizer_state", "rng_state", "scheduler_state", "best_val"):
        assert same(one[key], other[key]), key
