"""Computes what a training step costs on up to 64 GPUs, by formulas: nothing is measured.

Sources: ring all-reduce (Patarasuk & Yuan 2009), ZeRO stage 1 (Rajbhandari et al. 2020,
arXiv:1910.02054), 6 flops per parameter and token (Kaplan et al. 2020, arXiv:2001.08361).
"""

import torch

from engine.flops import attention_flops
from engine.models import build_model
from system.markdown import markdown_table
from training.config import DEFAULTS

GPUS_PER_HOST = 8
GPU = {
    "peak_flops": 989e12,  # H100 SXM, bf16, its data sheet
    "mfu": 0.35,  # assumed
    "nvlink_bytes_per_s": 370e9,  # what all-reduce reaches of 450 GB/s each way
    "network_bytes_per_s": 45e9,  # of one 400 Gbit/s card per GPU
}
_SHAPE = {"vocab_size": 50_257, "block_size": 2048, "head_coord_dim": 16, "coord_dim": 64}
SIZES = {
    "25M": _SHAPE
    | {"hidden_dim": 512, "num_layers": 8, "num_heads": 8, "mlp_dim": 2048, "vocab_size": 8192},
    "124M": _SHAPE | {"hidden_dim": 768, "num_layers": 12, "num_heads": 12, "mlp_dim": 3072},
    "350M": _SHAPE | {"hidden_dim": 1024, "num_layers": 24, "num_heads": 16, "mlp_dim": 4096},
    "1B": _SHAPE | {"hidden_dim": 2048, "num_layers": 22, "num_heads": 32, "mlp_dim": 8192},
}
RANKS_ON_PAPER = (1, 8, 64)
RANKS_OF_1B = (1, 2, 4, 8, 16)
TOKENS_PER_RANK = (2048, 4096, 16_384)


def paper_section():
    """Markdown: memory, bytes sent and efficiency for more GPUs and more parameters."""
    lines = []
    for name, shape in SIZES.items():
        parameters = parameters_of(shape)
        activations = saved_bytes(shape) * TOKENS_PER_RANK[-1]
        for n in RANKS_ON_PAPER:
            whole, sharded = (memory_of_a_rank(shape, n, s) for s in ("none", "optimizer"))
            lines.append(
                [
                    f"{name}: {parameters / 1e6:,.0f}M",
                    str(n),
                    f"{whole / 1e9:.1f} GB",
                    f"{sharded / 1e9:.1f} GB" if n > 1 else "-",
                    f"{activations / 1e9:.1f} GB",
                    f"{bytes_on_the_wire(parameters, n, False) / 1e9:.2f} GB" if n > 1 else "-",
                    f"{bytes_on_the_wire(parameters, n, True) / 1e9:.2f} GB" if n > 1 else "-",
                    *(f"{efficiency(shape, parameters, n, t):.0%}" for t in TOKENS_PER_RANK),
                ]
            )
    head = ["model", "GPUs", "weights, gradients, AdamW", "sharded", "activations"]
    head += ["sent per step", "sharded"]
    head += [f"efficiency at {tokens:,} tokens per rank" for tokens in TOKENS_PER_RANK]
    return f"""## On paper: 8 and 64 GPUs, up to 1B parameters

Nothing in this section was measured. P parameters, N ranks, fp32 weights, gradients and averages:

```
memory per rank  16 P              weights 4, gradients 4 (in DDP's buckets), averages 8
                 8 P + 8 P / N     --shard optimizer
sent by a rank   2 (N-1)/N * 4 P   ring all-reduce of the gradients, once per step
                 3 (N-1)/N * 4 P   --shard optimizer: the new weights are sent, too
                 3 (N-1)/N * 4 P   --shard model, per micro-step: weights twice, gradients once
compute          (6 P + attention) * tokens / (MFU * peak)
efficiency       compute / (compute + sending beyond the backward pass, 2/3 of computing)
```

Activations are the bytes that autograd keeps for the backward pass, counted for one layer of each
shape in bf16, times layers and {TOKENS_PER_RANK[-1]:,} tokens. Logits are not included (6 bytes x
vocabulary x tokens per micro-step: use --gradient-accumulation-steps). Assumed of the machine:
{GPU["peak_flops"] / 1e12:.0f} TFLOP/s at the peak in bf16, MFU {GPU["mfu"]:.0%},
{GPU["nvlink_bytes_per_s"] / 1e9:.0f} GB/s to the {GPUS_PER_HOST} GPUs of the same host,
{GPU["network_bytes_per_s"] / 1e9:.0f} GB/s per GPU beyond it.
Efficiency is an upper limit: slow ranks, evaluations and waiting kernels are not included.

{markdown_table(head, lines)}

A step sends the same number of bytes for few tokens as for many, so a large batch or accumulation
scales better.

{sharding_section()}
"""


