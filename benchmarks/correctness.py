"""Compares the operator with the formula in float64: `benchmark.py correctness`."""

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import torch

from gravity.attention import gravity_attention
from gravity.law import gravity_attention_reference
from system.errors import UserError
from system.safe_text import short_reason

HEADS, COORDS, WIDTH = 8, 16, 64  # of the 25m models
PAIRS = 1 << 22  # of tokens and heads, at once in float64
# largest relative error by the dtype of values; numbers per head are long sums of both signs and
# may have five times that
LIMITS = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 1.5e-2}
PER_HEAD = ("time_scale", "time_offset", "radius", "background")


class Case(NamedTuple):
    """One call of the operator."""

    batch: int
    tokens: int
    dtype: torch.dtype = torch.bfloat16
    background: bool = True
    cutoff: str = "none"
    mass_in_value: bool = False
    tolerance: float = 1e-4
    spread: float = 0.35  # standard deviation of a coordinate; 0.35 is a fresh model's
    queries: int | None = None  # the newest tokens, as in decoding; None: all


def cases(batch, block, longest):
    """The cases by name, the most important ones first.

    Args:
        batch, block: sequences and tokens of a training batch.
        longest: tokens of the long case.
    """
    radius = {"background": False, "cutoff": "hard"}
    return {
        "training": Case(batch, block),
        "mass in the value": Case(batch, block, mass_in_value=True),
        "points far apart": Case(batch, block, spread=2.0),
        "radius, no background": Case(batch, block, **radius),
        "long": Case(1, longest),
        "fp32": Case(2, block, torch.float32, tolerance=1e-6),
        "fp16": Case(batch, block, torch.float16),
        "nothing left out": Case(batch, block, tolerance=0.0),
        "soft radius": Case(batch, block, cutoff="soft"),
        "odd length": Case(3, block - 11),
        "one token": Case(2, 1),
        "decoding, 1 query": Case(1, block + 188, queries=1),
        "decoding, 5 queries": Case(1, block + 188, queries=5),
    }


def benchmark_correctness(args, device):
    """Compare outputs and gradients of every case with float64, and print a table.

    Returns:
        A dict for JSON: "rows" has one dict per case.

    Raises:
        UserError: if a case is further from float64 than rounding explains.
    """
    if args.block_size < 12:
        raise UserError("--block-size is too small: give at least 12")
    todo = cases(args.batch_size, args.block_size, args.longest)
    args.results.plan(todo)
    rows = []
    print(f"{'case':<24} {'output':>9} {'gradients':>9} {'per head':>9}  errors against float64")
    for name, found in computed(todo, device, args.jobs):
        args.results.row(name, **found)
        rows.append({"case": name} | found)
        numbers = [found.get(key) for key in ("output", "gradients", "per_head")]
        cells = " ".join("        ?" if x is None else f"{x:>9.1e}" for x in numbers)
        verdict = "" if found["good"] else f"  WRONG {found.get('failed', '')}"
        print(f"{name:<24} {cells}{verdict}", flush=True)
    wrong = [row["case"] for row in rows if not row["good"]]
    if wrong:
        raise UserError(
            f"{len(wrong)} of {len(rows)} cases differ from float64 by more than rounding: "
            f"{'; '.join(wrong)}"
        )
    return {"rows": rows}


def computed(todo, device, jobs):
    """Yield `(name, numbers)` of every case as soon as they are known."""
    if jobs == 1:
        for name, case in todo.items():
            yield name, compare(case, device)
        return
    spawn = multiprocessing.get_context("spawn")
    # a process per case: a fault on the GPU ends only that one
    with ProcessPoolExecutor(jobs, spawn, end_with_parent, max_tasks_per_child=1) as pool:
        futures = {pool.submit(compare, case, device): name for name, case in todo.items()}
        for future in as_completed(futures):
            try:
                yield futures[future], future.result()
            except BrokenProcessPool:
                yield futures[future], {"good": False, "failed": "a process ended"}


