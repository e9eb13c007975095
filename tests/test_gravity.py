"""The gravity operator against plain loops, finite differences and float64 autograd."""

import math

import pytest
import torch

import gravity_blocked
from gravity import (
    gravity_attention,
    gravity_attention_reference,
    gravity_field,
    published_gravity_attention,
)
from gravity_blocked import field_bound, reach

CUTOFFS = ("none", "hard", "soft")
EXPONENTS = (1, 3, 4, 8)
LAW_TENSORS = ("time_scale", "time_offset", "radius")


def squared_distances(data):
    """r2 of all pairs in float64 from one difference tensor, (B, H, Tq, Tk), positions 0..T-1."""
    q, k = data["q"].detach().double(), data["k"].detach().double()
    t_query = torch.arange(q.shape[2], dtype=torch.float64)
    t_key = torch.arange(k.shape[2], dtype=torch.float64)
    lag = t_query[:, None] - t_key - data["time_offset"].detach().double()[:, None, None]
    time_term = (data["time_scale"].detach().double()[:, None, None] * lag) ** 2
    return ((q[:, :, :, None] - k[:, :, None]) ** 2).sum(-1) + time_term


def radius_between(data):
    """A radius per head that lets about half of all pairs in and lies on the edge of none."""
    r2 = squared_distances(data)
    radii = []
    for head in range(r2.shape[1]):
        values = r2[:, head].flatten().sort().values
        if len(values) < 10:
            radii.append(1.5 * float(values[-1].sqrt()))
            continue
        low, high = int(0.4 * len(values)), int(0.6 * len(values))
        gap = low + int((values[low + 1 : high + 1] - values[low:high]).argmax())
        radii.append(float(((values[gap] + values[gap + 1]) / 2).sqrt()))
    return torch.tensor(radii, dtype=torch.float64)


def particles(tokens, heads=2, batch=2, coords=4, width=3, cutoff="none", spread=1.0, dtype=None):
    """Random operator arguments in float64 (or `dtype`)."""
    real = torch.float64
    data = {
        "q": spread * torch.randn(batch, heads, tokens, coords, dtype=real),
        "k": spread * torch.randn(batch, heads, tokens, coords, dtype=real),
        "v": torch.randn(batch, heads, tokens, width, dtype=real),
        "mass": torch.rand(batch, tokens, dtype=real) + 0.5,
        "time_scale": torch.rand(heads, dtype=real) * 0.4 + 0.05,
        "time_offset": torch.linspace(-1.3, 2.6, heads, dtype=real),
    }
    data = {name: tensor.to(dtype or real) for name, tensor in data.items()}
    if cutoff != "none":
        data["radius"] = radius_between(data).to(dtype or real)
    return data


def loop(q, k, v, mass, time_scale, time_offset, exponent, radius, cutoff, mass_in_value, t_q, t_k):
    """Design 1.1 as three Python loops over numbers."""
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


def leaves(data):
    """Copies that ask for gradients."""
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in data.items()}


def double(data):
    return {name: tensor.detach().double() for name, tensor in data.items()}


def output_and_gradients(function, data, upstream, **settings):
    """The output, and the gradient of `(out * upstream).sum()` for every input that has one."""
    inputs = leaves(data)
    out = function(**inputs, **settings)
    names = [n for n in inputs if not (n == "radius" and settings.get("cutoff") == "hard")]
    grads = torch.autograd.grad(
        (out * upstream.to(out.dtype)).sum(), [inputs[n] for n in names], materialize_grads=True
    )
    return {"out": out.detach(), **dict(zip(names, grads, strict=True))}


