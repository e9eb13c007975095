"""Measure speed and memory: NGT against vanilla, interleaved in one process.

Every number is a median over rounds, after a warm-up, with the smallest and the largest beside it;
a ratio is the median of the rounds' own ratios. Above 1 NGT is the faster one.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer
from tqdm import tqdm

import model as ngt_model
from checkpoint import build_model, load_model
from corpora import Corpus
from data import get_batch
from errors import UsageError, UserError, run_script, warn, write_whole
from generation import TokenStream, sample
from gravity_blocked import cpu_multiplies_bf16
from metrics import machine, peak_memory_bytes
from options import DEFAULTS, PRESETS, choose_device, script_parser, whole, whole_or_zero
from text_files import pieces
from token_files import BATCH_PIECES, open_token_data, write_token_files
from tokenizer import BPETokenizer, CharTokenizer
from trainer import Trainer

EXAMPLES = """examples:
  python benchmark.py train --preset 25m --batch-size 4 --dtype bf16 --json train.json
  python benchmark.py train --preset 25m --batch-size 4 --law published --against first-release
  python benchmark.py attention --checkpoint checkpoints/text.pt_best.pt --block-sizes 512,8192
  python benchmark.py decode --contexts 256,16384 --chat-tokens 100000
  python benchmark.py data --data-path data/shakespeare/input.txt
"""

SHAPES = {
    "shakespeare": ("shakespeare", 66),
    "25m": ("wikitext103", 8192),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VALUE_WIDTH = 64


def whole_list(text):
    """Whole numbers of at least 1, separated by commas."""
    return [whole(part) for part in text.split(",")]


def make_parser():
    """The parser of benchmark.py."""
    parser = script_parser(__doc__, EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, help, example):
        sub = commands.add_parser(
            name,
            help=help,
            description=help,
            epilog=f"example:\n  python benchmark.py {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--json", metavar="FILE", help="write the numbers here, too")
        sub.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
        sub.add_argument("--threads", type=whole, help="CPU threads (default: PyTorch's choice)")
        return sub

    def shape(sub):
        sub.add_argument(
            "--preset", choices=list(SHAPES), default="25m", help="model sizes (default: 25m)"
        )

    def precision(sub):
        sub.add_argument(
            "--dtype", choices=list(DTYPES), default="fp32", help="of products (default: fp32)"
        )

    train = command(
        "train",
        "tokens/s and peak memory of whole training steps: forward, backward, clip, AdamW",
        "train --preset 25m --batch-size 4 --dtype bf16",
    )
    shape(train)
    precision(train)
    train.add_argument("--batch-size", type=whole, help="windows a step (default: the preset's)")
    train.add_argument("--block-size", type=whole, help="tokens of one (default: the preset's)")
    train.add_argument("--compile", action="store_true", help="torch.compile both models")
    train.add_argument(
        "--model", choices=("both", "ngt", "vanilla"), default="both", help="(default: both)"
    )
    train.add_argument(
        "--law", choices=ngt_model.LAWS, default="newton", help="NGT's (default: newton)"
    )
    train.add_argument(
        "--against",
        choices=("vanilla", "first-release"),
        default="vanilla",
        help="what NGT is compared with; first-release: the published law computed as NGT's first "
        "release did, over a tensor of all coordinate differences (default: vanilla)",
    )
    train.add_argument("--steps", type=whole, default=10, help="timed steps each (default: 10)")
    train.add_argument("--peak-only", action="store_true", help=argparse.SUPPRESS)

    attention = command(
        "attention",
        "the operator alone against scaled_dot_product_attention, causal, values 64 wide",
        "attention --block-sizes 512,8192 --checkpoint checkpoints/text.pt_best.pt",
    )
    precision(attention)
    attention.add_argument("--batch-size", type=whole, default=1, help="(default: 1)")
    attention.add_argument(
        "--block-sizes",
        type=whole_list,
        default=[512, 1024, 2048, 4096, 8192],
        help="tokens (default: 512,1024,2048,4096,8192)",
    )
    attention.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="an NGT whose own points, masses and scales are used, on the text it learned from; "
        "what is skipped depends on them (default: a fresh 25m model on random tokens)",
    )
    attention.add_argument(
        "--text", metavar="FILE", help="text for --checkpoint instead of its own"
    )
    attention.add_argument("--steps", type=whole, default=5, help="rounds (default: 5)")

    decode = command(
        "decode",
        "tokens/s of one token after the other with the KV cache, at several contexts",
        "decode --contexts 256,16384",
    )
    shape(decode)
    precision(decode)
    decode.add_argument(
        "--contexts",
        type=whole_list,
        default=[256, 1024, 4096, 16384],
        help="tokens in the cache (default: 256,1024,4096,16384)",
    )
    decode.add_argument("--checkpoint", metavar="FILE", help="an NGT to use instead of a fresh one")
    decode.add_argument("--steps", type=whole, default=32, help="rounds (default: 32)")
    decode.add_argument(
        "--chat-tokens",
        type=whole_or_zero,
        default=0,
        help="then let NGT alone write so many tokens and watch its memory (default: 0)",
    )

    data = command(
        "data",
        "MB/s of tokenizing and of fetching batches",
        "data --data-path data/shakespeare/input.txt",
    )
    data.add_argument(
        "--data-path", metavar="FILE", help="text (default: this repository's own sources)"
    )
    data.add_argument(
        "--bpe-vocab-size", type=whole, default=1024, help="tokens to train (default: 1024)"
    )
    data.add_argument("--steps", type=whole, default=5, help="rounds (default: 5)")
    return parser


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(function, device):
    """Seconds that a call takes."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def interleaved(functions, rounds, device, label, warm_up=1):
    """Time functions in turn, every second round in reverse order.

    Returns:
        For each name a list of seconds, one a round.
    """
    seconds = {name: [] for name in functions}
    for n in tqdm(range(-warm_up, rounds), label, leave=False, delay=2, disable=None):
        for name in list(functions)[:: -1 if n % 2 else 1]:
            elapsed = timed(functions[name], device)
            if n >= 0:
                seconds[name].append(elapsed)
    return seconds


def ratios(slow, fast):
    """Of two lists of seconds, round by round: how much faster the second is."""
    return [a / b for a, b in zip(slow, fast, strict=True)]


def spread(values, digits=2):
    """`median (smallest to largest)` as text."""
    low, middle, high = (
        f"{x:,.{digits}f}" for x in (min(values), statistics.median(values), max(values))
    )
    return f"{middle} ({low} to {high})"


def describe_machine(device):
    """One line: what this was measured on."""
    return f"{machine(device)}, PyTorch {torch.__version__}"


def peak_flops(device, dtype):
    """Flops a second of a large matrix product, the best of several."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a @ b
    return 2 * size**3 / min(timed(lambda: a @ b, device) for _ in range(5))


def first_release_attention(
    q, k, v, query_mass, key_mass, *, gamma, bias, radius, cutoff, mass_in_value, **_
):
    """The published law as the first release computed it: (B, H, T, T, C) differences, autograd.

    Written anew from the formula, for comparison only; without positions, dropout or a cache.
    """
    r2 = (q[:, :, :, None] - k[:, :, None]).pow(2).sum(-1)  # (B, H, T, T)
    score = bias[:, None, None] - gamma[:, None, None] / (r2 + 1e-6)
    if not mass_in_value:
        score = score * query_mass[:, None, :, None] * key_mass[:, None, None, :]
    if cutoff == "soft":
        score = score * torch.relu(1 - r2 / radius**2)
    elif cutoff == "hard":
        score = score.masked_fill(r2 > radius**2, -math.inf)
    future = torch.ones(r2.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    weight = torch.softmax(score.masked_fill(future, -math.inf), -1)
    if mass_in_value:
        v = v * key_mass[:, None, :, None]
    return weight.to(v.dtype) @ v


@contextmanager
def computed_as_first_release():
    """Within it NGT's published law runs as `first_release_attention`."""
    ours = ngt_model.published_gravity_attention
    ngt_model.published_gravity_attention = first_release_attention
    try:
        yield
    finally:
        ngt_model.published_gravity_attention = ours


def make_trainer(args, name, device):
    """The product's own Trainer over random tokens; `name` is ngt, vanilla or first-release."""
    preset, vocab_size = SHAPES[args.preset]
    sizes = dict(PRESETS[preset])
    kind = "vanilla" if name == "vanilla" else "ngt"
    law = "published" if name == "first-release" else args.law
    sizes["mlp_dim"] = sizes["mlp_dim"]["vanilla" if kind == "vanilla" else law]
    config = dict.fromkeys(("radius", "field_tolerance")) | DEFAULTS | sizes
    config |= {"model": kind, "law": law, "compile": args.compile, "gradient_accumulation_steps": 1}
    for flag in ("batch_size", "block_size"):
        if getattr(args, flag) is not None:
            config[flag] = getattr(args, flag)
    tokens = np.random.default_rng(0).integers(0, vocab_size, config["block_size"] * 64 + 1)
    tokenizer = SimpleNamespace(vocab_size=vocab_size)
    data = SimpleNamespace(train=tokens.astype(np.uint16), tokenizer=tokenizer)
    torch.manual_seed(config["seed"])
    trainer = Trainer(config, data, device)
    if args.dtype == "bf16":
        trainer.autocast = lambda: torch.autocast(device.type, dtype=torch.bfloat16)
    return trainer


def train_step(trainer, name):
    with computed_as_first_release() if name == "first-release" else nullcontext():
        trainer.step()


def step_floor(trainer):
    """What a training step cannot do without.

    Returns:
        `(flops, bytes)`: matrix products of forward and backward over causal pairs, nothing
        recomputed; weights read twice, gradients written, and AdamW's reads and writes.
    """
    network, c = trainer.raw_model, trainer.raw_model.config
    weights = sum(m.weight.numel() for m in network.modules() if isinstance(m, nn.Linear))
    tokens = trainer.tokens_per_step
    width = c.hidden_dim // c.num_heads
    distance = getattr(c, "head_coord_dim", width)
    pairs = tokens * (trainer.config["block_size"] + 1) / 2 * c.num_heads * c.num_layers
    parameters = sum(p.numel() for p in network.parameters())
    return 3 * (2 * weights * tokens + 2 * (distance + width) * pairs), 4 * 10 * parameters


def child_peak(args, name):
    """Peak memory in bytes of a process that trains this model alone for two steps."""
    command = [sys.executable, __file__, "train", "--peak-only", "--model", "ngt"]
    if name == "vanilla":
        command[-1] = "vanilla"
    command += ["--against", "first-release" if name == "first-release" else "vanilla"]
    for flag in ("preset", "dtype", "batch_size", "block_size", "law", "threads", "device"):
        if getattr(args, flag) is not None:
            command += ["--" + flag.replace("_", "-"), str(getattr(args, flag))]
    if args.compile:
        command.append("--compile")
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        warn(f"no peak memory of {name}: {(result.stderr.strip().splitlines() or ['?'])[-1]}")
        return None
    return json.loads(result.stdout.splitlines()[-1])["peak_bytes"]


def print_peak(args, device):
    """What `child_peak` reads."""
    name = "first-release" if args.against == "first-release" else args.model
    trainer = make_trainer(args, name, device)
    for _ in range(2):
        train_step(trainer, name)
    print(json.dumps({"peak_bytes": peak_memory_bytes(device)}))


