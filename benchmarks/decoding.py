"""Speed of single tokens after contexts of several lengths, and memory of a long chat."""

import os
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.models import fresh_model, load_newton, some_tokens
from benchmarks.timing import interleaved, ratios, spread
from engine.generation import TokenStream, sample


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
    tokenizer = checkpoint = None
    longest = max(args.contexts)
    if args.checkpoint:
        ngt, tokenizer, checkpoint = load_newton(args.checkpoint, device)
    else:
        ngt = fresh_model(args, "ngt", device)
    vanilla = fresh_model(args, "vanilla", device, block_size=longest + args.steps + 2)
    autocast = nullcontext
    if args.dtype == "bf16":
        autocast = lambda: torch.autocast(device.type, dtype=torch.bfloat16)  # noqa: E731
    tokens = some_tokens(args, ngt, tokenizer, checkpoint, longest).tolist()
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
