"""The validation loss of a model, the same windows at every evaluation."""

import math

import torch
import torch.nn.functional as F

from data import eval_batches, eval_windows
from model import NGT, repulsion_loss
from training.display import evaluation_bar
from training.ranks import Ranks


@torch.no_grad()
def evaluate(model, data, block_size, eval_iters, device, autocast, ranks=None):
    """Cross-entropy on the fixed validation windows, and for NGT the repulsion there.

    Args:
        ranks: the processes that share the windows; all of them must call this.

    Returns:
        dict with `val_loss` (nats per token), `perplexity`, `bits_per_byte`, `repulsion` (None for
        vanilla).
    """
    ranks = ranks or Ranks()
    was_training = model.training
    model.eval()
    # logits of a batch have at most 2^26 numbers, whatever the vocabulary
    windows = max(1, min(8192, (1 << 26) // data.tokenizer.vocab_size) // block_size)
    total, count, repulsion = 0.0, 0, None
    batches = eval_batches(data.valid, block_size, eval_iters, windows)
    num_batches = -(-len(eval_windows(data.valid, block_size, eval_iters)) // windows)
    bar = evaluation_bar(batches, num_batches, ranks.is_main)
    for number, (inputs, targets) in enumerate(bar):
        # a rank without a batch in the last round takes the last one too, uncounted: under
        # --shard model all ranks must compute at the same time
        is_mine = number % ranks.size == ranks.rank
        if not is_mine and (number < num_batches - 1 or number % ranks.size > ranks.rank):
            continue
        inputs, targets = inputs.to(device), targets.to(device)
        with autocast():
            if isinstance(model, NGT):
                logits, geometry = model(inputs, return_geometry=True)
                if repulsion is None:  # of the first batch only
                    sample = torch.Generator().manual_seed(0)
                    repulsion = float(repulsion_loss(geometry.z, geometry.mass, generator=sample))
            else:
                logits = model(inputs)
        losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
        if is_mine:
            total += float(losses)
            count += targets.numel()
    model.train(was_training)
    loss = ranks.sum(total) / ranks.sum(count)
    return {
        "val_loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": loss / math.log(2) / data.bytes_per_token,
        "repulsion": repulsion,
    }


def perplexity(loss):
    """exp(loss); inf if a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf
