"""What the implementations leave out: the proven bound, the radius, forgotten keys, rounding."""

import itertools
import math

import pytest
import torch

from gravity.attention import gravity_attention
from gravity.law import gravity_attention_reference, gravity_field, proven_window, reach
from particles import CUTOFFS, assert_close, double, output_and_gradients, particles

LAW_TENSORS = ("time_scale", "time_offset", "radius")


def test_strided_inputs():
    """Tensors as models pass them: heads split from one projection, not contiguous."""
    data = particles(21, heads=3)
    strided = {
        n: t.transpose(1, 2).contiguous().transpose(1, 2) for n, t in data.items() if n in "qkv"
    }
    assert not any(t.is_contiguous() for t in strided.values())
    upstream = torch.randn(2, 21, 3, 3, dtype=torch.float64).transpose(1, 2)
    truth = output_and_gradients(gravity_attention_reference, data, upstream)
    assert_close(
        output_and_gradients(gravity_attention, data | strided, upstream), truth, 1e-10, 1e-12
    )


@pytest.mark.parametrize("tolerance", [1e-2, 1e-6])
@pytest.mark.parametrize("exponent", [1, 4, 8, 16])
def test_proven_window(exponent, tolerance):
    """Older tokens weigh less than the tolerance, by math.fsum; half the window is too short."""
    for scale, offset in itertools.product((0.0035, 0.35, 3.0, 30.0), (0.0, 1.0, -2.5, 40.25)):
        for smallest in (30.0, 1.0, 1e-4, 1e-12):
            window = proven_window(smallest, scale, offset, exponent, 1.7, tolerance)
            assert window >= offset

            def older(dt, scale=scale, offset=offset):
                fields = (
                    1.7 * (1 + (scale * (d - offset)) ** 2) ** -exponent
                    for d in range(dt + 1, 6000)
                )
                return math.fsum(fields)

            oldest_kept = max(0, math.ceil(window))
            if oldest_kept < 5000:
                assert older(oldest_kept) <= tolerance * smallest
            half = int(offset + (window - offset) / 2)
            if scale * (half - offset) > 3 and 10 < half < 1500:
                assert older(half) > tolerance * smallest


def test_no_window_without_a_sum():
    for smallest in (0.0, float("nan")):
        assert proven_window(smallest, 0.3, 0.0, 4, 1.0, 1e-4) == math.inf
    assert proven_window(1.0, 0.0, 0.0, 4, 1.0, 1e-4) == math.inf
    assert proven_window(1e-300, 1e-300, 0.0, 1, 1.0, 1e-6) == math.inf


