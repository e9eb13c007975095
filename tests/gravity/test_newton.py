"""The windows of newton's heads, and what the cache forgets by them."""

import math

import pytest
import torch

from engine.kv_cache import KVCache
from gravity.heads import merge_heads, split_heads
from gravity.law import gravity_attention_reference
from gravity.newton import GravityAttention
from model import NGTConfig
from small_models import BLOCK, NEWTON, NGT_SMALL, ids, lively


def heavy_then_light(mass_in_value):
    """A layer whose heads feel every token at their own place, and 200 tokens for it, the first 60
    of which are a thousand times as heavy as the others and pass on the opposite value."""
    settings = dict(field_tolerance=0.02, mass_in_value=mass_in_value, background_start=0.01)
    config = NGTConfig(**NGT_SMALL, **NEWTON["newton background"] | settings)
    attn = GravityAttention(config, 0)
    attn.reset_geometry()
    for proj in (attn.v_proj, attn.out_proj):
        proj.weight.copy_(torch.eye(24))
        proj.bias.zero_()
    attn.probe_proj.weight.zero_()
    attn.source_proj.weight.zero_()
    attn.source_proj.bias.copy_(attn.probe_proj.bias)
    attn.time_scale_raw.copy_(torch.log(torch.expm1(torch.tensor([0.5, 0.7, 1.0, 2.0]))))
    heavy = torch.arange(200)[None] < 60
    mass = torch.where(heavy, 1.0, 0.001)
    h = torch.where(heavy, 1.0, -1.0)[:, :, None].expand(1, 200, 24)
    return attn, h, torch.zeros(1, 200, 12), mass


@pytest.mark.parametrize("mass_in_value", [False, True])
@torch.no_grad()
def test_what_a_background_lets_forget_never_matters(mass_in_value):
    """In the worst places, and for all later tokens, the outputs are within 2 tolerance max|v| of
    those that feel everything; with the mass of light tokens as the largest they are not."""
    attn, h, z, mass = heavy_then_light(mass_in_value)
    v = split_heads(attn.v_proj(h), 4)
    q, k = attn.points(z)
    full = merge_heads(gravity_attention_reference(q, k, v, mass, **attn.law()))
    errors = {}
    for largest in (1.0, 0.001):
        cache, outputs = KVCache(), []
        cache.largest_mass = torch.tensor(largest)
        for t in range(200):
            part = slice(t, t + 1)
            out, _ = attn(h[:, part], z[:, part], mass[:, part], torch.tensor([t]), cache)
            outputs.append(out)
            cache.length += 1
        assert cache.num_remembered(0) < 60
        errors[largest] = (torch.cat(outputs, 1) - full).abs().max()
    assert 0 < errors[1.0] <= 2 * 0.02
    assert (errors[0.001] > 2 * 0.02) == (not mass_in_value)  # masses then move no window


def test_windows_of_a_background():
    """They end where `windows` says, for half of the tolerance: exactly, by hand."""
    config = dict(**NGT_SMALL, background=True, background_start=0.01)

    def windows(mass=3.0, dtype=torch.float32, **settings):
        attn = GravityAttention(NGTConfig(**config | settings), 0)
        attn.reset_geometry()
        scale, offset = attn.time_scale.double(), attn.time_offset.double()
        return scale, offset, attn.window(torch.tensor(mass), dtype)

    for dtype, tolerance, settings in (
        (torch.float32, 1e-4, {}),
        (torch.float32, 1e-6, {"field_tolerance": 1e-6}),
        (torch.bfloat16, 1e-4, {}),
        (torch.float16, 1e-4, {}),
        (torch.bfloat16, 0.01, {"field_tolerance": 0.01}),
    ):
        scale, offset, found = windows(dtype=dtype, use_radius_cutoff=False, **settings)
        by_hand = offset + (3.0 / (7 * scale**8 * tolerance / 2 * 0.01)) ** (1 / 7)
        more = found.double() - by_hand  # whole tokens, and a millionth for rounding
        assert ((more >= 0) & (more <= 1 + 1e-5 * by_hand)).all()
    nearest = {"radius": 0.5}  # ends before what the background proves
    scale, offset, found = windows(**nearest)
    torch.testing.assert_close(found.double(), (offset + 0.5 / scale + 1).clamp(min=1))
    assert (windows(field_tolerance=0.0, use_radius_cutoff=False)[-1] == math.inf).all()
    one, other = (
        windows(mass, mass_in_value=True, use_radius_cutoff=False)[-1] for mass in (1.0, 9.0)
    )
    assert torch.equal(one, other)


def test_a_fixed_farthest_head_does_not_learn_how_far_to_look():
    """The others do, and so do its other parameters."""
    model = lively("newton background")
    for layer in model.layers:
        layer.attn.config.fixed_farthest = True
    model(ids(BLOCK)).square().sum().backward()
    for layer in model.layers:
        learned = layer.attn.time_scale_raw.grad != 0
        assert learned.tolist() == [True, True, True, False]
        assert (layer.attn.time_offset.grad != 0).all()
