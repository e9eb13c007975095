"""The CUDA kernels: run by Triton's interpreter on the CPU, compiled for a GPU, and run on one.

Importing Triton decides whether kernels are interpreted. So the interpreter and the compiler each
work in a process of their own, which leaves other tests alone.
"""

import contextlib
import importlib.util
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from gravity import attention
from gravity.law import TINY, Law, gravity_attention_reference, gravity_field, windows

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


def set_blocks(forward, query_gradient, key_gradient):
    """Use small blocks, so that few tokens make many: (tokens per query block, per key block)."""
    from gravity import cuda

    cut = [cuda.Launch(*blocks, 4, 1) for blocks in (forward, query_gradient, key_gradient)]
    cuda.launches = lambda *_: cut
    cuda.NORM_BLOCK = 32


def arguments(data, law, mass_in_value, tolerance, positions):
    """What `gravity_attention` passes to an implementation."""
    v, mass = data["v"], data["mass"]
    if mass_in_value:
        v = v * mass[:, None, :, None].to(v.dtype)
        mass = torch.ones_like(mass)
    given = Law(*map(data.get, LAW_TENSORS), law["exponent"], law["cutoff"], tolerance, *positions)
    return data["q"], data["k"], v, mass, given


def kept_pairs(*args):
    """The pairs that the forward pass kept, (B, H, Tq, Tk) bool; takes what `arguments` does."""
    from gravity import cuda

    query_block = cuda.launches()[0].query
    _, saved = cuda.attend(*arguments(*args))
    first = saved.first_kept.repeat_interleave(query_block, -1)[:, :, : saved.q.shape[2]]
    return torch.arange(saved.k.shape[2]) >= first[..., None]


def reference(data, law, mass_in_value, positions, kept=None):
    """The formula in float64, over all pairs or over those kept."""
    law = law | {"query_positions": positions[0], "key_positions": positions[1]}
    law |= {name: data.get(name) for name in LAW_TENSORS}
    q, k, v, mass = (data[name] for name in ("q", "k", "v", "mass"))
    if kept is None:
        return gravity_attention_reference(q, k, v, mass, mass_in_value=mass_in_value, **law)
    del law["background"]
    field = gravity_field(q, k, mass, mass_in_value=mass_in_value, **law) * kept
    if mass_in_value:
        v = v * mass[:, None, :, None]
    return field @ v / (field.sum(-1, keepdim=True) + TINY)


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
    blocks=((64, 32), (32, 32), (32, 16)),
    arrange=lambda tensor: tensor,
    upstream=None,
):
    """Errors of the kernels against float64 over the same pairs, by the name of what is computed.

    Args:
        dtype: of q, k, v; the reference gets the numbers that it can hold.
        blocks: see `set_blocks`.
        arrange: gives q, k, v their strides.

    Returns:
        Relative norms; for per-head numbers relative to their absolute terms. With a tolerance and
        no background, which are compared over the pairs kept, also "skipped", the share of causal
        pairs left out; "weight", the largest sum of fields left out relative to the sum kept;
        "beyond", the largest error against all pairs, over max|v|.
    """
    from gravity.cuda import triton_attention

    if blocks is not None:
        set_blocks(*blocks)
    if cutoff == "none":
        data = {name: tensor for name, tensor in data.items() if name != "radius"}
    settings = law = {"cutoff": cutoff, "exponent": exponent}
    queries, keys = data["q"].shape[2], data["k"].shape[2]
    device = data["q"].device
    if positions is None:
        positions = (torch.arange(queries, device=device), torch.arange(keys, device=device))
    computed = {n: t.to(dtype if n in "qkv" else torch.float32) for n, t in data.items()}
    computed = {n: (arrange(t) if n in "qkv" else t) for n, t in computed.items()}
    data = {name: tensor.double() for name, tensor in computed.items()}
    given = (computed, law, mass_in_value, tolerance, positions)
    kept = kept_pairs(*given) if tolerance and "background" not in data else None
    for tensor in (*data.values(), *computed.values()):
        tensor.requires_grad_()
    truth = reference(data, law, mass_in_value, positions, kept)
    found = triton_attention(*arguments(*given))
    if upstream is None:
        generator = torch.Generator().manual_seed(1)
        upstream = torch.randn(truth.shape, generator=generator).to(device)
    upstream = upstream.to(dtype)
    wide = upstream.double()
    names = [n for n in data if n != "radius" or cutoff == "soft"]
    true_grads = torch.autograd.grad(truth, [data[n] for n in names], wide)
    grads = torch.autograd.grad(found, [computed[n] for n in names], upstream, allow_unused=True)
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
    if kept is not None:
        causal = (positions[0][:, None] >= positions[1]).expand_as(kept)
        result["skipped"] = 1 - float((kept & causal).sum() / causal.sum())
        law = settings | {n: data.get(n) for n in ("time_scale", "time_offset", "radius")}
        law |= {"query_positions": positions[0], "key_positions": positions[1]}
        field = gravity_field(
            *(data[n] for n in ("q", "k", "mass")), mass_in_value=mass_in_value, **law
        )
        result["weight"] = float(((field * ~kept).sum(-1) / (field * kept).sum(-1)).max().detach())
        everything = reference(data, settings, mass_in_value, positions)
        biggest = data["v"].abs().max() * (data["mass"].max() if mass_in_value else 1)
        result["beyond"] = float((found.double() - everything).abs().max() / biggest)
    return result