def skipping_cases(kind):
    """Data of which much is skipped, and which would expose a bound that is too loose."""
    data = particles(200, heads=3, batch=2)
    data["time_scale"] = torch.tensor([4.0, 1.5, 0.6], dtype=torch.float64)
    if kind == "large":
        data["q"], data["k"] = 30 * data["q"], 30 * data["k"]
        data["time_scale"] = torch.tensor([2000.0, 700.0, 300.0], dtype=torch.float64)
    elif kind == "clustered":
        cluster = torch.randint(3, (2, 1, 200, 1)) * 20.0
        data["q"] = 0.1 * data["q"] + cluster
        data["k"] = 0.1 * data["k"] + cluster
        data["time_scale"] = torch.tensor([400.0, 150.0, 60.0], dtype=torch.float64)
    elif kind == "negative offset":
        data["time_offset"] = torch.tensor([-7.5, -3.0, -0.25], dtype=torch.float64)
    elif kind == "positive offset":
        data["time_offset"] = torch.tensor([30.5, 17.0, 3.25], dtype=torch.float64)
    elif kind == "old against new":
        # all tokens older than 40 are near the query and have the opposite values
        data["q"], data["k"] = torch.zeros_like(data["q"]), torch.zeros_like(data["k"])
        data["mass"] = torch.ones_like(data["mass"])
        data["v"] = torch.ones_like(data["v"])
        data["v"][:, :, :160] = -1
    return data


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("exponent", [2, 4])
@pytest.mark.parametrize(
    "kind",
    ["plain", "large", "clustered", "negative offset", "positive offset", "old against new"],
)
def test_tolerance_bounds_the_error(kind, exponent, tolerance, small_blocks, visited):
    """Fewer tiles are computed; outputs move by at most 2 * tolerance * max|v|, and gradients by at
    most the bounds below, which follow from it."""
    small_blocks(8, 64, 8)
    data = skipping_cases(kind)
    if exponent == 2:  # falls slowly
        data["time_scale"] *= 10
    upstream = torch.randn_like(data["v"])
    settings = dict(exponent=exponent)
    truth = output_and_gradients(gravity_attention_reference, data, upstream, **settings)
    found = output_and_gradients(
        gravity_attention, data, upstream, **settings, field_tolerance=tolerance
    )
    skipping = sum(visited)
    output_and_gradients(gravity_attention, data, upstream, **settings)
    if (kind, exponent) != ("negative offset", 2):  # its sums are too small to skip much
        assert skipping < 0.9 * (sum(visited) - skipping)

    largest = data["v"].norm(dim=-1).amax()
    pushes = upstream.norm(dim=-1)  # |g_i|, (B, H, T)
    error = {name: (found[name] - truth[name]).abs() for name in truth}
    slack = 1e-12
    assert error["out"].max() <= 2 * tolerance * data["v"].abs().max() + slack
    unit = tolerance * largest * pushes
    assert (error["q"].norm(dim=-1) <= 6 * exponent * unit + slack).all()
    every = unit.sum(-1)  # (B, H)
    assert (error["k"].norm(dim=-1) <= 6 * exponent * every[..., None] + slack).all()
    assert (error["v"].norm(dim=-1) <= 2 * tolerance * pushes.sum(-1)[..., None] + slack).all()
    assert (error["mass"] <= 6 * every.sum(1)[:, None] / data["mass"] + slack).all()
    scale = data["time_scale"]
    assert (error["time_scale"] <= 12 * exponent * every.sum(0) / scale + slack).all()
    assert (error["time_offset"] <= 6 * exponent * every.sum(0) * scale + slack).all()


def test_tolerance_leaves_out_only_what_it_may(small_blocks, visited):
    """Old sources with opposite values show that something is left out, and how much at most."""
    small_blocks(8, 64, 8)
    data = skipping_cases("old against new")
    full = gravity_attention_reference(**data)
    errors = []
    for tolerance in (1e-2, 1e-4, 1e-6):
        visited.clear()
        out = gravity_attention(**data, field_tolerance=tolerance)
        errors.append(float((out - full).abs().max()) / tolerance)
        assert errors[-1] <= 2
    assert errors[0] > 1e-3


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-6])
def test_tolerance_where_new_sources_underflow(tolerance, small_blocks):
    """Queries whose newest sources have almost no field must look on, however far back."""
    small_blocks(8, 64, 8)
    data = particles(96, heads=3, batch=2, spread=0.1)
    data["time_scale"] = torch.tensor([0.3, 0.01, 0.002], dtype=torch.float64)
    newest, exponent = data["k"][1, :, 36:], 64
    # one batch entry is plain; in the other the newest 60 sources are far away: their fields are 0,
    # 1e-300, or about as small as the bound on all older ones
    for distance, largest in ((1e3, 0.0), (110.0, 1e-298), (0.7, 1e-15)):
        newest[...] = distance
        full = gravity_attention_reference(**data, exponent=exponent)
        assert (
            gravity_field(
                **{n: x[1:] if n in ("q", "k", "mass") else x for n, x in data.items() if n != "v"},
                exponent=exponent,
            )[..., 36:].max()
            <= largest
        )
        assert full[1, :, 60:].abs().max() > 0.1
        out = gravity_attention(**data, exponent=exponent, field_tolerance=tolerance)
        assert (out - full).abs().max() <= 2 * tolerance * data["v"].abs().max() + 1e-9