def end_with_parent():
    """Let this process end when the one that started it does, though a kernel may hang."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def compare(case, device):
    """Errors of one case, a dict.

    `output`, `gradients` (the largest of q, k, v and mass) and `per_head` (of time_scale,
    time_offset, radius, background) are norms relative to float64, None if not finite; `errors` has
    each; `same_twice` is whether two runs under torch.use_deterministic_algorithms agree to the
    bit; `good` whether everything is within `LIMITS`. If the operator raises, `failed` says why.
    """
    try:
        return _compare(case, device)
    except RuntimeError as error:
        return {"good": False, "failed": short_reason(error)}


def _compare(case, device):
    data = particles(case, device)
    names = [name for name in data if name != "radius" or case.cutoff == "soft"]
    generator = torch.Generator(device).manual_seed(1)
    upstream = _heads(case.batch, data["q"].shape[2], WIDTH, case.dtype, generator)

    def once():
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in data.items()}
        out = gravity_attention(**leaves, field_tolerance=case.tolerance, **_law(case, leaves))
        inputs = [leaves[name] for name in names]
        return [out.detach(), *torch.autograd.grad(out, inputs, upstream, materialize_grads=True)]

    runs = [once()]
    # fills what torch.empty returns with NaN, so that what a kernel forgets to write is seen
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        runs += [once(), once()]
    finally:
        torch.use_deterministic_algorithms(False)
    limit, errors = LIMITS[case.dtype], {}
    for n, (name, true) in enumerate(truth(case, data, names, upstream).items()):
        # if a gradient is 0, its error is compared with what flows back
        scale = true.norm() + (0 if n == 0 else 1e-3 * upstream.double().norm())
        found = [float((run[n].double() - true).norm() / scale) for run in runs[:2]]
        errors[name] = max(found) if all(x < float("inf") for x in found) else None
    by_place = {
        "output": [errors["output"]],
        "gradients": [errors[name] for name in ("q", "k", "v", "mass")],
        "per_head": [errors[name] for name in PER_HEAD if name in errors],
    }
    largest = {key: None if None in found else max(found) for key, found in by_place.items()}
    allowed = {"output": limit, "gradients": limit, "per_head": 5 * limit}
    good = all(x is not None and x < allowed[key] for key, x in largest.items())
    same = all(torch.equal(a, b) for a, b in zip(*runs[1:], strict=True))
    return {"good": good, **largest, "same_twice": same, "errors": errors}


def particles(case, device):
    """Tensors of a fresh 25m model's size, with the strides that the model hands over."""
    generator = torch.Generator(device).manual_seed(0)
    queries = case.queries or case.tokens
    steps = torch.linspace(0, 1, HEADS, device=device)
    data = {
        "q": case.spread * _heads(case.batch, queries, COORDS, case.dtype, generator),
        "k": case.spread * _heads(case.batch, case.tokens, COORDS, case.dtype, generator),
        "v": _heads(case.batch, case.tokens, WIDTH, case.dtype, generator),
        "mass": 0.5 + torch.rand(case.batch, case.tokens, device=device, generator=generator),
        "time_scale": 0.35 * 0.01**steps,
        "time_offset": steps,
    }
    if case.cutoff != "none":
        data["radius"] = torch.full((HEADS,), 16.0, device=device)
    if case.background:
        data["background"] = 0.0015 * 10**steps
    return data


def _heads(batch, tokens, width, dtype, generator):
    """Random numbers, (B, H, T, width), with the heads of a token side by side in memory."""
    shape = (batch, tokens, HEADS, width)
    x = torch.randn(shape, device=generator.device, generator=generator)
    return x.to(dtype).transpose(1, 2)


def _law(case, data):
    """The arguments of both implementations that have no gradient."""
    keys = torch.arange(case.tokens, device=data["q"].device)
    return {
        "cutoff": case.cutoff,
        "mass_in_value": case.mass_in_value,
        "query_positions": keys[-data["q"].shape[2] :],
        "key_positions": keys,
    }


def truth(case, data, names, upstream):
    """The formula in float64, some queries at a time: output and gradients by name.

    Args:
        names: of `data`, whose gradients are wanted.
        upstream: the gradient of the output.
    """
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in data.items()}
    total = {name: torch.zeros_like(wide[name]) for name in names}
    law, parts = _law(case, data), []
    positions = law.pop("query_positions")
    rows = max(1, PAIRS // (case.batch * HEADS * case.tokens))
    for start in range(0, len(positions), rows):
        mine = slice(start, start + rows)
        some = wide | {"q": wide["q"][:, :, mine], "query_positions": positions[mine]}
        part = gravity_attention_reference(**some, **law)
        inputs = [wide[name] for name in names]
        grads = torch.autograd.grad(part, inputs, upstream[:, :, mine].double())
        for name, grad in zip(names, grads, strict=True):
            total[name] += grad
        parts.append(part.detach())
    return {"output": torch.cat(parts, 2)} | total
