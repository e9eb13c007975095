"""The parts of --recipe modern, each against a few plain lines in float64."""

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import vanilla_model
from engine.models import build_model
from gravity.law import gravity_attention_reference
from gravity.retardation import mix_with_token_before
from layers.config import ModelConfig
from layers.parts import FeedForward, RMSNorm, init_weights, inverse_rms, norm, soft_cap
from model import NGTConfig
from small_models import BLOCK, MODERN, MODERN_VANILLA, NGT_SMALL, SMALL, ids, lively
from training.config import RECIPES
from vanilla_model import Vanilla, VanillaConfig


def config(**settings):
    return ModelConfig(vocab_size=9, hidden_dim=12, mlp_dim=20, **settings)


def test_rmsnorm_divides_by_the_root_mean_square():
    """Without subtracting a mean; in bf16 as well, to its precision and without a warning."""
    layer, x = norm(config(norm="rmsnorm"), 12), torch.randn(5, 12) + 1
    nn.init.uniform_(layer.weight, 0.5, 2)
    y = x.double()
    expected = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer(x.bfloat16()).double(), expected, rtol=2e-2, atol=2e-2)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]


def test_own_backward_passes_have_the_gradients_of_finite_differences():
    """In float64; and RMSNorm's outputs are PyTorch's, to the bit."""
    norm_of, x = RMSNorm(12), torch.randn(3, 5, 12) + 1
    nn.init.uniform_(norm_of.weight, 0.5, 2)
    assert torch.equal(norm_of(x), F.rms_norm(x, (12,), norm_of.weight, 1e-6))
    norm_of.double()
    wide = x.double().requires_grad_()
    assert torch.autograd.gradcheck(norm_of, (wide,))
    assert torch.autograd.gradcheck(lambda _: norm_of(wide), (norm_of.weight,))
    layer = FeedForward(config(activation="relu2", bias=False)).double()
    assert torch.autograd.gradcheck(layer, (wide,))


def test_second_derivatives_are_refused_rather_than_wrong():
    """RMSNorm's own backward pass keeps a number whose derivative it does not know."""
    x = torch.randn(2, 12, requires_grad=True)
    (first,) = torch.autograd.grad(RMSNorm(12)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_relu2_squares_what_is_above_zero():
    layer, x = FeedForward(config(activation="relu2", bias=False)), torch.randn(5, 12)
    up, down = layer.up_proj.weight.double(), layer.down_proj.weight.double()
    y = x.double() @ up.T
    expected = torch.where(y > 0, y * y, 0) @ down.T
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-6)


def test_soft_cap_is_the_identity_near_zero_and_bounded():
    x = torch.tensor([-1e9, -15.0, -0.01, 0.0, 0.01, 15.0, 1e9])
    expected = [15 * math.tanh(float(value) / 15) for value in x]
    torch.testing.assert_close(soft_cap(x, 15.0), torch.tensor(expected))
    assert soft_cap(x, 0.0) is x
    assert soft_cap(x.bfloat16(), 15.0).dtype == torch.float32


def test_no_bias_but_the_heads():
    """The published law has a bias in its head; the norms of both recipes are named by the
    config."""
    for kind, settings in (("ngt", {}), ("ngt", {"law": "published"}), ("vanilla", {})):
        model = build_model({"model_type": kind, **SMALL, **MODERN, **settings})
        biased = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
        assert biased == ({"head.bias"} if settings else set())
        assert not any(isinstance(module, nn.LayerNorm) for module in model.modules())


def by_head(x, heads=4):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, H, T, C)


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def shifted(x):
    """Of each token the one before it, of the first itself."""
    return torch.cat([x[:, :1], x[:, :-1]], 1)


def skeleton(model, tokens, attention, move=lambda h, w: None):
    """The logits of a modern model in float64.

    `attention(layer, x, w, values)` returns what each token of x receives; `values` mixes with the
    first layer's. `move(h, w)` is called after each layer.
    """
    w = {name: x.double() for name, x in model.state_dict().items()}
    h = h0 = w["token_emb.weight"][tokens]
    if "pos_emb.weight" in w:
        h = h0 = h + w["pos_emb.weight"]
    first = None
    for layer in range(model.config.num_layers):
        own = {n.split(".", 2)[2]: x for n, x in w.items() if n.startswith(f"layers.{layer}.")}
        h = own["skip"][0] * h + own["skip"][1] * h0

        def values(v, own=own, first=first):
            share = own.get("attn.value_share")
            return v if share is None else (1 - share) * v + share * first

        x = rms(h, own["norm1.weight"])
        out, v = attention(layer, x, own, values)
        first = v if first is None else first
        h = h + out @ own["attn.out_proj.weight"].T
        up = rms(h, own["norm2.weight"]) @ own["ffn.up_proj.weight"].T
        h = h + up.clamp(min=0).square() @ own["ffn.down_proj.weight"].T
        move(h, own)
    logits = rms(h, w["norm.weight"]) @ w["token_emb.weight"].T
    cap = model.config.logit_softcap
    return cap * torch.tanh(logits / cap)


