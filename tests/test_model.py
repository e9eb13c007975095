"""Both models: causality, caches, positions, sizes, errors."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from engine.kv_cache import KVCache
from engine.models import build_model, weightless_model
from model import NGTConfig, repulsion_loss
from small_models import (
    ALL,
    BLOCK,
    NEWTON,
    NGT_SMALL,
    PUBLISHED,
    SMALL,
    VANILLA,
    VOCAB,
    ids,
    lively,
)
from system.errors import UsageError
from training.config import PRESETS, RECIPES, resolve
from training.options import train_parser
from vanilla_model import Attention, VanillaConfig, alibi_slopes, rotate, rotation


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_logits_do_not_see_the_future(name):
    """Other tokens from t on do not change logits before t, and change those from t on."""
    model = lively(name)
    tokens = ids(BLOCK)
    first = model(tokens)
    for t in (1, 7, BLOCK - 1):
        changed = tokens.clone()
        changed[:, t:] = (changed[:, t:] + 1 + ids(BLOCK - t) % (VOCAB - 1)) % VOCAB
        second = model(changed)
        assert (second - first)[:, :t].abs().max() < 1e-5
        assert (second - first)[:, t].abs().max() > 1e-2


@pytest.mark.parametrize("name", [*NEWTON, "vanilla rotary", "vanilla alibi"])
@torch.no_grad()
def test_no_absolute_position(name):
    """A text that starts at position 0 or at position 12345 has the same logits."""
    model, tokens = lively(name), ids(2 * BLOCK)
    cache = KVCache()
    cache.length = 12345
    limit = 2e-3 if name == "vanilla rotary" else 1e-5  # angles of 12345 radians in fp32
    assert (model(tokens, kv_cache=cache) - model(tokens)).abs().max() < limit


@pytest.mark.parametrize("name", ["newton hard", "newton soft"])
@torch.no_grad()
def test_a_prefix_out_of_reach_is_not_felt(name):
    """Two layers reach at most 2 * 14 tokens back: older tokens change nothing, and neither does
    their number."""
    model = lively(name)
    tail = ids(45)
    alone = model(tail)[:, 30:]
    for prefix in (1, 17, 60):
        longer = model(torch.cat([ids(prefix), tail], 1))[:, prefix:]
        assert (longer[:, 30:] - alone).abs().max() < 1e-4
        assert (longer[:, 0] - model(tail)[:, 0]).abs().max() > 1e-2


def test_rotary_turns_pairs_and_knows_distance_only():
    """Pairs turn as complex numbers by e^(i t theta); products depend on distances only."""
    x = torch.randn(2, 3, 7, 8)
    t = torch.tensor([0, 1, 2, 5, 9, 30, 100])
    pairs = torch.complex(x[..., :4].double(), x[..., 4:].double())
    theta = torch.tensor([10000.0 ** (-2 * n / 8) for n in range(4)], dtype=torch.float64)
    turned = pairs * torch.exp(1j * t[:, None] * theta)
    expected = torch.cat([turned.real, turned.imag], -1)
    torch.testing.assert_close(rotate(x, *rotation(t, 8)).double(), expected, rtol=1e-4, atol=1e-4)

    q, k = torch.randn(1, 1, 7, 8), torch.randn(1, 1, 7, 8)
    products = [
        rotate(q, *rotation(t + shift, 8)) @ rotate(k, *rotation(t + shift, 8)).transpose(-1, -2)
        for shift in (0, 3, 200)
    ]
    for shifted in products[1:]:
        torch.testing.assert_close(shifted, products[0], rtol=1e-3, atol=1e-3)
    assert (
        rotate(q, *rotation(t, 8)) @ rotate(k, *rotation(t + 3, 8)).transpose(-1, -2) - products[0]
    ).abs().max() > 0.1


def test_alibi_slopes_are_the_papers():
    """8 heads: 1/2 to 1/256; 12 heads: those, and every other one of 16."""
    assert alibi_slopes(8).tolist() == [1 / 2**n for n in range(1, 9)]
    between = [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
    torch.testing.assert_close(
        alibi_slopes(12), torch.tensor([1 / 2**n for n in range(1, 9)] + between)
    )


@pytest.mark.parametrize("pos", ["learned", "alibi"])
@torch.no_grad()
def test_vanilla_attention_is_the_textbooks(pos):
    """A softmax per row in Python; ALiBi subtracts the slope times the distance."""
    attention = Attention(VanillaConfig(**SMALL, mlp_dim=32, pos=pos), 0)
    h = torch.randn(1, 9, 24)
    q, k, v = (p(h)[0] for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    mixed = torch.zeros(9, 24)
    for head, slope in enumerate([1 / 4, 1 / 16, 1 / 64, 1 / 256]):
        own = slice(6 * head, 6 * head + 6)
        for i in range(9):
            scores = [float(q[i, own] @ k[j, own]) / math.sqrt(6) for j in range(i + 1)]
            if pos == "alibi":
                scores = [score - slope * (i - j) for j, score in enumerate(scores)]
            weights = [math.exp(score) for score in scores]
            for j, weight in enumerate(weights):
                mixed[i, own] += weight / sum(weights) * v[j, own]
    found, _ = attention(h, torch.arange(9))
    torch.testing.assert_close(found[0], attention.out_proj(mixed), rtol=1e-4, atol=1e-5)


def test_repulsion_is_a_double_loop():
    """Mean over pairs i<j of m_i m_j / |z_i - z_j|^2, written as loops."""
    z, mass = torch.randn(3, 9, 5), torch.rand(3, 9) + 0.5
    energies = [
        float(mass[b, i] * mass[b, j]) / sum(float(x) ** 2 for x in z[b, i] - z[b, j])
        for b in range(3)
        for i in range(9)
        for j in range(i + 1, 9)
    ]
    found = repulsion_loss(z, mass)
    assert found.shape == () and found.dtype == torch.float32
    assert float(found) == pytest.approx(sum(energies) / len(energies), rel=1e-5)


def test_repulsion_of_a_sample():
    """Beyond 64 tokens: all samples of equally distant points have the same energy, and the same
    seed repeats a sample."""
    corners = torch.eye(100)[None]  # all |z_i - z_j|^2 = 2
    assert float(repulsion_loss(corners, torch.full((1, 100), 3.0))) == pytest.approx(9 / 2)
    z, mass = torch.randn(2, 100, 4, requires_grad=True), torch.ones(2, 100)
    draws = [
        float(repulsion_loss(z.detach(), mass, generator=torch.Generator().manual_seed(seed)))
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
    repulsion_loss(z, mass).backward()
    assert (z.grad.abs().amax(-1) > 0).sum(1).tolist() == [64, 64]


def test_repulsion_at_its_edges():
    """One token gives 0 with a gradient; points that coincide give finite gradients."""
    z = torch.randn(2, 1, 4, requires_grad=True)
    loss = repulsion_loss(z, torch.ones(2, 1))
    loss.backward()
    assert loss == 0 and (z.grad == 0).all()

    z = torch.ones(1, 5, 4, requires_grad=True)
    mass = torch.full((1, 5), 2.0, requires_grad=True)
    loss = repulsion_loss(z, mass)
    loss.backward()
    assert loss.item() == pytest.approx(4e6)
    assert z.grad.isfinite().all()
    torch.testing.assert_close(mass.grad, torch.full((1, 5), 2 * 4e6 / 10))  # 4 of 10 pairs each


@torch.no_grad()
def test_geometry_is_what_the_layers_saw():
    """Masses are softplus of the embedding. There are coordinates before the first layer and after
    each, all normalised; the last are `z`."""
    model, tokens = lively("newton soft"), ids(11, batch=2)
    logits, geometry = model(tokens, return_geometry=True)
    torch.testing.assert_close(logits, model(tokens))
    expected = [[math.log1p(math.exp(model.mass_emb.weight[t])) for t in row] for row in tokens]
    torch.testing.assert_close(geometry.mass, torch.tensor(expected))
    assert len(geometry.layers) == 3 and geometry.layers[-1] is geometry.z
    for z, norm in zip(
        geometry.layers,
        [model.coord_norm, *(layer.coord_norm for layer in model.layers)],
        strict=True,
    ):
        plain = (z - norm.bias) / norm.weight
        torch.testing.assert_close(plain.mean(-1), torch.zeros(2, 11), rtol=0, atol=1e-4)
        torch.testing.assert_close(
            plain.var(-1, correction=0), torch.ones(2, 11), rtol=0, atol=1e-2
        )


@pytest.mark.parametrize("vocab_size", [66, 2048, 8192])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_compare_equal_sizes(preset, recipe, vocab_size):
    """NGT has as many parameters under either law as its vanilla counterpart, within 1 %."""
    kinds = {
        "newton": (),
        "published": ("--law", "published"),
        "vanilla": ("--model", "vanilla"),
    }
    if recipe == "modern":
        kinds["control"] = ("--model", "vanilla", "--smear", "keys-values", "--sink")
    counts = {}
    for kind, flags in kinds.items():
        given = ["--dataset", preset, "--recipe", recipe, *flags]
        config = resolve(train_parser("", "").parse_args(given))
        with torch.device("meta"):
            model = build_model(config | {"vocab_size": vocab_size})
        counts[kind] = sum(p.numel() for p in model.parameters())
    for kind in counts:
        assert abs(counts[kind] / counts["vanilla"] - 1) < 0.01, counts


@pytest.mark.parametrize(
    ("config", "wrong", "named"),
    [
        (NGTConfig, {"hidden_dim": 30}, "--num-heads"),
        (VanillaConfig, {"hidden_dim": 30}, "--num-heads"),
        (NGTConfig, {"coord_dim": -4}, "--coord-dim"),
        (NGTConfig, {"num_layers": 0}, "--num-layers"),
        (NGTConfig, {"exponent": 0}, "--exponent"),
        (VanillaConfig, {"mlp_dim": -1}, "--mlp-dim"),
        (VanillaConfig, {"num_heads": 0}, "--num-heads"),
        (NGTConfig, {"use_radius_cutoff": False, "use_soft_cutoff": True}, "--use-soft-cutoff"),
        (VanillaConfig, {"hidden_dim": 12, "pos": "rotary"}, "--pos rotary"),
        (VanillaConfig, {"pos": "sinus"}, "--pos"),
        (NGTConfig, {"law": "kepler"}, "--law"),
        (NGTConfig, {"radius": 0.0}, "--radius"),
        (NGTConfig, {"radius": math.nan}, "--radius"),
        (NGTConfig, {"radius": math.inf}, "--radius"),
        (NGTConfig, {"dropout": 1.0}, "--dropout"),
        (VanillaConfig, {"dropout": -0.1}, "--dropout"),
        (NGTConfig, {"field_tolerance": 1.5}, "--field-tolerance"),
        (NGTConfig, {"field_tolerance": -1e-6}, "--field-tolerance"),
    ],
    ids=str,
)
def test_sizes_that_cannot_be(config, wrong, named):
    """Impossible sizes raise a UsageError that names the flag; without them the config is valid."""
    config(**SMALL)
    with pytest.raises(UsageError, match=named):
        config(**SMALL | wrong)


@pytest.mark.parametrize("name", [*PUBLISHED, "vanilla learned"])
def test_absolute_positions_end(name):
    """Models with a table of positions refuse more tokens than it has, with a cache or without."""
    model, cache = lively(name), KVCache()
    with pytest.raises(ValueError, match="block_size"):
        model(ids(BLOCK + 1))
    model(ids(BLOCK), kv_cache=cache)
    with pytest.raises(ValueError, match="block_size"):
        model(ids(1), kv_cache=cache)


@pytest.mark.parametrize(
    "name",
    [
        *("newton soft", "published soft", "vanilla alibi"),
        *("newton modern", "published modern", "vanilla rotary modern"),
    ],
)
def test_every_parameter_learns(name):
    """Every parameter gets a gradient, the last layer's coordinates through repulsion."""
    model = lively(name).train()
    tokens = ids(BLOCK, batch=3)
    if name in VANILLA:
        logits, extra = model(tokens[:, :-1]), 0.0
    else:
        logits, geometry = model(tokens[:, :-1], return_geometry=True)
        extra = repulsion_loss(geometry.z, geometry.mass)
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) + 0.05 * extra
    loss.backward()
    # adding the same to all keys, or to all coordinates, changes no softmax and no distance
    without_effect = {"layers.1.coord_norm.bias"}
    for layer in range(2):
        without_effect |= {f"layers.{layer}.attn.{b}.bias" for b in ("k_proj", "coord_proj_attn")}
    if name in PUBLISHED:
        without_effect |= {"layers.0.coord_norm.bias"}
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), parameter_name
        if parameter_name not in without_effect:
            assert parameter.grad.abs().max() > 1e-8, parameter_name


def test_config_is_plain():
    """A config becomes a dict and is restored from it, as in a checkpoint."""
    for config in (NGTConfig(**NGT_SMALL, law="published"), VanillaConfig(**SMALL, pos="alibi")):
        assert type(config)(**dataclasses.asdict(config)) == config


@pytest.mark.parametrize("name", ALL)
def test_a_weightless_model_has_the_names_and_shapes_of_the_real_one(name):
    """Without memory for its weights, and with the settings that training gives it."""
    kind = {"model_type": "vanilla" if name in VANILLA else "ngt"}
    config = NGT_SMALL | {"mlp_dim": 32} | ALL[name] | kind

    def looks(model):
        return {n: (x.shape, x.dtype) for n, x in model.state_dict().items()}

    weightless = weightless_model(config)
    assert looks(weightless) == looks(build_model(config))
    assert all(p.is_meta for p in weightless.parameters() if p.dim() == 2)
