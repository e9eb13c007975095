"""Times the operator beside PyTorch's scaled_dot_product_attention: `benchmark.py attention`."""

import statistics

import torch
import torch.nn.functional as F

from benchmarks.models import DTYPES, VALUE_WIDTH, newton_model, some_tokens
from benchmarks.timing import interleaved, ratios, spread
from gravity import newton
from gravity.attention import gravity_attention

DIFFERENTIABLE = ("q", "k", "v", "mass", "time_scale", "time_offset", "background")


def benchmark_attention(args, device):
    """Time every layer's gravity attention against scaled_dot_product_attention, print a table.

    Returns:
        A dict for JSON whose "rows" has one dict per block size.
    """
    if not args.checkpoint:
        # this command has no --preset, but `newton_model` and the JSON's settings need one
        args.preset = "25m"
    network, tokenizer, checkpoint = newton_model(args, device)
    tolerance = newton.field_tolerance(network.config, DTYPES[args.dtype])
    rows = []
    print(f"{'block':>6} {'ngt ms':>9} {'sdpa ms':>9} {'forward':>24} {'forward+backward':>24}")
    for block in args.block_sizes:
        tokens = some_tokens(args, network, tokenizer, checkpoint, args.batch_size * block)
        layers = operator_inputs(network, tokens.view(args.batch_size, block).to(device))
        functions = functions_to_time(layers, DTYPES[args.dtype], tolerance)
        seconds = interleaved(functions, args.steps, device, f"block {block}")
        rows.append(row_of(args.batch_size, block, layers, seconds))
    print("ratios: time of scaled_dot_product_attention over that of gravity, mean of the layers")
    return {"rows": rows}


def operator_inputs(network, tokens):
    """The arguments of every layer's gravity attention in one forward pass, a list of dicts."""
    calls = []

    def recorder(q, k, v, mass, **settings):
        calls.append({"q": q, "k": k, "v": v, "mass": mass, **settings})
        return gravity_attention(q, k, v, mass, **settings)

    # the model computes these inputs within forward, so no hook of a module sees them
    newton.gravity_attention = recorder
    try:
        with torch.no_grad():
            network(tokens)
    finally:
        newton.gravity_attention = gravity_attention
    return calls


def functions_to_time(layers, dtype, tolerance):
    """The calls that are timed, by name: "sdpa" and "ngt0", "ngt1", ... for each layer.

    A name that ends in "+" is of forward and backward, the others are of forward alone.
    """
    batch, heads, block, _ = layers[0]["q"].shape

    def values():  # (B, H, T, D), with the strides that a projection's output has
        x = torch.randn(batch, block, heads, VALUE_WIDTH, device=layers[0]["q"].device)
        return x.to(dtype).transpose(1, 2)

    upstream = values()
    functions = {}
    functions["sdpa"], functions["sdpa+"] = forward_and_backward(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        [values().requires_grad_() for _ in range(3)],
        upstream,
    )
    for n, layer in enumerate(layers):
        layer = layer | {name: layer[name].to(dtype) for name in "qkv"}
        layer["field_tolerance"] = tolerance  # the model itself ran in fp32
        if layer["v"].shape[-1] != VALUE_WIDTH:  # both are timed on values of one width
            layer["v"] = values()
        functions[f"ngt{n}"], functions[f"ngt{n}+"] = forward_and_backward(
            *operator_and_inputs(layer), upstream
        )
    return functions


def operator_and_inputs(layer):
    """Gravity attention as a function of the inputs that get gradients, and these inputs."""
    learned = [name for name in DIFFERENTIABLE if layer[name] is not None]
    settings = {name: x for name, x in layer.items() if name not in learned}

    def operator(*inputs):
        return gravity_attention(**dict(zip(learned, inputs, strict=True)), **settings)

    return operator, [layer[name].detach().clone().requires_grad_() for name in learned]


def forward_and_backward(function, inputs, upstream):
    """Two callables: one runs `function` without gradients, one with those of `inputs`.

    Args:
        upstream: the gradient of the output.
    """

    def forward():
        with torch.no_grad():
            function(*inputs)

    def both():
        torch.autograd.grad(function(*inputs), inputs, upstream)

    return forward, both


def row_of(batch, block, layers, seconds):
    """Print and return the numbers of one block size.

    Args:
        seconds: for each name of `functions_to_time` its rounds.
    """

    # layers differ in how much they may skip, so a row is their mean
    def mean_of_layers(suffix):
        per_layer = [seconds[f"ngt{n}{suffix}"] for n in range(len(layers))]
        return [statistics.fmean(round) for round in zip(*per_layer, strict=True)]

    forward, both = mean_of_layers(""), mean_of_layers("+")
    row = {
        "block_size": block,
        "ngt_tokens_per_s": batch * block / statistics.median(both),
        "vanilla_tokens_per_s": batch * block / statistics.median(seconds["sdpa+"]),
        "ratio": statistics.median(ratios(seconds["sdpa+"], both)),
        "ratio_rounds": ratios(seconds["sdpa+"], both),
        "forward_ratio": statistics.median(ratios(seconds["sdpa"], forward)),
        "forward_ratio_rounds": ratios(seconds["sdpa"], forward),
        "heads": layers[0]["q"].shape[1],
    }
    milliseconds = [1e3 * statistics.median(x) for x in (both, seconds["sdpa+"])]
    print(
        f"{block:>6} {milliseconds[0]:>9.1f} {milliseconds[1]:>9.1f} "
        f"{spread(row['forward_ratio_rounds']):>24} {spread(row['ratio_rounds']):>24}"
    )
    return row
