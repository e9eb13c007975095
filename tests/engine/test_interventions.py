"""Changes to one forward pass: true numbers, and a model that stays as it was."""

import copy
import math
import types

import pytest
import torch
import torch.nn.functional as F

from engine.interventions import head_off, logits_after
from small_models import ALL, BLOCK, VANILLA, ids, lively

NAMES = ("newton background", "newton state", "newton mass in value", "newton soft")
NAMES += ("published soft", "published hard", "vanilla rotary modern", "vanilla alibi")
OFF = {"kind": "off", "layer": 1, "head": 2}
CUT = {"kind": "cut", "layer": 2, "head": 1, "token": 9, "source": 8}
CUTS = [CUT, CUT | {"head": None, "source": 9}, CUT | {"layer": 1, "head": None, "source": 3}]
MASS = {"kind": "mass", "token": 6, "factor": 2.5}
MOVE = {"kind": "move", "token": 7, "toward": 2, "share": 0.8}
CHANGES = {"off": [OFF], "cut": CUTS, "mass": [MASS], "move": [MOVE]}
CHANGES["all"] = [*CUTS, MOVE, OFF, MASS, OFF | {"layer": 2}]


def of_kind(changes, kind):
    return [change for change in changes if change["kind"] == kind]


def mixed(x, share):
    """(1 - share) x_j + share x_(j-1), x (T, C)."""
    return torch.stack([x[0], *((1 - share) * x[j] + share * x[j - 1] for j in range(1, len(x)))])


def split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(0, 1)  # (T, H*D) to (H, T, D)


def weights_of(score, sink=-math.inf):
    """The softmax of scores and one for no token; 0 for a row without any score."""
    sink = torch.as_tensor(sink, dtype=score.dtype).expand(*score.shape[:-1], 1)
    return torch.softmax(torch.cat([score, sink], -1), -1)[..., :-1].nan_to_num()


def dense_attention(attn, changes, h, inputs, first_values):
    """One layer's output and values with T x T matrices in float64, from the formulas alone."""
    config, heads = attn.config, attn.config.num_heads
    law, count = getattr(config, "law", None), h.shape[1]
    values = attn.v_proj(h)[0]
    for name in ("value_retardation", "value_smear"):
        if hasattr(attn, name):
            values = mixed(values, getattr(attn, name))
    if attn.value_share is not None:
        values = (1 - attn.value_share) * values + attn.value_share * first_values[0]
    v = split(values, heads)
    age = torch.arange(count)[:, None] - torch.arange(count)
    kept = (age >= 0).repeat(heads, 1, 1)
    for cut in of_kind(changes, "cut"):
        if cut["layer"] - 1 == attn.layer:
            which = slice(None) if cut["head"] is None else cut["head"]
            kept[which, cut["token"], cut["source"]] = False
    if law is None:
        weight = dense_vanilla(attn, h[0], age, kept)
    else:
        z, mass = inputs[0][0].clone(), inputs[1][0].double()
        for move in of_kind(changes, "move"):
            here, there = inputs[0][0][move["token"]], inputs[0][0][move["toward"]]
            z[move["token"]] = (1 - move["share"]) * here + move["share"] * there
        for change in of_kind(changes, "mass"):
            mass[change["token"]] *= change["factor"]
        dense = dense_newton if law == "newton" else dense_published
        weight = dense(attn, z, torch.ones(count) if config.mass_in_value else mass, age, kept)
        if config.mass_in_value:
            v = v * mass[:, None]
    received = weight @ v  # (H, T, D)
    for off in of_kind(changes, "off"):
        if off["layer"] - 1 == attn.layer:
            received[off["head"]] = 0
    return attn.out_proj(received.transpose(0, 1).flatten(1))[None], values[None]


def dense_vanilla(attn, h, age, kept):
    config, heads = attn.config, attn.config.num_heads
    q, k = attn.q_proj(h), attn.k_proj(h)
    k = mixed(k, attn.key_smear) if config.smear != "none" else k
    q, k = split(q, heads), split(k, heads)
    if config.qk_norm:
        q, k = attn.q_norm(q), attn.k_norm(k)
    width = q.shape[-1]
    if config.pos == "rotary":  # pairs of channels as complex numbers, turned by their angles
        half = width // 2
        speed = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        turn = torch.exp(1j * torch.arange(len(h))[:, None] * speed)
        q, k = (torch.complex(x[..., :half], x[..., half:]) * turn for x in (q, k))
        score = (q @ k.conj().transpose(1, 2)).real / math.sqrt(width)
    else:
        score = q @ k.transpose(1, 2) / math.sqrt(width)
    if config.pos == "alibi":
        slopes = torch.tensor([2.0 ** (-8 * (n + 1) / heads) for n in range(heads)])
        score = score - slopes[:, None, None] * age
    sink = -math.inf if attn.sink is None else attn.sink[:, None, None]
    return weights_of(score.masked_fill(~kept, -math.inf), sink)


