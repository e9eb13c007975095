"""The background field: windows that are known beforehand, what they leave out, and gradients."""

import itertools

import pytest
import torch

from gravity.attention import gravity_attention
from gravity.law import Law, gravity_attention_reference, windows
from particles import CUTOFFS, assert_close, double, leaves, output_and_gradients, particles

BOTH_PATHS = pytest.mark.parametrize("path", ["blocked", "compiled"])
LENGTH = 1_000_000  # of a text on paper
EXPONENT = 2  # of the laws by which old tokens keep some weight


def law_of(time_scale, time_offset, background, exponent, tolerance):
    """A law without a radius, as `windows` reads it."""
    heads = (time_scale, time_offset, background)
    scale, offset, background = (torch.as_tensor(x, dtype=torch.float64) for x in heads)
    return Law(scale, offset, None, background, exponent, "none", tolerance, None, None)


@pytest.mark.parametrize("exponent", [1, 2, 4, 8])
def test_windows_on_paper(exponent):
    """All tokens beyond the window, each at exactly the query's point and as heavy as can be,
    weigh together at most tolerance * background; much shorter windows would not do."""
    age = torch.arange(LENGTH, dtype=torch.float64)
    backgrounds, tolerances, heaviest = (1e-6, 1.5e-3, 0.5), (1e-6, 1e-3), 1.7
    cut = 0
    for scale, offset in itertools.product((1e-4, 3e-3, 0.35, 2.0), (-2.5, 0.0, 1.0, 5000.25)):
        field = heaviest / (1 + (scale * (age - offset)) ** 2) ** exponent
        older = field.flip(0).cumsum(0).flip(0)  # of a token and all older ones; smallest first
        for tolerance in tolerances:
            heads = [[x] * len(backgrounds) for x in (scale, offset)]
            law = law_of(*heads, backgrounds, exponent, tolerance)
            found = windows(law, heaviest)
            assert found.shape == (3,) and found.dtype == torch.float64
            for window, background in zip(found.tolist(), backgrounds, strict=True):
                first = max(int(window) + 1, 0)  # the newest token that is left out
                if first >= LENGTH:
                    continue
                assert older[first] <= tolerance * background
                cut += 1
                # the least that any window must hold: older[least] is still too much
                least = int((older > tolerance * background).sum()) - 1
                if exponent == 4:
                    assert window - offset <= 1.5 * (least - offset) + 1
    assert cut >= (2 if exponent == 1 else 40)


def test_windows_where_nothing_is_known():
    """inf without a tolerance, without a background, and for numbers that prove nothing."""
    good = law_of([0.3], [1.0], [1e-3], 4, 1e-6)
    assert windows(good, 1.0).isfinite().all()
    for change in (
        {"tolerance": 0.0},
        {"background": None},
        {"background": torch.zeros(1)},
        {"background": torch.tensor([float("nan")])},
        {"time_scale": torch.zeros(1)},
    ):
        assert windows(good._replace(**change), 1.0).isposinf().all()
    # a radius that ends earlier counts
    assert windows(good._replace(radius=torch.ones(1)), 1.0) == 6


def on_path(path, data, **settings):
    """The operator on the blocked path in float64, or on the compiled one in fp32."""
    dtype = torch.float64 if path == "blocked" else torch.float32
    data = {n: x.to(dtype) for n, x in data.items()}
    return gravity_attention(**data, exponent=EXPONENT, **settings).double()