def assert_small(found, limit=1e-5, scalars=1e-5):
    """Assert that all errors over the same pairs are below a limit."""
    for name, error in found.items():
        if name not in ("skipped", "weight", "beyond"):
            small = scalars if name in LAW_TENSORS else limit
            assert error < small, found


EXPONENTS = (1, 3, 4, 8)


@pytest.mark.parametrize("length", [1, 2, 17, 63, 130])
@pytest.mark.parametrize("cutoff", CUTOFFS)
def test_output_and_gradients(interpreted, cutoff, length):
    """Every cutoff at odd lengths, every exponent, mass in the weight and in the value."""
    turn = CUTOFFS.index(cutoff) + (1, 2, 17, 63, 130).index(length)
    found = interpreted(
        errors,
        particles(length),
        cutoff=cutoff,
        exponent=EXPONENTS[turn % 4],
        mass_in_value=turn % 2 == 1,
    )
    assert_small(found)


@pytest.mark.parametrize("mass_in_value", [False, True])
@pytest.mark.parametrize("exponent", EXPONENTS)
def test_exponents(interpreted, exponent, mass_in_value):
    """Every exponent, with the mass in the weight and in the value."""
    data = particles(19, seed=3)
    blocks = ((32, 16), (32, 16), (16, 16))
    found = interpreted(
        errors, data, "soft", exponent=exponent, mass_in_value=mass_in_value, blocks=blocks
    )
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


@pytest.mark.parametrize("cutoff", CUTOFFS)
def test_decoding(interpreted, cutoff):
    """A few new queries against cached keys, positions with gaps, queries between the keys."""
    data = particles(50, queries=3, seed=5)
    tk = torch.cumsum(torch.randint(1, 4, (50,), generator=torch.Generator().manual_seed(2)), 0)
    tq = torch.stack([tk[20] + 1, tk[47], tk[49] + 2])
    blocks = ((16, 16), (16, 16), (16, 16))
    found = interpreted(errors, data, cutoff, positions=(tq, tk), blocks=blocks)
    assert_small(found)


