"""The published law against its formula, written out with a difference tensor."""

import pytest
import torch

from gravity.published import published_gravity_attention
from particles import CUTOFFS, assert_close, double, leaves, published_by_hand


def published_particles(tokens=17, heads=3):
    real = torch.float64
    return {
        "x": torch.randn(2, heads, tokens, 4, dtype=real),
        "v": torch.randn(2, heads, tokens, 5, dtype=real),
        "mass": torch.rand(2, tokens, dtype=real) + 0.5,
        "gamma": torch.rand(heads, dtype=real) + 0.2,
        "bias": torch.randn(heads, dtype=real),
    }


def published(data, radius, **settings):
    return published_gravity_attention(
        data["x"],
        data["x"],
        data["v"],
        data["mass"],
        data["mass"],
        gamma=data["gamma"],
        bias=data["bias"],
        radius=radius,
        **settings,
    )


@pytest.mark.parametrize("use_rsqrt", [False, True])
@pytest.mark.parametrize("mass_in_value", [False, True])
@pytest.mark.parametrize("cutoff", CUTOFFS)
def test_published_law(cutoff, mass_in_value, use_rsqrt):
    """Outputs and gradients equal those of the formula written out."""
    data = published_particles()
    radius = None if cutoff == "none" else torch.tensor(2.503, dtype=torch.float64)
    upstream = torch.randn_like(data["v"])
    names = [*data, *([] if cutoff != "soft" else ["radius"])]

    def run(function, **settings):
        inputs = leaves(data)
        own_radius = None if radius is None else radius.clone().requires_grad_()
        out = function(inputs, own_radius, cutoff=cutoff, mass_in_value=mass_in_value, **settings)
        tensors = [*inputs.values(), *([] if cutoff != "soft" else [own_radius])]
        grads = torch.autograd.grad((out * upstream).sum(), tensors)
        return {"out": out.detach(), **dict(zip(names, grads, strict=True))}

    truth = run(published_by_hand)
    assert_close(run(published, use_rsqrt=use_rsqrt), truth, 1e-9, 1e-11)


@pytest.mark.parametrize("cutoff", CUTOFFS)
def test_published_law_is_causal_and_decodes(cutoff):
    """Later tokens change nothing; the newest queries alone give the same rows."""
    data = published_particles()
    settings = dict(cutoff=cutoff, radius=None if cutoff == "none" else 2.503)
    first = published(data, **settings)
    changed = {n: x.clone() for n, x in data.items()}
    changed["x"][:, :, 9:] += 1.5
    changed["v"][:, :, 9:] = 7
    changed["mass"][:, 9:] *= 3
    second = published(changed, **settings)
    assert (first - second)[:, :, :9].abs().max() < 1e-11
    assert (first - second)[:, :, 9:].abs().max() > 0.1
    rows = published_gravity_attention(
        data["x"][:, :, -4:],
        data["x"],
        data["v"],
        data["mass"][:, -4:],
        data["mass"],
        gamma=data["gamma"],
        bias=data["bias"],
        query_positions=torch.arange(13, 17),
        key_positions=torch.arange(17),
        **settings,
    )
    torch.testing.assert_close(rows, first[:, :, -4:], rtol=1e-11, atol=1e-12)


def test_published_law_in_fp32_with_all_its_digits():
    """Distances from norms and products keep the digits of the difference tensor."""
    data = published_particles(tokens=64)
    data["x"] = data["x"] + 40
    single = {n: x.float() for n, x in data.items()}
    truth = published_by_hand(double(single), None, "none", False)
    assert (published(single, None).double() - truth).abs().max() < 2e-4