def test_tolerance_where_the_bound_falls_steeply(small_blocks):
    """The oldest source that is kept has the strongest field in time, the next one 1e-16 of it. The
    fields of the new ones are weaker still, so the old one must be visited."""
    small_blocks(8, 128, 16)
    tokens = 32
    data = particles(tokens, heads=1, batch=1)
    data["q"], data["k"] = torch.zeros_like(data["q"]), torch.zeros_like(data["k"])
    data["k"][:, :, 16:] = 50.0
    data["time_scale"] = torch.tensor([10.0], dtype=torch.float64)
    data["time_offset"] = torch.tensor([15.0], dtype=torch.float64)
    last = torch.tensor([tokens - 1])
    data["q"] = data["q"][:, :, -1:]
    settings = dict(exponent=8, query_positions=last, key_positions=torch.arange(tokens))
    full = gravity_attention_reference(**data, **settings)
    out = gravity_attention(**data, **settings, field_tolerance=1e-6)
    assert (out - full).abs().max() <= 2e-6 * data["v"].abs().max() + 1e-12


def test_tolerance_counts_mass(small_blocks):
    """One heavy old source pulls harder than a bound for masses of 1 would allow."""
    small_blocks(8, 64, 8)
    data = particles(64, heads=2, batch=1)
    data["time_scale"] = torch.full((2,), 1.0, dtype=torch.float64)
    data["mass"][:, 0] = 1e9
    full = gravity_attention_reference(**data)
    out = gravity_attention(**data, field_tolerance=1e-4)
    assert (out - full).abs().max() <= 2e-4 * data["v"].abs().max()
    # in the value, the mass belongs to max|m v| instead
    full = gravity_attention_reference(**data, mass_in_value=True)
    out = gravity_attention(**data, mass_in_value=True, field_tolerance=1e-4)
    most = (data["mass"][:, None, :, None] * data["v"]).abs().max()
    assert (out - full).abs().max() <= 2e-4 * most


@pytest.mark.parametrize("mass_in_value", [False, True])
@pytest.mark.parametrize("cutoff", ["hard", "soft"])
def test_radius_skips_and_changes_nothing(cutoff, mass_in_value, small_blocks, visited):
    """A head leaves a query block as soon as all older sources are out of reach; same numbers."""
    data = particles(60, heads=3)
    data["time_scale"] = torch.tensor([2.0, 0.7, 0.05], dtype=torch.float64)
    data["radius"] = torch.tensor([6.01, 5.02, 4.03], dtype=torch.float64)
    upstream = torch.randn_like(data["v"])
    settings = dict(cutoff=cutoff, mass_in_value=mass_in_value)
    truth = output_and_gradients(gravity_attention_reference, data, upstream, **settings)
    found = output_and_gradients(gravity_attention, data, upstream, **settings)
    skipping = sum(visited)
    gravity_attention(**{**data, "radius": data["radius"] + 1e3}, **settings)
    assert skipping < 0.75 * 2 * (sum(visited) - skipping)
    assert_close(found, truth, 1e-10, 1e-12)


