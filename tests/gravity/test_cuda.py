"""The CUDA kernels: run by Triton's interpreter on the CPU, compiled for a GPU, and run on one.

Importing Triton decides whether kernels are interpreted. So the interpreter and the compiler each
work in a process of their own, which leaves other tests alone.
"""

import contextlib
import importlib.util
import multiprocessing
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gravity import attention
from gravity.law import TINY, Law, gravity_attention_reference, windows

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
CUTOFFS = ("none", "hard", "soft")
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@contextlib.contextmanager
def process(interpreted):
    """An executor with one worker, in which Triton interprets its kernels or compiles them."""
    before = os.environ.pop("TRITON_INTERPRET", None)
    if interpreted:
        os.environ["TRITON_INTERPRET"] = "1"
    executor = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    try:
        executor.submit(torch.set_num_threads, 1).result()  # the worker starts here
    finally:
        os.environ.pop("TRITON_INTERPRET", None)
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
    with executor:
        yield executor


@pytest.fixture(scope="module")
def interpreted():
    """Calls a function of this file in the process in which Triton interprets its kernels."""
    with process(interpreted=True) as executor:
        yield lambda function, *args, **settings: executor.submit(
            function, *args, **settings
        ).result(timeout=300)


LAW_TENSORS = ("time_scale", "time_offset", "radius", "background")


