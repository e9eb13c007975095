"""Times the operator beside PyTorch's scaled_dot_product_attention: `benchmark.py attention`."""

import statistics
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.models import DTYPES, VALUE_WIDTH, newton_model, some_tokens
from benchmarks.timing import graphed, interleaved, ratios, spread
from gravity import newton
from gravity.attention import gravity_attention
from system.errors import UserError, warn
from system.safe_text import short_reason

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
    dtype = DTYPES[args.dtype]
    tolerance = newton.field_tolerance(network.config, dtype)
    rivals = rivals_on(device, dtype, network.config.num_heads)
    rows = []
    args.results.plan(f"{batch_of(args, block)} x {block}" for block in args.block_sizes)
    print(
        f"{'batch x block':>13} {'against':>9} {'ngt ms':>9} {'its ms':>9} "
        f"{'forward':>24} {'forward+backward':>24}"
    )
    for block in args.block_sizes:
        batch = batch_of(args, block)
        tokens = some_tokens(args, network, tokenizer, checkpoint, batch * block)
        layers = operator_inputs(network, tokens.view(batch, block).to(device))
        functions = functions_to_time(layers, dtype, tolerance, rivals)
        functions = {name: graphed(function, device) for name, function in functions.items()}
        seconds = interleaved(functions, args.steps, device, f"block {block}")
        rows.append(row_of(batch, block, layers, seconds, rivals))
        args.results.row(f"{batch} x {block}", **rows[-1])
    print("ratios: its time over that of gravity, mean of the layers")
    return {"rows": rows}


def batch_of(args, block):
    """How many sequences of `block` tokens are in a batch."""
    return max(1, args.batch_tokens // block) if args.batch_tokens else args.batch_size


def rivals_on(device, dtype, heads):
    """What gravity is compared with, by name: functions of (q, k, v).

    On a GPU the backends of scaled_dot_product_attention that people would pick, each by its own
    name; on a CPU PyTorch's only one.

    Raises:
        UserError: if this GPU has none of them.
    """

    def attend(q, k, v, context=nullcontext):
        with context():
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    if device.type != "cuda":
        return {"sdpa": attend}
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    if dtype == torch.float32:  # which these two do not compute
        backends = {"efficient": SDPBackend.EFFICIENT_ATTENTION}
    found = {}
    for name, backend in backends.items():
        function = partial(attend, context=partial(sdpa_kernel, [backend]))
        x = torch.zeros(1, heads, 128, VALUE_WIDTH, device=device, dtype=dtype)
        try:
            function(x, x, x)
            found[name] = function
        except RuntimeError as error:
            warn(f"scaled_dot_product_attention has no {name} here: {short_reason(error)}")
    if not found:
        raise UserError("this GPU has no fast attention to compare with: use --device cpu")
    return found


def operator_inputs(network, tokens):
    """The arguments of every layer's gravity attention in one forward pass, a list of dicts."""
    calls = []

    def recorder(q, k, v, mass, **settings):
        calls.append({"q": q, "k": k, "v": v, "mass": mass, **settings})
        return gravity_attention(q, k, v, mass, **settings)

    # the model computes these inputs within forward, so no hook of a module sees them
    newton.gravity_attention = recorder
    # on a GPU in bf16, so that the kernels for fp32, which take long to compile, are not needed
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=tokens.is_cuda)
    try:
        with torch.no_grad(), autocast:
            network(tokens)
    finally:
        newton.gravity_attention = gravity_attention
    return calls


def functions_to_time(layers, dtype, tolerance, rivals):
    """The calls that are timed, by name: those of `rivals_on`, and "ngt0", "ngt1", ... for each
    layer.

    A name that ends in "+" is of forward and backward, the others are of forward alone.
    """
    batch, heads, block, _ = layers[0]["q"].shape

    def values():  # (B, H, T, D), with the strides that a projection's output has
        x = torch.randn(batch, block, heads, VALUE_WIDTH, device=layers[0]["q"].device)
        return x.to(dtype).transpose(1, 2)

    upstream = values()
    functions = {}
    for name, rival in rivals.items():
        inputs = [values().requires_grad_() for _ in range(3)]
        functions[name], functions[f"{name}+"] = forward_and_backward(rival, inputs, upstream)
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


def row_of(batch, block, layers, seconds, rivals):
    """Print and return the numbers of one block size.

    Args:
        seconds: for each name of `functions_to_time` its rounds.
        rivals: the names that gravity is compared with. Ratios without a rival's name are those
            with the fastest.
    """

    # layers differ in how much they may skip, so a row is their mean
    def mean_of_layers(suffix):
        per_layer = [seconds[f"ngt{n}{suffix}"] for n in range(len(layers))]
        return [statistics.fmean(round) for round in zip(*per_layer, strict=True)]

    forward, both = mean_of_layers(""), mean_of_layers("+")
    row = {
        "block_size": block,
        "batch_size": batch,
        "ngt_tokens_per_s": batch * block / statistics.median(both),
        "heads": layers[0]["q"].shape[1],
        "ngt_forward_ms": 1e3 * statistics.median(forward),
        "ngt_ms": 1e3 * statistics.median(both),
    }
    for name in sorted(rivals, key=lambda name: -statistics.median(seconds[f"{name}+"])):
        found = {
            "ratio": statistics.median(ratios(seconds[f"{name}+"], both)),
            "ratio_rounds": ratios(seconds[f"{name}+"], both),
            "forward_ratio": statistics.median(ratios(seconds[name], forward)),
            "forward_ratio_rounds": ratios(seconds[name], forward),
        }
        row |= found | {f"{name}_{key}": value for key, value in found.items()}
        row[f"{name}_forward_ms"] = 1e3 * statistics.median(seconds[name])
        row[f"{name}_ms"] = 1e3 * statistics.median(seconds[f"{name}+"])
        row["vanilla_tokens_per_s"] = 1e3 * batch * block / row[f"{name}_ms"]
        print(
            f"{f'{batch} x {block}':>13} {name:>9} {row['ngt_ms']:>9.3f} {row[f'{name}_ms']:>9.3f} "
            f"{spread(found['forward_ratio_rounds']):>24} {spread(found['ratio_rounds']):>24}"
        )
    return row
