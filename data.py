"""Batches from token files: a pure function of (seed, step, micro-step)."""

import numpy as np
import torch

from system.errors import UserError

EVAL_WINDOWS_PER_ITER = 16  # windows per unit of --eval-iters


def check_long_enough(tokens, block_size, split, data):
    """Check that a split holds at least one window and its last target.

    Args:
        tokens: the split's ids, (N,).
        split: its name, for the message.
        data: the `TokenData` that it belongs to.

    Raises:
        UserError: if it does not.
    """
    if len(tokens) < block_size + 1:
        raise UserError(
            f"the {split} split of {data.meta['source']} has {len(tokens)} tokens, fewer than "
            f"--block-size {block_size} and one more: give more text or a smaller --block-size"
        )


def get_batch(tokens, batch_size, block_size, seed, step, micro_step=0):
    """A random training batch; the same for equal (seed, step, micro_step).

    Args:
        tokens: (N,) ids, a memory map, or several as `ShardedTokens`.

    Returns:
        inputs and targets, both (batch_size, block_size) int64.
    """
    rng = np.random.default_rng([seed, step, micro_step])
    starts = rng.integers(0, len(tokens) - block_size, size=batch_size)
    return _windows(tokens, starts, block_size)


def eval_windows(tokens, block_size, eval_iters):
    """The starts of the fixed evaluation windows: evenly spread, without overlap.

    Their number is `eval_iters * EVAL_WINDOWS_PER_ITER`, or as many as the split holds.
    """
    available = (len(tokens) - 1) // block_size
    count = min(available, eval_iters * EVAL_WINDOWS_PER_ITER)
    return np.arange(count) * available // count * block_size


def eval_batches(tokens, block_size, eval_iters, batch_size):
    """Yield the fixed evaluation windows, (<= batch_size, block_size) inputs and targets."""
    starts = eval_windows(tokens, block_size, eval_iters)
    for first in range(0, len(starts), batch_size):
        yield _windows(tokens, starts[first : first + batch_size], block_size)


def _windows(tokens, starts, block_size):
    """Inputs and targets from the given starts, (len(starts), block_size) int64 each."""
    index = np.asarray(starts)[:, None] + np.arange(block_size + 1)
    windows = torch.from_numpy(tokens[index].astype(np.int64))
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