@pytest.mark.parametrize("pos", ["learned", "rotary", "alibi"])
@torch.no_grad()
def test_vanilla_modern_is_its_formula(pos):
    """Smeared keys and values, norms of q and k, rotary, the sink, value residual, skip, cap."""
    model, tokens = lively(f"vanilla {pos} modern", num_layers=3), ids(BLOCK, batch=2)
    t = torch.arange(BLOCK)

    def turned(x):  # pairs of channels as complex numbers
        pairs = torch.complex(x[..., :3], x[..., 3:])
        angle = t[:, None] * 10000.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
        pairs = pairs * torch.exp(1j * angle)
        return torch.cat([pairs.real, pairs.imag], -1)

    def attention(layer, x, w, values):
        q, k, v = (x @ w[f"attn.{name}_proj.weight"].T for name in "qkv")
        k = (1 - w["attn.key_smear"]) * k + w["attn.key_smear"] * shifted(k)
        v = (1 - w["attn.value_smear"]) * v + w["attn.value_smear"] * shifted(v)
        v = values(v)
        q, k = (rms(by_head(y), w[f"attn.{n}_norm.weight"]) for y, n in ((q, "q"), (k, "k")))
        if pos == "rotary":
            q, k = turned(q), turned(k)
        score = q @ k.transpose(-1, -2) / math.sqrt(6)
        if pos == "alibi":
            score -= vanilla_model.alibi_slopes(4)[:, None, None] * (t[:, None] - t)
        weight = torch.where(t[:, None] >= t, score.exp(), 0)
        total = weight.sum(-1, keepdim=True) + w["attn.sink"].exp()[:, None, None]
        return (weight / total @ by_head(v)).transpose(1, 2).flatten(2), v

    expected = skeleton(model, tokens, attention)
    assert expected.std() > 0.3
    torch.testing.assert_close(model(tokens).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["newton modern", "newton state"])
@torch.no_grad()
def test_ngt_modern_is_its_formula(name):
    """The same skeleton; coordinates have RMSNorms and no biases, and move by the pull, or by the
    state; retardation of places as always, of values in the second model."""
    model, tokens = lively(name, num_layers=3), ids(BLOCK, batch=2)
    outer = {name: x.double() for name, x in model.state_dict().items()}
    mass = torch.log1p(outer["mass_emb.weight"][tokens].squeeze(-1).exp())
    h = outer["token_emb.weight"][tokens]
    z = rms(h @ outer["coord_proj.weight"].T, outer["coord_norm.weight"])
    by_state, mover = name == "newton state", None

    def attention(layer, x, w, values):
        nonlocal mover
        q, k = z @ w["attn.probe_proj.weight"].T, z @ w["attn.source_proj.weight"].T
        k = (1 - w["attn.retardation"]) * k + w["attn.retardation"] * shifted(k)
        v = x @ w["attn.v_proj.weight"].T
        if by_state:
            share = w["attn.value_retardation"]
            v = (1 - share) * v + share * shifted(v)
        v = values(v)
        law = {
            name: x.double() if isinstance(x, torch.Tensor) else x
            for name, x in model.layers[layer].attn.law().items()
        }
        out = gravity_attention_reference(by_head(q), by_head(k), by_head(v), mass, **law)
        out = out.transpose(1, 2).flatten(2)
        mover = out @ w["attn.out_proj.weight"].T
        return out, v

    def move(h, w):
        nonlocal z
        x = rms(h, 1.0) if by_state else mover
        z = rms(z + x @ w["coord_proj_next.weight"].T, w["coord_norm.weight"])

    expected = skeleton(model, tokens, attention, move)
    assert expected.std() > 0.3
    logits, geometry = model(tokens, return_geometry=True)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(geometry.z.double(), z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["ngt", "vanilla"])