def benchmark_train(args, device):
    if args.against == "first-release" and args.law != "published":
        raise UsageError("--against first-release computes --law published: add that flag")
    if args.peak_only:
        return print_peak(args, device)
    if args.dtype == "bf16" and device.type == "cpu" and not cpu_multiplies_bf16():
        warn("this CPU does not multiply bf16 in hardware: expect fp32 to be faster")
    names = ["ngt", args.against] if args.model == "both" else [args.model]
    trainers = {name: make_trainer(args, name, device) for name in names}
    steps = {
        name: lambda name=name, trainer=trainer: train_step(trainer, name)
        for name, trainer in trainers.items()
    }
    # each second one of a pair must run warm, compiled and with its optimizer's state
    seconds = interleaved(steps, args.steps, device, "training steps", warm_up=2)
    peak = peak_flops(device, DTYPES[args.dtype])
    numbers = {"peak_flops": peak}
    print(f"{'model':<14} {'tokens/s':>30} {'peak memory':>12} {'floor':>21} {'mfu':>6}")
    for name, trainer in trainers.items():
        key = name.replace("-", "_")
        speeds = [trainer.tokens_per_step / s for s in seconds[name]]
        flops, floor_bytes = step_floor(trainer)
        numbers |= {
            f"{key}_tokens_per_s": statistics.median(speeds),
            f"{key}_tokens_per_s_rounds": speeds,
            f"{key}_peak_bytes": child_peak(args, name),
            f"{key}_floor_flops": flops,
            f"{key}_floor_bytes": floor_bytes,
            f"{key}_mfu": flops / statistics.median(seconds[name]) / peak,
        }
        memory = numbers[f"{key}_peak_bytes"]
        print(
            f"{name:<14} {spread(speeds, 0):>30} "
            f"{'?' if memory is None else f'{memory / 2**20:,.0f} MiB':>12} "
            f"{f'{flops / 1e9:,.0f} GF, {floor_bytes / 2**30:.2f} GiB':>21} "
            f"{numbers[f'{key}_mfu']:>6.1%}"
        )
    if len(names) == 2:
        rounds = ratios(seconds[names[1]], seconds["ngt"])
        numbers |= {"ratio": statistics.median(rounds), "ratio_rounds": rounds}
        print(f"ratio {spread(rounds, 3)}: tokens/s of ngt over those of {names[1]}")
    print(f"peak of a matrix product {peak / 1e9:,.0f} GF/s")
    return numbers


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


def load_newton(path, device):
    """Model, tokenizer and config of a checkpoint of NGT under newton's law."""
    network, tokenizer, checkpoint = load_model(path, device)
    if not isinstance(network, ngt_model.NGT) or network.config.law != "newton":
        raise UserError(f"--checkpoint {path} is no NGT under --law newton: name one that is")
    return network, tokenizer, checkpoint["config"]


def fresh_model(args, name, device, block_size=None):
    preset, vocab_size = SHAPES[args.preset]
    sizes = dict(PRESETS[preset]) | {"vocab_size": vocab_size, "model_type": name}
    sizes["mlp_dim"] = sizes["mlp_dim"]["vanilla" if name == "vanilla" else "newton"]
    if block_size is not None:
        sizes["block_size"] = block_size
    torch.manual_seed(0)
    return build_model(DEFAULTS | sizes).to(device).eval()


