"""Both models: causality, caches, positions, sizes, errors."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from engine import kv_cache
from engine.kv_cache import KVCache
from engine.models import build_model
from gravity.heads import merge_heads, split_heads
from gravity.law import gravity_attention_reference
from model import GravityAttention, NGTConfig, repulsion_loss
from small_models import (
    ALL,
    BLOCK,
    NEWTON,
    NGT_SMALL,
    PUBLISHED,
    RADIUS,
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

UNLIMITED = [*NEWTON, *(name for name in VANILLA if "learned" not in name)]


def in_chunks(model, tokens, sizes):
    """`(logits, cache)` of tokens that are fed through one KV cache in pieces."""
    cache, start, logits = KVCache(), 0, []
    for size in sizes:
        logits.append(model(tokens[:, start : start + size], kv_cache=cache))
        start += size
    assert start == tokens.shape[1] == cache.length
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_cached_equals_uncached(name):
    """Pieces of 1, 2, 5, 13, ... tokens through the cache give the logits of one pass, to 1e-4."""
    model = lively(name)
    length = 3 * BLOCK if name in UNLIMITED else BLOCK
    tokens = ids(length, batch=2)
    full = model(tokens)
    assert full.std() > 0.3
    for sizes in ([1] * length, [5, 1, 1, 2], [length - 1, 1], [13, 1, 2]):
        sizes = [*sizes, *([] if sum(sizes) == length else [length - sum(sizes)])]
        cached, _ = in_chunks(model, tokens, sizes)
        assert (cached - full).abs().max() < 1e-4


@pytest.mark.parametrize("name", [n for n in NEWTON if "radius" in NEWTON[n]])
@torch.no_grad()
def test_newton_with_a_radius_forgets(name, monkeypatch):
    """The cache stops growing, and the logits equal those of a pass that forgets nothing."""
    monkeypatch.setattr(kv_cache, "MIN_CAPACITY", 2)
    model = lively(name)
    tokens = ids(5 * BLOCK)
    full = model(tokens)
    cache, sizes, memory, logits = KVCache(), [], [], []
    for t in range(tokens.shape[1]):
        logits.append(model(tokens[:, t : t + 1], kv_cache=cache))
        sizes.append(cache.num_remembered(0))
        memory.append(cache.num_bytes())
    assert sizes[0] < sizes[5] < sizes[-1] and memory[0] < memory[5] < memory[-1]
    assert len(set(sizes[20:])) == 1 and len(set(memory[50:])) == 1
    # memory is at most twice what is remembered, including the new token
    assert memory[-1] <= memory[0] / 2 * 2 * (sizes[-1] + 1)
    assert (torch.cat(logits, 1) - full).abs().max() < 1e-4
    # radius / time_scale + offset + slack of the farthest head, in tokens of q, k, v and mass
    assert 1 + RADIUS / 0.25 <= sizes[-1] <= 1 + RADIUS / 0.25 + 3
    # what is remembered matters: without half of it the logits differ
    for layer in range(2):
        cache.keep_newest(layer, 4)
    other = model(tokens[:, -1:], kv_cache=cache)
    again, _ = in_chunks(model, torch.cat([tokens, tokens[:, -1:]], 1), [80, 1])
    assert (other[:, -1] - again[:, -1]).abs().max() > 1e-2


@torch.no_grad()
def test_the_window_is_computed_once_per_layer_and_cache(monkeypatch):
    """A decoding step reads it from the cache, from a snapshot and from a deep copy as well."""
    computed, window = [], GravityAttention.window

    def counting(attn, *given):
        computed.append(attn.layer)
        return window(attn, *given)

    monkeypatch.setattr(GravityAttention, "window", counting)
    model, cache = lively("newton background"), KVCache()
    for _ in range(3):
        model(ids(1), kv_cache=cache)
    for copied in (cache.snapshot(), copy.deepcopy(cache)):
        model(ids(1), kv_cache=copied)
    assert computed == [0, 1]


@torch.no_grad()
def test_cache_without_a_radius_keeps_everything():
    """Without a cutoff every token is remembered."""
    model, cache, sizes = lively("newton none"), KVCache(), []
    for _ in range(40):
        model(ids(1), kv_cache=cache)
        sizes.append(cache.num_remembered(1))
    assert sizes == list(range(1, 41))


@torch.no_grad()
def test_newton_with_a_background_forgets(monkeypatch):
    """A conversation of many tokens takes constant memory, and its logits are those of one pass."""
    monkeypatch.setattr(kv_cache, "MIN_CAPACITY", 2)
    model = lively("newton background")
    tokens = ids(40 * BLOCK)
    full = model(tokens)
    cache, sizes, memory, logits = KVCache(), [], [], []
    for chunk in tokens.split(4, dim=1):
        logits.append(model(chunk, kv_cache=cache))
        sizes.append(cache.num_remembered(0))
        memory.append(cache.num_bytes())
    assert len(set(sizes[25:])) == 1 and len(set(memory[40:])) == 1
    assert 20 < sizes[-1] < 60
    assert (torch.cat(logits, 1) - full).abs().max() < 1e-4
    # an operator that leaves out nothing remembers everything
    model = lively("newton background")
    model.config.field_tolerance = 0.0
    cache = KVCache()
    model(tokens, kv_cache=cache)
    assert cache.num_remembered(0) == tokens.shape[1]


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
def test_geometry_is_what_the_blocks_saw():
    """Masses are softplus of the embedding. There are coordinates before the first layer and after
    each, all normalised; the last are `z`."""
    model, tokens = lively("newton soft"), ids(11, batch=2)
    logits, geometry = model(tokens, return_geometry=True)
    torch.testing.assert_close(logits, model(tokens))
    expected = [[math.log1p(math.exp(model.mass_emb.weight[t])) for t in row] for row in tokens]
    torch.testing.assert_close(geometry.mass, torch.tensor(expected))
    assert len(geometry.layers) == 3 and geometry.layers[-1] is geometry.z
    for z, norm in zip(
        geometry.layers, [model.coord_norm, *(b.coord_norm for b in model.layers)], strict=True
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