def particles(length, heads=2, batch=1, coords=5, width=6, queries=None, seed=0, background=False):
    """Arguments of the operator in float64, with numbers that fp32 can hold."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).double()

    queries = length if queries is None else queries
    data = {
        "q": 0.5 * normal(batch, heads, queries, coords),
        "k": 0.5 * normal(batch, heads, length, coords) + 0.25,
        "v": normal(batch, heads, length, width),
        "mass": torch.rand(batch, length, generator=generator).double() + 0.5,
        "time_scale": torch.tensor([0.3, 0.05, 0.5][:heads]).double(),
        "time_offset": torch.tensor([0.3, 1.25, -2.0][:heads]).double(),
        "radius": torch.tensor([3.3, 4.1, 2.9][:heads]).double(),
    }
    if background:
        data["background"] = torch.tensor([0.04, 1.5, 0.001][:heads]).double()
    return data


def set_blocks(query, key):
    """Use small blocks, so that few tokens make many."""
    from gravity import cuda

    cuda.launch_for = lambda *_: cuda.Launch(query, key, 4, 1)
    cuda.BLOCK = min(query, key)


def arguments(data, law, mass_in_value, tolerance, positions):
    """What `gravity_attention` passes to an implementation."""
    v, mass = data["v"], data["mass"]
    if mass_in_value:
        v = v * mass[:, None, :, None].to(v.dtype)
        mass = torch.ones_like(mass)
    given = Law(*map(data.get, LAW_TENSORS), law["exponent"], law["cutoff"], tolerance, *positions)
    return data["q"], data["k"], v, mass, given


def reference(data, law, mass_in_value, positions):
    """The formula in float64, over all pairs."""
    law = law | {"query_positions": positions[0], "key_positions": positions[1]}
    law |= {name: data.get(name) for name in LAW_TENSORS}
    inputs = (data[name] for name in ("q", "k", "v", "mass"))
    return gravity_attention_reference(*inputs, mass_in_value=mass_in_value, **law)


def absolute_terms(data, law, mass_in_value, positions, upstream, output):
    """Sums of the absolute terms of the gradients of per-head numbers, (H,) each."""
    scale, offset = (data[n].detach()[:, None, None] for n in ("time_scale", "time_offset"))
    mass = torch.ones_like(data["mass"]) if mass_in_value else data["mass"].detach()
    v = data["v"].detach()
    if mass_in_value:
        v = v * data["mass"].detach()[:, None, :, None]
    distance = (positions[0][:, None] - positions[1]).double()
    r2 = (data["q"].detach()[:, :, :, None] - data["k"].detach()[:, :, None]).square().sum(-1)
    r2 = r2 + (scale * (distance - offset)).square()
    power = (1 + r2) ** -law["exponent"] * mass[:, None, None] * (distance >= 0)
    rho, squeeze = torch.ones_like(r2), 0.0
    if law["cutoff"] != "none":
        radius = data["radius"].detach()[:, None, None]
        rho = (r2 <= radius.square()).double()
        if law["cutoff"] == "soft":
            rho, squeeze = torch.relu(1 - r2 / radius.square()), 2 / radius.square()
    brought = upstream @ v.transpose(-1, -2) - (upstream * output.detach()).sum(-1, keepdim=True)
    background = data["background"].detach()[:, None, None] if "background" in data else TINY
    total = (power * rho**2).sum(-1, keepdim=True) + background
    share = power * brought.abs() / total
    slope = share * rho * (rho * law["exponent"] / (1 + r2) + squeeze)
    terms = {
        "time_scale": 2 * scale * slope * (distance - offset).square(),
        "time_offset": 2 * scale.square() * slope * (distance - offset).abs(),
    }
    if law["cutoff"] == "soft":
        terms["radius"] = share * rho * 4 * r2 / radius**3
    if "background" in data:
        terms["background"] = (upstream * output.detach() / total).abs()
    return {name: term.sum((0, 2, 3)) for name, term in terms.items()}


def errors(
    data,
    cutoff="none",
    exponent=4,
    mass_in_value=False,
    tolerance=0.0,
    positions=None,
    dtype=torch.float32,
    blocks=(32, 32),
    arrange=lambda tensor: tensor,
    upstream=None,
    repeatable=False,
):
    """Errors of the kernels against float64 over all pairs, by the name of what is computed.

    Args:
        dtype: of q, k, v; the reference gets the numbers that it can hold.
        blocks: see `set_blocks`.
        arrange: gives q, k, v their strides.
        repeatable: use the kernels of `torch.use_deterministic_algorithms`.

    Returns:
        Relative norms; for per-head numbers relative to their absolute terms.
    """
    from gravity.cuda import triton_attention

    if blocks is not None:
        set_blocks(*blocks)
    if cutoff == "none":
        data = {name: tensor for name, tensor in data.items() if name != "radius"}
    law = {"cutoff": cutoff, "exponent": exponent}
    queries, keys = data["q"].shape[2], data["k"].shape[2]
    device = data["q"].device
    if positions is None:
        positions = (torch.arange(queries, device=device), torch.arange(keys, device=device))
    computed = {n: t.to(dtype if n in "qkv" else torch.float32) for n, t in data.items()}
    computed = {n: (arrange(t) if n in "qkv" else t) for n, t in computed.items()}
    data = {name: tensor.double() for name, tensor in computed.items()}
    given = (computed, law, mass_in_value, tolerance, positions)
    for tensor in (*data.values(), *computed.values()):
        tensor.requires_grad_()
    truth = reference(data, law, mass_in_value, positions)
    found = triton_attention(*arguments(*given))
    if upstream is None:
        generator = torch.Generator().manual_seed(1)
        upstream = torch.randn(truth.shape, generator=generator).to(device)
    upstream = upstream.to(dtype)
    wide = upstream.double()
    names = [n for n in data if n != "radius" or cutoff == "soft"]
    true_grads = torch.autograd.grad(truth, [data[n] for n in names], wide)
    torch.use_deterministic_algorithms(repeatable)
    grads = torch.autograd.grad(found, [computed[n] for n in names], upstream)
    torch.use_deterministic_algorithms(False)
    assert found.dtype == dtype and found.shape == truth.shape
    result = {"output": float((found.double() - truth).detach().norm() / truth.detach().norm())}
    terms = absolute_terms(data, law, mass_in_value, positions, wide, truth)
    for name, grad, true_grad in zip(names, grads, true_grads, strict=True):
        assert grad.dtype == computed[name].dtype and torch.isfinite(grad).all(), name
        error = grad.double() - true_grad
        if name in terms:
            result[name] = float((error.abs() / (terms[name] + 1e-2 * float(wide.norm()))).max())
        else:  # one token alone has no gradients of the geometry
            result[name] = float(error.norm() / (true_grad.norm() + 0.1 * wide.norm()))
    return result


def assert_small(found, limit=1e-5, scalars=1e-5):
    """Assert that all errors are below a limit."""
    for name, error in found.items():
        assert error < (scalars if name in LAW_TENSORS else limit), found


EXPONENTS = (1, 3, 4, 8)


@pytest.mark.parametrize("length", [1, 2, 17, 63, 100])
@pytest.mark.parametrize("cutoff", CUTOFFS)
def test_output_and_gradients(interpreted, cutoff, length):
    """Every cutoff at odd lengths, every exponent, mass in the weight and in the value."""
    turn = CUTOFFS.index(cutoff) + (1, 2, 17, 63, 100).index(length)
    found = interpreted(
        errors,
        particles(length),
        cutoff=cutoff,
        exponent=EXPONENTS[turn % 4],
        mass_in_value=turn % 2 == 1,
        blocks=(64, 32),
        repeatable=turn % 3 == 1,
    )
    assert_small(found)


@pytest.mark.parametrize("mass_in_value", [False, True])
@pytest.mark.parametrize("exponent", EXPONENTS)
def test_exponents(interpreted, exponent, mass_in_value):
    """Every exponent, with the mass in the weight and in the value."""
    data = particles(19, seed=3)
    found = interpreted(errors, data, "soft", exponent=exponent, mass_in_value=mass_in_value)
    assert_small(found)


def split_from_a_projection(tensor):
    """The same numbers with the strides of heads split from one wide projection."""
    batch, heads, length, width = tensor.shape
    wide = torch.zeros(batch, length, heads, 3 * width + 1, dtype=tensor.dtype)
    wide[..., width : 2 * width] = tensor.transpose(1, 2)
    return wide[..., width : 2 * width].transpose(1, 2)


def test_strided_inputs(interpreted):
    """Heads split from a projection, and an upstream gradient with strides of 0."""
    ones = torch.ones(()).expand(2, 2, 19, 6)
    data = particles(19, batch=2)
    for upstream in (None, ones):
        found = interpreted(
            errors, data, "hard", arrange=split_from_a_projection, upstream=upstream
        )
        assert_small(found)


@pytest.mark.parametrize("coords, width", [(16, 32), (1, 1), (17, 20)])
def test_widths(interpreted, coords, width):
    """Widths that fill a tile, that are padded, and that need two of the smallest tiles."""
    found = interpreted(errors, particles(21, coords=coords, width=width, seed=4), "soft")
    assert_small(found)


def test_far_from_the_origin(interpreted):
    """Adding a number to all coordinates, or to all times, changes nothing."""
    data = particles(40)
    data["q"], data["k"] = data["q"] + 30, data["k"] + 30
    positions = (torch.arange(40) + 10**6, torch.arange(40) + 10**6)
    assert_small(interpreted(errors, data, positions=positions), limit=5e-5, scalars=5e-5)


def decoding_error(data, cutoff, mass_in_value=False, tolerance=0.0, positions=None):
    """The relative error of the output without gradients, with keys in a larger cache."""
    from gravity.cuda import triton_attention

    law = {"cutoff": cutoff, "exponent": 4}
    if cutoff == "none":
        data = {name: tensor for name, tensor in data.items() if name != "radius"}
    computed = {n: x.float() for n, x in data.items()}
    for name in ("k", "v", "mass"):
        dim = 1 if name == "mass" else 2
        x = computed[name]
        computed[name] = torch.cat([x, x * torch.nan], dim).narrow(dim, 0, x.shape[dim])
    truth = reference(data, law, mass_in_value, positions)
    found = triton_attention(*arguments(computed, law, mass_in_value, tolerance, positions))
    return float((found - truth).norm() / truth.norm())


@pytest.mark.parametrize("cutoff", CUTOFFS)
def test_decoding(interpreted, cutoff):
    """A few new queries against cached keys, positions with gaps, queries between the keys."""
    data = particles(50, queries=3, seed=5)
    tk = torch.cumsum(torch.randint(1, 4, (50,), generator=torch.Generator().manual_seed(2)), 0)
    tq = torch.stack([tk[20] + 1, tk[47], tk[49] + 2])
    found = interpreted(errors, data, cutoff, positions=(tq, tk), blocks=(16, 16))
    assert_small(found)
    assert interpreted(decoding_error, data, cutoff, positions=(tq, tk)) < 1e-6


@pytest.mark.parametrize("repeatable", [False, True])
@pytest.mark.parametrize("cutoff", ["hard", "soft"])
def test_beyond_the_radius(interpreted, cutoff, repeatable):
    """Blocks beyond the reach of the radius, which are not read, would have changed nothing."""
    data = particles(70, heads=3, seed=6)
    data["time_scale"] = torch.tensor([4.0, 1.5, 0.6]).double()
    data["time_offset"] = torch.tensor([0.5, 1.0, -3.0]).double()
    found = interpreted(errors, data, cutoff, blocks=(16, 16), repeatable=repeatable)
    assert_small(found, limit=3e-5, scalars=3e-5)


@pytest.mark.parametrize("length", [1, 17, 100])
@pytest.mark.parametrize("cutoff", CUTOFFS)
@pytest.mark.parametrize("tolerance", [0.0, 1e-6])
def test_background(interpreted, tolerance, cutoff, length):
    """With a background, its gradient included, against the sum of all pairs."""
    turn = CUTOFFS.index(cutoff) + (1, 17, 100).index(length)
    data = particles(length, heads=3, background=True)
    found = interpreted(
        errors,
        data,
        cutoff,
        exponent=EXPONENTS[turn % 4],
        mass_in_value=turn % 2 == 1,
        tolerance=tolerance,
        blocks=(64, 32),
        repeatable=turn % 3 == 1,
    )
    assert "background" in found
    assert_small(found)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("cutoff", CUTOFFS)
def test_decoding_with_a_background(interpreted, cutoff, queries):
    """A few new queries against cached keys; positions with gaps, windows of a few tokens."""
    data = particles(80, heads=3, queries=queries, seed=5, background=True)
    data["time_scale"] = torch.tensor([4.0, 1.5, 0.3]).double()
    tk = torch.cumsum(torch.randint(1, 4, (80,), generator=torch.Generator().manual_seed(2)), 0)
    tq = torch.stack([tk[20] + 1, tk[77], tk[79] + 2])[-queries:]
    settings = {"positions": (tq, tk), "tolerance": 1e-6, "mass_in_value": True}
    found = interpreted(errors, data, cutoff, blocks=(16, 16), **settings)
    assert_small(found, limit=3e-5, scalars=3e-5)
    assert interpreted(decoding_error, data, cutoff, **settings) < 1e-5


def poisoned_beyond_the_window(tolerance, gaps):
    """NaN in what must not be read, where the background says how far back heads look.

    Returns:
        The largest error of the output against the sum of all pairs, over max|v|; and, for output
        and gradients, which of them may not be NaN, which must be, and which are.
    """
    from gravity.cuda import triton_attention

    set_blocks(32, 16)
    t = torch.arange(96)
    if gaps:
        t = torch.cumsum(torch.randint(1, 4, (96,), generator=torch.Generator().manual_seed(4)), 0)
    data = {n: x.float() for n, x in particles(96, heads=3, seed=7, background=True).items()}
    del data["radius"]
    data["time_offset"] = torch.tensor([0.0, 7.5, -2.0])
    # the windows that are wanted; key 15 is the oldest that query 64 sees
    lengths = torch.tensor([5.0, 30.0, float(t[64] - t[15]) - 0.5])
    share = 5 * tolerance * data["background"] / data["mass"].max()
    data["time_scale"] = (share * (lengths - data["time_offset"]) ** 5) ** (-1 / 6)
    data["v"][:, :, :48] = 1.0  # old against new, so that leaving out shows
    data["v"][:, :, 48:] = -1.0
    law = {"cutoff": "none", "exponent": 3}
    given = arguments(data, law, False, tolerance, (t, t))
    truth = reference({n: x.double() for n, x in data.items()}, law, False, (t, t))
    error = float((triton_attention(*given).double() - truth).abs().max())

    window = windows(given[-1], data["mass"].max())[:, None]  # (H, 1)
    last = slice(64, None)
    q, k, v = (x.requires_grad_() for x in given[:3])
    v = v.clone()
    v[:, :, :16] = torch.nan
    out = triton_attention(q, k, v, *given[3:])
    dq = torch.autograd.grad(out[:, :, last].sum(), q)[0]
    # blocks of 32 queries, of which the oldest decides; the newest of the NaN is key 15. Between
    # gaps more may be read, which the ends of the positions cannot tell
    oldest = t[torch.arange(96) // 32 * 32]
    unread = (oldest - t[15] > window)[:, last] & (not gaps)
    read = (t - t[15] <= window)[:, last]
    result = [(unread, read, x[0, :, last].isnan().any(-1)) for x in (out, dq)]

    push = torch.ones_like(out)
    push[:, :, 64:] = torch.nan
    grads = torch.autograd.grad(triton_attention(q, k, given[2], *given[3:]), (k, given[2]), push)
    newest = t[torch.arange(96) // 16 * 16 + 15]
    unread, read = (t[64] - newest > window) & (not gaps), (t[64] - t <= window) & (t <= t[-1])
    return error, result + [(unread, read, x[0].isnan().any(-1)) for x in grads]


@pytest.mark.parametrize("tolerance, gaps", [(1e-2, False), (1e-4, True)])
def test_windows_of_a_background(interpreted, tolerance, gaps):
    """Blocks beyond the window are not read in either pass, all tokens within are."""
    error, results = interpreted(poisoned_beyond_the_window, tolerance, gaps)
    assert error <= 2 * tolerance + 1e-6
    assert tolerance < 1e-2 or error > 1e-5
    for unread, read, poisoned in results:
        assert (unread.any() or gaps) and read.any()
        assert not (unread & poisoned).any()
        assert (poisoned | ~read).all()


def test_the_host_never_waits(monkeypatch):
    """No number is read back: fake tensors have none, and raise if asked."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from gravity import cuda

    called = []
    for module in (cuda.cuda_tiles, cuda.cuda_forward, cuda.cuda_backward):
        for name in (name for name in dir(module) if name.endswith("_kernel")):

            def launch(*_, name=name, **__):
                called.append(name.removesuffix("_kernel"))

            stub = type("Stub", (), {"__getitem__": lambda self, grid, launch=launch: launch})()
            monkeypatch.setattr(module, name, stub)
    with FakeTensorMode():
        data = {n: x.float() for n, x in particles(70, background=True).items()}
        positions = (torch.arange(70), torch.arange(70))
        for names in (data.keys(), data.keys() - {"background"}):
            some = {n: x.requires_grad_() for n, x in data.items() if n in names}
            law = {"cutoff": "soft", "exponent": 4}
            cuda.triton_attention(*arguments(some, law, True, 1e-4, positions)).sum().backward()
        with torch.no_grad():
            data["q"], positions = data["q"][:, :, -1:], (positions[0][-1:], positions[1])
            cuda.triton_attention(*arguments(data, law, True, 1e-4, positions))
    training = ["pack", "forward", "pack_gradient", "key_gradient", "finish"]
    assert called == training * 2 + ["decode", "combine"]


