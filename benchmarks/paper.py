"""What a step of training costs on more GPUs than are here: formulas, nothing measured.

Sources: ring all-reduce (Patarasuk & Yuan 2009), ZeRO stage 1 (Rajbhandari et al. 2020,
arXiv:1910.02054), 6 flops a parameter and token (Kaplan et al. 2020, arXiv:2001.08361).
"""

import statistics

import torch

from engine.flops import attention_flops
from engine.models import build_model
from training.config import DEFAULTS

GPUS_A_HOST = 8
GPU = {
    "peak_flops": 989e12,  # H100 SXM, bf16, its data sheet
    "mfu": 0.35,
    "nvlink_bytes_per_s": 370e9,  # what all-reduce reaches of 450 GB/s each way
    "network_bytes_per_s": 45e9,  # of a 400 Gbit/s card a GPU
}
_SHAPE = {"vocab_size": 50_257, "block_size": 2048, "head_coord_dim": 16, "coord_dim": 64}
SIZES = {
    "25M": _SHAPE
    | {"hidden_dim": 512, "num_layers": 8, "num_heads": 8, "mlp_dim": 2048, "vocab_size": 8192},
    "124M": _SHAPE | {"hidden_dim": 768, "num_layers": 12, "num_heads": 12, "mlp_dim": 3072},
    "350M": _SHAPE | {"hidden_dim": 1024, "num_layers": 24, "num_heads": 16, "mlp_dim": 4096},
    "1B": _SHAPE | {"hidden_dim": 2048, "num_layers": 22, "num_heads": 32, "mlp_dim": 8192},
}


def _network(shape, device="meta"):
    config = DEFAULTS | shape
    with torch.device(device):
        return build_model(config)


def parameters_of(shape):
    """How many an NGT of this shape has."""
    return sum(p.numel() for p in _network(shape).parameters())


def saved_bytes(shape):
    """Bytes a token that autograd keeps for the backward pass, embeddings and logits aside.

    Counted on real graphs: two blocks against one, 256 tokens against 128, in bf16.
    """
    short, long = 128, 256
    # a block's part of it that grows with the tokens: what is kept once for all of them goes
    growth = [_kept(shape, n, long) - _kept(shape, n, short) for n in (1, 2)]
    return (growth[1] - growth[0]) * shape["num_layers"] / (long - short)


def _kept(shape, num_layers, tokens):
    """Bytes that autograd keeps of one forward pass in bf16, parameters aside."""
    network = _network(shape | {"num_layers": num_layers, "vocab_size": 16}, "cpu")
    weights = {p.data_ptr() for p in network.parameters()}
    seen = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        network(torch.zeros(1, tokens, dtype=torch.long))
    return sum(size for size, _ in seen.values())


def memory_of_a_rank(parameters, ranks, sharded):
    """Bytes of weights, gradients and AdamW's averages, all fp32."""
    return 8 * parameters + 8 * parameters / (ranks if sharded else 1)


def bytes_on_the_wire(parameters, ranks, sharded):
    """What a rank sends in a step: a ring's all-reduce, and the new weights where it shares."""
    return (3 if sharded else 2) * (ranks - 1) / ranks * 4 * parameters


def mean_pairs(windows, tokens):
    """Pairs a token and head on average over heads, where none looks beyond its window."""
    pairs = []
    for window in (w for layer in windows for w in layer):
        w = min(window, tokens)
        pairs.append((w * (w + 1) / 2 + (tokens - w) * w) / tokens)
    return statistics.mean(pairs)


def efficiency(shape, parameters, ranks, tokens_a_rank):
    """Speed of `ranks` GPUs over that of as many alone: what is sent hides under the backward."""
    width = shape["hidden_dim"] // shape["num_heads"]
    pairs = (shape["block_size"] + 1) / 2 * shape["num_heads"] * shape["num_layers"]
    flops = 6 * parameters + attention_flops(pairs, shape["head_coord_dim"], width)
    compute = flops * tokens_a_rank / (GPU["mfu"] * GPU["peak_flops"])
    link = "nvlink_bytes_per_s" if ranks <= GPUS_A_HOST else "network_bytes_per_s"
    sending = bytes_on_the_wire(parameters, ranks, False) / GPU[link]
    return compute / (compute + max(0.0, sending - compute * 2 / 3))
