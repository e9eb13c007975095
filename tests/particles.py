"""Random arguments of the gravity operator, and how its results are compared."""

import torch

CUTOFFS = ("none", "hard", "soft")


def squared_distances(data):
    """r2 of all pairs in float64 from a difference tensor, (B, H, Tq, Tk), for positions 0..T-1."""
    q, k = data["q"].detach().double(), data["k"].detach().double()
    t_query = torch.arange(q.shape[2], dtype=torch.float64)
    t_key = torch.arange(k.shape[2], dtype=torch.float64)
    lag = t_query[:, None] - t_key - data["time_offset"].detach().double()[:, None, None]
    time_term = (data["time_scale"].detach().double()[:, None, None] * lag) ** 2
    return ((q[:, :, :, None] - k[:, :, None]) ** 2).sum(-1) + time_term


def radius_between(data):
    """A radius per head, (H,), that includes about half of all pairs and is not close to any r2."""
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
    """Random arguments of the operator, in float64 unless `dtype` says otherwise."""
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


def leaves(data):
    """Copies that require gradients."""
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
    """Assert that errors are at most `relative` of the truth's largest entry, plus `floor`."""
    assert found.keys() == truth.keys()
    for name, expected in truth.items():
        assert found[name].isfinite().all(), name
        error = float((found[name].double() - expected.double()).abs().max())
        limit = relative * float(expected.abs().max()) + floor
        assert error <= limit, f"{name}: error {error:.2e}, allowed {limit:.2e}"


def published_by_hand(data, radius, cutoff, mass_in_value):
    """The published law in float64, with a difference tensor and the softmax written out."""
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
