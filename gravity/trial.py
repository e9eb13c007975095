"""A trial of the operator on a device for which it was not written, such as Apple's GPUs."""

import torch

from gravity.attention import gravity_attention
from gravity.law import gravity_attention_reference

SIZES = {"q": (1, 2, 9, 4), "k": (1, 2, 9, 4), "v": (1, 2, 9, 5), "mass": (1, 9)}
LAW = {"time_scale": (2,), "time_offset": (2,), "background": (2,)}


def computes(device):
    """Whether gravity attention and its gradients are on this device what the formula says."""
    random = torch.Generator().manual_seed(1)  # the random numbers of a run stay as they are
    inputs = {
        name: torch.rand(shape, generator=random) + 0.1 for name, shape in (SIZES | LAW).items()
    }
    try:
        found = _output_and_gradients(gravity_attention, inputs, device, torch.float32)
    except (RuntimeError, TypeError, NotImplementedError):  # an operation or dtype is missing
        return False
    truth = _output_and_gradients(gravity_attention_reference, inputs, "cpu", torch.float64)
    return all(
        torch.allclose(x.cpu().double(), y, rtol=1e-3, atol=1e-4)
        for x, y in zip(found, truth, strict=True)
    )


def _output_and_gradients(attention, inputs, device, dtype):
    inputs = {name: x.to(device, dtype).requires_grad_() for name, x in inputs.items()}
    out = attention(**inputs)
    return [out, *torch.autograd.grad(out.square().sum(), list(inputs.values()))]
