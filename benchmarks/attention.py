"""Speed of the operator beside PyTorch's scaled_dot_product_attention."""

import statistics

import torch
import torch.nn.functional as F

import model as ngt_model
from benchmarks.models import DTYPES, VALUE_WIDTH, fresh_model, load_newton, some_tokens
from benchmarks.timing import interleaved, ratios, spread


def operator_inputs(network, tokens):
    """The arguments of every layer's gravity attention in one forward pass, a list of dicts."""
    calls, operator = [], ngt_model.gravity_attention

    def spy(q, k, v, mass, **settings):
        calls.append({"q": q, "k": k, "v": v, "mass": mass, **settings})
        return operator(q, k, v, mass, **settings)

    ngt_model.gravity_attention = spy
    try:
        with torch.no_grad():
            network(tokens)
    finally:
        ngt_model.gravity_attention = operator
    return calls


def forward_and_backward(function, inputs, upstream):
    """Two callables that time an operator without and with its gradients."""

    def forward():
        with torch.no_grad():
            function(*inputs)

    def both():
        torch.autograd.grad(function(*inputs), inputs, upstream)

    return forward, both


def benchmark_attention(args, device):
    tokenizer = checkpoint = None
    if args.checkpoint:
        network, tokenizer, checkpoint = load_newton(args.checkpoint, device)
    else:
        args.preset = "25m"
        network = fresh_model(args, "ngt", device)
    dtype, batch, rows = DTYPES[args.dtype], args.batch_size, []
    print(f"{'block':>6} {'ngt ms':>9} {'sdpa ms':>9} {'forward':>24} {'forward+backward':>24}")
    for block in args.block_sizes:
        tokens = some_tokens(args, network, tokenizer, checkpoint, batch * block)
        layers = operator_inputs(network, tokens.view(batch, block).to(device))
        heads = layers[0]["q"].shape[1]

        def values(heads=heads, block=block):
            x = torch.randn(batch, block, heads, VALUE_WIDTH, device=device)
            return x.to(dtype).transpose(1, 2)

        upstream = values()
        q, k, v = (values().requires_grad_() for _ in range(3))
        functions = {}
        functions["sdpa"], functions["sdpa+"] = forward_and_backward(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            (q, k, v),
            upstream,
        )
        for n, layer in enumerate(layers):
            settings = {name: x for name, x in layer.items() if name not in "qkv"}
            settings["field_tolerance"] = network.config.field_tolerance
            if settings["field_tolerance"] is None:
                settings["field_tolerance"] = 1e-4 if args.dtype == "bf16" else 1e-6
            own = [layer[name].to(dtype) for name in "qkv"]
            if own[2].shape[-1] != VALUE_WIDTH:
                own[2] = values()
            mass = settings.pop("mass")
            scale, offset = settings.pop("time_scale"), settings.pop("time_offset")
            inputs = [x.detach().clone().requires_grad_() for x in (*own, mass, scale, offset)]

            def operator(q, k, v, mass, time_scale, time_offset, settings=settings):
                law = {"time_scale": time_scale, "time_offset": time_offset, **settings}
                return ngt_model.gravity_attention(q, k, v, mass, **law)

            functions[f"ngt{n}"], functions[f"ngt{n}+"] = forward_and_backward(
                operator, inputs, upstream
            )
        seconds = interleaved(functions, args.steps, device, f"block {block}")

        def mean_of_layers(suffix, seconds=seconds, layers=layers):
            per_layer = [seconds[f"ngt{n}{suffix}"] for n in range(len(layers))]
            return [statistics.fmean(round) for round in zip(*per_layer, strict=True)]

        both, forward = mean_of_layers("+"), mean_of_layers("")
        row = {
            "block_size": block,
            "ngt_tokens_per_s": batch * block / statistics.median(both),
            "vanilla_tokens_per_s": batch * block / statistics.median(seconds["sdpa+"]),
            "ratio": statistics.median(ratios(seconds["sdpa+"], both)),
            "ratio_rounds": ratios(seconds["sdpa+"], both),
            "forward_ratio": statistics.median(ratios(seconds["sdpa"], forward)),
            "forward_ratio_rounds": ratios(seconds["sdpa"], forward),
            "heads": heads,
        }
        rows.append(row)
        milliseconds = [1e3 * statistics.median(x) for x in (both, seconds["sdpa+"])]
        print(
            f"{block:>6} {milliseconds[0]:>9.1f} {milliseconds[1]:>9.1f} "
            f"{spread(row['forward_ratio_rounds']):>24} {spread(row['ratio_rounds']):>24}"
        )
    print("ratios: time of scaled_dot_product_attention over that of gravity, mean of the layers")
    return {"rows": rows}
