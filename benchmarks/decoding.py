"""Measures generation token by token: `benchmark.py decode`.

Speed and cache size after contexts of several lengths, and the memory of a long generation.
"""

import os
import statistics
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.models import fresh_model, newton_model, some_tokens, use_threads_as_shipped
from benchmarks.timing import calls_per_round, interleaved, ratios, spread
from engine.generation import TokenStream, sample


def benchmark_decode(args, device):
    """Time single tokens after every context, NGT and vanilla in turn, and print a table.

    Returns:
        A dict for JSON: "rows" has one dict per context, "chat" ten points of --chat-tokens.
    """
    ngt, tokenizer, checkpoint = newton_model(args, device)
    use_threads_as_shipped(args, ngt, tokens=1)
    longest = max(args.contexts)
    # vanilla must not slide: it gets positions for the context, the warm-up and the steps
    further = (args.steps + 2) * calls_per_round(device)
    vanilla = fresh_model(args.preset, "vanilla", device, block_size=longest + further)
    is_bf16 = args.dtype == "bf16"
    autocast = (
        partial(torch.autocast, device.type, dtype=torch.bfloat16) if is_bf16 else nullcontext
    )
    tokens = some_tokens(args, ngt, tokenizer, checkpoint, longest).tolist()
    decoders = fill_caches({"ngt": ngt, "vanilla": vanilla}, args.contexts, tokens, autocast)
    # every step makes the context one longer, which is little beside the context itself
    steps = {key: decoder.step for key, decoder in decoders.items()}
    seconds = interleaved(steps, args.steps, device, "single tokens", warm_up=2)
    caches = {key: decoder.stream.cache.num_bytes() for key, decoder in decoders.items()}
    print(
        f"{'context':>8} {'ngt tokens/s':>22} {'vanilla tokens/s':>22} {'ratio':>6} "
        f"{'of shortest':>11} {'ngt cache':>10} {'vanilla cache':>13}"
    )
    shortest = min(args.contexts)
    numbers = {"rows": [row_of(n, shortest, seconds, caches) for n in args.contexts]}
    if args.chat_tokens:
        decoders.clear()
        steps.clear()  # they hold the caches, whose memory would be counted
        numbers["chat"] = chat(ngt, args.chat_tokens, autocast)
    return numbers


def fill_caches(models, contexts, tokens, autocast):
    """A `Decoder` for each `(name of the model, context)`, its cache filled."""
    decoders = {}
    for context in tqdm(contexts, "filling caches", leave=False, delay=2, disable=None):
        for name, model in models.items():
            # a checkpoint's vocabulary may be larger than that of the fresh vanilla model
            ids = [token % model.config.vocab_size for token in tokens[:context]]
            decoders[name, context] = Decoder(model, ids, autocast)
    return decoders


def row_of(context, shortest, seconds, caches):
    """Print and return the numbers of one context, a dict.

    Args:
        shortest: the context that NGT's speed is compared with.
        seconds, caches: seconds of each round and bytes, for each `(name, context)`.
    """
    ngt, vanilla = ("ngt", context), ("vanilla", context)
    speeds = {key: [1 / s for s in seconds[key]] for key in (ngt, vanilla)}
    row = {
        "context": context,
        "ngt_tokens_per_s": statistics.median(speeds[ngt]),
        "vanilla_tokens_per_s": statistics.median(speeds[vanilla]),
        "ratio": statistics.median(ratios(seconds[vanilla], seconds[ngt])),
        "ngt_speed_of_shortest_context": statistics.median(
            ratios(seconds["ngt", shortest], seconds[ngt])
        ),
        "ngt_cache_bytes": caches[ngt],
        "vanilla_cache_bytes": caches[vanilla],
        "ngt_cache_bytes_per_token": caches[ngt] / context,
        "vanilla_cache_bytes_per_token": caches[vanilla] / context,
    }
    print(
        f"{context:>8} {spread(speeds[ngt], 0):>22} {spread(speeds[vanilla], 0):>22} "
        f"{row['ratio']:>6.2f} {row['ngt_speed_of_shortest_context']:>11.2f} "
        f"{caches[ngt] / 2**20:>6.1f} MiB {caches[vanilla] / 2**20:>9.1f} MiB"
    )
    return row


class Decoder:
    """Generates token by token after a context that its cache holds."""

    def __init__(self, network, context, autocast):
        self.stream, self.autocast = TokenStream(network), autocast
        self.generator = torch.Generator().manual_seed(0)
        with autocast():
            self.stream.feed(context)

    def step(self):
        """Sample one token and feed it to the model."""
        with self.autocast():
            self.stream.feed([sample(self.stream.logits, generator=self.generator)])


def chat(network, count, autocast):
    """Let a model generate `count` tokens, print and return its memory and speed at ten points."""
    decoder, rows = Decoder(network, [0], autocast), []
    print(f"{'written':>8} {'cache':>10} {'process':>10} {'tokens/s':>9}")
    bar = tqdm(total=count, desc="writing", leave=False, delay=2, disable=None)
    for part in range(10):
        # the ten sizes add up to `count`, also if it is not a multiple of 10
        size = count * (part + 1) // 10 - count * part // 10
        start = time.perf_counter()
        for _ in range(size):
            decoder.step()
            bar.update()
        elapsed = time.perf_counter() - start
        row = {
            "tokens": decoder.stream.cache.length,
            "cache_bytes": decoder.stream.cache.num_bytes(),
            "process_bytes": resident_bytes(),
            "tokens_per_s": size / elapsed,
        }
        rows.append(row)
        process = "?" if row["process_bytes"] is None else f"{row['process_bytes'] / 2**20:,.0f}"
        print(
            f"{row['tokens']:>8} {row['cache_bytes'] / 2**20:>6.1f} MiB {process:>6} MiB "
            f"{row['tokens_per_s']:>9.0f}"
        )
    bar.close()
    return rows


def resident_bytes():
    """Bytes of memory that this process uses now; None if the system has no /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])  # resident
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