@pytest.mark.parametrize("mass_in_value", [False, True])
@pytest.mark.parametrize("cutoff", CUTOFFS)
def test_decoding_equals_the_rows_of_the_full_result(cutoff, mass_in_value, small_blocks):
    """1 or more newest queries against all keys are the last rows of the T x T formula."""
    data = particles(50, heads=3, cutoff=cutoff)
    settings = dict(cutoff=cutoff, mass_in_value=mass_in_value)
    full = gravity_attention_reference(**data, **settings)
    t = torch.arange(50) + 1000  # only differences of positions matter
    for newest in (1, 3, 17):
        rows = gravity_attention(
            **data | {"q": data["q"][:, :, -newest:]},
            **settings,
            query_positions=t[-newest:],
            key_positions=t,
        )
        torch.testing.assert_close(rows, full[:, :, -newest:], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cutoff", ["hard", "soft"])
def test_keys_out_of_reach_may_be_forgotten(cutoff, small_blocks):
    """Keys beyond `reach` can be forgotten, and `reach` is short enough to be worth it."""
    data = particles(80, heads=2)
    data["time_scale"] = torch.tensor([0.9, 0.4], dtype=torch.float64)
    data["time_offset"] = torch.tensor([1.5, -2.0], dtype=torch.float64)
    data["radius"] = torch.tensor([4.1, 5.3], dtype=torch.float64)
    full = gravity_attention_reference(**data, cutoff=cutoff)
    felt = reach(*(data[name] for name in LAW_TENSORS))
    expected = [1.5 + 4.1 / 0.9 + 1, -2.0 + 5.3 / 0.4 + 1]
    torch.testing.assert_close(felt, torch.tensor(expected, dtype=torch.float64))
    kept = math.ceil(float(felt.max())) + 1  # distances 0 to ceil(reach)
    assert kept < 20
    t = torch.arange(80)
    newest = {"q": data["q"][:, :, -1:]}
    for name in "kv":
        newest[name] = data[name][:, :, -kept:]
    newest["mass"] = data["mass"][:, -kept:]
    out = gravity_attention(
        **data | newest, cutoff=cutoff, query_positions=t[-1:], key_positions=t[-kept:]
    )
    torch.testing.assert_close(out, full[:, :, -1:], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cutoff", ["none", "soft"])
@pytest.mark.parametrize("exponent", [1, 4, 8])
def test_bf16(exponent, cutoff, small_blocks, either_path):
    """bf16 inputs against float64 on the same rounded numbers: 1e-2, gradients 3e-2 of the norm,
    per-head numbers 1e-1 (sums over pairs that nearly cancel)."""
    small_blocks(32, 4000, 48)
    data = particles(80, heads=3, coords=16, width=16, spread=0.5, dtype=torch.float32)
    if cutoff == "soft":
        data["radius"] = torch.tensor([4.0, 6.0, 9.0])
    low = {n: x.bfloat16() if n in "qkv" else x for n, x in data.items()}
    upstream = torch.randn(2, 3, 80, 16).bfloat16()
    settings = dict(exponent=exponent, cutoff=cutoff)
    truth = output_and_gradients(
        gravity_attention_reference, double(low), upstream.double(), **settings
    )
    found = output_and_gradients(gravity_attention, low, upstream, **settings)
    assert found["out"].dtype == torch.bfloat16 and found["mass"].dtype == torch.float32
    for name, expected in truth.items():
        error = (found[name].double() - expected).norm() / expected.norm()
        limit = 1e-2 if name == "out" else 1e-1 if name in LAW_TENSORS else 3e-2
        assert error < limit, f"{name}: {error:.3f}"


@pytest.mark.parametrize("shift", [30.0, 1000.0])
def test_translation(shift, small_blocks, either_path):
    """Far from the origin fp32 keeps its digits, in the output and in every gradient."""
    data = particles(40, heads=2, coords=8, dtype=torch.float32)
    data["q"], data["k"] = data["q"] + shift, data["k"] + shift
    upstream = torch.randn_like(data["v"])
    truth = output_and_gradients(gravity_attention_reference, double(data), upstream.double())
    at_origin = double(data) | {"q": data["q"].double() - shift, "k": data["k"].double() - shift}
    assert_close(
        output_and_gradients(gravity_attention_reference, at_origin, upstream.double()),
        truth,
        1e-9,
        1e-9,
    )
    assert_close(output_and_gradients(gravity_attention, data, upstream), truth, 2e-5, 2e-6)


def test_rounding_never_makes_a_field_negative_or_infinite(small_blocks, either_path):
    """Two clusters 2000 apart in fp32, where r2 is known to about 0.5: outputs stay averages."""
    data = particles(60, heads=2, coords=8, spread=1e-3, dtype=torch.float32)
    side = 1000.0 * (1 - 2 * torch.randint(2, (2, 1, 60, 1)))
    data["q"], data["k"] = data["q"] + side, data["k"] + side
    data["time_scale"] = torch.full((2,), 0.01)
    data["v"] = torch.rand_like(data["v"]) + 1
    for tolerance in (0.0, 1e-4):
        out = gravity_attention(**data, exponent=3, field_tolerance=tolerance)
        assert out.isfinite().all()
        assert out.min() >= 1 - 1e-5 and out.max() <= 2 + 1e-5