def dense_newton(attn, z, mass, age, kept):
    config, heads = attn.config, attn.config.num_heads
    q = split(attn.probe_proj(z), heads)
    k = split(mixed(attn.source_proj(z), attn.retardation), heads)
    scale, offset = F.softplus(attn.time_scale_raw), attn.time_offset
    r2 = (q[:, :, None] - k[:, None]).square().sum(-1)
    r2 = r2 + (scale[:, None, None] * (age - offset[:, None, None])) ** 2
    field = mass * (1 + r2) ** -config.exponent * kept
    if config.cutoff != "none":
        edge = F.softplus(attn.radius_raw)[:, None, None] ** 2
        soft = (1 - r2 / edge).clamp(min=0) ** 2
        field = field * (soft if config.cutoff == "soft" else r2 <= edge)
    quiet = F.softplus(attn.background_raw)[:, None, None] if config.background else 1e-30
    return field / (quiet + field.sum(-1, keepdim=True))


def dense_published(attn, z, mass, age, kept):
    x = split(attn.coord_proj_attn(z), attn.config.num_heads)
    r2 = (x[:, :, None] - x[:, None]).square().sum(-1)
    gamma, bias = F.softplus(attn.gamma_raw)[:, None, None], attn.gravity_bias[:, None, None]
    score = (bias - gamma / (r2 + 1e-6)) * mass[:, None] * mass
    radius2 = F.softplus(attn.radius_raw) ** 2
    if attn.config.cutoff == "soft":
        score = score * (1 - r2 / radius2).clamp(min=0)
    elif attn.config.cutoff == "hard":
        kept = kept & (r2 <= radius2)
    return weights_of(score.masked_fill(~kept, -math.inf))


def dense_logits(model, tokens, changes):
    """The model's logits in float64, with attention and changes as the formulas above say."""
    model = copy.deepcopy(model).double()
    for layer in model.layers:

        def forward(attn, h, *inputs, first_values=None):
            first_values = inputs[2] if getattr(attn.config, "law", None) is None else first_values
            return dense_attention(attn, changes, h, inputs, first_values)

        layer.attn.forward = types.MethodType(forward, layer.attn)
    with torch.no_grad():
        return model(torch.tensor([tokens]))[0]


@pytest.mark.parametrize("name", NAMES)
def test_every_change_is_what_the_formula_says(name):
    torch.manual_seed(3)
    model, tokens = lively(name), ids(BLOCK)[0].tolist()
    before = logits_after(model, tokens, [])
    torch.testing.assert_close(before, model(torch.tensor([tokens]))[0], rtol=0, atol=0)
    for kind, changes in CHANGES.items():
        if name in VANILLA:
            changes = [change for change in changes if change["kind"] in ("off", "cut")]
        expected = dense_logits(model, tokens, changes)
        found = logits_after(model, tokens, changes)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-4)
        if changes:
            assert (found - before).abs().max() > 0.01, kind
            # what comes before the change in the text cannot know of it
            first = min(change.get("token", 0) for change in changes)
            torch.testing.assert_close(found[:first], before[:first], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["newton background", "published hard", "vanilla rotary modern"])
def test_a_token_cut_from_all_there_is_receives_nothing(name):
    """In one head of the only layer that is the same as switching the head off for that token."""
    torch.manual_seed(5)
    model, tokens = lively(name, num_layers=1), ids(4)[0].tolist()
    cut = {"kind": "cut", "layer": 1, "head": 3, "token": 2}
    found = logits_after(model, tokens, [cut | {"source": source} for source in range(3)])
    off = logits_after(model, tokens, [{"kind": "off", "layer": 1, "head": 3}])
    before = logits_after(model, tokens, [])
    torch.testing.assert_close(found[2], off[2])
    torch.testing.assert_close(found[[0, 1, 3]], before[[0, 1, 3]])
    assert (found[2] - before[2]).abs().max() > 0.01


@pytest.mark.parametrize("name", ["newton modern", "published none", "vanilla learned"])
def test_the_model_stays_as_it_was(name):
    """Parameters, hooks and logits, also after an error in the middle of the forward pass."""
    model, tokens = lively(name), ids(BLOCK)[0].tolist()
    batch = torch.tensor([tokens])
    weights, logits = copy.deepcopy(model.state_dict()), model(batch)
    changes = [*CUTS, OFF, *([] if name in VANILLA else [MASS, MOVE])]
    wrong = {"kind": "cut", "layer": 2, "head": 0, "token": BLOCK + 5, "source": 0}

    def unchanged():
        torch.testing.assert_close(model(batch), logits, rtol=0, atol=0)
        assert all(torch.equal(weights[key], x) for key, x in model.state_dict().items())
        for module in model.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks

    logits_after(model, tokens, changes)
    unchanged()
    with pytest.raises(IndexError):
        logits_after(model, tokens, [*changes, wrong])
    unchanged()
    with pytest.raises(ValueError, match="layers 1 to 2"):
        logits_after(model, tokens, [*changes, OFF | {"layer": 0}])
    unchanged()


@pytest.mark.parametrize("name", [*ALL][::3])
def test_a_head_that_is_off_passes_on_nothing(name):
    """It is a head whose channels the output map does not read; afterwards it is on again."""
    model, tokens = lively(name), ids(BLOCK)
    with head_off(model, 2, 3), torch.no_grad():
        found = model(tokens)
    without = copy.deepcopy(model)
    without.layers[1].attn.out_proj.weight.data[:, 18:24] = 0
    torch.testing.assert_close(found, without(tokens), rtol=1e-6, atol=1e-6)
    assert (found - model(tokens)).abs().max() > 0.01