def in_empty_space(cutoff):
    """The largest absolute number in the output and gradients of tokens that nothing reaches."""
    from gravity.cuda import triton_attention

    set_blocks(16, 16)
    data = {name: tensor.float().requires_grad_() for name, tensor in particles(37).items()}
    data["time_offset"] = torch.tensor([-60.0, 90.0], requires_grad=True)
    data["radius"] = torch.tensor([0.5, 0.125], requires_grad=True)
    law = {"cutoff": cutoff, "exponent": 4}
    positions = (torch.arange(37), torch.arange(37))
    out = triton_attention(*arguments(data, law, False, 1e-3, positions))
    grads = torch.autograd.grad(out.sum(), list(data.values()), allow_unused=True)
    return max(float(t.abs().max().nan_to_num(torch.inf)) for t in (out, *grads) if t is not None)


@pytest.mark.parametrize("cutoff", ["hard", "soft"])
def test_nothing_in_reach(interpreted, cutoff):
    """Without any pull the output is 0 and has no gradient; it is never NaN."""
    assert interpreted(in_empty_space, cutoff) == 0


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 2e-2), (torch.float16, 5e-3)])
def test_16_bits(interpreted, dtype, limit, background):
    """With wide limits: the interpreter multiplies 16-bit numbers as fp32 and rounds towards 0."""
    data = particles(33, coords=16, width=16, background=background)
    found = interpreted(errors, data, "soft", dtype=dtype, tolerance=1e-4)
    assert_small(found, limit=limit, scalars=limit)