def windowed(length, kind="plain"):
    """Data whose fields fall fast with time."""
    data = particles(length, heads=3, seed=6)
    data["time_scale"] = torch.tensor([4.0, 1.5, 0.6]).double()
    if kind == "positive offset":
        data["time_offset"] = torch.tensor([30.5, 17.0, 3.25]).double()
    elif kind == "old against new":  # old tokens are near the query and have other values
        data["q"], data["k"] = torch.zeros_like(data["q"]), torch.zeros_like(data["k"])
        data["v"] = torch.ones_like(data["v"])
        data["v"][:, :, : length // 2] = -1
    return data


@pytest.mark.parametrize(
    "kind, tolerance",
    [("plain", 1e-2), ("plain", 1e-4), ("positive offset", 1e-2), ("old against new", 1e-3)],
)
def test_what_is_left_out(interpreted, kind, tolerance):
    """Errors are within the proven bound, and the backward pass keeps the same pairs."""
    blocks = ((32, 16), (32, 16), (16, 16))
    found = interpreted(errors, windowed(70, kind), tolerance=tolerance, blocks=blocks)
    assert_small(found, limit=3e-5, scalars=3e-5)
    assert found["skipped"] > 0.1, found
    assert found["weight"] <= tolerance, found
    assert found["beyond"] <= 2 * tolerance + 1e-6, found


def test_what_is_left_out_between_gaps(interpreted):
    """Positions with gaps: the bound holds without a source for every age."""
    data = windowed(60)
    tk = torch.cumsum(torch.randint(1, 5, (60,), generator=torch.Generator().manual_seed(3)), 0)
    blocks = ((16, 16), (16, 16), (16, 16))
    found = interpreted(
        errors, data, tolerance=1e-3, positions=(tk, tk), blocks=blocks, mass_in_value=True
    )
    assert_small(found, limit=3e-5, scalars=3e-5)
    assert found["skipped"] > 0.15, found
    assert found["weight"] <= 1e-3, found
    assert found["beyond"] <= 2e-3 + 1e-6, found


@pytest.mark.parametrize("cutoff", ["hard", "soft"])
def test_beyond_the_radius(interpreted, cutoff):
    """What is beyond the reach of the radius is left out, and changes nothing."""
    data = windowed(70)
    data["time_offset"] = torch.tensor([0.5, 1.0, -3.0]).double()
    blocks = ((32, 16), (32, 16), (16, 16))
    found = interpreted(errors, data, cutoff, tolerance=1e-12, blocks=blocks)
    assert_small(found, limit=3e-5, scalars=3e-5)
    assert found["skipped"] > 0.3, found
    assert found["beyond"] <= 5e-6, found


@pytest.mark.parametrize("length", [1, 17, 130])
@pytest.mark.parametrize("cutoff", CUTOFFS)
@pytest.mark.parametrize("tolerance", [0.0, 1e-6])
def test_background(interpreted, tolerance, cutoff, length):
    """With a background, its gradient included, against the sum of all pairs."""
    turn = CUTOFFS.index(cutoff) + (1, 17, 130).index(length)
    data = particles(length, heads=3, background=True)
    found = interpreted(
        errors,
        data,
        cutoff,
        exponent=EXPONENTS[turn % 4],
        mass_in_value=turn % 2 == 1,
        tolerance=tolerance,
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
    blocks = ((16, 16), (16, 16), (16, 16))
    found = interpreted(
        errors, data, cutoff, positions=(tq, tk), blocks=blocks, tolerance=1e-6, mass_in_value=True
    )
    assert_small(found, limit=3e-5, scalars=3e-5)


def poisoned_beyond_the_window(tolerance, gaps):
    """NaN in what must not be read, where the background says how far back heads look.

    Returns:
        The largest error of the output against the sum of all pairs, over max|v|; and, for output
        and gradients, which of them may not be NaN, which must be, and which are.
    """
    from gravity.cuda import triton_attention

    set_blocks((32, 16), (32, 16), (16, 16))
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
    # blocks of 32 queries, of which the oldest decides; the newest of the NaN is key 15
    oldest = t[torch.arange(96) // 32 * 32]
    unread = (oldest - t[15] > window)[:, last]
    read = (t - t[15] <= window)[:, last]
    result = [(unread, read, x[0, :, last].isnan().any(-1)) for x in (out, dq)]

    push = torch.ones_like(out)
    push[:, :, 64:] = torch.nan
    grads = torch.autograd.grad(triton_attention(q, k, given[2], *given[3:]), (k, given[2]), push)
    newest = t[torch.arange(96) // 16 * 16 + 15]
    unread, read = t[64] - newest > window, (t[64] - t <= window) & (t <= t[-1])
    return error, result + [(unread, read, x[0].isnan().any(-1)) for x in grads]


@pytest.mark.parametrize("tolerance, gaps", [(1e-2, False), (1e-4, True)])
def test_windows_of_a_background(interpreted, tolerance, gaps):
    """Blocks beyond the window are not read in either pass, all tokens within are."""
    error, results = interpreted(poisoned_beyond_the_window, tolerance, gaps)
    assert error <= 2 * tolerance + 1e-6
    assert tolerance < 1e-2 or error > 1e-5
    for unread, read, poisoned in results:
        assert unread.any() and read.any()
        assert not (unread & poisoned).any()
        assert (poisoned | ~read).all()


def test_the_host_never_waits(monkeypatch):
    """No number is read back: fake tensors have none, and raise if asked."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from gravity import cuda

    called = []
    for kernel in ("norm", "forward", "query_gradient", "key_gradient"):

        def launch(*_, name=kernel, **__):
            called.append(name)

        stub = type("Stub", (), {"__getitem__": lambda self, grid, launch=launch: launch})()
        monkeypatch.setattr(cuda, f"{kernel}_kernel", stub)
    with FakeTensorMode():
        data = {n: x.float() for n, x in particles(70, background=True).items()}
        positions = (torch.arange(70), torch.arange(70))
        for names in (data.keys(), data.keys() - {"background"}):
            some = {n: x.requires_grad_() for n, x in data.items() if n in names}
            law = {"cutoff": "soft", "exponent": 4}
            cuda.triton_attention(*arguments(some, law, True, 1e-4, positions)).sum().backward()
    assert called == ["norm", "norm", "forward", "query_gradient", "key_gradient"] * 2


def in_empty_space(cutoff):
    """The largest absolute number in the output and gradients of tokens that nothing reaches."""
    from gravity.cuda import triton_attention

    set_blocks((16, 16), (16, 16), (16, 16))
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


def kept_after_underflow():
    """Whether all pairs are kept if the fields fit into fp32, and if all underflow."""
    set_blocks((16, 16), (16, 16), (16, 16))
    data = {name: tensor.float() for name, tensor in windowed(60).items() if name != "radius"}
    data["time_scale"], data["time_offset"] = torch.full((3,), 2000.0), torch.zeros(3)
    law = {"cutoff": "none", "exponent": 8}
    positions = (torch.arange(60), torch.arange(60))
    near = kept_pairs(data, law, False, 1e-3, positions)
    far = kept_pairs(data | {"q": data["q"] + 1e6}, law, False, 1e-3, positions)
    return bool(near.all()), bool(far.all())


def test_stops_only_where_something_was_summed(interpreted):
    """Nothing is left out while the sum is 0: an underflow proves nothing."""
    assert interpreted(kept_after_underflow) == (False, True)


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

    set_blocks((16, 16), (16, 16), (16, 16))
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


TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def compiled(dtype, cutoff, coords, width, launches=None, by_sum=False):
    """Compile the three kernels for Hopper without a GPU.

    Args:
        by_sum: as without a background, when the sums say how far back to look.

    Returns:
        Bytes of shared memory and the GPU's assembler, for each kernel.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gravity import cuda

    padded = [cuda._padded(size) for size in (coords, width)]
    if launches is None:
        launches = cuda.launches(dtype, max(padded), 512)
    else:
        launches = [cuda.Launch(*launch) for launch in launches]
    shared = cuda._constants(4, cutoff, width, coords)
    shared |= {"BY_SUM": by_sum, "FORWARD_M": launches[0].query}
    if not by_sum:
        shared["first_kept_ptr"] = None
    inputs = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "grad_ptr", "dq_ptr", "dk_ptr", "dv_ptr")
    tables = ("visible_ptr", "first_seen_ptr", "first_kept_ptr")
    results = []
    kernels = (cuda.forward_kernel, cuda.query_gradient_kernel, cuda.key_gradient_kernel)
    for kernel, launch in zip(kernels, launches, strict=True):
        constants = shared | {"M": launch.query, "N": launch.key}
        signature, values, hints = {}, {}, {}
        for place, argument in enumerate(kernel.arg_names):
            if argument in constants or argument in ("stride_qc", "stride_kc", "stride_vd"):
                signature[argument] = "constexpr"
                values[place,] = constants.get(argument, 1)
            elif argument.endswith("_ptr"):
                kind = TYPES[dtype] if argument in inputs else "fp32"
                signature[argument] = "*i32" if argument in tables else f"*{kind}"
                hints[place,] = [["tt.divisibility", 16]]
            else:
                signature[argument] = "fp32" if argument == "log_share" else "i32"
        binary = triton.compile(
            ASTSource(kernel, signature, values, hints),
            target=GPUTarget("cuda", 90, 32),
            options=launch.options(),
        )
        assert len(binary.asm["cubin"]) > 1000
        results.append((binary.metadata.shared, binary.asm["ptx"]))
    return results


def check_compiled(cases):
    with process(interpreted=False) as executor:
        for case in cases:
            dtype = case[0]
            kernels = executor.submit(compiled, *case).result()
            for shared, ptx in kernels:
                assert shared <= 99 * 1024  # what the smallest recent GPUs have
                assert ptx.count("rcp.approx.ftz") > ptx.count("div.full")  # rows may be divided
                if dtype != torch.float32:
                    assert "wgmma.mma_async" in ptx
                if dtype == torch.bfloat16:
                    assert "tf32" not in ptx


SMALL = ((16, 16, 4, 2), (16, 16, 4, 2), (16, 16, 4, 2))


def test_compiles_for_a_gpu():
    """The kernels as launched in 16 bits, and in fp32 with small tiles, which compile faster."""
    check_compiled(
        [
            (torch.bfloat16, "soft", 16, 64, None, False),
            (torch.bfloat16, "soft", 16, 64, None, True),
            (torch.float32, "hard", 16, 16, SMALL, False),
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("by_sum", [False, True])
@pytest.mark.parametrize("cutoff", CUTOFFS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_compiles_every_kernel_for_a_gpu(dtype, cutoff, by_sum):
    check_compiled([(dtype, cutoff, *widths, None, by_sum) for widths in ((16, 64), (24, 80))])


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