def sharding_section():
    """Markdown: the memory that each way of sharding takes for 1B parameters."""
    shape, lines = SIZES["1B"], []
    for n in RANKS_OF_1B:
        shards = ("none", "optimizer", "model") if n > 1 else ("none",)
        cells = [f"{memory_of_a_rank(shape, n, shard) / 1e9:.1f} GB" for shard in shards]
        lines.append([str(n), *cells, *["-"] * (3 - len(cells))])
    of_layer, of_root = (count / 1e6 for count in _parts_gathered(shape))
    head = ["processes", "--shard none", "--shard optimizer", "--shard model"]
    return f"""## Memory per process for 1B parameters

Weights, gradients and AdamW's averages of the model 1B above, in fp32, counted parameter by
parameter; activations and logits come on top. With `--shard model` a process keeps 16 bytes for
each number of its part (FSDP2 divides every weight by rows). It also gathers the embedding, which
is the head, and what else is in no layer ({of_root:,.0f}M parameters, 8 bytes: weights and
gradients), and one layer at a time ({of_layer:,.1f}M parameters, 20 bytes: the weights of it and
of the next one, its gradients, and the buffers of both). In bf16 autocast keeps 2 bytes of every
weight of the layers until the backward pass, which is not in the table.

{markdown_table(head, lines)}
"""


def _network(shape, device="meta"):
    with torch.device(device):  # on "meta" weights take no memory, so 1B parameters are no problem
        return build_model(DEFAULTS | shape)


def parameters_of(shape):
    """Number of parameters of an NGT of this shape."""
    return sum(p.numel() for p in _network(shape).parameters())


def saved_bytes(shape):
    """Bytes per token that autograd keeps for the backward pass, without embeddings and logits.

    Counted on real graphs: two layers against one, 256 tokens against 128, in bf16.
    """
    short, long = 128, 256
    # the differences leave what one layer keeps for each token: constant parts cancel
    growth = [_kept(shape, n, long) - _kept(shape, n, short) for n in (1, 2)]
    return (growth[1] - growth[0]) * shape["num_layers"] / (long - short)


def _kept(shape, num_layers, tokens):
    """Bytes that autograd keeps of one forward pass in bf16, without the parameters."""
    # logits are not to be counted, so the vocabulary is tiny
    network = _network(shape | {"num_layers": num_layers, "vocab_size": 16}, "cpu")
    weights = {p.data_ptr() for p in network.parameters()}
    seen = {}  # by address, as two saved tensors may share memory

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            # holding the tensor keeps its address from being used again
            seen[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        network(torch.zeros(1, tokens, dtype=torch.long))
    return sum(size for size, _ in seen.values())


def memory_of_a_rank(shape, ranks, shard):
    """Bytes per rank of weights, gradients and AdamW's averages, all fp32."""
    if shard != "model":
        parameters = parameters_of(shape)
        return 8 * parameters + 8 * parameters / (ranks if shard == "optimizer" else 1)
    of_layer, of_root = _parts_gathered(shape)
    # every part has as many rows as the largest one
    rows = ((-(-p.shape[0] // ranks), p.shape[1:].numel()) for p in _network(shape).parameters())
    return 16 * sum(count * width for count, width in rows) + 20 * of_layer + 8 * of_root


def _parts_gathered(shape):
    """The numbers of parameters that `--shard model` gathers at once: `(a layer's, the root's)`."""
    layers = _network(shape).layers
    of_layer, of_layers = (
        sum(p.numel() for p in part.parameters()) for part in (layers[0], layers)
    )
    return of_layer, parameters_of(shape) - of_layers


def bytes_on_the_wire(parameters, ranks, sharded):
    """Bytes that a rank sends per step: a ring all-reduce, and if sharded the new weights."""
    return (3 if sharded else 2) * (ranks - 1) / ranks * 4 * parameters


def efficiency(shape, parameters, ranks, tokens_per_rank):
    """Speed of `ranks` GPUs relative to as many that need not communicate, from 0 to 1.

    Sending overlaps with the backward pass, which is 2/3 of computing.
    """
    width = shape["hidden_dim"] // shape["num_heads"]
    pairs = (shape["block_size"] + 1) / 2 * shape["num_heads"] * shape["num_layers"]
    flops = 6 * parameters + attention_flops(pairs, shape["head_coord_dim"], width)
    compute = flops * tokens_per_rank / (GPU["mfu"] * GPU["peak_flops"])
    link = "nvlink_bytes_per_s" if ranks <= GPUS_PER_HOST else "network_bytes_per_s"
    sending = bytes_on_the_wire(parameters, ranks, False) / GPU[link]
    # only the part of sending that the backward pass does not hide takes time
    return compute / (compute + max(0.0, sending - compute * 2 / 3))