def gradients_of_one_token_each(dtype):
    """The largest gradient of q or k if each token feels only itself; and of v."""
    from gravity.cuda import triton_attention

    set_blocks(16, 16)
    data = {n: x.float() for n, x in particles(37, coords=16, width=16).items()}
    data = {n: x.to(dtype) if n in "qkv" else x for n, x in data.items()}
    data["k"] = data["q"] + 0.5
    data["time_scale"], data["radius"] = torch.full((2,), 9.0), torch.full((2,), 6.0)
    data["time_offset"] = torch.zeros(2)
    law = {"cutoff": "hard", "exponent": 4}
    q, k, v, *rest = arguments(data, law, False, 1e-4, (torch.arange(37), torch.arange(37)))
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    upstream = torch.randn(v.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    grads = torch.autograd.grad(triton_attention(*inputs, *rest), inputs, upstream)
    return [float(grad.abs().max()) for grad in grads]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_window_of_one_token_has_no_gradient_of_its_place(interpreted, dtype):
    """Its share is 1 wherever it is; rounding to 16 bits must not look like a pull."""
    dq, dk, dv = interpreted(gradients_of_one_token_each, dtype)
    assert max(dq, dk) < 1e-4 and dv > 1


def flex_attention_of(data, exponent, flex_attention):
    """The law without a cutoff by PyTorch's FlexAttention, which shares no code with ours.

    A score is the logarithm of a field, log m - exponent * log(1 + r2). What the background takes
    from the mean follows from the logarithm of the sum of fields, which FlexAttention returns.
    """
    q, k, time_scale, time_offset = (data[n] for n in ("q", "k", "time_scale", "time_offset"))
    q_norm, k_norm = q.square().sum(-1), k.square().sum(-1)
    log_mass = data["mass"].log()

    def score(product, b, h, i, j):
        lag = time_scale[h] * (i - j - time_offset[h])
        r2 = q_norm[b, h, i] + k_norm[b, h, j] - 2 * product + lag * lag
        return torch.where(i >= j, log_mass[b, j] - exponent * torch.log1p(r2), -torch.inf)

    mean, log_sum = flex_attention(q, k, data["v"], score, scale=1.0, return_lse=True)
    return mean * torch.sigmoid(log_sum - data["background"].log()[:, None])[..., None]


def against_flex_attention(data, dtype=torch.float32):
    """Relative differences between the kernels and FlexAttention, of the output and, on a GPU,
    where FlexAttention has gradients, of these."""
    from torch.nn.attention.flex_attention import flex_attention

    from gravity.cuda import triton_attention

    if not data["q"].is_cuda:
        set_blocks(64, 32)
    del data["radius"]
    on_gpu = data["q"].is_cuda
    data = {n: x.to(dtype if n in "qkv" else torch.float32) for n, x in data.items()}
    true = {n: x.detach().float().requires_grad_(on_gpu) for n, x in data.items()}
    for x in data.values():
        x.requires_grad_()
    t = torch.arange(data["q"].shape[2], device=data["q"].device)
    found = triton_attention(
        *arguments(data, {"cutoff": "none", "exponent": 3}, False, 0.0, (t, t))
    )
    truth = flex_attention_of(true, 3, torch.compile(flex_attention) if on_gpu else flex_attention)
    pairs = {"output": (found.detach(), truth.detach())}
    if on_gpu:
        upstream = torch.randn(truth.shape, device=truth.device)
        grads = torch.autograd.grad(found, list(data.values()), upstream.to(dtype))
        true_grads = torch.autograd.grad(truth, list(true.values()), upstream)
        pairs |= dict(zip(data, zip(grads, true_grads, strict=True), strict=True))
    return {name: float((a - b).norm() / b.norm()) for name, (a, b) in pairs.items()}


def test_flex_attention_agrees(interpreted):
    """Where PyTorch's own kernel generator computes the same law; on a CPU forward only."""
    found = interpreted(against_flex_attention, particles(70, coords=16, width=16, background=True))
    assert found["output"] < 2e-6


def compiled(dtype, cutoff, coords=16, width=64, repeatable=False, background=True):
    """Compile all kernels for Hopper as a model launches them, without a GPU.

    The launches of `cuda.py` meet CPU tensors with the shapes and strides of the 25M models; each
    kernel is compiled for what it was given instead of running.

    Returns:
        By kernel: `(registers, bytes spilled, bytes of shared memory, PTX)`.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from gravity import cuda

    device = {
        "get_current_device": lambda: 0,
        "get_current_stream": lambda _: 0,
        "get_current_target": lambda: GPUTarget("cuda", 90, 32),
    }
    driver.set_active(SimpleNamespace(**device))
    found = {}
    for module in (cuda.cuda_tiles, cuda.cuda_forward, cuda.cuda_backward):
        for name in (name for name in dir(module) if name.endswith("_kernel")):
            kernel = getattr(module, name)
            if isinstance(kernel, _Compile):  # of an earlier call in this process
                kernel = kernel.kernel
            setattr(module, name, _Compile(kernel, name, found))
    length, heads = 512, 8
    by_token = [
        torch.zeros(16, length, heads * size, dtype=dtype).view(16, length, heads, size)
        for size in (coords, coords, width, width)
    ]
    q, k, v, upstream = (x.transpose(1, 2) for x in by_token)
    mass, by_head, t = torch.ones(16, length), torch.ones(heads), torch.arange(length)
    radius = None if cutoff == "none" else by_head
    law = Law(*(by_head, by_head, radius), by_head if background else None, 4, cutoff, 1e-4, t, t)
    cuda.decode(q[:, :, -1:], k, v, mass, law._replace(query_positions=t[-1:]))
    _, saved = cuda.attend(q, k, v, mass, law)
    torch.use_deterministic_algorithms(repeatable)
    cuda.pull_back(
        upstream, saved, coords, [x.dtype for x in (q, k, v, mass)] + [None] * 4, 4, cutoff
    )
    return found


class _Compile:
    """In place of a kernel: compiles it for the arguments of a launch."""

    def __init__(self, kernel, name, found):
        self.kernel, self.name, self.found = kernel, name, found

    def __getitem__(self, grid):
        def launch(*args, **settings):
            import triton

            binary = self.kernel.warmup(*args, grid=grid, **settings)
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(binary.asm["cubin"])
                file.flush()
                command = [tool, "-res-usage", file.name]
                usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
            shared = binary.metadata.shared
            self.found[self.name] = int(registers), int(stack), shared, binary.asm["ptx"]

        return launch


def check_compiled(*cases):
    """Compile cases of `compiled` and hold them against what a GPU has."""
    import triton

    if not (Path(triton.__file__).parent / "backends/nvidia/bin/ptxas").exists():
        pytest.skip("this Triton comes without ptxas, which compiles for NVIDIA's GPUs")
    pairs = ("forward", "query_gradient", "key_gradient")
    with process(interpreted=False) as executor:
        for case in cases:
            kernels = executor.submit(compiled, **case).result()
            for name, (registers, spilled, shared, ptx) in kernels.items():
                used = f"{registers} registers, {spilled} bytes spilled, {shared} bytes shared"
                print(f"Triton {triton.__version__}, {case}, {name}: {used}")  # seen with -s
                assert shared <= 99 * 1024, name  # what the smallest recent GPUs have
                if name.removesuffix("_kernel") in pairs:
                    assert "rcp.approx.ftz" in ptx
                    assert ("wgmma.mma_async" in ptx) == (case["dtype"] == torch.bfloat16), name
                assert "tf32" not in ptx
                small = case["dtype"] == torch.bfloat16 and case.get("width", 64) == 64
                if small and name in ("forward_kernel", "query_gradient_kernel"):
                    # so that four blocks run on a multiprocessor
                    assert registers <= 128 and spilled == 0, (name, registers, spilled)


def test_compiles_for_a_gpu():
    """With a model's strides: four blocks of the forward pass run on one multiprocessor."""
    check_compiled({"dtype": torch.bfloat16, "cutoff": "none", "repeatable": True})


@pytest.mark.slow
@pytest.mark.parametrize("cutoff", CUTOFFS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiles_every_kernel_for_a_gpu(dtype, cutoff):
    case = {"dtype": dtype, "cutoff": cutoff}
    wide = {"coords": 24, "width": 256, "background": False, "repeatable": True}
    check_compiled(case, case | {"repeatable": True}, case | wide)


def on_gpu(data):
    return {name: tensor.cuda() for name, tensor in data.items()}


@ON_GPU
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("cutoff", CUTOFFS)
@pytest.mark.parametrize("length", [1, 17, 130, 500])
def test_gpu_fp32(cutoff, length, background):
    data = on_gpu(particles(length, coords=16, width=20, background=background))
    found = errors(data, cutoff, blocks=None, tolerance=1e-7 if background else 0.0)
    assert_small(found, limit=2e-5, scalars=2e-5)


@ON_GPU
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cutoff", CUTOFFS)
@pytest.mark.parametrize("width", [20, 64, 128, 256])
def test_gpu_16_bits(dtype, cutoff, width, background):
    data = on_gpu(particles(500, batch=2, coords=16, width=width, background=background))
    found = errors(data, cutoff, dtype=dtype, blocks=None, tolerance=1e-5 if background else 0.0)
    assert found.pop("output") < 5e-3, found
    assert_small(found, limit=1e-2, scalars=1e-2)


@ON_GPU
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_gpu_flex_attention_agrees(dtype, limit):
    data = on_gpu(particles(500, coords=16, width=64, background=True))
    found = against_flex_attention(data, dtype)
    assert max(found.values()) < limit, found


@ON_GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_decoding(dtype):
    """One query split over many programs, and the same query among many."""
    from gravity.cuda import triton_attention

    data = on_gpu(particles(3000, batch=2, coords=16, width=64, background=True))
    data = {n: x.to(dtype if n in "qkv" else torch.float32) for n, x in data.items()}
    t, law = torch.arange(3000, device="cuda"), {"cutoff": "soft", "exponent": 4}
    many = triton_attention(*arguments(data, law, False, 1e-6, (t, t)))[:, :, -1:]
    data["q"] = data["q"][:, :, -1:]
    one = triton_attention(*arguments(data, law, False, 1e-6, (t[-1:], t)))
    assert (one - many).norm() < (1e-5 if dtype == torch.float32 else 1e-2) * many.norm()


@ON_GPU
@pytest.mark.parametrize("cutoff", CUTOFFS)
def test_gpu_repeatable(cutoff):
    """Without atomic additions: within the same limits, and the same to the bit."""
    data = on_gpu(particles(500, batch=2, coords=16, width=64, background=True))
    found = [
        errors(data, cutoff, dtype=torch.bfloat16, blocks=None, repeatable=True) for _ in range(2)
    ]
    assert found[0] == found[1]
    assert_small(found[0], limit=1e-2, scalars=1e-2)


@ON_GPU
def test_gpu_at_16384_tokens():
    """The last queries with all their keys, which the formula has memory for."""
    from gravity.cuda import triton_attention, triton_handles

    length, rows = 16384, 256
    data = {n: t.float() for n, t in on_gpu(particles(length, coords=16, width=64)).items()}
    data = {n: (t.bfloat16() if n in "qkv" else t) for n, t in data.items() if n != "radius"}
    positions = (torch.arange(length, device="cuda"), torch.arange(length, device="cuda"))
    law = {"cutoff": "none", "exponent": 4}
    last = {n: t.double() for n, t in data.items()}
    last["q"] = last["q"][:, :, -rows:]
    for tensor in (*data.values(), *last.values()):
        tensor.requires_grad_()
    upstream = torch.zeros(1, 2, length, 64, device="cuda", dtype=torch.bfloat16)
    upstream[:, :, -rows:].normal_()
    for tolerance in (0.0, 1e-4):
        out = triton_attention(*arguments(data, law, False, tolerance, positions))
        truth = reference(last, law, False, (positions[0][-rows:], positions[1]))
        assert (out[:, :, -rows:] - truth).norm() < 5e-3 * truth.norm()
        grads = torch.autograd.grad(out, [data[n] for n in "kv"], upstream)
        true_grads = torch.autograd.grad(
            truth, [last[n] for n in "kv"], upstream[:, :, -rows:].double()
        )
        for grad, true_grad in zip(grads, true_grads, strict=True):
            assert (grad - true_grad).norm() < 1e-2 * true_grad.norm()
    assert triton_handles(data["q"], data["k"], data["v"])


@ON_GPU
@pytest.mark.parametrize("background", [False, True])
def test_gpu_never_waits_for_the_device(background):
    from gravity.cuda import triton_attention

    data = on_gpu(particles(300, background=background))
    data = {n: t.float().requires_grad_() for n, t in data.items()}
    positions = (torch.arange(300, device="cuda"), torch.arange(300, device="cuda"))
    law = {"cutoff": "soft", "exponent": 4}
    for mode in ("default", "error"):  # compiling may wait
        torch.cuda.set_sync_debug_mode(mode)
        try:
            triton_attention(*arguments(data, law, False, 1e-4, positions)).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_without_triton_one_warning(monkeypatch, capsys):
    """On a GPU without Triton plain PyTorch takes over, after one warning."""
    on_gpu = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=torch.float32)
    monkeypatch.setattr(attention, "triton_handles", lambda *_: False)
    monkeypatch.setattr(attention, "triton_is_available", lambda: False)
    monkeypatch.setattr(attention, "blocked_attention", lambda *_: "plain")
    attention._warn_of_no_triton.cache_clear()
    assert [attention._attend(*[on_gpu] * 5) for _ in range(2)] == ["plain"] * 2
    warning = capsys.readouterr().err
    assert warning.count("warning: ") == 1 and "pip install triton" in warning
    attention._warn_of_no_triton.cache_clear()