def assert_close(found, truth, relative, floor):
    """Every tensor within `relative` of the largest entry of its truth, plus `floor`."""
    assert found.keys() == truth.keys()
    for name, expected in truth.items():
        assert found[name].isfinite().all(), name
        error = float((found[name].double() - expected.double()).abs().max())
        limit = relative * float(expected.abs().max()) + floor
        assert error <= limit, f"{name}: error {error:.2e}, allowed {limit:.2e}"


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that a few dozen tokens make many, ragged at the end."""

    def set_blocks(query_block=5, key_block=7):
        monkeypatch.setattr(gravity_blocked, "QUERY_BLOCK", query_block)
        monkeypatch.setattr(gravity_blocked, "KEY_BLOCK", key_block)

    set_blocks()
    return set_blocks


@pytest.fixture
def visited(monkeypatch):
    """A list that grows by the number of heads each time that a tile of the field is computed."""
    counts = []
    tile = gravity_blocked._Tiles.tile

    def counting(self, rows, columns, heads, **settings):
        counts.append(len(heads.index))
        return tile(self, rows, columns, heads, **settings)

    monkeypatch.setattr(gravity_blocked._Tiles, "tile", counting)
    return counts


def causal_tiles(tokens, heads):
    """Tiles, times heads, that no path can avoid without leaving something out."""
    return heads * sum(
        math.ceil(min(start + gravity_blocked.QUERY_BLOCK, tokens) / gravity_blocked.KEY_BLOCK)
        for start in range(0, tokens, gravity_blocked.QUERY_BLOCK)
    )


@pytest.mark.parametrize("mass_in_value", [False, True])
@pytest.mark.parametrize("cutoff", CUTOFFS)
def test_both_paths_equal_three_loops(cutoff, mass_in_value, small_blocks):
    """Reference and blocked path are the formula of design 1.1, gaps between positions included."""
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
def test_gradients_are_finite_differences(cutoff, mass_in_value, path, small_blocks):
    """gradcheck of both paths for every input, the radius of the soft cutoff included."""
    small_blocks(3, 4)
    data = particles(7, heads=2, batch=2, coords=2, width=2, cutoff=cutoff)
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
    tokens, heads, exponent, cutoff, mass_in_value, small_blocks, visited
):
    """Forward and all gradients, in float64 tightly and in fp32, with ragged blocks."""
    if tokens == 65:
        small_blocks(19, 23)
    settings = dict(exponent=exponent, cutoff=cutoff, mass_in_value=mass_in_value)
    single = particles(tokens, heads=heads, cutoff=cutoff, dtype=torch.float32)
    upstream = torch.randn_like(single["v"])
    truth = output_and_gradients(
        gravity_attention_reference, double(single), upstream.double(), **settings
    )
    assert not visited
    exact = output_and_gradients(gravity_attention, double(single), upstream.double(), **settings)
    assert len(visited) >= 2 * math.ceil(tokens / gravity_blocked.QUERY_BLOCK)
    assert_close(exact, truth, 1e-10, 1e-12)
    assert_close(
        output_and_gradients(gravity_attention, single, upstream, **settings), truth, 2e-5, 2e-5
    )


@pytest.mark.parametrize("cutoff", CUTOFFS)
def test_blocked_equals_reference_with_its_own_block_sizes(cutoff):
    """700 tokens in the blocks that users run, some heads out of reach of the oldest ones."""
    data = particles(700, batch=1)
    if cutoff != "none":
        data["radius"] = torch.tensor([4.7, 60.3], dtype=torch.float64)
        data["time_scale"] = torch.tensor([0.41, 0.33], dtype=torch.float64)
    upstream = torch.randn_like(data["v"])
    truth = output_and_gradients(gravity_attention_reference, data, upstream, cutoff=cutoff)
    found = output_and_gradients(gravity_attention, data, upstream, cutoff=cutoff)
    assert_close(found, truth, 1e-10, 1e-12)


def test_strided_inputs():
    """Tensors as a model hands them over: heads split from one projection, not contiguous."""
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


@pytest.mark.parametrize("length", [1, 2, 40, 500])
@pytest.mark.parametrize("exponent", [1, 4, 8, 16])
def test_field_bound_is_never_below_the_sum(length, exponent):
    """Against math.fsum, rounded up: offsets of either sign, steep and flat heads."""
    scales = torch.tensor([0.0035, 0.35, 3.0, 10.0, 10.0, 0.5, 30.0])
    offsets = torch.tensor([0.0, 1.0, -2.5, 15.0, 0.0, 300.25, 7.0])
    bound = field_bound(scales, offsets, exponent, 1.7, length)
    assert bound.shape == (7, length) and bound.dtype == torch.float64
    for head, (scale, offset) in enumerate(zip(scales.tolist(), offsets.tolist(), strict=True)):
        fields = [1.7 * (1 + (scale * (d - offset)) ** 2) ** -exponent for d in range(length)]
        for dt in {0, 1, 7, 14, 15, 16, 38, 299, 300, 498, 499} & set(range(length)):
            truth = math.fsum(fields[dt + 1 :])
            found = float(bound[head, dt])
            assert truth <= found, (head, dt)
            assert found <= truth * (1 + 1e-5) + 1e-290, (head, dt)


def skipping_cases(kind):
    """Data on which much is skipped, and on which a loose rule would go wrong."""
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
        # all that is older than 40 tokens agrees with the query and disagrees in its values
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
    """What is left out moves no output by more than 2 * tolerance * max|v|, nor gradients by more
    than what operator.md derives, while fewer tiles are computed."""
    small_blocks(8, 8)
    data = skipping_cases(kind)
    if exponent == 2:  # falls slowly
        data["time_scale"] *= 10
    upstream = torch.randn_like(data["v"])
    settings = dict(exponent=exponent)
    truth = output_and_gradients(gravity_attention_reference, data, upstream, **settings)
    found = output_and_gradients(
        gravity_attention, data, upstream, **settings, field_tolerance=tolerance
    )
    assert sum(visited) < 0.9 * 2 * causal_tiles(200, 3)

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
    """Old sources with opposite values show that something was dropped, and no more than stated."""
    small_blocks(8, 8)
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
    """Rows whose newest sources have a field of 0, or nearly, must look on, however far back."""
    small_blocks(8, 8)
    data = particles(96, heads=3, batch=2, spread=0.1)
    data["time_scale"] = torch.tensor([0.3, 0.01, 0.002], dtype=torch.float64)
    newest, exponent = data["k"][1, :, 36:], 64
    # one batch entry is plain; in the other the newest 60 sources are out of sight: their fields
    # are 0, 1e-300, or about as small as the bound on all that is older
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
    """The oldest source kept is at the peak of the time term, the next one 1e-16 below it; what
    the query sees of the new ones is less still, so the old one must be visited."""
    small_blocks(8, 16)
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
    small_blocks(8, 8)
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
    """Heads drop out of a query block once all older sources are out of reach; same numbers."""
    data = particles(60, heads=3)
    data["time_scale"] = torch.tensor([2.0, 0.7, 0.05], dtype=torch.float64)
    data["radius"] = torch.tensor([6.01, 5.02, 4.03], dtype=torch.float64)
    upstream = torch.randn_like(data["v"])
    settings = dict(cutoff=cutoff, mass_in_value=mass_in_value)
    truth = output_and_gradients(gravity_attention_reference, data, upstream, **settings)
    found = output_and_gradients(gravity_attention, data, upstream, **settings)
    assert sum(visited) < 0.75 * 2 * causal_tiles(60, 3)
    assert {1, 2, 3} & set(visited[: len(visited) // 2]) != {3}
    assert_close(found, truth, 1e-10, 1e-12)


@pytest.mark.parametrize("path", [gravity_attention_reference, gravity_attention])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cutoff", ["hard", "soft"])
def test_a_token_that_nothing_reaches(cutoff, dtype, path, small_blocks):
    """With an offset the own pull lies beyond the radius: output exactly 0, gradients finite."""
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
    """Under the soft cutoff a lone source on its way out of the radius fades to 0, not to NaN."""
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
def test_the_future_changes_nothing(cutoff, dtype, small_blocks):
    """Other q, k, v and masses after position t leave outputs up to t as they are."""
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
    """An output at t has exactly no gradient at later tokens."""
    inputs = leaves(particles(30, heads=2))
    gravity_attention(**inputs)[:, :, 13].sum().backward()
    for name in "qkv":
        grad = inputs[name].grad
        assert (grad[:, :, 14:] == 0).all() and grad[:, :, 13].abs().max() > 0, name
    assert (inputs["mass"].grad[:, 14:] == 0).all()


@pytest.mark.parametrize("mass_in_value", [False, True])
@pytest.mark.parametrize("cutoff", CUTOFFS)
def test_decoding_equals_the_rows_of_the_full_result(cutoff, mass_in_value, small_blocks):
    """1 or more newest queries against all keys are the last rows of the T x T formula."""
    data = particles(50, heads=3, cutoff=cutoff)
    settings = dict(cutoff=cutoff, mass_in_value=mass_in_value)
    full = gravity_attention_reference(**data, **settings)
    t = torch.arange(50) + 1000  # only differences of positions count
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
    """`reach` is far enough that older keys may go, and near enough to be worth it."""
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
def test_bf16(exponent, cutoff, small_blocks):
    """bf16 inputs against float64 on the same rounded numbers: 1e-2, gradients 3e-2 of the norm,
    per-head scalars 1e-1 (sums of pairs that nearly cancel)."""
    small_blocks(32, 48)
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
def test_translation(shift, small_blocks):
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


def test_rounding_never_makes_a_field_negative_or_infinite(small_blocks):
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


def published_by_hand(data, radius, cutoff, mass_in_value):
    """Design 1.2 from a difference tensor and a softmax written out, in float64."""
    x, mass = data["x"], data["mass"]
    r2 = ((x[:, :, :, None, :] - x[:, :, None, :, :]) ** 2).sum(-1)
    score = -data["gamma"][:, None, None] / (r2 + 1e-6) + data["bias"][:, None, None]
    v = data["v"]
    if mass_in_value:
        v = v * mass[:, None, :, None]
    else:
        score = score * mass[:, None, :, None] * mass[:, None, None, :]
    allowed = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool).tril().expand_as(r2)
    if cutoff == "soft":
        score = score * (1 - r2 / radius**2).clamp(min=0)
    if cutoff == "hard":
        allowed = allowed & (r2 <= radius**2)
    score = score.masked_fill(~allowed, -1e300)
    weight = (score - score.amax(-1, keepdim=True)).exp()
    return (weight / weight.sum(-1, keepdim=True)) @ v


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
    """The first release's law equals design 1.2 written out, forward and gradients."""
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
    """The future changes nothing; the newest queries alone give the same rows."""
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
    """Distances by norms and products must not lose what the difference tensor kept."""
    data = published_particles(tokens=64)
    data["x"] = data["x"] + 40
    single = {n: x.float() for n, x in data.items()}
    truth = published_by_hand(double(single), None, "none", False)
    assert (published(single, None).double() - truth).abs().max() < 2e-4


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
    """ValueError for shapes and settings that cannot be meant; the same call without them works."""
    good = particles(6, dtype=torch.float32)
    assert gravity_attention(**good).shape == (2, 2, 6, 3)
    with pytest.raises(ValueError):
        gravity_attention(**good | wrong)