def old_against_new(tokens, tolerance, wanted):
    """Tokens at one point in space, the older ones with the opposite value and the largest mass.

    Args:
        wanted: the windows, one per head, that the time scales are made for.
    """
    data = particles(tokens, heads=3, batch=1)
    data["q"], data["k"] = torch.zeros_like(data["q"]), torch.zeros_like(data["k"])
    data["mass"] = torch.full_like(data["mass"], 1.7)
    data["background"] = torch.tensor([1.0, 5.0, 30.0], dtype=torch.float64)
    data["v"] = torch.ones_like(data["v"])
    data["v"][:, :, : tokens // 2] = -1
    p = 2 * EXPONENT - 1
    span = torch.as_tensor(wanted, dtype=torch.float64) - 0.5 - data["time_offset"]
    share = p * tolerance * data["background"] / 1.7
    data["time_scale"] = (share * span**p) ** (-1 / (p + 1))
    law = law_of(
        *(data[n] for n in ("time_scale", "time_offset", "background")), EXPONENT, tolerance
    )
    assert (windows(law, 1.7) == torch.as_tensor(wanted)).all()
    return data


@BOTH_PATHS
@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
def test_output_is_within_the_bound(path, tolerance):
    """700 tokens, windows of 20 to 300: something is left out, and no more than may be."""
    data = old_against_new(700, tolerance, [20.0, 90.0, 300.0])
    truth = gravity_attention_reference(**data, exponent=EXPONENT)
    assert truth[0, :, 600:].abs().amin() > 0.05
    errors = (on_path(path, data, field_tolerance=tolerance) - truth).abs().amax((0, 2, 3))
    slack = 1e-12 if path == "blocked" else 5e-6
    assert (errors <= 2 * tolerance + slack).all(), errors
    if tolerance == 1e-2:
        assert (errors > 1e-5).all() and errors.max() > 1e-3, errors
    assert (on_path(path, data) - truth).abs().max() <= slack


def test_a_decoding_step_leaves_out_no_more_than_the_tolerance():
    """The compiled kernel spares a single query the values of weak fields as well as old tokens."""
    tolerance, tokens = 1e-4, 4000
    law = dict(time_scale=[0.02], time_offset=[0.0], background=[0.5])
    newest_heavy = tokens - int(windows(law_of(*law.values(), 4, tolerance), 1.0))
    data = {n: torch.tensor(x, dtype=torch.float64) for n, x in law.items()}
    data |= {
        n: torch.zeros(1, 1, size, 16, dtype=torch.float64) for n, size in (("q", 1), ("k", tokens))
    }
    data["v"] = torch.ones(1, 1, tokens, 16, dtype=torch.float64)
    fields = (1 + (0.02 * torch.arange(tokens, dtype=torch.float64).flip(0)) ** 2) ** -4
    # heavy ones beyond a window for the whole tolerance, and light ones for nearly half of it
    light = 0.45 * tolerance * 0.5 / fields[newest_heavy:].sum()
    data["mass"] = torch.where(torch.arange(tokens) < newest_heavy, 1.0, light)[None]
    positions = dict(query_positions=torch.tensor([tokens - 1]), key_positions=torch.arange(tokens))
    truth = gravity_attention_reference(**data, exponent=4, **positions)
    assert 1.3 * tolerance < truth.min()  # more is there than may be left out
    single = {n: x.float() for n, x in data.items()}
    out = gravity_attention(**single, exponent=4, field_tolerance=tolerance, **positions)
    assert 0.2 * tolerance < (truth - out).abs().max() <= tolerance


@BOTH_PATHS
def test_what_is_beyond_the_window_is_not_read(path):
    """NaN far beyond each head's window does not reach the newest tokens, in either pass."""
    data = old_against_new(700, 1e-3, [20.0, 90.0, 200.0])
    data["v"][:, :, :100] = torch.nan
    inputs = leaves(data)
    out = on_path(path, inputs, field_tolerance=1e-3)[:, :, 600:]
    assert out.isfinite().all()
    out.square().sum().backward()
    assert inputs["q"].grad[:, :, 600:].isfinite().all()


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
def test_forgotten_tokens_do_not_matter_later(tolerance):
    """A token older than the window may be forgotten for good: no later output needs it."""
    wanted = [20.0, 90.0, 200.0]
    data = old_against_new(500, tolerance, wanted)
    truth = gravity_attention_reference(**data, exponent=EXPONENT)
    t = torch.arange(500)
    errors = []
    for head, window in enumerate(wanted):
        one = {
            n: x if n == "mass" else x[:, head : head + 1] if x.dim() == 4 else x[head : head + 1]
            for n, x in data.items()
        }
        for now in (250, 320, 499):
            kept = (
                t >= now - window
            )  # forgotten at the time `now`, with all that was forgotten before
            later = slice(now, None)
            rest = one | {n: one[n][:, :, kept] for n in "kv"} | {"mass": one["mass"][:, kept]}
            out = gravity_attention(
                **rest | {"q": one["q"][:, :, later]},
                exponent=EXPONENT,
                query_positions=t[later],
                key_positions=t[kept],
            )
            errors.append(float((out - truth[:, head : head + 1, later]).abs().max()))
    assert max(errors) <= 2 * tolerance
    assert tolerance < 1e-2 or max(errors) > 1e-4


def law_and_particles(tokens, cutoff):
    """Arguments of the operator in fp32, with a weak, a middling and a strong background."""
    size = dict(heads=3, coords=16, width=16, spread=0.4)
    data = particles(tokens, **size, cutoff=cutoff, dtype=torch.float32)
    return data | {"background": torch.tensor([0.0015, 0.3, 4.0])}


@pytest.mark.parametrize("mass_in_value", [False, True])
@pytest.mark.parametrize("cutoff", CUTOFFS)
@pytest.mark.parametrize("tokens", [1, 33, 131])
def test_every_path_equals_the_reference(tokens, cutoff, mass_in_value, either_path, small_blocks):
    """Outputs and all gradients in float64 and fp32."""
    if tokens == 131:
        small_blocks(19, 900, 23)
    settings = dict(cutoff=cutoff, mass_in_value=mass_in_value)
    single = law_and_particles(tokens, cutoff)
    upstream = torch.randn_like(single["v"])
    truth = output_and_gradients(
        gravity_attention_reference, double(single), upstream.double(), **settings
    )
    for tolerance in (0.0, 1e-8):
        settings["field_tolerance"] = tolerance
        exact = output_and_gradients(
            gravity_attention, double(single), upstream.double(), **settings
        )
        assert_close(exact, truth, 1e-10 + 100 * tolerance, 1e-12 + tolerance)
        found = output_and_gradients(gravity_attention, single, upstream, **settings)
        assert_close(found, truth, 1e-4, 1e-4)


@pytest.mark.parametrize("cutoff", CUTOFFS)
def test_bf16(cutoff, either_path):
    settings = dict(cutoff=cutoff, mass_in_value=cutoff == "hard")
    single = law_and_particles(33, cutoff)
    upstream = torch.randn_like(single["v"]).bfloat16()
    low = {n: x.bfloat16() if n in "qkv" else x for n, x in single.items()}
    truth = output_and_gradients(
        gravity_attention_reference, double(low), upstream.double(), **settings
    )
    found = output_and_gradients(gravity_attention, low, upstream, **settings)
    assert found["out"].dtype == torch.bfloat16 and found["background"].dtype == torch.float32
    law = ("time_scale", "time_offset", "radius", "background")
    for name, expected in truth.items():
        error = (found[name].double() - expected).norm() / expected.norm()
        limit = 1e-2 if name == "out" else 1e-1 if name in law else 3e-2
        assert error < limit, f"{name}: {error:.3f}"


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1)])
def test_a_background_of_the_wrong_shape_is_refused(shape):
    with pytest.raises(ValueError, match="background"):
        gravity_attention(**particles(5), background=torch.ones(shape))