@torch.no_grad()
def test_a_modern_model_starts_as_its_embedding(kind):
    """Output projections start at 0 and the skip at (1, 0), so that the layers change nothing."""
    model = build_model(SMALL | RECIPES["modern"] | {"model_type": kind}).eval()
    tokens = ids(BLOCK)
    plain = model.head(model.norm(model.token_emb(tokens)))
    torch.testing.assert_close(model(tokens), 15 * torch.tanh(plain / 15))
    assert all(layer.attn.v_proj.weight.std() > 0.01 for layer in model.layers)


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_mixing_with_the_token_before_has_the_gradients_of_its_formula(tokens):
    """Finite differences in float64; the first token has only itself."""
    x, share = torch.randn(2, tokens, 3).double(), torch.randn(3).double()
    mixed = mix_with_token_before(x, share, None, 0)
    torch.testing.assert_close(mixed, (1 - share) * x + share * shifted(x))
    inputs = x.requires_grad_(), share.requires_grad_()
    assert torch.autograd.gradcheck(lambda *given: mix_with_token_before(*given, None, 0), inputs)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(3, 1, 5), (2, 7, 33), (1, 50, 16)])
def test_the_compiled_mix_is_the_formula(shape, dtype, tolerance):
    """Output and gradients against float64, for strided inputs and any number of threads."""
    x = torch.randn(*shape[:2], 2 * shape[2]).to(dtype)[..., ::2]
    share, grad = torch.rand(shape[2]), torch.randn(shape).to(dtype)
    found = []
    for number in (lambda x: x, torch.Tensor.double):
        inputs = [number(y).detach().requires_grad_() for y in (x, share)]
        mixed = mix_with_token_before(*inputs, None, 0)
        mixed.backward(number(grad))
        found.append([mixed, *(y.grad for y in inputs)])
    for ours, expected in zip(*found, strict=True):
        assert ours.dtype == (torch.float32 if ours.dim() == 1 else dtype)
        torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance)


def test_inverse_rms_has_the_gradient_of_its_formula():
    x = torch.randn(2, 3, 5, requires_grad=True)
    y = x.detach().double().requires_grad_()
    plain = (y.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).rsqrt()
    weight = torch.randn(2, 3, 1)
    (inverse_rms(x) * weight).sum().backward()
    (plain * weight.double()).sum().backward()
    torch.testing.assert_close(inverse_rms(x).double(), plain, rtol=1e-6, atol=0)
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(inverse_rms(x).double(), plain, rtol=1e-6, atol=0)


def test_smear_starts_as_retardation():
    """Per head from 0 to 1, as in NGT; values start without it, and the sink's logit is 0."""
    vanilla = Vanilla(VanillaConfig(**SMALL, **MODERN_VANILLA))
    model = build_model({"model_type": "ngt", **NGT_SMALL})
    for layer, other in zip(vanilla.layers, model.layers, strict=True):
        assert torch.equal(layer.attn.key_smear, other.attn.retardation)  # 6 channels each
        assert not layer.attn.value_smear.any() and not layer.attn.sink.any()


def test_the_default_parts_are_those_of_old_checkpoints():
    """A config that lacks the new fields gives the state dict of the old models."""
    names = {name for name, _ in Vanilla(VanillaConfig(**SMALL)).named_parameters()}
    names |= {name for name, _ in build_model({"model_type": "ngt", **SMALL}).named_parameters()}
    new = ("skip", "value_share", "smear", "sink", "q_norm", "k_norm")
    assert not [name for name in names if any(part in name for part in new)]
    assert "layers.0.norm1.bias" in names and "layers.0.attn.out_proj.bias" in names
    for kind in (NGTConfig, VanillaConfig):
        parts = kind(vocab_size=9)
        assert not any(parts.__dict__[name] == RECIPES["modern"][name] for name in MODERN)


def test_rotary_angles_are_computed_once_per_forward(monkeypatch):
    calls, rotation = [], vanilla_model.rotation
    monkeypatch.setattr(
        vanilla_model, "rotation", lambda *args: calls.append(args) or rotation(*args)
    )
    lively("vanilla rotary")(ids(BLOCK))
    assert len(calls) == 1


def test_zero_init_is_of_the_output_maps_only():
    model = Vanilla(VanillaConfig(**SMALL, zero_init_outputs=True))
    init_weights(model)
    zero = {name for name, x in model.named_parameters() if x.dim() == 2 and not x.any()}
    assert zero == {
        f"layers.{n}.{part}.weight" for n in (0, 1) for part in ("attn.out_proj", "ffn.down_proj")
    }