def some_tokens(args, network, tokenizer, config, count):
    """Token ids of real text for a checkpoint, random ones for a fresh model."""
    if tokenizer is None:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(network.config.vocab_size, (count,), generator=generator)
    if getattr(args, "text", None) is not None:
        try:
            ids = tokenizer.encode(Path(args.text).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--text {args.text} cannot be read: {error}") from None
    else:
        directory = config.get("token_directory", "")
        if not directory or not Path(directory).is_dir():
            raise UserError(
                f"the text that {args.checkpoint} learned from is not at {directory or '?'}: "
                "name some with --text"
            )
        ids = open_token_data(Path(directory)).valid[:count]
    if len(ids) < count:
        raise UserError(f"the text has {len(ids)} tokens, {count} are needed: name a longer one")
    return torch.from_numpy(np.asarray(ids[:count]).astype(np.int64))


def forward_and_backward(function, inputs, upstream):
    """Two callables that time an operator without and with its gradients."""

    def forward():
        with torch.no_grad():
            function(*inputs)

    def both():
        torch.autograd.grad(function(*inputs), inputs, upstream)

    return forward, both


def benchmark_attention(args, device):
    tokenizer = config = None
    if args.checkpoint:
        network, tokenizer, config = load_newton(args.checkpoint, device)
    else:
        args.preset = "25m"
        network = fresh_model(args, "ngt", device)
    dtype, batch, rows = DTYPES[args.dtype], args.batch_size, []
    print(f"{'block':>6} {'ngt ms':>9} {'sdpa ms':>9} {'forward':>24} {'forward+backward':>24}")
    for block in args.block_sizes:
        tokens = some_tokens(args, network, tokenizer, config, batch * block)
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


class Decoder:
    """A model with a cache full of context, that writes one token after the other."""

    def __init__(self, network, context, autocast):
        self.stream, self.autocast = TokenStream(network), autocast
        self.generator = torch.Generator().manual_seed(0)
        with autocast():
            self.stream.feed(context)

    def step(self):
        with self.autocast():
            self.stream.feed([sample(self.stream.logits, generator=self.generator)])


def benchmark_decode(args, device):
    tokenizer = config = None
    longest = max(args.contexts)
    if args.checkpoint:
        ngt, tokenizer, config = load_newton(args.checkpoint, device)
    else:
        ngt = fresh_model(args, "ngt", device)
    vanilla = fresh_model(args, "vanilla", device, block_size=longest + args.steps + 2)
    autocast = nullcontext
    if args.dtype == "bf16":
        autocast = lambda: torch.autocast(device.type, dtype=torch.bfloat16)  # noqa: E731
    tokens = some_tokens(args, ngt, tokenizer, config, longest).tolist()
    decoders = {}
    for context in tqdm(args.contexts, "filling caches", leave=False, delay=2, disable=None):
        decoders["ngt", context] = Decoder(ngt, tokens[:context], autocast)
        other = [token % vanilla.config.vocab_size for token in tokens[:context]]
        decoders["vanilla", context] = Decoder(vanilla, other, autocast)
    steps = {key: decoder.step for key, decoder in decoders.items()}
    seconds = interleaved(steps, args.steps, device, "single tokens", warm_up=2)
    print(
        f"{'context':>8} {'ngt tokens/s':>22} {'vanilla tokens/s':>22} {'ratio':>6} "
        f"{'of shortest':>11} {'ngt cache':>10} {'vanilla cache':>13}"
    )
    rows, first = [], min(args.contexts)
    for context in args.contexts:
        speeds = {name: [1 / s for s in seconds[name, context]] for name in ("ngt", "vanilla")}
        kept = statistics.median(ratios(seconds["ngt", first], seconds["ngt", context]))
        caches = {n: decoders[n, context].stream.cache.num_bytes() for n in ("ngt", "vanilla")}
        rows.append(
            {
                "context": context,
                "ngt_tokens_per_s": statistics.median(speeds["ngt"]),
                "vanilla_tokens_per_s": statistics.median(speeds["vanilla"]),
                "ratio": statistics.median(
                    ratios(seconds["vanilla", context], seconds["ngt", context])
                ),
                "ngt_speed_of_shortest_context": kept,
                "ngt_cache_bytes": caches["ngt"],
                "vanilla_cache_bytes": caches["vanilla"],
                "ngt_cache_bytes_per_token": caches["ngt"] / context,
                "vanilla_cache_bytes_per_token": caches["vanilla"] / context,
            }
        )
        print(
            f"{context:>8} {spread(speeds['ngt'], 0):>22} {spread(speeds['vanilla'], 0):>22} "
            f"{rows[-1]['ratio']:>6.2f} {kept:>11.2f} {caches['ngt'] / 2**20:>6.1f} MiB "
            f"{caches['vanilla'] / 2**20:>9.1f} MiB"
        )
    numbers = {"rows": rows}
    if args.chat_tokens:
        decoders.clear()
        numbers["chat"] = chat(ngt, args.chat_tokens, autocast)
    return numbers


def resident_bytes():
    """Memory of this process now, or None where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def chat(network, count, autocast):
    """Let a model write `count` tokens; its memory at ten points on the way."""
    decoder, rows = Decoder(network, [0], autocast), []
    print(f"{'written':>8} {'cache':>10} {'process':>10} {'tokens/s':>9}")
    bar = tqdm(total=count, desc="writing", leave=False, delay=2, disable=None)
    for part in range(10):
        size = count * (part + 1) // 10 - count * part // 10
        start = time.perf_counter()
        for _ in range(size):
            decoder.step()
            bar.update()
        elapsed = time.perf_counter() - start
        rows.append(
            {
                "tokens": decoder.stream.cache.length,
                "cache_bytes": decoder.stream.cache.num_bytes(),
                "process_bytes": resident_bytes(),
                "tokens_per_s": size / elapsed,
            }
        )
        row = rows[-1]
        process = "?" if row["process_bytes"] is None else f"{row['process_bytes'] / 2**20:,.0f}"
        print(
            f"{row['tokens']:>8} {row['cache_bytes'] / 2**20:>6.1f} MiB {process:>6} MiB "
            f"{row['tokens_per_s']:>9.0f}"
        )
    bar.close()
    return rows


def benchmark_data(args, device):
    if args.data_path:
        source = args.data_path
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--data-path {source} cannot be read: {error}") from None
    else:
        source = "the sources of this repository"
        files = sorted(Path(__file__).parent.glob("*.py"))
        text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    if not text:
        raise UserError(f"--data-path {source} is empty: name a file with text")
    megabytes = len(text.encode()) / 1e6
    parts = list(pieces([text]))
    char, bpe = CharTokenizer.train(parts), BPETokenizer.train(parts, args.bpe_vocab_size)
    library = Tokenizer.from_str(bpe.to_vocab()["tokenizer_json"])
    corpus = Corpus("text", str(source), "", 0, {"train": lambda: iter(parts)})
    tokens = np.random.default_rng(0).integers(0, 8192, 10**6).astype(np.uint16)

    def encode_batch():
        for start in range(0, len(parts), BATCH_PIECES):
            library.encode_batch(parts[start : start + BATCH_PIECES])

    def token_files():
        with tempfile.TemporaryDirectory() as folder:
            write_token_files(Path(folder) / "tokens", corpus, lambda sizes: bpe, lambda line: None)

    functions = {
        "char": lambda: char.encode_array(parts),
        "encode_batch": encode_batch,
        "bpe": token_files,
        "batches": lambda: [get_batch(tokens, 16, 512, 0, step) for step in range(20)],
    }
    size = dict.fromkeys(functions, megabytes) | {"batches": 20 * 16 * 512 * 2 / 1e6}
    seconds = interleaved(functions, args.steps, device, "reading")
    numbers = {"source": str(source), "megabytes": megabytes}
    print(
        f"text: {source}, {megabytes:.2f} MB; bpe: {bpe.vocab_size} tokens, into token "
        "files, beside the library's own encode_batch; batches of 16 x 512 uint16 tokens"
    )
    for name, elapsed in seconds.items():
        speeds = [size[name] / s for s in elapsed]
        numbers[f"{name}_mb_per_s"] = statistics.median(speeds)
        print(f"{name:<12} {spread(speeds, 1)} MB/s")
    return numbers


COMMANDS = {
    "train": benchmark_train,
    "attention": benchmark_attention,
    "decode": benchmark_decode,
    "data": benchmark_data,
}


def main(argv=None):
    """Measure, print, and write JSON; returns the exit code."""
    args = make_parser().parse_args(argv)
    device = choose_device(args.device)
    if args.json is not None and not Path(args.json).resolve().parent.is_dir():
        raise UsageError(f"--json {args.json}: there is no such folder, make it first")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if not getattr(args, "peak_only", False):
        print(describe_machine(device))
    numbers = COMMANDS[args.command](args, device)
    if args.json is not None:
        numbers |= {
            "machine": describe_machine(device),
            "settings": {k: v for k, v in vars(args).items() if k not in ("peak_only", "json")},
        }
        write_whole(Path(args.json), (json.dumps(numbers, indent=2) + "\n").encode())
    return 0


if __name__ == "__main__":
    run_script(main)
