"""Gravity attention against plain loops, finite differences and float64 autograd."""

import math

import pytest
import torch

from gravity import attention, blocked
from gravity.attention import gravity_attention
from gravity.law import gravity_attention_reference
from particles import (
    CUTOFFS,
    assert_close,
    double,
    leaves,
    output_and_gradients,
    particles,
)

EXPONENTS = (1, 3, 4, 8)


def loop(q, k, v, mass, time_scale, time_offset, exponent, radius, cutoff, mass_in_value, t_q, t_k):
    """The formula of law.py as Python loops over numbers."""
    batch, heads, queries, coords = q.shape
    out = torch.zeros(batch, heads, queries, v.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                total, pull = 0.0, [0.0] * v.shape[-1]
                for j in range(k.shape[2]):
                    if t_k[j] > t_q[i]:
                        continue
                    r2 = sum(float(q[b, h, i, c] - k[b, h, j, c]) ** 2 for c in range(coords))
                    lag = t_q[i] - t_k[j] - float(time_offset[h])
                    r2 += (float(time_scale[h]) * lag) ** 2
                    field = (1 + r2) ** -exponent
                    if not mass_in_value:
                        field *= float(mass[b, j])
                    if cutoff == "hard" and r2 > float(radius[h]) ** 2:
                        field = 0.0
                    if cutoff == "soft":
                        field *= max(0.0, 1 - r2 / float(radius[h]) ** 2) ** 2
                    total += field
                    for d in range(v.shape[-1]):
                        value = float(v[b, h, j, d])
                        pull[d] += field * value * (float(mass[b, j]) if mass_in_value else 1.0)
                for d in range(v.shape[-1]):
                    out[b, h, i, d] = pull[d] / (total + 1e-30)
    return out


@pytest.mark.parametrize("mass_in_value", [False, True])
@pytest.mark.parametrize("cutoff", CUTOFFS)
def test_both_paths_equal_three_loops(cutoff, mass_in_value, small_blocks):
    """The reference and the blocked path equal the loops, also with gaps between positions."""
    data = particles(9, cutoff=cutoff)
    t = torch.tensor([3, 4, 5, 9, 10, 17, 18, 19, 40])
    if cutoff != "none":
        data["radius"] = torch.tensor([2.37, 3.19], dtype=torch.float64)
    for exponent in (1, 2, 4):
        settings = dict(exponent=exponent, cutoff=cutoff, mass_in_value=mass_in_value)
        truth = loop(**{"radius": None, **data, **settings}, t_q=t.tolist(), t_k=t.tolist())
        assert truth.abs().max() > 0.1
        for function in (gravity_attention_reference, gravity_attention):
            out = function(**data, **settings, query_positions=t, key_positions=t)
            torch.testing.assert_close(out, truth, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("path", [gravity_attention_reference, gravity_attention])
@pytest.mark.parametrize("mass_in_value", [False, True])
@pytest.mark.parametrize("cutoff", CUTOFFS)
@pytest.mark.parametrize("background", [None, (0.02, 1.3)])
def test_gradients_are_finite_differences(background, cutoff, mass_in_value, path, small_blocks):
    """gradcheck of both for every input, including the radius of the soft cutoff."""
    small_blocks(2, 24, 3)
    data = particles(5, heads=2, batch=2, coords=2, width=2, cutoff=cutoff)
    if background is not None:
        data["background"] = torch.tensor(background, dtype=torch.float64)
    names = [n for n in data if not (n == "radius" and cutoff == "hard")]
    fixed = {n: data[n] for n in data if n not in names}

    def function(*tensors):
        return path(
            **dict(zip(names, tensors, strict=True)),
            **fixed,
            exponent=3,
            cutoff=cutoff,
            mass_in_value=mass_in_value,
        )

    inputs = leaves({n: data[n] for n in names})
    assert torch.autograd.gradcheck(function, tuple(inputs.values()), fast_mode=False)


@pytest.mark.parametrize("mass_in_value", [False, True])
@pytest.mark.parametrize("cutoff", CUTOFFS)
@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("tokens", [1, 2, 13, 33, 65])
def test_blocked_equals_reference(
    tokens, heads, exponent, cutoff, mass_in_value, small_blocks, visited, monkeypatch
):
    """Outputs and all gradients in float64 and in fp32, with blocks cut off at the end; in fp32 the
    compiled kernels, too."""
    if tokens == 65:
        small_blocks(19, 900, 23)
    settings = dict(exponent=exponent, cutoff=cutoff, mass_in_value=mass_in_value)
    single = particles(tokens, heads=heads, cutoff=cutoff, dtype=torch.float32)
    upstream = torch.randn_like(single["v"])
    truth = output_and_gradients(
        gravity_attention_reference, double(single), upstream.double(), **settings
    )
    assert not visited
    exact = output_and_gradients(gravity_attention, double(single), upstream.double(), **settings)
    assert len(visited) >= 2 * math.ceil(tokens / blocked.tile_rows(2 * heads))
    assert_close(exact, truth, 1e-10, 1e-12)
    compiled = output_and_gradients(gravity_attention, single, upstream, **settings)
    law = {n for n in truth if n in ("time_scale", "time_offset", "radius")}
    for names, limit in ((truth.keys() - law, 2e-5), (law, 1e-4)):  # fp32 sums whose terms cancel
        parts = ({n: x for n, x in tensors.items() if n in names} for tensors in (compiled, truth))
        assert_close(*parts, limit, limit)
    monkeypatch.setattr(attention, "cpu_handles", lambda q, v: False)
    visited.clear()
    plain = output_and_gradients(gravity_attention, single, upstream, **settings)
    assert visited
    assert_close(plain, truth, 2e-5, 2e-5)


@pytest.mark.parametrize("cutoff", CUTOFFS)
def test_blocked_equals_reference_with_its_own_block_sizes(cutoff):
    """700 tokens in blocks of the real sizes, some heads out of reach of the oldest tokens."""
    data = particles(700, batch=1)
    if cutoff != "none":
        data["radius"] = torch.tensor([4.7, 60.3], dtype=torch.float64)
        data["time_scale"] = torch.tensor([0.41, 0.33], dtype=torch.float64)
    upstream = torch.randn_like(data["v"])
    truth = output_and_gradients(gravity_attention_reference, data, upstream, cutoff=cutoff)
    found = output_and_gradients(gravity_attention, data, upstream, cutoff=cutoff)
    assert_close(found, truth, 1e-10, 1e-12)


@pytest.mark.parametrize("path", [gravity_attention_reference, gravity_attention])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cutoff", ["hard", "soft"])
def test_a_token_that_nothing_reaches(cutoff, dtype, path, small_blocks, either_path):
    """With an offset a token is beyond its own radius: output exactly 0, gradients finite."""
    data = particles(20, heads=2, dtype=dtype)
    data["time_scale"] = torch.ones(2, dtype=dtype)
    data["time_offset"] = torch.tensor([5.5, -5.5], dtype=dtype)
    data["radius"] = torch.full((2,), 2.0, dtype=dtype)
    data["q"], data["k"] = 0.1 * data["q"], 0.1 * data["k"]
    for tolerance in (0.0, 1e-4):
        settings = {} if path is gravity_attention_reference else {"field_tolerance": tolerance}
        inputs = leaves(data)
        out = path(**inputs, cutoff=cutoff, **settings)
        assert (out[:, 1] == 0).all()  # every token is too young for the second head
        assert (out[:, 0, :4] == 0).all()  # the first head looks 3.5 to 7.5 tokens back
        assert (out[:, 0, 5:].abs().amax(-1) > 0).all()
        out.square().sum().backward()
        for name, tensor in inputs.items():
            if tensor.grad is not None:
                assert tensor.grad.isfinite().all(), name
        assert (inputs["q"].grad[:, 1] == 0).all()


def test_output_is_continuous_when_the_last_source_leaves():
    """Under the soft cutoff a single source that leaves the radius fades to 0, not to NaN."""
    one = torch.ones(1, dtype=torch.float64)
    for gap in (1e-2, 1e-5, 1e-8, 1e-12, 0.0):
        out = gravity_attention(
            torch.full((1, 1, 1, 1), 2.0 - gap, dtype=torch.float64),
            torch.zeros(1, 1, 1, 1, dtype=torch.float64),
            torch.full((1, 1, 1, 1), 3.0, dtype=torch.float64),
            one[None],
            time_scale=one,
            time_offset=0 * one,
            radius=2 * one,
            cutoff="soft",
        )
        field = 5**-4 * gap**2
        assert float(out) == pytest.approx(3 * field / (field + 1e-30), rel=1e-3, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cutoff", CUTOFFS)
def test_the_future_changes_nothing(cutoff, dtype, small_blocks, either_path):
    """Other q, k, v and masses after position t do not change outputs up to t."""
    data = particles(40, heads=2, cutoff=cutoff, dtype=dtype)
    first = gravity_attention(**data, cutoff=cutoff, field_tolerance=1e-6)
    for t in (0, 6, 22, 38):
        changed = {n: x.clone() for n, x in data.items()}
        for name in "qkv":
            changed[name][:, :, t + 1 :] = 5 * torch.randn_like(changed[name][:, :, t + 1 :]) + 3
        changed["mass"][:, t + 1 :] *= 50
        second = gravity_attention(**changed, cutoff=cutoff, field_tolerance=1e-6)
        limit = 1e-5 if dtype == torch.float32 else 1e-12
        assert (second - first)[:, :, : t + 1].abs().max() <= limit
        assert (second - first)[:, :, t + 1 :].abs().max() > 0.1


def test_the_future_gets_no_gradient(small_blocks):
    """The gradient of an output at t is exactly 0 at later tokens."""
    inputs = leaves(particles(30, heads=2))
    gravity_attention(**inputs)[:, :, 13].sum().backward()
    for name in "qkv":
        grad = inputs[name].grad
        assert (grad[:, :, 14:] == 0).all() and grad[:, :, 13].abs().max() > 0, name
    assert (inputs["mass"].grad[:, 14:] == 0).all()


@pytest.mark.parametrize(
    "dtype, cutoff, background",
    [
        *((torch.float32, "soft", True), (torch.bfloat16, "none", True)),
        *((torch.float64, "soft", True), (torch.float64, "none", False)),
    ],
)
def test_the_compiler_is_told_the_truth(dtype, cutoff, background):
    """PyTorch's own checks of a custom op: the tensors that it promises are those that it returns,
    strides included, and none shares memory with another. float64 runs in blocks, the others in
    the compiled kernels; v is as a model has it, with the heads of a token side by side."""
    data = leaves({n: x.to(dtype) for n, x in particles(40, cutoff=cutoff).items()})
    q, k, v, mass, *law = data.values()
    time = torch.arange(40)
    law = [*law, *[None] * (cutoff == "none"), torch.rand(2, dtype=dtype) if background else None]
    v = v.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    arguments = (q, k, v, mass, *law, 4, cutoff, 1e-4, time, time)
    torch.library.opcheck(torch.ops.gravity.attention.default, arguments)


@pytest.mark.parametrize(
    "wrong",
    [
        {"k": torch.zeros(2, 2, 6, 3)},
        {"k": torch.zeros(2, 1, 6, 4)},
        {"v": torch.zeros(2, 2, 5, 3)},
        {"mass": torch.ones(2, 5)},
        {"mass": torch.ones(2, 6, 1)},
        {"time_scale": torch.ones(3)},
        {"time_offset": torch.ones(1)},
        {"exponent": 0},
        {"exponent": -2},
        {"exponent": 2.5},
        {"cutoff": "fuzzy"},
        {"cutoff": "hard"},
        {"radius": torch.ones(2)},
        {"query_positions": torch.arange(5)},
        {"key_positions": torch.arange(7)},
        {"q": torch.zeros(2, 2, 3, 4)},
        {"cutoff": "soft", "radius": torch.ones(3)},
    ],
    ids=lambda wrong: ", ".join(
        f"{n}={list(x.shape) if torch.is_tensor(x) else x}" for n, x in wrong.items()
    ),
)
def test_what_does_not_fit_is_refused(wrong):
    """Shapes and settings that do not fit raise ValueError; the same call without them works."""
    good = particles(6, dtype=torch.float32)
    assert gravity_attention(**good).shape == (2, 2, 6, 3)
    with pytest.raises(ValueError):
        gravity_attention(**good | wrong)
